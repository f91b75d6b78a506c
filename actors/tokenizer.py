"""A checkpoint's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; never from the network."""
    from transformers import AutoTokenizer  # seconds to import: only the processes that tokenize pay for it

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(checkpoint, local_files_only=True))


def stop_token_ids(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end of sequence and those of ``generation_config.json``, ascending.

    Raises ``ValueError`` when there is none, because every answer would then run to its length limit.
    """
    path = checkpoint / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    candidates = [*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id]
    ids = {int(token) for token in candidates if token is not None}
    if not ids:
        raise ValueError(
            f"{checkpoint} names no end-of-sequence token: set eos_token in its tokenizer_config.json, or eos_token_id "
            "in generation_config.json"
        )
    return tuple(sorted(ids))
