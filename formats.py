"""Data sets in the usual formats: finds which one a folder is in, and reads it as COCO.

    python data.py DIR --to coco.json           # writes DIR, in any of these formats, as COCO
    python data.py DIR --draw 16                # draws 16 images of each split with their boxes
    find_splits("DIR")["train"].read()          # a COCO instances dict

COCO             annotations/instances_train2017.json, train2017/; the same without "2017"
Roboflow's COCO  train/_annotations.coco.json beside the images; valid/
YOLO             data.yaml (names, path, train, val), or folders of *.txt for the images:
                 images/train and labels/train, train/images and train/labels, images/ and labels/,
                 or beside them; names of classes from data.yaml or classes.txt
Pascal VOC       Annotations/*.xml, JPEGImages/, and ImageSets/Main/train.txt and val.txt if there;
                 annotations/ and images/, train/ and valid/, or *.xml beside the images

"valid" and "validation" are also called "val". A data set with one split can be divided:
--val_split 0.1. Sources: cocodataset.org/#format-data; docs.ultralytics.com/datasets/detect; VOC
development kit, host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, Sec. 4 and 8.
"""

import hashlib
import json
import math
import os
import re
from collections import namedtuple
from functools import partial
from itertools import product
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from PIL import Image

from coco_eval import UserError, UserFileError, check_output, read_json
from images import IMAGE_SUFFIXES, contact_sheet
from check_data import cached_arrays, coco_faults, read_instances, refuse, short_repr


class Labels:
    """The annotations of one split in any format; takes the place of the path of a COCO file.

    format_name: "COCO", say; path: the file or folder that messages name; image_dir: of its images;
    reader: a function that returns a COCO instances dict and notes, lines for the banner. str() is
    the name that messages use, `path` alone for a whole COCO file.
    """

    def __init__(self, format_name, path, image_dir, reader=None):
        self.format_name, self.path, self.image_dir = format_name, path, image_dir
        self.reader, self.notes = reader, []
        self.name, self.split, self.share = path, "", 0.0

    def __str__(self):
        return self.name

    def part(self, split, share):
        """The images of these that are the split's, "train" or "val", of which `share` are "val";
        which ones is a hash of their file names, so that it never changes."""
        part = Labels(self.format_name, self.path, self.image_dir, self.reader)
        part.name = f"{self.path} ({split}, --val_split {share:g})"
        part.split, part.share = split, share
        return part

    def read(self):
        """The COCO instances dict, for COCO files without masks; sets `notes`."""
        if not self.reader and not self.share:
            return read_instances(self.path)
        data, self.notes = self.reader() if self.reader else (read_instances(self.path), [])
        return self.own_part(data) if self.share else data

    def own_part(self, data):
        """The dict with the images of this part alone. Raises UserError for faults."""
        refuse(self.path, coco_faults(data, self.path, None))
        data["images"] = [r for r in data["images"]
                          if (name_share(r["file_name"]) < self.share) == (self.split == "val")]
        ids = {r["id"] for r in data["images"]}
        if not ids:
            raise UserError(f"{self}: none of the images is in this part, give another share")
        data["annotations"] = [r for r in data["annotations"] if r["image_id"] in ids]
        return data


def name_share(name):
    """A number in [0, 1) that follows from the last part of a file's name alone."""
    digest = hashlib.sha256(os.path.basename(name).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# -- files and faults ----------------------------------------------------------------------------

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
NO_LABELS = "classes.txt", "notes.txt", "README.txt"                # text files beside labels
CACHED_FROM = 5000                                 # images whose sizes are worth a cache


def files_below(folder, suffixes, deep=True):
    """Files with one of the suffixes, sorted, relative to the folder; deep: also further down."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if deep and not f.startswith(".")]
        found += [os.path.relpath(os.path.join(where, f), folder) for f in names
                  if f.lower().endswith(suffixes) and not f.startswith(".") and f not in NO_LABELS]
    return sorted(found)


def stem(path):
    """The path without its suffix: a/b.jpg -> a/b."""
    return os.path.splitext(path)[0]


def find_pairs(root, suffix, patterns):
    """{split: (image folder, label folder)} by the first pattern that fits. A pattern is two paths
    in root, "{}" for the split; without one both are the one split, "train"."""
    for pattern in patterns:
        found = {}
        for split, names in SPLIT_NAMES.items():
            for name in names:
                images, labels = (os.path.normpath(os.path.join(root, p.format(name)))
                                  for p in pattern)
                if split not in found and os.path.isdir(images):
                    labelled = files_below(labels, suffix, deep=images != labels)
                    if images == labels:           # other files with the suffix may be there, too
                        stems = {stem(f) for f in files_below(images, IMAGE_SUFFIXES, False)}
                        labelled = [f for f in labelled if stem(f) in stems]
                    if labelled:
                        found[split] = images, labels
        if "{}" not in pattern[0]:
            found.pop("val", None)
        if found:
            return found
    return {}


def image_sizes(paths, where):
    """{path: (height, width)} from the headers of images, as read_image turns them. Those of many
    files are read once, then mapped from a cache. Raises UserError that lists unreadable ones."""
    def read():
        sizes, faults = np.zeros((len(paths), 2), np.int64), []
        for i, path in enumerate(paths):
            try:
                with Image.open(path) as image:
                    w, h = image.size
                    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)      # EXIF: by a quarter
                    sizes[i] = (w, h) if turned else (h, w)
            except Exception as error:             # a broken file can make Pillow raise anything
                faults.append(f"{path}: cannot be read as an image ({error}); replace or remove it")
        refuse(where, faults)
        return {"sizes": sizes}

    stamp = hashlib.sha256()
    cached = len(paths) >= CACHED_FROM
    for path in paths if cached else []:
        stat = os.stat(path)
        stamp.update(os.fsencode(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    arrays = cached_arrays(where, read, stamp.hexdigest()) if cached else read()
    return dict(zip(paths, map(tuple, arrays["sizes"].tolist())))


def coco_dict(image_dir, items, names, first_id):
    """A COCO instances dict. items: (image path, (height, width), [(class index, bbox)]) of each
    image; names: of the classes, by index; first_id: of the categories."""
    images, annotations = [], []
    for path, (h, w), boxes in items:
        file_name = os.path.relpath(path, image_dir).replace(os.sep, "/")
        images.append({"id": len(images) + 1, "file_name": file_name, "width": w, "height": h})
        for k, box in boxes:
            annotations.append({
                "id": len(annotations) + 1, "image_id": len(images), "category_id": k + first_id,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": k + first_id, "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def background_note(without, total, what):
    """A list of one note on images without a label file, or of none."""
    if not without:
        return []
    return [f"note     {len(without)} of {total} images have no {what} (the first: {without[0]}): "
            f"they count as images without objects"]


# -- COCO ----------------------------------------------------------------------------------------

def coco_splits(root, kind="instances"):
    """{split: Labels} of a folder laid out like COCO, {} for another. kind: "instances" or
    "panoptic", the files of annotations."""
    folder, found = os.path.join(root, "annotations"), {}
    for split in SPLIT_NAMES:
        for year in ("2017", ""):
            path = os.path.join(folder, f"{kind}_{split}{year}.json")
            images = [os.path.join(root, name) for name in (
                f"{split}{year}", f"images/{split}{year}", split, f"images/{split}")]
            there = [i for i in images if os.path.isdir(i)]
            if split not in found and os.path.isfile(path):
                found[split] = Labels("COCO", path, (there or images)[0])
    if not found and os.path.isdir(folder) and not files_below(folder, ".xml", False):
        for split in SPLIT_NAMES:                  # what is missing is told when it is read
            path = os.path.join(folder, f"{kind}_{split}2017.json")
            found[split] = Labels("COCO", path, os.path.join(root, f"{split}2017"))
    return found


def roboflow_splits(root):
    """{split: Labels} of Roboflow's COCO export, {} for another folder."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            path = os.path.join(root, name, "_annotations.coco.json")
            if split not in found and os.path.isfile(path):
                found[split] = Labels("Roboflow's COCO", path, os.path.dirname(path))
    return found


# -- YOLO ----------------------------------------------------------------------------------------

YAML_KEYS = "names", "path", "train", "val"
# an item of [a, 'b', "c"] or {0: a, 1: b}, and the comma behind it
YAML_ITEM = re.compile(
    r"""\s*(?:(\d+)\s*:\s+)?("(?:\\.|[^"\\])*"|'(?:''|[^'])*'|[^,]*?)\s*(?:,|$)""")


def without_comment(line):
    """A line of YAML without its comment: # at the start or after a space, outside of quotes."""
    for found in re.finditer(r"(^|\s)#", line):
        before = line[:found.start()]
        if before.count('"') % 2 == before.count("'") % 2 == 0:
            return before
    return line.rstrip()


def unquoted(text):
    """A YAML scalar without its quotes."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) > 1 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


def yaml_value(lines):
    """The value of a key of data.yaml: text, a list, or {number: text}.

    lines: its lines, the first without the key: one text; [a, b] or {0: a, 1: b} over any number of
    lines; or rows of "- a" or "0: a".
    """
    text = " ".join(lines).strip()
    if text[:1] in ("[", "{"):
        items = [found.groups() for found in YAML_ITEM.finditer(text[1:].rstrip("]} "))]
    elif lines[0].strip():
        return unquoted(lines[0])
    else:
        items = [re.match(r"\s*(?:-\s+)?(?:(\d+)\s*:\s)?(.*)", row).groups() for row in lines]
    items = [(number, unquoted(value)) for number, value in items if value]
    if items and all(number for number, _ in items):
        return {int(number): value for number, value in items}
    return [value for _, value in items]


def read_data_yaml(path):
    """{key: (line number, value)} of the keys that are used: names, path, train and val."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [without_comment(line) for line in file.read().splitlines()]
    except (OSError, ValueError) as error:
        raise UserFileError(f"{path} cannot be read as text ({error}); save it as "
                            f"UTF-8") from None
    found = {}
    for n, line in enumerate(lines):
        key = re.match(r"""["']?(\w+)["']?\s*:(?:\s+(.*)|$)""", line)
        if key and key[1] in YAML_KEYS:
            end = n + 1                            # the value goes on in lines that are no new key
            while end < len(lines) and (not lines[end] or lines[end][0] in " \t-]}"):
                end += 1
            found[key[1]] = n + 1, yaml_value([key[2] or "", *lines[n + 1:end]])
    return found


def yaml_names(path, found):
    """The class names in data.yaml, by number. Raises UserError."""
    line, names = found.get("names", (0, []))
    at = f"{path}, line {line}" if line else path
    if not names or isinstance(names, str):
        raise UserError(f"{at}: no names of classes; add a line such as names: [cat, dog], in the "
                        f"order of the class numbers")
    if isinstance(names, dict):
        lacking = [k for k in range(len(names)) if k not in names]
        if lacking:
            raise UserError(f"{at}: names has no entry for class {lacking[0]}; number the classes "
                            f"from 0 without gaps")
        names = [names[k] for k in range(len(names))]
    return names


def yaml_places(path, found, split):
    """The image folders and lists of images that data.yaml names for a split, as paths that are
    there. Raises UserFileError."""
    line, values = found.get(split, (0, []))
    folder, base = os.path.dirname(path) or ".", found.get("path", (0, ""))[1] or "."
    places = []
    for value in [values] if isinstance(values, str) else values:
        # Roboflow writes ../train/images for train/images
        starts = [folder] if base == "." else [os.path.join(folder, base), folder, base]
        names = value, re.sub(r"^(\.\./)+", "", value)
        tried = [os.path.join(start, name) for name, start in product(names, starts)]
        there = [os.path.normpath(p) for p in tried if os.path.exists(p)]
        if not there:
            raise UserFileError(f"{path}, line {line}: {split}: {value} not found; give the folder "
                                f"of the images, relative to {folder}")
        places.append(there[0])
    return places


def label_file(image):
    """The label file of an image, by YOLO's rule: of .../images/a.jpg it is .../labels/a.txt; of
    others, and where that is not there, a.txt beside the image."""
    beside = f"{stem(image)}.txt"
    head, found, tail = f"/{beside}".replace(os.sep, "/").rpartition("/images/")
    other = f"{head}/labels/{tail}"[1:]
    return other if found and (os.path.isfile(other) or not os.path.isfile(beside)) else beside


def listed_images(path):
    """The images that a text file lists, one path a line, relative to the file's folder, and the
    fault of each that is not there."""
    images, faults = [], []
    for n, line in read_label_lines(path):
        image = os.path.normpath(os.path.join(os.path.dirname(path), line.strip()))
        if os.path.isfile(image):
            images.append(image)
        else:
            faults.append(f"{path}, line {n}: image {line.strip()} not found; add it or take the "
                          f"line out")
    return images, faults


def yolo_images(places):
    """{image: its label file} of image folders and lists of images; and faults, such as labels
    without an image."""
    images, faults = {}, []
    for place in places:
        if os.path.isfile(place):
            listed, more = listed_images(place)
            images.update({image: label_file(image) for image in listed})
            faults += more
            continue
        found = [os.path.join(place, f) for f in files_below(place, IMAGE_SUFFIXES)]
        images.update({image: label_file(image) for image in found})
        labels, own = {images[image] for image in found}, set(map(os.path.dirname, found))
        for folder in sorted(set(map(os.path.dirname, labels)) - own):
            names = [os.path.join(folder, f) for f in files_below(folder, ".txt", False)]
            faults += [f"{name}: no image of this name in {place}; add it or remove the label file"
                       for name in names if name not in labels]
    return images, faults


def yolo_box(line, classes):
    """Class number and box (cx, cy, w, h), shares of the image's size, of a line of a label file;
    of an outline, as segmentation sets have, the box around it. Raises UserError."""
    words = line.split()
    try:
        k, *values = map(float, words)
    except ValueError:
        raise UserError(f"{short_repr(line.strip())} should be numbers, as in: 0 0.5 0.5 0.2 "
                        f"0.3") from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise UserError(f"{len(words)} numbers; a box has 5: class, centre x, centre y, width, "
                        f"height")
    if k not in range(classes):
        raise UserError(f"class {words[0]} is not one of the {classes} named classes, 0 to "
                        f"{classes - 1}; name it, or mend the number")
    # a thousandth over 1 is rounding
    outside = [word for word, v in zip(words[1:], values) if not 0 <= v <= 1.001]
    if outside:
        raise UserError(f"{outside[0]} is not in 0 to 1; coordinates are shares of the image's "
                        f"width and height, not pixels")
    if len(values) > 4:
        x, y = values[::2], values[1::2]
        values = (min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)
    return int(k), values, len(words) > 5


def read_label_lines(path):
    """[(line number, line)] of a label file that are not blank. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); save it as UTF-8") from None


def class_numbers(places):
    """The names "class 0", "class 1", ... up to the largest number in the label files."""
    labels = [label for label in yolo_images(places)[0].values() if os.path.isfile(label)]
    words = [line.split()[0] for label in labels for _, line in read_label_lines(label)]
    numbers = [int(word) for word in words if word.isdecimal() and len(word) < 5]
    return [f"class {k}" for k in range(max(numbers, default=0) + 1)]


def read_yolo(name, image_dir, places, names, every):
    """COCO instances dict of a split, and notes.

    places: its image folders and lists of images; every: those of all splits; names: of the
    classes, [] where they are numbers alone. Ids of categories are YOLO's class numbers. Boxes are
    rounded to a hundredth of a pixel, what the six digits of the format give.
    """
    images, faults = yolo_images(places)
    if not images and not faults:
        faults.append(f"{' '.join(places)}: no image; is it the folder of the images?")
    notes = background_note([i for i, label in images.items() if not os.path.isfile(label)],
                            len(images), "label file")
    if not names:
        names = class_numbers(every)
        notes.append(f"note     no data.yaml or classes.txt names the classes: they are called "
                     f"'class 0' to '{names[-1]}'")
    boxes, outlines = {image: [] for image in images}, 0
    for image, label in images.items():
        for n, line in read_label_lines(label) if os.path.isfile(label) else []:
            try:
                k, box, is_outline = yolo_box(line, len(names))
            except UserError as error:
                faults.append(f"{label}, line {n}: {error}")
                continue
            boxes[image].append((k, box))
            outlines += is_outline
    refuse(name, faults)

    # shares of the image's size to pixels
    items = []
    for image, (h, w) in image_sizes(list(images), name).items():
        pixels = [(k, [(cx - bw / 2) * w, (cy - bh / 2) * h, bw * w, bh * h])
                  for k, (cx, cy, bw, bh) in boxes[image]]
        items.append((image, (h, w), [(k, [round(v, 2) for v in box]) for k, box in pixels]))
    if outlines:
        notes.append(f"note     {outlines} outlines: the boxes around them are used")
    return coco_dict(image_dir, items, names, 0), notes


def folder_of(places):
    """The folder that holds the images of image folders and lists of images."""
    folders = [place if os.path.isdir(place) else os.path.commonpath(
        [os.path.dirname(place), *map(os.path.dirname, listed_images(place)[0])])
        for place in places]
    return os.path.commonpath(folders) or "."


def raise_error(error):
    """The reader of a split whose places are not there."""
    raise error


def yolo_splits(root):
    """{split: Labels} of YOLO's layouts, {} for another folder. root: a folder or a data.yaml."""
    files = [root] if os.path.isfile(root) else [
        os.path.join(root, f) for f in ("data.yaml", "data.yml", "dataset.yaml")]
    path = next(filter(os.path.isfile, files), "")
    root = os.path.dirname(root) or "." if os.path.isfile(root) else root

    # data.yaml says where the images are, or where it does not, the folders do
    found = read_data_yaml(path) if path else {}
    places, missing, pairs = {}, {}, {}
    for split in [name for name in SPLIT_NAMES if name in found]:
        try:
            places[split] = yaml_places(path, found, split)
        except UserFileError as error:             # told where the split is read, if it is
            missing[split] = error
    if not any(places.values()) and not missing:
        patterns = (("images/{}", "labels/{}"), ("{}/images", "{}/labels"), ("{}", "{}"),
                    ("images", "labels"), (".", "."))
        pairs = find_pairs(root, ".txt", patterns)
        places = {split: [images] for split, (images, _) in pairs.items()}

    names = yaml_names(path, found) if path and places else []
    if not path:                                   # LabelImg writes classes.txt beside the labels
        folders = [root, *(labels for _, labels in pairs.values()), os.path.join(root, "labels")]
        files = [os.path.join(folder, "classes.txt") for folder in folders]
        files = list(filter(os.path.isfile, files))
        lists = [[line.strip() for _, line in read_label_lines(file)] for file in files]
        names = lists[0] if lists else []
        for file, other in zip(files, lists):
            if other != names:
                raise UserError(f"{file} names other classes than {files[0]}: make them alike")

    every, splits = [place for own in places.values() for place in own], {}
    for split, own in places.items():
        if own:
            name = f"{path} ({split})" if path else pairs[split][1]
            name += "" if names else " (no data.yaml or classes.txt)"
            image_dir = folder_of(own)
            splits[split] = Labels("YOLO", name, image_dir,
                                   partial(read_yolo, name, image_dir, own, names, every))
    for split, error in missing.items():
        splits[split] = Labels("YOLO", path, os.path.dirname(path), partial(raise_error, error))
    return splits


# -- Pascal VOC ----------------------------------------------------------------------------------

Annotation = namedtuple("Annotation", "file_name size objects difficult")


def parse_xml(path):
    """The root element of an XML file; "line" is among the attributes of each element."""
    parser, builder = expat.ParserCreate(), ElementTree.TreeBuilder()
    parser.StartElementHandler = lambda tag, attributes: builder.start(
        tag, {"line": parser.CurrentLineNumber})
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        text = str(error).split(":")[0]
        raise UserError(f"{path}, line {error.lineno}: the XML does not parse ({text}); mend the "
                        f"file or write it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    return builder.close()


def child_number(element, tag):
    """The number in a child element; None without a finite one."""
    try:
        value = float(element.findtext(tag, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def voc_object(element):
    """Class name and bbox [x, y, width, height] of an object element. Raises UserError."""
    name = " ".join(element.findtext("name", "").split())
    if not name:
        raise UserError("an object without a <name>; add the name of its class")
    box, sides = element.find("bndbox"), ("xmin", "ymin", "xmax", "ymax")
    if box is None:
        raise UserError(f"object {name} has no <bndbox>; add one with xmin, ymin, xmax and ymax")
    corners = [child_number(box, side) for side in sides]
    for side, value in zip(sides, corners):
        if value is None:
            raise UserError(f"object {name}: {side} {short_repr(box.findtext(side))} is not a "
                            f"number; give it in pixels")
    x1, y1, x2, y2 = corners
    for low, high, side in ((x1, x2, "x"), (y1, y2, "y")):
        if low > high:
            raise UserError(f"object {name}: {side}min {low:g} is greater than {side}max {high:g}; "
                            f"swap them if the box is right")
    return name, [x1, y1, x2 - x1, y2 - y1]


def read_voc_xml(path, faults):
    """The Annotation of a file; None where it is at fault. Adds its faults to a list.

    Corners are used as they are: x = xmin, width = xmax - xmin. The sets of the VOC challenge count
    pixels from 1 and include the last one, so that there a box is one pixel short on its left and
    upper side; but nearly all files of today are written by tools (LabelImg, CVAT, Roboflow, Label
    Studio) that write plain coordinates, and no field tells which is meant.
    """
    try:
        root = parse_xml(path)
    except UserError as error:
        faults.append(str(error))
        return None
    if root.tag != "annotation":
        faults.append(f"{path}, line {root.get('line')}: the root is <{root.tag}>, Pascal VOC has "
                      f"<annotation>; is it another format?")
        return None
    objects, difficult = [], 0
    for element in root.findall("object"):
        try:
            objects.append(voc_object(element))
        except UserError as error:
            faults.append(f"{path}, line {element.get('line')}: {error}")
        difficult += child_number(element, "difficult") == 1
    size = [child_number(root, f"size/{side}") or 0 for side in ("height", "width")]
    file_name = os.path.basename(root.findtext("filename", "").strip().replace("\\", "/"))
    return Annotation(file_name, tuple(map(int, size)), objects, difficult)


def voc_files(images, labels, listed):
    """[(image, XML file or "")] of a split, and faults. listed: the file with its names, or ""; an
    image belongs to the XML file of its name, else to the one that has it as <filename>."""
    image_names = files_below(images, IMAGE_SUFFIXES, images != labels)
    by_stem = {stem(f): f for f in image_names}
    xmls = {stem(f) for f in files_below(labels, ".xml", images != labels)}
    where = {name: f"{os.path.join(labels, name)}.xml" for name in sorted(xmls)}
    if listed:
        where = {line.strip(): f"{listed}, line {n}" for n, line in read_label_lines(listed)}

    files, faults = [], []
    for name, at in where.items():
        xml = os.path.join(labels, f"{name}.xml") if name in xmls else ""
        image = by_stem.get(name)
        if not image and xml:
            annotation = read_voc_xml(xml, faults)
            image = annotation and annotation.file_name
            if annotation is None:
                continue
        if image and os.path.isfile(os.path.join(images, image)):
            files.append((os.path.join(images, image), xml))
        else:
            faults.append(f"{at}: no image {name} in {images}; add it, or remove the entry")
    if not listed:                                 # images without an XML file
        taken = {image for image, _ in files}
        rest = [os.path.join(images, f) for f in image_names]
        files += [(image, "") for image in rest if image not in taken]
    return sorted(files), faults


def read_voc(name, image_dir, own, others):
    """COCO instances dict of a split, and notes. own, others: voc_files' arguments of this split
    and of those whose classes it has, too. Categories are sorted by name, with ids from 1."""
    files, faults = voc_files(*own)
    annotations = [read_voc_xml(xml, faults) if xml else Annotation("", (0, 0), [], 0)
                   for _, xml in files]
    refuse(name, list(dict.fromkeys(faults)))
    names = {n for a in annotations for n, _ in a.objects}
    for other in others:
        for _, xml in voc_files(*other)[0]:
            annotation = read_voc_xml(xml, []) if xml else None
            names |= {n for n, _ in annotation.objects} if annotation else set()
    names = sorted(names)
    index = {n: k for k, n in enumerate(names)}

    # sizes: from the XML file, or where it has none, from the image
    unknown = [image for (image, _), a in zip(files, annotations) if 0 in a.size]
    sizes, items = image_sizes(unknown, name), []
    for (image, _), a in zip(files, annotations):
        boxes = [(index[n], box) for n, box in a.objects]
        items.append((image, sizes.get(image, a.size), boxes))
    notes = background_note([image for image, xml in files if not xml], len(files), "XML file")
    difficult = sum(a.difficult for a in annotations)
    if difficult:
        notes.append(f"note     {difficult} objects marked difficult are objects like the others "
                     f"here; the VOC evaluation leaves them out")
    return coco_dict(image_dir, items, names, 1), notes


def voc_splits(root):
    """{split: Labels} of Pascal VOC's layouts, {} for another folder."""
    patterns = (("{}/JPEGImages", "{}/Annotations"), ("{}/images", "{}/annotations"),
                ("images/{}", "annotations/{}"), ("{}", "{}"), ("JPEGImages", "Annotations"),
                ("images", "Annotations"), ("images", "annotations"), (".", "."))
    parts = {s: (*pair, "") for s, pair in find_pairs(root, ".xml", patterns).items()}
    if list(parts) == ["train"]:
        images, labels, _ = parts["train"]
        lists = {split: os.path.join(root, "ImageSets/Main", f"{split}.txt")
                 for split in ("train", "val", "trainval")}
        there = {s: (images, labels, f) for s, f in lists.items() if os.path.isfile(f)}
        if "trainval" in there and len(there) < 3:
            there = {"train": there["trainval"]}
        there.pop("trainval", None)
        parts = there or parts
    splits = {}
    for split, own in parts.items():
        images, labels, listed = own
        others = [parts["train"]] if split != "train" and "train" in parts else []
        name = listed or labels
        splits[split] = Labels("Pascal VOC", name, images,
                               partial(read_voc, name, images, own, others))
    return splits


# -- which format --------------------------------------------------------------------------------

def find_splits(root):
    """{"train": Labels, "val": Labels}, or one of them, of a folder, or of a data.yaml; {} where it
    is in no format that is known."""
    root = str(root).rstrip("/") or "/"
    if os.path.isfile(root):
        return yolo_splits(root) if root.lower().endswith((".yaml", ".yml")) else {}
    readers = roboflow_splits, coco_splits, yolo_splits, voc_splits
    return next(filter(None, (reader(root) for reader in readers)), {})


def data_paths(cfg, split):
    """Annotations, a path or Labels, and image folder that the options name for the split, "train"
    or "val"."""
    share = getattr(cfg, "val_split", 0.0)
    if not cfg.data and not 0 < share < 1:
        return getattr(cfg, f"{split}_json"), getattr(cfg, f"{split}_images")
    panoptic, where = cfg.data and cfg.model.endswith("_panoptic"), cfg.data
    splits = coco_splits(cfg.data, "panoptic") if panoptic else find_splits(cfg.data)
    if not cfg.data:
        splits, where = {"train": Labels("COCO", cfg.train_json, cfg.train_images)}, cfg.train_json
    if not splits and panoptic:
        raise UserFileError(f"--data {cfg.data} should hold annotations/panoptic_train2017.json "
                            f"and panoptic_val2017.json, beside each the folder of its PNG files, "
                            f"train2017/ and val2017/")
    if not splits:
        raise UserFileError(unknown_folder(cfg.data))
    if 0 < share < 1 and len(splits) == 2:
        raise UserError(f"--val_split {share:g}: {where} has a validation split of its own, leave "
                        f"the flag out")

    if split in splits and not 0 < share < 1:
        labels = splits[split]
    elif not share:
        raise UserError(f"{where} has no {split} split; to divide the one that is there, give "
                        f"--val_split 0.1")
    else:
        labels = next(iter(splits.values()))
        labels = labels.part(split, share) if share < 1 else labels  # 1: evaluate.py takes all
    return labels, labels.image_dir


def evaluated_share(folder, options):
    """The --val_split of an evaluation on a folder, or on files: that of the training, whose
    options are a dict, where the folder is the training's; else 1, all of a single split."""
    trained_on = options.get("data")
    same = folder and trained_on and os.path.realpath(folder) == os.path.realpath(trained_on)
    return options.get("val_split", 0.0) if same else 1.0


def is_data_set(folder):
    """Whether the folder is in a known format, be it with faults."""
    try:
        return bool(find_splits(folder))
    except (UserError, OSError):
        return True


def unknown_folder(root):
    """The sentence on a folder in no known format."""
    below = []
    if os.path.isdir(root):
        folders = [os.path.join(root, f) for f in sorted(os.listdir(root))]
        below = [f for f in folders[:100] if os.path.isdir(f) and is_data_set(f)]
    if below:
        return f"--data {root} is no data set, but {below[0]} in it is: give --data {below[0]}"
    return (f"--data {root} should hold annotations/instances_train2017.json and "
            f"instances_val2017.json, train2017/ and val2017/ (COCO), "
            f"train/_annotations.coco.json (Roboflow), data.yaml or images/ and labels/*.txt "
            f"(YOLO), or Annotations/*.xml and JPEGImages/ (Pascal VOC); another layout takes "
            f"--train_json, --train_images, --val_json and --val_images; class folders take a "
            f"classifier, as --model poolformer_s12; without --data, the built-in shapes are used")


# -- python data.py DIR --to, --draw -------------------------------------------------------------

def write_coco(labels, path):
    """Writes Labels as a COCO instances file; masks of COCO files stay."""
    check_output("--to", path, labels.path)
    data = labels.read() if labels.reader else read_json(labels.path, "a COCO instances file")
    with open(path, "w") as file:
        json.dump(data, file)
    print(f"written  {path}: {len(data['images'])} images, in {labels.image_dir}; "
          f"{len(data['annotations'])} boxes")


def draw_sample(dataset, n, path):
    """Draws n images with their boxes, evenly spread over a data set, 16 on a picture."""
    chosen = np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int).tolist()
    for start in range(0, len(chosen), 16):
        items = []
        for i in chosen[start:start + 16]:
            boxes, labels = dataset.objects(i)
            items.append((dataset.read(i), boxes, [dataset.classes[k] for k in labels]))
        name = path if len(chosen) <= 16 else f"{stem(path)}_{start // 16 + 1}.jpg"
        contact_sheet(items).save(name, quality=92)
        print(f"written  {name}: {len(items)} images with their boxes")


def write_and_draw(paths, datasets, to, n):
    """Does what --to FILE and --draw N ask for the splits that were built, a dict; paths: of the
    command line."""
    if any(not hasattr(d, "boxes") for d in datasets.values()):
        raise UserError("--to and --draw are for boxes, this data set has class folders")
    splits = find_splits(paths[0]) if len(paths) == 1 else {
        split: Labels("COCO", *paths[2 * k:2 * k + 2]) for k, split in enumerate(datasets)}
    for split, dataset in datasets.items():
        if to:
            base, suffix = os.path.splitext(to)
            write_coco(splits[split], to if len(splits) == 1 else f"{base}_{split}{suffix}")
        draw_sample(dataset, n, f"boxes_{split}.jpg")
