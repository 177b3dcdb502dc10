"""Detections drawn on images, and as JSON.

    python predict.py out/ckpt.pt photo.jpg folder/ --out predictions/
    python predict.py detr-r50-e632da11.pth photo.jpg --threshold 0.9 --top 10
    python predict.py detr-r50-panoptic-00ce5173.pth photo.jpg --panoptic
"""

import argparse
import json
import os
import sys

import numpy as np
import torch

from coco_eval import UserError, UserFileError, run_command
from images import IMAGE_SUFFIXES, draw_boxes, draw_masks, read_image
from metaformer import MetaFormer
from data import plan_validation
from evaluate import check_device, check_finite, load_model, postprocess
from segmentation import PanopticWriter, mask_code, masks_over


def find_images(paths):
    """Image files: those named, and those in the folders named, by name. Raises FileNotFoundError
    for a path that is not there, ValueError for a folder without images."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(f for f in os.listdir(path) if f.lower().endswith(IMAGE_SUFFIXES))
            if not found:
                raise UserError(f"folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            files += [os.path.join(path, f) for f in found]
        elif os.path.exists(path):
            files.append(path)
        else:
            raise UserFileError(f"{path} not found: give image files or folders of them")
    return files


def to_pixels(model, image, image_size, max_size):
    """A PIL image in RGB as the network's input, uint8 (1, 3, IH, IW)."""
    h, w = plan_validation(image.height, image.width, image_size, max_size).size
    pixels = torch.from_numpy(np.array(image.resize((w, h), 2))).permute(2, 0, 1)[None]  # bilinear
    return pixels.to(next(model.parameters()).device)


@torch.inference_mode()
def detect_image(model, image, name, size, threshold):
    """postprocess' dict of one PIL image in RGB, its arrays sorted by falling score. Also "masks",
    a list: bool (h, w) where a model with masks scores at least the threshold, else None."""
    pixels, original_size = to_pixels(model, image, *size), (image.height, image.width)
    logits, boxes, masks = masks_over(model, pixels, original_size, threshold)
    found = postprocess(logits[-1], boxes[-1], [original_size])[0]
    check_finite(found, name)
    order = found["scores"].argsort(descending=True)
    sorted_found = {name: values[order].cpu().numpy() for name, values in found.items()}
    return {**sorted_found, "masks": [masks.get(query) for query in order.tolist()]}


def parse_args(argv):
    """The command line as a Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of train.py, or an officially released DETR file")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--out", default="predictions",
                        help="folder of the drawn images and the JSON")
    parser.add_argument("--threshold", type=float, default=None,
                        help="least score that is kept; default 0.7, with --panoptic 0.85")
    parser.add_argument("--panoptic", action="store_true",
                        help="one segment for each pixel, in COCO's panoptic format")
    parser.add_argument("--top", type=int, default=100, help="at most so many detections per image")
    parser.add_argument("--image_size", type=int, default=0, help="shorter side; 0: as in training")
    parser.add_argument("--max_size", type=int, default=0, help="longest side; 0: as in training")
    parser.add_argument("--dilation", action="store_true", help="an official DC5 file, if renamed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    files = find_images(args.images)
    model, info = load_model(args.checkpoint, dilation=args.dilation)
    if isinstance(model, MetaFormer):
        raise UserError(f"{args.checkpoint} holds a classifier, which detects nothing; "
                         f"evaluate.py gives its accuracy")
    model = model.eval().to(check_device(args.device))
    size = (args.image_size or info["train"].get("image_size", 800),
            args.max_size or info["train"].get("max_size", 1333))
    os.makedirs(args.out, exist_ok=True)
    if args.panoptic and not model.cfg.masks:
        raise UserError(f"--panoptic needs masks, the model of {args.checkpoint} has none")
    threshold = args.threshold
    if threshold is None:
        threshold = 0.85 if args.panoptic else 0.7
    # photos in the output folder keep their names
    out = os.path.realpath(args.out)
    written = {os.path.basename(f) for f in files if os.path.dirname(os.path.realpath(f)) == out}
    panoptic = PanopticWriter(model, info, args.out, threshold, written) if args.panoptic else None
    results, failed = [], 0
    for path in files:
        try:
            image = read_image(path)
        except UserError as error:                   # the others are still worth having
            print(f"error: {error}")
            results.append({"file": path, "error": str(error)})
            failed += 1
            continue
        if panoptic:
            panoptic.add(path, image, to_pixels(model, image, *size))
            continue
        found = detect_image(model, image, path, size, threshold)
        keep = np.flatnonzero(found["scores"] >= threshold)[:args.top]
        boxes, scores = found["boxes"][keep], found["scores"][keep]
        names = [info["classes"][k] or f"class {k}" for k in found["labels"][keep]]
        stem, n = os.path.splitext(os.path.basename(path))[0], 2
        name = f"{stem}_detections.jpg"
        while name in written:                       # a photo's, or of one in another folder
            name, n = f"{stem}_detections_{n}.jpg", n + 1
        written.add(name)
        masks = [found["masks"][k] for k in keep] if model.cfg.masks else []
        drawn = draw_boxes(draw_masks(image, masks, names), boxes, names, scores)
        drawn.save(os.path.join(args.out, name), quality=92)
        results.append({"file": path, "drawn": name, "width": image.width, "height": image.height,
                        "detections": [
                            {"class": c, "category_id": info["category_ids"][int(k)],
                             "score": round(float(s), 4),
                             "box_xyxy": [round(float(v), 2) for v in box]}
                            for c, k, s, box in zip(names, found["labels"][keep], scores, boxes)]})
        for detection, mask in zip(results[-1]["detections"], masks):
            detection["segmentation"] = mask_code(mask)
        print(f"{path}: {', '.join(f'{c} {s:.2f}' for c, s in zip(names, scores)) or 'nothing'}")
    if panoptic:
        panoptic.close()
    else:
        with open(os.path.join(args.out, "predictions.json"), "w") as file:
            json.dump(results, file, indent=1)
        print(f"{len(files) - failed} image(s) drawn, and predictions.json, in {args.out}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                # names of files can be any
    run_command(main)
