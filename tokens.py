"""
Where tokens live: the packed list of visible tokens that the whole encoder works on.

The image is padded (bottom, right) to units of 8 x 8 patches (32 px, the total stride of stage 4).
`visible` says which units exist for the network: pre-training hides three of four, the padding of a
batch of unequal images hides the units with no image in them. Hidden units cost nothing and can
not reach any output, and masked pre-training, odd sizes and ragged batches are one code path.

Letters: B images, n visible units, T tokens of a stage (all images, one list), C channels, G rows
of window attention, S slots in a row = window ** 2, h heads, d channels of a head, K keys.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F


def morton(side):
    """(y, x) of the side**2 tokens of a unit in Z-order, int64 [side**2, 2].

    The row bit is the low one, so four neighbours in the list are the cell's (0,0) (1,0) (0,1)
    (1,1): Swin's order of the children in patch merging, which lets torchvision's weights fit.
    """
    order = torch.zeros(1, 2, dtype=torch.long)
    child = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    while len(order) < side * side:
        order = (2 * order[:, None] + child).reshape(-1, 2)
    return order


def share_rows(occupied, open_rows=32):
    """Give every window a row of attention; windows whose visible slots do not collide share one.

    First fit, fullest window first. Swin's cyclic shift, which joins the half windows of opposite
    borders, is the special case "nothing hidden". At 75 % hidden it saves over half of the rows.

    occupied: bool [W, S], numpy. Returns the row of each window, int64 [W].
    """
    row_of, rows = np.zeros(len(occupied), dtype=np.int64), []
    bits = [int.from_bytes(w.tobytes(), "big") for w in np.packbits(occupied, axis=1)]
    full = (1 << 8 * ((occupied.shape[1] + 7) // 8)) - (1 << -occupied.shape[1] % 8)
    free = []                                       # rows with a slot left, newest last
    for w in np.argsort(-occupied.sum(1), kind="stable"):
        for i in range(max(0, len(free) - open_rows), len(free)):
            if not rows[free[i]] & bits[w]:
                row = free[i]
                break
        else:
            row, i = len(rows), len(free)
            rows.append(0)
            free.append(row)
        rows[row] |= bits[w]
        row_of[w] = row
        if rows[row] == full:
            free.pop(i)
    return row_of


class Layout:
    """Which units the network sees, and where their tokens sit.

    Tokens of all images are ONE list, visible units only, Z-order inside a unit. Merging is then
    x.view(T // 4, 4 * C), upsampling repeat_interleave(4), 2x2 pooling view(-1, 4, C).amax(1).
    Only window attention and the 3x3 convolution look at neighbours; they go through indices.
    What is data-dependent is planned here on the CPU, by the data processes, so that a GPU never
    waits for it; to(device) moves the plan, and the indices are expanded there when first used.

    sizes:  int64 [B, 2], height and width of each image in px, at the top left of the batch canvas.
    hidden: bool [B, Uh, Uw], units the network must not see; None = nothing is hidden.
    """

    def __init__(self, config, sizes, hidden=None):
        self.config, self.batch, self.sizes = config, len(sizes), sizes.contiguous()
        extent = (sizes + config.unit - 1) // config.unit                       # [B, 2] units
        self.grid_units = extent.amax(0).tolist()                               # Uh, Uw
        seen = exists = inside(extent, *self.grid_units)                        # [B, Uh, Uw]
        if hidden is not None:
            seen = exists & ~hidden
        self.units = seen.nonzero()                         # [n, 3] image, row, column
        self.hidden = (exists & ~seen).nonzero()            # [N of all images, 3]
        self.counts = seen.flatten(1).sum(1).tolist()       # B visible units; never on a GPU
        if min(self.counts) == 0:
            raise ValueError("an image of the batch has no visible unit")
        self.ragged = min(self.counts) < max(self.counts)
        self.padded = bool((sizes < torch.tensor(self.grid_units) * config.unit).any())
        self.coords = []                                    # per stage [T, 3] image, row, column
        for side in (8, 4, 2, 1):
            place = F.pad(morton(side), (1, 0))             # [side**2, 3], image offset 0
            scale = torch.tensor([1, side, side])
            self.coords.append((self.units[:, None] * scale + place).reshape(-1, 3))
        self.plans = {(stage, shifted): self._plan(stage, shifted, extent * (8 >> stage))
                      for stage, depth in enumerate(config.depths) for shifted in (False, True)
                      if shifted is False or depth > 1}
        self._cache = {}

    def _plan(self, stage, shifted, extent):
        """Window of each token: (place in 0..G*S [T], window [T], G, whether rows are mixed).

        A token's window is floor((coordinate + window - shift) / window): no roll, no padding,
        windows at the border are just partly filled (exactly the partition that Swin rolls for).
        """
        w, (b, y, x) = self.config.window, self.coords[stage].unbind(1)
        # as in Swin, an image that fits into one window is not shifted (per image and axis)
        shift = torch.where(extent <= w, 0, w // 2 if shifted else 0)[b]        # [T, 2]
        y, x = y + w - shift[:, 0], x + w - shift[:, 1]
        slot = (y % w) * w + x % w                                              # [T]
        wide = int(max(y.max(), x.max())) // w + 1
        window = (b * wide + y // w) * wide + x // w
        window = window.unique(return_inverse=True)[1]                          # [T] those in use
        windows = int(window.max()) + 1
        occupied = np.zeros((windows, w * w), dtype=bool)
        occupied[window.numpy(), slot.numpy()] = True
        row = share_rows(occupied)                                              # [windows]
        rows = int(row.max()) + 1
        mixed = rows < windows or rows * w * w > len(slot)
        return torch.from_numpy(row)[window] * w * w + slot, window, rows, mixed

    def to(self, device):
        """Move to the device, in place; call it before the first use there."""
        move = partial(torch.Tensor.to, device=device)
        self.sizes, self.units, self.hidden = map(move, (self.sizes, self.units, self.hidden))
        self.coords = [move(c) for c in self.coords]
        self.plans = {k: (move(place), move(window), *more)
                      for k, (place, window, *more) in self.plans.items()}
        return self

    def _cached(self, key, make):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def grid(self, stage):
        """(B, H, W) of the padded token map, and each token's place in it, int64 [T]."""
        def make():
            h, w = (u * (8 >> stage) for u in self.grid_units)
            b, y, x = self.coords[stage].unbind(1)
            return (self.batch, h, w), (b * h + y) * w + x
        return self._cached(("grid", stage), make)

    def to_grid(self, x, stage):
        """Packed [T, C] -> map [B, H, W, C] with zeros where nothing is visible."""
        (b, h, w), place = self.grid(stage)
        return x.new_zeros(b * h * w, x.shape[1]).index_copy_(0, place, x).view(b, h, w, -1)

    def windows(self, stage, shifted, heads):
        """Indices of window attention:
          pick  [3 * G * h * S] rows of qkv viewed as [T * 3 * h, d]; hidden slots repeat a token
          unpick[T * 3 * h]     its inverse
          back  [T * h]         rows of the result viewed as [G * h * S, d]
          block None, or float [G, 1, S, S]: -inf between slots of different windows
        """
        return self._cached(("windows", stage, shifted),
                            lambda: self._windows(stage, shifted, heads))

    def _windows(self, stage, shifted, heads):
        place, window, rows, mixed = self.plans[stage, shifted]
        slots, device = self.config.window ** 2, place.device
        token = place.new_zeros(rows * slots)                       # hidden slots: token 0, unused
        token[place] = torch.arange(len(place), device=device)
        head, part = torch.arange(heads, device=device), torch.arange(3, device=device)
        pick = (token.view(1, rows, 1, -1) * 3 + part.view(3, 1, 1, 1)) * heads \
            + head.view(1, 1, heads, 1)                             # [3, G, h, S]
        back = (place // slots)[:, None] * heads + head             # [T, h]
        back = back * slots + (place % slots)[:, None]
        unpick = back[:, None] + part[:, None] * rows * heads * slots           # [T, 3, h]
        block = None
        if mixed:
            owner = place.new_full((rows * slots,), -1)
            owner[place] = window
            owner = owner.view(rows, 1, slots)
            # hidden slots may look at each other (never read), so that no softmax row is empty
            alien = owner[:, :, :, None] != owner[:, :, None, :]    # [G, 1, S, S]
            block = torch.zeros(alien.shape, device=device).masked_fill_(alien, -math.inf)
        return pick.view(-1), unpick.view(-1), back.view(-1), block

    def position(self, stage, dim):
        """Sine position of every token, float [T, dim], normalised by the image's own extent."""
        def make():
            coords, stride = self.coords[stage], self.config.patch << stage
            return sine_position((coords[:, 1:] + 0.5) * stride / self.sizes[coords[:, 0]], dim)
        return self._cached(("position", stage), make)

    def to_batch(self, x, stage):
        """Packed [T, C] -> keys [B, K, C] and bool [B, 1, 1, K], True = real; None if all are."""
        if not self.ragged:
            return x.view(self.batch, -1, x.shape[1]), None
        def make():
            counts = torch.tensor(self.counts) * (8 >> stage) ** 2
            real = torch.arange(int(counts.max())) < counts[:, None]            # [B, K]
            place = real.view(-1).nonzero()[:, 0]
            return place.to(x.device), real[:, None, None].to(x.device)
        place, real = self._cached(("batch", stage), make)
        keys = x.new_zeros(real.numel(), x.shape[1]).index_copy_(0, place, x)
        return keys.view(self.batch, -1, x.shape[1]), real


def whole(config, images):
    """Layout of a batch [B, 3, H, W] whose images all fill the canvas; nothing hidden."""
    return Layout(config, torch.tensor([images.shape[2:]]).expand(len(images), 2))


def inside(sizes, height, width):
    """bool [B, height, width], True inside the top left sizes [B, 2] = (h, w)."""
    y = torch.arange(height, device=sizes.device)[:, None] < sizes[:, 0, None, None]
    return y & (torch.arange(width, device=sizes.device) < sizes[:, 1, None, None])


def sine_position(yx, dim, temperature=10000):
    """Sine position embedding, half of the channels per axis. yx: [..., 2] in 0..1 -> [..., dim].

    DETR's, with scale 2 pi. Keys and pre-training queries use the same coordinates, so that a
    query can find the keys around the place it asks for.
    """
    pairs = dim // 4
    frequency = temperature ** (-torch.arange(pairs, device=yx.device) / pairs)
    angle = yx[..., None].float() * 2 * math.pi * frequency         # [..., 2, pairs]
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)    # [..., 4 * pairs]


class Pick(torch.autograd.Function):
    """x[pick] whose gradient is a gather as well.

    Hidden slots repeat some token, but their gradient is exactly zero (masked as keys, never read
    as queries), so the inverse gather is the true gradient, without a scatter-add.
    """

    @staticmethod
    def forward(ctx, x, pick, unpick):
        ctx.save_for_backward(unpick)
        return x.index_select(0, pick)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
