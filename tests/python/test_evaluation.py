"""Verification and identification against scikit-learn and against counting by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from torchmargin import evaluation

from rounding import LinearRounding, assert_within, unit_roundoff


def _scored(pairs=500):
    same = torch.rand(pairs) < 0.3
    return torch.randn(pairs, dtype=torch.float64) + 1.5 * same, same


def test_pairs_and_scores():
    labels = torch.tensor([0, 1, 0, 1])
    first, second, same = evaluation.all_pairs(labels)
    assert list(zip(first.tolist(), second.tolist())) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert same.tolist() == [False, True, False, False, True, False]
    x = torch.randn(4, 5, dtype=torch.float64)
    x[3] = 0
    expected = torch.nn.functional.cosine_similarity(x[first], x[second])
    for block in (1, 4, 100):
        assert_within(
            evaluation.pair_scores(x, first, second, block=block), expected, LinearRounding(x, x).logit[first]
        )
    assert evaluation.pair_scores(x.half(), first, second).dtype == torch.float32


def test_verification_agrees_with_counting():
    scores, same = _scored()
    scores = (scores * 4).round() / 4  # many ties
    result = evaluation.verify(scores, same, far=(0.0, 0.01, 0.1))
    # At most 500 trapezoids, each rounded twice, and their sum, at most 1, on both sides.
    assert result.auc == pytest.approx(roc_auc_score(same.numpy(), scores.numpy()), abs=2 * 502 * 2**-53)
    for rate, tar in result.tar.items():
        accepted = [t for t in scores.unique().tolist() if (scores[~same] >= t).double().mean() <= rate]
        assert tar == max(((scores[same] >= t).double().mean().item() for t in accepted), default=0.0)
    # At the equal error rate the two errors of the neighbouring thresholds bracket it.
    false = np.array([(scores[~same] >= t).double().mean().item() for t in scores.unique().tolist()])
    refused = np.array([(scores[same] < t).double().mean().item() for t in scores.unique().tolist()])
    crossing = np.argmax(refused >= false)
    assert min(false[crossing], refused[crossing - 1]) <= result.eer <= max(false[crossing - 1], refused[crossing])
    assert (result.pairs, result.same_pairs) == (500, int(same.sum()))


def test_perfect_and_inverted_scores():
    same = torch.tensor([True, True, False, False])
    perfect = evaluation.verify(torch.tensor([0.9, 0.8, 0.2, 0.1]), same)
    assert (perfect.auc, perfect.eer) == (1.0, 0.0) and set(perfect.tar.values()) == {1.0}
    inverted = evaluation.verify(torch.tensor([0.1, 0.2, 0.8, 0.9]), same)
    assert (inverted.auc, inverted.eer) == (0.0, 1.0)


def test_kfold_accuracy_is_lfws_protocol():
    """Brute force: every threshold between two scores of the other folds, the lowest of the best."""
    scores, same = _scored(60)
    result = evaluation.kfold_accuracy(scores, same, folds=6)
    folds = np.arange(60).reshape(6, 10)
    for fold, accuracy, threshold in zip(folds, result.accuracy, result.threshold):
        others = np.setdiff1d(np.arange(60), fold)
        right = lambda t, rows: ((scores[rows] >= t) == same[rows]).double().mean().item()  # noqa: E731
        best = max(right(t, others) for t in [*scores.tolist(), 1e9])
        assert right(threshold, others) == best and accuracy == right(threshold, fold)
    assert (result.mean, result.deviation) == (np.mean(result.accuracy), np.std(result.accuracy))


def test_kfold_with_equal_scores_decides_them_alike():
    scores = torch.tensor([0.5] * 8 + [0.2] * 4, dtype=torch.float64)
    same = torch.tensor(([True] * 3 + [False]) * 2 + [False] * 4)
    result = evaluation.kfold_accuracy(scores, same, folds=2)
    assert all(0.2 < t <= 0.5 or t == 0.5 for t in result.threshold[:1])


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_top_k_is_that_of_the_whole_matrix(block):
    probes, gallery = torch.randn(11, 6, dtype=torch.float64), torch.randn(23, 6, dtype=torch.float64)
    cosine = torch.nn.functional.normalize(probes) @ torch.nn.functional.normalize(gallery).T
    for k in (1, 5, 23):
        values, indices = evaluation.top_k(probes, gallery, k, block=block)
        expected = cosine.topk(k)
        assert_within(values, expected.values, LinearRounding(probes, gallery).logit[:, None])  # of the k-th largest
        assert torch.equal(indices, expected.indices)
    values, indices = evaluation.top_k(probes[:0], gallery, 4)
    assert values.shape == indices.shape == (0, 4)


def test_identification():
    gallery = torch.eye(6, dtype=torch.float64)
    labels = torch.arange(6)
    # Probes of classes 0..3 near their entry, one of class 4 nearer to 5, and two strangers.
    probes = torch.tensor(
        [
            [1, 0.1, 0, 0, 0, 0],
            [0, 1, 0.2, 0, 0, 0],
            [0, 0, 1, 0.9, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0.6, 0.8],
            [1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0.5, 1, 0],
        ],
        dtype=torch.float64,
    )
    own = torch.tensor([0, 1, 2, 3, 4, 77, 78])
    result = evaluation.identify(probes, own, gallery, labels, ranks=(1, 2), fpir=(0.0, 0.5, 1.0), block=2)
    assert result.rank == {1: 4 / 5, 2: 1.0}
    assert (result.mated, result.unmated) == (5, 2)
    # Strangers' best cosines: 1 / sqrt(6) and 1 / sqrt(1.25) = 0.894.
    assert result.threshold[0.0] == pytest.approx(1.25**-0.5, rel=4 * 2**-53, abs=0)  # two roots and quotients
    assert result.tpir == {0.0: 3 / 5, 0.5: 4 / 5, 1.0: 4 / 5}
    closed = evaluation.identify(probes[:5], own[:5], gallery, labels)
    assert closed.tpir == {} and closed.unmated == 0


def test_pair_lists(tmp_path):
    lfw = tmp_path / "pairs.txt"
    lfw.write_text("10\t300\nAbel_Pacheco\t1\t4\nAbdel_Madi\t5\tDean_Barker\t1\n")
    assert evaluation.read_lfw_pairs(lfw) == [
        ("Abel_Pacheco/Abel_Pacheco_0001.jpg", "Abel_Pacheco/Abel_Pacheco_0004.jpg", True),
        ("Abdel_Madi/Abdel_Madi_0005.jpg", "Dean_Barker/Dean_Barker_0001.jpg", False),
    ]
    plain = tmp_path / "list.txt"
    plain.write_text("a/1.jpg b/2.jpg 0\n\na/1.jpg a/3.jpg 1\n")
    assert evaluation.read_pairs(plain) == [("a/1.jpg", "b/2.jpg", False), ("a/1.jpg", "a/3.jpg", True)]
    voxceleb = tmp_path / "veri.txt"
    voxceleb.write_text("1 id1/a.wav id1/b.wav\n")
    assert evaluation.read_pairs(voxceleb, label_first=True) == [("id1/a.wav", "id1/b.wav", True)]
    with pytest.raises(ValueError, match=r"veri.txt:1: expected 'first second label' with one of the labels 1, true, "):
        evaluation.read_pairs(voxceleb)
    lfw.write_text("10 300\nAbel 1\n")
    with pytest.raises(ValueError, match="pairs.txt:2: expected 'name i j' or 'name i other j', but got 'Abel 1'"):
        evaluation.read_lfw_pairs(lfw)


def test_pair_lists_with_tabs_and_with_words_for_labels(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("10\t300\nAbel Pacheco\t1\t4\nAbdel Madi\t5\tDean Barker\t1\n")
    assert evaluation.read_lfw_pairs(path, suffix=".png") == [
        ("Abel Pacheco/Abel Pacheco_0001.png", "Abel Pacheco/Abel Pacheco_0004.png", True),
        ("Abdel Madi/Abdel Madi_0005.png", "Dean Barker/Dean Barker_0001.png", False),
    ]
    path.write_text("Abel Pacheco\t1 4\n")
    with pytest.raises(ValueError, match=r"pairs.txt:1: expected 'name i j' .*, but got 'Abel Pacheco\\t1 4'"):
        evaluation.read_lfw_pairs(path)
    path.write_text("my face/1.jpg\t\tmy face/2.jpg\t1\nmy face/1.jpg\tother/1.jpg\t0\n")
    assert evaluation.read_pairs(path) == [
        ("my face/1.jpg", "my face/2.jpg", True),
        ("my face/1.jpg", "other/1.jpg", False),
    ]
    words = ["target", "nontarget", "True", "False", "tgt", "imp", "TRUE", "NonTarget", "1", "0"]
    path.write_text("".join(f"a b {word}\n" for word in words))
    assert [pair.same for pair in evaluation.read_pairs(path)] == [True, False] * 5
    path.write_text("target a b\n")
    assert evaluation.read_pairs(path, label_first=True) == [("a", "b", True)]
    path.write_text("a b maybe\n")
    with pytest.raises(ValueError, match="labels 1, true, target, tgt, 0, false, nontarget, imp, but got 'a b maybe'"):
        evaluation.read_pairs(path)


@pytest.mark.parametrize(
    "wrap", [lambda v: v, lambda v: v.numpy(), lambda v: v.tolist()], ids=["tensor", "array", "list"]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_same_may_be_booleans_zeros_and_ones_or_signs(wrap, dtype):
    scores, same = _scored(60)
    expected = evaluation.verify(scores, same), evaluation.kfold_accuracy(scores, same), evaluation.roc(scores, same)
    labels = [same.to(dtype)]
    if dtype in (torch.int64, torch.float32):
        labels.append(2 * same.to(dtype) - 1)
    for own in map(wrap, labels):
        assert evaluation.verify(scores, own) == expected[0] and expected[0].same_pairs == int(same.sum())
        assert evaluation.kfold_accuracy(scores, own) == expected[1]
        assert all(np.array_equal(got, true) for got, true in zip(evaluation.roc(scores, own), expected[2]))


def test_integers_of_every_kind_are_labels_and_indices():
    rows, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 7])
    expected = evaluation.identify(rows, labels, rows[:5], labels[:5])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        own = labels.to(dtype)
        assert evaluation.identify(rows, own, rows[:5], labels[:5], ranks=np.array([1, 5, 10]).tolist()) == expected
        first, second, same = evaluation.all_pairs(own)
        assert torch.equal(same, evaluation.all_pairs(labels)[2])
        # uint8 used to select rows as a mask.
        scores = evaluation.pair_scores(rows, first.to(dtype), second)
        assert torch.equal(scores, evaluation.pair_scores(rows, first, second))
    assert len(evaluation.all_pairs(labels[:0])[0]) == 0


def test_one_float64_side_is_enough():
    probes, gallery = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.bfloat16)
    expected = evaluation.top_k(probes, gallery.double(), 2)
    for got in (evaluation.top_k(probes, gallery, 2), evaluation.top_k(probes, gallery.float(), 2)):
        # Unit vectors in float32: of 4 squares' sum, its root and a quotient, one more for their product.
        assert_within(got[0], expected[0], (4 / 2 + 3) * unit_roundoff(torch.float32))
        assert got[0].dtype == torch.float64 and torch.equal(got[1], expected[1])


def test_large_and_zero_rows():
    """16-bit and large float32 embeddings have their cosine; a zero row is at 0 to everything."""
    x = torch.tensor([[3e18, 4e18], [3.0, 4.0], [0.0, 0.0]])
    first, second, _ = evaluation.all_pairs(torch.arange(3))
    bound = (2 + 2 * 4) * unit_roundoff(torch.float32)  # a product of two features of two unit vectors
    assert_within(evaluation.pair_scores(x, first, second), torch.tensor([1.0, 0.0, 0.0]), bound)
    half = torch.tensor([[6e4, 6e4], [1.0, 1.0]], dtype=torch.float16)
    assert_within(evaluation.pair_scores(half, first[:1], second[:1]), torch.ones(1), bound)


SCORES, SAME = torch.rand(4), torch.tensor([True, False, True, False])
ROWS, LABELS = torch.randn(4, 3), torch.arange(4)
PAIRS = LABELS[:2], LABELS[2:]


def _with(rows, value, *at):
    rows = rows.clone()
    rows[list(at)] = value
    return rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embeddings_that_are_not_finite_are_refused(value, dtype):
    rows, strangers = ROWS.to(dtype), torch.tensor([0, 1, 2, 9])
    broken = _with(rows, torch.tensor([0, value, 0], dtype=dtype), 2, 3)
    where = "to be finite, but 2 of 4 rows hold NaN or infinity; the first is row 2"
    for call, name in [
        (lambda: evaluation.top_k(broken, rows, 1), "probes"),
        (lambda: evaluation.top_k(rows, broken, 1), "gallery"),
        (lambda: evaluation.identify(broken, strangers, rows, LABELS), "probes"),  # a stranger among them
        (lambda: evaluation.identify(rows, strangers, broken, LABELS), "gallery"),
        (lambda: evaluation.pair_scores(broken, *PAIRS), "embeddings"),
    ]:
        with pytest.raises(ValueError, match=f"expected {name} {where}"):
            call()


@pytest.mark.parametrize("call", [evaluation.verify, evaluation.roc, evaluation.kfold_accuracy])
@pytest.mark.parametrize(
    ("scores", "same", "text"),
    [
        (_with(SCORES, np.nan, 1, 3), SAME, r"finite, but 2 of 4 are NaN or infinite; the first is scores\[1\] = nan"),
        (_with(SCORES, -np.inf, 2), SAME, r"finite, but 1 of 4 are NaN or infinite; the first is scores\[2\] = -inf"),
        ((SCORES / 0).numpy(), SAME, r"finite, but 4 of 4 are NaN or infinite; the first is scores\[0\] = inf"),
        (SCORES + 0j, SAME, r"scores to be a vector of numbers, but got torch.complex64 of shape \[4\]"),
        (["0.5"] * 4, SAME, r"scores to be a vector of numbers, but got <U3 of shape \[4\]"),
        (SCORES[None], SAME, r"scores to be a vector of numbers, but got torch.float32 of shape \[1, 4\]"),
        (SCORES, SAME[:, None], r"same to be a vector of numbers, but got torch.bool of shape \[4, 1\]"),
        (SCORES, SAME[:3], "expected scores and same to have one length, but got 4 and 3"),
        (SCORES, 2 * SAME.int(), r"-1 and 1, but 2 of 4 are something else; the first is same\[0\] = 2"),
        (SCORES, SAME / 2, r"-1 and 1, but 2 of 4 are something else; the first is same\[0\] = 0.5"),
        (SCORES, _with(SAME.float(), np.nan, 3), r"but 1 of 4 are something else; the first is same\[3\] = nan"),
        (SCORES, ["yes", "no"] * 2, "expected same to be a vector of numbers, but got <U3"),
        (SCORES, [1, 0, -1, 1], "either 0 or -1 for pairs of two classes, but got both"),
        (SCORES, SAME | True, "pairs of one class and of two, but all 4 pairs are alike"),
        (SCORES[:0], SAME[:0], "pairs of one class and of two, but all 0 pairs are alike"),
    ],
)
def test_bad_scores_and_labels_of_pairs_are_refused(call, scores, same, text):
    with pytest.raises(ValueError, match=text):
        call(scores, same)


def _identify(**changed):
    arguments = dict(probes=ROWS, probe_labels=LABELS, gallery=ROWS, gallery_labels=LABELS)
    return evaluation.identify(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: evaluation.verify(SCORES, SAME, far=(2.0,)), r"far to hold rates in \[0, 1\], but got 2.0"),
        (lambda: evaluation.verify(SCORES, SAME, far=(float("nan"),)), r"far to hold rates in \[0, 1\], but got nan"),
        (lambda: evaluation.verify(SCORES, SAME, far=("0.1",)), r"far to hold rates in \[0, 1\], but got '0.1'"),
        (lambda: evaluation.verify(SCORES, SAME, far=0.1), r"far to be a sequence of rates in \[0, 1\], but got 0.1"),
        (lambda: _identify(fpir=(-1.0,)), r"fpir to hold rates in \[0, 1\], but got -1.0"),
        (lambda: _identify(fpir=0.1), r"fpir to be a sequence of rates in \[0, 1\], but got 0.1"),
        (
            lambda: evaluation.kfold_accuracy(SCORES, SAME, folds=5),
            "expected folds to be a whole number between 2 and the size of the list of pairs, 4, but got 5",
        ),
        (lambda: evaluation.kfold_accuracy(SCORES, SAME, folds=1), "folds to be .* between 2 and .*, 4, but got 1"),
        (lambda: evaluation.kfold_accuracy(SCORES, SAME, folds=2.0), "folds to be a whole number .*, but got 2.0"),
        (lambda: evaluation.kfold_accuracy(SCORES, SAME, folds=True), "folds to be a whole number .*, but got True"),
        (
            lambda: evaluation.pair_scores(ROWS[0], *PAIRS),
            r"embeddings to be a .*, but got torch.float32 of shape \[3\]",
        ),
        (lambda: evaluation.pair_scores(ROWS.int(), *PAIRS), "embeddings to be a floating-point tensor .* torch.int32"),
        (lambda: evaluation.pair_scores(ROWS.numpy(), *PAIRS), "embeddings to be a floating-point .* got ndarray"),
        (lambda: evaluation.pair_scores(ROWS * 1e30, *PAIRS), "but 4 of 4 rows overflow in their length; the first is"),
        (lambda: evaluation.pair_scores(ROWS, LABELS, LABELS[:2]), "first and second to have one length, .* 4 and 2"),
        (lambda: evaluation.pair_scores(ROWS, *PAIRS, block=0), "block to be a whole number of at least 1, but got 0"),
        (
            lambda: evaluation.pair_scores(ROWS, torch.tensor([0, -1]), PAIRS[1]),
            r"first to hold indices of the 4 rows, 0 to 3, but 1 of 2 lie outside; the first is first\[1\] = -1",
        ),
        (
            lambda: evaluation.pair_scores(ROWS, PAIRS[0], torch.tensor([4, 9])),
            r"second to hold indices of the 4 rows, 0 to 3, but 2 of 2 lie outside; the first is second\[0\] = 4",
        ),
        (lambda: evaluation.pair_scores(ROWS, PAIRS[0] / 1, PAIRS[1]), "first to be an integer .* got torch.float32"),
        (lambda: evaluation.pair_scores(ROWS, PAIRS[0], [2, 3]), "second to be an integer tensor .* got list"),
        (lambda: evaluation.pair_scores(ROWS, SAME, LABELS), "first to hold indices, but got torch.bool .*nonzero"),
        (
            lambda: evaluation.all_pairs(LABELS / 1),
            r"labels to be an integer tensor of shape \[N\], but got torch.float",
        ),
        (lambda: evaluation.all_pairs(LABELS[None]), r"labels to be an .* shape \[N\], but got .* of shape \[1, 4\]"),
        (lambda: evaluation.all_pairs([0, 1]), r"labels to be an integer tensor of shape \[N\], but got list"),
        (lambda: evaluation.top_k(ROWS, ROWS[:, :2], 1), "one number of features, but got 3 and 2"),
        (lambda: evaluation.top_k(ROWS, ROWS.to("meta"), 1), "to be on one device, but got cpu and meta"),
        (lambda: evaluation.top_k(ROWS, ROWS[:0], 1), "expected gallery to have entries, but it is empty"),
        (lambda: evaluation.top_k(ROWS, ROWS, 5), "k to be .* between 1 and the size of the gallery, 4, but got 5"),
        (lambda: evaluation.top_k(ROWS, ROWS, 1.0), "expected k to be a whole number .*, but got 1.0"),
        (lambda: evaluation.top_k(ROWS, ROWS, torch.ones(2)), r"k to be .*, but got torch.float32 of shape \[2\]"),
        (lambda: evaluation.top_k(ROWS, ROWS, 1, block=-1), "block to be a whole number of at least 1, but got -1"),
        (lambda: _identify(probe_labels=LABELS[:2]), r"probe_labels to be an .* of shape \[4\], but got .* \[2\]"),
        (lambda: _identify(gallery_labels=LABELS / 0), "gallery_labels to be an integer .* got torch.float32"),
        (lambda: _identify(probe_labels=LABELS / 0), "probe_labels to be an integer .* got torch.float32"),
        (
            lambda: _identify(gallery_labels=LABELS + 9),
            "probes whose class is in the gallery, but none of the 4 probes",
        ),
        (lambda: _identify(probes=ROWS[:0], probe_labels=LABELS[:0]), "in the gallery, but none of the 0 probes"),
        (lambda: _identify(gallery=ROWS[:0], gallery_labels=LABELS[:0]), "gallery to have entries, but it is empty"),
        (lambda: _identify(ranks=(0,)), "ranks to be a whole number of at least 1, but got 0"),
        (lambda: _identify(ranks=(1, 2.5)), "ranks to be a whole number of at least 1, but got 2.5"),
        (lambda: _identify(ranks=5), r"ranks to be a sequence of whole numbers such as \(1, 5\), but got 5"),
        (lambda: _identify(ranks=()), r"ranks to be a sequence of whole numbers such as \(1, 5\), but got \(\)"),
        (lambda: _identify(block="all"), "block to be a whole number of at least 1, but got 'all'"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_the_package_has_evaluation_without_importing_it():
    """numpy and scikit-learn stay out of `import torchmargin`."""
    program = """
import sys
import torch  # imports numpy by itself
before = set(sys.modules)
import torchmargin
assert "evaluation" in dir(torchmargin)
new = set(sys.modules) - before
assert not [name for name in new if name.startswith(("sklearn", "torchmargin.evaluation"))], new
print(torchmargin.evaluation.verify.__name__)
try:
    torchmargin.evaluations
except AttributeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "verify\nmodule 'torchmargin' has no attribute 'evaluations'\n", ran.stderr
