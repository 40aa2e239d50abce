#!/bin/sh
# Every task on real photos at `tiny`, from one pre-training on real photos: sh results/real.sh DATA
# DATA holds imagenet/, coco/, ADEChallengeData2016/ and nyu/ (with labels40/) in the official
# layouts; made for subsets of some hundred photos, so nothing here compares with published figures.
set -e
data=$(realpath "$1")                           # of where it was typed
cd "$(dirname "$0")/.."
shift
wanted=${*:-all}
out=out/real
[ -f $out/pretrain/best.pt ] || python pretrain.py --preset tiny --data "$data/imagenet" --epochs 40 \
    --warmup-epochs 4 --out $out/pretrain

run() {                                         # run NAME SCRIPT FLAGS...
    name=$1 script=$2
    shift 2
    case " $wanted " in *" all "* | *" $name "*) ;; *) return ;; esac
    for start in untrained scratch pretrained; do
        case $start in
            untrained) more="--steps 1" ;;
            scratch) more= ;;
            pretrained) more="--init $out/pretrain/best.pt" ;;
        esac
        python "$script" --preset tiny --out "$out/$name/$start" "$@" $more
    done
    for start in untrained scratch pretrained; do
        sed "s/^{/{\"task\": \"$name\", \"start\": \"$start\", /" "$out/$name/$start/log.jsonl"
    done > "results/real-$name.jsonl"
}

# NYU's 40 classes as a plain folder of photos and label maps
labels=$out/nyu40
for split in train test; do
    mkdir -p $labels/images/$split $labels/labels/$split
    for map in "$data"/nyu/labels40/$split/*.png; do
        number=$(basename "$map" .png)
        photo=$(ls "$data"/nyu/$split/*/rgb_"$number".jpg)
        ln -sf "$(realpath "$photo")" "$labels/images/$split/$number.jpg"
        ln -sf "$(realpath "$map")" "$labels/labels/$split/$number.png"
    done
done
run detection finetune_det.py --data "$data/coco" --size 128 --queries 60 --many-queries 120 \
    --steps 800 --eval-every 400
run instance finetune_seg.py --tasks instance --data "$data/coco" --size 128 --queries 64 \
    --batch-size 8
run panoptic finetune_seg.py --tasks panoptic --data "$data/coco" --size 128 --queries 64 \
    --batch-size 8
run semantic finetune_seg.py --data "$data/ADEChallengeData2016" --size 128 --queries 64 \
    --batch-size 8
run semantic-nyu finetune_seg.py --data $labels --ignore-label 39 --size 128 --queries 64 \
    --batch-size 8
run depth finetune_depth.py --data "$data/nyu" --crop 192 256 --batch-size 4 --eval-every 320
# people differ more than ToyWorld's: twice as long, and wider targets, which are easier to find
run pose finetune_pose.py --data "$data/coco" --size 96 64 --sigma 2 --steps 1400 --eval-every 700
