"""Compiles pieces of csrc for tests, each once per source state, into the build folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pybind11
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "tests"

_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def shared_library(name: str, commands: list[list[str]], link: list[str] = ()) -> Path:
    """Runs the compile ``commands`` (each without its -o) and links them into one library.

    Libraries and objects are kept under names that hold a hash of the commands and of every file
    that they may include.
    """
    return _linked(name, ".so", commands, ["-shared", *link])


def program(name: str, commands: list[list[str]], link: list[str] = ()) -> Path:
    """The same for a program."""
    return _linked(name, ".run", commands, link)


def _linked(name: str, suffix: str, commands: list[list[str]], link: Sequence[str]) -> Path:
    state = _state_of_sources()
    library = BUILD / f"{name}-{_digest(state, commands, link)}{suffix}"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = [BUILD / f"{_digest(state, command)}.o" for command in commands]
    running = [
        (subprocess.Popen([*command, "-o", f"{obj}.{os.getpid()}"], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True), obj)
        for command, obj in zip(commands, objects, strict=True) if not obj.exists()
    ]  # fmt: skip
    for process, obj in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        Path(f"{obj}.{os.getpid()}").rename(obj)
    linked = Path(f"{library}.{os.getpid()}")
    subprocess.run([cxx(), *map(str, objects), "-o", str(linked), *link], check=True)
    for old in BUILD.glob(f"{name}-*{suffix}"):
        old.unlink()
    linked.rename(library)
    forget_old_objects()
    return library


def forget_old_objects() -> None:
    """Removes the objects of earlier states of the sources."""
    now = max(path.stat().st_mtime for path in _sources())
    for obj in BUILD.glob("*.o"):
        if obj.stat().st_mtime < now:
            obj.unlink()


def _sources() -> list[Path]:
    folders = (CSRC, *(ROOT / "tests" / name for name in ("cuda_on_cpu", "sanitized")))
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in _SUFFIXES)


def _state_of_sources() -> str:
    return _digest(*(path.read_bytes() for path in _sources()))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def planted(original: Path, source: str) -> str:
    """A changed copy of a CUDA source, which may ask for ``planted``; returns where it is.

    The library made of it has a function ``plant`` that sets that number, 0 until then.
    """
    path = BUILD / f"faulty_{original.stem}_{_digest(source)}.cu"
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in BUILD.glob(f"faulty_{original.stem}_*.cu"):
        old.unlink()
    path.write_text(
        "namespace { volatile int planted = 0; }\n"
        'extern "C" __attribute__((visibility("default")))\n'
        "void plant(int number) { planted = number; }\n"
        f'#line 1 "{original.relative_to(ROOT)}"\n{source}'
    )
    return str(path)


def cuda_on_cpu_commands(kernels: list[str]) -> list[list[str]]:
    """Compile commands of CUDA ``kernels`` and of what runs them on the CPU.

    -fsanitize=thread is for the calls before every load and store, which runner.cpp answers; the
    sanitizer itself is not linked.
    """
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-gnu-unique", "-Wno-psabi"]
    flags += [f"-ffile-prefix-map={ROOT}/=", f"-fdebug-prefix-map={ROOT}=.", "-Itests"]
    flags += ["-Itests/cuda_on_cpu", "-Icsrc", "-Icsrc/cuda"]
    runner = ["tests/cuda_on_cpu/runner.cpp", "tests/cuda_on_cpu/memory.cpp"]
    return [
        *([cxx(), *flags, "-fsanitize=thread", "-x", "c++", "-c", source] for source in kernels),
        *([cxx(), *flags, "-fvisibility=hidden", "-c", source] for source in runner),
    ]


def kernels_on_cpu(source: str = "tests/cuda_on_cpu/kernels.cu") -> Path:
    """The test kernels, run by tests/cuda_on_cpu; ``source`` may be another copy of that file."""
    return shared_library(f"{Path(source).stem}_on_cpu", cuda_on_cpu_commands([source]))


def kernels_on_gpu() -> Path:
    """The same functions, built by nvcc for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}" + ("a" if major >= 9 else "")
    command = [
        os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc"), "-std=c++17", "-O2",
        f"-gencode=arch=compute_{target},code=sm_{target}", "-Xcompiler", "-fPIC", "-Icsrc",
    ]  # fmt: skip
    library = BUILD / f"kernels_on_gpu-{_digest(_state_of_sources(), command)}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        source, made = "tests/cuda_on_cpu/kernels.cu", Path(f"{library}.{os.getpid()}")
        subprocess.run([*command, "-shared", source, "-o", str(made)], cwd=ROOT, check=True)
        made.rename(library)  # whole, whoever else is building it
    return library


ENGINES = [
    f"csrc/cuda/{name}.cu"
    for name in ("per_step", "persistent_cluster", "persistent_grid", "dropout")
]


# What ops of recurrences and dropout need of the binding; layers are composed of them in Python.
BINDING = [
    *(f"csrc/binding/{name}.cpp" for name in ("call", "cells", "dropout", "plan", "recurrence")),
    "csrc/library.cpp",
]


def engines_on_cpu(kernels: Sequence[str] = ENGINES, name: str = "engines_on_cpu") -> Path:
    """The ops ``fused_rnn_cuda_on_cpu::*``: CUDA's engines, run by tests/cuda_on_cpu.

    ``kernels`` may have another copy of a file, and then wants another ``name``.
    """
    defines = ["-DFUSED_RNN_CUDA_ON_CPU", "-DFUSED_RNN_NAMESPACE=fused_rnn_cuda_on_cpu"]
    base = [cxx(), "-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    return shared_library(
        name,
        [
            *([*base, *torch_flags(), *defines, "-Itests", "-c", source] for source in BINDING),
            *(
                [*base, "-c", source]
                for source in (
                    "tests/cuda_on_cpu/no_engine.cpp",
                    "tests/cuda_on_cpu/chip.cpp",
                    "csrc/cuda/plan.cpp",
                )
            ),
            *cuda_on_cpu_commands(list(kernels)),
        ],
        torch_link_flags(),
    )


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def torch_flags() -> list[str]:
    """What csrc/binding needs to compile outside setup.py."""
    includes = [
        pybind11.get_include(),
        *cpp_extension.include_paths(),
        sysconfig.get_paths()["include"],
    ]
    return [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_EXTENSION_NAME=_C",
        *(f"-I{path}" for path in includes),
    ]


def torch_link_flags() -> list[str]:
    folders = cpp_extension.library_paths()
    return [*(f"-L{f}" for f in folders), *(f"-Wl,-rpath,{f}" for f in folders), "-ltorch_cpu"]
