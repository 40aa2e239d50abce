"""
What surrounds every training loop and is not the lesson: flags, processes, the order of the
samples, schedules, the log. Small functions; the loops stay in the scripts.

Resuming is exact because nothing random has a memory: the samples of a step, their augmentation
and the network's own noise are pure functions of (seed, step) or (seed, epoch, index).
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import InputError, mix
from model import PRESETS, Config, normalize

# -----------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that keeps the paragraphs of a script's docstring and complains in one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def number(kind, low, high=math.inf, above=False):
    """A converter for argparse: finite numbers of a kind, low (exclusive if `above`) to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            bound = f"{'more than' if above else 'at least'} {low}"
            bound += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r}: must be {bound}")
        return value
    return convert


POSITIVE, COUNT, PIXELS = number(int, 1), number(int, 0), number(int, 16)
RATE, SHARE = number(float, 0, above=True), number(float, 0, 1, above=True)


def add_flags(parser):
    """The flags all scripts share. Defaults are the paper's; --preset tiny changes some."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="base", help="model sizes (tiny: two CPU cores)")
    add("--data", help="folder of the data set, or 'toyworld' (the default of tiny)")
    add("--out", default=None, help="folder of checkpoints, log and pictures")
    add("--resume", action="store_true", help="continue OUT exactly where its last.pt stands")
    add("--eval", action="store_true", help="only evaluate OUT/best.pt")
    add("--steps", type=POSITIVE, help="optimiser steps; overrides the schedule's length")
    add("--batch-size", type=POSITIVE, help="images per process and micro-step")
    add("--accumulate", type=POSITIVE, default=1, help="micro-steps per optimiser step")
    add("--lr", type=RATE, help="peak learning rate, as is")
    add("--save-every", type=POSITIVE, default=500, help="steps between checkpoints")
    add("--workers", type=COUNT, default=4, help="data processes: read, augment, plan")
    add("--seed", type=number(int, 0, 2**63), default=0)
    add("--window", type=number(int, 2, 32), help="attention window, tokens a side")
    add("--drop-path", type=number(float, 0, 0.9), help="of the last encoder block")
    add("--decoder-layers", type=number(int, 3, 99), help="a multiple of 3")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a broken photo or "
        "annotation: stop, or go on without it and count")
    add("--compile", action="store_true", help="torch.compile the decoder (GPUs)")


def add_finetune_flags(parser):
    """What stage 2 adds."""
    add = parser.add_argument
    add("--init", help="pre-trained checkpoint; without it the run starts from scratch")
    add("--load", help="parts taken from --init: backbone,bifpn,decoder (default: all)")
    add("--init-backbone", help="torchvision:FILE, supervised Swin weights")
    add("--overfit", action="store_true", help="train and validate on the same images, not "
        "augmented: whoever changes the code should still reach a near-perfect metric")
    add("--data-fraction", type=SHARE, default=1.0, help="share of the training set (Table 8)")
    add("--backbone-lr", type=number(float, 0), help="lr of the backbone, times --lr")
    add("--query-lr", type=number(float, 0), default=1.0, help="lr of the e_i, times --lr")


def parse(parser, presets, argv=None):
    """Parse argv; `presets` maps a preset's name to defaults that explicit flags override."""
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**presets.get(preset, {}))
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("--data is missing: a folder, or toyworld")
    if vars(args).get("load") is not None and not args.init:
        parser.error("--load chooses parts of --init, which is missing")
    return args


def model_config(args):
    """Config of the preset with the flags that change it."""
    changes = {k: getattr(args, k) for k in ("window", "drop_path", "decoder_layers")}
    config = Config(**PRESETS[args.preset] | {k: v for k, v in changes.items() if v is not None})
    if config.decoder_layers % 3:
        raise InputError(f"--decoder-layers {config.decoder_layers}: take a multiple of 3, so that "
                         "each of the three scales is read equally often")
    return config


def run(main, args):
    """Call main; wrong input ends in one line on stderr and exit code 2, not in a traceback."""
    try:
        return main(args)
    except (InputError, FloatingPointError) as error:
        # an error from a data process carries its traceback: the last line is ours
        message = str(error).strip().splitlines()[-1].replace("files.InputError: ", "")
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror or error}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# -----------------------------------------------------------------------------
# Processes and precision


@dataclass
class Run:
    """Where this process runs. One process without torchrun, else one per device."""
    device: torch.device
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = None               # of autocast; None = fp32 throughout

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def wrap(self, model):
        """The model as the loop calls it: gradients averaged over the processes."""
        if self.world == 1:
            return model
        # our buffers are constants: nothing to broadcast
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def fetch(self, loader):
        """Next batch on the device: images normalised, their layout, targets if there are any."""
        images, layout, *targets = next(loader)
        move = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        targets = [[{k: move(v) if torch.is_tensor(v) else v for k, v in t.items()} for t in batch]
                   for batch in targets]
        return normalize(move(images)), layout.to(self.device), *targets

    def no_sync(self, model, last):
        """Average the gradients only at the last micro-step of an optimiser step."""
        return contextlib.nullcontext() if last or self.world == 1 else model.no_sync()

    def sum(self, *values):
        """Sum of each number over all processes, floats in float64."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def merged(self, metric):
        """A metric's accumulator over all processes, on every process."""
        if self.world == 1:
            return metric
        parts = [None] * self.world
        dist.all_gather_object(parts, metric)
        for other in parts[1:]:
            parts[0].merge(other)
        return parts[0]


def pick_device(local_rank=0):
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def autocast_dtype(device):
    """bf16 where the GPU has it; fp16 would need loss scaling, and MAE users report its NaNs."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def start(args):
    """Join the process group torchrun describes, if any; say what runs where."""
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    state = Run(device, dtype=autocast_dtype(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        if not dist.is_initialized():           # a program may run several scripts
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        state.rank, state.world = dist.get_rank(), dist.get_world_size()
    precision = "bf16 autocast" if state.dtype else "fp32"
    state.say(f"device {device}, {state.world} process(es), {precision}")
    if Path(args.out, "last.pt").exists() and not (args.resume or args.eval):
        raise InputError(f"--out {args.out}: holds a run already; --resume continues it, another "
                         "--out starts a new one")
    try:
        if not args.eval:                                   # a mistyped --out makes no folder
            Path(args.out, "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    return state


# -----------------------------------------------------------------------------
# The order of the samples


class Batches:
    """Which samples each micro-batch of this process holds, for steps start..stop-1.

    A pure function of (seed, step): epoch e visits a permutation drawn from (seed, e), a step takes
    the next `total` of it, and micro-step a of rank r its share. So resuming needs only the step,
    and the samples of a step do not depend on how many processes share it. The tail of an epoch
    that does not fill a step is dropped. Yields lists of (epoch, index) for DataLoader.

    kinds: with more than one, any n samples in a row hold n / kinds (rounded down or up) of each
    kind of index, the remainder of index / kinds.
    """

    def __init__(self, length, args, state, start, stop, kinds=1):
        self.size, self.accumulate, self.seed = args.batch_size, args.accumulate, args.seed
        self.kinds = kinds
        self.length, self.state, self.start, self.stop = length, state, start, stop
        self.total = self.size * state.world * self.accumulate

    def __len__(self):
        return (self.stop - self.start) * self.accumulate

    def __iter__(self):
        per_epoch, epoch_of_order = self.length // self.total, None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order, epoch_of_order = torch.randperm(self.length, generator=generator), epoch
                if self.kinds > 1:              # first of each kind, second of each kind, ...
                    place = torch.empty_like(order)
                    for kind in range(self.kinds):
                        mine = order % self.kinds == kind
                        place[mine] = torch.arange(int(mine.sum())) * self.kinds + kind
                    order = order[place.argsort()]
            for a in range(self.accumulate):
                first = i * self.total + (a * self.state.world + self.state.rank) * self.size
                yield [(epoch, j) for j in order[first:first + self.size].tolist()]


def loader(dataset, batches, collate, config, args, state):
    """DataLoader over lists of (epoch, index); collate(config, samples) makes a batch of each.

    The data processes also plan the Layout; their number changes speed, never the samples.
    """
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=partial(collate, config),
        num_workers=args.workers, prefetch_factor=4 if args.workers else None,
        pin_memory=state.device.type == "cuda")


def schedule(length, args, state):
    """Steps of the whole run: --steps, else --epochs. Evaluation alone needs no training set."""
    if args.eval:
        return 0
    per_epoch = steps_per_epoch(length, args, state, f"--data {args.data}")
    return args.steps or args.epochs * per_epoch


class Skipping:
    """A training set in which the next readable sample takes the place of an unreadable one, which
    is told on stderr once. `broken` is shared with the data processes: bool per sample."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, at):
        epoch, index = at
        for i in [*range(index, len(self)), *range(index)]:
            try:
                # the sum of the two is kept, which chooses the sample's task (data.Segmentation)
                return self.dataset[epoch + index - i, i]
            except InputError as error:
                if not self.broken[i]:
                    self.broken[i] = True
                    print(f"\nskipped: {error}", file=sys.stderr, flush=True)
        raise InputError("no training photo can be read")


def forgiving(dataset, args):
    """The training set, Skipping with --on-error skip."""
    return Skipping(dataset) if args.on_error == "skip" else dataset


def share(length, args, state):
    """Index lists of this process for evaluation: every sample once, on exactly one process."""
    mine = [(0, i) for i in range(state.rank, length, state.world)]
    return [mine[i:i + args.batch_size] for i in range(0, len(mine), args.batch_size)]


def share_crowded(counts, args, state):
    """The same for samples of counts[i] persons each: about --batch-size persons a list, so that
    memory is bounded by that and the most crowded photo."""
    lists, persons = [], math.inf
    for i in range(state.rank, len(counts), state.world):
        if persons + counts[i] > args.batch_size:
            lists.append([])
            persons = 0
        lists[-1].append((0, i))
        persons += max(1, counts[i])                        # a photo of nobody is still read
    return lists


def steps_per_epoch(length, args, state, what):
    total = args.batch_size * state.world * args.accumulate
    if length < total:
        raise InputError(f"{what}: {length} training images are fewer than one step takes ({total})"
                         "; lower --batch-size or --accumulate")
    return length // total


class Timed:
    """Iterate a loader and know the share of time spent waiting for data."""

    def __init__(self, loader):
        self.iterator, self.waited, self.begun = iter(loader), 0.0, time.perf_counter()
        self.dataset = loader.dataset

    def __next__(self):
        before = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - before
        return batch

    def share(self):
        return self.waited / max(time.perf_counter() - self.begun, 1e-9)

    def skipped(self):
        """How many different samples this process had to skip so far."""
        return int(self.dataset.broken.sum()) if isinstance(self.dataset, Skipping) else 0


class Progress:
    """Progress bar, mean loss since the last report, and the watch for a loss of NaN."""

    def __init__(self, step, steps, what, loader, state, images_per_step):
        self.state, self.loader, self.images = state, loader, images_per_step
        self.bar = tqdm(initial=step, total=steps, desc=what, disable=state.rank > 0,
                        mininterval=1, smoothing=0.05, file=sys.stdout)
        self.total, self.first = 0.0, step

    def add(self, loss):
        """A micro-step's share of its step's loss, a scalar tensor (summed on the device)."""
        self.total = self.total + loss.detach()

    def report(self, step, **values):
        """Mean loss over all processes since the last report; raises if it is not finite."""
        mean = self.state.sum(self.total)[0] / self.state.world / (step - self.first)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {step}: lower --lr (or look at the data); the last "
                "checkpoint is untouched, --resume continues from it")
        self.bar.update(step - self.bar.n)
        rate = self.bar.format_dict["rate"] or 0
        if skipped := int(self.state.sum(self.loader.skipped())[0]):
            values["skipped"] = skipped
        self.bar.set_postfix(loss=f"{mean:.4f}", **values, img_s=f"{rate * self.images:.0f}",
                             wait=f"{self.loader.share():.0%}", refresh=False)
        self.total, self.first = 0.0, step
        return mean

    def close(self):
        self.bar.close()
        if skipped := int(self.state.sum(self.loader.skipped())[0]):
            self.state.say(f"{skipped} unreadable training photos were replaced by the next one, "
                           "each named above")


def some(names, most=24):
    """The first names and the last, if they are many."""
    names = list(names)
    return ", ".join(names if len(names) <= most else [*names[:most - 2], "...", names[-1]])


def describe(state, model, train, val, batch, steps, lr):
    """What a run prints before it starts."""
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6
             for name, part in model.glid.named_children()}
    parts["heads"] = sum(p.numel() for p in model.parameters()) / 1e6 - sum(parts.values())
    state.say("parameters (M): " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    if hasattr(train, "classes") or hasattr(train, "joints"):
        describe_answers(state, train)
    state.say(f"{len(train)} training and {len(val)} validation images; {steps} steps of {batch} "
              f"images; peak learning rate {lr:.3g}")


def describe_answers(state, train):
    """The names that the network's answers have."""
    if classes := getattr(train, "classes", ()):
        ids = [f"{i} {name}" for i, name in zip(train.category_ids, classes)]
        state.say(f"{len(classes)} classes, labels 0 to {len(classes) - 1}: {some(ids)}")
    if joints := getattr(train, "joints", ()):
        pairs = sum(other > i for i, other in enumerate(train.flip))
        state.say(f"{len(joints)} joints, {pairs} pairs that a mirror exchanges: {some(joints)}")


def compile_model(model, args):
    """--compile: the decoder layers, whose shapes repeat; the packed parts change with the mask."""
    if args.compile:
        for layer in model.glid.decoder.layers:
            layer.compile()


# -----------------------------------------------------------------------------
# Optimiser and schedules


def param_groups(model, weight_decay, scales=()):
    """AdamW groups. No decay on vectors, biases, tokens, embeddings and bias tables.

    scales: (name prefix or part of a name, learning rate multiplier), first match wins.
    """
    groups = {}
    for name, p in model.named_parameters():
        scale = next((s for part, s in scales if part in name), 1.0)
        token = name.endswith(("bias_table", "offsets", "level"))
        decay = 0.0 if p.ndim < 2 or token else weight_decay
        group = groups.setdefault((scale, decay),
                                  {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(p)
    return list(groups.values())


def cosine(step, total, warmup):
    """0..1: linear warm-up (never 0), then half a cosine to 0 (MAE)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def poly(step, total, power=0.9):
    """1..0, DeepLab's and Mask2Former's schedule; no warm-up."""
    return (1 - step / total) ** power


def multistep(step, total, milestones, warmup=0):
    """Linear warm-up from 0.001; x 0.1 at each milestone, a share of the run (DETR, ViTPose)."""
    drop = 0.1 ** sum(step >= m * total for m in milestones)
    return drop * (1e-3 + (1 - 1e-3) * min(1, step / warmup)) if warmup else drop


def one_cycle(step, total, rise=0.3, start=25, end=100):
    """1/start up to 1 within the first `rise` of the steps, down to 1/(start * end), half cosines.

    PyTorch's and mmcv's OneCycle, in both of which `end` (final_div_factor) divides the initial
    rate, not the peak. Adam's momentum stays as it is: BinsFormer does not cycle it.
    """
    peak = rise * total - 1                                 # step of the highest rate
    if step < peak:
        return 1 + (1 / start - 1) * 0.5 * (1 + math.cos(math.pi * step / peak))
    low = 1 / (start * end)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (step - peak) / (total - 1 - peak)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


# -----------------------------------------------------------------------------
# Log


class Log:
    """One JSON object a line in OUT/log.jsonl, written by rank 0. A resumed run drops the lines
    that a killed one wrote after its last checkpoint."""

    def __init__(self, args, state, step):
        self.path = Path(args.out, "log.jsonl") if state.rank == 0 else None
        if self.path and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            lines = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
            kept = self.path.with_suffix(".tmp")
            kept.write_text("".join(lines))
            os.replace(kept, self.path)

    def write(self, **row):
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v
                                    for k, v in row.items()}) + "\n")
