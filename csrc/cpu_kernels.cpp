// The CPU side's vector loops in one file, which setup.py compiles once per instruction set.
//
// FASTPREF_ISA names the table, FASTPREF_WIDTH the floats in a vector. The width never shows in a
// result: products and sums are fused where this says so and nowhere else (-ffp-contract=off), and sums
// have kLanes lanes in every set.
#define FASTPREF_HD static inline  // own copies of the inline functions: each set compiles its own
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_kernels.h"

namespace fastpref::cpu {
namespace {

constexpr int kWidth = FASTPREF_WIDTH;
constexpr int kStep = 2 * kWidth;  // elements handled at once
constexpr int kSteps = kLanes / kStep;
typedef float F __attribute__((vector_size(4 * kWidth)));
typedef uint32_t U __attribute__((vector_size(4 * kWidth)));

// kStep elements, those at even and at odd places apart: two 16-bit values then come out of one word
// with a shift and a mask. So element e of a group of kLanes belongs to lane e / 2, plus kLanes / 2 if e
// is odd.
struct Both {
  F even, odd;
};

template <class V>
inline V read(void const* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Writes a vector; around the caches where `past` says so, which `to` must be aligned for.
inline void write(void* to, U v, bool past) {
#if defined(__x86_64__) && FASTPREF_WIDTH == 16
  if (past) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#elif defined(__x86_64__) && FASTPREF_WIDTH == 8
  if (past) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#elif defined(__x86_64__)
  if (past) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
  memcpy(to, &v, sizeof v);
}

// What went around the caches is visible to other threads from here on.
inline void wrote(bool past) {
#if defined(__x86_64__)
  if (past) _mm_sfence();
#endif
}

// a b + sum, rounded once.
inline F product_plus(F a, F b, F sum) {
#if defined(__x86_64__) && FASTPREF_WIDTH == 16
  return _mm512_fmadd_ps(a, b, sum);
#elif defined(__x86_64__) && FASTPREF_WIDTH == 8
  return _mm256_fmadd_ps(a, b, sum);
#else
  for (int k = 0; k < kWidth; ++k) sum[k] = fmaf(a[k], b[k], sum[k]);
  return sum;
#endif
}

#ifdef __clang__
#define FASTPREF_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
#define FASTPREF_SHUFFLE(a, b, index) __builtin_shuffle(a, b, U{(index)...})
#endif
template <uint32_t... I>
inline Both apart(F a, F b, std::integer_sequence<uint32_t, I...>) {
  return {FASTPREF_SHUFFLE(a, b, 2 * I), FASTPREF_SHUFFLE(a, b, 2 * I + 1)};
}
template <uint32_t... I>
inline Both together(F a, F b, std::integer_sequence<uint32_t, I...>) {
  return {FASTPREF_SHUFFLE(a, b, I / 2 + I % 2 * kWidth),
          FASTPREF_SHUFFLE(a, b, kWidth / 2 + I / 2 + I % 2 * kWidth)};
}
#undef FASTPREF_SHUFFLE
using Places = std::make_integer_sequence<uint32_t, kWidth>;

struct F32 {
  using Scalar = float;
  static inline Both load(float const* p) { return apart(read<F>(p), read<F>(p + kWidth), Places()); }
  static inline void store(float* p, Both v, bool past = false) {
    Both const flat = together(v.even, v.odd, Places());
    write(p, (U)flat.even, past);
    write(p + kWidth, (U)flat.odd, past);
  }
};

struct Bf16 {
  using Scalar = uint16_t;
  static inline Both load(uint16_t const* p) {
    U const words = read<U>(p);
    return {(F)(words << 16), (F)(words & 0xffff0000u)};
  }
  // The upper half of the word holds the value, rounded to nearest even; a NaN stays one.
  static inline U round(F v) {
    U const bits = (U)v;
    return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  }
  static inline void store(uint16_t* p, Both v, bool past = false) {
    write(p, (round(v.even) >> 16) | (round(v.odd) & 0xffff0000u), past);
  }
};

struct F16 {
  using Scalar = uint16_t;
  static inline F widen(U h) {
    U const exponent = h & 0x7c00u;
    U const bits = ((h & 0x7fffu) << 13) + (112u << 23);
    F const subnormal = (F)(bits + (1u << 23)) - 0x1p-14f;
    U const finite = exponent == 0u ? (U)subnormal : bits;
    return (F)((exponent == 0x7c00u ? bits + (112u << 23) : finite) | ((h & 0x8000u) << 16));
  }
  static inline U narrow(F v) {
    U const all = (U)v, bits = all & 0x7fffffffu;
    U const normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    U const subnormal = (U)((F)bits + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
    U const special = v == v ? (U){} + 0x7c00u : (U){} + 0x7e00u;
    U const finite = bits < (113u << 23) ? subnormal : normal;
    return (bits >= (143u << 23) ? special : finite) | ((all >> 16) & 0x8000u);
  }
  static inline Both load(uint16_t const* p) {
    U const words = read<U>(p);
    return {widen(words & 0xffffu), widen(words >> 16)};
  }
  static inline void store(uint16_t* p, Both v, bool past = false) {
    write(p, narrow(v.even) | (narrow(v.odd) << 16), past);
  }
};

// The kLanes-wide last group of a row, padded with zeros: those add nothing to a sum.
template <class T>
struct Padded {
  typename T::Scalar data[kLanes] = {};
  Padded() = default;
  Padded(typename T::Scalar const* from, int64_t n) { memcpy(data, from, n * sizeof *from); }
};

// A block is read in strips of steps: few enough for two sets of sums (policy and reference) to stay in
// AVX2's 16 registers. With all steps at once they spill, which costs 40 % of the time.
constexpr int kStrip = 2;

// A strip's lanes: even ones in the first half of `lanes`, odd ones in the second.
struct Sums {
  F even[kStrip] = {}, odd[kStrip] = {};
  inline void add(int step, F even_residual, F odd_residual) {
    even[step] = product_plus(even_residual, even_residual, even[step]);
    odd[step] = product_plus(odd_residual, odd_residual, odd[step]);
  }
  inline void add(int step, Both const& a, Both const& b) {
    even[step] = product_plus(a.even, b.even, even[step]);
    odd[step] = product_plus(a.odd, b.odd, odd[step]);
  }
  inline void add_to(double* lanes, int first) const {
    double* const at = lanes + first * kWidth;
    for (int step = 0; step < kStrip; ++step) {
      add_to(at + step * kWidth, even[step]);
      add_to(at + step * kWidth + kLanes / 2, odd[step]);
    }
  }
  static inline void add_to(double* lanes, F sums) {
    typedef float Half __attribute__((vector_size(2 * kWidth)));
    typedef double Wide __attribute__((vector_size(4 * kWidth)));
    Half halves[2];
    memcpy(halves, &sums, sizeof sums);
    for (int h = 0; h < 2; ++h, lanes += kWidth / 2) {
      Wide const sum = read<Wide>(lanes) + __builtin_convertvector(halves[h], Wide);
      memcpy(lanes, &sum, sizeof sum);
    }
  }
};

// Asks for the group that lies 2 KB behind this one: a core's own prefetchers start anew on every page,
// and arithmetic on one line keeps it from asking for the next.
template <class Scalar>
inline void ask_ahead(Scalar const* group) {
  constexpr int kLine = 64;
  for (int at = 0; at < kLanes * static_cast<int>(sizeof(Scalar)); at += kLine)
    __builtin_prefetch(reinterpret_cast<char const*>(group) + 2048 + at);
}

// Calls strip(begin, end, first) for every strip of every block: steps `first` to first + kStrip of the
// groups of kLanes, begin being the first of these steps in the block's first group. What is left of n
// after the last whole group starts at the returned element.
template <class S>
inline int64_t for_strips(int64_t n, S const& strip) {
  int64_t const whole = n - n % kLanes;
  for (int64_t i = 0, end; i < whole; i = end) {
    end = i + kBlock < whole ? i + kBlock : whole;
    for (int first = 0; first < kSteps; first += kStrip) strip(i + first * kStep, end, first);
  }
  return whole;
}

template <class P, class T, bool kRef>
void error_loop(typename P::Scalar const* pred, typename P::Scalar const* ref,
                typename T::Scalar const* target, int64_t n, double* lanes, double* ref_lanes) {
  int64_t const done = for_strips(n, [&](int64_t begin, int64_t end, int first) {
    Sums sums, ref_sums;
    for (int64_t i = begin; i < end; i += kLanes) {
      if (first == 0) {
        ask_ahead(pred + i);
        ask_ahead(target + i);
        if (kRef) ask_ahead(ref + i);
      }
#pragma GCC unroll 16
      for (int step = 0; step < kStrip; ++step) {
        int64_t const at = i + step * kStep;
        Both const y = T::load(target + at), p = P::load(pred + at);
        sums.add(step, p.even - y.even, p.odd - y.odd);
        if (kRef) {
          Both const r = P::load(ref + at);
          ref_sums.add(step, r.even - y.even, r.odd - y.odd);
        }
      }
    }
    sums.add_to(lanes, first);
    if (kRef) ref_sums.add_to(ref_lanes, first);
  });
  if (int64_t const rest = n - done) {
    Padded<P> const p(pred + done, rest), r(kRef ? ref + done : pred + done, rest);
    Padded<T> const t(target + done, rest);
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

template <class P, class T>
void product_loop(typename P::Scalar const* pred_w, typename T::Scalar const* target_w,
                  typename P::Scalar const* pred_l, typename T::Scalar const* target_l, int64_t n,
                  double* lanes) {
  auto const residual = [](Both const& p, Both const& y) { return Both{p.even - y.even, p.odd - y.odd}; };
  int64_t const done = for_strips(n, [&](int64_t begin, int64_t end, int first) {
    Sums sums;
    for (int64_t i = begin; i < end; i += kLanes)
#pragma GCC unroll 16
      for (int step = 0; step < kStrip; ++step) {
        int64_t const at = i + step * kStep;
        sums.add(step, residual(P::load(pred_w + at), T::load(target_w + at)),
                 residual(P::load(pred_l + at), T::load(target_l + at)));
      }
    sums.add_to(lanes, first);
  });
  if (int64_t const rest = n - done) {
    Padded<P> const p_w(pred_w + done, rest), p_l(pred_l + done, rest);
    Padded<T> const t_w(target_w + done, rest), t_l(target_l + done, rest);
    product_loop<P, T>(p_w.data, t_w.data, p_l.data, t_l.data, kLanes, lanes);
  }
}

template <class P, class T>
void product(void const* pred_w, void const* target_w, void const* pred_l, void const* target_l, int64_t n,
             double* lanes) {
  product_loop<P, T>(static_cast<typename P::Scalar const*>(pred_w),
                     static_cast<typename T::Scalar const*>(target_w),
                     static_cast<typename P::Scalar const*>(pred_l),
                     static_cast<typename T::Scalar const*>(target_l), n, lanes);
}

template <class P, class T, bool kOther, bool kError>
void gradient_loop(typename P::Scalar const* pred, typename T::Scalar const* target,
                   typename T::Scalar const* other, int64_t n, float factor, float other_factor,
                   typename P::Scalar* out, double* lanes, bool past) {
  past = past && reinterpret_cast<uintptr_t>(out) % sizeof(U) == 0;
  int64_t const i = for_strips(n, [&](int64_t begin, int64_t end, int first) {
    Sums sums;
    for (int64_t group = begin; group < end; group += kLanes) {
      if (first == 0) {
        ask_ahead(pred + group);
        ask_ahead(target + group);
      }
#pragma GCC unroll 16
      for (int step = 0; step < kStrip; ++step) {
        int64_t const at = group + step * kStep;
        Both const p = P::load(pred + at), y = T::load(target + at);
        F const even = p.even - y.even, odd = p.odd - y.odd;
        if (kError) sums.add(step, even, odd);
        Both g{even * factor, odd * factor};
        if (kOther) {
          Both const o = T::load(other + at);
          g.even += (p.even - o.even) * other_factor;
          g.odd += (p.odd - o.odd) * other_factor;
        }
        P::store(out + at, g, past);
      }
    }
    if (kError) sums.add_to(lanes, first);
  });
  wrote(past);
  if (int64_t const rest = n - i) {
    Padded<P> const p(pred + i, rest);
    Padded<T> const t(target + i, rest), o(kOther ? other + i : target + i, rest);
    Padded<P> g;
    gradient_loop<P, T, kOther, kError>(p.data, t.data, o.data, kLanes, factor, other_factor, g.data,
                                        lanes, false);
    memcpy(out + i, g.data, rest * sizeof *out);
  }
}

template <class P, class T>
void gradient(void const* pred, void const* target, void const* other, int64_t n, float factor,
              float other_factor, void* out, double* lanes, bool past) {
  auto const loop = other   ? gradient_loop<P, T, true, false>
                    : lanes ? gradient_loop<P, T, false, true>
                            : gradient_loop<P, T, false, false>;
  loop(static_cast<typename P::Scalar const*>(pred), static_cast<typename T::Scalar const*>(target),
       static_cast<typename T::Scalar const*>(other), n, factor, other_factor,
       static_cast<typename P::Scalar*>(out), lanes, past);
}

// philox() and to_normals() of philox.h for kGroups groups at once. The former is written out in
// vectors, as compilers miss the 32 x 32 -> 64 bit multiplication; the latter they vectorise themselves.
typedef uint64_t D __attribute__((vector_size(4 * kWidth)));
constexpr int kGroups = 64;

// Of the lower halves of 64-bit lanes.
inline D multiply(D a, uint32_t by) {
  D const b = (D){} + by;
#if defined(__x86_64__) && FASTPREF_WIDTH == 16
  return (D)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && FASTPREF_WIDTH == 8
  return (D)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (D)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * b;
#endif
}

// A counter or its outcome for kWidth / 2 groups: a word in the lower half of each lane, anything above.
struct Lanes {
  D x, y, z, w;
};

inline Lanes philox_lanes(Key const& key, D groups) {
  Lanes c{groups, (D){} + key.draw, (D){} + key.id_lo, (D){} + key.id_hi};
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    D const p0 = multiply(c.x, 0xD2511F53u), p1 = multiply(c.z, 0xCD9E8D57u);
    c = {(p1 >> 32) ^ c.y ^ k0, p1, (p0 >> 32) ^ c.w ^ k1, p0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

template <uint32_t... I>
inline D counting(uint32_t from, std::integer_sequence<uint32_t, I...>) {
  return D{(from + 2 * I)...};
}

// Even groups and odd ones apart: what the multiplications take and give needs no sorting in between.
inline void philox_vector(Key const& key, uint32_t first, uint32_t* x, uint32_t* y, uint32_t* z,
                          uint32_t* w) {
  std::make_integer_sequence<uint32_t, kWidth / 2> const places;
  Lanes const even = philox_lanes(key, counting(first, places));
  Lanes const odd = philox_lanes(key, counting(first + 1, places));
  auto const join = [](D a, D b, uint32_t* to) {
    D const both = (a & 0xffffffffu) | (b << 32);
    memcpy(to, &both, sizeof both);
  };
  join(even.x, odd.x, x);
  join(even.y, odd.y, y);
  join(even.z, odd.z, z);
  join(even.w, odd.w, w);
}

void normals_loop(Key const& key, uint32_t first, int64_t groups, float* out) {
  uint32_t x[kGroups], y[kGroups], z[kGroups], w[kGroups];
  Normals made[kGroups];
  for (int64_t done = 0; done < groups; done += kGroups) {
    uint32_t const from = first + static_cast<uint32_t>(done);
    for (int g = 0; g < kGroups; g += kWidth) philox_vector(key, from + g, x + g, y + g, z + g, w + g);
    for (int g = 0; g < kGroups; ++g) made[g] = to_normals({x[g], y[g], z[g], w[g]});
    int64_t const some = groups - done < kGroups ? groups - done : kGroups;
    memcpy(out + 4 * done, made, some * sizeof *made);
  }
}

template <class T>
void load_group(typename T::Scalar const* from, float* to) {
#pragma GCC unroll 16
  for (int step = 0; step < kSteps; ++step) F32::store(to + step * kStep, T::load(from + step * kStep));
}

template <class T>
void combine_loop(float on_eps, float const* eps, float on_x0, void const* x0, int64_t n, float* out) {
  auto const from = static_cast<typename T::Scalar const*>(x0);
  float x[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load_group<T>(from + i, x);
    for (int k = 0; k < kLanes; ++k) out[i + k] = combine(on_eps, eps[i + k], on_x0, x[k]);
  }
  if (int64_t const rest = n - i) {
    load_group<T>(Padded<T>(from + i, rest).data, x);
    for (int64_t k = 0; k < rest; ++k) out[i + k] = combine(on_eps, eps[i + k], on_x0, x[k]);
  }
}

template <class T>
void store_loop(float const* from, int64_t n, void* to) {
  auto const out = static_cast<typename T::Scalar*>(to);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) T::store(out + i, F32::load(from + i));
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
    {FASTPREF_ROW(product, F32), FASTPREF_ROW(product, Bf16), FASTPREF_ROW(product, F16)},
    {FASTPREF_ROW(gradient, F32), FASTPREF_ROW(gradient, Bf16), FASTPREF_ROW(gradient, F16)},
#undef FASTPREF_ROW
    normals_loop,
    {combine_loop<F32>, combine_loop<Bf16>, combine_loop<F16>},
    {store_loop<F32>, store_loop<Bf16>, store_loop<F16>},
};

}  // namespace fastpref::cpu
