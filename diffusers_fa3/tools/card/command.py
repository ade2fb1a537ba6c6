"""The command `diffusers-fa3 card`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

CARD = """\
Write or renew one section of the model card MODEL_DIR/README.md: how to enable this package, which
layers it switches, which kernels serve, its limits, and what was measured. Nothing else is claimed.

  diffusers-fa3 check ./my-pipeline --out report
  diffusers-fa3 bench --heads 24 --head-dim 128 --json bench.json
  diffusers-fa3 card ./my-pipeline --parity report/report.json --speed bench.json

The section stands between two HTML comments. The rest of the file stays as it is, byte for byte.
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `diffusers-fa3`."""
    card = commands.add_parser(
        "card",
        help="write or renew a section of a model's card",
        description=CARD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    card.set_defaults(run=_card)
    card.add_argument(
        "model",
        type=Path,
        metavar="MODEL_DIR",
        help="a local folder with a diffusers model or pipeline; needs no weights",
    )
    card.add_argument(
        "--parity", type=Path, metavar="FILE", help="report.json of diffusers-fa3 check --out DIR"
    )
    card.add_argument(
        "--speed", type=Path, metavar="FILE", help="the file of diffusers-fa3 bench --json FILE"
    )


def _card(args: argparse.Namespace) -> None:
    from diffusers_fa3.tools.card.card import write_card

    with contextlib.redirect_stdout(sys.stderr):  # some packages print as they are imported
        written = write_card(args.model, parity=args.parity, speed=args.speed)
    print(f"{written.file}: {written.what}")
    for note in written.notes:
        print(f"note: {note}")
