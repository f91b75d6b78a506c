"""The agent's demo as an episode: guess, look at what is known, guess again (``slime_async.demo.codes``)."""

from __future__ import annotations

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.demo.codes import BEGIN, GUESSES, LENGTH, UNKNOWN, is_guess, reveal


async def generate(task: Task, policy: Policy, *, guesses: int = GUESSES, reward_per_digit: float = 0.1) -> Episode:
    """Final reward 1 for the code within ``guesses``; an answer of another form ends the game.

    On the way, a guess earns ``reward_per_digit`` for each digit that it finds; below a third, no
    lost game earns 1.
    """
    code: str = task.content
    episode = EpisodeBuilder()
    known, told = UNKNOWN * LENGTH, BEGIN
    for count in range(1, guesses + 1):
        turn = await policy.sample(episode.token_ids + task.encode(told))
        guess = task.answer_text(turn)
        if not is_guess(guess):
            episode.add(turn)
            return episode.finish(0.0, finish_reason="no_guess", metrics={"guesses": count})
        before, known = known, reveal(code, guess, known)
        kept = sum(digit == shown for digit, shown in zip(guess, before, strict=True))
        forgotten = LENGTH - before.count(UNKNOWN) - kept
        episode.add(turn, reward=reward_per_digit * (before.count(UNKNOWN) - known.count(UNKNOWN)))
        if guess == code:
            return episode.finish(1.0, finish_reason="found", metrics={"guesses": count, "forgotten": forgotten})
        told = f"{known}{BEGIN}"
    return episode.finish(0.0, finish_reason="out_of_guesses", metrics={"guesses": guesses, "forgotten": forgotten})
