"""``slime-async plan``: how many devices of a cluster should generate and how many train, and with which η.

Tries splits around the balance of both sides' rates in the simulator; proposes the fastest, with the smallest η that
is nearly as fast. Rates follow from the model's size and the device's data sheet, unless a scenario has measured ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slime_async.cli.simulate import load_scenario
from slime_async.config import ConfigError
from slime_async.simulate.draws import Draws
from slime_async.simulate.rates import DEVICES, ModelSize
from slime_async.simulate.scenario import LengthModel, Scenario

SHOWN = 8
"""Candidates that are printed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", metavar="N", type=int, required=True, help="GPUs of the cluster")
    parser.add_argument(
        "--scenario", metavar="FILE", type=Path, help="a scenario with measured rates, in place of these:"
    )
    parser.add_argument("--parameters", metavar="P", type=float, help="of the model, such as 8e9")
    parser.add_argument("--active-parameters", metavar="P", type=float, help="per token, of a mixture of experts")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="[h100]")
    parser.add_argument("--groups", type=int, default=64, help="tasks per batch [64]")
    parser.add_argument("--group-size", type=int, default=8, help="answers per task [8]")
    parser.add_argument("--median-tokens", type=float, default=2000, help="of an answer [2000]")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of its length [0.9]")
    parser.add_argument("--longest-tokens", type=float, default=16384, help="[16384]")
    parser.add_argument("--prompt-tokens", type=float, default=512, help="[512]")
    parser.add_argument("--max-running", type=int, default=256, help="requests at once in one engine, at most [256]")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8], metavar="η", help="[0 1 2 4 8]")


def run(parsed: argparse.Namespace) -> int:
    from slime_async.simulate.plan import plan

    base = load_scenario(parsed.scenario) if parsed.scenario else estimated(parsed)
    try:
        best, tried = plan(base, parsed.devices, parsed.staleness)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print("   learner:actors")
    for proposal in tried[:SHOWN]:
        print(f"{'→' if proposal is best else ' '} {proposal.line()}")
    if best not in tried[:SHOWN]:
        print(f"→ {best.line()}")
    shape = best.scenario
    print(
        f"\n{shape.engines} engines of {shape.engine.devices} devices with {shape.engine.max_running} requests each, a "
        f"learner on {best.learner_devices}; staleness.max_staleness = {shape.max_staleness}"
    )
    if not parsed.scenario:
        print("Rates are estimates from data sheets: measure them with slime-async bench, and plan again.")
    return 0


def estimated(parsed: argparse.Namespace) -> Scenario:
    """A scenario from the flags alone."""
    if parsed.parameters is None:
        raise ConfigError("give --parameters (such as 8e9), or a --scenario with measured rates")
    device, size = DEVICES[parsed.device], ModelSize.of(parsed.parameters, parsed.active_parameters)
    lengths = LengthModel(median=parsed.median_tokens, sigma=parsed.sigma, longest=parsed.longest_tokens)
    context = parsed.prompt_tokens + 0.75 * Draws(lengths, 0).mean()
    engine = size.engine(device, context, parsed.max_running)
    return Scenario(
        groups=parsed.groups,
        group_size=parsed.group_size,
        slots=engine.max_running,
        engine=engine,
        learner=size.learner(device, size.learner_devices(device)),
        lengths=lengths,
        prompt_tokens=parsed.prompt_tokens,
        publish_s=0.5,
        pause_s=0.3,
    )
