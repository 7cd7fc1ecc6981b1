"""Several processes that ``torchrun`` has started: who is who, and what they tell each other.

Alone, every function here does nothing and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["any_of", "count", "gathered", "in_turn", "joined", "on_this_machine", "own_device", "rank", "total", "wait"]

#: How long processes wait for the slowest one, whose share of a part may take hours on CPUs. One that has ended is
#: noticed at once, since its connections close; a machine that vanishes closes none.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[int]:
    """Inside, the processes can talk; gives this one's number, 0 if it is alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process' number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_this_machine() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """The device asked for; of several processes with GPUs, each its own.

    Raises:
        ValueError: all of several processes would take one GPU, or there are fewer GPUs than processes.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or not device.startswith("cuda"):
        return device
    if device != "cuda" and on_this_machine() > 1:
        raise ValueError(f"--device {device} is one GPU for {on_this_machine()} processes: give cuda, for one each")
    if device == "cuda" and on_this_machine() > torch.cuda.device_count():
        raise ValueError(
            f"{on_this_machine()} processes on a machine with {torch.cuda.device_count()} GPUs: start as many as GPUs"
        )
    return f"cuda:{local}" if device == "cuda" else device


def wait() -> None:
    """Until all have come here."""
    if count() > 1:
        dist.barrier()


def in_turn(make: Callable[[], T]) -> T:
    """What each of them makes, on each machine the first one before the others."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        wait()
    made = make()
    if first:
        wait()
    return made


def total(values: Tensor) -> Tensor:
    """The sum over all processes, on each of them."""
    if count() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag whether one of them says so. On the hosts alone: no GPU is waited for."""
    return tuple(map(bool, total(torch.tensor(flags, dtype=torch.int64)).tolist()))


def gathered(mine: T) -> list[T]:
    """What each of them has, in their order, on the CPU's side: tensors, numbers, and containers of them."""
    everyone: list[T] = [mine] * count()
    if count() > 1:
        dist.all_gather_object(everyone, mine)
    return everyone
