"""ToyWorld on disk, in the official formats, so that every real loader can be tried without a
download; and a contact sheet to look at.

    python -m formats.export --preview sheet.png
    python -m formats.export --out data/toy --format coco --count 100  # or imagenet, ade20k, nyu
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import draw
from formats.masks import to_runs
from toyworld import CLASSES, FOCAL, KEYPOINTS, SKELETON, SPLIT_START, THINGS, scene


def export(root, kind, count, size, seed, split):
    """Write `count` scenes, `size` px a side, of a split ("train", "val") below root; kind:
    "imagenet", "coco", "ade20k" or "nyu"."""
    root, pairs = Path(root), []
    coco = {"instances": [], "person_keypoints": [], "panoptic": []}
    for i in tqdm(range(count), desc=f"{kind} {split}"):
        s = scene(seed, SPLIT_START[split] + i, size)
        if kind == "imagenet":  # the folder names the largest object
            name = THINGS[s["classes"][s["masks"].sum((1, 2)).argmax()]]
            files = {f"{split}/{name}/{i:06d}.jpg": s["image"]}
        elif kind == "ade20k":  # 0 means unlabelled there
            at = f"{dict(train='training', val='validation')[split]}/ADE_{split}_{i:08d}"
            files = {f"images/{at}.jpg": s["image"], f"annotations/{at}.png": s["semantic"] + 1}
        elif kind == "nyu":  # 16 bit, millimetres; each line of the list: photo, depth, focal
            at = dict(train="train", val="test")[split]
            files = {f"{at}/rgb_{i:05d}.jpg": s["image"],
                     f"{at}/sync_depth_{i:05d}.png": np.uint16((s["depth"] * 1000).round())}
            pairs.append(" ".join([*files, f"{FOCAL * size:.4f}\n"]))
        else:  # the colour of a panoptic pixel is its segment id = R + 256 G + 65536 B
            ids = np.uint8(s["panoptic"][..., None] // (1, 256, 65536) % 256)
            files = {f"{split}2017/{i:012d}.jpg": s["image"],
                     f"annotations/panoptic_{split}2017/{i:012d}.png": ids}
            for found, more in zip(coco.values(), coco_annotations(s, i)):
                found += more
        for path, pixels in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path, quality=95)

    if kind == "nyu":
        (root / f"nyudepthv2_{at}_files_with_gt.txt").write_text("".join(pairs), encoding="utf-8")
    images = [dict(id=i, file_name=f"{i:012d}.jpg", height=size, width=size) for i in range(count)]
    for key, found in coco.items() if kind == "coco" else ():
        names = dict(instances=THINGS, person_keypoints=("person",), panoptic=CLASSES)[key]
        categories = [dict(id=category_id(k), name=n, isthing=int(n in THINGS))
                      for k, n in enumerate(names)]
        if key == "person_keypoints":  # COCO counts the joints of a skeleton from 1
            skeleton = [(a + 1, b + 1) for a, b in SKELETON]
            categories[0].update(keypoints=KEYPOINTS, skeleton=skeleton)
        content = json.dumps(dict(images=images, categories=categories, annotations=found))
        (root / f"annotations/{key}_{split}2017.json").write_text(content, encoding="utf-8")


def category_id(k):
    """Class -> COCO category id 3, 7, 11, ...: sparse, as are the 80 ids of COCO up to 90."""
    return 4 * k + 3


def coco_annotations(s, image_id):
    """One scene -> three lists, its entries in the instance, keypoint and panoptic files."""
    instances, poses, segments = [], [], []
    for k, (box, mask) in enumerate(zip(s["boxes"].tolist(), s["masks"])):
        instances.append(dict(
            id=100 * image_id + k + 1, image_id=image_id, iscrowd=0, area=int(mask.sum()),
            category_id=category_id(s["classes"][k].item()),
            bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]],  # x, y, width, height
            segmentation=dict(counts=to_runs(mask), size=mask.shape)))
        pose = s["keypoints"][k]
        if s["classes"][k] == THINGS.index("person"):
            poses.append(dict(instances[-1], keypoints=pose.ravel().tolist(),
                              num_keypoints=int((pose[:, 2] > 0).sum())))
    for i in np.unique(s["panoptic"]).tolist():
        mask = s["panoptic"] == i
        c = category_id(s["semantic"][mask][0].item())
        segments.append(dict(id=i, category_id=c, area=int(mask.sum()), iscrowd=0))
    panoptic = dict(image_id=image_id, file_name=f"{image_id:012d}.png", segments_info=segments)
    return instances, poses, [panoptic]


def preview(file, count, size, seed):
    """Write a contact sheet, a scene to a row: photo | classes | depth | boxes | poses, in which
    hidden joints are rings."""
    rows, room = [], draw.SAMPLE
    for i in range(count):
        s = scene(seed, i, size)
        photo, joints = torch.from_numpy(s["image"]).permute(2, 0, 1), s["keypoints"]
        depth = draw.depth_map(s["depth"], *draw.depth_range(s["depth"]))
        names = [CLASSES[k] for k in s["classes"]]
        rows.append(draw.beside([
            draw.canvas(photo, room)[0], draw.semantic(photo, s["semantic"], CLASSES, room),
            draw.canvas(depth, room)[0], draw.boxes(photo, s["boxes"], s["classes"], names, room),
            draw.skeletons(photo, joints[..., :2], 0.45 * joints[..., 2], [""] * len(joints),
                           room=room)]))
    draw.save(draw.below(rows), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write ToyWorld to disk, or look at it.")
    parser.add_argument("--preview", help="write a contact sheet to this file")
    parser.add_argument("--out", help="write a data set to this folder")
    parser.add_argument("--format", default="coco", choices=("imagenet", "coco", "ade20k", "nyu"))
    parser.add_argument("--count", type=int, default=12, help="scenes (of each split)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.preview:
        preview(args.preview, args.count, args.size, args.seed)
    for split in SPLIT_START if args.out else ():
        export(args.out, args.format, args.count, args.size, args.seed, split)
