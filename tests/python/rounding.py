"""What rounding may do to results and gradients: the tests' tolerances.

First order and worst case: n roundings of at most u each move a sum by at most n u times the sum of its terms' sizes
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). In float64 the library and its reference both
round: their difference has 2 u. In float32, and for 16-bit inputs, only the library's products and sums count: its
target pass and what it makes of a row's sums are float64 (docs/numerics.md), and so is the reference.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


def unit_roundoff(dtype):
    """Of what the library computes in, for inputs of `dtype`; twice that where the reference rounds as well."""
    return torch.finfo(torch.float64).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2


def stored(expected, dtype):
    """How far a float64 number moves when it is rounded once to `dtype`, at most; 0 is rounded up to a subnormal."""
    info = torch.finfo(dtype)
    return expected.detach().abs() * info.eps / 2 + info.smallest_normal * info.eps


def assert_within(got, expected, bound, what=""):
    """Every element is nearer to what is expected than its bound. NaN is near nothing, an infinity to itself."""
    got, expected = got.detach().double(), expected.detach().double()
    error = torch.where(got == expected, 0.0, (got - expected).abs())
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)
    far = ~(error <= bound)
    worst = (error / bound)[far]
    assert not len(worst), f"{what} {len(worst)} of {far.numel()} are off, by up to {worst.max():.3g} bounds"


class LinearRounding:
    """Bounds for the linear ops on one problem; without targets `y` they have no margin.

    Attributes, each [B]: `logit` of another class, `lse` of the others, `target` logit with its margin, `total` of all
    logits, `sine` of the angle; `angle`, a number.
    `operands`: the unit roundoff of both operands of the logits' products, of 16 bits on a GPU; for results and losses.
    """

    def __init__(
        self, x, w, y=None, b=None, *, scale=1.0, m1=1.0, m2=0.0, m3=0.0, normalize_input=True, normalize_weight=True,
        operands=0.0, **_,
    ):  # fmt: skip
        wide, u = x.dtype == torch.float64, unit_roundoff(x.dtype)
        x, w = x.detach().double(), w.detach().double()
        (rows, features), classes = x.shape, len(w)
        x_norm, w_norm = x.norm(dim=1), w.norm(dim=1)
        one = torch.ones_like(x_norm)
        alpha = one if normalize_input else x_norm
        beta = 1.0 if normalize_weight else w_norm.max()
        inverse = lambda norm: torch.where(norm > 0, 1 / norm, 0.0)  # noqa: E731  (a zero row has no gradient)
        # float32 sums over rows and classes go by tiles, of 128 or more where there are thousands.
        added = lambda terms: terms if wide else min(terms, 256 + terms / 128)  # noqa: E731
        # The largest a row's logits are, and a bound of psi, its slopes and its angle under every extension.
        size = scale * alpha * beta + (0.0 if b is None else b.detach().double().abs().max())
        margin = 2 + 2 * m1 + 2 * abs(m2) + abs(m3)
        # A unit vector: its sum of squares, root, reciprocal and product; in float32 the last two.
        unit = features + 8 if wide else 2
        self.logit = (u * (features + 2 * unit + 4) + 2 * operands) * size
        # Not more than 1024 float32 terms are added in float32. exp and log are good to some u.
        self.lse = self.logit + u * ((classes if wide else min(classes, 1024)) + 8 * (1 + size))
        self.target = (margin * self.logit if wide else 0.0) + 4 * u * margin * size
        self.angle = u * (4 * unit + 16)
        self.total = classes * (self.logit + (u * classes * size if wide else 0.0)) + self.target

        # The softmax weights of the other classes, and which class is a row's own.
        logits = scale * (x * (inverse(x_norm) if normalize_input else one)[:, None]) @ (
            w * (inverse(w_norm) if normalize_weight else torch.ones_like(w_norm))[:, None]
        ).T + (0.0 if b is None else b.detach().double())
        target = torch.full((rows,), -1) if y is None else y
        self._is_own = (torch.arange(classes) == target[:, None]).double()
        self._softmax = logits.masked_fill(self._is_own.bool(), -torch.inf).softmax(1).nan_to_num(0.0)
        self._flushed = math.exp(-50)  # smaller softmax weights are 0 (docs/design.md)
        # sin(theta): a tangent is a difference of two unit vectors over it; there is none closer than 2^-50 (1 stands).
        unit_x, own = torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)[target.clamp(0, classes - 1)]
        delta, sigma = (unit_x - own).norm(dim=1), (unit_x + own).norm(dim=1)
        parallel = (torch.minimum(delta, sigma) <= 2.0**-50) | (target < 0) | (target >= classes)
        self.sine = torch.where(parallel, 1.0, delta * sigma / 2)
        # A tangent plane's projection doubles what is projected.
        self._of_input = scale * beta * (2 * inverse(x_norm) if normalize_input else one)
        self._of_weight = scale * (2 * inverse(w_norm) if normalize_weight else torch.ones_like(w_norm))
        self._alpha, self._classes = alpha, classes
        # Relative errors of a gradient's parts: a product of a softmax weight, which has twice the error of a
        # log-sum-exp, and a vector; a sum of them over classes or rows; the target's slope times its tangent.
        self._sum = u * (added(classes) + added(rows) + features + 2 * unit)
        self._others = 2 * self.lse + self._sum
        self._own = margin * u * ((2 * unit + 16) / self.sine + rows if wide else 0 * self.sine + 2.0)
        self._margin, self._size = margin, size

    def results(self):
        """Of linear_margin_lse's."""
        return self.lse, self.target, self.total, self.angle, self.logit

    def gradients(self, others, own, total=0.0, factor_error=0.0):
        """Of input, weight and bias, from the upstream gradients [B] of other_lse, target_logit and logit_sum.

        `factor_error`: a relative error [B] of these themselves.
        """
        others, own, total = (torch.as_tensor(g).detach().double().abs() + 0 * self._size for g in (others, own, total))
        of_others = others * (self._others + factor_error)
        of_own = self._margin * own * (self._own + factor_error) + total * self._own
        of_total = total * (self._sum + factor_error)
        by_class = lambda others, own, total: (  # noqa: E731
            self._softmax.T @ others + self._is_own.T @ (own + total) + total.sum()
        )
        of_input = self._of_input * (of_others + of_own + self._classes * of_total)
        of_weight = self._of_weight * by_class(*(self._alpha * part for part in (of_others, of_own, of_total)))
        of_weight = of_weight + self._of_weight * self._flushed * (self._alpha * others).sum()
        of_bias = by_class(of_others, of_own, of_total) + self._flushed * others.sum()
        return of_input[:, None], of_weight[:, None], of_bias

    def loss(self, label_smoothing=0.0, divisor=None):
        """softplus(o - t) + label_smoothing (t - Z / C) of each row [B], or their sum over a divisor."""
        smoothed = label_smoothing * (self.target + self.total / self._classes)
        u = unit_roundoff(torch.float64)
        rows = self.lse + self.target + smoothed + 8 * u * (1 + self._margin * self._size)
        if divisor is None:
            return rows
        return (rows + u * len(rows) * (2 * self._margin * self._size + self.lse)).sum() / divisor

    def loss_gradients(self, upstream=1.0, label_smoothing=0.0):
        """Of input, weight and bias, from the upstream gradient [B] of each row's loss."""
        upstream = torch.as_tensor(upstream).detach().double().abs() + 0 * self._size
        own, total = (1 + label_smoothing) * upstream, label_smoothing * upstream / self._classes
        # sigmoid(o - t) multiplies all of them and has the error of its argument.
        return self.gradients(upstream, own, total, factor_error=self.lse + self.target)

    def sample_gradients(self, upstream=1.0):
        """Of sample_m2 and sample_m3, from the upstream gradient [B] of each row's loss."""
        upstream = torch.as_tensor(upstream).detach().double().abs()
        return upstream * (self._margin * self._size * (self.lse + self.target) + self.target)

    def logits_gradients(self, upstream):
        """Of input, weight and bias, from the upstream gradient [B, C] of margin_logits."""
        error = upstream.detach().double().abs() * (self._sum + self._is_own * (self._margin * self._own)[:, None])
        of_weight = self._of_weight * (self._alpha @ error)
        return (self._of_input * error.sum(1))[:, None], of_weight[:, None], error.sum(0)


class CosineRounding:
    """Bounds for the ops on given cosines: of `psi`, its `slope` to the cosine, and of the loss of targets `y`."""

    def __init__(self, cosine, y=None, *, scale=1.0, m1=1.0, m2=0.0, m3=0.0, **_):
        self._wide, u = cosine.dtype == torch.float64, unit_roundoff(torch.float64)
        cosine = cosine.detach().double()
        self._margin = 2 + 2 * m1 + 2 * abs(m2) + abs(m3)
        # Some ten roundings make an angle of at most pi, and psi of it; the slope is psi's to the angle over the sine.
        self.psi = 48 * u * self._margin
        self.slope = self.psi / (1 - cosine.square()).clamp(min=0).sqrt()
        if y is None:
            return
        classes = cosine.shape[1]
        rounds = unit_roundoff(torch.float64 if self._wide else torch.float32)
        self._is_own = (torch.arange(classes) == y[:, None]).double()
        self._softmax = (scale * cosine).masked_fill(self._is_own.bool(), -torch.inf).softmax(1)
        self._scale, self._size = scale, scale * cosine.abs().amax(1).clamp(max=2)
        self._others = rounds * ((classes if self._wide else min(classes, 1024)) + 8 * (1 + self._size))
        self._rows = self._others + scale * self.psi + 8 * u * (1 + self._margin * scale)

    def loss(self, label_smoothing=0.0):
        """Of each row, [B]. With smoothing a sum of C logits, in float64, joins."""
        classes = self._softmax.shape[1]
        return self._rows + label_smoothing * (self._rows + unit_roundoff(torch.float64) * classes * self._size)

    def loss_gradient(self, upstream=1.0, label_smoothing=0.0):
        """[B, C]: softmax weights, the own class's slope, and label_smoothing / C."""
        upstream = (torch.as_tensor(upstream).detach().double().abs() + 0 * self._rows)[:, None]
        own = self._margin * self._rows[:, None] + self.slope
        parts = 3 * self._rows[:, None] * (self._softmax + label_smoothing / self._softmax.shape[1])
        return upstream * self._scale * (parts + (1 + label_smoothing) * self._is_own * own.nan_to_num(posinf=0.0))

    def sample_gradients(self, upstream=1.0):
        """Of sample_m2 and sample_m3, from the upstream gradient [B] of each row's loss."""
        return torch.as_tensor(upstream).double().abs() * self._scale * (self._margin * self._rows + self.psi)


class _Perturbed(TorchDispatchMode):
    """Every float64 operation is off by `SIZE` and a random sign, as often as it rounds."""

    SIZE = 2.0**-36  # far above what float64 itself rounds, and its square far below it

    def __init__(self, generator):
        super().__init__()
        self._generator, self.roundings = generator, 0

    def _factor(self, value, times):
        self.roundings += value.numel()
        signs = 2 * torch.randint(0, 2, value.shape, generator=self._generator).double() - 1
        return 1 + torch.where(value == value.round(), 0.0, times * self.SIZE * signs)  # counts and signs are exact

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, writes = kwargs or {}, function._schema.is_mutable
        is_view = any(result.alias_info for result in function._schema.returns) and not writes
        if is_view or function.overloadpacket in (aten.clone, aten.copy_, aten._to_copy):
            return function(*args, **kwargs)
        on_floats = lambda change, tree: tree_map(  # noqa: E731
            lambda v: change(v) if isinstance(v, torch.Tensor) and v.dtype == torch.float64 else v, tree
        )
        result = function(*args, **kwargs)
        if torch.Tag.pointwise not in function.tags and not writes:  # sums: of as many terms as a side is long, or all
            whole = isinstance(result, torch.Tensor) and result.dim() == 0
            terms = lambda v: max(v.numel() if whole else max(v.shape, default=1), 1)  # noqa: E731
            args = on_floats(lambda v: v * self._factor(v, terms(v)), args)
            result = function(*args, **kwargs)
        # Functions of the C library are good to 2 u.
        change = (lambda v: v.mul_(self._factor(v, 2))) if writes else (lambda v: v * self._factor(v, 2))
        return on_floats(change, result)


def monte_carlo(run, dtype=torch.float64):
    """The float64 tensors that `run` returns, and how far the roundings of its ATen operations move each, at most.

    For what LinearRounding does not know: second derivatives, other libraries, networks. Monte Carlo arithmetic
    (Parker, 1997): to first order n roundings |d_i| <= u make an error of sum s_i d_i, which is at most
    u sqrt(n sum s_i^2) (Cauchy and Schwarz); with random signs for the d_i its mean square is sum s_i^2. Of 16 samples
    the mean is less than a sixteenth of that once in ten million. Another run of as many roundings: twice the bound.
    `dtype`: whose u counts, that of the run that is compared.
    """
    generator = torch.Generator().manual_seed(11)
    values = [value.detach() for value in tree_leaves(run())]
    squares = [torch.zeros_like(value) for value in values]
    for _ in range(16):
        with _Perturbed(generator) as perturbed:
            results = tree_leaves(run())
        for square, value, result in zip(squares, values, results):
            square += torch.where(result == value, 0.0, result.detach() - value).square() / 16
    u = torch.finfo(dtype).eps / 2
    return values, [4 * (perturbed.roundings * square).sqrt() * u / perturbed.SIZE for square in squares]
