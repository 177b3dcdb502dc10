"""The options of a training run: TrainConfig, the defaults by kind of data, the command line."""

import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated

import torch

from coco_eval import UserError
from options import check_options, read_options
from mixers import MIXERS
from scenes import CLASS_SCENES, SCENES
from resnet import RESNETS
from metaformer import METAFORMERS, MetaFormerConfig
from classification import ClassLossConfig
from checkpoint import config_of, read_run
from model import BACKBONES, MODELS, ModelConfig, build_model
from detr_demo import UNUSED_OPTIONS
from finetune import check_freeze
from losses import LossConfig


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on, and how. The defaults are the official DETR's; PRESETS change them."""
    model: Annotated[str, "the network, whose parts the options below can change", MODELS] = (
        "detr_r50")
    data: Annotated[str, "folder in COCO, YOLO or VOC format; classifiers: train/, val/"] = ""
    train_json: Annotated[str, "training annotations, a COCO instances file with any ids"] = ""
    train_images: Annotated[str, "folder of the training images"] = ""
    val_json: Annotated[str, "validation annotations"] = ""
    val_images: Annotated[str, "folder of the validation images"] = ""
    val_split: Annotated[float, "of a data set with one split, the share to validate on", 0] = 0.0
    train_shapes: Annotated[int, "built-in shapes: images per epoch", 1] = 6400
    val_shapes: Annotated[int, "built-in shapes: held-out images", 1] = 256
    scenes: Annotated[str, "built-in shapes: what lies where, see scenes.py; for detectors "
                           f"{', '.join(SCENES)}, for classifiers {', '.join(CLASS_SCENES)}",
                      {**SCENES, **CLASS_SCENES}] = "plain"
    overfit: Annotated[int, "train and evaluate on the first N images: try this first", 0] = 0
    image_size: Annotated[int, "shorter side in evaluation; training sizes scale with it; "
                               "classifiers: side of all images", 1] = 800
    max_size: Annotated[int, "longest side", 1] = 1333
    recipe: Annotated[str, "defaults for 50 to 2000 images, from scratch", ("", "small")] = ""
    augment: Annotated[bool, "random flip, sizes, crops; classifiers: PoolFormer's; light: flip "
                             "and milder crops alone; --no-augment: none", ("light",)] = True
    group_by_shape: Annotated[bool, "batches of images of like shape"] = True
    epochs: Annotated[int, "passes over the training images", 1] = 300
    steps: Annotated[int, "about so many optimizer steps, instead of --epochs", 0] = 0
    batch_size: Annotated[int, "images per optimizer step, over all processes", 1] = 16
    accumulate: Annotated[int, "micro-batches of each process in a step", 1] = 1
    lr: Annotated[float, "learning rate; class folders: 1e-3 * batch_size / 1024", 0] = 1e-4
    lr_backbone: Annotated[float, "learning rate of the backbone; 0 freezes it", 0] = 1e-5
    weight_decay: Annotated[float, "of AdamW", 0] = 1e-4
    clip_max_norm: Annotated[float, "largest norm of the gradient; 0: no clipping", 0] = 0.1
    schedule: Annotated[str, "a tenth every lr_drop epochs, a cosine to min_lr, or constant, then "
                             "linear to 0", ("step", "cosine", "trapezoid")] = "step"
    min_lr: Annotated[float, "where the cosine schedule takes --lr", 0] = 0.0
    decay_share: Annotated[float, "trapezoid: share of the run in which the rate falls", 0] = 0.3
    lr_drop: Annotated[int, "epochs between the drops of the step schedule", 1] = 200
    warmup_steps: Annotated[int, "steps of linear warm-up", 0] = 0
    warmup_epochs: Annotated[int, "epochs of linear warm-up, instead", 0] = 0
    backbone_weights: Annotated[str, "imagenet (fetched), a file or URL, or none"] = "imagenet"
    finetune: Annotated[str, "start from the weights of this checkpoint, as far as they fit"] = ""
    frozen_weights: Annotated[str, "trains the mask head alone on this model's detector"] = ""
    teacher: Annotated[str, "classifiers: learn from this checkpoint, too, see distill.py"] = ""
    freeze: Annotated[str, "parts to keep as they are: backbone,encoder,decoder,heads"] = ""
    class_weights: Annotated[str, "of the loss: balanced, or a JSON file {class: weight}"] = ""
    resume: Annotated[str, "continue this checkpoint with the options given now"] = ""
    output_dir: Annotated[str, "folder of checkpoints, logs and pictures"] = "out"
    save_minutes: Annotated[float, "minutes between checkpoints; 0: after epochs only", 0] = 10.0
    eval_every: Annotated[int, "epochs between evaluations; 0: some 30 in the run", 0] = 1
    eval_batch_size: Annotated[int, "images per batch in evaluation, each process", 1] = 4
    log_every: Annotated[int, "steps between printed lines", 1] = 50
    num_workers: Annotated[int, "loader processes of each process; -1: by the cores", -1] = -1
    device: Annotated[str, "auto: cuda if there is one", ("auto", "cpu", "cuda", "mps")] = "auto"
    dtype: Annotated[str, "of autocast; auto: bfloat16 where the GPU has it",
                     ("auto", "float32", "bfloat16")] = "auto"
    compile: Annotated[bool, "torch.compile the network"] = False
    seed: Annotated[int, "of initialisation, order of images, augmentation, dropout", 0] = 42

    def __post_init__(self):
        check_options(self)
        paths = self.train_json, self.train_images, self.val_json, self.val_images
        divided = self.val_split and all(paths[:2]) and not any(paths[2:])
        if any(paths) and not (all(paths) or divided) or self.data and any(paths):
            raise UserError("give --data DIR alone, or all four of --train_json, --train_images, "
                            "--val_json and --val_images, or the first two and --val_split")
        if self.val_split > 1:
            raise UserError(f"--val_split {self.val_split:g} is a share of the images, 0.1 say")
        check_freeze(self)
        if self.frozen_weights and (self.finetune or self.freeze):
            raise UserError("--frozen_weights says what to start from and what stays frozen: give "
                            "it without --finetune and --freeze")
        most = dict(max_size=20_000, num_workers=1_000, train_shapes=10**7, val_shapes=10**7)
        for name, limit in most.items():
            if getattr(self, name) > limit:
                raise UserError(f"--{name} {getattr(self, name)} is more than {limit:,}, which no "
                                f"machine holds")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"--decay_share {self.decay_share} must be over 0 and at most 1")
        if self.image_size < 5 and self.kind in ("shapes", "shape_classes"):
            raise UserError(f"--image_size {self.image_size} is too small for shapes, give 5 or "
                            f"more")
        scenes = SCENES if self.kind == "shapes" else CLASS_SCENES
        if self.kind in ("shapes", "shape_classes") and self.scenes not in scenes:
            raise UserError(f"--scenes {self.scenes} is not for {self.model}, use one of: "
                            f"{', '.join(scenes)}")
        if self.max_size < self.image_size:
            raise UserError(f"--max_size {self.max_size} is less than --image_size "
                            f"{self.image_size}")
        if self.model in METAFORMERS and any(paths):
            raise UserError(f"{self.model} is a classifier: give --data DIR with the images as "
                            f"DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg")

    @property
    def kind(self):
        return kind_of_data(self.model, self.data or self.train_json)


def kind_of_data(model, files):
    """A key of PRESETS."""
    if model in METAFORMERS:
        return "image_folder" if files else "shape_classes"
    return "coco" if files else "shapes"


# Defaults by kind of data; "overfit" comes on top with --overfit. An explicit flag wins.
PRESETS = {
    "coco": {},
    "shapes": dict(
        model="detr_tiny", image_size=64, max_size=64, augment=False, epochs=12, batch_size=16,
        lr=5e-4, lr_backbone=1e-3, schedule="trapezoid", warmup_steps=200, clip_max_norm=1.0,
        backbone_weights="none", eval_batch_size=64),
    "image_folder": dict(                                # PoolFormer's recipe for ImageNet
        image_size=224, epochs=300, batch_size=1024, weight_decay=0.05, clip_max_norm=0.0,
        schedule="cosine", min_lr=1e-5, warmup_epochs=5, backbone_weights="none",
        group_by_shape=False, eval_batch_size=64),
    "shape_classes": dict(
        image_size=64, augment=False, val_shapes=600, epochs=14, batch_size=32, lr=2e-3,
        weight_decay=0.05, clip_max_norm=1.0, schedule="cosine", warmup_steps=200, smoothing=0.0,
        mixup=0.0, cutmix=0.0, backbone_weights="none", group_by_shape=False, eval_batch_size=64),
    "overfit": dict(augment=False, dropout=0.0, batch_size=8, epochs=10, steps=0, warmup_epochs=0,
                    eval_every=1, smoothing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0,
                    head_dropout=0.0),
}
# --recipe by kind of data: defaults between those above and the flags that were given
RECIPES = {"small": {
    "coco": dict(
        model="detr_tiny", num_queries=50, image_size=160, augment="light", batch_size=8,
        steps=3750, lr=5e-4, lr_backbone=1e-3, clip_max_norm=1.0, schedule="cosine",
        warmup_steps=200, backbone_weights="none", eval_every=0),
    "image_folder": dict(
        image_size=96, augment="light", mixup=0.0, cutmix=0.0, batch_size=16, steps=3000, lr=1e-3,
        min_lr=0.0, clip_max_norm=1.0, warmup_epochs=0, warmup_steps=200, layer_scale=0.0,
        drop_path=0.0, eval_every=0)}}
# options of TrainConfig that mean nothing to a classifier
DETECTOR_ONLY_OPTIONS = {"val_split", "max_size", "group_by_shape", "lr_backbone",
                         "backbone_weights", "frozen_weights"}
OVERFIT_REPEATS = 100                              # passes over the N images in an epoch


# the groups of --help_all, by their first option; under "" what --help shows
HELP_GROUPS = {
    "": """model data train_json train_images val_json val_images val_split recipe overfit
        image_size augment epochs batch_size lr lr_backbone schedule backbone_weights finetune
        freeze class_weights resume output_dir num_workers device mixer backbone num_queries
        masks""".split(),
    "model": "network and data", "epochs": "optimizer and schedule",
    "backbone_weights": "weights to start from", "output_dir": "the run",
    "mixer": "DETR (with --model detr_...)", "set_cost_class": "loss of DETR",
    "family": "classifiers (with --model poolformer_s12, say)",
    "smoothing": "targets of classifiers"}


def parse_options(argv, description):
    """The parser, and the flags that were given as a dict."""
    # hidden are those that the data set, a detector with a classifier as backbone, or --model sets
    configs = TrainConfig, ModelConfig, LossConfig, MetaFormerConfig, ClassLossConfig
    presets = PRESETS | {f"small {kind}": preset for kind, preset in RECIPES["small"].items()}
    return read_options(argv, description, configs, presets, HELP_GROUPS,
                        hidden=("num_classes", "out_stages", "demo"))


def make_configs(given):
    """The configs of model, loss and training of a dict of options.

    An option has the value given, else that of the --resume checkpoint, else that of the recipe,
    else that of the preset of the kind of data, else that of the model in MODELS, else its default.
    For a classifier the first two configs are MetaFormerConfig and ClassLossConfig. Raises
    ValueError.
    """
    options = with_resumed(given)
    if "epochs" in given:
        options["steps"] = given.get("steps", 0)                     # not the recipe's
    classifier = options.get("model") in METAFORMERS
    files = any(options.get(name) for name in ("data", "train_json", "train_images", "val_json",
                                               "val_images"))
    if not classifier and not files and os.path.isdir("data/coco"):
        options["data"], files = "data/coco", True
    options = with_presets(options, kind_of_data(options.get("model"), files))

    def pick(config):
        return {f.name: options[f.name] for f in fields(config) if f.name in options}

    model_type, loss_type = ((MetaFormerConfig, ClassLossConfig) if classifier else
                             (ModelConfig, LossConfig))
    cfg = TrainConfig(**pick(TrainConfig))
    model_cfg = MODELS[cfg.model]
    if not classifier and cfg.backbone_weights == "none" and not cfg.finetune:
        model_cfg = replace(model_cfg, backbone_norm="batch")        # nothing to freeze yet
    model_cfg = replace(model_cfg, **pick(model_type))
    loss_cfg = loss_type(**pick(loss_type))
    check_effects(given, model_cfg, loss_cfg, cfg)
    check_size(model_cfg)
    if not classifier:
        check_grid(model_cfg, cfg)
    return model_cfg, loss_cfg, cfg


def with_resumed(given):
    """The options given, over those of the checkpoint of --resume."""
    if not given.get("resume"):
        return dict(given)
    if given.get("finetune"):
        raise UserError("--finetune starts a run, --resume continues one: give one of them")
    state = read_run(given["resume"])
    config_of(given["resume"], state["train_config"], TrainConfig)
    recipe = state["train_config"].get("recipe", "")
    if given.get("recipe", recipe) != recipe:
        raise UserError("--resume keeps the options of its checkpoint, which --recipe would not "
                        "replace: give --recipe with --finetune, or without both")
    if given.get("augment") == "light":            # with_presets then leaves mixing out
        state["loss_config"] = {name: value for name, value in state["loss_config"].items()
                                if name not in ("mixup", "cutmix")}
    return {**state["model_config"], **state["loss_config"], **state["train_config"],
            "output_dir": os.path.dirname(given["resume"]) or ".", "finetune": "", **given}


def with_presets(given, kind):
    """The options given, over the presets of the kind of data, of --recipe and of --overfit."""
    recipe = RECIPES.get(given.get("recipe"), {}).get(kind, {})
    overfit = PRESETS["overfit"] if given.get("overfit") else {}
    options = {**PRESETS[kind], **recipe, **overfit, **given}
    if recipe:                                                       # in the proportion of COCO's
        options.setdefault("max_size", round(options["image_size"] * 5 / 3))
    if options.get("augment") == "light":                            # images are not mixed, either
        options = {"mixup": 0.0, "cutmix": 0.0, **options}
    if kind == "shapes" and options.get("scenes", "plain") != "plain":
        options["image_size"] = given.get("image_size", 96)          # sees less of them at a time
    if kind != "coco":                                               # the images are square
        options["max_size"] = given.get("max_size", options["image_size"])
    if given.get("warmup_epochs") and not given.get("warmup_steps"):
        options["warmup_steps"] = 0                                  # not the preset's
    if kind == "image_folder":
        batch = 1024 if given.get("overfit") else options["batch_size"]
        options.setdefault("lr", 1e-3 * batch / 1024)                # PoolFormer's rule
    return options


def check_effects(given, model_cfg, loss_cfg, cfg):
    """Raises ValueError for an option that was given and changes nothing in this run."""
    classifier = isinstance(model_cfg, MetaFormerConfig)
    known = {f.name for config in (cfg, model_cfg, loss_cfg) for f in fields(config)}
    if classifier:
        known -= DETECTOR_ONLY_OPTIONS
        remedy = ("classifier, which has --mixers for --mixer, and --finetune for "
                  "--backbone_weights")
    elif model_cfg.demo:
        known -= UNUSED_OPTIONS
        remedy = "detector of fixed parts: see detr_demo.py"
    else:
        remedy = "detector, which has --mixer"
    wrong = [f"--{name}" for name in given if name not in known]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: no option of {cfg.model}, a {remedy}")
    built_in = cfg.kind in ("shapes", "shape_classes")
    resnet = not classifier and model_cfg.backbone in RESNETS
    needs = {"lr_backbone": ("a backbone without --freeze", "backbone" not in cfg.freeze),
             "class_weights": ("no --frozen_weights", not cfg.frozen_weights),
             "val_split": ("--data or --train_json", cfg.kind == "coco"),
             "steps": ("no --epochs", "epochs" not in given),
             "recipe": ("--data or --train_json", not built_in),
             "lr_drop": ("--schedule step", cfg.schedule == "step"),
             "decay_share": ("--schedule trapezoid", cfg.schedule == "trapezoid"),
             "min_lr": ("--schedule cosine and a larger --lr",
                        cfg.schedule == "cosine" and cfg.min_lr <= cfg.lr),
             "backbone_norm": ("a ResNet as --backbone", resnet),
             "backbone_stage": ("a MetaFormer as --backbone", not resnet),
             "backbone_weights": ("no --finetune and no --frozen_weights", not (
                 cfg.finetune or cfg.frozen_weights) or cfg.backbone_weights == "none"),
             "warmup_epochs": ("--warmup_steps 0", not (cfg.warmup_epochs and cfg.warmup_steps)),
             "train_shapes": ("the built-in data", built_in),
             "val_shapes": ("the built-in data", built_in),
             "scenes": ("the built-in data", built_in),
             "patch_size": ("--family isotropic",
                            classifier and model_cfg.family == "isotropic"),
             "teacher": ("a classifier, and a coefficient over 0", classifier and
                         loss_cfg.soft_loss_coef + loss_cfg.imitation_loss_coef),
             "soft_loss_coef": ("--teacher", cfg.teacher),
             "temperature": ("--teacher, and --soft_loss_coef over 0",
                             classifier and cfg.teacher and loss_cfg.soft_loss_coef),
             "imitation_loss_coef": ("--teacher and no --freeze", cfg.teacher and not cfg.freeze),
             **{name: ("--masks", getattr(model_cfg, "masks", False))
                for name in ("frozen_weights", "mask_loss_coef", "dice_loss_coef")}}
    idle = [f"--{name} (needs {need})" for name, (need, met) in needs.items()
            if name in given and not met]
    if idle:
        raise UserError(f"no effect here: {', '.join(idle)}")


def with_epochs(cfg, images):
    """The config with the epochs that take some cfg.steps steps, if they are given, and with the
    evaluations that eval_every 0 asks for; images: in the training set."""
    epochs = cfg.epochs
    if cfg.steps:
        passes = OVERFIT_REPEATS if cfg.overfit else 1
        epochs = max(1, round(cfg.steps / (passes * max(1, images // cfg.batch_size))))
    return replace(cfg, epochs=epochs, eval_every=cfg.eval_every or max(1, round(epochs / 30)))


def check_size(model_cfg):
    """Raises UserError for a model that no memory would hold, before any is taken for it."""
    options = asdict(model_cfg)
    sizes = {f"--{name} {value}": value for name, value in options.items() if type(value) is int}
    if isinstance(model_cfg, MetaFormerConfig):
        sizes[f"--depths {model_cfg.depths}"] = layers = sum(d for d, *_ in model_cfg.stages)
        sizes[f"--widths {model_cfg.widths}"] = max(width for _, width, _ in model_cfg.stages)
    else:
        layers = model_cfg.enc_layers + model_cfg.dec_layers
    if max(sizes.values()) <= 4096 and layers <= 100:
        return                                     # the count below takes seconds to import

    parameters = math.inf
    if layers <= 1000:
        # meta tensors have a shape alone, though one too large for an int64 raises RuntimeError
        with suppress(RuntimeError), torch.device("meta"):
            parameters = sum(p.numel() for p in build_model(model_cfg).parameters())
    if parameters > 1e9:
        largest = sorted(sizes, key=sizes.get)[:-3:-1]
        raise UserError(f"a model of {layers} layers and {parameters:.3g} parameters, at most 1000 "
                        f"and 1e9 can be built: give less of {' or '.join(largest)}")


def check_grid(model_cfg, cfg):
    """Raises UserError if images can have more tokens than a fixed-grid mixer of the encoder takes
    (the decoder's grid is 1 x Q, whatever the images), or than learned positions are for."""
    fixed = hasattr(MIXERS[model_cfg.encoder_mixer or model_cfg.mixer], "fixed_grid")
    learned = model_cfg.demo or model_cfg.position_embedding == "learned"
    if not fixed and not learned:
        return
    with torch.device("meta"):                                       # allocates nothing
        stride = BACKBONES[model_cfg.backbone](model_cfg).stride
    side = math.ceil((cfg.max_size + 1) / stride)                    # resized() may pass it by 1
    shortest = math.ceil(min(cfg.image_size, cfg.max_size) / stride)
    if learned and shortest > 50:
        raise UserError(f"--image_size {cfg.image_size} gives at least {shortest} x {shortest} "
                        f"tokens at stride {stride}, learned positions are for 50 x 50: give a "
                        f"smaller one")
    if fixed and side > min(model_cfg.grid_rows, model_cfg.grid_cols):
        raise UserError(f"--max_size {cfg.max_size} gives up to {side} x {side} tokens at stride "
                        f"{stride}: give --grid_rows {side} --grid_cols {side}, or a smaller one")
