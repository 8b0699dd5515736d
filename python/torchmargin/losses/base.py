"""What all margin losses have in common: the class weights and the call of the fused op."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self, TypedDict, Unpack

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.losses.numbers import Alias, ClassWeight, Number, check_finite, check_radians, is_number, version_of
from torchmargin.losses.recompute import empty_log, key_of, log_shape
from torchmargin.options import Extension, MarginGradient, Reduction

__all__ = ["CommonOptions", "MarginLoss", "MarginStatistics", "SharedOptions"]


Method = TypeVar("Method", bound=Callable[..., Any])


def stays_in_python(method: Method) -> Method:
    """torch.jit.ignore, which has no types: TorchScript calls the method and does not read it."""
    return cast(Method, torch.jit.ignore(method))


def _is_at_hand(buffer: Tensor) -> bool:
    """Can it be read without waiting for a device?"""
    return buffer.is_cpu


def _values_in_vmap(buffer: Tensor) -> set[float]:
    """Of a buffer that torch.vmap has stacked; none of one with a gradient."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(buffer):
        buffer = functorch.get_unwrapped(buffer)
    if buffer.requires_grad or functorch.is_functorch_wrapped_tensor(buffer):
        return set()
    return set(buffer.flatten().tolist())


def _as_always() -> contextlib.AbstractContextManager[object]:
    """What is made inside can be written to outside of inference mode too."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _spell_signature(cls: type[nn.Module]) -> None:
    """For help() and editors: the keywords of **common spelled out, where a constructor has them."""
    signature = inspect.signature(cls.__init__)
    parameters = list(signature.parameters.values())[1:]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        shared = {"Unpack[CommonOptions]": CommonOptions, "Unpack[SharedOptions]": SharedOptions}
        options = shared.get(str(parameters[-1].annotation))
        if options is not None:
            known = {parameter.name for parameter in parameters}
            parameters[-1:] = [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=getattr(options.__annotations__[name], "__forward_arg__", options.__annotations__[name]),
                )
                for name, default in _COMMON_DEFAULTS.items()
                if name in options.__annotations__ and name not in known
            ]
    cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]


_COMMON_DEFAULTS = {
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "class_weight": None,
    "sub_centers": 1,
    "interclass_filter": None,
    "device": None,
    "dtype": None,
}

# Of an option: a number, or None.
_FILTER: tuple[str, ...] = ("a number", "None")


class SharedOptions(TypedDict, total=False):
    """Keyword arguments that every loss takes, with torch.nn.CrossEntropyLoss's meaning and defaults."""

    label_smoothing: float  # in [0, 1], default 0
    ignore_index: int  # rows with this label count for nothing, default -100
    reduction: Reduction  # "mean" (default), "sum" or "none"
    class_weight: Tensor | None  # [C], CrossEntropyLoss's weight: a row counts as much as its class, default None
    interclass_filter: float | None  # other classes with a larger cosine have logit 0 (InsightFace), default None
    device: torch.device | str | None  # of the weights
    dtype: torch.dtype | None  # of the weights


class CommonOptions(SharedOptions, total=False):
    """The same, and the number of centers, which some losses have a default of their own for."""

    sub_centers: int  # K centers for each class, the nearest of which counts (sub-center ArcFace), default 1


class MarginStatistics(NamedTuple):
    """How training goes: means over the batch's rows, detached 0-dim tensors; ignored rows are left out."""

    target_angle: Tensor  # radians, between an embedding and its class
    accuracy: Tensor  # share of rows whose class has the largest logit, all without a margin
    hardest_negative_logit: Tensor  # the largest logit of another class


class _Call(Protocol):
    """How a loss is called; nn.Module says nothing of it."""

    @overload
    def __call__(self, embeddings: Tensor, labels: Tensor, return_statistics: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(
        self, embeddings: Tensor, labels: Tensor, return_statistics: Literal[True]
    ) -> tuple[Tensor, MarginStatistics]: ...
    @overload
    def __call__(
        self, embeddings: Tensor, labels: Tensor, return_statistics: bool
    ) -> Tensor | tuple[Tensor, MarginStatistics]: ...


class MarginLoss(nn.Module):
    """A classification head and its loss in one module: weights [C, D], never the logits [B, C].

    The base of the published losses, and all that a new one needs: give it the margin, or override
    :meth:`sample_margins` for a margin that differs from row to row, :meth:`negatives` for what happens to the logits
    of other classes, :meth:`advance` for state that moves with training, :meth:`row_penalty` for what is added to a
    row's loss. A loss with ``reads_angle = True`` gets the angle [B] of each row to its class, detached, as a third
    argument of those of the first three that it overrides: no gradient goes through it.

    ``loss(embeddings, labels)`` takes embeddings [B, D] and labels [B] int64 and returns the loss, a
    scalar (or [B] with reduction "none") in float64 for float64 weights and float32 otherwise. With
    ``return_statistics=True`` it returns (loss, :class:`MarginStatistics`) from the same sweep over
    the classes. Bad parameters and inputs raise RuntimeError, ValueError or TypeError; a label outside [0, C)
    that is not ``ignore_index`` raises IndexError.

    The constructor's parameters are attributes that may be set at any time: they are checked, count from the
    next call on, and the numbers that make the logits are part of the state_dict, as 0-dim float64 tensors. A
    state_dict without them leaves them as they are. Margins may change at every step under torch.compile; a new
    ``scale`` or ``m1`` compiles again, and so do a new ``hardest_margin`` and the numbers of what is one against all.

    Args:
        in_features: D, the size of an embedding.
        num_classes: C.
        scale: s, what the cosines are multiplied with.
        m1, m2, m3: the margin cos(m1 theta + m2) - m3; m2 in radians.
        extension: what the margin is past an angle of pi, see torchmargin.functional.
        margin_gradient: "exact" or "straight_through".
        normalize_input, normalize_weight: whether embeddings and weights become unit vectors.
        bias: whether there is a bias [C].
        label_smoothing, ignore_index, reduction: as in torch.nn.CrossEntropyLoss.
        class_weight: as ``weight`` there, [C]: each row's loss is multiplied by the weight of its class, and "mean"
            divides by the sum of the rows' weights, which is NaN for a batch of none but weightless rows. Finite, not
            negative; not in the state_dict, and not counted by the statistics. There is no label_smoothing beside it.
            As of any tensor [C], a copy is taken: set another to change it.
        sub_centers: K, at most 255: weights are [C K, D], class j has the rows j K ... j K + K - 1, and its cosine is
            the largest of theirs.
        interclass_filter: other classes whose cosine is above it have logit 0 and no gradient, as InsightFace's
            interclass_filtering_threshold.
        device, dtype: of the weights.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations that are there at run time, and cannot read these
        weight: Tensor
        bias: Tensor | None
        interclass_filter: float | None
        _unsaved: ClassVar[frozenset[str]]
        _floats: ClassVar[frozenset[str]]
        _options: ClassVar[dict[str, type | tuple[str, ...]]]
        _roles: ClassVar[dict[str, str]]

        __call__: _Call

    reads_angle = False  # do its hooks read the angle of a row to its class?

    scale = Number()
    m1 = Number()
    m2 = Number(check_radians)
    m3 = Number()
    label_smoothing = Number(check_finite)
    class_weight = ClassWeight()

    # Numbers that are not in the state_dict: they do not make logits, or this loss has them fixed.
    _unsaved = frozenset({"label_smoothing"})
    # Numbers that the op takes as floats, in place of m1 what stands for it: no tensor that autograd or vmap follows.
    _floats = frozenset({"scale", "m1"})
    # Attributes beside numbers that are checked when they are set: of which type, or which values.
    _options = {
        "extension": str,
        "margin_gradient": str,
        "normalize_input": bool,
        "normalize_weight": bool,
        "ignore_index": int,
        "reduction": str,
        "interclass_filter": _FILTER,
    }
    # The numbers that stand for the op's m1, m2 and m3; see __init_subclass__.
    _roles = {"m1": "m1", "m2": "m2", "m3": "m3"}
    # A model that holds a loss and does not call it can be scripted; the loss itself stays in Python.
    __jit_unused_properties__ = ["acc_dtype", "_holds_weights"]
    __jit_ignored_attributes__ = ["scale", "m1", "m2", "m3", "class_weight"]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        m1: float = 1.0,
        m2: float | Tensor = 0.0,
        m3: float | Tensor = 0.0,
        extension: Extension = "none",
        margin_gradient: MarginGradient = "exact",
        normalize_input: bool = True,
        normalize_weight: bool = True,
        bias: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"expected in_features and num_classes to be positive, but got {in_features} and {num_classes}"
            )
        device, dtype = common.pop("device", None), common.pop("dtype", None)
        sub_centers = common.pop("sub_centers", 1)
        if not isinstance(sub_centers, int) or isinstance(sub_centers, bool):
            raise TypeError(f"{type(self).__name__}: expected sub_centers to be an int, but got {sub_centers!r}")
        self.sub_centers = sub_centers
        self.in_features = in_features
        self.num_classes = num_classes
        self._numbers: dict[str, float | Tensor] = {}
        self._changed: dict[str, None] | None = None  # in order: every process has the same buffers in the same order
        self._moving: list[str] = []
        self._recalls: Tensor | None = None
        self._seen: dict[str, tuple[Tensor, int]] = {}  # the buffers that numbers were read from, and their versions
        self._spread = False  # are its weights elsewhere?
        self._non_persistent_buffers_set.add("class_weight")
        with self._checked_together():
            self.scale = scale
            self.m1 = m1
            self.m2 = m2
            self.m3 = m3
            self.extension = extension
            self.margin_gradient = margin_gradient
            self.normalize_input = normalize_input
            self.normalize_weight = normalize_weight
            self.label_smoothing = common.pop("label_smoothing", 0.0)
            self.ignore_index = common.pop("ignore_index", -100)
            self.reduction = common.pop("reduction", "mean")
            self.interclass_filter = common.pop("interclass_filter", None)
            self.class_weight = common.pop("class_weight", None)
        if common:
            raise TypeError(f"{type(self).__name__}: unexpected keyword argument {next(iter(common))!r}")
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        )
        self._write_numbers(self._numbers.keys())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, as ArcFace's and SphereFace's code has them; the bias 0; state as at the start."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, self._first_bias())
        self.reset_state()

    @torch.no_grad()
    def resize_classes(self, num_classes: int, *, keep: Tensor | None = None) -> None:
        """Other classes behind the same network, for fine-tuning: in place, with new parameters.

        Class j of the new weights is class ``keep[j]`` of the old ones (int64 [k], k <= num_classes; default: as many
        of the first as fit), with its sub-centers and its bias; classes k and up are drawn as
        :meth:`reset_parameters` draws them. ``weight`` and a bias [C] are new parameters without a gradient, so an
        optimizer is made, and DistributedDataParallel wraps the module, afterwards. Margin and state stay. A margin or
        class_weight [C] is of the old classes: set it to a number, or None, before, and to a tensor again after.
        """
        self._check_holds_weights()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"expected num_classes to be a positive int, but got {num_classes!r}")
        if "weight" not in self._parameters:
            raise RuntimeError(
                f"{type(self).__name__}: expected weight to be a parameter to resize, but it is computed"
            )
        self._check_no_numbers_of_classes("resize_classes")
        if hasattr(self.weight, "device_mesh"):
            raise RuntimeError(f"{type(self).__name__}: expected whole weights to resize, but they are a DTensor")
        device = self.weight.device
        if keep is None:
            keep = torch.arange(min(num_classes, self.num_classes))
        if not isinstance(keep, Tensor) or keep.dtype != torch.int64 or keep.dim() != 1 or len(keep) > num_classes:
            what = f"{keep.dtype} of shape {list(keep.shape)}" if isinstance(keep, Tensor) else repr(keep)
            raise ValueError(f"expected keep to be int64 of shape [k], k at most {num_classes}, but got {what}")
        keep = keep.cpu()
        if len(keep) and not (0 <= keep.min() and keep.max() < self.num_classes):
            raise IndexError(f"expected keep to hold classes in [0, {self.num_classes}), but got {keep.tolist()}")
        old_classes, old_weight, old_bias = self.num_classes, self.weight, self.bias
        centers = (keep[:, None] * self.sub_centers + torch.arange(self.sub_centers)).flatten().to(device)
        buffers = dict(self._buffers)
        kept = [(buffer, buffer.clone()) for buffer in buffers.values() if buffer is not None]
        if old_bias is not None and old_bias.dim() == 0:
            kept.append((old_bias, old_bias.clone()))
        try:
            self.num_classes = num_classes
            self.weight = nn.Parameter(
                old_weight.new_empty(num_classes * self.sub_centers, self.in_features), old_weight.requires_grad
            )
            if old_bias is not None and old_bias.dim() == 1:
                self.bias = nn.Parameter(old_bias.new_empty(num_classes), old_bias.requires_grad)
            self.reset_parameters()
        except BaseException:  # a subclass that starts in its own way
            self.num_classes, self.weight, self.bias = old_classes, old_weight, old_bias
            raise
        finally:
            self._buffers.update(buffers)
            for tensor, value in kept:
                tensor.copy_(value)
        self.weight[: len(centers)] = old_weight[centers]
        if old_bias is not None and old_bias.dim() == 1 and self.bias is not None:
            self.bias[: len(keep)] = old_bias[keep.to(device)]

    def _check_no_numbers_of_classes(self, caller: str) -> None:
        """Before there are other classes."""
        of_classes = [name for name, number in self._numbers.items() if isinstance(number, Tensor)]
        if of_classes:
            none = "None" if of_classes[0] == "class_weight" else "one number"
            raise RuntimeError(
                f"{type(self).__name__}: {of_classes[0]} has a number for each of the {self.num_classes} old classes; "
                f"set it to {none} before {caller}, and to a tensor of all the new ones after"
            )
        unknown = [name for name, buffer in self._buffers.items() if buffer is not None and buffer.dim() > 0]
        if unknown:
            raise RuntimeError(f"{type(self).__name__}: {caller} knows nothing of the buffer {unknown[0]}")

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of losses and of margins of rows: float64 for float64 weights, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    # ---- what a loss may override --------------------------------------------------------------------------------

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of sample_m2, sample_m3 [B] and sample_margin_weight (0-dim or [B]) those that this loss sets.

        They are added to m2 and m3. Labels may be ``ignore_index`` or out of range: the op judges them later.
        """
        return {}

    def negatives(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of hard_threshold ([B] or 0-dim) and hard_coefficients ([3] or [B, 3]) those that this loss sets: see
        torchmargin.functional. In the losses' dtype or float64, without gradients."""
        if self.interclass_filter is None:
            return {}
        device = self.weight.device
        return {
            "hard_threshold": torch.full((), self.interclass_filter, dtype=torch.float64, device=device),
            "hard_coefficients": torch.zeros(3, dtype=torch.float64, device=device),
        }

    def advance(self, embeddings: Tensor, labels: Tensor) -> None:
        """Moves the state of training, once before each training forward: 0-dim buffers, in place.

        Runs without gradients. A forward that is computed again inside a backward pass (activation checkpointing)
        sees the state that its own first run has seen, and leaves the buffers as they are. Under torch.compile a
        hook takes a clone of a buffer that autograd would keep (one that multiplies what requires a gradient).
        """

    def row_penalty(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        """What is added to each row's loss [B], or None. Ignored rows are left out and the reduction follows.

        Over ranks (torchmargin.distributed) it sees one rank's rows, which may be none; what it raises is not shared.
        """
        return None

    def reset_state(self) -> None:
        """Sets the buffers that :meth:`advance` moves to where training starts."""

    # ---- calls ---------------------------------------------------------------------------------------------------

    @stays_in_python
    def forward(
        self, embeddings: Tensor, labels: Tensor, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, MarginStatistics]:
        """The loss of embeddings [B, D] and labels [B] int64, reduced; with statistics (loss, MarginStatistics)."""
        self._check_holds_weights()
        self._follow_buffers()
        op = self._op(return_statistics)
        if not self._fits(embeddings, labels):  # the op says what is wrong
            op(embeddings, self.weight, labels, self.bias, **self._margin(), **self._reduction())
            raise TypeError(
                f"{type(self).__name__}: expected tensors, but got {type(embeddings).__name__} and "
                f"{type(labels).__name__}; a symbolic tracer takes a loss as a leaf, torch.export traces it"
            )
        class_weight = self._buffers.get("class_weight")
        compute_dtype = self._compute_dtype(embeddings)
        embeddings = self._widened(embeddings)
        angle = self._target_angle(embeddings, labels) if self.reads_angle else None
        before, fresh = self._advance_once(embeddings, labels, angle)
        try:
            result = op(
                embeddings,
                self.weight,
                labels,
                self.bias,
                compute_dtype=compute_dtype,
                class_weight=class_weight,
                **self._margin(),
                **self._reduction(),
                **self._row_margins(embeddings, labels, angle),
                **self._negatives(embeddings, labels, angle),
            )
            penalty = self.row_penalty(embeddings, labels)
        except BaseException:
            self._settle(before, None)
            raise
        self._settle(before, fresh)
        loss, *statistics = result if return_statistics else (result,)
        if penalty is not None:
            loss = loss + self._reduced(penalty, labels)
        return (loss, MarginStatistics(*statistics)) if return_statistics else loss

    @stays_in_python
    def logits(self, embeddings: Tensor) -> Tensor:
        """The logits [B, C] without a margin, for inference: their argmax is the predicted class."""
        self._check_holds_weights()
        self._follow_buffers()
        return self._logits_among(self._widened(embeddings), self.weight, self.bias, self._compute_dtype(embeddings))

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, num_classes={self.num_classes}", self.describe_margin()]
        parts += [f"label_smoothing={self.label_smoothing:g}"] if self.label_smoothing else []
        parts += [f"ignore_index={self.ignore_index}"] if self.ignore_index != -100 else []
        parts += [f"reduction={self.reduction!r}"] if self.reduction != "mean" else []
        parts += ["bias=True"] if self.bias is not None else []
        parts += [f"sub_centers={self.sub_centers}"] if self.sub_centers != 1 else []
        parts += [f"class_weight=[{self.num_classes}]"] if self.class_weight is not None else []
        parts += [f"interclass_filter={self.interclass_filter:g}"] if self.interclass_filter is not None else []
        return ", ".join(parts)

    def describe_margin(self) -> str:
        """Scale and margin in a few words."""
        parts = [f"scale={self.scale:g}"]
        for role, plain in (("m1", 1.0), ("m2", 0.0), ("m3", 0.0)):
            value = getattr(self, self._roles[role])
            if isinstance(value, Tensor):
                parts.append(f"{self._roles[role]}=[{len(value)}]")
            elif value != plain:
                parts.append(f"{self._roles[role]}={value:g}")
        parts += [f"extension={self.extension!r}"] if self.extension != "none" else []
        parts += [f"margin_gradient={self.margin_gradient!r}"] if self.margin_gradient != "exact" else []
        return ", ".join(parts)

    # ---- what a call is made of ----------------------------------------------------------------------------------

    def _fits(self, embeddings: Tensor, labels: Tensor) -> bool:
        """Can the hooks read these? What they cannot read is for the op to refuse."""
        return (
            isinstance(embeddings, Tensor)
            and isinstance(labels, Tensor)
            and embeddings.is_floating_point()
            and embeddings.dim() == 2
            and embeddings.shape[1] == self.weight.shape[1]
            and labels.dtype == torch.int64
            and labels.dim() == 1
            and labels.shape[0] == embeddings.shape[0]
            and labels.device == embeddings.device == self.weight.device
        )

    def _widens(self, embeddings: Tensor) -> bool:
        """A network in 16 bits before weights in float32: autocast's rule, with autocast or without."""
        return (
            isinstance(embeddings, Tensor)
            and embeddings.dtype in (torch.float16, torch.bfloat16)
            and self.weight.dtype == torch.float32
        )

    def _widened(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(torch.float32) if self._widens(embeddings) else embeddings

    def _compute_dtype(self, embeddings: Tensor) -> torch.dtype | None:
        return embeddings.dtype if self._widens(embeddings) else None

    def _margin(self) -> dict[str, Any]:
        """The op's arguments. Margins that are saved come by row, from their buffers: see _row_margins."""
        constant = {role: self._numbers[name] if name in self._unsaved else 0.0 for role, name in self._roles.items()}
        return {
            "scale": self._numbers["scale"],
            "m1": self._numbers[self._roles["m1"]],
            "m2": constant["m2"],
            "m3": constant["m3"],
            "extension": self.extension,
            "margin_gradient": self.margin_gradient,
            "normalize_input": self.normalize_input,
            "normalize_weight": self.normalize_weight,
            "sub_centers": self.sub_centers,
        }

    def _logits_among(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None
    ) -> Tensor:
        """The logits without a margin of rows in the weights' dtype, among the classes of these weights."""
        logits: Tensor = torch.ops.torchmargin.margin_logits(
            rows,
            weight,
            None,
            bias,
            scale=self._numbers["scale"],
            normalize_input=self.normalize_input,
            normalize_weight=self.normalize_weight,
            sub_centers=self.sub_centers,
            compute_dtype=compute_dtype,
        )
        return logits

    def _op(self, return_statistics: bool) -> Any:
        ops = torch.ops.torchmargin
        return ops._linear_margin_cross_entropy_statistics if return_statistics else ops.linear_margin_cross_entropy

    def _target_angle(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        angle: Tensor = torch.ops.torchmargin.linear_target_angle(
            embeddings, self.weight, labels, sub_centers=self.sub_centers
        )
        return angle

    def _given(self, hook: str, angle: Tensor | None) -> tuple[Any, ...]:
        """What a hook gets beside embeddings and labels; the base's own read no angle."""
        return () if angle is None or getattr(type(self), hook) is getattr(MarginLoss, hook) else (angle,)

    def _negatives(self, embeddings: Tensor, labels: Tensor, angle: Tensor | None) -> dict[str, Tensor]:
        return dict(self.negatives(embeddings, labels, *self._given("negatives", angle)))

    def _row_margins(self, embeddings: Tensor, labels: Tensor, angle: Tensor | None = None) -> dict[str, Tensor]:
        margins = dict(self.sample_margins(embeddings, labels, *self._given("sample_margins", angle)))
        for role in ("m2", "m3"):
            number = self._buffers.get(self._roles[role])
            if number is None:
                continue
            of_classes = number.dim() > 0
            if of_classes and len(number) * self.sub_centers != self.weight.shape[0]:
                raise RuntimeError(
                    f"{type(self).__name__}: expected weight to have the rows of {len(number)} classes, which "
                    f"{self._roles[role]} has numbers for, but got {list(self.weight.shape)}"
                )
            # A copy: the margin may change before the backward pass.
            own = number[labels.clamp(0, len(number) - 1)] if of_classes else number.expand(labels.shape[0]).clone()
            given = margins.get(f"sample_{role}")
            margins[f"sample_{role}"] = own if given is None else own + given.double()
        return margins

    def _reduction(self) -> dict[str, Any]:
        return {
            "label_smoothing": self._numbers["label_smoothing"],
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    def _reduced(self, penalty: Tensor, labels: Tensor) -> Tensor:
        counts = self._row_weights(labels)
        valid = labels != self.ignore_index
        penalty = torch.where(valid, penalty, 0.0)
        if counts is not None:
            penalty = penalty * counts.to(penalty.dtype)
        if self.reduction == "none":
            return penalty
        if self.reduction == "mean":
            return penalty.sum() / (valid if counts is None else counts.to(penalty.dtype)).sum()
        return penalty.sum()

    def _row_weights(self, labels: Tensor) -> Tensor | None:
        """The weight of each row's class, [B] float64, 0 of ignored rows; None: they count alike."""
        class_weight = self._buffers.get("class_weight")
        if class_weight is None:
            return None
        valid = labels != self.ignore_index
        return torch.where(valid, class_weight[torch.where(valid, labels, 0)], 0.0)

    # ---- state that moves ----------------------------------------------------------------------------------------

    def _advance_once(
        self, embeddings: Tensor, labels: Tensor, angle: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gives the buffers that move the state that this forward shall use: its own, if it is run a second time.

        Returns what _settle needs: these buffers as they were, and whether this is no second run.
        """
        if not self.training or type(self).advance is MarginLoss.advance:
            return {}, None
        if self._recalls is None or self._recalls.device != embeddings.device:
            self._make_log()  # a replica of nn.DataParallel
        names = self._moving
        buffers = {name: self.number(name) for name in names}
        clones = {name: buffer.clone() for name, buffer in buffers.items()}
        compiling = torch.compiler.is_compiling()  # graphs know buffers only as places to write to
        if not compiling:  # autograd may keep what a hook reads: other tensors stand in for the buffers until the end
            self._buffers.update(clones)
        before = clones if compiling else buffers
        with torch.no_grad():
            try:
                self.advance(embeddings, labels, *self._given("advance", angle))
                if not names:
                    return {}, None
                state = torch.stack([self.number(name).double() for name in names])
                state, fresh = torch.ops.torchmargin._recall_state(self._recalls, key_of(embeddings, labels), state)
            except BaseException:
                self._buffers.update(buffers)
                raise
            for name, value in zip(names, state.unbind()):
                if compiling:
                    buffers[name].copy_(value)
                else:
                    self._buffers[name] = value.to(clones[name].dtype)
        return before, fresh

    def _settle(self, before: dict[str, Tensor], fresh: Tensor | None) -> None:
        """The buffers as a first run leaves them; `fresh` is None: as they were."""
        used = {name: self.number(name) for name in before}
        if not torch.compiler.is_compiling():
            self._buffers.update(before)
        if fresh is None:
            return
        for name, old in before.items():
            self.number(name).copy_(torch.where(fresh, used[name], old))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._make_log()

    def _make_log(self) -> None:
        """Which buffers move (0-dim ones that are not numbers), and the log of their states, empty.

        The log is no buffer: DistributedDataParallel would give every rank rank 0's.
        """
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._moving = [name for name, buffer in buffers.items() if buffer.dim() == 0 and name not in self._numbers]
        weight: Tensor | None = getattr(self, "weight", None)
        if weight is None:  # torch.nn.utils.prune is about to compute it: the first call makes the log
            self._recalls = None
            return
        states, device = len(self._moving), weight.device
        if self._recalls is None or self._recalls.shape != log_shape(states) or self._recalls.device != device:
            self._recalls = empty_log(states, device)

    # ---- weights that are elsewhere ------------------------------------------------------------------------------

    @property
    def _holds_weights(self) -> bool:
        return not self._spread

    def _check_holds_weights(self) -> None:
        if not self._holds_weights:
            raise RuntimeError(
                f"{type(self).__name__}: its classes are spread over ranks; call the ClassParallel that holds them"
            )

    def _hand_over_weights(self) -> tuple[Tensor, Tensor | None]:
        """Its weight and bias, for torchmargin.distributed to hold: this module keeps the margin and its state."""
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        self._spread = True
        del self.weight
        self.bias = None
        self._hold_no_weights(self.num_classes, like=weight)
        return weight, bias

    def _first_bias(self) -> float:
        """Where a bias starts."""
        return 0.0

    def _hold_no_weights(self, num_classes: int, like: Tensor | None = None) -> None:
        """What stands for the weights has their shape, dtype and device, and no memory."""
        self.num_classes = num_classes
        one = (self.weight if like is None else like).new_zeros(())
        self.weight = one.expand(num_classes * self.sub_centers, self.in_features)

    # ---- numbers and options -------------------------------------------------------------------------------------

    def number(self, name: str) -> Tensor:
        """The tensor of a saved number: what torch.compile neither freezes nor compiles again for."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _spell_signature(cls)
        for name, member in vars(cls).items():
            known = getattr(super(cls, cls), name, None)
            if isinstance(known, Number) and not isinstance(member, Number):
                raise TypeError(
                    f"{cls.__name__}: {name} is a number of {cls.__mro__[1].__name__}, which a class attribute would "
                    f"hide; give it to super().__init__(), or set self.{name} behind it"
                )
        members = {role: getattr(cls, role) for role in ("m1", "m2", "m3")}
        cls._roles = {role: member.of if isinstance(member, Alias) else role for role, member in members.items()}
        cls._floats = frozenset(cls._roles.get(name, name) for name in cls._floats)
        cls.__jit_ignored_attributes__ = [name for name in dir(cls) if isinstance(getattr(cls, name), Number)]

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(type(self), name, None)
        if "_is_replica" in self.__dict__ and name in self._buffers:  # nn.DataParallel hands out its copies
            self._buffers[name] = value
        elif isinstance(member, Number):
            member.__set__(self, value)
        elif name in self._options:
            self._set_option(name, value)
        else:
            super().__setattr__(name, value)

    @contextlib.contextmanager
    def _checked_together(self) -> Iterator[None]:
        """Numbers and options that are set inside are checked as one; all stay as they were if one is bad."""
        if self._changed is not None:
            yield
            return
        options = {name: self.__dict__[name] for name in self._options if name in self.__dict__}
        numbers = dict(self._numbers)
        self._changed = {}
        try:
            yield
            self._check_parameters()
            self._write_numbers(self._changed)
        except BaseException:
            self._numbers = numbers
            self.__dict__.update(options)
            raise
        finally:
            self._changed = None

    def _check_parameters(self) -> None:
        """The op's own checks on an empty batch, so that a bad parameter raises here and not in training."""
        nothing = torch.empty(0, 1, device="meta")
        labels = torch.empty(0, dtype=torch.int64, device="meta")
        torch.ops.torchmargin.linear_margin_cross_entropy(
            nothing, nothing.new_empty(max(self.sub_centers, 1), 1), labels, **self._margin(), **self._reduction()
        )
        if "class_weight" in self._numbers and self._numbers["label_smoothing"] != 0:
            raise ValueError(
                f"{type(self).__name__}: expected no label_smoothing with class_weight: cross_entropy weighs the "
                f"smoothed classes one by one, which takes a weighted sum of all logits that the fused op does not make"
            )
        if self.interclass_filter is not None:
            if not (self.normalize_input and self.normalize_weight):
                raise ValueError(
                    f"{type(self).__name__}: expected normalize_input and normalize_weight with interclass_filter, "
                    f"which is a cosine"
                )
            check_finite("interclass_filter", self.interclass_filter)

    def _set_number(self, number: Number[Any], value: float | Tensor | None) -> None:
        if "_changed" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__}: cannot set {number.name} before super().__init__() is called")
        with self._checked_together():
            checked = number.checked(self, value)
            if checked is None:
                self._numbers.pop(number.name, None)
            else:
                self._numbers[number.name] = checked
            assert self._changed is not None  # inside _checked_together
            self._changed[number.name] = None

    def _set_option(self, name: str, value: Any) -> None:
        allowed = self._options[name]
        if allowed is _FILTER:
            if value is not None and not is_number(value):
                raise TypeError(f"{type(self).__name__}: expected {name} to be a number or None, but got {value!r}")
        elif not isinstance(allowed, tuple):
            if not isinstance(value, allowed) or isinstance(value, bool) != (allowed is bool):
                raise TypeError(f"{type(self).__name__}: expected {name} to be {allowed.__name__}, but got {value!r}")
        elif value not in allowed:
            known = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"expected {name} to be {known}, but got {value!r}")
        with self._checked_together():
            super().__setattr__(name, value)

    def _write_numbers(self, names: Iterable[str]) -> None:
        """Numbers that are saved to their buffers: in place where the shape stays, compiled graphs hold them."""
        if getattr(self, "weight", None) is None:
            return  # the constructor writes them all
        device = self.weight.device
        for name in names:
            if name in self._unsaved:
                continue
            if name not in self._numbers:
                if name in self._buffers:  # its place stays: averages of modules go by the order
                    self._buffers[name] = None
                continue
            value = torch.as_tensor(self._numbers[name], dtype=torch.float64, device="cpu")
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.shape == value.shape and buffer.device == device:
                with torch.no_grad():
                    buffer.copy_(value)
            else:
                with _as_always():
                    buffer = self._buffers[name] = value.clone().to(device)
            if name in self._seen:
                self._seen[name] = (buffer, version_of(buffer))

    def _follow_buffers(self, names: Iterable[str] | None = None) -> None:
        """Numbers that others have put into their buffers count as if they were set.

        DistributedDataParallel copies rank 0's, an average of modules has its own, functional_call lends some. On the
        CPU every call reads them. Elsewhere to read is to wait for the device: the first call reads them (the first one
        after train() or eval(), a cast, a load), and later ones what is another tensor; in inference, what was written
        to as well. In training that would be all of them in every step, which DistributedDataParallel writes.

        names: all that are read as floats, as every call wants, or others.
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return
        for name in self._floats if names is None else names:
            buffer = self._buffers.get(name)
            if buffer is None or buffer.dim() > 0 or buffer.is_meta:
                continue
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(buffer)
            if (wrapped or buffer.requires_grad) and name in self._floats:
                values = _values_in_vmap(buffer)
                if len(values) != 1:
                    raise RuntimeError(
                        f"{type(self).__name__}: expected {name} to be one number for all, without a gradient: the op "
                        f"takes it as a float, which neither autograd nor vmap follows"
                    )
                self._numbers[name] = values.pop()
                self._seen.pop(name, None)
            if wrapped or type(buffer) is not Tensor:
                continue
            if not _is_at_hand(buffer):
                seen, version = self._seen.get(name), version_of(buffer)
                if seen is not None and seen[0] is buffer and (self.training or seen[1] == version):
                    continue
                if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
                    continue
                self._seen[name] = (buffer, version)
            self._numbers[name] = buffer.item()

    def train(self, mode: bool = True) -> Self:
        """As any module's; numbers that others have put into their buffers are what compiled calls take from here."""
        super().train(mode)
        self._seen.clear()
        self._follow_buffers(tuple(self._numbers))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy's tensors count their writes anew."""
        return {**self.__dict__, "_seen": {}}

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._numbers, replica._seen = dict(self._numbers), {}
        return cast(Self, replica)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """No cast changes a buffer: numbers stay float64, statistics keep the digits that small steps need.

        NB: nor is one widened. torch 2.11's compiled graphs lose what is written to a 0-dim float64 buffer on the CPU.
        """
        before = dict(self._buffers)
        if not self._holds_weights:
            self._hold_no_weights(self.num_classes, like=fn(self.weight.new_empty(0)))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        leaves_meta = any(buffer is not None and buffer.is_meta for buffer in before.values())
        if leaves_meta and self.weight.device.type != "meta":  # to_empty: what is in the buffers now is chance
            self._write_numbers(self._numbers.keys())
            self.reset_state()
        self._make_log()
        self._seen.clear()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Numbers are checked as they always are; where there are none the present ones stay."""
        unsaved = self._unsaved | self._non_persistent_buffers_set
        saved = {prefix + name: name for name in self._numbers if name not in unsaved}
        others = {key: value for key, value in state_dict.items() if key not in saved}
        missing: list[str] = []
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in saved]
        try:
            with self._checked_together():
                for key, name in saved.items():
                    value = torch.as_tensor(state_dict.get(key, torch.empty(0, device="meta"))).detach()
                    if not value.is_meta:
                        setattr(self, name, value.item() if value.dim() == 0 else value)
        except (RuntimeError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")
        self._seen.clear()
        if local_metadata.get("assign_to_params_buffers", False):
            self._leave_meta()

    def _leave_meta(self) -> None:
        """Buffers that are on meta while the weights are no more: numbers as they were set, state as at the start."""
        device = self.weight.device
        of_state = {name: of for name, of in self._buffers.items() if of is not None and name not in self._numbers}
        if device.type == "meta":
            return
        self._write_numbers(self._numbers.keys())
        if any(buffer.is_meta for buffer in of_state.values()):
            self._buffers.update({name: torch.empty_like(buffer, device=device) for name, buffer in of_state.items()})
            self.reset_state()
            self._buffers.update({name: buffer for name, buffer in of_state.items() if not buffer.is_meta})
        self._make_log()


_spell_signature(MarginLoss)
