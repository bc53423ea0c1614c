// Runs the CUDA launchers under the emulation: every case against a float64 reference, and the same bits
// in every order of threads and blocks and on every grid.
//
//   kernels all | few         the cases; prints what differs and ends with 1
//   kernels epilogue < lines  "objective, 10 hypers, e_w e_l r_w r_l, gain, weight, cross" a line;
//                             prints "loss margin importance_w importance_l coef_w coef_l lambda"
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "objectives.h"
#include "philox.h"

using namespace fastpref;

namespace {

int failures = 0;

void fail(std::string const& where, std::string const& what) {
  if (++failures <= 20) std::printf("FAIL %s: %s\n", where.c_str(), what.c_str());
}

// The launcher's answer is null or a message.
void must(char const* error) {
  if (error) throw std::string(error);
}

size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
double ulp_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 0x1p-23 : dtype == Dtype::bf16 ? 0x1p-7 : 0x1p-10;
}

// A tensor in memory of exactly its size, so that AddressSanitizer sees the first byte behind it; it
// begins `offset` elements after a 16-byte boundary. Poisoned with NaNs until written.
struct Tensor {
  Dtype dtype;
  int64_t offset, elements;
  std::vector<unsigned char> bytes;

  Tensor(Dtype dtype, int64_t elements, int64_t offset)
      : dtype(dtype),
        offset(offset),
        elements(elements),
        bytes((offset + elements) * size_of(dtype), 0xff) {}
  void* data() { return bytes.data() + offset * size_of(dtype); }
  template <typename T>
  T& as(int64_t i) {
    return reinterpret_cast<T*>(data())[i];
  }
  float get(int64_t i) {
    if (dtype == Dtype::f32) return as<float>(i);
    return dtype == Dtype::bf16 ? __bfloat162float(as<__nv_bfloat16>(i)) : __half2float(as<__half>(i));
  }
  void set(int64_t i, float x) {
    if (dtype == Dtype::f32) as<float>(i) = x;
    if (dtype == Dtype::bf16) as<__nv_bfloat16>(i) = __float2bfloat16_rn(x);
    if (dtype == Dtype::f16) as<__half>(i) = __float2half_rn(x);
  }
  static float rounded(Dtype dtype, float x) {
    Tensor t(dtype, 1, 0);
    t.set(0, x);
    return t.get(0);
  }
};

struct Case {
  Dtype pred, target;
  int64_t pairs, members, elements, offset;
  bool shared, regenerate, with_ref;
  int objective;

  // With a safeguard: half of the cases that can have one.
  bool guarded() const { return members == 2 && !shared && (elements + int(pred) + int(target)) % 2 == 0; }
  std::string name() const {
    char text[200];
    std::snprintf(
        text, sizeof text, "pred %d target %d pairs %d members %d elements %d offset %d%s%s%s%s objective %d",
        int(pred), int(target), int(pairs), int(members), int(elements), int(offset),
        shared ? " shared" : "", regenerate ? " regenerated" : "", with_ref ? " ref" : "",
        guarded() ? " guarded" : "", objective);
    return text;
  }
};

Hyper const kHyper{4.0, 0.1, 0.05, 0.1, 0.5, 2, 0, 0.3, 1, 0.6};

using Doubles = std::vector<double>;
Doubles poisoned(size_t n) { return Doubles(n, std::nan("")); }

// One case: its inputs, one run of every launcher, and the check of the outputs.
struct Trial {
  Case const c;
  Shape shape;
  Tensor pred, ref, target, noisy, grad, seed;
  std::vector<unsigned char> workspace;
  std::vector<int64_t> pair_id, index;
  std::vector<float> p, q;
  Doubles hyper, gain, weight, upstream{0.75};
  Doubles err, ref_err, lone_err, seed_err, loss, pair_loss, margin, importance, coef, cross, lambda;

  explicit Trial(Case const& c)
      : c(c),
        shape{c.pairs * c.members, c.pairs, c.shared ? c.pairs : c.pairs * c.members, c.elements},
        pred(c.pred, shape.pred_rows * c.elements, c.offset),
        ref(pred),
        target(c.target, shape.rows * c.elements, c.offset),
        noisy(c.pred, shape.rows * c.elements, c.offset),
        grad(pred),
        seed(pred) {
    std::mt19937 random(1 + unsigned(c.elements));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < pred.elements; ++i) {
      pred.set(i, normal(random));
      ref.set(i, pred.get(i) + 0.1f * normal(random));
    }
    for (int64_t i = 0; i < target.elements; ++i) target.set(i, normal(random));
    for (int64_t i = 0; i < c.pairs; ++i) {
      pair_id.push_back(0x123456789abcdef0 + 7 * i);
      index.push_back(3 + i);
      p.push_back(0.9f - 0.1f * float(i));
      q.push_back(-0.3f - 0.2f * float(i));
      gain.push_back(0.2 + 0.1 * double(i));
      weight.push_back(1.0 + 0.5 * double(i));
    }
    hyper.resize(kHypers);
    std::memcpy(hyper.data(), &kHyper, sizeof kHyper);
  }

  Draws draws() { return {77, pair_id.data(), index.data()}; }
  ErrorArgs errors() {
    workspace.assign(cuda::workspace_bytes(shape, c.with_ref, c.guarded()), 0xff);
    Target const y{target.data(), c.target, c.regenerate ? draws() : Draws{}, p.data(), q.data()};
    return {shape,          pred.data(),     c.with_ref ? ref.data() : nullptr, c.pred, y, err.data(),
            ref_err.data(), workspace.data(), nullptr};
  }
  EpilogueArgs epilogue() {
    return {c.pairs,        c.objective, hyper.data(),     gain.data(),   weight.data(),     err.data(),
            ref_err.data(), loss.data(), pair_loss.data(), margin.data(), importance.data(), coef.data(),
            c.guarded() ? cross.data() : nullptr, c.guarded() ? lambda.data() : nullptr};
  }

  // Every launcher once; the bytes of all that they wrote.
  std::vector<unsigned char> run() {
    size_t const rows = shape.rows, pairs = shape.pairs;
    err = lone_err = seed_err = importance = coef = poisoned(rows);
    ref_err = c.with_ref ? poisoned(rows) : Doubles(rows, 1.25);
    pair_loss = margin = cross = lambda = poisoned(pairs);
    loss = poisoned(1);
    for (Tensor* out : {&noisy, &grad, &seed}) std::fill(out->bytes.begin(), out->bytes.end(), 0xff);

    must(cuda::add_noise(
        {shape, target.data(), noisy.data(), c.target, c.pred, draws(), p.data(), q.data()}, nullptr));
    must(cuda::pair_error(errors(), nullptr));
    lone_err = err;
    if (c.members == 2) {
      std::fill(err.begin(), err.end(), std::nan(""));
      ErrorArgs both = errors();
      if (c.guarded()) both.cross = cross.data();
      must(cuda::pair_loss({both, epilogue()}, nullptr));
      Doubles const before = coef;
      must(cuda::loss_epilogue(epilogue(), nullptr));
      if (std::memcmp(before.data(), coef.data(), rows * sizeof(double)))
        fail(c.name(), "the epilogue alone differs");
    } else {
      for (size_t r = 0; r < rows; ++r) coef[r] = 0.5 + double(r);
    }
    ErrorArgs args = errors();
    must(cuda::pair_grad(
        {shape, pred.data(), c.pred, args.target, coef.data(), upstream.data(), 2.0, grad.data()},
        nullptr));
    if (!c.shared) {
      args.ref = nullptr;
      args.err = seed_err.data();
      must(cuda::unit_seed({args, 1024.0, seed.data()}, nullptr));
    }

    std::vector<unsigned char> all;
    for (Tensor* out : {&noisy, &grad, &seed}) all.insert(all.end(), out->bytes.begin(), out->bytes.end());
    for (Doubles* out : {&err, &lone_err, &seed_err, &ref_err, &loss, &pair_loss, &margin, &importance,
                         &coef, &cross, &lambda}) {
      auto const* bytes = reinterpret_cast<unsigned char const*>(out->data());
      all.insert(all.end(), bytes, bytes + out->size() * sizeof(double));
    }
    return all;
  }

  void close(char const* what, int64_t at, double got, double expected, double tolerance) {
    if (std::fabs(got - expected) <= tolerance) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s[%d] is %.17g, expected %.17g within %.3g", what, int(at), got,
                  expected, tolerance);
    fail(c.name(), text);
  }

  // METHODS section 4, with every sum taken in float64.
  void check() {
    double const eps = 0x1p-23;
    int64_t const n = c.elements;
    Doubles expected(pred.elements, 0.0), slack(pred.elements, 0.0);
    double mean_loss = 0;
    for (int64_t r = 0; r < shape.rows; ++r) {
      int64_t const pair = r % c.pairs, row = r % shape.pred_rows;
      Key const key = make_key(77, pair_id[pair], index[pair], Domain::noise);
      double e = 0, e_ref = 0;
      double const unit = 2.0 / double(n), k = upstream[0] * 2.0 * coef[r] * unit;
      for (int64_t i = 0; i < n; ++i) {
        Normals const four = normals(key, uint32_t(i / 4));
        float const noise[4] = {four.x, four.y, four.z, four.w}, x0 = target.get(r * n + i);
        float const x_t = Tensor::rounded(c.pred, combine(q[pair], noise[i % 4], p[pair], x0));
        if (noisy.get(r * n + i) != x_t) close("x_t", r * n + i, noisy.get(r * n + i), x_t, 0);
        double const y = c.regenerate ? combine(p[pair], noise[i % 4], q[pair], x0) : x0;
        double const d = pred.get(row * n + i) - y, d_ref = ref.get(row * n + i) - y;
        double const size = std::fabs(pred.get(row * n + i)) + std::fabs(y);
        e += d * d / double(n), e_ref += d_ref * d_ref / double(n);
        expected[row * n + i] += k * d;
        slack[row * n + i] += std::fabs(k) * 4 * eps * size;
        if (!c.shared) {
          double const g = 1024.0 * unit * d;
          close("seed", r * n + i, seed.get(r * n + i), g,
                1024.0 * unit * 4 * eps * size + ulp_of(c.pred) * std::fabs(g) + 1e-7);
        }
      }
      close("err", r, err[r], e, 4 * eps * e);
      close("pair_error", r, lone_err[r], err[r], 0);
      if (!c.shared) close("unit_seed err", r, seed_err[r], err[r], 0);
      close("ref_err", r, ref_err[r], c.with_ref ? e_ref : 1.25, c.with_ref ? 4 * eps * e_ref : 0);
    }
    for (int64_t i = 0; i < grad.elements; ++i)
      close("grad", i, grad.get(i), expected[i], slack[i] + ulp_of(c.pred) * std::fabs(expected[i]) + 1e-7);
    for (int64_t w = 0; c.members == 2 && w < c.pairs; ++w) {
      int64_t const l = w + c.pairs;
      if (c.guarded()) {
        Key const key = make_key(77, pair_id[w], index[w], Domain::noise);
        double product = 0;
        for (int64_t i = 0; i < n; ++i) {
          Normals const four = normals(key, uint32_t(i / 4));
          float const noise[4] = {four.x, four.y, four.z, four.w};
          double d[2];
          for (int64_t m = 0; m < 2; ++m) {
            int64_t const at = (m ? l : w) * n + i;
            float const x0 = target.get(at);
            d[m] = pred.get(at) - (c.regenerate ? combine(p[w], noise[i % 4], q[w], x0) : x0);
          }
          product += d[0] * d[1] / double(n);
        }
        close("cross", w, cross[w], product, 4 * eps * std::sqrt(err[w] * err[l]));
      }
      PairResult const out = evaluate(c.objective, err[w], err[l], ref_err[w], ref_err[l], gain[w],
                                      weight[w], c.guarded() ? cross[w] : 0.0, kHyper);
      double const got[] = {pair_loss[w], margin[w], importance[w],                         importance[l],
                            coef[w],      coef[l],   c.guarded() ? lambda[w] : out.lambda};
      double const want[] = {out.loss,   out.margin, out.importance_w, out.importance_l,
                             out.coef_w, out.coef_l, out.lambda};
      for (int i = 0; i < 7; ++i) close("outcome", 7 * w + i, got[i], want[i], 1e-12 * std::fabs(want[i]));
      mean_loss += out.loss / double(c.pairs);
    }
    if (c.members == 2) close("loss", 0, loss[0], mean_loss, 1e-12 * std::fabs(mean_loss));
  }
};

struct Schedule {
  std::string name;
  emulation::Settings settings;
};
using emulation::Order;
std::vector<Schedule> schedules(unsigned random) {
  std::vector<Schedule> list{{"forward", {Order::forward, 1, 1, 0}},
                             {"reverse", {Order::reverse, 1, 1, 0}}};
  for (unsigned seed = 1; seed <= random; ++seed)
    list.push_back({"random " + std::to_string(seed), {Order::random, seed % 2 ? 2 : 40, 4, seed}});
  return list;
}

void check(Case const& c, unsigned random) {
  Trial trial(c);
  std::vector<unsigned char> first;
  for (Schedule const& schedule : schedules(random)) {
    emulation::settings = schedule.settings;
    std::vector<unsigned char> const bytes = trial.run();
    if (first.empty()) {
      first = bytes;
      trial.check();
    } else if (bytes != first) {
      ++failures;
      auto const at = std::mismatch(bytes.begin(), bytes.end(), first.begin()).first - bytes.begin();
      std::printf("orders disagree, %s: %s, byte %zd of %zu\n", c.name().c_str(), schedule.name.c_str(), at,
                  bytes.size());
    }
  }
}

// One element that is not a number reaches the errors, the loss, the coefficients and the gradient.
void check_nan(float bad, bool in_ref) {
  Trial trial({Dtype::bf16, Dtype::f32, 2, 2, 8200, 0, false, true, true, 3});
  (in_ref ? trial.ref : trial.pred).set(2 * 8200 - 1, bad);  // the last element of the second winner
  emulation::settings = {};
  trial.run();
  bool const others = std::isfinite(trial.pair_loss[0]) && std::isfinite(trial.err[0]);
  bool const reached = !std::isfinite((in_ref ? trial.ref_err : trial.err)[1]) &&
                       std::isnan(trial.pair_loss[1]) && std::isnan(trial.loss[0]) &&
                       std::isnan(trial.coef[1]) && std::isnan(trial.grad.get(8200));
  if (!others || !reached) fail("not a number", "it was lost, or reached the other pair");
}

std::vector<Case> cases() {
  std::vector<Case> list;
  Dtype const f32 = Dtype::f32, bf16 = Dtype::bf16, f16 = Dtype::f16;
  int objective = 0;
  for (Dtype pred : {f32, bf16, f16}) {
    for (Dtype target : {f32, bf16, f16}) {
      auto const add = [&](int64_t pairs, int64_t members, int64_t elements, int64_t offset, bool shared,
                           bool regenerate, bool ref) {
        list.push_back(
            {pred, target, pairs, members, elements, offset, shared, regenerate, ref, objective++ % 7});
      };
      add(1, 2, 1, 0, false, true, true);
      add(3, 2, 7, 3, false, false, true);
      add(2, 2, 1024, 0, false, true, false);
      add(2, 1, 8192, 0, false, true, false);
      add(1, 1, 333, 1, false, false, false);
      add(2, 2, 8193, 0, false, false, true);
      add(2, 2, 900, 4, true, true, true);
    }
  }
  list.push_back({bf16, bf16, 3, 2, 24584, 0, false, true, true, 0});  // three chunks and eight elements
  list.push_back({f32, bf16, 2, 2, 16385, 1, true, true, true, 6});
  list.push_back(
      {bf16, f32, 70, 2, 5, 0, false, true, true, 5});  // more pairs than a small block has threads
  return list;
}

int epilogue() {
  emulation::settings = {};
  int objective;
  while (std::cin >> objective) {
    Doubles in(kHypers + 7), err(2), ref(2), loss(1), pair_loss(1), margin(1), importance(2), coef(2),
        lambda(1);
    for (double& x : in) std::cin >> x;
    double const* rest = in.data() + kHypers;
    err = {rest[0], rest[1]}, ref = {rest[2], rest[3]};
    must(cuda::loss_epilogue({1, objective, in.data(), rest + 4, rest + 5, err.data(), ref.data(),
                              loss.data(), pair_loss.data(), margin.data(), importance.data(), coef.data(),
                              rest + 6, lambda.data()},
                             nullptr));
    std::printf("%.17g %.17g %.17g %.17g %.17g %.17g %.17g\n", loss[0], margin[0], importance[0],
                importance[1], coef[0], coef[1], lambda[0]);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  std::string const what = argc == 2 ? argv[1] : "";
  if (what == "epilogue") return epilogue();
  if (what != "all" && what != "few") throw std::string("usage: kernels all | few | epilogue");
  // One case in many random orders, and the others in one.
  check({Dtype::bf16, Dtype::bf16, 2, 2, 16389, 1, false, true, true, 0}, 20);
  int count = 1;
  if (what == "all") {
    for (Case const& c : cases()) check(c, 1), ++count;
    check_nan(std::nanf(""), false);
    check_nan(INFINITY, true);
  }
  std::printf("%d cases, %d differences\n", count, failures);
  return failures ? 1 : 0;
} catch (std::string const& error) {
  std::printf("%s\n", error.c_str());
  return 2;
}
