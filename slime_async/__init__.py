"""slime_async: fully asynchronous, off-policy RL post-training of language models.

Three kinds of process, each restartable alone::

    hub      admission, staleness bound, bounded queue          slime_async.queue, slime_async.transport
    actor    environments and inference engines                 slime_async.actors
    learner  Megatron-core training, weight publishing          slime_async.learner

The modules directly below this package are the pure core: they import no role, no socket and no engine.
"""

__version__ = "0.1.0"
