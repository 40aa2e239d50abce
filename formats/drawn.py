"""
ToyWorld as a data set: scenes drawn once, by all cores, and held in memory; --data toyworld.
"""
import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import toyworld
from formats.files import InputError, as_sample


def toy_row(seed, size, keys, index):
    """Scene `index` as numpy arrays: image uint8 [3, S, S], and `keys` as toyworld.scene's."""
    scene = toyworld.scene(seed, index, size)
    image = np.ascontiguousarray(scene["image"].transpose(2, 0, 1))         # [3, S, S]
    return {"image": image} | {k: scene[k] for k in keys}


def draw_scenes(seed, size, keys, indexes, what):
    """List of these scenes, see toy_row, drawn by all cores that are this process's. Arrays, not
    tensors: a data process that is not forked gets them through a pipe, and each of thousands of
    tensors would be an open file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 61)    # Windows allows no more
    draw = partial(toy_row, seed, size, keys)
    bar = partial(tqdm, total=len(indexes), desc=f"drawing ToyWorld {what}", leave=False,
                  disable=None)
    if cores > 1 and len(indexes) >= 512:                   # fewer: starting processes costs more
        with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(cores) as pool:
            return list(bar(pool.map(draw, indexes, chunksize=32)))
    return list(bar(map(draw, indexes)))


class ToyWorld:
    """ToyWorld scenes as samples, drawn once when the data set is opened.

    split: "train" or "val"; size: px of a side; seed: see WORLD of toy_scenes.
    keys: which annotations of toyworld.scene to keep besides the image.
    """
    classes = toyworld.CLASSES
    things = len(toyworld.THINGS)
    category_ids = range(len(classes))
    joints = toyworld.KEYPOINTS
    kinect_frame = False

    def __init__(self, split, count, size, seed=0, keys=()):
        first = toyworld.SPLIT_START[split]
        self.samples = draw_scenes(seed, size, keys, range(first, first + count), split)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return as_sample({k: torch.as_tensor(v) for k, v in self.samples[index].items()})

    def view(self, index, choose, size):
        """Like files.read_view, but the photo keeps its size: it is in memory already."""
        image = torch.as_tensor(self.samples[index]["image"])
        return image, choose(*image.shape[1:])

    @property
    def ids(self):
        """Image ids, as in the files that formats/export.py writes."""
        return list(range(len(self.samples)))

    def labels(self, index):
        """Sample `index` without its photo, at no cost."""
        return {k: torch.as_tensor(v) for k, v in self.samples[index].items() if k != "image"}


def toy_scenes(path, default):
    """--data as the name of drawn scenes -> (training scenes, validation scenes, world), else None.

    path: "toyworld[:TRAINING[:VALIDATION[:WORLD]]]"; default: training scenes. 256 validate by
    default, or as many as train if these are fewer. Each WORLD (0, 1, ...) has scenes of its own:
    what is tuned on one is reported on another. InputError for other words after toyworld.
    """
    name, *numbers = str(path).split(":")
    if name != "toyworld":
        return None
    if len(numbers) > 3 or not all(n.isdecimal() and n.isascii() for n in numbers) \
            or "0" in (str(int(n)) for n in numbers[:2]):
        raise InputError(f"--data {path}: write toyworld, or toyworld:TRAINING:VALIDATION:WORLD "
                         "from the left as far as you need, as in toyworld:1000")
    train, val, world = (*map(int, numbers), *[None] * (3 - len(numbers)))
    train = train or default
    return train, val or min(train, 256), world or 0
