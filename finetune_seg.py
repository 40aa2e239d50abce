"""
Stage 2: segmentation with the whole pre-trained GLID, a linear head and M zero offsets e_i.

    python finetune_seg.py --preset tiny --init out/pretrain/best.pt        with pre-training
    python finetune_seg.py --preset tiny --out out/scratch                  from scratch
    python finetune_seg.py --preset tiny --out out/part --init out/pretrain/best.pt --load backbone
Defaults are the paper's recipe (160 k steps of 16 images at 640 px, 100 queries, 8 processes):
    torchrun --nproc_per_node=8 finetune_seg.py --data toyworld --init out/base/best.pt
ToyWorld is the only labelled data set so far.

Losses, augmentation, schedule and inference are Mask2Former's, without its masked attention, which
the paper does not mention. OUT holds last.pt, best.pt, log.jsonl and samples/*.png: photo, truth,
prediction.
"""
from pathlib import Path

import torch

import checkpoints
import draw
import training
from data import IGNORE, collate, open_segmentation
from inference import at_original, semantic_inference
from losses import segmentation_loss
from metrics import MeanIoU
from model import Segmenter, normalize

PRESETS = {
    # two CPU cores, about a minute. The e_i must reach the size of the position embeddings (0.7 a
    # channel) that told the pre-trained decoder its queries apart; at --lr they never would
    "tiny": dict(data="toyworld", steps=320, size=64, batch_size=16, points=512, queries=32,
                 lr=1e-3, backbone_lr=1.0, query_lr=500.0, drop_path=0.0, workers=1,
                 eval_every=80),
    "small": dict(backbone_lr=1.0, drop_path=0.1),
}


def flags():
    """The command line; defaults are Mask2Former's recipe for ADE20K."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    add = parser.add_argument
    add("--tasks", default="semantic", choices=["semantic"], help="what to segment")
    positive = training.POSITIVE
    add("--size", type=positive, default=640, help="side of the training crop, shortest at test")
    add("--queries", type=positive, default=100, help="M [paper]")
    add("--points", type=positive, default=12544, help="sampled points per mask")
    add("--weight-decay", type=training.number(float, 0), default=0.05)
    add("--clip", type=training.RATE, default=0.01, help="gradient norm; Mask2Former's")
    add("--eval-every", type=positive, default=5000, help="steps between evaluations")
    parser.set_defaults(batch_size=2, out="out/semantic", steps=160_000, lr=1e-4, backbone_lr=0.1,
                        drop_path=0.3)
    return parser


@torch.no_grad()
def predict(model, images, layout, originals, state):
    """uint8 images [B, 3, H, W] -> list of class maps uint8 [H0, W0] at the original sizes."""
    sizes, patch = layout.sizes.tolist(), model.glid.config.patch
    with state.autocast():
        class_logits, mask_logits = model(normalize(images.to(state.device)),
                                          layout.to(state.device), "semantic")
    scores = semantic_inference(class_logits[-1], mask_logits[-1])
    return [at_original(s, size, patch, original).argmax(0).byte().cpu()
            for s, size, original in zip(scores, sizes, originals)]


def evaluate(model, dataset, args, state, path=None):
    """mIoU over the whole validation set, every image once on one process; picture of the first."""
    model.eval()
    metric, rows = MeanIoU(len(dataset.classes), IGNORE), []
    batches = training.share(len(dataset), args, state)
    for images, layout, targets in training.loader(dataset, batches, collate, model.glid.config,
                                                   args, state):
        truths = [t["semantic"] for t in targets]
        sizes = layout.sizes.tolist()
        found = predict(model, images, layout, [t.shape for t in truths], state)
        for image, size, truth, guess in zip(images, sizes, truths, found):
            metric.update(guess.numpy(), truth.numpy())
            if len(rows) < 8:
                rows.append(draw.beside(image[:, :size[0], :size[1]], truth.shape,
                                        draw.label_map(truth), draw.label_map(guess)))
    model.train()
    if path and state.rank == 0:
        draw.save_picture(rows, path)
    return state.merged(metric).result()


def build(args, classes, state):
    """The model with its inherited parts; the head and the e_i are always new."""
    torch.manual_seed(args.seed)
    model = Segmenter(training.model_config(args), {"semantic": args.queries},
                      {"semantic": len(classes)})
    checkpoints.inherit(model.glid, args, state)
    return model.to(state.device)


def conclude(model, val, args, state, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the best mIoU so far."""
    path = Path(args.out, "samples", f"{step:06d}.png")
    miou = evaluate(model, val, args, state, path)["mIoU"]
    log.write(step=step, mIoU=miou)
    best = max(best or 0, miou)
    checkpoints.keep(args, model, optimizer, state, step, best, is_best=miou == best,
                     classes=list(val.classes))
    return best


def main(args):
    """Train; returns {"mIoU": best mIoU, "step": steps done}."""
    state = training.start(args)
    train, val = open_segmentation(args.data, args.size, args.data_fraction, args.seed)
    model = build(args, train.classes, state)
    scales = [("offsets", args.query_lr), ("backbone", args.backbone_lr)]
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    step, best = checkpoints.resume(args, model, optimizer, state)
    if args.eval or step >= args.steps:
        miou = evaluate(model, val, args, state, Path(args.out, "samples", "eval.png"))["mIoU"]
        state.say(f"mIoU {100 * miou:.2f} of {len(val)} images, step {step}")
        return {"mIoU": miou, "step": step}
    training.steps_per_epoch(len(train), args, state, f"--data {args.data}")
    total_batch = args.batch_size * state.world * args.accumulate
    training.describe(state, model, train, val, total_batch, args.steps, args.lr)

    training.compile_model(model, args)
    ddp = state.wrap(model)
    batches = training.Batches(len(train), args, state, step, args.steps)
    loader = training.Timed(training.loader(train, batches, collate, model.glid.config, args,
                                            state))
    log = training.Log(args, state, step)
    bar = training.Progress(step, args.steps, "semantic", loader, state, total_batch)
    model.train()
    while step < args.steps:
        torch.manual_seed(training.mix(args.seed, step, state.rank))    # drop path, sampled points
        training.set_lr(optimizer, args.lr * training.poly(step, args.steps))
        for micro in range(args.accumulate):
            images, layout, targets = state.fetch(loader)
            # every process divides by the same count, so that gradients average to the true mean
            objects = state.sum(sum(len(t["labels"]) for t in targets))[0] / state.world
            with state.no_sync(ddp, last=micro + 1 == args.accumulate):
                with state.autocast():
                    classes, masks = ddp(images, layout, "semantic", every_layer=True)
                canvas = [n * model.glid.config.patch for n in masks.shape[-2:]]
                loss = segmentation_loss(classes, masks, targets, canvas, max(1, objects),
                                         args.points)["loss"] / args.accumulate
                loss.backward()
            bar.add(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        ends = step % args.eval_every == 0 or step == args.steps
        saves = step % args.save_every == 0
        if ends or saves or step % 20 == 0:
            rate = args.lr * training.poly(step - 1, args.steps)
            log.write(step=step, loss=bar.report(step), lr=rate)
        if ends:
            best = conclude(model, val, args, state, step, best, optimizer, log)
        elif saves:
            checkpoints.keep(args, model, optimizer, state, step, best, classes=list(val.classes))
    bar.close()
    state.say(f"best mIoU {100 * best:.1f} in {step} steps; {args.out}/samples/{step:06d}.png")
    return {"mIoU": best, "step": step}


if __name__ == "__main__":
    training.run(main, training.parse(flags(), PRESETS))
