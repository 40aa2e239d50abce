"""
Where queries look: the cross-attention of chosen queries over the photo, at the three scales that
the decoder reads (Figure 4 of the paper). For predict.py --attention.
"""
import contextlib
from types import SimpleNamespace

import numpy as np
import torch

import draw
import pictures
import pose
from data import shrunk
from formats.files import InputError
from losses import corners
from model import normalize
from tokens import at_original, whole

SHOWN, SIDE = 4, 512                    # queries, and px of a photo's longer side


@contextlib.contextmanager
def recorded(decoder):
    """Within the block, what the cross-attention of the last three layers gets: a list of (its
    module, queries [B, Q, D], keys [B, K, D]), one for each of the three scales."""
    seen = []

    def note(module, inputs):
        seen.append((module, inputs[0].float(), inputs[1].float()))
    hooks = [layer.cross.register_forward_pre_hook(note) for layer in decoder.layers[-3:]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def weights(module, queries, keys):
    """Queries [1, Q, D] and keys [1, K, D] of a model.Attention -> its weights float [Q, K], mean
    over the heads; rows sum to 1."""
    q, k = (f(x)[0].unflatten(-1, (module.heads, -1)).transpose(0, 1)       # [h, *, d]
            for f, x in ((module.q, queries), (module.k, keys)))
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


@torch.no_grad()
def attention(model, photo, answer, queries=None):
    """A row for each query: what it answers, and where it looks at 1/32, 1/16 and 1/8: PIL image.

    model: predict.Model; photo uint8 [3, H, W]; answer: the model's; queries: their numbers, or
    None for the surest; InputError for a number that no query has. The pictures of several tasks
    are stacked.
    """
    small = shrunk(photo, SIDE)
    asked = [None]
    if model.task == "segmentation":
        asked = [{task: slice(None)} for task in model.args.tasks]
    return draw.below([rows(model, small, photo, answer, task, queries) for task in asked])


def rows(model, small, photo, answer, asked, queries):
    """attention() for one task. small: the photo as it is shown; asked: Segmenter's, or None."""
    net, device, config = model.network, model.run.device, model.network.glid.config
    if model.task == "pose":
        box = answer["boxes"][:1].numpy() if len(answer["boxes"]) else [
            [0, 0, photo.shape[2], photo.shape[1]]]         # the surest person
        images = pose.views(photo, box, *model.args.size)[0]
        layout, small = whole(config, images), images[0]
    else:
        images, layout = model.inputs([photo])
    if model.task == "pretraining":
        small = images[0]
    more = [asked] if asked else []
    layout = layout.to(device)
    with recorded(net.glid.decoder) as seen, model.run.autocast():
        pixels = normalize(images.to(device))
        ask = net.shares if model.task == "depth" else net
        raw = ask(pixels, layout, *more)
    said = said_by(model, raw, layout, small)
    count = len(said.sure)
    chosen = queries or said.sure.argsort(descending=True, stable=True)[:SHOWN].tolist()
    if bad := [q for q in chosen if q >= count]:
        raise InputError(f"--queries {bad[0]}: the queries are 0 to {count - 1}")
    panels = [[] for _ in chosen]
    first = int(model.task == "pretraining")                # before the hidden units: [CLS]
    for stage, (module, query, key) in zip((3, 2, 1), seen):
        own = weights(module, query[:, [q + first for q in chosen]], key)   # [n, K]
        maps = layout.to_grid(own.t(), stage)[0].permute(2, 0, 1)           # [n, h, w]
        maps = maps.repeat_interleave(1 << stage, 1).repeat_interleave(1 << stage, 2)
        maps = at_original(maps, layout.sizes[0].tolist(), config.patch, small.shape[1:])
        for row, one in zip(panels, maps.cpu()):
            row.append(pictures.heat(small, one.clamp(min=0), draw.SAMPLE))
    scales = [f"1/{config.patch << stage}" for stage in (3, 2, 1)]
    return draw.below([pictures.titled([said.show(q), *row], [said.name(q), *scales])
                       for q, row in zip(chosen, panels)])


def said_by(model, raw, layout, small):
    """What each query answers: sure float [Q]; name(q) -> str; show(q) -> PIL image.

    raw: what the network returned for one image; small: the photo as it is shown.
    """
    room, size, patch = draw.SAMPLE, layout.sizes[0].tolist(), model.network.glid.config.patch
    original = tuple(small.shape[1:])
    enlarged = lambda m: at_original(m[None].float(), size, patch, original)[0].cpu()
    if model.task == "pretraining":
        error = -((raw[0] - raw[1]).float() ** 2).mean(-1)[0].cpu()
        unit, where = model.network.glid.config.unit, layout.hidden_units[:, 1:].cpu()
        box = torch.cat([where.flip(1), where.flip(1) + 1], 1) * unit
        return SimpleNamespace(
            sure=error, name=lambda q: f"query {q}: hidden unit",
            show=lambda q: draw.boxes(small, box[[q]], [0], [""], room))
    if model.task == "detection":
        best, label = raw[0][-1, 0].float().sigmoid().cpu().max(-1)
        box = corners(raw[1][-1, 0].float().cpu()).clamp(0, 1)
        box = box * torch.tensor([*original[::-1]] * 2)
        return SimpleNamespace(
            sure=best, name=lambda q: f"query {q}: {model.classes[label[q]]} {best[q]:.2f}",
            show=lambda q: draw.boxes(small, box[[q]], label[[q]], [""], room))
    if model.task == "depth":
        middle, share = (x[0].cpu() for x in raw)
        return SimpleNamespace(                 # the surest are those that cover most of the photo
            sure=share.mean((1, 2)), name=lambda q: f"query {q}: {middle[q]:.2f} m",
            show=lambda q: pictures.heat(small, enlarged(share[q]).clamp(min=0), room))
    if model.task == "pose":
        maps = raw[0].float().cpu()                                         # [J, h, w]
        best = maps.flatten(1).amax(1)
        return SimpleNamespace(
            sure=best, name=lambda q: f"query {q}: {model.joints[q]} {best[q]:.2f}",
            show=lambda q: pictures.heat(small, enlarged(raw[0, q]).clamp(min=0), room))
    classes, masks = next(iter(raw.values()))
    best, label = classes[-1, 0].float().softmax(-1)[:, :-1].cpu().max(-1)
    return SimpleNamespace(
        sure=best, name=lambda q: f"query {q}: {model.classes[label[q]]} {best[q]:.2f}",
        show=lambda q: draw.instances(small, np.asarray(enlarged(masks[-1, 0, q]) > 0)[None], [""],
                                      room))
