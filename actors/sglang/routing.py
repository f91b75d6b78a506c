"""The experts that a mixture of experts took, as SGLang reports them with the last chunk of an answer."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime_async.actors.engine import EngineError
from slime_async.routing import Routes

REMEDY = (
    "its server must run with --enable-return-routed-experts and the model of model.path; else set "
    "actor.record_routing = false"
)


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """What one token's record looks like."""

    layers: int
    per_token: int
    experts: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RoutingShape | None:
        """Of a model by its ``config.json``; None where it is no mixture of experts."""
        layers, per_token = config.get("num_hidden_layers"), config.get("num_experts_per_tok")
        experts = config.get("num_experts") or config.get("num_local_experts")
        return cls(layers, per_token, experts) if layers and per_token and experts else None

    def rows(self, meta: Mapping[str, Any], num_tokens: int) -> Routes | None:
        """The record of a finished answer: of all ``num_tokens`` of prompt and answer but the last, which nobody read.

        int32 in base64. None where a request was aborted before its record was made. Raises ``EngineError`` for any
        other answer without one, and for a record that is not this model's.
        """
        text = meta.get("routed_experts")
        if text is None:
            if meta["finish_reason"]["type"] == "abort":
                return None
            raise EngineError(f"SGLang finished an answer and reported no routed experts: {REMEDY}")
        try:
            flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
        except (TypeError, ValueError, binascii.Error) as error:
            raise EngineError(f"SGLang's routed experts are no int32 in base64 ({error}): {REMEDY}") from error
        wanted = (num_tokens - 1, self.layers, self.per_token)
        if flat.size != np.prod(wanted):
            raise EngineError(
                f"SGLang reported {flat.size} routed experts for {num_tokens} tokens: must be {wanted[0]} tokens × "
                f"{self.layers} layers × {self.per_token} experts: {REMEDY}"
            )
        if flat.size and not 0 <= flat.min() <= flat.max() < self.experts:
            raise EngineError(
                f"SGLang reported routed experts {flat.min()} … {flat.max()}: must be below {self.experts}: {REMEDY}"
            )
        return flat.reshape(wanted).astype(np.int16)
