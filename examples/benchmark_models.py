"""Whole diffusers transformers at real sizes: one forward on the default attention and on this one.

Configurations are the published ones, weights random: time, memory and routes do not depend on
them. The mask is copied in every forward, so that it is read and planned anew each time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from diffusers_fa3 import available_kernels, coverage, disable_fa3, enable_fa3
from diffusers_fa3.bench.methods import Method, host_syncs
from diffusers_fa3.bench.report import Lines, markdown_of, table_of
from diffusers_fa3.bench.run import versions
from diffusers_fa3.bench.timing import times_of
from diffusers_fa3.outer import lay_out_masks_of, spread_masks_of

Config = dict[str, Any]
Inputs = dict[str, Any]

DTYPE = torch.bfloat16
READS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.cpu,
    Tensor.item,
    Tensor.nonzero,
    Tensor.numpy,
    Tensor.tolist,
    torch.nonzero,
}
"""What would make the host wait for a GPU; counted by this where there is none."""
REFERENCE = "diffusers_fa3.providers.reference"
"""Module of the reference kernel, which reads lengths that a GPU's kernels take as they are."""


@dataclass(frozen=True)
class Size:
    """What goes in: samples, image or video in patches, and text tokens."""

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def image(self) -> int:
        """Image or video tokens."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Model:
    """A transformer as it was published, and what it is measured on."""

    name: str
    cls: type[nn.Module]
    config: Config
    size: Size
    inputs: Callable[[Config, Size], Inputs]
    """All but the text."""
    text_width: str
    """Entry of the configuration."""
    small: Config
    """What makes it tiny, in place of published values."""
    shares: tuple[float | None, ...] = (None,)
    """Shares of valid text; None: no mask."""
    mask_name: str = ""
    """Argument that takes the mask of the text."""
    joint_mask: bool = False
    """That mask is of [text, image]."""
    depths: tuple[str, ...] = ("num_layers",)
    """Entries of the configuration that count blocks."""
    layers: int | None = None
    """At most so many blocks, unless others are asked for."""


@dataclass(frozen=True)
class Forward:
    """One forward of a whole model."""

    ms: float
    """Median."""
    times_ms: tuple[float, ...]
    peak_gb: float | None
    """Most memory allocated, weights included; None: not on a GPU."""
    host_waits: int | None
    """On a GPU whatever waits for it, copies to it too; else reads alone; None: not counted."""


@dataclass(frozen=True)
class Row:
    """A model on one share of valid text."""

    model: str
    share: float | None
    compiled: bool
    size: Size
    failed: str = ""
    """Why ours, or both, were not measured."""
    parameters: int = 0
    default: Forward | None = None
    ours: Forward | None = None
    error: float | None = None
    """Of ours against the default; relative, as a Euclidean norm, of the worst sample."""
    kernels: tuple[str, ...] = ()
    routes: dict[str, int] = field(default_factory=dict)
    """Attention calls of one forward on a kernel."""
    fallbacks: int = 0
    plans_made: int = 0
    plans_reused: int = 0
    graphs: int | None = None
    """How many were compiled for ours, in all rounds: one is what it takes; None: not compiled."""
    graph_breaks: int | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the default."""
        return self.default.ms / self.ours.ms if self.default and self.ours else None


def patches(config: Config, size: Size) -> Inputs:
    """Qwen-Image's image, in patches, with its shape."""
    return {
        "hidden_states": torch.randn(size.batch, size.image, config["in_channels"]),
        "timestep": torch.full((size.batch,), 0.5),
        "img_shapes": [(size.frames, size.height, size.width)] * size.batch,
    }


def placed_patches(config: Config, size: Size) -> Inputs:
    """Flux' image, in patches, with positions."""
    axes = torch.arange(size.frames), torch.arange(size.height), torch.arange(size.width)
    return {
        "hidden_states": torch.randn(size.batch, size.image, config["in_channels"]),
        "timestep": torch.full((size.batch,), 0.5),
        "guidance": torch.full((size.batch,), 3.5),
        "pooled_projections": torch.randn(size.batch, config["pooled_projection_dim"]),
        "img_ids": torch.cartesian_prod(*axes).to(DTYPE),
        "txt_ids": torch.zeros(size.text, 3),
    }


def placed_patches_alone(config: Config, size: Size) -> Inputs:
    """Chroma's image: as Flux', without a summary of the text."""
    inputs = placed_patches(config | {"pooled_projection_dim": 1}, size)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs


def video_of_three_texts(config: Config, size: Size) -> Inputs:
    """HunyuanVideo 1.5 without an image and without glyphs to draw: both are padding throughout."""
    glyphs, image_tokens = min(size.text, 256), 729
    latents = (size.batch, config["in_channels"], size.frames, size.height, size.width)
    return {
        "hidden_states": torch.randn(latents),
        "timestep": torch.full((size.batch,), 500.0),
        "encoder_hidden_states_2": torch.randn(size.batch, glyphs, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": torch.zeros(size.batch, glyphs, dtype=torch.bool),
        "image_embeds": torch.zeros(size.batch, image_tokens, config["image_embed_dim"]),
    }


def image(config: Config, size: Size) -> Inputs:
    """Latents in patches of 2 x 2."""
    shape = (size.batch, config["in_channels"], 2 * size.height, 2 * size.width)
    return {"hidden_states": torch.randn(shape), "timestep": torch.full((size.batch,), 500)}


def video(config: Config, size: Size) -> Inputs:
    """The same, for all frames."""
    shape = (size.batch, config["in_channels"], size.frames, 2 * size.height, 2 * size.width)
    return {"hidden_states": torch.randn(shape), "timestep": torch.full((size.batch,), 500)}


def pooled_image(config: Config, size: Size) -> Inputs:
    """The same, with a summary of the text."""
    pooled = torch.randn(size.batch, config["pooled_projection_dim"])
    return image(config, size) | {"pooled_projections": pooled}


def conditioned_image(config: Config, size: Size) -> Inputs:
    """The same, without the conditions that it may have."""
    conditions = {"resolution": None, "aspect_ratio": None}
    return image(config, size) | {"added_cond_kwargs": conditions}


MODELS = (
    Model(
        "flux",  # FLUX.1-dev, 1024 x 1024
        FluxTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        Size(1, 1, 64, 64, text=512),
        placed_patches,
        text_width="joint_attention_dim",
        small={"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32},
        depths=("num_layers", "num_single_layers"),
    ),
    Model(
        "qwenimage",  # Qwen-Image, 1024 x 1024
        QwenImageTransformer2DModel,
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        Size(2, 1, 64, 64, text=512),
        patches,
        text_width="joint_attention_dim",
        small={"num_attention_heads": 2, "joint_attention_dim": 32},
        shares=(None, 1.0, 0.5, 0.1),
        mask_name="encoder_hidden_states_mask",
        layers=20,
    ),
    Model(
        "chroma",  # Chroma1-HD, 1024 x 1024
        ChromaTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "axes_dims_rope": (16, 56, 56),
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
        },
        Size(1, 1, 64, 64, text=512),
        placed_patches_alone,
        text_width="joint_attention_dim",
        small={
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        shares=(0.1,),
        mask_name="attention_mask",
        joint_mask=True,
        depths=("num_layers", "num_single_layers"),
    ),
    Model(
        "hunyuanvideo15",  # HunyuanVideo 1.5 T2V, 848 x 480, 121 frames
        HunyuanVideo15Transformer3DModel,
        {
            "in_channels": 65,
            "out_channels": 32,
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "num_layers": 54,
            "num_refiner_layers": 2,
            "text_embed_dim": 3584,
            "text_embed_2_dim": 1472,
            "image_embed_dim": 1152,
            "task_type": "t2v",
        },
        Size(1, 31, 30, 53, text=1000),
        video_of_three_texts,
        text_width="text_embed_dim",
        small={
            "num_attention_heads": 2,
            "text_embed_dim": 32,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "num_refiner_layers": 1,
        },
        shares=(0.05,),
        mask_name="encoder_attention_mask",
        layers=20,
    ),
    Model(
        "wan",  # Wan 2.1 T2V 1.3B, 832 x 480, 81 frames
        WanTransformer3DModel,
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        },
        Size(1, 21, 30, 52, text=512),
        video,
        text_width="text_dim",
        small={"num_attention_heads": 2, "text_dim": 32, "ffn_dim": 64},
    ),
    Model(
        "sd3",  # Stable Diffusion 3.5 medium, 1024 x 1024
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        Size(2, 1, 64, 64, text=333),
        pooled_image,
        text_width="joint_attention_dim",
        small={
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 32,
        },
    ),
    Model(
        "pixart",  # PixArt-Sigma XL, 1024 x 1024
        PixArtTransformer2DModel,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": 128,
            "interpolation_scale": 2,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        Size(2, 1, 64, 64, text=300),
        conditioned_image,
        text_width="caption_channels",
        small={"num_attention_heads": 2, "cross_attention_dim": 144, "caption_channels": 32},
        shares=(None, 20 / 300),
        mask_name="encoder_attention_mask",
    ),
)


def made_small(model: Model) -> Model:
    """The same in a size that a CPU computes at once."""
    depths = dict.fromkeys(model.depths, 2)
    frames = min(model.size.frames, 2)
    size = replace(model.size, frames=frames, height=4, width=4, text=model.size.text // 8)
    return replace(model, config=model.config | model.small | depths, size=size)


def made_shallow(model: Model, layers: int | None) -> Model:
    """The same with fewer blocks, where so many were asked for."""
    most = layers or model.layers
    depths = {name: min(most or model.config[name], model.config[name]) for name in model.depths}
    return replace(model, config=model.config | depths)


@contextmanager
def defaults(device: str) -> Iterator[None]:
    """Tensors are made on the device and in half precision, as diffusers does when it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(model: Model, device: str) -> nn.Module:
    """The model with random weights; nothing hides attention from what comes out."""
    torch.manual_seed(0)
    with defaults(device):
        network = model.cls(**model.config).eval().requires_grad_(False)
    in_float32 = network._keep_in_fp32_modules or []
    for name, parameter in network.named_parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
        if any(part in in_float32 for part in name.split(".")):
            parameter.data = parameter.float()
    return network


def make_inputs(model: Model, share: float | None, device: str) -> Inputs:
    """One forward's arguments."""
    torch.manual_seed(1)
    with defaults(device):
        inputs = model.inputs(model.config, model.size)
        text = (model.size.batch, model.size.text, model.config[model.text_width])
        inputs["encoder_hidden_states"] = torch.randn(text)
        if share is not None:
            mask = text_mask(model.size, share)
            image = mask.new_ones(model.size.batch, model.size.image)
            joint = torch.cat([mask, image], dim=1)
            inputs[model.mask_name] = joint if model.joint_mask else mask
    return inputs


def text_mask(size: Size, share: float) -> Tensor:
    """(B, text) bool, valid tokens first; samples differ by up to half of the share."""
    spread = torch.ones(size.batch) if share == 1 else torch.linspace(0.5, 1.5, size.batch)
    lengths = (size.text * share * spread.float()).round().clamp(1, size.text)
    return torch.arange(size.text) < lengths[:, None]


class Switch:
    """A model's two sets of processors: always the same objects, or it would be compiled anew."""

    def __init__(self, network: nn.Module, kernel: str) -> None:
        self.network = network
        enable_fa3(network, kernel=kernel, fallback="error")
        self.ours = processors_of(network)
        disable_fa3(network)
        self.own = processors_of(network)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Our attention in this block, the default outside."""
        put(self.ours)
        for module in self.network.modules():
            spread_masks_of(module)
        try:
            yield
        finally:
            put(self.own)
            for module in self.network.modules():
                lay_out_masks_of(module)

    def did(self) -> dict[str, Any]:
        """What ours, which is on, did so far, as a row has it."""
        done = coverage(self.network)
        routes: Counter[str] = Counter()
        for layer in done.rows:
            routes.update(layer.calls)
        return {
            "kernels": tuple(sorted({layer.kernel for layer in done.rows if layer.calls})),
            "routes": dict(routes),
            "fallbacks": done.fallbacks,
            "plans_made": done.plans_made,
            "plans_reused": done.plans_reused,
        }


def processors_of(network: nn.Module) -> dict[nn.Module, Any]:
    """The processor of each attention layer."""
    layers = (module for module in network.modules() if hasattr(module, "processor"))
    return {layer: layer.processor for layer in layers}


def put(processors: Mapping[nn.Module, Any]) -> None:
    """Give each layer its processor."""
    for layer, processor in processors.items():
        layer.processor = processor


def forward_of(network: Callable[..., Any]) -> Callable[[Inputs], Tensor]:
    """A forward that no plan was made for."""

    def run(inputs: Inputs) -> Tensor:
        masks = {name: mask.clone() for name, mask in inputs.items() if name.endswith("_mask")}
        return network(**inputs | masks, return_dict=False)[0]

    return run


def measure(model: Model, network: nn.Module, share: float | None, args: argparse.Namespace) -> Row:
    """Both attentions on one share of valid text, in turns; if ours fails, the default alone."""
    inputs = make_inputs(model, share, args.device)
    switch = Switch(network, args.kernel)
    run = forward_of(torch.compile(network) if args.compile else network)
    methods = {"default": Method(run), "ours": Method(run, switch.on)}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    row = Row(model.name, share, args.compile, model.size, parameters=parameters)
    default = run(inputs)
    try:
        # What does ours give, and how? This warms up as well, and compiles.
        counters.clear()
        with switch.on():
            row = replace(row, error=error_of(run(inputs), default), **switch.did())
        row = replace(row, **forwards(methods, inputs, args))
        return replace(row, **graphs()) if args.compile else row
    except Exception as error:  # the default may do
        row = replace(row, failed=words_of(error))
    del methods["ours"]
    return replace(row, **forwards(methods, inputs, args))


def forwards(
    methods: dict[str, Method], inputs: Inputs, args: argparse.Namespace
) -> dict[str, Forward]:
    """What a forward costs on each attention."""
    costs = {name: cost_of(method, inputs, args) for name, method in methods.items()}
    times = times_of(methods, [inputs], args.rounds, args.device, calls=1)
    return {
        name: Forward(statistics.median(times[name]), tuple(times[name]), *costs[name])
        for name in methods
    }


def graphs() -> dict[str, int]:
    """What was compiled since the counters were cleared, as a row has it."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": counters["graph_break"].total(),
    }


def error_of(result: Tensor, default: Tensor) -> float:
    """Relative, as a Euclidean norm, of the worst sample."""
    difference, size = (x.float().flatten(1) for x in (result - default, default))
    return (difference.norm(dim=1) / size.norm(dim=1)).max().item()


def cost_of(
    method: Method, inputs: Inputs, args: argparse.Namespace
) -> tuple[float | None, int | None]:
    """The most memory of one forward, in GB, and how often it makes the host wait."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        waits = host_syncs(method, inputs)
        return torch.cuda.max_memory_allocated() / 1e9, waits
    # What is compiled would be compiled anew under a mode.
    return None, None if args.compile else host_reads(method, inputs)


class CountReads(TorchFunctionMode):
    """Counts calls that read a tensor's values, on the way to the kernel and back."""

    leaves_attention_alone = True
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        self.count += func in READS and not caller.startswith(REFERENCE)
        return func(*args, **(kwargs or {}))


def host_reads(method: Method, inputs: Inputs) -> int:
    """How often one call would make the host wait for a GPU, by what it asks of tensors."""
    with method.around(), CountReads() as reads:
        method.run(inputs)
    return reads.count


def measure_all(model: Model, args: argparse.Namespace) -> Iterator[Row]:
    """A row for every share of valid text; a failure is one, too."""
    shares = [share for share in model.shares if share is None or not args.compile]
    network = None
    for share in shares:
        try:
            network = build(model, args.device) if network is None else network
            yield measure(model, network, share, args)
        except Exception as error:  # the next one may do
            yield Row(model.name, share, args.compile, model.size, failed=words_of(error))
        free(args.device)


def words_of(error: Exception) -> str:
    """What went wrong, not at length."""
    return shorten(f"{type(error).__name__}: {error}", 300)


def free(device: str) -> None:
    """Give back what is no longer used, compiled code among it."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> Lines:
    """Every row in words."""
    head = ("model", "valid text", "tokens", "parameters", "default", "ours", "speedup")
    costs = ("peak memory", "host waits", "error", "attention calls", "plans")
    return [(*head, *costs), *map(cells, rows)]


def cells(row: Row) -> tuple[str, ...]:
    """One row in words; pairs are default / ours."""
    share = "no mask" if row.share is None else f"{100 * row.share:.3g}%"
    where = (
        f"{row.model}, compiled" if row.compiled else row.model,
        share,
        f"{row.size.batch} x ({row.size.image} + {row.size.text})",
    )
    calls = [f"{route} {count}" for route, count in row.routes.items()]
    calls += [f"default {row.fallbacks}"] if row.fallbacks else []
    if row.graphs is not None:
        calls += [f"{row.graphs} graphs, {row.graph_breaks} breaks"]
    calls += [row.failed] if row.failed else []
    both = (row.default, row.ours)
    return (
        *where,
        f"{row.parameters / 1e9:.2f} B",
        *("failed" if each is None else f"{each.ms:.2f} ms" for each in both),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        " / ".join("-" if x is None or x.peak_gb is None else f"{x.peak_gb:.2f} GB" for x in both),
        " / ".join("-" if x is None or x.host_waits is None else f"{x.host_waits}" for x in both),
        "-" if row.error is None else f"{row.error:.1e}",
        ", ".join(calls),
        f"{row.plans_made} made, {row.plans_reused} reused",
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    names = [model.name for model in MODELS]
    kernels = ["auto", *(row.name for row in available_kernels())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=kernels, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="at most so many blocks; else all, qwenimage 20")
    parser.add_argument("--compile", action="store_true", help="torch.compile; only without masks")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 1 where something failed."""
    args = parse_args()
    about = versions(args.device, args.kernel)
    models = [model for model in MODELS if model.name in args.models]
    rows: list[Row] = []
    with torch.no_grad():
        for model in track(models, description="measuring"):
            fitting = made_shallow(made_small(model) if args.small else model, args.layers)
            rows.extend(measure_all(fitting, args))
            free(args.device)

    if args.json:
        results = [asdict(row) | {"speedup": row.speedup} for row in rows]
        everything = {"versions": about, "command": sys.argv[1:], "rows": results}
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    if args.markdown:
        print(markdown_of(table(rows)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(table_of(table(rows), "one forward"))
    # Under torch.compile, that ours fails is a finding.
    return int(any(row.failed and not (row.compiled and row.default) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
