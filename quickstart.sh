#!/bin/sh
# The whole idea in under ten minutes on two CPU cores, nothing to download:
# pre-train on unlabelled ToyWorld photos, fine-tune on a few labelled ones, compare with scratch.
set -e
out=out/quickstart
rm -rf $out

echo "1/3 pre-training the whole encoder-decoder on unlabelled photos"
python pretrain.py --preset tiny --out "$out/pretrain"

echo "2/3 semantic segmentation from the pre-trained checkpoint"
python finetune_seg.py --preset tiny --init "$out/pretrain/best.pt" --out "$out/pretrained"

echo "3/3 the same from scratch"
python finetune_seg.py --preset tiny --out "$out/scratch"

last() { ls "$1"/samples/*.png | tail -n 1; }
python gallery.py "$out/gallery.png" \
    "pre-training: photo, seen, filled=$(last "$out/pretrain")" \
    "pre-trained: photo, truth, answer=$(last "$out/pretrained")" \
    "from scratch: photo, truth, answer=$(last "$out/scratch")"
echo "pre-trained:  $(tail -n 1 "$out/pretrained/log.jsonl")"
echo "from scratch: $(tail -n 1 "$out/scratch/log.jsonl")"
