"""Checks of data sets: the faults of COCO files, and the command that lists them with a summary.

    python check_data.py DIR [--images] [--draw 16]        # DIR as for train.py --data
    python check_data.py DIR --to coco.json                # writes it as COCO, see formats.py
    python check_data.py JSON IMAGES [VAL_JSON VAL_IMAGES] [--images]
    faults = check_coco("instances.json", image_dir)       # a list of sentences

The arrays of large files that passed the checks are kept in a cache, which is here too.
"""

import hashlib
import os
import reprlib
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial

try:
    import fcntl
except ImportError:                                # Windows
    fcntl = None

import numpy as np
import torch

from coco_eval import FlagParser, UserError, UserFileError, read_json, run_command


# -- the checks of a COCO file -------------------------------------------------------------------

def is_number(v):
    """Whether v is a number below 1e15 in magnitude: no bool, no NaN."""
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e15


def is_text(v):
    """Whether v is one line of at most 1000 characters that a file system and a log can take."""
    return (isinstance(v, str) and v.splitlines() == [v] and len(v) <= 1000 and "\0" not in v
            and v.encode(errors="replace").decode() == v)            # no half of a surrogate pair


def is_id(v):
    """Whether v can be an id: an integer of 64 bits, or text."""
    return (type(v) is int and -2**63 <= v < 2**63) or is_text(v)


def short_repr(v):
    """repr(v), cut short where it is long or deep."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 100
    return brief.repr(v)


def image_faults(record):
    """The faults of one image record: a list of phrases."""
    faults, name = [], record.get("file_name")
    for side in ("width", "height"):
        value = record.get(side)
        if type(value) is not int or not 0 < value < 1e6:
            faults.append(f"{side} {short_repr(value)} is not a positive integer below a million")
    if not is_text(name):
        faults.append(f"file_name {short_repr(name)} is not a string that names a file")
    elif name[0] in "/\\" or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/"):
        faults.append(f"file_name {short_repr(name)} leads out of the image folder")
    return faults


def category_faults(record, names):
    """The faults of one category: a list of phrases. names: a set, to which its name is added."""
    name = record.get("name")
    if not is_text(name):
        return [f"name {short_repr(name)} is not a string of one line"]
    if name in names:
        return [f"name {short_repr(name)} occurs twice, rename one or merge the two"]
    names.add(name)
    return []


def annotation_faults(record, image_ids, category_ids):
    """The faults of one annotation: a list of phrases."""
    faults, box, area = [], record.get("bbox"), record.get("area")
    for field, known, listed in (("image_id", image_ids, "images"),
                                 ("category_id", category_ids, "categories")):
        value = record.get(field)
        if not is_id(value) or value not in known:
            faults.append(f"{field} {short_repr(value)} is not among the file's {listed}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        faults.append(f"bbox {short_repr(box)} is not a list of 4 finite numbers [x, y, width, "
                      f"height]")
    elif box[2] < 0 or box[3] < 0:
        faults.append(f"bbox {short_repr(box)} has a negative width or height; it should be "
                      f"[x, y, w, h]")
    if record.get("iscrowd", 0) not in (0, 1, None):
        faults.append(f"iscrowd {short_repr(record['iscrowd'])} is not 0 or 1")
    if area is not None and not (is_number(area) and area >= 0):
        faults.append(f"area {short_repr(area)} is not a finite number of 0 or more")
    return faults


def file_faults(path, image_ids, names, image_dir):
    """Yields a sentence for each image whose file is missing. image_ids, names: of the images."""
    if not os.path.isdir(image_dir):
        raise UserFileError(f"image folder {image_dir} not found: it should hold the images that "
                            f"{path} lists")
    existing_files = {f.name for f in os.scandir(image_dir) if f.is_file(follow_symlinks=False)}
    for id_, name in zip(image_ids, names):
        file = os.path.join(image_dir, name)
        # a link, or a file in a folder below, takes a look of its own
        if name not in existing_files and not os.path.isfile(file):
            yield f"{path}: image {short_repr(id_)}: file {file} not found, or no file"


def coco_faults(data, path, image_dir):
    """Yields the sentences of check_coco; data: of any type, as JSON has it."""
    # the file as a whole: without its three lists nothing else can be checked
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            yield (f'{path}: no list "{key}"; a COCO file is {{"images": [...], '
                   f'"annotations": [...], "categories": [...]}}')
            return

    # ids
    names = {"images": "image", "categories": "category", "annotations": "annotation"}
    ids = {}
    for key, name in names.items():
        seen = ids[key] = set()
        for k, record in enumerate(data[key]):
            if not isinstance(record, dict):
                yield f"{path}: {key}[{k}]: {short_repr(record)} is not a record {{...}}"
            elif is_id(record.get("id")):
                if record["id"] in seen:
                    yield f"{path}: {name} id {short_repr(record['id'])} occurs twice"
                seen.add(record["id"])
            elif key != "annotations" or "id" in record:             # annotations may have none
                yield (f"{path}: {key}[{k}]: id {short_repr(record.get('id'))} is not an integer "
                       f"of 64 bits or a string of one line")
        if key != "annotations" and not data[key]:
            yield f"{path}: the list of {key} is empty"
        if key != "annotations" and len({type(v) for v in seen}) > 1:
            yield f"{path}: {key} mix integer and string ids, use one of them"

    # the other fields
    classes = set()
    checks = {"images": image_faults, "categories": lambda r: category_faults(r, classes),
              "annotations": lambda r: annotation_faults(r, ids["images"], ids["categories"])}
    for key, name in names.items():
        for k, record in enumerate(data[key]):
            if not isinstance(record, dict):
                continue
            for fault in checks[key](record):
                who = short_repr(record["id"]) if "id" in record else f"number {k}"
                if key == "annotations":
                    who += f" (image {short_repr(record.get('image_id'))})"
                yield f"{path}: {name} {who}: {fault}"

    # the image files
    if image_dir:
        images = [r for r in data["images"] if isinstance(r, dict) and not image_faults(r)]
        yield from file_faults(path, [r.get("id") for r in images],
                               [r["file_name"] for r in images], image_dir)


def read_instances(path):
    """The dict of a COCO instances file, or of the Labels of another format, without the masks,
    most of its text: dropping them while it is parsed halves the memory that is needed."""
    if hasattr(path, "read"):                      # Labels
        return path.read()

    def drop_mask(record):
        record.pop("segmentation", None)
        return record
    return as_instances(read_json(path, "a COCO instances file", drop_mask))


def as_instances(data):
    """A COCO panoptic dict, in which an annotation lists all segments of an image, as an instances
    dict; any other as it is."""
    records = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(records, list) or not records or not all(
            isinstance(r, dict) and isinstance(r.get("segments_info"), list) for r in records):
        return data
    # the id of a segment is its colour, which other images have, too
    segments = [{**s, "id": f"{r.get('image_id')} {s.get('id')}", "image_id": r.get("image_id")}
                if isinstance(s, dict) else s for r in records for s in r["segments_info"]]
    return {**data, "annotations": segments}


def check_coco(data, path="annotations", image_dir=None):
    """All faults of a COCO instances dict, or file: a list of sentences, empty for a sound one.

    Each names the record by its id, the field and the value. With image_dir, a missing image file
    is a fault too. These are not faults, because training handles them: crowds, boxes that reach
    over the border, boxes of zero width or height, images without annotations.
    """
    if isinstance(data, (str, os.PathLike)):
        data, path = read_instances(data), data
    return list(coco_faults(data, path, image_dir))


def refuse(path, faults):
    """Raises UserError if there are faults. It shows the first 20; its `faults` has all."""
    faults = list(faults)
    if not faults:
        return
    lines = [f"{path} has {len(faults)} fault(s), mend the file:", *faults[:20]]
    if len(faults) > 20:
        lines.append(f"... and {len(faults) - 20} more")
    error = UserError("\n".join(lines))
    error.faults = faults
    raise error


def check_sets(train_set, val_set):
    """Raises UserError if a detector cannot be trained on one DetectionDataset and evaluated on the
    other."""
    if train_set.crowd.all():
        raise UserError(f"{train_set.source} has no annotations but crowds, there is nothing to "
                        f"learn")
    if len(train_set.classes) > 10_000:            # the evaluator's curves take 2 MB for each 10
        raise UserError(f"{train_set.source} has {len(train_set.classes)} classes, at most 10,000 "
                        f"can be trained and evaluated: merge or drop some")
    if val_set.missing:
        raise UserError(f"{val_set.source} lacks categories that {train_set.source} has: "
                        f"{val_set.missing[:20]}; both must list the same ones")


def describe_boxes(dataset):
    """Lines on a DetectionDataset: how many boxes are not trained on, and whether they look as if
    they were in another format."""
    image = dataset.columns()["image"]
    h, w = dataset.sizes[image].T
    x2, y2 = (dataset.boxes[:, :2] + dataset.boxes[:, 2:]).T
    boxes = dataset.clipped(slice(None), image)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    over = (x2 > w + 2) | (y2 > h + 2)
    lines = [f"         {len(image)} boxes; not trained on: {dataset.crowd.sum()} crowds, "
             f"{empty.sum()} without area inside the image"]
    if len(image) and over.mean() > 0.2:
        lines.append(f"note     {over.mean():.0%} of the boxes reach over the border: are they "
                     f"[x1, y1, x2, y2]? COCO's are [x, y, width, height]")
    if len(image) and max(x2.max(), y2.max()) <= 1.5:
        lines.append("note     no box reaches beyond 1.5 pixels: are they relative to the image's "
                     "size? COCO's are in pixels")
    return lines


# -- a cache of large annotation files -----------------------------------------------------------

CACHE_FORMAT = 1                                   # count up where read_coco or a check changes
CACHED_FROM = 20_000_000                           # bytes of an annotation file


def load_arrays(path):
    """The dict of arrays that save_arrays wrote, mapped read-only; None where there is none."""
    try:
        record = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return {name: np.asarray(record[name][0]) for name in record.dtype.names}


def save_arrays(path, arrays):
    """Writes a dict of arrays, whole or not at all: as one record, as np.load maps one array."""
    fields = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    record = np.empty(1, np.dtype(fields, align=True))
    for name, array in arrays.items():
        record[name][0] = array
    try:
        with open(f"{path}.tmp", "wb") as file:
            np.save(file, record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError:                                # a full disk, say
        with suppress(OSError):
            os.remove(f"{path}.tmp")


def cached_arrays(path, read, stamp="", what="boxes"):
    """The dict of arrays that read() gives for an annotation file; large files are read only once.
    stamp: what changes with the contents, where path is the name of something else; what: of the
    contents, of which each has a cache of its own.

    One process reads, and writes the arrays to a cache, while the others on the machine wait; they
    and all later runs map the cache, until the file changes. The cache is metaformer_detr_<user id>
    in the folder for temporary files (TMPDIR) and can be deleted at any time. Where it cannot be
    used, each process reads. COCO's training annotations take 15 s and 1.3 GB to read, 1 s to map.
    """
    large = os.path.isfile(path) and os.path.getsize(path) >= CACHED_FROM
    if fcntl is None or not (large or stamp):
        return read()
    if not stamp:
        stat = os.stat(path)
        stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    key = f"{CACHE_FORMAT} {what} {os.path.realpath(path)} {stamp}"
    name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    try:
        folder = os.path.join(tempfile.gettempdir(), f"metaformer_detr_{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.stat(folder).st_uid != os.getuid():                    # another user can write there
            return read()
        lock = open(os.path.join(folder, f"{name}.lock"), "w")
        fcntl.flock(lock, fcntl.LOCK_EX)           # until it is closed or this process ends
    except OSError:
        return read()

    with lock:
        cache = os.path.join(folder, f"{name}.npy")
        arrays = load_arrays(cache)
        if arrays is None:
            arrays = read()
            save_arrays(cache, arrays)
            arrays = load_arrays(cache) or arrays                    # mapped, the memory is shared
    return arrays


# -- the command: python check_data.py DIR [--images] -------------------------------------------

def find_splits(paths):
    """{split: function that builds its data set} of the paths on the command line."""
    import formats                                 # here, as these files import this one
    from config import TrainConfig
    from data import build_dataset
    if len(paths) == 1:
        found = formats.find_splits(paths[0])
        folders = not found and os.path.isdir(f"{paths[0]}/train")
        cfg = TrainConfig(data=paths[0], model="poolformer_s12" if folders else "detr_r50")
        if len(found) == 1:
            return {split: partial(build_dataset, cfg, split) for split in found}
    else:
        train_json, train_images, val_json, val_images = (paths * 2)[:4]
        cfg = TrainConfig(train_json=train_json, train_images=train_images, val_json=val_json,
                          val_images=val_images)
    splits = {"all": "train"} if len(paths) == 2 else {"train": "train", "val": "val"}
    return {name: partial(build_dataset, cfg, split) for name, split in splits.items()}


class OpenedImages(torch.utils.data.Dataset):
    """(height, width) of every image of a data set, or a sentence where it cannot be read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            image = self.dataset.read(i)
        except (ValueError, OSError) as error:
            return str(error)
        return image.height, image.width


def open_images(dataset, workers):
    """Opens all images of a data set as training does: (sizes (N, 2), faults)."""
    loader = torch.utils.data.DataLoader(OpenedImages(dataset), 32, num_workers=workers,
                                         collate_fn=list)
    sizes, faults, printed = [], [], time.time()
    for batch in loader:
        sizes += [found for found in batch if not isinstance(found, str)]
        faults += [found for found in batch if isinstance(found, str)]
        if time.time() - printed > 10:
            printed = time.time()
            print(f"         {len(sizes) + len(faults)} of {len(dataset)} images opened, "
                  f"{len(faults)} with faults", flush=True)
    return np.array(sizes).reshape(-1, 2), faults


def describe_dataset(dataset, sizes):
    """Lines on a data set; sizes (N, 2) of its images, or () where they are not known."""
    lines = [f"         {len(dataset)} images"]
    if len(sizes):
        low, middle, high = np.quantile(sizes, (0, 0.5, 1), axis=0).astype(int)
        lines[0] += (f", {low[1]} to {high[1]} pixels wide (median {middle[1]}), {low[0]} to "
                     f"{high[0]} high (median {middle[0]})")
    if not hasattr(dataset, "boxes"):                                # of a classifier
        return lines + dataset.notes

    # objects per image, and their sizes
    counts = [len(dataset.objects(i)[0]) for i in range(len(dataset))]
    side = np.sqrt(dataset.area[~dataset.crowd])
    small, large = (side < 32).sum(), (side >= 96).sum()
    lines += [f"         {counts.count(0)} images without objects to train on; at most "
              f"{max(counts)} in one",
              f"         {small} objects small (area under 32 x 32 pixels), "
              f"{len(side) - small - large} medium, {large} large (over 96 x 96)", *dataset.notes]

    # duplicates
    boxes = np.column_stack([dataset.columns()["image"], dataset.labels, dataset.boxes])
    for name, rows in (("image file(s)", dataset.files), ("box(es) of the same class", boxes)):
        again = len(rows) - len(np.unique(rows, axis=0))
        if again:
            lines.append(f"note     {again} {name} listed once more")
    return lines


def objects_table(datasets):
    """Lines: the number of objects, or of a classifier's images, by class and split."""
    counts = [dict(zip(d.classes, np.bincount(d.labels, minlength=len(d.classes)).tolist()))
              for d in datasets.values()]
    detector = all(hasattr(d, "boxes") for d in datasets.values())
    rows = [("objects" if detector else "images", *datasets)]
    for name in dict.fromkeys(name for count in counts for name in count):
        rows.append((name, *(count.get(name, "-") for count in counts)))
    width = max(len(row[0]) for row in rows)
    return [f"{name:{width}s}" + "".join(f" {v:>8}" for v in values) for name, *values in rows]


def compare_splits(train, val):
    """Faults and notes on two splits of one data set: two lists of sentences."""
    faults, notes = [], []
    for name, a, b in (("validation", train, val), ("training", val, train)):
        lacking = [c for c in a.classes if c not in b.classes]
        if lacking:
            faults.append(f"the {name} set lacks classes that the other has: {lacking}")
    files = [{os.path.realpath(d.path(i)) for i in range(len(d))} for d in (train, val)]
    both = sorted(files[0] & files[1])
    if both:
        notes.append(f"note     {len(both)} file(s) in both splits, so that the evaluation sees "
                     f"images of the training: {', '.join(both[:3])}")
    return faults, notes


def main(argv=None):
    parser = FlagParser(
        usage="python check_data.py DIR | JSON IMAGES [VAL_JSON VAL_IMAGES] [--images] "
              "[--to FILE] [--draw N]",
        description="Check a data set: a summary, then all its faults; exit code 1 if it has any.")
    parser.add_argument("paths", nargs="+", help="DIR in COCO, Roboflow's COCO, YOLO or VOC "
                        "format, or with class folders; or annotation file and image folder, of "
                        "one split or of two")
    parser.add_argument("--images", action="store_true", help="open and decode every image, too")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(),
                        help="processes that open the images")
    parser.add_argument("--to", default="", metavar="FILE",
                        help="write a sound data set as COCO, the split in the name: FILE_train")
    parser.add_argument("--draw", type=int, default=0, metavar="N",
                        help="draw N images of each split with their boxes: boxes_train.jpg")
    args = parser.parse_args(argv)
    if len(args.paths) not in (1, 2, 4):
        parser.error(f"{len(args.paths)} paths: give one, two or four of them")

    # each split: a summary, or that it has faults
    datasets, faults = {}, []
    for split, build in find_splits(args.paths).items():
        try:
            dataset = build()
        except (UserError, OSError) as error:
            found = getattr(error, "faults", [str(error)])
            print(f"{split:8s} refused for {len(found)} fault(s), listed below")
            faults += found
            continue
        datasets[split] = dataset
        kind = f" ({dataset.format_name})" if hasattr(dataset, "format_name") else ""
        print(f"{split:8s} {getattr(dataset, 'source', '') or dataset.folder}{kind}", flush=True)
        sizes = getattr(dataset, "sizes", ())                        # as annotated
        if args.images:
            sizes, found = open_images(dataset, args.num_workers)
            faults += found
        print(*describe_dataset(dataset, sizes), sep="\n")

    # all splits together
    if datasets:
        print(*objects_table(datasets), sep="\n")
    if len(datasets) == 2:
        found, notes = compare_splits(*datasets.values())
        faults += found
        for note in notes:
            print(note)
    faults = list(dict.fromkeys(faults))           # a wrong DIR is one fault of both splits
    print(f"{len(faults)} fault(s):" if faults else "no faults", *faults, sep="\n")
    if args.draw or args.to:
        import formats
        formats.write_and_draw(args.paths, datasets, args.to if not faults else "", args.draw)
    sys.exit(1 if faults else 0)


def command():
    """`python check_data.py`, and `python data.py`: main, an error as one line."""
    sys.stdout.reconfigure(errors="backslashreplace")                # names of files can be any
    run_command(main)


if __name__ == "__main__":
    command()
