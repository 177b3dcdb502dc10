"""The parts of a run that only classifiers need: augmentation, data sets, loss and accuracy.

    dataset = ImageFolder("imagenet", "val")               # imagenet/val/<class>/*.jpg
    losses = classification_loss(logits, labels)

Papers: MetaFormer, arXiv:2111.11418, Sec. 4.1; label smoothing, arXiv:1512.00567, Sec. 7.
"""

import math
import os
import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import torch
import torch.nn.functional as F

from coco_eval import UserError, UserFileError
from options import check_options
from images import IMAGE_SUFFIXES, PIXEL_MEAN, PIXEL_STD, read_image, resized
from scenes import CLASS_SCENES, draw_scene
from check_data import is_text, short_repr


# -- augmentation --------------------------------------------------------------------------------

def center_crop(image, size, crop_fraction):
    """The evaluation transform: a PIL image of size x size pixels.

    Resizes the shorter side to size / crop_fraction, rounded down, bicubic, and cuts out the
    middle. crop_fraction belongs to a model's recipe: 0.9 for PoolFormer-S, 0.95 for M.
    """
    h, w = resized(image.height, image.width, math.floor(size / crop_fraction))
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_region(h, w, rng, share, ratio):
    """(top, left, height, width) of a random part of h x w pixels, None if ten tries do not fit.

    share: (least, largest) share of the area; ratio: (least, largest) width / height, drawn
    uniformly in the logarithm.
    """
    for _ in range(10):
        area = rng.uniform(*share) * h * w
        aspect = math.exp(rng.uniform(*map(math.log, ratio)))
        rh, rw = max(1, round(math.sqrt(area / aspect))), max(1, round(math.sqrt(area * aspect)))
        if rh <= h and rw <= w:
            return rng.randint(0, h - rh), rng.randint(0, w - rw), rh, rw
    return None


def crop_region(h, w, rng, least=0.08):
    """(top, left, height, width) of the part of an image h x w to train on.

    It has `least` to 100 % of the area and a width / height of 3/4 to 4/3; where no try fits, it is
    the largest such part of the middle. Source: arXiv:1409.4842, Sec. 6.
    """
    ch, cw = min(h, max(1, round(w / (3 / 4)))), min(w, max(1, round(h * (4 / 3))))
    middle = (h - ch) // 2, (w - cw) // 2, ch, cw
    return random_region(h, w, rng, (least, 1), (3 / 4, 4 / 3)) or middle


RESAMPLING = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC     # one of them at random
FILL = tuple(map(round, PIXEL_MEAN))               # colour of pixels from beyond the image's border


def affine(image, matrix, how):
    """The image moved by a 2 x 3 matrix from new to old pixel coordinates; `how`: resampling."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=FILL)


# Operations on an image at strength v in [-1, 1]; `how` is the resampling. A larger abs(v) is
# stronger, with the ranges of timm's "increasing" variant. One exception: at full strength
# posterize keeps one bit, where timm keeps none and returns a black image.
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
    """The PIL image after two random operations of RAND_AUGMENT, each skipped with 1/2.

    Each draws a strength, normal around 0.9 with deviation 0.05 and at most 1, and its sign.
    Source: RandAugment, arXiv:1909.13719, Sec. 3, with timm's settings rand-m9-mstd0.5-inc1.
    """
    for name in rng.choices(list(RAND_AUGMENT), k=2):
        if rng.random() < 0.5:
            v = min(max(rng.gauss(0.9, 0.05), 0), 1) * rng.choice((-1, 1))
            image = RAND_AUGMENT[name](image, v, rng.choice(RESAMPLING))
    return image


def random_erase(pixels, rng, probability=0.25):
    """Overwrites a random rectangle of `pixels` uint8 (IH, IW, 3), in place, with noise.

    The rectangle has 2 to 33 % of the area. The noise is timm's mode "pixel": standard normal
    after normalisation, here in pixel values, where 3 % of it is clipped.
    Source: Random Erasing, arXiv:1708.04896, Algorithm 1.
    """
    if rng.random() >= probability:
        return
    region = random_region(*pixels.shape[:2], rng, (0.02, 1 / 3), (0.3, 1 / 0.3))
    if region:
        top, left, h, w = region
        noise = np.random.default_rng(rng.randrange(2**32)).normal(PIXEL_MEAN, PIXEL_STD, (h, w, 3))
        pixels[top:top + h, left:left + w] = np.rint(noise).clip(0, 255)


def augment_for_classification(image, size, rng, light=False):
    """The training augmentation of PoolFormer: a PIL image to uint8 (size, size, 3).

    Random part, flip with 1/2, RandAugment, erasing, all drawn from `rng` (random.Random). light,
    for small data sets: a part of 60 % of the area or more, and the flip alone.
    Source: the training script of PoolFormer, arXiv:2111.11418, Sec. 4.1.
    """
    top, left, h, w = crop_region(image.height, image.width, rng, 0.6 if light else 0.08)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), rng.choice(RESAMPLING))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if light:
        return np.array(image)
    pixels = np.array(rand_augment(image, rng))
    random_erase(pixels, rng)
    return pixels


def mixup_or_cutmix(images, labels, num_classes, rng, mixup=0.8, cutmix=1.0):
    """Mixes the neighbours in a batch, images 0 and 1, 2 and 3, ...: (images, targets).

    images uint8 (B, 3, IH, IW), labels (B,) int64, on any device; rng: random.Random, which draws
    mixup or CutMix, each with 1/2, and one lam for the whole batch; mixup, cutmix: parameters of
    their beta distributions, 0: never that one. Returns images uint8 and targets float32 (B, K),
    rows with sum 1. An rng seeded by the step alone mixes a step the same however it is split over
    processes and micro-batches. Raises UserError for an odd number of images.
    Sources: mixup, arXiv:1710.09412, Sec. 2; CutMix, arXiv:1905.04899, Sec. 3.1.
    """
    targets = F.one_hot(labels, num_classes).float()
    if not mixup and not cutmix:
        return images, targets
    if len(images) % 2:
        raise UserError(f"mixup and CutMix mix pairs, but a process has {len(images)} images in "
                        f"one part of a step: make --batch_size / (processes x --accumulate) "
                        f"even, or give --mixup 0 --cutmix 0")

    def neighbours(x):
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    # lam: how much of a mixed image is the image itself
    cut = cutmix and (not mixup or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    lam = rng.betavariate(alpha, alpha)
    if cut:
        # a box of the neighbour, 1 - lam of the area before the border cuts it off
        H, W = images.shape[-2:]
        half, row, col = math.sqrt(1 - lam) / 2, rng.randrange(H), rng.randrange(W)
        top, bottom = max(0, row - int(H * half)), min(H, row + int(H * half))
        left, right = max(0, col - int(W * half)), min(W, col + int(W * half))
        lam = 1 - (bottom - top) * (right - left) / (H * W)
        other, images = neighbours(images), images.clone()
        images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    else:
        images = torch.lerp(neighbours(images).float(), images.float(), lam).round().byte()
    return images, torch.lerp(neighbours(targets), targets, lam)


# -- data sets -----------------------------------------------------------------------------------

class ClassificationDataset(torch.utils.data.Dataset):
    """Images of one class each, all of image_size x image_size pixels.

    A subclass fills classes (K names), labels int64 and image_ids (one of each per image), and has
    a method read(i), the PIL image in RGB. augment: augment_for_classification ("light": its light
    variant), else center_crop.
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
        """Image uint8 (3, image_size, image_size) and target; key: an index or (epoch, index)."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image = self.read(i)
        if self.augment:
            rng = random.Random(f"{self.seed} {epoch} {i}")
            pixels = augment_for_classification(image, self.image_size, rng,
                                                light=self.augment == "light")
        else:
            pixels = np.array(center_crop(image, self.image_size, self.crop_fraction))
        target = {"labels": torch.tensor(self.labels[i:i + 1]), "index": i}
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def keep_only(self, n):
        """Keeps only n images, of every class in turn, and returns the data set."""
        if len(self) < n:
            raise UserError(f"--overfit {n}: there are only {len(self)} images")
        by_class = np.argsort(self.labels, kind="stable")
        labels = self.labels[by_class]
        turn = np.arange(len(self)) - np.searchsorted(labels, labels)    # 0 = first of its class
        rows = by_class[np.argsort(turn, kind="stable")][:n]
        self.labels, self.image_ids = self.labels[rows], self.image_ids[rows]
        return self


class ImageFolder(ClassificationDataset):
    """The images in root/split/<class>/ and in folders below it.

    classes: names in the order of the labels (those of the training set or of a checkpoint), None:
    the sorted names of the folders. image_ids are paths below root/split, as bytes. Raises
    UserFileError, and UserError for a folder without class folders, with only one, with other
    classes than given, or, where none are given, with a class without images.
    """

    def __init__(self, root, split, image_size=224, crop_fraction=0.9, augment=False, seed=42,
                 classes=None):
        super().__init__(image_size, crop_fraction, augment, seed)
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise UserFileError(f"{self.folder} not found: {root} should hold the images as "
                                f"train/<class>/*.jpg and val/<class>/*.jpg")
        entries = sorted(os.listdir(self.folder))
        found = [name for name in entries
                 if name[0] != "." and os.path.isdir(os.path.join(self.folder, name))]
        self._check_classes(found, classes)
        self.classes = found if classes is None else list(classes)

        # the images of each class; `others` counts what is not one of them
        paths, labels, empty, others = [], [], [], len(entries) - len(found)
        for label, name in enumerate(self.classes):
            images, unread = self._find_images(name)
            paths += images
            labels += [label] * len(images)
            others += unread
            if not images:
                empty.append(name)
        if not paths or empty and classes is None:
            raise UserError(f"{self.folder}: no images in the class folder(s) {empty[:20]}; their "
                            f"names should end in {' '.join(IMAGE_SUFFIXES)}")
        self.labels, self.image_ids = np.array(labels), np.array([os.fsencode(p) for p in paths])
        if empty:
            self.notes.append(f"note     {self.folder} has no images of {empty[:20]}")
        if others:
            self.notes.append(f"note     {self.folder}: {others} hidden files or other things that "
                              f"are not images in a class folder are not read")

    def _check_classes(self, found, classes):
        """Raises UserError unless the folders `found` are those of `classes`; None: two or more."""
        layout = f"the images of a class belong in {os.path.join(self.folder, '<class>')}/"
        if not found:
            raise UserError(f"{self.folder} has no class folders: {layout}; a flat folder, such as "
                            f"ImageNet's of validation images, does not tell their classes")
        odd = [short_repr(name) for name in found if not is_text(name)]
        if odd:
            raise UserError(f"{self.folder}: the names of the class folders {', '.join(odd[:20])} "
                            f"are not one line of text in UTF-8, rename them")
        if classes is None and len(found) < 2:
            raise UserError(f"{self.folder} has one class folder only, {found[0]}: {layout}, and "
                            f"a classifier needs two classes or more")
        known = found if classes is None else classes
        missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
        if missing or extra:
            raise UserError(
                f"{self.folder} has other classes than the training set or the checkpoint: "
                f"{len(missing)} missing {missing[:20]}, {len(extra)} unknown {extra[:20]}; "
                f"{layout}, which may be empty")

    def _find_images(self, name):
        """Sorted paths of the images of one class, and the number of other files there."""
        def unreadable(error):                                       # os.walk would skip the folder
            raise error

        paths, others = [], 0
        for place, folders, names in os.walk(os.path.join(self.folder, name), followlinks=True,
                                             onerror=unreadable):
            folders[:] = [f for f in folders if f[0] != "."]         # os.walk goes on into these
            images = [n for n in names if n[0] != "." and n.lower().endswith(IMAGE_SUFFIXES)]
            paths += [os.path.relpath(os.path.join(place, n), self.folder) for n in images]
            others += len(names) - len(images)
        return sorted(paths), others

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.image_ids[i]))

    def read(self, i):
        return read_image(self.path(i))


class ShapesClassification(ClassificationDataset):
    """Generated images, nothing to download: of one shape, or a scene of scenes.py.

    split: "train" or "val", which have different images; n: their number; image_size: their side;
    scenes: a key of CLASS_SCENES. Image i, a pure function of (split, i, image_size, scenes), is
    drawn by read(i); its class is i modulo their number.
    """

    def __init__(self, split="train", n=6400, image_size=64, augment=False, seed=42,
                 scenes="plain"):
        super().__init__(image_size, 1.0, augment, seed)
        self.split, self.scenes = split, scenes
        names, self.make_scene = CLASS_SCENES[scenes]
        self.classes, self.image_ids = list(names), np.arange(n)
        self.labels = self.image_ids % len(names)

    def _scene(self, i):
        """Random state, the two ground colours, and the objects."""
        kind = "one shape" if self.scenes == "plain" else self.scenes
        rng = random.Random(f"{kind} {self.split} {self.image_ids[i]} {self.image_size}")
        return rng, *self.make_scene(rng, self.image_size, int(self.labels[i]))

    def read(self, i):
        return draw_scene(*self._scene(i), self.image_size)


# -- loss ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ClassLossConfig:
    """Options of a classifier's targets; the defaults are PoolFormer's recipe."""
    smoothing: Annotated[float, "share of a target spread evenly over the classes", 0] = 0.1
    mixup: Annotated[float, "parameter of mixup's beta distribution, 0 for none", 0] = 0.8
    cutmix: Annotated[float, "parameter of CutMix's beta distribution, 0 for none", 0] = 1.0
    soft_loss_coef: Annotated[float, "weight of a --teacher's labels; the true ones have 1 minus "
                                     "it", 0] = 0.5
    temperature: Annotated[float, "divides the logits of teacher and student", 0] = 3.0
    imitation_loss_coef: Annotated[float, "weight of the distance between the teacher's blocks and "
                                          "these, see distill.py", 0] = 0.0

    def __post_init__(self):
        check_options(self)
        if self.smoothing >= 1:
            raise UserError(f"--smoothing {self.smoothing} must be below 1")
        if self.soft_loss_coef > 1 or not self.temperature:
            raise UserError(f"--soft_loss_coef {self.soft_loss_coef} must be at most 1, and "
                            f"--temperature {self.temperature} over 0")

    @property
    def ce_loss_coef(self):
        """Weight of the true labels beside a teacher's."""
        return 1 - self.soft_loss_coef


def classification_loss(logits, targets, smoothing=0.0, normalizers=None, class_weights=None):
    """The cross-entropy of a batch: a dict of 0-dim tensors, "loss" and "class_error" in percent.

    logits (B, K); targets (B,) int64 labels, or float (B, K) shares of the classes as
    mixup_or_cutmix gives them, whose largest is the label. smoothing: the share of each target that
    is spread evenly over all K classes (arXiv:1512.00567, Sec. 7). normalizers: loss_normalizers of
    the whole step per process, None: of this batch. class_weights (K,): 1 on average over the
    images; None: 1 each. Computed in float32.
    """
    images = len(logits) if normalizers is None else normalizers[2].item()
    weight = None if class_weights is None else class_weights.to(logits.device)
    loss = F.cross_entropy(logits.float(), targets, weight, reduction="sum",
                           label_smoothing=smoothing)
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    wrong = (logits.argmax(1) != labels).sum()
    return {"loss": loss / images, "class_error": 100 * wrong / images}


def mixed_batch(run, images, targets, global_step):
    """mixup_or_cutmix of a micro-batch by the run's options, its seed and global_step."""
    labels = torch.cat([t["labels"] for t in targets])
    labels = labels.to(images.device, non_blocking=images.is_cuda)  # the host need not wait
    rng = random.Random(f"{run.cfg.seed} {global_step}")
    return mixup_or_cutmix(images, labels, run.model_cfg.num_classes, rng, run.loss_cfg.mixup,
                           run.loss_cfg.cutmix)


def classification_losses(run, images, valid, targets, normalizers, global_step):
    """The losses of a micro-batch."""
    images, shares = mixed_batch(run, images, targets, global_step)
    return classification_loss(run.model(images, valid), shares, run.loss_cfg.smoothing,
                               normalizers, run.class_weights)


# -- accuracy ------------------------------------------------------------------------------------

def class_rows(logits, targets, dataset):
    """Predictions for a batch, float64 (B, 5): image index, predicted class, its probability, true
    class, rank of the true class (0 = top-1; ties by class index). Raises UserError if one of the
    logits (B, K) is not finite."""
    labels = torch.cat([t["labels"] for t in targets])
    index = torch.tensor([t["index"] for t in targets])
    logits = logits.float().cpu()
    bad = index[~logits.isfinite().all(1)].tolist()
    if bad:
        raise UserError(f"the logits of the image(s) {dataset.image_ids[bad].tolist()} are not "
                        f"finite")
    order = logits.argsort(dim=1, descending=True, stable=True)                     # (B, K)
    rank = (order == labels[:, None]).int().argmax(1)
    probability = logits.softmax(1).gather(1, order[:, :1])[:, 0]
    return torch.stack([index, order[:, 0], probability.double(), labels, rank], 1)


def class_accuracy(rows, dataset):
    """Accuracies in [0, 1] from the class_rows of all images, a dict.

    "stats" (3,): top-1, top-5, and top-1 as the mean over the classes that have images;
    "accuracy" (K,): top-1 of each class, nan without images; "images" (K,): their number; "rows"
    and "classes".
    """
    label, rank = rows[:, 3].long().numpy(), rows[:, 4].numpy()
    images = np.bincount(label, minlength=len(dataset.classes))
    hits = np.bincount(label, rank == 0, len(images))
    accuracy = np.where(images > 0, hits / np.maximum(images, 1), np.nan)
    stats = np.array([(rank == 0).mean(), (rank < 5).mean(), np.nanmean(accuracy)])
    return dict(stats=stats, accuracy=accuracy, images=images, rows=rows, classes=dataset.classes)


def accuracy_table(result):
    """The accuracies of class_accuracy as text: all images, then the classes, the best first."""
    top1, top5, mean = result["stats"]
    rows = list(zip(-result["accuracy"], result["classes"], result["images"].tolist()))
    width = max([5] + [len(name) for name in result["classes"]])
    lines = [f"top-1 {top1:.4f}   top-5 {top5:.4f}   mean over classes {mean:.4f}",
             "", f"{'class':{width}s}  top-1   images"]
    best_first = sorted(row for row in rows if row[2])
    lines += [f"{name:{width}s}  {-x:5.3f}  {n:7d}" for x, name, n in best_first]
    lines += [f"{name:{width}s}      -        0" for _, name, n in rows if not n]
    return "\n".join(lines)


def accuracy_json(result):
    """The accuracies of class_accuracy for json.dump; null for a class without images."""
    top1, top5, mean = result["stats"].tolist()
    classes = zip(result["classes"], result["images"].tolist(), result["accuracy"].tolist())
    return {"top1": top1, "top5": top5, "mean_over_classes": mean,
            "per_class": [{"name": name, "images": n, "top1": accuracy if n else None}
                          for name, n, accuracy in classes]}
