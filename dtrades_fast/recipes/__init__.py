"""``dtrades-fast recipes``: the recipes and presets that come along, one file each in this folder.

A file begins with a comment: its first line says in one sentence what it holds and where from, the others give the
source in full and name what is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
import yaml

from dtrades_fast import config

__all__ = ["Options", "main"]

COLUMNS = {"method": "method", "dataset": "data", "epsilon": "epsilon", "steps": "steps", "epochs": "epochs"}


@dataclass
class Options:
    """List the recipes (published settings) and presets (settings for a machine), or print one with its comments."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")] = None
    """Recipe or preset to print; all are listed without it."""


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``recipes``."""
    options = tyro.cli(Options, args=list(argv), prog=prog)
    if options.name is None:
        print(listing("recipe"), listing("preset"), sep="\n\n")
        print("\ndtrades-fast recipes NAME prints one; train --recipe NAME --preset NAME uses them")
    else:
        sys.stdout.write(text(options.name))
    return 0


def text(name: str) -> str:
    """The file of a recipe or preset, comments included.

    Raises:
        ValueError: there is none of that name.
    """
    known = {kind: config.profiles(kind) for kind in ("recipe", "preset")}
    if not any(name in names for names in known.values()):
        raise ValueError(
            f"unknown recipe or preset {name!r}; recipes are {', '.join(known['recipe'])}; "
            f"presets are {', '.join(known['preset'])}"
        )
    return (config.RECIPES / f"{name}.yaml").read_text()


def listing(kind: Literal["recipe", "preset"]) -> str:
    """A line for each, under a heading; ``-`` where it leaves a value open."""
    rows = [(kind, *COLUMNS.values(), "network", "what it is")]
    for name in config.profiles(kind):
        written = text(name)
        values = yaml.safe_load(written)
        network = " ".join((values.get("arch", ""), f"width {values['width']}" if "width" in values else ""))
        settings = (str(values.get(option, "-")) for option in COLUMNS)
        rows.append((name, *settings, network.strip() or "-", written.splitlines()[0].removeprefix("# ")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
