"""Environments that need no download: each is one file, to be used as it is or read as an example."""
