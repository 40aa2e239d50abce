"""
Pictures of photos and of what networks answer, with PIL alone. The training scripts draw their
samples, and predict.py draws its answers, with the same functions.

Photos are uint8 [3, H, W]; every function that draws returns a PIL image. Small photos are enlarged
by a whole factor to at most `room` px, so that names fit on them; on large ones letters and lines
grow. Pixels outside the objects and their labels stay those of the (enlarged) photo.
"""
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from formats.files import IGNORE, replacing
from toyworld import SKELETON

ROOM, SAMPLE = 640, 320                 # px: the longer side of pictures and of training samples
# Okabe and Ito's colours, which colour-blind people can tell apart. The order keeps neighbours in
# a list of classes far apart; after seven the same hues come back lighter, then darker
HUES = np.array([[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178],
                 [213, 94, 0], [204, 121, 167]])
# viridis: equal steps look equal, and grow darker in print and for the colour-blind as well
VIRIDIS = np.array([[253, 231, 37], [170, 220, 50], [92, 200, 99], [39, 173, 129], [33, 144, 141],
                    [44, 113, 142], [59, 81, 139], [71, 44, 122], [68, 1, 84]])


@cache
def palette():
    """Colours of classes 0, 1, ..., uint8 [256, 3]; the ignored label's is black."""
    k = np.arange(256)
    colours = HUES[k % 7].astype(float)
    lighter, darker = k // 7 % 3 == 1, k // 7 % 3 == 2
    colours[lighter] += 0.5 * (255 - colours[lighter])
    colours[darker] *= 0.6
    colours[IGNORE] = 0
    return colours.round().astype(np.uint8)


def colour_of(k):
    """Colour of class or object k: (r, g, b), each 0..255."""
    return tuple(palette()[int(k) % IGNORE].tolist())


# -----------------------------------------------------------------------------
# Canvas


def canvas(photo, room=ROOM):
    """uint8 [3, H, W] -> PIL image, enlarged by a whole factor, and the factor."""
    image = Image.fromarray(np.ascontiguousarray(photo.permute(1, 2, 0).numpy()))
    zoom = max(1, room // max(image.size))
    size = image.width * zoom, image.height * zoom
    return (image.resize(size, Image.BICUBIC) if zoom > 1 else image), zoom


def save(image, path):
    """Write a PNG as a whole or not at all, and the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f".{os.getpid()}") as temporary:     # two --eval may run in one folder
        image.save(temporary, format="PNG", compress_level=1)


def beside(images, gap=0):
    """PIL images in a row, top aligned, on white."""
    size = sum(i.width for i in images) + gap * (len(images) - 1), max(i.height for i in images)
    row, left = Image.new("RGB", size, "white"), 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def sample(images):
    """PIL images in a row, each at most ROOM px wide and high: a camera's photos would make
    pictures of gigabytes."""
    row = beside(images)
    row.thumbnail((ROOM * len(images), ROOM), Image.BICUBIC)
    return row


def below(images):
    """PIL images in a column, left aligned, on white."""
    column = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)),
                       "white")
    top = 0
    for image in images:
        column.paste(image, (0, top))
        top += image.height
    return column


# -----------------------------------------------------------------------------
# Labels


font = cache(ImageFont.load_default)


def letters(side):
    """Height of letters in px for a picture whose longer side has so many px."""
    return max(12, round(side / 50))


def fitted(text, size, width):
    """The text and a font that fit into `width` px: letters shrink to 9 px, then text is cut."""
    while size > 9 and font(size).getlength(text) > width:
        size -= 1
    while len(text) > 1 and font(size).getlength(text) > width:
        text = text[:-2] + "…"
    return text, font(size)


class Labels:
    """Names on a picture that keep clear of its border and of each other."""

    def __init__(self, image):
        self.draw, self.width, self.height = ImageDraw.Draw(image), *image.size
        self.size, self.taken = letters(max(image.size)), np.zeros((0, 4))

    def put(self, text, colour, spots):
        """Write the text at the first free spot; where all are taken, leave it out.

        colour: (r, g, b); spots: function (width, height of the label) -> list of its left top
        corners, best first.
        """
        if not text:
            return
        pad = self.size // 4
        text, face = fitted(text, self.size, self.width - 2 * pad)
        w, h = round(face.getlength(text)) + 2 * pad, face.size + 2 * pad
        last = max(0, self.width - w), max(0, self.height - h)
        tried = [(min(max(0, x), last[0]), min(max(0, y), last[1])) for x, y in spots(w, h)]
        # then up and down from the best one
        x, y = tried[0]
        tried += [(x, min(max(0, y + step * h), last[1])) for k in range(1, 4) for step in (k, -k)]
        for x, y in tried:
            t = self.taken
            if not ((t[:, 0] < x + w) & (x < t[:, 2]) & (t[:, 1] < y + h) & (y < t[:, 3])).any():
                break
        else:
            return
        self.taken = np.vstack([self.taken, [x, y, x + w, y + h]])
        dark = np.dot(colour, (0.299, 0.587, 0.114)) < 120
        self.draw.rectangle((x, y, x + w - 1, y + h - 1), tuple(colour))
        self.draw.text((x + w / 2, y + h / 2), text, "white" if dark else "black", face,
                       anchor="mm")


def ticks(low, high, count=5):
    """Round numbers within low..high, about `count`: float [n]."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step = next(step * f for f in (1, 2, 5, 10, 20) if (high - low) / (step * f) <= count)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


# -----------------------------------------------------------------------------
# One function for each kind of answer


def stroke(image):
    """Width of lines in px."""
    return max(2, round(max(image.size) / 260))


def boxes(photo, found, labels, texts, room=ROOM):
    """Boxes float [N, 4] x1 y1 x2 y2 photo px, with texts, coloured by label; the first on top."""
    (image, zoom), found = canvas(photo, room), np.asarray(found, np.float64).reshape(-1, 4)
    draw, width, names = ImageDraw.Draw(image), stroke(image), Labels(image)
    edge = max(1, width // 3)
    corners = (found * zoom).round().astype(int)
    corners[:, 2:] = np.maximum(corners[:, 2:] - 1, corners[:, :2])         # the last pixel inside
    for (x, y, right, bottom), label in list(zip(corners.tolist(), labels))[::-1]:
        # a dark edge shows the line on white photos, a bright line shows on black ones
        draw.rectangle((x - edge, y - edge, right + edge, bottom + edge), None, "black",
                       width + 2 * edge)
        draw.rectangle((x, y, right, bottom), None, colour_of(label), width)
    for (x, y, right, bottom), label, text in zip(corners.tolist(), labels, texts):
        names.put(text, colour_of(label), lambda w, h, x=x, y=y, r=right, b=bottom: [
            (x, y - h), (x, y), (r - w, y - h), (r - w, y), (x, b - h), (x, b), (r - w, b - h)])
    return image


def regions(photo, numbers, colours, texts, room=ROOM, strength=0.5):
    """Regions of a map int [H, W] over the photo: 0 is none, k has colours[k - 1], texts[k - 1].

    Each is blended with the photo inside a solid contour; its text stands where it is widest.
    """
    image, zoom = canvas(photo, room)
    width, numbers = stroke(image), np.asarray(numbers, np.int32)
    if not numbers.any():
        return image
    table = np.vstack([[0, 0, 0], np.reshape(colours, (-1, 3))]).astype(np.uint8)
    names, large = Labels(image), numbers.repeat(zoom, 0).repeat(zoom, 1)
    weight = np.where(large > 0, np.uint8(255 * strength), np.uint8(0))
    half = max(1, width // 2)                               # on both sides of every border
    for axis in (0, 1):
        a, b, w, v = (np.moveaxis(x, axis, 0)[y] for x in (large, weight)
                      for y in (slice(half, None), slice(None, -half)))
        border = a != b
        w[border & (a > 0)] = v[border & (b > 0)] = 240
    image.paste(Image.fromarray(table[large]), mask=Image.fromarray(weight))
    for k in np.argsort(-np.bincount(numbers.ravel(), minlength=len(texts) + 1)[1:],
                        kind="stable").tolist():
        if place := widest(numbers, k + 1):
            x, y = (zoom * v for v in place)
            names.put(texts[k], colours[k], lambda w, h, x=x, y=y: [
                (x - w / 2, y - h / 2), (x - w / 2, y), (x - w / 2, y - h), (x, y), (x - w, y)])
    return image


def widest(numbers, k):
    """(x, y) of the middle of the largest disk inside region k; None if it has no pixel."""
    step = max(1, max(numbers.shape) // 160)                # a coarse look is enough
    inside = numbers[::step, ::step] == k
    if not inside.any():
        inside, step = numbers == k, 1
    if not inside.any():
        return None
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return (x + 0.5) * step, (y + 0.5) * step


def semantic(photo, labels, names, room=ROOM):
    """Class map uint8 [H, W], IGNORE = no class; names: those of the classes."""
    labels = np.asarray(labels).astype(np.int32)
    return regions(photo, np.where(labels == IGNORE, 0, labels + 1), palette()[:len(names)],
                   names, room)


def instances(photo, masks, texts, room=ROOM):
    """Masks bool [N, H, W], best first and on top, each in a colour of its own."""
    numbers = np.zeros(photo.shape[1:], np.int32)
    for k in range(len(masks) - 1, -1, -1):
        numbers[np.asarray(masks[k])] = k + 1
    return regions(photo, numbers, [colour_of(k) for k in range(len(texts))], texts, room, 0.55)


def panoptic(photo, ids, classes, names, things, room=ROOM):
    """Segment ids [H, W], 0 = void, and {id: class}: things in bright colours, one after the other,
    stuff in the dark colour of its class."""
    listed, ids = sorted(classes), np.asarray(ids)
    numbers = np.where(ids > 0, np.searchsorted(listed, ids) + 1, 0)
    objects, colours = 0, []
    for i in listed:
        thing = classes[i] < things
        colours.append(HUES[objects % 7] if thing else np.array(colour_of(classes[i])) * 0.6)
        objects += thing
    colours = np.array(colours).reshape(-1, 3).astype(np.uint8).tolist()
    return regions(photo, numbers, colours, [names[classes[i]] for i in listed], room)


def depth_range(depth, share=0.0):
    """Least and greatest valid depth (> 0) in metres, without `share` of the pixels at either end;
    0, 0 if there is none."""
    valid = np.asarray(depth)[np.asarray(depth) > 0]
    return tuple(np.quantile(valid, (share, 1 - share)).tolist()) if valid.size else (0.0, 0.0)


def depth_map(depth, low, high):
    """Depth [H, W] in metres -> colours uint8 [3, H, W], low = light yellow, high = dark violet,
    values beyond them are clipped; 0 = invalid = black."""
    depth = np.asarray(depth)
    at = ((depth - low) / max(high - low, 1e-9)).clip(0, 1)
    colours = scale()[(at * 255).round().astype(np.uint8)] * (depth > 0)[..., None]
    return torch.from_numpy(colours.astype(np.uint8)).permute(2, 0, 1)


@cache
def scale():
    """The colours of 256 depths, near to far, uint8 [256, 3]."""
    at = np.linspace(0, len(VIRIDIS) - 1, 256)
    return np.stack([np.interp(at, np.arange(len(VIRIDIS)), c) for c in VIRIDIS.T], 1).round() \
        .astype(np.uint8)


def skeletons(photo, keypoints, sure, texts, bones=SKELETON, room=ROOM):
    """Persons' keypoints [P, J, 2] as COCO counts photo px (the centre of pixel i at i), sure float
    [P, J] in 0..1; a colour per person.

    Joints are dots, or rings if `sure` is below 0.5; joints of 0.2 or less and their bones are left
    out. The text stands above the highest joint.
    """
    image, zoom = canvas(photo, room)
    draw, names = ImageDraw.Draw(image), Labels(image)
    width = 3 * stroke(image) // 2
    persons = [((np.asarray(p) + 0.5) * zoom, np.asarray(s), colour_of(i))
               for i, (p, s) in enumerate(zip(keypoints, sure))]
    for points, score, colour in persons[::-1]:
        seen = score > 0.2
        for shade, more in (("black", 2), (colour, 0)):         # a dark edge, as for boxes
            for a, b in bones:
                if seen[a] and seen[b]:
                    draw.line((*points[a], *points[b]), shade, width + more)
        for (x, y), s in zip(points[seen], score[seen]):
            r = width + 1
            draw.ellipse((x - r, y - r, x + r, y + r), colour if s >= 0.5 else "white",
                         "black", max(1, width // 3))
    for (points, score, colour), text in zip(persons, texts):
        if (score > 0.2).any():
            x, y = points[score > 0.2][points[score > 0.2][:, 1].argmin()]
            names.put(text, colour, lambda w, h, x=x, y=y: [
                (x - w / 2, y - h - 3 * width), (x + 3 * width, y - h / 2),
                (x - w - 3 * width, y - h / 2)])
    return image
