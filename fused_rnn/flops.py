"""What torch's FlopCounterMode counts of our ops: two operations for a multiply-add of a product.

Its module brings triton along, half a second of import, so that formulas go to it when somebody
else has imported it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .cells import Call, call_of

_COUNTER = "torch.utils.flop_counter"


def _product_flops(call: Call, primals: Sequence[Any], batch_sizes: Any) -> dict[str, int]:
    """Of each matrix of the recurrences, once for every row and step; of shapes for tensors."""
    input, _, weights = call.split(primals)
    rows = input[0] if batch_sizes is not None else input[0] * input[1]
    flops = dict.fromkeys(("weight_ih", "weight_hh", "weight_hr"), 0)
    for of in call.by_recurrence(weights):
        for name in flops.keys() & of.keys():
            flops[name] += 2 * rows * of[name][0] * of[name][1]
    return flops


def _layer_forward(cell: str, primals: Any, *rest: Any, **more: Any) -> int:
    _, batch_sizes, _, _, settings, options = rest
    call, _ = call_of(cell, settings, options)
    return sum(_product_flops(call, primals, batch_sizes).values())


def _layer_backward(
    cell: str, grads: Any, primals: Any, results: Any, rest: Any, *more: Any, **named: Any
) -> int:
    call, (need_input, _, need_weights) = call_of(cell, more[0], more[1])
    flops = _product_flops(call, primals, rest[1])
    once = sum(flops.values())
    # The gradient of h is always needed, from step to step.
    return once * (1 + need_weights) - flops["weight_ih"] * (not need_input)


def _attention_forward(primals: Any, *_: Any, **__: Any) -> int:
    # Of each pair of a query and a key: A channels of the score, and D of the product with values.
    query, key, value = primals[:3]
    flops: int = 2 * query[0] * query[1] * key[1] * (query[2] + value[2])
    return flops


def _attention_backward(grads: Any, primals: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention_forward(primals)


def _register(counter: Any) -> None:
    ours = torch.ops.fused_rnn
    for op, formula in (
        (ours.layer_forward, _layer_forward),
        (ours.layer_backward, _layer_backward),
        (ours.additive_attention_forward, _attention_forward),
        (ours.additive_attention_backward, _attention_backward),
    ):
        counter.register_flop_formula(op)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when torch's module is imported, which it leaves to others to find."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Gives torch the formulas, now or when it has a place for them."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
