"""Speed and memory, one JSON line per run.

    python bench.py evaluator                       # COCO evaluation of 500,000 detections
    python bench.py evaluator --peers --repeats 5   # beside pycocotools and others, if installed
    python bench.py evaluator --detections 2000000

Times are CPU seconds, user and system, of a process of its own; medians, the evaluators in turn.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

EVALUATORS = ("columns", "files", "pycocotools", "faster_coco_eval", "hotcoco")


def make_detections(num_detections, num_images, num_classes=80):
    """COCO dicts: 1 of 5 detections a noisy copy of a ground truth, the others anywhere."""
    rng = np.random.default_rng(0)
    G = 7 * num_images + 3                                          # COCO has 7.3 an image

    def boxes(n):
        sizes = 500 * rng.random((n, 2)) ** 3 + 4                   # most are small
        return np.concatenate([rng.random((n, 2)) * 600, sizes], axis=1)

    gt = dict(image=rng.integers(0, num_images, G),
              category=(num_classes * rng.random(G) ** 3).astype(int), box=boxes(G))
    copied = rng.random(num_detections) < 0.2
    source = rng.integers(0, G, num_detections)
    noise = 0.1 * rng.normal(size=(num_detections, 4)) * np.tile(gt["box"][source, 2:], 2)
    dt = dict(image=np.where(copied, gt["image"][source], rng.integers(0, num_images, len(copied))),
              category=gt["category"][source],
              box=np.where(copied[:, None], gt["box"][source] + noise, boxes(len(copied))))
    score = rng.random(num_detections).round(3) * np.where(copied, 1, 0.6)

    def records(columns):
        return [dict(image_id=i, category_id=k + 1, bbox=[round(abs(x), 2) for x in box])
                for i, k, box in zip(*(columns[name].tolist() for name in columns))]

    truth = dict(images=[dict(id=i, width=1100, height=1100) for i in range(num_images)],
                 categories=[dict(id=k + 1, name=f"class {k + 1}") for k in range(num_classes)],
                 annotations=[dict(r, id=n + 1, iscrowd=int(n % 100 == 0),
                                   area=r["bbox"][2] * r["bbox"][3])
                              for n, r in enumerate(records(gt))])
    return truth, [dict(r, score=float(s)) for r, s in zip(records(dt), score)]


def write_workload(folder, args):
    """gt.json, dt.json, and columns.npz with the arrays that evaluate_columns takes."""
    if args.gt:
        gt, dt = (json.load(open(path)) for path in (args.gt, args.dt))
    else:
        gt, dt = make_detections(args.detections, args.images)
    for name, content in (("gt", gt), ("dt", dt)):
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(content, file)
    images, categories = (np.unique([r["id"] for r in gt[k]]) for k in ("images", "categories"))
    columns = {"K": len(categories)}
    for side, records in (("gt", gt["annotations"]), ("dt", dt)):
        image, category = ([r[name] for r in records] for name in ("image_id", "category_id"))
        columns[f"{side} image"] = np.searchsorted(images, image)
        columns[f"{side} category"] = np.searchsorted(categories, category)
        columns[f"{side} box"] = np.array([r["bbox"] for r in records], np.float64)
    columns["gt area"] = np.array([r["area"] for r in gt["annotations"]], np.float64)
    columns["gt crowd"] = np.array([r["iscrowd"] for r in gt["annotations"]], bool)
    columns["dt score"] = np.array([r["score"] for r in dt], np.float64)
    np.savez(os.path.join(folder, "columns.npz"), **columns)
    return {"detections": len(dt), "images": len(gt["images"])}


def run_evaluator(name, folder):
    """One evaluation: CPU seconds to read and to evaluate, memory beyond that before it, and AP."""
    gt, dt = (os.path.join(folder, f"{side}.json") for side in ("gt", "dt"))
    if name in ("columns", "files"):
        from evaluate import coco_eval, evaluate_columns
        if name == "columns":
            c = np.load(os.path.join(folder, "columns.npz"))
            columns = [{key[3:]: c[key] for key in c if key[:2] == side} for side in ("gt", "dt")]
    elif name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    elif name == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster as COCOeval
    else:
        from hotcoco import COCO, COCOeval
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    read = start
    if name == "columns":
        stats = evaluate_columns(*columns, int(c["K"]))["stats"]
    elif name == "files":
        stats = coco_eval(gt, dt)["stats"]
    else:
        truth = COCO(gt)
        run = COCOeval(truth, truth.loadRes(dt), "bbox")
        read = time.process_time()
        run.evaluate()
        run.accumulate()
        run.summarize()
        stats = run.stats
    end, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(read_s=read - start, evaluate_s=end - read, total_s=end - start,
                memory_mb=(peak - before) / 1024, AP=float(stats[0]))


def bench_evaluator(args):
    """Medians over the repeats of each evaluator that is installed."""
    names = [name for name in EVALUATORS[:None if args.peers else 2]
             if name in EVALUATORS[:2] or importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:

        def run(name):                              # in a process of its own: memory is per process
            out = subprocess.run([sys.executable, *sys.argv, "--one", name, folder],
                                 stdout=subprocess.PIPE, text=True, check=True).stdout
            return json.loads(out.splitlines()[-1])
        sizes, runs = run("workload"), {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                runs[name].append(run(name))
    return {**sizes, "repeats": args.repeats,
            **{name: {field: round(statistics.median(r[field] for r in runs[name]), 4)
                      for field in runs[name][0]} for name in names}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["evaluator"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--gt", default="", help="COCO files to evaluate instead of generated ones")
    parser.add_argument("--dt", default="")
    parser.add_argument("--peers", action="store_true", help="other evaluators that are installed")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    name, folder = args.one or ("", "")
    print(json.dumps(bench_evaluator(args) if not name else write_workload(folder, args)
                     if name == "workload" else run_evaluator(name, folder)))


if __name__ == "__main__":
    main()
