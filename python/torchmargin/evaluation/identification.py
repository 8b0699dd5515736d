"""Identification: which class of a gallery is a probe of, if any? In blocks, never all similarities at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchmargin.evaluation.pairs import check_embeddings, unit

__all__ = ["Identification", "identify", "top_k"]


class Identification(NamedTuple):
    rank: dict[int, float]  # closed set, rank k: share of the mated probes with a mate among their k best entries
    tpir: dict[float, float]  # open set: for each false positive rate, share of the mated probes found and accepted
    threshold: dict[float, float]  # the cosine above which a probe is accepted, for each false positive rate
    mated: int  # probes whose class is in the gallery
    unmated: int  # probes whose class is not


@torch.no_grad()
def top_k(probes: Tensor, gallery: Tensor, k: int, *, block: int = 4096) -> tuple[Tensor, Tensor]:
    """The k most similar entries of `gallery` [G, D] for each of `probes` [P, D].

    Returns cosines and gallery indices, [P, k] each, best first. No more than `block` x `block`
    similarities are held at a time.
    """
    check_embeddings("probes", probes)
    check_embeddings("gallery", gallery)
    if probes.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"expected probes and gallery to have one number of features, but got {probes.shape[1]} "
            f"and {gallery.shape[1]}"
        )
    if not 1 <= k <= len(gallery):
        raise ValueError(f"expected k between 1 and the size of the gallery, {len(gallery)}, but got {k}")
    entries = unit(gallery)
    cosines, indices = [], []
    for part in unit(probes).split(block):
        best = part.new_empty(len(part), 0)
        place = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(entries), block):
            similar = part @ entries[start : start + block].T
            values, chosen = similar.topk(min(k, similar.shape[1]), dim=1)
            best, place = torch.cat([best, values], 1), torch.cat([place, chosen + start], 1)
            best, chosen = best.topk(min(k, best.shape[1]), dim=1)
            place = place.gather(1, chosen)
        cosines.append(best)
        indices.append(place)
    if not cosines:
        return entries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=entries.device)
    return torch.cat(cosines), torch.cat(indices)


def identify(
    probes: Tensor,
    probe_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    fpir: Sequence[float] = (1e-1, 1e-2),
    block: int = 4096,
) -> Identification:
    """Closed-set and open-set identification of `probes` [P, D] against `gallery` [G, D].

    A probe whose label [P] is among the gallery's labels [G] is mated. Closed set, over mated probes: rank k
    counts those with an entry of their class among the k most similar ones. Open set, if there are unmated probes:
    the threshold for a false positive identification rate is the lowest that accepts no larger share of the unmated
    probes (by their best cosine), and tpir is the share of the mated probes whose best entry is of their class
    and above it.
    """
    for name, labels, rows in (("probe_labels", probe_labels, probes), ("gallery_labels", gallery_labels, gallery)):
        if labels.dim() != 1 or len(labels) != len(rows):
            raise ValueError(f"expected {name} to have shape [{len(rows)}], but got {list(labels.shape)}")
    for rate in fpir:
        if not 0 <= rate <= 1:
            raise ValueError(f"expected false positive rates in [0, 1], but got {rate}")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"expected ranks of at least 1, but got {list(ranks)}")
    cosines, indices = top_k(probes, gallery, min(max(ranks), len(gallery)), block=block)
    mated = torch.isin(probe_labels, gallery_labels)
    if not mated.any():
        raise ValueError("expected some probes whose class is in the gallery, but there are none")
    right = gallery_labels[indices] == probe_labels[:, None]
    closed = {k: right[mated, :k].any(1).double().mean().item() for k in ranks}

    impostors = cosines[~mated, 0].sort(descending=True).values
    thresholds, found = {}, {}
    for rate in fpir if len(impostors) else ():
        allowed = int(rate * len(impostors) + 1e-9)  # this many unmated probes may be accepted
        threshold = impostors[allowed].item() if allowed < len(impostors) else -float("inf")
        thresholds[rate] = threshold
        found[rate] = (right[mated, 0] & (cosines[mated, 0] > threshold)).double().mean().item()
    return Identification(closed, found, thresholds, int(mated.sum()), len(impostors))
