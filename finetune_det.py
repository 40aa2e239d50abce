"""
Stage 2: object detection with the whole pre-trained GLID, two linear heads and zero offsets e_i.

    python finetune_det.py --preset tiny --init out/pretrain/best.pt        with pre-training
    python finetune_det.py --preset tiny --out out/detection-scratch        from scratch
Defaults are H-DETR's recipe for COCO (50 epochs of 16 images at 800 px, 300 one-to-one and 1500
one-to-many queries, 8 processes):
    torchrun --nproc_per_node=8 finetune_det.py --data coco/ --init out/base/best.pt
--data: a folder with annotations/instances_{train,val}*.json, COCO's or any in its format.

As in the paper, one linear layer gives the box and one gives the class. There is no box MLP, no
reference point, no refinement from layer to layer. OUT holds last.pt, best.pt, log.jsonl and
samples/*.png: photo with true boxes, photo with predicted boxes.
"""
from pathlib import Path

import torch

import batching
import checkpoints
import draw
import training
from data import collate, derive_seed, open_detection
from launch import launch
from losses import corners, detection_loss
from metrics import AveragePrecision
from model import Detector, normalize
from survey import survey

PRESETS = {
    # two CPU cores, three minutes. No scene has more than 8 objects; with few queries, each query
    # is matched often. finetune_seg.py says why the e_i need a high learning rate. The heads start
    # at zero, so they need a high one, too (docs/results.md)
    "tiny": dict(data="toyworld:1024", steps=1300, size=64, batch_size=8, queries=12,
                 many_queries=48, lr=1e-3, backbone_lr=1.0, query_lr=30.0, head_lr=15.0,
                 drop_path=0.0, workers=1, eval_every=650),
    "small": dict(backbone_lr=1.0, drop_path=0.1),
    "large": dict(drop_path=0.5),                   # H-DETR's for Swin-L
}
REPORTED = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def flags():
    """The command line; defaults are H-DETR's recipe for COCO."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    _, _, model, optimiser, _ = parser.adders
    positive = training.POSITIVE
    model("--size", type=training.PIXELS, default=800, help="px, shortest side at test, the "
          "largest shortest side at training")
    model("--queries", type=positive, default=300, help="one-to-one queries [paper]")
    model("--many-queries", type=training.COUNT, default=1500, help="one-to-many queries [paper]")
    model("--repeats", type=positive, default=6, help="one-to-many queries matched to an object")
    optimiser("--epochs", type=positive, default=50, help="length of the schedule [paper]")
    # weight decay is pre-training's and that of three of H-DETR's Swins; most others have 1e-4
    parser.set_defaults(batch_size=2, out="out/detection", lr=2e-4, backbone_lr=0.1, drop_path=0.2,
                        weight_decay=0.05, clip=0.1, eval_every=5000)
    return parser


def detection_inference(class_logits, boxes, size, count=100):
    """The best `count` of all (query, class) pairs, no non-maximum suppression (H-DETR).

    class_logits [Q, K]; boxes [Q, 4] = centre x, y, width, height in 0..1; size: (H0, W0) of the
    photo. Returns, best first, scores [D], labels [D], boxes [D, 4] x1 y1 x2 y2 in photo pixels.
    """
    scores, at = class_logits.float().sigmoid().flatten().sort(descending=True, stable=True)
    scores, at = scores[:count], at[:count]
    query, label = at // class_logits.shape[1], at % class_logits.shape[1]      # [D] each
    height, width = size
    boxes = corners(boxes[query].float()).clamp(0, 1) * boxes.new_tensor(
        [width, height, width, height])
    return {"scores": scores, "labels": label, "boxes": boxes}


@torch.no_grad()
def predict(model, images, layout, originals, run):
    """uint8 images [B, 3, H, W] -> B dicts of detection_inference, on the CPU; originals: (H0, W0)
    of each photo."""
    with run.autocast():
        logits, boxes = model(normalize(images.to(run.device)), layout.to(run.device))
    return [{k: v.cpu() for k, v in detection_inference(*answer).items()}
            for answer in zip(logits[-1], boxes[-1], originals)]


def evaluate(model, dataset, args, run, path=None):
    """AveragePrecision.result of the validation set, a dict; draws the first images to `path`.
    With --eval it also prints the AP of each class."""
    model.eval()
    metric, rows = AveragePrecision("box", range(len(dataset.classes))), []
    batches = batching.share([1] * len(dataset), args, run)
    loader = batching.loader(dataset, batches, collate, model.glid.config, args, run)
    ids = dataset.source.ids
    for batch in loader:
        images, layout, targets = batch.to("cpu")
        originals = [t["original"] for t in targets]
        found = predict(model, images, layout, originals, run)
        for truth, guess in zip(targets, found):
            metric.update(ids[truth["index"]], {k: v.numpy() for k, v in guess.items()},
                          {k: truth[k].numpy() for k in truth.keys() - {"index", "original"}})
            if len(rows) < 8 and path and run.rank == 0:
                photo = dataset.source[truth["index"]]["image"]
                rows.append(examples(photo, truth, guess, dataset.classes))
    model.train()
    if rows:
        draw.save(draw.below(rows), path)
    result = run.merged(metric).result()
    if args.eval:
        training.print_classes(run, "AP", result, dataset.classes)
    return result


def examples(photo, truth, guess, classes, threshold=0.3):
    """The photo with the true boxes, and with those predicted above the threshold: PIL image."""
    sure = guess["scores"] > threshold
    found = guess["boxes"][sure], guess["labels"][sure]
    texts = [classes[k] for k in truth["labels"]], [classes[k] for k in found[1]]
    return draw.sample([draw.boxes(photo, truth["boxes"], truth["labels"], texts[0], draw.SAMPLE),
                        draw.boxes(photo, *found, texts[1], draw.SAMPLE)])


def build(args, classes, run):
    """The model with its inherited parts; the heads and the e_i are always new."""
    torch.manual_seed(args.seed)
    model = Detector(training.model_config(args), len(classes), args.queries, args.many_queries)
    checkpoints.load_pretrained(model.glid, args, run)
    return model.to(run.device)


def evaluate_and_save(model, val, args, run, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the best AP so far."""
    result = evaluate(model, val, args, run, Path(args.out, "samples", f"{step:06d}.png"))
    log.write(step=step, **{k: result[k] for k in REPORTED})
    is_best = best is None or result["AP"] >= best
    best = result["AP"] if is_best else best
    checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val, is_best)
    return best


def group_losses(class_logits, boxes, targets, objects, args):
    """The same set loss for both groups: each object takes one query of the first group and
    `repeats` of the second. Arguments: detection_loss's, Q = both groups. Returns a scalar."""
    split = (args.queries, args.many_queries)
    groups = zip(class_logits.split(split, 2), boxes.split(split, 2), (1, args.repeats))
    return sum(detection_loss(c, b, targets, objects, repeats)["loss"]
               for c, b, repeats in groups if c.shape[2])


def main(args):
    """Train or grade; returns {"AP": box AP, the best one of a training, "step": steps done}."""
    run = training.start(args)
    train, val = open_detection(args.data, args.size, args.data_fraction, args.seed, args.overfit,
                                not args.no_flip, on_error=args.on_error, grading=args.eval)
    survey(args, train, val, run)
    model = build(args, train.classes, run)
    scales = training.finetune_scales(args)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    step, best, ungraded = checkpoints.resume(args, model, optimizer, run, val)
    steps = batching.schedule(len(train), args, run)
    if args.eval or (step >= steps and not ungraded):
        result = evaluate(model, val, args, run, training.eval_picture(args, run))
        run.print0("box " + ", ".join(f"{k} {training.percent(result[k])}" for k in REPORTED)
                   + f" of {len(val)} images, step {step}")
        return {"AP": result["AP"], "step": step}
    total_batch = run.total_batch(args)
    training.describe(run, model, train, val, total_batch, steps, args.lr)

    training.compile_blocks(model, args, run)
    ddp = run.wrap(model)                               # averages gradients over the processes
    loader = batching.training_loader(train, args, run, step, steps, collate, model.glid.config)
    log = training.Log(args, run, step, ungraded)
    with training.Progress(step, steps, "detection", loader, run, total_batch) as bar:
        model.train()
        if ungraded:                                # the run ended before this evaluation
            with bar.evaluation():
                best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)
        while step < steps:
            # The random numbers of a step (drop path) depend only on (seed, step, rank), so a
            # resumed run repeats them. The samples of a step depend only on (seed, step).
            torch.manual_seed(derive_seed(args.seed, step, run.rank))

            # The learning rate is a function of the step: a drop to a tenth at 4/5 of the run.
            lr = args.lr * training.multistep(step, steps, [0.8])
            training.set_lr(optimizer, lr)

            # The losses are sums over objects. All micro-steps and processes divide by the objects
            # of the whole step: the gradient is that of one large batch, however it is split.
            parts = [run.fetch(loader) for _ in range(args.accumulate)]
            objects = sum(len(t["labels"]) for _, _, targets in parts for t in targets)
            objects = max(1, run.sum(objects)[0] / run.world)

            # Forward, match queries with objects, backward; gradients add up over the micro-steps.
            for micro, (images, layout, targets) in enumerate(parts, 1):
                with run.no_sync(ddp, last=micro == args.accumulate):
                    with run.autocast():
                        class_logits, boxes = ddp(images, layout, train=True)
                    loss = group_losses(class_logits, boxes, targets, objects, args)
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

    run.print0(f"best box AP {training.percent(best, 1)} in {step} steps; "
               f"{args.out}/samples/{step:06d}.png")
    run.print0(training.how_to_ask(args))
    return {"AP": best, "step": step}


if __name__ == "__main__":
    launch(main, training.parse(flags(), PRESETS))
