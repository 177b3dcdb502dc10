"""What a run says: banner, progress lines, logs, pictures, and why a step failed."""

import itertools
import json
import math
import os
import random
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from coco_eval import IOU_THRS, UserError, box_overlap, evaluate_columns, take, writing
from processes import sum_over_processes
from images import contact_sheet, draw_masks
from resnet import RESNETS
from classification import classification_loss
from data import box_iou, collate, cxcywh_to_xyxy, to_device
from matcher import NotFiniteError
from losses import loss_normalizers, set_loss
from config import OVERFIT_REPEATS
from evaluate import autocast


# losses of detectors, of --masks, of --teacher
LOSS_TERMS = "ce", "bbox", "giou", "mask", "dice", "soft", "imitation"


def say(run, *words, **options):
    """print, on rank 0. An output that is closed (`| head`, a terminal) or whose disk is full stops
    the run like SIGTERM."""
    if run.rank == 0:
        try:
            print(*words, **options, flush=True)
        except OSError as error:
            sys.stdout = open(os.devnull, "w")
            if not run.interrupt["stop"]:
                run.interrupt.update(stop=1.0, code=141)             # 128 + SIGPIPE
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError):
                    print(f"the output cannot be written ({error}): stopping after this step",
                          file=sys.stderr)


# -- banner --------------------------------------------------------------------------------------

def banner(run):
    """Lines on what was decided, before the first step."""
    cfg, c = run.cfg, run.model_cfg
    detector = hasattr(c, "num_queries")
    train_set, val_set = run.train_loader.dataset, run.val_loader.dataset
    steps = run.train_loader.batch_sampler.steps
    most = int(np.diff(train_set.offsets).max()) if detector else 1
    data = {"coco": f"{getattr(train_set, 'format_name', 'own')} annotations",
            "image_folder": "class folders"}.get(cfg.kind)
    if data:
        data += f", {train_set.source if detector else cfg.data}"
    else:
        why = "no --data, and no folder data/coco" if detector else "no --data"
        what = cfg.kind.replace("_", " ") if cfg.scenes == "plain" else cfg.scenes
        data = f"built-in {what}, {cfg.image_size} pixels ({why})"
    if cfg.overfit:
        data += f"; --overfit: {len(val_set)} images, {OVERFIT_REPEATS} passes an epoch"
    objects = f", at most {most} objects in an image" if detector else ""
    notes = [] if cfg.kind == "coco" or cfg.overfit else list(val_set.notes)
    if run.class_weights is not None:
        weights = zip(train_set.classes[:20], run.class_weights.tolist())
        notes.append(f"         --class_weights {', '.join(f'{n} {w:.2g}' for n, w in weights)}")
    return [
        f"data     {data}",
        f"         {len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.classes)} classes{objects}",
        *train_set.notes, *notes, describe_images(cfg), *describe_model(run),
        f"run      {run.world} process(es) on {run.device}, {str(run.dtype)[6:]}, "
        f"{run.train_loader.num_workers} loader worker(s) each",
        f"         {cfg.epochs} epochs of {steps} steps of {cfg.batch_size} images: "
        f"{steps * cfg.epochs} steps",
        f"writes   {cfg.output_dir}/: ckpt.pt, best.pt, log.txt, steps.txt, first_batch.jpg, "
        f"predictions.jpg", *advice(run, steps, most)]


def describe_images(cfg):
    """The banner's line on the images as the network gets them."""
    augment = {True: "full", False: "no"}.get(cfg.augment, cfg.augment)
    size = f"{cfg.image_size} x {cfg.image_size} pixels"
    if cfg.kind == "coco":
        size = (f"{cfg.image_size} pixels at the shorter side, at most {cfg.max_size} at the "
                f"longer")
    recipe = f", --recipe {cfg.recipe}" if cfg.recipe else ""
    return f"         images of {size}; {augment} augmentation{recipe}"


def describe_model(run):
    """The banner's lines on the model."""
    c, name = run.model_cfg, run.cfg.model
    trained = sum(p.numel() for p in run.raw_model.parameters() if p.requires_grad)
    if not hasattr(c, "backbone"):
        lines = [f"model    {name}, mixers {c.mixers}, {trained:,d} trained parameters"]
        if run.cfg.teacher:
            loss = run.loss_cfg
            lines.append(f"teacher  {run.cfg.teacher}: {loss.soft_loss_coef:g} of the loss at "
                         f"temperature {loss.temperature:g}, imitation "
                         f"{loss.imitation_loss_coef:g}")
        return lines
    norm = f", {c.backbone_norm} norm" if c.backbone in RESNETS else ""
    return [f"model    {name}, encoder {c.encoder_mixer or c.mixer}, decoder "
            f"{c.decoder_mixer or c.mixer}, {trained:,d} trained parameters",
            f"         {c.backbone}{norm}{', masks' if c.masks else ''}"]


def typical_side(dataset, cfg):
    """Median side of the objects, sqrt(width * height), in pixels of the images in validation."""
    boxes = dataset.columns()
    short, long = dataset.sizes.min(1), dataset.sizes.max(1)
    scale = np.minimum(cfg.image_size / short, cfg.max_size / long)[boxes["image"]]
    return np.median(np.sqrt(boxes["box"][:, 2:].prod(1)) * scale)


def advice(run, steps, most):
    """The banner's lines on what will probably disappoint."""
    cfg, lines, all_steps = run.cfg, [], steps * run.cfg.epochs
    queries = getattr(run.model_cfg, "num_queries", most)
    if most > queries:
        lines.append(f"note     {most} objects in an image, but {queries} queries: the rest cannot "
                     f"be found, raise --num_queries")
    if cfg.kind == "coco" and run.val_loader.dataset.crowd.all():
        lines.append("note     the validation images have no objects: every AP will be -1, and no "
                     "best.pt is written")
    from_scratch = not (cfg.finetune or cfg.frozen_weights or cfg.overfit or cfg.recipe)
    if cfg.kind == "coco" and from_scratch and all_steps < 100_000:
        lines.append(f"note     {all_steps} steps from scratch are too few for the official recipe "
                     f"(300,000):\n         give --finetune with an official detector, or --recipe "
                     f"small, made for 3,750")
    if cfg.kind == "image_folder" and from_scratch and all_steps < 10_000 and cfg.lr < 5e-4:
        lines.append(f"note     {all_steps} steps; PoolFormer's --lr and --warmup_epochs are for "
                     f"375,000: give --finetune or --recipe small,\n         or think of "
                     f"--lr 1e-3 --warmup_epochs 1")
    if max(cfg.warmup_steps, cfg.warmup_epochs * steps) >= all_steps:
        lines.append(f"note     the learning rate warms up in all of the {all_steps} steps: give "
                     f"fewer --warmup_steps or --warmup_epochs")
    side = typical_side(run.train_loader.dataset, cfg) if cfg.kind == "coco" else math.inf
    if side < 16:
        lines.append(f"note     half of the objects are smaller than {side:.0f} x {side:.0f} "
                     f"pixels at --image_size {cfg.image_size}: a larger one finds more of them")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        lines.append(f"restart  {os.environ['TORCHELASTIC_RESTART_COUNT']} of torchrun")
    return lines


# -- progress and logs ---------------------------------------------------------------------------

def hms(seconds):
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


def append_json(path, record):
    """Adds a line to a log file. Raises UserFileError."""
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def check_workers(batches, error):
    """Raises UserError if a worker of a loader's iterator was killed; torch reports it anywhere."""
    killed = [w.exitcode for w in getattr(batches, "_workers", ()) if w.exitcode]
    if killed:
        raise UserError(f"a DataLoader worker was killed (exit code {killed[0]}), usually for lack "
                        f"of memory or of /dev/shm: try a smaller --num_workers") from error


class Interval:
    """The steps since the last printed line: the sums of their losses, and their time."""

    def __init__(self):
        self.begin, self.steps_since_start = time.time(), 0
        self.restart()

    def restart(self):
        self.sums, self.steps, self.waited, self.since = {}, 0, 0.0, time.time()

    def elapsed(self):
        return time.time() - self.begin

    def seconds_for(self, steps):
        """Estimate for so many steps more, evaluations included. The first step, which starts the
        loader and the device, is left out of it."""
        done = self.steps_since_start
        if done == 1:
            return self.elapsed() * steps
        return (time.time() - self.first_end) / (done - 1) * steps

    @contextmanager
    def waiting(self, batches):
        """Measures the time in which the loop waits for `batches`, a loader's iterator."""
        start = time.time()
        try:
            yield
        except Exception as error:
            check_workers(batches, error)
            raise
        self.waited += time.time() - start

    def add(self, losses):
        """Adds the losses of a step, 0-dim tensors on the device; the host does not wait."""
        self.sums = {k: self.sums.get(k, 0) + (v if v.is_mps else v.double())
                     for k, v in losses.items()}                     # MPS has no float64
        self.steps, self.steps_since_start = self.steps + 1, self.steps_since_start + 1
        if self.steps_since_start == 1:
            self.first_end = time.time()

    def is_due(self, run):
        """Whether to close: every log_every steps, at the end of an epoch, and early in a run."""
        early = self.steps_since_start == min(3, run.cfg.log_every)
        return (early or run.step % run.cfg.log_every == 0
                or run.step == run.train_loader.batch_sampler.steps)

    def close(self, run):
        """Checks that all is finite, adds the interval to the epoch, prints and logs it."""
        cfg, steps = run.cfg, run.train_loader.batch_sampler.steps
        global_step = run.epoch * steps + run.step - 1

        # the host waits for the device here; sums over processes are divided when they are shown
        not_finite = int(self.sums.pop("not_finite"))
        total = sum_over_processes(torch.stack(list(self.sums.values())).cpu())
        sums = dict(zip(self.sums, total.tolist()))
        bad = [name for name, value in sums.items() if not math.isfinite(value)]
        if bad:                                                      # before anything is saved
            first = global_step + 1 - max(not_finite, 1)
            explain_not_finite(run, first, f"{bad[0]} is not finite")
        sums["processes"] = self.steps * run.world
        run.epoch_sums = {k: run.epoch_sums.get(k, 0) + v for k, v in sums.items()}

        seconds, processes = time.time() - self.since, sums.pop("processes")
        record = dict(
            epoch=run.epoch, step=run.step, lr=run.optimizer.param_groups[0]["lr"],
            **{name: value / processes for name, value in sums.items()},
            images_per_s=self.steps * cfg.batch_size / seconds, data_share=self.waited / seconds,
            memory_gb=memory_gb(run.device), elapsed_s=self.elapsed(),
            eta_s=self.seconds_for(steps * cfg.epochs - global_step - 1))
        say(run, interval_line(record, steps))
        if run.rank == 0:
            append_json(os.path.join(cfg.output_dir, "steps.txt"), record)
        self.restart()


def loss_words(r):
    """The losses of a dict by name, for the terminal."""
    terms = [f"{t} {r[f'loss_{t}']:.3f}" for t in LOSS_TERMS if f"loss_{t}" in r]
    terms = f" ({' '.join(terms)})" if terms else ""                 # a classifier has none
    return f"loss {r['loss']:.3f}{terms}  wrong class {r['class_error']:3.0f}%"


def interval_line(r, steps):
    """The terminal's line of a record of steps.txt."""
    return (f"epoch {r['epoch'] + 1:3d}  step {r['step']:5d}/{steps}  {loss_words(r)}  "
            f"lr {r['lr']:.1e}  {r['images_per_s']:.1f} images/s  data {r['data_share']:.0%}  "
            f"{r['memory_gb']:.1f} GB  eta {hms(r['eta_s'])}")


def log_entries(split, losses, loss_cfg):
    """Losses by name as entries of log.txt, by the official log's names: weighted, and again
    "_unscaled". split: "train" or "test"."""
    coefs = {term: getattr(loss_cfg, f"{term}_loss_coef", 1) for term in LOSS_TERMS}
    entries = {}
    for name, value in losses.items():                               # loss, loss_ce, loss_ce_0, ...
        term = name.split("_")[1] if name.startswith("loss_") else ""
        entries[f"{split}_{name}"] = value * coefs.get(term, 1)
        if name not in ("loss", "grad_norm"):
            entries[f"{split}_{name}_unscaled"] = value
    return entries


def epoch_record(run):
    """The record of log.txt of the epoch that has just ended: the losses, means over its steps."""
    sums = dict(run.epoch_sums)
    processes = sums.pop("processes")
    losses = {name: value / processes for name, value in sums.items()}
    trained = sum(p.numel() for p in run.raw_model.parameters() if p.requires_grad)
    return {**log_entries("train", losses, run.loss_cfg),
            "train_lr": run.optimizer.param_groups[0]["lr"], "epoch": run.epoch,
            "n_parameters": trained}


# -- evaluations of a run ------------------------------------------------------------------------

def normalizers_of(run, micro_batches):
    """loss_normalizers of this process's micro-batches; a classifier has one query."""
    queries = getattr(run.model_cfg, "num_queries", 1)
    return sum(loss_normalizers(targets, queries) for *_, targets in micro_batches)


def validation_normalizers(run):
    """loss_normalizers of the whole validation set of a detector."""
    dataset = run.val_loader.dataset
    labels = [{"labels": dataset.objects(i)[1]} for i in range(len(dataset))]
    return loss_normalizers(labels, run.model_cfg.num_queries)


def share_in_detection_losses(run):
    """For evaluate: a function that gives a batch's share in the losses of the validation set.

    All shares are divided by the counts of the whole set, so their sum is the losses that set_loss
    has for one batch of all its images.
    """
    whole = validation_normalizers(run)
    return lambda outputs, targets: set_loss(*outputs, targets, run.loss_cfg, whole,
                                             run.class_weights)


def share_in_class_losses(run):
    """The same of a classifier. Labels are smoothed as in training; no images are mixed."""
    whole = torch.full((3,), len(run.val_loader.dataset))

    def share(logits, targets):
        labels = torch.cat([t["labels"] for t in targets]).to(logits.device)
        return classification_loss(logits, labels, run.loss_cfg.smoothing, whole,
                                   run.class_weights)
    return share


def say_epoch(run, words, result, elapsed):
    """Prints the line of an evaluated epoch."""
    say(run, f"epoch {run.epoch:3d}/{run.cfg.epochs}  {words}  {loss_words(result['losses'])}  "
             f"on {len(run.val_loader.dataset)} images, {hms(elapsed)} since the start")


def detection_report(run, result, elapsed):
    """Prints what an evaluation found. Returns the number to select the best epoch by, and the
    entries of log.txt by the official names."""
    stats = result["stats"].tolist()
    say_epoch(run, f"AP {stats[0]:.3f}  AP50 {stats[1]:.3f}  AP75 {stats[2]:.3f}  "
                   f"AR100 {stats[8]:.3f}", result, elapsed)
    note = note_on_constants(result, run.val_loader.dataset) if run.rank == 0 else None
    if note:
        say(run, note)
    return stats[0], {**log_entries("test", result["losses"], run.loss_cfg),
                      "test_coco_eval_bbox": stats}


def classification_report(run, result, elapsed):
    """The same of a classifier, by the names of DeiT."""
    top1, top5, _ = result["stats"].tolist()
    say_epoch(run, f"top-1 {top1:.2%}  top-5 {top5:.2%}", result, elapsed)
    return top1, {**log_entries("test", result["losses"], run.loss_cfg),
                  "test_acc1": 100 * top1, "test_acc5": 100 * top5}


def say_best(run):
    """Prints the best epoch of log.txt, where it is, and the commands that go on from there."""
    cfg, out = run.cfg, run.cfg.output_dir
    path, last = (os.path.join(out, name) for name in ("best.pt", "ckpt.pt"))
    log = os.path.join(out, "log.txt")
    if run.rank or not os.path.exists(log):
        return
    with open(log) as file:
        records = [json.loads(line) for line in file]
    detector = hasattr(run.model_cfg, "num_queries")
    key = "test_coco_eval_bbox" if detector else "test_acc1"
    if getattr(run.model_cfg, "masks", False):
        key = "test_coco_eval_masks"
    scores = {r["epoch"] + 1: np.ravel(r[key])[0] for r in records if key in r}
    if not scores:
        return

    # a run resumed from another folder has no best.pt until it is better than it was there
    epoch, word = max(scores, key=scores.get), "best"
    if not os.path.exists(path):
        path, epoch, word = last, max(scores), "last"
    score = f"AP {scores[epoch]:.3f}" if detector else f"top-1 {scores[epoch]:.2f}%"
    score = f"mask {score}" if key == "test_coco_eval_masks" else score
    lines = [f"{word}     epoch {epoch} of {cfg.epochs}, {score}, in {path}",
             f"         python evaluate.py {shlex.quote(path)}",
             f"         python predict.py {shlex.quote(path)} PHOTO.jpg"]
    if run.epoch >= cfg.epochs:
        lines.append(f"         python train.py --resume {shlex.quote(last)} --epochs "
                     f"{2 * cfg.epochs}")
    say(run, *lines, sep="\n")


# -- a detector that has learned nothing ---------------------------------------------------------

def in_sides(boxes, sizes):
    """Boxes (..., 4) in pixels of images of `sizes` (..., 2) as shares of their widths, heights."""
    return boxes / sizes[..., [1, 0, 1, 0]]


def likeness(rows, sizes):
    """How alike the detections of all images are: 1 where all have the same, towards 0 otherwise.

    rows: detection_rows of all images, by image and query; sizes (N, 2). Compares each detection
    with the typical one of its query, the medians over the images: the smaller score times the
    IoU, 0 for another class, summed and divided by the sum of the larger scores.
    """
    rows = rows.numpy().reshape(len(sizes), -1, 7)                                  # (N, Q, 7)
    label, score, box = rows[..., 1], rows[..., 2], in_sides(rows[..., 3:], sizes[:, None])
    typical_score = np.median(score, axis=0)                                        # (Q,)
    typical_box = np.broadcast_to(np.median(box, axis=0), box.shape)
    iou = box_overlap(box.reshape(-1, 4), typical_box.reshape(-1, 4), False).reshape(score.shape)
    iou[label != np.median(label, axis=0)] = 0
    return (np.minimum(score, typical_score) * iou).sum() / np.maximum(score, typical_score).sum()


def constant_boxes(gt, sizes, most):
    """The same boxes for all images that find the most objects, at most `most` of a class: classes
    (n,), scores (n,), boxes (n, 4) xywh in image sides; and the mean IoU of an object with the
    nearest of them. gt: columns of the objects, which have an area; sizes (N, 2).

    Greedy: of 100 true boxes of a class, evenly spread over the data set, it takes the one by
    which the most objects pass one of COCO's ten thresholds of IoU that no box before let them
    pass, summed over the thresholds. That number is the score.
    """
    truth, found, nearest = in_sides(gt["box"], sizes[gt["image"]]), [], 0
    for k in np.unique(gt["category"]):
        own = truth[gt["category"] == k]                                            # (M, 4)
        some = own[np.linspace(0, len(own) - 1, min(99, len(own))).astype(int)]
        some = np.vstack([np.median(own, axis=0), some])                            # (C, 4)
        iou = [box_overlap(own, np.broadcast_to(box, own.shape), False) for box in some]
        iou = np.stack(iou)                                                         # (C, M)
        passed = np.searchsorted(IOU_THRS, iou, side="right")
        best_iou, before = np.zeros(len(own)), np.zeros(len(own), int)
        for _ in range(most):
            gain = np.maximum(passed - before, 0).sum(1)                            # (C,)
            c = gain.argmax()
            if gain[c]:
                found.append((k, gain[c], some[c]))
            best_iou, before = np.maximum(best_iou, iou[c]), np.maximum(before, passed[c])
        nearest += best_iou.sum()
    classes, scores, boxes = (np.array(column) for column in zip(*found))
    return classes, scores.astype(float), boxes, nearest / len(truth)


def note_on_constants(result, dataset):
    """A line on a detector that hardly looks at the images, else None.

    Such are detections with a likeness over 0.75 that differ from image to image less than half as
    much as the true boxes do: 1 - likeness beside 1 - their mean IoU with constant_boxes. If this
    IoU is over 0.95, the images are alike, and nothing is said.
    """
    N, K, gt = len(dataset), len(dataset.classes), dataset.columns()
    objects = take(gt, ~gt["crowd"] & (gt["box"][:, 2:] > 0).all(1))
    queries, rest = divmod(len(result["rows"]), N)
    if N == 1 or rest or not len(objects["box"]):
        return None
    alike = likeness(result["rows"], dataset.sizes)
    if alike < 0.75:
        return None
    classes, scores, boxes, fit = constant_boxes(objects, dataset.sizes,
                                                 min(10, max(1, queries // K)))
    if fit > 0.95 or 1 - alike > (1 - fit) / 2:
        return None
    whole = dataset.sizes[:, None, [1, 0, 1, 0]]
    found = {"image": np.repeat(np.arange(N), len(classes)), "category": np.tile(classes, N),
             "score": np.tile(scores, N), "box": (boxes * whole).reshape(-1, 4)}
    ap, ap50 = evaluate_columns(gt, found, K)["stats"][:2]
    return (f"note     the detections of all {N} images are nearly the same; {len(classes)} well "
            f"chosen constant box(es) reach AP {ap:.3f}, AP50 {ap50:.3f}")


# -- pictures ------------------------------------------------------------------------------------

def draw_batch(run, images, valid, targets):
    """Writes first_batch.jpg: the images of a batch with their boxes, or the class of the whole, as
    the network gets them (but for mixup and CutMix)."""
    items, classes = [], run.train_loader.dataset.classes
    for image, v, target in zip(images, valid, targets):
        h, w = int(v[:, 0].sum()), int(v[0].sum())
        boxes = cxcywh_to_xyxy(target.get("boxes", torch.tensor([[0.5, 0.5, 1, 1]])))
        boxes = boxes * torch.tensor([w, h, w, h])
        picture = Image.fromarray(image[:, :h, :w].permute(1, 2, 0).numpy())
        if "masks" in target:
            picture = draw_masks(picture, target["masks"], [classes[k] for k in target["labels"]])
        items.append((picture, boxes.numpy(), [classes[k] for k in target["labels"]]))
    path = os.path.join(run.cfg.output_dir, "first_batch.jpg")
    with writing(path):
        contact_sheet(items).save(path)


RIGHT, WRONG = "#009a20", "#d00000"


def find_right(boxes, labels, true_boxes, true_labels):
    """Which detections of an image, by falling score, find a true box: bool (D,).

    Each takes that of its class with the highest IoU, 0.5 or more, if none before has taken it.
    boxes (D, 4) and true_boxes (T, 4) xyxy; labels (D,), true_labels (T,); numpy arrays.
    """
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(true_boxes).double()).numpy()
    iou = np.where(labels[:, None] == true_labels, iou, 0)                          # (D, T)
    right = np.zeros(len(boxes), bool)
    for d in range(len(boxes)):
        if iou[d].max(initial=0) >= 0.5:
            right[d] = True
            iou[:, iou[d].argmax()] = 0                              # taken
    return right


def draw_detections(result, dataset, threshold=0.7, paint=None):
    """The first 16 images of a data set with the true boxes, thin, and the detections that score
    over the threshold: right ones green, wrong ones red. paint(image, places): a copy of an image
    with what else the detections at these places in the rows have."""
    rows, items = result["rows"].numpy(), []
    for i in range(min(16, len(dataset))):
        image, (true_boxes, true_labels) = dataset.read(i), dataset.objects(i)
        places = np.flatnonzero(rows[:, 0] == i)
        places = places[np.argsort(-rows[places, 2], kind="stable")]
        r = rows[places]
        kept = r[r[:, 2] > threshold]
        if paint:
            image = paint(image, places[:len(kept)])
        boxes = np.concatenate([kept[:, 3:5], kept[:, 3:5] + kept[:, 5:]], 1)
        names = [dataset.classes[int(k)] for k in kept[:, 1]]
        right = find_right(boxes, kept[:, 1], true_boxes, true_labels)
        colors, scores = np.where(right, RIGHT, WRONG).tolist(), kept[:, 2].tolist()

        # the best detection in words, if there is no other
        if not names and len(r):
            boxes = np.array([[0, 0, *image.size]])
            names = [f"none over {threshold}; best: {dataset.classes[int(r[0, 1])]}"]
            colors, scores = ["#606060"], [r[0, 2]]

        T = len(true_boxes)
        items.append((image, np.concatenate([true_boxes, boxes]), [""] * T + names,
                      [-1.0] * T + scores, [None] * T + colors))
    return contact_sheet(items)


def draw_classes(result, dataset):
    """16 random images titled with the predicted class, and the true one where it is wrong."""
    n, items = len(dataset), []                                      # one box, the whole image
    for i in sorted(random.Random(0).sample(range(n), min(16, n))):  # folders come class by class
        image = dataset.read(i)
        _, k, probability, truth, _ = result["rows"][i].tolist()
        name, color = dataset.classes[int(k)], RIGHT
        if k != truth:
            name, color = f"{name} (is {dataset.classes[int(truth)]})", WRONG
        items.append((image, np.array([[0, 0, *image.size]]), [name], [probability], [color]))
    return contact_sheet(items)


# -- when a step fails ---------------------------------------------------------------------------

def name_step(run, global_step, micro_batches):
    """Where the run is, as the terminal counts, and the ids of the images at hand."""
    dataset = run.train_loader.dataset
    epoch, step = divmod(global_step, run.train_loader.batch_sampler.steps)
    index = [t["index"] for *_, targets in micro_batches for t in targets]
    ids = [os.fsdecode(i) if isinstance(i, bytes) else i
           for i in np.asarray(dataset.image_ids)[index].tolist()]
    return f"epoch {epoch + 1}, step {step + 1}, rank {run.rank}, images {ids}", ids


def last_saved(cfg):
    """What a message can promise of the last checkpoint."""
    path = os.path.join(cfg.output_dir, "ckpt.pt")
    return f"{path} is as it was" if os.path.exists(path) else "nothing was saved yet"


def is_out_of_memory(error):
    """Whether it is that, of a GPU or of the system, for which torch has no class of its own."""
    kinds = MemoryError, torch.cuda.OutOfMemoryError
    words = "can't allocate memory", "MPS backend out of memory"
    return isinstance(error, kinds) or any(w in str(error) for w in words)


def hint(error):
    """What may help with an exception that is printed with its traceback."""
    if is_out_of_memory(error):
        return ("out of memory; in an evaluation a smaller --eval_batch_size needs less, at the "
                "start a smaller model")
    if dist.is_initialized() and isinstance(error, RuntimeError):
        return ("if it is about a connection, another process has failed or gone, and its own "
                "message says why")
    return "a bug, or a fork's new code; the traceback says where"


def explain(error, run, global_step, micro_batches):
    """Raises the UserError that says what can be said of an error in a step; returns for others,
    after a line that says which step."""
    cfg = run.cfg
    where, _ = name_step(run, global_step, micro_batches)
    check_workers(run.train_loader._iterator, error)
    if isinstance(error, NotFiniteError):
        explain_not_finite(run, global_step, str(error))
    if isinstance(error, UserError):
        raise UserError(f"{where}: {error}") from None
    if not is_out_of_memory(error):
        print(f"in {where}:", file=sys.stderr, flush=True)
        return
    shapes = [tuple(images.shape) for images, *_ in micro_batches]
    objects = sum(len(t["labels"]) for *_, targets in micro_batches for t in targets)
    smaller = "--max_size" if hasattr(run.model_cfg, "num_queries") else "--image_size"
    if run.dtype == torch.float32:
        smaller += " or --dtype bfloat16"
    raise UserError(
        f"{where}: out of memory with images of {shapes} and {objects} objects "
        f"({str(error).splitlines()[0]}). A larger --accumulate splits the step into smaller "
        f"parts; a smaller {smaller} needs less; {last_saved(cfg)}") from error


def losses_of(run, micro_batches, global_step):
    """The losses of a step as numbers, of this process's micro-batches alone."""
    alone, totals = replace(run, model=run.raw_model), {}
    normalizers = normalizers_of(run, micro_batches)
    with torch.no_grad(), autocast(run.device, run.dtype):
        for images, valid, targets in micro_batches:
            batch = *to_device(images, valid, run.device), targets
            losses = run.task.losses(alone, *batch, normalizers, global_step)
            for name in ("loss", *(f"loss_{term}" for term in LOSS_TERMS)):
                if name in losses:
                    totals[name] = totals.get(name, 0) + losses[name].item()
    return totals


def explain_not_finite(run, global_step, text):
    """Raises the UserError that names the step; writes its batch and the weights before it, which
    no later step has changed, to nan_batch.pt."""
    if dist.is_initialized():
        dist.destroy_process_group()               # the other processes may not come along
    cfg, loader = run.cfg, run.train_loader
    epoch, step = divmod(global_step, loader.batch_sampler.steps)
    loader.batch_sampler.set_epoch(epoch, step)
    keys = itertools.islice(loader.batch_sampler, cfg.accumulate)
    micro_batches = [collate([loader.dataset[key] for key in part]) for part in keys]
    where, ids = name_step(run, global_step, micro_batches)
    state = dict(epoch=epoch, step=step, rank=run.rank, image_ids=ids, reason=text,
                 micro_batches=[(images, valid, list(map(dict, targets)))        # plain data
                                for images, valid, targets in micro_batches],
                 model={k: v.clone() for k, v in run.raw_model.state_dict().items()})

    # the step's losses once more, on this process alone
    try:
        state["losses"] = losses_of(run, micro_batches, global_step)
    except NotFiniteError:
        state["losses"] = "nothing could be matched"
    path = os.path.join(cfg.output_dir, f"nan_batch{f'_{run.rank}' if run.rank else ''}.pt")
    try:
        torch.save(state, path)
        kept = f"batch and weights are in {path}"
    except (OSError, RuntimeError) as error:
        kept = f"{path} cannot be written ({error})"
    raise UserError(
        f"{where}: {text}\n  losses of this process: {state['losses']}\n  {kept}; "
        f"{last_saved(cfg)}\n  usual causes: --lr {cfg.lr} or --lr_backbone is too high for this "
        f"model, no --warmup_steps, no --clip_max_norm, or weights taken over that hold NaN; where "
        f"in the network: torch.autograd.set_detect_anomaly(True)") from None
