"""ToyWorld: one procedural world with the annotation of every task, drawn by numpy and PIL.

A pinhole camera stands on a textured ground plane and looks at 3 to 8 objects, people among
them. scene(seed, index, size) draws one photo and, from the same geometry, its boxes, instance
masks, semantic and panoptic labels, metric depth and keypoints: exact, without a download.
Colours overlap between the classes on purpose: shape, texture and context have to be learned.
python -m formats.export --preview sheet.png shows it.
"""
import colorsys
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

THINGS = ("person", "box", "ball", "cone", "tree", "sign", "house")
STUFF = ("sky", "grass", "sand", "road", "water")
CLASSES = THINGS + STUFF
SKY, GRASS, SAND, ROAD, WATER = range(len(THINGS), len(CLASSES))
KEYPOINTS = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
             "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
             "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle")
SKELETON = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7),
            (6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))

FOCAL = 0.7       # focal length in image widths: a field of view of 71 degrees
MAX_DEPTH = 10.0  # metres: farther ground is clipped, as a real depth sensor saturates
MIN_AREA = 12     # pixels of a 64 x 64 photo: an object with fewer visible ones is not drawn
# index of the first scene: the splits share no scene. The tiny recipe was tuned on scenes from
# 1_000_000 on, so validation uses others
SPLIT_START = {"train": 0, "val": 2_000_000}


# -----------------------------------------------------------------------------
# objects: a list of parts (colour, points, radius), x right, y up, from where the object stands.
# radius 0 fills the polygon; otherwise a round pen follows the points (one point = a disc).

class Thing(NamedTuple):
    """An object of a scene, in metres."""
    z: float                # distance from the camera
    x: float                # to the right of the camera's axis
    name: str               # of THINGS
    parts: list             # see above
    keypoints: np.ndarray   # [17, 3], x, y and visibility of a person; None: no person
    pattern: tuple          # of its surface: kind, frequency, contrast


def rectangle(x0, y0, x1, y1):
    """The four corners (x, y) of a part."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


MAIN, DARK, LIGHT, OTHER, WOOD = range(5)  # colours of a part, see thing
# class, hue (varies by +-0.1: neighbours overlap), nearest z, half width in metres, height in half
# widths, parts in units of half width and height
SHAPES = (
    ("box", 0.08, 1.7, (0.3, 0.6), (1, 2), [  # a cuboid seen obliquely: front, side, top
        (MAIN, rectangle(-1, 0, 1, 1), 0), (DARK, [(1, 0), (1.4, 0.2), (1.4, 1.2), (1, 1)], 0),
        (LIGHT, [(-1, 1), (1, 1), (1.4, 1.2), (-0.6, 1.2)], 0)]),
    ("ball", 0.95, 1.7, (0.25, 0.55), (1, 1), [(MAIN, [(0, 1)], 1)]),
    ("cone", 0.05, 1.7, (0.25, 0.4), (2.5, 3.5), [  # with two light bands, on a flat foot
        (MAIN, [(-0.8, 0), (0.8, 0), (0.1, 1), (-0.1, 1)], 0),
        (MAIN, rectangle(-1, 0, 1, 0.07), 0),
        (LIGHT, [(-0.6, 0.3), (0.6, 0.3), (0.5, 0.45), (-0.5, 0.45)], 0),
        (LIGHT, [(-0.4, 0.6), (0.4, 0.6), (0.3, 0.72), (-0.3, 0.72)], 0)]),
    ("tree", 0.36, 3.5, (0.6, 1.1), (3, 4), [  # fir
        (WOOD, rectangle(-0.12, 0, 0.12, 0.5), 0), (DARK, [(-1, 0.2), (1, 0.2), (0, 0.7)], 0),
        (MAIN, [(-0.75, 0.45), (0.75, 0.45), (0, 1)], 0)]),
    ("tree", 0.29, 3.5, (0.6, 1.1), (2.5, 3.5), [  # round crown
        (WOOD, rectangle(-0.15, 0, 0.15, 0.6), 0), (DARK, [(-0.4, 0.6), (0.4, 0.6)], 0.6),
        (MAIN, [(0, 0.8)], 0.65)]),
    ("sign", 0.62, 1.7, (0.3, 0.5), (4, 6), [  # square plate
        (WOOD, rectangle(-0.15, 0, 0.15, 1), 0), (LIGHT, rectangle(-1, 0.7, 1, 1.1), 0),
        (MAIN, rectangle(-0.8, 0.74, 0.8, 1.06), 0), (LIGHT, rectangle(-0.4, 0.86, 0.4, 0.94), 0)]),
    ("sign", 0.98, 1.7, (0.3, 0.5), (4, 6), [  # round plate
        (WOOD, rectangle(-0.15, 0, 0.15, 1), 0), (MAIN, [(0, 1)], 1), (LIGHT, [(0, 1)], 0.75),
        (OTHER, rectangle(-0.5, 0.96, 0.5, 1.04), 0)]),
    ("house", 0.03, 6, (1.1, 1.8), (1.2, 1.5), [  # wall, roof, door, windows
        (MAIN, rectangle(-1, 0, 1, 1), 0),
        (OTHER, [(-1.15, 1), (1.15, 1), (0.5, 1.5), (-0.5, 1.5)], 0),
        (WOOD, rectangle(-0.15, 0, 0.15, 0.55), 0), (LIGHT, rectangle(-0.75, 0.45, -0.4, 0.75), 0),
        (LIGHT, rectangle(0.4, 0.45, 0.75, 0.75), 0)]))


def colour(hue, saturation, value):
    """Hue (cyclic), saturation, value in 0..1 -> rgb float32 [3] in 0..255."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def thing(u, shape):
    """A row of SHAPES and a source of uniform numbers -> the parts in metres."""
    _, hue, _, width, height, parts = shape
    main = colour(hue + u(-0.1, 0.1), u(0.35, 0.9), u(0.45, 0.95))
    rgb = main, 0.7 * main, 0.35 * main + 150, colour(u(), u(0, 0.5), u(0.3, 0.9)), \
        colour(0.07, u(0, 0.5), u(0.25, 0.5))
    w = u(*width)
    unit = w * np.array([1 if u() < 0.5 else -1, u(*height)])  # a box shows its left or right side
    return [(rgb[c], np.array(points) * unit, r * w) for c, points, r in parts]


def person(u):
    """An articulated figure -> parts, keypoints [17, 3] (x, y in metres, v).

    Lengths are fractions of the body height. The figure turns about its vertical axis, so its
    left side is on the right of the photo when it faces us and on the left when it does not.
    """
    yaw, back, height = u(-1, 1), u() < 0.25, u(1.5, 1.9)
    c, s = np.cos(yaw + np.pi * back), np.sin(yaw + np.pi * back)
    side = np.array([c, -c])  # left, right
    points = np.full((17, 2), (0.055 * s, 0.915))  # nose; the others follow
    for i, x, forward, y in ((1, 0.03, 0.045, 0.935), (3, 0.065, 0, 0.92),  # eyes, ears
                             (5, 0.11, 0, 0.81), (11, 0.07, 0, 0.5)):       # shoulders, hips
        points[i:i + 2, 0], points[i:i + 2, 1] = x * side + forward * s, y
    arm, leg = u(-0.3, 2.3, 2), u(-0.15, 0.6, 2)  # angles from hanging straight, outwards
    for i, length, angle in ((7, 0.17, arm), (9, 0.15, arm + u(-0.2, 1.6, 2)),
                             (13, 0.23, leg), (15, 0.23, leg - u(0, 0.7, 2))):
        swing = np.stack([np.sign(side) * np.sin(angle), -np.cos(angle)], 1)
        points[i:i + 2] = points[i - 2:i] + length * swing
    points[:, 1] -= points[15:, 1].min() - 0.03  # stand on the lower foot
    points[:, 0] += u(-0.12, 0.12) * points[:, 1]  # lean
    shirt, trousers = (colour(u(), u(0.3, 0.9), u(0.3, 0.95)) for _ in "ab")
    skin, hair = colour(0.06, u(0.3, 0.6), u(0.4, 0.95)), colour(0.08, u(0.2, 0.7), u(0.1, 0.6))
    neck, groin, head = points[5:7].mean(0), points[11:13].mean(0), points[3:5].mean(0)
    parts = [(trousers, points[[11, 13, 15]], 0.035), (trousers, points[[12, 14, 16]], 0.035),
             (skin, np.array([neck, head]), 0.025), (shirt, np.array([neck, groin]), 0.06),
             (shirt, points[[5, 11, 12, 6, 5]], 0.03), (shirt, points[[5, 11, 12, 6]], 0)]
    for i in (5, 6):
        parts += [(skin, points[[i + 2, i + 4]], 0.024), (0.85 * shirt, points[[i, i + 2]], 0.03)]
    parts.append((hair, head[None] + (0, 0.02), 0.075))
    if not back:  # a face: this is how left and right can be told apart
        parts.append((skin, head[None] + (0.02 * s, -0.03), 0.062))
        parts += [(0.3 * hair, points[[i]], 0.01) for i in (1, 2)]
    v = np.where(np.arange(17) < 3, 2 - back, 2)  # from behind, the head hides nose and eyes
    return ([(c, p * height, r * height) for c, p, r in parts],
            np.column_stack([points * height, v]))


# -----------------------------------------------------------------------------
# the photo

def arrange(rng):
    """All random choices of one scene, in metres and image widths, hence the same at every size."""
    u = rng.uniform
    base, second = (GRASS, SAND)[rng.integers(2)], (ROAD, ROAD, WATER, 0)[rng.integers(4)]
    w = dict(horizon=u(0.3, 0.5), height=u(1.3, 1.7), base=base, second=second, objects=[],
             road=(u(-2, 2), u(-0.4, 0.4), u(0.8, 1.6)),  # x at z = 0, slope, half width
             shore=u(5, 9), phase=u(0, 6.28, 4).astype(np.float32),
             clouds=u(-1, 1, (6, 6)).astype(np.float32),
             zenith=colour(u(0.55, 0.65), u(0.3, 0.8), u(0.5, 0.9)), density=u(0, 0.08),
             haze=colour(u(0.5, 0.65), u(0, 0.25), u(0.7, 1)), sun=u(-0.5, 0.5), noise=u(1, 6),
             light=(u(0.7, 1.1) * u(0.9, 1.1, 3)).astype(np.float32),
             ground=np.stack([colour(h + u(-0.05, 0.05), s * u(0.6, 1.2), u(0.4, 0.8)) for h, s in
                              ((0.27, 0.55), (0.11, 0.4), (0.6, 0.08), (0.57, 0.5))]))
    for i in range(rng.integers(3, 9)):
        shape = SHAPES[rng.integers(len(SHAPES))] if u() > 0.3 else ("person", 0, 1.7)
        z = shape[2] * (9.5 / shape[2]) ** u()  # evenly spread in log z, that is in apparent size
        x = u(-0.46, 0.46) * z / FOCAL
        if i == 0:  # one object is always close to the middle, so that no scene is empty
            x, z = x / 2, max(shape[2], min(z, 4))
        z = min(z, w["shore"] - 0.2) if second == WATER else z  # nobody stands in the water
        off = x - w["road"][0] - w["road"][1] * z
        clear = w["road"][2] + 1
        if second == ROAD and shape[0] in ("tree", "house", "sign") and abs(off) < clear and i:
            x += math.copysign(clear, off) - off  # move it off the road
        parts, keypoints = person(u) if shape[0] == "person" else (thing(u, shape), None)
        pattern = rng.integers(5), u(4, 14), u(0.1, 0.35) * (1 if keypoints is None else 0.3)
        w["objects"].append(Thing(z, x, shape[0], parts, keypoints, pattern))
    w["objects"].sort(key=lambda o: o.z)  # nearest first
    return w


def backdrop(w, size):
    """Sky and ground -> image [S, S, 3], class [S, S], z [S] by row, ground x [S - sky, S]."""
    t = (np.arange(size, dtype=np.float32) + 0.5) / size  # pixel centres in image widths
    sky = int((t <= w["horizon"]).sum())
    image, semantic = np.empty((size, size, 3), np.float32), np.full((size, size), SKY, np.uint8)
    clouds = Image.fromarray(w["clouds"]).resize((size, sky), Image.BICUBIC)
    image[:sky] = w["zenith"] + (t[:sky, None, None] / w["horizon"]) * (w["haze"] - w["zenith"])
    image[:sky] += np.clip(np.asarray(clouds), 0, 0.9)[..., None] * (250 - image[:sky])

    # a pinhole camera at this height sees the ground of a row at z, and that of a pixel at x
    z = np.minimum(FOCAL * w["height"] / (t[sky:, None] - w["horizon"]), 100)
    x = (t - 0.5) * z / FOCAL
    a, b, c, d = w["phase"]
    fine = 0.15 * np.clip(1 - z / 9, 0, 1)  # fine texture fades out before it would alias
    if w["base"] == GRASS:  # mowed in stripes, with tufts
        value = 0.1 * np.sin(2.5 * x + b) + fine * np.sin(11 * x + c) * np.sin(7 * z + d)
    else:                   # sand in wind ripples
        value = fine * np.sin(6 * z + 2 * np.sin(1.3 * x + b) + c)
    ground = semantic[sky:]
    ground[:] = w["base"]
    if w["second"] == ROAD:  # straight, with a dashed middle line and two edges
        off = np.abs(x - w["road"][0] - w["road"][1] * z)
        line = (off < 0.07) & (np.sin(2.5 * z + b) > 0) | (np.abs(off - w["road"][2] + 0.15) < 0.06)
        ground[off < w["road"][2]] = ROAD
        value = np.where(ground == ROAD, 0.7 * line, value)
    elif w["second"] == WATER:  # waves grow thinner towards the horizon
        ground[z > w["shore"] + 0.4 * np.sin(0.8 * x + a)] = WATER
        value = np.where(ground == WATER, 0.12 * np.sin(30 * np.log(z) + np.sin(2 * x)), value)
    image[sky:] = w["ground"][ground - GRASS] * (1 + value)[..., None]
    return image, semantic, np.append(np.full(sky, np.inf, np.float32), z), x


def sprite(o, w, size):
    """Draw one object alone -> (rows, columns) slices, rgb [h, w, 3], alpha [h, w], depth [h, w].

    None if it is out of the frame. Drawn twice as large and shrunk: alpha is the covered fraction.
    """
    (kind, f, contrast), parts = o.pattern, o.parts
    scale = FOCAL * size / o.z  # pixels per metre
    x0, y0 = size / 2 + o.x * scale, w["horizon"] * size + w["height"] * scale
    corners, pen = np.concatenate([p for _, p, _ in parts]), max(r for _, _, r in parts)
    (left, low), (right, high) = corners.min(0) - pen, corners.max(0) + pen
    left, right = (int(min(max(x0 + v * scale, 0), size)) for v in (left, right + 2 / scale))
    top, bottom = (int(min(max(y0 - v * scale, 0), size)) for v in (high, low - 2 / scale))
    if left >= right or top >= bottom:
        return None
    canvas = Image.new("RGBA", (2 * (right - left), 2 * (bottom - top)))
    draw = ImageDraw.Draw(canvas)
    zoom = np.array([2 * scale, -2 * scale])
    shift = np.array([2 * (x0 - left) - 0.5, 2 * (y0 - top) - 0.5])
    for rgb, points, radius in parts:
        fill, points = (*map(int, rgb), 255), points * zoom + shift
        if radius == 0:
            draw.polygon(points.ravel().tolist(), fill)
            continue
        radius = max(2 * radius * scale, 0.5)
        draw.line(points.ravel().tolist(), fill, max(1, round(2 * radius)))
        for px, py in points.tolist():
            draw.ellipse((px - radius, py - radius, px + radius, py + radius), fill)
    canvas = np.asarray(canvas.reduce(2), np.float32)
    # metres on the object
    x = (np.arange(left, right, dtype=np.float32)[None] + (0.5 - x0)) / scale
    y = (y0 - 0.5 - np.arange(top, bottom, dtype=np.float32)[:, None]) / scale
    h, v = np.sin(f * x), np.sin(f * y)
    # plain, stripes either way, checks, bumps
    wave = (0, np.sign(h), np.sign(v), np.sign(h) * np.sign(v), h * v)[kind]
    shade = 1 + contrast * wave + np.clip(w["sun"] * x, -0.25, 0.25) + 0 * y
    depth = np.full(shade.shape, o.z, np.float32)
    if o.name == "ball":  # the one round thing: its middle is nearer, its lower half in the dark
        radius = parts[0][2]
        depth -= np.sqrt(np.maximum(radius ** 2 - x ** 2 - (y - radius) ** 2, 0))
        shade += 0.5 * (y / radius - 1)
    rgb, alpha = canvas[..., :3] * shade[..., None], canvas[..., 3] / 255
    return (slice(top, bottom), slice(left, right)), rgb, alpha, depth


def scene(seed, index, size):
    """Photo and every annotation of scene `index`; a pure function, the same in every process.

    image uint8 [S, S, 3]; semantic uint8 [S, S] (class); panoptic int32 [S, S] (object k -> k + 1,
    stuff class c -> 1000 + c); segments int64 [P, 3] (id in panoptic, class, 0 = no crowd); depth
    float32 [S, S] in metres, 0 = sky. N objects, nearest first: classes int64 [N]; boxes float32
    [N, 4] xyxy pixels, right and bottom exclusive; masks bool [N, S, S], visible part, disjoint;
    area float32 [N], its pixels; keypoints float32 [N, 17, 3] (x, y in pixels, the centre of pixel
    i at i as in COCO, v = 2 visible, 1 hidden, 0 outside; all 0 for what is no person).
    """
    rng = np.random.default_rng([seed, index])
    w = arrange(rng)
    image, semantic, z, ground_x = backdrop(w, size)
    depth = np.where(z < np.inf, np.minimum(z, np.float32(MAX_DEPTH)), 0)  # 0 = sky, not valid
    depth = np.repeat(depth[:, None], size, 1)

    # near to far: an object owns what no nearer one has taken, and is dropped if too little is left
    owner, kept = np.full((size, size), -1), []
    for o in w["objects"]:
        drawn = sprite(o, w, size)
        mine = drawn and (drawn[2] > 0.5) & (owner[drawn[0]] < 0)
        if drawn and mine.sum() >= MIN_AREA * (size / 64) ** 2:
            owner[drawn[0]][mine] = len(kept)
            depth[drawn[0]][mine] = drawn[3][mine]
            kept.append((o, drawn))

    # a soft shadow lies on the ground, on the side away from the sun
    sky = size - len(ground_x)
    ground, z, light = image[sky:], z[sky:, None], np.ones_like(ground_x)
    for o, _ in kept:
        r = 0.3 + 0.5 * float(o.parts[0][1][:, 0].max())
        rows = slice(*np.searchsorted(-z[:, 0], (-o.z - r, r - o.z)))
        across, along = (ground_x[rows] - o.x) / r + 0.6 * w["sun"], (z[rows] - o.z) / (0.7 * r)
        light[rows] *= 1 - 0.5 * np.exp(-2 * (across * across + along * along))
    ground *= light[..., None]

    # far to near: haze thickens with distance, edges blend by the covered fraction
    ground += (1 - np.exp(-w["density"] * z[..., None])) * (w["haze"] - ground)
    for o, (at, rgb, alpha, _) in reversed(kept):
        rgb += (1 - math.exp(-w["density"] * o.z)) * (w["haze"] - rgb)
        image[at] += alpha[..., None] * (rgb - image[at])
    image *= w["light"]
    image += w["noise"] * rng.standard_normal(image.shape, np.float32)
    return dict(image=np.clip(image, 0, 255).astype(np.uint8), depth=depth,
                **annotate(w, [o for o, _ in kept], owner, semantic, size))


def annotate(w, objects, owner, semantic, size):
    """Owner of each pixel (-1 = stuff) -> labels, boxes, masks and keypoints; see scene."""
    classes = np.array([THINGS.index(o.name) for o in objects], np.int64)
    masks = owner == np.arange(len(objects))[:, None, None]
    boxes = np.zeros((len(objects), 4), np.float32)
    keypoints = np.zeros((len(objects), 17, 3), np.float32)
    for k, o in enumerate(objects):
        ys, xs = np.flatnonzero(masks[k].any(1)), np.flatnonzero(masks[k].any(0))
        boxes[k] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
        if o.keypoints is not None:
            p = o.keypoints[:, :2] * (1, -1) + (o.x, w["height"])
            p = p * FOCAL / o.z + (0.5, w["horizon"])
            p = np.column_stack([p * size, o.keypoints[:, 2]]).astype(np.float32)
            p *= ((p[:, :2] >= 0) & (p[:, :2] < size)).all(1, keepdims=True)
            top = owner[p[:, 1].astype(int), p[:, 0].astype(int)]
            p[:, 2] = np.minimum(p[:, 2], np.where((top >= 0) & (top < k), 1, 2))  # a nearer object
            p[:, :2] -= 0.5 * (p[:, 2:] > 0)  # to COCO's: the centre of pixel i is at i
            keypoints[k] = p
    segments = [(k + 1, c, 0) for k, c in enumerate(classes.tolist())]
    segments += [(1000 + c, c, 0) for c in np.unique(semantic[owner < 0]).tolist()]
    return dict(semantic=np.where(owner < 0, semantic, classes[owner]).astype(np.uint8),
                panoptic=np.where(owner < 0, np.int32(1000) + semantic, owner + 1).astype(np.int32),
                segments=np.array(segments, np.int64).reshape(-1, 3), classes=classes, boxes=boxes,
                masks=masks, area=masks.sum((1, 2)).astype(np.float32), keypoints=keypoints)
