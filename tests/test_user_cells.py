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
    as_tuple,
    assert_close_like_torch,
    assert_equal,
    by_reference,
    double,
    dyadic,
    run,
    states,
)
from native import BUILD, CSRC, ROOT
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import ops, user_cells
from fused_rnn.cells import CELLS, Call

DREAMER = ROOT / "examples" / "dreamer_gru.h"
OWN_CELLS = ROOT / "tests" / "own_cells"  # of other shapes than any cell of fused_rnn
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


def two_gates(input_gates: Tensor, hidden_gates: Tensor, state: Any) -> Any:
    h, _ = state
    (input_f, input_n), (hidden_f, hidden_n) = (
        gates.chunk(2, dim=-1) for gates in (input_gates, hidden_gates)
    )
    f = torch.sigmoid(input_f + hidden_f)
    n = torch.tanh(input_n + f * hidden_n)
    return h + f * (n - h), None, {"f": f, "n": n}


def five_gates(
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Any,
    weights: Tensor,
    *,
    through: Any = lambda c: (c, c),
) -> Any:
    h, c = state
    w_0, w_1 = weights.chunk(2)
    i, f, g, m, o = (input_gates + hidden_gates).chunk(5, dim=-1)
    i, f, m = torch.sigmoid(i + w_0 * c), torch.sigmoid(f), torch.sigmoid(m - 0.5)
    c, inside = through(f * c + i * g / (1 + g.abs()) + m * h)
    o = torch.sigmoid(o + w_0 * c + w_1)
    return o * torch.tanh(inside), c, {"o": o}


def late_of_two(
    input_gates: Tensor, hidden_gates: Tensor, state: Any, weight: Tensor, product: Any
) -> Any:
    h, _ = state
    (input_r, input_n), (hidden_r, _) = (
        gates.chunk(2, dim=-1) for gates in (input_gates, hidden_gates)
    )
    r = torch.sigmoid(input_r + hidden_r)
    _, hidden_n = product(r * h).chunk(2, dim=-1)
    return h / 2 + weight * torch.tanh(input_n + hidden_n), None, {"r": r}


REFERENCES = {"two_gates": two_gates, "five_gates": five_gates, "late_of_two": late_of_two}


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(FOLDER))
        yield


@pytest.fixture(scope="module")
def Dreamer() -> Any:
    return fused_rnn.load_cell(DREAMER, reference=dreamer)


@pytest.fixture(scope="module", params=REFERENCES)
def own_cell(request: pytest.FixtureRequest) -> Any:
    header = OWN_CELLS / f"{request.param}.h"
    return fused_rnn.load_cell(header, reference=REFERENCES[request.param])


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
    check_against_the_loop(Dreamer, options, dtype, ragged)


def is_late(layer_class: Any) -> bool:
    """Whether a gate waits for the others; then they are never there to be normalised together."""
    return bool(CELLS[layer_class(1, 1)._cell()].late_gate)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["plain", "joint", "separate", "drawn"])
def test_any_number_of_gates(own_cell: Any, options: str, dtype: torch.dtype, ragged: bool) -> None:
    """Two, five, and two of which one is late; normalised over all of them."""
    chosen = OPTIONS[options]
    if "layer_norm" in chosen and is_late(own_cell):
        with pytest.raises(ValueError, match="layer_norm should be False with LateOfTwo"):
            own_cell(2, 3, **chosen)
        return
    check_against_the_loop(own_cell, chosen, dtype, ragged)


def check_against_the_loop(
    layer_class: Any, options: dict[str, Any], dtype: torch.dtype, ragged: bool
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
        layer = layer_class(5, 9, dtype=dtype, **options)
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
    check_gradients(Dreamer(2, 3, bidirectional=True, dtype=torch.float64, **options).eval())


@pytest.mark.parametrize("layer_norm", [False, "joint", "separate"])
def test_gradients_of_any_number_of_gates(own_cell: Any, layer_norm: Any) -> None:
    if not (layer_norm and is_late(own_cell)):
        check_gradients(own_cell(2, 3, dtype=torch.float64, layer_norm=layer_norm))


def check_gradients(layer: Any) -> None:
    parameters = dict(layer.named_parameters())
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = [t.clone().requires_grad_() for t in as_tuple(states(layer, 2))]

    def call(input: Tensor, *values: Tensor) -> Any:
        given = dict(zip(parameters, values[len(hx) :], strict=True))
        state = values[0] if len(hx) == 1 else values[: len(hx)]
        output, final = torch.func.functional_call(layer, given, (input, state))
        return output, *as_tuple(final)

    given = (input, *hx, *parameters.values())
    assert torch.autograd.gradcheck(call, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given)


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
        with pytest.raises(ValueError, match="layer_norm should be False with ResetBefore"):
            twins[name](6, 9, **OPTIONS[options])
        return
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


LATE, SPLIT, WITH_C = (
    {f"{name} = false": f"{name} = true"} for name in ("late_gate", "split_gates", "has_c")
)
# What a cell may get wrong: changes of Dreamer's, and what is said of it.
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "reads beyond saved": ({"r = saved[0]": "r = saved[3]"}, r"saved\[3\], where saved = 3"),
    "sets beyond saved": (
        {"saved[2] = u": "saved[3] = u"},
        r"forward sets saved\[3\], where saved",
    ),
    "does not save": ({"saved[2] = u;": ""}, r"forward makes saved\[2\] of a value that was never"),
    "reads no gate": (
        {"sigmoid(input_gates[2]": "sigmoid(input_gates[3]"},
        r"input_gates\[3\], where gates = 3",
    ),
    "reads h unasked": (
        {"reads_prev_h = true": "reads_prev_h = false"},
        r"prev\.h, where reads_prev_h = false",
    ),
    "reads the new h unasked": (
        {"u = saved[2]": "u = next.h", "const State<V>&,\n": "const State<V>& next,\n"},
        r"next\.h, where reads_h = false",
    ),
    "reads no c": (
        {"next.h = prev.h": "next.h = prev.c"},
        r"forward .* prev\.c, where has_c = false",
    ),
    "leaves a gradient out": (
        {"int k = 0": "int k = 1"},
        r"backward makes d_hidden_gates\[0\] of a val",
    ),
    "has no gates": ({"gates = 3": "gates = 0"}, "gates: a cell has at least one gate"),
    "has one gate, a late one": ({"gates = 3": "gates = 1"} | LATE, "so there are at least two"),
    "saves no early gates": ({"saved = 3": "saved = 1"} | LATE, "in saved, which is too small"),
    "splits late gates": (LATE | SPLIT, "late_gate: a cell with a late gate does not split"),
    "has a late gate and c": (LATE | WITH_C, "late_gate: a cell with a late gate has no c"),
    "splits gates beside c": (SPLIT | WITH_C, "has_c: a cell with c does not split its gates"),
    "saves nothing beside c": (
        {"saved = 3": "saved = 0"} | WITH_C,
        "in the last of saved, which is",
    ),
    "has no halves": (WITH_C, "forward_c.* is not a member"),
    "forgets a constant": ({"static constexpr int saved = 3;": ""}, "saved.* is not a member"),
    "ends the program": (
        {"tanh(r * s) - prev.h": "*(V*)0 - prev.h"},
        "end the program that runs them",
    ),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=list(WRONG))
def test_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str
) -> None:
    """Said in a few lines, and before anything of the engines is compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    text = DREAMER.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    header = tmp_path / "dreamer_gru.h"
    header.write_text(text)
    with pytest.raises(RuntimeError, match=words) as found:
        fused_rnn.load_cell(header)
    assert len(str(found.value).splitlines()) <= 20 and str(header) in str(found.value)
    assert found.value.__cause__ is None and found.value.__context__ is None
    assert not [*tmp_path.rglob("*.o"), *tmp_path.rglob("build.ninja")]


def test_complaints_are_short() -> None:
    """What a static assertion says first; no commands; of lines without an error the last ones."""
    around = [f"note {i}" for i in range(30)]
    lines = [*around, "a.h:1: error: a", *around, "a.h:2: error: static assertion failed: words"]
    shown = user_cells._complaints("\n".join(lines)).splitlines()
    assert shown[0].endswith("words") and len(shown) <= 18 and "a.h:1: error: a" in shown
    lines = ["FAILED: a.o", "c++ -MMD -c a.cpp -o a.o", *around, "ld: cannot find -lm", "x" * 1000]
    shown = user_cells._complaints("\n".join(lines)).splitlines()
    assert "ld: cannot find -lm" in shown and len(shown) <= 18 and max(map(len, shown)) < 310
    assert not [line for line in shown if "FAILED" in line or "-MMD" in line]


def test_says_that_it_compiles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In one line, and only if it has to."""
    (tmp_path / "user_cells.h").write_text(
        f'#include "{DREAMER}"\n#define FUSED_RNN_FOR_EACH_CELL(X) X(a_name, user::DreamerGru)\n'
    )
    given = ("a_name", "DreamerGru", DREAMER, tmp_path, CSRC)
    user_cells._check(*given)
    assert capfd.readouterr().err == "fused_rnn: compiling DreamerGru, once for this machine\n"
    (tmp_path / "a_name.so").touch()
    user_cells._check(*given)
    assert capfd.readouterr().err == ""


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
