"""The detector of the DETR paper's listing: one class around torch's own transformer.

    model = build_model("detr_demo")
    logits, boxes = model(images, valid)                # as of model.DETR
    load_weights(model, "detr_demo-da2a99e9.pth")       # the published file, some 40 AP on COCO
    python train.py --model detr_demo_tiny              # built-in shapes

It differs from model.DETR in three points. Positions are learned, a vector for each row and each
column, and added once, to the encoder's input; the attentions add none. The queries are the
decoder's input, and no layer adds them again. A single linear layer gives the box.

It differs from the listing in two. Images of unequal size can be padded to one batch: no attention
reads the padding. And every decoder layer predicts, so that the loss can train all of them;
--no-aux_loss trains the last one alone.

Source: arXiv:2005.12872, Appendix, Listing 1. The factor 0.1 and the names in the state dict are
those of the official notebook detr_demo.ipynb, whose weights, in half precision, were trained for
700 epochs with one image per process (facebookresearch/detr, issue 63).
"""

from dataclasses import fields

import torch
import torch.nn as nn

from coco_eval import UserError
from resnet import Normalise


# options of model.ModelConfig that mean nothing here, and --dilation, which needs over 50 rows
UNUSED_OPTIONS = {"mixer", "encoder_mixer", "decoder_mixer", "mixer_scale", "pool_size",
                  "grid_rows", "grid_cols", "tokens_mlp_dim", "dilation", "position_embedding",
                  "positions", "position_temperature", "pre_norm", "masks"}


def check_unused(cfg):
    """Raises UserError if one of UNUSED_OPTIONS has another value than its default."""
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in UNUSED_OPTIONS and value != field.default:
            raise UserError(f"--{field.name} {value} is no option of detr_demo: leave it out, or "
                            f"use another model")


class DETRDemo(nn.Module):
    """The detector of a ModelConfig, with a backbone of model.BACKBONES."""

    def __init__(self, cfg, backbone):
        super().__init__()
        check_unused(cfg)
        self.cfg, C = cfg, cfg.hidden_dim
        self.normalise, self.backbone = Normalise(), backbone
        self.conv = nn.Conv2d(backbone.num_channels, C, 1)
        self.transformer = nn.Transformer(C, cfg.nheads, cfg.enc_layers, cfg.dec_layers,
                                          cfg.dim_feedforward, cfg.dropout, batch_first=True)
        self.linear_class = nn.Linear(C, cfg.num_classes + 1)       # the last one is "no object"
        self.linear_bbox = nn.Linear(C, 4)
        self.query_pos = nn.Parameter(torch.rand(cfg.num_queries, C))
        self.row_embed = nn.Parameter(torch.rand(50, C // 2))
        self.col_embed = nn.Parameter(torch.rand(50, C // 2))

    def forward(self, images, valid=None, wanted=None):
        """Logits (L, B, Q, K+1) and boxes (L, B, Q, 4); all as of model.DETR, whose `wanted` is for
        masks. Raises UserError for images of more than 50 x 50 tokens."""
        # the image as a grid of tokens
        x, valid = self.backbone(self.normalise(images, valid), valid)
        x = self.conv(x)                                            # (B, C, H, W)
        H, W = x.shape[2:]
        if max(H, W) > 50:
            raise UserError(f"detr_demo has positions for 50 x 50 tokens, the image has {H} x {W}: "
                            f"use smaller images")

        # their positions
        col = self.col_embed[:W].expand(H, W, -1)
        row = self.row_embed[:H, None].expand(H, W, -1)
        pos = torch.cat([col, row], 2).flatten(0, 1)                # (N, C)
        x = pos + 0.1 * x.flatten(2).transpose(1, 2)                # (B, N, C)

        # layer by layer: nn.Transformer's own forward returns the last one's states alone
        encoder, decoder = self.transformer.encoder, self.transformer.decoder
        padding = None if valid is None else ~valid.flatten(1)      # (B, N)
        for layer in encoder.layers:
            x = layer(x, src_key_padding_mask=padding)
        memory, states = encoder.norm(x), []
        y = self.query_pos.expand(len(x), -1, -1)                   # (B, Q, C)
        for layer in decoder.layers:
            y = layer(y, memory, memory_key_padding_mask=padding)
            states.append(decoder.norm(y))

        with torch.autocast(images.device.type, enabled=False):     # bfloat16 boxes are 1/256 wrong
            states = torch.stack(states).float()                    # (L, B, Q, C)
            return self.linear_class(states), self.linear_bbox(states).sigmoid()
