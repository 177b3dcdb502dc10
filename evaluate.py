"""Evaluation: detections of a model, and the COCO average precision in numpy.

    python evaluate.py out/ckpt.pt                                  # its own validation set
    python evaluate.py detr-r50-e632da11.pth --data coco            # officially released weights
    python evaluate.py out/ckpt.pt --val_json a.json --val_images DIR --save_json detections.json
    python evaluate.py --gt instances.json --dt detections.json     # anybody's detections

Papers: COCO, arXiv:1405.0312, and cocodataset.org/#detection-eval; DETR, arXiv:2005.12872.
"""

import argparse
import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data import (COCO_CLASSES, CocoDataset, EvalSampler, ShapesDataset, collate, cxcywh_to_xyxy,
                  read_json)
from model import ModelConfig, build_model, load_weights, read_checkpoint


# -- from the network's outputs to detections ----------------------------------------------------

def postprocess(logits, boxes, sizes):
    """The best class of every query and its box in pixels: a list of B dicts.

    logits (B, Q, K+1) and boxes (B, Q, 4) of the last decoder layer; sizes (B, 2) original (height,
    width). Each dict: "scores" (Q,) in [0, 1], "labels" (Q,) int64 class indices, "boxes" (Q, 4)
    xyxy pixels. No threshold, no suppression, no clipping. Source: arXiv:2005.12872, Appendix A.4.
    """
    scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)               # (B, Q)
    h, w = torch.as_tensor(sizes, dtype=torch.float32, device=boxes.device).unbind(1)
    boxes = cxcywh_to_xyxy(boxes.float()) * torch.stack([w, h, w, h], 1)[:, None]
    return [dict(scores=s, labels=k, boxes=b) for s, k, b in zip(scores, labels, boxes)]


def to_device(images, valid, device):
    """A batch on the device; valid None where there is no padding, so that nothing is masked."""
    padded = not valid.all()                                         # still on the CPU: no waiting
    images = images.to(device, non_blocking=True)
    return images, valid.to(device, non_blocking=True) if padded else None


@torch.inference_mode()
def detect(model, loader, device, dtype=torch.float32):
    """All detections of this process: float64 (D, 7) of image index, class, score, x, y, w, h."""
    model.eval()
    rows = [torch.zeros(0, 7, dtype=torch.float64)]
    for images, valid, targets in loader:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            logits, boxes = model(*to_device(images, valid, device))
        found = postprocess(logits[-1], boxes[-1], [t["orig_size"] for t in targets])
        for target, d in zip(targets, found):
            xywh = torch.cat([d["boxes"][:, :2], d["boxes"][:, 2:] - d["boxes"][:, :2]], 1)
            image = torch.full_like(d["scores"], target["index"], dtype=torch.float64)
            row = torch.cat([image[:, None], d["labels"][:, None], d["scores"][:, None], xywh], 1)
            rows.append(row.double().cpu())
    return torch.cat(rows)


def gather_rows(rows):
    """The rows (n, 7) of all processes, on each: n is gathered first, the rest padded to it."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = rows.new_zeros(max(map(int, counts)), rows.shape[1])
    padded[:len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(n)] for part, n in zip(parts, counts)])


def evaluate(model, loader, device, dtype=torch.float32):
    """The COCO evaluation of a model: evaluate_columns' dict, equal at any number of processes.

    loader: over an EvalSampler of a DetectionDataset, collated; each process has its share of the
    batches. dtype: of the autocast. The dict also has "detections", detect()'s rows of all images
    in the order of the images, and "classes".
    """
    rows = gather_rows(detect(model, loader, device, dtype))
    rows = rows[rows[:, 0].argsort(stable=True)]                     # whichever process had it
    r, dataset = rows.numpy(), loader.dataset
    found = {"image": r[:, 0].astype(np.int64), "category": r[:, 1].astype(np.int64),
             "score": r[:, 2], "box": r[:, 3:]}
    result = evaluate_columns(dataset.columns(), found, len(dataset.classes))
    return {**result, "detections": rows, "classes": dataset.classes}


def coco_results(rows, dataset):
    """Detections (D, 7) as a list of dicts in COCO's results format, with the original ids."""
    image_ids = dataset.image_ids.tolist()
    return [{"image_id": image_ids[int(i)], "category_id": dataset.category_ids[int(k)],
             "bbox": [round(v, 3) for v in box], "score": score}
            for i, k, score, *box in rows.tolist() if dataset.category_ids[int(k)] is not None]


# -- COCO box evaluation -------------------------------------------------------------------------

IOU_THRS = np.linspace(0.5, 0.95, 10)
REC_THRS = np.linspace(0, 1, 101)
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2),
               "large": (96**2, 1e10)}                          # square pixels, borders in both


def take(columns, rows):
    """The same rows of every column."""
    return {name: column[rows] for name, column in columns.items()}


def count_before(group):
    """For each entry, how many earlier ones are equal: [7, 5, 7, 7] -> [0, 0, 1, 2], int64 (N,)."""
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return rank


def find_pairs(gt, dt, least_iou):
    """Detections and ground truths of one class whose boxes overlap by `least_iou` or more.

    Columns as in evaluate_columns, gt in order of image. Returns rows d of dt (P,), rows g of gt
    (P,) and iou (P,). With a crowd the overlap is the share of the detection that lies inside.
    """
    pairs, D = [], len(dt["image"])
    for block in np.array_split(np.arange(D), D // 4096 + 1):   # bounds the memory
        first = np.searchsorted(gt["image"], dt["image"][block])
        count = np.searchsorted(gt["image"], dt["image"][block], side="right") - first
        d = np.repeat(block, count)                             # a detection, and its image's
        g = np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(d))  # first, +1, ...
        (dx, dy, dw, dh), (gx, gy, gw, gh) = dt["box"][d].T, gt["box"][g].T
        w = np.minimum(dx + dw, gx + gw) - np.maximum(dx, gx)
        h = np.minimum(dy + dh, gy + gh) - np.maximum(dy, gy)
        union = np.where(gt["crowd"][g], dw * dh, dw * dh + gw * gh - w * h)
        iou = np.divide(w * h, union, out=np.zeros(len(d)), where=(w > 0) & (h > 0))
        keep = iou >= least_iou
        pairs.append((d[keep], g[keep], iou[keep]))
    return [np.concatenate(column) for column in zip(*pairs)]


def match_pairs(d, g, iou, image, ignored, crowd, iou_thrs):
    """Which detections find a ground truth, at each IoU threshold on its own.

    d, g, iou (P,): the pairs, detections numbered by falling score; image (D,) of the detections;
    ignored, crowd (G,) bool. Returns bool (T, D) twice: matched, and matched to an ignored one.

    The detection of highest score chooses first: among the ground truths it reaches and nobody
    has, the one of highest IoU (of equals the last), but any that counts before an ignored one.
    Crowds are never used up. In this order a pair is a match if both sides are still free. Images
    are independent, so step s decides the s-th pair of every image at once.
    """
    (D,), (G,), T = image.shape, ignored.shape, len(iou_thrs)
    order = np.lexsort((-g, -iou, ignored[g], d))               # last key first
    d, g, iou = d[order], g[order], iou[order]
    reached = iou[:, None] >= np.minimum(iou_thrs, 1 - 1e-10)                       # (P, T)
    matched, excused, taken = (np.zeros((n, T), bool) for n in (D, D, G))
    step = count_before(image[d])
    ends = np.cumsum(np.bincount(step))
    for pair in np.split(np.argsort(step, kind="stable"), ends[:-1]):               # (images,)
        di, gi = d[pair], g[pair]                               # no row twice: one pair per image
        new = reached[pair] & ~matched[di] & ~taken[gi]                             # (images, T)
        matched[di] |= new
        excused[di] |= new & ignored[gi, None]
        taken[gi] |= new & ~crowd[gi, None]
    return matched.T, excused.T


def precision_at_recall(tp, fp, score, num_gt, rec_thrs):
    """Precision and score at each recall threshold, and the recall in the end.

    tp, fp (T, N) bool and score (N,), by falling score; a detection may be neither. Returns
    precision (T, R), recall (T,), scores (T, R); a recall that is never reached has 0 and 0.
    """
    keep = tp.any(axis=0)               # precision and recall rise at hits only: they are enough,
    keep[:1] = True                     # with the first detection, where recall 0 is read
    found, wrong = tp[:, keep].cumsum(axis=1), fp.cumsum(axis=1)[:, keep]           # (T, kept)
    precision = found / (found + wrong + np.spacing(1))         # so a first hit has 1 - 2.2e-16
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]   # at this recall or above
    best, score = np.pad(best, ((0, 0), (0, 1))), np.append(score[keep], 0)     # 0: never reached
    at = np.stack([np.searchsorted(recall, rec_thrs) for recall in found / num_gt])     # (T, R)
    return np.take_along_axis(best, at, axis=1), tp.sum(axis=1) / num_gt, score[at]


def summary_rows(max_dets):
    """COCO's 12 numbers: (array, IoU threshold or None for all, area, detections), in order."""
    sizes, most = ("small", "medium", "large"), max_dets[-1]
    return ([("precision", iou, "all", most) for iou in (None, 0.5, 0.75)]
            + [("precision", None, size, most) for size in sizes]
            + [("recall", None, "all", cut) for cut in max_dets]
            + [("recall", None, size, most) for size in sizes])


def mean_over(result, array, iou, area, cut):
    """Mean of "precision" or "recall" over the classes with ground truth, -1.0 if none has."""
    x = result[array][..., list(result["area_ranges"]).index(area), result["max_dets"].index(cut)]
    x = x if iou is None else x[result["iou_thrs"] == iou]
    x = x[x > -1]
    return x.mean() if x.size else -1.0


def evaluate_columns(gt, dt, num_classes, iou_thrs=IOU_THRS, rec_thrs=REC_THRS,
                     max_dets=(1, 10, 100), area_ranges=AREA_RANGES):
    """COCO box evaluation from columns, arrays with one row per box.

    gt: "image" (G,) int64, "category" (G,) int64 below num_classes, "box" (G, 4) float64 x, y, w,
    h in pixels, "area" (G,) float64, "crowd" (G,) bool. dt: "image", "category", "box" alike and
    "score" (D,) float64. Among equal scores the lower image index comes first, so indices must
    follow the image ids; within an image the order of rows decides.

    Returns a dict: "precision" and "scores" (T, R, K, A, M), "recall" (T, K, A, M), for IoU
    thresholds, recall thresholds, classes, areas and max_dets, the best detections per image and
    class; -1 without ground truth. "stats" (12,): AP, AP50, AP75, AP small, medium, large, AR at
    the three max_dets, AR small, medium, large. "num_gt" (K, A) counts what is not ignored.

    Example, at IoU 0.5: two boxes A and B; detections by score overlap A by 0.8, A by 0.6, B by
    0.7. The first takes A, the second comes too late, the third takes B. Precision 1, 1/2, 2/3
    at recall 1/2, 1/2, 1. Best precision at a recall or above: 1 for the 51 thresholds to 0.5,
    2/3 for the other 50, mean 0.835. AP is the mean of this over IoU thresholds and classes.

    Source: cocoeval.py of the COCO API. Ids play no part here, so a ground truth whose id is 0,
    which is lost there, counts; AP is at the last of max_dets, there at 100.
    """
    max_dets = sorted(max_dets)
    if len(max_dets) != 3:
        raise ValueError(f"max_dets {max_dets} should be three numbers, as in (1, 10, 100)")
    T, R, K, A, M = len(iou_thrs), len(rec_thrs), num_classes, len(area_ranges), len(max_dets)
    precision, scores = np.full((2, T, R, K, A, M), -1.0)
    recall, num_gt = np.full((T, K, A, M), -1.0), np.zeros((K, A), np.int64)
    gt = take(gt, np.lexsort((gt["image"], gt["category"])))    # last key first, stable
    dt = take(dt, np.lexsort((dt["image"], -dt["score"], dt["category"])))
    gt_ends, dt_ends = (np.searchsorted(c["category"], np.arange(K + 1)) for c in (gt, dt))
    for k in range(K):
        g, d = take(gt, slice(*gt_ends[k:k + 2])), take(dt, slice(*dt_ends[k:k + 2]))
        rank = count_before(d["image"])                         # in its image, among this class
        d, rank = take(d, rank < max_dets[-1]), rank[rank < max_dets[-1]]
        pairs = find_pairs(g, d, min(*iou_thrs, 1 - 1e-10))
        area = d["box"][:, 2] * d["box"][:, 3]
        for a, (low, high) in enumerate(area_ranges.values()):
            ignored = g["crowd"] | (g["area"] < low) | (g["area"] > high)
            num_gt[k, a] = np.sum(~ignored)
            if num_gt[k, a] == 0:
                continue
            matched, excused = match_pairs(*pairs, d["image"], ignored, g["crowd"], iou_thrs)
            outside = (area < low) | (area > high)              # unmatched, these are excused too
            tp, fp = matched & ~excused, ~(matched | outside)                       # (T, D)
            for m, cut in enumerate(max_dets):
                n = rank < cut
                precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = \
                    precision_at_recall(tp[:, n], fp[:, n], d["score"][n], num_gt[k, a], rec_thrs)
    result = dict(precision=precision, recall=recall, scores=scores, num_gt=num_gt,
                  iou_thrs=np.asarray(iou_thrs), max_dets=max_dets, area_ranges=area_ranges)
    result["stats"] = np.array([mean_over(result, *row) for row in summary_rows(max_dets)])
    return result


def summary(result):
    """The 12 lines that COCO users know, as one string."""
    iou_thrs, lines = result["iou_thrs"], []
    for (array, iou, area, cut), value in zip(summary_rows(result["max_dets"]), result["stats"]):
        name = "Average Precision  (AP)" if array == "precision" else "Average Recall     (AR)"
        span = f"{iou_thrs[0]:.2f}:{iou_thrs[-1]:.2f}" if iou is None else f"{iou:.2f}"
        where = f"IoU={span:<9} | area={area:>6} | maxDets={cut:>3}"
        lines.append(f" {name} @[ {where} ] = {value:.3f}")
    return "\n".join(lines)


def read_numbers(records, what, field, *shape):
    """One field of all records, (n, *shape) float64. ValueError names the first record at fault.

    Numbers must be finite and, where the field is a box, width and height 0 or more.
    """
    def read(records):
        try:
            x = np.array([r[field] for r in records])
        except (KeyError, TypeError, ValueError):               # absent, no dict, uneven lengths
            return None
        ok = x.dtype.kind in "iuf" and x.shape[1:] == shape and np.isfinite(x).all()
        return x.astype(np.float64) if ok and (x[..., 2:] >= 0).all() else None

    values = read(records) if records else np.zeros((0, *shape))
    if values is None:
        i, r = next((i, r) for i, r in enumerate(records) if read([r]) is None)
        wanted = "[x, y, width, height] with sizes 0 or more" if shape else "a finite number"
        raise ValueError(f"{what} {i} should have {wanted} as its {field}, correct or drop it: "
                         f"{str(r)[:300]}")
    return values


def id_index(gt, field):
    """Id -> index by ascending id, of gt["images"] or gt["categories"]."""
    try:
        return {id_: i for i, id_ in enumerate(sorted({r["id"] for r in gt[field]}))}
    except (KeyError, TypeError):
        raise ValueError(f"ground truth: {field!r} should list dicts that have an 'id', all int or "
                         "all str; is this a COCO instances file?") from None


def describe(ids):
    """How many ids, the first, the last and their types, for an error message."""
    ids = sorted(set(ids), key=lambda i: (type(i).__name__, i))
    types = " and ".join(sorted({type(i).__name__ for i in ids}))
    return f"{len(ids)} ids, {ids[0]!r} to {ids[-1]!r} ({types})" if ids else "no ids"


def check_listed(dt, field, index):
    """Raises ValueError, showing the ids of both sides, if a detection's id is not in index."""
    bad = [i for i, r in enumerate(dt) if r.get(field) not in index]
    if bad:
        first = list(dict.fromkeys(dt[i].get(field) for i in bad))[:5]
        raise ValueError(f"{len(bad)} of {len(dt)} detections (first: detection {bad[0]}) have a "
                         f"value of {field} the ground truth does not list: {first}. They have "
                         f"{describe(r.get(field) for r in dt)}; the ground truth has "
                         f"{describe(index)}. Use the file they were made for and its ids")


def coco_eval(gt, dt, iou_type="bbox"):
    """COCO box evaluation of a results file: what evaluate_columns returns, and names.

    gt: COCO instances dict or its path; dt: list of {"image_id", "category_id", "bbox": [x, y, w,
    h] in pixels, "score"} or its path. Without "iscrowd" a ground truth is none, without "area"
    it is w * h; those of unlisted images or categories do not take part. Adds "category_ids"
    (ascending), "classes" (their names), "ap_per_class" and "ap50_per_class" (name -> float, nan
    without ground truth). Raises ValueError or FileNotFoundError naming the file or record.
    """
    if iou_type != "bbox":
        raise ValueError(f"iou_type {iou_type!r} is not supported here, only 'bbox' is")
    gt = gt if isinstance(gt, dict) else read_json(gt, "a COCO instances file")
    dt = dt if isinstance(dt, list) else read_json(
        dt, "a list of detections in COCO results format")
    if not isinstance(gt, dict):
        raise ValueError(f"ground truth should be a COCO instances dict, not a {type(gt).__name__}")
    if not isinstance(dt, list):
        raise ValueError(f"detections should be a list of dicts, not a {type(dt).__name__}")
    images, categories = id_index(gt, "images"), id_index(gt, "categories")

    def columns(records, what):
        box = read_numbers(records, what, "bbox", 4)
        image = [images.get(r.get("image_id"), -1) for r in records]                # -1: unlisted
        category = [categories.get(r.get("category_id"), -1) for r in records]
        return dict(box=box, image=np.array(image, np.int64), category=np.array(category, np.int64))

    dt_columns = columns(dt, "detection")
    dt_columns["score"] = read_numbers(dt, "detection", "score")
    check_listed(dt, "image_id", images)
    check_listed(dt, "category_id", categories)
    truths = gt.get("annotations", [])
    gt_columns = columns(truths, "annotation")
    truths = [{"area": w * h, **r} for r, (w, h) in zip(truths, gt_columns["box"][:, 2:].tolist())]
    gt_columns["area"] = read_numbers(truths, "annotation", "area")
    gt_columns["crowd"] = np.array([bool(r.get("iscrowd")) for r in truths], bool)
    listed = (gt_columns["image"] >= 0) & (gt_columns["category"] >= 0)

    result = evaluate_columns(take(gt_columns, listed), dt_columns, len(categories))
    names = {r["id"]: r.get("name", str(r["id"])) for r in gt["categories"]}
    classes = [names[i] for i in categories]
    ap = result["precision"][:, :, :, 0, -1]                                        # (T, R, K)
    ap = np.where(ap > -1, ap, np.nan).mean(axis=1)                                 # (T, K)
    result.update(category_ids=list(categories), classes=classes,
                  ap_per_class=dict(zip(classes, ap.mean(axis=0).tolist())),
                  ap50_per_class=dict(zip(classes, ap[0].tolist())))
    return result


# -- python evaluate.py --------------------------------------------------------------------------

def load_detector(path, dilation=False):
    """A checkpoint's model, and a dict of what belongs to it: "classes" (names by output; "" for
    one that was never used), "train" (options it was trained with, {} for official files).

    Official files say nothing of themselves: the layout is read off the tensors, DC5 off the name
    of the file or `dilation`. Raises as read_checkpoint and load_weights do.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict) and "model_config" in state:
        model = build_model(ModelConfig(**state["model_config"]))
        info = {"classes": state["classes"], "category_ids": state["category_ids"],
                "train": state["train_config"]}
    else:
        weights = state.get("model", state) if isinstance(state, dict) else {}
        if not {"class_embed.bias", "query_embed.weight"} <= set(weights):
            raise ValueError(f"{path} holds no detector: give a checkpoint of train.py or an "
                             f"officially released DETR file")
        args = state.get("args")                                     # of training checkpoints
        dilation |= "dc5" in os.path.basename(path) or getattr(args, "dilation", False)
        model = build_model(official_config(weights, dilation, getattr(args, "nheads", 8)))
        K = model.cfg.num_classes
        names = COCO_CLASSES if K == len(COCO_CLASSES) else [f"class {k}" for k in range(K)]
        info = {"classes": list(names), "category_ids": list(range(K)), "train": {}}
    load_weights(model, state)
    return model.to(memory_format=torch.channels_last), info


def check_device(device):
    """The device's name, if it can be used; ValueError otherwise."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    return device


def official_config(state, dilation, nheads):
    """The ModelConfig of an official DETR's state dict."""
    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
    stage3 = count("backbone.0.body.layer3.")
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    backbone = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50",
                (True, 23): "resnet101"}.get((bottleneck, stage3), "")
    ff, C = state["transformer.decoder.layers.0.linear1.weight"].shape
    return ModelConfig(
        backbone=backbone, dilation=dilation, nheads=nheads, hidden_dim=C, dim_feedforward=ff,
        position_embedding="learned" if "backbone.1.row_embed.weight" in state else "sine",
        enc_layers=count("transformer.encoder.layers."),
        dec_layers=count("transformer.decoder.layers."),
        pre_norm="transformer.encoder.norm.weight" in state,
        num_queries=len(state["query_embed.weight"]),
        num_classes=len(state["class_embed.bias"]) - 1)


def find_validation(args, info):
    """The data set to evaluate on: that of the command line, else that of the checkpoint."""
    train = info["train"]
    size = dict(image_size=args.image_size or train.get("image_size", 800),
                max_size=args.max_size or train.get("max_size", 1333))
    if bool(args.val_json) != bool(args.val_images):
        raise ValueError("--val_json and --val_images belong together, give both")
    overfit = 0 if args.data or args.val_json else train.get("overfit", 0)
    split = "train" if overfit else "val"                            # of --overfit: its own images
    data = args.data or (not args.val_json and train.get("data"))
    if data:
        paths = (os.path.join(data, f"annotations/instances_{split}2017.json"),
                 os.path.join(data, f"{split}2017"))
    else:
        paths = (args.val_json or train.get(f"{split}_json"),
                 args.val_images or train.get(f"{split}_images"))
    if paths[0]:
        dataset = CocoDataset(*paths, **size, classes=info["classes"])
    elif train:
        dataset = ShapesDataset(split, train[f"{split}_shapes"], size["image_size"])
    else:
        raise ValueError("an official file does not say what to evaluate it on: give --data DIR, "
                         "or --val_json and --val_images")
    return dataset.keep(overfit) if overfit else dataset


def class_table(result):
    """Average precision by class, the best first, as lines; classes without objects left out."""
    precision, counts = result["precision"][..., 0, -1], result["num_gt"][:, 0]    # (T, R, K), (K,)
    rows = [(precision[:, :, k].mean(), precision[0, :, k].mean(), counts[k], name)
            for k, name in enumerate(result["classes"]) if precision[0, 0, k] > -1]
    width = max([5] + [len(row[3]) for row in rows])
    lines = [f"{'class':{width}s}     AP   AP50  objects"]
    lines += [f"{name:{width}s}  {ap:5.3f}  {ap50:5.3f}  {n:7d}" for ap, ap50, n, name in
              sorted(rows, reverse=True)]
    return "\n".join(lines)


def parse_args(argv):
    """The command line as a Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="of train.py, or an officially released file")
    parser.add_argument("--data", default="", help="COCO folder: annotations/, val2017/")
    parser.add_argument("--val_json", default="", help="COCO instances file of any layout")
    parser.add_argument("--val_images", default="", help="its image folder")
    parser.add_argument("--save_json", default="",
                        help="write the detections in COCO results format")
    parser.add_argument("--image_size", type=int, default=0,
                        help="shorter side; 0: as in training, 800")
    parser.add_argument("--max_size", type=int, default=0,
                        help="longest side; 0: as in training, 1333")
    parser.add_argument("--batch_size", type=int, default=4, help="images of like shape at a time")
    parser.add_argument("--dilation", action="store_true", help="an official DC5 file, if renamed")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gt", default="", help="COCO instances file, with --dt: no model is run")
    parser.add_argument("--dt", default="", help="detections in COCO results format")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bool(args.gt) != bool(args.dt) or bool(args.gt) == bool(args.checkpoint):
        raise ValueError("give a checkpoint, or --gt together with --dt")
    if args.gt:
        result = coco_eval(args.gt, args.dt)
        print(summary(result) + "\n\n" + class_table(result))
        return
    model, info = load_detector(args.checkpoint, args.dilation)
    dataset = find_validation(args, info)
    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, args.batch_size),
                        num_workers=args.num_workers, collate_fn=collate)
    print(f"{args.checkpoint}: {model.cfg.backbone}, {model.cfg.mixer}; {len(dataset)} images, "
          f"{sum(map(bool, dataset.classes))} classes; {args.device}, float32")
    result = evaluate(model.to(check_device(args.device)), loader, args.device)
    print(summary(result) + "\n\n" + class_table(result))
    if args.save_json:
        with open(args.save_json, "w") as file:
            json.dump(coco_results(result["detections"], dataset), file)
        print(f"detections: {args.save_json}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {str(error).split('ValueError: ')[-1].strip()}")
