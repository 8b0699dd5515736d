"""Other libraries' numbers: pytorch-metric-learning as installed, InsightFace's steps written out."""

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch.nn import functional as tf

from torchmargin import compat

FEATURES, CLASSES = 8, 17
PML = {
    "arcface": (compat.pml_arcface, lambda: pml.ArcFaceLoss(CLASSES, FEATURES)),
    "arcface, 20 degrees": (
        lambda d, c: compat.pml_arcface(d, c, margin=20.0, scale=30.0),
        lambda: pml.ArcFaceLoss(CLASSES, FEATURES, margin=20.0, scale=30.0),
    ),
    "cosface": (compat.pml_cosface, lambda: pml.CosFaceLoss(CLASSES, FEATURES)),
    "sphereface": (compat.pml_sphereface, lambda: pml.SphereFaceLoss(CLASSES, FEATURES)),
    "large margin softmax": (compat.pml_large_margin_softmax, lambda: pml.LargeMarginSoftmaxLoss(CLASSES, FEATURES)),
    "normalized softmax": (compat.pml_normalized_softmax, lambda: pml.NormalizedSoftmaxLoss(CLASSES, FEATURES)),
}


def _batch():
    return torch.randn(12, FEATURES, dtype=torch.float64, requires_grad=True), torch.randint(0, CLASSES, (12,))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # their scipy call
@pytest.mark.parametrize("name", PML)
def test_pytorch_metric_learning(name):
    """Loss and gradients to embeddings and weights. Their arccos is of a cosine rounded to float64: 1e-8 near 0."""
    make, make_theirs = PML[name]
    theirs = make_theirs().double()
    with torch.no_grad():
        theirs.W.normal_()
    ours = make(FEATURES, CLASSES).double().eval()
    missing = ours.load_state_dict(compat.from_pytorch_metric_learning(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"step"}
    x, y = _batch()
    loss, expected = ours(x, y), theirs(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)
    got = torch.autograd.grad(loss, (x, ours.weight))
    true = torch.autograd.grad(expected, (x, theirs.W))
    torch.testing.assert_close(got[0], true[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[1], true[1].T, rtol=1e-6, atol=1e-7)


def _insightface(x, weight, y, scale, m2, m3):
    """arcface_torch's partial FC and margins since 2022-12, step by step, on one rank."""
    logits = tf.linear(tf.normalize(x), tf.normalize(weight)).clamp(-1, 1)
    rows = torch.arange(len(y))
    if m2:
        with torch.no_grad():
            target = logits[rows, y].arccos()
            logits.arccos_()
            logits[rows, y] = target + m2
            logits.cos_()
    else:
        logits = logits.index_put((rows, y), logits[rows, y] - m3)
    return tf.cross_entropy(logits * scale, y)


@pytest.mark.parametrize(
    ("make", "m2", "m3"),
    [
        (compat.insightface_arcface, 0.5, 0.0),
        (compat.insightface_cosface, 0.0, 0.4),
        (compat.insightface_combined, 0.5, 0.0),
        (lambda d, c: compat.insightface_combined(d, c, m2=0.0, m3=0.4), 0.0, 0.4),
    ],
)
def test_insightface(make, m2, m3):
    shards = [torch.randn(9, FEATURES), torch.randn(8, FEATURES)]
    ours = make(FEATURES, CLASSES)
    ours.load_state_dict(compat.from_insightface(shards))
    ours.double()
    x, y = _batch()
    with torch.no_grad():
        x[0] = -ours.weight[y[0]]  # theta + margin past pi
    weight = torch.cat(shards).double().requires_grad_()
    expected = _insightface(x, weight, y, 64.0, m2, m3)
    loss = ours(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)
    got = torch.autograd.grad(loss, (x, ours.weight))
    for ours_grad, true in zip(got, torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(ours_grad, true, rtol=1e-6, atol=1e-7)


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
