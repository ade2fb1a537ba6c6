"""What the small examples ask for alike: a pipeline, its prompts, and a device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from digits_task import MODEL_DIR, SAMPLING_STEPS


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser that says the first line of a program's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        epilog="Other models, and --device cuda, were written with care, but not run yet.",
    )
    parser.add_argument(
        "--model", default=MODEL_DIR, help="name on the hub, or a folder; default: the digits"
    )
    parser.add_argument("--prompt", action="append", help="give it once per picture")
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS)
    parser.add_argument("--size", type=int, help="height and width; default: the pipeline's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(seed=4)
    return parser


def parse(parser: argparse.ArgumentParser, prompts: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; without a prompt there, take these."""
    args = parser.parse_args()
    args.prompt = args.prompt or list(prompts)
    return args
