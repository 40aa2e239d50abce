"""
Folders as people download them -> annotated photos, one Source each for training and validation.

    COCO     annotations/{instances,person_keypoints,panoptic}_{train,val}*.json, photos beside it
             in train*/ and val*/; any other data set in these formats, ADE20K's JSON included
    ADE20K   {images,annotations,annotations_instance}/{training,validation}
    masks    {images,labels}/{train,val} or {train,val}/{images,labels}: photos, one-channel PNGs
    NYU      BTS's lists nyudepthv2_{train,test}_files_with_gt.txt: photos, 16-bit PNGs
    depth    {rgb,depth}/{train,val} or {train,val}/{rgb,depth}

The code holds no list of classes: names and numbers come from the files. Annotations are
checked when a folder is opened, pixels when they are read: what is wrong raises InputError; with
on_error "skip" such photos are left out. Boxes and keypoints are in pixels of the photo as its
annotation sees it; an EXIF rotation is applied if the annotation is for the turned photo, see
files.read_photo.
"""
import contextlib
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.coco import (
    coco_files,
    coco_instances,
    coco_panoptic,
    is_coco,
    open_coco,
    panoptic_labels,
)
from formats.files import (
    IGNORE,
    LABELS,
    PHOTOS,
    SPLITS,
    SUFFIXES,
    InputError,
    Source,
    hold_out,
    limit_classes,
    list_images,
    note,
    read_labels,
    read_lines,
    read_numbers,
    read_pixels,
    refuse,
    shows,
)
from metrics import require

DEPTHS = ("depth", "depths")
BINARY = (0, IGNORE)                    # values of the two classes where no others occur
EXPECTED = {
    "depth": "BTS's lists *_train_files_with_gt.txt and *_test_files_with_gt.txt, or "
             "{train,val}/{rgb,depth} with 16-bit PNGs of the photos' names",
    "keypoints": "annotations/person_keypoints_{train,val}*.json and the photos beside it",
    "panoptic": "annotations/panoptic_{train,val}*.json with its folder of PNGs, or ADE20K's "
                "{images,annotations,annotations_instance}/{training,validation}",
    "masks": "annotations/instances_{train,val}*.json or panoptic_{train,val}*.json and the photos "
             "beside it, or ADE20K's {images,annotations,annotations_instance}",
    "boxes": "annotations/instances_{train,val}*.json and the photos beside it",
    "semantic": "ADE20K's {images,annotations}/{training,validation}, {images,labels}/{train,val} "
                "with one-channel PNGs of the photos' names, or COCO's panoptic_{train,val}*.json",
}


# -----------------------------------------------------------------------------
# Folders of pairs: label maps, ADE20K, depth


def subfolder(root, *names):
    """The folder root/name/name/..., whatever its capitals, or None; empty names do not count."""
    for name in filter(None, names):
        same = [p for p in root.iterdir() if p.name.lower() == name and p.is_dir()] \
            if root and root.is_dir() else []
        root = min(same, key=lambda p: (p.name != name, p.name), default=None)
    return root


def split_folders(root, split, *groups):
    """For each group of words the first folder root/word/part or root/part/word that is there, or
    None; a list of such tuples, one for each name that the split may have, e.g. val and valid.
    split None: root/word. Of several folders the first with images: labels/ may hold texts."""
    def pick(words, part):
        there = list(dict.fromkeys(p for w in words for names in ((w, part), (part, w))
                                   if (p := subfolder(root, *names))))
        for path in there[:-1]:
            with contextlib.suppress(InputError):
                return list_images(path, {*SUFFIXES}) and path
        return there[-1] if there else None
    return [tuple(pick(words, part) for words in groups) for part in SPLITS.get(split, ("",))]


def photo_folders(root, ours=None):
    """Where a folder's training and validation photos are, see data.open_pretraining; None: no such
    part. ours: see list_images."""
    found = []
    for split in ("train", "val"):
        plain = [subfolder(root, s) for s in SPLITS[split]]
        pairs = split_folders(root, split, PHOTOS, LABELS + DEPTHS)
        places = (photos if photos and (labels or not p) else p
                  for p, (photos, labels) in zip(plain, pairs))
        years = [p for p in root.glob(f"{split}[12][0-9][0-9][0-9]") if p.is_dir()]     # COCO's
        found.append(next(filter(None, (*places, *years * (len(years) == 1))), None))
    if found[0] and not found[1] and found[0].parent == root:       # a class may be called train
        others = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "."
                        and p != found[0] and p.name not in LABELS + DEPTHS
                        and not (ours and ours.resolve().is_relative_to(p.resolve()))
                        and any(f.suffix.lower() in SUFFIXES for f in p.rglob("*")))
        if others:
            note(f"note: {root}: of its folders {found[0].name} alone is read, without "
                 f"{', '.join(others[:5])}; to read all, give {found[0].name} another name")
    if found[0]:
        return found
    [(photos, labels)] = split_folders(root, None, PHOTOS, LABELS + DEPTHS)
    return photos if photos and labels else root, None


def find_pairs(root, photo_words, label_words, on_error, grading):
    """{split: (folder of labels, records with photo, id and label)}; {} if the format is another.
    Photo and PNG have the same name but for the ending. Without train/ and val/ the split is
    None. grading: see open_folder."""
    found = {}
    for split in ("train", "val", None):
        pairs = split_folders(root, split, photo_words, label_words)
        photos, labels = next((p for p in pairs if all(p)), (None, None))
        for half in (p for p in pairs if split == "val" and found and any(p) and not all(p)):
            place, words = (half[0], label_words) if half[0] else (half[1], photo_words)
            if "test" not in place.relative_to(root).parts:         # a test part has no labels
                refuse(f"{place}: has no matching folder; expected {' or '.join(words)}",
                       on_error)
        if not photos or not labels or (split is None and (
                found or any(map(is_coco, labels.glob("*.json"))) or not any(
                    p.suffix.lower() in SUFFIXES for p in labels.rglob("*")))):
            continue
        maps = {bare(p, labels): p for p in list_images(labels, {".png"})}
        records, stems = [], set()
        for path in list_images(photos):
            stem = bare(path, photos)
            if stem in stems:
                refuse(f"{path}: two photos of this name", on_error)
            elif stem not in maps:
                refuse(f"{path}: no label PNG of this name in {labels}", on_error)
            else:
                records.append(dict(photo=path, id=stem, label=maps[stem]))
            stems.add(stem)
        if orphans := sorted(maps.keys() - stems):
            refuse(f"{maps[orphans[0]]}: no photo of this name in {photos} ({len(orphans)} such "
                   "label maps)", on_error)
        found[split] = labels, records
    return {} if set(found) == {"val"} and not grading else found


def bare(path, folder):
    """A file's name below a folder, without its ending. Letters with accents have one form: macOS
    writes them as two characters."""
    return unicodedata.normalize("NFC", str(path.relative_to(folder).with_suffix("")))


def both_parts(root, found, read, **about):
    """What find_pairs found -> [training, validation] Source."""
    sources = [Source(records, read, **about) for _, records in found.values()]
    if set(found) == {"val"}:                               # see open_folder's grading
        return sources * 2
    return sources if len(sources) == 2 else hold_out(root, sources[0])


def class_names(root):
    """Names from ADE20K's objectInfo150.txt, or from classes.txt with a name a line, or None."""
    try:
        if (root / "objectInfo150.txt").exists():
            lines = read_lines(root / "objectInfo150.txt")[1:]
            return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
        if (root / "classes.txt").exists():
            names = "\n".join(map(str.strip, read_lines(root / "classes.txt"))).strip().split("\n")
            if "" in names[1:]:
                raise InputError(f"{root / 'classes.txt'}: line {names.index('') + 1} is empty; "
                                 "each line names a value")
            return [n for n in names if n]
    except OSError as error:
        raise InputError(f"--data {root}: its list of class names cannot be read ({error})") \
            from None
    return None


def count_values(root, records, on_error):
    """How many pixels of the label maps have each value, int64 [65536]."""
    count = np.zeros(2 ** 16, np.int64)
    for record in tqdm(records, desc=f"looking for the classes of {root} (classes.txt saves this)",
                       leave=False, disable=None):
        # with "skip", what is broken is reported when it is read
        with contextlib.suppress(*[InputError] * (on_error == "skip")):
            count += np.bincount(read_labels(record["label"]).ravel(), minlength=2 ** 16)
    return count


def class_values(root, found, names, first, ignore, on_error):
    """Value of each class in the label maps: first, first + 1, ... for names; without names all
    that occur in either part but 255, `ignore` and what is less than first. Where only 0 and 255
    occur, they are the two classes of a binary mask."""
    if names and first + len(names) > 2 ** 16:
        raise InputError(f"--first-label {first}: {len(names)} classes from there on do not fit "
                         "into 16 bits")
    seen = set()
    if not names or len(names) <= 2:                        # binary masks are what goes wrong most
        counts = [count_values(root, records, on_error) for _, records in found.values()]
        seen = set(np.flatnonzero(sum(counts)).tolist())
        if seen == {0, IGNORE} and not first and ignore not in seen and len(names or "12") == 2:
            return BINARY
        if ignore is None:
            refuse_doubtful(root, counts)
    values = range(first, first + len(names)) if names else sorted(
        v for v in seen if v >= first and v not in (IGNORE, ignore))
    if not values:
        raise InputError(f"--data {root}: no label of a class in it")
    if len(values) == 1:
        way = "without classes.txt, --first-label and --ignore-label all values but 255 are classes"
        if first:
            way = "leave out --first-label, and 0 is a class too"
        elif seen == {values[0], IGNORE} and not names:
            way = "255 means no class; save what it marks with another value"
        elif 0 in seen <= {0, 1, IGNORE}:
            way = 'the background is a class too: make "background" the first line of classes.txt'
        raise InputError(f"--data {root}: one class alone ({names[0] if names else values[0]}) is "
                         f"no segmentation; its label maps have the values {sorted(seen)[:8]}; "
                         f"{way}")
    return values


def refuse_doubtful(root, counts):
    """InputError for label maps that surely were saved wrongly; counts: count_values of each part.
    Two values on most pixels and many others on few pixels come from interpolated edges."""
    total, pixels = sum(counts), sum(c.sum() for c in counts)
    between = [v for v in np.flatnonzero(total).tolist() if v not in (0, IGNORE)]
    rest = total[between].sum()
    *few, second, first = np.sort(total[total > 0]) if np.count_nonzero(total) > 2 else (0, 0, 0)
    edges = len(few) > 20 and np.ptp(np.flatnonzero(total)) > 100 and max(few) < 0.02 * pixels \
        and first + second > 0.55 * pixels
    edges |= len(between) > 2 and max(between) > 150 and rest < total[IGNORE]
    if edges or total[IGNORE] > 0.01 * pixels and 0 < rest < 0.001 * pixels:
        raise InputError(f"--data {root}: most pixels of its label maps have two values, {rest} "
                         f"pixels {len(between)} others, {between[:3]}: were they resized with "
                         "interpolation? Resize them again with nearest neighbours, or set each "
                         "pixel to the nearer value; if all are classes, give --ignore-label 255")
    parts = [set(np.flatnonzero(c).tolist()) for c in counts]
    for one, other in (parts, parts[::-1]) if len(parts) == 2 else ():
        if one == {0, IGNORE} and IGNORE not in other and len(other) > 1:
            raise InputError(f"--data {root}: one part's label maps have the values 0 and 255, the "
                             f"other's {sorted(other)[:8]}: save both with the same")


def open_masks(root, on_error, ignore_label, first_label, grading):
    """[training, validation] of photos and label maps; None if the format is another."""
    found = find_pairs(root, PHOTOS, LABELS, on_error, grading)
    if not found:
        return None
    labels, _ = next(iter(found.values()))
    # in ADE20K 0 means unlabelled; other data sets use its folder names, but not its class list
    ade = labels in [root / "annotations" / p for p in ("training", "validation")] \
        and (root / "objectInfo150.txt").exists()
    first = first_label if first_label is not None else int(ade)
    names = class_names(root)
    values = class_values(root, found, names, first, ignore_label, on_error)
    names = names or [str(v) for v in values]
    limit_classes(root, names)
    read = partial(read_semantic, label_table(values, first, ignore_label), values)
    return both_parts(root, found, read, classes=names, category_ids=values)


def label_table(values, first, ignore):
    """Value of a label map -> class, uint16 [65536]: IGNORE for 255, `ignore` and what is less than
    `first`, 256 for values that are no class."""
    table = np.full(2 ** 16, 256, np.uint16)
    table[list(values)] = range(len(values))
    table[:first] = IGNORE
    table[[v for v in (IGNORE, ignore) if v is not None and values is not BINARY]] = IGNORE
    return table


def read_semantic(table, values, record):
    """Record of find_pairs -> {"semantic": uint8 [H, W]}, classes by table, and (H, W); values:
    those of the classes."""
    raw = read_labels(record["label"])                      # a PNG has 16 bits at most
    label = table[raw]
    if (odd := label > IGNORE).any():
        background = ('; if 0 is the background, make "background" the first line of classes.txt, '
                      "or give --first-label 1") if values[0] == 0 else ""
        raise InputError(f"{record['label']}: label {raw[odd][0]}, but the classes are {values[0]} "
                         f"to {values[-1]}{background}; if it is another class, name it in "
                         "classes.txt; if none, --ignore-label leaves it out")
    return {"semantic": label.astype(np.uint8)}, raw.shape


def open_ade_instances(root, keys, on_error, grading):
    """ADE20K's challenge folder -> [training, validation] with panoptic maps, things first in the
    order of the instance challenge; None if there is no annotations_instance."""
    if not (root / "annotations_instance").is_dir():
        return None
    found = find_pairs(root, ("images",), ("annotations",), on_error, grading)
    places = [root / "categoryMapping.txt", root / "annotations_instance" / "categoryMapping.txt",
              root / "ade20k_instance_catid_mapping.txt"]
    place = next((p for p in places if p.is_file()), None)
    names = class_names(root)
    if not found:
        raise InputError(f"--data {root}: annotations_instance/ is there without the photos in "
                         "images/ and the label maps in annotations/")
    if not place or not names:
        raise InputError(f"{places[0]}: this file or objectInfo150.txt is missing; they say which "
                         "classes the instances of ADE20K have")
    try:            # a line of titles, then: instance class, scene parsing class, ... from 1
        rows = [line.split()[:2] for line in read_lines(place)[1:] if line.strip()]
        mapping = [int(b) - 1 for _, b in sorted((int(a), int(b)) for a, b in rows)]
        require(all(0 <= m < len(names) for m in mapping) and len(set(mapping)) == len(mapping)
                and sorted(int(a) for a, _ in rows) == list(range(1, len(rows) + 1)), "numbers")
    except ValueError:
        raise InputError(f"{place}: not a table of instance classes 1, 2, ... and their scene "
                         "parsing classes") from None
    limit_classes(root, names)
    order = mapping + [k for k in range(len(names)) if k not in mapping]
    for _, records in found.values():
        for r in records:
            r["instances"] = Path(root, "annotations_instance",
                                  *r["label"].relative_to(root).parts[1:])
    values = range(1, len(names) + 1)
    semantic = partial(read_semantic, label_table(values, 1, None), values)
    read = partial(read_ade_instances, semantic, np.array(order), len(mapping), keys)
    return both_parts(root, found, read, classes=[names[k] for k in order], things=len(mapping),
                      category_ids=[k + 1 for k in order])


def read_ade_instances(read, order, things, keys, record):
    """Stuff from the label map, then every instance over it, as in Mask2Former's conversion ->
    labels, see panoptic_labels, and (H, W)."""
    labels, size = read(record)
    digits = read_numbers(record["instances"])
    kind, number = digits & 255, digits >> 8 & 255          # class from 1, number of the instance
    if digits.shape != size:
        raise InputError(f"{record['instances']}: another size than {record['label']}")
    rank = np.full(256, IGNORE)
    rank[order] = np.arange(len(order))
    semantic = rank[labels["semantic"]]                     # [H, W] in the new order
    pairs = kind * 256 + number
    if kind.max() > things:
        raise InputError(f"{record['instances']}: instance class {kind.max()}, but the classes are "
                         f"1 to {things}")
    stuff = (semantic >= things) & (semantic != IGNORE)
    region = np.where(pairs >= 256, pairs, np.where(stuff, (semantic + 1) << 16, 0))
    values, number = np.unique(region, return_inverse=True)
    number = number.reshape(size) + int(values[0] != 0)     # 0 = void
    values = values[values != 0]
    classes = np.where(values >> 16, values >> 16, values >> 8) - 1
    found = panoptic_labels(number, np.column_stack([classes, 0 * classes]), {"panoptic"})
    if "semantic" in keys:
        found["semantic"] = semantic.astype(np.uint8)
    return found, size


def open_depth_pairs(root, on_error, scale, grading):
    """[training, validation] of photos and depth maps; None if the format is another."""
    found = find_pairs(root, PHOTOS, DEPTHS, on_error, grading)
    return both_parts(root, found, partial(read_depth, scale)) if found else None


def read_depth(scale, record):
    """Record of photo and 16-bit PNG -> {"depth": float32 [H, W], value / scale = metres, 0 = no
    measurement} and (H, W)."""
    what = "depth must have 16 bits and one channel, whole numbers of 1 / --depth-scale metres"
    values = read_pixels(record["label"], ("I", "I;16", "I;16B"), what)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
        raise InputError(f"{record['label']}: {what}")
    # sensors write the largest value where nothing is in range
    depth = np.where(values == 65535, 0, values).astype(np.float32) / np.float32(scale)
    return {"depth": depth}, depth.shape


def open_lists(root, on_error, scale, grading):
    """BTS's format, where each line of a list names photo, depth map and (not used) focal length ->
    [training, validation], or None without a list of training photos. grading: see open_folder."""
    found = {}
    for part, split in (("train", "train"), ("val", "test")):
        lists = sorted(p for p in root.glob(f"*{split}_files_with_gt.txt") if p.name[0] != ".")
        if len(lists) > 1:
            raise InputError(f"{lists[0]} and {lists[1].name} are both lists of this part; leave "
                             "the one that is meant")
        path = lists[0] if lists else None
        if path is None and grading:
            continue
        if path is None:
            break
        records, lines = [], read_lines(path)
        if not any(lines):
            raise InputError(f"{path}: not a line in it")
        for n, line in enumerate(lines, 1):
            words = line.split()
            if not words:
                continue
            if len(words) < 2:
                raise InputError(f"{path}: line {n} does not name a photo and a depth map")
            places = [[root / p / w.lstrip("/") for w in words[:2]]
                      for p in (split, "", "sync", "train", "test")]
            place = next((p for p in places if all(f.is_file() for f in p)), None)
            if place:
                records.append(dict(photo=place[0], id=words[0], label=place[1]))
            else:
                refuse(f"{path}: line {n}: {' or '.join(words[:2])} is not in {root}", on_error)
        found[part] = path, records
    read = partial(read_depth, scale)
    return both_parts(root, found, read, kinect_frame=True) if found else None


# -----------------------------------------------------------------------------
# Which format


def open_folder(root, keys, on_error="stop", ignore_label=None, first_label=None,
                depth_scale=1000.0, grading=False):
    """[training, validation] Source with the labels named in `keys`; InputError if nothing fits.

    The format is recognised by what lies in the folder. Photos without objects stay in the set
    (DETR's and the evaluation's rule), but not in training with masks (Mask2Former's).
    on_error: "stop" at what is broken, or "skip" it and say so on stderr. Then the values of
    --ignore-label, --first-label (see class_values) and --depth-scale. grading: with --eval a
    validation part alone will do, and stands for both.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder; give a folder, or the word toyworld")
    coco = partial(open_coco, root, keys=keys, on_error=on_error, grading=grading)
    instances = partial(coco, "instance", coco_instances, "instances")
    panoptic = partial(coco, "panoptic", coco_panoptic, "panoptic")
    ade = partial(open_ade_instances, root, keys, on_error, grading)
    ways = {"depth": (partial(open_lists, root, on_error, depth_scale, grading),
                      partial(open_depth_pairs, root, on_error, depth_scale, grading)),
            "keypoints": (partial(coco, "keypoints", coco_instances, "keypoints"),),
            # JSON files that were made of ADE20K's maps lack what its label maps say of things
            "panoptic": (ade, panoptic), "masks": (instances, ade, panoptic),
            "boxes": (instances,),
            "semantic": (partial(open_masks, root, on_error, ignore_label, first_label,
                                 grading),
                         panoptic)}
    kind = next((k for k in ways if k in keys), None)
    if kind is None:
        raise ValueError(f"keys {list(keys)}: give one of {', '.join(ways)}")
    way, sources = next(((w, found) for w in ways[kind] if (found := w())), (None, None))
    if sources and (ignore_label, first_label) != (None, None) and way.func is not open_masks:
        raise InputError(f"--{'ignore' if first_label is None else 'first'}-label: for --tasks "
                         f"semantic with label maps; not for what --data {root} holds, or the "
                         "other tasks; leave it out")
    if not sources:
        instances = False
        with contextlib.suppress(InputError):               # several JSON files that name no part
            instances = kind == "semantic" and any(coco_files(root, "instance"))
        way = "; for the instances that it holds, give --tasks instance" * instances
        raise InputError(f"--data {root}: nothing in it fits; expected {EXPECTED[kind]} (or "
                         f"the word toyworld){way}")
    sources[0].habit["records"] = sources[0].habit["records"] + sources[1].records
    sources[1].habit = sources[0].habit
    for source, part in zip(sources, ("training", "validation")):
        if source.records and not any(map(shows, source.records)):
            crowds = "labels" in source.records[0] and any(
                r["labels"]["iscrowd"].any() for r in source.records)
            raise InputError(f"--data {root}: no object, or no joint, in its whole {part} part"
                             + "; all objects have iscrowd 1, which some tools write for all "
                             "that is painted: set it to 0 in the JSON" * crowds)
    if kind == "masks" and sources[0] is not sources[1] and "labels" in (
            sources[0].records or [{}])[0]:
        alone = [i for i, r in enumerate(sources[0].records) if (~r["labels"]["iscrowd"]).any()]
        sources[0] = sources[0].subset(alone)
    for source, part in zip(sources, ("training", "validation")):
        if not len(source):
            raise InputError(f"--data {root}: no usable photo in its {part} part")
    return sources


def readable(source):
    """The source without unreadable samples, each reported on stderr: every file is read
    once, so that all processes evaluate the same photos. InputError if none is left."""
    good = []
    for i in tqdm(range(len(source)), desc="reading every validation photo once", leave=False,
                  disable=None):
        try:
            source[i]
            good.append(i)
        except InputError as error:
            refuse(str(error), "skip")
    if len(good) < len(source):
        refuse(f"{len(source) - len(good)} of {len(source)} validation photos", "skip")
    if not good:
        raise InputError("no validation photo can be read")
    return source.subset(good)
