"""What runs on a GPU in one call, as far as that goes without: plan, files, rows, rivals."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import test_cuda
import torch
from fused_rnn.bench import __main__ as command
from fused_rnn.bench import doctor, gpu, layers, machine, results, rivals, timing
from fused_rnn.bench.attention import AttentionShape
from fused_rnn.bench.shapes import CELLS, MODES, Shape
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _C
from fused_rnn.stack import Recurrence

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(4, 3, 5, 6)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_dry_run_leaves_every_file(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path_factory.mktemp("tools")
    (tools / "nvidia-smi").write_text(
        "#!/bin/sh\ncase $* in *compute_cap*) printf '9.0\\n8.0\\n' ;; *) exit 1 ;; esac\n"
    )
    (tools / "nvcc").write_text("#!/bin/sh\necho '--split-compile <number>'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": sys.executable, "PATH": path}
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(tmp_path), "--dry-run"]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    names = {"machine.json", "stages.json", "sweep.json", "summary.txt", "log.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names

    machine = read(tmp_path / "machine.json")
    assert machine["torch"] == torch.__version__
    assert machine["commit"]
    # The build is for the first GPU alone, on all cores.
    chosen = machine["environment"]
    assert chosen["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert chosen["NVCC_APPEND_FLAGS"] == "--split-compile=0"
    assert int(chosen["MAX_JOBS"]) > 0
    stages = {stage["name"]: stage for stage in read(tmp_path / "stages.json")}
    assert list(stages) == [
        "facts", "build", "import", "tests", *SANITIZERS, "determinism", "graphs", "sweep",
    ]  # fmt: skip
    for name in ("facts", "tests", "sweep"):
        assert stages[name]["rc"] == 0, name
    for name in (*SANITIZERS, "determinism", "graphs"):
        assert stages[name]["not_run"], name

    sweep = read(tmp_path / "sweep.json")
    every, subset = gpu.plan()
    assert sweep["planned"] == subset
    left_out = [each["key"] for each in sweep["left_out"]]
    assert left_out == LEFT_OUT
    planned_keys = [case.key for case in every[:subset] if case.key not in left_out]
    assert [row["key"] for row in sweep["rows"]] == planned_keys
    assert all(row["passed"] and row["ratio"] > 0 for row in sweep["rows"])
    assert sweep["running"] is None
    assert sweep["fault"] is None

    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[-1] == "all passed"
    ratios = [float(line.rpartition("  x")[2]) for line in lines if "us/step" in line]
    assert len(ratios) == sum(row["cell"] != "attention" for row in sweep["rows"])
    assert ratios == sorted(ratios, reverse=True)

    planned = run.stdout.partition("\n\n")[0].splitlines()
    count = len(stages)
    assert f"{subset} rows" in planned[count]
    limits = {
        line.split()[0]: int(line.partition("at most")[2].split()[0]) for line in planned[:count]
    }
    assert list(limits) == list(stages)
    # Those that run together count once; the sweep's limit is what the others surely leave to it.
    for together in (SANITIZERS, ["determinism", "graphs"]):
        limits["+".join(sorted(together))] = max(limits.pop(name) for name in together)
    source = (ROOT / "bench" / "gpu_check.sh").read_text()
    assert sum(limits.values()) <= int(source.partition("\nbudget=")[2].split()[0]) <= 570


TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZERS = [f"{tool}-{engine}" for engine in ("cluster", "grid") for tool in TOOLS]
SANITIZERS += [*TOOLS, "initcheck"]

# Rows of the subset that an H100 cannot take, by its plan.
LEFT_OUT = [f"LSTM {mode} bf16 1024,16,768,768 on persistent_cluster" for mode in MODES]


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_interrupted_run_keeps_what_there_is(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(temporary)}
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(tmp_path), "--dry-run"]
    process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(temporary.glob("*/tests.log")), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    stages = {stage["name"]: stage for stage in json.loads((tmp_path / "stages.json").read_text())}
    assert stages["facts"]["rc"] == 0
    assert stages["tests"]["rc"] not in (0, None)
    assert "never reached: sweep" in (tmp_path / "summary.txt").read_text()
    assert "== tests" in (tmp_path / "log.txt").read_text()
    names = {"machine.json", "stages.json", "summary.txt", "log.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names


# In place of Python where a run needs a GPU: every stage passes at once.
STAND_IN = f"""#!/bin/sh
case $* in
  */results.py*) exec '{sys.executable}' "$@" ;;
  *--json*) echo '{{"planned": 0, "running": null, "fault": null, "rows": []}}' >"$5" ;;
  *) echo 'test session starts'; echo '1 passed' ;;
esac
"""
STAND_IN_SANITIZER = """#!/bin/sh
echo "========= ERROR SUMMARY of $2: 0 errors"
echo '1 passed'
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_whole_run_leaves_six_flat_files(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tools = tmp_path_factory.mktemp("tools")
    for name, text in (("python", STAND_IN), ("compute-sanitizer", STAND_IN_SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(tools / "python"),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(tmp_path)]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    found = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert found == [
        "log.txt", "machine.json", "sanitizers.txt", "stages.json", "summary.txt", "sweep.json",
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == len(found)
    sanitizers = re.split("^== ", (tmp_path / "sanitizers.txt").read_text(), flags=re.M)[1:]
    assert sorted(sanitizers) == sorted(
        f"{name}\n========= ERROR SUMMARY of {name.partition('-')[0]}: 0 errors\n"
        for name in SANITIZERS
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_sweep_leaves_its_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    arguments = ["gpu", "--device", "cpu", "--rows", "subset", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_rnn.bench", *arguments],
        stdout=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: path.exists() and len(read(path)["rows"]) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    left = read(path)
    assert len(left["rows"]) >= 3
    assert left["running"] is not None
    assert results.main(["unfinished", str(tmp_path)]) == 0

    assert command.main([*arguments, "--resume"]) == 1  # for the row that was lost
    found = read(path)
    keys = [row["key"] for row in found["rows"]]
    left_out = [each["key"] for each in found["left_out"]]
    every, subset = gpu.plan()
    assert set(left_out) >= set(LEFT_OUT)
    assert sorted([*keys, *left_out]) == sorted(case.key for case in every[:subset])
    assert keys[: len(left["rows"])] == [row["key"] for row in left["rows"]]
    lost = [row["key"] for row in found["rows"] if row["problem"] is not None]
    assert lost == [left["running"]]
    assert found["running"] is None
    assert results.main(["unfinished", str(tmp_path)]) == 1


def test_row_left_out_is_never_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.json"
    every, subset = gpu.plan()
    cases = [case for case in every[:subset] if case.key in LEFT_OUT]
    assert [case.key for case in cases] == LEFT_OUT
    under_way = []
    monkeypatch.setattr(
        gpu.results, "write_json", lambda _, found: under_way.append(found["running"])
    )
    assert gpu.sweep(cases, CPU, path) == 0
    assert under_way == [None]


def test_time_that_is_over_begins_no_row(tmp_path: Path) -> None:
    every, _ = gpu.plan()
    assert gpu.sweep(every[:3], CPU, tmp_path / "sweep.json", seconds=-1) == 0
    document = read(tmp_path / "sweep.json")
    assert (document["planned"], document["rows"]) == (3, [])


def test_subset_comes_first_and_covers_everything() -> None:
    every, subset = gpu.plan()
    assert len(set(every)) == len(every)
    assert len({case.key for case in every}) == len(every)
    for cases in (every[:subset], every):
        assert {case.shape for case in cases if case.cell == "attention"} == set(
            gpu.attention.SHAPES
        )
        layered = [case for case in cases if isinstance(case.shape, Shape)]
        choices = set(itertools.product(CELLS, MODES, gpu.PRECISIONS))
        assert {(case.cell, case.mode, case.dtype) for case in layered if case.dense} == choices
        sizes = {(case.shape.H, case.shape.B) for case in layered if case.dense}
        assert sizes >= set(itertools.product(gpu.HIDDEN, gpu.BATCH))
        for kind in ([c for c in layered if c.ragged], [c for c in layered if c.bidirectional]):
            assert {case.cell for case in kind} == set(CELLS)
            assert {case.mode for case in kind} == set(MODES)
            assert {case.dtype for case in kind} == set(gpu.PRECISIONS)
    assert {case.shape for case in every[:4]} == {gpu.JUDGED}
    # The judged shape on each of our engines.
    on_each = {(mode, name) for mode in MODES for name in machine.CUDA_ENGINES}
    assert {(case.mode, case.engine) for case in every[4:10]} == on_each
    assert {(case.dtype, case.shape) for case in every[4:10]} == {("bf16", gpu.JUDGED)}
    # The whole grid, the judged shape, that on each engine, stacked, deep, ragged, attention.
    assert len(every) == 24 * 30 + 8 + 24 + 24 + 8 + 24 + 16
    assert {case.mode for case in every[:subset] if case.shape == gpu.DEEP} == set(MODES)
    # The next rows after the judged ones already have every cell, dtype and mode.
    assert {(c.cell, c.mode, c.dtype) for c in every[10:34]} == choices
    # It has four minutes on a GPU.
    assert sum(case.expected_s for case in every[:subset]) < 220


def test_a_library_that_compiles_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda name: True)
    every, subset = gpu.plan(rivals.LIBRARIES)
    assert [case.library for case in every[subset : subset + 2]] == ["flashrnn"] * 2
    assert all(case.shape == gpu.JUDGED for case in every[subset : subset + 2])
    assert not any(case.library for case in every[subset + 2 :])


def test_floor() -> None:
    def floor(cell: str, mode: str, dtype: str, B: int, H: int) -> float:
        shape = Shape(256, B, H, H)
        return gpu.floor_us(gpu.Case(cell, mode, dtype, shape), shape, 256 * B)

    # A small layer is its hand-overs: 181 cycles each at 1.98 GHz, one forward, two in training.
    assert floor("LSTM", "forward", "bf16", 1, 128) == pytest.approx(0.0914, rel=0.01)
    assert floor("LSTM", "training", "bf16", 1, 128) == pytest.approx(2 * 0.0914, rel=0.01)
    # Which weights fit in a cluster, as GPU.md has it.
    for cell, dtype, H in (
        ("LSTM", "bf16", 896), ("GRU", "bf16", 1024), ("LSTM", "fp32", 640), ("GRU", "fp32", 704)
    ):  # fmt: skip
        inside, beyond = (
            floor(cell, "forward", dtype, 0, H),
            floor(cell, "forward", dtype, 0, H + 64),
        )
        assert (inside, beyond) == (pytest.approx(0.0914, rel=0.01), 0.16)
    # A large one is its products: 2 B 4H 2H operations a step, three times that in training.
    products = 2 * 256 * 4 * 2048 * 2 * 2048 / 989e12 * 1e6
    assert floor("LSTM", "forward", "bf16", 256, 2048) == pytest.approx(products)
    assert floor("LSTM", "training", "bf16", 256, 2048) == pytest.approx(3 * products)
    assert floor("LSTM", "forward", "fp32", 256, 2048) == pytest.approx(products * 989 / 67)
    assert gpu.attention_floor_us(AttentionShape(4, 200, 200, 256)) == pytest.approx(9.8, rel=0.01)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_operations_of_stacked_layers(cell: str, num_layers: int, bidirectional: bool) -> None:
    """Against the sizes of the weights themselves."""
    layer = getattr(nn, cell)(5, 6, num_layers, bias=False, bidirectional=bidirectional)
    weights = sum(p.numel() for p in layer.parameters())
    flops = layers.product_flops(cell, "forward", SHAPE, num_layers, bidirectional, steps=7)
    assert flops == 2 * 7 * weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_problem_is_the_packed_one(cell: str, mode: str) -> None:
    problem = layers.problem(cell, SHAPE, CPU, layers.Variant(ragged=True), copies=2)
    assert problem.lengths is not None
    assert problem.steps() == int(problem.lengths.sum()) < SHAPE.T * SHAPE.B
    pair = problem.checked(mode)
    assert timing.check(pair).passed
    assert pair.peer()["output"].shape == (problem.steps(), SHAPE.H)
    ours, peer = problem.timed(mode)
    assert len(ours) == len(peer) == 2
    assert ours[1]()["output"].shape == (SHAPE.T, SHAPE.B, SHAPE.H)
    assert not torch.equal(ours[0]()["output"], ours[1]()["output"])


def test_a_wrong_row_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convert = layers.fused_rnn.convert

    def wrong(peer: nn.Module) -> nn.Module:
        ours = convert(peer)
        ours.register_forward_hook(lambda module, args, result: (result[0] * 1.1, result[1]))
        return ours

    every, _ = gpu.plan()
    monkeypatch.setattr(layers.fused_rnn, "convert", wrong)
    assert gpu.sweep(every[:1], CPU, tmp_path / "sweep.json") == 1
    (row,) = read(tmp_path / "sweep.json")["rows"]
    assert (row["passed"], row["us"], row["ratio"]) == (False, None, None)
    assert "output: error" in row["check"]
    assert "FAILED wrong result: output: error" in results.row_line(row)


def test_a_row_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every, _ = gpu.plan()
    measure = gpu.measure

    def broken(case, *arguments):
        if case == every[1]:
            raise RuntimeError("no memory\nand more")
        return measure(case, *arguments)

    monkeypatch.setattr(gpu, "measure", broken)
    assert gpu.sweep(every[:3], CPU, tmp_path / "sweep.json") == 1
    rows = read(tmp_path / "sweep.json")["rows"]
    assert [row["problem"] for row in rows] == [None, "RuntimeError: no memory", None]


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every, _ = gpu.plan()
    path = tmp_path / "sweep.json"
    monkeypatch.setattr(gpu, "_fault", lambda device: "illegal address")
    assert gpu.sweep(every[:3], CPU, path) == gpu.FAULT
    assert results.main(["unfinished", str(tmp_path)]) == 0
    monkeypatch.undo()
    assert gpu.sweep(every[:3], CPU, path, resume=True) == 1
    rows = read(path)["rows"]
    assert [row["problem"] for row in rows] == ["illegal address", None, None]
    assert results.main(["unfinished", str(tmp_path)]) == 1


def test_the_engine_of_a_lost_row_is_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape = Shape(256, 16, 512, 512)
    lost = gpu.Case("LSTM", "training", "bf16", shape)
    after = [
        lost._replace(mode="forward"),
        lost._replace(cell="GRU", engine="persistent_cluster"),
        lost._replace(engine="persistent_grid"),
        lost._replace(shape=Shape(256, 16, 1024, 1024)),
    ]
    path = tmp_path / "sweep.json"
    under_way = []
    begin = gpu.Sweep.begin

    def watched(file: gpu.Sweep, case: gpu.Case, engines: list[str]) -> None:
        begin(file, case, engines)
        under_way.append((read(path)["running"], read(path)["running_on"]))

    monkeypatch.setattr(gpu.Sweep, "begin", watched)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_fault", lambda device: "illegal address")
        assert gpu.sweep([lost, *after], CPU, path) == gpu.FAULT
    assert read(path)["avoided"] == {"persistent_cluster": lost.key}
    assert gpu.sweep([lost, *after], CPU, path, resume=True) == 1
    document = read(path)
    assert document["running_on"] == []
    assert [row["key"] for row in document["rows"]] == [
        case.key for case in (lost, after[0], *after[2:])
    ]
    # The plan's choice is that of an H100, the best that is left.
    assert under_way == [
        (lost.key, ["persistent_cluster"]),
        (after[0].key, ["persistent_grid"]),
        (after[2].key, ["persistent_grid"]),
        (after[3].key, ["persistent_grid"]),
    ]
    forced = [row["forced"] for row in document["rows"]]
    assert forced == [None, "persistent_grid", "persistent_grid", None]
    assert document["rows"][1]["notes"] == ["avoided: persistent_cluster"]
    assert document["left_out"] == [
        {"key": after[1].key, "why": f"persistent_cluster is avoided: {lost.key} was lost"}
    ]
    told = "\n".join(results.summary(tmp_path))
    assert f"persistent_cluster avoided after it lost {lost.key}" in told

    # A process that was killed has left what it ran on.
    document.update(running=after[3].key, running_on=["persistent_grid", "per_step"])
    document["rows"].pop()
    results.write_json(path, document)
    last = gpu.Case("RNN", "forward", "bf16", shape)
    assert gpu.sweep([after[3], last], CPU, path, resume=True) == 1
    assert read(path)["avoided"] == {
        "persistent_cluster": lost.key, "persistent_grid": after[3].key,
    }  # fmt: skip
    assert [row["forced"] for row in read(path)["rows"][-2:]] == [None, "per_step"]
    monkeypatch.setenv(machine.VARIABLE, "persistent_grid")
    assert gpu.place(last, CPU, read(path)["avoided"]) == (
        f"persistent_grid is avoided: {after[3].key} was lost"
    )


def test_a_lost_row_costs_twenty_seconds() -> None:
    """But where something compiles, which is not our kernels."""
    every, _ = gpu.plan(rivals.LIBRARIES)
    limits = {(case.cell == "attention", bool(case.library)): case.limit_s for case in every}
    assert limits[False, False] == 20
    assert limits[True, False] == 60


def test_no_plan_has_a_cluster_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sweep, of the tests on a GPU, and of small layers: PTX has no st.async in those."""
    every, _ = gpu.plan()
    tasks = {
        (case.cell.lower().replace("rnn", "rnn_tanh"), case.dtype, case.shape.B, case.shape.H)
        for case in every
        if isinstance(case.shape, Shape)
    }
    short = {str(each.dtype).removeprefix("torch."): name for name, each in gpu.PRECISIONS.items()}
    for _, cell, precision, sizes in forced_on_gpu():
        dtype, tf32 = test_cuda.PRECISIONS[precision]
        name = "tf32" if tf32 else short[str(dtype).removeprefix("torch.")]
        tasks.add((cell, name, sizes.B, sizes.H))
    tasks |= {
        (cell, name, B, H)
        for cell in ("lstm", "gru")
        for name in gpu.PRECISIONS
        for B in (1, 16)
        for H in range(1, 65)
    }
    monkeypatch.setenv(machine.VARIABLE, "")
    teams = set()
    for (cell, name, B, H), L, backward, chip in itertools.product(
        tasks, (1, 2), (False, True), ("H100", "H200", "B200")
    ):
        dtype, tf32 = gpu.PRECISIONS[name]
        of = Recurrence(cell, str(dtype).removeprefix("torch."), 256, B, L, H)
        plan = _C.cuda_plan(of, tf32=tf32, backward=backward, chip=chip)
        (found,) = (each for each in plan if each["engine"] == "persistent_cluster")
        if found["possible"]:
            (blocks,) = re.findall(r"^\d+ teams? of (\d+) blocks", found["reason"])
            teams.add(int(blocks))
    assert teams == {2, 4, 8, 16}


def test_a_hung_row_ends_the_process(tmp_path: Path) -> None:
    script = "import time; from fused_rnn.bench import gpu; gpu._watch(0.2); time.sleep(60)"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert run.returncode != 0
    assert "Timeout" in run.stderr


def test_graphs_and_events_are_used_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: the calls are made in order, and a row gets its columns."""
    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "current_stream", Stand)
    monkeypatch.setattr(torch.cuda, "stream", Stand)
    monkeypatch.setattr(torch.cuda, "graph", Stand)
    case = gpu.Case("GRU", "training", "bf16", SHAPE)
    ran: list[int] = []

    class Graph:
        def replay(self) -> None:
            ran.append(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    row = gpu.measure(case, SHAPE, CPU, gpu.DRY_EFFORT, graphs=True)
    assert row["passed"]
    assert row["captured"] is True
    assert set(row["peers"]) == {"torch.nn", "torch.nn graph"}
    assert row["graph_us"] is not None
    assert row["graph_ratio"] > 0
    assert len(ran) > 4

    wrong = timing.Check(False, "output", 2.0, 0.0, 1.0)
    checks = iter([timing.Check(True, "output", 0.0, 0.0, 1.0), wrong])
    with monkeypatch.context() as patch:
        patch.setattr(timing, "compare", lambda *arguments, **options: next(checks))
        row = gpu.measure(case, SHAPE, CPU, gpu.DRY_EFFORT, graphs=True)
    assert (row["passed"], row["graph_us"]) == (False, None)
    assert row["notes"] == [f"our CUDA graph: {wrong}"]
    assert results.row_line(row).endswith("FAILED, see its notes")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    row = gpu.measure(case, SHAPE, CPU, gpu.DRY_EFFORT, graphs=True)
    assert (row["passed"], row["captured"], row["graph_us"]) == (True, False, None)
    assert row["notes"] == ["no CUDA graph: RuntimeError: not here"]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timing.call_s(lambda: None, 4, torch.device("cuda")) == 2e-3


def test_attention_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: object) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(
        gpu.attention, "peers", lambda backend: {"eager": gpu.attention.eager, "compiled": broken}
    )
    shape = AttentionShape(2, 3, 5, 8)
    row = gpu.measure(gpu.Case("attention", "training", "fp32", shape), shape, CPU, gpu.DRY_EFFORT)
    assert row["passed"]
    assert list(row["peers"]) == ["eager"]
    assert row["notes"] == ["torch.compile: RuntimeError: no compiler"]
    assert row["unit"] == "us/call"


def fail() -> None:
    raise RuntimeError("not here")


class Stand:
    """In place of a stream and of what makes one current."""

    def __init__(self, *arguments: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *arguments: object) -> None:
        pass


class Event(Stand):
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: object) -> float:
        return 8.0  # milliseconds


def test_a_row_has_its_engine_and_what_the_plan_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpu.fused_rnn.explain
    layer = fused_rnn.LSTM(2, 512, 2, device="meta", dtype=torch.bfloat16)
    input = torch.empty(64, 16, 2, device="meta", dtype=torch.bfloat16)
    on_h100 = lambda layer, input: asked(layer, input, chip="H100")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(gpu.fused_rnn, "explain", on_h100)
        found = gpu.engine(layer, input, "training")
        forward = gpu.engine(layer, input, "forward")
    assert found["engine"] == forward["engine"] == "persistent_cluster"
    assert set(found["predicted"]) == {"forward", "backward"}
    assert set(forward["predicted"]) == {"forward"}
    for of_pass in found["predicted"].values():
        assert set(of_pass) == set(machine.CUDA_ENGINES)
        assert of_pass["persistent_cluster"] == min(of_pass.values())
    per_layer = sum(of_pass["persistent_cluster"] for of_pass in found["predicted"].values())
    assert found["predicted_us"] == pytest.approx(2 * per_layer)
    assert found["parts"] == forward["parts"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(gpu.fused_rnn, "explain", on_h100)
        long = torch.empty(4096, 16, 2, device="meta", dtype=torch.bfloat16)
        found = gpu.engine(layer, long, "training")
    assert found["parts"] > 1
    assert per_layer < found["predicted_us"] < 2 * per_layer

    def two_engines(layer: nn.Module, input: Tensor) -> types.SimpleNamespace:
        candidate = types.SimpleNamespace(us_per_step=1.0, possible=True)
        passes = {"forward": "persistent_grid", "backward": "per_step"}
        return types.SimpleNamespace(
            choices=[
                types.SimpleNamespace(
                    layer=0, phase=phase, engine=name,
                    candidates=[types.SimpleNamespace(**vars(candidate), engine=name)],
                )
                for phase, name in passes.items()
            ],
            wavefront=None,
        )  # fmt: skip

    monkeypatch.setattr(gpu.fused_rnn, "explain", two_engines)
    assert gpu.engine(layer, input, "training")["engine"] == "persistent_grid+per_step"
    assert gpu.engine(layer, input, "forward")["engine"] == "persistent_grid"
    monkeypatch.setattr(gpu.fused_rnn, "explain", lambda layer: "")
    assert gpu.engine(layer, input, "forward") == {"engine": "(TypeError)"}
    monkeypatch.undo()

    case = gpu.Case("LSTM", "forward", "bf16", SHAPE)
    row = gpu.measure(case, SHAPE, CPU, gpu.DRY_EFFORT)
    assert (row["engine"], row["forced"], row["predicted_us"]) == ("cpu", None, None)
    assert row["predicted"] == {"forward": {"cpu": None}}
    assert "(plan" not in results.row_line(row)
    row |= {"engine": "persistent_grid", "us": 1.5, "predicted_us": 1.25}
    assert "persistent_grid 1.50 us/step (plan 1.25), torch.nn" in results.row_line(row)


def test_one_engine_is_forced_and_what_it_cannot_take_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    every, _ = gpu.plan()
    cases = gpu.on_engine(every, "persistent_cluster")
    assert all(case.engine == "persistent_cluster" for case in cases)
    assert not any(case.cell == "attention" for case in cases)
    assert len({case.key for case in cases}) == len(cases)
    small, large = (Shape(256, 16, H, H) for H in (256, 1024))
    wanted = [
        gpu.Case("GRU", mode, "fp32", shape, engine="persistent_cluster")
        for shape in (small, large)
        for mode in MODES
    ]
    assert set(wanted) <= set(cases)

    # Whatever is forced already is asked neither here nor there.
    monkeypatch.setenv(machine.VARIABLE, "persistent_grid")
    seen = []
    layer = gpu._layer

    def watched(*arguments: object) -> dict:
        seen.append(os.environ[machine.VARIABLE])
        return layer(*arguments)

    monkeypatch.setattr(gpu, "_layer", watched)
    assert gpu.sweep(wanted, CPU, tmp_path / "sweep.json") == 0
    assert os.environ[machine.VARIABLE] == "persistent_grid"
    assert seen == ["persistent_cluster"] * 2
    document = read(tmp_path / "sweep.json")
    assert [row["key"] for row in document["rows"]] == [case.key for case in wanted[:2]]
    assert [row["forced"] for row in document["rows"]] == ["persistent_cluster"] * 2
    assert [each["key"] for each in document["left_out"]] == [case.key for case in wanted[2:]]
    assert "cannot take it forward: the recurrent matrix" in document["left_out"][0]["why"]
    assert document["running"] is None
    assert "sweep: 2 of 4 rows, 2 left out" in "\n".join(results.summary(tmp_path))
    row = document["rows"][0]
    assert "forced" in results.row_line(row)
    of_plan = row | {"forced": None, "ratio": 2.0}
    first, second = results.means([row | {"ratio": 3.0}, of_plan])
    assert first.startswith("GRU forward fp32 ")
    assert first.endswith("mean x2.00, least x2.00, 1 rows")
    assert second.startswith("GRU forward fp32 persistent_cluster mean x3.00")


def test_engine_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--plan", "--engine", "persistent_grid"]) == 0
    assert "sweep, subset: 160 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["gpu", "--plan", "--engine", "cpu"])


def test_doctor_tells_what_the_plan_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(machine.engines()) == {"cpu", *machine.CUDA_ENGINES}
    if not torch.cuda.is_available():
        assert machine.cuda_plans() == []
    monkeypatch.setenv(machine.VARIABLE, "persistent_cluster")
    (plan,) = machine.cuda_plans(["H100"])
    assert os.environ[machine.VARIABLE] == "persistent_cluster"
    json.dumps(plan)
    assert (plan["capability"], plan["multiprocessors"]) == (90, 132)
    for phase in ("forward", "backward"):
        able = plan["largest_hidden"][phase]
        assert 0 < able["persistent_cluster"] < able["persistent_grid"] < machine.LARGEST
    text = "\n".join(value for _, value in doctor.plan_lines(plan))
    assert "compute capability 9.0, 132 multiprocessors, 227 KB" in text
    assert "teams of 16 blocks" in text
    (plan,) = machine.cuda_plans(["A100"])
    text = "\n".join(value for _, value in doctor.plan_lines(plan))
    assert "persistent_cluster none/none" in text
    assert "persistent_cluster no: clusters need compute capability 9.0" in text
    facts = machine.facts() | {"cuda_plans": [plan]}
    assert any(name == "plan for A100" for name, _ in doctor._lines(facts))
    assert any(machine.VARIABLE in line for line in machine.advice(facts))


def forced_on_gpu() -> list[tuple[str, str, str, test_cuda.Sizes]]:
    """Engine, cell, precision and sizes of what tests/test_cuda.py forces."""
    found = [(engine, *each) for engine, cases in test_cuda.LARGER.items() for each in cases]
    for sizes in (test_cuda.EVERY_CELL, test_cuda.CAPTURED, test_cuda.COMPILED, test_cuda.SMALL):
        every = itertools.product(test_cuda.ENGINES, test_cuda.CELLS, test_cuda.PRECISIONS)
        found += [(*each, sizes) for each in every]
    for sizes in test_cuda.AGAIN:
        every = itertools.product(test_cuda.PERSISTENT, test_cuda.CELLS, test_cuda.PRECISIONS)
        found += [(*each, sizes) for each in every]
    for engine, several in test_cuda.SIDE_BY_SIDE.items():
        found += [(engine, "lstm", "bfloat16", sizes) for sizes in several]
    return found


@pytest.mark.parametrize("chip", ["H100", "H200"])
def test_no_test_on_a_gpu_is_skipped_for_its_size(chip: str) -> None:
    """Where an engine refuses a test's sizes the test skips itself: not on these, by the plan."""
    for engine, cell, precision, sizes in forced_on_gpu():
        dtype, tf32 = test_cuda.PRECISIONS[precision]
        layer = test_cuda.layer_of(cell, sizes, dtype=dtype, device="meta")
        with gpu.products_as(gpu.Precision(dtype, tf32)):
            choices = fused_rnn.explain(layer, sizes[:3], chip=chip).choices
        for choice in choices:
            able = {each.engine for each in choice.candidates if each.possible}
            assert engine in able, (engine, cell, precision, sizes, choice.phase)


@pytest.mark.parametrize("name", gpu.PRECISIONS)
def test_tf32_is_for_both_sides_of_a_row(name: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with gpu.products_as(gpu.PRECISIONS[name]):
        assert torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")
        assert torch.backends.cudnn.allow_tf32 is (name == "tf32")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


# Rivals: modules with the interfaces of the real ones, computed by loops of torch.


def fake_haste() -> types.ModuleType:
    class Layer(nn.Module):
        gates: int
        biases: tuple[str, ...]

        def __init__(self, input_size: int, hidden_size: int) -> None:
            super().__init__()
            G = self.gates * hidden_size
            self.kernel = nn.Parameter(torch.zeros(input_size, G))
            self.recurrent_kernel = nn.Parameter(torch.zeros(hidden_size, G))
            for name in self.biases:
                setattr(self, name, nn.Parameter(torch.zeros(G)))

    class LSTM(Layer):
        gates, biases = 4, ("bias",)

        def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            h = c = input.new_zeros(input.shape[1], len(self.recurrent_kernel))
            outputs = []
            for x in input @ self.kernel:
                i, g, f, o = (x + h @ self.recurrent_kernel + self.bias).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            return torch.stack(outputs), (h[None], c[None])

    class GRU(Layer):
        gates, biases = 3, ("bias", "recurrent_bias")

        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            h = input.new_zeros(input.shape[1], len(self.recurrent_kernel))
            outputs = []
            for x in input @ self.kernel + self.bias:
                hidden = (h @ self.recurrent_kernel + self.recurrent_bias).chunk(3, 1)
                z, r, n = x.chunk(3, 1)
                z, r = (z + hidden[0]).sigmoid(), (r + hidden[1]).sigmoid()
                h = z * h + (1 - z) * (n + r * hidden[2]).tanh()
                outputs.append(h)
            return torch.stack(outputs), h[None]

    module = types.ModuleType("haste_pytorch")
    module.LSTM, module.GRU = LSTM, GRU  # type: ignore[attr-defined]
    return module


def fake_flashrnn() -> types.ModuleType:
    def flashrnn(
        Wx: Tensor, R: Tensor, b: Tensor, states: None = None, function: str = "",
        config: None = None, backend: str = "cuda_fused", dtype: str = "bfloat16",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Wx (B, T, G, N, D), R (G, N, D, P), b (G, N, D) to states (S, B, T, N, D)."""
        assert str(Wx.dtype) == f"torch.{dtype}"
        h = c = Wx.new_zeros(Wx.shape[0], *Wx.shape[3:])
        every = []
        for x in Wx.unbind(1):
            y = torch.einsum("gndp,bnp->bgnd", R, h)
            if function == "lstm":
                i, f, g, o = (x + y + b).unbind(1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif function == "gru":
                hidden = y[:, 0] + b[0]
                r, z = ((x[:, k] + y[:, k + 1] + b[k + 1]).sigmoid() for k in (0, 1))
                h = z * h + (1 - z) * (x[:, 2] + b[3] + r * hidden).tanh()
            else:
                h = (x + y + b)[:, 0].tanh()
            every.append(torch.stack([h, c] if function == "lstm" else [h]))
        return torch.stack(every, 2), every[-1][:, :, None]

    package, inner = types.ModuleType("flashrnn"), types.ModuleType("flashrnn.flashrnn")
    package.flashrnn = inner  # type: ignore[attr-defined]
    inner.flashrnn = flashrnn  # type: ignore[attr-defined]
    return package


MODULES = {"haste_pytorch": fake_haste, "flashrnn": fake_flashrnn}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("library", "cell"),
    [(library, cell) for library in rivals.LIBRARIES for cell in library.cells],
    ids=lambda value: value if isinstance(value, str) else value.module,
)
def test_adapters_compute_the_same(
    library: rivals.Library, cell: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library.module, MODULES[library.module]())
    problem = layers.problem(cell, SHAPE, CPU)
    exact = problem.checked(mode).exact()
    rival = library.adapt(cell, problem, mode)
    assert rivals.check(rival, exact) is None
    torch.testing.assert_close(rival.run()["output"].double(), exact["output"], rtol=0, atol=1e-5)

    weight_hh = dict(problem.peer.named_parameters())["weight_hh_l0"]
    with torch.no_grad():
        weight_hh.copy_(weight_hh.flip(0) * 3)  # gates in another order are found out
    message = rivals.check(library.adapt(cell, problem, mode), exact)
    assert message is not None
    assert "differs" in message


def test_rivals_are_columns_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda name: True)
    for name, make in MODULES.items():
        monkeypatch.setitem(sys.modules, name, make())

    def row(cell: str, dtype: str, **others) -> dict:
        case = gpu.Case(cell, "training", dtype, SHAPE, **others)
        return gpu.measure(case, SHAPE, CPU, gpu.DRY_EFFORT, rivals.LIBRARIES)

    found = row("LSTM", "fp32")
    assert set(found["peers"]) == {"torch.nn", "haste"}
    assert found["notes"] == ["haste: input product included"]
    assert set(row("RNN", "fp32")["peers"]) == {"torch.nn"}
    assert set(row("LSTM", "fp32", ragged=True)["peers"]) == {"torch.nn"}
    assert set(row("LSTM", "bf16")["peers"]) == {"torch.nn"}
    found = row("LSTM", "bf16", library="flashrnn")
    assert set(found["peers"]) == {"torch.nn", "flashrnn"}
    assert found["notes"] == ["flashrnn: input product NOT included"]

    # One that cannot be imported, or has another interface, is told of and left out.
    monkeypatch.setitem(sys.modules, "haste_pytorch", None)
    found = row("LSTM", "fp32")
    assert found["passed"]
    assert set(found["peers"]) == {"torch.nn"}
    assert found["notes"][0].startswith("haste_pytorch: ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "haste_pytorch", types.ModuleType("haste_pytorch"))
    assert row("LSTM", "fp32")["notes"][0].startswith("haste_pytorch: AttributeError")


# Files


def test_rows_with_the_worst_ratio_come_last(tmp_path: Path) -> None:
    case = gpu.Case("LSTM", "forward", "bf16", SHAPE)
    rows = []
    for name, ratio in (("a", 0.5), ("b", None), ("c", 3.0), ("d", 1.0)):
        row = gpu.blank(case, SHAPE) | {"key": name, "engine": "per_step", "ratio": ratio}
        row |= {"us": 1.0, "passed": True} if ratio else {"problem": "hung"}
        rows.append(row)
    assert [row["key"] for row in results.worst_last(rows)] == ["c", "d", "a", "b"]
    sweep = {"planned": 9, "running": None, "fault": None, "rows": rows}
    results.write_json(tmp_path / results.SWEEP, sweep)
    for name in results.NEEDED:
        results.add_stage(tmp_path, name, 0, 1.0)
    lines = results.summary(tmp_path)
    assert "sweep: 4 of 9 rows" in lines
    assert [line[-5:] for line in lines[-6:-3]] == ["x3.00", "x1.00", "x0.50"]
    assert lines[-3].endswith("FAILED hung")
    assert lines[-2:] == ["", "all passed"]
    assert [line for line in results.summary(tmp_path, shown=1) if "us/step" in line] == []
    (mean,) = results.means(rows)
    assert mean.endswith("mean x1.14, least x0.50, 3 rows")


@pytest.mark.parametrize(
    ("rc", "why", "verdict"),
    [
        (0, "", "all passed"),
        (1, "", "FAILED: tests"),
        (124, "", "FAILED: tests"),
        (None, "pytest is not installed", "FAILED: tests"),
        (None, "dry run", "all passed"),
    ],
)
def test_verdict(rc: int | None, why: str, verdict: str, tmp_path: Path) -> None:
    for name in results.NEEDED:
        if name != "tests":
            results.add_stage(tmp_path, name, 0, 1.0)
    results.add_stage(tmp_path, "memcheck", None, 0.0, "compute-sanitizer is not installed")
    results.add_stage(tmp_path, "tests", rc, 1.0, why)
    assert results.summary(tmp_path)[-1] == verdict


def test_a_stage_that_was_never_reached_is_named(tmp_path: Path) -> None:
    results.add_stage(tmp_path, "build", 0, 1.0)
    assert results.summary(tmp_path)[-1] == "never reached: import, tests, sweep"


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FUSED_RNN_COMMIT", raising=False)
    assert results.facts(tmp_path)["commit"] == "unknown"
    monkeypatch.setenv("FUSED_RNN_COMMIT", "abc")
    found = results.facts(tmp_path)
    assert (found["commit"], found["dirty"], found["nvcc"], found["gpu"]) == (
        "abc",
        None,
        None,
        None,
    )


def test_files_are_whole_and_finite(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    results.write_json(path, {"a": [1.0, float("nan")], "b": float("inf")})
    assert read(path) == {"a": [1.0, None], "b": None}
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    path.write_text("{")
    assert results.read_json(path, "other") == "other"


def test_sweep_needs_no_rich(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['rich'] = None\n"
        "from fused_rnn.bench.__main__ import main\n"
        "sys.exit(main(['gpu', '--device', 'cpu', '--rows', 'subset', '--seconds', '-1']))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--plan"]) == 0
    assert "sweep, subset: 170 rows" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert command.main(["gpu"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
