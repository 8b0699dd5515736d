"""The multiplicative angular margin, and its annealing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss
from torchmargin.losses.numbers import Alias, Number, check_not_negative
from torchmargin.options import Extension, MarginGradient

__all__ = ["AnnealedMarginLoss", "LargeMarginSoftmaxLoss", "SphereFaceLoss"]


class AnnealedMarginLoss(MarginLoss):
    """A margin that grows during training, as the code of L-Softmax and SphereFace has it.

    target logit = |x| |w| (lambda cos(theta) + psi(margin theta)) / (1 + lambda), with
    lambda = max(lambda_min, lambda_base / (1 + lambda_gamma step)). ``step`` is a 0-dim buffer that
    each training forward advances first; outside training lambda stays where it is. Both lambdas 0:
    the whole margin from the start. psi(phi) = (-1)^k cos(phi) - 2k falls on all of [0, pi].
    """

    if TYPE_CHECKING:
        step: Tensor

    margin = Number()
    m1 = Alias("margin")
    lambda_base = Number(check_not_negative)
    lambda_gamma = Number(check_not_negative)
    lambda_min = Number(check_not_negative)
    _unsaved = MarginLoss._unsaved | {"m2", "m3"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float,
        margin: float,
        lambda_base: float,
        lambda_gamma: float,
        lambda_min: float,
        extension: Extension,
        margin_gradient: MarginGradient,
        normalize_input: bool,
        normalize_weight: bool,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m1=margin,
            extension=extension,
            margin_gradient=margin_gradient,
            normalize_input=normalize_input,
            normalize_weight=normalize_weight,
            **common,
        )
        self.lambda_base = lambda_base
        self.lambda_gamma = lambda_gamma
        self.lambda_min = lambda_min
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def reset_state(self) -> None:
        if "step" in self._buffers:
            self.step.zero_()

    def advance(self, embeddings: Tensor, labels: Tensor) -> None:
        self.step.add_(1)

    def annealing_lambda(self) -> Tensor:
        """The present lambda, a 0-dim float64 tensor."""
        base, gamma, least = (self.number(name) for name in ("lambda_base", "lambda_gamma", "lambda_min"))
        return torch.maximum(base / (1 + gamma * self.step.double()), least)

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # A tensor, not the float margin_weight: a float that changes recompiles torch.compile at every step.
        return {"sample_margin_weight": (1 / (1 + self.annealing_lambda())).to(self.acc_dtype)}

    def describe_margin(self) -> str:
        annealing = (
            f", lambda=max({self.lambda_min:g}, {self.lambda_base:g} / (1 + {self.lambda_gamma:g} step))"
            if self.lambda_base or self.lambda_min
            else ""
        )
        return super().describe_margin() + annealing


class SphereFaceLoss(AnnealedMarginLoss):
    """A-Softmax: Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063).

    target logit = |x| psi(margin theta), other logits = |x| cos(theta_j), for embeddings
    [B, in_features] and labels [B]; the weights are of unit length. ``margin`` multiplies the
    angle: 1 is modified softmax, the paper uses 4, any positive number is allowed. The margin is
    annealed, see :class:`AnnealedMarginLoss`; ``lambda_base=0, lambda_min=0`` turns that off.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        margin: float = 4.0,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_min: float = 5.0,
        extension: Extension = "monotonic",
        margin_gradient: MarginGradient = "exact",
        normalize_input: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            margin=margin,
            lambda_base=lambda_base,
            lambda_gamma=lambda_gamma,
            lambda_min=lambda_min,
            extension=extension,
            margin_gradient=margin_gradient,
            normalize_input=normalize_input,
            normalize_weight=True,
            **common,
        )

    @classmethod
    def normalized(
        cls,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 30.0,
        margin: float = 1.5,
        margin_gradient: MarginGradient = "straight_through",
        **common: Unpack[CommonOptions],
    ) -> SphereFaceLoss:
        """SphereFace-R: Liu et al., "SphereFace Revived", TPAMI 2022 (arXiv:2109.05565).

        Unit embeddings times ``scale``, a smaller margin, no annealing, and the gradient of
        cos(theta) for the target ("characteristic gradient detachment").
        """
        return cls(
            in_features,
            num_classes,
            scale=scale,
            margin=margin,
            lambda_base=0.0,
            lambda_gamma=0.0,
            lambda_min=0.0,
            margin_gradient=margin_gradient,
            normalize_input=True,
            **common,
        )


class LargeMarginSoftmaxLoss(AnnealedMarginLoss):
    """L-Softmax: Liu et al., ICML 2016 (arXiv:1612.02295).

    target logit = |x| |w| psi(margin theta), other logits = x.w_j: nothing is normalised. Not
    annealed unless asked: the paper starts with a large lambda where training does not converge
    otherwise; its code has ``lambda_base=1000, lambda_gamma=0.12, lambda_min=5``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        margin: float = 4.0,
        lambda_base: float = 0.0,
        lambda_gamma: float = 0.12,
        lambda_min: float = 0.0,
        extension: Extension = "monotonic",
        margin_gradient: MarginGradient = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            margin=margin,
            lambda_base=lambda_base,
            lambda_gamma=lambda_gamma,
            lambda_min=lambda_min,
            extension=extension,
            margin_gradient=margin_gradient,
            normalize_input=False,
            normalize_weight=False,
            **common,
        )
