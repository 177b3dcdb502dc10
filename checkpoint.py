"""Checkpoints: weights in (ours, official, torchvision), runs out, and where a run goes on.

    load_weights(build_model("detr_r50"), "detr-r50-e632da11.pth")
    save_checkpoint("out/ckpt.pt", state)
"""

import argparse
import json
import math
import os
import pickle
import shutil
import urllib.error

import torch

from resnet import RESNETS
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig


# -- weights -------------------------------------------------------------------------------------

def read_checkpoint(path):
    """What a checkpoint file, or an http(s) URL of one, holds; only plain data is unpickled.

    Raises FileNotFoundError, and ValueError for what is no such file or cannot be fetched.
    """
    path = str(path)
    try:                                          # official training checkpoints keep their args
        with torch.serialization.safe_globals([argparse.Namespace]):
            if path.startswith(("http://", "https://")):
                print(f"weights: {path}, kept in {torch.hub.get_dir()}/checkpoints")
                return torch.hub.load_state_dict_from_url(
                    path, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} not found") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{path} cannot be fetched ({error.reason}): download it elsewhere and "
                         f"give the file's path") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint, or a damaged one "
                         f"({str(error).splitlines()[0] if str(error) else error!r})") from None


def our_names(state):
    """A MetaFormer's state dict with official names and shapes, in ours; ours stays as it is.

    Takes the files of PoolFormer, whose list `network` mixes stages, strided convolutions and
    positions; of the baselines; and of DeiT. Not those of Google's ViT and MLP-Mixer: they expect
    other pixel means than ImageNet's.
    """
    places = {"patch_embed.proj.": "downsample_layers.0.conv.", "blocks.": "stages.0."}
    stage = 0
    for i in sorted({int(key.split(".")[1]) for key in state if key.startswith("network.")}):
        if f"network.{i}.proj.weight" in state:
            stage += 1
            places[f"network.{i}.proj."] = f"downsample_layers.{stage}.conv."
        elif f"network.{i}.pos_embed" in state:
            places[f"network.{i}."] = ""
        else:
            places[f"network.{i}."] = f"stages.{stage}."
    places |= {".attn.": ".token_mixer.", "token_mixer.qkv.": "token_mixer.in_proj_",
               "token_mixer.proj.": "token_mixer.out_proj.", "token_mixer.fc.": "token_mixer.",
               "random_matrix": "weight", "res_scale1.scale": "res_scale_1",
               "res_scale2.scale": "res_scale_2"}
    renamed = {}
    for key, v in state.items():
        for theirs, our in places.items():
            key = key.replace(theirs, our)
        if ".mlp.fc" in key and v.dim() == 4:                       # a 1 x 1 convolution
            v = v.flatten(1)
        elif key == "pos_embed" and v.dim() == 4:                   # (1, C, H, W)
            v = v.flatten(2).transpose(1, 2)
        elif key.endswith("token_mixer.weight") and v.dim() == 2:   # (N, N), N = side * side
            side = math.isqrt(len(v))
            v = v.view(side, side, side, side)
        renamed[key] = v
    return renamed


def check_same_blocks(name, config, cfg, strict):
    """Raises ValueError where a MetaFormer checkpoint's config, a dict, differs from cfg in what
    its tensors do not show. Not strict: the mixers may differ."""
    if "depths" not in config:
        return
    def looks(c):
        look = {f: getattr(c, f) for f in ("family", "norm", "activation", "residual", "head_size")}
        mixers = ",".join(mixer for *_, mixer in c.stages)
        return {**look, "mixers": mixers, "pool_size": c.pool_size} if strict else look
    theirs, ours = looks(MetaFormerConfig(**config)), looks(cfg)
    differ = [f"{f} {theirs[f]} in the file, {ours[f]} in the model"
              for f in ours if theirs[f] != ours[f]]
    if differ:
        raise ValueError(f"{name} is of another model: {', '.join(differ)}")


def load_weights(model, source, strict=True):
    """Copy the tensors of a checkpoint into `model`; every one is accounted for.

    source: a path, a URL or a state dict: a checkpoint of ours, an officially released DETR,
    PoolFormer, MetaFormer-baselines or DeiT file (all go into the whole model), or a classifier for
    a DETR's backbone: a torchvision ResNet file, a MetaFormer of ours or a released one. Returns
    one line for each tensor that was not taken from or not found in the file. Raises ValueError
    that names all tensors that do not fit. strict=False, for fine-tuning, lets two things differ
    and leaves them as initialised: the class head, and the mixers.
    """
    from_file = isinstance(source, (str, os.PathLike))
    state = read_checkpoint(source) if from_file else source
    name = str(source) if from_file else "the state dict"
    config = state.get("model_config", {}) if isinstance(state, dict) else {}
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(
            isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{name} holds no weights: a state dict, or one under \"model\", is "
                         f"expected")
    target = model
    if hasattr(model, "transformer") and not any(k.startswith("transformer.") for k in state):
        target = model.backbone[0].body                             # from a classifier
    if isinstance(target, MetaFormer):
        state = our_names(state)
        check_same_blocks(name, config, target.cfg, strict)
    left_out = new = ()
    if target is not model or getattr(model.cfg, "maps", ""):       # maps, no classifier
        left_out, new = ("fc.", "norm.", "head."), ("norm0.", "norm2.", "norm4.", "norm6.")
        if isinstance(target, MetaFormer) and len(target.stages) < 4:
            left_out += ("pos_embed", *(f"{part}.{k}." for k in range(len(target.stages), 4)
                                        for part in ("stages", "downsample_layers")))
    own, report, faults = target.state_dict(), [], []
    for key in sorted(own.keys() | state.keys()):
        if key in own and key in state and own[key].shape == state[key].shape:
            continue
        if key not in own:
            line = f"{key} {tuple(state[key].shape)}: not in the model, left out"
        elif key not in state:
            line = f"{key} {tuple(own[key].shape)}: not in the file, newly initialised"
        else:
            line = (f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the "
                    f"model, newly initialised")
        by_design = (key.endswith("num_batches_tracked")
                     or key not in own and key.startswith(left_out)
                     or key not in state and key.startswith(new))
        may_differ = not strict and (key.startswith(("class_embed.", "head."))
                                     or ".self_attn." in key or ".token_mixer." in key)
        (report if by_design or may_differ else faults).append(line)
    if faults:
        raise ValueError(f"{name} does not fit the model, {len(faults)} tensor(s) differ; is it a "
                         f"file of another model, mixer or number of classes?\n"
                         + "\n".join(faults[:20])
                         + (f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""))
    taken = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    target.load_state_dict({**own, **taken})
    return report


def published_url(name):
    """Where ImageNet weights of a ResNet or MetaFormer are published; "" if they are not."""
    if name in RESNETS:
        return RESNETS[name][3] and f"https://download.pytorch.org/models/{RESNETS[name][3]}"
    family, _, ablation = name.partition("_s12_")
    if METAFORMERS[name].family == "baselines":
        family = name.split("_")[0]
        return f"https://huggingface.co/sail/dl/resolve/main/{family}/{name}.pth"
    if name == "metaformer_tiny":
        return ""
    file = {"identity": "metaformer_id_s12", "pppa": "metaformer_pppa_s12_224",
            "ppaa": "metaformer_ppaa_s12_224", "pppf": "metaformer_pppf_s12_224",
            "ppff": "metaformer_ppff_s12_224", "": name}.get(ablation)
    return file and f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar"


def load_backbone(model, weights):
    """ImageNet weights for the backbone: "imagenet" fetches the published file, else a path or URL.

    Returns load_weights' report; raises ValueError if the file cannot be had.
    """
    if weights != "imagenet":
        return load_weights(model, weights)
    url = published_url(model.cfg.backbone)
    if not url:
        raise ValueError(f"no ImageNet weights are published for {model.cfg.backbone}: use "
                         f"--backbone_weights none")
    file, folder = os.path.basename(url), os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        if not os.path.exists(os.path.join(folder, file)):
            print(f"backbone weights: fetching {file} to {folder}")
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:                        # URLError is an OSError
        raise ValueError(f"the published {file} cannot be fetched ({error}): put it into {folder}, "
                         f"or give --backbone_weights FILE, or none to train from "
                         f"scratch") from None
    return load_weights(model, state)


# -- checkpoints ---------------------------------------------------------------------------------

# options that may change from one start to the next without changing what is computed
FREE = {"resume", "output_dir", "num_workers", "log_every", "save_minutes", "device"}


def check_output_dir(out, model):
    """Raises OSError before training if the folder cannot hold what the run is to write there."""
    try:
        os.makedirs(out, exist_ok=True)
        with open(out + "ckpt.pt.tmp", "wb"):
            os.remove(out + "ckpt.pt.tmp")
    except OSError as error:
        raise OSError(f"--output_dir {out} cannot be written ({error}): give another") from None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = 4 * (sum(v.numel() for v in model.state_dict().values()) + 2 * trained)
    there = [out + name for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt")]
    room = shutil.disk_usage(out).free + sum(os.path.getsize(f) for f in there if os.path.exists(f))
    if room < 4 * size:                            # those three, and the next one being written
        raise OSError(f"{out} has room for {room / 1e6:.0f} MB, the checkpoints need "
                      f"{4 * size / 1e6:.0f} MB: make room, or give another --output_dir")


def save_checkpoint(path, state, keep_previous=True):
    """Written whole or not at all; the file before it stays as *_prev.pt if asked for.

    Raises OSError, with what was there before intact.
    """
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                # before a name leads to it
        if keep_previous and os.path.exists(path):
            shutil.copyfile(path, path + ".tmp2")
            os.replace(path + ".tmp2", path[:-len(".pt")] + "_prev.pt")  # `path` is always there
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:       # torch's writer raises RuntimeError
        for name in (path + ".tmp", path + ".tmp2"):
            if os.path.exists(name):
                os.remove(name)
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]}; {free / 1e6:.0f} "
                      f"MB free): the file before it is intact, make room and give the same "
                      f"command again") from None


def read_run(path):
    """The state of a checkpoint of train.py. Raises ValueError for anything else."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or "optimizer" not in state or "model_config" not in state:
        raise ValueError(f"{path} is no checkpoint of train.py to go on from; to start from other "
                         f"weights use --finetune")
    return state


def find_resume(cfg, configs):
    """The state to go on from, or None.

    It is that of --output_dir if its options are these, else that of --resume, whose options may
    differ ("changed" lists them). A "damaged" or lost checkpoint in --output_dir gives way to the
    one before it. Raises ValueError rather than write over another run.
    """
    path, previous = (os.path.join(cfg.output_dir, f) for f in ("ckpt.pt", "ckpt_prev.pt"))
    own, notes = os.path.exists(path) or os.path.exists(previous), []
    if not own and not cfg.resume:
        return None
    asked = cfg.resume and os.path.realpath(cfg.resume)
    if own and asked and os.path.realpath(path) != asked and (
            os.path.dirname(asked) == os.path.realpath(cfg.output_dir)):
        raise ValueError(f"--resume {cfg.resume} would write over the run in {path}: give "
                         f"another --output_dir to go on from it there")
    try:
        state = read_run(path if own else cfg.resume)
    except (ValueError, FileNotFoundError) as error:
        if not own:
            raise
        if not os.path.exists(previous):
            raise ValueError(f"{error}, and there is no {previous}: remove it to start anew, or "
                             f"give another --output_dir") from None
        state, notes = read_run(previous), [f"{error}: going on from {previous}"]
    changed = [f"--{k} {state[name].get(k)!r} -> {v!r}" for name, config in configs.items()
               for k, v in config.items() if k not in FREE and state[name].get(k, v) != v]
    if changed and own and os.path.realpath(path) != asked:
        raise ValueError(f"{path} was trained with other options ({', '.join(changed)}): give "
                         f"another --output_dir for a new run, or --resume {path} to go on with "
                         f"the new options")
    if any(c[2:].split()[0] in state["model_config"] for c in changed):
        raise ValueError(f"--resume {cfg.resume} is of another model ({', '.join(changed)}); "
                         f"--finetune takes over what fits")
    return {**state, "changed": notes + changed, "damaged": bool(notes)}


def cut_log(path, epoch, step):
    """A log goes on where the checkpoint does: drops records of steps that will be done again, and
    a line that was cut off."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
                if (record["epoch"], record.get("step", math.inf)) <= (epoch, step):
                    kept.append(line)
            except (ValueError, TypeError, KeyError):
                continue
    with open(path + ".tmp", "w") as file:
        file.writelines(kept)
    os.replace(path + ".tmp", path)
