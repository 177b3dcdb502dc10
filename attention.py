"""What a network looks at: attention weights, effective fields and Grad-CAM, drawn over the image.

    weights = cross_attention(model, pixels, queries=[3, 7])        # (2, nh, H, W), each sums to 1
    weights = self_attention(model, pixels, points=[(0.5, 0.5)])    # (1, nh, H, W)
    field = effective_field(model, pixels, points=[(0.5, 0.5)])     # (1, IH, IW)
    cam = grad_cam(classifier, pixels, label=207)                   # (H, W)
    cam_sheet(classifier, pixels, image, 207, "cat").save("cam.jpg")

model is a DETR, classifier a MetaFormer, both in eval mode; pixels is one image without padding
(1, 3, IH, IW), uint8 or float 0..255. A point (x, y) in [0, 1] of the image stands for the nearest
token: a detector's token (row, column) is centred on pixel (row, column) * stride, as its padded
convolutions are.
"""

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


# -- attention weights ---------------------------------------------------------------------------

def attention_weights(mixer, q, k, valid=None):
    """The weights of an AttentionMixer's heads: (B, nh, M, N), rows with sum 1, 0 at padded keys.

    q (B, M, C), k (B, N, C) and valid (B, N) or None are those of its method attend. Equals the
    weights of nn.MultiheadAttention without dropout. Source: arXiv:1706.03762, Eq. 1.
    """
    (B, M, C), N, nh = q.shape, k.shape[1], mixer.nh
    weight, bias = mixer.in_proj_weight[:2 * C], mixer.in_proj_bias
    b_q, b_k = (None, None) if bias is None else bias[:2 * C].chunk(2)
    q = F.linear(q, weight[:C], b_q).view(B, M, nh, C // nh).transpose(1, 2)     # (B, nh, M, hs)
    k = F.linear(k, weight[C:], b_k).view(B, N, nh, C // nh).transpose(1, 2)     # (B, nh, N, hs)
    scores = q @ k.transpose(2, 3) * (C // nh) ** -0.5                           # (B, nh, M, N)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -torch.inf)
    return scores.softmax(3)


@contextmanager
def attend_inputs(mixer):
    """The list of (q, k, valid) to which, inside `with`, each call of mixer.attend adds its own."""
    calls, attend = [], mixer.attend

    def recording_attend(q, k, v, valid):
        calls.append((q, k, valid))
        return attend(q, k, v, valid)

    mixer.attend = recording_attend                # of this object; its class keeps attend
    try:
        yield calls
    finally:
        del mixer.attend


@contextmanager
def forward_calls(module):
    """The list of (inputs, output) to which, inside `with`, each call of a module adds its own."""
    calls = []
    with module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output))):
        yield calls


def no_masks(logits, boxes):
    """For a model with masks: that none of them is computed."""
    return torch.zeros(2, 0, dtype=torch.int64)


def run_and_record(model, pixels, mixer):
    """The (q, k, valid) with which the model calls an AttentionMixer, and its token grid (H, W)."""
    encoder = model.transformer.encoder
    with attend_inputs(mixer) as attend_calls, forward_calls(encoder) as encoder_calls:
        model(pixels, None, no_masks)
    (*_, grid), _ = encoder_calls[0]
    return attend_calls[0], grid


@torch.no_grad()
def cross_attention(model, pixels, queries, layer=-1):
    """Where queries read the image: weights (len(queries), nh, H, W) of a decoder layer, each map
    with sum 1."""
    mixer = model.transformer.decoder.layers[layer].multihead_attn
    (q, k, valid), grid = run_and_record(model, pixels, mixer)
    weights = attention_weights(mixer, q[:, queries], k, valid)[0]               # (nh, R, N)
    return weights.transpose(0, 1).unflatten(2, grid)


@torch.no_grad()
def self_attention(model, pixels, points, layer=-1):
    """What the tokens at points read from the others: weights (len(points), nh, H, W) of an encoder
    layer whose mixer is attention, each map with sum 1."""
    mixer = model.transformer.encoder.layers[layer].self_attn
    (q, k, valid), grid = run_and_record(model, pixels, mixer)
    tokens = tokens_at(points, model, pixels, grid)
    weights = attention_weights(mixer, q[:, tokens], k, valid)[0]
    return weights.transpose(0, 1).unflatten(2, grid)


def tokens_at(points, model, pixels, grid):
    """Numbers of the tokens whose centres are nearest to points (x, y) in [0, 1] of the image."""
    (IH, IW), (H, W), stride = pixels.shape[2:], grid, model.backbone[0].body.stride
    return [min(round(y * IH / stride), H - 1) * W + min(round(x * IW / stride), W - 1)
            for x, y in points]


# -- gradients -----------------------------------------------------------------------------------

def effective_field(model, pixels, points, probes=4):
    """How much each pixel moves the encoder's output at points: (len(points), IH, IW), >= 0.

    The root of the summed squares of the derivatives of a token's C channels by a pixel's three
    colours. Estimated by `probes` backward passes, each of a sum of channels with random signs:
    the squares of its derivatives have that sum as their mean. A pass costs as much as the forward
    pass. After the effective receptive fields of arXiv:1701.04128, Sec. 2.
    """
    images = pixels.detach().float().requires_grad_()
    with torch.enable_grad(), forward_calls(model.transformer.encoder) as calls:
        model(images, None, no_masks)
    (*_, grid), memory = calls[0]

    generator, fields = torch.Generator().manual_seed(0), []
    for n in tokens_at(points, model, pixels, grid):
        token, squares = memory[0, n], 0                                         # (C,)
        for _ in range(probes):
            signs = torch.randint(2, token.shape, generator=generator) * 2 - 1
            grad, = torch.autograd.grad(token, images, signs.to(token), retain_graph=True)
            squares = squares + grad[0].square().sum(0)                          # (IH, IW)
        fields.append((squares / probes).sqrt())
    return torch.stack(fields)


def grad_cam(model, pixels, label):
    """Where a classifier sees a class: its Grad-CAM on the last stage's map, (H, W), >= 0.

    The map's channels are weighted by the mean over the tokens of the class logit's derivative,
    summed, and cut off at 0. Where the head reads a class token alone, the map is the last block's
    input, as the logit does not depend on the other tokens of its output.
    Source: arXiv:1610.02391, Eq. 1 and 2.
    """
    with torch.enable_grad(), forward_calls(model.stages[-1][-1]) as calls:
        logits = model(pixels)
    (x, _, (H, W)), output = calls[0]
    if model.cls_token is None:
        x = output                                                               # (1, N, C)
    grad, = torch.autograd.grad(logits[0, label], x)
    x, grad = x[0, -H * W:].detach(), grad[0, -H * W:]              # without the class token
    return F.relu(x @ grad.mean(0)).view(H, W)


# -- pictures ------------------------------------------------------------------------------------

def spread(weights, size, stride, first=0.0):
    """Weights (H, W) of tokens as those of pixels (IH, IW) = size, linear between the tokens.

    Token (row, column) has its centre at pixel first + stride * (row, column).
    """
    hats = []                                      # of both sides: share of a token in a pixel
    for tokens, side in zip(weights.shape, size):
        place = ((torch.arange(side) - first) / stride).clamp(0, tokens - 1)
        hats.append((1 - (place[:, None] - torch.arange(tokens)).abs()).clamp(min=0))
    return hats[0] @ weights.cpu() @ hats[1].t()


SIDE = 320                                         # of a tile's image, its longer one, in pixels
COLORS = np.float32([(0, 0, 0), (90, 0, 140), (220, 40, 60), (255, 160, 0), (255, 255, 160)])


def heat_map(image, weights):
    """The PIL image coloured by weights (h, w) >= 0, a tensor that is stretched over it: grey and
    dark where the weight is 0, brightest where it is largest."""
    photo = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    weights = weights.cpu().numpy()
    weights = Image.fromarray(np.float32(weights / max(weights.max(), 1e-30)))
    weights = np.asarray(weights.resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)
    steps = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(weights, steps, COLORS[:, c]) for c in range(3)], 2)
    pixels = colors * (0.6 + 0.4 * photo) + 130 * photo * (1 - weights[..., None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_tile(image, weights, caption, box=None, point=None):
    """The PIL image, its longer side SIDE pixels, under a caption; as a heat_map, if weights are
    not None. box: xyxy to outline, point: (x, y) to mark, in pixels of the image."""
    scale = SIDE / max(image.size)
    w, h = (max(1, round(v * scale)) for v in image.size)
    image = image.resize((w, h))
    tile = Image.new("RGB", (w, h + 20), "white")
    tile.paste(image if weights is None else heat_map(image, weights), (0, 20))
    draw = ImageDraw.Draw(tile)
    if box is not None:
        x1, y1, x2, y2 = (float(v) * scale for v in box)
        corners = [x1, y1 + 20, max(x1, x2 - 1), max(y1, y2 - 1) + 20]
        draw.rectangle(corners, outline="white", width=2)
    if point is not None:
        x, y = point[0] * scale, point[1] * scale + 20
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], "lime", "black")
    draw.rectangle([0, 0, w, 19], "white")         # over a box that begins above the image
    draw.text((1, 2), caption, "black", ImageFont.load_default(14))
    return tile


def draw_sheet(rows):
    """Rows of tiles of one size, lists, on one PIL image."""
    w, h = rows[0][0].size
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (w + 4), len(rows) * (h + 4)), "white")
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            sheet.paste(tile, (c * (w + 4) + 2, r * (h + 4) + 2))
    return sheet


def attention_sheet(model, pixels, image, found, points=None, heads=False, field=False):
    """What a detector looks at in a PIL image, whose `pixels` it gets: tiles on one picture.

    found: a Detector's dict, of which the first 16 are drawn; points: (x, y) in pixels of the
    image, None: the centres of the boxes. For each detection, the cross-attention of its query; for
    each point, the self-attention of the encoder's token there, or, where the mixer is another one
    or `field` is True, its effective field. heads: the mean over the heads, then each head.
    """
    cfg, boxes, stride = model.cfg, found["boxes"][:16], model.backbone[0].body.stride
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes.tolist()]
    places = centres if points is None else points
    shares = [(x / image.width, y / image.height) for x, y in places]
    if (cfg.encoder_mixer or cfg.mixer) == "attention" and cfg.enc_layers and not field:
        kind, step, seen = "self-attention", stride, self_attention(model, pixels, shares)
    else:
        kind, step, seen = "effective field", 1, effective_field(model, pixels, shares)[:, None]
    read = cross_attention(model, pixels, found["queries"][:16])

    def tiles(maps, step, caption, **marks):       # maps (nh, H, W), one for every step pixels
        named = [(caption, maps.mean(0))]
        if heads and len(maps) > 1:
            named += [(f"head {k + 1}", m) for k, m in enumerate(maps)]
        return [draw_tile(image, spread(m, pixels.shape[2:], step), name, **marks)
                for name, m in named]

    rows = [tiles(maps, stride, f"{name} {score:.2f}: cross-attention", box=box)
            for maps, name, score, box in zip(read, found["names"], found["scores"], boxes)]
    others = [tiles(maps, step, f"{kind} at {x:.0f}, {y:.0f}", point=(x, y))
              for maps, (x, y) in zip(seen, places)]
    if points is None:                             # a detection's two beside each other
        rows = [row for pair in zip(rows, others) for row in pair]
    else:
        rows += others
    if not heads:                                  # rows of one tile each become rows of four
        rows = [sum(rows[i:i + 4], []) for i in range(0, len(rows), 4)]
    return draw_sheet(rows)


def cam_sheet(model, pixels, image, label, caption):
    """The PIL image that a classifier gets as `pixels`, and beside it its Grad-CAM of a class."""
    stride, first = 1, 0.0                         # of the last stage's tokens, see spread
    for layer in model.downsample_layers:
        first += stride * ((layer.conv.kernel_size[0] - 1) / 2 - layer.conv.padding[0])
        stride *= layer.conv.stride[0]
    cam = spread(grad_cam(model, pixels, label), pixels.shape[2:], stride, first)
    return draw_sheet([[draw_tile(image, None, "the classifier's input"),
                        draw_tile(image, cam, caption)]])
