"""A trained model from its file, and the data set to evaluate it on.

    model, info = load_model("out/best.pt")            # of train.py, or an officially released file
"""

from dataclasses import asdict

import torch

from coco_eval import UserError
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig
from data import build_dataset
from checkpoint import (check_located, config_of, load_weights, located_data, official_classes,
                        official_fields, read_checkpoint, read_run)
from options import nearest
from formats import evaluated_share
from model import ModelConfig, build_model
from config import TrainConfig, check_grid, check_size


def load_model(path, name="", dilation=False):
    """A checkpoint's model, and a dict of what belongs to it: "classes" (names by output; "" for
    one that was never used; None for an official classifier), "category_ids", "train" (options it
    was trained with, {} for official files), "things" (bool by class, of panoptic data).

    Official files do not store their configuration. A classifier's name in MODELS must be given; a
    DETR's layout is read off the tensors, DC5 off the name of the file or `dilation`. Raises
    UserError, UserFileError.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict) and "model_config" in state:          # a run of train.py
        if name:
            raise UserError(f"--model {name} is for official files, {path} says what it holds")
        state = read_run(path, state)
        kind = MetaFormerConfig if "depths" in state["model_config"] else ModelConfig
        model_cfg = config_of(path, state["model_config"], kind)
        state["train_config"] = asdict(config_of(path, state["train_config"], TrainConfig))
        check_size(model_cfg)
        model = build_model(model_cfg)
        info = {"classes": state["classes"], "category_ids": state["category_ids"],
                "train": located_data(state), "things": state.get("things")}
    elif name:                                                       # an official classifier
        if name not in METAFORMERS:
            raise UserError(f"--model {name} is no classifier such as poolformer_s12; "
                            f"{nearest(name, METAFORMERS)}")
        model, info = build_model(name), {"classes": None, "train": {}}
    else:                                                            # an official DETR
        model = build_model(ModelConfig(**official_fields(path, state, dilation)))
        K = model.cfg.num_classes
        info = {"classes": official_classes(K), "category_ids": list(range(K)), "train": {}}
    load_weights(model, state)
    return model.to(memory_format=torch.channels_last), info


def evaluation_set(args, model, info):
    """The data set to evaluate on: the command line's, else the checkpoint's."""
    classifier, options = isinstance(model, MetaFormer), dict(info["train"])
    if classifier and (args.val_json or args.val_images or args.max_size):
        raise UserError("--val_json, --val_images and --max_size are for detectors, the "
                        "checkpoint holds a classifier: give --data DIR, --image_size")
    if bool(args.val_json) != bool(args.val_images):
        raise UserError("--val_json and --val_images belong together, give both")
    if not options and not args.data and not args.val_json:
        raise UserError("an official file does not say what to evaluate it on: give --data DIR, "
                        "or for a detector --val_json and --val_images")

    # flags over the checkpoint's options, as the options of a run that is evaluated only
    if not options:
        options = dict(model=args.model or "detr_r50", image_size=224 if classifier else 800)
    if args.data or args.val_json:                                   # (a run names both splits)
        options.update(data=args.data, train_json=args.val_json, train_images=args.val_images,
                       val_json=args.val_json, val_images=args.val_images, overfit=0,
                       val_split=evaluated_share(args.data, info["train"]))
    else:
        check_located(options, args.checkpoint)
    side, max_size = args.image_size or options["image_size"], options.get("max_size", 1333)
    larger = max(max_size, round(max_size * side / options["image_size"]))       # in proportion
    cfg = TrainConfig(**dict(options, image_size=side, max_size=args.max_size or larger))
    if not classifier:
        check_grid(model.cfg, cfg)
    dataset = build_dataset(cfg, "val", info["classes"], getattr(model.cfg, "crop_fraction", 1.0),
                            getattr(model.cfg, "masks", False) and not args.boxes)
    if len(dataset.classes) != model.cfg.num_classes:
        raise UserError(f"{args.data} has {len(dataset.classes)} class folders, the model "
                        f"{model.cfg.num_classes} classes: all must be there, in the order of its "
                        f"outputs when sorted by name")
    return dataset
