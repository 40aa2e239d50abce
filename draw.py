"""
Pictures of what went in, what was true and what came out, as uint8 tensors [3, H, W] and PNGs.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import draw_keypoints

from data import IGNORE
from toyworld import SKELETON


def save_picture(rows, path, at_least=480):
    """Stack pictures [3, H, W] of unequal sizes into one PNG, small ones enlarged."""
    width = max(r.shape[2] for r in rows)
    canvas = torch.cat([F.pad(r, (0, width - r.shape[2])) for r in rows], 1)
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    zoom = max(1, at_least // picture.width)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST).save(path)


def beside(image, size, *pictures):
    """The photo [3, H, W] scaled to size (H0, W0), then pictures [3, H0, W0]: [3, H0, n W0]."""
    image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return torch.cat([image.round().clamp(0, 255).byte(), *pictures], 2)


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


def skeletons(image, keypoints, visible, at_least=320):
    """Photo uint8 [3, H, W] with persons drawn in: [3, zoom H, zoom W], small photos enlarged.

    keypoints [P, 17, 2] photo px; visible bool [P, 17], the joints to draw. White bones, and
    dots in a colour per person.
    """
    zoom = max(1, at_least // image.shape[2])
    image = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    for i, (points, seen) in enumerate(zip(keypoints, visible)):
        points, seen = (torch.as_tensor(v)[None] for v in (points * zoom, seen))
        image = draw_keypoints(image, points, list(SKELETON), tuple(palette()[i % 250].tolist()),
                               radius=zoom, width=zoom, visibility=seen)
    return image
