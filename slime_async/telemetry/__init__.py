"""What a run records about itself: metrics, spans, and the summary computed from them."""
