"""Defenses, one file each. A new file with a registered class here is a new method on the command line."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from dtrades_fast.defenses.base import REGISTRY, Batch, Crafted, Defense, Loss, Threat, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Batch", "Crafted", "Defense", "Loss", "Threat", "create", "names", "options", "register"]


def names() -> list[str]:
    """The methods that there are."""
    return sorted(REGISTRY)


def options(method: str) -> dict[str, dataclasses.Field[Any]]:
    """The options of a method by name, as dataclass fields with their defaults."""
    if method not in REGISTRY:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(names())}")
    return {f.name: f for f in dataclasses.fields(REGISTRY[method]) if f.name != "threat"}


def create(method: str, threat: Threat, **given: Any) -> Defense:
    """The defense of that name with the given options.

    Raises:
        ValueError: an unknown method, or an option that the method does not have.
    """
    known = options(method)
    for name in given:
        if name not in known:
            having = [m for m in names() if name in options(m)]
            whose = f"; it belongs to {', '.join(having)}" if having else ""
            raise ValueError(
                f"{name} is not an option of method {method!r}{whose}. "
                f"Options of {method!r}: {', '.join(known) or 'none'}"
            )
    return REGISTRY[method](threat, **given)
