"""Curves of runs in one picture: losses, class error and average precision by epoch.

    python plot.py out/attention out/pool --out curves.png
    python plot.py out/pool_s1 out/pool_s2 out/mlp_s1 out/mlp_s2     # mean and range by arm
    python plot.py out detr-r50_log.txt --epochs 20                  # beside the published log
    python plot.py out --official_log detr-r50_log.txt.gz --epochs 20    # ... in panels of its own
    python plot.py out/pool --steps                                  # in training, every 50 steps

Training is solid, validation dashed. Runs whose names differ only in a last _s1, _s2, ... (one
digit) or -seed1, ... are one arm: a line for their mean and a band from the least to the largest,
at the epochs that all of them have. Reads log.txt or steps.txt, one JSON object a line, also as
.gz. bench.py and study.py draw here, too. Needs matplotlib (requirements-dev.txt).
"""

import gzip
import json
import os
import re

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from coco_eval import FlagParser, UserError, UserFileError, check_output, run_command, writing


# what is drawn of a run by its kind and the file that is read, three panels in a row
PANELS = {
    ("detector", "log.txt"): ("class_error", "loss", "loss_bbox", "loss_giou", "AP50", "AP"),
    ("detector", "steps.txt"): ("class_error", "loss", "loss_bbox", "loss_giou", "grad_norm", "lr"),
    ("masks", "log.txt"): ("loss_mask", "loss_dice", "AP_masks"),
    ("masks", "steps.txt"): ("loss_ce", "loss_mask", "loss_dice"),
    ("classifier", "log.txt"): ("loss", "top1", "top5"),
    ("classifier", "steps.txt"): ("loss", "class_error", "grad_norm")}
PANELS["official", "log.txt"] = PANELS["detector", "log.txt"]
TITLES = {
    "class_error": "class error, %", "loss": "loss (weighted sum)",
    "loss_bbox": "loss_bbox (L1 of cx, cy, w, h in image sides)",
    "loss_giou": "loss_giou (1 - generalised IoU)", "loss_ce": "loss_ce (cross-entropy)",
    "loss_mask": "loss_mask (focal loss of pixels)", "loss_dice": "loss_dice",
    "AP50": "AP50", "AP_masks": "AP of masks",
    "AP": "AP (mean over IoU 0.50 to 0.95)", "grad_norm": "norm of the gradient",
    "lr": "learning rate", "top1": "top-1, %", "top5": "top-5, %"}


def read_record(line, number, file):
    """A line of log.txt or steps.txt as a dict of "x", finished epochs (of steps.txt: epochs and
    steps), and the curves by name, "train_loss" and "test_AP" for example; losses without their
    weights, but for the sum."""
    r = json.loads(line)
    if file == "steps.txt":
        return {"x": (r["epoch"] + 0, r["step"] + 0), **{f"train_{k}": v for k, v in r.items()}}
    r["x"] = r.get("epoch", number) + 1                  # the log published with DETR has no epoch
    r.update({k.removesuffix("_unscaled"): v for k, v in r.items() if k.endswith("_unscaled")})
    if "test_coco_eval_bbox" in r:
        r["test_AP"], r["test_AP50"] = r["test_coco_eval_bbox"][:2]
    if "test_coco_eval_masks" in r:
        r["test_AP_masks"] = r["test_coco_eval_masks"][0]
    if "test_acc1" in r:
        r["test_top1"], r["test_top5"] = r["test_acc1"], r["test_acc5"]
        r["train_top1"] = 100 - r.get("train_class_error", np.nan)
    return r


def read_log(path, file="log.txt"):
    """The records of a log, a list of dicts as read_record gives them, but "x" always in epochs.

    path: the log, or a folder that holds one; file: what kind it is, "log.txt" or "steps.txt".
    Raises UserError, UserFileError.
    """
    path = os.path.join(path, file) if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise UserFileError(f"{path} not found: give log files of train.py or their folders")
    records = []
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", errors="replace") as lines:
        for number, line in enumerate(lines):
            try:
                records.append(read_record(line, number, file))
                records[-1]["train_loss"] + 0
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}, line {number + 1} is no line of a {file}, a JSON object "
                                f"with the training loss ({error!r})") from None
    if file == "steps.txt":                              # 30 of 40 steps of the first epoch: 0.75
        steps = max((r["x"][1] for r in records), default=1)
        records = [{**r, "x": r["x"][0] + r["x"][1] / steps} for r in records]
    return records


def label(path):
    """The run's name: "pool" for out/pool and out/pool/log.txt; "detr" for detr.txt."""
    folder, name = os.path.split(os.path.abspath(path))
    if name in ("log.txt", "steps.txt"):
        return os.path.basename(folder)
    return name.removesuffix(".gz").removesuffix(".txt")


def group(paths):
    """{arm: paths}: the runs of an arm differ in the seed that ends their names. Where two paths
    have the same name, they are called by the path."""
    arms, names = {}, [label(path) for path in paths]
    for path, name in zip(paths, names):
        name = name if names.count(name) == 1 else path
        arms.setdefault(re.sub(r"(_s\d|-seed\d+)$", "", name), []).append(path)
    return arms


def mean_and_range(runs, key):
    """x, mean, least and largest of a key over runs, lists of records, where all have a value."""
    curves = [{r["x"]: r[key] for r in run if key in r} for run in runs]
    x = sorted(set.intersection(*map(set, curves)))
    y = np.array([[curve[v] for v in x] for curve in curves])        # (runs, epochs)
    return x, y.mean(0), y.min(0), y.max(0)


def draw(axis, arms, key, note):
    """The curves of one panel; arms: {name: (colour, runs)}; note: after the title."""
    for color, runs in arms.values():
        for split, style in (("train", "-"), ("test", "--")):
            x, mean, least, largest = mean_and_range(runs, f"{split}_{key}")
            axis.plot(x, mean, style, color=color, marker="." if len(x) < 30 else "")
            if len(runs) > 1:
                axis.fill_between(x, least, largest, color=color, alpha=0.2, linewidth=0)
    axis.set(title=TITLES[key] + note, xlabel="epoch")
    axis.grid(alpha=0.3)
    if axis.get_xlim()[1] > 2:                           # whole epochs
        axis.locator_params(axis="x", integer=True)


def is_detector(runs):
    return any("train_loss_bbox" in r or "test_AP" in r for run in runs for r in run)


def save(figure, path, dpi):
    figure.savefig(path, dpi=dpi)
    plt.close(figure)                              # pyplot keeps all open figures in memory


def plot_mixers(rows, path):
    """Seconds and memory over the number of tokens, a line for each mixer.

    rows: dicts with "mixer", "tokens", "median" (seconds) and "memory_mb", from bench.py.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, field, title in zip(axes, ("median", "memory_mb"), ("seconds", "peak memory, MB")):
        for mixer in dict.fromkeys(r["mixer"] for r in rows):
            points = [(r["tokens"], r[field]) for r in rows if r["mixer"] == mixer]
            axis.plot(*zip(*points), marker=".", label=mixer)
        axis.set(xlabel="tokens", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("encoder by mixer, forward and backward")
    save(figure, path, 120)


def plot_classifiers(result, path):
    """Published top-1 over multiply-adds and over measured images per second, both logarithmic; a
    line joins the sizes of a family. result: of bench.py classifiers, with its forward pass."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    top1 = {name: y for name, y in result["published_top1"].items() if y is not None}
    families = [re.sub("_.*|[0-9]+$", "", name) for name in top1]            # vit of vit_s
    speeds = result["forward"]["images_per_s"]
    costs = {name: macs / 1e9 for name, macs in result["multiply_adds"].items()}
    for axis, values in zip(axes, (costs, speeds)):
        for k, family in enumerate(dict.fromkeys(families)):
            names = [name for name, own in zip(top1, families) if own == family]
            names.sort(key=result["multiply_adds"].get)
            axis.plot([values[name] for name in names], [top1[name] for name in names], "o-",
                      color=f"C{k}", label=family)
            for name in names:
                size = name.removeprefix(family).strip("_")
                axis.annotate(size, (values[name], top1[name]), (5, -10), color=f"C{k}",
                              textcoords="offset points")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set(xlabel="G multiply-adds of an image, 224 x 224", ylabel="published top-1, %")
    axes[1].set(xlabel="images per second, forward pass, as measured here")
    save(figure, path, 120)


def plot_arms(groups, path, score="AP"):
    """Of each group of arms, the score of every seed; a line marks the mean of the first arm.

    groups: {title: {arm: {seed: dict with the score and "seconds"}}}, from study.py.
    """
    most = max(map(len, groups.values()))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 1 + 0.28 * most),
                                squeeze=False, sharex=True, layout="constrained")
    for axis, (title, arms) in zip(axes[0], groups.items()):
        for k, (arm, runs) in enumerate(arms.items()):
            scores = [run[score] for run in runs.values()]
            mean, color = sum(scores) / len(scores), f"C{k % 10}"
            axis.plot(scores, [k] * len(scores), "o", color=color, alpha=0.6)
            axis.plot(mean, k, "|", color=color, markersize=16)
            if k == 0:
                axis.axvline(mean, color="gray", linestyle=":")
        axis.set(title=title, xlabel=f"{score}, a dot for each seed", yticks=range(len(arms)),
                 yticklabels=list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.5)                         # the first arm on top
        axis.grid(alpha=0.3)
    save(figure, path, 100)


def plot_times(groups, path, score="AP"):
    """Of each group of arms, the mean score over the mean training time; groups as in plot_arms."""
    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 4), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")
    for axis, (title, arms) in zip(axes[0], groups.items()):
        for arm, runs in arms.items():
            x, y = (sum(run[name] for run in runs.values()) / len(runs)
                    for name in ("seconds", score))
            axis.plot(x, y, "o", label=arm)
        axis.set(title=title, xlabel="seconds of a processor", ylabel=f"mean {score}")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    save(figure, path, 100)


def plot_layers(groups, path):
    """AP after each decoder layer, and dashed with non-maximum suppression at IoU 0.7.

    groups: {title: rows}, of study.py, with "arm" and the lists "AP" and "AP_nms".
    """
    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 4.5), squeeze=False,
                                sharey=True, layout="constrained")
    for axis, (title, rows) in zip(axes[0], groups.items()):
        for k, r in enumerate(rows):
            layers = range(1, len(r["AP"]) + 1)
            axis.plot(layers, r["AP"], "o-", color=f"C{k % 10}", label=r["arm"])
            axis.plot(layers, r["AP_nms"], ".--", color=f"C{k % 10}")
        axis.set(title=title, xlabel="decoder layer; dashed: with NMS at 0.7", ylabel="AP")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    save(figure, path, 120)


def plot_noise(rows, path):
    """Deviation of the loss over the batch size, both logarithmic: in training, and dashed with
    fixed weights. rows: dicts with "mixer", "batch_size", "deviation" and "frozen"."""
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for k, mixer in enumerate(dict.fromkeys(r["mixer"] for r in rows)):
        own = sorted((r for r in rows if r["mixer"] == mixer), key=lambda r: r["batch_size"])
        sizes = [r["batch_size"] for r in own]
        axis.loglog(sizes, [r["deviation"] for r in own], "o-", color=f"C{k}", label=mixer)
        axis.loglog(sizes, [r["frozen"] for r in own], ".--", color=f"C{k}")
    sizes = sorted({r["batch_size"] for r in rows})
    first = max(r["deviation"] for r in rows if r["batch_size"] == sizes[0])
    axis.loglog(sizes, [first * (size / sizes[0]) ** -0.5 for size in sizes], ":", color="gray",
                label="power -1/2")
    axis.set(xlabel="images in a batch", ylabel="deviation of the loss over its mean",
             title="solid: in training; dashed: fixed weights")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, path, 120)


def main(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("logs", nargs="+", help="log files, or folders that hold one")
    parser.add_argument("--steps", action="store_true", help="read steps.txt instead of log.txt")
    parser.add_argument("--official_log", default="", metavar="LOG",
                        help="one more log, as published with DETR, in panels of its own")
    parser.add_argument("--epochs", type=float, default=float("inf"), help="only the first N")
    parser.add_argument("--out", default="curves.png", help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    file = "steps.txt" if args.steps else "log.txt"
    if args.official_log and args.steps:
        raise UserError("--official_log is a log of epochs: leave out --steps")
    check_output("--out", args.out)
    known = plt.gcf().canvas.get_supported_filetypes()               # without a suffix: .png
    if os.path.splitext(args.out)[1][1:].lower() not in ("", *known):
        raise UserError(f"--out {args.out} should end in .png or .svg")

    def read(paths):
        return [[r for r in read_log(path, file) if r["x"] <= args.epochs] for path in paths]

    # a colour for each arm; detectors, their masks and classifiers have panels of their own
    kinds = {"detector": {}, "masks": {}, "classifier": {}, "official": {}}
    for k, (name, paths) in enumerate(group(args.logs).items()):
        runs = read(paths)
        kinds["detector" if is_detector(runs) else "classifier"][name] = f"C{k}", runs
    if args.official_log:
        kinds["official"][label(args.official_log)] = "gray", read([args.official_log])
    kinds["masks"] = {name: (color, runs) for name, (color, runs) in kinds["detector"].items()
                      if any("train_loss_mask" in r for run in runs for r in run)}
    panels = []
    for kind, arms in kinds.items():
        note = f"\n{label(args.official_log)}" if kind == "official" else ""
        if arms:
            panels += [(arms, key, note) for key in PANELS[kind, file]]

    rows = len(panels) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(13, 4 * rows), layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        draw(axis, *panel)

    # one legend for all panels
    handles = [Line2D([], [], color="black", label="training")]
    if not args.steps:
        handles.append(Line2D([], [], color="black", linestyle="--", label="validation"))
    for name, (color, runs) in {**kinds["detector"], **kinds["classifier"]}.items():
        name = name if len(runs) == 1 else f"{name} ({len(runs)} runs: mean, range)"
        handles.append(Line2D([], [], color=color, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    with writing(args.out):
        save(figure, args.out, 120)
    print(f"{len(args.logs) + bool(args.official_log)} run(s) drawn in {args.out}")


if __name__ == "__main__":
    run_command(main)
