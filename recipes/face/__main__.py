"""``python -m recipes.face COMMAND``; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys

from recipes.face import align, evaluating, exporting, pack, recognition, tour, training
from recipes.face.errors import RecipeError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m recipes.face", description="From photographs to a recogniser.")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in (align, pack, training, evaluating, exporting, recognition, tour):
        each.add_commands(commands)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where `verify` sees two persons, 2 after an error, which one line names, 130 if stopped."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (RecipeError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{options.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
