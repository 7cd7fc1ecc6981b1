"""The tests of the operators once more, on the GPU: same inputs, same oracles, same tolerances.

While such a test runs, the operators in its module are replaced: inputs are copied to the device as they lie in
memory, aliases, strides, offsets and surroundings included, and results are copied back.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dtrades_fast import ops

gpu.require()

MODULES = [
    importlib.import_module(path.stem)
    for path in sorted((Path(__file__).parent.parent / "ops").glob("test_*.py"))
    if hasattr(ops, path.stem.removeprefix("test_"))
]
#: About compilers, transforms, the twins and argument checks, which do not depend on the device, or about the inputs
#: of the very call, which here is another one.
LEFT_OUT = ("compile", "opcheck", "vmap", "transforms", "twin", "error", "known_answers", "cannot_be_seen", "recorded")


def operators_of(module: Any) -> dict[str, Callable[..., Any]]:
    known = {name: getattr(ops, name) for name in ops.__all__}
    return {name: f for name, f in known.items() if inspect.isfunction(f) and vars(module).get(name) is f}


OPERATORS = {module: operators_of(module) for module in MODULES}


def there(x: Tensor, device: str) -> Tensor:
    """A copy on the device that lies in memory as ``x`` does; part of the graph where there is one."""
    if x.requires_grad:
        return x.to(device)
    storage = torch.empty(x.untyped_storage().nbytes(), dtype=torch.uint8, device=device).untyped_storage()
    storage.copy_(x.untyped_storage())
    return torch.empty(0, dtype=x.dtype, device=device).set_(storage, x.storage_offset(), x.shape, x.stride())


def moved(operator: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The operator, with its work done on the device."""

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        copies: dict[int, Tensor] = {}  # a tensor that is given twice is one tensor there too

        def copy(x: Any) -> Any:
            if isinstance(x, Tensor) and id(x) not in copies:
                copies[id(x)] = there(x, device)
            return copies.get(id(x), x)

        result = operator(*map(copy, args), **{name: copy(x) for name, x in kwargs.items()})
        if not operator.__name__.endswith("_"):
            return tree_map_only(Tensor, lambda x: x.cpu(), result)
        assert result is copies[id(args[0])]
        args[0].untyped_storage().copy_(result.untyped_storage())
        torch.autograd.graph.increment_version(args[0])
        return args[0]

    return call


@pytest.fixture(autouse=True)
def _operators_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, operators in OPERATORS.items():
        for name, operator in operators.items():
            replacement = moved(operator, gpu.DEVICE)
            monkeypatch.setattr(module, name, replacement)
            for function in vars(module).copy().values():  # helpers that take the operator as a default
                if inspect.isfunction(function) and operator in (function.__defaults__ or ()):
                    defaults = tuple(replacement if x is operator else x for x in function.__defaults__)
                    monkeypatch.setattr(function, "__defaults__", defaults)


for _module in MODULES:
    for _name, _test in list(vars(_module).items()):
        if _name.startswith("test_") and not any(word in _name for word in LEFT_OUT):
            globals()[f"{_name}__{_module.__name__.removeprefix('test_')}"] = _test


def test_every_operator_is_here_and_moved() -> None:
    """Among them an operator of the future whose tests are not found."""
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert public == {name for operators in OPERATORS.values() for name in operators}
    for module, operators in OPERATORS.items():
        assert all(vars(module)[name].__wrapped__ is operator for name, operator in operators.items())
        stem = module.__name__.removeprefix("test_")
        assert [name for name in globals() if name.endswith(f"oracle__{stem}")]
