#!/bin/sh
# The whole idea in 9 minutes on two CPU cores, nothing to download: pre-train once on unlabelled
# ToyWorld photos, fine-tune the result on six tasks, and see what it learned. A third to a half of
# the lengths that the preset tiny has by default.
set -e
out=out/quickstart
rm -rf $out

echo "1/2 pre-training the whole encoder-decoder on 8192 unlabelled photos"
python pretrain.py --preset tiny --epochs 4 --out $out/pretrain

echo "2/2 six tasks, each from the same checkpoint by a new linear layer; two at a time"
export OMP_NUM_THREADS=1
task() {                                # task NAME SCRIPT FLAGS...
    name=$1 script=$2
    shift 2
    python "$script" --preset tiny --out "$out/$name" --init $out/pretrain/best.pt "$@"
}
{
    task detection finetune_det.py --steps 650 && task pose finetune_pose.py --steps 350
} > $out/background.txt 2>&1 &
for name in semantic instance panoptic; do
    task $name finetune_seg.py --tasks $name --steps 160
done
task depth finetune_depth.py --steps 160
echo "waiting for detection and pose, which run in the background"
wait $! || { tail $out/background.txt; exit 1; }
for name in detection semantic instance panoptic depth pose; do
    echo "$name: $(grep -v '"loss' $out/$name/log.jsonl | tail -n 1)"
done

last() { for picture in "$out/$1"/samples/*.png; do :; done; echo "$picture"; }
python results/gallery.py $out/gallery.png \
    "pre-training: photo, what the encoder sees, what the decoder fills in=$(last pretrain)" \
    "detection: truth, answer=$(last detection)" \
    "semantic segmentation: photo, truth, answer=$(last semantic)" \
    "instance segmentation: photo, truth, answer=$(last instance)" \
    "panoptic segmentation: photo, truth, answer=$(last panoptic)" \
    "depth: photo, truth, answer=$(last depth)" \
    "pose: truth, answer=$(last pose)"
