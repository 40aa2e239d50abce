"""
Between a person's box in a photo and the person's joints in the photo: top-down pose estimation.

    box -> view (centre, size, angle) -> affine map -> crop -> [network] -> heatmaps -> joints

Two kinds of coordinates, both (x, y) in px, both float:
    photo  as in boxes: pixel i covers [i, i + 1), its centre is at i + 0.5. In COCO's joints the
           centre of pixel i is at i instead (PIXEL is the difference)
    crop   the centre of pixel i is at i, and a length is counted in intervals (W - 1), not pixels:
           "unbiased data processing" (UDP, Huang et al. 2020). The box's left edge is the centre of
           the crop's first column, its right edge that of the last, and a heatmap's corner pixels
           are the crop's corner pixels. So a mirrored crop or map is exactly u -> W - 1 - u, and
           averaging with it needs no shift.
Augmentation, targets and scores are ViTPose's (MMPose's), which the paper follows. P persons, J
joints, H W crop, h w heatmap.
"""
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import open_sources, seeded
from formats.coco import an_id
from formats.drawn import ToyWorld
from formats.files import InputError, note
from metrics import OKS_SIGMAS, keypoint_overlaps
from toyworld import KEYPOINTS, SKELETON

PADDING = 1.25                      # room around the box
PIXEL = 0.5                         # photo coordinates = joint of an annotation + PIXEL
UPPER = np.arange(17) < 11          # of COCO's joints those from the nose to the wrists

# -----------------------------------------------------------------------------
# Left and right in the names of joints


# where a name can hold its side, surest first: a word (l_eye), left or right anywhere (eyeleft),
# the second or the first of two letters (RL_hoof, LF_paw), the first letter (lknee), the last one
SIDES = ("(?<![a-z])(left|right|lt|rt|lft|rgt|l|r)(?![a-z])", "left|right",
         "(?<=(?<![a-z])[a-z])[lr](?![a-z])", "(?<![a-z])[lr](?=[a-z](?![a-z]))",
         "^[lr]", "(?<=...)[lr]$")
SWAP = dict(left="right", right="left", lt="rt", rt="lt", lft="rgt", rgt="lft", l="r", r="l")


def flip_order(names, pairs=None, sides=SIDES):
    """For each joint the index of its mirror partner (left_eye: right_eye), or its own: list [J].

    pairs: "a-b,c-d", names or numbers from 1, or "none", else InputError. Without pairs the names
    decide: left and right anywhere in them, or l and r as a word (l_eye), before a capital or after
    a small letter (LEye, earL), as one of two letters (LF_paw), or first or last where the rest is
    the same.
    """
    order = list(range(len(names)))
    if pairs == "none":
        return order
    if pairs:
        known = {str(n).lower(): i for i, n in enumerate(names)}
        if not any(map(str.isdigit, known)):                # else numbers are names
            known |= {str(i + 1): i for i in order}
        for pair in pairs.split(","):
            ends = [known.get(w.strip().lower()) for w in pair.split("-")]
            if len(ends) != 2 or None in ends or ends[0] == ends[1] or any(
                    order[i] != i for i in ends):
                raise InputError(f"--flip-pairs {pair}: give two of {', '.join(names)}, each once, "
                                 "as a-b; or numbers from 1, unless the names are numbers")
            order[ends[0]], order[ends[1]] = ends[1], ends[0]
        return order
    spelled = [re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", n) for n in names]
    for i, name in enumerate(spelled):
        for side in sides:
            other = re.sub(side, lambda m: SWAP[m[0]], name.lower())
            matches = [j for j, n in enumerate(spelled) if n.lower() == other != name.lower()]
            if order[i] == i and len(matches) == 1:
                order[i] = matches[0]
    return [j if order[j] == i else i for i, j in enumerate(order)]


def require_sides(path, names, flip, keypoints):
    """InputError if no joint's name has a side, but two joints keep their sides in the photos, so
    that mirrored samples would be labelled wrongly: one joint is left of the other in over 70 % of
    the objects, and more often than chance does in 1 of 2000 pairs. Only a note if some names have
    sides. keypoints: list of [P, J, 3]."""
    every = np.concatenate(keypoints)                       # [P, J, 3]
    alone = [i for i, j in enumerate(flip) if i == j]
    for a, b in itertools.combinations(alone, 2):
        both = (every[:, [a, b], 2] > 0).all(1)
        left = np.sign(every[both, a, 0] - every[both, b, 0])
        if len(left) >= 20 and abs(left.mean()) > max(0.4, 3.5 / len(left) ** 0.5):
            found = (f"its joints ({', '.join(names[i] for i in alone[:8])}) name no left and "
                     f"right, but {names[a]} and {names[b]} keep their sides in the photos: "
                     "--flip-pairs 1-2,3-4 says which a mirror exchanges (or none, if none), "
                     "--no-flip mirrors no photo")
            if len(alone) == len(names):
                raise InputError(f"--data {path}: {found}")
            note(f"note: --data {path}: {found}")
            return


FLIP = flip_order(KEYPOINTS)


def bones(names):
    """Pairs of joints to draw a line between: COCO's, or none where the joints are others."""
    return SKELETON if tuple(names) == KEYPOINTS else ()


def oks_sigmas(names):
    """Standard deviation of annotators' clicks on each joint, relative to the object's size: COCO's
    for a joint of this name, else the mean of COCO's: float64 [J]."""
    known = dict(zip(KEYPOINTS, OKS_SIGMAS))
    return np.array([known.get(name, OKS_SIGMAS.mean()) for name in names])

# -----------------------------------------------------------------------------
# Box to crop


def fit(centre, extent, height, width, padding=PADDING):
    """Smallest view with the crop's aspect ratio around extent = (w, h) px, times the padding.

    Returns centre [2], size [2] = (w, h), float64 photo px; at least 1 px, so that no box is flat.
    """
    w, h = np.maximum(np.asarray(extent, np.float64), 1)
    w = max(w, h * width / height)
    return np.asarray(centre, np.float64), padding * np.array([w, w * height / width])


def fit_box(box, height, width):
    """Box x1 y1 x2 y2 -> view (centre, size) around it, PADDING times as large."""
    box = np.asarray(box, np.float64)
    return fit((box[:2] + box[2:]) / 2, box[2:] - box[:2], height, width)


def affine(centre, size, height, width, degrees=0.0):
    """Matrix [2, 3] from photo to crop coordinates.

    The photo is turned by `degrees` (clockwise as seen) about the centre; then a view of `size` px
    becomes the crop's (W - 1, H - 1) intervals.
    """
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    last = np.array([width - 1, height - 1])
    linear = (last / size)[:, None] * np.array([[c, -s], [s, c]])
    return np.column_stack([linear, last / 2 - linear @ centre])


def inverse(matrix):
    """Matrix [..., 2, 3] from crop back to photo coordinates."""
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], -1)


def move(matrix, points):
    """Apply [..., 2, 3] to points [..., N, 2]."""
    return points @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]


def warp(image, matrix, height, width):
    """uint8 [3, H0, W0] -> crop uint8 [3, H, W], black outside the photo, bilinear.

    A person larger than the crop is first shrunk by a whole factor with a box filter (PIL's
    reduce), because fine texture would alias; bilinear sampling shrinks the rest, by less than 2.
    """
    back = inverse(matrix)
    # photo px per crop px; without the epsilon, rounding could turn an exact 2 into 1
    factor = max(1, int(np.linalg.norm(back[:, :2], axis=0).min() + 1e-6))
    # What the crop shows of the photo, in whole blocks, and 3 more on each side: one for bilinear
    # sampling, the others for rounding. (A slice ends where the photo ends.)
    corners = move(back, np.array([[0, 0], [width, 0], [0, height], [width, height]]))
    last = np.array(image.shape[:0:-1]) - 1                                 # x, y
    low = ((corners.min(0) / factor - 3).clip(0, last // factor)).astype(int) * factor
    high = ((corners.max(0) / factor + 3).clip(low // factor + 1)).astype(int) * factor
    image, back[:, 2] = image[:, low[1]:high[1], low[0]:high[0]], back[:, 2] - low
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        photo, back = photo.reduce(factor), back / factor
    # PIL hands in the centre of output pixel i as i + 0.5, crop coordinates call it i
    back[:, 2] -= back[:, :2].sum(1) / 2
    crop = photo.transform((width, height), Image.Transform.AFFINE, back.ravel().tolist(),
                           Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def views(image, boxes, height, width):
    """What the network sees of the persons in a photo at test.

    image uint8 [3, H0, W0]; boxes [P, 4] x1 y1 x2 y2 photo px. Returns crops uint8 [P, 3, H, W],
    back [P, 2, 3] from crop to the photo's pixels as annotations count them, area [P] of the views.
    """
    crops, back, area = [torch.empty(0, 3, height, width, dtype=torch.uint8)], [], []
    for box in boxes:
        centre, size = fit_box(box, height, width)
        matrix = affine(centre, size, height, width)
        crops.append(warp(image, matrix, height, width)[None])
        back.append(inverse(matrix) - [[0, 0, PIXEL]] * 2)
        area.append(size.prod())
    return torch.cat(crops), np.array(back).reshape(-1, 2, 3), np.array(area)


# -----------------------------------------------------------------------------
# Augmentation


def random_view(box, keypoints, height, width, zoom=0.5, rotation=40.0, upper=UPPER):
    """ViTPose's augmentation -> centre, size, degrees, mirrored. Random numbers are torch's.

    box x1 y1 x2 y2; keypoints [J, 3] photo px and visibility. Shift by up to 0.2 of the box (p
    0.3), close-up of the upper or lower half (p 0.3; upper: bool [J], or None for joints without
    such halves), scale N(1, zoom) clipped at one standard deviation, angle N(0, rotation degrees)
    clipped at two (p 0.6), mirror (p 0.5).
    """
    shifts, halves, half, turns, mirrored, *shift = torch.rand(7).tolist()      # each in 0..1
    scale, angle = torch.randn(2).tolist()
    centre, size = fit_box(box, height, width)
    if shifts < 0.3:
        centre = centre + 0.4 * (np.array(shift) - 0.5) * (np.subtract(box[2:], box[:2]))
    labelled = np.asarray(keypoints)[:, 2] > 0
    if upper is not None and labelled.sum() >= 9 and halves < 0.3:
        # an even chance for either half, as meant; MMPose draws from a normal distribution here,
        # so that it takes the upper body in 69 % of the cases
        part = upper if half < 0.5 or (labelled & ~upper).sum() <= 2 else ~upper
        points = np.asarray(keypoints)[labelled & part, :2]
        low, high = points.min(0), points.max(0)
        centre, size = fit((low + high) / 2, high - low, height, width, padding=1.5)
    size = size * (1 + zoom * np.clip(scale, -1, 1))
    degrees = rotation * np.clip(angle, -2, 2) if turns < 0.6 else 0.0
    return centre, size, float(degrees), mirrored < 0.5


def mirror(crop, joints, labelled, flip=FLIP):
    """Crop uint8 [3, H, W], joints [J, 2] in it, labelled [J], all seen in a mirror: what was the
    left wrist is now called the right one (flip: see flip_order)."""
    joints = np.stack([crop.shape[2] - 1 - joints[:, 0], joints[:, 1]], 1)
    return crop.flip(2), joints[flip], labelled[flip]


# -----------------------------------------------------------------------------
# Heatmaps


def heatmap_targets(joints, labelled, crop, size, sigma=2.0):
    """What the network should answer: a Gaussian of height 1 at each joint.

    joints [B, J, 2] crop px; labelled [B, J]; crop (H, W); size (h, w) of the map; sigma in
    heatmap px. Centres are not rounded. Returns maps [B, J, h, w] and weights [B, J], 0 for a joint
    that has no label or lies outside the map, because there is no peak to learn.
    ViTPose cuts the tails beyond 3 sigma (below 0.011); here they stay. ViTPose also teaches the
    tail of a joint that lies up to 3 sigma outside the map; we give that joint no weight.
    """
    (h, w), device = size, joints.device
    # plain numbers, not tensors made of them: a GPU would stop for each copy
    axes = [(n, joints[..., i].float() * (n - 1) / (px - 1))                # x, y: [B, J]
            for i, (n, px) in enumerate(((w, crop[1]), (h, crop[0])))]
    (_, x), (_, y) = axes
    inside = (x > -0.5) & (x < w - 0.5) & (y > -0.5) & (y < h - 0.5)
    x, y = (torch.exp(-(torch.arange(n, device=device) - c[..., None]) ** 2 / (2 * sigma ** 2))
            for n, c in axes)                                               # [B, J, w], [B, J, h]
    weight = (labelled.bool() & inside).float()
    return y[..., :, None] * x[..., None, :] * weight[..., None, None], weight      # [B, J, h, w]


def flip_average(maps, mirrored, flip=FLIP):
    """Flip test: mean of heatmaps [B, J, h, w] and those of the mirrored crops, mirrored back."""
    return (maps + mirrored.flip(3)[:, flip]) / 2


def blurred(maps, sigma):
    """Gaussian blur [N, h, w] -> [N, h + 2, w + 2], one pixel more on each side, so that a peak on
    the border has neighbours. The kernel fits the targets' sigma as in MMPose: 11 px wide for 2, 17
    for 3. Its own sigma follows from its width by OpenCV's formula.

    Outside, the map is zero. MMPose reflects it there, which moves a joint 1 to 3 px from a border
    outwards by up to 1.5 px; zeros move it inwards, by 0.3 px at a distance of 1.5, 0.1 at 2.5.
    """
    half = max(1, round((sigma - 0.8) / 0.3 + 1))
    sigma = 0.3 * (half - 1) + 0.8
    x = torch.arange(-half, half + 1, device=maps.device, dtype=maps.dtype)
    weight = torch.exp(-x ** 2 / (2 * sigma ** 2))
    weight = weight / weight.sum()
    maps = F.pad(maps[:, None], (half + 1,) * 4)
    return F.conv2d(F.conv2d(maps, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1))[:, 0]


def decode(maps, crop, sigma=2.0):
    """Heatmaps [B, J, h, w] -> joints [B, J, 2] (x, y) in crop px, scores [B, J]; crop: (H, W);
    sigma: that of the targets, heatmap px.

    DARK (Zhang et al. 2020) with UDP: the logarithm of a Gaussian is a parabola, so one Newton step
    from the highest pixel of the blurred map's logarithm finds its top exactly. The step is at most
    a pixel a side, and none where there is no top (a flat map). The score is the highest value.
    """
    b, j, h, w = maps.shape
    maps = maps.float().flatten(0, 1)                                       # [N = B * J, h, w]
    score, place = maps.flatten(1).max(1)
    y, x = place // w, place % w
    log = blurred(maps, sigma).clamp(1e-3, 50).log()                        # MMPose's bounds
    near = lambda dy, dx: log[torch.arange(b * j, device=maps.device), y + 1 + dy, x + 1 + dx]
    centre, dx = near(0, 0), (near(0, 1) - near(0, -1)) / 2     # [N]; dx, dy: first derivatives
    dy = (near(1, 0) - near(-1, 0)) / 2
    xx, yy = (near(*p) + near(*m) - 2 * centre
              for p, m in (((0, 1), (0, -1)), ((1, 0), (-1, 0))))
    xy = (near(1, 1) + near(-1, -1) - near(1, -1) - near(-1, 1)) / 4    # xx, yy, xy: second ones
    determinant = xx * yy - xy ** 2
    top = (determinant > 1e-9) & (xx < 0)                                   # negative definite
    step = torch.stack([xy * dy - yy * dx, xy * dx - xx * dy], 1) / determinant[:, None]
    step = torch.where(top[:, None], step.clamp(-1, 1), 0)
    at = torch.stack([x, y], 1) + step                                      # [N, 2] heatmap px
    scale = torch.tensor([(crop[1] - 1) / (w - 1), (crop[0] - 1) / (h - 1)], device=maps.device)
    return (at * scale).view(b, j, 2), score.view(b, j)


# -----------------------------------------------------------------------------
# The persons of one photo


def rescore(box_scores, joint_scores):
    """A person's score: the box's [P] times the mean of its joints' scores [P, J] above 0.2."""
    sure = joint_scores > 0.2
    return box_scores * (joint_scores * sure).sum(1) / np.maximum(sure.sum(1), 1)


def oks_nms(joints, scores, areas, threshold=0.9, sigmas=OKS_SIGMAS):
    """Drop duplicates of a better person: which of the P to keep, int [K], best first.

    joints [P, J, 2] photo px, scores [P], areas [P] px of the views. Two persons are one if their
    object keypoint similarity, at the mean of their areas, exceeds the threshold.
    """
    seen = np.concatenate([joints, np.ones_like(joints[..., :1])], -1)      # [P, J, 3]
    left, keep = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        keep.append(best)
        # all joints count as labelled, so the boxes (zeros) are never used
        similar = keypoint_overlaps(seen[[best]], seen[left], np.zeros((len(left), 4)),
                                    (areas[best] + areas[left]) / 2, sigmas)[0]
        left = left[similar <= threshold]
    return np.array(keep, np.int64)


# -----------------------------------------------------------------------------
# Samples


PERSON = 0                                      # class of a person, in every source
TOY_PHOTO = 160                                 # px: half of ToyWorld's persons are over 50 px tall


def persons(labels):
    """The persons among a photo's objects, numpy: boxes [P, 4], keypoints [P, J, 3], area [P],
    iscrowd [P] (all False if the source has no crowds)."""
    crowd = labels.get("iscrowd", torch.zeros(len(labels["area"]), dtype=torch.bool))
    found = {k: labels[k] for k in ("boxes", "keypoints", "area")} | {"iscrowd": crowd}
    rows = np.asarray(labels["classes"]) == PERSON
    return {k: np.asarray(v)[rows] for k, v in found.items()}


def read_boxes(path, ids, kinds):
    """A detector's answers, COCO's results format -> per image of `ids` boxes xyxy [P, 4], scores.

    JSON: a list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}. Other categories
    than `kinds` and other images are left out; an invalid entry raises InputError.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--boxes {path}: not a readable JSON file "
                         f"({str(error).splitlines()[0]})") from None
    if not isinstance(entries, list):
        raise InputError(f"--boxes {path}: not a list; COCO's results format is one list of boxes")
    ids = [*map(an_id, ids)]
    found = {i: [] for i in ids}
    for n, entry in enumerate(entries):
        try:
            image, kind = an_id(entry["image_id"]), an_id(entry["category_id"])
            x, y, w, h, score = row = [float(v) for v in (*entry["bbox"], entry["score"])]
            if not (np.abs(row) < 1e6).all() or w < 0 or h < 0:        # NaN is refused, too
                raise ValueError("a number is not finite or no pixel, or a side is below 0")
            if kind in kinds and image in found:
                found[image].append((x, y, x + w, y + h, score))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"--boxes {path}: entry {n} is no box of COCO's results format "
                             f"({type(error).__name__}: {error}); correct or remove it") from None
    if not any(found.values()):
        raise InputError(f"--boxes {path}: no person (category_id {min(kinds)}) in any of the "
                         "photos; is it the file of this set?")
    rows = [np.array(found[i], np.float64).reshape(-1, 5) for i in ids]
    return [(r[:, :4], r[:, 4]) for r in rows]


class Pose:
    """Crops of persons. A source of photos has ids, labels(i) and [i], the labels with "image".

    Training: (epoch, person) -> dict for collate(): image uint8 [3, H, W], joints float [J, 2]
    in crop px (see above), labelled bool [J]. Only persons in the photo, with a joint; no crowds.
    Test: (epoch, photo) -> dict of all its persons, so that NMS can find duplicates: images uint8
    [P, 3, H, W], back [P, 2, 3] from crop to the photo's pixels as annotations count them, area [P]
    of the views, scores [P] of the boxes, truth for AveragePrecision, id, index. The boxes are the
    ground truth with score 1, or those of a detector's file `boxes`. ViTPose tests with a
    detector's boxes; AP is higher with the ground truth's.
    """

    def __init__(self, source, train, size, seed, augment=(0.5, 40.0), boxes=None, pairs=None,
                 flip=True):
        self.source, self.train, self.size, self.seed = source, train, size, seed
        self.augment = augment                  # (zoom, rotation) of random_view, or None
        self.joints = source.joints             # flip_order and sigmas follow from names
        self.flip, self.sigmas = flip_order(self.joints, pairs), oks_sigmas(self.joints)
        self.mirrors = flip
        self.bones = bones(self.joints)
        self.upper = UPPER if self.bones else None
        # the categories that have these joints: their ids and names in files and detectors' answers
        toy = isinstance(source, ToyWorld)
        self.category_ids = source.category_ids[:1] if toy else source.category_ids
        self.kinds = source.classes[:1] if toy else source.classes
        self.truths = [persons(source.labels(i)) for i in range(len(source))]
        asked = [t["boxes"][~t["iscrowd"]] for t in self.truths]
        asked = [b[(b[:, 2:] > b[:, :2]).all(1)] for b in asked]    # without a box: not asked for
        self.boxes = read_boxes(boxes, source.ids, set(self.category_ids)) if boxes else [
            (b, np.ones(len(b))) for b in asked]
        self.counts = [len(b) for b, _ in self.boxes]                       # persons of a photo
        self.people = []
        for i, t in enumerate(self.truths):                 # drawn persons lie in their photos
            ends = t["boxes"] if toy else t["boxes"].clip(0, source.records[i]["size"][::-1] * 2)
            keep = ~t["iscrowd"] & (t["keypoints"][..., 2] > 0).any(1) \
                & (ends[:, 2:] > ends[:, :2]).all(1)
            self.people += [(i, int(k)) for k in np.flatnonzero(keep)]

    def __len__(self):
        return len(self.people if self.train else self.source)

    def __getitem__(self, at):
        return self.person(*at) if self.train else self.photo(at[1])

    def person(self, epoch, index):
        """A training sample: the crop of one person, augmented."""
        i, k = self.people[index]
        box, keypoints = (self.truths[i][name][k] for name in ("boxes", "keypoints"))
        keypoints = keypoints + (PIXEL, PIXEL, 0)           # from COCO's to photo coordinates
        if self.augment:
            with seeded(self.seed, epoch, index):
                centre, size, degrees, mirrored = random_view(box, keypoints, *self.size,
                                                                   *self.augment, self.upper)
        else:
            (centre, size), degrees, mirrored = fit_box(box, *self.size), 0.0, False
        matrix = affine(centre, size, *self.size, degrees)
        crop = warp(self.source[i]["image"].as_subclass(torch.Tensor), matrix, *self.size)
        joints, labelled = move(matrix, keypoints[:, :2]), keypoints[:, 2] > 0
        if mirrored and self.mirrors:
            crop, joints, labelled = mirror(crop, joints, labelled, self.flip)
        return {"image": crop, "joints": torch.from_numpy(joints).float(),
                "labelled": torch.from_numpy(labelled)}

    def photo(self, index):
        """A test sample: the crops of all persons of a photo, and how to get back to it."""
        image, truth = self.source[index]["image"].as_subclass(torch.Tensor), self.truths[index]
        boxes, scores = self.boxes[index]
        crops, back, area = views(image, boxes, *self.size)
        return {"images": crops, "back": back, "area": area, "scores": scores, "index": index,
                "id": self.source.ids[index],
                "truth": truth | {"labels": np.full(len(truth["area"]), PERSON)}}


def open_pose(path, size, fraction=1.0, seed=0, overfit=False, boxes=None, augment=(0.5, 40.0),
              pairs=None, flip=True, **reading):
    """(training set of persons, validation set of photos) for pose estimation; see open_sources.

    size: (H, W) of the crops; boxes: file of a detector's boxes for the validation photos; augment:
    (zoom, rotation) of random_view; pairs: see flip_order; flip: whether to mirror.
    """
    keys = ["boxes", "classes", "area", "keypoints"]
    train, val = open_sources(path, TOY_PHOTO, keys, fraction, overfit, **reading)
    train = Pose(train, True, size, seed, None if overfit else augment, pairs=pairs, flip=flip)
    if flip and not overfit and not pairs:
        require_sides(path, train.joints, train.flip, [t["keypoints"] for t in train.truths])
    return [train, Pose(val, False, size, seed, boxes=boxes, pairs=pairs, flip=flip)]


def collate_photos(config, samples):
    """Test samples of Pose -> crops of all their persons uint8 [P, 3, H, W], and the samples."""
    return torch.cat([s.pop("images") for s in samples]), samples
