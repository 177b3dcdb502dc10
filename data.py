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

import math
import os
import random
from collections import namedtuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import torch
import torch.nn.functional as F

from images import (IMAGE_SUFFIXES, PIXEL_MEAN, PIXEL_STD, draw_ground, draw_shape, ground_colors,
                    read_image, resized)
from coco_eval import read_json
from check_data import check_coco, is_text, show, without_faults

# Names by original category id, as the officially released DETR files number their 91 outputs;
# eleven of these ids were never used.
COCO_CLASSES = (
    ",person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
    "couch,potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,"
    "microwave,oven,toaster,sink,refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush").split(",")


# -- boxes ---------------------------------------------------------------------------------------

def cxcywh_to_xyxy(boxes):
    """Centre and size to corners; boxes (..., 4), any unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], -1)


def xyxy_to_cxcywh(boxes):
    """Corners to centre and size; boxes (..., 4), any unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)


def overlap(a, b):
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
    return overlap(a[..., :, None, :], b[..., None, :, :])[0]


def generalized_box_iou(a, b):
    """Generalised IoU in [-1, 1] of every box in a (..., N, 4) with every one in b (..., M, 4)."""
    return overlap(a[..., :, None, :], b[..., None, :, :])[1]


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


# -- augmentation of classifiers -----------------------------------------------------------------

RESAMPLING = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC              # drawn at random


def center_crop(image, size, crop_fraction):
    """The evaluation transform: a PIL image, size x size pixels.

    The shorter side is resized to size / crop_fraction, rounded down, bicubic; the middle is cut
    out. The fraction is part of a model's recipe: 0.9 for PoolFormer-S, 0.95 for M, else mostly 1.
    """
    h, w = resized(image.height, image.width, math.floor(size / crop_fraction))
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_region(h, w, rng, share, ratio):
    """(top, left, height, width) of a random part of h x w pixels, or None if ten tries do not fit.

    share: range of its share of the area; ratio: of width / height, even in the logarithm.
    """
    for _ in range(10):
        area = rng.uniform(*share) * h * w
        aspect = math.exp(rng.uniform(*map(math.log, ratio)))
        rh, rw = max(1, round(math.sqrt(area / aspect))), max(1, round(math.sqrt(area * aspect)))
        if rh <= h and rw <= w:
            return rng.randint(0, h - rh), rng.randint(0, w - rw), rh, rw
    return None


def crop_region(h, w, rng):
    """(top, left, height, width) of the part of an image h x w to train on: 8 to 100 % of the area,
    width / height 3/4 to 4/3; where that does not fit, the largest such part of the middle.
    Source: Going deeper with convolutions, arXiv:1409.4842, Sec. 6.
    """
    ch, cw = min(h, max(1, round(w / (3 / 4)))), min(w, max(1, round(h * (4 / 3))))
    middle = (h - ch) // 2, (w - cw) // 2, ch, cw
    return random_region(h, w, rng, (0.08, 1), (3 / 4, 4 / 3)) or middle


FILL = tuple(map(round, PIXEL_MEAN))               # what comes in from outside the image


def affine(image, matrix, how):
    """The image moved by the 2 x 3 matrix that leads from new to old pixels."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=FILL)


# What can be done to an image at strength v in [-1, 1]; `how` is the resampling. The larger |v|,
# the stronger, as in timm's "increasing" variant, whose ranges these are; only that one bit is left
# at full strength, where timm leaves none and the image is black.
RAND_AUGMENT = {
    "autocontrast": lambda im, v, how: ImageOps.autocontrast(im),
    "equalize": lambda im, v, how: ImageOps.equalize(im),
    "invert": lambda im, v, how: ImageOps.invert(im),
    "rotate": lambda im, v, how: im.rotate(30 * v, how, fillcolor=FILL),
    "posterize": lambda im, v, how: ImageOps.posterize(im, max(1, 4 - int(4 * abs(v)))),
    "solarize": lambda im, v, how: ImageOps.solarize(im, 256 - int(256 * abs(v))),
    "solarize_add": lambda im, v, how: im.point(
        [p + int(110 * abs(v)) if p < 128 else p for p in range(256)] * 3),
    "color": lambda im, v, how: ImageEnhance.Color(im).enhance(1 + 0.9 * v),
    "contrast": lambda im, v, how: ImageEnhance.Contrast(im).enhance(1 + 0.9 * v),
    "brightness": lambda im, v, how: ImageEnhance.Brightness(im).enhance(1 + 0.9 * v),
    "sharpness": lambda im, v, how: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * v),
    "shear_x": lambda im, v, how: affine(im, (1, 0.3 * v, 0, 0, 1, 0), how),
    "shear_y": lambda im, v, how: affine(im, (1, 0, 0, 0.3 * v, 1, 0), how),
    "translate_x": lambda im, v, how: affine(im, (1, 0, 0.45 * v * im.width, 0, 1, 0), how),
    "translate_y": lambda im, v, how: affine(im, (1, 0, 0, 0, 1, 0.45 * v * im.height), how)}


def rand_augment(image, rng):
    """Two operations of RAND_AUGMENT on a PIL image, each left out with 1/2.

    Strength and sign are drawn anew for each: normal around 0.9 with deviation 0.05, at most 1.
    Source: RandAugment, arXiv:1909.13719, Sec. 3, as timm does it under rand-m9-mstd0.5-inc1.
    """
    for name in rng.choices(list(RAND_AUGMENT), k=2):
        if rng.random() < 0.5:
            v = min(max(rng.gauss(0.9, 0.05), 0), 1) * rng.choice((-1, 1))
            image = RAND_AUGMENT[name](image, v, rng.choice(RESAMPLING))
    return image


def random_erase(pixels, rng, probability=0.25):
    """Overwrite a random rectangle of `pixels` uint8 (H, W, 3), in place, with noise.

    It takes 2 to 33 % of the area. The noise is timm's mode "pixel", standard normal after
    normalisation, brought back to pixel values, where 3 % of it is clipped.
    Source: Random Erasing, arXiv:1708.04896, Algorithm 1.
    """
    if rng.random() >= probability:
        return
    region = random_region(*pixels.shape[:2], rng, (0.02, 1 / 3), (0.3, 1 / 0.3))
    if region:
        top, left, h, w = region
        noise = np.random.default_rng(rng.randrange(2**32)).normal(PIXEL_MEAN, PIXEL_STD, (h, w, 3))
        pixels[top:top + h, left:left + w] = np.rint(noise).clip(0, 255)


def augment_classes(image, size, rng):
    """The training augmentation of the PoolFormer paper: PIL image to uint8 (size, size, 3).

    Random part, flip with 1/2, RandAugment, erasing, all drawn from `rng` (random.Random).
    Source: the training script of PoolFormer, arXiv:2111.11418, Sec. 4.1.
    """
    top, left, h, w = crop_region(image.height, image.width, rng)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), rng.choice(RESAMPLING))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(rand_augment(image, rng))
    random_erase(pixels, rng)
    return pixels


def mix(images, labels, num_classes, rng, mixup=0.8, cutmix=1.0):
    """Mixup or CutMix of neighbours in a batch, images 0 and 1, 2 and 3, ...: (images, targets).

    images uint8 (B, 3, H, W), labels (B,) int64, on any device; rng: random.Random, which draws one
    share for the whole batch; mixup, cutmix: parameters of the beta distributions, 0 leaves that
    one out. Returns images uint8 and targets float32 (B, K), rows with sum 1. With an rng seeded by
    the step alone, a step is mixed the same however it is split over processes and parts. Raises
    ValueError for an odd number of images.
    Sources: mixup, arXiv:1710.09412, Sec. 2; CutMix, arXiv:1905.04899, Sec. 3.1; one or the other
    with 1/2, as in timm.
    """
    targets = F.one_hot(labels, num_classes).float()
    if not mixup and not cutmix:
        return images, targets
    if len(images) % 2:
        raise ValueError(f"mixup and CutMix mix pairs, but a process has {len(images)} images in "
                         f"one part of a step: make --batch_size / (processes x --accumulate) "
                         f"even, or give --mixup 0 --cutmix 0")

    def neighbours(x):
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    cut = cutmix and (not mixup or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = rng.betavariate(alpha, alpha)                            # of the image itself
    if cut:
        H, W = images.shape[-2:]
        side = math.sqrt(1 - share) / 2
        (top, bottom), (left, right) = (
            (max(0, center - int(n * side)), min(n, center + int(n * side)))
            for n, center in ((H, rng.randrange(H)), (W, rng.randrange(W))))
        share = 1 - (bottom - top) * (right - left) / (H * W)        # the border cuts boxes down
        other, images = neighbours(images), images.clone()
        images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    else:
        images = torch.lerp(neighbours(images).float(), images.float(), share).round().byte()
    return images, torch.lerp(neighbours(targets), targets, share)


# -- data sets -----------------------------------------------------------------------------------

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

    def keep(self, n, repeat=1):
        """Keep only the first n images that have objects, each of them `repeat` times."""
        has = [i for i in range(len(self)) if len(self.objects(i)[0])][:n]
        if len(has) < n:
            raise ValueError(f"--overfit {n}: only {len(has)} of the {len(self)} images have "
                             f"objects")
        has *= repeat
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
            raise FileNotFoundError(f"image folder {image_dir} not found: it should hold the "
                                    f"images that {json_path} lists")
        data, faults = without_faults(data, json_path, image_dir)
        if faults and not (data and sound_part):
            shown = len(faults) if sound_part else 20
            more = f"\n... and {len(faults) - shown} more" if len(faults) > shown else ""
            raise ValueError(f"{json_path} has {len(faults)} fault(s), mend the file:\n"
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
            raise ValueError(f"{self.json_path} has categories that the model was not trained on: "
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


class ClassificationDataset(torch.utils.data.Dataset):
    """Images of one class each, all of image_size x image_size pixels.

    A subclass fills classes (K names), labels (N,) int64, image_ids (N,), and says how image i is
    read. augment: augment_classes, else center_crop.
    """

    def __init__(self, image_size, crop_fraction, augment, seed):
        self.image_size, self.crop_fraction = image_size, crop_fraction
        self.augment, self.seed, self.notes = augment, seed, []

    def __len__(self):
        return len(self.labels)

    def size_of(self, epoch, i):
        """(height, width) of image i, the same for all."""
        return self.image_size, self.image_size

    def __getitem__(self, key):
        """Image uint8 (3, S, S) and target; key is an index or (epoch, index)."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image = self.read(i)
        if self.augment:
            rng = random.Random(f"{self.seed} {epoch} {i}")
            pixels = augment_classes(image, self.image_size, rng)
        else:
            pixels = np.array(center_crop(image, self.image_size, self.crop_fraction))
        target = {"labels": torch.tensor(self.labels[i:i + 1]), "index": i}
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def keep(self, n, repeat=1):
        """Keep only n images, of every class in turn, each of them `repeat` times."""
        if len(self) < n:
            raise ValueError(f"--overfit {n}: there are only {len(self)} images")
        order = np.argsort(self.labels, kind="stable")               # by class
        labels = self.labels[order]
        turn = np.arange(len(self)) - np.searchsorted(labels, labels)            # within its class
        rows = np.tile(order[np.argsort(turn, kind="stable")][:n], repeat)
        self.labels, self.image_ids = self.labels[rows], self.image_ids[rows]
        return self


class ImageFolder(ClassificationDataset):
    """The images in root/split/<class>/ and in folders below it.

    classes: names in the order wanted for the labels (those of the training set or of a
    checkpoint), None: the names of the folders, sorted. Raises FileNotFoundError, and ValueError
    for a folder without class folders, with one class only, with other classes than given, or,
    where none are given, with an empty one. image_ids are paths below root/split, as bytes.
    """

    def __init__(self, root, split, image_size=224, crop_fraction=0.9, augment=False, seed=42,
                 classes=None):
        super().__init__(image_size, crop_fraction, augment, seed)
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise FileNotFoundError(f"{self.folder} not found: {root} should hold the images as "
                                    f"train/<class>/*.jpg and val/<class>/*.jpg")
        found = [name for name in sorted(os.listdir(self.folder))
                 if name[0] != "." and os.path.isdir(os.path.join(self.folder, name))]
        self._check_classes(found, classes)
        self.classes = found if classes is None else list(classes)
        files, others = zip(*map(self._find_images, self.classes))
        empty = [name for name, paths in zip(self.classes, files) if not paths]
        if len(empty) == len(files) or empty and classes is None:
            raise ValueError(f"{self.folder}: no images in the class folder(s) {empty[:20]}; their "
                             f"names should end in {' '.join(IMAGE_SUFFIXES)}")
        self.labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files])
        self.image_ids = np.array([os.fsencode(path) for paths in files for path in paths])
        others = sum(others) + len(os.listdir(self.folder)) - len(found)
        if empty:
            self.notes.append(f"note     {self.folder} has no images of {empty[:20]}")
        if others:
            self.notes.append(f"note     {self.folder}: {others} hidden files or other things that "
                              f"are no images in a class folder, not read")

    def _check_classes(self, found, classes):
        """Raises ValueError unless the class folders `found` are `classes`, or two where None."""
        layout = f"the images of a class belong into {os.path.join(self.folder, '<class>')}/"
        if not found:
            raise ValueError(f"{self.folder} has no class folders: {layout}; in a flat folder, as "
                             f"ImageNet's validation images come, nothing says what they show")
        odd = [show(name) for name in found if not is_text(name)]
        if odd:
            raise ValueError(f"{self.folder}: class folders {', '.join(odd[:20])} are not named by "
                             f"one line of text in UTF-8, rename them")
        if classes is None and len(found) < 2:
            raise ValueError(f"{self.folder} has one class folder only, {found[0]}: {layout}, and "
                             f"a classifier needs two classes or more")
        known = found if classes is None else classes
        missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
        if missing or extra:
            raise ValueError(
                f"{self.folder} has other classes than the training set or the checkpoint: "
                f"{len(missing)} missing {missing[:20]}, {len(extra)} unknown {extra[:20]}; "
                f"{layout}, which may be empty")

    def _find_images(self, name):
        """Sorted paths of the images of one class, and the number of other files there."""
        def unreadable(error):
            raise error
        paths, others = [], 0
        for place, folders, names in os.walk(os.path.join(self.folder, name), followlinks=True,
                                             onerror=unreadable):
            folders[:] = [f for f in folders if f[0] != "."]         # the rest is not walked
            images = [n for n in names if n[0] != "." and n.lower().endswith(IMAGE_SUFFIXES)]
            paths += [os.path.relpath(os.path.join(place, n), self.folder) for n in images]
            others += len(names) - len(images)
        return sorted(paths), others

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.image_ids[i]))

    def read(self, i):
        """Image i as an RGB PIL image."""
        return read_image(self.path(i))


class ShapesClassification(ClassificationDataset):
    """Generated images of one shape, filled or in outline: six classes, nothing to download.

    split: "train" or "val", which differ in every image; n: how many images; image_size: their
    side. The shape is bright, 1/3 to 4/5 of the side, on dark ground as that of ShapesDataset.
    Image i is a pure function of (split, i, image_size); it is drawn when it is asked for.
    """

    def __init__(self, split="train", n=6400, image_size=64, augment=False, seed=42):
        super().__init__(image_size, 1.0, augment, seed)
        self.split = split
        shapes = "rectangle", "ellipse", "triangle"
        self.classes = [*shapes, *(f"{shape} outline" for shape in shapes)]
        self.image_ids = np.arange(n)
        self.labels = self.image_ids % 6

    def read(self, i):
        """Image i as an RGB PIL image."""
        label, side = int(self.labels[i]), self.image_size
        rng = random.Random(f"one shape {self.split} {self.image_ids[i]} {side}")
        ground = [tuple(c // 2 for c in color) for color in ground_colors(rng)]
        color = tuple(rng.randint(160, 255) for _ in range(3))
        w, h = (round(rng.uniform(side / 3, side * 4 / 5)) for _ in range(2))
        box = rng.randint(0, side - w), rng.randint(0, side - h), w, h
        image = draw_ground(rng, ground, side)
        paint = dict(fill=color) if label < 3 else dict(outline=color, width=max(1, side // 32))
        draw_shape(image, rng, label % 3, box, **paint)
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
    What is left at an epoch's end and fills no step is dropped, other images each epoch. set_epoch
    says where to (re)start.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world=1, accumulate=1,
                 group_by_shape=True):
        if batch_size % (world * accumulate):
            raise ValueError(f"--batch_size {batch_size} (images per step over all processes) is "
                             f"not a multiple of {world} processes x --accumulate {accumulate}")
        if len(dataset) < batch_size:
            raise ValueError(f"the training set has {len(dataset)} images, fewer than --batch_size "
                             f"{batch_size}: lower it to at most that")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.parts, self.accumulate = rank, world * accumulate, accumulate
        self.group_by_shape, self.steps = group_by_shape, len(dataset) // batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.dataset))[:self.steps * self.batch_size]
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


def coco_paths(root, split):
    """Annotation file and image folder of the split, "train" or "val", in COCO's layout."""
    return (os.path.join(root, f"annotations/instances_{split}2017.json"),
            os.path.join(root, f"{split}2017"))


if __name__ == "__main__":                         # python data.py DIR: the check of a data set
    import check_data
    check_data.command()
