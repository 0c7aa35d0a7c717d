"""Regressions are found, noise is not, whatever wrote the files."""

from __future__ import annotations

import copy
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from fused_rnn.bench import compare, gpu, layers, records, timing
from fused_rnn.bench.__main__ import main
from fused_rnn.bench.shapes import CELLS, MODES, Shape

MACHINE = {"processor": "a", "threads": 2, "torch": "2.13.0", "fused_rnn": "0.1.0"}
CHECK = timing.Check(True, "output", 0.0, 0.0, 1.0)
SHAPES = tuple(Shape(100, B, 64, 64) for B in range(1, 9))


def measured(
    seed: int, slower: dict[str, float] | None = None, noise: float = 0.05, rounds: int = 15
) -> dict[str, Any]:
    """A file of 48 rows whose true ratio is 2; of the cells in ``slower`` it is that much less."""
    draw = random.Random(seed)
    rows = []
    for cell in CELLS:
        for mode in MODES:
            for shape in SHAPES:
                ours_s = [(slower or {}).get(cell, 1.0) * draw.lognormvariate(0, noise)
                          for _ in range(rounds)]  # fmt: skip
                peer_s = [2 * draw.lognormvariate(0, noise) for _ in range(rounds)]
                turns = timing.Turns({"ours": ours_s, "torch.nn": peer_s}, {"ours": 1})
                time = turns.against("torch.nn")
                rows.append(layers.Row(cell, mode, shape, "cpu", "float32", CHECK, time))
    return records.document("cpu", "fused-rnn-bench cpu", MACHINE, rows)


@pytest.fixture
def files(tmp_path: Path) -> Any:
    def write(*documents: Any) -> list[str]:
        paths = [tmp_path / f"{name}.json" for name in "ab"]
        for path, document in zip(paths, documents, strict=True):
            path.write_text(json.dumps(document))
        return ["compare", *map(str, paths)]

    return write


def verdicts(before: Any, after: Any, **options: float) -> list[str]:
    found = compare.compare(records.parse(before, "a"), records.parse(after, "b"), **options)
    return [each.verdict for each in found]


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_noise_is_the_same(noise: float) -> None:
    """Of 60 comparisons of 48 rows one in twenty may find a difference where there is none."""
    alarms = 0
    for seed in range(60):
        before, after = measured(2 * seed, noise=noise), measured(2 * seed + 1, noise=noise)
        alarms += set(verdicts(before, after)) != {"same"}
    assert alarms <= 8  # of a binomial at 1 in 20, more has a chance of 1 in 200


def test_regression_is_found(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = measured(0, noise=0.03), measured(1, {"GRU": 1.2}, noise=0.03)
    assert main(files(before, after)) == 1
    told = capsys.readouterr().out
    lines = [line.split() for line in told.splitlines() if "64,64" in line]
    assert {(line[0], line[-1]) for line in lines} == {("GRU", "slower")}
    assert "16 slower" in told and "32 same" in told
    assert max(map(len, told.splitlines())) <= 80
    # In the other direction it is no failure.
    assert main(files(after, before)) == 0
    assert "16 faster" in capsys.readouterr().out


def test_small_changes_count_where_they_are_asked_for(files: Any) -> None:
    before, after = (measured(i, {"GRU": 1 + 0.03 * i}, noise=0.003) for i in range(2))
    command = files(before, after)
    assert main(command) == 0
    assert main([*command, "--least", "1"]) == 1


def test_change_within_a_wide_spread_is_noise() -> None:
    before, after = measured(0, noise=0.6), measured(1, {"GRU": 1.2}, noise=0.6)
    assert set(verdicts(before, after)) == {"same"}


def test_ratio_decides_and_not_the_time(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything twice as slow, the peer too: another machine, no regression."""
    before = measured(0, noise=0.01)
    after = copy.deepcopy(before)
    for row in after["rows"]:
        for name in ("ours_s", "peer_s"):
            row["time"][name] *= 2
    assert main([*files(before, after), "--all"]) == 0
    told = capsys.readouterr().out
    assert "+100%" in told
    assert "48 same" in told


def test_what_differs_is_pointed_out(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = measured(0), measured(0)
    after["machine"] = MACHINE | {"torch": "2.14.0", "threads": 8}
    after["rows"] = [*after["rows"][1:], after["rows"][0] | {"cell": "LSTM, new"}]
    command = [
        *files(before, after),
        "--json",
        str(Path(files(before, after)[1]).parent / "c.json"),
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "torch: 2.13.0 in A, 2.14.0 in B" in told
    assert "threads: 2 in A, 8 in B" in told
    assert "processor" not in told
    assert "1 only in A" in told and "1 only in B" in told
    written = json.loads(Path(command[-1]).read_text())
    assert len(written["differences"]) == 2
    assert [row["verdict"] for row in written["compared"]].count("same") == 47


def test_row_that_fails_is_a_regression(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = measured(0), measured(0)
    after["rows"][0]["time"] = None
    after["rows"][0]["check"] |= {"passed": False}
    assert main(files(before, after)) == 1
    assert "1 fails in B" in capsys.readouterr().out
    assert main(files(after, before)) == 0
    assert "1 failed in A" in capsys.readouterr().out
    assert main(files(after, after)) == 0  # nothing new


def test_without_a_spread_a_threshold_is_stated(
    files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(document: dict[str, Any]) -> dict[str, Any]:
        for row in document["rows"]:
            for name in ("ratio_low", "ratio_high", "ours_quartiles_s", "peer_quartiles_s"):
                del row["time"][name]
        return document

    before = without(measured(0, noise=0.001))
    assert main(files(before, without(measured(1, {"GRU": 1.1}, noise=0.001)))) == 0
    assert "no spread recorded in A for 48 rows: 15% counts as noise" in capsys.readouterr().out
    assert main(files(before, without(measured(1, {"GRU": 1.2}, noise=0.001)))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "it has no rows"),
        ('{"format": 1, "rows": 3}', "it has no rows"),
        ('{"format": 2, "command": "cpu", "rows": []}', "format 2, expected 1"),
        ('{"format": 1, "command": "cpu", "machine": {}, "rows": [{}]}', "KeyError: 'cell'"),
        ('{"format": 1, "command": "cpu", "machine": {}, "rows": [3]}', "TypeError"),
        ('{"format": 1, "command": "cpu", "machine": {}, "rows": []}', "no row in common"),
    ],
)
def test_unusable_files(
    text: str | None, message: str, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = files(measured(0), {})
    path = Path(command[2])
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert message in told
    assert str(path) in told


def test_noise_follows_from_the_quartiles() -> None:
    """0.93 (q3 - q1) / sqrt(n) is the standard error of a median of normal noise."""
    draw = random.Random(0)
    medians, errors = [], []
    for _ in range(2000):
        seconds = [draw.lognormvariate(0, 0.1) for _ in range(15)]
        turns = timing.Turns({"ours": [1.0] * 15, "peer": seconds}, {"ours": 1})
        time = turns.against("peer")
        row = layers.Row("LSTM", "forward", SHAPES[0], "cpu", "float32", CHECK, time)
        written = records.document("cpu", "", MACHINE, [row])
        (record,) = records.parse(written, "").records
        error = compare._standard_error(record)
        assert error is not None
        medians.append(time.ratio)
        errors.append(error)
    spread = statistics.stdev(medians)
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.15)


def sweep(path: Path, factor: float = 1.0) -> dict[str, Any]:
    """A GPU's file, by the code that writes it."""
    device = torch.device("cuda")
    file = gpu.Sweep(path, device, 3, resume=False)
    for case in gpu.plan()[0][:3]:
        row = gpu.blank(case, case.shape)
        row.update(
            engine="per_step", us=2.0 * factor, graph_us=1.0, captured=True, ratio=3.0 / factor,
            peers={"torch.nn": 6.0, "torch.nn graph": 4.0, "haste": 12.0}, graph_ratio=4.0,
            ratio_quartiles=[2.9 / factor, 3.1 / factor], rounds=9, gflops=100.0, passed=True,
        )  # fmt: skip
        file.add(row)
    file.end()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_sweep_of_a_gpu(tmp_path: Path, files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    before = sweep(path)
    (first, *_), count = gpu.plan()[0], len(records.read(path).records)
    assert count == 9
    record, graph, haste = records.read(path).records[:3]
    assert (record.cell, record.case) == (first.cell, str(first.shape))
    assert (record.peer, record.us, record.peer_us, record.ratio) == ("torch.nn", 2.0, 6.0, 3.0)
    assert (graph.peer, graph.us, graph.ratio) == ("torch.nn graph", 1.0, 4.0)
    assert (haste.peer, haste.us, haste.ratio) == ("haste", 2.0, 6.0)
    assert main(files(before, sweep(path, 1.3))) == 1
    assert "slower" in capsys.readouterr().out

    stopped = sweep(path) | {"running": "LSTM forward"}
    stopped["rows"][0] |= {
        "passed": False,
        "us": None,
        "ratio": None,
        "peers": {},
        "problem": "lost",
    }
    assert main(files(before, stopped)) == 1
    told = capsys.readouterr().out
    assert "B was stopped at: LSTM forward" in told
    assert "1 fails in B" in told
