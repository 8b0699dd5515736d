"""How to train: named settings, and any of them changed by ``--set``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torchmargin
from recipes.face.errors import RecipeError
from torchmargin import compat
from torchmargin.losses.base import MarginLoss

# By the names of --loss. The first argument is the number of features, the second that of classes.
LOSSES: dict[str, Callable[..., MarginLoss]] = {
    "arcface": torchmargin.ArcFaceLoss,
    "cosface": torchmargin.CosFaceLoss,
    "combined": torchmargin.CombinedMarginLoss,
    "insightface_arcface": compat.insightface_arcface,
    "insightface_cosface": compat.insightface_cosface,
    "insightface_combined": compat.insightface_combined,
    "adaface": torchmargin.AdaFaceLoss,
    "magface": torchmargin.MagFaceLoss,
    "elasticface": torchmargin.ElasticFaceLoss,
    "curricularface": torchmargin.CurricularFaceLoss,
    "mv_softmax": torchmargin.MVSoftmaxLoss,
    "subcenter_arcface": torchmargin.SubCenterArcFaceLoss,
    "sphereface": torchmargin.SphereFaceLoss,
    "sphereface2": torchmargin.SphereFace2Loss,
    "uniface": torchmargin.UniFaceLoss,
    "softmax": torchmargin.SoftmaxLoss,
    "modified_softmax": torchmargin.ModifiedSoftmaxLoss,
    "normalized_softmax": torchmargin.NormalizedSoftmaxLoss,
}


class ConfigError(RecipeError):
    """A setting that there is not, or a value that it cannot have."""


@dataclass
class Config:
    """The defaults are those of InsightFace's ms1mv3_r50, for eight ranks."""

    # The network and its images.
    net: str = "iresnet50"
    features: int = 512
    size: int = 112  # of the images: height and width
    width: int = 64  # channels of IResNet's first stage
    dropout: float = 0.0
    # The loss.
    loss: str = "insightface_arcface"
    loss_options: dict[str, Any] = field(default_factory=dict)  # its constructor's, such as margin, scale
    sample_rate: float = 1.0  # share of the classes that a step sees beside its own (Partial FC)
    center_deviation: float = 0.01  # standard deviation of the class weights' first numbers
    # Steps.
    epochs: int = 20
    batch: int = 128  # images of a rank at a time
    accumulate: int = 1  # times before a step
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    warmup: float = 0.0  # epochs in which the rate rises from 0
    schedule: str = "linear"  # to 0, or "cosine"
    clip: float = 5.0  # norm of the network's gradient; 0: none
    ema: float = 0.0  # weight of the past in the mean of the network's weights, which is what is kept then; 0: none
    # Numbers.
    amp: str = "none"  # or "bf16", "fp16"
    growth_interval: int = 100  # of fp16's loss scale, in steps
    sync_bn: bool = False
    grad_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = True  # the order of images in a GPU's memory
    # Images: chances of changes.
    flip: float = 0.5
    low_resolution: float = 0.0
    blur: float = 0.0
    hsv: float = 0.0
    grey: float = 0.0
    seed: int = 0
    # What does not change the result.
    workers: int = 2  # processes that decode images
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: at the end of each epoch
    save_every: int = 0  # steps; 0: at the end of each epoch

    def check(self) -> None:
        """ConfigError names the first setting that cannot be."""
        bounds: list[tuple[str, float, float]] = [
            ("features", 1, math.inf),
            ("epochs", 1, math.inf),
            ("batch", 1, math.inf),
            ("accumulate", 1, math.inf),
            ("width", 1, math.inf),
            ("growth_interval", 1, math.inf),
            ("log_every", 1, math.inf),
            ("dropout", 0, 1),
            ("momentum", 0, 1),
            ("ema", 0, 1),
            *((name, 0, 1) for name in ("flip", "low_resolution", "blur", "hsv", "grey")),
            *((name, 0, math.inf) for name in ("lr", "decay", "warmup", "clip", "workers", "eval_every", "save_every")),
        ]
        for name, least, most in bounds:
            value = getattr(self, name)
            if not (least <= value <= most and math.isfinite(value)):
                text = f"in [{least:g}, {most:g}]" if math.isfinite(most) else f"of at least {least:g}"
                raise ConfigError(f"expected {name} {text}, but got {value}")
        for name in ("sample_rate", "center_deviation"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"expected {name} in (0, 1], but got {value}")
        choices = {"loss": tuple(LOSSES), "schedule": ("linear", "cosine"), "amp": ("none", "bf16", "fp16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"expected {name} to be one of {', '.join(allowed)}, but got {getattr(self, name)!r}")
        if self.warmup >= self.epochs:
            raise ConfigError(f"expected warmup to be less than the {self.epochs} epochs, but got {self.warmup}")


# Of these a resumed run may have others than it began with.
FREE = ("workers", "log_every", "eval_every", "save_every", "compile", "grad_checkpointing", "channels_last")

_MS1MV3 = Config(amp="fp16")
_GLINT = Config(loss="insightface_cosface", loss_options={"margin": 0.4}, decay=1e-4, amp="fp16")
# InsightFace's numbers by InsightFace's names; for eight ranks of 128 images.
CONFIGS: dict[str, Config] = {
    "ms1mv3_r50": _MS1MV3,
    "ms1mv3_r18": dataclasses.replace(_MS1MV3, net="iresnet18"),
    "ms1mv3_r34": dataclasses.replace(_MS1MV3, net="iresnet34"),
    "ms1mv3_r100": dataclasses.replace(_MS1MV3, net="iresnet100"),
    "glint360k_r50": _GLINT,
    "glint360k_r100": dataclasses.replace(_GLINT, net="iresnet100"),
    "wf42m_pfc02_r100": dataclasses.replace(_GLINT, net="iresnet100", decay=5e-4, sample_rate=0.2),
    # ArcFace's paper: its own way past theta + m = pi.
    "arcface_r50": dataclasses.replace(_MS1MV3, loss="arcface"),
    # A narrow network that a laptop trains in minutes, for drawn faces and for trying things.
    "narrow": Config(
        net="iresnet18",
        width=8,
        features=64,
        size=64,
        loss="arcface",
        loss_options={"scale": 16.0, "margin": 0.3},
        epochs=12,
        batch=64,
        lr=0.1,
        warmup=1.0,
        log_every=5,
    ),
}


def changed(config: Config, name: str, text: str) -> Config:
    """With one setting from text: a field's name, or ``loss.NAME`` for an argument of the loss."""
    if name.startswith("loss."):
        return dataclasses.replace(config, loss_options={**config.loss_options, name[5:]: _value(text)})
    types = {each.name: each.type for each in dataclasses.fields(Config) if each.name != "loss_options"}
    if name not in types:
        raise ConfigError(f"there is no setting {name!r}; expected loss.NAME or one of {', '.join(types)}")
    value = text if types[name] == "str" else _value(text)
    kinds: dict[object, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    if not isinstance(value, kinds[types[name]]) or (isinstance(value, bool) and types[name] != "bool"):
        raise ConfigError(f"expected {name} to be of type {types[name]}, but got {text!r}")
    arguments: dict[str, Any] = {name: float(str(value)) if types[name] == "float" else value}
    return dataclasses.replace(config, **arguments)


def _value(text: str) -> Any:
    """A number, true, false or none, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def make_loss(config: Config, classes: int, **more: Any) -> MarginLoss:
    """ConfigError for an argument that the loss has not, or a value that it refuses."""
    try:
        return LOSSES[config.loss](config.features, classes, **config.loss_options, **more)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.loss}: {error}") from None
