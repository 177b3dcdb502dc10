"""What is wrong with a data set? The checks of COCO files, and the command that runs them.

    python check_data.py DIR [--images]                    # a summary, then all faults
    python check_data.py TRAIN_JSON TRAIN_IMAGES VAL_JSON VAL_IMAGES
    faults = check_coco("instances.json", image_dir)       # a list of sentences
"""

import argparse
import os
import reprlib
import sys
import time
import warnings

import numpy as np
import torch

from coco_eval import UserError, UserFileError, read_json


def is_number(v):
    """Whether v is a number below 1e15 in magnitude: no bool, no NaN."""
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e15


def is_text(v):
    """Whether v is one line of at most 1000 characters that a file system and a log can take."""
    return (isinstance(v, str) and v.splitlines() == [v] and len(v) <= 1000 and "\0" not in v
            and v.encode(errors="replace").decode() == v)            # no half of a surrogate pair


def is_id(v):
    """Whether v can be an id: an integer of 64 bits or a string."""
    return isinstance(v, int) and not isinstance(v, bool) and -2**63 <= v < 2**63 or is_text(v)


def show(v):
    """repr(v), cut short where it is long or deep."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 100
    return brief.repr(v)


def check_coco(data, path="annotations", image_dir=None):
    """All faults of a COCO instances dict, or file: a list of sentences, empty for a sound one.

    Each names the record by its id, the field and the value. With image_dir, files that are not
    there are faults too. What training handles by itself is none: crowds, boxes that reach over the
    border, boxes of zero width or height, images without annotations.
    """
    if isinstance(data, (str, os.PathLike)):
        data, path = read_json(data, "a COCO instances file"), data
    return [sentence for _, sentence in coco_faults(data, path, image_dir)]


def coco_faults(data, path, image_dir):
    """The faults as pairs (the record, a sentence); of the file as a whole: (data, a sentence)."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            yield data, (f'{path}: no list "{key}"; a COCO file is {{"images": [...], '
                         f'"annotations": [...], "categories": [...]}}')
            return
    ids, names = {}, set()
    for key, name in (("images", "image"), ("categories", "category"),
                      ("annotations", "annotation")):
        seen = ids[key] = set()
        for k, record in enumerate(data[key]):
            if not isinstance(record, dict):
                yield record, f"{path}: {key}[{k}]: {show(record)} is not a record {{...}}"
            elif is_id(record.get("id")):
                if record["id"] in seen:
                    yield record, f"{path}: {name} id {show(record['id'])} occurs twice"
                seen.add(record["id"])
            elif key != "annotations" or "id" in record:             # annotations may have none
                yield record, (f"{path}: {key}[{k}]: id {show(record.get('id'))} is not an integer "
                               f"of 64 bits or a string of one line")
        if key != "annotations" and not data[key]:
            yield data, f"{path}: the list of {key} is empty"
        if key != "annotations" and len({type(v) for v in seen}) > 1:
            yield data, f"{path}: {key} mix integer and string ids, use one of them"
    there = set()                                # of plain files; links are asked one by one
    if image_dir:
        there = {f.name for f in os.scandir(image_dir) if f.is_file(follow_symlinks=False)}
    checks = (("images", "image", lambda r: image_faults(r, image_dir, there)),
              ("categories", "category", lambda r: category_faults(r, names)),
              ("annotations", "annotation",
               lambda r: annotation_faults(r, ids["images"], ids["categories"])))
    for key, name, faults_of in checks:
        for k, record in enumerate(data[key]):
            for fault in faults_of(record) if isinstance(record, dict) else ():
                who = show(record["id"]) if "id" in record else f"number {k}"
                where = f" (image {show(record.get('image_id'))})" if key == "annotations" else ""
                yield record, f"{path}: {name} {who}{where}: {fault}"


def without_faults(data, path, image_dir):
    """`data` without the records that have faults and those that refer to them, or None where the
    file as a whole has faults; and all faults, a list of sentences."""
    faults = found = list(coco_faults(data, path, image_dir))
    while found:
        bad = {id(record) for record, _ in found}
        if id(data) in bad:
            return None, [sentence for _, sentence in faults]
        data = {key: [r for r in data[key] if id(r) not in bad]
                for key in ("images", "annotations", "categories")}
        found = list(coco_faults(data, path, image_dir))
    return data, [sentence for _, sentence in faults]


def image_faults(record, image_dir, there):
    """What is wrong with one image record: a list of phrases. `there`: the files in image_dir."""
    faults, name = [], record.get("file_name")
    for side in ("width", "height"):
        value = record.get(side)
        if type(value) is not int or not 0 < value < 1e6:
            faults.append(f"{side} {show(value)} is not a positive integer below a million")
    if not is_text(name):
        faults.append(f"file_name {show(name)} is not a string that names a file")
    elif (name[0] in "/\\" or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/")):
        faults.append(f"file_name {show(name)} leads out of the image folder")
    elif image_dir and name not in there and not os.path.isfile(os.path.join(image_dir, name)):
        faults.append(f"file {os.path.join(image_dir, name)} not found, or no file")
    return faults


def category_faults(record, names):
    """What is wrong with one category: a list of phrases. `names`: those before it, added to."""
    name = record.get("name")
    if not is_text(name):
        return [f"name {show(name)} is not a string of one line"]
    if name in names:
        return [f"name {show(name)} occurs twice, rename one or merge the two"]
    names.add(name)
    return []


def annotation_faults(record, image_ids, category_ids):
    """What is wrong with one annotation: a list of phrases."""
    faults = []
    for field, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = record.get(field)
        if not is_id(value) or value not in known:
            listed = {"image_id": "images", "category_id": "categories"}[field]
            faults.append(f"{field} {show(value)} is not among the file's {listed}")
    box, area = record.get("bbox"), record.get("area")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        faults.append(f"bbox {show(box)} is not a list of 4 finite numbers [x, y, width, height]")
    elif box[2] < 0 or box[3] < 0:
        faults.append(f"bbox {show(box)} has a negative width or height; it should be [x, y, w, h]")
    if record.get("iscrowd", 0) not in (0, 1, None):
        faults.append(f"iscrowd {show(record['iscrowd'])} is not 0 or 1")
    if area is not None and not (is_number(area) and area >= 0):
        faults.append(f"area {show(area)} is not a finite number of 0 or more")
    return faults


# -- the check of a data set: python data.py DIR [--images] --------------------------------------

def find_splits(paths):
    """{split: function that gives its data set} of the paths on the command line."""
    from data import CocoDataset, ImageFolder, coco_paths            # data.py uses the checks above
    root = paths[0]
    if len(paths) == 1 and os.path.isdir(os.path.join(root, "annotations")):
        found = {split: coco_paths(root, split) for split in ("train", "val")}
    elif len(paths) == 1 and os.path.isdir(os.path.join(root, "train")):
        return {split: lambda split=split: ImageFolder(root, split) for split in ("train", "val")}
    elif len(paths) == 2:
        found = {"all": paths}
    elif len(paths) == 4:
        found = {"train": paths[:2], "val": paths[2:]}
    else:
        raise UserFileError(
            f"{' '.join(paths)}: give a folder that holds annotations/instances_train2017.json and "
            f"instances_val2017.json, train2017/ and val2017/; or one of class folders, "
            f"train/<class>/*.jpg and val/<class>/*.jpg; or an annotation file and its image "
            f"folder, or these two twice, for training and validation")
    return {split: lambda pair=pair: CocoDataset(*pair, sound_part=True)
            for split, pair in found.items()}


class OpenedImages(torch.utils.data.Dataset):
    """What reading each image of `dataset` gives: ((height, width) or None, fault, remark)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                image = self.dataset.read(i)
            except (ValueError, OSError) as error:
                return None, str(error), ""
        remarks = sorted({" ".join(str(w.message).split()) for w in said})
        remark = f"note     {self.dataset.path(i)}: {'; '.join(remarks)}" if remarks else ""
        return (image.height, image.width), "", remark


def open_images(dataset, workers):
    """Sizes (N, 2) of the images of a data set, faults and remarks: all are read as in training."""
    loader = torch.utils.data.DataLoader(OpenedImages(dataset), 32, num_workers=workers,
                                         collate_fn=list)
    results, said = [], time.time()
    for batch in loader:
        results += batch
        if time.time() - said > 10:
            said, broken = time.time(), sum(bool(fault) for _, fault, _ in results)
            print(f"         {len(results)} of {len(dataset)} images opened, {broken} with faults",
                  flush=True)
    sizes, faults, remarks = ([r[k] for r in results if r[k]] for k in range(3))
    return np.array(sizes).reshape(-1, 2), faults, remarks


def describe_dataset(dataset, sizes):
    """Lines on the images, of these sizes where they are known, and the objects of a data set."""
    lines = [f"         {len(dataset)} images"]
    if len(sizes):
        low, middle, high = np.quantile(sizes, (0, 0.5, 1), axis=0).astype(int)
        lines[0] += (f", {low[1]} to {high[1]} pixels wide (median {middle[1]}), {low[0]} to "
                     f"{high[0]} high (median {middle[0]})")
    if not hasattr(dataset, "boxes"):                                # of a classifier
        return lines + dataset.notes
    counts = [len(dataset.objects(i)[0]) for i in range(len(dataset))]
    side = np.sqrt(dataset.area[~dataset.crowd])
    lines += [f"         {counts.count(0)} images without objects to train on; at most "
              f"{max(counts)} in one",
              f"         {(side < 32).sum()} objects small (area under 32 x 32 pixels), "
              f"{((side >= 32) & (side < 96)).sum()} medium, {(side >= 96).sum()} large (over "
              f"96 x 96)", *dataset.notes]
    boxes = np.column_stack([dataset.columns()["image"], dataset.labels, dataset.boxes])
    for what, rows in (("image file(s)", dataset.files), ("box(es) of the same class", boxes)):
        again = len(rows) - len(np.unique(rows, axis=0))
        if again:
            lines.append(f"note     {again} {what} listed once more")
    return lines


def objects_table(datasets):
    """Lines: how many objects, or images of a classifier, of each class are in each data set."""
    columns = [dict(zip(d.classes, np.bincount(d.labels, minlength=len(d.classes)).tolist()))
               for d in datasets.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    head = "objects" if hasattr([*datasets.values()][0], "boxes") else "images"
    rows = [(head, *datasets), *((n, *(c.get(n, "-") for c in columns)) for n in names)]
    wide = max(len(row[0]) for row in rows)
    return [f"{name:{wide}s}" + "".join(f" {v:>8}" for v in row) for name, *row in rows]


def compare_splits(train, val):
    """Faults, and notes, on two splits of one data set: lists of lines."""
    faults, notes = [], []
    for name, a, b in (("validation", train, val), ("training", val, train)):
        lacking = [c for c in a.classes if c not in b.classes]
        if lacking:
            faults.append(f"the {name} set lacks classes that the other has: {lacking}")
    train_files, val_files = ({os.path.realpath(d.path(i)) for i in range(len(d))}
                              for d in (train, val))
    both = sorted(train_files & val_files)
    if both:
        notes.append(f"note     {len(both)} file(s) in both splits, so that the evaluation sees "
                     f"what was trained on: {', '.join(both[:3])}")
    return faults, notes


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python data.py DIR [--images], or JSON IMAGES [VAL_JSON VAL_IMAGES] [--images]",
        description="Check a data set: a summary, then all its faults; exit code 1 if it has any.")
    parser.add_argument("paths", nargs="+", help="DIR laid out like COCO, or with class folders; "
                        "or annotation file and image folder, of one split or of two")
    parser.add_argument("--images", action="store_true", help="open and decode every image, too")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes for it")
    args = parser.parse_args(argv)
    datasets, faults = {}, []
    for split, build in find_splits(args.paths).items():
        try:
            dataset = datasets[split] = build()
        except (ValueError, OSError) as error:
            faults += str(error).split("\n", 1)[-1].splitlines()     # without a list's heading
            continue
        faults += (new := getattr(dataset, "faults", []))
        sizes, remarks = getattr(dataset, "sizes", ()), []
        print(f"{split:8s} {getattr(dataset, 'json_path', '') or dataset.folder}"
              + (f", {len(new)} fault(s), see below; of what has none:" if new else ""), flush=True)
        if args.images:
            sizes, new, remarks = open_images(dataset, args.num_workers)
            faults += new
        print(*describe_dataset(dataset, sizes), *remarks, sep="\n")
    if datasets:
        print(*objects_table(datasets), sep="\n")
    if len(datasets) == 2:
        new, notes = compare_splits(*datasets.values())
        faults += new
        print(*notes, sep="\n", end="\n" * bool(notes))
    print(f"{len(faults)} fault(s):" if faults else "no faults", *faults, sep="\n")
    sys.exit(int(bool(faults)))


def command():
    """`python check_data.py`, and `python data.py`: main, an error as one line."""
    sys.stdout.reconfigure(errors="backslashreplace")                # names of files can be any
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command()
