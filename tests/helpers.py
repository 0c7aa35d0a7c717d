"""What the test files share: twin layers, one way to run them, one rule for tolerance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import reference
from fused_rnn.reference import Weights

# Name of a cell in the ops: the layer's class, the arguments that choose the cell.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}

Named = dict[str, Tensor]


def each_layer(name: str, variants: Iterable[str]) -> Any:
    """Parametrizes ``cell`` and ``name``, one of ``variants``; only an LSTM is "projected"."""
    pairs = [(c, v) for c in LAYERS for v in variants if v != "projected" or c == "lstm"]
    return pytest.mark.parametrize(f"cell, {name}", pairs)


def fused(cell: str, *args: Any, **kwargs: Any) -> Any:
    """A fused layer by the name of its cell."""
    name, chosen = LAYERS[cell]
    return getattr(fused_rnn, name)(*args, **chosen, **kwargs)


def pair(cell: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch.nn's layer and the fused layer, of equal weights."""
    name, chosen = LAYERS[cell]
    theirs = getattr(nn, name)(*args, **chosen, **kwargs)
    ours = fused(cell, *args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def dyadic(*shape: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
    """Random multiples of 1/32 in -2..2: the same numbers whatever dtype they are stored in."""
    return torch.randint(-64, 65, shape).div(32).to(device=device, dtype=dtype)


def states(layer: Any, B: int | None, **options: Any) -> Any:
    """Random hx for ``layer``, of batch size B, or unbatched for None."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if B is None else (B,)
    h = dyadic(count, *batch, layer.proj_size or layer.hidden_size, **options)
    if layer.mode != "LSTM":
        return h
    return h, dyadic(count, *batch, layer.hidden_size, **options)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def named_outputs(result: tuple[Any, ...]) -> Named:
    """What a layer returned, by name; packed sequences as their data."""
    output, final, *cells = result
    names = ("output", "h_n", "c_n")
    named = dict(zip(names, (output, *as_tuple(final)), strict=False))
    if cells:
        named["cells"] = cells[0]
    return {k: v.data if isinstance(v, PackedSequence) else v for k, v in named.items()}


def cotangents(outputs: Named, seed: int = 0) -> Named:
    """A fixed random gradient for every output, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-32, 33, t.shape, generator=generator).div(32).to(t)
        for name, t in outputs.items()
    }


def run(
    layer: Any,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    call: Callable[..., Any] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    create_graph: bool = False,
    **options: Any,
) -> Named:
    """Outputs, and the gradient of input, hx, cx and every parameter (``grad_*``).

    Whatever is drawn in the call, masks above all, is drawn from ``seed``.

    Args:
        call: what to run in place of ``layer`` itself, with layer's parameters.
        only: the outputs that receive a gradient; all of them by default.
        seed: of the outputs' gradients, and of the call.
        options: passed to the call.
    """

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_()

    packed = isinstance(input, PackedSequence)
    input = input._replace(data=leaf(input.data)) if packed else leaf(input)
    leaves = {"input": input.data if packed else input}
    if hx is not None:
        hx = tuple(map(leaf, hx)) if isinstance(hx, tuple) else leaf(hx)
        leaves.update(zip(("hx", "cx"), as_tuple(hx), strict=False))
    leaves.update(layer.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = named_outputs((call or layer)(input, hx, **options))
    given = {k: g for k, g in cotangents(outputs, seed).items() if only is None or k in only}
    grads = torch.autograd.grad(
        [outputs[k] for k in given],
        list(leaves.values()),
        list(given.values()),
        allow_unused=True,
        create_graph=create_graph,
    )
    found = {
        f"grad_{k}": torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), grads, strict=True)
    }
    return {k: t.detach() for k, t in (outputs | found).items()}


def double(value: Any) -> Any:
    """A float64 copy of a layer, a tensor, a packed sequence, a tuple of them, or None."""
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.double())
    if isinstance(value, tuple):
        return tuple(map(double, value))
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return None if value is None else value.double()


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_close_like_torch(
    ours: Sequence[Named], torchs: Sequence[Named], exact: Sequence[Named]
) -> None:
    """The tolerance rule: at most twice the error of torch.nn in the same dtype.

    Errors are against ``exact``, the float64 results; largest absolute difference per tensor, over
    several draws of the input, because for a tensor of a few elements one draw says little about
    either library. Where torch happens to be nearly exact, a few units in the last place of the
    largest element are allowed. Results in float64 must equal torch's to 1e-10 of the largest
    element.
    """
    for name, first in ours[0].items():

        def error(given: Sequence[Named], expected: Sequence[Named], name: str = name) -> float:
            draws = zip(given, expected, strict=True)
            errors = [largest(a[name].double() - b[name].double()) for a, b in draws]
            return torch.tensor(errors, dtype=torch.float64).max().item()  # NaN if any is

        for a, b, c in zip(ours, torchs, exact, strict=True):
            assert a.keys() == b.keys() == c.keys()
            assert a[name].dtype == b[name].dtype, name
            assert a[name].shape == b[name].shape, name
        scale = max(largest(c[name]) for c in exact)
        if first.dtype == torch.float64:
            found, bound = error(ours, torchs), 1e-10 * scale
        else:
            found = error(ours, exact)
            bound = 2 * error(torchs, exact) + 4 * torch.finfo(first.dtype).eps * scale
        assert found <= bound, f"{name}: error {found:.3g}, allowed {bound:.3g}"


def assert_equal(ours: Named, expected: Named) -> None:
    """Bitwise, and NaN is never equal."""
    assert ours.keys() == expected.keys()
    for name, t in ours.items():
        torch.testing.assert_close(
            t, expected[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_near(ours: Named, expected: Named) -> None:
    """Float64: equal to 1e-10 of the largest element."""
    assert_close_like_torch([ours], [expected], [expected])


def values_by_unit(saved: Tensor, H: int, lengths: Tensor | None = None) -> Tensor:
    """What the CPU's forward saved, as (T, B, L, S, H) or (T, B, L, H); other tensors as they are.

    Without the padding of the last block, and with zeros for the steps that do not exist: both are
    nobody's, and may be NaN.
    """
    if saved.dim() == 6:
        saved = saved.permute(0, 3, 1, 4, 2, 5).flatten(4)[..., :H]
    if lengths is None or saved.dim() < 4:
        return saved
    beyond = reference.beyond(lengths, len(saved))
    return saved.masked_fill(beyond.view(*beyond.shape, *(1,) * (saved.dim() - 2)), 0)


def layer_weights(layer: Any) -> list[list[Weights]]:
    """The weights of a layer as ``reference.stacked`` takes them."""

    def direction(suffix: str) -> Weights:
        return Weights(*(getattr(layer, f"{name}_{suffix}", None) for name in Weights._fields))

    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    return [[direction(f"l{k}{suffix}") for suffix in suffixes] for k in range(layer.num_layers)]


def draw(layer: Any, T: int, B: int, like: Tensor) -> tuple[Any, Any]:
    """What ``layer`` draws from torch's generator: its weights, some dropped, and its factors.

    Both as ``reference.stacked`` takes them, drawn in the order in which the layer does.
    """
    weights = layer_weights(layer)
    options = layer._options()
    if options is None:
        return weights, ()
    D, H, P = len(weights[0]), layer.hidden_size, layer.proj_size or layer.hidden_size
    # A normalisation takes all heads together, otherwise each is a lane of its own.
    heads = 1 if options.layer_norm else layer.num_heads

    def seed() -> int:
        return int(torch.randint(2**62, ()))

    def dropped(weight: Tensor) -> Tensor:
        p = options.weight_dropout
        stream = reference.WEIGHT_DROPOUT
        return weight * reference.dropout_factors(seed(), stream, weight.shape, p, weight)

    if layer.training and options.weight_dropout > 0:
        weights = [[w._replace(weight_hh=dropped(w.weight_hh)) for w in lanes] for lanes in weights]
    recurrent_dropout = options.recurrent_dropout if layer.training else 0.0
    draws = layer.training and (any(options.zoneout) or recurrent_dropout > 0)
    factors = []
    for _ in weights:
        lanes = reference.layer_factors(
            (T, B, D * heads), (P // heads, H // heads), options.zoneout, recurrent_dropout,
            seed() if draws else None, like,
        )  # fmt: skip
        factors.append([join_heads(lanes[d::D]) for d in range(D)])
    return weights, factors


def join_heads(lanes: Sequence[reference.Factors]) -> reference.Factors:
    """The factors of a direction from those of its heads."""
    kinds = zip(*lanes, strict=True)
    return reference.Factors(
        *(torch.cat(kind, -1) if isinstance(kind[0], Tensor) else kind[0] for kind in kinds)
    )


def by_reference(cell: str, layer: Any) -> Callable[..., Any]:
    """``layer`` run by the plain loops of ``reference.py``, called as the layer is."""

    def call(
        input: Tensor,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        def time_major(t: Tensor) -> Tensor:
            return t.transpose(0, 1) if layer.batch_first else t

        x = time_major(input)
        weights, factors = draw(layer, *x.shape[:2], x)  # before the states below draw
        if hx is None:
            zeros = states(layer, x.shape[1], dtype=x.dtype, device=x.device)
            zero = map(torch.zeros_like, as_tuple(zeros))
            hx = tuple(zero) if isinstance(zeros, tuple) else next(zero)
        h, c = (*as_tuple(hx), None)[:2]
        output, h_n, c_n, cells = reference.stacked(
            cell,
            x,
            h,
            c,
            weights,
            lengths=lengths,
            resets=None if resets is None else time_major(resets),
            factors=factors,
            eps=layer.layer_norm_eps,
        )
        final = h_n if c_n is None else (h_n, c_n)
        return (time_major(output), final, *([time_major(cells)] if return_cells else []))

    return call
