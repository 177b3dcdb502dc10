"""Speed and memory, one JSON line per run; sizes of all models.

    python bench.py forward --batch_size 1 --height 480 --width 640 --dtype bfloat16
    python bench.py loss --batch_size 8 --objects 20            # matching and loss, no network
    python bench.py masks --objects 10                          # mask head and its losses
    python bench.py step                                        # a whole optimizer step
    python bench.py step --without folded_norm fused_adamw      # ... with and without these two
    python bench.py step --each --memory                        # ... and without one at a time
    python bench.py step --official ../detr                     # ... and by the official code
    python bench.py loader --data coco --batch_size 8           # images/s, and share of padding
    python bench.py mixers --batch_size 1 --plot mixers.png     # encoder by mixer and tokens
    python bench.py classifiers --batch_size 8      # forward pass and training step, 224 pixels
    python bench.py classifiers --passes forward --classifiers poolformer_s12 vit_s --plot c.png
    python bench.py evaluator                       # COCO evaluation of 500,000 detections
    python bench.py evaluator --peers --repeats 5   # ... and by pycocotools and others
    python bench.py sizes                           # parameters, multiply-adds, speed of all models

Runs that are compared do the same work with the same weights and alternate, A B C A B C ...;
"seconds" are medians and extremes, "ratio" is the median of each over that of ours. An evaluator
runs in a process of its own, whose CPU seconds (user and system) are counted.
"""

import argparse
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
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import matcher
import metaformer
import resnet
import segmentation
import train
from classification import ClassLossConfig
from coco_eval import FlagParser, UserError, check_output
from evaluate import autocast
from metaformer import METAFORMERS, TokenGroupNorm
from mixers import MIXERS
from model import MODELS, Encoder, ModelConfig, build_model

DETECTORS = [name for name, cfg in MODELS.items()
             if name not in METAFORMERS and not cfg.masks]


# -- levers: what makes the product fast, each with what it replaces -----------------------------

@torch.no_grad()
def all_pairs_cost(logits, boxes, targets, *weights, cost=matcher.matching_cost):
    """matching_cost that computes all queries of the batch with all objects of the batch."""
    L, B, Q, _ = boxes.shape
    counts = [len(t["labels"]) for t in targets]
    whole = {k: torch.cat([t[k] for t in targets]) for k in ("labels", "boxes")}
    costs = cost(logits.view(L, 1, B * Q, -1), boxes.view(L, 1, B * Q, 4), [whole], *weights)
    own = [block[:, b] for b, block in enumerate(costs.view(L, B, Q, -1).split(counts, -1))]
    return torch.stack([F.pad(c, (0, max(counts) - c.shape[-1])) for c in own], 1)


def match_by_layer(logits, boxes, targets, *weights):
    """match of all layers with a transfer to the host for each."""
    return [matcher.match(x, b, targets, *weights) for x, b in zip(logits, boxes)]


class PlainAdamW(torch.optim.AdamW):
    """torch's default, which updates one tensor after another and does not read found_inf."""

    def __init__(self, groups, fused):
        super().__init__(groups)

    def step(self):
        del self.found_inf
        super().step()


def float_item(self, key, item=data.DetectionDataset.__getitem__):
    """An item normalised in the loader, four bytes per value."""
    image, target = item(self, key)
    return resnet.Normalise()(image[None], None)[0], target


# lever: the modes in which it can matter; the object, its attribute, and what turns the lever off
LEVERS = {
    "channels_last": (("forward", "step"), torch, "channels_last", torch.contiguous_format),
    "folded_norm": (("forward", "step"), resnet, "conv_norm", lambda x, conv, norm: norm(conv(x))),
    "fused_adamw": (("step",), torch.optim, "AdamW", PlainAdamW),
    "one_transfer": (("step", "loss"), losses, "match", match_by_layer),
    "per_image_cost": (("step", "loss"), matcher, "matching_cost", all_pairs_cost),
    "uint8": (("loader",), data.DetectionDataset, "__getitem__", float_item)}


def without_levers(off):
    """A context in which the product lacks the levers `off`."""
    stack = ExitStack()
    for lever in off:
        _, owner, name, replacement = LEVERS[lever]
        stack.enter_context(patch.object(owner, name, replacement))
    return stack


# -- measuring -----------------------------------------------------------------------------------

def seconds_of(run, device):
    """Seconds until the device has finished the run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_interleaved(runs, args):
    """Seconds of every repeat of {name: (run, levers off)}; a first round is not counted."""
    times = {name: [] for name in runs}
    for _ in range(args.repeats + 1):
        for name, (run, off) in runs.items():
            tf32 = args.dtype == "bfloat16" and name != "official"  # as in train.py
            torch.backends.cuda.matmul.allow_tf32 = tf32
            with without_levers(off):
                times[name].append(seconds_of(run, args.device))
    return {name: t[1:] for name, t in times.items()}


def summary(times, images):
    """Of {name: times}: seconds, speed on `images` images, and medians over the first one's."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    first, *others = medians
    return {"seconds": {name: dict(median=round(medians[name], 6), min=round(min(t), 6),
                                   max=round(max(t), 6)) for name, t in times.items()},
            "ratio": {name: round(medians[name] / medians[first], 3) for name in others},
            "images_per_s": {name: round(images / median, 3) for name, median in medians.items()}}


def peak_mb(device="cpu"):
    """Peak memory since forget_peak; on Linux by VmHWM, as getrusage counts the parent, too."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak(device="cpu"):
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(build, device):
    """Peak MB of two runs above the level before they were built; temporary memory of building
    them (a second model, say) is not counted."""
    forget_peak(device)
    before = peak_mb(device)
    run = build()
    forget_peak(device)
    run()
    run()
    return round(peak_mb(device) - before, 1)


def in_child(part, folder="-", command=()):
    """What this command, or another one of this file, prints for one part, in a process of its own,
    as memory is per process.

    Tensors (not evaluators) get pages of their own: with glibc's moving threshold the same run
    takes 50 % more at times, because freed memory lies in pieces.
    """
    environment = dict(os.environ)
    if folder == "-":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, *(command or sys.argv), "--child", part, folder]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True,
                         check=True).stdout
    return json.loads(out.splitlines()[-1])


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
    run = getattr(run, "__wrapped__", run)          # the counter does not work in inference_mode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


# -- forward, step, loss: ours -------------------------------------------------------------------
#
# A run is a function without arguments that does the work of args.mode once.

def make_batch(args, num_classes):
    """Random images, valid and targets, as the loader gives them."""
    rng, samples = np.random.default_rng(0), []
    for _ in range(args.batch_size):
        image = rng.integers(0, 256, (3, args.height or 320, args.width or 320), dtype=np.uint8)
        labels = rng.integers(0, num_classes, args.objects)
        boxes = rng.uniform([0.2, 0.2, 0.05, 0.05], [0.8, 0.8, 0.4, 0.4], (args.objects, 4))
        target = {"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes).float()}
        samples.append((torch.from_numpy(image), target))
    return data.collate(samples)


def make_model(args):
    torch.manual_seed(0)
    model = build_model(args.model, mixer=args.mixer or MODELS[args.model].mixer)
    return model.to(args.device, memory_format=torch.channels_last)


def loss_run(args, loss_of):
    """Loss and gradients of random predictions; loss_of(logits, boxes, targets): the total loss."""
    cfg = MODELS[args.model]
    torch.manual_seed(0)
    shape = cfg.dec_layers, args.batch_size, cfg.num_queries
    logits = torch.randn(*shape, cfg.num_classes + 1, device=args.device, requires_grad=True)
    boxes = torch.rand(*shape, 4, device=args.device) * 0.5 + 0.1
    boxes.requires_grad_()
    _, _, targets = make_batch(args, cfg.num_classes)

    def run():
        logits.grad = boxes.grad = None
        loss = loss_of(logits, boxes, targets)
        loss.backward()
        return loss.detach()
    return run


def mask_size(args):
    return args.height or 320, args.width or 320


def mask_inputs(args):
    """Random input of the mask head: states (B, Q, C), memory and tokens (B, C, H, W), the maps of
    strides 4, 8 and 16, all with gradients; targets; pairs, the first queries to all objects."""
    cfg, B, (IH, IW) = MODELS[args.model], args.batch_size, mask_size(args)
    torch.manual_seed(0)
    shapes = [(B, cfg.num_queries, cfg.hidden_dim)]
    shapes += [(B, C, math.ceil(IH / stride), math.ceil(IW / stride)) for C, stride in
               ((cfg.hidden_dim, 32), (cfg.hidden_dim, 32), (256, 4), (512, 8), (1024, 16))]
    inputs = [torch.randn(shape, device=args.device, requires_grad=True) for shape in shapes]
    targets = [{"labels": torch.zeros(args.objects, dtype=torch.int64),
                "masks": torch.rand(args.objects, IH, IW) < 0.3} for _ in range(B)]
    return inputs, targets, [(torch.arange(args.objects), torch.arange(args.objects))] * B


def mask_heads(args):
    """Our modules, with the same weights each time; the channels of the maps are a ResNet-50's."""
    torch.manual_seed(1)
    cfg, backbone = MODELS[args.model], SimpleNamespace(map_channels=[256, 512, 1024])
    heads = segmentation.MaskAttention(cfg), segmentation.MaskHead(
        cfg, [SimpleNamespace(body=backbone)])
    return [head.to(args.device) for head in heads]


def mask_run(args):
    """The masks of the matched queries, their losses and all gradients."""
    (states, memory, tokens, *maps), targets, pairs = mask_inputs(args)
    attend, head = mask_heads(args)
    image = torch.arange(args.batch_size).repeat_interleave(args.objects)
    chosen = image, torch.arange(args.objects).repeat(args.batch_size)

    def run():
        memory_tokens, head_tokens = (x.flatten(2).transpose(1, 2) for x in (memory, tokens))
        attention = attend(states, memory_tokens, None, memory.shape[2:])
        masks = head(head_tokens, attention, maps, lambda: chosen)
        wanted = segmentation.matched_masks(pairs, targets, mask_size(args))
        terms = segmentation.mask_losses(masks, wanted.to(args.device), len(image))
        loss = terms["loss_mask"] + terms["loss_dice"]
        loss.backward()
        return loss.detach()
    return run


def official_mask_run(args):
    """The same by the official code, which computes the masks of all queries."""
    (states, memory, tokens, *maps), targets, pairs = mask_inputs(args)
    official, C = import_official(args.official, "models.segmentation"), states.shape[2]
    attend = official.MHAttentionMap(C, C, MODELS[args.model].nheads, dropout=0.0)
    head = official.MaskHeadSmallConv(C + MODELS[args.model].nheads, [1024, 512, 256], C)
    for theirs, ours in zip((attend, head), mask_heads(args)):
        theirs.to(args.device).load_state_dict(ours.state_dict())
    criterion = import_official(args.official, "models.detr").SetCriterion(1, None, {}, 0.1, [])

    def run():
        masks = head(tokens, attend(states, memory), maps[::-1])               # (B * Q, 1, H4, W4)
        masks = masks[:, 0].unflatten(0, states.shape[:2])
        objects = args.batch_size * args.objects
        terms = criterion.loss_masks({"pred_masks": masks}, targets, pairs, objects)
        loss = terms["loss_mask"] + terms["loss_dice"]
        loss.backward()
        return loss.detach()
    return run


def make_run(args, compiled=False):
    if args.mode == "masks":
        return mask_run(args)
    if args.mode == "loss":
        return loss_run(args, lambda *tensors: losses.set_loss(*tensors)["loss"])
    model = make_model(args).train(args.mode == "step")
    images, valid, targets = make_batch(args, model.cfg.num_classes)
    network = torch.compile(model) if compiled else model
    if args.mode == "step":
        return step_run(args, model, network, (images, valid, targets))

    @torch.inference_mode()
    def run():
        with autocast(args.device, getattr(torch, args.dtype)):
            _, boxes, *_ = network(*data.to_device(images, valid, args.device))
        return boxes[-1]
    return run


def step_run(args, model, network, batch, task=train.DETECTION, loss_cfg=losses.LossConfig()):
    """The step of train.py; network is the model, compiled or not."""
    cfg = train.TrainConfig()
    normalizers = losses.loss_normalizers(batch[2], getattr(model.cfg, "num_queries", 1))
    run = SimpleNamespace(                                  # the fields of a Run that a step reads
        cfg=cfg, model_cfg=model.cfg, loss_cfg=loss_cfg, task=task, model=network, world=1,
        optimizer=train.build_optimizer(model, cfg), device=args.device,
        dtype=getattr(torch, args.dtype), class_weights=None)
    return lambda: train.train_step(run, [batch], normalizers, 0)


# -- the same work, weights and numbers by the official code -------------------------------------

def import_official(folder, name):
    """A module of the official code; nothing is downloaded."""
    if not os.path.isdir(os.path.join(folder, "models")):
        raise UserError(f"{folder}/models not found: --official takes a clone of "
                        f"github.com/facebookresearch/detr")
    sys.path.insert(0, folder)
    warnings.filterwarnings("ignore", module="torchvision|util|models")
    try:
        importlib.import_module("util.misc").is_main_process = lambda: False    # no ImageNet file
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:            # RuntimeError: torchvision's operators
        raise UserError(f"--official: {error}; install packaging, and the torchvision that was "
                        f"built for torch {torch.__version__}") from None


def official_run(args):
    if args.mode == "masks":
        return official_mask_run(args)
    cfg, dtype = MODELS[args.model], getattr(torch, args.dtype)
    options = SimpleNamespace(**asdict(cfg), **asdict(losses.LossConfig()), lr_backbone=1e-5,
                              dataset_file="coco", device=args.device)
    network, criterion, _ = import_official(args.official, "models").build_model(options)

    def total_loss(logits, boxes, targets):                 # of all layers, the last one last
        targets = [{k: v.to(args.device) for k, v in t.items()} for t in targets]
        *others, last = [dict(pred_logits=x.float(), pred_boxes=b.float())
                         for x, b in zip(logits, boxes)]
        terms = criterion({**last, "aux_outputs": others}, targets)
        return sum(terms[k] * weight for k, weight in criterion.weight_dict.items())
    if args.mode == "loss":
        return loss_run(args, total_loss)

    network.load_state_dict(make_model(args).state_dict())
    network.to(args.device).train(args.mode == "step")
    images, valid, targets = make_batch(args, cfg.num_classes)
    images = resnet.Normalise()(images, None).contiguous()          # the work of its loader
    batch = import_official(args.official, "util.misc").NestedTensor(images, ~valid)

    def forward():
        with autocast(args.device, dtype):
            return network(batch.to(args.device))
    if args.mode == "forward":
        return torch.no_grad()(lambda: forward()["pred_boxes"].float())

    backbone = [p for n, p in network.named_parameters() if "backbone" in n and p.requires_grad]
    others = [p for n, p in network.named_parameters() if "backbone" not in n]
    optimizer = torch.optim.AdamW([dict(params=others), dict(params=backbone, lr=1e-5)], lr=1e-4,
                                  weight_decay=1e-4)

    def step():
        outputs = forward()
        layers = [*outputs["aux_outputs"], outputs]
        loss = total_loss([layer["pred_logits"] for layer in layers],
                          [layer["pred_boxes"] for layer in layers], targets)
        assert loss.isfinite().item()                               # its loop reads every loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    return step


# -- forward, step, loss: the comparison ---------------------------------------------------------

def variants(args):
    """{name: (function that builds its run, levers that are off)}, ours first."""
    builders = {"ours": (make_run, ())}
    if args.each:
        for lever, (modes, *_) in LEVERS.items():
            if args.mode in modes:
                builders[f"without {lever}"] = make_run, (lever,)
    elif args.without:
        builders["without " + " ".join(args.without)] = make_run, tuple(args.without)
    if args.compile:
        builders["compiled"] = lambda args: make_run(args, compiled=True), ()
    if args.official:
        builders["official"] = official_run, ()
    return builders


def bench_model(args):
    """forward, step and loss."""
    builders = variants(args)
    if args.child:
        build, off = builders[args.child[0]]
        if args.official:
            import_official(args.official, "models")        # torchvision is no part of its memory
        with without_levers(off):
            return peak_memory(lambda: build(args), args.device)

    runs = {}
    for name, (build, off) in builders.items():
        with without_levers(off):
            runs[name] = build(args), off
    result = summary(time_interleaved(runs, args), args.batch_size)

    run, _ = runs["ours"]
    result["host_syncs"] = count_syncs(run)
    if args.memory:
        result["memory_mb"] = {name: in_child(name) for name in runs}
    if args.mode != "loss":
        result["tflops"] = round(count_flops(run) / result["seconds"]["ours"]["median"] / 1e12, 6)
    if args.official and args.mode != "step":               # of the loss, or the largest of a box
        result["difference"] = (run() - runs["official"][0]()).abs().max().item()
    return result


# -- data ----------------------------------------------------------------------------------------

def padding_share(dataset, batches):
    """Share of the pixels of these batches of keys that is padding."""
    image = padded = 0
    for keys in batches:
        sizes = np.array([dataset.size_of(*key) for key in keys])
        image += sizes.prod(1).sum()
        padded += len(keys) * sizes.max(0).prod()
    return round(float(1 - image / padded), 4)


def bench_loader(args):
    """Images/s of the loader, per process, and the padding of an epoch's batches."""
    dataset = data.CocoDataset(*data.data_paths(args, "train"), augment=True)
    grouped, ungrouped = (data.TrainSampler(dataset, args.batch_size, 42, group_by_shape=group)
                          for group in (True, False))
    batches = list(grouped)[:max(1, (args.images or 64) // args.batch_size)]

    def run():
        for _ in DataLoader(dataset, batch_sampler=batches, collate_fn=data.collate,
                            num_workers=args.num_workers):
            pass
    runs = {name: (run, off) for name, (_, off) in variants(args).items()}
    return {"padding": padding_share(dataset, grouped),
            "padding_without_grouping": padding_share(dataset, ungrouped),
            **summary(time_interleaved(runs, args), len(batches) * args.batch_size)}


# -- mixers --------------------------------------------------------------------------------------

GRIDS = (25, 34), (34, 50), (50, 68)                # 850, 1700 and 3400 tokens


def make_encoder_run(name, args):
    """Forward and backward pass of an encoder; name: mixer and grid, as in "pool 25 34"."""
    mixer, H, W = name.split()
    H, W, cfg = int(H), int(W), MODELS[args.model]
    # with dropout a CPU's attention keeps the whole matrix of weights
    cfg = replace(cfg, mixer=mixer, dropout=0.0, grid_rows=max(H, cfg.grid_rows),
                  grid_cols=max(W, cfg.grid_cols))
    encoder = Encoder(cfg).to(args.device)
    x = torch.randn(args.batch_size, H * W, cfg.hidden_dim, device=args.device, requires_grad=True)
    pos = torch.randn(1, H * W, cfg.hidden_dim, device=args.device)

    def run():
        encoder.zero_grad()
        with autocast(args.device, getattr(torch, args.dtype)):
            y = encoder(x, pos, None, (H, W))
        y.float().sum().backward()
    return run


def bench_mixers(args):
    """Time and memory of the encoder by mixer and number of tokens."""
    if args.child:
        return peak_memory(lambda: make_encoder_run(args.child[0], args), args.device)
    names = [f"{mixer} {H} {W}" for mixer in args.mixers for H, W in GRIDS]
    times = time_interleaved({name: (make_encoder_run(name, args), ()) for name in names}, args)
    rows = []
    for name, seconds in summary(times, args.batch_size)["seconds"].items():
        mixer, H, W = name.split()
        rows.append(dict(mixer=mixer, tokens=int(H) * int(W), **seconds, memory_mb=in_child(name)))
    if args.plot:
        from plot import plot_mixers                        # needs matplotlib
        plot_mixers(rows, args.plot)
    return {"rows": rows}


# -- evaluator -----------------------------------------------------------------------------------

OURS, PEERS = ("columns", "files"), ("pycocotools", "faster_coco_eval", "hotcoco")


def make_columns(num_detections, num_images, num_classes):
    """Arrays for evaluate_columns; 1 detection in 5 is a noisy copy of a ground truth."""
    rng = np.random.default_rng(0)
    n, G = num_detections, 7 * num_images + 3                       # COCO has 7.3 an image

    def boxes(n):
        sizes = 500 * rng.random((n, 2)) ** 3 + 4                   # most are small
        return np.concatenate([rng.random((n, 2)) * 600, sizes], axis=1)

    image, category = rng.integers(0, num_images, G), num_classes * rng.random(G) ** 3
    gt = dict(image=image, category=category.astype(int), box=boxes(G).round(2))
    gt.update(area=gt["box"][:, 2:].prod(1), crowd=np.arange(G) % 100 == 0)

    copied, source = rng.random(n) < 0.2, rng.integers(0, G, n)
    noise = 0.1 * rng.normal(size=(n, 4)) * np.tile(gt["box"][source, 2:], 2)
    image = np.where(copied, gt["image"][source], rng.integers(0, num_images, n))
    box = np.where(copied[:, None], gt["box"][source] + noise, boxes(n))
    score = rng.random(n).round(3) * np.where(copied, 1, 0.6)
    return gt, dict(image=image, category=gt["category"][source], box=abs(box).round(2),
                    score=score)


def to_coco(gt, dt, num_images, num_classes):
    """The same as the contents of COCO files."""
    def records(columns):
        rows = zip(*(columns[name].tolist() for name in ("image", "category", "box")))
        return [dict(image_id=i, category_id=k + 1, bbox=box) for i, k, box in rows]

    annotations, detections = records(gt), records(dt)
    for n, record in enumerate(annotations):
        record.update(id=n + 1, area=gt["area"][n].item(), iscrowd=int(gt["crowd"][n]))
    for record, score in zip(detections, dt["score"].tolist()):
        record["score"] = score
    images = [dict(id=i, width=1100, height=1100) for i in range(num_images)]
    categories = [dict(id=k + 1, name=f"class {k + 1}") for k in range(num_classes)]
    return dict(images=images, categories=categories, annotations=annotations), detections


def run_evaluator(name, paths, shape):
    """One evaluation: CPU seconds to read and to evaluate, its memory, and AP."""
    if name == "columns":                                           # as a training run has them
        columns = make_columns(*shape)
    if name in OURS:
        from coco_eval import coco_eval, evaluate_columns
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
        stats = evaluate_columns(*columns, shape[2])["stats"]
    elif name == "files":
        stats = coco_eval(*paths)["stats"]
    else:
        truth = COCO(paths[0])
        evaluation = COCOeval(truth, truth.loadRes(paths[1]), "bbox")
        read = time.process_time()
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = evaluation.stats
    end = time.process_time()
    return dict(read_s=read - start, evaluate_s=end - read, total_s=end - start,
                memory_mb=peak_mb() - before, AP=float(stats[0]))


def bench_evaluator(args):
    """Medians over the repeats, of ours and with --peers of each peer that is installed."""
    shape = args.detections, args.images or 5000, 80
    if args.child:
        name, folder = args.child
        return run_evaluator(name, [f"{folder}/gt.json", f"{folder}/dt.json"], shape)
    names = list(OURS)
    if args.peers:
        names += [name for name in PEERS if importlib.util.find_spec(name)]
    runs = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for side, content in zip(("gt", "dt"), to_coco(*make_columns(*shape), *shape[1:])):
            with open(f"{folder}/{side}.json", "w") as file:
                json.dump(content, file)
        for _ in range(args.repeats):
            for name in names:
                runs[name].append(in_child(name, folder))
    return {name: {field: round(statistics.median(r[field] for r in records), 4)
                   for field in records[0]} for name, records in runs.items()}


# -- sizes ---------------------------------------------------------------------------------------

# parameters in M, multiply-adds in G at 224 x 224 and top-1 in percent, as the papers print them;
# of ResNets the PoolFormer paper, Table 2: trained by the recipe of arXiv:2110.00476
PUBLISHED = {
    "poolformer_s12": "11.9 1.8 77.2",              "poolformer_s24": "21.4 3.4 80.3",
    "poolformer_s36": "30.8 5.0 81.4",              "poolformer_m36": "56.1 8.8 82.1",
    "poolformer_m48": "73.4 11.6 82.5",             "riformer_s12": "12 1.8 76.9",
    "riformer_s24": "21 3.4 80.3",                  "riformer_s36": "31 5.0 81.3",
    "riformer_m36": "56 8.8 82.6",                  "riformer_m48": "73 11.6 82.8",
    "poolformer_s12_identity": "11.9 1.8 74.3",
    "poolformer_s12_random": "11.9 3.3 75.8",       "poolformer_s12_conv": "11.9 1.8 78.1",
    "poolformer_s12_pool5": "11.9 1.8 77.2",        "poolformer_s12_pool7": "11.9 1.8 77.1",
    "poolformer_s12_pool9": "11.9 1.8 76.8",        "poolformer_s12_layernorm": "11.9 1.8 76.5",
    "poolformer_s12_batchnorm": "11.9 1.8 76.4",    "poolformer_s12_nonorm": "11.9 1.8 46.1",
    "poolformer_s12_relu": "11.9 1.8 76.4",         "poolformer_s12_silu": "11.9 1.8 77.2",
    "poolformer_s12_noresidual": "11.9 1.8 0.1",    "poolformer_s12_nomlp": "2.5 0.2 5.7",
    "poolformer_s12_pppa": "14.0 1.9 78.3",         "poolformer_s12_ppaa": "16.5 2.5 81.0",
    "poolformer_s12_pppf": "11.9 1.8 77.5",         "poolformer_s12_ppff": "12.2 1.9 77.9",
    "identityformer_s12": "11.9 1.8 74.6",          "identityformer_s24": "21.3 3.4 78.2",
    "identityformer_s36": "30.8 5.0 79.3",          "identityformer_m36": "56.1 8.8 80.0",
    "identityformer_m48": "73.3 11.5 80.4",         "randformer_s12": "11.9 1.9 76.6",
    "randformer_s24": "21.3 3.5 78.2",              "randformer_s36": "30.8 5.2 79.5",
    "randformer_m36": "56.1 9.0 81.2",              "randformer_m48": "73.3 11.9 81.4",
    "poolformerv2_s12": "11.9 1.8 78.0",            "poolformerv2_s24": "21.3 3.4 80.7",
    "poolformerv2_s36": "30.8 5.0 81.6",            "poolformerv2_m36": "56.1 8.8 82.2",
    "poolformerv2_m48": "73.3 11.5 82.6",           "convformer_s18": "27 3.9 83.0",
    "convformer_s36": "40 7.6 84.1",                "convformer_m36": "57 12.8 84.5",
    "convformer_b36": "100 22.6 84.8",              "caformer_s18": "26 4.1 83.6",
    "caformer_s36": "39 8.0 84.5",                  "caformer_m36": "56 13.2 85.2",
    "caformer_b36": "99 23.2 85.5",                 "vit_ti": "5 - 72.2",
    "vit_s": "22 4.6 79.9",                         "vit_b": "86 17.6 81.8",
    "vit_ti16": "- - -",                            "vit_s32": "- - -",
    "vit_s16": "- - -",                             "vit_b32": "- - -",
    "vit_b16": "86 17.6 -",                         "vit_l16": "307 63.6 -",
    "mixer_s32": "19 - -",                          "mixer_s16": "18 - -",
    "mixer_b32": "60 - -",                          "mixer_b16": "59 12.7 76.4",
    "mixer_l32": "206 - -",                         "mixer_l16": "207 - -",
    "resnet18": "12 1.8 70.6",                      "resnet34": "22 3.7 75.5",
    "resnet50": "26 4.1 79.8"}


class ResNetClassifier(resnet.ResNet):
    """DETR's backbone with a linear layer over the mean of its map (arXiv:1512.03385)."""

    def __init__(self, name):
        super().__init__(ModelConfig(backbone=name, backbone_norm="batch"))
        self.normalise, self.head = resnet.Normalise(), nn.Linear(self.num_channels, 1000)
        self.cfg = metaformer.MetaFormerConfig()            # of which a step reads num_classes

    def forward(self, images, valid=None):
        x, _ = super().forward(self.normalise(images, valid))
        return self.head(x.mean((2, 3)))


def build_classifier(name):
    """A model of PUBLISHED."""
    return ResNetClassifier(name) if name in resnet.RESNETS else build_model(name)


def count_sizes(name):
    """Parameters and multiply-adds of a classifier at 224 x 224: dicts of every way to count them.

    The PoolFormer paper's sizes leave LayerScale out, its ablations do not; and it counts 5 per
    element for a group norm, as fvcore does. The follow-up paper counts no norms. No memory is
    allocated: the tensors are on the meta device.
    """
    with torch.device("meta"):
        model, images = build_classifier(name).eval(), torch.zeros(1, 3, 224, 224)
    named = {k: p.numel() for k, p in model.named_parameters() if p.requires_grad}
    norms = []
    for module in model.modules():
        if isinstance(module, TokenGroupNorm):
            module.register_forward_hook(lambda m, args, y: norms.append(5 * y.numel()))
    macs = count_flops(lambda: model(images)) // 2
    return ({"": sum(named.values()),
             "fused": sum(n for k, n in named.items() if ".affine." not in k),
             "no LayerScale": sum(n for k, n in named.items() if "layer_scale" not in k)},
            {"": macs, "with norms": macs + sum(norms)})


def how_counted(printed, ways, unit):
    """Which way of counting reproduces the published figure ("DIFFERS" if none does)."""
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
    for name, published in PUBLISHED.items():
        (params, macs, top1), (p, m) = published.split(), count_sizes(name)
        note_p, note_m = how_counted(params, p, 1e6), how_counted(macs, m, 1e9)
        print(f"{name:25s} {p['']:11,d} {params:>11s}  {note_p:13s} {m[''] / 1e9:11.3f} "
              f"{macs:>9s}  {note_m:10s} {top1:>15s}")


def bench_sizes(args):
    """Sizes of the classifiers; sizes and speed of the DETRs (eval mode, batch 1), as tables."""
    print_classifiers()
    print(f"\n{'model':14s} {'mixer':10s} {'image':>9s} {'parameters':>11s} {'trained':>11s} "
          f"{'G mult-adds':>11s} {'images/s':>9s}   ({args.device}, {torch.get_num_threads()} "
          f"threads)")
    rows = [(name, "attention") for name in DETECTORS]
    rows += [(name, mixer) for name in ("detr_tiny", "detr_r50")
             for mixer in MIXERS if mixer != "attention"]
    for name, mixer in rows:
        model = build_model(name, mixer=mixer).eval()
        model = model.to(args.device, memory_format=torch.channels_last)
        h, w = (64, 64) if name.endswith("_tiny") else (args.height or 480, args.width or 640)
        images = torch.randint(256, (1, 3, h, w), dtype=torch.uint8, device=args.device)
        run = torch.inference_mode()(lambda: model(images))
        macs = count_flops(run) // 2
        seconds = statistics.median(seconds_of(run, args.device) for _ in range(args.repeats))
        parameters = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        print(f"{name:14s} {mixer:10s} {f'{h}x{w}':>9s} {sum(parameters):11,d} {sum(trained):11,d} "
              f"{macs / 1e9:11.3f} {1 / seconds:9.2f}")


# -- classifiers ---------------------------------------------------------------------------------

CLASSIFIERS = "poolformer_s12", "riformer_s12", "resnet18", "vit_s", "mixer_s16"


def classifier_run(name, args):
    """A forward pass or, if args.mode is "step", a training step, without mixup and CutMix."""
    torch.manual_seed(0)
    model = build_classifier(name).train(args.mode == "step")
    if name.startswith("riformer") and args.mode == "forward":
        metaformer.fuse(model)
    model = model.to(args.device, memory_format=torch.channels_last)
    images = torch.randint(256, (args.batch_size, 3, 224, 224), dtype=torch.uint8)
    if args.mode == "step":
        targets = [{"labels": torch.tensor([k % 1000])} for k in range(args.batch_size)]
        batch = images, torch.ones(args.batch_size, 224, 224, dtype=torch.bool), targets
        loss_cfg = ClassLossConfig(mixup=0, cutmix=0)       # which need an even number of images
        return step_run(args, model, model, batch, train.CLASSIFICATION, loss_cfg)

    @torch.inference_mode()
    def run():
        with autocast(args.device, getattr(torch, args.dtype)):
            return model(images.to(args.device))
    return run


def bench_classifiers(args):
    """Time, and with --memory peak memory, of classifiers beside each other."""
    if args.child:
        args.mode, name = args.child[0].split()
        return peak_memory(lambda: classifier_run(name, args), args.device)
    if args.plot:                                           # what can go wrong goes wrong now
        from plot import plot_classifiers                   # needs matplotlib
        check_output("--plot", args.plot)
        if "forward" not in args.passes:
            raise UserError("--plot draws the forward pass, which --passes leaves out")

    result = {"published_top1": {}, "multiply_adds": {}}
    for name in args.classifiers:
        top1 = PUBLISHED[name].split()[2]
        result["published_top1"][name] = None if top1 == "-" else float(top1)
        result["multiply_adds"][name] = count_sizes(name)[1][""]

    for mode in args.passes:
        args.mode = mode                                    # of which TF32 depends, too
        runs = {name: (classifier_run(name, args), ()) for name in args.classifiers}
        result[mode] = summary(time_interleaved(runs, args), args.batch_size)
        del runs                                            # before those of the other pass
        if args.memory:
            result[mode]["memory_mb"] = {name: in_child(f"{mode} {name}")
                                         for name in args.classifiers}
    if args.plot:
        plot_classifiers(result, args.plot)
    return result


# -- command line --------------------------------------------------------------------------------

MODES = {"forward": bench_model, "loss": bench_model, "masks": bench_model, "step": bench_model,
         "loader": bench_loader, "mixers": bench_mixers, "evaluator": bench_evaluator,
         "sizes": bench_sizes, "classifiers": bench_classifiers}


def options():
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--repeats", type=int, default=7)
    add("--model", default="detr_r50", choices=DETECTORS)
    add("--mixer", default="", choices=["", *MIXERS])
    add("--batch_size", type=int, default=2)
    add("--height", type=int, help="of images; default 320, sizes: 480")
    add("--width", type=int, help="of images; default 320, sizes: 640")
    add("--objects", type=int, default=7, help="targets of each image")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--without", nargs="+", default=[], choices=LEVERS, metavar="LEVER",
        help=f"compare with ours without these, of {', '.join(LEVERS)}")
    add("--each", action="store_true", help="compare with ours without one lever at a time")
    add("--compile", action="store_true", help="compare with ours under torch.compile")
    add("--official", default="", help="compare with this clone of facebookresearch/detr")
    add("--memory", action="store_true", help="measure peak memory, in processes of their own")
    add("--data", default="data/coco", help="loader: a folder in COCO's layout")
    add("--num_workers", type=int, default=0, help="loader: its processes")
    add("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS, help="mixers: which")
    add("--classifiers", nargs="+", default=[n for n in CLASSIFIERS if n in PUBLISHED],
        choices=PUBLISHED, metavar="NAME", help="classifiers: which of those that sizes prints; "
        "default: %(default)s")
    add("--passes", nargs="+", default=["forward", "step"], choices=["forward", "step"],
        help="classifiers: a forward pass, a training step, or both")
    add("--plot", default="", help="mixers, classifiers: a picture, .png or .svg")
    add("--detections", type=int, default=500_000, help="evaluator: how many")
    add("--images", type=int, default=0, help="evaluator: default 5000; loader: 64")
    add("--peers", action="store_true", help="evaluator: compare with others that are installed")
    add("--child", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main():
    parser = options()
    args = parser.parse_args()
    if (args.official or args.compile) and MODES[args.mode] is not bench_model:
        parser.error(f"--official and --compile do not go with {args.mode}")
    try:
        result = MODES[args.mode](args)
    except UserError as error:
        parser.error(str(error))
    if args.mode == "sizes":                                # has printed its tables
        return
    if not args.child:
        result = {"command": " ".join(sys.argv[1:]), "device": args.device,
                  "threads": torch.get_num_threads(), **result}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
