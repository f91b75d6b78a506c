"""The embedded engine: a decoder in plain torch with continuous batching, for CPUs, single GPUs, laptops and tests.

::

    event loop                         decode thread
    EmbeddedEngine.generate ──inbox──► Scheduler: admit → prefill → decode one token for all → finish
    pause, resume, abort   ──────────► between two steps
    receive_weights ─(own thread)────► copied in between two steps

=================  ======================================================================
``checkpoint.py``  reads ``config.json`` and safetensors; says what is refused
``decoder.py``     the model: fused weights, KV cache, prefill and decode
``sampling.py``    counter-based uniforms, temperature, top-k, top-p, inverse CDF
``slots.py``       the columns of the running requests, one row per cache slot
``scheduler.py``   what runs when: a plain object, stepped by one thread
``engine.py``      ``Engine`` for the event loop; owns the thread and the weight group
=================  ======================================================================

There is no prefix cache: every request computes its own prompt, so keys and values of older weights are never reused
by a newer request.
"""

from slime_async.actors.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
