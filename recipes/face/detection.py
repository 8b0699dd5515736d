"""MTCNN (Zhang et al., IEEE Signal Processing Letters 2016, arXiv:1604.02878): faces, with five landmarks.

Three small networks one after the other: the first looks at all places of a pyramid of the photograph, the second and
the third at what the one before them found. Their weights are those of the authors, as PyPI's package `mtcnn` carries
them (MIT licence); they are read only if they are the very bytes that are known here.

Boxes are (left, top, right, bottom) and landmarks (x, y) in pixels, (0, 0) the first pixel's center.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import nms

from recipes.face.errors import RecipeError

# Of mtcnn 1.0.0. joblib, which reads them, is pickle: nothing else is given to it.
WEIGHTS = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
_CELL, _STRIDE = 12, 2  # what the first network sees of one place, and how far places are apart
_AT_ONCE = 512  # boxes given to the second or third network


class DetectorError(RecipeError):
    """The detector's weights are not there, or not those that are known; or its options are none."""


class Face(NamedTuple):
    box: tuple[float, float, float, float]
    score: float
    landmarks: tuple[tuple[float, float], ...]  # five: eyes, nose, corners of the mouth

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)


# ---- networks ------------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    """Convolutions, each with a PReLU and, if it says so, a pooling; a dense layer, if any; and the outputs."""

    def __init__(
        self, convolutions: list[tuple[int, int, int]], dense: tuple[int, int] | None, outputs: list[int]
    ) -> None:
        """convolutions: channels, size, and of the pooling behind them (0: none)."""
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, size, pool in convolutions:
            layers += [nn.Conv2d(before, channels, size), nn.PReLU(channels)]
            if pool:
                layers.append(nn.MaxPool2d(pool, 2, ceil_mode=True))
            before = channels
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Sequential(nn.Linear(*dense), nn.PReLU(dense[1])) if dense else None
        make = (lambda n: nn.Linear(dense[1], n)) if dense else (lambda n: nn.Conv2d(before, n, 1))
        self.outputs = nn.ModuleList([make(count) for count in outputs])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.convolutions(x)
        if self.dense is not None:
            x = self.dense(x.permute(0, 3, 2, 1).flatten(1))  # columns before rows, as its authors trained it
        return [output(x) for output in self.outputs]


def _make(name: str) -> _Net:
    """With the outputs that the weights have, in their order: offsets of the box, landmarks, face or not."""
    if name == "pnet":
        return _Net([(10, 3, 2), (16, 3, 0), (32, 3, 0)], None, [4, 2])
    if name == "rnet":
        return _Net([(28, 3, 3), (48, 3, 3), (64, 2, 0)], (576, 128), [4, 2])
    return _Net([(32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)], (1152, 256), [4, 10, 2])


def find_weights() -> Path:
    """The folder of the weights in the installed package `mtcnn`, which is not imported: it would want TensorFlow."""
    found = importlib.util.find_spec("mtcnn")
    if found is None or not found.submodule_search_locations:
        raise DetectorError("the detector's weights are in the package mtcnn: pip install mtcnn==1.0.0")
    return Path(found.submodule_search_locations[0]) / "assets" / "weights"


def read_weights(folder: Path, name: str) -> list[np.ndarray]:
    """Of one network, in its layers' order; DetectorError for any bytes but the known ones."""
    path = folder / f"{name}.lz4"
    if not path.is_file():
        raise DetectorError(f"{path} is not there; it is of mtcnn 1.0.0: pip install mtcnn==1.0.0")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != WEIGHTS[name]:
        raise DetectorError(f"{path} is not the file of mtcnn 1.0.0 (SHA-256 {WEIGHTS[name][:16]}...); it was not read")
    try:
        import joblib  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import lz4  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise DetectorError(f"{path} is read by joblib and lz4: pip install joblib lz4 ({error})") from None
    arrays: list[np.ndarray] = joblib.load(io.BytesIO(data))  # the bytes that were looked at
    return arrays


def _load(net: _Net, arrays: list[np.ndarray]) -> None:
    """TensorFlow's layout to torch's."""
    parameters = list(net.parameters())
    assert len(parameters) == len(arrays)
    with torch.no_grad():
        for parameter, array in zip(parameters, arrays):
            values = torch.from_numpy(np.ascontiguousarray(array))
            if parameter.dim() == 4:
                values = values.permute(3, 2, 0, 1)
            elif parameter.dim() == 2:
                values = values.T
            parameter.copy_(values.reshape(parameter.shape))


# ---- regions -------------------------------------------------------------------------------------------------------


class _Areas:
    """Means over rectangles of a photograph, by sums from its corner: exact, for they are of whole numbers."""

    def __init__(self, image: Tensor) -> None:
        """image: [3, H, W] uint8."""
        self.height, self.width = image.shape[1:]
        self._sums = torch.zeros(3, self.height + 1, self.width + 1, dtype=torch.int64, device=image.device)
        torch.cumsum(image, 1, dtype=torch.int64, out=self._sums[:, 1:, 1:])
        torch.cumsum(self._sums[:, 1:, 1:], 2, out=self._sums[:, 1:, 1:])

    def _ends(self, first: Tensor, length: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """Where `parts` parts of each stretch [N] begin and end, [N, parts]: they share a pixel that both touch."""
        place = torch.arange(parts, device=first.device)
        begin = place * length[:, None] // parts
        end = -(-(place + 1) * length[:, None] // parts)
        return first[:, None] + begin, first[:, None] + end

    def resized(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """[N, 3, height, width] float32 in [-1, 1) of boxes [N, 4] int64 (left, top, past right, past bottom)."""
        left, top, right, bottom = boxes.unbind(1)
        y0, y1 = (each[:, :, None] for each in self._ends(top, bottom - top, height))
        x0, x1 = (each[:, None, :] for each in self._ends(left, right - left, width))
        sums = self._sums
        total = sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0]
        means = total.double() / ((y1 - y0) * (x1 - x0))
        return ((means - 127.5) / 128).float().transpose(0, 1)


def _square(boxes: Tensor) -> Tensor:
    """The squares of the longer side about the same centers."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    side = sizes.amax(1, keepdim=True)
    corner = boxes[:, :2] + sizes / 2 - side / 2
    return torch.cat([corner, corner + side], 1)


def _moved(boxes: Tensor, offsets: Tensor, one_more: int) -> Tensor:
    """By offsets in units of the boxes' sizes, which count their last pixel or not."""
    sizes = boxes[:, 2:] - boxes[:, :2] + one_more
    return boxes + offsets * sizes.repeat(1, 2)


def _without_insiders(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Places of the boxes of which no better one covers more than `most` of the smaller of the two, best first."""
    sizes = (boxes[:, 2:] - boxes[:, :2] + 1).clamp_min(0)
    areas = sizes.prod(1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        corner = torch.maximum(boxes[left, :2], boxes[best, :2])
        end = torch.minimum(boxes[left, 2:], boxes[best, 2:])
        shared = (end - corner + 1).clamp_min(0).prod(1)
        left = left[shared <= most * torch.minimum(areas[left], areas[best])]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.int64)


# ---- the detector --------------------------------------------------------------------------------------------------


class Detector:
    """``detector(image)``: the faces of a photograph, best first.

    Args:
        min_face: the smallest side of a face in pixels; the time goes by its inverse square.
        min_score: faces of which the last network is less sure are left out.
        thresholds: of the three networks' scores.
        factor: from one scale of the pyramid to the next.
        weights: the folder of the three files; by default that of the package mtcnn.
    """

    def __init__(
        self,
        min_face: float = 20,
        min_score: float = 0.9,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
        device: str | torch.device = "cpu",
        weights: Path | None = None,
    ) -> None:
        if not (min_face >= _CELL and math.isfinite(min_face)):
            raise DetectorError(f"expected min_face to be at least {_CELL} pixels, but got {min_face}")
        if not 0 <= min_score <= 1:
            raise DetectorError(f"expected min_score in [0, 1], but got {min_score}")
        if not 0 < factor < 1:
            raise DetectorError(f"expected factor in (0, 1), but got {factor}")
        self.min_face, self.min_score, self.thresholds, self.factor = min_face, min_score, thresholds, factor
        self.device = torch.device(device)
        folder = find_weights() if weights is None else weights
        self._nets = {}
        for name in WEIGHTS:
            net = _make(name)
            _load(net, read_weights(folder, name))
            self._nets[name] = net.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> list[Face]:
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self.device)
        areas = _Areas(pixels)
        found = [self._at_scale(areas, scale) for scale in self._scales(*pixels.shape[1:])]
        if not found:
            return []
        boxes, scores = (torch.cat(parts) for parts in zip(*found))
        kept = nms(boxes[:, :4], scores, 0.7)
        boxes = _square(_moved(boxes[kept, :4], boxes[kept, 4:], 0))

        boxes, (offsets, _), scores = self._looked_at(areas, "rnet", boxes, 24, self.thresholds[1])
        kept = nms(boxes, scores, 0.7)
        boxes = _square(_moved(boxes[kept], offsets[kept], 1))

        boxes, (offsets, points, _), scores = self._looked_at(areas, "onet", boxes, 48, self.thresholds[2])
        sizes, corner = boxes[:, 2:] - boxes[:, :2] + 1, boxes[:, :2] - 1
        landmarks = points.view(-1, 2, 5).transpose(1, 2) * sizes[:, None] + corner[:, None]
        boxes = _moved(boxes, offsets, 1)
        kept = _without_insiders(boxes, scores, 0.7)
        kept = kept[scores[kept] >= self.min_score]
        return [
            Face((box[0], box[1], box[2], box[3]), score, tuple((x, y) for x, y in of_face))
            for box, score, of_face in zip(boxes[kept].tolist(), scores[kept].tolist(), landmarks[kept].tolist())
        ]

    def _scales(self, height: int, width: int) -> Iterator[float]:
        """What the photograph is multiplied by, so that the first network's cell is a face of each size."""
        scale = _CELL / self.min_face
        side = min(height, width) * scale
        while side >= _CELL:
            yield scale
            scale *= self.factor
            side *= self.factor

    def _at_scale(self, areas: _Areas, scale: float) -> tuple[Tensor, Tensor]:
        """Boxes with their offsets [N, 8], and scores [N]."""
        whole = torch.tensor([[0, 0, areas.width, areas.height]], device=self.device)
        image = areas.resized(whole, int(areas.height * scale + 1), int(areas.width * scale + 1))
        offsets, classes = self._nets["pnet"](image)
        scores = classes.softmax(1)[0, 1]
        place = (scores >= self.thresholds[0]).nonzero()
        corner = place.flip(1).to(scores.dtype) * _STRIDE
        first, last = ((corner + 1) / scale).floor(), ((corner + _CELL) / scale).floor()
        boxes = torch.cat([first, last, offsets[0, :, place[:, 0], place[:, 1]].T], 1)
        found = scores[place[:, 0], place[:, 1]]
        kept = nms(boxes[:, :4], found, 0.5)
        return boxes[kept], found[kept]

    def _looked_at(
        self, areas: _Areas, name: str, boxes: Tensor, size: int, threshold: float
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """What a network takes for a face of these boxes: they, its outputs and its scores."""
        # Boxes count pixels from 1.
        limit = boxes.new_tensor([areas.width, areas.height]).long()
        corner, end = boxes[:, :2].trunc().long().clamp_min(1) - 1, torch.minimum(boxes[:, 2:].trunc().long(), limit)
        inside = (end > corner).all(1)
        boxes, regions = boxes[inside], torch.cat([corner, end], 1)[inside]
        net = self._nets[name]
        parts = [net(areas.resized(part, size, size)) for part in regions.split(_AT_ONCE) if len(part)]
        if not parts:
            parts = [net(boxes.new_zeros(0, 3, size, size))]
        outputs = [torch.cat(of_all) for of_all in zip(*parts)]
        scores = outputs[-1].softmax(1)[:, 1]
        found = scores > threshold
        return boxes[found], [output[found] for output in outputs], scores[found]
