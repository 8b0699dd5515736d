"""The modules: the same numbers as the published heads, and good nn.Modules."""

import copy
import io
import math
import pickle

import pytest
import torch
from pytorch_metric_learning import losses as pml

import torchmargin

import oracle


def _embeddings(dtype=torch.float64):
    return torch.randn(12, 8, dtype=dtype, requires_grad=True), torch.randint(0, 17, (12,))


def test_normalized_softmax_matches_its_paper():
    loss = torchmargin.NormalizedSoftmaxLoss(8, 17, scale=20.0, dtype=torch.float64)
    x, y = _embeddings()
    expected = oracle.normalized_softmax(x, loss.weight, y, 20.0).mean()
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            torchmargin.ArcFaceLoss(8, 17, scale=64.0, margin=math.radians(28.6), dtype=torch.float64),
            pml.ArcFaceLoss(17, 8, margin=28.6, scale=64),
        ),
        (
            torchmargin.NormalizedSoftmaxLoss(8, 17, scale=20.0, dtype=torch.float64),
            pml.NormalizedSoftmaxLoss(17, 8, temperature=0.05),
        ),
    ],
)
def test_agrees_with_pytorch_metric_learning(ours, theirs):
    """Their weights are [D, C]. They clamp the cosine a little within 1, hence not to the last digit."""
    theirs = theirs.double()
    with torch.no_grad():
        theirs.W.copy_(ours.weight.T)
    x, y = _embeddings()
    loss, expected = ours(x, y), theirs(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    got, true = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0]
    torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


LOSSES = [torchmargin.ArcFaceLoss, torchmargin.NormalizedSoftmaxLoss]


@pytest.mark.parametrize("Loss", LOSSES)
def test_is_a_good_module(Loss):
    loss = Loss(8, 17, label_smoothing=0.1)
    x, y = _embeddings(torch.float32)
    expected = loss(x, y)
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    loaded = Loss(8, 17, label_smoothing=0.1)
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loaded):
        assert torch.equal(other(x, y), expected)
    assert loss.double()(x.double(), y).dtype == torch.float64
    assert "in_features=8, num_classes=17, scale=64" in repr(loss)
    assert set(loss.state_dict()) == {"weight"}


@pytest.mark.parametrize("Loss", LOSSES)
def test_logits_are_those_of_the_loss_without_a_margin(Loss):
    loss = Loss(8, 17, dtype=torch.float64)
    x, y = _embeddings()
    lse = torchmargin.functional.linear_margin_lse(x, loss.weight, torch.full_like(y, -1), scale=64.0).other_lse
    torch.testing.assert_close(loss.logits(x).logsumexp(1), lse)


def test_trains():
    torch.manual_seed(3)
    loss = torchmargin.ArcFaceLoss(8, 5, scale=16.0, margin=0.2)
    x = torch.nn.Parameter(torch.randn(40, 8))
    y = torch.arange(40) % 5
    optimiser = torch.optim.SGD([x, *loss.parameters()], lr=1.0, momentum=0.9)
    values = []
    for _ in range(60):
        value = loss(x, y)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.2 * values[0]
    assert (loss.logits(x).argmax(1) == y).float().mean() > 0.95


def test_refuses_degrees_and_bad_sizes():
    with pytest.raises(ValueError, match="radians, not degrees: at most pi in size, but got 28.6"):
        torchmargin.ArcFaceLoss(8, 17, margin=28.6)
    with pytest.raises(ValueError, match="expected in_features and num_classes to be positive, but got 8 and 0"):
        torchmargin.ArcFaceLoss(8, 0)
