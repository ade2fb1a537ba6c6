"""A model in a wrapper is the model that it was, in both orders of wrapping and switching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from gradients import gradients
from peft import LoraConfig, get_peft_model
from switching import BY_NAME
from tiny import LAYERS, flux, forward
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import Case
from zoo.budget import assert_within_budget

from diffusers_fa3 import PackingPlan, UnsupportedModelError, coverage, disable_fa3, enable_fa3
from diffusers_fa3.layers.block_masks import _spread
from diffusers_fa3.layers.processor import record_of
from diffusers_fa3.masks.outer import OuterMask

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, without which nothing is distributed."""
    group: Path = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group("gloo", init_method=f"file://{group}", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Compiled models run as they are: a graph packs keys alone, and reads no mask."""
    with torch.compiler.set_stance("force_eager"):
        yield


# --- wrappers ------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """The place of each block of a model: a list, and an index."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return [(blocks, i) for blocks in lists for i in range(len(blocks))]


def every_block(wrap: Wrap) -> Wrap:
    def wrapped(model: nn.Module) -> nn.Module:
        for blocks, i in blocks_of(model):
            blocks[i] = wrap(blocks[i])
        return model

    return wrapped


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for blocks, i in blocks_of(model):
        fully_shard(blocks[i], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def peft(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"])).eval()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def subclass(module: nn.Module) -> nn.Module:
    """The same module, of a class of one's own whose `forward` names no arguments."""
    base = type(module)

    class Own(base):
        def forward(self, *args: object, **kwargs: object) -> object:
            return super().forward(*args, **kwargs)

    module.__class__ = Own
    return module


class Trainer(nn.Module):
    """A model among the parts of a training script."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(2, 2)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.network(*args, **kwargs)


WRAPPERS: dict[str, Wrap] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "peft": peft,
    "compiled": compiled,
    "compiled blocks": every_block(compiled),
    "checkpointed blocks": every_block(checkpoint_wrapper),
    "subclass": subclass,
    "subclass of blocks": every_block(subclass),
    "trainer": Trainer,
    "all": lambda model: compiled(ddp(peft(subclass(every_block(checkpoint_wrapper)(model))))),
}

every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
both_orders = pytest.mark.parametrize("switch_first", [True, False], ids=["switched", "wrapped"])


def switched_and_wrapped(
    model: nn.Module, wrap: Wrap, switch_first: bool, **options: object
) -> nn.Module:
    """The model in its wrapper, switched before or after it was wrapped."""
    if not switch_first:
        model = wrap(model)
    enable_fa3(model, kernel="reference", fallback="error", **options)
    return wrap(model) if switch_first else model


# --- padded queries ------------------------------------------------------------------------------


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the queries of each packed call."""
    sizes, pack = [], PackingPlan.pack

    def count(plan: PackingPlan, q: torch.Tensor, *kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = pack(plan, q, *kv)
        sizes.append(packed[0].numel())
        return packed

    monkeypatch.setattr(PackingPlan, "pack", count)
    return sizes


def ran(case: Case, model: nn.Module, sizes: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The output of one forward, and the sizes that it had."""
    sizes.clear()
    return case.run(model, "ragged"), list(sizes)


@every_wrapper
@both_orders
@pytest.mark.parametrize("name", ["hunyuan_image", "lumina2", "motif_video", "qwenimage"])
def test_padded_queries_are_left_out_of_a_wrapped_model(
    name: str, wrap: Wrap, switch_first: bool, queries: list[int]
) -> None:
    case = BY_NAME[name]
    bare = [case.build(), case.build()]
    for model, packs in zip(bare, (False, True)):
        enable_fa3(model, kernel="reference", fallback="error", pack_queries=packs)
    (_, all_of_them), (expected, fewer) = (ran(case, model, queries) for model in bare)
    assert sum(fewer) < sum(all_of_them)
    model = switched_and_wrapped(case.build(), wrap, switch_first, pack_queries=True)
    output, packed = ran(case, model, queries)
    assert torch.equal(output, expected)
    assert packed == fewer


@both_orders
def test_a_graph_of_a_model_that_packs_queries_gives_the_same_output(switch_first: bool) -> None:
    case = BY_NAME["qwenimage"]
    default = case.run(case.build(), "ragged")
    model = switched_and_wrapped(case.build(), compiled, switch_first, pack_queries=True)
    with torch.compiler.set_stance("default"):
        output = case.run(model, "ragged")
    assert_within_budget(output, default, case.exact("ragged"))
    assert coverage(model).rows[-1].name == "compiled graphs"


@every_wrapper
def test_a_wrapped_model_that_may_read_its_padding_is_refused_by_its_name(wrap: Wrap) -> None:
    model = wrap(flux())
    with pytest.raises(UnsupportedModelError, match=r"QwenImage.*got FluxTransformer2DModel\."):
        enable_fa3(model, pack_queries=True)
    assert {row.kernel for row in coverage(model).rows} == {"default"}


def test_a_wrapped_component_of_a_pipeline_is_found() -> None:
    case = BY_NAME["hunyuan_image"]
    pipe = FluxPipeline(*[None] * 7)
    pipe.transformer = peft(case.build())
    enable_fa3(pipe, kernel="reference", fallback="error", pack_queries=True)
    packs = {record_of(m.processor).pack_queries for m in attention_layers(pipe.transformer)}
    assert packs == {True, False}  # the layers that refine the text are not listed
    case.run(pipe.transformer, "ragged")
    assert coverage(pipe).calls > 0


def attention_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "processor" in vars(module)]


def test_a_class_of_a_known_name_that_is_not_of_diffusers_is_refused() -> None:
    fork = type("QwenImageTransformer2DModel", (nn.Module,), {})()
    fork.attn = flux().transformer_blocks[0].attn
    with pytest.raises(UnsupportedModelError, match="pack_queries is for models"):
        enable_fa3(fork, pack_queries=True)


# --- masks that are never laid out ---------------------------------------------------------------


@every_wrapper
@both_orders
@pytest.mark.parametrize("name", ["chroma", "hunyuan_video15_t2v"])
def test_no_mask_is_laid_out_in_a_wrapped_model(
    name: str, wrap: Wrap, switch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    default = case.run(case.build(), "ragged")
    blocks = r"(^|\.)(single_)?transformer_blocks"
    model = switched_and_wrapped(case.build(), wrap, switch_first, layers=blocks)
    in_factors: list[OuterMask] = []
    monkeypatch.setattr(OuterMask, "__init__", lambda mask, *factors: in_factors.append(mask))
    monkeypatch.setattr(OuterMask, "laid_out", None)
    assert_within_budget(case.run(model, "ragged"), default, case.exact("ragged"))
    report = coverage(model)
    assert report.calls == sum(row.kernel == "reference" for row in report.rows) > 0
    assert len(in_factors) == report.calls
    disable_fa3(model)
    assert not any(_spread in module._forward_pre_hooks.values() for module in model.modules())


def test_a_block_of_ones_own_may_leave_its_mask_unnamed() -> None:
    """Checkpointing gives the mask by position, and no name says which it is: it is laid out."""
    case = BY_NAME["chroma"]

    def trained(switch: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = case.build(dtype).train()
        for blocks, i in blocks_of(model):
            base = type(blocks[i])
            blocks[i].__class__ = type(base.__name__, (base,), {"forward": unnamed(base.forward)})
        model.enable_gradient_checkpointing()
        if switch:
            enable_fa3(model, kernel="reference", fallback="error")
        return gradients(case, "ragged", model)

    assert_within_budget(trained(True), trained(False), trained(False, torch.float64))


def unnamed(forward: Callable[..., object]) -> Callable[..., object]:
    """The same `forward` with a name for its first argument alone."""

    def of_ones_own(block: nn.Module, hidden_states: torch.Tensor, *rest: object) -> object:
        return forward(block, hidden_states, *rest)

    return of_ones_own


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper], ids=["compiled", "checkpointed"])
@both_orders
def test_a_wrapped_layer_is_one_layer(wrap: Wrap, switch_first: bool) -> None:
    """Wrappers hand on the attributes of the layer, its processor as well."""

    def wrap_layers(model: nn.Module) -> nn.Module:
        for block in model.transformer_blocks:
            block.attn = wrap(block.attn)
        return model

    default, own = forward(flux()), flux()
    before = [layer.processor for layer in attention_layers(own)]
    model = switched_and_wrapped(own, wrap_layers, switch_first)
    assert torch.equal(forward(model), default)
    report = coverage(model)
    assert len(report.rows) == report.calls == LAYERS
    disable_fa3(model)
    after = [layer.processor for layer in attention_layers(model)]
    assert all(one is other for one, other in zip(after, before, strict=True))
