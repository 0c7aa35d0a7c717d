"""``fused_rnn.viz``: the values are the layer's, and the pictures show them."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import viz

pytest.importorskip("matplotlib")
import numpy as np
from matplotlib.figure import Figure

T, B, I, H = 7, 3, 5, 12  # noqa: E741

LAYERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "lstm": (fused_rnn.LSTM, {}, "ifgoch"),
    "lstm peephole": (fused_rnn.LSTM, {"peephole": True}, "ifgoch"),
    "lstm coupled": (fused_rnn.LSTM, {"coupled": True}, "fgoch"),
    "lstm both": (fused_rnn.LSTM, {"coupled": True, "peephole": True}, "fgoch"),
    "lstm projected": (fused_rnn.LSTM, {"proj_size": 4, "layer_norm": True}, "ifgoch"),
    "lstm separate": (fused_rnn.LSTM, {"layer_norm": "separate", "num_heads": 3}, "ifgoch"),
    "lstm joint": (fused_rnn.LSTM, {"layer_norm": "joint", "zoneout": (0.2, 0.4)}, "ifgoch"),
    "lstm heads": (fused_rnn.LSTM, {"num_heads": 4, "zoneout": 0.3}, "ifgoch"),
    "lstm dropouts": (fused_rnn.LSTM, {"recurrent_dropout": 0.5, "weight_dropout": 0.5}, "ifgoch"),
    "gru": (fused_rnn.GRU, {}, "rznh"),
    "gru before": (fused_rnn.GRU, {"reset_after": False, "num_heads": 2}, "rznh"),
    "gru joint": (fused_rnn.GRU, {"layer_norm": "joint", "bias": False}, "rznh"),
    "rnn": (fused_rnn.RNN, {"nonlinearity": "relu", "layer_norm": True}, "h"),
}


def random_layer(name: str, **options: Any) -> fused_rnn.LSTM:
    """With weights that make gates differ from each other, normalisations included."""
    make, own, _ = LAYERS[name]
    layer = make(I, H, **own, **options).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return layer


def last_states(layer: Any, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
    """h and, for LSTM, c of every step of the last layer, as the fused layer gives them."""
    layer.eval()
    if isinstance(layer, fused_rnn.LSTM):
        output, _, cells = layer(*arguments, return_cells=True, **keywords)
        return {"h": output.detach(), "c": cells.detach()}
    return {"h": layer(*arguments, **keywords)[0].detach()}


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_the_layers(name: str) -> None:
    layer = random_layer(name, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, B, I).double(), torch.tensor([T, 0, 4])
    resets = torch.rand(T, B) < 0.3
    layer.train()
    found = [viz.gate_values(layer, x, lengths=lengths, resets=resets, direction=d) for d in (0, 1)]
    assert layer.training and all(set(each) == set(LAYERS[name][2]) for each in found)
    for letter, expected in last_states(layer, x, lengths=lengths, resets=resets).items():
        both = torch.cat([each[letter] for each in found], -1)
        torch.testing.assert_close(both, expected)
    for each in found:
        assert all(
            values[4:, 2].eq(0).all() and values[:, 1].eq(0).all() for values in each.values()
        )
        assert all(values.shape == (T, B, H) for k, values in each.items() if k != "h")


def test_gates_are_of_the_equations() -> None:
    """By hand, where the state is known: c' = f c + i g, h' = o tanh(c'), and GRU's."""
    x = torch.randn(T, B, I).double()
    for name, i_of in (("lstm", lambda v: v["i"]), ("lstm coupled", lambda v: 1 - v["f"])):
        lstm = random_layer(name)
        h0, c0 = torch.randn(2, 1, B, H).double().unbind()
        v = viz.gate_values(lstm, x, (h0, c0))
        before = torch.cat([c0, v["c"][:-1]])
        torch.testing.assert_close(v["c"], v["f"] * before + i_of(v) * v["g"])
        torch.testing.assert_close(v["h"], v["o"] * v["c"].tanh())
        h_before = torch.cat([h0, v["h"][:-1]])
        sums = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        sums = sums + h_before @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        *_, g, o = sums.chunk(4 - lstm.coupled, -1)
        torch.testing.assert_close((v["g"], v["o"]), (g.tanh(), o.sigmoid()))
    gru = random_layer("gru")
    v = viz.gate_values(gru, x, h0)
    h_before = torch.cat([h0, v["h"][:-1]])
    torch.testing.assert_close(v["h"], (1 - v["z"]) * v["n"] + v["z"] * h_before)
    r, *_ = (
        x @ gru.weight_ih_l0.T + gru.bias_ih_l0 + h_before @ gru.weight_hh_l0.T + gru.bias_hh_l0
    ).chunk(3, -1)
    torch.testing.assert_close(v["r"], r.sigmoid())


def test_layer_of_a_stack() -> None:
    lstm = random_layer("lstm", num_layers=3)
    first = fused_rnn.LSTM(I, H).double()
    first.load_state_dict({k: v for k, v in lstm.state_dict().items() if k.endswith("_l0")})
    x = torch.randn(T, B, I).double()
    expected = viz.gate_values(first, x)
    for layer_index in (0, -3):
        torch.testing.assert_close(viz.gate_values(lstm, x, layer_index=layer_index), expected)
    assert not torch.equal(viz.gate_values(lstm, x)["f"], expected["f"])


def test_autocast_rounds_what_the_layer_rounds() -> None:
    layer = random_layer("lstm").float().eval()
    input = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(input)
        found = viz.gate_values(layer, input)
    # The layer rounds h to bfloat16 at the end of every step, the loop keeps it: 8 bits.
    assert float((found["h"] - output.detach().float()).abs().max()) < 2**-7
    bare = viz.gate_values(layer.bfloat16(), input.bfloat16())
    for name, values in found.items():
        assert torch.equal(values, bare[name]), name


def test_forms_of_input() -> None:
    gru = random_layer("gru", batch_first=True)
    x, lengths = torch.randn(B, T, I).double(), torch.tensor([3, T, 5])
    expected = viz.gate_values(gru, x, lengths=lengths)
    assert expected["h"].shape == (T, B, H)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(viz.gate_values(gru, packed), expected)
    alone = viz.gate_values(gru, x[1])
    torch.testing.assert_close(alone, {k: v[:, 1:2] for k, v in expected.items()})
    half, x = viz.gate_values(gru.bfloat16(), x.bfloat16(), lengths=lengths), x.bfloat16()
    assert all(values.dtype == torch.float32 for values in half.values())
    expected = viz.gate_values(gru.float(), x.float(), lengths=lengths)
    torch.testing.assert_close(half, expected, rtol=0, atol=0)


def test_refusals() -> None:
    lstm, x = fused_rnn.LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(TypeError, match=r"layer should be a fused_rnn.RNN.*got: LSTM"):
        viz.gate_values(torch.nn.LSTM(I, H), x)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"layer_index should be within -1..0, got 1"):
        viz.gate_values(lstm, x, layer_index=1)
    with pytest.raises(IndexError, match=r"direction should be within 0..0, got 1"):
        viz.gate_values(lstm, x, direction=1)
    with pytest.raises(RuntimeError, match="input_size"):
        viz.gate_values(lstm, x[..., 1:])
    packed = pack_padded_sequence(x, [T] * B)
    with pytest.raises(ValueError, match="a PackedSequence brings its own"):
        viz.gate_values(lstm, packed, lengths=torch.tensor([T] * B))
    with pytest.raises(IndexError, match=r"row should be within -3..2, got 3"):
        viz.gates(lstm, x, row=3)
    with pytest.raises(IndexError, match=r"units should be within -12..11, got 12"):
        viz.gates(lstm, x, units=[0, 12])
    with pytest.raises(ValueError, match=r"labels should be one for each of 7 timesteps, got 2"):
        viz.gates(lstm, x, labels=["a", "b"])
    with pytest.raises(ValueError, match=r"weights should be of shape .* \(1, 2\), got \(2, 1\)"):
        viz.alignment(torch.ones(2, 1), ["a", "b"], ["c"])


def panels(figure: Figure) -> dict[str, np.ndarray]:
    """What a figure's heat maps show, by the last letter of their titles."""
    return {
        axes.get_title().removesuffix(" (input gate 1 - f)")[-1]: axes.images[0].get_array()
        for axes in figure.axes
        if axes.images and axes.get_title()
    }


@pytest.mark.parametrize("name", ["lstm coupled", "gru", "rnn", "lstm projected"])
def test_pictures_show_the_values(name: str) -> None:
    layer, x, lengths = random_layer(name), torch.randn(T, B, I).double(), torch.tensor([5, T, 2])
    values = viz.gate_values(layer, x, lengths=lengths)
    shown = panels(viz.gates(layer, x, lengths=lengths, row=0, labels=list("abcde"), units=[4, 0]))
    assert set(shown) == set(values)
    for letter, drawn in shown.items():
        of_row = values[letter][:5, 0].T
        expected = of_row if letter == "h" and layer.proj_size else of_row[[4, 0]]
        np.testing.assert_array_equal(drawn, expected.numpy())
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    figure = viz.gates(layer, packed, row=-1)
    assert all(drawn.shape[1] == 2 for drawn in panels(figure).values())
    figure.savefig(io.BytesIO(), format="png")


def test_alignment_shows_the_weights() -> None:
    weights = torch.rand(3, 4).softmax(-1).requires_grad_()
    figure = viz.alignment(weights, ["der", "rote", "Ball", " "], ["the", "red", "ball"])
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights.detach().T.numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["der", "rote", "Ball", "␣"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["the", "red", "ball"]
    assert len(figure.axes) == 2, "a scale"
    own = Figure()
    assert viz.alignment(weights, "abcd", "xyz", axes=own.subplots()) is own
    assert len(own.axes) == 1


def test_matplotlib_is_optional() -> None:
    program = """
import sys
import torch
import fused_rnn
assert not any(name.startswith("matplotlib") for name in sys.modules)
sys.modules["matplotlib"] = None
lstm, x = fused_rnn.LSTM(2, 3), torch.zeros(4, 1, 2)
assert fused_rnn.viz.gate_values(lstm, x)["f"].shape == (4, 1, 3)
for draw in (lambda: fused_rnn.viz.gates(lstm, x),
             lambda: fused_rnn.viz.alignment(torch.ones(1, 1), ["a"], ["b"])):
    try:
        draw()
    except ImportError as error:
        assert "pip install matplotlib" in str(error), error
    else:
        raise AssertionError("drawn without matplotlib")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_labels_are_shown_as_they_are() -> None:
    layer, input = random_layer("lstm projected"), torch.randn(T, B, I, dtype=torch.float64)
    price = ["$\\x$", "$^$", "a", "b", "c", "d", "e"]
    units = list(range(4, 4 + layer.proj_size))
    figure = viz.gates(layer, input, labels=price, units=units)
    figure.savefig(io.BytesIO())
    ticks = {
        axes.get_title(): [tick.get_text() for tick in axes.get_yticklabels()]
        for axes in figure.axes
        if axes.get_title()
    }
    assert ticks["cell state c"] == [str(unit) for unit in units]
    assert ticks["hidden state h"] != [str(unit) for unit in units]  # projections are no units
    viz.alignment(torch.rand(2, 2), price[:2], price[:2]).savefig(io.BytesIO())
    nothing = viz.gates(layer, input, lengths=torch.tensor([0, 1, 2]), labels=[])
    assert isinstance(nothing, Figure)


def test_nothing_is_left_in_pyplot() -> None:
    program = """
import sys
import torch
import fused_rnn
fused_rnn.viz.gates(fused_rnn.GRU(2, 3), torch.zeros(4, 1, 2))
assert "matplotlib.pyplot" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
