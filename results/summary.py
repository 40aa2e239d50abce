"""Mean and spread over the seeds of the raw figures in this folder, as README's tables."""
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
# metric, factor as printed, decimals
TASKS = {
    "detection": [("AP", 100, 1), ("AP50", 100, 1)],
    "semantic": [("mIoU", 100, 1)],
    "instance": [("AP", 100, 1), ("AP50", 100, 1)],
    "panoptic": [("PQ", 100, 1), ("PQ_things", 100, 1), ("PQ_stuff", 100, 1)],
    "multitask": [("mIoU", 100, 1), ("AP", 100, 1), ("PQ", 100, 1)],
    "depth": [("REL", 1, 3), ("RMSE", 1, 3), ("delta1", 100, 1)],
    "pose": [("AP", 100, 1), ("AP50", 100, 1)],
}


def rows(pattern):
    return [json.loads(line) for path in sorted(HERE.glob(pattern))
            for line in path.read_text(encoding="utf-8").splitlines()]


def cell(values, factor=100, decimals=1):
    values = [factor * v for v in values]
    mean, low, high = (f"{v:.{decimals}f}" for v in (statistics.mean(values), min(values),
                                                     max(values)))
    return f"{mean} ({low} to {high})"


def semantic_table():
    """How much of the pre-trained model is loaded, by step (Table 4)."""
    found = rows("semantic-*.jsonl")
    steps = sorted({r["step"] for r in found})
    print("| loaded | " + " | ".join(f"step {s}" for s in steps) + " |")
    print("|---" * (1 + len(steps)) + "|")
    for parts in dict.fromkeys(r["loaded"] for r in found):
        cells = [cell([r["mIoU"] for r in found if (r["loaded"], r["step"]) == (parts, step)])
                 for step in steps]
        print(f"| {parts.replace(',', ' + ')} | " + " | ".join(cells) + " |")


def tasks_table():
    """Every task from scratch and pre-trained, after the last step."""
    print("| task | metric | from scratch | pre-trained |\n|---|---|---|---|")
    for task, metrics in TASKS.items():
        found = rows(f"tasks-{task}-*.jsonl")
        last = max((r["step"] for r in found), default=0)
        for name, factor, decimals in metrics if found else ():
            cells = [cell([r[name] for r in found if (r["start"], r["step"]) == (start, last)],
                          factor, decimals) for start in ("scratch", "pretrained")]
            print(f"| {task} | {name} | " + " | ".join(cells) + " |")


REAL = {
    "detection": ("COCO", "AP50", 100, 2), "instance": ("COCO", "AP50", 100, 2),
    "panoptic": ("COCO", "PQ", 100, 2), "semantic": ("ADE20K, 150 classes", "mIoU", 100, 2),
    "semantic-nyu": ("NYU, 40 classes", "mIoU", 100, 2), "depth": ("NYU", "REL", 1, 3),
    "pose": ("COCO", "AP50", 100, 2),
}


def real_table():
    """Real photos: the metric before training, from scratch, pre-trained; the pre-trained loss."""
    print("| task | data | metric | untrained | from scratch | pre-trained | its loss |")
    print("|---" * 7 + "|")
    for task, (data, name, factor, decimals) in REAL.items():
        found = rows(f"real-{task}.jsonl")
        cells = [[r[name] for r in found if r["start"] == start and name in r][-1:]
                 for start in ("untrained", "scratch", "pretrained")]
        losses = [r[k] for r in found if r["start"] == "pretrained" for k in r if "loss" in k]
        if all(cells):
            cells = " | ".join(f"{factor * c[0]:.{decimals}f}" for c in cells)
            print(f"| {task.split('-')[0]} | {data} | {name} | {cells} | {losses[0]:.3g} to "
                  f"{losses[-1]:.3g} |")


if __name__ == "__main__":
    semantic_table()
    print()
    tasks_table()
    print()
    real_table()
