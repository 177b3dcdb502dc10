"""What study.py measures beside the runs: the fluctuation, surgery on trained models, the cost.

    measure_noise("study/both-pool-b16_s1")        # of a run of part S5, a dict
    measure_surgery("study/attention_s1")          # of a trained model with attention, a dict
    measure_layers("study/enc-pool_s1")            # AP and duplicates by decoder layer, a dict
    measure_attention("study/attention_s1")        # how far the encoder's attention reaches, a dict
    measure_cost("detr_r50", (800, 1066))          # by mixer, a list of rows
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import bench
import train
from attention import attention_weights, run_and_record
from coco_eval import UserError
from data import EvalSampler, build_dataset, collate, to_device
from checkpoint import read_run
from model import ModelConfig, build_mixer, build_model
from matcher import match
from losses import LossConfig, set_loss
from config import TrainConfig, make_configs, parse_options
from diagnose import ap_by_layer, query_slots
from load import load_model
from evaluate import collect_rows, evaluate, evaluate_layers, layer_rows


# -- the fluctuation: statistics -----------------------------------------------------------------

def running_deviation(losses, window=50):
    """Root of the mean square of (loss - m) / m, m the mean of the `window` steps around a step, or
    of half of all losses if those are fewer."""
    losses, window = np.asarray(losses, float), min(window, (len(losses) + 1) // 2)
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    middle = losses[window // 2:][:len(mean)]
    return float(np.sqrt((((middle - mean) / mean)**2).mean()))


def spread_around_line(values):
    """Standard deviation of the values around the line that fits them best, over their mean."""
    x = np.arange(len(values))
    rest = values - np.polyval(np.polyfit(x, values, 1), x)
    return float(np.sqrt((rest**2).sum() / max(len(values) - 2, 1)) / np.mean(values))


def power_of(x, y):
    """p of the curve y = c x^p that fits best, by the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def agreement(a, b):
    """The cosine of the angle between two gradients, tensors of one dimension."""
    return (a @ b / (a.norm() * b.norm())).item()


def matching_changes(epochs):
    """The share of objects whose query is another one an epoch later; epochs: rows of queries."""
    queries = np.array(epochs)
    return float((queries[1:] != queries[:-1]).mean())


def middle_part(values):
    """Epochs 3 to 8 of ten: the loss no longer falls steeply, and the run does not end yet."""
    return values[round(0.2 * len(values)):round(0.8 * len(values))]


# -- the fluctuation: runs -----------------------------------------------------------------------

NOISE = "deviation", "frozen", "spread", "agreement", "changes"
FROZEN_BATCHES, GRADIENT_BATCHES = 400, 50


def train_keeping_epochs(words):
    """train.py with these words, which also keeps the weights after each epoch, as epoch_1.pt, ...
    in its folder. Does not return."""
    _, given = parse_options(words, __doc__)
    run = train.start_run(*make_configs(given), *train.start_processes("auto"))

    report = run.task.report

    def save_and_report(*args):
        torch.save(run.raw_model.state_dict(), Path(run.cfg.output_dir, f"epoch_{run.epoch}.pt"))
        return report(*args)
    run.task = run.task._replace(report=save_and_report)
    sys.exit(train.train(run))


@torch.no_grad()
def matched_queries(model, loader):
    """The query of every object of the loader's images, in their order, a list."""
    queries = []
    model.eval()
    for images, valid, targets in loader:
        logits, boxes = model(*to_device(images, valid, "cpu"))
        for query, target in match(logits[-1], boxes[-1], targets):
            queries += query[target.argsort()].tolist()
    return queries


def random_batches(loader, epoch):
    """Batches without end, in the orders of `epoch` and later."""
    for epoch in itertools.count(epoch):
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def gradient(model, images, targets, loss_cfg):
    """The gradient of the loss of these images, which have no padding, all tensors in a row."""
    model.zero_grad()
    set_loss(*model(images), targets, loss_cfg)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sample_losses(model, loader, loss_cfg, epoch):
    """Of fixed weights: the losses of 400 batches that the training, which ended before `epoch`,
    did not see in this order; and the agreement of the halves of 50 more."""
    model.train()                                  # batch norm uses the batch, as in training
    batches, losses, cosines = random_batches(loader, epoch), [], []
    for images, _, targets in itertools.islice(batches, FROZEN_BATCHES):
        with torch.no_grad():
            losses.append(set_loss(*model(images), targets, loss_cfg)["loss"].item())
    for images, _, targets in itertools.islice(batches, GRADIENT_BATCHES):
        h = len(targets) // 2
        first = gradient(model, images[:h], targets[:h], loss_cfg)
        cosines.append(agreement(first, gradient(model, images[h:], targets[h:], loss_cfg)))
    return losses, cosines


def measure_noise(folder):
    """The measures of a run that kept its epochs, a dict; "batch_size" and NOISE, without unit:

    deviation   of the loss in training, around its running mean, in the middle of the run
    frozen      of the losses of 400 random batches with the weights after half of the epochs, over
                their mean: what the choice of the images alone does
    spread      of the epochs' mean losses around a line, in the middle of the run
    agreement   mean cosine of the gradients of the two halves of a batch, at the same weights
    changes     share of the objects in the validation images whose matched query differs from
                that of the epoch before (arXiv:2203.01305)
    """
    folder = Path(folder)
    state = read_run(str(folder / "ckpt.pt"))
    cfg, loss_cfg = TrainConfig(**state["train_config"]), LossConfig(**state["loss_config"])
    if cfg.epochs < 2:
        raise UserError(f"{folder}: the fluctuation needs --epochs 2 or more, the run has 1")
    model = build_model(ModelConfig(**state["model_config"]))
    sets = build_dataset(cfg, "train"), build_dataset(cfg, "val")
    train_loader, val_loader = train.build_loaders(cfg, *sets, 0, 1, "cpu")
    weights = [torch.load(folder / f"epoch_{k + 1}.pt") for k in range(cfg.epochs)]

    queries = []
    for epoch in weights:
        model.load_state_dict(epoch)
        queries.append(matched_queries(model, val_loader))
    model.load_state_dict(weights[(cfg.epochs - 1) // 2])
    losses, cosines = sample_losses(model, train_loader, loss_cfg, cfg.epochs)

    steps, epochs = ([json.loads(line) for line in open(folder / name)]
                     for name in ("steps.txt", "log.txt"))
    return {"batch_size": cfg.batch_size,
            "deviation": running_deviation(middle_part([r["loss"] for r in steps])),
            "frozen": statistics.stdev(losses) / statistics.fmean(losses),
            "spread": spread_around_line(middle_part([r["train_loss"] for r in epochs])),
            "agreement": statistics.fmean(cosines), "changes": matching_changes(queries)}


# -- trained models ------------------------------------------------------------------------------

def trained_model(folder, batch_size=None):
    """The model of a run and a loader of its validation images, so many at a time."""
    model, info = load_model(str(Path(folder, "ckpt.pt")))
    cfg = TrainConfig(**info["train"])
    dataset = build_dataset(cfg, "val", info["classes"])
    sampler = EvalSampler(dataset, batch_size or cfg.eval_batch_size)
    return model.eval(), DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


def measure_layers(folder):
    """A dict: "layers", the rows of ap_by_layer, and the "mutual_information" of query_slots."""
    model, loader = trained_model(folder)
    dataset = loader.dataset
    rows, _ = collect_rows(model, loader, "cpu", torch.float32, layer_rows)
    results = evaluate_layers(rows, dataset, model.cfg.dec_layers)
    slots = query_slots(results[-1]["columns"][1], dataset.sizes, len(dataset.classes))
    return {"layers": ap_by_layer(results, len(dataset)),
            "mutual_information": slots["mutual_information"]}


RECEPTIVE_FIELD = 51                                # pixels on a side, of the backbone resnet_tiny
REACH = "distance", "entropy", "far"


def attention_reach(weights, grid, stride):
    """How far attention weights (..., N, N) reach on a grid (H, W) of tokens, `stride` pixels
    apart: (3, ...), means over the N tokens that read, in the order of REACH.

    distance    mean distance of the tokens that are read, by their weights, in pixels
    entropy     of the weights, over log N: 0 for one token, 1 for all alike
    far         share of the weights on tokens farther than half of RECEPTIVE_FIELD, whose centres
                the backbone does not see from the token that reads

    For comparison: equal weights on 8 x 8 tokens with stride 8 have 33.1, 1 and 0.610. The distance
    is that of arXiv:2010.11929, Sec. 4.5.
    """
    (H, W), N = grid, grid[0] * grid[1]
    centres = torch.cartesian_prod(torch.arange(H), torch.arange(W)).float() * stride    # (N, 2)
    distance = torch.cdist(centres, centres)                                             # (N, N)
    entropy = torch.special.entr(weights).sum(-1) / np.log(N)
    return torch.stack([(weights * distance).sum(-1).mean(-1), entropy.mean(-1),
                        (weights * (distance > RECEPTIVE_FIELD / 2)).sum(-1).mean(-1)])


@torch.no_grad()
def measure_attention(folder):
    """attention_reach of the encoder, mean over the validation images: {name of REACH: by layer, by
    head}; {} without attention there."""
    model, loader = trained_model(folder, batch_size=1)                    # without padding
    if (model.cfg.encoder_mixer or model.cfg.mixer) != "attention" or not model.cfg.enc_layers:
        return {}
    layers, stride = model.transformer.encoder.layers, model.backbone[0].body.stride
    total = torch.zeros(len(REACH), len(layers), model.cfg.nheads)
    for images, _, _ in loader:
        for k, layer in enumerate(layers):
            (q, k_input, _), grid = run_and_record(model, images, layer.self_attn)
            weights = attention_weights(layer.self_attn, q, k_input)[0]          # (nh, N, N)
            total[:, k] += attention_reach(weights, grid, stride)
    return dict(zip(REACH, (total / len(loader)).tolist()))


# -- surgery -------------------------------------------------------------------------------------

def places(cfg):
    """{place: [(side, layer), ...]} where mixers are replaced: one layer, one side, all."""
    layers = [("encoder", k) for k in range(cfg.enc_layers)]
    layers += [("decoder", k) for k in range(cfg.dec_layers)]
    named = {f"{side} {k + 1}": [(side, k)] for side, k in layers}
    for side in ("encoder", "decoder"):
        named[side] = [place for place in layers if place[0] == side]
    return {**named, "all": layers}


def measure_surgery(folder):
    """AP of a trained model after its mixers at a place were replaced, without training:
    {"attention": AP as it was, "encoder 1, none": AP, ...}."""
    model, loader = trained_model(folder)
    found = {"attention": evaluate(model, loader, "cpu")["stats"][0].item()}
    for place, layers in places(model.cfg).items():
        layers = [getattr(model.transformer, side).layers[k] for side, k in layers]
        trained = [layer.self_attn for layer in layers]
        for mixer in ("avgpool", "pool", "none"):
            for layer in layers:
                layer.self_attn = build_mixer(mixer, model.cfg, None)        # has no fixed grid
            found[f"{place}, {mixer}"] = evaluate(model, loader, "cpu")["stats"][0].item()
        for layer, mixer in zip(layers, trained):
            layer.self_attn = mixer
    return found


# -- the cost ------------------------------------------------------------------------------------

COST_MIXERS = "attention", "avgpool", "pool", "none", "mlp", "conv", "random"


def measure_cost(name, size, more=()):
    """A row for each mixer of both sides: one image (height, width) through the whole detector.

    "mixing": the share of the multiply-adds that self-attention has, or what replaces it.
    "seconds": median, "fastest": least of alternating runs; "memory_mb": peak above the level
    before the model was built. more: further options of bench.py.
    """
    runs, memory = {}, {}
    words = ["forward", "--model", name, "--batch_size", "1", "--height", str(size[0]), "--width",
             str(size[1]), *more]
    for mixer in COST_MIXERS:
        args = bench.options().parse_args([*words, "--mixer", mixer])
        runs[mixer] = bench.make_run(args), ()
        command = [bench.__file__, *words, "--mixer", mixer]
        memory[mixer] = bench.in_child("ours", command=command)
    times = bench.time_interleaved(runs, args)
    macs = {mixer: bench.count_flops(run) // 2 for mixer, (run, _) in runs.items()}
    return [{"model": name, "mixer": mixer, "multiply_adds": macs[mixer],
             "mixing": (macs[mixer] - macs["none"]) / macs[mixer],
             "seconds": statistics.median(times[mixer]), "fastest": min(times[mixer]),
             "memory_mb": memory[mixer], "device": args.device, "dtype": args.dtype,
             "threads": torch.get_num_threads()} for mixer in COST_MIXERS]
