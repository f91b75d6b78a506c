"""Which Hugging Face tensors a Megatron parameter holds, and how it is split over tensor-parallel ranks.

A *unit* is one Megatron parameter of the whole model, by a name with global layer and expert numbers. Units have one
order, whatever the layout: the order of exported tensors and of the weight manifest.

=====================  =======================================  ==========================================
fusion                 Hugging Face tensors                     rows of the whole Megatron tensor
=====================  =======================================  ==========================================
one                    x                                        x
qkv                    q_proj, k_proj, v_proj                   per key/value group: its queries, key, value
gate_up                gate_proj, up_proj                       per rank: its gate rows, its up rows
=====================  =======================================  ==========================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime_async.learner.megatron.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VALUE_HEAD = "value_head."
"""A critic's parameters, which no Hugging Face checkpoint has"""
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True, slots=True)
class Unit:
    """One parameter of the whole model."""

    name: str
    """Megatron's, global numbers"""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    fusion: Literal["one", "qkv", "gate_up"] = "one"
    split: Literal["none", "rows", "columns"] = "none"
    """Over tensor-parallel ranks"""
    layer: int | None = None
    expert: int | None = None

    @property
    def padded(self) -> bool:
        """Whether rows are padded to a multiple of the tensor-parallel size."""
        return self.name in (EMBEDDING, OUTPUT)


def units(model: Architecture) -> Iterator[Unit]:
    """All units in export order."""
    vocabulary = (model.vocab_size, model.hidden_size)
    yield Unit(EMBEDDING, ("model.embed_tokens.weight",), (vocabulary,), split="rows")
    for layer in range(model.layers):
        yield from _attention_units(model, layer)
        yield from _mlp_units(model, layer)
    yield Unit(FINAL_NORM, ("model.norm.weight",), ((model.hidden_size,),))
    if not model.tied:
        yield Unit(OUTPUT, ("lm_head.weight",), (vocabulary,), split="rows")


def _attention_units(model: Architecture, layer: int) -> Iterator[Unit]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    attention, hidden = theirs + "self_attn.", model.hidden_size
    rows = (model.heads * model.head_dim, *[model.groups * model.head_dim] * 2)
    yield Unit(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), ((hidden,),), layer=layer)
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        yield Unit(
            f"{ours}self_attention.linear_qkv.{kind}",
            tuple(f"{attention}{x}_proj.{kind}" for x in "qkv"),
            tuple((n, hidden) if kind == "weight" else (n,) for n in rows),
            "qkv",
            "rows",
            layer,
        )
    if model.qk_norm:
        for x in "qk":
            names = (f"{attention}{x}_norm.weight",)
            yield Unit(f"{ours}self_attention.{x}_layernorm.weight", names, ((model.head_dim,),), layer=layer)
    projection = (attention + "o_proj.weight",)
    yield Unit(
        ours + "self_attention.linear_proj.weight", projection, ((hidden, rows[0]),), split="columns", layer=layer
    )


def _mlp_units(model: Architecture, layer: int) -> Iterator[Unit]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, experts = model.hidden_size, model.experts
    norm = (theirs + "post_attention_layernorm.weight",)
    yield Unit(ours + "pre_mlp_layernorm.weight", norm, ((hidden,),), layer=layer)
    if experts is None:
        yield from _swiglu_units(ours + "mlp.", theirs + "mlp.", hidden, model.ffn_hidden_size, layer, None)
        return
    yield Unit(ours + "mlp.router.weight", (theirs + "mlp.gate.weight",), ((experts.count, hidden),), layer=layer)
    for i in range(experts.count):
        names = f"{ours}mlp.experts.local_experts.{i}.", f"{theirs}mlp.experts.{i}."
        yield from _swiglu_units(*names, hidden, experts.hidden_size, layer, i)


def _swiglu_units(ours: str, theirs: str, hidden: int, inner: int, layer: int, expert: int | None) -> Iterator[Unit]:
    gate_up = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    shapes = ((inner, hidden), (inner, hidden))
    yield Unit(ours + "linear_fc1.weight", gate_up, shapes, "gate_up", "rows", layer, expert)
    down = (theirs + "down_proj.weight",)
    yield Unit(ours + "linear_fc2.weight", down, ((hidden, inner),), split="columns", layer=layer, expert=expert)


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""TransformerEngine keeps a norm inside the linear layer that follows it"""


def global_name(local: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name on this rank → its unit's name; knows torch's and TransformerEngine's layer specs."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local)
    if match is None:
        return local
    rest = _FUSED_NORMS.get(match[2], match[2])
    rest = re.sub(r"experts\.(linear_fc[12])\.weight(\d+)", r"experts.local_experts.\2.\1.weight", rest)
    rest = re.sub(r"(?<=local_experts\.)\d+", lambda number: str(int(number[0]) + first_expert), rest)
    return f"decoder.layers.{int(match[1]) + first_layer}.{rest}"
