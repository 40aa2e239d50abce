"""
Stage 1: pre-train GLID as a whole by masked image modelling (section 3.1 of the paper).

On a laptop, in minutes, with nothing to download:
    python pretrain.py --preset tiny
On your own photos (a folder, nested or flat; train/ and val/ inside are respected):
    python pretrain.py --preset tiny --data photos/ --out out/mine
The paper's recipe (600 epochs of ImageNet, 192 px, total batch 2048), 8 GPUs, then 4 nodes:
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --out out/base --accumulate 4
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py --data imagenet/ --out out/base
The total batch is processes x --batch-size x --accumulate; keep it at 2048 on fewer devices. All
nodes must see OUT, on a disk that they share.

OUT holds last.pt (resume), best.pt (fine-tune), log.jsonl and samples/*.png: input, what the
encoder saw, reconstruction.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch

import batching
import checkpoints
import draw
import training
from data import collate_pretraining, derive_seed, open_pretraining
from launch import launch
from losses import reconstruction_loss
from model import Pretrainer, normalize, pixel_statistics, split_units, unit_statistics
from survey import survey

PRESETS = {
    # two CPU cores, about six minutes; in trials norm_pix did better than the paper's raw pixels
    "tiny": dict(data="toyworld", epochs=11, warmup_epochs=1, batch_size=32, lr=2e-3,
                 norm_pix=True, workers=1),
    "small": dict(batch_size=512),
}


def flags():
    """The command line; defaults are the paper's recipe."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    _, data, model, optimiser, evaluation = parser.adders
    data("--mask", choices=["random", "block", "grid"], default="random", help="which units are "
         "hidden (Table 7)")
    data("--mask-ratio", type=training.number(float, 0, 1), default=0.75,
         help="share of the units that is hidden")
    model("--size", type=training.PIXELS, help="px, a multiple of the unit; default: the preset's")
    model("--norm-pix", action=argparse.BooleanOptionalAction, default=False,
          help="targets normalised per unit, as MAE; off in the paper's text")
    optimiser("--epochs", type=training.POSITIVE, default=600, help="length of the schedule")
    optimiser("--warmup-epochs", type=training.number(float, 0), default=40, help="linear; MAE's")
    optimiser("--weight-decay", type=training.number(float, 0), default=0.05, help="[paper]")
    evaluation("--eval-every", type=training.POSITIVE, help="steps between evaluations; default: "
               "once an epoch")
    parser.set_defaults(batch_size=64, out="out/pretrain")
    return parser


class Objective(torch.nn.Module):
    """Normalised images [B, 3, S, S] and their Layout -> the loss of Eq. 2, a scalar. This is what
    --compile turns into one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, layout):
        return reconstruction_loss(*self.model(images, layout))


@torch.no_grad()
def evaluate(model, dataset, args, run):
    """Mean squared error per target value over the whole validation set, equal on all processes."""
    model.eval()
    total, count = 0.0, 0
    batches = batching.share([1] * len(dataset), args, run)
    loader = batching.loader(dataset, batches, collate_pretraining, model.glid.config, args, run)
    for batch in loader:
        images, layout = batch.to(run.device)
        with run.autocast():
            prediction, target = model(normalize(images), layout)
        total += reconstruction_loss(prediction, target).item() * len(images) / target.shape[-1]
        count += len(images)
    model.train()
    total, count = run.sum(total, count)
    return total / count


@torch.no_grad()
def fill(model, images, layout):
    """uint8 images [B, 3, S, S] and their layout, both on the model's device -> four images, uint8
    [B, 3, S, S]: input, what the encoder saw, reconstruction, what this borrowed from the input.

    With --norm-pix the network predicts normalised pixels, so mean and standard deviation of
    each hidden unit are borrowed from the input. The fourth image shows only these, as stripes of
    mean - std and mean + std; without --norm-pix it equals the second.
    """
    pixels, unit = normalize(images), model.glid.config.unit
    prediction = model(pixels, layout)[0].float()                           # [B, N, 3 unit**2]
    where = tuple(layout.hidden_units.long().unbind(1))                     # 3 x [B * N]
    seen, filled = pixels.clone(), pixels.clone()
    split_units(seen, unit)[where] = 0              # split_units gives a view: this changes `seen`
    borrowed = seen.clone()
    if model.norm_pix:
        truth = split_units(pixels, unit)[where].flatten(1)                 # [B * N, 3 unit**2]
        mean, std = unit_statistics(truth.view_as(prediction))              # [B, N, 1] each
        prediction = prediction * std + mean
        # [unit, 1]: four bands, -1, 1, -1, 1
        stripes = (torch.arange(unit, device=mean.device) * 4 // unit % 2 * 2 - 1)[:, None]
        mean, std = mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)           # [B * N, 1, 1, 1]
        split_units(borrowed, unit)[where] = mean + std * stripes
    split_units(filled, unit)[where] = prediction.reshape(-1, 3, unit, unit)
    mean, std = pixel_statistics(images.device)
    return [(x * std + mean).clamp(0, 1).mul(255).byte() for x in (pixels, seen, filled, borrowed)]


def examples(model, dataset, path, run, count=8):
    """A row for each of a few validation photos: input, what the encoder saw, reconstruction."""
    model.eval()
    count = min(count, len(dataset))
    ids = [i * len(dataset) // count for i in range(count)]                 # from all over the set
    images, layout = collate_pretraining(model.glid.config, [dataset[(0, i)] for i in ids])
    panels = fill(model, images.to(run.device), layout.to(run.device))[:3]
    model.train()
    rows = [draw.beside([draw.canvas(x.cpu(), draw.SAMPLE)[0] for x in row])
            for row in zip(*panels)]
    draw.save(draw.below(rows), path)


def evaluate_and_save(model, val, args, run, step, best, optimizer, log):
    """Validate, draw, save. Returns the best validation error so far."""
    loss = evaluate(model, val, args, run)
    log.write(step=step, val_loss=loss)
    is_best = best is None or math.isnan(best) or loss <= best
    best = loss if is_best else best
    if run.rank == 0:
        examples(model, val, Path(args.out, "samples", f"{step:06d}.png"), run)
    checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val, is_best)
    return best


def main(args):
    """Train or grade; returns {"loss": validation error, the best of a training, "step": done}."""
    run = training.start(args)
    config = training.model_config(args, image_size=args.size)
    train, val = open_pretraining(args.data, config, args.mask, args.mask_ratio, args.seed,
                                  args.on_error, Path(args.out, "samples"))
    survey(args, train, val, run)

    torch.manual_seed(args.seed)                        # all processes begin with the same weights
    model = Pretrainer(config, args.norm_pix).to(run.device)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay),
                                  betas=(0.9, 0.95), fused=True)
    step, best, ungraded = checkpoints.resume(args, model, optimizer, run, val)

    steps = batching.schedule(len(train), args, run)
    if args.eval or (step >= steps and not ungraded):
        loss = evaluate(model, val, args, run)
        run.print0(f"validation error {loss:.4f} of {len(val)} images, step {step}")
        return {"loss": loss, "step": step}
    per_epoch = batching.steps_per_epoch(len(train), args, run)
    warmup = max(1, round(steps * args.warmup_epochs / args.epochs))
    total_batch = run.total_batch(args)
    peak = args.lr or 1.2e-3 * total_batch / 2048                           # = MAE's 1.5e-4 per 256
    training.describe(run, model, train, val, total_batch, steps, peak, warmup)

    objective = Objective(model)
    training.compile_whole(objective, args, run)
    ddp, pixels = run.wrap(objective), 3 * config.unit ** 2
    # Gradients get memory that zero_grad below keeps: a CUDA graph's next pass overwrites its own
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # With a budget for the rows of attention (packing.enough), almost all batches have equal shapes
    budget, level = train.row_budget(config, args.batch_size), 0
    collate = partial(collate_pretraining, budget=budget)
    loader = batching.training_loader(train, args, run, step, steps, collate, config)
    log = training.Log(args, run, step, ungraded)
    with training.Progress(step, steps, "pre-training", loader, run, total_batch) as bar:
        model.train()
        if ungraded:                                # the run ended before this evaluation
            with bar.evaluation():
                best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)
        while step < steps:
            # The random numbers of a step (drop path) depend only on (seed, step, rank), so a
            # resumed run repeats them. The samples of a step depend only on (seed, step).
            torch.manual_seed(derive_seed(args.seed, step, run.rank))

            # The learning rate is a function of the step: a linear warm-up, then a cosine to 0.
            lr = peak * training.cosine(step, steps, warmup)
            training.set_lr(optimizer, lr)

            # Encode what is visible, ask for what is hidden, compare with its pixels (Eq. 2). The
            # gradients of the micro-steps add up; the processes average them after the last one.
            for micro in range(args.accumulate):
                images, layout = run.fetch(loader)
                if layout.level > level:            # a rare batch: its shapes are larger
                    level = layout.level
                    print(f"\nstep {step}: these masks need more rows of attention than budgeted; "
                          f"the budget rises to level {level}", file=sys.stderr, flush=True)
                with run.no_sync(ddp, last=micro + 1 == args.accumulate):
                    with run.autocast():
                        loss = ddp(images, layout) / args.accumulate
                    loss.backward()
                bar.add(loss / pixels)      # the error of one pixel value, as val_loss

            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            step += 1

            # Now and then: a line of log, a checkpoint, an evaluation, or the end on a signal.
            due = bar.due(step, args, args.eval_every or per_epoch)
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

    run.print0(f"best validation error {best:.4f} in {step} steps; {args.out}/best.pt, "
              f"{args.out}/samples/{step:06d}.png")
    run.print0(training.how_to_ask(args))
    return {"loss": best, "step": step}


if __name__ == "__main__":
    launch(main, training.parse(flags(), PRESETS))
