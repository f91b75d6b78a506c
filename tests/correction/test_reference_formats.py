"""Other batches of the reference formats: expected values from the formulas, written out by hand for each token."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from reference_formats import check_files

SHIPPED = Path(__file__).parents[1] / "data" / "reference"


def random_batch(rng: random.Random, sequences: int) -> dict:
    """Sequences of 1 to 9 tokens, each with something sampled; some ratios far out."""
    rows = []
    for _ in range(sequences):
        n = rng.randint(1, 9)
        mask = [int(rng.random() < 0.7) for _ in range(n)]
        mask[-1] = 1
        behave = [-rng.expovariate(1.0) for _ in range(n)]
        prox = [b + rng.gauss(0, 0.7) for b in behave]
        rows.append(
            {
                "loss_mask": mask,
                "behave_logp": behave,
                "prox_logp": prox,
                "cur_logp": [p + rng.gauss(0, 0.3) for p in prox],
                "ref_logp": [p + rng.gauss(0, 0.2) for p in prox],
                "advantages": [rng.gauss(0, 1)] * n,
                "versions": [7 if m else -1 for m in mask],
            }
        )
    return {"current_version": 9, "sequences": rows}


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float, dual: float | None) -> torch.Tensor:
    """−min(r·A, clip(r)·A), at most −dual·A where A < 0."""
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)
    return torch.minimum(loss, torch.tensor(-dual * advantage)) if dual and advantage < 0 else loss


def by_hand(batch: dict, token_loss) -> tuple[float, list[list[float]]]:
    """Mean over sampled tokens of ``token_loss(current, row, t)``, and its gradient."""
    rows = batch["sequences"]
    current = [torch.tensor(row["cur_logp"], dtype=torch.float64, requires_grad=True) for row in rows]
    count = sum(sum(row["loss_mask"]) for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row, logps in zip(rows, current, strict=True):
        for t, sampled in enumerate(row["loss_mask"]):
            if sampled:
                total = total + token_loss(logps[t], row, t) / count
    total.backward()
    return total.item(), [c.grad.tolist() if c.grad is not None else [0.0] * len(c) for c in current]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_areal_cases_of_other_batches_and_caps(tmp_path, seed):
    rng = random.Random(seed)
    batch, cap, eps, dual = random_batch(rng, 2 + seed), rng.choice([1.3, 3.0, None]), 0.1 * seed, 2.0 + seed

    def loss(current, row, t):
        weight = math.exp(row["prox_logp"][t] - row["behave_logp"][t])
        weight = 0.0 if cap is not None and weight > cap else weight
        return weight * clipped(torch.exp(current - row["prox_logp"][t]), row["advantages"][t], eps, eps, dual)

    value, gradient = by_hand(batch, loss)
    case = {
        "batch": "x",
        "ppo": {"eps_clip": eps, "c_clip": dual},
        "behav_imp_weight_cap": cap,
        "expected": {"loss": value, "grad_cur_logp": gradient},
    }
    with_default = {key: item for key, item in case.items() if key != "behav_imp_weight_cap"}
    content = {"defaults": {"behav_imp_weight_cap": cap}, "batches": {"x": batch}, "cases": [case, with_default]}
    assert check(tmp_path, content) == (2, [])
    case["expected"]["grad_cur_logp"][-1][-1] += 1e-6
    assert [": grad_cur_logp." in line for line in check(tmp_path, content)[1]] == [True, True]


@pytest.mark.parametrize("seed", [4, 5])
def test_verl_cases_with_inputs_of_another_name(tmp_path, seed):
    rng = random.Random(seed)
    batch, cap = random_batch(rng, 4), rng.choice([1.5, 3.0])
    clip = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 4.0}

    def loss(current, row, t):
        weight = min(math.exp(row["prox_logp"][t] - row["behave_logp"][t]), cap)
        return weight * clipped(torch.exp(current - row["prox_logp"][t]), row["advantages"][t], 0.1, 0.3, 4.0)

    value, gradient = by_hand(batch, loss)
    case = {
        "batch": "y",
        "loss": "vanilla",
        "rollout_is": f"token_tis_{cap}",
        "loss_agg_mode": "token-mean",
        "config": clip,
        "expected": {"loss": value, "grad_cur_logp": gradient},
    }
    (tmp_path / "others.json").write_text(json.dumps({"batches": {"y": batch}}))
    assert check(tmp_path, {"inputs": "others.json (padded)", "cases": [case]}) == (1, [])


@pytest.mark.parametrize("seed", range(4))
def test_admission_traces_of_other_sizes(tmp_path, seed):
    rng = random.Random(seed)
    batch, eta, most = rng.choice([1, 3, 16]), rng.choice([0, 2, 7]), rng.choice([0, 1, 5, 300])
    running, accepted, version, trace = 0, 0, 0, []
    for _ in range(200):
        event = rng.choice(["noop", "submit", "submit", *(["accept", "reject"] if running else []), "version+1"])
        running += {"submit": 1, "accept": -1, "reject": -1}.get(event, 0)
        accepted += event == "accept"
        version += event == "version+1"
        room = min(max(1, most) - running, (eta + version + 1) * batch - (accepted + running))
        trace.append([event, room])
    case = {
        "max_concurrent_rollouts": most,
        "consumer_batch_size": batch,
        "max_staleness": eta,
        "pending_limit": (eta + 1) * batch,
        "trace_event_then_capacity": trace,
    }
    assert check(tmp_path, {"cases": [case]}) == (1, [])
    trace[150][1] += 1
    assert "capacity.150 is" in check(tmp_path, {"cases": [case]})[1][0]
    trace[3][0] = "explode"
    assert "unknown event 'explode'" in check(tmp_path, {"cases": [case]})[1][0]


@pytest.mark.parametrize(("slots", "batch", "queue", "rho", "tail"), [(7, 64, 1, 0.31, 1.1), (999, 8, 6, 2.75, 3.2182)])
def test_closed_forms_of_other_rates(tmp_path, slots, batch, queue, rho, tail):
    before = slots * tail / batch / max(1, rho)
    inside = rho if rho < 1 else (2 * queue + rho - 1) / (2 * rho)
    formula = {"pqs": round(before, 4), "iqs": round(inside, 4), "total": round(before + inside, 4)}
    case = {
        "concurrency_C": slots,
        "batch_samples_B": batch,
        "queue_factor_q": queue,
        "rho": rho,
        "M_tail": tail,
        "formula": formula,
    }
    assert check(tmp_path, {"cases": [case]}) == (1, [])
    formula["iqs"] += 2e-4
    assert "iqs is" in check(tmp_path, {"cases": [case]})[1][0]


def test_rates_that_cannot_be_are_named(tmp_path):
    content = json.loads((SHIPPED / "staleness_closed_form.json").read_text())
    content["cases"][0]["rho"] = 0
    passed, failures = check(tmp_path, content)
    assert passed == len(content["cases"]) - 1
    assert failures == [
        "FAILED cases.json: case 0: staleness closed form: ValueError: rate_ratio = 0: must be positive"
    ]


def check(directory: Path, content: dict) -> tuple[int, list[str]]:
    """The counts and failures of one file with this content."""
    file = directory / "cases.json"
    file.write_text(json.dumps(content))
    return check_files([file])
