#!/bin/sh
# The whole idea in under ten minutes on two CPU cores, nothing to download:
# pre-train on unlabelled ToyWorld photos, fine-tune on 256 labelled ones, compare with scratch.
set -e
out=out/quickstart
rm -rf $out

echo "1/2 pre-training the whole encoder-decoder on 8192 unlabelled photos"
python pretrain.py --preset tiny --out $out/pretrain

echo "2/2 semantic segmentation: pre-trained (shown) and from scratch (same schedule, other core)"
export OMP_NUM_THREADS=1
python finetune_seg.py --preset tiny --out $out/scratch > $out/scratch.txt &
python finetune_seg.py --preset tiny --out $out/pretrained --init $out/pretrain/best.pt
wait $!

last() { ls $1/samples/*.png | tail -n 1; }
python gallery.py $out/gallery.png \
    "pre-training: photo, seen, filled=$(last $out/pretrain)" \
    "pre-trained: photo, truth, answer=$(last $out/pretrained)" \
    "from scratch: photo, truth, answer=$(last $out/scratch)"
echo "pre-trained:  $(tail -n 1 $out/pretrained/log.jsonl)"
echo "from scratch: $(tail -n 1 $out/scratch/log.jsonl)"
