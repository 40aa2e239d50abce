"""
From files (or ToyWorld) to batches: reading photos, joint augmentation, padding.

A data set is opened by open_pretraining(), open_segmentation(), ... from a folder (formats/) or
the word "toyworld". Its samples are addressed by (epoch, index); every random choice of a sample
(crop, flip, colours, which units are hidden) is drawn from a generator seeded with (seed, epoch,
index), in pre-training also with the split (training or validation). So the choice is the same for
any number of workers or processes, and after a resume.

Photos stay uint8 until they are on the device: a quarter of the bytes to copy and to crop.
"""
import contextlib
import math
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import InterpolationMode, v2

from formats.drawn import ToyWorld, toy_scenes
from formats.files import (
    IGNORE,
    LONGEST,
    InputError,
    hold_out,
    list_images,
    read_image,
    read_view,
    shows,
)
from formats.folders import open_folder, open_lists, photo_folders, readable
from formats.masks import unstack
from tokens import Layout, row_budget, whole


def derive_seed(*numbers):
    """One 63-bit seed from several integers; a change of any of them gives an unrelated seed."""
    return random.Random(",".join(map(str, numbers))).getrandbits(63)


@contextlib.contextmanager
def seeded(*numbers):
    """torch's CPU generator, which torchvision's transforms use, seeded inside the block only."""
    with torch.random.fork_rng(devices=[]):                 # the GPUs' stay as they are
        torch.default_generator.manual_seed(derive_seed(*numbers))
        yield


# -----------------------------------------------------------------------------
# Photos


class Photos:
    """Photos of a folder as samples {"image": uint8 [3, H, W]}. Their paths are one array,
    because each data process would copy a list while it reads it (of ImageNet's paths 400 MB)."""

    def __init__(self, files):
        self.paths = np.array([os.fsencode(file) for file in files])            # bytes [N]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return {"image": tv_tensors.Image(read_image(self.file(index)))}

    def file(self, index):
        """Path of a photo."""
        return Path(os.fsdecode(self.paths[index]))

    def view(self, index, choose, size):
        """See files.read_view."""
        return read_view(self.file(index), choose, size)

    def subset(self, indexes):
        """Photos of these indexes alone."""
        return Photos([self.paths[i] for i in indexes])


# -----------------------------------------------------------------------------
# Where samples come from


def open_sources(path, size, keys, fraction=1.0, overfit=False, on_error="stop", **reading):
    """[training, validation] source of annotated samples for fine-tuning.

    path: see toy_scenes, or a folder in one of the formats of formats/folders.py; size: px of a
    side of ToyWorld's photos; keys: the annotations to keep; fraction: share of the training
    samples to use: the first ones of ToyWorld, or a fixed random subset of a folder (a larger
    subset contains a smaller one); overfit: validate on the training samples; on_error "skip":
    leave out broken photos (all validation photos are read once to find them); reading: more
    arguments of open_folder. Raises InputError if the data set cannot be read.
    """
    if scenes := toy_scenes(path, 256):
        count, val, world = scenes
        train = ToyWorld("train", max(1, round(fraction * count)), size, world, keys)
        return [train, train if overfit else ToyWorld("val", val, size, world, keys)]
    train, val = open_folder(path, keys, on_error, **reading)
    alone = train is val            # with --eval a validation part alone will do (open_folder)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train = train.subset(sorted(order[:max(1, round(fraction * len(train)))].tolist()))
    if not any(map(shows, train.records)):
        raise InputError(f"--data-fraction {fraction}: no object in the {len(train)} training "
                         "photos that it leaves; take more")
    val = train if overfit and not alone else val
    val = readable(val) if on_error == "skip" else val
    # with --overfit, and with a validation part alone, both are the same photos
    return [val if overfit or alone else train, val]


# -----------------------------------------------------------------------------
# Pre-training


def hidden_units(strategy, side, ratio):
    """Which units of a side x side image the encoder must not see: bool [side, side].

    The count depends on (side, ratio) alone, so that all images of a batch hide equally many.
    random: side**2 - int(side**2 * (1 - ratio)) units, uniformly (MAE's rounding).
    block:  rectangles as BEiT's until that many are hidden; of the last one only a random part.
    grid:   one corner of every 2x2 cell stays; the ratio is 0.75 by construction.
    """
    units = side * side
    count = units - int(units * (1 - ratio))
    hidden = torch.zeros(side, side, dtype=torch.bool)
    if strategy == "grid":
        hidden[:] = True
        hidden[::2, ::2] = False
    elif strategy == "random":
        hidden.view(-1)[torch.randperm(units)[:count]] = True
    else:
        while (left := count - int(hidden.sum())) > 0:
            area = side * (1 + torch.rand(()) * (side / 2 - 1))         # a row to half the image
            aspect = torch.exp((torch.rand(()) * 2 - 1) * 1.2)          # 0.3 .. 3.3, as BEiT
            h = int((area * aspect).sqrt().round().clamp(1, side))
            w = int((area / aspect).sqrt().round().clamp(1, side))
            y, x = (int(torch.randint(side - n + 1, ())) for n in (h, w))
            new = torch.zeros_like(hidden)
            new[y:y + h, x:x + w] = True
            new = (new & ~hidden).view(-1).nonzero()[:, 0]
            hidden.view(-1)[new[torch.randperm(len(new))[:left]]] = True
    return hidden


class Pretraining:
    """Crops and masks: (epoch, index) -> (uint8 [3, S, S], hidden bool [S / unit, S / unit]).

    source: Photos or ToyWorld; size S and unit: px; mask, ratio: see hidden_units.
    """

    def __init__(self, source, train, size, unit, mask, ratio, seed):
        self.source, self.size, self.seed, self.train = source, size, seed, train
        self.mask = (mask, size // unit, ratio)
        # [paper] follows MAE, whose crops cover 20 to 100 % of the photo
        self.random_crop = v2.RandomResizedCrop(size, scale=(0.2, 1))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, at):
        epoch, index = at
        with seeded(self.seed, int(self.train), epoch, index):
            image, view = self.source.view(index, self.choose, self.size)
            image = v2.functional.resized_crop(image, *view, [self.size] * 2,
                                               InterpolationMode.BICUBIC, antialias=True)
            if self.train and torch.rand(()) < 0.5:
                image = v2.functional.horizontal_flip(image)
            return image, hidden_units(*self.mask)

    def row_budget(self, config, batch_size, trials=32):
        """Rows of attention to reserve for a batch of this size, see tokens.row_budget; estimated
        from `trials` batches of masks, which are the same in every process. (For --preset
        small's batches of 512, 8 trials are too few once in 10 batches, 32 once in 50.)"""
        with seeded(0):
            masks = [torch.stack([hidden_units(*self.mask) for _ in range(batch_size)])
                     for _ in range(trials)]
        return row_budget(config, masks)

    def choose(self, height, width):
        """top, left, height, width of what becomes a sample: in training a random part of 20 to
        100 % of the photo, in validation the square in the middle."""
        if self.train:
            return self.random_crop.make_params([torch.empty(3, height, width,
                                                             device="meta")]).values()
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def open_pretraining(path, config, mask="random", ratio=0.75, seed=0, on_error="stop", ours=None):
    """(training set, validation set) of Pretraining samples.

    path: see toy_scenes, or a folder with train/ and val/ inside (ImageNet's format), or any
    folder of photos, of which every 20th in path order is then kept for validation. Where labels
    lie beside a folder images/, or depth maps beside rgb/, only images/ or rgb/ is read, and where
    BTS's lists lie, the photos that they name.
    on_error "skip": all validation photos are read once, and unreadable ones are left out.
    config: model.Config; ours: see list_images. InputError if size, mask or folder do not fit.
    """
    side = config.image_size // config.unit
    if config.image_size % config.unit:
        raise InputError(f"--size {config.image_size}: take a multiple of {config.unit}, the px of "
                         "a unit")
    if not 0 < ratio < 1 or not 0 < int(side * side * (1 - ratio)):
        raise InputError(f"--mask-ratio {ratio}: at least one of the {side * side} "
                         "units must stay visible, and one be hidden")
    if mask == "grid" and (ratio != 0.75 or side % 2):
        raise InputError("--mask grid keeps one unit of four: it needs --mask-ratio 0.75 and an "
                         "even number of units")
    if scenes := toy_scenes(path, 8192):
        train, val, world = scenes
        sources = [ToyWorld(split, n, config.image_size, world)
                   for split, n in (("train", train), ("val", val))]
    elif listed := open_lists(Path(path), on_error, 1000.0, False):     # the photos, not the depth
        sources = [Photos(r["photo"] for r in s.records) for s in listed]
    else:
        train, val = photo_folders(Path(path), ours)
        files = list_images(train, ours=ours)
        sources = [Photos(files), Photos(list_images(val, ours=ours))] if val else hold_out(
            path, Photos(files))
    if on_error == "skip" and not scenes:
        sources[1] = readable(sources[1])
    return [Pretraining(s, train, config.image_size, config.unit, mask, ratio, seed)
            for s, train in zip(sources, (True, False))]


# -----------------------------------------------------------------------------
# Segmentation


class CropToFit:
    """Random crop of at most height x width px; a smaller image stays as it is (the batch pads it,
    and the network does not see padding, unlike the grey border that RandomCrop would add). It
    takes and returns a sample, a dict with tv_tensors, as all transforms here."""

    def __init__(self, height, width):
        self.height, self.width = height, width

    def __call__(self, sample):
        height, width = sample["image"].shape[-2:]
        h, w = min(height, self.height), min(width, self.width)
        top, left = (int(torch.randint(n + 1, ())) for n in (height - h, width - w))
        box = (top, left, h, w)
        return {k: v2.functional.crop(v, *box) if isinstance(v, tv_tensors.TVTensor) else v
                for k, v in sample.items()}


class ColourJitter:
    """SSD's, as in Mask2Former: brightness +-32, contrast x 0.5..1.5 before or after saturation
    x 0.5..1.5 and hue +-36 degrees, each half of the time. (torchvision's RandomPhotometricDistort
    follows SSD further: it also swaps the channels of every other photo.)"""

    def __call__(self, sample):
        apply, contrast_first = torch.rand(4) < 0.5, torch.rand(()) < 0.5
        low, high = torch.tensor([[-32, 0.5, 0.5, -25.6], [32, 1.5, 1.5, 25.6]])
        drawn = low + (high - low) * torch.rand(4)
        drawn = torch.where(apply, drawn, torch.tensor([0, 1, 1, 0]))
        brightness, contrast, saturation, hue = drawn.tolist()
        values, before = np.arange(256.0), contrast if contrast_first else 1
        image = recolour(v2.functional.to_pil_image(sample["image"]),
                         (values + brightness).clip(0, 255) * before)
        if apply[2:].any():
            h, s, v = image.convert("HSV").split()              # all in 0..255, hue too
            h, s = recolour(h, (values + hue).round() % 256), recolour(s, values * saturation)
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        if apply[1] and not contrast_first:
            image = recolour(image, values * contrast)
        return sample | {"image": v2.functional.to_image(image)}


def recolour(image, values):
    """PIL image with value i of a channel replaced by values[i], or values[channel, i]."""
    table = np.broadcast_to(values, (len(image.getbands()), 256)).round().clip(0, 255)
    return image.point(table.astype(int).ravel().tolist())


class ScaleToShortest:
    """v2.RandomShortestSize for photos with masks. torchvision samples masks at pixel corners, so
    that they move half a pixel against the photo; we sample at pixel centres. sizes: px of the
    shorter side, one of which is drawn; longest: limit of the longer side, px."""

    def __init__(self, sizes, longest):
        self.random_size = v2.RandomShortestSize(sizes, max_size=longest)

    def __call__(self, sample):
        size, resize = self.random_size.make_params([sample["image"]])["size"], v2.functional.resize
        sample = dict(sample)
        for key, value in sample.items():
            if isinstance(value, tv_tensors.Mask):
                stack = value.as_subclass(torch.Tensor)[..., None, :, :]    # [..., 1, H, W]
                stack = resize(stack, size, InterpolationMode.NEAREST_EXACT)
                sample[key] = tv_tensors.Mask(stack[..., 0, :, :])
            elif isinstance(value, tv_tensors.TVTensor):
                sample[key] = resize(value, size, antialias=True)
        return sample


def segmentation_transform(train, size, flip=True):
    """Mask2Former's recipe for ADE20K: scale 0.5..2, crop, SSD's colour jitter, flip; at test the
    shortest edge becomes `size`, the longest at most 4 times that."""
    if not train:
        return ScaleToShortest([size], 4 * size)
    scales = [int(size * s / 10) for s in range(5, 21)]
    return v2.Compose([ScaleToShortest(scales, 4 * size), CropToFit(size, size), ColourJitter(),
                       v2.RandomHorizontalFlip(0.5 * flip)])


def find_objects(task, sample, things):
    """The true masks of a task: labels int64 [N], masks bool [N, H, W], iscrowd bool [N].

    The first `things` classes are things, the others stuff. Each task reads from the sample:
    semantic: "semantic" uint8 [H, W] of classes; a mask for each class present, none for IGNORE.
    panoptic: "panoptic" int [H, W] of segment ids, 0 = void, and "segments" int64 [S, 3] of id,
              class, iscrowd; a mask for each segment that (still) has a pixel.
    instance: see find_instances.
    """
    if task == "instance":
        labels, layers, crowd = find_instances(sample, things)
        masks = unstack(layers.numpy(), range(1, len(labels) + 1))
        return labels, torch.from_numpy(masks), crowd
    sample = {k: v.as_subclass(torch.Tensor) if torch.is_tensor(v) else v
              for k, v in sample.items()}
    if task == "semantic":
        labels = torch.bincount(sample["semantic"].flatten())[:IGNORE].nonzero()[:, 0]
        masks = masks_of(sample["semantic"], labels)
        return labels, masks, torch.zeros(len(labels), dtype=torch.bool)
    ids, labels, crowd = drawn_segments(sample["panoptic"], sample["segments"]).unbind(1)
    return labels, masks_of(sample["panoptic"], ids), crowd.bool()


def find_instances(sample, things):
    """The things of a photo: labels int64 [N], layers [L, H, W] of the numbers 1..N (see
    formats/masks.py), iscrowd bool [N].

    They come from "layers", in which things may overlap, "classes" int64 [N] and "iscrowd" [N];
    without layers, from the panoptic map: its things that still have a pixel. Maps are used here
    because one map is faster to augment than N masks.
    """
    sample = {k: v.as_subclass(torch.Tensor) if torch.is_tensor(v) else v
              for k, v in sample.items()}
    if "layers" in sample:
        return sample["classes"], sample["layers"], sample["iscrowd"].bool()
    layers, segments = sample["panoptic"][None], sample["segments"]
    ids, labels, crowd = drawn_segments(layers, segments[segments[:, 1] < things]).unbind(1)
    order = ids.argsort()
    number = torch.cat([torch.zeros(1, dtype=torch.int32), order.int() + 1])    # of the sorted ids
    listed = torch.cat([torch.zeros(1, dtype=torch.int64), ids[order]])
    at = torch.searchsorted(listed, layers.long()).clamp(max=len(ids))  # [1, H, W] index in listed
    return labels, torch.where(listed[at] == layers, number[at], 0), crowd.bool()


def drawn_segments(panoptic, segments):
    """The rows of segments int64 [S, 3] = id, class, iscrowd that have a pixel in the map."""
    drawn = torch.bincount(panoptic.flatten()).nonzero()
    return segments[torch.isin(segments[:, 0], drawn)]


def masks_of(values, ids):
    """Where a map [H, W] holds each of ids [N]: bool [N, H, W]. numpy compares ten times faster."""
    values = values.numpy()
    return torch.from_numpy(values == ids.numpy().astype(values.dtype)[:, None, None])


class Segmentation:
    """(epoch, index) -> dict for collate().

    Training: image uint8 [3, H, W], task, labels int64 [N], masks bool [N, H, W] as find_objects
              returns them, but without crowds and without what the crop has cut off completely.
    Test:     image as the network gets it, index, original = (H0, W0) of the photo, at which every
              annotation is.

    Samples of several tasks take turns: index i belongs to task (epoch + i) mod T, so that over T
    epochs every image is seen once with every task. Batches(kinds=T) mixes them evenly.
    source: one of open_sources; size: px, see segmentation_transform.
    """

    def __init__(self, source, train, size, seed, tasks=("semantic",), augment=True, flip=True):
        self.source, self.train, self.seed, self.tasks = source, train, seed, tasks
        self.classes, self.things = source.classes, source.things
        self.category_ids = source.category_ids
        self.transform = segmentation_transform(train and augment, size, flip)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, at):
        epoch, index = at
        sample = self.source[index]
        if not self.train:
            image = self.transform({"image": sample["image"]})["image"]
            return sample | {"image": image, "index": index, "original": sample["image"].shape[-2:]}
        with seeded(self.seed, epoch, index):
            sample = self.transform(sample)
        task = self.tasks[(epoch + index) % len(self.tasks)]
        labels, masks, crowd = find_objects(task, sample, self.things)
        keep = torch.from_numpy(masks.numpy().any((1, 2))) & ~crowd
        return {"image": sample["image"], "task": task, "labels": labels[keep],
                "masks": masks[keep]}


def open_segmentation(path, size, fraction=1.0, seed=0, tasks=("semantic",), overfit=False,
                      flip=True, **reading):
    """(training set, validation set) for the segmentation tasks; see open_sources. If
    "instance" is the only task, masks may overlap; else they are the panoptic map's things."""
    keys = ["semantic"] * ("semantic" in tasks)
    if list(tasks) == ["instance"] and not toy_scenes(path, 1):
        keys += ["masks"]
    elif "instance" in tasks or "panoptic" in tasks:
        keys += ["panoptic", "segments"]
    sources = open_sources(path, size, keys, fraction, overfit, **reading)
    if "instance" in tasks and not sources[0].things:
        raise InputError(f"--data {path}: none of its classes is a thing (isthing 1), so --tasks "
                         "instance has nothing to find")
    return [Segmentation(s, train, size, seed, tasks, not overfit, flip)
            for s, train in zip(sources, (True, False))]


# -----------------------------------------------------------------------------
# Detection


class CropBetween:
    """Random crop whose sides are drawn from low..high px, or less where the photo is smaller."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, sample):
        sides = [int(torch.randint(min(self.low, n), min(self.high, n) + 1, ()))
                 for n in sample["image"].shape[-2:]]
        return CropToFit(*sides)(sample)


def detection_transform(augment, size, flip=True):
    """DETR's multi-scale recipe in proportion to `size`, the shortest side at test; for DETR's 800
    px: flip; half of the time, scale the shortest side to 400, 500 or 600 and crop 384..600 px;
    then scale the shortest side to 480..800 px (the longest to 1333 at most)."""
    longest = max(size * 1333 // 800, LONGEST)              # a thin photo keeps 1 px of width
    if not augment:
        return v2.RandomShortestSize([size], longest, antialias=True)
    scales = [size * s // 800 for s in range(480, 801, 32)]
    crop = [v2.RandomShortestSize([size * s // 800 for s in (400, 500, 600)], antialias=True),
            CropBetween(size * 384 // 800, size * 600 // 800)]
    return v2.Compose([v2.RandomHorizontalFlip(0.5 * flip), v2.RandomApply(crop),
                       v2.RandomShortestSize(scales, longest, antialias=True)])


class Detection:
    """(epoch, index) -> dict for collate().

    Training: image uint8 [3, H, W], labels int64 [N], boxes float [N, 4] = centre x, y, width,
              height in 0..1 of the image; no crowds, and no boxes that a crop left without area.
    Test:     image as the network gets it; index; original = (H0, W0) of the photo; labels; boxes
              x1 y1 x2 y2 in the photo's pixels; area and iscrowd if known.
    source: one of open_sources; size: px, see detection_transform.
    """

    def __init__(self, source, train, augment, size, seed, flip=True):
        self.source, self.train, self.seed = source, train, seed
        self.classes = source.classes[:source.things]
        self.category_ids = source.category_ids[:source.things]
        self.transform = detection_transform(augment, size, flip)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, at):
        epoch, index = at
        sample = dict(self.source[index])
        sample["labels"] = sample.pop("classes")
        if not self.train:
            return sample | {"image": self.transform(sample["image"]), "index": index,
                             "original": sample["image"].shape[-2:]}
        sample = v2.ClampBoundingBoxes()(sample)            # outlines may leave the photo a little
        with seeded(self.seed, epoch, index):
            sample = self.transform(sample)
        height, width = sample["image"].shape[-2:]
        boxes = sample["boxes"].as_subclass(torch.Tensor)
        boxes = boxes / torch.tensor([width, height, width, height])
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        keep = (boxes[:, 2:] > 0).all(1)
        if "iscrowd" in sample:
            keep &= ~sample["iscrowd"].bool()
        return {"image": sample["image"], "labels": sample["labels"][keep], "boxes": boxes[keep]}


def open_detection(path, size, fraction=1.0, seed=0, overfit=False, flip=True, **reading):
    """(training set, validation set) of Detection samples; see open_sources."""
    sources = open_sources(path, size, ["boxes", "classes", "area"], fraction, overfit, **reading)
    return [Detection(s, train, train and not overfit, size, seed, flip)
            for s, train in zip(sources, (True, False))]


# -----------------------------------------------------------------------------
# Depth


class ColourAugment:
    """BTS's colours, half of the time: gamma 0.9-1.1, brightness 0.75-1.25, channels 0.9-1.1."""

    def __call__(self, sample):
        if torch.rand(()) < 0.5:
            gamma, bright = (torch.empty(()).uniform_(*r) for r in ((0.9, 1.1), (0.75, 1.25)))
            channels = torch.empty(3, 1).uniform_(0.9, 1.1)
            # gamma on 0..1 as BTS; BinsFormer's on 0..255 would clip most of the photo
            values = (torch.arange(256) / 255) ** gamma * bright * channels * 255
            image = recolour(v2.functional.to_pil_image(sample["image"]), values.numpy())
            sample = sample | {"image": v2.functional.to_image(image)}
        return sample


class Tilt:
    """Half of the time, rotate photo and depth about the centre by up to `degrees`, like
    v2.RandomRotation, but both with one sampling grid. Uncovered corners become 0."""

    def __init__(self, degrees):
        self.degrees = degrees

    def __call__(self, sample):
        if torch.rand(1) >= 0.5:
            return sample
        angle = torch.empty(1).uniform_(-self.degrees, self.degrees).item()
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        h, w = sample["image"].shape[-2:]
        matrix = torch.tensor([[[c, -s * h / w, 0], [s * w / h, c, 0]]])     # for x, y in -1..1
        grid = F.affine_grid(matrix, [1, 1, h, w], align_corners=False)
        image = sample["image"].as_subclass(torch.Tensor)[None].float().contiguous()
        depth = sample["depth"].as_subclass(torch.Tensor)[None, None]
        image = F.grid_sample(image, grid, "bilinear", align_corners=False)[0].round().byte()
        depth = F.grid_sample(depth, grid, "nearest", align_corners=False)[0, 0]
        return {"image": tv_tensors.Image(image), "depth": tv_tensors.Mask(depth)}


def depth_transform(height, width, flip=True):
    """BinsFormer's training recipe for NYU: rotate by up to 2.5 degrees (half of the time), flip,
    crop, colours.

    Depth travels as a mask: nearest neighbour, so that no value is invented between two surfaces;
    corners that a rotation uncovers become 0 = invalid.
    """
    return v2.Compose([Tilt(2.5), v2.RandomHorizontalFlip(0.5 * flip), CropToFit(height, width),
                       ColourAugment()])


class Depth:
    """(epoch, index) -> dict for collate(): image uint8 [3, H, W], depth float [H, W] metres, 0 =
    invalid. With augment a training crop of at most height x width px, else the whole photo."""

    def __init__(self, source, augment, height, width, seed, flip=True):
        self.source, self.seed, self.unframe = source, seed, augment and source.kinect_frame
        self.transform = depth_transform(height, width, flip) if augment else v2.Identity()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, at):
        epoch, index = at
        sample = self.source[index]
        if self.unframe and sample["image"].shape[-2:] == (480, 640):
            # As BTS, cut off the white border, which the Kinect's two cameras do not both see
            sample = {k: v2.functional.crop(v, 45, 43, 427, 565) for k, v in sample.items()}
        with seeded(self.seed, epoch, index):
            return self.transform(sample)


def shrunk(photo, longest):
    """Photo uint8 [3, H, W] -> the same with its longer side at most `longest` px."""
    height, width = photo.shape[1:]
    factor = min(1, longest / max(height, width))
    size = [max(1, round(n * factor)) for n in (height, width)]
    return photo if factor == 1 else v2.functional.resize(photo, size, antialias=True)


def open_depth(path, height, width, fraction=1.0, seed=0, overfit=False, flip=True, **reading):
    """(training set, validation set) for depth; height, width: the training crop, px. ToyWorld's
    photos are squares of max(height, width) px. See open_sources."""
    sources = open_sources(path, max(height, width), ["depth"], fraction, overfit, **reading)
    return [Depth(s, augment, height, width, seed, flip)
            for s, augment in zip(sources, (not overfit, False))]


# -----------------------------------------------------------------------------
# Batches


def collate_pretraining(config, samples, budget=None):
    """Samples of Pretraining -> images uint8 [B, 3, S, S], their Layout; budget: see Layout."""
    images, hidden = (torch.stack(x) for x in zip(*samples))
    return images, whole(config, images, hidden, budget)


def collate(config, samples):
    """Samples with images of any sizes -> images uint8 [B, 3, H, W] padded at the bottom and right,
    their Layout, which hides the padding, and a list of B dicts with everything else.
    Samples that name their task are grouped by it."""
    samples = sorted(samples, key=lambda s: s.get("task", ""))
    images = [s["image"].as_subclass(torch.Tensor) for s in samples]
    sizes = torch.tensor([i.shape[-2:] for i in images])
    height, width = sizes.amax(0).tolist()
    batch = images[0].new_zeros(len(images), 3, height, width)
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    targets = [{k: v.as_subclass(torch.Tensor) if torch.is_tensor(v) else v
                for k, v in s.items() if k != "image"} for s in samples]
    return batch, Layout(config, sizes), targets
