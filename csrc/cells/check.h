// A cell run on values that know what they were made of, and nothing else: says where it reads what it is
// not given, sets what is not its own, or leaves out what it has to set (cell.h). An engine finds arrays of
// exactly as many values as the constants say, and what lies beyond them is other memory.
//
// load_cell compiles this for the host, and runs it, before the engines; test_cells.py for all cells.
#pragma once

#include <cstdio>
#include <type_traits>

#include "cell.h"

namespace fused_rnn::check {

// What a value was made of and should not have been, or null. Of several faults the first counts.
struct Origin {
  const char* fault;
};
inline Origin either(Origin a, Origin b) { return a.fault ? a : b; }

// What a comparison gives.
struct Condition : Origin {
  friend Condition operator&(Condition a, Condition b) { return {either(a, b)}; }
  friend Condition operator|(Condition a, Condition b) { return {either(a, b)}; }
  friend Condition operator^(Condition a, Condition b) { return {either(a, b)}; }
  friend Condition operator!(Condition a) { return a; }
};

// Stands for the value type of a cell. All value types can do what it can.
struct Value : Origin {
  Value() : Origin{"a value that was never set"} {}
  explicit Value(Origin origin) : Origin(origin) {}
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  explicit Value(Number) : Origin{nullptr} {}

  friend Value operator+(Value a, Value b) { return Value(either(a, b)); }
  friend Value operator-(Value a, Value b) { return Value(either(a, b)); }
  friend Value operator*(Value a, Value b) { return Value(either(a, b)); }
  friend Value operator/(Value a, Value b) { return Value(either(a, b)); }
  friend Value operator-(Value a) { return a; }
  friend Condition operator<(Value a, Value b) { return {either(a, b)}; }
  friend Condition operator>(Value a, Value b) { return {either(a, b)}; }
  friend Condition operator<=(Value a, Value b) { return {either(a, b)}; }
  friend Condition operator>=(Value a, Value b) { return {either(a, b)}; }
  friend Condition operator==(Value a, Value b) { return {either(a, b)}; }
  friend Condition operator!=(Value a, Value b) { return {either(a, b)}; }
  friend Value where(Condition c, Value a, Value b) { return Value(either(c, either(a, b))); }
  friend Value exp(Value x) { return x; }
  friend Value tanh(Value x) { return x; }
  friend Value log(Value x) { return x; }
  friend Value sqrt(Value x) { return x; }
};

// Lives as long as the program, as values do.
template <class... Arguments>
const char* words(const char* format, Arguments... arguments) {
  char* const text = new char[256];
  std::snprintf(text, 256, format, arguments...);
  return text;
}

inline const Value given(0);
inline Value fault(const char* why) { return Value(Origin{why}); }

// Whether a state may be read; `why` not.
inline Value given_if(bool may, const char* why) { return may ? given : fault(why); }

// N values, or none yet, and what a cell must not touch beyond them.
template <int N>
struct Values {
  static constexpr int beyond = 16;
  const char* const name;
  Value at[N + beyond], untouched[N + beyond];

  Values(const char* name, const char* constant, bool set) : name(name) {
    for (int i = 0; i < N + beyond; ++i) {
      if (i >= N)
        at[i] = fault(words("%s[%d], where %s = %d", name, i, constant, N));
      else if (set)
        at[i] = given;
    }
    keep();
  }
  void forbid(int i, const char* why) { at[i] = fault(words("%s[%d], %s", name, i, why)); }
  // From here on a change is the cell's.
  void keep() {
    for (int i = 0; i < N + beyond; ++i) untouched[i] = at[i];
  }
  bool changed(int i) const { return at[i].fault != untouched[i].fault; }
};

template <class Cell>
class Check {
  static constexpr int G = Cell::gates, S = Cell::saved, U = Cell::unit_weights;
  static constexpr int first = Cell::late_gate ? 1 : 0;  // gate whose gradient backward makes
  using Gates = Values<G>;
  using Saved = Values<S>;
  using Weights = Values<U>;

 public:
  // How many faults were found, each of them a line of standard output.
  static int run(const char* name) {
    Check check{name};
    check.forward();
    check.backward();
    if constexpr (Cell::has_c) check.halves();
    return check.faults_;
  }

 private:
  explicit Check(const char* name) : name_(name) {}

  void complain(const char* function, const char* what) {
    std::printf("%s::%s %s\n", name_, function, what);
    ++faults_;
  }
  // A value that the engine takes from the cell.
  void expect(const char* function, const char* what, Value value) {
    if (value.fault) complain(function, words("makes %s of %s", what, value.fault));
  }
  // Likewise those from `begin` to `end`; and nothing but these is there for it to set.
  template <int N>
  void expect(const char* function, const Values<N>& values, int begin, int end) {
    for (int i = 0; i < N + Values<N>::beyond; ++i) {
      if (i >= N && values.changed(i))
        complain(function, words("sets %s", values.untouched[i].fault));
      else if (i < N && (i < begin || i >= end) && values.changed(i) && !values.at[i].fault)
        complain(function, words("sets %s[%d], which is not its own", values.name, i));
      else if (i >= begin && i < end)
        expect(function, words("%s[%d]", values.name, i), values.at[i]);
    }
  }

  static State<Value> before() {
    return {given_if(Cell::reads_prev_h, "prev.h, where reads_prev_h = false"),
            given_if(Cell::has_c, "prev.c, where has_c = false")};
  }
  // For the early gates of a cell with a late one, which are always given h.
  static State<Value> before_early() { return {given, fault("prev.c, where has_c = false")}; }
  static Saved saved(bool set) { return {"saved", "saved", set}; }
  static Gates gates(const char* name, bool set) { return {name, "gates", set}; }
  static Weights weights(const char* name, bool set) { return {name, "unit_weights", set}; }

  void forward() {
    Gates input = gates("input_gates", true), hidden = gates("hidden_gates", true);
    Gates* const both[] = {&input, &hidden};
    const Weights own = weights("weights", true);
    Saved kept = saved(false);
    if constexpr (Cell::late_gate) {
      for (Gates* of : both) of->forbid(G - 1, "which waits for forward_early");
      Cell::forward_early(input.at, hidden.at, kept.at);
      expect("forward_early", kept, 0, G - 1);
      for (int i = G - 1; i < S; ++i) kept.forbid(i, "which forward has yet to set");
      expect("read", "its result", Cell::read(kept.at, before_early()));
      for (Gates* of : both) {
        for (int i = 0; i < G - 1; ++i) of->forbid(i, "which forward_early was given");
        of->at[G - 1] = given;
      }
      for (int i = G - 1; i < S; ++i) kept.at[i] = Value();
      kept.keep();
    }
    State<Value> next{};
    Cell::forward(input.at, hidden.at, own.at, before(), next, kept.at);
    expect("forward", "next.h", next.h);
    if (Cell::has_c) expect("forward", "next.c", next.c);
    expect("forward", kept, 0, S);
  }

  void backward() {
    const Saved kept = saved(true);
    const Weights own = weights("weights", true);
    const State<Value> next{given_if(Cell::reads_h, "next.h, where reads_h = false"),
                            given_if(Cell::has_c, "next.c, where has_c = false")};
    const State<Value> d_next{given, given_if(Cell::has_c, "d_next.c, where has_c = false")};
    Gates d_input = gates("d_input_gates", false), d_hidden = gates("d_hidden_gates", false);
    Weights d_own = weights("d_weights", false);
    State<Value> d_prev{given, given};
    Cell::backward(kept.at, own.at, before(), next, d_next, d_input.at, d_hidden.at, d_own.at,
                   d_prev);
    expect("backward", d_input, first, G);
    expect("backward", d_hidden, first, G);
    expect("backward", d_own, 0, U);
    expect("backward", "d_prev.h", d_prev.h);
    if (Cell::has_c) expect("backward", "d_prev.c", d_prev.c);
    if constexpr (Cell::late_gate) {
      d_prev = {given, given};
      expect("backward_early", "its result",
             Cell::backward_early(kept.at, before_early(), given, d_prev));
      expect("backward_early", "d_prev.h", d_prev.h);
    }
  }

  // The halves of a cell with c.
  void halves() {
    constexpr int last = S - 1;
    const Gates input = gates("input_gates", true), hidden = gates("hidden_gates", true);
    const Weights own = weights("weights", true);
    Saved kept = saved(false);
    Value c;
    Cell::forward_c(input.at, hidden.at, own.at, before(), c, kept.at);
    expect("forward_c", "c", c);
    expect("forward_c", kept, 0, S);
    for (int i = 0; i < last; ++i) kept.forbid(i, "which is forward_c's alone");
    kept.keep();
    expect("forward_h", "its result", Cell::forward_h(own.at, given, given, kept.at));
    expect("forward_h", kept, last, S);

    const Saved all = saved(true);
    Value d_c = given, d_last_gate;
    Weights d_own = weights("d_weights", true);
    expect("backward_h", "its result",
           Cell::backward_h(all.at, own.at, given, given, given, d_c, d_last_gate, d_own.at));
    expect("backward_h", "d_c", d_c);
    expect("backward_h", "d_last_gate", d_last_gate);
    expect("backward_h", d_own, 0, U);
    Gates d_gates = gates("d_gates", false);
    d_gates.at[G - 1] = given;
    d_gates.keep();
    State<Value> d_prev{given, given};
    Cell::backward_c(all.at, own.at, before(), given, d_gates.at, d_own.at, d_prev);
    expect("backward_c", d_gates, 0, G);
    expect("backward_c", d_own, 0, U);
    expect("backward_c", "d_prev.h", d_prev.h);
    expect("backward_c", "d_prev.c", d_prev.c);
  }

  const char* const name_;
  int faults_ = 0;
};

}  // namespace fused_rnn::check
