"""What off-policy correction is worth, by how old the data is: the demo's task under staleness enforced exactly.

::

    warm start, once per seed ──► checkpoint ──► every cell of that seed

    a cell (η, method, seed):    queue (η + 1 batches in flight, strict order) ──► prepare_batch ──► train_policy
                                   ▲                                                                      │
                                 embedded engine ◄──────────── weights v + 1, by a weight group ──────────┘

All that is granted is generated before the next batch trains, so the batch that trains version v was sampled entirely
by version max(v − η, 0): the first η batches are younger, as in any pipeline that fills up. A cell fails if it is not.
"""
