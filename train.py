"""Training of DETR and of the MetaFormer classifiers, on one process or many.

    python train.py                                           # built-in shapes, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --mixer pool         # GPUs (nccl) or CPU (gloo)
    python train.py --data coco --model detr_r50              # annotations/, train2017/, val2017/
    python train.py --train_json A --train_images DIR --val_json B --val_images DIR
    python train.py --model poolformer_s12 --data DIR         # DIR/{train,val}/<class>/*.jpg
    python train.py --model metaformer_tiny --mixers pool     # a classifier of built-in shapes
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

The same command goes on from the checkpoint in --output_dir. Papers: DETR, arXiv:2005.12872;
MetaFormer, arXiv:2111.11418.
"""

import itertools
import math
import os
import random
import re
import signal
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from resnet import RESNETS
from metaformer import MetaFormer, MetaFormerConfig
from classification import (ClassLossConfig, ImageFolder, ShapesClassification, classification_loss,
                            mix)
from data import (CocoDataset, EvalSampler, ShapesDataset, TrainSampler, coco_paths, collate,
                  to_device)
from checkpoint import (check_output_dir, cut_log, find_resume, load_backbone, load_weights,
                        read_checkpoint, save_checkpoint)
from model import ModelConfig, build_model
from losses import LossConfig, loss_counts, set_loss
from config import TrainConfig, make_configs, read_options
from evaluate import evaluate
from report import (append_json, clock, draw_batch, draw_predictions, epoch_record,
                    evaluation_report, interval_line, memory_gb)

OVERFIT_REPEATS = 100                              # passes over the N images in its epochs


# -- processes -----------------------------------------------------------------------------------

def start_processes(device):
    """(rank, world, device) of this process, from torchrun's environment; else (0, 1, device).

    Small things travel between the processes as CPU tensors over gloo, gradients on GPUs over nccl.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU, "
                             f"{torch.cuda.device_count()} visible: start fewer, or --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):         # all on this machine
            # torchrun keeps the store, and in it the addresses of processes before a restart
            # (pytorch issue 135712); machines may count their restarts differently
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", store=store,
                                rank=rank, world_size=world)
    return rank, world, device


def sum_over_processes(tensor):
    """The sum of a CPU tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# -- data, model, optimizer ----------------------------------------------------------------------

def data_paths(cfg, split):
    """Annotation file and image folder of the split, "train" or "val"."""
    if not cfg.data:
        return getattr(cfg, f"{split}_json"), getattr(cfg, f"{split}_images")
    if not os.path.isdir(os.path.join(cfg.data, "annotations")):
        raise FileNotFoundError(
            f"--data {cfg.data} should hold annotations/instances_train2017.json and "
            f"instances_val2017.json, train2017/ and val2017/; for another layout give "
            f"--train_json, --train_images, --val_json and --val_images; for class folders give "
            f"a classifier, as --model poolformer_s12; no COCO at hand? leave --data out for the "
            f"built-in shapes")
    return coco_paths(cfg.data, split)


def build_datasets(cfg, model_cfg):
    """Training and validation set; with --overfit both of the same N training images."""
    def build(split, augment=False, classes=None):
        if cfg.kind == "folder":
            return ImageFolder(cfg.data, split, cfg.image_size, model_cfg.crop_fraction, augment,
                               cfg.seed, classes)
        if cfg.kind != "coco":
            n = cfg.train_shapes if split == "train" else cfg.val_shapes
            shapes = ShapesDataset if cfg.kind == "shapes" else ShapesClassification
            return shapes(split, n, cfg.image_size, augment, cfg.seed)
        return CocoDataset(*data_paths(cfg, split), cfg.image_size, cfg.max_size, augment, cfg.seed,
                           classes)
    train = build("train", cfg.augment)
    if cfg.overfit:
        return train.keep(cfg.overfit, OVERFIT_REPEATS), build("train").keep(cfg.overfit)
    val = build("val", classes=train.classes)
    if cfg.kind == "coco" and not len(train.boxes):
        raise ValueError(f"{train.json_path} has no annotations, there is nothing to learn")
    if cfg.kind == "coco" and val.missing:
        raise ValueError(f"{val.json_path} lacks categories that {train.json_path} has: "
                         f"{val.missing[:20]}; both must list the same ones")
    return train, val


def build_loaders(cfg, train, val, rank, world, device):
    """Loaders of this process for training and validation."""
    workers = cfg.num_workers
    if workers < 0:                                # the cores of a process, less one for itself
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, max(0, (os.cpu_count() or 1) // local - 1))
    options = dict(collate_fn=collate, num_workers=workers, pin_memory="cuda" in device,
                   persistent_workers=workers > 0, worker_init_fn=leave_group)
    sampler = TrainSampler(train, cfg.batch_size, cfg.seed, rank, world, cfg.accumulate,
                           cfg.group_by_shape)
    val_sampler = EvalSampler(val, cfg.eval_batch_size, rank, world)
    return (DataLoader(train, batch_sampler=sampler, **options),
            DataLoader(val, batch_sampler=val_sampler, **options))


def leave_group(worker):
    """Ctrl-C, torchrun and `timeout` signal the whole process group, loader workers too, which die
    of SIGTERM before anything is saved; the training process alone decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):                     # not on Windows
        os.setpgrp()


def build_optimizer(model, cfg):
    """AdamW with two groups of parameters, each with its learning rate under "base_lr".

    Of a detector the second is the backbone, with a learning rate of its own; of a classifier
    biases, norms, scales and positions, without weight decay.
    """
    groups = [dict(params=[], lr=cfg.lr, base_lr=cfg.lr, weight_decay=cfg.weight_decay)
              for _ in range(2)]
    if isinstance(model, MetaFormer):
        groups[1].update(weight_decay=0.0)
    else:
        groups[1].update(lr=cfg.lr_backbone, base_lr=cfg.lr_backbone)
    for name, p in model.named_parameters():
        second = "backbone" in name
        if isinstance(model, MetaFormer):
            second = p.dim() < 2 or name.endswith((".b2", "pos_embed", "cls_token"))
        if "backbone" in name and not cfg.lr_backbone:
            p.requires_grad_(False)
        if p.requires_grad:
            groups[second]["params"].append(p)
    return torch.optim.AdamW(groups, fused=True)


def lr_factor(cfg, step, steps_per_epoch):
    """Learning rate at an optimizer step (from 0), as a factor: a pure function of the step."""
    warmup_steps = cfg.warmup_steps or cfg.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if cfg.schedule == "step":
        return warmup * 0.1 ** (step // steps_per_epoch // cfg.lr_drop)
    least = min(1.0, cfg.min_lr / cfg.lr) if cfg.lr else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / (cfg.epochs * steps_per_epoch)))
    return warmup * (least + (1 - least) * cosine)


# -- training ------------------------------------------------------------------------------------

def detector_losses(model, part, counts, configs, at, autocast):
    """The losses of one part of a step."""
    images, valid, targets = part
    with autocast:
        logits, boxes = model(images, valid)
    return set_loss(logits, boxes, targets, configs[1], counts)


def classifier_losses(model, part, counts, configs, at, autocast):
    """The losses of one part of step `at`, which alone says how images are mixed."""
    (images, valid, targets), (model_cfg, loss_cfg, cfg) = part, configs
    labels = torch.cat([t["labels"] for t in targets]).to(images.device)
    images, labels = mix(images, labels, model_cfg.num_classes, random.Random(f"{cfg.seed} {at}"),
                         loss_cfg.mixup, loss_cfg.cutmix)
    with autocast:
        logits = model(images, valid)
    return classification_loss(logits, labels, loss_cfg.smoothing, counts)


def train_step(model, optimizer, parts, counts, configs, at, device, dtype):
    """Optimizer step `at` on this process's parts; returns their losses, summed and detached.

    counts: loss_counts of the whole step per process. As every part is divided by them, gradients
    add up to those of the whole batch, however it is split over parts and processes. From the first
    step on whose loss or gradient is not finite the weights stay as they are; "lost" counts those
    steps, so that the host can see it when it next waits for the device.
    """
    totals = add_gradients(model, parts, counts, configs, at, device, dtype)
    limit = configs[2].clip_max_norm or math.inf
    norm = totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    lost = getattr(optimizer, "found_inf", torch.zeros_like(norm))
    lost = lost.maximum((~(totals["loss"] + norm).isfinite()).float())
    optimizer.found_inf = lost                     # the fused optimizer does nothing where it is 1
    optimizer.step()
    return {**totals, "lost": lost}


def add_gradients(model, parts, counts, configs, at, device, dtype):
    """Forward and backward of all parts; returns their losses, summed and detached."""
    classifier = isinstance(configs[0], MetaFormerConfig)
    part_losses = classifier_losses if classifier else detector_losses
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    totals = {}
    for k, (images, valid, targets) in enumerate(parts):
        last = k == len(parts) - 1
        part = *to_device(images, valid, device), targets
        with model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext():
            losses = part_losses(model, part, counts, configs, at, autocast)
            if k == 0:
                model.zero_grad()                  # only now: backward takes up this memory at once
            losses["loss"].backward()
        for name, value in losses.items():
            share = 1 if name.startswith("loss") else 1 / len(parts)      # the errors are means
            totals[name] = totals.get(name, 0) + share * value.detach()
    return totals


def seed_step(cfg, at, rank, world):
    """Dropout and stochastic depth of step `at` depend on nothing before it."""
    torch.manual_seed((cfg.seed * 1_000_003 + at) * world + rank)


# -- when a step fails ---------------------------------------------------------------------------

# what a step is made of, besides its number
Run = namedtuple("Run", "model loader configs rank world device dtype")


def name_step(run, at, parts):
    """Where the run is, as the terminal counts, and the ids of the images at hand."""
    dataset, (epoch, step) = run.loader.dataset, divmod(at, run.loader.batch_sampler.steps)
    index = [t["index"] for *_, targets in parts for t in targets]
    ids = [os.fsdecode(i) if isinstance(i, bytes) else i
           for i in np.asarray(dataset.image_ids)[index].tolist()]
    return f"epoch {epoch + 1}, step {step + 1}, rank {run.rank}, images {ids}", ids


def last_saved(cfg):
    """What a message can promise of the last checkpoint."""
    path = os.path.join(cfg.output_dir, "ckpt.pt")
    return f"{path} is as it was" if os.path.exists(path) else "nothing was saved yet"


def out_of_memory(error):
    """Whether it is that, of a GPU or of the system."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain(error, run, at, parts):
    """A ValueError that says what can be said of an error in step `at`; others are raised again."""
    text, cfg = str(error), run.configs[2]
    where, _ = name_step(run, at, parts)
    if out_of_memory(error):
        shapes = [tuple(images.shape) for images, *_ in parts]
        objects = sum(len(t["labels"]) for *_, targets in parts for t in targets)
        sizes = "--max_size" if isinstance(run.configs[0], ModelConfig) else "--image_size"
        return ValueError(
            f"{where}: out of memory with images of {shapes} and {objects} objects "
            f"({text.splitlines()[0]}). A larger --accumulate splits the step into smaller parts; "
            f"a smaller {sizes}{' or --dtype bfloat16' * (run.dtype == torch.float32)} needs less; "
            f"{last_saved(cfg)}")
    if isinstance(error, ValueError):
        return explain_not_finite(run, at, text) if "finite" in text else ValueError(
            f"{where}: {text}")
    raise error


def explain_not_finite(run, at, text):
    """Repeats step `at` alone, with the weights before it, and writes its batch and those weights
    to nan_batch.pt; returns the ValueError that names the first place that is not finite."""
    if dist.is_initialized():
        dist.destroy_process_group()               # the other processes may not come along
    (model_cfg, _, cfg), sampler = run.configs, run.loader.batch_sampler
    sampler.set_epoch(*divmod(at, sampler.steps))
    keys = itertools.islice(sampler, cfg.accumulate)
    parts = [collate([run.loader.dataset[key] for key in part]) for part in keys]
    counts = sum(loss_counts(targets, getattr(model_cfg, "num_queries", 1))
                 for *_, targets in parts)
    losses, weights = {}, {k: v.clone() for k, v in run.model.state_dict().items()}

    def repeat():
        seed_step(cfg, at, run.rank, run.world)
        losses.update(add_gradients(run.model, parts, counts, run.configs, at, run.device,
                                    run.dtype))
    place = find_not_finite(run.model.train(), repeat)
    where, ids = name_step(run, at, parts)
    if not place and run.world > 1:
        return ValueError(f"{where}: {text}, but not in this process's share: see the others")
    epoch, step = divmod(at, sampler.steps)
    terms = {k: v.item() for k, v in losses.items() if not k[-1].isdigit()}
    parts = [(*images, list(map(dict, targets))) for *images, targets in parts]      # plain data
    path = os.path.join(cfg.output_dir, f"nan_batch{f'_{run.rank}' if run.rank else ''}.pt")
    try:
        torch.save(dict(epoch=epoch, step=step, rank=run.rank, image_ids=ids, parts=parts,
                        losses=terms, place=place, model=weights), path)
        kept = f"batch and weights are in {path}"
    except (OSError, RuntimeError) as error:
        kept = f"{path} cannot be written ({error})"
    return ValueError(
        f"{where}: {text}\n  first not finite: {place or 'nothing, when the step was repeated'}"
        f"\n  losses of this process: {terms or 'none, as nothing could be matched'}\n  {kept}; "
        f"{last_saved(cfg)}\n  usual causes: --lr {cfg.lr} or --lr_backbone is too high for this "
        f"model, no --warmup_steps, no --clip_max_norm, or weights taken over that hold NaN")


def find_not_finite(model, compute):
    """The first place that is not finite while compute() runs the model forward and backward, by
    the name of its module; "" if there is none."""
    found = []

    def look(what, values):
        if not found and not all(v.isfinite().all() for v in values):
            found.append(what)

    def watch(name, module):
        def hook(module, inputs, output):
            output = output if isinstance(output, (tuple, list)) else [output]
            values = [v for v in output if torch.is_tensor(v) and v.is_floating_point()]
            look(f"the output of {name}", values)
            for v in values:
                if v.requires_grad:
                    v.register_hook(
                        lambda grad: look(f"the gradient at the output of {name}", [grad]))
        return module.register_forward_hook(hook)
    for name, p in model.named_parameters():
        look(f"the weights {name}", [p])
    hooks = [watch(name or "the model", module) for name, module in model.named_modules()]
    try:
        compute()
    except ValueError:                             # what cannot be matched has been looked at
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for name, p in model.named_parameters():
        look(f"the gradient of {name}", [] if p.grad is None else [p.grad])
    return found[0] if found else ""


# -- the run -------------------------------------------------------------------------------------

def prepare_model(model_cfg, cfg, state, classes, device, say):
    """The bare model with its first weights, what DDP or compile made of it, and its optimizer."""
    model = build_model(model_cfg)
    if state:
        if state["classes"] != classes:
            raise ValueError(f"the classes of the checkpoint are {state['classes'][:20]}, those of "
                             f"the data {classes[:20]}; --finetune starts with another head")
        model.load_state_dict(state["model"])
    elif cfg.finetune:
        source = read_checkpoint(cfg.finetune)
        if isinstance(source, dict) and source.get("classes", classes) != classes:
            source["model"] = {k: v for k, v in source["model"].items()
                               if "class_embed" not in k and not k.startswith("head.")}
        report = load_weights(model, source, strict=False)
        say(f"weights of {cfg.finetune}", *(report or ["all taken"]), sep="\n  ")
    elif cfg.backbone_weights != "none":
        report = load_backbone(model, cfg.backbone_weights)
        say(f"backbone weights {cfg.backbone_weights}", *(report or ["all taken"]), sep="\n  ")
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, cfg)
    if state:
        now = [{k: g[k] for k in ("base_lr", "weight_decay")} for g in optimizer.param_groups]
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise ValueError("--resume: the optimizer's state is of other trained tensors; "
                             "--lr_backbone cannot change between 0 and more, --finetune starts "
                             "anew") from None
        for group, options in zip(optimizer.param_groups, now):
            group.update(options)                  # as given now, not as in the file
    wrapped = torch.compile(model) if cfg.compile else model
    if dist.is_initialized():
        ids = [device] if "cuda" in device else None
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)
    return model, wrapped, optimizer


def describe_model(name, c, trained):
    """The banner's lines on a model of config c."""
    if isinstance(c, MetaFormerConfig):
        return [f"model    {name}, mixers {c.mixers}, {trained:,d} trained parameters"]
    norm = f", {c.backbone_norm} norm" if c.backbone in RESNETS else ""
    return [f"model    {name}, encoder {c.encoder_mixer or c.mixer}, decoder "
            f"{c.decoder_mixer or c.mixer}, {trained:,d} trained parameters",
            f"         {c.backbone}{norm}"]


def banner(cfg, model, train, val, loader, world, where):
    """What was decided, before the first step."""
    c, steps = model.cfg, loader.batch_sampler.steps
    detector = isinstance(c, ModelConfig)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    most = int(np.diff(train.offsets).max()) if detector else 1
    if cfg.kind == "coco":
        data = f"COCO files, {data_paths(cfg, 'train')[0]}"
    elif cfg.kind == "folder":
        data = f"class folders, {cfg.data}"
    else:
        why = "no --data, and no folder data/coco" if detector else "no --data"
        data = f"built-in {cfg.kind}, {cfg.image_size} pixels ({why})"
    if cfg.overfit:
        data += f"; --overfit: {len(val)} images, each {OVERFIT_REPEATS} times an epoch"
    lines = [
        f"data     {data}",
        f"         {len(train)} training and {len(val)} validation images, "
        f"{len(train.classes)} classes"
        f"{f', at most {most} objects in an image' if detector else ''}",
        *train.notes, *(() if cfg.kind == "coco" or cfg.overfit else val.notes),
        *describe_model(cfg.model, c, trained),
        f"run      {world} process(es) on {where}, {loader.num_workers} loader worker(s) each",
        f"         {cfg.epochs} epochs of {steps} steps of {cfg.batch_size} images",
        f"writes   {cfg.output_dir}/: ckpt.pt, best.pt, log.txt, steps.txt, first_batch.jpg, "
        f"predictions.jpg"]
    if detector and most > c.num_queries:
        lines.append(f"note     {most} objects in an image, but {c.num_queries} queries: the rest "
                     f"cannot be found, raise --num_queries")
    scratch = cfg.kind == "coco" and not cfg.finetune and not cfg.overfit
    if scratch and steps * cfg.epochs < 100_000:
        lines.append(f"note     {steps * cfg.epochs} steps; a DETR from scratch needs some "
                     f"300,000: think of --finetune with official weights")
    if cfg.kind == "folder" and steps * cfg.epochs < 10_000 and cfg.lr < 5e-4 and not cfg.finetune:
        lines.append(f"note     {steps * cfg.epochs} steps; PoolFormer's --lr and --warmup_epochs "
                     f"are for 375,000: think of --lr 1e-3 --warmup_epochs 1, or --finetune")
    return "\n".join(lines)


def catch_signals():
    """A dict whose "stop" becomes 1.0 on Ctrl-C or SIGTERM, and "code" 130 or 143, the shell's
    custom. A second Ctrl-C ends at once, and so does any while "safe": all is in the checkpoint."""
    flag = {"stop": 0.0, "code": 130, "safe": False}

    def handler(number, frame):
        first, flag["stop"], flag["code"] = not flag["stop"], 1.0, 128 + number
        if first and os.environ.get("RANK", "0") == "0":
            print("\nstopping; the same command goes on (Ctrl-C again: at once)", flush=True)
        if flag["safe"] or not first and number == signal.SIGINT:
            sys.exit(flag["code"])
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return flag


def choose_dtype(cfg, device):
    """The autocast's: bfloat16 where asked for, or on GPUs that have it natively."""
    native = "cuda" in device and torch.cuda.get_device_capability() >= (8, 0)
    use = native if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    return torch.bfloat16 if use else torch.float32


def train(model_cfg, loss_cfg, cfg, rank, world, device):
    """The whole run, gone on with where there is a checkpoint; returns the exit code."""
    def say(*args, **kwargs):
        if rank == 0:
            print(*args, **kwargs, flush=True)

    train_set, val_set = build_datasets(cfg, model_cfg)
    model_cfg = replace(model_cfg, num_classes=len(train_set.classes))
    configs = dict(model_config=asdict(model_cfg), loss_config=asdict(loss_cfg),
                   train_config=asdict(cfg))
    state = find_resume(cfg, configs)
    torch.manual_seed(cfg.seed)
    bare, model, optimizer = prepare_model(model_cfg, cfg, state, train_set.classes,
                                          device, say)
    train_loader, val_loader = build_loaders(cfg, train_set, val_set, rank, world, device)
    sampler, dtype = train_loader.batch_sampler, choose_dtype(cfg, device)
    mixed = isinstance(loss_cfg, ClassLossConfig) and (loss_cfg.mixup or loss_cfg.cutmix)
    if mixed and cfg.batch_size // sampler.parts % 2:
        raise ValueError(f"mixup and CutMix mix pairs: --batch_size {cfg.batch_size} over {world} "
                         f"processes and --accumulate {cfg.accumulate} must give an even number "
                         f"of images; or give --mixup 0 --cutmix 0")
    steps = sampler.steps
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    out = os.path.join(cfg.output_dir, "")
    if rank == 0:
        check_output_dir(out, bare)
    say(banner(cfg, bare, train_set, val_set, train_loader, world, f"{device}, {str(dtype)[6:]}"))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        say(f"restart  {os.environ['TORCHELASTIC_RESTART_COUNT']} of torchrun")

    # where the run is: `step` steps of `epoch` are done, their losses add up to `sums`
    epoch, step, sums, best_ap = 0, 0, {}, -1.0
    if state:
        epoch, step, sums, best_ap = (state[k] for k in ("epoch", "step", "sums", "best_ap"))
        say(f"resumed  at epoch {epoch + 1}, step {step}" if epoch < cfg.epochs else "resumed",
            *state["changed"], sep="\n         ")
    # a run that was killed before its first checkpoint has left steps.txt alone
    if rank == 0 and (state or not os.path.exists(out + "log.txt")):
        cut_log(out + "log.txt", epoch, step)
        cut_log(out + "steps.txt", epoch, step)
    at = epoch * steps + step
    if sum_over_processes(torch.tensor(at)) != world * at:
        raise ValueError(f"this process found the run at epoch {epoch + 1}, step {step} in {out}, "
                         f"others elsewhere: --output_dir must be a folder that all machines share")
    if epoch >= cfg.epochs:
        say(f"finished {epoch} epochs before; to train on: --resume {out}ckpt.pt --epochs N")

    damaged, saved = bool(state and state["damaged"]), time.time()

    def save(name="ckpt.pt", keep_previous=False):
        nonlocal damaged, saved
        if rank == 0:
            state = dict(
                format=1, **configs, classes=train_set.classes,
                category_ids=getattr(train_set, "category_ids", None), epoch=epoch, step=step,
                sums=sums, best_ap=best_ap, model=bare.state_dict(),
                optimizer=optimizer.state_dict())
            save_checkpoint(out + name, state, keep_previous and not damaged)
        damaged, saved = False, time.time()

    run = Run(bare, train_loader, (model_cfg, loss_cfg, cfg), rank, world, device, dtype)
    interrupt, begin, done = catch_signals(), time.time(), 0
    while epoch < cfg.epochs:
        sampler.set_epoch(epoch, step)
        batches, losses, count, waited, since = iter(train_loader), {}, 0, 0.0, time.time()
        model.train()
        stopping = False
        while step < steps:
            wait = time.time()
            parts = [next(batches) for _ in range(cfg.accumulate)]
            waited += time.time() - wait
            at = epoch * steps + step
            if rank == 0 and at == 0:
                draw_batch(*parts[0], train_set.classes).save(out + "first_batch.jpg")
            queries = getattr(model_cfg, "num_queries", 1)               # of a classifier
            counts = sum(loss_counts(targets, queries) for *_, targets in parts)
            due = bool(cfg.save_minutes) and time.time() - saved > 60 * cfg.save_minutes
            flags = torch.tensor([interrupt["stop"], float(due)])
            counts = sum_over_processes(torch.cat([counts, flags]))
            stopping, saving = counts[3] > 0, counts[4] > 0              # the same on all processes
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(cfg, at, steps)
            seed_step(cfg, at, rank, world)
            try:
                new = train_step(model, optimizer, parts, counts[:3] / world, run.configs, at,
                                 device, dtype)
            except (ValueError, RuntimeError) as error:
                raise explain(error, run, at, parts) from None
            losses = {k: losses.get(k, 0) + v.double() for k, v in new.items()}
            step, done, count = step + 1, done + 1, count + 1
            if count == cfg.log_every or step == steps or stopping or saving:
                # the only place, besides the matching, where the host waits for the device
                lost = int(losses.pop("lost"))
                total = sum_over_processes(torch.stack(list(losses.values())).cpu()) / world
                losses = dict(zip(losses, total.tolist()))
                bad = [k for k, v in losses.items() if not math.isfinite(v)]
                if bad:                                              # before anything is saved
                    raise explain_not_finite(run, at + 1 - max(lost, 1), f"{bad[0]} is not finite")
                sums = {k: sums.get(k, 0.0) + v for k, v in losses.items()}
                seconds = time.time() - since
                record = dict(
                    epoch=epoch, step=step, lr=optimizer.param_groups[0]["lr"],
                    **{k: v / count for k, v in losses.items()},
                    images_per_s=count * cfg.batch_size / seconds, data_share=waited / seconds,
                    memory_gb=memory_gb(device), elapsed_s=time.time() - begin,
                    eta_s=(time.time() - begin) / done * (steps * cfg.epochs - at - 1))
                say(interval_line(record, steps))
                if rank == 0:
                    append_json(out + "steps.txt", record)
                losses, count, waited, since = {}, 0, 0.0, time.time()
            if stopping:
                break
            if saving and step < steps:
                save(keep_previous=True)
        save(keep_previous=True)                     # before the evaluation, which may fail
        if sum_over_processes(torch.tensor(interrupt["stop"])) > 0:  # so all leave together
            say(f"stopped; the same command goes on from {out}ckpt.pt")
            return interrupt["code"]

        record = epoch_record(sums, steps, loss_cfg)
        record["train_lr"] = optimizer.param_groups[0]["lr"]
        epoch, step, sums, is_best = epoch + 1, 0, {}, False
        if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
            interrupt["safe"] = True
            result = evaluate(bare, val_loader, device, dtype)
            interrupt["safe"] = False
            score, line, entries = evaluation_report(result)
            is_best, best_ap = score > best_ap, max(best_ap, score)
            record.update(entries)
            say(f"epoch {epoch:3d}/{cfg.epochs}  {line}  on {len(val_set)} images, "
                f"{clock(time.time() - begin)} since the start")
            if rank == 0:
                draw_predictions(result["rows"], val_set).save(out + "predictions.jpg")
        if rank == 0:
            append_json(out + "log.txt", {**record, "epoch": epoch - 1, "n_parameters": sum(
                p.numel() for p in bare.parameters() if p.requires_grad)})
        if is_best:
            save("best.pt")
        save()                                       # last: what is killed before is done again
    return 0


# why the system ends loader workers
GONE = "usually for lack of memory or of /dev/shm: try a smaller --num_workers"


def main(argv=None):
    parser, given = read_options(argv, TrainConfig, ModelConfig, LossConfig, MetaFormerConfig,
                                 ClassLossConfig)
    try:
        configs = make_configs(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    try:
        code = train(*configs, *start_processes(configs[2].device))
    except (ConnectionError, EOFError) as error:   # while a loader worker sent a batch
        code = f"error{rank}: a DataLoader worker has gone ({error!r}), {GONE}"
    except (ValueError, OSError) as error:
        text = re.split(r"\n\w+Error: ", str(error))[-1].strip()     # without a worker's traceback
        code = f"error{rank}: {text}"
    except KeyboardInterrupt:
        code = 130
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:              # killed by the system, mostly
            code = f"error{rank}: {text.splitlines()[0]} It was killed {GONE}"
        elif out_of_memory(error):                   # a training step has said more
            code = (f"error{rank}: {text.splitlines()[0]}: in an evaluation a smaller "
                    f"--eval_batch_size needs less; the same command goes on")
        elif dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection|peer", text):
            code = (f"error{rank}: another process has failed or gone, its own message says why "
                    f"({text.splitlines()[0][:200]})")
        else:
            print(f"error{rank}:", file=sys.stderr, flush=True)      # a bug: with its traceback
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
