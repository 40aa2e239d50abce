"""
Pictures of what went in, what was true and what came out, as uint8 tensors [3, H, W] and PNGs.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from data import IGNORE
from toyworld import SKELETON


def save_picture(rows, path, room=480):
    """Stack pictures [3, H, W] of unequal sizes into one PNG, enlarged while `room` px allow."""
    width = max(r.shape[2] for r in rows)
    canvas = torch.cat([F.pad(r, (0, width - r.shape[2])) for r in rows], 1)
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    zoom = max(1, room // picture.width)
    Path(path).parent.mkdir(exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST).save(path)


def palette(count=256):
    """Distinct colours for labels, uint8 [count, 3]; the ignore label is black."""
    step = np.arange(count)[:, None] * np.array([0.618034, 0.381966, 0.236068]) + [0, 0.33, 0.67]
    colours = (80 + 175 * (step % 1)).astype(np.uint8)
    if count > IGNORE:
        colours[IGNORE] = 0
    return torch.from_numpy(colours)


def label_map(labels):
    """Class map uint8 [H, W] -> colours uint8 [3, H, W]."""
    return palette()[labels.long()].permute(2, 0, 1)


def boxed(image, boxes, labels):
    """Boxes float [N, 4] x1 y1 x2 y2 over the photo uint8 [3, H, W], coloured by label."""
    if not len(boxes):
        return image
    colours = [tuple(c) for c in palette()[labels % IGNORE].tolist()]
    edges = torch.stack([boxes[:, :2], boxes[:, 2:] - 1], 1).round()        # the last pixel inside
    edges = torch.stack([edges.amin(1), edges.amax(1)], 1).flatten(1)
    return draw_bounding_boxes(image, edges, colors=colours, width=1 + min(image.shape[1:]) // 300)


def numbered(numbers):
    """Numbers of objects int [H, W], 0 = none -> labels of label_map."""
    return torch.where(numbers > 0, (numbers.int() - 1) % IGNORE, IGNORE)


def instance_map(masks, scores, at_least=0.5):
    """Masks bool [N, H, W] -> colours uint8 [3, H, W], one per object, black where there is none;
    the surest on top, those of a lower score than at_least left out."""
    numbers = torch.zeros(masks.shape[1:], dtype=torch.int32)
    for k in scores.argsort().tolist():
        if scores[k] >= at_least:
            numbers[masks[k]] = k + 1
    return label_map(numbered(numbers))


def panoptic_map(ids, classes, things):
    """Segment ids [H, W] and {id: class} -> colours uint8 [3, H, W]: a dark one per class of
    stuff, a bright one per thing, void is black."""
    labels, bright = torch.full(ids.shape, IGNORE), torch.zeros(ids.shape, dtype=torch.bool)
    objects = 0
    for segment, label in classes.items():
        mask = ids == segment
        if label < things:
            objects, label = objects + 1, objects % IGNORE
            bright |= mask
        labels[mask] = label
    return torch.where(bright, label_map(labels), label_map(labels) // 2)


# near to far: light to dark, so that the order survives without colour; black means invalid
DEPTHS = np.array([[255, 240, 170], [253, 175, 85], [235, 95, 80], [165, 50, 130], [85, 40, 150],
                   [35, 35, 90]])


def depth_range(depth):
    """Least and greatest valid depth (> 0) in metres; 0, 0 if there is none."""
    valid = depth[depth > 0]
    return (valid.min().item(), valid.max().item()) if valid.numel() else (0.0, 0.0)


def depth_map(depth, low, high):
    """Depth [H, W] in metres -> colours uint8 [3, H, W], low = light yellow, high = dark blue,
    what lies beyond them like the end of the scale; 0 = invalid = black."""
    depth = depth.numpy()
    at = (depth - low) / max(high - low, 1e-9) * (len(DEPTHS) - 1)          # 0..5 on the scale
    colours = np.stack([np.interp(at, np.arange(len(DEPTHS)), c) for c in DEPTHS.T])
    return torch.from_numpy((colours * (depth > 0)).round().astype(np.uint8))


def skeletons(image, keypoints, visible, bones=SKELETON, at_least=320):
    """Photo uint8 [3, H, W] with persons drawn in: [3, zoom H, zoom W], small photos enlarged.

    keypoints [P, J, 2] photo px; visible bool [P, J], the joints to draw; bones: pairs of joints.
    White bones, and dots in a colour per person.
    """
    zoom = max(1, at_least // image.shape[2])
    image = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    for i, (points, seen) in enumerate(zip(keypoints, visible)):
        points, seen = (torch.as_tensor(v)[None] for v in (points * zoom, seen))
        image = draw_keypoints(image, points, list(bones), tuple(palette()[i % 250].tolist()),
                               radius=zoom, width=zoom, visibility=seen)
    return image
