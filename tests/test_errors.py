"""Each error that the package raises on purpose is known to a test, which expects its words.

Words are compared as text, and nothing is run: a string of some test must share a run of letters
with the message that no other message has. What no other file tests is tested below.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from switching import BY_NAME
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_fa3 import (
    FA3Error,
    InputError,
    KernelUnavailableError,
    MaskError,
    ParallelError,
    UnsupportedModelError,
    attention,
    cp_plan,
    enable_fa3,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    plan_packing,
)
from diffusers_fa3.interface_kvcache import _cache_entry
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.kernels.providers import PROVIDERS, flash_attn_4
from diffusers_fa3.options import Options
from diffusers_fa3.parallel.whole_mask import part_of

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "diffusers_fa3"

RUN = 12
"""Letters that a test's string must share with a message."""

WRITERS = {"_Refusal": 0, "_bad": 0, "no_kernel_takes": 0, "decline": 0, "refuse": 1}
"""Functions that make an error of their callers' words, and in which argument these are."""

WILDCARD = r"\|" + r"|(?<!\\)(?:\.|\\[dw])[*+]"
"""In a regular expression: what lies between two texts."""

WORDS_OF_OTHERS = {
    "attention.py": "_choose",  # reasons of kernels/compiled.py
    "inputs.py": "_bad",
    "kernels/selection.py": "error",  # of a `_Refusal`
    "parallel/decide.py": "_plan_of",  # of `cp_plan`
}
"""Functions that make an error without any words of their own, by file."""


@dataclass(frozen=True)
class Message:
    """What an error says: its literal texts, between which a call puts its values."""

    file: str
    line: int
    function: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, {self.function}: {' ... '.join(self.texts)}"


def runs_of(texts: Iterable[str]) -> set[str]:
    return {text[i : i + RUN] for text in texts for i in range(len(text) - RUN + 1)}


def called(node: ast.Call) -> str:
    """The name of the function or class that a node calls; empty if it has none."""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def literals(node: ast.expr, around: ast.AST) -> Iterator[str]:
    """The literal texts of an expression; of a variable, those of its last assignment before."""
    if isinstance(node, ast.Name):
        assignments = [
            other.value
            for other in ast.walk(around)
            if isinstance(other, ast.Assign)
            and other.lineno < node.lineno
            and node.id in map(ast.unparse, other.targets)
        ]
        if assignments:
            last = max(assignments, key=lambda value: value.lineno)
            yield from literals(last, around)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from literals(child, around)  # type: ignore[arg-type]


def messages_in(source: str, file: str, classes: set[str]) -> Iterator[Message]:
    """What the errors say that are made in a file, where their words are written."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    innermost = {node: function for function in functions for node in ast.walk(function)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: node.lineno):
        name = called(node)
        place = 0 if name in classes else WRITERS.get(name)
        if place is None or len(node.args) <= place:
            continue
        function = innermost.get(node, tree)
        message = Message(
            file,
            node.lineno,
            getattr(function, "name", ""),
            tuple(literals(node.args[place], function)),
        )
        # Most calls of writers hand on the words of their own callers.
        if name in classes or runs_of(message.texts):
            yield message


@cache
def messages() -> list[Message]:
    """All messages of the package."""
    errors = ast.parse((PACKAGE / "errors.py").read_text())
    classes = {node.name for node in errors.body if isinstance(node, ast.ClassDef)}
    files = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return [
        message
        for file in files
        for message in messages_in((PACKAGE / file).read_text(), file.as_posix(), classes)
        if WORDS_OF_OTHERS.get(message.file) != message.function
    ]


def strings_in(source: str) -> Iterator[str]:
    """A test file's strings, docstrings left out; of regular expressions, the texts in them."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in set(ast.walk(tree)) - docstrings:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for text in re.split(WILDCARD, node.value):
                yield re.sub(r"\\(\W)", r"\1", text)


def common(text: str, string: str, run: str) -> str:
    """What a message's text and a test's string have in common around `run`; "" if they differ.

    They do not differ where one of them ends: a string may be a part of a message, and on the other
    side of a text a message has a value.
    """
    before, after = text.split(run, 1)
    ahead, behind = string.split(run, 1)
    left, right = min(before, ahead, key=len), min(after, behind, key=len)
    same = before.endswith(left) and ahead.endswith(left)
    same = same and after.startswith(right) and behind.startswith(right)
    return left + run + right if same else ""


def unexpected(messages: list[Message], strings: list[str]) -> list[Message]:
    """The messages that no string expects."""
    texts = {text for message in messages for text in message.texts}
    of_texts = {run for text in texts for run in runs_of([text])}
    by_run: dict[str, list[str]] = defaultdict(list)
    for string in strings:
        for run in runs_of([string]) & of_texts:
            by_run[run].append(string)
    everything = "\n".join(strings)

    def expects(text: str) -> bool:
        for run in runs_of([text]):
            for string in by_run[run]:
                shared = common(text, string, run)
                alone = shared == text or sum(shared in other for other in texts) == 1
                if alone and " " in shared.strip():  # a name by itself expects nothing
                    return True
        words = text.strip()
        return len(words) >= RUN - 2 and " " in words and words in everything

    return [message for message in messages if not any(map(expects, message.texts))]


@cache
def strings() -> list[str]:
    """All strings of the tests."""
    return [
        string for path in sorted(TESTS.rglob("*.py")) for string in strings_in(path.read_text())
    ]


def test_every_message_is_expected_by_a_test() -> None:
    missing = unexpected(messages(), strings())
    assert not missing, "\n" + "\n".join(map(str, missing))


def test_every_message_has_words_of_its_own() -> None:
    """Those that have none are in `WORDS_OF_OTHERS`, or their function is in `WRITERS`."""
    without = [message for message in messages() if not any(map(str.strip, message.texts))]
    assert not without, "\n" + "\n".join(map(str, without))


SOURCE = """
def check(size, why):
    if size < 0:
        raise InputError(f"a size is never negative; got {size}. Leave it out")
    if size == 0:
        raise _bad("a size of nothing at all")
    words = f"{size} is a size that no kernel takes"
    raise InputError(words)
"""
TEXTS = [
    ("a size is never negative; got ", ". Leave it out"),
    ("a size of nothing at all",),
    (" is a size that no kernel takes",),
]


def found(source: str) -> list[Message]:
    return list(messages_in(source, "check.py", {"InputError"}))


def test_messages_are_read_from_calls_variables_and_writers() -> None:
    assert [message.texts for message in found(SOURCE)] == TEXTS
    assert [message.line for message in found(SOURCE)] == [4, 6, 8]
    assert str(found(SOURCE)[1]) == "check.py:6, check: a size of nothing at all"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("words = 'never negative; got -3'", [0]),
        (r"words = r'^a size is never negative; got .* Leave'", [0]),
        ("words = 'never positive; got 3'", []),
        ("words = 'never negative but 3'", []),  # differs within the text
        ("words = 'negative'", []),  # too short
        ("words = 'a size of nothing|size that no kernel'", [1, 2]),
        ("words = f'{3} is a size that no kernel takes'", [2]),
        ("def test(): 'a size of nothing at all'", []),  # a docstring
    ],
)
def test_a_string_expects_the_messages_whose_words_it_has(source: str, expected: list[int]) -> None:
    all_messages = found(SOURCE)
    left = unexpected(all_messages, list(strings_in(source)))
    assert [message for message in all_messages if message not in left] == [
        all_messages[i] for i in expected
    ]


# --- what no other file tests --------------------------------------------------------------------


def qkv(heads: int = 2, head_dim: int = 8) -> list[Tensor]:
    return [torch.randn(1, 4, n, head_dim) for n in (2, heads, heads)]


def in_varlen(q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
    ends = torch.tensor([0, 4], dtype=torch.int32, device=q.device)
    return flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 4, 4, **options)


def without_gradient() -> object:
    q, k, v = qkv()
    return flash_attn_with_kvcache(q.requires_grad_(), k, v)


def into(out: Tensor) -> object:
    return attention(*qkv(), out=out)


def strange(q: Tensor, k: Tensor, v: Tensor, colour: str) -> Tensor:
    return q


CALLS: list[tuple[Callable[[], object], type[FA3Error], str]] = [
    (
        lambda: attention(*qkv(heads=3)),
        InputError,
        r"q's number of heads is a multiple of k's; got q \(1, 4, 2, 8\), k \(1, 4, 3, 8\)",
    ),
    (
        lambda: attention(qkv()[0], *(x.to("meta") for x in qkv()[1:])),
        InputError,
        "q, k and v lie on one device; got cpu, meta, meta",
    ),
    (
        lambda: attention(*qkv(), torch.ones(1, 4, dtype=torch.bool, device="meta")),
        MaskError,
        "the mask lies where q does; got meta and cpu. Move the mask",
    ),
    (
        lambda: attention(*qkv(), [[1]]),
        InputError,
        "mask is a tensor, a plan of plan_packing, or None; got list",
    ),
    (
        lambda: plan_packing(None, batch=2, q_len=-1, k_len=6),
        InputError,
        "batch, heads, q_len and k_len are 0 or more; got 2, 1, -1 and 6",
    ),
    (
        lambda: enable_fa3(nn.Linear(2, 2), layers="("),
        InputError,
        r"or a function of a layer's name and module; got '\(': missing",
    ),
    (
        lambda: enable_fa3(nn.Linear(2, 2), layers=["a"]),
        InputError,
        "or a function of a layer's name and module; got list. Of names, make one: ",
    ),
    (
        lambda: cp_plan(FluxPipeline),
        UnsupportedModelError,
        "cp_plan takes one diffusers model; got type. Of a pipeline, pass",
    ),
    (
        lambda: in_varlen(qkv()[0], *qkv(head_dim=16)[1:]),
        InputError,
        "q and k must have one head size, k and v one length and number of heads; got",
    ),
    (
        lambda: in_varlen(qkv()[0], *(x.double() for x in qkv()[1:])),
        InputError,
        "q, k and v must have one dtype; got torch.float32, torch.float64",
    ),
    (
        lambda: in_varlen(qkv()[0], *(x.to("meta") for x in qkv()[1:])),
        InputError,
        "q, k and v must be on one device; got cpu, meta, meta",
    ),
    (without_gradient, InputError, "attention over a cache records no gradient; call under"),
    (
        lambda: into(torch.empty(1, 4, 2, 9)),
        InputError,
        r"out must have shape \(1, 4, 2, 8\); got \(1, 4, 2, 9\)",
    ),
    (
        lambda: into(torch.empty(1, 4, 2, 8, device="meta")),
        InputError,
        "out must be on cpu; got meta",
    ),
    (
        lambda: into(torch.empty(1, 4, 2, 8, requires_grad=True)),
        InputError,
        "out cannot take part in autograd; call under",
    ),
    (
        lambda: attention(*qkv(), kernel=strange),
        KernelUnavailableError,
        "strange requires colour; a function that is given as `kernel` takes FlashAttention's",
    ),
    (
        lambda: plan_packing(torch.randn(1, 1, 4, 4), batch=1, q_len=4, k_len=4),
        MaskError,
        "; packing takes groups of queries that see the same keys, or bands. Use torch",
    ),
    (
        lambda: part_of(torch.ones(1, 1, 4, 4).tril(), (1, 2, 4, 4), "bk", [4, 4], [4, 4], True),
        ParallelError,
        r"its queries' view of its own keys only. Got \(1, 1, 4, 4\); pass a mask of keys",
    ),
    (
        # Selection refuses such a kernel before, by its limits.
        lambda: _cache_entry(replace(kernel_named("reference"), kvcache=None)),
        KernelUnavailableError,
        "reference has no entry for a key-value cache",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for *_, words in CALLS])
def test_a_call_is_refused(call: Callable[[], object], error: type[FA3Error], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("flash_attn_2", "is here without FlashAttention-2, as flash-attn-4 alone installs it"),
        ("flash_attn_4", "is here without FlashAttention-4, as flash-attn alone installs it"),
    ],
)
def test_a_package_that_another_one_of_its_name_replaces_is_told(
    kernel: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("flash_attn")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    (provider,) = (provider for provider in PROVIDERS if provider.name == kernel)
    with pytest.raises(KernelUnavailableError, match=words):
        provider.load()


def test_flash_attn_4_that_returns_no_log_sum_exp_is_told() -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, None]:
        return q, None

    call = flash_attn_4.bind(None, dense, dense)
    with pytest.raises(KernelUnavailableError, match="flash_attn_4 returned no log-sum-exp"):
        call(*qkv(), Options(softmax_scale=1.0), return_lse=True)


class Dropout(AttnProcessor2_0):
    """Attention with dropout."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, **_: object) -> Tensor:
        return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3, dropout_p=0.5)


class NoAttention(AttnProcessor2_0):
    """No attention call at all."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("processor", "error", "words"),
    [
        (Dropout, InputError, "attention dropout; no kernel takes this. Call torch.nn.functional"),
        (NoAttention, UnsupportedModelError, "could be switched; leave the layer out by `layers`"),
    ],
)
def test_a_layer_that_no_kernel_can_serve_is_told(
    processor: type[AttnProcessor2_0], error: type[FA3Error], words: str
) -> None:
    layer = Attention(query_dim=8, heads=1, dim_head=8, processor=processor())
    enable_fa3(layer, kernel="reference", fallback="error")
    with pytest.raises(error, match=words):
        layer(torch.randn(1, 4, 8))


def token_replace(model: nn.Module) -> None:
    model.register_to_config(image_condition_type="token_replace")


def siglip(model: nn.Module) -> None:
    model.siglip_embedder = nn.Identity()


@pytest.mark.parametrize(
    ("name", "prepare", "words"),
    [
        ("z_image", siglip, "the final layer is told which tokens are noisy"),
        ("hunyuan_video", token_replace, "token_replace' treats the first tokens differently"),
        ("cogview4_training", None, "CogView4TrainingAttnProcessor makes a mask of queries"),
        ("kandinsky5_nabla", None, "'nabla' chooses its mask from all queries and keys"),
        ("helios", None, "with is_amplify_history, diffusers takes a rank's tokens for all"),
    ],
)
def test_a_configuration_that_cannot_be_split_is_told(
    name: str, prepare: Callable[[nn.Module], None] | None, words: str
) -> None:
    if name not in BY_NAME:
        pytest.skip("the installed diffusers lacks this model")
    model = BY_NAME[name].build()
    if prepare is not None:
        prepare(model)
    told = f"cannot be split over ranks with this configuration: .*{words}"
    with pytest.raises(UnsupportedModelError, match=told):
        cp_plan(model)
