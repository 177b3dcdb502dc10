"""Data: boxes, augmentation, COCO and generated data sets, batches.

    dataset = CocoDataset("annotations/instances_val2017.json", "val2017")
    dataset = ShapesDataset("train")                                   # no files, no download
    image, target = dataset[0]                                         # uint8 (3, H, W), dict
    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, 8), collate_fn=collate)

    python data.py DIR [--images] [--to coco.json] [--draw 16]     # check, convert, draw a data set

Targets are dicts: "labels" (T,) int64 contiguous class indices, "boxes" (T, 4) float32 cxcywh in
[0, 1] of the unpadded image, "index" (position in the data set), "orig_size" (height, width).
Papers: COCO, arXiv:1405.0312; DETR, arXiv:2005.12872, Appendix A.4 (augmentation).
"""

import os
import random
from collections import namedtuple
from itertools import islice

import numpy as np
from PIL import Image
import torch

from images import read_image, resized
from scenes import SCENES, draw_scene
from coco_eval import UserError
from check_data import (cached_arrays, check_coco, coco_faults, describe_boxes, file_faults,
                        read_instances, refuse)
from formats import data_paths
from classification import ImageFolder, ShapesClassification


# -- boxes ---------------------------------------------------------------------------------------

def cxcywh_to_xyxy(boxes):
    """Centre and size to corners; boxes (..., 4), any unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], -1)


def xyxy_to_cxcywh(boxes):
    """Corners to centre and size; boxes (..., 4), any unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)


def iou_and_giou(a, b):
    """IoU and generalised IoU of boxes a and b, element by element, with broadcasting.

    a, b (..., 4) xyxy in the same unit, x2 >= x1 and y2 >= y1. Returns two tensors (...).
    Boxes without area have IoU 0 and no NaN, also not in the gradient.
    Source: generalised IoU, arXiv:1902.09630, Algorithm 1.
    """
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])

    # intersection and union
    wh = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    wh = wh.clamp(min=0)                                             # 0 where they are apart
    inter = wh[..., 0] * wh[..., 1]
    union = area_a + area_b - inter

    # the smallest box around both
    wh = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = wh[..., 0] * wh[..., 1]

    eps = 1e-12                                    # of boxes in [0, 1]: sides of a millionth
    iou = inter / union.clamp(min=eps)
    return iou, iou - (hull - union) / hull.clamp(min=eps)


def box_iou(a, b):
    """IoU of every box in a (..., N, 4) with every box in b (..., M, 4), xyxy: (..., N, M)."""
    return iou_and_giou(a[..., :, None, :], b[..., None, :, :])[0]


def generalized_box_iou(a, b):
    """Generalised IoU in [-1, 1] of every box in a (..., N, 4) with every one in b (..., M, 4)."""
    return iou_and_giou(a[..., :, None, :], b[..., None, :, :])[1]


# -- augmentation --------------------------------------------------------------------------------

# The steps that change an image, in this order: flip (bool), resize to `resize_before_crop` (h, w),
# crop (top, left, h, w), resize to `size` (h, w); None leaves a step out. A plan follows from seed,
# epoch, index and image size, so that the sampler knows every final shape and opens no file.
Plan = namedtuple("Plan", "flip resize_before_crop crop size")


def plan_validation(h, w, image_size, max_size):
    """The official validation transform: shorter side `image_size`, longer at most `max_size`."""
    return Plan(False, None, None, resized(h, w, image_size, max_size))


def plan_training(h, w, image_size, max_size, rng):
    """The official training augmentation, drawn from `rng` (random.Random).

    For image_size 800: flip with probability 1/2; then, with 1/2, resize the shorter side to 400,
    500 or 600 and crop 384 to 600 pixels a side; in any case, resize the shorter side to one of
    480, 512, ..., 800. Other values of image_size scale all these numbers.
    Source: DETR, Appendix A.4.
    """
    def scaled(v):
        return max(1, round(v * image_size / 800))

    flip, resize_before_crop, crop = rng.random() < 0.5, None, None

    # resize and crop, unless the image is very long and thin, as its longer side would get huge
    if rng.random() < 0.5 and max(h, w) <= 20 * min(h, w):
        resize_before_crop = resized(h, w, scaled(rng.choice((400, 500, 600))))
        h, w = resize_before_crop
        crop_h = rng.randint(scaled(384), min(h, scaled(600)))
        crop_w = rng.randint(scaled(384), min(w, scaled(600)))
        crop = rng.randint(0, h - crop_h), rng.randint(0, w - crop_w), crop_h, crop_w
        h, w = crop_h, crop_w

    side = scaled(rng.choice(range(480, 801, 32)))
    return Plan(flip, resize_before_crop, crop, resized(h, w, side, max_size))


def plan_light(h, w, image_size, max_size, rng):
    """A milder one, for small data sets: flip, crop to 0.8 to 1 of both sides, resize to 0.8 to 1
    of image_size, so that objects have 0.8 to 1.25 of their size in validation."""
    flip, share, scale = rng.random() < 0.5, rng.uniform(0.8, 1), rng.choice((0.8, 0.9, 1))
    crop_h, crop_w = round(share * h), round(share * w)
    crop = rng.randint(0, h - crop_h), rng.randint(0, w - crop_w), crop_h, crop_w
    return Plan(flip, None, crop, resized(h, w, round(scale * image_size), max_size))


def resize(image, boxes, size):
    """PIL image and pixel boxes (T, 4), resized to (height, width), bilinear with antialiasing."""
    if (image.height, image.width) == tuple(size):
        return image, boxes
    sy, sx = size[0] / image.height, size[1] / image.width
    image = image.resize(size[::-1], Image.Resampling.BILINEAR)      # PIL: (width, height)
    return image, boxes * np.float32([sx, sy, sx, sy])


def apply_plan(image, boxes, rows, plan):
    """Carries out `plan` on a PIL image and its boxes (T, 4) float32 xyxy in pixels.

    Boxes are clipped to the crop; those without area inside it are dropped, and of rows (T,), which
    has something of each, such as its number or label.
    """
    if plan.flip:                                                    # x becomes width - x
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x1, y1, x2, y2 = boxes.T
        boxes = np.stack([image.width - x2, y1, image.width - x1, y2], 1)

    if plan.resize_before_crop:
        image, boxes = resize(image, boxes, plan.resize_before_crop)

    if plan.crop:
        top, left, h, w = plan.crop
        image = image.crop((left, top, left + w, top + h))
        boxes = (boxes - np.float32([left, top, left, top])).clip(0, np.float32([w, h, w, h]))
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, rows = boxes[has_area], rows[has_area]

    image, boxes = resize(image, boxes, plan.size)
    return image, boxes, rows


# -- data sets -----------------------------------------------------------------------------------

class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes. A subclass fills these ten fields and image_dir, or reads by itself.

    classes, category_ids   lists of the K names of the labels, and of their ids in the annotations
    image_ids, files        (N,) ids, and names below image_dir, str or bytes
    sizes                   (N, 2) height and width in pixels
    offsets                 (N + 1,) image i has the rows offsets[i]:offsets[i + 1] of the others:
    boxes, area             (M, 4) xywh in pixels, as annotated, and (M,), float64
    labels, crowd           (M,) int64 index into classes, and bool

    Numpy arrays, not Python objects, are memory that loader workers share.
    """

    def __init__(self, image_size, max_size, augment, seed):
        self.image_size, self.max_size = image_size, max_size
        self.augment, self.seed = augment, seed    # augment: True, False or "light"
        self.source = ""                           # the annotations, as messages call them
        self.notes = []                            # lines that a run prints at its start
        self.missing = []                          # classes that the annotations lack
        self.masks = None                          # of segmentation.py, with --masks

    def __len__(self):
        return len(self.image_ids)

    def plan(self, epoch, i):
        """The Plan of image i in an epoch: a pure function of (seed, epoch, i)."""
        given = *self.sizes[i].tolist(), self.image_size, self.max_size
        if not self.augment:
            return plan_validation(*given)
        draw_plan = plan_light if self.augment == "light" else plan_training
        return draw_plan(*given, random.Random(f"{self.seed} {epoch} {i}"))

    def size_of(self, epoch, i):
        """(height, width) of image i in an epoch, as the network gets it; no file is opened."""
        return self.plan(epoch, i).size

    def clipped(self, rows, images):
        """The boxes of some rows, float32 xyxy in pixels, clipped to their images: the index of the
        one image of all, or one for each row."""
        boxes = self.boxes[rows].astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]                                 # width, height to x2, y2
        whwh = self.sizes[images][..., [1, 0, 1, 0]]
        return boxes.clip(0, whwh.astype(np.float32))

    def trained_rows(self, i):
        """The rows (T,) of image i to train on: no crowds, no boxes without area after clipping."""
        rows = np.arange(self.offsets[i], self.offsets[i + 1])
        boxes = self.clipped(rows, i)
        return rows[~self.crowd[rows] & (boxes[:, 2:] > boxes[:, :2]).all(1)]

    def objects(self, i):
        """Clipped boxes (T, 4) float32 xyxy in pixels and labels (T,) of trained_rows."""
        rows = self.trained_rows(i)
        return self.clipped(rows, i), self.labels[rows]

    def path(self, i):
        return os.path.join(self.image_dir, os.fsdecode(self.files[i]))

    def read(self, i):
        """Image i as an RGB PIL image."""
        return read_image(self.path(i), self.sizes[i].tolist(), f" (image id {self.image_ids[i]})")

    def __getitem__(self, key):
        """Image uint8 (3, H, W) and target; key is an index or (epoch, index)."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        plan, rows = self.plan(epoch, i), self.trained_rows(i)
        image, boxes, rows = apply_plan(self.read(i), self.clipped(rows, i), rows, plan)

        h, w = plan.size                                             # boxes to cxcywh in [0, 1]
        boxes = xyxy_to_cxcywh(torch.from_numpy(boxes)) / torch.tensor([w, h, w, h])
        target = {"labels": torch.from_numpy(self.labels[rows]), "boxes": boxes, "index": i,
                  "orig_size": tuple(self.sizes[i].tolist())}
        if self.masks:
            target["masks"] = self.masks.of_plan(i, rows, plan)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), target         # (3, H, W)

    def columns(self):
        """The ground truth as evaluate_columns takes it; image is the index in this data set."""
        image = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return {"image": image, "category": self.labels, "box": self.boxes, "area": self.area,
                "crowd": self.crowd}

    def keep_only(self, n):
        """Drops all but the first n images that have objects, in place; returns the data set."""
        images = list(islice((i for i in range(len(self)) if len(self.trained_rows(i))), n))
        if len(images) < n:
            raise UserError(f"--overfit {n}: only {len(images)} of {len(self)} images have objects")

        # their boxes, and where those of each image begin
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        self.offsets = np.cumsum([0] + [len(r) for r in rows])
        for name in ("image_ids", "files", "sizes"):
            setattr(self, name, getattr(self, name)[images])
        for name in ("boxes", "area", "labels", "crowd"):
            setattr(self, name, getattr(self, name)[np.concatenate(rows)])
        return self


# of check_data.py: coco_faults and file_faults list what is wrong, refuse raises where there is
# something, cached_arrays keeps the arrays of a large file on disk, describe_boxes counts

def read_coco(json_path, image_dir):
    """The arrays of DetectionDataset by name, from a COCO instances file or the Labels of another
    format; instead of classes and labels, category_names (K,), and categories (M,), which are
    indices into it. Images and categories by ascending id. Raises UserError that lists all faults
    of file and folder."""
    data = read_instances(json_path)
    refuse(json_path, coco_faults(data, json_path, image_dir))
    images = sorted(data["images"], key=lambda r: r["id"])
    categories = sorted(data["categories"], key=lambda r: r["id"])
    annotations = data["annotations"]

    # annotations by image; those of one image in the order of the file
    image_index = {r["id"]: i for i, r in enumerate(images)}
    image = np.array([image_index[r["image_id"]] for r in annotations], np.int64)
    order = np.argsort(image, kind="stable")

    # the fields of the annotations, in the order of the file
    category_index = {r["id"]: k for k, r in enumerate(categories)}
    category = [category_index[r["category_id"]] for r in annotations]
    area = [r["bbox"][2] * r["bbox"][3] if r.get("area") is None else r["area"]
            for r in annotations]
    boxes = np.array([r["bbox"] for r in annotations], np.float64).reshape(-1, 4)
    crowd = [bool(r.get("iscrowd")) for r in annotations]
    return {
        "category_names": np.array([r["name"] for r in categories]),
        "category_ids": np.array([r["id"] for r in categories]),
        "image_ids": np.array([r["id"] for r in images]),
        "files": np.array([os.fsencode(r["file_name"]) for r in images]),
        "sizes": np.array([(r["height"], r["width"]) for r in images]),
        "offsets": np.searchsorted(image[order], np.arange(len(images) + 1)),
        "boxes": boxes[order],                                       # sorted by image, like offsets
        "area": np.array(area, np.float64)[order],
        "categories": np.array(category, np.int64)[order],
        "crowd": np.array(crowd, bool)[order]}


class CocoDataset(DetectionDataset):
    """A COCO instances file, or the Labels of another format (formats.py), and its image folder.

    classes: names in the order wanted for the labels, those of the training set or of a checkpoint;
    None: the file's own, by ascending category id. Raises UserFileError for a missing file or
    folder, UserError that lists the faults of the data, or categories that `classes` lacks.
    """

    def __init__(self, json_path, image_dir, image_size=800, max_size=1333, augment=False, seed=42,
                 classes=None):
        super().__init__(image_size, max_size, augment, seed)
        self.json_path, self.source, self.image_dir = json_path, str(json_path), str(image_dir)
        self.format_name = getattr(json_path, "format_name", "COCO")

        # a large file is read once, then mapped from a cache; the images are looked for each time
        arrays = cached_arrays(self.source, lambda: read_coco(json_path, image_dir))
        for name in ("image_ids", "files", "sizes", "offsets", "boxes", "area", "crowd"):
            setattr(self, name, arrays[name])
        names = [os.fsdecode(name) for name in self.files.tolist()]
        refuse(json_path, file_faults(json_path, self.image_ids.tolist(), names, image_dir))

        # labels are indices into `classes`
        ids = dict(zip(arrays["category_names"].tolist(), arrays["category_ids"].tolist()))
        self.classes = list(ids) if classes is None else list(classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in ids if name not in label_of]
        if unknown:
            raise UserError(f"{json_path} has categories that the model was not trained on: "
                            f"{unknown[:20]}; it knows {[c for c in self.classes if c][:20]}")
        self.missing = [name for name in self.classes if name and name not in ids]
        self.category_ids = [ids.get(name) for name in self.classes]  # None: not in this file
        self.labels = np.array([label_of[name] for name in ids])[arrays["categories"]]
        self.notes = [*describe_boxes(self), *getattr(json_path, "notes", [])]


class ShapesDataset(DetectionDataset):
    """Generated images of rectangles, ellipses and triangles: nothing to download.

    split: "train" or "val", which differ in every image; n: how many images; side: of the square
    images, in pixels; scenes: what lies where, "plain" or another of scenes.py. The ground is
    plain, shaded, striped or noisy. Image i is a pure function of (split, i, side, scenes), drawn
    each time it is read.
    """

    def __init__(self, split="train", n=8000, side=64, augment=False, seed=42, scenes="plain"):
        super().__init__(side, None, augment, seed)
        self.split, self.side = split, side
        names, self.make_scene = SCENES[scenes]
        self.classes, self.category_ids = list(names), list(range(1, len(names) + 1))
        self.image_ids, self.files = np.arange(1, n + 1), np.arange(n)
        self.sizes = np.full((n, 2), side)

        # the objects of all images in a row: (label, xywh, what is drawn)
        drawn = [self._scene(i)[2] for i in range(n)]
        objects = [o for scene in drawn for o in scene]
        self.offsets = np.cumsum([0] + [len(scene) for scene in drawn])
        self.boxes = np.array([o[1] for o in objects], np.float64)
        self.area = self.boxes[:, 2] * self.boxes[:, 3]
        self.labels = np.array([o[0] for o in objects], np.int64)
        self.crowd = np.zeros(len(objects), bool)

    def _scene(self, i):
        """Random state, the two ground colours, and the objects back to front."""
        rng = random.Random(f"shapes {self.split} {i} {self.side}")
        return rng, *self.make_scene(rng, self.side)

    def read(self, i):
        """Image i as an RGB PIL image."""
        return draw_scene(*self._scene(self.files[i]), self.side)    # not i: see keep_only


# -- batches -------------------------------------------------------------------------------------

class Target(dict):
    """A target that is pickled by value. torch would otherwise send each tensor from a loader's
    worker through shared memory: one open file and 0.3 ms apiece, and open files are limited."""

    def __reduce__(self):
        return Target.from_arrays, ({k: v.numpy() if isinstance(v, torch.Tensor) else v
                                     for k, v in self.items()},)

    @staticmethod
    def from_arrays(arrays):
        return Target({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                       for k, v in arrays.items()})


def collate(samples):
    """A batch: images padded right and below with zeros to one size, valid, and targets.

    samples: list of (uint8 (3, H, W), target). Returns images uint8 (B, 3, IH, IW) in memory as
    (B, IH, IW, 3), valid bool (B, IH, IW), True = image, and the list of targets.
    """
    B = len(samples)
    IH = max(image.shape[1] for image, _ in samples)
    IW = max(image.shape[2] for image, _ in samples)
    # channels last, as decoders give pixels and convolutions want them: rows are copied whole
    images = torch.zeros(B, IH, IW, 3, dtype=samples[0][0].dtype).permute(0, 3, 1, 2)
    valid = torch.zeros(B, IH, IW, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        _, h, w = image.shape
        images[k, :, :h, :w] = image
        valid[k, :h, :w] = True
    return images, valid, [Target(target) for _, target in samples]


def to_device(images, valid, device):
    """A batch on the device; valid is None without padding, so that attention needs no mask."""
    padded = not valid.all()                       # on the CPU, where it waits for no device
    images = images.to(device, non_blocking=images.is_pinned())      # pinned: the host goes on
    return images, valid.to(device, non_blocking=valid.is_pinned()) if padded else None


def sort_by_shape(shapes, batch_size):
    """Order of `shapes` (N, 2) in which batches of neighbours need little padding.

    Splits the images in two, by height or by width, at the cut with the smallest padded area, and
    goes on with both parts until each is one batch.
    """
    shapes, order, todo = np.asarray(shapes), [], [np.arange(len(shapes))]
    while todo:
        rows = todo.pop()
        cuts = np.arange(batch_size, len(rows), batch_size)          # between whole batches
        if not len(cuts) or (shapes[rows] == shapes[rows[0]]).all():
            order.append(rows)
            continue

        # by height and by width: (padded area, order, cut) of the best cut
        best = []
        for side in (0, 1):
            by_side = rows[np.argsort(shapes[rows, side], kind="stable")]
            ordered = shapes[by_side]
            before = np.maximum.accumulate(ordered)[cuts - 1]        # largest (h, w) of each part
            after = np.maximum.accumulate(ordered[::-1])[::-1][cuts]
            areas = before.prod(1) * cuts + after.prod(1) * (len(rows) - cuts)
            best.append((areas.min(), by_side, cuts[areas.argmin()]))
        _, by_side, cut = min(best, key=lambda b: b[0])
        todo += [by_side[cut:], by_side[:cut]]                       # the last one is next
    return np.concatenate(order)


class TrainSampler:
    """Batches of keys (epoch, index) for one rank: a pure function of (seed, epoch, rank).

    Every step takes batch_size images over all ranks and accumulated parts; the images of a step
    are the same for any number of ranks. An incomplete last step is dropped; which images it holds
    changes every epoch. set_epoch says where to (re)start.
    group_by_shape: a step's images are alike in shape. The largest step is the first, so that
    running out of memory shows at once (one rank's part of a later step can still be larger).
    repeats: passes in an epoch, for --overfit. The images of a step are of one pass: batch_size
    different ones, or all where there are fewer, some of them more than once.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world=1, accumulate=1,
                 group_by_shape=True, repeats=1):
        if batch_size % (world * accumulate):
            raise UserError(f"--batch_size {batch_size} (images per step over all processes) is "
                            f"not a multiple of {world} processes x --accumulate {accumulate}")
        if len(dataset) < batch_size and repeats == 1:
            raise UserError(f"the training set has {len(dataset)} images, fewer than --batch_size "
                            f"{batch_size}: lower it to at most that")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.repeats, self.steps = repeats, repeats * max(1, len(dataset) // batch_size)
        # a window of several passes would bring the copies of an image into one batch
        self.group_by_shape = group_by_shape and repeats == 1
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self):
        # all images of the epoch, in the order of the steps
        rng = np.random.default_rng((self.seed, self.epoch))
        per_pass = self.steps // self.repeats * self.batch_size
        passes = [np.resize(rng.permutation(len(self.dataset)), per_pass)      # cut, or repeated
                  for _ in range(self.repeats)]
        order = np.concatenate(passes)
        if self.group_by_shape:
            order = self._grouped(order, rng)

        # this rank's parts of each step: (steps, world, accumulate, images)
        steps = order.reshape(self.steps, self.world, self.accumulate, -1)
        for step in steps[self.first_step:]:
            for part in step[self.rank]:
                yield [(self.epoch, i) for i in part.tolist()]

    def _grouped(self, order, rng):
        """The order, each window of 32 steps sorted into batches of like shape, and shuffled."""
        shapes = np.array([self.dataset.size_of(self.epoch, i) for i in order.tolist()])
        window, batches = 32 * self.batch_size, []
        for start in range(0, len(order), window):
            rows = start + sort_by_shape(shapes[start:start + window], self.batch_size)
            in_window = rows.reshape(-1, self.batch_size)
            batches += list(in_window[rng.permutation(len(in_window))])

        # the largest batch first
        height_width = shapes[np.array(batches)].max(1)              # (steps, 2) with padding
        largest = np.argmax(height_width.prod(1))
        batches[0], batches[largest] = batches[largest], batches[0]
        return order[np.concatenate(batches)]


class EvalSampler(list):
    """Batches of indices, images of like shape together, each image on exactly one rank.

    The batches do not depend on the number of ranks, hence neither do the detections.
    """

    def __init__(self, dataset, batch_size, rank=0, world=1):
        shapes = [dataset.size_of(0, i) for i in range(len(dataset))]
        order = sort_by_shape(shapes, batch_size).tolist()
        batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        super().__init__(batches[rank::world])


# -- which data set ------------------------------------------------------------------------------

def build_dataset(cfg, split, classes=None, crop_fraction=1.0, masks=False):
    """The data set of a run's options: the one place that decides which it is.

    cfg: a TrainConfig; split: "train" or "val", with --overfit both of the same N training images;
    classes: their names in the order of the labels, None: the data set's own; crop_fraction: of a
    classifier's centre crop; masks: of a detector, whether they are read, too.
    """
    augment = cfg.augment if split == "train" else False
    source = "train" if cfg.overfit else split

    if cfg.kind == "coco":
        dataset = CocoDataset(*data_paths(cfg, source), cfg.image_size, cfg.max_size, augment,
                              cfg.seed, classes)
    elif cfg.kind == "image_folder":
        dataset = ImageFolder(cfg.data, source, cfg.image_size, crop_fraction, augment, cfg.seed,
                              classes)
    else:
        n = cfg.train_shapes if source == "train" else cfg.val_shapes
        options = source, n, cfg.image_size, augment, cfg.seed
        kind = ShapesDataset if cfg.kind == "shapes" else ShapesClassification
        dataset = kind(*options, cfg.scenes)
    if masks:
        from segmentation import add_masks         # here, as that file imports this one
        add_masks(dataset)
    return dataset.keep_only(cfg.overfit) if cfg.overfit else dataset


if __name__ == "__main__":                         # python data.py DIR: the check of a data set
    import check_data
    check_data.command()
