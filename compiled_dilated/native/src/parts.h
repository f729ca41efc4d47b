// Kernels that are compiled and loaded separately, when a call first needs them; each registers its
// entries here when it is loaded.
#pragma once
#include "functions.h"
#include "program.h"

namespace native {

// The evaluation of functions of masks and scores.
struct FunctionPart {
  decltype(&read_function) read;
  decltype(&check_operands) check;
  decltype(&mask) seen;
  decltype(&classify) verdict;
  decltype(&score<float>) score_f32;
  decltype(&score<double>) score_f64;
  decltype(&score_backward<float>) score_backward_f32;
  decltype(&score_backward<double>) score_backward_f64;
  FunctionRoom* (*make_room)();
  void (*free_room)(FunctionRoom*);
};

using ForwardKernel = void (*)(const Problem&, const Program&, bool merges);
using BackwardKernel = void (*)(const Problem&, const Program&, const Gradients&);

struct Parts {
  const FunctionPart* functions = nullptr;
  ForwardKernel forward_amx = nullptr, forward_f64 = nullptr;
  BackwardKernel backward_amx = nullptr, backward_f32 = nullptr, backward_f64 = nullptr;
  void (*count)(const Problem&, const Program&, bool amx) = nullptr;
  void (*need)(const char* part) = nullptr;  // set by the loader of parts
};

// The table of this process.
Parts& parts();

// A part's entry; loads the part if needed.
template <class Entry>
Entry part(Entry Parts::* entry, const char* name) {
  Parts& all = parts();
  if (!(all.*entry) && all.need) all.need(name);
  if (!(all.*entry)) throw std::runtime_error(std::string("the native kernels have no part '") + name + "': it could not be built or loaded");
  return all.*entry;
}

inline const FunctionPart& functions() { return *part(&Parts::functions, "functions"); }

}  // namespace native
