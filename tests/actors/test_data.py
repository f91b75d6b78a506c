"""Prompts from files, rewards for them, and that their order is the same in every process and after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors.data import table
from slime_async.actors.rewards import exact, number
from slime_async.config import Config
from slime_async.queue import TaskStream

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(10)]
QA = {"prompt": "question", "answer": "answer"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


def write_dataset(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return str(path)


@pytest.fixture(params=[write_jsonl, write_parquet, write_dataset], ids=["jsonl", "parquet", "huggingface"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    suffix = {"write_jsonl": "rows.jsonl", "write_parquet": "rows.parquet"}.get(request.param.__name__, "rows")
    return str(request.param(tmp_path / suffix, ROWS))


def test_every_format_gives_the_same_tasks(stored: str) -> None:
    tasks = table(stored, **QA, system="Be brief.")
    assert len(tasks) == 10
    for index in (7, 0, 9, 3):
        assert tasks[index] == {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": ROWS[index]["question"]},
            ],
            "answer": ROWS[index]["answer"],
            "row": ROWS[index],
        }
    with pytest.raises(IndexError):
        tasks[10]


def test_a_part_of_the_rows_and_only_short_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "x" * 500, "answer": "?"}])
    assert [t["row"] for t in map(table(path, **QA, skip=2, limit=3).__getitem__, range(3))] == ROWS[2:5]
    assert len(table(path, **QA, max_characters=100)) == 10
    with pytest.raises(ValueError, match="no row is left of 11: skip = 11"):
        table(path, **QA, skip=11)


def test_prompts_by_template_by_conversation_and_as_plain_text(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hallo"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "ü?", "hint": "h", "talk": said}])
    task = table(path, template="{q} ({hint}) \\boxed{{}}", chat=False)[0]
    assert task["prompt"] == "ü? (h) \\boxed{}"
    assert table(path, messages="talk", system="s")[0]["messages"] == [{"role": "system", "content": "s"}, *said]
    with pytest.raises(ValueError, match=r"has no column 'prompt', only \['hint', 'q', 'talk'\]"):
        table(path)
    with pytest.raises(ValueError, match=r"names 'missing', rows have"):
        table(path, template="{missing}")


def test_several_files_are_one_table_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[6:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:6])
    tasks = table(str(tmp_path / "*.jsonl"), **QA)
    assert [tasks[i]["row"] for i in range(10)] == ROWS
    write_parquet(tmp_path / "c.parquet", ROWS)
    with pytest.raises(ValueError, match="both Parquet and other files"):
        table([str(tmp_path / "*.jsonl"), str(tmp_path / "c.parquet")], **QA)


def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file 'nowhere\.jsonl' \(looked from"):
        table("nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n[1]\n')
    tasks = table(str(broken))
    with pytest.raises(ValueError, match=r"broken\.jsonl, row 1: "):
        tasks[1]
    with pytest.raises(ValueError, match="row 2 is a list: each line is one object"):
        tasks[2]
    with pytest.raises(ValueError, match="holds no dataset"):
        table(str(tmp_path))


def test_a_restarted_stream_goes_on_with_the_next_row_of_each_source(tmp_path: Path) -> None:
    easy = table(write_jsonl(tmp_path / "easy.jsonl", ROWS[:6]), **QA)
    hard = table(write_jsonl(tmp_path / "hard.jsonl", ROWS[6:]), **QA)
    sizes = {"easy": len(easy), "hard": len(hard)}
    config = Config.model_validate(
        {"task": {"train": {n: {"factory": "a:b", "weight": w} for n, w in (("easy", 2.0), ("hard", 1.0))}}}
    )

    def take(stream: TaskStream, count: int) -> list[tuple[str, int, int]]:
        taken = []
        for _ in range(count):
            task = stream.peek()
            assert task is not None
            stream.advance(task.source)
            taken.append((task.source, task.index, task.epoch))
        return taken

    whole, first = TaskStream.from_config(config), TaskStream.from_config(config)
    whole.declare_sources(sizes)
    first.declare_sources(sizes)
    order = take(whole, 18)
    begun = take(first, 7)
    again = TaskStream.from_config(config)
    again.restore(first.state())
    assert begun + take(again, 11) == order
    assert sum(source == "easy" for source, _, _ in order) == 12
    assert {index for source, index, epoch in order if source == "easy" and epoch == 0} == set(range(6))


# --------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("3 * 4 = 12\n#### 12", "so \\boxed{12}.", True),
        ("#### 1,200", "It is $1200.00", True),
        ("#### 12", "12 apples, that is 13", False),
        ("#### 12", "\\boxed{13} or rather \\boxed{12}", True),
        ("#### 12", "<answer>12</answer> as 12 + 1 = 13", True),
        ("#### 12", "#### 12\nhope that helps, 7", True),
        ("#### 12", "\\boxed{12", True),
        ("#### 12", "\\boxed{\\text{12}}", False),
        ("#### -3.5", "-3.5", True),
        ("0.5", "one half", False),
        ("#### 5", "", False),
    ],
)
def test_a_number_is_right_as_a_number_where_the_answer_gives_it(label: str, answer: str, right: bool) -> None:
    assert number({"answer": label}, answer, "stop") == float(right)
    assert number({"answer": label}, answer, "length") == 0.0


def test_exact_answers_are_exact() -> None:
    assert exact({"answer": "Paris"}, " Paris\n", "stop") == 1.0
    assert exact({"answer": "Paris"}, "paris", "stop") == 0.0
    assert exact({"answer": "see\n#### 12"}, "12", "stop") == 1.0
    assert exact({"answer": "Paris"}, "Paris", "length") == 0.0
