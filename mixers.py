"""Token mixers: how the tokens of an image, or the queries of a decoder, exchange information.

    mixer = MIXERS["pool"](MixerConfig(hidden_dim=64))
    y = mixer(x, pos, valid, grid)                # (B, N, C) -> (B, N, C)

Self-attention is one way of mixing among others (MetaFormer, arXiv:2111.11418): the same classes
serve the detector and the classifiers. Every mixer is called as mixer(x, pos, valid, grid):

    x      tokens (B, N, C) of the grid (H, W), N = H*W; the decoder's Q queries are a 1 x Q grid
    pos    positions, which broadcast to x, to be added to x where a mixer uses them, or None
    valid  bool (B, N), True = token of the image, False = padding; None = all are valid
    ->     (B, N, C); no valid token depends on a padded one; results at padded places are ignored

A class whose weights belong to the places of one largest grid says fixed_grid = True. A bias of two
dimensions has a name that begins with "b" (b2): the classifiers start it at 0, without decay.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class MixerConfig:
    """What mixers are built from; each reads the fields that it needs."""
    hidden_dim: int = 256                          # channels C of a token
    nheads: int = 8                                # attention: heads, must divide hidden_dim
    dropout: float = 0.0                           # attention: dropout of the weights
    qkv_bias: bool = True                          # attention: biases of query, key and value
    out_bias: bool = True                          # attention: bias of the output
    pool_size: int = 3                             # pool, avgpool: side of the window, odd
    tokens_mlp_dim: int = 128                      # mlp: hidden units over the tokens
    max_grid: tuple = (42, 42)                     # mlp, fc, random: the largest (H, W) they take


class AttentionMixer(nn.Module):
    """Multi-head attention, in the parameter names of nn.MultiheadAttention (arXiv:1706.03762).

    Positions are added to queries and keys, never to values.
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_dim
        self.nh, self.dropout_rate = cfg.nheads, cfg.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))   # query, key and value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C)) if cfg.qkv_bias else None
        self.out_proj = nn.Linear(C, C, bias=cfg.out_bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if cfg.out_bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, valid, grid):
        x_pos = x if pos is None else x + pos
        return self.attend(x_pos, x_pos, x, valid)

    def attend(self, q, k, v, valid):
        """Cross-attention: queries q (B, M, C) read values v (B, N, C) by keys k (B, N, C)."""
        (B, M, C), N, nh, bias = q.shape, k.shape[1], self.nh, self.in_proj_bias
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        q = F.linear(q, w_q, b_q).view(B, M, nh, C // nh).transpose(1, 2)      # (B, nh, M, hs)
        k = F.linear(k, w_k, b_k).view(B, N, nh, C // nh).transpose(1, 2)      # (B, nh, N, hs)
        v = F.linear(v, w_v, b_v).view(B, N, nh, C // nh).transpose(1, 2)      # (B, nh, N, hs)

        may_attend = None if valid is None else valid[:, None, None, :]        # (B, 1, 1, N)
        p = self.dropout_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, may_attend, p)             # (B, nh, M, hs)
        return self.out_proj(y.transpose(1, 2).reshape(B, M, C))               # (B, M, C)


def to_grid(x, valid, grid):
    """Tokens (B, N, C) as a map (B, C, H, W) with zeros in the padding, and valid as a map of
    ones and zeros (B or 1, 1, H, W)."""
    (B, _, C), (H, W) = x.shape, grid
    x = x.transpose(1, 2).view(B, C, H, W)
    if valid is None:
        return x, x.new_ones(1, 1, H, W)
    v = valid.view(B, 1, H, W).to(x.dtype)
    return x * v, v


class AvgPoolMixer(nn.Module):
    """Mean of the valid tokens in a k x k window."""

    def __init__(self, cfg):
        super().__init__()
        k = cfg.pool_size
        self.window = dict(kernel_size=k, stride=1, padding=k // 2, divisor_override=1)  # a sum

    def forward(self, x, pos, valid, grid):
        g, v = to_grid(x, valid, grid)                              # (B, C, H, W), (B|1, 1, H, W)
        count = F.avg_pool2d(v, **self.window).clamp(min=1)         # valid tokens in each window
        y = F.avg_pool2d(g, **self.window) / count
        return y.flatten(2).transpose(1, 2)                         # (B, N, C)


class PoolMixer(AvgPoolMixer):
    """That mean minus the token, which the residual adds back (arXiv:2111.11418, Sec. 3.2)."""

    def forward(self, x, pos, valid, grid):
        return super().forward(x, pos, valid, grid) - x


class IdentityMixer(nn.Module):
    """The token itself: no mixing at all (arXiv:2111.11418, Table 5)."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, x, pos, valid, grid):
        return x


class NoneMixer(IdentityMixer):
    """Zeros: the residual keeps the token as it is. IdentityMixer makes x + norm(x) of it in a
    pre-norm layer; in a post-norm layer norm(x + x), the same as norm(x) but for dropout.
    """

    def forward(self, x, pos, valid, grid):
        return 0 * x                               # not zeros_like: DDP waits for every gradient


class AffineMixer(nn.Module):
    """A scale and a shift of each channel, minus the token: no mixing (RIFormer, arXiv:2304.05659).
    It starts as the token; fuse() of metaformer.py makes it a part of the norm before it."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_dim
        self.affine = nn.Conv2d(C, C, 1, groups=C)                  # the published name and shape
        nn.init.constant_(self.affine.weight, 2.0)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x, pos, valid, grid):
        return x * self.affine.weight.flatten() + self.affine.bias - x


class ConvMixer(nn.Module):
    """Depthwise 3 x 3 convolution (arXiv:2111.11418, Table 5)."""

    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv2d(cfg.hidden_dim, cfg.hidden_dim, 3, padding=1, groups=cfg.hidden_dim)

    def forward(self, x, pos, valid, grid):
        g, _ = to_grid(x, valid, grid)                              # (B, C, H, W)
        return self.conv(g).flatten(2).transpose(1, 2)              # (B, N, C)


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learned numbers s and b (arXiv:2210.13452, Sec. 3.3).

    They start at 1 and 0, the values of the official code; the paper derives 0.894 and -0.447.
    """

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * F.relu(x).square() + self.bias


class SepConvMixer(nn.Module):
    """Depthwise 7 x 7 convolution between two linear layers (arXiv:2210.13452, Sec. 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_dim
        self.pwconv1, self.act1 = nn.Linear(C, 2 * C, bias=False), StarReLU()
        self.dwconv = nn.Conv2d(2 * C, 2 * C, 7, padding=3, groups=2 * C, bias=False)
        self.pwconv2 = nn.Linear(2 * C, C, bias=False)

    def forward(self, x, pos, valid, grid):
        g, _ = to_grid(self.act1(self.pwconv1(x)), valid, grid)     # (B, 2C, H, W)
        return self.pwconv2(self.dwconv(g).flatten(2).transpose(1, 2))      # (B, N, C)


class FixedGridMixer(nn.Module):
    """Base of the mixers whose weights belong to the places of the largest grid; a smaller grid
    uses those of the upper left part. Raises ValueError for a larger one."""
    fixed_grid = True

    def __init__(self, cfg):
        super().__init__()
        self.max_grid = cfg.max_grid

    def check_grid(self, grid):
        rows, cols = self.max_grid
        if grid[0] > rows or grid[1] > cols:
            raise ValueError(f"{type(self).__name__} was built for at most {rows} x {cols} tokens, "
                             f"the image has {grid[0]} x {grid[1]}: raise --grid_rows and "
                             f"--grid_cols, or use smaller images")


class FcMixer(FixedGridMixer):
    """One linear layer over the tokens, the same for all channels (arXiv:2111.11418, Table 5)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        N = cfg.max_grid[0] * cfg.max_grid[1]
        self.weight = nn.Parameter(torch.randn(*cfg.max_grid, *cfg.max_grid) * N ** -0.5)

    def forward(self, x, pos, valid, grid):
        self.check_grid(grid)
        N, (H, W) = x.shape[1], grid
        weight = self.weight[:H, :W, :H, :W].reshape(N, N)          # (to, from)
        return weight @ (x if valid is None else x * valid[..., None])


class MlpMixer(FixedGridMixer):
    """The token-mixing MLP of MLP-Mixer (arXiv:2105.01601, Eq. 1): N -> tokens_mlp_dim -> N."""

    def __init__(self, cfg):
        super().__init__(cfg)
        (rows, cols), hidden = cfg.max_grid, cfg.tokens_mlp_dim
        self.w1 = nn.Parameter(torch.randn(hidden, rows, cols) * (rows * cols) ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(hidden, rows, cols) * hidden ** -0.5)
        self.b2 = nn.Parameter(torch.zeros(rows, cols))

    def forward(self, x, pos, valid, grid):
        self.check_grid(grid)
        H, W = grid
        w1, w2, b2 = (w[..., :H, :W].flatten(-2) for w in (self.w1, self.w2, self.b2))
        if valid is not None:
            x = x * valid[..., None]
        y = F.gelu(F.linear(x.transpose(1, 2), w1, self.b1))        # (B, C, tokens_mlp_dim)
        return F.linear(y, w2.t(), b2).transpose(1, 2)              # (B, N, C)


class RandomMixer(FixedGridMixer):
    """A fixed random mean over the tokens (arXiv:2111.11418, Table 5): uniform numbers, softmax
    by row, each row normalised over the valid tokens. The matrix has (rows * cols)^2 numbers."""

    def __init__(self, cfg):
        super().__init__(cfg)
        N = cfg.max_grid[0] * cfg.max_grid[1]
        weight = torch.rand(N, N).softmax(1).view(*cfg.max_grid, *cfg.max_grid)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, pos, valid, grid):
        self.check_grid(grid)
        N, (H, W) = x.shape[1], grid
        weight = self.weight[:H, :W, :H, :W].reshape(N, N)          # (to, from)
        if valid is None:
            return (weight / weight.sum(1, keepdim=True)) @ x       # (B, N, C)
        total = valid.to(weight.dtype) @ weight.t()                 # (B, N) weight of valid tokens
        return weight @ (x * valid[..., None]) / total[..., None].clamp(min=1e-12)


MIXERS = {"attention": AttentionMixer, "pool": PoolMixer, "avgpool": AvgPoolMixer,
          "identity": IdentityMixer, "none": NoneMixer, "affine": AffineMixer, "mlp": MlpMixer,
          "fc": FcMixer, "random": RandomMixer, "conv": ConvMixer, "sepconv": SepConvMixer}
