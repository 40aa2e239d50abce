"""
Answers of a network -> the official result formats, with the numbers that the data set's files use.

    detections.json, instances.json, keypoints.json     COCO's results, for pycocotools' loadRes
    semantic/NAME.png                                   label maps, the data set's own values
    panoptic.json, panoptic/NAME.png                    COCO's panoptic format, for panopticapi
    depth/NAME.png                                      16 bits, millimetres, at least 1

Every file is written under another name and renamed: it is there as a whole or not at all.
"""
import json
import os
from collections import defaultdict
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image

import draw
from formats.coco import BAD, an_id, as_seen, photo_name, why
from formats.files import InputError, list_images, note, read_json, replacing
from formats.masks import compressed, to_runs

LONGEST = 200                           # bytes of a photo's name that its outputs keep
DEEPEST = 65534                         # mm: 65535 means "not measured" to many tools and to ours


def find(images, out):
    """Files and folders -> [(path of a photo, name of its outputs)]; no two have an output in
    common. Photos below the folder `out` are passed over, unless it is one of the folders, and one
    that is given twice is answered once."""
    pairs = []
    for image in images:
        if not image:
            raise InputError("IMAGE: an empty name; is a variable not set?")
        image = Path(image)
        if image.is_dir():
            pairs += [(p, p.relative_to(image)) for p in list_images(image, flag="", ours=out)]
        else:
            pairs.append((image, Path(image.name)))
    once, taken, found = {}, set(), []
    for path, name in pairs:
        once.setdefault(os.path.realpath(path), (path, name))
    for path, name in once.values():
        if len(os.fsencode(name.name)) > LONGEST:           # endings must fit into 255 bytes, too
            name = name.with_name(os.fsencode(name.name)[:LONGEST].decode(errors="ignore"))
        stem = name.with_suffix("").as_posix()
        names = chain((stem, name.as_posix()), (f"{stem}-{n}" for n in count(2)))
        name = next(n for n in names if not taken & set(pngs(n.lower())))
        taken.update(pngs(name.lower()))
        found.append((path, name))
    return found


def pngs(name):
    """All PNGs that a photo with this name of its outputs may get, below --out."""
    return [f"{part}{name}{end}.png" for part in ("", "semantic/", "panoptic/", "depth/")
            for end in ("", "-attention")]


def keep_photos(pairs, out, given):
    """InputError if an output of find's `pairs` below the folder `out` would replace a photo, one
    of the files `given` (None is none of them), or anything that lies in a folder of photos."""
    inputs = {os.path.realpath(p) for p in (*(path for path, _ in pairs), *given) if p}
    folders = {os.path.dirname(os.path.realpath(path)) for path, _ in pairs}
    outputs = [out / png for _, name in pairs for png in pngs(name)]
    outputs += [out / f"{name}.json" for name in ("detections", "instances", "keypoints",
                                                  "panoptic")]
    for path in outputs:
        real = os.path.realpath(path)
        if real in inputs or os.path.dirname(real) in folders and os.path.exists(real):
            raise InputError(f"--out {out}: {path} is there already, an input or a file beside one,"
                             " and would be overwritten; give a folder elsewhere")


def image_ids(paths, file=None, boxes=None):
    """The id of each photo in result files, int or str.

    file: a COCO annotation file, whose "images" give the ids, by path or by a name that occurs
    once, see coco.as_seen. The id of every other photo is its name, as a number if it is one
    (000000000139.jpg is 139); a note says how many the file does not list. Photos that would share
    an id get their path, with a note; with a file of `boxes` this is an InputError, because an id
    there could mean either photo.
    """
    listed, names, unlisted = {}, defaultdict(set), 0
    for n, entry in enumerate(read_json(file, ["images"])["images"] if file else ()):
        try:
            at, number = photo_name(entry), an_id(entry["id"])
        except BAD as error:
            which = entry.get("id", f"number {n}")
            raise InputError(f"--ids {file}: image {which}: {why(error)}") from None
        # a text stays a text: the official tools compare it with what their file says
        listed[at] = entry["id"] if type(entry["id"]) is str else number
        names[as_seen(at)].add(listed[at])
    listed |= {(name,): ids.pop() for name, ids in names.items() if len(ids) == 1}
    ids, owners = [], defaultdict(set)
    for path in paths:
        ends = ("/".join(path.parts[i:]) for i in range(len(path.parts)))       # the longest first
        end = next((end for end in (*ends, (as_seen(path.name),)) if end in listed), None)
        unlisted += end is None
        number = path.stem.isascii() and path.stem.isdecimal()
        ids.append(listed[end] if end else int(path.stem) if number else path.name)
    if file and unlisted:
        note(f"note: --ids {file}: does not list {unlisted} of {len(paths)} photos; their ids are "
             "their names")
    for path, number in zip(paths, ids):
        owners[an_id(number)].add(os.path.realpath(path))       # --boxes may write 7 for "7"
    if twins := [number for number, those in owners.items() if len(those) > 1]:
        said = f"{' and '.join(sorted(owners[twins[0]])[:2])} both have the id {twins[0]}"
        if boxes:
            raise InputError(f"--boxes {boxes}: {said}, so their boxes cannot be told apart; give "
                             "one folder at a time, or --ids")
        note(f"note: {said}: in result files such photos have their path")
    return [number if len(owners[an_id(number)]) == 1 else path.as_posix()
            for path, number in zip(paths, ids)]


def write_json(content, path):
    """Plain types -> JSON file, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def check(model):
    """InputError if the formats cannot hold what a predict.Model answers."""
    ids = model.category_ids
    if model.task == "pretraining":
        raise InputError("--json: pre-training has no result format; leave it out")
    if "semantic" in getattr(model.args, "tasks", ()) and not 0 <= min(ids) <= max(ids) < 2 ** 16:
        raise InputError(f"--json: the category id {max(ids, key=abs)} does not fit into a label "
                         "map of 16 bits; leave --json out")
    if model.task == "depth" and 1000 * model.args.max_depth > DEEPEST:
        raise InputError(f"--json: a depth map of 16 bits ends at {DEEPEST / 1000} m, this model "
                         f"at --max-depth {model.args.max_depth}; leave --json out")
    if model.task == "pose" and len(ids) > 1:
        note(f"note: keypoints.json says category {ids[0]} for all; grade it with useCats = 0, as "
             "--eval does")


def entries(model, answer, image, name, out):
    """One photo's answer -> {name of a JSON file: its entries}; PNGs are written below `out`.

    model: predict.Model; image: the photo's id; name: path of its PNGs without the ending.
    """
    ids, found = model.category_ids, {}
    if "boxes" in answer and model.task == "detection":
        corner = answer["boxes"].double()
        sides = [*corner[:, :2].T.tolist(), *(corner[:, 2:] - corner[:, :2]).T.tolist()]
        found["detections"] = [
            dict(image_id=image, category_id=ids[k], bbox=list(box), score=score) for k, box, score
            in zip(answer["labels"].tolist(), zip(*sides), answer["scores"].tolist())]
    if "masks" in answer:
        found["instances"] = [
            dict(image_id=image, category_id=ids[k], score=score, segmentation=dict(
                size=list(mask.shape), counts=compressed(to_runs(mask.numpy()))))
            for k, score, mask in zip(answer["labels"].tolist(), answer["scores"].tolist(),
                                      answer["masks"])]
    if "keypoints" in answer:
        found["keypoints"] = [
            dict(image_id=image, category_id=ids[0], keypoints=joints, score=score)
            for joints, score in zip(answer["keypoints"].flatten(1).tolist(),
                                     answer["scores"].tolist())]
    if "semantic" in answer:
        values = np.array(ids, np.uint8 if max(ids) < 256 else np.uint16)
        draw.save(Image.fromarray(values[answer["semantic"].numpy()]), out / f"semantic/{name}.png")
    if "panoptic" in answer:
        found["panoptic"] = [segments(model, answer, image, name, out)]
    if "depth" in answer:
        millimetres = (answer["depth"].double() * 1000).round().clamp(1, DEEPEST)
        draw.save(Image.fromarray(millimetres.numpy().astype(np.uint16)), out / f"depth/{name}.png")
    return found


def segments(model, answer, image, name, out):
    """Write the PNG of a panoptic answer; returns its entry of the JSON file.

    The colour of a pixel is the id of its segment, R + 256 G + 65536 B. Ids are k times a large odd
    number modulo 2^24: all different, and far apart, so that neighbours differ to the eye.
    """
    number = lambda k: k * 0x9E3779B1 % 2 ** 24
    table = np.array([number(k) for k in range(int(answer["panoptic"].max()) + 1)], np.int64)
    digits = table[answer["panoptic"].numpy()][..., None] // (1, 256, 65536) % 256
    draw.save(Image.fromarray(digits.astype(np.uint8)), out / f"panoptic/{name}.png")
    return dict(image_id=image, file_name=f"{name}.png", segments_info=[
        dict(id=number(k), category_id=model.category_ids[label])
        for k, label in answer["segments"].tolist()])
