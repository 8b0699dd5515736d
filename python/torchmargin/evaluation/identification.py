"""Identification: which class of a gallery is a probe of, if any? In blocks, never all similarities at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchmargin.evaluation.checks import check_count, check_embeddings, check_labels, check_rates, unit

__all__ = ["Identification", "identify", "top_k"]


class Identification(NamedTuple):
    rank: dict[int, float]  # closed set, rank k: share of the mated probes with a mate among their k best entries
    tpir: dict[float, float]  # open set: for each false positive rate, share of the mated probes found and accepted
    threshold: dict[float, float]  # the cosine above which a probe is accepted, for each false positive rate
    mated: int  # probes whose class is in the gallery
    unmated: int  # probes whose class is not


def check_sides(probes: Tensor, gallery: Tensor) -> None:
    check_embeddings("probes", probes)
    check_embeddings("gallery", gallery)
    if probes.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"expected probes and gallery to have one number of features, but got {probes.shape[1]} "
            f"and {gallery.shape[1]}"
        )
    if probes.device != gallery.device:
        raise ValueError(
            f"expected probes and gallery to be on one device, but got {probes.device} and {gallery.device}"
        )
    if len(gallery) == 0:
        raise ValueError("expected gallery to have entries, but it is empty")


@torch.no_grad()
def top_k(probes: Tensor, gallery: Tensor, k: int, *, block: int = 4096) -> tuple[Tensor, Tensor]:
    """The k most similar entries of `gallery` [G, D] for each of `probes` [P, D].

    Returns cosines and gallery indices, [P, k] each, best first. No more than `block` x `block`
    similarities are held at a time. float64 if either is float64, else float32.
    """
    check_sides(probes, gallery)
    k = check_count("k", k, len(gallery), "gallery")
    block = check_count("block", block)
    faces, entries = unit("probes", probes), unit("gallery", gallery)
    dtype = torch.promote_types(faces.dtype, entries.dtype)
    return top_k_of_units(faces.to(dtype), entries.to(dtype), k, block)


def top_k_of_units(faces: Tensor, entries: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """The same of rows of unit length, all in one dtype."""
    cosines, indices = [], []
    for part in faces.split(block):
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
    check_sides(probes, gallery)
    probe_labels = check_labels("probe_labels", probe_labels, len(probes)).to(probes.device)
    gallery_labels = check_labels("gallery_labels", gallery_labels, len(gallery)).to(probes.device)
    rates = check_rates("fpir", fpir)
    if not isinstance(ranks, Sequence) or not ranks:
        raise ValueError(f"expected ranks to be a sequence of whole numbers such as (1, 5), but got {ranks!r}")
    ranks = [check_count("ranks", rank) for rank in ranks]
    mated = torch.isin(probe_labels, gallery_labels)
    if not mated.any():
        raise ValueError(
            f"expected some probes whose class is in the gallery, but none of the {len(probes)} probes is such"
        )
    cosines, indices = top_k(probes, gallery, min(max(ranks), len(gallery)), block=block)
    right = gallery_labels[indices] == probe_labels[:, None]
    closed = {k: right[mated, :k].any(1).double().mean().item() for k in ranks}

    impostors = cosines[~mated, 0].sort(descending=True).values
    thresholds, found = {}, {}
    for rate in rates if len(impostors) else ():
        allowed = int(rate * len(impostors) + 1e-9)  # this many unmated probes may be accepted
        threshold = impostors[allowed].item() if allowed < len(impostors) else -float("inf")
        thresholds[rate] = threshold
        found[rate] = (right[mated, 0] & (cosines[mated, 0] > threshold)).double().mean().item()
    return Identification(closed, found, thresholds, int(mated.sum()), len(impostors))
