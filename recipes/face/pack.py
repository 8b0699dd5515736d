"""``pack`` and ``unpack``: a folder of images, or of pairs, to InsightFace's files and back."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from recipes.face.errors import RecipeError
from recipes.face.photos import BadImageError, bad, classes_of, decode
from recipes.face.records import RecordWriter, TrainingRecords
from recipes.face.verification_sets import read_verification_set, write_verification_set

_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp"}


class PackError(RecipeError):
    """What cannot be packed or unpacked; the message names the file."""


def _read(path: Path, on_bad: str) -> bytes | None:
    """An image's file; None where it is bad and skipped."""
    try:
        image = path.read_bytes()
        decode(image)
    except (OSError, BadImageError) as error:
        bad(path, error, on_bad)
        return None
    return image


def _ending(image: bytes, what: str, on_bad: str) -> str | None:
    """Of an encoded image's file; None where it is bad and skipped."""
    try:
        return _ENDINGS.get(str(decode(image).format), ".img")
    except BadImageError as error:
        bad(what, error, on_bad)
        return None


def pack_folder(folder: Path, to: Path, on_bad: str = "fail") -> tuple[int, int]:
    """Writes ``to`` (a ``.rec``), its ``.idx``, and the classes' names, a line each, to ``classes.txt`` beside it.

    Images are taken as they are encoded; a class without a readable one gets no label. Returns how many images and
    classes there are. on_bad: "skip" names unreadable images on stderr and goes on.
    """
    found = classes_of(folder)
    names: list[str] = []
    images = 0
    to.parent.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(to)
    try:
        with tqdm(total=sum(map(len, found.values())), desc=f"pack {to.name}", unit="image") as progress:
            for name, paths in found.items():
                before = images
                for path in paths:
                    progress.update()
                    image = _read(path, on_bad)
                    if image is not None:
                        writer.add(image, len(names))
                        images += 1
                if images > before:
                    names.append(name)
        if not images:
            raise PackError(f"{folder} has no readable image")
        writer.close()
    except BaseException:
        writer.discard()
        raise
    to.with_name("classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return images, len(names)


def read_pairs(path: Path) -> Iterator[tuple[Path, Path, bool]]:
    """A CSV of two images (relative to it) and 0 or 1, with or without a header."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[-1].strip().lower() in ("same", "issame", "label")):
                continue
            if len(row) != 3 or row[2].strip() not in ("0", "1"):
                raise PackError(f"{path}, line {number}: expected two images and 0 or 1, but got {','.join(row)[:80]}")
            yield path.parent / row[0].strip(), path.parent / row[1].strip(), row[2].strip() == "1"


def pack_pairs(pairs: Path, to: Path, on_bad: str = "fail") -> int:
    """Writes ``to`` (a ``.bin``); returns the number of pairs."""
    images: list[bytes] = []
    same: list[bool] = []
    for first, second, is_same in read_pairs(pairs):
        one, other = _read(first, on_bad), _read(second, on_bad)
        if one is not None and other is not None:
            images += [one, other]
            same.append(is_same)
    if not same:
        raise PackError(f"{pairs} has no pair that can be read")
    to.parent.mkdir(parents=True, exist_ok=True)
    write_verification_set(to, images, same)
    return len(same)


def unpack(source: Path, to: Path, on_bad: str = "fail") -> int:
    """A ``.rec`` to a folder for each class (its name where ``classes.txt`` lies beside it), a ``.bin`` to images and
    ``pairs.csv``. Returns the number of images."""
    if source.suffix == ".bin":
        images, same = read_verification_set(source)
        to.mkdir(parents=True, exist_ok=True)
        rows = []
        for pair, is_same in enumerate(same):
            places = (2 * pair, 2 * pair + 1)
            endings = [_ending(images[place], f"{source}, image {place}", on_bad) for place in places]
            if None not in endings:
                names = [f"{place:07d}{ending}" for place, ending in zip(places, endings)]
                for name, place in zip(names, places):
                    (to / name).write_bytes(images[place])
                rows.append([*names, int(is_same)])
        with (to / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["first", "second", "same"], *rows])
        return 2 * len(rows)
    records = TrainingRecords(source)
    names_file = source.with_name("classes.txt")
    class_names = names_file.read_text(encoding="utf-8").split("\n")[:-1] if names_file.exists() else []
    written = 0
    for place in tqdm(range(len(records)), desc=f"unpack {source.name}", unit="image"):
        image, label = records[place]
        name = class_names[label] if label < len(class_names) else f"{label:07d}"
        if Path(name).name != name or name in (".", ".."):
            raise PackError(f"{names_file}, line {label + 1}: {name!r} is no folder's name")
        key = records.keys[place]
        ending = _ending(image, f"{source}, record {key}", on_bad)
        if ending is not None:
            (to / name).mkdir(parents=True, exist_ok=True)
            (to / name / f"{key:08d}{ending}").write_bytes(image)
            written += 1
    return written


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``pack`` and ``unpack`` to the recipe's."""
    pack = commands.add_parser("pack", help="a folder of classes to train.rec, or a CSV of pairs to a .bin")
    pack.add_argument(
        "source", type=Path, help="folder with a subfolder for each class, or a CSV: image, image, 0 or 1"
    )
    pack.add_argument("out", type=Path, help="....rec, or ....bin for pairs")
    back = commands.add_parser("unpack", help="a .rec or .bin to images")
    back.add_argument("source", type=Path)
    back.add_argument("out", type=Path, help="a folder")
    for each in (pack, back):
        each.add_argument("--on-bad", choices=["skip", "fail"], default="fail", help="images that cannot be decoded")
    pack.set_defaults(run=_run_pack)
    back.set_defaults(run=_run_unpack)


def _run_pack(options: argparse.Namespace) -> int:
    if options.out.suffix == ".bin":
        count = pack_pairs(options.source, options.out, options.on_bad)
        print(f"{options.out}: {count:,} pairs")
    elif options.out.suffix == ".rec":
        images, classes = pack_folder(options.source, options.out, options.on_bad)
        print(f"{options.out}: {images:,} images of {classes:,} classes")
    else:
        raise PackError(f"expected {options.out} to end in .rec or .bin")
    return 0


def _run_unpack(options: argparse.Namespace) -> int:
    print(f"{options.out}: {unpack(options.source, options.out, options.on_bad):,} images")
    return 0
