"""Compiles the kernels. What cannot be compiled is left out with a warning: the pure-PyTorch twins then serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "_build"))
import cuda_toolkit  # noqa: E402

CUDA_HOME = cuda_toolkit.find_toolkit()
if CUDA_HOME is not None:  # both are read when torch.utils.cpp_extension is imported
    os.environ["CUDA_HOME"] = str(CUDA_HOME)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_toolkit.ARCHITECTURES)

# The oldest torch whose stable ABI the extension uses, as 0xMMmmpp...: one build serves this and every later version.
TORCH_TARGET_VERSION = "0x020d000000000000"
PYTHON_LIMITED_API = "0x030A0000"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    # As torch itself is built; without -fno-trapping-math comparisons stay scalar and the PGD step is 20 times slower.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors are only passed between functions that are inlined
    "-Wno-maybe-uninitialized",  # false alarms on the lanes beyond a row's tail
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PYTHON_LIMITED_API}",
]
LINK_FLAGS = ["-Wl,-s"] if sys.platform.startswith("linux") else []  # no symbols: a third of the size
SERVES = {"_C": "all", "_C_cuda": "CUDA"}
#: module -> why it was left out; written into the package for 'dtrades-fast doctor'
problems: dict[str, str] = {}


def extensions() -> list:
    """The extension modules that this machine can try to build."""
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except Exception as error:  # a broken torch raises more than ImportError
        problems["_C"] = f"torch could not be imported for the build: {error}"
        return []
    found = [
        CppExtension(
            "dtrades_fast._C",
            _sources("csrc/cpu/*.cpp", "csrc/ops/*.cpp", "csrc/ops/cpu/*.cpp"),
            depends=_sources("csrc/**/*.h"),
            py_limited_api=True,
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=LINK_FLAGS,
        )
    ]
    if why := cuda_toolkit.why_not(CUDA_HOME, torch.version.cuda):
        problems["_C_cuda"] = why
        return found
    assert CUDA_HOME is not None
    nvcc_flags = [*cuda_toolkit.NVCC_FLAGS, "-Xcompiler=-fvisibility=hidden"]
    if cuda_toolkit.toolkit_version(CUDA_HOME) >= (12, 8):
        nvcc_flags.append("--compress-mode=size")  # a fifth of the size
    found.append(
        # not CUDAExtension, which links what a torch without CUDA does not have
        CppExtension(
            "dtrades_fast._C_cuda",
            _sources("csrc/cuda/*.cu", "csrc/ops/cuda/*.cpp"),
            depends=_sources("csrc/**/*.h", "csrc/**/*.cuh"),
            include_dirs=[str(CUDA_HOME / "include")],
            library_dirs=[str(CUDA_HOME / lib) for lib in ("lib64", "lib") if (CUDA_HOME / lib).is_dir()],
            libraries=["cudart"],
            py_limited_api=True,
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags},
            extra_link_args=LINK_FLAGS,
        )
    )
    return found


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def _torch_build_ext() -> type[Command]:
    try:
        from torch.utils.cpp_extension import BuildExtension
    except Exception:
        return build_ext
    return BuildExtension


class OptionalBuildExt(_torch_build_ext()):  # type: ignore[misc]
    """Builds what compiles; a failure becomes a warning and a line in dtrades_fast/_build_info.py."""

    def run(self) -> None:
        wanted, compiler, inplace = list(self.extensions), self.compiler, self.inplace
        for extension in wanted:
            # run() puts the compiler in place of its name, and leaves inplace changed when it fails
            self.extensions, self.compiler, self.inplace = [extension], compiler, inplace
            try:
                super().run()
            except (Exception, SystemExit) as error:
                name = extension.name.rsplit(".", 1)[1]
                problems[name] = f"compiling it failed: {_first_error(error)}"
                wanted = [other for other in wanted if other is not extension]
        self.extensions, self.inplace = wanted, inplace
        _warn()
        if not self.inplace and not self.editable_mode:
            _write_build_info(Path(self.build_lib))
        else:
            _write_build_info(ROOT)


class BuildPy(build_py):
    """Notes what was left out also when there is no extension to build at all."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            _warn()
            _write_build_info(ROOT if self.editable_mode else Path(self.build_lib))


def _first_error(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = next((line for line in text.splitlines() if "error" in line.lower()), text.splitlines()[0])
    return line[:300]


def _warn() -> None:
    for name, why in problems.items():
        print(
            f"WARNING: dtrades_fast.{name} was not built ({why}). dtrades_fast is installed and works; pure-PyTorch "
            f"operators serve {SERVES[name]} tensors. 'dtrades-fast doctor' shows this again.",
            file=sys.stderr,
        )


def _write_build_info(root: Path) -> None:
    try:
        import torch

        version = torch.__version__
    except Exception:
        version = "none"
    target = root / "dtrades_fast" / "_build_info.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        '"""Written by the build: what it was built against, and which modules were left out and why."""\n\n'
        f"TORCH = {version!r}\nPROBLEMS: dict[str, str] = {problems!r}\n"
    )


os.chdir(ROOT)
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
