"""Builds fused_rnn._C; everything that is not compiled is declared in pyproject.toml."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fused_rnn is built against torch 2.10 or later, which is not importable here "
        f"({error}). Install torch first, then: pip install --no-build-isolation ."
    ) from error

from setuptools import setup

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise SystemExit(f"fused_rnn needs torch 2.10 or later, found {torch.__version__}.")


def with_cuda() -> bool:
    """CUDA is built when torch has it and nvcc is there; FUSED_RNN_CUDA=0 or 1 overrides."""
    wanted = os.environ.get("FUSED_RNN_CUDA")
    if wanted is not None:
        return wanted == "1"
    return (
        torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
        and shutil.which("nvcc", path=os.path.join(cpp_extension.CUDA_HOME, "bin")) is not None
    )


def extension():
    sources = ["csrc/binding.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-std=c++17", "-O3", "-g0"]
    # GCC 12 warns about its own AVX-512 headers, and of vector arguments that are always inlined.
    cxx = [*flags, "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    headers = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in (".h", ".cuh")]
    if not with_cuda():
        return cpp_extension.CppExtension(
            "fused_rnn._C", sources, extra_compile_args={"cxx": cxx}, depends=headers
        )
    sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    version = f'-DFUSED_RNN_CUDA="{torch.version.cuda}"'
    return cpp_extension.CUDAExtension(
        "fused_rnn._C",
        sources,
        extra_compile_args={"cxx": [*cxx, version, "-DUSE_CUDA"], "nvcc": [*flags, version]},
        depends=headers,
    )


os.chdir(ROOT)
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    packages=["fused_rnn", "fused_rnn.kernels", "fused_rnn.bench"],
    package_dir={"fused_rnn.kernels": "kernels", "fused_rnn.bench": "bench"},
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
