"""
What every task is graded with: Hungarian matching and the losses of the paper's section 3.

All of it runs in fp32, whatever the network runs in: a matching cost in half precision ties where
there is no tie, and logs of small numbers vanish.

Letters: L decoder layers, B images, Q queries, N objects of an image (padded to the most crowded
image of the batch), M = matched pairs of the whole batch, K classes, P points.
"""
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

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


def pad_targets(tensors, value=0):
    """List of B tensors [N_b, ...] of the same trailing shape -> [B, max N_b, ...]."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


@torch.no_grad()
def hungarian(cost, counts):
    """One-to-one assignment of queries to objects, of every layer and image at once.

    cost:   dict name -> weighted float tensor [L, B, Q, N]; their sum is minimised. Named, so that
            a non-finite term can be blamed.
    counts: list of B ints, the real number of objects of each image (the rest of N is padding).
    Returns int64 [M] each: layer, image, query, object. The optimum is scipy's (Jonker-Volgenant);
    equal costs are decided somehow, but always the same way, which is how the identical queries of
    a fresh head (e_i = 0, Eq. 3) come apart.
    """
    for name, term in cost.items():
        real = torch.arange(term.shape[-1], device=term.device) < torch.tensor(
            counts, device=term.device)[:, None, None]
        if not term.masked_fill(~real, 0).isfinite().all():
            raise FloatingPointError(f"matching cost '{name}' is not finite: the network diverged; "
                                     "lower --lr or resume from the last checkpoint")
    total = sum(cost.values()).cpu().numpy()                # one transfer for the whole batch
    found = []
    for layer in range(total.shape[0]):
        for image, n in enumerate(counts):
            if n:
                query, obj = linear_sum_assignment(total[layer, image, :, :n])
                found += [(layer, image, q, o) for q, o in zip(query, obj)]
    found = torch.tensor(found, dtype=torch.long).reshape(-1, 4)
    return found.to(next(iter(cost.values())).device).unbind(1)


# -----------------------------------------------------------------------------
# Masks: classification, binary cross-entropy and dice on sampled points (Mask2Former)


def sample_points(maps, points):
    """Bilinear values of maps [M, H, W] at points [M, P, 2] = (x, y) in 0..1 -> [M, P]."""
    # "border": zeros outside would make every edge of the photo look undecided
    grid = 2 * points[:, None] - 1                                          # [M, 1, P, 2]
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0, 0]


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
    """Points where the mask is undecided, as PointRend: of `oversample` x count random points the
    importance x count with the smallest |logit|, the rest uniform. [M, H, W] -> [M, count, 2].

    scale: [M, 2] = (x, y) share of the canvas that the image covers; points stay inside.
    """
    m, keep = len(logits), int(importance * count)
    candidates = torch.rand(m, oversample * count, 2, device=logits.device) * scale[:, None]
    value = sample_points(logits, candidates).abs()
    chosen = value.topk(keep, dim=1, largest=False).indices                 # [M, keep]
    chosen = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    uniform = torch.rand(m, count - keep, 2, device=logits.device) * scale[:, None]
    return torch.cat([chosen, uniform], 1)


def segmentation_loss(class_logits, mask_logits, targets, canvas, num_objects, points=12544):
    """Mask2Former's set loss, summed over the decoder layers, each matched anew.

    class_logits: [L, B, Q, K + 1], last = no object.
    mask_logits:  [L, B, Q, h, w], the 1/4 map of the padded canvas.
    targets:      list of B dicts, labels int64 [N_b], masks bool [N_b, H_b, W_b] of the image.
    canvas:       (H, W) px of the padded canvas that mask_logits cover.
    num_objects:  float, objects per process averaged over processes (>= 1), the normaliser.
    Returns dict of scalars: class, mask, dice (unweighted sums over layers) and their total with
    the weights 2, 5, 5. Finite without objects, and every query gets a gradient.
    """
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    device, counts = class_logits.device, [len(t["labels"]) for t in targets]
    scale = sampled_share([t["masks"].shape[-2:] for t in targets], canvas,
                          mask_logits.shape[-2:]).to(device)                # [B, 2] x, y
    labels = pad_targets([t["labels"] for t in targets])                    # [B, N]
    masks = pad_masks([t["masks"] for t in targets], canvas)                # [B, N, H, W]

    layer = image = query = obj = torch.empty(0, dtype=torch.long, device=device)      # [M]
    if any(counts):
        cost = segmentation_cost(class_logits, mask_logits, labels, masks, scale, points)
        layer, image, query, obj = hungarian(cost, counts)

    # classes: every query, the unmatched ones answer "no object" with a tenth of the weight
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

    # masks: the matched pairs of all layers and images together
    matched = mask_logits[layer, image, query]                              # [M, h, w]
    at = uncertain_points(matched, scale[image], points)                    # [M, P, 2]
    truth = sample_points(masks[image, obj].float(), at)
    cross_entropy, dice = (x.sum() / num_objects
                           for x in mask_losses(sample_points(matched, at), truth))
    total = 2 * class_loss + 5 * cross_entropy + 5 * dice
    return {"loss": total, "class": class_loss, "mask": cross_entropy, "dice": dice}


def sampled_share(sizes, canvas, grid):
    """Share (x, y) of the canvas that an image's points are drawn from: float [B, 2].

    sizes: B pairs (h, w) px; canvas: (H, W) px; grid: (h, w) tokens of the canvas. All of the
    image, but for half a token at a border that other images of the batch extend beyond: there a
    bilinear sample would mix in tokens that do not exist when the image is alone.
    """
    sizes, canvas = torch.tensor(sizes).float(), torch.tensor(canvas)
    token = canvas / torch.tensor(grid)                                     # px
    own = (sizes / (8 * token)).ceil() * 8 * token                          # to the end of the unit
    inner = torch.where(own < canvas, torch.minimum(sizes, own - token / 2), sizes)
    return (inner / canvas).flip(1)


@torch.no_grad()
def segmentation_cost(class_logits, mask_logits, labels, masks, scale, points):
    """Matching cost 2 (-p of the class) + 5 cross-entropy + 5 dice, dict of [L, B, Q, N].

    The masks are compared at one set of random points per image, shared by all queries and layers.
    """
    layers, b, q = mask_logits.shape[:3]
    n = labels.shape[1]
    # probability, not its logarithm: commensurable with the mask terms (DETR)
    p = class_logits.softmax(-1)
    cost = {"class": -2 * p.gather(3, labels[None, :, None].expand(layers, b, q, n))}
    at = torch.rand(b, points, 2, device=labels.device) * scale[:, None]    # [B, P, 2]
    truth = _sample_channels(masks.float(), at)                             # [B, N, P]
    # one layer at a time: [B, Q, P] of all layers would be the largest tensor of the whole step
    terms = [pairwise_mask_cost(_sample_channels(m, at), truth) for m in mask_logits]
    cost["mask"], cost["dice"] = (5 * torch.stack(t) for t in zip(*terms))
    return cost


def _sample_channels(maps, points):
    """maps [B, C, H, W] at points [B, P, 2] shared by the channels -> [B, C, P]."""
    grid = 2 * points[:, None] - 1                                          # [B, 1, P, 2]
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]


def pad_masks(masks, canvas):
    """List of B bool [N_b, H_b, W_b] -> [B, N, H, W] on the canvas, False where nothing is."""
    out = masks[0].new_zeros(len(masks), max(len(m) for m in masks), *canvas)
    for target, m in zip(out, masks):
        target[:len(m), :m.shape[1], :m.shape[2]] = m
    return out


# -----------------------------------------------------------------------------
# Pose


def heatmap_loss(prediction, target, weight):
    """Smooth L1 (beta 1) of heatmaps: mean over the pixels of a joint, then over joints and images.

    prediction, target: [B, J, h, w]; weight: [B, J], 0 = this joint teaches nothing. The mean is
    over all B * J, as ViTPose's: a batch with fewer joints has a smaller loss. Finite without any
    joint, with gradient zero. For errors below 1 it is half of ViTPose's squared error.
    """
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none")
    return (error.mean((2, 3)) * weight).mean()
