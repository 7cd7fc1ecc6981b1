"""Files that are either old or new, never half written, and loading them without running code from them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["load_state", "load_weights", "remove_leftovers", "save_state", "save_weights", "write", "write_text"]


def write(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``content`` writes, all or nothing, even when the power fails.

    The temporary file lies in the same folder, since a rename is atomic only within a file system. It carries the
    process id, so that two writers never share one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes that were killed while they wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a dict of tensors, numbers, strings and containers of them."""
    write(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU; tensors alone are read, no code is run.

    Raises:
        RuntimeError: the file is damaged or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RuntimeError(f"{path} is damaged or no checkpoint of this program: {error}") from error
    if not isinstance(state, dict):
        raise RuntimeError(f"{path} is no checkpoint of this program: it holds {type(state).__name__}, not a dict")
    return state


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Save a model's state dict as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write(path, lambda file: file.write(safetensors.torch.save(tensors)))


def load_weights(path: Path) -> dict[str, Tensor]:
    """A model's state dict from a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the run has not finished its first epoch, was kept without its weights, or is no "
            "run folder"
        )
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RuntimeError(f"{path} is damaged ({error}): delete it and train on with --resume") from error
