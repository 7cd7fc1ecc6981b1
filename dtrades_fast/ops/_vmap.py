"""vmap of a row operator: the mapped dimension becomes more rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def rule(call: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of ``call(*tensors, *settings)``, whose tensors and results all have one entry per row first."""

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        folded = [
            _fold(info, dim, argument) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, in_dims, strict=False)
        ]
        result = call(*folded)
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in result), (0,) * len(result)

    return vmap


def _fold(info: Any, dim: int | None, x: Tensor) -> Tensor:
    mapped = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1)
