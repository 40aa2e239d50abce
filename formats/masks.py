"""
COCO's three ways to write a mask (polygons, run lengths, run lengths squeezed into a string) ->
bool arrays, pixel for pixel as the official tool draws them, in numpy.
"""
import numpy as np


def from_runs(counts, height, width):
    """Run lengths of 0s, 1s, 0s, ... down the columns -> bool [height, width].

    counts: list of ints (uncompressed) or str / bytes (compressed). Raises ValueError if the runs
    do not fill the mask.
    """
    runs = np.asarray(decompressed(counts) if isinstance(counts, str | bytes) else counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any() \
            or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths do not fill {height} x {width} pixels")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def decompressed(text):
    """COCO's string -> run lengths. Six bits a character from '0' on: five of the number, lowest
    first, then "more follows"; from the fourth run on the difference to the run before last.
    ValueError for other characters."""
    data = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
    runs, value, shift = [], 0, 0
    for c in data.astype(np.int64).tolist():
        c -= 48
        if not 0 <= c < 64:
            raise ValueError("not a compressed mask")
        value |= (c & 31) << shift
        shift += 5
        if not c & 32:
            value -= (c & 16) << (shift - 4)            # the sign bit of the last five
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


def to_runs(mask):
    """bool [height, width] -> run lengths of 0s, 1s, 0s, ... down the columns, as from_runs reads
    them: list of ints."""
    pixels = np.asarray(mask, bool).T.ravel()
    ends = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(ends, prepend=0, append=pixels.size).tolist()


def compressed(runs):
    """Run lengths -> COCO's string, what `decompressed` reads: str."""
    text = []
    for i, value in enumerate(runs):
        value -= runs[i - 2] if i > 2 else 0
        more = True
        while more:
            five, value = value & 31, value >> 5            # Python's shift keeps the sign
            more = value != (-1 if five & 16 else 0)
            text.append(chr(48 + five + 32 * more))
    return "".join(text)


def from_polygon(points, height, width):
    """Corners x0 y0 x1 y1 ... in pixels -> bool [height, width], even-odd.

    As the official rleFrPoly: the outline is walked on a grid five times finer, and every step
    from column to column toggles the pixels below it; so no anti-aliasing, and no other library's
    polygon agrees at the border.
    """
    corner = np.asarray(points, np.float64).reshape(-1, 2)
    # C casts towards zero
    fine = np.trunc(5 * corner + 0.5).astype(np.int64)                      # [k, 2] x, y
    start, end = fine, np.roll(fine, -1, 0)
    delta = np.abs(end - start)
    length = delta.max(1)                                                   # steps of each edge
    edge = np.repeat(np.arange(len(fine)), length + 1)                      # edge of each point
    step = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    steep = delta[:, 1] > delta[:, 0]                                       # walk along y
    main = steep.astype(np.int64)
    rows = np.arange(len(fine))
    # each edge is walked from its lower end along the main axis, so that neighbours that share
    # it round alike; the points keep the order of the outline
    flip = start[rows, main] > end[rows, main]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    slope = (high - low)[rows, 1 - main] / np.maximum(length, 1)
    t = np.where(flip[edge], length[edge] - step, step)
    along = t + low[rows, main][edge]
    across = np.trunc(low[rows, 1 - main][edge] + slope[edge] * t + 0.5).astype(np.int64)
    x, y = np.where(steep[edge], across, along), np.where(steep[edge], along, across)
    # where the outline enters another column of fine pixels that starts a column of real ones
    turn = np.flatnonzero(x[1:] != x[:-1])
    column = np.minimum(x[1:], x[:-1])[turn]                                # u or u - 1 of the tool
    column = (column + 0.5) / 5 - 0.5
    row = (np.minimum(y[1:], y[:-1])[turn] + 0.5) / 5 - 0.5
    keep = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = np.ceil(row[keep].clip(0, height)).astype(np.int64)
    at = np.sort(column[keep].astype(np.int64) * height + row)
    return from_runs(np.diff(at, prepend=0, append=height * width), height, width)


def mask(segmentation, height, width):
    """A COCO "segmentation": list of polygons (their union), or {"counts", "size"} -> bool [H, W].

    Raises ValueError with a reason that fits behind the annotation's name.
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"its mask has size {segmentation.get('size')}, its photo "
                             f"{[height, width]}")
        return from_runs(segmentation["counts"], height, width)
    out = np.zeros((width, height), bool).T             # columns are contiguous, as runs are
    for points in segmentation:
        out |= from_polygon(points, height, width)
    return out


def stack(masks, count, height, width):
    """Masks of a photo, which may overlap, as a few maps: mask k is where a map holds k + 1.

    masks: `count` bool [height, width], one at a time. Returns [L, height, width], uint8 if that is
    enough, else int16; L is 1 if nothing overlaps. 600 separate masks of 1500 x 1500 px would take
    1.3 GB; and one map is flipped, scaled and cropped as fast as one mask.
    """
    layers = []
    for k, mask in enumerate(masks):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(ys):
            continue
        box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
        part = mask[box]
        layer = next((m for m in layers if not m[box][part].any()), None)
        if layer is None:
            layer = np.zeros((height, width), np.uint8 if count < 256 else np.int16)
            layers.append(layer)
        layer[box][part] = k + 1
    return np.stack(layers) if layers else np.zeros((1, height, width), np.uint8)


def unstack(layers, ids):
    """What stack made -> masks bool [N, height, width] of the numbers `ids`, counted from 1."""
    masks = np.zeros((len(ids), *layers.shape[1:]), bool)
    for mask, i in zip(masks, ids):
        for layer in layers:
            if not mask.any():
                np.equal(layer, i, out=mask)
    return masks
