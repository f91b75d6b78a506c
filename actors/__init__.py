"""The actor role: inference engines, rollout workers, environments and rewards."""
