"""
What every task is trained with: Hungarian matching and the losses of the paper's section 3.

All of it runs in fp32, whatever the network runs in: in half precision, unequal matching costs
could become equal, and small differences of logarithms could be lost.

Letters: L decoder layers, B images, Q queries, N objects of an image (padded to the most crowded
image of the batch), K classes, P points, M matched pairs of query and object, of all layers and
images together (the queries, M in Eq. 3, are Q here).
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

# -----------------------------------------------------------------------------
# Pre-training


def reconstruction_loss(prediction, target):
    """Eq. 2: squared L2 distance of each hidden unit's pixels, mean over the units.

    prediction, target: float [B, N, pixels]. Divide by `pixels` for the mean squared error of a
    pixel, which is what the logs show. [CLS] has no target and is not among the N.
    """
    return (prediction.float() - target.float()).square().sum(-1).mean()


# -----------------------------------------------------------------------------
# Matching


@torch.no_grad()
def hungarian(cost, counts, repeats=1):
    """Best assignment of queries to objects, for every layer and image; one copy to the CPU.

    cost:    dict name -> weighted float tensor [L, B, Q, N]; their sum is minimised. If a term is
             not finite, FloatingPointError gives its name.
    counts:  list of B ints, the real number of objects of each image (the rest of N is padding).
    repeats: queries an object gets: 1, or k for H-DETR's one-to-many branch; fewer if there are not
             enough queries.
    Returns int64 [M] each: layer, image, query, object. The optimum is scipy's (Jonker-Volgenant);
    ties are broken arbitrarily but always in the same way, which is how queries that begin
    identical (e_i = 0, Eq. 3) become different.
    """
    total = sum(cost.values()).cpu().numpy()
    found = [np.zeros((4, 0), np.int64)]
    for layer, image in np.ndindex(total.shape[:2]):
        n = counts[image]
        real = total[layer, image, :, :n]
        if not np.isfinite(real).all():
            terms = (k for k, v in cost.items() if not v[layer, image, :, :n].isfinite().all())
            raise FloatingPointError(f"matching cost '{next(terms, 'sum')}' is not finite: the "
                                     "network diverged; lower --lr")
        query, obj = linear_sum_assignment(np.tile(real, repeats))
        found.append(np.stack([np.full_like(query, layer), np.full_like(query, image), query,
                               obj % max(1, n)]))
    found = torch.from_numpy(np.concatenate(found, 1))      # [4, M]
    return found.to(next(iter(cost.values())).device).unbind(0)


# -----------------------------------------------------------------------------
# Boxes: focal, L1 and generalised IoU, one-to-one and one-to-many (H-DETR)


def corners(boxes):
    """Boxes [..., 4] as centre x, y, width, height -> x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(a, b):
    """GIoU = IoU - (hull - union) / hull of boxes [..., 4] x1 y1 x2 y2, broadcast: [...].

    Finite for boxes of no area: what is 0 / 0 counts as 0.
    """
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = area_a + area_b - shared
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).prod(-1)
    tiny = 1e-9                             # area; boxes in 0..1 have areas of at most 1
    return shared / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def detection_cost(class_logits, boxes, labels, target_boxes):
    """Matching cost of H-DETR, 2 focal + 5 L1 - 2 GIoU: dict of [L, B, Q, N].

    class_logits [L, B, Q, K], boxes [L, B, Q, 4]; labels [B, N], target_boxes [B, N, 4]. Boxes are
    centre x, y, width, height in 0..1 of the image.
    """
    layers, b, q = boxes.shape[:3]
    # The class cost is the focal loss if the class is the answer (positive) minus the focal loss
    # if it is not (negative): [L, B, Q, K] each
    positive = 0.25 * (1 - class_logits.sigmoid()).square() * F.softplus(-class_logits)
    negative = 0.75 * class_logits.sigmoid().square() * F.softplus(class_logits)
    answer = labels[None, :, None].expand(layers, b, q, -1)                 # [L, B, Q, N]
    found, truth = boxes[:, :, :, None], target_boxes[:, None]              # [L B Q 1 4] [B 1 N 4]
    return {"class": 2 * (positive - negative).gather(3, answer),
            "box L1": 5 * (found - truth).abs().sum(-1),
            "GIoU": -2 * generalized_iou(corners(found), corners(truth))}


def detection_loss(class_logits, boxes, targets, num_objects, repeats=1):
    """Set loss of one group of queries, summed over the decoder layers, each matched anew.

    class_logits: [L, B, Q, K], one sigmoid per class.
    boxes:        [L, B, Q, 4], centre x, y, width, height in 0..1 of the image.
    targets:      list of B dicts, labels int64 [N_b], boxes float [N_b, 4] in the same form.
    num_objects:  float, the normaliser: mean objects of a process in the whole step, at least 1.
    repeats:      queries matched to each object; the normaliser grows with it.
    Returns dict of scalars: class, L1, giou (unweighted) and loss, their sum weighted 2, 5, 2.
    Finite without objects and for boxes of no area, and every query gets a gradient.
    """
    class_logits, boxes = class_logits.float(), boxes.float()
    counts = [len(t["labels"]) for t in targets]
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # [B, N]
    truth = pad_sequence([t["boxes"] for t in targets], batch_first=True)   # [B, N, 4]
    layer, image, query, obj = hungarian(detection_cost(class_logits, boxes, labels, truth),
                                         counts, repeats)
    answer = torch.zeros_like(class_logits)
    answer[layer, image, query, labels[image, obj]] = 1
    normaliser = num_objects * repeats
    focal = sigmoid_focal_loss(class_logits, answer, reduction="sum") / normaliser
    found, truth = boxes[layer, image, query], truth[image, obj]            # [M, 4]
    distance = (found - truth).abs().sum() / normaliser
    giou = (1 - generalized_iou(corners(found), corners(truth))).sum() / normaliser
    return {"loss": 2 * focal + 5 * distance + 2 * giou, "class": focal, "L1": distance,
            "giou": giou}


# -----------------------------------------------------------------------------
# Masks: classification, binary cross-entropy and dice on sampled points (Mask2Former)


def sample_points(maps, points):
    """Bilinear values of maps [M, H, W] at points [M, P, 2] = (x, y) in 0..1 -> [M, P]."""
    return sample_channels(maps[:, None], points)[:, 0]


def sample_channels(maps, points):
    """maps [B, C, H, W] at points [B, P, 2] shared by the channels -> [B, C, P]."""
    # Beyond the centres of the border pixels, their values continue: with zeros, every edge of the
    # photo would look undecided. This is padding_mode="border", which Apple's GPUs lack
    inside = [at.clamp(0.5 / size, 1 - 0.5 / size)
              for at, size in zip(points.unbind(-1), (maps.shape[3], maps.shape[2]))]
    grid = 2 * torch.stack(inside, -1)[:, None] - 1                         # [B, 1, P, 2]
    return F.grid_sample(maps, grid, align_corners=False)[:, :, 0]


def pairwise_mask_cost(logits, masks):
    """Mean binary cross-entropy and dice of every query with every object, on shared points.

    logits: [B, Q, P]; masks: [B, N, P] in 0..1. Returns two [B, Q, N].
    """
    # -log sigma(x) t - log(1 - sigma(x)) (1 - t)  =  softplus(x) - x t: one matrix product
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True)
                     - logits @ masks.transpose(1, 2)) / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ masks.transpose(1, 2) + 1) / (
        p.sum(-1, keepdim=True) + masks.sum(-1)[:, None] + 1)
    return cross_entropy, dice


def mask_losses(logits, targets):
    """Binary cross-entropy (mean over points) and dice of matched pairs, each [M].

    logits, targets: [M, P]; targets in 0..1.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
    return cross_entropy, dice


@torch.no_grad()
def uncertain_points(logits, scale, count, oversample=3, importance=0.75):
    """Sample points where the mask is undecided, as PointRend: importance x count points have the
    smallest |logit| of oversample x count random ones, the rest are uniform.

    logits [M, H, W]; scale [M, 2], from sampled_share -> points [M, count, 2] = (x, y) in 0..1.
    """
    m, keep = len(logits), int(importance * count)
    candidates = torch.rand(m, oversample * count, 2, device=logits.device) * scale[:, None]
    value = sample_points(logits, candidates).abs()
    chosen = value.topk(keep, dim=1, largest=False).indices                 # [M, keep]
    chosen = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    uniform = torch.rand(m, count - keep, 2, device=logits.device) * scale[:, None]
    return torch.cat([chosen, uniform], 1)


def segmentation_loss(class_logits, mask_logits, targets, canvas, num_objects, points=12544):
    """Mask2Former's set loss, summed over the decoder layers, each matched anew. But the queries
    before the first layer get no loss, because they begin equal (Eq. 3).

    class_logits: [L, B, Q, K + 1], last = no object.
    mask_logits:  [L, B, Q, h, w], the 1/4 map of the padded canvas.
    targets:      list of B dicts, labels int64 [N_b], masks bool [N_b, H_b, W_b] of the image.
    canvas:       (H, W) px of the padded canvas that mask_logits cover.
    num_objects:  float, the normaliser: objects per image in the whole step x images here.
    Returns dict of scalars: class, mask, dice (unweighted sums over layers) and loss, their sum
    weighted 2, 5, 5. Finite without objects, and every query gets a gradient; without images
    (B = 0) all are zero.
    """
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    if not targets:
        return dict.fromkeys(("loss", "class", "mask", "dice"),
                             class_logits.sum() * 0 + mask_logits.sum() * 0)
    device, counts = class_logits.device, [len(t["labels"]) for t in targets]
    scale = sampled_share([t["masks"].shape[-2:] for t in targets], canvas,
                          mask_logits.shape[-2:]).to(device)                # [B, 2] x, y
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # [B, N]
    masks = pad_masks([t["masks"] for t in targets], canvas)                # [B, N, H, W]

    layer = image = query = obj = torch.empty(0, dtype=torch.long, device=device)      # [M]
    if any(counts):
        cost = segmentation_cost(class_logits, mask_logits, labels, masks, scale, points)
        layer, image, query, obj = hungarian(cost, counts)

    # Class loss of every query; unmatched ones should answer "no object", with weight 0.1
    last = class_logits.shape[-1] - 1
    answer = torch.full(class_logits.shape[:3], last, device=device)        # [L, B, Q]
    answer[layer, image, query] = labels[image, obj]
    weight = torch.ones(last + 1, device=device)
    weight[last] = 0.1
    # the weighted mean per layer divides by the sum of the weights, as F.cross_entropy does
    class_loss = sum(F.cross_entropy(c.flatten(0, 1), a.flatten(), weight)
                     for c, a in zip(class_logits, answer))

    if not any(counts):                     # keep the masks in the graph, with gradient zero
        nothing = mask_logits.sum() * 0
        return {"loss": 2 * class_loss + nothing, "class": class_loss, "mask": nothing,
                "dice": nothing}

    # Mask losses of the matched pairs, those of all layers and images together
    matched = mask_logits[layer, image, query]                              # [M, h, w]
    at = uncertain_points(matched, scale[image], points)                    # [M, P, 2]
    # The true masks are sampled layer by layer: all of them as floats would be the largest tensor
    parts = (x.split(len(layer) // len(class_logits)) for x in (image, obj, at))
    truth = torch.cat([sample_points(masks[i, o].float(), a) for i, o, a in zip(*parts)])
    cross_entropy, dice = (x.sum() / num_objects
                           for x in mask_losses(sample_points(matched, at), truth))
    total = 2 * class_loss + 5 * cross_entropy + 5 * dice
    return {"loss": total, "class": class_loss, "mask": cross_entropy, "dice": dice}


def sampled_share(sizes, canvas, grid):
    """Share (x, y) of the canvas that an image's points are drawn from: float [B, 2].

    sizes: B pairs (h, w) px; canvas: (H, W) px; grid: (h, w) tokens of the canvas. The share covers
    the image; only where the canvas goes on after the image's last unit, it ends half a token
    earlier: a bilinear sample there would mix in tokens that do not exist if the image is alone.
    """
    sizes, canvas = torch.tensor(sizes).float(), torch.tensor(canvas)
    token = canvas / torch.tensor(grid)                                     # px
    own = (sizes / (8 * token)).ceil() * 8 * token                          # to the end of the unit
    inner = torch.where(own < canvas, torch.minimum(sizes, own - token / 2), sizes)
    return (inner / canvas).flip(1)


@torch.no_grad()
def segmentation_cost(class_logits, mask_logits, labels, masks, scale, points):
    """Matching cost 2 (-p of the class) + 5 cross-entropy + 5 dice, dict of [L, B, Q, N].

    The masks are compared at one set of random points per image, shared by all queries, and by all
    layers (Mask2Former draws others for each layer).
    """
    layers, b, q = mask_logits.shape[:3]
    n = labels.shape[1]
    # the probability, not its logarithm, so that its size compares with the mask terms' (DETR)
    p = class_logits.softmax(-1)
    cost = {"class": -2 * p.gather(3, labels[None, :, None].expand(layers, b, q, n))}
    at = torch.rand(b, points, 2, device=labels.device) * scale[:, None]    # [B, P, 2]
    truth = sample_channels(masks.float(), at)                             # [B, N, P]
    # one layer at a time: [B, Q, P] of all layers would be the largest tensor of the whole step
    terms = [pairwise_mask_cost(sample_channels(m, at), truth) for m in mask_logits]
    cost["mask"], cost["dice"] = (5 * torch.stack(t) for t in zip(*terms))
    return cost


def pad_masks(masks, canvas):
    """List of B bool [N_b, H_b, W_b] -> [B, N, H, W] on the canvas, False where nothing is."""
    out = masks[0].new_zeros(len(masks), max(len(m) for m in masks), *canvas)
    for target, m in zip(out, masks):
        target[:len(m), :m.shape[1], :m.shape[2]] = m
    return out


# -----------------------------------------------------------------------------
# Depth


def silog_loss(prediction, target, eps=1e-3):
    """Scale-invariant loss 10 sqrt(var(g) + 0.15 mean(g)^2), g = log prediction - log target.

    prediction, target: float in metres, of any one shape; prediction > 0. Pixels count
    where target > 0. Eigen's loss. As in BTS, the variance divides by n; as in BinsFormer, the
    logarithms are of depth + eps; as in both, mean and variance are those of all valid pixels of
    the batch, not of each image. Without a valid pixel it is 0 with gradient 0.
    """
    valid = target > 0
    g = torch.log(prediction.float() + eps) - torch.log(target.float() + eps)
    g = torch.where(valid, g, 0)        # not g[valid]: we would wait for the GPU to know its length
    count = valid.sum().clamp(min=1)
    mean = g.sum() / count
    deviation = (g - mean) * valid / count.sqrt()
    # the root is computed as a vector norm: its gradient at a perfect prediction is 0, not NaN
    parts = torch.cat([deviation.flatten(), 0.15 ** 0.5 * mean[None]])
    return 10 * torch.linalg.vector_norm(parts)


# -----------------------------------------------------------------------------
# Pose


def heatmap_loss(prediction, target, weight):
    """Smooth L1 (beta 1) of heatmaps: mean over the pixels of a joint, then over joints and images.

    prediction, target: [B, J, h, w]; weight: [B, J], 0 = this joint teaches nothing. The mean is
    over all B * J, as ViTPose's: a batch with fewer labelled joints has a smaller loss. Without any
    it is 0 with gradient 0. For errors below 1 it is half of ViTPose's squared error.
    """
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none")
    return (error.mean((2, 3)) * weight).mean()
