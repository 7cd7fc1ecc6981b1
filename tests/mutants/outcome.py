"""What becomes of a mutant: it is compiled for the emulator and put before the cases."""

from __future__ import annotations

import tempfile
from pathlib import Path

import builds
import emulator
import torch
from mutate import Mutant
from suite import check, check_briefly

KILLED, SURVIVED, STILLBORN = "killed", "survived", "does not compile"
SECONDS = 5  # of processor time for the cases of one operator, which take a tenth of that: a mutant may never end
# The results first, in each width of a pack; what does not show in them may be memory that is not theirs, or a race.
STAGES = (
    ("plain", "float32", check),
    ("plain", "float64", check),
    ("plain", "float16", check),
    ("asan", "float32", check_briefly),
    ("tsan", "float32", check_briefly),
)


def outcome(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, operators = mutant.plant(Path(folder)), mutant.operators
        for kind, dtype, cases in STAGES:
            # where several operators share the code, the first has rows and the last images: enough for what is slow
            for operator in operators if cases is check else sorted({operators[0], operators[-1]}):
                try:
                    program = builds.build(kind, [operator], [dtype], source)
                except RuntimeError:
                    return STILLBORN
                try:
                    cases(operator, getattr(torch, dtype), _limited(program))
                except (AssertionError, emulator.EmulatorError):
                    return KILLED
                finally:
                    emulator._server.cache_clear()  # ends the program: one of two thousand
                    program.unlink()
    return SURVIVED


def _limited(program: Path) -> Path:
    script = program.with_suffix(".sh")
    script.write_text(f"#!/bin/sh\nulimit -t {SECONDS}\nexec {program}\n")
    script.chmod(0o700)
    return script
