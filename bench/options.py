"""Our layers against themselves: what options, bfloat16 and a second thread cost or save.

The peer is fused_rnn's dense float32 call with all threads, of the plain cell; a row's result is
first held against the plain PyTorch loop (``fused_rnn.reference``) under the same option. "one
thread" is the dense call on all threads, and its peer the same call on one. "coupled, loop" has the
plain loop for a peer, and so on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import checks, reference
from fused_rnn.cells import CELLS, Call, Variation, reference_weights

from . import layers, timing
from .layers import Called
from .shapes import MODES, Shape

SHAPES = (
    Shape(100, 1, 512, 512),
    Shape(200, 8, 64, 64),
    Shape(100, 16, 256, 256),
    Shape(100, 32, 512, 512),
    Shape(50, 64, 1024, 1024),
)
OPTIONS = ("bfloat16", "lengths", "resets", "packed", "one thread")

# Options of the constructor, the cells that have them, and the shape they are measured at.
VARIANTS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "peephole": ({"peephole": True}, ("LSTM",)),
    "coupled": ({"coupled": True}, ("LSTM",)),
    "reset before": ({"reset_after": False}, ("GRU",)),
    "heads": ({"num_heads": 4}, ("LSTM", "GRU", "RNN")),
    "layer norm": ({"layer_norm": True}, ("LSTM", "GRU", "RNN")),
    "joint layer norm": ({"layer_norm": "joint"}, ("LSTM", "GRU", "RNN")),
    "zoneout": ({"zoneout": 0.1}, ("LSTM", "GRU", "RNN")),
    "recurrent dropout": ({"recurrent_dropout": 0.3}, ("LSTM", "GRU", "RNN")),
    "weight dropout": ({"weight_dropout": 0.3}, ("LSTM", "GRU", "RNN")),
}
VARIANT_SHAPE = Shape(128, 16, 128, 128)

DENSE, LOOP = "dense", "loop"  # the peers


class _Drawn(Called):
    """Every call draws the same numbers, so that it can be checked."""

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        return super().forward(input)


class _Loop(Called):
    """The same by the reference."""

    # What is drawn, before it is timed: a loop of one's own would take torch's generator for that.
    _factors: Sequence[reference.Factors] = ()
    _weight_factors: Tensor | None = None

    def _draw(self, input: Tensor) -> checks.Options | None:
        options: checks.Options | None = self.layer._options()  # type: ignore[operator]
        if options is None or self._factors:
            return options
        torch.manual_seed(0)
        T, B, _ = input.shape
        H = int(self.layer.hidden_size)  # type: ignore[arg-type]
        if options.weight_dropout > 0:
            self._weight_factors = reference.dropout_factors(
                int(torch.randint(2**62, ())), reference.WEIGHT_DROPOUT,
                self.layer.weight_hh_l0.shape, options.weight_dropout, input,  # type: ignore[union-attr, arg-type]
            )  # fmt: skip
        self._factors = reference.layer_factors(
            (T, B, 1), (H, H), options.zoneout, options.recurrent_dropout,
            int(torch.randint(2**62, ())), input,
        )  # fmt: skip
        return options

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        layer, lengths = self.layer, self.arguments.get("lengths")
        if self.batch_sizes is not None:
            input, lengths = pad_packed_sequence(PackedSequence(input, self.batch_sizes))
        name = layer._cell()  # type: ignore[operator]
        cell = CELLS[name]
        zeros = input.new_zeros((1, input.shape[1], int(layer.hidden_size)))  # type: ignore[arg-type]
        options = self._draw(input)
        variation = None if options is None else Variation(options.layer_norm)
        call = Call(name, True, False, 0, 1, 1, variation=variation)
        weights = reference_weights(call, list(layer.parameters()))
        if self._weight_factors is not None:
            weights = [w._replace(weight_hh=w.weight_hh * self._weight_factors) for w in weights]
        output, h_n, c_n, _ = reference.layer(
            cell.name, input, zeros, zeros if cell.has_c else None, weights,
            lengths=lengths, resets=self.arguments.get("resets"), factors=self._factors,
        )  # fmt: skip
        output = output.flatten(2)
        if self.batch_sizes is not None:
            assert lengths is not None
            output = pack_padded_sequence(output, lengths).data
        return output, (h_n, c_n) if c_n is not None else h_n


def measure(
    cells: Sequence[str], budget_s: float, announce: Callable[[str], None]
) -> Iterator[layers.Row]:
    """Checks and times every option, cell, shape and mode, ``budget_s`` seconds of timing each."""
    for option in OPTIONS:
        for cell in cells:
            for shape in SHAPES:
                for mode in MODES:
                    announce(f"{cell} {option} {mode} {shape}")
                    against_reference, against_dense = _pairs(option, cell, mode, shape)
                    check = timing.check(against_reference)
                    time = timing.interleave(against_dense, budget_s) if check.passed else None
                    dtype = "bfloat16" if option == "bfloat16" else "float32"
                    yield layers.Row(
                        f"{cell} {option}", mode, shape, "cpu", dtype, check, time, peer=DENSE
                    )
    for option, (_, having) in VARIANTS.items():
        for cell in (c for c in having if c in cells):
            for mode in MODES:
                announce(f"{cell} {option} {mode} {VARIANT_SHAPE}")
                against_loop, against_plain = _pairs(option, cell, mode, VARIANT_SHAPE)
                check = timing.check(against_loop)
                for name, peer, pair in (
                    (option, DENSE, against_plain),
                    (f"{option}, {LOOP}", LOOP, against_loop),
                ):
                    time = timing.interleave(pair, budget_s) if check.passed else None
                    yield layers.Row(
                        f"{cell} {name}", mode, VARIANT_SHAPE, "cpu", "float32", check, time,
                        peer=peer,
                    )  # fmt: skip


def _pairs(option: str, cell: str, mode: str, shape: Shape) -> tuple[timing.Pair, timing.Pair]:
    T, B, I, H = shape  # noqa: E741
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: nn.Module = getattr(fused_rnn, cell)(I, H)
        plain_layer = layer
        if option in VARIANTS:
            layer = getattr(fused_rnn, cell)(I, H, **VARIANTS[option][0])
        # With gains of 1 an LSTM of this length is chaotic: it carries a rounding on to 1e-3, and
        # two orders of summation cannot be compared. Around 0.1 as in Cooijmans et al. 2017,
        # section 4.
        for name, weight in layer.named_parameters():
            if name.startswith("ln_") and "weight" in name:
                nn.init.uniform_(weight, 0.05, 0.15)
    dense = draw(T, B, I)
    states = [draw(1, B, H) for _ in range(2 if cell == "LSTM" else 1)]
    grads = [draw(T, B, H), *states]
    lengths = torch.randint(T // 2, T + 1, (B,), generator=generator).sort(descending=True).values
    lengths[0] = T
    arguments: dict[str, Any] = {
        "lengths": {"lengths": lengths},
        "resets": {"resets": torch.rand(T, B, generator=generator) < 0.02},
    }.get(option, {})
    input, batch_sizes = dense, None
    if option == "packed":
        input, batch_sizes, *_ = pack_padded_sequence(dense, lengths)
        grads = [pack_padded_sequence(grads[0], lengths).data, *states]
    dtype = torch.bfloat16 if option == "bfloat16" else torch.float32
    make = layers.RUNS[mode]

    # Seeding takes its time too, from either.
    kind_of_ours = _Drawn if option in VARIANTS else Called

    def run(kind: type[Called], dtype: torch.dtype) -> timing.Run:
        # The same numbers in every dtype: those that the option's own can hold.
        given = [t.to(own).to(dtype) for t in (input, *grads)]
        mine = copy.deepcopy(layer).to(own).to(dtype)
        return make(kind(mine, batch_sizes, **arguments), given[0], given[1:])

    own = dtype
    ours, device = run(kind_of_ours, dtype), torch.device("cpu")
    checked = timing.Pair(ours, run(_Loop, dtype), run(_Loop, torch.float64), device)
    plain = make(kind_of_ours(plain_layer), dense, [draw(T, B, H), *states])
    if option == "one thread":
        plain = _on_one_thread(plain)
    return checked, timing.Pair(ours, plain, checked.exact, device)


def _on_one_thread(run: timing.Run) -> timing.Run:
    def alone() -> timing.Results:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone
