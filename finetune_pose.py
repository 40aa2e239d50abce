"""
Stage 2: human pose estimation with the whole pre-trained GLID, one query per joint.

    python finetune_pose.py --preset tiny --init out/pretrain/best.pt       with pre-training
    python finetune_pose.py --preset tiny --out out/scratch                 from scratch
    python finetune_pose.py --preset tiny --out out/part --init out/pretrain/best.pt --load backbone
    python finetune_pose.py --preset tiny --out out/pose --eval --boxes detections.json
Defaults are the paper's recipe (210 epochs of person crops of 256 x 192 px, 8 processes):
    torchrun --nproc_per_node=8 finetune_pose.py --data coco/ --init out/base/best.pt
--data: a folder with annotations/person_keypoints_{train,val}*.json, COCO's or any in its format.

Top-down: a person's box comes first, from the ground truth or from a detector's file; the network
finds the joints inside it, COCO's 17 or those that the file names, of whatever has them. Crops,
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
from data import PERSON, InputError, collate, collate_photos, mix, open_pose
from losses import heatmap_loss
from metrics import OKS_SIGMAS, AveragePrecision
from model import PoseEstimator, normalize
from survey import survey
from tokens import whole

DROPS = (170 / 210, 200 / 210)              # shares of the run: ViTPose's epochs 170 and 200 of 210
SHOWN = ("AP", "AP50", "AP75", "APm", "APl", "AR")
PRESETS = {
    # two CPU cores, about a minute; ToyWorld's people stand upright. The first gradients are 50
    # times as large as later ones: without a low --clip, Adam's second moment remembers them for
    # longer than this run lasts
    "tiny": dict(data="toyworld", steps=700, size=[48, 32], batch_size=16, lr=2e-3,
                 query_lr=250.0, drop_path=0.0, warmup_steps=20, workers=1, eval_every=350,
                 clip=1e-3, zoom=0.25, rotation=10.0,
                 # px of a map of 24 x 16: 2 would be an eighth of its width
                 sigma=1.0),
    "small": dict(drop_path=0.1),
}


def flags():
    """The command line; defaults are ViTPose's recipe for COCO."""
    parser = training.Parser(__doc__)
    training.add_flags(parser)
    training.add_finetune_flags(parser)
    _, data, model, optimiser, evaluation = parser.adders()
    positive, rate = training.POSITIVE, training.RATE
    data("--zoom", type=training.number(float, 0, 0.9), default=0.5,
         help="spread of the crop's scale around 1")
    data("--rotation", type=training.number(float, 0, 90), default=40.0,
         help="spread of the crop's angle, degrees")
    data("--flip-pairs", help="joints that a mirror exchanges, if their names do not tell: "
         "EARL-EARR,3-4; names, or numbers from 1; or none")
    model("--size", type=positive, nargs=2, default=[256, 192], metavar=("HEIGHT", "WIDTH"),
          help="px of a person's crop")
    model("--sigma", type=rate, default=2.0, help="of the target Gaussians, heatmap px")
    optimiser("--epochs", type=positive, default=210, help="length of the schedule [paper]")
    optimiser("--warmup-steps", type=positive, default=500, help="linear, from 0.001 of --lr")
    optimiser("--weight-decay", type=training.number(float, 0), default=0.1, help="ViTPose's")
    optimiser("--clip", type=rate, default=1.0, help="gradient norm")
    evaluation("--eval-every", type=positive, default=3000, help="steps between evaluations")
    evaluation("--boxes", help="a detector's persons in the validation photos, COCO's results "
               "format (JSON); default: the true boxes")
    # ViTPose's recipe, but for its layer-wise decay of the learning rate, which was tuned for a
    # plain ViT; for Swin-B MMPose uses one rate for all layers. The paper does not say.
    parser.set_defaults(batch_size=64, out="out/pose", lr=5e-4, backbone_lr=1.0, drop_path=0.3)
    return parser


@torch.no_grad()
def predict(model, crops, args, state, flip=pose.FLIP):
    """uint8 [P, 3, H, W] -> joints [P, J, 2] in crop px and their scores [P, J], fp32 numpy.

    At most --batch-size crops are on the device at once, each also in a mirror (flip test).
    """
    joints, scores = [torch.empty(0, len(flip), 2)], [torch.empty(0, len(flip))]
    for start in range(0, len(crops), args.batch_size):
        images = normalize(crops[start:start + args.batch_size].to(state.device))
        layout = whole(model.glid.config, images).to(state.device)
        with state.autocast():
            maps = model(images, layout).float()
            if not args.overfit and not args.no_flip:   # which have seen nothing in a mirror
                maps = pose.flip_average(maps, model(images.flip(3), layout).float(), flip)
        at, score = pose.decode(maps, args.size, args.sigma)
        joints.append(at.cpu())
        scores.append(score.cpu())
    return torch.cat(joints).numpy(), torch.cat(scores).numpy()


def answer(photo, joints, scores, sigmas=OKS_SIGMAS):
    """Joints [P, J, 2] in the crops of a photo's persons -> what AveragePrecision wants, in photo
    px, best person first, doubles removed; kept: which of the P persons they are."""
    joints = pose.move(photo["back"], joints)
    persons = pose.rescore(photo["scores"], scores)
    keep = pose.oks_nms(joints, persons, photo["area"], sigmas=sigmas)
    return {"labels": np.full(len(keep), PERSON), "scores": persons[keep],
            "keypoints": np.concatenate([joints, scores[..., None]], -1)[keep], "kept": keep}


def evaluate(model, dataset, args, state, path=None):
    """COCO's keypoint metrics over the whole validation set; picture of the first photos.

    Processes share photos, not persons: which of two predictions is a double is decided in one.
    """
    model.eval()
    metric, rows = AveragePrecision("keypoint", [PERSON], sigmas=dataset.sigmas), []
    batches = batching.share_crowded(dataset.counts, args, state)
    loader = batching.loader(dataset, batches, collate_photos, model.glid.config, args, state)
    for batch in loader:
        crops, photos = batch.to("cpu")
        joints, scores = predict(model, crops, args, state, dataset.flip)
        ends = np.cumsum([len(p["scores"]) for p in photos])[:-1]
        for photo, at, score in zip(photos, np.split(joints, ends), np.split(scores, ends)):
            found, truth = answer(photo, at, score, dataset.sigmas), photo["truth"]
            metric.update(photo["id"], found, truth)
            if len(rows) < 8 and path and state.rank == 0:
                image = dataset.source[photo["index"]]["image"].as_subclass(torch.Tensor)
                scores = [f"{s:.2f}" for s in found["scores"]]
                rows.append(draw.beside([
                    draw.skeletons(image, k[..., :2], k[..., 2], texts, dataset.bones, draw.SAMPLE)
                    for k, texts in ((truth["keypoints"], [""] * len(truth["keypoints"])),
                                     (found["keypoints"], scores))]))
    model.train()
    if rows:
        draw.save(draw.below(rows), path)
    result = state.merged(metric).result()
    return {name: result[name] for name in SHOWN}


def build(args, joints, state):
    """The model with its inherited parts; the head and the e_i, one per joint, are always new."""
    config = training.model_config(args)
    if any(n % config.unit for n in args.size):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: height and width of the crop must "
                         f"be multiples of {config.unit}")
    torch.manual_seed(args.seed)
    model = PoseEstimator(config, joints)
    checkpoints.inherit(model.glid, args, state)
    return model.to(state.device)


def conclude(model, val, args, state, step, best, optimizer, log):
    """Evaluate, draw, save. Returns the best AP so far."""
    result = evaluate(model, val, args, state, Path(args.out, "samples", f"{step:06d}.png"))
    log.write(step=step, **result)
    is_best = best is None or not result["AP"] < best                  # the first one even if NaN
    best = result["AP"] if is_best else best
    checkpoints.keep(args, model, optimizer, state, step, best, val, is_best)
    return best


def main(args):
    """Train; returns {"AP": best AP, "step": steps done}."""
    state = training.start(args)
    train, val = open_pose(args.data, args.size, args.data_fraction, args.seed, args.overfit,
                           args.boxes, (args.zoom, args.rotation), args.flip_pairs,
                           not args.no_flip, on_error=args.on_error)
    survey(args, train, val, state)
    model = build(args, len(train.joints), state)
    scales = [("offsets", args.query_lr), ("backbone", args.backbone_lr)]
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay, scales),
                                  fused=True)
    step, best, due = checkpoints.resume(args, model, optimizer, state, val)
    steps = batching.schedule(len(train), args, state)
    if args.eval or (step >= steps and not due):
        result = evaluate(model, val, args, state, Path(args.out, "samples", "eval.png"))
        state.say(", ".join(f"{k} {100 * v:.2f}" for k, v in result.items())
                  + f" of {len(val)} images, step {step}")
        return {"AP": result["AP"], "step": step}
    total_batch = args.batch_size * state.world * args.accumulate
    training.describe(state, model, train, val, total_batch, steps, args.lr)

    training.compile_blocks(model, args, state)
    ddp = state.wrap(model)
    batches = batching.Batches(len(train), args, state, step, steps)
    loader = batching.Timed(batching.loader(batching.forgiving(train, args), batches, collate,
                                            model.glid.config, args, state))
    log = training.Log(args, state, step, due)
    with training.Progress(step, steps, "pose", loader, state, total_batch) as bar:
        model.train()
        if due:                                     # the run ended before it was evaluated
            with bar.evaluation():
                best = conclude(model, val, args, state, step, best, optimizer, log)
        while step < steps:
            torch.manual_seed(mix(args.seed, step, state.rank))                # drop path
            lr = args.lr * training.multistep(step, steps, DROPS, args.warmup_steps)
            training.set_lr(optimizer, lr)
            for micro in range(args.accumulate):
                images, layout, persons = state.fetch(loader)
                joints, labelled = (torch.stack([p[k] for p in persons])
                                    for k in ("joints", "labelled"))    # [B, J, 2], [B, J]
                with state.no_sync(ddp, last=micro + 1 == args.accumulate):
                    with state.autocast():
                        maps = ddp(images, layout)                      # [B, J, H / 4, W / 4]
                    target, weight = pose.heatmap_targets(joints, labelled, args.size,
                                                          maps.shape[2:], args.sigma)
                    loss = heatmap_loss(maps, target, weight) / args.accumulate
                    loss.backward()
                bar.add(1000 * loss)                # heatmaps are nearly empty: errors are small
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            stops = bar.stops()                     # Ctrl-C, or a cluster's SIGTERM
            ends = step % args.eval_every == 0 or step == steps
            saves = step % args.save_every == 0
            if ends or saves or stops or step % 20 == 0:
                log.write(step=step, loss_x1000=bar.report(step), lr=lr)
            if ends or saves or stops:              # before the evaluation, which may fail
                checkpoints.keep(args, model, optimizer, state, step, best, val, due=ends)
            if stops:
                bar.stop(stops)
            if ends:
                with bar.evaluation():
                    best = conclude(model, val, args, state, step, best, optimizer, log)
    state.say(f"best AP {100 * best:.1f} in {step} steps; {args.out}/samples/{step:06d}.png")
    state.say(training.how_to_ask(args))
    return {"AP": best, "step": step}


if __name__ == "__main__":
    training.run(main, training.parse(flags(), PRESETS))
