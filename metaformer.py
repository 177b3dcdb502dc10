"""MetaFormer classifiers: PoolFormer and its relatives, from the token mixers of mixers.py.

    model = MetaFormer(METAFORMERS["poolformer_s12"])
    logits = model(images, valid)                # uint8 (B, 3, IH, IW), bool (B, IH, IW) or None

Papers: MetaFormer, arXiv:2111.11418 and arXiv:2210.13452; ViT, arXiv:2010.11929; DeiT,
arXiv:2012.12877; MLP-Mixer, arXiv:2105.01601.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from coco_eval import UserError
from options import check_options
from mixers import MIXERS, MixerConfig, StarReLU, to_grid
from resnet import BatchNorm2d, Normalise


class GroupNorm(nn.Module):
    """Normalises over tokens and channels together, with weight and bias (C,) per channel.

    nn.GroupNorm(1, C) of a map; nn.LayerNorm(C) differs, it normalises each token by itself. The
    statistics are those of the valid tokens.
    """

    def __init__(self, C, eps, bias=True):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x, valid):
        if valid is None:
            x = F.layer_norm(x, x.shape[1:], eps=self.eps)
        else:
            v = valid[..., None].float() / valid.sum(1).clamp(min=1)[:, None, None] / x.shape[2]
            x = x.float() - (x * v).sum((1, 2), keepdim=True)
            x = x * ((x.square() * v).sum((1, 2), keepdim=True) + self.eps).rsqrt()
        return x * self.weight if self.bias is None else x * self.weight + self.bias


class LayerNorm(nn.LayerNorm):
    """Normalises each token over its channels."""

    def __init__(self, C, eps, bias=True):
        super().__init__(C, eps, bias=bias)

    def forward(self, x, valid):
        return super().forward(x)


class TokenBatchNorm(BatchNorm2d):
    """Normalises each channel over all images; in training over their padding, too."""

    def __init__(self, C, eps, bias=True):
        super().__init__(C, eps)

    def forward(self, x, valid):
        return super().forward(x.transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2)


class NoNorm(nn.Identity):
    """The tokens as they are (arXiv:2111.11418, Table 5)."""

    def forward(self, x, valid):
        return x


TOKEN_NORMS = {"group": GroupNorm, "layer": LayerNorm, "batch": TokenBatchNorm, "none": NoNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "starrelu": StarReLU}


@dataclass(frozen=True)
class MetaFormerConfig:
    """Everything that shapes a classifier of the MetaFormer family.

    Three families differ in more than their sizes:
    poolformer  arXiv:2111.11418. LayerScale on the branches; norm, then mean over tokens.
    baselines   arXiv:2210.13452. No biases in blocks and their norms; a scale on the skip of the
                last two stages; norms beside the strided convolutions; mean over tokens, then norm.
    isotropic   one stage of patches: with positions (and a class token, which is read out) ViT,
                arXiv:2010.11929; with the mlp mixer MLP-Mixer, arXiv:2105.01601.
    """
    family: Annotated[str, "poolformer, baselines or isotropic"] = "poolformer"
    depths: Annotated[str, "blocks of each stage"] = "2,2,6,2"
    widths: Annotated[str, "channels of each stage"] = "64,128,320,512"
    mixers: Annotated[str, "token mixers, keys of MIXERS: one for all stages, or each"] = "pool"
    norm: Annotated[str, "group (tokens and channels together), layer, batch or none"] = "group"
    activation: Annotated[str, "of the channel MLP: gelu, relu, silu or starrelu"] = "gelu"
    residual: Annotated[bool, "add the input of mixer and channel MLP to their output"] = True
    channel_mlp: Annotated[bool, "have a channel MLP in each block"] = True
    positions: Annotated[bool, "learned, added before the first stage with attention"] = False
    mlp_head: Annotated[bool, "an MLP instead of a linear layer as the classifier"] = False
    pool_size: Annotated[int, "side of the pooling window in tokens, odd"] = 3
    head_size: Annotated[int, "channels of an attention head"] = 32
    tokens_mlp_dim: Annotated[int, "hidden units of the mlp mixer, over tokens"] = 256
    layer_scale: Annotated[float, "first value of LayerScale, 0 = without"] = 1e-5
    drop_path: Annotated[float, "stochastic depth of the last block, linear from 0"] = 0.1
    head_dropout: Annotated[float, "dropout in the MLP head"] = 0.0
    image_size: Annotated[int, "largest side in pixels for fixed-grid mixers, positions"] = 224
    crop_fraction: Annotated[float, "side of the centre crop in evaluation, of the shorter"] = 0.9
    num_classes: Annotated[int, "classes K; data sets set it"] = 1000
    out_stages: Annotated[str, "no classifier, but normed maps of these stages, as in 1,2,3,4"] = ""

    def __post_init__(self):
        for field, known in (("family", ("poolformer", "baselines", "isotropic")),
                             ("norm", TOKEN_NORMS), ("activation", ACTIVATIONS),
                             ("mixers", MIXERS)):
            value = getattr(self, field)
            if not set(value.split(",") if field == "mixers" else [value]) <= set(known):
                raise UserError(f"--{field} {value} is unknown, use: {', '.join(known)}")
        n = 1 if self.family == "isotropic" else 4
        depths, widths, mixers = (x.split(",") for x in (self.depths, self.widths, self.mixers))
        if (len(depths), len(widths)) != (n, n) or len(mixers) not in (1, n) or not all(
                x.isdecimal() for x in depths + widths):
            raise UserError(f"--depths {self.depths}, --widths {self.widths} and --mixers "
                            f"{self.mixers} must be of {n} stage(s), separated by commas")
        for depth, width, mixer in self.stages:
            if depth < 1 or width < 1 or mixer == "attention" and width % self.head_size:
                raise UserError(f"--depths {self.depths} and --widths {self.widths} must be over 0"
                                f", attention's a multiple of --head_size {self.head_size}")
        if self.pool_size % 2 == 0:
            raise UserError(f"--pool_size {self.pool_size} must be odd, to have a centre")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(f"--crop_fraction {self.crop_fraction} must be over 0 and at most 1")
        for field in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"--{field} {getattr(self, field)} must be in [0, 1)")
        for field in ("num_classes", "image_size", "pool_size", "tokens_mlp_dim", "head_size"):
            if getattr(self, field) < 1:
                raise UserError(f"--{field} {getattr(self, field)} must be at least 1")
        if not 0 <= self.layer_scale < math.inf:
            raise UserError(f"--layer_scale {self.layer_scale} must be 0 or a positive number")
        if self.positions and "attention" not in self.mixers:
            raise UserError(f"--positions are for --mixers with attention, not {self.mixers}")
        if not set(self.out_stages.split(",") if self.out_stages else ()) <= {str(k + 1) for k in range(n)}:
            raise UserError(f"--out_stages {self.out_stages} must name stages from 1 to {n}, as in 1,{n}")

    @property
    def takes_any_size(self):
        """Whether images of all sizes can be its input, as a backbone's must."""
        fixed = any(hasattr(MIXERS[name], "fixed_grid") for name in self.mixers.split(","))
        return self.family != "isotropic" and not self.positions and not fixed

    @property
    def stages(self):
        """(blocks, channels, mixer) of each stage."""
        depths, widths, mixers = (x.split(",") for x in (self.depths, self.widths, self.mixers))
        mixers = mixers * len(depths) if len(mixers) == 1 else mixers
        return list(zip(map(int, depths), map(int, widths), mixers))


def token_norm(cfg, C):
    """The norm of a MetaFormer's blocks for C channels."""
    eps = 1e-5 if cfg.family == "poolformer" else 1e-6
    return TOKEN_NORMS[cfg.norm](C, eps, bias=cfg.family != "baselines")


class Downsample(nn.Module):
    """Strided k x k convolution: tokens of one grid to tokens of a coarser one.

    Padding is zero before it, as if the image ended there, and afterwards a token is valid where
    the image alone would have one. So an image in the upper left of a larger canvas gives the very
    tokens it gives alone. The baselines have norms: after the first one, before the others.
    """

    def __init__(self, cin, cout, k, stride, padding, norms):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, stride, padding)
        self.pre_norm = self.post_norm = None
        if norms and cin == 3:
            self.post_norm = nn.LayerNorm(cout, 1e-6, bias=False)
        elif norms:
            self.pre_norm = nn.LayerNorm(cin, 1e-6, bias=False)
        self.first = k - 1 - 2 * padding    # output row i is there if input row first + i*stride is

    def forward(self, x, valid, grid):
        if self.pre_norm:
            x = self.pre_norm(x)
        x = self.conv(to_grid(x, valid, grid)[0])                   # (B, C, H, W)
        if valid is not None:
            step = slice(self.first, None, self.conv.stride[0])
            valid = valid.view(-1, *grid)[:, step, step].flatten(1)
        y = x.flatten(2).transpose(1, 2)                            # (B, N, C)
        return self.post_norm(y) if self.post_norm else y, valid, x.shape[2:]


class ChannelMLP(nn.Module):
    """C -> 4C -> C for each token by itself."""

    def __init__(self, C, activation, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class MetaFormerBlock(nn.Module):
    """Norm and token mixer, norm and channel MLP, each in a residual (arXiv:2111.11418, Eq. 2, 3).

    stage 0 to 3; max_grid: the largest grid that this stage will get; drop_path: the chance in
    training that an image skips a branch (arXiv:1603.09382).
    """

    def __init__(self, cfg, stage, max_grid, drop_path):
        super().__init__()
        _, C, mixer = cfg.stages[stage]
        self.residual, self.drop_path, bias = cfg.residual, drop_path, cfg.family != "baselines"
        self.norm1 = token_norm(cfg, C)
        self.token_mixer = MIXERS[mixer](MixerConfig(
            hidden_dim=C, nheads=max(1, C // cfg.head_size), pool_size=cfg.pool_size,
            tokens_mlp_dim=cfg.tokens_mlp_dim, max_grid=max_grid,
            qkv_bias=cfg.family == "isotropic", out_bias=bias))
        self.norm2 = token_norm(cfg, C) if cfg.channel_mlp else None
        self.mlp = ChannelMLP(C, cfg.activation, bias) if cfg.channel_mlp else None
        for k in (1, 2) if cfg.channel_mlp else (1,):
            if cfg.layer_scale:
                setattr(self, f"layer_scale_{k}", nn.Parameter(torch.full((C,), cfg.layer_scale)))
            if cfg.family == "baselines" and stage >= 2:
                setattr(self, f"res_scale_{k}", nn.Parameter(torch.ones(C)))

    def forward(self, x, valid, grid):
        x = self.add(x, self.token_mixer(self.norm1(x, valid), None, valid, grid), 1)
        if self.mlp:
            x = self.add(x, self.mlp(self.norm2(x, valid)), 2)
        return x

    def add(self, x, y, k):
        """Skip x and branch y of residual k, both (B, N, C), scaled where there is a scale."""
        layer_scale, res_scale = (getattr(self, f"{s}_scale_{k}", None) for s in ("layer", "res"))
        if layer_scale is not None:
            y = y * layer_scale
        if self.training and self.drop_path:
            keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path)).to(y.dtype)
        if res_scale is not None:
            x = x * res_scale
        return x + y if self.residual else y


class MlpHead(nn.Module):
    """Classifier of ConvFormer and CAFormer."""

    def __init__(self, C, cfg):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, cfg.num_classes)
        self.norm, self.dropout = nn.LayerNorm(4 * C), nn.Dropout(cfg.head_dropout)

    def forward(self, x):
        # StarReLU's scale and bias would be undone by the norm
        return self.fc2(self.dropout(self.norm(F.relu(self.fc1(x)).square())))


class MetaFormer(nn.Module):
    """Classifier, or with cfg.out_stages the backbone for detection and segmentation.

    Sources: arXiv:2111.11418, Fig. 2 and Table 1; for the other families see MetaFormerConfig.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.normalise = cfg, Normalise()
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.pos_embed, self.cls_token, self.limits = None, None, {}
        n, cin, side = sum(depth for depth, _, _ in cfg.stages), 3, cfg.image_size
        rates = iter([cfg.drop_path * i / max(1, n - 1) for i in range(n)])
        last = max(map(int, cfg.out_stages.split(","))) if cfg.out_stages else len(cfg.stages)
        for k, (depth, C, mixer) in enumerate(cfg.stages[:last]):
            kernel, stride, padding = (3, 2, 1) if k else (7, 4, 2)
            if cfg.family == "isotropic":
                kernel, stride, padding = 16, 16, 0
            self.downsample_layers.append(
                Downsample(cin, C, kernel, stride, padding, cfg.family == "baselines"))
            cin, side = C, (side + 2 * padding - kernel) // stride + 1
            self.stages.append(nn.ModuleList(
                MetaFormerBlock(cfg, k, (side, side), next(rates)) for _ in range(depth)))
            if hasattr(MIXERS[mixer], "fixed_grid"):
                self.limits[k] = side
            if cfg.positions and mixer == "attention" and self.pos_embed is None:
                self.positions_at, self.limits[k] = k, side
                cls = 1 if cfg.family == "isotropic" else 0         # the first position is its
                self.cls_token = nn.Parameter(torch.zeros(1, 1, C)) if cls else None
                self.pos_embed = nn.Parameter(torch.zeros(1, cls + side * side, C))
        self.num_channels = C
        for k in map(int, cfg.out_stages.split(",") if cfg.out_stages else ()):  # official: norm0, norm2, ...
            self.add_module(f"norm{2 * k - 2}", token_norm(cfg, cfg.stages[k - 1][1]))
        if not cfg.out_stages:
            self.norm = LayerNorm(C, 1e-6) if cfg.family == "baselines" else token_norm(cfg, C)
            self.head = MlpHead(C, cfg) if cfg.mlp_head else nn.Linear(C, cfg.num_classes)
        self.init_weights()

    def init_weights(self):
        """Normal with deviation 0.02, biases 0; PyTorch's default in the strided convolutions of
        all but the baselines, and PoolFormer's positions start from 0: as in the official codes."""
        default = {"poolformer": ("downsample_layers.", "pos_embed"), "baselines": (),
                   "isotropic": ("downsample_layers.",)}[self.cfg.family]
        for name, p in self.named_parameters():
            if p.requires_grad and not name.startswith(default):
                if name.endswith(("bias", ".b1", ".b2")):
                    nn.init.zeros_(p)
                elif p.dim() > 1:
                    nn.init.trunc_normal_(p, std=0.02)

    def forward(self, images, valid=None):
        """Class logits (B, K), float32.

        images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW), True = image, None
        = no padding. Raises ValueError for images larger than a fixed grid allows.
        """
        if self.cfg.out_stages:
            raise UserError(f"built with out_stages={self.cfg.out_stages}, without a classifier: use features")
        x, valid, _ = self.run(self.normalise(images, valid), valid)[-1]
        if self.cfg.family != "baselines":
            x = self.norm(x, valid)
        if self.cls_token is not None:
            x = x[:, 0]                                             # (B, C)
        elif valid is None:
            x = x.mean(1)
        else:
            x = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        if self.cfg.family == "baselines":
            x = self.norm(x, None)
        device = "cpu" if x.is_meta else x.device.type              # meta has no autocast
        with torch.autocast(device, enabled=False):                 # bfloat16 would tie classes
            return self.head(x.float())

    def features(self, images, valid=None):
        """List of maps (B, C, H, W) at strides 4, 8, 16 and 32 (isotropic: one, at 16).

        Arguments as in forward. With cfg.out_stages those of these stages alone, each behind a norm of
        its own; the next stage gets the map without that norm. In eval mode no padding leaks: an
        image in the upper left of its canvas has the features it has alone, at the places it has
        alone, for neither convolutions, nor group norms, nor mixers see the padding. (In training
        batch norm does.) What lies in the padded places themselves means nothing.
        """
        return [m for m, _ in self.stage_maps(self.normalise(images, valid), valid)]

    def stage_maps(self, x, valid):
        """Normalised images and valid (B, IH, IW) or None to those of each map."""
        maps = []
        for k, (y, v, (H, W)) in enumerate(self.run(x, valid)):
            if not self.cfg.out_stages or str(k + 1) in self.cfg.out_stages.split(","):
                y = getattr(self, f"norm{2 * k}")(y, v) if self.cfg.out_stages else y
                y = y[:, -H * W:].transpose(1, 2).unflatten(2, (H, W))      # no class token
                maps.append((y, None if v is None else v[:, -H * W:].reshape(-1, H, W)))
        return maps

    def run(self, x, valid):
        """Normalised images to the tokens (B, N, C), valid (B, N) and grid after every stage."""
        (IH, IW), outputs = x.shape[2:], []
        grid, x = (IH, IW), x.flatten(2).transpose(1, 2)            # every pixel a token
        valid = None if valid is None else valid.flatten(1)
        for k, blocks in enumerate(self.stages):
            x, valid, grid = self.downsample_layers[k](x, valid, grid)
            (H, W), limit = grid, self.limits.get(k, max(grid))
            if max(H, W) > limit:
                raise UserError(
                    f"{IH} x {IW} pixels give stage {k + 1} {H} x {W} = {H * W} tokens, its "
                    f"{self.cfg.stages[k][2]} mixer or positions end at {limit} x {limit} = "
                    f"{limit**2}: build the model with image_size={max(IH, IW)}, or use images "
                    f"of at most {self.cfg.image_size}")
            if self.pos_embed is not None and k == self.positions_at:
                x, valid = self.add_positions(x, valid, H, W, limit)
            for block in blocks:
                x = block(x, valid, grid)
            outputs.append((x, valid, grid))
        return outputs

    def add_positions(self, x, valid, H, W, side):
        """Adds the upper left part of the positions, and puts the class token first."""
        pos = self.pos_embed[:, -side * side:].unflatten(1, (side, side))
        x = x + pos[:, :H, :W].flatten(1, 2)
        if self.cls_token is not None:
            cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
            x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
            valid = None if valid is None else F.pad(valid, (1, 0), value=True)
        return x, valid


class MetaFormerBackbone(MetaFormer):
    """The MetaFormer of a ModelConfig as the backbone of a DETR: the map of its backbone_stage."""

    def __init__(self, cfg):
        super().__init__(replace(METAFORMERS[cfg.backbone], out_stages=str(cfg.backbone_stage),
                                 drop_path=0.0))
        self.stride = 2 ** (cfg.backbone_stage + 1)

    def forward(self, x, valid):
        """Normalised images (B, 3, IH, IW) and valid (B, IH, IW) or None to those of the map."""
        return self.stage_maps(x, valid)[-1]


# sizes of arXiv:2111.11418, Table 1; stochastic depth as in the official training commands
SMALL, MIDDLE = "64,128,320,512", "96,192,384,768"
SIZES = {
    "s12": dict(depths="2,2,6,2", widths=SMALL, layer_scale=1e-5, drop_path=0.1),
    "s24": dict(depths="4,4,12,4", widths=SMALL, layer_scale=1e-5, drop_path=0.1),
    "s36": dict(depths="6,6,18,6", widths=SMALL, layer_scale=1e-6, drop_path=0.2),
    "m36": dict(depths="6,6,18,6", widths=MIDDLE, layer_scale=1e-6, drop_path=0.3,
                crop_fraction=0.95),
    "m48": dict(depths="8,8,24,8", widths=MIDDLE, layer_scale=1e-6, drop_path=0.4,
                crop_fraction=0.95)}
# arXiv:2111.11418, Table 5; the hybrids with attention normalise tokens, as their official code
ABLATIONS = {
    "identity": dict(mixers="identity"), "random": dict(mixers="random"),
    "conv": dict(mixers="conv"),
    "pool5": dict(pool_size=5), "pool7": dict(pool_size=7), "pool9": dict(pool_size=9),
    "layernorm": dict(norm="layer"), "batchnorm": dict(norm="batch"), "nonorm": dict(norm="none"),
    "relu": dict(activation="relu"), "silu": dict(activation="silu"),
    "noresidual": dict(residual=False), "nomlp": dict(channel_mlp=False),
    "pppa": dict(mixers="pool,pool,pool,attention", norm="layer", positions=True,
                 crop_fraction=0.95),
    "ppaa": dict(mixers="pool,pool,attention,attention", norm="layer", positions=True,
                 crop_fraction=0.95),
    "pppf": dict(mixers="pool,pool,pool,fc"),
    "ppff": dict(mixers="pool,pool,fc,fc", crop_fraction=0.95)}
METAFORMERS = {"metaformer_tiny": MetaFormerConfig(             # for the built-in shapes
    depths="1,1,2,1", widths="32,64,128,160", drop_path=0.0, tokens_mlp_dim=64, image_size=64,
    crop_fraction=1.0)}
METAFORMERS |= {f"poolformer_{s}": MetaFormerConfig(**size) for s, size in SIZES.items()}
METAFORMERS |= {f"poolformer_s12_{name}": replace(METAFORMERS["poolformer_s12"], **change)
                for name, change in ABLATIONS.items()}
# arXiv:2210.13452, Tables 1 and 2
BASELINES = dict(family="baselines", activation="starrelu", layer_scale=0.0, crop_fraction=1.0)
METAFORMERS |= {f"{name}_{s}": replace(METAFORMERS[f"poolformer_{s}"], mixers=mixers, **BASELINES)
                for name, mixers in (("identityformer", "identity"), ("poolformerv2", "pool"),
                                     ("randformer", "identity,identity,random,random"))
                for s in SIZES}
METAFORMERS["randformer_m48"] = replace(METAFORMERS["randformer_m48"], drop_path=0.3)
# depths, widths, stochastic depth of ConvFormer and of CAFormer, dropout in CAFormer's head
CONV = dict(norm="layer", mlp_head=True, **BASELINES)
CONV_SIZES = {"s18": ("3,3,9,3", SMALL, 0.2, 0.15, 0.0), "s36": ("3,12,18,3", SMALL, 0.3, 0.3, 0.4),
              "m36": ("3,12,18,3", "96,192,384,576", 0.4, 0.4, 0.4),
              "b36": ("3,12,18,3", "128,256,512,768", 0.6, 0.6, 0.5)}
METAFORMERS |= {f"convformer_{s}": MetaFormerConfig(depths=depths, widths=widths, mixers="sepconv",
                                                    drop_path=rate, **CONV)
                for s, (depths, widths, rate, _, _) in CONV_SIZES.items()}
METAFORMERS |= {f"caformer_{s}": MetaFormerConfig(depths=depths, widths=widths, drop_path=rate,
                                                  mixers="sepconv,sepconv,attention,attention",
                                                  head_dropout=dropout, **CONV)
                for s, (depths, widths, _, rate, dropout) in CONV_SIZES.items()}
# arXiv:2012.12877, Table 1 (DeiT, which is ViT); arXiv:2105.01601, Table 1
ISOTROPIC = dict(family="isotropic", norm="layer", layer_scale=0.0)
METAFORMERS |= {f"vit_{s}": MetaFormerConfig(depths="12", widths=C, mixers="attention",
                                             positions=True, head_size=64, **ISOTROPIC)
                for s, C in (("ti", "192"), ("s", "384"), ("b", "768"))}
METAFORMERS |= {f"mixer_{s}16": MetaFormerConfig(depths=depth, widths=C, mixers="mlp",
                                                 tokens_mlp_dim=tokens_mlp_dim, crop_fraction=0.875,
                                                 **ISOTROPIC)
                for s, depth, C, tokens_mlp_dim in (("s", "8", "512", 256), ("b", "12", "768", 384))}
