// The persistent_cluster engine: persistent.cuh, handing over by distributed shared memory.
#include "persistent.cuh"

namespace fused_rnn::cuda {
namespace {

template <class Cell, class Product>
constexpr Run<RecurrenceForwardParams> forward_of() {
  if constexpr (Cell::late_gate)
    return nullptr;
  else
    return forward<Cell, Product, ClusterStates>;
}

template <class Cell, class Product>
void backward_by_blocks(const RecurrenceBackwardParams& p, const Layout& layout, const Host& host) {
  constexpr Run<RecurrenceBackwardParams> by_blocks[] = {backward<Cell, Product, ClusterSums, 1>,
                                                         backward<Cell, Product, ClusterSums, 2>};
  by_blocks[layout.unit_blocks - 1](p, layout, host);
}

template <class Cell, class Product>
constexpr Run<RecurrenceBackwardParams> backward_of() {
  if constexpr (Cell::late_gate)
    return nullptr;
  else
    return backward_by_blocks<Cell, Product>;
}

#define FUSED_RNN_FORWARD(name, cell) FUSED_RNN_PRODUCTS(forward_of, cell)
#define FUSED_RNN_BACKWARD(name, cell) FUSED_RNN_PRODUCTS(backward_of, cell)

constexpr Run<RecurrenceForwardParams> forward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
constexpr Run<RecurrenceBackwardParams> backward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};

}  // namespace

void run_persistent_cluster(CellId cell, const RecurrenceForwardParams& p, const Layout& layout,
                            const Host& host) {
  forward_table[cell.index][product_index(p.dtype, layout)](p, layout, host);
}

void run_persistent_cluster(CellId cell, const RecurrenceBackwardParams& p, const Layout& layout,
                            const Host& host) {
  backward_table[cell.index][product_index(p.dtype, layout)](p, layout, host);
}

}  // namespace fused_rnn::cuda
