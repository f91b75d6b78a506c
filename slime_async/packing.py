"""Packs trajectories into microbatches under a token budget."""
