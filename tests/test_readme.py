"""The README and the model card say what is so: their code runs, their tables are measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from releases import QWENIMAGE_MASKS, has, needs
from support import TABLES, table_in

from diffusers_fa3 import available_kernels
from diffusers_fa3.layers import host

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CARD = ROOT / "examples" / "model_card.md"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: block.split("\n")[-2])
def test_code_of_the_readme_runs(block: str) -> None:
    run(block)


def test_the_first_program_prints_what_the_readme_says() -> None:
    needs(*QWENIMAGE_MASKS)
    program, said = blocks(README, "python")[0], blocks(README, "text")[0]
    assert len([line for line in program.splitlines() if line]) <= 12
    assert said in run(program)


def test_the_table_of_routes_is_as_measured() -> None:
    said, measured = table_in(README, "routes"), TABLES["routes"]()
    if has(host.TRIED[1]):
        assert said == measured, "run `python tests/support.py`"
    else:  # fewer models, on the same routes
        assert {*said.splitlines()} > {*measured.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLES if name != "routes"])
def test_tables_of_upstream_are_as_measured(name: str) -> None:
    needs(host.TRIED[1], "has other backends than those in the README's tables")
    assert table_in(README, name) == TABLES[name](), "run `python tests/support.py`"


def test_every_kernel_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .* \| (?:native|copied)", README, flags=re.MULTILINE)
    assert listed == [row.name for row in available_kernels("cpu")]


def test_the_model_card_is_one_and_its_code_runs() -> None:
    card = ModelCard.load(CARD)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    (program,) = blocks(card.text, "python")
    assert "transformer.transformer_blocks.*.attn" in run(program)
    for words in ("What it covers", "How exact it is", "What it needs"):
        assert f"**{words}.**" in card.text
