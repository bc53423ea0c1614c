// CUDA: per-row errors, the objective's functor on them, and the gradient by the prediction.
#include "objectives.h"
#include "reduce.cuh"

namespace fastpref::cuda {
namespace {

// What the error kernel does beside the errors themselves.
struct Work {
  ErrorArgs error;
  EpilogueArgs epilogue;  // pairs == 0: errors only
  void* seed;             // null: no unit-seed gradient
  float seed_scale;       // seed = seed_scale * (pred - y)
};

// The workspace: the ticket, then one float64 per chunk of every row, policy before reference, and of
// every pair's product.
__device__ unsigned* ticket_of(void* workspace) { return static_cast<unsigned*>(workspace); }
__device__ double* slots_of(void* workspace) { return static_cast<double*>(workspace) + 1; }

// The functor for every pair, by one block: each thread sums its pairs in order, block_sum the threads.
__device__ void epilogue(EpilogueArgs const& args) {
  double losses[kSums] = {0};
  for (int64_t w = threadIdx.x; w < args.pairs; w += kThreads) {
    int64_t const l = w + args.pairs;
    Hyper const hyper = *reinterpret_cast<Hyper const*>(args.hyper);
    PairResult const out =
        evaluate(args.objective, args.err[w], args.err[l], args.ref_err[w], args.ref_err[l],
                 args.gain ? args.gain[w] : 0.0, args.weight ? args.weight[w] : 1.0,
                 args.cross ? args.cross[w] : 0.0, hyper);
    args.pair_loss[w] = out.loss;
    args.margin[w] = out.margin;
    args.importance[w] = out.importance_w;
    args.importance[l] = out.importance_l;
    args.coef[w] = out.coef_w;
    args.coef[l] = out.coef_l;
    if (args.lambda) args.lambda[w] = out.lambda;
    losses[0] += out.loss;
  }
  double const loss = block_sum(losses, 1);
  if (threadIdx.x == 0) *args.loss = loss / static_cast<double>(args.pairs);
}

// Row means from the slots, by one block: a warp per row, each lane its slots in order, then a tree.
__device__ void finish_errors(ErrorArgs const& args) {
  int64_t const rows = args.shape.rows, chunks = chunks_of(args.shape.elements);
  int64_t const errors = args.ref ? 2 * rows : rows, all = errors + (args.cross ? args.shape.pairs : 0);
  double const* slots = slots_of(args.workspace);
  for (int64_t i = threadIdx.x / 32; i < all; i += kWarps) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x % 32; chunk < chunks; chunk += 32)
      sum += __ldcg(slots + i * chunks + chunk);
    sum = warp_sum(sum) / static_cast<double>(args.shape.elements);
    if (threadIdx.x % 32 == 0)
      (i < rows ? args.err[i] : i < errors ? args.ref_err[i - rows] : args.cross[i - errors]) = sum;
  }
}

// Bytes: reads pred, ref where given, and target once; writes the unit-seed gradient where asked.
// Grid: one wave; a block takes whole chunks of pairs, winner and loser together; the last one finishes.
// Sums: fp32 in a thread; float64 over lanes, warps, a row's chunks (by lane) and pairs, in that order.
// kCross: with the product of winner's and loser's residuals, one more sum.
template <typename P, typename T, bool kCross>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) error_kernel(Work work) {
  ErrorArgs const& args = work.error;
  Shape const& shape = args.shape;
  int64_t const chunks = chunks_of(shape.elements);
  for_each_piece(shape, kChunk, [&](Piece const& chunk) {
    Residuals<P, T> const residuals(shape, args.pred, args.ref, args.target, work.seed, chunk);
    constexpr int W = Residuals<P, T>::W;
    int64_t const from = chunk.pair * shape.elements + chunk.begin;
    float sums[kSums] = {0};  // policy w, policy l, reference w, reference l, product
    for_each_vector<W>(chunk, residuals.aligned_rows, [&](int at, int count, auto wide) {
      [[maybe_unused]] float winner[W];
      residuals(at, count, wide, [&](int m, float const(&policy)[W], float const(&reference)[W]) {
        sums[m] = add_products(sums[m], policy, policy);
        if (args.ref) sums[2 + m] = add_products(sums[2 + m], reference, reference);
        if constexpr (kCross) {
          if (m) sums[4] = add_products(sums[4], winner, policy);
#pragma unroll
          for (int i = 0; i < W; ++i) winner[i] = policy[i];
        }
        if (work.seed) {
          float seed[W];
#pragma unroll
          for (int i = 0; i < W; ++i) seed[i] = work.seed_scale * policy[i];
          store<W>(static_cast<P*>(work.seed) + from + m * residuals.pred_step + at, seed, count, wide);
        }
      });
    });
    double wide_sums[kSums];
#pragma unroll
    for (int n = 0; n < kSums; ++n) wide_sums[n] = sums[n];
    double const sum = block_sum(wide_sums, kCross ? 5 : 4);
    double* const slots = slots_of(args.workspace) + chunk.number;
    int64_t const row = chunk.pair + threadIdx.x % 2 * shape.pairs, of_ref = threadIdx.x / 2;
    if (row < shape.rows && (of_ref == 0 || (of_ref == 1 && args.ref)))
      slots[(of_ref * shape.rows + row) * chunks] = sum;
    if (kCross && threadIdx.x == 4) slots[((args.ref ? 2 : 1) * shape.rows + chunk.pair) * chunks] = sum;
  });
  if (!last_block(ticket_of(args.workspace))) return;
  finish_errors(args);
  if (work.epilogue.pairs == 0) return;
  __syncthreads();
  epilogue(work.epilogue);
}

// Bytes: reads the four errors of a pair, writes six scalars.
// Grid: one block.
// Sums: as in the error kernel's last step.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) epilogue_kernel(EpilogueArgs args) {
  epilogue(args);
}

// Bytes: reads pred and target once (from L2 after the error kernel), writes grad_pred once.
// Grid: one wave; a block takes a piece of a pair, winner and loser together.
// Sums: where two rows share a prediction, winner plus loser in fp32.
template <typename P, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) grad_kernel(GradArgs args, int length) {
  Shape const& shape = args.shape;
  double const scale =
      (args.grad ? *args.grad : 1.0) * args.scale * 2.0 / static_cast<double>(shape.elements);
  bool const shared = shape.pred_rows < shape.rows;
  for_each_piece(shape, length, [&](Piece const& piece) {
    Residuals<P, T> const residuals(shape, args.pred, nullptr, args.target, args.grad_pred, piece);
    constexpr int W = Residuals<P, T>::W;
    float const of_w = static_cast<float>(scale * args.coef[piece.pair]);
    float const of_l =
        residuals.two ? static_cast<float>(scale * args.coef[piece.pair + shape.pairs]) : 0.0f;
    P* const out = static_cast<P*>(args.grad_pred) + piece.pair * shape.elements + piece.begin;
    for_each_vector<W>(piece, residuals.aligned_rows, [&](int at, int count, auto wide) {
      float grad[W];
      residuals(at, count, wide, [&](int m, float const(&policy)[W], float const(&)[W]) {
#pragma unroll
        for (int i = 0; i < W; ++i)
          grad[i] = m == 0 ? of_w * policy[i] : shared ? grad[i] + of_l * policy[i] : of_l * policy[i];
        if (m == 0 && shared) return;
        store<W>(out + m * residuals.pred_step + at, grad, count, wide);
      });
    });
  });
}

char const* run_errors(Work const& work, void* stream) {
  ErrorArgs const& args = work.error;
  int64_t const chunks = args.shape.pairs * chunks_of(args.shape.elements);
  if (chunks == 0) return nullptr;
  int64_t blocks = 0;
  if (auto error = wave(blocks)) return error;
  if (auto error =
          message(cudaMemsetAsync(args.workspace, 0, sizeof(double), static_cast<cudaStream_t>(stream))))
    return error;
  return dispatch(args.dtype, [&](auto pred) {
    return dispatch(args.target.dtype, [&](auto target) {
      using P = decltype(pred);
      using T = decltype(target);
      auto const kernel = args.cross ? error_kernel<P, T, true> : error_kernel<P, T, false>;
      return launch(kernel, chunks, blocks, stream, work);
    });
  });
}

}  // namespace

int64_t workspace_bytes(Shape const& shape, bool with_ref, bool with_cross) {
  int64_t const sums = shape.rows * (with_ref ? 2 : 1) + (with_cross ? shape.pairs : 0);
  return static_cast<int64_t>(sizeof(double)) * (1 + sums * chunks_of(shape.elements));
}

char const* pair_error(ErrorArgs const& args, void* stream) {
  return run_errors({args, {}, nullptr, 0}, stream);
}

char const* pair_loss(LossArgs const& args, void* stream) {
  return run_errors({args.error, args.epilogue, nullptr, 0}, stream);
}

char const* unit_seed(SeedArgs const& args, void* stream) {
  double const scale = args.scale * 2.0 / static_cast<double>(args.error.shape.elements);
  return run_errors({args.error, {}, args.seed, static_cast<float>(scale)}, stream);
}

char const* loss_epilogue(EpilogueArgs const& args, void* stream) {
  if (args.pairs == 0) return nullptr;
  return launch(epilogue_kernel, 1, 1, stream, args);
}

char const* pair_grad(GradArgs const& args, void* stream) {
  if (args.shape.pairs * args.shape.elements == 0) return nullptr;
  return dispatch(args.dtype, [&](auto pred) {
    return dispatch(args.target.dtype, [&](auto target) {
      return launch_equal(grad_kernel<decltype(pred), decltype(target)>, args, stream);
    });
  });
}

}  // namespace fastpref::cuda
