"""
One picture of several runs: a row of examples for each, under its caption.

    python results/gallery.py out/gallery.png "depth: answer=out/depth/samples/000320.png" ...

The scripts write their samples as one PNG of eight examples of equal size below each other; the
first few of them stand side by side here.
"""
import argparse
from pathlib import Path

from PIL import Image, ImageDraw

EXAMPLES = 8                            # in a PNG of the scripts
WIDTH, STRIP, GAP = 1440, 18, 12        # px: the gallery, a caption, white between examples


def row(caption, picture, count):
    """The first `count` examples of a picture side by side under the caption: PIL image."""
    height = picture.height // EXAMPLES
    width = (WIDTH - GAP * (count - 1)) // count
    size = width, round(height * width / picture.width)
    canvas = Image.new("RGB", (WIDTH, size[1] + STRIP), "white")
    ImageDraw.Draw(canvas).text((2, 3), caption, fill="black")
    for i in range(count):
        example = picture.crop((0, i * height, picture.width, (i + 1) * height))
        canvas.paste(example.resize(size, Image.LANCZOS), (i * (width + GAP), STRIP))
    return canvas


def gallery(pictures, count):
    """pictures: list of (caption, PIL image). Returns one PIL image of a row for each."""
    rows = [row(caption, picture, count) for caption, picture in pictures]
    canvas = Image.new("RGB", (WIDTH, sum(r.height for r in rows)), "white")
    top = 0
    for r in rows:
        canvas.paste(r, (0, top))
        top += r.height
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("pictures", nargs="+", metavar="CAPTION=FILE")
    parser.add_argument("--count", type=int, default=4, choices=range(1, EXAMPLES + 1),
                        help="examples in a row")
    args = parser.parse_args()
    pairs = [p.rpartition("=")[::2] for p in args.pictures]
    missing = [f for _, f in pairs if not Path(f).is_file()]
    if missing:
        parser.error(f"no such picture: {missing[0]!r}; give CAPTION=FILE")
    gallery([(c, Image.open(f).convert("RGB")) for c, f in pairs], args.count).save(args.out)
    print(args.out)
