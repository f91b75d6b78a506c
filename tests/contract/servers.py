"""SGLang servers that the contract tests share: a start takes half a minute, a test a second.

Tests see them as external engines, by URL. Before each, the server gets its checkpoint's weights back, under their old
name; one that a test has left unusable is started anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from slime_async.actors.engine import Engine
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import free_port
from slime_async.actors.sglang.versions import OWN_ENVIRONMENT, features_of, installed_version, weight_label
from slime_async.guard import guarded
from slime_async.logs import log_tail
from slime_async.trajectory import WeightId
from tests.contract.reference import OLD, Bench

START_TIMEOUT_S = 300.0
CONTEXT = 8184
"""What fits beside the margin into the checkpoints' 8192 positions"""
MAX_SERVERS = {"cpu": 3, "gpu": 6}
"""Each takes 1.5 GB of the machine's memory"""

CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "grammar_backend": "none",
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "max_total_tokens": 32768,
}
GPU = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_prefill_cuda_graph": True,
    "mem_fraction_static": 0.5,  # a bound: what others take while this one starts counts against it
    "max_total_tokens": 65536,
}
Key = tuple[Path, int, bool]
"""(checkpoint, slots, overlap scheduling)"""


class Server:
    """One process and its URL."""

    def __init__(self, key: Key, log: Path, gpu: bool) -> None:
        checkpoint, slots, overlap = self.key = key
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        options: dict[str, Any] = {**(GPU if gpu else CPU), "max_running_requests": slots}
        options |= {} if overlap else {"disable_overlap_schedule": True}
        arguments = server_arguments(checkpoint, CONTEXT, options, OLD)
        command = [sys.executable, "-m", "sglang.launch_server", *arguments, "--port", str(port)]
        environment = {**os.environ, **OWN_ENVIRONMENT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = "0"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                guarded(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"SGLang did not start:\n{log_tail(self._log, 40)}")
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5.0) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def reset(self) -> bool:
        """The checkpoint's weights under their old name, nothing running; whether that worked."""
        try:
            self.post("/continue_generation", {"torch_empty_cache": False})
            self.post("/abort_request", {"rid": "", "abort_all": True})
            body = {"model_path": str(self.key[0]), "weight_version": weight_label(OLD), "flush_cache": True}
            return self.answers() and bool(self.post("/update_weights_from_disk", body).get("success"))
        except (urllib.error.URLError, OSError):
            return False

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30.0) as response:
            text = response.read()
        reply: dict[str, Any] = json.loads(text) if text.strip() else {}
        return reply

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30.0)


class Servers:
    """Started servers by what they were started with; the least recently used one goes when there are too many."""

    def __init__(self, logs: Path, *, gpu: bool) -> None:
        self.gpu = gpu
        self._logs = logs
        self._servers: dict[Key, Server] = {}

    def url(self, checkpoint: Path, slots: int, overlap: bool) -> str:
        key = (checkpoint, 1 if slots == 1 else 8, overlap)
        server = self._servers.pop(key, None)
        if server is not None and not server.reset():
            server.kill()
            server = None
        if server is None:
            while len(self._servers) >= MAX_SERVERS["gpu" if self.gpu else "cpu"]:
                self._servers.pop(next(iter(self._servers))).kill()
            server = Server(key, self._logs / f"server-{time.monotonic_ns()}.log", self.gpu)
        self._servers[key] = server
        return server.url

    def stop(self) -> None:
        for server in self._servers.values():
            server.kill()


def sglang_bench(servers: Servers) -> Bench:
    def make(
        checkpoint: Path,
        *,
        weights: WeightId | None,
        slots: int = 8,
        max_context: int = CONTEXT,
        engine_id: str = "sglang",
        overlap: bool = True,
    ) -> Engine:
        served = (checkpoint / "model.safetensors").is_file()
        url = servers.url(checkpoint, slots, overlap) if served else "http://127.0.0.1:9"
        return SGLangEngine(
            checkpoint, engine_id=engine_id, url=url, max_context=min(max_context, CONTEXT), weights=weights
        )

    return Bench(
        "sglang",
        make,
        seeded=False,
        # in bf16 and on these widely drawn weights, transformers itself is up to 0.44 off, and 0.04 on average
        tolerance=0.7 if servers.gpu else 1e-4,
        mean_tolerance=0.06 if servers.gpu else 1e-4,
        unreported_tokens=features_of(installed_version()).stream_interval,
        reported_within_s=1.0,
        backend="nccl" if servers.gpu else "gloo",
        device="cuda:1" if servers.gpu else "cpu",
    )
