// Counter-based random normals: the same bits in noising and in the loss, on the CPU and on the GPU.
//
// A draw is a pure function of (seed, pair id, draw index, domain, element): Philox4x32-10 (Salmon et
// al., SC'11) with key = seed and counter = (element / 4, domain << 28 | index, pair id low, high).
// Its four 32-bit words become four normals by Box-Muller, with our own polynomials and explicit fma,
// so every IEEE-754 machine gives the same float. Compile with contraction off.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTPREF_HD __host__ __device__ inline
#elif !defined(FASTPREF_HD)  // cpu_kernels.cpp has its own
#define FASTPREF_HD inline
#endif

namespace fastpref {

enum class Domain : uint32_t { timestep = 0, noise = 1, posterior = 2, prompt_dropout = 3, spo = 4 };

struct Words {
  uint32_t x, y, z, w;
};

struct Normals {
  float x, y, z, w;
};

// What all elements of one pair's draw share.
struct Key {
  uint32_t seed_lo, seed_hi, draw, id_lo, id_hi;
};

FASTPREF_HD Key make_key(uint64_t seed, int64_t pair_id, int64_t index, Domain domain) {
  uint64_t const id = static_cast<uint64_t>(pair_id);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          (static_cast<uint32_t>(domain) << 28) | (static_cast<uint32_t>(index) & 0x0fffffffu),
          static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
}

// 32 x 32 -> 64 bits. Written out for the GPU, whose compiler follows every such product with an addition
// of zero.
FASTPREF_HD uint64_t product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t out;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(out) : "r"(a), "r"(b));
  return out;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// The square root, correctly rounded, of a normal number. On the GPU without the branch for all others,
// which holds up the work around it.
FASTPREF_HD float square_root(float x) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  float const root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
#else
  return sqrtf(x);
#endif
}

FASTPREF_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTPREF_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTPREF_HD Words philox(Key const& key, uint32_t group) {
  uint32_t c0 = group, c1 = key.draw, c2 = key.id_lo, c3 = key.id_hi;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint64_t const p0 = product(0xD2511F53u, c0), p1 = product(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// sqrt(-2 log u) for u = (word + 1/2) / 2^32 rounded to float: at most 6.8, and 1e-15 where u is 1.
FASTPREF_HD float radius(uint32_t word) {
  float const u = fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
  uint32_t const bits = bits_of(u) - 0x3f3504f3u;  // float(sqrt(1/2)): m lies in [sqrt(1/2), sqrt(2))
  float const exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  float const m = float_of((bits & 0x007fffffu) + 0x3f3504f3u);
  float const f = m - 1.0f;  // exact; log(1 + f) = f - f^2/2 + f^3 p(f), p fitted to 6e-9
  float p = -0.07644633203744888f;
  p = fmaf(p, f, 0.12761884927749634f);
  p = fmaf(p, f, -0.13156017661094666f);
  p = fmaf(p, f, 0.14201374351978302f);
  p = fmaf(p, f, -0.16623802483081818f);
  p = fmaf(p, f, 0.200012668967247f);
  p = fmaf(p, f, -0.25000807642936707f);
  p = fmaf(p, f, 0.3333333134651184f);
  float const f2 = f * f;
  float const log1p = fmaf(f2 * f, p, fmaf(-0.5f, f2, f));
  float const square = -2.0f * fmaf(exponent, 0.693147182464599609375f, log1p);
  return square_root(square > 1e-30f ? square : 1e-30f);
}

// cos and sin of 2 pi word / 2^32: the quadrant is split off exactly, on integers.
FASTPREF_HD void circle(uint32_t word, float& cosine, float& sine) {
  uint32_t const turned = word + 0x20000000u;  // the quadrant in its upper two bits
  int32_t const rest = static_cast<int32_t>(word - (turned & 0xc0000000u));  // [-2^29, 2^29)
  float const a = static_cast<float>(rest) * 1.46291807926715968e-09f;      // 2 pi / 2^32
  float const a2 = a * a;
  float s = fmaf(-0.00019588008581195027f, a2, 0.008332748897373676f);
  s = fmaf(s, a2, -0.166666641831398f);
  s = fmaf(s * a2, a, a);
  float c = fmaf(2.4548042347305454e-05f, a2, -0.001388830365613103f);
  c = fmaf(c, a2, 0.0416666641831398f);
  c = fmaf(c * a2, a2, fmaf(-0.5f, a2, 1.0f));
  bool const swap = turned & 0x40000000u;
  cosine = float_of(bits_of(swap ? s : c) ^ ((turned + 0x40000000u) & 0x80000000u));
  sine = float_of(bits_of(swap ? c : s) ^ (turned & 0x80000000u));
}

FASTPREF_HD Normals to_normals(Words const& words) {
  float const r0 = radius(words.x), r1 = radius(words.z);
  float c0, s0, c1, s1;
  circle(words.y, c0, s0);
  circle(words.w, c1, s1);
  return {r0 * c0, r0 * s0, r1 * c1, r1 * s1};
}

// Elements 4 group .. 4 group + 3 of the draw.
FASTPREF_HD Normals normals(Key const& key, uint32_t group) { return to_normals(philox(key, group)); }

// x_t = a x0 + s eps and y = p eps + q x0, each with one rounding of the product it adds to.
FASTPREF_HD float combine(float on_eps, float eps, float on_x0, float x0) {
  return fmaf(on_eps, eps, on_x0 * x0);
}

}  // namespace fastpref
