"""
COCO's files -> Source: instances_*.json (boxes, masks), person_keypoints_*.json, panoptic_*.json.

Whatever they say is checked when they are opened: what is wrong raises InputError; with on_error
"skip" photos that are missing or wrongly annotated are left out. Masks stay outlines until their
photo is read.
"""
import contextlib
import os
import re
import unicodedata
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

from formats.files import (
    IGNORE,
    LABELS,
    PHOTOS,
    SPLITS,
    InputError,
    Source,
    hold_out,
    limit_classes,
    list_images,
    note,
    read_json,
    read_numbers,
    refuse,
)
from formats.masks import mask, stack
from metrics import require
from toyworld import KEYPOINTS

# what reading a malformed entry raises
BAD = (KeyError, TypeError, ValueError, OverflowError, AttributeError)
LISTS = ("images", "annotations", "categories")
# folders of photos whose names say nothing about which photos
USUAL = {*PHOTOS, *sum(SPLITS.values(), ()), "imgs", "data", "raw", "jpegimages"}
KINDS = ("instance", "keypoint", "panoptic", "stuff")       # what a file's name may say it holds


def why(error):
    """What is wrong with an entry, in words, from the error that it raised."""
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def numbers(what, values, count=None, limit=1e6):
    """The values, checked: a list of `count` finite numbers within +-limit px. Quoted numbers are
    converted; all else raises ValueError. what: name of the list in the message."""
    kinds = {*map(type, values)} if isinstance(values, list) else {None}
    if str in kinds:                                        # some tools quote them
        values = [as_number(v) for v in values]
        kinds = {*map(type, values)}
    if not kinds <= {int, float} or count not in (None, len(values)):
        many = f"{count} numbers" if count else "numbers"
        raise ValueError(f"{what} {str(values)[:60]} is no list of {many}")
    if not all(-limit <= v <= limit for v in values):       # NaN neither
        raise ValueError(f"{what} {str(values)[:60]} is not finite or beyond {limit:.0g}")
    return values


def as_number(value):
    """"7", "7.0" and 7.0 -> 7, "7.5" -> 7.5; all else as it is."""
    if type(value) is str and re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", value, re.ASCII):
        return int(value.strip().partition(".")[0])
    if type(value) is str and re.fullmatch(r"\s*[+-]?\d*\.\d+\s*", value, re.ASCII):
        return float(value)
    return int(value) if type(value) is float and value.is_integer() else value


def an_id(value):
    """An id in the one form in which it is compared: tools write 7, 7.0 and "7" for the same."""
    number = as_number(value)
    if type(number) is not int and type(value) is not str:
        raise ValueError(f"{str(value)[:60]} is no id")
    return number if type(number) is int else value


def default(entry, key, value):
    """entry[key], or the value where it is missing or null."""
    found = as_number(entry.get(key))
    return value if found is None else found


def read_categories(path, content, kind):
    """-> list of (category id, name, is it a thing), things first, each in order of the ids.
    Of a file of keypoints only what has joints; in a file of instances all are things."""
    found = []
    for n, entry in enumerate(content["categories"]):
        try:
            require(type(an_id(entry["id"])) is int, "its id must be a whole number")
            require(kind != "panoptic" or entry["isthing"] in (0, 1), "isthing must be 0 or 1")
            found.append((an_id(entry["id"]), str(entry["name"]),
                          kind != "panoptic" or entry["isthing"] == 1))
        except BAD as error:
            raise InputError(f"{path}: category {entry.get('id', f'number {n}')}: {why(error)}") \
                from None
    if not found:
        raise InputError(f"{path}: no category")
    if len({i for i, _, _ in found}) < len(found):
        raise InputError(f"{path}: two categories have the same id")
    if kind == "keypoints":
        wanted = [an_id(e["id"]) for e in jointed(path, content["categories"])[0]]
        found = [c for c in found if c[0] in wanted]
    return sorted(found, key=lambda c: (not c[2], c[0]))


def jointed(path, entries):
    """-> (a file's categories with joints, the names of these joints). All must have the same
    joints (AP-10K's 54 species do), else only "person" counts, with COCO's 17 if it names none."""
    named = [e for e in entries if e.get("keypoints") and isinstance(e["keypoints"], list)]
    found = named or [e | {"keypoints": KEYPOINTS} for e in entries if e.get("name") == "person"]
    if len(kinds := {tuple(map(str, e["keypoints"])) for e in found}) > 1:
        found = [e for e in found if e.get("name") == "person"] or found
        note(f"note: {path}: its categories have different joints; only person is used")
        kinds = {tuple(map(str, e["keypoints"])) for e in found}
    if len(kinds) != 1:
        names = [e.get("name") for e in found]
        raise InputError(f'{path}: a category must name its joints in "keypoints" (the same joints '
                         "in all categories), or be called person and have COCO's joints; found "
                         f"{names or 'none'}")
    joints = kinds.pop()
    if len({n.lower() for n in joints}) < len(joints):
        raise InputError(f"{path}: two joints have the same name")
    return found, joints


def same_categories(path, own, categories):
    """The training file's categories, if the validation file (own) has no others."""
    if categories is not None and not set(own) <= set(categories):
        odd = min(set(own) - set(categories))
        raise InputError(f"{path}: category {odd[0]} ({odd[1]}) is none of the training part's")
    return own if categories is None else categories


def read_images(root, path, content, split, on_error):
    """-> {image id: record with photo, id and size}, ids of photos that are missing."""
    images, broken = {}, set()
    for n, entry in enumerate(content["images"]):
        try:
            i = an_id(entry["id"])
            size = as_number(entry["height"]), as_number(entry["width"])
            require(all(type(s) is int and s > 0 for s in size), f"{size} is no height and width")
            require(i not in images, "two images have this id")
            images[i] = dict(photo=photo_name(entry), id=i, size=size)
        except BAD as error:
            raise InputError(f"{path}: image {entry.get('id', f'number {n}')}: {why(error)}") \
                from None
    place_photos(root, path, split, images, broken, on_error)
    return images, broken


def photo_name(entry):
    """What an entry of "images" calls its photo; raises one of BAD if it does not say."""
    # LVIS gives a web address alone; Windows writes folders with \\
    address = "/".join(str(entry.get("coco_url") or "").split("/")[-2:])
    name = entry.get("file_name") or address or entry["file_name"]
    require(type(name) is str, f"its file_name {str(name)[:60]} is no text")
    require(len(name) <= 1024, f"its file_name {name[:60]}... is too long for a file's name")
    return Path(name.replace("\\", "/")).as_posix()


def folder_of_photos(root, path, split, names):
    """The usual folder that holds one of the photos `names`: the first that the file's own place
    and name say, else the one that holds most of them, with a note if another has such names, too.
    root, if there is none."""
    own = path.parent.relative_to(root).parts                               # Roboflow: beside it
    word = path.stem.split("_")[-1]
    said = [p for p in own if p != "annotations"] + [word, f"images/{word}"]
    # a test part is often there without labels, and its photos may be called alike
    parts = [p for p in (SPLITS[split] if split else sum(SPLITS.values(), ())) if p != "test"]
    parts += [f"images/{p}" for p in parts]
    rest = [*parts, "images", ""] if split else ["images", "", *parts]
    held = {p: [n for n in names if (root / p / n).is_file()]
            for p in dict.fromkeys((*said, *rest, "test", "images/test"))}
    if found := next((p for p in said if held[p]), None):
        return root / found
    folder = max(held, key=lambda p: len(held[p]))          # the first of equals
    for p in held:
        if any(not (root / p / n).samefile(root / folder / n)
               for n in set(held[p]) & set(held[folder])):
            note(f"note: {path}: its photos are taken from {root / folder}; {root / p} holds photos"
                 " of these names, too: if these are meant, give their folder in file_name")
    return root / folder if held[folder] else root


def place_photos(root, path, split, images, broken, on_error):
    """Find each photo: by its exact name in folder_of_photos, or in root; else below root by a
    similar name, see alike. split None: the file is for all parts. Changes `images`, and adds the
    ids of missing photos to `broken`."""
    parts = SPLITS[split] if split else sum(SPLITS.values(), ())
    given = {i: record["photo"] for i, record in images.items()}
    folder = folder_of_photos(root, path, split, [
        n for n in given.values() if not Path(n).is_absolute()][:20])
    there, used = set(os.listdir(folder)), set()            # one look instead of 100,000
    for i, name in given.items():
        here = folder / name
        if name in there or here.is_file() or (here := root / name).is_file():
            images[i]["photo"] = here
            used.add(here)
    missing = [i for i in images if images[i]["photo"] == given[i]]
    # folders named after other parts: only if no listed photo lies elsewhere, or split is None
    foreign = SPLITS["val" if split == "train" else "train"] if split else parts
    near, far = photos_below(root, foreign, missing), photos_below(root, (), missing)
    found = {i: alike(root, near, given[i]) for i in missing}
    if split is None or not used and not any(found.values()):
        found = {i: found[i] or alike(root, far, given[i]) for i in missing}
    # photos whose folders agree are assigned first
    for i in sorted(missing, key=lambda i: -len(seen(given[i]) & seen(*found[i][:1]))):
        if len(found[i]) == 1 and found[i][0] not in used:
            images[i]["photo"] = found[i][0]
            used.add(found[i][0])
            continue
        reason = "no such file, nor one that its name may mean"
        if found[i]:
            reason = f"it may mean {' or '.join(str(p.relative_to(root)) for p in found[i][:2])}" \
                + ", which another entry has" * (len(found[i]) == 1) + "; give its folder too"
        refuse(f"{path}: photo {given[i]} is not in {root}: {reason}", on_error)
        broken.add(i)
    other = [i for i in missing if i not in broken and seen(given[i]) and any(
        bare(p) not in USUAL for p in seen(images[i]["photo"].relative_to(root)) - seen(given[i]))]
    if other:
        note(f"note: {path}: {len(other)} photos are taken from other folders than it names, as "
             f"{images[other[0]]['photo'].relative_to(root)} for {given[other[0]]}")


def as_seen(name):
    """A file's name as people see it, to compare names: tools write URL escapes, accents as two
    characters, and /data/local-files/?d=...; some systems ignore capitals."""
    name = unquote(name).rpartition("?d=")[2].partition("?")[0].replace("\\", "/")
    return unicodedata.normalize("NFC", Path(name).name).casefold()


def photos_below(root, foreign, wanted):
    """{name as people see it: paths} of the photos below a folder, but not in folders of label maps
    or of foreign names, and the names of all their folders; nothing if none is wanted."""
    found, here = {}, set()
    for path in list_images(root) if wanted else ():
        here |= (folders := seen(path.relative_to(root)))
        if not {*map(bare, folders)} & {*foreign, *LABELS}:
            found.setdefault(as_seen(path.name), []).append(path)
    return found, here


def seen(path=""):
    """The folders in a name, as people see them."""
    return {as_seen(p) for p in Path(unquote(str(path)).rpartition("?d=")[2]).parts[:-1]}


def bare(folder):
    """The letters of a folder's name: train2017 -> train."""
    return re.sub("[^a-z]", "", folder.lower())


def alike(root, below, name):
    """The photos of photos_below that this name may mean: those of this file name that lie in each
    of its folders that exists here."""
    photos, here = below
    return [p for p in photos.get(as_seen(name), ())
            if seen(name) & here <= seen(p.relative_to(root))]


def parse_object(entry, count, masks):
    """One annotation -> (box xyxy, area, crowd, joints or None, segmentation or None).
    A missing iscrowd means 0, a missing area that of the box, missing joints that none is labelled;
    count: number of joints, 0 for none. A box of no area is that of the labelled joints, if there
    are two, or with `masks` of the polygons. Raises one of BAD for an invalid entry."""
    box = entry["bbox"] if not count else entry.get("bbox") or [0, 0, 0, 0]
    x, y, w, h = numbers("bbox", box, 4)
    require(w >= 0 and h >= 0, f"its box {box} has a negative side")
    crowd = default(entry, "iscrowd", 0)
    require(crowd in (0, 1), f"iscrowd is {crowd}, not 0 or 1")
    joints = shape = None
    if count:
        joints = np.array(numbers(f"keypoints, {count} x (x, y, v):", entry.get("keypoints") or
                                  [0] * 3 * count, 3 * count), np.float64).reshape(count, 3)
        require(np.isin(joints[:, 2], (0, 1, 2)).all(), "a joint's flag is not 0, 1 or 2")
        clicked = joints[joints[:, 2] > 0, :2]
        if w * h == 0 and len(clicked) > 1:
            (x, y), (w, h) = clicked.min(0).tolist(), (np.ptp(clicked, 0) + 1).tolist()
        if not default(entry, "area", 0):                   # OKS divides by the area
            entry = entry | {"area": None}
    if masks:
        shape = entry["segmentation"]
        require(shape is not None, "has no segmentation, only a box")
        if isinstance(shape, list):
            shape = polygons(shape)
            require(shape, "has no polygon, only a box")
            # arrays: half of the memory of lists
            shape = [np.array(numbers("polygon", s), np.float64) for s in shape]
            require(all(len(s) >= 6 and len(s) % 2 == 0 for s in shape),
                    "a polygon needs three points or more")
            if w * h == 0:
                points = np.concatenate(shape).reshape(-1, 2)
                (x, y), (w, h) = points.min(0).tolist(), np.ptp(points, 0).tolist()
        else:
            require(isinstance(shape, dict) and type(shape["counts"]) in (list, str)
                    and isinstance(shape["size"], list), "its segmentation is no mask")
            shape = shape | {"size": [as_number(n) for n in shape["size"]]}
            if isinstance(shape["counts"], list):
                shape["counts"] = [as_number(n) for n in shape["counts"]]
    area = numbers("area", [default(entry, "area", w * h)], limit=1e12)[0]
    require(area >= 0, f"its area is {area}")
    return (x, y, x + w, y + h), area, bool(crowd), joints, shape


def polygons(shape):
    """A segmentation in COCO's form, a list of polygons [x, y, x, y, ...]; one polygon without the
    outer list, and points as pairs [x, y], are converted; empty polygons are left out."""
    if shape and not isinstance(shape[0], list):
        shape = [shape]
    if shape and all(len(p) == 2 for p in shape):
        shape = [shape]
    return [sum(p, []) if isinstance(p[0], list) else p for p in shape if p]


def coco_instances(root, path, split, kind, keys, on_error, categories=None):
    """instances_*.json or (kind "keypoints") person_keypoints_*.json, a path below root -> Source.
    categories: those of the training file, if this is the validation file."""
    content = read_json(path, LISTS)
    masks = "masks" in keys and kind != "keypoints"         # OKS takes "area" instead
    own = read_categories(path, content, kind)
    # categories with the same joints are one class, so the training part may have other ones
    categories = own if kind == "keypoints" else same_categories(path, own, categories)
    joints = jointed(path, content["categories"])[1] if kind == "keypoints" else ()
    every = {an_id(c["id"]) for c in content["categories"]}
    label = {i: k * (kind != "keypoints") for k, (i, _, _) in enumerate(categories)}
    images, broken = read_images(root, path, content, split, on_error)
    found = {i: [] for i in images}
    for n, entry in enumerate(tqdm(content["annotations"], desc=f"checking {path.name}",
                                   leave=False, disable=None)):
        name = entry.get("id", f"number {n}")
        try:
            require("segments_info" not in entry, "a segment map; expected boxes")
            image, category = an_id(entry["image_id"]), an_id(entry["category_id"])
            require(image in images, f"its image {image!r} is not listed")
            require(type(category) is int, f"its category {category!r} is no whole number")
            require(category in every, f"its category {category} is not listed")
            if category in label:
                parsed = parse_object(entry, len(joints), masks)
                found[image].append((label[category], name, *parsed))
        except BAD as error:
            refuse(f"{path}: annotation {name}: {why(error)}", on_error)
            # a photo with one object left out would teach that nothing is there
            with contextlib.suppress(ValueError):
                broken.add(an_id(entry.get("image_id")))
    usable = [i for i in images if i not in broken]
    if len(usable) < len(images):
        refuse(f"{path}: {len(images) - len(usable)} of {len(images)} photos", "skip")
    records = [images[i] | stacked(found[i], len(joints), masks) for i in usable]
    doubt_boxes(path, records)
    ids, names, _ = zip(*categories)
    return Source(records, partial(read_objects, path, masks), names, len(names), ids,
                  joints=joints)


def doubt_boxes(path, records):
    """A note if boxes lie outside their photo or many reach far out of it: they may be x1 y1 x2 y2,
    not x y w h. InputError for fractions of the photo: nearly all numbers are 1 at most."""
    boxes = [r["labels"]["boxes"] for r in records]
    sizes = np.repeat(np.array([r["size"] for r in records]).reshape(-1, 2), [*map(len, boxes)], 0)
    boxes = np.concatenate([*boxes, np.zeros((0, 4))])
    joints = [r["labels"].get("keypoints", np.zeros((0, 1, 3))) for r in records]
    joints = np.concatenate([*(j[j[..., 2] > 0][:, :2] for j in joints), np.zeros((0, 2))])
    for what, values in (("boxes", boxes[boxes.any(1)]), ("joints", joints)):
        # nearly all: some tools round a little beyond 1
        if values.any() and np.quantile(np.abs(values), 0.95) <= 1.05 and sizes.min() > 2:
            raise InputError(f"{path}: its {what} are fractions of the photo; they must be in "
                             "pixels: multiply x by the width, y by the height")
    outside = (boxes[:, [1, 0]] >= sizes).any(1) | (boxes[:, [3, 2]] > 2 * sizes + 2).any(1)
    beyond = outside | (boxes[:, [3, 2]] > 1.05 * sizes + 1).any(1)
    if outside.any() or beyond.sum() > max(5, 0.05 * len(boxes)):
        note(f"note: {path}: {beyond.sum()} of {len(boxes)} boxes reach beyond their photo; a bbox "
             "is x, y, width, height, in pixels")


def stacked(objects, count, masks):
    """The objects of a photo as a few arrays: small, and forked processes share them."""
    labels, names, boxes, area, crowd, joints, shapes = zip(*objects) if objects else [()] * 7
    record = dict(labels=dict(
        classes=np.array(labels, np.int64), iscrowd=np.array(crowd, bool),
        boxes=np.array(boxes, np.float32).reshape(-1, 4), area=np.array(area, np.float64)))
    if count:
        record["labels"]["keypoints"] = np.array(joints, np.float32).reshape(-1, count, 3)
    return record | (dict(shapes=shapes, names=names) if masks else {})


def read_objects(path, masks, record):
    """Record of coco_instances -> labels, see Source, and (H, W); masks are drawn only now."""
    labels, size = dict(record["labels"]), record["size"]
    if masks:
        def drawn():
            for shape, name in zip(record["shapes"], record["names"]):
                try:
                    yield mask(shape, *size)
                except BAD as error:
                    raise InputError(f"{path}: annotation {name}: {error}") from None
        labels["layers"] = stack(drawn(), len(record["shapes"]), *size)
    return labels, size


def coco_panoptic(root, path, split, kind, keys, on_error, categories=None):
    """panoptic_*.json and the folder of PNGs with its name -> Source; see coco_instances."""
    content, maps = read_json(path, LISTS), path.with_suffix("")
    categories = same_categories(path, read_categories(path, content, kind), categories)
    if "semantic" in keys:
        limit_classes(path, categories)
    label = {i: k for k, (i, _, _) in enumerate(categories)}
    images, broken = read_images(root, path, content, split, on_error)
    for n, entry in enumerate(content["annotations"]):
        image = entry.get("image_id", f"number {n}")
        try:
            require("segments_info" in entry, "has no segments_info; expected a panoptic file")
            image = an_id(image)
            require(image in images, "this image is not listed")
            require("map" not in images[image], "this image has two")
            place = maps / entry["file_name"]
            require(place.is_file(), f"{place} is not there")
            images[image] |= dict(map=place, segments=parse_segments(entry["segments_info"], label))
        except BAD as error:
            refuse(f"{path}: annotation of image {image}: {why(error)}", on_error)
            broken.add(image if type(image) in (int, str) else None)
    for i in images:
        if "map" not in images[i] and i not in broken:
            refuse(f"{path}: image {i} has no annotation", on_error)
            broken.add(i)
    records = [r for i, r in images.items() if i not in broken]
    if len(records) < len(images):
        refuse(f"{path}: {len(images) - len(records)} of {len(images)} photos", "skip")
    ids, names, things = zip(*categories)
    return Source(records, partial(read_panoptic, path, keys), names, sum(things), ids)


def parse_segments(entries, label):
    """segments_info -> int64 [S, 3] of id, class, iscrowd; label: {category id: class}. Raises one
    of BAD for an invalid entry."""
    rows = []
    for s in entries:
        number, kind, crowd = an_id(s["id"]), an_id(s["category_id"]), default(s, "iscrowd", 0)
        require(kind in label, f"category {kind} is not listed")
        require(type(number) is int and 0 < number < 2**24, f"segment id {number}")
        require(crowd in (0, 1), "iscrowd is not 0 or 1")
        rows.append((number, label[kind], crowd))
    require(len({r[0] for r in rows}) == len(rows), "two segments have the same id")
    return np.array(rows, np.int64).reshape(-1, 3)


def read_panoptic(path, keys, record):
    """Record of coco_panoptic -> labels, (H, W); segments get the ids 1..S in the file's order. One
    without a pixel (Mask2Former's conversion of ADE20K draws things over stuff) stays: it is not
    learned, but missed, as by panopticapi."""
    ids, segments = read_numbers(record["map"]), record["segments"]
    if ids.shape != record["size"]:
        raise InputError(f"{record['map']}: {list(ids.shape)} pixels, but {path} says "
                         f"{list(record['size'])}")
    order = segments[:, 0].argsort()
    listed = np.append(0, segments[order, 0])
    at = listed.searchsorted(ids).clip(max=len(order))                      # [H, W] 0..S
    if (odd := listed[at] != ids).any():
        raise InputError(f"{record['map']}: segment {ids[odd][0]} is drawn, but {path} does not "
                         "list it")
    number = np.append(0, order + 1)[at]
    return panoptic_labels(number, segments[:, 1:], keys), record["size"]


def panoptic_labels(number, segments, keys):
    """Map [H, W] of segments 1..S, 0 = void, and their class and iscrowd [S, 2] -> the labels
    that `keys` name: semantic uint8, panoptic uint8 or int32 [H, W], segments int64 [S, 3]."""
    labels = {"semantic": np.append(segments[:, 0], IGNORE)[number - 1].astype(np.uint8)} \
        if "semantic" in keys else {}
    if set(keys) & {"panoptic", "masks"}:
        ids = np.arange(1, len(segments) + 1)
        labels |= dict(panoptic=number.astype(np.uint8 if len(ids) < 256 else np.int32),
                       segments=np.column_stack([ids, segments]).astype(np.int64))
    return labels


def open_coco(root, word, read, kind, keys, on_error, grading):
    """[training, validation] from the JSON files with `word` in their names; None without them.
    read: coco_instances or coco_panoptic, to which kind and keys go; grading: see open_folder."""
    files = coco_files(root, word)
    if grading and files[0] is None and files[1] is not None:
        return [read(root, files[1], "val", kind, keys, on_error)] * 2
    if files[0] is None and files[1] is not None:
        raise InputError(f"{files[1]}: a validation part without a training part; put train "
                         "into the training file's name; if this one is for both, take val out")
    if files[0] is None:
        return None
    train = read(root, files[0], "train" if files[1] else None, kind, keys, on_error)
    if files[1] is None:
        return hold_out(root, train)
    categories = [(i, name, k < train.things)
                  for k, (i, name) in enumerate(zip(train.category_ids, train.classes))]
    val = read(root, files[1], "val", kind, keys, on_error, categories)
    if val.joints != train.joints:
        raise InputError(f"{files[1]}: other joints than the training part's")
    return [train, val]


def is_coco(path):
    """Whether a JSON file can be read and has the lists of COCO's."""
    try:
        return bool(read_json(path, LISTS))
    except InputError:
        return False


def coco_files(root, word):
    """[training, validation] file, None where there is none.

    Those with `word` in their names; for instances and keypoints, if there are none, those that
    name no kind but are COCO's inside, as labelling tools write them: train.json, or
    train/_annotations.coco.json beside its photos (Roboflow). A single file that names no part,
    such as result.json, holds both parts.
    """
    parts = [root / s for s in sum(SPLITS.values(), ())]
    every = [p for place in (root / "annotations", root, *parts)
             for p in sorted(place.glob("*.json")) if p.name[0] != "."]
    found = [p for p in every if word in p.name.lower()]
    if not found and word != "panoptic":
        found = [p for p in every if not any(k in p.name.lower() for k in KINDS) and is_coco(p)]
    files = []
    for names in (SPLITS["train"], SPLITS["val"]):
        own = []
        for name in names:                      # "test" only without "val"
            own = own or [p for p in found if p not in files and names_part(p, root) == name]
        if len(own) > 1:
            raise InputError(f"--data {root}: {' and '.join(below(own[:2], root))} are both there; "
                             "keep one of them")
        files += own or [None]
    if len(found) == 1 and files == [None, None]:
        return [found[0], None]
    if len(found) > 1 and files == [None, None]:
        raise InputError(f"--data {root}: {' or '.join(below(found[:2], root))}? The name of the "
                         "training file must have train in it, the other's val")
    for path in found:
        if path not in files and any(files) and is_coco(path):
            note(f"note: {path} is not used; "
                 f"{' and '.join(below(filter(None, files), root))} are")
    return files


def below(paths, root):
    """Paths as texts from root on: Roboflow's files of all parts have one name."""
    return [p.relative_to(root).as_posix() for p in paths]


def names_part(path, root):
    """The word of SPLITS that a JSON file's name or its folder says, or None: in train2017 and
    trainval it is train, in annotations_validated none."""
    words = [w.lower() for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", path.stem)]
    words = [w.removesuffix("set") for w in words]
    if path.parent.parent == root and path.parent.name != "annotations":
        words.append(path.parent.name.lower())
    return next((s for s in sum(SPLITS.values(), ()) for w in words
                 if w in (s, f"{s}val", f"mini{s}", f"{s}dev")), None)
