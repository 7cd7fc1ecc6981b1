"""Which implementation serves the operators, and how it says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_kernel
from torch.profiler import ProfilerActivity, profile

import dtrades_fast
from dtrades_fast import ops
from dtrades_fast.ops import _library

PACKAGE = Path(dtrades_fast.__file__).parent
WARNING = "dtrades_fast runs on its pure-PyTorch reference operators"

# Every operator once; prints what served them.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]  # PYTHONPATH alone decides
import torch
from dtrades_fast import ops
z, y, x, i = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.full((3, 5), 0.5), torch.arange(3)
ops.entropy_kl(z, z), ops.logit_grad_kl(z, z), ops.logit_grad_ce(z, y)
ops.sample_stats(x, x, x, 0.1), ops.lambda_x(z, x, 1.0, 1.0)
ops.pgd_step_(x.clone(), x, x, 0.1, 0.1), ops.random_start(x, i, "linf", 0.1, 1)
w = z.clone().requires_grad_()
ops.entropy_kl(w, z).kl.sum().backward()
print(ops.BACKEND.name, sorted(ops.BACKEND.devices), hasattr(torch.ops.dtrades_fast, "entropy_kl"))
"""


def python(code: str, backend: str | None, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in (_library.VARIABLE, "PYTHONPATH", "PYTHONWARNINGS")}
    environment["PYTHONPATH"] = str(path or PACKAGE.parent)
    if backend is not None:
        environment[_library.VARIABLE] = backend
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def not_compiled(tmp_path_factory):
    """A copy of the package as it is after a build that failed."""
    root = tmp_path_factory.mktemp("not_compiled")
    shutil.copytree(
        PACKAGE, root / "dtrades_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    )
    (root / "dtrades_fast" / "_build_info.py").write_text("TORCH = ''\nPROBLEMS = {'_C': 'no C++ compiler found'}\n")
    return root


# ---- whole processes -------------------------------------------------------------------------------------------------


def test_reference_on_request_says_so_once():
    result = python(USE, "reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "reference [] False"
    assert result.stderr.count("RuntimeWarning") == 1
    assert result.stderr.count(WARNING) == 1
    assert "DTRADES_FAST_BACKEND=reference" in result.stderr


def test_auto_without_the_module_falls_back_and_says_why_once(not_compiled):
    result = python(USE, None, not_compiled)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "reference [] False"
    assert result.stderr.count("RuntimeWarning") == 1
    assert result.stderr.count(WARNING) == 1
    assert "slower): no C++ compiler found" in result.stderr


def test_cpp_without_the_module_is_an_error(not_compiled):
    result = python(USE, "cpp", not_compiled)
    assert result.returncode != 0
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("dtrades_fast.ops._library.BackendError: DTRADES_FAST_BACKEND=cpp, but the kernels are not")
    assert "no C++ compiler found" in last
    assert "'dtrades-fast doctor'" in last
    assert WARNING not in result.stderr


@needs_kernel
def test_kernels_serve_by_default_without_a_word():
    result = python(USE, None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cpp ['cpu'")
    assert WARNING not in result.stderr


# ---- the decision itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """_load() with a given environment variable and given errors on importing the modules."""

    def run(backend: str | None, **errors: Exception):
        real = _library.importlib.import_module

        def import_module(name):
            module = name.split(".")[-1]
            if module in errors:
                if errors[module] is not None:
                    raise errors[module]
                return None
            return real(name)

        monkeypatch.setattr(_library.importlib, "import_module", import_module)
        if backend is None:
            monkeypatch.delenv(_library.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(_library.VARIABLE, backend)
        return _library._load()

    return run


MISSING = ModuleNotFoundError("No module named 'dtrades_fast._C'")


@pytest.mark.parametrize("value", ["c++", "cuda", "none", "1"])
def test_unknown_backend_is_reported(value, load, monkeypatch):
    backend = load(value, _C=None, _C_cuda=None)
    assert backend.error == f"DTRADES_FAST_BACKEND='{value}' is not a backend; allowed are auto, cpp, reference"
    monkeypatch.setattr(_library, "BACKEND", backend)
    with pytest.raises(ops.BackendError, match=r"allowed are auto, cpp, reference\. 'dtrades-fast doctor' shows"):
        ops.entropy_kl(torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("value", [None, "", "auto", " AUTO ", "cpp", "CPP"])
def test_kernels_are_taken_where_they_load(value, load, recwarn):
    backend = load(value, _C=None, _C_cuda=MISSING)
    assert backend.name == "cpp"
    assert backend.devices == {"cpu"}
    assert backend.error is None
    assert set(backend.problems) == {"_C_cuda"}
    assert not recwarn.list


def test_cuda_module_serves_cuda(load):
    assert load("auto", _C=None, _C_cuda=None).devices == {"cpu", "cuda"}


def test_cuda_module_that_does_not_load_leaves_the_cpu_kernels(load):
    broken = ImportError("libcudart.so.13: cannot open shared object file")
    with pytest.warns(RuntimeWarning, match=r"_C_cuda does not load.* cuda tensors.*libcudart\.so\.13") as caught:
        backend = load("auto", _C=None, _C_cuda=broken)
    assert len(caught) == 1
    assert (backend.name, backend.devices, backend.error) == ("cpp", {"cpu"}, None)
    assert str(broken) in backend.problems["_C_cuda"]


def test_module_that_does_not_load_is_named_with_its_reason(load):
    broken = ImportError("_C.abi3.so: undefined symbol: aoti_torch_something")
    with pytest.warns(RuntimeWarning, match="reference operators") as caught:
        backend = load("auto", _C=broken)
    assert len(caught) == 1
    assert backend.name == "reference"
    message = f"compiled, but does not load with torch {torch.__version__}: {broken}"
    assert backend.problems == {"_C": message}
    assert message in str(caught[0].message)
    assert message in load("cpp", _C=broken).error


def test_module_that_was_never_built(load):
    with pytest.warns(RuntimeWarning, match=r"not compiled \(run 'pip install \.' or 'pip install -e \.'"):
        load("auto", _C=MISSING, _build_info=ModuleNotFoundError("no build yet"))


def test_reference_does_not_touch_the_modules(load):
    with pytest.warns(RuntimeWarning, match="DTRADES_FAST_BACKEND=reference"):
        backend = load("reference", _C=AssertionError("imported"), _C_cuda=AssertionError("imported"))
    assert (backend.name, backend.devices, backend.problems, backend.error) == ("reference", frozenset(), {}, None)


# ---- this process ----------------------------------------------------------------------------------------------------


def test_backend_of_this_process():
    assert ops.BACKEND.error is None
    built = any(PACKAGE.glob("_C.*so"))
    wanted = os.environ.get(_library.VARIABLE, "auto")
    assert ops.BACKEND.name == ("cpp" if built and wanted != "reference" else "reference")
    assert ("none" in _library.simd_level()) == (ops.BACKEND.name == "reference")


def calls():
    z, x = torch.zeros(3, 4), torch.full((3, 5), 0.5)
    return {
        "entropy_kl": lambda: ops.entropy_kl(z, z),
        "entropy_kl_backward": lambda: ops.entropy_kl(z.clone().requires_grad_(), z).kl.sum().backward(),
        "logit_grad_kl": lambda: ops.logit_grad_kl(z, z),
        "logit_grad_ce": lambda: ops.logit_grad_ce(z, torch.zeros(3, dtype=torch.int64)),
        "sample_stats": lambda: ops.sample_stats(x, x, x, 0.1),
        "lambda_x": lambda: ops.lambda_x(z, x, 1.0, 1.0),
        "pgd_step_": lambda: ops.pgd_step_(x.clone(), x, x, 0.1, 0.1),
        "random_start": lambda: ops.random_start(x, torch.arange(3), "linf", 0.1, 1),
    }


@needs_kernel
@pytest.mark.parametrize("name", calls())
def test_kernel_is_what_runs(name):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        calls()[name]()
    assert f"dtrades_fast::{name}" in {event.name for event in trace.events()}


@needs_kernel
def test_kernel_and_twin_are_two_implementations(monkeypatch):
    """The tests that compare them would mean nothing if the public function ran the twin."""
    monkeypatch.setattr(ops.entropy_kl.__globals__["reference"], "entropy_kl", None)
    ops.entropy_kl(torch.zeros(3, 4), torch.zeros(3, 4))


def test_other_devices_are_served_by_the_twin():
    z = torch.zeros(3, 4, device="meta")
    assert ops.entropy_kl(z, z).kl.shape == (3,)
    assert ops.sample_stats(z, z, z, 0.1).fosc.device.type == "meta"
    assert ops.random_start(z, torch.zeros(3, dtype=torch.int64, device="meta"), "l2", 0.1, 1).shape == (3, 4)
