"""The command `diffusers-fa3 check`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels import PROVIDERS, check_choice

CHECK = """\
Run a pipeline of your own on its default attention and on this package, and compare: each attention
call with float64, on the inputs that it has in a run on the default; then latents and pictures.

  diffusers-fa3 check black-forest-labs/FLUX.1-dev
  diffusers-fa3 check ./my-pipeline --prompt "a cat" --prompt "a house by a lake" --out DIR
  diffusers-fa3 check Wan-AI/Wan2.2-TI2V-5B-Diffusers --set num_frames=17 --kernel fa3_fwd --json

A call passes if its error is at most twice the default's own, plus a few roundings. Exit status: 0
if all passed, 1 if not, 2 if the check cannot run.
"""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


MOST = 300
"""Characters of another library's error that are told."""


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
    check.add_argument("--steps", type=_positive, default=4, metavar="N", help="denoising steps")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise")
    check.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="another argument of the pipeline, e.g. height=512; VALUE is JSON, or else a text",
    )
    kernels = ["auto", *(provider.name for provider in PROVIDERS)]
    check.add_argument(
        "--kernel", default="auto", choices=kernels, help="with a name, no other may serve"
    )
    check.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    devices = ("cpu", "cuda")
    check.add_argument("--device", default=devices[torch.cuda.is_available()], choices=devices)
    check.add_argument("--out", type=Path, metavar="DIR", help="write a report into this folder")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _check(args: argparse.Namespace) -> int:
    from diffusers_fa3.tools.check.check import check_parity
    from diffusers_fa3.tools.check.progress import progress_bar
    from diffusers_fa3.tools.check.report import as_json, write_report

    check_choice(args.kernel)
    command = sys.argv[1:]
    try:
        with _quiet(), progress_bar() as advance:
            pipe = _load(args)
            parity = check_parity(
                pipe,
                dict(args.set),
                kernel=args.kernel,
                prompts=args.prompt,
                steps=args.steps,
                seed=args.seed,
                on_progress=advance,
            )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the check needs more memory than the device has: {str(error).partition('. ')[0]}. "
            "Ask for less, e.g. one --prompt, or --set height=512 --set width=512"
        ) from error
    if args.out is not None:
        write_report(parity, args.out, command)
    print(as_json(parity, command) if args.json else parity)
    if args.out is not None and not args.json:
        print(f"report: {args.out / 'report.html'}")
    return 0 if parity.passed else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers and transformers from printing: bars of their own, and what they advise."""
    libraries = [name for name in ("diffusers", "transformers") if find_spec(name) is not None]
    logs: list[Any] = [import_module(f"{name}.utils.logging") for name in libraries]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels):
            log.enable_progress_bar()
            log.set_verbosity(level)


def _load(args: argparse.Namespace) -> Any:
    import diffusers

    pipelines: Any = diffusers.DiffusionPipeline
    dtype = DTYPES[args.dtype or ("bf16" if args.device == "cuda" else "fp32")]
    try:
        with warnings.catch_warnings():
            # diffusers is about to rename the argument; older ones know no other name.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            pipe = pipelines.from_pretrained(args.model, torch_dtype=dtype)
        return pipe.to(args.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from files, the hub and the classes that the pipeline names
        raise InputError(
            "MODEL must be a pipeline of diffusers that can be loaded, a folder or a name on the "
            f"hub; got {args.model}: {type(error).__name__}: {str(error).strip()[:MOST]}"
        ) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a number above 0; got {text}")
    return int(text)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"NAME=VALUE; got {text}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
