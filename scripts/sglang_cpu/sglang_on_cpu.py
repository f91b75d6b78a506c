"""Lets unmodified SGLang import and serve on a machine without a GPU, for the contract tests.

SGLang imports triton, torchvision and its own CUDA kernels on every machine, and on CPUs with ``torch_native``
attention calls none of them. Where they are not installed, stand-ins take their place. A ``.pth`` file in the test
environment imports this module in every process, which costs nothing until ``sglang`` is imported; SGLang's spawned
children are served in the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class StandIn(types.ModuleType):
    """A package of which every attribute exists: capitalised ones are classes, others are modules and decorators."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__
        self.__version__ = "0"
        self.__spec__ = ModuleSpec(name, StandInLoader(type(self)), is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        made = _class(full) if name[0].isupper() else sys.modules.get(full) or type(self)(full)
        if isinstance(made, types.ModuleType):
            sys.modules[full] = made
        setattr(self, name, made)
        return made

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """``@jit`` and ``@jit(option=…)`` both give back the function."""
        if len(arguments) == 1 and callable(arguments[0]) and not options:
            return arguments[0]
        return lambda function: function

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __contains__(self, item: object) -> bool:
        return False


class KernelStandIn(StandIn):
    """Of compute kernels: to import one is harmless, to call one would compute nonsense."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError(f"{self.__name__} was called on a CPU: SGLang left the path that these tests know")


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{cls.__name__}.{name}")


def _class(name: str) -> type:
    def init(self: Any, *_: Any, **options: Any) -> None:
        self.__dict__.update(options)

    namespace = {"__init__": init, "__init_subclass__": classmethod(lambda cls, **_: None)}
    return _AnyAttribute(name.rpartition(".")[2], (), namespace)


class StandInLoader(Loader):
    """Makes modules of one kind of stand-in."""

    def __init__(self, kind: type[StandIn]) -> None:
        self._kind = kind

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return sys.modules.get(spec.name) or self._kind(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


class StandInFinder(MetaPathFinder):
    """Asked last, so that packages which are installed win."""

    def __init__(self, kind: type[StandIn], package: str) -> None:
        self._kind, self._package = kind, package

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        return ModuleSpec(name, StandInLoader(self._kind), is_package=True)


class FirstImport(MetaPathFinder):
    """Runs ``action`` when ``package`` is imported for the first time, and steps aside."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self._package, self._action = package, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        if name == self._package:
            sys.meta_path.remove(self)
            self._action()


def prepare() -> None:
    """Put the stand-ins in place, once torch and transformers have made up their minds about what is missing."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    _let_them_look("torch.utils._triton", ("has_triton_package", "has_triton", "has_triton_tma"))
    _let_them_look(
        "transformers.utils.import_utils",
        ("is_torchvision_available", "is_torchvision_v2_available", "is_triton_available", "is_flash_attn_2_available"),
    )
    kinds = {"torchvision": StandIn, "triton": StandIn, "sgl_kernel": KernelStandIn}
    missing = [package for package in kinds if importlib.util.find_spec(package) is None]
    sys.meta_path.extend(StandInFinder(kinds[package], package) for package in missing)
    if "triton" in missing:
        _give_triton_what_is_computed_at_import()
    if "torchvision" in missing:
        _let_image_processors_be_registered()


def _let_them_look(module: str, functions: Sequence[str]) -> None:
    """Each remembers its first answer, which the stand-ins would change."""
    loaded = importlib.import_module(module)
    for name in functions:
        if hasattr(loaded, name):
            getattr(loaded, name)()


def _give_triton_what_is_computed_at_import() -> None:
    triton: Any = importlib.import_module("triton")
    language: Any = importlib.import_module("triton.language")
    triton.__version__ = "3.6.0"
    triton.cdiv = lambda a, b: -(a // -b)
    triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()

    class constexpr:  # noqa: N801 - triton's own name
        def __init__(self, value: Any = None) -> None:
            self.value = value

    language.constexpr, language.dtype, language.tensor = constexpr, type("dtype", (), {}), type("tensor", (), {})


def _let_image_processors_be_registered() -> None:
    """Without torchvision, transformers' AutoImageProcessor is a dummy whose every attribute raises."""
    import_utils: Any = importlib.import_module("transformers.utils.import_utils")
    dummy = getattr(import_utils, "DummyObject", None)
    if dummy is None:
        return
    original = dummy.__getattribute__

    def getattribute(cls: type, name: str) -> Any:
        return (lambda *_, **__: None) if name == "register" else original(cls, name)

    dummy.__getattribute__ = getattribute


if not any(isinstance(finder, FirstImport) for finder in sys.meta_path):
    sys.meta_path.insert(0, FirstImport("sglang", prepare))
