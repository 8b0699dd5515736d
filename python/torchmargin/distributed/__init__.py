"""Classes over ranks: a margin loss whose class weights are spread over the processes of torch.distributed.

``head = ClassParallel(ArcFaceLoss(512, 10_000_000, device="meta"), mesh)`` takes the place of the loss. Each rank holds
some classes and gives its own batch; loss and gradients are those of one process. docs/distributed.md tells the way
from one GPU to many.
"""

from torchmargin.distributed.checkpoint import export_weight, import_weight
from torchmargin.distributed.functional import class_parallel_binary_cross_entropy, class_parallel_cross_entropy
from torchmargin.distributed.head import ClassParallel
from torchmargin.distributed.rows import attach_row_optimizer, step_in_backward
from torchmargin.distributed.sampling import ClassSampler

__all__ = [
    "ClassParallel",
    "ClassSampler",
    "attach_row_optimizer",
    "class_parallel_binary_cross_entropy",
    "class_parallel_cross_entropy",
    "export_weight",
    "import_weight",
    "step_in_backward",
]
