// The persistent_grid engine: persistent.cuh, handing over by words through L2.
#include "persistent.cuh"

namespace fused_rnn::cuda {
namespace {

template <class Cell, class Product>
constexpr Run<RecurrenceForwardParams> forward_of() {
  if constexpr (Cell::late_gate)
    return nullptr;
  else
    return forward<Cell, Product, GridStates>;
}

template <class Cell, class Product>
constexpr Run<RecurrenceBackwardParams> backward_of() {
  if constexpr (Cell::late_gate)
    return nullptr;
  else
    return backward<Cell, Product, GridSums, 1>;
}

#define FUSED_RNN_FORWARD(name, cell) FUSED_RNN_PRODUCTS(forward_of, cell)
#define FUSED_RNN_BACKWARD(name, cell) FUSED_RNN_PRODUCTS(backward_of, cell)

constexpr Run<RecurrenceForwardParams> forward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
constexpr Run<RecurrenceBackwardParams> backward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};

}  // namespace

void run_persistent_grid(CellId cell, const RecurrenceForwardParams& p, const Layout& layout,
                         const Host& host) {
  forward_table[cell.index][product_index(p.dtype, layout)](p, layout, host);
}

void run_persistent_grid(CellId cell, const RecurrenceBackwardParams& p, const Layout& layout,
                         const Host& host) {
  backward_table[cell.index][product_index(p.dtype, layout)](p, layout, host);
}

}  // namespace fused_rnn::cuda
