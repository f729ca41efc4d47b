// The library that a program without Python opens before it loads a package: it defines the
// operators, and opens the kernels in the same folder that suit this CPU.
//
//     model.pt2.so -> model.pt2.avx512.so | model.pt2.avx2.so, or model.pt2.native.so alone;
//                     of a package for a GPU, model.pt2.checks.so alone: the check of its inputs
//
// Compiled for every CPU of its architecture.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// The schemas of library.py.
#define OTHERS "Tensor[]? data, Tensor[]? operands, int[] code, float scale, SymInt q_offset"
#define CALL "(Tensor q, Tensor k, Tensor v, " OTHERS ", Tensor? offsets, bool by_token) -> "

STABLE_TORCH_LIBRARY_FRAGMENT(compiled_dilated, m) {
  m.def("native" CALL "(Tensor, Tensor)");
  m.def("native_counted" CALL "(Tensor, Tensor, Tensor)");
  m.def("native_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " OTHERS
        ", Tensor? offsets, int[] learned) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("native_merge(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, " OTHERS ") -> ()");
  m.def("native_counts(Tensor[]? data, Tensor[]? operands, int[] code, int[] sizes, SymInt q_offset, Tensor? offsets) -> Tensor");
  m.def("check_inputs(Tensor[] inputs, int[] code) -> Tensor");
}

namespace {

enum Level { baseline, avx2, avx512 };

// The level of this CPU. ATEN_CPU_CAPABILITY lowers it, as for torch's own kernels.
Level level() {
  Level here = baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) here = avx2;
  if (here == avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    here = avx512;
#endif
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit && !std::strcmp(limit, "default")) return baseline;
  return limit && !std::strcmp(limit, "avx2") && here > avx2 ? avx2 : here;
}

struct Kernels {
  const char* suffix;
  Level needs;
};

// The fastest first.
#if defined(CHECKS_ALONE)
constexpr Kernels all[] = {{".checks.so", baseline}};
#elif defined(NATIVE_LEVEL)
// Built for the CPU of the exporting machine, which has this level.
constexpr Kernels all[] = {{".native.so", NATIVE_LEVEL}};
#else
constexpr Kernels all[] = {{".avx512.so", avx512}, {".avx2.so", avx2}};
#endif

// This file's path without ".so".
std::string stem() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&level), &info) || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  return path.size() > 3 && path.compare(path.size() - 3, 3, ".so") == 0 ? path.substr(0, path.size() - 3) : path;
}

// Why no kernels could be opened; empty if they were.
std::string open_kernels() {
  const std::string beside = stem();
  const Level here = level();
  std::string errors;
  for (const Kernels& kernels : all) {
    if (kernels.needs > here) continue;
    if (dlopen((beside + kernels.suffix).c_str(), RTLD_NOW | RTLD_LOCAL)) return "";
    errors += std::string("\n  ") + dlerror();
  }
  if (!errors.empty()) return "compiled_dilated: no kernels for this CPU beside the package's library:" + errors;
#if defined(NATIVE_LEVEL)
  return "compiled_dilated: the package uses the instructions of the CPU that exported it, and this one has fewer";
#else
  return "compiled_dilated: the package needs a CPU with AVX2, and this one has none";
#endif
}

const std::string& refusal() {
  static const std::string text = open_kernels();
  return text;
}

void refuse(StableIValue*, uint64_t, uint64_t) { throw std::runtime_error(refusal()); }

}  // namespace

// Without suitable kernels, a call raises the reason.
STABLE_TORCH_LIBRARY_IMPL(compiled_dilated, CPU, m) {
  if (refusal().empty()) return;
  for (const char* name : {"native", "check_inputs"}) m.impl(name, &refuse);
}
