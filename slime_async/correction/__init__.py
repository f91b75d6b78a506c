"""Weights, masks, objectives and advantages: off-policy correction as pure torch functions."""
