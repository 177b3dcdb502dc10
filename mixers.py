"""Token mixers: how the tokens of an image, or the queries of a decoder, exchange information.

    mixer = MIXERS["pool"](cfg, max_grid=(25, 34))
    y = mixer(x, pos, valid, grid)               # (B, N, C) -> (B, N, C)

Papers: MetaFormer, arXiv:2111.11418 and arXiv:2210.13452; MLP-Mixer, arXiv:2105.01601; attention,
arXiv:1706.03762.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


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
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C)) if cfg.qkv_bias else None
        self.out_proj = nn.Linear(C, C, bias=cfg.out_bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if cfg.out_bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, valid, grid):
        x_pos = x if pos is None else x + pos
        return self.attend(x_pos, x_pos, x, valid)

    def attend(self, q, k, v, valid):
        """Queries q (B, M, C) read values v (B, N, C) by keys k (B, N, C) where valid (B, N)."""
        (B, M, C), hs = q.shape, q.shape[2] // self.nh
        weights, biases = self.in_proj_weight.chunk(3), (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b).view(B, -1, self.nh, hs).transpose(1, 2)  # (B, nh, M or N, hs)
                   for x, w, b in zip((q, k, v), weights, biases))
        attended = None if valid is None else valid[:, None, None, :]          # True = attended to
        p = self.dropout if self.training else 0.0
        slow = p and q.device.type == "cpu"           # torch fuses dropout on GPUs alone
        attention = explicit_attention if slow else F.scaled_dot_product_attention
        y = attention(q, k, v, attended, p)                                    # (B, nh, M, hs)
        return self.out_proj(y.transpose(1, 2).reshape(B, M, C))               # (B, M, C)


def explicit_attention(q, k, v, attended, p):
    """What F.scaled_dot_product_attention computes, with the whole matrix of weights. Every query
    must have a key that it may attend to."""
    scores = q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)                     # (B, nh, M, N)
    if attended is not None:
        scores = scores.masked_fill(~attended, -math.inf)
    return dropout(scores.softmax(3), p) @ v


def dropout(x, p):
    """F.dropout. On a CPU, where random numbers are drawn one after the other, four values share
    one of 64 bits, and p is rounded to 1 / 65536."""
    if not p or x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)                 # of 65536 equally likely values
    bits = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,), device="cpu")
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
    keep = torch.ge(bits, dropped - 2**15, out=x.new_empty(x.shape))                 # 0 and 1
    return x * keep.div_(1 - dropped / 2**16)


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
    g = x.transpose(1, 2).view(B, C, H, W)
    if valid is None:
        return g, x.new_ones(1, 1, H, W)
    v = valid.view(B, 1, H, W).to(x.dtype)
    return g * v, v


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


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learned numbers s and b (arXiv:2210.13452, Sec. 3.3).

    They start at 1 and 0 as in the official code, not at the 0.894 and -0.447 derived in the paper.
    """

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * F.relu(x).square() + self.bias


class SepConvMixer(nn.Module):
    """Depthwise 7 x 7 convolution between two linear layers (arXiv:2210.13452, Sec. 3.2)."""

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        C = cfg.hidden_dim
        self.pwconv1, self.act1 = nn.Linear(C, 2 * C, bias=False), StarReLU()
        self.dwconv = nn.Conv2d(2 * C, 2 * C, 7, padding=3, groups=2 * C, bias=False)
        self.pwconv2 = nn.Linear(2 * C, C, bias=False)

    def forward(self, x, pos, valid, grid):
        g, _ = to_grid(self.act1(self.pwconv1(x)), valid, grid)     # (B, 2C, H, W)
        return self.pwconv2(self.dwconv(g).flatten(2).transpose(1, 2))


class FcMixer(nn.Module):
    """One linear layer over tokens, the same for all channels (arXiv:2111.11418, Table 5).

    The weights belong to the places of the largest grid; a smaller one uses the upper left part.
    """

    def __init__(self, cfg, max_grid=None):
        super().__init__()
        rows, cols = self.max_grid = max_grid or (cfg.grid_rows, cfg.grid_cols)
        weight = torch.randn(rows, cols, rows, cols) * (rows * cols) ** -0.5
        self.weight = nn.Parameter(weight)

    def forward(self, x, pos, valid, grid):
        check_grid(grid, self.max_grid, "fc")
        N, (H, W) = x.shape[1], grid
        weight = self.weight[:H, :W, :H, :W].reshape(N, N)          # (to, from)
        return weight @ (x if valid is None else x * valid[..., None])


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
          "mlp": MlpMixer, "fc": FcMixer, "random": RandomMixer, "conv": ConvMixer,
          "sepconv": SepConvMixer}
