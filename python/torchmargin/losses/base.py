"""What all margin losses have in common: the class weights and the call of the fused op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmargin import functional

__all__ = ["MarginLoss"]


def _check_angle(name: str, angle: float) -> float:
    if abs(angle) > math.pi:
        raise ValueError(f"expected {name} in radians, not degrees: at most pi in size, but got {angle}")
    return angle


class MarginLoss(nn.Module):
    """A classification head and its loss in one module: weights [C, D], no logits.

    Not for direct use: a subclass sets the margin of a published loss. ``forward(embeddings,
    labels)`` takes embeddings [B, D] and labels [B] int64 and returns the loss, a scalar (or
    [B] with reduction "none") in float64 for float64 weights and float32 otherwise.

    Args:
        in_features: D, the size of an embedding.
        num_classes: C.
        scale: s, what the cosines are multiplied with.
        m1, m2, m3: the margin cos(m1 theta + m2) - m3; m2 in radians.
        extension: what the margin is past an angle of pi, see torchmargin.functional.
        margin_gradient: "exact" or "straight_through".
        normalize_input, normalize_weight: whether embeddings and weights become unit vectors.
        bias: whether there is a bias [C].
        label_smoothing, ignore_index, reduction: as in torch.nn.CrossEntropyLoss.
        device, dtype: of the weights.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float,
        m1: float = 1.0,
        m2: float = 0.0,
        m3: float = 0.0,
        extension: str = "none",
        margin_gradient: str = "exact",
        normalize_input: bool = True,
        normalize_weight: bool = True,
        bias: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"expected in_features and num_classes to be positive, but got {in_features} and {num_classes}"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.scale = scale
        self.m1 = m1
        self.m2 = _check_angle("the angular margin", m2)
        self.m3 = m3
        self.extension = extension
        self.margin_gradient = margin_gradient
        self.normalize_input = normalize_input
        self.normalize_weight = normalize_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, as ArcFace's and SphereFace's code has them; the bias 0."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.linear_margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.bias,
            scale=self.scale,
            m1=self.m1,
            m2=self.m2,
            m3=self.m3,
            extension=self.extension,
            margin_gradient=self.margin_gradient,
            normalize_input=self.normalize_input,
            normalize_weight=self.normalize_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """The logits [B, C] without a margin, for inference: their argmax is the predicted class."""
        x = nn.functional.normalize(embeddings, dim=1) if self.normalize_input else embeddings
        w = nn.functional.normalize(self.weight, dim=1) if self.normalize_weight else self.weight
        logits = self.scale * nn.functional.linear(x, w)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, num_classes={self.num_classes}, scale={self.scale:g}"]
        parts += [
            f"{name}={getattr(self, name):g}"
            for name, plain in (("m1", 1), ("m2", 0), ("m3", 0))
            if getattr(self, name) != plain
        ]
        parts += [f"extension={self.extension!r}"] if self.extension != "none" else []
        parts += [f"margin_gradient={self.margin_gradient!r}"] if self.margin_gradient != "exact" else []
        parts += [f"label_smoothing={self.label_smoothing:g}"] if self.label_smoothing else []
        return ", ".join(parts)
