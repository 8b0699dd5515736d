"""Evaluation as the face literature has it: thresholds of a grid, IJB's templates, rates by the nearest place."""

import math

import numpy as np
import pytest
import torch

from torchmargin import evaluation


def _pairs(count=400, seed=0):
    """Cosines of pairs, of which those of one class are larger by about as much as they scatter."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(count, generator=generator) < 0.5
    scores = (0.25 * torch.randn(count, generator=generator, dtype=torch.float64) + 0.3 * same).clamp(-1, 1)
    return scores, same


def _by_counting(scores, same, folds):
    """Squared distances below a threshold are accepted; the first of the best on the others counts."""
    distances = [2 - 2 * float(score) for score in scores]
    grid = [0.01 * step for step in range(400)]
    count = len(scores)
    sizes = [count // folds + (fold < count % folds) for fold in range(folds)]
    accuracies, thresholds, start = [], [], 0
    for size in sizes:
        fold = range(start, start + size)
        others = [place for place in range(count) if place not in fold]
        right = [sum((distances[k] < t) == bool(same[k]) for k in others) for t in grid]
        best = grid[right.index(max(right))]
        thresholds.append(1 - best / 2)
        accuracies.append(sum((distances[k] < best) == bool(same[k]) for k in fold) / size)
        start += size
    mean = sum(accuracies) / folds
    return mean, math.sqrt(sum((each - mean) ** 2 for each in accuracies) / folds), thresholds


@pytest.mark.parametrize(("seed", "count", "folds"), [(0, 400, 10), (1, 333, 10), (2, 60, 4)])
def test_thresholds_of_the_grid(seed, count, folds):
    scores, same = _pairs(count, seed)
    found = evaluation.kfold_accuracy(scores, same, folds=folds, thresholds="insightface")
    mean, deviation, thresholds = _by_counting(scores, same, folds)
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.deviation == pytest.approx(deviation, abs=1e-12)
    assert found.threshold == pytest.approx(thresholds, abs=1e-12)
    assert evaluation.kfold_accuracy(scores, same, folds=folds).threshold != found.threshold


def test_a_distance_on_the_grid_is_refused():
    # Cosine 0.5 is the squared distance 1, which is on the grid: below 1.01, but not below 1.
    scores = torch.tensor([0.5, 0.5, 0.495, 0.495], dtype=torch.float64)
    same = torch.tensor([True, True, False, False])
    found = evaluation.kfold_accuracy(scores[[0, 2, 1, 3]], same[[0, 2, 1, 3]], folds=2, thresholds="insightface")
    assert found.threshold == pytest.approx([0.495, 0.495])
    assert found.mean == 1.0


def test_the_grid_wants_cosines_and_a_name_that_there_is():
    scores, same = _pairs()
    with pytest.raises(ValueError, match="scores to be cosines .* but got 2"):
        evaluation.kfold_accuracy(scores * 2 / scores.abs().max(), same, thresholds="insightface")
    with pytest.raises(ValueError, match='thresholds to be "exact" or "insightface", but got \'grid\''):
        evaluation.kfold_accuracy(scores, same, thresholds="grid")


def test_the_threshold_of_a_rate_is_the_lowest_that_keeps_it():
    scores, same = _pairs(2000)
    found = evaluation.verify(scores, same, far=(0.1, 0.01, 0.0))
    for rate, threshold in found.threshold.items():
        accepted = scores >= threshold
        assert (accepted & ~same).sum() / (~same).sum() <= rate
        assert (accepted & same).sum() / same.sum() == pytest.approx(found.tar[rate])
        lower = scores[scores < threshold].max()
        assert ((scores >= lower) & ~same).sum() / (~same).sum() > rate
    none = evaluation.verify(torch.tensor([0.9, 0.1]), torch.tensor([False, True]), far=(0.0,))
    assert none.threshold[0.0] == math.inf and none.tar[0.0] == 0.0


def test_the_nearest_rate_may_lie_above():
    # Accepted in this order: same, other, same, other, other, same.
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    same = torch.tensor([True, False, True, False, False, True])
    nearest = evaluation.tar_nearest(scores, same, far=(0.0, 0.3, 0.4, 0.6, 1.0))
    assert nearest == pytest.approx({0.0: 1 / 3, 0.3: 2 / 3, 0.4: 2 / 3, 0.6: 2 / 3, 1.0: 1.0})
    kept = evaluation.verify(scores, same, far=(0.3,))
    assert kept.tar[0.3] == pytest.approx(1 / 3)  # 1/3 of the others is more than 0.3


def test_templates_by_hand():
    embeddings = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, 4.0], [5.0, 5.0], [3.0, 0.0]])
    templates = torch.tensor([7, 7, 7, 2, 2])
    media = torch.tensor([1, 1, 9, 1, 1])  # a number is of a medium in its own template alone
    pooled, numbers = evaluation.pool_templates(embeddings, templates, media)
    assert numbers.tolist() == [2, 7]
    # Template 7: the mean of the first two, (2, 1), and (0, 4). Template 2: the mean of (5, 5) and (3, 0).
    wanted = np.array([[4.0, 2.5], [2.0, 5.0]])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled, wanted, rtol=1e-6)
    weighted, _ = evaluation.pool_templates(
        embeddings, templates, media, weights=torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    )
    wanted = np.array([[1.0, 1.0], [1.5, 2.0]])  # the mean counts images without a weight too
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(weighted, wanted, rtol=1e-6)


def test_templates_in_any_order_and_dtype():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    templates, media = (torch.randint(0, 6, (50,), generator=generator) for _ in range(2))
    pooled, numbers = evaluation.pool_templates(embeddings, templates, media)
    assert pooled.dtype == torch.float64
    for row, number in zip(pooled, numbers):
        own = templates == number
        total = sum(embeddings[own & (media == each)].mean(0) for each in media[own].unique())
        torch.testing.assert_close(row, total / total.norm())
    order = torch.randperm(50, generator=generator)
    again, _ = evaluation.pool_templates(embeddings[order], templates[order].int(), media[order])
    torch.testing.assert_close(again, pooled)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"embeddings": torch.zeros(3)}, "embeddings to be a floating-point tensor of shape"),
        ({"templates": torch.tensor([1, 2])}, r"templates to be an integer tensor of shape \[3\]"),
        ({"media": torch.tensor([1.0, 2.0, 3.0])}, r"media to be an integer tensor of shape \[3\]"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "weights to be finite .* none negative"),
        ({"weights": torch.tensor([1, 1, 1])}, "weights to be finite floating-point"),
        ({"embeddings": torch.full((3, 2), torch.nan)}, "embeddings to be finite"),
    ],
)
def test_bad_templates_are_refused(change, text):
    good = {"embeddings": torch.ones(3, 2), "templates": torch.tensor([1, 1, 2]), "media": torch.tensor([1, 2, 3])}
    arguments = {**good, **change}
    weights = arguments.pop("weights", None)
    with pytest.raises(ValueError, match=text):
        evaluation.pool_templates(**arguments, weights=weights)
