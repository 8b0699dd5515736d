"""Heads as their authors' programs compute them, written out from what those do, on materialised logits in float64.

Not from this library's formulas: angles are taken apart by sines and cosines as there, the hard classes found by masks,
sub-centers by a maximum of a reshaped matrix. Where a program does something that this library does not reproduce the
function says so, and the rows of these tests keep clear of it. Values and gradients; what two runs in float64 may
differ by is measured on the program (rounding.monte_carlo).
"""

import math

import pytest
import torch
from torch.nn import functional as tf

import torchmargin
from torchmargin import compat

from conftest import gradients
from rounding import assert_within, monte_carlo

D, C, B = 8, 17, 12
GAP = 1e-4  # of every cosine to every threshold


def _cosines(x, weight, centers=1):
    cosine = tf.linear(tf.normalize(x), tf.normalize(weight))
    return cosine.reshape(len(x), -1, centers).max(2).values


def _own(cosine, y):
    return cosine.gather(1, y[:, None])


def _cos_of_sum(cosine, angle):
    """cos(theta + angle) for theta in [0, pi]."""
    return cosine * math.cos(angle) - (1 - cosine * cosine).sqrt() * math.sin(angle)


def _with_own(logits, y, own):
    return torch.where(tf.one_hot(y, logits.shape[1]).bool(), own, logits)


def curricularface(x, weight, y, t, m=0.5, s=64.0, momentum=0.01, centers=1):
    """HuangYG123/CurricularFace, head/metrics.py, CurricularFace: the loss and the next t."""
    cosine = _cosines(x, weight, centers)
    own = _own(cosine, y)
    with_margin = _cos_of_sum(own, m)
    hard = cosine > with_margin
    past_pi = own <= math.cos(math.pi - m)
    t = (momentum * own.detach().mean() + (1 - momentum) * t).float().double()  # its buffer
    logits = torch.where(hard, cosine * (t + cosine), cosine)
    logits = _with_own(logits, y, torch.where(past_pi, own - m * math.sin(math.pi - m), with_margin))
    return tf.cross_entropy(s * logits, y), t


def mv_softmax(x, weight, y, kind, m, t=0.2, s=32.0):
    """xiaoboCASIA/SV-X-Softmax, fc_layers.py, MV-AM and MV-Arc with easy_margin (its default)."""
    cosine = _cosines(x, weight)
    own = _own(cosine, y)
    with_margin = own - m if kind == "am" else _cos_of_sum(own, m)
    logits = torch.where(cosine > with_margin, (1 + t) * cosine + t, cosine)
    return tf.cross_entropy(s * _with_own(logits, y, torch.where(own > 0, with_margin, own)), y)


def insightface(x, weight, y, margins, threshold, s=64.0):
    """deepinsight/insightface, arcface_torch/losses.py, CombinedMarginLoss: cosines above the threshold, but the own
    one, are multiplied by 0; ArcFace's margin is added without a gradient of its own."""
    _, m2, m3 = margins
    cosine = _cosines(x, weight)
    filtered = torch.where((cosine > threshold) & ~tf.one_hot(y, C).bool(), 0.0 * cosine, cosine)
    own = _own(filtered, y)
    if m3 > 0:
        own = own - m3
    else:
        own = own + ((own.detach().arccos() + m2).cos() - own.detach())
    return tf.cross_entropy(s * _with_own(filtered, y, own), y)


def inter_top_k(x, weight, y, m=0.2, s=32.0, centers=3, mp=0.06, k=5, easy=False, lm=False):
    """wenet-e2e/wespeaker, models/projections.py, ArcMarginProduct_intertopk_subcenter after update(m). (The cosine of
    a hard class nearer than its margin falls again there: theta_j - mp may be negative.)"""
    cosine = _cosines(x, weight, centers)
    own = _own(cosine, y)
    with_margin = _cos_of_sum(own, m)
    if easy:
        with_margin = torch.where(own > 0, with_margin, own)
    else:
        with_margin = torch.where(own > math.cos(math.pi - m), with_margin, own - (1 + math.cos(math.pi - m)))
    logits = cosine
    if not lm:
        places = (cosine - 2 * tf.one_hot(y, cosine.shape[1])).topk(k).indices
        hardest = torch.zeros_like(cosine).scatter(1, places, 1.0).bool()
        assert (cosine[hardest] < math.cos(mp * m / 0.2)).all()
        logits = torch.where(hardest, _cos_of_sum(cosine, -mp * m / 0.2), cosine)
    return tf.cross_entropy(s * _with_own(logits, y, with_margin), y)


def _g(cosine, t):
    return 2 * ((cosine + 1) / 2) ** t - 1


def sphereface2(x, weight, y, bias, kind, m=0.2, s=32.0, t=3, share=0.7):
    """wenet-e2e/wespeaker, models/projections.py, SphereFace2."""
    cosine = _cosines(x, weight)
    if kind == "A":
        near = cosine > math.cos(math.pi - m)
        positive = _g(torch.where(near, _cos_of_sum(cosine, m), cosine - (1 + math.cos(math.pi - m))), t)
        negative = _g(_cos_of_sum(cosine, -m), t)
    else:
        positive, negative = _g(cosine, t) - m, _g(cosine, t) + m
    of_own = share * torch.log(1 + torch.exp(-(s * positive + bias)))
    of_others = (1 - share) * torch.log(1 + torch.exp(s * negative + bias))
    return torch.where(tf.one_hot(y, C).bool(), of_own, of_others).sum(1).mean()


def opensphere_c(x, weight, y, bias, m=0.4, r=40.0, t=3.0, share=0.7, lw=50.0):
    """ydwen/opensphere, model/head/sphereface2.py, type C: the value. Its gradient is that of the plain cosine (g is
    straight-through), which this library does not have; types A and M have a margin on the own class alone."""
    cosine, one_hot = _cosines(x, weight), tf.one_hot(y, C).double()
    logits = r * (_g(cosine, t) - m * (2 * one_hot - 1)) + bias
    weights = lw * C / r * (share * one_hot + (1 - share) * (1 - one_hot))
    return tf.binary_cross_entropy_with_logits(logits, one_hot, weight=weights)


def uniface(x, weight, y, bias, m=0.4, s=64.0):
    """CVI-SZU/UniFace, head.py, Unified_Cross_Entropy_Loss with l = r = 1. It clamps logits to [-s, s], where the loss
    stops; no row here comes that far."""
    cosine = _cosines(x, weight)
    own, others = s * (cosine - m) - bias, s * cosine - bias
    one_hot = tf.one_hot(y, C).bool()
    assert (own[one_hot] > -s).all()
    others = others.clamp(min=-s, max=s)
    return torch.where(one_hot, torch.log(1 + torch.exp(-own)), torch.log(1 + torch.exp(others))).sum(1).mean()


def _batch(weight, centers, thresholds, least=-0.9):
    """Rows at all angles to their class, none with a cosine next to a threshold or to another of its row."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    y = torch.randint(0, C, (B,), generator=generator)
    x = draw(B, D)
    for _ in range(500):
        # Nearer than chance, from almost at the class's first center to almost opposite it.
        pull = torch.linspace(max(-1.5, 2 * least), 1.5, B, dtype=torch.float64)[:, None]
        rows = tf.normalize(x) + pull * tf.normalize(weight[y * centers])
        cosine = _cosines(rows, weight, centers)
        own = _own(cosine, y)
        limits = torch.cat([limit(own).expand(B, 1) for limit in thresholds], 1)
        near = (cosine[:, :, None] - limits[:, None]).abs().flatten(1).amin(1) < GAP
        near |= (cosine.sort(1).values.diff(dim=1) < GAP).any(1)
        near |= _cosines(rows, weight).reshape(B, C, centers).sort(2).values.diff(dim=2).lt(GAP).flatten(1).any(1)
        near |= (cosine.abs() > 0.9).any(1) | (own.squeeze(1) < least)
        if not near.any():
            return rows.requires_grad_(), y
        x = torch.where(near[:, None], draw(B, D), x)
    raise AssertionError("no such rows")


def _compare(ours, theirs, x, y, weight, bias=None):
    """Of a loss module and a program's function of (x, weight, bias)."""
    others = [] if bias is None else [bias]

    def run():
        value = theirs(x, weight, *others)
        return value, *gradients(value, x, weight, *others)

    expected, bounds = monte_carlo(run)
    value = ours(x, y)
    of_ours = [] if bias is None else [ours.bias]
    for got, true, bound in zip((value, *gradients(value, x, ours.weight, *of_ours)), expected, bounds):
        assert true.abs().max() > 0
        # Theirs take 1 from a softmax weight near 1, inside of one operation: monte_carlo does not see what is lost.
        # Ours drop what a weight of 1e-22 adds: csrc/math/logit.h.
        lost = 8 * torch.finfo(torch.float64).eps + math.exp(-50)
        assert_within(got, true, 2 * bound + lost * true.abs().max())


def _weight(centers=1):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(C * centers, D, dtype=torch.float64, generator=generator).requires_grad_()


def _made(make, weight, **options):
    loss = make(D, C, **options).double()
    with torch.no_grad():
        loss.weight.copy_(weight)
    return loss


@pytest.mark.parametrize("centers", [1, 3])
def test_curricularface(centers):
    """Three steps: t starts at 0 and moves before it is used."""
    weight = _weight(centers)
    ours = _made(torchmargin.CurricularFaceLoss, weight, sub_centers=centers)
    x, y = _batch(weight.detach(), centers, [lambda own: _cos_of_sum(own, 0.5)])
    t = 0.0
    for _ in range(3):
        _, after = curricularface(x, weight, y, t, centers=centers)
        _compare(ours, lambda x, w, t=t: curricularface(x, w, y, t, centers=centers)[0], x, y, weight)
        t = after
        torch.testing.assert_close(ours.t, t.float(), rtol=1e-6, atol=0)
    assert t.abs() > 0 and torch.equal(ours.t.double(), t)


def test_curricularface_when_t_is_large():
    """As late in training."""
    weight = _weight()
    ours = _made(torchmargin.CurricularFaceLoss, weight).eval()
    x, y = _batch(weight.detach(), 1, [lambda own: _cos_of_sum(own, 0.5)])
    ours.t.fill_(0.625)
    _compare(ours, lambda x, w: curricularface(x, w, y, 0.625, momentum=0.0)[0], x, y, weight)


@pytest.mark.parametrize(("kind", "margin"), [("am", 0.35), ("arc", 0.5)])
def test_mv_softmax(kind, margin):
    weight = _weight()
    of_own = (lambda own: own - margin) if kind == "am" else (lambda own: _cos_of_sum(own, margin))
    x, y = _batch(weight.detach(), 1, [of_own])
    ours = _made(torchmargin.MVSoftmaxLoss, weight, kind=kind, margin=margin)
    _compare(ours, lambda x, w: mv_softmax(x, w, y, kind, margin), x, y, weight)


@pytest.mark.parametrize("threshold", [0.4, 0.1])
@pytest.mark.parametrize("name", ["arcface", "cosface", "combined"])
def test_insightfaces_filter(name, threshold):
    weight = _weight()
    margins = {"arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4), "combined": (1.0, 0.5, 0.0)}[name]
    x, y = _batch(weight.detach(), 1, [lambda own: torch.full_like(own, threshold)])
    make = getattr(compat, f"insightface_{name}")
    ours = _made(make, weight, interclass_filtering_threshold=threshold)
    _compare(ours, lambda x, w: insightface(x, w, y, margins, threshold), x, y, weight)
    assert make(D, C, interclass_filtering_threshold=0.0).interclass_filter is None
    with pytest.raises(ValueError, match="interclass_filtering_threshold or interclass_filter, which are one"):
        make(D, C, interclass_filtering_threshold=0.4, interclass_filter=0.4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"K": 1, "k_top": 1},
        {"K": 2, "k_top": C - 1, "margin": 0.3},
        {"easy_margin": True},
        {"do_lm": True, "margin": 0.5},
        {"margin": 0.0},
    ],
    ids=str,
)
def test_wespeakers_inter_top_k_and_sub_centers(options):
    given = {"K": 3, "k_top": 5, "margin": 0.2, "easy_margin": False, "do_lm": False, **options}
    weight = _weight(given["K"])
    x, y = _batch(weight.detach(), given["K"], [lambda own: torch.full_like(own, 2.0)])
    ours = _made(compat.wespeaker_arc_margin_intertopk_subcenter, weight, **options)
    of_program = {"m": given["margin"], "centers": given["K"], "k": given["k_top"]}
    of_program |= {"easy": given["easy_margin"], "lm": given["do_lm"]}
    _compare(ours, lambda x, w: inter_top_k(x, w, y, **of_program), x, y, weight)


@pytest.mark.parametrize("kind", ["C", "A"])
def test_wespeakers_sphereface2(kind):
    weight, bias = _weight(), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    x, y = _batch(weight.detach(), 1, [lambda own: torch.full_like(own, 2.0)])
    ours = _made(compat.wespeaker_sphereface2, weight, margin_type=kind)
    with torch.no_grad():
        ours.bias.copy_(bias)
    _compare(ours, lambda x, w, b: sphereface2(x, w, y, b, kind), x, y, weight, bias)


def test_openspheres_sphereface2():
    """The value: lw / r of ours."""
    weight, bias = _weight(), torch.tensor(-3.0, dtype=torch.float64)
    x, y = _batch(weight.detach(), 1, [lambda own: torch.full_like(own, 2.0)])
    ours = _made(torchmargin.SphereFace2Loss, weight, scale=40.0, margin=0.4)
    with torch.no_grad():
        ours.bias.copy_(bias)
    expected, bounds = monte_carlo(lambda: opensphere_c(x, weight, y, bias))
    assert_within(50 / 40 * ours(x, y), expected[0], 2 * bounds[0])


def test_uniface():
    """Its bias has the other sign and starts at ln(10 C)."""
    weight = _weight()
    ours = _made(torchmargin.UniFaceLoss, weight)
    assert ours.bias.item() == pytest.approx(-math.log(10 * C), rel=1e-6)
    bias = -ours.bias.detach().clone()
    x, y = _batch(weight.detach(), 1, [lambda own: torch.full_like(own, 2.0)], least=-0.45)
    bias.requires_grad_()

    def theirs(x, w, b):
        return uniface(x, w, y, -b, s=64.0)

    _compare(ours, theirs, x, y, weight, (-bias).detach().requires_grad_())


def test_wespeakers_other_heads():
    weight = _weight()
    x, y = _batch(weight.detach(), 1, [lambda own: torch.full_like(own, 2.0)])

    def arc(x, w, easy):
        return inter_top_k(x, w, y, centers=1, easy=easy, lm=True)

    _compare(_made(compat.wespeaker_arc_margin, weight), lambda x, w: arc(x, w, False), x, y, weight)
    _compare(_made(compat.wespeaker_arc_margin, weight, easy_margin=True), lambda x, w: arc(x, w, True), x, y, weight)

    def add(x, w):
        cosine = _cosines(x, w)
        return tf.cross_entropy(32.0 * _with_own(cosine, y, _own(cosine, y) - 0.2), y)

    _compare(_made(compat.wespeaker_add_margin, weight), add, x, y, weight)

    def sphere(x, w, step):
        """SphereProduct with its margin of 4: cos(4 theta) by its formula, the sign by the quarter of pi."""
        cosine = _cosines(x, w)
        own = _own(cosine, y)
        quarter = (4 * own.detach().arccos() / math.pi).floor()
        psi = (-1.0) ** quarter * (8 * own**4 - 8 * own**2 + 1) - 2 * quarter
        weight_of_margin = 1 / (1 + max(5.0, 1000.0 / (1 + 0.12 * step)))
        logits = _with_own(cosine, y, own + weight_of_margin * (psi - own))
        return tf.cross_entropy(x.norm(dim=1, keepdim=True) * logits, y)

    ours = _made(compat.wespeaker_sphere, weight)
    for step in (1, 2):
        _compare(ours, lambda x, w, step=step: sphere(x, w, step), x, y, weight)


def test_wespeakers_weights():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3 * C, D, generator=generator)
    model = {
        "projection.weight": weight,
        "seg_1.weight": torch.zeros(4, 4),
        "bias": torch.zeros(9),
    }  # of something else
    for state in ({"weight": weight}, model):
        ours = compat.wespeaker_arc_margin_intertopk_subcenter(D, C)
        missing = ours.load_state_dict(compat.from_wespeaker(state), strict=False)
        assert not missing.unexpected_keys and torch.equal(ours.weight, weight)
    ours = compat.wespeaker_sphereface2(D, C)
    state = {"projection.weight": weight[:C], "projection.bias": torch.full((1, 1), 0.5)}
    ours.load_state_dict(compat.from_wespeaker(state), strict=False)
    assert ours.bias.item() == 0.5 and ours.bias.dim() == 0
    for bad, text in (
        ({"kernel": weight}, r"'projection.weight' or 'weight', but got the keys \['kernel'\]"),
        ({"weight": weight[0]}, r"to have shape \[C, D\], but got \[8\]"),
        ({"weight": weight, "bias": torch.zeros(4)}, r"SphereFace2's bias, one number, but got shape \[4\]"),
    ):
        with pytest.raises(ValueError, match=text):
            compat.from_wespeaker(bad)
    with pytest.raises(ValueError, match="expected margin_type to be 'C' or 'A', but got 'M'"):
        compat.wespeaker_sphereface2(D, C, margin_type="M")
