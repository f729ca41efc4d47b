#include "decoding.h"

namespace native {

bool wide_f32(const Problem& problem, const Program& program, bool merges, bool careful) {
  return forward_wide<float>(problem, program, merges, careful);
}

void forward_f32(const Problem& problem, const Program& program, bool merges) {
  with_care<float>(problem, Shape(problem), merges, [&](bool careful) { return wide_f32(problem, program, merges, careful); });
}

}  // namespace native
