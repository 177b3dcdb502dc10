"""Curves of one or several runs in one picture: average precision and training loss by epoch.

    python plot.py out/attention out/pool --out curves.png
    python plot.py out/log.txt detr_r50_official/log.txt        # the published log beside it

Reads log.txt, one JSON object per epoch. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_log(path):
    """The records of a log file, or of a folder's log.txt. Raises FileNotFoundError, ValueError."""
    path = os.path.join(path, "log.txt") if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} not found: give log files of train.py or their folders")
    records = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not a JSON object: {error}") from None
    return records


def label(path):
    """The run's folder: out/pool/log.txt and out/pool are both "pool"."""
    path = os.path.dirname(path) if path.endswith(".txt") else path
    return os.path.basename(os.path.abspath(path))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log files, or folders that hold a log.txt")
    parser.add_argument("--out", default="curves.png", help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for path in args.logs:
        records = read_log(path)
        for r in records:                                # a classifier's: accuracies for AP, AP50
            if "test_acc1" in r:
                r["test_coco_eval_bbox"] = r["test_acc1"] / 100, r["test_acc5"] / 100
        tested = [r for r in records if "test_coco_eval_bbox" in r]
        for axis, number in zip(axes, (0, 1)):
            curve = [r["test_coco_eval_bbox"][number] for r in tested]
            axis.plot([r["epoch"] + 1 for r in tested], curve, marker=".", label=label(path))
        axes[2].plot([r["epoch"] + 1 for r in records], [r["train_loss"] for r in records],
                     marker=".", label=label(path))
    titles = ("top-1", "top-5") if any("test_acc1" in r for r in records) else ("AP", "AP50")
    for axis, title in zip(axes, (*titles, "training loss")):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(args.out, dpi=120)
    print(f"{len(args.logs)} run(s) drawn in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
