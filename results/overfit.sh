#!/bin/sh
# Can the code fit 8 photos? Trained and graded on the same ones, from scratch: sh results/overfit.sh
set -e
cd "$(dirname "$0")/.."
fit() {                                         # fit NAME SCRIPT FLAGS...
    name=$1 script=$2
    shift 2
    python "$script" --preset tiny --data toyworld:8 --overfit --batch-size 8 --workers 0 \
        --out "out/overfit/$name" "$@" | tail -n 1
}
fit detection finetune_det.py --steps 800 --eval-every 400
fit semantic finetune_seg.py --steps 300 --eval-every 150
fit instance finetune_seg.py --tasks instance --steps 300 --eval-every 150
fit panoptic finetune_seg.py --tasks panoptic --steps 300 --eval-every 150
fit depth finetune_depth.py --steps 300 --eval-every 150
fit pose finetune_pose.py --steps 400 --eval-every 200
