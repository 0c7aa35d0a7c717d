"""A wheel of the extension as it is built: nothing is compiled.

python tests/wheel.py FOLDER    put it there, and print its path
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from native import ROOT

from fused_rnn import _C

FOLDERS = ("fused_rnn", "kernels", "bench", "csrc")  # of what is installed


def copy_project(tree: Path) -> None:
    """A copy in which setup.py may work."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in (*FOLDERS, "tests", "examples"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)


def setup(tree: Path, *arguments: str) -> None:
    command = [sys.executable, "setup.py", "-q", *arguments]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def make(tree: Path) -> Path:
    """The wheel of a copy of the project, with the extension that is loaded here."""
    setup(tree, "build_py")
    (library,) = (tree / "build").glob("lib*")
    shutil.copy(str(_C.__file__), library / "fused_rnn")
    setup(tree, "bdist_wheel", "--skip-build", "-d", "dist")
    (found,) = (tree / "dist").glob("*.whl")
    return found


def main(folder: str) -> None:
    to = Path(folder)
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as tree:
        copy_project(Path(tree))
        print(shutil.copy(make(Path(tree)), to))


if __name__ == "__main__":
    main(sys.argv[1])
