"""
Which row of window attention each window gets; planned on the CPU, by the data processes.

A window of which three quarters are hidden would waste most of its row. So windows whose visible
slots do not collide share a row, and a mask keeps them apart.

Letters: n visible units, S slots in a row = window ** 2, W windows, P patterns of occupied slots,
k windows that a unit can touch along an axis, G rows.
"""
import math
from functools import lru_cache

import numpy as np

WORD = 48                       # slots, a bit each, in a number: a float64 holds 53 bits exactly


def share_rows(occupied):
    """Give every window a row of attention; windows whose visible slots do not collide share one.

    Where nothing is hidden, Swin's cyclic shift does this: it joins the half windows of opposite
    borders. At 75 % hidden, sharing saves over half of the rows. Windows with the same pattern of
    occupied slots are interchangeable, and a batch has few patterns. So patterns are packed: take
    the first one left, add the next ones that fit, and fill rows until one of them is used up.

    occupied: int64 [W, words], the occupied slots of each window as bits. Returns int64 [W].
    """
    code = occupied[:, 0]
    for word in occupied.T[1:]:             # window > 6 has several words: join them in one number
        code, word = (np.unique(x, return_inverse=True)[1] for x in (code, word))
        code = code * len(occupied) + word
    _, first, pattern_of, left = np.unique(code, return_index=True, return_inverse=True,
                                           return_counts=True)
    patterns = occupied[first]              # [P, words]; left: [P], its windows without a row yet
    # First come patterns whose slots many windows want, because these slots need the most rows
    slots = np.unpackbits(np.ascontiguousarray(patterns).view(np.uint8), axis=1).astype(np.int64)
    wanted = left @ slots                                   # windows that occupy each slot
    order = np.argsort(-(slots @ wanted), kind="stable")

    # Which patterns fit together. A set of patterns is a Python integer, bit i = the i-th one
    patterns = patterns[order]
    fits = ((patterns[:, None] & patterns) == 0).all(-1)    # [P, P]
    np.fill_diagonal(fits, False)                           # a pattern without slots fits itself
    fits = [int.from_bytes(row.tobytes(), "little")
            for row in np.packbits(fits, axis=1, bitorder="little")]
    order, left = order.tolist(), left.tolist()
    row, remaining, rows_of = 0, (1 << len(fits)) - 1, [[] for _ in left]
    while remaining:
        candidates, together = remaining, []                # patterns that will share rows
        while candidates:
            i = (candidates & -candidates).bit_length() - 1         # the lowest bit: the first
            together.append(i)
            candidates &= fits[i]
        rows = min(left[order[i]] for i in together)
        for i in together:
            rows_of[order[i]] += range(row, row + rows)
            left[order[i]] -= rows
            if left[order[i]] == 0:
                remaining &= ~(1 << i)
        row += rows

    # The windows of a pattern, in their order, take the rows that were given to it
    row_of = np.empty(len(occupied), np.int64)
    row_of[np.argsort(pattern_of, kind="stable")] = sum(rows_of, [])
    return row_of


def touched(side, window):
    """k, the most windows that `side` tokens in a row can touch."""
    return (side - 2) // window + 2


@lru_cache
def slots_of_units(side, window):
    """Slots that a unit of side x side tokens occupies in each of the k x k windows it touches, as
    bits: float64 [words, window * window, k * k], by the unit's place (y, x) in its first window.
    """
    k = touched(side, window)
    slots = np.zeros((window, window, k * k, window * window), bool)
    for y, x in np.ndindex(window, window):
        canvas = np.zeros((k * window, k * window), bool)           # k x k windows, side by side
        canvas[y:y + side, x:x + side] = True                       # the unit
        windows = canvas.reshape(k, window, k, window).swapaxes(1, 2)
        slots[y, x] = windows.reshape(k * k, window * window)
    slots = slots.reshape(window * window, k * k, -1)
    words = [slots[..., i:i + WORD] for i in range(0, window * window, WORD)]
    return np.stack([word @ 2.0 ** np.arange(word.shape[-1]) for word in words])


def plan(units, origin, side, window):
    """Row of attention of every window that a unit touches.

    units: int64 [n, 3] image, row, column; origin: [n, 2], the unit's first token counted from the
    corner of the image's first window, y and x. Returns rows [n, k * k], G, W.
    """
    k, first, begin = touched(side, window), origin // window, origin % window  # 2 x [n, 2]
    wide = int(first.max()) + k
    near = np.arange(k)
    number = (units[:, :1] * wide + first[:, :1] + near)[:, :, None] * wide
    number = (number + (first[:, 1:] + near)[:, None]).reshape(len(units), -1)      # [n, k * k]
    table, place = slots_of_units(side, window), begin[:, 0] * window + begin[:, 1]
    occupied = np.stack([np.bincount(number.ravel(), word[place].ravel()) for word in table], 1)
    used = occupied.any(1).nonzero()[0]     # bincount added distinct bits, so it joined the slots
    row_of = np.zeros(len(occupied), np.int64)
    row_of[used] = rows = share_rows(occupied[used].astype(np.int64))
    return row_of[number], int(rows.max()) + 1, len(used)


def enough(needed, budget):
    """Rows that a batch gets -> (rows, level): the budget, which is level 0, or the lowest higher
    level that is enough. There are few levels, and so few different shapes.

    The answer depends on batch and budget alone, so a resumed run gets the same one.
    """
    for level in range(99):
        rows = [math.ceil(b * (1 + 0.05 * (2 ** level - 1))) for b in budget]
        if all(n <= r for n, r in zip(needed, rows)):
            return rows, level
