"""
One file -> one array. Whatever is wrong with a file ends in an InputError that names it.
"""
import contextlib
import copy
import json
import os
import struct
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torchvision import tv_tensors

IGNORE = 255                                    # label of pixels that belong to no class
LONGEST = 50                                    # longer side over shorter one, at most
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
LABELS = ("annotations", "labels", "masks", "label", "mask", "ann_dir")     # folders of label maps
PHOTOS = ("images", "image", "img", "rgb", "photos", "img_dir")             # folders of photos
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm",
            ".pgm", ".pnm", ".pbm", ".gif"}
OTHERS = set(".heic .heif .avif .jp2 .j2k .jpx .jxl .mpo .tga .psd .svg .dng .cr2 .cr3 .nef .arw "
             ".orf .rw2 .raf .raw .exr .hdr .dcm .mov .mp4 .avi".split())   # that are not read
ImageFile.LOAD_TRUNCATED_IMAGES = False         # half a photo is an error, not a grey half


class InputError(Exception):
    """Something the user gave is wrong. One line: the file or flag, and the way out."""


def refuse(message, on_error):
    """Stop with the message, or with on_error "skip" say on stderr that this one is left out."""
    if on_error == "stop":
        raise InputError(message)
    note(f"skipped: {message}")


def note(message):
    """Say something on stderr, once: all processes open the same files."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def replace_at_last(temporary, path):
    """os.replace, as soon as no other program has `path` open, which Windows forbids."""
    for pause in (0.02, 0.1, 0.5, 2):
        with contextlib.suppress(PermissionError):
            return os.replace(temporary, path)
        time.sleep(pause)
    os.replace(temporary, path)


@contextlib.contextmanager
def replacing(path, mark=""):
    """Within the block, the path of a temporary file, which then takes the place of `path`: that
    is there as a whole or not at all. mark: a part of its name where two may write at once."""
    temporary = Path(f"{path}{mark}.tmp")
    try:
        yield temporary
        (replace_at_last if os.name == "nt" else os.replace)(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def reading(path):
    """Whatever PIL finds wrong with an image within the block ends in an InputError with this name.
    """
    try:
        yield
    except Image.DecompressionBombError:
        raise InputError(f"{path}: too many pixels ({2 * Image.MAX_IMAGE_PIXELS} is the limit); "
                         "shrink or remove it") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise InputError(f"{path}: not a readable image ({error}); replace or remove it") from None


@contextlib.contextmanager
def opened(path):
    """PIL image of a file, pixels not read yet; see reading."""
    with reading(path), Image.open(path) as image:
        yield image


# EXIF's orientation -> what makes the photo upright; the last four exchange height and width
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                        Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), 2))


EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}     # where PNGs may say it


def orientation(image):
    """EXIF's number for how the camera was held, 2 to 8, or 1. PIL turns TIFFs by itself."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()                            # getexif would, and its error must not be lost here
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        found = 1                               # the pixels may be whole all the same
    return found if found in (2, 3, 4, 5, 6, 7, 8) and image.format != "TIFF" else 1


def turned(image, number):
    """The image as it was meant to be seen, given its orientation."""
    return image.transpose(TURNS[number]) if number > 1 else image


def to_tensor(image, path):
    """PIL image of any kind -> uint8 [3, H, W], the channels of a pixel side by side in memory, as
    PIL has them and as torchvision resizes fastest. Grey, palette, CMYK and alpha become RGB, 16
    bits become 8; InputError for more, which names `path`."""
    if image.mode.startswith("I"):                          # 16 bit: PIL's convert would clip
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise InputError(f"{path}: 32-bit image; save it with 8 or 16 bits per channel")
        deep = image.mode != "I" or wide.max() > 255
        image = Image.fromarray((wide // (257 if deep else 1)).astype(np.uint8))
    elif image.mode == "F":
        raise InputError(f"{path}: floating-point image; save it with 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")                       # else PIL warns on every such file
    array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def read_image(path):
    """Any photo -> uint8 [3, H, W], as to_tensor, turned as EXIF says. A file that cannot be read
    in full raises InputError with its name."""
    with opened(path) as image:
        return to_tensor(turned(image, orientation(image)), path)


def as_photo(photo):
    """A path, PIL image, uint8 array [H, W, 3] or [H, W], or tensor [3, H, W] -> uint8 [3, H, W],
    upright, the channels of a pixel side by side, as read_image has them; else InputError."""
    name = "photo"
    if isinstance(photo, str | Path):
        name, photo = photo, read_image(photo)
    elif isinstance(photo, Image.Image):
        with reading(name):
            photo = to_tensor(turned(photo, orientation(photo)), name)
    elif isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim in (2, 3):
        photo = torch.from_numpy(np.array(photo))           # a copy: PIL's arrays are read-only
        photo = photo.permute(2, 0, 1) if photo.ndim == 3 else photo.expand(3, -1, -1)
    if not torch.is_tensor(photo) or photo.dtype != torch.uint8 or photo.ndim != 3 \
            or len(photo) != 3:
        raise InputError(f"{name}: not a photo; give a path, a PIL image, uint8 [H, W, 3] numpy or "
                         "uint8 [3, H, W] torch")
    if min(photo.shape[1:]) < 2:
        raise InputError(f"{name}: {photo.shape[1]} x {photo.shape[2]} pixels show nothing; give a "
                         "larger photo")
    refuse_thin(photo, name)
    return photo.cpu().permute(1, 2, 0).contiguous().permute(2, 0, 1)


def read_view(path, choose, size):
    """The photo, upright and no larger than needed, and the view of it that choose(H, W) -> (top,
    left, height, width) asks for, in its pixels.

    A JPEG comes out at 1/2, 1/4 or 1/8, in a fraction of the time, so long as the view keeps `size`
    pixels a side.
    """
    with opened(path) as image:
        number = orientation(image)
        height, width = image.size if number > 4 else image.size[::-1]
        top, left, h, w = choose(height, width)
        factor = max(1, min(h, w) / size)
        image.draft(None, tuple(max(1, int(n / factor)) for n in image.size))
        photo = to_tensor(turned(image, number), path)
    y, x = photo.shape[1] / height, photo.shape[2] / width
    top, bottom, left, right = round(top * y), round((top + h) * y), round(left * x), round(
        (left + w) * x)
    return photo, (top, left, bottom - top, right - left)


def read_pixels(path, modes, what):
    """A PNG whose values mean something -> array as stored, no EXIF, no conversion: grey ones of 2
    and 4 bits too, which PIL stretches to 0..255.

    modes: PIL's modes that can hold it; what: its name in the error for all others.
    """
    with opened(path) as image:
        if image.mode not in modes:
            raise InputError(f"{path}: {what} (this one has mode {image.mode})")
        stored = image.tile[0][3] if image.tile else ""
        return np.array(image) // {"L;2": 85, "L;4": 17}.get(stored, 1)


def read_labels(path):
    """A label map, one value a pixel (of a palette the index) -> int32 [H, W]."""
    what = "a label map has one channel of whole numbers, 0 to 65535"
    values = read_pixels(path, ("L", "P", "1", "I", "I;16", "I;16B"), what).astype(np.int32)
    if values.size and not 0 <= values.min() <= values.max() < 2 ** 16:
        raise InputError(f"{path}: {what}")
    return values


def read_numbers(path):
    """An RGB PNG whose channels are digits (alpha is dropped) -> R + 256 G + 65536 B int32 [H, W].
    """
    with opened(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise InputError(f"{path}: expected the three channels of an RGB PNG (this one has "
                             f"mode {image.mode})")
        four = np.array(image.convert("RGBA"))              # [H, W, 4]: four bytes, one number
    return four.view("<i4")[..., 0] & 0xFFFFFF


def read_json(path, lists):
    """A JSON object -> dict in which each key of `lists` holds a list of dicts."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None
    for key in lists:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f'{path}: has no list "{key}" of objects, as COCO\'s files have')
    return content


def read_lines(path):
    """The lines of a text file in UTF-8, with or without a byte order mark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it in that encoding") from None
    return text.splitlines()


def list_images(folder, suffixes=SUFFIXES, flag="--data ", ours=None):
    """Paths of all images below a folder, nested or flat, sorted; flag: what an InputError names,
    which is raised if there is none; ours: a folder below it that is passed over, because our own
    pictures are written there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{flag}{folder}: no such folder")

    def stop(error):
        raise InputError(f"{flag}{error.filename}: cannot be read ({error.strerror})")
    found, passed = [], Counter()
    visited = {os.path.realpath(ours)} - {os.path.realpath(folder)} if ours else set()
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in visited:               # a link back up: do not go round
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = [name for name in folders if name[0] != "."]       # .ipynb_checkpoints
        names = [name for name in names if name[0] != "."]
        found += [Path(root, name) for name in names if Path(name).suffix.lower() in suffixes]
        passed.update(s for name in names if (s := Path(name).suffix.lower()) not in suffixes
                      and s in SUFFIXES | OTHERS)
    others = ", ".join(f"{n} {suffix}" for suffix, n in passed.most_common())
    if not found:
        jpeg = "; JPEG changes the values of a label map" * ("jp" in others and ".png" in suffixes)
        raise InputError(f"{flag}{folder}: no images in it ({' '.join(sorted(suffixes))})"
                         + f", but {others}: convert them{jpeg}" * bool(others))
    if others and suffixes is SUFFIXES:
        note(f"note: {folder}: {others} are passed over; convert them to be read")
    return sorted(found)


class Source:
    """Annotated photos: source[i] -> dict of "image" uint8 [3, H, W] and the labels.

    records: a dict for each photo, with its path "photo" and "id"; read(record) -> labels as numpy
    arrays and the (H, W) they are made for. classes: names of the labels 0..K-1, the first `things`
    of them things; category_ids: what the files call them; joints: names of the J keypoints.
    Labels, as far as asked for: boxes [N, 4] x1 y1 x2 y2, classes int64 [N], iscrowd bool [N], area
    [N] as the file says, keypoints [N, J, 3] x y v (the centre of pixel i at i), masks as layers
    [L, H, W], see masks.stack; semantic uint8 [H, W], IGNORE = no class; panoptic [H, W] of
    segment ids, 0 = void, segments int64 [S, 3] of id, class, crowd; depth float [H, W] metres, 0 =
    not measured.
    """

    def __init__(self, records, read, classes=(), things=0, category_ids=(), kinect_frame=False,
                 joints=()):
        self.records, self.read, self.joints = records, read, tuple(joints)
        self.classes, self.things, self.category_ids = tuple(classes), things, tuple(category_ids)
        self.kinect_frame = kinect_frame        # NYU's photos of 480 x 640 have a white border
        self.habit = {"records": records, "upright": None}      # shared by parts of a data set

    def __len__(self):
        return len(self.records)

    @property
    def ids(self):
        """Image ids, as the annotation files name them; without any, numbers."""
        return [r.get("id", k) for k, r in enumerate(self.records)]

    @property
    def paths(self):
        """Where the photos are."""
        return [r["photo"] for r in self.records]

    def labels(self, index):
        """Sample `index` without its photo."""
        return {k: torch.from_numpy(v) for k, v in self.read(self.records[index])[0].items()}

    def __getitem__(self, index):
        record = self.records[index]
        # if a file says the size, it must be true before masks of it are drawn
        size = record.get("size")
        image = read_photo(record["photo"], size, self.upright) if size else None
        labels, size = self.read(record)
        image = read_photo(record["photo"], size, self.upright) if image is None else image
        return as_sample({"image": image} | {k: torch.from_numpy(v) for k, v in labels.items()})

    def upright(self):
        """Whether the labels are for photos as EXIF turns them. Photos that change their shape when
        turned decide it, for the others as well: a tool that ignores EXIF ignores it for mirrored
        and upside-down photos, too. True if no photo decides."""
        if self.habit["upright"] is None:
            told, records, late = Counter(), self.habit["records"], 0
            for record in records[::-(-len(records) // 1000)]:
                with contextlib.suppress(InputError), opened(record["photo"]) as image:
                    plain = image.format == "PNG" and not EXIF & image.info.keys()
                    if plain and (late := late + 1) > 20:
                        continue        # PIL would decode them all, to look behind their pixels
                    width, height = image.size
                    told["turned"] += orientation(image) > 1
                    if orientation(image) > 4 and width != height:
                        told[tuple(record.get("size") or self.read(record)[1]) == (width,
                                                                                   height)] += 1
            self.habit["upright"] = told[True] >= told[False]
            if told["turned"] and not told[True] + told[False]:
                note(f"note: EXIF turns {told['turned']} photos, and none of them shows whether "
                     "its labels are for the turned photo; we assume that they are")
            if told[True] and told[False]:
                note(f"note: {told[True]} photos are labelled as EXIF turns them, {told[False]} as "
                     "they are stored; where both fit, we assume the labels are for photos as "
                     + ("turned" if self.habit["upright"] else "stored"))
        return self.habit["upright"]

    def subset(self, indexes):
        """The photos of these indexes as a Source."""
        part = copy.copy(self)
        part.records = [self.records[i] for i in indexes]
        return part


def paths_of(source, step=1):
    """Path of every step-th photo of a source; none if they are drawn."""
    return [Path(os.fsdecode(path)) for path in getattr(source, "paths", ())[::step]]


def as_sample(tensors):
    """A photo "image" and its labels, as torchvision's transforms move them together: what they
    know as images, boxes or masks becomes one of the tv_tensors."""
    boxes = partial(tv_tensors.BoundingBoxes, format="XYXY", canvas_size=tensors["image"].shape[1:])
    kinds = dict.fromkeys(("layers", "semantic", "panoptic", "depth"), tv_tensors.Mask)
    kinds |= {"image": tv_tensors.Image, "boxes": boxes}
    return {k: kinds[k](v) if k in kinds else v for k, v in tensors.items()}


def read_photo(path, size, habit):
    """Photo uint8 [3, H, W] whose labels are made for size = (H, W): upright or as stored: the
    one of this size. If both have it, habit() decides: are the labels of this data set for upright
    photos? InputError if neither has it."""
    with opened(path) as image:
        number, stored = orientation(image), image.size[::-1]
        shown = stored[::-1] if number > 4 else stored
        upright = habit() if number > 1 and stored == shown else shown == tuple(size)
        if tuple(size) not in (stored, shown):
            raise InputError(f"{path}: the photo has {shown[0]} x {shown[1]} pixels, its annotation"
                             f" is for {size[0]} x {size[1]}")
        photo = to_tensor(turned(image, number) if upright else image, path)
    refuse_thin(photo, path)
    return photo


def refuse_thin(photo, path):
    """InputError for a photo [3, H, W] that has a side many times as long as the other."""
    height, width = photo.shape[1:]
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(f"{path}: {height} x {width} pixels, a side more than {LONGEST} times the "
                         "other; crop or remove it")


def limit_classes(path, names):
    """InputError for more names than a label map of 8 bits can hold, which names `path`."""
    if len(names) > IGNORE:
        raise InputError(f"{path}: {len(names)} classes; {IGNORE} is the limit of label maps")


def hold_out(root, source):
    """[training, validation] of a data set without a validation part: every 20th photo validates
    (of those that show an object, if the records say so). InputError for fewer than two photos."""
    if len(source) < 2:
        raise InputError(f"--data {root}: one photo; training and validation need two")
    full = [i for i, r in enumerate(getattr(source, "records", ())) if shows(r)]
    if len(full) == 1 < len(source):
        raise InputError(f"--data {root}: only one photo shows an object; training and validation "
                         "need one each")
    val = (full or list(range(len(source))))[::20]
    train = sorted({*range(len(source))} - {*val})
    return [source.subset(train), source.subset(val)]


def shows(record):
    """Whether a photo shows an object that can be learned and graded. True where that is not known
    before a file is read."""
    if "segments" in record:
        return bool((record["segments"][:, 2] == 0).any())
    return "labels" not in record or not np.any([*left_out(record).values()], 0).all()


def left_out(record):
    """Objects of a photo that are not learned: {reason: bool [N]}. Crowds and objects without a
    labelled joint are not graded either; the others are, as by COCO's own tool."""
    labels, size = record["labels"], record["size"][::-1]
    boxes = labels["boxes"]
    found = {"crowds (iscrowd 1)": labels["iscrowd"],
             "without area": (boxes[:, 2:] <= boxes[:, :2]).any(1),
             "outside their photo": (boxes[:, 2:].clip(0, size)
                                     <= boxes[:, :2].clip(0, size)).any(1)}
    if "keypoints" in labels:
        found["without a labelled joint"] = ~(labels["keypoints"][..., 2] > 0).any(1)
    return found
