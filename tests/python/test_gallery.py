"""evaluation.Gallery: every index beside all products in float64."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torchmargin.evaluation import Gallery, top_k

ROOT = Path(__file__).resolve().parents[2]

faiss_is_here = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="there is no faiss")
INDICES = ["builtin", pytest.param("exact", marks=faiss_is_here), pytest.param("ivf", marks=faiss_is_here)]
G, P, D = 400, 30, 16


def _rows(count, seed=0, dtype=torch.float32):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _true(probes, entries):
    unit = torch.nn.functional.normalize
    return unit(probes.double()) @ unit(entries.double()).T


def _gallery(entries, index, labels=None):
    """An index in cells looks into all of them, and so misses nothing."""
    cells = {"cells": 8, "visits": 8} if index == "ivf" else {}
    return Gallery(entries, labels, index=index, **cells)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5, G])
def test_a_search_finds_the_most_similar(index, dtype, k):
    probes, entries = _rows(P, 1, dtype), _rows(G, 2, dtype)
    cosines, places = _gallery(entries, index).search(probes, k, block=7)
    true = _true(probes, entries)
    # Two lengths and a product of D terms, in float32.
    bound = 4 * (D + 8) * 2.0**-24
    assert cosines.shape == places.shape == (P, k) and places.dtype == torch.int64
    assert (cosines - true.gather(1, places)).abs().max() < bound
    assert (cosines - true.topk(k).values).abs().max() < bound
    assert all(len(row.unique()) == k for row in places)
    assert (cosines.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("index", INDICES)
def test_identify_answers_with_labels_above_the_threshold(index):
    entries, labels = _rows(G, 2), torch.arange(G) * 10 + 3
    gallery = _gallery(entries, index, labels)
    probes = torch.cat([2.5 * entries[[7, 9]], _rows(1, 5)])
    assert gallery.identify(probes, 0.99).tolist() == [73, 93, -1]
    assert gallery.identify(probes, 1.5).tolist() == [-1, -1, -1]
    nearest = gallery.identify(probes, -1.5)[2]
    assert nearest == labels[_true(probes, entries)[2].argmax()]
    assert gallery.identify(probes[:0], 0.5).shape == (0,)
    assert torch.equal(gallery.identify(probes, np.float32(-1.5)), gallery.identify(probes, -1.5))
    assert len(gallery) == G and f"{G} x {D}" in repr(gallery)


@faiss_is_here
def test_cells_miss_entries_and_recall_says_how_many():
    entries, probes = _rows(4000, 2), _rows(200, 1)
    gallery = Gallery(entries, index="ivf", cells=50, visits=1)
    low = gallery.recall(probes)
    _, found = gallery.search(probes)
    assert low == (found[:, 0] == _true(probes, entries).argmax(1)).double().mean()
    gallery.visits = 10
    middle = gallery.recall(probes)
    gallery.visits = 50
    assert 0 < low < middle < gallery.recall(probes) == 1
    assert gallery.visits == 50 and "cells=50, visits=50" in repr(gallery)


@faiss_is_here
def test_what_cells_do_not_hold_has_no_place():
    gallery = Gallery(_rows(100, 2), index="ivf", cells=20, visits=1)
    cosines, places = gallery.search(_rows(5, 1), k=100)
    assert (places[:, -1] == -1).all() and (cosines[:, -1] == -math.inf).all()
    assert ((places == -1) == (cosines == -math.inf)).all()


@faiss_is_here
def test_the_defaults_of_cells_and_the_seed():
    entries = _rows(8000, 2)
    first, again = (Gallery(entries, index="ivf") for _ in range(2))
    assert (first.cells, first.visits) == (8000 // 39, 8000 // 39 // 16)
    for ours, theirs in zip(first.search(entries[:50], 3), again.search(entries[:50], 3)):
        assert torch.equal(ours, theirs)
    assert Gallery(_rows(30), index="ivf").cells == 1


def test_the_builtin_search_is_the_default_and_takes_float64():
    entries = _rows(G)
    assert Gallery(entries).index == "builtin"
    assert Gallery(entries.double()).search(entries)[0].dtype == torch.float64


@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_without_faiss_there_is_one_sentence(monkeypatch, index):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    with pytest.raises(ImportError, match="want faiss: pip install faiss-cpu"):
        Gallery(_rows(G), index=index)


def test_the_builtin_search_is_top_k():
    probes, entries = _rows(P, 1), _rows(G, 2)
    ours, theirs = Gallery(entries, index="builtin").search(probes, 4), top_k(probes, entries, 4)
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] - theirs[0]).abs().max() == 0


def test_the_gallery_keeps_its_own_copy():
    entries = _rows(G)
    gallery = Gallery(entries, index="builtin")
    before = gallery.search(_rows(3, 1))
    entries.zero_()
    assert torch.equal(gallery.search(_rows(3, 1))[0], before[0])


@pytest.mark.parametrize("index", INDICES)
def test_rows_may_lie_anyhow_in_memory(index):
    entries, probes = _rows(G, 2), _rows(P, 1)
    turned = _gallery(entries.T.contiguous().T, index).search(probes.T.contiguous().T.requires_grad_(), 3)
    straight = _gallery(entries, index).search(probes, 3)
    assert torch.equal(turned[1], straight[1]) and not turned[0].requires_grad
    # Lengths may be summed in another order, and products too: as above, twice.
    assert (turned[0] - straight[0]).abs().max() < 2 * 4 * (D + 8) * 2.0**-24


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the benchmark reads /proc")
def test_the_benchmark_runs(tmp_path):
    """Of a small gallery, with what it asserts itself: that every exact search finds the same."""
    sizes = {"entries": 2000, "features": 16, "probes": 20, "k": 3, "runs": 1, "threads": 1}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, ROOT / "benchmarks/gallery.py", *words, f"--json={tmp_path / 'gallery.json'}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "gallery.json").read_text())["results"]
    recalls = {each["search"]: each["recall_at_1"] for each in results}
    assert recalls["builtin"] == 1 and all(0 < recall <= 1 for recall in recalls.values())
    if importlib.util.find_spec("faiss"):
        assert recalls["exact"] == 1 and [name for name in recalls if name.startswith("ivf, 1 of ")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gallery(_rows(0)), "embeddings to have entries, but there are none"),
        (lambda: Gallery(_rows(4)[:, :0]), "embeddings to have features, but there are none"),
        (lambda: Gallery(_rows(4)[0]), r"embeddings to be a floating-point tensor of shape \[N, D\]"),
        (lambda: Gallery(_rows(4) / 0), "embeddings to be finite"),
        (lambda: Gallery(_rows(4), torch.arange(3)), r"labels to be an integer tensor of shape \[4\]"),
        (lambda: Gallery(_rows(4), index="flat"), "index to be .builtin., .exact. or .ivf., but got 'flat'"),
        (lambda: Gallery(_rows(4), seed=-1), r"seed to be a whole number in \[0, 2\^31\), but got -1"),
        (lambda: Gallery(_rows(4), seed=1 << 31), r"seed to be a whole number in \[0, 2\^31\), but got 2147483648"),
        (lambda: Gallery(_rows(4), seed=0.5), r"seed to be a whole number in \[0, 2\^31\), but got 0.5"),
        (lambda: Gallery(_rows(4), seed=True), r"seed to be a whole number in \[0, 2\^31\), but got True"),
        (lambda: Gallery(_rows(4), index="exact", cells=3), 'cells and visits with index="ivf" alone'),
        (lambda: Gallery(_rows(4).double(), index="exact"), "float32 or 16 bits on the CPU for faiss, but got torch.f"),
        (lambda: Gallery(_rows(4), index="builtin").visits, "index=\"ivf\" for visits, but it is 'builtin'"),
        (lambda: Gallery(_rows(4), index="builtin").search(_rows(2), 5), "k to be a whole number between 1 and the si"),
        (lambda: Gallery(_rows(4), index="builtin").search(_rows(2), block=0), "block to be a whole number of at leas"),
        (
            lambda: Gallery(_rows(4), index="builtin").search(_rows(2)[:, :3]),
            "one number of features, but got 3 and 16",
        ),
        (lambda: Gallery(_rows(4), index="builtin").search(_rows(2) / 0), "probes to be finite"),
        (
            lambda: Gallery(_rows(4), index="builtin").identify(_rows(2), math.nan),
            "threshold to be a number, but got nan",
        ),
        (
            lambda: Gallery(_rows(4), index="builtin").identify(_rows(2), True),
            "threshold to be a number, but got True",
        ),
        (lambda: Gallery(_rows(4), index="builtin").recall(_rows(0)), "probes to have rows, but there are none"),
        pytest.param(
            lambda: Gallery(_rows(40), index="ivf", cells=41),
            "cells to be a whole number between 1 and the size of the gallery, 40",
            marks=faiss_is_here,
        ),
        pytest.param(
            lambda: Gallery(_rows(40), index="ivf", cells=4, visits=5),
            "visits to be a whole number between 1 and the size of the index in cells, 4",
            marks=faiss_is_here,
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
