#!/bin/sh
# README's table of semantic segmentation on ToyWorld, one seed: sh results/semantic.sh SEED
# Pre-training, then fine-tuning with more and more of it loaded (the paper's Table 4 in small).
set -e
cd "$(dirname "$0")/.."
seed=$1
out=out/semantic-$seed
[ -f "$out/pretrain/best.pt" ] || python pretrain.py --preset tiny --seed "$seed" --out "$out/pretrain"
python finetune_seg.py --preset tiny --seed "$seed" --out "$out/none"
for parts in backbone backbone,bifpn backbone,bifpn,decoder; do
    python finetune_seg.py --preset tiny --seed "$seed" --out "$out/$parts" \
        --init "$out/pretrain/best.pt" --load $parts
done
for parts in none backbone backbone,bifpn backbone,bifpn,decoder; do
    grep mIoU "$out/$parts/log.jsonl" | sed "s/^{/{\"seed\": $seed, \"loaded\": \"$parts\", /"
done > results/semantic-"$seed".jsonl
