"""A character-level tokenizer for sorting problems: one token per digit or sign, so answers have one spelling."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (*"0123456789+-=", PAD, EOS, UNKNOWN)
"""Token id = position. All 16 ids have a text, so no sampled token vanishes when an answer is decoded."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; characters outside the vocabulary become ``<unk>``."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
