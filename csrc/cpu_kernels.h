// The inner loops of the CPU launchers: one table of functions per instruction set, equal bits from
// each.
#pragma once
#include "kernels.h"
#include "philox.h"

namespace fastpref::cpu {

constexpr int kLanes = 64;   // parallel sums of squares, whatever the width of the machine's vectors
constexpr int kBlock = 512;  // elements summed in fp32 (8 a lane) before the lanes go to float64
constexpr int kDtypes = 3;   // in the order of Dtype

// All pointers may be unaligned; n counts elements. `lanes` are [kLanes] float64 sums, added to.
struct Kernels {
  char const* name;
  // lanes += (pred - target)^2, and the same of `ref` into ref_lanes where ref is set.
  void (*errors[kDtypes][kDtypes])(void const* pred, void const* ref, void const* target, int64_t n,
                                   double* lanes, double* ref_lanes);
  // lanes += (pred_w - target_w)(pred_l - target_l)
  void (*product[kDtypes][kDtypes])(void const* pred_w, void const* target_w, void const* pred_l,
                                    void const* target_l, int64_t n, double* lanes);
  // out = factor (pred - target), plus other_factor (pred - other) where `other` is set;
  // lanes += (pred - target)^2 where lanes is set (not together with `other`). past: write `out` around
  // the caches, which is faster where it is larger than they are.
  void (*gradient[kDtypes][kDtypes])(void const* pred, void const* target, void const* other, int64_t n,
                                     float factor, float other_factor, void* out, double* lanes, bool past);
  // out[0 .. 4 groups) = normals of groups first ..
  void (*normals)(Key const& key, uint32_t first, int64_t groups, float* out);
  // out = on_eps eps + on_x0 x0
  void (*combine[kDtypes])(float on_eps, float const* eps, float on_x0, void const* x0, int64_t n,
                           float* out);
  void (*store[kDtypes])(float const* from, int64_t n, void* to);
};

extern Kernels const portable;
#if defined(__x86_64__)
extern Kernels const avx2, avx512;
#endif

// Chooses an instruction set by name, in place of the widest; false where this machine or build has none
// such.
bool use(char const* name);

// How many objectives csrc/objectives.h has: numbers from here on are for the oracle.
int objectives();

}  // namespace fastpref::cpu
