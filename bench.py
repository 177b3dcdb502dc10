"""Speed and memory, one JSON line per run.

    python bench.py step                            # match, loss, backward, clip, optimizer too
    python bench.py forward --batch_size 1 --height 480 --width 640 --dtype bfloat16
    python bench.py loss --batch_size 8 --objects 20            # matching and loss alone
    python bench.py step --without sdpa fused_adamw             # beside ours with these two off
    python bench.py step --each --memory                        # ... with one lever off at a time
    python bench.py step --official ../detr                     # beside the official code
    python bench.py loader --data coco --images 64 --official ../detr
    python bench.py padding --data coco             # share of padding by batch size, from the sizes
    python bench.py mixers --threads 2 --plot mixers.png        # encoder by mixer and tokens
    python bench.py loop --num_workers 1 --model detr_tiny      # what the training loop adds
    python bench.py sizes --height 480 --width 640  # parameters, multiply-adds, speed of all models
    python bench.py evaluator                       # COCO evaluation of 500,000 detections
    python bench.py evaluator --peers --repeats 5   # beside pycocotools and others, if installed

What is compared runs in turn, A B C A B C ..., on the same work and weights; medians, and "ratio":
the time of each over ours. Evaluators: CPU seconds, user and system, each in a process of its own.
--official takes a clone of facebookresearch/detr and the torchvision that it needs.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import mixers as mixers_py
import images as images_py
import resnet as resnet_py
import metaformer as metaformer_py
import data
import model as model_py
import matcher
import losses
import train

# what can be turned off, and the modes in which it can matter; without_levers says for what
LEVERS = {
    "channels_last": ("forward", "step"), "sdpa": ("forward", "step"),
    "mask_none": ("forward", "step"), "folded_norm": ("forward", "step"),
    "fused_adamw": ("step",), "reused_grads": ("step",), "fast_dropout": ("step",),
    "async_log": ("step",), "one_transfer": ("step", "loss"),
    "broadcast_l1": ("step", "loss"), "per_image_cost": ("step", "loss"), "uint8": ("loader",)}


# -- levers off ----------------------------------------------------------------------------------

@torch.no_grad()
def cdist_cost(logits, boxes, targets, cost_class, cost_bbox, cost_giou):
    """matching_cost with its L1 distance by cdist."""
    labels, target_boxes = matcher.pad_targets(targets, logits.shape[-1] - 1, logits.device)
    L, B, Q, _ = boxes.shape
    p = logits.softmax(-1).gather(3, labels[None, :, None].expand(L, B, Q, -1))
    l1 = torch.cdist(boxes, target_boxes.expand(L, -1, -1, -1), p=1)
    giou = data.generalized_box_iou(data.cxcywh_to_xyxy(boxes), data.cxcywh_to_xyxy(target_boxes))
    return cost_bbox * l1 - cost_class * p - cost_giou * giou


@torch.no_grad()
def all_pairs_cost(logits, boxes, targets, *weights, cost=matcher.matching_cost):
    """matching_cost by way of all queries and all objects of the batch, as if of one image."""
    (L, B, Q, _), counts = boxes.shape, [len(t["labels"]) for t in targets]
    whole = {k: torch.cat([t[k] for t in targets]) for k in ("labels", "boxes")}
    pairs = cost(logits.view(L, 1, B * Q, -1), boxes.view(L, 1, B * Q, 4), [whole], *weights)
    blocks = pairs.view(L, B, Q, -1).split(counts, -1)
    return torch.stack([F.pad(block[:, b], (0, max(counts) - counts[b]))
                        for b, block in enumerate(blocks)], 1)


def match_by_layer(logits, boxes, targets, *weights):
    return [matcher.match(x, b, targets, *weights) for x, b in zip(logits, boxes)]


def always_masked(images, valid, device):
    return images.to(device), valid.to(device)


def norm_of_conv(x, conv, norm):
    return norm(conv(x))


def free_gradients(optimizer, step=torch.optim.AdamW.step):
    """A step after which no gradient is kept, so that the next forward pass runs without them."""
    step(optimizer)
    optimizer.zero_grad()


def read_losses(*args, step=train.train_step):
    return {name: value.item() for name, value in step(*args).items()}


def float_item(self, key, item=data.DetectionDataset.__getitem__):
    """Normalised in the loader, four bytes per value."""
    image, target = item(self, key)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images_py.PIXEL_MEAN, images_py.PIXEL_STD))
    return (image.float() - mean) / std, target


class PlainAdamW(torch.optim.AdamW):
    """torch's default, which knows nothing of found_inf."""

    def __init__(self, groups, fused):
        super().__init__(groups)

    def step(self):
        del self.found_inf
        super().step()


def without_levers(off):
    """A context in which the product lacks the levers `off`."""
    cost = cdist_cost if "broadcast_l1" in off else matcher.matching_cost
    if "per_image_cost" in off:
        cost = functools.partial(all_pairs_cost, cost=cost)
    replacements = {
        "channels_last": (torch, "channels_last", torch.contiguous_format),
        "sdpa": (F, "scaled_dot_product_attention", mixers_py.explicit_attention),
        "mask_none": (train, "to_device", always_masked),
        "folded_norm": (resnet_py, "conv_norm", norm_of_conv),
        "fused_adamw": (torch.optim, "AdamW", PlainAdamW),
        "reused_grads": (torch.optim.AdamW, "step", free_gradients),
        "fast_dropout": (mixers_py, "dropout", F.dropout),
        "async_log": (train, "train_step", read_losses),
        "one_transfer": (losses, "match", match_by_layer),
        "broadcast_l1": (matcher, "matching_cost", cost),
        "per_image_cost": (matcher, "matching_cost", cost),
        "uint8": (data.DetectionDataset, "__getitem__", float_item)}
    stack = contextlib.ExitStack()
    for lever in off:
        stack.enter_context(patch.object(*replacements[lever]))
    if "fast_dropout" in off:
        stack.enter_context(patch.object(model_py, "dropout", F.dropout))
    return stack


# -- measuring -----------------------------------------------------------------------------------

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(runs, args):
    """Seconds of each repeat of each of {name: (run, levers off)}, in turn after a first round."""
    times = {name: [] for name in runs}
    for k in range(args.repeats + 1):
        for name, (run, off) in runs.items():
            torch.backends.cuda.matmul.allow_tf32 = name != "official"    # as train.py
            with without_levers(off):
                wait(args.device)
                start = time.perf_counter()
                run()
                wait(args.device)
                times[name].append(time.perf_counter() - start)
    return {name: t[1:] for name, t in times.items()}


def summary(times):
    """{name: median, least and largest of its times}, and the ratios of the medians to ours."""
    seconds = {name: dict(median=round(statistics.median(t), 6), min=round(min(t), 6),
                          max=round(max(t), 6)) for name, t in times.items()}
    ours = next(iter(seconds.values()))["median"]
    return {"seconds": seconds, "ratio": {name: round(s["median"] / ours, 3)
                                          for name, s in list(seconds.items())[1:]}}


def peak_mb(device="cpu"):
    """The most memory since forget_peak, of the GPU or of this process (Linux; getrusage would
    count its parent, too)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak(device="cpu"):
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(make, device):
    """MB that a run and doing it twice need beyond what there was before; what was needed to make
    it, and is gone (a second model, say), does not count."""
    forget_peak(device)
    before = peak_mb(device)
    run = make()
    forget_peak(device)
    for _ in range(2):
        run()
    return round(peak_mb(device) - before, 1)


def count_syncs(run):
    """How often the host waits for the GPU in a run; None on a CPU."""
    if not torch.cuda.is_initialized():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def count_flops(run):
    """Floating-point operations of convolutions and matrix products in a run."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        getattr(run, "__wrapped__", run)()          # the counter does not know inference_mode
    return counter.get_total_flops()


def measured_tflops(args):
    """The best of five products of large square matrices."""
    n = 8192 if args.device == "cuda" else 2048
    a, seconds = torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype)), []
    for _ in range(6):
        wait(args.device)
        start = time.perf_counter()
        a @ a
        wait(args.device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:]) / 1e12


def child(name, folder="-"):
    """What this command prints for the part `name` in a process of its own: memory is per
    process. Tensors (not evaluators) are mapped one by one: with glibc's moving threshold the same
    run takes 50 % more at times, as freed memory lies in pieces."""
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"} if folder == "-" else {}
    out = subprocess.run([sys.executable, *sys.argv, "--one", name, folder],
                         env={**os.environ, **mapped}, stdout=subprocess.PIPE, text=True,
                         check=True).stdout
    return json.loads(out.splitlines()[-1])


# -- forward, step, loss -------------------------------------------------------------------------

def make_batch(args, num_classes):
    """Random images and targets, as the loader gives them."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(args.batch_size):
        image = rng.integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)
        boxes = rng.uniform([0.2, 0.2, 0.05, 0.05], [0.8, 0.8, 0.4, 0.4], (args.objects, 4))
        target = {"labels": torch.from_numpy(rng.integers(0, num_classes, args.objects)),
                  "boxes": torch.from_numpy(boxes).float()}
        samples.append((torch.from_numpy(image).permute(2, 0, 1), target))
    return data.collate(samples)


def autocast(args, dtype=None):
    dtype = getattr(torch, dtype or args.dtype)
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def make_model(args):
    torch.manual_seed(0)
    model = model_py.build_model(args.model, **({"mixer": args.mixer} if args.mixer else {}))
    return model.to(args.device, memory_format=torch.channels_last)


def make_run(args, compiled=False):
    """The work of ours: a function without arguments that does it once."""
    if args.what == "loss":
        logits, boxes, targets = make_predictions(args)

        def run():
            logits.grad = boxes.grad = None
            loss = losses.set_loss(logits, boxes, targets)["loss"]
            loss.backward()
            return loss.detach()
        return run
    model = make_model(args)
    images, valid, targets = make_batch(args, model.cfg.num_classes)
    network = torch.compile(model) if compiled else model
    if args.what == "forward":
        model.eval()

        @torch.inference_mode()
        def run():
            with autocast(args):
                return network(*train.to_device(images, valid, args.device))
        return run
    model.train()
    cfg = train.TrainConfig(model=args.model)
    optimizer = train.build_optimizer(model, cfg)
    counts = losses.loss_counts(targets, model.cfg.num_queries)
    configs, dtype = (model.cfg, losses.LossConfig(), cfg), getattr(torch, args.dtype)
    return lambda: train.train_step(network, optimizer, [(images, valid, targets)], counts,
                                    configs, 0, args.device, dtype)


def make_predictions(args):
    """Random logits (L, B, Q, K+1) and boxes (L, B, Q, 4) that ask for gradients, and targets."""
    cfg = model_py.MODELS[args.model]
    targets = make_batch(SimpleNamespace(**{**vars(args), "height": 8, "width": 8}),
                         cfg.num_classes)[2]
    torch.manual_seed(0)
    shape = cfg.dec_layers, args.batch_size, cfg.num_queries
    logits = torch.randn(*shape, cfg.num_classes + 1, device=args.device)
    boxes = torch.rand(*shape, 4, device=args.device) * 0.5 + 0.1
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def official_run(args):
    """The same work, weights and numbers as make_run, done by the official code."""
    models, cfg = import_official(args.official), model_py.MODELS[args.model]
    options = SimpleNamespace(**asdict(cfg), **asdict(losses.LossConfig()), lr_backbone=1e-5,
                              masks=False, dataset_file="coco", device=args.device)
    network, criterion, _ = models.build_model(options)

    def weighted(outputs, targets):
        terms = criterion(outputs, targets)
        return sum(terms[k] * w for k, w in criterion.weight_dict.items())
    if args.what == "loss":
        logits, boxes, targets = make_predictions(args)
        targets = [{k: v.to(args.device) for k, v in t.items()} for t in targets]

        def run():
            logits.grad = boxes.grad = None
            layers = [dict(pred_logits=x, pred_boxes=b) for x, b in zip(logits, boxes)]
            loss = weighted({**layers[-1], "aux_outputs": layers[:-1]}, targets)
            loss.backward()
            return loss.detach()
        return run
    from util.misc import NestedTensor
    network.load_state_dict(make_model(args).state_dict())
    network.to(args.device).train(args.what == "step")
    images, valid, targets = make_batch(args, cfg.num_classes)
    images = resnet_py.Normalise()(images, None).contiguous()          # its loader does it
    batch = NestedTensor(images, ~valid)
    if args.what == "forward":
        @torch.no_grad()
        def run():
            with autocast(args, args.official_dtype):
                return network(batch.to(args.device))
        return run
    backbone = [p for n, p in network.named_parameters() if "backbone" in n and p.requires_grad]
    others = [p for n, p in network.named_parameters() if "backbone" not in n]
    optimizer = torch.optim.AdamW([dict(params=others), dict(params=backbone, lr=1e-5)], lr=1e-4,
                                  weight_decay=1e-4)

    def run():
        moved = [{k: v.to(args.device) for k, v in t.items()} for t in targets]
        with autocast(args, args.official_dtype):
            outputs = network(batch.to(args.device))
        layers = [{k: v.float() for k, v in o.items()}
                  for o in (*outputs.pop("aux_outputs"), outputs)]
        loss = weighted({**layers[-1], "aux_outputs": layers[:-1]}, moved)
        assert math.isfinite(loss.item())                             # its loop looks at every step
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    return run


def import_official(folder):
    """The official code's package of models; nothing is fetched."""
    if not os.path.isdir(os.path.join(folder, "models")):
        raise FileNotFoundError(f"{folder}/models not found: --official takes a clone of "
                                f"github.com/facebookresearch/detr")
    sys.path.insert(0, folder)
    warnings.filterwarnings("ignore", module="torchvision|util|models")
    import util.misc
    util.misc.is_main_process = lambda: False       # no pretrained backbone: nothing is downloaded
    import models
    return models


def variants(args):
    """{name: (function that makes its run, levers that are off)}."""
    made = {"ours": (make_run, ())}
    mine = [lever for lever, modes in LEVERS.items() if args.what in modes]
    for off in [[lever] for lever in mine] if args.each else [args.without] * bool(args.without):
        made["without " + " ".join(off)] = make_run, tuple(off)
    if args.compile:
        made["compiled"] = functools.partial(make_run, compiled=True), ()
    if args.official:
        made["official"] = official_run, ()
    return made


def bench_model(args):
    """forward, step and loss."""
    made = variants(args)
    if args.one:
        make, off = made[args.one[0]]
        if args.official:
            import_official(args.official)          # torchvision is no part of its memory
        with without_levers(off):
            return peak_memory(lambda: make(args), args.device)
    runs = {}
    for name, (make, off) in made.items():
        with without_levers(off):
            runs[name] = make(args), off
    result = summary(in_turn(runs, args))
    result["images_per_s"] = {name: round(args.batch_size / s["median"], 3)
                              for name, s in result["seconds"].items()}
    run = runs["ours"][0]
    result["host_syncs"] = count_syncs(run)
    if args.memory:
        result["memory_mb"] = {name: child(name) for name in runs}
    if args.what == "loss":
        if args.official:
            ours, theirs = runs["ours"][0]().item(), runs["official"][0]().item()
            result["difference"] = abs(ours - theirs) / theirs
        return result
    if args.what == "forward" and args.official:
        ours, theirs = runs["ours"][0](), runs["official"][0]()
        result["difference"] = (ours[1][-1] - theirs["pred_boxes"].float()).abs().max().item()
    tflops = count_flops(run) / result["seconds"]["ours"]["median"] / 1e12
    peak = args.peak_tflops or measured_tflops(args)
    return {**result, "tflops": round(tflops, 4), "peak_tflops": round(peak, 4),
            "peak": "given" if args.peak_tflops else "measured", "mfu": round(tflops / peak, 4)}


# -- data ----------------------------------------------------------------------------------------

def training_set(args):
    """The training set of --data, with the official augmentation."""
    if args.data:
        paths = data.data_paths(args, "train")
    elif args.train_json and args.train_images:
        paths = args.train_json, args.train_images
    else:
        raise ValueError(f"{args.what} needs images: --data DIR in COCO layout, or --train_json "
                         f"and --train_images")
    return data.CocoDataset(*paths, augment=True)


def padding_share(dataset, batches):
    """Share of the pixels of these batches of keys that is padding."""
    image = padded = 0
    for keys in batches:
        sizes = np.array([dataset.size_of(*key) for key in keys])
        image += sizes.prod(1).sum()
        padded += len(keys) * sizes.max(0).prod()
    return round(float(1 - image / padded), 4)


def bench_padding(args):
    """By batch size; without decoding an image. The images repeat, with other random sizes, to
    fill at least 20,000: a window of the sampler is never the whole epoch."""
    dataset = training_set(args)
    n = max(args.images or 20_000, len(dataset))
    dataset.sizes, dataset.image_ids = np.resize(dataset.sizes, (n, 2)), np.arange(n)
    return {"images": n, "padding": {
        B: {name: padding_share(dataset, data.TrainSampler(dataset, B, 42, group_by_shape=grouped))
            for name, grouped in (("ours", True), ("without grouping", False))}
        for B in (2, 4, 8, 16, 32)}}


class OfficialItems(torch.utils.data.Dataset):
    """The images of a CocoDataset read and changed by the official code, as its plans say."""

    def __init__(self, dataset, folder):
        import_official(folder)
        import datasets.transforms as T
        from datasets.coco import CocoDetection
        self.dataset, self.T = dataset, T
        self.items = CocoDetection(dataset.image_dir, dataset.source, None, False)
        self.last = T.Compose([T.ToTensor(), T.Normalize([0.485, 0.456, 0.406],
                                                         [0.229, 0.224, 0.225])])

    def __getitem__(self, key):
        (epoch, i), T = key, self.T
        plan = self.dataset.plan(epoch, i)
        image, target = self.items[i]
        if plan.flip:
            image, target = T.hflip(image, target)
        if plan.resize_before_crop:
            image, target = T.resize(image, target, plan.resize_before_crop[::-1])
        if plan.crop:
            image, target = T.crop(image, target, plan.crop)
        return self.last(*T.resize(image, target, plan.size[::-1]))


def bench_loader(args):
    """Images/s of the loader, per process; the official transforms carry out the same plans."""
    dataset = training_set(args)
    sampler = data.TrainSampler(dataset, args.batch_size, 42)
    batches = list(sampler)[:max(1, (args.images or 64) // args.batch_size)]
    made = {name: (functools.partial(DataLoader, dataset, collate_fn=data.collate), off)
            for name, (_, off) in variants(args).items() if name != "official"}
    if args.official:
        items = OfficialItems(dataset, args.official)
        from util.misc import collate_fn
        made["official"] = functools.partial(DataLoader, items, collate_fn=collate_fn), ()

    def run(make):
        loader = make(batch_sampler=batches, num_workers=args.num_workers)
        return sum(len(targets) for *_, targets in loader)
    runs = {name: (functools.partial(run, make), off) for name, (make, off) in made.items()}
    result, n = summary(in_turn(runs, args)), len(batches) * args.batch_size
    result.update(images=n, padding=padding_share(dataset, batches), images_per_s={
        name: round(n / s["median"], 2) for name, s in result["seconds"].items()})
    if args.official:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images_py.PIXEL_MEAN, images_py.PIXEL_STD))
        keys = sum(batches, [])[:16]
        pixels = [(dataset[k][0], (items[k][0] * std + mean).round()) for k in keys]
        result["pixels_differ_by"] = max((a - b).abs().max().item() for a, b in pixels)
    return result


# -- mixers, training loop -----------------------------------------------------------------------

def make_encoder_run(name, args):
    """Forward and backward pass of an encoder; name: mixer and grid, as in "pool 25 34".

    Without dropout, with which the CPU's attention would fall back to whole matrices of weights.
    """
    mixer, H, W = name.split()
    H, W = int(H), int(W)
    cfg = model_py.MODELS[args.model]
    cfg = replace(cfg, mixer=mixer, dropout=0.0, grid_rows=max(H, cfg.grid_rows),
                  grid_cols=max(W, cfg.grid_cols))
    encoder = model_py.Encoder(cfg).to(args.device)
    x = torch.randn(args.batch_size, H * W, cfg.hidden_dim, device=args.device, requires_grad=True)
    pos = torch.randn(1, H * W, cfg.hidden_dim, device=args.device)

    def run():
        encoder.zero_grad()
        with autocast(args):
            y = encoder(x, pos, None, (H, W))
        y.float().sum().backward()
    return run


def bench_mixers(args):
    """Time and memory of the encoder by mixer and number of tokens."""
    if args.one:
        return peak_memory(lambda: make_encoder_run(args.one[0], args), args.device)
    names = [f"{mixer} {H} {W}" for mixer in args.mixers for H, W in args.grids]
    times = in_turn({name: (make_encoder_run(name, args), ()) for name in names}, args)
    rows = []
    for name in names:
        mixer, H, W = name.split()
        rows.append(dict(mixer=mixer, tokens=int(H) * int(W),
                         **summary({name: times[name]})["seconds"][name], memory_mb=child(name)))
    if args.plot:
        plot_mixers(rows, args.plot)
    return {"rows": rows}


def plot_mixers(rows, path):
    """Time and memory over the number of tokens, a line for each mixer."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, field, unit in zip(axes, ("median", "memory_mb"), ("seconds", "peak memory, MB")):
        for mixer in dict.fromkeys(r["mixer"] for r in rows):
            points = [(r["tokens"], r[field]) for r in rows if r["mixer"] == mixer]
            axis.plot(*zip(*points), marker=".", label=mixer)
        axis.set(xlabel="tokens", title=unit, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("encoder by mixer, forward and backward")
    figure.savefig(path, dpi=120)


def bench_loop(args):
    """Shares of the training loop's time, in epochs on the built-in shapes, the first left out:
    waiting for data; the step (model, loss, optimizer); the rest."""
    marks, step = [], train.train_step

    def timed_step(*a):
        start = time.perf_counter()
        result = step(*a)
        wait(args.device)
        marks.append((start, time.perf_counter()))
        return result

    B, n, folder = args.batch_size, 60, tempfile.TemporaryDirectory()
    given = dict(model=args.model, train_shapes=B * n, val_shapes=8, batch_size=B, log_every=n,
                 epochs=args.repeats + 1, eval_every=args.repeats + 1, device=args.device,
                 dtype=args.dtype, num_workers=args.num_workers, output_dir=folder.name)
    with folder, patch.object(train, "train_step", timed_step), \
            contextlib.redirect_stdout(sys.stderr):
        train.train(*train.make_configs(given), 0, 1, args.device)
        records = [json.loads(line) for line in open(os.path.join(folder.name, "steps.txt"))]
    shares = {"data": [], "step": [], "rest": []}
    for epoch, record in list(enumerate(records))[1:]:
        steps = marks[epoch * n:(epoch + 1) * n]
        seconds = n * B / record["images_per_s"]
        shares["data"].append(record["data_share"])
        shares["step"].append(sum(end - start for start, end in steps) / seconds)
        shares["rest"].append(1 - shares["data"][-1] - shares["step"][-1])
    return {"steps": n, "share": {name: dict(median=round(statistics.median(s), 4),
                                             min=round(min(s), 4), max=round(max(s), 4))
                                  for name, s in shares.items()},
            "ms_per_step": round(1000 * seconds / n, 3)}


# -- evaluator -----------------------------------------------------------------------------------

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
        gt, dt = make_detections(args.detections, args.images or 5000)
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
    forget_peak()
    before, start = peak_mb(), time.process_time()
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
    end = time.process_time()
    return dict(read_s=read - start, evaluate_s=end - read, total_s=end - start,
                memory_mb=peak_mb() - before, AP=float(stats[0]))


def bench_evaluator(args):
    """Medians over the repeats of each evaluator that is installed."""
    names = [name for name in EVALUATORS[:None if args.peers else 2]
             if name in EVALUATORS[:2] or importlib.util.find_spec(name)]
    if args.one:
        name, folder = args.one
        return (write_workload(folder, args) if name == "workload" else
                run_evaluator(name, folder))
    with tempfile.TemporaryDirectory() as folder:
        sizes, runs = child("workload", folder), {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                runs[name].append(child(name, folder))
    return {**sizes, "repeats": args.repeats,
            **{name: {field: round(statistics.median(r[field] for r in runs[name]), 4)
                      for field in runs[name][0]} for name in names}}


# -- sizes ---------------------------------------------------------------------------------------

# parameters in M, multiply-adds in G at 224 x 224 and top-1 in percent, as the papers print them
PUBLISHED = """
poolformer_s12 11.9 1.8 77.2                poolformer_s24 21.4 3.4 80.3
poolformer_s36 30.8 5.0 81.4                poolformer_m36 56.1 8.8 82.1
poolformer_m48 73.4 11.6 82.5               poolformer_s12_identity 11.9 1.8 74.3
poolformer_s12_random 11.9 3.3 75.8         poolformer_s12_conv 11.9 1.8 78.1
poolformer_s12_pool5 11.9 1.8 77.2          poolformer_s12_pool7 11.9 1.8 77.1
poolformer_s12_pool9 11.9 1.8 76.8          poolformer_s12_layernorm 11.9 1.8 76.5
poolformer_s12_batchnorm 11.9 1.8 76.4      poolformer_s12_nonorm 11.9 1.8 46.1
poolformer_s12_relu 11.9 1.8 76.4           poolformer_s12_silu 11.9 1.8 77.2
poolformer_s12_noresidual 11.9 1.8 0.1      poolformer_s12_nomlp 2.5 0.2 5.7
poolformer_s12_pppa 14.0 1.9 78.3           poolformer_s12_ppaa 16.5 2.5 81.0
poolformer_s12_pppf 11.9 1.8 77.5           poolformer_s12_ppff 12.2 1.9 77.9
identityformer_s12 11.9 1.8 74.6            identityformer_s24 21.3 3.4 78.2
identityformer_s36 30.8 5.0 79.3            identityformer_m36 56.1 8.8 80.0
identityformer_m48 73.3 11.5 80.4           randformer_s12 11.9 1.9 76.6
randformer_s24 21.3 3.5 78.2                randformer_s36 30.8 5.2 79.5
randformer_m36 56.1 9.0 81.2                randformer_m48 73.3 11.9 81.4
poolformerv2_s12 11.9 1.8 78.0              poolformerv2_s24 21.3 3.4 80.7
poolformerv2_s36 30.8 5.0 81.6              poolformerv2_m36 56.1 8.8 82.2
poolformerv2_m48 73.3 11.5 82.6             convformer_s18 27 3.9 83.0
convformer_s36 40 7.6 84.1                  convformer_m36 57 12.8 84.5
convformer_b36 100 22.6 84.8                caformer_s18 26 4.1 83.6
caformer_s36 39 8.0 84.5                    caformer_m36 56 13.2 85.2
caformer_b36 99 23.2 85.5                   vit_ti 5 - 72.2
vit_s 22 4.6 79.9                           vit_b 86 17.6 81.8
mixer_s16 18 - -                            mixer_b16 59 12.7 76.4
""".split()
PUBLISHED = {name: numbers for name, *numbers in zip(*(PUBLISHED[k::4] for k in range(4)))}


def counts(name):
    """Parameters and multiply-adds of a classifier at 224 x 224: dicts of every way to count them.

    The PoolFormer paper's sizes leave LayerScale out, its ablations do not; and it counts 5 per
    element for a group norm, as fvcore does. The follow-up paper counts no norms. Nothing is
    allocated: the tensors are on the meta device.
    """
    with torch.device("meta"):
        model, images = model_py.build_model(name).eval(), torch.zeros(1, 3, 224, 224)
    named = {k: p.numel() for k, p in model.named_parameters() if p.requires_grad}
    norms = []
    for module in model.modules():
        if isinstance(module, metaformer_py.TokenGroupNorm):
            module.register_forward_hook(lambda m, args, y: norms.append(5 * y.numel()))
    macs = count_flops(lambda: model(images)) // 2
    return ({"": sum(named.values()),
             "no LayerScale": sum(n for k, n in named.items() if "layer_scale" not in k)},
            {"": macs, "with norms": macs + sum(norms)})


def agreement(printed, ways, unit):
    """How a published figure comes about: the first of `ways` to count that gives its digits."""
    digits = len(printed.partition(".")[2])
    for way, count in ways.items():
        if printed in ("-", f"{count / unit:.{digits}f}"):
            return way
    return "cut" if float(printed) <= ways[""] / unit < float(printed) + 0.1**digits else "DIFFERS"


def print_classifiers():
    """The papers' tables as computed, a line per classifier."""
    print("classifiers at 224 x 224, beside the figures of their papers. A note says where a "
          "published one\nis reproduced by another way of counting, was cut instead of rounded, "
          "or differs.\n")
    print(f"{'model':25s} {'trained':>11s} {'published M':>11s}  {'':13s} {'G mult-adds':>11s} "
          f"{'published':>9s}  {'':10s} {'published top-1':>15s}")
    for name, (params, macs, top1) in PUBLISHED.items():
        p, m = counts(name)
        note_p, note_m = agreement(params, p, 1e6), agreement(macs, m, 1e9)
        print(f"{name:25s} {p['']:11,d} {params:>11s}  {note_p:13s} {m[''] / 1e9:11.3f} "
              f"{macs:>9s}  {note_m:10s} {top1:>15s}")


def bench_sizes(args):
    """Size of the classifiers, size and speed of the DETRs (eval mode, batch 1), as tables."""
    print_classifiers()
    print(f"\n{'model':14s} {'mixer':10s} {'image':>9s} {'parameters':>11s} {'trained':>11s} "
          f"{'G mult-adds':>11s} {'images/s':>9s}   ({args.device}, {torch.get_num_threads()} "
          f"threads)")
    detectors = [name for name in model_py.MODELS if name not in metaformer_py.METAFORMERS]
    rows = [(name, "attention") for name in detectors]
    rows += [(name, mixer) for name in ("detr_tiny", "detr_r50")
             for mixer in mixers_py.MIXERS if mixer != "attention"]
    for name, mixer in rows:
        model = model_py.build_model(name, mixer=mixer).eval()
        model = model.to(args.device, memory_format=torch.channels_last)
        h, w = (64, 64) if name == "detr_tiny" else (args.height, args.width)
        images = torch.randint(256, (1, 3, h, w), dtype=torch.uint8, device=args.device)
        macs, times = count_flops(lambda: model(images)) // 2, []
        for _ in range(args.repeats):
            start = time.perf_counter()
            with torch.inference_mode():
                model(images)[1].sum().item()                       # waits for the device
            times.append(time.perf_counter() - start)
        parameters = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        print(f"{name:14s} {mixer:10s} {f'{h}x{w}':>9s} {sum(parameters):11,d} {sum(trained):11,d} "
              f"{macs / 1e9:11.3f} {1 / statistics.median(times):9.2f}")
    return {}


# -- command line --------------------------------------------------------------------------------

MODES = dict(forward=bench_model, step=bench_model, loss=bench_model, loader=bench_loader,
             padding=bench_padding, mixers=bench_mixers, loop=bench_loop,
             evaluator=bench_evaluator, sizes=bench_sizes)
# options that the line repeats
SHOWN = dict(model="model mixer batch_size height width objects device dtype".split(),
             loader=["batch_size", "num_workers"], padding=[],
             mixers=["model", "batch_size", "device", "dtype"],
             loop=["model", "batch_size", "device", "dtype", "num_workers"])


def grid(text):
    H, W = text.split("x")
    return int(H), int(W)


def options():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MODES)
    parser.add_argument("--repeats", type=int, default=0, help="default 7, evaluator 5")
    parser.add_argument("--model", default="detr_r50", choices=[
        name for name in model_py.MODELS if name not in metaformer_py.METAFORMERS])
    parser.add_argument("--mixer", default="", choices=["", *mixers_py.MIXERS])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--objects", type=int, default=7, help="targets of each image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it chooses")
    parser.add_argument("--without", nargs="+", default=[], choices=LEVERS, metavar="LEVER",
                        help=f"beside ours without these, of {', '.join(LEVERS)}")
    parser.add_argument("--each", action="store_true", help="beside ours without each lever")
    parser.add_argument("--compile", action="store_true", help="beside ours under torch.compile")
    parser.add_argument("--official", default="", help="a clone of facebookresearch/detr")
    parser.add_argument("--official_dtype", default="", choices=["", "float32", "bfloat16"])
    parser.add_argument("--memory", action="store_true", help="CPU: in processes of their own")
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="0: a matrix product's")
    parser.add_argument("--data", default="", help="loader, padding: COCO layout, or the next two")
    parser.add_argument("--train_json", default="")
    parser.add_argument("--train_images", default="")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--mixers", nargs="+",
                        default="attention pool identity mlp random conv".split())
    parser.add_argument("--grids", nargs="+", type=grid, default=[(25, 34), (34, 50), (50, 68)])
    parser.add_argument("--plot", default="", help="mixers: a picture, .png or .svg")
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--images", type=int, default=0,
                        help="evaluator 5000, loader 64, padding 20,000 or all")
    parser.add_argument("--gt", default="", help="COCO files to evaluate instead of generated ones")
    parser.add_argument("--dt", default="")
    parser.add_argument("--peers", action="store_true", help="other evaluators that are installed")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    parser = options()
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (5 if args.what == "evaluator" else 7)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = MODES[args.what](args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.what == "sizes":                        # it has printed its tables
        return
    if not args.one and args.what != "evaluator":
        shown = SHOWN["model" if MODES[args.what] is bench_model else args.what]
        result = {"what": args.what, **{k: getattr(args, k) for k in shown},
                  "threads": torch.get_num_threads(), "repeats": args.repeats, **result}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
