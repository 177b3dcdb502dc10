"""What a run says: banner, progress, logs, pictures; and why a step failed."""

import json
import random
import sys

import numpy as np
from PIL import Image
import torch

from images import contact_sheet
from data import cxcywh_to_xyxy


# -- logs and pictures ---------------------------------------------------------------------------

def draw_batch(images, valid, targets, classes):
    """The images of a batch with their boxes, or the class of the whole, as the network gets them
    (but for mixup and CutMix)."""
    items = []
    for image, v, target in zip(images, valid, targets):
        h, w = int(v[:, 0].sum()), int(v[0].sum())
        boxes = cxcywh_to_xyxy(target.get("boxes", torch.tensor([[0.5, 0.5, 1, 1]])))
        boxes = boxes * torch.tensor([w, h, w, h])
        picture = Image.fromarray(image[:, :h, :w].permute(1, 2, 0).numpy())
        items.append((picture, boxes.numpy(), [classes[k] for k in target["labels"]]))
    return contact_sheet(items)


def draw_predictions(rows, dataset, threshold=0.7):
    """The first images of a data set with the detections (D, 7) that score over the threshold, or
    with what a classifier takes some images of all classes for (D, 5), and what those it gets
    wrong are."""
    items, detector, n = [], rows.shape[1] == 7, len(dataset)
    some = random.Random(0).sample(range(n), min(16, n))             # folders come class by class
    for i in range(min(16, n)) if detector else sorted(some):
        image = dataset.read(i)
        r = rows[(rows[:, 0] == i) & (rows[:, 2] > (threshold if detector else 0))].numpy()
        boxes = (np.concatenate([r[:, 3:5], r[:, 3:5] + r[:, 5:]], 1) if detector else
                 np.array([[0, 0, *image.size]]))
        names = [dataset.classes[int(k)] for k in r[:, 1]]
        if not detector and r[0, 1] != r[0, 3]:
            names = [f"{names[0]} (is {dataset.classes[int(r[0, 3])]})"]
        items.append((image, boxes, names, r[:, 2]))
    return contact_sheet(items)


def append_json(path, record):
    """One more line of a log file."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): make room and give the same command "
                      f"again") from None


def clock(seconds):
    """Hours, minutes and seconds, 1:02:03."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def memory_gb(device):
    """Peak memory in GB: of the GPU, or of this process."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:                                              # Windows has none
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024                   # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def interval_line(r, steps):
    """What the terminal shows of a record of steps.txt."""
    terms = [f"{t} {r[f'loss_{t}']:.3f}" for t in ("ce", "bbox", "giou") if f"loss_{t}" in r]
    terms = f" ({' '.join(terms)})" if terms else ""                 # a classifier has none
    return (f"epoch {r['epoch'] + 1:3d}  step {r['step']:5d}/{steps}  loss {r['loss']:.3f}{terms}  "
            f"wrong class {r['class_error']:3.0f}%  lr {r['lr']:.1e}  "
            f"{r['images_per_s']:.1f} images/s  data {r['data_share']:.0%}  "
            f"{r['memory_gb']:.1f} GB  eta {clock(r['eta_s'])}")


def epoch_record(sums, steps, loss_cfg):
    """The epoch's means by the official log's names: the losses weighted, and again "_unscaled"."""
    coefs = {term: getattr(loss_cfg, f"{term}_loss_coef", 1) for term in ("ce", "bbox", "giou")}
    record = {}
    for name, value in sums.items():                                 # loss, loss_ce, loss_ce_0, ...
        term = name.split("_")[1] if name.startswith("loss_") else ""
        record[f"train_{name}"] = value / steps * coefs.get(term, 1)
        if name not in ("loss", "grad_norm"):
            record[f"train_{name}_unscaled"] = value / steps
    return record


def evaluation_report(result):
    """Of evaluate()'s dict: the number that tells which epoch is best, the terminal's words, and
    the entries of log.txt, by the names of the official DETR and DeiT."""
    stats = result["stats"].tolist()
    if "precision" in result:
        return stats[0], (f"AP {stats[0]:.3f}  AP50 {stats[1]:.3f}  AP75 {stats[2]:.3f}  AR100 "
                          f"{stats[8]:.3f}"), {"test_coco_eval_bbox": stats}
    return stats[0], f"top-1 {stats[0]:.2%}  top-5 {stats[1]:.2%}", {
        "test_acc1": 100 * stats[0], "test_acc5": 100 * stats[1]}
