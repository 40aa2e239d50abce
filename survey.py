"""
What a data set will teach, reported before training: a class that covers no pixel, objects that a
rule leaves out, a photo in both parts. What is certainly wrong is an error where it is read; what
may be intended is only reported here, because the user knows the files and can decide.
"""
import contextlib
import os
import sys
from collections import Counter
from functools import cache

import numpy as np

from formats.files import IGNORE, InputError, left_out, opened, paths_of, shows
from pose import SIDES, flip_order

LOOKED_AT = 200                         # label maps of each part to count pixels in, at most


def survey(args, train, val, run):
    """Print the report on rank 0; with --check the program ends here, with exit code 0."""
    if run.rank == 0:
        for line in lines(args, train, val):
            print(line, flush=True)
    if args.check:
        sys.exit(0)


def lines(args, train, val):
    """What survey prints, a list of str; train, val: data sets of data.py."""
    found = [f"{len(train.source)} training and {len(val.source)} validation photos", *names(train)]
    for part, dataset in (("training", train), ("validation", val)):
        source = dataset.source
        records = getattr(source, "records", None)          # ToyWorld and bare photos have none
        if records:
            source.upright()                                # says so if it cannot be told
        if records and "labels" in records[0]:
            found += objects(part, source)
        elif records and "segments" in records[0]:
            found += segments(part, source)
        elif records and "semantic" in getattr(args, "tasks", ()):
            found += pixels(part, source, args)
    found += bit_depths(train.source) + twice(train.source, val.source)
    return found + limits(args, train) + mirrors(args, train)


def some(words, most=24):
    """The first words and the last, if they are many."""
    words = list(words)
    return ", ".join(words if len(words) <= most else [*words[:most - 2], "...", words[-1]])


def shares(names, counts, total):
    """The classes that occur, with their share of `total`, then those that do not: str."""
    share = [f"{name} {n / total:.1%}" for name, n in zip(names, counts) if n]
    missing = [name for name, n in zip(names, counts) if not n]
    return some(share, 12) + f"; none of {some(missing, 8)}" * bool(missing)


def names(train):
    """The names that the network's answers have."""
    found = []
    if classes := getattr(train, "classes", ()):
        ids = [f"{i} {name}" for i, name in zip(train.category_ids, classes)]
        found.append(f"{len(classes)} classes, labels 0 to {len(classes) - 1}: {some(ids)}")
    if joints := getattr(train, "joints", ()):
        pairs = [f"{joints[i]} - {joints[j]}" for i, j in enumerate(train.flip) if i < j]
        found.append(f"{len(joints)} joints: {some(joints)}; {len(pairs)} pairs that a mirror "
                     f"exchanges: {some(pairs, 12) or 'none'}")
    return found


def objects(part, source):
    """Lines on boxes, masks or joints: how many of each class, and how many a rule leaves out."""
    every = [r["labels"] for r in source.records]
    kinds = ["with joints"] if source.joints else source.classes
    classes = np.concatenate([x["classes"] for x in every])
    reasons, kept, told = [*map(left_out, source.records)], np.ones(len(classes), bool), []
    for what in reasons[0]:                                 # the first reason counts
        gone = kept & np.concatenate([r[what] for r in reasons])
        kept &= ~gone
        told += [f"{gone.sum()} {what}"] * bool(gone.any())
    counts = np.bincount(classes[kept], minlength=len(kinds))
    found = [f"{part}: {kept.sum()} objects in {sum(map(shows, source.records))} of {len(every)} "
             f"photos: {shares(kinds, counts, kept.sum())}"
             + "; left out: " * bool(told) + ", ".join(told)]
    crowd = np.concatenate([x["iscrowd"] for x in every])
    if crowd.sum() > 0.1 * len(crowd):
        found.append(f"note: {crowd.mean():.0%} of the {part} objects are crowds, which are "
                     "neither learned nor graded; some tools write iscrowd 1 for all that is "
                     "painted: if yours does, set it to 0 in the JSON")
    return found


def segments(part, source):
    """Of panoptic maps: how many segments of what."""
    every = np.concatenate([r["segments"] for r in source.records])         # id, class, iscrowd
    counts = np.bincount(every[every[:, 2] == 0, 1], minlength=len(source.classes))
    return [f"{part}: {sum(counts)} segments: {shares(source.classes, counts, sum(counts))}; left "
            f"out: {len(every) - sum(counts)} crowds"]


def pixels(part, source, args):
    """Of label maps: the share of the pixels of each class and of none."""
    step = -(-len(source) // LOOKED_AT)
    count, seen = np.zeros(256, np.int64), 0
    for i in range(0, len(source), step):
        with contextlib.suppress(*[InputError] * (args.on_error == "skip")):
            count += np.bincount(source.labels(i)["semantic"].flatten().numpy(), minlength=256)
            seen += 1
    none, total = count[IGNORE] / max(1, count.sum()), count.sum()
    found = [f"{part}: pixels of {seen} of {len(source)} label maps: no class {none:.1%}, "
             f"{shares(source.classes, count[:IGNORE], total)}"]
    if np.count_nonzero(count[:IGNORE]) < 2 or none > 0.3:
        found.append(f"note: {np.count_nonzero(count[:IGNORE])} classes have pixels in the {part} "
                     f"part, {none:.0%} are no class: 255, --ignore-label, or less than "
                     "--first-label. Is that meant? If 255 is a class, save it with another value")
    return found


def bit_depths(source):
    """A note if 16-bit photos use only their lower bits, at most 14, as many cameras write them:
    they would be read as nearly black. Looks at 20 photos at most."""
    largest = []
    for path in paths_of(source, -(-len(source) // 20)):
        with contextlib.suppress(InputError), opened(path) as image:
            if image.mode.startswith("I"):
                value = int(np.asarray(image).max())
                largest += [value] * (image.mode != "I" or value > 255)     # see files.to_tensor
            elif image.tile and ";16" in str(image.tile[0][3]):     # colours: PIL drops 8 bits
                largest.append(int(np.asarray(image).max()) * 256 + 255)
    if not largest or not 0 < max(largest) < 2 ** 14:
        return []
    return [f"note: photos of 16 bits whose largest value is {max(largest)} are read as nearly "
            f"black; multiply them by {2 ** 16 // 2 ** max(largest).bit_length()}"]


def twice(train, val):
    """Photos that are there more than once, or in both parts."""
    real = cache(os.path.realpath)                          # a part may be a link to the other
    paths = [[os.path.join(real(r["photo"].parent), r["photo"].name)
              for r in getattr(s, "records", ())] for s in (train, val)]
    found = []
    for part, own in zip(("training", "validation"), paths):
        if many := sum(n > 1 for n in Counter(own).values()):
            found.append(f"note: {many} {part} photos are listed more than once, each time with "
                         "some of the objects: an entry teaches that the others' are absent")
    if train is not val and (both := set(paths[0]) & set(paths[1])):
        found.append(f"note: {len(both)} photos are in both parts, e.g. {min(both)}: validation "
                     "metrics will be too high")
    return found


def limits(args, train):
    """Photos with more objects than queries can answer."""
    records = getattr(train.source, "records", ())
    most = max((int((~r["labels"]["iscrowd"]).sum()) if "labels" in r else len(
        r.get("segments", ())) for r in records), default=0)
    tasks = getattr(args, "tasks", ())
    if hasattr(train, "joints") or tasks == ["semantic"]:
        return []
    queries = getattr(args, "queries", None) or 200         # finetune_seg's default for objects
    if isinstance(queries, list):               # semantic maps are no list of objects
        pairs = zip(tasks, queries * len(tasks))
        queries = min(q for task, q in pairs if task != "semantic")
    if most > queries:
        return [f"note: a training photo has {most} objects, --queries {queries} can find no more "
                f"than {queries} in a photo"]
    return [f"note: a training photo has {most} objects; an answer is the 100 surest ones, as by "
            "COCO's tool"] * (most > 100 and tasks != ["panoptic"])


def mirrors(args, train):
    """Classes that a mirror would turn into others."""
    names = list(map(str, getattr(train, "classes", ())))
    order = flip_order(names, sides=SIDES[:2])              # lock and rock are no pair
    pairs = [(names[i], names[j]) for i, j in enumerate(order) if i < j]
    if not pairs or getattr(args, "no_flip", True):
        return []
    return [f"note: {' and '.join(pairs[0])} are classes, but training mirrors half of the photos; "
            "--no-flip leaves that out"]
