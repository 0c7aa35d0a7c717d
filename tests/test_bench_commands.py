"""Every measuring command on tiny shapes: its tables, its files, its exit status."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from fused_rnn.bench import (
    against,
    attention,
    commands,
    gpu,
    layers,
    machine,
    options,
    records,
    rivals,
    shapes,
    timing,
)
from fused_rnn.bench.__main__ import main
from fused_rnn.bench.attention import AttentionShape
from fused_rnn.bench.shapes import CELLS, MODES, Shape

CPU = torch.device("cpu")
COPY_BYTES_PER_S = machine.copy_bytes_per_s
SHAPE = Shape(6, 3, 5, 20)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take milliseconds; what they do is what they always do."""
    monkeypatch.setattr(timing, "Effort", lambda budget_s: gpu.DRY_EFFORT)
    monkeypatch.setattr(commands, "LAYERS", dict.fromkeys(("quick", "cpu"), ((SHAPE,), 0.0)))
    monkeypatch.setattr(options, "SHAPES", (SHAPE,))
    monkeypatch.setattr(options, "VARIANT_SHAPE", SHAPE)
    monkeypatch.setattr(attention, "SHAPES", (AttentionShape(2, 3, 4, 5),))
    eager = attention.peers("eager")
    monkeypatch.setattr(attention, "peers", lambda: eager)
    monkeypatch.setattr(machine, "multiply_add_flops", lambda: 1e9)
    monkeypatch.setattr(machine, "copy_bytes_per_s", lambda: 1e9)


def test_copy_is_measured() -> None:
    assert COPY_BYTES_PER_S() > 1e7


@pytest.mark.parametrize("command", ["quick", "cpu", "options", "attention"])
def test_command_leaves_files(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    paths = {name: tmp_path / f"result.{name}" for name in ("json", "html", "png")}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert main([command, *arguments]) == 0
    told = capsys.readouterr().out
    table = told[: told.index("written:")]
    assert max(map(len, table.splitlines())) <= 80
    assert "FAILED" not in told
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert f"fused-rnn-bench {command}" in paths["html"].read_text()

    file = records.read(paths["json"])
    assert file.command == command
    assert file.invocation == f"fused-rnn-bench {command}"
    assert not any(record.failure for record in file.records)
    assert {record.mode for record in file.records} == set(MODES)
    assert len({record.key for record in file.records}) == len(file.records)
    for record in file.records:
        assert record.us is not None and record.peer_us is not None
        assert record.quartiles is not None and record.quartiles_us is not None
        assert record.quartiles_us[0] <= record.us <= record.quartiles_us[1]
    peers = {record.peer for record in file.records}
    cells = {record.cell for record in file.records}
    if command == "attention":
        assert (cells, peers) == ({"attention"}, {"eager", "compiled"})
        assert all(record.unit == "us/call" for record in file.records)
    elif command == "options":
        assert (cells, peers) == (set(CELLS), {"dense", "loop"})
        assert "layer norm 6,3,5,20" in {record.case for record in file.records}
    else:
        assert (cells, peers) == (set(CELLS), {"torch.nn"})
        assert file.machine["copy_bytes_per_s"] == 1e9
        (record,) = (
            r for r in file.records if (r.cell, r.case, r.mode) == ("LSTM", "6,3,5,20", "training")
        )
        row = next(
            row
            for row in json.loads(paths["json"].read_text())["rows"]
            if (row["cell"], row["mode"]) == ("LSTM", "training")
        )
        assert record.us == pytest.approx(row["time"]["ours_s"] / 6 * 1e6)
        assert record.flops_per_s == pytest.approx(row["flops"] / row["time"]["ours_s"])
        assert record.intensity == row["flops"] / layers.least_bytes("LSTM", "training", SHAPE)


def test_files_without_what_was_added_later_are_read(tmp_path: Path) -> None:
    """The recorded results of older versions hold no peer, and no spread of the times."""
    root = Path(__file__).parent.parent / "bench" / "results"
    for name, peers in (
        ("cpu", {"torch.nn"}),
        ("options", {"dense", "loop"}),
        ("attention_cpu", {"eager", "compiled"}),
    ):
        file = records.read(root / f"{name}.json")
        assert {record.peer for record in file.records} == peers
        assert len({record.key for record in file.records}) == len(file.records)


def test_bytes_are_those_of_the_tensors() -> None:
    for cell in CELLS:
        problem = layers.problem(cell, SHAPE, CPU)
        with torch.no_grad():
            output, states = problem.peer(problem.inputs[0])
        tensors = [problem.inputs[0], output, *problem.peer.parameters()]
        tensors += list(states) if isinstance(states, tuple) else [states]
        held = sum(t.nbytes for t in tensors)
        assert layers.least_bytes(cell, "forward", SHAPE) == held
        assert layers.least_bytes(cell, "training", SHAPE) == 2 * held


def test_wrong_result_is_told_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = layers.problem

    def wrong(cell: str, *arguments: Any, **others: Any) -> layers.Problem:
        problem = right(cell, *arguments, **others)
        if cell == "GRU":
            ours = copy.deepcopy(problem.ours)  # the peer shares the parameters
            with torch.no_grad():
                ours.weight_hh_l0.mul_(1.1)  # type: ignore[union-attr, operator]
            return dataclasses.replace(problem, ours=ours)
        return problem

    monkeypatch.setattr(layers, "problem", wrong)
    assert main(["quick", "--json", str(tmp_path / "a.json")]) == 1
    told = capsys.readouterr().out
    assert "FAILED GRU forward 6,3,5,20: " in told
    assert "FAILED LSTM" not in told
    found = records.read(tmp_path / "a.json").records
    assert all((r.failure is not None) == (r.cell == "GRU") for r in found)
    assert all(r.us is None and r.ratio is None for r in found if r.cell == "GRU")


def fake_torchrl(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """torchrl's layers have torch.nn's names and parameters, with batch_first=True."""
    module = types.ModuleType("torchrl.modules.tensordict_module.rnn")
    module.LSTM, module.GRU = torch.nn.LSTM, torch.nn.GRU  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as it is: to compile it takes half a minute a shape."""
    monkeypatch.setattr(torch, "compile", lambda **options: lambda function: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["torch.compile", "torchrl"])
def test_peer_computes_the_same(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchrl(monkeypatch)
    library = rivals.PEERS[name]
    for cell in library.cells:
        problem = layers.problem(cell, SHAPE, CPU)
        exact = problem.checked(mode).exact()
        (found,) = rivals.rivals([library], cell, problem, mode, exact)
        assert isinstance(found, rivals.Rival), found
        output = found.run()["output"].double()
        torch.testing.assert_close(output, exact["output"], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_peers_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fake_torchrl(monkeypatch)
    there = {"torch", "torchrl"}
    monkeypatch.setattr(rivals, "installed", lambda name: name in there)
    path = tmp_path / "a.json"
    assert main(["quick", "--peers", "all", "--json", str(path)]) == 0
    file = records.read(path)
    assert file.invocation == "fused-rnn-bench quick --peers all"
    found = {(record.cell, record.peer) for record in file.records}
    assert found == {
        *((cell, peer) for cell in CELLS for peer in ("torch.nn", "torch.compile")),
        ("LSTM", "torchrl"),
        ("GRU", "torchrl"),
    }
    told = capsys.readouterr().out
    assert max(map(len, told[: told.index("written:")].splitlines())) <= 80

    # One that computes something else has no row, and is told of.
    module.GRU = lambda *a, **b: torch.nn.GRU(*a, **b).requires_grad_()  # type: ignore[attr-defined]
    monkeypatch.setattr(
        torch.nn.GRU, "load_state_dict", lambda self, state: None
    )  # weights of its own
    notes: list[str] = []
    rows = list(
        against.measure(
            ["GRU"], [SHAPE], CPU, 0.0, lambda what: None, [rivals.PEERS["torchrl"]], notes.append
        )
    )
    assert [row.peer for some in rows for row in some] == ["torch.nn", "torch.nn"]
    assert notes[0].startswith("GRU forward 6,3,5,20: no row for torchrl: output differs by ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick", "--peers", "keras"], "expected some of all, torch.nn, torch.compile"),
        (["quick", "--peers", "torchrl"], "torchrl is not installed"),
        (["quick", "--peers", "haste"], "needs CUDA"),
        (["cpu", "--json", "nowhere/a.json"], "no such folder"),
        (["attention", "--html", "nowhere/a.html"], "no such folder"),
        (["report", "-o", "nowhere/a.html"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rivals, "installed", lambda name: False)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fused-rnn-bench {arguments[0]}: ")
    assert message in told


def test_plots_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    assert main(["gpu", "--plan"]) == 0
    assert main(["quick"]) == 2  # the same function finds no rich
    assert "pip install rich" in capsys.readouterr().err
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: name if name == "rich" else None
    )
    assert main(["quick", "--png", "a.png"]) == 2
    assert "--png needs matplotlib" in capsys.readouterr().err


def test_threads_are_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("0", "two"):
        with pytest.raises(SystemExit) as stop:
            main(["quick", "--threads", given])
        assert stop.value.code == 2
        assert "--threads" in capsys.readouterr().err


def test_options_may_stand_before_the_command(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--threads", "1", "cpu", "--json", str(tmp_path / "a.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    file = records.read(tmp_path / "a.json")
    assert (file.command, file.machine["threads"]) == ("cpu", 1)
    assert file.invocation == "fused-rnn-bench cpu --threads 1"
    assert shapes.QUICK  # the real shapes are untouched


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "instruction sets" in capsys.readouterr().out
