"""Templates: several images, and frames of several videos, that stand for one person, as in the IJB sets."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmargin.evaluation.checks import check_embeddings, check_labels

__all__ = ["pool_templates"]


@torch.no_grad()
def pool_templates(
    embeddings: Tensor, templates: Tensor, media: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One embedding of unit length for each template, [T, D], and the templates' numbers [T], rising.

    As IJB's protocol has it: ``embeddings`` [N, D], as long as they are (a network's confidence is in their length),
    times ``weights`` [N] if given (a detector's scores); the mean over the images of one template that have the same
    number in ``media`` [N] (frames of one video), the sum over a template's media, then unit length. An image that is
    in several templates stands there several times. float64 inside; float64 for float64 embeddings, else float32.
    """
    check_embeddings("embeddings", embeddings)
    rows = len(embeddings)
    templates = check_labels("templates", templates, rows).to(embeddings.device)
    media = check_labels("media", media, rows).to(embeddings.device)
    values = embeddings.double()
    if weights is not None:
        fits = isinstance(weights, Tensor) and weights.shape == (rows,)
        if not fits or not weights.is_floating_point() or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"expected weights to be finite floating-point numbers [{rows}], none negative")
        values = values * weights.to(values).unsqueeze(1)
    if not bool(values.isfinite().all()):
        raise ValueError("expected embeddings to be finite, but some hold NaN or infinity")
    numbers, place = templates.unique(return_inverse=True)
    # Each medium of each template once, with the rows that are of it.
    of_template, of_medium = torch.stack([place, media], 1).unique(dim=0, return_inverse=True)
    counts = torch.bincount(of_medium, minlength=len(of_template)).double()
    means = values.new_zeros(len(of_template), values.shape[1]).index_add_(0, of_medium, values)
    means /= counts.unsqueeze(1)
    sums = values.new_zeros(len(numbers), values.shape[1]).index_add_(0, of_template[:, 0], means)
    pooled = torch.nn.functional.normalize(sums, dim=1, eps=1e-12)
    return pooled.to(torch.promote_types(embeddings.dtype, torch.float32)), numbers
