#!/bin/sh
# Why the e_i need speed: after `sh results/semantic.sh SEED`, the same with the e_i at plain --lr.
set -e
cd "$(dirname "$0")/.."
out=out/semantic-$1
python finetune_seg.py --preset tiny --seed "$1" --query-lr 1 --out "$out/none-slow"
python finetune_seg.py --preset tiny --seed "$1" --query-lr 1 --out "$out/all-slow" \
    --init "$out/pretrain/best.pt"
for run in none all; do
    grep mIoU "$out/$run-slow/log.jsonl" | sed "s/^{/{\"seed\": $1, \"loaded\": \"$run\", \"query_lr\": 1, /"
done > results/query_lr-"$1".jsonl
