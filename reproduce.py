"""
The paper's Tables 3 to 8 and Figures 4 and 5, each as one command, which writes raw numbers, a
Markdown table and pictures to --results. (results/ holds the published ones.)

    python reproduce.py table4 --preset tiny --seeds 4 --jobs 2       # drawn photos, two CPU cores
    python reproduce.py figure5 --preset tiny --seeds 4 --tasks depth # the same runs, as curves
    python reproduce.py table4 --preset base --data DATA --jobs 8     # the paper's own, on 8 GPUs

TABLE is table3 (several tasks in one network), table4 (parts of the pre-trained model), table5
(decoder layers), table6 (length of pre-training), table7 (masks), table8 (few labels), figure4
(attention maps), figure5 (table4's runs as curves) or decoder (the whole model beside backbone +
BiFPN, after shorter and longer pre-training and with 3 layers). DATA holds imagenet/,
ADEChallengeData2016/, coco/ and nyu/ in their official formats; each run is one process on one GPU
with the paper's batch.

Tables share runs: each run is made once, in a folder below --out, and the results are written after
each run. Ctrl-C saves all runs; the same command continues. Fine-tuning seed s starts from
pre-training seed s mod 3, so that two rows with the same seeds are pairs, and a row's difference to
the row above has an error of its own.
"""
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict, namedtuple
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import islice, product
from multiprocessing import active_children, current_process, get_context, set_start_method
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import curves
import draw
import pictures
import predict
import pretrain
import toyworld
import training
from attention import attention
from batching import end_with_parent
from formats.files import InputError, replacing
from launch import Stopped, launch

SEGMENTATION = ("semantic", "instance", "panoptic")
# task: script, folder of --data, metric, factor as printed, decimals; RMSE is better if it is less
TASKS = {
    "semantic": ("finetune_seg", "ADEChallengeData2016", "mIoU", 100, 1),
    "depth": ("finetune_depth", "nyu", "RMSE", 1, 3),
    "detection": ("finetune_det", "coco", "AP", 100, 2),
    "instance": ("finetune_seg", "ADEChallengeData2016", "AP", 100, 1),
    "panoptic": ("finetune_seg", "ADEChallengeData2016", "PQ", 100, 1),
    "pose": ("finetune_pose", "coco", "AP", 100, 1),
}
PRETRAININGS = 3

# Flags of the runs, besides the defaults of the scripts. docs/results.md says what is known of them
DRAWN = "--data toyworld:256:512"
# 4000 steps at 40 times the rate move the e_i as far as the paper's 160,000 of segmentation
LONGER = "--data toyworld:4096:1024 --steps 4000 --eval-every 1000 --query-lr 40"
RECIPES = {
    # two CPU cores, two runs at once: up to an hour a pre-training, two to five minutes the others
    "tiny": {
        "all": "--preset tiny --decoder-layers 6",
        "pretrain": "--data toyworld:16384:1024 --epochs 20 --eval-every 2560",
        **dict.fromkeys((*SEGMENTATION, "depth"), f"{DRAWN} --query-lr 120"),
        "pose": f"{DRAWN} --eval-every 175",
        "detection": "--data toyworld:1024:512 --steps 800 --eval-every 200",
    },
    # the paper's 6 x 6 units, 9 of them visible, at half of its resolution; not run yet
    "tiny96": {
        "all": "--preset tiny --decoder-layers 6",
        "pretrain": "--size 96 --data toyworld:32768:1024 --epochs 40 --eval-every 5120",
        **dict.fromkeys(SEGMENTATION, "--size 96 --data toyworld:256:1024 --query-lr 120"),
        "depth": "--crop 96 96 --data toyworld:256:1024 --query-lr 120",
        "pose": "--data toyworld:256:1024 --eval-every 175",
        "detection": "--size 96 --data toyworld:1024:1024 --eval-every 325",
    },
    # one GPU; untried
    "small": {
        "all": "--preset small",
        "pretrain": "--data toyworld:32768:1024 --epochs 100 --warmup-epochs 5 --eval-every 640",
        **dict.fromkeys((*SEGMENTATION, "detection"), f"{LONGER} --size 192 --batch-size 16"),
        "depth": f"{LONGER} --crop 192 192 --batch-size 16", "pose": LONGER,
    },
    # total batches of 2048 and 16 [paper], and ViTPose's 512, by one process; untried
    "base": {"all": "--preset base", "pretrain": "--accumulate 32",
             **dict.fromkeys((*SEGMENTATION, "detection", "pose"), "--accumulate 8"),
             "depth": "--accumulate 8 --eigen-crop"},
}


class Row(NamedTuple):
    """A row of a table."""
    label: str
    load: str = "backbone,bifpn,decoder"    # of the pre-trained model; None: from scratch
    pretraining: dict = {}                  # flags that differ; epochs: a factor
    finetuning: dict = {}
    tasks: tuple = None                     # trained together, see Table 3; None: each alone
    paper: tuple = ()                       # what the paper reports, in the order of `columns`


PARTS = (Row("nothing, from scratch", None, paper=(34.9, 0.753)),
         Row("backbone", "backbone", paper=(50.9, 0.363)),
         Row("+ BiFPN", "backbone,bifpn", paper=(51.1, 0.341)),
         Row("+ decoder", paper=(52.7, 0.293)))
# name: (tasks that are measured, rows)
TABLES = {
    "table3": (SEGMENTATION, (Row("each alone", paper=(52.7, 30.9, 44.7)), *(
        Row(" + ".join(tasks), tasks=tasks, paper=paper) for tasks, paper in (
            (("semantic", "instance"), (51.3, 29.1, None)),
            (("semantic", "panoptic"), (52.1, None, 43.2)),
            (("instance", "panoptic"), (None, 28.0, 41.5)),
            (SEGMENTATION, (51.8, 28.5, 42.1)))))),
    "table4": (tuple(TASKS), PARTS),
    "table5": (("semantic", "depth"), tuple(
        Row(label, pretraining=flags, finetuning=flags, paper=paper) for label, flags, paper in (
            ("3 layers", {"decoder-layers": 3}, (50.7, 0.302)), ("6 layers", {}, (52.7, 0.293)),
            ("9 layers", {"decoder-layers": 9}, (52.7, 0.292))))),
    # our copy of the paper lacks the numbers of 900 epochs and the names of two masks (50.8, 49.3)
    "table6": (("semantic", "depth"), (PARTS[0], *(
        Row(label, pretraining=flags, paper=paper) for label, flags, paper in (
            ("half of the epochs", {"epochs": 0.5}, (51.5, 0.314)), ("all", {}, (52.7, 0.293)),
            ("half as many again", {"epochs": 1.5}, ()))))),
    "table7": (("semantic",), tuple(
        Row(label, pretraining={"epochs": 0.5} | flags, paper=paper) for label, flags, paper in (
            ("block", {"mask": "block"}, ()), ("grid", {"mask": "grid"}, ()),
            ("random, 0.5", {"mask-ratio": 0.5}, (49.8,)),
            ("random, 0.6", {"mask-ratio": 0.6}, (51.0,)), ("random, 0.75", {}, (51.5,))))),
    "table8": (tuple(TASKS), tuple(
        Row(f"{share:.0%} of the labels, {row.label}", row.load, paper=paper * (row is PARTS[3]),
            finetuning={"data-fraction": share} if share < 1 else {})
        for share, paper in ((0.1, (31.2, 0.317)), (0.2, (35.0, 0.303)), (0.5, (46.3, 0.295)),
                             (1.0, (52.7, 0.293))) for row in PARTS[1:])),
    # not in the paper: what does the decoder add, after which pre-training?
    "decoder": (tuple(TASKS), tuple(
        Row(f"{label}, {row.label}", row.load, flags, flags if "decoder-layers" in flags else {})
        for (label, flags), row in product(
            (("0.3 x the epochs", {"epochs": 0.3}), ("all epochs", {}),
             ("1.5 x the epochs", {"epochs": 1.5}), ("3 x the epochs", {"epochs": 3.0}),
             ("9 x the epochs", {"epochs": 9.0}), ("3 layers", {"decoder-layers": 3})),
            PARTS[2:]))),
    "figure4": (tuple(TASKS), PARTS[3:]),
    "figure5": (tuple(TASKS), PARTS),
}


# -----------------------------------------------------------------------------
# Runs


Fit = namedtuple("Fit", "script out argv")      # one run of a script


def words(args, kind, changes):
    """The flags of a run of `kind`, "pretrain" or a task. Where a flag occurs twice, argparse takes
    the later one."""
    recipe = RECIPES[args.preset]
    line = [*recipe["all"].split(), *recipe[kind].split()]
    if args.data:
        folder = "imagenet" if kind == "pretrain" else TASKS[kind][1]
        line += ["--data", str(Path(args.data, folder))]
    if changes.keys() & {"epochs", "data-fraction"}:
        script = pretrain if kind == "pretrain" else import_module(TASKS[kind][0])
        usual = training.parse(script.flags(), script.PRESETS, line)
        if "epochs" in changes:                             # a share of the recipe's
            changes = changes | {"epochs": max(1, round(changes["epochs"] * usual.epochs))}
        elif not usual.steps:                               # the same steps with fewer labels
            changes = changes | {"epochs": round(usual.epochs / changes["data-fraction"])}
    return [*line, *(word for name, value in changes.items() for word in (f"--{name}", str(value)))]


def named(changes):
    """A folder's name for what differs from the recipe."""
    return " ".join(f"{k}={v}" for k, v in changes.items()) or "recipe"


def pretraining(args, row, seed):
    """The pre-training from which a row's fine-tuning `seed` starts: Fit."""
    seed %= PRETRAININGS
    out = Path(args.out, args.preset, "pretrain", named(row.pretraining), str(seed))
    argv = *words(args, "pretrain", row.pretraining), "--seed", str(seed)
    return Fit("pretrain", str(out), argv)


def finetuning(args, row, task, seed):
    """A row's fine-tuning for a task: Fit."""
    together = ",".join(row.tasks or (task,))
    start = f"{named(row.pretraining)} {row.load}" if row.load else "scratch"
    out = Path(args.out, args.preset, together, start, named(row.finetuning), str(seed))
    argv = [*words(args, task, row.finetuning), "--seed", str(seed)]
    if TASKS[task][0] == "finetune_seg":
        argv += ["--tasks", together]
    if row.load:
        argv += ["--init", str(Path(pretraining(args, row, seed).out, "best.pt")), "--load",
                 row.load]
    return Fit(TASKS[task][0], str(out), tuple(argv))


def do(fit, commit):
    """Start or continue a run unless it is finished; returns the content of its run.json. Output of
    the script goes to OUT/output.txt. Raises Stopped, InputError, FloatingPointError."""
    out, found = Path(fit.out), recorded(fit)
    if "evaluations" in found:
        return found
    out.mkdir(parents=True, exist_ok=True)
    script, begun = import_module(fit.script), time.perf_counter()
    resume = ["--resume"] * (out / "last.pt").exists()
    args = training.parse(script.flags(), script.PRESETS, [*fit.argv, "--out", fit.out, *resume])

    def record(**more):                                     # after a part of the run, or all of it
        commits = dict.fromkeys([*found.get("commit", "").split(), commit])
        seconds = round(found.get("seconds", 0) + time.perf_counter() - begun, 1)
        content = {"script": fit.script, "flags": fit.argv, "seconds": seconds, "resumed":
                   bool(resume), "device": device(), "commit": " ".join(commits)} | more
        with replacing(out / "run.json") as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    try:
        with open(out / "output.txt", "a", encoding="utf-8") as file, \
                contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            script.main(args)
    except Stopped as stopped:
        record()
        stop(*stopped.args)
    except (InputError, FloatingPointError) as error:
        raise type(error)(f"{fit.out}: {str(error).strip().splitlines()[-1]}") from error
    rows = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    record(evaluations=[row for row in rows if "lr" not in row])
    return recorded(fit)


def stop(number, _):
    """Handler of a signal: end here."""
    raise Stopped(number, f"stopped by {signal.Signals(number).name}; the same command "
                           "goes on")


def recorded(fit):
    """Content of OUT/run.json, {} if it is missing; it has "evaluations" once the run is over."""
    path = Path(fit.out, "run.json")
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content and content["flags"] != list(fit.argv):
        raise InputError(f"--out {fit.out}: holds a run of other flags, see its run.json; give "
                         "another --out, or remove it")
    return content


def finished(fit):
    """What OUT/run.json holds, None if the run is not finished."""
    return found if "evaluations" in (found := recorded(fit)) else None


def device():
    """What computes: the GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} thread(s)"
    return platform.processor() or platform.machine()


def commit():
    """The commit of this code, "+" if files were changed since."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+",
             "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def prepare(jobs):
    """Give a worker its share of the cores and one GPU; SIGTERM or our own end ends it."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    number = int(re.search(r"\d+$", current_process().name)[0])             # 1, 2, ...
    gpu = number % (torch.cuda.device_count() or 1)
    os.environ.update(LOCAL_RANK=str(gpu), LOCAL_WORLD_SIZE=str(jobs))      # as torchrun does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=end_with_parent, daemon=True).start()
    set_start_method(None, force=True)          # data processes start by the default method


def at_once(fits, version, jobs):
    """do() in `jobs` processes; yields (Fit, what it returns). When one fails, or somebody stops
    us, the others save and end."""
    left, running = iter(fits), {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare, (jobs,)) as pool:
        try:
            while True:
                # Ctrl-C reaches us alone: the workers inherit that it is ignored. No run waits in
                # the pool, which would begin it after our end
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)
                running |= {pool.submit(do, fit, version): fit
                            for fit in islice(left, jobs - len(running))}
                signal.signal(signal.SIGINT, before)
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        except BrokenProcessPool:
            raise InputError(f"--jobs {jobs}: a run's process was killed; was memory full? The "
                             "same command goes on, with fewer --jobs in less memory") from None
        except BaseException:
            for worker in active_children():
                worker.terminate()
            raise


def do_all(args, fits):
    """Make all runs, --jobs at a time; write the results after each."""
    fits, version = [f for f in dict.fromkeys(fits) if not finished(f)], commit()
    made = at_once(fits, version, args.jobs) if args.jobs > 1 else (
        (fit, do(fit, version)) for fit in fits)
    with tqdm(total=len(fits), desc="runs", file=sys.stdout) as bar:
        for fit, content in made:
            _, *last = content["evaluations"][-1].items()               # the step is the first
            words = ", ".join(f"{k} {v:.4g}" for k, v in last[:3])
            bar.write(f"{fit.out}: {words} ({content['seconds']:.0f} s)", file=sys.stdout)
            bar.update()
            report(args)


# -----------------------------------------------------------------------------
# Results


def spread(values, factor, decimals, sign=""):
    """Mean and its standard error, as printed; one value has no error."""
    values = [factor * v for v in values]
    mean = f"{statistics.mean(values):{sign}.{decimals}f}" if values else ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean if error is None else f"{mean} ± {error:.{decimals}f}"


def difference(pairs, factor, decimals):
    """pairs {seed: difference} -> text: mean ± error (and the mean for each pre-training)."""
    by_start = defaultdict(list)
    for seed, value in sorted(pairs.items()):
        by_start[seed % PRETRAININGS].append(factor * value)
    means = [f"{statistics.mean(values):+.{decimals}f}" for _, values in sorted(by_start.items())]
    return spread(pairs.values(), factor, decimals, "+") + f" ({', '.join(means)})" * (
        len(means) > 1)


def markdown(args, found):
    """What `report` found as Markdown tables, one per task. Columns: for Figure 5 each evaluation,
    else the last one (the end of the schedule) and the mean of all."""
    columns, rows = TABLES[args.table]
    lines = [f"# {args.table}, preset {args.preset}", "", "Mean ± standard error over the seeds. A "
             "difference is to the row above, over the seeds that both have; in brackets its mean "
             "for each of the pre-trainings. Seeds that share one are not independent of it: the "
             "error does not hold the spread of pre-trainings.", ""]
    for task in dict.fromkeys(task for _, task in found):
        *_, metric, factor, decimals = TASKS[task]
        compared = {"at the end": itemgetter(-1), "mean of evaluations": statistics.mean}
        if args.table == "figure5":
            run = next(run for (_, t), runs in found.items() if t == task for run in runs.values())
            steps = [e["step"] for e in run["evaluations"]]
            compared = {f"step {step}": itemgetter(i) for i, step in enumerate(steps)}
        heads = " | difference | ".join([*compared, "paper |"])
        lines += [f"| {task}, {metric} | seeds | {heads}", "|---" * (2 + heads.count("|")) + "|"]
        above, loaded = [{}] * len(compared), ""
        for row in rows:
            if task not in (row.tasks or columns):
                continue
            if len(row.load or "") < len(loaded):           # other labels, or another length
                above = [{}] * len(compared)
            loaded = row.load or ""
            points = {seed: [e[metric] for e in run["evaluations"]]
                      for seed, run in found[row.label, task].items()}
            values = [{seed: f(p) for seed, p in points.items()} for f in compared.values()]
            cells = [row.label, str(len(points))]
            for mine, other in zip(values, above):
                pairs = {seed: mine[seed] - other[seed] for seed in mine if seed in other}
                cells += [spread(mine.values(), factor, decimals), difference(
                    pairs, factor, decimals) + f"; {len(pairs)} pairs" * (
                        0 < len(pairs) < len(mine))]
            paper = dict(zip(columns, row.paper)).get(task)
            lines.append("| " + " | ".join([*cells, str(paper or "")]) + " |")
            above = values
        lines.append("")
    return "\n".join(lines)


def convergence(found):
    """Figure 5: the mean over the seeds at each evaluation, a panel for each task: PIL image,
    None without runs."""
    labels, panels = [row.label for row in PARTS], []
    for task in dict.fromkeys(task for _, task in found):
        metric = TASKS[task][2]
        lines = {label: [(same[0]["step"], statistics.mean(e[metric] for e in same)) for same in
                         zip(*(run["evaluations"] for run in found[label, task].values()))]
                 for label in labels}
        if any(lines.values()):
            panels.append(curves.panel(f"{task}, {metric}", lines))
    rows = [draw.beside(panels[i:i + 3]) for i in range(0, len(panels), 3)]
    return draw.below([*rows, curves.legend(labels, rows[0].width)]) if rows else None


def attention_maps(args):
    """Figure 4: where two queries of each model look in the same drawn photo: PIL image."""
    scene, row, panels = toyworld.scene(0, 3_000_119, 192), PARTS[3], []
    photo, person = (torch.from_numpy(scene[k]) for k in ("image", "boxes"))
    photo, person = photo.permute(2, 0, 1), person[:1]      # this scene's nearest object is one
    fits = [pretraining(args, row, 0), *(finetuning(args, row, task, 0) for task in args.tasks)]
    for name, fit in zip(("pre-training", *args.tasks), fits):
        model = predict.load(Path(fit.out, "best.pt"))
        answer = model(photo, person if name == "pose" else None)
        picture = attention(model, photo, answer, [1, 2] if name == "pre-training" else None)
        if name != "pre-training":                                          # the two surest of four
            picture = picture.crop((0, 0, picture.width, picture.height // 2))
        picture = picture.resize((720, picture.height * 720 // picture.width))
        panels.append(pictures.titled([picture], [name]))
    half = -(-len(panels) // 2)
    return draw.beside([draw.below(panels[:half]), draw.below(panels[half:])], gap=16)


def report(args):
    """Write all finished runs of a table to --results, TABLE-PRESET.json and .md. Returns the
    Markdown, {(label of a row, task): {seed: what run.json holds}} and the path without suffix."""
    columns, rows = TABLES[args.table]
    found, raw, starts = defaultdict(dict), [], {}
    for row, task in product(rows, columns):
        folder = Path(finetuning(args, row, task, 0).out).parent
        for seed in sorted(int(path.parent.name) for path in folder.glob("*/run.json")):
            run = finished(finetuning(args, row, task, seed))
            if run and task in (row.tasks or columns):
                found[row.label, task][seed] = run
                raw.append({"row": row.label, "task": task, "seed": seed} | run)
                if row.load:
                    start = pretraining(args, row, seed)
                    starts[start] = {"row": "pre-training", "out": start.out} | recorded(start)
    path = Path(args.results, f"{args.table}-{args.preset}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text, lines = markdown(args, found), ",\n".join(map(json.dumps, [*raw, *starts.values()]))
    path.with_suffix(".json").write_text(f"[{lines}]\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text, found, path


def main(args):
    """Make the runs of a table, write its results; returns the Markdown."""
    columns, rows = TABLES[args.table]
    args.tasks = args.tasks or list(columns)
    if unknown := set(args.tasks) - set(columns):
        raise InputError(f"--tasks {unknown.pop()}: {args.table} has {', '.join(columns)}")
    if not args.data and "--data" not in RECIPES[args.preset]["pretrain"]:
        raise InputError(f"--data is missing: --preset {args.preset} has no drawn photos")
    seeds = range(1 if args.table == "figure4" else args.seeds)
    wanted = [(row, task, seed) for seed, task, row in product(seeds, args.tasks, rows)
              if task in (row.tasks or columns)]
    starts = dict.fromkeys(pretraining(args, row, seed) for row, _, seed in wanted if row.load)
    folders = ["imagenet"] * (not all(map(finished, starts))) + [TASKS[t][1] for t in args.tasks]
    if args.data and (bad := [name for name in folders if not Path(args.data, name).is_dir()]):
        raise InputError(f"--data {args.data}: has no folder {bad[0]}/, which {args.table} reads")
    report(args)                                            # fails now if --results is read-only
    do_all(args, starts)
    do_all(args, [finetuning(args, *run) for run in wanted])
    text, found, path = report(args)
    draws = {"figure4": lambda: attention_maps(args), "figure5": lambda: convergence(found)}
    if args.table in draws:
        draw.save(draws[args.table](), path.with_suffix(".png"))
    print(f"{text}\n{path}.md, {path}.json")
    return text


def flags():
    """The command line."""
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    add("--preset", choices=RECIPES, default="tiny", help="sizes, recipe: tiny, tiny96, small, or "
        "base, which is the paper's")
    add("--tasks", type=lambda text: text.split(","), metavar="TASKS", help="some of the "
        "table's, as semantic,depth (default: all)")
    add("--seeds", type=training.POSITIVE, default=3, help="fine-tunings of each row")
    add("--jobs", type=training.POSITIVE, default=1, help="runs at a time: one a GPU, or a core")
    add("--data", help="folder of the official data sets; without it all but base draw photos")
    add("--out", default="out/reproduce", help="folder of the runs")
    add("--results", default="out/results", help="folder of the results")
    return parser


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    launch(main, flags().parse_args())
