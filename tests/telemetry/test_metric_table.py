"""Every metric that the code can produce is documented, and no other."""

from __future__ import annotations

import torch

from slime_async.correction.diagnostics import STALENESS_LABELS, MetricSums
from slime_async.telemetry.families import FAMILY_METRICS
from slime_async.telemetry.metrics import FAMILIES, METRICS

OF_SOME_MODELS = ("router/", "critic/")
"""Families that the learner adds where there are experts or a critic; their tests know their names"""


def produced() -> set[str]:
    """Names of the diagnostics, as the learner gets them."""
    zero = MetricSums.zero()
    some = MetricSums(torch.ones_like(zero.sums), torch.ones_like(zero.maxima))
    return set(some.finalise())


def test_every_diagnostic_has_its_line_in_the_documentation() -> None:
    suffixes = tuple(f"/staleness_{label}" for label in STALENESS_LABELS)
    names = {name.removesuffix(next((s for s in suffixes if name.endswith(s)), "")) for name in produced()}
    assert names - METRICS.keys() - FAMILY_METRICS.keys() == set()
    assert {name for name in FAMILY_METRICS.keys() - names if not name.startswith(OF_SOME_MODELS)} == set()
    assert all(name.startswith(tuple(FAMILIES)) for name in FAMILY_METRICS)


def test_a_remedy_names_a_field_that_there_is() -> None:
    import re

    from slime_async.config.fields import fields

    keys = {field.key for field in fields()}
    for name, metric in {**METRICS, **FAMILY_METRICS}.items():
        named = re.findall(r"`([a-z_]+\.[a-z_]+)(?: =[^`]*)?`", metric.remedy)
        assert set(named) <= keys, f"{name} sends the reader to {set(named) - keys}"
