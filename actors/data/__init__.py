"""Prompts from files: JSONL, Parquet, and Hugging Face datasets on disk.

    [task.train.gsm8k]
    factory = "slime_async.actors.data:table"
    arguments = { path = "data/gsm8k/train.jsonl", prompt = "question", answer = "answer" }

Each row becomes a task's content: ``messages`` (or ``prompt``), ``answer``, and the whole ``row`` for the reward. Rows
keep the order of the files, files that of their names: the order of training is drawn from ``run.seed``
(``task.shuffle``), several sources are mixed by their ``weight``, and a restarted run goes on where it was.
"""

from slime_async.actors.data.files import table

__all__ = ["table"]
