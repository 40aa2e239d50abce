"""
What surrounds every training loop: flags, the device, processes, signals, schedules, the log. The
loops themselves stay in the scripts. batching.py chooses the samples of a step, and launch.py ends
a program.
"""
import argparse
import contextlib
import errno
import inspect
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from formats.files import InputError, replacing
from launch import Stopped
from model import PRESETS, Config, DecoderLayer, Fusion, SwinBlock, normalize

try:
    import fcntl
except ImportError:                             # Windows: nothing guards a folder against two runs
    fcntl = None

# -----------------------------------------------------------------------------
# Command line


GROUPS = ("what to run", "data", "model", "optimiser", "evaluation")


class Parser(argparse.ArgumentParser):
    """A parser that sorts the flags by GROUPS, keeps the paragraphs of a script's docstring, shows
    each default and reports an error in one line, with exit code 2. adders: each group's
    add_argument."""

    def __init__(self, description):
        super().__init__(usage="%(prog)s [FLAGS]", description=description, formatter_class=Help)
        self.adders = [self.add_argument_group(name).add_argument for name in GROUPS]

    def parse_args(self, *argv):
        args = super().parse_args(*argv)
        for name, value in vars(args).items():
            if value == "":
                self.error(f"--{name.replace('_', '-')} is empty; is a variable not set?")
        return args

    def error(self, message):
        self.exit(2, f"error: {message}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows every default that is a value, as --preset has set it."""

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type else action.dest.upper()

    def _get_help_string(self, action):
        value = action.default
        if value is None or value is False or value is argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{action.help or ''} (default: {shown})".replace("%", "%%").strip()


def number(kind, low, high=math.inf, above=False):
    """A converter for argparse: finite numbers of a kind, low (exclusive if `above`) to high."""
    def convert(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):             # a whole number may be too large for it
            finite = False
        if not finite or value < low or value > high or (above and value == low):
            bound = "a whole number, " * (kind is int)
            bound += f"{'more than' if above else 'at least'} {low}"
            bound += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r}: must be {bound}")
        return value
    return convert


POSITIVE, COUNT, PIXELS = number(int, 1), number(int, 0), number(int, 16)
RATE, SHARE = number(float, 0, above=True), number(float, 0, 1, above=True)


def add_flags(parser):
    """The flags of all scripts. The defaults are the paper's; --preset changes some."""
    run, data, model, optimiser, _ = parser.adders
    run("--preset", choices=PRESETS, default="base", help="sizes of the model and a recipe for "
        "two CPU cores (tiny), one GPU (small); base and large are the paper's")
    run("--out", help="folder of checkpoints, log and pictures")
    run("--resume", action="store_true", help="continue OUT exactly where its last.pt stands")
    run("--eval", action="store_true", help="only grade OUT/best.pt")
    run("--check", action="store_true", help="only report what is in the data set")
    run("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: CUDA if "
        "there is any, else the CPU; mps: Apple's GPU")
    run("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile: on "
        "pre-training's forward pass and loss (default on CUDA), or on fine-tuning's blocks "
        "(default: off)")
    run("--save-every", type=POSITIVE, default=500, help="steps between checkpoints")
    run("--seed", type=number(int, 0, 2**63), default=0, help="seed of all random choices")
    data("--data", help="folder of the data set, or toyworld: drawn photos; "
         "toyworld:1024:256 draws 1024 for training and 256 for validation")
    data("--workers", type=COUNT, default=4, help="processes that read and augment samples")
    data("--on-error", choices=("stop", "skip"), default="stop", help="at a broken photo or "
         "annotation: stop, or leave it out and count it")
    model("--window", type=number(int, 2, 32), help="attention window, tokens a side; default: "
          "the preset's")
    model("--drop-path", type=number(float, 0, 0.9), help="stochastic depth rate of the last block")
    model("--decoder-layers", type=number(int, 3, 99), help="a multiple of 3; default: the "
          "preset's")
    optimiser("--steps", type=POSITIVE, help="optimiser steps; overrides --epochs")
    optimiser("--batch-size", type=POSITIVE, help="images per process and micro-step")
    optimiser("--accumulate", type=POSITIVE, default=1, help="micro-steps per optimiser step")
    optimiser("--lr", type=RATE, help="peak learning rate, not scaled by the batch size")


def add_finetune_flags(parser):
    """What stage 2 adds."""
    _, data, model, optimiser, evaluation = parser.adders
    data("--data-fraction", type=SHARE, default=1.0, help="share of the training set (Table 8)")
    data("--overfit", action="store_true", help="train and validate on the same images, not "
         "augmented; a test of the code: the metric must become near-perfect")
    data("--no-flip", action="store_true", help="do not mirror photos (if left and right differ)")
    model("--init", help="pre-trained checkpoint; without it the run starts from scratch")
    model("--load", help="parts taken from --init, of backbone,bifpn,decoder; default: "
          "all that --init-backbone does not give")
    model("--init-backbone", help="FILE of Swin weights: torchvision's, timm's, the official ones, "
          "SimMIM's")
    optimiser("--backbone-lr", type=number(float, 0), help="backbone's lr as a multiple of --lr")
    optimiser("--query-lr", type=number(float, 0), default=1.0, help="e_i's lr, a multiple of --lr")
    optimiser("--head-lr", type=number(float, 0), default=1.0, help="linear heads' lr, a multiple "
              "of --lr")
    optimiser("--weight-decay", type=number(float, 0), help="AdamW's")
    optimiser("--clip", type=RATE, help="gradient norm")
    evaluation("--eval-every", type=POSITIVE, help="steps between evaluations")


def parse(parser, presets, argv=None):
    """Parse argv or end with exit code 2; presets: {name: defaults that given flags override}. A
    default of --steps does not override --epochs on the command line."""
    if sys.version_info < (3, 10) or torch.__version__ < (2, 6):
        parser.error(f"Python 3.10 and torch 2.6 or newer are needed; these are {sys.version[:6]} "
                     f"and {torch.__version__}")
    first = argparse.ArgumentParser(add_help=False)     # reads --preset: --help shows its defaults
    first.error = parser.error
    for flag in ("--preset", "--epochs", "--steps"):
        first.add_argument(flag)
    given = first.parse_known_args(argv)[0]
    parser.set_defaults(**presets.get(given.preset, {}))
    if given.epochs and not given.steps:
        parser.set_defaults(steps=None)
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("--data is missing: a folder, or toyworld")
    if vars(args).get("load") is not None and not args.init:
        parser.error("--load chooses parts of --init, which is missing")
    return args


def model_config(args, **more):
    """Config of the preset with the flags that change it, and with `more`, None = as it is.
    InputError if they do not fit."""
    changes = {k: getattr(args, k) for k in ("window", "drop_path", "decoder_layers")} | more
    config = Config(**PRESETS[args.preset] | {k: v for k, v in changes.items() if v is not None})
    if config.decoder_layers % 3:
        raise InputError(f"--decoder-layers {config.decoder_layers}: take a multiple of 3, so that "
                         "each of the three scales is read equally often")
    return config


# -----------------------------------------------------------------------------
# Processes and precision


@dataclass
class Run:
    """Where this process runs. One process without torchrun, else one per device. print0 prints on
    rank 0 alone; autocast() is the context in which the network runs."""
    device: torch.device
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = None               # of autocast; None = fp32 throughout
    lock: object = None                     # of OUT, see claim(); held until the run ends

    def print0(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def total_batch(self, args):
        """Images whose gradient one optimiser step takes, of all micro-steps and processes."""
        return args.batch_size * args.accumulate * self.world

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def wrap(self, model):
        """The model as the loop calls it: gradients averaged over the processes."""
        if self.world == 1:
            return model
        # our buffers are constants and need no broadcast in a forward pass (torch renamed the flag)
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})

    def fetch(self, loader):
        """Next batch on the device: images normalised, their layout, targets if there are any."""
        images, *more = next(loader).to(self.device)
        return normalize(images), *more

    def no_sync(self, model, last):
        """Average the gradients only at the last micro-step of an optimiser step."""
        return contextlib.nullcontext() if last or self.world == 1 else model.no_sync()

    def sum(self, *values):
        """Sum of each number over all processes, as floats: a list, added in float64."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)          # by gloo, on the CPU: no GPU is waited for
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


def pick_device(name="auto", local_rank=0):
    """--device: "auto" is the CUDA GPU of this process, else the CPU. Apple's GPU on request, or
    "cuda:1", or a torch.device. InputError where it is missing."""
    name, _, number = str(name).partition(":")
    if name not in ("auto", "cpu", "cuda", "mps") or not (number or "0").isdecimal():
        raise InputError(f"--device {name}: give auto, cpu, cuda or mps")
    given, local_rank = bool(number), int(number or local_rank)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("--device mps: torch finds no Apple GPU here; leave the flag out")
        if "RANK" in os.environ:
            raise InputError("--device mps: one process only, without torchrun")
        return torch.device("mps")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU; leave the flag out, or install "
                         "torch for CUDA and the driver")
    if local_rank >= torch.cuda.device_count() and given:
        raise InputError(f"--device {name}:{number}: this machine has {torch.cuda.device_count()} "
                         "GPU(s), counted from 0")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} "
                         "GPUs of this machine; start one per GPU")
    return torch.device("cuda", local_rank)


def precision(device):
    """-> (dtype of autocast or None for fp32, words that say why)."""
    if device.type != "cuda":
        return None, "fp32"
    # Emulated bf16, as on T4 and V100, does not count: it is slower than fp32. fp16 would need loss
    # scaling, and users of MAE report NaNs with it
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bf16 autocast"
    return None, "fp32 (this GPU has no bf16)"


def start(args):
    """Join the process group torchrun describes, if any; say what runs where; claim OUT. Returns
    Run; InputError if OUT is taken."""
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)           # precision asks the current device
    dtype, words = precision(device)
    run = Run(device, dtype=dtype)
    if "RANK" in os.environ:
        if not dist.is_initialized():           # a program may run several scripts
            # an hour: one process may compile for minutes while the others wait for it
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=1))
        run.rank, run.world = dist.get_rank(), dist.get_world_size()
    words += "; we have not tested Apple's GPUs" * (device.type == "mps")
    run.print0(f"device {device}, {run.world} process(es), {words}")
    if args.check:
        return run
    held = [name for name in ("last.pt", "best.pt") if Path(args.out, name).exists()]
    if held and not (args.resume or args.eval):
        way = "--resume continues it, " if held[0] == "last.pt" else ""
        raise InputError(f"--out {args.out}: holds {held[0]} of a run already; {way}another --out "
                         "starts a new one")
    if not args.eval:                                       # a mistyped --out makes no folder
        try:
            Path(args.out, "samples").mkdir(parents=True, exist_ok=True)
            run.lock = claim(args.out) if run.rank == 0 else None
        except OSError as error:
            raise InputError(f"--out {args.out}: cannot be written ({error.strerror})") from None
        taken = run.rank == 0 and run.lock is None
        if run.sum(taken)[0]:                             # all processes end, not rank 0 alone
            raise InputError(f"--out {args.out}: another run is writing there; wait for it, or give"
                             " another --out")
    return run


def claim(folder):
    """Lock the folder for this process: the open lock file, or None if another process has it.
    The lock lasts until the file is closed or the process ends, however it ends.

    A POSIX lock is not inherited by data processes, and the kernel releases it after SIGKILL.
    """
    file = open(Path(folder, ".lock"), "ab")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):     # else the drive has no locks
            file.close()
            return None
    return file


# -----------------------------------------------------------------------------
# What a run reports


class Progress:
    """Progress bar and mean loss since the last report; watches for a loss of NaN and for signals.

    SIGINT (Ctrl-C) and SIGTERM (a cluster that wants its machine back) ask for an end after the
    running step; one more, over 2 s later, ends the process at once. A context manager: whatever
    ends the loop, signals are then what they were.
    """

    def __init__(self, step, steps, what, loader, run, images_per_step):
        self.run, self.loader, self.images = run, loader, images_per_step
        self.bar = tqdm(initial=step, total=steps, desc=what, disable=run.rank > 0,
                        mininterval=1, smoothing=0.05, file=sys.stdout)
        self.total, self.first = 0.0, step
        self.begun, self.waited = time.perf_counter(), 0.0      # the seconds since the last report
        self.signal, self.evaluating, self.before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.asked) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *_):
        self.bar.close()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and (skipped := int(self.run.sum(self.loader.skipped())[0])):
            self.run.print0(f"{skipped} training samples of unreadable photos (pose: persons) were "
                           "replaced by the next one; each photo is named above")

    def asked(self, number, _):
        """Handler of a signal."""
        # a cluster and torchrun may both pass on one signal: a repeat within 2 s does not count
        if self.signal and time.monotonic() - self.since > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if self.evaluating:                 # it may last longer than the cluster waits
                self.stop(number)

    def stops(self):
        """The signal that any process got, or 0; all processes get the same answer."""
        seen = self.run.sum(*(self.signal == n for n in (signal.SIGINT, signal.SIGTERM)))
        return signal.SIGINT if seen[0] else signal.SIGTERM if seen[1] else 0

    def due(self, step, args, every):
        """What is due after this step: log, a line of log; save, a checkpoint; stop, the end (a
        signal's number, the same on all processes, or 0); evaluate, an evaluation: every `every`
        steps and after the last one. The run is saved before a stop and an evaluation."""
        stop, evaluate = self.stops(), step % every == 0 or step == self.bar.total
        save = evaluate or bool(stop) or step % args.save_every == 0
        return SimpleNamespace(log=save or step % 20 == 0, save=save, stop=stop, evaluate=evaluate)

    def stop(self, number):
        """End the run, whose last step is saved."""
        raise Stopped(number, f"stopped by {signal.Signals(number).name}; the run is saved, and "
                      "with --resume the same command goes on")

    @contextlib.contextmanager
    def evaluation(self):
        """Around an evaluation, before which the run is saved: a signal ends it at once."""
        self.evaluating, before = True, time.perf_counter()
        if self.signal:                         # it came while the run was saved
            self.stop(self.signal)
        try:
            yield
        finally:
            self.evaluating = False
            self.begun += time.perf_counter() - before          # images/s are those of training

    def add(self, loss):
        """A micro-step's share of its step's loss, a scalar tensor (summed on the device)."""
        self.total = self.total + loss.detach()

    def report(self, step):
        """Mean loss over all processes since the last report; FloatingPointError if not finite."""
        mean = self.run.sum(self.total)[0] / self.run.world / (step - self.first)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {step}: lower --lr (or look at the data); with "
                "--resume the run goes on from its last checkpoint, if there is one")
        self.bar.update(step - self.bar.n)
        seconds, waited = time.perf_counter() - self.begun, self.loader.waited - self.waited
        rate = (step - self.first) * self.images / seconds
        skipped = int(self.run.sum(self.loader.skipped())[0])
        more = {"skipped": skipped} if skipped else {}
        self.bar.set_postfix(loss=f"{mean:.4f}", **more, img_s=f"{rate:.0f}",
                             wait=f"{waited / seconds:.0%}", refresh=False)
        self.total, self.first = 0.0, step
        self.begun, self.waited = self.begun + seconds, self.waited + waited
        return mean


def describe(run, model, train, val, batch, steps, lr, warmup=0):
    """What a run prints before it starts; batch: images a step; warmup: steps."""
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6
             for name, part in model.glid.named_children()}
    parts["heads"] = sum(p.numel() for p in model.parameters()) / 1e6 - sum(parts.values())
    run.print0("parameters (M): " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    run.print0(f"{len(train)} training and {len(val)} validation samples; {steps} steps of {batch} "
              f"images; peak learning rate {lr:.3g}")
    if warmup >= steps:
        run.print0(f"note: the warm-up takes {warmup} steps, so the learning rate rises to the end "
                   "of the run; give a shorter warm-up")


def eval_picture(args, run):
    """Where rank 0 draws the examples of --eval; None if OUT (another user's?) is not writable."""
    path = Path(args.out, "samples", "eval.png")
    if run.rank > 0:
        return None
    try:
        path.parent.mkdir(exist_ok=True)
        (test := path.with_suffix(".tmp")).touch()
        test.unlink()
    except OSError as error:
        run.print0(f"note: no picture, {path.parent} cannot be written ({error.strerror})")
        return None
    return path


def flip_test(args):
    """Whether an answer is averaged with that for the mirror image: not if no photo was mirrored in
    training."""
    return not (args.overfit or args.no_flip)


def percent(value, decimals=2):
    """A metric in 0..1 as text; "none" for -1 and NaN, where there was nothing to find."""
    return f"{100 * value:.{decimals}f}" if value >= 0 else "none"


def print_classes(run, metric, result, classes):
    """What --eval prints above its last line: the metric of each class, of metrics.py's `result`.
    """
    run.print0(f"{metric:>8}  class")
    for value, name in zip(result["per_category"].values(), classes):
        run.print0(f"{percent(value):>8}  {name}")


# -----------------------------------------------------------------------------
# torch.compile


def compile_whole(objective, args, run):
    """--compile in pre-training: forward pass and loss as one graph, whose shapes never change. On
    CUDA its kernels are launched all at once, as a CUDA graph. In place: names stay as they are."""
    # graphs belong to the code, not to the model: those of an earlier run in this process
    # would count against the limit of torch.compile and keep their memory
    torch._dynamo.reset()
    on_cuda = run.device.type == "cuda"
    if compiles(on_cuda if args.compile is None else args.compile, run):
        objective.compile(fullgraph=True, dynamic=False,
                          mode="reduce-overhead" if on_cuda else "default")


def compile_blocks(model, args, run):
    """--compile in fine-tuning, where sizes change from batch to batch: the blocks, each a graph
    for any size. What lies between them, and the losses, stay as they are."""
    torch._dynamo.reset()                       # see above: also where nothing is compiled now
    if compiles(args.compile, run):
        # blocks differ in widths, in whether windows share rows and whether keys are padded
        torch._dynamo.config.cache_size_limit = 64
        for module in model.glid.modules():
            if isinstance(module, (SwinBlock, Fusion, DecoderLayer)):
                module.compile(dynamic=True)


def compiles(wanted, run):
    """Whether torch.compile is wanted and works on all processes; if it fails, one line says so."""
    error = None
    # DDP would cut the graphs into pieces, to send gradients while others are computed
    torch._dynamo.config.optimize_ddp = False
    if wanted:
        try:                                    # all it needs: Python's headers, gcc, Triton, ...
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=run.device))
        except Exception as failed:             # whatever is missing: training goes on without
            lines = [x for x in str(failed).splitlines() if x and not x.startswith("backend=")]
            error = lines[0] if lines else type(failed).__name__
        if run.sum(error is not None)[0]:     # all processes decide the same
            run.print0(f"not compiled: {(error or 'another process cannot')[:120]}")
            wanted = False
    return bool(wanted)


def how_to_ask(args):
    """The command that shows a trained model at work."""
    return f"python predict.py {shlex.quote(str(Path(args.out, 'best.pt')))} YOURPHOTO"


# -----------------------------------------------------------------------------
# Optimiser and schedules


def param_groups(model, weight_decay, scales=()):
    """AdamW groups. No decay on vectors (biases, norms, [CLS], [M]), bias tables, the e_i and the
    level embedding.

    scales: (part of a name, learning rate multiplier), first match wins.
    """
    groups = {}
    for name, p in model.named_parameters():
        scale = next((s for part, s in scales if part in name), 1.0)
        table = name.endswith(("bias_table", "offsets", "level"))
        decay = 0.0 if p.ndim < 2 or table else weight_decay
        group = groups.setdefault((scale, decay),
                                  {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(p)
    return list(groups.values())


def finetune_scales(args):
    """Multipliers of --lr for param_groups: of the e_i, of the backbone, of what else is inherited,
    and of the rest, which is the linear heads."""
    return [("offsets", args.query_lr), ("backbone", args.backbone_lr), ("glid.", 1.0),
            ("", args.head_lr)]


def cosine(step, total, warmup):
    """Factor 0..1 of the peak rate: linear warm-up (never 0), then half a cosine to 0 (MAE)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def poly(step, total, power=0.9):
    """1..0, DeepLab's and Mask2Former's schedule; no warm-up."""
    return (1 - step / total) ** power


def multistep(step, total, milestones, warmup=0):
    """Warm-up from 0.001 to 1; x 0.1 at each of `milestones`, 0..1 of the run (DETR, ViTPose)."""
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
    """Give each group of param_groups lr times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


# -----------------------------------------------------------------------------
# Log


class Log:
    """One JSON object a line in OUT/log.jsonl; write(name=value) adds one, on rank 0. A resumed run
    drops the lines that a killed run wrote after its last checkpoint; if `step` is still ungraded,
    also its evaluation, because it is done again."""

    def __init__(self, args, run, step, ungraded=False):
        self.path = Path(args.out, "log.jsonl") if run.rank == 0 else None
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if line.endswith("}")]
            rows = [json.loads(line) for line in lines]
            lines = [line + "\n" for line, row in zip(lines, rows)
                     if row["step"] < step + (not ungraded) or (
                         row["step"] == step and "lr" in row)]
            with replacing(self.path) as kept:
                kept.write_text("".join(lines), encoding="utf-8")

    def write(self, **row):
        if self.path:
            with open(self.path, "a", encoding="utf-8") as f:
                # JSON has no NaN, the metric of an empty set: write null
                f.write(json.dumps({k: v if not isinstance(v, float) else None if math.isnan(v)
                                    else float(f"{v:.6g}") for k, v in row.items()}) + "\n")
