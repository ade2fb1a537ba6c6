"""What cannot be exact over ranks is refused in words, on all of them, whatever `fallback` says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from ranks import known, results, run, split
from test_parallel_models import output
from tiny import CONFIG
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from zoo import CASES

from diffusers_fa3 import FA3AttnProcessor, ParallelError, cp_plan, enable_fa3

ZOO = {case.name: case for case in CASES}
TEXT, IMAGE = 4, 4


def flux(heads: int = 2) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**CONFIG | {"num_attention_heads": heads}).eval()


def inputs(mask: Tensor | None = None) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, IMAGE, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(IMAGE, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "joint_attention_kwargs": None if mask is None else {"attention_mask": mask},
    }


class Odd(FluxAttnProcessor):
    """Attention as a processor of one's own may call it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        config = self._parallel_config
        return dispatch_attention_fn(q, q, q, parallel_config=config, **self.options)


def refusals() -> dict[str, tuple[Callable[[], object], str]]:
    """What is refused: how to ask for it, and a part of the answer."""

    def masked(mask: Tensor, **degrees: int) -> Callable[[], object]:
        return lambda: ready(flux(), **degrees)(**inputs(mask))

    def odd(**options: Any) -> Callable[[], object]:
        def call() -> object:
            model = flux()
            model.set_attn_processor(Odd(**options))
            return ready(model, ring_degree=2)(**inputs())

        return call

    def processors_set_late(wrap: Callable[[Any], Any]) -> Callable[[], object]:
        def call() -> object:
            model = split(flux(), ring_degree=2)
            model.set_attn_processor(wrap(FluxAttnProcessor()))
            if wrap is plain:
                enable_fa3(model, kernel="reference", fallback="silent")
            return model(**inputs())

        return call

    def untold() -> object:
        case = ZOO["sd3"]
        model: SD3Transformer2DModel = case.build()
        plan = {  # as a user may write it
            "pos_embed": {0: ContextParallelInput(1, None, split_output=True)},
            "context_embedder": {0: ContextParallelInput(1, None, split_output=True)},
            "proj_out": ContextParallelOutput(1, 3),
        }
        enable_fa3(model, kernel="reference", fallback="silent")
        return case.run(split(model, plan, ulysses_degree=2), "none")

    def by_hand_in_a_graph() -> object:
        case = ZOO["sd3"]
        model = case.build()
        by_hand = {
            name: FA3AttnProcessor(processor, kernel="reference", fallback="silent")
            for name, processor in model.attn_processors.items()
        }
        model.set_attn_processor(by_hand)
        split(model, cp_plan(model), ring_degree=2)
        torch._dynamo.reset()
        for block in model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        try:
            return case.run(model, "none")
        except Exception as error:  # Dynamo's own, which quotes ours
            start = str(error).index("context parallelism")
            raise ParallelError(str(error)[start:]) from error

    def amplified() -> object:
        import split_video

        case = next(case for case in split_video.CASES if case.name == "helios_plain")
        plan = cp_plan(case.build())  # somebody's own, for a model that ours refuses
        case = replace(case, config={**case.config, "is_amplify_history": True})
        model = case.build()
        enable_fa3(model, kernel="reference", fallback="silent")
        return output(case, split(model, plan, ulysses_degree=2), "none")

    def mask_on_one_rank() -> object:
        mask = torch.ones(1, 4, dtype=torch.bool) if dist.get_rank() == 0 else None
        model = ready(flux(), ulysses_degree=2, ulysses_anything=True)
        return model(**inputs(mask))

    def transform() -> object:
        model = ready(flux(), ring_degree=2)
        given = inputs()
        tokens = given.pop("hidden_states")
        return torch.func.jvp(
            lambda x: model(hidden_states=x, **given)[0], (tokens,), (torch.ones_like(tokens),)
        )

    found = {
        "a mask of all keys": (
            masked(torch.ones(1, TEXT + IMAGE, dtype=torch.bool), ulysses_degree=2),
            "a mask of 8 keys on a rank that has 4; split it as the tokens are",
        ),
        "a mask of queries and keys": (
            masked(torch.ones(4, 4).tril().bool()[None, None], ring_degree=2),
            "a mask of queries and keys",
        ),
        "causal": (odd(is_causal=True), "causal attention over shards"),
        "dropout": (odd(dropout_p=0.5), "attention dropout"),
        "a mask of another type": (odd(attn_mask=[1]), "mask of type list"),
        "heads": (
            lambda: ready(flux(3), ulysses_degree=2)(**inputs()),
            "3 heads cannot be split over 2 ranks; use ulysses_anything, or a ring",
        ),
        "a processor that nobody told": (untold, "JointAttnProcessor2_0 takes no part in it"),
        "a processor set after": (
            processors_set_late(plain),
            "FluxAttnProcessor takes no part in it",
        ),
        "a processor set after, by hand": (
            processors_set_late(lambda p: FA3AttnProcessor(p, fallback="silent")),
            "FluxAttnProcessor takes no part in it",
        ),
        "a processor wrapped by hand, in a graph": (
            by_hand_in_a_graph,
            "JointAttnProcessor2_0 takes no part in it",
        ),
        "forward-mode derivatives": (transform, "forward-mode derivatives"),
    }
    if "helios" in ZOO:
        found["Helios with amplified history"] = (amplified, "with is_amplify_history")
    if known(("UA2",)):
        found["a mask on one rank"] = (mask_on_one_rank, "a mask on some ranks alone")
    return found


def plain(processor: Any) -> Any:
    return processor


def ready(model: nn.Module, **degrees: Any) -> nn.Module:
    enable_fa3(model, kernel="reference", fallback="silent")
    return split(model, **degrees)


def refused(rank: int) -> dict[str, str]:
    said = {}
    for name, (call, _) in refusals().items():
        try:
            with torch.no_grad():
                call()
            said[name] = "served"
        except ParallelError as error:
            said[name] = str(error)
        dist.barrier()  # nobody waits for a message that another rank never sends
    return said


def test_refusals_are_the_same_words_on_all_ranks() -> None:
    first, second = results("test_parallel_errors:refused", 2, timeout=20)
    assert first == second
    for name, (_, words) in refusals().items():
        assert first[name].startswith("context parallelism: "), f"{name}: {first[name]}"
        assert words in first[name], f"{name}: {first[name]}"


def failing(rank: int, stays: bool) -> float:
    """How long a rank waits for one that raises by itself in the second layer."""
    model = ready(flux(), ulysses_degree=2)
    if rank == 1:

        def fail(*_: object) -> None:
            raise MemoryError("out of memory")

        model.transformer_blocks[1].register_forward_pre_hook(fail)
    start = time.monotonic()
    try:
        with torch.no_grad():
            model(**inputs())
    except MemoryError:
        if not stays:
            raise
        time.sleep(12)  # as a server does that catches errors
        return -1.0
    except RuntimeError:
        return time.monotonic() - start
    raise AssertionError("a rank went on without the other")


@pytest.mark.parametrize("stays", [True, False], ids=["and stays", "and ends"])
def test_a_rank_that_raises_by_itself_ends_the_others_in_time(stays: bool) -> None:
    if stays and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("the groups of a mesh did not take the timeout of the process group")
    waited, other = run("test_parallel_errors:failing", 2, stays, timeout=4)
    assert isinstance(waited, float)
    assert 0 <= waited < 10
    assert other == -1.0 if stays else isinstance(other, MemoryError)
