"""Gymnasium's toy text games as conversations: FrozenLake, Taxi, CliffWalking, Blackjack.

    [task]
    generate = "slime_async.actors.environments.gym_text:generate"

    [task.train.lakes]
    factory = "slime_async.actors.environments.gym_text:source"
    arguments = { game = "FrozenLake-v1", seed = 0, options = { is_slippery = false }, random_map = 4 }

The game runs in a worker process, as a game that is slow or crashes would have to; these could as well run in the
actor. Each turn shows the board and the policy names a move, as the last known word of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slime_async.actors.environment import Episode, Policy, Task
from slime_async.actors.environments.dialogue import Dialogue

MOVES: dict[str, tuple[str, ...]] = {
    "FrozenLake-v1": ("left", "down", "right", "up"),
    "CliffWalking-v1": ("up", "right", "down", "left"),
    "Taxi-v3": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Taxi-v4": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack-v1": ("stick", "hit"),
}
"""The words for each game's actions 0, 1, …"""
RULES: dict[str, str] = {
    "FrozenLake-v1": "Walk from S to G over frozen cells F; a hole H ends the game. [ ] marks where you are.",
    "CliffWalking-v1": "Walk from the lower left to T; C is a cliff. x marks where you are.",
    "Taxi-v3": "Pick the passenger up and drop them off where they want to go.",
    "Taxi-v4": "Pick the passenger up and drop them off where they want to go.",
    "Blackjack-v1": "Come closer to 21 than the dealer without going beyond it.",
}
HIGHLIGHT = re.compile(r"\x1b\[[0-9;]*m(.)\x1b\[0m")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Game:
    """One game, in plain data only, so that it can live in another process."""

    def __init__(self, game: str, seed: int, options: Mapping[str, Any], random_map: int) -> None:
        import gymnasium

        arguments = dict(options)
        if random_map:
            from gymnasium.envs.toy_text.frozen_lake import generate_random_map

            arguments["desc"] = generate_random_map(size=random_map, seed=seed)
        shows = game != "Blackjack-v1"
        self._env: Any = gymnasium.make(game, render_mode="ansi" if shows else None, **arguments)
        self._shows = shows
        self._observation, _ = self._env.reset(seed=seed)

    def board(self) -> str:
        """What the player sees."""
        if not self._shows:
            player, dealer, ace = self._observation
            return f"You hold {player}{' with a usable ace' if ace else ''}, the dealer shows {dealer}."
        text = COLOUR.sub("", HIGHLIGHT.sub(r"[\1]", self._env.render()))
        return "\n".join(line for line in text.splitlines() if line.strip() and not line.strip().startswith("("))

    def step(self, action: int) -> dict[str, Any]:
        """``reward``, ``done`` and the new ``board``."""
        self._observation, reward, terminated, truncated, _ = self._env.step(action)
        return {"reward": float(reward), "done": bool(terminated or truncated), "board": self.board()}

    def close(self) -> None:
        self._env.close()


class GameTasks:
    """A sequence of games that differ by their seeds."""

    def __init__(self, game: str, seed: int, size: int, options: Mapping[str, Any], random_map: int) -> None:
        if game not in MOVES:
            raise ValueError(f"game = {game!r}: known are {', '.join(MOVES)}")
        if random_map and not game.startswith("FrozenLake"):
            raise ValueError(f"random_map = {random_map}: only FrozenLake has maps")
        self._fields = {"game": game, "options": dict(options), "random_map": random_map}
        self._first = seed * 1_000_003
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        return {**self._fields, "seed": self._first + index}


def source(
    *,
    game: str,
    seed: int = 0,
    size: int = 1_000,
    options: Mapping[str, Any] | None = None,
    random_map: int = 0,
) -> GameTasks:
    """``options`` go to ``gymnasium.make``; ``random_map`` is the side of FrozenLake's maps, 0 takes the usual one."""
    return GameTasks(game, seed, size, options or {}, random_map)


async def generate(task: Task, policy: Policy, *, max_turns: int = 20, invalid_penalty: float = 0.0) -> Episode:
    """Rewards are the game's own, per turn; an answer without a move costs ``invalid_penalty`` and ends the game."""
    content = task.content
    moves = MOVES[content["game"]]
    words = re.compile(rf"\b({'|'.join(moves)})\b", re.IGNORECASE)
    system = f"{RULES[content['game']]} Answer with one of: {', '.join(moves)}."
    dialogue = Dialogue(task, policy, system)
    arguments = (content["game"], content["seed"], content["options"], content["random_map"])
    async with task.workers.open(Game, *arguments) as game:
        board = await game.call("board")
        for turn in range(1, max_turns + 1):
            found = words.findall(await dialogue.ask(f"{board}\n"))
            if not found:
                dialogue.reward(-invalid_penalty)
                return dialogue.finish(finish_reason="no_move", metrics={"turns": turn})
            result = await game.call("step", moves.index(found[-1].lower()))
            board = result["board"]
            dialogue.reward(result["reward"])
            if result["done"]:
                return dialogue.finish(finish_reason="game_over", metrics={"turns": turn})
    return dialogue.finish(finish_reason="out_of_turns", metrics={"turns": max_turns})
