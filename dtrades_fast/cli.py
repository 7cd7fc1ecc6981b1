"""The command ``dtrades-fast``: sub-commands, and how errors become messages and exit statuses.

Exit status: 0 done, 1 failed, 2 wrong usage, 128 + signal when a signal stopped training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["main"]

DEBUG = "DTRADES_FAST_DEBUG"


def train(argv: Sequence[str], prog: str) -> int:
    """Train a classifier into a run folder, or go on with a run."""
    from dtrades_fast import config
    from dtrades_fast.training.trainer import Interrupted, train

    try:
        train(config.parse(argv, prog))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0


def evaluate(argv: Sequence[str], prog: str) -> int:
    """Accuracy of trained runs, clean and under attack."""
    from dtrades_fast.evaluation.evaluate import main

    return main(argv, prog)


def study(argv: Sequence[str], prog: str) -> int:
    """Train and evaluate a grid of runs: skip what is finished, go on with what was killed."""
    from dtrades_fast.study.study import main
    from dtrades_fast.training.trainer import Interrupted

    try:
        return main(argv, prog)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum


def status(argv: Sequence[str], prog: str) -> int:
    """How far the runs of a study are."""
    from dtrades_fast.study.study import status_main

    return status_main(argv, prog)


def report(argv: Sequence[str], prog: str) -> int:
    """Tables, statistics and one HTML page of a study."""
    from dtrades_fast.study.report import main

    return main(argv, prog)


def plot(argv: Sequence[str], prog: str) -> int:
    """Pictures of trained runs: curves, lambda, adversarial images."""
    from dtrades_fast.plot.plot import main

    return main(argv, prog)


def export(argv: Sequence[str], prog: str) -> int:
    """A trained run as a RobustBench-style checkpoint with a model card."""
    from dtrades_fast.evaluation.export import main

    return main(argv, prog)


def recipes(argv: Sequence[str], prog: str) -> int:
    """Published settings and settings for a machine: list them, or print one."""
    from dtrades_fast.recipes import main

    return main(argv, prog)


def bench(argv: Sequence[str], prog: str) -> int:
    """Time the operators (in a checkout of the repository)."""
    script = Path(__file__).parent.parent / "bench" / "bench_ops.py"
    if not script.is_file():
        raise RuntimeError(
            f"{prog} runs bench/bench_ops.py, which is in the repository and not in the installed package: "
            "clone it, 'pip install -e .' there and run this again"
        )
    return subprocess.run([sys.executable, str(script), *argv]).returncode


def doctor(argv: Sequence[str], prog: str) -> int:
    """What is installed, what is in use and why; status 1 if what you ask for cannot work."""
    from dtrades_fast.doctor import main

    return main(argv, prog)


COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "train": train,
    "evaluate": evaluate,
    "study": study,
    "status": status,
    "report": report,
    "plot": plot,
    "export": export,
    "recipes": recipes,
    "bench": bench,
    "doctor": doctor,
}


def usage() -> str:
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: dtrades-fast COMMAND [OPTIONS]",
            "",
            "Train, attack and compare adversarially robust image classifiers.",
            "",
            *lines,
            "",
            "dtrades-fast COMMAND --help lists a command's options. --debug shows the traceback of an error.",
        )
    )


def main(argv: Sequence[str] | None = None, prog: str = "dtrades-fast") -> int:
    """Run the command line and return its exit status; torch is imported only by the command that needs it."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get(DEBUG, "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        import dtrades_fast

        print(dtrades_fast.__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"error: unknown command {words[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:], f"{prog} {words[0]}")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """One message on stderr. Options that are not possible are ValueErrors; all else is a failure."""
    foreseen = isinstance(error, (ValueError, OSError, RuntimeError, ModuleNotFoundError))
    message = str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    print(f"error{' in process ' + os.environ.get('RANK', '?') if several else ''}: {message}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
