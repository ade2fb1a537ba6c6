"""Fields of a JSON file that somebody hands in: each is there and of its kind, or an error says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusers_fa3.errors import InputError

T = TypeVar("T")

MOST = 1e300
"""Of whole numbers, JSON has larger ones than a float."""

KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
KINDS |= dict.fromkeys((int, float), "a number")


@dataclass(frozen=True)
class Fields:
    """An object of a JSON file, and where it stands in it."""

    file: Path
    made_by: str
    """The command that writes such files."""
    values: dict[str, Any]
    where: str = ""

    def text(self, name: str) -> str:
        """A text."""
        return self._get(name, str)

    def flag(self, name: str) -> bool:
        """True or false."""
        return self._get(name, bool)

    def count(self, name: str) -> int:
        """A number of things."""
        return self._get(name, int)

    def number(self, name: str) -> float | None:
        """A number, "nan" or "inf", as `check` writes what JSON has no word for; or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if value in ("nan", "inf") or (type(value) in (int, float) and abs(value) <= MOST):
            return float(value)
        raise self.wrong(name, "a number that is not huge", value)

    def known_number(self, name: str) -> float:
        """As `number`, but not null."""
        value = self.number(name)
        if value is None:
            raise self.wrong(name, "a number", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._get(name, list)
        for value in values:
            if not isinstance(value, str):
                raise self.wrong(name, "a list of texts", value)
        return tuple(values)

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of numbers of things."""
        values = self._get(name, list)
        for value in values:
            if type(value) is not int:
                raise self.wrong(name, "a list of whole numbers", value)
        return tuple(values)

    def pairs(self, name: str) -> tuple[tuple[str, Any], ...]:
        """Names and values of an object."""
        return tuple(self._get(name, dict).items())

    def inside(self, name: str) -> Fields:
        """The fields of an object in this one."""
        return self._of(name, self._get(name, dict))

    def inside_each(self, name: str) -> Iterator[Fields]:
        """The fields of each object of a list."""
        for i, value in enumerate(self._get(name, list)):
            if not isinstance(value, dict):
                raise self.wrong(name, "a list of objects", value)
            yield self._of(f"{name}[{i}]", value)

    def wrong(self, name: str, rule: str, got: Any) -> InputError:
        """The error that a field is not as it must be."""
        found = "nothing" if got is None else KINDS.get(type(got), type(got).__name__)
        return InputError(
            f"{self.where}{name} in {self.file} must be {rule}; got {found}. Give a file that "
            f"{self.made_by} wrote"
        )

    def _get(self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(name, KINDS[kind], value)
        return value

    def _of(self, name: str, values: dict[str, Any]) -> Fields:
        return Fields(self.file, self.made_by, values, f"{self.where}{name}.")


def read_fields(file: Path, made_by: str) -> Fields:
    """The object that a JSON file holds.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"a report is a file that can be read; got {file}: {error.strerror}. Give the file "
            f"that {made_by} wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"a report is JSON; got {file}: {error}. Give the file that {made_by} wrote"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"a report is a JSON object; {file} holds {KINDS.get(type(values), 'something else')}. "
            f"Give the file that {made_by} wrote"
        )
    return Fields(file, made_by, values)
