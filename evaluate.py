"""Evaluation of a model: its detections, COCO's average precision; top-1 of a classifier.

    python evaluate.py out/ckpt.pt                                  # its own validation set
    python evaluate.py detr-r50-e632da11.pth --data coco            # officially released weights
    python evaluate.py out/ckpt.pt --val_json a.json --val_images DIR --save_json detections.json
    python evaluate.py poolformer_s12.pth.tar --model poolformer_s12 --data imagenet
    python evaluate.py --gt instances.json --dt detections.json     # anybody's detections, no model

How average precision is computed is told in coco_eval.py, up to its line "masks".
Papers: COCO, arXiv:1405.0312; DETR, arXiv:2005.12872.
"""

import argparse
import json
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import coco_eval as coco_eval_py
from coco_eval import (UserError, ap_table, check_output, coco_eval, evaluate_columns, result_json,
                       run_command, summary)
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig
from classification import accuracy_json, accuracy_table, class_accuracy, class_rows
from data import EvalSampler, build_dataset, collate, cxcywh_to_xyxy, to_device
from checkpoint import (check_known, check_located, load_weights, located_data, official_classes,
                        official_fields, read_checkpoint, read_run)
from model import ModelConfig, build_model
from config import TrainConfig, check_grid


# -- from the network's outputs to detections ----------------------------------------------------

def postprocess(logits, boxes, sizes):
    """The best class of every query and its box in pixels: a list of B dicts.

    logits (B, Q, K+1) and boxes (B, Q, 4) of the last decoder layer; sizes (B, 2) original (height,
    width). Each dict: "scores" (Q,) in [0, 1], "labels" (Q,) int64 class indices, "boxes" (Q, 4)
    xyxy pixels. No threshold, no suppression, no clipping. Source: arXiv:2005.12872, Appendix A.4.
    """
    # softmax over classes and no-object: change it here, in matching_cost and set_loss together
    scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)               # (B, Q)
    h, w = torch.as_tensor(sizes, dtype=torch.float32, device=boxes.device).unbind(1)
    boxes = cxcywh_to_xyxy(boxes.float()) * torch.stack([w, h, w, h], 1)[:, None]
    return [dict(scores=s, labels=k, boxes=b) for s, k, b in zip(scores, labels, boxes)]


def check_finite(detections, image):
    """Raises UserError if boxes or scores of postprocess' dict are NaN or infinite."""
    if not all(values.isfinite().all() for values in detections.values()):
        raise UserError(f"the detections of image {image} are not finite: the model's weights are "
                        f"spoilt, train it anew")


def detection_rows(outputs, targets, dataset):
    """Detections of a batch: float64 (D, 7) of image index, class, score, x, y, w, h."""
    logits, boxes, *_ = outputs                                     # of all decoder layers
    rows = []
    found = postprocess(logits[-1], boxes[-1], [t["orig_size"] for t in targets])
    for target, d in zip(targets, found):
        check_finite(d, dataset.image_ids[target["index"]])
        x1y1, x2y2 = d["boxes"][:, :2], d["boxes"][:, 2:]
        image = torch.full_like(d["scores"], target["index"], dtype=torch.float64)
        row = torch.cat([image[:, None], d["labels"][:, None], d["scores"][:, None], x1y1,
                         x2y2 - x1y1], 1)                           # float64, as image is
        rows.append(row.cpu())
    return torch.cat(rows)


# -- evaluation on one process or many -----------------------------------------------------------

def autocast(device, dtype):
    """The context in which the network runs; dtype float32: none."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def sum_over_processes(tensor):
    """The sum of a CPU tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows):
    """The rows (n, ...) of all processes, on each; as n differs, all are padded to the largest."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = rows.new_zeros(max(map(int, counts)), rows.shape[1])
    padded[:len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(n)] for part, n in zip(parts, counts)])


@torch.inference_mode()
def collect_rows(model, loader, device, dtype, rows_of, width):
    """Rows (n, width) float64 for all images of the data set, ordered by image, on each process.

    rows_of(outputs, targets, dataset): those of a batch, the image's index in the first column.
    """
    model.eval()
    rows = [torch.zeros(0, width, dtype=torch.float64)]             # a process may have no batch
    for images, valid, targets in loader:
        with autocast(device, dtype):
            outputs = model(*to_device(images, valid, device))
        rows.append(rows_of(outputs, targets, loader.dataset))
    rows = gather_rows(torch.cat(rows))
    return rows[rows[:, 0].argsort(stable=True)]


def evaluate(model, loader, device, dtype=torch.float32, rows_of=detection_rows):
    """The COCO evaluation of a detector on all images, the same at any number of processes.

    loader: over an EvalSampler of the data set, collated; each process has its share of the
    batches. dtype: of autocast. Returns evaluate_columns' dict, and in it "rows", the detections
    (D, 7) of detection_rows, "classes" and "category_ids". For a classifier: evaluate_classifier.
    """
    if isinstance(model, MetaFormer):
        return evaluate_classifier(model, loader, device, dtype)
    if model.cfg.masks and rows_of is detection_rows:
        from segmentation import evaluate_masks    # here, as that file imports this one
        return evaluate_masks(model, loader, device, dtype)
    dataset = loader.dataset
    rows = collect_rows(model, loader, device, dtype, rows_of, 7)
    r = rows.numpy()
    found = {"image": r[:, 0].astype(np.int64), "category": r[:, 1].astype(np.int64),
             "score": r[:, 2], "box": r[:, 3:]}
    result = evaluate_columns(dataset.columns(), found, len(dataset.classes))
    return {**result, "rows": rows, "classes": dataset.classes,
            "category_ids": dataset.category_ids}


def evaluate_classifier(model, loader, device, dtype=torch.float32):
    """class_accuracy's dict of a classifier; arguments as in evaluate."""
    rows = collect_rows(model, loader, device, dtype, class_rows, 5)
    return class_accuracy(rows, loader.dataset)


def coco_results(rows, dataset, masks=None):
    """Detections (D, 7) as a list of dicts in COCO's results format, with the original ids; masks:
    of each detection a dict with its "segmentation"."""
    image_ids = dataset.image_ids.tolist()
    return [{"image_id": image_ids[int(i)], "category_id": dataset.category_ids[int(k)],
             "bbox": [round(v, 3) for v in box], "score": score, **mask}
            for (i, k, score, *box), mask in zip(rows.tolist(), masks or [{}] * len(rows))
            if dataset.category_ids[int(k)] is not None]


# -- python evaluate.py --------------------------------------------------------------------------

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
        check_known(path, state["model_config"], kind)
        model = build_model(kind(**state["model_config"]))
        info = {"classes": state["classes"], "category_ids": state["category_ids"],
                "train": located_data(state), "things": state.get("things")}
    elif name:                                                       # an official classifier
        if name not in METAFORMERS:
            raise UserError(f"--model {name} is no classifier: {', '.join(METAFORMERS)}")
        model, info = build_model(name), {"classes": None, "train": {}}
    else:                                                            # an official DETR
        model = build_model(ModelConfig(**official_fields(path, state, dilation)))
        K = model.cfg.num_classes
        info = {"classes": official_classes(K), "category_ids": list(range(K)), "train": {}}
    load_weights(model, state)
    return model.to(memory_format=torch.channels_last), info


def check_device(device):
    """The device's name, if it can be used; UserError otherwise."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used: {reason}") from None
    return device


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
                       val_json=args.val_json, val_images=args.val_images, overfit=0)
    else:
        check_located(options, args.checkpoint)
    options["image_size"] = args.image_size or options["image_size"]
    options["max_size"] = args.max_size or options.get("max_size", 1333)
    cfg = TrainConfig(**dict(options, max_size=max(options["max_size"], options["image_size"])))
    if not classifier:
        check_grid(model.cfg, cfg)
    dataset = build_dataset(cfg, "val", info["classes"], getattr(model.cfg, "crop_fraction", 1.0),
                            getattr(model.cfg, "masks", False))
    if len(dataset.classes) != model.cfg.num_classes:
        raise UserError(f"{args.data} has {len(dataset.classes)} class folders, the model "
                        f"{model.cfg.num_classes} classes: all must be there, in the order of its "
                        f"outputs when sorted by name")
    return dataset


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
    parser.add_argument("--json", default="", help="write all numbers and curves there")
    parser.add_argument("--image_size", type=int, default=0,
                        help="shorter side; 0: as in training, 800")
    parser.add_argument("--max_size", type=int, default=0,
                        help="longest side; 0: as in training, 1333")
    parser.add_argument("--batch_size", type=int, default=4, help="images of like shape at a time")
    parser.add_argument("--dilation", action="store_true", help="an official DC5 file, if renamed")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--gt", "--dt") for word in argv):
        return coco_eval_py.main(argv)                               # no model is needed
    args = parse_args(argv)
    model, info = load_model(args.checkpoint, args.model, args.dilation)
    classifier = isinstance(model, MetaFormer)
    if classifier and args.save_json:
        raise UserError("--save_json is for detections, the checkpoint holds a classifier")
    dataset = evaluation_set(args, model, info)
    for flag, path in (("--json", args.json), ("--save_json", args.save_json)):
        check_output(flag, path, args.checkpoint, getattr(dataset, "source", ""))
    c = model.cfg
    what = f"classifier, mixers {c.mixers}" if classifier else (
        f"{c.backbone}, encoder {c.encoder_mixer or c.mixer}, decoder {c.decoder_mixer or c.mixer}")
    print(f"{args.checkpoint}: {what}; {len(dataset)} images, "
          f"{sum(map(bool, dataset.classes))} classes; {args.device}, float32", *dataset.notes,
          sep="\n")

    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, args.batch_size),
                        num_workers=args.num_workers, collate_fn=collate)
    result = evaluate(model.to(check_device(args.device)), loader, args.device)
    if args.save_json:
        with open(args.save_json, "w") as file:
            json.dump(coco_results(result["rows"], dataset, result.get("masks")), file)
    numbers = accuracy_json(result) if classifier else result_json(result)
    print(accuracy_table(result) if classifier else f"{summary(result)}\n\n{ap_table(result)}")
    if "segm" in result:
        from segmentation import print_masks
        numbers |= print_masks(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(numbers, file)
    for what, path in (("detections", args.save_json), ("numbers and curves", args.json)):
        if path:
            print(f"{what}: {path}")


if __name__ == "__main__":
    run_command(main)
