"""Margin-softmax losses as modules, with the class weights inside."""

from torchmargin.losses.arcface import ArcFaceLoss
from torchmargin.losses.base import MarginLoss
from torchmargin.losses.softmax import NormalizedSoftmaxLoss

__all__ = ["ArcFaceLoss", "MarginLoss", "NormalizedSoftmaxLoss"]
