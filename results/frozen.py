"""
Which tasks have room for a pre-trained decoder at all? Fine-tunings whose decoder stays as it is,
random or pre-trained, beside those that train it; on other scenes than those of the tables.

    python results/frozen.py best.pt depth,pose [SEED...]       # a minute or two a run, one core

The e_i and the heads always learn, and so do backbone and BiFPN. best.pt: of a pre-training
with the recipe of `reproduce.py`. Writes out/frozen, and a line per run to results/frozen.jsonl.
"""
import json
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reproduce
import training
from launch import launch

LOG = Path(__file__).with_suffix(".jsonl")


def graded(start, row, task, seed, frozen):
    """Fine-tune; returns the metric at each evaluation."""
    out = Path("out/frozen", *Path(start).parent.parts[-2:], task,
               f"{row.load} {'frozen' * frozen}".strip(), str(seed))
    words = [*reproduce.finetuning(reproduce.flags().parse_args(["table4"]), row, task, seed).argv]
    words[words.index("--init") + 1] = start
    words[words.index("--data") + 1] += ":1"                # the second world
    script = import_module(reproduce.TASKS[task][0])
    args = training.parse(script.flags(), script.PRESETS, [*words, "--out", str(out)])
    groups, more = training.param_groups, [("decoder.", 0.0)] * frozen  # and no weight decay then
    with mock.patch.object(training, "param_groups", lambda model, decay, scales: groups(
            model, decay, [*more, *scales])):
        script.main(args)
    lines = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[reproduce.TASKS[task][2]] for line in lines if "lr" not in line]


def main(words):
    """Make the runs, one after another."""
    start, tasks, *seeds = words
    torch.set_num_threads(1)
    for seed in map(int, seeds or "0"):
        for task in tasks.split(","):
            for row, frozen in ((r, f) for r in reproduce.PARTS[2:] for f in (True, False)):
                found = dict(start=start, task=task, seed=seed, load=row.load, frozen=frozen)
                found |= dict(commit=reproduce.commit(), metric=reproduce.TASKS[task][2],
                              values=graded(start, row, task, seed, frozen))
                with open(LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(found, flush=True)


if __name__ == "__main__":
    launch(main, sys.argv[1:])
