"""Whatever README.md and the pages in docs/ show is run, and what they claim to print is printed.

Of a page's blocks, in order:

- ``python`` and hidden comments ``<!-- setup ... -->`` run in one namespace for the whole page;
  where a comment's pytest.importorskip finds no package, the rest is left out;
- a block without a language is what the Python block before it prints, or how it fails
  (``ValueError: ...``); three dots stand for anything;
- ``sh`` is commands: their targets, subcommands, extras and files are looked up;
- ``text`` is for what nobody runs, ``cpp`` for what is included from a file.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fused_rnn.bench.__main__ import _parser
from native import BUILD, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_TOOLS = {"MAX_JOBS", "TORCH_EXTENSIONS_DIR", "CXX", "PIP_EXTRA_INDEX_URL", "PYTEST_FLAGS"}


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the page, where the text begins


def blocks(text: str) -> list[Block]:
    pattern = r"^```(\w*)[^\n]*\n(.*?)^```$|^<!-- (setup)\n(.*?)^-->$"
    return [
        Block(
            "python" if match[3] else match[1],
            match[2] or match[4] or "",
            text.count("\n", 0, match.start()) + 2,
        )
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def ids(path: Path) -> str:
    return path.name


def run(block: Block, page: Path, names: dict[str, Any]) -> str:
    """What a block prints, and after that how it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), names)
        except Exception as error:
            names["_error"] = error
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(BUILD / "extensions"))
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    of_page = blocks(page.read_text())
    for block, after in zip_longest(of_page, of_page[1:]):
        if block.language != "python":
            continue
        names["_error"] = None
        printed = run(block, page, names)
        where = f"{page.name}:{block.line}"
        if after is not None and after.language == "":
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(after.text, printed, flags)
            assert same, f"{where} prints\n{printed}\ninstead of\n{after.text}"
        elif names["_error"] is not None:
            raise AssertionError(f"{where} fails: {printed}") from names["_error"]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "sh":
            for line in block.text.splitlines():
                if words := shlex.split(line, comments=True):
                    check_command(words)


def check_command(words: list[str]) -> None:
    while "=" in words[0]:
        check_variable(words.pop(0).partition("=")[0])
    command, *rest = words
    if command == "make":
        (target,) = rest
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif command == "fused-rnn-bench":
        _parser().parse_args(rest)
    elif command == "pip":
        for extra in re.findall(r"(?:\.|fused_rnn)\[(\w+)\]", " ".join(rest)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    elif command in ("python", "pytest", "torchrun"):
        files = [word for word in rest if word.endswith(".py")]
        assert files == [] or all((ROOT / file).is_file() for file in files), files
        assert files or rest[:2] == ["-m", "http.server"], rest
    else:
        raise AssertionError(f"{command}: no command that this test knows")


def check_variable(name: str) -> None:
    sources = [ROOT / "setup.py", *(ROOT / "fused_rnn").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    known = any(name in path.read_text() for path in sources)
    assert known or name in OF_OTHER_TOOLS, name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_text(page: Path) -> None:
    text = page.read_text()
    languages = {block.language for block in blocks(text)}
    assert languages <= {"", "python", "sh", "text", "cpp"}
    assert text.count("\n```") % 2 == 0
    for name in re.findall(r"`(FUSED_RNN_\w+)", text):
        check_variable(name)
    outside = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    # Pages are read offline: what they show, unlike where they lead, lies beside them.
    assert not re.search(
        r"!\[[^]]*\]\(\s*(?:https?:)?//|(?:src|data)=[\"']?(?:https?:)?//", outside
    )
    for target in re.findall(r"\]\(([^)#\s]+)", outside):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_nothing_is_loaded_from_elsewhere() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "://" not in settings
    for drawing in (ROOT / "docs").rglob("*.svg"):
        found = re.findall(r"(?:href|src)=|url\(|@import|<script", drawing.read_text())
        assert [word for word in found if word != "url("] == [], drawing


@pytest.mark.parametrize(
    "command",
    ["make tests", "fused-rnn-bench gpus", "pip install .[all]", "python examples/none.py",
     "FUSED_RNN_NOTHING=1 make test", "curl"],
)  # fmt: skip
def test_wrong_commands_are_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(shlex.split(command))


def test_errors_and_wrong_output_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    for text in ("```python\nprint(1)\n```\n\n```\n2\n```\n", "```python\nint('x')\n```\n"):
        page.write_text(text)
        with pytest.raises(AssertionError):
            test_python(page, _new(tmp_path), monkeypatch)
    page.write_text("```python\nint('x')\n```\n\n```\nValueError: invalid ...\n```\n")
    test_python(page, _new(tmp_path), monkeypatch)


def _new(folder: Path) -> Path:
    folder = folder / str(len(list(folder.iterdir())))
    folder.mkdir()
    return folder
