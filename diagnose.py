"""Where a detector errs, and the work of its layers and queries: tables and pictures.

    python evaluate.py out/ckpt.pt --errors confusion.png --threshold 0.5
    python evaluate.py out/ckpt.pt --layers --queries queries.png --json numbers.json
    python coco_eval.py --gt instances.json --dt detections.json --errors confusion.png

In Python, error_analysis, duplicates and query_slots take columns as evaluate_columns of
coco_eval.py does; a result of evaluate or coco_eval has them as "columns". No torch.
Papers: TIDE, arXiv:2008.08115; DETR, arXiv:2005.12872, Fig. 4 and 7.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coco_eval import (AREA_RANGES, REC_THRS, add_error_flags, best_detections, count_before,
                       evaluate_columns, find_pairs, match_pairs, of_class, precision_at_recall,
                       take, with_cells)

# -- where a detector errs -----------------------------------------------------------------------

FOUND_IOU, BACKGROUND_IOU = 0.5, 0.1                     # the paper's thresholds
ERRORS = {"cls": "wrong class", "loc": "wrong place", "both": "both of these",
          "dupe": "duplicate", "bkg": "background", "missed": "missed"}


def judge_detections(gt, dt, most=100):
    """The columns after COCO's matching at IoU 0.5.

    gt has "ignored" (G,) then. dt holds the detections that are right or wrong, at most `most` per
    image and class, sorted by class and falling score, and "found" (D,), rows of gt, -1 if wrong.
    """
    gt, dt = with_cells(gt, {"area": dt["box"][:, 2] * dt["box"][:, 3], **dt})
    dt = best_detections(dt, most)
    low, high = AREA_RANGES["all"]
    ignored = gt["crowd"] | (gt["area"] < low) | (gt["area"] > high)
    pairs = find_pairs(gt, dt, FOUND_IOU)
    found = match_pairs(pairs, dt["cell"], ignored, gt["crowd"], np.array([FOUND_IOU]))[:, 0]

    # a detection that finds an ignored object, or finds none and is ignored itself, does not count
    in_area = (dt["area"] >= low) & (dt["area"] <= high)
    counts = np.where(found >= 0, ~np.append(ignored, True)[found], in_area)
    return dict(gt, ignored=ignored), take(dict(dt, found=found), counts)


def by_image(columns):
    """The columns with one cell per image: objects of all classes compete."""
    columns = dict(columns, cell=columns["image"])
    return take(columns, np.argsort(columns["cell"], kind="stable"))


def error_kinds(gt, dt):
    """The kind of each detection, "right" or a key of ERRORS, and the object it aims at.

    gt, dt: of judge_detections. A wrong detection is of the first kind that fits, by its highest
    IoU with objects of its own class and of others: "loc" 0.1 to below 0.5 with its own; "cls" 0.5
    with another; "dupe" 0.5 with its own, which a better detection has found; "both" 0.1 with
    another; "bkg". Aims (D,): the row of gt for "cls" and "loc", -1 for others.
    Source: arXiv:2008.08115, Sec. 2.2; the order, which the paper leaves open, is its authors'
    program's.
    """
    D, wrong = len(dt["score"]), np.flatnonzero(dt["found"] < 0)
    objects = by_image(take(dict(gt, row=np.arange(len(gt["image"]))), ~gt["ignored"]))
    d, g, iou = find_pairs(objects, dict(take(dt, wrong), cell=dt["image"][wrong]), BACKGROUND_IOU)
    d, g = wrong[d], objects["row"][g]

    def best_pair(chosen):
        """The highest IoU of each detection among the chosen pairs, and the row of gt."""
        rows, first = np.unique(d[chosen], return_index=True)       # pairs: falling IoU within d
        best, row = np.zeros(D), np.full(D, -1)
        best[rows], row[rows] = iou[chosen][first], g[chosen][first]
        return best, row

    same_class = gt["category"][g] == dt["category"][d]
    own, own_row = best_pair(same_class)
    other, other_row = best_pair(~same_class)
    kinds = np.select([dt["found"] >= 0, (own >= BACKGROUND_IOU) & (own < FOUND_IOU),
                       other >= FOUND_IOU, own >= FOUND_IOU, other >= BACKGROUND_IOU],
                      ["right", "loc", "cls", "dupe", "both"], "bkg")
    return kinds, np.select([kinds == "loc", kinds == "cls"], [own_row, other_row], -1)


def ap50(dt, right, objects, classes):
    """COCO's AP at IoU 0.5: the mean over `classes`, (K',) indices; -1.0 if there are none.

    right (D,) bool; objects (K,): how many there are of each class. A class of which none is left
    counts as 0.
    """
    order = np.lexsort((dt["image"], -dt["score"], dt["category"]))     # last key first, stable
    dt, curves = take(dict(dt, right=right), order), np.zeros((len(REC_THRS), len(classes)))
    for column, k in enumerate(classes):
        own = of_class(dt, k)
        n, hit = len(own["score"]), own["right"][:, None]
        own.update(rank=np.zeros(n, int), in_area=np.ones(n, bool))
        candidates = dict(rank=own["rank"], row=np.arange(n), matched=hit, true_positive=hit)
        if objects[k]:
            curve = precision_at_recall(own, candidates, objects[k], REC_THRS, most=1)
            curves[:, column] = curve["precision"][0]
    return float(curves.mean()) if len(classes) else -1.0


def repair(gt, dt, kinds, aims, kind):
    """The detections after an oracle repairs all errors of one kind, and which are right then.

    "cls" and "loc" errors become right: they get the class of the object they aim at, or its place.
    Where several detections find an object then, the best stays and the others are dropped, as are
    all errors of the other kinds. Source: arXiv:2008.08115, Sec. 2.3.
    """
    right, keep = dt["found"] >= 0, kinds != kind
    if kind not in ("cls", "loc"):
        return take(dt, keep), right[keep]

    # the object that each detection finds now, and the detection of highest score for each object
    target = np.where(right, dt["found"], np.where(keep, -1, aims))
    rows = np.flatnonzero(target >= 0)
    rows = rows[np.lexsort((~right[rows], -dt["score"][rows]))]
    best = rows[np.unique(target[rows], return_index=True)[1]]
    keep, category = target < 0, dt["category"].copy()
    keep[best], category[best] = True, gt["category"][target[best]]
    right = np.isin(np.arange(len(keep)), best)
    return take(dict(dt, category=category), keep), right[keep]


def gain_of_repairs(gt, dt, kinds, aims, num_classes):
    """AP50; "gain", what each kind of error costs of it: AP50 after the repair of this kind alone
    minus AP50; and "count", how many errors there are of each.

    Arguments of judge_detections and error_kinds. A "missed" object is one that no detection finds
    and no "cls" or "loc" error aims at; its repair is not to look for it. "false_positives" are
    repaired by dropping all, "false_negatives" by not looking for any that is not found.
    Source: arXiv:2008.08115, Sec. 2.2 and 2.3. The authors' program differs where an object that is
    found is aimed at with a higher score: it drops the error, while here, as in the paper, the
    detection of lower score is dropped.
    """
    def count(rows):
        return np.bincount(gt["category"][rows], minlength=num_classes)

    right, looked_for = kinds == "right", ~gt["ignored"]
    found = np.isin(np.arange(len(looked_for)), dt["found"][right])
    missed = looked_for & ~found & ~np.isin(np.arange(len(looked_for)), aims)
    objects = count(looked_for)
    classes = np.flatnonzero(objects)

    start, gain = ap50(dt, right, objects, classes), {}
    for kind in list(ERRORS)[:-1]:
        gain[kind] = ap50(*repair(gt, dt, kinds, aims, kind), objects, classes) - start
    gain["missed"] = ap50(dt, right, objects - count(missed), classes) - start
    gain["false_positives"] = ap50(take(dt, right), right[right], objects, classes) - start
    gain["false_negatives"] = ap50(dt, right, count(found), classes) - start
    number = {kind: int((kinds == kind).sum()) for kind in ERRORS}
    number.update(missed=int(missed.sum()), false_positives=int((~right).sum()),
                  false_negatives=int((looked_for & ~found).sum()))
    return {"AP50": start, "gain": gain, "count": number}


def f1_of(score, right, objects, threshold):
    """Precision, recall and F1 of detections that score at least the threshold, and the threshold
    of the best F1, as a dict; None for 0 / 0."""
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], right[order].cumsum()
    n = int((score >= threshold).sum())
    found = int(hits[n - 1]) if n else 0

    numbers = {"objects": int(objects), "detections": n, "found": found,
               "precision": found / n if n else None,
               "recall": found / int(objects) if objects else None,
               "F1": 2 * found / (n + int(objects)) if n + objects else None,
               "best_F1": None, "best_threshold": None}

    # F1 = 2 TP / (2 TP + FP + FN) if all up to each score are kept, equal scores together
    if len(score):
        f1 = 2 * hits / (np.arange(1, len(score) + 1) + objects)
        f1[:-1][score[:-1] == score[1:]] = -1
        best = f1.argmax()
        numbers.update(best_F1=float(f1[best]), best_threshold=float(score[best]))
    return numbers


def confusion_matrix(gt, dt, num_classes, threshold):
    """Counts (K+1, K+1) of true class by detected class, of detections that score at least the
    threshold; the last row is background, the last column missed.

    gt, dt: of judge_detections. On the diagonal are the right detections. Of the others the one of
    highest score chooses first among the objects, of any class, that are left, at IoU 0.5; those
    that find none, duplicates too, are on background.
    """
    K, dt = num_classes, take(dt, dt["score"] >= threshold)
    right = dt["found"] >= 0
    left = ~gt["ignored"]
    left[dt["found"][right]] = False
    objects = by_image(take(gt, left))
    others = take(dt, ~right)
    others = by_image(take(others, np.argsort(-others["score"], kind="stable")))
    no = np.zeros(len(objects["image"]), bool)
    found = match_pairs(find_pairs(objects, others, FOUND_IOU), others["cell"], no, no,
                        np.array([FOUND_IOU]))[:, 0]

    matrix = np.zeros((K + 1, K + 1), np.int64)
    np.add.at(matrix, (gt["category"][dt["found"][right]], dt["category"][right]), 1)
    np.add.at(matrix, (np.append(objects["category"], K)[found], others["category"]), 1)
    missed = ~np.isin(np.arange(len(no)), found)
    np.add.at(matrix, (objects["category"][missed], K), 1)
    return matrix


def error_analysis(gt, dt, classes, threshold=0.5, most=100):
    """Where detections err, as a dict for json.dump.

    gt, dt: columns of evaluate_columns; classes: K names; most: detections per image and class.
    "AP50", "gain" and "count" are those of gain_of_repairs, over all detections. Of detections that
    score at least the threshold, "count_at_threshold" counts the wrong ones of each kind, "all" and
    "per_class" hold the dicts of f1_of with "name", and "confusion" the matrix as lists. Crowds and
    the detections on them take no part.
    """
    K = len(classes)
    gt, dt = judge_detections(gt, dt, most)
    kinds, aims = error_kinds(gt, dt)
    kept = kinds[dt["score"] >= threshold]
    right, objects = kinds == "right", np.bincount(gt["category"][~gt["ignored"]], minlength=K)
    rows = []
    for k in range(K):
        own = of_class(dict(dt, right=right), k)
        if classes[k] and (objects[k] or len(own["score"])):
            rows.append({"name": classes[k],
                         **f1_of(own["score"], own["right"], objects[k], threshold)})
    return {**gain_of_repairs(gt, dt, kinds, aims, K), "threshold": threshold,
            "count_at_threshold": {kind: int((kept == kind).sum()) for kind in list(ERRORS)[:-1]},
            "all": {"name": "all", **f1_of(dt["score"], right, objects.sum(), threshold)},
            "per_class": rows, "classes": list(classes),
            "confusion": confusion_matrix(gt, dt, K, threshold).tolist()}


# -- errors as tables and as a picture -----------------------------------------------------------

def shown_confusion(result):
    """The rows and columns of a confusion matrix that are not empty, and the names of both."""
    matrix, K = np.array(result["confusion"]), len(result["classes"])
    used = np.flatnonzero((matrix[:K].sum(1) > 0) | (matrix[:, :K].sum(0) > 0))
    names = [" ".join((result["classes"][k] or f"class {k}").split())[:40] for k in used]
    used = np.append(used, K)
    return matrix[used][:, used], names + ["background"], names + ["missed"]


def confusion_table(result, most=8, pairs=15):
    """The confusion matrix as lines; beyond `most` classes the most frequent mistakes instead."""
    matrix, rows, columns = shown_confusion(result)
    if len(rows) <= most + 1:
        width = max(map(len, rows))
        lines = [" ".join([f"{'true class':{width}}"] + [f"{name[:10]:>10}" for name in columns])]
        for name, counts in zip(rows, matrix.tolist()):
            lines.append(" ".join([f"{name:{width}}"] + [f"{n:10d}" for n in counts]))
        return "\n".join(lines)

    mistakes = matrix - np.diag(np.diag(matrix))
    mistakes[-1], mistakes[:, -1] = 0, 0
    lines = [f"{matrix[:-1, -1].sum()} objects are missed, {matrix[-1].sum()} detections find "
             f"none that is left, {mistakes.sum()} have a wrong class"
             + ("; most frequent:" if mistakes.any() else "")]
    for i in np.argsort(-mistakes, axis=None, kind="stable")[:pairs]:
        row, column = divmod(int(i), len(columns))
        if mistakes[row, column]:
            lines.append(f"{mistakes[row, column]:6d} of {matrix[row].sum()} {rows[row]} detected "
                         f"as {columns[column]}")
    return "\n".join(lines)


def error_tables(result):
    """An error_analysis as text: gains, F1 by class, confusions."""
    threshold = f"{result['threshold']:g}"
    lines = [f"AP50 {result['AP50']:.3f}; what it gains if one kind of error alone is repaired:",
             f"{'kind of error':20}  AP50  count  score >= {threshold}"]
    names = {**ERRORS, "false_positives": "all false positives",
             "false_negatives": "all false negatives"}
    for kind, name in names.items():
        line = f"{name:19} {result['gain'][kind]:+.3f} {result['count'][kind]:6d}"
        kept = result["count_at_threshold"].get(kind)
        lines.append(line if kept is None else f"{line} {kept:8d}")

    def number(value):
        return "    -" if value is None else f"{value:.3f}"

    rows = sorted(result["per_class"], key=lambda r: (-(r["F1"] or 0), r["name"]))
    width = max([5] + [len(r["name"]) for r in rows])
    lines += ["", f"at scores of {threshold} or more, and at the threshold of the best F1:",
              f"{'class':{width}}  precision  recall     F1  best F1  threshold  objects"]
    for r in [result["all"], *rows]:
        lines.append(f"{r['name']:{width}}  {number(r['precision']):>9}   {number(r['recall'])}  "
                     f"{number(r['F1'])}    {number(r['best_F1'])}      "
                     f"{number(r['best_threshold'])}  {r['objects']:7d}")
    return "\n".join(lines + ["", f"detected as, at scores of {threshold} or more:",
                              confusion_table(result)])


def draw_confusion(result):
    """The confusion matrix as a PIL image: right ones green, others red, the darker the larger
    their share of the row."""
    matrix, rows, columns = shown_confusion(result)
    n = len(rows)
    side = max(4, min(64, 1200 // n))
    font = ImageFont.load_default(max(10, min(16, side // 3)))
    corner = ["rows: truth", "columns: detected"]
    left = 12 + int(max(font.getlength(text) for text in rows + columns + corner))
    image = Image.new("RGB", (left + n * side + 8, left + n * side + 8), "white")
    draw = ImageDraw.Draw(image)

    # names on the left, and on top turned by 90 degrees
    draw.text((6, 6), "\n".join(corner), "black", font=font)
    for i, (row, column) in enumerate(zip(rows, columns) if side >= 10 else ()):
        middle = left + (i + 0.5) * side
        draw.text((left - 6, middle), row, "black", font=font, anchor="rm")
        label = Image.new("RGB", (left - 6, side), "white")
        ImageDraw.Draw(label).text((0, side / 2), column, "black", font=font, anchor="lm")
        image.paste(label.rotate(90, expand=True), (left + i * side, 0))

    # the shares of each row as shades, the counts as numbers
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    for (i, j), share in np.ndenumerate(shares):
        x, y, light = left + j * side, left + i * side, round(255 * (1 - share))
        color = (light, 255 - (255 - light) // 3, light) if i == j else (255, light, light)
        draw.rectangle([x, y, x + side, y + side], color, outline="lightgray")
        text = str(matrix[i, j])
        if matrix[i, j] and font.getlength(text) < side - 2:
            draw.text((x + side / 2, y + side / 2), text, "black", font=font, anchor="mm")
    return image


# -- decoder layers and duplicates ---------------------------------------------------------------

def overlapping_pairs(dt, iou):
    """Detections sorted by class, image and falling score, and the pairs of one class and image
    that overlap by more than `iou`: rows (better, worse)."""
    dt = take(dt, np.argsort(-dt["score"], kind="stable"))
    dt = dict(dt, crowd=np.zeros(len(dt["score"]), bool))
    dt, _ = with_cells(dt, dt)                           # sorts by cell, stable
    worse, better, overlap = find_pairs(dt, dt, iou)
    pair = (better < worse) & (overlap > iou)
    return dt, better[pair], worse[pair]


def suppress(dt, iou=0.7):
    """Columns of the detections that non-maximum suppression keeps, by class and image: from the
    best score down, each one that is kept drops those that overlap it by more than `iou`."""
    dt, better, worse = overlapping_pairs(dt, iou)
    keep = np.ones(len(dt["score"]), bool)

    # step s judges what those of rank s in their class and image drop
    rank = count_before(dt["cell"])[better]
    order = np.argsort(rank, kind="stable")
    for pair in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        keep[worse[pair][keep[better[pair]]]] = False
    return take(dt, keep)


def duplicates(dt, images, score=0.5, iou=0.7):
    """Pairs per image of the same class that overlap by more than `iou`, both scoring over `score`.
    images: how many there are."""
    return len(overlapping_pairs(take(dt, dt["score"] > score), iou)[1]) / images


def ap_by_layer(results, images):
    """A dict for each result of evaluate_layers: "layer" (from 1), "AP" and "AP50", "AP_nms" and
    "AP50_nms" after suppress, and "duplicates" per image. Source: arXiv:2005.12872, Fig. 4."""
    rows = []
    for layer, result in enumerate(results):
        gt, dt = result["columns"]
        kept = evaluate_columns(gt, suppress(dt), len(result["classes"]), max_dets=[100],
                                area_ranges={"all": AREA_RANGES["all"]})
        (ap, half), (ap_nms, half_nms) = (r["stats"][:2].tolist() for r in (result, kept))
        rows.append({"layer": layer + 1, "AP": ap, "AP50": half, "AP_nms": ap_nms,
                     "AP50_nms": half_nms, "duplicates": duplicates(dt, images)})
    return rows


def layer_table(rows):
    """The rows of ap_by_layer as text."""
    lines = ["              AP   AP50  with NMS at 0.7: AP   AP50  pairs of duplicates per image"]
    for r in rows:
        lines.append(f"layer {r['layer']:3d}  {r['AP']:6.3f} {r['AP50']:6.3f}  {r['AP_nms']:19.3f} "
                     f"{r['AP50_nms']:6.3f}  {r['duplicates']:29.3f}")
    return "\n".join(lines)


# -- query slots ---------------------------------------------------------------------------------

def entropy(counts):
    """The entropy in bits of the last axis, counts of 0 or more with a positive sum."""
    p = counts / counts.sum(-1, keepdims=True)
    return 0.0 - (p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(-1)


def query_slots(dt, sizes, num_classes, score=0.5):
    """Where each query's boxes lie in the images of a data set, and what they are.

    dt: columns of the detections of all Q queries of every image, in order; sizes (images, 2)
    height and width. Returns a dict: "boxes" (Q, images, 4) cx, cy, w, h in [0, 1] of the image;
    "spread" (Q,), the root of the mean squared distance of the centres from their mean;
    "class_entropy" (Q,) in bits, 0 if a query always says the same class; "used" (Q,), the share of
    images in which it scores over `score`; "mutual_information" in bits of the query and the cell
    of a 4 x 4 grid that its centre lies in, from 0 (each query looks everywhere) to the smaller of
    4 and log2 Q. Few images bias it upwards, by about 11 / images. Raises ValueError.
    """
    images = len(sizes)
    Q = len(dt["image"]) // max(images, 1)
    if not Q or not np.array_equal(dt["image"], np.repeat(np.arange(images), Q)):
        raise ValueError(f"{len(dt['image'])} detections of {images} images: query slots need the "
                         f"same number in every image, in the order of images and queries")
    wh = np.repeat(np.asarray(sizes, np.float64)[:, ::-1], Q, 0)
    boxes = np.concatenate([dt["box"][:, :2] + dt["box"][:, 2:] / 2, dt["box"][:, 2:]], 1)
    boxes = (boxes / np.tile(wh, 2)).reshape(images, Q, 4).swapaxes(0, 1)

    centres, query = boxes[..., :2], np.arange(Q)[:, None]
    column, row = np.floor(4 * centres).clip(0, 3).astype(int).transpose(2, 0, 1)
    cells, said = np.zeros((Q, 16)), np.zeros((Q, num_classes))
    np.add.at(cells, (query, 4 * row + column), 1)
    np.add.at(said, (query, dt["category"].reshape(images, Q).T), 1)
    return {"boxes": boxes, "spread": np.sqrt(centres.var(1).sum(-1)),
            "class_entropy": entropy(said),
            "used": (dt["score"].reshape(images, Q) > score).mean(0),
            "mutual_information": max(0.0, float(entropy(cells.sum(0)) - entropy(cells).mean()))}


def query_table(slots, most=40):
    """The numbers of query_slots as text: mean, least and most, then the first `most` queries."""
    Q, images = slots["boxes"].shape[:2]
    columns = [slots[name] for name in ("spread", "class_entropy", "used")]
    lines = [f"{Q} queries in {images} images; mutual information of query and place "
             f"{slots['mutual_information']:.3f} of {min(4, math.log2(Q)):.3f} bits",
             "query  spread of centres  entropy of classes, bits  images with a score over 0.5"]
    rows = [(name, *(f(c) for c in columns)) for name, f in
            (("mean", np.mean), ("least", np.min), ("most", np.max))]
    rows += [(str(q), *(c[q] for c in columns)) for q in range(min(Q, most))]
    lines += [f"{name:5}  {a:17.3f}  {b:24.3f}  {c:28.1%}" for name, a, b, c in rows]
    return "\n".join(lines)


def draw_queries(slots, most=40, side=150):
    """A PIL image with a square for each of the first `most` queries: the centres of its boxes in
    all images, green for small ones (under 1/8 of the image), red for wide, blue for tall ones.
    Source: arXiv:2005.12872, Fig. 7."""
    boxes = slots["boxes"][:most]
    columns = max(3, min(10, math.ceil(len(boxes) / 2)))
    rows, gap, top, foot = math.ceil(len(boxes) / columns), 6, 18, 24
    image = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + top + gap) + foot),
                      "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    radius = 1 if boxes.shape[1] < 2000 else 0.5
    colors = np.array([(40, 160, 60), (220, 40, 40), (40, 70, 220)], np.uint8)
    for q, (cx, cy, w, h) in enumerate(boxes.transpose(0, 2, 1)):
        row, column = divmod(q, columns)
        x0, y0 = gap + column * (side + gap), top + row * (side + top + gap)
        draw.text((x0, y0 - 2), f"query {q}", "black", font=font, anchor="ld")
        draw.rectangle([x0, y0, x0 + side, y0 + side], "white", outline="gray")
        size = np.where(w * h < 1 / 8, 0, np.where(w >= h, 1, 2))
        points = np.stack([x0 + cx.clip(0, 1) * side, y0 + cy.clip(0, 1) * side], 1)
        for (x, y), color in zip(points.tolist(), colors[size].tolist()):
            draw.rectangle([x - radius, y - radius, x + radius, y + radius], tuple(color))
    x = gap
    for color, text in zip(colors.tolist(), ("small: under 1/8 of the image", "large, wide",
                                             "large, tall")):
        draw.text((x, image.height - 6), text, tuple(color), font=font, anchor="ld")
        x += font.getlength(text) + 20
    return image


# -- for the commands ----------------------------------------------------------------------------

def add_flags(parser):
    """The flags of evaluate.py for what this file tells of a detector."""
    add_error_flags(parser)
    parser.add_argument("--layers", action="store_true",
                        help="AP after every decoder layer, with suppression too, and pairs of "
                             "duplicates")
    parser.add_argument("--queries", default="", metavar="PNG",
                        help="tell where each query looks, and draw the centres of its boxes there")


def probe(result, errors="", threshold=0.5, queries="", dataset=None, layers=()):
    """The analyses that the flags ask for: a dict for json.dump and a list of texts to print.

    result: of evaluate or coco_eval; errors, queries: paths of the pictures to draw, "" for none;
    dataset: of the queries and layers; layers: of evaluate_layers, empty for none.
    """
    numbers, texts = {}, []
    if errors:
        numbers["errors"] = error_analysis(*result["columns"], result["classes"], threshold,
                                           result["max_dets"][-1])
        draw_confusion(numbers["errors"]).save(errors, "PNG")
        texts.append(f"{error_tables(numbers['errors'])}\n\nconfusion matrix: {errors}")
    if layers:
        numbers["layers"] = ap_by_layer(layers, len(dataset))
        texts.append(layer_table(numbers["layers"]))
    if queries:
        slots = query_slots(result["columns"][1], dataset.sizes, len(dataset.classes))
        draw_queries(slots).save(queries, "PNG")
        texts.append(f"{query_table(slots)}\n\nquery slots: {queries}")
        del slots["boxes"]
        numbers["queries"] = {name: np.asarray(x).tolist() for name, x in slots.items()}
    return numbers, texts
