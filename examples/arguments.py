"""What the small examples ask for alike: a pipeline, its prompts, and a device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from digits_task import MODEL_DIR, SAMPLING_STEPS


def make_parser(
    doc: str,
    prompts: Sequence[str],
    *,
    untested: str = "models other than the digits; --device cuda",
) -> argparse.ArgumentParser:
    """Make a parser that says the first line of a program's docstring, and what was not tested.

    `prompts` are those of `parse`, for the help.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], epilog=f"Not tested: {untested}."
    )
    parser.add_argument(
        "--model", default=MODEL_DIR, help="name on the hub, or a folder; default: the digits"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="give it once per picture; default: " + "; ".join(map(repr, prompts)),
    )
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
