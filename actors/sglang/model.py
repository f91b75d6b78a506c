"""What must be known of a checkpoint before its server is asked anything: SGLang dies of some wrong questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_async.actors.embedded.checkpoint import read_shapes
from slime_async.actors.sglang.routing import RoutingShape
from slime_async.protocol import WeightManifest

HEAD = "lm_head.weight"
"""Tied models may or may not list it"""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of a Hugging Face checkpoint directory."""

    checkpoint: Path
    vocab_size: int
    max_positions: int
    routing: RoutingShape | None
    """None where the model is no mixture of experts"""

    @classmethod
    def read(cls, checkpoint: Path) -> ModelFacts:
        """Raises ``ValueError`` for a directory without a usable ``config.json``."""
        path = checkpoint / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: SGLang needs a Hugging Face checkpoint directory")
        raw: dict[str, Any] = json.loads(path.read_text())
        text: dict[str, Any] = raw.get("text_config") or raw  # models that also see keep their decoder's there
        for key in ("vocab_size", "max_position_embeddings"):
            if not isinstance(text.get(key), int):
                raise ValueError(f"{path} has no {key}: is it a decoder's?")
        return cls(checkpoint, text["vocab_size"], text["max_position_embeddings"], RoutingShape.of(text))

    def check_manifest(self, manifest: WeightManifest) -> None:
        """Raises ``ValueError`` with the name of the first tensor that is missing, unknown or of another shape.

        SGLang would notice in the middle of loading, with half of the weights replaced.
        """
        wanted = read_shapes(self.checkpoint)
        sent = {tensor.name: tuple(tensor.shape) for tensor in manifest.tensors}
        for name, shape in sent.items():
            if name not in wanted and name != HEAD:
                raise ValueError(f"tensor {name!r} of the broadcast is not in {self.checkpoint}: another model?")
            if shape != wanted.get(name, shape):
                raise ValueError(f"tensor {name!r} has shape {shape} in the broadcast, {wanted[name]} here")
        if missing := sorted(wanted.keys() - sent.keys() - {HEAD}):
            raise ValueError(f"{len(missing)} tensors are missing from the broadcast, {missing[0]!r} among them")
