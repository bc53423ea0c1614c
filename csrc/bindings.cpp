// The Python module fastpref._C: integers to pointers, launch errors to exceptions, build facts. No
// logic.
//
// _C.cpu and _C.cuda have the same functions; the last argument is the number of threads, or the stream.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py
#include "cpu_kernels.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastpref;

namespace {

using Address = uintptr_t;  // 0: null

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Draws draws(int64_t seed, Address pair_id, Address index) {
  return {static_cast<uint64_t>(seed), pointer<int64_t>(pair_id), pointer<int64_t>(index)};
}

Target target_of(Address data, int dtype, int64_t seed, Address pair_id, Address index, Address p,
                 Address q) {
  return {pointer<void>(data), Dtype(dtype), draws(seed, pair_id, index), pointer<float>(p),
          pointer<float>(q)};
}

char const* name_of(int dtype) {
  constexpr char const* names[] = {"float32", "bfloat16", "float16"};
  return names[dtype];
}

// What the two devices' launchers differ in: how they are called and what the last argument means.
struct Cpu {
  using Last = int;
  template <class Args>
  static void call(char const*, Shape const&, char const*, void (*launch)(Args const&, int),
                   Args const& args, int threads) {
    py::gil_scoped_release const release;
    launch(args, threads);
  }
  static constexpr auto add_noise = cpu::add_noise;
  static constexpr auto pair_error = cpu::pair_error;
  static constexpr auto pair_loss = cpu::pair_loss;
  static constexpr auto pair_grad = cpu::pair_grad;
  static constexpr auto unit_seed = cpu::unit_seed;
  static void loss_epilogue(EpilogueArgs const& args, int) { cpu::loss_epilogue(args); }
};

#ifdef FASTPREF_WITH_CUDA
struct Cuda {
  using Last = Address;
  template <class Args>
  static void call(char const* name, Shape const& s, char const* dtype,
                   char const* (*launch)(Args const&, void*), Args const& args, Address stream) {
    char const* const error = launch(args, pointer<void>(stream));
    if (!error) return;
    throw std::runtime_error(std::string("fastpref.") + name + ": " + error + " (rows " +
                             std::to_string(s.rows) + ", pairs " + std::to_string(s.pairs) +
                             ", prediction rows " + std::to_string(s.pred_rows) + ", elements " +
                             std::to_string(s.elements) + ", " + dtype + ")");
  }
  static constexpr auto add_noise = cuda::add_noise;
  static constexpr auto pair_error = cuda::pair_error;
  static constexpr auto pair_loss = cuda::pair_loss;
  static constexpr auto pair_grad = cuda::pair_grad;
  static constexpr auto unit_seed = cuda::unit_seed;
  static constexpr auto loss_epilogue = cuda::loss_epilogue;
};
#endif

template <class Device>
void define(py::module_ m) {
  using Last = typename Device::Last;
  using A = Address;
  using I = int64_t;

  m.def("add_noise", [](I rows, I pairs, I elements, A x0, int x0_dtype, A out, int out_dtype, I seed,
                        A pair_id, A index, A a, A s, Last last) {
    NoiseArgs const args{{rows, pairs, rows, elements},
                         pointer<void>(x0),
                         pointer<void>(out),
                         Dtype(x0_dtype),
                         Dtype(out_dtype),
                         draws(seed, pair_id, index),
                         pointer<float>(a),
                         pointer<float>(s)};
    Device::call("add_noise", args.shape, name_of(x0_dtype), Device::add_noise, args, last);
  });

  m.def("pair_error", [](I rows, I pairs, I pred_rows, I elements, A pred, A ref, int dtype, A target,
                         int target_dtype, I seed, A pair_id, A index, A p, A q, A err, A ref_err,
                         A workspace, A cross, Last last) {
    ErrorArgs const args{{rows, pairs, pred_rows, elements},
                         pointer<void>(pred),
                         pointer<void>(ref),
                         Dtype(dtype),
                         target_of(target, target_dtype, seed, pair_id, index, p, q),
                         pointer<double>(err),
                         pointer<double>(ref_err),
                         pointer<void>(workspace),
                         pointer<double>(cross)};
    Device::call("pair_error", args.shape, name_of(dtype), Device::pair_error, args, last);
  });

  m.def("pair_loss", [](I pairs, I pred_rows, I elements, A pred, A ref, int dtype, A target,
                        int target_dtype, I seed, A pair_id, A index, A p, A q, A err, A ref_err,
                        A workspace, int objective, A hyper, A gain, A weight, A loss, A pair_loss,
                        A margin, A importance, A coef, A cross, A lambda, Last last) {
    LossArgs const args{{{2 * pairs, pairs, pred_rows, elements},
                         pointer<void>(pred),
                         pointer<void>(ref),
                         Dtype(dtype),
                         target_of(target, target_dtype, seed, pair_id, index, p, q),
                         pointer<double>(err),
                         pointer<double>(ref_err),
                         pointer<void>(workspace),
                         pointer<double>(cross)},
                        {pairs, objective, pointer<double>(hyper), pointer<double>(gain),
                         pointer<double>(weight), pointer<double>(err), pointer<double>(ref_err),
                         pointer<double>(loss), pointer<double>(pair_loss), pointer<double>(margin),
                         pointer<double>(importance), pointer<double>(coef), pointer<double>(cross),
                         pointer<double>(lambda)}};
    Device::call("pair_loss", args.error.shape, name_of(dtype), Device::pair_loss, args, last);
  });

  m.def("loss_epilogue", [](I pairs, int objective, A hyper, A gain, A weight, A err, A ref_err, A loss,
                            A pair_loss, A margin, A importance, A coef, A cross, A lambda, Last last) {
    EpilogueArgs const args{pairs,
                            objective,
                            pointer<double>(hyper),
                            pointer<double>(gain),
                            pointer<double>(weight),
                            pointer<double>(err),
                            pointer<double>(ref_err),
                            pointer<double>(loss),
                            pointer<double>(pair_loss),
                            pointer<double>(margin),
                            pointer<double>(importance),
                            pointer<double>(coef),
                            pointer<double>(cross),
                            pointer<double>(lambda)};
    Device::call("loss_epilogue", {2 * pairs, pairs, 2 * pairs, 0}, "float64", Device::loss_epilogue,
                 args, last);
  });

  m.def("pair_grad",
        [](I rows, I pairs, I pred_rows, I elements, A pred, int dtype, A target, int target_dtype,
           I seed, A pair_id, A index, A p, A q, A coef, A grad, double scale, A grad_pred, Last last) {
          GradArgs const args{{rows, pairs, pred_rows, elements},
                              pointer<void>(pred),
                              Dtype(dtype),
                              target_of(target, target_dtype, seed, pair_id, index, p, q),
                              pointer<double>(coef),
                              pointer<double>(grad),
                              scale,
                              pointer<void>(grad_pred)};
          Device::call("pair_grad", args.shape, name_of(dtype), Device::pair_grad, args, last);
        });

  m.def("unit_seed",
        [](I rows, I pairs, I elements, A pred, int dtype, A target, int target_dtype, I seed, A pair_id,
           A index, A p, A q, A err, A workspace, double scale, A out, Last last) {
          SeedArgs const args{{{rows, pairs, rows, elements},
                               pointer<void>(pred),
                               nullptr,
                               Dtype(dtype),
                               target_of(target, target_dtype, seed, pair_id, index, p, q),
                               pointer<double>(err),
                               nullptr,
                               pointer<void>(workspace),
                               nullptr},
                              scale,
                              pointer<void>(out)};
          Device::call("unit_seed", args.error.shape, name_of(dtype), Device::unit_seed, args, last);
        });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::module_ cpu_module = m.def_submodule("cpu");
  define<Cpu>(cpu_module);
  cpu_module.def("features", cpu::features);
  cpu_module.def("use", [](char const* name) { return cpu::use(name); });
#ifdef FASTPREF_WITH_CUDA
  py::module_ cuda_module = m.def_submodule("cuda");
  define<Cuda>(cuda_module);
  cuda_module.def("workspace_bytes",
                  [](int64_t rows, int64_t pairs, int64_t pred_rows, int64_t elements, bool with_ref,
                     bool with_cross) {
                    return cuda::workspace_bytes({rows, pairs, pred_rows, elements}, with_ref, with_cross);
                  });
#endif
  m.attr("objectives") = cpu::objectives();
  m.def("build_info", [] {
    py::dict info;
    info["cpu"] = cpu::features();
    info["compiler"] = FASTPREF_COMPILER;
    info["cuda"] = FASTPREF_CUDA_ARCHS;
    info["nvcc"] = FASTPREF_NVCC;
    info["why_not_cuda"] = FASTPREF_WHY_NOT_CUDA;
    return info;
  });
}
