"""Other libraries' numbers: pytorch-metric-learning as installed, InsightFace's steps written out."""

import math
import warnings

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch.nn import functional as tf

import torchmargin
from torchmargin import compat

from conftest import gradients
from rounding import assert_within, monte_carlo

FEATURES, CLASSES = 8, 17
PML = {
    "arcface": (compat.pml_arcface, lambda: pml.ArcFaceLoss(CLASSES, FEATURES)),
    "arcface, 20 degrees": (
        lambda d, c: compat.pml_arcface(d, c, margin=20.0, scale=30.0),
        lambda: pml.ArcFaceLoss(CLASSES, FEATURES, margin=20.0, scale=30.0),
    ),
    "cosface": (compat.pml_cosface, lambda: pml.CosFaceLoss(CLASSES, FEATURES)),
    "sphereface": (compat.pml_sphereface, lambda: pml.SphereFaceLoss(CLASSES, FEATURES)),
    "sphereface, a margin of 3.7": (
        lambda d, c: compat.pml_sphereface(d, c, margin=3.7),
        lambda: pml.SphereFaceLoss(CLASSES, FEATURES, margin=3.7),
    ),
    "large margin softmax, a margin of 2.5": (
        lambda d, c: compat.pml_large_margin_softmax(d, c, margin=2.5),
        lambda: pml.LargeMarginSoftmaxLoss(CLASSES, FEATURES, margin=2.5),
    ),
    "large margin softmax": (compat.pml_large_margin_softmax, lambda: pml.LargeMarginSoftmaxLoss(CLASSES, FEATURES)),
    "normalized softmax": (compat.pml_normalized_softmax, lambda: pml.NormalizedSoftmaxLoss(CLASSES, FEATURES)),
    "sub-centers": (
        compat.pml_subcenter_arcface,
        lambda: pml.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=FEATURES),
    ),
    "two sub-centers, 20 degrees": (
        lambda d, c: compat.pml_subcenter_arcface(d, c, margin=20.0, scale=30.0, sub_centers=2),
        lambda: pml.SubCenterArcFaceLoss(
            num_classes=CLASSES, embedding_size=FEATURES, margin=20.0, scale=30.0, sub_centers=2
        ),
    ),
}


def _batch():
    return torch.randn(12, FEATURES, dtype=torch.float64, requires_grad=True), torch.randint(0, CLASSES, (12,))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # their scipy call
@pytest.mark.parametrize("name", PML)
def test_pytorch_metric_learning(name):
    """Loss and gradients to embeddings and weights. Theirs divide by sin(theta): their roundings bound both sides'."""
    make, make_theirs = PML[name]
    theirs = make_theirs().double()
    with torch.no_grad():
        theirs.W.normal_()
    ours = make(FEATURES, CLASSES).double().eval()
    missing = ours.load_state_dict(compat.from_pytorch_metric_learning(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"step"}
    x, y = _batch()

    def their_results():
        value = theirs(x, y)
        of_x, of_weight = gradients(value, x, theirs.W)
        return value, of_x, of_weight.T, theirs.get_logits(x)

    loss = ours(x, y)
    expected, bounds = monte_carlo(their_results)
    for got, true, bound in zip((loss, *gradients(loss, x, ours.weight), ours.logits(x)), expected, bounds):
        # What a softmax weight of 1e-22 adds is dropped here: csrc/math/logit.h.
        assert_within(got, true, 2 * bound + math.exp(-50) * true.abs().max())


@pytest.mark.parametrize("threshold", [75, 40])
def test_outliers_of_pytorch_metric_learning(threshold):
    theirs = pml.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=FEATURES).double()
    ours = compat.pml_subcenter_arcface(FEATURES, CLASSES).double()
    ours.load_state_dict(compat.from_pytorch_metric_learning(theirs.state_dict()), strict=False)
    x, y = torch.randn(400, FEATURES, dtype=torch.float64), torch.randint(0, CLASSES - 1, (400,))
    outliers, centers = theirs.get_outliers(x, y, threshold=threshold)
    got_outliers, got_centers = compat.pml_get_outliers(ours, x, y, threshold=threshold)
    assert 0 < len(outliers) < 400 and torch.equal(got_outliers, outliers)
    # Of the last class, which has no rows, theirs is whatever was in memory.
    assert torch.equal(got_centers[:, :-1], centers[:, :-1])
    assert torch.equal(got_centers[:, -1], ours.weight[3 * (CLASSES - 1)])


def _insightface(x, weight, y, scale, m1, m2, m3, least=1e-30):
    """arcface_torch's partial FC on one rank, since 2022-12: the logits and the loss, from the facts.

    Cosines are clamped. m1 = 1 and m3 = 0: the angle of the target plus m2, its cosine without a gradient of its own
    (the gradient of the cosine passes through). Else m3 > 0: the target's cosine minus m3, and m1, m2 are not looked
    at. Else an error. A label of -1 has no target. The loss is the mean over all rows of -log(max(p, least)), 0 being
    the p of a row without a target; its gradient to the logits is written by hand, (softmax - one-hot) / rows, and
    knows nothing of that bound.
    """
    cosine = tf.linear(tf.normalize(x), tf.normalize(weight)).clamp(-1, 1)
    known = y >= 0
    target = cosine[known, y[known]]
    if m1 == 1 and m3 == 0:
        with torch.no_grad():
            change = (target.arccos() + m2).cos() - target
    else:
        assert m3 > 0
        change = torch.full_like(target, -m3)
    one_hot = tf.one_hot(y.clamp(min=0), cosine.shape[1]).to(x.dtype) * known[:, None]
    logits = scale * cosine.index_put((known, y[known]), target + change)
    p = (logits.detach().softmax(1) * one_hot).sum(1)
    value = -p.clamp(min=least).log().mean()
    surrogate = (logits * (logits.detach().softmax(1) - one_hot)).sum() / len(y)
    return value + surrogate - surrogate.detach()


@pytest.mark.parametrize(
    ("make", "margins"),
    [
        (compat.insightface_arcface, (1.0, 0.5, 0.0)),
        (compat.insightface_cosface, (1.0, 0.0, 0.4)),
        (compat.insightface_combined, (1.0, 0.5, 0.0)),
        (lambda d, c: compat.insightface_combined(d, c, m2=0.0, m3=0.4), (1.0, 0.0, 0.4)),
        (lambda d, c: compat.insightface_combined(d, c, m2=0.3, m3=0.2), (1.0, 0.3, 0.2)),
        (lambda d, c: compat.insightface_combined(d, c, m1=0.9, m2=0.4, m3=0.15), (0.9, 0.4, 0.15)),
    ],
)
@pytest.mark.filterwarnings("ignore:insightface_combined. InsightFace's CombinedMarginLoss ignores m1:UserWarning")
def test_insightface(make, margins):
    shards = [torch.randn(9, FEATURES), torch.randn(8, FEATURES)]
    ours = make(FEATURES, CLASSES)
    ours.load_state_dict(compat.from_insightface(shards))
    ours.double()
    x, y = _batch()
    with torch.no_grad():
        x[0] = 0.1 * tf.normalize(x[0], dim=0) - tf.normalize(ours.weight[y[0]], dim=0)  # theta + margin past pi
    weight = torch.cat(shards).double().requires_grad_()
    loss = ours(x, y)

    def their_results():
        value = _insightface(x, weight, y, 64.0, *margins, least=0.0)  # their bound of 69 is not reproduced
        return value, *gradients(value, x, weight)

    expected, bounds = monte_carlo(their_results)
    for got, true, bound in zip((loss, *gradients(loss, x, ours.weight)), expected, bounds):
        assert_within(got, true, 2 * bound)


def test_insightface_combines_nothing():
    with pytest.warns(UserWarning, match=r"\(1, 0.3, 0.2\) is CosFace with a margin of 0.2; the paper's") as caught:
        ours = compat.insightface_combined(FEATURES, CLASSES, m1=1.0, m2=0.3, m3=0.2).double()
    assert len(caught) == 1 and caught[0].filename == __file__
    cosface = compat.insightface_cosface(FEATURES, CLASSES, margin=0.2).double()
    cosface.load_state_dict(ours.state_dict(), strict=False)
    x, y = _batch()
    assert torch.equal(ours(x, y), cosface(x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is ignored in these
        compat.insightface_combined(FEATURES, CLASSES)
        compat.insightface_combined(FEATURES, CLASSES, m2=0.0, m3=0.4)


@pytest.mark.parametrize("margins", [(0.9, 0.4, 0.0), (1.35, 0.0, 0.0), (1.0, 0.5, -0.1)])
def test_what_insightface_raises_at_is_refused(margins):
    m1, m2, m3 = margins
    with pytest.raises(ValueError, match=r"expected m3 > 0, or m1 = 1 and m3 = 0, .* but got \(.*\); the paper's"):
        compat.insightface_combined(FEATURES, CLASSES, m1=m1, m2=m2, m3=m3)


def test_rows_without_a_class_in_insightface():
    """docs/migrating.md: ignore_index leaves them out; their partial FC pushes them away from every class."""
    x, y = _batch()
    unknown = torch.tensor([1, 5, 6])
    y[unknown] = -1
    ours = compat.insightface_arcface(FEATURES, CLASSES, scale=16.0, ignore_index=-1).double()
    known = y >= 0

    def their_results():
        theirs = _insightface(x, ours.weight, y, 16.0, 1.0, 0.5, 0.0)
        kept = _insightface(x[known], ours.weight, y[known], 16.0, 1.0, 0.5, 0.0)
        return theirs, kept, *gradients(theirs, x, ours.weight)

    (theirs, kept, *their_gradients), (of_theirs, of_kept, *of_gradients) = monte_carlo(their_results)
    assert_within(ours(x, y), kept, 2 * of_kept)
    assert_within(theirs, (kept * 9 - 3 * math.log(1e-30)) / 12, of_theirs + 2 * of_kept)
    assert -math.log(1e-30) == pytest.approx(69.08, abs=5e-3)  # two decimals are printed

    # The recipe of docs/migrating.md.
    other_lse, target_logit, *_ = torchmargin.functional.linear_margin_lse(
        x, ours.weight, y, scale=16.0, m2=0.5, margin_gradient="straight_through"
    )
    rows = torch.where(y < 0, other_lse, torch.logaddexp(torch.zeros_like(other_lse), other_lse - target_logit))
    got = gradients(rows.mean(), x, ours.weight)
    for ours_grad, true, bound in zip(got, their_gradients, of_gradients):
        assert true.abs().max() > 0.1
        assert_within(ours_grad, true, 2 * bound)
    # It pushes: a step against the gradient lowers the row's largest logits.
    stepped = ours.logits(x.detach() - 1e-3 * got[0])[unknown].logsumexp(1)
    assert (stepped < ours.logits(x)[unknown].logsumexp(1)).all()


def test_insightface_shards_in_all_their_forms():
    bare = [torch.randn(9, FEATURES), torch.randn(8, FEATURES)]
    whole = torch.cat(bare)
    states = [{"weight": shard} for shard in bare]
    checkpoints = [{"epoch": 3, "state_dict_softmax_fc": state} for state in states]
    for shards in (bare, states, checkpoints):
        assert torch.equal(compat.from_insightface(shards)["weight"], whole)
    for shard in (bare[0], states[0]):
        assert torch.equal(compat.from_insightface(shard)["weight"], bare[0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: compat.from_pytorch_metric_learning({"weight": torch.zeros(2, 2)}), r"with one weight 'W'.*\['weight"),
        (lambda: compat.from_pytorch_metric_learning({"W": torch.zeros(2)}), r"expected W to have shape \[D, C\]"),
        (lambda: compat.from_insightface([]), "expected at least one shard"),
        (lambda: compat.from_insightface([{"bias": 1}]), r"expected shard 0 to hold 'weight' or .* keys \['bias'\]"),
        (lambda: compat.from_insightface([torch.zeros(3)]), r"weight of shard 0 to have shape .* got \[3\]"),
        (
            lambda: compat.from_insightface([torch.zeros(3, 4), torch.zeros(3, 5)]),
            r"one number of features, but got \[4, 5\]",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_prefix_is_dropped():
    weight = torch.randn(FEATURES, CLASSES)
    assert torch.equal(compat.from_pytorch_metric_learning({"head.W": weight})["weight"], weight.T)
