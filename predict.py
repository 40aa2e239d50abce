"""
Ask a trained model about photos: pictures, and with --json the numbers in the official formats.

    python predict.py out/detection/best.pt photo.jpg holiday/ --out out/predict
    python predict.py out/pose/best.pt photo.jpg --detector out/detection/best.pt
    python predict.py out/pretrain/best.pt photo.jpg --attention
Any checkpoint of pretrain.py or finetune_*.py, any photos or folders of them. From Python:

    from predict import load
    model = load("out/detection/best.pt")
    answer = model("photo.jpg")             # a list of photos gives a list of answers

The checkpoint says what the model is, and the answers are those that --eval of its script grades:
the same scaling (but see --longest), thresholds and functions. See docs/predict.md.
"""
import argparse
import contextlib
import signal
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

import checkpoints
import data
import draw
import finetune_depth
import finetune_det
import finetune_pose
import finetune_seg
import pictures
import pose
import pretrain
import training
from attention import attention
from formats import results as resultfiles
from formats.files import InputError, as_photo
from launch import Stopped, launch
from model import Config, DepthEstimator, Detector, PoseEstimator, Pretrainer, Segmenter

# the flag that only one script has -> what its checkpoints do, and the script
SCRIPTS = {"mask_ratio": ("pretraining", pretrain), "many_queries": ("detection", finetune_det),
           "tasks": ("segmentation", finetune_seg), "max_depth": ("depth", finetune_depth),
           "sigma": ("pose", finetune_pose)}
THRESHOLD = 0.3                         # objects and persons of lower score are not drawn
LONGEST = 2048                          # px: larger photos are shrunk before depth looks at them


def load(path, device="auto", detector=None, threshold=THRESHOLD, longest=LONGEST):
    """A checkpoint of ours, ready to be asked about photos: Model.

    device: "auto" (CUDA if there is any), "cpu", "cuda", "mps"; detector: for pose, a detection
    checkpoint that finds the persons, with scores of `threshold` or more; longest: for depth, px
    to which the longer side of larger photos is shrunk. Raises InputError with one line.
    """
    return Model(path, device, detector, threshold, longest)


class Model:
    """A network and what its checkpoint says about it.

    task: "pretraining", "detection", "segmentation", "depth" or "pose"; classes: names by label;
    category_ids: what the data set's files call them; things: number of classes that are things;
    joints: their names; args: the flags of training; network: the torch module.
    """

    def __init__(self, path, device, detector, threshold, longest):
        checkpoint = checkpoints.read(path, "checkpoint")
        flags = checkpoint.get("args", {})
        found = [v for k, v in SCRIPTS.items() if k in flags]
        if len(found) != 1:
            raise InputError(f"checkpoint {path}: does not say which script wrote it; give a "
                             "best.pt or last.pt of pretrain.py or finetune_*.py")
        self.task, script = found[0]
        # flags that the script got later have their defaults
        default = training.parse(script.flags(), {}, ["--data", "x", "--preset", flags["preset"]])
        self.args = argparse.Namespace(**vars(default) | flags)
        self.classes = checkpoint.get("classes", [])
        self.joints, self.things = checkpoint.get("joints", []), checkpoint.get("things", 0)
        # checkpoints of pose did not always say whose joints they find: COCO's persons
        self.kinds = checkpoint.get("kinds", ["person"])
        self.category_ids = checkpoint.get("category_ids", [1])
        where = training.pick_device(device)
        self.run = training.Run(where, dtype=training.precision(where)[0])
        self.network = network(self, Config(**checkpoint["config"]), checkpoint["model"])
        try:
            self.network.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise InputError(f"checkpoint {path}: its weights do not fit what it says about itself "
                             f"({str(error).splitlines()[-1].strip()[:120]})") from None
        self.network.to(where).eval()
        self.longest, self.threshold = longest, threshold
        self.detector = self.persons = None
        if detector:
            self.use(detector, device)
        # a GPU works best on several photos; on a CPU they would only take memory, as those of
        # depth on any device, which keep their sizes
        self.batch_size = 8 if where.type == "cuda" and self.task != "depth" else 1

    def use(self, path, device):
        """Let a detection checkpoint find the persons; InputError if it cannot."""
        self.detector = load(path, device)
        if self.task != "pose" or self.detector.task != "detection":
            raise InputError(f"--detector {path}: must be a detection checkpoint, and the first "
                             f"one a pose checkpoint; they are for {self.detector.task} and "
                             f"{self.task}")
        kinds = {str(k).lower() for k in self.kinds}
        names = [str(n).lower() for n in self.detector.classes]
        self.persons = torch.tensor([k for k, name in enumerate(names) if name in kinds])
        if not len(self.persons):
            raise InputError(f"--detector {path}: finds no {' or '.join(sorted(kinds))}, only "
                             f"{', '.join(names)[:200]}")

    def __call__(self, photos, boxes=None):
        """A photo -> its answer; a list of photos -> a list of answers.

        A photo is a path, a PIL image, uint8 [H, W, 3] or [H, W] numpy, or uint8 [3, H, W] torch.
        boxes: for pose, the persons, [P, 4] x1 y1 x2 y2 in the photo's pixels, or a list of such.
        An answer is a dict of CPU tensors in the photo's pixels (docs/predict.md): boxes [D, 4] x1
        y1 x2 y2, scores [D], labels [D]; masks bool [D, H, W]; semantic uint8 [H, W]; panoptic
        int32 [H, W], segments int64 [S, 2] = id, label and segment_names; depth float [H, W]
        metres; keypoints [P, J, 3] = x, y, score; names: list of str, of the objects or joints.
        Pre-training: four uint8 images [3, S, S]. Raises InputError if a photo cannot be read.
        """
        if not isinstance(photos, list | tuple):
            return self([photos], None if boxes is None else [boxes])[0]
        if boxes is not None and self.task != "pose":
            raise InputError(f"boxes: for pose checkpoints; this one is for {self.task}")
        persons, found = [None] * len(photos) if boxes is None else [*map(as_boxes, boxes)], []
        if len(persons) != len(photos):
            raise InputError(f"boxes: {len(persons)} entries for {len(photos)} photos")
        for first in range(0, len(photos), self.batch_size):
            part = slice(first, first + self.batch_size)
            found += self.ask([as_photo(p) for p in photos[part]], persons[part])
        return found

    @torch.no_grad()
    def ask(self, photos, persons):
        """uint8 photos [3, H, W] of any sizes, as one batch -> their answers, see __call__.
        persons: for each photo None or what joints_of takes."""
        if self.task == "pose":
            return [self.joints_of(*pair) for pair in zip(photos, persons)]
        images, layout = self.inputs(photos)
        sizes = [tuple(p.shape[1:]) for p in photos]
        if self.task == "pretraining":
            panels = pretrain.fill(self.network, images.to(self.run.device),
                                   layout.to(self.run.device))
            names = ("input", "seen", "reconstruction", "borrowed")
            return [dict(zip(names, (p.cpu() for p in row))) for row in zip(*panels)]
        if self.task == "detection":
            found = finetune_det.predict(self.network, images, layout, sizes, self.run)
        elif self.task == "depth":
            found = [{"depth": d} for d in finetune_depth.predict(
                self.network, images, layout, sizes, self.run, training.flip_test(self.args))]
        else:
            found = [self.flat(f) for f in finetune_seg.predict(
                self.network, images, layout, sizes, self.args, self.things, self.run)]
        for answer in found:
            if "labels" in answer:
                answer["names"] = [self.classes[k] for k in answer["labels"].tolist()]
        return found

    def flat(self, found):
        """finetune_seg's answers by task -> one dict; their keys differ."""
        answer = {"semantic": found["semantic"]} if "semantic" in found else {}
        if "panoptic" in found:
            ids, classes = found["panoptic"]
            pairs = torch.tensor(list(classes.items()), dtype=torch.int64).view(-1, 2)
            answer |= {"panoptic": ids, "segments": pairs,
                       "segment_names": [self.classes[k] for k in classes.values()]}
        return answer | found.get("instance", {})

    def inputs(self, photos):
        """uint8 photos [3, H, W] -> images as the network gets them at test, and their layout."""
        size, config = getattr(self.args, "size", None), self.network.glid.config
        photos = [tv_tensors.Image(p) for p in photos]
        if self.task == "pretraining":
            a = self.args                       # every photo gets the same mask, the seed's first
            samples = [data.Pretraining(Only(p), False, config.image_size, config.unit, a.mask,
                                   a.mask_ratio, a.seed)[0, 0] for p in photos]
            return data.collate_pretraining(config, samples)
        if self.task == "detection":
            photos = [data.detection_transform(False, size)(p) for p in photos]
        elif self.task == "segmentation":
            scale = data.segmentation_transform(False, size)
            photos = [scale({"image": p})["image"] for p in photos]
        elif self.longest:
            photos = [data.shrunk(p, self.longest) for p in photos]
        return data.collate(config, [{"image": p} for p in photos])[:2]

    def joints_of(self, photo, persons):
        """The pose of the persons in a photo uint8 [3, H, W].

        persons: their boxes [P, 4] and scores [P], both float64; None: whom the detector finds, or
        without one the whole photo as one person.
        """
        if persons is None and self.detector:
            found = self.detector.ask([photo], [None])[0]
            keep = torch.isin(found["labels"], self.persons) & (found["scores"] >= self.threshold)
            persons = [found[k][keep].double().numpy() for k in ("boxes", "scores")]
        boxes, scores = persons or as_boxes([[0, 0, photo.shape[2], photo.shape[1]]])
        crops, back, area = pose.views(photo, boxes, *self.args.size)
        flip = pose.flip_order(self.joints, self.args.flip_pairs)
        at, sure = finetune_pose.predict(self.network, crops, self.args, self.run, flip)
        found = finetune_pose.answer(dict(back=back, area=area, scores=scores), at, sure,
                                     pose.oks_sigmas(self.joints))
        return {"keypoints": torch.from_numpy(found["keypoints"]),
                "scores": torch.from_numpy(found["scores"]),
                "boxes": torch.from_numpy(boxes[found["kept"]]), "names": list(self.joints)}


def as_boxes(boxes):
    """The persons of a photo as __call__ gets them -> boxes float64 [P, 4], scores of 1 [P]; None
    stays None. InputError for what is no such thing."""
    if boxes is None:
        return None
    try:
        found = np.asarray(boxes, np.float64)
        fits = found.shape[-1:] == (4,) or not found.size      # else a detector's rows, or one box
        found = found.reshape(-1, 4) if fits else found * np.nan
    except (TypeError, ValueError):
        found = np.array([[np.nan] * 4])
    if not np.isfinite(found).all():
        raise InputError("boxes: give the persons of each photo as [P, 4] finite numbers x1 y1 x2 "
                         "y2")
    return found, np.ones(len(found))


class Only:
    """One photo as a source of data.Pretraining."""

    def __init__(self, photo):
        self.photo = photo

    def view(self, index, choose, size):
        return self.photo, choose(*self.photo.shape[1:])


def network(model, config, weights):
    """The module that a checkpoint's weights belong to."""
    args, count = model.args, lambda name: len(weights[name])
    if model.task == "pretraining":
        return Pretrainer(config, args.norm_pix)
    if model.task == "detection":
        return Detector(config, len(model.classes), args.queries, args.many_queries)
    if model.task == "depth":
        return DepthEstimator(config, args.queries, args.min_depth, args.max_depth)
    if model.task == "pose":
        return PoseEstimator(config, len(model.joints))
    return Segmenter(config, {t: count(f"heads.{t}.offsets") for t in args.tasks},
                     {t: count(f"heads.{t}.classify.bias") - 1 for t in args.tasks})


# -----------------------------------------------------------------------------
# The command line


def flags():
    """The command line; what a checkpoint knows is not asked again."""
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a run")
    add("images", nargs="+", metavar="IMAGE", help="photos, or folders of them")
    add("--out", default="out/predict", help="folder of the pictures")
    add("--json", action="store_true", help="also write the numbers in the official formats")
    add("--ids", help="COCO annotation file that says the photos' ids (default: their names)")
    add("--boxes", help="pose: the persons, COCO's results format (JSON)")
    add("--detector", help="pose: a detection checkpoint that finds the persons")
    add("--threshold", type=training.number(float, 0, 1), default=THRESHOLD,
        help="lowest score that is drawn; with --detector, lowest score of a person's box")
    add("--attention", action="store_true", help="also draw where queries look (Figure 4)")
    add("--queries", type=lambda text: [training.COUNT(n) for n in text.split(",")], metavar="LIST",
        help="with --attention: numbers of queries, e.g. 3,17 (default: the surest)")
    add("--longest", type=training.PIXELS, default=LONGEST, help="depth: larger photos are shrunk "
        "to this longer side, px")
    add("--batch-size", type=training.POSITIVE, help="photos at a time (default: 8 on a GPU)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser


def ahead(function, items, pool, count):
    """Futures of function(item) for each item in order, the next `count` under way already."""
    items = iter(items)
    waiting = deque(pool.submit(function, i) for i in islice(items, count))
    while waiting:
        future = waiting.popleft()
        waiting.extend(pool.submit(function, i) for i in islice(items, 1))
        yield future


@contextlib.contextmanager
def stoppable(out):
    """Ctrl-C within the block ends the program in one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, f"stopped; {out} holds the pictures so far") from None


def main(args):
    """Answer all photos; returns their number. InputError at the end if some could not be read."""
    model = load(args.checkpoint, args.device, args.detector, args.threshold, args.longest)
    model.batch_size = args.batch_size or model.batch_size
    if args.json:
        resultfiles.check(model)
    if args.boxes and model.task != "pose":
        raise InputError(f"--boxes: for pose checkpoints; this one is for {model.task}")
    if args.boxes and args.detector:
        raise InputError("--detector: the persons are those of --boxes; give one of the two")
    out = Path(args.out)
    todo = resultfiles.find(args.images, out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    resultfiles.keep_photos(todo, out, (args.checkpoint, args.detector, args.ids, args.boxes))
    ids = resultfiles.image_ids([path for path, _ in todo], args.ids, args.boxes)
    boxes = pose.read_boxes(args.boxes, ids, set(model.category_ids)) if args.boxes else None
    out.mkdir(parents=True, exist_ok=True)
    results, broken, begun, unsure = {}, [], deque(), 0

    def write(photo, answer, index):
        name = todo[index][1]
        draw.save(pictures.show(model, photo, answer, args.threshold), out / f"{name}.png")
        return resultfiles.entries(model, answer, ids[index], name, out) if args.json else {}

    def collect(left):
        while len(begun) > left:                    # few at a time: masks are large
            for name, rows in begun.popleft().result().items():
                results.setdefault(name, []).extend(rows)

    # one thread reads ahead, one draws and writes what is answered, while the network works
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, stoppable(out), \
            tqdm(total=len(todo), desc=model.task, file=sys.stdout, mininterval=1) as bar:
        photos = enumerate(ahead(as_photo, [path for path, _ in todo], reader, model.batch_size))
        while part := list(islice(photos, model.batch_size)):
            good = []
            for i, photo in part:
                try:
                    good.append((i, photo.result()))
                except InputError as error:
                    broken.append(str(error))
                    bar.clear()
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
            asked = [boxes[i] if boxes else None for i, _ in good]
            found = model.ask([photo for _, photo in good], asked) if good else []
            for (i, photo), answer in zip(good, found):
                unsure += "scores" in answer and not (answer["scores"] >= args.threshold).any()
                if args.attention:
                    picture = attention(model, photo, answer, args.queries)
                    draw.save(picture, out / f"{todo[i][1]}-attention.png")
                begun.append(writer.submit(write, photo, answer, i))
                collect(1)
            bar.update(len(part))
        collect(0)
    for name, rows in results.items():
        content = {"annotations": rows} if name == "panoptic" else rows
        resultfiles.write_json(content, out / f"{name}.json")
    bare = f"; in {unsure} no score reaches --threshold {args.threshold}" * bool(unsure)
    print(f"{len(todo) - len(broken)} of {len(todo)} photos answered; {out}{bare}")
    if broken:
        raise InputError(f"{len(broken)} of {len(todo)} photos could not be read; {broken[0]}")
    return len(todo)


if __name__ == "__main__":
    launch(main, flags().parse_args())
