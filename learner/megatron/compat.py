"""Makes megatron-core 0.16.1 run without CUDA, and mends what it gets wrong without TransformerEngine.

megatron-core writes "the current device" as ``torch.cuda.current_device()``, ``device="cuda"`` or ``tensor.cuda()``.
On a machine without CUDA, ``install`` gives every loaded ``megatron.core`` module a view of torch in which these mean
the CPU and streams do nothing. torch itself stays as it is for everybody else, but for ``Tensor.cuda`` and
``Module.cuda``, which could only raise. With CUDA nothing of this happens: the same learner runs on NCCL.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from slime_async.learner.megatron import weight_gradients

SUPPORTED_VERSION = "0.16.1"
"""The release whose internals this module was written against; a test holds it."""

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
"""The torch functions that megatron-core calls with a device"""


class _View(ModuleType):
    """A module that shows another one, with some names replaced."""

    def __init__(self, target: ModuleType, replacements: dict[str, Any]) -> None:
        super().__init__(target.__name__)
        self._target = target
        self.__dict__.update(replacements)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class _Stream:
    """Stands for streams and events: the CPU executes in order, so there is nothing to wait for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def _nothing(self, *_: object) -> None: ...

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _torch_without_cuda() -> ModuleType:
    def nothing(*_: object, **__: object) -> None: ...

    cuda = _View(
        torch.cuda,
        {
            "current_device": lambda: torch.device("cpu"),
            "is_available": lambda: False,
            "device_count": lambda: 0,
            "synchronize": nothing,
            "empty_cache": nothing,
            "set_device": nothing,
            "current_stream": lambda *_: _Stream(),
            "default_stream": lambda *_: _Stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "Stream": _Stream,
            "Event": _Stream,
            "get_rng_state": lambda *_, **__: torch.get_rng_state(),
            "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
            "manual_seed": torch.manual_seed,
            "manual_seed_all": torch.manual_seed,
            "nvtx": SimpleNamespace(range_push=nothing, range_pop=nothing),
        },
    )
    return _View(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


_CPU_TORCH = _torch_without_cuda()


def install() -> None:
    """Prepare the ``megatron.core`` modules that are loaded now; call again after importing more of them."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import layers

    weight_gradients.install(layers)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _mend_without_transformer_engine(distrib_optimizer.DistributedOptimizer)
        optimizer.clip_grad_by_total_norm_fp32 = _clip_by_total_norm
        clip_grads.l2_norm_impl = _total_norm
    if torch.cuda.is_available():
        return
    for name, module in sys.modules.copy().items():
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _CPU_TORCH  # type: ignore[attr-defined]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    token_dispatcher = sys.modules.get("megatron.core.transformer.moe.token_dispatcher")
    if token_dispatcher is not None:
        token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy_if_asked  # type: ignore[attr-defined]


def _to_numpy_if_asked(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The stock function converts CUDA tensors alone; on the CPU the values are wanted as numpy all the same."""
    return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value


def fuse_adam(optimizer: Any) -> None:
    """Have torch's AdamW, which megatron-core falls back to, update all parameters of a group in a few CUDA kernels."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(part, "optimizer", None), torch.optim.Adam | torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                if all(p.is_cuda for p in group["params"]):
                    group.update(fused=True, foreach=False)


@contextlib.contextmanager
def types_named_as_on_cuda(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """While an optimizer is built: it recognises parameters by ``type() == "torch.cuda.FloatTensor"``."""
    named = [] if torch.cuda.is_available() else list(parameters)
    for parameter in named:
        spelt = parameter.type().replace("torch.", "torch.cuda.")
        parameter.type = lambda *_, spelt=spelt: spelt  # type: ignore[method-assign]
    try:
        yield
    finally:
        for parameter in named:
            del parameter.type


def _clip_by_total_norm(
    parameters: Sequence[torch.Tensor], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scales gradients in place so that their total norm is at most ``max_norm``."""
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    gradients = [g for p in parameters if (g := getattr(p, name, None)) is not None]
    scale = max_norm / (total_norm + 1e-6)
    if gradients and scale < 1.0:
        torch._foreach_mul_(gradients, scale)


def _total_norm(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *_: object) -> Any:
    """The 2-norm over all tensors, [1], without the stock fallback's synchronisation per tensor."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors[0])))
    return norm.reshape(1), None


def _mend_without_transformer_engine(distributed: Any) -> None:
    """Four defects of 0.16.1 where neither TransformerEngine nor Apex is installed, on GPUs too."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    # recomputed norms ask TransformerEngine about fp8 unless this is None, but the default is False
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)

    if not hasattr(moe_utils, "te_general_gemm"):  # tested against None, but never bound: NameError in fp32 routers
        moe_utils.te_general_gemm = None
    if distributed._set_main_param_and_optimizer_states is _set_main_param_and_optimizer_states:
        return
    distributed._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states
    distributed.load_state_dict = _with_steps_of_their_own(distributed.load_state_dict)


@torch.no_grad()
def _set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    """Loads one parameter's checkpointed state. The stock method fails on the ``step`` that torch's AdamW keeps."""
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    for key, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
        if key != "step":  # load_state_dict restores it from the parameter groups
            destination.copy_(tensors[key])


def _with_steps_of_their_own(load: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """The stock method gives all parameters one ``step`` tensor, to which AdamW then adds 1 per parameter."""

    @functools.wraps(load)
    def wrapped(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return wrapped
