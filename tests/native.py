"""Compiles pieces of csrc for tests, each once per source state, into the build folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "tests"

_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def shared_library(name: str, commands: list[list[str]], link: list[str] = ()) -> Path:
    """Runs the compile ``commands`` (each without its -o) and links them into one library.

    The result is kept under a name that holds a hash of csrc and of the commands.
    """
    digest = hashlib.sha256(repr((commands, link)).encode())
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in _SUFFIXES):
        digest.update(path.read_bytes())
    library = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    scratch = BUILD / f"{name}-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    objects = [scratch / f"{i}.o" for i in range(len(commands))]
    running = [
        subprocess.Popen([*command, "-o", str(obj)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for command, obj in zip(commands, objects, strict=True)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    linked = scratch / library.name
    subprocess.run([cxx(), "-shared", *map(str, objects), "-o", str(linked), *link], check=True)
    for old in BUILD.glob(f"{name}-*.so"):
        old.unlink()
    linked.rename(library)
    shutil.rmtree(scratch)
    return library


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def torch_flags() -> list[str]:
    """What csrc/binding.cpp needs to compile outside setup.py."""
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
