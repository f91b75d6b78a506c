"""The demos: tasks, tokenizers and models small enough that one CPU core trains them in minutes.

``examples/demo.toml`` (sorting, one turn) and ``examples/agent.toml`` (codes, several turns) name what is in here, and
``--dry-run`` takes its stand-in for a pretrained chat model from ``chat``. Nothing else in the package depends on it.
"""
