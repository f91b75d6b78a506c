"""This rank's chunks of the model, without weights."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.megatron.layers import block_spec
from slime_async.learner.megatron.options import Layout


class PackedGPT(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage gives hidden states: ``logprob`` makes of them what a loss needs."""

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states

    def output_matrix(self) -> Tensor:
        """[V / tp, h]; the embedding's weight where they are tied."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight


def build_chunks(
    model: Architecture, config: TransformerConfig, layout: Layout, *, recompute_elementwise: bool
) -> list[PackedGPT]:
    """One, or where pipeline stages are interleaved one per virtual stage, in the order of their layers."""
    stages = list(range(layout.virtual)) if layout.virtual > 1 else [None]
    chunks = []
    for stage in stages:
        chunk = PackedGPT(
            config=config,
            transformer_layer_spec=block_spec(config, stage, recompute_elementwise=recompute_elementwise),
            vocab_size=padded_vocabulary(model, layout),
            max_sequence_length=model.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            rope_scaling=model.rope_factor is not None,
            rope_scaling_factor=model.rope_factor or 1.0,
            share_embeddings_and_output_weights=model.tied,
            vp_stage=stage,
        )
        chunk.to(config.params_dtype).cuda()
        chunks.append(chunk)
    return chunks


def padded_vocabulary(model: Architecture, layout: Layout) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks."""
    return -(-model.vocab_size // layout.tensor) * layout.tensor
