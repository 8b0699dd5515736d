"""Fused margin-softmax losses for PyTorch: one op, never a [batch, classes] matrix.

The ops are ``torch.ops.torchmargin.*``, as functions in :mod:`torchmargin.functional` and as
modules here; :mod:`torchmargin.reference` is their readable specification.
"""

from typing import TYPE_CHECKING, Any

from torchmargin import compat, config, exporting, functional, losses, options, reference, utils
from torchmargin._extension import _C
from torchmargin.config import get_workspace_limit, plan, set_workspace_limit, workspace_limit
from torchmargin.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CurricularFaceLoss,
    ElasticFaceLoss,
    InterTopKArcFaceLoss,
    LargeMarginSoftmaxLoss,
    MagFaceLoss,
    MarginLoss,
    MarginStatistics,
    ModifiedSoftmaxLoss,
    MVSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SoftmaxLoss,
    SphereFace2Loss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
    UniFaceLoss,
)

__version__: str = _C.version()

__all__ = [
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CombinedMarginLoss",
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
    "SoftmaxLoss",
    "SphereFace2Loss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "UniFaceLoss",
    "__version__",
    "compat",
    "config",
    "exporting",
    "functional",
    "get_workspace_limit",
    "losses",
    "options",
    "plan",
    "reference",
    "set_workspace_limit",
    "utils",
    "workspace_limit",
]


if TYPE_CHECKING:
    from torchmargin import distributed as distributed
    from torchmargin import evaluation as evaluation
else:

    def __getattr__(name: str) -> Any:
        if name in ("distributed", "evaluation"):  # imported at their first use: one loads much of torch, one numpy
            import importlib

            return importlib.import_module(f"torchmargin.{name}")
        raise AttributeError(f"module 'torchmargin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "distributed", "evaluation"]
