"""Stacked layers as a wavefront: parts of time give what the whole gives, and streams wait.

Where there is no GPU the streams are ours: they note who waits for whom and who uses what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_close_like_torch,
    assert_equal,
    double,
    dyadic,
    fused,
    run,
    states,
)
from torch import Tensor

import fused_rnn
from fused_rnn import _C, functional, stack
from fused_rnn.cells import Call, Rest

T, B, I, H = 11, 4, 3, 6  # noqa: E741


class Stream:
    """A stream of which only the order is kept: how much of each stream's work comes before."""

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.known: dict[Stream, int] = {self: 0}
        self.may_use: dict[int, Tensor] = {}  # by address

    def wait_stream(self, other: Stream) -> None:
        if self.waits:
            for stream, work in other.known.items():
                self.known[stream] = max(self.known.get(stream, 0), work)

    def work(self) -> tuple[Stream, int]:
        self.known[self] += 1
        return self, self.known[self]

    def comes_after(self, work: tuple[Stream, int]) -> bool:
        stream, number = work
        return self.known.get(stream, 0) >= number


class Streams:
    """In place of CUDA's, and of each layer's call one that looks at what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
        self.main = self.current = Stream()
        self.others: list[Stream] = []
        self.waits = True
        self.written: dict[int, tuple[Tensor, tuple[Stream, int]]] = {}
        self.calls: list[tuple[Stream, Tensor, Any]] = []  # with input and results
        monkeypatch.setattr(stack, "parts", lambda *args: parts)
        monkeypatch.setattr(stack, "_streams", self.streams)
        monkeypatch.setattr(stack, "_will_use", self.will_use)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        for name in ("run_layer", "run_heads"):
            monkeypatch.setattr(functional, name, self.watched(getattr(functional, name)))

    def streams(self, device: torch.device, others: int) -> list[Stream]:
        self.others = [Stream(self.waits) for _ in range(others)]
        return [self.main, *self.others]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @staticmethod
    def will_use(stream: Stream, *groups: Any) -> None:
        for tensors in groups:
            stream.may_use |= {t.data_ptr(): t for t in tensors if t is not None}

    def expect_readable(self, tensor: Tensor) -> None:
        reader, address = self.current, tensor.data_ptr()
        writer = self.main
        if address in self.written:
            _, work = self.written[address]
            assert reader.comes_after(work), "read before it was written"
            writer = work[0]
        assert reader is writer or address in reader.may_use, "memory may be reused too early"

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(of: Call, primals: Sequence[Tensor], rest: Rest) -> Any:
            for tensor in (*primals, *(t for t in rest if t is not None)):
                self.expect_readable(tensor)
            results = call(of, primals, rest)
            self.calls.append((self.current, primals[0], results))
            work = self.current.work()
            self.written |= {t.data_ptr(): (t, work) for t in results}
            return results

        return watching


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Streams]:
    return lambda parts: Streams(monkeypatch, parts)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "heads": {"num_heads": 2},
}
CALLS = {
    "dense": {},
    "ragged": {"lengths": torch.tensor([T, 0, 5, 3])},
    "resets": {"resets": torch.arange(T * B).reshape(T, B) % 5 == 0},
}


@pytest.mark.parametrize("parts", [2, 4, T, 3 * T])
@pytest.mark.parametrize("given", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", LAYERS)
def test_parts_equal_the_whole(cell, options, given, parts, streams):
    layer = fused(cell, I, H, num_layers=3, **OPTIONS[options])
    x, hx, arguments = dyadic(T, B, I, dtype=torch.float32), states(layer, B), dict(CALLS[given])
    hx = tuple(s.float() for s in hx) if isinstance(hx, tuple) else hx.float()
    if layer.batch_first:
        x = x.transpose(0, 1)
        if "resets" in arguments:
            arguments["resets"] = arguments["resets"].t()
    whole = run(layer, x, hx, **arguments)
    exact = run(double(layer), double(x), double(hx), **arguments)
    found = run(layer, x, hx, call=with_parts(layer, streams, parts), **arguments)
    assert_close_like_torch([found], [whole], [exact])
    results = [name for name in found if not name.startswith("grad")]
    assert_equal({k: found[k] for k in results}, {k: whole[k] for k in results})


def with_parts(layer: Any, streams: Callable[[int], Streams], parts: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        watch = streams(parts)
        results = layer(*args, **kwargs)
        count = -(-T // -(-T // min(parts, T)))
        assert [stream for stream, *_ in watch.calls] == [watch.main, *watch.others] * count
        return results

    return call


def test_states_that_are_zeros_and_cells(streams):
    layer = fused_rnn.LSTM(I, H, num_layers=2, peephole=True)
    x = dyadic(T, B, I, dtype=torch.float32)
    whole = layer(x, return_cells=True)
    streams(3)
    output, (h_n, c_n), cells = layer(x, return_cells=True)
    assert_equal(
        {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells},
        {"output": whole[0], "h_n": whole[1][0], "c_n": whole[1][1], "cells": whole[2]},
    )


def test_dropout_between_layers(streams):
    """Each part is dropped by a mask of its own, which the seed decides."""
    layer = fused_rnn.GRU(I, 64, num_layers=2, dropout=0.5)
    x, results = torch.randn(T, B, I), []
    for _ in range(2):
        watch = streams(3)
        torch.manual_seed(3)
        results.append(layer(x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    below, above = watch.calls[::2], watch.calls[1::2]
    masks = []
    for (_, _, results_below), (_, input_above, _) in zip(below, above, strict=True):
        kept = input_above != 0
        torch.testing.assert_close(input_above[kept], 2 * results_below[0][kept])
        assert 0.35 < kept.float().mean() < 0.65
        masks.append(kept)
    assert not torch.equal(masks[0], masks[1])


def test_the_caller_may_use_all_results(streams):
    layer = fused_rnn.LSTM(I, H, num_layers=3)
    watch = streams(2)
    layer(torch.randn(T, B, I))
    for other in watch.others:
        assert watch.main.comes_after((other, other.known[other]))
    assert len(watch.calls) == 6
    last = [tensor for tensor, (stream, _) in watch.written.values() if stream is watch.others[-1]]
    assert len(last) == 2 * 3  # output, h and c of both parts
    outputs = [t for t in last if t.shape[0] > 1]
    assert {t.data_ptr() for t in outputs} <= watch.main.may_use.keys()


@pytest.mark.parametrize("missing", ["waits", "memory"])
def test_a_missing_wait_is_seen(missing, streams, monkeypatch):
    """That the streams of this file see what they are there to see."""
    watch = streams(2)
    if missing == "waits":
        watch.waits = False
    else:
        monkeypatch.setattr(stack, "_will_use", lambda *args: None)
    with pytest.raises(AssertionError, match=r"before it was written|reused too early"):
        fused_rnn.LSTM(I, H, num_layers=2)(torch.randn(T, B, I))


def test_second_derivatives(streams):
    layer = fused_rnn.GRU(2, 3, num_layers=2, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    streams(2)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


# ---- when


def plan(**changed: Any) -> stack.Plan:
    """Of four LSTM layers in bfloat16, forward on H100, unless told otherwise."""
    of = stack.Recurrence("lstm", "bfloat16", 1024, 16, 1, 512)
    own = {name: changed.pop(name) for name in of._fields if name in changed}
    how = {"layers": 4, "training": False, "captured": False, "chip": "H100"}
    return stack.plan(of._replace(**own), **how | changed)


def test_looking_inside_sees_all_of_time(streams):
    layer = fused_rnn.LSTM(I, H, num_layers=2).double().eval()
    input = torch.randn(T, B, I, dtype=torch.float64)
    output, _ = layer(input)
    streams(3)
    for index, there in ((-1, {"h": output}), (0, {})):
        found = fused_rnn.viz.gate_values(layer, input, layer_index=index)
        assert all(len(values) == T for values in found.values())
        for name, expected in there.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
    assert fused_rnn.stack.in_one_part.get() is False


def test_long_stacks_with_room_beside_each_other_are_wavefronts():
    for training in (False, True):
        found = plan(training=training)
        assert found.parts > 1
        assert found.microseconds < 0.9 * found.microseconds_in_one_part


def test_no_host_slows_a_graph_down():
    assert plan(captured=True).parts > plan().parts
    assert plan(captured=True).microseconds < plan().microseconds
    assert plan(T=256, layers=2).parts == 1 < plan(T=256, layers=2, captured=True).parts


@pytest.mark.parametrize(
    "changed",
    [
        {"T": 1}, {"T": 8}, {"T": 0}, {"B": 0},
        {"B": 64},  # all clusters are taken
        {"H": 768},  # a cooperative grid wants the chip for itself
        {"layers": 1}, {"projected": True}, {"dtype": "float64"}, {"chip": "A100"},
    ],
    ids=str,
)  # fmt: skip
def test_one_after_the_other(changed):
    assert plan(**changed, captured=True).parts == 1


def test_a_forced_engine_is_asked(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_grid")
    assert plan().parts == 1
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_cluster")
    assert plan().parts > 1


def test_predictions_are_made_of_those_of_the_layers():
    of = stack.Recurrence("lstm", "bfloat16", 1024, 16, 1, 512)
    (step, *_) = _C.cuda_plan(of, tf32=False, backward=False, chip="H100")
    alone = 4 * 1024 * step["microseconds_per_step"]
    found = plan(captured=True)
    assert alone < found.microseconds_in_one_part < 1.05 * alone
    rounds = 4 + found.parts - 1
    assert found.microseconds > rounds / found.parts * alone / 4


def test_forced(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", "3")
    assert plan(B=64) == (3, 0, 0)
    for given in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", given)
        with pytest.raises(RuntimeError, match="FUSED_RNN_CUDA_WAVEFRONT to be a positive integer"):
            plan()


def test_explained(monkeypatch):
    layer = fused_rnn.LSTM(512, 512, num_layers=4, dtype=torch.bfloat16, device="meta")
    found = fused_rnn.explain(layer, (1024, 16, 512), chip="H100")
    assert found.wavefront == plan(training=True)
    assert f"as a wavefront in {found.wavefront.parts} parts of time" in str(found).replace(
        "\n", " "
    )
    with torch.no_grad():
        found = fused_rnn.explain(layer, (1024, 16, 512), chip="H100")
    assert found.wavefront == plan()
    found = fused_rnn.explain(layer, (64, 16, 512), chip="H100")
    assert "one after the other" in str(found).replace("\n", " ")
    monkeypatch.setenv("FUSED_RNN_CUDA_WAVEFRONT", "5")
    found = fused_rnn.explain(layer, (64, 16, 512), chip="H100")
    assert "in 5 parts of time, forced by FUSED_RNN_CUDA_WAVEFRONT" in str(found).replace("\n", " ")


@pytest.mark.parametrize(
    ("num_layers", "options"), [(1, {}), (2, {"bidirectional": True}), (2, {"zoneout": 0.1})]
)
def test_explained_where_there_is_none(num_layers, options):
    layer = fused_rnn.GRU(8, 16, num_layers=num_layers, **options)
    assert fused_rnn.explain(layer, (1024, 16, 8), chip="H100").wavefront is None
    assert fused_rnn.explain(layer, (1024, 16, 8)).wavefront is None
