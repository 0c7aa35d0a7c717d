"""What only a GPU shows: streams, graphs, devices, and the kernels as the compiler made them."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYERS, as_tuple, assert_close_like_torch, double, pair, run, states

import fused_rnn

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cell", LAYERS)
def test_small_layers_match_torch(cell, dtype):
    """Few enough launches for a sanitizer; two layers, two directions, odd sizes."""
    theirs, ours = pair(cell, 5, 17, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
    x = torch.randn(6, 3, 5, device="cuda", dtype=dtype)
    hx = states(ours, 3, device="cuda", dtype=dtype)
    exact = run(double(theirs), double(x), double(hx))
    assert_close_like_torch([run(ours, x, hx)], [run(theirs, x, hx)], [exact])


@pytest.mark.parametrize("cell", LAYERS)
def test_ragged_small_equals_cpu(cell):
    layer = fused_rnn.convert(pair(cell, 4, 9, bidirectional=True, dtype=torch.float64)[0])
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([7, 0, 3, 1, 6])
    resets = torch.rand(7, 5) < 0.3
    on_cpu = run(layer, x, lengths=lengths, resets=resets)
    on_gpu = run(layer.cuda(), x.cuda(), lengths=lengths.cuda(), resets=resets.cuda())
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("cell", LAYERS)
def test_capture_in_a_cuda_graph(cell):
    """Forward and backward synchronise nothing and allocate from torch: they can be captured."""
    _, layer = pair(cell, 8, 16, device="cuda")
    x = torch.randn(5, 3, 8, device="cuda", requires_grad=True)

    def step():
        layer.zero_grad(set_to_none=False)
        x.grad = None
        layer(x)[0].square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    captured = x.grad.clone()
    step()
    torch.testing.assert_close(captured, x.grad, rtol=0, atol=0)


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
