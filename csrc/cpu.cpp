// The CPU launchers: rows cut into chunks, chunks handed to threads, sums put together in
// order.
//
// Work is cut by (pair, chunk), so both members of a pair share one regeneration of their noise. Every
// partial sum has its own slot and slots are added in order: threads change nothing but the time.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_threads.h"
#include "kernels.h"
#include "objectives.h"

namespace fastpref::cpu {
namespace {

Kernels const* named(char const* name) {
  std::string const wanted(name);
  if (wanted == portable.name) return &portable;
#if defined(__x86_64__)
  bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wanted == avx2.name && has_avx2) return &avx2;
  bool const has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wanted == avx512.name && has_avx2 && has_avx512) return &avx512;
#endif
  return nullptr;
}

// The widest set this machine has.
Kernels const* best() {
  for (char const* name : {"avx512", "avx2"})
    if (Kernels const* found = named(name)) return found;
  return &portable;
}

std::atomic<Kernels const*>& chosen() {
  static std::atomic<Kernels const*> kernels{best()};
  return kernels;
}

// Pieces of a row's chunk in which regenerated noise and targets are staged: they stay in the L1 cache.
constexpr int64_t kPiece = 1024;
static_assert(kChunk % kPiece == 0 && kPiece % kBlock == 0, "lanes must not depend on the staging");

size_t bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
char const* at(void const* base, Dtype dtype, int64_t element) {
  return static_cast<char const*>(base) + element * static_cast<int64_t>(bytes(dtype));
}
char* at(void* base, Dtype dtype, int64_t element) {
  return static_cast<char*>(base) + element * static_cast<int64_t>(bytes(dtype));
}

// One stretch of at most kChunk elements of one pair.
struct Piece {
  int64_t pair, chunk, begin, length;
};

// Whether a tensor is written around the caches: one that a core's own cannot hold.
bool past_caches(Shape const& shape, Dtype dtype) {
  return shape.pred_rows * shape.elements * static_cast<int64_t>(bytes(dtype)) >= int64_t{4} << 20;
}

// Less than this for a helper is not worth waking it.
constexpr int64_t kWorthWaking = 65536;  // elements

template <class F>
void for_each_chunk(Shape const& shape, int threads, F const& body) {
  int64_t const chunks = chunks_of(shape.elements);
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + shape.rows * shape.elements / kWorthWaking));
  run(shape.pairs * chunks, threads, [&](int64_t i) {
    int64_t const begin = i % chunks * kChunk;
    body(Piece{i / chunks, i % chunks, begin, std::min(kChunk, shape.elements - begin)});
  });
}

// Members that share neither noise nor a prediction are read one after the other, which is faster than
// side by side: each row then is a pair of its own.
Shape untangled(Shape shape, Target const& target) {
  if (!target.draws.pair_id && shape.pred_rows == shape.rows) shape.pairs = shape.rows;
  return shape;
}

// A row for every pair.
Shape one_each(Shape shape) {
  shape.rows = shape.pairs;
  return shape;
}

void draw(Kernels const& k, Draws const& draws, int64_t pair, int64_t begin, int64_t length,
          float* eps) {
  Key const key = make_key(draws.seed, draws.pair_id[pair], draws.index[pair], Domain::noise);
  k.normals(key, static_cast<uint32_t>(begin / 4), (length + 3) / 4, eps);
}

// Calls body(begin, length, y, y_dtype) over the piece, y[m] being the target of row pair + m pairs.
template <class F>
void for_targets(Kernels const& k, Shape const& shape, Target const& target, Piece const& piece,
                 F const& body) {
  int64_t const members = shape.rows / shape.pairs;
  void const* y[2];
  auto const source = [&](int64_t member, int64_t begin) {
    return at(target.data, target.dtype, (piece.pair + member * shape.pairs) * shape.elements + begin);
  };
  if (!target.draws.pair_id) {
    for (int64_t m = 0; m < members; ++m) y[m] = source(m, piece.begin);
    body(piece.begin, piece.length, y, target.dtype);
    return;
  }
  alignas(64) float eps[kPiece], made[2][kPiece];
  float const p = target.p[piece.pair], q = target.q[piece.pair];
  for (int64_t done = 0; done < piece.length; done += kPiece) {
    int64_t const begin = piece.begin + done, length = std::min(kPiece, piece.length - done);
    draw(k, target.draws, piece.pair, begin, length, eps);
    for (int64_t m = 0; m < members; ++m) {
      k.combine[static_cast<int>(target.dtype)](p, eps, q, source(m, begin), length, made[m]);
      y[m] = made[m];
    }
    body(begin, length, y, Dtype::f32);
  }
}

double total(double const* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Sums: slot (row, chunk), then err[row] = the mean.
struct Partials {
  explicit Partials(Shape const& shape)
      : chunks(chunks_of(shape.elements)), elements(shape.elements), slots(shape.rows * chunks) {}
  void set(int64_t row, int64_t chunk, double const* lanes) {
    slots[row * chunks + chunk] = total(lanes);
  }
  void means(double* err) const {
    for (int64_t row = 0; row * chunks < static_cast<int64_t>(slots.size()); ++row) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += slots[row * chunks + chunk];
      err[row] = sum / static_cast<double>(elements);
    }
  }
  int64_t chunks, elements;
  std::vector<double> slots;
};

}  // namespace

bool use(char const* name) {
  Kernels const* const found = named(name);
  if (found) chosen() = found;
  return found;
}

int objectives() {
#define FASTPREF_COUNT(number, functor) +1
  return 0 FASTPREF_OBJECTIVES(FASTPREF_COUNT);
#undef FASTPREF_COUNT
}

char const* features() { return chosen().load()->name; }

void add_noise(NoiseArgs const& args, int threads) {
  Kernels const& k = *chosen();
  Shape const& shape = args.shape;
  for_each_chunk(shape, threads, [&](Piece const& piece) {
    alignas(64) float eps[kPiece], noisy[kPiece];
    for (int64_t done = 0; done < piece.length; done += kPiece) {
      int64_t const begin = piece.begin + done, length = std::min(kPiece, piece.length - done);
      draw(k, args.draws, piece.pair, begin, length, eps);
      for (int64_t row = piece.pair; row < shape.rows; row += shape.pairs) {
        int64_t const offset = row * shape.elements + begin;
        k.combine[static_cast<int>(args.x0_dtype)](args.s[piece.pair], eps, args.a[piece.pair],
                                                   at(args.x0, args.x0_dtype, offset), length, noisy);
        k.store[static_cast<int>(args.out_dtype)](noisy, length, at(args.out, args.out_dtype, offset));
      }
    }
  });
}

void pair_error(ErrorArgs const& args, int threads) {
  Kernels const& k = *chosen();
  Shape const shape = args.cross ? args.shape : untangled(args.shape, args.target);
  Partials err(shape), ref_err(shape), cross(one_each(shape));
  for_each_chunk(shape, threads, [&](Piece const& piece) {
    int64_t const members = shape.rows / shape.pairs;
    double lanes[2][kLanes] = {}, ref_lanes[2][kLanes] = {}, cross_lanes[kLanes] = {};
    for_targets(
        k, shape, args.target, piece, [&](int64_t begin, int64_t length, void const** y, Dtype y_dtype) {
          auto const sum = k.errors[static_cast<int>(args.dtype)][static_cast<int>(y_dtype)];
          for (int64_t m = 0; m < members; ++m) {
            int64_t const row = (piece.pair + m * shape.pairs) % shape.pred_rows;
            int64_t const offset = row * shape.elements + begin;
            sum(at(args.pred, args.dtype, offset), args.ref ? at(args.ref, args.dtype, offset) : nullptr,
                y[m], length, lanes[m], ref_lanes[m]);
          }
          if (!args.cross) return;
          auto const of = [&](int64_t row) {
            return at(args.pred, args.dtype, row * shape.elements + begin);
          };
          k.product[static_cast<int>(args.dtype)][static_cast<int>(y_dtype)](
              of(piece.pair), y[0], of(piece.pair + shape.pairs), y[1], length, cross_lanes);
        });
    for (int64_t m = 0; m < members; ++m) {
      err.set(piece.pair + m * shape.pairs, piece.chunk, lanes[m]);
      ref_err.set(piece.pair + m * shape.pairs, piece.chunk, ref_lanes[m]);
    }
    if (args.cross) cross.set(piece.pair, piece.chunk, cross_lanes);
  });
  err.means(args.err);
  if (args.ref) ref_err.means(args.ref_err);
  if (args.cross) cross.means(args.cross);
}

void loss_epilogue(EpilogueArgs const& args) {
  Hyper hyper;
  memcpy(&hyper, args.hyper, sizeof hyper);
  double sum = 0;
  for (int64_t w = 0; w < args.pairs; ++w) {
    int64_t const l = w + args.pairs;
    PairResult const r =
        evaluate(args.objective, args.err[w], args.err[l], args.ref_err[w], args.ref_err[l],
                 args.gain ? args.gain[w] : 0.0, args.weight ? args.weight[w] : 1.0,
                 args.cross ? args.cross[w] : 0.0, hyper);
    sum += args.pair_loss[w] = r.loss;
    args.margin[w] = r.margin;
    args.importance[w] = r.importance_w;
    args.importance[l] = r.importance_l;
    args.coef[w] = r.coef_w;
    args.coef[l] = r.coef_l;
    if (args.lambda) args.lambda[w] = r.lambda;
  }
  args.loss[0] = sum / static_cast<double>(args.pairs);
}

void pair_loss(LossArgs const& args, int threads) {
  pair_error(args.error, threads);
  loss_epilogue(args.epilogue);
}

void pair_grad(GradArgs const& args, int threads) {
  Kernels const& k = *chosen();
  Shape const shape = untangled(args.shape, args.target);
  double const unit = (args.grad ? args.grad[0] : 1.0) * args.scale * 2.0 / shape.elements;
  bool const shared = shape.pred_rows < shape.rows;  // both members' terms go into one row
  bool const past = past_caches(shape, args.dtype);
  for_each_chunk(shape, threads, [&](Piece const& piece) {
    for_targets(
        k, shape, args.target, piece, [&](int64_t begin, int64_t length, void const** y, Dtype y_dtype) {
          auto const gradient = k.gradient[static_cast<int>(args.dtype)][static_cast<int>(y_dtype)];
          for (int64_t row = piece.pair, m = 0; row < shape.pred_rows; row += shape.pairs, ++m) {
            int64_t const offset = row * shape.elements + begin;
            double const other = shared ? args.coef[row + shape.pairs] : 0.0;
            gradient(at(args.pred, args.dtype, offset), y[m], shared ? y[1] : nullptr, length,
                     static_cast<float>(unit * args.coef[row]), static_cast<float>(unit * other),
                     at(args.grad_pred, args.dtype, offset), nullptr, past);
          }
        });
  });
}

void unit_seed(SeedArgs const& args, int threads) {
  Kernels const& k = *chosen();
  ErrorArgs const& e = args.error;
  Shape const shape = untangled(e.shape, e.target);
  float const factor = static_cast<float>(args.scale * 2.0 / shape.elements);
  bool const past = past_caches(shape, e.dtype);
  Partials err(shape);
  for_each_chunk(shape, threads, [&](Piece const& piece) {
    int64_t const members = shape.rows / shape.pairs;
    double lanes[2][kLanes] = {};
    for_targets(k, shape, e.target, piece,
                [&](int64_t begin, int64_t length, void const** y, Dtype y_dtype) {
                  auto const gradient = k.gradient[static_cast<int>(e.dtype)][static_cast<int>(y_dtype)];
                  for (int64_t m = 0; m < members; ++m) {
                    int64_t const offset = (piece.pair + m * shape.pairs) * shape.elements + begin;
                    gradient(at(e.pred, e.dtype, offset), y[m], nullptr, length, factor, 0.0f,
                             at(args.seed, e.dtype, offset), lanes[m], past);
                  }
                });
    for (int64_t m = 0; m < members; ++m) err.set(piece.pair + m * shape.pairs, piece.chunk, lanes[m]);
  });
  err.means(e.err);
}

}  // namespace fastpref::cpu
