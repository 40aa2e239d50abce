"""
One picture of several runs: a row of examples for each, under its caption.

    python results/gallery.py out/gallery.png "depth: answer=out/depth/samples/000320.png" ...

The scripts write their samples as one PNG of eight examples of equal size below each other; the
first few of them stand side by side here.
"""
import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import draw

EXAMPLES = 8                            # in a PNG of the scripts
WIDTH, STRIP, GAP = 1440, 18, 12        # px: the gallery, a caption, white between examples


def row(caption, picture, count):
    """The first `count` examples of a picture side by side under the caption: PIL image."""
    height = picture.height // EXAMPLES
    width = (WIDTH - GAP * (count - 1)) // count
    size = width, round(height * width / picture.width)
    examples = [picture.crop((0, i * height, picture.width, (i + 1) * height))
                .resize(size, Image.LANCZOS) for i in range(count)]
    strip = Image.new("RGB", (WIDTH, STRIP), "white")
    ImageDraw.Draw(strip).text((2, 3), caption, fill="black")
    return draw.below([strip, draw.beside(examples, GAP)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("pictures", nargs="+", metavar="CAPTION=FILE")
    parser.add_argument("--count", type=int, default=4, choices=range(1, EXAMPLES + 1),
                        help="examples in a row")
    args = parser.parse_args()
    pairs = [p.partition("=")[::2] for p in args.pictures]
    missing = [f for _, f in pairs if not Path(f).is_file()]
    if missing:
        parser.error(f"no such picture: {missing[0]!r}; give CAPTION=FILE")
    rows = [row(c, Image.open(f).convert("RGB"), args.count) for c, f in pairs]
    draw.below(rows).save(args.out)
    print(args.out)
