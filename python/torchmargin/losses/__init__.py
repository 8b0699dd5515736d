"""Margin-softmax losses as modules, with the class weights inside."""

from torchmargin.losses.adaptive import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from torchmargin.losses.arcface import ArcFaceLoss
from torchmargin.losses.base import CommonOptions, MarginLoss, MarginStatistics
from torchmargin.losses.combined import CombinedMarginLoss
from torchmargin.losses.cosface import CosFaceLoss
from torchmargin.losses.softmax import ModifiedSoftmaxLoss, NormalizedSoftmaxLoss, SoftmaxLoss
from torchmargin.losses.sphereface import AnnealedMarginLoss, LargeMarginSoftmaxLoss, SphereFaceLoss

__all__ = [
    "AdaFaceLoss",
    "AnnealedMarginLoss",
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CommonOptions",
    "CosFaceLoss",
    "ElasticFaceLoss",
    "LargeMarginSoftmaxLoss",
    "MagFaceLoss",
    "MarginLoss",
    "MarginStatistics",
    "ModifiedSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SoftmaxLoss",
    "SphereFaceLoss",
]
