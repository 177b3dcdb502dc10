"""Detections drawn on images, and as JSON.

    python predict.py out/ckpt.pt photo.jpg folder/ --out predictions/
    python predict.py detr-r50-e632da11.pth photo.jpg --threshold 0.9 --top 10
"""

import argparse
import json
import os
import sys

import numpy as np
import torch

from coco_eval import UserError, UserFileError, run_command, writing
from images import IMAGE_SUFFIXES, draw_boxes, read_image
from metaformer import MetaFormer
from data import plan_validation
from evaluate import check_device, check_finite, load_model, postprocess


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


@torch.inference_mode()
def detect_image(model, image, name, image_size, max_size):
    """postprocess' dict of one PIL image in RGB, its arrays sorted by falling score."""
    h, w = plan_validation(image.height, image.width, image_size, max_size).size
    pixels = torch.from_numpy(np.array(image.resize((w, h), 2))).permute(2, 0, 1)[None]  # bilinear
    logits, boxes = model(pixels.to(next(model.parameters()).device))
    found = postprocess(logits[-1], boxes[-1], [(image.height, image.width)])[0]
    check_finite(found, name)
    order = found["scores"].argsort(descending=True)
    return {name: values[order].cpu().numpy() for name, values in found.items()}


def parse_args(argv):
    """The command line as a Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of train.py, or an officially released DETR file")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--out", default="predictions",
                        help="folder of the drawn images and the JSON")
    parser.add_argument("--threshold", type=float, default=0.7, help="least score that is kept")
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
    with writing(args.out):
        os.makedirs(args.out, exist_ok=True)
    # photos in the output folder keep their names
    out = os.path.realpath(args.out)
    written = {os.path.basename(f) for f in files if os.path.dirname(os.path.realpath(f)) == out}
    results, failed = [], 0
    for path in files:
        try:
            image = read_image(path)
        except UserError as error:                   # the others are still worth having
            print(f"error: {error}")
            results.append({"file": path, "error": str(error)})
            failed += 1
            continue
        found = detect_image(model, image, f"{path} by {args.checkpoint}", *size)
        keep = np.flatnonzero(found["scores"] >= args.threshold)[:args.top]
        boxes, scores = found["boxes"][keep], found["scores"][keep]
        names = [info["classes"][k] or f"class {k}" for k in found["labels"][keep]]
        stem, n = os.path.splitext(os.path.basename(path))[0], 2
        name = f"{stem}_detections.jpg"
        while name in written:                       # a photo's, or of one in another folder
            name, n = f"{stem}_detections_{n}.jpg", n + 1
        written.add(name)
        drawn = os.path.join(args.out, name)
        with writing(drawn):
            draw_boxes(image, boxes, names, scores).save(drawn, quality=92)
        results.append({"file": path, "drawn": name, "width": image.width, "height": image.height,
                        "detections": [
                            {"class": c, "category_id": info["category_ids"][int(k)],
                             "score": round(float(s), 4),
                             "box_xyxy": [round(float(v), 2) for v in box]}
                            for c, k, s, box in zip(names, found["labels"][keep], scores, boxes)]})
        print(f"{path}: {', '.join(f'{c} {s:.2f}' for c, s in zip(names, scores)) or 'nothing'}")
    path = os.path.join(args.out, "predictions.json")
    with writing(path), open(path, "w") as file:
        json.dump(results, file, indent=1)
    print(f"{len(files) - failed} image(s) drawn, and predictions.json, in {args.out}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                # names of files can be any
    run_command(main)
