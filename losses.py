"""The set loss of DETR: classification, L1 and generalised IoU over the matched pairs.

    losses = set_loss(logits, boxes, targets)    # all decoder layers at once
    losses["loss"].backward()

Paper: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 2, and Appendix A.2.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from options import check_options
from coco_eval import UserError
from data import cxcywh_to_xyxy, iou_and_giou
from matcher import match


@dataclass(frozen=True)
class LossConfig:
    """Weights of the matching cost and of the loss, the official DETR's by default."""
    set_cost_class: Annotated[float, "matching: weight of the class probability", 0] = 1.0
    set_cost_bbox: Annotated[float, "matching: weight of the L1 distance of the boxes", 0] = 5.0
    set_cost_giou: Annotated[float, "matching: weight of the generalised IoU", 0] = 2.0
    ce_loss_coef: Annotated[float, "loss: weight of the classification", 0] = 1.0
    bbox_loss_coef: Annotated[float, "loss: weight of the L1 distance of the boxes", 0] = 5.0
    giou_loss_coef: Annotated[float, "loss: weight of the generalised IoU", 0] = 2.0
    mask_loss_coef: Annotated[float, "loss: weight of the focal loss of the masks", 0] = 1.0
    dice_loss_coef: Annotated[float, "loss: weight of the dice loss of the masks", 0] = 1.0
    eos_coef: Annotated[float, "weight of the no-object class among the classes", 0] = 0.1
    aux_loss: Annotated[bool, "add the loss of every decoder layer, not of the last alone"] = True

    def __post_init__(self):
        check_options(self)
        if not self.set_cost_class + self.set_cost_bbox + self.set_cost_giou:
            raise UserError("--set_cost_class, --set_cost_bbox and --set_cost_giou cannot all be 0")


def loss_normalizers(targets, num_queries):
    """The denominators of the losses of these images: float64 tensor (objects, matched objects,
    images). Summed over all processes and micro-batches they are those of a whole step."""
    counts = [len(t["labels"]) for t in targets]
    matched = sum(min(T, num_queries) for T in counts)
    return torch.tensor([sum(counts), matched, len(counts)], dtype=torch.float64)


def gather_pairs(pairs, targets, device):
    """The matched pairs of all layers and images as tensors.

    pairs: match() of L layers. Every layer has the same number M of pairs. Returns the index
    (layer, image, query), each (L, M), of the predictions; their labels (L, M); boxes (L, M, 4).
    """
    index, labels, boxes = [], [], []
    for layer, layer_pairs in enumerate(pairs):
        for image, (query, target) in enumerate(layer_pairs):
            place = torch.full_like(query, layer), torch.full_like(query, image), query
            index.append(torch.stack(place))                                # (3, min(Q, T))
            labels.append(targets[image]["labels"][target])
            boxes.append(targets[image]["boxes"][target])
    L = len(pairs)
    index = torch.cat(index, 1).view(3, L, -1)                                          # (3, L, M)
    labels, boxes = torch.cat(labels).view(L, -1), torch.cat(boxes).view(L, -1, 4)
    on_gpu = device.type == "cuda"                 # where the host need not wait
    index, labels, boxes = (x.to(device, non_blocking=on_gpu) for x in (index, labels, boxes))
    return tuple(index), labels, boxes


def by_layer(name, values):
    """Values (L,) of the layers under the official names: the last layer's without a number."""
    named = {f"{name}_{i}": v for i, v in enumerate(values[:-1])}
    return {name: values[-1], **named}


def set_loss(logits, boxes, targets, cfg=LossConfig(), normalizers=None, class_weights=None,
             pairs=None):
    """The losses of a batch, each a 0-dim tensor, by the official names.

    logits (L, B, Q, K+1); boxes (L, B, Q, 4) cxcywh in [0, 1], the last layer last; targets: list
    of B dicts with "labels" (T,) int64 and "boxes" (T, 4). normalizers: loss_normalizers of the
    whole step, divided by the number of processes, because DDP averages their gradients; None: of
    these targets. class_weights (K,): of the classes in loss_ce, 1 on average; None: 1 each.
    pairs: of match, if it is done already.

    Returns "loss", the weighted total; "loss_ce", "loss_bbox", "loss_giou" of the last layer,
    "class_error" (percent of the matched queries with a wrong class; 100 if no query is matched)
    and "cardinality_error" (mean error in the number of objects); all but class_error also for
    every earlier layer i, as "loss_ce_i". Computed in float32. Raises ValueError if a cost is not
    finite.
    Source: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 2.
    """
    if not cfg.aux_loss:
        logits, boxes = logits[-1:], boxes[-1:]
    logits, boxes = logits.float(), boxes.float()
    (L, B, Q, classes), device = logits.shape, logits.device
    K = classes - 1
    if normalizers is None:
        normalizers = loss_normalizers(targets, Q)
    objects, matched, images = normalizers.tolist()

    pairs = pairs or match(logits, boxes, targets, cfg.set_cost_class, cfg.set_cost_bbox,
                           cfg.set_cost_giou)
    index, labels, target_boxes = gather_pairs(pairs, targets, device)

    # classes: every query without an object should say "no object", class K.
    # softmax over classes and no-object: change it here, in matching_cost and postprocess together
    wanted = torch.full((L, B, Q), K, device=device)
    wanted[index] = labels
    weight = torch.ones(K + 1, device=device)
    weight[K] = cfg.eos_coef
    if class_weights is not None:
        weight[:K] = class_weights
    ce = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
    # the mean divides by the sum of the weights of the wanted classes, as F.cross_entropy's, but
    # that class_weights count as 1, their average
    weight_sum = matched + cfg.eos_coef * (images * Q - matched)
    loss_ce = ce.view(L, -1).sum(1) / max(weight_sum, 1e-12)                            # (L,)

    # boxes of the matched queries
    predicted = boxes[index]                                                            # (L, M, 4)
    _, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target_boxes))     # (L, M)
    objects = objects or 1                                          # can be under 1 per process
    loss_bbox = (predicted - target_boxes).abs().sum((1, 2)) / objects                  # (L,)
    loss_giou = (1 - giou).sum(1) / objects                                             # (L,)

    total = (cfg.ce_loss_coef * loss_ce + cfg.bbox_loss_coef * loss_bbox
             + cfg.giou_loss_coef * loss_giou).sum()
    return {"loss": total, **by_layer("loss_ce", loss_ce), **by_layer("loss_bbox", loss_bbox),
            **by_layer("loss_giou", loss_giou),
            **log_metrics(logits.detach(), index, labels, targets, normalizers)}


@torch.no_grad()
def log_metrics(logits, index, labels, targets, normalizers):
    """class_error of the last layer and cardinality_error of all, for the log alone."""
    _, matched, images = normalizers.tolist()
    guess = logits.argmax(-1)                                                           # (L, B, Q)
    wrong = (guess[index][-1] != labels[-1]).sum()
    # without any object, 100 % of the images stand for the share of wrong queries
    share = wrong / matched if matched else logits.new_tensor(len(targets) / images)
    found = (guess != logits.shape[-1] - 1).sum(-1).float()                             # (L, B)
    objects = torch.tensor([len(t["labels"]) for t in targets])
    objects = objects.to(logits.device, non_blocking=logits.is_cuda)        # the host need not wait
    return {"class_error": 100 * share,
            **by_layer("cardinality_error", (found - objects).abs().sum(1) / images)}
