"""Starting from other weights: what is taken from a model with other classes, queries or positions,
which parts stay frozen, and the weights of the classes in the loss.

    python train.py --data DIR --finetune detr-r50-e632da11.pth --freeze backbone,encoder
    python train.py --data DIR --finetune out/a/ckpt.pt --num_queries 50 --class_weights balanced
    python train.py --data DIR --masks --frozen_weights out/a/ckpt.pt      # trains the masks alone
"""

from dataclasses import asdict

import numpy as np
import torch

from coco_eval import UserError, UserFileError, read_json
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig
from checkpoint import (MASK_PARTS, config_of, load_backbone, load_weights, official_classes,
                        official_fields, read_checkpoint, read_run, upgraded, weights_of)
from model import ModelConfig


# -- which weights -------------------------------------------------------------------------------

# options in which a checkpoint and the model must agree; a model's others can differ
DETECTOR_OPTIONS = ("backbone", "hidden_dim", "nheads", "enc_layers", "dec_layers",
                    "dim_feedforward", "pre_norm")
CLASSIFIER_OPTIONS = ("family", "depths", "widths", "norm", "activation", "residual",
                      "channel_mlp", "mlp_head", "head_size", "patch_size", "pixel_norm")


def file_options(path, file):
    """(options of the model, class names or None) that a checkpoint holds; ({}, None) of a file
    that does not say, such as a released classifier's, or holds no weights. Raises UserError."""
    weights = weights_of(file)
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        return {}, None                            # load_weights says so
    if isinstance(file.get("model_config"), dict):                   # of train.py
        file = upgraded(file)
        kind = MetaFormerConfig if "depths" in file["model_config"] else ModelConfig
        options = asdict(config_of(path, file["model_config"], kind))
        classes = file.get("classes")
        if not isinstance(classes, list) or len(classes) != options["num_classes"]:
            raise UserError(f"{path} does not name its {options['num_classes']} classes: the "
                            f"checkpoint is damaged")
        return options, classes
    try:
        options = official_fields(path, file, False)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return {}, None
    classes = official_classes(options["num_classes"])
    return options, None if "class 0" in classes else classes


def check_fits(path, options, model):
    """Raises UserError that names the flags which would fit, if the checkpoint's model, whose
    options are a dict, has other layers than `model`."""
    detector = "num_queries" in options
    if not options or not detector and not isinstance(model, MetaFormer):
        return                                     # unknown, or a classifier for the backbone
    if detector and isinstance(model, MetaFormer):
        raise UserError(f"--finetune {path} holds a detector, --model is a classifier: give a "
                        f"--model such as detr_r50, or a classifier's checkpoint")
    if detector and options.get("demo", False) != model.cfg.demo:
        theirs, ours = ("a DETR", "detr_demo") if model.cfg.demo else ("a detr_demo", "a DETR")
        raise UserError(f"--finetune {path} holds {theirs}, this model is {ours}: give the --model "
                        f"of the file")
    names = list(DETECTOR_OPTIONS if detector else CLASSIFIER_OPTIONS)
    if options.get("backbone") in METAFORMERS:
        names.append("backbone_stage")
    ours = {name: getattr(model.cfg, name) for name in names}
    differ = [name for name in names if options.get(name, "") not in ("", ours[name])]
    if differ:
        flags = " ".join(flag(name, options[name]) for name in differ)
        raise UserError(f"--finetune {path} holds a {'detector' if detector else 'classifier'} "
                        f"of {flags}, this model has {' '.join(flag(n, ours[n]) for n in differ)}: "
                        f"give {flags} to start from it")


def flag(name, value):
    """The flag that sets an option to a value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def keep_queries(own, state):
    """Makes the file's queries as many as the model's: the first ones, then the model's. Returns
    lines for the banner. own: the model's state dict, state: the file's, which is changed."""
    key = "query_pos" if "query_pos" in own else "query_embed.weight"
    if key not in own or key not in state or own[key].shape[1:] != state[key].shape[1:] or (
            len(own[key]) == len(state[key])):
        return []
    theirs, n = state[key], len(own[key])
    state[key] = torch.cat([theirs[:n], own[key][len(theirs):]])
    line = f"{key}: the first {min(n, len(theirs))} of the file's {len(theirs)} queries"
    return [line + (f", {n - len(theirs)} newly initialised" if n > len(theirs) else "")]


def keep_classes(own, state, classes, their_classes):
    """Gives each class of the model the row of the file's class head that has its name; the others
    are newly initialised. Arguments and result as of keep_queries."""
    heads = [key for key in own if key.startswith(("class_embed.", "linear_class.", "head.fc2.",
                                                   "head.weight", "head.bias"))]
    heads = [key for key in heads if key in state and own[key].shape[1:] == state[key].shape[1:]]
    if not heads or their_classes == classes:
        return []
    no_object = not heads[0].startswith("head.")                     # a detector's
    if their_classes is None:                      # a released file that does not name its classes
        if own[heads[0]].shape != state[heads[0]].shape:
            for key in heads:
                state[key] = own[key]
            return [f"{', '.join(heads)}: newly initialised"]
        return []
    rows = {k: their_classes.index(name) for k, name in enumerate(classes) if name in their_classes}
    kept = [classes[k] for k in rows]
    if no_object:
        rows[len(classes)] = len(their_classes)
    for key in heads:
        if len(state[key]) != len(their_classes) + no_object:
            raise UserError(f"{key} has {len(state[key])} rows for {len(their_classes)} classes")
        theirs, state[key] = state[key].to(own[key].dtype), own[key].clone()
        state[key][list(rows)] = theirs[list(rows.values())]
    names = f" ({', '.join(kept[:5])}{', ...' if len(kept) > 5 else ''})" if kept else ""
    return [f"{', '.join(heads)}: {len(kept)} of {len(classes)} classes are in the file{names}, "
            f"{len(classes) - len(kept)} newly initialised"]


def keep_positions(own, state):
    """Leaves the positions of the tokens to the model, where one of the two has learned ones and
    the other sine. Arguments and result as of keep_queries."""
    ours, theirs = ({key for key in tensors if key.startswith("backbone.1.")}
                    for tensors in (own, state))
    state.update({key: own[key] for key in ours - theirs})
    for key in theirs - ours:
        del state[key]
    if ours == theirs or "class_embed.bias" not in state:
        return []
    return ["positions: learned ones newly initialised, the file has sine ones" if ours else
            "positions: sine ones, the file's learned ones are left out"]


def load_finetune(model, path, classes):
    """Weights of a checkpoint, a path or URL, for a model with the classes given. Returns lines for
    the banner; raises UserError."""
    file = read_checkpoint(path)
    options, their_classes = file_options(path, file)
    check_fits(path, options, model)

    # the state dict as if it were of this model; load_weights lets the mixers differ, too
    lines, both_detect = [], hasattr(model, "transformer") and "num_queries" in options
    try:
        if options and (both_detect or isinstance(model, MetaFormer)):
            own, state = model.state_dict(), weights_of(file)
            state = {key.removeprefix("detr."): value for key, value in state.items()}
            lines = [*keep_queries(own, state), *keep_classes(own, state, classes, their_classes),
                     *keep_positions(own, state)]
            file = {**file, "model": state} if "model" in file else state
        report = load_weights(model, file, strict=False)
    except UserError as error:
        first, *rest = str(error).splitlines()
        what = first.removeprefix("the state dict ").split(";")[0]
        raise UserError(f"--finetune {path}: {what}" + (f", such as {rest[0]}" if rest else "")
                        ) from None
    if len(report) > 6:                            # the mixers of all layers
        fresh = sum(line.endswith("newly initialised") for line in report)
        report = [f"{fresh} tensors newly initialised, {len(report) - fresh} of the file left out, "
                  f"the first: {report[0]}"]
    return [f"weights  {path}", *(f"         {line}" for line in lines + report or ["all taken"])]


def first_weights(model, cfg, state, classes):
    """Gives the model the weights to start from: of a checkpoint's state, --finetune,
    --frozen_weights or --backbone_weights. Returns lines for the banner."""
    if state:
        if state["classes"] != classes:
            raise UserError(f"the classes of the checkpoint are {state['classes'][:20]}, those of "
                            f"the data {classes[:20]}; --finetune starts with another head")
        load_weights(model, state)
        return []
    if cfg.finetune:
        try:
            return load_finetune(model, cfg.finetune, classes)
        except UserError as error:
            if not cfg.recipe or isinstance(error, UserFileError):
                raise
            raise UserError(f"{error}; or leave out --recipe {cfg.recipe}, which has a network of "
                            f"its own") from None
    if cfg.frozen_weights:
        return load_frozen(model, cfg.frozen_weights)
    if cfg.backbone_weights == "none":
        return ["weights  none: learned from scratch"]
    report = load_backbone(model, cfg.backbone_weights)
    return [f"weights  of the backbone: {cfg.backbone_weights}",
            *(f"         {line}" for line in report or ["all taken"])]


# -- frozen parts --------------------------------------------------------------------------------

def load_frozen(model, path):
    """Gives a model with masks the same detector's weights of a checkpoint, a path or URL. Returns
    lines for the banner; raises UserError."""
    report = load_weights(model, path, strict=False)
    differ = [line for line in report if not line.startswith(MASK_PARTS)]
    if differ:
        raise UserError(f"--frozen_weights {path} is of another detector than this run's:\n"
                        + "\n".join(differ[:20]))
    return [f"weights  {path}, frozen but for the mask head"]


def frozen_classes(cfg):
    """The classes of the detector of --frozen_weights, by its outputs; None without one."""
    if not cfg.frozen_weights:
        return None
    try:
        state = read_checkpoint(cfg.frozen_weights)
    except UserFileError:                          # a run that continues does not need it
        return None
    if "model_config" in state:
        return read_run(cfg.frozen_weights, state)["classes"]
    return official_classes(official_fields(cfg.frozen_weights, state, False)["num_classes"])


# --freeze: the modules and parameters of each part, of DETR and of detr_demo.py
PARTS = {"backbone": ("backbone",),
         "encoder": ("input_proj", "conv", "row_embed", "col_embed", "transformer.encoder"),
         "decoder": ("transformer.decoder", "query_embed", "query_pos"),
         "heads": ("class_embed", "bbox_embed", "linear_class", "linear_bbox")}


def check_freeze(cfg):
    """Raises UserError for parts that the model has not, or where all are frozen."""
    parts = cfg.freeze.split(",") if cfg.freeze else []
    known = ["backbone"] if cfg.model in METAFORMERS else list(PARTS)
    for part in parts:
        if part not in known:
            raise UserError(f"--freeze {cfg.freeze}: {part!r} is no part of {cfg.model}, use some "
                            f"of: {','.join(known)}")
    if {*parts, *([] if cfg.lr_backbone else ["backbone"])} == set(PARTS):
        raise UserError(f"--freeze {cfg.freeze} leaves nothing to train, take out a part, or "
                        f"for the mask head alone give --masks --frozen_weights")


def freeze(model, cfg):
    """Freezes the parts of --freeze, the backbone where --lr_backbone is 0, with --frozen_weights
    all but the mask head: without gradients, without dropout (which the official code leaves on),
    and their norms with the statistics that they have. Of a classifier "backbone" is all but the
    head."""
    if cfg.frozen_weights:
        for name, module in model.named_children():
            if f"{name}." not in MASK_PARTS:
                module.requires_grad_(False).eval()
    parts = cfg.freeze.split(",") if cfg.freeze else []
    if not cfg.lr_backbone and not isinstance(model, MetaFormer):
        parts.append("backbone")
    for part in parts:
        if isinstance(model, MetaFormer):
            head = set(model.head.parameters())
            modules = [module for name, module in model.named_children() if name != "head"]
            frozen = [p for p in model.parameters() if p not in head]
        else:
            names = PARTS[part]
            modules = [module for name, module in model.named_modules() if name in names]
            frozen = [p for name, p in model.named_parameters() if name in names]
            frozen += [p for module in modules for p in module.parameters()]
        for p in frozen:
            p.requires_grad_(False)
        for module in modules:
            module.eval()


# -- weights of the classes ----------------------------------------------------------------------

def class_weights(option, dataset):
    """The weights (K,) float32 of the classes in the loss; None without --class_weights.

    "balanced": those with which each class that has objects weighs the same. Else a JSON file
    {class name: weight}; a class that it does not name has 1. Either way they are brought to 1 on
    average over the objects, so that the loss stays as large as it is without.
    """
    if not option:
        return None
    classes = dataset.classes
    crowd = getattr(dataset, "crowd", np.zeros(len(dataset.labels), bool))
    counts = np.bincount(np.asarray(dataset.labels)[~crowd], minlength=len(classes))
    if option == "balanced":
        weights = counts.sum() / np.count_nonzero(counts) / np.maximum(counts, 1)
        return torch.tensor(np.where(counts, weights, 1.0), dtype=torch.float32)
    what = '{"class name": weight, ...}, or give --class_weights balanced'
    given = read_json(option, what)
    if not isinstance(given, dict):
        raise UserError(f"{option} should hold {what}")
    for name, weight in given.items():
        if name not in classes:
            raise UserError(f"{option}: {name!r} is no class, use some of: "
                            f"{', '.join(classes[:20])}")
        if type(weight) not in (int, float) or not 0 < weight < 1e6:
            raise UserError(f"{option}: the weight {weight!r} of {name!r} should be a number over "
                            f"0 and below a million")
    weights = np.array([given.get(name, 1) for name in classes], np.float64)
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)
