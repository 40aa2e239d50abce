"""
GLID: Swin + BiFPN + query decoder, pre-trained as a whole, and the linear heads of its tasks.

Every task is Eq. 1 of the paper, P = H(Dec(Q, Enc(x))): an image goes in, queries ask, a linear
head answers. Pre-training asks "which pixels are hidden at this place?", detection asks "which
object are you?"; only the queries and the linear head differ between tasks.

Read top to bottom: Config, Swin, BiFPN, Decoder, GLID, heads; tokens.py says where tokens live.

Letters in the shape comments
    B  images in the batch        n  visible units (8 x 8 patches) of the whole batch
    T  visible tokens of a stage, of the whole batch in one packed list (no batch axis)
    C  channels of a stage        D  width of BiFPN and decoder
    G  rows of window attention   S  slots in a row = window ** 2
    h  heads, d channels a head   L  decoder layers
    K  keys; in heads: classes    Q  queries of an image; in fine-tuning: M, as in the paper
    p  px a side of a patch       u  px a side of a unit
    N  hidden units of an image (pre-training)
Maps of 1/4 to 1/32 are those of patch 4; `tiny` has patch 2, so 1/2 to 1/16.
"""
import math
import re
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from tokens import Collect, Spread, inside, morton, scatter

# -----------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """Sizes of a GLID. The defaults are the paper's Swin-B model."""
    patch: int = 4                  # px a side; a unit has 8 x 8 patches = one token of stage 4
    width: int = 128                # channels of stage 1, doubled at every stage
    depths: list = field(default_factory=lambda: [2, 2, 18, 2])     # blocks of each stage
    heads: list = field(default_factory=lambda: [4, 8, 16, 32])     # attention heads, each stage
    window: int = 6                 # tokens a side
    drop_path: float = 0.0          # rate of the last encoder block; it rises linearly from 0
    dim: int = 512                  # D [paper]
    decoder_layers: int = 6         # [paper]; a multiple of 3, so that every scale is read
    decoder_heads: int = 16         # a guess, see docs/paper.md
    image_size: int = 192           # pre-training px [paper]

    @property
    def unit(self):
        return 8 * self.patch


PRESETS = {
    # two CPU cores: learns ToyWorld in minutes
    "tiny": dict(patch=2, width=24, depths=[1, 1, 2, 1], heads=[1, 2, 4, 8], window=4, dim=64,
                 decoder_layers=3, decoder_heads=4, image_size=64),
    # one GPU: Swin-T
    "small": dict(width=96, depths=[2, 2, 6, 2], heads=[3, 6, 12, 24], dim=256, decoder_heads=8),
    "base": dict(),
    "large": dict(width=192, heads=[6, 12, 24, 48], window=12),
}

# -----------------------------------------------------------------------------
# Encoder: Swin on packed tokens


class WindowAttention(nn.Module):
    """Swin's window attention with a learned relative position bias, visible tokens only."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        y, x = torch.arange(window ** 2) // window, torch.arange(window ** 2) % window
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("bias_index", index.view(-1), persistent=False)    # [S * S]

    def forward(self, x, windows):
        """[T, C] -> [T, C]; windows: see tokens.Windows."""
        dim, slots = x.shape[1], round(len(self.bias_index) ** 0.5)
        # one gather takes q, k and v of all heads of a token: they lie side by side
        rows = Spread.apply(self.qkv(x), windows.token, windows.place)          # [G * S, 3 C]
        rows = rows.view(-1, slots, 3, self.heads, dim // self.heads)           # [G, S, 3, h, d]
        q, k, v = rows.permute(2, 0, 3, 1, 4)                       # 3 x [G, h, S, d]
        bias = self.bias_table.index_select(0, self.bias_index).view(slots, slots, -1)
        bias = bias.permute(2, 0, 1)                                # [h, S, S]
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)     # [G, h, S, S]
        score.add_(bias)                                # in place: under autocast it stays bf16
        if windows.owner is not None:
            # Windows that share a row must not see each other. Empty slots see each other, so that
            # no row of the softmax is empty; what they compute is never read
            alien = windows.owner[:, None, :, None] != windows.owner[:, None, None]
            score.add_(torch.where(alien, -math.inf, 0.0))          # [G, 1, S, S]
        # softmax sums in fp32 in any case; without `dtype`, autocast would make its output fp32 too
        out = score.softmax(-1, dtype=v.dtype) @ v                  # [G, h, S, d]
        out = out.transpose(1, 2).reshape(-1, dim)                  # [G * S, C]
        return self.proj(Collect.apply(out, windows.place))


class SwinBlock(nn.Module):
    """Window attention, then an MLP, both pre-norm, residual, with drop path: [T, C] -> [T, C]."""

    def __init__(self, dim, heads, window, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drops = drop_path > 0
        # a tensor: for plain numbers torch.compile would make one graph per rate
        self.register_buffer("drop_path", torch.tensor(drop_path), persistent=False)

    def _drop(self, x, windows):
        """Stochastic depth: drop the branch for a whole image, keep its expectation."""
        if not (self.training and self.drops):
            return x
        keep = torch.rand(windows.batch, device=x.device) >= self.drop_path
        return x * (keep / (1 - self.drop_path)).to(x.dtype)[windows.image, None]

    def forward(self, x, windows):                                  # [T, C]
        x = x + self._drop(self.attn(self.norm1(x), windows), windows)
        return x + self._drop(self.mlp(self.norm2(x)), windows)


class PatchMerging(nn.Module):
    """Four children, neighbours in the packed list, become one token: [T, C] -> [T / 4, 2 C]."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(x.view(-1, 4 * x.shape[1])))


class Swin(nn.Module):
    """Packed Swin: pixels of units [n, 3, 8p, 8p] -> normalised tokens of 4 stages, [T, C] each."""

    def __init__(self, config):
        super().__init__()
        widths = [config.width << s for s in range(4)]
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths)).tolist())
        self.patch = config.patch
        self.embed = nn.Linear(3 * config.patch ** 2, config.width)
        self.embed_norm = nn.LayerNorm(config.width)
        self.stages = nn.ModuleList(
            nn.ModuleList(SwinBlock(c, h, config.window, next(rates)) for _ in range(depth))
            for c, h, depth in zip(widths, config.heads, config.depths))
        self.merges = nn.ModuleList(PatchMerging(c) for c in widths[:3])
        # One norm per stage, as in Mask2Former. Pre-training trains them too, so that they transfer
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in widths)

    def patches(self, units):
        """Pixels of units [n, 3, 8p, 8p] -> patches in Z-order [n * 64, 3 * p * p]."""
        y, x = morton(8, units.device).unbind(1)                    # of the 64 patches of a unit
        patches = split_units(units, self.patch)[:, y, x]           # [n, 64, 3, p, p]
        return patches.reshape(-1, 3 * self.patch ** 2)

    def forward(self, units, layout):
        x = self.embed_norm(self.embed(self.patches(units)))        # [T1, C1]
        maps = []
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                x = self.merges[stage - 1](x)
            windows = [layout.windows(stage, shifted) for shifted in (False, True)[:len(blocks)]]
            for i, block in enumerate(blocks):                      # every second block is shifted
                x = block(x, windows[i % 2])
            maps.append(self.norms[stage](x))
        return maps                                                 # 4 x [T_s, C_s]


def resize_bias_table(table, window):
    """Relative position bias [(2v-1)**2, h] of window v -> [(2w-1)**2, h], bicubic."""
    old, new = round(len(table) ** 0.5), 2 * window - 1
    if old == new:
        return table
    grid = table.t().reshape(1, -1, old, old)                       # [1, h, 2v - 1, 2v - 1]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(table.shape[1], -1).t().contiguous()


def swin_from_others(state, config):
    """A Swin's state dict from torchvision, timm or the official repositories -> (state dict with
    our names, name of the source). The window may have any size: its bias table is resized.

    A classifier's file lacks the norms of stages 1-3, because a classifier reads stage 4 only.
    """
    # timm merges at the beginning of a stage, the official code at the end
    late = "layers.0.downsample.reduction.weight" in state
    whose = "torchvision" if not any(k.startswith("layers") for k in state) else \
        "the official repository" if late else "timm"
    out, names = {}, {
        "attn.relative_position_bias_table": "attn.bias_table",
        "mlp.3": "mlp.2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
        "features.0.0": "embed", "features.0.2": "embed_norm",
        "patch_embed.proj": "embed", "patch_embed.norm": "embed_norm"}
    for i in range(len(config.depths)):
        names |= {f"features.{2 * i + 1}": f"stages.{i}", f"layers.{i}.blocks": f"stages.{i}",
                  f"features.{2 * i + 2}": f"merges.{i}",
                  f"layers.{i if late else i + 1}.downsample": f"merges.{i}"}
    for key, value in state.items():
        key = re.sub(r"^layers_(\d)", r"layers.\1", re.sub(r"^norm(\d)", r"norms.\1", key))
        for theirs, own in names.items():
            key = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\1{own}\2", key)
        if key.startswith("norm."):
            key = "norms.3." + key.removeprefix("norm.")
        if key.split(".")[0] in ("embed", "embed_norm", "stages", "merges", "norms") and \
                not key.endswith(("relative_position_index", "attn_mask")):
            out[key] = value.flatten(1) if value.ndim == 4 else value   # convolution -> linear
    return {k: resize_bias_table(v, config.window) if k.endswith("bias_table") else v
            for k, v in out.items()}, whose


# -----------------------------------------------------------------------------
# Neck: BiFPN


class Fusion(nn.Module):
    """One BiFPN node: weighted sum of 2-3 maps -> swish -> 3x3 separable convolution -> norm.

    This is EfficientDet's "fast normalised fusion" with LayerNorm instead of BatchNorm: LayerNorm
    works on packed tokens, and no batch statistics change from pre-training to fine-tuning.
    Hidden tokens are zero before the convolution and dropped after it, so they stay hidden. Its
    weights are stored channels last, as their gradient is; otherwise DDP would warn and copy.
    """

    def __init__(self, dim, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.depthwise.to(memory_format=torch.channels_last)
        self.pointwise = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, maps, shape, place):
        """2-3 maps [T, D] -> [T, D]; shape [B, H, W] of the grid and place [T] in it."""
        weight = self.weight.relu()
        weight = weight / (weight.sum() + 1e-4)
        x = F.silu(sum(w * m for w, m in zip(weight, maps)))
        grid = scatter(x, shape, place).permute(0, 3, 1, 2)         # [B, D, H, W] channels last
        grid = self.depthwise(grid).permute(0, 2, 3, 1)             # [B, H, W, D]
        x = Collect.apply(grid.reshape(-1, grid.shape[-1]), place)
        return self.norm(self.pointwise(x))


def up(x):
    """Nearest-neighbour x2: four children get a copy of their parent. [T, D] -> [4 T, D]."""
    return x.repeat_interleave(4, 0)


def down(x):
    """2x2 max pooling; EfficientDet's 3x3 would read across units. [4 T, D] -> [T, D]."""
    return x.view(-1, 4, x.shape[1]).amax(1)


class BiFPN(nn.Module):
    """Maps [T, C] of 1/4..1/32 -> the same scales, [T, D], after a top-down and a bottom-up pass.

    The decoder never reads the 1/4 map. But through the bottom-up path this map feeds the maps that
    it does read, and so it is pre-trained too. The paper says only "Bi-FPN"; we use one repeat.

    p: inputs, t: after the top-down pass, o: outputs, [T, D] each; the digit is stage + 2, as in
    EfficientDet: p2 is the map of 1/4.
    """

    def __init__(self, widths, dim):
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Linear(c, dim), nn.LayerNorm(dim)) for c in widths)
        self.top_down = nn.ModuleList(Fusion(dim, 2) for _ in range(3))
        self.bottom_up = nn.ModuleList(Fusion(dim, n) for n in (3, 3, 2))

    def forward(self, maps, layout):
        grids = [layout.grid(stage) for stage in range(4)]
        p2, p3, p4, p5 = (lateral(x) for lateral, x in zip(self.lateral, maps))
        t4 = self.top_down[2]([p4, up(p5)], *grids[2])
        t3 = self.top_down[1]([p3, up(t4)], *grids[1])
        o2 = self.top_down[0]([p2, up(t3)], *grids[0])
        o3 = self.bottom_up[0]([p3, t3, down(o2)], *grids[1])
        o4 = self.bottom_up[1]([p4, t4, down(o3)], *grids[2])
        o5 = self.bottom_up[2]([p5, down(o4)], *grids[3])
        return [o2, o3, o4, o5]


# -----------------------------------------------------------------------------
# Decoder


class Attention(nn.Module):
    """Multi-head attention; queries [B, Q, D] look at keys and values [B, K, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        """mask: bool, broadcastable to [B, h, Q, K], True = may look; or None."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)         # [B, h, *, d]
                   for f, x in ((self.q, query), (self.k, key), (self.v, value)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)             # [B, h, Q, d]
        return self.out(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Cross- and self-attention, feed-forward, all pre-norm, residual: [B, Q, D] -> [B, Q, D].

    The paper says "cross-attention and self-attention blocks" and names neither norm nor width of
    the feed-forward. We use pre-norm, as the authors' earlier MixMIM does, and the usual 4 D.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.cross, self.self = Attention(dim, heads), Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, key, value, key_mask, self_mask):          # x: [B, Q, D]
        x = x + self.cross(self.norm1(x), key, value, key_mask)
        y = self.norm2(x)
        x = x + self.self(y, y, y, self_mask)
        return x + self.mlp(self.norm3(x))


class Decoder(nn.Module):
    """Query decoder; its layers read 1/32, 1/16, 1/8 in turn. Positions are added to the keys, not
    to the values, as in DETR and Mask2Former. [CLS] of Eq. 3 is a part of the decoder, so
    Table 4 loads it together with the decoder (a guess)."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.level = nn.Parameter(torch.empty(3, config.dim))       # embeddings of 1/32, 1/16, 1/8
        self.layers = nn.ModuleList(DecoderLayer(config.dim, config.decoder_heads)
                                    for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, queries, maps, layout, self_mask=None, every_layer=False, which=slice(None)):
        """queries [B, Q, D], maps from the BiFPN -> [L, B, Q, D], L = 1 unless every_layer.

        self_mask: bool [Q, Q], True = may look. which: slice, the B images that are asked about.
        """
        keys = []
        for level, stage in enumerate((3, 2, 1)):
            value = maps[stage] + self.level[level]                             # [T, D]
            key = value + layout.position(stage, value.shape[1]).to(value.dtype)
            value, mask = layout.to_batch(value, stage)             # [all images, K, D]
            key = layout.to_batch(key, stage)[0]
            keys.append((key[which], value[which], mask if mask is None else mask[which]))
        x, outputs = queries, []
        for i, layer in enumerate(self.layers):
            x = layer(x, *keys[i % 3], self_mask)
            if every_layer or i + 1 == len(self.layers):
                outputs.append(self.norm(x))                        # one norm, shared by the layers
        return torch.stack(outputs)


# -----------------------------------------------------------------------------
# GLID


# Value of padding pixels inside the units at the border, nearly black. It must not be 0 (the mean
# pixel): while biases are zero, a patch of zeros gives a token of zeros, and there LayerNorm
# multiplies the gradient by 300
PADDING = -2.0


class GLID(nn.Module):
    """The generalist encoder-decoder. Its three parts are what a task inherits (Table 4)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = Swin(config)
        self.bifpn = BiFPN([config.width << s for s in range(4)], config.dim)
        self.decoder = Decoder(config)
        self.apply(_init)
        nn.init.normal_(self.decoder.cls, std=0.02)
        nn.init.normal_(self.decoder.level, std=0.02)

    def visible_units(self, images, layout):
        """Normalised images float [B, 3, H, W] -> pixels of the visible units [n, 3, u, u]."""
        unit = self.config.unit
        height, width = (n * unit for n in layout.grid_units)
        if layout.padded:       # one value for all padding: no answer depends on what was there
            images = torch.where(inside(layout.sizes, *images.shape[2:])[:, None], images, PADDING)
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]),
                       value=PADDING)                               # [B, 3, Uh * u, Uw * u]
        return units_at(images, unit, layout.units)

    def encode(self, images, layout):
        """Normalised images and their layout -> BiFPN maps, 4 x packed [T, D]."""
        return self.bifpn(self.backbone(self.visible_units(images, layout), layout), layout)

    def ask(self, maps, layout, offsets, self_mask=None, every_layer=False, which=slice(None)):
        """Fine-tuning: M queries [CLS] + e_i (Eq. 3) ask about each encoded image, or those of the
        slice `which`. offsets: the e_i, [M, D]. Returns x [L, B, M, D], L = 1 unless every_layer.
        """
        count = len(range(layout.batch)[which])                                         # B
        queries = (self.decoder.cls + offsets).expand(count, -1, -1)        # Eq. 3: [B, M, D]
        if count == 0:                          # nothing to ask, but the e_i stay in the graph
            return queries[None]                # [1, 0, M, D]
        return self.decoder(queries, maps, layout, self_mask, every_layer, which)


def split_units(images, unit):
    """[B, 3, H, W], multiples of the unit -> [B, H / unit, W / unit, 3, unit, unit], a view."""
    return images.unflatten(3, (-1, unit)).unflatten(2, (-1, unit)).permute(0, 2, 4, 1, 3, 5)


def units_at(images, unit, where):
    """Pixels [n, 3, unit, unit] of the units `where`, int [n, 3] = image, row, column."""
    return split_units(images, unit)[tuple(where.long().unbind(1))]


def _init(module):
    """Xavier-uniform linear layers with zero bias, as MAE; norms 1 / 0 (torch's default)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet


def normalize(images):
    """uint8 [B, 3, H, W] -> float, minus ImageNet's mean, divided by its standard deviation."""
    mean, std = pixel_statistics(images.device)
    return (images.float() - 255 * mean) / (255 * std)


@cache
def pixel_statistics(device):
    """ImageNet mean and standard deviation of 0..1 pixels, [3, 1, 1] each; made once per device."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD)]


def unit_statistics(x):
    """Pixels of units [..., P] -> mean and standard deviation of each unit, [..., 1], as MAE."""
    return x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + 1e-6).sqrt()


# -----------------------------------------------------------------------------
# Heads: the only part that changes from task to task. Images are normalised float [B, 3, H, W]


class Pretrainer(nn.Module):
    """Masked image modelling: queries [CLS, M_1..M_N] -> pixels of the N hidden units."""

    def __init__(self, config, norm_pix=False):
        super().__init__()
        self.glid = GLID(config)
        self.norm_pix = norm_pix
        self.mask_token = nn.Parameter(torch.empty(config.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(config.dim, 3 * config.unit ** 2)
        _init(self.head)

    def target(self, images, where):
        """Pixels of the units `where` [B * N, 3] = image, row, column: float [B, N, 3 * unit**2];
        with norm_pix each unit minus its mean, over its standard deviation."""
        x = units_at(images, self.glid.config.unit, where).flatten(1)       # [B * N, 3 unit**2]
        if self.norm_pix:
            mean, std = unit_statistics(x)
            x = (x - mean) / std
        return x.view(len(images), -1, x.shape[1])

    def forward(self, images, layout):
        """images float [B, 3, H, W], multiples of the unit; layout with the same number N of hidden
        units in every image -> (prediction, target), float [B, N, 3 unit**2]."""
        b, cls = len(images), self.glid.decoder.cls
        maps = self.glid.encode(images, layout)
        # the unit's position, in the coordinates of the keys, is added to [M] once, at the input
        queries = self.mask_token + layout.hidden_position(len(cls))        # [B * N, D]
        queries = torch.cat([cls.expand(b, 1, -1), queries.view(b, -1, len(cls))], 1)
        x = self.glid.decoder(queries, maps, layout)[-1]                     # [B, 1 + N, D]
        return self.head(x[:, 1:]), self.target(images, layout.hidden_units)


def in_fp32(layer, x):
    """A linear layer whose answer must not be rounded to bf16: boxes would be off by pixels, and
    scores would tie."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


class Detector(nn.Module):
    """Queries -> a box and the probabilities of K classes, two linear layers.

    Training runs two groups of queries that do not see each other: the one-to-one group, which is
    all that runs at test, and a larger one-to-many group, whose only purpose is more matches to
    learn from (H-DETR). Both share everything but their e_i.
    """

    def __init__(self, config, num_classes, one_to_one=300, one_to_many=1500):
        super().__init__()
        self.glid = GLID(config)
        self.groups = [one_to_one, one_to_many]
        self.offsets = nn.Parameter(torch.zeros(sum(self.groups), config.dim))      # e_i of Eq. 3
        self.classify = nn.Linear(config.dim, num_classes)
        self.box = nn.Linear(config.dim, 4)
        # Both layers start at zero (a guess; Deformable DETR's box layer does): docs/results.md
        # says what random weights cost. Every class starts with probability 0.01 (focal loss's
        # prior), because otherwise 1800 x K answers "no" would outweigh the few answers "yes"
        for weight in (self.classify.weight, self.box.weight, self.box.bias):
            nn.init.zeros_(weight)
        nn.init.constant_(self.classify.bias, -math.log(99))

    def forward(self, images, layout, train=False):
        """-> class logits [L, B, Q, K], boxes [L, B, Q, 4] = centre x, y, width, height in 0..1 of
        the image (not of the padded batch). train: from every layer and both groups of queries."""
        offsets, self_mask = self.offsets[:self.groups[0]], None
        if train:
            offsets = self.offsets
            group = torch.arange(len(offsets), device=offsets.device) < self.groups[0]      # [Q]
            self_mask = group[:, None] == group                                         # [Q, Q]
        x = self.glid.ask(self.glid.encode(images, layout), layout, offsets, self_mask, train)
        return in_fp32(self.classify, x), in_fp32(self.box, x).sigmoid()


class MaskHead(nn.Module):
    """M queries -> class logits and masks (Eq. 4), for all three kinds of segmentation."""

    def __init__(self, dim, num_queries, num_classes):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(num_queries, dim))          # e_i of Eq. 3
        self.classify = nn.Linear(dim, num_classes + 1)                     # last = no object
        self.embed = nn.Linear(dim, dim)
        self.apply(_init)

    def forward(self, x, map4):
        """x [L, B, M, D], f^b [B, H, W, D] -> classes [L, B, M, K + 1], masks [L, B, M, H, W]."""
        # Eq. 4 without its sigmoid: the losses combine it with the logarithm
        masks = torch.einsum("lbmd,bhwd->lbmhw", self.embed(x), map4)
        return in_fp32(self.classify, x), masks


class Segmenter(nn.Module):
    """GLID with one MaskHead per task; everything but the heads is shared (Table 3)."""

    def __init__(self, config, queries, classes):
        """queries, classes: dicts task -> number of queries M, number of classes K."""
        super().__init__()
        self.glid = GLID(config)
        self.heads = nn.ModuleDict({t: MaskHead(config.dim, queries[t], classes[t])
                                    for t in queries})

    def forward(self, images, layout, asked, every_layer=False):
        """One pass of the encoder, then every task asks about its images.

        asked: dict task -> slice of the batch; a task without an image gets an empty slice, so that
        its head has a gradient (of zero) in every process.
        Returns dict task -> (classes [L, B, M, K + 1], mask logits [L, B, M, H, W] at 1/4 of the
        padded canvas), B the images of its slice, L = 1 unless every_layer.
        """
        maps, answers = self.glid.encode(images, layout), {}
        map4 = layout.to_grid(maps[0], 0)           # f^b of Eq. 4: the BiFPN's, see docs/paper.md
        for task, mine in asked.items():
            head = self.heads[task]
            x = self.glid.ask(maps, layout, head.offsets, None, every_layer, mine)
            answers[task] = head(x, map4[mine])
        return answers


class DepthEstimator(nn.Module):
    """M queries -> M bins of depth, mixed at every pixel (Eq. 5-7), as in AdaBins, BinsFormer."""

    def __init__(self, config, num_queries, min_depth, max_depth):
        super().__init__()
        self.glid = GLID(config)
        self.min_depth, self.max_depth = min_depth, max_depth               # metres
        self.offsets = nn.Parameter(torch.zeros(num_queries, config.dim))   # e_i of Eq. 3
        # No biases: a term that all queries share cancels in the softmax over them (Eq. 5 and 6)
        self.length = nn.Linear(config.dim, 1, bias=False)
        self.embed = nn.Linear(config.dim, config.dim, bias=False)
        self.length.apply(_init)
        self.embed.apply(_init)

    def bins(self, x):
        """x [B, M, D] -> centres of the bins in metres, float [B, M], rising (Eq. 5)."""
        # Eq. 5 needs lengths that sum to 1; the paper does not say how. Softmax, as BinsFormer
        length = in_fp32(self.length, x)[..., 0].softmax(-1)
        middle = length.cumsum(-1) - length / 2             # all bins before it and half of its own
        return self.min_depth + (self.max_depth - self.min_depth) * middle  # Eq. 5

    def shares(self, images, layout):
        """-> centres of the bins [B, M], and the share of each at each pixel, float [B, M, H, W] at
        1/4 of the padded canvas (Eq. 6)."""
        maps = self.glid.encode(images, layout)
        x = self.glid.ask(maps, layout, self.offsets)
        x, map4 = x[-1], layout.to_grid(maps[0], 0)         # [B, M, D], f^b [B, H, W, D]
        logits = torch.einsum("bmd,bhwd->bmhw", self.embed(x), map4)
        return self.bins(x), logits.float().softmax(1)      # Eq. 6

    def forward(self, images, layout):
        """-> depth in metres, float [B, H, W] at 1/4 of the padded canvas."""
        centre, share = self.shares(images, layout)
        # Eq. 7; not an einsum, which autocast would round to bf16: steps of 3 cm at 5 m
        return (centre[:, :, None, None] * share).sum(1)


class PoseEstimator(nn.Module):
    """One query per joint; its heatmap is a dot product with the 1/4 map (Eq. 8)."""

    def __init__(self, config, num_joints=17):
        super().__init__()
        self.glid = GLID(config)
        self.offsets = nn.Parameter(torch.zeros(num_joints, config.dim))    # e_i of Eq. 3
        self.embed = nn.Linear(config.dim, config.dim)
        _init(self.embed)

    def forward(self, images, layout):
        """Person crops [B, 3, H, W] -> heatmaps float [B, J, h, w] of 1/4 the size, unbounded."""
        maps = self.glid.encode(images, layout)
        x = self.glid.ask(maps, layout, self.offsets)
        map4 = layout.to_grid(maps[0], 0)                                   # [B, h, w, D]
        # 1 / D is a guess of ours; the linear layer can undo it. Without it one step of Adam would
        # move a heatmap by lr * D ** 2, and no sigmoid keeps a heatmap within 0..1
        embedded = self.embed(x[-1]) / x.shape[-1]                          # [B, J, D]
        return torch.einsum("bmd,bhwd->bmhw", embedded, map4)                           # Eq. 8
