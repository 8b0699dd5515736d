"""``export``: an embedder as one program, from pixels to unit embeddings, without this recipe. ``import``: weights of
InsightFace's names to an embedder.

The program takes uint8 pixels [B, 3, S, S], RGB, of any B, and returns float32 [B, D] of unit length: normalisation,
the order of colours, the sum with the mirror image and L2 are inside.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.face.embedders import Embedder, Network, load_embedder, load_plain, load_state
from recipes.face.errors import RecipeError

FORMATS = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
# Of a coordinate of unit embeddings: other kernels add in another order, through up to 100 layers.
TOLERANCE = 1e-4


class ExportError(RecipeError):
    """A format whose packages are missing, or a program that computes something else."""


class Deployed(nn.Module):
    """What is exported."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.network = embedder.model
        self.mean, self.deviation = embedder.mean, embedder.deviation
        self.bgr, self.mirrored = embedder.colors == "BGR", embedder.flip

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 to [B, D] float32."""
        x = (pixels.float() - self.mean) / self.deviation
        if self.bgr:
            x = x.flip(1)
        found: Tensor = self.network(x)
        if self.mirrored:
            found = found + self.network(x.flip(3))
        return nn.functional.normalize(found.float(), dim=1, eps=1e-12)


def export(embedder_file: Path, form: str, out: Path | None = None) -> tuple[Path, float]:
    """Writes the program and compares it with the embedder on several batch sizes.

    Returns the file and the largest difference of a coordinate; ExportError above TOLERANCE, and nothing is left.
    """
    embedder = load_embedder(embedder_file)
    out = out or embedder_file.with_name(embedder_file.name.removesuffix(".pt") + FORMATS[form])
    if form != "onnx" and out.suffix != ".pt2":
        raise ExportError(f"expected {out} to end in .pt2")
    module = Deployed(embedder).eval()
    size = embedder.network.size
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8) for count in (2, 1, 5)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name("partial." + out.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own
            run = _WRITE[form](module, batches[0], partial)
            worst = 0.0
            for pixels in batches:
                wanted = nn.functional.normalize(embedder.embed_pixels(pixels), dim=1, eps=1e-12)
                worst = max(worst, float((run(pixels) - wanted).abs().max()))
        if not worst <= TOLERANCE:
            raise ExportError(f"{out}: embeddings differ by {worst:.2g} from the embedder's; nothing was written")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out, worst


def _exported(module: nn.Module, example: Tensor) -> Any:
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _write_pt2(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_exported(module, example), str(path))
    return torch.export.load(str(path)).module()


def _write_aoti(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(_exported(module, example), package_path=str(path))
    loaded: Callable[[Tensor], Tensor] = aoti_load_package(str(path))
    return loaded


def _write_onnx(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import onnxscript  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ExportError(f"onnx needs its packages: pip install onnx onnxscript onnxruntime ({error})") from None
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["pixels"],
        output_names=["embeddings"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


_WRITE: dict[str, Callable[[nn.Module, Tensor, Path], Callable[[Tensor], Tensor]]] = {
    "pt2": _write_pt2,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``export`` to the recipe's."""
    made = commands.add_parser("export", help="an embedder as one program, compared with it")
    made.add_argument("embedder", type=Path)
    made.add_argument("--format", choices=list(FORMATS), required=True, help="torch.export, AOTInductor or ONNX")
    made.add_argument("--out", type=Path, help="default: beside the embedder")
    made.set_defaults(run=_run)
    bare = commands.add_parser("import", help="a network's bare weights, such as InsightFace publishes, to an embedder")
    bare.add_argument("weights", type=Path, help="a state dict by InsightFace's names")
    bare.add_argument("out", type=Path, help="the embedder, .pt")
    bare.add_argument("--net", default="iresnet50", help="(%(default)s)")
    bare.add_argument("--features", type=int, default=512, help="(%(default)s)")
    bare.add_argument("--size", type=int, default=112, help="of the images (%(default)s)")
    bare.add_argument("--width", type=int, default=64, help="of IResNet's first stage (%(default)s)")
    bare.add_argument("--colors", choices=["RGB", "BGR"], default="RGB", help="that it was trained on (%(default)s)")
    bare.add_argument("--no-flip", action="store_true", help="embeddings of images alone, without their mirror images")
    bare.set_defaults(run=_run_import)


def _run_import(options: argparse.Namespace) -> int:
    network = Network(options.net, options.features, options.size, options.width)
    model = network.make()
    load_state(model, load_plain(options.weights), options.weights)
    Embedder(network, model, colors=options.colors, flip=not options.no_flip).save(options.out)
    print(f"{options.out}: {network.name}, {options.colors}; `eval` gives it thresholds")
    return 0


def _run(options: argparse.Namespace) -> int:
    path, worst = export(options.embedder, options.format, options.out)
    print(f"{path}: uint8 [B, 3, S, S] RGB to unit embeddings; differs from the embedder by at most {worst:.2g}")
    return 0
