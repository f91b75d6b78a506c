"""What a run leaves behind: metrics per step, events, spans of busy time, and their summary."""
