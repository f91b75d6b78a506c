"""The scheduler by itself, stepped by the test: no thread, no event loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slime_async.actors.embedded.checkpoint import read_config, read_tensors
from slime_async.actors.embedded.decoder import Decoder
from slime_async.actors.embedded.scheduler import Scheduler
from slime_async.actors.engine import GenerateRequest, Generation, PauseMode, SamplingParams
from slime_async.rows import most_rows
from slime_async.trajectory import VersionSpan, WeightId
from tests.learner.tiny_checkpoints import write_checkpoint

SLOTS, CONTEXT, VOCAB = 48, 48, 33
OLD, NEW = WeightId(1, 4), WeightId(1, 5)
MAX_STEPS = 1000
"""Far more than any test here needs"""


class CountingDecoder(Decoder):
    """Remembers how many rows each step computed."""

    rows: list[int]

    def decode(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        self.rows.append(len(ids))
        return super().decode(ids, positions, longest)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    write_checkpoint(directory, "qwen3", 0)
    return directory


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3-other")
    write_checkpoint(directory, "qwen3", 1)
    return directory


def make_scheduler(checkpoint: Path, *, fixed_slots: bool = False) -> tuple[Scheduler, CountingDecoder]:
    cpu = torch.device("cpu")
    decoder = CountingDecoder(
        read_config(checkpoint), slots=SLOTS, max_context=CONTEXT, dtype=torch.float32, device=cpu
    )
    decoder.rows = []
    scheduler = Scheduler(decoder, SLOTS, None, fixed_slots=fixed_slots)
    scheduler.use_weights(read_tensors(checkpoint), OLD)
    return scheduler, decoder


def request(i: int, max_new_tokens: int) -> GenerateRequest:
    prompt = [(7 * i + j) % VOCAB for j in range(1 + i % 9)]
    return GenerateRequest(f"{i:08d}", prompt, SamplingParams(max_new_tokens), resumed_tokens=0)


def submit(scheduler: Scheduler, requests: Sequence[GenerateRequest]) -> dict[str, Generation]:
    """The answers by request, filled in as they finish. A request's id is its seed."""
    answers: dict[str, Generation] = {}
    for item in requests:

        def done(generation: Generation, name: str = item.request_id) -> None:
            answers[name] = generation

        scheduler.submit(item, int(item.request_id), done)
    return answers


def run(scheduler: Scheduler) -> None:
    with torch.inference_mode():
        for _ in range(MAX_STEPS):
            if not scheduler.has_work:
                return
            scheduler.step()
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def alone(checkpoint: Path, item: GenerateRequest, *, fixed_slots: bool = False) -> Generation:
    scheduler, _ = make_scheduler(checkpoint, fixed_slots=fixed_slots)
    answers = submit(scheduler, [item])
    run(scheduler)
    return answers[item.request_id]


def test_in_fixed_slots_an_answer_is_bitwise_the_same_in_any_company(checkpoint: Path) -> None:
    requests = [request(i, max_new_tokens=8 + i % 5) for i in range(70)]
    results = []
    for order in (requests, requests[::-1], requests[20:] + requests[:20]):
        scheduler, _ = make_scheduler(checkpoint, fixed_slots=True)
        results.append(submit(scheduler, order))
        run(scheduler)
    assert results[0] == results[1] == results[2]
    for item in requests[::16]:
        assert alone(checkpoint, item, fixed_slots=True) == results[0][item.request_id]


def test_stragglers_move_to_the_front_and_keep_their_answers(checkpoint: Path) -> None:
    scheduler, decoder = make_scheduler(checkpoint)
    short = [request(i, max_new_tokens=3) for i in range(SLOTS - 2)]
    stragglers = [request(i, max_new_tokens=30) for i in (SLOTS - 2, SLOTS - 1)]
    answers = submit(scheduler, [*short, *stragglers])
    run(scheduler)
    assert decoder.rows[0] == SLOTS
    assert max(decoder.rows[3:]) <= most_rows(len(stragglers))
    for item in stragglers:
        expected = alone(checkpoint, item)
        assert answers[item.request_id].output_ids == expected.output_ids
        torch.testing.assert_close(answers[item.request_id].logprobs, expected.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
def test_a_moved_straggler_keeps_its_spans_when_weights_change(
    mode: PauseMode, checkpoint: Path, other_checkpoint: Path
) -> None:
    scheduler, _ = make_scheduler(checkpoint)
    answers = submit(scheduler, [request(i, max_new_tokens=3 if i < SLOTS - 1 else 20) for i in range(SLOTS)])
    with torch.inference_mode():
        while scheduler.running != 1:
            scheduler.step()
        scheduler.step()
        before = scheduler.generated_tokens - sum(len(answer.output_ids) for answer in answers.values())
        scheduler.pause(mode)
        scheduler.use_weights(read_tensors(other_checkpoint), NEW)
        scheduler.resume()
    run(scheduler)
    answer = answers[f"{SLOTS - 1:08d}"]
    assert len(answer.output_ids) == 20
    assert answer.spans == (VersionSpan(0, OLD), VersionSpan(before, NEW))


def test_weights_that_lack_a_tensor_are_refused_by_its_name(checkpoint: Path) -> None:
    scheduler, _ = make_scheduler(checkpoint)
    tensors = dict(read_tensors(checkpoint))
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    with pytest.raises(ValueError, match=r"1 tensors are missing, 'model.layers.1.self_attn.k_norm.weight'"):
        scheduler.use_weights(tensors.items(), NEW)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(checkpoint: Path) -> None:
    scheduler, _ = make_scheduler(checkpoint)
    name = "model.layers.0.self_attn.q_norm.weight"
    tensors = dict(read_tensors(checkpoint)) | {name: torch.zeros(4, 16)}
    with pytest.raises(ValueError, match=r"q_norm.weight' has shape \(4, 16\), this model's \(16,\)"):
        scheduler.use_weights(tensors.items(), NEW)
