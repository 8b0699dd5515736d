"""A gallery that is searched again and again: by blocks of products, or by faiss, which can look into parts of it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from torchmargin.evaluation.checks import check_count, check_embeddings, check_labels, is_number, is_whole, unit
from torchmargin.evaluation.identification import check_sides, top_k_of_units

__all__ = ["Gallery", "Index"]

Index = Literal["builtin", "exact", "ivf"]
NO_CLASS = -1


class Gallery:
    """Embeddings [G, D] of known classes, compared by cosine with those of probes.

    ``index``: "builtin" compares with all entries by products of blocks, on the embeddings' device and in float64 for
    float64. "exact" and "ivf" are faiss's (``pip install faiss-cpu``), on the CPU and in float32: "exact" compares with
    all entries too (not faster: benchmarks/gallery.py); "ivf" sorts entries into ``cells`` by k-means (default: 4
    sqrt(G), as faiss's guide has it, and at least 39 entries a cell) and looks into the ``visits`` nearest ones of a
    probe (default: a sixteenth, at least 1): faster, with twice the memory, and it may miss entries; :meth:`recall`
    says how many. ``seed`` is that of k-means.

    ``labels`` [G] are integers that :meth:`identify` answers with, by default the places 0 ... G - 1. Embeddings of any
    length, which are copied; a zero row is like nothing. NaN and infinity are a ValueError.
    """

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        index: Index = "builtin",
        cells: int | None = None,
        visits: int | None = None,
        seed: int = 0,
    ) -> None:
        check_embeddings("embeddings", embeddings)
        entries = len(embeddings)
        if entries == 0:
            raise ValueError("expected embeddings to have entries, but there are none")
        if embeddings.shape[1] == 0:  # NB: faiss would divide by it, and the process end.
            raise ValueError("expected embeddings to have features, but there are none")
        if index not in ("builtin", "exact", "ivf"):
            raise ValueError(f'expected index to be "builtin", "exact" or "ivf", but got {index!r}')
        if index != "ivf" and (cells is not None or visits is not None):
            raise ValueError(f'expected cells and visits with index="ivf" alone, but index is {index!r}')
        if not is_whole(seed) or not 0 <= seed < 1 << 31:
            raise ValueError(f"expected seed to be a whole number in [0, 2^31), but got {seed!r}")  # faiss's is an int
        if labels is None:
            labels = torch.arange(entries, device=embeddings.device)
        self.labels = check_labels("labels", labels, entries).to(embeddings.device, copy=True)
        fits = embeddings.device.type == "cpu" and embeddings.dtype != torch.float64
        if index != "builtin" and not fits:
            raise ValueError(
                f"expected embeddings of float32 or 16 bits on the CPU for faiss, but got {embeddings.dtype} on "
                f'{embeddings.device}; index="builtin" takes them'
            )
        faiss = _import_faiss() if index != "builtin" else None
        self.index: Index = index
        self.features = embeddings.shape[1]
        units = unit("embeddings", embeddings.detach())
        self._like = units[:1].clone()  # what probes must fit
        self._entries = units if faiss is None or index == "ivf" else None  # else faiss alone holds them
        self._faiss: Any = None
        if faiss is not None:
            self._faiss = faiss.IndexFlatIP(self.features)
            if index == "ivf":
                most = max(1, min(entries // 39, round(4 * math.sqrt(entries))))
                self.cells = check_count("cells", most if cells is None else cells, entries, "gallery")
                visits = max(1, self.cells // 16) if visits is None else visits
                self._faiss = faiss.IndexIVFFlat(self._faiss, self.features, self.cells, faiss.METRIC_INNER_PRODUCT)
                self._faiss.cp.seed = int(seed)
                self._faiss.cp.min_points_per_centroid = 1  # fewer are a coarser search, and no reason to print
                self._faiss.cp.max_points_per_centroid = 64  # k-means' share of the work; a sample by the seed
                self._faiss.train(units.numpy())
                self.visits = visits
            self._faiss.add(units.numpy())

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = f"cells={self.cells}, visits={self.visits}, " if self.index == "ivf" else ""
        return f"Gallery({len(self)} x {self.features}, {shape}index={self.index!r})"

    @property
    def visits(self) -> int:
        """Into how many cells a search looks; may be set at any time."""
        self._demand_cells("visits")
        return int(self._faiss.nprobe)

    @visits.setter
    def visits(self, value: int) -> None:
        self._demand_cells("visits")
        self._faiss.nprobe = check_count("visits", value, self.cells, "index in cells")

    def _demand_cells(self, what: str) -> None:
        if self.index != "ivf":
            raise ValueError(f'expected index="ivf" for {what}, but it is {self.index!r}')

    @torch.no_grad()
    def search(self, probes: Tensor, k: int = 1, *, block: int = 4096) -> tuple[Tensor, Tensor]:
        """The k most similar entries of each of ``probes`` [P, D]: cosines and places in the gallery, [P, k] each.

        Best first; of equal cosines any. Where "ivf" finds fewer than k, the rest have cosine -inf and place -1. At
        most ``block`` probes, and for "builtin" ``block`` entries, are compared at a time.
        """
        check_sides(probes, self._like)
        k = check_count("k", k, len(self), "gallery")
        block = check_count("block", block)
        rows = unit("probes", probes)
        if self._faiss is None and self._entries is not None:
            dtype = torch.promote_types(rows.dtype, self._entries.dtype)
            return top_k_of_units(rows.to(dtype), self._entries.to(dtype), k, block)
        found = [self._faiss.search(part.float().numpy(), k) for part in rows.split(block)] if len(rows) else []
        cosines = torch.cat([torch.from_numpy(each) for each, _ in found] or [torch.empty(0, k)])
        places = torch.cat([torch.from_numpy(each) for _, each in found] or [torch.empty(0, k, dtype=torch.int64)])
        return torch.where(places < 0, -math.inf, cosines), places

    def identify(self, probes: Tensor, threshold: float) -> Tensor:
        """The label of each probe's most similar entry, [P]; -1 where its cosine is not above ``threshold``.

        :func:`identify` finds thresholds for given rates of false positives.
        """
        if not is_number(threshold) or math.isnan(threshold):
            raise ValueError(f"expected threshold to be a number, but got {threshold!r}")
        cosines, places = self.search(probes)
        known = cosines[:, 0] > threshold
        return torch.where(known, self.labels[places[:, 0].clamp(min=0)], NO_CLASS)

    @torch.no_grad()
    def recall(self, probes: Tensor, k: int = 1) -> float:
        """The share of the k most similar entries of ``probes`` that a search finds: of "ivf", beside all products."""
        check_sides(probes, self._like)
        if len(probes) == 0:
            raise ValueError("expected probes to have rows, but there are none")
        if self.index != "ivf" or self._entries is None:
            check_count("k", k, len(self), "gallery")
            return 1.0
        _, found = self.search(probes, k)
        _, true = top_k_of_units(unit("probes", probes).to(self._entries.dtype), self._entries, k, 4096)
        return (found[:, :, None] == true[:, None, :]).any(1).double().mean().item()


def _import_faiss() -> Any:
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError('index="exact" and "ivf" want faiss: pip install faiss-cpu') from error
    return faiss
