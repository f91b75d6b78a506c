"""One rank of the learner: trains on batches of trajectories, and hands out weights.

::

    sequences ─► minibatches (one per optimizer step) ─► microbatches of this DP rank ─► hidden states ─► log π_θ
                                                                                             │
    log π_prox, log π_ref, batch statistics: before the first step, on the whole batch ─► policy_loss ─► Megatron's
                                                                                             DDP and optimizer

All ranks call the same methods with the same arguments: each works on its own share and all return the same results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from slime_async.config.schema import Config
from slime_async.correction import (
    BatchStatistics,
    Denominators,
    MetricSums,
    batch_statistics,
    policy_loss,
)
from slime_async.learner.critic import critic_loss, with_estimates
from slime_async.learner.critic import shown as critic_shown
from slime_async.learner.megatron.balance import auxiliary_losses_over, auxiliary_sums
from slime_async.learner.megatron.batch import Microbatch, column_logprobs, column_values, make_microbatch
from slime_async.learner.megatron.checkpoint import StateWrite, begin_write, read_state
from slime_async.learner.megatron.model import LearnerModel, build_model
from slime_async.learner.megatron.optimization import (
    TrainingState,
    copy_parameters,
    copy_state,
    forget_moments,
    optimize,
    parameters_as,
    restore_state,
)
from slime_async.learner.megatron.parallel import shut_down, sum_over_data_and_pipeline
from slime_async.learner.megatron.replay import check_routes
from slime_async.learner.megatron.saving import write_checkpoint
from slime_async.learner.megatron.schedule import run_microbatches
from slime_async.learner.sequences import (
    Columns,
    StepResult,
    TrainSequence,
    policy_batch,
    split_minibatches,
)
from slime_async.learner.snapshots import Place
from slime_async.learner.sources import Division
from slime_async.packing import pack
from slime_async.protocol import WeightManifest
from slime_async.telemetry.progress import Progress, silent

__all__ = ["StepResult", "TrainSequence", "Trainer"]

PhaseSpan = Callable[[str, int, int], None]
"""Called with a phase (prox, forward, optimizer), its start and its end by ``time.monotonic_ns``"""


Routes = Sequence[NDArray[np.int16] | None]
"""Per sequence the experts that its engine took, [T, layers, k], or None; empty where nobody's are followed"""


class Counters(NamedTuple):
    """What training changes beside tensors."""

    optimizer_steps: int
    """Since the optimizer began; what the warm-up counts"""
    learning_rate: float
    """After the warm-up"""
    holds_reference: bool
    """Whether the weights of the KL term's π_ref are held"""


class OptimizerStep(NamedTuple):
    """What one optimizer step of a batch did, over all ranks."""

    loss: float
    grad_norm: float
    tokens_computed: int
    tokens_counted: int
    sums: MetricSums
    value_sums: Tensor
    """Of ``critic_loss``"""
    routers: dict[str, float]
    """Auxiliary losses of a mixture of experts"""


class Trainer:
    """One rank of the learner."""

    def __init__(self, config: Config, model: LearnerModel, checkpoint: Path) -> None:
        self._config = config
        self._model = model
        self._checkpoint = checkpoint
        self._temperature = config.sampling.temperature or 1.0  # greedy sampling reports those at 1
        self._learning_rate = config.learner.learning_rate
        self._steps = 0
        self._reference: list[Tensor] | None = None
        self.on_phase: PhaseSpan | None = None
        """Told what a training step was busy with, and when"""

    @classmethod
    def build(
        cls, config: Config, checkpoint: Path, on_progress: Progress = silent, *, random_weights: bool = False
    ) -> Trainer:
        """Join the other ranks that torchrun started (none is needed for one), and load Hugging Face weights.

        ``random_weights``, for measurements of speed, reads nothing but the checkpoint's config.json. Raises
        ``ValueError`` for options, layouts and checkpoints that cannot work.
        """
        return cls(config, build_model(config, checkpoint, on_progress, random_weights=random_weights), checkpoint)

    @property
    def model(self) -> LearnerModel:
        """For distributed checkpoints."""
        return self._model

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def progress(self) -> Counters:
        return Counters(self._steps, self._learning_rate, self._reference is not None)

    def close(self) -> None:
        """Leave the process groups."""
        shut_down()

    def train_policy(self, sequences: Sequence[TrainSequence], version: int) -> StepResult:
        """Train one batch on the weights of ``version``, in ``learner.optimizer_steps`` optimizer steps.

        π_prox is the policy before the first step. Where neither KL nor entropy is in the loss, a sequence whose
        advantage is 0 everywhere has no gradient: it is counted in the denominators, but not computed.
        """
        algorithm, learner = self._config.algorithm, self._config.learner
        judged: dict[str, float] = {}
        if self._config.has_critic:
            values = self.values([s.token_ids for s in sequences], self._routes(sequences))
            sequences, judged = with_estimates(self._config.critic, sequences, values)
        minibatches = split_minibatches([s.group for s in sequences], learner.optimizer_steps)
        needs_prox = algorithm.prox == "recompute" and (learner.optimizer_steps > 1 or algorithm.needs_batch_statistics)
        with self._phase("prox", needs_prox or algorithm.needs_reference):
            prox = self.logprobs([s.token_ids for s in sequences], self._routes(sequences)) if needs_prox else None
            reference = self._reference_logprobs(sequences, version)
        statistics = None
        if algorithm.needs_batch_statistics:
            statistics = batch_statistics(algorithm, [policy_batch(sequences, prox, None, torch.device("cpu"))])
        steps = [self._policy_step(sequences, indices, prox, reference, statistics) for indices in minibatches]
        counted = sum(step.tokens_counted for step in steps)
        if self._config.has_critic:
            judged |= critic_shown(torch.stack([step.value_sums for step in steps]).sum(0), counted)
        merged = MetricSums.zero(self._model.device)
        for step in steps:
            merged = merged.merge(step.sums)
        return StepResult(
            loss=float(np.mean([step.loss for step in steps])),
            grad_norm=float(np.mean([step.grad_norm for step in steps])),
            learning_rate=self._warmed_up_rate(self._steps - 1),
            tokens_computed=sum(step.tokens_computed for step in steps),
            tokens_counted=counted,
            metrics=merged.finalise() | judged | steps[-1].routers,
        )

    def train_supervised(
        self, sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]], learning_rate: float
    ) -> StepResult:
        """One optimizer step on the mean negative log-likelihood of the tokens in each (token ids, loss mask)."""
        tokens = [ids for ids, _ in sequences]
        counted = sum(int(np.count_nonzero(mask[1:])) for _, mask in sequences)
        total = torch.zeros((), dtype=torch.float64, device=self._model.device)

        def loss(microbatch: Microbatch, hidden: Tensor) -> Tensor:
            logprobs, _ = column_logprobs(self._model, microbatch, hidden, 1.0, entropy=False)
            masks = [sequences[i][1][1:] for i in microbatch.indices]
            mask = torch.from_numpy(np.concatenate([*masks, np.zeros(0)])).to(logprobs)
            share = -(logprobs * mask).sum() / max(counted, 1)
            total.add_(share.detach())
            return share + self._untrained_values(microbatch, hidden)

        microbatches = self._share(tokens, range(len(tokens)))
        norm = optimize(self._model, lambda: run_microbatches(self._model, microbatches, loss), learning_rate)
        self._steps += 1
        value = float(sum_over_data_and_pipeline(total))
        return StepResult(value, norm, learning_rate, sum(map(len, tokens)), counted, {"loss": value})

    def logprobs(self, sequences: Sequence[NDArray[np.int32]], routes: Routes = ()) -> list[NDArray[np.float32]]:
        """Log π_θ of every token given those before it, after the sampling temperature: [T] per sequence of token ids.

        Position 0 is 0. Every rank gets all sequences. ``routes`` are the experts to take, per sequence.
        """

        def column(microbatch: Microbatch, hidden: Tensor) -> Tensor:
            return column_logprobs(self._model, microbatch, hidden, self._temperature, entropy=False)[0]

        return self._columns(sequences, routes, column)

    def values(self, sequences: Sequence[NDArray[np.int32]], routes: Routes = ()) -> list[NDArray[np.float32]]:
        """The critic's value of the state before every token: [T] per sequence of token ids; position 0 is 0."""
        return self._columns(
            sequences, routes, lambda microbatch, hidden: column_values(self._model, microbatch, hidden)
        )

    def _columns(
        self,
        sequences: Sequence[NDArray[np.int32]],
        routes: Routes,
        compute: Callable[[Microbatch, Tensor], Tensor],
    ) -> list[NDArray[np.float32]]:
        """A forward pass over all sequences, and one number per token of it on every rank."""
        ends = np.cumsum([len(s) for s in sequences])
        flat = torch.zeros(int(ends[-1]) if len(ends) else 0, dtype=torch.float32, device=self._model.device)

        def collect(microbatch: Microbatch, hidden: Tensor) -> Tensor:
            columns = compute(microbatch, hidden)
            spans = [np.arange(ends[i] - len(sequences[i]) + 1, ends[i]) for i in microbatch.indices]
            rows = torch.from_numpy(np.concatenate([*spans, np.zeros(0, dtype=np.int64)]))
            flat[rows.to(flat.device)] = columns.detach()
            return columns.sum()

        with torch.no_grad():
            microbatches = self._share(sequences, range(len(sequences)), routes)
            run_microbatches(self._model, microbatches, collect, forward_only=True)
        values: NDArray[np.float32] = sum_over_data_and_pipeline(flat).cpu().numpy()
        return np.split(values, ends[:-1]) if len(ends) else []

    def hold_reference(self) -> None:
        """The weights as they are now become π_ref, which the KL term is against.

        ``train_policy`` does this by itself at version 0, and checkpoints carry it.
        """
        self._reference = copy_parameters(self._model)

    def export(self, place: Place | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) in the manifest's order. A collective: every rank runs it to the end.

        Each tensor is written to where ``place`` says, or to fresh memory.
        """
        return self._model.weights.export(place)

    def take_part_in_export(self) -> None:
        """For ranks that want no tensors, while others export."""
        self._model.weights.take_part_in_export()

    def divide(self, sources: int) -> Division:
        """The weights among so many source ranks. A collective."""
        return self._model.weights.divide(sources)

    def export_part(self, division: Division, place: Place) -> Iterator[tuple[str, Tensor]]:
        """As ``export``, but only what this rank is the source of. A collective: every rank runs it to the end."""
        return self._model.weights.export_part(division.source_of, place)

    def manifest(self) -> WeightManifest:
        """What ``export`` yields; the same for every layout."""
        return self._model.weights.manifest()

    def save_hf(self, directory: Path, on_progress: Progress = silent) -> None:
        """Write an ordinary Hugging Face checkpoint; every rank calls this, rank 0 writes, all wait for it."""
        writes = dist.get_rank() == 0
        total, tensors = len(self.manifest().tensors), {}
        for done, (name, tensor) in enumerate(self.export()):
            on_progress(done, total)
            if writes:
                tensors[name] = tensor.cpu()
        if writes:
            write_checkpoint(directory, self._checkpoint, tensors, self._config.model.dtype)
        dist.barrier()

    def snapshot_state(self) -> TrainingState:
        """A copy, in memory, of weights, moments and schedule."""
        return copy_state(self._model, self._steps, self._learning_rate)

    def restore_state(self, state: TrainingState) -> None:
        """Go back: training then goes on bitwise as it did after the snapshot."""
        restore_state(self._model, state)
        self._steps, self._learning_rate = state.steps, state.learning_rate

    def reset_optimizer(self, learning_rate: float) -> None:
        """Fresh moments, and the warm-up from its beginning: RL after a supervised phase."""
        forget_moments(self._model)
        self._steps, self._learning_rate = 0, learning_rate

    def begin_checkpoint(self, directory: Path) -> StateWrite:
        """Copy everything that training changes, and begin to write it into ``directory``. A collective."""
        return begin_write(self._model, self._reference, directory)

    def load_checkpoint(self, directory: Path, progress: Counters, *, same_layout: bool) -> None:
        """Go on from what ``begin_checkpoint`` wrote, bitwise under the same layout. A collective.

        ``progress`` is what the trainer that wrote it had then.
        """
        self._reference = read_state(
            self._model,
            directory,
            progress.optimizer_steps,
            reference=progress.holds_reference,
            random=same_layout,
        )
        self._steps, self._learning_rate = progress.optimizer_steps, progress.learning_rate

    def _policy_step(
        self,
        sequences: Sequence[TrainSequence],
        minibatch: Sequence[int],
        prox: Columns | None,
        reference: Columns | None,
        statistics: BatchStatistics | None,
    ) -> OptimizerStep:
        algorithm = self._config.algorithm
        sampled = [sequences[i].sampled_tokens for i in minibatch]
        denominators = Denominators(tokens=sum(sampled), sequences=sum(n > 0 for n in sampled))
        skips = algorithm.kl_coef == 0 and algorithm.entropy_coef == 0 and not self._config.has_critic
        computed = [i for i in minibatch if sequences[i].has_advantage or not skips]
        total = torch.zeros((), dtype=torch.float64, device=self._model.device)
        sums = [MetricSums.zero(self._model.device)]
        value_sums = torch.zeros(2, dtype=torch.float64, device=self._model.device)

        def loss(microbatch: Microbatch, hidden: Tensor) -> Tensor:
            current, entropy = column_logprobs(self._model, microbatch, hidden, self._temperature, entropy=True)
            chosen = microbatch.indices
            batch = policy_batch(
                [sequences[i] for i in chosen],
                None if prox is None else [prox[i] for i in chosen],
                None if reference is None else [reference[i] for i in chosen],
                self._model.device,
            )
            result = policy_loss(algorithm, current, entropy, batch, denominators, statistics)
            whole = result.loss
            if self._config.has_critic:
                values = column_values(self._model, microbatch, hidden)
                own = [sequences[i] for i in chosen]
                share, parts = critic_loss(self._config.critic, values, own, float(denominators.tokens))
                whole = whole + share
                value_sums.add_(parts)
            total.add_(whole.detach())
            sums[0] = sums[0].merge(result.sums)
            return whole

        microbatches = self._share([s.token_ids for s in sequences], computed, self._routes(sequences))
        rate = self._warmed_up_rate(self._steps)
        ends: list[int] = []

        def accumulate() -> None:
            with self._phase("forward"):
                run_microbatches(self._model, microbatches, loss)
            ends.append(time.monotonic_ns())

        tokens = sum(len(sequences[i].token_ids) for i in computed)
        with auxiliary_losses_over(self._model, tokens):
            norm = optimize(self._model, accumulate, rate)
        if self.on_phase is not None:
            self.on_phase("optimizer", ends[0], time.monotonic_ns())
        self._steps += 1
        joined = MetricSums(
            sum_over_data_and_pipeline(sums[0].sums),
            sum_over_data_and_pipeline(sums[0].maxima, dist.ReduceOp.MAX),
        )
        return OptimizerStep(
            loss=float(sum_over_data_and_pipeline(total)),
            grad_norm=norm,
            tokens_computed=tokens,
            tokens_counted=int(denominators.tokens),
            sums=joined,
            value_sums=sum_over_data_and_pipeline(value_sums).cpu(),
            routers=auxiliary_sums(self._model, len(microbatches)),
        )

    @contextmanager
    def _phase(self, name: str, happens: bool = True) -> Iterator[None]:
        begun = time.monotonic_ns()
        yield
        if self.on_phase is not None and happens:
            self.on_phase(name, begun, time.monotonic_ns())

    def _untrained_values(self, microbatch: Microbatch, hidden: Tensor) -> Tensor | float:
        """Nothing, with a gradient of nothing: a critic's parameters take part in every backward pass."""
        return 0.0 * column_values(self._model, microbatch, hidden).sum() if self._config.has_critic else 0.0

    def _routes(self, sequences: Sequence[TrainSequence]) -> Routes:
        routes = [s.routed_experts for s in sequences]
        if not self._config.learner.replay_routing or all(r is None for r in routes):
            return ()
        check_routes(self._model.architecture, routes)
        return routes

    def _share(
        self, tokens: Sequence[NDArray[np.int32]], indices: Sequence[int], routes: Routes = ()
    ) -> list[Microbatch]:
        """This DP rank's microbatches of the chosen sequences."""
        lengths = [-(-len(tokens[i]) // self._model.alignment) * self._model.alignment for i in indices]
        layout, budget = self._model.layout, self._config.learner.microbatch_tokens
        packing = pack(lengths, budget, layout.data, layout.pipeline if layout.virtual > 1 else 1)
        mine = packing.ranks[parallel_state.get_data_parallel_rank()]
        chosen = [[indices[i] for i in microbatch] for microbatch in mine]
        return [
            make_microbatch(self._model, m, [tokens[i] for i in m], [routes[i] for i in m] if routes else ())
            for m in chosen
        ]

    def _reference_logprobs(self, sequences: Sequence[TrainSequence], version: int) -> Columns | None:
        if not self._config.algorithm.needs_reference:
            return None
        if self._reference is None and version == 0:
            self.hold_reference()
        if self._reference is None:
            raise ValueError(
                f"algorithm.kl_coef > 0 at version {version}, but the reference weights (version 0) are not held: "
                "load them and call hold_reference() before resuming"
            )
        with parameters_as(self._model, self._reference):
            return self.logprobs([s.token_ids for s in sequences])

    def _warmed_up_rate(self, step: int) -> float:
        warmup = self._config.learner.warmup_steps
        return self._learning_rate * min(1.0, (step + 1) / warmup) if warmup else self._learning_rate
