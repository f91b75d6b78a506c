"""Documentation of the metrics that come in families: off-policy diagnostics, for π_prox/μ and π_θ/π_prox alike.

Most also exist by staleness, with ``/staleness_0``, ``_1``, ``_2-3``, ``_4-7`` or ``_8+`` appended.
"""

from __future__ import annotations

from slime_async.telemetry.metrics import Metric

FAR_OFF = "Grows: lower `staleness.max_staleness`, or take a preset with a tighter weight (`docs/off-policy.md`)"
MOVES_FAR = "Grows: lower `learner.learning_rate` or `learner.optimizer_steps`"


def _ratio_metrics(of: str, remedy: str) -> dict[str, Metric]:
    return {
        "ratio_mean": Metric("", f"Mean of {of} over sampled tokens, before truncation", "Away from 1: " + remedy),
        "ratio_std": Metric("", "Its standard deviation", remedy),
        "ratio_min": Metric("", "The smallest", ""),
        "ratio_max": Metric("", "The largest", "In the hundreds: engine and learner compute something different"),
        "ess": Metric("", "Effective sample size (Σr)²/(NΣr²); 1 is on-policy", "Not an alarm by itself; " + remedy),
        "k1": Metric("nats", "KL(denominator ‖ numerator) as mean(−log r)", remedy),
        "k3": Metric("nats", "The same as mean(r − 1 − log r), never below 0", remedy),
        "chi2": Metric("", "mean(r²) − 1", remedy),
        "abs_logp_diff_mean": Metric("nats", "Mean |Δ log-prob|", "0.03 is bf16 rounding; " + remedy),
        "abs_logp_diff_max": Metric("nats", "The largest |Δ log-prob|", ""),
    }


FAMILY_METRICS: dict[str, Metric] = {
    **{f"mismatch/{name}": metric for name, metric in _ratio_metrics("π_prox/μ", FAR_OFF).items()},
    "mismatch/sequence_ess": Metric("", "Effective sample size of whole sequences' product ratios", FAR_OFF),
    "mismatch/sequence_chi2": Metric("", "mean(r²) − 1 of the same", FAR_OFF),
    **{f"policy/{name}": metric for name, metric in _ratio_metrics("π_θ/π_prox", MOVES_FAR).items()},
    "policy/clip_fraction": Metric("", "Share of tokens whose gradient the clip removed", "Above 0.2: " + MOVES_FAR),
    "policy/dual_clip_fraction": Metric("", "The same for the second clip, of negative advantages", MOVES_FAR),
    "weight/mean": Metric("", "What multiplies the loss", "Far below 1: much of the batch hardly counts; " + FAR_OFF),
    "weight/std": Metric("", "Its standard deviation", FAR_OFF),
    "weight/min": Metric("", "The smallest", ""),
    "weight/max": Metric("", "The largest", ""),
    "weight/fraction_below": Metric("", "Share of ratios below `algorithm.weight_lower`", FAR_OFF),
    "weight/fraction_above": Metric("", "Share of ratios above `algorithm.weight_upper`", FAR_OFF),
    "correction/stale_fraction": Metric(
        "", "Share of tokens masked by the staleness bound", "Above 0.05: raise `staleness.max_staleness`"
    ),
    "correction/rejected_fraction": Metric("", "Share of tokens rejected by a mask", FAR_OFF),
    "correction/trained_fraction": Metric("", "Share neither stale, rejected nor of zero weight", FAR_OFF),
    "correction/rejected_sequence_fraction": Metric("", "Share of sequences with a rejected token", FAR_OFF),
    "correction/trained_sequence_fraction": Metric("", "Share of sequences with a trained token", FAR_OFF),
    "loss/advantage": Metric("", "Token mean of the advantage", ""),
    "loss/entropy": Metric(
        "nats", "Token mean of the policy's entropy", "Falls to 0 early: raise `algorithm.clip_high`"
    ),
    "router/load_balancing_loss": Metric("", "Before its coefficient; 1 is perfect balance over experts", ""),
    "router/z_loss": Metric("", "Before its coefficient: mean squared log of the routers' normalisers", ""),
    "critic/loss": Metric("", "Token mean of the value loss, before `critic.loss_coef`", ""),
    "critic/clip_fraction": Metric("", "Share of tokens whose value `critic.clip` held back", ""),
    "critic/value_mean": Metric("", "Token mean of the values before the batch", ""),
    "critic/explained_variance": Metric(
        "", "Share of the targets' variance that the values explain; 1 is perfect", "Below 0: raise `critic.gae_lambda`"
    ),
    "loss/kl": Metric("nats", "Token mean of the KL term to the reference", "Grows: raise `algorithm.kl_coef`"),
}
"""By name, without the suffix of a staleness bucket"""
