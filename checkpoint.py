"""Checkpoints: weights in (ours, official, torchvision), runs out, and where a run continues.

    load_weights(build_model("detr_r50"), "detr-r50-e632da11.pth")
    save_run(run)                                 # out/ckpt.pt, written whole or not at all
    state = read_run("out/ckpt.pt")

A checkpoint holds tensors, numbers, strings, lists and dicts alone, and is enough to evaluate,
predict and continue.
"""

import argparse
import errno
import json
import math
import os
import platform
import re
import shutil
import time
import urllib.error
import zipfile
from dataclasses import asdict, fields

import torch
try:
    import fcntl
except ImportError:                                                  # Windows has none
    fcntl = None

from coco_eval import UserError, UserFileError, check_output, writing
from resnet import RESNETS
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig


# Names by original category id, as the officially released DETR files number their 91 outputs;
# eleven of these ids were never used.
COCO_CLASSES = (
    ",person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
    "couch,potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,"
    "microwave,oven,toaster,sink,refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush").split(",")
# the same of the panoptic files, which have 250 outputs, from id 92 on: no things, but stuff
COCO_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
    112: "door-stuff", 118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
    130: "light", 133: "mirror-stuff", 138: "net", 141: "pillow", 144: "platform",
    145: "playingfield", 147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand",
    155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other",
    180: "window-blind", 181: "window-other", 184: "tree-merged", 185: "fence-merged",
    186: "ceiling-merged", 187: "sky-other-merged", 188: "cabinet-merged", 189: "table-merged",
    190: "floor-other-merged", 191: "pavement-merged", 192: "mountain-merged", 193: "grass-merged",
    194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged"}


MASK_PARTS = "bbox_attention.", "mask_head."        # the tensors that ModelConfig.masks adds

# -- weights -------------------------------------------------------------------------------------

def read_checkpoint(path):
    """What a checkpoint file, or an http(s) URL of one, holds; only plain data is unpickled.

    Raises UserFileError, and UserError for what is no checkpoint, is damaged or cannot be fetched.
    """
    path = str(path)
    try:                                          # official training checkpoints keep their args
        with torch.serialization.safe_globals([argparse.Namespace]):
            if path.startswith(("http://", "https://")):
                print(f"weights: {path}, kept in {torch.hub.get_dir()}/checkpoints")
                return torch.hub.load_state_dict_from_url(
                    path, map_location="cpu", weights_only=True)
            if zipfile.is_zipfile(path):          # torch.load does not look at the checksums
                with zipfile.ZipFile(path) as file:
                    if file.testzip():
                        raise ValueError("checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserFileError(f"checkpoint {path} not found") from None
    except urllib.error.URLError as error:
        raise UserError(f"{path} cannot be fetched ({error.reason}): download it elsewhere and "
                        f"give the file's path") from None
    except Exception as error:                    # a broken file can make torch raise anything
        raise UserError(f"{path} is not a checkpoint of plain data, or a damaged one "
                        f"({type(error).__name__})") from None


def weights_of(file):
    """The state dict of a checkpoint, as the official files ("model") or mmpretrain's hold it."""
    return file.get("model", file.get("state_dict", file)) if isinstance(file, dict) else file


def official_classes(K):
    """The names of the K outputs of an official DETR's file, by category id."""
    if K == len(COCO_CLASSES):
        return list(COCO_CLASSES)
    if K == 250:
        return [*COCO_CLASSES, *(COCO_STUFF.get(k, "") for k in range(len(COCO_CLASSES), K))]
    return [f"class {k}" for k in range(K)]


def official_fields(path, state, dilation):
    """The fields of the ModelConfig of an official DETR's file, from its tensors' names and shapes;
    DC5 from the file's name or `dilation`."""
    weights = weights_of(state)
    weights = {k.removeprefix("detr."): v for k, v in weights.items()} if isinstance(
        weights, dict) else {}
    demo = "query_pos" in weights                                    # see detr_demo.py
    classes, queries, body = (("linear_class.bias", "query_pos", "backbone.") if demo else
                              ("class_embed.bias", "query_embed.weight", "backbone.0.body."))
    dims = {classes: 1, queries: 2, "transformer.decoder.layers.0.linear1.weight": 2}
    if any(getattr(weights.get(name), "ndim", None) != dim for name, dim in dims.items()):
        raise UserError(f"{path} holds no detector: give a checkpoint of train.py or an officially "
                        f"released DETR file, or a classifier's with --model NAME")

    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in weights if k.startswith(prefix)})

    args = state.get("args")                                         # of training checkpoints
    bottleneck = f"{body}layer1.0.conv3.weight" in weights
    backbone = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50",
                (True, 23): "resnet101"}.get((bottleneck, count(f"{body}layer3.")), "")
    ff, C = weights["transformer.decoder.layers.0.linear1.weight"].shape
    return dict(
        backbone=backbone, hidden_dim=C, dim_feedforward=ff, nheads=getattr(args, "nheads", 8),
        dilation=dilation or "dc5" in os.path.basename(path) or getattr(args, "dilation", False),
        position_embedding="learned" if "backbone.1.row_embed.weight" in weights else "sine",
        enc_layers=count("transformer.encoder.layers."),
        dec_layers=count("transformer.decoder.layers."),
        pre_norm="transformer.encoder.norm.weight" in weights and not demo, demo=demo,
        num_queries=len(weights[queries]), num_classes=len(weights[classes]) - 1,
        masks="mask_head.lay1.weight" in weights)


def as_grid(v):
    """(..., N) as (..., side, side), or unchanged where N is no square."""
    side = math.isqrt(v.shape[-1])
    return v.unflatten(-1, (side, side)) if side * side == v.shape[-1] else v


def rename_official_keys(state):
    """Renames, and reshapes where needed, the tensors of an official MetaFormer file to our names;
    our own state dicts pass unchanged.

    Takes the files of PoolFormer, whose list `network` mixes stages, strided convolutions and
    positions; of the baselines; of RIFormer, by mmpretrain; of DeiT; and timm's of ViT and
    MLP-Mixer, saved by torch.
    """
    if "backbone.patch_embed.proj.weight" in state:                  # mmpretrain's names
        state = {key.removeprefix("backbone.").replace("norm6.", "norm.").replace(
            "head.fc.", "head."): v for key, v in state.items()}
    renames = {"patch_embed.proj.": "downsample_layers.0.conv.", "blocks.": "stages.0.",
               "stem.proj.": "downsample_layers.0.conv.", "mlp_channels.": "mlp.",
               "mlp_tokens.fc1.weight": "token_mixer.w1", "mlp_tokens.fc1.bias": "token_mixer.b1",
               "mlp_tokens.fc2.weight": "token_mixer.w2", "mlp_tokens.fc2.bias": "token_mixer.b2"}
    stage = 0
    for i in sorted({int(key.split(".")[1]) for key in state if key.startswith("network.")}):
        if f"network.{i}.proj.weight" in state:
            stage += 1
            renames[f"network.{i}.proj."] = f"downsample_layers.{stage}.conv."
        elif f"network.{i}.pos_embed" in state:
            renames[f"network.{i}."] = ""
        else:
            renames[f"network.{i}."] = f"stages.{stage}."
    renames |= {".attn.": ".token_mixer.", "token_mixer.qkv.": "token_mixer.in_proj_",
               "token_mixer.proj.": "token_mixer.out_proj.", "token_mixer.fc.": "token_mixer.",
               "random_matrix": "weight", "res_scale1.scale": "res_scale_1",
               "res_scale2.scale": "res_scale_2"}
    renamed = {}
    for key, v in state.items():
        for theirs, ours in renames.items():
            key = key.replace(theirs, ours)
        if ".mlp.fc" in key and v.dim() == 4:                       # a 1 x 1 convolution
            v = v.flatten(1)
        elif key == "pos_embed" and v.dim() == 4:                   # (1, C, H, W)
            v = v.flatten(2).transpose(1, 2)
        elif key.endswith("token_mixer.weight") and v.dim() == 2:   # (N, N), N = side * side
            side = math.isqrt(len(v))
            v = v.view(side, side, side, side)
        elif key.endswith("token_mixer.w1") and v.dim() == 2:       # (tokens_mlp_dim, N)
            v = as_grid(v)
        elif key.endswith("token_mixer.w2") and v.dim() == 2:       # (N, tokens_mlp_dim)
            v = as_grid(v.t())
        elif key.endswith("token_mixer.b2") and v.dim() == 1:       # (N,)
            v = as_grid(v)
        renamed[key] = v
    return renamed


def take_fused(state, cfg):
    """Renames the norms of a fused RIFormer file, norm_reparam, to norm1 in blocks with the mixer
    identity; in one with affine the scale 2 and the shift 0 make it the identity: 2 z + 0 - z."""
    for key in list(state):
        match = re.fullmatch(r"stages\.([0-3])\.(\d+)\.norm_reparam\.(weight|bias)", key)
        mixer = cfg.stages[int(match[1])][2] if match and cfg.family == "poolformer" else ""
        if mixer in ("affine", "identity"):        # another one does not fit
            block, leaf = f"stages.{match[1]}.{match[2]}", match[3]
            v = state[f"{block}.norm1.{leaf}"] = state.pop(key)
            if mixer == "affine":
                state[f"{block}.token_mixer.affine.{leaf}"] = (
                    v.new_full((len(v), 1, 1, 1), 2.0) if leaf == "weight" else v.new_zeros(len(v)))


def check_same_blocks(name, config, cfg, strict):
    """Raises UserError if the checkpoint's model, whose config is a dict, differs from cfg in
    something that tensor shapes cannot reveal (pool or identity, the activation, ...). Not strict:
    the mixers may differ."""
    def hidden_options(c):
        shown = {f: getattr(c, f) for f in ("family", "norm", "activation", "residual",
                                            "head_size", "pixel_norm")}
        mixers = ",".join(mixer for *_, mixer in c.stages)
        return {**shown, "mixers": mixers, "pool_size": c.pool_size} if strict else shown

    theirs, ours = hidden_options(config_of(name, config, MetaFormerConfig)), hidden_options(cfg)
    differ = [f"{f} {theirs[f]} in the file, {ours[f]} in the model"
              for f in ours if theirs[f] != ours[f]]
    if differ:
        raise UserError(f"{name} is of another model: {', '.join(differ)}")


def compare_tensors(own, state, ignored, fresh, strict):
    """(report, faults): a line for each tensor that is not in both state dicts in the same shape;
    ignored, fresh: prefixes of those that the file, or the model, may have alone."""
    report, faults = [], []
    for key in sorted(own.keys() | state.keys()):
        if key in own and key in state and own[key].shape == state[key].shape:
            continue
        if key not in own:
            line = f"{key} {tuple(state[key].shape)}: not in the model, left out"
            by_design = key.startswith(ignored)
        elif key not in state:
            line = f"{key} {tuple(own[key].shape)}: not in the file, newly initialised"
            by_design = key.startswith(fresh)
        else:
            line = (f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the "
                    f"model, newly initialised")
            by_design = False
        by_design |= key.endswith("num_batches_tracked")
        may_differ = not strict and (key.startswith(("class_embed.", "linear_class.", "head.",
                                                     *MASK_PARTS))
                                     or ".self_attn." in key or ".token_mixer." in key
                                     or key.endswith(".mixer_scale"))
        (report if by_design or may_differ else faults).append(line)
    return report, faults


def load_weights(model, source, strict=True):
    """Copies the tensors of a checkpoint into `model`; every one is accounted for.

    source: a path, a URL or a state dict: a checkpoint of ours, an officially released DETR,
    PoolFormer, RIFormer, MetaFormer-baselines or DeiT file, or timm's of a ViT or MLP-Mixer (all go
    into the whole model), or a classifier for a DETR's backbone: a torchvision ResNet file, a
    MetaFormer of ours or a released one.
    strict=False, for fine-tuning, lets the class head, the mask head and the mixers differ, which
    then stay as initialised. Returns one line for each tensor that was not taken from or not found
    in the file. Raises UserError that names the tensors that do not fit.
    """
    from_file = isinstance(source, (str, os.PathLike))
    name = str(source) if from_file else "the state dict"
    file = read_checkpoint(source) if from_file else source
    state = weights_of(file)
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and getattr(v, "layout", None) == torch.strided
            for k, v in state.items()):
        raise UserError(f'{name} holds no weights: a state dict, or one under "model", is expected')

    # which part of the model the file is for, and in which names
    target, state = model, {k.removeprefix("detr."): v for k, v in state.items()}
    if hasattr(model, "transformer") and not any(k.startswith("transformer.") for k in state):
        # a classifier's
        target = model.backbone if model.cfg.demo else model.backbone[0].body
    if isinstance(target, MetaFormer):
        state = rename_official_keys(state)
        take_fused(state, target.cfg)
        config = upgraded(file).get("model_config", {})
        if "depths" in config:
            check_same_blocks(name, config, target.cfg, strict)

    # every tensor that is not in both, in the same shape, is reported or at fault
    own = target.state_dict()
    report, faults = compare_tensors(own, state, *expected_differences(target, model), strict)
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(f"{name} does not fit the model, {len(faults)} tensor(s) differ; is it a "
                        f"file of another model, mixer or number of classes?\n"
                        + "\n".join(faults[:20]) + more)
    taken = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    target.load_state_dict({**own, **taken})
    return report


def expected_differences(target, model):
    """Prefixes of the names that a file may hold beyond `target`, and that it may lack, tuples:
    those of a classifier where the target gives maps."""
    if target is model and not getattr(model.cfg, "out_stages", ""):
        return (), ()
    ignored = ["fc.", "norm.", "head."]
    if isinstance(target, MetaFormer) and len(target.stages) < 4:
        ignored.append("pos_embed")
        for k in range(len(target.stages), 4):
            ignored += [f"stages.{k}.", f"downsample_layers.{k}."]
    return tuple(ignored), ("norm0.", "norm2.", "norm4.", "norm6.")


# the last part of their names in mmpretrain
RIFORMER_FILES = {"s12": "6741ce71", "s24": "fdab072a", "s36": "fdfcd3b0", "m36": "2fcb9d9b",
                  "m48": "2b9d1abf"}


def published_url(name):
    """Where ImageNet weights of a backbone are published; "" if they are not."""
    if name in RESNETS:
        return RESNETS[name][3] and f"https://download.pytorch.org/models/{RESNETS[name][3]}"
    if name not in METAFORMERS or name == "metaformer_tiny":
        return ""
    family, _, ablation = name.partition("_s12_")
    if family.startswith("riformer_"):
        size = name.removeprefix("riformer_")
        return (f"https://download.openmmlab.com/mmclassification/v1/riformer/riformer-{size}_"
                f"32xb128_in1k_20230406-{RIFORMER_FILES[size]}.pth")
    if METAFORMERS[name].family == "baselines":
        family = name.split("_")[0]
        return f"https://huggingface.co/sail/dl/resolve/main/{family}/{name}.pth"
    file = {"identity": "metaformer_id_s12", "pppa": "metaformer_pppa_s12_224",
            "ppaa": "metaformer_ppaa_s12_224", "pppf": "metaformer_pppf_s12_224",
            "ppff": "metaformer_ppff_s12_224", "": name}.get(ablation)
    return file and f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar"


def load_backbone(model, weights):
    """ImageNet weights for the backbone: "imagenet" fetches the published file, else a path or URL.

    Returns load_weights' report; raises UserError if the file cannot be had.
    """
    if weights != "imagenet":
        return load_weights(model, weights)
    url = published_url(model.cfg.backbone)
    if not url:
        raise UserError(f"no ImageNet weights are published for {model.cfg.backbone}: use "
                        f"--backbone_weights none")
    file, folder = os.path.basename(url), os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        if not os.path.exists(os.path.join(folder, file)):
            print(f"backbone weights: fetching {file} to {folder}")
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:                        # URLError is an OSError
        raise UserError(f"the published {file} cannot be fetched ({error}): put it into {folder}, "
                        f"or give --backbone_weights FILE, or none to train from "
                        f"scratch") from None
    return load_weights(model, state)


def load_optimizer(optimizer, state):
    """The state of a checkpoint's optimizer, with the rates and the weight decay given now."""
    now = [{k: group[k] for k in ("base_lr", "weight_decay")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        sound = all(p.shape == optimizer.state[p][name].shape for group in optimizer.param_groups
                    for p in group["params"] for name in ("exp_avg", "exp_avg_sq"))
    except Exception:                              # torch raises anything for a damaged one
        sound = False
    if not sound:
        raise UserError("--resume: the optimizer's state is of other trained tensors; "
                        "--freeze, and --lr_backbone between 0 and more, cannot change, --finetune "
                        "starts anew")
    for group, options in zip(optimizer.param_groups, now):
        group.update(options)


# -- runs ----------------------------------------------------------------------------------------

# options that may change from one start to the next without changing what is computed
MAY_CHANGE_ON_RESUME = {"resume", "output_dir", "num_workers", "log_every", "save_minutes",
                        "device"}
DATA_PATHS = "data", "train_json", "train_images", "val_json", "val_images"
CONFIGS = "model_config", "loss_config", "train_config"
# names in checkpoints of before: by the dict that holds them
RENAMED = {"model_config": {"token_dim": "tokens_mlp_dim", "maps": "out_stages"},
           "state": {"best_ap": "best_score"}}


def lock_output_dir(out):
    """An open file whose lock no other run of this machine can have; the system frees it when the
    process ends, however it does. Raises UserFileError that names the other run."""
    path = os.path.join(out, "lock.txt")
    try:
        os.makedirs(out, exist_ok=True)
        file = open(path, "a+", errors="replace")
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)         # not inherited by workers
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise UserFileError(f"another run writes to {out} ({file.read().strip()}): give another "
                            f"--output_dir, or end that one") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserFileError(f"--output_dir {out} cannot be written ({error}): give "
                                f"another") from None
        print(f"note     {out} is on a file system without locks: a second run there would not be "
              f"noticed")
    return file


def check_output_dir(cfg, model):
    """Raises UserError before training if the folder cannot hold the files of a run."""
    out = cfg.output_dir
    try:
        probe = os.path.join(out, "ckpt.pt.tmp")
        with open(probe, "wb"):
            os.remove(probe)
    except OSError as error:
        raise UserFileError(f"--output_dir {out} cannot be written ({error}): give "
                            f"another") from None
    names = "ckpt.pt", "best.pt", "log.txt", "steps.txt", "first_batch.jpg", "predictions.jpg"
    for name in names:
        check_output("--output_dir", os.path.join(out, name), cfg.finetune, cfg.backbone_weights,
                     cfg.teacher)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = 4 * (sum(v.numel() for v in model.state_dict().values()) + 2 * trained)
    ours = [os.path.join(out, name) for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt")]
    room = shutil.disk_usage(out).free + sum(os.path.getsize(f) for f in ours if os.path.exists(f))
    if room < 4 * size:                            # those three, and the next one being written
        raise UserFileError(f"{out} has room for {room / 1e6:.0f} MB, the checkpoints need "
                            f"{4 * size / 1e6:.0f} MB: make room, or give another --output_dir")


def save_checkpoint(path, state, keep_previous=True):
    """Writes a file whole or not at all; the one before it stays as *_prev.pt if asked for.

    Raises UserFileError, an OSError, with the file before it intact.
    """
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                # on disk before the rename makes it visible
        if keep_previous and os.path.exists(path):
            shutil.copyfile(path, path + ".tmp2")  # a copy first, so that `path` never disappears
            os.replace(path + ".tmp2", path[:-len(".pt")] + "_prev.pt")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:       # torch's writer raises RuntimeError
        for name in (path + ".tmp", path + ".tmp2"):
            if os.path.exists(name):
                os.remove(name)
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        raise UserFileError(f"{path} cannot be written ({str(error).splitlines()[0]}; "
                            f"{free / 1e6:.0f} MB free): the file before it is intact, make room "
                            f"and give the same command again") from None


def config_dicts(model_cfg, loss_cfg, cfg):
    return dict(zip(CONFIGS, map(asdict, (model_cfg, loss_cfg, cfg))))


def save_run(run, name="ckpt.pt", keep_previous=False):
    """Writes a checkpoint of the run, on rank 0. keep_previous: the one before stays, too, unless
    it is damaged."""
    if run.rank == 0:
        dataset, cfg = run.train_loader.dataset, run.cfg
        paths = {key: os.path.abspath(getattr(cfg, key)) for key in DATA_PATHS if getattr(cfg, key)}
        state = dict(
            format=2, **config_dicts(run.model_cfg, run.loss_cfg, cfg), paths=paths,
            classes=dataset.classes, category_ids=getattr(dataset, "category_ids", None),
            things=getattr(dataset, "things", None),               # of panoptic data
            epoch=run.epoch, step=run.step, sums=run.epoch_sums, best_score=run.best_score,
            model=run.raw_model.state_dict(), optimizer=run.optimizer.state_dict())
        save_checkpoint(os.path.join(cfg.output_dir, name), state,
                        keep_previous and not run.damaged)
    run.damaged, run.saved = False, time.time()


def upgraded(state):
    """A checkpoint's dict in the names and units of today's format."""
    state = {RENAMED["state"].get(k, k): v for k, v in state.items()}
    if isinstance(state.get("model_config"), dict):
        state["model_config"] = {RENAMED["model_config"].get(k, k): v
                                 for k, v in state["model_config"].items()}
    if state.get("format") == 1 and state.get("sums"):              # were means over processes
        state["sums"] = {**state["sums"], "processes": state["step"]}
    return state


def read_run(path, state=None):
    """The state of a checkpoint of train.py, read already or not. Raises UserError for anything
    else, also for one of a newer version."""
    state = read_checkpoint(path) if state is None else state
    if not isinstance(state, dict) or "optimizer" not in state or "model_config" not in state:
        raise UserError(f"{path} is no checkpoint of train.py to continue; to start from other "
                        f"weights use --finetune")
    state = upgraded(state)
    wanted = dict(format=int, model_config=dict, loss_config=dict, train_config=dict, classes=list,
                  epoch=int, step=int, sums=dict, best_score=(int, float), model=dict,
                  optimizer=dict, paths=dict)
    state.setdefault("paths", {})                                   # format 1 has none
    wrong = [name for name, type_ in wanted.items() if not isinstance(state.get(name), type_)]
    if not wrong:
        classes = state["classes"]
        ids = state["category_ids"] = state.get("category_ids") or list(range(len(classes)))
        sound = dict(
            epoch=state["epoch"] >= 0, step=state["step"] >= 0,
            classes=len(classes) == state["model_config"].get("num_classes")
            and all(isinstance(name, str) for name in classes),
            category_ids=isinstance(ids, list) and len(ids) == len(classes),
            sums=all(isinstance(value, (int, float)) for value in state["sums"].values()))
        wrong = [name for name, is_sound in sound.items() if not is_sound]
    if wrong or state["format"] > 2:
        raise UserError(f"{path} is a checkpoint of another version: format "
                        f"{state.get('format')!r} (1 and 2 are known)"
                        + (f", without a sound {', '.join(wrong)}" if wrong else ""))
    return state


def config_of(path, options, kind):
    """The config, of class `kind`, of a checkpoint's dict of options. Raises UserError for values
    that it refuses and for options that it does not know: what they change would be lost."""
    unknown = sorted(map(str, set(options) - {f.name for f in fields(kind)}))
    if unknown:
        raise UserError(f"{path} has options that this code does not know: {', '.join(unknown)}; "
                        f"use the version that wrote it")
    try:
        return kind(**options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def located_data(state):
    """The options a checkpoint was trained with; relative paths that are not there from here are
    replaced by the absolute ones of the training."""
    options, absolute = dict(state["train_config"]), state["paths"]
    for name in DATA_PATHS:
        if options.get(name) and not os.path.exists(options[name]):
            options[name] = absolute.get(name, options[name])
    return options


def check_located(options, checkpoint):
    """Raises UserFileError for a data path of a checkpoint's options that is not there."""
    for name in DATA_PATHS:
        if options.get(name) and not os.path.exists(options[name]):
            raise UserFileError(f"{options[name]} not found: the checkpoint {checkpoint} was "
                                f"trained with it as --{name}; give --data DIR, or --val_json and "
                                f"--val_images")


def find_resume(cfg, model_cfg, loss_cfg):
    """The state to continue from, or None.

    If --output_dir holds a checkpoint it is used, and its options must equal the ones given.
    Otherwise --resume is used; its options may differ. If ckpt.pt is "damaged" or missing,
    ckpt_prev.pt takes its place. "notes" lists both. Raises UserError rather than write over
    another run.
    """
    path, previous = (os.path.join(cfg.output_dir, f) for f in ("ckpt.pt", "ckpt_prev.pt"))
    own, notes = os.path.exists(path) or os.path.exists(previous), []
    if not own and not cfg.resume:
        return None
    asked = cfg.resume and os.path.realpath(cfg.resume)
    if own and asked and os.path.realpath(path) != asked and (
            os.path.dirname(asked) == os.path.realpath(cfg.output_dir)):
        raise UserError(f"--resume {cfg.resume} would write over the run in {path}: give another "
                        f"--output_dir to continue it there")
    try:
        state = read_run(path if own else cfg.resume)
    except UserError as error:
        if not own:
            raise
        if not os.path.exists(previous):
            raise UserError(f"{error}, and there is no {previous}: remove it to start anew, or "
                            f"give another --output_dir") from None
        state, notes = read_run(previous), [f"{error}: continuing from {previous}"]

    now = config_dicts(model_cfg, loss_cfg, cfg)
    for name, kind in zip(CONFIGS, (model_cfg, loss_cfg, cfg)):
        config_of(path if own else cfg.resume, state[name], type(kind))
    changed = {k: f"--{k} {state[name][k]!r} -> {v!r}" for name in CONFIGS
               for k, v in now[name].items()
               if k not in MAY_CHANGE_ON_RESUME and state[name].get(k, v) != v
               and state["paths"].get(k) != os.path.abspath(str(v))}
    if changed and own and os.path.realpath(path) != asked:
        raise UserError(f"{path} was trained with other options ({', '.join(changed.values())}): "
                        f"give another --output_dir for a new run, or --resume {path} to continue "
                        f"with the new options")
    if any(name in state["model_config"] for name in changed):
        raise UserError(f"--resume {cfg.resume} is of another model "
                        f"({', '.join(changed.values())}); --finetune takes over what fits")
    return {**state, "notes": notes + list(changed.values()), "damaged": bool(notes)}


def truncate_logs(out, epoch, step, resumed):
    """Drops from the logs the records of steps that will be done again, and a line that was cut
    off. What else is lost that way, another run's log or no log at all, is added to NAME.bak."""
    paths = [os.path.join(out, name) for name in ("log.txt", "steps.txt")]
    # a run killed before its first checkpoint leaves a steps.txt but no log.txt
    another_run = not resumed and os.path.exists(paths[0]) and os.path.getsize(paths[0]) > 0
    for path in filter(os.path.exists, paths):
        kept, foreign = [], another_run
        with writing(path), open(path, errors="surrogateescape") as file:
            lines = file.readlines()
        for line in lines:
            try:
                record = json.loads(line)
                if (record["epoch"], record.get("step", math.inf)) <= (epoch, step):
                    kept.append(line)
            except (ValueError, TypeError, KeyError, AttributeError):
                foreign |= line.endswith("\n")                       # not one that was cut off
        with writing(path):
            if foreign:
                with open(path + ".bak", "a", errors="surrogateescape") as file:
                    file.writelines(lines)
            with open(path + ".tmp", "w") as file:
                file.writelines([] if another_run else kept)
            os.replace(path + ".tmp", path)
