"""Every public function shows how it is called, and what it shows is so."""

from __future__ import annotations

import doctest
from types import FunctionType

import pytest

import diffusers_fa3

SHOWN = [
    name
    for name in diffusers_fa3.__all__
    if isinstance(getattr(diffusers_fa3, name), FunctionType) or name == "FA3AttnProcessor"
]


def test_functions_are_among_them() -> None:
    assert {"attention", "enable_fa3", "plan_packing", "register"} <= {*SHOWN}


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_in_its_docstring_runs(name: str) -> None:
    public = getattr(diffusers_fa3, name)
    (shown, *_) = doctest.DocTestFinder(recurse=False).find(public, name, globs={})
    assert shown.examples
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(shown, out=told.append).failed == 0, "".join(told)
