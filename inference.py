"""
From what the heads return to answers in the pixels of the original photo.
"""
import torch
import torch.nn.functional as F

from losses import corners


def at_original(maps, size, patch, original, align_corners=False):
    """Maps [K, h, w] of a padded canvas -> [K, H0, W0] at the photo's original size.

    size: (H, W) px of the image within the canvas. Bilinear, as Mask2Former: first to the network's
    input, where the padding is cut off, then to the original. Units that are all padding are cut
    off before, so that the answer does not depend on the other images of the batch.
    """
    h, w = (-(-n // (8 * patch)) * 8 for n in size)                         # tokens of its units
    maps = F.interpolate(maps[None, :, :h, :w], (h * patch, w * patch), mode="bilinear",
                         align_corners=align_corners)
    maps = maps[:, :, :size[0], :size[1]]
    if maps.shape[2:] != torch.Size(original):
        maps = F.interpolate(maps, original, mode="bilinear", align_corners=align_corners)
    return maps[0]


def detection_inference(class_logits, boxes, size, count=100):
    """The best `count` of all (query, class) pairs, no suppression (H-DETR).

    class_logits [Q, K]; boxes [Q, 4] = centre x, y, width, height in 0..1; size: (H0, W0) of the
    photo. Returns scores [D] falling, labels [D], boxes [D, 4] x1 y1 x2 y2 in the photo's pixels.
    """
    scores, at = class_logits.float().sigmoid().flatten().sort(descending=True, stable=True)
    scores, at = scores[:count], at[:count]
    query, label = at // class_logits.shape[1], at % class_logits.shape[1]
    height, width = size
    boxes = corners(boxes[query].float()).clamp(0, 1) * boxes.new_tensor(
        [width, height, width, height])
    return {"scores": scores, "labels": label, "boxes": boxes}


def semantic_inference(class_logits, mask_logits):
    """Sum over queries of p(class) x p(mask), as Mask2Former; no-object dropped.

    class_logits [B, M, K + 1], mask_logits [B, M, h, w] -> scores [B, K, h, w].
    """
    p = class_logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", p, mask_logits.float().sigmoid())
