// Which CUDA engine a recurrence takes, and how it is laid out over the chip: a small cost model, with
// constants per chip, decides. No torch and no CUDA, so that any machine can be asked about any chip.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../params.h"
#include "persistent.h"

namespace fused_rnn::cuda {

// Thread blocks of a cluster. Not one: there the st.async that hands over is undefined (PTX ISA, st.async:
// "%cluster_nctarank > 1 is true").
constexpr int cluster_sizes[] = {2, 4, 8, 16};
constexpr int cluster_size_count = 4;

// What a plan knows of a GPU.
struct Chip {
  int capability;  // 90 for sm_90
  int multiprocessors;
  size_t shared_bytes;               // that a thread block may have
  int clusters[cluster_size_count];  // whose blocks take all of that: how many fit
  bool cooperative;                  // launches
  double gigahertz;
};

// GPUs that a plan can be made for where there is none. Sizes and clocks are those of data sheets; how
// many clusters fit is assumed, not measured.
struct NamedChip {
  const char* name;
  Chip chip;
};
const std::vector<NamedChip>& named_chips();

// A recurrence, as far as the choice depends on it.
struct Task {
  int gates, unit_weights;
  DType dtype;
  int64_t T, B, L, H;
  bool tf32;  // whether float32 products may round
  bool backward;
  const char* needs;  // what only per_step has, or null
};

// An engine considered: how it would run, or why it can't.
struct Candidate {
  Layout layout;
  bool possible;
  std::string why;               // not, or else what the time is made of
  double microseconds_per_step;  // predicted; 0 where the model has nothing to say
  size_t shared_bytes;           // of each thread block; 0 in per_step
  int side_by_side;              // how many such recurrences the chip has room for
};

// All engines, the one that is taken first: the fastest, or `engine` unless that is null or empty. What
// only per_step has it takes, whatever `engine` says; else throws std::invalid_argument where `engine`
// can't take the task.
std::vector<Candidate> candidates(const Task& task, const Chip& chip, const char* engine);

// How the first of them runs. A thread's patience with a hand-over is 10 seconds, or as many as
// FUSED_RNN_CUDA_WATCHDOG says, 0 for no end; throws std::invalid_argument where that is no such number.
Layout choose(const Task& task, const Chip& chip, const char* engine);

// How a stack of layers runs (fused_rnn/stack.py): in parts of time, as a wavefront, or in one.
struct Wavefront {
  int parts;
  double microseconds,
      in_one_part;  // predicted, of the whole stack; 0 where there is no prediction
};

// `training`: forward and backward. `captured` into a CUDA graph: no host slows its launches down.
Wavefront wavefront(Task task, int layers, bool training, bool captured, const Chip& chip,
                    const char* engine);

// The current device.
Chip chip_at_hand();

constexpr const char* engine_names[] = {"per_step", "persistent_cluster", "persistent_grid"};

}  // namespace fused_rnn::cuda
