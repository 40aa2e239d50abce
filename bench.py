"""
How fast are our parts? Each is timed in one run, in turn with its reference, so that a machine
whose speed drifts favours nobody. A ratio is the median over the rounds.

    python bench.py encoder step             against torchvision's dense Swin of the same sizes
    python bench.py encoder step --json      the ratios as one line of JSON

Forward + backward in training mode, Swin-B, window 6, 192 px, batch 8, 75 % hidden, fp32 on CPU,
bf16 autocast on GPUs that have it. The floor by arithmetic (multiply-adds over the dense encoder's)
is 0.27 for the encoder that sees a quarter and 0.37 for the whole pre-training step; seconds can
fall below it, because the dense encoder also spends time on what is not a multiply-add.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torchvision.models.swin_transformer import SwinTransformer

from data import hidden_units, seeded
from layout import Layout
from losses import reconstruction_loss
from model import PRESETS, Config, Pretrainer
from training import autocast_dtype, pick_device

NEEDS = {"encoder": ["visible", "all_visible"], "step": ["step"]}      # besides "dense"


def contestants(config, device):
    """Name -> function (batch size) that does one forward + backward.

    dense        torchvision's Swin, every token
    visible      our encoder on 25 % of the units, masks drawn and indices built anew each time
    all_visible  our encoder, nothing hidden
    step         all of pre-training but the optimiser: encoder, BiFPN, decoder, head, loss
    """
    torch.manual_seed(0)
    dense = SwinTransformer([config.patch] * 2, config.width, list(config.depths),
                            list(config.heads), [config.window] * 2,
                            stochastic_depth_prob=0).features.to(device)
    ours, dtype = Pretrainer(config).to(device), autocast_dtype(device)
    backbone, side = ours.glid.backbone, config.image_size // config.unit

    def inputs(batch):
        images = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        return images, torch.stack([hidden_units("random", side, 0.75) for _ in range(batch)])

    def plan(images, hidden):
        sizes = torch.tensor([images.shape[2:]]).expand(len(images), 2)
        return Layout(config, sizes, hidden).to(device)

    def encoder(images, hidden):
        layout = plan(images, hidden)
        maps = backbone(ours.glid.tokens(images, layout), layout)
        return sum(m.float().square().mean() for m in maps)

    losses = {
        "dense": lambda images, hidden: dense(images).float().square().mean(),
        "visible": encoder,
        "all_visible": lambda images, hidden: encoder(images, None),
        "step": lambda images, hidden: reconstruction_loss(
            *ours(images, plan(images, hidden))),
    }

    def runner(loss):
        def run(batch):
            images, hidden = inputs(batch)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                value = loss(images, hidden)
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return run
    return {name: runner(loss) for name, loss in losses.items()}


def peak_memory(name, config, batch):
    """Bytes that forward + backward needs beyond weights and gradients; for a fresh process."""
    device = pick_device()
    run = contestants(config, device)[name]
    run(1)                                              # gradients exist from here on
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(batch)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")       # Linux: forget the peak so far
    before = resident("VmRSS")
    run(batch)
    return resident("VmHWM") - before


def resident(field):
    """Bytes of a memory field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(args):
    """Time, measure memory, print; returns {"<part>_over_dense": ratio}."""
    device, config = pick_device(), Config(**PRESETS[args.preset])
    names = ["dense"] + [n for part in args.parts for n in NEEDS[part]]
    runs = contestants(config, device)
    seconds = {name: [] for name in names}
    with seeded(0):
        for r in range(args.rounds + 1):                # the first round warms up
            for name in names:
                begun = time.perf_counter()
                runs[name](args.batch_size)
                if r:
                    seconds[name].append(time.perf_counter() - begun)
    result = {f"{n}_over_dense": round(statistics.median(
        a / b for a, b in zip(seconds[n], seconds["dense"])), 3) for n in names[1:]}
    if not args.json:
        where = torch.cuda.get_device_name() if device.type == "cuda" else \
            f"CPU, {torch.get_num_threads()} threads"
        print(f"{where}, torch {torch.__version__}, preset {args.preset}, batch {args.batch_size}")
        for n in names:
            low, high = min(seconds[n]), max(seconds[n])
            print(f"{n:12} {statistics.median(seconds[n]):7.3f} s ({low:.3f} to {high:.3f})  "
                  f"{result.get(n + '_over_dense', 1):.3f} of dense")
    if "encoder" in args.parts:
        memory = {}
        for name in ("dense", "visible"):
            flags = [f"--batch-size={args.batch_size}", f"--preset={args.preset}"]
            out = subprocess.run([sys.executable, __file__, f"--memory-of={name}", *flags],
                                 capture_output=True, text=True, check=True).stdout
            memory[name] = int(out)
        result["memory_visible_over_dense"] = round(memory["visible"] / memory["dense"], 3)
        if not args.json:
            print("peak memory beyond weights and gradients: "
                  + ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in memory.items())
                  + f", ratio {result['memory_visible_over_dense']}")
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="encoder, step; both by default")
    parser.add_argument("--json", action="store_true", help="print only one line of JSON")
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)      # used by the script itself
    args = parser.parse_args()
    args.parts = args.parts or list(NEEDS)
    if set(args.parts) - set(NEEDS):
        parser.error(f"parts are {', '.join(NEEDS)}")
    if args.memory_of:
        print(peak_memory(args.memory_of, Config(**PRESETS[args.preset]), args.batch_size))
    else:
        main(args)
