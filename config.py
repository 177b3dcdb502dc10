"""The options of a training run: TrainConfig, the defaults by kind of data, the command line."""

import argparse
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Annotated, get_args, get_type_hints

from metaformer import METAFORMERS, MetaFormerConfig
from classification import ClassLossConfig
from checkpoint import read_run
from model import MODELS, ModelConfig
from losses import LossConfig


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on, and how. The defaults are the official DETR's; PRESETS change them."""
    model: Annotated[str, "a key of MODELS, whose parts the options below can change"] = "detr_r50"
    data: Annotated[str, "COCO: annotations/, train2017/, val2017/; classifiers: train/, val/"] = ""
    train_json: Annotated[str, "training annotations, a COCO instances file with any ids"] = ""
    train_images: Annotated[str, "folder of the training images"] = ""
    val_json: Annotated[str, "validation annotations"] = ""
    val_images: Annotated[str, "folder of the validation images"] = ""
    train_shapes: Annotated[int, "built-in shapes: images per epoch"] = 6400
    val_shapes: Annotated[int, "built-in shapes: held-out images"] = 256
    overfit: Annotated[int, "train and evaluate on the first N images: the first thing to try"] = 0
    image_size: Annotated[int, "shorter side in evaluation; training sizes scale with it; "
                               "classifiers: side of all images"] = 800
    max_size: Annotated[int, "longest side"] = 1333
    augment: Annotated[bool, "random flip, sizes and crops; classifiers: PoolFormer's"] = True
    group_by_shape: Annotated[bool, "batches of images of like shape"] = True
    epochs: Annotated[int, "passes over the training images"] = 300
    batch_size: Annotated[int, "images per optimizer step, over all processes"] = 16
    accumulate: Annotated[int, "parts in which each process does its share of a step"] = 1
    lr: Annotated[float, "learning rate; class folders: 1e-3 * batch_size / 1024"] = 1e-4
    lr_backbone: Annotated[float, "learning rate of the backbone; 0 freezes it"] = 1e-5
    weight_decay: Annotated[float, "of AdamW"] = 1e-4
    clip_max_norm: Annotated[float, "largest norm of the gradient; 0 for no clipping"] = 0.1
    schedule: Annotated[str, "step (a tenth every lr_drop epochs) or cosine (to min_lr)"] = "step"
    min_lr: Annotated[float, "where the cosine schedule takes --lr"] = 0.0
    lr_drop: Annotated[int, "epochs between the drops of the step schedule"] = 200
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 0
    warmup_epochs: Annotated[int, "epochs of linear warm-up, instead"] = 0
    backbone_weights: Annotated[str, "imagenet (fetched), a file or URL, or none"] = "imagenet"
    finetune: Annotated[str, "start from this model's weights; another class head is allowed"] = ""
    resume: Annotated[str, "go on from this checkpoint, with the options given now"] = ""
    output_dir: Annotated[str, "where checkpoints, logs and pictures go"] = "out"
    save_minutes: Annotated[float, "minutes between checkpoints in an epoch; 0: at its end"] = 10.0
    eval_every: Annotated[int, "epochs between evaluations"] = 1
    eval_batch_size: Annotated[int, "images per batch in evaluation, each process"] = 4
    log_every: Annotated[int, "steps between printed lines"] = 50
    num_workers: Annotated[int, "loader processes of each process; -1: by the number of cores"] = -1
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 autocast, or auto: bfloat16 on new GPUs"] = "auto"
    compile: Annotated[bool, "torch.compile the network"] = False
    seed: Annotated[int, "of initialisation, order of images, augmentation and dropout"] = 42

    def __post_init__(self):
        for field, known in (("model", MODELS), ("schedule", ("step", "cosine")),
                             ("device", ("auto", "cpu", "cuda")),
                             ("dtype", ("auto", "float32", "bfloat16"))):
            if getattr(self, field) not in known:
                raise ValueError(f"--{field} {getattr(self, field)} is unknown, use one of: "
                                 f"{', '.join(known)}")
        for field in ("train_shapes", "val_shapes", "epochs", "batch_size", "accumulate", "lr_drop",
                      "eval_every", "eval_batch_size", "log_every", "image_size", "max_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field} {getattr(self, field)} must be at least 1")
        for field in ("lr", "lr_backbone", "weight_decay", "clip_max_norm", "overfit", "seed",
                      "warmup_steps", "warmup_epochs", "min_lr", "save_minutes"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"--{field} {getattr(self, field)} must be 0 or a positive number")
        if self.num_workers < -1:
            raise ValueError(f"--num_workers {self.num_workers} must be -1 (by the cores) or more")
        paths = self.train_json, self.train_images, self.val_json, self.val_images
        if any(paths) and not all(paths) or self.data and any(paths):
            raise ValueError("give --data DIR alone, or all four of --train_json, --train_images, "
                             "--val_json and --val_images")
        if self.max_size < self.image_size:
            raise ValueError(f"--max_size {self.max_size} is less than --image_size "
                             f"{self.image_size}")

        if self.model in METAFORMERS and any(paths):
            raise ValueError(f"{self.model} is a classifier: give --data DIR with the images as "
                             f"DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg")

    @property
    def kind(self):
        return kind_of_data(self.model, self.data or self.train_json)


def kind_of_data(model, files):
    """A key of PRESETS."""
    if model in METAFORMERS:
        return "folder" if files else "one shape"
    return "coco" if files else "shapes"


# Defaults by kind of data; "overfit" comes on top with --overfit. An explicit flag wins.
PRESETS = {
    "coco": {},
    "shapes": dict(
        model="detr_tiny", image_size=64, max_size=64, augment=False, epochs=10, batch_size=16,
        lr=5e-4, lr_backbone=1e-3, schedule="cosine", warmup_steps=200, clip_max_norm=1.0,
        backbone_weights="none", eval_batch_size=64),
    "folder": dict(                                # PoolFormer's recipe for ImageNet
        image_size=224, epochs=300, batch_size=1024, weight_decay=0.05, clip_max_norm=0.0,
        schedule="cosine", min_lr=1e-5, warmup_epochs=5, backbone_weights="none",
        group_by_shape=False, eval_batch_size=64),
    "one shape": dict(
        image_size=64, augment=False, val_shapes=600, epochs=14, batch_size=32, lr=2e-3,
        weight_decay=0.05, clip_max_norm=1.0, schedule="cosine", warmup_steps=200, smoothing=0.0,
        mixup=0.0, cutmix=0.0, backbone_weights="none", group_by_shape=False, eval_batch_size=64),
    "overfit": dict(augment=False, dropout=0.0, batch_size=8, epochs=10, warmup_epochs=0,
                    smoothing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, head_dropout=0.0),
}
# options of TrainConfig that mean nothing to a classifier
OF_DETECTORS = {"max_size", "group_by_shape", "lr_backbone", "backbone_weights"}


# -- options -------------------------------------------------------------------------------------

def read_options(argv, *configs):
    """The parser, and the flags that were given as a dict.

    One flag per field of the config classes, with its type, help and default; booleans as --flag
    and --no-flag. Abbreviations are off, so that a typo is an error.
    """
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        hints = get_type_hints(config, include_extras=True)
        for field in fields(config):
            if field.name in ("num_classes", "maps"):
                continue                           # the data set says it; only a detector needs it
            if f"--{field.name}" in parser._option_string_actions:
                continue                           # an earlier config has it
            type_, help_ = get_args(hints[field.name])
            defaults = [f"default {field.default!r}"]
            defaults += [f"{kind}: {preset[field.name]}" for kind, preset in PRESETS.items()
                         if field.name in preset]
            how = dict(action=argparse.BooleanOptionalAction) if type_ is bool else dict(type=type_)
            group.add_argument(f"--{field.name}", help=f"{help_} ({'; '.join(defaults)})",
                               default=argparse.SUPPRESS, **how)
    return parser, vars(parser.parse_args(argv))


def make_configs(given):
    """The configs of model, loss and training of a dict of options: what is given, else the options
    of the --resume checkpoint, else the preset of the kind of data, else the model's own values and
    the defaults. For a classifier the first two are MetaFormerConfig and ClassLossConfig. Raises
    ValueError."""
    asked, sources = given, ("data", "train_json", "train_images", "val_json", "val_images")
    given = dict(given)
    if given.get("resume"):
        if given.get("finetune"):
            raise ValueError("--finetune starts a run, --resume goes on with one: give one of them")
        state = read_run(given["resume"])
        folder = os.path.dirname(given["resume"]) or "."
        given = {**state["model_config"], **state["loss_config"], **state["train_config"],
                 "output_dir": folder, "finetune": "", **given}
    classifier = given.get("model") in METAFORMERS
    if not (classifier or any(given.get(k) for k in sources)) and os.path.isdir("data/coco"):
        given["data"] = "data/coco"
    kind = kind_of_data(given.get("model"), any(given.get(k) for k in sources))
    options = {**PRESETS[kind], **(PRESETS["overfit"] if given.get("overfit") else {}), **given}
    if kind != "coco":                                               # the images are square
        options["max_size"] = given.get("max_size", options["image_size"])
    if given.get("warmup_epochs") and not given.get("warmup_steps"):
        options["warmup_steps"] = 0                                  # not the preset's
    if kind == "folder":
        batch = 1024 if given.get("overfit") else options["batch_size"]
        options.setdefault("lr", 1e-3 * batch / 1024)                # PoolFormer's rule

    def pick(config):
        return {f.name: options[f.name] for f in fields(config) if f.name in options}
    cfg = TrainConfig(**pick(TrainConfig))
    parts = (MetaFormerConfig, ClassLossConfig) if classifier else (ModelConfig, LossConfig)
    known = {f.name for config in (TrainConfig, *parts) for f in fields(config)}
    known -= OF_DETECTORS if classifier else set()
    wrong = [f"--{name}" for name in asked if name not in known]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no option of {cfg.model}, a "
                         + ("classifier, which has --mixers for --mixer, and --finetune for "
                            "--backbone_weights" if classifier else "detector, which has --mixer"))
    idle = [f"--{name} (needs {need})" for name, need, given_ in (
        ("lr_drop", "--schedule step", cfg.schedule == "step"),
        ("min_lr", "--schedule cosine", cfg.schedule == "cosine"),
        ("warmup_epochs", "--warmup_steps 0", not (cfg.warmup_epochs and cfg.warmup_steps)),
        ("train_shapes", "the built-in data", "shape" in kind),
        ("val_shapes", "the built-in data", "shape" in kind)) if name in asked and not given_]
    if idle:
        raise ValueError(f"no effect here: {', '.join(idle)}")
    model_cfg = MODELS[cfg.model]
    if not classifier and cfg.backbone_weights == "none" and not cfg.finetune:
        model_cfg = replace(model_cfg, backbone_norm="batch")        # nothing to freeze yet
    model_cfg = replace(model_cfg, **pick(parts[0]))
    if not classifier:
        check_grids(model_cfg, cfg)
    return model_cfg, parts[1](**pick(parts[1])), cfg


def check_grids(model_cfg, cfg):
    """Raises ValueError if the images to come have more tokens than a fixed-grid mixer takes."""
    stride = model_cfg.stride
    side = math.ceil((cfg.max_size + 1) / stride)                    # resized() may pass it by 1
    fixed_grid = (model_cfg.encoder_mixer or model_cfg.mixer) in ("mlp", "fc", "random")
    if fixed_grid and side > min(model_cfg.grid_rows, model_cfg.grid_cols):
        raise ValueError(f"--max_size {cfg.max_size} gives up to {side} x {side} tokens at stride "
                         f"{stride}: give --grid_rows {side} --grid_cols {side}, or a smaller one")
