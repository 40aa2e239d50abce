"""
Stage 2: depth from one photo with the whole pre-trained GLID; M queries ask for M bins of depth.

    python finetune_depth.py --preset tiny --init out/pretrain/best.pt      with pre-training
    python finetune_depth.py --preset tiny --out out/depth-scratch          from scratch
    python finetune_depth.py --preset tiny --data toyworld:8 --batch-size 8 --overfit --out out/fit
Defaults are the paper's recipe (38.4 k steps of 16 images, 64 queries, 8 processes):
    torchrun --nproc_per_node=8 finetune_depth.py --data nyu/ --eigen-crop --init out/base/best.pt
--data: NYU-Depth-v2 with BTS's file lists, or pairs of photo and 16-bit PNG; see docs/data.md.

Loss, augmentation, schedule and test are BinsFormer's, but without its losses on inner layers and
its scene classifier: the paper names only the scale-invariant loss. OUT holds last.pt, best.pt (by
relative error), log.jsonl and samples/*.png: photo, truth, prediction, black = no measurement.
"""
import contextlib
import math
from pathlib import Path

import numpy as np
import torch

import batching
import checkpoints
import draw
import training
from data import InputError, collate, derive_seed, open_depth
from launch import launch
from losses import silog_loss
from metrics import DepthErrors
from model import DepthEstimator, normalize
from survey import survey
from tokens import at_original

PRESETS = {
    # two CPU cores, about a minute. A high query_lr helps less than in segmentation: Eq. 5 gives
    # each query a depth of its own, so the queries become different even without it
    "tiny": dict(data="toyworld", steps=320, crop=[64, 64], batch_size=16, queries=32, lr=1e-3,
                 query_lr=120.0, drop_path=0.0, workers=1, eval_every=80),
    "small": dict(drop_path=0.1),
}
REPORTED = ("REL", "RMSE", "log10", "delta1", "delta2", "delta3")


def flags():
    """The command line; defaults are BinsFormer's recipe for NYU Depth v2."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    _, data, model, _, evaluation = parser.adders
    positive, rate = training.POSITIVE, training.RATE
    data("--depth-scale", type=training.number(float, 1e-3, 1e6), default=1000.0,
         help="values of a depth PNG per metre")
    model("--crop", type=training.PIXELS, nargs=2, default=[416, 544], metavar=("HEIGHT", "WIDTH"),
          help="training crop, px; at test the network sees whole photos")
    model("--queries", type=positive, default=64, help="M, the number of bins [paper]")
    model("--min-depth", type=rate, default=1e-3, help="metres: where the first bin begins")
    model("--max-depth", type=rate, default=10.0, help="metres: where the last bin ends")
    evaluation("--eigen-crop", action="store_true", help="grade NYU's usual window of 480 x 640 "
               "photos")
    # weight decay and clipping are BinsFormer's
    parser.set_defaults(batch_size=2, out="out/depth", steps=38_400, lr=1e-4, backbone_lr=1.0,
                        drop_path=0.3, weight_decay=0.01, clip=35.0, eval_every=1600)
    return parser


def depth_loss(depth, targets, patch, min_depth=0.0, max_depth=math.inf):
    """SILog, a scalar. depth: float [B, h, w] in metres on a padded canvas; targets: B dicts with
    "depth" [H_b, W_b] in metres. Only pixels between the limits count, as in evaluation: a sensor
    often writes its largest value where it measured nothing.

    Each image is resized alone, as at test: with aligned corners the padding of the canvas would
    move all of its pixels.
    """
    truths = [t["depth"] for t in targets]
    truths = [torch.where((t > min_depth) & (t < max_depth), t, 0) for t in truths]
    found = [at_original(d[None], t.shape, patch, t.shape, align_corners=True)
             for d, t in zip(depth, truths)]
    return silog_loss(*(torch.cat([x.flatten() for x in xs]) for xs in (found, truths)))


@torch.no_grad()
def predict(model, images, layout, originals, run, mirror=True):
    """uint8 images [B, 3, H, W] -> B depth maps float [H0, W0] in metres at the original sizes, on
    the CPU; the answer for the photo or, with mirror, the mean of this and of that for its mirror
    image, mirrored back."""
    sizes, patch = layout.sizes.tolist(), model.glid.config.patch
    layout = layout.to(run.device)

    def answers(batch):
        with run.autocast():
            depth = model(normalize(batch.to(run.device)), layout)
        # already within --min-depth .. --max-depth, as all bins are: nothing to clamp
        return [at_original(d[None], size, patch, original, align_corners=True)[0].cpu()
                for d, size, original in zip(depth, sizes, originals)]

    found = answers(images)
    if mirror:
        mirrored = images.clone()
        for image, (h, w) in zip(mirrored, sizes):          # within its own size: padding stays
            image[:, :h, :w] = image[:, :h, :w].flip(2)
        found = [(a + b.flip(1)) / 2 for a, b in zip(found, answers(mirrored))]
    return found


def graded(shape, args):
    """bool [H, W], True = graded if its depth is known: all pixels, or with --eigen-crop those of
    Eigen's window; InputError if the shape is then not NYU's 480 x 640."""
    if not args.eigen_crop:
        return np.ones(shape, bool)
    if tuple(shape) != (480, 640):
        raise InputError(f"--eigen-crop is for depth maps of 480 x 640, as NYU's; this one has "
                         f"{shape[0]} x {shape[1]}; leave the flag out")
    window = np.zeros(shape, bool)
    window[45:471, 41:601] = True
    return window


def evaluate(model, dataset, args, run, path=None):
    """Depth errors over the validation set, every image once, on one process; draws the first.

    Returns a dict of REPORTED, each the mean of the images' own values, and "images", their number.
    InputError if no pixel counts.
    """
    model.eval()
    metric, rows = DepthErrors(args.min_depth, args.max_depth), []
    batches = batching.share([1] * len(dataset), args, run)
    loader = batching.loader(dataset, batches, collate, model.glid.config, args, run)
    for batch in loader:
        images, layout, targets = batch.to("cpu")
        truths, sizes = [t["depth"] for t in targets], layout.sizes.tolist()
        found = predict(model, images, layout, [t.shape for t in truths], run,
                        training.flip_test(args))
        for image, size, truth, guess in zip(images, sizes, truths, found):
            metric.update(guess.numpy(), truth.numpy(), graded(truth.shape, args))
            if len(rows) < 8 and path and run.rank == 0:
                low, high = draw.depth_range(truth)         # one scale for truth and prediction
                shown = (image[:, :size[0], :size[1]], draw.depth_map(truth, low, high),
                         draw.depth_map(guess, low, high))
                rows.append(draw.sample([draw.canvas(x, draw.SAMPLE)[0] for x in shown]))
    model.train()
    if rows:
        draw.save(draw.below(rows), path)
    errors = run.merged(metric).result()
    if not errors["images"]:
        raise InputError(f"--data {args.data}: no validation image has a pixel with a depth between"
                         f" --min-depth {args.min_depth} and --max-depth {args.max_depth} metres")
    return {name: errors[name] for name in (*REPORTED, "images")}


def build(args, run):
    """The model with its inherited parts; the head and the e_i are always new."""
    if args.min_depth >= args.max_depth:
        raise InputError(f"--min-depth {args.min_depth}: must be below --max-depth "
                         f"{args.max_depth}")
    torch.manual_seed(args.seed)
    model = DepthEstimator(training.model_config(args), args.queries, args.min_depth,
                           args.max_depth)
    checkpoints.load_pretrained(model.glid, args, run)
    return model.to(run.device)


def words(errors):
    """The errors of REPORTED in one line of text."""
    return ", ".join(f"{name} {errors[name]:.4f}" for name in REPORTED)


def evaluate_and_save(model, val, args, run, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the errors of the best checkpoint so far, lowest REL first."""
    errors = evaluate(model, val, args, run, Path(args.out, "samples", f"{step:06d}.png"))
    log.write(step=step, **errors)
    is_best = best is None or errors["REL"] <= best["REL"]
    best = errors if is_best else best
    checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val, is_best)
    return best


def spread(source, args):
    """One line about the depths of up to 16 training photos, which shows a wrong --depth-scale."""
    depth = torch.zeros(0)
    for i in range(0, len(source), -(-len(source) // 16)):
        with contextlib.suppress(*[InputError] * (args.on_error == "skip")):    # training names it
            depth = torch.cat([depth, source.labels(i)["depth"][::4, ::4].flatten()])
    measured = depth[depth > 0]
    if not len(measured):
        return "no depth is measured in the training photos looked at"
    beyond = ((measured < args.min_depth) | (measured > args.max_depth)).float().mean()
    return (f"depth {measured.min():.2f} to {measured.max():.2f} m, median {measured.median():.2f} "
            f"m, {beyond:.0%} of it beyond {args.min_depth:g} to {args.max_depth:g} m; measured at "
            f"{len(measured) / len(depth):.0%} of the pixels")


def main(args):
    """Train or grade; returns the errors, see evaluate, the best ones of a training, and "step"."""
    run = training.start(args)
    train, val = open_depth(args.data, *args.crop, args.data_fraction, args.seed, args.overfit,
                            not args.no_flip, on_error=args.on_error,
                            depth_scale=args.depth_scale, grading=args.eval)
    if run.rank == 0:
        run.print0(spread(train.source, args))
    survey(args, train, val, run)
    graded(val[(0, 0)]["depth"].shape, args)            # complain before the training, not after
    model = build(args, run)
    scales = training.finetune_scales(args)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    step, best, ungraded = checkpoints.resume(args, model, optimizer, run, val)
    if args.eval or (step >= args.steps and not ungraded):
        errors = evaluate(model, val, args, run, training.eval_picture(args, run))
        run.print0(f"{words(errors)} of {errors['images']} images, step {step}")
        return errors | {"step": step}
    batching.steps_per_epoch(len(train), args, run)
    total_batch = run.total_batch(args)
    training.describe(run, model, train, val, total_batch, args.steps, args.lr)

    training.compile_blocks(model, args, run)
    ddp = run.wrap(model)                               # averages gradients over the processes
    loader = batching.training_loader(train, args, run, step, args.steps, collate,
                                      model.glid.config)
    log = training.Log(args, run, step, ungraded)
    with training.Progress(step, args.steps, "depth", loader, run, total_batch) as bar:
        model.train()
        if ungraded:                                # the run ended before this evaluation
            with bar.evaluation():
                best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)
        while step < args.steps:
            # The random numbers of a step (drop path) depend only on (seed, step, rank), so a
            # resumed run repeats them. The samples of a step depend only on (seed, step).
            torch.manual_seed(derive_seed(args.seed, step, run.rank))

            # The learning rate is a function of the step: up for 30 % of the run, then down.
            lr = args.lr * training.one_cycle(step, args.steps)
            training.set_lr(optimizer, lr)

            # Forward, loss, backward. Mean and variance of g in the loss are those of the images in
            # this micro-step, as in BinsFormer, so n processes do not get the same gradient as one
            # process with n times the batch.
            for micro in range(args.accumulate):
                images, layout, targets = run.fetch(loader)
                with run.no_sync(ddp, last=micro + 1 == args.accumulate):
                    with run.autocast():
                        depth = ddp(images, layout)                     # [B, H / 4, W / 4] metres
                    loss = depth_loss(depth, targets, model.glid.config.patch, args.min_depth,
                                      args.max_depth) / args.accumulate
                    loss.backward()
                bar.add(loss)

            # The gradient's norm is clipped, so that one odd batch cannot move the weights far.
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # Now and then: a line of log, a checkpoint, an evaluation, or the end on a signal.
            due = bar.due(step, args, args.eval_every)
            if due.log:
                log.write(step=step, loss=bar.report(step), lr=lr)
            if due.save:
                checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val,
                                            ungraded=due.evaluate)
            if due.stop:                            # Ctrl-C, or a cluster's SIGTERM
                bar.stop(due.stop)
            if due.evaluate:
                with bar.evaluation():
                    best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)

    run.print0(f"best of {step} steps: {words(best)}; {args.out}/samples/{step:06d}.png")
    run.print0(training.how_to_ask(args))
    return best | {"step": step}


if __name__ == "__main__":
    launch(main, training.parse(flags(), PRESETS))
