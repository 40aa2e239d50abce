"""
Where tokens live: the packed list of visible tokens that the whole encoder works on.

The image is padded (bottom, right) to units of 8 x 8 patches (one token of stage 4; 32 px at patch
4). Some units do not exist for the network: pre-training hides three of four, and in a batch of
unequal images the units with no image in them are hidden. Hidden units cost nothing but a
part of the BiFPN's 3x3 convolutions, and cannot reach any output. So masked pre-training, odd sizes
and ragged batches are one code path.

Letters: B images, n visible units, T tokens of a stage (all images, one list), C channels, G rows
of window attention, S slots in a row = window ** 2, k windows that a unit can touch along an axis,
m hidden units of all images (B * N in pre-training, where each image has N).
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from packing import enough, plan, touched

STAGES = range(4)


class Windows(NamedTuple):
    """What window attention needs to know. All rows and slots are one list of G * S places."""
    token: torch.Tensor         # int64 [G * S], the token in each slot; 0 in an empty one
    place: torch.Tensor         # int64 [T], the slot of each token, the inverse of `token`
    owner: torch.Tensor         # int64 [G, S], the window of each slot, -1 = empty; None if every
    #                             row is one full window
    image: torch.Tensor         # int64 [T], the image of each token
    batch: int                  # B


class Plan(NamedTuple):
    """Where Layout.rows holds the rows of one kind of windows."""
    first: int                  # the first column of this kind
    rows: int                   # G
    mixed: bool                 # whether a row may hold slots that must not see each other


class Layout:
    """Which units the network sees, and where their tokens sit.

    Tokens of all images are ONE list, visible units only, Z-order inside a unit. Merging is then
    x.view(T // 4, 4 * C), upsampling repeat_interleave(4), 2x2 pooling view(-1, 4, C).amax(1).
    Only window attention and the 3x3 convolution look at neighbours; they go through indices.

    Four tensors depend on the data. The data processes make them here, and they travel with the
    batch in one copy. The rest is arithmetic on the device, inside the graph if the model is
    compiled. With a budget, all batches of one size and mask ratio then have the same shapes,
    unless `level` rises.

        sizes         int32 [B, 2]  height and width of each image in px
        units         int32 [n, 3]  image, row, column of the visible units
        hidden_units  int32 [m, 3]  image, row, column of the hidden units of all images
        rows          int32 [n, R]  row of attention of each window that a unit touches: k * k
                                    columns for each plan, by stage, plain before shifted windows
    grid_units = (Uh, Uw) of the canvas; longest = most visible units of an image; ragged = images
    differ in their number; padded = an image does not fill the canvas; plans, needed, level: _plan.

    Arguments. sizes: int64 [B, 2] px, images lie at the top left of the batch canvas.
    hidden: bool [B, Uh, Uw], units the network must not see; None = nothing is hidden. ValueError
            if an image has no visible unit.
    budget: list, rows of attention of each plan, see row_budget; None = as few as the batch needs.
    """

    def __init__(self, config, sizes, hidden=None, budget=None):
        self.config, self.batch, self.sizes = config, len(sizes), sizes.int().contiguous()
        extent = (sizes + config.unit - 1) // config.unit                       # [B, 2] units
        self.grid_units = extent.amax(0).tolist()                               # Uh, Uw
        seen = exists = inside(extent, *self.grid_units)                        # [B, Uh, Uw]
        if hidden is not None:
            seen = exists & ~hidden
        counts = seen.flatten(1).sum(1)                                         # visible units
        if counts.min() == 0:
            raise ValueError("an image of the batch has no visible unit")
        self.longest, self.ragged = int(counts.max()), bool((counts != counts[0]).any())
        self.padded = bool((sizes < torch.tensor(self.grid_units) * config.unit).any())
        self.units, self.hidden_units = seen.nonzero().int(), (exists & ~seen).nonzero().int()
        self._plan(extent.numpy(), budget)

    def _plan(self, extent, budget):
        """Set rows, plans {(stage, shifted): Plan}, needed: rows of attention that each plan needs,
        and level: how often the budget had to be raised for them, see packing.enough."""
        window, units, found = self.config.window, self.units.numpy().astype(np.int64), {}
        for stage, shifted in self.kinds(self.config):
            side = 8 >> stage
            shift = shifts(extent * side, window, shifted, np.where)            # [B, 2]
            if shifted and not shift.any():         # no image is shifted: the windows are the same
                found[stage, shifted] = found[stage, False]
            else:
                origin = units[:, 1:] * side + window - shift[units[:, 0]]
                found[stage, shifted] = plan(units, origin, side, window)
        columns, self.needed, windows = map(list, zip(*found.values()))
        self.rows = torch.from_numpy(np.concatenate(columns, 1)).int()
        rows, self.level = (self.needed, 0) if budget is None else enough(self.needed, budget)
        first, self.plans = 0, {}
        for kind, part, g, w in zip(found, columns, rows, windows):
            # mixed: fewer rows (g) than windows (w), or empty slots; with a budget, both may occur
            tokens = len(units) * (8 >> kind[0]) ** 2
            mixed = budget is not None or g < w or g * window ** 2 > tokens
            self.plans[kind] = Plan(first, g, mixed)
            first += part.shape[1]

    @staticmethod
    def kinds(config):
        """(stage, shifted) of each plan; a stage of one block has no shifted windows."""
        return [(stage, shifted) for stage in STAGES for shifted in (False, True)
                if not shifted or config.depths[stage] > 1]

    def to(self, device):
        """Move to the device, in place."""
        for name in ("sizes", "units", "hidden_units", "rows"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def coords(self, stage):
        """Image, row, column of every token: int64 [n, side * side] and [n, side * side, 2]."""
        side, units = 8 >> stage, self.units.long()
        yx = units[:, None, 1:] * side + morton(side, units.device)
        return units[:, :1].expand(yx.shape[:2]), yx

    def windows(self, stage, shifted):
        """The windows of a stage (0..3), shifted or not.

        A token's window is floor((coordinate + window - shift) / window). Nothing is rolled or
        padded: windows at the border are only partly filled. Swin gets this partition by rolling.
        """
        (first, rows, mixed), w, side = self.plans[stage, shifted], self.config.window, 8 >> stage
        extent = (self.sizes.long() + self.config.unit - 1) // self.config.unit * side
        # Each token's window (row, column) and its place inside that window
        image, yx = self.coords(stage)
        yx = yx + w - shifts(extent, w, shifted, torch.where)[image[:, 0], None]
        window, inner = yx // w, yx % w                             # [n, side * side, 2] each

        # A unit touches at most k x k windows, counted from that of its first token; plan() has
        # listed the row of attention of each, in the same order
        near, k = window - window[:, :1], touched(side, w)          # 0 .. k - 1 on both axes
        row = self.rows[:, first:first + k * k].long().gather(1, near[..., 0] * k + near[..., 1])
        place = ((row * w + inner[..., 0]) * w + inner[..., 1]).view(-1)            # [T]
        token = place.new_zeros(rows * w * w)
        token.index_put_((place,), torch.arange(len(place), device=place.device))
        owner = None
        if mixed:
            wide = max(self.grid_units) * side // w + 2     # at least the windows along an axis
            number = (image * wide + window[..., 0]) * wide + window[..., 1]  # unique in the batch
            owner = place.new_full((rows * w * w,), -1)
            owner = owner.index_put_((place,), number.view(-1)).view(rows, w * w)
        return Windows(token, place, owner, image.reshape(-1), self.batch)

    def grid(self, stage):
        """[B, H, W] of the padded token map, and each token's place in it, int64 [T]."""
        h, w = (u * (8 >> stage) for u in self.grid_units)
        image, yx = self.coords(stage)
        return [self.batch, h, w], ((image * h + yx[..., 0]) * w + yx[..., 1]).view(-1)

    def to_grid(self, x, stage):
        """Packed [T, C] -> map [B, H, W, C] with zeros where nothing is visible."""
        return scatter(x, *self.grid(stage))

    def position(self, stage, dim):
        """Sine position of every token, float [T, dim], relative to the image's own size."""
        image, yx = self.coords(stage)
        yx = (yx + 0.5) * (self.config.patch << stage) / self.sizes[image[:, 0], None]
        return sine_position(yx, dim).view(-1, dim)

    def hidden_position(self, dim):
        """Sine position of each hidden unit's centre, in the coordinates of the keys: [m, dim]."""
        image, yx = self.hidden_units[:, 0].long(), self.hidden_units[:, 1:]
        return sine_position((yx + 0.5) * self.config.unit / self.sizes[image], dim)

    def to_batch(self, x, stage):
        """Packed [T, C] -> keys [B, K, C]; mask bool [B, 1, 1, K], True = a token; None = all."""
        if not self.ragged:
            return x.view(self.batch, -1, x.shape[1]), None
        image, cells = self.units[:, 0].contiguous(), (8 >> stage) ** 2
        number = torch.arange(len(image), device=x.device)
        # [B + 1]: image b has the units bounds[b] to bounds[b + 1] - 1
        bounds = torch.searchsorted(image, torch.arange(self.batch + 1, device=x.device).int())
        place = image * self.longest + number - bounds[image]       # [n], a place for each unit
        place = place[:, None] * cells + torch.arange(cells, device=x.device)
        shape = [self.batch, self.longest * cells]                  # B, K
        real = torch.arange(shape[1], device=x.device) < bounds.diff()[:, None] * cells
        return scatter(x, shape, place.view(-1)), real[:, None, None]


def row_budget(config, batches):
    """A budget for Layout, one int per plan, that is enough for nearly every batch like these;
    batches: list of Layout's `hidden`, bool [B, Uh, Uw]."""
    sizes = torch.tensor([[config.image_size] * 2])
    needed = np.array([Layout(config, sizes.expand(len(h), 2), h).needed for h in batches])
    return np.ceil(needed.mean(0) + 4 * needed.std(0) + 1).astype(int).tolist()


def whole(config, images, hidden=None, budget=None):
    """Layout of a batch [B, 3, H, W] whose images all fill the canvas."""
    return Layout(config, torch.tensor([images.shape[2:]]).expand(len(images), 2), hidden, budget)


def inside(sizes, height, width):
    """bool [B, height, width], True inside the top left sizes [B, 2] = (h, w)."""
    y = torch.arange(height, device=sizes.device)[:, None] < sizes[:, 0, None, None]
    return y & (torch.arange(width, device=sizes.device) < sizes[:, 1, None, None])


def shifts(extent, window, shifted, where):
    """Tokens that the windows are shifted by, [B, 2]. As in Swin, an image that fits into one
    window is not shifted (per image and axis). extent: tokens [B, 2]; where: numpy's or torch's."""
    return where(extent <= window, 0, window // 2 if shifted else 0)


def morton(side, device=None):
    """(y, x) of the side**2 tokens of a unit in Z-order, int64 [side**2, 2].

    The row bit is the low one, so four neighbours in the list are the cell's (0,0) (1,0) (0,1)
    (1,1): Swin's order of the children in patch merging, which lets torchvision's weights fit.
    """
    number = torch.arange(side * side, device=device)[:, None]
    axis = torch.arange(2, device=device)
    order = torch.zeros_like(number + axis)
    for bit in range(side.bit_length() - 1):
        order = order + ((number >> (2 * bit + axis) & 1) << bit)
    return order


def sine_position(yx, dim):
    """Sine position embedding, half of the channels per axis. yx: [..., 2] in 0..1 -> [..., dim].

    DETR's, with scale 2 pi. Keys and pre-training queries use the same coordinates, so that a
    query can find the keys around the place it asks for.
    """
    pairs = dim // 4
    frequency = 10000 ** (-torch.arange(pairs, device=yx.device) / pairs)
    angle = yx[..., None].float() * 2 * math.pi * frequency         # [..., 2, pairs]
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)    # [..., 4 * pairs]


# -----------------------------------------------------------------------------
# Between the packed list and windows or maps


def scatter(x, shape, place):
    """Packed [T, C] -> [*shape, C], token t at place[t], else zeros. MPS lacks index_copy_."""
    out = x.new_zeros(math.prod(shape), x.shape[1])
    out = out.index_put_((place,), x) if x.is_mps else out.index_copy_(0, place, x)
    return out.view(*shape, x.shape[1])


class Spread(torch.autograd.Function):
    """Packed [T, C] -> slots [G * S, C], see Windows. Its gradient is a gather as well.

    Empty slots repeat token 0, but their gradient is exactly zero (masked as keys, never read as
    queries), so the inverse gather is the true gradient, without a scatter-add.
    """

    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """Slots [G * S, C] -> packed [T, C]. No slot is read twice, so its gradient is a copy, where
    autograd's own would add."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.slots = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, grad):
        return scatter(grad, [ctx.slots], ctx.saved_tensors[0]), None


# -----------------------------------------------------------------------------
# From the padded canvas back to the photo


def at_original(maps, size, patch, original, align_corners=False):
    """Maps [K, h, w] of a padded canvas -> [K, H0, W0] at the photo's original size.

    size: (H, W) px of the image within the canvas. Bilinear, as Mask2Former: first to the network's
    input, where the padding is cut off, then to the original. Units that are all padding are cut
    off before, so that the answer does not depend on the other images of the batch.
    """
    h, w = (-(-n // (8 * patch)) * 8 for n in size)                     # tokens, up to whole units
    maps = F.interpolate(maps[None, :, :h, :w], (h * patch, w * patch), mode="bilinear",
                         align_corners=align_corners)
    maps = maps[:, :, :size[0], :size[1]]                                   # [1, K, H, W]
    if maps.shape[2:] != torch.Size(original):
        maps = F.interpolate(maps, original, mode="bilinear", align_corners=align_corners)
    return maps[0]
