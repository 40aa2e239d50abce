"""
Stage 1: pre-train GLID as a whole by masked image modelling (section 3.1 of the paper).

On a laptop, nothing to download, minutes:
    python pretrain.py --preset tiny --out out/tiny
On your own photos (a folder, nested or flat; train/ and val/ inside are respected):
    python pretrain.py --preset tiny --data photos/ --out out/mine
The paper's recipe (600 epochs of ImageNet, 192 px, total batch 2048), 8 GPUs, then 4 nodes:
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --out out/base --accumulate 4
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py --data imagenet/ --out out/base
The total batch is processes x --batch-size x --accumulate; keep it at 2048 on fewer devices.

OUT holds last.pt (resume), best.pt (fine-tune), log.jsonl and samples/*.png: input, what the
encoder saw, reconstruction.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch

import batching
import checkpoints
import draw
import training
from data import collate_pretraining, mix, open_pretraining
from losses import reconstruction_loss
from model import Pretrainer, normalize, pixel_statistics, split_units
from survey import survey

PRESETS = {
    # two CPU cores, about six minutes; raw pixels are the paper's text, normalised ones learn more
    "tiny": dict(data="toyworld", epochs=11, warmup_epochs=1, batch_size=32, lr=2e-3,
                 norm_pix=True, workers=1),
    "small": dict(batch_size=512),
}


def flags():
    """The command line; defaults are the paper's recipe."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    _, data, model, optimiser, _ = parser.adders()
    data("--mask", choices=["random", "block", "grid"], default="random", help="which units are "
         "hidden (Table 7)")
    data("--mask-ratio", type=training.number(float, 0, 1), default=0.75,
         help="share of the units that is hidden")
    model("--norm-pix", action=argparse.BooleanOptionalAction, default=False,
          help="targets normalised per unit, as MAE; off in the paper's text")
    optimiser("--epochs", type=training.POSITIVE, default=600, help="length of the schedule")
    optimiser("--warmup-epochs", type=training.number(float, 0), default=40, help="linear; MAE's")
    optimiser("--weight-decay", type=training.number(float, 0), default=0.05, help="[paper]")
    parser.set_defaults(batch_size=64, out="out/pretrain")
    return parser


class Objective(torch.nn.Module):
    """From a batch to its loss: what a step computes, as one graph if it is compiled."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, layout):
        return reconstruction_loss(*self.model(images, layout))


@torch.no_grad()
def evaluate(model, dataset, args, state):
    """Mean squared error per target value over the whole validation set, all processes."""
    model.eval()
    total, count = 0.0, 0
    batches = batching.share(len(dataset), args, state)
    loader = batching.loader(dataset, batches, collate_pretraining, model.glid.config, args, state)
    for batch in loader:
        images, layout = batch.to(state.device)
        with state.autocast():
            prediction, target = model(normalize(images), layout)
        total += reconstruction_loss(prediction, target).item() * len(images) / target.shape[-1]
        count += len(images)
    model.train()
    total, count = state.sum(total, count)
    return total / count


@torch.no_grad()
def fill(model, images, layout):
    """uint8 images [B, 3, S, S] and their layout, both on the model's device -> uint8 [B, 3, S, S]
    each: input, what the encoder saw, reconstruction, and what that borrowed from the input.

    With --norm-pix the network predicts contrast and form only; the mean and spread of a hidden
    unit, needed to show it, are then borrowed from the input. The fourth image shows them alone, as
    stripes of mean - spread and mean + spread; without --norm-pix it is what the encoder saw.
    """
    pixels, unit = normalize(images), model.glid.config.unit
    prediction = model(pixels, layout)[0].float()                           # [B, N, 3 unit**2]
    where = tuple(layout.hidden.long().unbind(1))
    seen, filled = pixels.clone(), pixels.clone()
    split_units(seen, unit)[where] = 0                                      # views: write through
    borrowed = seen.clone()
    if model.norm_pix:
        truth = split_units(pixels, unit)[where].flatten(1)
        spread, mean = (truth.var(-1) + 1e-6).sqrt(), truth.mean(-1)        # [B * N]
        prediction = prediction * spread.view(*prediction.shape[:2], 1) \
            + mean.view(*prediction.shape[:2], 1)
        stripes = (torch.arange(unit, device=mean.device) * 4 // unit % 2 * 2 - 1)[:, None]
        split_units(borrowed, unit)[where] = mean.view(-1, 1, 1, 1) + spread.view(-1, 1, 1, 1) \
            * stripes
    split_units(filled, unit)[where] = prediction.reshape(-1, 3, unit, unit)
    mean, std = pixel_statistics(images.device)
    return [(x * std + mean).clamp(0, 1).mul(255).byte() for x in (pixels, seen, filled, borrowed)]


def picture(model, dataset, path, state, count=8):
    """A row for each of a few validation photos: input, what the encoder saw, reconstruction."""
    model.eval()
    count = min(count, len(dataset))
    ids = [i * len(dataset) // count for i in range(count)]                 # from all over the set
    images, layout = collate_pretraining(model.glid.config, [dataset[(0, i)] for i in ids])
    panels = fill(model, images.to(state.device), layout.to(state.device))[:3]
    model.train()
    rows = [draw.beside([draw.canvas(x.cpu(), draw.SAMPLE)[0] for x in row])
            for row in zip(*panels)]
    draw.save(draw.below(rows), path)


def conclude(model, val, args, state, step, best, optimizer, log):
    """End of an epoch: validate, draw, save. Returns the best validation error so far."""
    loss = evaluate(model, val, args, state)
    log.write(step=step, val_loss=loss)
    is_best = best is None or not loss > best
    best = loss if is_best else best
    if state.rank == 0:
        picture(model, val, Path(args.out, "samples", f"{step:06d}.png"), state)
    checkpoints.keep(args, model, optimizer, state, step, best, val, is_best)
    return best


def main(args):
    """Train; returns {"loss": best validation error, "step": steps done}."""
    state = training.start(args)
    config = training.model_config(args)
    train, val = open_pretraining(args.data, config, args.mask, args.mask_ratio, args.seed,
                                  args.on_error)
    survey(args, train, val, state)

    torch.manual_seed(args.seed)                                            # same weights on all
    model = Pretrainer(config, args.norm_pix).to(state.device)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay),
                                  betas=(0.9, 0.95), fused=True)
    step, best, due = checkpoints.resume(args, model, optimizer, state, val)

    per_epoch = batching.steps_per_epoch(len(train), args, state, f"--data {args.data}")
    steps = args.steps or args.epochs * per_epoch
    if args.eval or (step >= steps and not due):
        loss = evaluate(model, val, args, state)
        state.say(f"validation error {loss:.4f} of {len(val)} images, step {step}")
        return {"loss": loss, "step": step}
    warmup = max(1, round(steps * args.warmup_epochs / args.epochs))
    total_batch = args.batch_size * state.world * args.accumulate
    lr = args.lr or 1.2e-3 * total_batch / 2048                             # = MAE's 1.5e-4 per 256
    training.describe(state, model, train, val, total_batch, steps, lr)

    objective = Objective(model)
    training.compile_whole(objective, args, state)
    ddp, pixels = state.wrap(objective), 3 * config.unit ** 2
    # kept from step to step: the memory that a CUDA graph gives to a gradient serves one pass only
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # with a budget for the rows of attention all batches have the same shapes
    collate, level = partial(collate_pretraining, budget=train.row_budget(
        config, args.batch_size)), 0
    batches = batching.Batches(len(train), args, state, step, steps)
    loader = batching.Timed(batching.loader(batching.forgiving(train, args), batches, collate,
                                            config, args, state))
    log = training.Log(args, state, step, due)
    with training.Progress(step, steps, "pre-training", loader, state, total_batch) as bar:
        model.train()
        if due:                                     # the run ended before it was evaluated
            with bar.evaluation():
                best = conclude(model, val, args, state, step, best, optimizer, log)
        while step < steps:
            # the network's own noise is a function of (seed, step, rank): resuming repeats it
            torch.manual_seed(mix(args.seed, step, state.rank))
            training.set_lr(optimizer, lr * training.cosine(step, steps, warmup))
            for micro in range(args.accumulate):
                images, layout = state.fetch(loader)
                if layout.level > level:
                    level = layout.level
                    print(f"\nstep {step}: these masks need more rows of attention than budgeted; "
                          f"raised, level {level}", file=sys.stderr, flush=True)
                with state.no_sync(ddp, last=micro + 1 == args.accumulate):
                    with state.autocast():
                        loss = ddp(images, layout) / args.accumulate
                    loss.backward()
                bar.add(loss / pixels)              # of the mean squared error of a pixel
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            step += 1

            stops = bar.stops()                     # Ctrl-C, or a cluster's SIGTERM
            ends, saves = step % per_epoch == 0 or step == steps, step % args.save_every == 0
            if ends or saves or stops or step % 20 == 0:
                log.write(step=step, loss=bar.report(step), lr=optimizer.param_groups[0]["lr"])
            if ends or saves or stops:              # before the evaluation, which may fail
                checkpoints.keep(args, model, optimizer, state, step, best, val, due=ends)
            if stops:
                bar.stop(stops)
            if ends:
                with bar.evaluation():
                    best = conclude(model, val, args, state, step, best, optimizer, log)
    state.say(f"validation error {best:.4f} after {step} steps; {args.out}/best.pt, "
              f"{args.out}/samples/{step:06d}.png")
    state.say(training.how_to_ask(args))
    return {"loss": best, "step": step}


if __name__ == "__main__":
    training.run(main, training.parse(flags(), PRESETS))
