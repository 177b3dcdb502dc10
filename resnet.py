"""ResNet, with frozen batch norm or with batch norm over all processes.

Paper: arXiv:1512.03385.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from images import PIXEL_MEAN, PIXEL_STD


class Normalise(nn.Module):
    """Images uint8 or float 0..255 (B, 3, IH, IW), RGB, in units of ImageNet's mean and deviation.

    What is not valid (B, IH, IW) becomes 0, the mean colour. Raises ValueError for another shape.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, images, valid):
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} given, expected "
                             f"(B, 3, IH, IW)")
        # in place: on a CPU a new map costs more than the arithmetic
        x = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        x.sub_(self.mean).div_(self.std)
        return x if valid is None else x.mul_(valid[:, None])


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine, all four of them buffers."""

    def __init__(self, C):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0),
                            ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((C,), value))

    def scale_and_shift(self):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()     # (C,)
        return scale, self.bias - self.running_mean * scale

    def forward(self, x):                                           # (B, C, H, W)
        scale, shift = self.scale_and_shift()
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is that of its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.forward(ctx, grad)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of all processes' images together.

    (torch's own SyncBatchNorm is for GPUs alone.) Every process counts alike.
    """

    def forward(self, x):                                           # (B, C, H, W)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x32, world = x.float(), dist.get_world_size()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])
        mean, square = SumOverProcesses.apply(moments) / world      # (C,) each
        var, n = (square - mean.square()).clamp(min=0), x.numel() // len(mean) * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


NORMS = {"frozen": FrozenBatchNorm2d, "batch": BatchNorm2d}


def conv_norm(x, conv, norm):
    """norm(conv(x)) of a convolution without bias or groups.

    A frozen norm becomes part of weight and bias, so that no pass over the map is left for it,
    forward or backward. In training on a CPU it stays a pass where the map has fewer pixels than a
    kernel has weights, as it costs less there. No forward hook of the convolution or of a norm that
    became part of it runs.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    weight, bias, cpu = conv.weight, None, x.device.type == "cpu"
    pixels = x[:, 0].numel() // conv.stride[0]**2
    folded = not (cpu and conv.training and weight[0].numel() > pixels)
    if folded:
        scale, bias = norm.scale_and_shift()
        weight = weight * scale[:, None, None, None]
    # dilation is nothing to a 1 x 1 kernel, but with it torch takes oneDNN on one thread, too
    dilation = 2 if cpu and conv.kernel_size == (1, 1) else conv.dilation
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, dilation)
    return y if folded else norm(y)


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
        y = F.relu_(conv_norm(x, self.conv1, self.bn1))
        y = conv_norm(y, self.conv2, self.bn2)
        return F.relu_(y.add_(self.downsample(x)))


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
        y = F.relu_(conv_norm(x, self.conv1, self.bn1))
        y = F.relu_(conv_norm(y, self.conv2, self.bn2))
        y = conv_norm(y, self.conv3, self.bn3)
        return F.relu_(y.add_(self.downsample(x)))


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

    def forward(self, x, valid=None):
        """Normalised images (B, 3, IH, IW) and valid (B, IH, IW) or None to those of the map."""
        x = F.max_pool2d(F.relu_(conv_norm(x, self.conv1, self.bn1)), 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)                              # (B, num_channels, H, W)
        if valid is not None:
            valid = F.interpolate(valid[:, None].float(), size=x.shape[2:])[:, 0] > 0  # nearest
        return x, valid
