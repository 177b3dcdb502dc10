"""A classifier learns from another one; then its mixers become parts of the norms before them.

    python train.py --model metaformer_tiny --mixers pool --output_dir out/teacher
    python train.py --model metaformer_tiny --mixers affine --output_dir out/student \\
        --teacher out/teacher/best.pt --finetune out/teacher/best.pt --imitation_loss_coef 1
    python distill.py out/student/best.pt --out fused.pt                # fuses, no more

This is how RIFormer (arXiv:2304.05659) is trained, whose blocks mix nothing: from the soft labels
of a teacher, by the paper's advice without the true ones (--soft_loss_coef 1), from its weights
(--finetune), and so that in a few layers mixers and blocks give what the teacher's do. The authors'
training code is not public. Choices of this file are the layers (the last block of each stage), the
mean squared distance, one teacher for labels and layers, and the defaults; --temperature 3 is that
of DeiT's comparison (arXiv:2012.12877).
"""

from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F

from coco_eval import FlagParser, UserError, check_output, run_command
from resnet import memory_format
from metaformer import METAFORMERS, MetaFormerConfig, fuse
from classification import classification_loss, mixed_batch
from checkpoint import load_weights, read_checkpoint, read_run, save_checkpoint
from model import build_model
from finetune import file_options
from load import load_model


# -- the teacher ---------------------------------------------------------------------------------

def load_teacher(path, classes):
    """The classifier of a checkpoint of train.py with these classes, in eval mode and without
    gradients. Raises UserError."""
    file = read_checkpoint(path)
    options, theirs = file_options(path, file)
    if "depths" not in options:
        raise UserError(f"--teacher {path} is no checkpoint of a classifier by train.py")
    if theirs != classes:
        raise UserError(f"--teacher {path} has the classes {', '.join(theirs[:20])}, the data has "
                        f"{', '.join(classes[:20])}: they must be the same")
    teacher = build_model(MetaFormerConfig(**options))
    load_weights(teacher, file)
    return teacher.eval().requires_grad_(False)


def keep_outputs(model):
    """A dict of the outputs (B, N, C) of the last block of each stage and of its mixer, by (stage,
    "block" or "mixer"), which each forward pass fills."""
    outputs = {}

    def keep(key, module, args, output):
        outputs[key] = output

    for k, blocks in enumerate(model.stages):
        blocks[-1].register_forward_hook(partial(keep, (k, "block")))
        blocks[-1].token_mixer.register_forward_hook(partial(keep, (k, "mixer")))
    return outputs


def check_alike(path, teacher, student):
    """Raises UserError if outputs of the teacher's blocks have other shapes than the student's."""
    widths, grids = [], []
    for model in (teacher, student):
        widths.append([width for _, width, _ in model.cfg.stages])
        grids.append(model.cfg.patch_size if model.cfg.family == "isotropic" else "pyramid")
    class_tokens = teacher.cls_token is None, student.cls_token is None
    if any(theirs != ours for theirs, ours in (widths, grids, class_tokens)):
        raise UserError(f"--imitation_loss_coef needs a teacher with the stages of the student: "
                        f"{path} has --widths {teacher.cfg.widths}, this model "
                        f"{student.cfg.widths} (and the same --patch_size, and both a class "
                        f"token or neither)")


def with_teacher(run):
    """The task of a classifier's run, with the losses that its --teacher adds. Raises UserError."""
    path, imitates = run.cfg.teacher, run.loss_cfg.imitation_loss_coef > 0
    teacher = load_teacher(path, run.train_loader.dataset.classes)
    if teacher.max_side_of_stage and run.cfg.image_size > teacher.cfg.image_size:
        raise UserError(f"--teacher {path} takes images of at most {teacher.cfg.image_size} "
                        f"pixels, --image_size is {run.cfg.image_size}")
    teacher.to(run.device, memory_format=memory_format(run.device))
    if imitates:
        check_alike(path, teacher, run.raw_model)
    outputs = [keep_outputs(model) if imitates else {} for model in (teacher, run.raw_model)]
    return run.task._replace(losses=partial(distillation_losses, teacher, outputs))


# -- losses --------------------------------------------------------------------------------------

def soft_label_loss(logits, teacher_logits, temperature):
    """The divergence of the student's probabilities from the teacher's, summed over the batch.

    logits (B, K), both divided by the temperature T; times T^2, with which its gradient is about as
    large at all temperatures (arXiv:1503.02531, Sec. 2). 0 where they agree.
    """
    ours, theirs = (F.log_softmax(x.float() / temperature, 1) for x in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature ** 2


def imitation_loss(theirs, ours):
    """The mean squared distance of the student's outputs from the teacher's, dicts of keep_outputs,
    summed over the images. (All images of a classifier have one size, so none has padding.)"""
    errors = [(ours[key].float() - theirs[key].float()).square().mean((1, 2)) for key in theirs]
    return torch.stack(errors).mean(0).sum()                        # of (outputs, B)


def distillation_losses(teacher, outputs, run, images, valid, targets, normalizers, global_step):
    """classification_losses with a teacher, who sees the same mixed images: "loss_ce" of the true
    labels, "loss_soft" of the teacher's, "loss_imitation"; "loss" is their weighted sum.

    outputs: the dicts of keep_outputs of teacher and student, empty without imitation.
    """
    cfg, count = run.loss_cfg, normalizers[2].item()
    images, shares = mixed_batch(run, images, targets, global_step)
    with torch.no_grad():
        teacher_logits = teacher(images, valid)
    logits = run.model(images, valid)

    losses = classification_loss(logits, shares, cfg.smoothing, normalizers, run.class_weights)
    losses["loss_ce"] = losses.pop("loss")
    losses["loss_soft"] = soft_label_loss(logits, teacher_logits, cfg.temperature) / count
    if cfg.imitation_loss_coef:
        losses["loss_imitation"] = imitation_loss(*outputs) / count
        for kept in outputs:                       # frees the activations with the backward pass
            kept.clear()
    losses["loss"] = (cfg.ce_loss_coef * losses["loss_ce"] + cfg.soft_loss_coef
                      * losses["loss_soft"] + cfg.imitation_loss_coef
                      * losses.get("loss_imitation", 0))
    return losses


# -- python distill.py: fusing -------------------------------------------------------------------

def main(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("checkpoint", help="of train.py, of a model with affine mixers")
    parser.add_argument("--out", default="fused.pt", help="the checkpoint to write")
    args = parser.parse_args(argv)
    check_output("--out", args.out, args.checkpoint)
    state = read_run(args.checkpoint)
    model, _ = load_model(args.checkpoint)
    before = sum(p.numel() for p in model.parameters())
    fuse(model)
    backbone = getattr(model.cfg, "backbone", "")
    if backbone in METAFORMERS and "affine" in METAFORMERS[backbone].mixers:
        raise UserError(f"a checkpoint only names its backbone, {backbone}, which has affine "
                        f"mixers: fuse the model where it is used, with fuse(model)")
    save_checkpoint(args.out, {**state, "model": model.state_dict(), "optimizer": {},
                               "model_config": asdict(model.cfg)}, keep_previous=False)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,d} parameters, "
          f"{args.checkpoint} has {before:,d}")


if __name__ == "__main__":
    run_command(main)
