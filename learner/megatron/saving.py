"""Writes an ordinary Hugging Face checkpoint: weights as exported, everything else as the source has it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")


def write_checkpoint(directory: Path, source: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """``dtype`` is what the weights are in now; the source's config may say another."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS) and directory != source:
            shutil.copy(path, directory)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # dtype's name before transformers 5
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    unfinished = directory / "model.safetensors.unfinished"
    save_file(dict(tensors), unfinished, metadata={"format": "pt"})
    os.replace(unfinished, directory / "model.safetensors")
