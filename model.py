"""DETR with a choice of token mixer, and the MetaFormer classifiers that the mixers come from.

    model = build_model("detr_r50", mixer="pool")
    logits, boxes = model(images, valid)         # uint8 (B, 3, IH, IW), bool (B, IH, IW)
    load_weights(build_model("detr_r50"), "detr-r50-e632da11.pth")
    logits = build_model("poolformer_s12")(images)

DETR has the state-dict names of the official implementation.
Papers: DETR, arXiv:2005.12872; ResNet, arXiv:1512.03385; MetaFormer, arXiv:2111.11418 and
arXiv:2210.13452; MLP-Mixer, arXiv:2105.01601; attention and sine positions, arXiv:1706.03762.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixers import MIXERS, AttentionMixer, dropout
from resnet import NORMS, RESNETS, Normalise, ResNet
from metaformer import METAFORMERS, MetaFormer, MetaFormerConfig
from checkpoint import load_weights


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network; the annotations are the help of train.py's flags."""
    mixer: Annotated[str, "token mixer for both self-attentions, a key of MIXERS"] = "attention"
    encoder_mixer: Annotated[str, "token mixer of the encoder alone"] = ""
    decoder_mixer: Annotated[str, "token mixer of the decoder alone"] = ""
    pool_size: Annotated[int, "side of the pooling window in tokens, odd"] = 3
    grid_rows: Annotated[int, "rows of the largest token grid that mlp, fc and random take"] = 42
    grid_cols: Annotated[int, "columns of it; 42 x 42 covers 1333 pixels at stride 32"] = 42
    token_dim: Annotated[int, "hidden units of the mlp mixer, over tokens"] = 128
    backbone: Annotated[str, "a ResNet, or a MetaFormer such as poolformer_s12"] = "resnet50"
    backbone_stage: Annotated[int, "last stage used of a MetaFormer; 1 to 4, stride 4 to 32"] = 4
    backbone_norm: Annotated[str, "of a ResNet: frozen (pretrained weights) or batch"] = "frozen"
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
    qkv_bias = out_bias = True              # no annotation, no option: DETR's attention has both

    def __post_init__(self):
        maps = [name for name, cfg in METAFORMERS.items() if cfg.takes_any_size]
        for field, known in (("mixer", MIXERS), ("encoder_mixer", MIXERS),
                             ("decoder_mixer", MIXERS), ("backbone", (*RESNETS, *maps)),
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
        if self.dilation and self.backbone not in ("resnet50", "resnet101"):
            raise ValueError(f"--dilation is defined for resnet50 and resnet101, not for "
                             f"{self.backbone}")
        if self.backbone_stage not in (1, 2, 3, 4) or (self.backbone_stage < 4
                                                       and self.backbone in RESNETS):
            raise ValueError(f"--backbone_stage {self.backbone_stage} must be 1 to 4, and 4 for a "
                             f"ResNet such as {self.backbone}")
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

    @property
    def stride(self):
        """Pixels per token of the image, along rows and along columns."""
        stages = (len(RESNETS[self.backbone][1]) if self.backbone in RESNETS
                  else self.backbone_stage)
        return 2 ** (stages + 1) // (2 if self.dilation else 1)


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


# -- transformer ---------------------------------------------------------------------------------

class Layer(nn.Module):
    """What encoder and decoder layers share: a feed-forward block and the residual around each."""

    def __init__(self, cfg, norms):
        super().__init__()
        self.linear1 = nn.Linear(cfg.hidden_dim, cfg.dim_feedforward)
        self.linear2 = nn.Linear(cfg.dim_feedforward, cfg.hidden_dim)
        for k in range(norms):
            setattr(self, f"norm{k + 1}", nn.LayerNorm(cfg.hidden_dim))
        self.dropout, self.pre_norm = cfg.dropout, cfg.pre_norm

    def drop(self, x):
        return dropout(x, self.dropout) if self.training else x

    def residual(self, x, norm, block):
        if self.pre_norm:
            return x + self.drop(block(norm(x)))
        return norm(x + self.drop(block(x)))

    def feed_forward(self, x):
        return self.linear2(self.drop(F.relu(self.linear1(x))))


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


class Backbone(nn.Module):
    """ResNet or MetaFormer, under the official name backbone.0.body."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.backbone in RESNETS:
            self.body = ResNet(cfg)
        else:
            self.body = MetaFormer(replace(METAFORMERS[cfg.backbone], maps=str(cfg.backbone_stage),
                                           drop_path=0.0))

    def forward(self, x, valid):
        """Images (B, 3, IH, IW) and valid (B, IH, IW), or None, to those of the last map."""
        if isinstance(self.body, MetaFormer):
            return self.body.stage_maps(x, valid)[-1]
        x = self.body(x)                                            # (B, num_channels, H, W)
        if valid is not None:
            valid = F.interpolate(valid[:, None].float(), size=x.shape[2:])[:, 0] > 0  # nearest
        return x, valid


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
        self.normalise = Normalise()

    def forward(self, images, valid=None):
        """Predictions of every decoder layer, the last one last.

        images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW), True = image, None
        = no padding. Returns logits (L, B, Q, K+1), of which the last class is "no object", and
        boxes (L, B, Q, 4), cxcywh in [0, 1] of each image without its padding; both float32.
        """
        x, valid = self.backbone[0](self.normalise(images, valid), valid)
        x = self.input_proj(x)                                                   # (B, C, H, W)
        grid = x.shape[2:]
        if valid is None:
            pos = self.backbone[1](images.new_ones(1, *grid, dtype=torch.bool))  # the same for all
        else:
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
    **METAFORMERS,
}


def build_model(config, **overrides):
    """A DETR from a ModelConfig, or a MetaFormer from a MetaFormerConfig, with fields overridden.

    config is one of them, or the name of one in MODELS: build_model("detr_r50", mixer="pool").
    Raises ValueError for unknown names.
    """
    if isinstance(config, str):
        if config not in MODELS:
            raise ValueError(f"model {config} is unknown, use one of: {', '.join(MODELS)}")
        config = MODELS[config]
    config = replace(config, **overrides)
    return MetaFormer(config) if isinstance(config, MetaFormerConfig) else DETR(config)
