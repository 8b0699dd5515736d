"""What all margin losses have in common: the class weights and the call of the fused op."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from torchmargin import _extension  # noqa: F401  (registers the ops)

__all__ = ["CommonOptions", "MarginLoss", "MarginStatistics", "check_radians"]


class CommonOptions(TypedDict, total=False):
    """Keyword arguments that every loss takes, with torch.nn.CrossEntropyLoss's meaning and defaults."""

    label_smoothing: float  # in [0, 1], default 0
    ignore_index: int  # rows with this label count for nothing, default -100
    reduction: str  # "mean" (default), "sum" or "none"
    device: torch.device | str | None  # of the weights
    dtype: torch.dtype | None  # of the weights


class MarginStatistics(NamedTuple):
    """How training goes: means over the batch's rows, detached 0-dim tensors; ignored rows are left out."""

    target_angle: Tensor  # radians, between an embedding and its class
    accuracy: Tensor  # share of rows whose class has the largest logit, all without a margin
    hardest_negative_logit: Tensor  # the largest logit of another class


def check_radians(name: str, angle: float) -> float:
    """The angle itself, refused if it can only be meant in degrees."""
    if not abs(angle) <= math.pi:
        raise ValueError(f"expected {name} in radians, not degrees: at most pi in size, but got {angle}")
    return angle


class MarginLoss(nn.Module):
    """A classification head and its loss in one module: weights [C, D], never the logits [B, C].

    The base of the published losses, and all that a new one needs: give it the margin, or override
    :meth:`sample_margins` for a margin that differs from row to row.

    ``loss(embeddings, labels)`` takes embeddings [B, D] and labels [B] int64 and returns the loss, a
    scalar (or [B] with reduction "none") in float64 for float64 weights and float32 otherwise. With
    ``return_statistics=True`` it returns (loss, :class:`MarginStatistics`) from the same sweep over
    the classes. Bad parameters and inputs raise RuntimeError or ValueError; a label outside [0, C)
    that is not ``ignore_index`` raises IndexError.

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
        scale: float = 1.0,
        m1: float = 1.0,
        m2: float = 0.0,
        m3: float = 0.0,
        extension: str = "none",
        margin_gradient: str = "exact",
        normalize_input: bool = True,
        normalize_weight: bool = True,
        bias: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"expected in_features and num_classes to be positive, but got {in_features} and {num_classes}"
            )
        factory = {"device": common.pop("device", None), "dtype": common.pop("dtype", None)}
        self.in_features = in_features
        self.num_classes = num_classes
        self.scale = scale
        self.m1 = m1
        self.m2 = check_radians("the angular margin", m2)
        self.m3 = m3
        self.extension = extension
        self.margin_gradient = margin_gradient
        self.normalize_input = normalize_input
        self.normalize_weight = normalize_weight
        self.label_smoothing = common.pop("label_smoothing", 0.0)
        self.ignore_index = common.pop("ignore_index", -100)
        self.reduction = common.pop("reduction", "mean")
        if common:
            raise TypeError(f"{type(self).__name__}: unexpected keyword argument {next(iter(common))!r}")
        self._check_parameters()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_classes, **factory)) if bias else None)
        self.reset_parameters()

    def _check_parameters(self) -> None:
        """The op's own checks on an empty batch, so that a bad parameter raises here and not in training."""
        nothing = torch.empty(0, 1, device="meta")
        labels = torch.empty(0, dtype=torch.int64, device="meta")
        torch.ops.torchmargin.linear_margin_cross_entropy(
            nothing, nothing.new_empty(1, 1), labels, **self._margin(), **self._reduction()
        )

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, as ArcFace's and SphereFace's code has them; the bias 0."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of losses and of margins of rows: float64 for float64 weights, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of sample_m2, sample_m3 [B] and sample_margin_weight (0-dim or [B]) those that this loss sets."""
        return {}

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, MarginStatistics]:
        ops = torch.ops.torchmargin
        op = ops._linear_margin_cross_entropy_statistics if return_statistics else ops.linear_margin_cross_entropy
        result = op(
            embeddings,
            self.weight,
            labels,
            self.bias,
            **self._margin(),
            **self._reduction(),
            **self.sample_margins(embeddings, labels),
        )
        if return_statistics:
            loss, *statistics = result
            return loss, MarginStatistics(*statistics)
        return result

    def logits(self, embeddings: Tensor) -> Tensor:
        """The logits [B, C] without a margin, for inference: their argmax is the predicted class."""
        return torch.ops.torchmargin.margin_logits(
            embeddings,
            self.weight,
            None,
            self.bias,
            scale=self.scale,
            normalize_input=self.normalize_input,
            normalize_weight=self.normalize_weight,
        )

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, num_classes={self.num_classes}", self.describe_margin()]
        parts += [f"label_smoothing={self.label_smoothing:g}"] if self.label_smoothing else []
        parts += [f"ignore_index={self.ignore_index}"] if self.ignore_index != -100 else []
        parts += [f"reduction={self.reduction!r}"] if self.reduction != "mean" else []
        parts += ["bias=True"] if self.bias is not None else []
        return ", ".join(parts)

    def describe_margin(self) -> str:
        """Scale and margin in a few words."""
        parts = [f"scale={self.scale:g}"]
        plain = {"m1": 1, "m2": 0, "m3": 0}
        parts += [f"{name}={getattr(self, name):g}" for name in plain if getattr(self, name) != plain[name]]
        parts += [f"extension={self.extension!r}"] if self.extension != "none" else []
        parts += [f"margin_gradient={self.margin_gradient!r}"] if self.margin_gradient != "exact" else []
        return ", ".join(parts)

    def _margin(self) -> dict:
        return {
            "scale": self.scale,
            "m1": self.m1,
            "m2": self.m2,
            "m3": self.m3,
            "extension": self.extension,
            "margin_gradient": self.margin_gradient,
            "normalize_input": self.normalize_input,
            "normalize_weight": self.normalize_weight,
        }

    def _reduction(self) -> dict:
        return {
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
