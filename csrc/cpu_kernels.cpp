// The vector loops of the CPU side; setup.py compiles this file once per instruction set.
//
// FASTPREF_ISA names the table, FASTPREF_WIDTH the floats in a vector. Compiler vectors, no intrinsics:
// multiplications and additions stay apart (-ffp-contract=off), so the width never shows in a result.
#define FASTPREF_HD static inline  // own copies of the inline functions: each set compiles its own
#include "cpu_kernels.h"

namespace fastpref::cpu {
namespace {

constexpr int kWidth = FASTPREF_WIDTH;
constexpr int kVectors = kLanes / kWidth;
typedef float F __attribute__((vector_size(4 * kWidth)));
typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
typedef uint16_t H __attribute__((vector_size(2 * kWidth)));

template <class V>
inline V read(void const* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

struct F32 {
  using Scalar = float;
  static inline F load(float const* p) { return read<F>(p); }
  static inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
};

struct Bf16 {
  using Scalar = uint16_t;
  static inline F load(uint16_t const* p) { return (F)(__builtin_convertvector(read<H>(p), U) << 16); }
  static inline void store(uint16_t* p, F v) {
    U const bits = (U)v;
    U const rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    U const nan = (bits >> 16) | 0x40u;
    H const h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, H);
    memcpy(p, &h, sizeof h);
  }
};

struct F16 {
  using Scalar = uint16_t;
  static inline F load(uint16_t const* p) {
    U const h = __builtin_convertvector(read<H>(p), U);
    U const exponent = h & 0x7c00u;
    U const bits = ((h & 0x7fffu) << 13) + (112u << 23);
    F const subnormal = (F)(bits + (1u << 23)) - 0x1p-14f;
    U const finite = exponent == 0u ? (U)subnormal : bits;
    return (F)((exponent == 0x7c00u ? bits + (112u << 23) : finite) | ((h & 0x8000u) << 16));
  }
  static inline void store(uint16_t* p, F v) {
    U const all = (U)v, bits = all & 0x7fffffffu;
    U const normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    U const subnormal = (U)((F)bits + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
    U const special = bits > 0x7f800000u ? (U){} + 0x7e00u : (U){} + 0x7c00u;
    U const finite = bits < (113u << 23) ? subnormal : normal;
    U const half = (bits >= (143u << 23) ? special : finite) | ((all >> 16) & 0x8000u);
    H const h = __builtin_convertvector(half, H);
    memcpy(p, &h, sizeof h);
  }
};

// The kLanes-wide last group of a row, padded with zeros: those add nothing to a sum.
template <class T>
struct Padded {
  typename T::Scalar data[kLanes] = {};
  Padded() = default;
  Padded(typename T::Scalar const* from, int64_t n) { memcpy(data, from, n * sizeof *from); }
};

inline void add_lanes(F const* sums, double* lanes) {
  float flat[kLanes];
  memcpy(flat, sums, sizeof flat);
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(flat[lane]);
}

template <class P, class T, bool kRef>
void error_loop(typename P::Scalar const* pred, typename P::Scalar const* ref,
                typename T::Scalar const* target, int64_t n, double* lanes, double* ref_lanes) {
  int64_t i = 0;
  while (i + kLanes <= n) {
    F sums[kVectors] = {}, ref_sums[kVectors] = {};
    for (int64_t const end = i + kBlock; i < end && i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        int64_t const at = i + v * kWidth;
        F const y = T::load(target + at);
        F const d = P::load(pred + at) - y;
        sums[v] += d * d;
        if (kRef) {
          F const r = P::load(ref + at) - y;
          ref_sums[v] += r * r;
        }
      }
    }
    add_lanes(sums, lanes);
    if (kRef) add_lanes(ref_sums, ref_lanes);
  }
  if (int64_t const rest = n - i) {
    Padded<P> const p(pred + i, rest), r(kRef ? ref + i : pred + i, rest);
    Padded<T> const t(target + i, rest);
    error_loop<P, T, kRef>(p.data, r.data, t.data, kLanes, lanes, ref_lanes);
  }
}

template <class P, class T>
void errors(void const* pred, void const* ref, void const* target, int64_t n, double* lanes,
            double* ref_lanes) {
  auto const loop = ref ? error_loop<P, T, true> : error_loop<P, T, false>;
  loop(static_cast<typename P::Scalar const*>(pred), static_cast<typename P::Scalar const*>(ref),
       static_cast<typename T::Scalar const*>(target), n, lanes, ref_lanes);
}

template <class P, class T, bool kOther, bool kError>
void gradient_loop(typename P::Scalar const* pred, typename T::Scalar const* target,
                   typename T::Scalar const* other, int64_t n, float factor, float other_factor,
                   typename P::Scalar* out, double* lanes) {
  int64_t i = 0;
  while (i + kLanes <= n) {
    F sums[kVectors] = {};
    for (int64_t const end = i + kBlock; i < end && i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        int64_t const at = i + v * kWidth;
        F const p = P::load(pred + at);
        F const d = p - T::load(target + at);
        if (kError) sums[v] += d * d;
        F g = d * factor;
        if (kOther) g += (p - T::load(other + at)) * other_factor;
        P::store(out + at, g);
      }
    }
    if (kError) add_lanes(sums, lanes);
  }
  if (int64_t const rest = n - i) {
    Padded<P> const p(pred + i, rest);
    Padded<T> const t(target + i, rest), o(kOther ? other + i : target + i, rest);
    Padded<P> g;
    gradient_loop<P, T, kOther, kError>(p.data, t.data, o.data, kLanes, factor, other_factor, g.data,
                                        lanes);
    memcpy(out + i, g.data, rest * sizeof *out);
  }
}

template <class P, class T>
void gradient(void const* pred, void const* target, void const* other, int64_t n, float factor,
              float other_factor, void* out, double* lanes) {
  auto const loop = other   ? gradient_loop<P, T, true, false>
                    : lanes ? gradient_loop<P, T, false, true>
                            : gradient_loop<P, T, false, false>;
  loop(static_cast<typename P::Scalar const*>(pred), static_cast<typename T::Scalar const*>(target),
       static_cast<typename T::Scalar const*>(other), n, factor, other_factor,
       static_cast<typename P::Scalar*>(out), lanes);
}

void normals_loop(Key const& key, uint32_t first, int64_t groups, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    Normals const v = normals(key, first + static_cast<uint32_t>(g));
    out[4 * g] = v.x;
    out[4 * g + 1] = v.y;
    out[4 * g + 2] = v.z;
    out[4 * g + 3] = v.w;
  }
}

template <class T>
void combine_loop(float on_eps, float const* eps, float on_x0, void const* x0, int64_t n, float* out) {
  auto const from = static_cast<typename T::Scalar const*>(x0);
  float x[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    int64_t const some = n - i < kLanes ? n - i : kLanes;
    Padded<T> last;
    auto group = from + i;
    if (some < kLanes) {
      last = Padded<T>(group, some);
      group = last.data;
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) F32::store(x + v * kWidth, T::load(group + v * kWidth));
    for (int64_t k = 0; k < some; ++k) out[i + k] = combine(on_eps, eps[i + k], on_x0, x[k]);
  }
}

template <class T>
void store_loop(float const* from, int64_t n, void* to) {
  auto const out = static_cast<typename T::Scalar*>(to);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) T::store(out + i, F32::load(from + i));
  if (int64_t const rest = n - i) {
    Padded<F32> const f(from + i, rest);
    Padded<T> t;
    T::store(t.data, F32::load(f.data));
    memcpy(out + i, t.data, rest * sizeof *out);
  }
}

}  // namespace

#define FASTPREF_TEXT(x) #x
#define FASTPREF_NAME(x) FASTPREF_TEXT(x)
extern Kernels const FASTPREF_ISA = {
    FASTPREF_NAME(FASTPREF_ISA),
#define FASTPREF_ROW(name, P) {name<P, F32>, name<P, Bf16>, name<P, F16>}
    {FASTPREF_ROW(errors, F32), FASTPREF_ROW(errors, Bf16), FASTPREF_ROW(errors, F16)},
    {FASTPREF_ROW(gradient, F32), FASTPREF_ROW(gradient, Bf16), FASTPREF_ROW(gradient, F16)},
#undef FASTPREF_ROW
    normals_loop,
    {combine_loop<F32>, combine_loop<Bf16>, combine_loop<F16>},
    {store_loop<F32>, store_loop<Bf16>, store_loop<F16>},
};

}  // namespace fastpref::cpu
