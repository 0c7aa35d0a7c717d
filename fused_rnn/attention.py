"""Attention over encoder states, a recurrent decoder that attends, and decoding with it.

Batch first throughout: memory is (B, S, memory_size), whatever torch.nn's layers default to.

Letters: B batch rows, Tq queries, Tk or S keys (memory), T decoder timesteps, A width of the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .checks import check_lengths, expect_tensor
from .modules import GRU, LSTM

SCORES = ("additive", "concat", "general", "dot", "scaled_dot")
_WITH_TANH = ("additive", "concat")  # those that functional.additive_attention computes

Hidden = Tensor | tuple[Tensor, Tensor]  # h_n (num_layers, B, H) or, for LSTM, (h_n, c_n)


class Attention(nn.Module):
    """Attention: a context for each query, the mean of the values weighted by a score's softmax.

        weights_ij = softmax_j score(q_i, k_j)
        context_i = sum_j weights_ij v_j

    The scores, and where they are from:

    - ``additive``: weight_score . tanh(weight_query q + weight_key k + bias), Bahdanau et al. 2015,
      arXiv 1409.0473, A.1.2
    - ``concat``: weight_score . tanh(weight_concat [q; k]), Luong et al. 2015, arXiv 1508.04025,
      eq. 8
    - ``general``: q . weight_general k, Luong et al. 2015, eq. 8
    - ``dot``: q . k, Luong et al. 2015, eq. 8
    - ``scaled_dot``: q . k / sqrt(key_size), Vaswani et al. 2017, arXiv 1706.03762, eq. 1

    Args:
        query_size: features of a query.
        key_size: features of the memory, from which the keys come.
        value_size: features of the values; None for key_size, as the values are the memory.
        hidden_size: width A of the score, ``additive`` and ``concat`` only; None for query_size.
        score: one of the above.
        dropout: probability of zeroing a weight, in training; the weights returned are without.

    Parameters, uniform within 1/sqrt(fan_in) as nn.Linear's: ``weight_query`` (A, query_size),
    ``weight_key`` (A, key_size), ``bias`` (A); ``weight_concat`` (A, query_size + key_size), the
    query's columns first; ``weight_score`` (A); ``weight_general`` (query_size, key_size).

    Raises:
        ValueError: an option does not exist, or does not go with ``score``.
    """

    weight_query: Tensor
    weight_key: Tensor
    weight_concat: Tensor
    weight_general: Tensor
    weight_score: Tensor
    bias: Tensor

    def __init__(
        self,
        query_size: int,
        key_size: int,
        value_size: int | None = None,
        hidden_size: int | None = None,
        *,
        score: str = "additive",
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _expect_option("score", score, SCORES)
        _expect_probability("dropout", dropout)
        if hidden_size is not None and score not in _WITH_TANH:
            raise ValueError(f"hidden_size: score '{score}' has none, expected None")
        if score in ("dot", "scaled_dot") and query_size != key_size:
            raise ValueError(
                f"score '{score}' needs query_size equal to key_size, got {query_size} and "
                f"{key_size}"
            )
        self.query_size = query_size
        self.key_size = key_size
        self.value_size = key_size if value_size is None else value_size
        self.score = score
        self.dropout = dropout
        # The width of projected keys, whatever the score.
        self.hidden_size = query_size if hidden_size is None else hidden_size
        sizes = (query_size, key_size, self.value_size, self.hidden_size)
        names = ("query_size", "key_size", "value_size", "hidden_size")
        for name, size in zip(names, sizes, strict=True):
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        A = self.hidden_size
        if score == "additive":
            self.weight_query = parameter(A, query_size)
            self.weight_key = parameter(A, key_size)
            self.bias = parameter(A)
        elif score == "concat":
            self.weight_concat = parameter(A, query_size + key_size)
        elif score == "general":
            self.weight_general = parameter(query_size, key_size)
        if score in _WITH_TANH:
            self.weight_score = parameter(A)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.query_size if name == "bias" else parameter.shape[-1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def extra_repr(self) -> str:
        parts = [f"{self.query_size}, {self.key_size}"]
        if self.value_size != self.key_size:
            parts.append(f"value_size={self.value_size}")
        if self.score in _WITH_TANH:
            parts.append(f"hidden_size={self.hidden_size}")
        parts.append(f"score='{self.score}'")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)

    def project_memory(
        self, memory: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The keys as the score reads them, to be computed once where a memory serves many calls.

        Args:
            memory: (B, Tk, key_size).
            lengths, mask: as in ``forward``. Needed only where what they exclude may be NaN or
                infinite, which then reaches no gradient.

        Returns:
            (B, Tk, hidden_size) for ``additive`` and ``concat``, (B, Tk, query_size) for
            ``general``; for ``dot`` and ``scaled_dot`` memory itself.
        """
        if lengths is not None or mask is not None:
            Tk = memory.shape[1]
            lengths = check_lengths(lengths, memory, memory.shape[0], Tk)
            _check_mask(mask, memory, None, Tk)
            memory = _met_by_any(memory, _allowed(lengths, mask, Tk))
        if self.score == "additive":
            return F.linear(memory, self.weight_key)
        if self.score == "concat":
            return F.linear(memory, self.weight_concat[:, self.query_size :])
        if self.score == "general":
            return F.linear(memory, self.weight_general)
        return memory

    def _project_query(self, query: Tensor) -> Tensor:
        """The queries (B, Tq, query_size) as the score reads them, (B, Tq, width of the keys)."""
        if self.score == "additive":
            return F.linear(query, self.weight_query)
        if self.score == "concat":
            return F.linear(query, self.weight_concat[:, : self.query_size])
        return query

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        value: Tensor | None = None,
        *,
        key: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: (B, Tq, query_size), or (B, query_size) for one query per row.
            memory: (B, Tk, key_size).
            value: (B, Tk, value_size), or None for memory.
            key: what ``project_memory`` made of memory, or None to compute it.
            lengths: (B,) integers in 0..Tk, on any device: row b has lengths[b] keys.
            mask: bool (B, Tk) or (B, Tq, Tk), True where a query may attend to a key.
            need_weights: False returns None for the weights, which saves memory: ``general``,
                ``dot`` and ``scaled_dot`` then use torch's scaled_dot_product_attention.

        Returns:
            context (B, Tq, value_size) and weights (B, Tq, Tk), without Tq where query has none. A
            query that may attend to nothing has zero context, weights and gradient. What is
            excluded reaches neither results nor gradients, NaN and infinity included.

        Raises:
            RuntimeError: a shape, dtype, device or length does not fit; the message names it.
            TypeError: an argument is not a tensor.
        """
        _expect_tensor("query", query)
        single = query.dim() == 2
        if query.dim() not in (2, 3) or query.shape[-1] != self.query_size:
            raise RuntimeError(
                f"Expected query of shape (B, Tq, {self.query_size}) or (B, {self.query_size}), "
                f"got {tuple(query.shape)}"
            )
        B = query.shape[0]
        _expect_shape("memory", memory, (B, None, self.key_size), ("B", "Tk", "key_size"))
        Tk = memory.shape[1]
        queries = query.unsqueeze(1) if single else query
        _expect_like("query", query, next(self.parameters(), query))
        _expect_like("memory", memory, query)
        if key is not None:
            expect_tensor("key", key, (B, Tk, self.hidden_size), query)
            _expect_like("key", key, query)
        if value is not None:
            expect_tensor("value", value, (B, Tk, self.value_size), query)
            _expect_like("value", value, query)
        elif self.value_size != self.key_size:
            raise RuntimeError(
                f"Expected value of shape {(B, Tk, self.value_size)}, got None, and memory of "
                f"shape {tuple(memory.shape)} cannot stand for it"
            )
        lengths = check_lengths(lengths, query, query.shape[0], Tk)
        _check_mask(mask, queries, queries.shape[1], Tk)
        allowed = _allowed(lengths, mask, Tk)
        fused = self.score in _WITH_TANH  # and leaves out of keys and values what is excluded
        if allowed is not None:
            queries = queries.masked_fill(~allowed.any(dim=2, keepdim=True), 0)
        if key is None or not fused:
            memory = _met_by_any(memory, allowed)
        if not fused:
            key = None if key is None else _met_by_any(key, allowed)
            value = None if value is None else _met_by_any(value, allowed)
        context, weights = self._attend(
            self._project_query(queries),
            self.project_memory(memory) if key is None else key,
            memory if value is None else value,
            lengths,
            mask,
            need_weights,
        )
        if single:
            context = context.squeeze(1)
            weights = None if weights is None else weights.squeeze(1)
        return context, weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` on projected queries and keys, without its checks; lengths int64 there.

        For the product scores, keys and values that nobody meets are finite.
        """
        dropout = self.dropout if self.training else 0.0
        if self.score in _WITH_TANH:
            result = functional.additive_attention(
                query,
                key,
                value,
                self.weight_score,
                bias=self.bias if self.score == "additive" else None,
                lengths=lengths,
                mask=mask,
                dropout_p=dropout,
                return_weights=need_weights,
            )
            return (result[0], result[1]) if isinstance(result, tuple) else (result, None)
        scale = 1 / math.sqrt(self.key_size) if self.score == "scaled_dot" else 1.0
        allowed = _allowed(lengths, mask, key.shape[1])
        if allowed is not None and allowed.shape[1] != 1:
            query, key, value = _met_in_pairs(query, key, value, allowed)
        nothing = None if allowed is None else ~allowed.any(dim=-1, keepdim=True)
        if allowed is not None and nothing is not None:
            allowed = allowed | nothing  # a row of -inf has no softmax: it gets zeros below
        if need_weights:
            scores = (query if scale == 1 else scale * query) @ key.transpose(1, 2)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            if nothing is not None:
                weights = weights.masked_fill(nothing, 0)
            return F.dropout(weights, dropout) @ value, weights
        context = F.scaled_dot_product_attention(
            query.unsqueeze(1),  # one head: torch's fused kernels want the dimension
            key.unsqueeze(1),
            value.unsqueeze(1),
            attn_mask=None if allowed is None else allowed.unsqueeze(1),
            dropout_p=dropout,
            scale=scale,
        ).squeeze(1)
        return context if nothing is None else context.masked_fill(nothing, 0), None


class DecoderState(NamedTuple):
    """What an ``AttentionDecoder`` carries from step to step."""

    hx: Hidden  # (num_layers, B, H): h, or (h, c)
    context: Tensor  # (B, memory_size) of the last step; zeros before the first
    key: Tensor  # (B, S, A) projected memory
    weights: Tensor  # (B, S) of the last step; zeros before the first
    coverage: Tensor | None  # (B, S) sum of the weights of all steps, with coverage only
    lengths: Tensor | None  # (B,) int64 keys per row

    def select(self, rows: Tensor) -> DecoderState:
        """The state of batch rows ``rows`` (N,) int64, in that order, repeated or left out."""
        h = self.hx
        return DecoderState(
            h.index_select(1, rows)
            if isinstance(h, Tensor)
            else (h[0].index_select(1, rows), h[1].index_select(1, rows)),
            self.context.index_select(0, rows),
            self.key.index_select(0, rows),
            self.weights.index_select(0, rows),
            None if self.coverage is None else self.coverage.index_select(0, rows),
            None if self.lengths is None else self.lengths.index_select(0, rows),
        )


class AttentionDecoder(nn.Module):
    """A recurrent decoder that attends to a memory at every step; batch first.

    With x_t the input of step t, M the memory, context_0 = 0:

        h_t = RNN([x_t; context_{t-1}], h_{t-1})       without input feeding RNN(x_t, h_{t-1})
        context_t, weights_t = Attention(h_t, M)       the query is the top layer's h_t
        output_t = tanh(W_out [h_t; context_t])

    The order h_t, then context_t, then output_t and the last line are Luong et al. 2015 (arXiv
    1508.04025, section 3 and eq. 5, no bias); that the context enters the next step is Bahdanau et
    al. 2015 (arXiv 1409.0473, A.1.1), where Luong feeds output_t. Without input feeding, location
    or coverage nothing depends on the attention of earlier steps, so that all T steps are one call
    of the recurrent layers and one of the attention; else the attention goes step by step.

    Args:
        input_size: features of each step's input.
        hidden_size: features of h and of output.
        memory_size: features of the memory and of the context.
        cell: ``"lstm"`` or ``"gru"``.
        num_layers: recurrent layers stacked over each other; the first reads the context.
        attention: a ``score`` of ``Attention``, or ``"location"``: Chorowski et al. 2015
            (arXiv 1506.07503, eq. 8 and 9), additive with a term U f_t inside the tanh, where
            f_t = F * a_{t-1} is a convolution of the previous step's weights (a_0 = 0), centred,
            with zeros beyond the ends, and as torch's convolutions without turning the filter.
        coverage: adds w_c c_t inside the tanh, where c_t is the sum of the weights of all steps
            before t (See et al. 2017, arXiv 1704.04368, eq. 10 and 11); ``"additive"``,
            ``"concat"`` and ``"location"`` only.
        input_feeding: whether the recurrent layers read the previous context.
        attention_size: width A of the score for ``"additive"``, ``"concat"`` and ``"location"``;
            None for hidden_size.
        location_filters, location_kernel: number and odd width of the filters of ``"location"``;
            others do not read them.
        dropout: probability of zeroing an element, in training, between recurrent layers (as
            torch.nn) and of output.

    Submodules ``rnn`` (a fused LSTM or GRU, batch_first), ``attention`` and ``output`` (nn.Linear
    without bias, (hidden_size, hidden_size + memory_size), h's columns first); parameters
    ``location_filter`` (location_filters, location_kernel), ``location_weight`` (A,
    location_filters), ``coverage_weight`` (A), uniform within 1/sqrt(fan_in).

    Raises:
        ValueError: an option does not exist, or does not go with another.
    """

    location_filter: Tensor
    location_weight: Tensor
    coverage_weight: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        attention: str = "additive",
        coverage: bool = False,
        input_feeding: bool = True,
        attention_size: int | None = None,
        location_filters: int = 32,
        location_kernel: int = 31,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _expect_option("cell", cell, ("lstm", "gru"))
        _expect_option("attention", attention, (*SCORES, "location"))
        _expect_probability("dropout", dropout)
        location = attention == "location"
        score = "additive" if location else attention
        if coverage and score not in _WITH_TANH:
            raise ValueError(
                f"coverage needs attention 'additive', 'concat' or 'location', got '{attention}'"
            )
        if attention_size is not None and score not in _WITH_TANH:
            raise ValueError(f"attention_size: attention '{attention}' has none, expected None")
        if score in ("dot", "scaled_dot") and hidden_size != memory_size:
            raise ValueError(
                f"attention '{attention}' needs hidden_size equal to memory_size, got "
                f"{hidden_size} and {memory_size}"
            )
        if location and location_filters <= 0:
            raise ValueError(f"location_filters must be greater than zero, got {location_filters}")
        if location and (location_kernel <= 0 or location_kernel % 2 == 0):
            raise ValueError(f"location_kernel must be odd and positive, got {location_kernel}")
        if input_size <= 0:
            raise ValueError(f"input_size must be greater than zero, got {input_size}")
        if memory_size <= 0:
            raise ValueError(f"memory_size must be greater than zero, got {memory_size}")

        self.input_size = input_size
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.cell = cell
        self.num_layers = num_layers
        self.location = location
        self.coverage = coverage
        self.input_feeding = input_feeding
        self.dropout = dropout
        self.rnn: LSTM | GRU = (LSTM if cell == "lstm" else GRU)(
            input_size + memory_size if input_feeding else input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            device=device,
            dtype=dtype,
        )
        self.attention = Attention(
            hidden_size,
            memory_size,
            hidden_size=attention_size,
            score=score,
            device=device,
            dtype=dtype,
        )
        self.output = nn.Linear(
            hidden_size + memory_size, hidden_size, bias=False, device=device, dtype=dtype
        )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        A = self.attention.hidden_size
        if location:
            self.location_filter = parameter(location_filters, location_kernel)
            self.location_weight = parameter(A, location_filters)
        if coverage:
            self.coverage_weight = parameter(A)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.rnn.reset_parameters()
        self.attention.reset_parameters()
        self.output.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 1
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def extra_repr(self) -> str:
        attention = "location" if self.location else self.attention.score
        parts = [
            f"{self.input_size}, {self.hidden_size}, {self.memory_size}",
            f"cell='{self.cell}'",
            f"attention='{attention}'",
        ]
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        if self.coverage:
            parts.append("coverage=True")
        if not self.input_feeding:
            parts.append("input_feeding=False")
        if self.location:
            filters, kernel = self.location_filter.shape
            parts.append(f"location_filters={filters}, location_kernel={kernel}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Hidden]:
        """Runs all steps of known inputs (teacher forcing).

        Args:
            inputs: (B, T, input_size), T above zero.
            memory: (B, S, memory_size).
            hx: initial h (num_layers, B, hidden_size), for ``"lstm"`` a pair (h, c), or None for
                zeros.
            lengths: (B,) integers in 0..S, on any device: row b of memory has lengths[b] keys.

        Returns:
            outputs (B, T, hidden_size), contexts (B, T, memory_size), weights (B, T, S) and the
            final hx. Rows of length zero have zero contexts and weights.

        Raises:
            RuntimeError: a shape, dtype, device or length does not fit; the message names it.
            TypeError: an argument is not a tensor.
        """
        _expect_tensor("memory", memory)
        _expect_shape(
            "inputs", inputs, (memory.shape[0], None, self.input_size), ("B", "T", "input_size")
        )
        T = inputs.shape[1]
        if T == 0:
            raise RuntimeError("Expected inputs of more than 0 timesteps")
        memory, lengths = self._check_memory(memory, lengths)
        memory = memory.contiguous()  # once, and not at every step
        state = self._first_state(memory, hx, lengths)
        _expect_like("inputs", inputs, memory)
        hidden: Tensor | None = None
        query: Tensor | None = None
        if not self.input_feeding:
            hidden, final = self.rnn(inputs, state.hx)
            query = self.attention._project_query(hidden)
            if not self.location and not self.coverage:
                contexts, weights = self.attention._attend(query, state.key, memory, state.lengths)
                assert weights is not None
                return self._output(hidden, contexts), contexts, weights, final
            state = state._replace(hx=final)
        hiddens: list[Tensor] = []
        attended: list[Tensor] = []
        weighted: list[Tensor] = []
        for t in range(T):
            if query is None:
                step_hidden, state = self._recur(inputs[:, t], state)
                hiddens.append(step_hidden)
                state = self._attend(self.attention._project_query(step_hidden), state, memory)
            else:
                state = self._attend(query[:, t : t + 1], state, memory)
            attended.append(state.context)
            weighted.append(state.weights)
        contexts, weights = torch.stack(attended, dim=1), torch.stack(weighted, dim=1)
        hidden = torch.cat(hiddens, dim=1) if hidden is None else hidden
        return self._output(hidden, contexts), contexts, weights, state.hx

    def init_state(
        self, memory: Tensor, hx: Hidden | None = None, *, lengths: Tensor | None = None
    ) -> DecoderState:
        """The state before the first step.

        Args:
            memory, hx, lengths: as in ``forward``.

        Raises:
            RuntimeError: memory or lengths do not fit.
        """
        memory, lengths = self._check_memory(memory, lengths)
        return self._first_state(memory, hx, lengths)

    def _check_memory(self, memory: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Memory with zeros for what lengths exclude, and lengths as int64."""
        _expect_shape("memory", memory, (None, None, self.memory_size), ("B", "S", "memory_size"))
        _expect_like("memory", memory, self.output.weight)
        S = memory.shape[1]
        lengths = check_lengths(lengths, memory, memory.shape[0], S)
        return _met_by_any(memory, _allowed(lengths, None, S)), lengths

    def _first_state(
        self, memory: Tensor, hx: Hidden | None, lengths: Tensor | None
    ) -> DecoderState:
        B, S, _ = memory.shape
        if hx is None:
            zeros = memory.new_zeros((self.num_layers, B, self.hidden_size))
            hx = (zeros, zeros) if self.cell == "lstm" else zeros
        weights = memory.new_zeros((B, S))
        return DecoderState(
            hx=hx,
            context=memory.new_zeros((B, self.memory_size)),
            key=self.attention.project_memory(memory),
            weights=weights,
            coverage=weights if self.coverage else None,
            lengths=lengths,
        )

    def step(
        self,
        input: Tensor,
        state: DecoderState,
        memory: Tensor,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """One step, for generation; T of them are what ``forward`` is on T inputs.

        Args:
            input: (B, input_size).
            state: of ``init_state`` or of the step before.
            memory: (B, S, memory_size), the one ``state`` was made of. One that is not contiguous
                is copied by every step.
            lengths: (B,), or None for those given to ``init_state``.

        Returns:
            output (B, hidden_size) and the new state, whose ``context`` and ``weights``
            are this step's.

        Raises:
            RuntimeError: a shape, dtype, device or length does not fit; the message names it.
        """
        B, S, _ = state.key.shape
        expect_tensor("memory", memory, (B, S, self.memory_size), state.key)
        expect_tensor("input", input, (B, self.input_size), memory)
        _expect_like("memory", memory, self.output.weight)
        _expect_like("input", input, memory)
        fused = self.attention.score in _WITH_TANH
        given = lengths is not None and lengths is not state.lengths
        if given:
            state = state._replace(lengths=check_lengths(lengths, memory, memory.shape[0], S))
        # Keys projected before may be of what these lengths exclude. The fused scores leave those
        # out, but the gradients of the projection do not.
        anew = given and (not fused or torch.is_grad_enabled())
        if anew or not fused:
            memory = _met_by_any(memory, _allowed(state.lengths, None, S))
        if anew:
            state = state._replace(key=self.attention.project_memory(memory))
        hidden, state = self._recur(input, state)
        state = self._attend(self.attention._project_query(hidden), state, memory)
        return self._output(hidden.squeeze(1), state.context), state

    def _recur(self, input: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """The recurrent layers of one step: the top layer's h (B, 1, H)."""
        if self.input_feeding:
            input = torch.cat([input, state.context], dim=-1)
        hidden, hx = self.rnn(input.unsqueeze(1), state.hx)
        return hidden, state._replace(hx=hx)

    def _attend(self, query: Tensor, state: DecoderState, memory: Tensor) -> DecoderState:
        """The attention of one step, for a projected query (B, 1, A)."""
        key = state.key
        if self.location and key.shape[1]:
            width = self.location_filter.shape[1]
            windows = F.pad(state.weights, (width // 2, width // 2)).unfold(1, width, 1)
            key = key + F.linear(F.linear(windows, self.location_filter), self.location_weight)
        if state.coverage is not None:
            key = key + state.coverage.unsqueeze(-1) * self.coverage_weight
        context, weights = self.attention._attend(query, key, memory, state.lengths)
        assert weights is not None
        weights = weights.squeeze(1)
        coverage = None if state.coverage is None else state.coverage + weights
        return state._replace(context=context.squeeze(1), weights=weights, coverage=coverage)

    def _output(self, hidden: Tensor, context: Tensor) -> Tensor:
        output = torch.tanh(self.output(torch.cat([hidden, context], dim=-1)))
        return F.dropout(output, self.dropout, self.training)


def coverage_loss(weights: Tensor, lengths: Tensor | None = None) -> Tensor:
    """How much steps attend again to what earlier steps attended to (See et al. 2017, eq. 12).

    covloss_t = sum_i min(a_ti, c_ti), c_t the sum of the weights before step t (arXiv 1704.04368).

    Args:
        weights: (B, T, S), as ``AttentionDecoder`` returns them: zero beyond a memory's end.
        lengths: (B,) integers in 0..T, the decoder steps that count in each row; None for all.

    Returns:
        A scalar, the mean over each row's steps (as that paper's eq. 6; zero for a row without),
        then over rows.

    Raises:
        RuntimeError: a shape or length does not fit; the message names it.
    """
    _expect_shape("weights", weights, (None, None, None), ("B", "T", "S"))
    T = weights.shape[1]
    lengths = check_lengths(lengths, weights, weights.shape[0], T)
    before = F.pad(weights.cumsum(dim=1), (0, 0, 1, 0))[:, :T]
    losses = torch.minimum(weights, before).sum(dim=-1)
    if lengths is None:
        return losses.mean()
    beyond = torch.arange(T, device=weights.device) >= lengths.unsqueeze(1)
    each = losses.masked_fill(beyond, 0).sum(dim=1) / lengths.clamp(min=1)
    return each.mean()


Embed = Callable[[Tensor], Tensor]  # (N,) int64 tokens -> (N, input_size)
Readout = Callable[[Tensor], Tensor]  # (N, hidden_size) outputs -> (N, V) logits


@torch.no_grad()
def greedy_decode(
    decoder: AttentionDecoder,
    embed: Embed,
    readout: Readout,
    memory: Tensor,
    *,
    bos: int,
    eos: int,
    max_length: int,
    hx: Hidden | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generates the likeliest token at every step, the lowest of equally likely ones.

    Nothing is recorded for gradients, and modules run in the mode they are in: ``eval()`` them.
    After every step the host waits to know whether every row has ended.

    Args:
        decoder: the decoder.
        embed: (B,) int64 tokens -> (B, input_size), the decoder's next input.
        readout: (B, hidden_size) output -> (B, V) logits.
        memory, hx, lengths: as ``AttentionDecoder.forward``.
        bos: the token that stands before the first.
        eos: the token that ends a row.
        max_length: tokens to generate at most.

    Returns:
        tokens (B, L) int64, L <= max_length, without bos, with eos and filled up with it; weights
        (B, L, S), zero for steps after a row's end.

    Raises:
        ValueError: max_length is below 1.
        RuntimeError: as ``AttentionDecoder.init_state`` and ``step``.
    """
    _expect_positive("max_length", max_length)
    state = decoder.init_state(memory, hx, lengths=lengths)
    memory = memory.contiguous()  # once, and not at every step
    B = memory.shape[0]
    token = torch.full((B,), bos, dtype=torch.int64, device=memory.device)
    ended = torch.zeros_like(token, dtype=torch.bool)
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    for _ in range(max_length):
        output, state = decoder.step(embed(token), state, memory)
        token = readout(output).argmax(dim=-1).masked_fill(ended, eos)
        tokens.append(token)
        weights.append(state.weights.masked_fill(ended.unsqueeze(1), 0))
        ended = ended | (token == eos)
        if bool(ended.all()):
            break
    return torch.stack(tokens, dim=1), torch.stack(weights, dim=1)


class Hypothesis(NamedTuple):
    """One result of ``beam_search``."""

    tokens: Tensor  # (L,) int64, without bos, with eos where it ended
    score: float  # log probability, divided by the length penalty
    weights: Tensor  # (L, S)


@torch.no_grad()
def beam_search(
    decoder: AttentionDecoder,
    embed: Embed,
    readout: Readout,
    memory: Tensor,
    *,
    bos: int,
    eos: int,
    max_length: int,
    hx: Hidden | None = None,
    lengths: Tensor | None = None,
    beam: int = 4,
    length_penalty: float = 0.0,
) -> list[list[Hypothesis]]:
    """Generates likely sequences, keeping the ``beam`` best of each row after every step.

    A hypothesis that has ended keeps its place, and its score, until better ones push it out; the
    search of a row ends when all its places have ended. Candidates are ranked, then and at the
    end, by log probability / ((5 + length) / 6) ** length_penalty, eos counted in length (Wu et al.
    2016, arXiv 1609.08144, eq. 14 without coverage). Equal ones rank by the place of the hypothesis
    they continue, then by token.

    Args:
        decoder, embed, readout, memory, bos, eos, max_length, hx, lengths: as ``greedy_decode``,
            which a beam of 1 equals; embed and readout are called on B * beam rows.
        beam: hypotheses kept per row.
        length_penalty: exponent; 0 ranks by log probability alone, above favours longer ones.

    Returns:
        For each of the B rows its hypotheses, best first, ``beam`` of them, or fewer where there
        are no more of probability above zero. Those without eos were cut off at max_length.

    Raises:
        ValueError: max_length or beam is below 1.
        RuntimeError: as ``AttentionDecoder.init_state`` and ``step``.
    """
    _expect_positive("max_length", max_length)
    _expect_positive("beam", beam)
    state = decoder.init_state(memory, hx, lengths=lengths)
    B, S, _ = memory.shape
    device = memory.device
    rows = torch.arange(B, device=device).repeat_interleave(beam)
    state, memory = state.select(rows), memory.index_select(0, rows)
    first = rows[::beam].unsqueeze(1) * beam  # (B, 1): where each row's places begin
    token = torch.full((B, beam), bos, dtype=torch.int64, device=device)
    length = torch.zeros_like(token)
    ended = torch.zeros_like(token, dtype=torch.bool)
    score: Tensor | None = None
    history: list[tuple[Tensor, Tensor, Tensor]] = []  # parent, token (B, beam); weights of parent
    ranked = torch.zeros(0)
    for _ in range(max_length):
        output, state = decoder.step(embed(token.flatten()), state, memory)
        logits = readout(output)
        V = logits.shape[-1]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        more = torch.log_softmax(logits, dim=-1, dtype=dtype).view(B, beam, V)
        if score is None:  # the places are all alike: only the first may continue
            score = more.new_full((B, beam), -torch.inf)
            score[:, 0] = 0
        stay = more.new_full((V,), -torch.inf)
        stay[eos] = 0
        candidates = score.unsqueeze(-1) + torch.where(ended.unsqueeze(-1), stay, more)
        length = length + ~ended
        penalty = ((5 + length).to(dtype) / 6) ** length_penalty
        ranked, chosen = _largest((candidates / penalty.unsqueeze(-1)).view(B, -1), beam)
        parent, token = chosen // V, chosen % V
        score = candidates.view(B, -1).gather(1, chosen)
        score = score.masked_fill(ranked == -torch.inf, -torch.inf)
        length = length.gather(1, parent)
        ended = ended.gather(1, parent) | (token == eos)
        history.append((parent, token, state.weights.view(B, beam, S)))
        if bool((ended | (score == -torch.inf)).all()):
            break
        # Keys and lengths are the same in all places of a row.
        moved = state.select((first + parent).flatten())
        state = moved._replace(key=state.key, lengths=state.lengths)
    return _hypotheses(history, ranked, length)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row and where they are; the lower index first among equals.

    Unlike torch.topk, which leaves open which of equal values it takes. Where a row runs out of
    values above -inf, the rest is -inf at any index.
    """
    values = values.clone()
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        index = values.argmax(dim=1, keepdim=True)  # the first of equals
        found.append((values.gather(1, index), index))
        values.scatter_(1, index, -torch.inf)
    largest, indices = zip(*found, strict=True)
    return torch.cat(largest, dim=1), torch.cat(indices, dim=1)


def _hypotheses(
    history: list[tuple[Tensor, Tensor, Tensor]], scores: Tensor, length: Tensor
) -> list[list[Hypothesis]]:
    """Follows every place of a beam search back to its beginning."""
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    for parent, token, parent_weights in reversed(history):
        tokens.append(token.gather(1, place))
        place = parent.gather(1, place)
        weights.append(parent_weights.gather(1, place.unsqueeze(-1).expand_as(parent_weights)))
    all_tokens = torch.stack(tokens[::-1], dim=2)
    all_weights = torch.stack(weights[::-1], dim=2)
    lists = zip(scores.tolist(), length.tolist(), strict=True)
    return [
        [
            Hypothesis(all_tokens[b, k, :L], score, all_weights[b, k, :L])
            for k, (score, L) in enumerate(zip(*row, strict=True))
            if score > -math.inf
        ]
        for b, row in enumerate(lists)
    ]


def _allowed(lengths: Tensor | None, mask: Tensor | None, Tk: int) -> Tensor | None:
    """Where queries may attend, (B, 1 or Tq, Tk) bool; None for everywhere."""
    allowed = None
    if mask is not None:
        allowed = mask if mask.dim() == 3 else mask.unsqueeze(1)
    if lengths is not None:
        inside = torch.arange(Tk, device=lengths.device) < lengths.view(-1, 1, 1)
        allowed = inside if allowed is None else allowed & inside
    return allowed


def _met_by_any(keys: Tensor, allowed: Tensor | None) -> Tensor:
    """Keys or values (B, Tk, n) with zeros where no query may attend, if there are such."""
    if allowed is None:
        return keys
    return keys.masked_fill(~allowed.any(dim=1).unsqueeze(-1), 0)


def _met_in_pairs(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three such that what is not finite reaches those queries alone that may attend to it.

    These become NaN, as a product of theirs would. Keys and values that are not finite become
    zeros, which other queries may multiply by zero.
    """
    odd_key = ~key.isfinite().all(dim=-1)
    odd_value = ~value.isfinite().all(dim=-1)
    meets = (allowed & (odd_key | odd_value).unsqueeze(1)).any(dim=-1, keepdim=True)
    return (
        query.masked_fill(meets, torch.nan),
        key.masked_fill(odd_key.unsqueeze(-1), 0),
        value.masked_fill(odd_value.unsqueeze(-1), 0),
    )


def _expect_option(name: str, given: str, options: tuple[str, ...]) -> None:
    if given not in options:
        known = ", ".join(f"'{option}'" for option in options)
        raise ValueError(f"Unknown {name} '{given}'. Select from {known}.")


def _expect_probability(name: str, given: float) -> None:
    if isinstance(given, bool) or not 0 <= given < 1:
        raise ValueError(f"{name} should be a number in [0, 1), got {given}")


def _expect_positive(name: str, given: int) -> None:
    if given < 1:
        raise ValueError(f"{name} must be at least 1, got {given}")


def _expect_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} should be a tensor, got {type(given).__name__}")


def _expect_shape(
    name: str, given: Any, expected: tuple[int | None, ...], letters: tuple[str, ...]
) -> None:
    """Refuses what is not a tensor of this shape, None standing for any size."""
    _expect_tensor(name, given)
    fits = len(expected) == given.dim() and all(
        e is None or e == g for e, g in zip(expected, given.shape, strict=True)
    )
    if not fits:
        shape = ", ".join(
            letter if e is None else str(e) for e, letter in zip(expected, letters, strict=True)
        )
        raise RuntimeError(f"Expected {name} of shape ({shape}), got {tuple(given.shape)}")


def _expect_like(name: str, given: Tensor, like: Tensor) -> None:
    """Refuses another dtype, unless autocast casts, and another device."""
    if given.dtype != like.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"Expected {name} of dtype {like.dtype}, got {given.dtype}")
    if given.device != like.device:
        raise RuntimeError(f"Expected {name} on {like.device}, got {given.device}")


def _check_mask(mask: Tensor | None, like: Tensor, Tq: int | None, Tk: int) -> None:
    """Refuses a mask that does not fit ``like`` (B, ...); Tq of None stands for any number."""
    if mask is None:
        return
    _expect_tensor("mask", mask)
    B = like.shape[0]
    if Tq is None and mask.dim() == 3:
        Tq = mask.shape[1]
    if tuple(mask.shape) not in ((B, Tk), (B, Tq, Tk)):
        raise RuntimeError(
            f"Expected mask of shape {(B, Tk)} or ({B}, {'Tq' if Tq is None else Tq}, {Tk}), got "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise RuntimeError(f"Expected mask of dtype torch.bool, got {mask.dtype}")
    if mask.device != like.device:
        raise RuntimeError(f"Expected mask on {like.device}, got {mask.device}")
