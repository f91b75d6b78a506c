"""Messages to token ids: a whole conversation by the tokenizer's chat template, or only what is new in one.

What is new after an answer is rendered behind a stand-in for that answer, in a conversation of its own, and taken from
the end of the stand-in on::

    …<|im_start|>assistant
    STAND-IN<|im_end|>
    <|im_start|>tool …                         from here on, and what closes the answer before it

So nothing that was sampled is rendered or tokenised again. Templates that treat earlier answers differently from the
last one (dropping their reasoning, say) thereby see each answer as it was when it was the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slime_async.actors.chat.messages import Message, for_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_IN = "(an answer stands here: 7f3a9c)"
"""Text that no template and no message contains"""


class ChatTemplate:
    """A tokenizer's chat template. Raises ``ValueError`` when the tokenizer has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the checkpoint's tokenizer has no chat template: add chat_template.jinja beside it, or use prompts "
                "of plain text"
            )
        self._tokenizer = tokenizer
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stop_texts = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in stop_token_ids}

    def begin(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """Token ids of a whole conversation, up to where the next answer begins."""
        return self._encode(self._render(messages, tools))

    def go_on(self, token_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """``token_ids``, which end with an answer as it was sampled, and the ids of what comes after it.

        Raises ``ValueError`` for templates that do not show an answer's text as it is.
        """
        base = [{"role": "user", "content": "."}, {"role": "assistant", "content": STAND_IN}]
        rendered = self._render([*base, *new_messages], tools)
        before, found, after = rendered.rpartition(STAND_IN)
        if not found or STAND_IN in before:
            raise ValueError("the chat template does not show each answer's text once: this endpoint cannot use it")
        if token_ids and token_ids[-1] in self._stop_token_ids:
            closing = self._stop_texts[token_ids[-1]]
            start = after.find(closing)
            after = after[start + len(closing) :] if start >= 0 else after
        return [*token_ids, *self._encode(after)]

    def _render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [for_template(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
