"""Whatever device new tensors are made on by default, masks are read and packed all the same."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from patterns import PATTERNS, B
from torch import Tensor
from torch.utils._device import _device_constructors

import diffusers_fa3
from diffusers_fa3 import attention, flash_attn_varlen_func, flash_attn_with_kvcache, plan_packing

PACKAGE = Path(diffusers_fa3.__file__).parent
H, D = 2, 8


@contextmanager
def set_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.9 would find no device there, where it was never asked to look before
        del torch._GLOBAL_DEVICE_CONTEXT.device_context


ELSEWHERE: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "torch.device": lambda: torch.device("meta"),
    "set_default_device": set_default_device,
}
KEYS = {
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
    "gap": [[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1]],
    "empty sample": [[0] * 6, [1, 1, 1, 0, 0, 0]],
    "all true": [[1] * 6] * 2,
}


def outer(keys: Tensor) -> Tensor:
    return keys[:, None, :, None] & keys[:, None, None, :]


MASKS = {
    **{
        f"pattern: {name}": make()[(None,) * (4 - make().ndim)]
        for name, (make, _) in PATTERNS.items()
    },
    **{f"keys: {name}": torch.tensor(keys, dtype=torch.bool) for name, keys in KEYS.items()},
    **{f"int: {name}": torch.tensor(keys) for name, keys in KEYS.items()},
    **{
        f"additive: {name}": torch.tensor(keys).logical_not()[:, None, None] * -1e9
        for name, keys in KEYS.items()
        if name != "empty sample"
    },
    **{f"outer: {name}": outer(torch.tensor(keys).bool()) for name, keys in KEYS.items()},
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_is_read_under_another_default_device(name: str, where: str) -> None:
    mask = MASKS[name]
    batch = B if name.startswith("pattern") else 2
    k_len = mask.shape[-1]
    q_len = mask.shape[-2] if mask.ndim == 4 and mask.shape[-2] > 1 else k_len
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, H, D, generator=generator) for length in (q_len, k_len, k_len)
    )
    axes = {"batch": batch, "q_len": q_len, "k_len": k_len, "heads": H}
    expected = attention(q, k, v, plan_packing(mask, **axes), kernel="reference")
    with ELSEWHERE[where]():
        plan = plan_packing(mask, **axes)
        got = attention(q, k, v, plan, kernel="reference")
        got_lse, lse = attention(q, k, v, plan, kernel="reference", return_lse=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_lse, expected)
    assert lse.device.type == "cpu"


@pytest.mark.parametrize("where", ELSEWHERE)
def test_flash_attentions_own_functions_run_under_another_default_device(where: str) -> None:
    q, k, v = torch.randn(3, 2, 3, H, D)
    k_cache, v_cache = torch.randn(2, 2, 8, H, D)
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    table = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    calls: dict[str, Callable[[], object]] = {
        "varlen": lambda: flash_attn_varlen_func(*packed, ends, ends, 3, 3, causal=True),
        "dense": lambda: attention(q, k, v, causal=True),
        "cache": lambda: flash_attn_with_kvcache(
            q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=4
        ),
        "pages": lambda: flash_attn_with_kvcache(q, k_cache, v_cache, page_table=table),
    }
    expected = {name: call() for name, call in calls.items()}
    with ELSEWHERE[where]():
        got = {name: call() for name, call in calls.items()}
    torch.testing.assert_close(got, expected)


MAKERS = {maker.__name__ for maker in _device_constructors()}
FILES = [path for path in PACKAGE.rglob("*.py") if "bench" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_that_the_package_makes_names_its_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in MAKERS:
            assert "device" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)
