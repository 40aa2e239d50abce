"""
Checkpoints: a kill never loses the last good one, and loading reports what was loaded and what was
not. They hold plain tensors and plain types only, and the config, so a file says what it is.
"""
import os
import pickle
import re
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from formats.files import InputError, note, paths_of, replacing
from model import resize_bias_table, swin_from_others

# what torch.load raises for files that are broken, foreign, or full of code
BROKEN = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError,
          TypeError)
PARTS = ("backbone", "bifpn", "decoder")        # what a task can inherit (Table 4)


def save(state, path):
    """Write, flush, rename: a kill at any moment leaves a whole file. InputError if it cannot."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:            # torch reports a full disk as RuntimeError
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]}); "
                         "the last checkpoint is untouched") from None


def read_file(path, flag):
    """What torch.save wrote, if it is plain types and tensors, on the CPU; else InputError."""
    if not Path(path).is_file():
        hint = "; pretrain.py writes it as best.pt below its --out" * (flag == "--init")
        raise InputError(f"{flag} {path}: no such file{hint}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{flag} {path}: not written by torch.save (a web page? or safetensors?), "
                         "or it holds more than tensors: then load it where you trust it, "
                         "torch.load(FILE, weights_only=False), and save the state dict") from None
    except BROKEN as error:
        raise InputError(f"{flag} {path}: not a readable file ({type(error).__name__})") from None


def read(path, flag):
    """A checkpoint of ours -> dict; InputError if it is none."""
    state = read_file(path, flag)
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise InputError(f"{flag} {path}: not a checkpoint of nanoGLID (no model and config in it)")
    return state


def load_pretrained(glid, args, run):
    """Fill a GLID with what a run starts from: --init-backbone, --init with --load, or nothing.
    A resumed or graded run finds all weights in its own checkpoint, so these files may be gone."""
    if args.resume or args.eval:
        return
    loaded = []
    if args.init_backbone:
        load_backbone(glid, args.init_backbone, run)
        loaded = ["backbone"]
    if args.init:
        parts = args.load.split(",") if args.load is not None else [
            part for part in PARTS if part not in loaded]
        if twice := set(parts) & set(loaded):
            raise InputError(f"--load {args.load}: --init-backbone gives {twice.pop()} already; "
                             "leave it out")
        load_parts(glid, args.init, parts, run)
        loaded += parts
        for part in PARTS:
            if part not in loaded:
                run.print0(f"{part}: from scratch")


def load_parts(glid, path, parts, run):
    """Copy the named parts of a pre-trained GLID; InputError unless every tensor of them fits."""
    checkpoint = read(path, "--init")
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--load {part}: parts are {', '.join(PARTS)}")
        prefix = f"glid.{part}."
        found = {k[len(prefix):]: v for k, v in checkpoint["model"].items() if k.startswith(prefix)}
        found = {k: resize_bias_table(v, glid.config.window) if k.endswith("bias_table") else v
                 for k, v in found.items()}
        own = getattr(glid, part).state_dict()
        bad = [k for k in own.keys() | found.keys()
               if k not in own or k not in found or own[k].shape != found[k].shape]
        if bad:
            raise InputError(f"--init {path}: its {part} does not fit ({len(bad)} tensors, e.g. "
                             f"{sorted(bad)[0]}); it was made with --preset "
                             f"{checkpoint.get('preset')} {checkpoint['config']}")
        getattr(glid, part).load_state_dict(found)
        run.print0(f"{part}: loaded {len(found)} of {len(own)} tensors")


def load_backbone(glid, path, run):
    """--init-backbone FILE: a Swin's state dict as torchvision, timm or the official repositories
    (Swin, SimMIM) write it, wrapped or not, of any precision and window; else InputError."""
    weights = unwrapped(read_file(path, "--init-backbone"))
    if any(k.startswith("glid.") for k in weights):
        raise InputError(f"--init-backbone {path}: a checkpoint of nanoGLID; use --init {path} "
                         "--load backbone")
    found, whose = swin_from_others(weights, glid.config)
    own = glid.backbone.state_dict()
    missing = own.keys() - found.keys()
    wrong = [k for k in found if k not in own or own[k].shape != found[k].shape]
    # a classifier has no norms after stages 1 to 3, and a headless file none after stage 4
    missing -= {f"norms.{i}.{w}" for i in range(4) for w in ("weight", "bias")}
    if wrong or missing:
        raise InputError(f"--init-backbone {path}: no Swin of torchvision, timm, or the official "
                         f"repositories, or not that of this preset (e.g. "
                         f"{(wrong + sorted(missing))[0]})")
    glid.backbone.load_state_dict(own | found)
    rows = next(len(v) for k, v in weights.items() if k.endswith("relative_position_bias_table"))
    window = (round(rows ** 0.5) + 1) // 2                  # of (2 w - 1) ** 2 rows
    resized = f"; its window of {window} resized to {glid.config.window}"
    run.print0(f"backbone: loaded {len(found)} of {len(own)} tensors from {whose}'s Swin"
              + resized * (window != glid.config.window))


def unwrapped(content):
    """A file of weights -> its state dict without {"model": ...} or {"state_dict": ...} around it,
    without the prefixes of wrappers, in fp32."""
    while isinstance(content, dict) and (inner := next(
            (content[k] for k in ("model", "state_dict", "model_state_dict", "module", "model_ema",
                                  "state_dict_ema")
             if isinstance(content.get(k), dict)), None)):
        content = inner
    weights = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if torch.is_tensor(value):
            key = re.sub(r"^((module|_orig_mod|encoder|backbone|model|net)\.)+", "", key)
            weights[key] = value.float() if value.is_floating_point() else value
    return weights


# flags that may change when a run is resumed; those from batch_size on change the rest of the run
CHANGEABLE = {"resume", "eval", "check", "workers", "out", "compile", "device", "save_every",
        "eval_every", "batch_size", "accumulate", "steps", "epochs", "lr", "on_error"}
# flags that decide what the weights mean: they must not change with --eval either
ANSWERS = {"preset", "window", "decoder_layers", "tasks", "queries", "many_queries", "min_depth",
           "max_depth", "norm_pix", "sigma", "no_flip", "flip_pairs"}
# flags that change the grades of the same weights; --eval says so
GRADES = ("size", "object_threshold", "overlap_threshold", "eigen_crop", "overfit", "depth_scale",
          "ignore_label", "first_label")


MEANING = "classes", "category_ids", "joints", "things", "kinds"


def answer_names(dataset):
    """What the numbers of a network's answers mean, and a checksum of the validation photos' names:
    a checkpoint keeps both, and resume compares them."""
    photos = "".join(path.name for path in paths_of(getattr(dataset, "source", None)))
    return {k: v if k == "things" else list(v) for k in MEANING if (v := getattr(dataset, k, ()))} \
        | {"photos": zlib.crc32(photos.encode(errors="surrogateescape"))}


def compare(checkpoint, path, args, dataset):
    """InputError for a checkpoint that other flags made or whose answers mean something else."""
    then, now, answers = checkpoint["args"], vars(args), answer_names(dataset)
    bound = ANSWERS if args.eval else now.keys() - CHANGEABLE
    if args.eval and not {"max_depth", "sigma"} & now.keys():
        bound = bound - {"no_flip"}             # depth and pose alone have a flip test
    changed = [k for k in now if k in bound and then.get(k) != now[k]]
    # the same photos may lie elsewhere, as on a cluster's scratch disk; drawn ones have no names
    if "data" in changed and answers["photos"] and answers["photos"] == checkpoint.get("photos"):
        changed.remove("data")
    if changed:
        key, flag = changed[0], changed[0].replace("_", "-")
        if key not in then:
            raise InputError(f"--out {path}: was made by another script, or an older version "
                             f"of this one, without --{flag}; give another --out")
        raise InputError(f"--out {path}: was made with --{flag} {then[key]}, not {now[key]}; give "
                         "the same, or another --out")
    for key, value in answers.items():
        was = checkpoint.get(key, value)
        if key == "photos" and was != value and then["data"] == args.data:
            note(f"note: --data {args.data}: other photos validate now than when {path} was "
                 "written; if it was trained on some of them, metrics are too high, and its best "
                 "metric so far does not count")
        # category ids may differ if the names agree, and so may the classes that have these joints
        if key not in ("category_ids", "kinds", "photos") and was != value:
            raise InputError(f"--data {args.data}: its {key} are {str(value)[:200]}, but --out "
                             f"{path} was trained for {str(was)[:200]} (--data {then['data']}; "
                             "for label maps, classes.txt names the classes)")


def resume(args, model, optimizer, run, dataset):
    """Restore OUT/last.pt with --resume, OUT/best.pt with --eval, if the flags and what `dataset`
    means are still the same, else InputError.

    Returns (step, best metric so far, whether the evaluation of this step is still to be done);
    (0, None, False) for a new run. The best metric is None if other photos validate now.
    """
    if not (args.resume or args.eval):
        return 0, None, False
    path = Path(args.out, "best.pt" if args.eval else "last.pt")
    checkpoint = read(path, "--out")
    compare(checkpoint, path, args, dataset)
    try:
        model.load_state_dict(checkpoint["model"])
        if not args.eval:
            optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--out {path}: does not fit these flags, made with --preset "
                         f"{checkpoint['preset']} ({str(error).splitlines()[0]})") from None
    run.print0(f"{path}: step {checkpoint['step']}, trained on {checkpoint['args']['data']}")
    images = run.total_batch(args)
    was = checkpoint.get("total_batch", images)
    if was != images and not args.eval:
        if not args.steps:                  # the step would lie in another epoch
            raise InputError(f"--batch-size {args.batch_size}: a step of {path} has {was} images, "
                             f"not {images}; keep --batch-size x --accumulate x processes = {was}")
        run.print0(f"{images} images a step now, {was} before")
    for key in GRADES if args.eval else ("steps", "epochs", "lr"):
        was, now = checkpoint["args"].get(key), getattr(args, key, None)
        if was != now:
            now, was = ("not given" if v is None or v is False else v for v in (now, was))
            run.print0(f"--{key.replace('_', '-')} {now} now, {was} before")
    photos = answer_names(dataset)["photos"]
    best = checkpoint["best"] if checkpoint.get("photos", photos) == photos else None
    return checkpoint["step"], best, checkpoint.get("due", False)


def save_checkpoint(args, model, optimizer, run, step, best, dataset, is_best=False,
                    ungraded=False):
    """Rank 0 writes OUT/last.pt, to resume from, and OUT/best.pt, without optimiser; inf and NaN
    are a FloatingPointError. ungraded: a resumed run begins with this step's evaluation."""
    if not all(p.isfinite().all() for p in model.parameters()):     # the same on all processes
        raise FloatingPointError(f"a weight is not finite after step {step}: lower --lr; --resume "
                                 "goes on from the last checkpoint, if any")
    if run.rank == 0:
        content = {"model": model.state_dict(), "step": step, "best": best, "preset": args.preset,
                   "config": asdict(model.glid.config), "args": vars(args), "due": ungraded,
                   "total_batch": run.total_batch(args), **answer_names(dataset)}
        if is_best:
            save(content, Path(args.out, "best.pt"))
        save(content | {"optimizer": optimizer.state_dict()}, Path(args.out, "last.pt"))
    run.sum(0)      # all wait until the file is whole: a process that ends would end rank 0, too
