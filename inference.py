"""
From what the heads return to answers in the pixels of the original photo.
"""
import torch
import torch.nn.functional as F

from losses import corners

PART = 2**22                    # float numbers of mask logits to hold at the original size at once


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


def in_parts(mask_logits, size, patch, original):
    """Mask logits [M, h, w] at the original size, a few masks at a time: [m, H0, W0] each.

    All of them would not fit beside the model: 200 masks of 12 megapixels are 10 GB.
    """
    pixels = max(original[0] * original[1], (size[0] + 8 * patch) * (size[1] + 8 * patch))
    for part in mask_logits.float().split(max(1, PART // pixels)):
        if len(part):                                   # no mask at all: one part without a mask
            yield at_original(part, size, patch, original)


def semantic_inference(class_logits, mask_logits, size, patch, original):
    """Mask2Former's: the sum over queries of p(class) x p(mask); no-object dropped.

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image; size, patch, original as for
    at_original. The logits are enlarged to the network's input, then the sum to the original.
    Returns scores [K, H0, W0].
    """
    p, scores, done = class_logits.float().softmax(-1)[:, :-1], 0, 0
    for logits in in_parts(mask_logits, size, patch, size):
        part = p[done:done + len(logits)]
        scores = scores + torch.einsum("qk,qhw->khw", part, logits.sigmoid())
        done += len(logits)
    return F.interpolate(scores[None], tuple(original), mode="bilinear", align_corners=False)[0]


def instance_inference(class_logits, mask_logits, size, patch, original, limit=100):
    """Mask2Former's: the `limit` best pairs of query and class; a query may answer several times.

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image; size, patch, original as for
    at_original. Returns dict, best class first: labels int64 [D], scores float [D] = p(class) x the
    mean p(mask) of the mask's pixels, masks bool [D, H0, W0] = where p(mask) > 1/2, on the CPU.
    Empty masks are left out: their score would be 0, which cannot change the average precision.
    """
    p = class_logits.float().softmax(-1)[:, :-1]
    # stable, so that equal scores are in the same order on every machine
    order = p.flatten().sort(descending=True, stable=True).indices[:limit]
    query, labels = order // p.shape[1], order % p.shape[1]
    used, place = query.unique(return_inverse=True)
    masks = torch.empty(len(order), *original, dtype=torch.bool)        # on the CPU: may be large
    quality, done = mask_logits.new_empty(len(used), dtype=torch.float32), 0
    for logits in in_parts(mask_logits[used], size, patch, original):
        mask = logits > 0
        inside = (logits.sigmoid() * mask).flatten(1).sum(1)
        quality[done:done + len(logits)] = inside / mask.flatten(1).sum(1).clamp(min=1)
        for i, q in enumerate(place.tolist()):                          # answers of this part
            if done <= q < done + len(logits):
                masks[i] = mask[q - done]
        done += len(logits)
    scores = p[query, labels] * quality[place]
    real = scores > 0
    kept = real.nonzero()[:, 0].tolist()
    for i, k in enumerate(kept):                    # move up in place: a copy may not fit
        if i < k:
            masks[i] = masks[k]
    return {"labels": labels[real], "scores": scores[real], "masks": masks[:len(kept)]}


def panoptic_inference(class_logits, mask_logits, size, patch, original, things,
                       object_threshold=0.8, overlap_threshold=0.8):
    """Mask2Former's: each pixel goes to the surest query, fragments are dropped, stuff is merged.

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image, the first `things` classes being
    things. Queries count whose class is not "no object" and has p > object_threshold; a pixel
    belongs to the one of the largest p(class) x p(mask), if that p(mask) >= 1/2. A query that owns
    less than overlap_threshold of its own mask is dropped and leaves void.
    Returns ids int32 [H0, W0], 0 = void, and {id: class}; one segment per class of stuff.
    """
    p, labels = class_logits.float().softmax(-1).max(-1)
    keep = (labels < class_logits.shape[-1] - 1) & (p > object_threshold)
    p, labels = p[keep], labels[keep].tolist()
    best = torch.full(original, -1.0, device=mask_logits.device)            # p(class) p(mask)
    owner = torch.full_like(best, -1, dtype=torch.long)                     # query of each pixel
    sure, areas = torch.zeros_like(best, dtype=torch.bool), []              # its p(mask) >= 1/2
    for logits in in_parts(mask_logits[keep], size, patch, original):
        first, p_mask = len(areas), logits.sigmoid()
        value, query = (p[first:first + len(logits), None, None] * p_mask).max(0)
        better = value > best                           # among equals the first query, as argmax
        own = p_mask.gather(0, query[None])[0]
        best, owner = torch.where(better, value, best), torch.where(better, query + first, owner)
        sure = torch.where(better, own >= 0.5, sure)
        areas += (p_mask >= 0.5).flatten(1).sum(1).tolist()
    owned = torch.bincount(owner.flatten() + 1, minlength=len(labels) + 1)[1:].tolist()
    ids, classes, stuff = torch.zeros_like(owner, dtype=torch.int32), {}, {}
    for q, (label, area) in enumerate(zip(labels, areas)):
        mask = (owner == q) & sure
        if not mask.any() or owned[q] / area < overlap_threshold:
            continue
        segment = len(classes) + 1
        if label >= things:
            segment = stuff.setdefault(label, segment)
        classes[segment] = label
        ids[mask] = segment
    return ids, classes
