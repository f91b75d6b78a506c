"""The report's charts, section by section. With several runs, each chart has a line per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slime_async.report.charts import Chart, Series, bars, draw
from slime_async.report.run import Points, RunData

MINUTES = "minutes of RL"
Metric = tuple[str, str]
"""(name in metrics.jsonl, words)"""


def learning(runs: Sequence[RunData]) -> str:
    return _draw(
        _per_run(runs, "Reward over steps", "step", lambda run: run.by_step("reward_mean"), note="Mean of each batch"),
        _per_run(runs, "Reward over time", MINUTES, lambda run: run.by_time("reward_mean")),
        _per_run(runs, "Accuracy over steps", "weight version", RunData.accuracy_by_step, note=HELD_OUT, share=True),
        _per_run(runs, "Accuracy over time", MINUTES, RunData.accuracy_by_time, note=HELD_OUT, share=True),
        _per_run(runs, "Entropy", "step", lambda run: run.by_step("loss/entropy"), note="Nats per sampled token"),
        _per_run(runs, "Gradient norm", "step", lambda run: run.by_step("grad_norm"), note="Before clipping"),
    )


HELD_OUT = "Held-out tasks, by evaluation"


def staleness(runs: Sequence[RunData]) -> str:
    histograms = [run.staleness_histogram() for run in runs]
    ages = sorted({age for histogram in histograms for age in histogram})
    groups = [(str(age), [histogram.get(age, 0.0) for histogram in histograms]) for age in ages]
    bounds = {run.summary.staleness_bound for run in runs if run.summary.staleness_bound is not None}
    named = [(float(bound), f"bound {bound}") for bound in sorted(bounds)]
    mean: Metric = ("staleness_mean", "mean")
    return bars(
        "Staleness", "Share of all sampled tokens by age in versions", groups, [run.label for run in runs]
    ) + _draw(
        _several(runs, "Staleness over steps", [mean, ("staleness_max", "largest")], bounds=named, zero=True),
        _per_run(runs, "Tokens masked as stale", "step", lambda run: run.by_step("tokens_masked_as_stale"), zero=True),
    )


def ratios(runs: Sequence[RunData]) -> str:
    extremes = [("mismatch/ratio_max", "largest"), ("mismatch/ratio_mean", "mean"), ("mismatch/ratio_min", "smallest")]
    moved = [("policy/ratio_max", "largest"), ("policy/ratio_mean", "mean"), ("policy/ratio_min", "smallest")]
    ess = [("mismatch/ess", "tokens"), ("mismatch/sequence_ess", "sequences")]
    weights = [("weight/max", "largest"), ("weight/mean", "mean"), ("weight/min", "smallest")]
    return _draw(
        _several(runs, "π_prox/μ", extremes, log=True, note="Before the update; unclamped, over sampled tokens"),
        _several(runs, "Effective sample size of π_prox/μ", ess, unit_interval=True, note="1 is on-policy"),
        _several(runs, "π_θ/π_prox", moved, log=True, note="What the update itself did"),
        _several(runs, "Importance weights", weights, zero=True, note="After truncation"),
        _several(runs, "KL(μ ‖ π_prox)", [("mismatch/k3", "k3")], zero=True, note="Nats per token"),
        _several(runs, "Clipped tokens", [("policy/clip_fraction", "")], zero=True, note="Share without a gradient"),
    )


def queue(runs: Sequence[RunData]) -> str:
    held = _over_time(runs, "Queue depth", [("held", "held"), ("held_limit", "bound")], note="Trajectories at the hub")
    paced = _over_time(runs, "Pacing", [("pacing", "under way"), ("pacing_limit", "bound")], note="(η + 1) · B")
    return _draw(held, paced, _over_time(runs, "Running", [("running", "")], note="Trajectories being generated"))


def weights(runs: Sequence[RunData]) -> str:
    times = [("publish_s", "whole"), ("pause_to_resume_s", "engines paused"), ("broadcast_s", "broadcast")]
    in_flight = [("requests_in_flight_at_update", "")]
    return _draw(
        _several(runs, "Weight sync", times, zero=True, note="Seconds per publication"),
        _several(runs, "Learner stalled by publishing", [("publish_stall_s", "")], zero=True, note="Seconds per step"),
        _several(runs, "Requests in flight at the update", in_flight, zero=True),
    )


def speed(runs: Sequence[RunData]) -> str:
    times = [("step_s", "step"), ("lease_wait_s", "waiting for the batch"), ("train_s", "training")]
    return _draw(
        _several(runs, "Time of a step", times, zero=True, note="Seconds"),
        _per_run(
            runs, "Sampled tokens per second", MINUTES, _sampled_per_s, zero=True, note="Trained, over whole steps"
        ),
        _several(runs, "Learner's speed", [("learner_tokens_per_s", "")], zero=True, note="Tokens/s while it trains"),
    )


def lengths(runs: Sequence[RunData]) -> str:
    means = [("length_generated_mean", "generated"), ("length_trained_mean", "trained")]
    return _draw(
        _over_time(
            runs, "Lengths trained against generated", means, note="Sampled tokens, mean over the last thousands"
        ),
        _over_time(runs, "Distance of the two", [("length_distance", "")], note="Kolmogorov–Smirnov, 0 is the same"),
        _several(runs, "Answer length", [("answer_tokens_mean", "")], zero=True, note="Sampled tokens per trajectory"),
    )


def _sampled_per_s(run: RunData) -> Points:
    seconds = dict(run.by_step("step_s"))
    rates = [(step, tokens / seconds[step]) for step, tokens in run.by_step("sampled_tokens") if seconds.get(step)]
    minutes = dict(zip((step for step, _ in run.by_step("step_s")), (x for x, _ in run.by_time("step_s")), strict=True))
    return [(minutes[step], rate) for step, rate in rates]


def _per_run(
    runs: Sequence[RunData],
    title: str,
    x_label: str,
    points: Callable[[RunData], Points],
    *,
    note: str = "",
    share: bool = False,
    zero: bool = False,
) -> Chart:
    """One line per run; of shares, which are few, single measurements between 0 and 1."""
    names = [run.label if len(runs) > 1 else "" for run in runs]
    series = [Series(name, points(run), i, dots=share) for i, (name, run) in enumerate(zip(names, runs, strict=True))]
    return Chart(title, x_label, series, note, zero=zero, unit_interval=share)


def _several(
    runs: Sequence[RunData],
    title: str,
    metrics: Sequence[Metric],
    *,
    note: str = "",
    bounds: Sequence[tuple[float, str]] = (),
    zero: bool = False,
    log: bool = False,
    unit_interval: bool = False,
) -> Chart:
    """Several metrics of the steps; of several runs each has its colour, and the first metric the whole line."""
    series = _series(runs, metrics, RunData.by_step)
    return Chart(title, "step", series, note, bounds, zero=zero, log=log, unit_interval=unit_interval)


def _over_time(runs: Sequence[RunData], title: str, columns: Sequence[Metric], *, note: str) -> Chart:
    return Chart(title, MINUTES, _series(runs, columns, RunData.queue_by_time), note, zero=True)


def _series(runs: Sequence[RunData], names: Sequence[Metric], points: Callable[[RunData, str], Points]) -> list[Series]:
    several = len(runs) > 1
    return [
        Series(
            f"{run.label} {words}".strip() if several else words,
            points(run, name),
            colour=i if several else j,
            dashed=several and j > 0,
        )
        for i, run in enumerate(runs)
        for j, (name, words) in enumerate(names)
    ]


def _draw(*charts: Chart) -> str:
    return "".join(draw(chart) for chart in charts)
