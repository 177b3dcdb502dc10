"""Which query answers for which object: matching costs and the Hungarian assignment.

    pairs = match(logits, boxes, targets)        # one layer: B pairs (query, target)

Paper: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 1.
"""

import torch
from scipy.optimize import linear_sum_assignment

from coco_eval import UserError
from data import cxcywh_to_xyxy, generalized_box_iou


class NotFiniteError(UserError):
    """A loss, cost or gradient is NaN or infinite."""


def pad_targets(targets, num_classes, device):
    """Labels (B, T) and boxes (B, T, 4) of all images, T the largest number of objects; padded with
    class 0 and a box over the whole image. Each is copied to the device once."""
    for t in targets:                               # on a GPU a wrong index would end the process
        if len(t["labels"]) and not 0 <= t["labels"].min() <= t["labels"].max() < num_classes:
            raise UserError(f"labels {t['labels'].tolist()} do not lie in 0 .. {num_classes - 1}")
    T = max(len(t["labels"]) for t in targets)
    labels = torch.zeros(len(targets), T, dtype=torch.int64)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(targets), T, 1)
    for i, t in enumerate(targets):
        labels[i, :len(t["labels"])] = t["labels"]
        boxes[i, :len(t["labels"])] = t["boxes"]
    on_gpu = device.type == "cuda"                 # where the host need not wait
    return labels.to(device, non_blocking=on_gpu), boxes.to(device, non_blocking=on_gpu)


@torch.no_grad()
def matching_cost(logits, boxes, targets, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0):
    """Cost of every pair of a query and an object of the same image: (L, B, Q, T), float32.

    logits (L, B, Q, K+1); boxes (L, B, Q, 4) cxcywh; T the largest number of objects in an image.
    The columns beyond an image's own objects are padding: ignore them. Eq. 1: minus the probability
    of the class, L1 distance and minus the generalised IoU.
    """
    labels, target_boxes = pad_targets(targets, logits.shape[-1] - 1, logits.device)
    L, B, Q, _ = boxes.shape

    # softmax over classes and no-object: change it here, in set_loss and in postprocess together
    probability = logits.float().softmax(-1)                               # (L, B, Q, K+1)
    index = labels[None, :, None].expand(L, B, Q, -1)                      # (L, B, Q, T)
    cost = -cost_class * probability.gather(3, index)

    # not cdist, which is slow on GPUs; nor a sum over the last, short dimension, slow on CPUs
    boxes = boxes.float()
    l1 = sum((x[..., None] - y[:, None]).abs()                             # (L, B, Q, T)
             for x, y in zip(boxes.unbind(-1), target_boxes.unbind(-1)))
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return cost + cost_bbox * l1 - cost_giou * giou


def match(logits, boxes, targets, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0):
    """Cheapest one-to-one assignment of queries to targets, for every image.

    logits (B, Q, K+1); boxes (B, Q, 4) cxcywh in [0, 1]; targets: list of B dicts with "labels"
    (T,) int64 and "boxes" (T, 4). Returns B pairs of int64 tensors (query, target) on the CPU, each
    of length min(Q, T), queries ascending; T may be 0. Given all decoder layers, (L, B, Q, ...),
    returns a list of L such lists, after one transfer of all costs to the host. Raises
    NotFiniteError, a ValueError, if a cost is not finite.
    Source: DETR, arXiv:2005.12872, Sec. 3.1, Eq. 1.
    """
    if logits.dim() == 3:
        return match(logits[None], boxes[None], targets, cost_class, cost_bbox, cost_giou)[0]
    costs = matching_cost(logits, boxes, targets, cost_class, cost_bbox, cost_giou).cpu()
    if not costs.isfinite().all():
        number, image = (~costs.isfinite()).nonzero()[0, :2].tolist()
        raise NotFiniteError(f"the matching cost is not finite, first in decoder layer {number}, "
                             f"image {image} of the batch: the predictions or the targets hold NaN "
                             f"or infinity")
    counts, pairs = [len(t["labels"]) for t in targets], []
    for layer in costs:                                                    # (B, Q, T)
        found = [linear_sum_assignment(cost[:, :T].numpy()) for cost, T in zip(layer, counts)]
        pairs.append([(torch.from_numpy(q), torch.from_numpy(t)) for q, t in found])
    return pairs
