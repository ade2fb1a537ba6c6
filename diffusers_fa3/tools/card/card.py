"""write_card: the section of a model's card, from facts and from reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers_fa3.tools.card.markdown import escaped
from diffusers_fa3.tools.card.marks import has_section, section_in, with_section
from diffusers_fa3.tools.card.of_model import parity_of_model, speed_of_model
from diffusers_fa3.tools.card.parity import read_parity
from diffusers_fa3.tools.card.readme import metadata_of, new_readme, read_readme, replace_readme
from diffusers_fa3.tools.card.section import PARITY, SPEED, section_of
from diffusers_fa3.tools.card.speed import read_speed
from diffusers_fa3.tools.info import machine_report


@dataclass(frozen=True)
class Written:
    """What `write_card` did."""

    file: Path
    what: str
    """In words: whether the file is new, and the section added, renewed or as it was."""
    notes: tuple[str, ...] = ()
    """What the section says that its writer should know."""


def write_card(
    model_dir: str | Path,
    *,
    parity: str | Path | None = None,
    speed: str | Path | None = None,
) -> Written:
    """Write or renew the section of a model card, MODEL_DIR/README.md.

    All around the section stays as it is, byte for byte. A folder without README.md gets one. The
    same call again changes nothing. No weights are loaded, and nothing is sent or downloaded.

    Args:
        model_dir: a local folder with a diffusers model or pipeline.
        parity: `report.json` of `diffusers-fa3 check --out DIR`. A check that failed is written as
            failed. Without it, the section says nothing of parity.
        speed: the file of `diffusers-fa3 bench --json FILE`; the calls that have heads and head
            size of the model count. Without it, the section says nothing of speed.

    Raises:
        InputError: `model_dir` is no such folder, a report is none or of another model, or
            README.md has broken marks or metadata. The file is then as it was.

    Example:
        >>> from diffusers_fa3.tools.card import write_card
        >>> write_card("no/such/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        diffusers_fa3.errors.InputError: the model is a local folder with a config.json ...
    """
    report = machine_report(model_dir)
    facts = report.model
    assert facts is not None
    compared = None if parity is None else parity_of_model(read_parity(Path(parity)), facts)
    timed = None if speed is None else speed_of_model(read_speed(Path(speed)), facts)

    folder = Path(model_dir).resolve()
    file = Path(model_dir) / "README.md"
    before = read_readme(file)
    start = new_readme(escaped(folder.name)) if before is None else before
    metadata = metadata_of(start, file)
    after = with_section(start, section_of(report, folder.name, compared, timed))
    if after != before:
        replace_readme(file, after, metadata)
    notes = []
    if compared is not None and not compared.report.passed:
        notes.append("the parity check failed, and the section says so")
    if timed is not None and timed.left_out:
        notes.append(f"{timed.left_out} calls of the speed report have sizes of other models")
    old, new = section_in(start), section_in(after)
    for heading, what in {PARITY: "parity", SPEED: "speed"}.items():
        if heading in old and heading not in new:
            notes.append(f"the {what} of before is gone; give --{what} to keep it")
    return Written(file, _what(before, after), tuple(notes))


def _what(before: str | None, after: str) -> str:
    if before is None:
        return "new, with the section"
    if before == after:
        return "as it was"
    return "section renewed" if has_section(before) else "section added"
