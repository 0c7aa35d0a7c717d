"""Tools that look at modules: torch.fx and its quantization, and packages that know torch.nn's."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from test_convert import CLOSE, FUSED, TORCH, Residual, assert_converts, data, every, input_for
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import convert, patch, revert

# torch.fx


def called(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@every
def test_traced_as_a_leaf(name: str) -> None:
    model = nn.Sequential(FUSED[name](4, 3, dtype=torch.float64))
    traced = torch.fx.symbolic_trace(model)
    assert called(traced.graph) == ["0"]
    assert traced.code == torch.fx.symbolic_trace(nn.Sequential(TORCH[name](4, 3))).code
    torch.testing.assert_close(traced(input_for(name)), model(input_for(name)), rtol=0, atol=0)


class Mixed(nn.Module):
    """Layers and cells, with and without states; some twice."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.lstm = source.LSTM(4, 6, batch_first=True)
        self.cell = source.LSTMCell(6, 5)
        self.gru = source.GRU(5, 5, num_layers=2)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        output, (h_n, _) = self.lstm(self.first(x), (h, c))
        state = self.cell(output[:, 0])
        state = self.cell(h_n[0], state)
        output, _ = self.gru(state[0].unsqueeze(0))
        return self.last(output[0])


def mixed_arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return data(3, 5, 4).to(dtype), data(1, 3, 6).to(dtype), data(1, 3, 6).to(dtype)


MAKE = {
    "made": lambda: Mixed(fused_rnn),
    "converted": lambda: convert(Mixed(nn)),
    "copied": lambda: copy.deepcopy(Mixed(fused_rnn)),
    "unpickled": lambda: pickle.loads(pickle.dumps(Mixed(fused_rnn))),
}


@pytest.mark.parametrize("how", MAKE)
def test_traced_model(how: str) -> None:
    model, args = MAKE[how]().double(), mixed_arguments(torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert called(traced.graph) == ["first", "lstm", "cell", "cell", "gru", "last"]
    assert traced.code == torch.fx.symbolic_trace(Mixed(nn)).code
    torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)
    reverted = revert(copy.deepcopy(traced))
    assert type(reverted.lstm) is nn.LSTM
    torch.testing.assert_close(reverted(*args), model(*args), **CLOSE)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fused_rnn.LSTM(4, 3, dtype=torch.float64)

    def forward(self, input: Any, lengths: Any = None) -> Any:
        return self.layer(input, lengths=lengths)[0]


def test_traced_with_lengths_and_with_packed_input() -> None:
    model = Calls()
    traced = torch.fx.symbolic_trace(model)
    args = data(5, 2, 4), torch.tensor([5, 2])
    torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)
    packed = pack_sequence([data(3, 4), data(2, 4)])
    torch.testing.assert_close(traced(packed).data, model(packed).data, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_traced_layer_has_its_hooks_once() -> None:
    """A tracer that looked into the layer would record them, and the layer run them again."""
    model = nn.Sequential(fused_rnn.GRU(4, 3, dtype=torch.float64))
    nn.utils.weight_norm(model[0], "weight_hh_l0")
    model[0].register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    expected = model(data(5, 2, 4))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(data(5, 2, 4)), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(data(5, 2, 4)), expected, rtol=0, atol=0)


def test_class_names_its_own_module() -> None:
    layer = fused_rnn.GRU(4, 3)
    assert type(layer).__module__ == "fused_rnn.modules"
    assert inspect.getmodule(type(layer)) is fused_rnn.modules
    assert not isinstance(layer, nn.GRU)
    assert repr(layer) == "GRU(4, 3)"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_quantization_of_what_is_around() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.use_deterministic_algorithms(False)  # which quantized tensors do not have
    args = mixed_arguments(torch.float32)
    results = []
    for source in (nn, fused_rnn):
        prepared = prepare_fx(Mixed(source).eval(), get_default_qconfig_mapping(), args)
        prepared(*args)
        quantized = convert_fx(prepared)
        assert type(quantized.lstm) is source.LSTM and type(quantized.cell) is source.LSTMCell
        assert "quantized" in type(quantized.last).__module__
        results.append(quantized(*args))
    torch.testing.assert_close(*results)


# TorchRL


class AsksAtRunTime(nn.Module):
    """What TorchRL's LSTMModule does with trajectories that end at different times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, input: Tensor, splits: Tensor) -> Tensor:
        if isinstance(self.lstm, nn.LSTM):
            packed = pack_padded_sequence(input, splits, batch_first=True, enforce_sorted=False)
            output: Tensor = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
            return output
        mask = torch.arange(input.shape[1]) < splits.unsqueeze(1)
        masked: Tensor = self.lstm(input, mask=mask)[0]
        return masked


class GruBehindAProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 3)

    @property
    def is_gru(self) -> bool:
        return any(isinstance(self.gru, each) for each in (nn.GRU,))

    def forward(self, input: Tensor) -> Tensor:
        assert self.is_gru
        output: Tensor = self.gru(input)[0]
        return output


def test_layer_whose_holder_asks_for_its_class() -> None:
    model = AsksAtRunTime().double()
    args = data(3, 5, 4), torch.tensor([2, 5, 3])
    layer = model.lstm
    assert_converts(model, *args)
    assert isinstance(model.lstm, nn.LSTM) and isinstance(model.lstm, fused_rnn.LSTM)
    assert model.lstm.weight_hh_l0 is layer.weight_hh_l0
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.lstm) is type(model.lstm)
        torch.testing.assert_close(copied(*args), model(*args), rtol=0, atol=0)
    assert type(type(model.lstm)(4, 3)) is type(model.lstm)
    assert type(revert(model).lstm) is nn.LSTM
    assert isinstance(convert(GruBehindAProperty()).gru, nn.GRU)


def test_shared_layer_that_one_holder_asks_for() -> None:
    asks = AsksAtRunTime()
    model = convert(nn.ModuleList([nn.Sequential(asks.lstm), asks]))
    assert model[0][0] is asks.lstm
    assert isinstance(asks.lstm, nn.LSTM)


def test_layer_whose_class_nobody_asks_for() -> None:
    """torch.compile takes it as it is."""

    class AsksForAnother(Residual):
        def __init__(self) -> None:
            assert isinstance(self, nn.GRU)
            super().__init__(4, 4)
            self.lstm = nn.LSTM(4, 4)

        def others(self) -> bool:
            return any(isinstance(module, nn.LSTM) for module in self.modules())

    assert type(convert(AsksForAnother()).lstm) is fused_rnn.LSTM


def test_compiled_where_the_class_is_asked_for() -> None:
    model = convert(GruBehindAProperty().double())
    expected = model(data(5, 2, 4))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(data(5, 2, 4)), expected, **CLOSE)


@pytest.mark.parametrize("name, states", [("LSTMModule", ["h", "c"]), ("GRUModule", ["h"])])
def test_torchrl(name: str, states: list[str]) -> None:
    torchrl = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict

    keys = {"in_keys": ["observation", *states], "out_keys": ["output", *states]}
    torch.manual_seed(0)
    model = getattr(torchrl, name)(input_size=4, hidden_size=6, **keys)
    is_init = torch.zeros(3, 7, 1, dtype=torch.bool)
    is_init[[0, 1, 2, 1, 2], [0, 0, 0, 3, 5]] = True  # trajectories of seven, three, four, ...
    given = TensorDict(
        {
            "observation": torch.randn(3, 7, 4), "is_init": is_init,
            **{key: torch.zeros(3, 7, 1, 6) for key in states},
        },
        [3, 7],
    )  # fmt: skip
    results = []
    for each in (model, convert(copy.deepcopy(model))):
        with torchrl.set_recurrent_mode(True):
            results.append(each(given.clone()))
    for key in ("output", *states):
        torch.testing.assert_close(results[1][key], results[0][key])


# SpeechBrain


class LengthsCapable(nn.Module):
    """What SpeechBrain's LengthsCapableSequential does: ``lengths`` for those that take them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        specs = [inspect.getfullargspec(layer.forward) for layer in layers]
        self.takes_lengths = ["lengths" in spec.args + spec.kwonlyargs for spec in specs]

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        for layer, takes in zip(self.layers, self.takes_lengths, strict=True):
            x = layer(x, lengths=lengths) if takes else layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Scaled(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x * lengths[:, None, None]


def speech_model() -> Any:
    torch.manual_seed(0)
    layers = [
        torch.nn.LSTM(4, 3, batch_first=True),
        Scaled(),
        torch.nn.GRU(3, 3),
        torch.nn.RNN(3, 3),
    ]
    return LengthsCapable(*layers).double()


def test_speechbrain() -> None:
    plain = speech_model()
    with patch():
        model = speech_model()
    assert type(model.layers[0]) is fused_rnn.LSTM
    args = data(2, 5, 4), torch.tensor([1.0, 0.4])
    for each in (model, convert(copy.deepcopy(plain))):
        torch.testing.assert_close(each(*args), plain(*args), **CLOSE)


def test_calls_look_like_torchs_inside_patch_only() -> None:
    layers = [fused_rnn.RNN, fused_rnn.LSTM, fused_rnn.GRU]
    before = [inspect.signature(layer.forward) for layer in layers]
    with patch():
        with patch():
            pass
        for layer in layers:
            assert list(inspect.signature(layer.forward).parameters) == ["self", "input", "hx"]
            # What is called is the same.
            assert not layer(4, 3)(torch.randn(5, 2, 4), lengths=torch.tensor([2, 0]))[0][2:].any()
    assert [inspect.signature(layer.forward) for layer in layers] == before
    assert all("lengths" in signature.parameters for signature in before)


# Complex layers


@every
def test_complex_layers_are_left_alone(name: str) -> None:
    layer = TORCH[name](4, 3, dtype=torch.complex64)
    model = nn.Sequential(layer, nn.GRU(3, 3))
    with pytest.warns(UserWarning, match="leaves 0 as it is: its parameters are complex"):
        convert(model)
    assert model[0] is layer
    assert isinstance(model[1], fused_rnn.GRU)


# ONNX


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_onnx_refuses_bfloat16(name: str) -> None:
    pytest.importorskip("onnxscript")
    model = nn.Sequential(FUSED[name](4, 3, dtype=torch.bfloat16)).eval()
    with pytest.raises(Exception, match="no recurrent operator with bfloat16"):
        torch.onnx.export(
            model, (torch.randn(5, 2, 4, dtype=torch.bfloat16),), dynamo=True, verbose=False,
            custom_translation_table=fused_rnn.onnx.translation_table(),
        )  # fmt: skip
