"""Several centers for a class."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.arcface import ArcFaceLoss
from torchmargin.losses.base import SharedOptions
from torchmargin.options import Extension, MarginGradient

__all__ = ["SubCenterArcFaceLoss"]


class SubCenterArcFaceLoss(ArcFaceLoss):
    """Sub-center ArcFace: Deng et al., ECCV 2020.

    ArcFace whose classes have K = ``sub_centers`` centers each, rows j K ... j K + K - 1 of the weight: a class's
    cosine is the largest of theirs. Clean samples of a class gather at one of its centers, noisy ones at the others.
    So, when training has come far enough::

        counts = sum(loss.center_counts(x, y) for x, y in batches)       # [C, K]
        centers = loss.dominant_centers(counts)                          # [C]
        clean = loss.angle_to_centers(x, y, centers) < math.radians(75)  # [B]: drop the others
        loss = loss.with_centers(centers)                                # ArcFace with K = 1, to go on with

    (75 degrees are the paper's.) Embeddings of all methods are those that the loss is called with.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float | Tensor = 0.5,
        sub_centers: int = 3,
        extension: Extension = "linear",
        margin_gradient: MarginGradient = "exact",
        **common: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            margin=margin,
            extension=extension,
            margin_gradient=margin_gradient,
            sub_centers=sub_centers,
            **common,
        )

    @torch.no_grad()
    def center_counts(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """How many of these embeddings [B, D] are nearest to each center of their class, [C, K] int64.

        Rows with ``ignore_index`` and rows that are not finite count for nothing. Sums over batches are those of all.
        """
        self._check_holds_weights()
        counts = torch.zeros(self.num_classes, self.sub_centers, dtype=torch.int64, device=self.weight.device)
        for cosines, own, _ in self._cosines_of_own_centers(embeddings, labels):
            counts.index_put_((own, cosines.argmax(1)), torch.ones_like(own), accumulate=True)
        return counts

    def dominant_centers(self, counts: Tensor) -> Tensor:
        """Which center of each class most samples are nearest to, [C] int64; the first of several."""
        if counts.shape != (self.num_classes, self.sub_centers):
            raise ValueError(
                f"expected counts of shape [{self.num_classes}, {self.sub_centers}], but got {list(counts.shape)}"
            )
        # NB: argmax names any of several that are equal.
        return (counts == counts.amax(1, keepdim=True)).int().cummax(1).values.eq(0).sum(1)

    @torch.no_grad()
    def angle_to_centers(self, embeddings: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """The angle [B] of each embedding to the given center [C] of its class, in radians; NaN where it is ignored."""
        self._check_holds_weights()
        self._check_centers(centers)
        angles = torch.full((embeddings.shape[0],), torch.nan, dtype=self.acc_dtype, device=self.weight.device)
        for cosines, own, rows in self._cosines_of_own_centers(embeddings, labels):
            chosen = cosines.gather(1, centers[own].unsqueeze(1)).squeeze(1)
            angles[rows] = chosen.clamp(-1.0, 1.0).arccos().to(angles.dtype)
        return angles

    @torch.no_grad()
    def with_centers(self, centers: Tensor) -> ArcFaceLoss:
        """An ArcFaceLoss with the same margin and the given center [C] of each class as its one weight."""
        self._check_holds_weights()
        self._check_centers(centers)
        loss = ArcFaceLoss(
            self.in_features,
            self.num_classes,
            scale=self.scale,
            margin=self.margin,
            extension=self.extension,
            margin_gradient=self.margin_gradient,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            class_weight=self.class_weight,
            interclass_filter=self.interclass_filter,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        first = torch.arange(self.num_classes, device=self.weight.device) * self.sub_centers
        loss.weight.copy_(self.weight[first + centers])
        return loss.train(self.training)

    def _check_centers(self, centers: Tensor) -> None:
        if centers.shape != (self.num_classes,) or centers.dtype != torch.int64:
            raise ValueError(
                f"expected centers [{self.num_classes}] int64, but got {centers.dtype} of shape {list(centers.shape)}"
            )

    def _cosines_of_own_centers(self, embeddings: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the rows that count: their cosines to the K centers of their class, [n, K], their labels and places."""
        if not self._fits(embeddings, labels):
            raise RuntimeError(
                f"{type(self).__name__}: expected embeddings [B, {self.in_features}] and labels [B] int64 on the "
                f"device of the weights"
            )
        outside = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_classes))
        if outside.any():
            raise IndexError(
                f"{type(self).__name__}: expected labels in [0, {self.num_classes}) or ignore_index, but got "
                f"{labels[outside][0].item()}"
            )
        counted = torch.nonzero((labels != self.ignore_index) & embeddings.isfinite().all(1)).squeeze(1)
        weight = self.weight.view(self.num_classes, self.sub_centers, self.in_features)
        parts = []
        for rows in counted.split(1024):  # [n, K, D] at a time
            own = labels[rows]
            x = torch.nn.functional.normalize(embeddings[rows].double(), dim=1, eps=1e-12)
            centers = torch.nn.functional.normalize(weight[own].double(), dim=2, eps=1e-12)
            parts.append((torch.einsum("nd,nkd->nk", x, centers), own, rows))
        return parts
