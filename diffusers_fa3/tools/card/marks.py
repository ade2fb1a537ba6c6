"""The section in a card: found by two HTML comments, replaced, or added at the end."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_fa3.errors import InputError

START = "<!-- diffusers-fa3 card: start. `diffusers-fa3 card` writes all up to the end anew -->"
END = "<!-- diffusers-fa3 card: end -->"

OPENS = "<!-- diffusers-fa3 card: start"
"""How a start begins, whatever a release says behind it."""


def with_section(text: str, lines: Sequence[str]) -> str:
    """The text with these lines between the marks; all around them is kept.

    Args:
        text: of the card, with line ends of its own. The section gets those.
        lines: of the section, without marks and line ends.

    Raises:
        InputError: a mark lacks, or is there twice.
    """
    newline = newline_of(text)
    section = newline.join([START, *lines, END])
    place = _place(text)
    if place is not None:
        start, end = place
        return text[:start] + section + text[end:]
    if not text or text.endswith(newline * 2):
        gap = ""
    else:
        gap = newline if text.endswith(newline) else newline * 2
    return f"{text}{gap}{section}{newline}"


def has_section(text: str) -> bool:
    """Whether the section stands in the text already."""
    return OPENS in text


def section_in(text: str) -> str:
    """The section that stands in the text; empty if there is none."""
    place = _place(text)
    return "" if place is None else text[slice(*place)]


def newline_of(text: str) -> str:
    """The line end of most lines."""
    windows = text.count("\r\n")
    return "\r\n" if windows > text.count("\n") - windows else "\n"


def _place(text: str) -> tuple[int, int] | None:
    """Where the section starts and ends; None if there is none."""
    starts, ends = text.count(OPENS), text.count(END)
    if not starts and not ends:
        return None
    start, end = text.find(OPENS), text.find(END)
    if (starts, ends) != (1, 1) or end < start:
        order = ", the end before the start" if (starts, ends) == (1, 1) else ""
        raise InputError(
            f"README.md has one start and one end of the section, or none; got {starts} and "
            f"{ends}{order}. Delete what is left of the section, with its lines {OPENS!r} and "
            f"{END!r}; the file is as it was"
        )
    return start, end + len(END)
