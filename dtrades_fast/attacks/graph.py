"""An attack as one CUDA graph: a single launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Graph", "cuda_graph"]

WARM_UPS = 3  #: calls before recording, in which libraries choose kernels and allocate

#: Of tensors; gives a tuple, list or dict of tensors and constants.
Function = Callable[..., Any]


def cuda_graph(function: Function, inputs: tuple[Tensor, ...]) -> Function:
    """The function by a CUDA graph that holds what it does to such inputs.

    Raises:
        RuntimeError: it does what no graph can hold, such as waiting for the device.
    """
    static = tuple(x.clone() for x in inputs)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(static[0].device)
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function(*static)
        # Other threads, such as NCCL's watchdog, may go on calling CUDA.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = function(*static)
    torch.cuda.current_stream(side.device).wait_stream(side)

    def replay(*inputs: Tensor) -> Any:
        for memory, values in zip(static, inputs, strict=True):
            memory.copy_(values)
        graph.replay()
        return tree_map_only(Tensor, Tensor.clone, results)  # the next replay overwrites them

    return replay


class Graph:
    """Calls functions of tensors; what comes twice in a row is recorded and from then on replayed.

    A replay makes the same operations on the memory that the recording saw: inputs are copied there first, everything
    else that the function reads, such as a network's weights, must have stayed in place and may have new values.
    The latest recording is kept; whatever differs from it runs as usual, like an epoch's smaller last batch.

    Args:
        record: takes a function and inputs, gives a function of such inputs.

    Attributes:
        recorded: how many recordings were made.
    """

    def __init__(self, record: Callable[[Function, tuple[Tensor, ...]], Function] = cuda_graph):
        self.record = record
        self.recorded = 0
        self._replay: Function | None = None
        self._replayed: Hashable = None
        self._before: Hashable = None

    def __call__(self, name: Hashable, function: Function, *inputs: Tensor) -> Any:
        """``function(*inputs)``; calls of one name differ in nothing but the values of tensors."""
        call = (name, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if call != self._replayed and call == self._before:
            self._replay = self._replayed = None  # frees its memory
            self._replay, self._replayed = self.record(function, inputs), call
            self.recorded += 1
        self._before = call
        if self._replay is None or call != self._replayed:
            return function(*inputs)
        return self._replay(*inputs)
