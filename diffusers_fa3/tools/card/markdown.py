"""Markdown of texts that come from files: none of them may mean anything but itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST = 300
"""Characters of one text."""

PUNCTUATION = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+#=])")
NUMBER = re.compile(r"^(\d+)([.)])(?= |$)")
"""What begins an item of a list."""
PLAIN = re.compile(r"[\w.*+:/=,()'\">;%@~ \[\]-]+")
"""What may stand in a code span, also in a table. A mark begins with what is not here."""


def escaped(text: object) -> str:
    """A text in one line, with nothing in it that Markdown or HTML reads."""
    flat = one_line(text)
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return NUMBER.sub(r"\1\\\2", PUNCTUATION.sub(r"\\\1", flat))


def code(text: object) -> str:
    """A code span; escaped text if the text could end the span or the cell."""
    flat = one_line(text)
    return f"`{flat}`" if PLAIN.fullmatch(flat) else escaped(flat)


def one_line(text: object) -> str:
    """Characters that can be printed, with single spaces, up to a length."""
    flat = "".join(c if c.isprintable() else " " for c in str(text))
    flat = " ".join(flat.split())
    return flat if len(flat) <= MOST else f"{flat[: MOST - 1]}…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; its cells are Markdown already."""
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
