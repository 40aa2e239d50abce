"""
How fast are our parts? Each is timed in turn with its reference in the same run, so that a drift of
the machine's speed affects both. A ratio is the median over the rounds.

    python bench.py                          encoder, step, plan, loading, and card if there is one
    python bench.py encoder step             against torchvision's dense Swin of the same sizes
    python bench.py plan                     planning, rows of attention, graphs, what is copied
    python bench.py loading                  photos that one core loads for pre-training
    python bench.py card                     pre-training and fine-tuning on a CUDA card, eager
                                             and compiled, as a share of the card's peak
    python bench.py losses                   detection's matching and losses against its network
    python bench.py data --data FOLDER       files to training samples, against torchvision on PIL
    python bench.py encoder step --json      the ratios as one line of JSON

encoder, step: forward + backward in training mode, Swin-B, window 6, 192 px, batch 8, 75 % hidden,
fp32 on CPU, bf16 autocast on GPUs that have it. The floor by arithmetic (multiply-adds over the
dense encoder's) is 0.27 for the encoder that sees a quarter and 0.37 for the whole pre-training
step; seconds can fall below it, because the dense encoder also spends time on what is not a
multiply-add.

data: images per second of one core's time, at the paper's sizes: decode, read the labels, augment.
FOLDER holds imagenet/, photos/ (loose ones), coco/, ADEChallengeData2016/ and nyu/ in the official
formats, or some of them; without it, 640 px ToyWorld photos are written to a temporary folder.
"""
import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import data
import pose
import throughput
from data import hidden_units, seeded
from finetune_det import group_losses
from formats import export
from formats.masks import mask
from launch import launch
from losses import reconstruction_loss
from model import PRESETS, Config, Detector, Pretrainer
from tokens import whole
from training import POSITIVE, Run, pick_device, precision

# what a part times besides "dense"
NEEDS = {"encoder": ["visible", "all_visible"], "step": ["step"], "losses": [], "data": [],
         "plan": [], "loading": [], "card": []}


def contestants(config, device):
    """Name -> function (batch size) that does one forward + backward.

    dense        torchvision's Swin, every token
    visible      our encoder on 25 % of the units, masks drawn and indices built anew each time
    all_visible  our encoder, nothing hidden
    step         all of pre-training but the optimiser: encoder, BiFPN, decoder, head, loss
    """
    torch.manual_seed(0)
    dense = throughput.dense_swin(config).to(device)
    ours, dtype = Pretrainer(config).to(device), precision(device)[0]
    backbone, side = ours.glid.backbone, config.image_size // config.unit

    def inputs(batch):
        images = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        return images, torch.stack([hidden_units("random", side, 0.75) for _ in range(batch)])

    def encoder(images, hidden):
        layout = whole(config, images, hidden).to(device)
        maps = backbone(ours.glid.visible_units(images, layout), layout)
        return sum(m.float().square().mean() for m in maps)

    losses = {
        "dense": lambda images, hidden: dense(images).float().square().mean(),
        "visible": encoder,
        "all_visible": lambda images, hidden: encoder(images, None),
        "step": lambda images, hidden: reconstruction_loss(
            *ours(images, whole(config, images, hidden).to(device))),
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


def losses_share(config, device, images=16, objects=20, kinds=80, size=640):
    """Seconds of detection's matching + losses, with their gradients, for a batch with both groups
    of queries, all layers; of the network's forward + backward for it, one image at a time (the
    whole batch would not fit most memories); and their ratio."""
    net, dtype = Detector(config, kinds).to(device), precision(device)[0]
    photo = torch.randn(1, 3, size, size, device=device)
    shape = config.decoder_layers, images, sum(net.groups)
    logits = torch.randn(*shape, kinds, device=device, requires_grad=True)
    boxes = torch.rand(*shape, 4, device=device).requires_grad_()
    targets = [{"labels": torch.randint(kinds, (objects,), device=device),
                "boxes": torch.rand(objects, 4, device=device) / 2 + 0.1} for _ in range(images)]

    def network(_):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            answers = net(photo, whole(config, photo).to(device), train=True)
        sum(x.float().square().mean() for x in answers).backward()

    def matching_and_losses(_):
        flags = argparse.Namespace(queries=net.groups[0], many_queries=net.groups[1], repeats=6)
        group_losses(logits, boxes, targets, images * objects, flags).backward()

    lost, step = (throughput.timed(work, device, 3)[1] for work in (matching_and_losses, network))
    step *= images
    return {"losses_seconds": round(lost, 3), "network_seconds": round(step, 3),
            "losses_over_network": round(lost / step, 4)}


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
    # Linux: forget the peak so far
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    run(batch)
    return resident("VmHWM") - before


def resident(field):
    """Bytes of a memory field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def against_dense(args, config, device):
    """Time the parts in turn with torchvision's Swin and print; {"<name>_over_dense": ratio}."""
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
        for n in names:
            low, high = min(seconds[n]), max(seconds[n])
            print(f"{n:12} {statistics.median(seconds[n]):7.3f} s ({low:.3f} to {high:.3f})  "
                  f"{result.get(n + '_over_dense', 1):.3f} of dense")
    return result


def memory_against_dense(args, config):
    """Peak memory of a quarter-visible encoder and of the dense one, each in its own process."""
    memory = {}
    for name in ("dense", "visible"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            memory[name] = fresh.submit(peak_memory, name, config, args.batch_size).result()
    ratio = round(memory["visible"] / memory["dense"], 3)
    if not args.json:
        print("peak memory beyond weights and gradients: "
              + ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in memory.items())
              + f", ratio {ratio}")
    return {"memory_visible_over_dense": ratio}


def read_pil(source, index, labels=True):
    """A sample as torchvision's references read it: PIL photo, PNG labels by pil_to_tensor. What
    torchvision has no reader for, COCO's JSON, comes from our source."""
    record = source.records[index]
    sample = {"image": Image.open(record["photo"]).convert("RGB")}
    if "label" in record:
        values = v2.functional.pil_to_tensor(Image.open(record["label"]))
        depth = values.dtype != torch.uint8
        sample["label"] = tv_tensors.Mask(values.float() / 1000 if depth else values)
    elif "map" in record:
        r, g, b = v2.functional.pil_to_tensor(Image.open(record["map"])).int()
        sample["panoptic"] = tv_tensors.Mask(r + 256 * g + 65536 * b)
    elif labels:
        size = record["size"]
        sample["boxes"] = tv_tensors.BoundingBoxes(record["labels"]["boxes"], format="XYXY",
                                                   canvas_size=size)
        if "shapes" in record:                              # torchvision's way: a mask an object
            masks = np.zeros((len(record["shapes"]), *size), np.uint8)
            for out, shape in zip(masks, record["shapes"]):
                out[:] = mask(shape, *size)
            sample["masks"] = tv_tensors.Mask(masks)
    return sample


def torchvision_pose(dataset, index):
    """A person's crop uint8 [3, H, W] by torchvision's functions, with our random numbers."""
    i, k = dataset.people[index]
    box, keypoints = (dataset.truths[i][name][k] for name in ("boxes", "keypoints"))
    centre, size, degrees, mirrored = pose.random_view(box, keypoints, *dataset.size)
    photo = read_pil(dataset.source, i, labels=False)["image"]
    width, height = (max(1, round(s)) for s in size.tolist())
    if degrees:                                         # turn no more than can be seen
        side = int(np.hypot(width, height)) + 1
        left, top = (centre - side / 2).round().astype(int).tolist()
        photo = v2.functional.crop(photo, top, left, side, side)
        photo = v2.functional.rotate(photo, -degrees, InterpolationMode.BILINEAR)
        centre = np.array([side / 2] * 2)
    left, top = (centre - size / 2).round().astype(int).tolist()
    crop = v2.functional.resized_crop(photo, top, left, height, width, list(dataset.size))
    return v2.functional.pil_to_tensor(v2.functional.hflip(crop) if mirrored else crop)


def loaders(root):
    """(name, our training set, index -> torchvision's sample of it) for what lies in root."""
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter
    colours = [v2.RandomApply([j]) for j in (jitter(brightness=(0.875, 1.125)),
               jitter(contrast=0.5), jitter(saturation=0.5), jitter(hue=0.1))]
    to_tensor = v2.PILToTensor()
    segment = v2.Compose([v2.RandomShortestSize([64 * s for s in range(5, 21)], 2560),
                          v2.RandomCrop(640, pad_if_needed=True), *colours, flip, to_tensor])
    detect = v2.Compose([flip, v2.RandomApply([v2.RandomShortestSize([400, 500, 600]),
                                               v2.RandomCrop([400, 492], pad_if_needed=True)]),
                         v2.RandomShortestSize(list(range(480, 801, 32)), 1333), to_tensor])
    depth = v2.Compose([v2.Lambda(partial(v2.functional.crop, top=45, left=43, height=427,
                                          width=565)),
                        v2.RandomApply([v2.RandomRotation(2.5, InterpolationMode.BILINEAR)]), flip,
                        v2.RandomCrop([416, 544]), v2.RandomApply([jitter(0.25)]), to_tensor])
    crop = v2.Compose([v2.RandomResizedCrop(192, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
                       flip, to_tensor])

    def theirs(transform, dataset, index):
        return transform(read_pil(dataset.source, index))

    def photo(dataset, index):
        return crop(Image.open(dataset.source.file(index)).convert("RGB"))
    root, config = Path(root), Config()
    if not root.is_dir():
        raise data.InputError(f"--data {root}: no such folder")
    coco, ade, nyu = root / "coco", root / "ADEChallengeData2016", root / "nyu"
    pretraining = partial(data.open_pretraining, config=config)
    segmentation = partial(data.open_segmentation, size=640)
    for name, folder, opened, reference in (
            ("pre-training", root / "imagenet", pretraining, photo),
            ("pre-training, loose photos", root / "photos", pretraining, photo),
            ("detection", coco, partial(data.open_detection, size=800), partial(theirs, detect)),
            ("instance", coco, partial(segmentation, tasks=["instance"]), partial(theirs, segment)),
            ("panoptic", coco, partial(segmentation, tasks=["panoptic"]), partial(theirs, segment)),
            ("semantic", ade, segmentation, partial(theirs, segment)),
            ("depth", nyu, partial(data.open_depth, height=416, width=544), partial(theirs, depth)),
            ("pose", coco, partial(pose.open_pose, size=(256, 192)), torchvision_pose)):
        if not folder.is_dir():
            print(f"{name}: no {folder}", file=sys.stderr)
            continue
        dataset = opened(folder)[0]
        yield name, dataset, partial(reference, dataset)


def loading_against_torchvision(args, count=32):
    """Images/s of one core for each loader, ours and torchvision's in turn; {"<name>": ratio}."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            for name, kind in (("imagenet", "imagenet"), ("coco", "coco"), ("nyu", "nyu"),
                               ("ADEChallengeData2016", "ade20k")):
                for split in ("train", "val"):
                    export.export(Path(folder, name), kind, count, 640, 0, split)
        torch.set_num_threads(1)
        result = {}
        for name, ours, theirs in loaders(args.data or folder):
            seconds, photos = ([], []), range(0, len(ours), -(-len(ours) // count))
            for r in tqdm(range(args.rounds + 1), desc=name, leave=False, disable=None):
                for work, spent in zip((lambda i, r=r, ours=ours: ours[r, i], theirs), seconds):
                    begun = time.process_time()         # CPU time of this process
                    with seeded(r):
                        for i in photos:
                            work(i)
                    spent.append((time.process_time() - begun) / len(photos))
            a, b = (s[1:] for s in seconds)             # the first round warms up
            result[f"{name}_over_torchvision"] = ratio = round(
                statistics.median(y / x for x, y in zip(a, b)), 2)
            if not args.json:
                print(f"{name:12} {1 / statistics.median(a):6.1f} images/s a core, torchvision "
                      f"{1 / statistics.median(b):6.1f}, ratio {ratio:.2f}")
    return result


def told(found, args):
    """Print figures by name, and return them."""
    if not args.json:
        print("\n".join(f"{name} {value}" for name, value in found.items()))
    return found


def main(args):
    """Time, measure memory, print; returns the ratios by name."""
    device, config, result = pick_device(), Config(**PRESETS[args.preset]), {}
    if not args.json:
        where = torch.cuda.get_device_name() if device.type == "cuda" else \
            f"CPU, {torch.get_num_threads()} threads"
        print(f"{where}, torch {torch.__version__}, preset {args.preset}, batch {args.batch_size}")
    if set(args.parts) & {"encoder", "step"}:
        result |= against_dense(args, config, device)
    if "encoder" in args.parts:
        result |= memory_against_dense(args, config)
    if "losses" in args.parts:
        result |= told(losses_share(config, device), args)
    if "data" in args.parts:
        result |= loading_against_torchvision(args)
    if set(args.parts) & {"plan", "loading"}:
        torch.set_num_threads(1)                            # as in a data process
    if "plan" in args.parts:
        result |= told(throughput.planning(config, 256), args)
        result |= told(throughput.graphs(Config(**PRESETS["tiny"])), args)
    if "loading" in args.parts:
        result |= told(throughput.loading(config), args)
    if "card" in args.parts:
        if device.type != "cuda":
            raise data.InputError("card: torch sees no CUDA card here")
        state = Run(device, dtype=precision(device)[0])
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            result |= throughput.card(config, state, args.card_batch)
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(NEEDS)}; by default those that "
                        "end within three minutes on two cores, and card where there is one")
    parser.add_argument("--data", help="folder of data sets for the part data")
    parser.add_argument("--json", action="store_true", help="print only one line of JSON")
    parser.add_argument("--preset", choices=PRESETS, default="base", help="sizes of the model")
    parser.add_argument("--batch-size", type=POSITIVE, default=8, help="default: 8")
    parser.add_argument("--card-batch", type=POSITIVE, default=256, help="for card, default: 256")
    parser.add_argument("--rounds", type=POSITIVE, default=3, help="timed rounds, default: 3")
    args = parser.parse_args()
    args.parts = args.parts or ["encoder", "step", "plan", "loading"] + \
        ["card"] * torch.cuda.is_available()
    if set(args.parts) - set(NEEDS):
        parser.error(f"parts are {', '.join(NEEDS)}")
    launch(main, args)
