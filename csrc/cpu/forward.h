// Forward of a whole layer, for any cell and storage type.
//
//   work = lanes, each a team                      teams never wait for each other
//   team = parts, each a row block or a share of unit panels
//
// The parts meet when they have packed the weights. Parts that are row blocks then go on by themselves;
// parts that share panels, the members of a block, meet after every phase (team.h).
//
// Time goes by in chunks of about chunk_rows rows of input. A chunk's rows are copied together
// (finished rows left out), multiplied by weight_ih, and then the recurrence runs over its timesteps:
// for every panel of units, for every tile of rows, one product (product.h) and the step around the
// cell (step.h) on its result. So input gates never leave the cache, and those that a member needs it
// makes itself, in the order in which it will read them:
//
//   input_gates[panel][row of the chunk][gate][unit of the panel]
//
// A cell with a late gate (cells/cell.h) has a second product in every step, as a projection is: the
// early gates' panels first, on h, then those of the late gate, on what the early ones left to read.
//
// State lives in row-major buffers; h alternates between two, since members read the whole of one
// while they write their part of the other. Rows are dealt to blocks by falling length, so that the
// rows still running at a timestep are the first ones of a block and finished rows cost nothing.
//
// Layer normalisation needs a row's gates of all units before its cells, and its new c of all units before
// its h. So there a timestep has more phases: the product, which is kept, the gates, and in a cell with c
// all that follows c. Every member works out the mean and deviation of whole rows for itself.
//
// Included inside the instruction set's namespace.

// Vectors of units per gate in a panel: enough that a panel is at least two vectors wide.
constexpr int vectors_per_gate(int gates) { return gates >= 2 ? 1 : 2; }

template <class Cell, class S>
class Forward {
  using C = Compute<S>;
  using V = Vector<C>;
  using E = Operand<S>;
  using Value = typename E::Value;
  // Gates whose product reads h. A late one, the last, has panels of its own.
  static constexpr int early_gates = Cell::gates - Cell::late_gate;
  static constexpr int per_gate = vectors_per_gate(early_gates);
  using GatePanels = Panels<E, Cell::gates, per_gate>;
  using HiddenPanels = Panels<E, early_gates, per_gate>;  // of the same units as those
  using PlainPanels = Panels<E, 1, 2>;
  static constexpr int row_size = GatePanels::W * V::size;  // of a tile
  static constexpr int64_t chunk_rows = 256;

 public:
  Forward(const LayerForwardParams& p, const Host& host)
      : p(p),
        host(host),
        x_width(row_width<E>(p.I)),
        h_width(row_width<E>(p.P)),
        m_width(row_width<E>(p.H)),
        c_width(round_up(p.H, V::size)),
        norm(is_varied<Cell> ? p.variation.layer_norm : LayerNorm::none),
        packed(p.T * p.B > 3),
        input_panels({p.H, p.I, p.H * p.I, p.I, 1}),
        hidden_panels({p.H, p.P, p.H * p.P, p.P, 1}),
        projection_panels({p.P, p.H, 0, p.H, 1}, p.projected),
        late_panels({p.H, p.P, 0, p.P, 1}, Cell::late_gate),
        division(p, Cell::gates * p.H * (p.P + p.I), hidden_panels.count, sizeof(Value),
                 host.threads),
        order(p, division.blocks),
        chunks(p, order, chunk_rows),
        varied(p, p.L * division.blocks * division.members, order.end(0)) {
    take_all(host, *this);
  }

  void run() {
    const int64_t parts = division.blocks * division.members;
    const int64_t phases = chunks.count * phases_per_chunk();
    run_teams(host, p.L, parts, division.parallel, 1 + (division.members > 1 ? phases : 1),
              [&](int64_t lane, int64_t index, int64_t i) {
                const Part part{lane, index / division.members, index % division.members,
                                lane * division.blocks + index / division.members};
                if (i == 0) {
                  pack(lane, index, parts);
                  load_initial(part);
                } else if (division.members > 1) {
                  run_phase(part, i - 1);
                } else {
                  for (int64_t phase = 0; phase < phases; ++phase) run_phase(part, phase);
                }
              });
  }

  void take_memory(Arena& arena) {
    const bool with_bias = p.weights[0].bias_ih && norm != LayerNorm::separate;
    if (packed) {
      input_panels.take_memory(arena, p.L, with_bias);
      hidden_panels.take_memory(arena, p.L, with_bias);
      late_panels.take_memory(arena, p.L, with_bias);
    }
    projection_panels.take_memory(arena, p.L);
    const int64_t teams = p.L * division.blocks;
    input_rows = arena.take<Value>(teams * chunks.capacity * x_width);
    input_gates = arena.take<C>(teams * chunks.capacity * input_panels.count * row_size);
    h_state[0] = arena.take<Value>(order.places(p.L, h_width));
    h_state[1] = arena.take<Value>(order.places(p.L, h_width));
    if (Cell::has_c) c_state = arena.take<C>(order.places(p.L, c_width));
    if (p.projected || Cell::late_gate) m_state = arena.take<Value>(order.places(p.L, m_width));
    if (Cell::late_gate) early_state = arena.take<C>(order.places(p.L, early_gates * c_width));
    if (is_varied<Cell>) varied.take_memory(arena);
    if (norm != LayerNorm::none) {
      hidden_gates = arena.take<C>(teams * order.end(0) * input_panels.count * row_size);
      if (Cell::has_c) new_c = arena.take<C>(2 * order.places(p.L, c_width));
      normal_gates = arena.take<C>(teams * division.members * 2 * Cell::gates * c_width);
    }
  }

 private:
  struct Part {
    int64_t lane, block, member, team;
  };

  int64_t norm_phases() const { return norm == LayerNorm::none ? 0 : 1 + Cell::has_c; }
  int64_t phases_per_step() const { return 1 + norm_phases() + (p.projected || Cell::late_gate); }
  int64_t phases_per_chunk() const { return 1 + chunks.steps * phases_per_step(); }

  Value* h_row(int64_t buffer, int64_t lane, int64_t i) const {
    return h_state[buffer & 1] + order.place(lane, i, h_width);
  }
  C* c_row(int64_t lane, int64_t i) const { return c_state + order.place(lane, i, c_width); }
  Value* m_row(int64_t lane, int64_t i) const { return m_state + order.place(lane, i, m_width); }
  C* early_row(int64_t lane, int64_t i) const {
    return early_state + order.place(lane, i, early_gates * c_width);
  }
  Value* input_row(const Part& part, int64_t row) const {
    return input_rows + (part.team * chunks.capacity + row) * x_width;
  }
  C* gates_of_panel(const Part& part, int64_t panel) const {
    return input_gates + (part.team * input_panels.count + panel) * chunks.capacity * row_size;
  }

  static const S* as_s(const void* data) { return static_cast<const S*>(data); }

  // Of a weight or bias of G*H rows of n, those of the late gate.
  const S* late_rows(const void* data, int64_t n) const {
    return data ? as_s(data) + early_gates * p.H * n : nullptr;
  }

  // Of each, a part packs its share: members the panels that they will multiply with.
  void pack(int64_t lane, int64_t part, int64_t parts) {
    const auto& w = p.weights[lane];
    if (packed) {
      input_panels.pack_share(lane, part, parts, as_s(w.weight_ih), as_s(w.bias_ih));
      hidden_panels.pack_share(lane, part, parts, as_s(w.weight_hh), as_s(w.bias_hh));
      late_panels.pack_share(lane, part, parts, late_rows(w.weight_hh, p.P),
                             late_rows(w.bias_hh, 1));
    }
    projection_panels.pack_share(lane, part, parts, as_s(w.weight_hr));
  }

  void run_phase(const Part& part, int64_t number) {
    const int64_t chunk = number / phases_per_chunk();
    const int64_t phase = number % phases_per_chunk() - 1;
    if (phase < 0) return gather(part, chunk);
    const int64_t step = chunk * chunks.steps + phase / phases_per_step();
    if (step >= p.T) return;
    if (phase == 0) multiply_input(part, chunk);
    switch (phase % phases_per_step()) {
      case 0:
        return cell_phase(part, chunk, step);
      case 1:
        if constexpr (is_varied<Cell> && !Cell::late_gate)
          if (norm != LayerNorm::none) return gates_phase(part, chunk, step);
        if constexpr (Cell::late_gate) return late_phase(part, chunk, step);
        if constexpr (Cell::has_c) return projection_phase(part, step);
        return;
      case 2:
        if constexpr (is_varied<Cell> && Cell::has_c)
          if (norm != LayerNorm::none) return hidden_phase(part, step);
        [[fallthrough]];
      default:
        if constexpr (Cell::has_c) return projection_phase(part, step);
    }
  }

  // Every member loads a share of the rows, whole.
  void load_initial(const Part& part) {
    const int64_t lane = part.lane;
    const int64_t begin = order.begin(part.block), end = order.end(part.block);
    for (int64_t i = begin + part.member; i < end; i += division.members) {
      const int64_t b = order.row(i);
      // In both buffers: a row of a reverse lane may begin at any step.
      memset(h_row(0, lane, i), 0, h_width * sizeof(Value));
      memset(h_row(1, lane, i), 0, h_width * sizeof(Value));
      if (m_state) memset(m_row(lane, i), 0, m_width * sizeof(Value));
      if constexpr (is_varied<Cell>) varied.draw_keep(lane, b);
      for (int64_t unit = 0; unit < p.P; unit += V::size) {
        const int64_t n = p.P - unit;
        V h = initial_state<S, V>(p, p.hx, p.h_n, p.P, lane, b, unit, n);
        if constexpr (is_varied<Cell>) h = h * varied.keep(lane, b, unit);
        Memory<V>::store(h, h_row(0, lane, i) + unit, n);
        Memory<V>::store(h, h_row(1, lane, i) + unit, n);
      }
      if constexpr (Cell::has_c)
        for (int64_t unit = 0; unit < p.H; unit += V::size)
          initial_state<S, V>(p, p.cx, p.c_n, p.H, lane, b, unit, p.H - unit)
              .store(c_row(lane, i) + unit);
    }
  }

  // Every member copies a share of the chunk's rows of input.
  void gather(const Part& part, int64_t chunk) {
    const auto times = chunks.times(is_reverse(p, part.lane), chunk);
    for (int64_t t = times.begin; t < times.end; ++t)
      for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
        const int64_t row = chunks.row(part.block, times, t, i);
        if (row % division.members != part.member) continue;
        const S* from = p.input.at<S>(t, order.row(i), part.lane);
        Value* to = input_row(part, row);
        for (int64_t j = 0; j < x_width; j += V::size)
          Memory<V>::store(j < p.I ? Memory<V>::load(from + j, p.I - j) : V(0), to + j, V::size);
      }
  }

  // Rows times this member's share of the panels, packed or not; out and each as in Panels.
  template <class WeightPanels, class Each>
  HOST_DEVICE void multiply(const WeightPanels& panels, const void* weights, const void* bias,
                            const Part& part, bool backwards, const Rows<E>& rows, C* out,
                            int64_t out_stride, const Each& each) {
    const Share share(panels.count, part.member, division.members);
    if (packed)
      return panels.multiply(part.lane, share, backwards, rows, panels.k, out, out_stride, each);
    alignas(64) C buffer[row_size];
    for (int64_t i = share.begin; i < share.end; ++i)
      for (int64_t r = 0; r < rows.count; ++r) {
        C* tile = out ? out + i * out_stride + r * row_size : buffer;
        panels.multiply_unpacked(i, as_s(weights),
                                 norm == LayerNorm::separate ? nullptr : as_s(bias),
                                 rows.values + r * rows.stride * E::depth, tile);
        each(i, r, 1, tile);
      }
  }

  void multiply_input(const Part& part, int64_t chunk) {
    const auto times = chunks.times(is_reverse(p, part.lane), chunk);
    const auto& w = p.weights[part.lane];
    multiply(input_panels, w.weight_ih, w.bias_ih, part, false,
             {input_row(part, 0), x_width / E::depth, chunks.rows(part.block, times)},
             gates_of_panel(part, 0), chunks.capacity * row_size,
             [](int64_t, int64_t, int, const C*) {});
  }

  void cell_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, step);
    const auto times = chunks.times(is_reverse(p, lane), chunk);
    const int64_t begin = order.begin(part.block);
    const int64_t chunk_row = chunks.row(part.block, times, t, begin);
    const auto& w = p.weights[lane];
    const int64_t rows = order.active_end(part.block, t) - begin;
    // There and back again, so that the panels used last are still in the cache.
    const auto product = [&](C* out, const auto& each) {
      multiply(hidden_panels, w.weight_hh, w.bias_hh, part, step & 1,
               {h_row(step, lane, begin), h_width / E::depth, rows}, out, hidden_stride(), each);
    };
    if constexpr (is_varied<Cell>) {
      if (norm != LayerNorm::none)
        return product(hidden_of_panel(part, 0), [](int64_t, int64_t, int, const C*) {});
      if (!Cell::late_gate) draw_zones(part, t, units_of_panels(part), !p.projected);
    }
    const Share panels(hidden_panels.count, part.member, division.members);
    product(nullptr, [&](int64_t i, int64_t first, int height, const C* tile) {
      const C* inputs = gates_of_panel(part, i) + (chunk_row + first) * row_size;
      const int64_t next = step & 1 ? i - 1 : i + 1;
      for (int r = 0; r < height; ++r) {
        const int64_t at = begin + first + r;
        if (next >= panels.begin && next < panels.end) prefetch_output(t, at, lane, next);
        cell_row(part, row_step(p, lane, order.row(at), t), at, step, i * GatePanels::units_each,
                 inputs + r * row_size, tile + r * HiddenPanels::W * V::size);
      }
    });
  }

  // Where the next panel's units of h will go: what is stored to memory that is far away fills the store
  // queue, and the cells wait. Not beside rows of other threads, which lose their lines to what the
  // hardware then fetches as well.
  HOST_DEVICE void prefetch_output(int64_t t, int64_t i, int64_t lane, int64_t panel) const {
    if (division.blocks > 1 || p.projected) return;
    const S* row = p.output.at<S>(t, order.row(i), lane) + panel * GatePanels::units_each;
    for (int v = 0; v < per_gate; ++v) __builtin_prefetch(row + v * V::size, 1);
  }

  HOST_DEVICE void cell_row(const Part& part, const RowStep& row, int64_t i, int64_t step,
                            int64_t first_unit, const C* inputs, const C* tile) {
    for (int v = 0; v < per_gate; ++v) {
      const int64_t unit = first_unit + v * V::size;
      if (unit >= p.H) break;
      V from_input[Cell::gates], from_hidden[Cell::gates];
      for (int g = 0; g < early_gates; ++g) {
        from_input[g] = V::load(inputs + (g * per_gate + v) * V::size);
        from_hidden[g] = V::load(tile + (g * per_gate + v) * V::size);
      }
      cell_units(part, row, i, step, unit, from_input, from_hidden);
    }
  }

  HOST_DEVICE void cell_units(const Part& part, const RowStep& row, int64_t i, int64_t step,
                              int64_t unit, const V* from_input, const V* from_hidden) {
    Factors<V> factors;
    if constexpr (is_varied<Cell> && !Cell::late_gate)
      factors = factors_of(part, row, i, unit, !p.projected, Cell::has_c);
    if constexpr (Cell::late_gate)
      forward_early_units<Cell, S>(p.H - unit, from_input, from_hidden,
                                   h_row(step, row.lane, i) + unit, early_row(row.lane, i) + unit,
                                   c_width, m_row(row.lane, i) + unit);
    else
      forward_units<Cell, S>(p, row, unit, p.H - unit, from_input, from_hidden,
                             p.weights[row.lane].weight_ch, h_row(step, row.lane, i) + unit,
                             Cell::has_c ? c_row(row.lane, i) + unit : nullptr,
                             next_row(step, row.lane, i) + unit, factors);
  }

  // Where a cell leaves its h.
  Value* next_row(int64_t step, int64_t lane, int64_t i) const {
    return p.projected ? m_row(lane, i) : h_row(step + 1, lane, i);
  }

  // The late gate, and with it the rest of the cell. Its panels and those of the input gates are not
  // shared out alike; what another member made of the latter was there before this phase.
  void late_phase(const Part& part, int64_t chunk, int64_t step) {
    constexpr int g = early_gates;  // the late one
    const int64_t lane = part.lane, t = time_of_step(p, lane, step);
    const auto times = chunks.times(is_reverse(p, lane), chunk);
    const int64_t begin = order.begin(part.block);
    const int64_t chunk_row = chunks.row(part.block, times, t, begin);
    const auto& w = p.weights[lane];
    if constexpr (is_varied<Cell>) {
      const Share panels(late_panels.count, part.member, division.members);
      draw_zones(part, t,
                 {panels.begin * PlainPanels::units_each, panels.end * PlainPanels::units_each},
                 true);
    }
    const auto late_unit = [&](int64_t r, int64_t unit, const C* from_product) {
      const int64_t vector = unit / V::size, i = begin + r;
      const C* inputs = gates_of_panel(part, vector / per_gate) + (chunk_row + r) * row_size;
      V from_input[Cell::gates], from_hidden[Cell::gates];
      from_input[g] = V::load(inputs + (g * per_gate + vector % per_gate) * V::size);
      from_hidden[g] = V::load(from_product);
      const RowStep row = row_step(p, lane, order.row(i), t);
      Factors<V> factors;
      if constexpr (is_varied<Cell>) factors = factors_of(part, row, i, unit, true, false);
      forward_units<Cell, S>(p, row, unit, p.H - unit, from_input, from_hidden, w.weight_ch,
                             h_row(step, lane, i) + unit, nullptr, h_row(step + 1, lane, i) + unit,
                             factors, early_row(lane, i) + unit, c_width);
    };
    multiply(late_panels, late_rows(w.weight_hh, p.P), late_rows(w.bias_hh, 1), part, step & 1,
             {m_row(lane, begin), m_width / E::depth, order.active_end(part.block, t) - begin},
             nullptr, 0, [&](int64_t i, int64_t first, int height, const C* tile) {
               for (int r = 0; r < height; ++r)
                 for (int v = 0; v < PlainPanels::W; ++v, tile += V::size) {
                   const int64_t unit = i * PlainPanels::units_each + v * V::size;
                   if (unit < p.H) late_unit(first + r, unit, tile);
                 }
             });
  }

  // ---- around a Varied cell

  HOST_DEVICE Factors<V> factors_of(const Part& part, const RowStep& row, int64_t i, int64_t unit,
                                    bool of_h, bool of_c) const {
    return varied.factors(part.team * division.members + part.member, row.lane, row.b,
                          i - order.begin(part.block), unit, of_h, of_c);
  }

  // Units of this member's share of the gates' panels.
  Share units_of_panels(const Part& part) const {
    const Share panels(hidden_panels.count, part.member, division.members);
    return {panels.begin * GatePanels::units_each, panels.end * GatePanels::units_each};
  }

  void draw_zones(const Part& part, int64_t t, const Share& units, bool of_h) {
    const int64_t index = part.team * division.members + part.member;
    for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
      const int64_t at = i - order.begin(part.block), b = order.row(i);
      if (of_h) varied.draw_zone_h(index, part.lane, b, t, at, units);
      if (Cell::has_c) varied.draw_zone_c(index, part.lane, b, t, at, units);
    }
  }

  int64_t hidden_stride() const { return order.end(0) * row_size; }
  C* hidden_of_panel(const Part& part, int64_t panel) const {
    return hidden_gates + (part.team * input_panels.count + panel) * hidden_stride();
  }
  // c~, and the last value that its half of the cell saves.
  C* new_c_row(int which, int64_t lane, int64_t i) const {
    return new_c + which * order.places(p.L, c_width) + order.place(lane, i, c_width);
  }

  // A row's gates of all units, as a product leaves them.
  static GateRow<const C> gates_of_row(const C* data, int64_t panel_stride) {
    return {data, log_of(GatePanels::units_each), panel_stride, GatePanels::units_each};
  }

  // The cells of rows whose products are there.
  void gates_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, step);
    const auto times = chunks.times(is_reverse(p, lane), chunk);
    const int64_t begin = order.begin(part.block), end = order.active_end(part.block, t);
    const int64_t chunk_row = chunks.row(part.block, times, t, begin);
    const bool joint = norm == LayerNorm::joint;
    const auto& w = p.weights[lane];
    const Share units = units_of_panels(part);
    const SavedValues places = saved_values<Cell>(p);
    constexpr int gates = Cell::gates;
    C* const seen =
        normal_gates + (part.team * division.members + part.member) * 2 * gates * c_width;
    const GateRow<C> seen_input = whole_row(seen, c_width);
    const GateRow<C> seen_hidden = whole_row(seen + gates * c_width, c_width);
    if (!Cell::has_c) draw_zones(part, t, units, true);
    for (int64_t i = begin; i < end; ++i) {
      const RowStep row = row_step(p, lane, order.row(i), t);
      const GateRow<const C> none{};
      const auto inputs = gates_of_row(gates_of_panel(part, 0) + (chunk_row + i - begin) * row_size,
                                       chunks.capacity * row_size);
      const auto hiddens =
          gates_of_row(hidden_of_panel(part, 0) + (i - begin) * row_size, hidden_stride());
      const Moments<C> of_input =
          moments<C>(p.H, gates, p.variation.layer_norm_eps, inputs, joint ? hiddens : none);
      normalise_row<S>(of_input, p.H, gates, units, inputs, joint ? hiddens : none, w.ln_input,
                       joint ? nullptr : w.bias_ih, reserve_row<S>(p, row, places.input),
                       joint ? seen_hidden : seen_input);
      if (part.member == 0) store_statistic(row, 0, of_input);
      if (!joint) {
        const Moments<C> of_hidden =
            moments<C>(p.H, gates, p.variation.layer_norm_eps, hiddens, none);
        normalise_row<S>(of_hidden, p.H, gates, units, hiddens, none, w.ln_hidden, w.bias_hh,
                         reserve_row<S>(p, row, places.hidden), seen_hidden);
        if (part.member == 0) store_statistic(row, 1, of_hidden);
      }
      for (int64_t unit = units.begin; unit < units.end && unit < p.H; unit += V::size) {
        V from_input[gates], from_hidden[gates];
        for (int g = 0; g < gates; ++g) {
          from_input[g] = joint ? V(0) : V::load(seen_input.at(unit, g));
          from_hidden[g] = V::load(seen_hidden.at(unit, g));
        }
        if constexpr (Cell::has_c) {
          V c, last_saved;
          forward_c_units<Cell, S>(p, row, unit, p.H - unit, from_input, from_hidden, w.weight_ch,
                                   c_row(lane, i) + unit, c, last_saved);
          c.store(new_c_row(0, lane, i) + unit);
          last_saved.store(new_c_row(1, lane, i) + unit);
        } else {
          cell_units(part, row, i, step, unit, from_input, from_hidden);
        }
      }
    }
  }

  // What follows a normalised c.
  void hidden_phase(const Part& part, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, step);
    const auto& w = p.weights[lane];
    const Share units = units_of_panels(part);
    draw_zones(part, t, units, !p.projected);
    for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
      const RowStep row = row_step(p, lane, order.row(i), t);
      const C* cells = new_c_row(0, lane, i);
      const Moments<C> of_c =
          moments<C>(p.H, 1, p.variation.layer_norm_eps, whole_row(cells, c_width), {});
      if (part.member == 0) store_statistic(row, norm_of_c(norm), of_c);
      for (int64_t unit = units.begin; unit < units.end && unit < p.H; unit += V::size) {
        forward_h_units<Cell, S>(p, row, unit, p.H - unit, of_c, V::load(cells + unit),
                                 V::load(new_c_row(1, lane, i) + unit), w, c_row(lane, i) + unit,
                                 next_row(step, lane, i) + unit,
                                 factors_of(part, row, i, unit, !p.projected, true));
      }
    }
  }

  void store_statistic(const RowStep& row, int which, const Moments<C>& of) const {
    if (p.statistics) statistics_at<Cell, C>(p, p.statistics, row)[which] = of.scale;
  }

  void projection_phase(const Part& part, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, step);
    const int64_t begin = order.begin(part.block);
    const Share panels(projection_panels.count, part.member, division.members);
    if constexpr (is_varied<Cell>)
      for (int64_t i = begin; i < order.active_end(part.block, t); ++i)
        varied.draw_zone_h(
            part.team * division.members + part.member, lane, order.row(i), t, i - begin,
            {panels.begin * PlainPanels::units_each, panels.end * PlainPanels::units_each});
    projection_panels.multiply_units(
        lane, panels, false,
        {m_row(lane, begin), m_width / E::depth, order.active_end(part.block, t) - begin}, p.H,
        [&](int64_t r, int64_t unit, int64_t n, V h) {
          const RowStep row = row_step(p, lane, order.row(begin + r), t);
          Factors<V> factors;
          if constexpr (is_varied<Cell>)
            factors = factors_of(part, row, begin + r, unit, true, false);
          emit_hidden<is_varied<Cell>, S>(p, row, unit, n, h,
                                          h_row(step + 1, lane, begin + r) + unit, factors);
        });
  }

  const LayerForwardParams& p;
  const Host& host;
  const int64_t x_width, h_width, m_width, c_width;
  const LayerNorm norm;
  const bool packed;  // whether weights are; a few rows are multiplied faster without
  GatePanels input_panels;
  HiddenPanels hidden_panels;
  PlainPanels projection_panels, late_panels;
  const Division division;
  const RowOrder order;
  const Chunks chunks;
  VariedFactors<C> varied;
  Value* input_rows = nullptr;  // [team][row of chunk][x_width]
  C* input_gates = nullptr;     // [team][panel][row of chunk][gate][unit of panel]
  Value* h_state[2] =
      {};  // [lane][row in order][h_width]: what the next product reads, and the other
  C* c_state = nullptr;       // [lane][row in order][c_width]
  Value* m_state = nullptr;   // [lane][row in order][m_width]: h before the projection, or what the
                              // late gate's product reads
  C* early_state = nullptr;   // [lane][row in order][early gate][c_width]
  C* hidden_gates = nullptr;  // [team][panel][row of block][gate][unit of panel], under layer_norm
  C* normal_gates = nullptr;  // [part][input, hidden][gate][c_width], likewise: of the row in hand
  C* new_c = nullptr;         // [c~, last saved][lane][row in order][c_width], likewise
};
