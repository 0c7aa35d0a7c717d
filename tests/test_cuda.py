"""What only a GPU shows: streams, graphs, devices, and the kernels as the compiler made them."""

from __future__ import annotations

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
from fused_rnn import autograd, ops

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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
@pytest.mark.parametrize("cell", ops.CELLS)
def test_small_options_equal_cpu(cell, options, unpoisoned):
    """Two directions in float64, the same masks on both devices."""
    traits, variation = ops.CELLS[cell], ops.Variation(**options)
    if variation.zoneout_c and not traits.has_c:
        pytest.skip("no c")
    T, B, I, H = 6, 3, 5, 17  # noqa: E741
    rows = traits.gates * H
    shapes: list[tuple[int, ...]] = [(rows, I), (rows, H), (rows,), (rows,)]
    shapes += [(traits.unit_weights * H,)] if traits.unit_weights else []
    for of in traits.norms(variation.layer_norm):
        shapes += [(H if of == "c" else rows,)] * 2
    given = [dyadic(T, B, I), *(dyadic(2, B, H) for _ in range(1 + traits.has_c))]
    given += [dyadic(*shape) / 4 for _ in range(2) for shape in shapes]
    ragged = (torch.tensor([6, 0, 4]), torch.rand(T, B) < 0.2)
    found = {}
    for device in ("cpu", "cuda"):
        input, *rest = leaves = [t.to(device).requires_grad_() for t in given]
        states, weights = rest[: 1 + traits.has_c], rest[1 + traits.has_c :]
        outputs = autograd.run_layer(
            cell, input, states, weights, True, 2, 2, *(t.to(device) for t in ragged),
            want_cells=traits.has_c, variation=variation, seed=torch.tensor(11, device=device),
        )  # fmt: skip
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", LAYERS)
def test_capture_in_a_cuda_graph(cell, dtype):
    """Forward and backward synchronise nothing and allocate from torch: they can be captured."""
    _, layer = pair(cell, 8, 16, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
    x = torch.randn(5, 3, 8, device="cuda", dtype=dtype, requires_grad=True)
    lengths = torch.tensor([5, 2, 4], device="cuda")
    leaves = {"input": x, **dict(layer.named_parameters())}

    def step():
        output, final = layer(x, lengths=lengths)
        loss = output.square().sum() + sum(t.sum() for t in as_tuple(final))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new_lengths in ([5, 2, 4], [1, 0, 5]):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            lengths.copy_(torch.tensor(new_lengths))
        graph.replay()
        replayed = {name: t.clone() for name, t in captured.items()}
        assert_equal(replayed, step())


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


@pytest.mark.parametrize("cell", LAYERS)
def test_compiled_with_graphs(cell):
    """``mode="reduce-overhead"``: Inductor's CUDA graphs around forward and backward."""
    _, layer = pair(cell, 5, 17, num_layers=2, dtype=torch.float32, device="cuda")
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
