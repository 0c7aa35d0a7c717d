"""Other libraries' recurrent layers, where they can be imported: adapters to their layouts.

Each takes torch.nn's layer of the same problem and computes its output with the same weights. What
they are not given is what their interface does not take: see ``input_product``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rnn import reference

from . import timing
from .layers import GATES, Problem

# A sanity check of the adapter, not of the library: of the largest element, where a wrong layout
# gives errors of its own size.
ADAPTER_ERROR = 0.05


class Rival(NamedTuple):
    name: str
    input_product: bool  # whether input W_ih^T is part of what is timed
    run: timing.Run  # "output" (T, B, H)


class Library(NamedTuple):
    module: str  # what is imported
    cells: tuple[str, ...]
    dtypes: tuple[str, ...]  # names as in the sweep
    compiles: bool  # whether every shape is compiled anew, for minutes
    adapt: Callable[[str, Problem, str], Rival]  # from cell, problem, mode
    devices: tuple[str, ...] = ("cuda",)

    def serves(self, cell: str, dtype: str) -> bool:
        return cell in self.cells and dtype in self.dtypes and installed(self.module)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check(rival: Rival, exact: timing.Results) -> str | None:
    """What is wrong with a rival's output, if anything."""
    output, truth = rival.run()["output"], exact["output"]
    if output.shape != truth.shape:
        return f"{rival.name}: output {tuple(output.shape)}, not {tuple(truth.shape)}"
    error = float((output.double() - truth).abs().max() / truth.abs().max())
    if not error <= ADAPTER_ERROR:
        return f"{rival.name}: output differs by {error:.2g} of the largest element"
    return None


def haste(cell: str, problem: Problem, mode: str) -> Rival:
    """lmnt-com/haste: float32, input product included.

    Weights are (I, G*H) and (H, G*H); gates i, g, f, o with one bias, or z, r, n with two.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in problem.peer.parameters())
    order = {"LSTM": (0, 2, 1, 3), "GRU": (1, 0, 2)}[cell]
    H = weight_hh.shape[1]
    module: Any = importlib.import_module("haste_pytorch")
    layer: nn.Module = getattr(module, cell)(weight_ih.shape[1], H).to(problem.device)
    with torch.no_grad():
        layer.kernel.copy_(_gates(weight_ih, order).t())  # type: ignore[operator]
        layer.recurrent_kernel.copy_(_gates(weight_hh, order).t())  # type: ignore[operator]
        if cell == "LSTM":
            layer.bias.copy_(_gates(bias_ih + bias_hh, order))  # type: ignore[operator]
        else:
            layer.bias.copy_(_gates(bias_ih, order))  # type: ignore[operator]
            layer.recurrent_bias.copy_(_gates(bias_hh, order))  # type: ignore[operator]
    layer.train(mode == "training")
    input = problem.inputs[0].clone().requires_grad_(mode == "training")

    def call() -> Tensor:
        return layer(input)[0]

    run = _run(call, [input, *layer.parameters()], problem.grads[0], mode)
    return Rival("haste", True, run)


def flashrnn(cell: str, problem: Problem, mode: str) -> Rival:
    """NX-AI/flashrnn with one head: takes input W_ih^T ready-made, (B, T, G, 1, H).

    R is (G, 1, H, H), out by in, and the bias (G, 1, H), gates as torch's; but for a GRU R starts
    with n, and the bias has four rows: n of h, r, z, n of the input.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in problem.peer.parameters())
    G, H = GATES[cell], weight_hh.shape[1]
    input = problem.inputs[0]
    product = torch.nn.functional.linear(input, weight_ih).unflatten(-1, (G, 1, H)).transpose(0, 1)
    bias = bias_ih + bias_hh
    if cell == "GRU":
        weight_hh = _gates(weight_hh, (2, 0, 1), G)
        bias = torch.cat([bias_hh[2 * H :], bias[: 2 * H], bias_ih[2 * H :]])
    leaves = [product.contiguous(), weight_hh.view(G, 1, H, H), bias.view(-1, 1, H)]
    leaves = [t.clone().requires_grad_(mode == "training") for t in leaves]
    call_it: Any = importlib.import_module("flashrnn")
    while not callable(call_it):  # the function has the name of the modules around it
        call_it = call_it.flashrnn
    function = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[cell]
    dtype = str(input.dtype).removeprefix("torch.")

    def call() -> Tensor:
        states, _ = call_it(*leaves, function=function, dtype=dtype)
        return states[0, :, :, 0].transpose(0, 1)

    return Rival("flashrnn", False, _run(call, leaves, problem.grads[0], mode))


LIBRARIES = (
    Library("haste_pytorch", ("LSTM", "GRU"), ("fp32",), False, haste),
    Library("flashrnn", ("LSTM", "GRU", "RNN"), ("bf16", "fp16"), True, flashrnn),
)


def compiled_loop(cell: str, problem: Problem, mode: str) -> Rival:
    """torch.compile of the plain loop over timesteps, which it unrolls: minutes for long ones."""
    torch.compiler.reset()  # or the compiler gives up after so many shapes
    name = {"RNN": "rnn_tanh"}.get(cell, cell.lower())
    leaves = [
        each.detach().clone().requires_grad_(mode == "training")
        for each in (problem.inputs[0], *problem.peer.parameters())
    ]
    input, *weights = leaves

    @torch.compile(dynamic=False, fullgraph=True)
    def loop(input: Tensor, weights: list[Tensor]) -> Tensor:
        start = input.new_zeros(input.shape[1], weights[1].shape[1])
        cx = start if cell == "LSTM" else None
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        its = reference.Weights(weight_ih, weight_hh, bias_ih, bias_hh, None)
        return reference.direction(name, input, start, cx, its)[0]

    return Rival(
        "torch.compile", True, _run(lambda: loop(input, weights), leaves, problem.grads[0], mode)
    )


def torchrl(cell: str, problem: Problem, mode: str) -> Rival:
    """pytorch/rl: loops in Python, torch.nn's parameters."""
    module: Any = importlib.import_module("torchrl.modules.tensordict_module.rnn")
    weight_ih, weight_hh, *_ = problem.peer.parameters()
    layer: nn.Module = getattr(module, cell)(
        weight_ih.shape[1], weight_hh.shape[1], batch_first=False
    ).to(problem.device)
    layer.load_state_dict(problem.peer.state_dict())
    input = problem.inputs[0].clone().requires_grad_(mode == "training")
    leaves = [input, *layer.parameters()]
    return Rival("torchrl", True, _run(lambda: layer(input)[0], leaves, problem.grads[0], mode))


# Beside torch.nn in float32, by the name of their rows; what is in LIBRARIES too needs CUDA.
PEERS = {
    "torch.compile": Library(
        "torch", ("LSTM", "GRU", "RNN"), ("fp32",), True, compiled_loop, ("cpu", "cuda")
    ),
    "torchrl": Library("torchrl", ("LSTM", "GRU"), ("fp32",), False, torchrl, ("cpu", "cuda")),
    "haste": LIBRARIES[0],
}


def rivals(
    libraries: Sequence[Library], cell: str, problem: Problem, mode: str, exact: timing.Results
) -> Iterator[Rival | str]:
    """Every library's run, checked; or what kept it from running, which is no reason to stop."""
    for library in libraries:
        try:
            rival = library.adapt(cell, problem, mode)
            yield check(rival, exact) or rival
        except Exception as failure:
            yield f"{library.module}: {type(failure).__name__}: {failure}"


def _gates(tensor: Tensor, order: tuple[int, ...], count: int = 0) -> Tensor:
    """Blocks of rows, one per gate, in another order."""
    chunks = tensor.chunk(count or len(order))
    return torch.cat([chunks[gate] for gate in order])


def _run(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, mode: str) -> timing.Run:
    def forward() -> timing.Results:
        with torch.no_grad():
            return {"output": call()}

    def training() -> timing.Results:
        output = call()
        torch.autograd.grad(output, leaves, grad)
        return {"output": output.detach()}

    return {"forward": forward, "training": training}[mode]
