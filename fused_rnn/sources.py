"""Where the C++ and CUDA sources are and how they are compiled.

``setup.py`` runs this file by its path, before there is a package: it imports nothing of fused_rnn.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10


def expect_torch() -> None:
    """Raises ImportError where torch is older than what the extension asks of it."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"fused_rnn needs torch 2.10 or later, found {torch.__version__}")


def csrc() -> Path:
    """The folder ``csrc``: in an installed package within it, in a checkout beside it."""
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / "csrc", package.parent / "csrc") if folder.is_dir())


def with_cuda() -> bool:
    """CUDA is built when torch has it and nvcc is there; FUSED_RNN_CUDA=0 leaves it out."""
    from torch.utils import cpp_extension  # slow to import, and needed to build alone

    return (
        os.environ.get("FUSED_RNN_CUDA") != "0"
        and torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
        and shutil.which("nvcc", path=os.path.join(cpp_extension.CUDA_HOME, "bin")) is not None
    )


def engines(cuda: bool) -> list[str]:
    """What is compiled around a list of cells, relative to ``csrc``; it needs no torch."""
    found = ["library.cpp", *_files("cpu/*.cpp")]
    return found + _files("cuda/*.cu") if cuda else found


def sources(cuda: bool) -> list[str]:
    """What the extension is compiled from, relative to ``csrc``."""
    # The plan of the CUDA engines is plain C++: every build can tell what a GPU would do.
    return [*engines(cuda), "cuda/plan.cpp", *_files("binding/*.cpp")]


def flags(cuda: bool) -> dict[str, list[str]]:
    """Of both compilers."""
    both = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-std=c++17"]
    # GCC 12 warns about its own AVX-512 headers, and of vector arguments that are always inlined.
    cxx = [
        *both,
        # What is hot is written in vectors and unrolled by hand. Of -O3 only loops over gates gain,
        # which -fpeel-loops unrolls; the rest doubles the size and the time to compile.
        "-O2",
        "-fpeel-loops",
        # Error messages name the source file; not where this machine keeps it.
        f"-fmacro-prefix-map={csrc().parent}/=",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    if not cuda:
        return {"cxx": cxx}
    version = f'-DFUSED_RNN_CUDA="{torch.version.cuda}"'
    return {"cxx": [*cxx, version, "-DUSE_CUDA"], "nvcc": [*both, "-O3", version]}


def _files(pattern: str) -> list[str]:
    folder = csrc()
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
