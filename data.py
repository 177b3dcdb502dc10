"""Data: box formats and overlaps, COCO and generated data sets, augmentation, batches.

    dataset = CocoDataset("annotations/instances_val2017.json", "val2017")
    dataset = ShapesDataset("train")                                   # no files, no download
    image, target = dataset[0]                                         # uint8 (3, H, W), dict
    dataset = ImageFolder("imagenet", "val")               # imagenet/val/<class>/*.jpg: classifiers
    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, 8), collate_fn=collate)

    python data.py DIR [--images]                          # check a data set, and print a summary
    python data.py TRAIN_JSON TRAIN_IMAGES VAL_JSON VAL_IMAGES

Targets are dicts: "labels" (T,) int64 contiguous class indices, "boxes" (T, 4) float32 cxcywh in
[0, 1] of the unpadded image, "index" (position in the data set), "orig_size" (height, width).
Those of classifiers are "labels" (1,) and "index".
Papers: COCO, arXiv:1405.0312; DETR, arXiv:2005.12872, Appendix A.4 (augmentation); MetaFormer,
arXiv:2111.11418, Sec. 4.1 (augmentation of classifiers).
"""

import os
import random
from collections import namedtuple

import numpy as np
from PIL import Image
import torch

from images import draw_ground, draw_shape, ground_colors, read_image, resized
from coco_eval import UserError, UserFileError, read_json
from check_data import check_coco, without_faults
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
    wh = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    wh = wh.clamp(min=0)
    inter = wh[..., 0] * wh[..., 1]
    union = area_a + area_b - inter
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = hull[..., 0] * hull[..., 1]
    eps = 1e-12                                  # a box of one millionth of the image's side
    iou = inter / union.clamp(min=eps)
    return iou, iou - (hull - union) / hull.clamp(min=eps)


def box_iou(a, b):
    """IoU of every box in a (..., N, 4) with every box in b (..., M, 4), xyxy: (..., N, M)."""
    return iou_and_giou(a[..., :, None, :], b[..., None, :, :])[0]


def generalized_box_iou(a, b):
    """Generalised IoU in [-1, 1] of every box in a (..., N, 4) with every one in b (..., M, 4)."""
    return iou_and_giou(a[..., :, None, :], b[..., None, :, :])[1]


# -- augmentation --------------------------------------------------------------------------------

# What is done to an image: flip (bool), resize to `first` (h, w), crop (top, left, h, w), resize to
# `size` (h, w); None leaves a step out. Drawn from the sizes alone, so that the sampler knows every
# image's final shape without opening a file.
Plan = namedtuple("Plan", "flip first crop size")


def plan_validation(h, w, image_size, max_size):
    """The official validation transform: shorter side `image_size`, longer at most `max_size`."""
    return Plan(False, None, None, resized(h, w, image_size, max_size))


def plan_training(h, w, image_size, max_size, rng):
    """The official training augmentation, drawn from `rng` (random.Random).

    For image_size 800: flip with 1/2; then with 1/2 resize the shorter side to one of 480, 512,
    ..., 800, else resize it to 400, 500 or 600, crop 384 to 600 pixels a side, and resize as
    before. Other values of image_size scale all these numbers. Source: DETR, Appendix A.4.
    """
    def scaled(v):
        return max(1, round(v * image_size / 800))
    flip, first, crop = rng.random() < 0.5, None, None
    if rng.random() < 0.5 and max(h, w) <= 20 * min(h, w):           # a line would get huge first
        h, w = first = resized(h, w, scaled(rng.choice((400, 500, 600))))
        ch, cw = (rng.randint(scaled(384), min(side, scaled(600))) for side in (h, w))
        crop = rng.randint(0, h - ch), rng.randint(0, w - cw), ch, cw
        h, w = ch, cw
    return Plan(flip, first, crop, resized(h, w, scaled(rng.choice(range(480, 801, 32))), max_size))


def apply_plan(image, boxes, labels, plan):
    """Carry out `plan` on a PIL image, its boxes (T, 4) float32 xyxy in pixels, and their labels.

    Boxes are clipped to the crop; those left without area go, and their labels with them.
    """
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32(
            [image.width, 0, image.width, 0])
    if plan.first:
        image, boxes = resize(image, boxes, plan.first)
    if plan.crop:
        top, left, h, w = plan.crop
        image = image.crop((left, top, left + w, top + h))
        boxes = (boxes - np.float32([left, top, left, top])).clip(0, np.float32([w, h, w, h]))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, labels = boxes[keep], labels[keep]
    image, boxes = resize(image, boxes, plan.size)
    return image, boxes, labels


def resize(image, boxes, size):
    """PIL image and pixel boxes (T, 4), resized to (height, width), bilinear with antialiasing."""
    if (image.height, image.width) == tuple(size):
        return image, boxes
    sy, sx = size[0] / image.height, size[1] / image.width
    return image.resize(size[::-1], Image.Resampling.BILINEAR), boxes * np.float32([sx, sy, sx, sy])


class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes; a subclass fills the arrays and says how image i is read.

    Everything lies in numpy arrays, not in Python objects, so that loader workers share the
    memory. Images are in ascending order of their ids.

    classes: K names; category_ids: their K original ids
    image_ids (N,), sizes (N, 2) (height, width); annotations of image i: offsets[i]:offsets[i + 1]
    boxes (M, 4) float64 xywh in pixels as annotated, labels (M,) class index, area (M,), crowd (M,)
    """

    def __init__(self, image_size, max_size, augment, seed):
        self.image_size, self.max_size = image_size, max_size
        self.augment, self.seed, self.notes = augment, seed, []

    def __len__(self):
        return len(self.image_ids)

    def plan(self, epoch, i):
        """The Plan of image i in an epoch: a pure function of (seed, epoch, i)."""
        h, w = self.sizes[i].tolist()
        if not self.augment:
            return plan_validation(h, w, self.image_size, self.max_size)
        rng = random.Random(f"{self.seed} {epoch} {i}")
        return plan_training(h, w, self.image_size, self.max_size, rng)

    def size_of(self, epoch, i):
        """(height, width) of image i in an epoch, as the network gets it; no file is opened."""
        return self.plan(epoch, i).size

    def objects(self, i):
        """Boxes (T, 4) float32 xyxy in pixels and labels (T,) to train on: without crowd, clipped
        to the image, without boxes that have no area then, as in the official code."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        boxes = self.clipped(rows, i)
        keep = ~self.crowd[rows] & (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[keep], self.labels[rows][keep]

    def clipped(self, rows, images):
        """The boxes of some rows, float32 xyxy in pixels, clipped to their images."""
        boxes = self.boxes[rows].astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        return boxes.clip(0, self.sizes[images][..., [1, 0, 1, 0]].astype(np.float32))

    def __getitem__(self, key):
        """Image uint8 (3, H, W) and target; key is an index or (epoch, index)."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        plan = self.plan(epoch, i)
        image, boxes, labels = apply_plan(self.read(i), *self.objects(i), plan)
        h, w = plan.size
        boxes = xyxy_to_cxcywh(torch.from_numpy(boxes)) / torch.tensor([w, h, w, h])
        target = {"labels": torch.from_numpy(labels), "boxes": boxes, "index": i,
                  "orig_size": tuple(self.sizes[i].tolist())}
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), target

    def columns(self):
        """The ground truth as evaluate_columns takes it; image is the index in this data set."""
        image = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return {"image": image, "category": self.labels, "box": self.boxes, "area": self.area,
                "crowd": self.crowd}

    def keep(self, n):
        """Keep only the first n images that have objects."""
        has = [i for i in range(len(self)) if len(self.objects(i)[0])][:n]
        if len(has) < n:
            raise UserError(f"--overfit {n}: only {len(has)} of the {len(self)} images have "
                            f"objects")
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in has]
        counts = [len(r) for r in rows]
        for name in ("image_ids", "sizes", "files"):
            setattr(self, name, getattr(self, name)[has])
        for name in ("boxes", "labels", "area", "crowd"):
            setattr(self, name, getattr(self, name)[np.concatenate(rows)])
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        return self


class CocoDataset(DetectionDataset):
    """A COCO instances file and its image folder.

    json_path, image_dir: the two paths; classes: names in the order wanted for the labels (those of
    the training set or of a checkpoint), None: the file's own, by ascending category id. Raises
    FileNotFoundError, and ValueError that lists the faults found in the file (the first 20 and the
    count), or the classes that differ. With sound_part, records with faults and what refers to them
    are left out instead, and `faults` lists all of them.
    """

    def __init__(self, json_path, image_dir, image_size=800, max_size=1333, augment=False, seed=42,
                 classes=None, sound_part=False):
        super().__init__(image_size, max_size, augment, seed)
        data = read_json(json_path, "a COCO instances file")
        if not os.path.isdir(image_dir):
            raise UserFileError(f"image folder {image_dir} not found: it should hold the "
                                f"images that {json_path} lists")
        data, faults = without_faults(data, json_path, image_dir)
        if faults and not (data and sound_part):
            shown = len(faults) if sound_part else 20
            more = f"\n... and {len(faults) - shown} more" if len(faults) > shown else ""
            raise UserError(f"{json_path} has {len(faults)} fault(s), mend the file:\n"
                            + "\n".join(faults[:shown]) + more)
        self.faults, self.json_path, self.image_dir = faults, str(json_path), str(image_dir)
        index = self._read_categories(data["categories"], classes)
        images = sorted(data["images"], key=lambda r: r["id"])
        self.image_ids = np.array([r["id"] for r in images])
        self.sizes = np.array([(r["height"], r["width"]) for r in images])
        self.files = np.array([r["file_name"].encode() for r in images])
        self._read_annotations(data["annotations"], index)
        self.notes = self._describe_boxes()

    def _read_categories(self, categories, classes):
        """Sets classes and category_ids; returns {category id: class index}."""
        ids = {r["name"]: r["id"] for r in sorted(categories, key=lambda r: r["id"])}
        self.classes = list(ids) if classes is None else list(classes)
        self.missing = [name for name in self.classes if name and name not in ids]
        unknown = [name for name in ids if name not in self.classes]
        if unknown:
            raise UserError(f"{self.json_path} has categories that the model was not trained on: "
                            f"{unknown[:20]}; it knows {[c for c in self.classes if c][:20]}")
        self.category_ids = [ids.get(name) for name in self.classes]  # None: not in this file
        return {ids[name]: self.classes.index(name) for name in ids}

    def _read_annotations(self, annotations, index):
        row = {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}
        image = np.array([row[a["image_id"]] for a in annotations], np.int64)
        order = np.argsort(image, kind="stable")                     # file order within an image
        self.offsets = np.searchsorted(image[order], np.arange(len(row) + 1))
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        area = [a["bbox"][2] * a["bbox"][3] if a.get("area") is None else a["area"]
                for a in annotations]
        self.boxes, self.area = boxes[order], np.array(area, np.float64)[order]
        self.labels = np.array([index[a["category_id"]] for a in annotations], np.int64)[order]
        self.crowd = np.array([bool(a.get("iscrowd")) for a in annotations], bool)[order]

    def _describe_boxes(self):
        """Lines for a run's banner: which boxes are not trained on, and what looks wrong."""
        image = self.columns()["image"]
        h, w = self.sizes[image].T
        x2, y2 = (self.boxes[:, :2] + self.boxes[:, 2:]).T
        boxes = self.clipped(slice(None), image)
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        over = (x2 > w + 2) | (y2 > h + 2)
        lines = [f"         {len(image)} boxes; not trained on: {self.crowd.sum()} crowds, "
                 f"{empty.sum()} without area inside the image"]
        if len(image) and over.mean() > 0.2:
            lines.append(f"note     {over.mean():.0%} of the boxes reach over the border: are they "
                         f"[x1, y1, x2, y2]? COCO's are [x, y, width, height]")
        if len(image) and max(x2.max(), y2.max()) <= 1.5:
            lines.append("note     no box reaches beyond 1.5 pixels: are they relative to the "
                         "image's size? COCO's are in pixels")
        return lines

    def path(self, i):
        return os.path.join(self.image_dir, self.files[i].decode())

    def read(self, i):
        """Image i as an RGB PIL image."""
        return read_image(self.path(i), self.sizes[i].tolist(), f" (image id {self.image_ids[i]})")


class ShapesDataset(DetectionDataset):
    """Generated images of rectangles, ellipses and triangles: nothing to download.

    split: "train" or "val", which differ in every image; n: how many images; side: of the square
    images, in pixels. One to four objects of 1/5 to 3/5 of the side, in any colour that stands out,
    partly over one another, on plain, shaded, striped or noisy ground. Image i is a pure function
    of (split, i, side); it is drawn when it is asked for.
    """

    def __init__(self, split="train", n=8000, side=64, augment=False, seed=42):
        super().__init__(side, None, augment, seed)
        self.split, self.side = split, side
        self.classes, self.category_ids = ["rectangle", "ellipse", "triangle"], [1, 2, 3]
        self.image_ids, self.files = np.arange(1, n + 1), np.arange(n)
        self.sizes = np.full((n, 2), side)
        scenes = [self._scene(i)[1] for i in range(n)]
        self.offsets = np.cumsum([0] + [len(s) for s in scenes])
        objects = [o for scene in scenes for o in scene]
        self.boxes = np.array([o[1] for o in objects], np.float64)
        self.labels = np.array([o[0] for o in objects], np.int64)
        self.area = self.boxes[:, 2] * self.boxes[:, 3]
        self.crowd = np.zeros(len(objects), bool)

    def _scene(self, i):
        """Random state, objects (label, xywh, colour) back to front, and the two ground colours."""
        rng, side = random.Random(f"shapes {self.split} {i} {self.side}"), self.side
        ground, objects = ground_colors(rng), []
        for _ in range(rng.randint(1, 4)):
            color = ground[0]
            while min(sum(abs(a - b) for a, b in zip(color, g)) for g in ground) < 150:
                color = tuple(rng.randrange(256) for _ in range(3))
            for _ in range(20):                                      # tries to find a free place
                w, h = (round(rng.uniform(side / 5, side * 3 / 5)) for _ in range(2))
                x, y = rng.randint(0, side - w), rng.randint(0, side - h)
                if all(self._covered((x, y, w, h), o[1]) < 0.3 for o in objects):
                    objects.append((rng.randrange(3), (x, y, w, h), color))
                    break
        return rng, objects, ground

    @staticmethod
    def _covered(a, b):
        """Share of the smaller of two xywh boxes that lies in the other."""
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])

    def read(self, i):
        """Image i as an RGB PIL image."""
        rng, objects, ground = self._scene(self.files[i])
        image = draw_ground(rng, ground, self.side)
        for label, box, color in objects:
            draw_shape(image, rng, label, box, fill=color)
        return image


# -- batches -------------------------------------------------------------------------------------

class Target(dict):
    """A target whose tensors leave a loader's worker by value: torch would open a file for each of
    them, which takes a third of a millisecond, and the number of open files is limited."""

    def __reduce__(self):
        return Target.from_arrays, ({k: v.numpy() if isinstance(v, torch.Tensor) else v
                                     for k, v in self.items()},)

    @staticmethod
    def from_arrays(arrays):
        return Target({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                       for k, v in arrays.items()})


def collate(samples):
    """Images padded right and below with zeros to one size, and where they are.

    samples: list of (uint8 (3, H, W), target). Returns images uint8 (B, 3, IH, IW) in memory as
    (B, IH, IW, 3), valid bool (B, IH, IW), True = image, and the list of targets.
    """
    B, (ih, iw) = len(samples), (max(image.shape[d] for image, _ in samples) for d in (1, 2))
    # channels last, as decoders give pixels and convolutions want them: rows are copied whole
    images = torch.empty(B, ih, iw, 3, dtype=samples[0][0].dtype).permute(0, 3, 1, 2)
    valid = torch.zeros(B, ih, iw, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        _, h, w = image.shape
        images[k, :, :h, :w] = image
        images[k, :, h:] = 0
        images[k, :, :h, w:] = 0
        valid[k, :h, :w] = True
    return images, valid, [Target(target) for _, target in samples]


def to_device(images, valid, device):
    """A batch on the device; valid None where there is no padding, so that nothing is masked."""
    padded = not valid.all()                                         # still on the CPU: no waiting
    images = images.to(device, non_blocking=True)
    return images, valid.to(device, non_blocking=True) if padded else None


def sort_by_shape(shapes, batch_size):
    """Order of `shapes` (N, 2) whose batches of neighbours need little padding.

    They are cut in two, sorted by height or by width, where the two parts padded to one size each
    have the least area; the parts likewise, down to single batches.
    """
    shapes, order, todo = np.asarray(shapes), [], [np.arange(len(shapes))]
    while todo:
        rows, best = todo.pop(), None
        ends = np.arange(batch_size, len(rows), batch_size)          # whole batches before the cut
        if not len(ends) or (shapes[rows] == shapes[rows[0]]).all():
            order.append(rows)
            continue
        for side in (0, 1):
            by_side = rows[np.argsort(shapes[rows, side], kind="stable")]
            below = np.maximum.accumulate(shapes[by_side])[ends - 1].prod(1)
            above = np.maximum.accumulate(shapes[by_side][::-1])[::-1][ends].prod(1)
            areas = below * ends + above * (len(rows) - ends)
            if best is None or areas.min() < best[0]:
                best = areas.min(), by_side, ends[areas.argmin()]
        todo += [best[1][best[2]:], best[1][:best[2]]]
    return np.concatenate(order)


class TrainSampler:
    """Batches of keys (epoch, index) for one rank: a pure function of (seed, epoch, rank).

    Every step takes batch_size images over all ranks and accumulated parts; the images of a step
    are the same for any number of ranks. With group_by_shape they are alike in shape: windows of 32
    steps are sorted and cut, and the steps of a window shuffled; the largest step of all comes
    first, so that memory runs out early if it does (one rank's part of another step can be larger).
    What is left at an epoch's end and fills no step is dropped, other images each epoch. With
    --overfit `repeats` passes make an epoch; a step never holds an image twice, unless there are
    fewer than batch_size. set_epoch says where to (re)start.
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
        self.rank, self.parts, self.accumulate = rank, world * accumulate, accumulate
        self.repeats, self.steps = repeats, repeats * max(1, len(dataset) // batch_size)
        self.group_by_shape = group_by_shape and repeats == 1      # copies of an image are alike
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        n, images = len(self.dataset), self.steps // self.repeats * self.batch_size
        order = np.concatenate([np.resize(rng.permutation(n), images)
                                for _ in range(self.repeats)])
        if self.group_by_shape:
            order = self._grouped(order, rng)
        for batch in order.reshape(self.steps, self.parts, -1)[self.first_step:]:
            for part in batch[self.rank * self.accumulate:(self.rank + 1) * self.accumulate]:
                yield [(self.epoch, i) for i in part.tolist()]

    def _grouped(self, order, rng):
        shapes = np.array([self.dataset.size_of(self.epoch, i) for i in order.tolist()])
        window, steps = 32 * self.batch_size, []
        for start in range(0, len(order), window):
            rows = start + sort_by_shape(shapes[start:start + window], self.batch_size)
            batches = rows.reshape(-1, self.batch_size)
            steps += list(batches[rng.permutation(len(batches))])
        largest = np.argmax(shapes[np.array(steps)].max(1).prod(1))
        steps[0], steps[largest] = steps[largest], steps[0]
        return order[np.concatenate(steps)]


class EvalSampler:
    """Batches of indices, images of like shape together, each image on exactly one rank.

    The batches do not depend on the number of ranks, hence neither do the detections.
    """

    def __init__(self, dataset, batch_size, rank=0, world=1):
        shapes = [dataset.size_of(0, i) for i in range(len(dataset))]
        order = sort_by_shape(shapes, batch_size).tolist()
        batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        self.batches = batches[rank::world]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


# -- which data set ------------------------------------------------------------------------------

def coco_paths(root, split):
    """Annotation file and image folder of the split, "train" or "val", in COCO's layout."""
    return (os.path.join(root, f"annotations/instances_{split}2017.json"),
            os.path.join(root, f"{split}2017"))


def data_paths(cfg, split):
    """Annotation file and image folder that the options name for the split."""
    if not cfg.data:
        return getattr(cfg, f"{split}_json"), getattr(cfg, f"{split}_images")
    if not os.path.isdir(os.path.join(cfg.data, "annotations")):
        raise UserFileError(
            f"--data {cfg.data} should hold annotations/instances_train2017.json and "
            f"instances_val2017.json, train2017/ and val2017/; for another layout give "
            f"--train_json, --train_images, --val_json and --val_images; for class folders give "
            f"a classifier, as --model poolformer_s12; no COCO at hand? leave --data out for the "
            f"built-in shapes")
    return coco_paths(cfg.data, split)


def build_dataset(cfg, split, classes=None, crop_fraction=0.9):
    """The data set of a run's options: the one place that decides which it is.

    cfg: a TrainConfig; split: "train" or "val", with --overfit both of the same N training images;
    classes: their names in the order of the labels, None: the data set's own; crop_fraction: of a
    classifier's centre crop.
    """
    augment = cfg.augment and split == "train"
    source = "train" if cfg.overfit else split
    if cfg.kind == "coco":
        dataset = CocoDataset(*data_paths(cfg, source), cfg.image_size, cfg.max_size, augment,
                              cfg.seed, classes)
    elif cfg.kind == "image_folder":
        dataset = ImageFolder(cfg.data, source, cfg.image_size, crop_fraction, augment, cfg.seed,
                              classes)
    else:
        kind = ShapesDataset if cfg.kind == "shapes" else ShapesClassification
        n = cfg.train_shapes if source == "train" else cfg.val_shapes
        dataset = kind(source, n, cfg.image_size, augment, cfg.seed)
    return dataset.keep(cfg.overfit) if cfg.overfit else dataset


if __name__ == "__main__":                         # python data.py DIR: the check of a data set
    import check_data
    check_data.command()
