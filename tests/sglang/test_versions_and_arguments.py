"""What can be known of SGLang without running it: its releases, the spans in its answers, its arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime_async.actors.engine import EngineError
from slime_async.actors.engines import check_engines
from slime_async.actors.sglang.arguments import check_arguments, command_line, known_arguments, num_ranks
from slime_async.actors.sglang.server import share_devices
from slime_async.actors.sglang.versions import (
    ChunkStamps,
    cache_key,
    exact_spans,
    features_of,
    parse_label,
    weight_label,
)
from slime_async.cli.roles import actor_devices
from slime_async.config import Config, ConfigError, load_config
from slime_async.demo.model import LARGE, _shapes, make_config
from slime_async.trajectory import VersionSpan, WeightId

ROOT = Path(__file__).parents[2]
V3, V4, V5 = (WeightId(1, version) for version in (3, 4, 5))
NEVER: frozenset[WeightId] = frozenset()


@pytest.mark.parametrize(
    ("version", "spans", "sessions"),
    [("0.5.16", False, False), ("0.5.20.post1", True, False), ("0.5.21", True, True), ("0.5.23", True, True)],
)
def test_each_release_has_its_features(version: str, spans: bool, sessions: bool) -> None:
    features = features_of(version)
    assert (features.spans, features.sessions, features.flushes_retracted) == (spans, sessions, sessions)
    assert features.stream_interval == (16 if spans else 1)


@pytest.mark.parametrize("version", ["0.5.15", "0.4.9.post2", "unknown"])
def test_an_older_release_is_refused_by_name(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"{version}.*install .*0\.5\.16 to 0\.5\.23"):
        features_of(version)


def test_a_newer_release_is_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert features_of("0.6.0").sessions
    assert "SGLang 0.6.0 is newer than 0.5.23" in caplog.text


def test_labels_name_incarnation_and_version() -> None:
    assert parse_label(weight_label(V4)) == V4
    assert parse_label("default") is None
    assert len({cache_key(w) for w in (V3, V4, WeightId(2, 3))}) == 3


@pytest.mark.parametrize(
    ("reported", "sent_under", "late", "tokens", "expected"),
    [
        ([(0, "1.3")], V3, NEVER, 9, [(0, V3)]),
        ([(0, "1.3"), (5, "1.4")], V3, NEVER, 9, [(0, V3), (5, V4)]),
        ([(0, "1.3"), (5, "1.4")], V3, {V4}, 9, [(0, V3), (6, V4)]),  # one token was in the making
        ([(0, "1.3"), (8, "1.4")], V3, {V4}, 9, [(0, V3)]),  # and it was the last
        ([(0, "1.4")], V3, {V4}, 9, [(0, V3), (1, V4)]),  # sent, but nothing sampled, before the change
        ([(0, "1.4")], V4, {V4}, 9, [(0, V4)]),
        ([(0, "1.3"), (5, "1.4"), (6, "1.5")], V3, {V4, V5}, 9, [(0, V3), (6, V4), (7, V5)]),
        ([(0, "1.3"), (5, "1.4"), (6, "1.5")], V3, {V4}, 9, [(0, V3), (6, V5)]),
        ([], V3, NEVER, 0, []),
    ],
)
def test_a_boundary_is_where_the_sampling_weights_change(
    reported: list[tuple[int, str]],
    sent_under: WeightId,
    late: frozenset[WeightId],
    tokens: int,
    expected: list[tuple[int, WeightId]],
) -> None:
    assert exact_spans(reported, sent_under, frozenset(late), tokens) == tuple(VersionSpan(*s) for s in expected)


def test_weights_that_nobody_published_are_an_error() -> None:
    with pytest.raises(EngineError, match="called 'default'"):
        exact_spans([(0, "default")], V3, NEVER, 4)


def test_stamps_of_single_tokens_are_exact_and_those_of_longer_chunks_count_as_older() -> None:
    stamps = ChunkStamps()
    for first, count, label in [
        (0, 1, "1.3"),
        (1, 1, "1.3"),
        (2, 1, "1.4"),
        (3, 8, "1.4"),
        (11, 4, "1.5"),
        (15, 0, "1.6"),
    ]:
        stamps.add(first, count, label)
    assert stamps.spans == [(0, "1.3"), (2, "1.4"), (14, "1.5")]


# ----------------------------------------------------------------------------------------------------- arguments


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that declares arguments in all the ways in which releases of SGLang do."""
    srt = tmp_path / "sglang" / "srt"
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (srt / "server_args.py").write_text(
        "class ServerArgs:\n    model_path: str\n    tp_size: int = 1\n\n"
        "class PortArgs:\n    nccl_port: int\n\n"
        "def add(parser):\n    parser.add_argument('--disable-cuda-graph', action='store_true')\n"
    )
    (srt / "arg_groups" / "fields" / "memory.py").write_text(
        "class Memory:\n    mem_fraction_static: A[float, Arg(help='x', aliases=['--mem-fraction'])] = 0.9\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    known_arguments.cache_clear()
    yield
    known_arguments.cache_clear()


@pytest.mark.usefixtures("installed")
def test_arguments_are_read_from_source_without_importing_anything() -> None:
    assert known_arguments() == {"model_path", "tp_size", "disable_cuda_graph", "mem_fraction_static", "mem_fraction"}


@pytest.mark.usefixtures("installed")
def test_unknown_and_reserved_arguments_are_refused_with_what_was_meant() -> None:
    check_arguments({"tp_size": 2, "disable_cuda_graph": True})
    with pytest.raises(ConfigError) as refused:
        check_arguments({"mem_fraction_statc": 0.8, "tp_size": None, "port": 1, "quux": 1, "dp_size": 2})
    assert str(refused.value).splitlines() == [
        "sglang.mem_fraction_statc: did you mean 'mem_fraction_static'?",
        "sglang.tp_size = None says nothing: leave it out",
        "sglang.port cannot be set: every server gets a free port",
        "sglang.quux: SGLang's server has no such argument",
        "sglang.dp_size cannot be set: an engine is one copy of the weights: set actor.engines",
    ]


def test_arguments_become_a_command_line() -> None:
    arguments = {
        "tp_size": 2,
        "enable_metrics": True,
        "skip_server_warmup": False,
        "lora_paths": ["a", "b"],
        "x": {"y": 1},
    }
    expected = ["--tp-size", "2", "--enable-metrics", "--lora-paths", "a", "b", "--x"]
    assert command_line(arguments) == [*expected, '{"y": 1}']


def test_devices_are_shared_in_order_and_too_few_are_refused_by_number() -> None:
    assert num_ranks({"tp_size": 2, "pp_size": 2}) == 4
    assert share_devices([4, 5, 6, 7], 2, 2) == [(4, 5), (6, 7)]
    assert share_devices([], 2, 4) == [(), ()]
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] are too few .*actor\.engines = 2 engines of 2 .*: 4 are"):
        share_devices([0, 1, 2], 2, 2)
    with pytest.raises(ConfigError, match=r"sglang\.tp_size = 0"):
        num_ranks({"tp_size": 0})


def pretend_installed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime_async.actors.engines.installed_version", lambda: version)


@pytest.mark.parametrize(
    ("version", "complaint"), [("", "SGLang is not installed here: pip install"), ("0.5.15", "0.5.15 is too old")]
)
def test_a_missing_or_old_sglang_is_said_before_any_process_starts(
    version: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(version, monkeypatch)
    with pytest.raises(ConfigError, match=complaint):
        check_engines(Config.model_validate({"actor": {"engine": "sglang"}}))
    elsewhere = {"engine": "sglang", "count": 0}, {"engine": "sglang", "count": 1, "engine_urls": ["http://a:1"]}
    for actor in elsewhere:
        check_engines(Config.model_validate({"actor": actor}))


def test_each_actor_has_to_have_enough_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed("0.5.23", monkeypatch)
    config = Config.model_validate(
        {"actor": {"engine": "sglang", "count": 2, "devices": [0, 1, 2]}, "sglang": {"tp_size": 2}}
    )
    with pytest.raises(ConfigError, match=r"devices = \[0\] are too few.*shared by actor\.count = 2 actors"):
        check_engines(config)


def test_every_actor_of_a_launch_is_told_its_own_devices() -> None:
    config = Config.model_validate({"actor": {"engine": "sglang", "count": 2, "devices": [4, 5, 6, 7]}})
    assert actor_devices(config, "actor-0") == (4, 5)
    assert actor_devices(config, "actor-1.3") == (6, 7)  # in a later life


@pytest.mark.parametrize(
    "flags", [{}, {("actor", "devices"): [0], ("weights", "backend"): "ipc"}], ids=["two-gpus", "one-gpu"]
)
def test_the_gpu_example_is_sound(flags: dict[tuple[str, ...], object], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed("0.5.23", monkeypatch)
    config = load_config(ROOT / "examples" / "gpu.toml", flags)
    assert config.staleness.max_staleness == 2
    check_engines(config)
    shape = make_config(LARGE)
    assert sum(math.prod(size) for _, size in _shapes(shape)) > 100e6
