"""Checkpoints that a learner goes on from: exactly, under any layout, whatever killed the one before."""
