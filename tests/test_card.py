"""`diffusers-fa3 card`: real reports, the text around the section, and what is refused."""

from __future__ import annotations

import argparse
import copy
import doctest
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line import exit_status
from digits_task import MODEL_DIR
from huggingface_hub import ModelCard
from releases import QWENIMAGE_MASKS, needs

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools import cli
from diffusers_fa3.tools.bench import command as bench
from diffusers_fa3.tools.card import Written, write_card
from diffusers_fa3.tools.card.command import add_command
from diffusers_fa3.tools.card.markdown import code, escaped
from diffusers_fa3.tools.card.marks import END, OPENS, START, with_section
from diffusers_fa3.tools.card.readme import replace_readme
from diffusers_fa3.tools.check import command as check

Report = dict[str, Any]
SIZES = ("--heads", "3", "--head-dim", "32", "--text", "16", "--image", "16", "--batch", "2")


@pytest.fixture(autouse=True)
def own_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command by itself, as `diffusers-fa3` has it."""

    def parser() -> argparse.ArgumentParser:
        whole = argparse.ArgumentParser("diffusers-fa3")
        commands = whole.add_subparsers(required=True, metavar="command")
        for each in (check, bench):
            each.add_command(commands)
        add_command(commands)
        return whole

    monkeypatch.setattr(cli, "_parser", parser)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The digits, without weights: they are not needed."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "digits", ignore=ignored))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("reports")}


@pytest.fixture
def parity(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report of a check of the digits, made once."""
    needs(*QWENIMAGE_MASKS)
    file = made["folder"] / "report.json"
    if not file.exists():
        argv = [
            "check",
            str(MODEL_DIR),
            "--device",
            "cpu",
            "--steps",
            "2",
            "--out",
            str(file.parent),
        ]
        monkeypatch.setattr(sys, "argv", ["diffusers-fa3", *argv])
        assert exit_status(*argv) == 0
    return file


@pytest.fixture
def speed(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The times of two calls of the sizes of the digits, made once."""
    file = made["folder"] / "bench.json"
    if not file.exists():
        how = ("--valid", "none,0.5", "--dtype", "fp32", "--device", "cpu", "--rounds", "2")
        argv = ["bench", *SIZES, *how, "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["diffusers-fa3", *argv])
        assert exit_status(*argv) == 0
    return file


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def section_in(folder: Path) -> str:
    text = text_of(folder)
    return text[text.index(START) : text.index(END)]


def changed(file: Path, to: Path, change: Callable[[Report], object]) -> Path:
    """A copy of a report with a change in it."""
    report = json.loads(file.read_text())
    change(report)
    to.write_text(json.dumps(report))
    return to


# --- what the section says -----------------------------------------------------------------------


def test_the_command_writes_what_is_known_and_nothing_that_was_not_measured(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("card", digits) == 0
    assert capsys.readouterr().out == f"{digits / 'README.md'}: section added\n"
    section = section_in(digits)
    assert re.findall("^##+ .*", section, flags=re.MULTILINE) == [
        "## On FlashAttention-3",
        "### Coverage",
        "### Kernels",
        "### Limits",
    ]
    assert "| `transformer.transformer_blocks.*.attn` | 3 | `QwenDoubleStreamAttn" in section
    assert "Processor2_0` | 3 x 32 |" in section
    assert "| `fa3_fwd` | `pip install fa3-fwd` |" in section
    assert re.search(r"^\| `reference` \| .* \| yes", section, flags=re.MULTILINE)
    assert "`transformer`, split over several GPUs: yes" in section
    for claim in ("Parity", "Speed", "Passed", "speedup", "faster"):
        assert claim not in section


def test_what_was_measured_stands_with_its_machine(digits: Path, parity: Path, speed: Path) -> None:
    written = write_card(digits, parity=parity, speed=speed)
    assert (written.what, written.notes) == ("section added", ())
    section = section_in(digits)
    report, times = json.loads(parity.read_text()), json.loads(speed.read_text())
    compared = f"**Passed**: {report['calls']} attention calls compared, on kernel `reference`"
    assert f"{compared} (asked for: `auto`)." in section
    assert section.count("All calls were on the reference, plain PyTorch") == 2
    assert re.search(r"attn` \| x3 \| 6 \| reference \(packed\) \|.*\| ok \|", section)
    assert "Result: ours differs from the default by" in section
    assert "prompt" in section
    row = times["rows"][0]
    ms = [f"{row['methods'][name]['ms']:.3g}" for name in ("default", "ours")]
    assert f"| float32 | 2 | 32 | no mask | dense | {ms[0]} | {ms[1]} |" in section
    assert f"{row['speedup']:.2f}x |" in section
    assert "Medians of 2 rounds" in section
    assert section.count(f"torch {report['machine']['torch']}") == 3
    assert section.count(f"diffusers {report['machine']['diffusers']}") == 2


def test_paths_of_the_machine_stay_out_of_a_public_card(
    digits: Path, parity: Path, speed: Path
) -> None:
    write_card(digits, parity=parity, speed=speed)
    assert str(parity.parent) not in section_in(digits)
    assert "`diffusers-fa3 check digits --device cpu --steps 2 --out" in section_in(digits)
    assert "--json bench.json`" in section_in(digits)


def test_a_check_that_failed_is_written_as_failed(
    digits: Path, parity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(report: Report) -> None:
        layer = report["layers"][0]
        layer["calls"][0] |= {"passed": False, "ours": {"largest": "nan", "typical": 1.0}}
        layer["passed"] = report["passed"] = False
        report["problems"] = [f"a|b, layer {i} <b>" for i in range(12)]

    failed = changed(parity, tmp_path / "failed.json", fail)
    assert exit_status("card", digits, "--parity", failed) == 0
    assert "note: the parity check failed, and the section says so" in capsys.readouterr().out
    section = section_in(digits)
    assert "**FAILED**, 12 problems" in section
    assert "Passed" not in section
    assert r"- a\|b, layer 9 &lt;b&gt;" in section
    assert "- and 2 more" in section
    assert re.search(r"\| nan \|.*\| FAILED \|", section)


def test_all_that_a_report_can_say_is_told(digits: Path, parity: Path, tmp_path: Path) -> None:
    def change(report: Report) -> None:
        report["layers"][0] |= {"processor": "FusedProcessor", "fallbacks": {"a bias": 3}}
        report["layers"][1]["unswitchable"] = "it is a function"
        report |= {"note": "no latents", "result": None, "steps": []}
        report["coverage"]["fallbacks"] = 3
        del report["command"]

    write_card(digits, parity=changed(parity, tmp_path / "more.json", change))
    for words in (
        "Default attention, 3 times, not compared: a bias",
        "Default attention, in 1 layers, not compared: it is a function",
        "With another processor than configured: `FusedProcessor`",
        "and 3 on the default attention",
        "- no latents",
        "Measured by what `diffusers-fa3 check` calls, from Python",
    ):
        assert words in section_in(digits)
    assert "Latents after" not in section_in(digits)


def test_a_wrong_or_refused_time_gives_no_speedup(
    digits: Path, speed: Path, tmp_path: Path
) -> None:
    def change(report: Report) -> None:
        wrong, refused = report["rows"]
        wrong["methods"]["ours"]["wrong"] = True
        refused["methods"]["ours"]["ms"] = None
        other = copy.deepcopy(report["cases"][0]) | {"name": "other", "heads": 7}
        report["cases"].append(other)
        report["rows"].append(wrong | {"case": "other"})

    file = changed(speed, tmp_path / "wrong.json", change)
    written = write_card(digits, speed=file)
    assert written.notes == ("1 calls of the speed report have sizes of other models",)
    assert re.search(r", WRONG \| \S+ \| - \|", section_in(digits))
    assert re.search(r"\| refused \| \S+ \| - \|", section_in(digits))
    assert "other" not in section_in(digits).partition("### Speed")[2].partition("###")[0]


def test_the_program_of_the_section_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall("```python\n(.*?)```", section_in(tmp_path / "model"), flags=re.DOTALL)
    assert "FluxTransformer2DModel.from_pretrained" in program
    exec(program, {})


# --- the file around the section -----------------------------------------------------------------

ODD = "---\nlicense: mit  # a comment\ntags: [b,  a]\n---\n\n# Name\ttab  \n\nNo end"


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
def test_all_around_the_section_stays_byte_for_byte(digits: Path, newline: str, bom: str) -> None:
    file = digits / "README.md"
    before = bom + ODD.replace("\n", newline)
    file.write_bytes(before.encode())
    assert write_card(digits).what == "section added"
    first = text_of(digits)
    assert first.startswith(before + newline * 2 + START + newline)
    assert first.endswith(newline + END + newline)
    if newline == "\r\n":
        assert first.count("\n") == first.count("\r\n")
    card = ModelCard(first.removeprefix("\ufeff"))  # before 2.0, the hub's reader knows no mark
    assert card.data.to_dict() == {"license": "mit", "tags": ["b", "a"]}
    assert END in card.text

    # Text behind it, and an old section of another release.
    start, end = first.index(START), first.index(END)
    old = OPENS + ", by another release -->" + newline + "old" + newline
    after = END + newline * 3 + "behind  "
    file.write_bytes((first[:start] + old + after).encode())
    assert write_card(digits).what == "section renewed"
    assert text_of(digits) == first[:start] + first[start:end] + after


def test_twice_is_the_same_file(digits: Path, parity: Path, speed: Path) -> None:
    write_card(digits, parity=parity, speed=speed)
    file = digits / "README.md"
    before, made = file.read_bytes(), file.stat()
    again = write_card(str(digits), parity=str(parity), speed=str(speed))
    assert again == Written(file, "as it was")
    assert (file.read_bytes(), file.stat().st_ino) == (before, made.st_ino)


def test_a_paragraph_that_is_gone_is_told(digits: Path, parity: Path, speed: Path) -> None:
    write_card(digits, parity=parity, speed=speed)
    assert write_card(digits).notes == (
        "the parity of before is gone; give --parity to keep it",
        "the speed of before is gone; give --speed to keep it",
    )
    assert write_card(digits) == Written(digits / "README.md", "as it was")


def test_a_folder_without_a_card_gets_one(digits: Path) -> None:
    file = digits / "README.md"
    file.unlink()
    umask = os.umask(0o027)
    try:
        assert write_card(digits).what == "new, with the section"
    finally:
        os.umask(umask)
    assert text_of(digits).startswith(f"---\nlibrary_name: diffusers\n---\n\n# digits\n\n{START}\n")
    assert ModelCard.load(file).data.library_name == "diffusers"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert write_card(digits).what == "as it was"


@pytest.mark.parametrize("text", ["", "# No metadata\n"])
def test_a_card_without_metadata_gets_none(
    digits: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits / "README.md").write_text(text)
    write_card(digits)
    assert text_of(digits).startswith(f"{text}\n{START}" if text else START)
    assert "metadata" not in capsys.readouterr().err


def test_the_mode_is_kept(digits: Path) -> None:
    file = digits / "README.md"
    file.chmod(0o604)
    write_card(digits)
    assert stat.S_IMODE(file.stat().st_mode) == 0o604
    assert not [*digits.glob(".README*")]


def test_a_file_that_cannot_be_replaced_is_as_it_was(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = text_of(digits)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        InputError, match=r"the card is written into its folder; cannot write .*: No space"
    ):
        write_card(digits)
    assert text_of(digits) == before
    assert not [*digits.glob(".README*")]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{START}\nno end\n", "got 1 and 0"),
        (f"no start\n{END}\n", "got 0 and 1"),
        (f"{START}\n{START}\n{END}\n", "got 2 and 1"),
        (f"{START}\n{END}\n{END}\n", "got 1 and 2"),
        (f"{END}\n{START}\n", "got 1 and 1, the end before the start"),
        (f"---\nlicense: mit\n# {START}\nx: 1\n# {END}\n---\n", "metadata"),
        ("---\n[1\n---\n", "are YAML that the hub knows"),
        ("---\n- a\n---\n", "should be a dict"),
    ],
)
def test_a_broken_card_is_left_as_it_was(
    digits: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits / "README.md").write_text(text)
    assert exit_status("card", digits) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "the file is as it was" in captured.err
    assert captured.err.count("\n") == 1
    assert text_of(digits) == text
    assert not [*digits.glob(".README*")]


def test_marks_among_the_metadata_are_refused(digits: Path) -> None:
    text = f"---\nlicense: mit\nx: |\n {START}\n {END}\n y\n---\n"
    (digits / "README.md").write_text(text)
    with pytest.raises(InputError, match="metadata"):
        write_card(digits)
    assert text_of(digits) == text
    file = digits / "README.md"
    with pytest.raises(InputError, match="a new section leaves the metadata as they are"):
        replace_readme(file, "---\nlicense: mit\n---\n", {"license": "apache-2.0"})
    assert text_of(digits) == text
    assert not [*digits.glob(".README*")]


def test_a_card_that_is_no_file_of_its_own_is_refused(digits: Path, tmp_path: Path) -> None:
    file = digits / "README.md"
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="the card is UTF-8"):
        write_card(digits)
    file.unlink()
    (tmp_path / "blob").write_text("of the cache")
    file.symlink_to(tmp_path / "blob")
    with pytest.raises(InputError, match=r"is a link to .*blob"):
        write_card(digits)
    assert (tmp_path / "blob").read_text() == "of the cache"
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="the card is a file that can be read"):
        write_card(digits)


def one_more_call(report: Report) -> None:
    report["calls"] += 1


def out_of_budget(report: Report) -> None:
    report["layers"][0]["calls"][0]["ours"]["largest"] = 1.0


def larger_heads(report: Report) -> None:
    for layer in report["layers"]:
        for call in layer["calls"]:
            call["q_shape"][3] = 64


PARITY_CHANGES: dict[str, Callable[[Report], object]] = {
    "a parity report has schema 1; .* has 2": lambda r: r.update(schema=2),
    "has schema 1; .* has none": lambda r: r.pop("schema"),
    "passed in .* must be true or false; got a text": lambda r: r.update(passed="yes"),
    "problems in .* must be a list of texts": lambda r: r.update(problems=[1]),
    "machine in .* must be an object; got nothing. Give a file that ": lambda r: r.pop("machine"),
    r"layers in .* must be a list of objects": lambda r: r.update(layers=["x"]),
    r"layers\[0\].calls\[0\].q_shape in .* must be a list of whole": lambda r: r["layers"][0][
        "calls"
    ][0].update(q_shape=[1.5]),
    "must be a list of four numbers": lambda r: r["layers"][0]["calls"][0].update(q_shape=[1, 2]),
    r"ours.largest in .* must be a number; got nothing": lambda r: r["layers"][0]["calls"][0][
        "ours"
    ].pop("largest"),
    "must be a number that is not huge": lambda r: r["steps"][0]["ours"].update(typical=10**400),
    "it says 7 calls and lists 6": one_more_call,
    "it says that the check passed, and also: transformer": out_of_budget,
    "passed, and also: a problem": lambda r: r.update(problems=["a problem"]),
    "failed, and names no problem": lambda r: r.update(passed=False),
    "model of the folder, QwenImagePipeline; .* is of FluxPipeline": lambda r: r.update(
        model="FluxPipeline"
    ),
    "the folder has 3, and .* 2: it is of another QwenImagePipeline": lambda r: r.update(
        layers=r["layers"][:2], calls=4
    ),
    "3 heads of size 32; .* has 3 heads of size 64": larger_heads,
}


@pytest.mark.parametrize("says", PARITY_CHANGES)
def test_a_parity_report_that_is_none_of_this_model_is_refused(
    says: str, digits: Path, parity: Path, tmp_path: Path
) -> None:
    before = text_of(digits)
    file = changed(parity, tmp_path / "changed.json", PARITY_CHANGES[says])
    with pytest.raises(InputError, match=says):
        write_card(digits, parity=file)
    assert text_of(digits) == before


SPEED_CHANGES: dict[str, Callable[[Report], object]] = {
    "a speed report has schema 1 or none; .* has 2": lambda r: r.update(schema=2),
    "has measured calls; .* has none": lambda r: r.update(rows=[]),
    "a row of yours at 33 tokens, and no such case": lambda r: r["rows"][0].update(tokens=33),
    r"rows\[0\].methods.ours in .* must be an object": lambda r: r["rows"][0]["methods"].pop(
        "ours"
    ),
    "a speed report has calls of the sizes of the model, .*; .* has 4 heads of size 64. Run ": (
        lambda r: r["cases"][0].update(heads=4, head_dim=64)
    ),
}


@pytest.mark.parametrize("says", SPEED_CHANGES)
def test_a_speed_report_that_is_none_of_this_model_is_refused(
    says: str, digits: Path, speed: Path, tmp_path: Path
) -> None:
    file = changed(speed, tmp_path / "changed.json", SPEED_CHANGES[says])
    with pytest.raises(InputError, match=says):
        write_card(digits, speed=file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a report is a file that can be read"),
        ("{", "a report is JSON"),
        ("[" * 100_000, "a report is JSON"),
        ("[]", "a report is a JSON object; .* holds a list"),
        ("null", "holds something else"),
    ],
    ids=["absent", "broken", "deep", "list", "null"],
)
@pytest.mark.parametrize("kind", ["--parity", "--speed"])
def test_a_file_that_is_no_report_ends_with_status_2(
    content: str | None,
    says: str,
    kind: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    before = text_of(digits)
    assert exit_status("card", digits, kind, file) == 2
    assert re.search(says, capsys.readouterr().err)
    assert text_of(digits) == before


def test_each_report_in_the_place_of_the_other_is_refused(
    digits: Path, parity: Path, speed: Path
) -> None:
    with pytest.raises(InputError, match=r"check; .* is of bench. Give it by --speed"):
        write_card(digits, parity=speed)
    with pytest.raises(InputError, match=r"bench; .* is of check. Give it by --parity"):
        write_card(digits, speed=parity)


# --- texts from files ----------------------------------------------------------------------------


def test_texts_from_files_mean_nothing_in_markdown() -> None:
    assert escaped("a|b*c_d_ `e`\n# f [g](h) <i> & $") == (
        r"a\|b\*c_d\_ \`e\` # f \[g\](h) &lt;i&gt; &amp; \$"
    )
    assert [escaped(x) for x in ("# a", "- a", "1. a")] == [r"\# a", r"\- a", r"1\. a"]
    assert escaped("a\ud800\u202eb\x00") == "a b"
    assert len(escaped("x" * 1000)) == 300
    assert (code("a.*.b"), code("a`b"), code("a|b")) == ("`a.*.b`", r"a\`b", r"a\|b")
    assert OPENS not in escaped(START) + code(START)


def test_a_folder_or_report_that_holds_marks_cannot_break_the_section(
    tmp_path: Path, parity: Path
) -> None:
    folder = tmp_path / f"x {START} {END} `|"
    shutil.copytree(MODEL_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))

    def change(report: Report) -> None:
        report["note"] = report["machine"]["device"] = f"{END} \ud800 ``` | <script>"
        report["layers"][0]["processor"] = END

    file = changed(parity, tmp_path / "marks.json", change)
    write_card(folder, parity=file)
    assert (text_of(folder).count(OPENS), text_of(folder).count(END)) == (1, 1)
    assert "<script>" not in text_of(folder)
    assert write_card(folder, parity=file).what == "as it was"


def test_a_section_is_set_apart_by_an_empty_line() -> None:
    section = f"{START}\nx\n{END}\n"
    for text, gap in {"": "", "a": "\n\n", "a\n": "\n", "a\n\n": ""}.items():
        assert with_section(text, ["x"]) == text + gap + section
        assert with_section(text + gap + section, ["y"]) == text + gap + section.replace("x", "y")


def test_the_example_in_the_docstring_runs() -> None:
    (shown,) = doctest.DocTestFinder(recurse=False).find(write_card, globs={})
    assert doctest.DocTestRunner().run(shown).failed == 0
