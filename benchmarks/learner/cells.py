"""What is measured, in the order of importance: a run that ends early has measured the best it could."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LARGE_MEMORY_GB = 120.0
"""From here on 4B trains without recomputation"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One process's measurement."""

    trainer: Literal["slime_async", "transformers"]
    shape: str
    sequence: int
    """Tokens of each sequence; 0 is a mixture from 1k to 8k"""
    microbatch_tokens: int
    recompute: Literal["none", "selective", "full"] = "none"
    """Selective: norms and SwiGLU again in the backward pass; full: everything within a layer, from its input"""
    keep_logits: bool = False
    attention: Literal["sdpa", "varlen"] = "sdpa"
    """Of transformers: rows of equal length, or packed in one row with torch's varlen_attn plugged in"""
    profile: bool = False

    @property
    def name(self) -> str:
        extras = [self.recompute] * (self.recompute != "none") + ["logits kept"] * self.keep_logits
        if self.trainer == "transformers":
            extras.append(self.attention)
        sequence = str(self.sequence) if self.sequence else "1k-8k"
        return " ".join([self.trainer, self.shape, sequence, f"mb{self.microbatch_tokens}", *extras])


def ours(shape: str, sequence: int, microbatch: int, **options: object) -> Cell:
    return Cell("slime_async", shape, sequence, microbatch, **options)  # type: ignore[arg-type]


def theirs(shape: str, sequence: int, microbatch: int, **options: object) -> Cell:
    return Cell("transformers", shape, sequence, microbatch, **options)  # type: ignore[arg-type]


def plan(shapes: list[str], memory_gb: float, tokens: int) -> list[Cell]:
    """Cells of these shapes for a GPU with this much memory, steps of ``tokens``."""
    if shapes == ["tiny"]:
        return tiny(tokens)
    large = memory_gb >= LARGE_MEMORY_GB
    cells = (
        [
            ours("4b", 2048, 8192, profile=True),
            theirs("4b", 2048, 8192),
            ours("4b", 2048, 16384, recompute="selective"),
            ours("4b", 2048, 8192, keep_logits=True),
            ours("4b", 2048, 16384, recompute="selective", keep_logits=True),
            theirs("4b", 2048, 4096),
            theirs("4b", 2048, 8192, attention="varlen"),
            ours("4b", 2048, 16384, recompute="full"),
        ]
        if large
        else [
            ours("4b", 2048, 8192, recompute="full", profile=True),
            theirs("4b", 2048, 8192, recompute="full"),
            theirs("4b", 2048, 2048),
            ours("4b", 2048, 16384, recompute="full"),
        ]
    )
    cells += [
        ours("1.7b", 2048, 16384 if large else 8192, profile=True),
        theirs("1.7b", 2048, 16384 if large else 8192),
        ours("0.6b", 2048, 16384),
        theirs("0.6b", 2048, 16384 if large else 8192),
    ]
    most = ("none", 8192) if large else ("full", 8192)
    cells += [ours("4b", n, most[1], recompute=most[0]) for n in (0, 8192, 1024, 4096)]
    cells += [
        theirs("4b", 0, 8192, attention="varlen", recompute="none" if large else "full"),
        theirs("1.7b", 2048, 8192 if large else 4096),
        theirs("0.6b", 2048, 32768 if large else 16384),
        ours("1.7b", 2048, 16384, recompute="selective"),
        ours("1.7b", 2048, 16384, recompute="full"),
        ours("1.7b", 2048, 32768 if large else 4096),
        ours("1.7b", 0, 16384 if large else 8192),
        ours("1.7b", 8192, 16384 if large else 8192),
        ours("0.6b", 2048, 32768),
        ours("0.6b", 0, 16384),
        ours("0.6b", 2048, 8192),
    ]
    return [cell for cell in dict.fromkeys(cells) if cell.shape in shapes]


def tiny(tokens: int) -> list[Cell]:
    """Every kind of cell, for a rehearsal."""
    s, mb = tokens // 16, tokens // 4
    return [
        ours("tiny", s, mb, profile=True),
        theirs("tiny", s, mb),
        theirs("tiny", 0, mb, attention="varlen"),
        ours("tiny", 0, mb, recompute="full"),
        ours("tiny", s, mb, recompute="selective"),
        ours("tiny", s, mb, keep_logits=True),
        theirs("tiny", s, mb, recompute="full"),
    ]
