"""
Whole pictures: an answer of predict.py's models beside or over its photo, with titles and scales.
"""
import numpy as np
from PIL import Image, ImageDraw

import draw
import pose


def titled(images, titles):
    """PIL images in a row, each under its title: PIL image."""
    size = draw.letters(max(max(i.size) for i in images))
    columns = []
    for image, title in zip(images, titles):
        strip = Image.new("RGB", (image.width, 2 * size), "white")
        text, face = draw.fitted(title, size, image.width)
        ImageDraw.Draw(strip).text((image.width // 2, size), text, "black", face, anchor="mm")
        columns.append(draw.below([strip, image]))
    return draw.beside(columns, gap=size // 2)


def ruler(width, size, low, high):
    """The colours of depth_map from low to high metres with round numbers below: PIL image."""
    strip = Image.new("RGB", (width, 3 * size), "white")
    bar = draw.scale()[np.linspace(0, 255, width - 2 * size).astype(int)]
    strip.paste(Image.fromarray(bar[None].repeat(size, 0)), (size, size // 2))
    wide = draw.font(size).getlength(f"{high:.4g} m") * 1.6 / (width - 2 * size)
    pen, right = ImageDraw.Draw(strip), 0
    for value in draw.ticks(low, high, 1 / wide):
        x = size + (value - low) / max(high - low, 1e-9) * (width - 2 * size)
        text = f"{value:.4g} m"
        long = draw.font(size).getlength(text)
        left = min(max(0, x - long / 2), width - long)
        if left >= right:
            pen.line((x, size, x, 1.7 * size), "black", max(1, size // 12))
            pen.text((left, 1.75 * size), text, "black", draw.font(size))
            right = left + long
    return strip


def depth(depth, low, high):
    """Depth map [H, W] in metres in colours, and its scale below it: PIL image."""
    image = draw.canvas(draw.depth_map(depth, low, high))[0]
    size = draw.letters(max(image.size))
    return draw.below([image, ruler(max(image.width, 12 * size), size, low, high)])


def heat(photo, weights, room=draw.ROOM):
    """Weights float [H, W] >= 0 over the darkened photo, the largest in light yellow: PIL image."""
    image, zoom = draw.canvas(photo, room)
    weights = np.asarray(weights, np.float64)
    at = (255 * weights / max(weights.max(), 1e-12)).round().astype(np.uint8)
    colour = Image.fromarray(draw.scale()[255 - at]).resize(image.size, Image.BILINEAR)
    mask = Image.fromarray((60 + 0.65 * at).astype(np.uint8)).resize(image.size, Image.BILINEAR)
    grey = image.convert("L").convert("RGB")
    grey.paste(colour, mask=mask)
    return grey


def show(model, photo, answer, threshold):
    """An answer drawn: PIL image. Objects and persons below the threshold are left out."""
    panels = {}
    if model.task == "pretraining":
        names = ["input", "seen", "reconstruction"] + ["borrowed"] * model.args.norm_pix
        titles = ["input", "what the encoder saw", "reconstruction", "borrowed: mean, spread"]
        return titled([draw.canvas(answer[n], draw.SAMPLE)[0] for n in names], titles)
    keep = (answer["scores"] >= threshold).nonzero()[:, 0].tolist() if "scores" in answer else []
    scores = [f"{answer['scores'][k]:.2f}" for k in keep]
    if model.task == "pose":
        keypoints = answer["keypoints"][keep]
        return draw.skeletons(photo, keypoints[..., :2], keypoints[..., 2], scores,
                              pose.bones(model.joints))
    if model.task == "depth":
        low, high = draw.depth_range(answer["depth"], 0.005)
        return titled([draw.canvas(photo)[0], depth(answer["depth"], low, high)],
                           ["photo", "depth"])
    texts = [f"{answer['names'][k]} {score}" for k, score in zip(keep, scores)]
    if model.task == "detection":
        return draw.boxes(photo, answer["boxes"][keep], answer["labels"][keep], texts)
    if "semantic" in answer:
        panels["semantic"] = draw.semantic(photo, answer["semantic"], model.classes)
    if "masks" in answer:
        panels["instances"] = draw.instances(photo, [answer["masks"][k] for k in keep], texts)
    if "panoptic" in answer:
        panels["panoptic"] = draw.panoptic(photo, answer["panoptic"], dict(
            answer["segments"].tolist()), model.classes, model.things)
    if len(panels) == 1:
        return next(iter(panels.values()))
    return titled(list(panels.values()), list(panels))
