"""What is installed: the source archive, the wheel, and how an installed package behaves."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from native import ROOT
from wheel import FOLDERS, copy_project, make, setup

import fused_rnn
from fused_rnn import _C

BUILT = (".so", ".pyc")
LARGEST_WHEEL = 10e6  # bytes, without CUDA

# Loaded by `import fused_rnn` only if torch has loaded them: slow, or not everybody's.
HEAVY = (
    "matplotlib", "triton", "onnx", "onnxscript", "rich", "setuptools", "pybind11", "torchaudio",
    "torch.utils.cpp_extension", "torch._dynamo", "torch._inductor", "torch.onnx", "torch.export",
)  # fmt: skip


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in BUILT and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    copy_project(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return make(tree)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``folder``, whose packages come before all others."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


def python(folder: Path, *arguments: str, **environment: str) -> str:
    result = run(folder, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(folder: Path, *arguments: str, **environment: str) -> str:
    result = run(folder, *arguments, **environment)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr


def without_others(*paths: Path) -> dict[str, str]:
    """An environment whose PYTHONPATH is ``paths`` and the packages of this one.

    With it and -S, no file of site-packages leads Python back to an editable installation.
    """
    return {"PYTHONPATH": os.pathsep.join([*map(str, paths), sysconfig.get_path("purelib")])}


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the source archive, where nothing else is."""
    setup(tree, "sdist", "-d", "dist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_source_archive(unpacked: Path) -> None:
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert sources() | {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names
    assert not any(name.endswith(BUILT) for name in names)


def test_source_archive_has_what_is_compiled(unpacked: Path) -> None:
    program = """if True:
        import json
        import setuptools  # which brings distutils, where Python has none
        from distutils.core import run_setup
        (extension,) = run_setup("setup.py", stop_after="init").ext_modules
        print(json.dumps([extension.sources, extension.depends]))
    """
    found, expected = (
        json.loads(python(folder, "-c", program, FUSED_RNN_CUDA="0")) for folder in (unpacked, ROOT)
    )
    assert found == expected
    for path in itertools.chain(*found):
        assert (unpacked / path).is_file(), path


@pytest.mark.parametrize("torch", ["raise ModuleNotFoundError('none')", "__version__ = '2.9.1+x'"])
def test_build_without_torch(unpacked: Path, tmp_path: Path, torch: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    told = fails(unpacked, "setup.py", "--version", **without_others(tmp_path))
    assert "built against torch 2.10 or later" in told
    assert ("found 2.9.1+x" if "2.9.1" in torch else "(none)") in told
    assert "pip install --no-build-isolation ." in told
    assert "Traceback" not in told


def test_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        name if name.startswith("fused_rnn/") else f"fused_rnn/{name}" for name in sources()
    }
    assert expected - names == set()
    extension = {name for name in names if name.startswith("fused_rnn/_C.cp")}
    assert len(extension) == 1
    top = {name.partition("/")[0] for name in names}
    assert top == {"fused_rnn", f"fused_rnn-{fused_rnn.__version__}.dist-info"}
    if _C.build_info()["cuda"] is None:
        assert wheel.stat().st_size < LARGEST_WHEEL


def test_installed(installed: Path) -> None:
    program = """
        import importlib.metadata, torch, fused_rnn
        from fused_rnn import sources
        output, (h_n, c_n) = fused_rnn.LSTM(6, 12, 2, bidirectional=True)(torch.randn(5, 3, 6))
        assert output.shape == (5, 3, 24)
        assert importlib.metadata.version("fused_rnn") == fused_rnn.__version__
        assert (sources.csrc() / "cells" / "cell.h").is_file()
        print(fused_rnn.__file__, sources.csrc(), sep="\\n")
    """
    lines = program.splitlines()
    program = "\n".join(line[8:] for line in lines)
    for path in python(installed, "-c", program).split():
        assert Path(path).is_relative_to(installed)
    assert "avx" in python(
        installed, "-m", "fused_rnn.bench", "doctor"
    ) or not _C.instruction_sets().get("avx2")


def test_import_with_old_torch(installed: Path) -> None:
    """As when torch is replaced after fused_rnn was installed."""
    told = fails(installed, "-c", "import torch; torch.__version__ = '2.9.1'; import fused_rnn")
    assert "ImportError: fused_rnn needs torch 2.10 or later, found 2.9.1" in told


@pytest.mark.parametrize("other", [None, "_C.cpython-39-x86_64-linux-gnu.so"])
def test_import_without_its_extension(installed: Path, tmp_path: Path, other: str | None) -> None:
    """As in a checkout where nothing is built, or with another Python than it was built for."""
    shutil.copytree(installed / "fused_rnn", tmp_path / "fused_rnn")
    (extension,) = (tmp_path / "fused_rnn").glob("_C.*.so")
    if other is None:
        extension.unlink()
    else:
        extension.rename(extension.with_name(other))
    told = fails(tmp_path, "-S", "-c", "import fused_rnn", **without_others(tmp_path))
    reason = f"not built in {tmp_path}" if other is None else f"built for another Python ({other},"
    assert f"ImportError: fused_rnn is {reason}" in told
    assert "pip install --no-build-isolation ." in told


def test_no_compiler_no_gpu_no_network(installed: Path) -> None:
    program = """if True:
        import sys
        def refuse(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo"):
                raise OSError(f"{event} {arguments}")
        sys.addaudithook(refuse)
        import torch, fused_rnn
        layer = fused_rnn.GRU(2, 3)
        layer(torch.randn(4, 1, 2))[0].sum().backward()
    """
    python(installed, "-c", program, PATH="", CUDA_VISIBLE_DEVICES="")


def test_imports_little(installed: Path) -> None:
    program = f"""if True:
        import sys, time, torch
        before = set(sys.modules)
        begin = time.perf_counter()
        import fused_rnn
        took = time.perf_counter() - begin
        print(took, *(name for name in {HEAVY} if name in set(sys.modules) - before))
    """
    runs = [python(installed, "-c", program).split() for _ in range(3)]
    assert all(heavy == [] for _, *heavy in runs)
    assert min(float(took) for took, *_ in runs) < 0.3  # seconds beyond torch's own


@pytest.mark.parametrize("folder", ["fused_rnn", "kernels", "bench"])
def test_no_text_is_run_as_code(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
