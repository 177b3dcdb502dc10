"""MetaFormer classifiers: PoolFormer and its relatives, from the token mixers of mixers.py.

    model = MetaFormer(METAFORMERS["poolformer_s12"])
    logits = model(images, valid)                # uint8 (B, 3, IH, IW), bool (B, IH, IW) or None
    fuse(MetaFormer(METAFORMERS["riformer_s12"]))           # its mixers become parts of the norms

Inside, x are the tokens (B, N, C) of a grid (H, W), and valid (B, N) or None, as in mixers.py.
Papers: MetaFormer, arXiv:2111.11418 and arXiv:2210.13452; ViT, arXiv:2010.11929; DeiT,
arXiv:2012.12877; MLP-Mixer, arXiv:2105.01601; RIFormer, arXiv:2304.05659.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from coco_eval import UserError
from options import check_options
from images import PIXEL_MEAN, PIXEL_STD
from mixers import MIXERS, AffineMixer, IdentityMixer, MixerConfig, StarReLU, to_grid
from resnet import Normalise, SyncedBatchNorm2d


# -- norms of tokens: forward(x, valid) -> (B, N, C) ---------------------------------------------

class TokenGroupNorm(nn.Module):
    """Normalises the valid tokens of an image and their channels together; weight and bias (C,).

    Equals nn.GroupNorm(1, C) of a map without padding. TokenLayerNorm differs: token by token.
    """

    def __init__(self, C, eps, bias=True):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x, valid):
        if valid is None:
            x = F.layer_norm(x, x.shape[1:], eps=self.eps)
        else:
            # v: weight of each value in its image's mean, 0 in the padding
            v = valid[..., None].float() / valid.sum(1).clamp(min=1)[:, None, None] / x.shape[2]
            x = x.float() - (x * v).sum((1, 2), keepdim=True)
            variance = (x.square() * v).sum((1, 2), keepdim=True)
            x = x * (variance + self.eps).rsqrt()
        return x * self.weight if self.bias is None else x * self.weight + self.bias


class TokenLayerNorm(nn.LayerNorm):
    """Normalises each token over its channels."""

    def forward(self, x, valid):
        return super().forward(x)


class TokenBatchNorm(SyncedBatchNorm2d):
    """Normalises each channel over all images; in training, padded tokens count too."""

    def __init__(self, C, eps, bias=True):
        super().__init__(C, eps)

    def forward(self, x, valid):
        return super().forward(x.transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2)


class NoNorm(nn.Identity):
    """Returns the tokens unchanged (arXiv:2111.11418, Table 5)."""

    def forward(self, x, valid):
        return x


TOKEN_NORMS = {"group": TokenGroupNorm, "layer": TokenLayerNorm, "batch": TokenBatchNorm,
               "none": NoNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "starrelu": StarReLU}
FAMILIES = "poolformer", "baselines", "isotropic"
# mean and deviation of pixels in 0..255: ImageNet's, or half the range, as Google's models have it
PIXEL_NORMS = {"imagenet": (PIXEL_MEAN, PIXEL_STD), "half": (3 * (127.5,), 3 * (127.5,))}


@dataclass(frozen=True)
class MetaFormerConfig:
    """Everything that shapes a classifier of the MetaFormer family; the defaults: PoolFormer-S12.

    Three families differ in more than their sizes:
    poolformer  arXiv:2111.11418. LayerScale on the branches; norm, then mean over tokens.
    baselines   arXiv:2210.13452. No biases in blocks and their norms; a scale on the skip of the
                last two stages; norms beside the strided convolutions; mean over tokens, then norm.
    isotropic   One stage, of square patches: with positions and a class token for the head ViT,
                arXiv:2010.11929; with the mlp mixer MLP-Mixer, arXiv:2105.01601.

    --image_size has three meanings. Here it is the largest side for which fixed grids and positions
    are built; models without them take images of any size. In TrainConfig it is the side of a
    classifier's square images, or the shorter side of a detector's images.
    """
    family: Annotated[str, "structure of blocks and head", FAMILIES] = "poolformer"
    depths: Annotated[str, "blocks of each stage, separated by commas"] = "2,2,6,2"
    widths: Annotated[str, "channels of each stage"] = "64,128,320,512"
    mixers: Annotated[str, f"token mixer of all stages, or each: {', '.join(MIXERS)}"] = "pool"
    norm: Annotated[str, "of the blocks; group is over all tokens", TOKEN_NORMS] = "group"
    activation: Annotated[str, "of the channel MLP", ACTIVATIONS] = "gelu"
    residual: Annotated[bool, "add the input of mixer and channel MLP to their output"] = True
    channel_mlp: Annotated[bool, "have a channel MLP in each block"] = True
    positions: Annotated[bool, "learned, added before the first stage with attention"] = False
    mlp_head: Annotated[bool, "an MLP instead of a linear layer as the classifier"] = False
    pool_size: Annotated[int, "side of the pooling window in tokens, odd", 1] = 3
    head_size: Annotated[int, "channels of an attention head", 1] = 32
    tokens_mlp_dim: Annotated[int, "hidden units of the mlp mixer, over the tokens", 1] = 256
    layer_scale: Annotated[float, "first value of LayerScale; 0: no LayerScale", 0] = 1e-5
    drop_path: Annotated[float, "stochastic depth of the last block; linear from 0", 0] = 0.1
    head_dropout: Annotated[float, "dropout in the MLP head", 0] = 0.0
    image_size: Annotated[int, "largest side of fixed grids and positions", 1] = 224
    patch_size: Annotated[int, "isotropic: side of the patches in pixels", 1] = 16
    pixel_norm: Annotated[str, "mean and deviation of pixels; half: 0.5 each",
                          PIXEL_NORMS] = "imagenet"
    crop_fraction: Annotated[float, "evaluation: side of the centre crop / shorter side", 0] = 0.9
    num_classes: Annotated[int, "classes K; data sets set it", 1] = 1000
    out_stages: Annotated[str, "instead of a classifier, maps of these stages, as 1,2,3,4"] = ""

    def __post_init__(self):
        check_options(self)
        n = 1 if self.family == "isotropic" else 4
        depths, widths, mixers = (x.split(",") for x in (self.depths, self.widths, self.mixers))
        if not set(mixers) <= set(MIXERS):
            raise UserError(f"--mixers {self.mixers} is unknown, use: {', '.join(MIXERS)}")
        if (len(depths), len(widths)) != (n, n) or len(mixers) not in (1, n) or not all(
                x.isdecimal() and len(x) < 10 for x in depths + widths):
            raise UserError(f"--depths {self.depths}, --widths {self.widths} and --mixers "
                            f"{self.mixers} must be of {n} stage(s), separated by commas")
        for depth, width, mixer in self.stages:
            if depth < 1 or width < 1 or mixer == "attention" and width % self.head_size:
                raise UserError(f"--depths {self.depths} and --widths {self.widths} must be over 0"
                                f", with attention multiples of --head_size {self.head_size}")
        if self.pool_size % 2 == 0:
            raise UserError(f"--pool_size {self.pool_size} must be odd, to have a centre")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(f"--crop_fraction {self.crop_fraction} must be over 0 and at most 1")
        if max(self.drop_path, self.head_dropout) >= 1:
            raise UserError(f"--drop_path {self.drop_path} and --head_dropout {self.head_dropout} "
                            f"must be below 1")
        if self.positions and "attention" not in mixers:
            raise UserError(f"--positions are for --mixers with attention, not {self.mixers}")
        if self.family == "isotropic" and self.patch_size > self.image_size:
            raise UserError(f"--patch_size {self.patch_size} is more than --image_size "
                            f"{self.image_size}")
        if self.out_stages and not set(self.out_stages.split(",")) <= set("1234"[:n]):
            raise UserError(f"--out_stages {self.out_stages} must name stages from 1 to {n}")

    @property
    def stages(self):
        """(blocks, channels, mixer) of each stage."""
        depths, widths, mixers = (x.split(",") for x in (self.depths, self.widths, self.mixers))
        mixers = mixers * len(depths) if len(mixers) == 1 else mixers
        return list(zip(map(int, depths), map(int, widths), mixers))

    @property
    def out_stage_numbers(self):
        """Stages from 1; [] for a classifier."""
        return [int(number) for number in self.out_stages.split(",") if number]

    @property
    def takes_any_size(self):
        """Whether images of all sizes can be its input, as a backbone's must."""
        fixed = any(hasattr(MIXERS[mixer], "fixed_grid") for _, _, mixer in self.stages)
        return self.family != "isotropic" and not self.positions and not fixed


# -- blocks --------------------------------------------------------------------------------------

class Downsample(nn.Module):
    """Strided k x k convolution: tokens of one grid to tokens of a coarser one.

    It sets padding to 0, the value that a convolution reads beyond an image's border, and an output
    token is valid where the image without padding has one. So padding never changes an image's
    tokens. The baselines add a LayerNorm: after the first Downsample, before the later ones.
    """

    def __init__(self, cin, cout, k, stride, padding, norms):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, stride, padding)
        self.pre_norm = nn.LayerNorm(cin, 1e-6, bias=False) if norms and cin != 3 else None
        self.post_norm = nn.LayerNorm(cout, 1e-6, bias=False) if norms and cin == 3 else None
        self.first = k - 1 - 2 * padding   # output row i is valid if input row first + i*stride is

    def forward(self, x, valid, grid):
        if self.pre_norm:
            x = self.pre_norm(x)
        x = self.conv(to_grid(x, valid, grid)[0])                   # (B, C, H, W)
        if valid is not None:
            step = slice(self.first, None, self.conv.stride[0])
            valid = valid.view(-1, *grid)[:, step, step].flatten(1)
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)         # (B, N, C)
        if self.post_norm:
            x = self.post_norm(x)
        return x, valid, grid


def token_norm(cfg, C):
    """The norm of a MetaFormer's blocks for C channels."""
    eps = 1e-5 if cfg.family == "poolformer" else 1e-6
    return TOKEN_NORMS[cfg.norm](C, eps, bias=cfg.family != "baselines")


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

    stage: 0 to 3; max_grid: the largest (H, W) of this stage; drop_path: the probability that an
    image skips a branch in training (stochastic depth, arXiv:1603.09382).
    """

    def __init__(self, cfg, stage, max_grid, drop_path):
        super().__init__()
        _, C, mixer = cfg.stages[stage]
        bias = cfg.family != "baselines"
        self.residual, self.drop_path = cfg.residual, drop_path
        self.norm1 = token_norm(cfg, C)
        self.token_mixer = MIXERS[mixer](MixerConfig(
            hidden_dim=C, nheads=max(1, C // cfg.head_size), pool_size=cfg.pool_size,
            tokens_mlp_dim=cfg.tokens_mlp_dim, max_grid=max_grid,
            qkv_bias=cfg.family == "isotropic", out_bias=bias))
        self.norm2 = token_norm(cfg, C) if cfg.channel_mlp else None
        self.mlp = ChannelMLP(C, cfg.activation, bias) if cfg.channel_mlp else None

        # scales of the branch and of the skip: 1 of the mixer's residual, 2 of the MLP's
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
        """The sum of skip x and branch y of residual k, all (B, N, C)."""
        layer_scale = getattr(self, f"layer_scale_{k}", None)
        res_scale = getattr(self, f"res_scale_{k}", None)
        if layer_scale is not None:
            y = y * layer_scale
        if self.training and self.drop_path:
            keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path)).to(y.dtype)       # its mean stays the same
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
        # squared ReLU: the norm would undo StarReLU's scale and bias
        return self.fc2(self.dropout(self.norm(F.relu(self.fc1(x)).square())))


# -- the model -----------------------------------------------------------------------------------

class MetaFormer(nn.Module):
    """Classifier, or with cfg.out_stages the maps of these stages for detection and segmentation.

    Sources: arXiv:2111.11418, Fig. 2 and Table 1; for the other families see MetaFormerConfig.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.normalise = cfg, Normalise(*PIXEL_NORMS[cfg.pixel_norm])
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.pos_embed, self.cls_token = None, None
        self.max_side_of_stage = {}                    # in tokens, of the stages that have a limit

        # stochastic depth: linear over all blocks
        blocks = sum(depth for depth, _, _ in cfg.stages)
        rates = iter([cfg.drop_path * i / max(1, blocks - 1) for i in range(blocks)])

        # the stages up to the last that is used
        cin, side = 3, cfg.image_size
        for k, (depth, C, mixer) in enumerate(cfg.stages[:max(cfg.out_stage_numbers, default=4)]):
            if cfg.family == "isotropic":
                kernel, stride, padding = cfg.patch_size, cfg.patch_size, 0
            else:
                kernel, stride, padding = (3, 2, 1) if k else (7, 4, 2)
            self.downsample_layers.append(
                Downsample(cin, C, kernel, stride, padding, cfg.family == "baselines"))
            cin, side = C, (side + 2 * padding - kernel) // stride + 1
            self.stages.append(nn.ModuleList(
                MetaFormerBlock(cfg, k, (side, side), next(rates)) for _ in range(depth)))
            if hasattr(MIXERS[mixer], "fixed_grid"):
                self.max_side_of_stage[k] = side
            if cfg.positions and mixer == "attention" and self.pos_embed is None:
                self.positions_stage, self.max_side_of_stage[k] = k, side
                extra = 0
                if cfg.family == "isotropic":
                    self.cls_token, extra = nn.Parameter(torch.zeros(1, 1, C)), 1
                self.pos_embed = nn.Parameter(torch.zeros(1, extra + side * side, C))
        self.num_channels = C

        # a norm for each map, in the official names norm0, norm2, ...; or one norm and a head
        for number in cfg.out_stage_numbers:
            norm = token_norm(cfg, cfg.stages[number - 1][1])
            self.add_module(f"norm{2 * number - 2}", norm)
        if not cfg.out_stages:
            self.norm = TokenLayerNorm(C, 1e-6) if cfg.family == "baselines" else token_norm(cfg, C)
            self.head = MlpHead(C, cfg) if cfg.mlp_head else nn.Linear(C, cfg.num_classes)
        self.init_weights()

    def init_weights(self):
        """Biases 0, weights normal with deviation 0.02. As in the official codes, the strided
        convolutions of all but the baselines keep PyTorch's default, and PoolFormer's positions
        start from 0."""
        kept = {"poolformer": ("downsample_layers.", "pos_embed"), "baselines": (),
                "isotropic": ("downsample_layers.",)}[self.cfg.family]
        for name, p in self.named_parameters():
            if not p.requires_grad or name.startswith(kept):
                continue
            if name.split(".")[-1].startswith("b"):                 # see mixers.py
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, images, valid=None):
        """Class logits (B, K), float32.

        images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW), True = image, None
        = no padding. Raises UserError for images larger than a fixed grid.
        """
        if self.cfg.out_stages:
            raise ValueError("a MetaFormer with out_stages has no classifier: call features()")
        x, valid, _ = self.forward_stages(self.normalise(images, valid), valid)[-1]

        # one token (B, C) for the whole image: its class token, or the mean of the valid ones
        if self.cfg.family != "baselines":
            x = self.norm(x, valid)
        if self.cls_token is not None:
            x = x[:, 0]
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
        """List of maps (B, C, H, W) at strides 4, 8, 16 and 32 (isotropic: one, at patch_size).

        Arguments as in forward. With cfg.out_stages the maps of these stages alone, each with a
        norm of its own, which the next stage does not see. In eval mode padding does not change an
        image's features, because convolutions, group norms and mixers ignore it (batch norm in
        training does not). Values at padded places have no meaning.
        """
        return [y for y, _ in self.stage_maps(self.normalise(images, valid), valid)]

    def stage_maps(self, x, valid):
        """The maps of normalised images: list of pairs (B, C, H, W) and valid (B, H, W) or None."""
        maps, numbers = [], self.cfg.out_stage_numbers
        for k, (y, v, (H, W)) in enumerate(self.forward_stages(x, valid)):
            if numbers and k + 1 not in numbers:
                continue
            if numbers:
                y = getattr(self, f"norm{2 * k}")(y, v)
            y = y[:, -H * W:].transpose(1, 2).unflatten(2, (H, W))  # without the class token
            v = None if v is None else v[:, -H * W:].reshape(-1, H, W)
            maps.append((y, v))
        return maps

    def forward_stages(self, x, valid):
        """Tokens (B, N, C), valid (B, N) and grid after each stage, from normalised images
        (B, 3, IH, IW) and valid (B, IH, IW). Raises UserError for images beyond a fixed grid."""
        IH, IW = grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)                            # every pixel a token
        valid = None if valid is None else valid.flatten(1)
        outputs = []
        for k, blocks in enumerate(self.stages):
            x, valid, grid = self.downsample_layers[k](x, valid, grid)
            (H, W), limit = grid, self.max_side_of_stage.get(k)
            if limit and max(H, W) > limit:
                raise UserError(
                    f"{IH} x {IW} pixels give stage {k + 1} {H} x {W} = {H * W} tokens, its "
                    f"{self.cfg.stages[k][2]} mixer or positions end at {limit} x {limit} = "
                    f"{limit**2}: build the model with image_size={max(IH, IW)}, or use images "
                    f"of at most {self.cfg.image_size}")
            if self.pos_embed is not None and k == self.positions_stage:
                x, valid = self.add_positions(x, valid, grid)
            for block in blocks:
                x = block(x, valid, grid)
            outputs.append((x, valid, grid))
        return outputs

    def add_positions(self, x, valid, grid):
        """Adds the upper left part of the positions, and puts the class token first."""
        (H, W), side = grid, self.max_side_of_stage[self.positions_stage]
        pos = self.pos_embed[:, -side * side:].unflatten(1, (side, side))
        x = x + pos[:, :H, :W].flatten(1, 2)
        if self.cls_token is not None:
            cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
            x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
            valid = None if valid is None else F.pad(valid, (1, 0), value=True)
        return x, valid


class MetaFormerBackbone(MetaFormer):
    """Backbone of a DETR: the MetaFormer that a ModelConfig names, up to its backbone_stage."""

    def __init__(self, cfg):
        first = 1 if cfg.masks else cfg.backbone_stage
        stages = [str(number) for number in range(first, cfg.backbone_stage + 1)]
        super().__init__(replace(METAFORMERS[cfg.backbone], out_stages=",".join(stages),
                                 drop_path=0.0))
        self.stride = 2 ** (cfg.backbone_stage + 1)
        self.map_channels = [self.cfg.stages[int(number) - 1][1] for number in stages[:-1]]

    def forward(self, x, valid):
        """The map (B, C, H, W) of normalised images (B, 3, IH, IW), and its valid or None; with
        cfg.masks also the maps of the stages before, finest first."""
        *before, last = self.stage_maps(x, valid)
        return *last, *(x for x, _ in before)


def fuse(model):
    """Makes the affine mixers of a model parts of the norms before them, in place; returns it.

    The mixer gives s * z + b - z for a normed token z = gamma * n + beta. A norm with the weight
    gamma * (s - 1) and the bias beta * (s - 1) + b gives the same, and the mixer becomes the
    identity, in model.cfg, too (arXiv:2304.05659). Takes classifiers, and DETRs with pre_norm.
    Raises UserError, with the model unchanged, where no norm before a mixer can take it over.
    """
    blocks = []                                    # with the name of their mixer
    for block in model.modules():
        name = "token_mixer" if hasattr(block, "token_mixer") else "self_attn"
        if isinstance(getattr(block, name, None), AffineMixer):
            blocks.append((block, name))
            if not getattr(block, "pre_norm", True):
                raise UserError("fuse: the layers of this DETR have no norm before the mixer that "
                                "could take it over: train with --pre_norm")
            if getattr(block.norm1, "bias", None) is None:
                raise UserError("fuse: the norms before the mixers have no weight and bias that "
                                "could take them over (--norm none, --family baselines)")
    if not blocks:
        raise UserError("fuse: the model has no affine mixer")

    for block, name in blocks:
        affine = getattr(block, name).affine
        scale = affine.weight.flatten() - 1
        with torch.no_grad():
            block.norm1.weight.mul_(scale)
            block.norm1.bias.mul_(scale).add_(affine.bias)
        setattr(block, name, IdentityMixer(None))

    # the configs of the model and of a DETR's backbone
    for module in model.modules():
        options = vars(module.cfg) if hasattr(module, "cfg") else {}
        changed = {name: value.replace("affine", "identity") for name, value in options.items()
                   if name in ("mixers", "mixer", "encoder_mixer", "decoder_mixer")}
        if changed:
            module.cfg = replace(module.cfg, **changed)
    return model


# -- the table of models -------------------------------------------------------------------------

METAFORMERS = {"metaformer_tiny": MetaFormerConfig(                 # for the built-in shapes
    depths="1,1,2,1", widths="32,64,128,160", drop_path=0.0, tokens_mlp_dim=64, image_size=64,
    crop_fraction=1.0)}

# PoolFormer: sizes of arXiv:2111.11418, Table 1; stochastic depth of the official commands
SMALL, MEDIUM = "64,128,320,512", "96,192,384,768"
POOLFORMERS = {
    "s12": MetaFormerConfig(depths="2,2,6,2", widths=SMALL, layer_scale=1e-5, drop_path=0.1),
    "s24": MetaFormerConfig(depths="4,4,12,4", widths=SMALL, layer_scale=1e-5, drop_path=0.1),
    "s36": MetaFormerConfig(depths="6,6,18,6", widths=SMALL, layer_scale=1e-6, drop_path=0.2),
    "m36": MetaFormerConfig(depths="6,6,18,6", widths=MEDIUM, layer_scale=1e-6, drop_path=0.3,
                            crop_fraction=0.95),
    "m48": MetaFormerConfig(depths="8,8,24,8", widths=MEDIUM, layer_scale=1e-6, drop_path=0.4,
                            crop_fraction=0.95)}
METAFORMERS |= {f"poolformer_{size}": cfg for size, cfg in POOLFORMERS.items()}

# RIFormer: arXiv:2304.05659; stochastic depth of mmpretrain's configurations
METAFORMERS |= {f"riformer_{size}": replace(cfg, mixers="affine", drop_path=0.1)
                for size, cfg in POOLFORMERS.items()}

# PoolFormer-S12 with one thing changed: arXiv:2111.11418, Table 5. As in the official code, the
# hybrids with attention normalise each token by itself.
HYBRID = dict(norm="layer", positions=True, crop_fraction=0.95)
ABLATIONS = {
    "identity": dict(mixers="identity"), "random": dict(mixers="random"),
    "conv": dict(mixers="conv"),
    "pool5": dict(pool_size=5), "pool7": dict(pool_size=7), "pool9": dict(pool_size=9),
    "layernorm": dict(norm="layer"), "batchnorm": dict(norm="batch"), "nonorm": dict(norm="none"),
    "relu": dict(activation="relu"), "silu": dict(activation="silu"),
    "noresidual": dict(residual=False), "nomlp": dict(channel_mlp=False),
    "pppa": dict(mixers="pool,pool,pool,attention", **HYBRID),
    "ppaa": dict(mixers="pool,pool,attention,attention", **HYBRID),
    "pppf": dict(mixers="pool,pool,pool,fc"),
    "ppff": dict(mixers="pool,pool,fc,fc", crop_fraction=0.95)}
METAFORMERS |= {f"poolformer_s12_{name}": replace(POOLFORMERS["s12"], **change)
                for name, change in ABLATIONS.items()}

# the baselines, first those in the sizes of PoolFormer: arXiv:2210.13452, Tables 1 and 2
BASELINES = dict(family="baselines", activation="starrelu", layer_scale=0.0, crop_fraction=1.0)
METAFORMERS |= {f"identityformer_{size}": replace(cfg, mixers="identity", **BASELINES)
                for size, cfg in POOLFORMERS.items()}
METAFORMERS |= {f"poolformerv2_{size}": replace(cfg, mixers="pool", **BASELINES)
                for size, cfg in POOLFORMERS.items()}
METAFORMERS |= {f"randformer_{size}": replace(cfg, mixers="identity,identity,random,random",
                                              **BASELINES) for size, cfg in POOLFORMERS.items()}
METAFORMERS["randformer_m48"] = replace(METAFORMERS["randformer_m48"], drop_path=0.3)

M36, B36 = "96,192,384,576", "128,256,512,768"
CONV = MetaFormerConfig(depths="3,12,18,3", mixers="sepconv", norm="layer", mlp_head=True,
                        **BASELINES)
CA = replace(CONV, mixers="sepconv,sepconv,attention,attention")
METAFORMERS |= {
    "convformer_s18": replace(CONV, depths="3,3,9,3", drop_path=0.2),
    "convformer_s36": replace(CONV, drop_path=0.3),
    "convformer_m36": replace(CONV, widths=M36, drop_path=0.4),
    "convformer_b36": replace(CONV, widths=B36, drop_path=0.6),
    "caformer_s18": replace(CA, depths="3,3,9,3", drop_path=0.15),
    "caformer_s36": replace(CA, drop_path=0.3, head_dropout=0.4),
    "caformer_m36": replace(CA, widths=M36, drop_path=0.4, head_dropout=0.4),
    "caformer_b36": replace(CA, widths=B36, drop_path=0.6, head_dropout=0.5)}

# MLP-Mixer: arXiv:2105.01601, Table 1; and a small one and a small ViT for 64 pixels
ISOTROPIC = dict(family="isotropic", norm="layer", layer_scale=0.0)
VIT = MetaFormerConfig(depths="12", widths="192", mixers="attention", head_size=64,
                       positions=True, **ISOTROPIC)
VITS = {"ti": VIT, "s": replace(VIT, widths="384"), "b": replace(VIT, widths="768"),
        "l": replace(VIT, depths="24", widths="1024")}
MIXER = MetaFormerConfig(depths="8", widths="512", mixers="mlp", pixel_norm="half",
                         crop_fraction=0.875, **ISOTROPIC)
MIXER_B = replace(MIXER, depths="12", widths="768", tokens_mlp_dim=384)
MIXER_L = replace(MIXER, depths="24", widths="1024", tokens_mlp_dim=512)
SIDE64 = dict(depths="6", widths="96", drop_path=0.0, image_size=64, patch_size=8,
              crop_fraction=1.0)
METAFORMERS |= {
    "vit_tiny64": replace(VIT, head_size=32, **SIDE64),
    "mixer_tiny64": replace(MIXER, tokens_mlp_dim=64, pixel_norm="imagenet", **SIDE64),
    "mixer_s32": replace(MIXER, patch_size=32), "mixer_s16": MIXER,
    "mixer_b32": replace(MIXER_B, patch_size=32), "mixer_b16": MIXER_B,
    "mixer_l32": replace(MIXER_L, patch_size=32), "mixer_l16": MIXER_L}

# ViT as DeiT trains it, arXiv:2012.12877, Table 1; then as Google released it, arXiv:2106.10270
METAFORMERS |= {f"vit_{size}": VITS[size] for size in ("ti", "s", "b")}
METAFORMERS |= {f"vit_{size}{patch}": replace(VITS[size], patch_size=patch, pixel_norm="half")
                for size, patch in (("ti", 16), ("s", 32), ("s", 16), ("b", 32), ("b", 16),
                                    ("l", 16))}
