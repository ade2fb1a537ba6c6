"""The schemas of the real FlashAttention-3 ops, with a CPU implementation that records its calls.

The recording shows which value came in which argument. The implementation calls the reference, so
that results can be compared too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from by_name import by_name

from diffusers_fa3.kernels.providers import reference

UPSTREAM = (
    "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
SGL = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, {out}, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, "
    "Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float? softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
    "int attention_chunk, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, "
    "int num_splits, bool? pack_gqa, int sm_margin, {rest}"
)
VLLM = (
    "(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, "
    "Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
    "float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, "
    "bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, "
    "Tensor? cp_tot_seqused_k) -> Tensor[]"
)
SCHEMAS = {
    "upstream": UPSTREAM,
    "tokenspeed": UPSTREAM.replace("sm_margin=0)", "sm_margin=0, Tensor? sinks=None)"),
    "fa3_fwd": UPSTREAM,
    "sgl_0_3_21": SGL.format(
        out="Tensor? out", rest="Tensor? sinks) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "sgl_0_4_10": SGL.format(
        out="Tensor(a!)? out",
        rest="Tensor? sinks, Tensor? sparse_mask_fine, bool only_qv) "
        "-> (Tensor(a!), Tensor, Tensor, Tensor)",
    ),
    "vllm": VLLM,
    "hub_vllm": UPSTREAM.replace("float? softmax_scale=None", "float softmax_scale=0.0")
    .replace("int attention_chunk=0, ", "")
    .replace("sm_margin=0)", "sm_margin=0, Tensor? s_aux=None)"),
}


@dataclass
class RecordingOp:
    """One registered op and what it was called with."""

    op: Any
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        return self.calls[-1]


_libraries = []


def register(name: str, schema: str) -> RecordingOp:
    """Register `torch.ops.fa3_test_<name>.fwd` with this schema."""
    namespace = f"fa3_test_{name}"
    library = torch.library.Library(namespace, "DEF")
    library.define("fwd" + schema)
    _libraries.append(library)
    recording = RecordingOp(getattr(torch.ops, namespace).fwd)
    arguments = recording.op.default._schema.arguments

    def fwd(*args: Any, **kwargs: Any) -> Any:
        got = {a.name: a.default_value for a in arguments}
        got |= dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        recording.calls.append(got)
        return list(attend(got)) if "Tensor[]" in schema else attend(got)

    library.impl("fwd", fwd, "CPU")
    return recording


def attend(got: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    if got["k_new"] is not None:
        out, lse = got["out"], None
        out = torch.zeros_like(got["q"]) if out is None else out.zero_()
        return out, torch.zeros(1), torch.empty(0), torch.empty(0)
    out, lse = by_name(reference.forward)(
        got["q"],
        got["k"],
        got["v"],
        softmax_scale=got["softmax_scale"],
        cu_seqlens_q=got["cu_seqlens_q"],
        cu_seqlens_k=got["cu_seqlens_k"],
        seqused_k=got["seqused_k"],
        causal=got["is_causal"],
        window=(got["window_size_left"], got["window_size_right"]),
        softcap=got["softcap"],
        out=got["out"],
        return_lse=True,
    )
    return out, lse, torch.empty(0), torch.empty(0)


OPS = {name: register(name, schema) for name, schema in SCHEMAS.items()}
