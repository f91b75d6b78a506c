"""Off-policy metrics as sums, maxima and minima: merged over microbatches and ranks first, divided last.

Two distances are kept apart, because their cures differ: ``mismatch`` is π_prox/μ, what staleness and the engine's
numerics did before the update; ``policy`` is π_θ/π_prox, what the update itself did. Ratios here are not clamped (only
kept within e^±300, in float64): an effective sample size after clamping reads too high. All are over sampled tokens,
stale ones included, and each also by staleness. Metrics, each a key of ``MetricSums.finalise()``:

======================================  ===============================================================================
``<which>/ratio_{mean,std,min,max}``    the token's ratio, before truncation
``<which>/ess``                         (Σr)²/(NΣr²), 1 is on-policy. It alone is no alarm: one sequence may be ruined
``<which>/k1``, ``/k3``, ``/chi2``      KL(denominator ‖ numerator) as mean(−log r), mean(r − 1 − log r); mean(r²) − 1
``<which>/abs_logp_diff_{mean,max}``    |Δ log-prob|
``mismatch/sequence_ess``, ``…chi2``    of the sequences' product ratios
``weight/{mean,std,min,max}``           what multiplies the loss: after truncation and normalisation
``weight/fraction_{below,above}``       ratios outside the configured bounds
``policy/clip_fraction``, ``dual_…``    tokens whose gradient the clip removed
``correction/stale_fraction``           masked by the staleness bound
``correction/rejected_fraction``        rejected by a mask; ``rejected_sequence_fraction``: sequences with such a token
``correction/trained_fraction``         neither stale, rejected nor of zero weight; also ``…_sequence_fraction``
``loss/{advantage,entropy,kl}``         token means
======================================  ===============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction.ratios import LOG_RATIO_LIMIT, Sequences, ratio

STALENESS_EDGES = (1, 2, 4, 8)
STALENESS_LABELS = ("0", "1", "2-3", "4-7", "8+")
"""Buckets of staleness, in versions; doubling, since what differs between 8 and 9 is small"""

SUM_NAMES = (
    "tokens",
    "mismatch/r",
    "mismatch/r2",
    "mismatch/log",
    "mismatch/k3",
    "mismatch/abs",
    "policy/r",
    "policy/r2",
    "policy/log",
    "policy/k3",
    "policy/abs",
    "weight/w",
    "weight/w2",
    "weight/below",
    "weight/above",
    "policy/clipped",
    "policy/dual_clipped",
    "correction/stale",
    "correction/rejected",
    "correction/trained",
    "loss/advantage",
    "loss/entropy",
    "loss/kl",
    "sequences",
    "sequence/r",
    "sequence/r2",
    "sequence/rejected",
    "sequence/trained",
)
MAX_NAMES = (
    "mismatch/r",
    "mismatch/-r",
    "mismatch/abs",
    "policy/r",
    "policy/-r",
    "policy/abs",
    "weight/w",
    "weight/-w",
)


@dataclass(frozen=True, slots=True, eq=False)
class MetricSums:
    """Sums and maxima of one or more microbatches, in the fixed order of ``SUM_NAMES`` and ``MAX_NAMES``.

    The first column is everything, then one per staleness bucket. Every rank has the same shapes, so two all-reduces
    join the ranks: ``sums`` by SUM, ``maxima`` by MAX (minima are kept as maxima of the negated values).
    """

    sums: Tensor
    """[len(SUM_NAMES), 1 + buckets] float64"""
    maxima: Tensor
    """[len(MAX_NAMES), 1 + buckets] float64"""

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> MetricSums:
        """Of no tokens: what merging starts from."""
        columns = 1 + len(STALENESS_LABELS)
        return cls(
            torch.zeros(len(SUM_NAMES), columns, dtype=torch.float64, device=device),
            torch.full((len(MAX_NAMES), columns), -torch.inf, dtype=torch.float64, device=device),
        )

    def merge(self, other: MetricSums) -> MetricSums:
        """Both together; associative and commutative."""
        return MetricSums(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def finalise(self) -> dict[str, float]:
        """The metrics by name; a bucket's have ``/staleness_<bucket>`` appended and are absent when it is empty."""
        metrics: dict[str, float] = {}
        sums, maxima = self.sums.cpu(), self.maxima.cpu()
        for column, label in enumerate(("", *(f"/staleness_{label}" for label in STALENESS_LABELS))):
            by_sum = dict(zip(SUM_NAMES, sums[:, column].tolist(), strict=True))
            by_max = dict(zip(MAX_NAMES, maxima[:, column].tolist(), strict=True))
            if by_sum["tokens"] > 0:
                metrics |= {f"{name}{label}": value for name, value in _divide(by_sum, by_max).items()}
        return metrics


@dataclass(frozen=True, slots=True, eq=False)
class TokenDiagnostics:
    """What ``measure`` reads of one microbatch, all [T] and without gradient."""

    mask: Tensor
    """1 where sampled"""
    staleness: Tensor
    log_prox_over_behavior: Tensor
    weighted_log_ratio: Tensor
    """The log-ratio that the weight was made of, at its level"""
    weight: Tensor
    log_current_over_prox: Tensor
    fresh: Tensor
    """1 where sampled and not stale"""
    kept: Tensor
    """0 where rejected"""
    clipped: Tensor
    dual_clipped: Tensor
    advantages: Tensor
    kl: Tensor | None
    entropy: Tensor | None


@torch.no_grad()
def measure(config: AlgorithmConfig, tokens: TokenDiagnostics, sequences: Sequences) -> MetricSums:
    """Sums and maxima of one microbatch."""
    mask = tokens.mask.double()
    bucket = torch.bucketize(tokens.staleness, _edges(tokens.staleness), right=True)
    token_values, token_maxima = _token_rows(config, tokens)
    sums = [_by_bucket(value.double() * mask, bucket) for value in token_values]
    oldest = sequences.max(tokens.staleness.double().clamp(min=0), mask)
    sequence_bucket = torch.bucketize(oldest, _edges(oldest), right=True)
    sums += [_by_bucket(value, sequence_bucket) for value in _sequence_rows(tokens, sequences)]
    maxima = [_max_by_bucket(value.double().masked_fill(mask == 0, -torch.inf), bucket) for value in token_maxima]
    return MetricSums(torch.stack(sums), torch.stack(maxima))


def _edges(like: Tensor) -> Tensor:
    """Made of scalars: a list would be copied to the device, and the copy waited for."""
    return torch.stack([like.new_full((), edge) for edge in STALENESS_EDGES])


def _token_rows(config: AlgorithmConfig, tokens: TokenDiagnostics) -> tuple[list[Tensor], list[Tensor]]:
    """Columns in the order of ``SUM_NAMES`` up to the sequences', and of ``MAX_NAMES``."""
    rows, maxima = [torch.ones_like(tokens.weight)], []
    for log_ratio in (tokens.log_prox_over_behavior.double(), tokens.log_current_over_prox.double()):
        r = ratio(log_ratio, LOG_RATIO_LIMIT)
        rows += [r, r.square(), log_ratio, r - 1.0 - log_ratio, log_ratio.abs()]
        maxima += [r, -r, log_ratio.abs()]
    r = ratio(tokens.weighted_log_ratio.double(), LOG_RATIO_LIMIT)
    upper = math.inf if config.weight_upper is None or config.weight == "none" else config.weight_upper
    lower = 0.0 if config.weight == "none" else config.weight_lower
    trained = (tokens.fresh > 0) & (tokens.kept > 0) & (tokens.weight > 0)
    nothing = torch.zeros_like(tokens.weight)
    rows += [tokens.weight, tokens.weight.double().square(), r < lower, r > upper]
    rows += [tokens.clipped, tokens.dual_clipped, tokens.fresh == 0, tokens.kept == 0, trained, tokens.advantages]
    rows += [nothing if x is None else x.masked_fill(tokens.mask == 0, 0.0) for x in (tokens.entropy, tokens.kl)]
    return rows, [*maxima, tokens.weight, -tokens.weight]


def _sequence_rows(tokens: TokenDiagnostics, sequences: Sequences) -> list[Tensor]:
    """Per-sequence columns [S], in the order of the end of ``SUM_NAMES``."""
    mask = tokens.mask.double()
    present = (sequences.sum(mask) > 0).double()
    log_product = sequences.sum(tokens.log_prox_over_behavior.double() * mask)
    r = ratio(log_product, LOG_RATIO_LIMIT)
    trained = (tokens.fresh > 0) & (tokens.kept > 0) & (tokens.weight > 0)
    rejected = sequences.max((tokens.kept == 0).double(), mask)
    return [present, r * present, r.square() * present, rejected, sequences.max(trained.double(), mask)]


def _by_bucket(values: Tensor, bucket: Tensor) -> Tensor:
    by_bucket = values.new_zeros(len(STALENESS_LABELS)).index_add(0, bucket, values)
    return torch.cat([values.sum()[None], by_bucket])


def _max_by_bucket(values: Tensor, bucket: Tensor) -> Tensor:
    empty = values.new_full((len(STALENESS_LABELS),), -torch.inf)
    by_bucket = empty.scatter_reduce(0, bucket, values, "amax")
    return torch.cat([by_bucket.max()[None], by_bucket])


def _divide(sums: Mapping[str, float], maxima: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one column; it has at least one token."""
    n = sums["tokens"]
    metrics = {"tokens": n, "sequences": sums["sequences"]}
    for which in ("mismatch", "policy"):
        mean, mean_square = sums[f"{which}/r"] / n, sums[f"{which}/r2"] / n
        metrics |= {
            f"{which}/ratio_mean": mean,
            f"{which}/ratio_std": math.sqrt(max(mean_square - mean**2, 0.0)),
            f"{which}/ratio_min": -maxima[f"{which}/-r"],
            f"{which}/ratio_max": maxima[f"{which}/r"],
            f"{which}/ess": mean**2 / mean_square,
            f"{which}/k1": -sums[f"{which}/log"] / n,
            f"{which}/k3": sums[f"{which}/k3"] / n,
            f"{which}/chi2": mean_square - 1.0,
            f"{which}/abs_logp_diff_mean": sums[f"{which}/abs"] / n,
            f"{which}/abs_logp_diff_max": maxima[f"{which}/abs"],
        }
    weight_mean = sums["weight/w"] / n
    metrics |= {
        "weight/mean": weight_mean,
        "weight/std": math.sqrt(max(sums["weight/w2"] / n - weight_mean**2, 0.0)),
        "weight/min": -maxima["weight/-w"],
        "weight/max": maxima["weight/w"],
        "weight/fraction_below": sums["weight/below"] / n,
        "weight/fraction_above": sums["weight/above"] / n,
        "policy/clip_fraction": sums["policy/clipped"] / n,
        "policy/dual_clip_fraction": sums["policy/dual_clipped"] / n,
        **{f"correction/{what}_fraction": sums[f"correction/{what}"] / n for what in ("stale", "rejected", "trained")},
        **{f"loss/{what}": sums[f"loss/{what}"] / n for what in ("advantage", "entropy", "kl")},
    }
    if sums["sequences"] > 0:
        metrics |= _divide_sequences(sums)
    return metrics


def _divide_sequences(sums: Mapping[str, float]) -> dict[str, float]:
    n = sums["sequences"]
    mean, mean_square = sums["sequence/r"] / n, sums["sequence/r2"] / n
    return {
        "mismatch/sequence_ess": mean**2 / mean_square,
        "mismatch/sequence_chi2": mean_square - 1.0,
        "correction/rejected_sequence_fraction": sums["sequence/rejected"] / n,
        "correction/trained_sequence_fraction": sums["sequence/trained"] / n,
    }
