"""``align``: photographs to aligned crops, a table of what was found, and a sheet to look at."""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from recipes.face.alignment import TEMPLATE, TEMPLATE_SIZE, AlignmentError, Points, crop, similarity, template
from recipes.face.detection import Detector, Face
from recipes.face.errors import RecipeError
from recipes.face.photos import BadImageError, bad, images_in, read_photo

POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
LANDMARKS = [f"{point}_{axis}" for point in POINTS for axis in "xy"]  # columns of a table of them
COLUMNS = ["photo", "crop", "score", "left", "top", "right", "bottom", *LANDMARKS, "residual"]
_SHEET = 10, 10  # crops of the contact sheet


class AlignError(RecipeError):
    """Photographs without a face, or landmarks that cannot be read."""


def choose(faces: list[Face], which: str, size: tuple[int, int]) -> list[Face]:
    """ "all", or of several the "largest", or the one whose middle is nearest to the photograph's ("center")."""
    if which == "all" or len(faces) < 2:
        return faces
    if which == "largest":
        return [max(faces, key=lambda face: face.area)]

    def from_middle(face: Face) -> float:
        left, top, right, bottom = face.box
        return math.hypot((left + right - size[0]) / 2, (top + bottom - size[1]) / 2)

    return [min(faces, key=from_middle)]


def align_face(
    photo: Image.Image, face: Face, size: int = TEMPLATE_SIZE, points: Points = TEMPLATE
) -> tuple[Image.Image, float]:
    """The crop and how far the landmarks are from the template, in its pixels. ``points``: the template at 112."""
    found = similarity(face.landmarks, template(size, points))
    return crop(photo, found, size), found.residual


def read_landmarks(path: Path) -> dict[str, list[Face]]:
    """A CSV with columns ``photo`` and left_eye_x ... right_mouth_y: a line for each face; other columns are ignored.

    What `align` writes is such a file.
    """
    faces: dict[str, list[Face]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        missing = [name for name in ["photo", *LANDMARKS] if name not in (table.fieldnames or [])]
        if missing:
            raise AlignError(f"{path} has no column {missing[0]}; expected photo, {', '.join(LANDMARKS)}")
        for number, row in enumerate(table, 2):
            try:
                values = [float(row[name]) for name in LANDMARKS]
            except (TypeError, ValueError):
                raise AlignError(f"{path}, line {number}: expected ten numbers") from None
            if not all(math.isfinite(value) for value in values):
                raise AlignError(f"{path}, line {number}: a landmark is not finite")
            points = tuple(zip(values[::2], values[1::2]))
            xs, ys = values[::2], values[1::2]
            faces.setdefault(row["photo"], []).append(Face((min(xs), min(ys), max(xs), max(ys)), 1.0, points))
    return faces


# ---- one photograph ------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    photos: Path
    out: Path
    size: int
    which: str
    min_face: float
    min_score: float
    landmarks: dict[str, list[Face]] | None

    def crops(self, photo: str, count: int) -> list[Path]:
        path = Path(photo).with_suffix(".jpg")
        if self.which != "all":
            return [path]
        return [path.with_name(f"{path.stem}.{place}.jpg") for place in range(count)]


_detectors: dict[tuple[float, float], Detector] = {}


def _detect(job: _Job, image: Image.Image) -> list[Face]:
    key = job.min_face, job.min_score
    if key not in _detectors:
        _detectors[key] = Detector(*key)
    return _detectors[key](image)


def _align(job: _Job, name: str) -> tuple[str, list[list[object]], str | None]:
    """The photograph's rows of the table and, if it is no image, why."""
    try:
        photo = read_photo(job.photos / name)
    except BadImageError as error:
        return name, [], str(error)
    faces = _detect(job, photo) if job.landmarks is None else job.landmarks.get(name, [])
    faces = choose(faces, job.which, photo.size)
    rows: list[list[object]] = []
    for face, path in zip(faces, job.crops(name, len(faces))):
        try:
            aligned, residual = align_face(photo, face, job.size)
        except AlignmentError as error:
            return name, [], f"{job.photos / name}: {error}"
        to = job.out / path
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_suffix(".partial")
        aligned.save(partial, "JPEG", quality=95, subsampling=0)
        partial.replace(to)
        numbers = [face.score, *face.box, *(value for point in face.landmarks for value in point), residual]
        rows.append([name, path.as_posix(), *(f"{number:.6g}" for number in numbers)])
    return name, rows, None


_worker_job: list[_Job] = []  # of a worker: given once, for landmarks may be many


def _begin_worker(job: _Job) -> None:
    torch.set_num_threads(1)
    _worker_job[:] = [job]


def _align_in_worker(name: str) -> tuple[str, list[list[object]], str | None]:
    return _align(_worker_job[0], name)


def _results(job: _Job, names: list[str], workers: int) -> Iterator[tuple[str, list[list[object]], str | None]]:
    """In the order of the names, whichever worker was first."""
    if workers == 0:
        yield from (_align(job, name) for name in names)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(job,)) as pool:
        try:
            yield from pool.map(_align_in_worker, names, chunksize=4)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- the command ---------------------------------------------------------------------------------------------------


def _already_done(out: Path, settings: dict[str, object]) -> list[list[str]]:
    """Rows of a run that was stopped; AlignError if it had other settings."""
    kept, table = out / "align.json", out / "aligned.csv"
    if not kept.exists():
        if out.is_dir() and any(out.iterdir()):
            raise AlignError(f"{out} is not empty, and not what align wrote; choose another folder")
        return []
    before = json.loads(kept.read_text(encoding="utf-8"))
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise AlignError(
            f"{out} was begun with {name} {before.get(name)!r}, not {settings[name]!r}; choose another folder"
        )
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    whole = [row for row in rows if len(row) == len(COLUMNS) and (out / row[1]).is_file()]
    # The last photograph may have more faces than were written.
    return [row for row in whole if row[0] != rows[-1][0]] if whole else []


def _check_names(job: _Job, names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(Path(name).with_suffix("").as_posix(), name)
        if other != name:
            raise AlignError(f"{job.photos}: {other} and {name} would have one crop; rename one of them")


def align(
    photos: Path,
    out: Path,
    *,
    size: int = TEMPLATE_SIZE,
    min_face: float = 20,
    min_score: float = 0.9,
    faces: str = "largest",
    landmarks: Path | None = None,
    workers: int = 0,
    on_missing: str = "skip",
    on_bad: str = "skip",
    say: Callable[[str], None] = print,
) -> tuple[int, int]:
    """Aligns all photographs under a folder into a mirrored tree. Returns how many crops there are, and how many
    photographs have none. A second call goes on where the first was stopped."""
    if size < 8:
        raise AlignError(f"expected --size of at least 8 pixels, but got {size}")
    names = [path.relative_to(photos).as_posix() for path in images_in(photos)]
    known = None if landmarks is None else read_landmarks(landmarks)
    there = set(names)
    unknown = next((name for name in known or {} if name not in there), None)
    if unknown is not None:
        raise AlignError(f"{landmarks} names {unknown}, which is not in {photos}")
    job = _Job(photos, out, size, faces, min_face, min_score, known)
    _check_names(job, names)
    if known is None:
        _detectors[min_face, min_score] = Detector(min_face, min_score)  # before anything is written
    settings: dict[str, object] = {
        "photos": str(photos.resolve()),
        "size": size,
        "min_face": min_face,
        "min_score": min_score,
        "faces": faces,
        "landmarks": None if landmarks is None else str(landmarks.resolve()),
    }
    rows: list[list[object]] = [list(row) for row in _already_done(out, settings)]
    done = {row[0] for row in rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "align.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    left = [name for name in names if name not in done]
    missing = 0
    with (out / "aligned.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([COLUMNS, *rows])
        with tqdm(total=len(names), initial=len(names) - len(left), desc="align", unit="photo") as progress:
            for name, found, error in _results(job, left, workers):
                progress.update()
                if error is not None:
                    if on_bad == "fail":
                        raise AlignError(error)
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                elif not found:
                    bad(photos / name, AlignError("no face found"), on_missing)
                missing += not found
                table.writerows(found)
                file.flush()
                rows += found
    if not rows:
        raise AlignError(f"no face found in any of the {len(names):,} photographs of {photos}")
    rows.sort(key=lambda row: str(row[0]))
    sheet = contact_sheet([out / str(row[1]) for row in rows])
    sheet.save(out / "contact_sheet.png")
    say(f"{out}: {len(rows):,} crops of {len(names) - missing:,} photographs, {missing:,} without a face")
    return len(rows), missing


def contact_sheet(crops: list[Path], size: int = 96) -> Image.Image:
    """At most a hundred of the crops, evenly chosen, in rows of ten."""
    columns, most = _SHEET[0], _SHEET[0] * _SHEET[1]
    step = max(1.0, len(crops) / most)
    chosen = [crops[int(place * step)] for place in range(min(most, len(crops)))]
    sheet = Image.new("RGB", (columns * size, -(-len(chosen) // columns) * size), "white")
    for place, path in enumerate(chosen):
        with Image.open(path) as opened:
            sheet.paste(opened.convert("RGB").resize((size, size)), (place % columns * size, place // columns * size))
    return sheet


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``align`` to the recipe's."""
    made = commands.add_parser("align", help="photographs to aligned crops")
    made.add_argument("photos", type=Path, help="a folder; its tree is mirrored")
    made.add_argument("out", type=Path, help="crops, aligned.csv and contact_sheet.png; a stopped run is continued")
    made.add_argument("--size", type=int, default=TEMPLATE_SIZE, help="of the crops, in pixels (%(default)s)")
    made.add_argument("--min-face", type=float, default=20, help="the smallest face in pixels (%(default)s)")
    made.add_argument("--min-score", type=float, default=0.9, help="of the detector (%(default)s)")
    made.add_argument("--faces", choices=["largest", "all", "center"], default="largest", help="of several")
    made.add_argument("--landmarks", type=Path, metavar="CSV", help="known landmarks, in place of the detector")
    made.add_argument("--workers", type=int, default=0, help="processes (0: this one)")
    made.add_argument("--on-missing", choices=["skip", "fail"], default="skip", help="photographs without a face")
    made.add_argument("--on-bad", choices=["skip", "fail"], default="skip", help="files that are no images")
    made.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.workers < 0:
        raise AlignError(f"expected --workers of at least 0, but got {options.workers}")
    align(
        options.photos,
        options.out,
        size=options.size,
        min_face=options.min_face,
        min_score=options.min_score,
        faces=options.faces,
        landmarks=options.landmarks,
        workers=options.workers,
        on_missing=options.on_missing,
        on_bad=options.on_bad,
    )
    return 0
