"""The documentation says what is so: its code runs, its tables are measured, its links lead on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from releases import QWENIMAGE_MASKS, has, needs
from support import TABLES, written_table

from diffusers_fa3 import available_kernels
from diffusers_fa3.layers import host

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
CARD = ROOT / "examples" / "model_card.md"

LONGEST_README = 200  # lines: what is read in five minutes
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def anchors(page: Path) -> set[str]:
    """What a link may name after a `#`, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


CODE = [(page, block) for page in PAGES for block in blocks(page.read_text(), "python")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "block"), CODE, ids=[f"{page.stem}-{block.splitlines()[-1]}" for page, block in CODE]
)
def test_code_of_the_documentation_runs(page: Path, block: str) -> None:
    run(block)


def test_the_first_program_prints_what_the_readme_says() -> None:
    needs(*QWENIMAGE_MASKS)
    text = README.read_text()
    program, said = blocks(text, "python")[0], blocks(text, "text")[0]
    assert len([line for line in program.splitlines() if line]) <= 12
    assert said in run(program)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_of_the_documentation_is_linked_in_the_readme() -> None:
    linked = {path for path, _ in LINK.findall(README.read_text())}
    assert linked >= {str(page.relative_to(ROOT)) for page in PAGES if page != README}


def test_the_table_of_routes_is_as_measured() -> None:
    said, measured = written_table("routes"), TABLES["routes"]()
    if has(host.TRIED[1]):
        assert said == measured, "run `python tests/support.py`"
    else:  # fewer models, on the same routes
        assert {*said.splitlines()} > {*measured.splitlines()}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tables_of_upstream_are_as_measured() -> None:
    needs(host.TRIED[1], "has other backends than those in the tables of docs/upstream.md")
    # In a process of its own: other tests may have called what raises here the first time alone.
    names = [name for name in TABLES if name != "routes"]
    code = f"import json, support; print(json.dumps([support.TABLES[n]() for n in {names}]))"
    folders = os.pathsep.join(str(ROOT / folder) for folder in (".", "examples", "tests"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert [*map(written_table, names)] == measured, "run `python tests/support.py`"


def test_every_kernel_is_listed() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    row = re.compile(r"^\| `(\w+)` \| .* \| (.*) \| (?:native|copied).* \|$", flags=re.MULTILINE)
    listed = [(name, install.strip("`")) for name, install in row.findall(text)]
    assert listed == [(row.name, row.install) for row in available_kernels("cpu")]


@pytest.mark.slow
def test_the_model_card_is_one_and_its_code_runs() -> None:
    card = ModelCard.load(CARD)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    (program,) = blocks(card.text, "python")
    assert "transformer.transformer_blocks.*.attn" in run(program)
    for words in ("What it covers", "How exact it is", "What it needs"):
        assert f"**{words}.**" in card.text
