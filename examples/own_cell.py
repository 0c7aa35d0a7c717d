"""A cell of one's own: Dreamer's GRU, from the header beside this file, as a fused layer.

Compiles dreamer_gru.h when it is first run (half a minute on two cores), holds the layer against
the same cell in plain PyTorch, outputs and gradients, and measures both beside the built-in GRU.

    python examples/own_cell.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_rnn

T, B, SIZE = 64, 16, 256


def loop(layer: torch.nn.Module, input: Tensor) -> Tensor:
    """What Dreamer's GRU does to a sequence (T, B, size), step by step, by the layer's weights."""
    p = dict(layer.named_parameters())
    gates = F.linear(input, p["weight_ih_l0"])
    h = input.new_zeros(input.shape[1], SIZE)
    outputs = []
    for t in range(len(input)):
        total = gates[t] + F.linear(h, p["weight_hh_l0"])
        normal = F.layer_norm(total, total.shape[-1:], p["ln_g_weight_l0"], p["ln_g_bias_l0"], 1e-3)
        r, s, u = normal.chunk(3, dim=-1)
        u = torch.sigmoid(u - 1)
        h = u * torch.tanh(torch.sigmoid(r) * s) + (1 - u) * h
        outputs.append(h)
    return torch.stack(outputs)


def milliseconds(functions: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """The median time of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> int:
    torch.manual_seed(0)
    DreamerGru = fused_rnn.load_cell(Path(__file__).with_name("dreamer_gru.h"))
    layer = DreamerGru(SIZE, SIZE, bias=False, layer_norm="joint", layer_norm_eps=1e-3)
    plain = DreamerGru(SIZE, SIZE)
    gru = fused_rnn.GRU(SIZE, SIZE)
    input = torch.randn(T, B, SIZE)
    cotangent = torch.randn(T, B, SIZE)
    print(layer)

    def train(module: torch.nn.Module, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, list(module.parameters()), cotangent)

    expected = loop(layer, input)
    found = layer(input)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(train(layer, found), train(layer, expected), rtol=1e-3, atol=1e-3)
    print("outputs and gradients are those of the plain loop")

    times = milliseconds(
        {
            "plain PyTorch loop": lambda: train(layer, loop(layer, input)),
            "DreamerGru": lambda: train(layer, layer(input)[0]),
            "DreamerGru without layer norm": lambda: train(plain, plain(input)[0]),
            "the built-in GRU": lambda: train(gru, gru(input)[0]),
        }
    )
    print(f"training step, T={T} B={B} H={SIZE}:")
    for name, time_ms in times.items():
        print(f"  {name:<30} {time_ms:7.2f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
