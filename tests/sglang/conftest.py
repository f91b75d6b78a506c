from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As much of one as these tests need."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "max_position_embeddings": 64}))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path
