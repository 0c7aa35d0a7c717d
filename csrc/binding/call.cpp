#include "call.h"

namespace fused_rnn::binding {
namespace {

void check_probability(const char* name, double p) {
  FUSED_RNN_EXPECT(p >= 0 && p < 1, "Expected ", name, " in [0, 1), got ", p);
}

}  // namespace

Call::Call(CellArgument cell_in, const Settings& settings, size_t own, const Options& options)
    : cell(*cell_in.traits), varied(options.has_value()) {
  FUSED_RNN_EXPECT(settings.size() == count + own, "Expected settings of ", count + own,
                   " numbers, got ", settings.size());
  has_biases = settings[0] != 0;
  projected = settings[1] != 0;
  states = settings[2];
  recurrences = settings[3];
  directions = static_cast<int>(settings[4]);
  want_cells = settings[5] != 0;
  // A unit of h before a projection has no unit of what was projected to read.
  FUSED_RNN_EXPECT((cell.has_c && !cell.reads_prev_h) || !projected,
                   "Expected projected of 0: only lstm has a projection, not ", cell.name);
  FUSED_RNN_EXPECT(states == 0 || states == 1 + cell.has_c, "Expected states of 0 or ",
                   1 + cell.has_c, " for ", cell.name, ", got ", states);
  FUSED_RNN_EXPECT(recurrences >= 1, "Expected recurrences of at least 1, got ", recurrences);
  FUSED_RNN_EXPECT(settings[4] == 1 || (settings[4] == 2 && recurrences % 2 == 0),
                   "Expected directions 1, or 2 with an even number of recurrences, got ",
                   settings[4], " with ", recurrences, " recurrences");
  FUSED_RNN_EXPECT(cell.has_c || !want_cells, "Expected want_cells to be false, since ", cell.name,
                   " has no cell state");
  if (!options) return;
  FUSED_RNN_EXPECT(options->size() == 5, "Expected options of 5 numbers, got ", options->size());
  const double norm = (*options)[0];
  FUSED_RNN_EXPECT(norm == 0 || norm == 1 || norm == 2, "Expected layer_norm of 0, 1 or 2, got ",
                   norm);
  variation = {static_cast<LayerNorm>(static_cast<int>(norm)),
               (*options)[1],
               (*options)[2],
               (*options)[3],
               (*options)[4],
               nullptr};
  check_probability("zoneout_h", variation.zoneout_h);
  check_probability("zoneout_c", variation.zoneout_c);
  check_probability("recurrent_dropout", variation.recurrent_dropout);
  FUSED_RNN_EXPECT(variation.layer_norm_eps >= 0, "Expected layer_norm_eps of at least 0, got ",
                   variation.layer_norm_eps);
  FUSED_RNN_EXPECT(layer_norm() == LayerNorm::none || !cell.late_gate,
                   "Expected layer_norm of 0, since ", cell.name,
                   " does not have all gates at one time, got ", norm);
  FUSED_RNN_EXPECT(cell.has_c || variation.zoneout_c == 0, "Expected zoneout_c of 0, since ",
                   cell.name, " has no cell state, got ", variation.zoneout_c);
}

void check_lengths(const Tensor& lengths, const Tensor& like, int64_t limit, int64_t B,
                   const char* what) {
  check_like("lengths", lengths, like, ScalarType::Long);
  check_shape("lengths", lengths, {B}, "(B)");
  if (!like.is_cpu()) return;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = static_cast<const int64_t*>(lengths.const_data_ptr())[b];
    FUSED_RNN_EXPECT(length >= 0 && length <= limit, "Expected lengths within 0..", limit, " (",
                     what, "), got lengths[", b, "] = ", length);
  }
}

const int64_t* seed_pointer(const Tensor& seed, const Tensor& like) {
  check_like("seed", seed, like, ScalarType::Long);
  check_shape("seed", seed, {}, "()");
  return static_cast<const int64_t*>(seed.const_data_ptr());
}

void check_state(const char* name, const OptionalTensor& state, const Tensor& like, int64_t L,
                 int64_t B, int64_t n, const char* letters) {
  if (!state) return;
  check_kind(name, *state, Kind(like));
  check_shape(name, *state, {L, B, n}, letters);
}

void check_no_c(const CellTraits& cell, const char* name, const OptionalTensor& argument) {
  FUSED_RNN_EXPECT(cell.has_c || !argument, "Expected ", name, " to be None, since ", cell.name,
                   " has no cell state");
}

Gradients::Gradients(const OptionalTensorList& given) {
  FUSED_RNN_EXPECT(given.size() == 4, "Expected grads of 4 tensors or None, got ", given.size());
  output = given[0];
  h_n = given[1];
  c_n = given[2];
  cells = given[3];
}

Ragged::Ragged(const OptionalTensor& lengths_in, const OptionalTensor& batch_sizes_in,
               const OptionalTensor& resets_in)
    : lengths(as_contiguous(lengths_in)),
      batch_sizes(as_contiguous(batch_sizes_in)),
      resets(as_contiguous(resets_in)) {
  FUSED_RNN_EXPECT(!lengths || !batch_sizes,
                   "Expected lengths to be None, since batch_sizes say the same");
}

static const OptionalTensorList& of_four(const OptionalTensorList& given) {
  FUSED_RNN_EXPECT(given.size() == 4, "Expected rest of 4 tensors or None, got ", given.size());
  return given;
}

Rest::Rest(const OptionalTensorList& given)
    : ragged(of_four(given)[0], given[1], given[2]), seed(given[3]) {}

void Ragged::fill(const Tensor& like, Shape& p) {
  if (lengths) check_lengths(*lengths, like, p.T, p.B, "the timesteps of input");
  if (resets) {
    check_like("resets", *resets, like, ScalarType::Bool);
    check_shape("resets", *resets, {p.T, p.B}, "(T, B)");
  }
  p.lengths = static_cast<const int64_t*>(pointer(lengths));
  p.resets = static_cast<const bool*>(pointer(resets));
}

void fill(const Call& call, const OptionalTensor& seed, const Tensor& like, Shape& p) {
  p.L = call.recurrences;
  p.directions = call.directions;
  p.projected = call.projected;
  if (!call.varied) return;
  FUSED_RNN_EXPECT(seed || call.variation.recurrent_dropout == 0,
                   "Expected recurrent_dropout of 0, since there is no seed, got ",
                   call.variation.recurrent_dropout);
  p.variation = call.variation;
  p.variation.seed = seed ? seed_pointer(*seed, like) : nullptr;
}

}  // namespace fused_rnn::binding
