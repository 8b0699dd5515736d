"""Verification and identification against scikit-learn and against counting by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from torchmargin import evaluation


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
        torch.testing.assert_close(evaluation.pair_scores(x, first, second, block=block), expected)
    assert evaluation.pair_scores(x.half(), first, second).dtype == torch.float32


def test_verification_agrees_with_counting():
    scores, same = _scored()
    scores = (scores * 4).round() / 4  # many ties
    result = evaluation.verify(scores, same, far=(0.0, 0.01, 0.1))
    assert result.auc == pytest.approx(roc_auc_score(same.numpy(), scores.numpy()))
    for rate, tar in result.tar.items():
        accepted = [t for t in scores.unique().tolist() if (scores[~same] >= t).double().mean() <= rate]
        assert tar == pytest.approx(max(((scores[same] >= t).double().mean().item() for t in accepted), default=0.0))
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
        assert right(threshold, others) == pytest.approx(best)
        assert accuracy == pytest.approx(right(threshold, fold))
    assert result.mean == pytest.approx(np.mean(result.accuracy))
    assert result.deviation == pytest.approx(np.std(result.accuracy))


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
        torch.testing.assert_close(values, expected.values)
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
    assert result.threshold[0.0] == pytest.approx(1.25**-0.5)
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
    with pytest.raises(ValueError, match=r"veri.txt:1: expected 'first second label' with label 0 or 1, but got"):
        evaluation.read_pairs(voxceleb)
    lfw.write_text("10 300\nAbel 1\n")
    with pytest.raises(ValueError, match="pairs.txt:2: expected 'name i j' or 'name i other j', but got 'Abel 1'"):
        evaluation.read_lfw_pairs(lfw)


SCORES, SAME = torch.rand(4), torch.tensor([True, False, True, False])
ROWS, LABELS = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: evaluation.verify(SCORES, SAME[:3]), r"vectors of one length, but got shapes \[4\] and \[3\]"),
        (lambda: evaluation.verify(SCORES / 0 * 0, SAME), "expected scores to be numbers, but 4 of them are NaN"),
        (lambda: evaluation.verify(SCORES, SAME | True), "pairs of one class and of two, but all 4 pairs are alike"),
        (lambda: evaluation.verify(SCORES, SAME, far=(2.0,)), r"false accept rates in \[0, 1\], but got 2.0"),
        (lambda: evaluation.kfold_accuracy(SCORES, SAME, folds=5), "between 2 and the number of pairs, 4, but got 5"),
        (lambda: evaluation.pair_scores(ROWS[0], LABELS, LABELS), r"expected embeddings to be a floating-point tensor"),
        (lambda: evaluation.pair_scores(ROWS, LABELS, LABELS[:2]), "first and second to be index vectors of one"),
        (lambda: evaluation.top_k(ROWS, ROWS[:, :2], 1), "one number of features, but got 3 and 2"),
        (lambda: evaluation.top_k(ROWS, ROWS, 5), "expected k between 1 and the size of the gallery, 4, but got 5"),
        (lambda: evaluation.identify(ROWS, LABELS[:2], ROWS, LABELS), r"probe_labels to have shape \[4\], but got"),
        (lambda: evaluation.identify(ROWS, LABELS, ROWS, LABELS + 9), "some probes whose class is in the gallery"),
        (lambda: evaluation.identify(ROWS, LABELS, ROWS, LABELS, ranks=(0,)), "expected ranks of at least 1"),
        (lambda: evaluation.identify(ROWS, LABELS, ROWS, LABELS, fpir=(-1.0,)), "false positive rates in"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
