"""Evaluation: detections of a model and the COCO average precision in numpy; top-1 of a classifier.

    python evaluate.py out/ckpt.pt                                  # its own validation set
    python evaluate.py detr-r50-e632da11.pth --data coco            # officially released weights
    python evaluate.py out/ckpt.pt --val_json a.json --val_images DIR --save_json detections.json
    python evaluate.py poolformer_s12.pth.tar --model poolformer_s12 --data imagenet
    python evaluate.py --gt instances.json --dt detections.json     # anybody's detections, no model

Papers: COCO, arXiv:1405.0312, and cocodataset.org/#detection-eval; DETR, arXiv:2005.12872.
"""

import argparse
import json
import os
import re
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import coco_eval as coco_eval_py
from coco_eval import ap_table, coco_eval, evaluate_columns, summary
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig
from classification import (ImageFolder, ShapesClassification, accuracy_table, class_accuracy,
                            class_rows)
from data import (COCO_CLASSES, CocoDataset, EvalSampler, ShapesDataset, coco_paths, collate,
                  cxcywh_to_xyxy, to_device)
from checkpoint import load_weights, read_checkpoint
from model import ModelConfig, build_model


# -- from the network's outputs to detections ----------------------------------------------------

def postprocess(logits, boxes, sizes):
    """The best class of every query and its box in pixels: a list of B dicts.

    logits (B, Q, K+1) and boxes (B, Q, 4) of the last decoder layer; sizes (B, 2) original (height,
    width). Each dict: "scores" (Q,) in [0, 1], "labels" (Q,) int64 class indices, "boxes" (Q, 4)
    xyxy pixels. No threshold, no suppression, no clipping. Source: arXiv:2005.12872, Appendix A.4.
    """
    scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)               # (B, Q)
    h, w = torch.as_tensor(sizes, dtype=torch.float32, device=boxes.device).unbind(1)
    boxes = cxcywh_to_xyxy(boxes.float()) * torch.stack([w, h, w, h], 1)[:, None]
    return [dict(scores=s, labels=k, boxes=b) for s, k, b in zip(scores, labels, boxes)]


@torch.inference_mode()
def collect_rows(model, loader, device, dtype, rows_of, width):
    """Rows (n, width) float64 of all batches of this process: rows_of(outputs, targets, dataset)."""
    model.eval()
    rows = [torch.zeros(0, width, dtype=torch.float64)]
    for images, valid, targets in loader:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            outputs = model(*to_device(images, valid, device))
        rows.append(rows_of(outputs, targets, loader.dataset))
    return torch.cat(rows)


def detection_rows(outputs, targets, dataset):
    """Detections of a batch: float64 (D, 7) of image index, class, score, x, y, w, h."""
    logits, boxes = outputs
    rows = []
    for target, d in zip(targets, postprocess(logits[-1], boxes[-1],
                                              [t["orig_size"] for t in targets])):
        xywh = torch.cat([d["boxes"][:, :2], d["boxes"][:, 2:] - d["boxes"][:, :2]], 1)
        image = torch.full_like(d["scores"], target["index"], dtype=torch.float64)
        row = torch.cat([image[:, None], d["labels"][:, None], d["scores"][:, None], xywh], 1)
        rows.append(row.double().cpu())
    return torch.cat(rows)


def detect(model, loader, device, dtype=torch.float32):
    """All detections of this process: float64 (D, 7) of image index, class, score, x, y, w, h."""
    return collect_rows(model, loader, device, dtype, detection_rows, 7)


def gather_rows(rows):
    """The rows (n, ...) of all processes, on each: n is gathered first, the rest padded to it."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = rows.new_zeros(max(map(int, counts)), rows.shape[1])
    padded[:len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(n)] for part, n in zip(parts, counts)])


def classify(model, loader, device, dtype=torch.float32):
    """class_rows of all images of this process."""
    return collect_rows(model, loader, device, dtype, class_rows, 5)


def evaluate(model, loader, device, dtype=torch.float32):
    """The evaluation of a model on all images, equal at any number of processes.

    loader: over an EvalSampler of the data set, collated; each process has its share of the
    batches. dtype: of the autocast. Of a classifier class_accuracy's dict. Of a detector
    evaluate_columns', and with it "rows", detect()'s of all images in the order of the images,
    "classes" and "category_ids".
    """
    dataset, classifier = loader.dataset, isinstance(model, MetaFormer)
    rows = gather_rows((classify if classifier else detect)(model, loader, device, dtype))
    rows = rows[rows[:, 0].argsort(stable=True)]                     # whichever process had it
    if classifier:
        return class_accuracy(rows, dataset)
    r = rows.numpy()
    found = {"image": r[:, 0].astype(np.int64), "category": r[:, 1].astype(np.int64),
             "score": r[:, 2], "box": r[:, 3:]}
    result = evaluate_columns(dataset.columns(), found, len(dataset.classes))
    return {**result, "rows": rows, "classes": dataset.classes,
            "category_ids": dataset.category_ids}


def coco_results(rows, dataset):
    """Detections (D, 7) as a list of dicts in COCO's results format, with the original ids."""
    image_ids = dataset.image_ids.tolist()
    return [{"image_id": image_ids[int(i)], "category_id": dataset.category_ids[int(k)],
             "bbox": [round(v, 3) for v in box], "score": score}
            for i, k, score, *box in rows.tolist() if dataset.category_ids[int(k)] is not None]


# -- python evaluate.py --------------------------------------------------------------------------

def load_model(path, name="", dilation=False):
    """A checkpoint's model, and a dict of what belongs to it: "classes" (names by output; "" for
    one that was never used), "train" (options it was trained with, {} for official files).

    Official files say nothing of themselves. Of a classifier the name in MODELS must be given. Of
    a DETR the layout is read off the tensors, DC5 off the name of the file or `dilation`. Raises
    as read_checkpoint and load_weights do.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict) and "model_config" in state:
        if name:
            raise ValueError(f"--model {name} is for official files, {path} says what it holds")
        config = MetaFormerConfig if "depths" in state["model_config"] else ModelConfig
        model = build_model(config(**state["model_config"]))
        info = {"classes": state["classes"], "category_ids": state["category_ids"],
                "train": state["train_config"]}
    elif name:
        if name not in METAFORMERS:
            raise ValueError(f"--model {name} is no classifier: {', '.join(METAFORMERS)}")
        model, info = build_model(name), {"classes": None, "train": {}}
    else:
        weights = state.get("model", state) if isinstance(state, dict) else {}
        if not {"class_embed.bias", "query_embed.weight"} <= set(weights):
            raise ValueError(f"{path} holds no detector: give a checkpoint of train.py or an "
                             f"officially released DETR file (evaluate.py also takes a "
                             f"classifier's, with --model NAME)")
        args = state.get("args")                                     # of training checkpoints
        dilation |= "dc5" in os.path.basename(path) or getattr(args, "dilation", False)
        model = build_model(official_config(weights, dilation, getattr(args, "nheads", 8)))
        K = model.cfg.num_classes
        names = COCO_CLASSES if K == len(COCO_CLASSES) else [f"class {k}" for k in range(K)]
        info = {"classes": list(names), "category_ids": list(range(K)), "train": {}}
    load_weights(model, state)
    return model.to(memory_format=torch.channels_last), info


def check_device(device):
    """The device's name, if it can be used; ValueError otherwise."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    return device


def official_config(state, dilation, nheads):
    """The ModelConfig of an official DETR's state dict."""
    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
    stage3 = count("backbone.0.body.layer3.")
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    backbone = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50",
                (True, 23): "resnet101"}.get((bottleneck, stage3), "")
    ff, C = state["transformer.decoder.layers.0.linear1.weight"].shape
    return ModelConfig(
        backbone=backbone, dilation=dilation, nheads=nheads, hidden_dim=C, dim_feedforward=ff,
        position_embedding="learned" if "backbone.1.row_embed.weight" in state else "sine",
        enc_layers=count("transformer.encoder.layers."),
        dec_layers=count("transformer.decoder.layers."),
        pre_norm="transformer.encoder.norm.weight" in state,
        num_queries=len(state["query_embed.weight"]),
        num_classes=len(state["class_embed.bias"]) - 1)


def find_class_images(args, info, cfg):
    """The images a classifier is evaluated on: those of the command line, else the checkpoint's."""
    if args.val_json or args.val_images or args.max_size:
        raise ValueError("--val_json, --val_images and --max_size are for detectors, the "
                         "checkpoint holds a classifier: give --data DIR, --image_size")
    train, data = info["train"], args.data or info["train"].get("data")
    size = args.image_size or train.get("image_size", 224)
    split = "train" if train.get("overfit") and not args.data else "val"
    if data:
        dataset = ImageFolder(data, split, size, cfg.crop_fraction, classes=info["classes"])
    elif train:
        dataset = ShapesClassification(split, train[f"{split}_shapes"], size)
    else:
        raise ValueError("an official file does not say what to evaluate it on: give --data DIR")
    if len(dataset.classes) != cfg.num_classes:
        raise ValueError(f"{data} has {len(dataset.classes)} class folders, the model "
                         f"{cfg.num_classes} classes: all must be there, in the order of its "
                         f"outputs when sorted by name")
    return dataset.keep(train["overfit"]) if split == "train" else dataset


def find_validation(args, info):
    """The data set to evaluate on: that of the command line, else that of the checkpoint."""
    train = info["train"]
    size = dict(image_size=args.image_size or train.get("image_size", 800),
                max_size=args.max_size or train.get("max_size", 1333))
    if bool(args.val_json) != bool(args.val_images):
        raise ValueError("--val_json and --val_images belong together, give both")
    overfit = 0 if args.data or args.val_json else train.get("overfit", 0)
    split = "train" if overfit else "val"                            # of --overfit: its own images
    data = args.data or (not args.val_json and train.get("data"))
    if data:
        paths = coco_paths(data, split)
    else:
        paths = (args.val_json or train.get(f"{split}_json"),
                 args.val_images or train.get(f"{split}_images"))
    if paths[0]:
        dataset = CocoDataset(*paths, **size, classes=info["classes"])
    elif train:
        dataset = ShapesDataset(split, train[f"{split}_shapes"], size["image_size"])
    else:
        raise ValueError("an official file does not say what to evaluate it on: give --data DIR, "
                         "or --val_json and --val_images")
    return dataset.keep(overfit) if overfit else dataset


def result_json(result):
    """A result as a dict for json.dump: of a detector see coco_eval.py, of a classifier the
    numbers by name and by class (null: no images)."""
    if "precision" in result:
        return coco_eval_py.result_json(result)
    rows = zip(result["classes"], result["images"].tolist(), result["accuracy"].tolist())
    return {**dict(zip(("top1", "top5", "mean_over_classes"), result["stats"].tolist())),
            "per_class": [{"name": name, "images": n, "top1": accuracy if n else None}
                          for name, n, accuracy in rows]}


def parse_args(argv):
    """The command line as a Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of train.py, or an officially released file")
    parser.add_argument("--data", default="",
                        help="COCO: annotations/, val2017/; classifiers: val/<class>/*.jpg")
    parser.add_argument("--model", default="", help="of an official classifier's file: its name")
    parser.add_argument("--val_json", default="", help="COCO instances file of any layout")
    parser.add_argument("--val_images", default="", help="its image folder")
    parser.add_argument("--save_json", default="",
                        help="write the detections in COCO results format")
    parser.add_argument("--image_size", type=int, default=0,
                        help="shorter side; 0: as in training, 800")
    parser.add_argument("--max_size", type=int, default=0,
                        help="longest side; 0: as in training, 1333")
    parser.add_argument("--batch_size", type=int, default=4, help="images of like shape at a time")
    parser.add_argument("--dilation", action="store_true", help="an official DC5 file, if renamed")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", help="write all numbers and curves there")
    return parser.parse_args(argv)


def evaluate_checkpoint(args):
    """The result of the model in args.checkpoint, its detections saved if asked for."""
    model, info = load_model(args.checkpoint, args.model, args.dilation)
    classifier = isinstance(model, MetaFormer)
    if classifier and args.save_json:
        raise ValueError("--save_json is for detections, the checkpoint holds a classifier")
    dataset = (find_class_images(args, info, model.cfg) if classifier else
               find_validation(args, info))
    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, args.batch_size),
                        num_workers=args.num_workers, collate_fn=collate)
    what = (f"classifier, mixers {model.cfg.mixers}" if classifier else
            f"{model.cfg.backbone}, {model.cfg.mixer}")
    print(f"{args.checkpoint}: {what}; {len(dataset)} images, "
          f"{sum(map(bool, dataset.classes))} classes; {args.device}, float32", *dataset.notes,
          sep="\n")
    result = evaluate(model.to(check_device(args.device)), loader, args.device)
    if args.save_json:
        with open(args.save_json, "w") as file:
            json.dump(coco_results(result["rows"], dataset), file)
        print(f"detections: {args.save_json}")
    return result


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(str(flag).split("=")[0] in ("--gt", "--dt") for flag in argv):
        return coco_eval_py.main(argv)
    args = parse_args(argv)
    folder = os.path.dirname(args.json) or "."
    if args.json and (not os.path.isdir(folder) or os.path.isdir(args.json)):
        raise ValueError(f"--json {args.json} should be a file in a folder that is there")
    result = evaluate_checkpoint(args)
    tables = (summary, ap_table) if "precision" in result else (accuracy_table,)
    print("\n\n".join(table(result) for table in tables))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result_json(result), file)
        print(f"numbers and curves: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, IndexError) as error:
        text = re.split(r"\n\w+Error: ", str(error))[-1].strip()     # without a worker's traceback
        sys.exit(f"error: {text}")
