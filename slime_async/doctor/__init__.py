"""What on this machine will not work, found before a run does; ``slime-async doctor`` shows it."""
