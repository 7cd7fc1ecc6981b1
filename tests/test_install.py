"""`pip install .`: builds against the torch that is there, downloads no second one, and survives a broken compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "_build", "csrc", "dtrades_fast")
OFFLINE = ("No matching distribution found for setuptools", "No matching distribution found for ninja", "Connection")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, without anything built."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(tree: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """The unpacked wheel that plain `pip wheel` makes, with build isolation, and what pip printed."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(target), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    log = result.stdout + result.stderr
    if result.returncode and any(sign in log for sign in OFFLINE):
        pytest.skip("no package index is reached, which build isolation needs for setuptools and ninja")
    assert result.returncode == 0, log[-4000:]
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target / "unpacked")
    return target / "unpacked", log


def python(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the unpacked wheel in front of whatever is installed."""
    script = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    # a child in an empty folder, without the paths that an editable installation puts into sys.meta_path first
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; {script}",
        ],
        capture_output=True,
        text=True,
        cwd=path,
        check=False,
    )


USE = (
    "import torch; from dtrades_fast import ops; z = torch.randn(4, 10); "
    "print(ops.BACKEND.name, float(ops.entropy_kl(z, z).kl.sum()), ops.__file__)"
)


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build(tree, tmp_path_factory.mktemp("wheel"))


def test_pip_downloads_no_torch(wheel: tuple[Path, str]) -> None:
    fetched = re.findall(
        r"^\s*(?:Collecting|Downloading|Processing|Installing collected packages:)\s+(.*)$", wheel[1], re.M
    )
    assert any("setuptools" in line for line in fetched)  # the log does show what pip fetches
    assert not [line for line in fetched if re.search(r"\btorch\b|nvidia|triton", line.replace(str(ROOT), ""))]


def test_wheel_has_the_kernels_and_they_serve(wheel: tuple[Path, str]) -> None:
    package = wheel[0] / "dtrades_fast"
    assert (package / "_C.abi3.so").is_file()
    assert (package / "recipes" / "quick.yaml").is_file()
    result = python(wheel[0], USE)
    assert result.stdout.split()[:2] == ["cpp", "0.0"], result.stderr
    assert str(wheel[0]) in result.stdout


def test_wheel_has_the_cuda_kernels_where_there_is_a_toolkit(wheel: tuple[Path, str], toolkit) -> None:
    module = wheel[0] / "dtrades_fast" / "_C_cuda.abi3.so"
    if why := toolkit.why_not(toolkit.find_toolkit(), torch.version.cuda):
        assert not module.exists()
        pytest.skip(f"the CUDA kernels are not compiled here: {why}")
    operators = re.findall(r"m\.def\(\s*\"(\w+)\(", (ROOT / "csrc" / "ops" / "schema.cpp").read_text())
    on_devices = [name for name in operators if name != "simd_level"]
    assert len(on_devices) >= 9
    result = python(
        wheel[0],
        "import torch; from dtrades_fast import ops; has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        f"print(sorted(ops.BACKEND.devices), [n for n in {on_devices} if not has('dtrades_fast::' + n, 'CUDA')])",
    )
    assert result.stdout.strip() == "['cpu', 'cuda'] []", result.stderr
    assert module.stat().st_size < 8e6


@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
def test_wheel_is_for_any_python_and_uses_the_stable_abi_only(wheel: tuple[Path, str], library: str) -> None:
    (name,) = (path.name for path in wheel[0].parent.glob("*.whl"))
    assert "-cp310-abi3-" in name
    path = wheel[0] / "dtrades_fast" / f"{library}.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    if library == "_C_cuda" and not path.exists():
        pytest.skip("the CUDA kernels are not compiled here")
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True)
    assert "aoti_torch" in symbols.stdout
    assert not re.search(r"\b(at|c10)::", symbols.stdout)


def test_broken_compiler_leaves_a_working_package(tree: Path, tmp_path: Path) -> None:
    path, log = build(tree, tmp_path, CXX="/bin/false", CC="/bin/false")
    assert "WARNING: dtrades_fast._C was not built" in log
    assert not list(path.glob("dtrades_fast/*.so"))
    result = python(path, USE)
    assert result.stdout.startswith("reference 0.0"), result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "compiling it failed" in result.stderr


def test_broken_cuda_compiler_leaves_the_cpu_kernels(tree: Path, tmp_path: Path, toolkit) -> None:
    home = fake_toolkit(tmp_path / "cuda", torch.version.cuda or "13.0")
    path, log = build(tree, tmp_path / "wheel", CUDA_HOME=str(home), FORCE_CUDA="1", USE_CUDA="1")
    assert "WARNING: dtrades_fast._C_cuda was not built (compiling it failed" in log
    assert "pure-PyTorch operators serve CUDA tensors" in log
    assert [library.name for library in path.glob("dtrades_fast/*.so")] == ["_C.abi3.so"]
    result = python(path, USE + "; print(ops.BACKEND.problems['_C_cuda'])")
    assert result.stdout.startswith("cpp 0.0"), result.stderr
    assert "compiling it failed" in result.stdout
    assert "RuntimeWarning" not in result.stderr


# ---- the CUDA toolkit ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toolkit():
    """The build's module that looks for one."""
    spec = importlib.util.spec_from_file_location("toolkit_under_test", ROOT / "_build" / "cuda_toolkit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_toolkit(home: Path, version: str) -> Path:
    """A toolkit whose nvcc knows its version and compiles nothing."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ntest "$1" = --version && echo "Cuda compilation tools, release {version}, V{version}.1"\n'
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def no_toolkit(toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Neither variables nor the usual places name a toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "USE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "USUAL_HOMES", ())
    return toolkit


def test_toolkit_is_found_by_variable_and_path_but_not_through_a_wrapper(no_toolkit, tmp_path, monkeypatch) -> None:
    assert no_toolkit.find_toolkit() is None
    wrapper = tmp_path / "nvcc"  # its folder's parent is no toolkit
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    assert no_toolkit.find_toolkit() is None
    home = fake_toolkit(tmp_path / "cuda-13", "13.0")
    monkeypatch.setattr(no_toolkit, "USUAL_HOMES", (str(home),))
    assert no_toolkit.find_toolkit() == home
    monkeypatch.setattr(no_toolkit, "USUAL_HOMES", ())
    monkeypatch.setenv("PATH", str(home / "bin"))
    assert no_toolkit.find_toolkit() == home
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # without bin/nvcc: not taken
    assert no_toolkit.find_toolkit() is None
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert no_toolkit.find_toolkit() == home
    (home / "include" / "cuda_runtime.h").unlink()
    assert no_toolkit.find_toolkit() is None


@pytest.mark.parametrize(
    ("torch_cuda", "environment", "why"),
    [
        ("13.0", {}, None),
        ("13.2", {}, None),
        ("12.8", {}, "is CUDA 13.0, but the installed torch was built with CUDA 12.8"),
        ("12.8", {"FORCE_CUDA": "1"}, None),
        (None, {}, "the installed torch has no CUDA"),
        (None, {"FORCE_CUDA": "0"}, "the installed torch has no CUDA"),
        (None, {"FORCE_CUDA": "1"}, None),
        ("13.0", {"USE_CUDA": "0"}, "USE_CUDA=0"),
        ("13.0", {"USE_CUDA": "0", "FORCE_CUDA": "1"}, "USE_CUDA=0"),
    ],
)
def test_which_toolkit_compiles_for_which_torch(
    torch_cuda, environment, why, no_toolkit, tmp_path, monkeypatch
) -> None:
    home = fake_toolkit(tmp_path / "cuda", "13.0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = no_toolkit.why_not(home, torch_cuda)
    assert found is None if why is None else why in found
    if "USE_CUDA" not in environment:
        assert "no CUDA toolkit" in no_toolkit.why_not(None, torch_cuda)


# ---- the backend -----------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("backend_under_test", ROOT / "_build" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # as in pip's isolated environment, where torch cannot be imported
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return module


def test_every_hook_lends_the_installed_torch(backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\n__version__ = '2.13.0+cpu'\n")
    monkeypatch.setattr(backend, "_site_packages", lambda: [str(tmp_path)])
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []
    for hook in (
        "build_wheel",
        "build_editable",
        "prepare_metadata_for_build_wheel",
        "prepare_metadata_for_build_editable",
    ):
        monkeypatch.setattr(sys, "path", list(sys.path))
        seen: list[str] = []
        monkeypatch.setattr(backend.build_meta, hook, lambda *_, seen=seen: seen.extend(sys.path), raising=False)
        getattr(backend, hook)("somewhere")
        assert seen[-1] == str(tmp_path), hook


@pytest.mark.parametrize("version", [None, "2.9.1", "1.13.0"])
def test_torch_is_asked_for_where_there_is_none_or_an_old_one(
    backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(backend, "_site_packages", lambda: [str(tmp_path)])
    assert backend.get_requires_for_build_wheel() == ["torch>=2.13"]
    assert backend.get_requires_for_build_editable() == ["torch>=2.13"]
