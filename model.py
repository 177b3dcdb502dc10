"""DETR: an image to a set of boxes, with a choice of token mixer.

    model = build_model("detr_r50", mixer="pool")
    logits, boxes = model(images, valid)         # uint8 (B, 3, IH, IW), bool (B, IH, IW)
    load_weights(build_model("detr_r50"), "detr-r50-e632da11.pth")
    logits = build_model("poolformer_s12")(images)

The names in the state dict are those of the official implementation. Papers: DETR,
arXiv:2005.12872; attention and sine positions, arXiv:1706.03762.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixers import MIXERS, MixerConfig
from coco_eval import UserError                        # a ValueError, printed as one line
from options import check_options, nearest
from resnet import NORMS, RESNETS, Normalise, ResNet
from metaformer import METAFORMERS, MetaFormer, MetaFormerBackbone, MetaFormerConfig
from detr_demo import DETRDemo
from checkpoint import load_weights                    # part of this file's interface

# --backbone: the class of each, built from a ModelConfig. A backbone has `stride` (pixels of a
# token's side) and `num_channels`; forward takes normalised images (B, 3, IH, IW) and valid
# (B, IH, IW) or None and returns the map (B, num_channels, H, W) and its valid (B, H, W) or None;
# with cfg.masks also the finer maps, see segmentation.MaskHead.
BACKBONES = {name: ResNet for name in RESNETS}
BACKBONES |= {name: MetaFormerBackbone for name, cfg in METAFORMERS.items() if cfg.takes_any_size}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a DETR. A field is a flag: type, help, and choices or least value."""
    mixer: Annotated[str, "token mixer of both self-attentions", MIXERS] = "attention"
    encoder_mixer: Annotated[str, "of the encoder, if not --mixer", ("", *MIXERS)] = ""
    decoder_mixer: Annotated[str, "of the decoder, if not --mixer", ("", *MIXERS)] = ""
    mixer_scale: Annotated[float, "first value of a learned scale on mixers; 0: none", 0] = 0.0
    pool_size: Annotated[int, "side of the pooling window in tokens, odd", 1] = 3
    grid_rows: Annotated[int, "rows of the largest token grid that mlp, fc and random take", 1] = 42
    grid_cols: Annotated[int, "its columns; 42 x 42 covers 1333 pixels at stride 32", 1] = 42
    tokens_mlp_dim: Annotated[int, "hidden units of the mlp mixer, over the tokens", 1] = 128
    backbone: Annotated[str, "network that computes the tokens", BACKBONES] = "resnet50"
    backbone_stage: Annotated[int, "last stage used of a MetaFormer, 1 to 4: stride 4 to 32", 1] = 4
    backbone_norm: Annotated[str, "of a ResNet; frozen with pretrained weights", NORMS] = "frozen"
    dilation: Annotated[bool, "last stage dilated instead of strided (DC5)"] = False
    position_embedding: Annotated[str, "of the tokens", ("sine", "learned")] = "sine"
    positions: Annotated[str, "where tokens get theirs: in the attention of each encoder layer, "
                              "added once to the encoder's input, or not in the encoder",
                         ("layers", "input", "none")] = "layers"
    position_temperature: Annotated[float, "of sine positions; low suits small grids"] = 10000.0
    enc_layers: Annotated[int, "encoder layers", 0] = 6
    dec_layers: Annotated[int, "decoder layers", 1] = 6
    dim_feedforward: Annotated[int, "hidden units of the feed-forward blocks", 1] = 2048
    hidden_dim: Annotated[int, "channels C of every token", 1] = 256
    dropout: Annotated[float, "dropout in the transformer", 0] = 0.1
    nheads: Annotated[int, "attention heads, must divide hidden_dim", 1] = 8
    num_queries: Annotated[int, "queries Q, an upper bound of the objects in an image", 1] = 100
    pre_norm: Annotated[bool, "normalise before each block instead of after it"] = False
    num_classes: Annotated[int, "classes K without no-object; data sets set it", 1] = 91
    masks: Annotated[bool, "predict masks, too: see segmentation.py"] = False
    demo: Annotated[bool, "the detector of detr_demo.py; --model sets it"] = False

    def __post_init__(self):
        check_options(self)
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            raise UserError(f"--hidden_dim {self.hidden_dim} must be a multiple of --nheads "
                            f"{self.nheads} and of 4 (sine and cosine, rows and columns)")
        if self.dilation and self.backbone not in ("resnet50", "resnet101"):
            raise UserError(f"--dilation is defined for resnet50 and resnet101, not for "
                            f"{self.backbone}")
        if self.backbone_stage > 4 or self.backbone_stage < 4 and self.backbone in RESNETS:
            raise UserError(f"--backbone_stage {self.backbone_stage} must be 1 to 4, and 4 for a "
                            f"ResNet such as {self.backbone}")
        if not self.position_temperature > 0:                       # refuses NaN, too
            raise UserError(f"--position_temperature {self.position_temperature} must be over 0")
        if self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout} must be below 1")
        if self.pool_size % 2 == 0:
            raise UserError(f"--pool_size {self.pool_size} must be odd, to have a centre")


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
        # a sine and its cosine share a divisor; the divisors grow from 1 towards temperature
        i = torch.arange(0, self.dim, 2, dtype=torch.float32, device=valid.device)
        divisor = self.temperature ** (i / self.dim)                        # (dim / 2,)

        row = valid.cumsum(1, dtype=torch.float32)                          # (B, H, W), from 1
        col = valid.cumsum(2, dtype=torch.float32)
        halves = []
        for place, last in ((row, row[:, -1:, :]), (col, col[:, :, -1:])):
            angle = place / (last + 1e-6) * (2 * math.pi)                   # (B, H, W)
            angle = angle[..., None] / divisor                              # (B, H, W, dim / 2)
            halves.append(torch.stack([angle.sin(), angle.cos()], 4).flatten(3))
        return torch.cat(halves, 3).flatten(1, 2)                           # (B, N, C)


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
            raise UserError(f"learned positions end at 50 x 50 tokens, the image has {H} x {W}: "
                            f"use smaller images or --position_embedding sine")
        col = self.col_embed.weight[:W].expand(H, W, -1)
        row = self.row_embed.weight[:H, None].expand(H, W, -1)
        # column first: the order of the official weights
        return torch.cat([col, row], 2).flatten(0, 1).expand(B, -1, -1)     # (B, N, C)


# -- transformer ---------------------------------------------------------------------------------

def build_mixer(name, cfg, max_grid):
    """The mixer of that name with the options of a ModelConfig."""
    return MIXERS[name](MixerConfig(
        hidden_dim=cfg.hidden_dim, nheads=cfg.nheads, dropout=cfg.dropout, max_grid=max_grid,
        pool_size=cfg.pool_size, tokens_mlp_dim=cfg.tokens_mlp_dim))


class TransformerLayer(nn.Module):
    """The common part of encoder and decoder layers: feed-forward block, residual, dropout."""

    def __init__(self, cfg, norms):
        super().__init__()
        self.linear1 = nn.Linear(cfg.hidden_dim, cfg.dim_feedforward)
        self.linear2 = nn.Linear(cfg.dim_feedforward, cfg.hidden_dim)
        if cfg.mixer_scale:
            self.mixer_scale = nn.Parameter(torch.full((cfg.hidden_dim,), cfg.mixer_scale))
        for k in range(norms):
            setattr(self, f"norm{k + 1}", nn.LayerNorm(cfg.hidden_dim))
        self.dropout_rate, self.pre_norm = cfg.dropout, cfg.pre_norm

    def drop(self, x):
        return F.dropout(x, self.dropout_rate, self.training)

    def residual(self, x, norm, block):
        if self.pre_norm:
            return x + self.drop(block(norm(x)))
        return norm(x + self.drop(block(x)))

    def mix(self, x, pos, valid, grid):
        y = self.self_attn(x, pos, valid, grid)                     # (B, N, C)
        return y * self.mixer_scale if hasattr(self, "mixer_scale") else y

    def feed_forward(self, x):
        return self.linear2(self.drop(F.relu(self.linear1(x))))


class EncoderLayer(TransformerLayer):
    """A mixer of the image's tokens and the feed-forward block."""

    def __init__(self, cfg):
        super().__init__(cfg, norms=2)
        # called self_attn whatever the mixer: the official name, which checkpoints use
        name = cfg.encoder_mixer or cfg.mixer
        self.self_attn = build_mixer(name, cfg, (cfg.grid_rows, cfg.grid_cols))

    def forward(self, x, pos, valid, grid):
        x = self.residual(x, self.norm1, lambda y: self.mix(y, pos, valid, grid))
        return self.residual(x, self.norm2, self.feed_forward)


class DecoderLayer(TransformerLayer):
    """A mixer of the queries, cross-attention to the image, and the feed-forward block."""

    def __init__(self, cfg):
        super().__init__(cfg, norms=3)
        self.grid = 1, cfg.num_queries
        self.self_attn = build_mixer(cfg.decoder_mixer or cfg.mixer, cfg, self.grid)
        self.multihead_attn = build_mixer("attention", cfg, None)

    def forward(self, x, query_pos, memory, keys, valid):
        """x (B, Q, C), query_pos (Q, C); of the image memory and keys = memory + pos, both
        (B, N, C), and valid (B, N) or None."""
        def mix_queries(y):
            return self.mix(y, query_pos, None, self.grid)

        def read_image(y):
            return self.multihead_attn.attend(y + query_pos, keys, memory, valid)

        x = self.residual(x, self.norm1, mix_queries)
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
        # the queries start as zeros; query_pos tells them apart
        x = torch.zeros_like(query_pos).expand(len(memory), -1, -1)
        keys, states = memory + pos, []
        for layer in self.layers:
            x = layer(x, query_pos, memory, keys, valid)
            states.append(x)
        return self.norm(torch.stack(states))


class Transformer(nn.Module):
    """Encoder and decoder: tokens (B, N, C) to query states (L, B, Q, C) and memory (B, N, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.positions = cfg.positions
        for name, p in self.named_parameters():
            is_bias = name.split(".")[-1].startswith("b")           # see mixers.py
            if p.dim() == 2 and p.requires_grad and not is_bias:
                nn.init.xavier_uniform_(p)

    def forward(self, x, pos, query_pos, valid, grid):
        x = x + pos if self.positions == "input" else x
        memory = self.encoder(x, pos if self.positions == "layers" else None, valid, grid)
        # in any case the cross-attention adds pos to its keys, and query_pos goes to every layer
        return self.decoder(query_pos, memory, pos, valid), memory


# -- the detector --------------------------------------------------------------------------------

class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *dims):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Backbone(nn.Module):
    """One of BACKBONES, under its official name backbone.0.body."""

    def __init__(self, cfg):
        super().__init__()
        self.body = BACKBONES[cfg.backbone](cfg)

    def forward(self, x, valid):
        return self.body(x, valid)


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
        self.backbone = nn.Sequential(Backbone(cfg), position(cfg))  # names backbone.0, backbone.1
        self.input_proj = nn.Conv2d(self.backbone[0].body.num_channels, C, 1)
        self.normalise = Normalise()
        if cfg.masks:
            from segmentation import MaskAttention, MaskHead        # here, as it imports this file
            self.bbox_attention, self.mask_head = MaskAttention(cfg), MaskHead(cfg, self.backbone)

    def forward(self, images, valid=None, wanted=None):
        """Predictions of every decoder layer, the last one last.

        images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW), True = image, None
        = no padding. Returns logits (L, B, Q, K+1), of which the last class is "no object", and
        boxes (L, B, Q, 4), cxcywh in [0, 1] of each image without its padding; both float32. With
        cfg.masks also mask logits of the last layer (B, Q, H4, W4), a quarter of the images' size.
        wanted: a function of (logits, boxes) that gives the indices (image, query), each (M,), of
        the masks to compute, then (M, H4, W4); None: all.
        """
        # the image as a grid of tokens
        backbone, position = self.backbone
        x, valid, *maps = backbone(self.normalise(images, valid), valid)
        x = self.input_proj(x)                                                   # (B, C, H, W)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, C)

        # their positions; without padding the same for all images
        if valid is None:
            pos = position(images.new_ones(1, *grid, dtype=torch.bool))          # (1, N, C)
        else:
            pos = position(valid)                                                # (B, N, C)
            valid = valid.flatten(1)                                             # (B, N)

        states, memory = self.transformer(x, pos.to(x.dtype), self.query_embed.weight, valid, grid)
        with torch.autocast(images.device.type, enabled=False):     # bfloat16 boxes are 1/256 wrong
            states = states.float()                                              # (L, B, Q, C)
            logits, boxes = self.class_embed(states), self.bbox_embed(states).sigmoid()
        if not self.cfg.masks:
            return logits, boxes
        attention = self.bbox_attention(states[-1], memory, valid, grid)         # (B, Q, nh, H, W)
        masks = self.mask_head(x, attention, maps, wanted, (logits, boxes))
        return logits, boxes, masks


MODELS = {
    "detr_tiny": ModelConfig(                                       # for the built-in shapes
        backbone="resnet_tiny", backbone_norm="batch", position_temperature=2, hidden_dim=96,
        nheads=4, dim_feedforward=256, enc_layers=2, dec_layers=3, num_queries=12, dropout=0.0,
        pre_norm=True, num_classes=3, grid_rows=16, grid_cols=16, tokens_mlp_dim=64),
    "detr_r18": ModelConfig(backbone="resnet18"),
    "detr_r34": ModelConfig(backbone="resnet34"),
    "detr_r50": ModelConfig(),
    "detr_r50_dc5": ModelConfig(dilation=True, grid_rows=84, grid_cols=84),
    "detr_r101": ModelConfig(backbone="resnet101"),
    "detr_r101_dc5": ModelConfig(backbone="resnet101", dilation=True, grid_rows=84, grid_cols=84),
    "detr_demo": ModelConfig(demo=True),                            # see detr_demo.py
    "detr_demo_tiny": ModelConfig(
        demo=True, backbone="resnet_tiny", backbone_norm="batch", hidden_dim=96, nheads=4,
        dim_feedforward=256, enc_layers=2, dec_layers=3, num_queries=12, dropout=0.0),
    **METAFORMERS,
}
MODELS |= {f"{name}_panoptic": replace(MODELS[name], masks=True, num_classes=250)
           for name in ("detr_r50", "detr_r50_dc5", "detr_r101")}


def build_model(config, **overrides):
    """A DETR from a ModelConfig, or a MetaFormer from a MetaFormerConfig, with fields overridden.

    config is one of them, or the name of one in MODELS: build_model("detr_r50", mixer="pool").
    Raises ValueError for unknown names.
    """
    if isinstance(config, str):
        if config not in MODELS:
            raise UserError(f"model {config} is unknown, {nearest(config, MODELS)}")
        config = MODELS[config]
    config = replace(config, **overrides)
    if isinstance(config, MetaFormerConfig):
        return MetaFormer(config)
    return DETRDemo(config, BACKBONES[config.backbone](config)) if config.demo else DETR(config)
