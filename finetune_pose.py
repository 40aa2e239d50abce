"""
Stage 2: human pose estimation with the whole pre-trained GLID, one query per joint.

    python finetune_pose.py --preset tiny --init out/pretrain/best.pt       with pre-training
    python finetune_pose.py --preset tiny --out out/pose-scratch            from scratch
    python finetune_pose.py --preset tiny --out out/pose-backbone --init out/pretrain/best.pt \\
        --load backbone
    python finetune_pose.py --preset tiny --out out/pose --eval --boxes detections.json
Defaults are the paper's recipe (210 epochs of person crops of 256 x 192 px, 8 processes):
    torchrun --nproc_per_node=8 finetune_pose.py --data coco/ --init out/base/best.pt
--data: a folder with annotations/person_keypoints_{train,val}*.json, COCO's or any in its format.

Top-down: a person's box comes first, from the ground truth or from a detector's file; the network
finds the joints inside it, COCO's 17 or those that the file names (of animals, for example). Crops,
augmentation, targets, schedule and inference are ViTPose's (pose.py). OUT holds last.pt, best.pt,
log.jsonl and samples/*.png: truth, prediction.
"""
from pathlib import Path

import numpy as np
import torch

import batching
import checkpoints
import draw
import pose
import training
from data import InputError, collate, derive_seed
from launch import launch
from losses import heatmap_loss
from metrics import OKS_SIGMAS, AveragePrecision
from model import PoseEstimator, normalize
from pose import PERSON, collate_photos, open_pose
from survey import survey
from tokens import whole

DROPS = (170 / 210, 200 / 210)              # shares of the run: ViTPose's epochs 170 and 200 of 210
REPORTED = ("AP", "AP50", "AP75", "APm", "APl", "AR")
PRESETS = {
    # two CPU cores, about a minute; ToyWorld's people stand upright. The first gradients are 50
    # times as large as later ones: without a low --clip, Adam's second moment remembers them for
    # longer than this run lasts
    "tiny": dict(data="toyworld", steps=700, size=[48, 32], batch_size=16, lr=2e-3,
                 query_lr=250.0, drop_path=0.0, warmup_steps=20, workers=1, eval_every=350,
                 clip=1e-3, zoom=0.25, rotation=10.0,
                 # px of a heatmap of 24 x 16 px: 2 px would be an eighth of its width
                 sigma=1.0),
    "small": dict(drop_path=0.1),
    "large": dict(drop_path=0.5),                   # ViTPose's for ViT-L
}


def flags():
    """The command line; defaults are ViTPose's recipe for COCO."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    _, data, model, optimiser, evaluation = parser.adders
    positive, rate = training.POSITIVE, training.RATE
    data("--zoom", type=training.number(float, 0, 0.9), default=0.5,
         help="spread of the crop's scale around 1")
    data("--rotation", type=training.number(float, 0, 90), default=40.0,
         help="spread of the crop's angle, degrees")
    data("--flip-pairs", help="joints that a mirror exchanges, if their names lack left and right: "
         "pairs of names or of numbers from 1, as EARL-EARR,3-4; or none")
    model("--size", type=positive, nargs=2, default=[256, 192], metavar=("HEIGHT", "WIDTH"),
          help="px of a person's crop")
    model("--sigma", type=rate, default=2.0, help="of the target Gaussians, heatmap px")
    optimiser("--epochs", type=positive, default=210, help="length of the schedule [paper]")
    optimiser("--warmup-steps", type=positive, default=500, help="linear, from 0.001 of --lr")
    evaluation("--boxes", help="a detector's persons in the validation photos, COCO's results "
               "format (JSON); default: the true boxes")
    # ViTPose's recipe, except for its layer-wise decay of the learning rate, which was tuned for a
    # plain ViT. For Swin-B MMPose uses one rate for all layers. The paper says nothing about it.
    parser.set_defaults(batch_size=64, out="out/pose", lr=5e-4, backbone_lr=1.0, drop_path=0.3,
                        weight_decay=0.1, clip=1.0, eval_every=3000)
    return parser


@torch.no_grad()
def predict(model, crops, args, run, flip=pose.FLIP):
    """uint8 [P, 3, H, W] -> joints [P, J, 2] in crop px and their scores [P, J], fp32 numpy.

    At most --batch-size crops are on the device at once.
    """
    joints, scores = [torch.empty(0, len(flip), 2)], [torch.empty(0, len(flip))]
    for start in range(0, len(crops), args.batch_size):
        images = normalize(crops[start:start + args.batch_size].to(run.device))
        layout = whole(model.glid.config, images).to(run.device)
        with run.autocast():
            maps = model(images, layout).float()
            if training.flip_test(args):
                maps = pose.flip_average(maps, model(images.flip(3), layout).float(), flip)
        at, score = pose.decode(maps, args.size, args.sigma)
        joints.append(at.cpu())
        scores.append(score.cpu())
    return torch.cat(joints).numpy(), torch.cat(scores).numpy()


def answer(photo, joints, scores, sigmas=OKS_SIGMAS):
    """Joints [P, J, 2] in the crops of a photo's persons and their scores [P, J] -> what
    AveragePrecision wants, in photo px, best person first, duplicates removed; kept: which of the P
    persons remain. photo: a test sample of Pose; its back, area and scores are used."""
    joints = pose.move(photo["back"], joints)
    persons = pose.rescore(photo["scores"], scores)
    keep = pose.oks_nms(joints, persons, photo["area"], sigmas=sigmas)
    return {"labels": np.full(len(keep), PERSON), "scores": persons[keep],
            "keypoints": np.concatenate([joints, scores[..., None]], -1)[keep], "kept": keep}


def evaluate(model, dataset, args, run, path=None):
    """COCO's keypoint metrics of the validation set, a dict of REPORTED; draws the first photos.

    Photos, not persons, are split over the processes: duplicates are removed photo by photo.
    """
    model.eval()
    metric, rows = AveragePrecision("keypoint", [PERSON], sigmas=dataset.sigmas), []
    batches = batching.share(dataset.counts, args, run)
    loader = batching.loader(dataset, batches, collate_photos, model.glid.config, args, run)
    for batch in loader:
        crops, photos = batch.to("cpu")
        joints, scores = predict(model, crops, args, run, dataset.flip)
        ends = np.cumsum([len(p["scores"]) for p in photos])[:-1]
        for photo, at, score in zip(photos, np.split(joints, ends), np.split(scores, ends)):
            found, truth = answer(photo, at, score, dataset.sigmas), photo["truth"]
            metric.update(photo["id"], found, truth)
            if len(rows) < 8 and path and run.rank == 0:
                image = dataset.source[photo["index"]]["image"].as_subclass(torch.Tensor)
                scores = [f"{s:.2f}" for s in found["scores"]]
                rows.append(draw.sample([
                    draw.skeletons(image, k[..., :2], k[..., 2], texts, dataset.bones, draw.SAMPLE)
                    for k, texts in ((truth["keypoints"], [""] * len(truth["keypoints"])),
                                     (found["keypoints"], scores))]))
    model.train()
    if rows:
        draw.save(draw.below(rows), path)
    result = run.merged(metric).result()
    return {name: result[name] for name in REPORTED}


def build(args, joints, run):
    """The model with its inherited parts; the head and the e_i, one per joint, are always new."""
    config = training.model_config(args)
    if any(n % config.unit for n in args.size):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: height and width of the crop must "
                         f"be multiples of {config.unit}")
    torch.manual_seed(args.seed)
    model = PoseEstimator(config, joints)
    checkpoints.load_pretrained(model.glid, args, run)
    return model.to(run.device)


def evaluate_and_save(model, val, args, run, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the best AP so far."""
    result = evaluate(model, val, args, run, Path(args.out, "samples", f"{step:06d}.png"))
    log.write(step=step, **result)
    is_best = best is None or result["AP"] >= best
    best = result["AP"] if is_best else best
    checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val, is_best)
    return best


def main(args):
    """Train or grade; returns {"AP": the best one of a training, "step": steps done}."""
    run = training.start(args)
    train, val = open_pose(args.data, args.size, args.data_fraction, args.seed, args.overfit,
                           args.boxes, (args.zoom, args.rotation), args.flip_pairs,
                           not args.no_flip, on_error=args.on_error, grading=args.eval)
    survey(args, train, val, run)
    model = build(args, len(train.joints), run)
    scales = training.finetune_scales(args)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    boxes = f"boxes of {args.boxes}" if args.boxes else "true boxes"    # a detector's AP is lower
    step, best, ungraded = checkpoints.resume(args, model, optimizer, run, val)
    steps = batching.schedule(len(train), args, run)
    if args.eval or (step >= steps and not ungraded):
        result = evaluate(model, val, args, run, training.eval_picture(args, run))
        run.print0(", ".join(f"{k} {training.percent(v)}" for k, v in result.items())
                   + f" ({boxes}) of {len(val)} images, step {step}")
        return {"AP": result["AP"], "step": step}
    total_batch = run.total_batch(args)
    training.describe(run, model, train, val, total_batch, steps, args.lr,
                      args.warmup_steps)

    training.compile_blocks(model, args, run)
    ddp = run.wrap(model)                               # averages gradients over the processes
    loader = batching.training_loader(train, args, run, step, steps, collate, model.glid.config)
    log = training.Log(args, run, step, ungraded)
    with training.Progress(step, steps, "pose", loader, run, total_batch) as bar:
        model.train()
        if ungraded:                                # the run ended before this evaluation
            with bar.evaluation():
                best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)
        while step < steps:
            # The random numbers of a step (drop path) depend only on (seed, step, rank), so a
            # resumed run repeats them. The samples of a step depend only on (seed, step).
            torch.manual_seed(derive_seed(args.seed, step, run.rank))

            # The learning rate is a function of the step: a short warm-up and two drops to a tenth.
            lr = args.lr * training.multistep(step, steps, DROPS, args.warmup_steps)
            training.set_lr(optimizer, lr)

            # Crops of persons go in, a heatmap for each joint comes out; its target is a Gaussian
            # around the true place.
            for micro in range(args.accumulate):
                images, layout, persons = run.fetch(loader)
                joints, labelled = (torch.stack([p[k] for p in persons])
                                    for k in ("joints", "labelled"))    # [B, J, 2], [B, J]
                with run.no_sync(ddp, last=micro + 1 == args.accumulate):
                    with run.autocast():
                        maps = ddp(images, layout)                      # [B, J, H / 4, W / 4]
                    target, weight = pose.heatmap_targets(joints, labelled, args.size,
                                                          maps.shape[2:], args.sigma)
                    loss = heatmap_loss(maps, target, weight) / args.accumulate
                    loss.backward()
                bar.add(1000 * loss)                # most target pixels are 0: the loss is small

            # The gradient's norm is clipped, so that one odd batch cannot move the weights far.
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # Now and then: a line of log, a checkpoint, an evaluation, or the end on a signal.
            due = bar.due(step, args, args.eval_every)
            if due.log:
                log.write(step=step, loss_x1000=bar.report(step), lr=lr)
            if due.save:
                checkpoints.save_checkpoint(args, model, optimizer, run, step, best, val,
                                            ungraded=due.evaluate)
            if due.stop:                            # Ctrl-C, or a cluster's SIGTERM
                bar.stop(due.stop)
            if due.evaluate:
                with bar.evaluation():
                    best = evaluate_and_save(model, val, args, run, step, best, optimizer, log)

    run.print0(f"best AP {training.percent(best, 1)} in {step} steps, {boxes}; "
               f"{args.out}/samples/{step:06d}.png")
    run.print0(training.how_to_ask(args))
    return {"AP": best, "step": step}


if __name__ == "__main__":
    launch(main, training.parse(flags(), PRESETS))
