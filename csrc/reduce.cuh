// What the CUDA kernels share: 16-byte loads and stores, the walk over pairs and pieces, residuals
// against a stored or regenerated target, sums in a fixed order, and the launch.
//
// The unit of work is one piece of one pair: a chunk where there are sums, else whatever gives a wave of
// blocks equal work. Both of its rows are read together, so that their common noise is computed once. A
// chunk's sum depends on kThreads alone: results are the same bits for any grid.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "philox.h"

namespace fastpref::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;  // what __launch_bounds__ guarantees: at most 80 registers a thread

// ---- one vector: W elements, 16 bytes of the wider of two types ----

template <typename A, typename B>
constexpr int kWidth = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ T round_to(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

inline __device__ bool aligned(void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// W elements as the 32-bit words they are loaded in: as separate 16-bit values they would take twice
// the registers.
template <typename T, int W>
struct Vector {
  static constexpr int kPerWord = 4 / sizeof(T), kWords = W / kPerWord;
  uint32_t word[kWords];

  __device__ float operator[](int i) const {
    uint32_t const bits = word[i / kPerWord];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return float_of(i % 2 ? bits & 0xffff0000u : bits << 16);
    uint32_t const moved = bits >> (i % kPerWord * 16);
    T value;
    memcpy(&value, &moved, sizeof value);
    return to_float(value);
  }
  // Sets element i of a word that is still zero there.
  __device__ void set(int i, T value) {
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    word[i / kPerWord] |= bits << (i % kPerWord * 16);
  }
};

// W elements from where 16 bytes are aligned, in one instruction.
template <int W, typename T>
__device__ Vector<T, W> load_wide(T const* from) {
  if constexpr (Vector<T, W>::kWords == 4) {
    uint4 const raw = *reinterpret_cast<uint4 const*>(from);
    return {raw.x, raw.y, raw.z, raw.w};
  } else {
    uint2 const raw = *reinterpret_cast<uint2 const*>(from);
    return {raw.x, raw.y};
  }
}

// The first `count` of W elements from anywhere, zeros behind them; or, where Wide is true, all of them
// from where 16 bytes are aligned.
template <int W, typename Wide, typename T>
__device__ Vector<T, W> load(T const* from, int count, Wide) {
  if constexpr (Wide::value) {
    return load_wide<W>(from);
  } else {
    Vector<T, W> out{};
#pragma unroll
    for (int i = 0; i < W; ++i) {
      if (i < count) out.set(i, from[i]);
    }
    return out;
  }
}

// The same for storing.
template <int W, typename Wide, typename T>
__device__ void store(T* to, float const (&values)[W], int count, Wide) {
  if constexpr (Wide::value) {
    Vector<T, W> in{};
#pragma unroll
    for (int i = 0; i < W; ++i) in.set(i, round_to<T>(values[i]));
    if constexpr (in.kWords == 4) {
      __stwb(reinterpret_cast<uint4*>(to), make_uint4(in.word[0], in.word[1], in.word[2], in.word[3]));
    } else {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(in.word[0], in.word[1]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      if (i < count) to[i] = round_to<T>(values[i]);
    }
  }
}

// The normals of elements 4 group .. 4 group + W - 1.
template <int W>
__device__ void noise(Key const& key, uint32_t group, float (&eps)[W]) {
#pragma unroll
  for (int i = 0; i < W; i += 4) {
    Normals const n = normals(key, group + i / 4);
    eps[i] = n.x, eps[i + 1] = n.y, eps[i + 2] = n.z, eps[i + 3] = n.w;
  }
}

// ---- the walk ----

// One piece of one pair: elements begin .. begin + size - 1 of each of its rows.
struct Piece {
  int64_t pair, number, begin;
  int size;

  __device__ uint32_t group(int at) const { return static_cast<uint32_t>((begin + at) / 4); }
};

// use(piece) for this block's share of all pieces, of `length` elements or less, of all pairs.
template <typename Use>
__device__ void for_each_piece(Shape const& shape, int length, Use use) {
  int64_t const pieces = (shape.elements + length - 1) / length;
  for (int64_t i = blockIdx.x; i < shape.pairs * pieces; i += gridDim.x) {
    int64_t const number = i % pieces, begin = number * length, rest = shape.elements - begin;
    use(Piece{i / pieces, number, begin, static_cast<int>(rest < length ? rest : length)});
  }
}

// use(at, count, wide) for this thread's vectors of a piece: elements at .. at + count - 1, counted from
// its begin. `wide`, a std::bool_constant, says that there are W of them in rows that are aligned: code
// for these looks at no `count`. Neighbouring threads have neighbouring vectors.
template <int W, typename Use>
__device__ void for_each_vector(Piece const& piece, bool aligned_rows, Use use) {
  int at = threadIdx.x * W;
  if (aligned_rows) {
#pragma unroll 1
    for (; at + W <= piece.size; at += kThreads * W) use(at, W, std::true_type());
  }
#pragma unroll 1
  for (; at < piece.size; at += kThreads * W)
    use(at, piece.size - at < W ? piece.size - at : W, std::false_type());
}

// ---- one pair's residuals ----

// pred - y of a piece of a pair's rows (one or two members), and ref - y where there is a reference.
template <typename P, typename T>
struct Residuals {
  static constexpr int W = kWidth<P, T>;
  P const *pred, *ref;  // where the piece begins in the winner's rows; ref null: no reference
  T const* data;
  int64_t pred_step, data_step;  // from the winner's row to the loser's
  Piece piece;
  Key key;
  float p, q;
  bool two, regenerate, aligned_rows;

  // `out`: a tensor shaped and typed like pred that the caller writes, or null.
  __device__ Residuals(Shape const& shape, void const* preds, void const* refs, Target const& target,
                       void const* out, Piece const& piece)
      : piece(piece) {
    two = shape.rows > shape.pairs;
    regenerate = target.draws.pair_id != nullptr;
    data_step = two ? shape.pairs * shape.elements : 0;
    pred_step = shape.pred_rows > shape.pairs ? data_step : 0;
    int64_t const at = piece.pair * shape.elements + piece.begin;
    pred = static_cast<P const*>(preds) + at;
    ref = refs ? static_cast<P const*>(refs) + at : nullptr;
    data = static_cast<T const*>(target.data) + at;
    aligned_rows = aligned(pred) && aligned(pred + pred_step) && aligned(data) &&
                   aligned(data + data_step) && (!out || aligned(static_cast<P const*>(out) + at)) &&
                   (!refs || aligned(ref));  // steps of pred's size have been looked at
    if (regenerate) {
      key = make_key(target.draws.seed, target.draws.pair_id[piece.pair], target.draws.index[piece.pair],
                     Domain::noise);
      p = target.p[piece.pair], q = target.q[piece.pair];
    }
  }

  // use(member, policy, reference): W residuals of each, zero behind `count`. All loads are issued
  // before the noise is computed, so that they are in flight meanwhile.
  template <typename Wide, typename Use>
  __device__ void operator()(int at, int count, Wide wide, Use use) const {
    Vector<P, W> policy[2], reference[2];
    Vector<T, W> target[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m && !two) break;
      policy[m] = load<W>(pred + m * pred_step + at, count, wide);
      if (ref) reference[m] = load<W>(ref + m * pred_step + at, count, wide);
      target[m] = load<W>(data + m * data_step + at, count, wide);
    }
    float eps[W];
    if (regenerate) noise<W>(key, piece.group(at), eps);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m && !two) break;
      float d[W], d_ref[W];
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float y = target[m][i];
        if (regenerate) y = combine(p, eps[i], q, y);
        d[i] = i < count ? policy[m][i] - y : 0.0f;
        d_ref[i] = ref && i < count ? reference[m][i] - y : 0.0f;
      }
      use(m, d, d_ref);
    }
  }
};

// ---- sums ----

// sum + a[0] b[0] + a[1] b[1] + ..., each rounded once.
template <int W>
__device__ float add_products(float sum, float const (&a)[W], float const (&b)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

inline __device__ double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

constexpr int kSums = 5;

// Sums of `count` values over the block, warps in order: thread n < count returns the sum of values[n].
inline __device__ double block_sum(double const (&values)[kSums], int count) {
  __shared__ double sums[kSums][kWarps];
  __syncthreads();  // the last call's sums have been read
#pragma unroll
  for (int n = 0; n < count; ++n) {
    double const sum = warp_sum(values[n]);
    if (threadIdx.x % 32 == 0) sums[n][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  double total = 0;
  if (static_cast<int>(threadIdx.x) < count) {
    for (int warp = 0; warp < kWarps; ++warp) total += sums[threadIdx.x][warp];
  }
  return total;
}

// True in every thread of the last block to come here: what all blocks wrote before is then visible.
// By PTX's memory model: the barrier puts the block's stores before thread 0's fence; fence and add
// are a release pattern, add and fence an acquire pattern, and the adds of the blocks between pass
// it on; the second barrier hands it to every thread. By hand: tests/loss/litmus/ticket.litmus.
inline __device__ bool last_block(unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- host side ----

// f(value of the element type).
template <typename F>
char const* dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float());
    case Dtype::bf16:
      return f(__nv_bfloat16());
    case Dtype::f16:
      return f(__half());
  }
  return "unknown dtype";
}

inline char const* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // our copy of the runtime keeps no error behind
  return cudaGetErrorString(status);
}

// Blocks that run at once.
inline char const* wave(int64_t& blocks) {
  int device = 0, multiprocessors = 0;
  if (auto error = message(cudaGetDevice(&device))) return error;
  if (auto error =
          message(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)))
    return error;
  blocks = static_cast<int64_t>(multiprocessors) * kBlocksPerSm;
  return nullptr;
}

// The length of pieces that keep a wave of blocks equally busy, one piece each; many smaller ones where
// the pairs do not divide a wave evenly; never less than a vector for each thread.
inline int equal_pieces(Shape const& shape, int64_t blocks) {
  int64_t each = blocks / shape.pairs;  // pieces of a pair
  if (each * shape.pairs < blocks - blocks / 8) each = 8 * blocks / shape.pairs + 1;
  int64_t const length = (shape.elements + each - 1) / each;
  constexpr int64_t kLeast = kThreads * 8, kMost = 1 << 20;
  int64_t const bounded = length < kLeast ? kLeast : length > kMost ? kMost : length;
  return static_cast<int>((bounded + kThreads - 1) / kThreads * kThreads);
}

// At most one wave of blocks, each taking its share of all pieces.
template <typename... Params, typename... Args>
char const* launch(void (*kernel)(Params...), int64_t pieces, int64_t wave, void* stream,
                   Args const&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(pieces < wave ? pieces : wave));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return message(cudaLaunchKernelEx(&config, kernel, args...));
}

// The same for kernel(args, length), which sums nothing, in pieces of equal work.
template <typename Args>
char const* launch_equal(void (*kernel)(Args, int), Args const& args, void* stream) {
  int64_t blocks = 0;
  if (auto error = wave(blocks)) return error;
  int const length = equal_pieces(args.shape, blocks);
  int64_t const pieces = args.shape.pairs * ((args.shape.elements + length - 1) / length);
  return launch(kernel, pieces, blocks, stream, args, length);
}

}  // namespace fastpref::cuda
