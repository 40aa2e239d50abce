#!/bin/sh
# Can the code fit 8 photos? Trained and graded on the same ones, from scratch:
#     sh results/overfit.sh               ToyWorld
#     sh results/overfit.sh DATA          real photos; DATA holds coco/, ADEChallengeData2016/, nyu/
set -e
data=${1:+$(realpath "$1")}                     # of where it was typed
cd "$(dirname "$0")/.."
fit() {                                         # fit NAME SCRIPT FLAGS...
    name=$1 script=$2
    shift 2
    python "$script" --preset tiny --data toyworld:8 --overfit --batch-size 8 --workers 0 \
        --out "out/overfit/$name" "$@" | tail -n 2 | head -n 1          # the last says how to ask
}
if [ -z "$data" ]; then
    fit detection finetune_det.py --steps 800 --eval-every 400
    fit semantic finetune_seg.py --steps 300 --eval-every 150
    fit instance finetune_seg.py --tasks instance --steps 300 --eval-every 150
    fit panoptic finetune_seg.py --tasks panoptic --steps 300 --eval-every 150
    fit depth finetune_depth.py --steps 300 --eval-every 150
    fit pose finetune_pose.py --steps 400 --eval-every 200
    exit
fi

# a share of the training photos that makes 8
share() { python -c "print(8 / $1)"; }

# whole NYU photos are large for a laptop: a quarter of the size, depth not interpolated; nine, of
# which the first would validate and is left out
small=out/overfit/nyu-small
python - "$data/nyu" $small <<'END'
import sys
from pathlib import Path
from PIL import Image

root, small = map(Path, sys.argv[1:])
for line in (root / "nyudepthv2_train_files_with_gt.txt").read_text().splitlines()[:81:9]:
    for folder, name in zip(("rgb", "depth"), line.split()):
        image = Image.open(root / "train" / name).crop((44, 46, 604, 470)).resize((140, 106), 0)
        (small / folder / "train").mkdir(parents=True, exist_ok=True)
        image.save(small / folder / "train" / f"{Path(line.split()[0]).stem}.png")
END
fit real-detection finetune_det.py --data "$data/coco" --data-fraction "$(share 120)" \
    --queries 60 --many-queries 120 --steps 800 --eval-every 400
fit real-semantic finetune_seg.py --data "$data/ADEChallengeData2016" \
    --data-fraction "$(share 207)" --size 256 --points 2048 --queries 64 --steps 800 \
    --eval-every 200
fit real-instance finetune_seg.py --tasks instance --data "$data/coco" \
    --data-fraction "$(share 119)" --size 256 --points 2048 --queries 64 --steps 400 \
    --eval-every 200
fit real-panoptic finetune_seg.py --tasks panoptic --data "$data/coco" \
    --data-fraction "$(share 40)" --size 128 --queries 64 --steps 500 --eval-every 250
fit real-depth finetune_depth.py --data $small --steps 300 --eval-every 150
fit real-pose finetune_pose.py --data "$data/coco" --data-fraction "$(share 99)" \
    --steps 400 --eval-every 200
