#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "launch.h"

namespace fused_rnn::cuda {
namespace {

// What steps are made of, in cycles of a multiprocessor and bytes per cycle. From microbenchmarks by others
// and arithmetic; none of it has been fitted to runs of these engines.
struct Costs {
  double mma = 6.6;  // of a quarter of a multiprocessor: m16n8k16 of half types, or m16n8k8 of TF32
  double exact = 64;          // of a quarter: a piece by multiply-adds
  double shared = 128;        // bytes per cycle
  double cell = 300;          // sync, sums, cell, stores
  double cluster = 450;       // from handing over to arrival, in a cluster
  double cluster_bytes = 24;  // per cycle and block
  double grid = 1200;         // through L2
  double grid_bytes = 48;     // per cycle and block
  double l2_bytes = 3000;     // per cycle, all blocks
  double launch = 2.3;        // microseconds of a small kernel in a stream
  double memory = 3.0e6;      // bytes per microsecond that a product reads weights with
  double flops = 250e6;       // per microsecond that a large product does
  double begin = 15;  // microseconds until a recurrence is at its first step, products included
  double host = 150;  // microseconds that Python and launches take around each
};

bool has_mma(const Task& task) {
  return task.dtype == DType::float32 || task.dtype == DType::bfloat16 ||
         task.dtype == DType::float16;
}

int resident_of(const Task& task) {
  return task.dtype == DType::float32 && !task.tf32 ? resident_pieces_exact : resident_pieces;
}

int storage_of(const Task& task) { return task.dtype == DType::float32 ? 4 : 2; }

size_t bytes_of(const Task& task, const Layout& layout) {
  const int storage = storage_of(task), resident = resident_of(task);
  return task.backward
             ? BackwardPlaces(layout, task.gates, task.unit_weights, storage, resident).bytes
             : ForwardPlaces(layout, task.gates, storage, task.H, resident).bytes;
}

// Microseconds per timestep, all of the batch.
double predict(const Task& task, const Chip& chip, const Layout& layout) {
  const Costs costs;
  const bool cluster = layout.engine == Engine::persistent_cluster;
  const int storage = storage_of(task), resident = resident_of(task);
  const double sums = 512;  // bytes of a unit block's sums
  double pieces, in_shared, shared_bytes, handed_over;
  if (task.backward) {
    const int64_t slices =
        slices_of(int64_t(task.gates) * layout.unit_blocks * unit_block, storage);
    const int64_t blocks = ceil_div(int64_t(layout.team) * layout.unit_blocks, team_warps);
    const int64_t kept = resident_tiles(static_cast<int>(slices), resident);
    pieces = static_cast<double>(blocks * slices);
    in_shared = static_cast<double>(std::max<int64_t>(blocks - kept, 0) * slices);
    shared_bytes = team_warps * (static_cast<double>(blocks) * slices * slice_columns_bytes / 2);
    handed_over = layout.team * layout.unit_blocks * sums * (cluster ? 1 : 4.0 / 3);
  } else {
    const int64_t slices = ceil_div(slices_of(task.H, storage), team_warps / layout.unit_blocks);
    const int64_t kept = resident_slices(task.gates, resident);
    pieces = static_cast<double>(slices * task.gates);
    in_shared = static_cast<double>(std::max<int64_t>(slices - kept, 0) * task.gates);
    shared_bytes =
        team_warps * (static_cast<double>(slices) * slice_columns_bytes + 2 * task.gates * sums);
    handed_over = static_cast<double>(layout.team) * layout.unit_blocks * pairs_of_block * storage *
                  (cluster ? 1 : 4.0 / 3);
  }
  const double quarter = team_warps / 4.0;
  const double arithmetic =
      pieces * quarter * (task.dtype == DType::float32 && !task.tf32 ? costs.exact : 2 * costs.mma);
  shared_bytes += in_shared * team_warps * piece_bytes;
  const double busy = std::max(arithmetic, shared_bytes / costs.shared) + costs.cell;
  const double waiting =
      cluster ? costs.cluster + handed_over / costs.cluster_bytes
              : costs.grid + std::max(handed_over / costs.grid_bytes,
                                      handed_over * layout.team * layout.teams / costs.l2_bytes);
  const double step = std::max(layout.tiles * busy, busy + waiting);
  const int64_t waves = ceil_div(task.L * layout.groups, layout.teams);
  return step * waves / (chip.gigahertz * 1e3);
}

Candidate per_step(const Task& task) {
  const Costs costs;
  const double weights = double(task.L) * task.gates * task.H * task.H * storage_of(task);
  const double flops = 2.0 * task.L * task.gates * task.H * task.H * task.B;
  const double product = std::max({costs.launch, weights / costs.memory, flops / costs.flops});
  const bool modelled = has_mma(task) && !task.needs;
  return {{Engine::per_step, task.tf32, 1, 1, 1, 1, 1},
          true,
          task.needs ? std::string("the only engine with ") + task.needs
                     : "a product and a kernel for each timestep",
          modelled ? product + costs.launch : 0,
          0,
          1};
}

Candidate impossible(const Task& task, Engine engine, const std::string& why) {
  return {{engine, task.tf32, 1, 1, 1, 1, 1}, false, why, 0, 0, 0};
}

std::string describe(const Task& task, const Layout& layout) {
  char text[160];
  std::snprintf(
      text, sizeof(text),
      "%d %s of %d blocks, %d units each, %d tile%s of 8 rows in turns, %zu KB of shared memory",
      layout.teams, layout.teams == 1 ? "team" : "teams", layout.team,
      layout.unit_blocks * unit_block, layout.tiles, layout.tiles == 1 ? "" : "s",
      bytes_of(task, layout) / 1024);
  return text;
}

// The best layout over those that `teams_of` allows so many teams of, 0 for none.
template <class TeamsOf>
Candidate best(const Task& task, const Chip& chip, Engine engine, const std::vector<int>& sizes,
               const TeamsOf& teams_of, const std::string& too_large) {
  Candidate found = impossible(task, engine, too_large);
  const int64_t blocks = ceil_div(task.H, unit_block);
  const int64_t tiles = ceil_div(task.B, tile_rows);
  for (const int team : sizes) {
    const int64_t unit_blocks = ceil_div(blocks, team);
    if (unit_blocks > max_unit_blocks) continue;
    for (const int in_turns : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}) {
      if (in_turns > tiles) break;
      Layout layout{engine,
                    task.tf32,
                    team,
                    static_cast<int>(unit_blocks),
                    in_turns,
                    1,
                    static_cast<int>(ceil_div(tiles, in_turns))};
      const int64_t teams = std::min<int64_t>(teams_of(team), task.L * layout.groups);
      if (teams == 0 || bytes_of(task, layout) > chip.shared_bytes) continue;
      layout.teams = static_cast<int>(teams);
      const double time = predict(task, chip, layout);
      if (!found.possible || time < found.microseconds_per_step)
        found = {layout, true, "", time, 0, 1};
    }
  }
  if (found.possible) {
    found.why = describe(task, found.layout);
    found.shared_bytes = bytes_of(task, found.layout);
  }
  return found;
}

std::string number(int64_t value) { return std::to_string(value); }

Candidate cluster(const Task& task, const Chip& chip) {
  std::vector<int> sizes;
  for (int i = 0; i < cluster_size_count; ++i)
    if (chip.clusters[i] > 0) sizes.push_back(cluster_sizes[i]);
  const auto teams_of = [&](int team) {
    for (int i = 0; i < cluster_size_count; ++i)
      if (cluster_sizes[i] == team) return chip.clusters[i];
    return 0;
  };
  const std::string why = "the recurrent matrix of " + number(task.gates * task.H) + " x " +
                          number(task.H) + " does not fit into a cluster of " +
                          number(sizes.empty() ? 0 : sizes.back()) + " blocks";
  Candidate found = best(task, chip, Engine::persistent_cluster, sizes, teams_of, why);
  if (found.possible) found.side_by_side = teams_of(found.layout.team) / found.layout.teams;
  return found;
}

Candidate grid(const Task& task, const Chip& chip) {
  const int64_t team = ceil_div(task.H, unit_block);
  const auto teams_of = [&](int size) { return chip.multiprocessors / size; };
  const std::string why = "the recurrent matrix of " + number(task.gates * task.H) + " x " +
                          number(task.H) + " does not fit into " + number(chip.multiprocessors) +
                          " multiprocessors";
  if (team > chip.multiprocessors) return impossible(task, Engine::persistent_grid, why);
  return best(task, chip, Engine::persistent_grid, {static_cast<int>(team)}, teams_of, why);
}

// Why a task is per_step's whatever its size; empty if it is not.
std::string refused(const Task& task, const Chip& chip, Engine engine) {
  if (task.needs) return std::string("there is ") + task.needs;
  if (!has_mma(task)) return "the dtype is neither float32 nor a half type";
  if (task.T >= int64_t(1) << 31 || task.L * task.B >= int64_t(1) << 31)
    return "T or B is beyond 2^31";
  if (task.T == 0) return "there are no timesteps";
  if (task.L * task.B == 0) return "there are no rows";
  if (engine == Engine::persistent_cluster && chip.capability < 90)
    return "clusters need compute capability 9.0, this chip has " + number(chip.capability / 10) +
           "." + number(chip.capability % 10);
  if (chip.capability < 80) return "mma needs compute capability 8.0";
  if (engine == Engine::persistent_grid && !chip.cooperative)
    return "cooperative launches are not possible here";
  return "";
}

// As a layout has it, whole units of which the last one may have begun.
unsigned patience(const Chip& chip) {
  double seconds = 10;
  if (const char* given = std::getenv("FUSED_RNN_CUDA_WATCHDOG"); given && *given) {
    char* end = nullptr;
    seconds = std::strtod(given, &end);
    if (*end || !(seconds >= 0 && seconds <= 86400))
      throw std::invalid_argument(
          std::string("Expected FUSED_RNN_CUDA_WATCHDOG to be seconds within 0..86400, got ") +
          given);
  }
  return static_cast<unsigned>(std::ceil(seconds * chip.gigahertz * 1e9 / clock_unit));
}

}  // namespace

const std::vector<NamedChip>& named_chips() {
  constexpr size_t kb = 1024;
  static const std::vector<NamedChip> chips{
      {"A100", {80, 108, 163 * kb, {0, 0, 0, 0}, true, 1.41}},
      {"H100", {90, 132, 227 * kb, {66, 32, 16, 7}, true, 1.755}},
      {"H200", {90, 132, 227 * kb, {66, 32, 16, 7}, true, 1.98}},
      {"B200", {100, 148, 227 * kb, {74, 36, 18, 8}, true, 1.85}},
  };
  return chips;
}

std::vector<Candidate> candidates(const Task& task, const Chip& chip, const char* engine) {
  std::vector<Candidate> all{per_step(task)};
  for (const Engine each : {Engine::persistent_cluster, Engine::persistent_grid}) {
    const std::string why = refused(task, chip, each);
    if (!why.empty())
      all.push_back(impossible(task, each, why));
    else
      all.push_back(each == Engine::persistent_cluster ? cluster(task, chip) : grid(task, chip));
  }
  std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
    if (a.possible != b.possible) return a.possible;
    return a.possible && a.microseconds_per_step < b.microseconds_per_step;
  });
  if (!engine || !*engine) return all;
  const auto forced = std::find_if(all.begin(), all.end(), [&](const Candidate& candidate) {
    return std::string(engine) == engine_names[static_cast<int>(candidate.layout.engine)];
  });
  if (forced == all.end())
    throw std::invalid_argument(
        std::string("Expected FUSED_RNN_CUDA_ENGINE to be per_step, persistent_cluster or "
                    "persistent_grid, got ") +
        engine);
  if (task.needs || task.T == 0) return all;
  if (!forced->possible)
    throw std::invalid_argument(std::string("FUSED_RNN_CUDA_ENGINE is ") + engine +
                                ", which cannot take this: " + forced->why);
  forced->why = "forced by FUSED_RNN_CUDA_ENGINE: " + forced->why;
  std::rotate(all.begin(), forced, forced + 1);
  return all;
}

Layout choose(const Task& task, const Chip& chip, const char* engine) {
  Layout layout = candidates(task, chip, engine).front().layout;
  layout.patience = patience(chip);
  return layout;
}

Wavefront wavefront(Task task, int layers, bool training, bool captured, const Chip& chip,
                    const char* engine) {
  const Costs costs;
  double step = 0;
  int room = layers;
  for (const bool backward : {false, true}) {
    if (backward && !training) break;
    task.backward = backward;
    const Candidate taken = candidates(task, chip, engine).front();
    if (taken.microseconds_per_step == 0) return {1, 0, 0};
    step += taken.microseconds_per_step;
    room = std::min(room, taken.side_by_side);
  }
  const int passes = training ? 2 : 1;
  const auto predicted = [&](int parts) {
    // One after the other a part of every layer; with room for fewer, so many at a time.
    const double rounds = std::max(layers + parts - 1.0, std::ceil(double(layers) * parts / room));
    const double on_chip = rounds * (step * double(ceil_div(task.T, parts)) + passes * costs.begin);
    return captured ? on_chip : std::max(on_chip, passes * costs.host * layers * parts);
  };
  Wavefront found{1, predicted(1), predicted(1)};
  for (const int parts : {2, 4, 8, 16, 32}) {
    // Not for little: none of this has been measured.
    if (predicted(parts) < std::min(0.9 * found.in_one_part, found.microseconds))
      found = {parts, predicted(parts), found.in_one_part};
  }
  return found;
}

}  // namespace fused_rnn::cuda
