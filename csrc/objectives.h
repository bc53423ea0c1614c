// Every objective as one functor of the four errors; dual numbers give its derivatives.
//
// To add an objective: write its functor, add its line to FASTPREF_OBJECTIVES at the end, and write
// the independent line in fastpref/loss/oracle.py. The formulas and their sources stand in the README.
#pragma once
#include <cmath>

#include "philox.h"  // FASTPREF_HD

namespace fastpref {

// A value and its derivatives by the two policy errors.
struct Dual {
  double v, w, l;
};

FASTPREF_HD Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.w + b.w, a.l + b.l}; }
FASTPREF_HD Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.w - b.w, a.l - b.l}; }
FASTPREF_HD Dual operator+(Dual a, double b) { return {a.v + b, a.w, a.l}; }
FASTPREF_HD Dual operator-(Dual a, double b) { return {a.v - b, a.w, a.l}; }
FASTPREF_HD Dual operator*(Dual a, double b) { return {a.v * b, a.w * b, a.l * b}; }
FASTPREF_HD Dual operator-(Dual a) { return {-a.v, -a.w, -a.l}; }
FASTPREF_HD Dual operator*(Dual a, Dual b) {
  return {a.v * b.v, a.w * b.v + a.v * b.w, a.l * b.v + a.v * b.l};
}

// f(a), given its value and its derivative at a.v.
FASTPREF_HD Dual chain(Dual a, double value, double slope) { return {value, slope * a.w, slope * a.l}; }

FASTPREF_HD double sigmoid(double x) {
  double const e = exp(-fabs(x));
  return (x >= 0 ? 1.0 : e) / (1.0 + e);
}
FASTPREF_HD double log_sigmoid(double x) { return (x < 0 ? x : 0.0) - log1p(exp(-fabs(x))); }

FASTPREF_HD Dual sigmoid(Dual a) { return chain(a, sigmoid(a.v), sigmoid(a.v) * sigmoid(-a.v)); }
FASTPREF_HD Dual log_sigmoid(Dual a) { return chain(a, log_sigmoid(a.v), sigmoid(-a.v)); }

// Comparisons are written so that a NaN passes through.
FASTPREF_HD double clip(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }
FASTPREF_HD Dual clip(Dual a, double lo, double hi) {
  return chain(a, clip(a.v, lo, hi), a.v < lo || a.v > hi ? 0.0 : 1.0);
}

enum class Combine { max = 0, min = 1, mean = 2 };
enum class Placement { ratio = 0, loss = 1 };  // of the weights: within the sigmoid, or before it

// Mirrored by objectives.py, which fills the tensor the kernels read.
struct Hyper {
  double beta, label_smoothing, alpha, clip, mask_threshold, combine, inverse_weight, sft_weight, placement,
      safeguard;
};
constexpr int kHypers = sizeof(Hyper) / sizeof(double);

struct Errors {
  Dual w, l;            // policy
  double ref_w, ref_l;  // reference
  double gain;          // g of the importance weight; k of SPO; 0 where unused
};

struct Outcome {
  Dual loss;
  double margin;                        // what the loss saw
  double importance_w, importance_l;    // wbar; 1 where the objective has none
};

FASTPREF_HD Dual margin(Errors const& e, Hyper const& h) {
  return ((e.w - e.ref_w) - (e.l - e.ref_l)) * (-0.5 * h.beta);
}
FASTPREF_HD Dual smoothed(Dual m, double s) {
  return log_sigmoid(m) * (s - 1.0) + log_sigmoid(-m) * -s;
}
FASTPREF_HD double importance(Dual error, double gain) { return exp(-0.5 * gain * error.v); }
FASTPREF_HD bool kept(double weight, Hyper const& h) { return !(weight < h.mask_threshold); }

struct Dpo {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    Dual const m = margin(e, h);
    return {smoothed(m, h.label_smoothing), m.v, 1, 1};
  }
};

struct Ipo {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    Dual const gap = (e.l - e.ref_l) - (e.w - e.ref_w) - 1.0 / (2.0 * h.beta);
    return {gap * gap, margin(e, h).v, 1, 1};
  }
};

struct Hinge {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    Dual const m = margin(e, h), slack = -m + 1.0;
    return {slack.v < 0 ? Dual{0, 0, 0} : slack, m.v, 1, 1};
  }
};

struct Dmpo {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    Dual const m = margin(e, h);
    Dual const right = sigmoid(m) * (log_sigmoid(m) - log1p(-h.alpha));
    Dual const wrong = sigmoid(-m) * (log_sigmoid(-m) - log(h.alpha));
    return {right + wrong, m.v, 1, 1};
  }
};

struct DpoCm {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    double const weight_w = importance(e.w, e.gain), weight_l = importance(e.l, e.gain);
    bool const keep_w = kept(weight_w, h), keep_l = kept(weight_l, h);
    double const c_w = keep_w ? fastpref::clip(weight_w, 1.0 - h.clip, 1.0 + h.clip) : 0.0;
    double const c_l = keep_l ? fastpref::clip(weight_l, 1.0 - h.clip, 1.0 + h.clip) : 0.0;
    if (static_cast<Placement>(static_cast<int>(h.placement)) == Placement::loss) {
      Dual const m = margin(e, h);
      return {smoothed(m, h.label_smoothing) * (0.5 * (c_w + c_l)), m.v, weight_w, weight_l};
    }
    Dual const m = ((e.w - e.ref_w) * c_w - (e.l - e.ref_l) * c_l) * (-0.5 * h.beta);
    Dual const loss = keep_w || keep_l ? smoothed(m, h.label_smoothing) : Dual{0, 0, 0};
    return {loss, m.v, weight_w, weight_l};
  }
};

struct Sdpo {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    double const weight_w = importance(e.w, e.gain), weight_l = importance(e.l, e.gain);
    Combine const how = static_cast<Combine>(static_cast<int>(h.combine));
    double const larger = weight_w > weight_l ? weight_w : weight_l;
    double const smaller = weight_w > weight_l ? weight_l : weight_w;
    double const weight = how == Combine::max   ? larger
                          : how == Combine::min ? smaller
                                                : 0.5 * (weight_w + weight_l);
    double const c = fastpref::clip(weight, 1.0 - h.clip, 1.0 + h.clip);
    double const scale = h.inverse_weight != 0 ? 1.0 / c : c, keep = kept(weight, h) ? 1.0 : 0.0;
    bool const inside = static_cast<Placement>(static_cast<int>(h.placement)) == Placement::ratio;
    Dual const m = margin(e, h) * (inside ? scale : 1.0);
    Dual const loss = smoothed(m, h.label_smoothing) * (inside ? keep : keep * scale);
    return {loss, m.v, weight_w, weight_l};
  }
};

struct Spo {
  FASTPREF_HD static Outcome apply(Errors const& e, Hyper const& h) {
    double const lo = log1p(-h.clip), hi = log1p(h.clip);
    Dual const rho_w = fastpref::clip((e.w - e.ref_w) * (-0.5 * e.gain), lo, hi);
    Dual const rho_l = fastpref::clip((e.l - e.ref_l) * (-0.5 * e.gain), lo, hi);
    Dual const m = (rho_w - rho_l) * h.beta;
    return {-log_sigmoid(m), m.v, 1, 1};
  }
};

// In the order of fastpref.objectives.OBJECTIVES: the place is the number passed to the kernels.
#define FASTPREF_OBJECTIVES(X) X(0, Dpo) X(1, Ipo) X(2, Hinge) X(3, Dmpo) X(4, DpoCm) X(5, Sdpo) X(6, Spo)

struct PairResult {
  double loss, margin, importance_w, importance_l, coef_w, coef_l, lambda;
};

// How much of the loser's gradient the safeguard leaves: as much as lets the winner's error fall, to
// first order, by mu of what the winner's own gradient does. All of it where it works with the winner's.
FASTPREF_HD double safeguard(double coef_w, double coef_l, double err_w, double cross, double mu) {
  if (!(coef_l < 0 && cross > 0)) return 1;
  double const share = coef_w < -coef_l ? coef_w / -coef_l : 1;
  double const most = (1 - mu) * share * err_w;
  return most < cross ? most / cross : 1;
}

// weight * (L + sft_weight * e_w) and its derivatives, the loser's times lambda. An error or a gain that
// is not finite makes loss and coefficients NaN whatever the objective says (a mask or a saturated
// sigmoid would hide it).
FASTPREF_HD PairResult evaluate(int objective, double err_w, double err_l, double ref_w, double ref_l,
                                double gain, double weight, double cross, Hyper const& h) {
  Errors const e{{err_w, 1, 0}, {err_l, 0, 1}, ref_w, ref_l, gain};
  Outcome out{};
  switch (objective) {
#define FASTPREF_CASE(number, functor) \
  case number:                         \
    out = functor::apply(e, h);        \
    break;
    FASTPREF_OBJECTIVES(FASTPREF_CASE)
#undef FASTPREF_CASE
  }
  Dual const total = (out.loss + e.w * h.sft_weight) * weight;
  double const poison = 0.0 * (err_w + err_l + ref_w + ref_l + gain);
  double const lambda = safeguard(total.w, total.l, err_w, cross, h.safeguard);
  return {total.v + poison, out.margin,       out.importance_w,          out.importance_l,
          total.w + poison, total.l * lambda + poison, lambda};
}

}  // namespace fastpref
