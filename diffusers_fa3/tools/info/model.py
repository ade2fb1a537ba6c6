"""A local model or pipeline, built from its configuration alone: no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffusers_fa3.errors import FA3Error, InputError, UnsupportedModelError
from diffusers_fa3.layers import coverage, enable_fa3
from diffusers_fa3.parallel import cp_plan
from diffusers_fa3.tools.info.choices import choose, current_device
from diffusers_fa3.tools.info.layers import LayerGroup, group_layers, mask_arguments

PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Known:
    """Whether something is known for a model."""

    known: bool
    by: str = ""
    """"diffusers" or "diffusers_fa3": whose knowledge it is."""
    reason: str = ""
    """Why not; empty if it is known."""


@dataclass(frozen=True)
class ComponentFacts:
    """One model, by itself or as a component of a pipeline."""

    name: str
    """Its name in the pipeline; empty for a model by itself."""
    model: str
    """Class name."""
    masks: tuple[str, ...]
    """The arguments of its forward that are masks, by their names."""
    pack_queries: Known
    context_parallel: Known
    unswitchable: str
    """Why its layers cannot be switched; empty if they can."""
    layers: tuple[LayerGroup, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What `enable_fa3` would switch in a model or pipeline."""

    model: str
    """Class name of the model or pipeline."""
    components: tuple[ComponentFacts, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of components that could not be built."""


def read_model(folder: str | Path, ask: bool = True) -> ModelFacts:
    """The facts of a folder that `save_pretrained` or a download made.

    Args:
        folder: of a model or of a pipeline.
        ask: whether to ask what "auto" takes for each layer, for which kernels are loaded.

    Raises:
        InputError: it is no such folder, or its class cannot be built.
    """
    folder = Path(folder)
    facts = _read_pipeline(folder) if (folder / PIPELINE).is_file() else _read_one(folder)
    return _with_choices(facts) if ask else facts


def _read_one(folder: Path) -> ModelFacts:
    if not (folder / "config.json").is_file():
        raise InputError(
            "the model is a local folder with a config.json or a model_index.json, as "
            f"save_pretrained writes it; got {folder}. Download a model of the hub first: hf "
            "download NAME --local-dir DIR --include '*.json'"
        )
    model = build(folder)
    layers = dict(_layers(model))
    return ModelFacts(type(model).__name__, (_component("", model, layers),))


def _read_pipeline(folder: Path) -> ModelFacts:
    index = _json(folder / PIPELINE)
    models: dict[str, nn.Module] = {}
    skipped = {}
    for name, made_of in index.items():
        if not (isinstance(made_of, list) and made_of[:1] == ["diffusers"]):
            continue  # text encoders, tokenizers, settings
        if (folder / name / "config.json").is_file():
            try:
                models[name] = build(folder / name)
            except InputError as error:
                skipped[name] = str(error)
    layers = dict(_layers(SimpleNamespace(components=models), models))
    components = []
    for name, model in models.items():
        own = {n.removeprefix(f"{name}."): x for n, x in layers.items() if n.startswith(f"{name}.")}
        if own:
            components.append(_component(name, model, own))
    return ModelFacts(str(index.get("_class_name", "")), tuple(components), tuple(skipped.items()))


def build(folder: Path) -> nn.Module:
    """A model with the configuration of a folder, on the meta device: it takes no memory.

    Raises:
        InputError: the installed diffusers has no such class, or cannot build it.
    """
    import diffusers

    config = _json(folder / "config.json")
    name = config.get("_class_name")
    if name is None:
        raise InputError(
            f"{folder} is no model of diffusers: its config.json names no class by _class_name. "
            "Give the folder of a transformer or a UNet, or of the whole pipeline"
        )
    cls: Any = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise InputError(
            f"the class of a model is one of diffusers {diffusers.__version__}; "
            f"{folder / 'config.json'} says {name}. Install the release that made it: "
            f"{config.get('_diffusers_version', 'unknown')}"
        )
    make: Any = cls.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = make(config)
    except Exception as error:  # whatever is wrong with a configuration
        raise InputError(
            f"{name} must build from {folder / 'config.json'}; got {type(error).__name__}: {error}"
            ". Mend the file, or install the release of diffusers that made it"
        ) from error
    return model


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(
            f"{file} must be JSON; got {type(error).__name__}: {error}. Download it anew"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file} must hold a JSON object; got {type(content).__name__}. Download it anew"
        )
    return content


def _layers(pipe_or_model: Any, models: dict[str, nn.Module] | None = None) -> Iterator[Any]:
    """(name, layer) of the layers that `enable_fa3` would switch."""
    try:
        rows = coverage(pipe_or_model).rows
    except UnsupportedModelError:
        return
    for row in rows:
        if models is None:
            yield row.name, pipe_or_model.get_submodule(row.name)
        else:
            component, _, inner = row.name.partition(".")
            yield row.name, models[component].get_submodule(inner)


def _component(name: str, model: nn.Module, layers: dict[str, Any]) -> ComponentFacts:
    # Read first: the questions below switch the model.
    groups = group_layers(layers.items())
    return ComponentFacts(
        name=name,
        model=type(model).__name__,
        masks=mask_arguments(type(model).forward),
        pack_queries=_packs_queries(model),
        context_parallel=_is_split(model),
        unswitchable=_why_not_switched(model),
        layers=groups,
    )


def _with_choices(facts: ModelFacts) -> ModelFacts:
    return replace(
        facts,
        components=tuple(
            replace(component, layers=tuple(map(_with_choice, component.layers)))
            for component in facts.components
        ),
    )


def _with_choice(group: LayerGroup) -> LayerGroup:
    if group.head_dim is None or not group.calls:
        return group
    device = current_device()
    choice = choose(device, "bf16", group.head_dim, masked=bool(group.masks), training=False)
    return replace(group, auto=choice.kernel)


def _packs_queries(model: nn.Module) -> Known:
    try:
        enable_fa3(model, fallback="silent", pack_queries=True)
    except UnsupportedModelError as error:
        return Known(False, reason=str(error))
    return Known(True, "diffusers_fa3")


def _is_split(model: nn.Module) -> Known:
    try:
        plan = cp_plan(model)
    except FA3Error as error:
        return Known(False, reason=str(error))
    own = plan is getattr(model, "_cp_plan", None)
    return Known(True, "diffusers" if own else "diffusers_fa3")


def _why_not_switched(model: nn.Module) -> str:
    try:
        report = enable_fa3(model, fallback="silent")
    except UnsupportedModelError as error:
        return str(error)
    return "; ".join(dict.fromkeys(row.unswitchable for row in report.rows if row.unswitchable))
