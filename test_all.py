"""
Every test, on CPU, in under three minutes, without data, network or order.

    python test_all.py              all
    python test_all.py swin         those whose name contains "swin"

Numbers are checked against something written independently: torchvision's Swin, a dense
re-statement of the encoder, brute force over permutations, cases worked by hand.
"""
import argparse
import colorsys
import contextlib
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

import attention
import batching
import bench
import checkpoints
import curves
import data
import draw
import finetune_depth
import finetune_det
import finetune_pose
import finetune_seg
import losses
import metrics
import model as M
import packing
import pictures
import pose
import predict
import pretrain
import reproduce
import throughput
import toyworld
import training
from data import InputError
from finetune_seg import instance_inference, panoptic_inference, semantic_inference
from formats import drawn, files
from formats import export as toyexport
from formats import folders as formats
from formats import masks as cocomask
from formats import results as resultfiles
from launch import Stopped, launch
from model import GLID, PRESETS, Config, DepthEstimator, PoseEstimator, Pretrainer, Segmenter
from tokens import Layout, at_original, whole

HERE = Path(__file__).resolve().parent
TINY = Config(**PRESETS["tiny"])
# a window that divides nothing: all the odd cases of partitioning
ODD = Config(patch=2, width=8, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), window=5, dim=16,
             decoder_layers=3, decoder_heads=2, image_size=64)


SEMANTIC = {"semantic": slice(None)}                        # one task asks about all images
patched = mock.patch.multiple           # within the block the attributes of a thing have new values


def assert_close(a, b, tolerance, what="values"):
    """Assert equality up to tolerance relative to the size of b."""
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    assert a.shape == b.shape and error <= tolerance, f"{what} differ by {error:.2g} relative"


@contextlib.contextmanager
def raises(kind, *words):
    """Assert that the block raises `kind` in one line that names all the words."""
    try:
        yield
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(w in text for w in words), f"unclear message: {text}"
        return
    raise AssertionError(f"{kind.__name__} naming {words} was not raised")


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def noisy(module, seed=0):
    """Fill every parameter with noise, so that no bias or norm hides behind its zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


def stacked(masks):
    """Masks bool [N, H, W] -> layers, as a photo of a COCO file has them."""
    return torch.from_numpy(cocomask.stack(masks.numpy(), *masks.shape))


def masks_in(sample):
    """Masks bool [N, H, W] of a sample with layers."""
    numbers = range(1, len(sample["classes"]) + 1)
    return torch.from_numpy(cocomask.unstack(np.asarray(sample["layers"]), numbers))


def random_hidden(batch, side, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, side * side, generator=generator).argsort(1)
    return (order < count).view(batch, side, side)


def masked(batch, side, count, config=TINY, seed=0):
    """Layout of square images of side x side units with `count` random ones hidden."""
    sizes = torch.full((batch, 2), side * config.unit)
    return Layout(config, sizes, random_hidden(batch, side, count, seed))


# -----------------------------------------------------------------------------
# Tokens and Swin


def test_swin_equals_torchvision():
    """Our packed Swin with torchvision's weights gives torchvision's features (shifts included)."""
    config = Config(window=7, width=16, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8))
    theirs, ours = noisy(throughput.dense_swin(config)).eval(), GLID(config).eval()
    state = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    ours.backbone.load_state_dict(M.swin_from_others(state, config)[0], strict=False)
    x = images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = whole(config, images)
        maps = ours.backbone(ours.visible_units(images, tokens), tokens)
        for i, layer in enumerate(theirs):
            x = layer(x)
            if i % 2:
                found = tokens.to_grid(maps[i // 2], i // 2)
                assert_close(found, F.layer_norm(x, x.shape[-1:]), 1e-4, f"stage {i // 2}")


def test_base_is_the_papers_size():
    """Swin-B without its classifier, plus the norms of stages 1-3; the decoder of 6 x 512 has about
    25 M parameters. Nothing is computed, so nothing is allocated."""
    on_cpu = functools.partial(torch.linspace, device="cpu")            # the rates of drop path
    with torch.device("meta"), patched(torch, linspace=on_cpu):
        net, theirs = GLID(Config(window=7)), torchvision.models.swin_b()
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in net.named_children()}
    swin = sum(p.numel() for n, p in theirs.named_parameters() if not n.startswith("head"))
    assert count["backbone"] == swin + 2 * (128 + 256 + 512)
    assert 25e6 < count["decoder"] < 26e6 and 2e6 < count["bifpn"] < 3e6


def enlarged(grid, side):
    """Every cell of a grid [..., H, W] becomes side x side equal ones."""
    return torch.kron(grid, torch.ones(side, side, dtype=grid.dtype))


def dense_reference(glid, image, hidden):
    """The encoder re-stated densely -> four maps [H, W, C], meaningless at hidden tokens. Attention
    is over ALL pairs of tokens, allowed where floor((c + w - s) / w) agrees on both axes."""
    swin, p, w = glid.backbone, glid.config.patch, glid.config.window
    x = F.conv2d(image[None], swin.embed.weight.view(-1, 3, p, p), swin.embed.bias, stride=p)
    x, maps = swin.embed_norm(x[0].permute(1, 2, 0)), []
    for stage, blocks in enumerate(swin.stages):
        if stage:
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = swin.merges[stage - 1].reduction(swin.merges[stage - 1].norm(x))
        yx = torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2]))
        for i, block in enumerate(blocks):
            shift = torch.tensor([0 if n <= w else i % 2 * (w // 2) for n in x.shape[:2]])
            window = (yx + w - shift) // w
            allowed = (window[:, None] == window).all(-1) & ~enlarged(hidden, 8 >> stage).flatten()
            offset = (yx[:, None] - yx + w - 1).clamp(0, 2 * w - 2)         # beyond: not allowed
            bias = block.attn.bias_table[offset[..., 0] * (2 * w - 1) + offset[..., 1]]
            bias = bias.permute(2, 0, 1).masked_fill(~allowed, -1e30)
            q, k, v = block.attn.qkv(block.norm1(x)).view(
                len(yx), 3, block.attn.heads, -1).permute(1, 2, 0, 3)
            out = F.scaled_dot_product_attention(q, k, v, bias).transpose(0, 1)
            x = x + block.attn.proj(out.reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
        maps.append(swin.norms[stage](x))
    return maps


def restated_prediction(net, image, hidden):
    """Pretrainer re-stated for one image with dense maps and plain attention -> [N, pixels]."""
    glid, fpn, decoder = net.glid, net.glid.bifpn, net.glid.decoder
    seen = [~enlarged(hidden, 8 >> stage) for stage in range(4)]
    p2, p3, p4, p5 = (lateral(x).permute(2, 0, 1) for lateral, x in
                      zip(fpn.lateral, dense_reference(glid, image, hidden)))

    def fuse(node, stage, *maps):
        w = node.weight.clamp(min=0)
        x = F.silu(sum(a * m for a, m in zip(w, maps)) / (w.sum() + 1e-4)) * seen[stage]
        x = F.conv2d(x[None], node.depthwise.weight, padding=1, groups=len(x))[0]
        return node.norm(node.pointwise(x.permute(1, 2, 0))).permute(2, 0, 1)
    up, down = (lambda x: F.interpolate(x[None], scale_factor=2)[0]), torch.nn.MaxPool2d(2)
    t4 = fuse(fpn.top_down[2], 2, p4, up(p5))
    t3 = fuse(fpn.top_down[1], 1, p3, up(t4))
    o2 = fuse(fpn.top_down[0], 0, p2, up(t3))
    o3 = fuse(fpn.bottom_up[0], 1, p3, t3, down(o2))
    o4 = fuse(fpn.bottom_up[1], 2, p4, t4, down(o3))
    o5 = fuse(fpn.bottom_up[2], 3, p5, down(o4))

    def sine(where):                                        # of the True cells of a grid
        turns = [10000 ** (-i / (len(decoder.cls) // 4)) for i in range(len(decoder.cls) // 4)]
        return torch.tensor([[f(2 * math.pi * (c + 0.5) / n * t) for c, n in zip(cell, where.shape)
                              for f in (math.sin, math.cos) for t in turns]
                             for cell in where.nonzero().tolist()]).to(image)

    def attend(attention, x, keys, values):
        q, k, v = (f(y).view(len(y), attention.heads, -1).transpose(0, 1) for f, y in
                   ((attention.q, x), (attention.k, keys), (attention.v, values)))
        score = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        return attention.out((score.softmax(-1) @ v).transpose(0, 1).reshape(x.shape))
    x = torch.cat([decoder.cls[None], net.mask_token + sine(hidden)])
    for i, layer in enumerate(decoder.layers):
        stage, grid = ((3, o5), (2, o4), (1, o3))[i % 3]
        values = grid[:, seen[stage]].t() + decoder.level[i % 3]
        x = x + attend(layer.cross, layer.norm1(x), values + sine(seen[stage]), values)
        y = layer.norm2(x)
        x = x + attend(layer.self, y, y, y)
        x = x + layer.mlp(layer.norm3(x))
    return net.head(decoder.norm(x))[1:]


def test_whole_model_equals_restatement():
    """Pre-training's prediction and gradients against a dense, loop-by-loop model, for windows of 1
    to 3 words of slots. Not one bit of the prediction depends on a hidden pixel or on the budget of
    rows; a batch beyond the budget raises it."""
    torch.manual_seed(0)
    sizes, hidden = torch.tensor([[64, 48]] * 2), (torch.rand(2, 12).argsort(1) < 7).view(2, 4, 3)
    for window, more in ((3, 0), (5, 5), (6, -1), (12, 1)):
        config = Config(**vars(ODD) | dict(window=window))
        net, images = noisy(Pretrainer(config)).double(), torch.randn(2, 3, 64, 48).double()
        net.glid.bifpn.bottom_up[0].weight.data[1] = -1     # counts as none
        tokens = Layout(config, sizes, hidden)
        other = Layout(config, sizes, hidden, [n + more for n in tokens.needed])
        assert other.level == 0 if more >= 0 else other.level > 0
        (found, target), (again, _) = net(images, tokens), net(images, other)
        assert torch.equal(found, again), "an empty row was seen"
        expected = torch.stack([restated_prediction(net, *x) for x in zip(images, hidden)])
        assert_close(found, expected, 1e-6, f"predictions of window {window}")
        slopes = [torch.autograd.grad(losses.reconstruction_loss(x, target), list(net.parameters()))
                  for x in (expected, found, again)]
        for (name, _), right, *ours in zip(net.named_parameters(), *slopes):
            for g in ours:
                assert name.endswith("k.bias") or \
                    (g - right).abs().max() <= 1e-5 * right.abs().max(), name
        with torch.no_grad():
            M.split_units(images, 16)[tuple(tokens.hidden_units.long().unbind(1))] *= 1e6
            again, changed = net(images, tokens)
        assert torch.equal(again, found) and not torch.equal(changed, target)


def test_padded_batch_equals_alone():
    """Each image of a padded batch, units of it hidden or not, gets the result that it gets alone,
    whatever the padding."""
    torch.manual_seed(0)
    sizes = [(37, 85), (64, 16), (1, 1), (50, 61)]
    net = noisy(Segmenter(ODD, {"semantic": 5}, {"semantic": 3})).double().eval()
    images = [torch.randn(3, h, w).double() for h, w in sizes]
    batch = torch.full((4, 3, 70, 90), 123.0).double()                      # dirty padding
    for canvas, image, (h, w) in zip(batch, images, sizes):
        canvas[:, :h, :w] = image
    hidden = torch.rand(4, 4, 6) < 0.4
    hidden[:, 0, 0] = False
    with torch.no_grad():
        classes, masks = net(batch, Layout(ODD, torch.tensor(sizes), hidden), SEMANTIC)["semantic"]
        for b, (image, (h, w)) in enumerate(zip(images, sizes)):
            own = hidden[b:b + 1, :-(-h // 16), :-(-w // 16)]
            c, m = net(image[None], Layout(ODD, torch.tensor([[h, w]]), own), SEMANTIC)["semantic"]
            assert_close(classes[:, b], c[:, 0], 1e-9, f"classes of image {b}")
            shared = masks[:, b, :, :m.shape[-2], :m.shape[-1]]
            assert_close(shared, m[:, 0], 1e-9, f"masks of image {b}")
            together, alone = (semantic_inference(*x, (h, w), 2, (33, 47)) for x in
                               ((classes[-1, b], masks[-1, b]), (c[-1, 0], m[-1, 0])))
            assert (together == alone).float().mean() > 0.99, f"answer for image {b}"


def test_packing_is_tight_and_repeats():
    """At 192 px, batch 256: all visible, as few rows as Swin's cyclic shift needs; 75 % hidden,
    near the perfect number, and nearer to that of the windows which want one and the same slot. The
    same every time; no slot is given twice; also where slots fill several words (window 12)."""
    for window, most in ((6, [1.04] * 2 + [1.12] * 4 + [3] * 2), (12, [1.12] * 4 + [9] * 4)):
        config, sizes = Config(window=window), torch.tensor([[192, 192]] * 256)
        needed, wanted, sides = [], [], [8 >> stage for stage in range(4) for _ in "ab"]
        assert Layout(config, sizes).needed == [
            256 * max(1, 6 * side // window) ** 2 for side in sides]
        for seed in range(4):
            tokens = masked(256, 6, 27, config, seed)
            assert tokens.needed == masked(256, 6, 27, config, seed).needed
            places = [tokens.windows(*kind).place for kind in tokens.plans]
            assert all(len(p.unique()) == len(p) for p in places)
            needed.append(tokens.needed)
            wanted.append([int((p % window ** 2).bincount().max()) for p in places])
        share = np.mean(needed, 0) / [256 * 9 * side ** 2 / window ** 2 for side in sides]
        assert (share < most).all() and (share >= 1).all(), share
        share = np.array(needed) / wanted
        assert (share < np.where(np.array(most) < 2, 1.06, 2)).all() and (share >= 1).all(), share


def test_budget_of_rows_makes_all_shapes_equal():
    """It is the same wherever it is asked for, and raised by levels that a batch alone decides."""
    full = Layout(TINY, torch.tensor([[64, 64]]))           # even where every window is full
    within = Layout(TINY, torch.tensor([[64, 64]]), None, full.needed)
    assert not full.plans[0, False][2] and within.plans[0, False][2]
    assert packing.enough([10, 3], [10, 3]) == ([10, 3], 0)
    assert packing.enough([11, 3], [10, 3]) == ([11, 4], 1)
    train = data.open_pretraining("toyworld:16", TINY)[0]
    budget = train.row_budget(TINY, 16)
    torch.manual_seed(5)
    assert train.row_budget(TINY, 16) == budget
    batches = [data.collate_pretraining(TINY, [train[e, i] for i in range(16)], budget)[1]
               for e in range(8)]
    assert {b.level for b in batches} == {0} and len({str(b.plans) for b in batches}) == 1
    shapes = {tuple(t.shape for t in tensors_in(b)) for b in batches}
    assert len(shapes) == 1 and len(shapes.pop()) == 4      # one small set of tensors


@contextlib.contextmanager
def counted_graphs(backend="eager"):
    """torch.compile traces as ever, counts its graphs, and runs them without a compiler."""
    import torch._dynamo.testing
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compile_it = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    with patched(torch.nn.Module, compile=compile_it), \
            patched(training, compiles=lambda wanted, state: bool(wanted)):
        yield counter


def test_pretraining_is_one_graph():
    """8 batches of different masks run through one graph without a break, and give eager's bits:
    value and gradient."""
    config = Config(**vars(TINY) | dict(depths=(1, 1, 1, 1), decoder_layers=3))
    train = data.open_pretraining("toyworld:8", config)[0]
    budget, masks = train.row_budget(config, 4), set()
    torch.manual_seed(0)
    net = pretrain.Objective(noisy(Pretrainer(config)))
    weights = list(net.parameters())
    old = torch.__version__.startswith("2.6.")              # sums some gradients in another order
    with counted_graphs("aot_eager") as counter:
        graph = pretrain.Objective(net.model)
        training.compile_whole(graph, argparse.Namespace(compile=True),
                               training.Run(torch.device("cpu")))
        for epoch in range(8):
            images, tokens = data.collate_pretraining(config, [train[epoch, i] for i in range(4)],
                                                      budget)
            masks.add(str(tokens.units.tolist()))
            images = M.normalize(images)
            eager, compiled = net(images, tokens), graph(images, tokens)
            assert eager.item() == compiled.item(), epoch
            pairs = zip(*(torch.autograd.grad(loss, weights) for loss in (eager, compiled)))
            for a, b in pairs:
                assert torch.equal(a, b) or (old and (a - b).abs().max() < 1e-4), epoch
        assert counter.frame_count == 1 and len(masks) == 8
        with torch._dynamo.config.patch(cache_size_limit=1):
            for size in (2, 3):             # graphs of an earlier run of this process do not count
                line = torch.nn.Linear(size, 1)
                training.compile_whole(line, argparse.Namespace(compile=True),
                                       training.Run(torch.device("cpu")))
                line(torch.zeros(size))


def test_compiled_pretraining_writes_the_same_weights():
    """A run that is resumed with --compile and --accumulate: batches of different masks run through
    one graph, whose gradients are those of the run that is not compiled, which says so in one line
    where --compile finds no compiler. By default a CPU does not try."""
    flags = ["--data", "toyworld:24", "--batch-size", 4, "--accumulate", 2, "--workers", 0]
    error = RuntimeError("backend='inductor' raised:\nCannot find a working triton installation")
    missing, shown = mock.patch.object(torch, "compile", side_effect=error), io.StringIO()
    saved = {}
    with folder() as at, contextlib.redirect_stdout(shown):
        with missing as tried:
            pretrain.main(args_for(pretrain, *flags, "--steps", 1, "--out", at / "eager"))
            assert not tried.called
        shutil.copytree(at / "eager", at / "graph")
        for name, graphs, how in (("eager", 0, missing), ("graph", 1, counted_graphs())):
            with how as counter:
                pretrain.main(args_for(pretrain, *flags, "--compile", "--steps", 3, "--resume",
                                       "--out", at / name))
            assert graphs == (counter.frame_count if graphs else 0)
            saved[name] = checkpoints.read(at / name / "last.pt", "--init")["model"]
    assert shown.getvalue().count("not compiled: Cannot find a working triton") == 1
    assert shown.getvalue().count("compile") == 1, shown.getvalue()
    assert saved["eager"].keys() == saved["graph"].keys()
    for key, value in saved["eager"].items():
        assert (value - saved["graph"][key]).abs().max() < 1e-4, key


def test_compiled_finetuning_does_not_recompile():
    """Batches of ever new sizes, padded or not, soon need no new graph, and answer as eager."""
    config = Config(**vars(ODD) | dict(depths=(1, 1, 2, 1), drop_path=0.3))
    nets, seen = [M.Detector(config, 3, 5, 10) for _ in range(2)], []
    nets[1].load_state_dict(noisy(nets[0]).state_dict())
    with counted_graphs() as counter:
        training.compile_blocks(nets[0], argparse.Namespace(compile=True), None)
        for h, w in ((64, 64), (64, 80), (96, 80), (48, 112), (81, 70), (60, 128)):
            images = torch.randn(2, 3, h, w)
            tokens, answers = Layout(config, torch.tensor([[h, w], [h - 20, w - 9]])), []
            for net in nets:
                torch.manual_seed(h)
                answers.append(net(images, tokens, train=True))
                sum(x.square().sum() for x in answers[-1]).backward()
            for a, b in zip(*answers):
                assert_close(a, b, 1e-4)
            seen.append(counter.frame_count)
    assert 0 < seen[3] == seen[-1] <= 24, seen
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()


def test_bench_of_a_card_runs():
    """All that bench.py does on a card, tried on the CPU with tiny sizes and nothing compiled; and
    what it does on any machine."""
    config = Config(**PRESETS["tiny"] | dict(width=8, depths=[1] * 4, heads=[1, 1, 2, 2], dim=16))
    state = training.Run(torch.device("cpu"), dtype=torch.bfloat16)
    with quiet(), patched(training, compiles=lambda wanted, state: False):
        found = throughput.card(config, state, 4, rounds=1, size=64, shrink=20)
    names = "dense", "step", "detection", "segmentation", "depth", "pose"
    assert found.keys() == {f"{n} {how}" for n in names for how in ("eager", "compiled")}
    assert min(found.values()) > 0
    plan = throughput.planning(TINY, 16, 2)
    assert plan["layout_tensors"] == 4 and min(plan["rows_over_perfect"]) >= 1
    assert throughput.loading(TINY, 4)["loaded_images_a_second_a_core"] > 0
    with patched(throughput, timed=lambda *a: (0, 0.5, 0)):
        assert throughput.peak_flops(torch.device("cpu"), 10) == 2 * 10 ** 3 / 0.5
    clock, args = [0.0], argparse.Namespace(parts=["step"], rounds=3, batch_size=1, json=True)
    runs = {name: lambda b, s=s: clock.append(clock[-1] + s)
            for name, s in (("dense", 4), ("step", 1))}
    with patched(bench, contestants=lambda *a: runs), patched(
            bench.time, perf_counter=lambda: clock[-1]):
        assert bench.against_dense(args, TINY, None) == {"step_over_dense": 0.25}


def test_drop_path_keeps_expectation():
    """A dropped branch vanishes for whole images and is scaled up for the others."""
    torch.manual_seed(0)
    block = M.SwinBlock(8, 2, 4, 0.25)
    windows = Layout(TINY, torch.tensor([[16, 16]] * 400)).windows(0, False)
    x = block._drop(torch.ones(400 * 64, 8), windows).view(400, -1)
    assert set(x.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (x == x[:, :1]).all() and abs(x.mean() - 1) < 0.1
    assert block.eval()._drop(x, windows) is x


def test_bias_table_resizes():
    """Same window: untouched. Another: a head's slope along its axis remains that slope inside."""
    ramps = torch.cartesian_prod(torch.arange(13.0), torch.arange(13.0))    # a head for each axis
    assert M.resize_bias_table(ramps, 7) is ramps
    for size in (11, 23):
        at = (torch.arange(size) + 0.5) * 13 / size - 0.5
        expected = torch.cartesian_prod(at, at).view(size, size, 2)[3:-3, 3:-3]
        found = M.resize_bias_table(ramps, (size + 1) // 2).view(size, size, 2)[3:-3, 3:-3]
        assert_close(found, expected, 0.008)                # PyTorch's cubic bends it a little


# -----------------------------------------------------------------------------
# The two stages as models


def without_gradient(net, loss):
    """Parameters that learn nothing. (The keys' biases cancel in every softmax: any value will do.)

    Equal queries would leave self-attention without a gradient, so the e_i get some noise first:
    call this on a network whose heads were made by `apart`.
    """
    loss.backward()
    assert torch.isfinite(loss), "loss is not finite"
    return [n for n, p in net.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
            or not (p.grad.any() or n.endswith("k.bias"))]


def apart(net):
    for name, p in net.named_parameters():
        if name.endswith("offsets"):
            torch.nn.init.normal_(p)
    return net


def seg_batch(labels=((0, 2), (1,)), size=64):
    """Two images with random masks for the given labels."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for n in labels:                                        # blobs of 8 x 8 px
        blobs = torch.rand(len(n), size // 8, size // 8, generator=generator) < 0.5
        targets.append({"labels": torch.tensor(n, dtype=torch.long), "masks": enlarged(blobs, 8)})
    return torch.randn(len(labels), 3, size, size, generator=generator), targets


def seg_loss(net, images, targets):
    classes, masks = net(images, whole(TINY, images), SEMANTIC, every_layer=True)["semantic"]
    count = max(1, sum(len(t["labels"]) for t in targets))
    return losses.segmentation_loss(classes, masks, targets, (64, 64), count, 128)["loss"]


def test_every_parameter_learns():
    """In pre-training and in fine-tuning, in fp32 and under bf16 autocast; losses stay in fp32."""
    torch.manual_seed(0)
    images, targets = seg_batch()
    tokens = Layout(TINY, torch.tensor([[64, 64], [40, 64]]))
    for half in (False, True):
        net, task = Pretrainer(TINY), apart(Segmenter(TINY, {"semantic": 6}, {"semantic": 3}))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction, target = net(images, masked(2, 4, 12))
            answers = task(images, tokens, SEMANTIC, True)["semantic"]
        assert prediction.shape == target.shape == (2, 12, 3 * 16 * 16)
        assert (prediction.dtype == torch.bfloat16) == half
        assert answers[0].dtype == torch.float32 and (answers[1].dtype == torch.bfloat16) == half
        loss = losses.reconstruction_loss(prediction, target)
        other = losses.segmentation_loss(*answers, targets, (64, 64), 3, 128)["loss"]
        assert loss.dtype == other.dtype == torch.float32
        assert not without_gradient(net, loss) and not without_gradient(task, other)


def test_queries_come_apart():
    """The e_i start equal (Eq. 3: zero). Without any object every parameter still gets a gradient;
    after a step those that were matched differ from each other and from the rest."""
    torch.manual_seed(0)
    net = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
    offsets, optimizer = net.heads["semantic"].offsets, torch.optim.AdamW(net.parameters(), 1e-3)
    assert not offsets.any()
    seg_loss(net, *seg_batch(labels=((), ()))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    optimizer.zero_grad()
    seg_loss(net, *seg_batch(labels=((0, 1, 2), (0, 1)))).backward()
    optimizer.step()
    assert len(offsets[[0, 1, 2, 5]].unique(dim=0)) == 4                # three were matched


# -----------------------------------------------------------------------------
# Losses and matching


def test_reconstruction_is_equation_2():
    """Mean of squared norms. Targets are hidden units in row-major order; norm_pix standardises
    each over its own pixels."""
    p, t = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]], [[[0.0, 0.0], [3.0, 4.0]]]])
    assert losses.reconstruction_loss(p, t).item() == (5 + 25) / 2
    images, hidden = torch.randn(2, 3, 64, 64), random_hidden(2, 4, 12)
    target = Pretrainer(TINY, norm_pix=True).target(images, hidden.nonzero())
    units = F.unfold(images, 16, stride=16).transpose(1, 2)[hidden.flatten(1)].view(2, 12, -1)
    mean, std = units.mean(-1, keepdim=True), units.std(-1, keepdim=True)
    assert_close(target, (units - mean) / std, 1e-4)


def test_matching_names_the_bad_cost():
    """A cost that is not finite is named; the padding may be anything."""
    bad = torch.tensor([[[[0.0, math.nan], [0, 0]]]])
    with raises(FloatingPointError, "dice"):
        losses.hungarian({"mask": torch.zeros(1, 1, 2, 2), "dice": bad}, [2])
    assert len(losses.hungarian({"dice": bad}, [1])[0]) == 1


def test_mask_losses_by_formula():
    """Elementwise and pairwise cross-entropy and dice agree with their formulas, and the gradients
    with finite differences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, generator=generator).double()
    t = (torch.rand(3, 7, generator=generator) < 0.5).double()
    p, y = x.sigmoid()[:, None].expand(3, 3, 7), t.expand(3, 3, 7)
    expected = (F.binary_cross_entropy(p, y, reduction="none").mean(2),
                1 - (2 * (p * y).sum(2) + 1) / (p.sum(2) + y.sum(2) + 1))
    pairs, own = losses.pairwise_mask_cost(x[None], t[None]), losses.mask_losses(x, t)
    for pair, one, value in zip(pairs, own, expected):
        assert_close(pair[0], value, 1e-9)
        assert_close(one, value.diagonal(), 1e-9)
    assert torch.autograd.gradcheck(lambda v: losses.mask_losses(v, t), x.requires_grad_())


def test_sampled_points():
    """Points: values are bilinear at pixel centres, stay inside the image, and seek the border."""
    ramp = torch.arange(8.0).expand(1, 8, 8)                                # value = column
    at = torch.tensor([[[(2 + 0.5) / 8, 0.5], [3 / 8, 0.1], [1, 0]]])
    assert_close(losses.sample_points(ramp, at), torch.tensor([[2.0, 2.5, 7]]), 1e-6)
    torch.manual_seed(0)
    maps, at = torch.randn(2, 3, 5, 9), torch.rand(2, 60, 2)
    at[:, :4] = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    assert_close(losses.sample_channels(maps, at), F.grid_sample(
        maps, 2 * at[:, None] - 1, padding_mode="border", align_corners=False)[:, :, 0], 1e-5)
    logits = (torch.arange(32.0) - 8).expand(2, 32, 32) * 3                 # zero at column 8
    points = losses.uncertain_points(logits, torch.tensor([[0.5, 0.25], [1.0, 1.0]]), 400)
    assert (points[0] <= torch.tensor([0.5, 0.25])).all() and points[1].max() > 0.9
    near = ((points[1, :, 0] * 32 - 8.5).abs() < 5).float()
    assert near[:300].mean() == 1 and near[300:].mean() < 0.5   # the surest 300 of 1200; the rest
    # the same points of answer and truth: a perfect answer, but for where it passes through zero
    _, targets = seg_batch(labels=((0, 2),), size=32)
    logits = torch.where(targets[0]["masks"], 20.0, -20.0)[None, None]
    found, opposite = (losses.segmentation_loss(torch.zeros(1, 1, 2, 4), x, targets, (32, 32), 2)
                       for x in (logits, -logits))
    assert found["mask"] < 0.7 and found["dice"] < 0.2 and opposite["mask"] > 5


def test_segmentation_loss_equals_loops():
    """The set loss against brute force, layer by layer, ragged and not square. Masks and logits are
    constant inside an image, so that sampled points do not matter; beyond it they are absurd."""
    generator = torch.Generator().manual_seed(5)
    layers, queries, kinds, points = 2, 4, 3, 50
    classes = torch.randn(layers, 3, queries, kinds + 1, generator=generator)
    value = 2 * torch.randn(layers, 3, queries, generator=generator).double()
    masks, targets = torch.full((layers, 3, queries, 24, 16), 99.0), []     # canvas 96 x 64
    for b, (h, w, *labels) in enumerate(((32, 64, 2, 0, 1), (64, 64), (96, 32, 2, 0))):
        masks[:, b, :, :h // 4, :w // 4] = value[:, b, :, None, None]
        full = (torch.arange(len(labels)) != 1)[:, None, None].expand(-1, h, w)
        targets.append({"labels": torch.tensor(labels).long(), "masks": full})
    parts = losses.segmentation_loss(classes, masks, targets, (96, 64), 2.5, points)
    expected = dict.fromkeys(("class", "mask", "dice"), 0.0)
    for la in range(layers):
        answers = torch.full((3, queries), kinds)
        for b, t in enumerate(targets):
            p, full = value[la, b].sigmoid()[:, None], t["masks"][:, 0, 0].double()
            terms = {"mask": -(full * p + (1 - full) * (1 - p)).log(),      # [queries, objects]
                     "dice": 1 - (2 * p * full * points + 1) / (points * (p + full) + 1)}
            cost = 5 * terms["mask"] + 5 * terms["dice"] - 2 * classes[la, b].softmax(-1)[
                :, t["labels"]]
            best = min(map(list, itertools.permutations(range(queries), len(t["labels"]))),
                       key=lambda order, cost=cost: cost[order].diagonal().sum())
            answers[b, best] = t["labels"]
            for name, term in terms.items():
                expected[name] += term[best].diagonal().sum() / 2.5
        weights = torch.where(answers == kinds, 0.1, 1.0)
        chosen = classes[la].log_softmax(-1).gather(2, answers[..., None])[..., 0]
        expected["class"] -= (weights * chosen).sum() / weights.sum()
    expected["loss"] = 2 * expected["class"] + 5 * expected["mask"] + 5 * expected["dice"]
    for name, number in expected.items():
        assert abs(parts[name] - number) < 1e-4 * max(1, number), name


# -----------------------------------------------------------------------------
# Metrics, by hand


def near(a, b):
    return np.allclose(a, b, rtol=0, atol=1e-12)


def average_precision(kind, found, truth, categories=(1,)):
    """The metric after one image, all of the last category; found, truth: dicts without labels."""
    metric, field = metrics.AveragePrecision(kind, categories), metrics.FIELDS[kind]
    metric.update(0, *({"labels": [categories[-1]] * len(x[field])} | x for x in (found, truth)))
    return metric


def test_metrics_box_ap_by_hand():
    """Every rule of COCO's boxes, one at a time: truth, found, scores and flags of one image."""
    low, high, ten = (51 + 50 * 2 / 3) / 101, 51 / 101, [0, 0, 10, 10]
    crowded = [ten, [100, 0, 200, 100]], [ten, [100, 0, 140, 40], [110, 0, 150, 40]], [.5, .9, .8]
    far = [[500 + i, 0, 510 + i, 10] for i in range(100)]
    for truth, found, scores, flags, expected in (
            # Hit (IoU 1), miss, hit (IoU .62): at .5 .55 .6 precision is 1, 1/2, 2/3 at recall 1/2,
            # 1/2, 1; at the other seven thresholds it ends at recall 1/2, after 51 of 101 points
            ([ten, [50, 0, 60, 10]], [[50, 0, 56.2, 10], ten, [20, 20, 30, 30]], [.7, .9, .8], {},
             dict(AP=(3 * low + 7 * high) / 10, APs=(3 * low + 7 * high) / 10, AP50=low, AP75=high,
                  AR1=.5, AR10=.65, AR100=.65, ARs=.65, APm=-1, APl=-1)),
            # A crowd is never wrong and never used up; as ordinary objects the two would be misses
            # above the hit, and the big box is missed as well
            (*crowded, dict(iscrowd=[0, 1]), dict(AP=1)),
            (*crowded, {}, dict(AP=51 / 101 / 3)),
            # What is outside of a range of areas is ignored: the big miss is not a small miss
            ([ten], [ten, [300, 300, 500, 500]], [.5, .9], {}, dict(AP=.5, APs=1, APl=-1)),
            # The file's area decides
            ([[0, 0, 40, 40]], [[0, 0, 40, 40]], [1], dict(area=[1000]), dict(APs=1, APm=-1)),
            # A regular truth (IoU .62) goes before a closer one that is ignored (.9)
            ([[0, 0, 100, 62], [0, 0, 100, 90]], [[0, 0, 100, 100]], [1],
             dict(ignore=[False, True]), dict(AP50=1, AR100=.3)),
            # The closest truth is taken: IoU 1 and not .62, which leaves .81 and not .5 to the next
            ([[0, 0, 100, 62], [0, 0, 100, 100]], [[0, 0, 100, 100], [0, 0, 100, 50]], [.9, .8], {},
             dict(AP=(7 + 3 * high) / 10)),
            # Of two at the same distance the last is taken (.82), which leaves .94 and not .59
            ([[0, 0, 100, 82], [0, 18, 100, 100]], [[0, 0, 100, 100], [0, 0, 100, 77]], [.9, .8],
             {}, dict(AP=(7 + 51 / 101) / 10)),
            # A truth is found once; what is too small for a range of areas is ignored in it
            ([ten, [50, 0, 60, 10]], [ten, ten], [.9, .8], {}, dict(AP=51 / 101, AR100=.5)),
            ([[0, 0, 50, 50]], [[0, 0, 50, 50], [90, 0, 99, 9]], [.5, .9], {}, dict(AP=.5, APm=1)),
            ([ten, [50, 0, 99, 49]], [ten], [1], {}, dict(APs=1, APm=0, ARs=1, ARm=0, AR100=.5)),
            # At most 100 detections of an image and category: the hit is number 101, 100, 11
            ([ten], far + [ten], [.9] * 100 + [.1], {}, dict(AP=0, AR100=0)),
            ([ten], far[:99] + [ten], [.9] * 99 + [.1], {}, dict(AR100=1, AR10=0, AP=.01)),
            ([ten], far[:10] + [ten], [.9] * 10 + [.1], {}, dict(AR100=1, AR10=0, AP=1 / 11))):
        r = average_precision("box", {"scores": scores, "boxes": found},
                              {"boxes": truth, **flags}).result()
        assert near([r[k] for k in expected], list(expected.values())), (expected, r)
        assert r["per_category"] == {1: r["AP"]}
    two = {"labels": [1, 2], "scores": [.9, .8], "boxes": [ten, ten]}       # one of each category
    assert average_precision("box", two, two, (1, 2)).result()["AR1"] == 1


def test_metrics_masks_and_keypoints_by_hand():
    """A mask's IoU counts pixels, here of several blocks of the matrix product; of 17 joints only
    the nose is labelled, and off by 2 sigma sqrt(area): OKS = exp(-1/2) = .6065."""
    truth, found = np.zeros((2, 1, 300, 300), bool)
    truth[0, :, :100] = True
    for bottom, ap in ((80, 0), (300, 1), (186, .3), (216, .5), (276, .9)):     # IoU: bottom / 300
        found[0, :, :100] = np.arange(300)[:, None] < bottom
        r = average_precision("mask", {"scores": [1], "masks": found}, {"masks": truth}, (7, 4))
        r = r.result()
        assert near([r["AP"], r["AP75"]], [ap, bottom >= 225]) and r["per_category"][7] == -1
    truth, found = np.zeros((2, 1, 17, 3))
    truth[0, 0] = 30, 40, 2
    found[0, 0, :2] = 30 + 2 * .026 * 100, 40
    person = {"labels": [1], "keypoints": truth, "boxes": [[0, 0, 100, 200]], "area": [100**2]}
    ap = average_precision("keypoint", {"scores": [1], "keypoints": found}, person)
    r = ap.result()
    assert near([r[k] for k in ("AP", "AP50", "AP75", "APl", "AR")], [.3, 1, 0, .3, .3])
    assert near([r["AR50"], r["AR75"]], [1, 0])
    # a person without labelled joints: found inside the grown box is ignored, outside is a miss
    for image, (x, first) in enumerate(((199.0, 1), (260.0, 2), (-99.0, 2), (-160.0, 3)), 1):
        ap.update(image, {"labels": [1], "scores": [2], "keypoints": np.full((1, 17, 3), x)},
                  {**person, "keypoints": 0 * truth})
        assert near(ap.result()["AP50"], 1 / first)
    # a person of 150 x 150 px who is not there is a miss among the large ones
    false = np.linspace(500, 650, 17)[:, None].repeat(3, 1)[None]
    answer = {"scores": [2, 1], "keypoints": np.concatenate([false, truth])}
    assert near(average_precision("keypoint", answer, person).result()["APl"], 1 / 2)


def test_metrics_score_ties_go_by_image_id_and_merge_counts_an_image_once():
    """Images 3 and "a" tie: the hit is first or second, whatever the order of arrival."""
    hit = {"labels": [1], "scores": [.5], "boxes": [[0, 0, 9, 9]]}
    there, nothing = {"labels": [1], "boxes": [[0, 0, 9, 9]]}, {"labels": [], "boxes": []}
    for right, expected in ((3, 1.0), ("a", .5)):               # a file's ids may be of both kinds
        one, two = (metrics.AveragePrecision("box", [1]) for _ in range(2))
        for metric, image in ((one, "a"), (two, "a"), (two, 3)):    # twice: a sampler's padding
            metric.update(image, hit, there if image == right else nothing)
        one.merge(pickle.loads(pickle.dumps(two)))
        assert one.result()["AP"] == expected


def test_metrics_panoptic_by_hand():
    """Void, a crowd, stuff and things in ten pixels; then the same with wrong categories."""
    target = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0]])
    found = np.array([[7, 7, 7, 8, 8, 8, 9, 9, 7, 6]])
    segments = [dict(id=1, category=10, iscrowd=0), dict(id=2, category=20, iscrowd=0),
                dict(id=3, category=10, iscrowd=1)]
    pq = metrics.PanopticQuality([(10, True), (20, False), (30, True)])
    # 7 on 1: 3 of 4 pixels, void not in the union. 8 on 2: 2 of 3. 9 on a crowd, 6 on void: no FP
    pq.update(found, {6: 20, 7: 10, 8: 20, 9: 10}, target, segments)
    assert near([pq.result()[k] for k in ("PQ_things", "PQ_stuff")], [3 / 4, 2 / 3])
    pq.update(found[:, :6], {7: 20, 8: 20}, target[:, :6], segments[:2])  # 7 is now FP, 1 is FN
    r = pq.result()
    assert near(r["per_category"][10], .75 / 1.5) and near(r["RQ_stuff"], 2 / 2.5)
    assert near([r["SQ_things"], r["SQ_stuff"]], [.75, 2 / 3])
    # 8 is a FP, as no more than half of it is void; 5, too: a category's last crowd alone excuses
    target = np.array([[1, 1, 1, 1, 0, 3, 3, 4, 4]])
    segments = [segments[0], segments[2], segments[2] | dict(id=4)]
    pq = metrics.PanopticQuality([(10, True), (20, False)])
    pq.update(np.array([[7, 7, 7, 8, 8, 5, 5, 6, 6]]), {5: 10, 6: 10, 7: 10, 8: 20}, target,
              segments)
    assert pq.counts.tolist() == [[1, 1, 0], [0, 1, 0]]


def test_metrics_miou_and_depth_by_hand():
    """Classes that do not occur and pixels out of range do not count; a wrong label is refused."""
    miou, depth = metrics.MeanIoU(20), metrics.DepthErrors(1e-3, 10)
    miou.update(np.array([[0, 0, 1, 7, 19, 5]]), np.array([[0, 1, 1, 19, 19, 255]], np.uint8))
    assert near(miou.result()["mIoU"], 1 / 2)               # of 3; 17 absent classes do not count
    assert near([miou.result()["per_category"][k] for k in (0, 1, 19)], [1 / 2, 1 / 2, 1 / 2])
    for wrong in (20, -1):
        with raises(ValueError, "20 classes"):
            miou.update(np.array([[0]]), np.array([[wrong]]))
    # a quarter too far, half too near, a hole; all out of range
    depth.update(np.array([[5, 0.5, 1]]), np.array([[4.0, 1.0, 0.0]]))
    depth.update(np.array([[3.0]]), np.array([[11.0]]))
    r, log10 = depth.result(), (np.log10(1.25) + np.log10(2)) / 2
    assert near([r[k] for k in depth.NAMES], [0, .5, .5, .375, np.sqrt(.625), log10]), r
    assert r["images"] == 1                                 # the second is left out


# -----------------------------------------------------------------------------
# Data


def write_photo(path, size=(40, 30), mode="RGB", **options):
    shape = size[1] // 5, size[0] // 5, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, **options)
    return np.asarray(image).astype(int)


def test_photos_are_read_upright_or_named():
    """Any kind comes out upright, 8 bit, RGB; a JPEG no larger than needed, with the same view."""
    with folder() as at:
        truth, exif = write_photo(at / "rgb.png").transpose(2, 0, 1), Image.Exif()
        grey = np.tensordot([0.299, 0.587, 0.114], truth, 1)
        for name, mode in (("l.png", "L"), ("la.png", "LA"), ("p.png", "P"), ("cmyk.jpg", "CMYK"),
                           ("rgba.png", "RGBA"), ("one.png", "1"), ("rgb.jpg", "RGB")):
            write_photo(at / name, mode=mode)
            image = data.read_image(at / name)
            error = np.abs(image.numpy() - (grey if mode in "LA" else truth)).mean()
            assert image.dtype == torch.uint8 and image.shape == (3, 30, 40), name
            assert error < 12 or mode in "1P", f"{name} is off by {error}"
        deep = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
        Image.fromarray(deep).save(at / "16.png")
        assert (data.read_image(at / "16.png").numpy() == deep // 257).all()    # 65535 = 255 * 257
        exif[0x0112] = 6                                                    # "rotate 90 clockwise"
        Image.open(at / "rgb.png").save(at / "turned.png", exif=exif)
        assert (data.read_image(at / "turned.png").numpy() == np.rot90(truth, -1, (1, 2))).all()
        write_photo(at / "a.jpg", (640, 480), exif=exif)                    # upright: 480 wide
        whole, part = data.read_image(at / "a.jpg"), (100, 40, 320, 400)
        for size, height in ((330, 640), (160, 320), (159, 320), (80, 160), (10, 80)):
            asked = []
            photo, view = files.read_view(at / "a.jpg", lambda *s, a=asked: a.append(s) or part,
                                          size)
            assert asked == [(640, 480)] and photo.shape == (3, height, height * 3 // 4)
            assert view == tuple(round(v * height / 640) for v in part)
            small, large = (data.v2.functional.resized_crop(p.float(), *v, [8, 8], antialias=True)
                            for p, v in ((photo, view), (whole, part)))
            assert (small - large).abs().mean() < 2, size                   # shifted by 20 px: 8
        (at / "half.jpg").write_bytes((at / "rgb.jpg").read_bytes()[:-300])
        (at / "huge.pgm").write_bytes(b"P5 20000 20000 255\n")
        (at / "text.jpg").write_text("<html>not found</html>")
        Image.fromarray(np.ones((4, 4), np.float32)).save(at / "float.tiff")
        for name in ("half.jpg", "huge.pgm", "text.jpg", "float.tiff", "missing.jpg"):
            for read in (data.read_image, lambda p: files.read_view(p, lambda *s: (0, 0, *s), 8)):
                with raises(InputError, name):
                    read(at / name)


def test_folders_of_photos():
    """train/ and val/ are respected, else every 20th photo validates; labels are no photos."""
    with folder() as at, quiet():
        def opened(name):
            sets = data.open_pretraining(at / name, TINY)
            assert all(s[0, 0][0].shape == (3, 64, 64) for s in sets)
            return [[f.relative_to(at / name).as_posix() for f in files.paths_of(s.source)]
                    for s in sets]
        for i in range(25):
            write_photo(at / "flat" / f"{i % 3}/{i:02d}.jpg")
        (at / "flat/notes.txt").write_text("no photo")
        train, val = opened("flat")
        assert (len(train), len(val)) == (23, 2) and len({*train, *val}) == 25
        sets = data.open_pretraining(at / "flat", TINY, ours=at / "flat/2")     # a run's pictures
        assert {f.parent.name for s in sets for f in files.paths_of(s.source)} == {"0", "1"}
        exported(at / "nyu", "nyu", 3)                      # of lists the photos, not the depth
        assert [f.split("/")[-1][:3] for part in opened("nyu") for f in part] == ["rgb"] * 6
        for name in ("train2017/a.jpg", "val2017/b.jpg", "annotations/panoptic_train2017/a.png"):
            write_photo(at / "coco" / name)                 # nor COCO's maps
        assert opened("coco") == [["train2017/a.jpg"], ["val2017/b.jpg"]]
        tracemalloc.start()                                 # a path takes little memory
        photos = data.Photos(at / f"train/n01440764/{i}.JPEG" for i in range(20_000))
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert photos.file(17).name == "17.JPEG" and taken < 20_000 * 80, taken
        for n, (train, val, labels) in enumerate((
                ("train/n/a.JPEG", "val/n/b.JPEG", ""), ("train/a.png", "validation/b.png", ""),
                ("TRAIN/a.png", "Valid/b.png", ""), ("valid/b.png", "other/a.png", ""),
                ("Images/Train/a.png", "Images/val/b.png", "LABELS/train/a.png LABELS/Val/b.png"),
                ("train/rgb/a.png", "val/rgb/b.png", "train/depth/a.png val/depth/b.png"),
                ("images/b.png", "images/a.png", "masks/a.png masks/b.png"))):
            for name in (train, val, *labels.split()):
                write_photo(at / f"{n}" / name)
            assert opened(f"{n}") == [[train], [val]]
        for split, count in (("train", 3), ("val", 1)):
            toyexport.export(at / "toy", "imagenet", count, 64, 0, split)
        assert list(map(len, opened("toy"))) == [3, 1]
        photo = data.open_pretraining(at / "toy", TINY)[1].source[0]["image"].float()
        scene = drawn.ToyWorld("val", 1, 64)[0]["image"]
        assert (photo - scene).abs().mean() < 10                            # JPEG; others: 40
        (at / "none").mkdir()
        for path, word, options in (
                (at / "none", at / "none", {}), (at / "missing", at / "missing", {}),
                ("toyworld:8", "--mask-ratio", {"ratio": 0.99}), ("toyworld:x", "toyworld:x", {}),
                ("toyworld:8", "--mask grid", {"mask": "grid", "ratio": 0.5})):
            with raises(InputError, str(word)):
                data.open_pretraining(path, TINY, **options)


def test_samples_are_functions_of_seed_epoch_index():
    """The caller's random state is left alone. With --overfit photos are trained on as they are."""
    def same(a, b):
        pairs = zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b)
        return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
    for make, *options in ((data.open_pretraining, TINY), (data.open_segmentation, 64),
                           (data.open_detection, 64), (data.open_depth, 48, 64)):
        train, val = make("toyworld:4", *options, seed=3)
        first = train[5, 2]
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        assert same(train[5, 2], first) and torch.equal(before, torch.random.get_rng_state())
        assert same(val[0, 2], val[0, 2])
        changed, train.seed = [train[6, 2], train[5, 3]], 4
        assert not any(same(x, first) for x in (*changed, train[5, 2]))
        if make is not data.open_pretraining:
            train, val = make("toyworld:4", *options, overfit=True)
            for k in {"image", "depth"} & train[4, 2].keys():
                assert same([train[4, 2][k]] * 2, [val[0, 2][k], train.source[2][k]])


def test_crops_and_hidden_units_follow_mae():
    """Flips half of the time, crops of 20 to 100 % of the photo, 27 of 36 units hidden at 75 %."""
    x = torch.arange(100).expand(100, 100)
    source = argparse.Namespace(view=lambda i, choose, size: (
        torch.stack([x, x.T, x]).to(torch.uint8), choose(100, 100)))
    train, val = (data.Pretraining(source, t, 64, 16, "random", 0.75, 0) for t in (True, False))
    crops = torch.stack([train[e, 0][0].float() for e in range(200)])
    assert 70 < (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).sum() < 130
    areas = (crops.amax((2, 3)) - crops.amin((2, 3)))[:, :2].prod(1) / 99 ** 2
    assert 0.15 < areas.min() < 0.3 and areas.max() > 0.9 and 0.45 < areas.mean() < 0.7
    assert val.choose(640, 480) == (80, 0, 480, 480) and val.choose(3, 8) == (0, 2, 3, 3)
    assert all(x[0, 0, 0] < x[0, 0, -1] for x, _ in (val[0, i] for i in range(8)))  # never mirrored
    for e in range(50):
        with data.seeded(e):
            top, left, h, w = train.choose(60, 300)
        assert min(top, left) >= 0 and top + h <= 60 and left + w <= 300
    masks = {}
    for strategy in ("random", "block", "grid"):
        with data.seeded(1):
            masks[strategy] = torch.stack([data.hidden_units(strategy, 6, 0.75) for _ in range(20)])
        assert (masks[strategy].sum((1, 2)) == 27).all(), strategy
    assert (F.avg_pool2d(masks["grid"].float(), 2) == 0.75).all()           # one seen in each cell
    assert data.hidden_units("random", 6, 0.6).sum() == 22                  # int(36 * 0.4) seen
    assert len(masks["random"].unique(dim=0)) == len(masks["block"].unique(dim=0)) == 20
    assert masks["block"].diff(dim=1).sum() < 0.7 * masks["random"].diff(dim=1).sum()   # lumps


def test_batches_do_not_depend_on_processes():
    """A step's samples are the same with accumulation, several processes, after a resume; tasks
    take turns in every micro-batch, and every image has each of them in as many epochs."""
    def micro(size, accumulate=1, world=1, start=0, kinds=3):
        """All (epoch, index) of each process and micro-step, one list for each step."""
        args = argparse.Namespace(batch_size=size, accumulate=accumulate, seed=1)
        runs = [training.Run(torch.device("cpu"), rank, world) for rank in range(world)]
        length = {1: 26, 3: 24}[kinds]                      # 6 steps of 4 an epoch
        found = [list(batching.Batches(length, args, r, start, 18, kinds)) for r in runs]
        return zip(*(share[a::accumulate] for a in range(accumulate) for share in found))
    for kinds in (1, 3):
        one, *others = ([sum(step, []) for step in micro(*split, kinds=kinds)] for split in (
            (4,), (2, 2), (2, 1, 2), (1, 2, 2)))
        assert others == [one] * 3
        assert [sum(step, []) for step in micro(2, 1, 2, start=7, kinds=kinds)] == one[7:]
        epochs = [sum(one[n:n + 6], []) for n in (0, 6, 12)]
        assert all(len({i for _, i in x}) == 24 for x in epochs)
        assert all({e for e, _ in x} == {n} for n, x in enumerate(epochs))
        orders = [[i for _, i in x] for x in epochs]
        assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    for batch in sum(map(list, (*micro(4), *micro(2, 1, 2), *micro(5))), []):
        counts = np.bincount([sum(at) % 3 for at in batch], minlength=3)
        assert counts.max() - counts.min() <= 1, counts
    train = data.open_segmentation("toyworld:24", 64, tasks=ALL_TASKS)[0]
    assert all(train[at]["task"] == ALL_TASKS[sum(at) % 3] for at in one[0] + one[7])
    for world in (1, 2, 3):                                 # an evaluation visits each once
        args, runs = argparse.Namespace(batch_size=2), [training.Run(None, r, world)
                                                        for r in range(world)]
        ids = sum((sum(batching.share([1] * 7, args, run), []) for run in runs), [])
        assert sorted(ids) == [(0, i) for i in range(7)]


def test_colours_change_pixel_by_pixel_as_said():
    """Mask2Former's against colorsys, each change half of the time; BTS's gamma, on 0..1."""
    photo = torch.randint(256, (3, 3, 4), generator=torch.Generator().manual_seed(0)).byte()
    counts, half = torch.zeros(4), torch.tensor([32, 0.5, 0.5, 0.1])
    to_hsv, to_rgb = np.vectorize(colorsys.rgb_to_hsv), np.vectorize(colorsys.hsv_to_rgb)
    for seed in range(200):
        with data.seeded(seed):
            out = data.ColourJitter()({"image": photo})["image"]
        with data.seeded(seed):
            apply, first, amounts = torch.rand(4) < 0.5, torch.rand(()) < 0.5, torch.rand(4)
        counts += apply
        shift, contrast, saturation, turn = torch.tensor([0, 1, 1, 0]) + apply * half * (
            2 * amounts - 1)
        rgb = ((photo + shift).clip(0, 255) * (contrast if first else 1)).clip(0, 255).numpy()
        h, s, v = to_hsv(*rgb / 255)
        rgb = 255 * np.array(to_rgb((h + turn.item()) % 1, (s * saturation.item()).clip(max=1), v))
        rgb = (rgb * (1 if first else contrast.item())).clip(0, 255)
        assert np.abs(rgb - out.numpy()).max() < 12, seed                   # HSV in 8 bits
    assert ((counts - 100).abs() < 25).all()
    for seed in range(20):
        with data.seeded(seed):
            out = data.ColourAugment()({"image": photo})["image"]
        with data.seeded(seed):
            expected, change = photo / 255, torch.rand(()) < 0.5
            gamma, bright = (torch.empty(()).uniform_(*r) for r in ((0.9, 1.1), (0.75, 1.25)))
            changed = expected ** gamma * bright * torch.empty(3, 1, 1).uniform_(0.9, 1.1)
        assert (out - (changed if change else expected).clamp(0, 1) * 255).abs().max() < 0.51


# -----------------------------------------------------------------------------
# Detection


def random_boxes(*shape, seed=0):
    """Boxes inside the unit square as centre x, y, width, height."""
    low, high = torch.rand(2, *shape, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([(low + high) / 2, (low - high).abs()], -1)


def detection_batch(counts):
    return [{"labels": torch.arange(n) % 2 + i, "boxes": random_boxes(n, seed=i)}
            for i, n in enumerate(counts)]


def test_detection_loss_equals_loops():
    """Both groups' set loss, term by term, against brute force over permutations; in fp32."""
    queries, kinds, generator = 5, 4, torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2, 3, queries, kinds, generator=generator)
    boxes, targets = random_boxes(2, 3, queries, seed=7), detection_batch((2, 0, 1))
    no = torch.zeros(queries, kinds, dtype=torch.bool)

    def focal(x, yes):
        p = x.sigmoid()
        return torch.where(yes, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p ** 2 * (1 - p).log())
    for repeats in (1, 2):
        expected = dict.fromkeys(("class", "L1", "giou"), 0.0)
        for layer, (b, t) in itertools.product(range(2), enumerate(targets)):
            x, found = logits[layer, b], boxes[layer, b]
            labels, truth = t["labels"].repeat(repeats), t["boxes"].repeat(repeats, 1)
            distance = torch.cdist(found, truth, p=1)
            giou = torchvision.ops.generalized_box_iou(*(
                torchvision.ops.box_convert(box, "cxcywh", "xyxy") for box in (found, truth)))
            cost = 2 * (focal(x, ~no) - focal(x, no))[:, labels] + 5 * distance - 2 * giou
            pairs = [(torch.tensor(order).long(), torch.arange(len(labels)))
                     for order in itertools.permutations(range(queries), len(labels))]
            best, answer = min(pairs, key=lambda at, cost=cost: cost[at].sum()), no.clone()
            answer[best[0], labels] = True
            expected["class"] += focal(x, answer).sum()
            expected["L1"] += distance[best].sum()
            expected["giou"] += (1 - giou[best]).sum()
        parts = losses.detection_loss(logits, boxes, targets, 1.5, repeats)
        for name, number in expected.items():
            assert_close(parts[name], number / (1.5 * repeats), 1e-4, name)
        total = 2 * parts["class"] + 5 * parts["L1"] + 2 * parts["giou"]
        assert_close(parts["loss"], total, 1e-6)
    answers = logits.bfloat16(), boxes.bfloat16()
    half, single = (losses.detection_loss(*x, targets, 2) for x in
                    (answers, [x.float() for x in answers]))
    assert half == single and half["loss"].dtype == torch.float32
    small = torch.tensor([[0.5, 0.5, 0.51, 0.51]])                      # as many of COCO's objects
    assert_close(losses.generalized_iou(small, small), torch.ones(1), 1e-4)
    point = torch.zeros(1, 4, requires_grad=True)
    value = losses.generalized_iou(point, point.detach())               # no area: 0, no NaN
    assert value == 0 and torch.autograd.grad(value, point)[0].isfinite().all()


def test_weights_begin_as_they_should():
    """Linear layers are xavier-uniform, as MAE's, biases zero; [CLS], [M] and levels are small. A
    fresh network has no larger gradients where there is padding."""
    torch.manual_seed(0)
    net = M.Pretrainer(TINY)
    for layer in (m for m in net.modules() if isinstance(m, torch.nn.Linear)):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None or not layer.bias.any()
    for small in (net.mask_token, net.glid.decoder.cls, net.glid.decoder.level):
        assert 0.01 < small.std() < 0.03

    def gradient(size):
        photo, side = torch.randn(1, 3, size, size), torch.tensor([[size, size]])
        found = net.glid.encode(photo, Layout(TINY, side))[0]
        return torch.autograd.grad((found * torch.randn_like(found)).sum(),
                                   net.glid.backbone.embed.bias)[0].norm()
    assert gradient(2 * TINY.unit - 6) < 3 * gradient(2 * TINY.unit)


def detector():
    torch.manual_seed(0)
    net = apart(M.Detector(TINY, 3, one_to_one=6, one_to_many=12))
    for head in (net.classify, net.box):                    # zero at first: all answers are equal
        torch.nn.init.xavier_uniform_(head.weight)
    return net


def test_detection_groups_do_not_see_each_other():
    """Training's first group, last layer, runs at test. e_i are zero at first, p(class) 0.01."""
    net, images = detector(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(images, whole(TINY, images), train=True)
        assert before[0].shape == (3, 2, 18, 3) and before[1].shape == (3, 2, 18, 4)
        for trained, alone in zip(before, net(images, whole(TINY, images))):
            assert_close(trained[-1:, :, :6], alone, 1e-5)
        for own, others in ((slice(6), slice(6, None)), (slice(6, None), slice(6))):
            net = detector()
            torch.nn.init.normal_(net.offsets[others])
            after = net(images, whole(TINY, images), train=True)[0]
            assert_close(after[:, :, own], before[0][:, :, own], 1e-5)
            assert (after - before[0])[:, :, others].abs().max() > 1e-3
    fresh = M.Detector(TINY, 5)
    assert not fresh.offsets.any() and fresh.offsets.shape == (1800, 64)
    with torch.no_grad():
        logits, boxes = fresh(images, whole(TINY, images))
    assert_close(logits.sigmoid(), torch.full_like(logits, 0.01), 1e-5)
    assert (boxes == 0.5).all()                             # whatever the seed


def test_every_parameter_learns_in_detection():
    """Also from boxes without area, and without any object. No answer is rounded to bf16."""
    targets = detection_batch((2, 1))
    targets[0]["boxes"][0, 2:] = 0
    args = args_for(finetune_det, "--queries", 6, "--many-queries", 12, "--repeats", 4)
    for batch, expected in ((targets, []), (detection_batch((0, 0)), ["box.weight", "box.bias"])):
        net, images = detector(), torch.randn(2, 3, 64, 64)
        answers = net(images, whole(TINY, images), train=True)
        loss = finetune_det.group_losses(*answers, batch, 1, args)
        assert without_gradient(net, loss) == expected
        assert net.box.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for answer in net(images, whole(TINY, images), train=True):
            assert answer.dtype == torch.float32 and (answer != answer.bfloat16().float()).any()
        answer = answer.logit()                             # nor was the layer's before the sigmoid
        assert (answer - answer.bfloat16()).abs().max() > 1e-4


def test_detection_augmentation_is_detrs():
    """Sizes, crops, flips and where they move a box to, read off ramps of brightness: for 160 px
    DETR's 480..800, 400..600 and 384..600 px are 96..160, 80..120 and 76..120."""
    ramp = torch.linspace(0, 255, 160).round().byte().expand(160, 160)
    photo, transform = torch.stack([ramp, ramp.T, ramp]), data.detection_transform(True, 160)
    shortest, crops, mirrored = [], [], 0
    wide = {"image": data.tv_tensors.Image(photo[:, :40])}
    box = data.tv_tensors.BoundingBoxes([[40.0, 60, 120, 90]], format="XYXY",
                                        canvas_size=(160, 160))
    for i in range(150):
        with data.seeded(i):
            out = transform({"image": data.tv_tensors.Image(photo), "boxes": box})
            assert max(transform(wide)["image"].shape) <= 266
        size, image = out["image"].shape[1:], out["image"].float()
        lines = image[0].mean(0), image[1].mean(1)
        for k, line in enumerate(lines):
            values = (box[0, k::2] - 0.5) * 255 / 159                       # of the ramp there
            edges = 0.5 + (values - line[0]) * (len(line) - 1) / (line[-1] - line[0])
            edges = edges.sort().values.clamp(0, len(line))
            assert (out["boxes"][0, k::2] - edges).abs().max() < 2, (i, edges, out["boxes"])
        shortest.append(min(size))
        mirrored += bool(lines[0][0] > lines[0][-1])
        shares = [(line.max() - line.min()).item() / 255 for line in lines]
        crops += [shares] * (min(shares) < 0.98)
        assert max(size) <= 266 and (max(size) == 266 or shortest[-1] >= 96)
    assert min(shortest) == 96 and max(shortest) == 160 and len(set(shortest)) > 8
    assert 50 < mirrored < 100 and 40 < len(crops) < 110            # not all crops cut something
    assert 0.58 < min(map(min, crops)) < 0.75
    assert any(abs(w - h) > 0.1 for w, h in crops)                  # sides are drawn one by one
    assert data.detection_transform(False, 160)(wide)["image"].shape == (3, 66, 266)
    for augment in (False, True):
        for _ in range(20 * augment or 1):
            thin = {"image": data.tv_tensors.Image(torch.zeros(3, 20, 1000, dtype=torch.uint8))}
            assert min(data.detection_transform(augment, 16)(thin)["image"].shape) > 0
    # boxes as fractions, labels with them; none without area, no crowds
    train, _ = data.open_detection("toyworld:1", 64)
    train.source.samples = [{
        "image": photo[:, :80], "classes": torch.tensor([4, 5, 6, 3]), "boxes": torch.tensor(
            [[8.0, 8, 8, 24], [8, 8, 24, 8], [16, 32, 80, 64], [0, 0, 9, 9]]),
        "iscrowd": torch.tensor([0, 0, 0, 1])}]
    train.transform = data.detection_transform(False, 160)
    assert train[0, 0]["labels"].tolist() == [6]
    assert_close(train[0, 0]["boxes"], torch.tensor([[0.3, 0.6, 0.4, 0.4]]), 1e-6)


def test_detection_inference():
    """By hand; from a network, in eval mode, that answers the truth about photos that are no
    squares AP is 1."""
    logits = torch.tensor([[2.0, -3.0], [1.0, 3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.2, 0.4, 0.2]])
    found = finetune_det.detection_inference(logits, boxes, (100, 200), count=3)
    assert found["labels"].tolist() == [1, 0, 0]
    assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid(), 1e-6)
    assert_close(found["boxes"], torch.tensor([[140.0, 10, 200, 30], [80, 30, 120, 70],
                                               [140, 10, 200, 30]]), 1e-5)
    many = finetune_det.detection_inference(torch.randn(30, 5), torch.rand(30, 4), (9, 9))
    assert len(many["scores"]) == 100

    class Oracle(torch.nn.Module):
        glid, answers = argparse.Namespace(config=TINY), [random_boxes(4, seed=i) for i in range(6)]

        def forward(self, images, layout):
            assert not self.training
            boxes = torch.stack([next(truth) for _ in images])
            return (18 * torch.eye(7)[:4] - 9).expand(1, len(boxes), 4, 7), boxes[None]
    truth = iter(Oracle.answers)
    with folder() as at, quiet():
        args = args_for(finetune_det, "--size", 64, "--batch-size", 4, "--workers", 0, "--out", at)
        _, val = data.open_detection("toyworld:6", 64)
        val.source.samples = [
            {"image": torch.zeros(3, 72 + i, 96, dtype=torch.uint8), "classes": torch.arange(4),
             "boxes": torchvision.ops.box_convert(boxes, "cxcywh", "xyxy") * torch.tensor(
                 [96, 72 + i] * 2)} for i, boxes in enumerate(Oracle.answers)]
        net, state = Oracle(), training.Run(torch.device("cpu"))
        result = finetune_det.evaluate(net, val, args, state, at / "p.png")
        assert result["AP"] == result["AP50"] == result["AR100"] == 1.0 and net.training
        drawn = Image.open(at / "p.png")            # a row for each photo, truth beside answer
        assert drawn.width > 2 * 250 and drawn.height > 6 * 200, drawn.size


def train_by_hand(net, args, train, scales, loss_of):
    """Training written out: loss_of(micro-batches) of each step, scales of the rate 1e-3. Weights,
    losses and rates must be those that the script left in args.out. -> gradient norms, the log."""
    state, rows = training.Run(torch.device("cpu")), []
    checkpoints.load_parts(net.glid, args.init, checkpoints.PARTS, state)
    groups = training.param_groups(net, args.weight_decay, [
        ("offsets", 50.0), ("backbone", 0.1), ("glid.", 1.0), ("", 3.0)])
    optimizer = torch.optim.AdamW(groups, fused=True)
    order = iter(batching.Batches(len(train), args, state, 0, len(scales)))
    for step, scale in enumerate(scales):
        torch.manual_seed(data.derive_seed(0, step, 0))
        training.set_lr(optimizer, 1e-3 * scale)
        loss = loss_of([data.collate(TINY, [train[i] for i in next(order)]) for _ in range(2)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        rows.append((loss.item(), 1e-3 * scale, norm))
    torch.save({"model": net.state_dict()}, args.out + "/hand.pt")
    assert weights_differ(args.out + "/last.pt", args.out + "/hand.pt") < STEADY
    log = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    assert_close(torch.tensor([(r.get("loss", r.get("loss_x1000", 0) / 1000), r["lr"])
                               for r in log if "lr" in r]),
                 torch.tensor(rows)[:, :2], 1e-4, "losses and rates in the log")
    return torch.tensor(rows)[:, 2], log


def args_by_hand(script, at, *flags):
    """For a run that train_by_hand repeats, from pre-trained weights."""
    torch.manual_seed(1)
    torch.save({"model": noisy(Pretrainer(TINY)).state_dict(), "config": {}}, at / "pre.pt")
    return args_for(script, "--accumulate", 2, "--workers", 0, "--save-every", 1, "--lr", 1e-3,
                    "--query-lr", 50, "--backbone-lr", 0.1, "--head-lr", 3, "--init",
                    at / "pre.pt", "--out", at / "run", *flags)


def test_detection_loop_does_what_it_says():
    """As training by hand, one micro-step being without objects; best.pt has the highest AP."""
    with folder() as at, quiet(), steady_adam():
        args = args_by_hand(finetune_det, at, "--data", "toyworld:2", "--batch-size", 1, "--steps",
                            5, "--eval-every", 2, "--clip", 53, "--repeats", 3, "--queries", 12,
                            "--many-queries", 30, "--weight-decay", 0.1, "--drop-path", 0.3)
        train, val = data.open_detection("toyworld:2", 64)
        full, empty = train.source.samples
        train.source.samples = [full, {k: v if k == "image" else v[:0] for k, v in empty.items()}]
        aps = iter((0.2, 0.5, 0.3))
        with patched(finetune_det, open_detection=lambda *a, **k: (train, val),
                     evaluate=lambda *a: dict.fromkeys(finetune_det.REPORTED, next(aps))):
            assert finetune_det.main(args) == {"AP": 0.5, "step": 5}
        best, last = (torch.load(at / f"run/{name}.pt") for name in ("best", "last"))
        assert (best["step"], last["step"], last["best"]) == (4, 5, 0.5)
        torch.manual_seed(0)
        net = M.Detector(training.model_config(args), len(train.classes), 12, 30)

        def loss_of(parts):
            count = sum(len(targets[0]["labels"]) for *_, targets in parts)
            answers = [net(M.normalize(images), tokens, train=True) for images, tokens, _ in parts]
            return sum(losses.detection_loss(x[:, :, mine], boxes[:, :, mine], targets, count,
                                             repeats)["loss"]
                       for (x, boxes), (*_, targets) in zip(answers, parts)
                       for mine, repeats in ((slice(12), 1), (slice(12, None), 3)))
        norms, _ = train_by_hand(net, args, train, (1, 1, 1, 1, 0.1), loss_of)  # drops at 80 %
        assert norms.min() < 53 < norms.max()      # Adam would not notice a constant factor


# -----------------------------------------------------------------------------
# Segmentation


ALL_TASKS = ["semantic", "instance", "panoptic"]


def test_segmentation_inference_is_mask2formers():
    """For all masks at once: logits are enlarged to the network's input, cut, and enlarged to the
    original; of semantic segmentation it is the sum of the queries that is enlarged last."""
    merged, void, real = 0, 0, finetune_seg.PART
    for seed, (limit, least, share), finetune_seg.PART in itertools.product(
            range(4), ((100, 0, 0.1), (7, 0.5, 0.4), (100, 0.8, 0.6)), (1, real)):
        generator = torch.Generator().manual_seed(seed)     # 48 x 32 px on a larger canvas, patch 4
        classes = 3 * torch.randn(12, 5, generator=generator)
        masks = 2 * torch.randn(12, 5, 4, generator=generator).repeat_interleave(8, 1)
        masks = masks.repeat_interleave(8, 2) + torch.randn(12, 40, 32, generator=generator) - 1.4
        classes[2, 0], classes[7:9, 2], masks[2, 20:30] = 15, 9, 9
        classes[3], masks[3], masks[5] = classes[2, [1, 0, 2, 3, 4]], masks[2], -9.0    # as sure; 0
        asked = classes, masks, (48, 32), 4, (61, 43)
        cut = F.interpolate(masks[None, :, :16, :8], (64, 32), mode="bilinear")[:, :, :48]
        sums = torch.einsum("qk,bqhw->bkhw", classes.softmax(-1)[:, :4], cut.sigmoid())
        sums, big = (F.interpolate(x, (61, 43), mode="bilinear")[0] for x in (sums, cut))
        found = semantic_inference(*asked).long()[None]
        assert_close(sums.gather(0, found)[0], sums.amax(0), 1e-5)
        pairs = [(p.item(), k, p * big[q][big[q] > 0].sigmoid().mean(), big[q] > 0)
                 for q in range(12) for k, p in enumerate(classes[q].softmax(0)[:4])]
        pairs = [x for x in sorted(pairs, key=lambda x: -x[0])[:limit] if x[3].any()]
        found = instance_inference(*asked, limit)
        assert found["labels"].tolist() == [x[1] for x in pairs]
        assert_close(found["scores"], torch.stack([x[2] for x in pairs]), 1e-5)
        assert torch.equal(found["masks"], torch.stack([x[3] for x in pairs]))

        p, labels = classes.softmax(-1).max(-1)
        kept = ((labels < 4) & (p > least)).nonzero()[:, 0]
        big, (expected, kinds, stuff) = big[kept].sigmoid().numpy(), (np.zeros((61, 43)), {}, {})
        owner = (p[kept, None, None].numpy() * big).argmax(0)
        for n, label in enumerate(labels[kept].tolist()):
            owned, full = owner == n, big[n] >= 0.5
            if (owned & full).any() and owned.sum() / full.sum() >= share:
                segment = stuff.get(label, len(kinds) + 1)
                kinds[segment] = label
                stuff |= {label: segment} if label >= 2 else {}         # the first two are things
                expected[owned & full] = segment
        ids, found = panoptic_inference(*asked, 2, least, share)
        assert (ids.numpy() == expected).all() and found == kinds
        void, merged = void + (expected == 0).any(), merged + (len(stuff) < len(kinds) < len(kept))
    assert void and merged, "the cases are too easy"
    classes[:, 4], masks[:] = 99, -1                        # no object, in no pixel
    ids, kinds = panoptic_inference(*asked, 2)
    assert kinds == {} and ids.shape == (61, 43) and not ids.any()
    assert not len(instance_inference(*asked)["labels"])


def test_toyworld_is_consistent():
    """All labels tell one story; find_objects() makes the scene's masks of the maps and the stack;
    void belongs to nothing, crowds are marked."""
    for size, index in itertools.product((64, 97), range(8)):
        scene, again = (toyworld.scene(3, index, size) for _ in range(2))
        assert all(np.array_equal(scene[k], again[k]) for k in scene)
        s = {k: torch.from_numpy(v) for k, v in scene.items()}
        corners = torchvision.ops.masks_to_boxes(s["masks"]) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(s["boxes"], corners) and s["masks"].sum(0).max() <= 1
        assert s["depth"].max() <= 10 and torch.equal(s["depth"] > 0, s["semantic"] != toyworld.SKY)
        shown = s["keypoints"][..., 2] > 0
        assert (s["keypoints"][..., :2] < size).all() and not s["classes"][shown.any(1)].any()
        assert torch.equal(shown.any(1), s["keypoints"].flatten(1).any(1))
        stack = dict(layers=stacked(s["masks"]), classes=s["classes"], iscrowd=s["classes"] == 0)
        for sample, crowd in ((s, s["classes"] < 0), (stack, s["classes"] == 0)):
            found = data.find_objects("instance", sample, 7)
            assert all(map(torch.equal, found, (s["classes"], s["masks"], crowd)))
        for task in ("semantic", "panoptic"):
            labels, masks, crowd = data.find_objects(task, s, 7)
            assert (masks.sum(0) == 1).all() and masks.flatten(1).any(1).all() and not crowd.any()
            assert torch.equal(labels[masks.byte().argmax(0)], s["semantic"].long())
            assert task == "panoptic" or len(set(labels.tolist())) == len(labels)
        s["panoptic"][:5], s["segments"][0, 2] = 0, 1
        labels, masks, crowd = data.find_objects("panoptic", s, 7)
        assert not masks[:, :5].any() and crowd.tolist() == [True] + [False] * (len(labels) - 1)
    # a person so far away that a metre is 64 px; a quarter of a metre to its left is on our right
    joints, owner = np.zeros((17, 3)), np.full((64, 64), -1)
    joints[0], owner[20:40, 30:60], owner[20, 30] = (0.25, 1, 2), 0, -1
    thing = toyworld.Thing(toyworld.FOCAL, 0, "person", [], joints, ())
    found = toyworld.annotate(dict(height=1, horizon=0.5), [thing], owner,
                              np.full((64, 64), toyworld.SKY, np.uint8), 64)
    assert found["keypoints"][0, 0].tolist() == [0.75 * 64 - 0.5, 0.5 * 64 - 0.5, 2]
    assert found["area"].tolist() == [599]


def test_objects_stay_aligned_and_empty_ones_go():
    """Crop, flip move photo and masks together; what is cut off, crowd or ignored has no target."""
    ids = torch.arange(1, 65).view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    masks = torch.stack([ids <= 32, ids % 8 < 3, ids > 60, ids > 0])        # the last is a crowd
    n, mask = torch.arange(64), data.tv_tensors.Mask
    train, _ = data.open_segmentation("toyworld:2", 32, tasks=ALL_TASKS)
    train.source = [{
        "image": data.tv_tensors.Image(200 * masks[:3].byte()), "panoptic": mask(ids.int()),
        "segments": torch.stack([n + 1, n % 3, n * 0], 1), "layers": mask(stacked(masks)),
        "classes": torch.tensor([0, 1, 0, 1]), "iscrowd": torch.tensor([0, 0, 0, 1]),
        "semantic": mask(torch.where(masks[0], 1, 255).byte())}]
    steps, counts = train.transform.transforms, set()
    assert any(isinstance(t, data.ColourJitter) for t in steps)
    train.transform = data.v2.Compose([t for t in steps if not isinstance(t, data.ColourJitter)])
    for epoch in range(45):
        sample = train[epoch, 0]
        image, found, task = sample["image"] > 100, sample["masks"], sample["task"]
        assert found.dtype == torch.bool and found.flatten(1).any(1).all()
        assert len(sample["labels"]) == len(found) and found.shape[1:] == image.shape[1:]
        assert max(image.shape) <= 32 and task == ALL_TASKS[epoch % 3]
        shown = [c for c in image if c.any()] if task == "instance" else [image[0]]
        if task == "panoptic":
            assert found.sum(0).max() == 1
            continue
        for m in found:                                                 # nearest, linear: edges
            assert max((m == c).float().mean() for c in shown) > 0.85
        if task == "semantic":
            assert sample["labels"].tolist() == [1] * len(found)
        else:
            assert len(found) in (len(shown), len(shown) + 1)       # a blurred edge may vanish
            counts.add(len(found))
    assert len(counts) > 1, "no crop has cut anything off"
    train.transform, semantic = data.v2.Identity(), train.source[0]["semantic"]
    semantic[:], semantic[3, 4] = 255, 2                                # one pixel is enough
    assert train[45, 0]["labels"].tolist() == [2]


def test_masks_are_scaled_about_their_pixels_centres():
    """A disc and its mask keep one centre at every scale (torchvision's nearest: 0.5 off)."""
    y, x = torch.meshgrid(torch.arange(103.0), torch.arange(157.0), indexing="ij")
    disc, mask = (y - 50) ** 2 + (x - 70) ** 2 < 40 ** 2, data.tv_tensors.Mask
    for size in (29, 64, 77, 190):
        out = data.segmentation_transform(False, size)({    # also of what --overfit trains on
            "image": data.tv_tensors.Image((disc * 255).byte().expand(3, -1, -1)), "depth": "kept",
            "none": mask(disc[None][:0]), "masks": mask(torch.stack([disc, ~disc])),
            "panoptic": mask(disc.int() * 70000)})
        small = out["panoptic"] == 70000
        assert out["depth"] == "kept" and torch.equal(out["masks"], torch.stack([small, ~small]))
        assert out["image"].shape[1:] == out["none"].shape[1:] == small.shape
        assert size - 1 <= min(small.shape) <= size         # torchvision rounds down
        grid = torch.stack(torch.meshgrid(*map(torch.arange, small.shape), indexing="ij"))
        photo, truth = ((grid * w).sum((1, 2)) / w.sum() for w in (out["image"][0].double(), small))
        assert (photo - truth).abs().max() < 0.2, (size, photo, truth)


def test_every_parameter_learns_in_multitask():
    """A head without an image has a gradient of zero. Tiny, missing, too many objects: finite. In a
    mixed batch each task answers what it answers alone."""
    torch.manual_seed(0)
    net = apart(Segmenter(TINY, dict(zip(ALL_TASKS, (6, 7, 8))), dict.fromkeys(ALL_TASKS, 3)))

    def loss_of(images, targets, tasks):
        targets = [t | {"task": task} for t, task in zip(targets, tasks)]
        asked = finetune_seg.slices(ALL_TASKS, targets)
        found = finetune_seg.objects_per_image(asked, targets, training.Run(torch.device("cpu")))
        answers = net(images, whole(TINY, images), asked, every_layer=True)
        return finetune_seg.batch_loss(answers, asked, targets, found, (64, 64), 128)
    images, targets = seg_batch([(0, 2), (1,), (0, 1), (2, 0, 1)])
    loss = loss_of(images, targets, ["instance", "instance", "panoptic", "semantic"])
    assert not without_gradient(net, loss)
    asked = {"semantic": slice(3, 4), "instance": slice(0, 2), "panoptic": slice(2, 3)}
    for task, answers in net(images, whole(TINY, images), asked, every_layer=True).items():
        own = images[asked[task]]
        alone = net(own, whole(TINY, own), {task: slice(None)}, every_layer=True)[task]
        for found, expected in zip(answers, alone):
            assert_close(found, expected, 1e-4, task)
    net.zero_grad()
    for count in (2, 1):                # a task's loss is what it would be without the other tasks
        torch.manual_seed(3)
        loss = loss_of(images[:count], targets[:count], ["semantic"] * count)
        torch.manual_seed(3)
        assert abs(loss - seg_loss(net, images[:count], targets[:count])) < 1e-5 * loss
    heads = {n: p for n, p in net.named_parameters() if n.startswith(("heads.ins", "heads.pan"))}
    assert sorted(without_gradient(net, loss)) == sorted(heads) and len(heads) == 10
    assert all(p.grad is not None and not p.grad.any() for p in heads.values())
    dot = torch.zeros(9, 64, 64, dtype=torch.bool)
    dot[torch.arange(9), torch.arange(9) * 7, 63] = True
    for counts in ((0, 0), (1, 1), (9, 9), (9, 0)):
        targets = [{"labels": torch.arange(n) % 3, "masks": dot[:n]} for n in counts]
        net.zero_grad()
        loss = loss_of(images[:2], targets, ["instance"] * 2)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_multitask_loss_is_a_mean_over_images():
    """However the tasks fall to the processes, the mean of their losses is that of one process.
    Constant masks and logits, two objects everywhere: no chance, equal weights."""
    generator = torch.Generator().manual_seed(0)
    tasks = ("instance", "instance", "panoptic", "semantic", "panoptic", "panoptic")
    classes = torch.randn(2, 6, 5, 4, generator=generator)
    masks = torch.randn(2, 6, 5, 1, 1, generator=generator).expand(-1, -1, -1, 16, 16)
    full = torch.tensor([True, False])[:, None, None].expand(-1, 64, 64)

    def mean_loss(images_each):
        found, state = [], training.Run(torch.device("cpu"))
        for i in range(0, 6, images_each):
            share = sorted(range(i, i + images_each), key=tasks.__getitem__)
            targets = [{"task": tasks[b], "labels": torch.tensor([2, 0]), "masks": full}
                       for b in share]
            asked = finetune_seg.slices(ALL_TASKS, targets)
            answers = {t: (classes[:, share[mine]], masks[:, share[mine]])
                       for t, mine in asked.items()}
            per_image = finetune_seg.objects_per_image(asked, targets, state)
            found.append(finetune_seg.batch_loss(answers, asked, targets, per_image, (64, 64), 32))
        return np.mean(found)
    for images_each in (3, 2, 1):
        assert abs(mean_loss(images_each) / mean_loss(6) - 1) < 1e-4


def test_truth_as_answer_is_perfect():
    """For every task exactly 1; with things taken for each other only the stuff stays perfect."""
    dataset = data.open_segmentation("toyworld:12", 64, tasks=ALL_TASKS)[1]
    args = args_for(finetune_seg, "--tasks", ",".join(ALL_TASKS), "--batch-size", 5, "--workers", 0)

    def evaluated(turn):
        samples = iter([dataset[0, i] for i in range(12)])

        def oracle(images, layout, asked):
            shown, answers = [next(samples) for _ in images], {}
            for task in asked:
                classes, masks = (torch.full((1, len(images), 20, *n), -30.0)
                                  for n in ((13,), (64, 64)))
                classes[..., -1] = 0
                for c, m, sample in zip(classes[0], masks[0], shown):
                    k, truth, _ = data.find_objects(task, sample, 7)
                    c[torch.arange(len(k)), torch.where(k < 7, (k + turn) % 7, k)] = 30
                    m[:len(k)][truth] = 30
                kinds = [*range(7), 12] if task == "instance" else slice(None)
                answers[task] = classes[..., kinds], masks
            return answers
        oracle.glid = argparse.Namespace(config=Config(**PRESETS["tiny"] | dict(patch=1)))
        oracle.train = oracle.eval = lambda: None
        return finetune_seg.evaluate(oracle, dataset, args, training.Run(torch.device("cpu")))
    right, wrong = evaluated(0), evaluated(1)
    assert right == {n: 1.0 for names in finetune_seg.REPORTED.values() for n in names}
    assert wrong["PQ_stuff"] == 1 and max(wrong["AP"], wrong["PQ_things"]) < 0.1, wrong
    assert wrong["mIoU"] < 0.6, wrong


def test_queries_of_each_task():
    """M = 100, 200, 200 by default."""
    train = data.open_segmentation("toyworld:2", 64, tasks=ALL_TASKS)[0]
    for given, expected in ((None, [100, 200, 200]), ([9], [9, 9, 9]), ([3, 4, 5], [3, 4, 5])):
        args = args_for(finetune_seg, "--tasks", ",".join(ALL_TASKS))
        args.queries = given
        heads = finetune_seg.build(args, train, training.Run(torch.device("cpu"))).heads
        assert [len(heads[t].offsets) for t in ALL_TASKS] == expected
        assert [heads[t].classify.out_features for t in ALL_TASKS] == [13, 8, 13]


# -----------------------------------------------------------------------------
# Depth


def silog_restated(prediction, target):
    """BTS writes it 10 sqrt(mean g^2 - 0.85 mean(g)^2); in double precision."""
    p, t = (x.double()[target > 0] + 1e-3 for x in (prediction, target))
    g = p.log() - t.log()
    return 10 * (g.square().mean() - 0.85 * g.mean() ** 2).sqrt()


def test_silog_by_formula():
    """Value and gradient of its other published form; finite without much to measure."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (0.1 + 9 * torch.rand(2, 3, 4, generator=generator) for _ in "pt")
    target[0, 1:] = 0                                               # invalid
    ours, theirs = (f(prediction.requires_grad_(), target) for f in
                    (losses.silog_loss, silog_restated))
    assert abs(ours - theirs) < 1e-4
    assert_close(*(torch.autograd.grad(x, prediction)[0] for x in (ours, theirs)), 1e-4)
    ones, one_pixel = torch.ones(2, 4, 4), 4 * F.one_hot(torch.tensor(27), 32).view(2, 4, 4)
    for prediction, target, expected in (                           # some files mark holes by NaN
            (ones, 0 * ones, 0.0), (ones, math.nan * ones, 0.0), (2 * ones, 2 * ones, 0.0),
            (ones, -ones, 0.0), (ones, one_pixel, 10 * 0.15 ** 0.5 * math.log(4.001 / 1.001)),
            (ones, 1e-12 * ones, 10 * 0.15 ** 0.5 * math.log(1001))):
        prediction = prediction.clone().requires_grad_()
        loss = losses.silog_loss(prediction, target)
        loss.backward()
        assert abs(loss.item() - expected) <= 1e-4 * expected, (loss.item(), expected)
        assert prediction.grad.isfinite().all() and bool(prediction.grad.any()) == (expected > 0)


def depth_net():
    torch.manual_seed(0)
    return apart(noisy(DepthEstimator(TINY, 6, 0.5, 8.0))).eval()


def test_depth_equals_equations_5_to_7():
    """With lengths that sum to 1, so that the range of Eq. 5 is full."""
    net, images = depth_net(), torch.randn(2, 3, 64, 64)
    tokens = whole(TINY, images)
    with torch.no_grad():
        depth = net(images, tokens)
        maps = net.glid.encode(images, tokens)
        x = net.glid.ask(maps, tokens, net.offsets)
        features = tokens.to_grid(maps[0], 0).double()
        length, z = (f(x[0]).double() for f in (net.length, net.embed))
    assert depth.shape == (2, 32, 32) and depth.dtype == torch.float32
    for b, (y, x) in itertools.product(range(2), ((0, 0), (3, 30), (31, 17))):
        n = (length[b, :, 0].exp() / length[b, :, 0].exp().sum()).tolist()
        centres = [0.5 + 7.5 * (n[i] / 2 + sum(n[:i])) for i in range(6)]           # Eq. 5
        scores = [math.exp(z[b, i] @ features[b, y, x]) for i in range(6)]
        expected = sum(s / sum(scores) * c for s, c in zip(scores, centres))        # Eq. 6, 7
        assert abs(depth[b, y, x].item() - expected) < 1e-4


def photo_batch(sizes):
    """Photos of these sizes with depth, holes in it, and all of them collated, with dirty padding
    that must not be seen."""
    generator = torch.Generator().manual_seed(0)
    samples = [{"image": torch.randint(0, 256, (3, h, w), generator=generator).byte(),
                "depth": 9 * (torch.rand(h, w, generator=generator) - 0.2).clamp(min=0)}
               for h, w in sizes]
    images, tokens, targets = data.collate(TINY, samples)
    for image, (h, w) in zip(images, sizes):
        image[:, h:], image[:, :, w:] = 200, 99
    return samples, images, tokens, targets


def test_depth_without_mirrors():
    """With --no-flip and --overfit no answer is averaged with a mirror image's."""
    asked, answer = [], finetune_depth.predict
    flags = ["--data", "toyworld:4:4", "--workers", 0, "--steps", 1, "--batch-size", 4]
    with folder() as at, quiet(), patched(
            finetune_depth, predict=lambda *given: asked.append(given[-1]) or answer(*given)):
        for i, more in enumerate(([], ["--no-flip"], ["--overfit"])):
            finetune_depth.main(args_for(finetune_depth, *flags, *more, "--out", at / str(i)))
            predict.load(at / f"{i}/best.pt")(np.zeros((64, 64), np.uint8))
    assert asked == [True, True, False, False, False, False]


def test_a_padded_batch_equals_alone():
    """Boxes, depth and its loss do not see neighbours or padding. Depth is the mean over the photo
    and, turned back, its mirror image."""
    net, state, sizes = depth_net(), training.Run(torch.device("cpu")), [(64, 64), (40, 56)]
    samples, images, tokens, targets = photo_batch(sizes)
    found, one_pass = (finetune_depth.predict(net, images, tokens, sizes, state, mirror=m)
                       for m in (True, False))
    pairs, detect = [], detector().eval()
    with torch.no_grad():
        for i, sample in enumerate(samples):
            image = torch.stack([sample["image"], sample["image"].flip(2)])
            alone = M.normalize(image), whole(TINY, image)
            plain, mirrored = at_original(net(*alone), sizes[i], 2, sizes[i], align_corners=True)
            assert_close(one_pass[i], plain, 1e-4)
            assert_close(found[i], (plain + mirrored.flip(1)) / 2, 1e-5, "flip test")
            assert (found[i] - plain).abs().max() > 1e-3, "the mirror image says the same"
            pairs.append(torch.stack([plain, sample["depth"]]).flatten(1))
            for x, y in zip(detect(M.normalize(images), tokens), detect(*alone)):
                assert_close(x[:, i], y[:, 0], 1e-4)
        loss = finetune_depth.depth_loss(net(M.normalize(images), tokens), targets, 2)
        near = finetune_depth.depth_loss(net(M.normalize(images), tokens), targets, 2, 1, 5)
    found, truth = torch.cat(pairs, 1)
    assert abs(loss - silog_restated(found, truth)) < 1e-4
    assert abs(near - silog_restated(found, truth * (truth > 1) * (truth < 5))) < 1e-4
    # aligned corners: the first and last token sit on the first and last pixel
    ramp = at_original(torch.arange(8.0).expand(1, 8, 8), (16, 16), 2, (16, 16), True)[0]
    assert_close(ramp[3], torch.linspace(0, 7, 16), 1e-6)


def test_every_parameter_learns_in_depth():
    """Also under bf16, which does not round depth; without a valid pixel; equal e_i come apart."""
    _, images, tokens, targets = photo_batch([(64, 64), (40, 56)])
    images, nothing = M.normalize(images), [{"depth": 0 * t["depth"]} for t in targets]
    for bf16 in (False, True):
        net = depth_net().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            depth, bins = net(images, tokens), net.bins(net.offsets[None])
        assert torch.equal(bins, net.bins(net.offsets[None])) and depth.dtype == torch.float32
        assert (depth != depth.bfloat16().float()).any()
        assert not without_gradient(net, finetune_depth.depth_loss(depth, targets, 2))
    net.zero_grad()
    loss = finetune_depth.depth_loss(net(images, tokens), nothing, 2)
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in net.parameters())
    net = DepthEstimator(TINY, 6, 1e-3, 10.0)
    finetune_depth.depth_loss(net(images, tokens), targets, 2).backward()
    torch.optim.AdamW(net.parameters(), lr=1e-3).step()
    assert len(net.offsets.unique(dim=0)) == 6


def test_depth_augmentation_keeps_photo_and_depth_together():
    """To the bit through flip and crop; rotated as by torchvision, uncovered corners invalid."""
    rotate, flip, crop, _ = data.depth_transform(48, 56).transforms
    theirs = data.v2.RandomApply([data.v2.RandomRotation(
        2.5, interpolation=data.InterpolationMode.BILINEAR)])
    board = data.tv_tensors.Mask(1 + torch.arange(200 * 360.0).view(200, 360))
    photo = data.tv_tensors.Image((board % 200).byte().expand(3, -1, -1))
    sample = {"image": photo, "depth": board}
    corners, turned, mirrored = set(), 0, 0
    for i in range(40):
        found = []
        for turn in (rotate, theirs, lambda x: crop(flip(x))):
            with data.seeded(i):
                found.append(turn(sample))
        for k in sample:                        # rounding; torchvision fills half of the border
            assert ((found[0][k].float() - found[1][k]).abs() > 1).float().mean() < 0.01, k
        depth = found[0]["depth"]
        turned += not torch.equal(depth, board)
        assert torch.equal(depth, board) or 0 < (depth == 0).float().mean() < 0.05
        image, depth = found[2]["image"], found[2]["depth"]
        assert image.shape == (3, 48, 56) and torch.equal(image[0], (depth % 200).byte())
        mirrored += bool(depth[0, 0] > depth[0, -1])
        corners.add(depth.min().item())
    assert len(corners) > 30 and 10 < turned < 30 and 10 < mirrored < 30


def test_depth_is_graded_and_drawn():
    """Eigen's window has the published corners; invalid is black, near is lighter than far."""
    metric = metrics.DepthErrors(1e-3, 10)
    for sample in drawn.ToyWorld("train", 3, 64, keys=["depth"]).samples:
        metric.update(sample["depth"], sample["depth"])
    assert metric.result() == dict(zip(metric.NAMES, (1, 1, 1, 0, 0, 0)), images=3)
    args = args_for(finetune_depth, "--eigen-crop")
    window = finetune_depth.graded((480, 640), args)
    assert window[45:471, 41:601].all() and window.sum() == 426 * 560
    with raises(InputError, "--eigen-crop", "64 x 48"):
        finetune_depth.graded((64, 48), args)
    assert finetune_depth.graded((3, 5), args_for(finetune_depth)).sum() == 15
    depth = torch.tensor([[0.0, 1, 2, 3, 4, 9]])
    light = draw.depth_map(depth, 1, 4).sum(0)[0].tolist()
    assert light[0] == 0 and light[1] > light[2] > light[3] > light[4] == light[5] > 0
    assert draw.depth_range(depth) == (1, 9) and draw.depth_range(0 * depth) == (0, 0)
    assert not draw.depth_map(0 * depth, 0, 0).any()


def test_one_cycle_is_torchs():
    for total in (1, 2, 3, 4, 10, 320, 1001):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, pct_start=0.3,
                                                       div_factor=25, final_div_factor=100)
        for step in range(total):
            assert abs(training.one_cycle(step, total) - schedule.get_last_lr()[0]) < 1e-9
            optimizer.step()
            schedule.step()


def test_depth_loop_does_what_it_says():
    """As training by hand; best.pt has the lowest REL, graded image by image."""
    with folder() as at, quiet(), steady_adam():
        args = args_by_hand(finetune_depth, at, "--data", "toyworld:4", "--batch-size", 2,
                            "--steps", 4, "--eval-every", 2, "--clip", 0.5)
        found, state, rel = finetune_depth.main(args), training.Run(torch.device("cpu")), []
        torch.manual_seed(0)
        net = DepthEstimator(TINY, args.queries, 1e-3, 10.0)
        train, val = data.open_depth("toyworld:4", 64, 64)
        scales = [training.one_cycle(step, 4) for step in range(4)]
        _, log = train_by_hand(net, args, train, scales, lambda parts: sum(
            finetune_depth.depth_loss(net(M.normalize(images), tokens), targets, 2, 1e-3, 10) / 2
            for images, tokens, targets in parts))
        for i in range(4):
            images, tokens, targets = data.collate(TINY, [val[0, i]])
            truth = targets[0]["depth"]
            guess = finetune_depth.predict(net.eval(), images, tokens, [truth.shape], state)[0]
            rel.append(((guess - truth).abs() / truth)[(truth > 1e-3) & (truth < 10)].mean())
        graded = {r["REL"]: r["step"] for r in log if "REL" in r}
        assert abs(list(graded)[-1] - np.mean(rel)) < 1e-3
        args.eval = True
        assert finetune_depth.main(args) == found | {"step": graded[min(graded)]}


def test_depth_range_and_wrong_input_are_told():
    """Least, greatest and median measured depth, what is beyond the bins, and the holes."""
    class Source:
        def __len__(self):
            return 48
        def labels(self, i):
            assert i % 3 == 0                                   # every third is looked at
            if i == 45:
                raise InputError("broken")
            depth = torch.tensor([[0.0, 2 + i], [0.5, 1]])
            return {"depth": depth.repeat_interleave(4, 0).repeat_interleave(4, 1)}
    with raises(InputError, "broken"):
        finetune_depth.spread(Source(), args_for(finetune_depth))
    line = finetune_depth.spread(Source(), args_for(finetune_depth, "--on-error", "skip"))
    assert line == ("depth 0.50 to 44.00 m, median 1.00 m, 27% of it beyond 0.001 to 10 m; "
                    "measured at 75% of the pixels")
    with folder() as at, quiet():
        for word, *flags in (("--min-depth", "--min-depth", 9, "--max-depth", 8),
                             ("--eigen-crop", "--eigen-crop", "--init", "no.pt"),
                             ("--max-depth", "--min-depth", 11, "--max-depth", 12, "--steps", 1),
                             ("toyworld", "--data", at)):       # the third's checkpoint is saved
            flags = ["--data", "toyworld:2", "--batch-size", 2, "--workers", 0, *flags]
            with raises(InputError, word):
                finetune_depth.main(args_for(finetune_depth, "--out", at / word, *flags))


# -----------------------------------------------------------------------------
# Pose


def dot(at, radius=5.0):
    """Photo uint8 [3, 200, 260], black but for a soft white dot (a pixel's centre is at + 0.5)."""
    y, x = np.mgrid[:200, :260] + 0.5
    value = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) * 2 / radius ** 2)
    return torch.from_numpy((255 * value).round().astype(np.uint8)).expand(3, -1, -1)


def centroid(crop):
    """Centre of mass (x, y), the centre of a pixel at whole numbers."""
    value = np.asarray(crop[0], np.float64)
    return (np.indices(value.shape)[::-1] * value).sum((1, 2)) / value.sum()


def test_pose_crops():
    """A view holds its box, 1.25 times, between the centres of outer pixels; beyond is black."""
    for box, view in (([10, 20, 40, 100], [[-12.5, 10], [62.5, 110]]),      # 60 x 80, times 1.25
                      ([0, 0, 90, 30], [[-11.25, -60], [101.25, 90]])):
        matrix = pose.affine(*pose.fit_box(box, 256, 192), 256, 192)
        assert np.allclose(pose.move(matrix, np.array(view)), [[0, 0], [191, 255]])
    assert np.isfinite(pose.inverse(pose.affine(*pose.fit_box([5, 5, 5, 5], 64, 48), 64, 48))).all()
    # a clockwise quarter turn brings what is 10 px right of the centre below it, at half the scale
    matrix = pose.affine(np.array([100, 100]), np.array([71, 190]), 96, 72, 90)
    assert np.allclose(pose.move(matrix, np.array([[110.0, 100]])), [[35.5, 52.5]])
    view = lambda image, *box: pose.warp(
        image, pose.affine(*pose.fit_box(box, 64, 48), 64, 48), 64, 48)
    photo = torch.full((3, 400, 400), 255, dtype=torch.uint8)
    edge = view(photo[:, :50, :50], -24, -7, 24, 57)        # with its left half beyond the photo
    assert not edge[:, :, :22].any() and (edge[:, 20:44, 26:40] == 255).all()
    assert (view(photo, 153, 139, 249, 267) == 255).all()
    photo[:, :, ::2] = 0
    assert (view(photo, 0, 0, 400, 400)[:, 24:40, 12:36].float() - 127.5).abs().max() < 32


def test_pose_warp_lands_where_the_joints_say():
    """A dot appears where its joint is mapped to: turned, scaled, and in a mirror."""
    generator, at = np.random.default_rng(0), np.array([130.3, 100.8])
    for extent, degrees in ((60, 0), (60, 30), (20, -80), (150, 45), (500, 10), (900, -25)):
        centre, size = pose.fit(at + generator.uniform(-3, 3, 2), (extent, 1.2 * extent), 96, 72)
        matrix = pose.affine(centre, size, 96, 72, degrees)
        points = generator.uniform(0, 72, (50, 2))
        assert np.allclose(pose.move(matrix, pose.move(pose.inverse(matrix), points)), points)
        crop = pose.warp(dot(at, max(5, extent / 12)), matrix, 96, 72)
        joints = np.tile(pose.move(matrix, at[None]), (17, 1))
        assert crop.shape == (3, 96, 72)
        assert np.abs(centroid(crop) - joints[9]).max() < 0.06, (extent, degrees)
        crop, joints, labelled = pose.mirror(crop, joints, np.arange(17) == 9)  # the left wrist
        assert labelled.nonzero()[0].tolist() == [10]
        assert np.abs(centroid(crop) - joints[10]).max() < 0.06


def test_pose_augmentation_follows_vitpose():
    """The shares and the spread of the random views, and views of half a body."""
    box, keypoints = np.array([100.0, 50, 190, 170]), np.full((17, 3), 2.0)
    keypoints[:, :2] = np.linspace((110, 60), (180, 160), 17)
    def views(count=1500, **how):
        for i in range(count):
            with data.seeded(7, i):
                yield pose.random_view(box, keypoints, 64, 48, **how)
    centre = np.array([v[0] for v in views()])
    for part in (keypoints[:11, :2], keypoints[11:, :2]):                   # upper half, lower half
        assert abs((np.abs(centre - part.mean(0)) < 1e-6).all(1).mean() - 0.15) < 0.03
    centre = np.array([v[0] for v in views(50, upper=None)])                # around the box
    assert (np.abs(centre - [145, 110]) <= 0.2 * np.array([90, 120]) + 1e-9).all()
    sizes = lambda: {v[1][0] for v in views(150, zoom=0)}   # 90 x 120 px; upper, lower half
    assert sizes() == {120 * 1.25 * 0.75, 62.5 * 1.5 * 0.75, 31.25 * 1.5 * 0.75}
    keypoints[13:, 2] = 0                                   # two of the lower half are no view
    assert sizes() == {120 * 1.25 * 0.75, 62.5 * 1.5 * 0.75}
    keypoints[8:, 2] = 0                                    # 8 joints: too few to cut in half
    centre, size, degrees, mirrored = map(np.array, zip(*views()))
    shift, scale = (centre - [145, 110]) / [90, 120], size[:, 0] / pose.fit_box(box, 64, 48)[1][0]
    moved, turned = (shift != 0).any(1), degrees != 0
    for found, share in ((moved, 0.3), (mirrored, 0.5), (turned, 0.6), (scale, 1),
                         ((scale > 0.5) & (scale < 1.5), 0.683),            # a standard deviation
                         (np.abs(degrees[turned]) < 40, 0.683)):
        assert abs(found.mean() - share) < 0.045
    assert 0.19 < np.abs(shift).max() <= 0.2 and abs(shift[moved].mean()) < 0.02
    assert (scale.min(), scale.max(), np.abs(degrees).max()) == (0.5, 1.5, 80)


def test_pose_targets():
    """Height 1 at a joint, between pixels too; no weight without a label or outside the map."""
    joints = torch.tensor([[[31.5, 21.0], [63.0, 0], [-4.0, 9.0], [63.0, 80.0], [10.0, 10.0]]])
    labelled = torch.tensor([[True, True, True, True, False]])
    maps, weight = pose.heatmap_targets(joints, labelled, (64, 64), (16, 16), sigma=2.0)
    assert weight.tolist() == [[1, 1, 0, 0, 0]] and not maps[0, 2:].any()
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    for found, at in zip(maps[0], ((31.5 * 15 / 63, 5), (15, 0))):
        assert_close(found, torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 8), 1e-6)
    joint, one = torch.tensor([[[60.0, 5.0]]]), torch.ones(1, 1)            # right of a narrow map
    assert pose.heatmap_targets(joint, one, (64, 48), (16, 12))[1].item() == 0


def test_pose_decoding():
    """Places between pixels come back; maps without a peak give something inside the map."""
    generator = torch.Generator().manual_seed(0)
    crop, size, at = (256, 192), (64, 48), torch.rand(8, 17, 2, generator=generator)
    joints = at * torch.tensor([191.0, 255.0])
    maps, weight = pose.heatmap_targets(joints, torch.ones(8, 17), crop, size)
    found, score = pose.decode(0.7 * maps, crop)
    error = (found - joints).abs() * torch.tensor([47 / 191, 63 / 255])     # heatmap px
    inner = ((at - 0.5).abs() * torch.tensor([47, 63]) < torch.tensor([19, 27])).all(-1)
    assert weight.all() and 40 < inner.sum() and error[inner].max() < 0.05 and error.max() < 1.5
    assert 0.6 < score.min() and score.max() <= 0.7
    noise, ridge = torch.rand(1, 17, 64, 48, generator=generator), torch.zeros(1, 1, 64, 48)
    for flat in (0 * noise, 0 * noise + 1, -noise, noise):
        found, _ = pose.decode(flat, crop)                  # finite
        assert ((found > -5) & (found < torch.tensor([196.0, 260.0]))).all()
    y, x = torch.meshgrid(torch.arange(64) - 30.3, torch.arange(48) - 20.4, indexing="ij")
    tilted = torch.exp(-(x ** 2 + y ** 2 + 1.2 * x * y) / 8)[None, None]
    ridge[0, 0, 30, 20:30] = 1                              # the first pixel, no wild step
    for maps, place, limit in ((tilted, [20.4, 30.3], 0.02), (ridge, [20, 30], 1.6)):
        found = pose.decode(maps, crop)[0][0, 0] * torch.tensor([47 / 191, 63 / 255])
        assert (found - torch.tensor(place)).abs().max() < limit
    spike = F.pad(torch.ones(1, 1, 1), [20] * 4)
    for sigma, width in ((1, 5), (2, 11), (3, 17)):         # MMPose's kernel for 2 and for 3
        profile = pose.blurred(spike, sigma)[0].sum(0)
        assert (profile > 0).sum() == width and abs(profile.sum() - 1) < 1e-5
        assert abs((profile * (torch.arange(43) - 21.0) ** 2).sum().sqrt() - sigma) < 0.15


def test_heatmap_loss_by_hand():
    """Smooth L1 and its gradient by definition; zero, in the graph, if nobody has a joint."""
    generator = torch.Generator().manual_seed(0)
    a, b = (2 * torch.randn(2, 3, 4, 5, generator=generator) for _ in "ab")
    weight, e = torch.tensor([[1.0, 0, 1], [0, 1, 1]]), a - b
    value = torch.where(e.abs() < 1, e ** 2 / 2, e.abs() - 0.5)
    for w in (weight, 0 * weight):
        share, a = w[..., None, None] / (6 * 20), a.detach().requires_grad_()
        loss = losses.heatmap_loss(a, b, w)
        loss.backward()
        assert_close(loss, (share * value).sum(), 1e-6)
        assert_close(a.grad, share * e.clamp(-1, 1), 1e-6)
    assert losses.heatmap_loss(a.bfloat16(), b, weight).dtype == torch.float32


def pose_net():
    torch.manual_seed(0)
    net = PoseEstimator(TINY)
    torch.nn.init.normal_(net.offsets)
    return net


def test_every_parameter_learns_in_pose():
    """With joints all parameters; without any the loss is finite and gradients are there."""
    net, images = pose_net(), torch.randn(2, 3, 64, 48)
    target, weight = pose.heatmap_targets(60 * torch.rand(2, 17, 2), torch.ones(2, 17), (64, 48),
                                          (32, 24))
    loss = lambda weight: losses.heatmap_loss(net(images, whole(TINY, images)), target, weight)
    assert not without_gradient(net, loss(weight))
    net.zero_grad()
    nothing = loss(0 * weight)
    nothing.backward()
    assert nothing == 0 and all(p.grad.isfinite().all() for p in net.parameters())


def test_pose_heatmaps_are_equation_8():
    """The embedded queries times the 1/4 map, over D; a smaller crop of a batch as alone."""
    net, images = noisy(pose_net()).eval(), torch.randn(2, 3, 64, 48)
    images[1, :, 48:], images[1, :, :, 32:] = 0, 0
    with torch.no_grad():
        small, tokens = images[1:, :, :48, :32], Layout(TINY, torch.tensor([[64, 48], [48, 32]]))
        alone = whole(TINY, small)
        features = net.glid.encode(small, alone)
        queries = (net.glid.decoder.cls + net.offsets)[None]
        x = net.embed(net.glid.decoder(queries, features, alone)[-1])[0]     # [17, D]
        expected = (x[:, None, None] * alone.to_grid(features[0], 0)[0]).mean(-1)
        for found in (net(small, alone)[0], net(images, tokens)[1, :, :24, :16]):
            assert_close(found, expected, 1e-4)


def test_pose_flip_test():
    """By hand: mean of the answer and the mirrored crop's, columns and sides swapped back."""
    maps, mirrored = torch.rand(2, 1, 17, 8, 6)
    other = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    expected = (maps + mirrored[:, other][..., [5, 4, 3, 2, 1, 0]]) / 2
    assert_close(pose.flip_average(maps, mirrored), expected, 1e-6)
    net, state = noisy(pose_net()).eval(), training.Run(torch.device("cpu"))
    args = args_for(finetune_pose, "--batch-size", 2, "--size", 64, 48)
    crops = torch.randint(256, (3, 3, 64, 48), dtype=torch.uint8)
    a, b = (finetune_pose.predict(net, c, args, state) for c in (crops, crops.flip(3)))
    with torch.no_grad():                                   # decoded with the width of the targets
        maps, mirrored = (net(M.normalize(c), whole(TINY, c)) for c in (crops, crops.flip(3)))
    expected, _ = pose.decode(pose.flip_average(maps, mirrored), (64, 48), sigma=1.0)
    assert args.sigma == 1 and np.allclose(a[0], expected, atol=1e-3)
    assert np.allclose(a[1], b[1][:, pose.FLIP], atol=1e-4)                 # mirrored joints
    swapped = np.stack([47 - b[0][..., 0], b[0][..., 1]], -1)[:, pose.FLIP]
    assert (np.abs(a[0] - swapped) < 0.01).mean() > 0.95    # but for ties
    assert finetune_pose.predict(net, crops[:0], args, state)[0].shape == (0, 17, 2)


def test_pose_rescoring_and_doubles():
    """Box score x mean of the sure joints; of two at one place, by mean area, one stays."""
    joint = np.array([[0.9, 0.5, 0.2, 0.1], [0.1, 0.1, 0.0, 0.2]])
    assert np.allclose(pose.rescore(np.array([0.5, 1.0]), joint), [0.35, 0])
    base, areas = np.random.default_rng(0).uniform(0, 100, (17, 2)), np.array([1e4, 3e4, 1e4, 1e4])
    def moved(similarity, area):        # so far that exp(-d^2 / (2 area (2 sigma)^2)) is that
        d = np.sqrt(-2 * area * np.log(similarity)) * 2 * metrics.OKS_SIGMAS
        return np.column_stack([d, 0 * d])
    joints = np.stack([base, base + moved(0.91, 2e4), base - moved(0.89, 1e4), base + 500])
    for *scores, kept in ((0.9, 0.8, 0.95, 0.1, [2, 0, 3]), (0.5, 0.8, 0.2, 0.9, [3, 1, 2]), ([],)):
        n = len(scores)
        assert pose.oks_nms(joints[:n], np.array(scores), areas[:n]).tolist() == kept


def test_pose_samples():
    """Functions of (seed, epoch, index); joints stay on their pixels; crowds teach nothing."""
    class Source(list):
        ids, joints, labels = [41, 42], toyworld.KEYPOINTS, list.__getitem__
        category_ids, classes, records = (1,), ("person",), [dict(size=(200, 260))] * 2
    keypoints = torch.zeros(5, 17, 3)
    keypoints[:, [5, 9]] = torch.tensor([100.0, 80.0, 2.0])
    keypoints[1, :, 2] = 0
    source = Source([dict(
        boxes=torch.tensor([[80.0, 60, 120, 110]] * 4 + [[270, 60, 290, 110]]),     # one outside
        classes=torch.tensor([0, 0, 3, 0, 0]), iscrowd=torch.arange(5) == 3, keypoints=keypoints,
        area=torch.full((5,), 900.0), image=dot((100.5, 80.5)))] * 2)       # centre of a pixel
    train, val = (pose.Pose(source, t, (64, 48), 3) for t in (True, False))
    assert train.people == [(0, 0), (1, 0)] and val.counts == [3, 3] and len(train) == 2
    assert train.upper.tolist() == [True] * 11 + [False] * 6
    photo = val[(0, 1)]
    assert np.allclose(photo["area"][0], 50 * 50 * 4 / 3)  # 40 x 50 px, as 3 to 4, times 1.25
    at = pose.move(photo["back"][0], centroid(photo["images"][0])[None])[0]
    assert np.abs(at - [100, 80]).max() < 0.2               # an answer counts pixels as the truth
    assert photo["id"] == 42 and photo["truth"]["iscrowd"].tolist() == [False, False, True,
                                                                                False]
    assert photo["images"].shape == (3, 3, 64, 48) and photo["truth"]["labels"].tolist() == [0] * 4
    names, places = set(), set()
    for epoch in range(12):
        a, b = train[(epoch, 0)], train[(epoch, 0)]
        assert all(torch.equal(a[k], b[k]) for k in a)
        names.add(tuple(a["labelled"].nonzero()[:, 0].tolist()))
        joint = a["joints"][a["labelled"]][0].numpy()
        places.add(tuple(joint))
        if (joint > 8).all() and (joint < [39, 55]).all():
            assert np.abs(centroid(a["image"]) - joint).max() < 0.3
    assert names == {(5, 9), (6, 10)} and len(places) == 12


def test_pose_detector_boxes():
    """A detector's file gives the crops; what is wrong with it is said in one line."""
    good = {"image_id": 0, "category_id": 0, "bbox": [1, 2, 30, 40], "score": 0.5}
    bad = [7, {"image_id": 0}] + [good | change for change in (
        {"bbox": [1, 2, 3]}, {"bbox": [1, 2, -3, 4]}, {"bbox": [1, 2, 3, -4]}, {"score": math.nan},
        {"score": "high"}, {"score": 10 ** 400}, {"image_id": [0]})]
    with folder() as at:
        path = at / "boxes.json"
        path.write_text(json.dumps([good, good | {"category_id": 3}, good | {"image_id": 9},
                                    good | {"image_id": 2, "score": 1}]))
        found = pose.read_boxes(path, [0, 1, 2], kinds={0})
        assert [b.tolist() for b, _ in found] == [[[1, 2, 31, 42]], [], [[1, 2, 31, 42]]]
        val = pose.open_pose("toyworld:3", (64, 48), boxes=path)[1]
        photos = [val[(0, i)] for i in range(3)]
        assert [p["scores"].tolist() for p in photos] == [[0.5], [], [1]]
        assert val.counts == [1, 0, 1] and len(photos[1]["truth"]["boxes"]) > 0
        assert pose.collate_photos(TINY, photos)[0].shape == (2, 3, 64, 48)
        for text, word in (*((json.dumps([good, b]), "entry 1") for b in bad), ("[", "JSON"),
                           ("[" * 100_000, "JSON"), ("{}", "list"), ("[]", "no person"),
                           (None, "JSON")):
            path.unlink() if text is None else path.write_text(text)
            with raises(InputError, "--boxes", "boxes.json", word):
                pose.read_boxes(path, [0, 1, 2], kinds={0})


def test_pose_recipe():
    """The rate drops at 170 and 200 of 210 epochs; a crop is of whole units."""
    values = [training.multistep(s, 210, finetune_pose.DROPS, 10) for s in range(210)]
    assert np.allclose(values[:6:5], [1e-3, 0.5005]) and values[10] == values[169] == 1
    assert np.allclose(values[170:200], 0.1) and np.allclose(values[200:], 0.01)
    with folder() as at, raises(InputError, "--size 60 48", "16"), quiet():
        finetune_pose.main(args_for(finetune_pose, "--data", "toyworld:2", "--size", 60, 48,
                                    "--out", at))


def test_perfect_heatmaps_score_1():
    """True heatmaps through decoding, photo px, rescoring, doubles and COCO's metric give AP 1; of
    joints that were moved, the merged metric of two processes is that of one."""
    counts = [3, 0, 5, 1, 1, 9, 0, 0, 2]
    args = args_for(finetune_pose, "--workers", 0, "--batch-size", 4)
    for rank, share in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7])):          # every photo once
        lists = batching.share(counts, args, training.Run(torch.device("cpu"), rank, 2))
        assert all(len(x) == 1 or sum(counts[i] for _, i in x) <= 4 for x in lists)
        assert [i for x in lists for _, i in x] == share
    train, val = pose.open_pose("toyworld:16", (128, 96), overfit=True)
    known, parts, generator = {}, [], np.random.default_rng(0)
    for i in range(len(val)):
        photo, truth = val[(0, i)], val.truths[i]["keypoints"]
        joints = torch.from_numpy(pose.move(pose.inverse(photo["back"]), truth[..., :2]))
        maps, inside = pose.heatmap_targets(joints, torch.ones(len(joints), 17), (128, 96),
                                            (64, 48), sigma=1.5)
        truth[..., 2] *= inside.numpy()                     # a joint outside the crop has no peak
        for k, (crop, *found) in enumerate(zip(photo["images"], *pose.decode(maps, (128, 96)))):
            known[crop.numpy().tobytes()] = [*found, 4 * generator.normal(size=(17, 2))]
            sample = train[(0, train.people.index((i, k)))]     # not augmented: the same crop
            assert torch.equal(sample["image"], crop)
            assert torch.allclose(sample["joints"], joints[k].float())
    class Part(training.Run):
        def merged(self, metric):
            parts.append(metric)
            return metric
    def exact(moved, model, crops, args, state, flip):
        found = [known[c.numpy().tobytes()] for c in crops]
        return (np.array([a.numpy() + moved * offset for a, _, offset in found]).reshape(-1, 17, 2),
                np.array([score.numpy() for _, score, _ in found]).reshape(-1, 17))
    for moved, rank, world in ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 2)):
        with patched(finetune_pose, predict=functools.partial(exact, moved)):
            finetune_pose.evaluate(PoseEstimator(TINY), val, args,
                                   Part(torch.device("cpu"), rank, world))
    perfect, one, first, second = parts
    assert len(known) > 10 and perfect.result()["AP"] > 0.999, perfect.result()
    assert len(one.images) == 16 and len(first.images) == len(second.images) == 8
    first.merge(second)
    assert first.result() == one.result() and 0.05 < one.result()["AP"] < 0.999


# -----------------------------------------------------------------------------
# Official formats


SHARED = HERE.parent / "shared" / "data"        # real photos, if somebody put them there
PHOTO = np.zeros((6, 8, 3), np.uint8)
KINDS = (dict(id=7, name="bench", isthing=0), dict(id=30, name="person", isthing=1))


def exported(at, kind, count=3, size=64):
    with quiet():
        for split in ("train", "val"):
            toyexport.export(at, kind, count, size, 0, split)
    return at


def fill(at, contents):
    """Write files: path -> text, bytes, JSON (a dict), pixels, or pixels and PIL's options."""
    for path, content in contents.items():
        (at / path).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, dict) else content
        if isinstance(content, str | bytes):
            (at / path).write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            pixels, how = content if isinstance(content, tuple) else (content, {})
            image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
            image.save(at / path, **how)
    return at


def held(number, **more):
    """PIL's options for a photo whose EXIF says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = number
    return dict(exif=exif, **more)


def coco(at, objects, file="instances", names=2, photos="images/{}", size=(6, 8), kinds=KINDS,
         ids=None, change=None):
    """A JSON and its photos, of which number i has the value 8 i. objects: what is other than in
    the usual one; names: of the photos, or how many; photos: their places; ids: if not numbers."""
    names = [f"{i}.png" for i in range(names)] if isinstance(names, int) else names
    usual = dict(image_id=0, category_id=30, bbox=[1, 1, 4, 3], area=12, iscrowd=0,
                 segmentation=[[1, 1, 5, 1, 5, 4, 1, 4]])
    content = dict(annotations=[usual | dict(id=i + 1) | o for i, o in enumerate(objects)],
                   images=[dict(id=i, file_name=n, height=size[0], width=size[1])
                           for i, n in zip(ids or range(len(names)), names)],
                   categories=list(map(dict, kinds)))
    if change:
        change(content)
    places = photos if isinstance(photos, list) else map(photos.format, names)
    return fill(at, {f"annotations/{file}.json": content}
                | {p: PHOTO + np.uint8(8 * i) for i, p in enumerate(places)})


def little_coco(at, change=None, kind="instances"):
    """Two training photos and one to validate, two objects; the training JSON after a change."""
    ids = PHOTO.copy()
    ids[:3, :, 0], ids[4:, :, 1:] = 5, 1                    # 65792 = 256 + 65536
    for split, count in (("train", 2), ("val", 1)):
        segments = [dict(id=65792, category_id=30), dict(id=5, category_id=7)]
        objects = [dict(image_id=i, file_name=f"{i}.png", segments_info=segments)
                   for i in range(count)] if kind == "panoptic" else [dict(keypoints=[2] * 51)] * 2
        coco(at, objects, f"{kind}_{split}2017", count, f"{split}2017/{{}}",
             change=change if split == "train" else None)
        fill(at, {f"annotations/panoptic_{split}2017/{i}.png": ids for i in range(count)})
    return at


def pairs(at, maps, labels="labels/{}.png"):
    """Photos and label maps, name -> values."""
    for name, values in maps.items():
        label = np.array(values, np.uint8 if np.max(values) < 256 else np.uint16)
        fill(at, {f"images/{name}.png": np.zeros((*label.shape, 3), np.uint8),
                  labels.format(name): label})
    return at


def opened(at, *keys, **how):
    with quiet():
        return formats.open_folder(at, keys, **how)


def refused(at, keys, *words, **how):
    """Assert that opening or reading the folder ends in one line with the words."""
    with raises(InputError, *words):
        for source in opened(at, keys, **how):
            list(source)


def told(script, at, *flags):
    """What a script says of a data set with --check, or the one line with which it refuses it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            flags = "--data", at, "--out", at / "out", "--check", *flags
            launch(script.main, args_for(script, *flags))
        except SystemExit as end:
            assert end.code in (None, 0) or end.code == 2 and said.getvalue().count("error: ") == 1
    assert not (at / "out").exists() and "Traceback" not in said.getvalue(), said.getvalue()
    return said.getvalue()


def test_coco_layout_gives_toyworld_back():
    """Export -> source: boxes, masks, classes, joints, segments exactly as ToyWorld drew them."""
    keys = ["boxes", "classes", "masks", "keypoints", "panoptic", "segments", "semantic"]
    with folder() as at:
        exported(at, "coco")
        parts = (opened(at, *k) for k in (["masks"], ["keypoints"], ["semantic", "panoptic"]))
        for split, objects, poses, segments in zip(("train", "val"), *parts):
            assert objects.classes == toyworld.THINGS and objects.things == segments.things == 7
            assert objects.category_ids == tuple(range(3, 31, 4)) and objects.ids == [0, 1, 2]
            assert segments.classes == toyworld.CLASSES
            assert poses.classes == ("person",) and poses.category_ids == (3,)
            for i, truth in enumerate(drawn.ToyWorld(split, 3, 64, keys=keys)):
                found, pose, panoptic = objects[i], poses[i], segments[i]
                assert (found["image"].float() - truth["image"]).abs().mean() < 8           # JPEG
                person, ids = truth["classes"] == 0, truth["segments"]
                ids = ids[ids[:, 0].argsort()]                          # as np.unique wrote them
                for a, b in ((found["boxes"], truth["boxes"]), (found["classes"], truth["classes"]),
                             (masks_in(found), truth["masks"]), (found["iscrowd"], person & False),
                             (found["area"], truth["masks"].sum((1, 2))),
                             (found["layers"][0] > 0, truth["masks"].any(0)),       # disjoint
                             (pose["keypoints"], truth["keypoints"][person]),
                             (pose["boxes"], truth["boxes"][person]),
                             (poses.labels(i)["keypoints"], pose["keypoints"]),
                             (panoptic["semantic"], truth["semantic"]),
                             (panoptic["segments"][:, 1:], ids[:, 1:]),
                             (ids[panoptic["panoptic"].long() - 1, 0], truth["panoptic"])):
                    assert a.shape == b.shape and (a.as_subclass(torch.Tensor) == b).all()


def test_pairs_give_toyworld_back():
    """The same from the formats of ADE20K and NYU. Larger shares of a folder contain smaller ones,
    and are no prefix: files are sorted by scene."""
    with folder() as at:
        exported(at, "ade20k")
        for names in (None, toyworld.CLASSES):
            fill(at, {"classes.txt": "\n".join(names)} if names else {})
            sources = opened(at, "semantic", first_label=names and 1)   # the names make no ADE20K
            for source, split in zip(sources, ("train", "val")):
                assert source.category_ids == tuple(range(1, 13)) and source.things == 0
                assert source.classes == (names or tuple(map(str, range(1, 13))))
                for i, truth in enumerate(drawn.ToyWorld(split, 3, 64, keys=["semantic"])):
                    assert torch.equal(source.labels(i)["semantic"], truth["semantic"])
    with folder() as at:
        exported(at, "nyu", 12, 16)
        for scale in (1000.0, 500.0):
            for source, split in zip(opened(at, "depth", depth_scale=scale), ("train", "val")):
                for i, truth in enumerate(drawn.ToyWorld(split, 12, 16, keys=["depth"])):
                    depth = source[i]["depth"] * scale / 1000
                    assert (depth - truth["depth"]).abs().max() <= 0.00051
                    assert ((depth == 0) == (truth["depth"] == 0)).all()
        parts = [data.open_depth(at, 16, 16, f)[0].source.ids for f in (0.01, 0.25, 0.5, 1.0)]
        assert [len(p) for p in parts] == [1, 3, 6, 12] and parts == [sorted(p) for p in parts]
        assert all(set(a) < set(b) for a, b in itertools.pairwise(parts))
        assert parts[2] != parts[3][:6]
        # the Kinect's border goes in training, from NYU's photos of its size only
        for height, width, crop in ((480, 640, (427, 565)), (480, 600, (480, 600))):
            ramp = np.arange(height * width).reshape(height, width) % 60000
            fill(at, {"train/rgb_00000.jpg": np.zeros((height, width, 3), np.uint8),
                      "train/sync_depth_00000.png": ramp.astype(np.uint16)})
            train, val = data.open_depth(at, 1000, 1000)[0], data.open_depth(at, 9, 9, overfit=1)[1]
            train.transform = data.v2.Identity()
            depth, corner = train[0, 0]["depth"], ramp[(45, 43) if width == 640 else (0, 0)]
            assert depth.shape == crop and abs(depth[0, 0] * 1000 - corner) < 1e-2
            assert val[0, 0]["depth"].shape == (height, width)


def test_masks_are_drawn_as_the_official_tool_does():
    """Outlines by hand, and pixel counts and strings as pycocotools gives them."""
    drawn, runs = cocomask.from_polygon, cocomask.from_runs
    official = ("T52V12O1N2N2N1O2N2N2O0O1O1O1O1O1O1O100O1O1O1O1O1O100O1O1ON2N2O1N2N3M2O1N2N2O1N2N2"
                "N3N1N2N`3")
    large = drawn([3.3, 4.1, 47.2, 9.9, 30.5, 38.8, 12, 20.2], 40, 50)
    assert large.sum() == 751 and (runs(official, 40, 50) == large).all()
    for mask, rows in (
            (drawn([1, 1, 5, 1, 5, 4, 1, 4], 6, 8),
             "00000000 01111000 01111000 01111000 00000000 00000000"),
            (drawn([0.5, 0.5, 7.5, 3, 2, 5.5], 6, 8),
             "00000000 01100000 01111100 01111100 00110000 00000000"),
            (drawn([-3, -2, 10, 2, 3, 9], 5, 7), "1111100 1111111 1111111 1111111 0111111"),
            (runs([1, 2, 3], 3, 2), "00 10 10"), (runs(b"0220", 2, 3), "101 101"),
            (cocomask.mask([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]], 4, 4),
             "1100 1110 0110 0000")):                       # a union, no xor
        assert " ".join("".join("01"[v] for v in row) for row in mask.tolist()) == rows


def test_broken_coco_files_are_named():
    """Each of these files ends in one line with its name, before it fills the memory."""
    nan, four, note, kind = math.nan, "list of 4 numbers", ("annotations", 0), ("categories", 0)
    runs = lambda counts, *size: dict(counts=counts, size=size or (6, 8))
    segments = lambda *ids: [dict(id=i, category_id=7) for i in ids]
    cases = {           # place in the JSON -> key -> values (no such key is None) and the words
        "instances masks": {
            note: dict(
                bbox=[([1, nan, 2, 2], "nan"), (["one", 1, 2, 2], four), ([1, 1, 2], four),
                      ([1, 1, 2, math.inf], "finite"), ([1, 1, -2, 2], "negative"), ({}, four),
                      ([1, 1, 2, -2], "negative"), ([-1e30, 0, 2, 5], "annotation 1"), None],
                image_id=[(99, "image 99"), None], iscrowd=[(2, "iscrowd")],
                category_id=[(8, "category 8"), ("x30", "'x30' is no whole number"), None],
                area=[(-1, "area"), ("big", "numbers")], segments_info=[([], "segment")],
                segmentation=[
                    None, ([], "only a box"), ([[1, 1, 3, 3]], "three points"),
                    ([[1, 1, 3, 3, 2, 2, 1]], "three points"), ([[1, 1, "b", 3, 2, 2]], "list of"),
                    ([[1, 1, 3, 3, 2, nan]], "finite"), ([[1, 1, 1e9, 1, 5, 4]], "annotation 1"),
                    (runs([3, 4]), "fill"), (runs([3, -4, 49]), "fill"), (runs("04020"), "fill"),
                    (runs([3.5, 44.5]), "fill"), (runs([2 ** 62] * 4 + [48]), "fill"),
                    (runs("\x01\x02"), "compressed"), (runs([3, 45], 8, 6), "size")]),
            ("images", 0): dict(height=[(10 ** 6, "0.png: the photo has 6 x 8"), None]),
            ("images", 1): dict(id=[(0, "images have this id")], width=[(0, "height and width")],
                                file_name=[("gone.png", "photo gone.png is not in"), None,
                                           (5000 * "n", "too long for a file's name")]),
            kind: dict(id=[(30, "categories have the same id"), ("seven", "whole number")],
                       name=[None]),
            (): dict(categories=[([], "no category")], images=[("", '"images"')],
                     annotations=[({"1": 2}, "annotations"), ([1, 2], "annotations")])},
        "person_keypoints keypoints": {
            note: dict(keypoints=[([1, 2, 2], "51 numbers"), ([1, 2, 3] * 17, "flag"),
                                  ([1e300, 2, 2] * 17, "annotation 1")]),
            ("categories", 1): dict(name=[("dog", "joints")],
                                    keypoints=[(["i", "I"], "same name")]),
            kind: dict(id=[None])},
        "panoptic panoptic": {
            (*note, "segments_info", 0): dict(
                id=[(6, "is drawn"), (0, "segment id 0"), ("five", "segment id"), (5, "same id")],
                category_id=[(8, "category 8")], iscrowd=[("no", "iscrowd")]),
            note: dict(segments_info=[None, (segments(5), "65792 is drawn")],
                       image_id=[(1, "has two"), (9, "not listed")],
                       file_name=[("gone.png", "gone.png is not there"), None]),
            (): dict(annotations=[([], "no annotation")]),
            kind: dict(isthing=[("yes", "isthing"), None])}}
    def change(place, key, value, content):
        content = functools.reduce(lambda found, step: found[step], place, content)
        content[key] = value
        if value is None:
            del content[key]
    for how, table in cases.items():
        rows = [(place, key, row) for place, keys in table.items() for key in keys
                for row in keys[key]]
        kind, keys = how.split()
        for place, key, row in rows:
            value, words = row or (None, f"no {key}" if key == "segments_info" else f"no '{key}'")
            with folder() as at:
                little_coco(at, functools.partial(change, place, key, value), kind)
                refused(at, keys, words, "train2017")
    with folder() as at:
        little_coco(at)
        for text in ("", "{", "[]", "3", "\0\xff", "[" * 100_000):
            fill(at, {"annotations/instances_train2017.json": text})
            refused(at, "boxes", "instances_train2017.json")
        little_coco(at, lambda c: c["categories"][1].update(name="people"))
        refused(at, "boxes", "val2017.json", "category 30")
        little_coco(at, lambda c: c["annotations"][0]["segments_info"].append(
            dict(id=9, category_id=7, iscrowd=1)), "panoptic")
        sample = opened(at, "panoptic", "semantic")[0][0]
        assert sample["segments"].tolist() == [[1, 0, 0], [2, 1, 0], [3, 1, 1]]     # bench is last
        assert data.find_objects("panoptic", sample, 1)[0].tolist() == [0, 1]       # 9 is not drawn
        assert sample["panoptic"][:, 0].tolist() == [2, 2, 2, 0, 1, 1]
        assert sample["semantic"][:, 0].tolist() == [1, 1, 1, 255, 0, 0]
        for pixels in (PHOTO[..., 0], PHOTO[:, :7]):
            fill(at, {"annotations/panoptic_train2017/0.png": pixels})
            refused(at, "panoptic", "panoptic_train2017")
        for path in at.glob("annotations/*.json"):
            path.write_text(path.read_text().replace('"isthing": 1', '"isthing": 0'))
        with raises(InputError, "--tasks instance"):
            data.open_segmentation(at, 16, tasks=["panoptic", "instance"])


def png(height, width, bits, colour, rows=b""):
    """A PNG of any header: PIL cannot write grey ones of 2 and 4 bits."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in
        ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))


def test_label_maps_of_few_bits():
    """Grey PNGs of 1, 2, 4 and 8 bits, named *.PNG, in a linked folder, hold what they say."""
    with folder() as at:
        for bits in (1, 2, 4, 8):
            truth, name = np.arange(12).reshape(3, 4) % 2 ** bits, f"elsewhere/{bits}.PNG"
            digits = truth[..., None] >> np.arange(bits)[::-1] & 1                  # [3, 4, bits]
            rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
            fill(at, {name: png(3, 4, bits, 0, rows), f"images/train/a/{bits}.png": PHOTO[:3, :4]})
            assert (files.read_labels(at / name) == truth).all(), bits
        fill(at, {"annotations/train/a.txt": "0 .5 .5 .1 .1"})          # YOLO's boxes are no maps
        (at / "labels/train").mkdir(parents=True)
        (at / "labels/train/a").symlink_to(at / "elsewhere")
        parts = opened(at, "semantic", first_label=0)
        assert [len(list(source)) for source in parts] == [3, 1]
        fill(at, {"classes.txt": "\n".join(map(str, range(256)))})
        refused(at, "semantic", "256 classes")


def test_orientations():
    """Every EXIF orientation in every kind of file, against PIL's own; odd tags turn nothing, and
    a broken EXIF spoils no photo."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x01\x06\0\0\0\0\0\0\0"
    with folder() as at:
        photos = {f"{number}.{suffix}": (pixels, held(number, lossless=True))
                  for suffix in ("png", "tif", "webp") for number in range(1, 11)}
        photos |= {"odd.jpg": (pixels, dict(exif=odd)),
                   "broken.jpg": (pixels, dict(exif=b"Exif\0\0" + bytes(16), dpi=(72, 72)))}
        for path in fill(at, photos).iterdir():
            with Image.open(path) as image:                 # PIL trusts no tag of a wrong type
                upright = ImageOps.exif_transpose(image) if path.stem.isdigit() else image
                upright = np.asarray(upright.convert("RGB"))
            photo, view = files.read_view(path, lambda h, w: (1, 2, h - 3, w - 5), 35)
            assert view == (1, 2, upright.shape[0] - 3, upright.shape[1] - 5), path
            assert torch.equal(photo, files.read_image(path))
            assert (photo.permute(1, 2, 0).numpy() == upright).all(), path
        whole = (fill(at, {"hole.png": pixels}) / "hole.png").read_bytes()
        (at / "hole.png").write_bytes(whole[:999] + bytes(500) + whole[1499:])
        for read in files.read_image, lambda p: files.read_view(p, lambda h, w: (0, 0, h, w), 35):
            with raises(InputError, "hole.png", "replace"):
                read(at / "hole.png")


def test_few_pngs_are_decoded_to_look_for_exif():
    """PIL decodes a PNG without EXIF in front of its pixels: 20 of a data set will do."""
    with folder() as at:
        path, looked = fill(at, {"0.png": PHOTO}) / "0.png", []
        source = files.Source([dict(photo=path, size=PHOTO.shape[:2])] * 50, None)
        with patched(files, orientation=lambda image: looked.append(image) or 1):
            assert source.upright() and len(set(map(id, looked))) == 20


def test_orientations_that_cannot_be_seen():
    """Photos on the side tell of those upside down whether labels were turned."""
    pixels = PHOTO.copy()
    pixels[:2, :3] = 255                                    # the bright corner is labelled
    for turned in (True, False):
        with folder() as at:
            for n, number in (("train/0", 3), ("train/1", 3), ("train/2", 1), ("val/0", 6),
                              ("val/1", 3)):
                fill(at, {f"images/{n}.png": (pixels, held(number))})
                with Image.open(at / f"images/{n}.png") as photo:
                    seen = np.array(ImageOps.exif_transpose(photo) if turned else photo)
                fill(at, {f"labels/{n}.png": np.uint8(seen[..., 0] > 99)})
            train, val = opened(at, "semantic")
            for sample in (*val.subset([1, 0]), *train):
                assert torch.equal(sample["image"][0] > 99, sample["semantic"].bool()), turned


def test_any_photo_is_read_right_or_named():
    """Photos of a COCO folder in every odd coding; EXIF decided by the size that the JSON says."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    grey, side, jpeg = rgb[..., 0], np.ascontiguousarray(rgb.transpose(1, 0, 2)), io.BytesIO()
    Image.fromarray(rgb).resize((64, 64)).save(jpeg, "jpeg")
    image, exif, bomb = Image.fromarray(rgb), held(6, format="png"), png(20_000, 20_000, 8, 2)
    with folder() as at:
        path = little_coco(at) / "train2017/0.png"
        for photo, expected in (
                ((image.convert("CMYK"), dict(format="jpeg")), None),
                (image.convert("RGBA").quantize(9), None), (grey > 99, 255 * (grey > 99)),
                (Image.fromarray(grey).convert("LA"), grey),
                (grey.astype(np.uint16) * 257, grey), ((rgb, exif), rgb),
                ((side, exif), np.rot90(side, -1))):
            found = opened(fill(at, {path: photo}), "boxes")[0][0]["image"].permute(1, 2, 0)
            assert found.shape == (6, 8, 3)
            assert expected is None or (found.numpy() == expected.reshape(6, 8, -1)).all()
        for photo in (jpeg.getvalue()[:400], b"", b"not a photo", bomb, bomb[:20], rgb[:5]):
            refused(fill(at, {path: photo}), "boxes", str(path), "5 x 8" * (photo is rgb[:5]))
        (at / "half.jpg").write_bytes(jpeg.getvalue()[:-300])
        for thing in (Image.open(at / "half.jpg"), rgb[None], rgb.astype(">u2"), "no.png", 7):
            with raises(InputError):
                files.as_photo(thing)
        path.unlink()
        path.mkdir()
        refused(at, "boxes", str(path))
    for size in ((1, 1), (1, 20_000), (20_000, 390), (20_000, 500)):
        with folder() as at:
            coco(at, [dict(bbox=[0, 0, 2, 2], image_id=i) for i in (0, 1)], size=size, photos=[])
            fill(at, {f"{i}.png": np.zeros(size, bool) for i in (0, 1)})
            if max(size) > 50 * min(size):
                refused(at, "boxes", ".png", "side")
            else:
                train, val = data.open_detection(at, 64, overfit=True)
                assert min(train[0, 0]["image"].shape) > 0 and val[0, 0]["original"] == size


def test_odd_coco_files_are_read_right():
    """What is strange but not wrong: boxes and polygons beyond the border, crowds; numbers as texts
    and floats, nulls, one id for all, polygons alone, in pairs, empty; ids that are texts."""
    crowd = dict(image_id=1, bbox=[0, 0, 2, 2], area=4, iscrowd=1,
                 segmentation=dict(counts=[0, 2, 46], size=[6, 8]))
    objects = [dict(bbox=[-2.5, 1, 3, 0], area=None, segmentation=[[-9, -9, 3, -9, 3, 2, -9, 2]]),
               dict(bbox=[6, 4, 9, 9], area=0, segmentation=[[20, 20, 30, 20, 30, 30]]), crowd]
    with folder() as at:
        coco(at, objects, "instances_train", photos="train/{}")
        coco(at, [{}], "instances_val", 1, photos="val/{}")
        sample, empty = opened(at, "boxes")[0]
        assert sample["boxes"][0].tolist() == [-2.5, 1, 0.5, 1] and not sample["area"].any()
        assert len(empty["boxes"]) == 1 and empty["iscrowd"].all()
        (sample,), _ = opened(at, "masks")                  # a photo of crowds teaches no mask
        assert masks_in(sample).sum((1, 2)).tolist() == [6, 0]
        train, val = data.open_detection(at, 32, overfit=True)
        assert [len(train[0, i]["labels"]) for i in (0, 1)] == [1, 0]
        assert_close(train[0, 0]["boxes"], torch.tensor([[7 / 8, 5 / 6, 2 / 8, 2 / 6]]), 1e-6)
        assert val[0, 0]["boxes"][1].tolist() == [6, 4, 15, 13]
        train, _ = data.open_segmentation(at, 32, tasks=["instance"], overfit=True)
        assert train[0, 0]["masks"].flatten(1).any(1).tolist() == [True] and train.things == 2
        assert train.classes == ("bench", "person")
    square, odd = [[1, 1], [5, 1], [5, 4], [1, 4]], ["1_11", "11_1", "1e2", "1.3"]
    for ids, images, change in (
            (range(4), range(4), dict(id=0)), (range(4), range(4), dict(area=None, iscrowd=None)),
            (range(4), "0123", dict(category_id="30", bbox=["1", 1.0, "4", 3])), (odd, odd, {}),
            (range(4), [0.0, 1.0, 2.0, 3.0], dict(iscrowd=0.0)), ("0123", range(4), {}),
            (range(4), range(4), dict(segmentation=sum(square, []))),
            (range(4), range(4), dict(segmentation=square)),
            (range(4), range(4), dict(segmentation=[[], sum(square, [])]))):
        with folder() as at:
            coco(at, [dict(image_id=i) | change for i in images], names=4, ids=ids)
            train, val = opened(at, "masks")
            assert val.ids + train.ids == (odd if ids is odd else [0, 1, 2, 3])
            for sample in (*train, *val):
                assert sample["boxes"].tolist() == [[1, 1, 5, 4]] and sample["area"] == 12
                assert masks_in(sample).sum() == 12
    with folder() as at:                                    # without a box a polygon has its own
        coco(at, [dict(image_id=i, bbox=[0, 0, 0, 0]) for i in (0, 1)])
        for sample in (*opened(at, "masks")[0], *opened(at, "masks")[1]):
            assert sample["boxes"].tolist() == [[1, 1, 5, 4]] and masks_in(sample).sum() == 12


def test_no_photo_stands_in_for_another():
    """Names as tools write them are found, but never another photo of that name."""
    both, raw = ["0.png", "1.png"], [f"raw/{s}/{i}.png" for s in "ab" for i in (0, 1)]
    images, three = ["images/0.png", "images/1.png"], both + ["2.png"]
    local = "/data/local-files/?d="
    for names, places, *words in (
            (both, ["elsewhere/0.png", "elsewhere/1.png"]), (raw, raw), ([n[4:] for n in raw], raw),
            ([local + n for n in raw], raw), (["C:\\\\old\\\\" + n[4:] for n in raw], raw),
            (["C:\\photos\\0.png", "C:\\photos\\1.png"], images), (both + images, images * 2),
            (["x/" + n for n in both], ["elsewhere/0.png", "elsewhere/1.png"]),     # is told
            ([local + "set/my%20photo%20a.png", "..\\label\\b.png", "U\u0308.png"],
             ["images/my photo a.png", "images/b.png", "images/sub/Ü.PNG"]),
            (both, ["test/0.png", "test/1.png"]),           # the other part's, if nowhere else
            (both, [*images, "test/0.png", "test/1.png"]), (both, [*both, "train/0.png"]), # told
            (["ROOT/a/0.png", "ROOT/b/0.png"], ["a/0.png", "b/0.png"]),
            (three, ["train/0.png", "train/1.png", "val/2.png"]),           # one file for all
            (three, [*images, "masks/2.png"], "no such file"),
            (["A/" + n for n in three], ["A/0.png", "A/1.png", "B/2.png"], "no such file"),
            (["C:\\0.png", "C:\\a\\0.png"], images, "which another entry has"),
            (["old/b/0.png", "old/a/0.png"], ["a/0.png", "a/1.png"], "b/0.png", "a/0.png"),
            (both, ["x/0.png", "x/1.png", "y/0.png", "y/1.png"], "x/0.png or y/0.png")):
        with folder() as at:
            coco(at, [dict(image_id=i) for i in range(len(names))], photos=places,
                 names=[n.replace("ROOT", str(at)) for n in names])
            if words:
                refused(at, "boxes", "annotations/instances.json", *words)
            else:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    parts = formats.open_folder(at, ["boxes"])
                found = {r["id"]: r["photo"] for s in parts for r in s.records}
                assert ("than it names" in said.getvalue()) == (names[0][:2] == "x/"), names
                assert ("these names, too" in said.getvalue()) == (len(names) < len(places)), names
                assert [found[i] for i in range(len(names))] == [
                    at / p for p in places[:len(names)]], names
    with folder() as at:                                    # an own folder goes before a test part
        for part in ("train", "val"):
            coco(at, [{}], f"instances_{part}", 1, f"images/{part}/{{}}")
        fill(at, {"test/0.png": PHOTO, "train.png": PHOTO})
        assert [s.records[0]["photo"] for s in opened(at, "boxes")] == [
            at / "images/train/0.png", at / "images/val/0.png"]


def test_grading_needs_no_training_photos():
    """With --eval a validation part alone will do, in each format; training is refused without the
    other part."""
    label = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2
    for key, fill_in in (
            ("boxes", lambda at: coco(at, [dict(image_id=i) for i in range(3)], "instances_val", 3,
                                      photos="val/{}")),
            ("keypoints", lambda at: coco(at, [dict(keypoints=[2] * 51)] * 2,
                                          "person_keypoints_val2017", photos="val2017/{}")),
            ("semantic", lambda at: fill(at, {
                f"{p}/val/{i}.png": v for p, v in (("images", PHOTO), ("labels", label))
                for i in range(3)})),
            ("depth", lambda at: fill(at, {
                f"{p}/val/{i}.png": v for i in range(3) for p, v in (
                    ("rgb", PHOTO), ("depth", label.astype(np.uint16) * 1000 + 500))})),
            ("depth", lambda at: fill(at, {f"{i}.png": PHOTO for i in range(3)} | {
                f"d{i}.png": label.astype(np.uint16) * 1000 + 500 for i in range(3)} | {
                "nyudepthv2_test_files_with_gt.txt": "\n".join(
                    f"{i}.png d{i}.png 518.8" for i in range(3))})),
            ("masks", lambda at: coco(at, [{}], "instances_val", 3, photos="val/{}"))):
        with folder() as at:
            fill_in(at)
            refused(at, key, "nothing in it fits" if key in ("semantic", "depth") else "val")
            train, val = opened(at, key, grading=True)
            assert val is train and len(val) == len(list(val)) == 3 - (key == "keypoints")
    with folder() as at, quiet():                           # the whole way, all three are graded
        coco(at, [dict(image_id=i) for i in range(3)], "instances_train", 3, photos="train/{}")
        flags = ["--data", at, "--workers", 0, "--batch-size", 2, "--size", 32, "--out", at / "o"]
        finetune_det.main(args_for(finetune_det, *flags, "--steps", 1))
        (at / "annotations/instances_train.json").rename(at / "annotations/instances_val.json")
        (at / "train").rename(at / "val")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            finetune_det.main(args_for(finetune_det, *flags, "--eval"))
        assert "of 3 images" in said.getvalue() and "both parts" not in said.getvalue()


def test_a_class_of_photos_may_be_called_train():
    with folder() as at, contextlib.redirect_stderr(io.StringIO()) as said:
        for name in ("bus", "train", "truck"):
            write_photo(at / f"veh/{name}/1.png", (32, 32))
        assert formats.photo_folders(at / "veh") == [at / "veh/train", None]
        assert "train alone is read, without bus, truck" in said.getvalue()
        write_photo(at / "own/train/1.png", (32, 32))       # our pictures are not passed over
        write_photo(at / "own/out/samples/1.png", (32, 32))
        assert formats.photo_folders(at / "own", at / "own/out/samples")[0]
        write_photo(at / "veh/val/1.png", (32, 32))         # now it is a part
        assert formats.photo_folders(at / "veh") == [at / "veh/train", at / "veh/val"]
    assert said.getvalue().count("note") == 1


def test_epochs_given_go_before_steps_of_the_preset():
    for flags, steps in (([], 1300), (["--epochs", 3], None), (["--steps", 9], 9),
                         (["--epochs", 3, "--steps", 9], 9)):
        words = ["--preset", "tiny", *map(str, flags)]
        assert training.parse(finetune_det.flags(), finetune_det.PRESETS, words).steps == steps


def test_panoptic_classes_beyond_the_palette_are_drawn():
    """Of 300 classes the later ones have the colours of the first, as in the other tasks."""
    photo, ids = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.int32)
    first, later = (draw.panoptic(photo, ids, {1: k}, ["x"] * 300, 0) for k in (44, 44 + 255))
    assert np.array_equal(first, later) and np.asarray(first).any()


def test_samples_of_large_photos_are_small():
    large, small = (Image.new("RGB", size, "red") for size in ((4000, 3000), (320, 200)))
    assert draw.sample([large] * 3).size == (640 * 3, 480)
    assert draw.sample([large.rotate(90, expand=True)] * 2).size == (960, 640)
    assert draw.sample([small] * 3).size == (960, 200)


def test_parts_of_coco_files():
    """Names and folders say the part; else every 20th photo with an object validates."""
    held_out, two = ([1, 2], [0]), ([0, 1, 2], [0, 1, 2])
    one_each = [dict(image_id=i) for i in range(3)]
    for where, objects, *found in (
            (["annotations_validated"], one_each, *held_out), (["../result"], one_each, *held_out),
            (["instances_trainval"], one_each, *held_out),
            (["instances_minitrain", "instances_testdev"], one_each, *two),
            ([f"../{p}/_annotations.coco" for p in ("train", "valid", "test")], one_each, *two),
            (["train2014", "train2017"], one_each, "train2014.json", "train2017.json"),
            (["instances_val"], one_each, "without a training part"),
            (["a"], one_each[1:], [0, 2], [1]), (["a"], one_each[1:2], "only one photo"),
            (["a"], [*one_each[:1], dict(image_id=1, iscrowd=1)], "only one photo"),
            (["a"], [], "no object", "training")):
        with folder() as at:
            fill(at, {"annotations/._instances_train.json": "\0"})      # of a Mac
            for name in where:
                coco(at, objects, name, names=3)
            if type(found[0]) is str:
                refused(at, "boxes", *found)
            else:
                assert [s.ids for s in opened(at, "boxes")] == found, where
    for photos in ("train/{}", "test/{}"):                  # where those of both parts lie
        with folder() as at:
            for part in ("train", "val"):
                coco(at, one_each, f"instances_{part}", 3, photos)
            assert [s.ids for s in opened(at, "boxes")] == [*two]
    with folder() as at:
        coco(little_coco(at), [], "instances_val2017", photos="val2017/{}")
        refused(at, "boxes", "no object", "validation")
    with folder() as at:                                    # JSON of other things is no COCO
        little_coco(at, kind="panoptic")
        fill(at, {f"annotations/{n}.json": "{}" for n in ("imgCatIds", "train", "1")})
        assert "panoptic" in opened(at, "masks")[0][0]
    with folder() as at:                                    # Roboflow's files have one name
        for part in ("train", "valid", "test"):
            coco(at, one_each, f"../{part}/_annotations.coco", 3, f"{part}/{{}}")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            formats.open_folder(at, ["boxes"])
        assert "is not used; train/_annotations.coco.json and valid/_annotations.coco.json are" in \
            said.getvalue(), said.getvalue()
        refused(at, "semantic", "nothing in it fits", "--tasks instance")
    train, val = files.hold_out("", files.Source([dict(id=i) for i in range(41)], None))
    assert val.ids == [0, 20, 40] and sorted(train.ids + val.ids) == list(range(41))


def test_label_values():
    """Which values are classes: those of both parts, of the names, 0 and 255 alone; which none."""
    grid = lambda text: np.array(text.split(), int).reshape(2, 2)
    one, other, void, mixed = "0 255 255 0", "255 255 255 0", "255 255 255 255", "0 3 255 1"
    many, binary = 30 * "0 0 0 0," + one, ("0 1 1 0", "1 1 1 0")
    for train, val, names, how, *found in (
            ("0 10 300 255", "10 7 0 255", "", {}, "0 2 3 255", "2 1 0 255"),
            (one, other, "", {}, *binary), (many, other, "", {}, *binary),
            (one, other, "grass road", {}, *binary), (one, other, "a b c", {}, one, other),
            (many, other, "grass road", dict(ignore_label=255), one, other),
            (many, "1 1 1 1", "grass road", {}, one, "1 1 1 1"),
            (one, other, "a " * 255, dict(first_label=1), void, void),
            (mixed, mixed, "", {}, "0 2 255 1", "0 2 255 1"),
            (mixed, mixed, "", dict(ignore_label=3), "0 255 255 1", "0 255 255 1"),
            (mixed, mixed, "", dict(first_label=1), "255 1 255 0", "255 1 255 0")):
        with folder() as at:
            maps = {f"train/{i}": grid(text) for i, text in enumerate(train.split(","))}
            place = list(maps)[-1]
            pairs(at, maps | {"val/a": grid(val)})
            fill(at, {"classes.txt": "\n".join(names.split()) + "\n\n"} if names else {})
            parts = opened(at, "semantic", **how)
            labels = [part[part.ids.index(i)]["semantic"].numpy()
                      for part, i in zip(parts, (place.split("/")[1], "a"))]
            for label, value, expected in zip(labels, (maps[place], grid(val)), found):
                assert (label == grid(expected)).all()
                known = label < 255
                assert (np.array(parts[0].category_ids)[label[known]] == value[known]).all()
            assert names or parts[0].classes == tuple(map(str, parts[0].category_ids))
    for flag in ("--first-label 99999999999", "--depth-scale 1e-300"):
        with quiet(), raises(SystemExit, "2"):
            args_for(finetune_seg if "label" in flag else finetune_depth, *flag.split())


def test_what_is_told_of_label_maps():
    """The shares of the classes; and what is refused because it surely is not meant."""
    y, x = np.mgrid[:384, :512]
    disc = Image.fromarray(255 * np.uint8((y - 192) ** 2 + (x - 256) ** 2 < 14400))
    smooth, little = disc.resize((64, 48), Image.BICUBIC), Image.new("L", (640, 480))
    little.paste(smooth.resize((24, 18), Image.BICUBIC), (8, 8))            # covers little
    thin = Image.new("L", (800, 600))                       # vessels: more edge than inside
    for k in range(12):
        ImageDraw.Draw(thin).line((0, 50 * k, 799, 40 * k + 60), 255, 1 + k % 3)
    thin = thin.resize((640, 480), Image.BILINEAR)
    one, mixed = np.array([[1, 0], [0, 0]]), [[0, 3], [255, 1]]
    two = ("2 classes", "75.0%", "25.0%", "no class 0.0%")
    for labels, names, flags, *words in (
            (255 * one, "", "", *two), (one, "", "", *two),
            (255 * one, "background polyp", "", "polyp 25.0%", "no class 0.0%"),
            (one, "\ufeffbackground polyp", "", ", background 75.0%, polyp 25.0%"),
            (2 * one, "car person", "--first-label 1", "none of car", "person 25.0%",
             "no class 75.0%"),
            (2 * one, "car person", "", "error", "--first-label 1", '"background"'),
            (one, "polyp", "", "error", "one class", '"background" the first'),
            (255 * one, "polyp", "", "error", "one class", '"background" the first'),
            ((255 * one, one), "", "", "error", "0 and 255", "the same"),
            (mixed, "", "--first-label 1 --ignore-label 3", "one class alone (1)", "--first-label"),
            (mixed, "sky sea", "", "labels/train/0.png", "label 3", "--ignore-label"),
            (one, "a b", "--first-label 65535", "--first-label 65535"),
            ([[255, 255]], "", "", "no label"), (smooth, "", "", "error", "interpolation"),
            (little, "", "", "error", "interpolation"), (thin, "", "", "error", "interpolation"),
            (one, "a\n\nb", "", "classes.txt: line 2 is empty")):
        with folder() as at:
            both = labels if isinstance(labels, tuple) else (labels, labels)
            pairs(at, {f"{p}/{i}": x for p, x in zip(("train", "val"), both) for i in range(3)})
            fill(at, {"classes.txt": names.replace(" ", "\n")} if names else {})
            said = told(finetune_seg, at, *flags.split())
            assert all(w in said for w in words), (words, said)
    for parts, place, words in (("training validation", "annotations/{}.png", "2 classes"),
                                ("street", "masks/{}.png", "2 training and 1 val"),
                                ("train val", "masks/{}.jpg", "JPEG changes the values")):
        with folder() as at:
            pairs(at, {f"{p}/{i}": one for p in parts.split() for i in range(3)}, place)
            assert words in told(finetune_seg, at)


def test_mask_folders():
    """Formats of photos and label maps, and what is wrong with a file."""
    ones, place = np.ones((6, 8), np.uint8), "train/labels/b.png"
    palette = Image.fromarray(ones, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    for changes, *words in (
            ({"test/images/c.png": PHOTO},),                # a test part may have no labels
            ({place: palette},), ({place: ones.astype(np.uint16)},),        # the index; 16 bits
            ({"val/images/a.png": PHOTO}, "val/images", "expected", "labels"),
            ({"val/images/a.png": PHOTO, "test/labels/a.png": ones},        # nor are these its
             "val/images", "expected", "labels"),
            ({place: b""}, "not a readable"), ({"train/images/c.png": PHOTO}, "train/images/c.png"),
            ({place: PHOTO}, "b.png", "one channel"), ({place: ones[:5]}, "images/b.jpg", "5 x 8"),
            ({place: (ones.astype(np.int32) + 65535, dict(format="tiff"))}, "b.png", "65535"),
            ({"train/labels/orphan.png": ones}, "orphan.png"),
            ({"train/images/a.jpg": PHOTO}, "two photos")):
        with folder() as at:
            fill(at, {"train/images/a.png": PHOTO, "train/labels/a.png": 2 * ones,
                      "train/images/b.jpg": PHOTO, place: ones} | changes)
            if words:
                refused(at, "semantic", *words)
            else:
                (train,), (val,) = opened(at, "semantic")                   # one is held out
                assert (train["semantic"] == 0).all() and (val["semantic"] == 1).all()
    with folder() as at, quiet():                           # no pixel to grade
        for split, labels in (("train", ones + 1), ("val", 0 * ones)):
            fill(at, {f"images/{split}/a.png": PHOTO, f"labels/{split}/a.png": labels})
        fill(at, {"classes.txt": "a\nb\n"})
        with raises(InputError, "--first-label"):
            finetune_seg.main(args_for(finetune_seg, "--data", at, "--steps", 1, "--workers", 0,
                                       "--first-label", 1, "--batch-size", 1, "--out", at / "o"))
    with folder() as at:                                    # a part that is a link to the other
        fill(at, {f"train/{n}.png": x for n, x in (("images/a", PHOTO), ("labels/a", ones))})
        (at / "val").symlink_to(at / "train")
        fill(at, {"classes.txt": "a\nb\nc\n"})
        assert "1 photos are in both parts" in told(finetune_seg, at)
    with folder() as at:                                    # an accent as one letter and as two
        fill(at, {f"images/{n}.png": PHOTO for n in ("\u00fc", "b")})
        fill(at, {"labels/u\u0308.png": ones, "labels/b.png": 2 * ones, "labels/note.json": "{}"})
        assert sum(len(source) for source in opened(at, "semantic")) == 2


def test_ade20k():
    """0 is unlabelled; instances lie over stuff; things without an instance are void."""
    label, colours = np.zeros((6, 8), np.uint8), PHOTO.copy()
    label[0], label[1:3], label[4:] = 1, 4, 3                               # wall, lamp, floor
    colours[1, :4], colours[1, 4:], colours[4] = (1, 1, 0), (1, 2, 0), (2, 1, 0)
    names = ["Idx\tShare\tName", "1\t.2\twall", "2\t.1\tchair, seat", "3\t.1\tfloor", "4\t0\tlamp"]
    with folder() as at:
        for split in ("training", "validation"):
            fill(at, {f"images/{split}/a.png": PHOTO, f"annotations/{split}/a.png": label,
                      f"annotations_instance/{split}/a.png": colours})
        refused(at, "panoptic", "categoryMapping.txt")
        fill(at, {"objectInfo150.txt": "\n".join(names),
                  "categoryMapping.txt": "Instance\tScene\tFull\n1\t4\t7\n2\t2\t9\n"})
        source = opened(at, "panoptic", "semantic")[0]
        assert source.classes == ("lamp", "chair", "wall", "floor") and source.things == 2
        assert source.category_ids == (4, 2, 1, 3)
        sample = source[0]
        kind = {i: c for i, c, _ in sample["segments"].tolist()} | {0: None}
        assert [kind[i] for i in sample["panoptic"][:, 0].tolist()] == [2, 0, None, None, 1, 3]
        assert len(kind) == 6 and sample["panoptic"][1, 0] != sample["panoptic"][1, 7]
        assert sample["semantic"][:, 0].tolist() == [2, 0, 0, 255, 3, 3]
        assert "panoptic" in opened(at, "masks")[1][0]                      # instances alone
        for flag in ("ignore", "first"):                    # of label maps that say no more
            refused(at, "panoptic", f"--{flag}-label", **{f"{flag}_label": 1})
        (at / "annotations").rename(at / "Annotations")
        assert "panoptic" in opened(at, "panoptic")[1][0]
        (at / "Annotations").rename(at / "annotations")
        coco(at, [dict(image_id=0, file_name="a.png", segments_info=[dict(id=5, category_id=7)])],
             "ade20k_panoptic_train", 1, "images/training/a.png")
        assert opened(at, "panoptic", "semantic")[0].category_ids == (4, 2, 1, 3)   # not the JSON's
        source = opened(at, "semantic")[0]
        assert source.classes == ("wall", "chair", "floor", "lamp")
        assert source[0]["semantic"][:, 0].tolist() == [0, 3, 3, 255, 2, 2]
        fill(at, {"categoryMapping.txt": "Instance\tScene\tFull\n1\t2\t7\n"})
        refused(at, "panoptic", "annotations_instance/training/a.png", "instance class 2")
        fill(at, {"annotations/validation/a.png": label + 1})
        refused(at, "semantic", "validation/a.png", "label 5")


def test_depth_pairs():
    """Pairs and lists, and what is wrong with them; beyond --max-depth nothing is learned."""
    deep, place = np.full((6, 8), 5120, np.uint16), "val/depth/a.png"
    with folder() as at:
        fill(at, {f"{s}/{w}/a.png": x for s in ("train", "val")
                  for w, x in (("rgb", PHOTO), ("depth", deep))})
        depth = opened(at, "depth", depth_scale=256.0)[1][0]["depth"]
        assert (depth == 20).all() and depth.dtype == torch.float32
        fill(at, {place: np.array([[1000, 65535], [0, 65534]], np.uint16)})
        metres = opened(at, "depth")[1].labels(0)["depth"]
        assert_close(metres, torch.tensor([[1, 0], [0, 65.534]]), 1e-6)
        for pixels in (*map(deep.astype, (np.uint8, np.float32)), PHOTO, -deep.astype(np.int32)):
            fill(at, {place: (pixels, dict(format="tiff"))})
            refused(at, "depth", place, "16 bits")
        refused(fill(at, {place: deep[:5]}), "depth", "val/rgb/a.png", "5 x 8")
        for line, words in (("rgb/a.png", "line 1"), ("rgb/a.png None 518", "None"), ("", "line")):
            refused(fill(at, {"nyudepthv2_train_files_with_gt.txt": line + "\n"}), "depth", words)
        refused(fill(at, {"eigen_train_files_with_gt.txt": line}), "depth", "eigen", "nyudepthv2")
    with folder() as at:
        for keys in ("depth", "keypoints", "panoptic", "masks", "boxes", "semantic"):
            refused(at, keys, str(at), "expected", formats.EXPECTED[keys])
        for path in (at / "none", fill(at, {"file": ""}) / "file"):
            refused(path, "depth", str(path), "no such folder")
    truth, depth = torch.full((16, 16), 2.0), torch.full((1, 8, 8), 3.0)
    truth[:, 8:] = 12.0
    beyond = finetune_depth.depth_loss(depth, [{"depth": truth}], 2, 1e-3, 10.0)
    truth[:, 8:] = 0
    assert beyond == finetune_depth.depth_loss(depth, [{"depth": truth}], 2)


def test_skipping_what_is_broken():
    """--on-error skip replaces or leaves out what is broken, tells each once, counts it."""
    args = argparse.Namespace(batch_size=1, workers=1, seed=0, accumulate=1)
    objects = [dict(image_id=i) for i in (0, 1, 2)] + [dict(image_id="3.0", bbox=[])]
    with folder() as at:
        coco(at, objects, "instances_train", 5, [f"train/{i}.png" for i in range(4)])
        coco(at, objects[:2], "instances_val", photos="val/{}")
        fill(at, {"val/1.png": b"broken"})
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train, val = data.open_detection(at, 16, on_error="skip")
        assert train.source.ids == [0, 1, 2] and val.source.ids == [0]
        assert all(w in said.getvalue() for w in ("annotation 4", "4.png", "2 of 5 photos",
                                                  "val/1.png", "1 of 2 validation"))
        fill(at, {"train/1.png": b""})
        train.transform = data.v2.Identity()
        for way, kind in (("skip", batching.Skipping), ("stop", data.Detection)):
            flags = argparse.Namespace(**vars(args) | dict(on_error=way, workers=0))
            timed = batching.training_loader(train, flags, training.Run(torch.device("cpu")), 0, 1,
                                             data.collate, TINY)
            assert type(timed.dataset) is kind
        forgiving = batching.Skipping(train)
        batches = [[(0, i)] for i in (0, 1, 2, 1)]
        timed = batching.Timed(batching.loader(forgiving, batches, data.collate, TINY, args,
                                               training.Run(torch.device("cpu"))))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            pixels = [int(next(timed).to()[0].max()) for _ in batches]
            assert pixels == [0, 16, 16, 16] and timed.skipped() == 1
            assert [forgiving[0, i]["image"].max().item() for i in (1, 2)] == [16, 16]
        assert not said.getvalue()                          # the data process has told it already
        fill(at, {"train/0.png": b"", "train/2.png": b""})
        with raises(InputError, "no training photo"), quiet():
            forgiving[0, 0]
        assert forgiving.broken.all()
    class Turns(list):                                      # one of three tasks, as Segmentation
        def __getitem__(self, at):
            if at[1] in (1, 4):
                raise InputError("broken")
            return sum(at) % 3
    with quiet():
        turns = batching.Skipping(Turns(range(5)))
        assert all(turns[e, i] == (e + i) % 3 for e in range(4) for i in range(5))


ANIMAL = ["earL", "earR", "nose", "LF_paw", "RF_paw"]


def test_sides_in_names():
    """What names of joints tell of left and right, or --flip-pairs, and of their sigmas."""
    for names in ("LEye,REye,lHip,rHip,Lip", "L_ear,r_ear,left paw,Right paw,tail,bright_spot",
                  "leftHip,rightHip,L_eye,R_eye,LEye2,REye2,paw_front_left,paw_front_right,"
                  "lshoulder,rshoulder,lip,rip,LH,RH,elbow_L,elbow_R,FL_toe,FR_toe,hand_lt,hand_rt,"
                  "FL,FR,RL,RR,lft_eye,rgt_eye,pal,par,earl,earr,fl_heel,fr_heel,tail,lefty"):
        names, alone = names.split(","), ("Lip", "pal", "par", "tail", "bright_spot", "lefty")
        expected = [i if n in alone else i ^ 1 for i, n in enumerate(names)]
        assert pose.flip_order(names) == expected, names
    human = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert pose.flip_order(toyworld.KEYPOINTS) == pose.FLIP == human
    assert (pose.oks_sigmas(toyworld.KEYPOINTS[::-1]) == metrics.OKS_SIGMAS[::-1]).all()
    assert np.allclose(pose.oks_sigmas(["tail", "paw"]), metrics.OKS_SIGMAS.mean())
    assert pose.flip_order(["earL", "earR"], "none") == [0, 1]
    digits = list("01234")                                  # are names, not numbers
    assert pose.flip_order(ANIMAL, "EARL-nose, 4-5") == [2, 1, 0, 4, 3]
    assert pose.flip_order(digits, "1-2") == [0, 2, 1, 3, 4]
    for names, wrong in ((ANIMAL, "earL"), (ANIMAL, "earL-tail"), (ANIMAL, "earL-earL"),
                         (ANIMAL, "1-9"), (ANIMAL, "1-2,2-3"), (digits, "1-5")):
        with raises(InputError, f"--flip-pairs {wrong.split(',')[-1]}"):
            pose.flip_order(names, wrong)
    for most, count in ((3, 20), (17, 60), (30, 100)):     # by chance once in 400, 900, 13000
        for right in (most, most - 1):                      # one less is a side
            joints = np.array([[[i < right, 0, 2], [i >= right, 0, 2]] for i in range(count)])
            with raises(InputError, "keep their sides") if right < most else \
                    contextlib.nullcontext():
                pose.require_sides("d", ["a", "b"], [0, 1], [joints])


def test_own_joints():
    """Any joints: which objects have them, what a mirror does, checkpoints, what is refused."""
    five = [1, 1, 2, 7, 1, 2, 3, 3, 2, 2, 5, 2, 6, 5, 2]
    kinds = [dict(id=4, name="dog", keypoints=ANIMAL), dict(id=9, name="fox", keypoints=ANIMAL)]
    objects = [dict(image_id=i, category_id=(4, 9)[i % 2], keypoints=five) for i in range(4)]
    del objects[1]["keypoints"]                                             # not labelled
    objects[2] |= dict(bbox=[0, 0, 0, 0], area=0)                           # only joints clicked
    with folder() as at:
        coco(at, objects, "person_keypoints", 4, kinds=kinds)
        train, val = pose.open_pose(at, (48, 32))
        assert train.flip == [1, 0, 2, 4, 3] and val.source.category_ids == (4, 9)
        assert [len(t["boxes"]) for t in train.truths] == [1, 1, 1] and len(train.people) == 2
        clicked = train.truths[1]
        assert clicked["boxes"].tolist() == [[1, 1, 8, 6]] and clicked["area"] == 35
        assert train[0, 1]["labelled"].all() and val.truths[0]["keypoints"].shape == (1, 5, 3)
        for part in pose.open_pose(at, (48, 32), pairs="earL-nose,4-5"):
            assert part.flip == [2, 1, 0, 4, 3]
        views = pose.open_pose(at, (48, 32), augment=(0, 0.0), flip=False)[0]
        for left, right, nose in (views[e, 0]["joints"][:3, 0] for e in range(12)):
            assert left < nose < right and nose - left < right - nose       # never mirrored
    here = dict(bbox=[6.5, 1, 1, 4], area=7, keypoints=[7, 2, 2] * 17)      # photos of 6 x 8
    nobody = dict(bbox=[0, 0, 0, 0], area=0, keypoints=[0] * 51)
    with folder() as at:
        coco(at, [dict(image_id=i) | o for i in (0, 1) for o in (here, nobody)], "person_keypoints")
        train, val = pose.open_pose(at, (32, 16), flip=False)
        assert len(train.people) == 1 and val.counts == [1]
        assert [t["area"].tolist() for t in train.truths] == [[7, 0]]
    ear, seen, real = [dict(category_id=4, keypoints=[2, 2, 2] + [0] * 12)], [], pose.random_view
    with folder() as at:
        for part in ("train", "val"):
            coco(at, ear, f"person_keypoints_{part}", kinds=kinds)
        train = pose.open_pose(at, (32, 16), augment=(0.5, 40.0))[0]
        with patched(pose, random_view=lambda *a: seen.append(a[6]) or real(*a)):
            labelled = {tuple(train[e, 0]["labelled"].nonzero()[:, 0].tolist()) for e in range(20)}
        assert labelled == {(0,), (1,)} and set(seen) == {None}     # the other ear; no halves
        with quiet():
            out = finetune_pose.main(args_for(
                finetune_pose, "--data", at, "--size", 32, 16, "--batch-size", 1, "--steps", 1,
                "--workers", 0, "--out", at / "out"))
        saved = torch.load(at / "out/last.pt", weights_only=True)
        assert out["step"] == 1 and saved["joints"] == ANIMAL
        assert len(saved["model"]["offsets"]) == 5
        coco(at, ear, "person_keypoints_val", kinds=[kinds[0] | dict(keypoints=ANIMAL[::-1])])
        refused(at, "keypoints", "person_keypoints_val.json", "joints")
    with folder() as at:
        objects = [dict(image_id=i, keypoints=five[:9]) for i in range(30)]
        coco(at, objects, "person_keypoints", 30,
             kinds=[dict(id=30, name="fox", keypoints=["1", "2", "3"])])
        for flags, *words in (([], "error", "--flip-pairs", "--no-flip"),
                              (["--no-flip"], "3 joints"),
                              (["--flip-pairs", "1-2"], "3 joints", " 1 pairs", ": 1 - 2\n")):
            said = told(finetune_pose, at, *flags)
            assert all(w in said for w in words), said


def test_what_is_told_before_training():
    """--check writes nothing and says what would have been silent: who is left out, and why."""
    every = [dict(image_id=i) for i in range(8)]
    crowds = [o | dict(iscrowd=1, segmentation=dict(counts=[0, 12, 36], size=[6, 8]))
              for o in every]
    crowds[3]["bbox"] = [80, 80, 9, 9]                          # the first reason counts
    arrows = dict(kinds=[dict(id=30, name="arrow_left"), dict(id=7, name="arrow_right")])
    for objects, more, *words in (
            (every, {}, "7 training and 1 validation", "7 objects in 7 of 7", "person 100.0%"),
            (every[:2] + crowds, {}, "out: 7 crowds (iscrowd 1)\n", "88%"),
            (crowds, {}, "error", "iscrowd 1", "set it to 0"),
            (every + [dict(image_id=5, bbox=b) for b in ([9, 1, 4, 3], [1, 1, 0, 3])], {},
             "1 without area, 1 outside their photo", "1 of 10 boxes reach beyond"),
            (every + [dict(image_id=5)] * 30, {}, "31 objects", "--queries 12"),
            (every + [dict(image_id=5)] * 120, {}, "121 objects", "--queries 12"),
            (every, dict(names=[f"{i % 4}.png" for i in range(8)]),
             "3 training photos are listed more than once", "1 photos are in both parts"),
            (every, arrows, "arrow_right and arrow_left", "--no-flip"),
            (every[1:] + [dict(bbox=[5, 2, 7, 5])] * 20, {}, "20 of 27 boxes reach beyond"),
            ([o | dict(bbox=[.1, .1, .5, .5]) for o in every], {}, "error", "fractions")):
        with folder() as at:
            said = told(finetune_det, coco(at, objects, **dict(names=8) | more))
            assert all(w in said for w in words), (words, said)
            if len(objects) > 100:
                assert "100 surest" in told(finetune_det, at, "--queries", 300)
            if more is arrows:
                assert "mirrors" in said and "mirrors" not in told(finetune_det, at, "--no-flip")
                train = data.open_detection(at, 48, flip=False)[0]
                assert all(train[e, 0]["boxes"][0, 0] < 0.5 for e in range(3))
    with folder() as at:                                        # objects in the other photos alone
        first = torch.randperm(8, generator=torch.Generator().manual_seed(0))[0].item()
        coco(at, [dict(image_id=(first + 1) % 8)], "instances_train", 8, photos="train/{}")
        coco(at, [{}], "instances_val", 1, photos="val/{}")
        assert "1 objects in 1 of 8 photos" in told(finetune_det, at)
        assert "error: --data-fraction" in told(finetune_det, at, "--data-fraction", 0.1)
    with folder() as at:                                        # a roll of films of a telephone
        for i in range(5):
            write_photo(at / f"{i}.JPG")
        (at / "4.JPG").rename(at / "4.jfif")
        (at / ".ipynb_checkpoints").mkdir()
        write_photo(at / ".ipynb_checkpoints/4.JPG")
        fill(at, dict.fromkeys(("a.heic", "b.HEIC", "c.avif", "._d.jpg", "e.txt"), ""))
        said = told(pretrain, at)
        assert "4 training and 1 validation" in said and "2 .heic, 1 .avif are passed over" in said
        said = told(pretrain, fill(at, {"deep.png": np.full((40, 30), 4000, np.uint16)}))
        assert "largest value is 4000" in said and "by 16" in said
        said = told(pretrain, fill(at, {"deep.png": np.full((40, 30), 200, np.uint16)}))
        assert "largest value is 200" in said and "by 256" in said
        colours = png(40, 30, 16, 2, 40 * (b"\0" + 90 * (1000).to_bytes(2, "big")))
        said = told(pretrain, fill(at, {"deep.png": colours}))
        assert "largest value is 1023" in said and "by 64" in said


def test_scripts_run_on_folders():
    """Every task, trained for a step and evaluated on files alone; checkpoints keep the classes."""
    things, small = toyworld.THINGS, ["--size", 48]
    with folder() as at:
        for script, kind, flags, names in (
                (finetune_seg, "coco", [*small, "--tasks", "instance"], things),
                (finetune_seg, "coco", [*small, "--tasks", "semantic,instance,panoptic"],
                 toyworld.CLASSES), (finetune_seg, "ade20k", small, ()),
                (finetune_depth, "nyu", ["--crop", 48, 48, "--on-error", "skip"], ()),
                (finetune_det, "coco", [*small, "--queries", 8, "--many-queries", 8], things)):
            place, out = at / kind, at / f"out{len(list(at.iterdir()))}"
            if not place.exists():
                exported(place, kind, 2)
                for path in place.glob("annotations/instances_val*.json"):      # one shows nothing
                    content = json.loads(path.read_text())
                    first = content["images"][0]["id"]
                    content["annotations"] = [a for a in content["annotations"]
                                              if a["image_id"] != first]
                    path.write_text(json.dumps(content))
            flags = ["--data", place, "--out", out, "--steps", 1, "--batch-size", 2, "--workers", 0,
                     *flags]
            with quiet():
                assert script.main(args_for(script, *flags))["step"] == 1
            kept = checkpoints.read(out / "last.pt", "")
            assert (out / "samples/000001.png").exists()
            assert not names or kept["classes"] == list(names)
            assert not names or kept["category_ids"] == [4 * k + 3 for k in range(len(names))]
        with quiet():                           # the map is compared: the same names by other ids
            script.main(args_for(script, *flags, "--eval", "--data", "toyworld:2"))
        for path in (place / "annotations").glob("instances*"):
            path.write_text(path.read_text().replace('"ball"', '"bell"'))
        with raises(InputError, "--data", "classes", str(out)), quiet():
            script.main(args_for(script, *flags, "--eval"))


def test_real_files():
    """The real subset, if there: every source opens, first and last sample hang together."""
    if not SHARED.is_dir():
        print(f"skipped: {SHARED} is not there")
        return
    for name, keys in (("coco", "masks"), ("coco", "keypoints"), ("coco", "panoptic"),
                       ("ADEChallengeData2016", "semantic"), ("nyu", "depth")):
        for source in formats.open_folder(SHARED / name, [keys]):
            for sample in (source[0], source[len(source) - 1]):
                for key in {"layers", "panoptic", "semantic", "depth"} & sample.keys():
                    assert sample[key].shape[-2:] == sample["image"].shape[-2:], key
                if "layers" in sample:                      # thin tips of an outline draw nothing
                    out = torchvision.ops.masks_to_boxes(masks_in(sample)) - sample["boxes"]
                    out = (out + torch.tensor([0, 0, 1, 1])) * torch.tensor([-1, -1, 1, 1])
                    assert -6 < out.min() and out.max() <= 1 and (out.abs().median(1)[0] <= 1).all()


# -----------------------------------------------------------------------------
# Schedules, optimiser, checkpoints


def test_schedules():
    """A warm-up that is never 0, half a cosine down to 0; and a power of what is left."""
    values = [training.cosine(s, 100, 10) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1 and max(values) == 1 and values[99] < 1e-3
    assert abs(values[55] - 0.5) < 1e-9 and all(a > b for a, b in zip(values[10:], values[11:]))
    assert training.poly(0, 10) == 1 and abs(training.poly(5, 10) - 0.5 ** 0.9) < 1e-12


def test_parameter_groups():
    """Every parameter once; no decay on vectors, tokens, bias tables and e_i; scales by name."""
    net = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
    groups = training.param_groups(net, 0.05, training.finetune_scales(args_for(
        finetune_seg, "--query-lr", 10, "--backbone-lr", 0.1, "--head-lr", 5)))
    place = {id(p): g for g in groups for p in g["params"]}
    assert len(place) == sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        g = place[id(p)]
        assert g["scale"] == (10 if "offsets" in name else 0.1 if "backbone" in name else
                              1 if "glid" in name else 5), name
        matrix = name.endswith("weight") and p.ndim > 1
        assert g["weight_decay"] == (0.05 if matrix else 0), name
    optimizer = torch.optim.AdamW(groups)
    training.set_lr(optimizer, 2.0)
    assert [g["lr"] for g in optimizer.param_groups] == [2 * g["scale"] for g in groups]


def args_for(script, *flags):
    """Parsed flags, on the CPU: what is compared to the last digits is compared there."""
    flags = ["--preset", "tiny", "--device", "cpu", *map(str, flags)]
    return training.parse(script.flags(), script.PRESETS, flags)


def test_pretrained_parts_load_bit_equal():
    """Each part arrives bit-equal or not at all; what does not fit is named and changes nothing."""
    with folder() as at, quiet():
        net, state = noisy(Pretrainer(TINY)), training.Run(torch.device("cpu"))
        optimizer = torch.optim.AdamW(net.parameters())
        checkpoints.save_checkpoint(args_for(pretrain, "--out", at), net, optimizer, state, 5, 0.1,
                                    None, is_best=True)
        for parts in (["backbone"], ["backbone", "bifpn"], list(checkpoints.PARTS)):
            task = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
            checkpoints.load_parts(task.glid, at / "best.pt", parts, state)
            for part in checkpoints.PARTS:
                a, b = (getattr(n.glid, part).state_dict() for n in (net, task))
                assert all(torch.equal(a[k], b[k]) for k in a) == (part in parts), part
        wide = GLID(Config(**PRESETS["tiny"] | dict(window=6)))             # another window is fine
        checkpoints.load_parts(wide, at / "best.pt", ["backbone"], state)
        old, new = (g.backbone.stages[0][0].attn.bias_table for g in (net.glid, wide))
        assert torch.equal(new, M.resize_bias_table(old, 6))
        small = GLID(Config(**PRESETS["tiny"] | dict(width=32, heads=(1, 2, 4, 8))))
        for glid, part, *words in ((small, "backbone", "best.pt", "backbone", "tiny"),
                                   (wide, "neck", "--load neck")):
            with raises(InputError, *words):
                checkpoints.load_parts(glid, at / "best.pt", [part], state)


def official_names(weights, merges_late=True):
    """torchvision's Swin state dict in the official repository's names, or in timm's."""
    out = {}
    for key, value in weights.items():
        words = key.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2").split(".")
        if words[0] == "features" and words[1] == "0":
            key = f"patch_embed.{'proj' if words[2] == '0' else 'norm'}.{words[3]}"
        elif words[0] == "features" and int(words[1]) % 2:
            key = ".".join([f"layers.{int(words[1]) // 2}.blocks", *words[2:]])
        elif words[0] == "features":
            stage = int(words[1]) // 2 - merges_late
            key = ".".join([f"layers.{stage}.downsample", *words[2:]])
        out[key] = value
    return out


def test_backbones_of_others():
    """The same weights by all names, wrapped and in half precision, become the same backbone; what
    is no Swin, or ours, is named with the way out."""
    sizes = dict(depths=(2, 2, 2, 2), heads=(1, 2, 4, 8))
    theirs = noisy(torchvision.models.SwinTransformer(
        [4, 4], 16, sizes["depths"], sizes["heads"], [7, 7])).state_dict()
    config = Config(width=16, dim=64, **sizes)
    official = official_names(theirs) | {"layers.0.blocks.1.attn_mask": torch.zeros(1, 49, 49),
                                         "head.weight": torch.zeros(10, 128)}
    timm = official_names(theirs, merges_late=False)
    renamed = lambda weights, name: {name(k): v for k, v in weights.items()}
    cases = {
        "torchvision": theirs, "official": {"model": official}, "timm": timm,
        "wrapped": {"state_dict": renamed(theirs, lambda k: f"module._orig_mod.{k}")},
        "lightning": {"state_dict": renamed(theirs, lambda k: f"model._orig_mod.module.{k}")},
        "simmim": {"epoch": 3, "model": renamed(official, lambda k: f"encoder.{k}") | {
            "encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.bias": torch.zeros(9)}},
        "half": {"model": {k: v.half() if v.is_floating_point() else v
                           for k, v in official.items()}},
        "features": renamed(timm, lambda k: k.replace("layers.", "layers_"))}
    expected, state = M.swin_from_others(theirs, config)[0], training.Run(torch.device("cpu"))
    with folder() as at:
        for name, content in cases.items():
            torch.save(content, at / f"{name}.pth")
            net = GLID(config)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                checkpoints.load_backbone(net, at / f"{name}.pth", state)
            for k, v in expected.items():
                assert_close(net.backbone.state_dict()[k], v, 1e-3 if name == "half" else 1e-9, k)
            assert "window of 7 resized to 6" in said.getvalue()
        merge = net.backbone.merges[0].reduction.weight
        assert torch.equal(merge, theirs["features.2.reduction.weight"])
        torch.save({"model": Pretrainer(TINY).state_dict(), "config": {}}, at / "ours.pt")
        torch.save({"a": torch.zeros(3)}, at / "other.pth")
        torch.save({"model": theirs, "config": argparse.Namespace()}, at / "config.pth")
        (at / "page.pth").write_bytes(b"<!DOCTYPE html><html>")
        for name, words in (("ours.pt", "--load backbone"), ("other.pth", "no Swin"),
                            ("config.pth", "weights_only=False"), ("none.pth", "no such file"),
                            ("page.pth", "not written by torch.save")):
            with raises(InputError, "--init-backbone", name, words):
                checkpoints.load_backbone(GLID(config), at / name, None)
        with raises(InputError, "--init-backbone", "preset"):               # of another size
            checkpoints.load_backbone(GLID(TINY), at / "timm.pth", state)
        torch.save({"model": Pretrainer(config).state_dict(), "config": {}}, at / "ours.pt")
        both = argparse.Namespace(init_backbone=str(at / "timm.pth"), init=at / "ours.pt",
                                  load=None, resume=False, eval=False)
        net = GLID(config)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            checkpoints.load_pretrained(net, both, state)
        assert "decoder: loaded" in said.getvalue() and "scratch" not in said.getvalue()
        assert all(torch.equal(net.backbone.state_dict()[k], v) for k, v in expected.items())
        both.load = "decoder,backbone"
        with raises(InputError, "--load decoder,backbone", "--init-backbone"), quiet():
            checkpoints.load_pretrained(net, both, state)


def test_checkpoint_survives_a_failed_write():
    """If writing breaks off at any point, the last good checkpoint is still there."""
    def broken(state, f):
        f.write(b"half a checkpoint")
        raise OSError("disk full")
    with folder() as at:
        checkpoints.save({"step": 1}, at / "last.pt")
        with patched(torch, save=broken), raises(InputError, "last.pt", "disk full"):
            checkpoints.save({"step": 2}, at / "last.pt")
        assert torch.load(at / "last.pt")["step"] == 1 and len(list(at.iterdir())) == 1
        other, waits = training.Run(torch.device("cpu"), rank=1, world=2), mock.Mock()
        with patched(training.Run, sum=waits):              # the others wait for the first process
            checkpoints.save_checkpoint(None, torch.nn.Linear(1, 1), None, other, 3, 0, None)
        assert waits.called and torch.load(at / "last.pt")["step"] == 1
        # a scanner has the file open for a moment, as Windows does not allow
        pauses, tries = mock.Mock(), iter([PermissionError(13, "in use")] * 2)
        busy = argparse.Namespace(name="nt", replace=lambda *paths: os.replace(*paths) if (
            error := next(tries, None)) is None else fail(error))
        with patched(sys.modules["formats.files"], os=busy, time=pauses):
            checkpoints.save({"step": 2}, at / "last.pt")
        assert torch.load(at / "last.pt")["step"] == 2 and pauses.sleep.call_count == 2


def fail(error):
    raise error


# How far the weights of two runs that ought to be equal may lie apart, trained with steady_adam()
STEADY = 5e-6


def steady_adam():
    """AdamW with eps 1e-3. With its 1e-8, a weight whose true gradient is zero moves by a full step
    in the direction of the rounding error, which is another one on every processor, torch version
    and number of processes. Rounding errors of 1e-8 become 1e-5 of a step of 1e-3 or so here; a
    wrong gradient, schedule or decay still moves the weights by 1e-3."""
    return patched(torch.optim, AdamW=functools.partial(torch.optim.AdamW, eps=1e-3))


def weights_differ(a, b):
    """Largest difference, keys' biases left out: they cancel in every softmax, so that their true
    gradient is zero, and Adam scales its rounding noise up to full steps."""
    a, b = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    for weights in (a, b):
        for k in weights:
            if k.endswith("qkv.bias"):
                weights[k] = weights[k].unflatten(0, (3, -1))[[0, 2]]
    return max((a[k] - b[k]).abs().max().item() for k in a if not k.endswith("k.bias"))


def assert_same_bits(a, b):
    """Step, weights and the optimiser's state of two checkpoints are the same."""
    pair = ([c["step"], c["model"], c["optimizer"]["state"]]
            for c in (torch.load(p, weights_only=True) for p in (a, b)))
    torch.testing.assert_close(*pair, rtol=0, atol=0)


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def program(script, *flags):
    """Start a script as a program of its own."""
    words = [sys.executable, str(HERE / script), "--preset", "tiny", "--device", "cpu", *flags]
    return subprocess.Popen([str(w) for w in words], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    output = process.communicate()[0]
    assert process.returncode == code, f"exit code {process.returncode}:\n{output[-2000:]}"
    return output


def test_pretraining_loop_does_what_it_says():
    """As training by hand, with two micro-steps: the same samples, schedule and updates. Resumed, a
    finished run is graded; changed flags are refused, and weights of NaN not saved."""
    with folder() as at, quiet(), steady_adam():
        args = args_for(pretrain, "--data", "toyworld:4", "--batch-size", 2, "--accumulate", 2,
                        "--workers", 0, "--epochs", 4, "--warmup-epochs", 2, "--out", at)
        pretrain.main(args)
        torch.manual_seed(0)
        net = Pretrainer(TINY, norm_pix=True)
        optimizer = torch.optim.AdamW(training.param_groups(net, 0.05), betas=(0.9, 0.95),
                                      fused=True)
        train, _ = data.open_pretraining("toyworld:4", TINY)
        state, budget = training.Run(torch.device("cpu")), train.row_budget(TINY, 2)
        order = iter(batching.Batches(4, args, state, 0, 4))
        for scale in (0.5, 1.0, 1.0, 0.5):                          # warm-up, then half a cosine
            training.set_lr(optimizer, 2e-3 * scale)
            for _ in range(2):      # of equal shapes: rounding may turn a near-tie of max pooling
                samples = [train[i] for i in next(order)]
                images, tokens = data.collate_pretraining(TINY, samples, budget)
                (losses.reconstruction_loss(*net(M.normalize(images), tokens)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"model": net.state_dict()}, at / "hand.pt")
        assert weights_differ(at / "last.pt", at / "hand.pt") < STEADY

        args.resume = True
        assert pretrain.main(args)["step"] == 4
        best = torch.load(at / "last.pt")["best"]
        assert checkpoints.resume(args, net, optimizer, state, train) == (4, best, False)
        args.weight_decay = 0.1
        with raises(InputError, "--weight-decay", "0.05"):
            checkpoints.resume(args, net, optimizer, state, train)
        next(net.parameters()).data.fill_(math.nan)
        with raises(FloatingPointError, "--lr"):
            checkpoints.save_checkpoint(args, net, optimizer, state, 9, 0.0, train)
        assert torch.load(at / "last.pt")["step"] == 4


def test_segmentation_loop_does_what_it_says():
    """As training by hand, with two micro-steps that share one count of objects."""
    with folder() as at, quiet(), steady_adam():
        args = args_by_hand(finetune_seg, at, "--data", "toyworld:4", "--batch-size", 2, "--steps",
                            3, "--points", 64, "--clip", 0.5)
        finetune_seg.main(args)
        torch.manual_seed(0)
        net = Segmenter(TINY, {"semantic": 32}, {"semantic": 12})

        def loss_of(parts):
            count = sum(len(t["labels"]) for *_, targets in parts for t in targets) / 2
            answers = ((net(M.normalize(images), tokens, SEMANTIC, every_layer=True), targets)
                       for images, tokens, targets in parts)
            return sum(losses.segmentation_loss(*found["semantic"], targets, (64, 64), count,
                                                64)["loss"] / 2 for found, targets in answers)
        norms, _ = train_by_hand(net, args, data.open_segmentation("toyworld:4", 64)[0],
                                 [(1 - step / 3) ** 0.9 for step in range(3)], loss_of)
        assert len(norms) == 3 and (norms > 0.5).any(), norms               # clipping took part


def test_resume_is_exact():
    """Asked to end (SIGTERM), resumed, killed (SIGKILL) and resumed again, wherever it happens to
    be, with a data process, a run ends with the bits and the log of one that was left alone. Asked,
    it says how to go on, without a traceback, with 128 + 15."""
    written = lambda path: path.exists() and path.stat().st_mtime_ns
    with folder() as at:
        flags = ["--data", "toyworld:20", "--batch-size", 2, "--accumulate", 2, "--workers", 1,
                 "--save-every", 1, "--steps", 10]                          # 5 steps an epoch
        part, last = [*flags, "--out", at / "part"], at / "part/last.pt"
        for number, code, more in (signal.SIGTERM, 143, []), (signal.SIGKILL, -9, ["--resume"]):
            before, run = written(last), program("pretrain.py", *part, *more)
            while written(last) == before:
                assert run.poll() is None, finish(run)
                time.sleep(0.02)
            run.send_signal(number)
            said = finish(run, code)
            assert torch.load(last)["step"] < 10, "too late"
            if not more:                        # a killed run may leave a traceback
                assert "Traceback" not in said and "--resume" in said.splitlines()[-1], said
        with quiet():
            pretrain.main(args_for(pretrain, *part, "--resume"))
            pretrain.main(args_for(pretrain, *flags, "--out", at / "whole"))
        assert_same_bits(at / "whole/last.pt", last)
        assert rows_of(at / "whole") == rows_of(at / "part")


# every fine-tuning script, with flags that keep it small
FINETUNING = {
    finetune_seg: ["--points", 64, "--tasks", "semantic,instance,panoptic"],
    finetune_det: ["--queries", 12, "--many-queries", 24],
    finetune_depth: [],
    finetune_pose: [],
}


def interrupting(function, number):
    """The function, which sends us a signal when it is called first."""
    calls = itertools.count()

    def call(*args, **more):
        if next(calls) == 0:
            os.kill(os.getpid(), number)
        return function(*args, **more)
    return call


def test_log_drops_what_is_done_again():
    """Lines after the checkpoint, a torn one, and if it is still due that step's evaluation."""
    lines = [{"step": 4, "AP": 0.1}, {"step": 5, "loss": 1, "lr": 1}, {"step": 5, "AP": 0.2},
             {"step": 6, "loss": 1, "lr": 1}]
    for due, kept in ((True, lines[:2]), (False, lines[:3])):
        with folder() as at:
            (at / "log.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines) + '{"st')
            args = argparse.Namespace(out=at)
            log = training.Log(args, training.Run(torch.device("cpu")), 5, due)
            assert rows_of(at) == kept
            log.write(step=7, AP=math.nan, lr=1.23456789e-9)                # NaN is no JSON
            assert rows_of(at)[-1] == {"step": 7, "AP": None, "lr": 1.23457e-9}


def test_every_script_resumes_exactly():
    """All five, some of which draw random points: asked to end in its first step, each finishes and
    saves that; asked again while it evaluates it ends at once, and resumed begins with that
    evaluation. The same bits and metrics as without."""
    for script in (pretrain, *FINETUNING):
        with folder() as at, quiet():
            flags = ["--data", "toyworld:4", "--batch-size", 2, "--workers", 1, "--save-every", 2,
                     "--steps", 4, "--drop-path", 0.2]                      # 2 steps an epoch
            if script is not pretrain:
                flags += ["--eval-every", 2, *FINETUNING[script]]
            script.main(args_for(script, *flags, "--out", at / "whole"))
            part = args_for(script, *flags, "--out", at / "part")
            with patched(training.Progress, add=interrupting(training.Progress.add,
                                                             signal.SIGTERM)):
                with raises(Stopped, "SIGTERM"):
                    script.main(part)
            assert torch.load(at / "part/last.pt")["step"] == 1
            part.resume = True
            with patched(script, evaluate=interrupting(script.evaluate, signal.SIGINT)):
                with raises(Stopped, "SIGINT"):
                    script.main(part)
            kept = torch.load(at / "part/last.pt")
            assert kept["step"] == 2 and kept["due"] and not (at / "part/best.pt").exists()
            script.main(part)
            assert_same_bits(at / "whole/last.pt", at / "part/last.pt")
            whole, rows = rows_of(at / "whole"), rows_of(at / "part")
            assert rows[0]["step"] == 1 and "lr" in rows.pop(0)     # more often reported, not else
            assert [r for r in rows if "lr" not in r] == [r for r in whole if "lr" not in r]
            assert [r["step"] for r in rows] == [r["step"] for r in whole]


def test_a_second_signal_ends_at_once():
    """And what a signal does is what it was when the loop is left, by an error too."""
    before, killed = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []
    with raises(ValueError, "left"), quiet():
        with training.Progress(0, 9, "", None, training.Run(torch.device("cpu")), 1) as bar:
            os.kill(os.getpid(), signal.SIGTERM)
            assert bar.stops() == signal.SIGTERM
            with patched(os, kill=lambda *a: killed.append(a)):
                bar.asked(signal.SIGTERM, None)             # torchrun passes it on once more
                assert not killed
                bar.since -= 3
                bar.asked(signal.SIGTERM, None)
            assert killed == [(os.getpid(), signal.SIGTERM)]
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            raise ValueError("left")
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_one_run_writes_into_a_folder():
    """A second one is refused in one line while the first lives; what it holds is not touched. When
    it ends it lets go of the folder."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); " \
        "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('held', flush=True); input()"

    def other(at):
        """Another process, which holds the folder until it is told to end."""
        process = subprocess.Popen([sys.executable, "-c", code, at / ".lock"], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "held\n"
        return process

    with folder() as at, quiet():
        args = args_for(pretrain, "--data", "toyworld:4", "--batch-size", 4, "--workers", 0,
                        "--steps", 1, "--out", at)
        holder = other(at)
        with raises(InputError, "another run"):
            pretrain.main(args)
        assert sorted(p.name for p in at.iterdir()) == [".lock", "samples"]
        holder.communicate("\n")
        pretrain.main(args)
        other(at).communicate("\n")


TASKS = ["--data", "toyworld:7", "--workers", 0, "--overfit", "--lr", 3e-3, "--points", 64,
         "--tasks", "semantic,instance,panoptic", "--object-threshold", 0.1,
         "--overlap-threshold", 0.1]
DEPTH = ["--data", "toyworld:8", "--workers", 0, "--crop", 48, 48, "--queries", 8, "--batch-size",
         1, "--accumulate", 2]


def runs_of_one_and_two(at, processes):
    """What test_two_processes_are_as_one compares: (script, its flags) of each run, with the same
    images a step for one process and for two; trained by steady_adam()."""
    half, at = 3 - processes, Path(at)
    out = ["--workers", 0, "--out", at / str(processes)]
    yield pretrain, ["--data", "toyworld:12", "--steps", 5, "--batch-size", 2 * half, *out]
    # with e_i = 0 all matchings are equally good, so that no tie decides
    yield finetune_det, ["--data", "toyworld:12", "--steps", 3, "--accumulate", 2, "--query-lr", 0,
                         "--queries", 12, "--many-queries", 24, "--batch-size", half, *out]
    yield finetune_pose, ["--data", "toyworld:12", "--steps", 3, "--batch-size", half, *out]
    if processes == 2:      # with one image each: every step lacks a task, every process two
        yield finetune_seg, [*TASKS, "--batch-size", 1, "--steps", 20, "--resume", "--out", at]
        yield finetune_depth, [*DEPTH, "--steps", 2, "--out", at]
    for script, *flags in GRADED:               # 7 images, which 2 processes do not divide
        yield script, [*flags, "--data", "toyworld:7", "--workers", 0, "--eval", "--out",
                       at / "graded"]


def work_together(at, processes=2):
    """All runs in one go, then one that fails; by two processes if torchrun started us."""
    torch.set_num_threads(1)
    with steady_adam():
        for script, flags in runs_of_one_and_two(at, processes):
            drawn = []                              # what the random numbers of its steps depend on
            with patched(script, derive_seed=lambda *x, drawn=drawn: drawn.append(x) or sum(x)):
                script.main(args_for(script, *flags[:-1], flags[-1] / script.__name__))
            rank = torch.distributed.get_rank() if processes == 2 else 0
            assert {number for *_, number in drawn} <= {rank} and set(map(len, drawn)) <= {3}
            assert drawn or "--eval" in flags
    if processes == 2:
        flags = ["--data", "toyworld:8", "--batch-size", 4, "--workers", 0, "--lr", 1e30]
        launch(pretrain.main, args_for(pretrain, *flags, "--out", Path(at, "fails")))


def test_two_processes_are_as_one():
    """Two processes (gloo) and one with the same images a step agree after several steps: weights
    of pre-training, of pose and of detection, whose processes divide by the objects of all images;
    metrics of depth and of three tasks together. What --eval prints on two processes it prints on
    one. A failure is told when it happens, and last of all, below what torchrun writes about it."""
    with folder() as at:
        for task, (script, *_) in list(ASKED.items())[:-1]:
            untrained(task, at / "graded" / script.__name__)
        tasks = [*TASKS, "--batch-size", 7, "--out", at / "finetune_seg"]
        with quiet():
            finetune_seg.main(args_for(finetune_seg, *tasks, "--steps", 18))
        two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", __file__, "--together", at], text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        with quiet(), contextlib.redirect_stdout(io.StringIO()) as one:
            work_together(at, 1)
        said = finish(two, 1).splitlines()
        for name in ("pretrain", "finetune_det", "finetune_pose"):
            pair = [at / n / name for n in ("1", "2")]
            assert weights_differ(*(p / "last.pt" for p in pair)) < STEADY, name
            a, b = (torch.tensor([r.get("loss", r.get("val_loss", 0)) for r in rows_of(p)])
                    for p in pair)
            assert_close(a, b, 1e-4, f"losses of {name}")
        last = rows_of(at / "finetune_seg")[-1]
        with quiet():                                       # what two have trained, graded by one
            again = finetune_seg.main(args_for(finetune_seg, *tasks, "--steps", 20, "--resume"))
        assert again["step"] == last["step"] == 20
        for name in ("mIoU", "AP", "PQ"):
            assert last[name] > 1e-3 and abs(again[name] - last[name]) < 2e-6, (name, again, last)
        last = rows_of(at / "finetune_depth")[-1]           # the second process graded some photos
        with quiet():
            again = finetune_depth.main(args_for(finetune_depth, *DEPTH, "--eval", "--out",
                                                 at / "finetune_depth"))
        assert abs(again["REL"] - last["REL"]) < 2e-6 * last["REL"]
        answers = [line for line in one.getvalue().splitlines() if "of 7 images, step 1" in line]
        assert len(answers) == len(GRADED)
        assert all(answer in said for answer in answers), (answers, said)
        assert said[-1].startswith("error: the loss is") and "--lr" in said[-1], said
        assert said.count(said[-1]) == 2, said
        assert not any(w in line for w in ("FutureWarning", "Grad strides") for line in said), said
        assert not any('pretrain.py", line' in line for line in said), said


def test_the_first_checkpoint_is_kept_whatever_its_metric():
    """best.pt is written even if the first metric is NaN, and is replaced by the first number; a
    later NaN replaces nothing. Where nothing was found AP is -1, no NaN; depth refuses NaN."""
    values = {"AP": 0.5, "mIoU": 0.5, "REL": 0.5}
    for script in (*FINETUNING, pretrain):
        with folder() as at, quiet():
            args, state = argparse.Namespace(out=at), argparse.Namespace(rank=1)
            kept, best = [], None
            log = training.Log(args, state, 0)
            nans = script in (pretrain, finetune_seg)
            for factor in (math.nan, 1, math.nan, 2, 1) if nans else (1, 2, 1):
                found = {k: v * factor for k, v in values.items()}
                if script is finetune_det:
                    found = dict.fromkeys(script.REPORTED, found["AP"])
                found = found["REL"] if script is pretrain else found
                with patched(script, evaluate=lambda *a, f=found: f), patched(
                        checkpoints, save_checkpoint=lambda *a, kept=kept: kept.append(a[7])):
                    best = script.evaluate_and_save(None, None, args, state, 1, best, None, log)
            lower = script in (finetune_depth, pretrain)            # errors: less is better
            expected = [True, True, False] if nans else [True]
            assert kept == [*expected, not lower, lower], (script.__name__, kept)


def test_resume_says_that_another_length_was_asked_for():
    """A flag that was given before and is not any more counts: the run is longer without it."""
    with folder() as at, contextlib.redirect_stdout(io.StringIO()) as said:
        flags = ["--data", "toyworld:4:1", "--batch-size", 4, "--workers", 0, "--epochs", 2,
                 "--out", at]
        pretrain.main(args_for(pretrain, *flags, "--steps", 1))
        pretrain.main(args_for(pretrain, *flags, "--resume"))
    assert "--steps not given now, 1 before\n" in said.getvalue(), said.getvalue()
    assert "--lr" not in said.getvalue() and "--epochs" not in said.getvalue()


def test_resume_keeps_the_images_of_a_step():
    """Steps of another size would put a schedule counted in epochs elsewhere: refused, unless it is
    split in another way only. With --steps it is told."""
    with folder() as at, contextlib.redirect_stdout(io.StringIO()) as said:
        flags = ["--data", "toyworld:8:1", "--batch-size", 4, "--workers", 0, "--out", at]
        pretrain.main(args_for(pretrain, *flags, "--steps", 1))
        flags += ["--resume", "--epochs", 1, "--batch-size", 2]
        with raises(InputError, "--batch-size 2", "has 4 images, not 2"):
            pretrain.main(args_for(pretrain, *flags))
        assert pretrain.main(args_for(pretrain, *flags, "--accumulate", 2))["step"] == 2
        assert "images a step" not in said.getvalue()
        pretrain.main(args_for(pretrain, *flags, "--steps", 3))
    assert "2 images a step now, 4 before\n" in said.getvalue()


def test_a_change_of_the_validation_photos_is_told():
    """Where every 20th photo validates, a new photo makes photos that were trained on validate. A
    run goes on where the same photos lie in another folder, and in no other."""
    with folder() as at, quiet(), contextlib.redirect_stderr(io.StringIO()) as said:
        for i in range(22):
            write_photo(at / f"photos/{i + 10}.png", (64, 64))
        flags = ["--data", at / "photos", "--batch-size", 4, "--workers", 0, "--out", at / "out"]
        pretrain.main(args_for(pretrain, *flags, "--steps", 1))
        pretrain.main(args_for(pretrain, *flags, "--eval"))
        assert "other photos validate" not in said.getvalue()
        last = at / "out/last.pt"
        torch.save(torch.load(last) | {"best": 0.0}, last)
        write_photo(at / "photos/1.png", (64, 64))
        pretrain.main(args_for(pretrain, *flags, "--eval"))
        pretrain.main(args_for(pretrain, *flags, "--steps", 2, "--resume"))
        assert said.getvalue().count("other photos validate") == 2
        assert torch.load(last)["best"] > 0                 # the best of other photos is none
        (at / "photos").rename(at / "moved")                # the same photos elsewhere will do
        flags[1] = at / "moved"
        pretrain.main(args_for(pretrain, *flags, "--steps", 3, "--resume"))
        (at / "moved").rename(at / "fewer")
        (at / "fewer/1.png").unlink()
        for other in (at / "fewer", "toyworld:22"):
            with raises(InputError, "--data", "moved", "give the same"):
                pretrain.main(args_for(pretrain, *flags, "--data", other, "--resume"))
    assert said.getvalue().count("other photos validate") == 2


def test_eval_tells_of_each_class():
    """--eval prints the metric of each class above the mean, which is theirs."""
    for task in ("detection", "segmentation"):
        script, *flags = ASKED[task]
        with folder() as at, contextlib.redirect_stdout(io.StringIO()) as said:
            untrained(task, at)
            script.main(args_for(script, *flags, "--data", "toyworld:2", "--workers", 0, "--eval",
                                 "--out", at))
        lines = said.getvalue().splitlines()
        answer = next(line for line in lines if "of 2 images" in line)
        for metric in ("AP",) if task == "detection" else ("mIoU", "AP", "PQ"):
            start = lines.index(f"{metric:>8}  class") + 1
            names = toyworld.THINGS if metric == "AP" else toyworld.CLASSES
            values, found = zip(*map(str.split, lines[start:start + len(names)]))
            assert found == names
            mean = np.mean([float(v) for v in values if v != "none"])
            shown = float(re.search(rf"\b{metric} ([\d.]+)", answer)[1])
            assert abs(mean - shown) < 0.011 and (mean > 0 or metric != "mIoU"), (answer, values)


def test_resume_needs_no_init():
    """A run goes on, bit-identical, and is graded when the file that it started from is gone."""
    with folder() as at, quiet():
        flags = ["--data", "toyworld:4:1", "--batch-size", 4, "--workers", 0, "--steps", 2]
        pretrain.main(args_for(pretrain, *flags, "--out", at))
        flags += ["--init", at / "best.pt", "--out"]
        finetune_depth.main(args_for(finetune_depth, *flags, at / "whole"))
        part = [*flags, at / "part"]
        with patched(training.Progress, add=interrupting(training.Progress.add, signal.SIGTERM)), \
                raises(Stopped, "SIGTERM"):
            finetune_depth.main(args_for(finetune_depth, *part))
        (at / "best.pt").unlink()
        assert finetune_depth.main(args_for(finetune_depth, *part, "--resume"))["step"] == 2
        assert finetune_depth.main(args_for(finetune_depth, *part, "--eval"))["step"] == 2
        assert_same_bits(at / "whole/last.pt", at / "part/last.pt")


def test_evaluation_needs_the_same_meaning():
    """--eval takes any --batch-size, even one larger than the training set; it refuses flags with
    which the weights would mean something else."""
    for task, wrong in (("detection", ["--queries", 9]), ("depth", ["--max-depth", 5]),
                        ("depth", ["--no-flip"]), ("pose", ["--no-flip"]),
                        ("depth", ["--min-depth", 0.5]), ("segmentation", ["--tasks", "semantic"]),
                        ("pose", ["--sigma", 2]), ("detection", ["--window", 6]),
                        ("pose", ["--decoder-layers", 6]), ("segmentation", ["--queries", 9]),
                        ("pretraining", ["--decoder-layers", 6]),
                        ("pretraining", ["--no-norm-pix"])):
        with folder() as at, quiet():
            untrained(task, at)
            script, *flags = ASKED[task]
            flags += ["--data", "toyworld:4", "--workers", 0, "--out", at, "--eval"]
            if script is not pretrain:          # somebody else's folder: graded without a picture
                (at / "samples").write_text("")
                assert script.main(args_for(script, *flags))["step"] == 1
                (at / "samples").unlink()
            assert script.main(args_for(script, *flags, "--batch-size", 99))["step"] == 1
            with raises(InputError, wrong[0].replace("no-norm", "norm"), "best.pt"):
                script.main(args_for(script, *flags, *wrong))
            if task == "detection":             # the same weights may be graded at another size
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    script.main(args_for(script, *flags, "--size", 96))
                assert "--size 96 now, 48 before\n" in said.getvalue(), said.getvalue()
            args = args_for(script, *flags, "--data", "toyworld:2", "--lr", 5)
            args.eval, saved = False, checkpoints.read(at / "best.pt", "")      # as with --resume
            checkpoints.compare(saved, "last.pt", args, argparse.Namespace())
            args.weight_decay = 7
            with raises(InputError, "--weight-decay"):
                checkpoints.compare(saved, "last.pt", args, argparse.Namespace())


def test_what_a_run_says_while_it_trains():
    """Images/s and the share of waiting are those since the last report, without evaluations; a
    warm-up as long as the run is told; a metric of nothing is no -100."""
    clock, loader = [5.0], argparse.Namespace(waited=0.0, skipped=lambda: 0)
    run, said = training.Run(torch.device("cpu")), io.StringIO()
    with patched(training.time, perf_counter=lambda: clock[0]), contextlib.redirect_stdout(said):
        bar = training.Progress(0, 100, "test", loader, run, 32)
        for step, waited, share in ((10, 0, "wait=0%"), (20, 5, "wait=25%")):
            bar.add(torch.tensor(30.0))
            clock[0], loader.waited = clock[0] + 20, waited
            assert bar.report(step) == 3
            assert "img_s=16," in bar.bar.postfix and share in bar.bar.postfix, bar.bar.postfix
            with bar.evaluation():
                clock[0] += 1000
        for warmup in (4, 5):
            assert "warm-up" not in said.getvalue()
            training.describe(run, Pretrainer(TINY), [0], [0], 1, 5, 1e-3, warmup)
    assert "5 steps" in said.getvalue().splitlines()[-1]
    assert [training.percent(v) for v in (0.1234, 0.0, -1.0, math.nan)] \
        == ["12.34", "0.00", "none", "none"]


# -----------------------------------------------------------------------------
# Machines: devices, versions, data processes, encodings


def tensors_in(thing):
    """All tensors in nested lists, dicts and objects."""
    packer = batching.Packer(io.BytesIO())
    packer.dump(thing)
    return packer.tensors


def some_batches():
    """A training and a test batch of every task, as collate makes them."""
    sets = [(data.open_pretraining("toyworld:3", TINY), data.collate_pretraining),
            (data.open_detection("toyworld:3", 64), data.collate),
            (data.open_segmentation("toyworld:3", 64, tasks=ALL_TASKS), data.collate),
            (data.open_depth("toyworld:3", 64, 64), data.collate)]
    for pair, collate in sets:
        for part in pair:
            yield collate(TINY, [part[0, i] for i in range(2)])
    people, photos = pose.open_pose("toyworld:3", (48, 32))
    yield data.collate(TINY, [people[0, i] for i in range(2)])
    yield pose.collate_photos(TINY, [photos[0, i] for i in range(2)])


def test_batches_can_be_pinned_and_moved():
    """No tensor of a batch overlaps itself in memory, which pinning for a GPU refuses; Apple's GPUs
    have no float64."""
    batches = list(some_batches())
    assert len(batches) == 10
    for batch in [*batches, (whole(TINY, torch.zeros(3, 3, 64, 64)),)]:
        for x in tensors_in(batch):
            places = torch.arange(x.untyped_storage().nbytes() // x.element_size() + 1)
            places = places.as_strided(x.shape, x.stride(), x.storage_offset())
            assert len(places.unique()) == x.numel(), (x.shape, x.stride())
    for batch in batches[::2]:                              # what training sends to the device
        assert not any(x.dtype == torch.float64 for x in tensors_in(batch))


def test_packed_batches_arrive_as_they_were():
    """One buffer for all tensors, whatever their kind; through shared memory or, where that is
    full, through the pipe."""
    odd = [torch.arange(6).view(2, 3).T, torch.tensor(3.5), torch.zeros(0, 4), torch.tensor([True]),
           {"a": torch.ones(2, dtype=torch.int16), "b": np.arange(3), "c": ("task", None, 1.5)},
           torch.zeros(1).expand(5), torch.tensor([1 + 2j]),
           torch.from_numpy(np.array((), np.int64))]        # whose stride is 0

    def none(size):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    for room in (batching.shared, none):
        with patched(torch.utils.data, get_worker_info=lambda: True), patched(batching,
                                                                              shared=room):
            for batch in (odd, *some_batches()):
                packed = batching.Packed(batch)
                assert packed.buffer.is_shared() == (room is not none)
                if room is none:                            # shared memory is handed over by number
                    packed = pickle.loads(pickle.dumps(packed))
                a, b = tensors_in(packed.to("cpu")), tensors_in(batch)
                assert len(a) == len(b) > 0
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert batching.Packed(odd).to()[4]["c"] == odd[4]["c"] and packed.to()[1][0]["id"] == 0
    (_, tokens), (_, other) = (batching.Packed(b).to() for b in itertools.islice(some_batches(), 2))
    assert tokens.plans.keys() == other.plans.keys() and tokens.config == TINY


def test_start_methods():
    """Data processes that are not forked, few open files, large batches: training and evaluation of
    many objects work (Linux allows 1024 files for 8 such processes, macOS 256)."""
    code = """if True:
        import multiprocessing, resource, sys
        import finetune_det as script, training
        from launch import launch
        for method, more in ("forkserver", ["--steps", "1"]), ("spawn", ["--eval"]):
            multiprocessing.set_start_method(method, force=True)
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            args = training.parse(script.flags(), script.PRESETS, [*sys.argv[1:], *more])
            launch(script.main, args)"""
    with folder() as at:
        flags = ["--preset", "tiny", "--device", "cpu", "--data", "toyworld:48", "--batch-size",
                 "48", "--size", "32", "--workers", "1", "--out", at]
        found = subprocess.run([sys.executable, "-c", code, *flags], cwd=HERE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        assert found.returncode == 0 and found.stdout.count("box AP ") >= 2, found.stderr


def test_toyworld_is_drawn_the_same_by_many():
    """By several processes or one: the same rows, in order."""
    many = drawn.draw_scenes(0, 8, ["boxes", "depth"], range(512), "test")
    for i in (0, 31, 32, 33, 300, 511):
        scene, row = toyworld.scene(0, i, 8), many[i]
        assert np.array_equal(row["image"].transpose(1, 2, 0), scene["image"])
        assert all(np.array_equal(row[k], scene[k]) for k in ("boxes", "depth")), i
    assert len(many) == 512
    a, b = (drawn.ToyWorld("val", 1, 32, world)[0]["image"] for world in (0, 1))
    assert not torch.equal(a, b)


def test_devices():
    """What --device chooses on which machine; bf16 only where the hardware has it."""
    with patched(torch.cuda, is_available=lambda: True, device_count=lambda: 2):
        assert [str(training.pick_device(n, 1)) for n in ("auto", "cuda")] == ["cuda:1"] * 2
        assert training.pick_device("cpu").type == "cpu"
        assert str(training.pick_device(torch.device("cuda:1"))) == "cuda:1"    # not this process's
        assert training.pick_device(torch.device("cpu")).type == "cpu"
        with raises(InputError, "nproc_per_node", "2 GPUs"):
            training.pick_device("auto", 2)
        for name in ("CPU", "gpu", "cuda:x"):
            with raises(InputError, "--device", "cuda or mps"):
                training.pick_device(name)
    for has in (True, False):                               # a T4 emulates it, slowly
        with patched(torch.cuda, is_bf16_supported=lambda including_emulation=True, has=has:
                     has or including_emulation):
            dtype, words = training.precision(torch.device("cuda", 0))
        assert dtype == (torch.bfloat16 if has else None)
        assert has or ("fp32" in words and "bf16" in words)
    with patched(torch.cuda, is_available=lambda: False), patched(torch.backends.mps,
                                                                  is_available=lambda: False):
        assert training.pick_device("auto").type == "cpu"
        for name in ("cuda", "mps"):
            with raises(InputError, f"--device {name}"):
                training.pick_device(name)


def on_simulated_card(net, loss, layout, *more, **how):
    """Forward pass in bf16 and loss on a GPU that exists in torch's books only: devices, types and
    shapes are those of a GPU, no value is computed. A mix with tensors of the CPU, or a wait for a
    value, raises. (There is no backward pass: autograd's engine needs a real GPU.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode() as card, patched(torch.cuda, is_available=lambda: True,
                                           is_bf16_supported=lambda **_: True), \
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False), \
            patched(M, pixel_statistics=M.pixel_statistics.__wrapped__):
        send = lambda x: card.from_tensor(x).to("cuda")
        for name in ("sizes", "units", "hidden_units", "rows"):
            setattr(layout, name, send(getattr(layout, name)))
        weights = {k: send(v) for k, v in [*net.named_parameters(), *net.named_buffers()]}
        images = torch.empty(layout.batch, 3, 64, 64, dtype=torch.uint8, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            answer = torch.func.functional_call(net, weights, (M.normalize(images), layout, *more),
                                                how)
        with patched(losses, hungarian=lambda cost, counts, repeats=1: [torch.zeros(
                4 * repeats, dtype=torch.long, device=sum(cost.values()).device)] * 4):
            return loss(answer)


def test_networks_stay_on_the_card():
    """Forward pass and loss of every network leave nothing on the CPU and wait for no value."""
    empty = functools.partial(torch.empty, device="cuda")
    tasks, asked = dict(semantic=4, instance=5), dict(semantic=slice(0, 1), instance=slice(1, 2))
    groups = argparse.Namespace(queries=4, many_queries=5, repeats=2)
    square = Layout(TINY, torch.tensor([[64, 64]] * 2), torch.arange(32).view(2, 4, 4) % 4 > 0,
                    budget=[60] * len(Layout.kinds(TINY)))
    ragged = lambda: Layout(TINY, torch.tensor([[64, 50], [33, 64]]))

    def truths():
        return [{"labels": empty(n, dtype=torch.long), "boxes": empty(n, 4), "depth": empty(size),
                 "masks": empty(n, *size, dtype=torch.bool)}
                for n, size in ((1, (64, 50)), (3, (33, 64)))]

    def heatmaps(found):
        joints, labelled = empty(2, 17, 2), empty(2, 17, dtype=torch.bool)
        return losses.heatmap_loss(found, *pose.heatmap_targets(joints, labelled, (64, 64),
                                                                found.shape[2:], 1.0))
    for loss in (
            on_simulated_card(Pretrainer(TINY, True), lambda x: losses.reconstruction_loss(*x),
                              square),
            on_simulated_card(M.Detector(TINY, 3, 4, 5), lambda x: finetune_det.group_losses(
                *x, truths(), 1.0, groups), ragged(), train=True),
            on_simulated_card(Segmenter(TINY, tasks, tasks), lambda x: finetune_seg.batch_loss(
                x, asked, truths(), [1.0, 1.0], (64, 64), 20), ragged(), asked, every_layer=True),
            on_simulated_card(DepthEstimator(TINY, 8, 0.1, 10), lambda x: finetune_depth.depth_loss(
                x, truths(), 2, 0.1, 10), ragged()),
            on_simulated_card(PoseEstimator(TINY), heatmaps, ragged())):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


def test_every_script_on_the_gpu():
    """Where there is a GPU: 3 steps of every script, one of them resumed, its loss a number."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() \
        else None
    if not device:
        print("there is no GPU here: nothing tried")
        return
    with folder() as at, quiet():
        for script in (pretrain, *FINETUNING):
            flags = ["--data", "toyworld:8", "--batch-size", 4, "--workers", 1, "--device", device,
                     "--out", at / script.__name__, *FINETUNING.get(script, [])]
            script.main(args_for(script, *flags, "--steps", 2))
            assert script.main(args_for(script, *flags, "--steps", 3, "--resume"))["step"] == 3


def test_versions():
    """What is older than README says is refused by name; newer and odd version numbers are not."""
    words, torchs = "Python 3.10 and torch 2.6 or newer", torch.torch_version.TorchVersion
    for python, version, good in (((3, 9, 18), "2.8.0", False), ((3, 10), "2.5.1+cu121", False),
                                  ((3, 10), "2.6.0", True), ((4, 0), "3.0", True),
                                  ((3, 14), "2.10.0a0+git1234", True)):
        with patched(sys, version_info=python), patched(torch, __version__=torchs(version)):
            code, said = ended(lambda _: args_for(pretrain))
        assert (words in said) != good and (code == 2) != good, (python, version, said)
    assert 'requires-python = ">=3.10"' in (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert "torch>=2.6" in (HERE / "requirements.txt").read_text(encoding="utf-8")


def test_every_command_starts():
    """What no other module imports must not rot."""
    for path in ("bench.py", "curves.py", "formats/export.py", *(
            f"results/{p.name}" for p in sorted((HERE / "results").glob("*.py")))):
        spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        assert module.__doc__, path                 # says what it is for; --help prints it


def test_sources():
    """Nothing outside the standard library and the six packages is imported, and text files are
    opened as UTF-8, whatever the locale."""
    import ast
    allowed = {"torch", "torchvision", "numpy", "PIL", "scipy", "tqdm", *sys.stdlib_module_names,
               *(p.stem for p in HERE.glob("*.py")), "formats"}
    for path in [*HERE.glob("*.py"), *HERE.glob("formats/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in allowed for n in names), f"{path.name}: {names}"
            if not isinstance(node, ast.Call) or path.name == "test_all.py":
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = name == "open" and (not isinstance(node.func, ast.Name) or any(
                isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:]))
            if name in ("read_text", "write_text") or (name == "open" and not binary):
                assert "encoding" in [k.arg for k in node.keywords], f"{path.name}:{node.lineno}"


def test_texts_in_any_encoding():
    """Class names are UTF-8, with a byte order mark or not; what a terminal cannot show does not
    end a run."""
    with folder() as at:
        for text in ("Straße\n裂缝\n".encode(), "\ufeffStraße\n裂缝\n\n".encode()):
            (at / "classes.txt").write_bytes(text)
            assert formats.class_names(at) == ["Straße", "裂缝"]
        for text, *words in (b"a\n\nb", "line 2 is empty"), ("Straße\n".encode("cp1252"), "UTF-8"):
            (at / "classes.txt").write_bytes(text)
            with raises(InputError, "classes.txt", *words):
                formats.class_names(at)
    shown = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with patched(sys, stdout=shown):
        launch(lambda args: print("class 裂缝"), None)
    shown.flush()
    assert shown.buffer.getvalue().strip() == b"class \\u88c2\\u7f1d"


def ended(main, args=None):
    """Call main as the scripts do -> exit code (0 if it returns), and all that is said."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            launch(main, args)
            return 0, shown.getvalue()
        except SystemExit as end:
            return end.code, shown.getvalue()


def test_what_ends_a_run_is_told():
    """Faults that are the machine's end in one line with the way out; ours keep their traceback."""
    for error, code, words in (
            (KeyboardInterrupt(), 130, "stopped"),
            (Stopped(15, "stopped by SIGTERM; --resume"), 143, "--resume"),
            (OSError(24, "Too many open files"), 2, "ulimit -n"),
            (MemoryError("Unable to allocate 6 GiB"), 2, "memory is full (Unable"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "memory is full"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "--batch-size"),
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2,
             "--workers 0"),
            (NotImplementedError("'aten::x' is not implemented for the MPS device"), 2, "cpu"),
            (RuntimeError("MPS: Unsupported Border padding mode"), 2, "--device cpu"),
            (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB"), 2, "--batch-size"),
            (RuntimeError("CUDA error: no kernel image is available for execution"), 2,
             "not built for this GPU")):
        found, said = ended(fail, error)
        assert found == code and words in said and said.count("\n") == 1, (error, found, said)
    for error in (RuntimeError("shapes differ"), NotImplementedError("ours"),
                  RuntimeError("CUDA error: MPS client failed to connect"),
                  RuntimeError("Placeholder storage has not been allocated on MPS device!")):
        with raises(type(error), str(error)):
            ended(fail, error)
    lost = torch.distributed.DistBackendError("NCCL error in x.cpp\nLast error:\nno /dev/shm left")
    with patched(torch.distributed, is_initialized=lambda: True):       # the cause is not hidden
        found, said = ended(fail, lost)
    assert found == 2 and "(no /dev/shm left)" in said and said.count("\n") == 1, said
    with patched(torch.distributed, init_process_group=lambda *_, **__: fail(
            RuntimeError("connectFullMesh failed"))), patched(os, environ=os.environ | {
                "RANK": "0"}):
        found, said = ended(training.start, args_for(pretrain))
    assert found == 2 and "GLOO_SOCKET_IFNAME" in said, said
    torch_alone = argparse.Namespace(is_available=lambda: False)        # built without distributed
    with patched(sys.modules["launch"], dist=torch_alone):
        assert ended(lambda _: None) == (0, "")
    for words in ["--steps", "1e5"], ["--steps", "1.5"], ["--batch-size", "0"]:
        found, said = ended(lambda words: args_for(pretrain, *words), words)
        assert found == 2 and f"'{words[1]}': must be a whole number, at least 1" in said, said


def test_many_masks_take_little_memory():
    """A photo's overlapping masks are kept as a few maps, and graded as they are: 200 objects of
    480 px would be 46 MB as masks, and are drawn one at a time."""
    def crowded(content):
        content["images"][0] |= dict(width=480, height=480)
        square = lambda x, y: [x, y, x + 40, y, x + 40, y + 40, x, y + 40]
        content["annotations"] = [dict(
            content["annotations"][0], id=i, bbox=[i % 20 * 22, i // 20 * 44, 40, 40], area=1600,
            iscrowd=0, segmentation=[square(i % 20 * 22, i // 20 * 44)]) for i in range(200)]
    with folder() as at:
        little_coco(at, crowded)
        for part in ("train2017", "val2017"):
            write_photo(at / part / "0.png", (480, 480))
        source = formats.open_folder(at, ["masks"])[0]
        tracemalloc.start()
        labels = source.labels(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        masks, layers = masks_in(labels), labels["layers"]
        assert layers.shape == (2, 480, 480) and layers.dtype == torch.uint8 and peak < 5e6, peak
        assert (masks.sum((1, 2)) == 1600).all() and masks[:, 300].sum() == 20 * 40
        answer = {"labels": labels["classes"][:50], "scores": np.arange(50.0),
                  "masks": masks[:50].roll(5, 2)}
        results = []
        for truth in ({"layers": layers}, {"masks": masks}):
            metric = metrics.AveragePrecision("mask", [0, 1])
            metric.update(0, answer, {"labels": labels["classes"], **truth})
            results.append(metric.result())
            # what is kept is not a view into the batch, which would stay in memory
            assert all(x.base is None or x.base.nbytes < 1e5 for x in metric.images[0])
        assert results[0] == results[1] and 0.1 < results[0]["AR100"] < 0.9
        none = {"labels": labels["classes"][:0], "masks": masks[:0]}        # all of it is wrong
        metric.update(1, answer | {"scores": np.arange(50.0, 100)}, none)
        assert metric.result()["AP"] < results[0]["AP"]


# -----------------------------------------------------------------------------
# Asking a trained model


# a checkpoint of each task: its script, flags, and what opens the data set to validate
ASKED = {
    "detection": (finetune_det, "--size", 48, "--queries", 8, "--many-queries", 8),
    "segmentation": (finetune_seg, "--size", 48, "--queries", 8, "--object-threshold", 0.1,
                     "--overlap-threshold", 0.3, "--tasks", "semantic,instance,panoptic"),
    "depth": (finetune_depth, "--crop", 48, 48, "--queries", 8),
    "pose": (finetune_pose, "--batch-size", 4),
    "pretraining": (pretrain, "--epochs", 1)}
GRADED = list(ASKED.values())[:-1]


def untrained(task, at, root="toyworld:2", *more):
    """best.pt of a task's network with noise for weights, written without a run."""
    script, *flags = ASKED[task]
    args, run = args_for(script, *flags, *more, "--data", root, "--out", at), training.Run("cpu")
    torch.manual_seed(0)
    val = argparse.Namespace()                              # which means nothing
    if task == "detection":
        val = data.open_detection(root, args.size)[1]
        net = finetune_det.build(args, val.classes, run)
    elif task == "segmentation":
        val = data.open_segmentation(root, args.size, tasks=args.tasks)[1]
        net = finetune_seg.build(args, val, run)
    elif task == "pose":
        val = pose.open_pose(root, args.size)[1]
        net = finetune_pose.build(args, len(val.joints), run)
    else:
        net = finetune_depth.build(args, run) if task == "depth" else Pretrainer(
            training.model_config(args), True)
    noisy(net).load_state_dict({k: v + torch.randn(v.shape) * ("offsets" in k)
                                for k, v in net.state_dict().items()})
    at.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(args, net, torch.optim.SGD(net.parameters()), run, 1, 0, val,
                                is_best=True)
    return at / "best.pt"


@functools.cache
def asked(task):
    """predict.Model of a task; kept for the other tests of this process."""
    with folder() as at, quiet():
        return predict.load(untrained(task, at), "cpu")


def ask(*flags):
    """predict.py's exit code and what it says."""
    return ended(predict.main, predict.flags().parse_args(["--device", "cpu", *map(str, flags)]))


def flattened(answer):
    return {k: v.double() for k, v in answer.items() if torch.is_tensor(v)}


def test_answers_do_not_depend_on_the_batch():
    """A photo's answer is the same alone and beside others, and however it is handed over."""
    photos = [scene["image"].as_subclass(torch.Tensor) for scene in drawn.ToyWorld("val", 3, 64)]
    photos[1] = photos[1][:, :40, :56]
    array = photos[1].permute(1, 2, 0).contiguous().numpy()
    lying = io.BytesIO()                                    # as a camera on its side writes it
    Image.fromarray(np.rot90(array).copy()).save(lying, "PNG", **held(6))
    with folder() as at:
        Image.fromarray(array).save(at / "a.png")
        for task in ASKED:
            model, answers = asked(task), {}
            for size in (1, 3):
                with patched(model, batch_size=size):
                    answers[size] = model(photos)
            for a, b in zip(answers[1], answers[3]):
                assert a.keys() == b.keys()
                for key, value in flattened(a).items():
                    # a threshold may fall between two roundings of a pixel
                    near = (value - flattened(b)[key]).abs() <= 1e-3 * value.abs().max() + 1e-4
                    assert near.double().mean() > 0.999, (task, key)
            for same in (array, Image.fromarray(array), at / "a.png", str(at / "a.png"),
                         Image.open(lying)):
                for key, value in flattened(model(same)).items():
                    assert torch.equal(value, flattened(answers[1][1])[key]), (task, key)
        for bad in (photos[0].float(), photos[0][:, :1, :1], np.zeros((4, 4, 4), np.uint8), 7):
            with raises(InputError, "photo"):
                asked("depth")(bad)


def test_what_is_written_is_what_eval_grades():
    """What --json writes for exported scenes, read back as a stranger would, is photo by photo what
    --eval of the script gives to its metric, whose score it therefore gets."""
    graded = {}

    def noting(kind):
        def update(metric, *what, real=kind.update):
            graded.setdefault(kind, []).append(what)
            return real(metric, *what)
        return patched(kind, update=update)

    def both(task, root, photos, *more):
        """Ask about the photos, then grade -> the folder of what is written."""
        graded.clear()
        path = untrained(task, at / task, root)
        code, said = ask(path, photos, "--out", at / f"o{task}", "--json", "--batch-size", 2, *more)
        assert code == 0, said
        script, *flags = ASKED[task]
        flags += ["--batch-size", 2, "--data", root, "--workers", 0, "--out", at / task, "--eval"]
        script.main(args_for(script, *flags))
        assert all(len(updates) == 4 for updates in graded.values())
        return at / f"o{task}"

    def compare(rows, answer, names, field, values, convert=np.asarray):
        """Entries of a COCO results file with the answers that one photo got."""
        assert len(rows) == len(answer["scores"]) > 0
        assert_close(torch.tensor([r["score"] for r in rows]).double(),
                     torch.as_tensor(answer["scores"]).double(), 1e-5, "scores")
        assert [names[r["category_id"]] for r in rows] == [kinds[k] for k in answer["labels"]]
        found = np.stack([convert(r[field]) for r in rows]).reshape(np.shape(answer[values]))
        assert np.abs(found - np.asarray(answer[values], float)).max() < 1e-3, field

    read = lambda path: json.loads(path.read_text())
    named = lambda content: {c["id"]: c["name"] for c in content["categories"]}
    of = lambda rows, i: [r for r in rows if r["image_id"] == i]
    with folder() as at, quiet(), noting(metrics.AveragePrecision), noting(metrics.MeanIoU), \
            noting(metrics.PanopticQuality), noting(metrics.DepthErrors):
        root = exported(at / "coco", "coco", 4)
        photos, notes, kinds = root / "val2017", root / "annotations", toyworld.CLASSES
        out, names = both("detection", root, photos), named(read(notes / "instances_val2017.json"))
        for i, answer, _ in graded[metrics.AveragePrecision]:
            corners = lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
            compare(of(read(out / "detections.json"), i), answer, names, "bbox", "boxes", corners)

        persons = read(notes / "person_keypoints_val2017.json")
        fill(at, {"boxes.json": json.dumps([e | {"score": 1.0} for e in persons["annotations"]])})
        out = both("pose", root, photos, "--boxes", at / "boxes.json")
        for i, answer, _ in graded[metrics.AveragePrecision]:
            if rows := of(read(out / "keypoints.json"), i):
                compare(rows, answer, named(persons), "keypoints", "keypoints")
        assert len(read(out / "keypoints.json")) == sum(
            len(answer["scores"]) for _, answer, _ in graded[metrics.AveragePrecision]) > 0

        truth, out = read(notes / "panoptic_val2017.json"), both("segmentation", root, photos)
        names, ids = named(truth), np.array([c["id"] for c in truth["categories"]])
        for i, ((_, found, _), (labels, _), (segments, classes, *_)) in enumerate(zip(
                *(graded[getattr(metrics, k)] for k in ("AveragePrecision", "MeanIoU",
                                                       "PanopticQuality")))):
            compare(of(read(out / "instances.json"), i), found, names, "segmentation", "masks",
                    lambda s: cocomask.mask(s, 64, 64))
            entry, name = read(out / "panoptic.json")["annotations"][i], f"{i:012d}.png"
            assert np.array_equal(files.read_labels(out / "semantic" / name), ids[labels])
            assert (entry["image_id"], entry["file_name"]) == (i, name)
            colours = np.asarray(Image.open(out / "panoptic" / name)).astype(int)
            written = colours @ (1, 256, 65536)
            assert len(entry["segments_info"]) == len(classes) and classes
            assert np.array_equal(written == 0, segments == 0)
            for own, (k, label) in zip(entry["segments_info"], classes.items()):
                assert np.array_equal(written == own["id"], segments == k)
                assert names[own["category_id"]] == kinds[label]

        root = exported(at / "nyu", "nyu", 4)
        out = both("depth", root, root / "test")
        for path, (found, *_) in zip(sorted((out / "depth").iterdir()),
                                     graded[metrics.DepthErrors]):
            metres = np.asarray(Image.open(path)) / 1000
            assert metres.std() > 0 and np.abs(metres - found).max() < 5.01e-4


def test_results_have_the_numbers_of_the_files():
    """Label maps of the values 0, 7, 200 come back by their own values; the ids of photos from a
    file or from their names; outputs of photos with the same name have different names."""
    with folder() as at, quiet():
        values = np.array([0, 7, 200], np.uint8)
        for split in ("train", "val"):
            write_photo(at / f"maps/images/{split}/0.jpg", (48, 48))
            fill(at, {f"maps/labels/{split}/0.png": values[np.indices((48, 48))[1] // 16]})
        best = untrained("segmentation", at / "seg", at / "maps", "--tasks", "semantic")
        model = predict.load(best, "cpu")
        assert model.classes == ["0", "7", "200"]
        every = {"semantic": torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)}
        assert resultfiles.entries(model, every, 0, "hand", at / "o") == {}
        assert files.read_labels(at / "o/semantic/hand.png").tolist() == [[0, 7, 200, 7]]
        far = 2 ** 20 + 1                                   # all segments have different numbers
        every = {"panoptic": torch.tensor([[0, 1, far]]),
                 "segments": torch.tensor([[1, 0], [far, 2]])}
        entry, = resultfiles.entries(model, every, 0, "hand", at / "o")["panoptic"]
        assert len({s["id"] for s in entry["segments_info"]} - {0}) == 2
        every = {"masks": torch.tensor([[[0, 0, 0], [1, 0, 0]]]).bool(),    # runs down the columns
                 "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
        entry, = resultfiles.entries(model, every, 9, "hand", at / "o")["instances"]
        assert entry == dict(image_id=9, category_id=200, score=0.5,
                             segmentation=dict(size=[2, 3], counts="114"))

        names = [Path("in", n) for n in ("000000000139.jpg", "b.jpg", "7.png")]
        assert resultfiles.image_ids(names) == [139, "b.jpg", 7]
        fill(at, {"ids.json": {"images": [{"id": 1003, "file_name": "train\\b.jpg"},
                                          {"id": 1007, "file_name": "7.png"}]}})
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert resultfiles.image_ids(names, at / "ids.json") == [139, 1003, 1007]
        assert "1 of 3 photos" in said.getvalue()
        fill(at, {"ids.json": {"images": [      # as tools spell names; a text stays a text
            {"id": "007", "file_name": "/data/local-files/?d=set/000000000139.JPG"},
            {"id": 8.0, "coco_url": "http://x/val2017/B.jpg"},
            {"id": "a", "file_name": "%37.png"}]}})
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert resultfiles.image_ids(names, at / "ids.json") == ["007", 8, "a"]
        assert not said.getvalue()
        names = [Path("in", n) for n in ("a/0.png", "b/0.png", "b/00.png", "2.png", "a/x.jpg")]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            ids = resultfiles.image_ids([*names, names[3]])
        assert ids == ["in/a/0.png", "in/b/0.png", "in/b/00.png", 2, "x.jpg", 2]
        assert "both have the id 0" in said.getvalue()
        with raises(InputError, "--boxes persons.json", "id 0", "--ids"):
            resultfiles.image_ids(names, boxes="persons.json")
        fill(at, {"ids.json": {"images": [{"id": 5, "file_name": "a/0.png"},
                                          {"id": 6, "file_name": "b/0.png"}]}})
        assert resultfiles.image_ids(names, at / "ids.json", "x.json")[:2] == [5, 6]
        fill(at, {"ids.json": {"images": [{"id": None, "file_name": "b.jpg"}]}})
        with raises(InputError, "--ids", "image None"):
            resultfiles.image_ids(names, at / "ids.json")
        long = "x" * 249
        for names, expected in ((["x/a.jpg", "y/A.png", "z/a.jpg"], ["a", "A.png", "a.jpg"]),
                                ([f"{long}.jpg", f"{long}.png"], [long[:200], f"{long[:200]}-2"]),
                                (["a.jpg", "a-attention.jpg"], ["a", "a-attention.jpg"])):
            assert [name for _, name in resultfiles.find(names, at / "o")] == expected
        for name in ("a.jpg", "semantic/a.jpg", "o/semantic/hand.jpg"):
            write_photo(at / "ph" / name)
        found = [name for _, name in resultfiles.find([at / "ph"], at / "ph/o")]
        assert found == ["a", "semantic/a.jpg"]             # a label map may be semantic/a.png
        twice = resultfiles.find([at / "ph/a.jpg", at / "ph", at / "ph/a.jpg"], at / "ph/o")
        assert [name for _, name in twice] == found
        content = torch.load(best)
        content["category_ids"][2] = 100_001
        torch.save(content, best)
        untrained("depth", at, "toyworld:2", "--max-depth", 80)
        for file, word in ((best, "100001"), (at / "best.pt", "65.534")):
            code, said = ask(file, at / "ph", "--json", "--out", at / "new")
            assert code == 2 and word in said and not (at / "new").exists(), said


def test_run_lengths_round_trip():
    """Masks -> COCO's run lengths and string -> masks, empty and full ones among them."""
    generator = np.random.default_rng(0)
    for h, w in ((1, 1), (5, 7), (40, 3), (64, 90)):
        for share in (0, 0.02, 0.5, 1):
            mask = ndimage.binary_dilation(generator.random((h, w)) < share) if share < 1 else \
                np.ones((h, w), bool)
            runs = cocomask.to_runs(mask)
            text = cocomask.compressed(runs)
            assert cocomask.decompressed(text) == runs and sum(runs) == h * w
            for counts in (runs, text):
                assert np.array_equal(cocomask.from_runs(counts, h, w), mask)
    # as pycocotools writes it
    assert cocomask.compressed([6, 1, 40, 4, 5, 4, 5, 4, 21]) == "61X13mN000`0"


def test_pictures_change_where_objects_are():
    """An empty answer leaves the photo as it is; an object changes its own pixels and its label's,
    which stays inside the picture, on black, on white, on small and on large photos."""
    names = ["a long name of something", "b", "c"]
    for (h, w), value in itertools.product(((30, 40), (96, 96), (700, 900)), (0, 255)):
        photo = torch.full((3, h, w), value, dtype=torch.uint8)
        same, zoom = draw.canvas(photo)
        same = np.asarray(same).astype(int)
        assert 480 <= max(same.shape) <= max(640, h, w) and same.shape[0] == h * zoom
        mask, empty = torch.zeros(1, h, w, dtype=torch.bool), torch.zeros(h, w, dtype=torch.uint8)
        mask[0, h // 2:h * 3 // 4, w // 4:w // 2] = True
        ids, label = mask[0].int(), torch.where(mask[0], 1, 255)
        box = torch.tensor([[w // 4, h // 2, w // 2, h * 3 // 4]]).float()
        joints = box[0, :2] + torch.rand(1, 17, 2) * (box[0, 2:] - box[0, :2])
        pairs = {
            "boxes": (draw.boxes(photo, box[:0], [], []), draw.boxes(photo, box, [0], ["x 0.50"])),
            "masks": (draw.instances(photo, mask[:0], []),
                      draw.instances(photo, mask, ["x 0.50"])),
            "semantic": (draw.semantic(photo, empty + 255, names),
                         draw.semantic(photo, label, names)),
            "panoptic": (draw.panoptic(photo, 0 * ids, {}, names, 1),
                         draw.panoptic(photo, ids, {1: 1}, names, 1)),
            "pose": (draw.skeletons(photo, joints, torch.full((1, 17), 0.2), ["0.50"]),
                     draw.skeletons(photo, joints, torch.ones(1, 17), [""]))}
        room = 6 * draw.letters(max(same.shape))            # for the label and the width of lines
        top, left = h // 2 * zoom - room // 2, w // 4 * zoom - room // 4
        bottom, right = h * 3 // 4 * zoom + room // 4, w // 2 * zoom + room
        for kind, (nothing, one) in pairs.items():
            assert np.array_equal(np.asarray(nothing), same), kind
            changed = (np.asarray(one).astype(int) != same).any(2)
            assert changed.any(), kind
            changed[max(0, top):bottom, max(0, left):right] = False
            assert not changed.any(), (kind, h, w)


def test_pictures_show_the_best_on_top():
    """Masks and boxes of the surest object lie over the others; a joint is drawn at its pixel's
    centre; the scale of depth runs as its map; names go with their scores."""
    black, full = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(2, 8, 8).bool()
    one, two = (draw.instances(black, full[:n], [""] * n) for n in (1, 2))
    assert np.array_equal(one, two)
    two = np.asarray(draw.boxes(black, [[1, 1, 6, 6]] * 2, [0, 1], ["", ""]))
    assert (two == draw.colour_of(0)).all(2).any() and not (two == draw.colour_of(1)).all(2).any()
    photo = torch.zeros(3, 32, 32, dtype=torch.uint8)
    one = draw.skeletons(photo, torch.full((1, 1, 2), 16.0), torch.ones(1, 1), [""], ())
    x = np.nonzero(np.asarray(one).any(2))[1]
    assert abs((x.min() + x.max() + 1) / 2 - 16.5 * one.width / 32) <= 1
    bar = np.asarray(pictures.ruler(240, 12, 1, 4))
    shades = np.asarray(draw.depth_map(np.array([[1.0, 4]]), 1, 4))
    assert np.array_equal(bar[8, [12, 227]], shades.transpose(1, 2, 0)[0])
    model, said = argparse.Namespace(task="segmentation", classes=["a", "b"]), []
    answer = dict(scores=torch.tensor([0.1, 0.9]), names=["a", "b"], masks=full)
    with patched(draw, instances=lambda photo, masks, texts: said.append((len(masks), texts))):
        pictures.show(model, black, answer, 0.3)
    assert said == [(1, ["b 0.90"])]


def test_labels_stay_readable():
    """Labels lie within the picture and do not overlap, however crowded; neighbours in a list of
    classes have different colours, to the colour-blind too."""
    every, real = [], draw.Labels.__init__

    def init(self, image):
        real(self, image)
        every.append(self)
    generator = torch.Generator().manual_seed(0)
    with patched(draw.Labels, __init__=init):
        for h, w in ((96, 96), (60, 400), (1500, 2000)):
            corner = torch.rand(40, 2, generator=generator) * torch.tensor([w, h]) * 0.8
            boxes = torch.cat([corner, corner + 0.2 * torch.tensor([w, h])], 1)
            draw.boxes(torch.zeros(3, h, w, dtype=torch.uint8), boxes, [0] * 40,
                       ["something with a very long name " * 3] + ["person 0.99"] * 39)
    for taken, width, height in ((x.taken, x.width, x.height) for x in every):
        assert len(taken) > 2 and (taken[:, :2] >= 0).all()
        assert (taken[:, 2] <= width).all() and (taken[:, 3] <= height).all()
        shared = metrics.box_intersections(taken, taken)
        assert not (shared - np.diag(shared.diagonal())).any()
    # Viénot 1999: what two kinds of colour-blind people see, on linear light
    linear = (draw.palette()[:21].astype(float) / 255) ** 2.2
    for matrix in ([[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]],
                   [[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]], np.eye(3)):
        seen = (linear @ np.transpose(matrix)).clip(0, 1) ** (1 / 2.2) * 255
        assert np.abs(np.diff(seen, axis=0)).max(1).min() > 40
    assert len(np.unique(draw.palette()[:21], axis=0)) == 21


def test_asking_with_wrong_input():
    """A broken photo among four is named and the others are answered; all else that is wrong ends
    in one line; nothing is left half written."""
    with folder() as at, quiet():
        for i in range(10, 14):
            write_photo(at / f"in/{i}.jpg", (48, 64))
        fill(at, {"in/13.jpg": (at / "in/10.jpg").read_bytes()[:700], "file": "x",
                  "dot.png": np.zeros((1, 1, 3), np.uint8)})
        (at / "none").mkdir()
        torch.save({"a": torch.zeros(1)}, at / "foreign.pt")
        (at / "broken.pt").write_bytes(b"PK\x03\x04 broken")
        best = untrained("detection", at)
        code, said = ask(best, at / "in", "--out", at / "o", "--json")
        assert code == 2 and said.count("13.jpg") == 2 and "1 of 4" in said, said
        assert sorted(p.name for p in (at / "o").iterdir()) == [
            "10.png", "11.png", "12.png", "detections.json"]
        assert {e["image_id"] for e in json.loads((at / "o/detections.json").read_text())} \
            == {10, 11, 12}
        new = ["--out", at / "new"]
        for flags, words in (([at / "none", *new], "no images"),
                             ([at / "nowhere.jpg", *new], "no such file"),
                             ([at / "dot.png", *new], "larger photo"), (["", *new], "empty name"),
                             ([at / "in", "--out", at / "file"], "is a file"),
                             ([at / "in", "--boxes", at / "file", *new], "--boxes"),
                             ([at / "in", "--detector", best, *new], "--detector")):
            code, said = ask(best, *flags)
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(errors) == 1 and words in errors[0], said
        photo = Image.open(at / "in/10.jpg").copy()
        (at / "mine/semantic").mkdir(parents=True)
        for name in ("a.png", "semantic/b.png"):
            photo.save(at / "mine" / name)
        photo.save(at / "mine/c.jpg")
        photo.save(at / "mine/c.png")                       # perhaps its label map
        before = {path: path.read_bytes() for path in at.glob("mine/**/*.png")}
        for asked_for, name in ((at / "mine", "a.png"), (at / "mine/semantic/b.png", "b.png"),
                                (at / "mine/c.jpg", "c.png")):
            code, said = ask(best, asked_for, "--out", at / "mine", "--json")
            assert code == 2 and "overwritten" in said and name in said, said
        assert before == {path: path.read_bytes() for path in at.glob("mine/**/*.png")}
        for path in ("foreign.pt", "broken.pt", "file", "no.pt"):
            code, said = ask(at / path, at / "in")
            assert code == 2 and said.startswith("error: ") and path in said, said
        assert not list(at.glob("**/*.tmp"))


def test_attention_is_the_decoders():
    """What --attention shows are the weights by which the decoder mixes values; every task has its
    picture, of the queries that there are."""
    model = asked("detection")
    photo = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    net, (images, layout) = model.network, model.inputs([photo])
    cross, mixed = net.glid.decoder.layers[-1].cross, []
    hook = cross.register_forward_hook(lambda m, inputs, out: mixed.append(inputs))
    with torch.no_grad(), attention.recorded(net.glid.decoder) as seen:
        net(M.normalize(images), layout)
        hook.remove()
        (query, key, value, _), = mixed
        assert len(seen) == 3 and seen[-1][0] is cross
        share = attention.weights(*seen[-1])
        q, k = (x[0].unflatten(-1, (cross.heads, -1)).transpose(0, 1)
                for x in (cross.q(query), cross.k(key)))
        each = F.scaled_dot_product_attention(q, k, torch.eye(k.shape[1]).expand(len(k), -1, -1))
        assert_close(share, each.mean(0), 1e-5)
        with patched(cross, heads=1):               # with several, each mixes values of its own
            one = attention.weights(cross, query, key) @ cross.v(value)[0]
            assert_close(cross.out(one), cross(query, key, value)[0], 1e-4)
    for task in ASKED:
        model = asked(task)
        picture = attention.attention(model, photo, model(photo), [1])
        assert picture.width > 4 * 100 and picture.height > 100
        with raises(InputError, "--queries 999"):
            attention.attention(model, photo, model(photo), [999])
    model, queries, titles, real = asked("pretraining"), [], [], attention.weights
    with attention.recorded(model.network.glid.decoder) as raw, patched(
            attention, weights=lambda m, q, k: queries.append(q) or real(m, q, k)), patched(
            pictures, titled=lambda images, words: titles.append(words) or images[0]):
        attention.attention(model, photo, {}, [1])
    assert torch.equal(queries[0][:, 0], raw[0][1][:, 2])       # behind those of [CLS] and unit 0
    assert titles[0][1:] == ["1/16", "1/8", "1/4"]


def test_pose_asks_for_persons():
    """Persons come from boxes, photo by photo, from a detector's persons alone, or are the whole
    photo; whom the detector is less sure of than the threshold is not asked about."""
    model, photo = asked("pose"), drawn.ToyWorld("val", 1, 64)[0]["image"].as_subclass(torch.Tensor)
    assert model(photo[:, :48])["boxes"].tolist() == [[0, 0, 64, 48]]
    boxes = [[4, 8, 40, 60], [20, 10, 60, 50]]
    for answer, own in zip(model([photo, photo], [boxes, boxes[1:]]), (boxes, boxes[1:])):
        assert sorted(answer["boxes"].tolist()) == own
        assert answer["keypoints"].shape == (len(own), 17, 3)
    assert len(model(photo, np.zeros((0, 4)))["keypoints"]) == 0
    assert model(photo, tuple(map(tuple, boxes)))["boxes"].tolist() == model(photo, boxes)[
        "boxes"].tolist()
    for photos, given, word in (([photo] * 2, [boxes], "1 entries for 2"), (photo, [[0]], "[P, 4]"),
                                (photo, [[0, 0, np.nan, 9]], "finite"),     # a detector's rows:
                                (photo, [[4, 8, 40, 60, 0.9, 0]] * 2, "[P, 4]"),
                                ([photo] * 4, boxes[0], "[P, 4]"), (photo, 5, "[P, 4]")):
        with raises(InputError, word):
            model(photos, given)
    with raises(InputError, "pose checkpoints", "detection"):
        asked("detection")(photo, boxes)
    with folder() as at, quiet():
        paths = [untrained(t, at / t) for t in ("pose", "detection")]
        model = predict.load(paths[0], "cpu", detector=paths[1], threshold=0.0)
        found = model.detector(photo)
        assert model.persons.tolist() == [0] and model.kinds == ["person"]
        sure = found["scores"][found["labels"] == 0]
        assert 1 < len(sure) < len(found["labels"])
        with patched(model.network, forward=model.network.forward), patched(
                pose, views=lambda photo, boxes, *a, real=pose.views: asked_for.append(
                    boxes.tolist()) or real(photo, boxes, *a)):
            asked_for = []
            for threshold, count in ((0.0, len(sure)), (sure[0].item(), 1)):
                model.threshold = threshold
                model(photo)
                assert len(asked_for[-1]) == count
            assert asked_for[0] == found["boxes"][found["labels"] == 0].tolist()


def test_curves():
    """Losses and metrics of two logs, one still being written; what is no log is named."""
    rows = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in range(20, 200, 20)]
    rows += [{"step": 180, "mIoU": 0.5, "nothing": math.nan, "APm": -1}]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    with folder() as at:
        fill(at, {"a/log.jsonl": text, "b/log.jsonl": text + '{"step": 200, "lo', "c": "{no log}"})
        logs = {n: curves.read_log(at / n) for n in "ab"}
        assert logs["a"] == logs["b"] == {"loss": [(s, 1 / s) for s in range(20, 200, 20)],
                                          "mIoU": [(180, 0.5)]}
        picture = curves.figure(logs)
        assert picture.width == 2 * curves.WIDTH and picture.height > curves.HEIGHT
        # the only point is the last step, on the right, at the middle height; b lies on top of a
        at_b = np.argwhere((np.asarray(picture)[:curves.HEIGHT] == curves.COLOURS[1]).all(2))
        dot = at_b[at_b[:, 1] > picture.width - curves.RIGHT - 4]
        middle = (curves.TOP + curves.HEIGHT - curves.BOTTOM) / 2
        assert len(dot) and np.abs(dot[:, 0] - middle).max() < 5
        assert np.allclose(draw.ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1])
        assert (np.asarray(curves.legend(["a long name " * 9], 520))[:, -15:] == 255).all()
        first, second = (np.argwhere((np.asarray(curves.legend(["a", "b"], 520)) == colour).all(2))
                         for colour in curves.COLOURS[:2])
        assert len(first) and len(second) and first[:, 1].max() < second[:, 1].min()
        for run, word in ((at / "c", "not a log"), (at / "d", "cannot be read")):
            with raises(InputError, word):
                curves.read_log(run)
        with raises(InputError, "--metric PQ", "mIoU"):
            curves.figure(logs, ["PQ"])


def code_blocks(page):
    """The Python of a page of ours."""
    return [x.split("```")[0] for x in (HERE / page).read_text().split("```python\n")[1:]]


def test_new_task():
    """docs/new_task.md: its script learns 8 photos, with the parts of a pre-trained file."""
    (code,) = code_blocks("docs/new_task.md")
    with folder() as at, contextlib.redirect_stdout(io.StringIO()) as said:
        for old, new in (("out/pretrain/best.pt", str(untrained("pretraining", at))),
                         ("toyworld:256:128", "toyworld:8"), ("range(120)", "range(20)"),
                         ("(16,)", "(8,)")):
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        with patched(data, open_sources=functools.partial(data.open_sources, overfit=True)):
            exec(code, names := {})
    assert all(f"{part}: loaded" in said.getvalue() for part in checkpoints.PARTS)
    drawn = [np.unique(toyworld.scene(0, i, 64)["semantic"]).tolist() for i in range(8)]
    assert [row.nonzero()[:, 0].tolist() for row in names["present"]] == drawn
    assert names["wrong"] < names["constant"] / 2, (names["wrong"], names["constant"])


def test_export():
    """docs/export.md: as one graph a network of any task answers as itself, through a file."""
    export, load, hidden = code_blocks("docs/export.md")
    export = export.replace('load("best.pt", device="cpu")', "MODEL")
    first, last = export.split("photo = torch.zeros(1")
    square = first + hidden + "height = width = side\nphoto = torch.zeros(1" + last
    pose_size = export.replace("height, width = 128, 96", "height, width = model.args.size")
    for task, code in (("segmentation", export), ("detection", export), ("depth", export),
                       ("pose", pose_size), ("pretraining", square)):
        with folder() as at, quiet():
            in_file = lambda code, at=at: code.replace('"network.pt2"', f'"{at}/network.pt2"')
            once = task == "detection"              # through the file; the others as they are
            exec(in_file(code if once else code.split("torch.export.save")[0]),
                 names := {"MODEL": asked(task)})
            again = {} if once else {"network": names["program"].module()}
            if once:
                exec(in_file(load.split("answer")[0]), again)
            photo = torch.randint(0, 256, names["photo"].shape, dtype=torch.uint8)
            found, own = (torch.utils._pytree.tree_leaves(network(photo))
                          for network in (again["network"], names["fixed"]))
        assert len(found) == len(own) > 0
        for x, y in zip(found, own):
            assert_close(x, y, 1e-4, task)


# -----------------------------------------------------------------------------
# The command line


def test_wrong_input_is_one_line():
    """Each wrong input ends with exit code 2 and one line naming the file or the flag."""
    with folder() as at:
        for i in range(8):
            write_photo(at / f"photos/{i}.jpg", (80, 80))
        (at / "photos/0_broken.jpg").write_bytes((at / "photos/1.jpg").read_bytes()[:700])
        (at / "used").mkdir()
        (at / "lone").mkdir()
        torch.save({}, at / "used/last.pt")
        torch.save({}, at / "lone/best.pt")
        toy = ["--data", "toyworld:4", "--batch-size", 4]
        cases = [
            (pretrain, "nowhere", "--data", at / "nowhere"), (pretrain, "--data", "--data", ""),
            (pretrain, "0_broken.jpg", "--data", at / "photos", "--batch-size", 2, "--workers", 1),
            (pretrain, "--batch-size", "--data", at / "photos", "--batch-size", 64),
            (pretrain, "--lr", *toy, "--data", "toyworld:8", "--lr", 1e30, "--workers", 0),
            (pretrain, "--resume", *toy, "--out", at / "used"),
            (finetune_seg, "holds best.pt", *toy, "--init", at / "lone/best.pt",
             "--out", at / "lone"),
            *((finetune_seg, f"{flag} is empty", flag, "") for flag in
              ("--init", "--out", "--init-backbone", "--data")),
            (pretrain, "--out", *toy, "--out", at / "photos/1.jpg"),
            (pretrain, "--decoder-layers", *toy, "--decoder-layers", 4),
            (finetune_seg, "--init", *toy, "--init", at / "photos/1.jpg"),
            (finetune_seg, "no.pt", *toy, "--init", at / "no.pt"),
            (finetune_seg, "--data", "--data", at / "photos"),
            (finetune_seg, "--init-backbone", *toy, "--init-backbone", at / "photos/1.jpg"),
            (finetune_seg, "best.pt", *toy, "--eval"),
            (finetune_seg, "last.pt", *toy, "--resume"),
            (finetune_seg, "--init", "--load", "neck"),
            (finetune_seg, "--queries 5,6", *toy, "--queries", "5,6"),
            *((finetune_seg, flag, flag, value) for flag, value in
              (("--data-fraction", 0), ("--queries", 0), ("--tasks", "semantic,depth"),
               ("--tasks", "instance,instance"), ("--tasks", ","))),
            (pretrain, "toyworld:x", "--data", "toyworld:x"),
            *((pretrain, flag, flag, value) for flag, value in
              (("--steps", 0), ("--epochs", -1), ("--batch-size", 0), ("--accumulate", "two"),
               ("--workers", -1), ("--lr", "nan"), ("--lr", 0), ("--seed", 10 ** 23),
               ("--steps", "9" * 400), ("--window", 0), ("--mask-ratio", 1), ("--mask-ratio", 0),
               ("--save-every", 0), ("--warmup-epochs", "inf"), ("--decoder-layers", 0),
               ("--weight-decay", -1))),
        ]
        for script, word, *flags in cases:
            flags = ["--data", "toyworld:4", "--out", at / "new", *flags]
            code, said = ended(lambda args, s=script: s.main(args_for(s, *args)), flags)
            errors = [x for x in said.splitlines() if x.startswith("error: ")]
            assert code == 2 and len(errors) == 1 and word in errors[0], (word, code, said)
            assert "Traceback" not in said, said
        assert not (at / "new/last.pt").exists()


def reproduced(at, table, *flags):
    """reproduce.py's Markdown of a table, its runs and results in `at`."""
    return reproduce.main(reproduce.flags().parse_args(
        [table, "--out", str(at / "out"), "--results", str(at / "results"), *flags]))


def test_reproduce_makes_every_table_once():
    """Each table and figure in its smallest size; runs that tables share are made once, one that
    was stopped goes on, and a run of other flags is not taken for ours."""
    size = "--data toyworld:10:1 --workers 0 --batch-size 1 --steps 1"
    tiny = {"all": "--preset tiny", "pretrain": size, **dict.fromkeys(reproduce.TASKS, size)}
    made, real = [], reproduce.do
    note = lambda fit, version: made.append(fit) or real(fit, version)
    with folder() as at, quiet(), mock.patch.dict(reproduce.RECIPES, tiny=tiny), \
            patched(reproduce, do=note):
        for table, runs in (("table3", 8), ("table4", 3), ("table5", 4), ("table6", 4),
                            ("table7", 8), ("table8", 9), ("figure5", 0), ("decoder", 11)):
            before, flags = len(made), ["--tasks", "semantic"] * (table != "table3")
            text = reproduced(at, table, "--seeds", "1", *flags)
            assert len(made) - before == runs, (table, len(made) - before)
            rows = len(reproduce.TABLES[table][1])
            if table != "table3":                           # other tasks were made for table3
                text = text.split("| semantic, ")[1].split("\n\n")[0]
            assert text.count("| 1 |") == (12 if table == "table3" else rows), text
            assert len(json.loads((at / f"results/{table}-tiny.json").read_text())) > rows / 2
        reproduced(at, "figure4", "--tasks", "depth,detection")
        for name, least in (("figure4", 700), ("figure5", 300)):
            assert Image.open(at / f"results/{name}-tiny.png").height > least
        fit = made[1]
        Path(fit.out, "run.json").unlink()                  # as if it were stopped before its end
        assert real(fit, "abc") | {"seconds": 0} == {
            "script": "finetune_seg", "flags": list(fit.argv), "seconds": 0, "resumed": True,
            "device": reproduce.device(), "commit": "abc",
            "evaluations": [e for e in map(json.loads, Path(fit.out, "log.jsonl").open())
                            if "mIoU" in e]}
        with raises(InputError, "--out", "other flags"):
            real(fit._replace(argv=(*fit.argv, "--lr", "1")), "abc")
        with raises(InputError, "--data", "imagenet/"):     # before the first run, not days later
            reproduced(at / "new", "table4", "--data", str(at))


def test_reproduce_ends_and_goes_on():
    """A run that fails is named, ends those beside it, and none is begun after it; one that was
    stopped in parts has the seconds and the commits of all of them."""
    with folder() as at, quiet():
        flags = "--preset tiny --data toyworld:20:2 --workers 0 --batch-size 2 --steps".split()
        fits = [reproduce.Fit("pretrain", str(at / name), (*flags, *more)) for name, *more in (
            ("bad", "1", "--mask-ratio", "0.99"), ("long", "3000"), ("next", "1"))]
        with raises(InputError, fits[0].out, "--mask-ratio"):
            list(reproduce.at_once(fits, "abc", 2))
        assert not reproduce.finished(fits[1]) and not (at / "next").exists()

        def stopped(_):
            time.sleep(0.2)
            raise Stopped(2, "--resume goes on")
        with patched(pretrain, main=stopped):
            for version, seconds in (("abc", 0.2), ("def", 0.4)):
                with raises(Stopped, "the same command goes on"):
                    reproduce.do(fits[2], version)
                assert reproduce.recorded(fits[2])["seconds"] >= seconds
        assert not reproduce.finished(fits[2])
        made = reproduce.do(fits[2], "def")
        assert made["commit"] == "abc def" and made["seconds"] > 0.4 and made["evaluations"]


def test_reproduce_leaves_no_process():
    """A run ends with the reproduce.py that was killed, and lets go of its folder."""
    with folder() as at:
        fit = reproduce.Fit("pretrain", str(at), tuple(
            "--preset tiny --data toyworld:20:2 --workers 0 --batch-size 2 --save-every 1 --steps "
            "100000".split()))
        code = f"import reproduce; list(reproduce.at_once([reproduce.{fit}], 'abc', 2))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, start_new_session=True,
                                   stderr=subprocess.DEVNULL)
        while not (at / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        assert training.claim(at) is None
        process.kill()
        process.wait()
        for _ in range(1000):                               # at once, or never
            if lock := training.claim(at):
                return lock.close()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the run goes on")


def test_reproduce_compares_pairs():
    """Means, standard errors, paired differences and those of each pre-training, of known
    figures; which seed starts where."""
    with folder() as at, quiet(), mock.patch.object(reproduce, "do", side_effect=AssertionError):
        args = reproduce.flags().parse_args(["table4", "--out", str(at / "out")])
        # the third seed of the second row is missing: only two are pairs
        half = reproduce.TABLES["table8"][1][8]             # of the labels, + decoder
        table = (10, 12, 17), (13, 17), (1, 1, 1, 1), (2, 4, 2, 8), (9, 9)
        for row, values in zip((*reproduce.PARTS, half), table):
            for seed, value in enumerate(values):
                fit = reproduce.finetuning(args, row, "semantic", seed)
                Path(fit.out).mkdir(parents=True)
                Path(fit.out, "run.json").write_text(json.dumps({"flags": fit.argv, "evaluations": [
                    {"step": 1, "mIoU": 0}, {"step": 2, "mIoU": value / 100}]}))
        args.tasks, args.results = ["semantic"], str(at / "results")
        lines = reproduce.report(args)[0].splitlines()
        assert ("| backbone | 2 | 15.0 ± 2.0 | +4.0 ± 1.0 (+3.0, +5.0) | 7.5 ± 1.0 | +2.0 ± 0.5 "
                "(+1.5, +2.5) | 50.9 |") in lines
        assert ("| + decoder | 4 | 4.0 ± 1.4 | +3.0 ± 1.4 (+4.0, +3.0, +1.0) | 2.0 ± 0.7 | "
                "+1.5 ± 0.7 (+2.0, +1.5, +0.5) | 52.7 |") in lines
        assert ("| + BiFPN | 4 | 1.0 ± 0.0 | -14.0 ± 2.0 (-12.0, -16.0); 2 pairs | 0.5 ± 0.0 | "
                "-7.0 ± 1.0 (-6.0, -8.0); 2 pairs | 51.1 |") in lines
        args.table = "table8"                               # nothing to compare with other labels
        text = reproduce.report(args)[0]
        assert "| 50% of the labels, + decoder | 2 | 9.0 ± 0.0 |  | 4.5 ± 0.0 |  | 46.3 |\n" in text
        assert "| 100% of the labels, backbone | 2 | 15.0 ± 2.0 |  | 7.5 ± 1.0 |  |  |\n" in text
        args.table = "figure5"                              # each evaluation
        text = reproduce.report(args)[0]
        assert "mIoU | seeds | step 1 | difference | step 2 | difference | paper |\n" in text
        assert ("| + decoder | 4 | 0.0 ± 0.0 | +0.0 ± 0.0 (+0.0, +0.0, +0.0) | "
                "4.0 ± 1.4 | +3.0 ± 1.4 (+4.0, +3.0, +1.0) | 52.7 |\n") in text
        drawn, small = [], Image.new("RGB", (9, 9))         # its curves, and who they are
        with patched(curves, panel=lambda title, lines: drawn.append(lines) or small,
                     legend=lambda labels, width: drawn.append(labels) or small):
            reproduce.convergence(reproduce.report(args)[1])
        assert drawn[0]["+ decoder"] == [(1, 0), (2, 0.04)]
        assert drawn[1] == [row.label for row in reproduce.PARTS]
        fits = [reproduce.finetuning(args, reproduce.PARTS[3], "depth", s) for s in range(4)]
        starts = [f.argv[f.argv.index("--init") + 1] for f in fits]
        assert starts[0] == starts[3] and len(set(starts)) == 3
        assert [f.argv[f.argv.index("--seed") + 1] for f in fits] == list("0123")
        args.preset, args.data = "base", "DATA"             # a tenth of the labels: the same steps
        for task, length in ("detection", "--epochs 500"), ("semantic", "--data-fraction 0.1"):
            argv = reproduce.finetuning(args, reproduce.TABLES["table8"][1][0], task, 0).argv
            assert length in " ".join(argv) and ("--epochs" in argv) == (task == "detection")


def test_flags():
    """Presets change defaults, explicit flags win, the paper's recipe is the default; --help shows
    the defaults of the preset that it is given with."""
    for script in (pretrain, *FINETUNING):
        _, said = ended(lambda args, s=script: args_for(s, "--help"))
        text, tiny = " ".join(said.split()), script.PRESETS["tiny"]
        assert f"(default: {tiny['lr']})" in text and "(default: toyworld" in text
        assert all(f" {group}: --" in text for group in training.GROUPS[:4])
    assert args_for(pretrain, "--epochs", 3).epochs == 3 and args_for(pretrain).data == "toyworld"
    for script, paper in (
            (pretrain, dict(preset="base", epochs=600, warmup_epochs=40, mask_ratio=0.75,
                            batch_size=64, norm_pix=False, weight_decay=0.05, mask="random")),
            (finetune_seg, dict(steps=160_000, size=640, points=12544, lr=1e-4, clip=0.01,
                                batch_size=2, backbone_lr=0.1, drop_path=0.3, weight_decay=0.05,
                                query_lr=1, head_lr=1)),
            (finetune_det, dict(epochs=50, size=800, queries=300, many_queries=1500, repeats=6,
                                batch_size=2, lr=2e-4, backbone_lr=0.1, weight_decay=0.05,
                                clip=0.1, drop_path=0.2)),
            (finetune_depth, dict(steps=38_400, batch_size=2, queries=64, crop=[416, 544], lr=1e-4,
                                  weight_decay=0.01, clip=35, backbone_lr=1, drop_path=0.3,
                                  min_depth=1e-3, max_depth=10)),
            (finetune_pose, dict(epochs=210, size=[256, 192], batch_size=64, lr=5e-4, sigma=2,
                                 zoom=0.5, rotation=40, clip=1, backbone_lr=1, drop_path=0.3,
                                 weight_decay=0.1, warmup_steps=500))):
        args = vars(training.parse(script.flags(), script.PRESETS, ["--data", "x"]))
        assert args | paper == args, script
    for script in finetune_det, finetune_pose:              # H-DETR's and ViTPose's, of large ones
        args = training.parse(script.flags(), script.PRESETS, ["--preset", "large", "--data", "x"])
        assert args.drop_path == 0.5


def test_one_training_step_is_short():
    """All functions of ours that run between the start of pretrain.py's loop and its end, models
    and checkpoints written included, and main and the modules' constructors, together have at most
    900 lines (docstrings and comments count; what draws scenes and pictures does not)."""
    seen, looping = set(), []

    def watch(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent in (HERE, HERE / "formats"):
            built = Path(frame.f_code.co_filename).name in ("model.py", "pretrain.py")
            if frame.f_code is training.Progress.__init__.__code__:
                looping.append(True)
            if looping or built:
                seen.add(frame.f_code)
    with folder() as at, quiet():
        args = args_for(pretrain, "--data", "toyworld:4", "--batch-size", 4, "--workers", 0,
                        "--steps", 1, "--out", at)
        for cached in (M.pixel_statistics, packing.slots_of_units):     # other tests called them
            cached.cache_clear()
        sys.setprofile(watch)
        try:
            pretrain.main(args)
        finally:
            sys.setprofile(None)
    spans = {(c.co_filename, n) for c in seen
             if Path(c.co_filename).name not in ("toyworld.py", "draw.py", "test_all.py")
             and c.co_name not in ("examples", "fill")
             for n in range(c.co_firstlineno, max(x[2] or 0 for x in c.co_lines()) + 1)}
    assert 300 < len(spans) <= 900, f"{len(spans)} lines"


# -----------------------------------------------------------------------------
# What a flag says arrives where it is used


def opened_by(script, *flags):
    """Training and validation set that a script's main opens with these flags."""
    found = []
    with folder() as at, quiet(), patched(script, survey=lambda args, train, val, run: found.extend(
            (train, val)) or fail(InputError("seen"))), raises(InputError, "seen"):
        script.main(args_for(script, "--data", "toyworld:8", "--out", at / "o", *flags))
    return found


def test_pose_loop_does_what_it_says():
    with folder() as at, quiet(), steady_adam():
        args = args_by_hand(finetune_pose, at, "--data", "toyworld:8", "--batch-size", 2, "--steps",
                            4, "--warmup-steps", 2, "--clip", 0.1, "--zoom", 0.3, "--rotation", 20)
        finetune_pose.main(args)
        torch.manual_seed(0)
        net = PoseEstimator(TINY)
        train = pose.open_pose("toyworld:8", (48, 32), augment=(0.3, 20.0))[0]

        def loss_of(parts):
            total = 0
            for images, tokens, people in parts:
                joints, labelled = (torch.stack([p[k] for p in people])
                                    for k in ("joints", "labelled"))
                truth = pose.heatmap_targets(joints, labelled, (48, 32), (24, 16), sigma=1.0)
                total += losses.heatmap_loss(net(M.normalize(images), tokens), *truth) / 2
            return total
        norms, _ = train_by_hand(net, args, train, [training.multistep(
            s, 4, finetune_pose.DROPS, 2) for s in range(4)], loss_of)
    assert norms.min() < 0.1 < norms.max()


def test_reproduce_gives_its_runs_the_flags():
    args = reproduce.flags().parse_args(["table4"])

    def epochs(row):
        argv = reproduce.pretraining(args, row, 0).argv
        return training.parse(pretrain.flags(), pretrain.PRESETS, argv).epochs
    assert [epochs(row) for row in reproduce.TABLES["table7"][1]] == [10] * 5
    assert [epochs(row) for row in reproduce.TABLES["decoder"][1][::2]] == [6, 20, 30, 60, 180, 20]
    argv = reproduce.finetuning(args, reproduce.PARTS[3], "depth", 4).argv
    start = Path(argv[argv.index("--init") + 1])
    assert start.parts[-4:] == ("pretrain", "recipe", "1", "best.pt")
    for row in reproduce.PARTS:
        argv = [*reproduce.finetuning(args, row, "depth", 1).argv, "--load", "END"]
        assert argv[argv.index("--load") + 1] == (row.load or "END")
    for s in range(4):
        assert reproduce.pretraining(args, row, s).argv[-2:] == ("--seed", str(s % 3))
    for row, epochs in zip(reproduce.TABLES["table6"][1][1:], (10, 20, 30)):
        argv = reproduce.pretraining(args, row, 0).argv
        assert training.parse(pretrain.flags(), pretrain.PRESETS, argv).epochs == epochs


def test_crowds_and_areas_reach_the_metric():
    crowd = dict(iscrowd=1, area=4, segmentation=dict(counts=[0, 12, 36], size=[6, 8]))
    seen, real = [], metrics.AveragePrecision.update
    with folder() as at, quiet(), patched(metrics.AveragePrecision, update=lambda *a: (
            seen.append(a[3]), real(*a))):
        for part in ("train", "val"):
            coco(at, [dict(area=7), crowd], f"instances_{part}", 1, f"{part}/{{}}")
        for task, *more in (("detection",), ("segmentation", "--tasks", "instance")):
            untrained(task, at / task, at, *more)
            script, *flags = ASKED[task]
            script.main(args_for(script, *flags, *more, "--data", at, "--workers", 0, "--eval",
                                 "--out", at / task))
    assert len(seen) == 2
    for truth in seen:
        assert np.asarray(truth["iscrowd"]).tolist() == [False, True]
        assert np.asarray(truth["area"]).tolist() == [7, 4]
    metric = mock.Mock()
    finetune_seg.grade("panoptic", metric, (torch.zeros(1, 1), {}), {
        "segments": torch.tensor([[1, 0, 1]]), "panoptic": torch.ones(1, 1)}, 1)
    assert metric.update.call_args[0][3] == [dict(id=1, category=0, iscrowd=1)]


def test_only_training_drops_paths():
    """A loaded model drops nothing, an evaluation ends in the mode in which it began; the rate
    grows from block to block."""
    with folder() as at, quiet():
        model = predict.load(untrained("depth", at, "toyworld:2", "--drop-path", 0.5), "cpu")
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert torch.equal(model(photo)["depth"], model(photo)["depth"])
    run, val = training.Run(torch.device("cpu")), data.open_segmentation("toyworld:2", 48)[1]
    for script, part, *more in (
            (finetune_depth, data.open_depth("toyworld:2", 48, 48)[1]),
            (finetune_pose, pose.open_pose("toyworld:2", (48, 32))[1], 17),
            (finetune_seg, val, val)):
        args, modes = args_for(script, "--workers", 0, "--batch-size", 2), []
        with quiet():
            net = script.build(args, *more, run).train()
            net.register_forward_pre_hook(lambda m, _, modes=modes: modes.append(m.training))
            script.evaluate(net, part, args, run)
        assert net.training and modes and not any(modes), script
    net = M.Swin(Config(**vars(ODD) | dict(drop_path=0.7)))
    rates = torch.stack([b.drop_path for s in net.stages for b in s])
    assert_close(rates, torch.arange(8) / 10, 1e-6)


def test_flags_of_data_arrive():
    for script in FINETUNING:
        assert len(opened_by(script, "--data-fraction", 0.5)[0].source) == 4, script
    for script in (*FINETUNING, pretrain):
        assert [part.seed for part in opened_by(script, "--seed", 5)] == [5, 5], script
    crop = next(t for t in opened_by(finetune_depth, "--crop", 48, 64)[0].transform.transforms
                if isinstance(t, data.CropToFit))
    assert (crop.height, crop.width) == (48, 64)
    assert opened_by(pretrain, "--mask", "grid", "--size", 128)[0].mask == ("grid", 8, 0.75)
    for script in (finetune_seg, finetune_depth):
        for more, p in ([], 0.5), (["--no-flip"], 0):
            steps = opened_by(script, *more)[0].transform.transforms
            assert [t.p for t in steps if isinstance(t, data.v2.RandomHorizontalFlip)] == [p]
    with folder() as at:
        exported(at, "nyu", 2, 16)
        near, far = (opened_by(finetune_depth, "--data", at, "--depth-scale", s)[1][0, 0]["depth"]
                     for s in (1000, 500))
        assert torch.equal(2 * near, far)
        found = dict(image_id=0, category_id=0, bbox=[1, 2, 30, 40], score=0.5)
        fill(at, {"b.json": json.dumps([found])})
        assert sum(opened_by(finetune_pose, "--boxes", at / "b.json")[1].counts) == 1
    seen = []
    with folder() as at, quiet(), raises(InputError, "seen"), patched(
            batching, training_loader=lambda *a, **k: seen.append(k.get("kinds", 1)) or fail(
                InputError("seen"))):
        finetune_seg.main(args_for(finetune_seg, "--data", "toyworld:16", "--tasks",
                                   "semantic,instance", "--out", at / "o"))
    assert seen == [2]


def test_flags_of_answers_arrive():
    """Windows, thresholds, mirrors, pairs of joints and a detector's scores."""
    run, window, seen = training.Run(torch.device("cpu")), np.eye(64, dtype=bool), []
    args, real = args_for(finetune_depth, "--workers", 0), metrics.DepthErrors.update
    with quiet(), patched(finetune_depth, graded=lambda *a: window), patched(
            metrics.DepthErrors, update=lambda *a: seen.append(a[3:]) or real(*a)):
        finetune_depth.evaluate(finetune_depth.build(args, run),
                                data.open_depth("toyworld:1", 64, 64)[1], args, run)
    assert seen == [(window,)]
    model, given, infer = asked("segmentation"), [], finetune_seg.panoptic_inference
    with patched(finetune_seg, panoptic_inference=lambda *a: given.append(a[-2:]) or infer(*a)):
        model(np.zeros((64, 64), np.uint8))
    assert given == [(0.1, 0.3)]
    net = noisy(pose_net()).eval()
    args = args_for(finetune_pose, "--size", 64, 48, "--no-flip")
    crops = torch.randint(256, (2, 3, 64, 48), dtype=torch.uint8)
    with torch.no_grad():
        plain = pose.decode(net(M.normalize(crops), whole(TINY, crops)), (64, 48), 1.0)[0]
    assert np.allclose(finetune_pose.predict(net, crops, args, run)[0], plain, atol=1e-3)
    model, seen, real = asked("pose"), [], finetune_pose.predict
    with patched(model.args, flip_pairs="none"), patched(
            finetune_pose, predict=lambda *a: seen.append(a[4]) or real(*a)):
        model(np.zeros((64, 64), np.uint8))
    assert seen == [list(range(17))]
    scores, real = [], finetune_pose.answer
    with patched(finetune_pose, answer=lambda p, *a: scores.append(p["scores"].tolist()) or real(
            p, *a)):
        model.joints_of(torch.zeros(3, 64, 64, dtype=torch.uint8),
                        (np.array([[0.0, 0, 64, 64]]), np.array([0.5])))
    assert scores == [[0.5]]


def test_constants_are_those_of_the_sources():
    """ImageNet's statistics, in the order red, green, blue; COCO's sigmas, areas and limits."""
    black, white = (M.normalize(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)).flatten()
                    for v in (0, 255))
    assert_close(black, torch.tensor([-2.1179, -2.0357, -1.8044]), 1e-4)
    assert_close(white, torch.tensor([2.2489, 2.4286, 2.6400]), 1e-4)
    assert (metrics.OKS_SIGMAS * 1000).round().tolist() == [
        26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    for side, name in ((31, "s"), (33, "m"), (95, "m"), (97, "l")):
        box = [[0, 0, side, side]]
        r = average_precision("box", {"scores": [1], "boxes": box}, {"boxes": box}).result()
        assert [n for n in "sml" if r[f"AP{n}"] == 1] == [name], side
    assert metrics.AveragePrecision("keypoint", [0]).limits == [20]


def test_numbers_of_pretraining():
    """The peak rate is in proportion to the total batch; a reconstruction that is the truth shows
    it; the validation error is that of a pixel value."""
    told, args = [], args_for(pretrain, "--data", "toyworld:8", "--batch-size", 4,
                              "--accumulate", 2)
    args.lr = None
    with folder() as at, quiet(), raises(InputError, "seen"), patched(
            training, describe=lambda *a: told.append(a[6]) or fail(InputError("seen"))):
        args.out = str(at / "o")
        pretrain.main(args)
    assert abs(told[0] - 1.2e-3 * 8 / 2048) < 1e-9
    net, val = Pretrainer(TINY, norm_pix=True), data.open_pretraining("toyworld:3:3", TINY)[1]
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    net.forward = lambda x, tokens: [net.target(x, tokens.hidden_units)] * 2    # the truth
    layout = masked(2, 4, 12)
    _, seen, filled, _ = pretrain.fill(net, images, layout)
    assert (filled.int() - images.int()).abs().max() <= 1
    hidden = M.split_units(seen, TINY.unit)[tuple(layout.hidden_units.long().unbind(1))]
    assert hidden.amax((0, 2, 3)).tolist() == hidden.amin((0, 2, 3)).tolist() == [123, 116, 103]
    net.forward = lambda x, tokens: [net.target(x, tokens.hidden_units) + k for k in (1, 0)]
    args = args_for(pretrain, "--batch-size", 2, "--workers", 0)
    assert abs(pretrain.evaluate(net, val, args, training.Run(torch.device("cpu"))) - 1) < 1e-5


# -----------------------------------------------------------------------------


def run_test(name):
    """Run one test -> (failed?, the line to print)."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    try:
        globals()[name]()
        failed, word = False, "ok"
    except Exception:
        failed, word = True, "FAILED\n" + traceback.format_exc()
    gc.collect()                                # what a failed run holds, data processes above all,
    batching.end_data_processes()               # and what is held all the same
    return failed, f"{time.perf_counter() - begun:6.1f} s  {name}  {word}"


def main(pattern=""):
    """Run the tests whose names contain the pattern, on all cores, the longest first."""
    names = [n for n in globals() if n.startswith("test_") and pattern in n]
    names.sort(key=lambda n: not any(w in n for w in ("two_proc", "resume", "start_methods")))
    count = failures = 0
    with ProcessPoolExecutor(min(len(names) or 1, os.cpu_count() or 1)) as pool:
        for work in as_completed([pool.submit(run_test, n) for n in names]):
            failed, line = work.result()
            count, failures = count + 1, failures + failed
            print(line, flush=True)
    print(f"{count - failures} passed, {failures} failed")
    return failures > 0 or not count


if __name__ == "__main__":
    if sys.argv[1:2] == ["--together"]:         # we are a child of test_two_processes_are_as_one
        work_together(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:2]))
