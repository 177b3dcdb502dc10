"""The mixer study: what each token mixer does in DETR, over seeds, on the built-in shapes.

    python study.py                                 # parts and arms, runs done and missing, time
    python study.py S1 --seeds 3 --jobs 2           # the missing runs of a part, then its tables
    python study.py S7 --bccd DIR                   # real images: annotations/, train/ and val/
    python study.py S1 --probes                     # ... and what its decoder layers and heads do
    python study.py T5                              # classifiers: PoolFormer's ablation, in small
    python study.py cost                            # the whole detector by mixer; no training
    python study.py S1 --output_dir try --assets try --epochs 1 -- --train_shapes 64   # to try it

An arm is a name and its flags, and runs once for each seed, as train.py in a folder of its own with
one thread; all arms of a seed see the same images in the same order. Ctrl-C stops all runs with
their checkpoints, and the same command continues. What stands after -- goes to every run.

Tables are printed in Markdown. All numbers are added to assets/study.json, each run with the commit
it ran on ("-dirty": a program was changed); the pictures assets/study_*.png need matplotlib.
"""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")    # the runs have the other cores

import numpy as np
from scipy.stats import spearmanr, t as student_t

from bench import PUBLISHED
from coco_eval import FlagParser, run_command
from metaformer import ABLATIONS
from finetune import flag
from config import PRESETS, parse_options
from report import hms
from study_probes import (NOISE, REACH, measure_attention, measure_cost, measure_layers,
                          measure_noise, measure_surgery, power_of, train_keeping_epochs)


# -- what is run ---------------------------------------------------------------------------------

SIDES = {"enc": "--encoder_mixer", "dec": "--decoder_mixer", "both": "--mixer"}
ALL = "attention", "avgpool", "pool", "identity", "none", "mlp", "conv", "random"
FEW = "attention", "avgpool", "none", "conv"


def arms(side, mixers, flags="", suffix=""):
    """{"enc-pool": "--encoder_mixer pool", ...}; "attention" is the preset's, on both sides."""
    named = {}
    for mixer in mixers:
        if mixer == "attention":
            named[mixer + suffix] = flags
        else:
            named[f"{side}-{mixer}{suffix}"] = f"{SIDES[side]} {mixer} {flags}".strip()
    return named


def rates(factor):
    preset = PRESETS["shapes"]
    return f"--lr {factor * preset['lr']:g} --lr_backbone {factor * preset['lr_backbone']:g}"


def ablation_arms(flags):
    """{"T5-identity": "... --mixers identity", ...}: the changes of PoolFormer-S12's ablation,
    arXiv:2111.11418, Table 5, made to a small classifier; "T5-pool" is without any."""
    named = {"T5-pool": flags}
    for name, change in ABLATIONS.items():
        own = [flag(*option) for option in change.items() if option[0] != "crop_fraction"]
        named[f"T5-{name}"] = " ".join([flags, *own])
    return named


TUNE = "--finetune ../attention_s{seed}/ckpt.pt --epochs 1"
BCCD = "--data {bccd} --recipe small --epochs 150"
CLASSIFIER = "--model metaformer_tiny --scenes count --epochs 14"     # 8 leave some arms at 20 %

# Arms in groups; the first arm of a group is the reference of the others' differences. An arm of
# several groups runs once. keep_epochs: train_keeping_epochs instead of train.py. score: AP of
# detectors, top1 of classifiers, both in [0, 1].
Part = namedtuple("Part", "question groups keep_epochs score", defaults=[False, "AP"])
PARTS = {
    "S1": Part("Which of the two self-attentions matters, and which mixer does as well?", {
        "encoder": {**arms("enc", ALL), "no-encoder": "--enc_layers 0"},
        "decoder": arms("dec", ALL),
        "both": arms("both", ALL)}),
    "S2": Part("Is it the mixing, or what changes with it?", {
        # -wide: as many parameters as attention; -longer: a step of attention takes 1.2 times as
        # long as one of enc-none
        "parameters and time": {
            "attention": "", "enc-none": "--encoder_mixer none", "both-none": "--mixer none",
            "enc-none-wide": "--encoder_mixer none --dim_feedforward 333",
            "both-none-wide": "--mixer none --dim_feedforward 449",
            "enc-none-longer": "--encoder_mixer none --train_shapes 7680"},
        "a scale on the mixers": {
            **arms("enc", ("attention", "avgpool", "pool")),
            **arms("enc", ("attention", "avgpool", "pool"), "--mixer_scale 1e-5", "-scale")},
        "positions at the input": arms("enc", ("attention", "avgpool", "identity", "none", "conv"),
                                       "--positions input", "-input"),
        "no positions in the encoder": {"attention": "", "enc-none": "--encoder_mixer none",
                                        "attention-blind": "--positions none"},
        "half the learning rate": arms("enc", FEW[:3], rates(0.5), "-half"),
        "twice the learning rate": arms("enc", FEW[:3], rates(2), "-twice")}),
    "S3": Part("Is there a task in which the mixing matters?", {
        "one decoder layer": arms("enc", FEW, "--dec_layers 1", "-dec1"),
        "pairs, one decoder layer": arms("enc", FEW, "--scenes pairs --dec_layers 1",
                                         "-pairs-dec1"),
        "pairs": arms("enc", FEW, "--scenes pairs", "-pairs"),
        "twins": arms("enc", FEW, "--scenes twins", "-twins"),
        "twins, one decoder layer": arms("enc", FEW, "--scenes twins --dec_layers 1",
                                         "-twins-dec1"),
        "dots": arms("enc", FEW, "--scenes dots", "-dots")}),
    "S4": Part("Do the curves meet in forty epochs?", {
        "forty epochs": arms("enc", FEW[:3], "--epochs 40", "-40")}),
    "S5": Part("Where does the fluctuation come from?", {
        f"batches of {size}": arms("both", ("attention", "avgpool", "pool", "none"),
                                   f"--batch_size {size} --log_every 1", f"-b{size}")
        for size in (4, 16, 64)}, keep_epochs=True),
    "S6": Part("What does a trained model lose with its attention, and regain in one epoch?", {
        "trained": {"attention": ""},
        "one epoch of fine-tuning": {**arms("enc", FEW[:3], TUNE, "-tuned"),
                                     **arms("dec", FEW[1:3], TUNE, "-tuned"),
                                     **arms("both", FEW[1:3], TUNE, "-tuned")}}),
    "S7": Part("And on real images?", {"blood cells": arms("enc", FEW, BCCD, "-bccd")}),
    "T5": Part("Do the parts of a PoolFormer matter as they do on ImageNet?", {
        "ablation": ablation_arms(CLASSIFIER)}, score="top1")}

COST = {"detr_r50": (800, 1066), "detr_r50_dc5": (800, 1066)}       # DETR's usual size on COCO


# -- statistics ----------------------------------------------------------------------------------

def step_at(scores, steps, level=0.5):
    """The step at which the scores first reach the level, on the line between two evaluations at
    `steps`; 0 at step 0. None if they never do."""
    before, step_before = 0.0, 0
    for score, step in zip(scores, steps):
        if score >= level:
            return step_before + (level - before) / (score - before) * (step - step_before)
        before, step_before = score, step
    return None


def mean_sd(values):
    """Mean and standard deviation (n - 1); None of too few values."""
    values = list(values)
    return (statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None)


def paired_interval(ours, theirs):
    """Mean of ours - theirs over the seeds that both have, dicts by seed, and the ends of its 95 %
    interval by Student's t over the differences; None for what too few seeds leave open."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    (mean, sd), n = mean_sd(differences), len(differences)
    if sd is None:
        return mean, None, None
    half = float(student_t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean, mean - half, mean + half


def compare(scores, reference, name="AP"):
    """A row for each arm: mean, deviation, and the paired difference to the reference arm.

    scores: {arm: {seed: score}}; name: AP or top1. "differs": the interval excludes 0 and the
    difference is over 0.02.
    """
    rows = []
    for arm, by_seed in scores.items():
        mean, sd = mean_sd(by_seed.values())
        row = {"arm": arm, "seeds": len(by_seed), name: mean, f"{name}_sd": sd}
        if arm != reference:
            d, low, high = paired_interval(by_seed, scores.get(reference, {}))
            differs = low is not None and (low > 0 or high < 0) and abs(d) > 0.02
            row.update(difference=d, low=low, high=high, differs=differs)
        rows.append(row)
    return rows


# -- runs ----------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
Job = namedtuple("Job", "arm seed folder options keep_epochs")      # options: words for train.py


def make_jobs(names, args):
    """The runs of these parts, each once; all arms of a seed before the next seed."""
    jobs = {}
    for seed in range(1, args.seeds + 1):
        for part in map(PARTS.get, names):
            named = {arm: flags for group in part.groups.values() for arm, flags in group.items()}
            for arm, flags in named.items():
                own = [word.format(seed=seed, bccd=os.path.abspath(args.bccd))
                       for word in flags.split()]
                options = [*f"--seed {seed} --num_workers 0 --epochs {args.epochs}".split(), *own,
                           *args.more]             # of an option given twice the later counts
                folder = Path(args.output_dir, f"{arm}_s{seed}")
                jobs[folder] = Job(arm, seed, folder, options, part.keep_epochs)
    return list(jobs.values())


def finished(job):
    """Whether the run is, with the options that it has now."""
    path = job.folder / "finished.txt"
    return path.exists() and path.read_text() == shlex.join(job.options)


def commit():
    """The commit of this code, with "-dirty" if a program was changed since, or "unknown"."""
    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout
    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("diff", "HEAD", "--", "*.py")
    except OSError:                                                  # there is no git
        return "unknown"
    return head.strip() + ("-dirty" if changed else "") or "unknown"


def start(job):
    """The process of a run, in its folder, where no data/coco is found; it continues by itself."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "commits.txt", "a") as file:
        print(commit(), file=file)
    program = ["study.py", "train"] if job.keep_epochs else ["train.py"]
    command = [sys.executable, HERE / program[0], *program[1:], *job.options, "--output_dir", "."]
    (job.folder / "output.txt").unlink(missing_ok=True)    # a run whose study was killed writes on
    with open(job.folder / "output.txt", "w") as output:
        # a session of its own, so that Ctrl-C reaches this process alone, which passes it on
        return subprocess.Popen(
            command, cwd=job.folder, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def end_of(job, poll):
    """Whether the run has ended; adds the processor time of one that has to its cpu_seconds.txt."""
    before = sum(os.times()[2:4])                  # of all children that have ended
    if poll() is None:
        return False
    with open(job.folder / "cpu_seconds.txt", "a") as file:
        print(sum(os.times()[2:4]) - before, file=file)
    return True


def report_end(job, code):
    """Prints how a run has ended; returns whether it is finished."""
    if code == 0:
        (job.folder / "finished.txt").write_text(shlex.join(job.options))
        result = read_results(job)
        score = "top1" if "top1" in result else "AP"
        print(f"{job.folder}: {score} {result[score]:.3f}, {hms(result['seconds'])}", flush=True)
    else:
        lines = (job.folder / "output.txt").read_text(errors="replace").splitlines()
        print(f"{job.folder} failed (exit code {code}), the end of its output.txt:", *lines[-5:],
              sep="\n    ", flush=True)
    return code == 0


def run_jobs(jobs, at_once):
    """Runs what is not finished, so many at a time; returns the jobs that failed. Ctrl-C, SIGTERM
    and SIGHUP stop all runs, which save their checkpoints, and raise KeyboardInterrupt."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):                                    # Windows lacks one
            signal.signal(getattr(signal, name), signal.default_int_handler)
    waiting, going, failed = [job for job in jobs if not finished(job)], [], []
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                going.append((waiting[0], start(waiting[0])))
                del waiting[0]
            time.sleep(0.1)
            ended = [(job, process) for job, process in going if end_of(job, process.poll)]
            going = [pair for pair in going if pair not in ended]
            failed += [job for job, process in ended if not report_end(job, process.returncode)]
    except KeyboardInterrupt:
        print(f"stopping {len(going)} run(s); the same command continues", flush=True)
        for _, process in going:
            process.send_signal(signal.SIGTERM)
        for job, process in going:
            end_of(job, process.wait)
        raise
    return failed


# -- the results of a run ------------------------------------------------------------------------

def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(job):
    """The numbers and curves of a finished run, as a dict for study.json.

    Scores are those after the last epoch, not the best. "seconds": of a processor, as other work on
    the machine counts in any other; with the evaluations, and of all sittings.
    """
    epochs, steps = read_lines(job.folder / "log.txt"), read_lines(job.folder / "steps.txt")
    tested = [r for r in epochs if "test_coco_eval_bbox" in r or "test_acc1" in r]
    curves, losses = {"epoch": [r["epoch"] + 1 for r in tested]}, ["loss", "class_error"]
    if "test_acc1" in tested[-1]:                                    # a classifier
        curves["top1"] = [r["test_acc1"] / 100 for r in tested]
        scores = {"top1": curves["top1"][-1]}
    else:
        ap, ap50, ap75 = zip(*(r["test_coco_eval_bbox"][:3] for r in tested))
        steps_per_epoch = max(r["step"] for r in steps)
        curves.update(AP=ap, AP50=ap50)
        losses += ["loss_bbox_unscaled", "loss_giou_unscaled"]
        scores = {"AP": ap[-1], "AP50": ap50[-1], "AP75": ap75[-1],
                  "step_at_half": step_at(ap50, [e * steps_per_epoch for e in curves["epoch"]])}
    for name in losses:
        curves[name] = [r[f"train_{name}"] for r in tested]
    return {**scores,
            "seconds": sum(map(float, (job.folder / "cpu_seconds.txt").read_text().split())),
            "parameters": epochs[-1]["n_parameters"], "options": shlex.join(job.options),
            "commit": "+".join(dict.fromkeys((job.folder / "commits.txt").read_text().split())),
            "curves": {k: [float(f"{v:.4g}") for v in curve] for k, curve in curves.items()}}


def kept(job, name, measure):
    """What measure(folder), a dict, gives; kept in the run's folder as NAME.json."""
    path = job.folder / f"{name}.json"
    if not path.exists():
        print(f"{job.folder}: measuring its {name}", file=sys.stderr, flush=True)
        text = json.dumps(measure(job.folder))
        path.write_text(text)
    return json.loads(path.read_text())


def kept_by_arm(jobs, name, measure):
    """{arm: what kept gives for each of its seeds, a list}."""
    found = {}
    for job in jobs:
        found.setdefault(job.arm, []).append(kept(job, name, measure))
    return found


def noise_rows(jobs):
    """A row for each arm of S5: means and deviations over seeds."""
    rows = []
    for arm, measured in kept_by_arm(jobs, "noise", measure_noise).items():
        row = dict(arm=arm, mixer=re.sub("-b[0-9]+$", "", arm), seeds=len(measured),
                   batch_size=measured[0]["batch_size"])
        for name in NOISE:
            row[name], row[f"{name}_sd"] = mean_sd(m[name] for m in measured)
        rows.append(row)
    return rows


def power_rows(rows):
    """The power of the batch size that deviation and frozen of noise_rows follow, by mixer."""
    found = []
    for mixer in dict.fromkeys(r["mixer"] for r in rows):
        own = [r for r in rows if r["mixer"] == mixer]
        if len(own) > 1:
            found.append({"mixer": mixer, **{name: power_of(
                [r["batch_size"] for r in own], [r[name] for r in own]) for name in NOISE[:2]}})
    return found


def surgery_rows(jobs):
    """compare()'s rows of the trained models of S6 after surgery, to themselves before it."""
    scores = {}
    for job in jobs:
        if job.arm == "attention":
            for name, ap in kept(job, "surgery", measure_surgery).items():
                scores.setdefault(name, {})[job.seed] = ap
    return compare(scores, "attention")


def decoder_rows(jobs):
    """A row for each arm: means over seeds, in lists by decoder layer."""
    rows = []
    for arm, measured in kept_by_arm(jobs, "layers", measure_layers).items():
        row = dict(arm=arm, seeds=len(measured))
        for name in ("AP", "AP_nms", "duplicates"):
            by_seed = [[layer[name] for layer in m["layers"]] for m in measured]
            row[name] = np.mean(by_seed, 0).tolist()
        information = [m["mutual_information"] for m in measured]
        row["information"], row["information_sd"] = mean_sd(information)
        rows.append(row)
    return rows


def attention_rows(jobs):
    """A row for each encoder layer of each arm that has attention there: means over seeds, in lists
    by head, those of a seed in the order of their distance, as their numbers mean nothing."""
    rows = []
    for arm, measured in kept_by_arm(jobs, "attention", measure_attention).items():
        by_seed = [np.transpose([m[name] for name in REACH], (1, 2, 0)) for m in measured if m]
        for layer, seeds in enumerate(zip(*by_seed)):                # of each seed (nh, 3)
            means = np.mean([heads[heads[:, 0].argsort()] for heads in seeds], 0)
            rows.append({"arm": arm, "seeds": len(seeds), "layer": layer + 1,
                         **dict(zip(REACH, means.T.tolist()))})
    return rows


# -- tables and pictures -------------------------------------------------------------------------

def number(value, sd=None, digits=3):
    """0.631 ± 0.012; - for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def difference(row):
    """The difference in a row of compare() in words."""
    if row.get("difference") is None:
        return ""
    if row["low"] is None:
        return f"{row['difference']:+.3f} (one seed: no interval)"
    verdict = " **differs**" if row["differs"] else ""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]{verdict}"


def print_table(title, columns, rows):
    """Markdown; columns: {heading: function of a row}."""
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n")
    for row in rows:
        print(f"| {' | '.join(str(cell(row)) for cell in columns.values())} |")


def compared(reference, name="AP"):
    """The first columns of a table of compare()'s rows."""
    return {"arm": lambda r: f"`{r['arm']}`", "seeds": lambda r: r["seeds"],
            name: lambda r: number(r[name], r[f"{name}_sd"]),
            f"{name} minus `{reference}`'s [95 %]": difference}


def published_top1(arm):
    """Top-1 in percent on ImageNet of the PoolFormer-S12 with the change of an arm of T5."""
    name = arm.replace("T5-", "poolformer_s12_").removesuffix("_pool")
    return float(PUBLISHED[name].split()[2])


def group_table(title, names, runs, score):
    """Prints the table of a group of arms, and returns its rows; runs: {arm: {seed: results}}."""
    runs, reference = {arm: runs[arm] for arm in names if arm in runs}, next(iter(names))
    scores = {arm: {seed: r[score] for seed, r in by_seed.items()}
              for arm, by_seed in runs.items()}
    rows, columns = compare(scores, reference, score), compared(reference, score)
    for row in rows:
        results, means = runs[row["arm"]].values(), ["seconds", "parameters"]
        if score == "top1":
            row["published"] = published_top1(row["arm"])
        else:
            means += ["AP50", "AP75"]
            reached = [r["step_at_half"] for r in results if r["step_at_half"] is not None]
            row["step_at_half"], row["reached"] = mean_sd(reached)[0], len(reached)
        row.update({name: statistics.fmean(r[name] for r in results) for name in means})

    # beside the scores: of classifiers ImageNet's, of detectors other thresholds
    if score == "top1":
        columns["S12 on ImageNet, published %"] = lambda r: r["published"]
    else:
        columns |= {
            "AP50": lambda r: number(r["AP50"]), "AP75": lambda r: number(r["AP75"]),
            "AP50 over 0.5 at step": lambda r: number(r["step_at_half"], digits=0),
            "in seeds": lambda r: f"{r['reached']} of {r['seeds']}"}
    print_table(title, {
        **columns,
        "parameters": lambda r: f"{r['parameters']:,.0f}",
        "seconds": lambda r: number(r["seconds"], digits=0)}, rows)
    return rows


def print_sides(tables):
    """Prints the AP of S1 with a row for each mixer and a column for each side."""
    sides = {title: {re.sub("^(enc|dec|both)-", "", row["arm"]): row for row in rows}
             for title, rows in tables.items() if title in PARTS["S1"].groups}

    def cell(title, mixer):
        row = sides[title].get(mixer)
        return f"{number(row['AP'])} {difference(row)}".strip() if row else ""
    print_table("AP by the mixer of encoder, decoder, both; difference to attention [95 %]", {
        "mixer": lambda mixer: f"`{mixer}`",
        **{title: lambda mixer, title=title: cell(title, mixer) for title in sides}},
        dict.fromkeys(mixer for rows in sides.values() for mixer in rows))


def part_tables(name, jobs):
    """Prints the tables of a part; returns {title: rows} and {arm: {seed: results}} of its finished
    jobs."""
    part, runs, tables = PARTS[name], {}, {}
    for job in jobs:
        runs.setdefault(job.arm, {})[job.seed] = read_results(job)
    print(f"\n## {name}. {part.question}")
    for title, names in part.groups.items():
        if runs.keys() & names.keys():
            tables[title] = group_table(title, names, runs, part.score)
    if name == "S1":
        print_sides(tables)
    if name == "S5":
        tables["fluctuation"] = noise_rows(jobs)
        print_table("fluctuation", {
            "arm": lambda r: f"`{r['arm']}`", "seeds": lambda r: r["seeds"],
            **{k: lambda r, k=k: number(r[k], r[f"{k}_sd"], 4) for k in NOISE}},
            tables["fluctuation"])
        tables["power"] = power_rows(tables["fluctuation"])
        print_table("power of the batch size by which the fluctuation falls; -1/2: sampling", {
            "mixer": lambda r: f"`{r['mixer']}`", **{
                k: lambda r, k=k: number(r[k], digits=2) for k in ("deviation", "frozen")}},
            tables["power"])
    if name == "T5" and len(tables.get("ablation", [])) > 2:
        ours, published = zip(*((r["top1"], r["published"]) for r in tables["ablation"]))
        tables["order"] = [{"arms": len(ours), "rank correlation": float(
            spearmanr(ours, published).statistic)}]
        print_table("order of the arms beside the published one (1: the same)", {
            k: lambda r, k=k: round(r[k], 2) for k in ("arms", "rank correlation")},
            tables["order"])
    if name == "S6":
        tables["surgery"] = surgery_rows(jobs)
        print_table("surgery", compared("attention"), tables["surgery"])
    return tables, runs


def probe_tables(jobs):
    """Prints what the decoder layers, queries and attention heads of trained models do; returns
    {title: rows}."""
    def series(name, digits):
        return lambda r: " ".join(number(x, digits=digits) for x in r[name])

    arm = {"arm": lambda r: f"`{r['arm']}`", "seeds": lambda r: r["seeds"]}
    tables = {"decoder layers": decoder_rows(jobs), "attention": attention_rows(jobs)}
    print_table("after each decoder layer", {
        **arm, "AP": series("AP", 3), "AP with NMS at 0.7": series("AP_nms", 3),
        "duplicates per image": series("duplicates", 2), "bits of query and 4 x 4 cell":
        lambda r: number(r["information"], r["information_sd"], 2)}, tables["decoder layers"])
    print_table("encoder attention, a number for each head", {
        **arm, "layer": lambda r: r["layer"], "mean distance, pixels": series("distance", 1),
        "entropy / log N": series("entropy", 2),
        "share beyond half of the backbone's field": series("far", 2)}, tables["attention"])
    return tables


def draw_part(name, tables, runs, jobs, folder):
    """The pictures of a part: a dot for each seed, AP against seconds, curves, layers, noise."""
    try:
        import plot
    except ImportError:
        print("no pictures without matplotlib: pip install -r requirements-dev.txt")
        return
    groups = {title: {row["arm"]: runs[row["arm"]] for row in rows}
              for title, rows in tables.items() if title in PARTS[name].groups}
    if not groups:
        return
    plot.plot_arms(groups, folder / f"study_{name}.png", PARTS[name].score)
    plot.plot_times(groups, folder / f"study_{name}_times.png", PARTS[name].score)
    for title, named in groups.items():
        runs_of_group = [str(job.folder) for job in jobs if job.arm in named]
        slug = re.sub("[^a-z0-9]+", "_", title)
        plot.main([*runs_of_group, "--out", str(folder / f"study_{name}_{slug}.png")])
    if tables.get("decoder layers"):
        plot.plot_layers({title: [r for r in tables["decoder layers"] if r["arm"] in named]
                          for title, named in groups.items()}, folder / f"study_{name}_layers.png")
    if tables.get("fluctuation"):
        plot.plot_noise(tables["fluctuation"], folder / f"study_{name}_noise.png")


def cost_table(more):
    """Prints the cost of the detectors by mixer; returns its rows."""
    rows = [dict(row, commit=commit()) for name, size in COST.items()
            for row in measure_cost(name, size, more)]
    print_table("one image through the whole detector, by the mixer of both sides", {
        "model": lambda r: r["model"], "mixer": lambda r: f"`{r['mixer']}`",
        "G multiply-adds": lambda r: number(r["multiply_adds"] / 1e9, digits=1),
        "of them mixing": lambda r: f"{r['mixing']:.1%}",
        "seconds": lambda r: number(r["seconds"]),
        "memory, MB": lambda r: number(r["memory_mb"], digits=0)}, rows)
    return rows


def add_to_json(path, name, tables, runs={}):
    """Adds a part's tables and runs to study.json; those of others stay."""
    results = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    results[name] = tables
    for arm, by_seed in runs.items():
        results["runs"].setdefault(arm, {}).update({str(k): r for k, r in by_seed.items()})
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text)     # curves in a line
    path.with_suffix(".tmp").write_text(text + "\n")
    path.with_suffix(".tmp").replace(path)


# -- python study.py -----------------------------------------------------------------------------

def epochs_of(job):
    given = [value for word, value in zip(job.options, job.options[1:]) if word == "--epochs"]
    return int(given[-1])


def print_list(names, args):
    """The parts and arms, how many of their runs are done, and the seconds of one thread."""
    seconds = {job.folder: read_results(job)["seconds"] for job in make_jobs(names, args)
               if finished(job)}
    paces = [seconds[job.folder] / epochs_of(job) for job in make_jobs(names, args)
             if job.folder in seconds]
    pace = statistics.fmean(paces) if paces else 25
    source = "the mean of the finished runs" if paces else "a guess until one is finished"
    print(f"~ is an estimate: {pace:.1f} seconds for an epoch of any run, {source}")

    for name in names:
        print(f"\n{name}  {PARTS[name].question}")
        jobs, missing = make_jobs([name], args), 0
        for arm in dict.fromkeys(job.arm for job in jobs):
            own = [job for job in jobs if job.arm == arm]
            done = [seconds[job.folder] for job in own if job.folder in seconds]
            each = statistics.fmean(done) if done else pace * epochs_of(own[0])
            missing += each * (len(own) - len(done))
            print(f"    {arm:24}{len(done)} of {len(own)} done  {'' if done else '~'}{hms(each)}")
        print(f"    missing: ~{hms(missing)} of one thread, ~{hms(missing / args.jobs)} with "
              f"--jobs {args.jobs}")


def parse_args(argv):
    more = []
    if "--" in argv:
        argv, more = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    parser = FlagParser(description=__doc__, usage="python study.py [PART ...] [options] "
                                                   "[-- options of train.py]")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, cost")
    add("--list", action="store_true", help="parts and arms; nothing is run")
    add("--seeds", type=int, default=3, help="1 to N, default 3")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: all cores")
    add("--epochs", type=int, default=8, help="of arms without their own; default: %(default)s")
    add("--probes", action="store_true", help="also measure decoder layers, duplicates, queries "
        "and attention heads of the trained models")
    add("--bccd", default="", help="S7: annotations/instances_{train,val}.json, train/, val/")
    add("--output_dir", default="study", help="folder of the runs")
    add("--assets", type=Path, default="assets", help="folder of study.json and the pictures")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in (*PARTS, "cost")]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)} and cost")
    if min(args.seeds, args.jobs, args.epochs) < 1:
        parser.error("--seeds, --jobs and --epochs must be at least 1")
    if "S7" in args.parts and not os.path.isdir(args.bccd) and not args.list:
        parser.error("S7 needs --bccd DIR: the blood cells of github.com/Shenggan/BCCD_Dataset, "
                     "converted to COCO's format")
    if args.parts != ["cost"]:
        parse_options(more, __doc__)                                 # exits at an unknown option
    args.more = more
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:                                        # see start
        return train_keeping_epochs(argv[1:])
    args = parse_args(argv)
    names = [name for name in args.parts if name in PARTS]
    if args.list or not args.parts:
        return print_list(names or list(PARTS), args)
    args.assets.mkdir(parents=True, exist_ok=True)
    path, jobs = args.assets / "study.json", make_jobs(names, args)
    try:
        # fine-tuning starts from other runs' weights
        failed = run_jobs([job for job in jobs if "--finetune" not in job.options], args.jobs)
        failed += run_jobs([job for job in jobs if "--finetune" in job.options], args.jobs)

        for name in names:
            jobs = [job for job in make_jobs([name], args) if finished(job)]
            tables, runs = part_tables(name, jobs)
            if args.probes and PARTS[name].score == "AP":
                tables |= probe_tables(jobs)
            add_to_json(path, name, tables, runs)
            draw_part(name, tables, runs, jobs, args.assets)
        if "cost" in args.parts:
            add_to_json(path, "cost", cost_table(args.more))
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        sys.exit(f"{len(failed)} run(s) failed: {', '.join(str(job.folder) for job in failed)}")


if __name__ == "__main__":
    run_command(main)
