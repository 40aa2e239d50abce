"""Mean and spread over seeds of results/semantic-*.jsonl, as README's table: mIoU by step."""
import json
import statistics
from pathlib import Path

rows = [json.loads(line) for path in sorted(Path(__file__).parent.glob("semantic-*.jsonl"))
        for line in path.read_text().splitlines()]
steps = sorted({r["step"] for r in rows})
print("| loaded | " + " | ".join(f"step {s}" for s in steps) + " |")
print("|---" * (1 + len(steps)) + "|")
for parts in dict.fromkeys(r["loaded"] for r in rows):
    cells = []
    for step in steps:
        values = [100 * r["mIoU"] for r in rows if (r["loaded"], r["step"]) == (parts, step)]
        cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    print(f"| {parts.replace(',', ' + ')} | " + " | ".join(cells) + " |")
