"""The agent's demo as an episode: guess, listen, guess again (``slime_async.demo.guessing``)."""

from __future__ import annotations

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.demo.guessing import BEGIN, GUESSES, hint, read_guess


async def generate(task: Task, policy: Policy, *, guesses: int = GUESSES) -> Episode:
    """Reward 1 for the secret within ``guesses``; an answer that is no number ends the game."""
    secret: int = task.content
    episode = EpisodeBuilder()
    prompt = task.encode(BEGIN)
    for count in range(1, guesses + 1):
        turn = await policy.sample(prompt)
        episode.add(turn)
        guess = read_guess(task.answer_text(turn))
        if guess == secret:
            return episode.finish(1.0, finish_reason="found", metrics={"guesses": count})
        if guess is None:
            return episode.finish(0.0, finish_reason="not_a_number", metrics={"guesses": count})
        prompt = episode.token_ids + task.encode(hint(secret, guess))
    return episode.finish(0.0, finish_reason="out_of_guesses", metrics={"guesses": guesses})
