"""ResNet, with frozen batch norm or with batch norm over the images of all processes.

    body = ResNet(ModelConfig(backbone="resnet50"))
    x, valid = body(Normalise()(images, valid), valid)     # (B, 2048, H, W) and bool (B, H, W)

Paper: arXiv:1512.03385.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from images import PIXEL_MEAN, PIXEL_STD


def memory_format(device):
    """How maps and the weights of convolutions lie in memory: channels last, which is fastest; on
    MPS, where batch norm's gradient would be wrong (pytorch issue 175189), channels first."""
    mps = torch.device(device).type == "mps"
    return torch.contiguous_format if mps else torch.channels_last


class Normalise(nn.Module):
    """Images with a mean subtracted, divided by a standard deviation, ImageNet's, in float32.

    images uint8 or float 0..255 (B, 3, IH, IW), RGB; valid bool (B, IH, IW) or None. Padding (valid
    False) becomes 0, which is the mean colour after normalisation. Raises ValueError for images of
    another shape.
    """

    def __init__(self, mean=PIXEL_MEAN, std=PIXEL_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images, valid):
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} given, expected "
                             f"(B, 3, IH, IW)")
        # in place: on a CPU the memory of another map costs more time than the arithmetic
        x = images.to(torch.float32, memory_format=memory_format(images.device), copy=True)
        x.sub_(self.mean).div_(self.std)
        return x if valid is None else x.mul_(valid[:, None])


# -- norms ---------------------------------------------------------------------------------------

class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics, weight and bias are buffers: nothing in it is trained."""

    def __init__(self, C):
        super().__init__()
        self.register_buffer("weight", torch.ones(C))
        self.register_buffer("bias", torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def scale_and_shift(self):
        """The norm as one multiplication and one addition per channel, both (C,)."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x):                                           # (B, C, H, W)
        scale, shift = self.scale_and_shift()
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the backward pass sums the gradient likewise."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.forward(ctx, grad)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that in training has the mean and variance of all processes' images together.

    Every process has the same weight. (torch's own SyncBatchNorm runs on GPUs only.)
    """

    def forward(self, x):                                           # (B, C, H, W)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        world = dist.get_world_size()

        # mean and variance over the processes
        x32 = x.float()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])
        mean, square = SumOverProcesses.apply(moments) / world      # (C,) each
        var = (square - mean.square()).clamp(min=0)

        # running statistics, of which the variance is the unbiased one
        n = x.numel() // len(mean) * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1

        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        y = torch.addcmul(shift[:, None, None], x32, scale[:, None, None])
        return y.to(x.dtype)                                        # rounded once


NORMS = {"frozen": FrozenBatchNorm2d, "batch": SyncedBatchNorm2d}


# -- blocks --------------------------------------------------------------------------------------

def conv_norm(x, conv, norm):
    """norm(conv(x)), for a convolution without bias or groups.

    Folds a frozen norm into the convolution's weight and bias, which saves a pass over the feature
    map. Forward hooks of the convolution and of a folded norm do not run.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)


class ConvNorm(nn.Sequential):
    """A convolution and its norm."""

    def forward(self, x):
        return conv_norm(x, *self)


def shortcut(cin, cout, stride, norm):
    """The identity, or a 1 x 1 convolution where the shape changes."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    return ConvNorm(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them (arXiv:1512.03385, Fig. 5 left)."""
    expansion = 1

    def __init__(self, cin, width, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(cin, width, stride, norm)

    def forward(self, x):
        y = F.relu_(conv_norm(x, self.conv1, self.bn1))
        y = conv_norm(y, self.conv2, self.bn2)
        return F.relu_(y.add_(self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut around them (Fig. 5 right).

    The 3 x 3 convolution has the stride, which is what torchvision's weights expect.
    """
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
        y = F.relu_(conv_norm(x, self.conv1, self.bn1))
        y = F.relu_(conv_norm(y, self.conv2, self.bn2))
        y = conv_norm(y, self.conv3, self.bn3)
        return F.relu_(y.add_(self.downsample(x)))


# -- the whole -----------------------------------------------------------------------------------

# block, blocks per stage, channels of the first stage, file published by torchvision (ImageNet V1)
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, "resnet18-f37072fd.pth"),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64, "resnet34-b627a593.pth"),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, "resnet50-0676ba61.pth"),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64, "resnet101-63fe2227.pth"),
    "resnet_tiny": (BasicBlock, (1, 1), 32, ""),                    # stride 8, for small images
}


class ResNet(nn.Module):
    """The feature map of the last stage, stride 32, or 16 if dilated. No pooling, no classifier.

    With frozen norms the stem and the first stage are frozen too: the official DETR freezes them.
    """

    def __init__(self, cfg):
        super().__init__()
        block, depths, width, _ = RESNETS[cfg.backbone]
        norm = NORMS[cfg.backbone_norm]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)

        # stages: each halves the map, but for the first and for a dilated last one
        cin, self.stride = width, 4
        self.stages = [f"layer{k + 1}" for k in range(len(depths))]
        self.keep_maps, self.map_channels = cfg.masks, []           # of the stages before the last
        for k, depth in enumerate(depths):
            dilated = cfg.dilation and k == len(depths) - 1
            stride = 1 if k == 0 or dilated else 2
            # the first block of a dilated stage still sees the undilated grid
            blocks = [block(cin, width, stride, 1, norm)]
            if k > 0:
                self.map_channels.append(cin)
            cin, self.stride = width * block.expansion, self.stride * stride
            for _ in range(depth - 1):
                blocks.append(block(cin, width, 1, 2 if dilated else 1, norm))
            setattr(self, self.stages[k], nn.Sequential(*blocks))
            width *= 2
        self.num_channels = cin

        for name, p in self.named_parameters():
            if p.dim() == 4:
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")
            if cfg.backbone_norm == "frozen" and name.startswith(("conv1", "layer1")):
                p.requires_grad_(False)

    def forward(self, x, valid=None):
        """Normalised images (B, 3, IH, IW) and valid (B, IH, IW) or None: the map (B, num_channels,
        H, W) and valid at its resolution (B, H, W), or None. With cfg.masks also the maps of the
        stages before, finest first."""
        x = F.relu_(conv_norm(x, self.conv1, self.bn1))
        x = F.max_pool2d(x, 3, 2, 1)
        before = []
        for name in self.stages:
            if self.keep_maps and name != "layer1":
                before.append(x)
            x = getattr(self, name)(x)
        if valid is not None:
            valid = F.interpolate(valid[:, None].float(), size=x.shape[2:])[:, 0] > 0  # nearest
        return x, valid, *before
