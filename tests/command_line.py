"""The command `diffusers-fa3`, called in this process."""

from __future__ import annotations

from diffusers_fa3.tools import cli


def exit_status(*argv: object) -> object:
    """What the command exits with, argparse's own exits among them."""
    try:
        return cli.main([*map(str, argv)])
    except SystemExit as end:
        return end.code
