"""The COCO evaluation in numpy: average precision of boxes and masks. One file to copy.

    python coco_eval.py --gt instances.json --dt detections.json [--iou_type segm] [--json out.json]

Source: arXiv:1405.0312 and cocodataset.org/#detection-eval.
"""

import gc
import json
import os
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np


# -- COCO evaluation -----------------------------------------------------------------------------

class UserError(ValueError):
    """A sentence for whoever gave the input, printed as one line; every other exception is a bug
    and keeps its traceback. (Here, because this file imports no other.)"""

    def __str__(self):                      # a DataLoader puts its worker's traceback before it
        return super().__str__().split(f"{type(self).__name__}: ")[-1].strip()


class UserFileError(UserError, FileNotFoundError):
    """The same about a file that is not there, or cannot be read or written."""


IOU_THRS = np.linspace(0.5, 0.95, 10)
REC_THRS = np.linspace(0, 1, 101)
MAX_DETS = (1, 10, 100)                                         # per image and class
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


def with_cells(gt, dt):
    """Both with "cell", a number for each class and image; the ground truth in order of it."""
    images = 1 + max(columns["image"].max(initial=0) for columns in (gt, dt))
    gt, dt = (dict(c, cell=c["category"] * images + c["image"]) for c in (gt, dt))
    return take(gt, np.argsort(gt["cell"], kind="stable")), dt


def box_overlap(dt, gt, crowd):
    """IoU of pairs of boxes (P, 4) x, y, w, h, (P,); with a crowd, the share of dt inside it."""
    (dx, dy, dw, dh), (gx, gy, gw, gh) = dt.T, gt.T
    w = np.fmin(dx + dw, gx + gw) - np.fmax(dx, gx)             # fmin: a NaN counts as absent
    h = np.fmin(dy + dh, gy + gh) - np.fmax(dy, gy)
    union = np.where(crowd, dw * dh, dw * dh + gw * gh - w * h)
    return np.divide(w * h, union, out=np.zeros(len(dt)), where=~((w <= 0) | (h <= 0)))


def find_pairs(gt, dt, least_iou):
    """Detections and ground truths of one cell, image and class, that overlap by least_iou.

    Columns as in evaluate_columns, and "cell" int64, by which gt is sorted. Returns rows d of dt
    (P,), rows g of gt (P,) and iou (P,), by ascending d, falling iou and falling g.
    """
    first = np.searchsorted(gt["cell"], dt["cell"])
    count = np.searchsorted(gt["cell"], dt["cell"], side="right") - first
    rows, pairs = np.flatnonzero(count), []
    blocks = np.cumsum(count[rows]) // 2**17                    # of pairs: bounds the memory
    for rows in np.split(rows, np.flatnonzero(np.diff(blocks)) + 1):
        n = count[rows]
        d = np.repeat(rows, n)                                  # a detection, and its cell's
        g = np.repeat(first[rows] - np.cumsum(n) + n, n) + np.arange(len(d))    # first, +1, ...
        iou = box_overlap(dt["box"][d], gt["box"][g], gt["crowd"][g])
        if "mask" in dt and iou.any():                          # masks meet only where boxes do
            i = np.flatnonzero(iou)
            iou[i] = mask_overlap(dt["mask"][d[i]], gt["mask"][g[i]], gt["crowd"][g[i]])
        keep = ~(iou < least_iou)                               # NaN too
        pairs.append((d[keep], g[keep], iou[keep]))
    d, g, iou = (np.concatenate(column) for column in zip(*pairs))
    order = np.lexsort((-g, -iou, d))                           # last key first
    return d[order], g[order], iou[order]


def match_cell(dt, gt, ignored, name, iou_thrs):
    """The ground truth that each detection of a cell finds, at each IoU threshold on its own.

    dt, gt: columns of D detections by falling score and G ground truths; ignored (G,) bool; name
    (G,) int64. Returns the names (D, T), -1 for none. The detection of highest score chooses first:
    among the ground truths it reaches and nobody has, the one of highest IoU (of equals the last),
    but any that counts before an ignored one. Crowds are never used up.
    """
    D, G = len(dt["cell"]), len(name)
    d, g = np.repeat(np.arange(D), G), np.tile(np.arange(G), D)
    iou = box_overlap(dt["box"][d], gt["box"][g], gt["crowd"][g]).reshape(D, G)
    truth = np.full((D, len(iou_thrs)), -1)
    for t, threshold in enumerate(np.minimum(iou_thrs, 1 - 1e-10)):
        for d in range(D):
            best, found = threshold, None
            for g in np.argsort(ignored, kind="stable"):
                if name[g] in truth[:d, t] and not gt["crowd"][g]:
                    continue
                if found is not None and ignored[g] > ignored[found]:
                    break
                if not iou[d, g] < best:                        # true of NaN, whatever best is
                    best, found = iou[d, g], g
                    truth[d, t] = name[g]
    return truth


def match_pairs(d, g, iou, cell, ignored, crowd, iou_thrs):
    """match_cell for all cells at once, where no IoU is NaN.

    d, g, iou (P,): pairs as find_pairs gives them, detections numbered by falling score; cell
    (D,) of the detections; ignored, crowd (G,) bool. Returns int64 (D, T), rows of the truth.

    With what counts before what is ignored, a pair is a match if both sides are still free. Cells
    are independent, so step s decides the s-th pair of every cell.
    """
    order = np.argsort(2 * d + ignored[g], kind="stable")
    d, g, iou = d[order], g[order], iou[order]
    reached = iou[:, None] >= np.minimum(iou_thrs, 1 - 1e-10)                       # (P, T)
    truth = np.full((len(cell), len(iou_thrs)), -1)
    taken = np.zeros((len(crowd), len(iou_thrs)), bool)
    step = count_before(cell[d])
    ends = np.cumsum(np.bincount(step))
    for pair in np.split(np.argsort(step, kind="stable"), ends[:-1]):               # (cells,)
        di, gi = d[pair], g[pair]                               # no row twice: one pair per cell
        new = reached[pair] & (truth[di] < 0) & ~taken[gi]                          # (cells, T)
        truth[di] = np.where(new, gi[:, None], truth[di])
        taken[gi] |= new & ~crowd[gi, None]
    return truth


def precision_at_recall(hits, matched, counted, judged, score, num_gt, rec_thrs):
    """Precision, recall and score of one class, from its N detections by falling score.

    hits (H,): rows of those that reach a ground truth at all; matched, counted (H, T): that one is
    theirs, and it is not ignored; judged (N,): wrong if it matches nothing; score (N,). Returns
    precision and scores (T, R), 0 for a recall never reached, and recall (T,) in the end.
    """
    found = counted.cumsum(axis=0)                                                  # (H, T)
    wrong = judged.cumsum()[hits, None] - (matched & judged[hits, None]).cumsum(axis=0)
    precision = found / (found + wrong + np.spacing(1))         # so a first hit has 1 - 2.2e-16
    best = np.maximum.accumulate(precision[::-1])[::-1]         # at this recall or a higher one
    best, hit_score = np.vstack([best, np.zeros(found.shape[1])]), np.append(score[hits], 0)
    need = np.searchsorted(np.arange(num_gt + 1) / num_gt, rec_thrs)                # hits, (R,)
    at = np.stack([np.searchsorted(column, need) for column in found.T])            # (T, R)
    scores = hit_score[at]
    scores[:, need == 0] = score[0] if len(score) else 0        # recall 0 is read at the very first
    return best[at, np.arange(len(at))[:, None]], counted.sum(axis=0) / num_gt, scores


def evaluate_columns(gt, dt, num_classes, iou_thrs=IOU_THRS, rec_thrs=REC_THRS, max_dets=MAX_DETS,
                     area_ranges=AREA_RANGES, strict=False):
    """COCO evaluation from columns, arrays with one row per object.

    gt: "image" (G,) int64, "category" (G,) int64 below num_classes, "box" (G, 4) float64 x, y, w,
    h in pixels, "area" (G,) float64, "crowd" (G,) bool; "lost" (G,) bool, if any are never to count
    as found. dt: "image", "category", "box" alike and
    "score" (D,) float64; "area" if it is not w * h. With "mask" in both, masks are compared, see
    mask_edges, and the boxes bound them. Among equal scores the lower image index comes first, so
    indices must follow the image ids; within an image the order of rows decides.

    Returns a dict: "precision" and "scores" (T, R, K, A, M), "recall" (T, K, A, M), for IoU
    thresholds, recall thresholds, classes, areas and max_dets, the best detections per image and
    class; -1 without ground truth. "stats" (12,): see summary_rows, of which strict is an
    argument. "num_gt" (K, A) counts what is not ignored.

    Example, at IoU 0.5: two boxes A and B; detections by score overlap A by 0.8, A by 0.6, B by
    0.7. The first takes A, the second comes too late, the third takes B. Precision 1, 1/2, 2/3
    at recall 1/2, 1/2, 1. Best precision at a recall or above: 1 for the 51 thresholds to 0.5,
    2/3 for the other 50, mean 0.835. AP is the mean of this over IoU thresholds and classes.
    Source: cocoeval.py of the COCO API.
    """
    iou_thrs, max_dets = np.asarray(iou_thrs, np.float64), sorted(int(n) for n in max_dets)
    T, R, K, A, M = len(iou_thrs), len(rec_thrs), num_classes, len(area_ranges), len(max_dets)
    precision, scores = np.full((2, T, R, K, A, M), -1.0)
    recall, num_gt = np.full((T, K, A, M), -1.0), np.zeros((K, A), np.int64)
    gt, dt = with_cells(gt, dt)
    dt = take(dt, np.lexsort((dt["image"], -dt["score"], dt["category"])))  # last key first, stable
    rank = count_before(dt["cell"])
    dt, rank = take(dt, rank < max_dets[-1]), rank[rank < max_dets[-1]]
    d, g, iou = find_pairs(gt, dt, min(*iou_thrs, 1 - 1e-10))
    nan_cells = np.unique(dt["cell"][d[np.isnan(iou)]])         # only strict lets such boxes in
    hits, d = np.unique(d, return_inverse=True)                 # the H detections that have a pair
    dt_ends, hit_ends = (np.searchsorted(c, np.arange(K + 1))
                         for c in (dt["category"], dt["category"][hits]))
    area = dt["area"] if "area" in dt else dt["box"][:, 2] * dt["box"][:, 3]
    lost = gt.get("lost", np.zeros(len(gt["cell"]), bool))
    for a, (low, high) in enumerate(area_ranges.values()):
        ignored = gt["crowd"] | (gt["area"] < low) | (gt["area"] > high)
        num_gt[:, a] = np.bincount(gt["category"][~ignored], minlength=K)
        truth = match_pairs(d, g, iou, dt["cell"][hits], ignored, gt["crowd"], iou_thrs)
        for cell in nan_cells:
            i, j = (np.flatnonzero(c == cell) for c in (dt["cell"][hits], gt["cell"]))
            truth[i] = match_cell(take(dt, hits[i]), take(gt, j), ignored[j], j, iou_thrs)
        matched = (truth >= 0) & ~(lost & ~ignored)[truth]                          # (H, T)
        counted = matched & ~ignored[truth]
        judged = ~((area < low) | (area > high))                                    # (D,)
        for k in np.flatnonzero(num_gt[:, a]):
            own, own_hits = slice(*dt_ends[k:k + 2]), slice(*hit_ends[k:k + 2])
            for m, cut in enumerate(max_dets):
                n = rank[hits[own_hits]] < cut
                precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = \
                    precision_at_recall(hits[own_hits][n] - dt_ends[k], matched[own_hits][n],
                                        counted[own_hits][n], judged[own] & (rank[own] < cut),
                                        dt["score"][own], num_gt[k, a], rec_thrs)
    result = dict(precision=precision, recall=recall, scores=scores, num_gt=num_gt,
                  iou_thrs=iou_thrs, rec_thrs=np.asarray(rec_thrs, np.float64),
                  max_dets=max_dets, area_ranges=area_ranges, strict=strict)
    result["stats"] = np.array([mean_over(result, *row) for row in summary_rows(max_dets, strict)])
    return result


def summary_rows(max_dets, strict=False):
    """COCO's 12 numbers: (array, IoU threshold or None for all, area, detections), in order.

    AP and the recall by size are at the most detections, the three recalls of all sizes at the
    first, second and last of max_dets. strict, as pycocotools: max_dets[2] wherever the last is
    meant, IndexError if there is none; and the first AP is at 100 exactly.
    """
    sizes, last = ("small", "medium", "large"), max_dets[2] if strict else max_dets[-1]
    cuts = max_dets[0], max_dets[:2][-1], last
    return ([("precision", None, "all", 100 if strict else last)]
            + [("precision", iou, "all", last) for iou in (0.5, 0.75)]
            + [("precision", None, size, last) for size in sizes]
            + [("recall", None, "all", cut) for cut in cuts]
            + [("recall", None, size, last) for size in sizes])


def mean_over(result, array, iou, area, cut):
    """Mean of "precision" or "recall" over the classes with ground truth, -1.0 if none has."""
    x = result[array][..., [name == area for name in result["area_ranges"]], :]
    x = x[..., [n == cut for n in result["max_dets"]]]
    x = x if iou is None else x[result["iou_thrs"] == iou]
    x = x[x > -1]
    return x.mean() if x.size else -1.0


def per_class(result):
    """A dict for each class with a name: "id", "name", "objects", and "AP", "AP50", "AR" over all
    areas at the most detections, nan without ground truth or without that IoU threshold."""
    a = list(result["area_ranges"]).index("all") if "all" in result["area_ranges"] else 0
    curves = result["precision"][..., a, -1].mean(axis=1), result["recall"][..., a, -1]     # (T, K)
    ap, ar = (np.where(x > -1, x, np.nan) for x in curves)
    ap50 = np.vstack([ap[result["iou_thrs"] == 0.5], np.nan * ap[:1]])[0]
    rows = zip(result["category_ids"], result["classes"], result["num_gt"][:, a].tolist(),
               ap.mean(axis=0).tolist(), ap50.tolist(), ar.mean(axis=0).tolist())
    return [dict(zip(("id", "name", "objects", "AP", "AP50", "AR"), row)) for row in rows if row[1]]


def summary(result):
    """The 12 lines that COCO users know, as one string."""
    iou_thrs, lines = result["iou_thrs"], []
    rows = summary_rows(result["max_dets"], result["strict"])
    for (array, iou, area, cut), value in zip(rows, result["stats"]):
        name = "Average Precision  (AP)" if array == "precision" else "Average Recall     (AR)"
        span = f"{iou_thrs[0]:.2f}:{iou_thrs[-1]:.2f}" if iou is None else f"{iou:.2f}"
        where = f"IoU={span:<9} | area={area:>6} | maxDets={cut:>3}"
        lines.append(f" {name} @[ {where} ] = {value:.3f}")
    return "\n".join(lines)


def ap_table(result):
    """Average precision by class, the best first, as lines; "-" for a class without objects."""
    rows = sorted(per_class(result), key=lambda r: (r["objects"] == 0, -r["AP"], r["name"]))
    width = max([5] + [len(r["name"]) for r in rows])
    lines = [f"{'class':{width}s}     AP   AP50  objects"]
    lines += [f"{r['name']:{width}s}  {r['AP']:5.3f}  {r['AP50']:5.3f}  {r['objects']:7d}"
              if r["objects"] else f"{r['name']:{width}s}      -      -        0" for r in rows]
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
            raise UserError("an empty list of polygons")
        return unite([polygon_edges(ring, h, w) for ring in segmentation])
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError("neither a list of polygons nor a dict of 'size' and 'counts'")
    counts = segmentation["counts"]
    counts = unpack_counts(counts) if isinstance(counts, (str, bytes)) else np.array(counts)
    if list(segmentation["size"]) != [h, w]:
        raise UserError(f"size {segmentation['size']} in an image of {[h, w]}, height and width")
    if counts.dtype.kind != "i" or counts.ndim != 1 or counts.sum() != h * w \
            or counts.min() < 0 or counts.max() > h * w:
        raise UserError(f"counts that are no runs of {h} x {w} = {h * w} pixels")
    return np.cumsum(counts)[:len(counts) // 2 * 2]             # the first run is background


def unpack_counts(text):
    """Run lengths from COCO's compressed form: 5 bits a character, changes to two runs before."""
    x = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(int) - 48
    last = (x & 32) == 0                                        # of its number
    if not len(x) or (x < 0).any() or (x > 63).any() or not last[-1]:
        raise UserError("compressed counts that are cut short or not of this code")
    number = np.cumsum(last) - last                             # which number a character is of
    place = count_before(number)
    if place.max() > 10:
        raise UserError("compressed counts with a number beyond all images")
    sign = np.where(last & (x & 16 > 0), -32 << 5 * place, 0)   # two's complement
    values = np.zeros(number[-1] + 1, np.int64)
    np.add.at(values, number, ((x & 31) << 5 * place) + sign)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def polygon_edges(ring, h, w):
    """Edges of one polygon, x0, y0, x1, y1, ... in pixels: inside by even and odd crossings.

    The outline is walked on a grid five times finer; where it steps from one column of pixels to
    the next, it crosses there, and a run begins or ends.
    """
    ring = np.array(ring)
    if ring.dtype.kind not in "iuf" or ring.ndim != 1 or len(ring) < 6 or len(ring) % 2:
        raise UserError("a polygon that is not x, y of three points or more")
    if not (np.abs(ring) < 1e6).all():
        raise UserError("a polygon with a coordinate beyond a million pixels")
    x, y = np.trunc(5.0 * ring + 0.5).astype(np.int64).reshape(-1, 2).T
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    length = np.maximum(np.abs(x1 - x), np.abs(y1 - y))         # steps, along the longer axis
    if length.sum() > 2**22:                                    # bounds the memory
        raise UserError("a polygon with an outline of more than 800,000 pixels")
    steep = np.abs(x1 - x) < np.abs(y1 - y)
    back = np.where(steep, y > y1, x > x1)                      # always rounded walking upwards
    x, x1, y, y1 = (np.where(back, *p) for p in ((x1, x), (x, x1), (y1, y), (y, y1)))
    slope = np.where(steep, x1 - x, y1 - y) / np.maximum(length, 1)

    edge = np.repeat(np.arange(len(x)), length + 1)
    t = count_before(edge)
    t = np.where(back[edge], length[edge] - t, t)
    along, across = np.where(steep, y, x)[edge] + t, np.where(steep, x, y)[edge]
    across = np.trunc(across + slope[edge] * t + 0.5).astype(np.int64)
    u, v = np.where(steep[edge], across, along), np.where(steep[edge], along, across)

    step = np.flatnonzero(np.diff(u))
    column = (np.where(u[step + 1] < u[step], u[step + 1], u[step + 1] - 1) + 0.5) / 5 - 0.5
    row = np.ceil(((np.minimum(v[step], v[step + 1]) + 0.5) / 5 - 0.5).clip(0, h))
    inside = (column == np.floor(column)) & (column >= 0) & (column <= w - 1)
    return np.sort((column * h + row)[inside].astype(np.int64))     # even: it goes there and back


def unite(masks):
    """The edges of the union of masks."""
    edges = np.concatenate(masks)
    change = np.tile([1, -1], len(edges) // 2)
    order = np.lexsort((-change, edges))                        # a run that touches goes on
    depth = np.cumsum(change[order])
    return edges[order][(depth == 0) | (depth == 1) & (change[order] == 1)]


def mask_area(mask):
    """Pixels of a mask."""
    return (mask[1::2] - mask[::2]).sum()


def mask_box(mask, h):
    """x, y, w, h of the box around a mask; a run over several columns spans all rows."""
    runs = mask.reshape(-1, 2)[mask[1::2] > mask[::2]]          # (runs, 2), without empty ones
    if not len(runs):
        return [0, 0, 0, 0]
    (x, y), (x1, y1) = (divmod(p, h) for p in (runs[:, 0], runs[:, 1] - 1))
    top, bottom = (0, h - 1) if (x < x1).any() else (y.min(), y1.max())
    return [x.min(), top, x1.max() - x.min() + 1, bottom - top + 1]


def mask_overlap(dt, gt, crowd):
    """IoU of pairs of masks, two object arrays (P,); with a crowd, the share of dt inside it."""
    size = 1 + max(mask.max(initial=0) for mask in (*dt, *gt))
    pair = np.arange(len(dt))
    (d, d_pair), (g, g_pair) = ((np.concatenate(masks), np.repeat(pair, [len(m) for m in masks]))
                                for masks in (dt, gt))
    d, g = d + size * d_pair, g + size * g_pair                 # all pairs on one line of pixels
    length = d[1::2] - d[::2]
    i = np.searchsorted(d[1::2], g)                             # first run of dt that ends there
    before = np.append(0, np.cumsum(length))[i]                 # pixels of dt in the runs before it
    before += np.maximum(g - np.append(d[::2], g.max(initial=0))[i], 0)             # and in it
    areas = [np.bincount(owner[::2], pixels, len(pair)) for owner, pixels in (
        (d_pair, length), (g_pair, g[1::2] - g[::2]), (g_pair, before[1::2] - before[::2]))]
    union = np.where(crowd, areas[0], areas[0] + areas[1] - areas[2])
    return np.divide(areas[2], union, out=np.zeros(len(pair)), where=areas[2] > 0)


# -- COCO files ----------------------------------------------------------------------------------

def read_json(path, what, object_hook=None):
    """The JSON in a file; errors name the file, `what` says what it should hold.

    object_hook(dict) returns what takes the place of each object, as in json.load.
    """
    collects = gc.isenabled()
    gc.disable()                # it would walk through all that is read so far, again and again
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


def read_numbers(records, what, field, *shape, default=None, strict=False):
    """One field of all records, (n, *shape) float64. ValueError names the first record at fault.

    default: one value per record, for a field that is absent or null. Numbers must be finite (a
    score may be infinite), width and height of a box 0 or more; strict lets all numbers pass.
    """
    values = [r.get(field) for r in records]                    # look_up has seen: all are dicts
    if default is not None:
        values = [d if v is None else v for v, d in zip(values, default)]

    def read(values):
        try:
            x = np.array(values)
        except ValueError:                                      # of uneven length
            return None
        if x.dtype.kind not in "biuf" or x.shape[1:] != shape:
            return None
        valid = ~np.isnan(x) if field == "score" else np.isfinite(x)
        sizes = x[:, 2:] if shape else x[:0]
        return x if strict or valid.all() and (sizes >= 0).all() else None

    x = read(values) if values else np.zeros((0, *shape))
    if x is None:
        i = next(i for i, value in enumerate(values) if read([value]) is None)
        wanted = "[x, y, width, height] with sizes 0 or more" if shape else "a finite number"
        remedy = ("use --iou_type segm for masks" if field == "bbox" and "segmentation" in
                  records[i] and values[i] is None else "correct or drop it")
        raise UserError(f"{what} {i} should have {wanted} as its {field}, {remedy}: "
                         f"{str(records[i])[:300]}")
    return x.astype(np.float64)


def read_masks(records, what, image, sizes):
    """The masks of all records, object array (n,), and the boxes around them, (n, 4) float64.

    image (n,): index of each one's image, -1 to leave it out; sizes: (height, width) by index.
    """
    masks, boxes = np.empty(len(records), object), np.zeros((len(records), 4))
    for i in np.flatnonzero(image >= 0).tolist():
        r, (h, w) = records[i], sizes[image[i]]
        try:
            if not (type(h) is type(w) is int and h > 0 and w > 0):
                raise UserError(f"an image of height {h!r} and width {w!r} in the ground truth")
            masks[i] = mask_edges(r.get("segmentation"), h, w)
        except (OverflowError, TypeError, ValueError) as error:
            remedy = ("correct or drop it" if "segmentation" in r or "bbox" not in r else
                      "use --iou_type bbox for boxes")
            raise UserError(f"{what} {i} should have polygons or a run-length code of its image's "
                             f"size as its segmentation, it has {error}, {remedy}: "
                             f"{str(r)[:300]}") from None
        boxes[i] = mask_box(masks[i], h)
    return masks, boxes


def id_index(gt, field):
    """Id -> index by ascending id, of gt["images"] or gt["categories"]."""
    try:
        return {id_: i for i, id_ in enumerate(sorted({r["id"] for r in gt[field]}))}
    except (KeyError, TypeError):
        raise UserError(f"ground truth: {field!r} should list dicts that have an 'id', all int or "
                         "all str; is this a COCO instances file?") from None


def subset(index, chosen, what, order=sorted):
    """The id -> index of the chosen ids alone, in that order; all if chosen is None."""
    if chosen is None:
        return index
    try:
        chosen = list(dict.fromkeys([chosen] if isinstance(chosen, str) else chosen))
    except TypeError:
        raise UserError(f"{what} {chosen!r} should be a list of ids") from None
    unknown = [i for i in chosen if i not in index]
    if unknown:
        raise UserError(f"{what} {unknown[:5]} chosen, the ground truth has {describe_ids(index)}")
    return {id_: i for i, id_ in enumerate(order(chosen))}


def look_up(records, what, field, index):
    """The index of each record's id, int64 (n,), -1 for one that is not there."""
    try:
        return np.fromiter((index.get(r[field], -1) for r in records), np.int64, len(records))
    except (AttributeError, KeyError, TypeError):
        i, r = next((i, r) for i, r in enumerate(records) if not isinstance(r, dict)
                    or not isinstance(r.get(field), (int, float, str)))
        raise UserError(f"{what} {i} should be a dict with an int or str as its {field}: "
                         f"{str(r)[:300]}") from None


def describe_ids(ids):
    """How many ids, the first, the last and their types, for an error message."""
    ids = sorted(set(ids), key=lambda i: (type(i).__name__, i))
    types = " and ".join(sorted({type(i).__name__ for i in ids}))
    return f"{len(ids)} ids, {ids[0]!r} to {ids[-1]!r} ({types})" if ids else "no ids"


def check_listed(dt, field, found, index):
    """Raises ValueError, showing the ids of both sides, if a detection's id is not in index.

    found (D,): below 0 where it may be missing.
    """
    bad = [i for i in np.flatnonzero(found < 0).tolist() if dt[i][field] not in index]
    if bad:
        first = list(dict.fromkeys(dt[i][field] for i in bad))[:5]
        raise UserError(f"{len(bad)} of {len(dt)} detections (first: detection {bad[0]}) have a "
                         f"value of {field} the ground truth does not list: {first}. They have "
                         f"{describe_ids(r[field] for r in dt)}; the ground truth has "
                         f"{describe_ids(index)}. Use the file they were made for and its ids")


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
    for what, box, other in (("detections", dt["box"], gt["box"]),
                             ("ground truth", gt["box"], dt["box"])):
        if box.max() <= 2 < other.max():
            return [f"the boxes of the {what} look like fractions of the image, {box[0].tolist()}: "
                    f"multiply them by its width and height"]

    def sized(columns):
        box = columns["box"]
        return dict(columns, box=np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1))

    n, notes = overlapping(gt, dt), []
    for what, sides in (("detections", (gt, sized(dt))), ("ground truth", (sized(gt), dt))):
        if overlapping(*sides) > max(2 * n, len(gt["image"]) / 10):
            notes.append(f"the boxes of the {what} look like x0, y0, x1, y1: COCO's are x, y, "
                         f"width, height")
    return notes


def read_objects(records, what, how):
    """The columns that annotations and detections share; image or category -1: not listed.

    how: iou_type, images and categories (id -> index), sizes of the images, strict, and notes, to
    which read_truths and read_detections add what pycocotools would do otherwise.
    """
    image = look_up(records, what, "image_id", how.images)
    category = look_up(records, what, "category_id", how.categories)
    if how.iou_type == "segm":
        mask, box = read_masks(records, what, np.where(category < 0, -1, image), how.sizes)
        return dict(image=image, category=category, box=box, mask=mask)
    box = read_numbers(records, what, "bbox", 4, strict=how.strict)
    return dict(image=image, category=category, box=box)


def own_area(columns):
    """Area of each mask, or else box, (n,) float64; 0 for a mask left out."""
    if "mask" in columns:
        return np.array([0.0 if m is None else mask_area(m) for m in columns["mask"]], np.float64)
    return columns["box"][:, 2] * columns["box"][:, 3]


def read_truths(records, what, how):
    """Columns of the ground truth."""
    columns, strict = read_objects(records, what, how), how.strict
    area, crowd = (None, None) if strict else (own_area(columns).tolist(), [0] * len(records))
    columns["area"] = read_numbers(records, what, "area", default=area, strict=strict)
    columns["crowd"] = read_numbers(records, what, "iscrowd", default=crowd) != 0
    ids = [r["id"] for r in records if isinstance(r.get("id"), (int, float, str))]
    if strict:
        last = {r["id"]: i for i, r in enumerate(records)} if len(ids) == len(records) else {}
        last = look_up(records, what, "id", last)
        columns["lost"] = np.array([r["id"] == 0 for r in records], bool)
        listed = np.flatnonzero((columns["image"] >= 0) & (columns["category"] >= 0))
        listed = listed[np.argsort(columns["image"][listed], kind="stable")]
        columns = take(columns, last[listed])
    else:
        if 0 in ids:
            how.notes.append("an annotation has the id 0: it counts here, pycocotools never finds "
                             "it")
        if len(set(ids)) < len(ids):
            how.notes.append("annotations share an id: all count here, pycocotools takes the last "
                             "for each of them")
    return columns


def read_detections(records, what, how):
    """Columns of the detections."""
    columns = read_objects(records, what, how)
    columns["score"] = read_numbers(records, what, "score", strict=how.strict)
    columns["area"] = own_area(columns)
    if "mask" in columns and records and records[0].get("bbox"):
        if how.strict:
            box = read_numbers(records, what, "bbox", 4, strict=True)
            columns["area"] = box[:, 2] * box[:, 3]
        else:
            how.notes.append("the detections have a bbox too: their size is that of their mask "
                             "here, of the box in pycocotools")
    return columns


def as_array(values):
    """An array, of no numbers where the values are uneven."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.empty(0, object)


def check_parameters(iou_type, iou_thrs, rec_thrs, max_dets, area_ranges):
    """Raises ValueError for what evaluate_columns cannot take."""
    if iou_type not in ("bbox", "segm"):
        raise UserError(f"iou_type {iou_type!r} is unknown, use 'bbox' or 'segm'")
    for name, values in (("iou_thrs", iou_thrs), ("rec_thrs", rec_thrs), ("max_dets", max_dets)):
        x = as_array(values)
        if x.ndim != 1 or not len(x) or x.dtype.kind not in "iuf" or not np.isfinite(x).all():
            raise UserError(f"{name} {values!r} should be a list of one number or more")
        if name == "rec_thrs" and (np.diff(x) < 0).any():
            raise UserError(f"rec_thrs {values!r} should ascend")
        if name == "max_dets" and (x.dtype.kind == "f" or x.min() < 1):
            raise UserError(f"max_dets {values!r} should be whole numbers of 1 or more")
    x = as_array(list(area_ranges.values()) if isinstance(area_ranges, dict) else [])
    if x.ndim != 2 or x.shape[1] != 2 or x.dtype.kind not in "iuf" or not (x[:, 0] <= x[:, 1]
                                                                           ).all():
        raise UserError(f"area_ranges {area_ranges!r} should be a dict of (least, most) pixels by "
                         f"name, as in {AREA_RANGES}")


def class_names(records, categories):
    """The names of categories by their records, with the id where two share a name, and "?" for
    what cannot be printed, half of a surrogate pair."""
    names = {r["id"]: str(r.get("name") or r["id"]).encode(errors="replace").decode()
             for r in records}
    uses = Counter(names.values())
    return [names[i] if uses[names[i]] == 1 else f"{names[i]} ({i})" for i in categories]


def read_sides(gt, dt):
    """Ground truth and detections from dict and list, or from their files, and what to call a
    record of each in an error."""
    names = ["annotation", "detection"]
    if isinstance(gt, (str, os.PathLike)):
        gt, names[0] = read_json(gt, "a COCO instances file"), f"{gt}: annotation"
    if isinstance(dt, (str, os.PathLike)):
        dt, names[1] = (read_json(dt, "a list of detections in COCO results format"),
                        f"{dt}: detection")
    if isinstance(dt, np.ndarray) and dt.ndim == 2 and dt.shape[1] == 7:    # so does pycocotools
        dt = [dict(image_id=i, bbox=box, score=s, category_id=k) for i, *box, s, k in dt.tolist()]
    if not isinstance(gt, dict) or not isinstance(gt.get("annotations") or [], list):
        raise UserError(f"{names[0]}s: the ground truth should be a COCO instances dict with a "
                         f"list of annotations, not a {type(gt).__name__}; are the two swapped?")
    if not isinstance(dt, (list, tuple)):
        raise UserError(f"{names[1]}s: they should be a list of dicts, not a {type(dt).__name__}; "
                         f"are the two swapped?")
    return gt, dt, names


def coco_eval(gt, dt, iou_type="bbox", *, iou_thrs=IOU_THRS, rec_thrs=REC_THRS, max_dets=MAX_DETS,
              area_ranges=AREA_RANGES, image_ids=None, category_ids=None, use_cats=True,
              strict=False):
    """COCO evaluation of a results file: what evaluate_columns returns, and names.

    gt: COCO instances dict or its path; dt: list of {"image_id", "category_id", "score", "bbox":
    [x, y, w, h] in pixels, or "segmentation"}, or its path. iou_type: "bbox", or "segm" for masks.
    image_ids, category_ids: the only ones to take part. use_cats=False: classes are not told
    apart, equal scores are in the order of category_ids. Ids are ints or strings. No "iscrowd" is
    0, no "area" that of box or mask; ground truths of unlisted images or categories do not take
    part. Raises ValueError or FileNotFoundError naming the file or record.

    Adds "category_ids" (ascending), "classes" (their names), "ap_per_class", "ap50_per_class" and
    "ar_per_class" (name -> float, nan without ground truth; all areas, most detections), and
    "notes", sentences also printed to stderr: what pycocotools does otherwise, why all is 0.

    strict=True does as pycocotools does. A ground truth with id 0 is never found; of several with
    one id the last stands for all; detections of unlisted categories are passed over; NaN scores
    come last, a NaN x or y overlaps what its height or width does, negative sizes nothing; a mask
    has the area of its detection's box, where there is one; the first AP is -1 without 100 in
    max_dets; no detections and fewer than three max_dets are an IndexError.
    """
    check_parameters(iou_type, iou_thrs, rec_thrs, max_dets, area_ranges)
    gt, dt, (annotation, detection) = read_sides(gt, dt)
    if strict and (not dt or len(max_dets) < 3):
        raise IndexError("pycocotools, and so strict, needs a detection and three max_dets: there "
                         f"are {len(dt)} and {len(max_dets)}")
    all_images, all_categories = id_index(gt, "images"), id_index(gt, "categories")
    images = subset(all_images, image_ids, "image_ids")
    categories = subset(all_categories, category_ids, "category_ids", sorted if use_cats else list)
    size_of = {r["id"]: (r.get("height"), r.get("width")) for r in gt["images"]}
    how = SimpleNamespace(iou_type=iou_type, images=images, categories=categories, strict=strict,
                          sizes=[size_of[i] for i in images], notes=[])
    found, notes = read_detections(dt, detection, how), how.notes
    check_listed(dt, "image_id", found["image"], all_images)
    if not strict:
        check_listed(dt, "category_id", found["category"], all_categories)
    truths = read_truths(gt.get("annotations") or [], annotation, how)
    if not strict and 100 not in max_dets:
        notes.append(f"AP is at {max(max_dets)} detections; pycocotools' is -1 unless 100 is there")
    unlisted = ((truths["image"] < 0) | (truths["category"] < 0)).sum()
    if unlisted and image_ids is None and category_ids is None:
        notes.append(f"{unlisted} annotations are of images or categories that are not listed: "
                     f"they take no part")
    sides = [take(c, (c["image"] >= 0) & (c["category"] >= 0)) for c in (truths, found)]
    names = class_names(gt["categories"], categories)
    if not use_cats:                                            # equal scores keep their order
        sides = [take(c, np.argsort(c["category"], kind="stable")) for c in sides]
        sides = [dict(c, category=np.zeros_like(c["category"])) for c in sides]
        names, categories = ["all classes"], [-1]

    result = evaluate_columns(*sides, len(names), iou_thrs, rec_thrs, max_dets, area_ranges, strict)
    if result["stats"][1] < 0.1:
        notes += find_causes(*sides, names)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    result.update(category_ids=list(categories), classes=names, notes=notes)
    for field in ("AP", "AP50", "AR"):
        result[f"{field.lower()}_per_class"] = {r["name"]: r[field] for r in per_class(result)}
    return result


def result_json(result):
    """A result as a dict for json.dump: the numbers by name, by class (null: none), and all curves.

    "precision", "scores" [T][R][K][A][M] and "recall" [T][K][A][M] are nested lists along
    "iou_thrs", "rec_thrs", "classes", "area_ranges" and "max_dets"; -1: no ground truth.
    """
    stats = {}
    for (array, iou, area, cut), value in zip(
            summary_rows(result["max_dets"], result["strict"]), result["stats"].tolist()):
        name = ("AP" if array == "precision" else "AR") + ("" if iou is None else f"{iou * 100:g}")
        name += "" if area == "all" else "_" + area
        stats[name + (f"@{cut}" if array == "recall" and area == "all" else "")] = value
    classes = [{name: None if value != value else value for name, value in row.items()}
               for row in per_class(result)]
    return {"stats": stats, "per_class": classes, "notes": result.get("notes", []),
            **{name: result[name] for name in ("classes", "max_dets", "area_ranges", "strict")},
            **{name: result[name].tolist()
               for name in ("iou_thrs", "rec_thrs", "precision", "recall", "scores")}}
