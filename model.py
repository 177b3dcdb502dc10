"""DETR with a choice of token mixer, in the state-dict names of the official implementation.

    model = build_model("detr_r50", mixer="pool")
    logits, boxes = model(images, valid)         # uint8 (B, 3, IH, IW), bool (B, IH, IW)
    load_weights(build_model("detr_r50"), "detr-r50-e632da11.pth")
    python model.py                              # parameters, multiply-adds and speed of each model

Papers: DETR, arXiv:2005.12872; ResNet, arXiv:1512.03385; MetaFormer, arXiv:2111.11418; MLP-Mixer,
arXiv:2105.01601; attention and sine positions, arXiv:1706.03762.
"""

import argparse
import math
import os
import pickle
import time
import urllib.error
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)    # ImageNet, RGB 0..255


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network; the annotations are the help of train.py's flags."""
    mixer: Annotated[str, "token mixer for both self-attentions, a key of MIXERS"] = "attention"
    encoder_mixer: Annotated[str, "token mixer of the encoder alone"] = ""
    decoder_mixer: Annotated[str, "token mixer of the decoder alone"] = ""
    pool_size: Annotated[int, "side of the pooling window in tokens, odd"] = 3
    grid_rows: Annotated[int, "rows of the largest token grid that mlp and random can take"] = 42
    grid_cols: Annotated[int, "columns of it; 42 x 42 covers 1333 pixels at stride 32"] = 42
    token_dim: Annotated[int, "hidden units of the mlp mixer, over tokens"] = 128
    backbone: Annotated[str, "a key of RESNETS"] = "resnet50"
    backbone_norm: Annotated[str, "frozen (for pretrained weights) or batch"] = "frozen"
    dilation: Annotated[bool, "last stage dilated instead of strided (DC5)"] = False
    position_embedding: Annotated[str, "sine or learned"] = "sine"
    position_temperature: Annotated[float, "of the sine positions; low suits small grids"] = 10000.0
    enc_layers: Annotated[int, "encoder layers"] = 6
    dec_layers: Annotated[int, "decoder layers"] = 6
    dim_feedforward: Annotated[int, "hidden units of the feed-forward blocks"] = 2048
    hidden_dim: Annotated[int, "channels C of every token"] = 256
    dropout: Annotated[float, "dropout in the transformer"] = 0.1
    nheads: Annotated[int, "attention heads, must divide hidden_dim"] = 8
    num_queries: Annotated[int, "queries Q, an upper bound of the objects in an image"] = 100
    pre_norm: Annotated[bool, "normalise before each block instead of after it"] = False
    num_classes: Annotated[int, "classes K without the no-object class; data sets set it"] = 91

    def __post_init__(self):
        for field, known in (("mixer", MIXERS), ("encoder_mixer", MIXERS),
                             ("decoder_mixer", MIXERS), ("backbone", RESNETS),
                             ("backbone_norm", NORMS),
                             ("position_embedding", ("sine", "learned"))):
            value = getattr(self, field)
            optional = field in ("encoder_mixer", "decoder_mixer")
            if value not in known and not (value == "" and optional):
                raise ValueError(f"--{field} {value} is unknown, use one of: {', '.join(known)}")
        C, nh = self.hidden_dim, self.nheads
        if nh < 1 or C < 1 or C % nh or C % 4:
            raise ValueError(f"--hidden_dim {self.hidden_dim} must be a multiple of --nheads "
                             f"{self.nheads} and of 4 (sine and cosine, rows and columns)")
        if self.dilation and RESNETS[self.backbone][0] is BasicBlock:
            raise ValueError(f"--dilation is defined for resnet50 and resnet101, not for "
                             f"{self.backbone}")
        if not self.position_temperature > 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"--position_temperature {self.position_temperature} must be over 0, "
                             f"--dropout {self.dropout} at least 0 and below 1")
        if self.pool_size % 2 == 0:
            raise ValueError(f"--pool_size {self.pool_size} must be odd, to have a centre")
        for field in ("dec_layers", "num_queries", "dim_feedforward", "token_dim", "grid_rows",
                      "grid_cols", "num_classes", "pool_size", "enc_layers"):
            least = 0 if field == "enc_layers" else 1
            if getattr(self, field) < least:
                raise ValueError(f"--{field} {getattr(self, field)} must be at least {least}")


# -- backbone ------------------------------------------------------------------------------------

class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine, all four of them buffers."""

    def __init__(self, C):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0),
                            ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((C,), value))

    def forward(self, x):                                           # (B, C, H, W)
        scale = self.weight * (self.running_var + 1e-5).rsqrt()     # (C,)
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of all processes' images together.

    (torch's own SyncBatchNorm is for GPUs alone.) Every process counts alike.
    """

    def forward(self, x):                                           # (B, C, H, W)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x32, world = x.float(), dist.get_world_size()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])
        mean, square = all_reduce(moments) / world                  # (C,) each
        var, n = (square - mean.square()).clamp(min=0), x.numel() // len(mean) * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


NORMS = {"frozen": FrozenBatchNorm2d, "batch": BatchNorm2d}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity (arXiv:1512.03385, Fig. 5 left)."""
    expansion = 1

    def __init__(self, cin, width, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(cin, width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside the identity, the stride in the 3 x 3 one."""
    expansion = 4

    def __init__(self, cin, width, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample = shortcut(cin, 4 * width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def shortcut(cin, cout, stride, norm):
    """The identity, or a 1 x 1 convolution where the shape changes."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))


# block, blocks per stage, channels of the first stage, file published by torchvision (ImageNet V1)
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, "resnet18-f37072fd.pth"),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64, "resnet34-b627a593.pth"),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, "resnet50-0676ba61.pth"),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64, "resnet101-63fe2227.pth"),
    "resnet_tiny": (BasicBlock, (1, 1), 32, ""),                    # stride 8, for small images
}


class ResNet(nn.Module):
    """Feature map of the last stage, stride 32; 16 if dilated. No pooling, no classifier.

    With frozen norms the stem and the first stage are frozen too, as in the official DETR.
    """

    def __init__(self, cfg):
        super().__init__()
        block, depths, width, _ = RESNETS[cfg.backbone]
        norm = NORMS[cfg.backbone_norm]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        self.stages = [f"layer{k + 1}" for k in range(len(depths))]
        cin, self.stride = width, 4
        for k, (name, depth) in enumerate(zip(self.stages, depths)):
            dilated = cfg.dilation and k == len(depths) - 1
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and k > 0 and not dilated else 1
                # the first block of a dilated stage still sees the undilated grid
                blocks.append(block(cin, width << k, stride, 2 if dilated and i else 1, norm))
                cin, self.stride = (width << k) * block.expansion, self.stride * stride
            setattr(self, name, nn.Sequential(*blocks))
        self.num_channels = cin
        for name, p in self.named_parameters():
            if p.dim() == 4:
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")
            if cfg.backbone_norm == "frozen" and name.startswith(("conv1", "layer1")):
                p.requires_grad_(False)

    def forward(self, x):                                           # (B, 3, IH, IW)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x                                                    # (B, num_channels, H, W)


class Backbone(nn.Module):
    """Only there for the official names, backbone.0.body."""

    def __init__(self, cfg):
        super().__init__()
        self.body = ResNet(cfg)

    def forward(self, x):
        return self.body(x)


# -- positions -----------------------------------------------------------------------------------

class SinePosition(nn.Module):
    """Sines and cosines of row and column, both scaled to 2 pi over the image without its padding.

    valid bool (B, H, W) -> (B, H*W, C): the first half of the channels is the row, the second the
    column; even ones sine, odd ones cosine. Source: arXiv:2005.12872, Appendix A.4.
    """

    def __init__(self, cfg):
        super().__init__()
        self.dim, self.temperature = cfg.hidden_dim // 2, cfg.position_temperature

    def forward(self, valid):
        y, x = (valid.cumsum(d, dtype=torch.float32) for d in (1, 2))   # from 1, not from 0
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi                     # (B, H, W)
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        i = torch.arange(self.dim, dtype=torch.float32, device=valid.device)
        wavelength = self.temperature ** (2 * torch.div(i, 2, rounding_mode="floor") / self.dim)
        y, x = y[..., None] / wavelength, x[..., None] / wavelength     # (B, H, W, dim)
        y, x = (torch.stack([p[..., 0::2].sin(), p[..., 1::2].cos()], 4).flatten(3) for p in (y, x))
        return torch.cat([y, x], 3).flatten(1, 2)                       # (B, N, C)


class LearnedPosition(nn.Module):
    """An embedding for each of 50 columns and rows; valid bool (B, H, W) -> (B, H*W, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.row_embed = nn.Embedding(50, cfg.hidden_dim // 2)
        self.col_embed = nn.Embedding(50, cfg.hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, valid):
        B, H, W = valid.shape
        if max(H, W) > 50:
            raise ValueError(f"learned positions end at 50 x 50 tokens, the image has {H} x {W}: "
                             f"use smaller images or --position_embedding sine")
        x = self.col_embed.weight[:W].expand(H, W, -1)
        y = self.row_embed.weight[:H, None].expand(H, W, -1)
        return torch.cat([x, y], 2).flatten(0, 1).expand(B, -1, -1)     # (B, N, C)


# -- token mixers --------------------------------------------------------------------------------
#
# forward(x, pos, valid, grid): tokens x (B, N, C); positions pos, to be added to x, or None; valid
# bool (B, N), True = token of the image, None = all are; grid (H, W) with N = H*W.
# Returns (B, N, C). No valid token depends on a padded one. max_grid is the largest grid to come.

class AttentionMixer(nn.Module):
    """Multi-head attention, in the parameter names of nn.MultiheadAttention (arXiv:1706.03762).

    The position is added to queries and keys, never to values. `attend` is the cross-attention.
    """

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        C, self.nh, self.dropout = cfg.hidden_dim, cfg.nheads, cfg.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))   # query, key and value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        self.out_proj = nn.Linear(C, C)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, valid, grid):
        x_pos = x if pos is None else x + pos
        return self.attend(x_pos, x_pos, x, valid)

    def attend(self, q, k, v, valid):
        """Queries q (B, M, C) read values v (B, N, C) by keys k (B, N, C) where valid (B, N)."""
        (B, M, C), hs = q.shape, q.shape[2] // self.nh
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b).view(B, -1, self.nh, hs).transpose(1, 2)  # (B, nh, M or N, hs)
                   for x, w, b in zip((q, k, v), weights, biases))
        attended = None if valid is None else valid[:, None, None, :]          # True = attended to
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attended, dropout)
        return self.out_proj(y.transpose(1, 2).reshape(B, M, C))               # (B, M, C)


class PoolMixer(nn.Module):
    """Mean of the valid tokens in a k x k window, minus the token (arXiv:2111.11418, Sec. 3.2).

    The residual around every mixer adds the token back.
    """

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        k = cfg.pool_size
        self.window = dict(kernel_size=k, stride=1, padding=k // 2, divisor_override=1)  # a sum

    def forward(self, x, pos, valid, grid):
        g, v = to_grid(x, valid, grid)                             # (B, C, H, W), (B or 1, 1, H, W)
        count = F.avg_pool2d(v, **self.window).clamp(min=1)        # valid tokens per window
        y = F.avg_pool2d(g, **self.window) / count - g
        return y.flatten(2).transpose(1, 2)                        # (B, N, C)


def to_grid(x, valid, grid):
    """Tokens (B, N, C) as a map (B, C, H, W), zeros in the padding, and valid as one of 0 and 1."""
    (B, N, C), (H, W) = x.shape, grid
    v = x.new_ones(1, 1, H, W) if valid is None else valid.view(B, 1, H, W).to(x.dtype)
    return x.transpose(1, 2).view(B, C, H, W) * v, v


class IdentityMixer(nn.Module):
    """The token itself: no mixing at all (arXiv:2111.11418, Table 5)."""

    def __init__(self, cfg, max_grid=None):
        super().__init__()

    def forward(self, x, pos, valid, grid):
        return x


class ConvMixer(nn.Module):
    """Depthwise 3 x 3 convolution (arXiv:2111.11418, Table 5)."""

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        self.conv = nn.Conv2d(cfg.hidden_dim, cfg.hidden_dim, 3, padding=1, groups=cfg.hidden_dim)

    def forward(self, x, pos, valid, grid):
        g, _ = to_grid(x, valid, grid)                              # (B, C, H, W)
        return self.conv(g).flatten(2).transpose(1, 2)              # (B, N, C)


class MlpMixer(nn.Module):
    """The token-mixing MLP of MLP-Mixer (arXiv:2105.01601, Eq. 1): N -> token_dim -> N.

    The weights belong to the places of the largest grid; a smaller one uses the upper left part.
    """

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        rows, cols = self.max_grid = max_grid or (cfg.grid_rows, cfg.grid_cols)
        self.w1 = nn.Parameter(torch.randn(cfg.token_dim, rows, cols) * (rows * cols) ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(cfg.token_dim))
        self.w2 = nn.Parameter(torch.randn(cfg.token_dim, rows, cols) * cfg.token_dim ** -0.5)
        self.b2 = nn.Parameter(torch.zeros(rows, cols))

    def forward(self, x, pos, valid, grid):
        check_grid(grid, self.max_grid, "mlp")
        w1, w2, b2 = (w[..., :grid[0], :grid[1]].flatten(-2) for w in (self.w1, self.w2, self.b2))
        if valid is not None:
            x = x * valid[..., None]
        y = F.gelu(F.linear(x.transpose(1, 2), w1, self.b1))        # (B, C, token_dim)
        return F.linear(y, w2.t(), b2).transpose(1, 2)              # (B, N, C)


class RandomMixer(nn.Module):
    """A fixed random mean over tokens: uniform numbers, softmax by row (arXiv:2111.11418, Table 5).

    As large as the largest grid squared; rows are renormalised over the valid tokens at hand.
    """

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        rows, cols = self.max_grid = max_grid or (cfg.grid_rows, cfg.grid_cols)
        weight = torch.rand(rows * cols, rows * cols).softmax(1).view(rows, cols, rows, cols)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, pos, valid, grid):
        check_grid(grid, self.max_grid, "random")
        (B, N, C), (H, W) = x.shape, grid
        weight = self.weight[:H, :W, :H, :W].reshape(N, N)
        if valid is None:
            return (weight / weight.sum(1, keepdim=True)) @ x       # (B, N, C)
        total = valid.to(weight.dtype) @ weight.t()                 # (B, N) weight of valid ones
        return weight @ (x * valid[..., None]) / total[..., None].clamp(min=1e-12)


def check_grid(grid, max_grid, mixer):
    """Raises ValueError for a grid with more rows or columns than max_grid."""
    if grid[0] > max_grid[0] or grid[1] > max_grid[1]:
        raise ValueError(f"the {mixer} mixer was built for at most {max_grid[0]} x {max_grid[1]} "
                         f"tokens, the image has {grid[0]} x {grid[1]}: raise --grid_rows and "
                         f"--grid_cols, or use smaller images")


MIXERS = {"attention": AttentionMixer, "pool": PoolMixer, "identity": IdentityMixer,
          "mlp": MlpMixer, "random": RandomMixer, "conv": ConvMixer}


# -- transformer ---------------------------------------------------------------------------------

class Layer(nn.Module):
    """What encoder and decoder layers share: a feed-forward block and the residual around each."""

    def __init__(self, cfg, norms):
        super().__init__()
        self.linear1 = nn.Linear(cfg.hidden_dim, cfg.dim_feedforward)
        self.linear2 = nn.Linear(cfg.dim_feedforward, cfg.hidden_dim)
        for k in range(norms):
            setattr(self, f"norm{k + 1}", nn.LayerNorm(cfg.hidden_dim))
        self.dropout, self.pre_norm = nn.Dropout(cfg.dropout), cfg.pre_norm

    def residual(self, x, norm, block):
        if self.pre_norm:
            return x + self.dropout(block(norm(x)))
        return norm(x + self.dropout(block(x)))

    def feed_forward(self, x):
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class EncoderLayer(Layer):
    """A token mixer and the feed-forward block."""

    def __init__(self, cfg):
        super().__init__(cfg, norms=2)
        # called self_attn whatever the mixer: the official name, which checkpoints use
        self.self_attn = MIXERS[cfg.encoder_mixer or cfg.mixer](cfg, (cfg.grid_rows, cfg.grid_cols))

    def forward(self, x, pos, valid, grid):
        x = self.residual(x, self.norm1, lambda y: self.self_attn(y, pos, valid, grid))
        return self.residual(x, self.norm2, self.feed_forward)


class DecoderLayer(Layer):
    """A mixer of the queries, attention to the image, and the feed-forward block."""

    def __init__(self, cfg):
        super().__init__(cfg, norms=3)
        self.grid = 1, cfg.num_queries
        self.self_attn = MIXERS[cfg.decoder_mixer or cfg.mixer](cfg, self.grid)
        self.multihead_attn = AttentionMixer(cfg)

    def forward(self, x, query_pos, memory, memory_pos, valid):
        def read_image(y):
            return self.multihead_attn.attend(y + query_pos, memory_pos, memory, valid)
        x = self.residual(x, self.norm1, lambda y: self.self_attn(y, query_pos, None, self.grid))
        x = self.residual(x, self.norm2, read_image)
        return self.residual(x, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    """The encoder layers; pre_norm adds a norm after the last."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.enc_layers))
        self.norm = nn.LayerNorm(cfg.hidden_dim) if cfg.pre_norm else nn.Identity()

    def forward(self, x, pos, valid, grid):                         # (B, N, C)
        for layer in self.layers:
            x = layer(x, pos, valid, grid)
        return self.norm(x)


class Decoder(nn.Module):
    """The decoder layers, and one norm for the states of all."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.norm = nn.LayerNorm(cfg.hidden_dim)

    def forward(self, query_pos, memory, pos, valid):
        """query_pos (Q, C), memory (B, N, C) -> the normed states of all layers (L, B, Q, C)."""
        x = torch.zeros_like(query_pos).expand(len(memory), -1, -1)
        memory_pos, states = memory + pos, []
        for layer in self.layers:
            x = layer(x, query_pos, memory, memory_pos, valid)
            states.append(x)
        return self.norm(torch.stack(states))


class Transformer(nn.Module):
    """Encoder and decoder: tokens (B, N, C) to query states (L, B, Q, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        for name, p in self.named_parameters():
            if p.dim() == 2 and p.requires_grad:
                nn.init.xavier_uniform_(p)

    def forward(self, x, pos, query_pos, valid, grid):
        memory = self.encoder(x, pos, valid, grid)
        return self.decoder(query_pos, memory, pos, valid)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *dims):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """The detector. Source: arXiv:2005.12872, Fig. 2 and Appendix A.3."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.hidden_dim
        position = {"sine": SinePosition, "learned": LearnedPosition}[cfg.position_embedding]
        self.transformer = Transformer(cfg)
        self.class_embed = nn.Linear(C, cfg.num_classes + 1)        # the last one is "no object"
        self.bbox_embed = MLP(C, C, C, 4)
        self.query_embed = nn.Embedding(cfg.num_queries, C)
        self.backbone = nn.Sequential(Backbone(cfg), position(cfg))
        self.input_proj = nn.Conv2d(self.backbone[0].body.num_channels, C, 1)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, images, valid=None):
        """Predictions of every decoder layer, the last one last.

        images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW), True = image, None
        = no padding. Returns logits (L, B, Q, K+1), of which the last class is "no object", and
        boxes (L, B, Q, 4), cxcywh in [0, 1] of each image without its padding; both float32.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} given, expected "
                             f"(B, 3, IH, IW)")
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if valid is not None:
            x = x * valid[:, None]                                  # padding is the mean colour
        x = self.input_proj(self.backbone[0](x))                    # (B, C, H, W)
        grid = x.shape[2:]
        if valid is None:
            pos = self.backbone[1](images.new_ones(1, *grid, dtype=torch.bool))  # the same for all
        else:
            valid = F.interpolate(valid[:, None].float(), size=grid)[:, 0] > 0   # nearest
            pos, valid = self.backbone[1](valid), valid.flatten(1)               # (B, N, C), (B, N)
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, C)
        hs = self.transformer(x, pos.to(x.dtype), self.query_embed.weight, valid, grid)
        with torch.autocast(images.device.type, enabled=False):     # bfloat16 boxes are 1/256 wrong
            hs = hs.float()                                                      # (L, B, Q, C)
            return self.class_embed(hs), self.bbox_embed(hs).sigmoid()


MODELS = {
    "detr_tiny": ModelConfig(                                       # for the built-in shapes
        backbone="resnet_tiny", backbone_norm="batch", position_temperature=2, hidden_dim=96,
        nheads=4, dim_feedforward=256, enc_layers=2, dec_layers=3, num_queries=12, dropout=0.0,
        pre_norm=True, num_classes=3, grid_rows=16, grid_cols=16, token_dim=64),
    "detr_r18": ModelConfig(backbone="resnet18"),
    "detr_r34": ModelConfig(backbone="resnet34"),
    "detr_r50": ModelConfig(),
    "detr_r50_dc5": ModelConfig(dilation=True, grid_rows=84, grid_cols=84),
    "detr_r101": ModelConfig(backbone="resnet101"),
    "detr_r101_dc5": ModelConfig(backbone="resnet101", dilation=True, grid_rows=84, grid_cols=84),
}


def build_model(config, **overrides):
    """A DETR from a ModelConfig or the name of one in MODELS, with fields overridden.

    build_model("detr_r50", mixer="pool", num_classes=3). Raises ValueError for unknown names.
    """
    if isinstance(config, str):
        if config not in MODELS:
            raise ValueError(f"model {config} is unknown, use one of: {', '.join(MODELS)}")
        config = MODELS[config]
    return DETR(replace(config, **overrides))


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


def load_weights(model, source, strict=True):
    """Copy the tensors of a checkpoint into `model`; every one is accounted for.

    source: a path, a URL or a state dict: a checkpoint of ours, an officially released DETR file
    (both go into the whole model), or a torchvision ResNet file (into the backbone). Returns one
    line for each tensor that was not taken from or not found in the file. Raises ValueError that
    names all tensors that do not fit. strict=False, for fine-tuning, lets two things differ and
    leaves them as initialised: the class head, and the mixers (self_attn).
    """
    state = source if isinstance(source, dict) else read_checkpoint(source)
    name = "the state dict" if isinstance(source, dict) else str(source)
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(
            isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{name} holds no weights: a state dict, or one under \"model\", is "
                         f"expected")
    target = model
    if "fc.weight" in state or not any(k.startswith("transformer.") for k in state):
        target = model.backbone[0].body                             # torchvision's ResNet
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
                     or target is not model and key.startswith("fc."))
        may_differ = not strict and (key.startswith("class_embed.") or ".self_attn." in key)
        (report if by_design or may_differ else faults).append(line)
    if faults:
        raise ValueError(f"{name} does not fit the model, {len(faults)} tensor(s) differ; is it a "
                         f"file of another model, mixer or number of classes?\n"
                         + "\n".join(faults[:20])
                         + (f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""))
    taken = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    target.load_state_dict({**own, **taken})
    return report


def load_backbone(model, weights):
    """ImageNet weights for the backbone: "imagenet" fetches torchvision's file, else a path or URL.

    Returns load_weights' report; raises ValueError if the file cannot be had.
    """
    if weights != "imagenet":
        return load_weights(model, weights)
    file = RESNETS[model.cfg.backbone][3]
    if not file:
        raise ValueError(f"no ImageNet weights are published for {model.cfg.backbone}: use "
                         f"--backbone_weights none")
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        if not os.path.exists(os.path.join(folder, file)):
            print(f"backbone weights: fetching {file} to {folder}")
        state = torch.hub.load_state_dict_from_url(
            f"https://download.pytorch.org/models/{file}", map_location="cpu", check_hash=True,
            weights_only=True)
    except (OSError, RuntimeError) as error:                        # URLError is an OSError
        raise ValueError(f"torchvision's {file} cannot be fetched ({error}): put it into {folder}, "
                         f"or give --backbone_weights FILE, or none to train from "
                         f"scratch") from None
    return load_weights(model, state)


# -- python model.py -----------------------------------------------------------------------------

def multiply_adds(model, images):
    """Multiply-adds of convolutions and matrix products in one forward pass, by torch's counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    # plain matrix products: the counter does not know the CPU's fused attention, nor inference_mode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() // 2


def main():
    parser = argparse.ArgumentParser(
        description="Size and speed of the models, eval mode, batch 1.")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'model':14s} {'mixer':10s} {'image':>9s} {'parameters':>11s} {'trained':>11s} "
          f"{'G mult-adds':>11s} {'images/s':>9s}   ({device}, {torch.get_num_threads()} threads)")
    rows = [(name, "attention") for name in MODELS]
    rows += [(name, mixer) for name in ("detr_tiny", "detr_r50")
             for mixer in MIXERS if mixer != "attention"]
    for name, mixer in rows:
        model = build_model(name, mixer=mixer).eval().to(device, memory_format=torch.channels_last)
        h, w = (64, 64) if name == "detr_tiny" else args.size
        images = torch.randint(256, (1, 3, h, w), dtype=torch.uint8, device=device)
        macs, times = multiply_adds(model, images), []
        for _ in range(args.repeats):
            start = time.perf_counter()
            with torch.inference_mode():
                model(images)[1].sum().item()                       # waits for the device
            times.append(time.perf_counter() - start)
        parameters = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        print(f"{name:14s} {mixer:10s} {f'{h}x{w}':>9s} {sum(parameters):11,d} {sum(trained):11,d} "
              f"{macs / 1e9:11.3f} {1 / sorted(times)[len(times) // 2]:9.2f}")


if __name__ == "__main__":
    main()
