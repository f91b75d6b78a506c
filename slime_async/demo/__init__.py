"""The demo: a number-sorting task, a tokenizer and a model small enough that one CPU core trains it in minutes.

``examples/demo.toml`` names what is in here; nothing else in the package depends on it.
"""
