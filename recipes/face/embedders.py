"""Embedders: a network and all that must be known to use it, in one file, ``embedder.pt``.

The file holds weights, which network they are of, how pixels become its input (mean, deviation, order of colours), the
landmarks that faces are aligned to, and the thresholds that an evaluation found. It is read without running anything.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from recipes.face.alignment import TEMPLATE, TEMPLATE_SIZE
from recipes.face.errors import RecipeError
from recipes.face.networks import make_network
from recipes.face.photos import fitted

_FORMAT = "torchmargin.recipes.face/1"


class EmbedderError(RecipeError):
    """A file that is no embedder, or weights that do not fit the network."""


@dataclass
class Network:
    """Which one: the arguments of networks.make_network."""

    name: str = "iresnet50"
    features: int = 512
    size: int = TEMPLATE_SIZE
    width: int = 64

    def make(self) -> nn.Module:
        """With random weights."""
        return make_network(self.name, self.features, self.size, self.width)


@dataclass
class Embedder:
    """``embedder.embed(images)``: faces, aligned, to embeddings."""

    network: Network
    model: nn.Module
    mean: float = 127.5  # of pixels 0 to 255
    deviation: float = 127.5
    colors: Literal["RGB", "BGR"] = "RGB"  # as the network wants them; images that are given are RGB
    flip: bool = True  # the embedding is the sum of the image's and its mirror image's
    template: tuple[tuple[float, float], ...] = TEMPLATE  # at 112 x 112
    thresholds: dict[str, float] = field(default_factory=dict)  # false accept rate -> the lowest cosine to accept
    trained: dict[str, Any] = field(default_factory=dict)  # how: for the reader, nothing is read from it

    def pixels(self, image: Image.Image) -> Tensor:
        """[3, S, S] uint8 of an aligned face; another size is resized."""
        return torch.from_numpy(np.array(fitted(image, self.network.size))).permute(2, 0, 1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """The network's input of pixels [B, 3, S, S] uint8, RGB."""
        x = pixels.float().sub(self.mean).div(self.deviation)
        return x if self.colors == "RGB" else x.flip(1)

    @torch.inference_mode()
    def embed_pixels(self, pixels: Tensor, *, flip: bool | None = None, batch: int = 64) -> Tensor:
        """[N, D] float32, as long as the network makes them, of pixels [N, 3, S, S] uint8."""
        flip = self.flip if flip is None else flip
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        parts = []
        for part in pixels.split(batch):
            x = self.normalized(part.to(device))
            found = self.model(x).float()
            if flip:
                found = found + self.model(x.flip(3)).float()
            parts.append(found.cpu())
        self.model.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self.network.features)

    def embed(self, images: Iterable[Image.Image], *, flip: bool | None = None, batch: int = 64) -> Tensor:
        """[N, D] float32 of aligned faces; a batch of them is in memory at a time."""
        parts, waiting = [], []
        for image in images:
            waiting.append(self.pixels(image))
            if len(waiting) == batch:
                parts.append(self.embed_pixels(torch.stack(waiting), flip=flip, batch=batch))
                waiting = []
        if waiting:
            parts.append(self.embed_pixels(torch.stack(waiting), flip=flip, batch=batch))
        return torch.cat(parts) if parts else torch.empty(0, self.network.features)

    def threshold(self, far: float | None = None) -> float:
        """The cosine from which two faces are one person's, at a false accept rate (default: the lowest known)."""
        if not self.thresholds:
            raise EmbedderError("the embedder has no threshold: `eval` it on pairs, or give one")
        if far is None:
            return self.thresholds[min(self.thresholds, key=float)]
        chosen = [value for rate, value in self.thresholds.items() if float(rate) == far]
        if not chosen:
            raise EmbedderError(f"the embedder has thresholds for the rates {', '.join(self.thresholds)}, not {far:g}")
        return chosen[0]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "model"}
        fields["network"] = dataclasses.asdict(self.network)
        state = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        save_whole({"format": _FORMAT, **fields, "state": state}, path)


def checked_device(text: str) -> torch.device:
    """EmbedderError for a device that there is not."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise EmbedderError(f"expected --device cpu, cuda or cuda:N, but got {text!r}") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= count:
        raise EmbedderError(f"there is no device {text} here")
    return device


def save_whole(value: object, path: Path) -> None:
    """torch.save, so that a file of this name is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(value, partial)
    partial.replace(path)


def load_plain(path: Path) -> Any:
    """torch.load of tensors and plain values alone; EmbedderError for anything else, none of which has run then."""
    if not path.is_file():
        raise EmbedderError(f"{path} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write, which it refuses then
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise EmbedderError(f"{path}: no weights alone: {what}"[:300]) from None


def load_embedder(path: Path, device: str = "cpu") -> Embedder:
    """EmbedderError says what of the file is not as it should be, or that there is no such device."""
    to = checked_device(device)
    found = load_plain(path)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise EmbedderError(f"{path} is no embedder of this recipe; `train --init` takes a network's bare weights")
    try:
        network = Network(**found["network"])
        model = network.make()
        fields = {
            each.name: found[each.name]
            for each in dataclasses.fields(Embedder)
            if each.name not in ("network", "model") and each.name in found
        }
        made = Embedder(network, model, **fields)
        state = found["state"]
    except (KeyError, TypeError) as error:
        raise EmbedderError(f"{path}: {error}") from None
    load_state(model, state, path)
    model.eval().requires_grad_(False).to(to)
    return made


def load_state(model: nn.Module, state: object, path: Path) -> None:
    """A network's weights by name: all of them, and no others. Prefixes that wrappers add are taken off."""
    if isinstance(state, dict) and isinstance(state.get("state"), dict):  # an embedder's
        state = state["state"]
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise EmbedderError(f"{path} holds no weights by name")
    for prefix in ("module.", "_orig_mod.", "backbone."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    own = model.state_dict()
    # Old files do not count batches.
    state = {**{name: value for name, value in own.items() if name.endswith("num_batches_tracked")}, **state}
    wrong = _first_difference(own, state)
    if wrong is not None:
        raise EmbedderError(f"{path}: {wrong}")
    model.load_state_dict(state)


def _first_difference(own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    missing: Sequence[str] = [name for name in own if name not in given]
    if missing:
        return f"the network has {missing[0]} (and {len(missing) - 1} more), which the file has not"
    other = [name for name in given if name not in own]
    if other:
        return f"the file has {other[0]} (and {len(other) - 1} more), which the network has not"
    for name, value in own.items():
        if value.shape != given[name].shape:
            return f"{name} is {list(given[name].shape)} in the file, but {list(value.shape)} in the network"
    return None
