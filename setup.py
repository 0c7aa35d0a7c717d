"""Builds fused_rnn._C; everything that is not compiled is declared in pyproject.toml."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fused_rnn is built against torch 2.10 or later, and with pybind11, setuptools, wheel and "
        f"ninja ({error}). Install those first, then: pip install --no-build-isolation ."
    ) from error

from setuptools import setup

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise SystemExit(f"fused_rnn needs torch 2.10 or later, found {torch.__version__}.")


def with_cuda() -> bool:
    """CUDA is built when torch has it and nvcc is there; FUSED_RNN_CUDA=0 leaves it out."""
    return (
        os.environ.get("FUSED_RNN_CUDA") != "0"
        and torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
        and shutil.which("nvcc", path=os.path.join(cpp_extension.CUDA_HOME, "bin")) is not None
    )


def extension():
    # The plan of the CUDA engines is plain C++: every build can tell what a GPU would do.
    sources = ["csrc/binding.cpp", "csrc/cuda/plan.cpp"]
    sources += sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    headers = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-std=c++17", "-O3"]
    # Error messages name the source file; not where this machine keeps it.
    prefix = f"-fmacro-prefix-map={Path.cwd()}/="
    # GCC 12 warns about its own AVX-512 headers, and of vector arguments that are always inlined.
    cxx = [
        *flags,
        prefix,
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    common = {
        "name": "fused_rnn._C",
        # Before torch's: some torch releases ship a pybind11 that refuses stable-ABI builds.
        "include_dirs": [pybind11.get_include()],
        "depends": headers,
    }
    if not with_cuda():
        return cpp_extension.CppExtension(
            sources=sources, extra_compile_args={"cxx": cxx}, **common
        )
    version = f'-DFUSED_RNN_CUDA="{torch.version.cuda}"'
    # Makes a kernel that waits for ever an error (csrc/cuda/device.cuh); slower.
    watchdog = ["-DFUSED_RNN_WATCHDOG"] if os.environ.get("FUSED_RNN_WATCHDOG") == "1" else []
    return cpp_extension.CUDAExtension(
        sources=[*sources, *sorted(map(str, Path("csrc/cuda").glob("*.cu")))],
        extra_compile_args={
            "cxx": [*cxx, version, "-DUSE_CUDA"],
            "nvcc": [*flags, version, *watchdog],
        },
        **common,
    )


os.chdir(Path(__file__).parent)
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    packages=["fused_rnn", "fused_rnn.kernels", "fused_rnn.bench"],
    package_dir={"fused_rnn.kernels": "kernels", "fused_rnn.bench": "bench"},
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
