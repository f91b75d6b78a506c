"""How new weights get into one SGLang server: group membership, update sessions, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime_async.actors.engine import EngineError
from slime_async.actors.sglang.client import EngineRefused, SGLangClient
from slime_async.actors.sglang.loader import LOADER, LoadOrder
from slime_async.actors.sglang.versions import Features
from slime_async.protocol import SharedTensor, WeightGroupSpec, WeightManifest
from slime_async.transport.shared_tensors import reduction
from slime_async.transport.weight_layout import consecutive_parts, shares_of

log = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 30.0
"""For calls that the server answers between two steps"""
LEAVE_TIMEOUT_S = 5.0
"""For leaving a group that may be broken"""


OPEN_TIMEOUT_S = 120.0
"""For copying weights out of shared memory, on the CPU too"""


class ServerStuck(EngineError):
    """The server went into a collective and did not come back: only its end frees it."""


class WeightUpdates:
    """The weight groups of one server. One call at a time."""

    def __init__(self, client: SGLangClient, features: Features, name: str, *, call_bytes: int, ranks: int) -> None:
        """Of a server of ``ranks`` tensor-parallel ranks.

        ``call_bytes``: of weights that come tensor by tensor, at most so much in one call, all of which it holds.
        """
        self._client = client
        self._call_bytes = call_bytes
        self._ranks = ranks
        self._failures = Path(tempfile.gettempdir()) / f"slime-async-{uuid.uuid4().hex}"
        """Where our loader in the server says what went wrong"""
        self._features = features
        self._name = name
        self._groups: list[str] = []
        self._timeout_s = 0.0

    async def join(self, specs: Sequence[WeightGroupSpec], rank_offset: int) -> None:
        """Returns when all have joined. Raises ``EngineRefused``, or ``ServerStuck`` at a group's deadline."""
        await self.leave()
        for spec in specs:
            body = {
                "master_address": spec.master_address,
                "master_port": spec.master_port,
                "rank_offset": rank_offset,
                "world_size": spec.world_size,
                "group_name": spec.name,
                "backend": spec.backend,
            }
            await self._collective("/init_weights_update_group", body, spec.timeout_s)
            self._groups.append(spec.name)
            self._timeout_s = spec.timeout_s

    async def leave(self) -> None:
        """Leave the groups the server is in. A server that cannot will not join others in time, either."""
        groups, self._groups = self._groups, []
        for group in groups:
            try:
                await self._client.post("/destroy_weights_update_group", {"group_name": group}, LEAVE_TIMEOUT_S)
            except EngineError as error:
                log.warning("%s could not leave weight group %s: %s", self._name, group, error)

    async def broadcast(self, manifest: WeightManifest, shares: Sequence[int], label: str, *, flush: bool) -> None:
        """Take part in one collective per tensor in the manifest's order, group after group.

        Raises ``EngineError`` outside a group; ``EngineRefused`` where the server has taken nothing or half of it and
        lives; ``ServerStuck`` where it does not return.
        """
        bodies = [
            {
                "names": [tensor.name for tensor in part],
                "dtypes": [tensor.dtype for tensor in part],
                "shapes": [list(tensor.shape) for tensor in part],
                "group_name": group,
            }
            for group, share in zip(self._groups, self._parts(manifest, shares), strict=True)
            for part in consecutive_parts(share, self._call_bytes)
        ]
        await self._update("/update_weights_from_distributed", bodies, label, flush=flush, timeout_s=self._timeout_s)

    async def broadcast_buffers(
        self, manifest: WeightManifest, shares: Sequence[int], buffer_bytes: int, label: str, *, flush: bool
    ) -> None:
        """As ``broadcast``, one collective per buffer, by our own loader in the server."""
        parts = tuple(self._parts(manifest, shares))
        order = LoadOrder(tuple(self._groups), parts, buffer_bytes, str(self._failures))
        body = {"serialized_named_tensors": [order.payload()] * self._ranks, "load_format": LOADER}
        order.take_failures()  # of a call that was given up
        await self._update("/update_weights_from_tensor", [body], label, flush=flush, timeout_s=self._timeout_s)
        if failures := order.take_failures():
            raise EngineRefused(f"{self._name}: weights were not received whole: {'; '.join(failures)}")

    def _parts(self, manifest: WeightManifest, shares: Sequence[int]) -> list[WeightManifest]:
        if not self._groups:
            raise EngineError(f"{self._name} is in no weight group: join one before receiving weights")
        return shares_of(manifest, shares, len(self._groups))

    async def open_shared(
        self, manifest: WeightManifest, shared: Sequence[SharedTensor], label: str, *, flush: bool
    ) -> None:
        """Take tensors out of memory that the learner shares with this machine's processes.

        SGLang wants them as torch pickles them between processes: a list of (name, tensor), in base64.
        """
        named = [(spec.name, reduction(spec, tensor)) for spec, tensor in zip(manifest.tensors, shared, strict=True)]
        text = base64.b64encode(pickle.dumps(named)).decode()
        bodies: list[dict[str, Any]] = [{"serialized_named_tensors": [text]}]
        await self._update("/update_weights_from_tensor", bodies, label, flush=flush, timeout_s=OPEN_TIMEOUT_S)

    async def _update(
        self, path: str, bodies: Sequence[dict[str, Any]], label: str, *, flush: bool, timeout_s: float
    ) -> None:
        """One call for each body; with the last, the new weights get their name."""
        last = {"weight_version": label, "flush_cache": flush}
        deadline = time.monotonic() + timeout_s
        if self._features.sessions:
            await self._client.post("/begin_weight_update", {}, CONTROL_TIMEOUT_S)
        try:
            for i, body in enumerate(bodies, 1):
                named = last if i == len(bodies) else {"flush_cache": False}
                left_s = max(0.001, deadline - time.monotonic())  # 0 would be none
                await self._collective(path, {**body, **named, "abort_all_requests": False}, left_s)
        except EngineRefused:
            if self._features.sessions:  # a session left open would refuse every later one
                await self._client.post("/end_weight_update", {}, CONTROL_TIMEOUT_S)
            raise
        if self._features.sessions:
            await self._client.post("/end_weight_update", {}, CONTROL_TIMEOUT_S)

    async def _collective(self, path: str, body: dict[str, Any], timeout_s: float) -> None:
        """A call in which the server waits for others."""
        try:
            await self._client.post(path, body, timeout_s)
        except EngineRefused:
            raise
        except EngineError as error:
            raise ServerStuck(str(error)) from error
        except asyncio.CancelledError as error:  # whoever waited gave up; the server goes on waiting
            raise ServerStuck(f"{self._name}: {path} was given up") from error
