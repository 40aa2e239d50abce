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
import io
import itertools
import json
import math
import os
import pickle
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

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

import batching
import checkpoints
import cocomask
import data
import draw
import files
import finetune_depth
import finetune_det
import finetune_pose
import finetune_seg
import formats
import inference
import layout
import losses
import metrics
import model as M
import packing
import pose
import pretrain
import throughput
import toyexport
import toyworld
import training
from data import InputError
from inference import at_original, instance_inference, panoptic_inference, semantic_inference
from layout import Layout, whole
from model import GLID, PRESETS, Config, DepthEstimator, PoseEstimator, Pretrainer, Segmenter

HERE = Path(__file__).resolve().parent
TINY = Config(**PRESETS["tiny"])
# a window that divides nothing: all the odd cases of partitioning
ODD = Config(patch=2, width=8, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), window=5, dim=16,
             decoder_layers=3, decoder_heads=2, image_size=64)


SEMANTIC = {"semantic": slice(None)}                        # one task asks about all images


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
    for name, sizes in (("swin_t", dict(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))),
                        ("swin_b", {})):
        theirs = noisy(getattr(torchvision.models, name)().eval())
        ours = GLID(Config(window=7, **sizes)).eval()
        state = M.swin_from_torchvision(theirs.state_dict(), ours.config)
        own = ours.backbone.state_dict()
        assert own.keys() - state.keys() == {f"norms.{i}.{w}" for i in range(3)
                                             for w in ("weight", "bias")}
        ours.backbone.load_state_dict(own | state)
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            tokens = whole(ours.config, images)
            maps = ours.backbone(ours.tokens(images, tokens), tokens)
            x = images
            for i, layer in enumerate(theirs.features):
                x = layer(x)
                if i % 2:
                    expected = theirs.norm(x) if i == 7 else F.layer_norm(x, x.shape[-1:])
                    found = tokens.to_grid(maps[i // 2], i // 2)
                    assert_close(found, expected, 1e-4, f"{name} stage {i}")


def dense_reference(glid, image, hidden):
    """The encoder re-stated densely: every token of one image, hidden ones removed as keys.

    Attention is over ALL pairs of tokens, allowed where floor((c + w - s) / w) agrees on both axes.
    Returns four maps [H, W, C]; values at hidden tokens are meaningless.
    """
    config, swin, w = glid.config, glid.backbone, glid.config.window
    p = config.patch
    weight = swin.embed.weight.view(-1, 3, p, p)
    x = F.conv2d(image[None], weight, swin.embed.bias, stride=p)[0].permute(1, 2, 0)
    x, maps = swin.embed_norm(x), []
    for stage, blocks in enumerate(swin.stages):
        if stage:
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = swin.merges[stage - 1].reduction(swin.merges[stage - 1].norm(x))
        height, width, dim = x.shape
        gone = hidden.repeat_interleave(8 >> stage, 0).repeat_interleave(8 >> stage, 1).flatten()
        yx = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"),
                         -1).view(-1, 2)
        for i, block in enumerate(blocks):
            shift = torch.tensor([0 if n <= w else i % 2 * (w // 2) for n in (height, width)])
            window = (yx + w - shift) // w
            allowed = (window[:, None] == window).all(-1) & ~gone
            offset = (yx[:, None] - yx + w - 1).clamp(0, 2 * w - 2)         # beyond: not allowed
            bias = block.attn.bias_table[offset[..., 0] * (2 * w - 1) + offset[..., 1]]
            heads = block.attn.heads
            q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, heads, dim // heads).unbind(1)
            score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim // heads)
            score = (score + bias.permute(2, 0, 1)).masked_fill(~allowed, -1e30)
            out = torch.einsum("hij,jhd->ihd", score.softmax(-1), v).reshape(x.shape)
            x = x + block.attn.proj(out)
            x = x + block.mlp(block.norm2(x))
        maps.append(swin.norms[stage](x))
    return maps


def assert_packed_equals_dense(config, images, sizes, hidden):
    glid = noisy(GLID(config)).double().eval()
    with torch.no_grad():
        tokens = Layout(config, sizes, hidden)
        maps = glid.backbone(glid.tokens(images.double(), tokens), tokens)
        packed = [tokens.to_grid(m, s) for s, m in enumerate(maps)]
        for b, (h, w) in enumerate(sizes.tolist()):
            image = images[b, :, :h, :w].double()
            image = F.pad(image, (0, -w % config.unit, 0, -h % config.unit), value=M.BLACK)
            rows, columns = (n // config.unit for n in image.shape[1:])
            gone = hidden[b, :rows, :columns]
            for stage, expected in enumerate(dense_reference(glid, image, gone)):
                side = 8 >> stage
                seen = ~gone.repeat_interleave(side, 0).repeat_interleave(side, 1)
                ours = packed[stage][b, :rows * side, :columns * side]
                assert_close(ours[seen], expected[seen], 1e-5, f"image {b} stage {stage}")


def test_packed_equals_dense_with_hidden_keys_removed():
    """Visible-only encoding is exactly dense Swin without the hidden keys, at all four stages."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 64]] * 2)
    for config in (ODD, Config(**PRESETS["tiny"] | dict(window=6, depths=(2, 2, 2, 2)))):
        for strategy in ("random", "block", "grid"):
            with data.seeded(7):
                hidden = torch.stack([data.hidden_units(strategy, 4, 0.75) for _ in images])
            assert_packed_equals_dense(config, images, sizes, hidden)
        assert_packed_equals_dense(config, images, sizes, torch.zeros(2, 4, 4, dtype=torch.bool))


def test_packed_equals_dense_ragged():
    """The same with images of unequal odd sizes in one batch, each hiding its own count."""
    sizes = torch.tensor([[37, 85], [96, 16], [61, 50]])
    images = torch.randn(3, 3, 96, 90, generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[:, 0, 0] = False
    assert_packed_equals_dense(ODD, images, sizes, hidden)


def test_hidden_pixels_change_nothing():
    """Not one bit of any map or prediction depends on a hidden pixel."""
    torch.manual_seed(0)
    net, tokens = noisy(Pretrainer(TINY)), masked(2, 4, 12)
    images = torch.randn(2, 3, 64, 64)
    other = images.clone()
    where = tuple(tokens.hidden.long().unbind(1))
    M.split_units(other, 16)[where] = 1e6 * torch.randn(24, 3, 16, 16)
    with torch.no_grad():
        for a, b in zip(net.glid.encode(images, tokens), net.glid.encode(other, tokens)):
            assert torch.equal(a, b), "a map saw a hidden pixel"
        a, b = net(images, tokens), net(other, tokens)
    assert torch.equal(a[0], b[0]), "a prediction saw a hidden pixel"
    assert not torch.equal(a[1], b[1]), "the test changed nothing"


def test_padded_batch_equals_alone():
    """Each image of a padded batch gets the result that it gets alone, whatever the padding."""
    torch.manual_seed(0)
    sizes = [(37, 85), (64, 16), (1, 1), (50, 61)]
    net = noisy(Segmenter(ODD, {"semantic": 5}, {"semantic": 3})).double().eval()
    images = [torch.randn(3, h, w).double() for h, w in sizes]
    batch = torch.full((4, 3, 70, 90), 123.0).double()                      # dirty padding
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    with torch.no_grad():
        classes, masks = net(batch, Layout(ODD, torch.tensor(sizes)), SEMANTIC)["semantic"]
        for b, image in enumerate(images):
            c, m = net(image[None], whole(ODD, image[None]), SEMANTIC)["semantic"]
            assert_close(classes[:, b], c[:, 0], 1e-9, f"classes of image {b}")
            h, w = m.shape[-2:]
            assert_close(masks[:, b, :, :h, :w], m[:, 0], 1e-9, f"masks of image {b}")
            together, alone = (
                semantic_inference(x, y, sizes[b], 2, (33, 47)) for x, y in
                ((classes[-1, b], masks[-1, b]), (c[-1, 0], m[-1, 0])))
            assert_close(together, alone, 1e-6, f"answer for image {b}")


def test_rows_are_shared_without_collision():
    """Windows in one row of attention never claim the same slot, and half windows do pair up."""
    occupied = torch.rand(200, 25, generator=torch.Generator().manual_seed(0)).numpy() < 0.3
    occupied[:, 0] |= ~occupied.any(1)
    def share_rows(occupied):
        return packing.share_rows(occupied @ (1 << np.arange(occupied.shape[1]))[:, None])
    row = share_rows(occupied)
    used = np.zeros((row.max() + 1, 25), dtype=int)
    np.add.at(used, row, occupied)
    assert used.max() == 1 and used.any(1).all() and len(used) < 170
    halves = np.zeros((6, 16), dtype=bool)
    halves[:3, :8] = halves[3:, 8:] = True                                  # Swin's border windows
    assert share_rows(halves).max() == 2
    # shifted and all visible: as few rows as Swin's cyclic shift needs
    tokens = Layout(Config(), torch.tensor([[192, 192]]))
    for stage, rows in ((0, 64), (1, 16), (2, 4), (3, 1)):
        place = tokens.windows(stage, True).place
        assert int(place.max()) // 36 + 1 == rows, f"stage {stage}"


def test_packing_is_tight_and_repeats():
    """At base, 192 px, 75 % hidden, batch 256: rows near the perfect number, and nearer to that of
    the windows which want one and the same slot; the same every time. Windows of any size, whose
    slots fill several words."""
    config, needed, wanted = Config(), [], []
    for seed in range(4):
        tokens = masked(256, 6, 27, config, seed)
        assert tokens.needed == masked(256, 6, 27, config, seed).needed
        needed.append(tokens.needed)
        wanted.append([int((tokens.windows(*kind).place % 36).bincount().max())
                       for kind in tokens.plans])
    perfect = [256 * 9 * (8 >> stage) ** 2 / 36 for stage in range(4) for _ in range(2)]
    share = np.mean(needed, 0) / perfect
    assert (share[:2] < 1.04).all() and (share[2:6] < 1.12).all() and (share >= 1).all(), share
    share = np.array(needed) / wanted
    assert (share[:, :6] < 1.06).all() and (share >= 1).all(), share
    for window in (3, 7, 12):                               # 1, 2 and 3 words
        occupied = np.random.default_rng(window).random((300, window ** 2)) < 0.1
        words = [occupied[:, i:i + packing.WORD] for i in range(0, window ** 2, packing.WORD)]
        row = packing.share_rows(np.stack([w @ (1 << np.arange(w.shape[1])) for w in words], 1))
        used = np.zeros((row.max() + 1, window ** 2), int)
        np.add.at(used, row, occupied)
        assert used.max() == 1 and len(used) < 150, window


def test_windows_hold_their_own_tokens():
    """By brute force over tokens: a slot each, a window's tokens in one row at their offsets, two
    owners differ wherever two windows do; images of any size, with and without a budget."""
    sizes = torch.tensor([[37, 85], [96, 16], [61, 50], [9, 9]])
    hidden = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[:, 0, 0] = False
    for window in (3, 4, 5, 12):
        config = Config(**ODD.to_dict() | dict(window=window))
        few = Layout(config, sizes, hidden)
        for tokens in (few, Layout(config, sizes, hidden, [n + 3 for n in few.needed])):
            for (stage, shifted), (_, rows, _) in tokens.plans.items():
                found, side = tokens.windows(stage, shifted), 8 >> stage
                image, yx = (x.flatten(0, 1) for x in tokens.coords(stage))
                extent = (sizes + 15) // 16 * side
                shift = torch.where(extent <= window, 0, shifted * (window // 2))[image]
                at = yx + window - shift
                place = found.place
                assert len(place.unique()) == len(place) and place.max() < rows * window ** 2
                assert torch.equal(found.token[place], torch.arange(len(place)))
                assert torch.equal(place % window ** 2, (at % window * torch.tensor(
                    [window, 1])).sum(1))
                name = torch.cat([image[:, None], at // window], 1).unique(
                    dim=0, return_inverse=True)[1]
                row = place // window ** 2
                owner = row if found.owner is None else found.owner.view(-1)[place]
                same = (row[:, None] == row) & (owner[:, None] == owner)
                assert torch.equal(same, name[:, None] == name), (window, stage, shifted)
                if found.owner is not None:
                    assert (found.owner == -1).sum() == rows * window ** 2 - len(place)


def test_budget_of_rows_changes_nothing():
    """Empty rows change no bit of a prediction; a batch beyond the budget raises it by levels that
    it alone decides; the budget is the same wherever it is asked for."""
    torch.manual_seed(0)
    net, images = noisy(Pretrainer(ODD)), torch.randn(2, 3, 64, 64)
    hidden, sizes = random_hidden(2, 4, 10), torch.tensor([[64, 64]] * 2)
    few = Layout(ODD, sizes, hidden)
    loss, gradient = None, None
    for budget, level in ((None, 0), (few.needed, 0), ([n + 5 for n in few.needed], 0),
                          ([max(1, n // 2) for n in few.needed], None)):
        tokens = Layout(ODD, sizes, hidden, budget)
        rows = [rows for _, rows, _ in tokens.plans.values()]
        assert all(r >= n for r, n in zip(rows, few.needed))
        assert tokens.level == level if level is not None else tokens.level > 0
        net.zero_grad()
        prediction, target = net(images, tokens)
        found = losses.reconstruction_loss(prediction, target)
        found.backward()
        if loss is None:
            loss, gradient = prediction, [p.grad.clone() for p in net.parameters()]
        assert torch.equal(prediction, loss), "an empty row was seen"
        for (name, p), g in zip(net.named_parameters(), gradient):      # biases: sums of more zeros
            assert name.endswith("k.bias") or (p.grad - g).abs().max() <= 1e-5 * g.abs().max(), name
    # also where every window is full: the graph must be the same as for the batch before
    full = Layout(TINY, sizes, hidden)
    fixed = Layout(TINY, sizes, hidden, full.needed)
    assert not full.plans[0, False][2] and fixed.plans[0, False][2]
    assert packing.enough([10, 3], [10, 3]) == ([10, 3], 0)
    assert packing.enough([11, 3], [10, 3]) == ([11, 4], 1)
    train = data.open_pretraining("toyworld:16", TINY)[0]
    budget = train.row_budget(TINY, 16)
    torch.manual_seed(5)
    assert train.row_budget(TINY, 16) == budget
    batches = [data.collate_pretraining(TINY, [train[e, i] for i in range(16)], budget)[1]
               for e in range(8)]
    assert {b.level for b in batches} == {0} and len({str(b.plans) for b in batches}) == 1
    shapes = {tuple(tuple(t.shape) for t in tensors_in(b)) for b in batches}
    assert len(shapes) == 1 and len(shapes.pop()) == 4      # one small set of tensors


@contextlib.contextmanager
def counted_graphs(backend="eager"):
    """torch.compile traces as ever, counts its graphs, and runs them without a compiler."""
    import torch._dynamo.testing
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    real = torch.nn.Module.compile, training.compiles
    torch.nn.Module.compile = lambda self, **how: real[0](self, backend=counter, **how)
    training.compiles = lambda wanted, state: bool(wanted)
    try:
        yield counter
    finally:
        torch.nn.Module.compile, training.compiles = real


def test_pretraining_is_one_graph():
    """8 batches of different masks run through one graph without a break, and give eager's bits:
    value and gradient."""
    train = data.open_pretraining("toyworld:8", TINY)[0]
    budget, state = train.row_budget(TINY, 4), training.Run(torch.device("cpu"))
    torch.manual_seed(0)
    net = pretrain.Objective(noisy(Pretrainer(TINY)))
    weights = list(net.parameters())
    old = torch.__version__.startswith("2.6.")              # sums some gradients in another order
    with counted_graphs("aot_eager") as counter:
        graph = pretrain.Objective(net.model)
        training.compile_whole(graph, argparse.Namespace(compile=True), state)
        masks = set()
        for epoch in range(8):
            samples = [train[epoch, i] for i in range(4)]
            images, tokens = data.collate_pretraining(TINY, samples, budget)
            masks.add(str(tokens.units.tolist()))
            images = M.normalize(images)
            eager, compiled = net(images, tokens), graph(images, tokens)
            assert eager.item() == compiled.item(), epoch
            pairs = zip(*(torch.autograd.grad(loss, weights) for loss in (eager, compiled)))
            for a, b in pairs:
                assert torch.equal(a, b) or (old and (a - b).abs().max() < 1e-4), epoch
        assert counter.frame_count == 1 and len(masks) == 8
    assert graph.state_dict().keys() == net.state_dict().keys()


def test_compiled_pretraining_writes_the_same_checkpoints():
    """A run that is resumed with --compile, with --accumulate: one graph, and the names and the
    weights of the run that is not compiled."""
    flags = ["--data", "toyworld:24", "--batch-size", 4, "--accumulate", 2, "--workers", 0]
    with folder() as at, quiet():
        pretrain.main(args_for(pretrain, *flags, "--steps", 1, "--out", at / "eager"))
        shutil.copytree(at / "eager", at / "graph")
        saved = []
        for name, more in (("eager", []), ("graph", ["--compile"])):
            with counted_graphs() as counter:
                pretrain.main(args_for(pretrain, *flags, *more, "--steps", 3, "--resume", "--out",
                                       at / name))
                assert counter.frame_count == (name == "graph")
            saved.append(checkpoints.read(at / name / "last.pt", "--init")["model"])
    assert saved[0].keys() == saved[1].keys() and not any("_orig_mod" in k for k in saved[0])
    for key, value in saved[0].items():
        assert (value - saved[1][key]).abs().max() < 1e-4, key


def test_compiled_finetuning_does_not_recompile():
    """Batches of ever new sizes, padded or not, soon need no new graph, and answer as eager."""
    torch.manual_seed(0)
    config = Config(**ODD.to_dict() | dict(drop_path=0.3))
    net = noisy(M.Detector(config, 3, 5, 10))
    other = M.Detector(config, 3, 5, 10)
    other.load_state_dict(net.state_dict())
    state, seen = training.Run(torch.device("cpu")), []
    sizes = [(64, 64), (64, 80), (96, 80), (48, 112), (81, 70), (112, 49), (60, 128), (100, 100)]
    with counted_graphs() as counter:
        training.compile_blocks(net, argparse.Namespace(compile=True), state)
        for i, (h, w) in enumerate(sizes):
            images = torch.randn(2, 3, h, w)
            tokens = Layout(config, torch.tensor([[h, w], [h - 20, w - 9]]))
            answers = []
            for model in (net, other):
                torch.manual_seed(i)
                answers.append(model(images, tokens, train=True))
                sum(x.square().sum() for x in answers[-1]).backward()
            for a, b in zip(*answers):
                assert_close(a, b, 1e-4)
            seen.append(counter.frame_count)
    assert 0 < seen[3] == seen[-1] <= 24, seen
    assert net.state_dict().keys() == other.state_dict().keys()


def test_training_goes_on_without_a_compiler():
    """Where torch.compile does not work, one line says why; by default a CPU does not try."""
    real = torch.compile
    def missing(function):
        raise RuntimeError("backend='inductor' raised:\nCannot find a working triton installation")
    shown = io.StringIO()
    try:
        torch.compile = missing
        with folder() as at, contextlib.redirect_stdout(shown):
            for out, flags in (("a", ["--compile"]), ("b", []), ("c", ["--no-compile"])):
                flags += ["--data", "toyworld:8", "--batch-size", 4, "--workers", 0, "--steps", 1]
                assert pretrain.main(args_for(pretrain, *flags, "--out", at / out))["step"] == 1
    finally:
        torch.compile = real
    assert shown.getvalue().count("not compiled: Cannot find a working triton") == 1
    assert shown.getvalue().count("compile") == 1, shown.getvalue()


def test_bench_of_a_card_runs():
    """All that bench.py does on a card, tried on the CPU with tiny sizes; and what it does on any
    machine."""
    config = Config(**PRESETS["tiny"] | dict(width=8, depths=[1] * 4, heads=[1, 1, 2, 2], dim=16))
    state = training.Run(torch.device("cpu"), dtype=torch.bfloat16)
    with counted_graphs(), quiet():
        found = throughput.card(config, state, 4, rounds=1, size=64, shrink=20)
    names = ("dense", "step", "detection", "segmentation", "depth", "pose")
    assert found.keys() == {f"{n} {how}" for n in names for how in ("eager", "compiled")}
    assert all(rate > 0 for rate in found.values())
    plan = throughput.planning(TINY, 16, 2)
    assert plan["layout_tensors"] == 4 and min(plan["rows_over_perfect"]) >= 1
    assert throughput.loading(TINY, 4)["loaded_images_a_second_a_core"] > 0


def restated_prediction(net, image, hidden):
    """Pretrainer re-stated for one image with dense maps and plain attention -> [N, pixels]."""
    glid, fpn = net.glid, net.glid.bifpn
    seen = [~hidden.repeat_interleave(s, 0).repeat_interleave(s, 1) for s in (8, 4, 2, 1)]
    p2, p3, p4, p5 = (lateral(m) for lateral, m in
                      zip(fpn.lateral, dense_reference(glid, image, hidden)))

    def fuse(node, stage, *maps):
        w = node.weight.clamp(min=0)
        x = F.silu(sum(a * m for a, m in zip(w, maps)) / (w.sum() + 1e-4))
        x = (x * seen[stage][..., None]).permute(2, 0, 1)[None]
        x = F.conv2d(x, node.depthwise.weight, padding=1, groups=x.shape[1])[0].permute(1, 2, 0)
        return node.norm(node.pointwise(x))

    def up(x):
        return x.repeat_interleave(2, 0).repeat_interleave(2, 1)

    def down(x):
        return F.max_pool2d(x.permute(2, 0, 1), 2).permute(1, 2, 0)
    t4 = fuse(fpn.top_down[2], 2, p4, up(p5))
    t3 = fuse(fpn.top_down[1], 1, p3, up(t4))
    o2 = fuse(fpn.top_down[0], 0, p2, up(t3))
    o3 = fuse(fpn.bottom_up[0], 1, p3, t3, down(o2))
    o4 = fuse(fpn.bottom_up[1], 2, p4, t4, down(o3))
    o5 = fuse(fpn.bottom_up[2], 3, p5, down(o4))

    def sine(y, x, dim):
        angles = [[2 * math.pi * c / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                  for c in (y, x)]
        return torch.tensor(sum(([math.sin(a) for a in row] + [math.cos(a) for a in row]
                                 for row in angles), [])).to(image)

    def attend(attention, x, keys, values):
        heads = attention.heads
        q, k, v = (f(y).view(len(y), heads, -1) for f, y in
                   ((attention.q, x), (attention.k, keys), (attention.v, values)))
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        return attention.out(torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(x.shape))
    dim, decoder, side = len(glid.decoder.cls), glid.decoder, len(hidden)
    x = [decoder.cls] + [net.mask_token + sine((r + 0.5) / side, (c + 0.5) / side, dim)
                         for r in range(side) for c in range(side) if hidden[r, c]]
    x = torch.stack(x)
    for i, layer in enumerate(decoder.layers):
        stage, grid = ((3, o5), (2, o4), (1, o3))[i % 3]
        places = seen[stage].nonzero().tolist()
        values = torch.stack([grid[r, c] for r, c in places]) + decoder.level[i % 3]
        keys = values + torch.stack([sine((r + 0.5) / len(grid), (c + 0.5) / len(grid), dim)
                                     for r, c in places])
        x = x + attend(layer.cross, layer.norm1(x), keys, values)
        y = layer.norm2(x)
        x = x + attend(layer.self, y, y, y)
        x = x + layer.mlp(layer.norm3(x))
    return net.head(decoder.norm(x))[1:]


def test_whole_model_equals_restatement():
    """Encoder, BiFPN, positions, queries, decoder and head against a dense, loop-by-loop one."""
    net = noisy(Pretrainer(ODD)).double().eval()
    images, hidden = torch.randn(2, 3, 64, 64).double(), random_hidden(2, 4, 10)
    with torch.no_grad():
        found, _ = net(images, Layout(ODD, torch.tensor([[64, 64]] * 2), hidden))
        for b in range(2):
            expected = restated_prediction(net, images[b], hidden[b])
            assert_close(found[b], expected, 1e-6, f"image {b}")


def test_pick_gradient():
    """The hand-written gradient of window gathering equals autograd's through plain indexing."""
    torch.manual_seed(0)
    block = noisy(M.SwinBlock(8, 2, 5, 0.0)).double()
    hidden = random_hidden(2, 3, 5)
    tokens = Layout(ODD, torch.tensor([[48, 48]] * 2), hidden)
    x = torch.randn(64 * len(tokens.units), 8).double().requires_grad_()
    weight, windows = torch.randn_like(x), tokens.windows(0, True)
    ours = torch.autograd.grad((block(x, windows) * weight).sum(), [x, *block.parameters()])
    real = layout.Spread.apply, layout.Collect.apply
    layout.Spread.apply = staticmethod(lambda x, token, place: x[token])
    layout.Collect.apply = staticmethod(lambda x, place: x[place])
    try:
        plain = torch.autograd.grad((block(x, windows) * weight).sum(), [x, *block.parameters()])
    finally:
        layout.Spread.apply, layout.Collect.apply = real
    for a, b in zip(ours, plain):
        assert_close(a, b, 1e-10, "gradients")


def test_positions_share_coordinates():
    """A query at a unit's centre gets the position of the 1/32 key there; images use their own
    extent, so padding does not move them."""
    tokens = Layout(Config(), torch.tensor([[192, 192]] * 2))
    keys = tokens.position(3, 64).view(2, 6, 6, 64)
    query = layout.sine_position((torch.tensor([2, 5]) + 0.5) / torch.tensor([6, 6]), 64)
    assert_close(keys[1, 2, 5], query, 1e-6)
    assert (keys[0, 0, 0] - keys[0, 0, 1]).abs().max() > 0.1
    assert_close(layout.sine_position(torch.tensor([0.25, 0.0]), 4),
          torch.tensor([1.0, 0, 0, 1]), 1e-6)                               # sin, cos of y, then x


def test_drop_path_keeps_expectation():
    """A dropped branch vanishes for whole images and is scaled up for the others."""
    block = M.SwinBlock(8, 2, 4, 0.25)
    tokens = Layout(TINY, torch.tensor([[16, 16]] * 400))
    torch.manual_seed(0)
    windows = tokens.windows(0, False)
    x = block._drop(torch.ones(400 * 64, 8), windows).view(400, -1)
    assert set(x.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (x == x[:, :1]).all() and abs(x.mean() - 1) < 0.1
    block.eval()
    assert (block._drop(x, windows) == x).all()


def test_bias_table_resizes():
    """Same window: untouched. Larger window: the centre offset keeps its value, ranges survive."""
    table = torch.randn(13 * 13, 3)
    assert M.resize_bias_table(table, 7) is table
    big = M.resize_bias_table(table, 12)
    assert big.shape == (23 * 23, 3)
    assert_close(big.view(23, 23, 3)[11, 11], table.view(13, 13, 3)[6, 6], 1e-5)
    theirs = torchvision.models.swin_t()
    ours = GLID(Config(window=6, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)))
    state = M.swin_from_torchvision(theirs.state_dict(), ours.config)
    ours.backbone.load_state_dict(ours.backbone.state_dict() | state)
    images = torch.randn(1, 3, 100, 61)
    assert torch.isfinite(ours.encode(images, whole(ours.config, images))[0]).all()


def test_bifpn_neighbours_only():
    """The 3x3 convolution sees the neighbours that exist, as a dense one with zeros in holes."""
    node = noisy(M.Fusion(8, 2)).double()
    hidden = random_hidden(2, 3, 4)
    tokens = Layout(ODD, torch.tensor([[48, 48]] * 2), hidden)
    a, b = torch.randn(2, 16 * len(tokens.units), 8).double()
    weight = node.weight.relu() / (node.weight.relu().sum() + 1e-4)
    mixed = tokens.to_grid(F.silu(weight[0] * a + weight[1] * b), 1).permute(0, 3, 1, 2)
    out = F.conv2d(F.pad(mixed, (1, 1, 1, 1)), node.depthwise.weight, groups=8)
    out = node.norm(node.pointwise(out.permute(0, 2, 3, 1)))
    image, yx = tokens.coords(1)
    seen = out[image, yx[..., 0], yx[..., 1]].reshape(-1, 8)
    assert_close(node([a, b], *tokens.grid(1)), seen, 1e-10)
    assert_close(M.down(M.up(a)), a, 0)


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


def test_every_parameter_learns_in_pretraining():
    for config in (TINY, Config(**PRESETS["tiny"] | dict(depths=(2, 2, 2, 2), decoder_layers=6))):
        net = Pretrainer(config)
        prediction, target = net(torch.randn(4, 3, 64, 64), masked(4, 4, 12, config))
        assert prediction.shape == target.shape == (4, 12, 3 * 16 * 16)
        assert not without_gradient(net, losses.reconstruction_loss(prediction, target))


def seg_batch(labels=((0, 2), (1,)), size=64):
    """Two images with random masks for the given labels."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for n in labels:                                        # blobs of 8 x 8 px
        blobs = torch.rand(len(n), size // 8, size // 8, generator=generator) < 0.5
        blobs = blobs.repeat_interleave(8, 1).repeat_interleave(8, 2)
        targets.append({"labels": torch.tensor(n, dtype=torch.long), "masks": blobs})
    return torch.randn(len(labels), 3, size, size, generator=generator), targets


def seg_loss(net, images, targets):
    classes, masks = net(images, whole(TINY, images), SEMANTIC, every_layer=True)["semantic"]
    count = max(1, sum(len(t["labels"]) for t in targets))
    return losses.segmentation_loss(classes, masks, targets, (64, 64), count, 128)["loss"]


def test_every_parameter_learns_in_finetuning():
    torch.manual_seed(0)
    net = apart(Segmenter(TINY, {"semantic": 6}, {"semantic": 3}))
    assert not without_gradient(net, seg_loss(net, *seg_batch()))


def test_queries_come_apart():
    """The e_i start equal (Eq. 3: zero). After one optimiser step those that were matched differ
    from each other and from the rest; the rest stays equal, until objects are matched to it."""
    torch.manual_seed(0)
    net = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
    offsets = net.heads["semantic"].offsets
    assert not offsets.any()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    seg_loss(net, *seg_batch(labels=((0, 1, 2), (0, 1)))).backward()
    optimizer.step()
    used = offsets[:3]                                      # three objects: three queries matched
    for a, b in itertools.combinations(used, 2):
        assert not torch.equal(a, b), "two matched queries still ask the same"
    assert not torch.equal(offsets[0], offsets[5])


def test_no_objects():
    """A batch without any object: finite loss, every head parameter has a gradient tensor."""
    torch.manual_seed(0)
    net = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
    loss = seg_loss(net, *seg_batch(labels=((), ())))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_bf16_autocast_runs():
    """Every mixed-precision path of both stages: finite losses and fp32 gradients."""
    torch.manual_seed(0)
    net, task = Pretrainer(TINY), apart(Segmenter(TINY, {"semantic": 6}, {"semantic": 3}))
    with torch.autocast("cpu", torch.bfloat16):
        prediction, target = net(torch.randn(2, 3, 64, 64), masked(2, 4, 12))
        assert prediction.dtype == torch.bfloat16
        loss = losses.reconstruction_loss(prediction, target)
        images, targets = seg_batch()
        tokens = Layout(TINY, torch.tensor([[64, 64], [40, 64]]))
        classes, masks = task(images, tokens, SEMANTIC, True)["semantic"]
    other = losses.segmentation_loss(classes, masks, targets, (64, 64), 3, 128)["loss"]
    assert loss.dtype == other.dtype == torch.float32
    assert not without_gradient(net, loss) and not without_gradient(task, other)


def test_config_round_trip():
    for name in PRESETS:
        config = Config(**PRESETS[name])
        assert Config(**json.loads(json.dumps(config.to_dict()))) == config
        assert config.decoder_layers % 3 == 0 and config.image_size % config.unit == 0


def test_base_is_the_papers_size():
    """Swin-B is 86.9 M without its classifier; the decoder of 6 x 512 about 25 M."""
    net = GLID(Config())
    count = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in net.named_children()}
    theirs = torchvision.models.SwinTransformer([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [6, 6])
    swin = sum(p.numel() for n, p in theirs.named_parameters() if not n.startswith("head")) / 1e6
    assert abs(count["backbone"] - swin) < 0.002            # plus the norms of stages 1-3
    assert 25 < count["decoder"] < 26 and 2 < count["bifpn"] < 3


# -----------------------------------------------------------------------------
# Losses and matching


def test_reconstruction_loss_is_equation_2():
    p = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    t = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    assert losses.reconstruction_loss(p, t).item() == (5 + 25) / 2          # mean of squared norms


def test_pixel_targets():
    """Hidden units in row-major order; norm_pix standardises each over its own pixels."""
    images, hidden = torch.randn(2, 3, 64, 64), random_hidden(2, 4, 12)
    net = Pretrainer(TINY, norm_pix=True)
    where = hidden.nonzero()
    target = net.target(images, where)
    b, y, x = where[15].tolist()
    unit = images[b, :, 16 * y:16 * y + 16, 16 * x:16 * x + 16].reshape(-1)
    assert_close(target.view(24, -1)[15], (unit - unit.mean()) / unit.std(), 1e-4)


def test_matching_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 2, 4]
    cost = {"a": torch.rand(2, 4, 5, 4, generator=generator),
            "b": torch.rand(2, 4, 5, 4, generator=generator)}
    layer, image, query, obj = losses.hungarian(cost, counts)
    total = cost["a"] + cost["b"]
    for la, b in itertools.product(range(2), range(4)):
        best = min(sum(total[la, b, q, o].item() for o, q in enumerate(order))
                   for order in itertools.permutations(range(5), counts[b]))
        mine = (layer == la) & (image == b)
        assert mine.sum() == counts[b] and len(set(query[mine].tolist())) == counts[b]
        assert sorted(obj[mine].tolist()) == list(range(counts[b]))
        assert abs(total[la, b, query[mine], obj[mine]].sum().item() - best) < 1e-5


def test_matching_names_the_bad_cost():
    bad = torch.zeros(1, 1, 2, 2)
    bad[0, 0, 0, 1] = float("nan")
    with raises(FloatingPointError, "dice"):
        losses.hungarian({"mask": torch.zeros(1, 1, 2, 2), "dice": bad}, [2])
    assert len(losses.hungarian({"dice": bad}, [1])[0]) == 1        # padding may be anything


def test_mask_losses_by_formula():
    """Elementwise, pairwise and plain-Python cross-entropy and dice agree, and their gradients
    with finite differences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, generator=generator)
    t = (torch.rand(3, 7, generator=generator) < 0.5).float()
    ce, dice = losses.mask_losses(x, t)
    pair_ce, pair_dice = (c[0] for c in losses.pairwise_mask_cost(x[None], t[None]))
    for i, j in itertools.product(range(3), repeat=2):
        p = [1 / (1 + math.exp(-v)) for v in x[i].tolist()]
        y = t[j].tolist()
        a = -sum(math.log(q) if k else math.log(1 - q) for q, k in zip(p, y)) / 7
        b = 1 - (2 * sum(q * k for q, k in zip(p, y)) + 1) / (sum(p) + sum(y) + 1)
        assert abs(pair_ce[i, j] - a) < 1e-5 and abs(pair_dice[i, j] - b) < 1e-5
        if i == j:
            assert abs(ce[i] - a) < 1e-5 and abs(dice[i] - b) < 1e-5
    assert torch.autograd.gradcheck(lambda v: losses.mask_losses(v, t.double()),
                                    x.double().requires_grad_())


def test_sampled_points():
    """Points: values are bilinear at pixel centres, stay inside the image, and seek the border."""
    ramp = torch.arange(8.0).expand(1, 8, 8)                                # value = column
    at = torch.tensor([[[(2 + 0.5) / 8, 0.5], [3 / 8, 0.1]]])
    assert_close(losses.sample_points(ramp, at), torch.tensor([[2.0, 2.5]]), 1e-6)
    torch.manual_seed(0)
    logits = (torch.arange(32.0) - 8).expand(2, 32, 32) * 3                 # zero at column 8
    points = losses.uncertain_points(logits, torch.tensor([[0.5, 0.25], [1.0, 1.0]]), 400)
    assert (points[0] <= torch.tensor([0.5, 0.25])).all() and points[1].max() > 0.9
    near = ((points[1, :, 0] * 32 - 8.5).abs() < 7).float()
    assert near[:300].mean() == 1 and near[300:].mean() < 0.6       # 3/4 uncertain, rest not


def test_segmentation_loss_ignores_the_order_of_queries():
    """A perfect answer costs the same in whichever queries it stands; its opposite far more."""
    _, targets = seg_batch(labels=((0, 2), (1,)), size=32)
    costs = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        classes, masks = torch.full((1, 2, 4, 4), -20.0), torch.full((1, 2, 4, 32, 32), -20.0)
        for b, t in enumerate(targets):
            for n, q in enumerate(order):
                found = n < len(t["labels"])
                classes[0, b, q, t["labels"][n] if found else 3] = 20
                if found:
                    masks[0, b, q] = torch.where(t["masks"][n], 20.0, -20.0)
        torch.manual_seed(0)
        parts = losses.segmentation_loss(classes, masks, targets, (32, 32), 3, 400)
        wrong = losses.segmentation_loss(-classes, -masks, targets, (32, 32), 3, 400)
        # on a border the sampled logit passes through zero: not exactly 0
        assert parts["class"] < 1e-6 and parts["mask"] < 0.7 and parts["dice"] < 0.2
        assert wrong["class"] > 2 and wrong["mask"] > 5
        total = 2 * parts["class"] + 5 * parts["mask"] + 5 * parts["dice"]
        assert abs(parts["loss"] - total) < 1e-5
        costs.append(parts)
    assert abs(costs[0]["dice"] - costs[1]["dice"]) < 0.05
    # no-object weighs a tenth: query 0 wrong costs log 4 x 1, query 3 (no object) log 4 x 0.1
    for q, weight in ((0, 1.0), (3, 0.1)):
        classes[0] = -20.0
        classes[0, 0, [0, 1, 2, 3], [0, 2, 3, 3]] = classes[0, 1, :, 3] = 20
        classes[0, 1, 0] = torch.tensor([-20.0, 20, -20, -20])
        classes[0, 0, q] = 0
        masks[:] = -20
        masks[0, 0, :2] = torch.where(targets[0]["masks"], 20.0, -20.0)
        masks[0, 1, 0] = torch.where(targets[1]["masks"][0], 20.0, -20.0)
        found = losses.segmentation_loss(classes, masks, targets, (32, 32), 3, 64)["class"]
        assert abs(found - weight * math.log(4) / (3 + 5 * 0.1)) < 1e-4


def test_segmentation_loss_equals_loops():
    """The set loss against brute force, layer by layer and image by image, ragged and not square.

    Masks and logits are constant inside each image, so that the sampled points do not matter as
    long as they stay inside; beyond it the logits are absurd.
    """
    generator = torch.Generator().manual_seed(5)
    layers, sizes, queries, kinds, points = 2, [(32, 64), (96, 32)], 4, 3, 50
    classes = torch.randn(layers, 2, queries, kinds + 1, generator=generator)
    value = 2 * torch.randn(layers, 2, queries, generator=generator)
    masks = torch.full((layers, 2, queries, 24, 16), 99.0)                  # canvas 96 x 64
    targets = []
    for b, (h, w) in enumerate(sizes):
        masks[:, b, :, :h // 4, :w // 4] = value[:, b, :, None, None]
        full = torch.tensor([True, False, True][:3 - b])
        targets.append({"labels": torch.tensor([2, 0, 1][:3 - b]),
                        "masks": full[:, None, None].expand(-1, h, w)})
    parts = losses.segmentation_loss(classes, masks, targets, (96, 64), 2.5, points)

    def mask_terms(x, full):
        p = 1 / (1 + math.exp(-x))
        dice = 1 - ((2 * p * points + 1) / (p * points + points + 1) if full else
                    1 / (p * points + 1))
        return -math.log(p if full else 1 - p), dice
    expected = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    for la in range(layers):
        weighted, weights = 0.0, 0.0
        for b, t in enumerate(targets):
            def cost(q, n, b=b, la=la, t=t):
                ce, dice = mask_terms(value[la, b, q].item(), t["masks"][n, 0, 0].item())
                return 5 * ce + 5 * dice - 2 * classes[la, b, q].softmax(-1)[t["labels"][n]].item()
            best = min(itertools.permutations(range(queries), len(t["labels"])),
                       key=lambda order: sum(cost(q, n) for n, q in enumerate(order)))
            for n, q in enumerate(best):
                ce, dice = mask_terms(value[la, b, q].item(), t["masks"][n, 0, 0].item())
                expected["mask"] += ce / 2.5
                expected["dice"] += dice / 2.5
            for q in range(queries):
                label = t["labels"][best.index(q)].item() if q in best else kinds
                weight = 1.0 if q in best else 0.1
                weighted -= weight * classes[la, b, q].log_softmax(-1)[label].item()
                weights += weight
        expected["class"] += weighted / weights
    for name, number in expected.items():
        assert abs(parts[name].item() - number) < 1e-4 * max(1, number), name


# -----------------------------------------------------------------------------
# Metrics, by hand


def near(a, b):
    return np.allclose(a, b, rtol=0, atol=1e-12)


def boxes_ap(truth, found, scores, **flags):
    """AP of one image with one category."""
    ap = metrics.AveragePrecision("box", [1])
    ap.update(0, {"labels": np.ones(len(found)), "scores": scores, "boxes": found},
              {"labels": np.ones(len(truth)), "boxes": truth, **flags})
    return ap.result()


def test_metrics_box_ap_by_hand():
    """Hit (IoU 1), miss, hit (IoU .62): at .5 .55 .6 precision is 1, 1/2, 2/3 at recall 1/2, 1/2,
    1; at the other seven thresholds the curve ends at recall 1/2, i.e. after 51 of 101 points."""
    r = boxes_ap([[0, 0, 10, 10], [50, 0, 60, 10]],
                 [[50, 0, 56.2, 10], [0, 0, 10, 10], [20, 20, 30, 30]], [.7, .9, .8])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert near([r["AP"], r["AP50"], r["AP75"]], [(3 * low + 7 * high) / 10, low, high])
    assert near([r["AR1"], r["AR10"], r["AR100"]], [.5, .65, .65])
    assert r["APs"] == r["AP"] and r["APm"] == r["APl"] == -1 and r["per_category"] == {1: r["AP"]}


def test_metrics_crowd_is_never_wrong_and_never_used_up():
    truth = [[0, 0, 10, 10], [100, 0, 200, 100]]
    found, scores = [[0, 0, 10, 10], [100, 0, 140, 40], [110, 0, 150, 40]], [.5, .9, .8]
    assert boxes_ap(truth, found, scores, iscrowd=[0, 1])["AP"] == 1.0
    # as ordinary objects the two would be misses above the hit, and the big box is missed as well
    assert near(boxes_ap(truth, found, scores)["AP"], 51 / 101 / 3)


def test_metrics_area_range_ignores_what_is_outside():
    r = boxes_ap([[0, 0, 10, 10]], [[0, 0, 10, 10], [300, 300, 500, 500]], [.5, .9])
    assert near([r["AP"], r["APs"], r["APl"]], [.5, 1, -1])  # the big miss is not a small miss
    r = boxes_ap([[0, 0, 40, 40]], [[0, 0, 40, 40]], [1], area=[1000])  # the file's area decides
    assert r["APs"] == 1 and r["APm"] == -1


def test_metrics_regular_truth_goes_before_a_closer_ignored_one():
    truth = [[0, 0, 100, 62], [0, 0, 100, 90]]  # IoU .62 and .9
    r = boxes_ap(truth, [[0, 0, 100, 100]], [1], ignore=[False, True])
    assert near([r["AP50"], r["AR100"]], [1, .3])


def test_metrics_at_most_100_detections_per_image_and_category():
    far = [[500 + i, 0, 510 + i, 10] for i in range(100)]
    r = boxes_ap([[0, 0, 10, 10]], far + [[0, 0, 10, 10]], [.9] * 100 + [.1])
    assert r["AP"] == 0 and r["AR100"] == 0  # the hit is number 101
    r = boxes_ap([[0, 0, 10, 10]], far[:99] + [[0, 0, 10, 10]], [.9] * 99 + [.1])
    assert r["AR100"] == 1 and r["AR10"] == 0 and near(r["AP"], .01)


def test_metrics_mask_iou_counts_pixels():
    truth, found = np.zeros((2, 1, 300, 300), bool)
    truth[0, :, :100] = True
    for bottom, ap in ((80, 0.0), (300, 1.0), (186, .3)):  # IoU is bottom / 300, the last .62
        found[0] = False
        found[0, :bottom, :100] = True
        metric = metrics.AveragePrecision("mask", [4, 7])
        metric.update(0, {"labels": [4], "scores": [1], "masks": found},
                      {"labels": [4], "masks": truth})
        assert near(metric.result()["AP"], ap) and metric.result()["per_category"][7] == -1


def test_metrics_oks_by_hand():
    """Only the nose is labelled and is off by 2 sigma sqrt(area): OKS = exp(-1/2) = .6065."""
    truth, found = np.zeros((2, 1, 17, 3))
    truth[0, 0] = 30, 40, 2
    found[0, 0, :2] = 30 + 2 * .026 * 100, 40
    person = {"labels": [1], "keypoints": truth, "boxes": [[0, 0, 100, 200]], "area": [100**2]}
    ap = metrics.AveragePrecision("keypoint", [1])
    ap.update(0, {"labels": [1], "scores": [1], "keypoints": found}, person)
    r = ap.result()
    assert near([r["AP"], r["AP50"], r["AP75"], r["APl"], r["AR"]], [.3, 1, 0, .3, .3])
    # a person without labelled joints: found inside the grown box is ignored, outside is a miss
    for image, x in ((1, 199.0), (2, 260.0)):
        ap.update(image, {"labels": [1], "scores": [2], "keypoints": np.full((1, 17, 3), x)},
                  {**person, "keypoints": 0 * truth})
        assert near(ap.result()["AP50"], 1 / image)


def test_metrics_score_ties_go_by_image_id_and_merge_counts_an_image_once():
    hit = {"labels": [1], "scores": [.5], "boxes": [[0, 0, 9, 9]]}
    there, nothing = {"labels": [1], "boxes": [[0, 0, 9, 9]]}, {"labels": [], "boxes": []}
    for right, expected in ((3, 1.0), (8, .5)):  # images 3 and 8 tie: the hit is first or second
        one, two = (metrics.AveragePrecision("box", [1]) for _ in range(2))
        one.update(8, hit, there if right == 8 else nothing)
        two.update(3, hit, there if right == 3 else nothing)
        two.update(8, hit, there if right == 8 else nothing)  # a sampler's padding
        one.merge(pickle.loads(pickle.dumps(two)))
        assert one.result()["AP"] == expected


def test_metrics_panoptic_by_hand():
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
    assert near(r["per_category"][10], [.75 / 1.5, .75, 1 / 1.5]) and near(r["RQ_stuff"], 2 / 2.5)


def test_metrics_miou_and_depth_by_hand():
    miou, depth = metrics.MeanIoU(20), metrics.DepthErrors(1e-3, 10)
    miou.update(np.array([[0, 0, 1, 19, 5]]), np.array([[0, 1, 1, 19, 255]], np.uint8))
    assert near(miou.result()["mIoU"], (1 / 2 + 1 / 2 + 1) / 3)  # 17 absent classes do not count
    assert near(miou.result()["pixel_accuracy"], 3 / 4)
    for wrong in (20, -1):
        try:
            miou.update(np.array([[0]]), np.array([[wrong]]))
            raise AssertionError("a label out of range was accepted")
        except ValueError as error:
            assert "20 classes" in str(error)
    depth.update(np.array([[2.0, 4.0, 1.0]]), np.array([[1.0, 2.0, 0.0]]))  # twice too far, a hole
    depth.update(np.array([[3.0]]), np.array([[11.0]]))  # out of range: no valid pixel
    r = depth.result()
    assert near([r[k] for k in depth.NAMES], [0, 0, 0, 1, np.sqrt(2.5), np.log10(2), 0])
    assert (r["images"], r["skipped"]) == (1, 1)


# -----------------------------------------------------------------------------
# Data


def test_hidden_unit_counts():
    """27 of 36 at 75 % for every strategy; MAE's rounding; the strategies look as they should."""
    for strategy in ("random", "block", "grid"):
        with data.seeded(1):
            masks = [data.hidden_units(strategy, 6, 0.75) for _ in range(20)]
        assert all(m.sum() == 27 for m in masks), strategy
        assert (strategy == "grid") == all(torch.equal(m, masks[0]) for m in masks)
    cells = masks[0].view(3, 2, 3, 2).permute(0, 2, 1, 3).reshape(9, 4)
    assert (cells.sum(1) == 3).all()
    assert data.hidden_units("random", 6, 0.6).sum() == 22                  # int(36 * 0.4) seen
    def borders(m):                                                         # block masks are lumps
        return (m[1:] != m[:-1]).sum() + (m[:, 1:] != m[:, :-1]).sum()
    with data.seeded(2):
        lumps, dust = (sum(borders(data.hidden_units(s, 12, 0.5)) for _ in range(20))
                       for s in ("block", "random"))
    assert lumps < 0.7 * dust


def write_photo(path, size=(40, 30), mode="RGB", **options):
    shape = size[1] // 5, size[0] // 5, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, **options)
    return np.asarray(image).astype(int)


def test_photo_formats():
    """Grey, palette, CMYK, alpha, 16 bit and rotated photos come out upright, 8 bit, RGB."""
    with folder() as at:
        truth = write_photo(at / "rgb.png")
        grey = truth @ [0.299, 0.587, 0.114]
        for name, mode in (("l.png", "L"), ("la.png", "LA"), ("p.png", "P"), ("cmyk.jpg", "CMYK"),
                           ("rgba.png", "RGBA"), ("one.png", "1"), ("rgb.jpg", "RGB")):
            write_photo(at / name, mode=mode)
            image = data.read_image(at / name)
            assert image.dtype == torch.uint8 and image.shape == (3, 30, 40), name
            expected = grey[..., None] if mode in "LA" else truth
            if mode not in ("1", "P"):
                error = np.abs(image.permute(1, 2, 0).numpy() - expected).mean()
                assert error < 12, f"{name} is off by {error}"
        deep = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
        Image.fromarray(deep).save(at / "16.png")
        wide = data.read_image(at / "16.png").permute(1, 2, 0).numpy()
        assert (wide == (deep // 257)[..., None]).all()                     # 65535 = 255 * 257
        exif = Image.Exif()
        exif[0x0112] = 6                                                    # "rotate 90 clockwise"
        Image.open(at / "rgb.png").save(at / "turned.png", exif=exif)
        assert (data.read_image(at / "turned.png").permute(1, 2, 0).numpy()
                == np.rot90(truth, -1)).all()


def test_a_jpeg_is_decoded_no_larger_than_needed():
    """A view 4 times too large is read from a quarter of the photo: upright, the same part."""
    with folder() as at:
        exif = Image.Exif()
        exif[0x0112] = 6
        write_photo(at / "a.jpg", (640, 480), exif=exif)                    # upright: 480 wide
        whole = data.read_image(at / "a.jpg").float()
        part = (100, 40, 320, 400)
        for size, height in ((330, 640), (160, 320), (159, 320), (80, 160), (10, 80)):
            asked = []
            photo, view = files.read_view(at / "a.jpg", lambda *s, a=asked: a.append(s) or part,
                                          size)
            assert asked == [(640, 480)] and photo.shape == (3, height, height * 3 // 4)
            assert view == tuple(round(v * height / 640) for v in part)
            small, large = (data.v2.functional.resized_crop(p.float(), *v, [8, 8], antialias=True)
                            for p, v in ((photo, view), (whole, part)))
            assert (small - large).abs().mean() < 2, size                   # shifted by 20 px: 8
        jpeg = (at / "a.jpg").read_bytes()
        (at / "half.jpg").write_bytes(jpeg[:len(jpeg) // 2])
        with raises(InputError, "half.jpg"):
            files.read_view(at / "half.jpg", lambda h, w: part, 8)
        train, val = (data.Pretraining(data.Photos([at / "a.jpg"]), train, 64, 16, "random", 0.75,
                                       0) for train in (True, False))
        assert val.choose(640, 480) == (80, 0, 480, 480) and val.choose(3, 8) == (0, 2, 3, 3)
        assert train[0, 0][0].shape == val[0, 0][0].shape == (3, 64, 64)


def test_broken_photos_are_named():
    with folder() as at:
        write_photo(at / "whole.jpg", (200, 200))
        whole = (at / "whole.jpg").read_bytes()
        (at / "half.jpg").write_bytes(whole[:len(whole) // 2])
        (at / "empty.png").write_bytes(b"")
        (at / "text.jpg").write_text("<html>not found</html>")
        Image.fromarray(np.ones((4, 4), np.float32)).save(at / "float.tiff")
        Image.new("1", (20000, 20000)).save(at / "huge.png")
        for name in ("half.jpg", "empty.png", "text.jpg", "float.tiff", "huge.png", "missing.jpg"):
            with raises(InputError, name):
                data.read_image(at / name)


def test_folders_of_photos():
    """train/ and val/ are respected, flat and nested folders split; nothing found is an error."""
    with folder() as at:
        for i in range(25):
            write_photo(at / "flat" / f"{i % 3}/{i:02d}.jpg")
        (at / "flat" / "notes.txt").write_text("no photo")
        train, val = data.open_pretraining(at / "flat", TINY)
        files = train.source.files + val.source.files
        assert (len(train), len(val)) == (23, 2) and len(set(files)) == 25
        write_photo(at / "layout/train/n01/a.JPEG", format="JPEG")
        write_photo(at / "layout/val/n01/b.JPEG", format="JPEG")
        for part in ("val", "validation", "valid"):
            train, val = data.open_pretraining(at / "layout", TINY)
            assert (train.source.files[0].name, val.source.files[0].name) == ("a.JPEG", "b.JPEG")
            (at / "layout" / part).rename(at / "layout" / {"val": "validation"}.get(part, "valid"))
        (at / "layout/train").rename(at / "layout/other")       # valid/ alone is no validation part
        train, val = data.open_pretraining(at / "layout", TINY)
        assert len(train) == len(val) == 1
        for n, names in enumerate((("images/train/a", "labels/train/a", "images/val/b",
                                    "labels/val/b"), ("train/rgb/a", "val/rgb/b", "train/depth/a",
                                                      "val/depth/b"), ("images/a", "images/b",
                                                                       "masks/a", "masks/b"))):
            for name in names:                                  # labels are no photos
                write_photo(at / f"{n}" / f"{name}.png")
            train, val = data.open_pretraining(at / f"{n}", TINY)
            found = train.source.files + val.source.files
            assert len(found) == 2 and not {"labels", "depth", "masks"} & set(
                sum((f.parts for f in found), ()))
        (at / "none").mkdir()
        for bad in ("none", "missing"):
            with raises(InputError, str(at / bad)):
                data.open_pretraining(at / bad, TINY)
        for flag, options in (("--mask-ratio", dict(ratio=0.99)),
                              ("--mask grid", dict(mask="grid", ratio=0.5))):
            with raises(InputError, flag):
                data.open_pretraining("toyworld:8", TINY, **options)
        with raises(InputError, "toyworld:x"):
            data.open_pretraining("toyworld:x", TINY)


def test_samples_are_functions_of_seed_epoch_index():
    """Crop and mask repeat exactly, differ between epochs, seeds and images, ignore the caller's
    random state and leave it alone; data processes change nothing."""
    train, val = data.open_pretraining("toyworld:12", TINY, seed=3)
    image, hidden = train[(5, 7)]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = train[(5, 7)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(image, again[0]) and torch.equal(hidden, again[1])
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64) and hidden.shape == (4, 4)
    other = data.open_pretraining("toyworld:12", TINY, seed=4)[0]
    for changed in (train[(6, 7)], train[(5, 8)], other[(5, 7)]):
        assert not torch.equal(image, changed[0])
    assert torch.equal(val[(0, 2)][0], val[(0, 2)][0])
    ids = [[(2, i) for i in range(4)], [(2, 9), (2, 5)]]
    for workers in (0, 2):
        found = list(torch.utils.data.DataLoader(train, batch_sampler=ids, num_workers=workers))
        for batch, batch_ids in zip(found, ids):
            for x, i in zip(batch[0], batch_ids):
                assert torch.equal(x, train[i][0]), f"{workers} workers"


def test_crops_follow_mae():
    """Flips half of the time; crops of 20 to 100 % of the photo, as its coordinates tell."""
    x = torch.arange(100).expand(100, 100)
    photo = torch.stack([x, x.T, x]).to(torch.uint8)

    class One:
        def view(self, index, choose, size):
            return photo, choose(100, 100)
    train = data.Pretraining(One(), True, 64, 16, "random", 0.75, 0)
    crops = [train[(e, 0)][0].float() for e in range(200)]
    flips = sum(c[0, 0, 0].item() > c[0, 0, -1].item() for c in crops)
    assert 70 < flips < 130
    areas = [c[i].amax() - c[i].amin() for c in crops for i in (0, 1)]
    areas = torch.tensor(areas).view(-1, 2).prod(1) / 99 ** 2
    assert 0.15 < areas.min() < 0.3 and areas.max() > 0.9 and 0.45 < areas.mean() < 0.7


def test_batches_do_not_depend_on_processes():
    """The samples of a step are the same on 1 process, on 2, with accumulation, and after a resume;
    an epoch visits no sample twice."""
    def steps(size, accumulate, world, start=0):
        args = argparse.Namespace(batch_size=size, accumulate=accumulate, seed=1)
        shares = [list(data_training_batches(args, rank, world, start)) for rank in range(world)]
        return [sorted(sum((s[i * accumulate + a] for s in shares for a in range(accumulate)), []))
                for i in range(len(shares[0]) // accumulate)]

    def data_training_batches(args, rank, world, start):
        return batching.Batches(21, args, training.Run(torch.device("cpu"), rank, world), start, 7)
    one = steps(4, 1, 1)
    assert one == steps(2, 1, 2) == steps(2, 2, 1) == steps(1, 2, 2)
    assert steps(2, 1, 2, start=3) == one[3:]
    first = sum(one[:5], [])
    assert len(set(first)) == 20 and {e for e, _ in first} == {0} and one[5][0][0] == 1
    assert [i for _, i in one[0]] != [i for _, i in one[5]]
    for world in (1, 2, 3):                                                 # evaluation: each once
        two = argparse.Namespace(batch_size=2)
        ids = [i for r in range(world) for b in
               batching.share(7, two, training.Run(torch.device("cpu"), r, world)) for _, i in b]
        assert sorted(ids) == list(range(7))


def test_toyworld_is_consistent():
    """Boxes are the boxes of their masks, masks are disjoint, all label maps tell one story."""
    for size in (64, 97):
        for index in range(12):
            s = toyworld.scene(3, index, size)
            again = toyworld.scene(3, index, size)
            assert all(np.array_equal(s[k], again[k]) for k in s)
            assert s["masks"].sum(0).max() <= 1
            for k, (mask, box, c) in enumerate(zip(s["masks"], s["boxes"], s["classes"])):
                y, x = np.nonzero(mask)
                assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
                assert (s["semantic"][mask] == c).all() and (s["panoptic"][mask] == k + 1).all()
                points = s["keypoints"][k]
                assert (points[:, 2] > 0).any() == points.any() and (c == 0 or not points.any())
                assert (points[points[:, 2] > 0, :2] < size).all()
            stuff = ~s["masks"].any(0)
            assert (s["panoptic"][stuff] == 1000 + s["semantic"][stuff].astype(int)).all()
            sky = s["semantic"] == toyworld.SKY
            assert ((s["depth"] == 0) == sky).all() and s["depth"].max() <= 10


def test_toyworld_exports_imagenet():
    with folder() as at, quiet():
        for split, count in (("train", 6), ("val", 3)):
            toyexport.export(at, "imagenet", count, 64, 0, split)
        train, val = data.open_pretraining(at, TINY)
        assert (len(train), len(val)) == (6, 3)
        start = toyworld.SPLIT_START["val"]
        scenes = [torch.from_numpy(toyworld.scene(0, start + i, 64)["image"]).float()
                  for i in range(3)]
        for i in range(3):
            photo = val.source[i]["image"].permute(1, 2, 0).float()
            assert min((photo - s).abs().mean() for s in scenes) < 10      # JPEG; others: 40


def test_colour_jitter_is_pixelwise_and_as_said():
    """Every pixel against colorsys, each change half of the time; channels are never swapped."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3))
    photo = torch.from_numpy(pixels.T.astype(np.uint8)).view(3, 3, 4)
    counts = torch.zeros(4)
    for seed in range(200):
        with data.seeded(seed):
            out = data.ColourJitter()({"image": photo})["image"]
        with data.seeded(seed):
            apply, first = torch.rand(4) < 0.5, torch.rand(()) < 0.5
            amounts = torch.rand(4)
        counts += apply
        shift, contrast, saturation, turn = (
            a * (high - low) + low if on else (low + high) / 2
            for on, a, (low, high) in zip(apply.tolist(), amounts.tolist(),
                                          ((-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1))))
        for before, after in zip(pixels, out.flatten(1).T.tolist()):
            rgb = (before + shift).clip(0, 255)
            rgb = (rgb * contrast).clip(0, 255) if first else rgb
            h, s, v = colorsys.rgb_to_hsv(*rgb / 255)
            rgb = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v))
            rgb = rgb if first else (rgb * contrast).clip(0, 255)
            assert np.abs(rgb - after).max() < 12, (seed, before, rgb, after)   # HSV in 8 bits
    assert ((counts - 100).abs() < 25).all()
    photo = photo.float().div(255)
    for seed in range(20):                                  # BTS's gamma, on 0..1
        with data.seeded(seed):
            out = data.ColourAugment()({"image": (photo * 255).byte()})["image"]
        with data.seeded(seed):
            expected = photo
            if torch.rand(()) < 0.5:
                gamma = torch.empty(()).uniform_(0.9, 1.1)
                bright = torch.empty(()).uniform_(0.75, 1.25)
                expected = photo ** gamma * bright * torch.empty(3, 1, 1).uniform_(0.9, 1.1)
        assert (out - expected.clamp(0, 1) * 255).abs().max() < 0.51


def test_segmentation_samples_stay_aligned():
    """Photo and labels get the same crop and flip: a photo painted by its labels stays so."""
    train, val = data.open_segmentation("toyworld:6", 64)
    transform = data.segmentation_transform(True, 64)
    transform = data.v2.Compose([t for t in transform.transforms
                                 if not isinstance(t, data.ColourJitter)])
    for i in range(6):
        semantic = train.source[i]["semantic"]
        sample = {"image": data.tv_tensors.Image(semantic.expand(3, -1, -1) * 20),
                  "semantic": semantic}
        with data.seeded(i):
            out = transform(sample)
        assert out["image"].shape[1:] == out["semantic"].shape and max(out["semantic"].shape) <= 64
        error = (out["image"][0].float() / 20 - out["semantic"].float()).abs()
        assert (error < 0.5).float().mean() > 0.8                   # but for blurred borders
        sample = train[(0, i)]
        masks, labels = sample["masks"], sample["labels"]
        assert (masks.sum(0) == 1).all() and masks.any(-1).any(-1).all()
        assert len(set(labels.tolist())) == len(labels)
    original = val[(0, 2)]
    assert torch.equal(original["semantic"], val.source[2]["semantic"])


def test_collate_pads_bottom_right():
    samples = [{"image": torch.full((3, h, w), 7, dtype=torch.uint8), "labels": torch.arange(2)}
               for h, w in ((4, 9), (6, 5))]
    images, tokens, targets = data.collate(TINY, samples)
    assert images.shape == (2, 3, 6, 9) and tokens.sizes.tolist() == [[4, 9], [6, 5]]
    assert images[0, :, 4:].sum() == 0 and images[1, 0].sum() == 7 * 30 and len(targets) == 2


def test_ignored_labels_have_no_mask():
    class Source:
        classes, things, category_ids = ("a", "b"), 0, (0, 1)
        def __len__(self):
            return 1
        def __getitem__(self, i):
            semantic = torch.full((64, 64), 255, dtype=torch.uint8)
            semantic[:, :20] = 1
            return {"image": data.tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8)),
                    "semantic": data.tv_tensors.Mask(semantic)}
    for epoch in range(5):
        sample = data.Segmentation(Source(), True, 64, 0)[(epoch, 0)]
        assert set(sample["labels"].tolist()) <= {1}


# -----------------------------------------------------------------------------
# Segmentation inference


def test_inference_reaches_original_pixels():
    """Two queries that split the true image left | right, in a padded canvas: so does the answer,
    at the original size."""
    classes = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]])
    masks = torch.full((1, 3, 16, 24), -9.0)
    masks[0, 0, :, :8], masks[0, 1, :, 8:] = 9, 9
    masks[0, 2] = 9                                         # "no object" everywhere: must not count
    scores = semantic_inference(classes[0], masks[0], (50, 64), 4, (100, 128))
    found = scores.argmax(0)
    assert found.shape == (100, 128)
    assert (found[:, :62] == 0).all() and (found[:, 66:] == 1).all()


def test_semantic_inference_enlarges_logits():
    """Mask2Former's order: logits to the network's input, sigmoid, sum over queries, cut, resize;
    the same however few masks fit in memory at once."""
    generator = torch.Generator().manual_seed(0)
    classes, masks = (3 * torch.randn(*n, generator=generator) for n in ((5, 4), (5, 16, 16)))
    big = F.interpolate(masks[None], (64, 64), mode="bilinear")[0].sigmoid()
    sums = torch.einsum("qk,qhw->khw", classes.softmax(-1)[:, :3], big)[:, :50, :60]
    expected = F.interpolate(sums[None], (70, 33), mode="bilinear")[0]
    real = inference.PART
    try:
        for inference.PART in (real, 1):
            found = semantic_inference(classes, masks, (50, 60), 4, (70, 33))
            assert_close(found, expected, 1e-5)
    finally:
        inference.PART = real


# -----------------------------------------------------------------------------
# Detection


def random_boxes(*shape, seed=0):
    """Boxes inside the unit square as centre x, y, width, height, float64."""
    low, high = torch.rand(2, *shape, 2, generator=torch.Generator().manual_seed(seed)).double()
    return torch.cat([(low + high) / 2, (low - high).abs()], -1)


def test_one_to_many_matching_equals_brute_force():
    """Every object takes `repeats` different queries, at the least total cost."""
    cost = torch.rand(1, 2, 5, 2, generator=torch.Generator().manual_seed(3))
    _, image, query, obj = losses.hungarian({"a": cost}, [2, 1], repeats=2)
    for b, copies in enumerate(([0, 0, 1, 1], [0, 0])):
        best = min(sum(cost[0, b, q, o].item() for q, o in zip(order, copies))
                   for order in itertools.permutations(range(5), len(copies)))
        mine = image == b
        assert sorted(obj[mine].tolist()) == copies and len(set(query[mine].tolist())) == sum(mine)
        assert abs(cost[0, b, query[mine], obj[mine]].sum().item() - best) < 1e-5


def test_generalized_iou():
    """Against torchvision's; gradients against finite differences; no area, no NaN."""
    a, b = losses.corners(random_boxes(20)), losses.corners(random_boxes(30, seed=1))
    assert_close(losses.corners(torch.tensor([[0.5, 0.4, 0.2, 0.6]])),
                 torch.tensor([[0.4, 0.1, 0.6, 0.7]]), 1e-6)
    ours = losses.generalized_iou(a[:, None], b)
    assert_close(ours, torchvision.ops.generalized_box_iou(a, b), 1e-9)
    assert torch.autograd.gradcheck(lambda x: losses.generalized_iou(losses.corners(x), b[:20]),
                                    random_boxes(20).requires_grad_())
    point = torch.zeros(1, 4, requires_grad=True)
    value = losses.generalized_iou(point, point.detach())
    value.sum().backward()
    assert value.item() == 0 and point.grad.isfinite().all()


def detection_batch(counts, kinds=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(kinds, (n,), generator=generator),
             "boxes": random_boxes(n, seed=seed + i).float()} for i, n in enumerate(counts)]


def test_detection_loss_equals_loops():
    """Both groups' set loss against brute force over permutations, term by term, one number at a
    time: cost, matching, focal, L1, GIoU, normaliser, the copies of one-to-many."""
    layers, queries, kinds, generator = 2, 5, 3, torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(layers, 3, queries, kinds, generator=generator)
    boxes, targets = random_boxes(layers, 3, queries, seed=7).float(), detection_batch((2, 0, 1))

    def focal(x, positive):
        p = 1 / (1 + math.exp(-x))
        return -0.25 * (1 - p)**2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)

    def terms(a, b):
        corner = [torchvision.ops.box_convert(x[None], "cxcywh", "xyxy") for x in (a, b)]
        return (a - b).abs().sum().item(), torchvision.ops.generalized_box_iou(*corner).item()
    for repeats in (1, 2):
        expected = dict.fromkeys(("class", "L1", "giou"), 0.0)
        for la, (b, t) in itertools.product(range(layers), enumerate(targets)):
            copies = list(range(len(t["labels"]))) * repeats
            def cost(q, n, la=la, b=b, t=t):
                x, (distance, giou) = logits[la, b, q, t["labels"][n]].item(), terms(
                    boxes[la, b, q], t["boxes"][n])
                return 2 * (focal(x, True) - focal(x, False)) + 5 * distance - 2 * giou
            best = min(itertools.permutations(range(queries), len(copies)),
                       key=lambda order: sum(cost(q, n) for q, n in zip(order, copies)))
            yes = {(q, t["labels"][n].item()) for q, n in zip(best, copies)}
            for q, k in itertools.product(range(queries), range(kinds)):
                expected["class"] += focal(logits[la, b, q, k].item(), (q, k) in yes)
            for q, n in zip(best, copies):
                distance, giou = terms(boxes[la, b, q], t["boxes"][n])
                expected["L1"] += distance
                expected["giou"] += 1 - giou
        found = losses.detection_loss(logits, boxes, targets, 1.5, repeats)
        for name, number in expected.items():
            number /= 1.5 * repeats
            assert abs(found[name].item() - number) < 1e-4 * max(1, number), name
        total = 2 * found["class"] + 5 * found["L1"] + 2 * found["giou"]
        assert_close(found["loss"], total, 1e-6)


def detector(config=TINY, kinds=3):
    torch.manual_seed(0)
    return apart(M.Detector(config, kinds, one_to_one=6, one_to_many=12))


def test_detection_groups_do_not_see_each_other():
    """The one-to-one queries answer the same with and without the others: training's first group,
    last layer, is what runs at test."""
    net, images = detector(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, boxes = net(images, whole(TINY, images), train=True)
        assert logits.shape == (3, 2, 18, 3) and boxes.shape == (3, 2, 18, 4)
        alone = net(images, whole(TINY, images))
        assert_close(logits[-1:, :, :6], alone[0], 1e-5, "classes")
        assert_close(boxes[-1:, :, :6], alone[1], 1e-5, "boxes")
        torch.nn.init.normal_(net.offsets[6:])
        changed = net(images, whole(TINY, images), train=True)[0]
        assert_close(changed[:, :, :6], logits[:, :, :6], 1e-5, "classes")
        assert (changed[:, :, 6:] - logits[:, :, 6:]).abs().amin((0, 3)).max() > 1e-3
    fresh = M.Detector(TINY, 5)
    assert not fresh.offsets.any() and fresh.offsets.shape == (1800, 64)
    assert_close(fresh.classify.bias.sigmoid(), torch.full((5,), 0.01), 1e-5)


def test_detection_in_a_padded_batch_equals_alone():
    """Boxes are fractions of the image, not of the padded batch."""
    net, sizes = detector(ODD).double().eval(), [(37, 85), (64, 16), (50, 61)]
    images = [torch.randn(3, h, w).double() for h, w in sizes]
    batch = torch.full((3, 3, 70, 90), 9.0).double()
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    with torch.no_grad():
        logits, boxes = net(batch, Layout(ODD, torch.tensor(sizes)))
        for b, image in enumerate(images):
            one = net(image[None], whole(ODD, image[None]))
            assert_close(logits[:, b], one[0][:, 0], 1e-9)
            assert_close(boxes[:, b].double(), one[1][:, 0].double(), 1e-6)     # boxes are fp32


def test_every_parameter_learns_in_detection():
    """Also from boxes without area; without any object the loss is finite all the same."""
    targets = detection_batch((2, 1))
    targets[0]["boxes"][0, 2:] = 0
    args = args_for(finetune_det, "--queries", 6, "--many-queries", 12, "--repeats", 4)
    for batch in (targets, detection_batch((0, 0))):
        net, images = detector(), torch.randn(2, 3, 64, 64)
        answers = net(images, whole(TINY, images), train=True)
        loss = finetune_det.group_losses(*answers, batch, 1, args)
        silent = without_gradient(net, loss)
        if batch is targets:
            assert not silent
        else:                                               # boxes have nothing to learn from
            assert silent == ["box.weight", "box.bias"]
            assert net.box.weight.grad is not None


def test_detection_answers_in_fp32():
    """Boxes and scores are not rounded to bf16: that would cost pixels and tie scores."""
    net, images = detector(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for answer in net(images, whole(TINY, images), train=True):
            assert answer.dtype == torch.float32 and (answer != answer.bfloat16().float()).any()


def test_detection_inference_by_hand():
    logits = torch.tensor([[2.0, -3.0], [1.0, 3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.2, 0.4, 0.2]])
    found = inference.detection_inference(logits, boxes, (100, 200), count=3)
    assert found["labels"].tolist() == [1, 0, 0]
    assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid(), 1e-6)
    assert_close(found["boxes"], torch.tensor([[140.0, 10, 200, 30], [80, 30, 120, 70],
                                               [140, 10, 200, 30]]), 1e-5)


def test_detection_samples_stay_aligned():
    """Boxes follow every flip, crop and resize: painted into the photo as rectangles, they stay
    the boxes of what was painted; none is without area; crowds are left out."""
    transform, seen = data.detection_transform(True, 160), 0
    for i in range(40):
        with data.seeded(i):
            x, y = torch.randint(100, (2,)).tolist()
            w, h = (30 + torch.randint(30, (2,))).tolist()
            photo = torch.zeros(3, 160, 190, dtype=torch.uint8)
            photo[:, y:y + h, x:x + w] = 255
            box = data.tv_tensors.BoundingBoxes([[float(x), y, x + w, y + h]], format="XYXY",
                                                canvas_size=(160, 190))
            out = transform({"image": data.tv_tensors.Image(photo), "boxes": box})
        assert max(out["image"].shape[1:]) <= 266
        painted = out["image"][0] > 127
        if painted.any():
            ys, xs = painted.any(1).nonzero()[:, 0], painted.any(0).nonzero()[:, 0]
            edges = torch.stack([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            assert (edges - out["boxes"][0]).abs().max() <= 1.5, (i, edges, out["boxes"])
            seen += 1
        else:
            assert (out["boxes"][0, 2:] - out["boxes"][0, :2]).amin() <= 0.5
    assert seen > 30
    train, val = data.open_detection("toyworld:8", 160)
    for i in range(8):
        sample = train[(3, i)]
        assert sample["boxes"].shape == (len(sample["labels"]), 4)
        assert (sample["boxes"][:, 2:] > 0).all()
        edges = losses.corners(sample["boxes"])
        assert edges.min() > -1e-5 and edges.max() < 1 + 1e-5
    same, _ = data.open_detection("toyworld:8", 160, overfit=True)
    assert torch.equal(same[(0, 1)]["image"], same[(9, 1)]["image"])
    assert val[(0, 0)]["size"].tolist() == [160, 160]
    # crowds are not trained on
    source = data.ToyWorld("train", 1, 160, keys=["boxes", "classes"])
    crowd = torch.arange(len(source[0]["classes"])) == 0
    source.samples = [source.samples[0] | {"iscrowd": crowd}]
    kept = data.Detection(source, train=True, augment=False, size=160, seed=0)[(0, 0)]
    assert len(kept["labels"]) == len(crowd) - 1


def test_perfect_detections_score_one():
    """Ground truth fed in as prediction, through the script's own evaluation at another size."""
    with folder() as at, quiet():
        args = args_for(finetune_det, "--data", "toyworld:6", "--size", 96, "--batch-size", 4,
                        "--workers", 0, "--out", at)
        _, val = data.open_detection(args.data, args.size)
        val.transform = data.detection_transform(False, 64)         # network size is not photo size
        truth = iter([(s["boxes"], s["classes"]) for s in val.source.samples])
        def perfect(model, images, layout, originals, state):
            assert originals == [[96, 96]] * len(images) and images.shape[-1] == 64
            return [{"scores": torch.ones(len(c)), "labels": c, "boxes": b}
                    for _, (b, c) in zip(images, truth)]
        real, finetune_det.predict = finetune_det.predict, perfect
        try:
            state = training.Run(torch.device("cpu"))
            result = finetune_det.evaluate(detector(), val, args, state, at / "p.png")
        finally:
            finetune_det.predict = real
        assert result["AP"] == result["AP50"] == 1.0 and result["AR100"] == 1.0
        assert Image.open(at / "p.png").size == (2 * 2 * 96, 2 * 6 * 96)


def test_detection_loop_does_what_it_says():
    """finetune_det.py with two micro-steps, one of them without objects, against training written
    out by hand: the same weights, and the same losses and rates in the log."""
    with folder() as at, quiet(), steady_adam():
        args = args_for(finetune_det, "--data", "toyworld:2", "--batch-size", 1, "--accumulate", 2,
                        "--workers", 0, "--steps", 5, "--save-every", 1, "--clip", 240, "--repeats",
                        3, "--queries", 12, "--many-queries", 30, "--query-lr", 50, "--backbone-lr",
                        0.1, "--weight-decay", 0.1, "--drop-path", 0.3, "--init", at / "pre.pt",
                        "--out", at / "d")
        torch.manual_seed(1)
        torch.save({"model": noisy(Pretrainer(TINY)).state_dict(), "config": {}}, at / "pre.pt")
        train, val = data.open_detection("toyworld:2", 64)
        full, empty = train.source.samples
        empty |= {k: empty[k][:0] for k in ("boxes", "classes", "area")}
        train.source.samples = [full, empty]
        real = finetune_det.open_detection
        finetune_det.open_detection = lambda *a, **k: (train, val)
        try:
            finetune_det.main(args)
        finally:
            finetune_det.open_detection = real
        torch.manual_seed(0)
        state = training.Run(torch.device("cpu"))
        net = M.Detector(training.model_config(args), len(train.classes), 12, 30)
        checkpoints.load_parts(net.glid, at / "pre.pt", checkpoints.PARTS, state)
        groups = training.param_groups(net, 0.1, [("offsets", 50.0), ("backbone", 0.1)])
        optimizer = torch.optim.AdamW(groups, fused=True)
        order, rows, norms = iter(batching.Batches(2, args, state, 0, 5)), [], []
        for step, scale in enumerate((1, 1, 1, 1, 0.1)):        # the drop at 40 of 50 epochs
            torch.manual_seed(data.mix(0, step, 0))
            training.set_lr(optimizer, 1e-3 * scale)
            total = 0
            parts = [data.collate(TINY, [train[i] for i in next(order)]) for _ in range(2)]
            count = sum(len(targets[0]["labels"]) for *_, targets in parts)
            for images, tokens, targets in parts:
                logits, boxes = net(M.normalize(images), tokens, train=True)
                loss = sum(losses.detection_loss(logits[:, :, first:last], boxes[:, :, first:last],
                                                 targets, count, repeats)["loss"]
                           for first, last, repeats in ((0, 12, 1), (12, 42, 3)))
                loss.backward()
                total += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 240).item())
            optimizer.step()
            optimizer.zero_grad()
            rows.append((total, 1e-3 * scale))
        assert min(norms) < 240 < max(norms)         # Adam would not notice a constant factor
        torch.save({"model": net.state_dict()}, at / "hand.pt")
        assert weights_differ(at / "d/last.pt", at / "hand.pt") < STEADY
        logged = [r for r in map(json.loads, (at / "d/log.jsonl").read_text().splitlines())
                  if "loss" in r]
        assert_close(torch.tensor([(r["loss"], r["lr"]) for r in logged]), torch.tensor(rows), 1e-4)


def test_detection_keeps_the_highest_ap():
    with folder() as at, quiet():
        args, state = args_for(finetune_det, "--out", at), training.Run(torch.device("cpu"))
        _, val = data.open_detection("toyworld:1", 64)
        real, best, kept = finetune_det.evaluate, None, []
        log = training.Log(args, state, 0)
        optimizer = torch.optim.AdamW(detector().parameters())
        (at / "samples").mkdir()
        try:
            for step, ap in ((1, 0.2), (2, 0.5), (3, 0.3)):
                finetune_det.evaluate = lambda *a, ap=ap: dict.fromkeys(finetune_det.HEADLINE, ap)
                best = finetune_det.conclude(detector(), val, args, state, step, best, optimizer,
                                             log)
                kept.append([torch.load(at / n)["step"] for n in ("best.pt", "last.pt")])
        finally:
            finetune_det.evaluate = real
        assert best == 0.5 and kept == [[1, 1], [2, 2], [2, 3]]
        last = torch.load(at / "last.pt")
        assert last["best"] == 0.5 and last["classes"] == list(val.classes)


def test_true_boxes_from_the_network_score_one():
    """A network that answers the truth, photos that are no squares: through prediction, inference
    and evaluation AP is 1. The network is in eval mode just then."""
    class Oracle(torch.nn.Module):
        def __init__(self, samples):
            super().__init__()
            self.glid, self.samples = M.nn.Module(), iter(samples)
            self.glid.config = TINY

        def forward(self, images, layout):
            assert not self.training
            logits, boxes = torch.full((1, len(images), 9, 7), -9.0), torch.rand(
                1, len(images), 9, 4)
            for b in range(len(images)):
                s = next(self.samples)
                h, w = s["image"].shape[1:]
                logits[0, b, torch.arange(len(s["classes"])), s["classes"]] = 9.0
                boxes[0, b, :len(s["boxes"])] = torchvision.ops.box_convert(
                    s["boxes"] / torch.tensor([w, h, w, h]), "xyxy", "cxcywh")
            return logits, boxes
    with folder() as at, quiet():
        args = args_for(finetune_det, "--size", 64, "--batch-size", 3, "--workers", 0, "--out", at)
        _, val = data.open_detection("toyworld:6", 96)
        val.transform = data.detection_transform(False, 64)
        val.source.samples = list(val.source.samples)
        for i, s in enumerate(val.source.samples):
            s["image"] = s["image"][:, :72 + i]
            s["boxes"][:, 1::2].clamp_(max=72 + i)
            keep = (s["boxes"][:, 3] > s["boxes"][:, 1])
            s |= {k: s[k][keep] for k in ("boxes", "classes", "area")}
        net, state = Oracle(val.source.samples), training.Run(torch.device("cpu"))
        result = finetune_det.evaluate(net, val, args, state, at / "p.png")
        assert result["AP"] == result["AR100"] == 1.0 and net.training


def test_masks_are_scaled_about_their_pixels_centres():
    """A disc and its mask keep one centre at every scale (torchvision's nearest: 0.5 off)."""
    y, x = torch.meshgrid(torch.arange(103.0), torch.arange(157.0), indexing="ij")
    disc = ((y - 50) ** 2 + (x - 70) ** 2 < 40 ** 2)
    for size in (29, 64, 77, 190):
        out = data.segmentation_transform(False, size)({    # also of what --overfit trains on
            "image": data.tv_tensors.Image((disc * 255).byte().expand(3, -1, -1)),
            "semantic": data.tv_tensors.Mask(disc.byte()), "depth": "kept",
            "masks": data.tv_tensors.Mask(torch.stack([disc, ~disc, disc])),
            "none": data.tv_tensors.Mask(disc[None][:0]),
            "panoptic": data.tv_tensors.Mask(disc.int() * 70000)})
        assert out["masks"].dtype == torch.bool and out["depth"] == "kept"
        assert torch.equal(out["masks"][0], out["semantic"].bool())
        assert torch.equal(out["masks"][0] * 70000, out["panoptic"]) and out["panoptic"].amax() > 0
        assert torch.equal(out["masks"][0], ~out["masks"][1])
        assert out["image"].shape[1:] == out["masks"].shape[1:] == out["none"].shape[1:]
        shape = out["semantic"].shape
        grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        weights = out["image"][0].double(), out["semantic"].double()
        centres = [(grid * w).sum((1, 2)) / w.sum() for w in weights]
        assert (centres[0] - centres[1]).abs().max() < 0.2, (size, centres)


def test_boxes_stay_those_of_their_masks():
    """Whatever a transform does, the boxes that come out are the boxes of the masks that do."""
    count, ys, xs = 0, torch.arange(120)[:, None], torch.arange(150)
    for make, i in itertools.product((data.detection_transform, data.segmentation_transform),
                                     range(20)):
        with data.seeded(i):
            corner, extent = torch.randint(60, (5, 2)), torch.randint(10, 60, (5, 2))
            boxes = torch.cat([corner, corner + extent], 1)
            x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
            masks = (xs >= x1) & (xs < x2) & (ys >= y1) & (ys < y2)
            out = make(i % 2 == 0, 128)({
                "image": data.tv_tensors.Image(torch.zeros(3, 120, 150, dtype=torch.uint8)),
                "masks": data.tv_tensors.Mask(masks), "boxes": data.tv_tensors.BoundingBoxes(
                    boxes.float(), format="XYXY", canvas_size=(120, 150))})
        assert out["image"].shape[1:] == out["masks"].shape[1:]
        for box, mask in zip(out["boxes"], out["masks"]):
            if mask.any():
                x1, y1, x2, y2 = torchvision.ops.masks_to_boxes(mask[None])[0].tolist()
                error = (box - torch.tensor([x1, y1, x2 + 1, y2 + 1])).abs().max()
                assert error <= 3, (make.__name__, i, box, error)   # nearest pixels, enlarged twice
                count += 1
    assert count > 150


def test_detection_augmentation_is_detrs():
    """Sizes, crops and flips, read off ramps of brightness in a photo of 160 x 160 at 160 px, where
    DETR's 480..800, 400..600 and 384..600 px are 96..160, 80..120 and 76..120."""
    ramp = torch.linspace(0, 255, 160).round().byte().expand(160, 160)
    photo = torch.stack([ramp, ramp.T, ramp])
    transform, shortest, crops, mirrored = data.detection_transform(True, 160), [], [], []
    for i in range(150):
        with data.seeded(i):
            out = transform({"image": data.tv_tensors.Image(photo)})["image"].float()
        x, y = out[0].mean(0), out[1].mean(1)
        shortest.append(min(out.shape[1:]))
        mirrored.append(bool(x[0] > x[-1]))
        shares = (x.max() - x.min()).item() / 255, (y.max() - y.min()).item() / 255
        if min(shares) < 0.98:
            crops.append(shares)
        assert max(out.shape[1:]) <= 266 and (max(out.shape[1:]) == 266 or shortest[-1] >= 96)
    assert min(shortest) == 96 and max(shortest) == 160 and len(set(shortest)) > 8
    assert 50 < sum(mirrored) < 100 and 40 < len(crops) < 110       # not all crops cut something
    assert 0.58 < min(map(min, crops)) < 0.75
    assert any(abs(w - h) > 0.1 for w, h in crops)                  # sides are drawn one by one
    wide = {"image": data.tv_tensors.Image(photo[:, :40])}
    assert data.detection_transform(False, 160)(wide)["image"].shape == (3, 66, 266)
    for i in range(20):
        with data.seeded(i):
            assert max(transform(wide)["image"].shape) <= 266
    # every epoch another view; no box without width; labels go with their boxes
    train, _ = data.open_detection("toyworld:4", 64)
    assert any(train[(0, i)]["image"].shape != train[(1, i)]["image"].shape for i in range(4))
    train.source.samples = [{"image": photo, "classes": torch.tensor([4, 5, 6]), "boxes":
                             torch.tensor([[8.0, 8, 8, 24], [8, 8, 24, 8], [16, 32, 80, 64]])}]
    train.transform = data.detection_transform(False, 160)
    assert train[(0, 0)]["labels"].tolist() == [6]
    assert_close(train[(0, 0)]["boxes"], torch.tensor([[0.3, 0.3, 0.4, 0.2]]), 1e-6)


def test_detection_details():
    """One-to-many queries do not see the others either; 100 answers; fp32; H-DETR's defaults."""
    net, images = detector(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(images, whole(TINY, images), train=True)[0]
        torch.nn.init.normal_(net.offsets[:6])
        after = net(images, whole(TINY, images), train=True)[0]
    assert_close(after[:, :, 6:], before[:, :, 6:], 1e-5)
    assert (after[:, :, :6] - before[:, :, :6]).abs().max() > 1e-3
    found = inference.detection_inference(torch.randn(30, 5), torch.rand(30, 4), (9, 9))
    assert len(found["scores"]) == 100 and (found["scores"].diff() <= 0).all()
    logits, boxes = torch.randn(2, 1, 6, 3).bfloat16(), torch.rand(2, 1, 6, 4).bfloat16()
    half, single = (losses.detection_loss(kind(logits), kind(boxes), detection_batch((2,)), 2)
                    for kind in (torch.Tensor.bfloat16, torch.Tensor.float))
    assert all(half[k] == single[k] and half[k].dtype == torch.float32 for k in half)
    args = training.parse(finetune_det.flags(), finetune_det.PRESETS, ["--data", "x"])
    assert (args.epochs, args.size, args.queries, args.many_queries, args.repeats) == (
        50, 800, 300, 1500, 6)
    assert (args.batch_size, args.lr, args.backbone_lr, args.weight_decay, args.clip, args.drop_path
            ) == (2, 2e-4, 0.1, 0.05, 0.1, 0.2)


# -----------------------------------------------------------------------------
# Instance and panoptic segmentation


ALL_TASKS = ["semantic", "instance", "panoptic"]


def random_answer(queries=12, kinds=4, seed=0):
    """Class and mask logits of a 48 x 32 px image, patch 4, on a larger canvas; ties included."""
    generator = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(queries, kinds + 1, generator=generator)
    masks = 4 * torch.randn(queries, 5, 4, generator=generator).repeat_interleave(
        8, 1).repeat_interleave(8, 2) + torch.randn(queries, 40, 32, generator=generator)
    classes[2, 0], masks[2, 20:30] = 15, 9
    classes[3], masks[3] = classes[2], masks[2]                         # the same answer twice
    masks[5] = -9.0                                                     # nothing at all
    return classes, masks


def test_instance_inference_equals_loops():
    """Against one pair of query and class after the other; in parts as at once."""
    for seed, limit in itertools.product(range(4), (100, 7)):
        classes, masks = random_answer(seed=seed)
        pairs = []
        for q, k in itertools.product(range(12), range(4)):
            p = classes[q].softmax(0)[k].item()
            logits = at_original(masks[q:q + 1], (48, 32), 4, (61, 43))[0]
            inside = logits[logits > 0].sigmoid()
            pairs.append((p, k, p * inside.mean().item() if len(inside) else 0, logits > 0))
        pairs = [x for x in sorted(pairs, key=lambda x: -x[0])[:limit] if x[2] > 0]
        whole_part = inference.PART
        for inference.PART in (1, whole_part):
            found = instance_inference(classes, masks, (48, 32), 4, (61, 43), limit)
            assert found["labels"].tolist() == [x[1] for x in pairs]
            assert_close(found["scores"], torch.tensor([x[2] for x in pairs]), 1e-5)
            assert torch.equal(found["masks"], torch.stack([x[3] for x in pairs]))
    assert not len(instance_inference(classes, masks * 0 - 1, (48, 32), 4, (61, 43))["labels"])


def panoptic_by_loops(classes, masks, size, original, things, least, share):
    """Mask2Former's rule pixel by pixel -> class of each segment and its set of pixels."""
    scores = [(c.softmax(0).max().item(), c.argmax().item()) for c in classes]
    kept = [q for q, (p, k) in enumerate(scores) if p > least and k < classes.shape[1] - 1]
    p = {q: at_original(masks[q:q + 1], size, 4, original)[0].sigmoid() for q in kept}
    owned = {q: set() for q in kept}
    for y, x in itertools.product(*map(range, original)):
        if kept:
            owned[max(kept, key=lambda q: scores[q][0] * p[q][y, x].item())].add((y, x))
    segments, stuff = [], {}
    for q in kept:
        full = {tuple(at) for at in (p[q] >= 0.5).nonzero().tolist()}
        if not owned[q] & full or len(owned[q]) / len(full) < share:
            continue
        k = scores[q][1]
        if k >= things and k in stuff:
            stuff[k] |= owned[q] & full
        else:
            segments.append((k, owned[q] & full))
            stuff[k] = segments[-1][1]
    return segments


def test_panoptic_inference_equals_loops():
    """Against a restatement pixel by pixel, for several thresholds; in parts as at once."""
    merged = void = 0
    for seed, (least, share) in itertools.product(range(4), ((0, 0.1), (0.5, 0.4), (0.8, 0.8))):
        classes, masks = random_answer(seed=seed)
        expected = panoptic_by_loops(classes, masks, (48, 32), (21, 17), 2, least, share)
        whole_part = inference.PART
        for inference.PART in (1, whole_part):
            ids, kinds = panoptic_inference(classes, masks, (48, 32), 4, (21, 17), 2, least, share)
            assert list(kinds.items()) == [(i + 1, k) for i, (k, _) in enumerate(expected)]
            for i, (_, pixels) in enumerate(expected):
                assert {tuple(at) for at in (ids == i + 1).nonzero().tolist()} == pixels
            assert (ids != 0).sum() == sum(len(pixels) for _, pixels in expected)
        void += (ids == 0).any().item()
        merged += len(set(kinds.values())) < len(kinds)
    assert void and merged, "the cases are too easy"


def test_panoptic_inference_by_hand():
    """Two halves of stuff become one segment, two things stay two; a hidden thing and one not sure
    enough are dropped; what nobody claims is void; no query at all is all void."""
    def answer(*rows):                                                  # (class, sure, columns)
        classes, masks = torch.zeros(len(rows), 4), torch.full((len(rows), 8, 8), -20.0)
        for c, m, (label, sure, columns) in zip(classes, masks, rows):
            c[label] = 9 if sure else 0.5
            m[:, columns] = 20
        return panoptic_inference(classes, masks, (8, 8), 1, (8, 8), 2)
    whole_part = inference.PART
    for inference.PART in (1, whole_part):
        ids, kinds = answer((2, 1, slice(0, 2)), (0, 1, slice(2, 3)), (0, 1, slice(3, 4)),
                            (2, 1, slice(4, 6)), (1, 0, slice(6, 8)), (3, 1, slice(6, 8)),
                            (1, 1, slice(2, 5)))        # as sure as the others, but comes last
        assert kinds == {1: 2, 2: 0, 3: 0}
        assert ids[0].tolist() == [1, 1, 2, 3, 1, 1, 0, 0] and (ids == ids[0]).all()
    ids, kinds = answer((3, 1, slice(0, 8)))
    assert kinds == {} and not ids.any()


def test_instance_and_panoptic_answers_of_a_padded_batch():
    """Each image of a padded batch gets the objects and segments that it gets alone."""
    torch.manual_seed(0)
    sizes, segments = [(37, 85), (64, 16), (50, 61)], 0
    net = apart(noisy(Segmenter(ODD, dict.fromkeys(ALL_TASKS, 5), dict.fromkeys(ALL_TASKS, 3))))
    net, asked = net.double().eval(), dict.fromkeys(ALL_TASKS, slice(None))
    images = [torch.randn(3, h, w).double() for h, w in sizes]
    batch = torch.full((3, 3, 70, 90), 123.0).double()
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    with torch.no_grad():
        together = net(batch, Layout(ODD, torch.tensor(sizes)), asked)
        for b, (image, size) in enumerate(zip(images, sizes)):
            alone = net(image[None], whole(ODD, image[None]), asked)
            pairs = []
            for answers, at in ((together, b), (alone, 0)):
                c, m = ([answers[t][i][-1, at] for t in ALL_TASKS[1:]] for i in (0, 1))
                pairs.append((instance_inference(c[0], m[0], size, 2, (33, 47)),
                              panoptic_inference(c[1], m[1], size, 2, (33, 47), 2, 0, 0)))
            (one, (ids, kinds)), (other, (other_ids, other_kinds)) = pairs
            assert torch.equal(one["masks"], other["masks"]) and len(one["masks"])
            assert_close(one["scores"], other["scores"], 1e-5)
            assert torch.equal(ids, other_ids) and kinds == other_kinds
            segments += len(kinds)
    assert segments


def test_objects_of_toyworld():
    """Instances are the scene's masks, segments cover the photo, from the map as from the stack;
    a void pixel belongs to nothing, crowds are marked."""
    for index in range(8):
        s = {k: torch.from_numpy(v) for k, v in toyworld.scene(0, index, 64).items()}
        plain = {k: s[k] for k in ("panoptic", "segments")}
        labels, masks, crowd = data.find_objects("instance", plain, 7)
        assert torch.equal(masks, s["masks"]) and torch.equal(labels, s["classes"])
        stack = dict(layers=stacked(s["masks"]), classes=s["classes"], iscrowd=s["classes"] == 0)
        for a, b in zip(data.find_objects("instance", stack, 7), (labels, masks, labels == 0)):
            assert torch.equal(a, b)
        labels, masks, crowd = data.find_objects("panoptic", plain, 7)
        assert (masks.sum(0) == 1).all() and masks.any(-1).any(-1).all() and not crowd.any()
        assert torch.equal(labels[masks.byte().argmax(0)], s["semantic"].long())
        plain["panoptic"][:5], plain["segments"][0, 2] = 0, 1
        labels, masks, crowd = data.find_objects("panoptic", plain, 7)
        assert not masks[:, :5].any() and crowd.tolist() == [True] + [False] * (len(labels) - 1)


def test_objects_stay_aligned_and_empty_ones_go():
    """Crop and flip move photo and masks together, overlapping ones too; what the crop has cut off
    has no target, crowds have none, and one pixel is enough to stay."""
    class Source:
        classes, things, category_ids = ("a", "b", "c"), 2, (0, 1, 2)
        def __len__(self):
            return 1
        def __getitem__(self, i):
            ids = torch.arange(1, 65).view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
            masks = torch.stack([ids <= 32, ids % 8 < 3, ids > 60, ids > 0]).byte()
            photo = torch.stack([200 * masks[0], 200 * masks[1], 200 * masks[2]])
            segments = torch.stack([torch.arange(1, 65), torch.arange(64) % 3,
                                    (torch.arange(64) == 7).long()], 1)
            mask = data.tv_tensors.Mask
            return {"image": data.tv_tensors.Image(photo), "panoptic": mask(ids.int()),
                    "segments": segments, "layers": mask(stacked(masks.bool())),
                    "classes": torch.tensor([0, 1, 0, 1]), "iscrowd": torch.tensor([0, 0, 0, 1])}
    sizes = set()
    train = data.Segmentation(Source(), True, 32, 0, ["instance", "panoptic"])
    train.transform = data.v2.Compose([t for t in train.transform.transforms
                                       if not isinstance(t, data.ColourJitter)])
    for epoch in range(20):
        sample = train[(epoch, 0)]
        masks = sample["masks"]
        assert masks.dtype == torch.bool and masks.flatten(1).any(1).all()
        assert len(sample["labels"]) == len(masks) and masks.shape[1:] == sample["image"].shape[1:]
        if sample["task"] == "instance":
            shown = [c for c in sample["image"].as_subclass(torch.Tensor) > 100 if c.any()]
            sizes.add(len(masks))
            assert len(masks) in (len(shown), len(shown) + 1)       # a blurred edge may vanish
            for mask in masks:                                          # nearest, linear: edges
                assert max((mask == c).float().mean() for c in shown) > 0.85
        else:
            assert masks.sum(0).max() == 1 and len(masks) < 64 and not (epoch % 2 == 0)
    assert len(sizes) > 1, "no crop has cut anything off"


def test_tasks_take_turns():
    """Any batch, step and process holds the tasks evenly; over as many epochs as tasks every image
    is seen once with each; nothing depends on the number of processes or on where a run resumed."""
    tasks, length = ALL_TASKS, 24
    train = data.open_segmentation(f"toyworld:{length}", 64, tasks=tasks)[0]
    def batches(size, world, rank, start=0, stop=18):
        args = argparse.Namespace(batch_size=size, accumulate=1, seed=1)
        state = training.Run(torch.device("cpu"), rank, world)
        return list(batching.Batches(length, args, state, start, stop, kinds=3))
    def task(at):
        return tasks[sum(at) % 3]
    one = batches(4, 1, 0)                                              # 6 steps an epoch
    assert [sum(x, []) for x in zip(batches(2, 2, 0), batches(2, 2, 1))] == one
    assert batches(4, 1, 0, start=7) == one[7:]
    for batch in one + batches(2, 2, 1) + batches(5, 1, 0, stop=8):
        counts = [list(map(task, batch)).count(t) for t in tasks]
        assert max(counts) - min(counts) <= 1, counts
    seen = [(i, task((e, i))) for batch in one for e, i in batch]
    assert len(seen) == len(set(seen)) == 3 * length
    for at in one[0] + one[7]:
        assert train[at]["task"] == task(at)
    orders = [[i for batch in one[n:n + 6] for _, i in batch] for n in (0, 6)]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def multitask_batch(tasks, size=64):
    """One image for each of the tasks named, with random objects -> images, targets, slices."""
    images, targets = seg_batch([(0, 2), (1,), (0, 1), (2, 0, 1)][:len(tasks)], size)
    for target, task in zip(targets, sorted(tasks)):
        target["task"] = task
    return images, targets, finetune_seg.slices(ALL_TASKS, targets)


def multitask_net():
    torch.manual_seed(0)
    return apart(Segmenter(TINY, dict(zip(ALL_TASKS, (6, 7, 8))), dict.fromkeys(ALL_TASKS, 3)))


def multitask_loss(net, images, targets, asked):
    density = finetune_seg.objects_per_image(asked, targets, training.Run(torch.device("cpu")))
    answers = net(images, whole(TINY, images), asked, every_layer=True)
    return finetune_seg.batch_loss(answers, asked, targets, density, (64, 64), 128)


def test_multitask_equals_each_task_alone():
    """In one pass over a mixed, ragged batch each task answers what its model alone answers."""
    net = noisy(multitask_net()).double().eval()
    sizes = torch.tensor([(37, 64), (64, 16), (50, 61), (64, 64)])
    images = torch.randn(4, 3, 64, 64).double()
    asked = {"semantic": slice(3, 4), "instance": slice(0, 2), "panoptic": slice(2, 3)}
    with torch.no_grad():
        answers = net(images, Layout(TINY, sizes), asked, every_layer=True)
        for task, mine in asked.items():
            single = Segmenter(TINY, {task: net.heads[task].offsets.shape[0]}, {task: 3}).double()
            state = net.state_dict()
            single.load_state_dict({k: state[k] for k in single.state_dict()})
            single.eval()
            for b in range(4)[mine]:
                h, w = sizes[b].tolist()
                image = images[b:b + 1, :, :h, :w]
                c, m = single(image, whole(TINY, image), {task: slice(None)}, True)[task]
                classes, masks = (x[:, b - mine.start] for x in answers[task])
                assert_close(classes, c[:, 0], 1e-9, f"{task}: classes")
                assert_close(masks[..., :m.shape[-2], :m.shape[-1]], m[:, 0], 1e-9, task)


def test_every_parameter_learns_in_multitask():
    """Also the gradient of a head whose task is not in this process's batch exists: it is zero."""
    net = multitask_net()
    batch = multitask_batch(["instance", "instance", "panoptic", "semantic"])
    assert not without_gradient(net, multitask_loss(net, *batch))
    net = multitask_net()
    loss = multitask_loss(net, *multitask_batch(["semantic", "semantic"]))
    still = without_gradient(net, loss)
    heads = [f"heads.{t}.{n}" for t in ("instance", "panoptic") for n in (
        "offsets", "classify.weight", "classify.bias", "embed.weight", "embed.bias")]
    assert sorted(still) == sorted(heads)
    assert all(p.grad is not None and not p.grad.any() for n, p in net.named_parameters()
               if n in heads)
    # alone in the batch a task's loss is what it would be without the other tasks
    for count in (1, 2):
        torch.manual_seed(3)
        a = multitask_loss(net, *multitask_batch(["semantic"] * count))
        torch.manual_seed(3)
        assert abs(a - seg_loss(net, *seg_batch(((0, 2), (1,))[:count]))) < 1e-5 * a


def test_multitask_loss_is_a_mean_over_images():
    """However the tasks fall to the processes, the mean of their losses is the loss of one process
    with all images. Constant masks and logits, two objects everywhere: no chance, equal weights."""
    generator = torch.Generator().manual_seed(0)
    def image(task):
        full = torch.tensor([True, False])[:, None, None].expand(-1, 64, 64)
        value = torch.randn(2, 1, 5, 1, 1, generator=generator).expand(-1, -1, -1, 16, 16)
        return (task, torch.randn(2, 1, 5, 4, generator=generator), value,
                {"task": task, "labels": torch.tensor([2, 0]), "masks": full})
    everything = [image(t) for t in ("instance", "instance", "panoptic", "semantic", "panoptic",
                                     "panoptic")]
    class Counting:
        """A Run whose sums grow with every process that asks; the last one knows them."""
        world = 1
        def sum(self, *values):
            self.sums = [a + b for a, b in zip(getattr(self, "sums", [0] * 6), values)]
            return self.sums

    def mean_loss(images_each):
        state, total = Counting(), 0
        shares = [sorted(everything[i:i + images_each], key=lambda x: x[0])
                  for i in range(0, 6, images_each)]
        for known in (False, True):
            for share in shares:
                targets = [x[3] for x in share]
                asked = finetune_seg.slices(ALL_TASKS, targets)
                if not known:
                    density = finetune_seg.objects_per_image(asked, targets, state)
                    continue
                classes, masks = (torch.cat([x[i] for x in share], 1) for i in (1, 2))
                answers = {t: (classes[:, mine], masks[:, mine]) for t, mine in asked.items()}
                total += finetune_seg.batch_loss(answers, asked, targets, density, (64, 64), 32)
        return total.item() / len(shares)
    expected = mean_loss(6)
    for images_each in (3, 2, 1):
        assert abs(mean_loss(images_each) - expected) < 1e-4 * expected


def test_tiny_and_missing_objects_are_finite():
    """Instance batches with no object at all, with masks of one pixel, with more objects than
    queries, and with all three."""
    dot = torch.zeros(9, 64, 64, dtype=torch.bool)
    dot[torch.arange(9), torch.arange(9) * 7, 63] = True
    for counts in ((0, 0), (1, 1), (9, 9), (9, 0)):
        net, targets = multitask_net(), []
        for n in counts:
            targets.append({"task": "instance", "labels": torch.arange(n) % 3, "masks": dot[:n]})
        asked = finetune_seg.slices(ALL_TASKS, targets)
        loss = multitask_loss(net, torch.randn(2, 3, 64, 64), targets, asked)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


class Oracle:
    """A model that answers with the truth: query n of a task is its n-th object, at full size."""
    def __init__(self, dataset):
        self.glid = argparse.Namespace(config=Config(**PRESETS["tiny"] | dict(patch=1)))
        self.dataset, self.seen = dataset, 0

    def eval(self):
        pass
    train = eval

    def __call__(self, images, layout, asked):
        answers = {}
        for task in asked:
            classes = torch.full((1, len(images), 20, 13), -30.0)
            masks = torch.full((1, len(images), 20, 64, 64), -30.0)
            classes[..., -1] = 0
            for b in range(len(images)):
                sample = self.dataset[(0, self.seen + b)]
                labels, truth, _ = data.find_objects(task, sample, 7)
                classes[0, b, torch.arange(len(labels)), labels] = 30
                masks[0, b, :len(labels)][truth] = 30
            kinds = [*range(7), 12] if task == "instance" else slice(None)
            answers[task] = classes[..., kinds], masks
        self.seen += len(images)
        return answers


def test_truth_as_answer_is_perfect():
    """Fed with the truth, inference and metrics give exactly 1, for every task; with the things
    taken for each other they do not, and only the stuff stays perfect."""
    train, dataset = data.open_segmentation("toyworld:12", 64, tasks=ALL_TASKS, overfit=True)
    assert torch.equal(train[(3, 2)]["image"], dataset[(0, 2)]["image"])    # --overfit: unchanged
    args = args_for(finetune_seg, "--tasks", ",".join(ALL_TASKS), "--batch-size", 5, "--workers", 0)
    state = training.Run(torch.device("cpu"))
    found = finetune_seg.evaluate(Oracle(dataset), dataset, args, state)
    assert set(found) == {n for names in finetune_seg.REPORT.values() for n in names}
    assert all(value == 1.0 for value in found.values()), found
    class Wrong(Oracle):
        def __call__(self, images, layout, asked):
            answers = super().__call__(images, layout, asked)
            return {t: (torch.cat([c[..., :7].roll(1, -1), c[..., 7:]], -1), m)
                    for t, (c, m) in answers.items()}
    wrong = finetune_seg.evaluate(Wrong(dataset), dataset, args, state)
    assert wrong["PQ_stuff"] == 1 and max(wrong["AP"], wrong["PQ_things"]) < 0.1, wrong
    assert wrong["mIoU"] < 0.6, wrong


def test_queries_of_the_paper():
    """100, 200, 200 by default; one number for all, or one each; instance knows things only."""
    train = data.open_segmentation("toyworld:2", 64, tasks=ALL_TASKS)[0]
    state = training.Run(torch.device("cpu"))
    for given, expected in ((None, (100, 200, 200)), ("9", (9, 9, 9)), ("3,4,5", (3, 4, 5))):
        args = args_for(finetune_seg, "--tasks", ",".join(ALL_TASKS), "--queries", given or "1")
        args.queries = args.queries if given else None
        heads = finetune_seg.build(args, train, state).heads
        assert tuple(len(heads[t].offsets) for t in ALL_TASKS) == expected
        assert [heads[t].classify.out_features for t in ALL_TASKS] == [13, 8, 13]


# -----------------------------------------------------------------------------
# Depth


def silog_restated(prediction, target):
    """BTS writes it 10 sqrt(mean g^2 - 0.85 mean(g)^2); in double precision."""
    p, t = (x.double().numpy().ravel() for x in (prediction, target))
    g = np.log(p[t > 0] + 1e-3) - np.log(t[t > 0] + 1e-3)
    return 10 * math.sqrt((g ** 2).mean() - 0.85 * g.mean() ** 2)


def test_silog_by_formula():
    """Value and, by central differences, gradient of the other published form of the loss."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (0.1 + 9 * torch.rand(2, 3, 4, generator=generator) for _ in "pt")
    target[0, 1:] = 0                                               # invalid
    prediction.requires_grad_()
    loss = losses.silog_loss(prediction, target)
    loss.backward()
    p = prediction.detach()
    assert abs(loss.item() - silog_restated(p, target)) < 1e-4
    for i in range(p.numel()):
        moved = [p.double().flatten().index_add(0, torch.tensor([i]), torch.tensor([h]).double())
                 for h in (1e-5, -1e-5)]
        up, down = (silog_restated(m, target.flatten()) for m in moved)
        assert abs(prediction.grad.flatten()[i].item() - (up - down) / 2e-5) < 1e-4, i


def test_silog_without_much_to_measure():
    """No valid pixel, one, a perfect prediction, a truth of almost zero: all finite."""
    ones = torch.ones(2, 4, 4)
    one_pixel = torch.zeros(2, 4, 4)
    one_pixel[1, 2, 3] = 4
    unknown = torch.full((2, 4, 4), math.nan)                       # some files mark holes so
    cases = [(ones, 0 * ones, 0.0), (ones, unknown, 0.0), (2 * ones, 2 * ones, 0.0),
             (ones, one_pixel, 10 * 0.15 ** 0.5 * math.log(4.001 / 1.001)),
             (ones, -ones, 0.0), (ones, 1e-12 * ones, 10 * 0.15 ** 0.5 * math.log(1001))]
    for prediction, target, expected in cases:
        prediction = prediction.clone().requires_grad_()
        loss = losses.silog_loss(prediction, target)
        loss.backward()
        assert abs(loss.item() - expected) <= 1e-4 * expected, (loss.item(), expected)
        assert prediction.grad.isfinite().all() and bool(prediction.grad.any()) == (expected > 0)


def depth_net(queries=6, config=TINY):
    """A DepthEstimator whose queries differ and whose biases are not zero."""
    torch.manual_seed(0)
    net = noisy(DepthEstimator(config, queries, 0.5, 8.0)).eval()
    torch.nn.init.normal_(net.offsets)
    return net


def test_depth_equals_equations_5_to_7():
    net, images = depth_net(), torch.randn(2, 3, 64, 64)
    tokens = whole(TINY, images)
    with torch.no_grad():
        depth = net(images, tokens)
        x, maps = net.glid.ask(images, tokens, net.offsets)
        features = tokens.to_grid(maps[0], 0)
        length, z = (f(x[0]).double() for f in (net.length, net.embed))
    assert depth.shape == (2, 32, 32) and depth.dtype == torch.float32
    for b in range(2):
        n = [math.exp(v) for v in length[b, :, 0].tolist()]
        n = [v / sum(n) for v in n]                                 # sum 1: Eq. 5's range is full
        centres = [0.5 + 7.5 * (n[i] / 2 + sum(n[:i])) for i in range(6)]           # Eq. 5
        assert 0.5 < centres[0] and centres[-1] < 8 and centres == sorted(centres)
        for y, x in ((0, 0), (3, 30), (31, 17)):
            scores = [math.exp(float(z[b, i] @ features[b, y, x].double())) for i in range(6)]
            expected = sum(s / sum(scores) * c for s, c in zip(scores, centres))    # Eq. 6, 7
            assert abs(depth[b, y, x].item() - expected) < 1e-4
    with torch.no_grad():                                           # equal lengths: by hand
        net.length.weight.zero_()
        centres = net.bins(torch.randn(1, 6, TINY.dim))[0]
    assert_close(centres, 0.5 + 7.5 * (torch.arange(6) + 0.5) / 6, 1e-6)


def depth_batch(sizes=((64, 64), (40, 56))):
    """Photos of unequal sizes with depth, holes in it, collated."""
    generator = torch.Generator().manual_seed(0)
    samples = [{"image": torch.randint(0, 256, (3, h, w), generator=generator).byte(),
                "depth": 9 * (torch.rand(h, w, generator=generator) - 0.2).clamp(min=0)}
               for h, w in sizes]
    return samples, data.collate(TINY, samples)


def test_depth_of_a_padded_batch_equals_alone():
    """Loss and predictions of an image do not depend on its neighbours or on what the padding
    holds; a prediction is the mean over the photo and, turned back, its mirror image."""
    net, state = depth_net(), training.Run(torch.device("cpu"))
    samples, (images, tokens, targets) = depth_batch()
    sizes = [(64, 64), (40, 56)]
    images[1, :, 40:], images[1, :, :, 56:] = 200, 99               # must not be seen
    found = finetune_depth.predict(net, images, tokens, sizes, state)
    alone, mirrored = [], []
    with torch.no_grad():
        for sample in samples:
            for turn, results in ((False, alone), (True, mirrored)):
                image = sample["image"].flip(2) if turn else sample["image"]
                image, single, _ = data.collate(TINY, [{"image": image}])
                depth, size = net(M.normalize(image), single), image.shape[2:]
                depth = at_original(depth, size, 2, size, align_corners=True)[0]
                results.append(depth.flip(1) if turn else depth)
        batch = net(M.normalize(images), tokens)
    for a, b, c in zip(found, alone, mirrored):
        assert_close(a, (b + c) / 2, 1e-5, "flip test")
        assert (b - c).abs().max() > 1e-3, "the mirror image says the same"
    one_pass = finetune_depth.predict(net, images, tokens, sizes, state, mirror=False)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one_pass, alone))
    loss = finetune_depth.depth_loss(batch, targets, 2)
    pairs = torch.cat([torch.stack([a.flatten(), s["depth"].flatten()])
                       for a, s in zip(alone, samples)], 1)
    assert abs(loss.item() - silog_restated(*pairs)) < 1e-4
    # aligned corners: the first and last token sit on the first and last pixel
    ramp = at_original(torch.arange(8.0).expand(1, 8, 8), (16, 16), 2, (16, 16), True)[0]
    assert_close(ramp[3], torch.linspace(0, 7, 16), 1e-6)


def test_every_parameter_learns_in_depth():
    """Also under bf16, whose rounding the depth itself is spared; without one valid pixel the loss
    is finite and every parameter has a gradient tensor (several processes wait for each).
    (The decoder's last bias is the same for all queries and cancels in both softmaxes.)"""
    _, (images, tokens, targets) = depth_batch()
    images = M.normalize(images)
    for dtype in (torch.float32, torch.bfloat16):
        net = depth_net().train()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            depth = net(images, tokens)
        assert depth.dtype == torch.float32 and (depth != depth.bfloat16().float()).any()
        assert not without_gradient(net, finetune_depth.depth_loss(depth, targets, 2))
    net.zero_grad()
    nothing = [{"depth": 0 * t["depth"]} for t in targets]
    loss = finetune_depth.depth_loss(net(images, tokens), nothing, 2)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_depth_bins_come_apart():
    """Equal queries (Eq. 3: e_i = 0) answer different bins: one step and no two are the same."""
    torch.manual_seed(0)
    net = DepthEstimator(TINY, 6, 1e-3, 10.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    _, (images, tokens, targets) = depth_batch()
    finetune_depth.depth_loss(net(M.normalize(images), tokens), targets, 2).backward()
    optimizer.step()
    for a, b in itertools.combinations(net.offsets, 2):
        assert not torch.equal(a, b)


def test_depth_augmentation_keeps_photo_and_depth_together():
    """A photo painted by its depth stays so: to the bit through flip and crop, but for blurred
    borders through the rotation, whose uncovered corners are invalid."""
    depth = data.ToyWorld("train", 1, 64, keys=["depth"])[0]["depth"]
    grey = (depth * 25).round()
    sample = {"image": data.tv_tensors.Image(grey.byte().expand(3, -1, -1)),
              "depth": data.tv_tensors.Mask(grey / 25)}
    rotate, flip, crop, colours = data.depth_transform(48, 56).transforms
    crops = set()
    for i in range(20):
        with data.seeded(i):
            out = crop(flip(sample))
        image, d = out["image"].float() / 25, out["depth"]
        assert image.shape == (3, 48, 56) and d.shape == (48, 56) and torch.equal(image[0], d)
        crops.add(d.as_subclass(torch.Tensor).numpy().tobytes())
    assert len(crops) > 15                                          # crops and flips do differ
    for i in range(20):
        with data.seeded(i):
            out = rotate(sample)
        assert set(out["depth"].unique().tolist()) <= set(sample["depth"].unique().tolist()) | {0.0}
        error = (out["image"][0].float() / 25 - out["depth"]).abs()
        assert (error < 0.3).float().mean() > 0.85
    turned, board = 0, data.tv_tensors.Mask(1 + torch.arange(300 * 300.0).view(300, 300))
    photo = data.tv_tensors.Image((board % 200).byte().expand(3, -1, -1))
    theirs = data.v2.RandomApply([data.v2.RandomRotation(
        2.5, interpolation=data.InterpolationMode.BILINEAR)])
    for i in range(40):                         # half of the time, invalid corners, small angles
        with data.seeded(i):
            out = rotate({"image": photo, "depth": board})
        with data.seeded(i):
            expected = theirs({"image": photo, "depth": board})
        for k in out:                           # rounding; torchvision fills half of the border
            assert ((out[k].float() - expected[k]).abs() > 1).float().mean() < 0.01, k
        out = out["depth"]
        turned += not torch.equal(out, board)
        assert torch.equal(out, board) or 0 < (out == 0).float().mean() < 0.05
    assert 10 < turned < 30
    painted = data.tv_tensors.Image(torch.full((3, 8, 8), 100, dtype=torch.uint8))
    changed, low, high = 0, (100 / 255) ** 1.1 * 0.75 * 0.9, (100 / 255) ** 0.9 * 1.25 * 1.1
    for i in range(40):
        with data.seeded(i):
            out = colours({"image": painted, "depth": depth})
        assert out["depth"] is depth and out["image"].dtype == torch.uint8
        assert 255 * low - 1 < out["image"].min() and out["image"].max() < 255 * high + 1
        changed += not torch.equal(out["image"], painted)
    assert 10 < changed < 30


def test_depth_samples():
    """Functions of (seed, epoch, index); validation as it is; --overfit: both, and the same."""
    train, val = data.open_depth("toyworld:3", 48, 64, seed=1)
    a, b, c = train[(0, 1)], train[(0, 1)], train[(1, 1)]
    assert a["image"].shape == (3, 48, 64) and a["depth"].shape == (48, 64)
    assert torch.equal(a["image"], b["image"]) and torch.equal(a["depth"], b["depth"])
    assert not torch.equal(a["image"], c["image"])
    assert val[(0, 1)]["image"].shape == (3, 64, 64)
    assert torch.equal(val[(0, 1)]["depth"], val.source[1]["depth"])
    train, val = data.open_depth("toyworld:3", 48, 64, overfit=True)
    for k in ("image", "depth"):
        assert torch.equal(train[(4, 2)][k], val[(0, 2)][k])
        assert torch.equal(val[(0, 2)][k], train.source[2][k])


def test_depth_truth_has_no_error():
    """The truth as prediction scores 0, in Eigen's window too, which has the published corners."""
    metric = metrics.DepthErrors(1e-3, 10)
    for sample in data.ToyWorld("train", 3, 64, keys=["depth"]).samples:
        metric.update(sample["depth"].numpy(), sample["depth"].numpy())
    errors = metric.result()
    assert all(errors[k] == 0 for k in ("REL", "RMSE", "log10", "SILog")), errors
    assert all(errors[f"delta{k}"] == 1 for k in (1, 2, 3)) and errors["images"] == 3
    args = args_for(finetune_depth, "--eigen-crop")
    window = finetune_depth.graded((480, 640), args)
    rows, columns = window.nonzero()
    assert window.sum() == 426 * 560 and rows.min() == 45 and columns.min() == 41
    assert rows.max() == 470 and columns.max() == 600
    with raises(InputError, "--eigen-crop", "64 x 48"):
        finetune_depth.graded((64, 48), args)
    assert finetune_depth.graded((3, 5), args_for(finetune_depth)).sum() == 15


def test_depth_pictures():
    """Invalid is black, near is lighter than far, and what is off the scale is its end."""
    depth = torch.tensor([[0.0, 1, 2, 3, 4, 9]])
    picture = draw.depth_map(depth, 1, 4)
    assert picture.shape == (3, 1, 6) and picture.dtype == torch.uint8
    light = picture.sum(0)[0].tolist()
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
            if step + 1 < total:
                optimizer.step()
                schedule.step()


def test_depth_loop_does_what_it_says():
    """finetune_depth.py with two micro-steps against training written out by hand."""
    with folder() as at, quiet(), steady_adam():
        args = args_for(finetune_depth, "--data", "toyworld:4", "--batch-size", 2, "--accumulate",
                        2, "--workers", 0, "--steps", 4, "--clip", 0.5, "--query-lr", 50,
                        "--backbone-lr", 0.1, "--lr", 1e-3, "--init", at / "pre.pt",
                        "--out", at / "d")
        torch.manual_seed(1)
        torch.save({"model": noisy(Pretrainer(TINY)).state_dict(), "config": {}}, at / "pre.pt")
        found = finetune_depth.main(args)
        torch.manual_seed(0)
        net = DepthEstimator(TINY, args.queries, 1e-3, 10.0)
        state = training.Run(torch.device("cpu"))
        checkpoints.load_parts(net.glid, at / "pre.pt", checkpoints.PARTS, state)
        groups = training.param_groups(net, 0.01, [("offsets", 50.0), ("backbone", 0.1)])
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
        train, val = data.open_depth("toyworld:4", 64, 64)
        order = iter(batching.Batches(4, args, state, 0, 4))
        # peak after 0.2 steps; then half a cosine over 2.8 steps to 1 / 2500
        for step in range(4):
            low = 1 / 2500
            scale = 0.04 if step == 0 else \
                low + (1 - low) * (1 + math.cos(math.pi * (step - 0.2) / 2.8)) / 2
            training.set_lr(optimizer, 1e-3 * scale)
            for _ in range(2):
                images, tokens, targets = data.collate(TINY, [train[i] for i in next(order)])
                depth = net(M.normalize(images), tokens)
                (finetune_depth.depth_loss(depth, targets, 2, 1e-3, 10) / 2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"model": net.state_dict()}, at / "hand.pt")
        assert weights_differ(at / "d/last.pt", at / "hand.pt") < STEADY
        assert weights_differ(at / "d/last.pt", at / "d/best.pt") == 0
        # REL of 4 images, image by image, from predictions at their own size
        rel = []
        for i in range(4):
            images, tokens, targets = data.collate(TINY, [val[(0, i)]])
            truth = targets[0]["depth"]
            guess = finetune_depth.predict(net.eval(), images, tokens, [truth.shape], state)[0]
            valid = (truth > 1e-3) & (truth < 10)
            rel.append(((guess - truth).abs() / truth)[valid].mean().item())
        assert abs(found["REL"] - np.mean(rel)) < 1e-3
        args.eval = True
        again = finetune_depth.main(args)
        assert again == found and again["step"] == 4


def test_depth_keeps_the_lowest_error():
    """best.pt is the checkpoint with the lowest REL, whatever came after it."""
    with folder() as at, quiet():
        args, state = args_for(finetune_depth, "--out", at), training.Run(torch.device("cpu"))
        net, kept, best = depth_net(), [], None
        real = finetune_depth.evaluate, checkpoints.keep
        checkpoints.keep = lambda *a: kept.append((a[4], a[5]["REL"], a[7]))
        log = training.Log(args, state, 0)
        try:
            for step, rel in ((1, 0.3), (2, 0.2), (3, 0.4)):
                finetune_depth.evaluate = lambda *a, rel=rel: {"REL": rel, "RMSE": 1.0}
                best = finetune_depth.conclude(net, None, args, state, step, best, None, log)
        finally:
            finetune_depth.evaluate, checkpoints.keep = real
        assert kept == [(1, 0.3, True), (2, 0.2, True), (3, 0.2, False)]


def test_depth_range_is_told():
    """Least, greatest and median measured depth, what is beyond the bins, and the holes."""
    class Source:
        def __len__(self):
            return 48                                           # every third is looked at
        def labels(self, i):
            assert i % 3 == 0
            if i == 45:
                raise InputError("broken")
            depth = torch.tensor([[0.0, 2 + i], [0.5, 1]])
            return {"depth": depth.repeat_interleave(4, 0).repeat_interleave(4, 1)}
    with raises(InputError, "broken"):
        finetune_depth.spread(Source(), args_for(finetune_depth))
    line = finetune_depth.spread(Source(), args_for(finetune_depth, "--on-error", "skip"))
    assert line.startswith("depth 0.50 to 44.00 m, median 1.00 m, 27% of it beyond 0.001 to 10 m")
    assert line.endswith("75% of the pixels")


def test_depth_wrong_input():
    with folder() as at, quiet():
        for flags, word in ((["--min-depth", 9, "--max-depth", 8], "--min-depth"),
                            (["--eigen-crop", "--init", "no.pt"], "--eigen-crop"),
                            (["--min-depth", 11, "--max-depth", 12, "--steps", 1], "--max-depth"),
                            (["--data", at], "toyworld")):
            out = at / word                                 # of which the third is saved
            flags = ["--data", "toyworld:2", "--batch-size", 2, "--workers", 0, *flags]
            with raises(InputError, word):
                finetune_depth.main(args_for(finetune_depth, "--out", out, *flags))
        paper = training.parse(finetune_depth.flags(), finetune_depth.PRESETS, ["--data", "x"])
        assert (paper.steps, paper.batch_size, paper.queries, paper.lr) == (38_400, 2, 64, 1e-4)
        assert (paper.crop, paper.weight_decay, paper.clip) == ([416, 544], 0.01, 35)


# -----------------------------------------------------------------------------
# Pose


def dots(points, size=(200, 260), radius=5.0):
    """Black photo uint8 [3, H, W] with a soft white dot at each point (photo px: a pixel's centre
    is at + 0.5)."""
    y, x = np.mgrid[:size[0], :size[1]] + 0.5
    value = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (radius / 2) ** 2))
                for px, py in points)
    return torch.from_numpy((255 * value.clip(0, 1)).round().astype(np.uint8)).expand(3, -1, -1)


def centroid(crop):
    """Centre of mass (x, y), the centre of a pixel at whole numbers."""
    value = np.asarray(crop[0], np.float64)
    y, x = np.mgrid[:value.shape[0], :value.shape[1]]
    return np.array([(x * value).sum(), (y * value).sum()]) / value.sum()


def test_pose_box_to_crop():
    """The view has the crop's aspect, holds the box and is 1.25 times as large; its sides are the
    centres of the crop's outer pixels."""
    centre, size = pose.fit_box([10, 20, 40, 100], 256, 192)
    assert centre.tolist() == [25, 60] and size.tolist() == [75, 100]       # 60 x 80, times 1.25
    centre, size = pose.fit_box([0, 0, 90, 30], 256, 192)
    assert np.allclose(size, [112.5, 150])
    matrix = pose.affine(centre, size, 256, 192)
    corners = np.array([centre - size / 2, centre + size / 2])
    assert np.allclose(pose.move(matrix, corners), [[0, 0], [191, 255]])
    assert np.isfinite(pose.inverse(pose.affine(*pose.fit_box([5, 5, 5, 5], 64, 48), 64, 48))).all()


def test_pose_warp_lands_where_the_joints_say():
    """Crop -> photo -> crop is exact; a dot in the photo appears where its joint is mapped to,
    turned, enlarged and shrunk; so does its mirror image, under the other side's name."""
    generator = np.random.default_rng(0)
    for extent, degrees in ((60, 0), (60, 30), (20, -80), (150, 45), (500, 10), (900, -25)):
        at = np.array([130.3, 100.8])
        centre, size = pose.fit(at + generator.uniform(-3, 3, 2), (extent, 1.2 * extent), 96, 72)
        matrix = pose.affine(centre, size, 96, 72, degrees)
        points = generator.uniform(0, 72, (50, 2))
        there_and_back = pose.move(matrix, pose.move(pose.inverse(matrix), points))
        assert np.abs(there_and_back - points).max() < 1e-6
        image = dots([at], radius=max(5, extent / 12))
        crop = pose.warp(image, matrix, 96, 72)
        expected = pose.move(matrix, at[None])
        assert crop.shape == (3, 96, 72)
        assert np.abs(centroid(crop) - expected).max() < 0.06, (extent, degrees)
        # the dot marks the left wrist: in the mirror that is the right one
        joints, labelled = np.zeros((17, 2)), np.arange(17) == 9
        joints[9] = expected
        crop, joints, labelled = pose.mirror(crop, joints, labelled)
        assert labelled.nonzero()[0].tolist() == [10]
        assert np.abs(centroid(crop) - joints[10]).max() < 0.06
    # right is right: the dot is right of the centre and a clockwise quarter turn brings it below
    matrix = pose.affine(np.array([100, 100]), np.array([95.0, 95]), 96, 96, 90)
    assert np.allclose(pose.move(matrix, np.array([[110.0, 100]])), [[47.5, 57.5]])


def test_pose_warp_borders_and_aliasing():
    """Black outside the photo; a fine pattern that a small crop cannot show becomes grey."""
    white = torch.full((3, 50, 50), 255, dtype=torch.uint8)
    crop = pose.warp(white, pose.affine(np.array([0, 25]), np.array([60, 80]), 64, 48), 64, 48)
    assert not crop[:, :, :22].any() and (crop[:, 20:44, 26:40] == 255).all()
    stripes = white.clone().repeat(1, 8, 8)
    stripes[:, :, ::2] = 0
    crop = pose.warp(stripes, pose.affine(*pose.fit_box([0, 0, 400, 400], 64, 48), 64, 48), 64, 48)
    inner = crop[:, 24:40, 12:36].float()
    assert (inner - 127.5).abs().max() < 32


def test_pose_augmentation_follows_vitpose():
    """The shares and the spread of the random views, and views of half a body."""
    box, keypoints = np.array([100.0, 50, 190, 170]), np.full((17, 3), 2.0)
    keypoints[:, 0] = np.linspace(110, 180, 17)
    keypoints[:, 1] = np.linspace(60, 160, 17)
    _, whole_size = pose.fit_box(box, 64, 48)
    def views(keypoints, count=1500):
        for i in range(count):
            with data.seeded(7, i):
                yield pose.random_view(box, keypoints, 64, 48)
    keypoints[8:, 2] = 0                                    # 8 joints: too few to cut in half
    centre, size, degrees, mirrored = map(np.array, zip(*views(keypoints)))
    shift, scale = (centre - [145, 110]) / [90, 120], size[:, 0] / whole_size[0]
    moved = (shift != 0).any(1)
    assert abs(moved.mean() - 0.3) < 0.04 and abs(mirrored.mean() - 0.5) < 0.04
    assert 0.19 < np.abs(shift).max() <= 0.2 and abs(shift[moved].mean()) < 0.02
    assert scale.min() == 0.5 and scale.max() == 1.5 and abs(scale.mean() - 1) < 0.04
    inside = scale[(scale > 0.5) & (scale < 1.5)]
    assert abs(len(inside) / len(scale) - 0.683) < 0.04     # one standard deviation
    turned = degrees != 0
    assert abs(turned.mean() - 0.6) < 0.04 and np.abs(degrees).max() == 80
    assert abs((np.abs(degrees[turned]) < 40).mean() - 0.683) < 0.05
    keypoints[:, 2] = 2
    centre = np.array([v[0] for v in views(keypoints)])
    upper, lower = ((np.abs(centre - (a + b) / 2) < 1e-6).all(1).mean()
                    for a, b in ((keypoints[0, :2], keypoints[10, :2]),
                                 (keypoints[11, :2], keypoints[16, :2])))
    assert abs(upper - 0.15) < 0.03 and abs(lower - 0.15) < 0.03
    for i in range(50):                                     # without halves: around the box
        with data.seeded(7, i):
            centre, *_ = pose.random_view(box, keypoints, 64, 48, upper=None)
        assert (np.abs(centre - [145, 110]) <= 0.2 * np.array([90, 120]) + 1e-9).all()


def test_pose_targets():
    """Height 1 at the joint, between pixels too; sigma in heatmap px; no weight without a label or
    outside the map."""
    joints = torch.tensor([[[31.5, 21.0], [63.0, 0], [-4.0, 9.0], [63.0, 80.0], [10.0, 10.0]]])
    labelled = torch.tensor([[True, True, True, True, False]])
    maps, weight = pose.heatmap_targets(joints, labelled, (64, 64), (16, 16), sigma=2.0)
    assert weight.tolist() == [[1, 1, 0, 0, 0]] and not maps[0, 2:].any()
    x, y = 31.5 * 15 / 63, 21.0 * 15 / 63                   # 7.5, 5
    for row, column in ((5, 7), (5, 8), (3, 4), (15, 0)):
        expected = math.exp(-((column - x) ** 2 + (row - y) ** 2) / 8)
        assert abs(maps[0, 0, row, column].item() - expected) < 1e-6
    assert maps[0, 1, 0, 15] == 1 and maps[0, 1].max() == 1


def test_pose_decoding():
    """Sub-pixel places of Gaussians come back, near the border within 1.5 px of the map; maps
    without a peak give something finite inside the map."""
    generator = torch.Generator().manual_seed(0)
    crop, size, at = (256, 192), (64, 48), torch.rand(8, 17, 2, generator=generator)
    joints = at * torch.tensor([191.0, 255.0])
    maps, weight = pose.heatmap_targets(joints, torch.ones(8, 17), crop, size)
    found, score = pose.decode(0.7 * maps, crop)
    error = (found - joints).abs() * torch.tensor([47 / 191, 63 / 255])     # heatmap px
    inner = ((at - 0.5).abs() * torch.tensor([47, 63]) < torch.tensor([19, 27])).all(-1)
    assert weight.all() and 40 < inner.sum() and error[inner].max() < 0.05 and error.max() < 1.5
    assert 0.6 < score.min() and score.max() <= 0.7
    for flat in (torch.zeros(1, 17, 64, 48), torch.ones(1, 17, 64, 48), -torch.rand(1, 17, 64, 48),
                 torch.rand(1, 17, 64, 48, generator=generator)):
        found, _ = pose.decode(flat, crop)
        assert found.isfinite().all() and (found > -5).all()
        assert (found < torch.tensor([196.0, 260.0])).all()
    spike = torch.zeros(1, 41, 41)
    spike[0, 20, 20] = 1
    for sigma, width in ((1, 5), (2, 11), (3, 17)):         # MMPose's kernel for 2 and for 3
        blurred = pose.blurred(spike, sigma)[0]
        assert (blurred.sum(0) > 0).sum() == width and abs(blurred.sum() - 1) < 1e-5
        x = torch.arange(43) - 21.0
        assert abs((blurred.sum(0) * x ** 2).sum().sqrt() - sigma) < 0.15
    saddle = torch.zeros(1, 1, 64, 48)
    saddle[0, 0, 30, 20:30] = 1                             # a ridge: the first pixel, no wild step
    assert (pose.decode(saddle, crop)[0][0, 0] / 4 - torch.tensor([20.0, 30])).abs().max() < 1.6


def test_heatmap_loss_by_loops():
    """Smooth L1 by its definition, weighted mean over all joints; gradients by differences; zero,
    and still in the graph, when nobody has a joint."""
    generator = torch.Generator().manual_seed(0)
    a, b = (2 * torch.randn(2, 3, 4, 5, generator=generator) for _ in "ab")
    weight = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    total = 0
    for i, j in itertools.product(range(2), range(3)):
        e = (a[i, j] - b[i, j]).abs()
        total += weight[i, j] * sum(v * v / 2 if v < 1 else v - 0.5 for v in e.flatten()) / 20
    assert_close(losses.heatmap_loss(a, b, weight), total / 6, 1e-6)
    assert losses.heatmap_loss(a.bfloat16(), b, weight).dtype == torch.float32
    a.requires_grad_(True)
    losses.heatmap_loss(a, b, weight).backward()
    for at in ((0, 0, 1, 2), (1, 2, 3, 4), (0, 1, 0, 0)):
        step = torch.zeros_like(a)
        step[at] = 1e-2
        with torch.no_grad():
            up, down = (losses.heatmap_loss(a + s, b, weight).item() for s in (step, -step))
        assert abs((up - down) / 2e-2 - a.grad[at].item()) < 1e-4
    a.grad = None
    nothing = losses.heatmap_loss(a, b, 0 * weight)
    nothing.backward()
    assert nothing == 0 and not a.grad.any()


def pose_net(seed=0):
    torch.manual_seed(seed)
    net = PoseEstimator(TINY)
    torch.nn.init.normal_(net.offsets)
    return net


def test_every_parameter_learns_in_pose():
    """With joints all parameters; without any the loss is finite and gradients are there."""
    net, images = pose_net(), torch.randn(2, 3, 64, 48)
    target, weight = pose.heatmap_targets(60 * torch.rand(2, 17, 2), torch.ones(2, 17), (64, 48),
                                          (32, 24))
    maps = net(images, whole(TINY, images))
    assert maps.shape == (2, 17, 32, 24)
    assert not without_gradient(net, losses.heatmap_loss(maps, target, weight))
    net.zero_grad()
    loss = losses.heatmap_loss(net(images, whole(TINY, images)), target, 0 * weight)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and p.grad.isfinite().all()
                             for p in net.parameters())


def test_pose_heatmaps_are_equation_8():
    """Dot products (over D: the mean) of the embedded queries with the 1/4 map, raw, the e_i added
    to [CLS]; a smaller crop in a padded batch answers as it does alone."""
    net, images = noisy(pose_net()).eval(), torch.randn(2, 3, 64, 48)
    images[1, :, 48:], images[1, :, :, 32:] = 0, 0
    with torch.no_grad():
        tokens = Layout(TINY, torch.tensor([[64, 48], [48, 32]]))
        maps = net(images, tokens)
        small = images[1:, :, :48, :32]
        alone = whole(TINY, small)
        assert_close(maps[1:, :, :24, :16], net(small, alone), 1e-4)
        features = net.glid.encode(small, alone)
        queries = (net.glid.decoder.cls + net.offsets)[None]
        x = net.embed(net.glid.decode(queries, features, alone)[-1])[0]     # [17, D]
        grid = alone.to_grid(features[0], 0)[0]                             # [24, 16, D]
        for j, y, x4 in ((0, 0, 0), (5, 20, 3), (16, 23, 15)):
            assert_close(maps[1, j, y, x4], (x[j] * grid[y, x4]).mean(), 1e-3)


def test_pose_flip_test():
    """By hand: mean of the answer and the mirrored crop's, columns and sides swapped back."""
    maps, mirrored = torch.rand(2, 1, 17, 8, 6)
    found = pose.flip_average(maps, mirrored)
    for joint, other in ((0, 0), (9, 10), (10, 9), (16, 15)):
        for column in range(6):
            expected = (maps[0, joint, :, column] + mirrored[0, other, :, 5 - column]) / 2
            assert_close(found[0, joint, :, column], expected, 1e-6)
    net = noisy(pose_net()).eval()                          # a mirrored crop: mirrored joints
    args = args_for(finetune_pose, "--batch-size", 2, "--size", 64, 48)
    crops = torch.randint(256, (3, 3, 64, 48), dtype=torch.uint8)
    state = training.Run(torch.device("cpu"))
    a, b = (finetune_pose.predict(net, c, args, state) for c in (crops, crops.flip(3)))
    assert np.allclose(a[1], b[1][:, pose.FLIP], atol=1e-4)
    with torch.no_grad():                                   # decoded with the width of the targets
        maps, mirrored = (net(M.normalize(c), whole(TINY, c)) for c in (crops, crops.flip(3)))
    expected, _ = pose.decode(pose.flip_average(maps, mirrored), (64, 48), sigma=1.0)
    assert args.sigma == 1 and np.allclose(a[0], expected, atol=1e-3)
    swapped = np.stack([47 - b[0][..., 0], b[0][..., 1]], -1)[:, pose.FLIP]
    assert (np.abs(a[0] - swapped) < 0.01).mean() > 0.95    # but for ties
    assert finetune_pose.predict(net, crops[:0], args, state)[0].shape == (0, 17, 2)


def test_pose_rescoring_and_doubles():
    """By hand: box score x mean of the sure joints; of two persons at one place the better stays,
    judged at the mean of their areas."""
    joint = np.array([[0.9, 0.5, 0.2, 0.1], [0.1, 0.1, 0.0, 0.2]])
    assert np.allclose(pose.rescore(np.array([0.5, 1.0]), joint), [0.35, 0])
    base = np.random.default_rng(0).uniform(0, 100, (17, 2))
    areas = np.array([1e4, 3e4, 1e4, 1e4])
    # shift every joint so far that exp(-d^2 / (2 area (2 sigma)^2)) is the wanted similarity
    def moved(similarity, area, sign=1):
        d = sign * np.sqrt(-2 * area * np.log(similarity)) * 2 * metrics.OKS_SIGMAS
        return base + np.column_stack([d, 0 * d])
    joints = np.stack([base, moved(0.91, 2e4), moved(0.89, 1e4, -1), base + 500])
    assert pose.oks_nms(joints, np.array([0.9, 0.8, 0.95, 0.1]), areas).tolist() == [2, 0, 3]
    assert pose.oks_nms(joints, np.array([0.5, 0.8, 0.2, 0.9]), areas).tolist() == [3, 1, 2]
    assert pose.oks_nms(joints[:0], np.zeros(0), areas[:0]).tolist() == []


def test_perfect_heatmaps_score_1():
    """The true heatmaps of ToyWorld through decoding, photo px, rescoring, doubles and COCO's
    metric: AP 1; and the training crops hold the same joints."""
    train, val = data.open_pose("toyworld:16", (128, 96), overfit=True)
    metric, seen = metrics.AveragePrecision("keypoint", [0]), 0
    for i in range(len(val)):
        photo, truth = val[(0, i)], val.truths[i]
        joints = pose.move(pose.inverse(photo["back"]), truth["keypoints"][..., :2].astype(float))
        maps, inside = pose.heatmap_targets(torch.from_numpy(joints), torch.ones(len(joints), 17),
                                            (128, 96), (64, 48), sigma=1.5)
        truth["keypoints"][..., 2] *= inside.numpy()        # a joint outside the crop has no peak
        found, score = pose.decode(maps, (128, 96))
        for k in range(len(joints)):                        # without augmentation: the same crop
            at = train.people.index((i, k))
            assert torch.equal(train[(0, at)]["image"], photo["images"][k])
            assert torch.allclose(train[(0, at)]["joints"], torch.from_numpy(joints[k]).float())
        answer = finetune_pose.answer(photo, found.numpy(), score.numpy())
        metric.update(photo["id"], answer, photo["truth"])
        seen += len(joints)
    assert seen > 10 and metric.result()["AP"] > 0.999, metric.result()


def test_pose_samples():
    """Pure functions of (seed, epoch, index); crowds and persons without joints teach nothing, but
    are in the truth; each labelled joint of a crop lies on the pixels it lay on in the photo."""
    class Source:
        ids, joints = [41, 42], toyworld.KEYPOINTS
        def __len__(self):
            return 2
        def labels(self, i):
            keypoints = torch.zeros(4, 17, 3)
            keypoints[:, 5] = keypoints[:, 9] = torch.tensor([100.0, 80.0, 2.0])
            keypoints[1, :, 2] = 0
            return dict(boxes=torch.tensor([[80.0, 60, 120, 110]] * 4), keypoints=keypoints,
                        classes=torch.tensor([0, 0, 3, 0]), area=torch.full((4,), 900.0),
                        iscrowd=torch.tensor([False, False, False, True]))
        def __getitem__(self, i):
            return self.labels(i) | {"image": dots([(100.5, 80.5)])}     # centre of pixel 100, 80
    train, val = (data.Pose(Source(), t, (64, 48), 3) for t in (True, False))
    assert train.people == [(0, 0), (1, 0)] and val.counts == [2, 2] and len(train) == 2
    photo = val[(0, 1)]
    at = pose.move(photo["back"][0], centroid(photo["images"][0])[None])[0]
    assert np.abs(at - [100, 80]).max() < 0.2               # an answer counts pixels as the truth
    assert photo["id"] == 42 and photo["truth"]["iscrowd"].tolist() == [False, False, True]
    assert photo["images"].shape == (2, 3, 64, 48) and photo["truth"]["labels"].tolist() == [0] * 3
    names = set()
    for epoch in range(12):
        a, b = train[(epoch, 0)], train[(epoch, 0)]
        assert all(torch.equal(a[k], b[k]) for k in a)
        names.add(tuple(a["labelled"].nonzero()[:, 0].tolist()))
        joint = a["joints"][a["labelled"]][0].numpy()
        if (joint > 8).all() and (joint < [39, 55]).all():
            assert np.abs(centroid(a["image"]) - joint).max() < 0.3
    assert names == {(5, 9), (6, 10)} and not torch.equal(a["joints"], train[(0, 0)]["joints"])


def test_pose_detector_boxes():
    """A detector's file: xywh -> xyxy, other categories and photos left out; what is wrong with it
    is said in one line."""
    good = {"image_id": 0, "category_id": 0, "bbox": [1, 2, 30, 40], "score": 0.5}
    with folder() as at:
        path = at / "boxes.json"
        path.write_text(json.dumps([good, good | {"category_id": 3}, good | {"image_id": 9},
                                    good | {"image_id": 2, "score": 1}]))
        found = data.read_boxes(path, [0, 1, 2], kinds={0})
        assert [len(b) for b, _ in found] == [1, 0, 1] and found[0][0].tolist() == [[1, 2, 31, 42]]
        assert found[2][1].tolist() == [1]
        val = data.open_pose("toyworld:3", (64, 48), boxes=path)[1]
        photos = [val[(0, i)] for i in range(3)]
        assert [len(p["images"]) for p in photos] == [1, 0, 1] == val.counts
        assert photos[0]["scores"].tolist() == [0.5] and len(photos[1]["truth"]["boxes"]) > 0
        crops, _ = data.collate_photos(TINY, photos)
        assert crops.shape == (2, 3, 64, 48)
        for bad, word in ((good | {"bbox": [1, 2, 3]}, "entry 1"), (7, "entry 1"),
                          (good | {"bbox": [1, 2, -3, 4]}, "entry 1"),
                          (good | {"score": math.nan}, "entry 1"),
                          (good | {"score": "high"}, "entry 1"),
                          ({"image_id": 0}, "entry 1"), (good | {"image_id": [0]}, "entry 1")):
            path.write_text(json.dumps([good, bad]))
            with raises(InputError, "--boxes", "boxes.json", word):
                data.read_boxes(path, [0, 1, 2], kinds={0})
        for text, word in (("[", "JSON"), ("{}", "list"), ("[]", "no person")):
            path.write_text(text)
            with raises(InputError, "--boxes", word):
                data.read_boxes(path, [0, 1, 2], kinds={0})
        with raises(InputError, "--boxes", "none.json"):
            data.read_boxes(at / "none.json", [0], kinds={0})
        with raises(InputError, "--size 60 48", "16"), quiet():
            finetune_pose.main(args_for(finetune_pose, "--size", 60, 48, "--out", at / "odd"))


def test_pose_flags():
    """The paper's and ViTPose's recipe is the default."""
    args = training.parse(finetune_pose.flags(), finetune_pose.PRESETS, ["--data", "x"])
    assert (args.epochs, args.size, args.lr, args.batch_size) == (210, [256, 192], 5e-4, 64)
    assert (args.sigma, args.zoom, args.rotation, args.clip) == (2, 0.5, 40, 1)


def test_pose_schedule():
    """Warm-up from a thousandth, then x0.1 at 170 / 210 and 200 / 210 of the run."""
    values = [training.multistep(s, 210, finetune_pose.DROPS, 10) for s in range(210)]
    assert abs(values[0] - 1e-3) < 1e-12 and abs(values[5] - 0.5005) < 1e-12
    assert values[10] == values[169] == 1
    assert np.allclose(values[170:200], 0.1) and np.allclose(values[200:], 0.01)


def test_two_processes_share_photos():
    """Every photo once, on one process, lists of about a batch of persons; the merged metric of
    two halves is that of the whole, doubles decided inside a photo."""
    counts = [3, 0, 5, 1, 1, 9, 0, 0, 2]
    shares = []
    for rank in range(2):
        args, state = args_for(finetune_pose), training.Run(torch.device("cpu"), rank, 2)
        args.batch_size = 4
        lists = batching.share_crowded(counts, args, state)
        assert all(len(x) == 1 or sum(counts[i] for _, i in x) <= 4 for x in lists)
        shares.append([i for x in lists for _, i in x])
    assert sorted(shares[0] + shares[1]) == list(range(9)) and shares[0] == [0, 2, 4, 6, 8]
    val = data.open_pose("toyworld:7", (64, 48), overfit=True)[1]
    offsets = np.random.default_rng(0).normal(0, 2, (sum(val.counts), 17, 2))
    known, parts, net = {}, [], PoseEstimator(TINY)         # the truth, shaken, by crop
    for i in range(len(val)):
        photo = val[(0, i)]
        at = pose.move(pose.inverse(photo["back"]), val.truths[i]["keypoints"][..., :2])
        for crop, joints in zip(photo["images"], at):
            known[crop.numpy().tobytes()] = joints + offsets[len(known)]
    class Half(training.Run):
        def merged(self, metric):
            parts.append(metric)
            return metric
    def exact(model, crops, args, state, flip):
        keys = [c.numpy().tobytes() for c in crops]
        return np.array([known[k] for k in keys]).reshape(-1, 17, 2), np.full((len(keys), 17), 0.5)
    real, finetune_pose.predict = finetune_pose.predict, exact
    try:
        args = args_for(finetune_pose, "--workers", 0, "--batch-size", 2)
        for world in (1, 2):
            for rank in range(world):
                state = Half(torch.device("cpu"), rank, world)
                finetune_pose.evaluate(net, val, args, state)
    finally:
        finetune_pose.predict = real
    one, first, second = parts
    assert len(one.images) == 7 and len(first.images) == 4 and len(second.images) == 3
    first.merge(second)
    assert first.result() == one.result() and 0.05 < one.result()["AP"] < 0.999


# -----------------------------------------------------------------------------
# Official layouts


SHARED = HERE.parent / "shared" / "data"        # real photos, if somebody put them there


def exported(at, kind, count=3, size=64):
    with quiet():
        for split in ("train", "val"):
            toyexport.export(at, kind, count, size, 0, split)
    return at


def toy(split, count=3, keys=(), size=64):
    with quiet():
        return data.ToyWorld(split, count, size, keys=keys)


def write_png(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **how)


def test_coco_layout_gives_toyworld_back():
    """Export -> source: boxes, masks, classes, joints, segments exactly as ToyWorld drew them."""
    keys = ["boxes", "classes", "masks", "keypoints", "panoptic", "segments", "semantic"]
    with folder() as at:
        exported(at, "coco")
        objects = formats.open_folder(at, ["masks"])
        poses = formats.open_folder(at, ["keypoints"])
        segments = formats.open_folder(at, ["semantic", "panoptic"])
        for n, split in enumerate(("train", "val")):
            assert objects[n].classes == toyworld.THINGS and objects[n].things == 7
            assert objects[n].category_ids == tuple(range(3, 31, 4)) and objects[n].ids == [0, 1, 2]
            assert segments[n].classes == toyworld.CLASSES and segments[n].things == 7
            assert poses[n].classes == ("person",) and poses[n].category_ids == (3,)
            for i, truth in enumerate(toy(split, keys=keys)):
                found, pose, whole_ = (s[n][i] for s in (objects, poses, segments))
                for key in ("boxes", "classes"):
                    assert (found[key].as_subclass(torch.Tensor) == truth[key]).all(), key
                assert found["layers"].shape == (1, *truth["masks"].shape[1:])   # they are disjoint
                assert torch.equal(masks_in(found), truth["masks"])
                assert (found["area"] == truth["masks"].sum((1, 2))).all()
                assert not found["iscrowd"].any() and found["iscrowd"].dtype == torch.bool
                person = truth["classes"] == 0
                assert (pose["keypoints"] == truth["keypoints"][person]).all()
                assert (pose["boxes"] == truth["boxes"][person]).all()
                assert (poses[n].labels(i)["keypoints"] == pose["keypoints"]).all()
                assert (whole_["semantic"] == truth["semantic"]).all()
                order = truth["segments"][:, 0].argsort()               # as np.unique wrote them
                assert (whole_["segments"][:, 1:] == truth["segments"][order, 1:]).all()
                assert (truth["segments"][order, 0][whole_["panoptic"].long() - 1]
                        == truth["panoptic"]).all()
                difference = (found["image"].float() - truth["image"]).abs().mean()
                assert difference < 8 and found["image"].dtype == torch.uint8       # JPEG


def test_ade20k_layout_gives_toyworld_back():
    with folder() as at:
        exported(at, "ade20k")
        for names in (None, toyworld.CLASSES):
            if names:
                (at / "classes.txt").write_text("\n".join(names) + "\n")
            with quiet():                                   # ADE20K's names alone make no ADE20K
                sources = formats.open_folder(at, ["semantic"], first_label=names and 1)
            for source, split in zip(sources, ("train", "val")):
                assert source.category_ids == tuple(range(1, 13)) and source.things == 0
                assert source.classes == (names or tuple(map(str, range(1, 13))))
                for i, truth in enumerate(toy(split, keys=["semantic"])):
                    assert (source[i]["semantic"] == truth["semantic"]).all()
                    assert source[i]["semantic"].dtype == torch.uint8


def test_nyu_layout_gives_toyworld_back():
    with folder() as at:
        exported(at, "nyu")
        for scale in (1000.0, 500.0):
            for source, split in zip(formats.open_folder(at, ["depth"], depth_scale=scale),
                                     ("train", "val")):
                for i, truth in enumerate(toy(split, keys=["depth"])):
                    depth = source[i]["depth"] * scale / 1000
                    assert (depth - truth["depth"]).abs().max() <= 0.00051
                    assert ((depth == 0) == (truth["depth"] == 0)).all()
        # the Kinect's border goes in training, from NYU's photos of its size only
        for height, width, crop in ((480, 640, (427, 565)), (480, 600, (480, 600))):
            ramp = np.arange(height * width).reshape(height, width) % 60000
            write_png(at / "train/rgb_00000.jpg", np.zeros((height, width, 3), np.uint8))
            write_png(at / "train/sync_depth_00000.png", ramp.astype(np.uint16))
            train, _ = data.open_depth(at, 1000, 1000)
            whole_photo, _ = data.open_depth(at, 1000, 1000, overfit=True)
            train.transform = data.v2.Identity()
            depth = train[0, 0]["depth"]
            assert depth.shape == crop and whole_photo[0, 0]["depth"].shape == (height, width)
            top, left = (45, 43) if crop[0] < height else (0, 0)
            assert abs(depth[0, 0] * 1000 - ramp[top, left]) < 1e-2


def test_masks_are_drawn_as_the_official_tool_does():
    """Outlines by hand, and pixel counts and strings as pycocotools gives them."""
    def rows(mask):
        return ["".join("01"[v] for v in row) for row in mask.tolist()]
    assert rows(cocomask.from_polygon([1, 1, 5, 1, 5, 4, 1, 4], 6, 8)) == [
        "00000000", "01111000", "01111000", "01111000", "00000000", "00000000"]
    assert rows(cocomask.from_polygon([0.5, 0.5, 7.5, 3, 2, 5.5], 6, 8)) == [
        "00000000", "01100000", "01111100", "01111100", "00110000", "00000000"]
    assert rows(cocomask.from_polygon([-3, -2, 10, 2, 3, 9], 5, 7)) == [    # beyond the photo
        "1111100", "1111111", "1111111", "1111111", "0111111"]
    official = ("T52V12O1N2N2N1O2N2N2O0O1O1O1O1O1O1O100O1O1O1O1O1O100O1O1ON2N2O1N2N3M2O1N2N2O1N2N2"
                "N3N1N2N`3")
    mask = cocomask.from_polygon([3.3, 4.1, 47.2, 9.9, 30.5, 38.8, 12, 20.2], 40, 50)
    assert mask.sum() == 751 and (cocomask.from_runs(official, 40, 50) == mask).all()
    assert rows(cocomask.from_runs([1, 2, 3], 3, 2)) == ["00", "10", "10"]
    assert rows(cocomask.from_runs(b"0220", 2, 3)) == ["101", "101"]
    two = cocomask.mask([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]], 4, 4)
    assert rows(two) == ["1100", "1110", "0110", "0000"]                    # a union, no xor


def little_coco(at, change=lambda content: None, kind="instances"):
    """Two training photos of 6 x 8 px and one to validate, two objects and an empty photo; the
    training JSON after change(content)."""
    for split, count in (("train", 2), ("val", 1)):
        images = [dict(id=i, file_name=f"{i}.png", height=6, width=8) for i in range(count)]
        box = [1, 1, 4, 3]
        square = dict(image_id=0, bbox=box, area=12, iscrowd=0, category_id=30,
                      segmentation=[[1, 1, 5, 1, 5, 4, 1, 4]], keypoints=[2, 2, 2] * 17)
        notes = [dict(square, id=1), dict(square, id=2, category_id=30)]
        kinds = [dict(id=7, name="bench", isthing=0), dict(id=30, name="person", isthing=1)]
        if kind == "panoptic":
            notes = [dict(image_id=i, file_name=f"{i}.png",
                          segments_info=[dict(id=5, category_id=7), dict(id=256, category_id=30)])
                     for i in range(count)]
        content = dict(images=images, annotations=notes, categories=kinds)
        for i in range(count):
            write_png(at / f"{split}2017/{i}.png", np.full((6, 8, 3), 40 * i, np.uint8))
            ids = np.zeros((6, 8, 3), np.uint8)
            ids[:3, :, 0], ids[4:, :, 1] = 5, 1
            write_png(at / f"annotations/panoptic_{split}2017/{i}.png", ids)
        if split == "train":
            change(content)
        (at / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))
    return at


def read_all(at, keys, **how):
    with quiet():
        sources = formats.open_folder(at, keys, **how)
        return [[source[i] for i in range(len(source))] for source in sources]


def first(content, **values):
    """Change the first annotation; None takes a key away."""
    content["annotations"][0] |= values
    for key in [k for k, v in values.items() if v is None]:
        del content["annotations"][0][key]


def test_broken_coco_files_are_named():
    """Each of these JSON files ends in one line with its name, whether opened or read."""
    runs = lambda counts, size=(6, 8): dict(segmentation=dict(counts=counts, size=list(size)))
    cases = [
        ("nan", lambda c: first(c, bbox=[1, float("nan"), 2, 2])),
        ("list of 4 numbers", lambda c: first(c, bbox=["one", 1, 2, 2])),
        ("list of 4 numbers", lambda c: first(c, bbox=[1, 1, 2])),
        ("list of 4 numbers", lambda c: first(c, bbox={})),
        ("finite", lambda c: first(c, bbox=[1, 1, 2, float("inf")])),
        ("negative", lambda c: first(c, bbox=[1, 1, -2, 2])),
        ("no 'bbox'", lambda c: first(c, bbox=None)),
        ("no 'image_id'", lambda c: first(c, image_id=None)),
        ("no 'category_id'", lambda c: first(c, category_id=None)),
        ("no 'segmentation'", lambda c: first(c, segmentation=None)),
        ("image 99", lambda c: first(c, image_id=99)),
        ("category 8", lambda c: first(c, category_id=8)),
        ("iscrowd", lambda c: first(c, iscrowd=2)),
        ("area", lambda c: first(c, area=-1)),
        ("numbers", lambda c: first(c, area="big")),
        ("three points", lambda c: first(c, segmentation=[[1, 1, 3, 3]])),
        ("three points", lambda c: first(c, segmentation=[[1, 1, 3, 3, 2, 2, 1]])),
        ("only a box", lambda c: first(c, segmentation=[])),
        ("'x30' is no whole number", lambda c: first(c, category_id="x30")),
        ("bbox", lambda c: first(c, bbox=None)),
        ("list of", lambda c: first(c, segmentation=[[1, 1, "b", 3, 2, 2]])),
        ("finite", lambda c: first(c, segmentation=[[1, 1, 3, 3, 2, float("nan")]])),
        ("fill", lambda c: first(c, **runs([3, 4]))),
        ("fill", lambda c: first(c, **runs([3, -4, 49]))),
        ("fill", lambda c: first(c, **runs([3.5, 44.5]))),
        ("fill", lambda c: first(c, **runs("04020"))),
        ("compressed", lambda c: first(c, **runs("\x01\x02"))),
        ("size", lambda c: first(c, **runs([3, 45], (8, 6)))),
        ("images have this id", lambda c: c["images"][1].update(id=0)),
        ("no 'height'", lambda c: c["images"][1].pop("height")),
        ("height and width", lambda c: c["images"][1].update(width=0)),
        ("no 'file_name'", lambda c: c["images"][1].pop("file_name")),
        ("gone.png", lambda c: c["images"][1].update(file_name="gone.png")),
        ("categories have the same id", lambda c: c["categories"][0].update(id=30)),
        ("whole number", lambda c: c["categories"][0].update(id="seven")),
        ("no 'name'", lambda c: c["categories"][0].pop("name")),
        ("no category", lambda c: c.update(categories=[])),
        ("images", lambda c: c.pop("images")),
        ("annotations", lambda c: c.update(annotations={"1": 2})),
        ("annotations", lambda c: c.update(annotations=[1, 2])),
        ("segment", lambda c: first(c, segments_info=[]))]
    for words, change in cases:
        with folder() as at, raises(InputError, words, "train2017" if words != "gone.png" else ""):
            read_all(little_coco(at, change), ["masks"])
    for text in ("", "{", "[]", "3", "\0\xff", "[" * 100_000):
        with folder() as at, raises(InputError, "instances_train2017.json"):
            (little_coco(at) / "annotations/instances_train2017.json").write_text(text)
            read_all(at, ["boxes"])
    for words, change in (("51 numbers", lambda c: first(c, keypoints=[1, 2, 2])),
                          ("flag", lambda c: first(c, keypoints=[1, 2, 3] * 17)),
                          ("person", lambda c: c["categories"].pop())):
        with folder() as at, raises(InputError, words, "person_keypoints_train2017.json"):
            read_all(little_coco(at, change, "person_keypoints"), ["keypoints"])
    with folder() as at, raises(InputError, "val2017.json", "category 30"):
        read_all(little_coco(at, lambda c: c["categories"][1].update(name="people")), ["boxes"])


def test_broken_panoptic_files_are_named():
    def segment(**values):
        return lambda c: c["annotations"][0]["segments_info"][0].update(values)
    for words, change in (
            ("is not drawn", lambda c: c["annotations"][0]["segments_info"].append(
                dict(id=9, category_id=7))),
            ("is drawn", lambda c: c["annotations"][0]["segments_info"].pop()),
            ("is drawn", segment(id=6)), ("segment id 0", segment(id=0)),
            ("segment id", segment(id="five")), ("same id", segment(id=256)),
            ("category 8", segment(category_id=8)), ("iscrowd", segment(iscrowd="no")),
            ("no annotation", lambda c: c["annotations"].pop()),
            ("has two", lambda c: c["annotations"].append(c["annotations"][0])),
            ("not listed", lambda c: first(c, image_id=9)),
            ("not there", lambda c: first(c, file_name="gone.png")),
            ("no 'file_name'", lambda c: first(c, file_name=None)),
            ("segments_info", lambda c: first(c, segments_info=None)),
            ("no 'isthing'", lambda c: c["categories"][0].pop("isthing")),
            ("isthing", lambda c: c["categories"][0].update(isthing="yes"))):
        with folder() as at, raises(InputError, words, "panoptic_train2017"):
            read_all(little_coco(at, change, "panoptic"), ["panoptic"])
    for pixels in (np.zeros((6, 8), np.uint8), np.zeros((6, 7, 3), np.uint8)):
        with folder() as at, raises(InputError, "panoptic_train2017"):
            little_coco(at, kind="panoptic")
            write_png(at / "annotations/panoptic_train2017/0.png", pixels)
            read_all(at, ["panoptic"])
    with folder() as at:
        little_coco(at, kind="panoptic")
        sample = read_all(at, ["panoptic", "semantic"])[0][0]
        assert sample["segments"].tolist() == [[1, 1, 0], [2, 0, 0]]        # bench is stuff, last
        assert sample["panoptic"][:, 0].tolist() == [1, 1, 1, 0, 2, 2]
        assert sample["semantic"][:, 0].tolist() == [1, 1, 1, 255, 0, 0]


def test_numbers_beyond_all_photos_are_named():
    """What would overflow, or fill the memory before it fails, is told like any other mistake."""
    for key, values, words in (
            ("boxes", dict(bbox=[-1e30, 0, 2e30, 5]), "annotation 1"),
            ("masks", dict(segmentation=[[1, 1, 1e9, 1, 5, 4]]), "annotation 1"),
            ("masks", dict(segmentation=dict(counts=[2**62] * 4 + [48], size=[6, 8])), "fill"),
            ("keypoints", dict(keypoints=[1e300, 2, 2] * 17), "annotation 1")):
        kind = "person_keypoints" if key == "keypoints" else "instances"
        with folder() as at, raises(InputError, f"{kind}_train2017.json", words):
            read_all(little_coco(at, lambda c, v=values: first(c, **v), kind), [key])
    with folder() as at, raises(InputError, "train2017/0.png", "6 x 8"):
        read_all(little_coco(at, lambda c: c["images"][0].update(height=10**6, width=10**6)),
                 ["masks"])
    with folder() as at:
        boxes = at / "boxes.json"
        for text in ("[" * 100_000, '[{"image_id": 0, "category_id": 0, "bbox": [0, 0, 1, 1], '
                     '"score": ' + "9" * 400 + "}]"):
            boxes.write_text(text)
            with raises(InputError, "--boxes"):
                data.read_boxes(boxes, [0], 0)
    for script, flag, value in ((finetune_seg, "--first-label", 99999999999),
                                (finetune_depth, "--depth-scale", 1e-300)):
        with quiet(), raises(SystemExit, "2"):
            args_for(script, flag, value)


def test_a_validation_part_without_objects_is_refused():
    """AP of nothing would be -1; "trainval" files are read once."""
    with folder() as at:
        little_coco(at)
        path = at / "annotations/instances_val2017.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"annotations": []}))
        with raises(InputError, "no object", "validation"):
            formats.open_folder(at, ["boxes"])
        path.unlink()
        train = at / "annotations/instances_train2017.json"
        content = json.loads(train.read_text())
        content["annotations"][0]["image_id"] = 1
        train.unlink()
        (at / "annotations/instances_trainval2017.json").write_text(json.dumps(content))
        (at / "train2017").rename(at / "images")
        train, val = formats.open_folder(at, ["boxes"])
        assert (train.ids, val.ids) == ([1], [0])


def test_label_maps_of_few_bits():
    """Grey PNGs of 1, 2 and 4 bits hold the classes they say; *.PNG and linked folders are found;
    more than 255 classes are refused."""
    with folder() as at:
        truth = np.arange(12).reshape(3, 4)
        for bits in (1, 2, 4, 8):
            stored = truth % 2 ** bits
            name = at / f"labels/{bits}.PNG"
            write_png(at / f"images/{bits}.png", np.zeros((3, 4, 3), np.uint8))
            name.parent.mkdir(exist_ok=True)
            name.write_bytes(grey_png(stored, bits))
            assert (files.read_labels(name) == stored).all(), bits
        (at / "labels").rename(at / "elsewhere")
        (at / "labels").mkdir()
        for name in sorted((at / "elsewhere").iterdir()):
            (at / "labels" / name.name).symlink_to(name)
        train, val = read_all(at, ["semantic"], first_label=0)
        assert len(train) == 3 and len(val) == 1
        (at / "classes.txt").write_text("\n".join(map(str, range(256))))
        with raises(InputError, "256 classes"):
            read_all(at, ["semantic"])


def grey_png(values, bits):
    """A grey PNG of so many bits a pixel, which PIL cannot write."""
    rows = [np.packbits([v >> b & 1 for v in row for b in range(bits - 1, -1, -1)]).tobytes()
            for row in values.tolist()]
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


def test_odd_orientations():
    """Every EXIF orientation, in every kind of file that has one, against PIL's own; numbers and
    types that mean nothing turn nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    with folder() as at:
        for suffix, number in itertools.product(("png", "tif", "webp"), range(1, 11)):
            exif, path = Image.Exif(), at / f"{number}.{suffix}"
            exif[0x0112] = number
            how = {"lossless": True} if suffix == "webp" else {}
            Image.fromarray(pixels).save(path, exif=exif, **how)
            with Image.open(path) as image:
                upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            assert (files.read_image(path).permute(1, 2, 0).numpy() == upright).all(), path
            photo, view = files.read_view(path, lambda h, w: (1, 2, h - 3, w - 5), 4)
            assert torch.equal(photo, files.read_image(path))
            assert view == (1, 2, upright.shape[0] - 3, upright.shape[1] - 5), path
        # a tag of a wrong type
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x01\x06\0\0\0\0\0\0\0"
        Image.fromarray(pixels).save(at / "odd.jpg", exif=exif)
        view = files.read_view(at / "odd.jpg", lambda h, w: (0, 0, h, w), 40)[1]
        assert view == (0, 0, 40, 64)


def test_odd_coco_files_are_read_right():
    """What is strange but not wrong."""
    def odd(c):
        first(c, bbox=[-2.5, 1, 3, 0], area=None, iscrowd=None,
              segmentation=[[-9, -9, 3, -9, 3, 2, -9, 2]])
        c["annotations"][1] |= dict(bbox=[6, 4, 9, 9], segmentation=[[20, 20, 30, 20, 30, 30]])
        crowd = dict(counts=[0, 2, 46], size=[6, 8])
        c["annotations"].append(dict(id=3, image_id=1, bbox=[0, 0, 2, 2], area=4, iscrowd=1,
                                     category_id=30, segmentation=crowd))
    with folder() as at:
        little_coco(at, odd)
        (sample, empty), _ = read_all(at, ["boxes"])
        assert sample["boxes"][0].tolist() == [-2.5, 1, 0.5, 1] and sample["area"][0] == 0
        assert len(empty["boxes"]) == 1 and empty["iscrowd"].all()
        (sample,), _ = read_all(at, ["masks"])              # a photo of crowds teaches no mask
        assert masks_in(sample).sum((1, 2)).tolist() == [6, 0]
        train, val = data.open_detection(at, 32, overfit=True)
        assert len(train[0, 0]["labels"]) == 1 and len(train[0, 1]["labels"]) == 0
        expected = torch.tensor([[7 / 8, 5 / 6, 2 / 8, 2 / 6]])             # cut at the border
        assert_close(train[0, 0]["boxes"], expected, 1e-6)
        assert val[0, 0]["boxes"][1].tolist() == [6, 4, 15, 13]
        train, _ = data.open_segmentation(at, 32, tasks=["instance"], overfit=True)
        assert train[0, 0]["masks"].flatten(1).any(1).tolist() == [True] and train.things == 2
        assert formats.open_folder(at, ["boxes"])[0].classes == ("bench", "person")
        (at / "annotations/instances_val2017.json").unlink()
        with raises(InputError, "only one photo"):                          # the other's is a crowd
            formats.open_folder(at, ["boxes"])
        file = at / "annotations/instances_train2017.json"
        file.write_text(file.read_text().replace('"iscrowd": 1', '"iscrowd": 0'))
        train, val = formats.open_folder(at, ["boxes"])                     # every 20th validates
        assert (train.ids, val.ids) == ([1], [0])
        for year in (2014, 2017):
            (at / f"annotations/instances_train{year}.json").write_text("{}")
        with raises(InputError, "instances_train2014.json", "instances_train2017.json"):
            formats.open_folder(at, ["boxes"])


def test_any_photo_is_read_right_or_named():
    """Photos of a COCO folder in every odd coding; EXIF decided by the size that the JSON says."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    grey, turned = rgb[..., 0], Image.Exif()
    turned[0x0112] = 6                                      # to be turned by 90 degrees when shown
    right = [("CMYK", Image.fromarray(rgb).convert("CMYK"), "jpeg"),
             ("palette", Image.fromarray(rgb).convert("RGBA").quantize(9), "png"),
             ("16 bit", Image.fromarray(grey.astype(np.uint16) * 257), "png"),
             ("alpha", Image.fromarray(grey).convert("LA"), "png"),
             ("bits", Image.fromarray(grey > 99), "png")]
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    size = (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = header + size + zlib.crc32(b"IHDR" + size).to_bytes(4, "big")
    whole_jpeg = io.BytesIO()
    Image.fromarray(rgb).resize((64, 64)).save(whole_jpeg, "jpeg")
    whole_jpeg = whole_jpeg.getvalue()
    with folder() as at:
        photo = little_coco(at) / "train2017/0.png"
        for name, image, coding in right:
            image.save(photo, coding)
            found = read_all(at, ["boxes"])[0][0]["image"]
            assert found.shape == (3, 6, 8), name
            if image.mode == "I;16":
                assert (found[0].numpy() == grey).all()
        for stored, shown in ((rgb, True), (rgb.transpose(1, 0, 2), False)):
            Image.fromarray(np.ascontiguousarray(stored)).save(photo, "png", exif=turned)
            expected = rgb if shown else np.rot90(stored, -1)
            assert (read_all(at, ["boxes"])[0][0]["image"].permute(1, 2, 0).numpy()
                    == expected).all()
        for content in (whole_jpeg[:400], b"", b"not a photo", bomb, bomb[:20]):
            photo.write_bytes(content)
            with raises(InputError, str(photo)):
                read_all(at, ["boxes"])
        photo.unlink()
        photo.mkdir()
        with raises(InputError, str(photo)):
            read_all(at, ["boxes"])
        photo.rmdir()
        write_png(photo, rgb[:5])
        with raises(InputError, str(photo), "5 x 8"):
            read_all(at, ["boxes"])
    for height, width in ((1, 1), (1, 20_000), (20_000, 390), (20_000, 500)):
        def resize(content, size=(height, width)):
            content["images"][0] |= dict(height=size[0], width=size[1])
            first(content, bbox=[0, 0, 1, 1])
        with folder() as at:
            photo = little_coco(at, resize) / "train2017/0.png"
            write_png(photo, np.zeros((height, width), bool))
            if max(height, width) > 50 * min(height, width):
                with raises(InputError, str(photo), "side"):
                    read_all(at, ["boxes"])
            else:
                train, val = data.open_detection(at, 64, overfit=True)
                assert min(train[0, 0]["image"].shape) > 0 and val[0, 0]["size"][0] == height


def test_mask_folders():
    """Layouts, the two rules of which value is no class, names, and what is wrong with labels."""
    def make(at, photos, labels, value=3, mode=None):
        write_png(at / photos / "a.png", np.zeros((6, 8, 3), np.uint8))
        write_png(at / photos / "b.jpg", np.zeros((6, 8, 3), np.uint8))
        for stem, top in (("a", 0), ("b", value)):
            label = np.full((6, 8), 1, np.uint8)
            label[0], label[1] = top, 255
            write_png(at / labels / f"{stem}.png", label)
    with folder() as at:
        make(at, "train/images", "train/labels")
        train, val = read_all(at, ["semantic"])
        assert len(train) == len(val) == 1                  # held out
        write_png(at / "test/images/c.png", np.zeros((6, 8, 3), np.uint8))
        assert len(read_all(at, ["semantic"])[1]) == 1          # a test part may have no labels
        write_png(at / "val/images/a.png", np.zeros((6, 8, 3), np.uint8))
        with raises(InputError, "val/images", "expected", "labels"):
            read_all(at, ["semantic"])
        write_png(at / "test/labels/a.png", np.zeros((6, 8), np.uint8))     # nor are these its
        with raises(InputError, "val/images", "expected", "labels"):
            read_all(at, ["semantic"])
        (at / "test/labels/a.png").unlink()
        make(at, "val/images", "val/labels", 1)
        sources = formats.open_folder(at, ["semantic"])
        assert [len(s) for s in sources] == [2, 2] and sources[0].classes == tuple("013")
        assert sources[0].category_ids == (0, 1, 3)         # 2 does not occur
        assert sources[0][1]["semantic"][:3, 0].tolist() == [2, 255, 1]
        for how, expected, classes in ((dict(ignore_label=3), [255, 255, 1], "01"),
                                       (dict(first_label=1), [1, 255, 0], "13")):
            with quiet():
                sources = formats.open_folder(at, ["semantic"], **how)
            assert sources[0][1]["semantic"][:3, 0].tolist() == expected
            assert sources[0].classes == tuple(classes)
        with raises(InputError, "one class alone (1)", "--first-label"), quiet():
            formats.open_folder(at, ["semantic"], first_label=1, ignore_label=3)
        (at / "classes.txt").write_text("sky\nsea\n\n")
        with raises(InputError, "b.png", "label 3", "--ignore-label"):
            read_all(at, ["semantic"])
        for content, words in ((b"", "not a readable"), (None, "b.jpg")):
            label = at / "train/labels/b.png"
            label.write_bytes(content) if content is not None else label.unlink()
            with raises(InputError, words):
                read_all(at, ["semantic"])
        write_png(label, np.zeros((6, 8, 3), np.uint8))
        with raises(InputError, "b.png", "one channel"):
            read_all(at, ["semantic"])
        write_png(label, np.zeros((6, 9), np.uint8))
        with raises(InputError, "b.jpg", "6 x 9"):
            read_all(at, ["semantic"])
        palette = Image.fromarray(np.ones((6, 8), np.uint8), "P")
        palette.putpalette([9, 9, 9, 200, 0, 0])
        palette.save(label)
        assert (read_all(at, ["semantic"])[0][1]["semantic"] == 1).all()    # the index
        write_png(label, np.full((6, 8), 1, np.uint16))
        assert (read_all(at, ["semantic"])[0][1]["semantic"] == 1).all()
        write_png(at / "train/labels/orphan.png", np.zeros((6, 8), np.uint8))
        with raises(InputError, "orphan.png"):
            read_all(at, ["semantic"])
    with folder() as at:                                    # ADE20K: 0 is unlabelled
        for split in ("training", "validation"):
            make(at, f"images/{split}", f"annotations/{split}", 150 if split[0] == "t" else 151)
        names = [f"{k}\t0.1\t1\t1\tclass {k}, another name" for k in range(1, 151)]
        (at / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]))
        with raises(InputError, "validation/b.png", "label 151"):
            read_all(at, ["semantic"])
        train, _ = formats.open_folder(at, ["semantic"])
        assert train.classes[149] == "class 150" and train.category_ids[149] == 150
        assert train[0]["semantic"][:3, 0].tolist() == [255, 255, 0]
        assert train[1]["semantic"][:3, 0].tolist() == [149, 255, 0]


def test_label_values():
    """Any values become the classes that occur in either part; 0 and 255 alone are two classes."""
    with folder() as at:
        for part, values in (("train", [[0, 10], [20, 255]]), ("val", [[10, 7], [0, 255]])):
            write_png(at / f"images/{part}/a.png", np.zeros((2, 2, 3), np.uint8))
            write_png(at / f"labels/{part}/a.png", np.array(values, np.uint16))
        train, val = read_all(at, ["semantic"])
        assert train[0]["semantic"].tolist() == [[0, 2], [3, 255]]
        assert val[0]["semantic"].tolist() == [[2, 1], [0, 255]]
        write_png(at / "labels/train/a.png", np.array([[0, 255], [255, 0]], np.uint8))
        for names in (None, "grass\nroad"):
            write_png(at / "labels/val/a.png", np.array([[255, 255], [255, 0]], np.uint8))
            if names:
                (at / "classes.txt").write_text(names)
            train, val = read_all(at, ["semantic"])
            assert train[0]["semantic"].tolist() == [[0, 1], [1, 0]]
            assert val[0]["semantic"].tolist() == [[1, 1], [1, 0]]
        # whether a mask is binary is not told by the first maps, and not if 255 is left out
        for i in range(30):
            write_png(at / f"images/train/{i}.png", np.zeros((2, 2, 3), np.uint8))
            write_png(at / f"labels/train/{i}.png", np.zeros((2, 2), np.uint8))
        assert read_all(at, ["semantic"])[0][-1]["semantic"].tolist() == [[0, 1], [1, 0]]
        out = read_all(at, ["semantic"], ignore_label=255)
        assert out[0][-1]["semantic"].tolist() == [[0, 255], [255, 0]]
        write_png(at / "labels/val/a.png", np.ones((2, 2), np.uint8))
        assert read_all(at, ["semantic"])[0][-1]["semantic"].tolist() == [[0, 255], [255, 0]]
        (at / "classes.txt").write_text("\n".join("abc" * 85))      # 1 to 255: 255 is ignored
        assert (read_all(at, ["semantic"], first_label=1)[0][-1]["semantic"] == 255).all()
        with raises(InputError, "--first-label 65535"):
            read_all(at, ["semantic"], first_label=65535)
        for i in range(30):
            (at / f"images/train/{i}.png").unlink(), (at / f"labels/train/{i}.png").unlink()
        write_png(at / "labels/val/a.png", np.array([[255, 255], [255, 0]], np.uint8))
        (at / "classes.txt").write_text("one\ntwo\nthree")         # then 255 means no class
        assert read_all(at, ["semantic"])[0][0]["semantic"].tolist() == [[0, 255], [255, 0]]
        (at / "classes.txt").unlink()
        for part in ("train", "val"):
            write_png(at / f"labels/{part}/a.png", np.full((2, 2), 255, np.uint8))
        with raises(InputError, "no label"), quiet():
            formats.open_folder(at, ["semantic"])


def test_ade20k_instances():
    """Things from annotations_instance over the stuff of annotations; things without an instance
    are void."""
    with folder() as at:
        label, colours = np.zeros((6, 8), np.uint8), np.zeros((6, 8, 3), np.uint8)
        label[0], label[1:3], label[4:] = 1, 4, 3                           # wall, lamp, floor
        colours[1, :4], colours[1, 4:], colours[4] = (1, 1, 0), (1, 2, 0), (2, 1, 0)
        for split in ("training", "validation"):
            write_png(at / f"images/{split}/a.png", np.zeros((6, 8, 3), np.uint8))
            write_png(at / f"annotations/{split}/a.png", label)
            write_png(at / f"annotations_instance/{split}/a.png", colours)
        with raises(InputError, "categoryMapping.txt"):
            read_all(at, ["panoptic"])
        (at / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tchair\n3\tfloor\n4\tlamp\n")
        (at / "categoryMapping.txt").write_text("Instance\tScene\tFull\n1\t4\t7\n2\t2\t9\n")
        source = formats.open_folder(at, ["panoptic", "semantic"])[0]
        assert source.classes == ("lamp", "chair", "wall", "floor") and source.things == 2
        assert source.category_ids == (4, 2, 1, 3)
        sample = source[0]
        kind = {i: c for i, c, _ in sample["segments"].tolist()} | {0: None}
        assert [kind[i] for i in sample["panoptic"][:, 0].tolist()] == [2, 0, None, None, 1, 3]
        assert len(kind) == 6 and sample["panoptic"][1, 0] != sample["panoptic"][1, 7]
        assert sample["semantic"][:, 0].tolist() == [2, 0, 0, 255, 3, 3]
        assert "panoptic" in formats.open_folder(at, ["masks"])[1][0]       # instances alone
        (at / "categoryMapping.txt").write_text("Instance\tScene\tFull\n1\t2\t7\n")
        with raises(InputError, "annotations_instance/training/a.png", "instance class 2"):
            read_all(at, ["panoptic"])


def test_depth_pairs():
    with folder() as at:
        for split in ("train", "val"):
            write_png(at / f"{split}/rgb/a.png", np.zeros((6, 8, 3), np.uint8))
            write_png(at / f"{split}/depth/a.png", np.full((6, 8), 5120, np.uint16))
        sample = read_all(at, ["depth"], depth_scale=256.0)[1][0]
        assert (sample["depth"] == 20).all() and sample["depth"].dtype == torch.float32
        bad = at / "val/depth/a.png"
        for pixels in (np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.float32),
                       np.zeros((6, 8, 3), np.uint8), np.full((6, 8), -3, np.int32)):
            Image.fromarray(pixels).save(bad, "tiff")
            with raises(InputError, str(bad), "16 bits"):
                read_all(at, ["depth"])
        write_png(bad, np.zeros((7, 8), np.uint16))
        with raises(InputError, "val/rgb/a.png", "7 x 8"):
            read_all(at, ["depth"])
        for line, words in (("rgb/a.png", "line 1"), ("rgb/a.png None 518", "None"), ("", "line")):
            (at / "nyudepthv2_train_files_with_gt.txt").write_text(line + "\n")
            with raises(InputError, words):
                read_all(at, ["depth"])
    with folder() as at:
        for keys in ("depth", "keypoints", "panoptic", "masks", "boxes", "semantic"):
            with raises(InputError, str(at), "expected", formats.EXPECTED[keys]):
                formats.open_folder(at, [keys])
        for path in (at / "none", at / "file"):
            (at / "file").touch()
            with raises(InputError, str(path), "no such folder"):
                formats.open_folder(path, ["depth"])


def test_skipping_what_is_broken():
    """--on-error skip: photos of broken entries are left out, broken photos are replaced in
    training and left out of validation; each is told once, and counted."""
    def three(content):
        for i in (2, 3):
            content["images"].append(dict(content["images"][0], id=i, file_name=f"{i}.png"))
        content["annotations"].append(dict(content["annotations"][1], id=3, image_id=3, bbox=[]))
        content["images"].append(dict(content["images"][0], id=4, file_name="gone.png"))
    with folder() as at:
        little_coco(at, three)
        for i in (2, 3):
            write_png(at / f"train2017/{i}.png", np.full((6, 8, 3), 40 * i, np.uint8))
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            train, val = data.open_detection(at, 16, on_error="skip")
        assert train.source.ids == [0, 1, 2] and "annotation 3" in told.getvalue()
        assert "gone.png" in told.getvalue() and "2 of 5 photos" in told.getvalue()
        (at / "train2017/1.png").write_bytes(b"")
        args = argparse.Namespace(on_error="skip", batch_size=1, workers=1, seed=0, accumulate=1)
        state = training.Run(torch.device("cpu"))
        train.transform = data.v2.Identity()
        forgiving = batching.forgiving(train, args)
        assert batching.forgiving(train, argparse.Namespace(on_error="stop")) is train
        told, batches = io.StringIO(), [[(0, i)] for i in (0, 1, 2, 1)]
        timed = batching.Timed(batching.loader(forgiving, batches, data.collate, TINY, args, state))
        with contextlib.redirect_stderr(told):
            pixels = [int(next(timed).to()[0].max()) for _ in batches]
            assert pixels == [0, 80, 80, 80] and timed.skipped() == 1
            assert [forgiving[0, i]["image"].max().item() for i in (1, 2)] == [80, 80]
        assert not told.getvalue()                          # the data process has told it already
        for i in (0, 2):
            (at / f"train2017/{i}.png").write_bytes(b"")
        with raises(InputError, "no training photo"), quiet():
            forgiving[0, 0]
        assert forgiving.broken.all()

    class Turns(list):                                      # one of three tasks, as Segmentation
        def __getitem__(self, at):
            if at[1] in (1, 4):
                raise InputError("broken")
            return sum(at) % 3
    with quiet():
        turns = batching.forgiving(Turns(range(5)), args)
        assert all(turns[e, i] == (e + i) % 3 for e in range(4) for i in range(5))
    with folder() as at:
        little_coco(at)
        content = json.loads((at / "annotations/instances_val2017.json").read_text())
        content["images"].append(dict(content["images"][0], id=5, file_name="5.png"))
        (at / "annotations/instances_val2017.json").write_text(json.dumps(content))
        (at / "val2017/5.png").write_bytes(b"broken")
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            _, val = data.open_detection(at, 16, on_error="skip")
        assert val.source.ids == [0] and "5.png" in told.getvalue()
        assert "1 of 2 validation" in told.getvalue()


def test_own_joints():
    """Any category whose joints the file names: their number, what a mirror exchanges, how exactly
    they count, all from the names; what does not fit together is refused."""
    assert pose.flip_order(["LEye", "REye", "lHip", "rHip", "Lip"]) == [1, 0, 3, 2, 4]
    names = ["L_ear", "r_ear", "left paw", "Right paw", "tail", "bright_spot"]
    assert pose.flip_order(names) == [1, 0, 3, 2, 4, 5]
    human = pose.flip_order(toyworld.KEYPOINTS)
    assert human == pose.FLIP == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert (pose.oks_sigmas(toyworld.KEYPOINTS[::-1]) == metrics.OKS_SIGMAS[::-1]).all()
    assert np.allclose(pose.oks_sigmas(names), [metrics.OKS_SIGMAS.mean()] * 6)

    def animal(at, split="train", joints=names, **more):
        def change(content):
            content["categories"] += [dict(id=31, name="dog", keypoints=joints, **more)]
            for n, a in enumerate(content["annotations"]):
                a |= dict(category_id=31 - n, keypoints=[2 + n, 2, 2, *[0] * 3 * (len(joints) - 1)])
        path = little_coco(at, kind="person_keypoints") / f"annotations/person_keypoints_{split}"
        path = path.with_name(path.name + "2017.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    with folder() as at:
        for split in ("val", "train"):
            animal(at / split, split)
        for name in ("val2017.json", "train2017.json"):         # both parts with dogs
            source = at / name.split("2")[0] / f"annotations/person_keypoints_{name}"
            (at / "train/annotations" / source.name).write_bytes(source.read_bytes())
        train, val = data.open_pose(at / "train", (32, 16), augment=(0.5, 40.0))
        assert train.joints == tuple(names) and train.source.classes == ("dog",)
        assert len(train) == 1 and val.truths[0]["keypoints"].shape == (1, 6, 3)
        views, real = [], pose.random_view
        pose.random_view = lambda *a: views.append(a) or real(*a)
        try:
            labelled = {tuple(train[e, 0]["labelled"].nonzero()[:, 0].tolist()) for e in range(20)}
        finally:
            pose.random_view = real
        assert labelled == {(0,), (1,)}                         # mirrored: the other ear
        assert all(v[6] is None for v in views)                 # no upper half is known
        with quiet():
            out = finetune_pose.main(args_for(
                finetune_pose, "--data", at / "train", "--size", 32, 16, "--batch-size", 1,
                "--steps", 1, "--workers", 0, "--out", at / "out"))
        saved = torch.load(at / "out/last.pt", weights_only=True)
        assert out["step"] == 1 and saved["joints"] == names
        assert saved["model"]["offsets"].shape[0] == 6
        path = at / "train/annotations/person_keypoints_val2017.json"
        path.write_text(path.read_text().replace("tail", "nose"))
        with raises(InputError, "person_keypoints_val2017.json", "joints"):
            data.open_pose(at / "train", (32, 16))
        animal(at / "twice", joints=["eye", "Eye"])
        with raises(InputError, "same name"):
            data.open_pose(at / "twice", (32, 16))
        little_coco(at / "none", lambda c: c["categories"].pop(), "person_keypoints")
        with raises(InputError, "joints", "none"):
            data.open_pose(at / "none", (32, 16))
        little_coco(at / "id", lambda c: c["categories"][0].pop("id"), "person_keypoints")
        with raises(InputError, "has no 'id'"):
            data.open_pose(at / "id", (32, 16))


def own_coco(at, objects, names=None, categories=None, kind="instances", **files):
    """A folder of photos of 48 x 64 px and one JSON. objects: dicts, of which image is the photo's
    number; names: what the JSON calls the photos; files: path -> photo number, if other than
    images/0.jpg, ..."""
    names = names or [f"{i}.jpg" for i in range(1 + max(o["image"] for o in objects))]
    places = files or {f"images/{i}.jpg": i for i in range(len(names))}
    for place in places:
        write_photo(at / place, (64, 48))
    usual = dict(category_id=1, bbox=[8, 8, 20, 16], area=320, iscrowd=0,
                 segmentation=[[8, 8, 28, 8, 28, 24, 8, 24]])
    notes = [usual | dict(id=i, image_id=o["image"]) | {k: v for k, v in o.items() if k != "image"}
             for i, o in enumerate(objects)]
    content = dict(images=[dict(id=i, file_name=n, height=48, width=64)
                           for i, n in enumerate(names)], annotations=notes,
                   categories=categories or [dict(id=1, name="cat")])
    (at / "annotations").mkdir(exist_ok=True)
    (at / "annotations" / f"{kind}.json").write_text(json.dumps(content), encoding="utf-8")
    return at


def told(script, at, *flags):
    """What a script says of a data set with --check, or the one line with which it refuses it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            args = args_for(script, "--data", at, "--out", at / "out", "--check", *flags)
            training.run(script.main, args)
        except SystemExit as end:
            assert end.code in (None, 0, 2), end.code
            assert end.code != 2 or err.getvalue().count("error: ") == 1, err.getvalue()
    assert not (at / "out").exists() and "Traceback" not in err.getvalue()
    return out.getvalue() + err.getvalue()


def test_coco_as_other_tools_write_it():
    """Read as meant: how tools write names, ids, numbers, polygons, nulls, parts."""
    plain = [dict(image=i) for i in range(3)]
    twice = [dict(o, id=0) for o in plain]
    photo = {"images/my photo a.jpg": 0, "images/b.jpg": 1, "images/sub/Ü.JPG": 2}
    quoted = ["/data/local-files/?d=set/my%20photo%20a.jpg", "..\\label\\b.jpg", "U\u0308.jpg"]
    cases = {
        "names": (plain, dict(names=quoted, **photo)), "ids": (twice, {}),
        "texts": ([dict(o, image_id=str(o["image"]), category_id="1", bbox=["8", 8.0, "20", 16])
                   for o in plain], {}),
        "floats": ([dict(o, image_id=float(o["image"]), iscrowd=0.0) for o in plain], {}),
        "nulls": ([dict(o, area=None, iscrowd=None) for o in plain], {}),
        "flat polygon": ([dict(o, segmentation=[8, 8, 28, 8, 28, 24, 8, 24]) for o in plain], {})}
    for name, (objects, more) in cases.items():
        with folder() as at, quiet():
            parts = formats.open_folder(own_coco(at, objects, **more), ["masks"])
            found = [s[i] for s in parts for i in range(len(s))]
            assert len(found) == 3, name
            for sample in found:
                assert sample["boxes"].tolist() == [[8, 8, 28, 24]] and sample["area"] == 320, name
                assert masks_in(sample).sum() == 320, name
    with folder() as at, quiet():           # parts by the words of a name; what a Mac leaves behind
        own_coco(at, plain)
        text = (at / "annotations/instances.json").read_text()
        for word, found in (("annotations_validated", (2, 1)), ("instances_train", (3, 3))):
            [p.unlink() for p in (at / "annotations").iterdir()]
            (at / f"annotations/{word}.json").write_text(text)
            (at / f"annotations/._{word}.json").write_text("\0")
            if word == "instances_train":
                (at / "annotations/instances_test.json").write_text(text)
            assert tuple(map(len, formats.open_folder(at, ["boxes"]))) == found, word
    with folder() as at, quiet():           # what is held out shows something
        parts = formats.open_folder(own_coco(at, [dict(image=i) for i in (7, 9)]), ["boxes"])
        assert [len(p) for p in parts] == [9, 1] and parts[1].ids == [7]


def test_no_photo_stands_in_for_another():
    """A name is found wherever it lies, but never another photo of the same name; ids that are
    texts stay apart; what is skipped is skipped whatever its id's type."""
    def opened(at, names, files, objects=None, **how):
        objects = objects or [dict(image=i) for i in range(len(names))]
        with quiet():
            own_coco(at, objects, names=names, **files)
            parts = formats.open_folder(at, ["boxes"], **how)
        return {r["id"]: str(r["photo"].relative_to(at)) for p in parts for r in p.records}
    many = {f"raw/{s}/{i}.jpg": 0 for s in "ab" for i in range(2)}
    for prefix in ("", "/data/local-files/?d=raw/", "C:\\\\old\\\\"):
        with folder() as at:
            names = [f"{prefix}{s}/{i}.jpg" for s in "ab" for i in range(2)]
            assert opened(at, names, many) == dict(enumerate(many)), prefix
    for places, names in ((["train/0.jpg", "train/1.jpg"], ["0.jpg", "1.jpg"]),
                          (["test/0.jpg", "test/1.jpg"], ["0.jpg", "1.jpg"])):
        with folder() as at:            # the other part's folder, if they are nowhere else
            own_coco(at, [dict(image=0), dict(image=1)], names=names, kind="instances_val",
                     **dict.fromkeys(places, 0))
            text = (at / "annotations/instances_val.json").read_text()
            (at / "annotations/instances_train.json").write_text(text)
            with quiet():
                assert [len(p) for p in formats.open_folder(at, ["boxes"])] == [2, 2]
            there = [str(at / p) for p in places]           # and names that are whole paths
            (at / "annotations/instances_train.json").write_text(
                text.replace('"0.jpg"', f'"{there[0]}"').replace('"1.jpg"', f'"{there[1]}"'))
            with quiet():
                assert [str(r["photo"]) for r in formats.open_folder(
                    at, ["boxes"])[0].records] == there
    for places in (["images/train/0.jpg", "images/train/1.jpg", "images/val/2.jpg"],
                   ["images/0.jpg", "images/1.jpg", "masks/2.jpg"],
                   ["A/0.jpg", "A/1.jpg", "B/2.jpg"]):
        with folder() as at, raises(InputError, "2.jpg", "no such file"):
            part = "A/" if places[0][0] == "A" else ""
            opened(at, [f"{part}{i}.jpg" for i in range(3)], dict.fromkeys(places, 0))
    with folder() as at, quiet():
        own_coco(at, [dict(image=i) for i in range(4)])
        content, odd = json.loads((at / "annotations/instances.json").read_text()), [
            "1_11", "11_1", "1e2", "1.3"]
        for image, note, name in zip(content["images"], content["annotations"], odd):
            image["id"] = note["image_id"] = name
        (at / "annotations/instances.json").write_text(json.dumps(content))
        parts = formats.open_folder(at, ["boxes"])
        assert parts[1].ids + parts[0].ids == odd
    with folder() as at:
        bad = [dict(image=i, image_id=float(i)) for i in range(4)] + [
            dict(image=2, image_id="2.0", bbox=[1, 1, -5, 3])]
        found = opened(at, [f"{i}.jpg" for i in range(4)], {}, bad, on_error="skip")
        assert sorted(found) == [0, 1, 3]


def test_joints_of_other_animals():
    """Several kinds with the same joints, objects without joints or without a box, names of sides
    of all kinds, or none: read, or refused with the flags that say what a mirror does."""
    five = [6, 6, 2, 30, 6, 2, 18, 20, 2, 12, 34, 2, 24, 34, 2]
    joints = ["earL", "earR", "nose", "LF_paw", "RF_paw"]
    kinds = [dict(id=i, name=n, keypoints=joints) for i, n in ((4, "dog"), (9, "fox"))]
    objects = [dict(image=i, category_id=(4, 9)[i % 2], keypoints=five) for i in range(4)]
    objects[1] = dict(image=1, category_id=9)                           # no joints: not labelled
    objects[2] |= dict(bbox=[0, 0, 0, 0], area=0)                       # only joints were clicked
    with folder() as at, quiet():
        own_coco(at, objects, categories=kinds, kind="person_keypoints")
        train, val = data.open_pose(at, (48, 32))
        assert train.flip == [1, 0, 2, 4, 3] and val.source.category_ids == (4, 9)
        assert [len(t["boxes"]) for t in train.truths] == [1, 1, 1] and len(train.people) == 2
        clicked = train.truths[1]
        assert clicked["boxes"].tolist() == [[6, 6, 31, 35]] and clicked["area"] == 25 * 29
        assert train[0, 1]["labelled"].all()
        assert data.open_pose(at, (48, 32), pairs="earL-nose,4-5")[0].flip == [2, 1, 0, 4, 3]
        for wrong in ("earL", "earL-tail", "earL-earL", "1-9", "1-2,2-3"):
            with raises(InputError, "--flip-pairs", wrong.split(",")[-1]):
                data.open_pose(at, (48, 32), pairs=wrong)
        views = data.open_pose(at, (48, 32), augment=(0, 0.0), flip=False)[0]
        x = torch.stack([views[e, 0]["joints"][:, 0] for e in range(12)])
        assert (x[:, 0] < x[:, 1]).all()                                # never mirrored
    names = "leftHip rightHip L_eye R_eye LEye2 REye2 paw_front_left paw_front_right lshoulder " \
            "rshoulder lip rip tail LH RH elbow_L elbow_R lefty FL_toe FR_toe hand_lt hand_rt " \
            "earl earr fl_heel fr_heel".split()
    order = pose.flip_order(names)
    pairs = {(names[i], names[j]) for i, j in enumerate(order) if i < j}
    lefts = (0, 2, 4, 6, 8, 10, 13, 15, 18, 20, 22, 24)
    assert pairs == {tuple(names[i:i + 2]) for i in lefts}, pairs
    assert pose.flip_order(toyworld.KEYPOINTS) == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13,
                                                   16, 15]
    numbered = [dict(id=1, name="fox", keypoints=["1", "2", "3"])]
    with folder() as at:
        own_coco(at, [dict(image=i, keypoints=five[:9]) for i in range(30)], categories=numbered,
                 kind="person_keypoints")
        assert "--flip-pairs" in told(finetune_pose, at) and "--no-flip" in told(finetune_pose, at)
        for flags in (["--flip-pairs", "1-2"], ["--no-flip"]):
            assert "3 joints" in told(finetune_pose, at, *flags)
        assert "1 - 2" in told(finetune_pose, at, "--flip-pairs", "1-2")


def test_what_is_told_before_training():
    """--check writes nothing and says what would have been silent: who is left out, and why."""
    every = [dict(image=i) for i in range(8)]
    crowd = dict(iscrowd=1, segmentation=dict(counts=[0, 320, 2752], size=[48, 64]))
    arrows = [dict(id=1, name="arrow_left"), dict(id=2, name="arrow_right")]
    for objects, more, flags, words in (
            (every, {}, [], ("7 training and 1 validation", "7 objects in 7 of 7", "cat 100.0%")),
            (every[:2] + [o | crowd for o in every], {}, [], ("crowds (iscrowd 1)", "88%")),
            ([o | crowd for o in every], {}, [], ("error", "iscrowd 1", "set it to 0")),
            (every + [dict(image=5, bbox=[800, 800, 9, 9])], {}, [], ("1 outside their photo",)),
            (every + [dict(image=5)] * 30, {}, [], ("31 objects", "--queries 12")),
            (every, dict(names=[f"{i % 4}.jpg" for i in range(8)]), [],
             ("3 training photos are listed more than once", "1 photos are in both parts")),
            (every, dict(categories=arrows), [], ("arrow_left and arrow_right", "--no-flip")),
            ([o | dict(bbox=[.1, .1, .5, .5]) for o in every], {}, [], ("error", "fractions"))):
        with folder() as at:
            said = told(finetune_det, own_coco(at, objects, **more), *flags)
            assert all(w in said for w in words), (words, said)
    with folder() as at:
        own_coco(at, every, categories=arrows)
        assert "mirrors half" not in told(finetune_det, at, "--no-flip")
        train = data.open_detection(at, 48, flip=False)[0]
        assert all(train[e, 0]["boxes"][0, 0] < 0.5 for e in range(3))
    with folder() as at:                                        # a roll of films of a telephone
        for i in range(4):
            write_photo(at / f"{i}.JPG")
        for name in ("a.heic", "b.HEIC", "c.avif", "._d.jpg", "e.txt"):
            (at / name).write_bytes(b"")
        write_photo(at / "x.jpg")
        (at / "x.jpg").rename(at / "f.jfif")
        said = told(pretrain, at)
        assert "4 training and 1 validation" in said and "2 .heic, 1 .avif are passed over" in said
        Image.fromarray(np.full((40, 30), 4000, np.uint16)).save(at / "deep.png")
        assert "largest value is 4000" in told(pretrain, at) and "by 16" in told(pretrain, at)


def write_maps(at, parts, ids="labels", photos="images"):
    """Photos and label maps of 48 x 64 px; parts: name -> (value of the ground, of a block)."""
    for part, (ground, block) in parts.items():
        for n in range(3):
            write_photo(at / photos / part / f"{n}.png", (64, 48))
            values = np.full((48, 64), ground, np.uint8)
            values[10:30, 20:50] = block
            write_png(at / ids / part / f"{n}.png", values)
    return at


def test_label_maps_of_other_people():
    """Binary masks of all kinds are two classes, or refused with the remedy that works."""
    both = lambda *values: dict(train=values, val=values)
    two = ("2 classes", "80.5%", "19.5%", "no class 0.0%")
    mmseg = dict(training=(0, 1), validation=(0, 1))
    for parts, names, flags, words, where in (
            (both(0, 255), None, [], two, "labels"), (both(0, 1), None, [], two, "labels"),
            (both(0, 255), "background\npolyp", [], ("polyp 19.5%", "no class 0.0%"), "labels"),
            (both(0, 255), "polyp", [], ("error", "one class", '"background" the first'), "labels"),
            (both(0, 1), "polyp", [], ("error", "one class", '"background" the first'), "labels"),
            (both(0, 1), "background\npolyp", [], ("polyp 19.5%",), "labels"),
            (both(0, 2), "car\nperson", [], ("error", "--first-label 1", '"background"'), "labels"),
            (both(0, 2), "car\nperson", ["--first-label", 1],
             ("none of car", "person 19.5%", "no class 80.5%"), "labels"),
            (mmseg, None, [], two, "annotations"),
            (dict(train=(0, 255), val=(0, 1)), None, [], ("error", "0 and 255", "the same"),
             "labels"), ({"street": (0, 1)}, None, [], ("2 training and 1 val",), "masks")):
        with folder() as at:
            write_maps(at, parts, where)
            if names:
                (at / "classes.txt").write_text(names, encoding="utf-8")
            said = told(finetune_seg, at, *flags)
            assert all(w in said for w in words), (parts, names, words, said)
    with folder() as at:                                        # resized with interpolation
        write_maps(at, both(0, 255))
        y, x = np.mgrid[:96, :128]
        disc = Image.fromarray(np.where((y - 48) ** 2 + (x - 64) ** 2 < 900, 255, 0).astype(
            np.uint8).repeat(4, 0).repeat(4, 1))
        for part in ("train", "val"):
            for n in range(3):
                small = disc.rotate(7 * n).resize((64, 48), Image.BICUBIC)
                small.save(at / f"labels/{part}/{n}.png")
        assert "interpolation" in told(finetune_seg, at)
    with folder() as at:
        write_maps(at, both(0, 1), "masks")
        for path in list(at.glob("masks/*/*.png")):
            path.rename(path.with_suffix(".jpg"))
        assert "JPEG changes the values" in told(finetune_seg, at)


def test_depth_beyond_the_limit_teaches_nothing():
    """As it is graded nothing; nor does the largest value of 16 bits."""
    truth = torch.full((16, 16), 2.0)
    truth[:, 8:] = 12.0
    depth = torch.full((1, 8, 8), 3.0, requires_grad=True)
    beyond = finetune_depth.depth_loss(depth, [{"depth": truth}], 2, 1e-3, 10.0)
    truth[:, 8:] = 0
    assert beyond == finetune_depth.depth_loss(depth, [{"depth": truth}], 2)
    with folder() as at:
        write_png(at / "d.png", np.array([[1000, 65535], [0, 65534]], np.uint16))
        metres = torch.from_numpy(files.read_depth(at / "d.png", 1000))
        assert_close(metres, torch.tensor([[1, 0], [0, 65.534]]), 1e-6)


def test_orientations_that_cannot_be_seen():
    """Photos upside down have the size of their labels either way: those that lie on the side tell
    whether the tool that made the labels turned them."""
    for turned in (True, False):
        with folder() as at:
            for n, number in enumerate((6, 3, 3, 1)):
                pixels = np.zeros((48, 64, 3), np.uint8)
                pixels[:10, :20] = 255                          # the bright corner is labelled
                exif = Image.Exif()
                exif[0x0112] = number
                photo = Image.fromarray(pixels)
                for part in ("train", "val"):
                    (at / f"images/{part}").mkdir(parents=True, exist_ok=True)
                    photo.save(at / f"images/{part}/{n}.png", exif=exif)
                    seen = ImageOps.exif_transpose(Image.open(at / f"images/{part}/{n}.png"))
                    shown = np.array(seen if turned else photo)
                    write_png(at / f"labels/{part}/{n}.png", (shown[..., 0] > 99).astype(np.uint8))
            with quiet():           # the photo that tells is in one part, what it tells is for both
                source, val = formats.open_folder(at, ["semantic"])
                val = val.subset([1, 2])
            for i in range(2):
                assert torch.equal(val[i]["image"][0] > 99, val[i]["semantic"].bool()), (turned, i)
            for i in range(4):
                bright = source[i]["image"][0] > 99
                assert torch.equal(bright, source[i]["semantic"].bool()), (turned, i)


def test_layouts_of_labelling_tools():
    """train/_annotations.coco.json beside its photos (Roboflow, its test part is not validation),
    one file for all, names with folders that are not there or as Windows writes them."""
    with folder() as at:
        little_coco(at / "a")
        old = {s: at / f"a/annotations/instances_{s}2017.json" for s in ("train", "val")}
        for split, part in (("train", "train"), ("val", "valid"), ("val", "test")):
            (at / "a" / f"{split}2017").rename(at / "a" / part) if part != "test" else \
                (at / "a/test").mkdir()
            (at / "a" / part / "_annotations.coco.json").write_bytes(old[split].read_bytes())
        [p.unlink() for p in old.values()]
        train, val = read_all(at / "a", ["boxes", "classes"])
        assert (len(train), len(val)) == (2, 1) and len(train[0]["boxes"]) == 2

        def renamed(content):
            for i in content["images"]:
                i["file_name"] = f"C:\\photos\\{i['file_name']}"
            content["annotations"][1]["image_id"] = 1
        little_coco(at / "b", renamed)
        (at / "b/annotations/instances_val2017.json").unlink()
        (at / "b/annotations/instances_train2017.json").rename(at / "b/result.json")
        (at / "b/train2017").rename(at / "b/images")
        train, val = read_all(at / "b", ["boxes", "classes"])
        assert (len(train), len(val)) == (1, 1)                 # every 20th is held out
        (at / "b/images").rename(at / "b/elsewhere")
        assert [len(p) for p in read_all(at / "b", ["boxes"])] == [1, 1]
        (at / "b/elsewhere").rename(at / "b/val")               # a folder of the other part
        with raises(InputError, "result.json", "images/train", "any other folder"):
            read_all(at / "b", ["boxes", "classes"])
        (at / "b/val").rename(at / "b/elsewhere")
        (at / "b/elsewhere").rename(at / "b/images")
        text = (at / "b/result.json").read_text()
        (at / "b/result.json").write_text(text.replace("photos\\\\1.png", "0.png"))   # twice 0.png
        with raises(InputError, "result.json", "name may mean"):
            read_all(at / "b", ["boxes", "classes"])
        other = little_coco(at / "d", kind="panoptic")          # JSON of other things is no COCO
        for stray in ("imgCatIds.json", "train.json", "1.json"):
            (other / stray).write_text("{}")
        assert "panoptic" in read_all(other, ["masks"])[0][0]

        def corners(content):
            content["annotations"] = [dict(content["annotations"][0], id=i, bbox=[5, 2, 7, 5])
                                      for i in range(20)]
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            formats.open_folder(little_coco(at / "c", corners), ["boxes", "classes"])
        assert "20 of 20 boxes reach beyond" in told.getvalue()


def test_fractions_of_a_folder():
    """Larger shares contain smaller ones, and are no prefix: files are sorted by scene."""
    with folder() as at:
        exported(at, "nyu", 12, 16)
        parts = [data.open_depth(at, 16, 16, f)[0].source.ids for f in (0.01, 0.25, 0.5, 1.0)]
        assert [len(p) for p in parts] == [1, 3, 6, 12]
        assert all(set(a) < set(b) for a, b in itertools.pairwise(parts))
        assert parts[2] != parts[3][:6] and parts == [sorted(p) for p in parts]
    records = [dict(id=i) for i in range(41)]
    train, val = files.hold_out("", files.Source(records, None))
    assert val.ids == [0, 20, 40] and sorted(train.ids + val.ids) == list(range(41))


def test_scripts_run_on_folders():
    """Every task, trained for a step and evaluated on files alone; checkpoints keep the classes."""
    with folder() as at:
        places = {kind: exported(at / kind, kind, 2) for kind in ("coco", "ade20k", "nyu")}
        runs = [(finetune_det, "coco", ["--size", 48, "--queries", 8, "--many-queries", 8]),
                (finetune_seg, "coco", ["--size", 48, "--tasks", "instance"]),
                (finetune_seg, "coco", ["--size", 48, "--tasks", "semantic,instance,panoptic"]),
                (finetune_seg, "ade20k", ["--size", 48]),
                (finetune_depth, "nyu", ["--crop", 48, 48, "--on-error", "skip"])]
        for n, (script, kind, flags) in enumerate(runs):
            out = at / f"out{n}"
            flags = ["--data", places[kind], "--out", out, "--steps", 1, "--batch-size", 2,
                     "--workers", 0, *flags]
            with quiet():
                result = script.main(args_for(script, *flags))
            assert result["step"] == 1 and (out / "samples/000001.png").exists()
            kept = checkpoints.read(out / "last.pt", "")
            if n < 3:
                names = toyworld.THINGS if n < 2 else toyworld.CLASSES
                assert kept["classes"] == list(names)
                assert kept["category_ids"] == [4 * k + 3 for k in range(len(names))]
            if n == 0:                                          # the map is compared, not only kept
                with quiet():                                       # the same names by other ids
                    script.main(args_for(script, *flags, "--eval", "--data", "toyworld:2"))
                for path in (places[kind] / "annotations").glob("instances*"):
                    path.write_text(path.read_text().replace('"ball"', '"bell"'))
                with raises(InputError, "--data", "classes", str(out)), quiet():
                    script.main(args_for(script, *flags, "--eval"))
                places[kind] = exported(at / "again", kind, 2)


def test_real_files():
    """The real subset, if there: every source opens, first and last sample hang together."""
    if not SHARED.is_dir():
        print(f"skipped: {SHARED} is not there")
        return
    for name, keys in (("coco", ["masks"]), ("coco", ["keypoints"]), ("coco", ["panoptic"]),
                       ("ADEChallengeData2016", ["semantic"]), ("nyu", ["depth"])):
        for source in formats.open_folder(SHARED / name, keys):
            for sample in (source[0], source[len(source) - 1]):
                size = sample["image"].shape[-2:]
                for key in {"layers", "panoptic", "semantic", "depth"} & sample.keys():
                    assert sample[key].shape[-2:] == size, key
                masks = masks_in(sample) if "layers" in sample else ()
                for box, mask in zip(sample.get("boxes", ()), masks):
                    ends = torch.tensor([0, 0, 1, 1])
                    out = torchvision.ops.masks_to_boxes(mask[None])[0] + ends - box
                    out *= torch.tensor([-1, -1, 1, 1])     # thin tips of an outline draw nothing
                    assert out.max() <= 1 and out.min() > -6 and out.abs().median() <= 1


# -----------------------------------------------------------------------------
# Schedules, optimiser, checkpoints


def test_schedules():
    values = [training.cosine(s, 100, 10) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1 and max(values) == 1 and values[99] < 1e-3
    assert abs(values[55] - 0.5) < 1e-9 and all(a > b for a, b in zip(values[10:], values[11:]))
    assert training.poly(0, 10) == 1 and abs(training.poly(5, 10) - 0.5 ** 0.9) < 1e-12


def test_parameter_groups():
    """Every parameter once; no decay on vectors, tokens, bias tables and e_i; scales by name."""
    net = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
    groups = training.param_groups(net, 0.05, [("offsets", 10.0), ("backbone", 0.1)])
    place = {id(p): g for g in groups for p in g["params"]}
    assert len(place) == sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        g = place[id(p)]
        assert g["scale"] == (10 if "offsets" in name else 0.1 if "backbone" in name else 1)
        matrix = name.endswith("weight") and p.ndim > 1
        assert g["weight_decay"] == (0.05 if matrix else 0), name


def args_for(script, *flags):
    """Parsed flags, on the CPU: what is compared to the last digits is compared there."""
    flags = ["--preset", "tiny", "--device", "cpu", *map(str, flags)]
    return training.parse(script.flags(), script.PRESETS, flags)


def test_pretrained_parts_load_bit_equal():
    """Each part arrives bit-equal or not at all; what does not fit is named and changes nothing."""
    with folder() as at, quiet():
        torch.manual_seed(1)
        net, state = noisy(Pretrainer(TINY)), training.Run(torch.device("cpu"))
        args = args_for(pretrain, "--out", at)
        optimizer = torch.optim.AdamW(net.parameters())
        checkpoints.keep(args, net, optimizer, state, 5, 0.1, None, is_best=True)
        for parts in (["backbone"], ["backbone", "bifpn"], list(checkpoints.PARTS)):
            task = Segmenter(TINY, {"semantic": 6}, {"semantic": 3})
            checkpoints.load_parts(task.glid, at / "best.pt", parts, state)
            for part in checkpoints.PARTS:
                a, b = (getattr(n.glid, part).state_dict() for n in (net, task))
                same = all(torch.equal(a[k], b[k]) for k in a)
                assert same == (part in parts), part
        small = GLID(Config(**PRESETS["tiny"] | dict(width=32, heads=(1, 2, 4, 8))))
        with raises(InputError, "best.pt", "backbone", "tiny"):
            checkpoints.load_parts(small, at / "best.pt", ["backbone"], state)
        with raises(InputError, "--load neck"):
            checkpoints.load_parts(task.glid, at / "best.pt", ["neck"], state)
        wide = GLID(Config(**PRESETS["tiny"] | dict(window=6)))             # another window is fine
        checkpoints.load_parts(wide, at / "best.pt", ["backbone"], state)
        old, new = (g.backbone.stages[0][0].attn.bias_table for g in (net.glid, wide))
        assert torch.equal(new, M.resize_bias_table(old, 6))
        (at / "bad.pt").write_bytes(b"PK\x03\x04 broken")
        torch.save({"weights": torch.ones(1)}, at / "other.pt")
        for name in ("bad.pt", "other.pt", "none.pt"):
            with raises(InputError, name):
                checkpoints.load_parts(task.glid, at / name, ["backbone"], state)
        theirs = torchvision.models.swin_t()
        torch.save(theirs.state_dict(), at / "swin_t.pth")
        twin = GLID(Config(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), dim=64))
        checkpoints.load_backbone(twin, f"torchvision:{at}/swin_t.pth", state)
        assert torch.equal(twin.backbone.merges[0].reduction.weight,
                           theirs.features[2].reduction.weight)
        with raises(InputError, "--init-backbone"):
            checkpoints.load_backbone(task.glid, f"{at}/swin_t.pth", state)


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
    theirs = noisy(torchvision.models.swin_t()).state_dict()
    config = Config(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), dim=64)
    official = official_names(theirs) | {"layers.0.blocks.1.attn_mask": torch.zeros(1, 49, 49),
                                         "head.weight": torch.zeros(10, 768)}
    simmim = {f"encoder.{k}": v for k, v in official.items()} | {
        "encoder.mask_token": torch.zeros(1, 1, 96), "decoder.0.weight": torch.zeros(9, 768, 1, 1)}
    cases = {"torchvision": theirs, "official": {"model": official}, "timm": official_names(
        theirs, merges_late=False), "wrapped": {"state_dict": {f"module._orig_mod.{k}": v for k, v
        in theirs.items()}}, "simmim": {"model": simmim, "epoch": 3}, "half": {
        "model": {k: v.half() if v.is_floating_point() else v for k, v in official.items()}}}
    with folder() as at:
        for name, content in cases.items():
            torch.save(content, at / f"{name}.pth")
            net = GLID(config)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                state = training.Run(torch.device("cpu"))
                checkpoints.load_backbone(net, f"{at}/{name}.pth", state)
            expected = M.swin_from_torchvision(theirs, config)
            for k, v in expected.items():
                assert_close(net.backbone.state_dict()[k], v, 1e-3 if name == "half" else 1e-9, k)
            assert "window of 7 resized to 6" in said.getvalue()
        torch.save({"model": Pretrainer(TINY).state_dict(), "config": {}}, at / "ours.pt")
        torch.save({"a": torch.zeros(3)}, at / "other.pth")
        torch.save({"model": theirs, "config": argparse.Namespace()}, at / "config.pth")
        for name, words in (("ours.pt", "--load backbone"), ("other.pth", "no Swin"),
                            ("config.pth", "weights_only=False"), ("none.pth", "no such file"),
                            ("page.pth", "no file of torch.save")):
            (at / "page.pth").write_bytes(b"<!DOCTYPE html><html>")
            with raises(InputError, "--init-backbone", name, words):
                checkpoints.load_backbone(GLID(config), str(at / name), None)


def test_checkpoint_survives_a_failed_write():
    """If writing breaks off at any point, the last good checkpoint is still there."""
    with folder() as at:
        checkpoints.save({"step": 1}, at / "last.pt")
        real = torch.save
        def broken(state, f):
            f.write(b"half a checkpoint")
            raise OSError("disk full")
        torch.save = broken
        try:
            with raises(InputError, "last.pt", "disk full"):
                checkpoints.save({"step": 2}, at / "last.pt")
        finally:
            torch.save = real
        assert torch.load(at / "last.pt")["step"] == 1 and len(list(at.iterdir())) == 1


TOY = ["--data", "toyworld:36", "--batch-size", 4, "--workers", 1, "--save-every", 2]


# How far the weights of two runs that ought to be equal may lie apart, trained with steady_adam()
STEADY = 5e-6


@contextlib.contextmanager
def steady_adam():
    """AdamW with eps 1e-3. With its 1e-8, a weight whose true gradient is zero moves by a full step
    in the direction of the rounding error, which is another one on every processor, torch version
    and number of processes. Rounding errors of 1e-8 become 1e-5 of a step of 1e-3 or so here; a
    wrong gradient, schedule or decay still moves the weights by 1e-3."""
    real = torch.optim.AdamW
    torch.optim.AdamW = functools.partial(real, eps=1e-3)
    try:
        yield
    finally:
        torch.optim.AdamW = real


def command(script, *flags):
    return [sys.executable, str(HERE / script), "--preset", "tiny", "--device", "cpu",
            *map(str, flags)]


def launch(*args, **kwargs):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*args, **kwargs), env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    output = process.communicate()[0]
    assert process.returncode == code, f"exit code {process.returncode}:\n{output[-2000:]}"
    return output


def differences(a, b):
    """Largest difference between the tensors of two checkpoints."""
    a, b = (torch.load(p, weights_only=True) for p in (a, b))
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    pairs = [(a["model"][k], b["model"][k]) for k in a["model"]]
    for i, s in a["optimizer"]["state"].items():
        pairs += [(s[k], b["optimizer"]["state"][i][k]) for k in s]
    return max((x.float() - y.float()).abs().max().item() for x, y in pairs)


def test_loops_do_what_they_say():
    """Both scripts with two micro-steps against training written out by hand: the same samples,
    schedule, clipping and updates give the same weights."""
    with folder() as at, quiet(), steady_adam():
        state = training.Run(torch.device("cpu"))
        common = ["--data", "toyworld:4", "--batch-size", 2, "--accumulate", 2, "--workers", 0]
        args = args_for(pretrain, *common, "--epochs", 4, "--warmup-epochs", 2, "--out", at / "p")
        pretrain.main(args)
        torch.manual_seed(0)
        net = Pretrainer(TINY, norm_pix=True)
        optimizer = torch.optim.AdamW(training.param_groups(net, 0.05), betas=(0.9, 0.95))
        train, _ = data.open_pretraining("toyworld:4", TINY)
        for epoch, scale in enumerate((0.5, 1.0, 1.0, 0.5)):        # warm-up, then half a cosine
            images, tokens = data.collate_pretraining(TINY, [train[(epoch, i)] for i in range(4)])
            training.set_lr(optimizer, 2e-3 * scale)
            losses.reconstruction_loss(*net(M.normalize(images), tokens)).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"model": net.state_dict()}, at / "hand.pt")
        assert weights_differ(at / "p/last.pt", at / "hand.pt") < STEADY

        args = args_for(finetune_seg, *common, "--steps", 3, "--points", 64, "--clip", 0.5,
                        "--init", at / "p/best.pt", "--backbone-lr", 0.1, "--out", at / "s")
        finetune_seg.main(args)
        train, _ = data.open_segmentation("toyworld:4", 64)
        torch.manual_seed(0)
        net = Segmenter(TINY, {"semantic": 32}, {"semantic": 12})
        checkpoints.load_parts(net.glid, at / "p/best.pt", checkpoints.PARTS, state)
        groups = training.param_groups(net, 0.05, [("offsets", 500.0), ("backbone", 0.1)])
        optimizer = torch.optim.AdamW(groups)
        order = iter(batching.Batches(4, args, state, 0, 3))
        for step in range(3):
            torch.manual_seed(data.mix(0, step, 0))
            training.set_lr(optimizer, 1e-3 * (1 - step / 3) ** 0.9)
            parts = [data.collate(TINY, [train[i] for i in next(order)]) for _ in range(2)]
            count = sum(len(t["labels"]) for *_, targets in parts for t in targets) / 2
            for images, tokens, targets in parts:
                found = net(M.normalize(images), tokens, SEMANTIC, every_layer=True)["semantic"]
                loss = losses.segmentation_loss(*found, targets, (64, 64), count, 64)["loss"]
                (loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"model": net.state_dict()}, at / "hand.pt")
        assert weights_differ(at / "s/last.pt", at / "hand.pt") < STEADY

        # a finished run that is resumed evaluates; changed flags are refused; best is remembered
        args.resume = True
        assert finetune_seg.main(args)["step"] == 3
        best = torch.load(at / "s/last.pt")["best"]
        assert checkpoints.resume(args, net, optimizer, state, train) == (3, best, False)
        args.weight_decay = 0.1
        with raises(InputError, "--weight-decay", "0.05"):
            checkpoints.resume(args, net, optimizer, state, train)
        net.head = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(net.head.weight, math.nan)
        with raises(FloatingPointError, "--lr"):
            checkpoints.keep(args, net, optimizer, state, 9, 0.0, train)
        assert torch.load(at / "s/last.pt")["step"] == 3


def test_resume_is_exact():
    """Killed (SIGKILL) or asked to end (SIGTERM) wherever it happens to be, mid-epoch, with a data
    process, and resumed, a run ends with the same bits as one that was left alone; so does the log
    of the killed one. The other says how to go on, without a traceback, with 128 + 15."""
    with folder() as at:
        flags = [*TOY, "--steps", 24, "--accumulate", 2]                    # 4 steps an epoch
        with quiet():
            pretrain.main(args_for(pretrain, *flags, "--out", at / "whole"))
        for name, number in (("killed", signal.SIGKILL), ("asked", signal.SIGTERM)):
            run = launch("pretrain.py", *flags, "--out", at / name)
            while not (at / name / "last.pt").exists():
                assert run.poll() is None, finish(run)
                time.sleep(0.05)
            run.send_signal(number)
            said = finish(run, -9 if name == "killed" else 143)
            assert torch.load(at / name / "last.pt", weights_only=True)["step"] < 24, "too late"
            assert name == "killed" or "--resume" in said.splitlines()[-1], said
            assert "Traceback" not in said, said
            with quiet():
                pretrain.main(args_for(pretrain, *flags, "--out", at / name, "--resume"))
        for name in ("killed", "asked"):
            assert differences(at / "whole/last.pt", at / name / "last.pt") == 0
        assert (at / "whole/log.jsonl").read_text() == (at / "killed/log.jsonl").read_text()


# every fine-tuning script, with flags that keep it small
FINETUNING = {
    finetune_seg: ["--points", 64, "--tasks", "semantic,instance,panoptic"],
    finetune_det: ["--queries", 12, "--many-queries", 24],
    finetune_depth: [],
    finetune_pose: [],
}


def test_finetuning_resumes_exactly():
    """Every fine-tuning, some of which sample random points: asked to end in its second step it
    finishes and saves that; asked again while it evaluates it ends at once, and resumed begins with
    that evaluation. The same bits and metrics as without."""
    def interrupting(real, at, number):
        """The function, of which call number `at` sends us a signal."""
        calls = itertools.count(1)
        def call(*args, **more):
            if next(calls) == at:
                os.kill(os.getpid(), number)
            return real(*args, **more)
        return call
    for script, small in FINETUNING.items():
        with folder() as at, quiet():
            flags = ["--data", "toyworld:8", "--batch-size", 2, "--workers", 1, "--save-every", 2,
                     *small, "--steps", 6, "--eval-every", 3, "--drop-path", 0.2]
            script.main(args_for(script, *flags, "--out", at / "whole"))
            part, add = args_for(script, *flags, "--out", at / "part"), training.Progress.add
            evaluate = script.evaluate
            try:
                training.Progress.add = interrupting(add, 1, signal.SIGTERM)
                with raises(training.Stopped, "SIGTERM"):
                    script.main(part)
                training.Progress.add, part.resume = add, True
                assert torch.load(at / "part/last.pt")["step"] == 1
                script.evaluate = interrupting(evaluate, 1, signal.SIGINT)
                with raises(training.Stopped, "SIGINT"):
                    script.main(part)
            finally:
                training.Progress.add, script.evaluate = add, evaluate
            kept = torch.load(at / "part/last.pt")
            assert kept["step"] == 3 and kept["due"] and not (at / "part/best.pt").exists()
            script.main(part)
            assert differences(at / "whole/last.pt", at / "part/last.pt") == 0, script
            whole, rows = ([json.loads(r) for r in (at / n / "log.jsonl").open()]
                           for n in ("whole", "part"))
            assert rows[0]["step"] == 1 and "lr" in rows.pop(0)     # more often reported, not else
            assert [r for r in rows if "lr" not in r] == [r for r in whole if "lr" not in r]
            assert [r["step"] for r in rows] == [r["step"] for r in whole]


def test_a_second_signal_ends_at_once():
    """And what a signal does is what it was when the loop is left, by an error too."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    killed, real = [], os.kill
    with raises(ValueError, "left"), quiet():
        with training.Progress(0, 9, "", None, training.Run(torch.device("cpu")), 1) as bar:
            os.kill(os.getpid(), signal.SIGTERM)
            assert bar.stops() == signal.SIGTERM and not killed
            os.kill = lambda *a: killed.append(a)
            try:
                bar.asked(signal.SIGTERM, None)             # torchrun passes it on once more
                assert not killed
                bar.since -= 3
                bar.asked(signal.SIGTERM, None)
            finally:
                os.kill = real
            assert killed == [(os.getpid(), signal.SIGTERM)]
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            raise ValueError("left")
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_one_run_writes_into_a_folder():
    """A second one is refused in one line while the first lives; what it holds is not touched."""
    with folder() as at:
        lock = training.claim(at)
        assert lock and "another run" in finish(launch("pretrain.py", *TOY, "--out", at), 2)
        assert sorted(p.name for p in at.iterdir()) == [".lock", "samples"]
        lock.close()
        with quiet():                                       # which lets go of it in the end
            pretrain.main(args_for(pretrain, *TOY, "--steps", 1, "--workers", 0, "--out", at))
        code = f"import training; print(training.claim({str(at)!r}) is not None)"
        assert "True" in subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True,
                                        capture_output=True).stdout


def test_accumulated_micro_steps_are_one_batch():
    """Detection in four micro-steps of one photo, with 3 to 8 objects, as in one step of four."""
    with folder() as at, quiet(), steady_adam():
        flags = ["--data", "toyworld:8", "--workers", 0, "--steps", 3, "--query-lr", 0, "--queries",
                 12, "--many-queries", 24, "--clip", 1e6]       # which would hide a factor
        for name, size, parts in (("one", 4, 1), ("four", 1, 4)):
            finetune_det.main(args_for(finetune_det, *flags, "--batch-size", size, "--accumulate",
                                       parts, "--out", at / name))
        assert weights_differ(at / "one/last.pt", at / "four/last.pt") < STEADY


def weights_differ(a, b):
    """Largest difference, keys' biases left out: they cancel in every softmax, so that their true
    gradient is zero, and Adam scales its rounding noise up to full steps."""
    a, b = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    for weights in (a, b):
        for k in weights:
            if k.endswith("qkv.bias"):
                weights[k] = weights[k].unflatten(0, (3, -1))[[0, 2]]
    return max((a[k] - b[k]).abs().max().item() for k in a if not k.endswith("k.bias"))


TASKS = ["--data", "toyworld:7", "--workers", 0, "--overfit", "--points", 64, "--tasks",
         "semantic,instance,panoptic", "--object-threshold", 0.1]


def runs_of_one_and_two(at, processes):
    """What test_two_processes_are_as_one compares: (script, its flags) of each run, with the same
    images a step for one process and for two; trained by steady_adam()."""
    half, at = {1: 2, 2: 1}[processes], Path(at)
    out = ["--workers", 0, "--out", at / f"{processes}"]
    yield pretrain, ["--data", "toyworld:36", "--steps", 5, "--batch-size", 4 * half, *out]
    # with e_i = 0 all matchings are equally good, so that no tie decides
    yield finetune_det, ["--data", "toyworld:12", "--steps", 3, "--accumulate", 2, "--query-lr", 0,
                         "--queries", 12, "--many-queries", 24, "--batch-size", half, *out]
    if processes == 2:      # with one image each: every step lacks a task, every process two
        yield finetune_seg, [*TASKS, "--batch-size", 1, "--steps", 28, "--resume", "--out", at]
    for script in FINETUNING:                   # 7 images, which 2 processes do not divide
        yield script, [*graded(script), "--eval", "--out", at / "graded"]


def graded(script):
    return ["--data", "toyworld:7", "--workers", 0, "--batch-size", 2, "--steps", 3,
            *FINETUNING[script]]


def work_together(at, processes=2):
    """All runs in one go, then one that fails; by two processes if torchrun started us."""
    torch.set_num_threads(1)
    with steady_adam():
        for script, flags in runs_of_one_and_two(at, processes):
            script.main(args_for(script, *flags[:-1], flags[-1] / script.__name__))
    if processes == 2:
        flags = ["--data", "toyworld:8", "--batch-size", 4, "--workers", 0, "--lr", 1e30]
        training.run(pretrain.main, args_for(pretrain, *flags, "--out", Path(at, "fails")))


def test_two_processes_are_as_one():
    """Two processes (gloo) and one with the same images a step agree after several steps: weights
    of pre-training and of detection, whose processes divide by the objects of all images; metrics
    of three tasks together. What --eval prints on two processes it prints on one. A failure is told
    when it happens, and last of all, below what torchrun writes about it."""
    with folder() as at:
        with quiet():
            for script in FINETUNING:
                out = at / "graded" / script.__name__
                script.main(args_for(script, *graded(script), "--out", out))
            tasks = [*TASKS, "--batch-size", 7, "--out", at / "finetune_seg"]
            finetune_seg.main(args_for(finetune_seg, *tasks, "--steps", 25))
        two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", __file__, "--together", at], text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        with contextlib.redirect_stdout(io.StringIO()) as one, \
                contextlib.redirect_stderr(io.StringIO()):
            work_together(at, 1)
        said = finish(two, 1).splitlines()
        for name in ("pretrain", "finetune_det"):
            pair = [at / n / name for n in ("1", "2")]
            assert weights_differ(*(p / "last.pt" for p in pair)) < STEADY, name
            a, b = (torch.tensor([json.loads(r).get("loss", 0) for r in (p / "log.jsonl").open()])
                    for p in pair)
            assert_close(a, b, 1e-4, f"losses of {name}")
        last = json.loads((at / "finetune_seg/log.jsonl").read_text().splitlines()[-1])
        with quiet():                                       # what two have trained, graded by one
            again = finetune_seg.main(args_for(finetune_seg, *tasks, "--steps", 28, "--resume"))
        assert again["step"] == last["step"] == 28
        for name in ("mIoU", "AP", "PQ"):
            assert last[name] > 1e-3 and abs(again[name] - last[name]) < 2e-6, (name, again, last)
        answers = [line for line in one.getvalue().splitlines() if "of 7 images, step 3" in line]
        assert len(answers) == len(FINETUNING)
        assert all(answer in said for answer in answers), (answers, said)
        assert said[-1].startswith("error: the loss is") and "--lr" in said[-1], said
        assert said.count(said[-1]) == 2, said
        assert not any('pretrain.py", line' in line for line in said), said


def test_the_first_checkpoint_is_kept_whatever_its_metric():
    """best.pt is written even if the first metric is NaN, and is replaced by the first number."""
    values = {"AP": 0.5, "mIoU": 0.5, "REL": 0.5}
    with folder() as at, quiet():
        for script in (*FINETUNING, pretrain):
            kept, best = [], None
            before = script.evaluate, checkpoints.keep
            checkpoints.keep = lambda *a, kept=kept: kept.append(a[7])
            try:
                for factor in (math.nan, 1, 2, 1):
                    found = {k: v * factor for k, v in values.items()}
                    found |= dict.fromkeys(getattr(script, "HEADLINE", ()), found["AP"])
                    script.evaluate = lambda *a, f=found, s=script: f["REL"] if s is pretrain else f
                    state = argparse.Namespace(rank=1)
                    best = script.conclude(None, None, argparse.Namespace(out=at), state, 1, best,
                                           None, training.Log(argparse.Namespace(out=at), state, 0))
            finally:
                script.evaluate, checkpoints.keep = before
            lower = script in (finetune_depth, pretrain)            # errors: less is better
            assert kept == [True, True, not lower, lower], (script.__name__, kept)


def test_evaluation_needs_the_same_meaning():
    """--eval takes any --batch-size, even one larger than the training set; it refuses flags with
    which the weights would mean something else."""
    with folder() as at, quiet():
        flags = ["--data", "toyworld:8", "--workers", 0, "--out", at]
        for script, more, wrong in (
                (finetune_det, ["--queries", 12], ["--queries", 9]),
                (finetune_depth, [], ["--max-depth", 5]),
                (finetune_pose, [], ["--decoder-layers", 6])):
            out = ["--out", at / script.__name__]
            script.main(args_for(script, *flags, *more, *out, "--steps", 1, "--batch-size", 2))
            found = script.main(args_for(script, *flags, *more, *out, "--eval", "--batch-size", 99))
            assert found["step"] == 1
            with raises(InputError, wrong[0], "best.pt"):
                script.main(args_for(script, *flags, *more, *out, *wrong, "--eval"))


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
    people, photos = data.open_pose("toyworld:3", (48, 32))
    yield data.collate(TINY, [people[0, i] for i in range(2)])
    yield data.collate_photos(TINY, [photos[0, i] for i in range(2)])


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
           torch.zeros(1).expand(5), torch.tensor([1 + 2j])]
    def same(a, b):
        assert len(tensors_in(a)) == len(tensors_in(b)) > 0
        for x, y in zip(tensors_in(a), tensors_in(b)):
            assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    real = torch.utils.data.get_worker_info, batching.shared
    def none(size):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    try:
        for room in (real[1], none):
            torch.utils.data.get_worker_info, batching.shared = lambda: True, room
            for batch in (odd, *some_batches()):
                packed = batching.Packed(batch)
                assert packed.buffer.is_shared() == (room is not none)
                if room is none:                            # shared memory is handed over by number
                    packed = pickle.loads(pickle.dumps(packed))
                same(packed.to("cpu"), batch)
            assert packed.to()[1][0]["id"] == 0 and odd[4]["c"] == batching.Packed(odd).to()[4]["c"]
    finally:
        torch.utils.data.get_worker_info, batching.shared = real
    (images, tokens), (_, other) = (batching.Packed(b).to() for b in itertools.islice(
        some_batches(), 2))
    assert tokens.plans.keys() == other.plans.keys() and tokens.config == TINY


def test_start_methods():
    """Data processes that are not forked, few open files, large batches: training and evaluation of
    many objects work (Linux allows 1024 files for 8 such processes, macOS 256)."""
    code = """if True:
        import multiprocessing, resource, sys
        import finetune_det as script, training
        for method in sys.argv[1].split(","):
            multiprocessing.set_start_method(method, force=True)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            flags = [*sys.argv[2:], "--out", f"{sys.argv[2]}/{method}"][1:]
            args = training.parse(script.flags(), script.PRESETS, flags)
            training.run(script.main, args)"""
    with folder() as at:
        flags = ["--preset", "tiny", "--device", "cpu", "--data", "toyworld:130", "--batch-size",
                 "128", "--steps", "1", "--size", "32", "--workers", "1"]
        found = subprocess.run([sys.executable, "-c", code, "forkserver,spawn", at, *flags],
                               cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                               capture_output=True)
        assert found.returncode == 0 and found.stdout.count("best box AP") == 2, found.stderr


def test_toyworld_is_drawn_the_same_by_many():
    """By several processes or one: the same rows, in order, also of unequal length."""
    many = data.draw_scenes(0, 16, ["boxes", "depth"], range(520), "test")
    for i in (0, 31, 32, 33, 300, 519):
        scene, row = toyworld.scene(0, i, 16), many[i]
        assert np.array_equal(row["image"].permute(1, 2, 0), scene["image"])
        assert all(np.array_equal(row[k], scene[k]) for k in ("boxes", "depth")), i
    assert len(many) == 520 and len({len(row["boxes"]) for row in many}) > 1
    assert len(many.columns) == 3                           # arrays, however many scenes


def test_devices():
    """What --device chooses on which machine; bf16 only where the hardware has it."""
    real = torch.cuda.is_available, torch.cuda.device_count, torch.cuda.is_bf16_supported
    try:
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
        assert str(training.pick_device("auto", 1)) == str(training.pick_device("cuda", 1)) \
            == "cuda:1"
        assert training.pick_device("cpu").type == "cpu"
        with raises(InputError, "nproc_per_node", "2 GPUs"):
            training.pick_device("auto", 2)
        for hardware in (True, False):                      # a T4 emulates it, slowly
            torch.cuda.is_bf16_supported = lambda including_emulation=True, h=hardware: \
                h or including_emulation
            dtype, words = training.precision(torch.device("cuda", 0))
            assert dtype == (torch.bfloat16 if hardware else None)
            assert hardware or ("fp32" in words and "bf16" in words)
        torch.cuda.is_available = lambda: False
        assert training.pick_device("auto").type == "cpu"
        with raises(InputError, "--device cuda"):
            training.pick_device("cuda")
        if not torch.backends.mps.is_available():
            with raises(InputError, "--device mps"):
                training.pick_device("mps")
    finally:
        torch.cuda.is_available, torch.cuda.device_count, torch.cuda.is_bf16_supported = real


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
    for python, torch_version, word in (((3, 9, 18), "2.8.0", "Python 3.10 or newer"),
                                        ((3, 10), "2.5.1+cu121", "torch 2.6 or newer"),
                                        ((3, 14), "2.10.0a0+git1234", None), ((4, 0), "3.0", None)):
        found = training.too_old(python, torch_version)
        assert (word is None and found is None) or word in found, (found, word)
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text
    assert "torch>=2.6" in (HERE / "requirements.txt").read_text(encoding="utf-8")
    assert training.OLDEST == {"Python": (3, 10), "torch": (2, 6)}


def test_texts_in_any_encoding():
    """Files are UTF-8, with a byte order mark or not, whatever the locale; what a terminal cannot
    show does not end a run."""
    import ast
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = isinstance(node, ast.Call) and path.name != "test_all.py"
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if call else ""
            binary = name == "open" and (not isinstance(node.func, ast.Name) or any(
                isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:]))
            if name in ("read_text", "write_text") or (name == "open" and not binary):
                assert "encoding" in [k.arg for k in node.keywords], f"{path.name}:{node.lineno}"
    with folder() as at:
        for text in ("Straße\n裂缝\n".encode(), "\ufeffStraße\n\n裂缝".encode()):
            (at / "classes.txt").write_bytes(text)
            assert formats.class_names(at) == ["Straße", "裂缝"]
        (at / "classes.txt").write_bytes("Straße\n".encode("cp1252"))
        with raises(InputError, "classes.txt", "UTF-8"):
            formats.class_names(at)
    shown, real = io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), sys.stdout
    try:
        sys.stdout = shown
        training.run(lambda args: print("class 裂缝"), None)
    finally:
        sys.stdout = real
    shown.flush()
    assert shown.buffer.getvalue().strip() == b"class \\u88c2\\u7f1d"


def test_what_ends_a_run_is_told():
    """Faults that are the machine's end in one line with the way out; ours keep their traceback."""
    def fail(error):
        def main(args):
            raise error
        return main
    for error, code, words in (
            (KeyboardInterrupt(), 130, "stopped"),
            (training.Stopped(15, "stopped by SIGTERM; --resume"), 143, "--resume"),
            (OSError(24, "Too many open files"), 2, "ulimit -n"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "--batch-size"),
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2,
             "--workers 0"),
            (NotImplementedError("'aten::x' is not implemented for the MPS device"), 2, "cpu")):
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown):
            try:
                training.run(fail(error), None)
            except SystemExit as end:
                assert end.code == code, (error, end.code)
        assert words in shown.getvalue() and shown.getvalue().count("\n") == 1, shown.getvalue()
    for error in (RuntimeError("shapes differ"), NotImplementedError("ours")):
        try:
            training.run(fail(error), None)
            raise AssertionError("swallowed")
        except type(error) as same:
            assert same is error


def test_many_masks_take_little_memory():
    """A photo's overlapping masks are kept as a few maps, and graded as they are: 200 objects of
    640 px would be 82 MB as masks, and are drawn one at a time."""
    def crowded(content):
        content["images"][0] |= dict(width=640, height=640)
        square = lambda x, y: [x, y, x + 40, y, x + 40, y + 40, x, y + 40]
        content["annotations"] = [dict(
            content["annotations"][0], id=i, bbox=[i % 20 * 30, i // 20 * 60, 40, 40], area=1600,
            iscrowd=0, segmentation=[square(i % 20 * 30, i // 20 * 60)]) for i in range(200)]
    with folder() as at:
        little_coco(at, crowded)
        for part in ("train2017", "val2017"):
            write_photo(at / part / "0.png", (640, 640))
        source = formats.open_folder(at, ["masks"])[0]
        tracemalloc.start()
        labels = source.labels(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        masks, layers = masks_in(labels), labels["layers"]
        assert layers.shape == (2, 640, 640) and layers.dtype == torch.uint8 and peak < 8e6, peak
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


# -----------------------------------------------------------------------------
# The command line


def test_wrong_input_is_one_line():
    """Each wrong input ends with exit code 2 and one line naming the file or the flag."""
    with folder() as at:
        for i in range(8):
            write_photo(at / f"photos/{i}.jpg", (80, 80))
        (at / "photos/0_broken.jpg").write_bytes((at / "photos/1.jpg").read_bytes()[:700])
        (at / "used").mkdir()
        torch.save({}, at / "used/last.pt")
        out = ["--out", at / "new"]
        cases = [
            (pretrain, ["--data", at / "nowhere", *out], "nowhere"),
            (pretrain, ["--data", at / "photos", "--batch-size", 2, "--workers", 1, *out],
             "0_broken.jpg"),
            (pretrain, ["--data", at / "photos", "--batch-size", 64, *out], "--batch-size"),
            (pretrain, ["--data", "toyworld:8", "--batch-size", 4, "--lr", 1e30, *out], "--lr"),
            (pretrain, ["--data", "toyworld:8", "--out", at / "used"], "--resume"),
            (pretrain, ["--data", "toyworld:8", "--out", at / "photos/1.jpg"], "--out"),
            (pretrain, ["--data", "toyworld:8", "--decoder-layers", 4, *out], "--decoder-layers"),
            (finetune_seg, ["--data", "toyworld:8", "--init", at / "photos/1.jpg", *out], "--init"),
            (finetune_seg, ["--data", "toyworld:8", "--init", at / "no.pt", *out], "no.pt"),
            (finetune_seg, ["--data", at / "photos", *out], "--data"),
            (finetune_seg, ["--init-backbone", f"torchvision:{at}/photos/1.jpg", *out],
             "--init-backbone"),
            (finetune_seg, ["--eval", *out], "best.pt"),
            (finetune_seg, ["--resume", *out], "last.pt"),
            (finetune_seg, ["--load", "neck", *out], "--init"),
            (finetune_seg, ["--data-fraction", 0, *out], "--data-fraction"),
            (finetune_seg, ["--queries", 0, *out], "--queries"),
            (finetune_seg, ["--queries", "5,6", "--data", "toyworld:8", *out], "--queries 5,6"),
            (finetune_seg, ["--tasks", "semantic,depth", *out], "--tasks"),
            (finetune_seg, ["--tasks", "instance,instance", *out], "--tasks"),
            (finetune_seg, ["--tasks", "", *out], "--tasks"),
            (pretrain, ["--data", "toyworld:x", *out], "toyworld:x"),
            *[(pretrain, [flag, value, *out], flag) for flag, value in
              (("--steps", 0), ("--epochs", -1), ("--batch-size", 0), ("--accumulate", "two"),
               ("--workers", -1), ("--lr", "nan"), ("--lr", 0), ("--seed", 10 ** 23),
               ("--window", 0), ("--mask-ratio", 1), ("--mask-ratio", 0), ("--save-every", 0),
               ("--warmup-epochs", "inf"), ("--decoder-layers", 0), ("--weight-decay", -1))],
        ]
        for script, flags, word in cases:
            shown = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(shown):
                try:
                    training.run(script.main, args_for(script, *flags))
                    raise AssertionError(f"{flags} was accepted")
                except SystemExit as end:
                    assert end.code == 2, flags
            lines = [x for x in shown.getvalue().splitlines() if x.startswith("error: ")]
            assert len(lines) == 1 and word in lines[0] and "Traceback" not in shown.getvalue(), \
                f"{word}: {shown.getvalue()}"
        assert not (at / "new/last.pt").exists()


def test_flags():
    """Presets change defaults, explicit flags win, the paper's recipe is the default."""
    args = training.parse(pretrain.flags(), pretrain.PRESETS, ["--data", "x"])
    assert (args.preset, args.epochs, args.warmup_epochs) == ("base", 600, 40)
    assert args.mask_ratio == 0.75 and args.batch_size == 64
    assert args.norm_pix is False and args.weight_decay == 0.05 and args.mask == "random"
    assert args_for(pretrain, "--epochs", 3).epochs == 3 and args_for(pretrain).data == "toyworld"
    seg = training.parse(finetune_seg.flags(), finetune_seg.PRESETS, ["--data", "x"])
    assert (seg.steps, seg.size, seg.points, seg.lr, seg.clip) == (160_000, 640, 12544, 1e-4, 0.01)


def test_only_six_packages():
    """Nothing outside the standard library and the six packages is imported."""
    import ast
    allowed = {"torch", "torchvision", "numpy", "PIL", "scipy", "tqdm", *sys.stdlib_module_names,
               *(p.stem for p in HERE.glob("*.py"))}
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in allowed for n in names), f"{path.name}: {names}"


def test_one_training_step_is_short():
    """All functions of ours that run between the start of pretrain.py's loop and its end, models
    and checkpoints written included, and main and the modules' constructors, together have at most
    900 lines (docstrings and comments count)."""
    seen, looping = set(), []
    def watch(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent == HERE:
            built = Path(frame.f_code.co_filename).name in ("model.py", "pretrain.py")
            if frame.f_code is training.Progress.__init__.__code__:
                looping.append(True)
            if looping or built:
                seen.add(frame.f_code)
    with folder() as at, quiet():
        args = args_for(pretrain, "--data", "toyworld:8", "--batch-size", 4, "--workers", 0,
                        "--steps", 1, "--out", at)
        sys.setprofile(watch)
        try:
            pretrain.main(args)
        finally:
            sys.setprofile(None)
    spans = {(c.co_filename, n) for c in seen
             if Path(c.co_filename).name not in ("toyworld.py", "test_all.py")
             for n in range(c.co_firstlineno, max(x[2] or 0 for x in c.co_lines()) + 1)}
    assert 300 < len(spans) <= 900, f"{len(spans)} lines"


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
    return failures > 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--together"]:         # we are a child of test_two_processes_are_as_one
        work_together(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:2]))
