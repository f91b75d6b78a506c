"""Hypothesis tries the same examples everywhere, and takes as long for each as the machine needs."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hypothesis"):  # the engines' suite runs in SGLang's environment, which has none and needs none
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "any-machine", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any-machine")
