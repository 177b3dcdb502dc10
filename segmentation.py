"""Masks: instance and panoptic segmentation with DETR (arXiv:2005.12872, Sec. 3.3 and 4.3).

    model = build_model("detr_r50", masks=True)
    logits, boxes, masks = model(images, valid)            # mask logits (B, Q, IH / 4, IW / 4)
"""

import math
import os
from contextlib import suppress

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from coco_eval import (UserError, ap_table, evaluate_columns, mask_box, mask_edges, read_json,
                       result_json, summary, writing)
from processes import gather
from images import draw_boxes, draw_ground, draw_masks, draw_shape, read_image
from check_data import (as_instances, cached_arrays, file_faults, image_faults, refuse,
                        short_repr)
from data import CocoDataset, ShapesDataset
from matcher import match
from losses import loss_normalizers, set_loss
from evaluate import detection_rows, evaluate
from report import detection_report, draw_detections, say, validation_normalizers


# -- the head ------------------------------------------------------------------------------------

class MaskAttention(nn.Module):
    """Where each query looks in the image: the attention weights of all heads, without values.

    Unlike in cross-attention, the softmax of a query is over all heads and places together.
    """

    def __init__(self, cfg):
        super().__init__()
        C, self.nh = cfg.hidden_dim, cfg.nheads
        self.q_linear, self.k_linear = nn.Linear(C, C), nn.Linear(C, C)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states, memory, valid, grid):
        """states (B, Q, C), memory (B, N, C), valid (B, N) or None -> (B, Q, nh, H, W)."""
        q = self.q_linear(states).unflatten(2, (self.nh, -1))                  # (B, Q, nh, hs)
        k = self.k_linear(memory).unflatten(2, (self.nh, -1))                  # (B, N, nh, hs)
        weights = torch.einsum("bqhc,bnhc->bqhn", q * q.shape[3] ** -0.5, k)   # (B, Q, nh, N)
        if valid is not None:
            weights = weights.masked_fill(~valid[:, None, None], -math.inf)
        weights = weights.flatten(2).softmax(2)                                # (B, Q, nh * N)
        return weights.unflatten(2, (self.nh, *grid))                          # (B, Q, nh, H, W)


class MaskHead(nn.Module):
    """Convolutions from a query's attention maps to its mask, with the backbone's finer maps added
    on the way (a feature pyramid, arXiv:1612.03144). The names are the official ones.

    With cfg.masks a backbone's forward also returns the maps of the stages before the last, finest
    first, of `map_channels` channels. Three of them give the official head, fewer a shorter one.
    """

    def __init__(self, cfg, backbone):
        super().__init__()
        C, nh = cfg.hidden_dim, cfg.nheads
        channels = getattr(backbone[0].body, "map_channels", None)
        if channels is None:
            raise UserError(f"--masks needs the maps of a backbone's stages, which {cfg.backbone} "
                            f"does not give: use another --backbone")
        widths = [C + nh, C + nh, C // 2, C // 4, C // 8, C // 16]
        self.layers = len(channels) + 2
        for k in range(1, self.layers + 1):
            self.add_module(f"lay{k}", nn.Conv2d(widths[k - 1], widths[k], 3, padding=1))
            self.add_module(f"gn{k}", nn.GroupNorm(math.gcd(8, widths[k]), widths[k]))
        self.out_lay = nn.Conv2d(widths[self.layers], 1, 3, padding=1)
        for k, c in enumerate(reversed(channels), 1):               # the coarsest map first
            self.add_module(f"adapter{k}", nn.Conv2d(c, widths[k + 1], 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_uniform_(m.weight, a=1)
                nn.init.zeros_(m.bias)

    @torch.compiler.disable                        # M changes from step to step
    def forward(self, tokens, attention, maps, wanted=None, outputs=()):
        """Mask logits (B, Q, H4, W4) float32, or (M, H4, W4) of M queries.

        tokens (B, N, C) before the encoder; attention (B, Q, nh, H, W); maps: those of the stages
        before the last (B, _, _, _), finest first; wanted(*outputs) gives (image, query), each (M,)
        int64.
        """
        B, Q, nh, H, W = attention.shape
        chosen = wanted(*outputs) if wanted else None
        if chosen is None:
            image = torch.arange(B, device=tokens.device).repeat_interleave(Q)
            attention = attention.flatten(0, 1)                                # (B * Q, nh, H, W)
        else:
            image, query = (index.to(tokens.device) for index in chosen)
            attention = attention[image, query]                                # (M, nh, H, W)

        # a convolution is linear: the tokens' part of the first one is the same for all queries
        tokens = tokens.transpose(1, 2).unflatten(2, (H, W))                   # (B, C, H, W)
        w_tokens, w_attention = self.lay1.weight.split((tokens.shape[1], nh), 1)
        pyramid = [F.conv2d(tokens, w_tokens, self.lay1.bias, padding=1)]
        pyramid += [self.get_submodule(f"adapter{k}")(x) for k, x in enumerate(reversed(maps), 1)]

        # without gradients, a few queries at a time need little memory
        some = len(image) if torch.is_grad_enabled() else 16
        parts = [self.refine(F.conv2d(part, w_attention, padding=1), pyramid, i)
                 for part, i in zip(attention.split(max(some, 1)), image.split(max(some, 1)))]
        masks = torch.cat(parts).float()                                       # (M, H4, W4)
        return masks.unflatten(0, (B, Q)) if chosen is None else masks

    def refine(self, x, pyramid, image):
        """x (M, C + nh, H, W) of queries in these images (M,) -> (M, H4, W4)."""
        x = F.relu(self.gn1(x + pyramid[0][image]))
        x = F.relu(self.gn2(self.lay2(x)))
        for k, finer in enumerate(pyramid[1:], 3):
            x = F.interpolate(x, size=finer.shape[2:]) + finer[image]          # nearest
            norm, conv = self.get_submodule(f"gn{k}"), self.get_submodule(f"lay{k}")
            x = F.relu(norm(conv(x)))
        return self.out_lay(x)[:, 0]


# -- losses --------------------------------------------------------------------------------------

def mask_losses(masks, wanted, objects):
    """The focal and the dice loss of M masks: "loss_mask" and "loss_dice", 0-dim tensors.

    masks: logits (M, H4, W4); wanted: bool (M, IH, IW), False in the padding, which counts like the
    rest of an image; objects: of the whole step, which divide the sums. In float32.
    Sources: arXiv:1708.02002, Eq. 5 (alpha 1/4, gamma 2); arXiv:1606.04797, Eq. 2, of p without
    the squares and with 1 added to numerator and denominator.
    """
    with torch.autocast(masks.device.type, enabled=False):
        x = F.interpolate(masks[:, None].float(), size=wanted.shape[1:], mode="bilinear")
        x, y = x.flatten(1), wanted.flatten(1).float()                         # (M, IH * IW)
        p = x.sigmoid()

        ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        focal = (0.75 - 0.5 * y) * (p - y).square() * ce            # weight 1/4 inside, 3/4 outside
        dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)        # (M,)
        objects = objects or 1                     # can be under 1 per process
        return {"loss_mask": focal.mean(1).sum() / objects, "loss_dice": dice.sum() / objects}


def matched_masks(pairs, targets, size):
    """The masks of the matched objects, bool (M, IH, IW): padded with False to the batch's size.

    pairs: of match, of one layer; targets with "masks" (T, h, w).
    """
    masks = torch.zeros(sum(len(query) for query, _ in pairs), *size, dtype=torch.bool)
    row = 0
    for (_, index), target in zip(pairs, targets):
        _, h, w = target["masks"].shape
        masks[row:row + len(index), :h, :w] = target["masks"][index]
        row += len(index)
    return masks


def segmentation_losses(run, images, valid, targets, normalizers, global_step):
    """set_loss of a micro-batch with the losses of the masks, which are computed for the matched
    queries of the last layer alone; global_step is for classification_losses."""
    pairs = []

    def matched(logits, boxes):                    # called once the boxes are known, before masks
        pairs.extend(match_layers(logits, boxes, targets, run.loss_cfg))
        return matched_queries(pairs[-1])

    logits, boxes, masks = run.model(images, valid, matched)
    losses = set_loss(logits, boxes, targets, run.loss_cfg, normalizers, run.class_weights, pairs)
    if normalizers is None:
        normalizers = loss_normalizers(targets, boxes.shape[2])
    return add_mask_losses(losses, masks, pairs, targets, run.loss_cfg, normalizers)


def match_layers(logits, boxes, targets, cfg):
    """match of the decoder layers that set_loss uses."""
    used = slice(None) if cfg.aux_loss else slice(-1, None)
    return match(logits[used], boxes[used], targets, cfg.set_cost_class, cfg.set_cost_bbox,
                 cfg.set_cost_giou)


def matched_queries(pairs):
    """(image, query), each (M,), of the matched objects; pairs: of match, of one layer."""
    image = [torch.full_like(query, i) for i, (query, _) in enumerate(pairs)]
    return torch.cat(image), torch.cat([query for query, _ in pairs])


def add_mask_losses(losses, masks, pairs, targets, cfg, normalizers):
    """The dict of set_loss with those of the masks (M, H4, W4) of the matched queries."""
    size = np.max([t["masks"].shape[1:] for t in targets], axis=0).tolist()    # of the batch
    wanted = matched_masks(pairs[-1], targets, size)
    wanted = wanted.to(masks.device, non_blocking=masks.is_cuda)
    losses = losses | mask_losses(masks, wanted, normalizers[0].item())
    total = (losses["loss"] + cfg.mask_loss_coef * losses["loss_mask"]
             + cfg.dice_loss_coef * losses["loss_dice"])
    return {**losses, "loss": total}


def share_in_segmentation_losses(run):
    """share_in_detection_losses with the losses of the masks, of which each counts the padding of
    its own batch."""
    cfg, whole = run.loss_cfg, validation_normalizers(run)

    def share(outputs, targets):
        logits, boxes, masks = outputs
        pairs = match_layers(logits, boxes, targets, cfg)
        losses = set_loss(logits, boxes, targets, cfg, whole, run.class_weights, pairs)
        image, query = matched_queries(pairs[-1])
        return add_mask_losses(losses, masks[image, query], pairs, targets, cfg, whole)
    return share


# -- masks as pixels and as runs -----------------------------------------------------------------

def edge_pixels(edges, h, w):
    """The pixels, bool (h, w), of a mask given by the edges of its runs: see coco_eval.py."""
    inside = np.arange(len(edges) + 1) % 2 == 1
    return np.repeat(inside, np.diff(edges, prepend=0, append=h * w)).reshape(w, h).T


def pixel_edges(mask):
    """The edges of the runs of a mask's pixels, bool (h, w)."""
    column_by_column = np.pad(mask.T.ravel(), 1)
    return np.flatnonzero(column_by_column[1:] != column_by_column[:-1])


def compressed(edges, h, w):
    """COCO's compressed run-length code of a mask, a str; coco_eval.unpack_counts reads it."""
    counts = np.diff(edges, prepend=0, append=h * w)
    if not counts[-1]:                                              # the mask ends in the corner
        counts = counts[:-1]
    x = counts.copy()
    x[3:] -= counts[1:-2]                                           # differences to two before

    # 5 bits a character, the lowest first, the last one's highest bit is the sign
    place = np.arange(7)
    needed = 1 + np.isin(x[:, None] >> 5 * place + 4, (0, -1), invert=True).sum(1)[:, None]
    code = (x[:, None] >> 5 * place & 31) + np.where(place < needed - 1, 32, 0) + 48
    return code[place < needed].astype(np.uint8).tobytes().decode()


def mask_code(mask):
    """A mask's pixels, bool (h, w), as COCO's results format has them."""
    return {"size": list(mask.shape), "counts": compressed(pixel_edges(mask), *mask.shape)}


# -- masks of a data set -------------------------------------------------------------------------

def nearest(index, size):
    """`size` entries of an index (n,), each the one below its place: F.interpolate's "nearest"."""
    scale = np.float32(len(index)) / np.float32(size)
    return index[np.floor(np.arange(size, dtype=np.float32) * scale).astype(int)]


def source_pixels(h, w, plan):
    """The rows and the columns of an image of h x w pixels of which a data.Plan makes its result:
    (H,) and (W,). Resizing takes the nearest pixel."""
    rows, columns = np.arange(h), np.arange(w)
    if plan.flip:
        columns = columns[::-1]
    if plan.resize_before_crop:
        rows, columns = map(nearest, (rows, columns), plan.resize_before_crop)
    if plan.crop:
        top, left, height, width = plan.crop
        rows, columns = rows[top:top + height], columns[left:left + width]
    return tuple(map(nearest, (rows, columns), plan.size))


class Masks:
    """The masks of a data set's objects. A subclass has edges or pixels of its own."""

    def __init__(self, dataset):
        self.dataset, self.columns = dataset, None                  # of true_columns

    def areas(self):
        """The areas (M,) of all objects as annotated; NaN: the mask's own."""
        return np.full(len(self.dataset.labels), math.nan)

    def edges(self, i):
        """The edges of the runs of all objects of image i, crowds included: a list."""
        return [pixel_edges(mask) for mask in self.pixels(i)]

    def pixels(self, i):
        """The same as a list of bool (h, w)."""
        return [edge_pixels(edges, *self.dataset.sizes[i]) for edges in self.edges(i)]

    def of_plan(self, i, rows, plan):
        """The masks of objects of image i, augmented as the image: bool tensor (T, H, W); rows: of
        the objects in the data set's arrays."""
        y, x = source_pixels(*self.dataset.sizes[i].tolist(), plan)
        masks, pixels = np.zeros((len(rows), len(y), len(x)), bool), self.pixels(i)
        for mask, row in zip(masks, rows - self.dataset.offsets[i]):
            mask[:] = pixels[row][:, x][y]
        return torch.from_numpy(masks)


class ShapeMasks(Masks):
    """Those of generated shapes: what is to be seen of each."""

    def pixels(self, i):
        # the image again, with the same random numbers, but each object in its number
        rng, ground, objects = self.dataset._scene(self.dataset.files[i])
        draw_ground(rng, ground, self.dataset.side)
        canvas = Image.new("L", (self.dataset.side, self.dataset.side))
        for k, (_, _, parts) in enumerate(objects, 1):
            for shape, box, _ in parts:
                draw_shape(canvas, rng, shape, box, fill=k)
        return [np.array(canvas) == k for k in range(1, len(objects) + 1)]


def segmentation_parts(record, h, w):
    """A COCO segmentation as numbers: (its polygons, or the edges of its run-length code, as a list
    of float64 arrays; whether it is a code). Raises ValueError."""
    segmentation = record.get("segmentation")
    if isinstance(segmentation, dict):
        return [mask_edges(segmentation, h, w)], True
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"it is {short_repr(segmentation)}")
    for ring in segmentation:
        if ring.dtype.kind not in "iuf" or ring.ndim != 1 or len(ring) < 6 or len(ring) % 2 or not (
                np.abs(ring) < 1e6).all():
            raise ValueError(f"a polygon is {short_repr(ring.tolist())}")
    return segmentation, False


def annotation_file(dataset):
    """The path of a CocoDataset's COCO file. Raises UserError for another format."""
    labels = dataset.json_path
    if getattr(labels, "reader", None):
        raise UserError(f"--masks: {labels} is in {dataset.format_name} format, of which boxes "
                        f"alone are read: give a COCO file with segmentations (evaluate.py "
                        f"--boxes leaves masks out)")
    return str(getattr(labels, "path", labels))


def read_segmentations(dataset):
    """The segmentations of a COCO file as flat arrays, in the order of read_coco: for a panoptic
    file read_panoptic's; for an instances file:

    "numbers": coordinates of polygons, edges of run-length codes; "parts" (P + 1,): where each of
    these begins; "objects" (M + 1,): where the parts of each object begin; "is_code" (M,) bool;
    "area" (M,), NaN where there is none; "first" (N + 1,): where the objects of each image begin.
    """
    def as_arrays(record):                         # while the file is read: lists take much memory
        if isinstance(record.get("segmentation"), list):
            with suppress(ValueError):
                record["segmentation"] = [np.array(ring) for ring in record["segmentation"]]
        return record

    json_path = annotation_file(dataset)
    data = read_json(json_path, "a COCO instances file", as_arrays)
    panoptic, own_images = as_instances(data) is not data, set(dataset.image_ids.tolist())
    records = [r for r in data["annotations"] if r.get("image_id") in own_images]  # --val_split
    if panoptic:
        return read_panoptic(json_path, {**data, "annotations": records}, dataset)
    image_index = {id_: i for i, id_ in enumerate(dataset.image_ids.tolist())}
    image = np.array([image_index[r["image_id"]] for r in records], np.int64)
    order = np.argsort(image, kind="stable")

    found, faults = [], []
    for row in order.tolist():
        try:
            found.append(segmentation_parts(records[row], *dataset.sizes[image[row]].tolist()))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            name = short_repr(records[row].get("id", f"number {row}"))
            faults.append(f"{json_path}: annotation {name}: segmentation should be polygons of "
                          f"three points or more, or a run-length code: {error}")
    refuse(json_path, faults)
    parts = [part for own, _ in found for part in own]
    area = [records[row].get("area") for row in order.tolist()]
    return {"numbers": np.concatenate([np.zeros(0), *parts]),
            "parts": np.cumsum([0] + [len(part) for part in parts]),
            "objects": np.cumsum([0] + [len(own) for own, _ in found]),
            "is_code": np.array([is_code for _, is_code in found], bool),
            "area": np.array([math.nan if a is None else a for a in area], np.float64),
            "first": np.searchsorted(image[order], np.arange(len(image_index) + 1))}


class CocoMasks(Masks):
    """Those of a COCO instances file: polygons and run-length codes."""

    def __init__(self, dataset, arrays):
        super().__init__(dataset)
        self.__dict__.update(arrays)                                # of read_segmentations
        self.image_ids = dataset.image_ids                          # before --overfit

    def edges(self, i):
        h, w = self.dataset.sizes[i].tolist()
        image = np.searchsorted(self.image_ids, self.dataset.image_ids[i])
        masks = []
        for row in range(self.first[image], self.first[image + 1]):
            ends = self.parts[self.objects[row]:self.objects[row + 1] + 1]
            parts = [self.numbers[a:b] for a, b in zip(ends, ends[1:])]
            if self.is_code[row]:
                masks.append(parts[0].astype(np.int64))
            else:
                masks.append(mask_edges(parts, h, w))
        return masks

    def areas(self):
        images = np.searchsorted(self.image_ids, self.dataset.image_ids)
        return np.concatenate([self.area[self.first[i]:self.first[i + 1]] for i in images])


def read_panoptic(json_path, data, dataset):
    """The segments of a COCO panoptic file as arrays, in the order of read_coco: "segment" (M,),
    ids in the PNG files; "first" (N + 1,): where the segments of each image begin; "png" (N,):
    names of the files, in a folder beside the JSON file and named like it; "stuff": class names.

    Raises UserError, UserFileError for missing files.
    """
    images = {id_: i for i, id_ in enumerate(dataset.image_ids.tolist())}
    png, segments, faults = [""] * len(images), [[]] * len(images), []
    for r in data["annotations"]:
        name, own = r.get("file_name"), [s.get("id") for s in r["segments_info"]]
        found = image_faults({"file_name": name, "width": 1, "height": 1})
        found += [f"segment id {short_repr(s)} is not an integer from 1 to 2**24 - 1" for s in own
                  if type(s) is not int or not 0 < s < 2**24]
        faults += [f"{json_path}: segments of image {r['image_id']}: {fault}" for fault in found]
        if own:
            png[images[r["image_id"]]], segments[images[r["image_id"]]] = name, own
    refuse(json_path, faults)
    listed = [name for name in png if name]
    refuse(json_path, file_faults(json_path, listed, listed, png_folder(json_path)))
    stuff = [c["name"] for c in data["categories"] if not c.get("isthing", 1)]
    return {"segment": np.array([s for own in segments for s in own], np.int64),
            "first": np.cumsum([0] + [len(own) for own in segments]),
            "png": np.array([os.fsencode(name) for name in png]),
            "stuff": np.array([os.fsencode(name) for name in stuff] or [b""])}


def png_folder(json_path):
    return os.path.splitext(json_path)[0]


class PanopticMasks(Masks):
    """Those of a COCO panoptic file: PNG files in which the colour of a pixel is its segment's id,
    red + 256 green + 256**2 blue; 0 where nothing is annotated."""

    def __init__(self, dataset, arrays):
        super().__init__(dataset)
        self.image_ids = dataset.image_ids                          # before --overfit
        self.first, self.segment = arrays["first"], arrays["segment"]
        self.folder, self.png = png_folder(annotation_file(dataset)), arrays["png"]
        stuff = [os.fsdecode(name) for name in arrays["stuff"].tolist()]
        dataset.things = [name not in stuff for name in dataset.classes]

    def segments(self, i):
        """The id of the segment of each pixel of image i, (h, w), and the ids of its segments."""
        image = np.searchsorted(self.image_ids, self.dataset.image_ids[i])
        own = self.segment[self.first[image]:self.first[image + 1]]
        size = self.dataset.sizes[i].tolist()
        if not len(own):
            return np.zeros(size, int), own
        path = os.path.join(self.folder, os.fsdecode(self.png[image]))
        rgb = np.array(read_image(path, size), int)
        return rgb @ (1, 256, 256**2), own

    def pixels(self, i):
        ids, own = self.segments(i)
        return [ids == segment for segment in own]


def add_masks(dataset):
    """Gives a data set the masks of its objects, which its targets then have, too."""
    if isinstance(dataset, ShapesDataset):
        dataset.masks = ShapeMasks(dataset)
    elif isinstance(dataset, CocoDataset):
        arrays = cached_arrays(dataset.source, lambda: read_segmentations(dataset), what="masks")
        dataset.masks = (PanopticMasks if "segment" in arrays else CocoMasks)(dataset, arrays)
    elif dataset.masks is None:
        raise UserError(f"--masks: {type(dataset).__name__} has none, give it a field `masks`, as "
                        f"segmentation.py's Masks")


# -- panoptic segmentation -----------------------------------------------------------------------

def panoptic_queries(logits, threshold=0.85):
    """Queries whose best class is an object's, with a probability over the threshold: bool (..., Q)
    of logits (..., Q, K+1), and their labels (..., Q)."""
    scores, labels = logits.float().softmax(-1).max(-1)
    return (labels < logits.shape[-1] - 1) & (scores > threshold), labels


def merge_masks(logits, labels, things, canvas, size, original_size):
    """One segment for each pixel of an image, from masks that overlap.

    logits (n, H4, W4), labels: a list of n; things: bool of each class, False for stuff; the sizes
    as of full_masks. Returns the number of the segment of each pixel, 1 for the first, int (h, w),
    and the labels of the segments. A pixel is of the mask with the highest logit; the masks of one
    class of stuff are one segment; segments of 4 pixels or fewer are dropped and their pixels given
    to the others, until none is left. Source: the official PostProcessPanoptic, which numbers the
    segments from 0.
    """
    h, w = size
    if len(logits):
        logits = F.interpolate(logits[:, None].float(), size=tuple(canvas), mode="bilinear")
        logits = logits[:, 0, :h, :w].cpu()
    first_of_class = {label: labels.index(label) for label in labels if not things[label]}
    merged = [first_of_class.get(label, k) for k, label in enumerate(labels)]

    while labels:
        # of 0, 1, ... n - 1, in the original size; stuff is merged the first time alone
        segment = np.array(merged, np.int32)[logits.softmax(0).argmax(0).numpy()]
        segment = Image.fromarray(segment).resize(original_size[::-1], Image.Resampling.NEAREST)
        segment = np.array(segment)
        large = np.bincount(segment.ravel(), minlength=len(labels)) > 4
        if large.all():
            return segment + 1, labels
        logits, labels = logits[large], [label for label, ok in zip(labels, large) if ok]
        merged = range(len(labels))
    return np.zeros(original_size, np.int32), []


def panoptic_counts(dataset, i, found, labels):
    """What is found of image i: the sum of the IoUs of the matches, and the number of matches, of
    segments found in vain and of those missed, float64 (K, 4) by class.

    found, labels: of merge_masks. A match is an IoU over 1/2 with a segment of the class; pixels
    without annotation count for none, and a segment that lies mostly there or in a crowd of its
    class is not in vain. Source: arXiv:1801.00868, Sec. 4, as in panopticapi.
    """
    # how many pixels each pair of segments shares
    ids, own = dataset.masks.segments(i)
    values, place = np.unique(np.append(ids.ravel(), [0, *own]), return_inverse=True)
    P, place = len(labels), place.ravel()
    pair = place[:ids.size] * (P + 1) + found.ravel()
    shared = np.bincount(pair, minlength=len(values) * (P + 1)).reshape(-1, P + 1)
    of_found = shared[:, 1:].sum(0)                                            # (P,) pixels
    nowhere = shared[np.searchsorted(values, 0), 1:]                           # (P,)
    shared = shared[np.searchsorted(values, own), 1:]                          # (G, P)

    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    truth, crowd, area = dataset.labels[rows], dataset.crowd[rows], dataset.area[rows]
    labels = np.array(labels, int)
    union = of_found + area[:, None] - shared - nowhere
    same = truth[:, None] == labels
    match = same & ~crowd[:, None] & (2 * shared > union)

    # the last crowd of a class stands for all, as in panopticapi
    ignored = nowhere.copy()
    for g in np.flatnonzero(crowd):
        ignored[same[g]] = (nowhere + shared[g])[same[g]]
    in_vain = ~match.any(0) & (2 * ignored <= of_found)
    missed = ~match.any(1) & ~crowd

    K, (g, p) = len(dataset.classes), np.nonzero(match)
    iou = shared[g, p] / union[g, p]
    return np.stack([np.bincount(truth[g], iou, K), np.bincount(truth[g], minlength=K),
                     np.bincount(labels[in_vain], minlength=K),
                     np.bincount(truth[missed], minlength=K)], 1)


def panoptic_quality(counts, things):
    """Panoptic quality and its factors: {"all": {"pq", "sq" (segmentation), "rq" (recognition), "n"
    (classes)}, "things": ..., "stuff": ...}, means over the classes that are there.

    counts (K, 4): panoptic_counts of all images, added up; things: bool of each class.
    Source: arXiv:1801.00868, Eq. 1 and 2.
    """
    iou, right, in_vain, missed = counts.T
    there, things = counts[:, 1:].sum(1) > 0, np.array(things)
    half = np.maximum(right + in_vain / 2 + missed / 2, 0.5)
    values = {"pq": iou / half, "sq": iou / np.maximum(right, 1), "rq": right / half}
    kinds = {"all": there, "things": there & things, "stuff": there & ~things}
    return {kind: {**{name: v[use].mean() if use.any() else 0.0 for name, v in values.items()},
                   "n": int(use.sum())} for kind, use in kinds.items()}


# -- evaluation ----------------------------------------------------------------------------------

def full_masks(logits, canvas, size, original_size):
    """The masks of one image in its original size, bool (n, *original_size), a numpy array.

    logits (n, H4, W4); canvas: height and width of the batch, with padding; size: of the image in
    it. As officially, bilinear to the canvas, then the nearest pixel.
    """
    y, x = (torch.from_numpy(nearest(np.arange(n), most)) for n, most in zip(size, original_size))
    masks = np.zeros((len(logits), *original_size), bool)
    for first in range(0, len(logits), 16):                         # which bounds the memory
        some = logits[first:first + 16, None].float()
        some = F.interpolate(some, size=canvas, mode="bilinear")[:, 0] > 0
        masks[first:first + 16] = some.cpu()[:, y][:, :, x]
    return masks


def mask_columns(edges, heights):
    """The columns of masks that evaluate_columns takes, from their edges; heights: of the images
    they are of."""
    column = np.empty(len(edges), object)
    column[:] = [*edges, None][:-1]
    boxes = np.array([mask_box(e, h) for e, h in zip(edges, heights)], np.float64).reshape(-1, 4)
    area = np.array([(e[1::2] - e[::2]).sum() for e in edges], np.float64)
    return {"mask": column, "box": boxes, "area": area}


def true_columns(dataset):
    """The ground truth with masks as evaluate_columns takes it, computed once."""
    if dataset.masks.columns is None:
        columns = dataset.columns()
        edges = [own for i in range(len(dataset)) for own in dataset.masks.edges(i)]
        shown = mask_columns(edges, dataset.sizes[columns["image"], 0])
        given = dataset.masks.areas()
        shown["area"] = np.where(np.isnan(given), shown["area"], given)
        dataset.masks.columns = {**columns, **shown}
    return dataset.masks.columns


def evaluate_masks(model, loader, device, dtype=torch.float32, losses_of=None):
    """evaluate() of a model with masks. Adds to the dict: "masks", for each detection a dict with
    its "segmentation" in COCO's compressed form; "segm", the evaluation of the masks; and on
    panoptic data "panoptic", the dict of panoptic_quality."""
    dataset, found_of_image = loader.dataset, {}
    panoptic = isinstance(dataset.masks, PanopticMasks)

    def rows_and_masks(outputs, targets, dataset):
        canvas = np.max([dataset.size_of(0, t["index"]) for t in targets], axis=0).tolist()
        for logits, masks, target in zip(outputs[0][-1], outputs[2], targets):
            i = target["index"]
            sizes = canvas, dataset.size_of(0, i), target["orig_size"]
            codes = [{"segmentation": mask_code(mask)} for mask in full_masks(masks, *sizes)]
            counts = None
            if panoptic:
                used, labels = panoptic_queries(logits)
                found = merge_masks(masks[used], labels[used].tolist(), dataset.things, *sizes)
                counts = panoptic_counts(dataset, i, *found)
            found_of_image[i] = codes, counts
        return detection_rows(outputs, targets, dataset)

    result = evaluate(model, loader, device, dtype, losses_of, rows_and_masks)
    for theirs in gather(found_of_image):
        found_of_image.update(theirs)

    # the detections in the order of rows: by image, then by query
    masks = [code for i in sorted(found_of_image) for code in found_of_image[i][0]]
    rows = result["rows"]
    image, category = rows[:, :2].long().T.numpy()
    edges = [mask_edges(mask["segmentation"], *mask["segmentation"]["size"]) for mask in masks]
    found = {"image": image, "category": category, "score": rows[:, 2].numpy(),
             **mask_columns(edges, dataset.sizes[image, 0])}
    segm = evaluate_columns(true_columns(dataset), found, len(dataset.classes))
    names = {name: result[name] for name in ("classes", "category_ids")}
    result |= {"masks": masks, "segm": {**segm, **names}}
    if panoptic:
        counts = sum(found_of_image[i][1] for i in sorted(found_of_image))
        result["panoptic"] = panoptic_quality(counts, dataset.things)
    return result


def segmentation_report(run, result, elapsed):
    """detection_report with the masks: the score is their AP."""
    _, entries = detection_report(run, result, elapsed)
    stats = result["segm"]["stats"].tolist()
    line = f"         masks: AP {stats[0]:.3f}  AP50 {stats[1]:.3f}  AP75 {stats[2]:.3f}"
    entries["test_coco_eval_masks"] = stats
    if "panoptic" in result:
        quality = result["panoptic"]
        line += f"  PQ {quality['all']['pq']:.3f}"
        entries |= {"test_PQ_all": quality["all"], "test_PQ_th": quality["things"],
                    "test_PQ_st": quality["stuff"]}
    say(run, line)
    return stats[0], entries


def print_masks(result):
    """Prints the numbers of the masks as those of the boxes, and the panoptic quality; returns them
    as a dict for json.dump."""
    segm, panoptic = result["segm"], result.get("panoptic", {})
    print("", "masks:", summary(segm), "", ap_table(segm), sep="\n")
    for kind, quality in panoptic.items():
        print(f"panoptic quality of {kind:6}  PQ {quality['pq']:.3f}  SQ {quality['sq']:.3f}  "
              f"RQ {quality['rq']:.3f}  on {quality['n']} classes")
    return {"segm": result_json(segm), "panoptic": panoptic}


def draw_mask_detections(result, dataset, threshold=0.7):
    """draw_detections with the masks."""
    def paint(image, places):
        places = places[::-1]                                        # the best on top
        names = [dataset.classes[int(k)] for k in result["rows"][places.copy(), 1]]
        codes, (w, h) = [result["masks"][k]["segmentation"] for k in places], image.size
        return draw_masks(image, [edge_pixels(mask_edges(c, h, w), h, w) for c in codes], names)
    return draw_detections(result, dataset, threshold, paint)


# -- prediction: python predict.py ---------------------------------------------------------------

def masks_over(model, pixels, original_size, threshold):
    """The outputs of a model for one image: logits, boxes, and of a model with masks those of the
    queries that score at least the threshold, {query: bool (h, w)}.

    pixels uint8 (1, 3, IH, IW).
    """
    chosen = []

    def confident(logits, boxes):
        scores = logits[-1].softmax(-1)[..., :-1].amax(-1)                     # (1, Q)
        chosen.extend((scores >= threshold).nonzero().T)
        return chosen

    logits, boxes, *masks = model(pixels, None, confident)
    if not masks:
        return logits, boxes, {}
    size = tuple(pixels.shape[2:])
    found = full_masks(masks[0], size, size, original_size)
    return logits, boxes, dict(zip(chosen[1].tolist(), found))


@torch.inference_mode()
def predict_panoptic(model, pixels, original_size, things, threshold=0.85):
    """merge_masks' result for one image, pixels uint8 (1, 3, IH, IW); things: bool by class."""
    chosen = []

    def confident(logits, boxes):
        used, labels = panoptic_queries(logits[-1], threshold)
        image, query = used.nonzero().T
        chosen.extend((image, query, labels[image, query]))
        return image, query

    masks, size = model(pixels, None, confident)[2], tuple(pixels.shape[2:])
    return merge_masks(masks, chosen[2].tolist(), things, size, size, original_size)


def panoptic_things(info):
    """Which classes of load_model's info are things: of panoptic data as annotated; of the official
    files ids up to 90; otherwise all."""
    if info.get("things"):
        return info["things"]
    return [bool(info["train"]) or k <= 90 for k in range(len(info["classes"]))]


class PanopticWriter:
    """Writes panoptic segmentations to the folder `out`, in COCO's format: a PNG file of segments
    for each image; and pictures to look at, *_panoptic.jpg.

    detector: of predict.py.
    """

    def __init__(self, detector, out):
        self.detector, self.info, self.out = detector, detector.info, out
        self.things, self.images, self.annotations = panoptic_things(self.info), [], []

    def add(self, path, image, written):
        """An image, PIL, and the path of its file; written: names in `out` that are not to be
        written over, to which those of the image are added."""
        pixels = self.detector.pixels(image)
        ids, labels = predict_panoptic(self.detector.model, pixels, image.size[::-1], self.things,
                                       self.detector.threshold)
        names = [self.info["classes"][k] or f"class {k}" for k in labels]
        first = f"{os.path.splitext(os.path.basename(path))[0]}_panoptic"
        stem, n = first, 2
        while {f"{stem}.png", f"{stem}.jpg"} & written:
            stem, n = f"{first}_{n}", n + 1
        written |= {f"{stem}.png", f"{stem}.jpg"}

        colors = np.stack([ids >> 8 * k & 255 for k in range(3)], 2).astype(np.uint8)
        with writing(os.path.join(self.out, stem)):
            Image.fromarray(colors).save(os.path.join(self.out, f"{stem}.png"))
        masks = [ids == k for k in range(1, len(labels) + 1)]
        boxes = [mask_box(pixel_edges(mask), len(mask)) for mask in masks]
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        drawn = draw_boxes(draw_masks(image, masks, names), corners, names)
        with writing(os.path.join(self.out, stem)):
            drawn.save(os.path.join(self.out, f"{stem}.jpg"), quality=92)

        self.images.append({"id": len(self.images) + 1, "file_name": path, "width": image.width,
                            "height": image.height})
        segments = [{"id": n, "category_id": self.info["category_ids"][k], "iscrowd": 0,
                     "isthing": int(self.things[k]), "area": int(mask.sum()),
                     "bbox": [int(v) for v in box]}
                    for n, (k, mask, box) in enumerate(zip(labels, masks, boxes), 1)]
        self.annotations.append({"image_id": len(self.images), "file_name": f"{stem}.png",
                                 "segments_info": segments})
        print(f"{path}: {', '.join(names) or 'nothing'}")

    def contents(self):
        """Those of panoptic.json, for json.dump."""
        categories = [{"id": id_, "name": name, "isthing": int(thing)} for id_, name, thing in
                      zip(self.info["category_ids"], self.info["classes"], self.things) if name]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}
