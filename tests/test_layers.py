"""The layers against torch.nn: values and every gradient."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_close_like_torch,
    assert_equal,
    assert_near,
    double,
    dyadic,
    fused,
    named_outputs,
    pair,
    run,
    states,
    values_by_unit,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import functional, ops
from fused_rnn.cells import Call, Rest

pytestmark = pytest.mark.usefixtures("one_thread", "route")

FACTORS: dict[str, tuple[Any, ...]] = {
    "num_layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "batch_first": (False, True),
    "projected": (False, True),
    "with_hx": (False, True),
    "packed": (None, "sorted", "unsorted"),
    "T": (1, 2, 5, 9),
    "B": (0, 1, 2, 7),
    "I": (1, 3, 16, 40),
    "H": (1, 2, 17, 33, 100),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    cell: str
    dtype: torch.dtype
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    projected: bool
    with_hx: bool
    packed: str | None
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        flags = [
            k for k in ("bidirectional", "batch_first", "projected", "with_hx") if getattr(self, k)
        ]
        sizes = f"{self.num_layers}x{self.T}x{self.B}x{self.I}x{self.H}"
        packed = [] if self.packed is None else [self.packed]
        no_bias = [] if self.bias else ["no_bias"]
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.cell, dtype, sizes, *flags, *no_bias, *packed])


def cases(each: int) -> list[Case]:
    """Of every cell and dtype, ``each`` cases in which every value of every factor occurs."""
    shuffled = random.Random(0)
    found = []
    for cell in LAYERS:
        for dtype in DTYPES:
            columns = []
            for values in FACTORS.values():
                column = list(values) * -(-each // len(values))
                shuffled.shuffle(column)
                columns.append(column)
            for row in zip(*columns, strict=False):
                case = Case(cell, dtype, *row)
                if cell != "lstm" or case.H == 1:
                    case = replace(case, projected=False)
                if case.B == 0:
                    case = replace(case, packed=None)  # torch packs no empty batch
                found.append(case)
    return found


CASES = cases(12)


def layers_of(case: Case, device: str) -> tuple[Any, Any]:
    return pair(
        case.cell,
        case.I,
        case.H,
        num_layers=case.num_layers,
        bidirectional=case.bidirectional,
        bias=case.bias,
        batch_first=case.batch_first,
        dtype=case.dtype,
        device=device,
        **({"proj_size": max(1, case.H // 3)} if case.projected else {}),
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case, device: str) -> None:
    theirs, ours = layers_of(case, device)
    options = {"dtype": case.dtype, "device": device}
    shape = (case.B, case.T) if case.batch_first else (case.T, case.B)
    results: list[tuple[Any, Any, Any]] = []
    for seed in range(16 if case.H < 8 else 3):  # the fewer the elements, the more draws
        x: Any = dyadic(*shape, case.I, **options)
        hx = states(ours, case.B, **options) if case.with_hx else None
        if case.packed is not None:
            lengths = torch.randint(1, case.T + 1, (case.B,))
            lengths[-1] = case.T
            if case.packed == "sorted":
                lengths = lengths.sort(descending=True).values
            x = pack_padded_sequence(x, lengths, case.batch_first, case.packed == "sorted")
        exact = run(double(theirs), double(x), double(hx), seed=seed)
        results.append((run(ours, x, hx, seed=seed), run(theirs, x, hx, seed=seed), exact))
    assert_close_like_torch(*zip(*results, strict=True))


def test_packed_output_keeps_its_indices() -> None:
    theirs, ours = pair("gru", 3, 4, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([2, 5, 3]), False, False)
    for given, expected in zip(ours(packed)[0][1:], theirs(packed)[0][1:], strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_unbatched(cell: str, with_hx: bool, batch_first: bool, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = pair(
        cell, 3, 5, num_layers=2, bidirectional=True, batch_first=batch_first, **options
    )
    x = dyadic(4, 3, **options)
    hx = states(ours, None, **options) if with_hx else None
    assert_near(run(ours, x, hx), run(theirs, x, hx))


def strided(how: str, t: Tensor) -> Tensor:
    """The values of ``t`` (for "expanded", of its first row) at other places in memory."""
    if how == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "features_first":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "sliced":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    assert how == "expanded"
    return t[:, :1].expand_as(t)


STRIDED = ("transposed", "features_first", "sliced", "expanded")


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_strided_input_and_states(cell: str, batch_first: bool, how: str, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = pair(cell, 5, 17, bidirectional=True, batch_first=batch_first, **options)
    x = strided(how, dyadic(3, 3, 5, **options))
    hx = states(ours, 3, **options)
    hx = tuple(strided(how, s) for s in hx) if cell == "lstm" else strided(how, hx)
    assert not x.is_contiguous()
    assert_near(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("how", ["sum", "expanded", "features_first", "sliced"])
@pytest.mark.parametrize("cell", LAYERS)
def test_strided_grad_output(cell: str, how: str, device: str) -> None:
    grads = []
    x = dyadic(4, 3, 5, dtype=torch.float64, device=device)
    cotangent = torch.randn(4, 3, 34, dtype=torch.float64, device=device)
    for layer in pair(cell, 5, 17, bidirectional=True, dtype=torch.float64, device=device):
        leaf = x.clone().requires_grad_()
        output, _ = layer(leaf)
        if how == "sum":
            output.sum().backward()  # stride 0 in every dimension
        else:
            output.backward(strided(how, cotangent))
        grads.append({"input": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert_near(grads[1], grads[0])


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("cell", LAYERS)
def test_strided_weights(cell: str, how: str, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = pair(cell, 5, 17, num_layers=2, bidirectional=True, **options)
    name = "rnn" if cell.startswith("rnn") else cell
    chosen = {"nonlinearity": cell[4:]} if name == "rnn" else {}
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            if how != "expanded" or a.dim() == 2:
                b.data = strided("sliced" if a.dim() == 1 else how, b)
            a.copy_(b)

    def call(x: Tensor, hx: Any) -> tuple[Any, ...]:
        params = list(ours.parameters())
        output, *final = getattr(functional, name)(
            x, hx, params, num_layers=2, bidirectional=True, **chosen
        )
        return output, tuple(final)

    assert not ours.weight_hh_l0.is_contiguous()
    x, hx = dyadic(4, 3, 5, **options), states(ours, 3, **options)
    assert_near(run(ours, x, hx, call=call), run(theirs, x, hx))


@pytest.mark.one_route
@pytest.mark.parametrize("cell", LAYERS)
def test_initial_values(cell: str) -> None:
    name, chosen = LAYERS[cell]
    arguments = {"num_layers": 2, "bidirectional": True, **chosen}
    if cell == "lstm":
        arguments["proj_size"] = 3
    torch.manual_seed(7)
    theirs = getattr(nn, name)(4, 5, **arguments).state_dict()
    torch.manual_seed(7)
    ours = getattr(fused_rnn, name)(4, 5, **arguments).state_dict()
    assert list(ours) == list(theirs)
    assert_equal(dict(ours), dict(theirs))


def transparent(device: str, **kwargs: Any) -> Any:
    """Two relu layers of which the first gives ones, and the second what reaches it."""
    layer = fused_rnn.RNN(1, 64, 2, nonlinearity="relu", device=device, **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.bias_ih_l0.fill_(1)
        layer.weight_ih_l1.copy_(torch.eye(64))
    return layer


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p: float, batch_first: bool, device: str) -> None:
    layer = transparent(device, dropout=p, batch_first=batch_first)
    x = torch.zeros(40, 50, 1, device=device)
    output, h_n = layer(x)
    kept = output != 0
    torch.testing.assert_close(output, kept / (1 - p))
    n = kept.numel()
    assert abs(kept.sum().item() - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    # Every element has a coin of its own: no two steps, rows or units share a mask.
    for dim in range(3):
        assert torch.unique(kept, dim=dim).shape[dim] == kept.shape[dim]
    # Neither the first layer's final state nor the last layer's output is dropped.
    assert (h_n[0] == 1).all()
    assert torch.equal(h_n[1], output[:, -1] if batch_first else output[-1])
    # The gradient takes the same mask.
    output.sum().backward()
    torch.testing.assert_close(layer.bias_ih_l0.grad, output.detach().sum((0, 1)))


def test_dropout_follows_the_seed_the_mode_and_the_attribute(device: str) -> None:
    layer = transparent(device, dropout=0.5)
    x = torch.zeros(8, 4, 1, device=device)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    layer.eval()
    assert (output(1) == 1).all()
    layer.train()
    layer.dropout = 0.0
    assert (output(1) == 1).all()
    layer.dropout = 1.0
    assert (output(1) == 0).all()
    layer.dropout = 0.5
    assert 0 < (output(1) == 0).float().mean() < 1


@pytest.mark.parametrize("cell", LAYERS)
def test_dropout_of_zero_in_training(cell: str) -> None:
    theirs, ours = pair(cell, 3, 5, num_layers=3, dropout=0.5, dtype=torch.float64)
    x = dyadic(4, 2, 3)
    theirs.eval()
    trained = run(ours.train(), x)
    ours.eval()
    assert_near(run(ours, x), run(theirs, x))
    assert not torch.equal(trained["output"], run(ours, x)["output"])


# How csrc/cpu/plan.cpp divides these among 2 to 4 threads: by rows because there are many, by units
# because the products are large, by rows because a meeting would cost more than the product.
SPLITS = {
    "rows": {"T": 5, "B": 40, "L": 1, "H": 96},
    "units": {"T": 6, "B": 5, "L": 1, "H": 264},
    "few_rows": {"T": 60, "B": 5, "L": 1, "H": 65},
    "two_lanes": {"T": 6, "B": 5, "L": 2, "H": 200},
}


def layer_ops(
    cell: str, T: int, B: int, L: int, H: int, *, dtype: torch.dtype, ragged: bool, projected: bool
) -> list[Tensor]:
    """Every result of both ops, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    I, P = 70, 70 if projected else H  # noqa: E741
    has_c = cell == "lstm"
    call = Call(cell, True, projected, 1 + has_c, L, L, want_cells=has_c)
    shapes = [weight.shape({"I": I, "H": H, "P": P}) for weight in call.table] * L
    weights = [random(*shape) / (shape[1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    states = [random(L, B, P), random(L, B, H)] if has_c else [random(L, B, P)]
    lengths = torch.arange(B) % (T + 1) if ragged else None
    resets = torch.rand(T, B, generator=generator) < 0.2 if ragged else None
    primals, rest = [random(T, B, I), *states, *weights], Rest(lengths, None, resets)
    forward = ops.layer_forward(cell, primals, *rest, call.settings(True), None)
    output, *final = forward[: 2 + has_c]
    saved = forward[call.wanted :]
    grads = [random(*t.shape) for t in (output, *final)] + [None] * (2 - has_c)
    backward = ops.layer_backward(
        cell, grads, primals, [output, *saved], rest, call.settings(True, True, True), None
    )
    return [*(values_by_unit(t, H, lengths) for t in forward), *backward]


@pytest.mark.one_route
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("variant", ["plain", "ragged", "projected"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_threads_do_not_matter(cell: str, split: str, variant: str, dtype: str) -> None:
    """Bitwise, products included."""
    if variant == "projected" and cell != "lstm":
        return
    results = []
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        found = layer_ops(
            cell,
            **SPLITS[split],
            dtype=getattr(torch, dtype),
            ragged=variant != "plain",
            projected=variant == "projected",
        )
        results.append({str(i): t for i, t in enumerate(found)})
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("cell", LAYERS)
def test_runs_are_bitwise_equal(cell: str, device: str) -> None:
    torch.set_num_threads(2)
    layer = fused(cell, 33, 100, num_layers=2, bidirectional=True, dropout=0.3, device=device)
    x = torch.randn(9, 20, 33, device=device)
    runs = []
    for _ in range(3):
        torch.manual_seed(3)
        runs.append(run(layer, x))
    assert_equal(runs[1], runs[0])
    assert_equal(runs[2], runs[0])


@pytest.mark.one_route
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set(isa: str) -> None:
    """A sample of these tests in a process of its own: the choice is made once per process."""
    supported = fused_rnn._C.instruction_sets()
    if isa not in supported or not supported[isa]:
        pytest.skip(f"{isa} is not for this machine")
    if isa == fused_rnn._C.active_instruction_set():
        return  # all the other tests run it
    here = Path(__file__).parent
    sample = [f"test_layers.py::test_against_torch[cpu-{case}]" for case in CASES[::7]]
    sample += [
        "test_layers.py::test_threads_do_not_matter[lstm-units-ragged-float32]",
        "test_layers.py::test_threads_do_not_matter[gru-rows-plain-float64]",
        "test_ragged.py::test_random_configurations",
        "test_ops.py::test_half_types_round_to_nearest_even",
        "test_ops.py::test_tanh_is_accurate",
        "test_ops.py::test_sigmoid_is_accurate",
        "test_duals.py::test_second_derivatives_are_the_references",
    ]
    script = (
        "import sys, pytest, fused_rnn._C as C\n"
        f"assert C.active_instruction_set() == {isa!r}\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "-p", "no:cacheprovider", "-k", "not cuda"]
    done = subprocess.run(
        [sys.executable, "-c", script, *options, *(str(here / s) for s in sample)],
        cwd=here.parent,
        env={**os.environ, "FUSED_RNN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.one_route
def test_unknown_instruction_set_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fused_rnn._C as C; C.active_instruction_set()"],
        env={**os.environ, "FUSED_RNN_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "FUSED_RNN_CPU_ISA=mmx" in done.stderr


@pytest.mark.parametrize("cell", LAYERS)
def test_no_grad_gives_the_same_values(cell: str, device: str) -> None:
    layer = fused(cell, 3, 17, num_layers=2, bidirectional=True, device=device)
    x = torch.randn(5, 3, 3, device=device)
    with_graph = {k: t.detach() for k, t in named_outputs(layer(x)).items()}
    with torch.no_grad():
        assert_equal(named_outputs(layer(x)), with_graph)
