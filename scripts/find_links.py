"""Writes the pages that `pip install torchmargin -f PAGE` reads: one for each torch and CUDA, and an index of them.

    python scripts/find_links.py FOLDER OUT [--url PREFIX]

FOLDER holds wheels, in folders of any depth. The pages in OUT link to them by their relative path, or by PREFIX and
their path in FOLDER. With PREFIX, a file SHA256SUMS (as sha256sum writes it) stands for wheels that lie elsewhere.
"""

import argparse
import hashlib
import html
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

WHEEL = re.compile(r"torchmargin-[^-+]+\+pt(\d)(\d+)(cpu|cu\d+)-[^-]+-[^-]+-[^-]+\.whl")


class Wheel(NamedTuple):
    name: str
    place: str  # its path in the folder
    digest: str


def page_of(name: str) -> str | None:
    """torch-2.11+cu130 for torchmargin-0.2.0+pt211cu130-...whl; None for what is no wheel of ours."""
    tag = WHEEL.fullmatch(name)
    return f"torch-{tag[1]}.{tag[2]}+{tag[3]}" if tag else None


def wheels_in(folder: Path, with_sums: bool) -> list[Wheel]:
    found = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if page_of(path.name):
            found[place.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "SHA256SUMS" and with_sums:
            for line in path.read_text(encoding="utf-8").splitlines():
                digest, _, name = line.partition(" ")
                if page_of(name := name.lstrip(" *")):
                    found.setdefault((place.parent / name).as_posix(), digest)
    return [Wheel(place.rpartition("/")[2], place, digest) for place, digest in found.items()]


def page(title: str, links: list[tuple[str, str]]) -> str:
    """links: text and address, the address is quoted already."""
    lines = [f'<a href="{html.escape(address)}">{html.escape(text)}</a><br>' for text, address in links]
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
    )
    return "\n".join([f"{head}<body>", f"<h1>{html.escape(title)}</h1>", *lines, "</body>", "</html>", ""])


def write_pages(folder: Path, out: Path, url: str | None = None) -> list[Path]:
    pages: dict[str, list[Wheel]] = {}
    for wheel in wheels_in(folder, with_sums=url is not None):
        pages.setdefault(str(page_of(wheel.name)), []).append(wheel)
    out.mkdir(parents=True, exist_ok=True)
    prefix = quote(Path(os.path.relpath(folder, out)).as_posix()) if url is None else url.rstrip("/")
    written = []
    for title, wheels in sorted(pages.items()):
        links = [(w.name, f"{prefix}/{quote(w.place)}#sha256={w.digest}") for w in sorted(wheels)]
        written.append(out / f"{title}.html")
        written[-1].write_text(page(f"torchmargin for {title}", links), encoding="utf-8")
    index = [(title, f"{quote(title)}.html") for title in sorted(pages)]
    written.append(out / "index.html")
    written[-1].write_text(page("torchmargin", index), encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", help="where the folder is published; without it links are relative")
    arguments = parser.parse_args()
    written = write_pages(arguments.folder, arguments.out, arguments.url)
    print(*written, sep="\n")
    if len(written) == 1:
        sys.exit(f"there are no wheels in {arguments.folder}")


if __name__ == "__main__":
    main()
