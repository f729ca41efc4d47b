#include "amx_tiles.h"
#include "parts.h"

namespace native {

void forward_f32(const Problem& problem, const Program& program, bool merges);

namespace {

bool is_double(const Problem& problem) { return problem.q.type == Type::f64; }

// Whether this is compiled for a CPU with AMX for bfloat16, and the system lets this process use
// it.
bool has_amx() {
#if defined(__AMX_BF16__)
  return AmxTiles::allowed();
#else
  return false;
#endif
}

// Of one query AMX would compute one row of sixteen.
bool decodes(const Problem& problem) { return problem.q.sizes[2] == 1; }

}  // namespace

void forward(const Problem& problem, bool merge) {
  const Program program = read_program(problem);
  if (problem.q.type == Type::bf16 && has_amx() && !decodes(problem)) return part(&Parts::forward_amx, "amx")(problem, program, merge);
  if (is_double(problem)) return part(&Parts::forward_f64, "double")(problem, program, merge);
  forward_f32(problem, program, merge);
}

void backward(const Problem& problem, const Gradients& gradients) {
  const Program program = read_program(problem);
  if (problem.q.type == Type::bf16 && has_amx()) return part(&Parts::backward_amx, "backward_amx")(problem, program, gradients);
  if (is_double(problem)) return part(&Parts::backward_f64, "double")(problem, program, gradients);
  part(&Parts::backward_f32, "backward")(problem, program, gradients);
}

void count(const Problem& problem) {
  const Program program = read_program(problem);
  part(&Parts::count, "counts")(problem, program, problem.q.type == Type::bf16 && has_amx() && !decodes(problem));
}

}  // namespace native

// Sets the function that loads a part by its name.
extern "C" __attribute__((visibility("default"))) void native_set_loader(void (*need)(const char*)) { native::parts().need = need; }
