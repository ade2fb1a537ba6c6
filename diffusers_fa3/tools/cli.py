"""The command `diffusers-fa3`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffusers_fa3 import __version__
from diffusers_fa3.errors import FA3Error
from diffusers_fa3.tools.bench import command as bench
from diffusers_fa3.tools.card import command as card
from diffusers_fa3.tools.check import command as check
from diffusers_fa3.tools.info import command as info

EXTRAS = {"rich": "bench", "matplotlib": "bench", "PIL": "bench"}
"""The extra that installs a module which the core does not need."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, 0 if it has none, or 2 after printing an error."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except FA3Error as error:
        print(f"diffusers-fa3: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"diffusers-fa3: {error}; pip install 'diffusers-fa3[{extra}]'", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("diffusers-fa3")
    parser.add_argument("--version", action="version", version=f"diffusers-fa3 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for each in (info, check, card, bench):
        each.add_command(commands)
    return parser
