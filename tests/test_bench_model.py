"""``fused-rnn-bench model`` on users' files: what it captures, checks, times and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")

from fused_rnn.bench import gpu, model, records, timing
from fused_rnn.bench.__main__ import main
from fused_rnn.bench.loading import Call
from fused_rnn.bench.shapes import MODES, Shape

import fused_rnn

SOURCE = """
import torch
from torch import nn
from neighbour import Tagger

def make():
    return Tagger(), {"tokens": torch.randint(50, (3, 9)), "steps": 4}

def bare():
    return nn.LSTM(8, 16), torch.randn(5, 2, 8)

def packed():
    data = torch.randn(5, 2, 8)
    return nn.GRU(8, 16), (nn.utils.rnn.pack_padded_sequence(data, [5, 3]),)

def frozen():
    return nn.GRU(8, 16).requires_grad_(False), torch.randn(5, 2, 8)

def no_layer():
    return nn.Linear(3, 3), torch.randn(3)

def fused():
    import fused_rnn
    return fused_rnn.GRU(3, 3), torch.randn(2, 1, 3)

def mismatched():
    return nn.LSTM(8, 16), torch.randn(5, 2, 7)

def alone():
    return nn.LSTM(8, 16)

def odd_inputs():
    return nn.LSTM(8, 16), 3

def broken():
    weights = {}
    return weights["encoder"]

class NoFloats(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(4, 4)

    def forward(self, x):
        return self.layer(x)[0].argmax(-1)

def no_floats():
    return NoFloats(), torch.randn(2, 1, 4)

class Uncopied(NoFloats):
    def __deepcopy__(self, memo):
        raise TypeError("holds a socket")

def uncopied():
    return Uncopied(), torch.randn(2, 1, 4)

number = 3
"""

NEIGHBOUR = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.encoder = nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True, dropout=0.3)
        self.decoder = nn.GRUCell(32, 16)
        self.unused = nn.RNN(3, 3)
        self.out = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 50))

    def forward(self, tokens, steps):
        encoded, _ = self.encoder(self.embedding(tokens))
        h, logits = encoded.new_zeros(len(tokens), 16), []
        for t in range(steps):
            h = self.decoder(encoded[:, t], h)
            logits.append(self.out(h))
        return {"logits": torch.stack(logits, 1)}
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "Effort", lambda budget_s: gpu.DRY_EFFORT)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "theirs.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path / "theirs.py")
    for name in ("neighbour", "theirs", "benchmarked_model"):
        sys.modules.pop(name, None)


def test_whole_model_and_layers(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    threads = torch.get_num_threads()
    try:
        assert main(["model", f"{file}:make", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    table = told[told.index("layer") : told.index("unused: not called")]
    assert max(map(len, table.splitlines())) <= 80
    for mode in MODES:
        assert f"{mode}: recurrent layers take " in told
        assert f"unused: not called in {mode}" in told

    written = json.loads(path.read_text())
    rows = {(row["cell"], row["mode"]): row for row in written["rows"]}
    names = {"whole model", "encoder", "decoder"}
    assert set(rows) == {(name, mode) for name in names for mode in MODES}
    for mode in MODES:
        assert rows["encoder", mode]["shape"] == {"T": 9, "B": 3, "I": 8, "H": 16}
        assert rows["decoder", mode]["shape"] == {"T": 4, "B": 3, "I": 32, "H": 16}
        assert all(rows[name, mode]["check"]["passed"] for name in names)
        # Which results were compared: gradients in training alone.
        kinds = {rows[name, mode]["check"]["worst"].split()[0] for name in names}
        assert kinds <= {"result", "grad"}
        assert mode == "training" or kinds == {"result"}
    assert any(note.startswith("training: recurrent layers") for note in written["notes"])

    found = records.read(path)
    assert found.invocation == f"fused-rnn-bench model {file}:make --threads 1"
    assert {record.case for record in found.records} == {
        "whole model", "encoder 9,3,8,16", "decoder 4,3,32,16",
    }  # fmt: skip
    assert main(["compare", str(path), str(path)]) == 0


@pytest.mark.parametrize(
    ("name", "layer", "modes"),
    [("bare", "LSTM", MODES), ("packed", "GRU", MODES), ("frozen", "GRU", ("forward",))],
)
def test_bare_layer(
    name: str,
    layer: str,
    modes: tuple[str, ...],
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.json"
    assert main(["model", f"{file}:{name}", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["cell"], row["mode"]) for row in rows] == [
        (cell, mode) for mode in modes for cell in ("whole model", layer)
    ]
    assert rows[1]["shape"] == {"T": 5, "B": 2, "I": 8, "H": 16}
    assert ("no gradient to compute" in capsys.readouterr().out) == (name == "frozen")


def test_module_by_name(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(file).parent)
    assert main(["model", "theirs:bare"]) == 0
    assert "whole model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "messages"),
    [
        ("{}:no_layer", ["no recurrent layer that fused_rnn.convert replaces"]),
        ("{}:fused", ["no recurrent layer that fused_rnn.convert replaces"]),
        ("{}:mismatched", ["the model's forward failed", "Expected 8, got 7"]),
        ("{}:alone", ["alone() returned LSTM, expected (model, inputs)"]),
        ("{}:odd_inputs", ["inputs of int, expected a tuple of arguments"]),
        ("{}:broken", ["broken() failed:", 'weights["encoder"]', "KeyError: 'encoder'"]),
        ("{}:no_floats", ["a result without floating-point tensors"]),
        ("{}:uncopied", ["copying the model failed", "TypeError: holds a socket"]),
        ("{}:number", ["has no function number"]),
        ("{}:absent", ["has no function absent"]),
        ("{}", ["expected PATH:FACTORY"]),
        ("{}:", ["expected PATH:FACTORY"]),
        ("{}:make()", ["expected PATH:FACTORY"]),
        ("nowhere.py:make", ["nowhere.py: no such file"]),
        ("nowhere:make", ["importing nowhere failed", "No module named 'nowhere'"]),
    ],
)
def test_what_is_no_use_is_told(
    target: str, messages: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", target.format(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fused-rnn-bench model: ")
    for message in messages:
        assert message in told
    assert "bench/" not in told  # of a traceback, only what is the user's
    assert "importlib" not in told


@pytest.mark.parametrize("text", ["def make(:", "raise SystemExit(3)", "import absent_package"])
def test_file_that_cannot_be_imported(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert main(["model", f"{path}:make"]) == 2
    told = capsys.readouterr().err
    assert f"importing {path} failed:" in told
    assert "bad.py" in told


def rows_of(module: nn.Module, *args: Tensor) -> tuple[dict[tuple[str, str], timing.Check], list]:
    notes: list[str] = []
    measured = model.measure(module, Call(args, {}), 0.0, lambda what: None, notes.append)
    return {(row.cell, row.mode): row.check for row in measured}, notes


class Start(nn.Module):
    """Makes a state of its own, in float32 whatever the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, torch.zeros(1, x.shape[1], 16))[0]
        return output


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = self.layer(x)[0]
        return output


def test_without_float64_the_rule_is_told() -> None:
    checks, notes = rows_of(Start(), torch.randn(6, 2, 4))
    assert all(check.passed for check in checks.values())
    assert any(note.startswith("whole model, forward: no float64 (RuntimeError") for note in notes)
    assert all("may differ by 0.0003 of the largest element" in note for note in notes)


def test_autocast_is_around_the_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Autocast(), torch.randn(13, 3, 16)
    checks, notes = rows_of(module, x)
    assert all(check.passed for check in checks.values())
    assert notes == []
    # The layer alone errs as in the model, by bfloat16; without autocast it would not.
    assert checks["layer", "forward"].peer_error > 1e-4
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    assert rows_of(module, x)[0]["layer", "forward"].peer_error < 1e-6


class Wrong(fused_rnn.LSTM):
    """Right in forward, not in backward."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output, states = super().forward(*args, **kwargs)
        return output + 0.01 * (output - output.detach()), states


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_wrong_twin_is_found(
    scale: float, monkeypatch: pytest.MonkeyPatch, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(module: nn.Module) -> nn.Module:
        twin = Wrong(8, 16)
        twin.load_state_dict(module.state_dict())
        with torch.no_grad():
            twin.weight_hh_l0.mul_(scale)
        return twin

    monkeypatch.setattr(fused_rnn, "convert", convert)
    assert main(["model", f"{file}:bare"]) == 1
    told = capsys.readouterr().out
    assert "FAILED LSTM training 5,2,8,16: " in told
    assert ("FAILED LSTM forward 5,2,8,16" in told) == (scale != 1.0)


def test_model_itself_is_left_alone() -> None:
    module = nn.Sequential(nn.LSTM(4, 8)).train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    rows_of(module, torch.randn(3, 2, 4))
    assert type(module[0]) is nn.LSTM
    assert module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_dropout_is_off_in_checks_alone() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 16, 2, dropout=0.5)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.drop(self.layer(x)[0])
            return nn.functional.dropout(output, 0.5, self.training)

    module = Dropping()
    call = Call((torch.randn(5, 2, 4),), {})
    plain = model._run(module, [call], "training")
    certain = model._certain(module, plain, 1)
    first, second = certain()["result 0"], certain()["result 0"]
    assert torch.equal(first, second)
    assert (module.layer.dropout, module.drop.p) == (0.5, 0.5)
    assert not torch.equal(plain()["result 0"], plain()["result 0"])
    checks, _ = rows_of(module, *call.args)
    assert all(check.passed for check in checks.values())


def test_shape_of_what_is_called() -> None:
    lstm, cell = nn.LSTM(4, 8), nn.GRUCell(4, 8)

    def shape(layer: nn.Module, *inputs: Tensor) -> tuple:
        return model._shape(layer, [Call((each,), {}) for each in inputs])

    assert shape(lstm, torch.ones(5, 2, 4)) == Shape(5, 2, 4, 8)
    assert shape(nn.LSTM(4, 8, batch_first=True), torch.ones(2, 5, 4)) == Shape(5, 2, 4, 8)
    assert shape(lstm, torch.ones(5, 4)) == Shape(5, 1, 4, 8)
    assert shape(lstm, *[torch.ones(5, 2, 4)] * 3) == Shape(15, 2, 4, 8)
    assert shape(cell, *[torch.ones(2, 4)] * 3) == Shape(3, 2, 4, 8)
    assert shape(cell, torch.ones(4)) == Shape(1, 1, 4, 8)
    keyword = model._shape(lstm, [Call((), {"input": torch.ones(5, 2, 4)})])
    assert keyword == Shape(5, 2, 4, 8)
