"""The table of real photos in docs/results.md, from the raw figures that real.sh left here."""
import json
from pathlib import Path

HERE = Path(__file__).parent
REAL = {
    "detection": ("COCO", "AP50", 100, 2), "instance": ("COCO", "AP50", 100, 2),
    "panoptic": ("COCO", "PQ", 100, 2), "semantic": ("ADE20K, 150 classes", "mIoU", 100, 2),
    "semantic-nyu": ("NYU, 40 classes", "mIoU", 100, 2), "depth": ("NYU", "REL", 1, 3),
    "pose": ("COCO", "AP50", 100, 2),
}


def rows(pattern):
    return [json.loads(line) for path in sorted(HERE.glob(pattern))
            for line in path.read_text(encoding="utf-8").splitlines()]


def real_table():
    """Real photos: the metric before training, from scratch, pre-trained; the pre-trained loss."""
    print("| task | data | metric | untrained | from scratch | pre-trained | its loss "
          "(pose: x 1000) |")
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
    real_table()
