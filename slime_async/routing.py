"""Which experts an engine used, as an optional column of trajectories (``Trajectory.extras``).

A mixture of experts samples with one choice of experts and trains with another wherever router scores nearly tie, for
the numerics of engine and learner differ; π_prox/μ is far off at such tokens. Engines that report their choice put it
here, and the learner takes the same experts, with its own router's probabilities for them.

    token_ids          [ 11  12  13 | 21  22 ]
    routed_experts     [T, layers, experts per token], −1 where nothing was recorded (the last token: nobody read it)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slime_async.trajectory import Trajectory

ROUTED_EXPERTS = "routed_experts"
NOT_RECORDED = -1

Routes = NDArray[np.int16]
"""[tokens, layers, experts per token]"""


def lay_out(records: Sequence[tuple[int, Routes]], num_tokens: int) -> Routes | None:
    """One column out of what several passes over the same ``num_tokens`` tokens recorded; None where none did.

    A record is (position after its last row, rows). The first that has a row counts: it is that of the pass which
    sampled the token, where later ones only read it again. Raises ``ValueError`` for records of several models.
    """
    if not records:
        return None
    shapes = sorted({rows.shape[1:] for _, rows in records})
    if len(shapes) != 1:
        raise ValueError(f"routed experts of shapes (layers, experts per token) {shapes}: one episode has one model")
    column = np.full((num_tokens, *shapes[0]), NOT_RECORDED, dtype=np.int16)
    for end, rows in reversed(records):
        np.copyto(column[end - len(rows) : end], rows, where=rows != NOT_RECORDED)
    return column


def routed_experts(trajectory: Trajectory) -> Routes | None:
    """The column, or None where the engine reported none. Raises ``ValueError`` where it is no such column."""
    column = trajectory.extras.get(ROUTED_EXPERTS)
    if column is None:
        return None
    if column.ndim != 3 or len(column) != len(trajectory.token_ids) or not np.issubdtype(column.dtype, np.integer):
        raise ValueError(
            f"{ROUTED_EXPERTS} is {column.dtype} {column.shape}: must be integers [{len(trajectory.token_ids)} tokens, "
            "layers, experts per token]"
        )
    return column.astype(np.int16)
