"""``load_cell``: cells in headers of a user's own."""

from __future__ import annotations

import copy
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_close_like_torch,
    assert_equal,
    by_reference,
    double,
    dyadic,
    run,
    states,
)
from native import BUILD, ROOT
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import ops, user_cells
from fused_rnn.cells import Call

DREAMER = ROOT / "examples" / "dreamer_gru.h"
FOLDER = BUILD / "extensions"  # kept from run to run

# Cells that are those of fused_rnn under another name.
TWINS = {
    "Memory": ('#include "cells/lstm.h"', "LstmPeephole"),
    "ResetBefore": ('#include "cells/gru.h"', "GruResetBefore"),
}


def dreamer(input_gates: Tensor, hidden_gates: Tensor, state: Any) -> Any:
    h, _ = state
    r, s, u = (input_gates + hidden_gates).chunk(3, dim=-1)
    r, u = torch.sigmoid(r), torch.sigmoid(u - 1)
    return u * torch.tanh(r * s) + (1 - u) * h, None, {"r": r, "u": u}


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(FOLDER))
        yield


@pytest.fixture(scope="module")
def Dreamer() -> Any:
    return fused_rnn.load_cell(DREAMER, reference=dreamer)


@pytest.fixture(scope="module")
def twins() -> dict[str, Any]:
    found = {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (include, original) in TWINS.items():
        header = FOLDER / f"{name.lower()}_twin.h"
        text = (
            f"#pragma once\n{include}\n"
            f"namespace fused_rnn::user {{\nstruct {name} : {original} {{}};\n}}\n"
        )
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        found[name] = fused_rnn.load_cell(header, name)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "joint": {"layer_norm": "joint", "layer_norm_eps": 1e-3, "bias": False},
    "separate": {"layer_norm": True, "bidirectional": True},
    "drawn": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.1},
    "heads": {"num_heads": 3},
}


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_equals_the_plain_loop(
    Dreamer: Any, options: dict[str, Any], dtype: torch.dtype, ragged: bool
) -> None:
    T, B = 7, 4
    given: dict[str, Any] = {}
    if ragged:
        resets = torch.rand(T, B) < 0.2
        given = {
            "lengths": torch.tensor([7, 0, 3, 5]),
            "resets": resets.t() if options.get("batch_first") else resets,
        }
    ours, plain, exact = [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = Dreamer(5, 9, dtype=dtype, **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(dyadic(*parameter.shape) / 2)
        input = dyadic(*((B, T) if layer.batch_first else (T, B)), 5, dtype=dtype)
        hx = states(layer, B, dtype=dtype)
        name = layer._cell()
        found = run(layer, input, hx, seed=seed, **given)
        ours.append(found)
        plain.append(run(layer, input, hx, call=by_reference(name, layer), seed=seed, **given))
        wide = double(layer)
        loop = by_reference(name, wide)
        exact.append(run(wide, double(input), double(hx), call=loop, seed=seed, **given))
    assert_close_like_torch(ours, plain, exact)


@pytest.mark.parametrize("options", [{}, {"layer_norm": "joint"}, {"zoneout": 0.3}], ids=str)
def test_gradients(Dreamer: Any, options: dict[str, Any]) -> None:
    layer = Dreamer(2, 3, bidirectional=True, dtype=torch.float64, **options).eval()
    parameters = dict(layer.named_parameters())
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(input: Tensor, hx: Tensor, *values: Tensor) -> Any:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, given, (input, hx))

    assert torch.autograd.gradcheck(call, (input, hx, *parameters.values()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (input, hx, *parameters.values()))


@pytest.mark.parametrize(
    "name, twin, chosen",
    [
        ("Memory", fused_rnn.LSTM, {"peephole": True}),
        ("ResetBefore", fused_rnn.GRU, {"reset_after": False}),
    ],
)
@pytest.mark.parametrize("options", ["plain", "stacked", "separate", "drawn", "heads"])
def test_the_same_as_built_in(
    twins: dict[str, Any], name: str, twin: Any, chosen: dict[str, Any], options: str
) -> None:
    """The same arithmetic by the same engine, cells with c and late gates too: the same bits."""
    if name == "ResetBefore" and options == "separate":
        return  # test_refused
    ours = twins[name](6, 9, **OPTIONS[options])
    theirs = twin(6, 9, **chosen, **OPTIONS[options])
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(4, 5, 6)
    B = 4 if ours.batch_first else 5
    hx = states(ours, B, dtype=torch.float32)
    given: dict[str, Any] = {
        "lengths": torch.tensor([4, 1, 2, 0, 3])[:B], "resets": torch.rand(4, 5) < 0.3
    }  # fmt: skip
    if name == "Memory":
        given["return_cells"] = True
    assert_equal(run(ours, input, hx, **given), run(theirs, input, hx, **given))


def test_packed(Dreamer: Any) -> None:
    layer = Dreamer(3, 4)
    input, lengths = torch.randn(6, 3, 3), torch.tensor([6, 4, 1])
    packed = run(layer, pack_padded_sequence(input, lengths))
    padded = run(layer, input, lengths=lengths)
    output = pack_padded_sequence(padded["output"], lengths).data
    assert torch.equal(packed["output"], output) and torch.equal(packed["h_n"], padded["h_n"])


def test_ops(Dreamer: Any) -> None:
    """Strides, shapes, schemas and autograd as torch would have them of any op."""
    name = Dreamer(1, 1)._cell()
    weights = [torch.randn(48, 5), torch.randn(48, 16), torch.randn(48), torch.randn(48)]
    call = Call(name, True, False, 0, 1, 1)
    primals = [torch.randn(3, 2, 5), *weights]
    given = (name, primals, None, None, None, None, call.settings(True), None)
    torch.library.opcheck(ops.layer_forward, given)


def test_transforms(Dreamer: Any) -> None:
    layer = Dreamer(3, 4)
    input = torch.randn(5, 2, 3)
    expected = layer(input)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input)[0], expected)

    members = [Dreamer(3, 4) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(layer, (parameters, buffers), (input,))[0]

    found = torch.func.vmap(call)(parameters, buffers)
    assert torch.equal(found, torch.stack([member(input)[0] for member in members]))


def test_third_derivatives_need_the_reference(Dreamer: Any, twins: dict[str, Any]) -> None:
    def third(layer: Any) -> Tensor:
        x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
        y = layer(x)[0].square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return y

    assert third(Dreamer(2, 3, dtype=torch.float64)).isfinite()
    with pytest.raises(NotImplementedError, match=r"Memory.*reference="):
        third(twins["Memory"](2, 3, dtype=torch.float64))


def test_is_a_layer(Dreamer: Any) -> None:
    assert fused_rnn.load_cell(str(DREAMER)) is Dreamer
    layer = Dreamer(3, 4, 2, dropout=0.5, zoneout=0.25).eval()
    assert repr(layer) == "DreamerGru(3, 4, num_layers=2, dropout=0.5, zoneout=0.25)"
    assert isinstance(layer, torch.nn.RNNBase)
    input = torch.randn(2, 1, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(input)[0], layer(input)[0])
    assert "us/step" in str(fused_rnn.explain(layer, (16, 2, 3), chip="H100"))
    assert len(list(layer.parameters())) == 8 and layer.weight_ih_l1.shape == (12, 4)


def test_unpickled_without_its_cell(Dreamer: Any) -> None:
    stored = pickle.dumps(Dreamer(2, 2))
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    found = subprocess.run([sys.executable, "-c", program], input=stored, capture_output=True)
    assert found.returncode == 1 and b"call fused_rnn.load_cell" in found.stderr


def test_looked_inside(Dreamer: Any) -> None:
    layer, input = Dreamer(3, 4), torch.randn(5, 2, 3)
    values = fused_rnn.viz.gate_values(layer, input)
    assert list(values) == ["r", "u", "h"]
    torch.testing.assert_close(values["h"], layer(input)[0])


def test_gates_of_other_names_are_drawn(Dreamer: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = fused_rnn.viz.gates(Dreamer(3, 4), torch.randn(5, 2, 3))
    drawn = {axes.get_title(): axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert drawn == {"reset gate r": (0, 1), "u": (0, 1), "hidden state h": (-1, 1)}


def test_onnx_refuses(Dreamer: Any) -> None:
    pytest.importorskip("onnxscript")
    table = fused_rnn.onnx.translation_table()
    with pytest.raises(NotImplementedError, match="no recurrent operator with this cell"):
        settings = Call("", True, False, 0, 1, 1).settings(False)
        none = (None,) * 4
        table[ops.layer_forward](Dreamer(1, 1)._cell(), [], *none, settings, None)


def test_compiled_once(Dreamer: Any) -> None:
    """Another process takes what is there."""
    libraries = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*dreamer*.so")}
    assert libraries
    program = "import sys, fused_rnn; fused_rnn.load_cell(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(DREAMER)], check=True)
    assert libraries == {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*dreamer*.so")}


def test_two_threads_at_once(Dreamer: Any) -> None:
    code = (
        "import threading, sys, fused_rnn\n"
        "found = []\n"
        "load = lambda: found.append(fused_rnn.load_cell(sys.argv[1]))\n"
        "threads = [threading.Thread(target=load) for _ in range(3)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "assert len(found) == 3 and len(set(found)) == 1\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(DREAMER)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_what_a_header_includes_is_part_of_it(tmp_path: Path) -> None:
    header, beside = tmp_path / "mine.h", tmp_path / "constants.h"
    header.write_text('#include "constants.h"\n  # include "cells/cell.h"\n')
    beside.write_text('#include "mine.h"\nconstexpr int one = 1;\n')
    found = user_cells._texts(header, {})
    assert list(found) == [header, beside]
    before = user_cells._digest(*found.values())
    beside.write_text('#include "mine.h"\nconstexpr int one = 2;\n')
    assert user_cells._digest(*user_cells._texts(header, {}).values()) != before


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(taken))
    header = tmp_path / "mine.h"
    header.write_text("struct Mine {};\n")
    with pytest.raises(RuntimeError, match=r"cannot be written .* set TORCH_EXTENSIONS_DIR"):
        fused_rnn.load_cell(header)


def test_refused(
    Dreamer: Any, twins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the header of a cell.*no_such\.h"):
        fused_rnn.load_cell(tmp_path / "no_such.h")
    header = tmp_path / "my_cell.h"
    header.write_text("#pragma once\n")
    with pytest.raises(ValueError, match=r"Expected a struct MyCell in .*my_cell\.h; struct="):
        fused_rnn.load_cell(header)
    with pytest.raises(ValueError, match="layer_norm should be False with ResetBefore"):
        twins["ResetBefore"](2, 3, layer_norm=True)
    with pytest.raises(TypeError, match="peephole"):
        Dreamer(2, 3, peephole=True)
    with pytest.raises(TypeError, match="proj_size"):
        twins["Memory"](2, 3, proj_size=1)
    with pytest.raises(ValueError, match="zoneout should be a probability"):
        Dreamer(2, 3, zoneout=(0.1, 0.1))
    with pytest.raises(TypeError, match="Memory: Expected hx to be a pair of tensors"):
        twins["Memory"](2, 3)(torch.randn(1, 1, 2), torch.randn(1, 1, 3))

    header.write_text("struct MyCell {};\n")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no no-such-compiler: install g\+\+"):
        fused_rnn.load_cell(header)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(RuntimeError, match="load_cell needs ninja: pip install ninja"):
        fused_rnn.load_cell(header)


def test_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own words, with the line of the header; and again at the next attempt."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    header = tmp_path / "broken_cell.h"
    header.write_text('#include "cells/cell.h"\nstruct BrokenCell {\n  int missing\n};\n')
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"does not compile:\n.*broken_cell\.h:3:\d+: error"):
            fused_rnn.load_cell(header)


def test_speed(Dreamer: Any) -> None:
    """At least 80% of the built-in GRU's, whose arithmetic is about the same."""
    torch.set_num_threads(1)
    layers = (Dreamer(64, 128), fused_rnn.GRU(64, 128))
    input = torch.randn(64, 16, 64)
    ratios = []
    for _ in range(60):
        times = []
        for layer in layers:
            begin = time.perf_counter()
            torch.autograd.grad(layer(input)[0].sum(), list(layer.parameters()))
            times.append(time.perf_counter() - begin)
        ratios.append(times[1] / times[0])
    assert statistics.median(ratios) >= 0.8


def test_names() -> None:
    assert user_cells._in_capitals("minimal_gated_unit") == "MinimalGatedUnit"
    assert user_cells._with_underscores("MinimalGatedUnit2X") == "minimal_gated_unit2_x"
