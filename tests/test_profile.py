"""Ranges for profilers: nothing while nobody listens, NVTX for who does; and bench/profile.py, which shows them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from torch import Tensor, nn

from dtrades_fast import models, profiling
from dtrades_fast.profiling import span

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
QUICK = ("--arch", "smallcnn", "--width", "2", "--batch-size", "4", "--attack-steps", "2", "--steps", "2")
QUICK += ("--warmup", "1", "--threads", "1", "--device", "cpu")


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    silent = {name: value for name, value in os.environ.items() if name not in profiling.LISTENERS}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**silent, **environment}, timeout=180)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_range", None)


@pytest.fixture
def names() -> list[str]:
    """Names of the ranges as they are entered."""
    entered: list[str] = []

    @contextmanager
    def note(name: str):  # type: ignore[no-untyped-def]
        entered.append(name)
        yield

    profiling.enable(note)
    return entered


# Without a listener


def test_no_range_is_made_while_nobody_listens(data: Path, tmp_path: Path) -> None:
    """Every span is the same object, which keeps no state, and a whole run does not even import nvtx."""
    assert span("one") is span("attack step", 7)
    assert type(span("one")) is nullcontext
    words = tiny_run.arguments(data, tmp_path, "--epochs", "1", "--run", "one")
    code = f"import sys; from dtrades_fast.cli import main; status = main(['train', *{words!r}]); "
    done = python("-c", code + "sys.exit(status or 'nvtx' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_silent_spans_cost_less_than_a_hundredth_of_a_step(data: Path, tmp_path: Path, names: list[str]) -> None:
    t = tiny_trainer(data, tmp_path)
    network = t.network(t.model)
    t.train_step(network)
    count = len(names)
    profiling.disable()
    began = time.perf_counter()
    t.train_step(network)
    step = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(1000):
        with span("attack step", 1):
            pass
    each = (time.perf_counter() - began) / 1000
    assert count > 10
    assert count * each < step / 100, f"{count} spans of {each * 1e9:.0f} ns in a step of {step * 1e3:.1f} ms"


def tiny_trainer(data: Path, runs: Path):  # type: ignore[no-untyped-def]
    from rich.console import Console

    from dtrades_fast import data as datasets
    from dtrades_fast.training.run_folder import RunFolder
    from dtrades_fast.training.trainer import Trainer

    config = tiny_run.configuration(data, runs).resolved("8/255")
    sets = datasets.load(config.data.dataset, "data", "cpu")
    return Trainer(config, sets, RunFolder(config.folder), Console(quiet=True))


# With one


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"NSYS_PROFILING_SESSION_ID": "7"}, True),
        ({"NVTX_INJECTION64_PATH": "/opt/tool.so"}, True),
        ({"NVTX_INJECTION64_PATH": ""}, False),
    ],
)
def test_who_listens(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    for name in profiling.LISTENERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert profiling.listening() is expected


def test_the_ranges_of_a_step(data: Path, tmp_path: Path, names: list[str]) -> None:
    t = tiny_trainer(data, tmp_path)
    t.train_step(t.network(t.model))
    gradient = ["forward", "logit gradient", "backward"]
    attack = ["attack", "start", "clean prediction"]
    for step in ("attack step 1", "attack step 2"):
        attack += [step, *gradient, "watch", "pgd_step_"]
    assert names == ["data", *attack, "sensitivity", *gradient, "forward", "backward", "optimizer", "figures"]


def test_a_tool_that_injects_itself_gets_nvtx_ranges(data: Path, tmp_path: Path) -> None:
    """A library written here listens in place of Nsight; begins and ends are matched."""
    library, heard = tmp_path / "listener.so", tmp_path / "heard.txt"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the listener")
    flags = [f"-I{folder}" for folder in nvtx_headers()]
    if not flags:
        pytest.skip("needs the NVTX headers, of the CUDA toolkit or the package nvidia-nvtx")
    source = Path(__file__).parent / "nvtx_listener.c"
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(source), "-o", str(library), "-ldl"], check=True)
    words = tiny_run.arguments(data, tmp_path, "--epochs", "3", "--run", "one")
    injected = {"NVTX_INJECTION64_PATH": str(library), "NVTX_LISTENER_OUT": str(heard)}
    done = python("scripts/train.py", *words, **injected)
    assert done.returncode == 0, done.stderr
    stack, seen = [], set()
    for line in heard.read_text().splitlines():
        if line == "dtrades_fast <":
            stack.pop()
        elif line.startswith("dtrades_fast > "):
            stack.append(line.removeprefix("dtrades_fast > "))
            seen.add(" / ".join(stack))
    assert not stack
    assert seen >= {"data", "attack", "forward", "backward", "optimizer", "evaluation"}
    assert seen >= {"attack / attack step 2 / pgd_step_", "evaluation / attack step 1 / backward"}


def nvtx_headers() -> list[Path]:
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    folders += [Path(path) / "nvidia" / "cu13" / "include" for path in sys.path]
    return [folder for folder in folders if (folder / "nvtx3" / "nvToolsExt.h").is_file()]


# Compiled and exported code


def with_span(x: Tensor) -> Tensor:
    with span("attack step", 1):
        return x.sin() + 1


@pytest.mark.parametrize("listened", [False, True])
def test_compiled_code_sees_no_span(names: list[str], listened: bool) -> None:
    if not listened:
        profiling.disable()
    x = torch.linspace(0, 1, 5)
    compiled = torch.compile(with_span, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x.sin() + 1)
    assert names == []


@pytest.mark.parametrize("listened", [False, True])
def test_a_model_is_exported_and_traced_in_training(names: list[str], listened: bool) -> None:
    if not listened:
        profiling.disable()
    model = models.create(
        "smallcnn", num_classes=3, in_channels=3, image_size=16, width=2, mean=(0.5,) * 3, std=(0.5,) * 3
    )

    class Spanned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            with span("forward"):
                return self.model(images)

    images = torch.rand(2, 3, 16, 16)
    spanned = Spanned().eval()
    program = torch.export.export(spanned, (images,))
    torch.testing.assert_close(program.module()(images), model(images))
    assert not [node for node in program.graph.nodes if "record" in str(node.target)]
    assert names == []


# bench/profile.py


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The script as a module, under another name than the standard library's."""
    import importlib.util

    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    spec = importlib.util.spec_from_file_location("bench_profile", BENCH / "profile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_profile", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["standard", "dtrades"])
def test_profile_on_the_cpu(tmp_path: Path, method: str) -> None:
    trace = tmp_path / "traces" / "trace.json"
    done = python(BENCH / "profile.py", *QUICK, "--method", method, "--trace", trace)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in map(str.strip, done.stdout.splitlines())}
    assert lines["step"].split()[-1] == "100.0%"
    expected = {"data", "forward", "backward", "optimizer"}
    expected |= {"attack step", "pgd_step_", "start"} if method == "dtrades" else set()
    assert lines.keys() >= expected
    if method == "dtrades":
        assert lines["attack step"].split()[-3] == "2"
    assert f"trace of 2 steps: {trace}" in done.stdout
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert events >= expected - {"attack step"}
    assert ("attack step 2" in events) == (method == "dtrades")


def test_profile_compiles_the_network(tmp_path: Path) -> None:
    """torch.compile imports the standard library's profile, which a script of that name would hide."""
    done = python(BENCH / "profile.py", *QUICK, "--compile", "aot_eager", "--trace", tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    assert "pgd_step_" in done.stdout


def test_the_other_benchmarks_find_the_standard_library() -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import harness, cProfile, profile; print(profile.__file__)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert str(BENCH) not in done.stdout


def test_profile_of_a_data_set(profile, data: Path) -> None:  # type: ignore[no-untyped-def]
    options = profile.parse([*QUICK, "--data", f"folder:{data}"])
    trainer = profile.make_trainer(options)
    step = profile.make_step(trainer, None)
    for _ in range(options.warmup + options.steps):
        step()
    assert trainer.step == 3
    assert not trainer.folder.path.exists()


def event(name: str, start: float, end: float, parent=None, annotation: bool = True):  # type: ignore[no-untyped-def]
    times = SimpleNamespace(start=start)
    return SimpleNamespace(
        name=name, time_range=times, cpu_time_total=end - start, cpu_parent=parent, is_user_annotation=annotation
    )


def test_the_table_adds_up(profile) -> None:  # type: ignore[no-untyped-def]
    """Two steps; calls of one name in one place are one row, what lies outside a step is none."""
    events = []
    for start in (0, 10_000):
        step = event("step", start, start + 8000)
        attack = event("attack step 1", start + 10, start + 2010, step)
        again = event("attack step 2", start + 3000, start + 5000, step)
        aten = event("aten::add", start + 3001, start + 3005, again, annotation=False)
        kernel = event("dtrades_fast::pgd_step_", start + 3002, start + 3004, aten, annotation=False)
        events += [kernel, aten, again, attack, step]
    rows = profile.rows_of([*events, event("warm-up", 50_000, 60_000)])
    assert [(row.path, row.count, row.total_ms) for row in rows] == [
        (("step",), 2, 16.0),
        (("step", "attack step"), 4, 8.0),
        (("step", "attack step", "dtrades_fast::pgd_step_"), 2, 0.004),
    ]
    lines = profile.table(rows, 2).splitlines()
    assert lines[1].split() == ["step", "1", "8.00", "100.0%"]
    assert lines[2].split() == ["attack", "step", "2", "4.00", "50.0%"]


def test_on_a_gpu_the_profiler_records_the_measured_steps_alone(profile, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    done: list[str] = []

    @contextmanager
    def note(name: str):  # type: ignore[no-untyped-def]
        done.append(f"{name} on")
        yield
        done.append(f"{name} off")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: note("profiler"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: note("operators"))
    assert profile.profile_cuda(lambda: done.append("step"), 2) > 0
    assert done == ["wait", "profiler on", "operators on", "step", "step", "wait", "operators off", "profiler off"]
    assert profiling._range is profiling.nvtx_range


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "magic"), "invalid choice: 'magic'"),
        (("--steps", "0"), "must be a whole number of at least 1"),
        (("--warmup", "none"), "must be a whole number of at least 1"),
        (("--device", "cuda:99"), "cuda:99 is not available here"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
    ],
)
def test_wrong_options(profile, capsys: pytest.CaptureFixture[str], words, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stopped:
        profile.parse(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
