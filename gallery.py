"""
Put pictures that the scripts wrote side by side, each under its caption.

    python gallery.py out/gallery.png "pre-training=out/pretrain/samples/001000.png" ...
"""
import argparse
from pathlib import Path

from PIL import Image, ImageDraw

HEIGHT, STRIP, GAP = 768, 20, 8         # px: tallest picture, caption, white between pictures


def gallery(pictures):
    """pictures: list of (caption, PIL image), scaled to one height. Returns one PIL image."""
    height = min(HEIGHT, max(p.height for _, p in pictures))
    scaled = [(c, p.resize((round(p.width * height / p.height), height), Image.LANCZOS))
              for c, p in pictures]
    width = sum(p.width for _, p in scaled) + GAP * (len(scaled) - 1)
    canvas = Image.new("RGB", (width, height + STRIP), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for caption, picture in scaled:
        draw.text((x + 2, 4), caption, fill="black")
        canvas.paste(picture, (x, STRIP))
        x += picture.width + GAP
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("pictures", nargs="+", metavar="CAPTION=FILE")
    args = parser.parse_args()
    pairs = [p.partition("=")[::2] for p in args.pictures]
    missing = [f for _, f in pairs if not Path(f).is_file()]
    if missing:
        parser.error(f"no such picture: {missing[0]!r}; give CAPTION=FILE")
    gallery([(c, Image.open(f).convert("RGB")) for c, f in pairs]).save(args.out)
    print(args.out)
