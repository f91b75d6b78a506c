"""How far the simulator is from what was measured and published, and how long a large cluster takes it.

    python -m benchmarks.simulate [--out FILE]

Measured: every mode of the benchmarks whose results lie beside this one's. The closed form and an independent simulator
are those of ``tests/data/reference``; published tables those of ``benchmarks.published``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.published import areal, verl, vime
from slime_async.queue.prediction import predict_staleness
from slime_async.simulate.cluster import simulate
from slime_async.simulate.measured import check
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario
from slime_async.telemetry.environment import package_version

RESULTS = Path(__file__).parent / "results"
REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "reference" / "staleness_closed_form.json"
MEASURED = ("sync_async_cpu.json", "sync_async_2xh200.json", "sync_async_2xh100.json")


def measured() -> Iterator[dict[str, Any]]:
    """Every mode of every benchmark that has a result."""
    for name in MEASURED:
        path = RESULTS / name
        if not path.exists():
            continue
        for one in check(json.loads(path.read_text())):
            yield {"result": name, **one.to_plain()}


def closed_form() -> Iterator[dict[str, Any]]:
    """Mean staleness of groups without pacing, beside the closed form and the simulator that came with it.

    Beyond ρ = 1 theirs drops the oldest group from a full queue, which this queue never does: it stops granting.
    """
    for case in json.loads(REFERENCE.read_text())["cases"]:
        predicted = predict_staleness(
            slots=case["concurrency_C"],
            batch=case["batch_samples_B"],
            queue_batches=case["queue_factor_q"],
            rate_ratio=case["rho"],
            tail_factor=case["M_tail"],
        ).total
        if case["rho"] >= 1:
            continue
        ours = simulate(unpaced(case)).group_age_mean
        theirs = case["sim"]["staleness"]
        yield {
            "slots": case["concurrency_C"],
            "batch": case["batch_samples_B"],
            "rho": case["rho"],
            "ours": ours,
            "closed_form": predicted,
            "other_simulator": theirs,
            "error_against_closed_form": abs(ours - predicted) / predicted,
            "error_against_other_simulator": abs(ours - theirs) / theirs,
        }


def unpaced(case: dict[str, Any]) -> Scenario:
    """Every slot at a rate of its own, a learner whose speed is the slots' over ρ, and no bound that is ever met."""
    slots, batch, sigma = case["concurrency_C"], case["batch_samples_B"], case["lognormal_sigma"]
    mean_s = 1.0 * 2.718281828459045 ** (sigma**2 / 2)
    return Scenario(
        groups=batch // case["group_S"],
        group_size=case["group_S"],
        max_staleness=64,
        on_stale="train",
        queue_trajectories=10**9,
        slots=slots,
        engine=EngineModel(max_running=slots, step_s=((1.0, 1e-3),)),
        learner=LearnerModel(fixed_s=batch * mean_s / slots * case["rho"], token_s=1e-12),
        lengths=LengthModel(median=1000, sigma=sigma, longest=1e9),
        delivery_s=0.0,
        publish_s=0.0,
        pause_s=0.0,
        steps=240,
        warmup_steps=60,
    )


def large(gpus: int) -> Scenario:
    """An 8B model's rates on H100s, a quarter of the GPUs trains; engines die once in 200 hours each."""
    learner = gpus // 4
    return Scenario(
        name=f"{gpus} GPUs",
        groups=gpus,
        group_size=8,
        max_staleness=2,
        engines=gpus - learner,
        slots=64,
        engine=EngineModel(
            max_running=64,
            step_s=((1.0, 0.010), (16.0, 0.011), (64.0, 0.015)),
            mean_time_between_failures_s=200 * 3600.0,
        ),
        learner=LearnerModel(devices=learner, token_s=1 / (7000.0 * learner)),
        lengths=LengthModel(median=2000, sigma=0.9, longest=16_384),
        prompt_tokens=500,
        publish_s=1.0,
        pause_s=0.5,
        steps=20,
        warmup_steps=6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulate.json")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1024], help="how large; the first is the figure")
    parsed = parser.parse_args()
    sizes = []
    for gpus in parsed.gpus:
        begun, computed = time.monotonic(), time.process_time()
        outcome = simulate(large(gpus))
        seconds = {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - computed}
        sizes.append({"gpus": gpus, **seconds, **outcome.to_plain()})
        print(*outcome.lines(), f"  simulated in {sizes[-1]['seconds']:.1f} s", sep="\n", flush=True)
    modes, forms = list(measured()), list(closed_form())
    published = [*areal(), *verl(), *vime()]
    print("\n| against | what | theirs | ours | error |\n| --- | --- | --- | --- | --- |")
    for one in modes:
        row = f"{one['workload']} {one['mode']}, samples/s | {one['measured']:.4g} | {one['predicted']:.4g}"
        print(f"| measured | {row} | {one['error']:.1%} |")
    for form in forms:
        row = f"staleness, ρ {form['rho']}, C {form['slots']}, B {form['batch']} | {form['closed_form']:.3f}"
        print(f"| closed form | {row} | {form['ours']:.3f} | {form['error_against_closed_form']:.1%} |")
    for e in published:
        print(f"| {e.source} | {e.what} | {e.published:.4g} | {e.simulated:.4g} | {e.error:.1%} |")
    figures = {
        "error_against_measured": statistics.median(one["error"] for one in modes) if modes else None,
        "error_against_measured_worst": max((one["error"] for one in modes), default=None),
        "seconds_1024_gpus": next((size["seconds"] for size in sizes if size["gpus"] == 1024), None),
        "cpu_seconds_1024_gpus": next((size["cpu_seconds"] for size in sizes if size["gpus"] == 1024), None),
        "error_against_closed_form": max(form["error_against_closed_form"] for form in forms),
        "error_against_other_simulator": max(form["error_against_other_simulator"] for form in forms),
        "error_against_areal": max(e.error for e in published if e.source == "AReaL"),
        "error_against_verl": max(e.error for e in published if e.source == "verl"),
        "error_against_vime": max(e.error for e in published if e.source == "vime"),
    }
    print()
    for name, value in figures.items():
        print(f"{name}: {value}")
    result = {
        "command": " ".join(["python -m benchmarks.simulate", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"one core of {platform.machine()}",
        "versions": {"python": platform.python_version(), "numpy": package_version("numpy")},
        "figures": figures,
        "sizes": sizes,
        "measured": modes,
        "closed_form": forms,
        "published": [
            {"source": e.source, "what": e.what, "published": e.published, "simulated": e.simulated, "error": e.error}
            for e in published
        ],
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
