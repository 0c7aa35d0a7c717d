"""fused_rnn.explain: what it says of a call, and what the plan of the CUDA engines must keep to."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import _C, composed
from fused_rnn.cells import CELLS, call_of
from fused_rnn.explain import Candidate, Explanation
from fused_rnn.stack import Recurrence

CHIPS = ["A100", "H100", "H200", "B200"]
ENGINES = {"per_step", "persistent_cluster", "persistent_grid"}
DTYPES = ["float32", "float64", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _no_engine_is_forced(monkeypatch):
    monkeypatch.delenv("FUSED_RNN_CUDA_ENGINE", raising=False)


def plan(H: int = 512, **changed: Any) -> list[dict[str, Any]]:
    """``_C.cuda_plan`` of an LSTM in bfloat16 on H100, unless told otherwise."""
    of = Recurrence("lstm", "bfloat16", T=100, B=16, lanes=1, H=H)
    own = {name: changed.pop(name) for name in of._fields if name in changed}
    how = {"tf32": False, "backward": False, "chip": "H100"}
    return _C.cuda_plan(of._replace(**own), **how | changed)


def by_engine(candidates: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["engine"]: each for each in candidates}


def possible(H: int, **changed: Any) -> set[str]:
    return {each["engine"] for each in plan(H, **changed) if each["possible"]}


# ---- what is said of a layer


def test_the_function_is_not_hidden_by_its_module():
    importlib.import_module("fused_rnn.explain")
    assert callable(fused_rnn.explain)
    assert "explain" in fused_rnn.__all__


def test_every_layer_and_pass_has_all_engines_and_the_first_is_taken():
    layer = fused_rnn.LSTM(8, 16, num_layers=3)
    found = fused_rnn.explain(layer, (5, 3, 8), chip="H100")
    expected = [(k, phase) for k in range(3) for phase in ("forward", "backward")]
    assert [(choice.layer, choice.phase) for choice in found.choices] == expected
    for choice in found.choices:
        assert {each.engine for each in choice.candidates} == ENGINES
        assert choice.engine == choice.candidates[0].engine
        assert choice.candidates[0].possible
        for each in choice.candidates:
            assert isinstance(each, Candidate)
            assert each.reason
            assert each.possible == (each.us_per_step is not None)
            assert each.us_per_step is None or 0 < each.us_per_step < 1000
        backward = choice.phase == "backward"
        expected = plan(16, T=5, B=3, dtype="float32", backward=backward)
        assert [tuple(each) for each in choice.candidates] == [
            tuple(each.values()) for each in expected
        ]


@pytest.mark.cuda
def test_the_gpu_at_hand():
    layer = fused_rnn.LSTM(8, 16, device="cuda", dtype=torch.bfloat16)
    found = fused_rnn.explain(layer, torch.zeros(5, 3, 8, device="cuda", dtype=torch.bfloat16))
    assert found.device == torch.cuda.get_device_name()
    assert torch.cuda.get_device_name() in str(found)
    for choice in found.choices:
        assert {each.engine for each in choice.candidates} == ENGINES
    with pytest.raises(RuntimeError, match="Expected input on the layer's device cuda"):
        fused_rnn.explain(layer, torch.zeros(5, 3, 8))


# The layer, in training or not; and what its ops are called with: cell, lanes, units of a lane,
# whether there is a projection, whether the op is the varied one.
CALLS: list[tuple[str, dict[str, Any], bool, tuple[Any, ...]]] = [
    ("LSTM", {}, True, ("lstm", 1, 16, False, False)),
    ("RNN", {"nonlinearity": "relu"}, True, ("rnn_relu", 1, 16, False, False)),
    ("GRU", {"bidirectional": True}, True, ("gru", 2, 16, False, False)),
    ("GRU", {"reset_after": False}, True, ("gru_reset_before", 1, 16, False, False)),
    ("LSTM", {"peephole": True}, True, ("lstm_peephole", 1, 16, False, False)),
    ("LSTM", {"coupled": True}, True, ("lstm_coupled", 1, 16, False, False)),
    ("LSTM", {"peephole": True, "coupled": True}, True,
     ("lstm_coupled_peephole", 1, 16, False, False)),
    ("LSTM", {"proj_size": 4, "bidirectional": True}, True, ("lstm", 2, 16, True, False)),
    ("LSTM", {"proj_size": 4, "bias": False}, True, ("lstm", 1, 16, True, False)),
    ("LSTM", {"num_heads": 4}, True, ("lstm", 4, 4, False, False)),
    ("GRU", {"num_heads": 2, "bidirectional": True}, True, ("gru", 4, 8, False, False)),
    ("LSTM", {"layer_norm": True}, False, ("lstm", 1, 16, False, True)),
    # A normalisation takes all heads together.
    ("LSTM", {"layer_norm": "joint", "num_heads": 4}, False, ("lstm", 1, 16, False, True)),
    ("GRU", {"zoneout": 0.1}, True, ("gru", 1, 16, False, True)),
    ("GRU", {"zoneout": 0.1}, False, ("gru", 1, 16, False, True)),
    ("GRU", {"zoneout": 0.1, "num_heads": 2}, True, ("gru", 2, 8, False, True)),
    ("GRU", {"recurrent_dropout": 0.1}, True, ("gru", 1, 16, False, True)),
    ("GRU", {"recurrent_dropout": 0.1}, False, ("gru", 1, 16, False, False)),
    ("GRU", {"weight_dropout": 0.1, "dropout": 0.1}, True, ("gru", 1, 16, False, False)),
]  # fmt: skip


class Ops(TorchDispatchMode):
    """The cells whose layers run, whether they are varied, with lanes, T and B."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_rnn" and func.name().endswith("forward"):
            call, _ = call_of(args[0], *args[-2:])
            T, B = args[1][0].shape[:2]
            self.seen.append((call.cell, call.variation is not None, call.recurrences, T, B))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "options", "training", "expected"), CALLS)
def test_the_cell_and_the_lanes_are_those_of_the_call(kind, options, training, expected):
    layer = getattr(fused_rnn, kind)(8, 16, num_layers=2, **options).train(training)
    found = fused_rnn.explain(layer, (5, 3, 8), chip="H100").recurrences
    assert [(r.cell, r.lanes, r.H, r.projected, r.varied) for r in found] == [expected] * 2
    assert [(r.dtype, r.T, r.B) for r in found] == [("float32", 5, 3)] * 2
    with torch.no_grad(), Ops() as ran:
        layer(torch.randn(5, 3, 8))
    assert [(r.cell, r.varied, r.lanes, r.T, r.B) for r in found] == ran.seen
    # The layer is in the other mode, and explain is told so.
    layer.train(not training)
    other = fused_rnn.explain(layer, (5, 3, 8), training=training, chip="H100").recurrences
    assert other == found
    assert layer.training is not training


def test_input_may_come_in_any_form():
    layer = fused_rnn.GRU(8, 16)
    rows = pack_sequence([torch.randn(n, 8) for n in (2, 5, 3)], enforce_sorted=False)
    forms = [
        (5, 3, 8),
        torch.Size((5, 3, 8)),
        torch.randn(5, 3, 8),
        torch.empty(5, 3, 8, device="meta"),
        rows,
        PackedSequence(rows.data.to("meta"), *rows[1:]),
    ]
    for form, chip in itertools.product(forms, (None, "H100")):
        (found,) = fused_rnn.explain(layer, form, chip=chip).recurrences
        assert (found.T, found.B) == (5, 3), type(form)
    hx, lengths = torch.randn(1, 3, 16), torch.tensor([2, 5, 0])
    resets = torch.zeros(5, 3, dtype=torch.bool)
    given = fused_rnn.explain(layer, (5, 3, 8), hx, lengths=lengths, resets=resets, chip="H100")
    assert str(given) == str(fused_rnn.explain(layer, (5, 3, 8), chip="H100"))
    assert fused_rnn.explain(layer, (5, 8), hx[:, 0]).recurrences[0][2:4] == (5, 1)
    batch_first = fused_rnn.GRU(8, 16, batch_first=True)
    assert fused_rnn.explain(batch_first, (3, 5, 8)).recurrences[0][2:4] == (5, 3)
    assert fused_rnn.explain(batch_first, (5, 8)).recurrences[0][2:4] == (5, 1)


def test_nothing_is_computed_or_changed():
    layer = fused_rnn.GRU(8, 16, 2, dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5)
    layer.register_forward_pre_hook(lambda *_: pytest.fail("the layer was called"))
    before = {**layer.__dict__}
    state = torch.get_rng_state()
    fused_rnn.explain(layer, (5, 3, 8), chip="H100")
    # A tensor of these sizes would take 2^53 bytes.
    big = fused_rnn.explain(layer, (2**24, 2**24, 8), chip="H100").recurrences[0]
    assert (big.T, big.B) == (2**24, 2**24)
    assert torch.equal(torch.get_rng_state(), state)
    assert {**layer.__dict__} == before


def test_layers_on_meta_and_parametrized_layers():
    on_meta = fused_rnn.LSTM(8, 16, device="meta", dtype=torch.bfloat16)
    (found,) = fused_rnn.explain(on_meta, (5, 3, 8), chip="B200").recurrences
    assert found.dtype == "bfloat16"
    layer = weight_norm(fused_rnn.LSTM(8, 16), "weight_hh_l0")
    plain = fused_rnn.explain(fused_rnn.LSTM(8, 16), (5, 3, 8), chip="H100")
    assert str(fused_rnn.explain(layer, (5, 3, 8), chip="H100")) == str(plain)


def test_dtypes_autocast_and_tf32(monkeypatch):
    layer = fused_rnn.LSTM(8, 256)
    exact = fused_rnn.explain(layer, (5, 3, 8), chip="H100")
    monkeypatch.setattr(composed, "allows_tf32", lambda: True)
    rounded = fused_rnn.explain(layer, (5, 3, 8), chip="H100")
    assert "TF32" in str(rounded) and "TF32" not in str(exact)
    for a, b in zip(exact.choices, rounded.choices, strict=True):
        assert b.candidates[0].us_per_step < a.candidates[0].us_per_step
    with torch.autocast("cpu", torch.bfloat16):
        hx = (torch.zeros(1, 3, 256), torch.zeros(1, 3, 256, dtype=torch.bfloat16))
        (found,) = fused_rnn.explain(layer, torch.zeros(5, 3, 8), hx).recurrences
        assert found.dtype == "bfloat16"
        # That is of the CPU, and leaves float64 alone.
        (found,) = fused_rnn.explain(layer, (5, 3, 8), chip="H100").recurrences
        assert found.dtype == "float32"
        (found,) = fused_rnn.explain(fused_rnn.LSTM(8, 16).double(), (5, 3, 8)).recurrences
        assert found.dtype == "float64"


def explanations() -> dict[str, Explanation]:
    layers = {
        "plain": fused_rnn.LSTM(8, 768, 12, bidirectional=True, device="meta"),
        "large": fused_rnn.LSTM(8, 8192, device="meta", dtype=torch.float16),
        "varied": fused_rnn.LSTM(8, 64, coupled=True, peephole=True, zoneout=0.1, device="meta"),
        "float64": fused_rnn.LSTM(8, 64, dtype=torch.float64, device="meta"),
    }
    found = {
        f"{name} {chip}": fused_rnn.explain(layer, (1000, 4096, 8), chip=chip)
        for (name, layer), chip in itertools.product(layers.items(), CHIPS)
    }
    return found | {"cpu": fused_rnn.explain(fused_rnn.GRU(8, 16), (5, 3, 8))}


def test_the_table():
    for name, found in explanations().items():
        text = str(found)
        assert repr(found) == text
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80, name
        assert not [line for line in lines if line != line.rstrip()], name
        words = " ".join(text.split())
        for choice in found.choices[:2]:
            assert re.search(rf"^{choice.phase} +{choice.engine} ", text, re.M), name
            for each in choice.candidates:
                assert each.engine in words
                assert len(re.findall(r"\S+", each.reason)) <= len(words.split())
                if each.us_per_step is not None:
                    assert f" {each.us_per_step:.2f} " in text
        predicted = any(c.us_per_step is not None for c in found.choices[0].candidates)
        assert ("predicted, not measured" in words) == predicted, name
        assert ("assumed" in text) == (name != "cpu")


def test_the_table_shows_reasons_whole():
    found = fused_rnn.explain(fused_rnn.LSTM(8, 1024, device="meta"), (9, 4, 8), chip="H100")
    words = " ".join(str(found).split())
    for each in found.choices[0].candidates:
        assert " ".join(each.reason.split()) in words


# ---- the CPU


def test_the_cpu_has_one_engine():
    found = fused_rnn.explain(fused_rnn.LSTM(8, 16, 2), (5, 3, 8))
    for choice in found.choices:
        (only,) = choice.candidates
        assert only.engine == "cpu" and only.possible and only.us_per_step is None
        assert _C.active_instruction_set() in only.reason
    torch.set_num_threads(1)
    found = fused_rnn.explain(fused_rnn.LSTM(8, 16), (5, 3, 8))
    assert "up to 1 thread" in found.choices[0].candidates[0].reason


def test_a_forced_instruction_set_is_shown():
    script = (
        "import fused_rnn\n"
        "found = fused_rnn.explain(fused_rnn.GRU(2, 4), (3, 1, 2))\n"
        "print(found.choices[0].candidates[0].reason)"
    )
    reasons = {}
    for forced in ("portable", "", "avx1024"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "FUSED_RNN_CPU_ISA": forced}, capture_output=True, text=True,
        )  # fmt: skip
        reasons[forced] = run.stdout if run.returncode == 0 else run.stderr
    assert "portable (forced by FUSED_RNN_CPU_ISA)" in reasons["portable"]
    assert "(FUSED_RNN_CPU_ISA forces another)" in reasons[""]
    assert "RuntimeError: FUSED_RNN_CPU_ISA=avx1024: no such" in reasons["avx1024"]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((5, 3, 9),), {}, RuntimeError, r"input_size.* Expected 8, got 9"),
        (((5, 3, 2, 8),), {}, ValueError, r"Expected input to be 2D or 3D, got 4D"),
        (((0, 3, 8),), {}, RuntimeError, r"sequence length to be larger than 0"),
        (((5, -3, 8),), {}, RuntimeError, r"input of sizes .*not negative, got \(5, -3, 8\)"),
        (((5, 3.0, 8),), {}, TypeError, r"input should be a tensor.* got: tuple"),
        ((7,), {}, TypeError, r"input should be a tensor, a PackedSequence or .* got: int"),
        ((torch.zeros(5, 3, 8).double(),), {}, ValueError, r"input dtype \(torch.float64\)"),
        (((5, 3, 8), torch.zeros(1, 3, 16)), {}, RuntimeError, r"\(2, 3, 16\), got \[1, 3, 16\]"),
        (((5, 8), torch.zeros(2, 1, 16)), {}, RuntimeError, r"hx should also be 2-D but got 3-D"),
        (((5, 3, 8),), {"lengths": torch.zeros(4)}, RuntimeError, r"lengths .*\(3,\), got \(4,\)"),
        (((5, 3, 8),), {"lengths": torch.zeros(3)}, RuntimeError, r"lengths of an integer dtype"),
        (((5, 3, 8),), {"resets": torch.zeros(3, 5)}, RuntimeError, r"resets .*\(5, 3\), got \(3"),
        ((pack_sequence([torch.zeros(2, 8)]),), {"lengths": torch.ones(1)}, ValueError, "lengths"),
        (((5, 3, 8),), {"chip": "H1000"}, ValueError, r"A100, H100, H200, B200, got 'H1000'"),
        (((5, 3, 8),), {"chip": 100}, ValueError, r"chip should be None or one of"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, error, message):
    layer = fused_rnn.GRU(8, 16, bidirectional=True)
    with pytest.raises(error, match=message):
        fused_rnn.explain(layer, *arguments, **options)


def test_wrong_layers():
    for other in (torch.nn.LSTM(8, 16), fused_rnn.LSTMCell(8, 16), None):
        with pytest.raises(TypeError, match=rf"layer should be .* got: {type(other).__name__}"):
            fused_rnn.explain(other, (5, 3, 8))
    on_meta = fused_rnn.LSTM(8, 16, device="meta")
    with pytest.raises(RuntimeError, match=r"Expected layer on .* got meta"):
        fused_rnn.explain(on_meta, (5, 3, 8))
    with pytest.raises(RuntimeError, match=r"Expected hx .*pair|got 1"):
        fused_rnn.explain(on_meta, (5, 3, 8), (torch.zeros(1, 3, 16),), chip="H100")
    if _C.build_info()["cuda"] is None:
        with pytest.raises(RuntimeError, match="no CUDA"):
            plan(chip=None)


# ---- the plan


def test_forcing_an_engine(monkeypatch):
    layer = fused_rnn.LSTM(8, 512, device="meta", dtype=torch.bfloat16)
    free = fused_rnn.explain(layer, (5, 16, 8), chip="H100").choices[0].candidates
    for engine in ENGINES:
        monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
        found = fused_rnn.explain(layer, (5, 16, 8), chip="H100")
        for choice in found.choices:
            assert choice.engine == engine
            forced = [each.engine for each in choice.candidates if "forced" in each.reason]
            assert forced == [engine]
        # Nothing else changes, the order of the others included.
        taken, *others = found.choices[0].candidates
        assert others == [each for each in free if each.engine != engine]
        assert taken.us_per_step == next(e for e in free if e.engine == engine).us_per_step
        assert "forced by FUSED_RNN_CUDA_ENGINE" in " ".join(str(found).split())
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "")
    assert fused_rnn.explain(layer, (5, 16, 8), chip="H100").choices[0].candidates == free


def test_forcing_what_cannot_be(monkeypatch):
    large = fused_rnn.LSTM(8, 4096, device="meta")
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_grid")
    with pytest.raises(RuntimeError, match="is persistent_grid, which cannot take this: the recur"):
        fused_rnn.explain(large, (5, 16, 8), chip="H100")
    # What only per_step has stays its own.
    projected = fused_rnn.LSTM(8, 64, proj_size=4, device="meta")
    for choice in fused_rnn.explain(projected, (5, 16, 8), chip="H100").choices:
        assert choice.engine == "per_step"
        assert "forced" not in choice.candidates[0].reason
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "fastest")
    with pytest.raises(RuntimeError, match=r"per_step, persistent_cluster or .*, got fastest"):
        fused_rnn.explain(large, (5, 16, 8), chip="H100")


def test_chips():
    chips = _C.cuda_chips()
    assert list(chips) == CHIPS
    for name, chip in chips.items():
        for size, count in chip["clusters"].items():
            assert 0 <= size * count <= chip["multiprocessors"], name
        assert 0.5 < chip["gigahertz"] < 3
        assert 160 << 10 <= chip["shared_bytes"] <= 227 << 10
        assert any(chip["clusters"].values()) == (chip["capability"] >= 90)
    slower = {**chips["H200"], "gigahertz": chips["H100"]["gigahertz"]}
    assert slower == chips["H100"] != chips["H200"]


GRID = list(itertools.product(CELLS, DTYPES, (1, 16, 100, 512, 777), (1, 9, 256), (1, 2), CHIPS))


def test_a_plan_fits_its_chip_and_is_in_order():
    seen = set()
    for cell, dtype, H, B, L, chip in GRID:
        for backward in (False, True):
            case = dict(cell=cell, dtype=dtype, B=B, lanes=L, chip=chip, backward=backward)
            found = plan(H, **case)
            assert {each["engine"] for each in found} == ENGINES, case
            assert by_engine(found)["per_step"]["possible"], case
            most = _C.cuda_chips()[chip]["shared_bytes"]
            for each in found:
                assert each["shared_bytes"] <= most, case
                resident = each["possible"] and each["engine"] != "per_step"
                assert (each["shared_bytes"] > 0) == resident, case
            flags = [each["possible"] for each in found]
            assert flags == sorted(flags, reverse=True), case
            times = [each["microseconds_per_step"] for each in found if each["possible"]]
            assert times in ([None], sorted(t for t in times if t)), case
            seen.add(found[0]["engine"])
    assert seen == ENGINES


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chip", CHIPS)
def test_growing_layers_leave_the_cluster_and_then_the_grid(chip, dtype, backward):
    able = {
        size: possible(size, dtype=dtype, chip=chip, backward=backward)
        for size in range(16, 5000, 16)
    }
    assert able[4992] == {"per_step"}
    last = {}
    for engine in ENGINES:
        taken = [size for size, engines in able.items() if engine in engines]
        last[engine] = max(taken, default=0)
        assert taken == list(range(16, last[engine] + 1, 16)), "once out, in again"
    assert last["persistent_grid"] > max(last["persistent_cluster"], 256)
    if chip == "A100":
        assert last["persistent_cluster"] == 0
    else:
        assert last["persistent_cluster"] >= 128
    reasons = by_engine(plan(4992, dtype=dtype, chip=chip, backward=backward))
    assert "does not fit into" in reasons["persistent_grid"]["reason"]


def test_without_clusters():
    reason = by_engine(plan(64, chip="A100"))["persistent_cluster"]["reason"]
    assert reason == "clusters need compute capability 9.0, this chip has 8.0"
    assert by_engine(plan(64, chip="A100"))["persistent_grid"]["possible"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"projected": True}, "there is a projection"),
        ({"varied": True}, "there is layer norm, zoneout or recurrent dropout"),
        ({"cell": "gru_reset_before"}, "there is a gate that waits for another"),
        ({"dtype": "float64"}, "the dtype is neither float32 nor a half type"),
        ({"B": 0}, "there are no rows"),
        ({"T": 0}, "there are no timesteps"),
    ],
)
def test_what_only_per_step_takes(changed, reason):
    assert possible(64) == ENGINES
    for backward in (False, True):
        first, *others = plan(64, backward=backward, **changed)
        assert first["engine"] == "per_step" and first["possible"]
        assert [(each["possible"], each["reason"]) for each in others] == [(False, reason)] * 2
        assert [each["microseconds_per_step"] for each in others] == [None] * 2
        # The model knows one product of float32 or half types a step, and nothing around it.
        assert (first["microseconds_per_step"] is None) == (0 not in changed.values())


def test_wrong_names_in_a_plan():
    for changed in ({"cell": "lstn"}, {"dtype": "float8"}, {"chip": "H1000"}):
        (given,) = changed.values()
        with pytest.raises(ValueError, match=f"of that name: {given}"):
            plan(**changed)
