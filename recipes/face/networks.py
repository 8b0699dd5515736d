"""The embedding networks of the experiment: IResNet (He et al.'s "Identity Mappings" as ArcFace trains it).

From images [B, 3, 112, 112], normalised to [-1, 1], to embeddings [B, 512]. The first convolution keeps the resolution;
a block is BN, conv, BN, PReLU, conv (with the stride), BN, beside a shortcut; at the end BN, dropout, a linear layer in
float32 and BN without a scale. Parameters have InsightFace's names, so that its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipes.face.errors import RecipeError

# Blocks of the four stages.
DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
_REDUCTION = 16  # of height and width, by the four stages


class NetworkError(RecipeError):
    """A network that there is not, or with other options than it has."""


class Block(nn.Module):
    """[B, C_in, H, W] to [B, C_out, H / stride, W / stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return y.add(shortcut)


@contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by their batch and take it into no mean: they did when they first saw it."""
    norms = [each for each in block.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    before = [(each.momentum, each.num_batches_tracked) for each in norms]
    for each in norms:  # NB: not track_running_stats: as many tensors have to be saved as in the first run
        each.momentum, each.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for each, (momentum, count) in zip(norms, before):
            each.momentum, each.num_batches_tracked = momentum, count


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """The block, run again in the backward pass; its statistics are those of one run."""
    contexts = lambda: (nullcontext(), _statistics_stay(block))
    result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return result


class IResNet(nn.Module):
    """
    Args:
        blocks: of the four stages.
        features: the embedding's size.
        size: height and width of the images, a multiple of 16.
        width: channels of the first stage (each next has twice as many); 64 but for small experiments.
        dropout: before the linear layer.
        checkpointing: blocks are run again in the backward pass instead of keeping what they made.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        features: int = 512,
        size: int = 112,
        width: int = 64,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if size < _REDUCTION or size % _REDUCTION:
            raise NetworkError(f"expected size to be a multiple of {_REDUCTION}, but got {size}")
        if len(blocks) != 4 or min(blocks) < 1 or width < 1 or features < 1:
            raise NetworkError(
                f"expected four stages of blocks, but got {blocks} of width {width} to {features} features"
            )
        self.size = size
        self.checkpointing = checkpointing
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        channels = width
        for stage, count in enumerate(blocks):
            out = width << stage
            of_stage = [Block(channels if place == 0 else out, out, 2 if place == 0 else 1) for place in range(count)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*of_stage))
            channels = out
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels * (size // _REDUCTION) ** 2, features)
        self.features = nn.BatchNorm1d(features)
        self.features.weight.requires_grad_(False)  # stays 1: the head normalises
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, size, size] to [B, features], float32 under autocast."""
        if x.dim() != 4 or x.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"expected images [B, 3, {self.size}, {self.size}], but got {list(x.shape)}")
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            for block in self.get_submodule(f"layer{stage}").children():
                again = self.checkpointing and self.training and torch.is_grad_enabled()
                x = _checkpointed(block, x) if again else block(x)
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = self.features(self.fc(x.to(self.fc.weight.dtype)))
        return found


def iresnet(
    name: str,
    features: int = 512,
    size: int = 112,
    width: int = 64,
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> IResNet:
    """By name: iresnet18, iresnet34, iresnet50, iresnet100 or iresnet200."""
    if name not in DEPTHS:
        raise NetworkError(f"expected one of {', '.join(DEPTHS)}, but got {name!r}")
    return IResNet(DEPTHS[name], features, size, width, dropout, checkpointing)


class WithNorm(nn.Module):
    """Another network to embeddings: what it makes, in float32, through a batch norm without a scale."""

    def __init__(self, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.features = nn.BatchNorm1d(features)
        self.features.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, features]."""
        found = self.trunk(x)
        with torch.autocast(x.device.type, enabled=False):
            embeddings: Tensor = self.features(found.to(self.features.weight.dtype))
        return embeddings


def make_network(
    name: str,
    features: int = 512,
    size: int = 112,
    width: int = 64,
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> nn.Module:
    """By name: one of IResNet's, ``resnet50`` (torchvision's), or ``timm:NAME`` where timm is installed.

    The last two take no width; they begin from random weights, with a linear layer to the features and a batch norm.
    """
    if name in DEPTHS:
        return iresnet(name, features, size, width, dropout, checkpointing)
    if name != "resnet50" and not name.startswith("timm:"):
        raise NetworkError(f"expected one of {', '.join(DEPTHS)}, resnet50 or timm:NAME, but got {name!r}")
    plain = {"width": (width, 64), "dropout": (dropout, 0.0), "checkpointing": (checkpointing, False)}
    for option, (value, default) in plain.items():
        if value != default:
            raise NetworkError(f"{name} takes no {option}, but got {value}")
    if name == "resnet50":
        from torchvision.models import resnet50

        return WithNorm(resnet50(num_classes=features), features)
    try:
        import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise NetworkError(f"{name} needs timm: pip install timm") from None
    try:
        trunk = timm.create_model(name.removeprefix("timm:"), pretrained=False, num_classes=features)
    except (RuntimeError, ValueError, TypeError) as error:
        raise NetworkError(f"{name}: {error}") from None
    return WithNorm(trunk, features)
