"""Everything that a machine with a GPU can say about this package: ``python scripts/gpu_check.py``.

Builds the kernels, runs the operators' tests on the device, again under each tool of compute-sanitizer, the tests of
CUDA graphs, sizes beyond 2^31 and training, a training step of each method, and the benchmarks of a step and of the
operators. A check that fails does not stop the others. All goes into one report, bench/results/gpu-check-GPU.md, which
is complete after each check. Exit status: 0 nothing failed, 1 a check failed, 3 no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dtrades_fast import defenses

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

from harness import RESULTS, machine, some_of  # noqa: E402

PYTHON = sys.executable
NO_GPU = 3
TAIL_LINES = 30  #: of a check's output in the report
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


# ---- the checks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A command that ends with status 0 if all is well.

    Attributes:
        name: as ``--only`` takes it.
        command: its words, run in the root of the repository.
        minutes: after which it has failed.
        environment: variables beside those of this process.
    """

    name: str
    command: Sequence[str]
    minutes: float = 10
    environment: Mapping[str, str] | None = None


def pytest(*words: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", *words]


def sanitizer(tool: str, executable: str) -> Check:
    """The oracle tests under one tool. It watches our kernels alone, except for initcheck, which must see who writes
    their inputs; torch's caching of memory would hide accesses beyond the end of a tensor."""
    command = [executable, "--tool", tool, "--error-exitcode", "9"]
    if tool != "initcheck":
        command += ["--kernel-name", "kernel_substring=dtf"]
    command += pytest("tests/gpu/test_gpu_operators.py", "-k", "oracle")
    return Check(tool, command, 60, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def checks(tools: Mapping[str, str], out: Path) -> list[Check]:
    """All of them, in their order; ``tools`` are the paths of NVIDIA's, by name, a missing one simply its name."""
    load = "from dtrades_fast.ops import BACKEND; print(BACKEND); assert 'cuda' in BACKEND.devices"
    profile = [PYTHON, "bench/profile.py", "--device", "cuda", "--warmup", "1", "--steps", "1"]
    report = str(out / "nsight")
    nsight = [tools["nsys"], "profile", "-t", "cuda,nvtx", "-c", "cudaProfilerApi", "--capture-range-end", "stop"]
    nsight += ["--force-overwrite", "true", "-o", report, *profile]
    return [
        Check("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 60),
        Check("load", [PYTHON, "-c", load]),
        Check("doctor", [PYTHON, "-m", "dtrades_fast", "doctor", "--device", "cuda"]),
        Check("operators", pytest("tests/gpu/test_gpu_operators.py"), 30),
        *(sanitizer(tool, tools["compute-sanitizer"]) for tool in SANITIZERS),
        Check("graph", pytest("tests/gpu/test_gpu_training.py", "-k", "graph")),
        Check("large", pytest("tests/gpu/test_gpu_kernels.py", "-k", "large")),
        Check("kernels", pytest("tests/gpu/test_gpu_kernels.py", "-k", "not large")),
        Check("training", pytest("tests/gpu/test_gpu_training.py", "-k", "not graph"), 30),
        *(Check(f"step-{method}", [*profile, "--method", method]) for method in defenses.names()),
        Check("nsight", nsight),
        Check("bench-step", [PYTHON, "bench/bench_step.py", "--device", "cuda", "--output", str(out)], 30),
        Check("bench", [PYTHON, "bench/bench_ops.py", "--device", "cuda", "--out", str(out)], 30),
    ]


def find_tools() -> dict[str, str]:
    """NVIDIA's programs: in PATH, in the toolkit, or in the package nvidia-cuda-sanitizer-api; else their names."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *(f"{path}/nvidia/cu13" for path in sys.path)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return {name: shutil.which(name, path=path) or name for name in ("compute-sanitizer", "nsys")}


# ---- running them --------------------------------------------------------------------------------------------------

#: Runs a check and returns its exit status and output; raises FileNotFoundError or subprocess.TimeoutExpired.
Runner = Callable[[Check], tuple[int, str]]


@dataclass(frozen=True)
class Outcome:
    """How a check ended, why if it was skipped or could not run, and what it printed."""

    check: Check
    status: Literal["pass", "fail", "skip"]
    why: str
    output: str
    seconds: float


def run(check: Check) -> tuple[int, str]:
    done = subprocess.run(
        check.command,
        cwd=ROOT,
        env={**os.environ, **(check.environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60 * check.minutes,
    )
    return done.returncode, done.stdout


def outcome(check: Check, runner: Runner) -> Outcome:
    """Run a check and judge it."""
    began = time.monotonic()
    try:
        status, output = runner(check)
    except FileNotFoundError:
        return Outcome(check, "skip", f"{check.command[0]} is not installed", "", 0.0)
    except subprocess.TimeoutExpired as late:
        output = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
        return Outcome(check, "fail", f"not done after {check.minutes:g} minutes", output, time.monotonic() - began)
    seconds = time.monotonic() - began
    if status:
        return Outcome(check, "fail", f"exit status {status}", output, seconds)
    if (reason := only_skipped(output)) is not None:
        return Outcome(check, "skip", reason, output, seconds)
    return Outcome(check, "pass", "", output, seconds)


def only_skipped(output: str) -> str | None:
    """Why pytest, with a status of 0, has run no test at all."""
    if not re.search(r"^\d+ skipped", output, re.MULTILINE):
        return None
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+?: (.*)", output, re.MULTILINE)
    return "; ".join(dict.fromkeys(reasons)) or "every test was skipped"


# ---- the report ----------------------------------------------------------------------------------------------------


def report(description: Mapping[str, Any], outcomes: Sequence[Outcome], planned: int) -> str:
    """Markdown: what was tested on what, a line per check, then the end of what each printed."""
    counts = {status: sum(o.status == status for o in outcomes) for status in ("pass", "fail", "skip")}
    verdict = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"# GPU check: {description['device']}", "", f"{verdict}, of {planned} checks.", ""]
    for name, value in description.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        lines.append(f"- {name}: {shown}")
    lines += ["", "| check | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.check.name} | {o.status} | {o.seconds:.0f} | {o.why} |" for o in outcomes]
    for o in outcomes:
        tail = o.output.strip().splitlines()[-TAIL_LINES:]
        variables = [f"{name}={value}" for name, value in (o.check.environment or {}).items()]
        command = " ".join([*variables, *o.check.command])
        lines += ["", f"## {o.check.name}: {o.status}", "", "```", f"$ {command}", *tail, "```"]
    return "\n".join(lines) + "\n"


def describe() -> dict[str, Any] | None:
    """The machine with its GPU, or None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {**machine(torch.device("cuda")), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=some_of("check", names), default=list(names), metavar="A,B",
                        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR",
                        help="where the report and the benchmark's table go (default: bench/results)")  # fmt: skip
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None, runner: Runner = run, gpu: Callable[[], dict[str, Any] | None] = describe
) -> int:
    tools = find_tools()
    options = parse(argv, [check.name for check in checks(tools, RESULTS)])
    if (description := gpu()) is None:
        print("no GPU", file=sys.stderr)
        return NO_GPU
    chosen = [check for check in checks(tools, options.out) if check.name in options.only]
    name = re.sub(r"[^a-z0-9]+", "-", description["device"].lower()).strip("-")
    path = options.out / f"gpu-check-{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for check in chosen:
        outcomes.append(outcome(check, runner))
        path.write_text(report(description, outcomes, len(chosen)))
        last = outcomes[-1]
        print(f"{last.status}  {check.name}  {last.seconds:.0f} s  {last.why}", flush=True)
    print(f"report: {path}")
    return int(any(o.status == "fail" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
