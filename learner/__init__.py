"""The learner role: Megatron model, Hugging Face weights, the training loop, publishing and checkpoints."""
