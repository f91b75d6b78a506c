"""The default episode: one prompt, one answer, one reward.

A task's content is a mapping with either

    ``prompt``     text, or token ids that are taken as they are
    ``messages``   a conversation, rendered by the tokenizer's chat template

and whatever else the reward function wants to find there.
"""

from __future__ import annotations

from collections.abc import Mapping

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task


async def generate(task: Task, policy: Policy) -> Episode:
    """Sample once and let the configured reward function judge the answer's text."""
    turn = await policy.sample(encode_prompt(task))
    episode = EpisodeBuilder()
    episode.add(turn)
    return episode.finish(await task.judge(task.answer_text(turn), turn.finish_reason))


def encode_prompt(task: Task) -> list[int]:
    """Token ids of the task's prompt. Raises ``ValueError`` when its content holds none."""
    content = task.content
    prompt = content.get("prompt") if isinstance(content, Mapping) else None
    if isinstance(prompt, str):
        return list(task.tokenizer.encode(prompt))
    if prompt is not None:
        return [int(token) for token in prompt]
    if not (isinstance(content, Mapping) and "messages" in content):
        raise ValueError(
            f"task {task.ref.index} of source {task.ref.source!r} is {content!r:.200}: the single-turn episode needs a "
            "mapping with a prompt (text or token ids) or with messages; other content needs its own task.generate"
        )
    text = task.tokenizer.apply_chat_template(content["messages"], add_generation_prompt=True, tokenize=False)
    return task.encode(str(text))
