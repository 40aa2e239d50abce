"""
What decides the speed of pre-training: the parts "plan", "loading" and "card" of bench.py.

They measure the time to plan a batch, how full its rows are, whether all batches share one graph,
how many photos one core loads, and on a CUDA card the share of its peak. The peak is measured in
the same run by a large bf16 matrix product, because it depends on the card's cooling.
"""
import argparse
import contextlib
import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.testing
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import SwinTransformer

import data
import toyworld
from batching import Packed, Packer
from model import DepthEstimator, Detector, PoseEstimator, Pretrainer, Segmenter, normalize
from pretrain import Objective
from tokens import Layout, row_budget, whole
from training import compile_blocks, compile_whole

YES = argparse.Namespace(compile=True)


def dense_swin(config):
    """torchvision's Swin of the same sizes, every token, without its classifier."""
    return SwinTransformer([config.patch] * 2, config.width, list(config.depths),
                           list(config.heads), [config.window] * 2,
                           stochastic_depth_prob=0).features


def masks_of(config, batch, count):
    """Random masks of `count` batches, 75 % hidden: bool [batch, side, side] each."""
    side = config.image_size // config.unit
    with data.seeded(0):
        return [torch.stack([data.hidden_units("random", side, 0.75) for _ in range(batch)])
                for _ in range(count)]


def packed_batches(config, batch, count):
    """Batches as a data process sends them; the photos are noise."""
    masks, size = masks_of(config, batch, count), [config.image_size] * 2
    images, budget = torch.randint(256, (batch, 3, *size), dtype=torch.uint8), row_budget(
        config, masks)
    return [Packed((images, whole(config, images, mask, budget))) for mask in masks]


def planning(config, batch, count=8):
    """Milliseconds of one core to plan an image; rows needed, and rows budgeted, over the number of
    full rows, for each plan (stage; plain, shifted); tensors and bytes of a batch's layout."""
    masks, seconds, needed = masks_of(config, batch, count), [], []
    sizes = torch.tensor([[config.image_size] * 2] * batch)
    budget = row_budget(config, masks)
    for mask in masks:
        begun = time.process_time()
        layout = Layout(config, sizes, mask, budget)
        seconds.append(time.process_time() - begun)
        needed.append(layout.needed)
    tokens = [len(layout.units) * (8 >> stage) ** 2 for stage, _ in layout.plans]
    perfect = np.array(tokens) / config.window ** 2
    packer = Packer(tempfile.TemporaryFile())
    packer.dump(layout)
    return {"plan_ms_an_image": round(1000 * statistics.median(seconds) / batch, 4),
            "rows_over_perfect": (np.mean(needed, 0) / perfect).round(3).tolist(),
            "budget_over_perfect": (np.array(budget) / perfect).round(3).tolist(),
            "layout_tensors": len(packer.tensors),
            "layout_bytes": sum(t.numel() * t.element_size() for t in packer.tensors)}


def graphs(config, batch=8):
    """Graphs for 8 batches of different masks: 1 is ideal, every further one is a recompilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    objective = Objective(Pretrainer(config))
    objective.compile(backend=counter, fullgraph=True, dynamic=False)
    for packed in packed_batches(config, batch, 8):
        images, layout = packed.to()
        objective(normalize(images), layout).backward()
    return {"graphs_of_8_batches": counter.frame_count}


def loading(config, batch=64):
    """Images/s that one core reads, crops, masks, plans and packs, from JPEGs of 500 x 375."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(batch + 4):
            photo = toyworld.scene(0, i, 500)["image"][:375]
            Image.fromarray(photo).save(Path(folder, f"{i:03}.jpg"), quality=92)
        train = data.open_pretraining(folder, config)[0]
        budget, seconds = train.row_budget(config, len(train)), []
        for epoch in range(4):
            begun = time.process_time()
            samples = [train[epoch, i] for i in range(len(train))]
            Packed(data.collate_pretraining(config, samples, budget))
            seconds.append(time.process_time() - begun)
    return {"loaded_images_a_second_a_core": round(len(train) / statistics.median(seconds[1:]), 1)}


# -----------------------------------------------------------------------------
# On a card (or, to try the code, on a CPU with tiny sizes)


def timed(work, device, rounds):
    """work(round) -> median seconds until it is launched and until it is done, and peak bytes."""
    on_card, launched, done = device.type == "cuda", [], []
    wait = torch.cuda.synchronize if on_card else lambda: None
    if on_card:                     # before the first round: a graph's replay allocates nothing
        torch.cuda.reset_peak_memory_stats()
    for r in range(rounds + 3):                             # compilation, recording of the graph
        wait()
        begun = time.perf_counter()
        work(r)
        launched.append(time.perf_counter() - begun)
        wait()
        done.append(time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated() if on_card else 0
    return statistics.median(launched[3:]), statistics.median(done[3:]), memory


def peak_flops(device, size):
    """FLOP/s of a square matrix product in bf16."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size ** 3 / timed(lambda r: a @ b, device, 20)[1]


def line(name, batch, found, flops, peak):
    """Print one measurement; returns its images/s."""
    launched, done, memory = found
    print(f"{name:32} {1000 * done:8.1f} ms  {batch / done:8.1f} images/s  launch "
          f"{1000 * launched:7.1f} ms  {flops / done / peak:5.1%} of peak  "
          f"{memory / 2**30:4.1f} GiB", flush=True)
    return round(batch / done, 1)


def pretraining_on_card(config, state, batch, rounds, peak):
    """Whole steps with AdamW, and torchvision's dense encoder forward + backward, eager beside
    compiled -> images/s."""
    batches, result, floating = packed_batches(config, batch, rounds + 3), {}, {}
    pixels = normalize(batches[0].to(state.device)[0])

    def run_step(objective, optimizer, r):
        images, layout = batches[r].to(state.device)
        with state.autocast():
            loss = objective(normalize(images), layout)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def run_dense(net, r):
        with state.autocast():
            loss = net(pixels).float().square().mean()
        loss.backward()
        net.zero_grad(set_to_none=False)
    if state.device.type == "cuda":
        batches = [b.pin_memory() for b in batches]
    for compiled in (False, True):
        objective = Objective(Pretrainer(config)).to(state.device)
        dense = dense_swin(config).to(state.device)
        for p in [*objective.parameters(), *dense.parameters()]:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(objective.parameters(), 1e-5, fused=True)
        for name, net, work in (("dense", dense, partial(run_dense, dense)),
                                ("step", objective, partial(run_step, objective, optimizer))):
            if compiled:
                compile_whole(net, YES, state)
            else:
                with FlopCounterMode(display=False) as counter:
                    work(0)
                floating[name] = counter.get_total_flops()
            words = name + (" compiled" if compiled else " eager")
            found = timed(work, state.device, rounds)
            result[words] = line(f"{words}, batch {batch}", batch, found, floating[name], peak)
        del objective, dense, optimizer, net, work
    return result


def finetuning_on_card(config, state, rounds, peak, shrink=1):
    """Forward + backward of the four networks, the paper's sizes divided by shrink -> images/s."""
    everything, result = {"semantic": slice(None)}, {}
    for name, shape, net, call in (
            ("detection", (2, 800, 1216), Detector(
                config, 80, 300 // shrink, 1500 // shrink), {"train": True}),
            ("segmentation", (2, 640, 640), Segmenter(config, {"semantic": 100}, {"semantic": 150}),
             {"asked": everything, "every_layer": True}),
            ("depth", (2, 416, 544), DepthEstimator(config, 64, 0.001, 10), {}),
            ("pose", (64, 256, 192), PoseEstimator(config), {})):
        count, height, width = (max(2, n // shrink) for n in shape)
        photos = torch.randn(count, 3, height, width, device=state.device)

        def work(r, net=None, photos=photos, call=call):
            with state.autocast():
                answers = net(photos, whole(config, photos).to(state.device), **call)
            answers = [answers] if torch.is_tensor(answers) else answers
            answers = answers["semantic"] if isinstance(answers, dict) else answers
            sum(x.float().square().mean() for x in answers).backward()
            net.zero_grad()
        for compiled in (False, True):
            used = copy.deepcopy(net).to(state.device)
            if compiled:
                compile_blocks(used, YES, state)
            else:
                with FlopCounterMode(display=False) as counter:
                    work(0, used)
            words = name + (" compiled" if compiled else " eager")
            found = timed(lambda r, used=used: work(r, used), state.device, rounds)
            result[words] = line(f"{words}, {count} x {height} x {width}", count, found,
                                 counter.get_total_flops(), peak)
    return result


def card(config, state, batch, rounds=8, size=8192, shrink=1):
    """Everything that needs a card, at sizes that fill it; images/s by name."""
    torch._dynamo.reset()
    peak = peak_flops(state.device, size)
    print(f"peak {peak / 1e12:.1f} TFLOP/s, by a bf16 product of {size} x {size}")
    result = {}
    with contextlib.suppress(torch.OutOfMemoryError):       # what came before it is printed
        result = pretraining_on_card(config, state, batch, rounds, peak)
        result |= finetuning_on_card(config, state, rounds, peak, shrink)
    return result
