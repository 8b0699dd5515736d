"""``tour``: all of it on drawn people: align, pack, train, eval, export, enroll, identify, verify, and a page.

It runs the recipe's own commands, and says each before it runs, so that the page is also a list of what to type. The
people who are evaluated are none of those who are trained on.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.face import protocols
from recipes.face.config import CONFIGS
from recipes.face.detection import Detector, DetectorError
from recipes.face.embedders import Embedder, Network, load_embedder
from recipes.face.errors import RecipeError
from recipes.face.photos import classes_of, decode, images_in, read_photo
from recipes.face.protocols import Pairs
from recipes.face.rendering import render
from recipes.face.verification_sets import read_verification_set
from torchmargin import evaluation
from torchmargin.demo.report import STYLE

Command = Callable[[list[str]], int]


class Size(NamedTuple):
    """Of a tour."""

    people: int  # to train on
    views: int
    held_out: int
    held_out_views: int
    pairs: int
    epochs: int


FULL = Size(people=160, views=24, held_out=40, held_out_views=10, pairs=4000, epochs=8)
QUICK = Size(people=80, views=12, held_out=24, held_out_views=8, pairs=1200, epochs=7)
_FIRST_HELD_OUT = 100_000  # the number of the first person who is not trained on


class Tour:
    """Runs commands and keeps what they said."""

    def __init__(self, run: Command) -> None:
        self._run = run
        self.said: list[tuple[str, str, int]] = []  # command, what it printed, exit status

    def __call__(self, *arguments: object, allowed: tuple[int, ...] = (0,)) -> None:
        """RecipeError where the command fails."""
        words = [str(each) for each in arguments]
        shown = "python -m recipes.face " + shlex.join(words)
        print(f"$ {shown}", flush=True)
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            status = self._run(words)
        print(heard.getvalue(), end="", flush=True)
        self.said.append((shown, heard.getvalue(), status))
        if status not in allowed:
            raise RecipeError(f"{shown} ended with status {status}")


def write_pairs(faces: Path, out: Path, count: int, seed: int = 0) -> None:
    """A CSV of `count` pairs, half of them of one person, in no order."""
    random = np.random.default_rng(seed)
    people = list(classes_of(faces).values())
    rows = []
    for place in range(count):
        same = place % 2 == 0
        chosen = random.choice(len(people), 1 if same else 2, replace=False)
        if same:
            first, second = (people[chosen[0]][k] for k in random.choice(len(people[chosen[0]]), 2, replace=False))
        else:
            first, second = (people[k][random.integers(len(people[k]))] for k in chosen)
        rows.append([first.relative_to(out.parent), second.relative_to(out.parent), int(same)])
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[k] for k in random.permutation(count)])


def pixel_pairs(path: Path, size: int = 16) -> Pairs:
    """Of a ``.bin``, by the cosine of the pixels alone: each picture small, without its mean."""
    images, same = read_verification_set(path)
    rows = []
    for data in images:
        small = decode(data).convert("RGB").resize((size, size), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32)).flatten()
        rows.append(pixels - pixels.mean())
    return protocols.two_by_two(torch.stack(rows), same)


def untrained(network: Network) -> Embedder:
    """The same network as it begins."""
    torch.manual_seed(0)
    return Embedder(network, network.make().eval().requires_grad_(False))


def run_tour(out: Path, run: Command, quick: bool = False) -> dict[str, float]:
    """Everything into ``out``, and ``out/index.html``. Returns the equal error rates by name.

    RecipeError if what was trained does not halve the errors of the pixels and of the untrained network.
    """
    began = time.perf_counter()
    size, config = QUICK if quick else FULL, CONFIGS["narrow"]
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "tour.txt"
    if any(out.iterdir()) and not marker.exists():
        raise RecipeError(f"{out} is not empty, and no tour's folder; choose another --out")
    _clear(out)
    marker.write_text("made by python -m recipes.face tour; its next run begins anew\n", encoding="utf-8")
    tour = Tour(run)
    sets = {"train": (size.people, size.views, 0), "held_out": (size.held_out, size.held_out_views, _FIRST_HELD_OUT)}
    for name, (people, views, first) in sets.items():
        landmarks = render(out / "photos" / name, people, views, first=first)
        photos, faces = out / "photos" / name, out / "faces" / name
        tour("align", photos, faces, "--size", config.size, "--landmarks", landmarks)
    tour("pack", out / "faces/train", out / "train.rec")
    write_pairs(out / "faces/held_out", out / "pairs.csv", size.pairs)
    tour("pack", out / "pairs.csv", out / "held_out.bin")
    trained = out / "run"
    tour(
        *("train", "--config", "narrow", "--epochs", size.epochs, "--data", out / "train.rec"),
        *("--val", out / "held_out.bin", "--out", trained, "--device", "cpu"),
    )
    embedder_file = trained / "embedder.pt"
    tour("eval", embedder_file, "--bin", out / "held_out.bin", "--thresholds", "insightface", "--out", out / "eval")
    tour("export", embedder_file, "--format", "pt2")

    strangers = sorted(each for each in (out / "faces/held_out").iterdir() if each.is_dir())
    _split(strangers, out / "gallery", out / "probes")
    tour("enroll", out / "gallery", out / "gallery.pt", "--embedder", embedder_file, "--aligned")
    arguments = ["identify", out / "gallery.pt", out / "probes", "--embedder", embedder_file, "--aligned"]
    tour(*arguments, "--top", 3, "--unknown", "--out", out / "identified.csv")
    same, other = sorted(strangers[0].glob("*.jpg"))[:2], sorted(strangers[1].glob("*.jpg"))[0]
    for second in (same[1], other):
        tour("verify", same[0], second, "--embedder", embedder_file, "--aligned", allowed=(0, 1))

    embedder = load_embedder(embedder_file)
    curves = {
        "pixels": pixel_pairs(out / "held_out.bin"),
        "untrained network": protocols.bin_pairs(untrained(embedder.network), out / "held_out.bin", progress=False),
        "trained": protocols.bin_pairs(embedder, out / "held_out.bin", progress=False),
    }
    reports = {name: protocols.report(pairs, "insightface") for name, pairs in curves.items()}
    (out / "table.txt").write_text(_as_text(reports), encoding="utf-8")
    _write_page(out, tour, curves, reports, size, time.perf_counter() - began)
    print(_as_text(reports) + f"{out / 'index.html'} ({time.perf_counter() - began:.0f} s)")
    errors = {name: float(found["eer"]) for name, found in reports.items()}
    if errors["trained"] > min(errors["pixels"], errors["untrained network"]) / 2:
        raise RecipeError(f"the trained network errs too often: {errors}")
    return errors


def _clear(out: Path) -> None:
    for name in ("photos", "faces", "run", "eval", "gallery", "probes"):
        shutil.rmtree(out / name, ignore_errors=True)


def _split(people: list[Path], gallery: Path, probes: Path) -> None:
    """Half of each person's faces to the gallery, the others are probes; of the last fifth of the people none is in the
    gallery."""
    known = len(people) - len(people) // 5
    for place, person in enumerate(people):
        faces = sorted(person.glob("*.jpg"))
        half = len(faces) // 2
        for kind, chosen in ((gallery, faces[:half] if place < known else []), (probes, faces[half:])):
            for face in chosen:
                (kind / person.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(face, kind / person.name / face.name)


# ---- the page ------------------------------------------------------------------------------------------------------


def _rows(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["", "EER", "accuracy", "AUC"]]
    for name, found in reports.items():
        rows.append([name, *(f"{found[key]:.4f}" for key in ("eer", "accuracy", "auc"))])
    return rows


def _as_text(reports: dict[str, dict[str, Any]]) -> str:
    return "".join("".join(f"{cell:<20}" for cell in row).rstrip() + "\n" for row in _rows(reports))


def _as_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:])
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _picture(data: bytes, caption: str, width: int | None = None) -> str:
    encoded = base64.b64encode(data).decode()
    wide = f' width="{width}"' if width else ""
    return (
        f'<figure><img alt="{escape(caption)}"{wide} src="data:image/png;base64,{encoded}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _training_curves(log: Path, val: Path) -> bytes:
    def read(path: Path) -> dict[str, list[float]]:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]}

    steps, checks = read(log), read(val)

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        panels[0].plot(steps["step"], steps["loss"])
        panels[0].set(title="loss", xlabel="step", yscale="log")
        panels[1].plot(steps["step"], steps["angle_degrees"])
        panels[1].set(title="angle to the own class, degrees", xlabel="step")
        panels[2].plot(steps["step"], steps["accuracy"], label="of people trained on: class")
        for name in checks:
            if name.endswith("_accuracy"):
                panels[2].plot(checks["step"], checks[name], "o-", label="of others: pairs")
        panels[2].set(title="accuracy", xlabel="step", ylim=(0, 1.02))
        panels[2].legend()

    return protocols.png_of(draw, (12, 3.4))


def _histogram(pairs: Pairs, threshold: float | None) -> bytes:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bins = np.linspace(-1, 1, 81)
        for label, chosen in (("two persons", ~pairs.same), ("one person", pairs.same)):
            axes.hist(pairs.scores[chosen].numpy(), bins, alpha=0.6, label=label, density=True)
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--", label="threshold")
        axes.set(xlabel="cosine", ylabel="density")
        axes.legend()

    return protocols.png_of(draw, (6, 4))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _neighbours(embedder: Embedder, gallery: Path, probes: Path, rows: int = 8, side: int = 72) -> Image.Image:
    """A probe a row, and the gallery's faces that are nearest to it, with a green or a red frame."""
    known = images_in(gallery)
    asked = images_in(probes)[:: max(1, len(images_in(probes)) // rows)][:rows]
    embeddings: list[Tensor] = [embedder.embed(read_photo(path) for path in paths) for paths in (known, asked)]
    _, places = evaluation.top_k(embeddings[1], embeddings[0], min(5, len(known)))
    people = {path.parent.name for path in known}
    sheet = Image.new("RGB", ((places.shape[1] + 1) * side + 12, len(asked) * side), "white")
    for row, (probe, found) in enumerate(zip(asked, places.tolist())):
        sheet.paste(read_photo(probe).resize((side - 4, side - 4)), (2, row * side + 2))
        for column, place in enumerate(found):
            right = known[place].parent.name == probe.parent.name
            color = "#2a9d3a" if right else ("#c33" if probe.parent.name in people else "#999")
            framed = Image.new("RGB", (side, side), color)
            framed.paste(read_photo(known[place]).resize((side - 8, side - 8)), (4, 4))
            sheet.paste(framed, ((column + 1) * side + 12, row * side))
    return sheet


def _beside(first: Path, second: Path, side: int = 112) -> bytes:
    sheet = Image.new("RGB", (2 * side + 8, side), "white")
    for place, path in enumerate((first, second)):
        sheet.paste(read_photo(path).resize((side, side)), (place * (side + 8), 0))
    return _png(sheet)


def _detected(photos: Path, count: int = 40) -> str:
    """How the detector, which is made for photographs, does on drawings."""
    chosen = images_in(photos)
    chosen = chosen[:: max(1, len(chosen) // count)][:count]
    try:
        detector = Detector()
    except DetectorError as error:
        return f"The detector was not asked: {error}."
    found = sum(bool(detector(read_photo(path))) for path in chosen)
    return f"The detector, which is made for photographs, finds a face in {found} of {len(chosen)} of these drawings."


def _identification(path: Path, known: set[str]) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        best = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    right = [row["name"] == Path(row["probe"]).parent.name for row in best if Path(row["probe"]).parent.name in known]
    refused = [row["name"] == "unknown" for row in best if Path(row["probe"]).parent.name not in known]
    return (
        f"Of {len(right)} probes of people in the gallery {sum(right)} were named rightly; of {len(refused)} of others "
        f"{sum(refused)} were unknown."
    )


def _write_page(
    out: Path, tour: Tour, curves: dict[str, Pairs], reports: dict[str, dict[str, Any]], size: Size, seconds: float
) -> None:
    embedder = load_embedder(out / "run/embedder.pt")
    threshold = embedder.threshold()
    verified = [(shlex.split(command)[4:6], text) for command, text, _ in tour.said if " verify " in command]
    settings = json.loads((out / "run/config.json").read_text(encoding="utf-8"))
    commands = "\n".join(f"$ {command}\n{text}".rstrip() for command, text, _ in tour.said)
    known = {each.name for each in (out / "gallery").iterdir()}
    parts = [
        f"<h1>From pictures to a recogniser</h1>\n<p class='note'>{size.people} drawn people in {size.views} views "
        f"each to train on, {size.held_out} others to be told apart; {settings['net']} of width {settings['width']}, "
        f"{settings['loss']}; {seconds:.0f} seconds in all. Drawings are no photographs: these numbers are of the "
        f"tools, not of faces.</p>",
        f"<h2>Verification of people who were never trained on</h2>{_as_table(_rows(reports))}",
        _picture(protocols.roc_picture(curves), "True accepts over false accepts"),
        _picture(_histogram(curves["trained"], threshold), f"Cosines of pairs; the threshold is {threshold:.3f}"),
        "<h2>Training</h2>",
        _picture(_training_curves(out / "run/log.csv", out / "run/val.csv"), "The run's log.csv and val.csv"),
        "<h2>Faces, aligned</h2>",
        _picture((out / "faces/train/contact_sheet.png").read_bytes(), "Some of those that were trained on", 700),
        f"<p>{escape(_detected(out / 'photos/held_out'))} They are aligned by the landmarks they were drawn with.</p>",
        "<h2>Nearest faces</h2>",
        _picture(
            _png(_neighbours(embedder, out / "gallery", out / "probes")),
            "A probe, left, and the nearest faces of the gallery: green of the same person, red of another, grey where "
            "the person is not in the gallery",
        ),
        f"<p>{escape(_identification(out / 'identified.csv', known))}</p>",
        "<h2>Two pictures</h2>",
        *(_picture(_beside(Path(pair[0]), Path(pair[1])), text.strip()) for pair, text in verified),
        f"<h2>What was run</h2><pre>{escape(commands)}</pre>",
    ]
    body = "\n".join(parts)
    style = STYLE + " pre { overflow-x: auto; background: #f4f4f4; padding: 1rem; }"
    (out / "index.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>torchmargin: from pictures to a '
        f"recogniser</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


# ---- the command ---------------------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``tour`` to the recipe's."""
    made = commands.add_parser("tour", help="all of it on drawn people, in minutes on a CPU, and a page")
    made.add_argument("--out", type=Path, default=Path("out/face"), help="(%(default)s)")
    made.add_argument("--quick", action="store_true", help="fewer people and epochs: a minute or two")
    made.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from recipes.face.__main__ import main

    run_tour(options.out, main, options.quick)
    return 0
