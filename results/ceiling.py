"""
What the truth itself scores on the eight real photos of overfit.sh when it is as coarse as the
network's answers: masks at half of the input's height and width, heatmaps at half of the crop's,
both through our inference. Where a fit stops short of 1, this tells coarseness from learning. No
strict limit: a network may answer what looks better enlarged.

    python results/ceiling.py DATA [SIZE...]        DATA as for overfit.sh; sizes in px
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import finetune_pose
import finetune_seg
import pose
from data import find_objects, open_segmentation
from metrics import AveragePrecision
from tokens import at_original

PATCH = 2                                                   # of the preset tiny


def coarse(masks, height, width):
    """Masks [N, H0, W0] -> shares [N, h, w] on the network's grid for an input of height x width,
    padded to whole units."""
    shares = F.interpolate(masks[None].float(), (height, width), mode="area")
    unit = 8 * PATCH
    shares = F.pad(shares, (0, -width % unit, 0, -height % unit), mode="replicate")
    return F.avg_pool2d(shares, PATCH)[0]


def masks_ceiling(task, path, share, size):
    """The task's metrics of the coarse truth."""
    _, val = open_segmentation(path, size, share, 0, [task], True)
    metric = finetune_seg.new_metric(task, val)
    for i in range(len(val)):
        truth = val[0, i]
        shape, original = truth["image"].shape[-2:], truth["original"]
        labels, masks, crowd = find_objects(task, truth, val.things)
        labels, masks = labels[~crowd], masks[~crowd]
        found = at_original(coarse(masks, *shape) - 0.5, shape, PATCH, original)
        if task == "semantic":
            answer = labels[found.argmax(0)].byte()
        elif task == "instance":
            answer = dict(labels=labels, scores=torch.ones(len(labels)), masks=found > 0)
        else:
            best, owner = found.max(0)
            answer = (owner + 1) * (best > 0), dict(enumerate(labels.tolist(), 1))
        finetune_seg.grade(task, metric, answer, truth, val.things)
    result = metric.result()
    return {name: result[name] for name in finetune_seg.REPORTED[task]}


def pose_ceiling(path, share, sigma=1.0):
    """Keypoint AP of perfect heatmaps at tiny's crop."""
    crop = finetune_pose.PRESETS["tiny"]["size"]
    _, val = pose.open_pose(path, crop, share, overfit=True)
    metric = AveragePrecision("keypoint", [0], sigmas=val.sigmas)
    for i in range(len(val)):
        photo = val[0, i]
        truth = photo["truth"]["keypoints"][~photo["truth"]["iscrowd"]]
        joints = torch.from_numpy(pose.move(pose.inverse(photo["back"]),
                                            truth[..., :2].astype(float)))
        maps, _ = pose.heatmap_targets(joints, torch.from_numpy(truth[..., 2] > 0), crop,
                                       [n // PATCH for n in crop], sigma)
        found, score = pose.decode(maps, crop, sigma)
        metric.update(photo["id"], finetune_pose.answer(photo, found.numpy(), score.numpy()),
                      photo["truth"])
    return {"AP": metric.result()["AP"]}


def main(root, *sizes):
    coco, ade = Path(root, "coco"), Path(root, "ADEChallengeData2016")
    for task, path, photos in (("semantic", ade, 207), ("instance", coco, 119),
                               ("panoptic", coco, 40)):
        for size in map(int, sizes or (128, 256)):
            values = masks_ceiling(task, path, 8 / photos, size)
            print(task, size, "px:", ", ".join(f"{k} {100 * v:.1f}" for k, v in values.items()))
    print(f"pose: AP {100 * pose_ceiling(coco, 8 / 99)['AP']:.1f}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or sys.exit(__doc__)))
