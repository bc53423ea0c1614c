// CUDA: x_t = a x0 + s eps, with eps drawn on the fly and shared by a pair's winner and loser.
#include "reduce.cuh"

namespace fastpref::cuda {
namespace {

// Bytes: reads x0 once, writes x_t once; eps never leaves the registers.
// Grid: one wave; a block takes a piece of a pair, winner and loser together.
// Sums: none.
template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) noise_kernel(NoiseArgs args, int length) {
  constexpr int W = kWidth<X, Y>;
  int64_t const step = args.shape.rows > args.shape.pairs ? args.shape.pairs * args.shape.elements : 0;
  for_each_piece(args.shape, length, [&](Piece const& piece) {
    int64_t const from = piece.pair * args.shape.elements + piece.begin;
    X const* const x0 = static_cast<X const*>(args.x0) + from;
    Y* const out = static_cast<Y*>(args.out) + from;
    bool const aligned_rows = aligned(x0) && aligned(x0 + step) && aligned(out) && aligned(out + step);
    Key const key = make_key(args.draws.seed, args.draws.pair_id[piece.pair], args.draws.index[piece.pair],
                             Domain::noise);
    float const a = args.a[piece.pair], s = args.s[piece.pair];
    for_each_vector<W>(piece, aligned_rows, [&](int at, int count, auto wide) {
      Vector<X, W> clean[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (m && !step) break;
        clean[m] = load<W>(x0 + m * step + at, count, wide);
      }
      float eps[W];
      noise<W>(key, piece.group(at), eps);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (m && !step) break;
        float noisy[W];
#pragma unroll
        for (int i = 0; i < W; ++i) noisy[i] = combine(s, eps[i], a, clean[m][i]);
        store<W>(out + m * step + at, noisy, count, wide);
      }
    });
  });
}

}  // namespace

char const* add_noise(NoiseArgs const& args, void* stream) {
  if (args.shape.pairs * args.shape.elements == 0) return nullptr;
  return dispatch(args.x0_dtype, [&](auto x0) {
    return dispatch(args.out_dtype, [&](auto out) {
      return launch_equal(noise_kernel<decltype(x0), decltype(out)>, args, stream);
    });
  });
}

}  // namespace fastpref::cuda
