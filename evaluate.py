"""Evaluation of a model: its detections, COCO's average precision; top-1 of a classifier.

    python evaluate.py out/ckpt.pt                                  # its own validation set
    python evaluate.py detr-r50-e632da11.pth --data coco            # officially released weights
    python evaluate.py out/ckpt.pt --val_json a.json --val_images DIR --save_json detections.json
    python evaluate.py poolformer_s12.pth.tar --model poolformer_s12 --data imagenet
    python evaluate.py --gt instances.json --dt detections.json     # anybody's detections, no model
    python evaluate.py out/ckpt.pt --layers --errors confusion.png --queries queries.png

How average precision is computed is told in coco_eval.py, up to its line "masks".
Papers: COCO, arXiv:1405.0312; DETR, arXiv:2005.12872.
"""

import json
import math
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import coco_eval as coco_eval_py
import diagnose
from coco_eval import (FlagParser, UserError, ap_table, check_output, coco_eval, evaluate_columns,
                       result_json, run_command, summary, writing)
from processes import check_device, gather
from metaformer import MetaFormer
from classification import accuracy_json, accuracy_table, class_accuracy, class_rows
from data import EvalSampler, collate, cxcywh_to_xyxy, to_device
from load import evaluation_set, load_model


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
    logits, boxes = (x[-1].cpu() for x in outputs[:2])              # of the last decoder layer
    rows = []
    found = postprocess(logits, boxes, [t["orig_size"] for t in targets])
    for target, d in zip(targets, found):
        check_finite(d, dataset.image_ids[target["index"]])
        x1y1, x2y2 = d["boxes"][:, :2], d["boxes"][:, 2:]
        image = torch.full((len(x1y1), 1), target["index"], dtype=torch.float64)
        rows.append(torch.cat([image, d["labels"][:, None], d["scores"][:, None], x1y1,
                               x2y2 - x1y1], 1))
    return torch.cat(rows)


def layer_rows(outputs, targets, dataset):
    """detection_rows after every decoder layer, the first layer first."""
    return torch.cat([detection_rows([x[None] for x in layer], targets, dataset)
                      for layer in zip(*outputs[:2])])


# -- evaluation on one process or many -----------------------------------------------------------

def autocast(device, dtype):
    """The context in which the network runs; dtype float32: none."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def with_progress(loader):
    """The batches of a loader. After 20, 40, 80, ... seconds rank 0 prints on stderr how many."""
    begin, due = time.time(), 20
    for k, batch in enumerate(loader, 1):
        passed = time.time() - begin
        if passed > due and not (dist.is_initialized() and dist.get_rank()):
            left = passed / k * (len(loader) - k)
            print(f"evaluation: batch {k} of {len(loader)}, {left:.0f} s left", file=sys.stderr)
            due *= 2
        yield batch


@torch.inference_mode()
def collect_rows(model, loader, device, dtype, rows_of, losses_of=None):
    """Rows float64 (n, ...) for all images of the data set, ordered by image, and losses added up
    over all batches, numbers by name; the same on each process.

    rows_of(outputs, targets, dataset): those of a batch, the image's index in the first column;
    losses_of(outputs, targets): its share in the losses, 0-dim tensors by name; None: no losses.
    """
    model.eval()
    rows, losses = [], []
    for images, valid, targets in with_progress(loader):
        with autocast(device, dtype):
            outputs = model(*to_device(images, valid, device))
        rows.append(rows_of(outputs, targets, loader.dataset))
        shares = losses_of(outputs, targets) if losses_of else {}
        losses.append({name: value.item() for name, value in shares.items()})

    # those of all processes, of which the last ones may have no batch
    everyone = gather((rows, losses))
    rows = torch.cat(sum([theirs for theirs, _ in everyone], []))
    losses = sum([theirs for _, theirs in everyone], [])
    total = {name: math.fsum(shares[name] for shares in losses) for name in losses[0]}
    return rows[rows[:, 0].argsort(stable=True)], total


def evaluate_rows(rows, dataset):
    """The dict of evaluate_columns for the detections (D, 7) of all images, sorted by image, and in
    it "rows", these detections, "classes" and "category_ids"."""
    r = rows.numpy()
    found = {"image": r[:, 0].astype(np.int64), "category": r[:, 1].astype(np.int64),
             "score": r[:, 2], "box": r[:, 3:]}
    result = evaluate_columns(dataset.columns(), found, len(dataset.classes))
    return {**result, "rows": rows, "classes": dataset.classes,
            "category_ids": dataset.category_ids}


def evaluate(model, loader, device, dtype=torch.float32, losses_of=None, rows_of=detection_rows):
    """The COCO evaluation of a detector on all images, the same at any number of processes.

    loader: over an EvalSampler of the data set, collated; each process has its share of the
    batches. dtype: of autocast. losses_of, rows_of: see collect_rows. Returns the dict of
    evaluate_rows, and in it "losses"; with masks also what evaluate_masks adds; of a classifier
    that of evaluate_classifier.
    """
    if isinstance(model, MetaFormer):
        return evaluate_classifier(model, loader, device, dtype, losses_of)
    if loader.dataset.masks and rows_of is detection_rows:
        from segmentation import evaluate_masks    # here, as that file imports this one
        return evaluate_masks(model, loader, device, dtype, losses_of)
    rows, losses = collect_rows(model, loader, device, dtype, rows_of, losses_of)
    return {**evaluate_rows(rows, loader.dataset), "losses": losses}


def evaluate_layers(rows, dataset, num_layers):
    """The dicts of evaluate_rows after every decoder layer, of the layer_rows of all images."""
    rows = rows.reshape(len(dataset), num_layers, -1, 7)                        # (images, L, Q, 7)
    return [evaluate_rows(layer.reshape(-1, 7), dataset) for layer in rows.unbind(1)]


def evaluate_classifier(model, loader, device, dtype=torch.float32, losses_of=None):
    """class_accuracy's dict of a classifier, with "losses"; arguments as in evaluate."""
    rows, losses = collect_rows(model, loader, device, dtype, class_rows, losses_of)
    return {**class_accuracy(rows, loader.dataset), "losses": losses}


def coco_results(rows, dataset, masks=None):
    """Detections (D, 7) as a list of dicts in COCO's results format, with the original ids; masks:
    of each detection a dict with its "segmentation"."""
    image_ids = dataset.image_ids.tolist()
    return [{"image_id": image_ids[int(i)], "category_id": dataset.category_ids[int(k)],
             "bbox": [round(v, 3) for v in box], "score": score, **mask}
            for (i, k, score, *box), mask in zip(rows.tolist(), masks or [{}] * len(rows))
            if dataset.category_ids[int(k)] is not None]


# -- python evaluate.py --------------------------------------------------------------------------

def parse_args(argv):
    """The command line as a Namespace."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="of train.py, or an officially released file")
    add("--data", default="",
        help="folder in COCO, YOLO or VOC format; classifiers: val/<class>/*.jpg")
    add("--model", default="", help="of an official classifier's file: its name")
    add("--val_json", default="", help="COCO instances file of any layout")
    add("--val_images", default="", help="its image folder")
    add("--save_json", default="", help="write the detections in COCO results format")
    add("--json", default="", help="write all numbers and curves there")
    add("--image_size", type=int, default=0, help="shorter side; 0: as in training, 800")
    add("--max_size", type=int, default=0, help="longest side; 0: as in training, 1333, "
        "in proportion if --image_size is larger")
    add("--boxes", action="store_true", help="the boxes of a model with masks")
    add("--batch_size", type=int, default=4, help="images of like shape at a time")
    add("--dilation", action="store_true", help="an official DC5 file, if renamed")
    add("--num_workers", type=int, default=2, help="loader processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    diagnose.add_flags(parser)
    return parser.parse_args(argv)


def measure(model, loader, args):
    """(result, layers): the dict of evaluate and, with --layers, those after each decoder layer."""
    layers = []
    try:
        if args.layers:                            # of all layers in one pass, masks in another
            rows, _ = collect_rows(model, loader, args.device, torch.float32, layer_rows)
            layers = evaluate_layers(rows, loader.dataset, model.cfg.dec_layers)
        again = not layers or loader.dataset.masks
        return evaluate(model, loader, args.device) if again else layers[-1], layers
    except UserError as error:
        raise type(error)(f"{args.checkpoint}: {error}") from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--gt", "--dt") for word in argv):
        return coco_eval_py.main(argv)                               # no model is needed
    args = parse_args(argv)
    model, info = load_model(args.checkpoint, args.model, args.dilation)
    classifier = isinstance(model, MetaFormer)
    if classifier and (args.save_json or args.errors or args.layers or args.queries):
        raise UserError("--save_json, --errors, --layers and --queries are not for classifiers")
    dataset = evaluation_set(args, model, info)
    inputs = [args.checkpoint, getattr(dataset, "source", "")]
    for flag in ("save_json", "errors", "queries", "json"):
        check_output(f"--{flag}", vars(args)[flag], *inputs)
        inputs.append(vars(args)[flag])
    c = model.cfg
    what = f"classifier, mixers {c.mixers}" if classifier else (
        f"{c.backbone}, encoder {c.encoder_mixer or c.mixer}, decoder {c.decoder_mixer or c.mixer}")
    print(f"{args.checkpoint}: {what}; {len(dataset)} images, "
          f"{sum(map(bool, dataset.classes))} classes; {args.device}, float32", *dataset.notes,
          sep="\n")

    loader = DataLoader(dataset, batch_sampler=EvalSampler(dataset, args.batch_size),
                        num_workers=args.num_workers, collate_fn=collate)
    torch.backends.cudnn.allow_tf32 = False                          # True is torch's default
    result, layers = measure(model.to(check_device(args.device)), loader, args)
    more, text = diagnose.probe(result, args.errors, args.threshold, args.queries, dataset, layers)
    if args.save_json:
        with writing(args.save_json), open(args.save_json, "w") as file:
            json.dump(coco_results(result["rows"], dataset, result.get("masks")), file)
    table = accuracy_table(result) if classifier else f"{summary(result)}\n\n{ap_table(result)}"
    print(table, *text, sep="\n\n")
    if "segm" in result:                           # the numbers above are those of the boxes
        from segmentation import print_masks
        more |= print_masks(result)
    if args.json:
        with writing(args.json), open(args.json, "w") as file:
            json.dump(accuracy_json(result) if classifier else result_json(result) | more, file)
    for what, path in (("detections", args.save_json), ("numbers and curves", args.json)):
        if path:
            print(f"{what}: {path}")


if __name__ == "__main__":
    run_command(main)
