// The CPU engine: forward and backward of a whole sequence, for any cell and storage type.
//
//   work = lanes x row blocks, each a team       teams never wait for each other
//   team = members, each a range of unit panels  members meet once per phase (team.h)
//   phase = one timestep (two with a projection) of a member: for every panel, for every tile of rows,
//           one product (product.h) and then the step around the cell (step.h) on its result
//
// Weights are packed once per call. State lives in row-major buffers of the compute type; h (and
// d_gates on the way back) alternates between two, since members read the whole of one while they
// write their part of the other. Rows are dealt to blocks by falling length, so that the rows still
// running at a timestep are the first ones of a block and finished rows cost nothing.
//
// Included inside the instruction set's namespace.

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out pieces of one allocation; used twice, first to measure and then for real.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Gives `user` the scratch that its take_memory asks for.
template <class User>
void take_all(const Host& host, User& user) {
  Arena measure;
  user.take_memory(measure);
  Arena arena(host.allocate(host.allocator, measure.used()));
  user.take_memory(arena);
}

// Calls f(begin, end) over 0..count, on several threads if that is `worthwhile`.
template <class F>
void parallel(const Host& host, int64_t count, bool worthwhile, const F& f) {
  if (host.threads <= 1 || count <= 1 || !worthwhile) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  host.parallel_for(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

// Runs phase(team, member, phase number) for all teams.
template <class Phase>
void run_teams(const Host& host, int64_t teams, const Division& division, int64_t phases,
               const Phase& phase) {
  const int64_t members = division.members;
  Parts parts(teams * members);
  parallel(host, teams * members, division.parallel, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t team = task / members;
      run_phases(parts.data + team * members, static_cast<int>(members),
                 static_cast<int>(task % members), phases,
                 [&](int64_t number, int member) { phase(team, member, number); });
    }
  });
}

// Packs the recurrent weights and, if there is a projection, its weights.
template <class Weights, class Projection>
void pack_all(const Host& host, int64_t lanes, const Weights& weights,
              const Projection& projection) {
  const int64_t per_lane = weights.count + projection.count;
  // Fewer than this are packed before another thread has woken.
  const bool worthwhile = lanes * weights.count * weights.units_each * weights.k >= 1 << 16;
  parallel(host, lanes * per_lane, worthwhile, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t lane = task / per_lane, i = task % per_lane;
      if (i < weights.count)
        weights.pack(lane, i);
      else
        projection.pack(lane, i - weights.count);
    }
  });
}

// Vectors of units per gate in a panel: enough that a panel is at least two vectors wide.
constexpr int vectors_per_gate(int gates) { return gates >= 2 ? 1 : 2; }

template <class Cell, class S>
class Forward {
  using C = Compute<S>;
  using V = Vector<C>;
  static constexpr int per_gate = vectors_per_gate(Cell::gates);
  using GatePanels = Panels<C, S, Cell::gates, per_gate>;
  using PlainPanels = Panels<C, S, 1, 2>;

 public:
  Forward(const ForwardParams& p, const Host& host)
      : p(p),
        host(host),
        h_width(round_up(p.P, V::size)),
        c_width(round_up(p.H, V::size)),
        gate_panels({static_cast<const S*>(p.weight_hh), static_cast<const S*>(p.bias_hh), p.H, p.P,
                     p.H * p.P, p.P, 1}),
        projection_panels({static_cast<const S*>(p.weight_hr), nullptr, p.P, p.H, 0, p.H, 1}),
        division(p, Cell::gates, gate_panels.count, Cell::gates * p.H * p.P * sizeof(C),
                 host.threads),
        order(p, division.blocks) {
    take_all(host, *this);
  }

  void run() {
    pack_all(host, p.L, gate_panels, projection_panels);
    run_teams(host, p.L * division.blocks, division, 1 + p.T * phases_per_step(),
              [&](int64_t team, int64_t member, int64_t phase) {
                const int64_t lane = team / division.blocks, block = team % division.blocks;
                if (phase == 0) return load_initial(lane, block, member);
                const int64_t step = (phase - 1) / phases_per_step();
                if ((phase - 1) % phases_per_step() == 0)
                  cell_phase(lane, block, member, step);
                else
                  projection_phase(lane, block, member, step);
              });
  }

  void take_memory(Arena& arena) {
    gate_panels.take_memory(arena, p.L);
    projection_panels.take_memory(arena, p.L);
    h_state[0] = arena.take<C>(p.L * p.B * h_width);
    h_state[1] = arena.take<C>(p.L * p.B * h_width);
    if (Cell::has_c) c_state = arena.take<C>(p.L * p.B * c_width);
    if (p.projected) m_state = arena.take<C>(p.L * p.B * c_width);
  }

 private:
  int64_t phases_per_step() const { return p.projected ? 2 : 1; }

  C* h_row(int64_t buffer, int64_t lane, int64_t i) const {
    return h_state[buffer & 1] + (lane * p.B + i) * h_width;
  }
  C* c_row(int64_t lane, int64_t i) const { return c_state + (lane * p.B + i) * c_width; }
  C* m_row(int64_t lane, int64_t i) const { return m_state + (lane * p.B + i) * c_width; }

  // Every member loads a share of the rows, whole.
  void load_initial(int64_t lane, int64_t block, int64_t member) {
    for (int64_t i = order.begin(block) + member; i < order.end(block); i += division.members) {
      const int64_t b = order.row(i);
      for (int64_t unit = 0; unit < p.P; unit += V::size) {
        const int64_t n = p.P - unit;
        const V h = initial_state<S, V>(p, p.hx, p.h_n, p.P, lane, b, unit, n);
        // In both buffers: a row of a reverse lane may begin at any step.
        h.store(h_row(0, lane, i) + unit);
        h.store(h_row(1, lane, i) + unit);
      }
      if constexpr (Cell::has_c)
        for (int64_t unit = 0; unit < p.H; unit += V::size)
          initial_state<S, V>(p, p.cx, p.c_n, p.H, lane, b, unit, p.H - unit)
              .store(c_row(lane, i) + unit);
    }
  }

  void cell_phase(int64_t lane, int64_t block, int64_t member, int64_t step) {
    const int64_t t = time_of_step(p, lane, step);
    const int64_t begin = order.begin(block), rows = order.active_end(block, t) - begin;
    const C* h = h_row(step, lane, begin);
    for (int64_t i = gate_panels.count * member / division.members;
         i < gate_panels.count * (member + 1) / division.members; ++i)
      for_each_tile<C, GatePanels::W>(
          h, h_width, rows, p.P, gate_panels.panel(lane, i), gate_panels.panel_bias(lane, i),
          [&](int64_t first, int height, const C* tile) {
            for (int r = 0; r < height; ++r, tile += GatePanels::W * V::size)
              cell_row(lane, begin + first + r, t, step, i * GatePanels::units_each, tile);
          });
  }

  HOST_DEVICE void cell_row(int64_t lane, int64_t i, int64_t t, int64_t step, int64_t first_unit,
                            const C* tile) {
    const RowStep row = row_step(p, lane, order.row(i), t);
    for (int v = 0; v < per_gate; ++v) {
      const int64_t unit = first_unit + v * V::size;
      if (unit >= p.H) break;
      V hidden_gates[Cell::gates];
      for (int g = 0; g < Cell::gates; ++g)
        hidden_gates[g] = V::load(tile + (g * per_gate + v) * V::size);
      forward_units<Cell, S>(p, row, unit, p.H - unit, hidden_gates, h_row(step, lane, i) + unit,
                             Cell::has_c ? c_row(lane, i) + unit : nullptr,
                             p.projected ? m_row(lane, i) + unit : h_row(step + 1, lane, i) + unit);
    }
  }

  void projection_phase(int64_t lane, int64_t block, int64_t member, int64_t step) {
    const int64_t t = time_of_step(p, lane, step);
    const int64_t begin = order.begin(block), rows = order.active_end(block, t) - begin;
    for (int64_t i = projection_panels.count * member / division.members;
         i < projection_panels.count * (member + 1) / division.members; ++i)
      for_each_tile<C, PlainPanels::W>(
          m_row(lane, begin), c_width, rows, p.H, projection_panels.panel(lane, i), nullptr,
          [&](int64_t first, int height, const C* tile) {
            for (int r = 0; r < height; ++r, tile += PlainPanels::W * V::size) {
              const int64_t at = begin + first + r;
              const RowStep row = row_step(p, lane, order.row(at), t);
              for (int v = 0; v < PlainPanels::W; ++v) {
                const int64_t unit = i * PlainPanels::units_each + v * V::size;
                if (unit >= p.P) break;
                emit_hidden<S>(p, row, unit, p.P - unit, V::load(tile + v * V::size),
                               h_row(step + 1, lane, at) + unit);
              }
            }
          });
  }

  const ForwardParams& p;
  const Host& host;
  const int64_t h_width, c_width;
  GatePanels gate_panels;
  PlainPanels projection_panels;
  const Division division;
  const RowOrder order;
  C* h_state[2] = {};  // [lane][row in order][h_width]: what the next product reads, and the other
  C* c_state = nullptr;  // [lane][row in order][c_width]
  C* m_state = nullptr;  // [lane][row in order][c_width]: h before the projection
};

template <class Cell, class S>
class Backward {
  using C = Compute<S>;
  using V = Vector<C>;
  using PlainPanels = Panels<C, S, 1, 2>;
  static constexpr int W = PlainPanels::W;

 public:
  Backward(const BackwardParams& p, const Host& host)
      : p(p),
        host(host),
        gates_width(round_up(Cell::gates * p.H, V::size)),
        h_width(round_up(p.P, V::size)),
        c_width(round_up(p.H, V::size)),
        hidden_panels(
            {static_cast<const S*>(p.weight_hh), nullptr, p.P, Cell::gates * p.H, 0, 1, p.P}),
        projection_panels({static_cast<const S*>(p.weight_hr), nullptr, p.H, p.P, 0, 1, p.H}),
        division(p, Cell::gates, hidden_panels.count, Cell::gates * p.H * p.P * sizeof(C),
                 host.threads),
        order(p, division.blocks) {
    take_all(host, *this);
  }

  void run() {
    pack_all(host, p.L, hidden_panels, projection_panels);
    run_teams(host, p.L * division.blocks, division, 2 + p.T * phases_per_step(),
              [&](int64_t team, int64_t member, int64_t phase) {
                const int64_t lane = team / division.blocks, block = team % division.blocks;
                if (phase == 0) return load_final(lane, block, member);
                const int64_t step = (phase - 1) / phases_per_step();
                if (step == p.T) return finish(lane, block, member);
                if ((phase - 1) % phases_per_step() == 0)
                  hidden_phase(lane, block, member, step);
                else
                  projection_phase(lane, block, member, step);
              });
  }

  void take_memory(Arena& arena) {
    hidden_panels.take_memory(arena, p.L);
    projection_panels.take_memory(arena, p.L);
    d_gates_state[0] = arena.take<C>(p.L * p.B * gates_width);
    d_gates_state[1] = arena.take<C>(p.L * p.B * gates_width);
    d_h_state = arena.take<C>(p.L * p.B * h_width);
    if (Cell::has_c) d_c_state = arena.take<C>(p.L * p.B * c_width);
    if (p.projected) d_output_state = arena.take<C>(p.L * p.B * h_width);
  }

 private:
  int64_t phases_per_step() const { return p.projected ? 2 : 1; }

  C* gates_row(int64_t buffer, int64_t lane, int64_t i) const {
    return d_gates_state[buffer & 1] + (lane * p.B + i) * gates_width;
  }
  C* h_row(int64_t lane, int64_t i) const { return d_h_state + (lane * p.B + i) * h_width; }
  C* c_row(int64_t lane, int64_t i) const { return d_c_state + (lane * p.B + i) * c_width; }
  C* output_row(int64_t lane, int64_t i) const {
    return d_output_state + (lane * p.B + i) * h_width;
  }

  void load_final(int64_t lane, int64_t block, int64_t member) {
    for (int64_t i = order.begin(block) + member; i < order.end(block); i += division.members) {
      const int64_t b = order.row(i);
      memset(gates_row(0, lane, i), 0, gates_width * sizeof(C));
      memset(gates_row(1, lane, i), 0, gates_width * sizeof(C));
      load_gradient(p.grad_h_n, p.P, lane, b, h_row(lane, i));
      if constexpr (Cell::has_c) load_gradient(p.grad_c_n, p.H, lane, b, c_row(lane, i));
    }
  }

  void load_gradient(const void* from, int64_t width, int64_t lane, int64_t b, C* to) {
    for (int64_t unit = 0; unit < width; unit += V::size)
      load_or_zero<V>(from ? state_at<S>(from, p.B, width, lane, b) + unit : nullptr, width - unit)
          .store(to + unit);
  }

  // For `rows` rows from `first`, the gradient that the gates in `buffer` send to h, panel by panel:
  // each(row in order, unit, product).
  template <class Each>
  HOST_DEVICE void hidden_product(int64_t lane, int64_t member, int64_t buffer, int64_t first,
                                  int64_t rows, const Each& each) {
    for (int64_t i = hidden_panels.count * member / division.members;
         i < hidden_panels.count * (member + 1) / division.members; ++i)
      for_each_panel_unit(gates_row(buffer, lane, first), gates_width, rows, hidden_panels, lane, i,
                          p.P, first, each);
  }

  template <class Each>
  HOST_DEVICE void for_each_panel_unit(const C* a, int64_t a_stride, int64_t rows,
                                       const PlainPanels& panels, int64_t lane, int64_t i,
                                       int64_t units, int64_t first_row, const Each& each) {
    for_each_tile<C, W>(a, a_stride, rows, panels.k, panels.panel(lane, i), nullptr,
                        [&](int64_t first, int height, const C* tile) {
                          for (int r = 0; r < height; ++r, tile += W * V::size)
                            for (int v = 0; v < W; ++v) {
                              const int64_t unit = i * PlainPanels::units_each + v * V::size;
                              if (unit >= units) break;
                              each(first_row + first + r, unit, V::load(tile + v * V::size));
                            }
                        });
  }

  HOST_DEVICE void cell_units(const RowStep& row, int64_t step, int64_t i, int64_t unit, V d_h) {
    backward_units<Cell, S>(p, row, unit, p.H - unit, d_h, h_row(row.lane, i) + unit,
                            Cell::has_c ? c_row(row.lane, i) + unit : nullptr,
                            gates_row(step + 1, row.lane, i) + unit);
  }

  void hidden_phase(int64_t lane, int64_t block, int64_t member, int64_t step) {
    const int64_t t = time_of_step(p, lane, p.T - 1 - step);
    const int64_t begin = order.begin(block);
    hidden_product(lane, member, step, begin, order.active_end(block, t) - begin,
                   [&](int64_t i, int64_t unit, V product) {
                     const RowStep row = row_step(p, lane, order.row(i), t);
                     const V d_h = collect_d_hidden<S>(p, row, unit, p.P - unit, product,
                                                       h_row(lane, i) + unit);
                     if (p.projected)
                       d_h.store(output_row(lane, i) + unit);
                     else
                       cell_units(row, step, i, unit, d_h);
                   });
  }

  void projection_phase(int64_t lane, int64_t block, int64_t member, int64_t step) {
    const int64_t t = time_of_step(p, lane, p.T - 1 - step);
    const int64_t begin = order.begin(block), rows = order.active_end(block, t) - begin;
    for (int64_t i = projection_panels.count * member / division.members;
         i < projection_panels.count * (member + 1) / division.members; ++i)
      for_each_panel_unit(output_row(lane, begin), h_width, rows, projection_panels, lane, i, p.H,
                          begin, [&](int64_t at, int64_t unit, V d_h) {
                            cell_units(row_step(p, lane, order.row(at), t), step, at, unit, d_h);
                          });
  }

  // What is left at the beginning of every row is the gradient of its initial state.
  void finish(int64_t lane, int64_t block, int64_t member) {
    const int64_t begin = order.begin(block), end = order.end(block);
    const auto store_d_hx = [&](int64_t i, int64_t unit, V product) {
      const V d_h = product + V::load(h_row(lane, i) + unit);
      Memory<V>::store(d_h, state_at<S>(p.d_hx, p.B, p.P, lane, order.row(i)) + unit, p.P - unit);
    };
    if (is_reverse(p, lane) && p.lengths) {
      // Rows of a reverse lane ended after as many steps as they are long, in either buffer.
      for (int64_t i = begin; i < end; ++i)
        hidden_product(lane, member, p.lengths[order.row(i)], i, 1, store_d_hx);
    } else {
      hidden_product(lane, member, p.T, begin, end - begin, store_d_hx);
    }
    if constexpr (Cell::has_c)
      for (int64_t i = begin + member; i < end; i += division.members)
        for (int64_t unit = 0; unit < p.H; unit += V::size)
          Memory<V>::store(V::load(c_row(lane, i) + unit),
                           state_at<S>(p.d_cx, p.B, p.H, lane, order.row(i)) + unit, p.H - unit);
  }

  const BackwardParams& p;
  const Host& host;
  const int64_t gates_width, h_width, c_width;
  PlainPanels hidden_panels;
  PlainPanels projection_panels;
  const Division division;
  const RowOrder order;
  C* d_gates_state[2] = {};     // [lane][row in order][gates_width]
  C* d_h_state = nullptr;       // [lane][row in order][h_width]: passed on to h directly
  C* d_c_state = nullptr;       // [lane][row in order][c_width]
  C* d_output_state = nullptr;  // [lane][row in order][h_width]: d_h before the projection
};
