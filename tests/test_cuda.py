"""What only a GPU shows: streams, graphs, devices, and the kernels as the compiler made them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    LAYERS,
    as_tuple,
    assert_close_like_torch,
    assert_equal,
    assert_near,
    by_reference,
    double,
    dyadic,
    pair,
    run,
    states,
)

import fused_rnn
from fused_rnn import autograd
from fused_rnn.cells import CELLS as TRAITS
from fused_rnn.cells import Call, Rest, Variation

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ENGINES = ["per_step", "persistent_cluster", "persistent_grid"]
PERSISTENT = ENGINES[1:]
# How numbers are stored, and whether their products may round to TF32.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
CELLS = LAYERS | {
    "lstm_peephole": ("LSTM", {"peephole": True}),
    "lstm_coupled": ("LSTM", {"coupled": True}),
    "lstm_coupled_peephole": ("LSTM", {"peephole": True, "coupled": True}),
}


class Sizes(NamedTuple):
    """Of an input and its layer; with lengths and resets where it is ragged."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    bidirectional: bool = False
    ragged: bool = False


def layer_of(cell: str, sizes: Sizes, **options: Any) -> Any:
    name, chosen = CELLS[cell]
    layer = getattr(fused_rnn, name)
    return layer(sizes.I, sizes.H, bidirectional=sizes.bidirectional, **chosen, **options)


def call_of(layer: Any, sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    """On the GPU: an input, states, and lengths and resets by name."""
    T, B = sizes.T, sizes.B
    x = dyadic(T, B, sizes.I, dtype=dtype, device="cuda")
    hx = states(layer, B, dtype=dtype, device="cuda")
    if not sizes.ragged:
        return x, hx, {}
    lengths = torch.randint(T + 1, (B,))
    lengths[0] = T
    return x, hx, {"lengths": lengths.cuda(), "resets": (torch.rand(T, B) < 0.1).cuda()}


@pytest.fixture(params=PRECISIONS)
def precision(request) -> Iterator[str]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[request.param][1]
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def force(monkeypatch: pytest.MonkeyPatch, engine: str, layer: Any, sizes: Sizes) -> None:
    """Has ``layer`` run by ``engine``, or skips the test where this GPU cannot.

    That every size here is one that an H100 takes is asserted in test_gpu_check.py.
    """
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
    try:
        explanation = fused_rnn.explain(layer, sizes[:3])
    except RuntimeError as error:
        if "which cannot take this" not in str(error):
            raise
        pytest.skip(str(error))
    assert {choice.engine for choice in explanation.choices} == {engine}


@pytest.fixture
def unpoisoned(monkeypatch):
    """Uninitialised memory as it comes: a sanitizer that looks for reads of it sees them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


# The tests named small are what bench/gpu_check.sh runs under the sanitizers: few launches, and on
# the GPU nothing but ours and the products it calls.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", LAYERS)
def test_small_layers_match_the_reference(cell, dtype, unpoisoned):
    """Two layers, two directions, odd sizes, lengths and resets, against loops on the CPU."""
    _, layer = pair(cell, 5, 17, num_layers=2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(6, 3, 5, dtype=dtype), states(layer, 3, dtype=dtype)
    options = {"lengths": torch.tensor([6, 0, 4]), "resets": torch.rand(6, 3) < 0.2}
    loops = run(layer, x, hx, call=by_reference(cell, layer), **options)
    exact = double(layer)
    exactly = run(exact, double(x), double(hx), call=by_reference(cell, exact), **options)
    on_gpu = {name: value.cuda() for name, value in options.items()}
    hx = tuple(h.cuda() for h in hx) if isinstance(hx, tuple) else hx.cuda()
    found = run(layer.cuda(), x.cuda(), hx, **on_gpu)
    found = {name: value.cpu() for name, value in found.items()}
    assert_close_like_torch([found], [loops], [exactly])


SMALL = Sizes(4, 11, 3, 40, bidirectional=True, ragged=True)


@pytest.mark.parametrize("engine", PERSISTENT)
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "tf32"], indirect=True)
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru", "rnn_relu"])
def test_small_layers_on_engines(cell, precision, engine, unpoisoned, monkeypatch):
    """A last unit block and a last tile of rows that are not full, against loops on the CPU."""
    dtype, tf32 = PRECISIONS[precision]
    layer = layer_of(cell, SMALL, dtype=dtype)
    on_gpu = layer_of(cell, SMALL, dtype=dtype, device="cuda")
    on_gpu.load_state_dict(layer.state_dict())
    force(monkeypatch, engine, on_gpu, SMALL)
    x, hx, ragged = call_of(on_gpu, SMALL, dtype)
    found = {name: value.cpu() for name, value in run(on_gpu, x, hx, **ragged).items()}
    hx = tuple(h.cpu() for h in hx) if isinstance(hx, tuple) else hx.cpu()
    given = {name: value.cpu() for name, value in ragged.items()}
    assert_by_the_rule(cell, layer, [(found, x.cpu(), hx, given)], tf32)


def test_small_projection_equals_cpu(unpoisoned):
    layer = fused_rnn.LSTM(4, 9, proj_size=5, bidirectional=True, dtype=torch.float64)
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([7, 0, 3, 1, 6])
    on_cpu = run(layer, x, lengths=lengths)
    on_gpu = run(layer.cuda(), x.cuda(), lengths=lengths.cuda())
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_norm": 1},
        {"layer_norm": 2},
        {"zoneout_h": 0.3},
        {"zoneout_c": 0.4},
        {"recurrent_dropout": 0.3},
        {"layer_norm": 1, "zoneout_h": 0.3, "recurrent_dropout": 0.3},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("cell", TRAITS)
def test_small_options_equal_cpu(cell, options, unpoisoned):
    """Two directions in float64, the same masks on both devices."""
    traits, variation = TRAITS[cell], Variation(**options)
    if variation.zoneout_c and not traits.has_c:
        pytest.skip("no c")
    if variation.layer_norm and traits.late_gate:
        pytest.skip("not all gates at one time")
    T, B, I, H = 6, 3, 5, 17  # noqa: E741
    call = Call(cell, True, False, 1 + traits.has_c, 2, 2, traits.has_c, variation)
    given = [dyadic(T, B, I), *(dyadic(2, B, H) for _ in range(call.states))]
    sizes = {"I": I, "H": H, "P": H}
    given += [dyadic(*weight.shape(sizes)) / 4 for _ in range(2) for weight in call.table]
    ragged = (torch.tensor([6, 0, 4]), torch.rand(T, B) < 0.2)
    found = {}
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in given]
        lengths, resets, seed = (t.to(device) for t in (*ragged, torch.tensor(11)))
        rest = Rest(lengths=lengths, resets=resets, seed=seed)
        outputs = autograd.run_layer(call, leaves, rest)
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)
        found[device] = [t.cpu() for t in (*outputs, *grads)]
    for on_gpu, on_cpu in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_weight_dropout_equals_cpu(dtype, unpoisoned):
    weight, seed = torch.randn(3, 7, 130, dtype=torch.float64).to(dtype), torch.tensor(2**61)
    on_cpu = torch.ops.fused_rnn.dropout(weight, 0.3, seed)
    on_gpu = torch.ops.fused_rnn.dropout(weight.cuda(), 0.3, seed.cuda())
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", LAYERS)
def test_layers_match_torch(cell, dtype):
    theirs, ours = pair(cell, 5, 17, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
    x = torch.randn(6, 3, 5, device="cuda", dtype=dtype)
    hx = states(ours, 3, device="cuda", dtype=dtype)
    exact = run(double(theirs), double(x), double(hx))
    assert_close_like_torch([run(ours, x, hx)], [run(theirs, x, hx)], [exact])


Draw = tuple[dict[str, torch.Tensor], torch.Tensor, Any, dict[str, torch.Tensor]]


def assert_by_the_rule(cell: str, layer: Any, draws: list[Draw], tf32: bool) -> None:
    """Each draw, what was found and from what: errors at most twice those of the plain loop.

    TF32 has as many bits of fraction as float16, whose loop is its measure.
    """
    exact, plain = double(layer), double(layer).to(torch.half) if tf32 else layer
    dtype = next(plain.parameters()).dtype

    def cast(hx: Any) -> Any:
        return tuple(h.to(dtype) for h in hx) if isinstance(hx, tuple) else hx.to(dtype)

    loops, exactly = [], []
    for found, x, hx, ragged in draws:
        loop = run(plain, x.to(dtype), cast(hx), call=by_reference(cell, plain), **ragged)
        loops.append({name: value.to(found[name].dtype) for name, value in loop.items()})
        exactly.append(run(exact, double(x), double(hx), call=by_reference(cell, exact), **ragged))
    assert_close_like_torch([found for found, *_ in draws], loops, exactly)


def assert_engine_obeys_the_rule(
    monkeypatch: pytest.MonkeyPatch, engine: str, cell: str, precision: str, sizes: Sizes
) -> None:
    dtype, tf32 = PRECISIONS[precision]
    layer = layer_of(cell, sizes, dtype=dtype, device="cuda")
    force(monkeypatch, engine, layer, sizes)
    draws = []
    for _ in range(2):
        x, hx, ragged = call_of(layer, sizes, dtype)
        draws.append((run(layer, x, hx, **ragged), x, hx, ragged))
    assert_by_the_rule(cell, layer, draws, tf32)


EVERY_CELL = Sizes(17, 11, 9, 45, bidirectional=True, ragged=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_engines_obey_the_tolerance_rule(cell, precision, engine, monkeypatch):
    assert_engine_obeys_the_rule(monkeypatch, engine, cell, precision, EVERY_CELL)


# What only a real GPU has room for: teams of many blocks, weights in registers and beyond them,
# several teams, groups of tiles in turns. In float32 T*B is small: the one product that ours makes
# of a weight's gradient adds up in a longer chain than the loop's product for each timestep.
LARGER: dict[str, list[tuple[str, str, Sizes]]] = {
    "per_step": [
        ("lstm", "bfloat16", Sizes(24, 16, 32, 1024)),
        ("gru", "tf32", Sizes(24, 37, 16, 509, True, True)),
    ],
    "persistent_cluster": [
        ("rnn_tanh", "float32", Sizes(64, 1, 8, 64)),
        ("gru", "float16", Sizes(64, 37, 8, 64, True, True)),
        ("lstm", "bfloat16", Sizes(64, 1, 8, 200)),
        ("lstm_peephole", "float32", Sizes(9, 16, 8, 200, True, True)),
        ("lstm_coupled", "tf32", Sizes(20, 37, 8, 199, True, True)),
        ("lstm", "bfloat16", Sizes(64, 16, 32, 512)),
        ("lstm", "float16", Sizes(24, 1, 16, 512)),
        ("lstm", "tf32", Sizes(24, 37, 16, 512)),
        ("gru", "bfloat16", Sizes(24, 300, 16, 509, True, True)),
        ("gru", "float32", Sizes(8, 16, 16, 512)),
        ("rnn_relu", "float32", Sizes(4, 37, 16, 333)),
    ],
    "persistent_grid": [
        ("rnn_relu", "tf32", Sizes(64, 1, 8, 64)),
        ("lstm", "float16", Sizes(64, 37, 8, 64, True, True)),
        ("gru", "bfloat16", Sizes(64, 1, 8, 200)),
        ("lstm_peephole", "float32", Sizes(9, 16, 8, 200, True, True)),
        ("lstm", "bfloat16", Sizes(64, 16, 32, 512)),
        ("lstm", "float32", Sizes(4, 37, 16, 512)),
        ("lstm", "bfloat16", Sizes(64, 16, 32, 1024)),
        ("lstm", "tf32", Sizes(16, 37, 16, 1024)),
        ("lstm_coupled", "bfloat16", Sizes(16, 37, 16, 1023, True, True)),
        ("gru", "float16", Sizes(24, 1, 16, 1024)),
        ("gru", "float32", Sizes(8, 16, 16, 1024)),
        ("rnn_tanh", "bfloat16", Sizes(16, 300, 16, 777, True, True)),
        ("lstm", "bfloat16", Sizes(8, 16, 16, 2048)),
    ],
}


@pytest.mark.parametrize(
    ("engine", "cell", "precision", "sizes"),
    [(engine, *each) for engine, cases in LARGER.items() for each in cases],
    indirect=["precision"],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, Sizes) else value,
)
def test_engines_on_larger_layers(engine, cell, precision, sizes, monkeypatch):
    assert_engine_obeys_the_rule(monkeypatch, engine, cell, precision, sizes)


AGAIN = (Sizes(40, 16, 64, 128), Sizes(24, 37, 48, 200, bidirectional=True, ragged=True))


@pytest.mark.parametrize("engine", PERSISTENT)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm_peephole", "gru"])
def test_engines_are_deterministic(cell, precision, engine, monkeypatch):
    """Bitwise, whatever lies in memory, also on another stream that is still busy."""
    torch.use_deterministic_algorithms(False)
    dtype, _ = PRECISIONS[precision]
    for sizes in AGAIN:
        layer = layer_of(cell, sizes, dtype=dtype, device="cuda")
        force(monkeypatch, engine, layer, sizes)
        x, hx, ragged = call_of(layer, sizes, dtype)
        first = run(layer, x, hx, **ragged)
        for _ in range(4):
            for size in (1 << 10, 1 << 22):
                torch.full((size,), float("nan"), device="cuda")  # left in the allocator's blocks
            assert_equal(run(layer, x, hx, **ragged), first)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            late = torch.zeros_like(x)
            late.copy_(x)
            found = run(layer, late, hx, **ragged)
        stream.synchronize()
        assert_equal(found, first)


SIDE_BY_SIDE = {
    "persistent_cluster": [Sizes(64, 16, 16, 512), Sizes(64, 64, 16, 256, True)],
    "persistent_grid": [Sizes(64, 16, 16, 1024), Sizes(64, 16, 16, 1024, True)],
}


@pytest.mark.parametrize("engines", [[name] for name in PERSISTENT] + [PERSISTENT], ids=",".join)
def test_layers_side_by_side_on_two_streams(engines, monkeypatch):
    """Launches that wait for their own blocks, and do not fit together, must not wait for ever.

    In a process of its own: one that hangs cannot be interrupted.
    """
    for engine in engines:
        for sizes in SIDE_BY_SIDE[engine]:
            layer = layer_of("lstm", sizes, dtype=torch.bfloat16, device="cuda")
            force(monkeypatch, engine, layer, sizes)
    script = f"import test_cuda; test_cuda.run_side_by_side({engines!r})"
    subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, check=True, timeout=55
    )


def run_side_by_side(engines: list[str]) -> None:
    """Forward and backward of two layers or more, each on its stream, 30 times; equal each time."""
    jobs = []
    for engine in engines:
        for sizes in SIDE_BY_SIDE[engine]:
            layer = layer_of("lstm", sizes, dtype=torch.bfloat16, device="cuda")
            x, hx, _ = call_of(layer, sizes, torch.bfloat16)
            os.environ["FUSED_RNN_CUDA_ENGINE"] = engine
            alone = run(layer, x, hx)
            jobs.append((engine, layer, x, hx, alone, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(30):
        together = []
        for engine, layer, x, hx, _, stream in jobs:
            os.environ["FUSED_RNN_CUDA_ENGINE"] = engine
            with torch.cuda.stream(stream):
                together.append(run(layer, x, hx))
        torch.cuda.synchronize()
        for found, (*_, alone, _) in zip(together, jobs, strict=True):
            assert_equal(found, alone)


def assert_capture_equals(
    step: Callable[[], dict[str, torch.Tensor]], change: Callable[[int], Any]
) -> None:
    """Three replays, each after a ``change`` of inputs, against the steps themselves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay in range(3):
        with torch.no_grad():
            change(replay)
        graph.replay()
        replayed = {name: t.clone() for name, t in captured.items()}
        assert_equal(replayed, step())


STACKED = Sizes(100, 5, 8, 40, ragged=True)


@pytest.fixture
def stack_of_three(precision, request, monkeypatch):
    """A stack, its call, and a function that has it run in so many parts of time."""
    cell, engine = request.param
    dtype, _ = PRECISIONS[precision]
    layer = layer_of(cell, STACKED, num_layers=3, device="cuda", dtype=dtype)
    force(monkeypatch, engine, layer, STACKED)
    x, hx, ragged = call_of(layer, STACKED, dtype)

    def in_parts(parts: int) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", str(parts))
        return run(layer, x, hx, **ragged)

    return layer, (x, hx, ragged), in_parts


WAVEFRONTS = [(cell, engine) for cell in ("lstm_peephole", "gru") for engine in ENGINES]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"], indirect=True)
@pytest.mark.parametrize("stack_of_three", WAVEFRONTS, indirect=True, ids="-".join)
def test_wavefronts_obey_the_tolerance_rule(stack_of_three, request):
    layer, (x, hx, ragged), in_parts = stack_of_three
    cell = request.node.callspec.params["stack_of_three"][0]
    for parts in (1, 4, 7):
        assert_by_the_rule(cell, layer, [(in_parts(parts), x, hx, ragged)], tf32=False)


@pytest.mark.parametrize("precision", ["float32"], indirect=True)
@pytest.mark.parametrize("stack_of_three", WAVEFRONTS, indirect=True, ids="-".join)
def test_wavefronts_are_deterministic(stack_of_three):
    """Bitwise: no stream reads what another has not written, or writes what another still reads."""
    _, _, in_parts = stack_of_three
    first = in_parts(5)
    for _ in range(10):
        for size in (1 << 10, 1 << 18, 1 << 22):
            torch.full((size,), float("nan"), device="cuda")  # left in the allocator's blocks
        assert_equal(in_parts(5), first)


@pytest.mark.parametrize("precision", ["float32"], indirect=True)
@pytest.mark.parametrize("stack_of_three", WAVEFRONTS, indirect=True, ids="-".join)
def test_capture_of_wavefronts(stack_of_three, monkeypatch):
    layer, (x, hx, ragged), _ = stack_of_three
    monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", "4")
    leaves = {"input": x.requires_grad_(), **dict(layer.named_parameters())}

    def step() -> dict[str, torch.Tensor]:
        output, final = layer(x, hx, **ragged)
        loss = output.square().sum() + sum(t.sum() for t in as_tuple(final))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    assert_capture_equals(step, lambda _: x.copy_(torch.randn_like(x)))


def test_nonsense_asked_of_a_stack(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", "0")
    with pytest.raises(RuntimeError, match="FUSED_RNN_CUDA_WAVEFRONT to be a positive integer"):
        fused_rnn.LSTM(8, 8, num_layers=2, device="cuda")(torch.randn(5, 3, 8, device="cuda"))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", LAYERS)
def test_runs_are_deterministic(cell, dtype, ragged):
    """Bitwise, outputs and every gradient, without asking torch for it, whatever lies in memory."""
    torch.use_deterministic_algorithms(False)
    shapes = ((1, 1, 8, 16), (9, 3, 5, 17), (40, 16, 64, 128), (20, 65, 48, 256))
    for T, B, I, H in shapes:  # noqa: E741
        layers = 2 if H < 256 else 1
        _, layer = pair(
            cell, I, H, num_layers=layers, bidirectional=ragged, device="cuda", dtype=dtype
        )
        x = torch.randn(T, B, I, device="cuda", dtype=dtype)
        hx = states(layer, B, device="cuda", dtype=dtype)
        options = {"lengths": torch.randint(T + 1, (B,)).cuda()} if ragged else {}
        first = run(layer, x, hx, **options)
        for _ in range(4):
            for size in (1 << 10, 1 << 22):
                torch.full((size,), float("nan"), device="cuda")  # left in the allocator's blocks
            assert_equal(run(layer, x, hx, **options), first)


@pytest.mark.parametrize("cell", LAYERS)
def test_another_stream_is_used(cell):
    """Work queued on a side stream waits for what that stream was doing."""
    _, layer = pair(cell, 32, 64, device="cuda")
    x = torch.randn(20, 8, 32, device="cuda")
    expected = layer(x)[0]
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = layer(late)[0]
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


CAPTURED = Sizes(5, 3, 8, 40, bidirectional=True, ragged=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", LAYERS)
def test_capture_in_a_cuda_graph(cell, dtype, engine, monkeypatch):
    """Forward and backward synchronise nothing and allocate from torch: they can be captured."""
    layer = layer_of(cell, CAPTURED, num_layers=2, device="cuda", dtype=dtype)
    force(monkeypatch, engine, layer, CAPTURED)
    x = torch.randn(5, 3, 8, device="cuda", dtype=dtype, requires_grad=True)
    lengths = torch.tensor([5, 2, 4], device="cuda")
    leaves = {"input": x, **dict(layer.named_parameters())}

    def step():
        output, final = layer(x, lengths=lengths)
        loss = output.square().sum() + sum(t.sum() for t in as_tuple(final))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    def change(replay: int) -> None:
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.tensor(([5, 2, 4], [1, 0, 5], [0, 5, 3])[replay]))

    assert_capture_equals(step, change)


def test_a_graph_of_inference():
    _, layer = pair("lstm", 8, 16, device="cuda")
    x = torch.randn(5, 3, 8, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, (h_n, c_n) = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        found = {"output": output.clone(), "h_n": h_n.clone(), "c_n": c_n.clone()}
        output, (h_n, c_n) = layer(x)
        assert_equal(found, {"output": output, "h_n": h_n, "c_n": c_n})


def test_autocast():
    theirs, ours = pair("lstm", 8, 16, device="cuda")
    x = torch.randn(5, 3, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        (a, a_states), (b, b_states) = theirs(x), ours(x)
    assert [t.dtype for t in (a, *as_tuple(a_states))] == [
        t.dtype for t in (b, *as_tuple(b_states))
    ]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    _, layer = pair("lstm", 8, 16, device="cuda:1")
    output, _ = layer(torch.randn(5, 3, 8, device="cuda:1"))
    assert output.device == torch.device("cuda:1")


def test_lengths_out_of_range_are_refused_on_the_host():
    """Given on the CPU, lengths are checked there, before anything is launched."""
    _, layer = pair("gru", 8, 16, device="cuda")
    with pytest.raises(RuntimeError, match=r"lengths within 0\.\.5"):
        layer(torch.randn(5, 3, 8, device="cuda"), lengths=torch.tensor([5, 6, 1]))


@pytest.mark.parametrize("cell", LAYERS)
def test_transforms_equal_cpu(cell):
    """Second derivatives, forward mode, batches of inputs and of weights, gradients per sample."""
    _, layer = pair(cell, 5, 17, num_layers=2, bidirectional=True, dtype=torch.float64)
    xs = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    lengths, resets = torch.tensor([6, 0, 4, 1]), torch.rand(6, 4) < 0.2
    own = {name: t.detach() for name, t in layer.named_parameters()}
    both = {name: torch.stack([t, t.flip(0)]) for name, t in own.items()}

    def results(device):
        moved = layer.to(device)
        ragged = {"lengths": lengths.to(device), "resets": resets.to(device)}
        at = [{name: t.to(device) for name, t in of.items()} for of in (own, both)]
        x = xs.to(device)

        def call(parameters, x):
            return torch.func.functional_call(moved, parameters, (x,), ragged)[0]

        def loss(parameters, x):
            return call(parameters, x).square().sum()

        slope = torch.func.grad(loss)
        found = {
            "jvp": torch.func.jvp(lambda x: call(at[0], x), (x[0],), (x[1],))[1],
            "inputs": torch.func.vmap(call, (None, 0))(at[0], x),
            "weights": torch.func.vmap(call, (0, None))(at[1], x[0]),
            "second": torch.func.grad(lambda x: torch.func.grad(loss, 1)(at[0], x).square().sum())(
                x[0]
            ),
        }
        of_samples = torch.func.vmap(slope, (None, 0))(at[0], x)
        found |= {f"sample {name}": t for name, t in of_samples.items()}
        return {name: t.detach().cpu() for name, t in found.items()}

    on_cpu = results("cpu")
    on_gpu = results("cuda")
    assert_near(on_gpu, on_cpu)


COMPILED = Sizes(6, 4, 5, 17)


@pytest.mark.parametrize(
    ("cell", "engine"),
    [
        ("rnn_tanh", "per_step"),
        ("rnn_relu", "persistent_grid"),
        ("lstm", "persistent_cluster"),
        ("gru", "persistent_grid"),
    ],
)
def test_compiled_with_graphs(cell, engine, monkeypatch):
    """``mode="reduce-overhead"``: Inductor's CUDA graphs around forward and backward."""
    layer = layer_of(cell, COMPILED, num_layers=2, device="cuda")
    force(monkeypatch, engine, layer, COMPILED)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, capture, replays
        x = torch.randn(6, 4, 5, device="cuda")
        found = []
        for call in (compiled, layer):
            input = x.clone().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            output = call(input)[0].clone()
            found.append((output, *torch.autograd.grad(output.square().sum(), [input])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
