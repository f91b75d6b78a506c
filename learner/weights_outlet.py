"""The weights' way out of one rank's training loop: snapshots to whoever sends them.

==================  ==================================  ==========================================
rank                one source                          several
==================  ==================================  ==========================================
0                   all of the weights, to publisher    its part, to the publisher
another source                                          its part, to its ``SourceRank``
any other           takes part in collecting them       takes part in collecting its peers' parts
==================  ==================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from slime_async.config import Config
from slime_async.config.schema import WeightsConfig
from slime_async.learner.carriers import weight_backend
from slime_async.learner.group_source import GroupSource
from slime_async.learner.publisher import Publisher
from slime_async.learner.snapshots import Place, Snapshots
from slime_async.learner.source_ranks import OtherSource, SourceRank, meet
from slime_async.learner.sources import Division
from slime_async.learner.trainer import Trainer
from slime_async.trajectory import WeightId


class WeightsOutlet(Protocol):
    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        """Hand out the trainer's weights as they are now; returns the seconds that had to be waited before.

        A collective: every rank calls it.
        """


@dataclass(slots=True)
class WeightShare:
    """What this rank has to do with the weights' way out."""

    division: Division | None = None
    """None: rank 0 sends all"""
    others: tuple[OtherSource, ...] = ()
    """Rank 0's"""
    own: SourceRank | None = None
    """Of a source that is not rank 0"""
    buffer_bytes: int = WeightsConfig().buffer_bytes
    snapshots: Snapshots | None = None

    @classmethod
    def agree(cls, config: Config, trainer: Trainer, address: str) -> WeightShare:
        """Divide the weights among the sources, and connect those. A collective.

        ``address`` is where engines can reach this process. Raises ``ValueError`` for sources that hold too little.
        """
        settings = config.weights
        if settings.sources == 1:
            return cls(buffer_bytes=settings.buffer_bytes)
        division, rank = trainer.divide(settings.sources), dist.get_rank()
        backend, source = weight_backend(settings, trainer.device), None
        assert backend != "ipc", "the configuration's checks refuse it"
        if rank and rank in division.parts:
            number = list(division.parts).index(rank)
            source = GroupSource(number, settings.sources, backend, settings.timeout_s, address)
        met = meet(division, source, settings.timeout_s, trainer.device)
        if isinstance(met, list):
            return cls(division, tuple(met), buffer_bytes=settings.buffer_bytes)
        return cls(division, own=met, buffer_bytes=settings.buffer_bytes)

    def take_snapshots(self, trainer: Trainer) -> Snapshots:
        """Their buffers are made when they are needed first."""
        if self.snapshots is None:
            part = trainer.manifest() if self.division is None else self.division.parts[dist.get_rank()]
            self.snapshots = Snapshots(part, trainer.device, self.buffer_bytes)
        return self.snapshots

    def export(self, trainer: Trainer, place: Place) -> Iterator[tuple[str, Tensor]]:
        """What this rank sends. A collective."""
        return trainer.export(place) if self.division is None else trainer.export_part(self.division, place)

    def close(self) -> None:
        """Of ranks other than 0: what is still sent then breaks."""
        if self.own is not None:
            self.own.close()


class PublishingOutlet:
    """Rank 0's."""

    def __init__(self, share: WeightShare, publisher: Publisher, timeout_s: float) -> None:
        """``timeout_s`` is for the publication before to begin."""
        self._share = share
        self._publisher = publisher
        self._timeout_s = timeout_s

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        snapshots = self._share.take_snapshots(trainer)
        snapshot = snapshots.begin(weights)
        waited_s = self._publisher.publish(snapshot, self._timeout_s)
        for other in self._share.others:
            other.fill(weights)
        snapshots.fill(snapshot, lambda place: self._share.export(trainer, place))  # the buffers are free from here on
        return waited_s


class FollowingOutlet:
    """Every other rank's."""

    def __init__(self, share: WeightShare, timeout_s: float) -> None:
        """``timeout_s`` is for rank 0 to publish."""
        self._share = share
        self._timeout_s = timeout_s

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        share = self._share
        if share.division is None:
            trainer.take_part_in_export()
            return 0.0
        if share.own is None:
            for _ in trainer.export_part(share.division, _nowhere):
                raise AssertionError("a rank that is no source got tensors to send")
            return 0.0
        waited_s = share.own.wait_free(weights, self._timeout_s)
        snapshots = share.take_snapshots(trainer)
        snapshot = snapshots.begin(weights)
        share.own.publish(snapshot)
        snapshots.fill(snapshot, lambda place: share.export(trainer, place))
        return waited_s


def _nowhere(spec: object) -> Tensor:
    raise AssertionError(f"no place for {spec}: this rank sends nothing")
