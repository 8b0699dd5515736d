"""What people run today for ArcFace, written out: the peers of the benchmarks.

Each takes input [B, D], weight [C, D], target [B] and returns the mean loss. All of them hold
several B x C matrices.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

SCALE, MARGIN = 64.0, 0.5


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Careful eager PyTorch: the margin on [B] values only, scattered back into the logits."""
    cosine = F.linear(F.normalize(x), F.normalize(w))
    target = cosine.gather(1, y[:, None])
    sine = (1 - target.square()).clamp(min=0).sqrt()
    psi = target * math.cos(MARGIN) - sine * math.sin(MARGIN)
    psi = torch.where(target > math.cos(math.pi - MARGIN), psi, target - MARGIN * math.sin(MARGIN))
    return F.cross_entropy(SCALE * cosine.scatter(1, y[:, None], psi.to(cosine.dtype)), y)


def insightface_order(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The steps in InsightFace's order: clamp, arccos and cos over all of B x C, scale, cross_entropy."""
    logits = F.linear(F.normalize(x), F.normalize(w)).float().clamp(-1, 1)
    rows = torch.arange(len(y), device=y.device)
    with torch.no_grad():
        target = logits[rows, y].arccos()
        logits.arccos_()
        logits[rows, y] = target + MARGIN
        logits.cos_()
    return F.cross_entropy(logits * SCALE, y)


def fused_language_model_losses() -> dict:
    """name -> loss(unit x, unit w, y): fused linear cross-entropies without a margin, those that are installed."""
    found = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 and later
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda x, w, y: F.linear_cross_entropy(SCALE * x, w, y, options=options)
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda x, w, y: linear_cross_entropy(SCALE * x, w, y)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, w, y: liger(w, SCALE * x, y)
    except ImportError:
        pass
    return found


def peers() -> dict:
    return {
        "eager": eager,
        "InsightFace order": insightface_order,
        "torch.compile": torch.compile(eager, dynamic=False),
    }


def bytes_needed(name: str, rows: int, features: int, classes: int) -> int:
    """An estimate of a peer's peak beyond inputs, in float32: B x C matrices alive at once, and C x D ones.

    eager: cosine, scattered, scaled, log-softmax and two of their gradients; InsightFace's order: the same
    with the clamp's input; compiled: cosine, log-softmax's input and one gradient. C x D: the normalised
    weights and two gradients.
    """
    matrices = {"eager": 6, "InsightFace order": 6, "torch.compile": 4}[name]
    return 4 * (matrices * rows * classes + 3 * classes * features)


def whole_products(x: Tensor, w: Tensor):
    """The three bare products of forward and backward, each at once into memory that is there already."""
    logits = torch.rand(len(x), len(w))
    grad_w = torch.empty_like(w)
    grad_x = torch.empty_like(x)

    def run():
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.t(), x, out=grad_w)

    return run


def chunked_products(x: Tensor, w: Tensor, plan):
    """The bare products that our plan makes (the forward's again for what is not kept), in its chunks."""
    grad_x = torch.zeros_like(x)
    logits = torch.rand(plan.row_tile, plan.class_chunk)
    grad_w = torch.empty(plan.class_chunk, w.shape[1])

    def run():
        for part, begin in ((p, i * plan.class_chunk) for i, p in enumerate(w.split(plan.class_chunk))):
            for rows, out in zip(x.split(plan.row_tile), grad_x.split(plan.row_tile)):
                tile = logits[: len(rows), : len(part)]
                torch.mm(rows, part.t(), out=tile)
                if begin >= plan.kept_classes:
                    torch.mm(rows, part.t(), out=tile)
                out.addmm_(tile, part)
                torch.mm(tile.t(), rows, out=grad_w[: len(part)])

    return run


class PartialFcOrder:
    """The steps of InsightFace's PartialFC in its order, all classes in every step: rows and labels gathered, the local
    logits [R n, C / R] as a matrix, margin, a softmax over ranks by three all_reduces, one reduce of gradients for each
    rank. The gradient of rows is their sum here; there it is multiplied by the number of ranks.
    """

    def __init__(self, group, first_class: int):
        self.group, self.first_class = group, first_class

    def __call__(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = _GatherRows.apply(x, self.group)
        labels = [torch.empty_like(y) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(labels, y, group=self.group)
        target = torch.cat(labels) - self.first_class
        target[(target < 0) | (target >= len(w))] = -1
        logits = F.linear(F.normalize(rows), F.normalize(w)).clamp(-1, 1)
        present = torch.where(target != -1)[0]
        own = logits[present, target[present]]
        psi = own * math.cos(MARGIN) - (1 - own.square()).sqrt() * math.sin(MARGIN)
        psi = torch.where(own > math.cos(math.pi - MARGIN), psi, own - MARGIN * math.sin(MARGIN))
        logits = logits.index_put((present, target[present]), psi) * SCALE
        return _CrossEntropyOverRanks.apply(logits, target, self.group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, x, group=group)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        parts = [part.contiguous() for part in grad.chunk(dist.get_world_size(ctx.group))]
        for rank, part in enumerate(parts):
            dist.reduce(part, group=ctx.group, group_dst=rank)
        return parts[dist.get_rank(ctx.group)], None


class _CrossEntropyOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, group):
        largest = logits.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        softmax = (logits - largest).exp_()
        total = softmax.sum(1, keepdim=True)
        dist.all_reduce(total, group=group)
        softmax.div_(total)
        present = torch.where(target != -1)[0]
        own = torch.zeros(len(target), 1)
        own[present] = softmax[present].gather(1, target[present, None])
        dist.all_reduce(own, group=group)
        ctx.save_for_backward(softmax, present, target)
        return -own.clamp(min=1e-30).log().mean()

    @staticmethod
    def backward(ctx, grad):
        softmax, present, target = ctx.saved_tensors
        softmax[present, target[present]] -= 1
        return softmax.div_(len(target)).mul_(grad), None, None
