"""Benchmarks: each a module that prints a table and, with --out, writes JSON."""
