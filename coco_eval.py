"""The COCO evaluation in numpy: average precision of boxes and masks. One file to copy.

    python coco_eval.py --gt instances.json --dt detections.json
    python coco_eval.py --gt instances.json --dt detections.json --iou_type segm --json out.json
    python coco_eval.py --gt instances.json --dt detections.json --errors confusion.png

In Python, coco_eval takes COCO's formats, as files or as dicts and lists; evaluate_columns takes
columns, which a training loop has at hand. Columns are a dict of arrays, one row per object:

    ground truth  "image" and "category" (G,) int64 indices, "box" (G, 4) float64 x, y, width,
                  height in pixels, finite, "area" (G,) float64 square pixels, "crowd" (G,) bool;
                  optional: "never_found" (G,) bool, objects that no detection can find
    detections    "image", "category" (D,) and "box" (D, 4) likewise, "score" (D,) float64;
                  optional: "area" (D,), otherwise width * height
    both          optional: "mask", an object array of mask_edges. Masks are then compared in place
                  of the boxes, which must enclose them

The evaluation stands first, up to ap_table; masks and the reading of COCO files follow it. For
--errors, diagnose.py and pillow must be there, too.
Source: arXiv:1405.0312 and cocodataset.org/#detection-eval.
"""

import argparse
import difflib
import gc
import json
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np


class UserError(ValueError):
    """A sentence for whoever gave the input, printed as one line; every other exception is a bug
    and keeps its traceback. (Here, as this file imports no other.)"""

    def __str__(self):                      # a DataLoader puts its worker's traceback before it
        return super().__str__().split(f"{type(self).__name__}: ")[-1].strip()


class UserFileError(UserError, FileNotFoundError):
    """The same about a file that is not there, or cannot be read or written."""


class UserIndexError(UserError, IndexError):
    """The same where pycocotools raises an IndexError."""


def run_command(main):
    """A command's main(): a UserError becomes one line, a closed pipe (`| head`) a silent end."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        os._exit(141)                       # 128 + SIGPIPE


@contextmanager
def writing(path):
    """Turns an OSError of writing a file into a UserFileError."""
    try:
        yield
    except OSError as error:
        raise UserFileError(f"{path} cannot be written ({error}): make room, or give another "
                            f"place") from None


# -- average precision ---------------------------------------------------------------------------

IOU_THRS = np.linspace(0.5, 0.95, 10)
REC_THRS = np.linspace(0, 1, 101)
MAX_DETS = (1, 10, 100)                                         # per image and class
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2),
               "large": (96**2, 1e10)}                          # square pixels, a border is in both


def take(columns, rows):
    """The same rows of every column."""
    return {name: column[rows] for name, column in columns.items()}


def count_before(group):
    """For each entry, how many earlier ones are equal: [7, 5, 7, 7] -> [0, 0, 1, 2], int64 (N,)."""
    order = np.argsort(group, kind="stable")
    count = np.empty_like(order)
    count[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return count


def with_cells(gt, dt):
    """Both with "cell", a number for each pair of class and image, and gt sorted by it: objects
    compete within a cell."""
    images = 1 + max(gt["image"].max(initial=0), dt["image"].max(initial=0))
    gt = dict(gt, cell=gt["category"] * images + gt["image"])
    dt = dict(dt, cell=dt["category"] * images + dt["image"])
    return take(gt, np.argsort(gt["cell"], kind="stable")), dt


def best_detections(dt, most):
    """The `most` detections of highest score in each cell, sorted by class, falling score and
    image (equals keep their order), with "rank" in the cell and "row" in the class, from 0."""
    order = np.lexsort((dt["image"], -dt["score"], dt["category"]))     # last key first, stable
    rank = count_before(dt["cell"][order])
    best = take(dt, order[rank < most])
    return dict(best, rank=rank[rank < most], row=count_before(best["category"]))


def of_class(columns, k):
    """The rows of class k, of columns sorted by class."""
    return take(columns, slice(*np.searchsorted(columns["category"], [k, k + 1])))


def box_overlap(dt, gt, crowd):
    """IoU of pairs of boxes (P, 4) x, y, w, h, (P,); with a crowd, the share of dt inside it."""
    (dx, dy, dw, dh), (gx, gy, gw, gh) = dt.T, gt.T
    w = np.minimum(dx + dw, gx + gw) - np.maximum(dx, gx)
    h = np.minimum(dy + dh, gy + gh) - np.maximum(dy, gy)
    union = np.where(crowd, dw * dh, dw * dh + gw * gh - w * h)
    return np.divide(w * h, union, out=np.zeros(len(dt)), where=(w > 0) & (h > 0))


def find_pairs(gt, dt, least_iou):
    """The pairs of a detection and a ground truth of one cell that have this IoU or a higher one.

    gt must be sorted by "cell". Returns rows d of dt (P,), rows g of gt (P,) and iou (P,), sorted
    by d, then falling iou, then falling g.
    """
    # the ground truth of a detection's cell: `count` rows from row `first` on
    first = np.searchsorted(gt["cell"], dt["cell"])
    count = np.searchsorted(gt["cell"], dt["cell"], side="right") - first

    # blocks of detections with about 2**17 pairs, which bounds the memory
    rows = np.flatnonzero(count)
    block = np.cumsum(count[rows]) // 2**17
    pairs = []
    for rows in np.split(rows, np.flatnonzero(np.diff(block)) + 1):
        n = count[rows]
        d = np.repeat(rows, n)
        start = np.cumsum(n) - n                                # of each row's pairs
        g = np.repeat(first[rows] - start, n) + np.arange(len(d))   # first, first + 1, ...
        iou = box_overlap(dt["box"][d], gt["box"][g], gt["crowd"][g])
        if "mask" in dt and iou.any():                          # masks meet only where boxes do
            i = np.flatnonzero(iou)
            iou[i] = mask_overlap(dt["mask"][d[i]], gt["mask"][g[i]], gt["crowd"][g[i]])
        keep = iou >= least_iou
        pairs.append((d[keep], g[keep], iou[keep]))

    d, g, iou = (np.concatenate(column) for column in zip(*pairs))
    order = np.lexsort((-g, -iou, d))                           # last key first
    return d[order], g[order], iou[order]


def match_pairs(pairs, cell, ignored, crowd, iou_thrs):
    """The ground truth that each detection finds: rows of gt, int64 (D, T), -1 for none.

    pairs: d, g and iou of find_pairs, d numbering the D candidates; cell (D,) of these, which are
    sorted by falling score; ignored, crowd (G,) bool; iou_thrs (T,), each matched on its own. The
    detection of highest score chooses first: of the ground truths that are not taken, that of
    highest IoU (of equals the last), but any that counts before an ignored one. Any number of
    detections may find a crowd.
    """
    # each detection's pairs in the order in which it chooses
    d, g, iou = pairs
    order = np.lexsort((ignored[g], d))                         # last key first, stable: IoU falls
    d, g = d[order], g[order]
    reached = iou[order, None] >= iou_thrs                                          # (P, T)

    # matching is now greedy: a pair is a match if neither side is taken. Cells are independent, so
    # step s decides the s-th pair of every cell
    gt_of_det = np.full((len(cell), len(iou_thrs)), -1)
    taken = np.zeros((len(crowd), len(iou_thrs)), bool)
    step = count_before(cell[d])
    ends = np.cumsum(np.bincount(step))
    for pair in np.split(np.argsort(step, kind="stable"), ends[:-1]):               # (cells,)
        di, gi = d[pair], g[pair]                               # no row twice: one pair per cell
        new = reached[pair] & (gt_of_det[di] < 0) & ~taken[gi]                      # (cells, T)
        gt_of_det[di] = np.where(new, gi[:, None], gt_of_det[di])
        taken[gi] |= new & ~crowd[gi, None]
    return gt_of_det


def judge(gt, dt, candidates, pairs, area_range, iou_thrs):
    """Who counts within a range of areas: ignored (G,), and dt and candidates with new columns.

    ignored: crowds and ground truth of other areas; a detection that finds one is neither right
    nor wrong. "in_area" (D,): detections that are wrong if they find nothing. "matched" and
    "true_positive" (C, T): candidates that find a ground truth, and one that is not ignored.
    """
    low, high = area_range
    ignored = gt["crowd"] | (gt["area"] < low) | (gt["area"] > high)
    in_area = (dt["area"] >= low) & (dt["area"] <= high)
    gt_of_det = match_pairs(pairs, candidates["cell"], ignored, gt["crowd"], iou_thrs)
    in_vain = gt["never_found"] & ~ignored                      # taken, but not as a match
    matched = (gt_of_det >= 0) & ~in_vain[gt_of_det]            # -1 reads any row  # (C, T)
    true_positive = matched & ~ignored[gt_of_det]
    return (ignored, dict(dt, in_area=in_area),
            dict(candidates, matched=matched, true_positive=true_positive))


def precision_at_recall(dt, candidates, num_gt, rec_thrs, most):
    """The curve of one class: a dict of "precision" and "scores" (T, R) and "recall" (T,).

    dt, candidates: columns of judge; num_gt: how many are to be found; of each image the `most`
    best detections take part. Precision and score are those at which a recall threshold is reached,
    0 for one that is not; recall is that of all detections.
    """
    candidates = take(candidates, candidates["rank"] < most)
    row, matched = candidates["row"], candidates["matched"]
    in_area = dt["in_area"] & (dt["rank"] < most)

    # precision at each candidate. Wrong: detections up to it that should have matched and did not.
    # COCO's epsilon makes the precision of a perfect first hit 1 - 2.2e-16
    right = candidates["true_positive"].cumsum(axis=0)                              # (C, T)
    counted = in_area.cumsum()[row, None]                       # (C, 1) detections up to each
    hits = (matched & in_area[row, None]).cumsum(axis=0)        # (C, T) of them, with a match
    wrong = counted - hits
    precision = right / (right + wrong + np.spacing(1))

    # the best precision at this recall or a higher one, and 0 for a recall that is not reached
    best = np.maximum.accumulate(precision[::-1])[::-1]
    best = np.vstack([best, np.zeros(best.shape[1])])                               # (C + 1, T)
    score = np.append(dt["score"][row], 0)

    # where each recall threshold is reached; the score at recall 0 is that of the best detection
    needed = np.searchsorted(np.arange(num_gt + 1) / num_gt, rec_thrs)              # (R,) hits
    first = np.stack([np.searchsorted(column, needed) for column in right.T])       # (T, R)
    scores = score[first]
    scores[:, needed == 0] = dt["score"][0] if len(dt["score"]) else 0
    return dict(precision=best[first, np.arange(len(first))[:, None]], scores=scores,
                recall=candidates["true_positive"].sum(axis=0) / num_gt)


def evaluate_columns(gt, dt, num_classes, iou_thrs=IOU_THRS, rec_thrs=REC_THRS, max_dets=MAX_DETS,
                     area_ranges=AREA_RANGES, strict=False):
    """COCO evaluation from columns, see the top of this file; categories are below num_classes.

    Of equal scores, that of the lower image index is taken as the higher one, so indices should
    follow the image ids; within an image the order of rows decides. strict: see summary_rows.

    Returns a dict: "precision" and "scores" (T, R, K, A, M), "recall" (T, K, A, M), for IoU
    thresholds, recall thresholds, classes, areas and max_dets, the best detections per image and
    class, -1 without ground truth; "num_gt" (K, A), ground truth that is not ignored; "stats"
    (12,), see summary_rows; "columns", gt and dt; and the arguments from iou_thrs on.

    Example, at IoU 0.5: two boxes A and B; detections by score overlap A by 0.8, A by 0.6, B by
    0.7. The first takes A, the second comes too late, the third takes B. Precision 1, 1/2, 2/3
    at recall 1/2, 1/2, 1. Best precision at a recall or above: 1 for the 51 thresholds to 0.5,
    2/3 for the other 50, mean 0.835. AP is the mean of this over IoU thresholds and classes.
    Source: cocoeval.py of the COCO API.
    """
    T, R, K, A, M = len(iou_thrs), len(rec_thrs), num_classes, len(area_ranges), len(max_dets)
    result = dict(iou_thrs=np.asarray(iou_thrs, np.float64), max_dets=sorted(map(int, max_dets)),
                  rec_thrs=np.asarray(rec_thrs, np.float64), area_ranges=area_ranges, strict=strict,
                  precision=np.full((T, R, K, A, M), -1.0), recall=np.full((T, K, A, M), -1.0),
                  scores=np.full((T, R, K, A, M), -1.0), num_gt=np.zeros((K, A), np.int64),
                  columns=(gt, dt))
    gt = {"never_found": np.zeros(len(gt["image"]), bool), **gt}
    dt = {"area": dt["box"][:, 2] * dt["box"][:, 3], **dt}

    # the pairs that may match, and the candidates: those detections that are in a pair
    gt, dt = with_cells(gt, dt)
    dt = best_detections(dt, result["max_dets"][-1])
    thresholds = np.minimum(result["iou_thrs"], 1 - 1e-10)      # 1 allows for rounding
    d, g, iou = find_pairs(gt, dt, thresholds.min())
    of_candidate, d = np.unique(d, return_inverse=True)         # d is now a row of candidates
    candidates = {name: dt[name][of_candidate] for name in ("cell", "category", "rank", "row")}

    # a matching for each range of areas, a curve for each class and number of detections
    for a, area_range in enumerate(area_ranges.values()):
        ignored, judged, found = judge(gt, dt, candidates, (d, g, iou), area_range, thresholds)
        num_gt = np.bincount(gt["category"][~ignored], minlength=K)
        result["num_gt"][:, a] = num_gt
        for k in np.flatnonzero(num_gt):
            own, own_found = of_class(judged, k), of_class(found, k)
            for m, most in enumerate(result["max_dets"]):
                curve = precision_at_recall(own, own_found, num_gt[k], rec_thrs, most)
                for name, values in curve.items():
                    result[name][..., k, a, m] = values

    rows = summary_rows(result["max_dets"], strict)
    result["stats"] = np.array([mean_over(result, *row) for row in rows])
    return result


def summary_rows(max_dets, strict=False):
    """COCO's 12 numbers: (array, IoU threshold or None for all, area, detections), in order.

    AP and the recalls by size are at the last of max_dets, which ascend, the other three recalls at
    the first, second and last. strict, as pycocotools: max_dets[2] stands for the last, IndexError
    if there is none; and the first AP is at exactly 100.
    """
    sizes = "small", "medium", "large"
    last = max_dets[2] if strict else max_dets[-1]
    second = max_dets[1] if len(max_dets) > 1 else max_dets[0]
    return ([("precision", None, "all", 100 if strict else last)]
            + [("precision", iou, "all", last) for iou in (0.5, 0.75)]
            + [("precision", None, size, last) for size in sizes]
            + [("recall", None, "all", most) for most in (max_dets[0], second, last)]
            + [("recall", None, size, last) for size in sizes])


def mean_over(result, array, iou, area, most):
    """Mean of "precision" or "recall" over the classes with ground truth, -1.0 if none has."""
    x = result[array][..., [name == area for name in result["area_ranges"]], :]
    x = x[..., [n == most for n in result["max_dets"]]]
    if iou is not None:
        x = x[result["iou_thrs"] == iou]
    x = x[x > -1]
    return x.mean() if x.size else -1.0


def per_class(result):
    """A dict for each class with a name: "id", "name", "objects", and "AP", "AP50", "AR" over all
    areas at the most detections, nan without ground truth or without that IoU threshold."""
    a = list(result["area_ranges"]).index("all") if "all" in result["area_ranges"] else 0
    ap = result["precision"][..., a, -1].mean(axis=1)                               # (T, K)
    ar = result["recall"][..., a, -1]                                               # (T, K)
    ap, ar = np.where(ap > -1, ap, np.nan), np.where(ar > -1, ar, np.nan)
    at_half = np.flatnonzero(result["iou_thrs"] == 0.5)
    ap50 = ap[at_half[0]] if len(at_half) else np.full(ap.shape[1], np.nan)

    columns = (result["category_ids"], result["classes"], result["num_gt"][:, a].tolist(),
               ap.mean(axis=0).tolist(), ap50.tolist(), ar.mean(axis=0).tolist())
    rows = [dict(zip(("id", "name", "objects", "AP", "AP50", "AR"), row)) for row in zip(*columns)]
    return [row for row in rows if row["name"]]


def summary(result):
    """The 12 lines that COCO users know, as one string."""
    iou_thrs, lines = result["iou_thrs"], []
    rows = summary_rows(result["max_dets"], result["strict"])
    for (array, iou, area, most), value in zip(rows, result["stats"]):
        name = "Average Precision  (AP)" if array == "precision" else "Average Recall     (AR)"
        span = f"{iou_thrs[0]:.2f}:{iou_thrs[-1]:.2f}" if iou is None else f"{iou:.2f}"
        where = f"IoU={span:<9} | area={area:>6} | maxDets={most:>3}"
        lines.append(f" {name} @[ {where} ] = {value:.3f}")
    return "\n".join(lines)


def ap_table(result):
    """Average precision by class, the best first, as lines; "-" for a class without objects."""
    rows = sorted(per_class(result), key=lambda r: (r["objects"] == 0, -r["AP"], r["name"]))
    width = max([5] + [len(r["name"]) for r in rows])
    lines = [f"{'class':{width}}     AP   AP50  objects"]
    for r in rows:
        ap, ap50 = (f"{r[name]:.3f}" if r["objects"] else "-" for name in ("AP", "AP50"))
        lines.append(f"{r['name']:{width}}  {ap:>5}  {ap50:>5}  {r['objects']:7d}")
    return "\n".join(lines)


# -- masks ---------------------------------------------------------------------------------------
#
# A mask of h x w pixels is the list of its edges, int64: the pixels are counted column by column,
# and its runs go from edge 0 to before edge 1, from edge 2 to before edge 3, and so on.

def mask_edges(segmentation, h, w):
    """The edges of a COCO segmentation: polygons, or a run-length code, compressed or not.

    Raises ValueError for what is neither, or has not h x w pixels. Source: maskApi.c of the COCO
    API; the polygons of one object are united.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("an empty list of polygons")
        return unite([polygon_edges(ring, h, w) for ring in segmentation])
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("neither a list of polygons nor a dict of 'size' and 'counts'")
    counts = segmentation["counts"]
    counts = unpack_counts(counts) if isinstance(counts, (str, bytes)) else np.array(counts)
    if list(segmentation["size"]) != [h, w]:
        raise ValueError(f"size {segmentation['size']} in an image of {[h, w]}, height and width")
    if counts.dtype.kind != "i" or counts.ndim != 1 or counts.sum() != h * w \
            or counts.min() < 0 or counts.max() > h * w:
        raise ValueError(f"counts that are no runs of {h} x {w} = {h * w} pixels")
    return np.cumsum(counts)[:len(counts) // 2 * 2]             # the first run is background


def unpack_counts(text):
    """Run lengths from COCO's compressed form: 5 bits of a number a character, the lowest first;
    from the third number on, the difference to the run two before."""
    code = text.encode() if isinstance(text, str) else text
    x = np.frombuffer(code, np.uint8).astype(int) - 48
    last = (x & 32) == 0                                        # character of its number
    if not len(x) or (x < 0).any() or (x > 63).any() or not last[-1]:
        raise ValueError("compressed counts that are cut short or not of this code")
    number = np.cumsum(last) - last                             # which one a character belongs to
    place = count_before(number)                                # and where in it
    if place.max() > 10:
        raise ValueError("compressed counts with a number beyond all images")
    sign = np.where(last & (x & 16 > 0), -32 << 5 * place, 0)   # two's complement
    counts = np.zeros(number[-1] + 1, np.int64)
    np.add.at(counts, number, ((x & 31) << 5 * place) + sign)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def polygon_edges(ring, h, w):
    """Edges of one polygon, x0, y0, x1, y1, ... in pixels: inside by even and odd crossings."""
    ring = np.array(ring)
    if ring.dtype.kind not in "iuf" or ring.ndim != 1 or len(ring) < 6 or len(ring) % 2:
        raise ValueError("a polygon that is not x, y of three points or more")
    if not (np.abs(ring) < 1e6).all():
        raise ValueError("a polygon with a coordinate beyond a million pixels")

    # its sides, on a grid five times finer
    x, y = np.trunc(5.0 * ring + 0.5).astype(np.int64).reshape(-1, 2).T
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    length = np.maximum(np.abs(x1 - x), np.abs(y1 - y))         # steps, along the longer axis
    if length.sum() > 2**22:                                    # bounds the memory
        raise ValueError("a polygon with an outline of more than 800,000 pixels")

    # each side from its lower end, so that it is rounded alike in both directions
    steep = np.abs(x1 - x) < np.abs(y1 - y)
    back = np.where(steep, y > y1, x > x1)
    x, x1 = np.where(back, x1, x), np.where(back, x, x1)
    y, y1 = np.where(back, y1, y), np.where(back, y, y1)
    slope = np.where(steep, x1 - x, y1 - y) / np.maximum(length, 1)

    # all points u, v of the outline, in its own direction again
    side = np.repeat(np.arange(len(x)), length + 1)
    t = count_before(side)
    t = np.where(back[side], length[side] - t, t)
    along = np.where(steep, y, x)[side] + t
    across = np.where(steep, x, y)[side] + slope[side] * t
    across = np.trunc(across + 0.5).astype(np.int64)
    u, v = np.where(steep[side], across, along), np.where(steep[side], along, across)

    # where the outline enters another column of pixels, a run of pixels begins or ends
    step = np.flatnonzero(np.diff(u))
    column = (np.minimum(u[step], u[step + 1]) + 0.5) / 5 - 0.5
    row = (np.minimum(v[step], v[step + 1]) + 0.5) / 5 - 0.5
    row = np.ceil(row.clip(0, h))
    inside = (column == np.floor(column)) & (column >= 0) & (column <= w - 1)
    return np.sort((column * h + row)[inside].astype(np.int64))     # even: it goes there and back


def unite(masks):
    """The edges of the union of masks."""
    edges = np.concatenate(masks)
    change = np.tile([1, -1], len(edges) // 2)                  # a run begins, a run ends
    order = np.lexsort((-change, edges))                        # touching runs become one
    depth = np.cumsum(change[order])                            # masks that cover what follows
    begins = (depth == 1) & (change[order] == 1)
    return edges[order][begins | (depth == 0)]


def mask_box(mask, h):
    """x, y, w, h of the box around a mask; a run over several columns spans all rows."""
    runs = mask.reshape(-1, 2)[mask[1::2] > mask[::2]]          # (runs, 2), without empty ones
    if not len(runs):
        return [0, 0, 0, 0]
    x, y = divmod(runs[:, 0], h)
    x1, y1 = divmod(runs[:, 1] - 1, h)
    top, bottom = (0, h - 1) if (x < x1).any() else (y.min(), y1.max())
    return [x.min(), top, x1.max() - x.min() + 1, bottom - top + 1]


def mask_overlap(dt, gt, crowd):
    """IoU of pairs of masks, two object arrays (P,); with a crowd, the share of dt inside it."""
    # all pairs on one line of pixels, one after the other
    size = 1 + max(mask.max(initial=0) for mask in (*dt, *gt))
    pair = np.arange(len(dt))
    d_pair = np.repeat(pair, [len(mask) for mask in dt])
    g_pair = np.repeat(pair, [len(mask) for mask in gt])
    d, g = np.concatenate(dt) + size * d_pair, np.concatenate(gt) + size * g_pair

    # pixels of dt before each edge of gt: in the runs that end before it, and in the next run
    length = d[1::2] - d[::2]
    run = np.searchsorted(d[1::2], g)
    before = np.append(0, np.cumsum(length))[run]
    before += np.maximum(g - np.append(d[::2], g.max(initial=0))[run], 0)

    dt_area = np.bincount(d_pair[::2], length, len(pair))
    gt_area = np.bincount(g_pair[::2], g[1::2] - g[::2], len(pair))
    both = np.bincount(g_pair[::2], before[1::2] - before[::2], len(pair))
    union = np.where(crowd, dt_area, dt_area + gt_area - both)
    return np.divide(both, union, out=np.zeros(len(pair)), where=both > 0)


# -- reading of COCO files -----------------------------------------------------------------------

def read_json(path, what, object_hook=None):
    """The JSON in a file; errors name the file, `what` says what it should hold.

    object_hook(dict) returns what takes the place of each object, as in json.load.
    """
    collects = gc.isenabled()
    gc.disable()                                    # it would rescan the growing tree many times
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_hook=object_hook)
    except FileNotFoundError:
        raise UserFileError(f"{path} not found: it should hold {what}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it should hold {what}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): it should hold {what}") from None
    finally:
        if collects:
            gc.enable()


def read_sides(gt, dt):
    """Ground truth and detections, as they are or from their files, and what errors call a record
    of each."""
    gt_record, dt_record = "annotation", "detection"
    if isinstance(gt, (str, os.PathLike)):
        gt, gt_record = read_json(gt, "a COCO instances file"), f"{gt}: annotation"
    if isinstance(dt, (str, os.PathLike)):
        what = "a list of detections in COCO results format"
        dt, dt_record = read_json(dt, what), f"{dt}: detection"
    if isinstance(dt, np.ndarray) and dt.ndim == 2 and dt.shape[1] == 7:    # so does pycocotools
        dt = [dict(image_id=i, bbox=box, score=s, category_id=k) for i, *box, s, k in dt.tolist()]

    if not isinstance(gt, dict) or not isinstance(gt.get("annotations") or [], list):
        raise UserError(f"{gt_record}s: the ground truth should be a COCO instances dict with a "
                        f"list of annotations, not a {type(gt).__name__}; are the two swapped?")
    if not isinstance(dt, (list, tuple)):
        raise UserError(f"{dt_record}s: they should be a list of dicts, not a "
                        f"{type(dt).__name__}; are the two swapped?")
    return gt, dt, gt_record, dt_record


def as_numbers(values):
    """The values as a float64 array; None if one is not a number, or they are uneven."""
    try:
        x = np.asarray(values)
    except ValueError:
        return None
    return x.astype(np.float64) if x.dtype.kind in "biuf" else None


def check_parameters(iou_type, iou_thrs, rec_thrs, max_dets, area_ranges):
    """Raises ValueError for what evaluate_columns cannot take."""
    if iou_type not in ("bbox", "segm"):
        raise UserError(f"iou_type {iou_type!r} is unknown, use 'bbox' or 'segm'")
    for name, values in (("iou_thrs", iou_thrs), ("rec_thrs", rec_thrs), ("max_dets", max_dets)):
        x = as_numbers(values)
        if x is None or x.ndim != 1 or not len(x) or not np.isfinite(x).all():
            raise UserError(f"{name} {values!r} should be a list of one number or more")
        if name == "rec_thrs" and (np.diff(x) < 0).any():
            raise UserError(f"rec_thrs {values!r} should ascend")
        if name == "max_dets" and ((x < 1) | (x % 1 > 0)).any():
            raise UserError(f"max_dets {values!r} should be whole numbers of 1 or more")
    x = as_numbers(list(area_ranges.values())) if isinstance(area_ranges, dict) else None
    if x is None or x.ndim != 2 or x.shape[1] != 2 or not (x[:, 0] <= x[:, 1]).all():
        raise UserError(f"area_ranges {area_ranges!r} should be a dict of (least, most) pixels by "
                        f"name, as in {AREA_RANGES}")


def describe_ids(ids):
    """How many ids, the first, the last and their types, for an error message."""
    ids = sorted(set(ids), key=lambda i: (type(i).__name__, i))
    types = " and ".join(sorted({type(i).__name__ for i in ids}))
    if not ids:
        return "no ids"
    return f"{len(ids)} ids, {repr(ids[0]):.100} to {repr(ids[-1]):.100} ({types})"


def index_ids(gt, field, chosen, order=sorted):
    """Id -> index of gt["images"] or gt["categories"]: of the chosen ids, None for all, in that
    order; -1 for the others."""
    try:
        index = dict.fromkeys(sorted({r["id"] for r in gt[field]}), -1)
    except (KeyError, TypeError):
        raise UserError(f"ground truth: {field!r} should list dicts that have an 'id', all int or "
                        "all str; is this a COCO instances file?") from None
    name = {"images": "image_ids", "categories": "category_ids"}[field]
    try:
        chosen = [chosen] if isinstance(chosen, str) else chosen
        chosen = list(index if chosen is None else dict.fromkeys(chosen))
    except TypeError:
        raise UserError(f"{name} {chosen!r} should be a list of ids") from None
    unknown = [i for i in chosen if i not in index]
    if unknown:
        raise UserError(f"{name} {unknown[:5]} chosen, the ground truth has {describe_ids(index)}")
    index.update({id_: i for i, id_ in enumerate(order(chosen))})
    return index


def look_up(records, record, field, index):
    """The index of each record's id, int64 (n,); -2 for an id that the ground truth does not list.
    record: what a ValueError, for one without an id, calls it."""
    try:
        return np.fromiter((index.get(r[field], -2) for r in records), np.int64, len(records))
    except (AttributeError, KeyError, TypeError):
        i, r = next((i, r) for i, r in enumerate(records) if not isinstance(r, dict)
                    or not isinstance(r.get(field), (int, float, str)))
        raise UserError(f"{record} {i} should be a dict with an int or str as its {field}: "
                        f"{str(r)[:300]}") from None


def check_listed(records, record, field, found, index):
    """Raises ValueError, showing the ids of both sides, where look_up found an unlisted one."""
    bad = np.flatnonzero(found == -2).tolist()
    if bad:
        raise UserError(f"{record} {bad[0]}, the first of {len(bad)}, has a {field} the ground "
                        f"truth does not list: {records[bad[0]][field]!r}. The detections have "
                        f"{describe_ids(r[field] for r in records)}, the ground truth "
                        f"{describe_ids(index)}. Use the file they were made for and its ids")


def read_numbers(records, record, field, strict=False, default=None):
    """One field of all records, float64 (n,), or (n, 4) of "bbox". ValueError names a bad record.

    Numbers must be finite, except scores; those of a box below 1e100, so that its area is finite,
    and its sizes 0 or more. strict allows negative sizes and any area. default: a value for each
    record that has none.
    """
    values = [r.get(field) for r in records]                    # look_up has seen: all are dicts
    if default is not None:
        values = [d if v is None else v for v, d in zip(values, default)]
    shape = (4,) if field == "bbox" else ()

    def read(values):
        x = as_numbers(values)
        if x is None or x.shape[1:] != shape:
            return None
        valid = np.abs(x) < (1e100 if field == "bbox" else np.inf)
        if field == "bbox" and not strict:
            valid[:, 2:] &= x[:, 2:] >= 0
        if field == "score":
            valid = ~np.isnan(x)
        return x if valid.all() or strict and field == "area" else None

    x = read(values) if values else np.zeros((0, *shape))
    if x is None:
        i = next(i for i, value in enumerate(values) if read([value]) is None)
        wanted = "finite [x, y, width, height], sizes 0 or more," if shape else "a finite number"
        remedy = ("use --iou_type segm for masks" if field == "bbox" and "segmentation" in
                  records[i] and values[i] is None else "correct or drop it")
        raise UserError(f"{record} {i} should have {wanted} as its {field}, {remedy}: "
                        f"{str(records[i])[:300]}")
    return x


def read_masks(records, record, takes_part, sizes):
    """Columns "mask", "box" and "area" from the segmentations; no mask where takes_part is False.
    sizes: (height, width) by image id."""
    masks = np.empty(len(records), object)
    boxes, areas = np.zeros((len(records), 4)), np.zeros(len(records))
    for i in np.flatnonzero(takes_part).tolist():
        r = records[i]
        h, w = sizes[r["image_id"]]
        try:
            if not (type(h) is type(w) is int and h > 0 and w > 0):
                raise ValueError(f"an image of height {h!r} and width {w!r} in the ground truth")
            masks[i] = mask_edges(r.get("segmentation"), h, w)
        except (OverflowError, TypeError, ValueError) as error:
            remedy = ("correct or drop it" if "segmentation" in r or "bbox" not in r else
                      "use --iou_type bbox for boxes")
            raise UserError(f"{record} {i} should have polygons or a run-length code as its "
                            f"segmentation, it has {error}, {remedy}: {str(r)[:300]}") from None
        boxes[i], areas[i] = mask_box(masks[i], h), (masks[i][1::2] - masks[i][::2]).sum()
    return dict(mask=masks, box=boxes, area=areas)


def read_objects(records, record, images, categories, sizes, strict):
    """The columns that annotations and detections share, and their "area".

    images, categories: of index_ids; an object whose image or category is negative takes no part.
    sizes: (height, width) by image id, to read masks; None to read boxes.
    """
    image = look_up(records, record, "image_id", images)
    category = look_up(records, record, "category_id", categories)
    if sizes is not None:
        shapes = read_masks(records, record, (image >= 0) & (category >= 0), sizes)
    else:
        box = read_numbers(records, record, "bbox", strict)
        shapes = dict(box=box, area=box[:, 2] * box[:, 3])
    return dict(shapes, image=image, category=category)


def read_truths(records, record, images, categories, sizes, strict):
    """Columns of the ground truth; arguments as of read_objects."""
    columns = read_objects(records, record, images, categories, sizes, strict)
    if not strict:
        area, crowd = columns["area"].tolist(), [0] * len(records)
        columns["area"] = read_numbers(records, record, "area", default=area)
        columns["crowd"] = read_numbers(records, record, "iscrowd", default=crowd) != 0
        return columns

    # pycocotools has no defaults, never finds id 0, and takes the last of those that share an id
    columns["area"] = read_numbers(records, record, "area", strict)
    columns["crowd"] = read_numbers(records, record, "iscrowd") != 0
    look_up(records, record, "id", {})                          # raises where there is no id
    ids = [r["id"] for r in records]
    columns["never_found"] = np.array([i == 0 for i in ids], bool)
    last = {id_: i for i, id_ in enumerate(ids)}
    listed = np.flatnonzero((columns["image"] >= 0) & (columns["category"] >= 0))
    listed = listed[np.argsort(columns["image"][listed], kind="stable")]
    return take(columns, np.array([last[ids[i]] for i in listed], np.int64))


def read_detections(records, record, images, categories, sizes, strict):
    """Columns of the detections; arguments as of read_objects. Strict passes over those of
    categories that are not listed, and takes a mask's area from the box beside it."""
    columns = read_objects(records, record, images, categories, sizes, strict)
    columns["score"] = read_numbers(records, record, "score")
    check_listed(records, record, "image_id", columns["image"], images)
    if not strict:
        check_listed(records, record, "category_id", columns["category"], categories)
    elif "mask" in columns and records[0].get("bbox"):
        box = read_numbers(records, record, "bbox", strict)
        columns["area"] = box[:, 2] * box[:, 3]
    return columns


def class_names(records, index):
    """(ids, names) of the chosen categories. A name that several share has the id with it; "?"
    stands for what cannot be printed, half of a surrogate pair."""
    ids = sorted((i for i in index if index[i] >= 0), key=index.get)
    names = {r["id"]: str(r.get("name") or r["id"]).encode(errors="replace").decode()
             for r in records}
    uses = Counter(names.values())
    return ids, [names[i] if uses[names[i]] == 1 else f"{names[i]} ({i})" for i in ids]


# -- notes: what may be wrong --------------------------------------------------------------------

def find_differences(annotations, detections, iou_type, max_dets):
    """What pycocotools does otherwise, unless strict, as sentences."""
    ids = [r["id"] for r in annotations if isinstance(r.get("id"), (int, float, str))]
    with_box = iou_type == "segm" and detections and detections[0].get("bbox")
    return [note for applies, note in (
        (with_box, "the detections have a bbox too: their size is that of their mask here, of the "
                   "box in pycocotools"),
        (0 in ids, "an annotation has the id 0: it counts here, pycocotools never finds it"),
        (len(set(ids)) < len(ids), "annotations share an id: all count here, pycocotools takes the "
                                   "last for each of them"),
        (100 not in max_dets, f"AP is at {max(max_dets)} detections; pycocotools' is -1 unless 100 "
                              f"is there")) if applies]


def overlapping(gt, dt):
    """How many pairs of one image and class overlap by half, of the first 100 detections there."""
    gt, dt = with_cells(gt, dt)
    return len(find_pairs(gt, take(dt, count_before(dt["cell"]) < 100), 0.5)[0])


def find_causes(gt, dt, names):
    """What may be wrong where next to nothing is found, as sentences. gt, dt: columns."""
    if not len(gt["image"]):
        return ["there is no ground truth in these images and categories: every number is -1"]
    if gt["crowd"].all():
        return ["every ground truth is a crowd, and crowds are not looked for: every number is -1"]
    if not len(dt["image"]):
        return ["there are no detections in these images and categories: AP is 0"]
    has, found = ([names[k] for k in np.unique(c["category"])] for c in (gt, dt))
    if not set(has) & set(found):
        return [f"no category in common: the ground truth has {', '.join(has[:5])}; the detections "
                f"have {', '.join(found[:5])}"]
    if not np.isin(dt["image"], gt["image"]).any():
        return ["no detection is on an image that has ground truth"]
    if "mask" in dt:
        return []

    sides = ("detections", dt["box"], gt["box"]), ("ground truth", gt["box"], dt["box"])
    for side, box, other in sides:
        if box.max() <= 2 < other.max():
            return [f"the boxes of the {side} look like fractions of the image, {box[0].tolist()}: "
                    f"multiply them by its width and height"]

    # do many more overlap if x, y, width, height is taken for x0, y0, x1, y1?
    many = max(2 * overlapping(gt, dt), len(gt["image"]) / 10)
    gt1, dt1 = (dict(c, box=c["box"] - np.pad(c["box"][:, :2], [(0, 0), (2, 0)])) for c in (gt, dt))
    sides = ("detections", overlapping(gt, dt1)), ("ground truth", overlapping(gt1, dt))
    return [f"the boxes of the {side} look like x0, y0, x1, y1: COCO's are x, y, width, height"
            for side, n in sides if n > many]


# -- the evaluation of two files -----------------------------------------------------------------

def coco_eval(gt, dt, iou_type="bbox", *, iou_thrs=IOU_THRS, rec_thrs=REC_THRS, max_dets=MAX_DETS,
              area_ranges=AREA_RANGES, image_ids=None, category_ids=None, use_cats=True,
              strict=False):
    """COCO evaluation of a results file: the dict of evaluate_columns, with names and notes.

    gt: COCO instances dict or its path; dt: list of {"image_id", "category_id", "score", "bbox":
    [x, y, w, h] in pixels, or "segmentation"}, or its path. iou_type: "bbox", or "segm" for masks.
    Ids are ints or strings; image_ids, category_ids: the only ones to take part. use_cats=False:
    all classes are one, equal scores in the order of category_ids. "iscrowd" may be absent, 0, and
    "area", that of box or mask; annotations of unlisted images or categories take no part. Raises
    ValueError or FileNotFoundError that names the file or record.

    Adds "category_ids" (ascending), "classes" (their names), "ap_per_class", "ap50_per_class" and
    "ar_per_class" (name -> float, nan without ground truth; all areas, most detections), and
    "notes", sentences also printed to stderr: what pycocotools does otherwise, why all is 0.

    strict=True does as pycocotools. An annotation with id 0 is never found; of several with one id
    the last stands for all; detections of unlisted categories are passed over; a box of negative
    size overlaps nothing; a mask has the area of its detection's box, if there is one; the first AP
    is -1 without 100 in max_dets; no detections, or fewer than three max_dets, are an IndexError.
    Four differences remain: NaN scores and NaN or infinite boxes are a ValueError; integer scores
    are rounded to float64, beyond 2**53 to equal ones; "iscrowd" 0.5 is a crowd, in pycocotools an
    ignored object that is none; the annotation id "0" is found, in pycocotools never.
    """
    check_parameters(iou_type, iou_thrs, rec_thrs, max_dets, area_ranges)
    gt, dt, gt_record, dt_record = read_sides(gt, dt)
    if strict and (not dt or len(max_dets) < 3):
        raise UserIndexError(f"pycocotools, and so strict, needs a detection and three max_dets: "
                             f"there are {len(dt)} and {len(max_dets)}")

    # columns of all objects; those that are not chosen or not listed have a negative index
    images = index_ids(gt, "images", image_ids)
    categories = index_ids(gt, "categories", category_ids, sorted if use_cats else list)
    sizes = {r["id"]: (r.get("height"), r.get("width")) for r in gt["images"]}
    sizes = sizes if iou_type == "segm" else None
    annotations = gt.get("annotations") or []
    found = read_detections(dt, dt_record, images, categories, sizes, strict)
    truths = read_truths(annotations, gt_record, images, categories, sizes, strict)

    notes = [] if strict else find_differences(annotations, dt, iou_type, max_dets)
    unlisted = ((truths["image"] == -2) | (truths["category"] == -2)).sum()
    if unlisted:
        notes.append(f"{unlisted} annotations are of images or categories that are not listed: "
                     f"they take no part")
    sides = [take(c, (c["image"] >= 0) & (c["category"] >= 0)) for c in (truths, found)]
    ids, names = class_names(gt["categories"], categories)
    if not use_cats:                                            # equal scores keep their order
        sides = [take(c, np.argsort(c["category"], kind="stable")) for c in sides]
        sides = [dict(c, category=np.zeros_like(c["category"])) for c in sides]
        names, ids = ["all classes"], [-1]

    result = evaluate_columns(*sides, len(names), iou_thrs, rec_thrs, max_dets, area_ranges, strict)
    if result["stats"][1] < 0.1:
        notes += find_causes(*sides, names)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    result.update(category_ids=ids, classes=names, notes=notes)
    for field in ("AP", "AP50", "AR"):
        result[f"{field.lower()}_per_class"] = {r["name"]: r[field] for r in per_class(result)}
    return result


# -- python coco_eval.py -------------------------------------------------------------------------

def result_json(result):
    """A result as a dict for json.dump: the numbers by name, by class (null: none), and all curves.

    "precision", "scores" [T][R][K][A][M] and "recall" [T][K][A][M] are nested lists along
    "iou_thrs", "rec_thrs", "classes", "area_ranges" and "max_dets"; -1: no ground truth.
    """
    stats = {}
    rows = summary_rows(result["max_dets"], result["strict"])
    for (array, iou, area, most), value in zip(rows, result["stats"].tolist()):
        name = "AP" if array == "precision" else "AR"
        if iou is not None:
            name += f"{iou * 100:g}"
        if area != "all":
            name += f"_{area}"
        elif array == "recall":
            name += f"@{most}"
        stats[name] = value
    classes = [{name: None if value != value else value for name, value in row.items()}
               for row in per_class(result)]
    return {"stats": stats, "per_class": classes, "notes": result.get("notes", []),
            **{name: result[name] for name in ("classes", "max_dets", "area_ranges", "strict")},
            **{name: result[name].tolist()
               for name in ("iou_thrs", "rec_thrs", "precision", "recall", "scores")}}


def check_output(flag, path, *inputs):
    """Raises UserError, before the work, if a file to write has no folder or is one of inputs."""
    if not path:
        return
    folder = os.path.dirname(path) or "."
    place = path if os.path.exists(path) else folder
    if not os.path.isdir(folder) or os.path.isdir(path) or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {path} should be a file that can be written, in a folder that is "
                        f"there")
    if os.path.realpath(path) in [os.path.realpath(name) for name in inputs if name]:
        raise UserError(f"{flag} {path} would be written over a file that this command reads or "
                        f"writes: give another name")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a misspelt flag with the nearest ones. Abbreviations are off,
    so that a typo is an error; the description is printed as it is."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args, known = sys.argv[1:] if args is None else args, list(self._option_string_actions)
        for word in args[:args.index("--")] if "--" in args else args:
            flag = re.match(r"--?([A-Za-z][\w-]*)", word)
            if not flag or flag[0] in known:
                continue
            name = f"--{flag[1].replace('-', '_')}"
            close = difflib.get_close_matches(name, known, 3, 0.7)
            close += [k for k in known if k.startswith(name) and k not in close]
            advice = f"did you mean {' or '.join(close[:3])}?"
            if not close:
                advice = f"{'--help_all' if '--help_all' in known else '--help'} lists all options"
            self.error(f"{flag[0]} is no option, {advice}")
        return super().parse_args(args, namespace)


def add_error_flags(parser):
    """The flags for what diagnose.py tells of detections."""
    parser.add_argument("--errors", default="", metavar="PNG",
                        help="tell where it errs, and draw the confusion matrix there")
    parser.add_argument("--threshold", type=float, default=0.5,
                        help="least score of the detections that --errors counts")


def main(argv=None):
    """The command: reads two files, prints the summary and the table of classes."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--gt", required=True, help="COCO instances file")
    parser.add_argument("--dt", required=True, help="detections in COCO results format")
    parser.add_argument("--iou_type", default="bbox", help="bbox, or segm to compare masks")
    parser.add_argument("--max_dets", type=int, nargs="+", default=MAX_DETS,
                        help="detections per image and class that count")
    parser.add_argument("--strict", action="store_true",
                        help="pycocotools' answer also where it is odd, see coco_eval")
    parser.add_argument("--json", default="", help="write all numbers and curves there")
    add_error_flags(parser)
    args = parser.parse_args(argv)
    for flag, path in (("--json", args.json), ("--errors", args.errors)):
        check_output(flag, path, args.gt, args.dt)
    if args.errors and args.strict:
        raise UserError("--errors judges as without --strict: leave out one of the two")
    if args.errors:
        try:
            import diagnose                 # the rest needs numpy alone
        except ImportError as error:
            raise UserError(f"--errors needs diagnose.py beside coco_eval.py, and pillow: "
                            f"{error}") from None

    result = coco_eval(args.gt, args.dt, args.iou_type, max_dets=args.max_dets, strict=args.strict)
    more, texts = {}, []
    if args.errors:
        more, texts = diagnose.probe(result, args.errors, args.threshold)
    if args.json:
        with writing(args.json), open(args.json, "w") as file:
            json.dump({**result_json(result), **more}, file)
    print(summary(result), ap_table(result), *texts, sep="\n\n")
    if args.json:
        print(f"numbers and curves: {args.json}")


if __name__ == "__main__":
    run_command(main)
