"""``python -m recipes.face COMMAND``; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys

from recipes.face import pack
from recipes.face.pack import PackError
from recipes.face.records import RecordError
from recipes.face.verification_sets import VerificationSetError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m recipes.face", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pack.add_commands(commands)
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (PackError, RecordError, VerificationSetError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
