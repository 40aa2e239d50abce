"""
Every metric that the paper reports, in fp64 from numpy arrays: mIoU, depth errors, COCO average
precision (boxes, masks, keypoints), panoptic quality. All four classes are used the same way:

    metric.update(...)     # once per image, at the image's original size
    metric.merge(other)    # other = the same metric, filled by another process with other images
    metric.result()        # dict of scores 0..1 and counts; depth errors: see DepthErrors.result

To the last bit, a result does not depend on how the images were shared among processes: counts
add up exactly, `math.fsum` is exact in any order, score ties are broken by image id. Boxes are
x1 y1 x2 y2 in pixels (COCO files hold x y w h). The rules are those of the official tools. Input
that cannot be graded, such as labels out of range, raises ValueError.
D detections, G ground-truth objects, A area ranges, T overlap thresholds, R recall points,
K categories, J joints, S segments, H W image size, P = H * W pixels.
"""
import math

import numpy as np

# COCOeval.Params: `linspace`, because `arange` puts some thresholds one rounding too high
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
# in square pixels, both ends belong to the range; the first range gives the headline number
AREA_RANGES = {"all": (0, 1e5**2), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e5**2)}
# nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles: how far annotators disagree
OKS_SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07,
                       .87, .87, .89, .89]) / 10
FALSE_POSITIVE, TRUE_POSITIVE, IGNORED = np.arange(3, dtype=np.uint8)  # fates of a detection
FIELDS = {"box": "boxes", "mask": "masks", "keypoint": "keypoints"}


def require(condition, message):
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def same_shape(prediction, target):
    """Both as numpy arrays; ValueError if their shapes differ."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    require(prediction.shape == target.shape, f"shapes: {prediction.shape} but {target.shape}")
    return prediction, target


def mean(values, empty=math.nan):
    """Mean of the values that are not nan; `empty` if all are nan."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else empty


# ---- Semantic segmentation ------------------------------------------------------------------
class MeanIoU:
    """mIoU from one confusion matrix over all pixels of all images, as detectron2's
    SemSegEvaluator: the mean is over the classes that occur in the ground truth."""

    def __init__(self, num_classes, ignore=255):
        self.num_classes, self.ignore = num_classes, ignore
        self.confusion = np.zeros((num_classes, num_classes), np.int64)  # [truth, prediction]

    def update(self, prediction, target):
        """Both [H, W] int, 0 .. num_classes-1; pixels with the target `ignore` do not count."""
        prediction, target = same_shape(prediction, target)
        valid = target != self.ignore
        # int64 because uint8 labels times the class count would wrap around below
        labels = np.stack([target[valid], prediction[valid]]).astype(np.int64)  # [2, valid pixels]
        low, high, K = labels.min(initial=0), labels.max(initial=0), self.num_classes
        require(low >= 0 and high < K, f"labels reach {low}..{high}, but there are {K} classes and"
                f" only the target may be {self.ignore}, to be ignored")
        self.confusion += np.bincount(labels[0] * K + labels[1], minlength=K * K).reshape(K, K)

    def merge(self, other):
        self.confusion += other.confusion

    def result(self):
        """mIoU and per_category {label: IoU}; nan where the truth holds no pixel."""
        hits, truth = self.confusion.diagonal(), self.confusion.sum(1)
        iou = hits / np.maximum(truth + self.confusion.sum(0) - hits, 1)
        iou[truth == 0] = np.nan
        return {"mIoU": mean(iou), "per_category": dict(enumerate(iou.tolist()))}


# ---- Depth ----------------------------------------------------------------------------------
class DepthErrors:
    """The NYU protocol: errors per image over its pixels with min_depth < target < max_depth, then
    the mean over images, however many pixels each has. An image without such a pixel is left out.
    """

    NAMES = ("delta1", "delta2", "delta3", "REL", "RMSE", "log10")

    def __init__(self, min_depth, max_depth):
        self.min_depth, self.max_depth = min_depth, max_depth
        self.rows = []  # [6] per image, in the order of NAMES

    def update(self, prediction, target, valid=True):
        """prediction, target [H, W] metres; valid [H, W] bool, e.g. the Eigen crop."""
        prediction, target = same_shape(prediction, target)
        inside = (target > self.min_depth) & (target < self.max_depth) & np.asarray(valid, bool)
        if not inside.any():
            return
        p, t = prediction[inside].astype(np.float64), target[inside].astype(np.float64)
        require(not np.isnan(p).any(), "the predicted depth holds NaN")  # clip lets NaN pass
        p = p.clip(self.min_depth, self.max_depth)  # as BinsFormer and AdaBins before scoring
        ratio = np.maximum(p / t, t / p)
        self.rows.append(np.array([(ratio < 1.25**k).mean() for k in (1, 2, 3)] + [
            (np.abs(p - t) / t).mean(), np.sqrt(((p - t) ** 2).mean()),
            np.abs(np.log10(p) - np.log10(t)).mean()]))

    def merge(self, other):
        self.rows = self.rows + other.rows

    def result(self):
        """delta1..3, REL, RMSE (metres), log10; the number of images."""
        means = [math.fsum(column) / len(self.rows) for column in zip(*self.rows)]
        return dict(zip(self.NAMES, means or [math.nan] * len(self.NAMES)), images=len(self.rows))


# ---- COCO average precision: three overlaps, one engine -------------------------------------
def box_intersections(found, truth):
    """Boxes [D, 4] and [G, 4] -> common area [D, G]."""
    corner = np.maximum(found[:, None, :2], truth[:, :2])  # [D, G, 2]
    return (np.minimum(found[:, None, 2:], truth[:, 2:]) - corner).clip(min=0).prod(-1)


def mask_intersections(found, layers, count):
    """Bool masks [D, H, W] and `count` others, as layers [L, H, W] whose value g + 1 is mask g ->
    common pixels [D, G]."""
    shared = np.zeros((len(found), count))
    if len(found) and len(layers):
        same_shape(found[0], layers[0])
    for row, mask in zip(shared, found):
        for layer in layers:
            row += np.bincount(layer[mask], minlength=count + 1)[1:]
    return shared


def keypoint_overlaps(found, truth, boxes, area, sigmas):
    """Object keypoint similarity: mean over labelled joints of exp(-d^2 / (2 area (2 sigma)^2)).
    found [D, J, 3], truth [G, J, 3] = x y visibility, boxes [G, 4], area [G] -> [D, G].
    A truth with no labelled joint takes instead the distance of every joint from its box, grown
    by the box's own size on every side (COCOeval.computeOks)."""
    labelled = truth[:, :, 2] > 0  # [G, J]
    blank = ~labelled.any(1, keepdims=True)  # [G, 1]
    low, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]  # [G, 1, 2]
    point = found[:, None, :, :2]  # [D, 1, J, 2]
    outside = (low - size - point).clip(min=0) + (point - low - 2 * size).clip(min=0)
    offset = np.where(blank[..., None], outside, point - truth[..., :2])  # [D, G, J, 2]
    # spacing(1) as in COCOeval: an area of 0 must not divide by 0
    error = (offset**2).sum(-1) / (2 * sigmas) ** 2 / (area[:, None] + np.spacing(1)) / 2
    counted = labelled | blank  # [G, J]
    return (np.exp(-error) * counted).sum(-1) / counted.sum(-1)


def greedy_match(overlap, outcome, ignored, crowd):
    """COCOeval.evaluateImg for all area ranges and thresholds at once; changes `outcome`.
    overlap [D, G] in falling score order, outcome [A, T, D], ignored [A, G], crowd [G].
    Each detection in turn takes the free truth that it overlaps most, an ignored one only if no
    other fits; a crowd is never used up."""
    free = np.ones((*outcome.shape[:2], len(crowd)), bool)  # [A, T, G]
    # Most detections reach no truth even at the lowest threshold: their outcome does not change
    for d in np.flatnonzero(overlap.max(1, initial=0) >= THRESHOLDS[0]):
        fits = free & (overlap[d] >= THRESHOLDS[:, None])
        regular = fits & ~ignored[:, None]
        fits = np.where(regular.any(-1, keepdims=True), regular, fits)
        # among equal overlaps COCOeval takes the last truth, argmax the first: look from the back
        best = len(crowd) - 1 - np.where(fits, overlap[d], -1)[..., ::-1].argmax(-1)  # [A, T]
        a, t = fits.any(-1).nonzero()
        g = best[a, t]
        outcome[a, t, d] = np.where(ignored[a, g], IGNORED, TRUE_POSITIVE)
        free[a, t, g] = crowd[g]


def interpolated_precision(hit, miss, positives):
    """hit, miss [T, D] bool in falling score order -> precision at the recall points [T, R]."""
    hits, misses = hit.cumsum(1, dtype=np.float64), miss.cumsum(1, dtype=np.float64)
    # COCOeval adds spacing(1) against 0 / 0, which leaves a perfect score 2e-16 below 1; we do not
    precision = hits / np.maximum(hits + misses, 1)
    # from right to left the best precision at this recall or a higher one; 0 if never reached
    precision = np.pad(np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1], ((0, 0), (0, 1)))
    at = [np.searchsorted(recall, RECALL_POINTS) for recall in hits / positives]
    return np.take_along_axis(precision, np.stack(at), 1)


class AveragePrecision:
    """COCOeval for kind "box", "mask" or "keypoint"; categories are the ids that `labels` use.
    It keeps only the outcome of each detection, about 65 bytes, and no box or mask."""

    def __init__(self, kind, categories, sigmas=OKS_SIGMAS):
        require(kind in FIELDS, f"kind is {kind!r}, expected one of {', '.join(FIELDS)}")
        self.kind, self.categories, self.sigmas = kind, np.unique(categories), np.array(sigmas)
        self.limits = [20] if kind == "keypoint" else [1, 10, 100]  # per image and category
        # COCO labels no joints on small persons
        ranges = {k: v for k, v in AREA_RANGES.items() if k != "s" or kind != "keypoint"}
        self.area_names = list(ranges)
        self.low, self.high = np.array(list(ranges.values()), float).T[:, :, None]  # [A, 1]
        self.images = {}  # image id -> tuple of arrays

    def update(self, image_id, predictions, truths):
        """predictions: dict of scores [D], labels [D] and, by kind, boxes [D, 4], masks [D, H, W]
        bool or keypoints [D, J, 3]. truths: dict of labels [G], the same field (for keypoints also
        boxes; to save memory, masks may be "layers" int [L, H, W], where g + 1 is mask g) and, if
        known, area [G] (COCO measures the outline, not the box), iscrowd [G] and ignore [G]
        (neither right nor wrong). Predictions of unlisted categories are dropped."""
        # copies: views would keep alive all of the batch that they belong to
        labels, wanted = (np.array(x["labels"], int).reshape(-1) for x in (predictions, truths))
        scores = np.asarray(predictions["scores"], np.float64).reshape(-1)
        require(image_id not in self.images, f"image {image_id} was added twice")
        require(np.isfinite(scores).all(), f"image {image_id} has a score that is not finite")
        require(np.isin(wanted, self.categories).all(), f"image {image_id} has unlisted categories")
        found, found_area, _ = self._measure(predictions)
        truth, drawn_area, truth_boxes = self._measure(truths, truths=True)
        area = np.asarray(truths.get("area", drawn_area), np.float64)
        crowd, ignore = (np.asarray(truths.get(flag, np.zeros(len(area))), bool)
                         for flag in ("iscrowd", "ignore"))
        ignored = crowd | ignore | (area < self.low) | (area > self.high)  # [A, G]
        if self.kind == "keypoint":
            ignored |= ~(truth[:, :, 2] > 0).any(1)
        # By category and then by falling score; lexsort is a merge sort, ties keep their order
        order = np.lexsort((-scores, labels))
        order = order[np.isin(labels[order], self.categories)]
        rank = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        order, rank = order[rank < self.limits[-1]], rank[rank < self.limits[-1]]
        labels, scores, found_area = labels[order], scores[order], found_area[order]
        if self.kind == "keypoint":
            overlap = keypoint_overlaps(found[order], truth, truth_boxes, area, self.sigmas)
        else:
            shared = mask_intersections(found, truth, len(wanted))[order] \
                if self.kind == "mask" else box_intersections(found[order], truth)
            # A crowd is a region of objects nobody outlined one by one: it overlaps a detection
            # by the share of the DETECTION that lies inside
            size = found_area[:, None]
            union = np.where(crowd, size, size + drawn_area - shared)
            overlap = shared / np.where(shared > 0, union, 1)
        overlap = np.where(labels[:, None] == wanted, overlap, 0)  # across categories: no match
        # A detection that finds nothing is a mistake, unless its own size is out of range
        outside = (found_area < self.low) | (found_area > self.high)  # [A, D]
        outcome = np.where(outside, IGNORED, FALSE_POSITIVE)[:, None].repeat(len(THRESHOLDS), 1)
        greedy_match(overlap, outcome, ignored, crowd)  # all categories in one pass
        self.images[image_id] = labels, scores, rank, outcome, wanted, ignored

    def _measure(self, entry, truths=False):
        """-> shapes, areas [N], boxes [N, 4] or None for masks; joints without a box get the
        one that they span, as in COCO.loadRes. Masks of the ground truth become layers."""
        count = len(entry["labels"])
        if truths and "layers" in entry:
            layers = np.asarray(entry["layers"])
            areas = sum(np.bincount(m.reshape(-1), minlength=count + 1) for m in layers)
            require(len(areas) == count + 1, f"{count} labels but layers up to {len(areas) - 1}")
            return layers, areas[1:].astype(np.float64), None
        shapes = np.asarray(entry[FIELDS[self.kind]])
        require(len(shapes) == count, f"{count} labels but {len(shapes)} {FIELDS[self.kind]}")
        if self.kind == "mask":  # one by one: count_nonzero is fast on whole arrays only
            areas = np.array([np.count_nonzero(mask) for mask in shapes], np.float64)
            if truths:
                number = np.arange(1, count + 1, dtype=np.int32)[:, None, None]
                return shapes.astype(bool) * number, areas, None
            return shapes.astype(bool, copy=False), areas, None
        shapes = shapes.astype(np.float64).reshape(  # so that an empty list will do
            (count, 4) if self.kind == "box" else (count, len(self.sigmas), 3))
        boxes = np.asarray(entry["boxes"], np.float64).reshape(count, 4) if "boxes" in entry else (
            np.concatenate([shapes[..., :2].min(1), shapes[..., :2].max(1)], 1))
        return shapes, (boxes[:, 2:] - boxes[:, :2]).prod(1), boxes

    def merge(self, other):
        self.images = {**other.images, **self.images}  # an image graded twice counts once

    def result(self):
        """COCOeval.summarize: AP, AP50, AP75, APs, APm, APl and per_category {id: AP}; AR1, AR10,
        AR100 (keypoints: AR, AR50, AR75), ARs, ARm, ARl. -1 where there was nothing to find."""
        require(self.images, "average precision needs at least one image")
        # one long list of detections and one of truths, images in the order of their ids
        order = sorted(self.images, key=lambda i: (isinstance(i, str), i))
        labels, scores, rank, outcome, wanted, ignored = (
            np.concatenate(x, -1) for x in zip(*(self.images[i] for i in order)))
        shape, K = outcome.shape[:2], len(self.categories)
        precision = np.full((*shape, len(RECALL_POINTS), K), np.nan)  # [A, T, R, K]
        recall = np.full((*shape, len(self.limits), K), np.nan)  # [A, T, limits, K]
        for k, category in enumerate(self.categories):
            mine = np.flatnonzero(labels == category)
            mine = mine[np.argsort(-scores[mine], kind="stable")]
            positives = np.count_nonzero(~ignored[:, wanted == category], axis=1)  # [A]
            for a in np.flatnonzero(positives):
                became = outcome[a][:, mine]  # [T, D]
                hit, miss = became == TRUE_POSITIVE, became == FALSE_POSITIVE
                precision[a, ..., k] = interpolated_precision(hit, miss, positives[a])
                for m, limit in enumerate(self.limits):
                    recall[a, :, m, k] = hit[:, rank[mine] < limit].sum(1) / positives[a]
        best = recall[:, :, -1]  # [A, T, K]
        parts = {"AP": precision[0], "AP50": precision[0, 0], "AP75": precision[0, 5]}
        for a, name in enumerate(self.area_names[1:], 1):
            parts |= {f"AP{name}": precision[a], f"AR{name}": best[a]}
        parts |= ({"AR": best[0], "AR50": best[0, 0], "AR75": best[0, 5]} if self.kind == "keypoint"
                  else {f"AR{limit}": recall[0, :, m] for m, limit in enumerate(self.limits)})
        each = {c: mean(precision[0, ..., k], -1.0) for k, c in enumerate(self.categories.tolist())}
        return {name: mean(part, -1.0) for name, part in parts.items()} | {"per_category": each}


# ---- Panoptic segmentation ------------------------------------------------------------------
class PanopticQuality:
    """panopticapi: PQ = sum of IoU / (TP + FP/2 + FN/2) per category, then the mean over the
    categories that occur. categories: list of (id, isthing); segment id 0 is void."""

    def __init__(self, categories):
        self.index = {int(category): k for k, (category, _) in enumerate(categories)}
        self.isthing = np.array([isthing for _, isthing in categories], bool)
        self.counts = np.zeros((len(categories), 3), np.int64)  # TP, FP, FN
        self.ious = [[] for _ in categories]  # one number per true positive

    def update(self, prediction, predicted, target, segments):
        """Maps of segment ids [H, W]; predicted {id: category}; segments [{id, category, iscrowd}].
        A listed segment without a pixel counts as wrong or missed."""
        same_shape(prediction, target)
        kind, rows = self._locate("target", target, {s["id"]: s["category"] for s in segments})
        found_kind, columns = self._locate("prediction", prediction, predicted)
        crowd = np.array([True] + [bool(s.get("iscrowd", 0)) for s in segments])  # void: no FN
        size = len(kind), len(found_kind)
        shared = np.bincount(rows * size[1] + columns, minlength=size[0] * size[1]).reshape(size)
        area, found_area, void = shared.sum(1), shared.sum(0), shared[0]
        # Nobody knows what is under void: these pixels of a prediction do not count against it
        iou = shared / np.maximum(area[:, None] + found_area - shared - void, 1)
        # above one half, a segment has at most one partner: there is nothing to assign
        match = (iou > 0.5) & (kind[:, None] == found_kind) & ~crowd[:, None]
        for g, d in np.argwhere(match):
            self.ious[kind[g]].append(float(iou[g, d]))
        # a prediction that is mostly void or crowd of its own category is no mistake
        excused = void.copy()
        for g in {kind[g]: g for g in np.flatnonzero(crowd)}.values():  # the last of a category
            excused += np.where(found_kind == kind[g], shared[g], 0)
        wrong = ~match.any(0) & (excused <= found_area / 2)
        missed = ~match.any(1) & ~crowd
        for column, kinds in enumerate((kind[match.any(1)], found_kind[wrong], kind[missed])):
            self.counts[:, column] += np.bincount(kinds, minlength=len(self.counts) + 1)[:-1]

    def _locate(self, name, segment_map, listed):
        """Category index of every segment [S] (void first, as K) and segment of every pixel [P]."""
        ids, pixels = np.array([0, *listed]), np.asarray(segment_map).reshape(-1)
        order = np.argsort(ids)
        at = order[np.searchsorted(ids, pixels, sorter=order).clip(max=len(ids) - 1)]
        known = (ids[at] == pixels).all() and set(listed.values()) <= set(self.index)
        require(known and 0 not in listed, f"{name}: a segment that is drawn but not listed, a"
                " category this metric was not given, or 0 (void) among the listed segments")
        return np.array([len(self.index), *(self.index[c] for c in listed.values())]), at

    def merge(self, other):
        self.counts += other.counts
        self.ious = [mine + theirs for mine, theirs in zip(self.ious, other.ious)]

    def result(self):
        """PQ, SQ, RQ over all categories, the same with _things and _stuff, and per_category
        {id: PQ}; nan for a category with no true and no predicted segment."""
        (tp, fp, fn), total = self.counts.T, np.array([math.fsum(ious) for ious in self.ious])
        weight = np.maximum(tp + fp / 2 + fn / 2, 0.5)
        table = np.stack([total / weight, total / np.maximum(tp, 1), tp / weight], 1)  # [K, 3]
        table[~self.counts.any(1)] = np.nan
        groups = {"": self.isthing | True, "_things": self.isthing, "_stuff": ~self.isthing}
        out = {name + suffix: mean(column) for suffix, rows in groups.items()
               for name, column in zip(("PQ", "SQ", "RQ"), table[rows].T)}
        return out | {"per_category": dict(zip(self.index, table[:, 0].tolist()))}
