"""Detections and classes of images: drawn, and as JSON.

    python predict.py out/ckpt.pt photo.jpg folder/ --out predictions/
    python predict.py detr-r50-e632da11.pth photo.jpg --threshold 0.9 --top 10 --attention
    python predict.py detr-r50-panoptic-00ce5173.pth photo.jpg --panoptic
    python predict.py poolformer_s12.pth.tar photo.jpg --model poolformer_s12

--attention draws what attention.py computes. A classifier's picture is the part of the photo that
it gets, beside the Grad-CAM of the best class.
"""

import json
import os
import sys

import numpy as np
import torch
from PIL import Image

from coco_eval import FlagParser, UserError, UserFileError, run_command, writing
from processes import check_device
from images import IMAGE_SUFFIXES, draw_boxes, draw_masks, read_image
from metaformer import MetaFormer
from classification import center_crop
from data import plan_validation
from load import load_model
from evaluate import check_finite, postprocess
from segmentation import PanopticWriter, mask_code, masks_over
from attention import attention_sheet, cam_sheet


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


# -- detectors -----------------------------------------------------------------------------------

class Detector:
    """A detector that is called with an image: Detector(*load_model("out/best.pt"))("photo.jpg").

    model, info: load_model's; threshold: the least score that is kept, top: of so many at most;
    image_size, max_size: shorter and longest side of the network's input, 0: as in training.
    """

    def __init__(self, model, info, threshold=0.7, top=100, image_size=0, max_size=0):
        self.model, self.info = model.eval(), info
        self.threshold, self.top = threshold, top
        self.size = (image_size or info["train"].get("image_size", 800),
                     max_size or info["train"].get("max_size", 1333))

    @torch.inference_mode()
    def __call__(self, image, name="given"):
        """The detections of an image, a path or a PIL image in RGB: a dict, the best first.

        "names": a list of str; arrays "scores" (D,) in [0, 1], "boxes" (D, 4) xyxy in pixels of the
        image, "labels" (D,) class indices, "queries" (D,) that found them; of a model with masks
        also "masks", a list of bool (h, w) like the image. Raises UserError, with the image's name,
        if they are not finite.
        """
        if not isinstance(image, Image.Image):
            name, image = image, read_image(image)
        pixels, size = self.pixels(image), (image.height, image.width)
        logits, boxes, masks = masks_over(self.model, pixels, size, self.threshold)
        found = postprocess(logits[-1], boxes[-1], [size])[0]
        check_finite(found, name)

        queries = found["scores"].argsort(descending=True)[:self.top]
        queries = queries[found["scores"][queries] >= self.threshold]
        found = {key: values[queries].cpu().numpy() for key, values in found.items()}
        names = [self.info["classes"][k] or f"class {k}" for k in found["labels"]]
        found |= {"names": names, "queries": queries.cpu().numpy()}
        if self.model.cfg.masks:
            found["masks"] = [masks[query] for query in queries.tolist()]
        return found

    def pixels(self, image):
        """The network's input uint8 (1, 3, IH, IW): a PIL image in RGB, resized."""
        h, w = plan_validation(image.height, image.width, *self.size).size
        pixels = torch.from_numpy(np.array(image.resize((w, h), 2))).permute(2, 0, 1)   # bilinear
        return pixels[None].to(next(self.model.parameters()).device)


def load_detector(path, device="cpu", **options):
    """The detector of a checkpoint of train.py or of an official file; options: Detector's.

        detect = load_detector("out/best.pt", threshold=0.5)
        found = detect("photo.jpg")                  # names, scores, boxes
    """
    model, info = load_model(path)
    if isinstance(model, MetaFormer):
        raise UserError(f"{path} holds a classifier, which detects nothing")
    return Detector(model.to(check_device(device)), info, **options)


def describe_objects(detector, image, path, args):
    """Of one photo: a text, what the JSON says, and pictures by kind."""
    found = detector(image, f"{path} by {args.checkpoint}")
    names, scores, boxes = found["names"], found["scores"], found["boxes"]
    ids = detector.info["category_ids"]
    rows = [{"class": name, "category_id": ids[int(k)], "score": round(float(score), 4),
             "box_xyxy": [round(float(v), 2) for v in box]}
            for name, k, score, box in zip(names, found["labels"], scores, boxes)]
    masks = found.get("masks", [])
    for row, mask in zip(rows, masks):
        row["segmentation"] = mask_code(mask)
    drawn = draw_masks(image, masks[::-1], names[::-1])              # the best on top
    pictures = {"detections": draw_boxes(drawn, boxes, names, scores)}
    if args.attention and (names or args.points):
        for x, y in args.points or ():
            if not (0 <= x < image.width and 0 <= y < image.height):
                raise UserError(f"--points {x:g},{y:g} is not in {path}, which is {image.width} x "
                                f"{image.height} pixels (width x height)")
        pictures["attention"] = attention_sheet(
            detector.model, detector.pixels(image), image, found, args.points, args.heads,
            args.field)
    words = [f"{name} {score:.2f}" for name, score in zip(names[:10], scores)]
    words += [f"and {len(names) - 10} more"] if len(names) > 10 else []
    text = ", ".join(words) or f"nothing over {detector.threshold:g}"
    return text, {"detections": rows}, pictures


# -- classifiers ---------------------------------------------------------------------------------

def describe_classes(model, info, image, path, args):
    """describe_objects for a classifier; the image is resized and cropped as in evaluation."""
    side = args.image_size or info["train"].get("image_size", 224)
    image = center_crop(image, side, model.cfg.crop_fraction)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(args.device)
    with torch.inference_mode():
        logits = model(pixels)[0].cpu()                              # (K,)
    if not logits.isfinite().all():
        raise UserError(f"the logits of image {path} are not finite: the model's weights are "
                        f"spoilt, train it anew")
    best = logits.argsort(descending=True, stable=True)[:args.top or 5].tolist()
    names = [info["classes"][k] if info["classes"] else f"class {k}" for k in best]
    shares = logits.softmax(0)[best].tolist()
    rows = [{"class": name, "label": k, "probability": round(share, 4)}
            for name, k, share in zip(names, best, shares)]
    picture = cam_sheet(model, pixels, image, best[0], f"{names[0]} {shares[0]:.2f}: Grad-CAM")
    text = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares))
    return text, {"classes": rows}, {"classes": picture}


# -- python predict.py ---------------------------------------------------------------------------

def point(text):
    """The point (x, y) that x,y on the command line is."""
    x, y = text.split(",")
    return float(x), float(y)


def parse_args(argv):
    """The command line as a Namespace."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("checkpoint", help="of train.py, or an officially released file")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--out", default="predictions",
                        help="folder of the drawn images and the JSON")
    parser.add_argument("--model", default="", help="of an official classifier's file: its name")
    parser.add_argument("--threshold", type=float, default=None,
                        help="least score of a detection that is kept; default 0.7, with "
                             "--panoptic 0.85")
    parser.add_argument("--panoptic", action="store_true",
                        help="one segment for each pixel, in COCO's panoptic format")
    parser.add_argument("--top", type=int, default=0,
                        help="at most so many detections per image, or classes; default 100, or 5")
    parser.add_argument("--attention", action="store_true",
                        help="also draw, for the 16 best detections, where the query reads the "
                             "image and what the encoder's token in the middle of the box sees")
    parser.add_argument("--heads", action="store_true", help="--attention, of every head too")
    parser.add_argument("--points", type=point, nargs="+", metavar="X,Y",
                        help="--attention, with the encoder's tokens at these pixels of the image")
    parser.add_argument("--field", action="store_true",
                        help="--attention, with effective fields where the encoder has attention")
    parser.add_argument("--image_size", type=int, default=0, help="shorter side; 0: as in training")
    parser.add_argument("--max_size", type=int, default=0, help="longest side; 0: as in training")
    parser.add_argument("--dilation", action="store_true", help="an official DC5 file, if renamed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if max(args.image_size, args.max_size) > 20_000:
        parser.error("--image_size and --max_size are at most 20,000 pixels")
    args.attention |= args.heads or args.field or args.points is not None
    return args


def build_describe(args):
    """The function describe(image, path) of the checkpoint's model, and with --panoptic what
    writes its segments."""
    torch.backends.cudnn.allow_tf32 = False                          # True is torch's default
    model, info = load_model(args.checkpoint, args.model, args.dilation)
    model = model.eval().to(check_device(args.device))
    if isinstance(model, MetaFormer):
        for flag, value in (("attention", args.attention), ("threshold", args.threshold),
                            ("max_size", args.max_size), ("panoptic", args.panoptic)):
            if value:
                raise UserError(f"--{flag} is for detectors, {args.checkpoint} holds a classifier")
        return lambda image, path: describe_classes(model, info, image, path, args), None
    if args.attention and model.cfg.demo:
        raise UserError(f"--attention draws the layers of model.py, {args.checkpoint} holds a "
                        f"detr_demo, whose layers are torch's")
    threshold = args.threshold
    if threshold is None:
        threshold = 0.85 if args.panoptic else 0.7
    detector = Detector(model, info, threshold, args.top or 100, args.image_size, args.max_size)
    if not args.panoptic:
        return lambda image, path: describe_objects(detector, image, path, args), None
    if not model.cfg.masks:
        raise UserError(f"--panoptic needs masks, the model of {args.checkpoint} has none")
    if args.attention:
        raise UserError("--attention is drawn for detections, give it without --panoptic")
    return None, PanopticWriter(detector, args.out)


def main(argv=None):
    args = parse_args(argv)
    files = find_images(args.images)
    describe, panoptic = build_describe(args)
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
        if panoptic:
            panoptic.add(path, image, written)
            continue
        text, contents, pictures = describe(image, path)
        stem, drawn = os.path.splitext(os.path.basename(path))[0], []
        for kind, picture in pictures.items():
            name, n = f"{stem}_{kind}.jpg", 2
            while name in written:                   # a photo's, or of one in another folder
                name, n = f"{stem}_{kind}_{n}.jpg", n + 1
            written.add(name)
            with writing(os.path.join(args.out, name)):
                picture.save(os.path.join(args.out, name), quality=92)
            drawn.append(name)
        results.append({"file": path, "drawn": drawn[0], "pictures": drawn, "width": image.width,
                        "height": image.height, **contents})
        print(f"{path}: {text}")
    path, contents = "predictions.json", results
    if panoptic:
        path, contents = "panoptic.json", panoptic.contents()
    with writing(os.path.join(args.out, path)), open(os.path.join(args.out, path), "w") as file:
        json.dump(contents, file, indent=1)
    print(f"{len(files) - failed} image(s) drawn, and {path}, in {args.out}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                # names of files can be any
    run_command(main)
