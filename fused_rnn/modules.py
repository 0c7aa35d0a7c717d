"""RNN, LSTM, GRU and their cells: torch.nn's signatures, parameters and state_dict."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import checks, functional
from .cells import CELLS, LAYER_NORMS

# Taken once: inside fused_rnn.patch(), torch.nn.LSTM is our own class.
_TorchLSTM = nn.LSTM

States = tuple[Tensor, ...]  # (h,) or, for LSTM, (h, c)

_SEQUENCES = (0, 3)  # the places of output and cells among a layer's results

# What a layer says of itself as __module__, which its class does not. A tracer of torch.fx asks a
# module for it, and does not look into those of torch.nn.
LEAF = "torch.nn"


class _Options:
    """The options that torch.nn does not have; defaults for layers saved before there were any."""

    _has_c = False  # whether there is a c beside h
    peephole = coupled = False
    reset_after = True
    num_heads = 1
    layer_norm: bool | str = False
    layer_norm_eps = 1e-5
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout = weight_dropout = forget_bias = 0.0
    _DEFAULTS: ClassVar = {k: v for k, v in dict(locals()).items() if not k.startswith("_")}

    def _chosen(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        options = {name: getattr(self, name) for name in self._DEFAULTS}
        return {name: value for name, value in options.items() if value != self._DEFAULTS[name]}

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        return text + "".join(f", {name}={value}" for name, value in self._chosen().items())

    def _set_options(self, **chosen: Any) -> bool:
        """Checks and keeps the options; whether one of them asks for other weights than torch's."""
        self.__module__ = LEAF
        for name, value in chosen.items():
            is_flag = isinstance(self._DEFAULTS[name], bool) and name != "layer_norm"
            if is_flag and not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
            setattr(self, name, value)
        heads, hidden_size = self.num_heads, self.hidden_size  # type: ignore[attr-defined]
        if not isinstance(heads, int) or isinstance(heads, bool):
            raise TypeError(f"num_heads should be of type int, got: {type(heads).__name__}")
        if heads <= 0 or hidden_size % heads:
            raise ValueError(
                "num_heads should be at least 1 and divide hidden_size, got num_heads="
                f"{heads} and hidden_size={hidden_size}"
            )
        options = self._options()
        if options and options.layer_norm and not self.reset_after:
            raise ValueError(
                "layer_norm should be False with reset_after=False, where the gates of W_hh h are "
                f"not there at one time, got layer_norm={self.layer_norm!r}"
            )
        self.layer_norm = LAYER_NORMS[options.layer_norm if options else 0]
        return self.peephole or self.coupled or heads > 1 or self.layer_norm is not False

    def _options(self) -> checks.Options | None:
        # At every call: the rates may be changed at any time, as torch.nn's dropout.
        options = checks.Options(
            self.layer_norm, self.layer_norm_eps, self.zoneout, self.recurrent_dropout,
            self.weight_dropout, self.forget_bias,
        )  # fmt: skip
        return checks.check_options(options, self._has_c, self.bias)  # type: ignore[attr-defined]

    def _own_shapes(self, cell: str) -> dict[str, tuple[int, ...]]:
        """Weights that torch.nn's layer does not have, or has in another shape."""
        traits, H, heads = CELLS[cell], self.hidden_size, self.num_heads  # type: ignore[attr-defined]
        shapes: dict[str, tuple[int, ...]] = {}
        if heads > 1:
            shapes["weight_hh"] = (heads, traits.gates * H // heads, H // heads)
        table = traits.table(False, False, LAYER_NORMS.index(self.layer_norm))
        return shapes | {
            weight.name: weight.shape({"H": H})
            for weight in table
            if weight.name not in ("weight_ih", "weight_hh")
        }

    def reset_parameters(self) -> None:
        """Draws weights as torch.nn does; a normalisation begins as none: weight 1, bias 0."""
        super().reset_parameters()  # type: ignore[misc]
        for name, parameter in self.named_parameters(recurse=False):  # type: ignore[attr-defined]
            if name.startswith("ln_"):
                torch.nn.init.constant_(parameter, 1.0 if "_weight" in name else 0.0)


OWN_ATTRIBUTES = ("__module__", *_Options._DEFAULTS)  # that torch.nn's layers do not have


class _Layer(_Options, RNNBase):
    """What RNN, LSTM and GRU share: everything but their constructors and their states."""

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels pack weights themselves, wherever they lie in memory."""

    def _set_weights(self) -> None:
        """Replaces the weights by those of the cell that the options choose."""
        if self.num_heads > 1 and self.proj_size > 0:
            raise ValueError(
                "num_heads should be 1 with proj_size, since a projection mixes the heads, got "
                f"num_heads={self.num_heads} and proj_size={self.proj_size}"
            )
        rows = CELLS[self._cell()].gates * self.hidden_size
        own = self._own_shapes(self._cell())
        old = dict(self._parameters)
        self._parameters.clear()
        self._flat_weights_names = []
        for names in self._all_weights:
            suffix, like = names[0].removeprefix("weight_ih"), old[names[0]]
            assert like is not None
            shapes: dict[str, tuple[int, ...]] = {
                name: weight.shape if name.startswith("weight_hr") else (rows, *weight.shape[1:])
                for name, weight in old.items()
                if name in names and weight is not None
            }
            shapes |= {name + suffix: shape for name, shape in own.items()}
            for name, shape in shapes.items():
                setattr(self, name, Parameter(like.new_empty(shape)))
            names[:] = shapes
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def _unpack_states(self, hx: Any) -> States:
        return (hx,)

    def _pack_states(self, states: States) -> Any:
        return states[0]

    def _check_state_dims(self, states: States, batched: bool) -> None:
        given = states[0].dim()
        if batched and given != 3:
            raise RuntimeError(
                f"For batched 3-D input, hx should also be 3-D but got {given}-D tensor"
            )
        if not batched and given != 2:
            raise RuntimeError(
                f"For unbatched 2-D input, hx should also be 2-D but got {given}-D tensor"
            )

    def _cell(self) -> str:
        """The name of this layer's cell in the ops."""
        return self.mode.lower()

    def _arranged(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """What forward returns, of output, the final states and, if asked for, cells."""
        output, h_n = results
        return output, h_n

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """What forward returns."""
        states = None if hx is None else self._unpack_states(hx)
        if isinstance(input, PackedSequence):
            return self._run_packed(input, states, lengths, resets, return_cells)
        dims = input.dim()
        if dims not in (2, 3):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 2D or 3D, got {dims}D instead"
            )
        batched = dims == 3
        if states is not None:
            self._check_state_dims(states, batched)
        if not batched:
            batch_dim = 0 if self.batch_first else 1
            if isinstance(lengths, Tensor) and lengths.dim() == 0:
                lengths = lengths.unsqueeze(0)
            if resets is not None:
                checks.expect_tensor("resets", resets, (input.size(0),), input)
                resets = resets.unsqueeze(batch_dim)
            input = input.unsqueeze(batch_dim)
            states = None if states is None else tuple(s.unsqueeze(1) for s in states)
        results = self._call(input, states, self.batch_first, lengths, resets, return_cells)
        if not batched:
            results = [
                t.squeeze(batch_dim if i in _SEQUENCES else 1) for i, t in enumerate(results)
            ]
        return self._arranged(results)

    def _run_packed(
        self,
        input: PackedSequence,
        states: States | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool,
    ) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence brings its own, expected None")
        if resets is not None:
            shape = (len(batch_sizes), int(batch_sizes[0]))
            expected = shape[::-1] if self.batch_first else shape
            checks.expect_tensor("resets", resets, expected, data)
            resets = resets.transpose(0, 1) if self.batch_first else resets
        # The rows stay sorted; states and resets follow them there, and final states come back.
        if sorted_indices is not None:
            if states is not None:
                states = tuple(s.index_select(1, sorted_indices) for s in states)
            if resets is not None:
                resets = resets.index_select(1, sorted_indices)
        results = self._call(data, states, False, None, resets, return_cells, batch_sizes)
        arranged: list[Any] = []
        for i, t in enumerate(results):
            if i in _SEQUENCES:
                arranged.append(PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices))
            else:
                arranged.append(
                    t if unsorted_indices is None else t.index_select(1, unsorted_indices)
                )
        return self._arranged(arranged)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # As torch.nn's, which asks _flat_weights for the dtype; functional_call leaves that behind.
        weight = self._parameters.get(self._flat_weights_names[0])
        dtype = (self._flat_weights[0] if weight is None else weight).dtype  # type: ignore[union-attr]
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). Convert "
                f"input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _call(
        self,
        input: Tensor,
        states: States | None,
        batch_first: bool,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool,
        batch_sizes: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Output, the final states and, if asked for, cells; sequences packed as input is."""
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, self._pack_states(states), batch_sizes)
        padded = batch_sizes is not None and not functional.takes_packed(input)
        if padded:
            checks.check_batch_sizes(batch_sizes, input)  # type: ignore[arg-type]
            packed = PackedSequence(input, batch_sizes)
            (input, lengths), batch_sizes = pad_packed_sequence(packed), None
        layers = checks.Layers(
            self._cell(), self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, batch_first, self._options(),
        )  # fmt: skip
        results = functional.run(
            layers, input, () if states is None else states, self._weights(), lengths, resets,
            return_cells, batch_sizes,
        )  # fmt: skip
        if padded:
            return [
                pack_padded_sequence(t, lengths).data if i in _SEQUENCES else t  # type: ignore[arg-type]
                for i, t in enumerate(results)
            ]
        return results

    def _weights(self) -> list[Tensor]:
        # By name, not from _flat_weights, which parametrizations and functional_call leave behind.
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]


F = TypeVar("F", bound=Callable[..., None])


def _without_projection(init: F) -> F:
    """Takes what torch.nn's RNN and GRU take beside the arguments that they document.

    They hand positional arguments after ``bidirectional`` to RNNBase, for which the first of these
    is proj_size; by its name they refuse it.
    """
    kinds = [parameter.kind for parameter in inspect.signature(init).parameters.values()]
    documented = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) - 1  # without self

    @functools.wraps(init)
    def take(self: Any, *args: Any, **kwargs: Any) -> None:
        args, (proj_size, *more) = args[:documented], args[documented:] or (0,)
        if not isinstance(proj_size, int):
            raise TypeError(f"proj_size should be of type int, got: {type(proj_size).__name__}")
        if "proj_size" in kwargs or proj_size:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        init(self, *args, **dict(zip(("device", "dtype"), more, strict=False)), **kwargs)

    return take  # type: ignore[return-value]


class RNN(_Layer):
    """Multi-layer simple (Elman) RNN; drop-in for ``torch.nn.RNN``.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    or with a rectifier in place of tanh (Elman 1990, "Finding structure in time").

    Args:
        input_size: features of each timestep's input.
        hidden_size: features of the hidden state.
        num_layers: layers stacked over each other.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether the layer has ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are (B, T, features) instead of (T, B, features).
        dropout: probability of zeroing an element between layers, in training.
        bidirectional: adds a direction that reads backwards; outputs are concatenated.
        device, dtype: of the parameters.
        layer_norm: ``True`` or ``"separate"`` normalises W_ih x and W_hh h, each over all
            gates, before biases are added, and in LSTM the c inside the output's tanh (Ba et al.
            2016, arXiv 1607.06450): weights ``ln_ih_*``, ``ln_hh_*``, ``ln_c_*``. ``"joint"``
            normalises the sum of both and the biases, and in LSTM c itself: ``ln_g_*``, ``ln_c_*``
            (``*`` is ``weight_l{k}`` and ``bias_l{k}``; over G gates (G * hidden_size), of c
            (hidden_size)). In GRU the sum's third part is what the reset gate multiplies.
        layer_norm_eps: added to the variance, as in ``torch.nn.LayerNorm``.
        zoneout: probability that a unit of h (in LSTM also of c, or a pair of both probabilities)
            stays as it was, in training; else the expectation of that (Krueger et al. 2017, arXiv
            1606.01305).
        recurrent_dropout: probability that a unit of h is zero for the recurrent product, in
            training, the same units in every timestep of a sequence (Gal & Ghahramani 2016, arXiv
            1512.05287); others are divided by 1 - p.
        weight_dropout: probability that a weight of ``weight_hh`` is zero for a call, in training
            (DropConnect; Merity et al. 2018, arXiv 1708.02182); others are divided by 1 - p.
        num_heads: the recurrence is block-diagonal (sLSTM's heads; Beck et al. 2024, arXiv
            2405.04517): the hidden units are divided into this many heads of equal size, and the
            gates of a head see the h of its own units only. ``weight_hh_l{k}`` is then (num_heads,
            G * hidden_size / num_heads, hidden_size / num_heads), G gates.

    Parameters are named, shaped and initialised as torch.nn's: ``weight_ih_l{k}`` (hidden_size,
    input), ``weight_hh_l{k}`` (hidden_size, hidden_size), ``bias_ih_l{k}``, ``bias_hh_l{k}``
    (hidden_size), with ``_reverse`` appended for the second direction.
    """

    @_without_projection
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        self.nonlinearity = nonlinearity
        mode = functional.rnn_cell(nonlinearity).upper()
        RNNBase.__init__(
            self, mode, input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first,
            dropout=dropout, bidirectional=bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        if self._set_options(
            num_heads=num_heads, layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout,
        ):  # fmt: skip
            self._set_weights()

    def _cell(self) -> str:
        return functional.rnn_cell(self.nonlinearity)

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Runs the layer over a sequence.

        Args:
            input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size)
                unbatched, or a PackedSequence.
            hx: initial h (num_layers * D, B, hidden_size), or None for zeros.
            lengths: (B,) integers in 0..T. Row b stops after lengths[b] steps: outputs beyond are
                zero, ``h_n`` is the state after its last step, a reverse direction starts there.
            resets: bool (T, B), or (B, T) with ``batch_first``. Where true the row's state is
                zeroed before that step, and no gradient crosses; in a reverse direction, before it
                reads that step.

        Returns:
            output (T, B, D * hidden_size), batch first or packed as the input is, and h_n
            (num_layers * D, B, hidden_size). Unbatched input has no B.

        Raises:
            ValueError, RuntimeError: as torch.nn does; the message names what was expected.
        """
        return self._run(input, hx, lengths, resets)


class GRU(_Layer):
    """Multi-layer gated recurrent unit; drop-in for ``torch.nn.GRU``.

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) n + z h_{t-1}

    (Cho et al. 2014, arXiv 1406.1078, eq. 5 to 8, with cuDNN's reset after the product.)

    Arguments and parameters as ``RNN`` without ``nonlinearity``; weights hold the gates in the
    order r, z, n: ``weight_ih_l{k}`` (3 * hidden_size, input) and so on.

    Args:
        reset_after: False for the paper's own form (Keras's ``reset_after=False``), the reset gate
            applied to h before the product, with the same parameters:
            n = tanh(W_in x_t + b_in + W_hn (r h_{t-1}) + b_hn).
    """

    @_without_projection
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        reset_after: bool = True,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        RNNBase.__init__(
            self, "GRU", input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first,
            dropout=dropout, bidirectional=bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        if self._set_options(
            reset_after=reset_after, num_heads=num_heads, layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout,
        ):  # fmt: skip
            self._set_weights()

    def _cell(self) -> str:
        return functional.gru_cell(self.reset_after)

    forward = RNN.forward


class _LayerWithC(_Layer):
    """A layer whose states are h and c: LSTM, and cells like it."""

    _has_c = True

    def _unpack_states(self, hx: Any) -> States:
        return _pair(self._get_name(), hx)

    def _pack_states(self, states: States) -> Any:
        return states

    def _arranged(self, results: Sequence[Any]) -> tuple[Any, ...]:
        output, h_n, c_n, *cells = results
        return (output, (h_n, c_n), *cells)

    def _check_state_dims(self, states: States, batched: bool) -> None:
        h, c = states
        given = h.dim(), c.dim()
        if batched and given != (3, 3):
            raise RuntimeError(
                "For batched 3-D input, hx and cx should also be 3-D but got "
                f"({given[0]}-D, {given[1]}-D) tensors"
            )
        if not batched and given != (2, 2):
            raise RuntimeError(
                "For unbatched 2-D input, hx and cx should also be 2-D but got "
                f"({given[0]}-D, {given[1]}-D) tensors"
            )

    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    check_forward_args = _TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = _TorchLSTM.permute_hidden  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the layer over a sequence.

        Args:
            input, lengths, resets: as ``RNN.forward``.
            hx: initial h (num_layers * D, B, proj_size or hidden_size) and c (num_layers * D, B,
                hidden_size), or None for zeros.
            return_cells: also return the c of every step of the last layer.

        Returns:
            output (T, B, D * (proj_size or hidden_size)), (h_n, c_n) and, if asked for, cells (T,
            B, D * hidden_size); sequences batch first or packed as the input is.

        Raises:
            ValueError, RuntimeError: as torch.nn does; the message names what was expected.
        """
        return self._run(input, hx, lengths, resets, return_cells)


class LSTM(_LayerWithC):
    """Multi-layer long short-term memory; drop-in for ``torch.nn.LSTM``.

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f c_{t-1} + i g
        h_t = o tanh(c_t)

    (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000. With ``proj_size``, h_t is
    multiplied by ``weight_hr``, Sak et al. 2014, arXiv 1402.1128.)

    Arguments and parameters as ``RNN`` without ``nonlinearity``, and ``proj_size``: if above
    zero, the size h is projected to, with ``weight_hr_l{k}`` (proj_size, hidden_size). Weights hold
    the gates in the order i, f, g, o: ``weight_ih_l{k}`` (4 * hidden_size, input) and so on.

    Args:
        peephole: gates i and f also see w_i c_{t-1} and w_f c_{t-1}, gate o sees w_o c_t (Gers &
            Schmidhuber 2000), with one weight each per unit: ``weight_ch_l{k}`` (3 * hidden_size)
            in the order i, f, o.
        coupled: i = 1 - f (CIFG; Greff et al. 2017, arXiv 1503.04069). There are gates f, g, o
            only: ``weight_ih_l{k}`` (3 * hidden_size, input) and so on; with ``peephole``
            ``weight_ch_l{k}`` (2 * hidden_size) in the order f, o.
        forget_bias: added to the forget gate's bias in use, not to the parameter, so that weight
            decay pulls that gate open (Jozefowicz et al. 2015, who take 1). Needs ``bias``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float = 0.0,
    ) -> None:
        RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first,
            dropout=dropout, bidirectional=bidirectional, proj_size=proj_size, device=device,
            dtype=dtype,
        )  # fmt: skip
        if self._set_options(
            peephole=peephole, coupled=coupled, num_heads=num_heads, layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout, forget_bias=forget_bias,
        ):  # fmt: skip
            self._set_weights()

    def _cell(self) -> str:
        return functional.lstm_cell(self.peephole, self.coupled)


def _pair(name: str, hx: Any) -> States:
    if isinstance(hx, Tensor):
        raise TypeError(f"{name}: Expected hx to be a pair of tensors (h, c), got a tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{name}: Expected hx to be a pair of tensors (h, c), got {len(hx)}")
    return tuple(hx)


class _Cell(_Options, RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share: one timestep of one layer."""

    _own_weights: Sequence[str] = ()

    def _set_weights(self, cell: str) -> None:
        """Replaces the weights by those of the cell that the options choose."""
        like, shapes = self.weight_hh, self._own_shapes(cell)
        for name, shape in shapes.items():
            setattr(self, name, Parameter(like.new_empty(shape)))
        self._own_weights = [name for name in shapes if name != "weight_hh"]
        self.reset_parameters()

    def _step(self, cell: str, input: Tensor, states: States | None) -> States:
        name = self._get_name()
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            states = None if states is None else tuple(s.unsqueeze(0) for s in states)
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for i, state in enumerate(states or ()):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{i} batch size "
                    f"{state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {state.size(1)}, "
                    f"expected {self.hidden_size}"
                )
        weights = [self.weight_ih, self.weight_hh]
        bias_ih, bias_hh = self.bias_ih, self.bias_hh
        has_biases = bias_ih is not None and bias_hh is not None
        if has_biases:
            weights += [bias_ih, bias_hh]
        weights += [getattr(self, name) for name in self._own_weights]
        options = self._options()  # without which nothing asks for the mode
        train = options is not None and self.training
        layers = checks.Layers(cell, has_biases, train=train, options=options)
        result = functional.step(layers, input, states or (), weights)
        return result if batched else tuple(s.squeeze(0) for s in result)

    def _check_state_dim(self, what: str, state: Tensor | None) -> None:
        if state is not None and state.dim() not in (1, 2):
            raise ValueError(
                f"{self._get_name()}: Expected {what} to be 1D or 2D, got {state.dim()}D instead"
            )


class RNNCell(_Cell):
    """One timestep of a simple RNN; drop-in for ``torch.nn.RNNCell``.

    Args:
        input_size, hidden_size, bias, nonlinearity, num_heads, layer_norm, layer_norm_eps, zoneout,
            device, dtype: as ``RNN``.
    """

    __constants__ = [*RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        if self._set_options(
            num_heads=num_heads,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            zoneout=zoneout,
        ):
            self._set_weights("rnn_tanh")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, input_size) and hx (B, hidden_size), or both without B; returns h' like hx."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        self._check_state_dim("hidden", hx)
        return self._step(f"rnn_{self.nonlinearity}", input, None if hx is None else (hx,))[0]


class GRUCell(_Cell):
    """One timestep of a GRU; drop-in for ``torch.nn.GRUCell``.

    Args:
        input_size, hidden_size, bias, reset_after, num_heads, layer_norm, layer_norm_eps, zoneout,
            device, dtype: as ``GRU``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        if self._set_options(
            reset_after=reset_after,
            num_heads=num_heads,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            zoneout=zoneout,
        ):
            self._set_weights(functional.gru_cell(reset_after))

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, input_size) and hx (B, hidden_size), or both without B; returns h' like hx."""
        self._check_state_dim("hidden", hx)
        cell = functional.gru_cell(self.reset_after)
        return self._step(cell, input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    """One timestep of an LSTM; drop-in for ``torch.nn.LSTMCell``.

    Args:
        input_size, hidden_size, bias, peephole, coupled, num_heads, layer_norm, layer_norm_eps,
            zoneout, forget_bias, device, dtype: as ``LSTM``.
    """

    _has_c = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        num_heads: int = 1,
        layer_norm: bool | str = False,
        layer_norm_eps: float = 1e-5,
        zoneout: float | tuple[float, float] = 0.0,
        forget_bias: float = 0.0,
    ) -> None:
        chunks = 3 if coupled else 4
        super().__init__(
            input_size, hidden_size, bias, num_chunks=chunks, device=device, dtype=dtype
        )
        if self._set_options(
            peephole=peephole, coupled=coupled, num_heads=num_heads, layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps, zoneout=zoneout, forget_bias=forget_bias,
        ):  # fmt: skip
            self._set_weights(functional.lstm_cell(peephole, coupled))

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """input (B, input_size), hx = (h, c) of (B, hidden_size), or both without B; h, c."""
        states = None if hx is None else _pair("LSTMCell", hx)
        for i, state in enumerate(states or ()):
            self._check_state_dim(f"hx[{i}]", state)
        h, c = self._step(functional.lstm_cell(self.peephole, self.coupled), input, states)
        return h, c
