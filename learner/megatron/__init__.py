"""megatron-core as the learner's backend: options, model, packed batches, weights in and out."""
