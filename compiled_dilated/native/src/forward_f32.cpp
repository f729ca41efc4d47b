#include "forward.h"

namespace native {

bool tiles_f32(const Problem& problem, const Program& program, bool merges, bool careful) {
  return forward_tiles<WideEngine<float>>(problem, program, Shape(problem), merges, careful);
}

void forward_f32(const Problem& problem, const Program& program, bool merges) {
  with_care<float>(problem, Shape(problem), merges, [&](bool careful) { return tiles_f32(problem, program, merges, careful); });
}

}  // namespace native
