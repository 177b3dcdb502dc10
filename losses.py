"""The set loss of DETR: classification, L1 and generalised IoU over the matched pairs.
And the loss of classifiers.

    losses = set_loss(logits, boxes, targets)    # all decoder layers at once
    losses = classification_loss(logits, labels)
    losses["loss"].backward()

Papers: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 2, and Appendix A.2; label smoothing,
arXiv:1512.00567, Sec. 7.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from data import cxcywh_to_xyxy, overlap
from matcher import match


@dataclass(frozen=True)
class LossConfig:
    """Weights of the matching cost and of the loss, the official DETR's by default."""
    set_cost_class: Annotated[float, "matching: weight of the class probability"] = 1.0
    set_cost_bbox: Annotated[float, "matching: weight of the L1 distance of the boxes"] = 5.0
    set_cost_giou: Annotated[float, "matching: weight of the generalised IoU"] = 2.0
    ce_loss_coef: Annotated[float, "loss: weight of the classification"] = 1.0
    bbox_loss_coef: Annotated[float, "loss: weight of the L1 distance of the boxes"] = 5.0
    giou_loss_coef: Annotated[float, "loss: weight of the generalised IoU"] = 2.0
    eos_coef: Annotated[float, "weight of the no-object class among the classes"] = 0.1
    aux_loss: Annotated[bool, "add the loss of every decoder layer, not of the last alone"] = True

    def __post_init__(self):
        for field in ("set_cost_class", "set_cost_bbox", "set_cost_giou", "ce_loss_coef",
                      "bbox_loss_coef", "giou_loss_coef", "eos_coef"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"--{field} {getattr(self, field)} must not be negative")
        if not self.set_cost_class + self.set_cost_bbox + self.set_cost_giou:
            raise ValueError("--set_cost_class, --set_cost_bbox and --set_cost_giou cannot "
                             "all be 0")


def loss_counts(targets, num_queries):
    """What the losses of these images are divided by: float64 tensor (objects, matched objects,
    images). Sum it over all ranks and accumulated parts to normalise a whole step at once."""
    counts = [len(t["labels"]) for t in targets]
    return torch.tensor([sum(counts), sum(min(T, num_queries) for T in counts), len(counts)],
                        dtype=torch.float64)


def set_loss(logits, boxes, targets, cfg=LossConfig(), counts=None):
    """The losses of a batch, each a 0-dim tensor, by the official names.

    logits (L, B, Q, K+1); boxes (L, B, Q, 4) cxcywh in [0, 1], the last layer last; targets: list
    of B dicts with "labels" (T,) int64 and "boxes" (T, 4). counts: loss_counts of the whole step
    per rank (its sum over ranks divided by their number), None: of these targets. Returns "loss",
    the weighted total; "loss_ce", "loss_bbox", "loss_giou" of the last layer, "class_error"
    (percent of the matched queries with a wrong class; 100 if there is none) and
    "cardinality_error" (mean error in the number of objects); and, but for class_error, those of
    layer i under "..._i".
    Computed in float32. Raises ValueError if a cost is not finite.
    Source: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 2.
    """
    L, B, Q, _ = logits.shape
    if not cfg.aux_loss:
        logits, boxes, L = logits[-1:], boxes[-1:], 1
    logits, boxes, device = logits.float(), boxes.float(), logits.device
    objects, matched, images = (loss_counts(targets, Q) if counts is None else counts).tolist()
    pairs = match(logits, boxes, targets, cfg.set_cost_class, cfg.set_cost_bbox, cfg.set_cost_giou)
    index, labels, target_boxes = gather_pairs(pairs, targets, device)

    K = logits.shape[-1] - 1
    classes = torch.full((L, B, Q), K, device=device)
    classes[index] = labels
    weight = torch.ones(K + 1, device=device)
    weight[K] = cfg.eos_coef
    # the official mean is over the weights of the true classes, not over the queries
    weight_sum = matched + cfg.eos_coef * (images * Q - matched)
    ce = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
    loss_ce = ce.view(L, -1).sum(1) / max(weight_sum, 1e-12)                            # (L,)

    predicted = boxes[index]                                                            # (L, M, 4)
    giou = overlap(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target_boxes))[1]          # (L, M)
    loss_bbox = (predicted - target_boxes).abs().sum((1, 2)) / max(objects, 1)          # (L,)
    loss_giou = (1 - giou).sum(1) / max(objects, 1)                                     # (L,)

    total = (cfg.ce_loss_coef * loss_ce + cfg.bbox_loss_coef * loss_bbox
             + cfg.giou_loss_coef * loss_giou).sum()
    losses = {"loss": total, **official_names("loss_ce", loss_ce),
              **official_names("loss_bbox", loss_bbox), **official_names("loss_giou", loss_giou)}
    return {**losses, **errors(logits.detach(), index, labels, targets)}


def gather_pairs(pairs, targets, device):
    """The matched pairs of all layers and images as tensors.

    pairs: match() of L layers. Every layer has the same number M of pairs. Returns the index
    (layer, image, query), each (L, M), of the predictions; their labels (L, M); boxes (L, M, 4).
    """
    layer = torch.tensor([[i] for i in range(len(pairs))])
    image = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(pairs[0])])
    query = torch.stack([torch.cat([q for q, _ in layer_pairs]) for layer_pairs in pairs])
    labels, boxes = (torch.stack([torch.cat([t[key][k] for t, (_, k) in zip(targets, layer_pairs)])
                                  for layer_pairs in pairs]) for key in ("labels", "boxes"))
    index = torch.stack([layer.expand_as(query), image.expand_as(query), query])
    index, labels, boxes = (x.to(device, non_blocking=True) for x in (index, labels, boxes))
    return tuple(index), labels, boxes


def official_names(name, values):
    """Values (L,) of the layers under the official names: the last layer's without a number."""
    named = {f"{name}_{i}": v for i, v in enumerate(values[:-1])}
    return {name: values[-1], **named}


@torch.no_grad()
def errors(logits, index, labels, targets):
    """class_error of the last layer and cardinality_error of all, for the log alone."""
    guess = logits.argmax(-1)                                                           # (L, B, Q)
    wrong = (guess[index][-1] != labels[-1]).float()
    class_error = 100 * wrong.mean() if len(wrong) else logits.new_tensor(100.0)
    found = (guess != logits.shape[-1] - 1).sum(-1).float()                             # (L, B)
    objects = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
    return {"class_error": class_error,
            **official_names("cardinality_error", (found - objects).abs().mean(1))}
