"""
Curves of one or several runs, finished or still going on: loss and metrics over the steps.

    python curves.py out/detection-scratch out/detection --out out/curves.png
    python curves.py out/all/log.jsonl --metric mIoU,PQ

RUN is a folder with a log.jsonl, or that file. There is a panel for the loss and one for each
metric (default: the first that each run logs). Runs share the panels, as in the paper's Figure 5.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import draw
import training
from formats.files import InputError
from launch import launch

WIDTH, HEIGHT = 520, 340                # px of a panel
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44       # its margins
SMOOTH = 2                              # drawn so many times as large, then reduced
COLOURS = [tuple(c) for c in draw.HUES[[4, 5, 2, 6, 0, 1, 3]].tolist()]     # dark ones first


def read_log(run):
    """log.jsonl of a run -> {name: [(step, value), ...]}, "loss" among them, in the log's order;
    InputError if nothing can be read."""
    path = Path(run, "log.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        # a run that is writing may be in the middle of its last line
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        found = {}
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "lr") and isinstance(value, int | float) \
                        and math.isfinite(value) and value != -1:      # -1: nothing to find
                    found.setdefault("loss" if name == "loss_x1000" else name, []).append(
                        (row["step"], value))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a run's folder or its "
                         "log.jsonl") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{path}: not a log: a line must be a JSON object with a step") from None
    if not found:
        raise InputError(f"{path}: nothing is logged yet; the first line comes after 20 steps")
    return found


def panel(title, curves):
    """Curves {name of a run: [(step, value), ...]} -> PIL image with axes and title."""
    s, size = SMOOTH, 13 * SMOOTH
    image = Image.new("RGB", (WIDTH * s, HEIGHT * s), "white")
    pen, face = ImageDraw.Draw(image), draw.font(size)
    points = np.array([p for curve in curves.values() for p in curve], float)
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    x0, x1 = min(0, x0), max(x1, x0 + 1)
    room = (y1 - y0) * 0.06 or max(abs(y1), 1e-6) * 0.1
    y0, y1 = y0 - room, y1 + room
    left, right, top, bottom = LEFT * s, (WIDTH - RIGHT) * s, TOP * s, (HEIGHT - BOTTOM) * s
    at = lambda x, y: (left + (x - x0) / (x1 - x0) * (right - left),
                       bottom - (y - y0) / (y1 - y0) * (bottom - top))
    for value in draw.ticks(y0, y1):
        y = at(x0, value)[1]
        pen.line((left, y, right, y), (225, 225, 225), s)
        pen.text((left - 6 * s, y), f"{value:.4g}", "black", face, anchor="rm")
    for value in draw.ticks(x0, x1):
        x = at(value, y0)[0]
        pen.line((x, bottom, x, bottom + 5 * s), "black", s)
        pen.text((x, bottom + 7 * s), f"{value:,.0f}", "black", face, anchor="mt")
    pen.line((left, top, left, bottom, right, bottom), "black", s)
    pen.text((right, bottom + 25 * s), "step", "black", face, anchor="rt")
    pen.text((left, top - 8 * s), title, "black", draw.font(15 * s), anchor="lb")
    for (_, curve), colour in zip(curves.items(), COLOURS * len(curves)):
        line = [at(*p) for p in sorted(curve)]
        pen.line([v for p in line for v in p], colour, 2 * s, joint="curve")
        if title != "loss" or len(line) < 3:             # few: show each
            for x, y in line:
                pen.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), colour)
    return image.resize((WIDTH, HEIGHT), Image.LANCZOS)


def legend(names, width):
    """The runs' names with the colours of their curves, in lines of up to `width` px: PIL image."""
    x, y, places = LEFT, 4, []
    for name in names:
        name, face = draw.fitted(name, 13, width - LEFT - 50)
        long = 28 + face.getlength(name) + 22
        if x > LEFT and x + long > width:
            x, y = LEFT, y + 20
        places.append((x, y, name, face))
        x += long
    image = Image.new("RGB", (width, y + 26), "white")
    pen = ImageDraw.Draw(image)
    for (x, y, name, face), colour in zip(places, COLOURS * len(places)):
        pen.line((x, y + 9, x + 20, y + 9), colour, 3)
        pen.text((x + 28, y + 9), name, "black", face, anchor="lm")
    return image


def figure(runs, metrics=None):
    """{name: what read_log returns} -> PIL image; metrics: names of panels besides the loss,
    InputError for one that no log has."""
    firsts = [next((k for k in log if k != "loss"), None) for log in runs.values()]
    metrics = metrics or [k for k in dict.fromkeys(firsts) if k]
    if unknown := [m for m in metrics if not any(m in log for log in runs.values())]:
        known = sorted({k for log in runs.values() for k in log})
        raise InputError(f"--metric {unknown[0]}: is in no log; there are {', '.join(known)}")
    # a run keeps its colour in every panel: it is there with no point, if it has none
    panels = [panel(name, {run: log.get(name, []) for run, log in runs.items()})
              for name in ("loss", *metrics) if any(name in log for log in runs.values())]
    row = draw.beside(panels)
    return draw.below([row, legend(list(runs), row.width)])


def main(args):
    """Draw the logs; returns the path of the picture."""
    folders = [p.parent if p.name == "log.jsonl" else p for p in map(Path, args.runs)]
    names = [f.resolve().name for f in folders]
    if len(set(names)) < len(names):                    # runs of the same name in other folders
        names = list(args.runs)
    if Path(args.out).is_dir():
        raise InputError(f"--out {args.out}: is a folder; give a name that ends in .png")
    runs = {name: read_log(run) for name, run in zip(names, args.runs)}
    draw.save(figure(runs, args.metric), args.out)
    print(args.out)
    return args.out


if __name__ == "__main__":
    parser = training.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", default="out/curves.png", help="PNG to write")
    parser.add_argument("--metric", type=lambda text: text.split(","), metavar="NAMES",
                        help="names in the logs, as mIoU,PQ (default: the first of each run)")
    launch(main, parser.parse_args(sys.argv[1:]))
