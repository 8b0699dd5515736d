"""Detection costs, AS-norm and lists of trials and enrolments, beside scikit-learn and plain loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import det_curve
from torch.utils._python_dispatch import TorchDispatchMode

from torchmargin import evaluation

from rounding import assert_within

EPS = torch.finfo(torch.float64).eps


def _trials(pairs=300, ties=False):
    same = torch.rand(pairs) < 0.3
    scores = torch.randn(pairs, dtype=torch.float64) + 1.5 * same
    return (scores * 2).round() / 2 if ties else scores, same


def _brute_force(scores, same, p_target, c_miss, c_fa):
    """Every score, and one above all, as a threshold."""
    best = math.inf, None
    for threshold in [math.inf, *sorted(set(scores.tolist()), reverse=True)]:
        accepted = scores >= threshold
        p_miss = (same & ~accepted).sum().item() / same.sum().item()
        p_fa = (~same & accepted).sum().item() / (~same).sum().item()
        cost = (c_miss * p_miss * p_target + c_fa * p_fa * (1 - p_target)) / min(
            c_miss * p_target, c_fa * (1 - p_target)
        )
        if cost < best[0] - 16 * EPS:
            best = cost, threshold
    return best


PARAMETERS = [
    (0.01, 1.0, 1.0),
    (0.05, 1.0, 1.0),
    (0.01, 10.0, 1.0),
    (0.001, 1.0, 1.0),
    (0.5, 1.0, 1.0),
    (0.9, 1.0, 3.0),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_min_dcf_is_the_least_of_all_thresholds(parameters, ties):
    p_target, c_miss, c_fa = parameters
    scores, same = _trials(ties=ties)
    found = evaluation.min_dcf(scores, same, p_target=p_target, c_miss=c_miss, c_fa=c_fa)
    cost, threshold = _brute_force(scores, same, *parameters)
    # Two rates, three products, a sum and a quotient.
    assert found.cost == pytest.approx(cost, abs=16 * EPS * (1 + cost)) and found.threshold == threshold
    # scikit-learn's error trade-off has no "accept none".
    false_alarms, misses, _ = det_curve(same, scores)
    costs = c_miss * p_target * misses + c_fa * (1 - p_target) * false_alarms
    least = min(c_miss * p_target, c_fa * (1 - p_target))
    assert found.cost == pytest.approx(min(1.0, costs.min() / least), abs=16 * EPS)


def test_min_dcf_by_hand():
    """Of 2 targets and 4 others; at 0.7 one target is missed: 0.01 * 0.5 / 0.01; at 0.5 one of four is accepted."""
    scores, same = torch.tensor([0.9, 0.5, 0.6, 0.3, 0.2, 0.1]), torch.tensor([1, 1, 0, 0, 0, 0])
    assert evaluation.min_dcf(scores, same) == (0.5, pytest.approx(0.9))
    cost, threshold = evaluation.min_dcf(scores, same, p_target=0.5)
    assert cost == pytest.approx(0.25) and threshold == pytest.approx(0.5)


def test_min_dcf_of_ties_by_hand():
    """With p_target 0.5 the cost is P_miss + P_fa, exact here."""
    # Were the pair of twos taken apart, all would be right.
    assert evaluation.min_dcf([3, 2, 2, 1], [1, 1, 0, 0], p_target=0.5) == (0.5, 3.0)
    # 0.5 at the thresholds 4 and 2, of which the highest counts.
    assert evaluation.min_dcf([4, 3, 2, 1], [1, 0, 1, 0], p_target=0.5) == (0.5, 4.0)


def test_min_dcf_at_its_ends():
    same = torch.tensor([1, 1, 0, 0])
    assert evaluation.min_dcf(torch.tensor([4.0, 3.0, 2.0, 1.0]), same) == (0.0, 3.0)
    assert evaluation.min_dcf(torch.tensor([1.0, 1.0, 1.0, 1.0]), same) == (1.0, math.inf)
    assert evaluation.min_dcf(torch.tensor([1.0, 2.0, 3.0, 4.0]), same) == (1.0, math.inf)
    # Where refusing is the dearer mistake, useless scores have all accepted.
    assert evaluation.min_dcf(torch.tensor([1.0, 2.0, 3.0, 4.0]), same, p_target=0.9) == (1.0, 1.0)
    assert evaluation.min_dcf(np.array([1, 2, 3, 4]), np.array([-1, -1, 1, 1])).cost == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_target": 0.0}, r"p_target in \(0, 1\), but got 0.0"),
        ({"p_target": 1}, r"p_target in \(0, 1\), but got 1"),
        ({"p_target": math.nan}, r"p_target in \(0, 1\), but got nan"),
        ({"p_target": "0.01"}, r"p_target in \(0, 1\), but got '0.01'"),
        ({"c_miss": 0.0}, "c_miss to be finite and positive, but got 0.0"),
        ({"c_fa": math.inf}, "c_fa to be finite and positive, but got inf"),
        ({"c_fa": True}, "c_fa to be finite and positive, but got True"),
        ({"c_miss": 10**400}, "c_miss to be finite and positive, but got 1000"),
        ({"p_target": True}, r"p_target in \(0, 1\), but got True"),
        (
            {"p_target": 1e-300, "c_miss": 1e-300},
            r"c_miss \* p_target and .* above 0, but got 0 and 1",
        ),
    ],
)
@pytest.mark.parametrize("cost", [evaluation.min_dcf, evaluation.act_dcf])
def test_costs_that_are_none_are_refused(cost, options, message):
    with pytest.raises(ValueError, match=message):
        cost(*_trials(), **options)


def test_min_dcf_takes_numpys_numbers():
    scores, same = _trials()
    expected = evaluation.min_dcf(scores, same, p_target=0.25, c_miss=2, c_fa=3)
    given = {"p_target": np.float32(0.25), "c_miss": np.int64(2), "c_fa": np.float64(3)}
    assert evaluation.min_dcf(scores, same, **given) == expected


@pytest.mark.parametrize("cost", [evaluation.min_dcf, evaluation.act_dcf])
def test_costs_have_verifys_gate(cost):
    scores, same = _trials()
    with pytest.raises(ValueError, match="expected scores to be finite"):
        cost(scores / 0, same)
    with pytest.raises(ValueError, match="pairs of one class and of two"):
        cost(scores[same], same[same])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_act_dcf_is_the_cost_at_a_threshold(parameters, ties):
    options = dict(zip(("p_target", "c_miss", "c_fa"), parameters))
    scores, same = _trials(ties=ties)
    least = evaluation.min_dcf(scores, same, **options)
    # The same two rates, quotients of the same counts, in the same formula.
    assert evaluation.act_dcf(scores, same, threshold=least.threshold, **options) == least.cost
    costs = [evaluation.act_dcf(scores, same, threshold=at, **options) for at in [math.inf, *scores.tolist()]]
    assert min(costs) == least.cost
    p_target, c_miss, c_fa = parameters
    of_miss, of_false = c_miss * p_target, c_fa * (1 - p_target)
    none, everything = (evaluation.act_dcf(scores, same, threshold=at, **options) for at in (math.inf, -math.inf))
    assert (none, everything) == (of_miss / min(of_miss, of_false), of_false / min(of_miss, of_false))


def test_act_dcf_takes_bayes_threshold_of_log_likelihood_ratios():
    """By hand: log 99 = 4.595 lies between the scores 4.59 and 4.60, log (9 / 2) = 1.504 between 1.5 and 1.51."""
    same = torch.tensor([1, 1, 0, 0])
    scores = torch.tensor([4.60, 4.59, -3.0, 4.59], dtype=torch.float64)
    assert evaluation.act_dcf(scores, same) == 0.5
    assert evaluation.act_dcf(scores[[0, 1, 2, 0]], same) == pytest.approx(0.5 + 0.5 * 99)
    scores = torch.tensor([1.51, 1.5, 1.5, 1.51], dtype=torch.float64)
    # (2 * 0.1 / 2 + 0.9 / 2) / 0.2
    assert evaluation.act_dcf(scores, same, p_target=0.1, c_miss=2) == pytest.approx(2.75)
    # A score at the threshold, log 1 = 0, is accepted.
    assert evaluation.act_dcf([0, 0, -1, -1], same, p_target=0.5) == 0


@pytest.mark.parametrize("threshold", [math.nan, "0", True, torch.tensor(0.0)])
def test_act_dcf_refuses_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match="expected threshold to be a number, but got "):
        evaluation.act_dcf(*_trials(), threshold=threshold)


# ---- AS-norm --------------------------------------------------------------------------------------------------------


def _speech(rows=40, cohort=60, features=16, dtype=torch.float64):
    embeddings, others = (torch.randn(count, features, dtype=torch.float64).to(dtype) for count in (rows, cohort))
    first, second = torch.randint(0, rows, (2, 50))
    return 3 * embeddings, first, second, 0.5 * others


def _as_norm(embeddings, first, second, cohort, top):
    """A pair at a time, in numpy: the score, the size of its larger half, and the smaller of its deviations."""
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    rows, others = unit(embeddings.double().numpy()), unit(cohort.double().numpy())
    found = []
    for a, b in zip(first.tolist(), second.tolist()):
        score, halves, deviations = rows[a] @ rows[b], [], []
        for side in (a, b):
            nearest = np.sort(others @ rows[side])[::-1][:top]
            halves.append((score - nearest.mean()) / nearest.std())
            deviations.append(nearest.std())
        found.append((sum(halves) / 2, max(map(abs, halves)), min(deviations)))
    return torch.tensor(found, dtype=torch.float64).T


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("top", [2, 20, 60, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_norm_is_that_of_a_loop(dtype, top, block):
    given = _speech(dtype=dtype)
    found = evaluation.as_norm(*given, top=top, block=block)
    expected, half, deviation = _as_norm(*given, top or 60)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A cosine of two unit rows of 16 features, each good to some features / 2 + 3 roundings, is off by at most
    # c = (16 + 2 (16 / 2 + 3)) u = 38 u; so are the k-th largest and a mean, and a deviation too (it is a norm of what
    # is off by c, over the root of their number, and centring makes nothing longer). A half (s - mean) / deviation
    # then moves by (2 + |half|) c / deviation, and the result is rounded once. In float64 the reference rounds too.
    u = torch.finfo(found.dtype).eps / (1 if dtype == torch.float64 else 2)
    assert_within(found, expected, 38 * u * (2 + half) / deviation + u * expected.abs())


def test_shifts_and_gains_of_a_channel_drop_out():
    """What the normalisation is for: two enrolments whose scores differ by their scale compare after it."""
    embeddings, first, second, cohort = _speech()
    plain = evaluation.as_norm(embeddings, first, second, cohort, top=10)
    swapped = evaluation.as_norm(embeddings, second, first, cohort, top=10)
    longer = evaluation.as_norm(7 * embeddings, first, second, 0.1 * cohort, top=10)
    torch.testing.assert_close(plain, swapped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, longer, rtol=1e-10, atol=1e-10)


def test_no_pairs_have_no_scores():
    embeddings, first, second, cohort = _speech()
    assert evaluation.as_norm(embeddings, first[:0], second[:0], cohort, top=10).shape == (0,)
    with pytest.raises(ValueError, match="cohort to be finite"):
        evaluation.as_norm(embeddings, first[:0], second[:0], cohort / 0, top=10)


@pytest.mark.parametrize("second_dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("first_dtype", [torch.uint8, torch.int16])
def test_as_norm_takes_indices_of_every_kind(first_dtype, second_dtype):
    """uint8 used to select rows as a mask."""
    embeddings, first, second, cohort = _speech()
    expected = evaluation.as_norm(embeddings, first, second, cohort, top=10)
    found = evaluation.as_norm(embeddings, first.to(first_dtype), second.to(second_dtype), cohort, top=10)
    assert torch.equal(found, expected)


def test_a_hand_computed_score():
    """Cosines with the cohort 1, 0 of one side, 0.6, 0.8 of the other, and 0.6 between them."""
    embeddings = torch.tensor([[2.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    score = evaluation.as_norm(embeddings, torch.tensor([0]), torch.tensor([1]), torch.eye(2).double(), top=2)
    # (0.6 - 0.5) / 0.5 and (0.6 - 0.7) / 0.1; 38 u as above, of 2 features: 10 u of each cosine.
    assert_within(score, torch.tensor([(0.2 - 1.0) / 2], dtype=torch.float64), 2 * 10 * EPS * (2 + 1) / 0.1)


@pytest.mark.parametrize("top", [10, None])
def test_statistics_are_made_once_for_each_embedding_in_blocks(top):
    """Every product is of at most `block` x `block`, and all of them together are of the rows that pairs have."""
    embeddings, _, _, cohort = _speech()
    first, second = torch.tensor([3, 3, 3, 8, 5, 3]).repeat(20), torch.tensor([8, 5, 3, 3, 3, 21]).repeat(20)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                products.append((len(args[0]), args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    with Products():
        evaluation.as_norm(embeddings, first, second, cohort, top=top, block=3)
    passes = 2 if top is None else 1  # the mean, and then the deviation
    assert sum(rows * columns for rows, columns in products) == passes * 4 * 60
    assert max(max(product) for product in products) == 3


def test_as_norm_keeps_no_graph():
    embeddings, first, second, cohort = _speech()
    assert not evaluation.as_norm(embeddings.requires_grad_(), first, second, cohort, top=10).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": torch.randn(60, 8)}, "cohort to have 16 features on cpu, as embeddings, but got 8 on cpu"),
        ({"cohort": torch.randn(16)}, "cohort to be a floating-point tensor of shape"),
        ({"cohort": torch.full((60, 16), math.nan)}, "cohort to be finite"),
        ({"cohort": torch.ones(60, 16)}, "cohort cosines that differ, but those of row 0 of embeddings are all alike"),
        ({"top": 61}, "top to be a whole number between 1 and the size of the cohort, 60, but got 61"),
        ({"top": 0}, "top to be a whole number between 1 and the size of the cohort, 60, but got 0"),
        ({"top": 1}, "at least 2 cohort embeddings for a standard deviation, but got 1"),
        ({"cohort": torch.randn(1, 16), "top": None}, "at least 2 cohort embeddings for a standard deviation"),
        ({"top": True}, "top to be a whole number between 1 and the size of the cohort, 60, but got True"),
        ({"top": 2.5}, "top to be a whole number between 1 and the size of the cohort, 60, but got 2.5"),
        (
            {"cohort": torch.ones(0, 16), "top": None},
            "at least 2 cohort embeddings for a standard deviation, but got 0",
        ),
        ({"cohort": [1.0]}, "cohort to be a floating-point tensor of shape .*, but got list"),
        ({"block": 0}, "block to be a whole number of at least 1"),
        ({"block": 2.5}, "block to be a whole number of at least 1, but got 2.5"),
        ({"first": torch.tensor([40])}, "first to hold indices of the 40 rows"),
        ({"second": torch.tensor([-1])}, r"second to hold indices of the 40 rows, .* first is second\[0\] = -1"),
        ({"second": torch.tensor([True])}, "second to hold indices, but got torch.bool"),
        ({"first": torch.tensor([0.0])}, "first to be an integer tensor of shape"),
        ({"first": torch.tensor([0, 1])}, "expected first and second to have one length, but got 2 and 1"),
        ({"embeddings": torch.zeros(3)}, "embeddings to be a floating-point tensor of shape"),
        ({"embeddings": torch.full((40, 16), math.inf)}, "embeddings to be finite, but 40 of 40 rows hold NaN"),
        ({"embeddings": torch.zeros(40, 16)}, "those of row 0 of embeddings are all alike"),
    ],
)
def test_as_norm_refuses_bad_arguments(change, message):
    embeddings, _, _, cohort = _speech()
    given = {"embeddings": embeddings, "first": torch.tensor([0]), "second": torch.tensor([1]), "cohort": cohort}
    with pytest.raises(ValueError, match=message):
        evaluation.as_norm(**{**given, "top": 10, **change})


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_voxcelebs_list(tmp_path):
    """The format of VoxCeleb1-O, -E, -H and of VoxSRC's validation lists."""
    path = tmp_path / "veri_test2.txt"
    path.write_text(
        "1 id10270/5r0dWxy17C8/00001.wav id10270/8jEAjG6SegY/00008.wav\n"
        "0 id10270/5r0dWxy17C8/00001.wav id10300/ize_eiCFEg0/00003.wav\n"
    )
    pairs = evaluation.read_pairs(path, label_first=True)
    assert pairs[0] == ("id10270/5r0dWxy17C8/00001.wav", "id10270/8jEAjG6SegY/00008.wav", True)
    assert pairs[1] == ("id10270/5r0dWxy17C8/00001.wav", "id10300/ize_eiCFEg0/00003.wav", False)


def test_kaldis_list(tmp_path):
    (tmp_path / "trials").write_text("id00800 id00800-singing-01-005 target\nid00800 id00801-drama-02-001 nontarget\n")
    assert evaluation.read_pairs(tmp_path / "trials") == [
        ("id00800", "id00800-singing-01-005", True),
        ("id00800", "id00801-drama-02-001", False),
    ]


def test_cn_celebs_lists(tmp_path):
    """trials.lst names enrolments, enroll.lst their files; enroll.map has several for each."""
    (tmp_path / "trials.lst").write_text(
        "id00800-enroll test/id00800-singing-01-005.wav 1\nid00800-enroll test/id00801-drama-02-001.wav 0\n"
    )
    (tmp_path / "enroll.lst").write_text("id00800-enroll enroll/id00800-enroll.wav\n")
    (tmp_path / "enroll.map").write_text(
        "id00800-enroll id00800/singing-01-001.wav id00800/singing-01-002.wav\n\nid00801-enroll id00801/a.wav\n"
        "id00800-enroll id00800/drama-01-001.wav\n"
    )
    pairs = evaluation.read_pairs(tmp_path / "trials.lst")
    assert [pair.same for pair in pairs] == [True, False] and pairs[0].first == "id00800-enroll"
    assert evaluation.read_enrolment(tmp_path / "enroll.lst") == {"id00800-enroll": ["enroll/id00800-enroll.wav"]}
    assert evaluation.read_enrolment(tmp_path / "enroll.map") == {
        "id00800-enroll": ["id00800/singing-01-001.wav", "id00800/singing-01-002.wav", "id00800/drama-01-001.wav"],
        "id00801-enroll": ["id00801/a.wav"],
    }


def test_several_files_are_pooled_to_the_direction_of_their_unit_mean():
    """What docs/evaluation.md does with an enrolment list: each file is a medium of its speaker."""
    files, owner = torch.randn(5, 16, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1])
    rows = torch.nn.functional.normalize(files)
    pooled, numbers = evaluation.pool_templates(rows, owner, torch.arange(5))
    means = torch.stack([rows[:3].mean(0), rows[3:].mean(0)])
    expected = torch.nn.functional.normalize(means)
    # A mean of 3: 3 roundings; then a norm of 16 squares, its root and a quotient; one more to spare, on both sides.
    size = rows.abs().max() / means.norm(dim=1).min()
    assert_within(pooled, expected, EPS * (4 + 16 / 2 + 2) * size)
    assert numbers.tolist() == [0, 1]


def test_names_with_blanks_and_lines_without_files(tmp_path):
    (tmp_path / "tabs").write_text("A. Speaker\tone file.wav\ttwo.wav\n")
    assert evaluation.read_enrolment(tmp_path / "tabs") == {"A. Speaker": ["one file.wav", "two.wav"]}
    (tmp_path / "bad").write_text("a a.wav\nb\n")
    with pytest.raises(ValueError, match="bad:2: expected 'name file ...', but got 'b'"):
        evaluation.read_enrolment(tmp_path / "bad")
