"""Margin-softmax losses as modules, with the class weights inside."""

from torchmargin.losses.adaptive import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from torchmargin.losses.arcface import ArcFaceLoss
from torchmargin.losses.base import CommonOptions, MarginLoss, MarginStatistics, SharedOptions
from torchmargin.losses.combined import CombinedMarginLoss
from torchmargin.losses.cosface import CosFaceLoss
from torchmargin.losses.hard_negatives import CurricularFaceLoss, InterTopKArcFaceLoss, MVSoftmaxLoss
from torchmargin.losses.one_against_all import SphereFace2Loss, UniFaceLoss
from torchmargin.losses.softmax import ModifiedSoftmaxLoss, NormalizedSoftmaxLoss, SoftmaxLoss
from torchmargin.losses.sphereface import AnnealedMarginLoss, LargeMarginSoftmaxLoss, SphereFaceLoss
from torchmargin.losses.sub_centers import SubCenterArcFaceLoss

__all__ = [
    "AdaFaceLoss",
    "AnnealedMarginLoss",
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CommonOptions",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "ElasticFaceLoss",
    "InterTopKArcFaceLoss",
    "LargeMarginSoftmaxLoss",
    "MVSoftmaxLoss",
    "MagFaceLoss",
    "MarginLoss",
    "MarginStatistics",
    "ModifiedSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SharedOptions",
    "SoftmaxLoss",
    "SphereFace2Loss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "UniFaceLoss",
]
