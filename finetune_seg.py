"""
Stage 2: segmentation with the whole pre-trained GLID; each task adds a linear head and M queries.

    python finetune_seg.py --preset tiny --init out/pretrain/best.pt        with pre-training
    python finetune_seg.py --preset tiny --out out/segmentation-scratch     from scratch
    python finetune_seg.py --preset tiny --out out/segmentation-backbone \\
        --init out/pretrain/best.pt --load backbone
    python finetune_seg.py --preset tiny --out out/all --tasks semantic,instance,panoptic
Defaults are the paper's recipe (160 k steps of 16 images at 640 px, 100 queries for semantic, 200
for instance and panoptic segmentation, 8 processes):
    torchrun --nproc_per_node=8 finetune_seg.py --init out/base/best.pt --data ADEChallengeData2016
    torchrun --nproc_per_node=8 finetune_seg.py --init out/base/best.pt --data coco --tasks instance
--data: ADE20K's or COCO's folder, any in their formats, or photos and label PNGs; see docs/data.md.
Several tasks share all but their heads and e_i; every batch holds them evenly (Table 3).

Losses, augmentation, schedule and inference are Mask2Former's, without its masked attention, which
the paper does not mention. OUT holds last.pt, best.pt, log.jsonl and samples/*.png: photo, then
truth and prediction of each task.
"""
import argparse
import math
from bisect import bisect_left, bisect_right
from pathlib import Path

import torch
import torch.nn.functional as F

import batching
import checkpoints
import draw
import training
from data import InputError, collate, derive_seed, find_instances, find_objects, open_segmentation
from formats.files import IGNORE
from launch import launch
from losses import segmentation_loss
from metrics import AveragePrecision, MeanIoU, PanopticQuality
from model import Segmenter, normalize
from survey import survey
from tokens import at_original

PART = 2**22                    # mask logits (floats) at the original size to hold at once
QUERIES = {"semantic": 100, "instance": 200, "panoptic": 200}           # M [paper]
# what is reported; the first metric of each task chooses best.pt
REPORTED = {"semantic": ["mIoU"], "instance": ["AP", "AP50", "AP75"],
            "panoptic": ["PQ", "PQ_things", "PQ_stuff"]}

PRESETS = {
    # two CPU cores, about a minute. In pre-training queries differ by their positions, whose size
    # is 0.7 a channel. The e_i must grow from 0 to that size, which they never would at --lr
    "tiny": dict(data="toyworld", steps=320, size=64, batch_size=16, points=512, queries="32",
                 lr=1e-3, backbone_lr=1.0, query_lr=500.0, drop_path=0.0, workers=1,
                 eval_every=80,
                 # after so few steps few queries have p(class) > 0.8
                 object_threshold=0.3),
    "small": dict(backbone_lr=1.0, drop_path=0.1),
}


def task_names(text):
    """A converter for argparse: "instance,panoptic" -> ["instance", "panoptic"]."""
    names = text.split(",")
    if not set(names) <= set(QUERIES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: take some of {','.join(QUERIES)}, each once")
    return names


def flags():
    """The command line; defaults are Mask2Former's recipe for ADE20K."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    _, data, model, optimiser, evaluation = parser.adders
    positive, share = training.POSITIVE, training.number(float, 0, 1)
    label = training.number(int, 0, 65535)
    data("--first-label", type=label, help="in a folder of label PNGs, the first class's value; "
         "lower values are no class (default: 1 in ADE20K's format, else 0)")
    data("--ignore-label", type=label, help="a value, besides 255, that is no class")
    model("--tasks", type=task_names, default="semantic", metavar="TASKS", help="some of "
          "semantic,instance,panoptic")
    model("--size", type=training.PIXELS, default=640, help="px, training crop, shortest side at "
          "test")
    model("--queries", type=lambda text: [positive(n) for n in text.split(",")], help="M, one "
          "number or one for each of --tasks (default: 100, but 200 for instance and panoptic "
          "[paper])")
    optimiser("--points", type=positive, default=12544, help="sampled points per mask")
    evaluation("--object-threshold", type=share, default=0.8, help="panoptic: least p(class) of a "
               "query that counts")
    evaluation("--overlap-threshold", type=share, default=0.8, help="panoptic: least share of its "
               "mask that a query must own")
    # weight decay and clipping are Mask2Former's
    parser.set_defaults(batch_size=2, out="out/segmentation", steps=160_000, lr=1e-4,
                        backbone_lr=0.1, drop_path=0.3, weight_decay=0.05, clip=0.01,
                        eval_every=5000)
    return parser


def in_parts(mask_logits, size, patch, original):
    """Mask logits [M, h, w] at the original size, a few masks at a time: [m, H0, W0] each.

    All of them would not fit beside the model: 200 masks of 12 megapixels are 10 GB.
    """
    pixels = max(original[0] * original[1], (size[0] + 8 * patch) * (size[1] + 8 * patch))
    for part in mask_logits.float().split(max(1, PART // pixels)):
        if len(part):                                   # no mask at all: one part without a mask
            yield at_original(part, size, patch, original)


def semantic_inference(class_logits, mask_logits, size, patch, original):
    """Mask2Former's: the class with the largest sum over queries of p(class) x p(mask).

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image; size, patch, original as for
    at_original. The logits are enlarged to the network's input, then the sums to the original, a
    few classes at a time: 150 maps of 12 megapixels are 7 GB. Returns classes uint8 [H0, W0].
    """
    p, scores, done = class_logits.float().softmax(-1)[:, :-1], 0, 0    # [M, K], [K, H, W]
    for logits in in_parts(mask_logits, size, patch, size):
        part = p[done:done + len(logits)]
        scores = scores + torch.einsum("qk,qhw->khw", part, logits.sigmoid())
        done += len(logits)
    best = torch.full(original, -1.0, device=scores.device)
    classes, few = torch.zeros_like(best, dtype=torch.uint8), max(1, PART // best.numel())
    for first in range(0, len(scores), few):
        part = F.interpolate(scores[None, first:first + few], original, mode="bilinear",
                             align_corners=False)
        value, k = part[0].max(0)                                           # [H0, W0] each
        # of equal values the first one wins, as in argmax
        classes = torch.where(value > best, (k + first).byte(), classes)
        best = best.maximum(value)
    return classes


def instance_inference(class_logits, mask_logits, size, patch, original, limit=100):
    """Mask2Former's: the `limit` best pairs of query and class; a query may answer several times.

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image; size, patch, original as for
    at_original. Returns dict, by falling p(class): labels int64 [D], scores float [D] = p(class) x
    mean p(mask) of the mask's pixels, masks bool [D, H0, W0] = p(mask) > 1/2, on the CPU.
    Empty masks are left out: their score would be 0, which cannot change the average precision.
    """
    p = class_logits.float().softmax(-1)[:, :-1]
    # stable, so that equal scores are in the same order on every machine
    order = p.flatten().sort(descending=True, stable=True).indices[:limit]      # [D]
    query, labels = order // p.shape[1], order % p.shape[1]
    used, place = query.unique(return_inverse=True)                     # [U], [D]
    masks = torch.empty(len(order), *original, dtype=torch.bool)        # on the CPU: may be large
    quality, done = mask_logits.new_empty(len(used), dtype=torch.float32), 0
    for logits in in_parts(mask_logits[used], size, patch, original):
        mask = logits > 0
        inside = (logits.sigmoid() * mask).flatten(1).sum(1)
        quality[done:done + len(logits)] = inside / mask.flatten(1).sum(1).clamp(min=1)
        for i, q in enumerate(place.tolist()):                          # answers of this part
            if done <= q < done + len(logits):
                masks[i] = mask[q - done]
        done += len(logits)
    scores = p[query, labels] * quality[place]
    real = scores > 0
    kept = real.nonzero()[:, 0].tolist()
    for i, k in enumerate(kept):                    # move up in place: a copy may not fit
        if i < k:
            masks[i] = masks[k]
    return {"labels": labels[real], "scores": scores[real], "masks": masks[:len(kept)]}


def panoptic_inference(class_logits, mask_logits, size, patch, original, things,
                       object_threshold=0.8, overlap_threshold=0.8):
    """Mask2Former's: each pixel goes to the surest query, fragments are dropped, stuff is merged.

    class_logits [M, K + 1] and mask_logits [M, h, w] of one image, the first `things` classes being
    things. Only queries count whose best class is an object with p > object_threshold. A pixel
    belongs to the query with the largest p(class) x p(mask), if its p(mask) >= 1/2. A query that
    owns less than overlap_threshold of its own mask is dropped; its pixels become void.
    Returns ids int32 [H0, W0], 0 = void, and {id: class}; one segment per class of stuff.
    """
    p, labels = class_logits.float().softmax(-1).max(-1)
    keep = (labels < class_logits.shape[-1] - 1) & (p > object_threshold)
    p, labels = p[keep], labels[keep].tolist()
    best = torch.full(original, -1.0, device=mask_logits.device)            # p(class) p(mask)
    owner = torch.full_like(best, -1, dtype=torch.long)                     # query of each pixel
    sure, areas = torch.zeros_like(best, dtype=torch.bool), []              # owner's p(mask) >= 1/2
    for logits in in_parts(mask_logits[keep], size, patch, original):
        first, p_mask = len(areas), logits.sigmoid()
        value, query = (p[first:first + len(logits), None, None] * p_mask).max(0)   # [H0, W0]
        better = value > best               # of equal values the first one wins, as in argmax
        own = p_mask.gather(0, query[None])[0]
        best, owner = torch.where(better, value, best), torch.where(better, query + first, owner)
        sure = torch.where(better, own >= 0.5, sure)
        areas += (p_mask >= 0.5).flatten(1).sum(1).tolist()
    owned = torch.bincount(owner.flatten() + 1, minlength=len(labels) + 1)[1:].tolist()
    ids, classes, stuff = torch.zeros_like(owner, dtype=torch.int32), {}, {}
    for q, (label, area) in enumerate(zip(labels, areas)):
        mask = (owner == q) & sure
        if not mask.any() or owned[q] / area < overlap_threshold:
            continue
        segment = len(classes) + 1
        if label >= things:
            segment = stuff.setdefault(label, segment)
        classes[segment] = label
        ids[mask] = segment
    return ids, classes


@torch.no_grad()
def predict(model, images, layout, originals, args, things, run):
    """uint8 images [B, 3, H, W]; yields for each photo a dict task -> answer at the original size.
    A generator, because the masks of one large photo may be hundreds of megabytes.

    semantic: class map uint8 [H0, W0]. instance: dict of labels, scores, masks, see
    instance_inference. panoptic: segment ids [H0, W0] and {id: class}. All on the CPU.
    """
    sizes, patch = layout.sizes.tolist(), model.glid.config.patch
    with run.autocast():
        answers = model(normalize(images.to(run.device)), layout.to(run.device),
                        dict.fromkeys(args.tasks, slice(None)))
    for b, original in enumerate(originals):
        found = {}
        for task, (classes, masks) in answers.items():
            asked = classes[-1, b], masks[-1, b], sizes[b], patch, original
            if task == "semantic":
                found[task] = semantic_inference(*asked).cpu()
            elif task == "instance":
                found[task] = {k: v.cpu() for k, v in instance_inference(*asked).items()}
            else:
                ids, kinds = panoptic_inference(*asked, things, args.object_threshold,
                                                args.overlap_threshold)
                found[task] = ids.cpu(), kinds
        yield found
        del found


def new_metric(task, dataset):
    """mIoU over all classes, mask AP over the things, PQ over things and stuff."""
    if task == "semantic":
        return MeanIoU(len(dataset.classes), IGNORE)
    if task == "instance":
        return AveragePrecision("mask", range(dataset.things))
    return PanopticQuality([(k, k < dataset.things) for k in range(len(dataset.classes))])


def grade(task, metric, answer, truth, things):
    """Add one image's answer, as predict gives it, to its task's metric; truth: its test sample."""
    if task == "semantic":
        metric.update(answer.numpy(), truth["semantic"].numpy())
    elif task == "instance":
        objects = dict(zip(("labels", "layers", "iscrowd"), find_instances(truth, things)))
        # the outline's area decides what is small, if the data set knows it
        objects |= {k: truth[k] for k in ("area",) if k in truth}
        metric.update(truth["id"], answer, objects)
    else:
        segments = [dict(id=i, category=c, iscrowd=crowd)
                    for i, c, crowd in truth["segments"].tolist()]
        metric.update(answer[0].numpy(), answer[1], truth["panoptic"].numpy(), segments)


def examples(task, photo, answer, truth, dataset, threshold=0.5):
    """Truth and answer over the photo, two PIL images; instances less sure are left out."""
    names, things = dataset.classes, dataset.things
    if task == "semantic":
        return [draw.semantic(photo, x, names, draw.SAMPLE) for x in (truth["semantic"], answer)]
    if task == "instance":
        labels, masks, _ = find_objects(task, truth, things)
        sure = (answer["scores"] >= threshold).nonzero()[:, 0].tolist()
        return [draw.instances(photo, masks, [names[k] for k in labels], draw.SAMPLE),
                draw.instances(photo, [answer["masks"][k] for k in sure],
                               [names[k] for k in answer["labels"][sure]], draw.SAMPLE)]
    classes = {i: c for i, c, _ in truth["segments"].tolist()}
    return [draw.panoptic(photo, *x, names, things, draw.SAMPLE)
            for x in ((truth["panoptic"], classes), answer)]


def evaluate(model, dataset, args, run, path=None):
    """REPORTED of every task over the whole validation set, every image once on one process; all
    tasks ask about the same encoded image. Draws the first images to `path`. With --eval it
    also prints the first metric of each class."""
    model.eval()
    metrics, rows = {t: new_metric(t, dataset) for t in args.tasks}, []
    batches = batching.share([1] * len(dataset), args, run)
    loader = batching.loader(dataset, batches, collate, model.glid.config, args, run)
    ids = dataset.source.ids
    for batch in loader:
        images, layout, truths = batch.to("cpu")
        found = predict(model, images, layout, [t["original"] for t in truths], args,
                        dataset.things, run)
        for truth in truths:
            answers = next(found)               # zip would keep the masks of the previous photo
            truth["id"] = ids[truth["index"]]
            for task in args.tasks:
                grade(task, metrics[task], answers[task], truth, dataset.things)
            if len(rows) < 8 and path and run.rank == 0:
                photo = dataset.source[truth["index"]]["image"]     # as it was before any scaling
                shown = [picture for task in args.tasks for picture in
                         examples(task, photo, answers[task], truth, dataset)]
                rows.append(draw.sample([draw.canvas(photo, draw.SAMPLE)[0], *shown]))
            del answers                                     # before the next photo's are made
    model.train()
    if rows:
        draw.save(draw.below(rows), path)
    results = {t: run.merged(metrics[t]).result() for t in args.tasks}
    if "semantic" in results and math.isnan(results["semantic"]["mIoU"]):
        raise InputError(f"--data {args.data}: no pixel of the validation photos has a class; is "
                         "that due to --first-label or --ignore-label?")
    for task in args.tasks if args.eval else ():
        training.print_classes(run, REPORTED[task][0], results[task], dataset.classes)
    return {name: results[t][name] for t in args.tasks for name in REPORTED[t]}


def main_metrics(results):
    """Of the numbers in `results` those that choose best.pt: mIoU, AP, PQ of the tasks trained."""
    return {names[0]: results[names[0]] for names in REPORTED.values() if names[0] in results}


def words(results):
    """The main metrics, in percent, in one line of text."""
    found = main_metrics(results).items()
    return ", ".join(f"{name} {training.percent(value)}" for name, value in found)


def build(args, dataset, run):
    """The model with its inherited parts; the heads and the e_i are always new."""
    torch.manual_seed(args.seed)
    number = args.queries or [QUERIES[t] for t in args.tasks]
    if len(number) not in (1, len(args.tasks)):
        raise InputError(f"--queries {','.join(map(str, number))}: give one number for all tasks, "
                         f"or {len(args.tasks)}, one for each of --tasks")
    number = dict(zip(args.tasks, number * len(args.tasks)))
    classes = {t: dataset.things if t == "instance" else len(dataset.classes) for t in args.tasks}
    model = Segmenter(training.model_config(args), number, classes)
    checkpoints.load_pretrained(model.glid, args, run)
    return model.to(run.device)


def evaluate_and_save(model, val, args, run, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the main metrics of the best evaluation so far, which is the
    one with the largest mean over the tasks."""
    results = evaluate(model, val, args, run, Path(args.out, "samples", f"{step:06d}.png"))
    log.write(step=step, **results)
    found = main_metrics(results)
    before = math.nan if best is None else sum(best.values())
    is_best = math.isnan(before) or sum(found.values()) >= before
    best = found if is_best else best
    checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val, is_best)
    return best


def slices(tasks, targets):
    """The images of each task, in a batch that is sorted by task: dict task -> slice."""
    names = [t["task"] for t in targets]
    return {t: slice(bisect_left(names, t), bisect_right(names, t)) for t in tasks}


def objects_per_image(tasks, targets, run):
    """Mean number of objects per image of each task, a list of floats, over all micro-steps and
    processes of a step, but at least one object per process. All processes divide by this number,
    so the average of their gradients is that of one large batch."""
    counts = [[len(t["labels"]) for t in targets if t["task"] == task] for task in tasks]
    sums = run.sum(*map(sum, counts), *map(len, counts))
    return [max(objects, run.world) / max(1, images)
            for objects, images in zip(sums, sums[len(counts):])]


def batch_loss(answers, asked, targets, per_image, canvas, points):
    """Mean of the tasks' losses, weighted by their number of images in this batch; averaged over
    the processes, each task then counts in proportion to all of its images.
    answers: from Segmenter; asked: from slices; per_image: from objects_per_image. A scalar."""
    total = 0
    for (classes, masks), mine, objects in zip(answers.values(), asked.values(), per_image):
        own = targets[mine]
        loss = segmentation_loss(classes, masks, own, canvas, objects * len(own), points)
        total = total + len(own) / len(targets) * loss["loss"]
    return total


def main(args):
    """Train or grade; returns main_metrics, the best ones of a training, and "step": steps done."""
    run = training.start(args)
    train, val = open_segmentation(args.data, args.size, args.data_fraction, args.seed, args.tasks,
                                   args.overfit, not args.no_flip, on_error=args.on_error,
                                   ignore_label=args.ignore_label, first_label=args.first_label,
                                   grading=args.eval)
    survey(args, train, val, run)
    model = build(args, train, run)
    scales = training.finetune_scales(args)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    step, best, ungraded = checkpoints.resume(args, model, optimizer, run, val)
    if args.eval or (step >= args.steps and not ungraded):
        results = evaluate(model, val, args, run, training.eval_picture(args, run))
        run.print0(", ".join(f"{k} {training.percent(v)}" for k, v in results.items())
                   + f" of {len(val)} images, step {step}")
        return main_metrics(results) | {"step": step}
    batching.steps_per_epoch(len(train), args, run)
    total_batch = run.total_batch(args)
    training.describe(run, model, train, val, total_batch, args.steps, args.lr)

    training.compile_blocks(model, args, run)
    ddp = run.wrap(model)                               # averages gradients over the processes
    loader = batching.training_loader(train, args, run, step, args.steps, collate,
                                      model.glid.config, kinds=len(args.tasks))
    log = training.Log(args, run, step, ungraded)
    name = "+".join(args.tasks)
    with training.Progress(step, args.steps, name, loader, run, total_batch) as bar:
        model.train()
        if ungraded:                                # the run ended before this evaluation
            with bar.evaluation():
                best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)
        while step < args.steps:
            # The random numbers of a step (drop path, points) depend only on (seed, step, rank), so
            # a resumed run repeats them. The samples of a step depend only on (seed, step).
            torch.manual_seed(derive_seed(args.seed, step, run.rank))

            # The learning rate is a function of the step: a polynomial that falls to 0.
            lr = args.lr * training.poly(step, args.steps)
            training.set_lr(optimizer, lr)

            # The mask losses are sums over objects, which all micro-steps and processes divide by
            # the objects of the whole step: their gradient is that of one large batch. The class
            # loss is a mean over the queries of each micro-step, as in Mask2Former.
            parts = [run.fetch(loader) for _ in range(args.accumulate)]
            per_image = objects_per_image(args.tasks, [t for *_, ts in parts for t in ts], run)

            # Each task asks about its own images of the batch; encoder and decoder serve them all.
            for micro, (images, layout, targets) in enumerate(parts, 1):
                asked = slices(args.tasks, targets)
                with run.no_sync(ddp, last=micro == args.accumulate):
                    with run.autocast():
                        answers = ddp(images, layout, asked, every_layer=True)
                    canvas = [n * model.glid.config.unit for n in layout.grid_units]
                    loss = batch_loss(answers, asked, targets, per_image, canvas,
                                      args.points) / args.accumulate
                    loss.backward()
                bar.add(loss)

            # The gradient's norm is clipped, so that one odd batch cannot move the weights far.
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # Now and then: a line of log, a checkpoint, an evaluation, or the end on a signal.
            due = bar.due(step, args, args.eval_every)
            if due.log:
                log.write(step=step, loss=bar.report(step), lr=lr)
            if due.save:
                checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val,
                                            ungraded=due.evaluate)
            if due.stop:                            # Ctrl-C, or a cluster's SIGTERM
                bar.stop(due.stop)
            if due.evaluate:
                with bar.evaluation():
                    best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)

    run.print0(f"best {words(best)} in {step} steps; {args.out}/samples/{step:06d}.png")
    run.print0(training.how_to_ask(args))
    return best | {"step": step}


if __name__ == "__main__":
    launch(main, training.parse(flags(), PRESETS))
