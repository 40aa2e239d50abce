#!/bin/sh
# README's table of all tasks on ToyWorld, one seed: sh results/tasks.sh SEED [TASK...]
# Every task, or those named, from scratch and from the same pre-trained checkpoint, at the defaults of `tiny`.
set -e
cd "$(dirname "$0")/.."
seed=$1
shift
wanted=${*:-all}
pretrained=out/semantic-$seed/pretrain          # the one of results/semantic.sh
[ -f "$pretrained/best.pt" ] || python pretrain.py --preset tiny --seed "$seed" --out "$pretrained"

run() {                                         # run NAME SCRIPT FLAGS...
    name=$1 script=$2
    shift 2
    case " $wanted " in *" all "* | *" $name "*) ;; *) return ;; esac
    out=out/tasks-$seed/$name
    python "$script" --preset tiny --seed "$seed" --out "$out/scratch" "$@"
    python "$script" --preset tiny --seed "$seed" --out "$out/pretrained" "$@" \
        --init "$pretrained/best.pt"
    for start in scratch pretrained; do
        grep -E '"(AP|PQ|mIoU|REL)"' "$out/$start/log.jsonl" |
            sed "s/^{/{\"seed\": $seed, \"task\": \"$name\", \"start\": \"$start\", /"
    done > "results/tasks-$name-$seed.jsonl"
}

run detection finetune_det.py
run semantic finetune_seg.py
run instance finetune_seg.py --tasks instance
run panoptic finetune_seg.py --tasks panoptic
run multitask finetune_seg.py --tasks semantic,instance,panoptic
run depth finetune_depth.py
run pose finetune_pose.py
