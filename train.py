"""Training of DETR and of the MetaFormer classifiers, on one process or many.

    python train.py                                           # built-in shapes, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --mixer pool         # GPUs (nccl) or CPU (gloo)
    python train.py --data coco --model detr_r50              # annotations/, train2017/, val2017/
    python train.py --train_json A --train_images DIR --val_json B --val_images DIR
    python train.py --model poolformer_s12 --data DIR         # DIR/{train,val}/<class>/*.jpg
    python train.py --model metaformer_tiny --mixers pool     # a classifier of built-in shapes

The same command again continues from the checkpoint in --output_dir. Papers: DETR,
arXiv:2005.12872; MetaFormer, arXiv:2111.11418.
"""

import math
import os
import sys
import time
import traceback
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from coco_eval import UserError, writing
from processes import (catch_signals, check_ranks_agree, count_cores, end_workers, ignore_signals,
                       start_processes, sum_over_processes)
from check_data import check_sets
from metaformer import MetaFormer
from classification import classification_losses
from data import EvalSampler, TrainSampler, build_dataset, collate, to_device
from checkpoint import (check_output_dir, find_resume, load_optimizer, lock_output_dir, save_run,
                        truncate_logs)
from model import build_model
from resnet import memory_format
from finetune import class_weights, first_weights, freeze, frozen_classes
from losses import set_loss
from config import OVERFIT_REPEATS, TrainConfig, make_configs, parse_options, with_epochs
from evaluate import autocast, evaluate
from report import (Interval, append_json, banner, classification_report, detection_report,
                    draw_batch, draw_classes, draw_detections, epoch_record, explain, hint,
                    normalizers_of, say, say_best, share_in_class_losses,
                    share_in_detection_losses)
from distill import with_teacher
from segmentation import (draw_mask_detections, segmentation_losses, segmentation_report,
                          share_in_segmentation_losses)


# -- loaders, optimizer, schedule ----------------------------------------------------------------

def build_loaders(cfg, train_set, val_set, rank, world, device):
    """Loaders of this process for training and validation."""
    workers = cfg.num_workers
    if workers < 0:                                # the cores of a process, less one for itself
        workers = min(8, max(0, count_cores() - 1))
    options = dict(collate_fn=collate, num_workers=workers, pin_memory="cuda" in device,
                   persistent_workers=workers > 0, worker_init_fn=ignore_signals)
    repeats = OVERFIT_REPEATS if cfg.overfit else 1
    sampler = TrainSampler(train_set, cfg.batch_size, cfg.seed, rank, world, cfg.accumulate,
                           cfg.group_by_shape, repeats)
    val_sampler = EvalSampler(val_set, cfg.eval_batch_size, rank, world)
    return (DataLoader(train_set, batch_sampler=sampler, **options),
            DataLoader(val_set, batch_sampler=val_sampler, **options))


def build_optimizer(model, cfg):
    """AdamW with two groups of parameters, each with its learning rate under "base_lr".

    Of a detector the second is the backbone, with a learning rate of its own, frozen where that is
    0; of a classifier biases, norms, scales and positions, without weight decay.
    """
    first = dict(params=[], lr=cfg.lr, base_lr=cfg.lr, weight_decay=cfg.weight_decay)
    second = dict(first, params=[])
    classifier = isinstance(model, MetaFormer)
    if classifier:
        second["weight_decay"] = 0.0
    else:
        second["lr"] = second["base_lr"] = cfg.lr_backbone
    freeze(model, cfg)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        in_second = "backbone" in name
        if classifier:
            leaf = name.split(".")[-1]
            in_second = p.dim() < 2 or leaf[0] == "b" or leaf in ("pos_embed", "cls_token")
        (second if in_second else first)["params"].append(p)
    return torch.optim.AdamW([first, second], fused=True)


def lr_factor(cfg, global_step, steps_per_epoch):
    """The factor on base_lr at an optimizer step (from 0): a pure function of the step."""
    warmup_steps = cfg.warmup_steps or cfg.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (global_step + 1) / warmup_steps) if warmup_steps else 1.0
    if cfg.schedule == "step":
        return warmup * 0.1 ** (global_step // steps_per_epoch // cfg.lr_drop)
    steps = cfg.epochs * steps_per_epoch
    if cfg.schedule == "trapezoid":
        return warmup * min(1.0, (steps - global_step) / (cfg.decay_share * steps))
    min_factor = min(1.0, cfg.min_lr / cfg.lr) if cfg.lr else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * global_step / steps))
    return warmup * (min_factor + (1 - min_factor) * cosine)


def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def seed_step(cfg, global_step, rank, world):
    """Dropout and stochastic depth of a step depend on nothing before it."""
    torch.manual_seed(((cfg.seed * 1_000_003 + global_step) * world + rank) % 2**63)


# -- a run ---------------------------------------------------------------------------------------

def detection_losses(run, images, valid, targets, normalizers, global_step):
    """set_loss of a micro-batch; global_step is for classification_losses."""
    logits, boxes = run.model(images, valid)                        # (L, B, Q, K+1), (L, B, Q, 4)
    return set_loss(logits, boxes, targets, run.loss_cfg, normalizers, run.class_weights)


# the functions in which detectors and classifiers differ; a run chooses once, in start_run
Task = namedtuple("Task", "losses validation_losses report draw")
DETECTION = Task(detection_losses, share_in_detection_losses, detection_report, draw_detections)
SEGMENTATION = Task(segmentation_losses, share_in_segmentation_losses, segmentation_report,
                    draw_mask_detections)
CLASSIFICATION = Task(classification_losses, share_in_class_losses, classification_report,
                      draw_classes)


@dataclass
class Run:
    """A training run, as a record; its last six fields change."""
    cfg: object                                    # TrainConfig
    model_cfg: object                              # ModelConfig or MetaFormerConfig
    loss_cfg: object                               # LossConfig or ClassLossConfig
    task: Task
    raw_model: torch.nn.Module
    model: torch.nn.Module                         # raw_model under torch.compile and DDP
    optimizer: torch.optim.Optimizer
    train_loader: DataLoader
    val_loader: DataLoader
    rank: int
    world: int
    device: str
    dtype: torch.dtype                             # of autocast
    interrupt: dict                                # of catch_signals
    lock: object                                   # open file: no other run may write output_dir
    class_weights: torch.Tensor = None             # (K,), in the loss
    epoch: int = 0                                 # finished ones
    step: int = 0                                  # finished ones of this epoch
    epoch_sums: dict = field(default_factory=dict)     # losses, added up over steps and processes
    best_score: float = -1.0                       # AP or top-1
    saved: float = field(default_factory=time.time)    # time of the last save
    damaged: bool = False                          # ckpt.pt is, and not kept as ckpt_prev.pt


def agree(run, micro_batches):
    """(normalizers of the losses per process, whether to stop, whether to save), the same on all
    processes."""
    normalizers = normalizers_of(run, micro_batches)
    due = 0 < run.cfg.save_minutes < (time.time() - run.saved) / 60
    flags = torch.tensor([run.interrupt["stop"], float(due)])
    total = sum_over_processes(torch.cat([normalizers, flags]))
    return total[:3] / run.world, bool(total[3] > 0), bool(total[4] > 0)


def finish_epoch(run, interval):
    """Ends an epoch: evaluates every eval_every epochs, writes log.txt, best.pt and ckpt.pt."""
    cfg, out = run.cfg, run.cfg.output_dir
    record = epoch_record(run)
    run.epoch, run.step, run.epoch_sums = run.epoch + 1, 0, {}
    is_best = False
    if run.epoch % cfg.eval_every == 0 or run.epoch == cfg.epochs:
        run.interrupt["safe"] = True                                # a signal may end it at once
        if run.world > 1:                          # rank 0's running statistics, which are saved
            for buffer in run.raw_model.buffers():
                dist.broadcast(buffer, 0)
        result = evaluate(run.raw_model, run.val_loader, run.device, run.dtype,
                          run.task.validation_losses(run))
        run.interrupt["safe"] = False
        score, entries = run.task.report(run, result, interval.elapsed())    # prints the line
        is_best = score > run.best_score
        run.best_score = max(score, run.best_score)
        record.update(entries)
        if run.rank == 0:
            picture = run.task.draw(result, run.val_loader.dataset)
            with writing(f"{out}/predictions.jpg"):
                picture.save(f"{out}/predictions.jpg")
    if run.rank == 0:
        append_json(f"{out}/log.txt", record)
    if is_best:
        save_run(run, "best.pt")
    save_run(run)                                  # last: a kill before it repeats the evaluation


# -- one optimizer step --------------------------------------------------------------------------

def forward_backward(run, micro_batches, normalizers, global_step):
    """Adds up the gradients of a step over this process's micro-batches; returns the losses, 0-dim
    tensors on the device.

    normalizers: those of the whole step, divided by the number of processes. As every loss is
    divided by them, the gradients are those of the whole batch, however it is split (but for
    dropout, and for batch norm, whose statistics are of one micro-batch over all processes).
    """
    totals = {}
    for k, (images, valid, targets) in enumerate(micro_batches):
        images, valid = to_device(images, valid, run.device)

        # DDP averages the gradients over the processes in the last backward pass only
        sync = k == len(micro_batches) - 1 or run.world == 1
        with nullcontext() if sync else run.model.no_sync():
            with autocast(run.device, run.dtype):
                losses = run.task.losses(run, images, valid, targets, normalizers, global_step)
            if k == 0:
                run.model.zero_grad()              # this late, so that backward reuses the memory
            losses["loss"].backward()

        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


def stop_updates_if_not_finite(optimizer, losses):
    """From the first loss or gradient on that is not finite the optimizer changes no weights, and
    losses["not_finite"] is 1. The sum of these tells the host, which seldom reads the device, how
    many steps ago that was; it then ends the run, before anything is saved."""
    finite = (losses["loss"] + losses["grad_norm"]).isfinite()
    before = getattr(optimizer, "found_inf", torch.zeros_like(losses["grad_norm"]))
    # found_inf is GradScaler's way to tell fused AdamW to leave the weights alone
    optimizer.found_inf = before.maximum((~finite).float())
    losses["not_finite"] = optimizer.found_inf


def train_step(run, micro_batches, normalizers, global_step):
    """One step of the optimizer; returns its losses, 0-dim tensors on the device."""
    losses = forward_backward(run, micro_batches, normalizers, global_step)
    max_norm = run.cfg.clip_max_norm or math.inf
    losses["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
    stop_updates_if_not_finite(run.optimizer, losses)
    run.optimizer.step()
    return losses


# -- the loop ------------------------------------------------------------------------------------

def train(run):
    """Epochs of steps, each epoch with a checkpoint and an evaluation; returns the exit code."""
    cfg, sampler = run.cfg, run.train_loader.batch_sampler
    interval = Interval()
    while run.epoch < cfg.epochs:
        sampler.set_epoch(run.epoch, run.step)
        batches, stopping = iter(run.train_loader), False
        run.model.train()
        freeze(run.raw_model, cfg)                 # what --freeze names stays as in evaluation
        interval.restart()
        while run.step < sampler.steps and not stopping:
            global_step = run.epoch * sampler.steps + run.step

            # this process's share of the step
            with interval.waiting(batches):
                micro_batches = [next(batches) for _ in range(cfg.accumulate)]
            if global_step == 0 and run.rank == 0:
                draw_batch(run, *micro_batches[0])

            # one small all-reduce: the normalizers, and whether to stop or to save
            normalizers, stopping, saving = agree(run, micro_batches)

            # rate and random numbers depend on the step's number alone: a resumed run repeats it
            set_learning_rate(run.optimizer, lr_factor(cfg, global_step, sampler.steps))
            seed_step(cfg, global_step, run.rank, run.world)
            try:
                losses = train_step(run, micro_batches, normalizers, global_step)
            except Exception as error:
                explain(error, run, global_step, micro_batches)     # raises what a user can act on
                raise
            run.step += 1
            interval.add(losses)

            # the only place, besides the matching, where the host waits for the device
            if interval.is_due(run) or stopping or saving:
                interval.close(run)                                 # checks, prints, steps.txt
            if saving and not stopping and run.step < sampler.steps:
                save_run(run, keep_previous=True)

        save_run(run, keep_previous=True)                           # before the evaluation can fail
        # a signal may have come since agree()
        if sum_over_processes(torch.tensor(run.interrupt["stop"])) > 0:
            say(run, f"stopped; the same command continues from {cfg.output_dir}/ckpt.pt")
            say_best(run)
            return run.interrupt["code"]
        finish_epoch(run, interval)
    say_best(run)
    return 0


# -- the start -----------------------------------------------------------------------------------

def build_datasets(cfg, model_cfg):
    """Training and validation set, with the same classes."""
    crop_fraction = getattr(model_cfg, "crop_fraction", 1.0)        # of a classifier
    masks = getattr(model_cfg, "masks", False)                      # of a detector
    train_set = build_dataset(cfg, "train", frozen_classes(cfg), crop_fraction, masks)
    val_set = build_dataset(cfg, "val", train_set.classes, crop_fraction, masks)
    if cfg.kind == "coco":
        check_sets(train_set, val_set)
    return train_set, val_set


def choose_dtype(cfg, device):
    """Autocast's: bfloat16 where asked for, or on GPUs that compute in it natively."""
    native = "cuda" in device and torch.cuda.get_device_capability() >= (8, 0)
    use = native if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    return torch.bfloat16 if use else torch.float32


def continue_run(run, state):
    """Sets where the run is from a checkpoint's state, if there is one, and cuts the logs there."""
    cfg, steps = run.cfg, run.train_loader.batch_sampler.steps
    if state:
        run.epoch, run.step, run.epoch_sums = state["epoch"], state["step"], state["sums"]
        run.best_score, run.damaged = state["best_score"], state["damaged"]
        where = f" at epoch {run.epoch + 1}, step {run.step}" if run.epoch < cfg.epochs else ""
        say(run, f"resumed {where}".rstrip(), *state["notes"], sep="\n         ")
    if run.rank == 0:
        truncate_logs(cfg.output_dir, run.epoch, run.step, bool(state))
    done = run.epoch * steps + run.step
    if sum_over_processes(torch.tensor(done)) != run.world * done:
        raise UserError(f"this process found the run at epoch {run.epoch + 1}, step {run.step} in "
                        f"{cfg.output_dir}, others elsewhere: --output_dir must be a folder that "
                        f"all machines share")
    if run.epoch >= cfg.epochs:
        say(run, f"finished {run.epoch} epochs before; to train on: --resume "
                 f"{cfg.output_dir}/ckpt.pt --epochs N")


def start_run(model_cfg, loss_cfg, cfg, rank, world, device):
    """The Run of these options, continued where there is a checkpoint; prints what was decided."""
    interrupt = catch_signals()
    train_set, val_set = build_datasets(cfg, model_cfg)
    cfg = with_epochs(cfg, len(train_set))
    model_cfg = replace(model_cfg, num_classes=len(train_set.classes))
    check_ranks_agree({**asdict(model_cfg), **asdict(loss_cfg), **asdict(cfg),
                       "classes": train_set.classes, "images": (len(train_set), len(val_set))})
    lock = lock_output_dir(cfg.output_dir) if rank == 0 else None
    state = find_resume(cfg, model_cfg, loss_cfg)

    # the model, with weights from the checkpoint, --finetune or --backbone_weights
    torch.manual_seed(cfg.seed)
    raw_model = build_model(model_cfg)
    weight_lines = first_weights(raw_model, cfg, state, train_set.classes)
    raw_model.to(device, memory_format=memory_format(device))
    optimizer = build_optimizer(raw_model, cfg)
    if state:
        load_optimizer(optimizer, state["optimizer"])
    model = torch.compile(raw_model) if cfg.compile else raw_model
    if dist.is_initialized():
        device_ids = [device] if "cuda" in device else None
        model = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)

    tf32 = cfg.dtype != "float32"                  # in what autocast leaves in float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    train_loader, val_loader = build_loaders(cfg, train_set, val_set, rank, world, device)
    task = CLASSIFICATION if isinstance(raw_model, MetaFormer) else DETECTION
    task = SEGMENTATION if getattr(model_cfg, "masks", False) else task
    weights = class_weights(cfg.class_weights, train_set)
    run = Run(cfg=cfg, model_cfg=model_cfg, loss_cfg=loss_cfg, task=task, raw_model=raw_model,
              model=model, optimizer=optimizer, train_loader=train_loader, val_loader=val_loader,
              rank=rank, world=world, device=device, dtype=choose_dtype(cfg, device),
              interrupt=interrupt, lock=lock,
              class_weights=None if weights is None else weights.to(device))
    if cfg.teacher:
        run.task = with_teacher(run)
    if rank == 0:
        check_output_dir(cfg, raw_model)
    say(run, *banner(run), *weight_lines, sep="\n")
    continue_run(run, state)
    return run


def main(argv=None):
    parser, given = parse_options(argv, __doc__)
    try:
        model_cfg, loss_cfg, cfg = make_configs(given)
    except UserError as error:
        parser.error(str(error))
    on_rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    try:
        code = train(start_run(model_cfg, loss_cfg, cfg, *start_processes(cfg.device)))
    except UserError as error:
        code = f"error{on_rank}: {error}"          # sys.exit prints a sentence and exits with 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:                     # a bug: with its traceback
        print(f"error{on_rank}: {hint(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():                  # where gloo may wait long for a lost process
            traceback.print_exc()
            end_workers()
            os._exit(1)
        raise
    finally:
        end_workers()
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
