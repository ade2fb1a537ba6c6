"""The command `diffusers-fa3 check`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels import check_choice
from diffusers_fa3.tools.shared_arguments import KERNELS, add_device, positive

if TYPE_CHECKING:
    from diffusers_fa3.tools.check.parity import Parity

CHECK = """\
Run a pipeline of your own on its default attention and on this package, and compare: each attention
call with float64, on the inputs that it has in a run on the default; then latents and pictures.

  diffusers-fa3 check black-forest-labs/FLUX.1-dev
  diffusers-fa3 check ./my-pipeline --prompt "a cat" --prompt "a house by a lake" --out DIR
  diffusers-fa3 check Wan-AI/Wan2.2-TI2V-5B-Diffusers --set num_frames=17 --kernel fa3_fwd --json
  diffusers-fa3 check Qwen/Qwen-Image --ranks 4

A call passes if its error is at most twice the default's own, plus a few roundings. Exit status: 0
if all passed, 1 if not, 2 if the check cannot run.
"""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

OF_PYTHON = {"True": True, "False": False, "None": None}
"""Values that JSON writes in another way; as texts, all of them would be true."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `diffusers-fa3`."""
    check = commands.add_parser(
        "check",
        help="compare your pipeline on its default attention and on this",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="a pipeline: a folder, or a name on the hub")
    check.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times, as one batch; by default, two of different length",
    )
    check.add_argument(
        "--steps",
        type=positive,
        default=4,
        metavar="N",
        help="denoising steps; by default, %(default)s",
    )
    check.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the noise; by default, %(default)s"
    )
    check.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="another argument of the pipeline, e.g. height=512; VALUE is JSON, or True, "
        "False or None, or else a text",
    )
    check.add_argument(
        "--kernel", default="auto", choices=KERNELS, help="with a name, no other may serve"
    )
    check.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    add_device(check)
    check.add_argument(
        "--ranks",
        type=positive,
        default=1,
        metavar="N",
        help="split the models over so many processes, on a GPU each; by default, they are not",
    )
    check.add_argument("--out", type=Path, metavar="DIR", help="write a report into this folder")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _check(args: argparse.Namespace) -> int:
    from diffusers_fa3.tools.check.processes import on_ranks
    from diffusers_fa3.tools.check.progress import progress_bar
    from diffusers_fa3.tools.check.report import as_json, make_folder, write_report

    check_choice(args.kernel)
    if args.out is not None:
        make_folder(args.out)
    command = sys.argv[1:]
    try:
        with progress_bar() as advance:
            if args.ranks == 1:
                parity = _on_one_process(args, advance)
            else:
                parity = on_ranks(_on_a_rank, args, args.ranks, args.device, advance)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the check needs more memory than the device has: {str(error).partition('. ')[0]}. "
            "Ask for less, e.g. one --prompt, or --set height=512 --set width=512"
        ) from error
    print(as_json(parity, command) if args.json else parity, flush=True)
    if args.out is not None:
        write_report(parity, args.out, command)
        if not args.json:
            print(f"report: {args.out / 'report.html'}")
    return 0 if parity.passed else 1


def _on_one_process(args: argparse.Namespace, on_progress: Callable[[str], None]) -> Parity:
    from diffusers_fa3.tools.check.check import check_parity

    return _loaded_and_checked(check_parity, args, torch.device(args.device), on_progress)


def _on_a_rank(
    args: argparse.Namespace, device: torch.device, on_progress: Callable[[str], None]
) -> Parity:
    from diffusers_fa3.tools.check.on_ranks import check_on_ranks

    return _loaded_and_checked(check_on_ranks, args, device, on_progress)


def _loaded_and_checked(
    check: Callable[..., Parity],
    args: argparse.Namespace,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> Parity:
    from diffusers_fa3.tools.check.loading import load, quiet

    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    with quiet():
        return check(
            load(args.model, dtype, device),
            dict(args.set),
            kernel=args.kernel,
            prompts=args.prompt,
            steps=args.steps,
            seed=args.seed,
            on_progress=on_progress,
        )


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"NAME=VALUE; got {text}")
    if value in OF_PYTHON:
        return name, OF_PYTHON[value]
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
