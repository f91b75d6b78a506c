"""The agent's demo as an episode: guess, look at what is left, guess again (``slime_async.demo.guessing``)."""

from __future__ import annotations

import math

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.demo.guessing import GUESSES, NUMBERS, narrow, read_guess, show


async def generate(task: Task, policy: Policy, *, guesses: int = GUESSES, reward_per_bit: float = 0.1) -> Episode:
    """Final reward 1 for the secret within ``guesses``; an answer that is no number ends the game.

    On the way, a guess earns ``reward_per_bit`` for each halving of the range; below 0.2, no lost game earns 1.
    """
    secret: int = task.content
    low, high, within = 0, NUMBERS - 1, 0
    episode = EpisodeBuilder()
    for count in range(1, guesses + 1):
        turn = await policy.sample(episode.token_ids + task.encode(show(low, high)))
        guess = read_guess(task.answer_text(turn))
        if guess is None:
            episode.add(turn)
            return episode.finish(0.0, finish_reason="not_a_number")
        within += low <= guess <= high
        if guess == secret:
            episode.add(turn)
            return episode.finish(1.0, finish_reason="found", metrics={"guesses": count, "within": within / count})
        before = high - low + 1
        low, high = narrow(low, high, secret, guess)
        episode.add(turn, reward=reward_per_bit * math.log2(before / (high - low + 1)))
    return episode.finish(0.0, finish_reason="out_of_guesses", metrics={"guesses": guesses, "within": within / guesses})
