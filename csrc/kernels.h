// The whole native API: argument structs and launchers. No torch, no pybind, no CUDA headers.
//
// Tensors are raw pointers to contiguous memory on the launcher's device; outputs and workspace are
// allocated by the caller and fully written. Rows: the first `pairs` rows are winners, the next are
// losers; a single member has rows == pairs. Row r belongs to pair r % pairs and reads prediction
// row r % pred_rows, so one prediction can serve both members (SPO: pred_rows == pairs).
// Sums: fp32 squares within a thread or lane, float64 across them, in a fixed order over chunks of
// kChunk elements whatever the number of threads or blocks. Nothing here allocates or synchronises.
#pragma once
#include <cstdint>

namespace fastpref {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t kChunk = 8192;
constexpr int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

struct Shape {
  int64_t rows, pairs, pred_rows, elements;  // elements per row
};

// One number sequence per pair: eps = normals(seed, pair_id[pair], index[pair]).
struct Draws {
  uint64_t seed;
  int64_t const* pair_id;  // [pairs]; null: no draws
  int64_t const* index;    // [pairs]
};

// x_t = a x0 + s eps.
struct NoiseArgs {
  Shape shape;  // pred_rows unused
  void const* x0;
  void* out;
  Dtype x0_dtype, out_dtype;
  Draws draws;
  float const *a, *s;  // [pairs]
};

// The regression target: y itself, or y = p eps + q x0 where draws.pair_id is set.
struct Target {
  void const* data;  // [rows, elements]: y or x0
  Dtype dtype;
  Draws draws;
  float const *p, *q;  // [pairs]
};

// err[r] = mean over elements of (pred - y)^2; the same of `ref` (in pred's dtype) where it is set, and
// cross[pair] = mean of (pred_w - y_w)(pred_l - y_l) where that is.
struct ErrorArgs {
  Shape shape;
  void const* pred;  // [pred_rows, elements]
  void const* ref;   // [pred_rows, elements] or null
  Dtype dtype;       // of pred, ref
  Target target;
  double* err;       // [rows]
  double* ref_err;   // [rows], written where ref is set
  void* workspace;   // workspace_bytes, CUDA only
  double* cross;     // [pairs] or null; rows == pred_rows == 2 pairs where it is set
};

// The functor alone: everything float64. rows == 2 pairs.
struct EpilogueArgs {
  int64_t pairs;
  int objective;
  double const* hyper;    // Hyper
  double const* gain;     // [pairs] or null: 0
  double const* weight;   // [pairs] or null: 1
  double const* err;      // [2 pairs]
  double const* ref_err;  // [2 pairs]
  double* loss;           // [1]: mean over pairs
  double* pair_loss;      // [pairs]
  double* margin;         // [pairs]
  double* importance;     // [2 pairs]
  double* coef;           // [2 pairs]: d pair_loss / d err, the loser's times lambda
  double const* cross;    // [pairs] or null: 0, which is no safeguard
  double* lambda;         // [pairs] or null: not asked for
};

// Errors and functor in one launch (on CUDA the last block to finish runs the functor).
// error.err == epilogue.err, error.cross == epilogue.cross; epilogue.ref_err == error.ref_err where
// error.ref is set.
struct LossArgs {
  ErrorArgs error;
  EpilogueArgs epilogue;
};

// grad_pred = grad[0] * scale * coef[r] * 2 (pred - y) / elements, summed over the rows r that share
// a prediction row.
struct GradArgs {
  Shape shape;
  void const* pred;
  Dtype dtype;  // of pred and grad_pred
  Target target;
  double const* coef;  // [rows]
  double const* grad;  // [1] or null: 1
  double scale;
  void* grad_pred;  // [pred_rows, elements]
};

// One streaming pass for the deferred backward: err as above and seed = scale * 2 (pred - y) / elements,
// in pred's dtype; scale is a power of two near `elements`, so that fp16 does not underflow.
struct SeedArgs {
  ErrorArgs error;  // ref null, pred_rows == rows
  double scale;
  void* seed;  // [rows, elements]
};

namespace cpu {
// `threads` caps the threads used; the result does not depend on it.
void add_noise(NoiseArgs const&, int threads);
void pair_error(ErrorArgs const&, int threads);
void pair_loss(LossArgs const&, int threads);
void loss_epilogue(EpilogueArgs const&);
void pair_grad(GradArgs const&, int threads);
void unit_seed(SeedArgs const&, int threads);
char const* features();  // the instruction set in use: "avx512", "avx2" or "portable"
}  // namespace cpu

namespace cuda {
// Bytes of ErrorArgs::workspace: one float64 per chunk of every row (twice with a reference) and, with
// `cross`, of every pair; and a ticket.
int64_t workspace_bytes(Shape const&, bool with_ref, bool with_cross);
// Each returns null, or the text of the launch error. `stream` is a cudaStream_t.
char const* add_noise(NoiseArgs const&, void* stream);
char const* pair_error(ErrorArgs const&, void* stream);
char const* pair_loss(LossArgs const&, void* stream);
char const* loss_epilogue(EpilogueArgs const&, void* stream);
char const* pair_grad(GradArgs const&, void* stream);
char const* unit_seed(SeedArgs const&, void* stream);
}  // namespace cuda

}  // namespace fastpref
