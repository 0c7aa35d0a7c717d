// Backward of a whole layer, for any cell and storage type.
//
//   work = lanes, each a team                      teams never wait for each other
//   team = parts, each a row block or a share of unit panels
//
// Chunks of time (forward.h) in reverse. For each, first the recurrence runs back over its timesteps:
// for every panel of units of h, the product of the next step's d_gates with weight_hh, then the step
// around the cell. Parts that are row blocks do that by themselves; parts that share panels meet after
// every step. The d_gates of all rows of the chunk are kept, and then multiplied, every part its share:
//
//   d_input     = d_gates weight_ih             rows of d_gates times packed weights
//   d_weight_ih += d_gates^T input              strips times columns (below), over the chunk's rows
//   d_weight_hh += d_hidden_gates^T h_before    likewise; d_weight_hr too, from d_h and o tanh(c)
//
// A strip is a vector of d_gates columns for all rows of the chunk, columns are two vectors of input
// columns for all of them: both packed as panels are, k being the chunk's rows.
//
// Under layer normalisation a timestep has more phases, as in forward.h: a gradient passes through a
// normalisation when it is known for all units of the row.
//
// Weights that a unit has for itself (of peepholes and normalisations) have their gradient summed row by
// row of the batch, and rows only at the end of a chunk: in an order that no number of threads changes.
//
// A cell with a late gate (cells/cell.h) has a second product in every step: that of the late gate's
// gradient, which the step around the cell has just made, with that gate's rows of weight_hh. And what
// those rows were multiplied with are columns of their own.
//
// Included inside the instruction set's namespace.

template <class Cell, class S>
class Backward {
  using C = Compute<S>;
  using V = Vector<C>;
  using E = Operand<S>;
  using Value = typename E::Value;
  using PlainPanels = Panels<E, 1, 2>;
  static constexpr int64_t chunk_rows = 512;
  static constexpr int vector_values = V::size * E::depth;
  static constexpr int column_vectors = 2;  // of the products of strips and columns
  static constexpr int fitting_rows = max_rows<V>(column_vectors);
  static constexpr int most_rows = fitting_rows >= 8 ? 8 : fitting_rows >= 4 ? 4 : 2;
  static constexpr int strip_rows = V::size < most_rows ? V::size : most_rows;  // of a tile
  static_assert(V::size % strip_rows == 0, "tiles divide strips");

  // One weight's gradient: what its strips and columns are made of.
  struct Gradient {
    int64_t rows, columns;    // of the weight
    const Value* row_values;  // [lane][row of chunk][row_width(rows)]
    Value* strips;            // [lane][strip][word][lane of vector]
    Value* column_panels;     // [lane][panel][word][column]
    C* sums;       // [lane][rows][columns], unless S is C and the result itself holds them
    C* bias_sums;  // [lane][strip][lane of vector], or null

    // A gradient of the same rows as another's has its strips from there.
    void take_memory(Arena& arena, int64_t lanes, int64_t words, const Gradient* same_rows,
                     bool with_sums, bool with_bias) {
      strips = same_rows ? same_rows->strips
                         : arena.take<Value>(lanes * strip_count() * words * vector_values);
      column_panels =
          arena.take<Value>(lanes * panel_count() * words * column_vectors * vector_values);
      sums = with_sums ? arena.take<C>(lanes * rows * columns) : nullptr;
      bias_sums = with_bias ? arena.take<C>(lanes * strip_count() * V::size) : nullptr;
    }
    int64_t strip_count() const { return (rows + V::size - 1) / V::size; }
    int64_t panel_count() const {
      return (columns + column_vectors * V::size - 1) / (column_vectors * V::size);
    }
  };

 public:
  Backward(const LayerBackwardParams& p, const Host& host)
      : p(p),
        host(host),
        gate_rows(Cell::gates * p.H),
        early_rows(gate_rows - Cell::late_gate * p.H),
        gates_width(row_width<E>(gate_rows)),
        d_output_width(row_width<E>(p.P)),
        h_width(round_up(p.P, V::size)),
        c_width(round_up(p.H, V::size)),
        norm(is_varied<Cell> ? p.variation.layer_norm : LayerNorm::none),
        own(unit_weight_places<Cell>(p)),
        split_gates(norm == LayerNorm::none ? Cell::split_gates : norm == LayerNorm::separate),
        packed(p.T * p.B > 1),
        hidden_panels({p.P, early_rows, 0, 1, p.P}, p.T > 1 || p.d_hx),
        late_panels({p.P, p.H, 0, 1, p.P}, Cell::late_gate),
        input_panels({p.I, gate_rows, 0, 1, p.I}, p.d_input.data),
        projection_panels({p.H, p.P, 0, 1, p.H}, p.projected),
        division(p, gate_rows * (p.P + p.I),
                 (p.P + PlainPanels::units_each - 1) / PlainPanels::units_each, sizeof(Value),
                 host.threads),
        parts(division.blocks * division.members),
        order(p, division.blocks),
        everything(p, 1),
        chunks(p, everything, chunk_rows),
        varied(p, p.L * parts, order.end(0)),
        gradient_count(!p.d_weights  ? 0
                       : p.projected ? 3
                                     : 2) {
    gradient[0].rows = gradient[1].rows = gate_rows;
    gradient[0].columns = p.I;
    gradient[1].columns = p.P;
    gradient[2].rows = p.P;
    gradient[2].columns = p.H;
    take_all(host, *this);
    gradient[0].row_values = d_input_rows;
    gradient[1].row_values = d_hidden_rows;
    gradient[2].row_values = d_output_rows;
  }

  void run() {
    const int64_t phases = 2 + chunks.count * phases_per_chunk();
    run_teams(host, p.L, parts, division.parallel, phases,
              [&](int64_t lane, int64_t index, int64_t i) {
                const Part part{lane, index / division.members, index % division.members, index};
                if (i == 0) {
                  pack(lane, index);
                  return begin(part);
                }
                if (i == phases - 1) return finish(part);
                const int64_t chunk = (i - 1) / phases_per_chunk();
                const int64_t phase = (i - 1) % phases_per_chunk();
                if (phase == 0) gather_columns(part, chunk);
                if (phase == recurrence_phases()) return multiply(part, chunk);
                if (division.members > 1) return step_phase(part, chunk, phase);
                for (int64_t k = 0; k < chunks.steps * phases_per_step(); ++k)
                  step_phase(part, chunk, k);
              });
    if (adds_lanes()) add_lanes();
  }

  void take_memory(Arena& arena) {
    if (packed) {
      hidden_panels.take_memory(arena, p.L);
      late_panels.take_memory(arena, p.L);
      input_panels.take_memory(arena, p.L);
      projection_panels.take_memory(arena, p.L);
    }
    for (auto& state : d_gates_state) state = arena.take<Value>(order.places(p.L, gates_width));
    d_h_state = arena.take<C>(order.places(p.L, h_width));
    if (Cell::has_c) d_c_state = arena.take<C>(order.places(p.L, c_width));
    if (p.projected) d_output_state = arena.take<Value>(order.places(p.L, d_output_width));
    if (is_varied<Cell>) varied.take_memory(arena);
    if (norm != LayerNorm::none) {
      if (Cell::has_c) passing_c = arena.take<C>(3 * order.places(p.L, c_width));
      passing_gates =
          arena.take<C>((1 + Cell::split_gates) * order.places(p.L, Cell::gates * c_width));
    }
    if (!multiplies()) return;
    places = arena.take<Place>(p.L * parts * chunks.capacity);
    d_hidden_rows = d_input_rows = arena.take<Value>(p.L * chunks.capacity * gates_width);
    if (split_gates) d_hidden_rows = arena.take<Value>(p.L * chunks.capacity * gates_width);
    if (gradient_count == 3)
      d_output_rows = arena.take<Value>(p.L * chunks.capacity * d_output_width);
    const bool with_bias = p.weights[0].bias_ih && norm != LayerNorm::separate;
    for (int i = 0; i < gradient_count; ++i)
      gradient[i].take_memory(arena, p.L, word_count<E>(chunks.capacity),
                              packs_strips(i) ? nullptr : &gradient[0], !std::is_same_v<S, C>,
                              with_bias && i < 2 && packs_strips(i));
    if (Cell::late_gate && p.d_weights)
      late_columns =
          arena.take<Value>(p.L * gradient[1].panel_count() * word_count<E>(chunks.capacity) *
                            column_vectors * vector_values);
    if (own.count > 0 && p.d_weights) {
      d_unit_rows = arena.take<C>(p.L * p.B * unit_weights_width());
      d_unit_sums = arena.take<C>(p.L * unit_weights_width());
    }
    if (adds_lanes()) other_d_inputs = arena.take<C>((p.L - 1) * p.T * p.B * p.I);
  }

 private:
  struct Part {
    int64_t lane, block, member, index;
  };
  // Where a row of the chunk stands in time.
  struct Place {
    int64_t t, b;
  };

  int64_t unit_weights_width() const { return own.count * c_width; }

  // Unless gates are split, the first two weights have the same d_gates.
  bool packs_strips(int g) const { return g != 1 || split_gates; }
  // Whether lanes have read the same input; then each leaves its gradient in a place of its own.
  bool adds_lanes() const { return p.d_input && p.L > 1 && p.d_input.stride_l == 0; }
  bool multiplies() const { return p.d_input || gradient_count; }
  int64_t norm_phases() const { return norm == LayerNorm::none ? 0 : 1 + Cell::has_c; }
  int64_t phases_per_step() const { return 1 + (p.projected || Cell::late_gate) + norm_phases(); }
  int64_t recurrence_phases() const {
    return division.members > 1 ? chunks.steps * phases_per_step() : 1;
  }
  int64_t phases_per_chunk() const { return recurrence_phases() + (multiplies() ? 1 : 0); }

  Value* gates_row(int64_t buffer, int64_t lane, int64_t i) const {
    return d_gates_state[buffer & 1] + order.place(lane, i, gates_width);
  }
  C* h_row(int64_t lane, int64_t i) const { return d_h_state + order.place(lane, i, h_width); }
  C* c_row(int64_t lane, int64_t i) const { return d_c_state + order.place(lane, i, c_width); }
  Value* output_row(int64_t lane, int64_t i) const {
    return d_output_state + order.place(lane, i, d_output_width);
  }

  // Chunks come in reverse, so chunk 0 holds the last steps.
  Chunks::Times times_of(int64_t lane, int64_t chunk) const {
    return chunks.times(!is_reverse(p, lane), chunk);
  }
  // Of each, a part packs its share: members the panels that they will multiply with.
  void pack(int64_t lane, int64_t part) {
    if (!packed) return;
    const auto& w = p.weights[lane];
    hidden_panels.pack_share(lane, part, parts, static_cast<const S*>(w.weight_hh));
    input_panels.pack_share(lane, part, parts, static_cast<const S*>(w.weight_ih));
    late_panels.pack_share(lane, part, parts, late_weight(lane));
    projection_panels.pack_share(lane, part, parts, static_cast<const S*>(w.weight_hr));
  }

  // The rows of weight_hh that are the late gate's.
  const S* late_weight(int64_t lane) const {
    return static_cast<const S*>(p.weights[lane].weight_hh) + early_rows * p.P;
  }

  // Rows times a share of the panels, packed or not; each as in Panels.
  template <class Each>
  HOST_DEVICE void multiply_units(const PlainPanels& panels, const void* weights, int64_t lane,
                                  const Share& share, bool backwards, const Rows<E>& rows,
                                  const Each& each) const {
    if (packed)
      panels.multiply_units(lane, share, backwards, rows, panels.k, each);
    else
      panels.multiply_units_unpacked(share, static_cast<const S*>(weights), rows, each);
  }

  void begin(const Part& part) {
    const int64_t lane = part.lane, first = order.begin(part.block), last = order.end(part.block);
    for (int64_t i = first + part.member; i < last; i += division.members) {
      const int64_t b = order.row(i);
      memset(gates_row(0, lane, i), 0, gates_width * sizeof(Value));
      memset(gates_row(1, lane, i), 0, gates_width * sizeof(Value));
      if (p.projected) memset(output_row(lane, i), 0, d_output_width * sizeof(Value));
      if constexpr (is_varied<Cell>) varied.draw_keep(lane, b);
      if (d_unit_rows) memset(unit_row(lane, b), 0, unit_weights_width() * sizeof(C));
      load_gradient(p.grad_h_n, p.P, lane, b, h_row(lane, i));
      if constexpr (Cell::has_c) load_gradient(p.grad_c_n, p.H, lane, b, c_row(lane, i));
    }
    if (!multiplies()) return;
    // What pads the rows of a product must be zero.
    const Share rows(chunks.capacity, part.index, parts);
    for (int64_t row = lane * chunks.capacity + rows.begin; row < lane * chunks.capacity + rows.end;
         ++row)
      memset(d_input_rows + row * gates_width + gate_rows, 0,
             (gates_width - gate_rows) * sizeof(Value));
    for (int g = 0; g < gradient_count; ++g)
      if (gradient[g].bias_sums) {
        const Share strips(gradient[g].strip_count(), part.index, parts);
        memset(gradient[g].bias_sums + (lane * gradient[g].strip_count() + strips.begin) * V::size,
               0, (strips.end - strips.begin) * V::size * sizeof(C));
      }
    if (d_unit_sums) {
      const Share vectors(unit_weights_width() / V::size, part.index, parts);
      memset(d_unit_sums + lane * unit_weights_width() + vectors.begin * V::size, 0,
             (vectors.end - vectors.begin) * V::size * sizeof(C));
    }
  }

  void load_gradient(const void* from, int64_t width, int64_t lane, int64_t b, C* to) {
    for (int64_t unit = 0; unit < width; unit += V::size)
      load_or_zero<V>(from ? state_at<S>(from, p.B, width, lane, b) + unit : nullptr, width - unit)
          .store(to + unit);
  }

  // ---- the recurrence

  // For `rows` rows from `first`, the gradient that the gates in `buffer` send to h, panel by panel:
  // each(row in order, unit, units there are, product).
  template <class Each>
  HOST_DEVICE void hidden_product(const Part& part, int64_t buffer, int64_t first, int64_t rows,
                                  const Each& each) {
    // There and back again, so that the panels used last are still in the cache.
    multiply_units(
        hidden_panels, p.weights[part.lane].weight_hh, part.lane,
        Share(hidden_panels.count, part.member, division.members), buffer & 1,
        {gates_row(buffer, part.lane, first), gates_width / E::depth, rows},
        [&](int64_t r, int64_t unit, int64_t n, V product) { each(first + r, unit, n, product); });
  }

  void step_phase(const Part& part, int64_t chunk, int64_t phase) {
    const int64_t step = chunk * chunks.steps + phase / phases_per_step();
    if (step >= p.T) return;
    const int64_t of_step = phase % phases_per_step();
    if (of_step == 0) return hidden_phase(part, chunk, step);
    if constexpr (Cell::late_gate) return late_phase(part, chunk, step);
    if constexpr (Cell::has_c)
      if (of_step == 1 && p.projected) return projection_phase(part, chunk, step);
    if constexpr (is_varied<Cell> && !Cell::late_gate) {
      if constexpr (Cell::has_c)
        if (of_step + 2 == phases_per_step()) return c_phase(part, step);
      gates_phase(part, chunk, step);
    }
  }

  void hidden_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, p.T - 1 - step);
    const int64_t begin = order.begin(part.block);
    const int64_t rows = order.active_end(part.block, t) - begin;
    // Nothing comes back from beyond the last step.
    const bool first = step == 0;
    const int64_t each_panel = first ? V::size : PlainPanels::units_each;
    const Share panels((p.P + each_panel - 1) / each_panel, part.member, division.members);
    const Share units(panels.begin * each_panel, panels.end * each_panel);
    if constexpr (is_varied<Cell>) draw_zones(part, t, units, true, !p.projected);
    const auto each = [&](int64_t i, int64_t unit, int64_t n, V product) {
      const RowStep row = row_step(p, lane, order.row(i), t);
      const int64_t chunk_row = row_of_chunk(part, chunk, t, i);
      fetch_ahead(row, unit, step & 1, units);
      Factors<V> factors;
      if constexpr (is_varied<Cell>)
        factors = factors_of(part, row, i, unit, true, Cell::has_c && !p.projected);
      const V d_h = collect_d_hidden<is_varied<Cell>, S>(p, row, unit, n, product,
                                                         h_row(lane, i) + unit, factors);
      if (!p.projected) return cell_units(row, step, i, chunk_row, unit, n, d_h, factors);
      Memory<V>::store(d_h, output_row(lane, i) + unit, n);
      if (d_output_rows)
        Memory<V>::store(d_h, d_output_rows + chunk_row * d_output_width + unit, n);
    };
    if (!first) return hidden_product(part, step, begin, rows, each);
    for (int64_t i = begin; i < begin + rows; ++i)
      for (int64_t unit = units.begin; unit < units.end; unit += V::size)
        each(i, unit, p.P - unit, V(0));
  }

  // What the cell will read of a row's next panel, or at the next step of the panel that it begins with,
  // comes from afar while products run.
  HOST_DEVICE void fetch_ahead(const RowStep& row, int64_t unit, bool backwards,
                               const Share& units) const {
    int64_t t = row.t, next = unit + (backwards ? -1 : 1) * PlainPanels::units_each;
    if (next < units.begin || next >= units.end || next >= p.H) {
      if (row.first) return;
      t = previous_time(p, row.lane, t);
      next = unit;
    }
    if (Cell::saved > 0) {
      const S* values = p.reserve.at<S>(t, row.b, row.lane, next, 0);
      for (int i = 0; i < Cell::saved; ++i, values += p.reserve.stride_value)
        __builtin_prefetch(values);
    }
    if (Cell::has_c) __builtin_prefetch(p.saved_cells.at<C>(t, row.b, row.lane, next, 0));
    if (p.grad_output) __builtin_prefetch(p.grad_output.at<S>(t, row.b, row.lane) + next);
  }

  void projection_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, p.T - 1 - step);
    const int64_t begin = order.begin(part.block);
    const int64_t rows = order.active_end(part.block, t) - begin;
    const Share panels(projection_panels.count, part.member, division.members);
    if constexpr (is_varied<Cell>)
      draw_zones(part, t,
                 {panels.begin * PlainPanels::units_each, panels.end * PlainPanels::units_each},
                 false, true);
    multiply_units(projection_panels, p.weights[lane].weight_hr, lane, panels, false,
                   {output_row(lane, begin), d_output_width / E::depth, rows},
                   [&](int64_t r, int64_t unit, int64_t n, V d_h) {
                     const RowStep row = row_step(p, lane, order.row(begin + r), t);
                     Factors<V> factors;
                     if constexpr (is_varied<Cell>)
                       factors = factors_of(part, row, begin + r, unit, false, true);
                     cell_units(row, step, begin + r, row_of_chunk(part, chunk, t, begin + r), unit,
                                n, d_h, factors);
                   });
  }

  // What flows back through what the late gate's product read, and the gate that made it.
  void late_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, p.T - 1 - step);
    const int64_t begin = order.begin(part.block);
    const int64_t rows = order.active_end(part.block, t) - begin;
    multiply_units(late_panels, late_weight(lane), lane,
                   Share(late_panels.count, part.member, division.members), step & 1,
                   {gates_row(step + 1, lane, begin) + early_rows, gates_width / E::depth, rows},
                   [&](int64_t r, int64_t unit, int64_t n, V d_read) {
                     const int64_t i = begin + r;
                     const V d_gate = backward_early_units<Cell, S>(
                         p, row_step(p, lane, order.row(i), t), unit, n, d_read,
                         h_row(lane, i) + unit, keep_of(lane, order.row(i), unit));
                     Memory<V>::store(d_gate, gates_row(step + 1, lane, i) + unit, n);
                     if (!d_input_rows) return;
                     const int64_t chunk_row = row_of_chunk(part, chunk, t, i);
                     Memory<V>::store(d_gate, d_input_rows + chunk_row * gates_width + unit, n);
                   });
  }

  // Where row i of a block at timestep t stands among the rows of all chunks. A chunk's rows are those of
  // all blocks, so that sums over them do not depend on how many blocks there are.
  int64_t row_of_chunk(const Part& part, int64_t chunk, int64_t t, int64_t i) const {
    return part.lane * chunks.capacity + chunks.row(0, times_of(part.lane, chunk), t, 0) +
           order.rank(part.block, i);
  }

  HOST_DEVICE void cell_units(const RowStep& row, int64_t step, int64_t i, int64_t chunk_row,
                              int64_t unit, int64_t n, V d_h, const Factors<V>& factors = {}) {
    const void* weight_ch = p.weights[row.lane].weight_ch;
    V d_weight_ch[Cell::unit_weights > 0 ? Cell::unit_weights : 1];
    if constexpr (is_varied<Cell>)
      if (norm != LayerNorm::none) fetch_saved(row, unit);
    if constexpr (is_varied<Cell> && Cell::has_c)
      if (norm != LayerNorm::none) return hidden_half(row, i, unit, n, d_h, factors);
    V d_input_gates[Cell::gates], d_hidden_gates[Cell::gates];
    backward_units<Cell, S>(p, row, unit, n, load_results<Cell, S, V>(p, row, unit, n), d_h,
                            weight_ch, h_row(row.lane, i) + unit,
                            Cell::has_c ? c_row(row.lane, i) + unit : nullptr, d_input_gates,
                            d_hidden_gates, d_weight_ch, factors);
    for (int k = 0; k < Cell::unit_weights; ++k) add_unit(row, k, unit, d_weight_ch[k]);
    if (norm != LayerNorm::none)
      pass_gates(row, i, unit, d_input_gates, d_hidden_gates);
    else
      keep_gates(row, step, i, chunk_row, unit, n, d_input_gates, d_hidden_gates);
  }

  // Where the next product and those over the chunk find them.
  HOST_DEVICE void keep_gates(const RowStep& row, int64_t step, int64_t i, int64_t chunk_row,
                              int64_t unit, int64_t n, const V* d_input_gates,
                              const V* d_hidden_gates) {
    constexpr int known = Cell::late_gate ? 1 : 0;  // the first of the gates that are done
    Value* state = gates_row(step + 1, row.lane, i) + unit;
    for (int g = known; g < Cell::gates; ++g)
      Memory<V>::store(row.reset ? V(0) : d_hidden_gates[g], state + g * p.H, n);
    if (!d_input_rows) return;
    Value* inputs = d_input_rows + chunk_row * gates_width + unit;
    Value* hiddens = d_hidden_rows + chunk_row * gates_width + unit;
    for (int g = known; g < Cell::gates; ++g) {
      Memory<V>::store(d_input_gates[g], inputs + g * p.H, n);
      if (split_gates) Memory<V>::store(d_hidden_gates[g], hiddens + g * p.H, n);
    }
  }

  C* unit_row(int64_t lane, int64_t b) const {
    return d_unit_rows + (lane * p.B + b) * unit_weights_width();
  }
  HOST_DEVICE void add_unit(const RowStep& row, int64_t k, int64_t unit, V value) {
    if (!d_unit_rows) return;
    C* sum = unit_row(row.lane, row.b) + k * c_width + unit;
    (V::load(sum) + value).store(sum);
  }

  // ---- around a Varied cell

  HOST_DEVICE V keep_of(int64_t lane, int64_t b, int64_t unit) const {
    if constexpr (is_varied<Cell>) return varied.keep(lane, b, unit);
    return V(1);
  }

  HOST_DEVICE Factors<V> factors_of(const Part& part, const RowStep& row, int64_t i, int64_t unit,
                                    bool of_h, bool of_c) const {
    return varied.factors(part.lane * parts + part.index, row.lane, row.b,
                          i - order.begin(part.block), unit, of_h, of_c);
  }

  void draw_zones(const Part& part, int64_t t, const Share& units, bool of_h, bool of_c) {
    const int64_t index = part.lane * parts + part.index;
    for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
      const int64_t at = i - order.begin(part.block), b = order.row(i);
      if (of_h) varied.draw_zone_h(index, part.lane, b, t, at, units);
      if (of_c && Cell::has_c) varied.draw_zone_c(index, part.lane, b, t, at, units);
    }
  }

  // ---- through normalisations

  C statistic(const RowStep& row, int which) const {
    return statistics_at<Cell, const C>(p, p.statistics, row)[which];
  }
  // Of c: the gradients of the last gate, of c~ by itself, and of the normalised c.
  C* passing_c_row(int which, int64_t lane, int64_t i) const {
    return passing_c + which * order.places(p.L, c_width) + order.place(lane, i, c_width);
  }
  // Of the gates that the cell saw; of hidden gates, where the cell splits them.
  C* passing_gates_row(int which, int64_t lane, int64_t i) const {
    return passing_gates + which * order.places(p.L, Cell::gates * c_width) +
           order.place(lane, i, Cell::gates * c_width);
  }
  // What the halves of step.h add to the gradients of a unit's own weights.
  auto adder(const RowStep& row, int64_t unit) {
    return [this, &row, unit](int64_t k, V value) { add_unit(row, k, unit, value); };
  }

  HOST_DEVICE void hidden_half(const RowStep& row, int64_t i, int64_t unit, int64_t n, V d_h,
                               const Factors<V>& factors) {
    V d_last_gate, d_c, d_normal;
    backward_h_units<Cell, S>(p, row, unit, n, d_h, p.weights[row.lane], c_row(row.lane, i) + unit,
                              d_last_gate, d_c, d_normal, factors, adder(row, unit));
    d_last_gate.store(passing_c_row(0, row.lane, i) + unit);
    d_c.store(passing_c_row(1, row.lane, i) + unit);
    d_normal.store(passing_c_row(2, row.lane, i) + unit);
  }

  // What later phases of the step will read of these units comes from afar while this one runs.
  HOST_DEVICE void fetch_saved(const RowStep& row, int64_t unit) const {
    const int64_t count = saved_values<Cell>(p).count;
    const S* values = p.reserve.at<S>(row.t, row.b, row.lane, unit, 0);
    for (int64_t i = 0; i < count; ++i, values += p.reserve.stride_value)
      __builtin_prefetch(values);
  }

  // This member's share of units where a row has been finished.
  Share share_of_units(const Part& part) const {
    const Share vectors(c_width / V::size, part.member, division.members);
    return {vectors.begin * V::size, vectors.end * V::size};
  }

  void c_phase(const Part& part, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, p.T - 1 - step);
    const Share units = share_of_units(part);
    for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
      const RowStep row = row_step(p, lane, order.row(i), t);
      const C* d_normal = passing_c_row(2, lane, i);
      const auto normal = reserve_row<const S>(p, row, saved_values<Cell>(p).c);
      const NormGradient<C> through = norm_gradient<S>(
          p.H, 1, statistic(row, norm_of_c(norm)), normal, whole_row(d_normal, c_width), nullptr);
      for (int64_t unit = units.begin; unit < units.end; unit += V::size) {
        const int64_t n = p.H - unit;
        V d_gates[Cell::gates];
        d_gates[Cell::gates - 1] = V::load(passing_c_row(0, lane, i) + unit);
        const V d_c = V::load(passing_c_row(1, lane, i) + unit) +
                      through.at(V::load(d_normal + unit), Memory<V>::load(normal.at(unit, 0), n));
        backward_c_units<Cell, S>(p, row, unit, n, d_c, p.weights[lane], h_row(lane, i) + unit,
                                  c_row(lane, i) + unit, d_gates, adder(row, unit));
        pass_gates(row, i, unit, d_gates, d_gates);
      }
    }
  }

  // The gradients of the gates that a cell saw.
  HOST_DEVICE void pass_gates(const RowStep& row, int64_t i, int64_t unit, const V* d_input_gates,
                              const V* d_hidden_gates) {
    // Joint gates have stood for the hidden ones.
    const V* d_gates = norm == LayerNorm::joint ? d_hidden_gates : d_input_gates;
    for (int g = 0; g < Cell::gates; ++g) {
      d_gates[g].store(passing_gates_row(0, row.lane, i) + g * c_width + unit);
      if constexpr (Cell::split_gates)
        d_hidden_gates[g].store(passing_gates_row(1, row.lane, i) + g * c_width + unit);
    }
  }

  void gates_phase(const Part& part, int64_t chunk, int64_t step) {
    const int64_t lane = part.lane, t = time_of_step(p, lane, p.T - 1 - step);
    const Share units = share_of_units(part);
    const SavedValues places = saved_values<Cell>(p);
    const auto& w = p.weights[lane];
    const bool joint = norm == LayerNorm::joint;
    for (int64_t i = order.begin(part.block); i < order.active_end(part.block, t); ++i) {
      const RowStep row = row_step(p, lane, order.row(i), t);
      const int64_t at = row_of_chunk(part, chunk, t, i) * gates_width;
      // After a reset nothing flows back, and the state is zeros from the beginning.
      Value* const state = row.reset ? nullptr : gates_row(step + 1, lane, i);
      Value* const inputs = d_input_rows ? d_input_rows + at : nullptr;
      if (row.reset)
        for (int g = 0; g < Cell::gates; ++g)
          for (int64_t unit = units.begin; unit < units.end; unit += V::size)
            Memory<V>::store(V(0), gates_row(step + 1, lane, i) + g * p.H + unit, p.H - unit);
      C* const sums = d_unit_rows ? unit_row(lane, row.b) : nullptr;
      const auto through = [&](int which, int64_t place, const NormWeights<const void*>& of,
                               int64_t k, bool sums_bias, Value* to, Value* too) {
        const auto normal = reserve_row<const S>(p, row, place);
        const auto d =
            whole_row<const C>(passing_gates_row(which && Cell::split_gates, lane, i), c_width);
        const auto gradient =
            norm_gradient<S>(p.H, Cell::gates, statistic(row, which), normal, d, of.weight);
        norm_backward_row<S>(gradient, p.H, Cell::gates, units, normal, d, of.weight,
                             sums ? sums + k * c_width : nullptr,
                             sums && sums_bias ? sums + (k + Cell::gates) * c_width : nullptr,
                             c_width, to, too);
      };
      through(0, places.input, w.ln_input, own.ln_input, true, inputs, joint ? state : nullptr);
      if (!joint)
        through(1, places.hidden, w.ln_hidden, own.ln_hidden, Cell::split_gates, state,
                d_hidden_rows ? d_hidden_rows + at : nullptr);
    }
  }

  // What is left at the beginning of every row is the gradient of its initial state.
  void finish(const Part& part) {
    if (gradient_count) store_gradients(part);
    if (!p.d_hx) return;
    const int64_t lane = part.lane, begin = order.begin(part.block), end = order.end(part.block);
    const auto store_d_hx = [&](int64_t i, int64_t unit, int64_t n, V product) {
      if constexpr (is_varied<Cell>) product = product * varied.keep(lane, order.row(i), unit);
      const V d_h = product + V::load(h_row(lane, i) + unit);
      Memory<V>::store(d_h, state_at<S>(p.d_hx, p.B, p.P, lane, order.row(i)) + unit, n);
    };
    if (is_reverse(p, lane) && p.lengths) {
      // Rows of a reverse lane ended after as many steps as they are long, in either buffer.
      for (int64_t i = begin; i < end; ++i)
        hidden_product(part, p.lengths[order.row(i)], i, 1, store_d_hx);
    } else {
      hidden_product(part, p.T, begin, end - begin, store_d_hx);
    }
    if constexpr (Cell::has_c)
      for (int64_t i = begin + part.member; i < end; i += division.members)
        for (int64_t unit = 0; unit < p.H; unit += V::size)
          Memory<V>::store(V::load(c_row(lane, i) + unit),
                           state_at<S>(p.d_cx, p.B, p.H, lane, order.row(i)) + unit, p.H - unit);
  }

  // ---- the products over a chunk

  int64_t rows_of(int64_t lane, int64_t chunk) const {
    return chunks.rows(0, times_of(lane, chunk));
  }

  // Every part keeps its own list, so that none waits for another's.
  Place* places_of(const Part& part) const {
    return places + (part.lane * parts + part.index) * chunks.capacity;
  }
  const Place* find_places(const Part& part, int64_t chunk) {
    Place* at = places_of(part);
    const auto times = times_of(part.lane, chunk);
    for (int64_t t = times.begin; t < times.end; ++t)
      for (int64_t i = 0; i < everything.active_end(0, t); ++i) *at++ = {t, everything.row(i)};
    return places_of(part);
  }

  // Packs this part's share of the columns: what the weights were multiplied with.
  void gather_columns(const Part& part, int64_t chunk) {
    if (!multiplies()) return;
    const int64_t lane = part.lane, rows = rows_of(lane, chunk);
    const Place* place = find_places(part, chunk);
    for (int g = 0; g < gradient_count; ++g) {
      const Share panels(gradient[g].panel_count(), part.index, parts);
      for (int64_t i = panels.begin * column_vectors; i < panels.end * column_vectors; ++i) {
        const int64_t column = i * V::size, here = gradient[g].columns - column;
        Value* to = columns_of(gradient[g].column_panels, gradient[g], lane, i / column_vectors) +
                    i % column_vectors * vector_values;
        alignas(64) S dropped[E::depth][V::size];
        pack_rows<E>(rows, here, to, column_vectors * vector_values, [&](int64_t k) -> const S* {
          const S* row = here > 0 ? multiplied_row(g, lane, place[k]) : nullptr;
          if (!row) return nullptr;
          if constexpr (is_varied<Cell>)
            if (g == 1 && varied.has_keep()) {
              S* const kept = dropped[k % E::depth];
              const V h = Memory<V>::load(row + column, here);
              Memory<V>::store(h * varied.keep(lane, place[k].b, column), kept, V::size);
              return kept;
            }
          return row + column;
        });
      }
    }
    if constexpr (Cell::late_gate)
      if (late_columns) gather_late_columns(part, rows, place);
  }

  // Packs what the late gate's rows of weight_hh were multiplied with.
  void gather_late_columns(const Part& part, int64_t rows, const Place* place) {
    const int64_t lane = part.lane;
    const Share panels(gradient[1].panel_count(), part.index, parts);
    for (int64_t i = panels.begin * column_vectors; i < panels.end * column_vectors; ++i) {
      const int64_t column = i * V::size, here = p.P - column;
      Value* to = columns_of(late_columns, gradient[1], lane, i / column_vectors) +
                  i % column_vectors * vector_values;
      Value read[E::depth][V::size];
      pack_rows<E>(rows, here, to, column_vectors * vector_values, [&](int64_t k) -> const Value* {
        if (here <= 0) return nullptr;
        const RowStep row = row_step(p, lane, place[k].b, place[k].t);
        Memory<V>::store(read_units<Cell, S, V>(p, row, column, here, keep_of(lane, row.b, column)),
                         read[k % E::depth], V::size);
        return read[k % E::depth];
      });
    }
  }

  // The row that weight g was multiplied with, or null if that was zeros.
  const S* multiplied_row(int g, int64_t lane, const Place& place) const {
    const int64_t t = place.t, b = place.b;
    if (g == 0) return p.input.at<S>(t, b, lane);
    if (g == 2) return p.unprojected.at<S>(t, b, lane);
    const RowStep row = row_step(p, lane, b, t);
    if (row.reset) return nullptr;
    if (!row.first) return p.output.at<S>(previous_time(p, lane, t), b, lane);
    return p.hx ? state_at<S>(p.hx, p.B, p.P, lane, b) : nullptr;
  }

  Value* columns_of(Value* panels, const Gradient& of, int64_t lane, int64_t panel) const {
    return panels + (lane * of.panel_count() + panel) * word_count<E>(chunks.capacity) *
                        column_vectors * vector_values;
  }
  Value* strip_of(const Gradient& of, int64_t lane, int64_t strip) const {
    return of.strips +
           (lane * of.strip_count() + strip) * word_count<E>(chunks.capacity) * vector_values;
  }

  void multiply(const Part& part, int64_t chunk) {
    const int64_t rows = rows_of(part.lane, chunk);
    if (p.d_input) multiply_d_input(part, rows);
    if (d_unit_rows) add_unit_rows(part);
    for (int g = 0; g < gradient_count; ++g) {
      if (packs_strips(g)) pack_strips(part, gradient[g], rows);
      const bool two = Cell::late_gate && g == 1;
      const int64_t end = two ? early_rows : gradient[g].rows;
      multiply_strips(part, g, rows, chunk == 0, gradient[g].column_panels, 0, end);
      if (two) multiply_strips(part, g, rows, chunk == 0, late_columns, end, gate_rows);
    }
  }

  void multiply_d_input(const Part& part, int64_t rows) {
    const int64_t lane = part.lane;
    const Place* place = places_of(part);
    const Value* d_gates = d_input_rows + lane * chunks.capacity * gates_width;
    const bool by_panels = input_panels.count >= parts;
    const Share panels(input_panels.count, by_panels ? part.index : 0, by_panels ? parts : 1);
    const Share share(rows, by_panels ? 0 : part.index, by_panels ? 1 : parts);
    multiply_units(
        input_panels, p.weights[lane].weight_ih, lane, panels, false,
        {d_gates + share.begin * gates_width, gates_width / E::depth, share.end - share.begin},
        [&](int64_t r, int64_t unit, int64_t n, V value) {
          const Place& at = place[share.begin + r];
          if (lane == 0 || !adds_lanes())
            Memory<V>::store(value, p.d_input.at<S>(at.t, at.b, lane) + unit, n);
          else
            Memory<V>::store(value, other_d_input(lane, at.t, at.b) + unit, n);
        });
  }

  C* other_d_input(int64_t lane, int64_t t, int64_t b) const {
    return other_d_inputs + (((lane - 1) * p.T + t) * p.B + b) * p.I;
  }

  void pack_strips(const Part& part, const Gradient& of, int64_t rows) {
    const int64_t width = row_width<E>(of.rows);
    const Value* from = of.row_values + part.lane * chunks.capacity * width;
    const Share strips(of.strip_count(), part.index, parts);
    for (int64_t i = strips.begin; i < strips.end; ++i) {
      const int64_t column = i * V::size;
      Value* strip = strip_of(of, part.lane, i);
      pack_rows<E, false>(rows, of.rows - column, strip, vector_values,
                          [&](int64_t k) { return from + k * width + column; });
      if (!of.bias_sums) continue;
      add_in_parts(
          word_count<E>(rows),
          [&](int64_t k, V sum) {
            return E::multiply_add(E::load(strip + k * vector_values), E::broadcast(E::one), sum);
          },
          of.bias_sums + (part.lane * of.strip_count() + i) * V::size);
    }
  }

  // The sums of all rows of the batch, by this part's share of their columns; rows begin anew.
  void add_unit_rows(const Part& part) {
    const int64_t width = unit_weights_width();
    const Share vectors(width / V::size, part.index, parts);
    for (int64_t i = vectors.begin * V::size; i < vectors.end * V::size; i += V::size)
      add_in_parts(
          p.B,
          [&](int64_t b, V sum) {
            C* row = unit_row(part.lane, b) + i;
            sum = sum + V::load(row);
            V(0).store(row);
            return sum;
          },
          d_unit_sums + part.lane * width + i);
  }

  // sums += what `add` adds up over 0..count, in partial sums, so that rounding does not pile up.
  template <class Add>
  static void add_in_parts(int64_t count, const Add& add, C* sums) {
    constexpr int64_t in_a_row = 32;
    V total = V::load(sums);
    for (int64_t begin = 0; begin < count; begin += in_a_row) {
      V sum(0);
      for (int64_t k = begin; k < begin + in_a_row && k < count; ++k) sum = add(k, sum);
      total = total + sum;
    }
    total.store(sums);
  }

  // Where the gradient of weight g is summed up.
  C* sums_of(int g, int64_t lane) const {
    if constexpr (std::is_same_v<S, C>) return static_cast<C*>(result_of(g, lane));
    return gradient[g].sums + lane * gradient[g].rows * gradient[g].columns;
  }
  void* result_of(int g, int64_t lane) const {
    const auto& d = p.d_weights[lane];
    return g == 0 ? d.weight_ih : g == 1 ? d.weight_hh : d.weight_hr;
  }

  // Of the rows of weight g those from `begin` to `end`, which multiplied what the columns hold.
  void multiply_strips(const Part& part, int g, int64_t rows, bool first, Value* column_panels,
                       int64_t begin, int64_t end) {
    constexpr int W = column_vectors, R = strip_rows;
    const Gradient& of = gradient[g];
    const Share strips(of.strip_count(), part.index, parts);
    C* const sums = sums_of(g, part.lane);
    alignas(64) C buffer[R * W * V::size];
    for (int64_t panel = 0; panel < of.panel_count(); ++panel) {
      const Value* columns = columns_of(column_panels, of, part.lane, panel);
      const int64_t column = panel * W * V::size;
      for (int64_t row = strips.begin * V::size; row < strips.end * V::size && row < end;
           row += R) {
        if (row + R <= begin) continue;
        const auto* words =
            reinterpret_cast<const typename E::Word*>(strip_of(of, part.lane, row / V::size));
        // What the product will be added to, from afar while it runs.
        for (int r = 0; r < R && !first && row + r < end; ++r)
          for (int w = 0; w < W && column + w * V::size < of.columns; ++w)
            __builtin_prefetch(sums + (row + r) * of.columns + column + w * V::size, 1);
        // The first sums, if they fill a tile, are made where they belong.
        C* const result = sums + row * of.columns + column;
        const bool whole = row >= begin && row + R <= end && column + W * V::size <= of.columns;
        const bool in_place = first && whole;
        C* const tile = in_place ? result : buffer;
        product<E, W, R, 1, Layout::columns>(
            words + row % V::size, 0, word_count<E>(rows),
            {columns, 0, nullptr, tile, 0, in_place ? of.columns : W * V::size});
        if (in_place) continue;
        for (int r = row < begin ? static_cast<int>(begin - row) : 0; r < R && row + r < end; ++r)
          for (int w = 0; w < W; ++w) {
            const int64_t n = of.columns - column - w * V::size;
            if (n <= 0) break;
            C* to = result + r * of.columns + w * V::size;
            const V sum = V::load(tile + (r * W + w) * V::size);
            Memory<V>::store(first ? sum : sum + Memory<V>::load(to, n), to, n);
          }
      }
    }
  }

  void store_gradients(const Part& part) {
    const int64_t lane = part.lane;
    if (d_unit_sums) {
      const auto& to = p.d_weights[lane];
      store_unit_gradient(part, to.weight_ch, 0, Cell::unit_weights);
      if (norm != LayerNorm::none) {
        store_norm_gradient(part, to.ln_input, own.ln_input, Cell::gates);
        if constexpr (Cell::has_c) store_norm_gradient(part, to.ln_c, own.ln_c, 1);
      }
      if (norm == LayerNorm::separate) {
        // What is added to a normalised gate has one gradient, whatever it is called.
        const int64_t input = own.ln_input + Cell::gates;
        const int64_t hidden = Cell::split_gates ? own.ln_hidden + Cell::gates : input;
        store_unit_gradient(part, to.bias_ih, input, Cell::gates);
        store_unit_gradient(part, to.bias_hh, hidden, Cell::gates);
        store_unit_gradient(part, to.ln_hidden.weight, own.ln_hidden, Cell::gates);
        store_unit_gradient(part, to.ln_hidden.bias, hidden, Cell::gates);
      }
    }
    for (int g = 0; g < gradient_count; ++g) {
      const Gradient& of = gradient[g];
      const Share strips(of.strip_count(), part.index, parts);
      const int64_t begin = strips.begin * V::size;
      const int64_t end = strips.end * V::size < of.rows ? strips.end * V::size : of.rows;
      if constexpr (!std::is_same_v<S, C>) {
        const C* sums = sums_of(g, lane);
        S* to = static_cast<S*>(result_of(g, lane));
        for (int64_t i = begin * of.columns; i < end * of.columns; i += V::size)
          Memory<V>::store(Memory<V>::load(sums + i, end * of.columns - i), to + i,
                           end * of.columns - i);
      }
      if (!of.bias_sums) continue;
      const C* sums = of.bias_sums + lane * of.strip_count() * V::size;
      S* const to[] = {static_cast<S*>(p.d_weights[lane].bias_ih),
                       static_cast<S*>(p.d_weights[lane].bias_hh)};
      for (int bias = 0; bias < 2; ++bias)
        if (bias == g || !split_gates)
          for (int64_t i = begin; i < end; i += V::size)
            Memory<V>::store(V::load(sums + i), to[bias] + i, end - i);
    }
  }

  void store_norm_gradient(const Part& part, const NormWeights<void*>& to, int64_t first,
                           int count) {
    store_unit_gradient(part, to.weight, first, count);
    store_unit_gradient(part, to.bias, first + count, count);
  }

  // `count` weights of a unit from `first`, by this part's share of units.
  void store_unit_gradient(const Part& part, void* to, int64_t first, int count) {
    if (!to) return;
    const Share vectors(c_width / V::size, part.index, parts);
    const C* sums = d_unit_sums + part.lane * unit_weights_width() + first * c_width;
    for (int k = 0; k < count; ++k)
      for (int64_t unit = vectors.begin * V::size; unit < vectors.end * V::size; unit += V::size)
        Memory<V>::store(V::load(sums + k * c_width + unit), static_cast<S*>(to) + k * p.H + unit,
                         p.H - unit);
  }

  void add_lanes() {
    parallel(host, p.B, division.parallel, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t t = 0; t < row_length(p, b); ++t) {
          S* to = p.d_input.at<S>(t, b, 0);
          for (int64_t j = 0; j < p.I; j += V::size) {
            V sum = Memory<V>::load(to + j, p.I - j);
            for (int64_t lane = 1; lane < p.L; ++lane)
              sum = sum + Memory<V>::load(other_d_input(lane, t, b) + j, p.I - j);
            Memory<V>::store(sum, to + j, p.I - j);
          }
        }
    });
  }

  const LayerBackwardParams& p;
  const Host& host;
  const int64_t gate_rows;                    // G*H
  const int64_t early_rows;                   // of them those whose product reads h
  const int64_t gates_width, d_output_width;  // of rows that are multiplied
  const int64_t h_width, c_width;
  const LayerNorm norm;
  const UnitWeightPlaces own;
  const bool split_gates;  // whether the gates of input and of h have gradients of their own
  const bool packed;       // whether weights are; a single row is multiplied faster without
  PlainPanels hidden_panels, late_panels, input_panels, projection_panels;
  const Division division;
  const int64_t parts;  // of a team
  const RowOrder order;
  const RowOrder everything;  // as if there were one block
  const Chunks chunks;
  VariedFactors<C> varied;
  Gradient gradient[3] = {};  // of weight_ih, weight_hh, weight_hr
  const int gradient_count;
  Value* d_gates_state[2] = {};  // [lane][row in order][gates_width]
  C* d_h_state = nullptr;        // [lane][row in order][h_width]: passed on to h directly
  C* d_c_state = nullptr;        // [lane][row in order][c_width]
  Value* d_output_state =
      nullptr;                    // [lane][row in order][d_output_width]: d_h before the projection
  Place* places = nullptr;        // [lane][part][row of chunk]
  Value* d_input_rows = nullptr;  // [lane][row of chunk][gates_width]
  Value* d_hidden_rows = nullptr;  // the same, or the same again if the cell splits its gates
  Value* d_output_rows = nullptr;  // [lane][row of chunk][d_output_width]
  Value* late_columns = nullptr;   // as those of weight_hh, for the late gate's rows
  C* d_unit_rows = nullptr;        // [lane][row][weight of a unit][c_width]
  C* d_unit_sums = nullptr;        // [lane][weight of a unit][c_width]
  C* passing_c = nullptr;          // [of what][lane][row in order][c_width], under layer_norm
  C* passing_gates = nullptr;      // [of what][lane][row in order][gate][c_width], likewise
  C* other_d_inputs = nullptr;     // [lane - 1][t][row][I]
};
