"""Curves of one or several runs in one picture: average precision and training loss by epoch.

    python plot.py out/attention out/pool --out curves.png
    python plot.py out/log.txt detr-r50_log.txt                 # the published log beside it

Reads log.txt, one JSON object per epoch. `python bench.py mixers --plot` draws here, too.
Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from coco_eval import UserError, UserFileError, run_command


DETECTORS, CLASSIFIERS = ("AP", "AP50"), ("top-1", "top-5")


def read_log(path):
    """The records of a log file, or of a folder's log.txt, each with "epoch" (from 0) and, where it
    was tested, "scores" by name. Raises UserError, UserFileError."""
    path = os.path.join(path, "log.txt") if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise UserFileError(f"{path} not found: give log files of train.py or their folders")
    records = []
    with open(path) as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
                record.setdefault("epoch", number)       # the log published with DETR has none
                if "test_coco_eval_bbox" in record:
                    record["scores"] = dict(zip(DETECTORS, record["test_coco_eval_bbox"]))
                elif "test_acc1" in record:
                    percent = record["test_acc1"], record["test_acc5"]
                    record["scores"] = dict(zip(CLASSIFIERS, (v / 100 for v in percent)))
                record["train_loss"], record["epoch"] + 0
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}, line {number + 1} is no epoch of a log, a JSON object "
                                f"with train_loss ({error!r})") from None
            records.append(record)
    return records


def label(path):
    """The run's name: "pool" for out/pool and out/pool/log.txt; "detr" for detr.txt."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.basename(folder) if name == "log.txt" else name.removesuffix(".txt")


def draw(axes, path, records):
    """The curves of one run: two scores and the training loss."""
    tested = [r for r in records if "scores" in r]
    for k, axis in enumerate(axes[:2]):
        curve = [list(r["scores"].values())[k] for r in tested]
        axis.plot([r["epoch"] + 1 for r in tested], curve, marker=".", label=label(path))
    axes[2].plot([r["epoch"] + 1 for r in records], [r["train_loss"] for r in records],
                 marker=".", label=label(path))


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
    figure.savefig(path, dpi=120)


def plot_arms(groups, path):
    """Of each group of arms, AP of every seed, and mean AP over mean training time.

    groups: {title: {arm: {seed: dict with "AP" and "seconds"}}}, from study.py; of a group, a line
    marks the mean AP of the first arm.
    """
    most = max(map(len, groups.values()))
    figure, axes = plt.subplots(2, len(groups), figsize=(4.5 * len(groups), 5 + 0.25 * most),
                                squeeze=False, sharex="row", layout="constrained")
    for (dots, times), (title, arms) in zip(axes.T, groups.items()):
        for k, (arm, runs) in enumerate(arms.items()):
            aps, seconds = ([r[name] for r in runs.values()] for name in ("AP", "seconds"))
            mean, color = sum(aps) / len(aps), f"C{k % 10}"
            dots.plot(aps, [k] * len(aps), "o", color=color, alpha=0.6)
            dots.plot(mean, k, "|", color=color, markersize=16)
            if k == 0:
                dots.axvline(mean, color="gray", linestyle=":")
            times.plot(sum(seconds) / len(seconds), mean, "o", color=color, label=arm)
        dots.set(title=title, xlabel="AP, a dot for each seed", yticks=range(len(arms)),
                 yticklabels=list(arms))
        dots.invert_yaxis()
        times.set(xlabel="seconds of one thread", ylabel="mean AP")
        times.legend(fontsize="x-small")
        for axis in (dots, times):
            axis.grid(alpha=0.3)
    for times in axes[1]:
        times.set_ylim(axes[0, 0].get_xlim())
    figure.savefig(path, dpi=120)


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
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log files, or folders that hold a log.txt")
    parser.add_argument("--out", default="curves.png", help="the picture, .png or .svg")
    args = parser.parse_args(argv)

    # detectors and classifiers in rows of their own
    rows = {DETECTORS: [], CLASSIFIERS: []}
    for path in args.logs:
        records = read_log(path)
        classifier = any("test_acc1" in r for r in records)
        rows[CLASSIFIERS if classifier else DETECTORS].append((path, records))
    rows = {names: runs for names, runs in rows.items() if runs}
    figure, grid = plt.subplots(len(rows), 3, figsize=(13, 4 * len(rows)), layout="constrained",
                                squeeze=False)
    for axes, (names, runs) in zip(grid, rows.items()):
        for path, records in runs:
            draw(axes, path, records)
        for axis, title in zip(axes, (*names, "training loss")):
            axis.set(title=title, xlabel="epoch")
            axis.grid(alpha=0.3)
        axes[0].legend()
    figure.savefig(args.out, dpi=120)
    print(f"{len(args.logs)} run(s) drawn in {args.out}")


if __name__ == "__main__":
    run_command(main)
