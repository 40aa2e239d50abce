"""
Which samples a step holds, and how they travel from the data processes to the device.

Resuming is exact because no random state passes from one step to the next: the samples of a step
are a pure function of (seed, step), the network's noise of (seed, step, rank), augmentation of
(seed, epoch, index).
"""
import atexit
import contextlib
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from itertools import chain

import torch

from data import InputError, derive_seed


class Batches:
    """Which samples each micro-batch of this process holds, for steps start..stop-1.

    Epoch e visits a permutation drawn from (seed, e), a step takes the next `total` of it, split
    over micro-steps and ranks: however the same `total` is split, a step has the same samples. The
    tail of an epoch that does not fill a step is dropped. Yields lists of (epoch, index).

    kinds: the kind of a sample is index % kinds. If there are several, any n samples in a row hold
    n / kinds (rounded down or up) of each kind.
    """

    def __init__(self, length, args, run, start, stop, kinds=1):
        self.size, self.accumulate, self.seed = args.batch_size, args.accumulate, args.seed
        self.kinds = kinds
        self.length, self.run, self.start, self.stop = length, run, start, stop
        self.total = run.total_batch(args)

    def __iter__(self):
        per_epoch, epoch_of_order = self.length // self.total, None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                order, epoch_of_order = torch.randperm(self.length, generator=generator), epoch
                if self.kinds > 1:              # first of each kind, second of each kind, ...
                    place = torch.empty_like(order)
                    for kind in range(self.kinds):
                        mine = order % self.kinds == kind
                        place[mine] = torch.arange(int(mine.sum())) * self.kinds + kind
                    order = order[place.argsort()]
            for a in range(self.accumulate):
                first = i * self.total + (a * self.run.world + self.run.rank) * self.size
                yield [(epoch, j) for j in order[first:first + self.size].tolist()]


def steps_per_epoch(length, args, run):
    """Optimiser steps that `length` training samples fill; InputError if none."""
    total = run.total_batch(args)
    if length < total:
        raise InputError(f"--data {args.data}: {length} training samples are fewer than one step "
                         f"takes ({total}); lower --batch-size or --accumulate")
    return length // total


def schedule(length, args, run):
    """Steps of the whole run: --steps, else --epochs; 0 with --eval, which needs none."""
    if args.eval:
        return 0
    per_epoch = steps_per_epoch(length, args, run)
    return args.steps or args.epochs * per_epoch


def share(counts, args, run):
    """Lists of (0, index) of this process for evaluation: every sample once, on one process.

    counts: persons of each photo, for other tasks 1. A list holds at most --batch-size of them, or
    one photo that has more, so that memory stays bounded.
    """
    lists, persons = [], math.inf
    for i in range(run.rank, len(counts), run.world):
        if persons + counts[i] > args.batch_size:
            lists.append([])
            persons = 0
        lists[-1].append((0, i))
        persons += max(1, counts[i])                        # a photo without persons is read, too
    return lists


# -----------------------------------------------------------------------------
# From the data processes to the device


ALIGNMENT = 64                                  # bytes: where a tensor may begin in the buffer


class Packer(pickle.Pickler):
    """Pickles anything, but keeps the tensors in it aside, in self.tensors."""

    def __init__(self, file):
        super().__init__(file, protocol=5)
        self.tensors = []

    def persistent_id(self, thing):
        if isinstance(thing, torch.Tensor):
            self.tensors.append(thing)
            return len(self.tensors) - 1
        return None


class Unpacker(pickle.Unpickler):
    """Unpickles what Packer wrote, with these tensors in their places."""

    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number):
        return self.tensors[number]


class Packed:
    """A batch as one buffer of bytes, which holds all of its tensors, and a pickle of the rest.

    A data process hands every tensor it sends to the main process as an open file. Batches are
    hundreds of small tensors, and Linux allows 1024 open files; one buffer is one file. It also
    reaches a GPU in one copy. Where shared memory is full (Docker gives 64 MB), the buffer travels
    through the pipe instead, a little slower.
    """

    def __init__(self, batch):
        file = io.BytesIO()
        packer = Packer(file)
        packer.dump(batch)
        self.rest, self.parts, end = file.getvalue(), [], 0
        for tensor in packer.tensors:
            first = -(-end // ALIGNMENT) * ALIGNMENT
            end = first + tensor.numel() * tensor.element_size()
            self.parts.append((first, end, tensor.dtype, tensor.shape))
        self.buffer = torch.empty(end, dtype=torch.uint8)
        if torch.utils.data.get_worker_info():
            with contextlib.suppress(RuntimeError, OSError):    # if it is full, keep the first one
                self.buffer = shared(end)
        for tensor, (first, end, *_) in zip(packer.tensors, self.parts):
            if tensor.numel():              # numpy's empty arrays have strides that view() refuses
                self.buffer[first:end] = tensor.contiguous().flatten().view(torch.uint8)

    def __getstate__(self):
        buffer = self.buffer if self.buffer.is_shared() else self.buffer.numpy()
        return self.__dict__ | {"buffer": buffer}

    def __setstate__(self, state):
        self.__dict__ |= state | {"buffer": torch.as_tensor(state["buffer"])}

    def pin_memory(self):
        """For DataLoader, so that the copy to a GPU does not wait."""
        self.buffer = self.buffer.pin_memory()
        return self

    def to(self, device="cpu"):
        """The batch, each of its tensors a view of one buffer on the device."""
        # asynchronous only from pinned memory: a buffer that is not pinned may be freed on return
        buffer = self.buffer.to(device, non_blocking=self.buffer.is_pinned())
        tensors = [buffer[first:end].view(dtype).view(shape)
                   for first, end, dtype, shape in self.parts]
        return Unpacker(io.BytesIO(self.rest), tensors).load()


def shared(size):
    """uint8 [size] in shared memory; RuntimeError or OSError where there is no room for it."""
    return torch.empty(size, dtype=torch.uint8).share_memory_()


def pack(collate, config, samples):
    """DataLoader's collate_fn, in the data process: samples -> Packed batch."""
    return Packed(collate(config, samples))


def ignore_signals(_):
    """A data process goes on until the main process ends it: Ctrl-C and a cluster's SIGTERM reach
    the whole group, and the step that is running still needs its data."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A thread's work: end this process with the one that started it, however that ends. (torch
    watches our parent, but a forkserver outlives the run.)"""
    multiprocessing.parent_process().join()
    os._exit(1)


@atexit.register
def end_data_processes():
    """Kill data processes that are left: they ignore the SIGTERM with which Python ends them."""
    left = [p for p in multiprocessing.active_children() if p.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would call it an error
    for process in left:
        process.kill()


def loader(dataset, batches, collate, config, args, run):
    """DataLoader: each list of (epoch, index) becomes a Packed batch, collate(config, samples).

    The data processes also plan the Layout; their number changes speed, never the samples.
    """
    # with forkserver (Python 3.14 on Linux) torch is imported once, by the server
    multiprocessing.set_forkserver_preload(["batching"])
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=partial(pack, collate, config),
        num_workers=args.workers, prefetch_factor=4 if args.workers else None,
        pin_memory=run.device.type == "cuda", worker_init_fn=ignore_signals)


def training_loader(dataset, args, run, start, stop, collate, config, kinds=1):
    """The micro-batches of steps start..stop-1, see Batches, and the time that waiting for them
    takes, see Timed. collate(config, samples) makes a batch."""
    batches = Batches(len(dataset), args, run, start, stop, kinds)
    dataset = Skipping(dataset) if args.on_error == "skip" else dataset
    return Timed(loader(dataset, batches, collate, config, args, run))


class Skipping:
    """A training set in which the next readable sample replaces an unreadable one, which is
    reported on stderr once; InputError if no sample is readable. `broken`: a bool for each
    sample, shared with the data processes."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, at):
        epoch, index = at
        for i in chain(range(index, len(self)), range(index)):
            try:
                # keep the sum epoch + index: it decides the sample's task (data.Segmentation)
                return self.dataset[epoch + index - i, i]
            except InputError as error:
                if not self.broken[i]:
                    self.broken[i] = True
                    print(f"\nskipped: {error}", file=sys.stderr, flush=True)
        raise InputError("no training photo can be read")


class Timed:
    """Iterate a loader; waited: seconds spent waiting for data."""

    def __init__(self, loader):
        self.iterator, self.waited = iter(loader), 0.0
        self.dataset = loader.dataset

    def __next__(self):
        before = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - before
        return batch

    def skipped(self):
        """How many different samples this process had to skip so far."""
        return int(self.dataset.broken.sum()) if isinstance(self.dataset, Skipping) else 0
