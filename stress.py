"""Programs that try to break what test_all.py promises, for as long as one likes:

python stress.py evaluator 2000        the evaluator beside pycocotools on 2000 seeds of four random
                                       cases (boxes, other parameters, odd input, masks), in which
                                       every bit has to be equal; 6 minutes
python stress.py annotations 600       COCO files with random changes: each is an error that names
                                       the record, or can be trained on; 4 seconds
python stress.py images 2000           image files with changed bytes: each is an error that names
                                       the file, or is read in the size it should have; 10 seconds
python stress.py kill 20               training killed at 20 random moments, in saves and in
                                       evaluations too, and started again: it ends bit-equal to a
                                       run that was not killed; 2 minutes
python stress.py kill 20 --processes 2     the same with one of two processes killed; 4 minutes
python stress.py kill 3 --torchrun         the same with a process under torchrun --max_restarts

The first case that fails ends the program. --seed N gives other cases. test_all.py runs short
versions of all of them, and uses the helpers that stand here first.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")    # more wait for each other where cores are shared

import numpy as np
import torch
from PIL import Image

import train
from images import read_image
from coco_eval import coco_eval, summary
from check_data import short_repr
from data import CocoDataset, EvalSampler, TrainSampler, collate, cxcywh_to_xyxy
from model import build_model
from losses import set_loss


# -- used by test_all.py too ---------------------------------------------------------------------

TINY_FILES = """--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --enc_layers 1
    --dec_layers 2 --backbone_norm batch --backbone_weights none --dropout 0.1 --image_size 32
    --augment --batch_size 8 --eval_batch_size 2 --epochs 2 --schedule step --lr_drop 1
    --warmup_steps 2 --lr 1e-3 --lr_backbone 1e-4 --weight_decay 1e-4 --clip_max_norm 0.1
    --eval_every 1 --log_every 1 --num_workers 0 --device cpu --dtype float32 --seed 1""".split()
TINY = [*TINY_FILES, "--train_shapes", "24", "--val_shapes", "5"]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def lines(path):
    return [json.loads(line) for line in open(path)]


def assert_identical(a, b, where=""):
    """Equal nested dicts and lists, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, (dict, list)):
        assert type(a) is type(b) and len(a) == len(b), (where, a, b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    else:
        assert a == b, f"{where}: {a!r} is not {b!r}"


def assert_same_run(a, b):
    """Checkpoints and logs in two --output_dirs are equal bit for bit, but for times."""
    for name in ("ckpt.pt", "best.pt"):
        one, two = (checkpoint(f"{folder}/{name}") for folder in (a, b))
        for key in ("model", "optimizer", "epoch", "step", "best_score", "sums"):
            assert_identical(one[key], two[key], f"{name}[{key!r}]")
    timed = {"images_per_s", "data_share", "memory_gb", "elapsed_s", "eta_s"}
    for name in ("log.txt", "steps.txt"):
        one, two = (lines(f"{folder}/{name}") for folder in (a, b))
        for record in one + two:
            for key in timed & record.keys():
                del record[key]
        assert_identical(one, two, name)


def annotation(id, image_id, category_id, bbox=(10, 5, 20, 30), **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def write_coco(root, sizes=((64, 48), (64, 48), (64, 48)), **changes):
    """Three images of sizes (width, height) and their annotations on disk; the two paths."""
    images = [dict(id=i, file_name=f"{i}.png", width=w, height=h)
              for i, (w, h) in zip((900, 2, 40), sizes)]
    for r in images:
        color = r["id"] % 256, 0, 0
        Image.new("RGB", (r["width"], r["height"]), color).save(root / r["file_name"])
    content = {
        "images": images,
        "categories": [dict(id=i, name=n) for i, n in ((90, "zebra"), (7, "ant"), (13, "mole"))],
        "annotations": [annotation(1, 900, 90), annotation(2, 2, 13), annotation(3, 2, 7)]}
    (root / "instances.json").write_text(json.dumps(content | changes))
    return root / "instances.json", root


BOX = (10, 10, 50, 50)


def ann(box=BOX, image_id=1, category_id=1, **more):
    return dict(image_id=image_id, category_id=category_id, bbox=list(box), **more)


def det(score, box=BOX, image_id=1, category_id=1):
    return dict(image_id=image_id, category_id=category_id, bbox=list(box), score=score)


# -- the evaluator beside pycocotools ------------------------------------------------------------

def random_box_case(rng, odd=False):
    """COCO dicts full of ties, crowds, empty cells, absent classes and odd sizes; D >= 1.

    odd: with what pycocotools treats oddly too, ids 0 and doubled, NaN areas, negative sizes.
    """
    crowded = rng.random() < 0.15                               # over 100 detections in a cell
    num_images, num_classes = (1, 1) if crowded else rng.integers(1, 5, 2)
    G, D = rng.integers(0, 40), rng.integers(120, 260) if crowded else rng.integers(1, 120)
    images, classes = rng.permutation(99)[:num_images], rng.permutation(99)[:num_classes]
    xy, wh = rng.integers(0, 5, (G, 2)) * 5, rng.choice([0, 20, 30, 32, 96, 200], (G, 1))
    boxes = np.concatenate([xy, wh, wh], axis=1) + rng.choice([0, 0, 0, 0.3], (G, 1))
    areas = boxes[:, 2] * boxes[:, 3] * rng.choice([1, 1, 0.7, 0], G)
    areas = np.where(rng.random(G) < 0.1, rng.choice([1024, 9216, 1e10, 2e10], G), areas)
    anns = [dict(id=i + 1, image_id=int(rng.choice(images)), category_id=int(rng.choice(classes)),
                 bbox=boxes[i].tolist(), area=float(areas[i]), iscrowd=int(rng.random() < 0.15))
            for i in range(G)]
    dets = []
    for score in rng.integers(0, 12, D) / 12 if rng.random() < 0.7 else rng.random(D):
        a = anns[rng.integers(G)] if G and rng.random() < 0.8 else ann((0, 0, 20, 20), -1)
        jitter = rng.choice([0, 5, 2.5], 4) * rng.choice([0, 0, 1, -1], 4)
        box = np.maximum(a["bbox"] + jitter, 0).tolist()
        place = a["image_id"], a["category_id"]
        if place[0] < 0 or rng.random() < 0.1:
            place = int(rng.choice(images)), int(rng.choice(classes))
        dets.append(det(float(score), box, *place))
    for r in anns + dets if odd else []:
        what = rng.integers(12)
        if what < 4:
            r["bbox"][what] *= -1
        elif what == 4 and "area" in r:
            r["area"] = np.nan
        elif what == 5 and "id" in r:
            r["id"] = int(rng.choice([0, 1, 2]))
        elif what == 6 and "score" in r:
            r["category_id"] = 100                              # not listed
    return dict(images=[dict(id=int(i)) for i in images], annotations=anns,
                categories=[dict(id=int(i), name=str(i)) for i in classes]), dets


def random_segmentation(rng, h, w):
    """Polygons or a run-length code of h x w pixels, of any form but mostly a blob."""
    form, (cy, cx) = rng.random(), rng.random(2) * [h, w]
    if form < 0.5:
        angle = np.sort(rng.random(rng.integers(3, 9))) * 2 * np.pi
        radius = rng.choice([2.5, 6, 15]) * rng.uniform(0.5, 1.5, len(angle))
        ring = np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], 1).ravel()
        ring = ring.round(rng.integers(0, 4))
        return [ring.tolist()] if rng.random() < 0.7 else [ring.tolist(), (ring + 4).tolist()]
    y, x = np.mgrid[:h, :w]
    inside = (abs(y - cy) < rng.integers(0, h)) & (abs(x - cx) < rng.integers(0, w))
    inside &= rng.random((h, w)) < rng.choice([1, 1, 0.9])
    flat = np.concatenate([[False], inside.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [h * w]])).tolist()
    return dict(size=[h, w], counts=counts if counts[-1] or rng.random() < 0.5 else counts[:-1])


def random_mask_case(rng):
    """Like random_box_case, with masks, as ours and as pycocotools takes them."""
    from pycocotools import mask
    gt, dets = random_box_case(rng)
    sizes = {r["id"]: rng.integers(1, 40, 2).tolist() for r in gt["images"]}
    for r in gt["images"]:
        r["height"], r["width"] = sizes[r["id"]]
    some = {i: [random_segmentation(rng, *size) for _ in range(4)] for i, size in sizes.items()}
    theirs = []
    for r in gt["annotations"] + dets:
        size = sizes[r["image_id"]]
        r["segmentation"] = some[r["image_id"]][rng.integers(4)] if rng.random() < 0.7 else \
            random_segmentation(rng, *size)
        rle = mask.frPyObjects(r["segmentation"], *size)
        rle = mask.merge(rle) if isinstance(rle, list) else rle
        if "score" in r:
            r["bbox"] = []
            theirs.append(dict(r, segmentation=rle))
        if rng.random() < 0.3:
            r["segmentation"] = dict(rle, counts=rle["counts"].decode())
    return gt, dets, theirs


def random_parameters(rng, gt):
    """Arguments of coco_eval and the same as fields of pycocotools' Params."""
    images, classes = ([r["id"] for r in gt[field]] for field in ("images", "categories"))
    pairs = [("iou_thrs", "iouThrs", [np.array([0.0, 0.3, 1.0]), np.array([0.75]),
                                      np.linspace(0.05, 0.95, 7)]),
             ("rec_thrs", "recThrs", [np.array([0, 0.5, 0.99]), np.linspace(0, 1, 11)]),
             ("max_dets", "maxDets", [[1], [5, 2], [3, 1, 20], [1, 10, 300], [1, 3, 100, 7]]),
             ("area_ranges", "areaRng", [{"all": (0, 1e5)}, {"all": (0, 2e10), "low": (0, 400.5)}]),
             ("image_ids", "imgIds", [images[:1], images[::-1] + images]),
             ("category_ids", "catIds", [classes[:1], sorted(classes)[::2]]),
             ("use_cats", "useCats", [False])]
    ours, theirs = {}, {"catIds": sorted(classes)}
    for our_name, their_name, values in pairs:
        if rng.random() < 0.4:
            value = values[rng.integers(len(values))]
            ours[our_name] = theirs[their_name] = value
            if their_name == "areaRng":
                theirs.update(areaRng=list(value.values()), areaRngLbl=list(value))
    return ours, theirs


def reference(gt, dets, iou_type="bbox", **params):
    """Arrays of pycocotools, stats and printed lines; these are None where it cannot make them."""
    from pycocotools import coco, cocoeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = copy.deepcopy(gt)
        truth.createIndex()
        run = cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(dets)), iou_type)
        for name, value in params.items():
            setattr(run.params, name, copy.deepcopy(value))
        run.evaluate()
        run.accumulate()
    if len(run.params.maxDets) < 3:
        return dict(run.eval, stats=None), None
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        run.summarize()
    return dict(run.eval, stats=run.stats), lines.getvalue()


def assert_same(ours, theirs, lines):
    for name in ("precision", "recall", "scores", "stats"):
        if theirs[name] is not None:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert lines is None or summary(ours) == lines.rstrip("\n")


def compare_with_pycocotools(seed):
    """One random case of each kind: boxes, other parameters, odd input, masks."""
    rng = np.random.default_rng(seed)
    gt, dets = random_box_case(rng)
    assert_same(coco_eval(gt, dets), *reference(gt, dets))
    ours, theirs = random_parameters(rng, gt)
    strict = len(ours.get("max_dets", "123")) > 2
    theirs_result = reference(gt, dets, **theirs)
    result = coco_eval(gt, dets, strict=strict, **ours)
    assert_same(result, *theirs_result)
    gt, dets = random_box_case(rng, odd=True)
    assert_same(coco_eval(gt, dets, strict=True), *reference(gt, dets))
    gt, dets, their_dets = random_mask_case(rng)
    assert_same(coco_eval(gt, dets, "segm"), *reference(gt, their_dets, "segm"))


# -- COCO files with random changes --------------------------------------------------------------

ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 3.5, -3.5, 1e-300, 1e15, 1e30, -1e30, 10**30, -10**30, 2**31,
    2**53, 2**63 - 1, 2**63, 2**64, -2**63, 1e308, math.nan, math.inf, -math.inf, "", "a", "7", " ",
    "\ud800", "\udcff", "\0", "0.png\0", "a\nb", "a\u2028b", "\u202ea", "\U0001f9a7", "e\u0301",
    "x" * 300, "x" * 100_000, "../0.png", "/etc/passwd", "C:\\0.png", "..\\0.png", ".", "folder",
    [], {}, [[]], [1, 2, 3, 4], [1, [2], 3, 4], [1, 2, 3], [-5, -5, 3, 3], [0, 0, 0, 0],
    [1e14, 0, 1e14, 1], [0, 0, 1e-40, 1e-40], [1, 1, math.nan, 1], ["1", 1, 1, 1], {"id": 1})


def nodes(tree, path=()):
    """(container, key, path) of everything in a tree of lists and dicts."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key, (*path, key)
        if isinstance(tree[key], (dict, list)):
            yield from nodes(tree[key], (*path, key))


def mutate(content, rng):
    """Change one thing in a COCO dict; how the record may be called in a message: a set."""
    node, key, path = rng.choice([n for n in nodes(content)])
    def names(path):
        records = content.get(path[0])
        if len(path) < 2 or not isinstance(records, list) or len(records) <= path[1]:
            return {f'"{path[0]}"', f"list of {path[0]}", f"{path[0]}["}
        id_ = records[path[1]].get("id") if isinstance(records[path[1]], dict) else None
        return {f"{path[0]}[{path[1]}]", f"number {path[1]}", short_repr(id_)}
    before, kind, old = names(path), rng.randrange(12), node[key]
    if kind < 4:
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif kind == 4:
        del node[key]
        return before | {path[0]}                                    # the next one has its number
    elif kind == 5 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(old))
        return before | {path[0]}
    elif kind == 5:
        node[rng.choice(("", "id", "bbox", "\ud800", "extra"))] = node.pop(key)
    elif kind == 6:
        node[key] = rng.choice(([old], {"x": old}, str(old), [old] * 4))
    elif kind > 6 and isinstance(old, (int, float)):
        node[key] = rng.choice((-old, old + 0.5, old + 1, old * 1e30, old * 10**30, float(old),
                                old / 3, 2 * old, str(old)))
    else:
        other, k, to = rng.choice([n for n in nodes(content) if n[2][:len(path)] != path])
        if path[:len(to)] != to:
            before |= names(to)
            node[key], other[k] = copy.deepcopy(other[k]), copy.deepcopy(old)
            return before | names(path) | names(to) | {path[0], to[0]}
    return before | names(path)


def mutate_text(text, rng):
    """Change the bytes of a JSON file."""
    at = rng.randrange(len(text))
    odd = rng.choice((b"\xff", b"\0", b"[" * 100_000, b"{}", b"1e400", b"9" * 5000, b"NaN", b"'",
                      b'"\\ud800"', b"\\", b"\xef\xbb\xbf", b"-", b",", b"//", b"[" * 900))
    return rng.choice((text[:at], text[:at] + odd + text[at:], text[:at] + odd + text[at + 1:],
                       b"\xef\xbb\xbf" + text, text * 2, odd, b"", text.decode().encode("utf-16")))


def use(json_path, folder, train):
    """Everything that a run does with a data set; with `train`, a step of training as well."""
    dataset = CocoDataset(json_path, folder, 32, 64, augment=True)
    n, columns = len(dataset), dataset.columns()
    assert all(len(columns[k]) == len(columns["box"]) for k in columns)
    assert all(np.isfinite(columns[k]).all() for k in ("box", "area"))
    assert json.dumps([dataset.classes, dataset.category_ids]).encode()
    assert len(set(dataset.image_ids.tolist())) == n
    for sampler in (TrainSampler(dataset, min(2, n), 0), EvalSampler(dataset, 2)):
        assert all(0 < v < 1000 for i in range(n) for v in dataset.plan(0, i).size)
        for batch in sampler:
            images, valid, targets = collate([dataset[key] for key in batch])
            for target in targets:
                corners = cxcywh_to_xyxy(target["boxes"])
                assert ((corners > -1e-4) & (corners < 1.0001)).all()
                assert (target["labels"] < len(dataset.classes)).all()
    if train:
        model = build_model("detr_tiny", num_classes=len(dataset.classes))
        logits, boxes = model(images, valid)
        loss = set_loss(logits, boxes, targets)["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters()
                                       if p.grad is not None)


def fuzz(root, seeds, train_every):
    """Counts of what became of mutated COCO files: "fault", "size" (of an image file), "used"."""
    boxes = ((701, 900, 90, (1, 1, 2, 3), 0), (702, 2, 13, (0, 0, 5, 9), 0),
             (703, 2, 7, (1.5, 2, 3, 4), 1), (704, 40, 7, (0, 10, 1, 30), 0))
    sound, _ = write_coco(root, ((8, 6), (5, 9), (1, 50)), annotations=[
        annotation(*ids, box, area=6, iscrowd=crowd) for *ids, box, crowd in boxes])
    (root / "folder").mkdir(exist_ok=True)
    path, counts = root / "mutant.json", dict(fault=0, size=0, used=0)
    for seed in seeds:
        rng, content = random.Random(seed), json.loads(sound.read_text())
        names = set()
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            names |= mutate(content, rng)
        text = json.dumps(content).encode()
        if rng.random() < 0.2:
            text, names = mutate_text(text, rng), {"mutant.json"}
        path.write_bytes(text)
        try:
            use(path, root, counts["used"] % train_every == train_every - 1)
            counts["used"] += 1
        except ValueError as error:
            message = str(error)
            kind = "size" if "annotations say" in message else "fault"
            counts[kind] += 1
            message.encode()                                         # can be printed
            wanted = {"image id"} if kind == "size" else names
            assert str(path) in message or kind == "size", (seed, message)
            assert any(name in message for name in wanted), (seed, wanted, message)
            assert len(message) < 10_000, seed
    return counts


# -- image files with changed bytes --------------------------------------------------------------

PICTURE = Image.fromarray(np.stack([*np.meshgrid(np.arange(48) * 5, np.arange(64) * 3),
                                    np.full((64, 48), 120)], 2).astype(np.uint8))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height, pixels):
    """A grey PNG file that claims this size, whatever its compressed pixels hold."""
    def chunk(kind, body):
        return struct.pack(">I4s", len(body), kind) + body + struct.pack(
            ">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, *4 * [0]))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def broken_images():
    """{name: (bytes, what the error says, or None where it reads as `PICTURE` within 16)}."""
    still, fine = PICTURE.quantize(64), dict(quality=95, subsampling=0)
    jpeg, flat = saved(PICTURE, "JPEG", **fine), bytes(49 * 64)
    files = {f"cut.{format}": (saved(PICTURE, format)[:-60], "")
             for format in ("jpeg", "png", "gif", "webp", "bmp", "tiff", "ppm")}
    exif = saved(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" * 3, **fine)
    return files | {
        "empty.jpg": (b"", "cannot identify"), "text.jpg": (b"404: not found", "cannot identify"),
        "page.jpg": (b"<!DOCTYPE html><html>" + b" " * 5000, "cannot identify"),
        "noise.png": (bytes(range(256)) * 9, "cannot identify"),
        "crc.png": (png(48, 64, flat).replace(b"\x08\0\0\0\0", b"\x08\0\0\0\1"), ""),
        "short.png": (png(48, 64, flat[:99]), "truncated"), "zero.png": (png(0, 0, b""), ""),
        "claims.png": (png(60_000, 60_000, flat), "decompression bomb"),
        "bomb.png": (png(13_400, 13_400, bytes(13_401 * 13_400)), "decompression bomb"),
        "tables.jpg": (re.sub(rb"\xff\xdb\0C.{65}", b"", jpeg, flags=re.S), "broken data stream"),
        "floats.tif": (saved(PICTURE.convert("F"), "TIFF"), "mode F"),
        "size.png": (saved(PICTURE.crop((0, 0, 48, 63)), "PNG"), "48 x 63 .*say 48 x 64"),
        "exif.jpg": (exif, None), "tail.jpg": (jpeg + b"\0" * 999, None),
        "png.jpg": (saved(PICTURE, "PNG"), None),
        "moving.gif": (saved(still, "GIF", save_all=True, append_images=[still.rotate(90)]), None),
        "cmyk.jpg": (saved(PICTURE.convert("CMYK"), "JPEG", **fine), None)}


def change_bytes(content, rng):
    """An image file cut short, or with some bytes overwritten, inserted or left out."""
    at, n = rng.randint(0, len(content)), rng.choice((1, 1, 4, 60))
    odd = bytes(rng.randrange(256) for _ in range(n))
    return rng.choice((content[:at], content[:at] + odd + content[at + n:],
                       content[:at] + odd + content[at:], content[:at] + content[at + n:]))


def fuzz_images(root, seeds):
    """Counts of image files with changed bytes that were "read" or named in an error ("fault")."""
    files = {name: content for name, (content, _) in broken_images().items()}
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        files[f"sound.{format}"] = saved(PICTURE, format)
    counts = dict(read=0, fault=0)
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(sorted(files))
        path = root / name
        path.write_bytes(change_bytes(files[name], rng))
        try:
            image = read_image(path, (64, 48))
            assert image.mode == "RGB" and image.size == (48, 64), seed
            counts["read"] += 1
        except ValueError as error:
            assert str(path) in str(error), (seed, str(error))
            counts["fault"] += 1
    return counts


# -- killed at any moment ------------------------------------------------------------------------

KILLED = [*TINY, "--train_shapes", "80", "--epochs", "8", "--save_minutes", "0.001",
          "--output_dir", "out"]


def launch(options, folder, rank=0, world=1, port=0):
    """A process that trains, as `python train.py` does; its id. `folder`/evaluating is there while
    it evaluates, `folder`/met0 (1, ...) once it has met the other processes."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        torch.set_num_threads(1)
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        evaluate, start_processes = train.evaluate, train.start_processes

        def marked(*args):
            marker = f"evaluating{rank or ''}"                   # rank 0 ends last
            open(marker, "w").close()
            result = evaluate(*args)
            os.remove(marker)
            return result

        def met(device):
            result = start_processes(device)
            open(f"met{rank}", "w").close()
            return result
        train.evaluate, train.start_processes = marked, met
        train.main(options)
    except SystemExit as stop:
        print(stop.code if isinstance(stop.code, str) else "", flush=True)
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def job(folder, world):
    port = free_port()
    return {launch(KILLED, folder, rank, world, port): rank for rank in range(world)}


def wait(jobs, seconds):
    """Exit codes by rank of the processes that have ended, or all once they have."""
    codes, end = {}, time.time() + seconds
    while jobs and time.time() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[jobs.pop(pid)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.001)
    return codes


def kill_once(folder, world, rng):
    """Starts the run and kills one process of it: in a save, in an evaluation, or at any time.
    Returns in what it was killed, "" if it had ended."""
    sign = rng.choice(["out/ckpt.pt.tmp", "out/ckpt.pt.tmp2", "evaluating", "never"])
    begin = [os.path.join(folder, name) for name in ("out/ckpt.pt.tmp", "evaluating")]
    met = [os.path.join(folder, f"met{rank}") for rank in range(world)]
    [os.remove(name) for name in begin + met if os.path.exists(name)]
    jobs, codes = job(folder, world), {}
    while jobs and not all(map(os.path.exists, met)):    # one alone would wait for half an hour
        codes |= wait(jobs, 0.0005)
    after = time.time() + rng.uniform(0.3, 1.5)
    while jobs and (time.time() < after or sign != "never" and time.time() < after + 3
                    and not os.path.exists(os.path.join(folder, sign))):
        codes |= wait(jobs, 0.0005)
    if not jobs:
        assert set(codes.values()) == {0}, (codes, open(f"{folder}/output.txt").read())
        return ""
    os.kill(rng.choice(sorted(jobs)), signal.SIGKILL)
    wait(jobs, 20)
    if jobs:
        [os.kill(pid, signal.SIGKILL) for pid in jobs]
        raise AssertionError("the other processes did not end within 20 seconds")
    saving, evaluating = map(os.path.exists, begin)
    return "in a save" if saving else "in an evaluation" if evaluating else "elsewhere"


def finish(folder, world):
    os.makedirs(folder, exist_ok=True)
    codes = wait(job(folder, world), 120)
    assert codes == dict.fromkeys(range(world), 0), open(f"{folder}/output.txt").read()


def kill_and_restart(kills, world, rng, folder):
    """Kills runs of `world` processes and starts them again until they end; returns how many kills
    hit what."""
    whole, counts, k = f"{folder}/whole", {}, 0
    finish(whole, world)
    while sum(counts.values()) < kills:
        killed, k = f"{folder}/killed{k}", k + 1
        os.mkdir(killed)
        while sum(counts.values()) < kills:
            where = kill_once(killed, world, rng)
            if not where:
                break
            counts[where] = counts.get(where, 0) + 1
        finish(killed, world)
        assert_same_run(f"{whole}/out", f"{killed}/out")
    return counts


def kill_under_torchrun(kills, rng, folder):
    """Kills ranks of one torchrun --max_restarts, which starts them again by itself."""
    whole, killed = f"{folder}/whole", f"{folder}/killed"
    finish(whole, 2)
    os.mkdir(killed)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         f"--max_restarts={kills}", script, *KILLED], cwd=killed, stderr=subprocess.STDOUT,
        stdout=open(f"{killed}/output.txt", "w"), env={**os.environ, "OMP_NUM_THREADS": "1"})
    for k in range(kills):
        steps = f"{killed}/out/steps.txt"
        share = (k + 1) / (kills + 2)                                # of the run's 80 steps
        while not os.path.exists(steps) or len(open(steps).readlines()) < int(80 * share):
            assert torchrun.poll() is None, open(f"{killed}/output.txt").read()
            time.sleep(0.01)
        with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as children:
            os.kill(int(rng.choice(children.read().split())), signal.SIGKILL)
        while f"restart  {k + 1} of" not in open(f"{killed}/output.txt").read():
            assert torchrun.poll() is None, open(f"{killed}/output.txt").read()
            time.sleep(0.01)
    assert torchrun.wait(120) == 0, open(f"{killed}/output.txt").read()
    assert_same_run(f"{whole}/out", f"{killed}/out")
    return {"under torchrun": kills}


# -- the command line ----------------------------------------------------------------------------

def evaluator_main(args):
    for seed in range(args.seed, args.seed + args.count):
        print(f"\rseed {seed} ", end="", flush=True)
        with contextlib.redirect_stderr(io.StringIO()):              # notes on what is odd
            compare_with_pycocotools(seed)
    print(f"\r{args.count} times 4 random cases bit-equal to pycocotools")


def annotations_main(args):
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(Path(folder), range(args.seed, args.seed + args.count), train_every=10)
    print(f"{args.count} changed files: {counts['fault']} faults named, {counts['used']} used, "
          f"{counts['size']} that give an image another size than it has")


def images_main(args):
    warnings.simplefilter("ignore")                                  # Pillow's on damaged files
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz_images(Path(folder), range(args.seed, args.seed + args.count))
    print(f"{args.count} changed files: {counts['fault']} named in an error, {counts['read']} read")


def kill_main(args):
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.torchrun:
            counts = kill_under_torchrun(args.count, rng, folder)
        else:
            counts = kill_and_restart(args.count, args.processes, rng, folder)
    print(f"{args.count} kills, {counts}: all runs ended bit-equal to one that was not killed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, count, words in (
            ("evaluator", evaluator_main, 2000, "random cases beside pycocotools"),
            ("annotations", annotations_main, 600, "COCO files with random changes"),
            ("images", images_main, 2000, "image files with changed bytes"),
            ("kill", kill_main, 20, "training killed and started again")):
        command = commands.add_parser(name, help=words, allow_abbrev=False)
        command.add_argument("count", type=int, nargs="?", default=count)
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(run=run)
    command.add_argument("--processes", type=int, default=1, help="of which one is killed")
    command.add_argument("--torchrun", action="store_true",
                         help="2 processes of one torchrun, which starts them again by itself")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
