"""Speed and memory of the learner on one GPU, against transformers on the same tokens."""
