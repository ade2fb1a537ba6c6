"""The command `diffusers-fa3 info`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from diffusers_fa3.tools.info.probe import TIMEOUT_S

INFO = """\
Show what this machine has, which kernels can serve on it and why others cannot, what "auto" takes,
what to type for a better one, and what in the environment is in the way.

  diffusers-fa3 info
  diffusers-fa3 info path/to/pipeline     also its attention layers; loads no weights
  diffusers-fa3 info --probe              also load and launch each kernel in a process of its own
  diffusers-fa3 info --json > info.json   for a bug report; docs/info.md has every key
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `diffusers-fa3`."""
    info = commands.add_parser(
        "info",
        help="show kernels, what they can do here, and what is in the way",
        description=INFO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.set_defaults(run=_info)
    info.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_DIR",
        help="a local folder with a diffusers model or pipeline",
    )
    info.add_argument("--json", action="store_true", help="print JSON in place of tables")
    info.add_argument(
        "--probe",
        action="store_true",
        help="load and launch each installed kernel in a process of its own, to find one that "
        "ends its process or hangs",
    )
    info.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="for each kernel of --probe; default: %(default)g",
    )


def _info(args: argparse.Namespace) -> None:
    from diffusers_fa3.tools.info.report import machine_report
    from diffusers_fa3.tools.info.show import show

    with contextlib.redirect_stdout(sys.stderr):  # some packages print as they are imported
        report = machine_report(args.model, probe=args.probe, probe_timeout_s=args.timeout)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        show(report)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds above 0; got {text}")
    return seconds
