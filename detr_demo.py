"""The detector of the DETR paper's listing: the whole of it in one class, on torch's transformer.

    model = build_model("detr_demo")
    logits, boxes = model(images, valid)                # as of model.DETR
    load_weights(model, "detr_demo-da2a99e9.pth")       # the published file; some 40 AP on COCO
    python train.py --model detr_demo_tiny              # built-in shapes

What makes it short: positions are learned, one vector for each row and each column, and added once,
to the encoder's input, not in every attention; the queries are the decoder's input, and not added
in every layer; one linear layer gives the box. The names in the state dict are the published ones.

Two things go beyond the listing, which takes one image and predicts after the last layer: images of
unequal size are padded, and no attention reads the padding; and every decoder layer predicts, as in
model.DETR, so that all of them can be trained (--no-aux_loss: the last one alone).

Source: arXiv:2005.12872, Appendix, Listing 1; the factor 0.1 is of the notebook detr_demo.ipynb,
which the published weights belong to. They were trained with one image per process, 700 epochs
(facebookresearch/detr, issue 63).
"""

from dataclasses import fields

import torch
import torch.nn as nn

from coco_eval import UserError
from resnet import Normalise


# options of model.ModelConfig that mean nothing here, and --dilation, which needs over 50 rows
UNUSED_OPTIONS = ("mixer encoder_mixer decoder_mixer mixer_scale pool_size grid_rows grid_cols "
                  "tokens_mlp_dim dilation position_embedding positions position_temperature "
                  "pre_norm masks").split()


class DETRDemo(nn.Module):
    """cfg: a ModelConfig; backbone: the network that computes the tokens, of model.BACKBONES."""

    def __init__(self, cfg, backbone):
        super().__init__()
        for field in fields(cfg):
            value = getattr(cfg, field.name)
            if field.name in UNUSED_OPTIONS and value != field.default:
                raise UserError(f"--{field.name} {value} is no option of detr_demo, see "
                                f"detr_demo.py: leave it out, or use another model")
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
