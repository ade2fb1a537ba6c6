"""The report of a check: a page that needs nothing else, a picture, and the numbers."""

from __future__ import annotations

import base64
import html
import io
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools.check.parity import Parity
from diffusers_fa3.tools.check.plot import figure_of
from diffusers_fa3.tools.check.sheet import sheet_of
from diffusers_fa3.tools.check.table import rows_of

PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ border-bottom: 1px solid #ddd; padding: 3px 9px; text-align: left }}
pre {{ background: #f5f5f5; padding: 9px; overflow-x: auto; font-size: 13px }}
img {{ max-width: 100% }}
.passed {{ color: #00703c }} .failed {{ color: #c00 }}
</style></head><body>
<h1>{title}</h1>
<h2 class="{outcome}">{verdict}</h2>
{problems}
{caveat}
<p>The errors are those of single attention calls against float64, as shares of the largest value of
the output. Both attentions are given the same inputs, those of a run on the default attention.
Allowed is twice the default's own error, plus a few roundings.</p>
{layers}
{plot}
{pictures}
<h2>Which kernel served</h2>
<pre>{coverage}</pre>
<h2>How to repeat it</h2>
<pre>{command}</pre>
{arguments}
{machine}
</body></html>
"""


def make_folder(folder: Path) -> None:
    """Make the folder of a report, and try whether files can be written there.

    Raises:
        InputError: they cannot.
    """
    with _told():
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the report goes into a folder; cannot write it: {error}. Give another one"
        ) from error


def write_report(parity: Parity, folder: Path, command: Sequence[str]) -> None:
    """Write report.html, report.png and report.json.

    Raises:
        InputError: `folder` cannot be written.
    """
    plot = _plot(parity)
    prompts = parity.arguments.get("prompt", ())
    labels = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
    sheet = None if parity.pictures is None else sheet_of(parity.pictures, labels)
    make_folder(folder)
    with _told():
        _stacked([plot, *([sheet] if sheet is not None else [])]).save(folder / "report.png")
        (folder / "report.html").write_text(page_of(parity, plot, sheet, command), "utf-8")
        (folder / "report.json").write_text(as_json(parity, command), "utf-8")


def as_json(parity: Parity, command: Sequence[str]) -> str:
    """`Parity.to_dict` and the command, as text."""
    return json.dumps({**parity.to_dict(), "command": list(command)}, indent=1, allow_nan=False)


def page_of(
    parity: Parity, plot: Image.Image, sheet: Image.Image | None, command: Sequence[str]
) -> str:
    """The page, its images included; whatever a user or a model named is escaped."""
    problems = "".join(f"<li>{html.escape(problem)}</li>" for problem in parity.problems)
    verdict = f"{'Passed' if parity.passed else 'Failed'}: {parity.calls} attention calls compared"
    return PAGE.format(
        title=html.escape(f"{parity.model} on {parity.where}"),
        outcome="passed" if parity.passed else "failed",
        verdict=verdict,
        problems=f"<ul>{problems}</ul>" if problems else "",
        caveat=f"<p>{html.escape(parity.caveat)}</p>" if parity.caveat else "",
        layers=_table(rows_of(parity.layers)),
        plot=_img(plot, "errors by layer and by step"),
        pictures="" if sheet is None else _img(sheet, "pictures: default, ours, difference"),
        coverage=html.escape(str(parity.coverage)),
        command=html.escape(shlex.join(["diffusers-fa3", *command])),
        arguments=_table([("argument", ""), *_pairs(parity.arguments)]),
        machine=_table([("machine", ""), *_pairs(parity.machine)]),
    )


def _pairs(values: object) -> list[tuple[str, str]]:
    assert hasattr(values, "items")
    return [(str(name), str(value)) for name, value in values.items()]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [_line("th", head), *(_line("td", row) for row in body)]
    return f"<table>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    inner = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{''.join(inner)}</tr>"


def _img(image: Image.Image, words: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:image/png;base64,{data}"></p>'


def _plot(parity: Parity) -> Image.Image:
    buffer = io.BytesIO()
    figure_of(parity).savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


def _stacked(images: Sequence[Image.Image]) -> Image.Image:
    width = max(image.width for image in images)
    whole = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole
