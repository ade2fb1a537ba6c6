"""Every diffusers internal that is used exists, and the error for a missing one names it."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers
import pytest

from diffusers_fa3 import UnsupportedVersionError
from diffusers_fa3.layers import host

LAYERS = Path(host.__file__).parent
PACKAGE = LAYERS.parent


def test_the_installed_diffusers_has_all_of_it() -> None:
    host.check()


@pytest.mark.parametrize(("module", "path"), host.REQUIRED, ids=lambda part: part)
def test_a_missing_name_is_told_with_the_releases_that_have_it(
    module: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "REQUIRED", ((module, f"{path}_renamed"),))
    with pytest.raises(UnsupportedVersionError) as told:
        host.check()
    for words in (f"diffusers.{module}.{path}_renamed", diffusers.__version__, *host.TRIED):
        assert words in str(told.value)


def test_a_missing_module_is_told_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "REQUIRED", (("models.nowhere", "anything"),))
    with pytest.raises(UnsupportedVersionError, match=r"no diffusers\.models\.nowhere\.anything"):
        host.check()


def test_all_that_is_imported_from_within_diffusers_is_listed() -> None:
    listed = {(f"diffusers.{module}", path.split(".")[0]) for module, path in host.REQUIRED}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            inner = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "diffusers."
            )
            for name in node.names if inner else ():
                is_module = (node.module, name.name) == ("diffusers.models", "attention_dispatch")
                assert is_module or (node.module, name.name) in listed, file.name


def test_attributes_of_the_registry_that_are_used_are_listed() -> None:
    registry = "_AttentionBackendRegistry"
    used = {
        node.attr
        for node in ast.walk(ast.parse((LAYERS / "dispatcher.py").read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == registry
    }
    assert used
    assert used <= {path.split(".")[-1] for _, path in host.REQUIRED if path.startswith(registry)}
