"""The ``[sglang]`` section: any argument of SGLang's server, checked against the installed SGLang before it starts.

SGLang's own list is read from its source with ``ast``, because importing it takes half a minute and may touch devices.
Fields were declared in ``ServerArgs`` up to 0.5.19 and are in ``arg_groups/fields`` since; both are looked at.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slime_async.config.errors import ConfigError

RESERVED = {
    "model_path": "it is model.path",
    "model": "it is model.path",
    "config": "give the arguments themselves under [sglang]",
    "host": "servers listen on loopback, for their actor alone",
    "port": "every server gets a free port",
    "weight_version": "it names the learner's weights",
    "load_format": "weights come from the learner",
    "context_length": "it follows from sampling.max_context_tokens",
    "skip_tokenizer_init": "actors speak in token ids",
    "incremental_streaming_output": "answers are streamed in pieces",
    "enable_return_routed_experts": "set actor.record_routing",
    "dp_size": "an engine is one copy of the weights: set actor.engines",
    "data_parallel_size": "an engine is one copy of the weights: set actor.engines",
    "base_gpu_id": "set actor.devices",
    "nnodes": "an engine lives on one machine: start an actor on each",
    "node_rank": "an engine lives on one machine: start an actor on each",
}
"""What this package sets itself, and where to say it instead"""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ``ConfigError``, a line per problem: reserved and unknown names, values without a form on a command line.

    Where SGLang is not installed (external engines), unknown names pass: nothing here could know them.
    """
    known = known_arguments()
    problems = []
    for name, value in arguments.items():
        if name in RESERVED:
            problems.append(f"sglang.{name} cannot be set: {RESERVED[name]}")
        elif known and name not in known:
            near = difflib.get_close_matches(name, known - RESERVED.keys(), 1)
            hint = f"did you mean '{near[0]}'?" if near else "SGLang's server has no such argument"
            problems.append(f"sglang.{name}: {hint}")
        elif value is None or (isinstance(value, list) and not value):
            problems.append(f"sglang.{name} = {value!r} says nothing: leave it out")
    if problems:
        raise ConfigError("\n".join(problems))


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """``{"tp_size": 2, "disable_radix_cache": True}`` → ``--tp-size 2 --disable-radix-cache``; false ones are left out.

    Lists become several values, tables JSON.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is not False:
            argv += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return argv


def num_ranks(arguments: Mapping[str, Any]) -> int:
    """Devices that one engine with these arguments takes."""
    tensor = arguments.get("tp_size", arguments.get("tensor_parallel_size", 1))
    pipeline = arguments.get("pp_size", arguments.get("pipeline_parallel_size", 1))
    for name, size in (("tp_size", tensor), ("pp_size", pipeline)):
        if type(size) is not int or size < 1:
            raise ConfigError(f"sglang.{name} = {size!r}: must be a whole number of at least 1")
    return int(tensor * pipeline)


@functools.cache
def known_arguments() -> frozenset[str]:
    """Names of the installed SGLang's server arguments, with underscores; empty where it is not installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    folder = Path(next(iter(spec.submodule_search_locations))) / "srt"
    sources = [folder / "server_args.py", *sorted((folder / "arg_groups" / "fields").glob("*.py"))]
    return frozenset(name for source in sources if source.is_file() for name in _names(source))


def _names(source: Path) -> Iterator[str]:
    """Annotated fields of classes, and flags that are registered by hand."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and (node.name == "ServerArgs" or source.parent.name == "fields"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    if not field.target.id.startswith("_"):
                        yield field.target.id
                    yield from _flags(field.annotation)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from _flags(node)


def _flags(node: ast.AST) -> Iterator[str]:
    """Every ``"--some-flag"`` inside, as ``some_flag``."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.startswith("--"):
            name = inner.value[2:].replace("-", "_")
            if name.isidentifier():
                yield name
