"""The constructors' defaults are those of the library's one table (csrc/include/torchmargin/presets.h)."""

import inspect

import pytest

import torchmargin
from torchmargin import _C

TABLE = _C.published_losses()
MODULES = {name for name in torchmargin.losses.__all__ if name.endswith("Loss")} - {"MarginLoss", "AnnealedMarginLoss"}


def _constructor(name):
    """A module's class, or a named constructor of it: "SphereFaceLoss.normalized"."""
    cls, _, method = name.partition(".")
    loss = getattr(torchmargin, cls)
    return getattr(loss, method) if method else loss


def test_every_published_loss_is_in_the_table():
    assert set(TABLE) == MODULES | {"SphereFaceLoss.normalized"}


@pytest.mark.parametrize("name", TABLE)
def test_visible_defaults(name):
    of = _constructor(name)  # a class's signature has what all losses share, too
    parameters = inspect.signature(of.__init__ if inspect.isclass(of) else of).parameters.values()
    visible = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    visible.pop("process_group", None)  # nothing published
    assert {"scale"} <= set(visible) <= set(TABLE[name])
    for key, value in visible.items():
        assert type(value) is type(TABLE[name][key]) and value == TABLE[name][key], key


@pytest.mark.parametrize("name", TABLE)
def test_what_a_loss_is_made_with(name):
    """What no argument is for, too: normalisation, AdaFace's first statistics."""
    loss = _constructor(name)(8, 17)
    for key, value in TABLE[name].items():
        got = getattr(loss, key)
        assert (got is not None) == value if key == "bias" else got == value, key
