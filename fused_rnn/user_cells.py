"""``load_cell``: a layer from a cell that a user has written, in a header of its own."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from . import cells, reference, sources
from .binary import _C
from .modules import RNN, _Layer, _LayerWithC

# What is compiled for the instruction set in use: engine.cpp's number, and the files.
_SETS = {
    "portable": (1, ("portable",)),
    "avx2": (2, ("avx2",)),
    "avx512": (4, ("avx512",)),
    "avx512_bf16": (12, ("avx512", "avx512_bf16")),
}

_layers: dict[str, type[_OfUser]] = {}  # by the name of the cell's ops
_loading = threading.RLock()  # two libraries with one cell end the process
_attempts: dict[str, int] = {}  # at compiling a library


def load_cell(
    path: str | os.PathLike[str],
    struct: str | None = None,
    *,
    reference: Callable[..., tuple[Any, ...]] | None = None,
    verbose: bool = False,
) -> type[_OfUser]:
    """A layer class from a cell in a C++ header, compiled when it is first loaded.

    The header holds a struct of the form that ``csrc/cells/cell.h`` describes, as all cells of
    fused_rnn have it, in ``namespace fused_rnn::user``, where it is in nobody's way. What it needs
    is in ``"cells/cell.h"``. The engines are compiled around it, for the CPU at hand and, where
    fused_rnn has CUDA, for the GPU (half a minute on two cores, several with CUDA), and kept in
    torch's folder for extensions (``TORCH_EXTENSIONS_DIR``).

    Args:
        path: of the header.
        struct: the cell's name; by default the file's in capitals: ``DreamerGru`` in
            ``dreamer_gru.h``.
        reference: one timestep in plain PyTorch, ``reference(input_gates, hidden_gates, (h, c),
            ...) -> (h, c)``, as in ``fused_rnn/reference.py``: c is None for a cell without; one
            with weights of its own gets them after these, one with a late gate the product of that,
            and one with c ``through=`` under layer normalisation. It may return its gates, too: a
            dictionary. Third derivatives and ``fused_rnn.viz`` need it, nothing else.
        verbose: prints what the compiler says.

    Returns:
        A class of layers with the arguments of ``fused_rnn.GRU`` but ``reset_after``, and its
        call: lengths, resets, packed input, stacked and bidirectional layers, all options but
        ``layer_norm`` for a cell with a late gate, all dtypes and transforms. A cell with c has the
        states of ``fused_rnn.LSTM``. Weights are ``weight_ih_l{k}`` (G * hidden_size, input)
        and so on for the G gates of the cell, and ``weight_ch_l{k}`` (U * hidden_size) if it has U
        weights of its own per unit. Two calls for the same header give the same class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header has no such struct.
        RuntimeError: it does not compile, there is no compiler or ninja, or the folder for
            extensions cannot be written.
    """
    header = Path(path).resolve()
    if not header.is_file():
        raise FileNotFoundError(f"path: expected the header of a cell, found no file {path}")
    text = header.read_bytes()
    struct = struct or _in_capitals(header.stem)
    if not re.search(rf"\bstruct\s+{re.escape(struct)}\b".encode(), text):
        raise ValueError(f"Expected a struct {struct} in {path}; struct= names another")
    name = f"{_with_underscores(struct)}_{_digest(*_texts(header, {}).values())}"
    with _loading:
        if name not in _layers:
            (traits,) = cells.add_cells(_library(name, struct, header, verbose))
            _layers[name] = _layer_class(struct, name, traits, header)
        _take_reference(name, struct, reference)
        return _layers[name]


def _texts(header: Path, found: dict[Path, bytes]) -> dict[Path, bytes]:
    """Of a header and of the files beside it that it includes."""
    if header.is_file() and header not in found:
        found[header] = header.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"\n]+)"', found[header], re.MULTILINE):
            _texts((header.parent / os.fsdecode(name)).resolve(), found)
    return found


def __getattr__(name: str) -> Any:
    # Where pickle looks for the class of a layer.
    if name in _layers:
        return _layers[name]
    if re.fullmatch(r"[a-z0-9_]+_[0-9a-f]{8}", name):
        # Not an AttributeError, whose words pickle would replace by its own.
        raise RuntimeError(
            f"the layer's cell {name} is not loaded: call fused_rnn.load_cell with its header first"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _layer_class(struct: str, name: str, traits: cells.CellTraits, header: Path) -> type[_OfUser]:
    base: type[_OfUser] = _UserLayerWithC if traits.has_c else _UserLayer
    members = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Layers of the cell in {header.name}; arguments as ``fused_rnn.GRU``.",
        "_cell_name": name,
    }
    return type(struct, (base,), members)


class _OfUser(_Layer):
    _cell_name: ClassVar[str]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            "LSTM" if self._has_c else "RNN_TANH", input_size, hidden_size, num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, device=device,
            dtype=dtype,
        )  # fmt: skip
        self._set_options(
            num_heads=num_heads, layer_norm=layer_norm, layer_norm_eps=layer_norm_eps,
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout,
        )  # fmt: skip
        if self.layer_norm is not False and cells.CELLS[self._cell()].late_gate:
            raise ValueError(
                f"layer_norm should be False with {self._get_name()}, whose gates are not there at "
                f"one time, got layer_norm={self.layer_norm!r}"
            )
        self._set_weights()

    def _cell(self) -> str:
        return self._cell_name


class _UserLayer(_OfUser):
    forward = RNN.forward


class _UserLayerWithC(_OfUser, _LayerWithC):
    pass


def _take_reference(name: str, struct: str, given: Callable[..., tuple[Any, ...]] | None) -> None:
    def cell(*args: Any, **kwargs: Any) -> reference.Step:
        if given is None:
            raise NotImplementedError(
                f"{struct}: third derivatives, and fused_rnn.viz, need load_cell(..., reference=), "
                "the cell in plain PyTorch"
            )
        h, c, *gates = given(*args, **kwargs)
        return reference.Step(h, c, gates[0] if gates else {})

    if given is not None or name not in reference.CELLS:
        reference.CELLS[name] = cell
    if cells.CELLS[name].late_gate:
        reference.LATE_GATES.add(name)


def _library(name: str, struct: str, header: Path, verbose: bool) -> dict[str, dict[str, Any]]:
    """The facts of the cell, whose library is compiled, if it is not there, and loaded."""
    # Not before: it imports setuptools, which only those need who compile.
    from torch.utils import cpp_extension

    _expect_compiler(cpp_extension.get_cxx_compiler(), cpp_extension.is_ninja_available())
    cuda = _C.build_info()["cuda"] is not None and sources.with_cuda()
    number, sets = _SETS[_C.active_instruction_set()]
    csrc = sources.csrc()
    flags = sources.flags(cuda)
    both = ["-DFUSED_RNN_USER_CELLS", "-DFUSED_RNN_CELLS_ONLY", f"-DFUSED_RNN_SETS={number}"]
    compiled = [
        source
        for source in sources.engines(cuda)
        if (engine := re.fullmatch(r"cpu/engine_(\w+?)(_duals)?\.cpp", source)) is None
        or engine[1] in sets
    ]
    state = _digest(
        torch.__version__, sys.version, str(header), flags, both,
        *(path.read_bytes() for path in sorted(csrc.rglob("*")) if path.is_file()),
    )  # fmt: skip
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / "fused_rnn" / f"{name}_{state}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = open(folder / "locked", "w")  # noqa: SIM115
    except OSError as error:
        raise RuntimeError(
            f"{header} is compiled in {folder}, which cannot be written ({error}): set "
            "TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error
    with locked as lock:
        # Let go even by a process that is killed, unlike torch's own, which is then left over.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        # Found in fused_rnn::user, in fused_rnn, or outside.
        _write(
            folder / "user_cells.h",
            f'#include "{header}"\n'
            f"namespace fused_rnn::user {{\nusing {name} = {struct};\n}}\n"
            f"#define FUSED_RNN_FOR_EACH_CELL(X) X({name}, user::{name})\n",
        )
        _check(name, struct, header, folder, csrc)
        wrappers = []
        for source in compiled:  # torch names objects by files alone, and two are called plan
            wrappers.append(folder / source.replace("/", "_"))
            _write(wrappers[-1], f'#include "{csrc / source}"\n')
        attempt = _attempts.get(name, 0)
        _attempts[name] = attempt + 1
        both.append(f"-DFUSED_RNN_ATTEMPT={attempt}")  # or torch takes a failure for a success
        try:
            library = cpp_extension.load(
                f"fused_rnn_{name}",
                [str(wrapper) for wrapper in wrappers],
                extra_cflags=[*map(shlex.quote, flags["cxx"]), *both],
                extra_cuda_cflags=[*map(shlex.quote, flags.get("nvcc", [])), *both],
                extra_include_paths=[str(folder), str(csrc)],
                build_directory=str(folder),
                with_cuda=cuda,
                is_python_module=False,
                verbose=verbose,
            )
        except RuntimeError as error:
            raise RuntimeError(f"{header} does not compile:\n{_complaints(str(error))}") from None
    # Loaded for good: the engine calls into it.
    found = ctypes.CDLL(library).fused_rnn_library
    address = ctypes.cast(found, ctypes.c_void_p).value
    assert address is not None
    return _C.add_library(address)


def _expect_compiler(compiler: str, has_ninja: bool) -> None:
    """Raises RuntimeError where there is none, or no ninja."""
    command = shlex.split(compiler)[0]
    if shutil.which(command) is None:
        raise RuntimeError(
            f"load_cell needs a C++17 compiler and found no {command}: install g++ or clang, or "
            "set CXX"
        )
    if not has_ninja:
        raise RuntimeError("load_cell needs ninja: pip install ninja")


def _check(name: str, struct: str, header: Path, folder: Path, csrc: Path) -> None:
    """Says within a second what is wrong with a cell that has yet to be compiled.

    ``csrc/cells/check.cpp`` is compiled with it: its constants, then its functions, run on values
    that know what they were made of (``csrc/cells/check.h``).
    """
    # Not before: most who load a cell find it compiled.
    import subprocess

    from torch.utils import cpp_extension

    if any(folder.glob("*.so")):
        return
    program = folder / "check"
    command = [
        *shlex.split(cpp_extension.get_cxx_compiler()), "-std=c++17", "-O0", "-w",
        "-DFUSED_RNN_USER_CELLS", f"-I{folder}", f"-I{csrc}", str(csrc / "cells" / "check.cpp"),
        "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"{header} does not compile:\n{_complaints(built.stderr)}")
    found = subprocess.run([str(program)], capture_output=True, text=True)
    program.unlink()
    if found.returncode != 0:
        faults = found.stdout.replace(f"{name}::", f"{struct}::").splitlines()
        if found.returncode != 1:
            faults.append(f"{struct}: its functions end the program that runs them")
        raise RuntimeError(
            f"{header} is not what csrc/cells/cell.h says of cells:\n{_shortened(faults)}"
        )
    print(f"fused_rnn: compiling {struct}, once for this machine", file=sys.stderr)


def _complaints(output: str) -> str:
    """The errors among what a build has printed, each with the lines that show where.

    Of what a static assertion refuses the compiler goes on to complain, too: it comes first.
    """
    lines = output.splitlines()
    found = [i for i, line in enumerate(lines) if re.search(r"\b(fatal )?error:", line)]
    found.sort(key=lambda i: "static assertion" not in lines[i] and "static_assert" not in lines[i])
    if not found:  # the linker's words, or none: the last ones, without the commands among them
        return _shortened(
            [line for line in lines if not re.search(r" -[co] |^FAILED: ", line)][-18:]
        )
    shown = dict.fromkeys(
        i for first in found[:5] for i in range(first, min(first + 4, len(lines)))
    )
    return _shortened([lines[i] for i in shown])


def _shortened(lines: list[str]) -> str:
    """As much as can be read of a message."""
    return "\n".join(line if len(line) <= 300 else f"{line[:300]} ..." for line in lines[:18])


def _write(path: Path, text: str) -> None:
    """Leaves a file alone that says so already: ninja goes by times."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _in_capitals(stem: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in stem.split("_"))


def _with_underscores(struct: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", struct).lower()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
