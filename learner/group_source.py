"""One source rank's end of the weight groups: one with each lane of engines."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

from torch._C._distributed_c10d import TCPStore

from slime_async.learner.snapshots import Snapshot
from slime_async.learner.sources import lanes_of_source
from slime_async.protocol import WeightGroupSpec
from slime_async.transport.weight_group import WeightGroup, host_group


class GroupSource:
    """Sends its part to every lane, in the order of ``lanes_of_source``. One call at a time, but for ``leave``."""

    def __init__(
        self, number: int, sources: int, backend: Literal["gloo", "nccl"], timeout_s: float, address: str
    ) -> None:
        """``address`` is where engines can reach this process."""
        self._number, self._sources = number, sources
        self._backend: Literal["gloo", "nccl"] = backend
        self._timeout_s = timeout_s
        self._address = address
        self._hosted: list[tuple[WeightGroupSpec, TCPStore]] = []
        self._groups: dict[int, WeightGroup] = {}

    def host(self, name: str, epoch: int, world_sizes: Sequence[int]) -> list[WeightGroupSpec]:
        """The groups to be formed, for each lane one of so many ranks."""
        self._hosted = [
            host_group(f"{name}-{self._number}.{lane}", epoch, size, self._backend, self._timeout_s, self._address)
            for lane, size in enumerate(world_sizes)
        ]
        return [spec for spec, _ in self._hosted]

    def join(self) -> None:
        """Form the groups that are hosted; returns when every lane has joined."""
        hosted, self._hosted = self._hosted, []  # the groups hold their stores by themselves once they are formed
        for lane in lanes_of_source(self._number, self._sources, len(hosted)):
            self._groups[lane] = WeightGroup.create(hosted[lane][0], 0)

    def send(self, snapshot: Snapshot, unless: Sequence[Future[Any]], *, whole_buffers: bool) -> None:
        """Broadcast the snapshot to one lane after the other, while it is being filled.

        Raises ``WeightGroupError`` when somebody is gone or late, or as soon as one of ``unless`` fails.
        """
        try:
            for lane in lanes_of_source(self._number, self._sources, len(self._groups)):
                arriving = snapshot.arriving(self._timeout_s, whole_buffers=whole_buffers)
                self._groups[lane].send(arriving, unless=unless, device=snapshot.tensors[0].device)
        except Exception:  # filling may raise anything
            self.leave()  # lanes that it has yet to come to would wait for their deadline
            raise

    def leave(self) -> None:
        """Close all groups: whoever takes part in them is told by that."""
        groups, self._groups = self._groups, {}
        for group in groups.values():
            group.close()
