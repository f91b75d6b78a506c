"""Estimators of KL(π_θ ‖ π_ref) from sampled tokens, as a term of the loss."""

from __future__ import annotations

from torch import Tensor

from slime_async.config.algorithm import KLForm
from slime_async.correction.ratios import log_ratio, ratio


def reference_kl(
    form: KLForm, current_logprobs: Tensor, ref_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """The KL estimate of each token [T], with gradient; 0 outside ``mask``. d = log π_θ − log π_ref:

    =========  ======================  =================================================================================
    form       estimate                on samples of π_θ itself
    =========  ======================  =================================================================================
    k1         d                       unbiased; the expected gradient is 0, so it penalises nothing as a loss term
    k2         d²/2                    biased in value; its gradient is the KL's
    k3         e^−d − 1 + d            unbiased, ≥ 0; its gradient is that of KL(π_ref ‖ π_θ)
    unbiased   (π_θ/μ)·(e^−d − 1 + d)  value and gradient are the KL's, on samples of μ; the ratio carries gradient
    =========  ======================  =================================================================================

    Sources: http://joschu.net/blog/kl-approx.html, arXiv 2402.03300 (k3 in GRPO), DeepSeek-V3.2 arXiv 2512.02556
    (unbiased).
    """
    d = log_ratio(current_logprobs, ref_logprobs, mask)
    if form == "k1":
        return d
    if form == "k2":
        return d.square() / 2
    k3 = ratio(-d) - 1.0 + d
    if form == "k3":
        return k3
    return ratio(log_ratio(current_logprobs, behavior_logprobs, mask)) * k3
