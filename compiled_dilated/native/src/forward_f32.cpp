#include "kernels.h"

namespace native {

void forward_f32(const Problem& problem, const Program& program, bool merges) {
  forward_with<WideEngine<float>>(problem, program, merges);
}

}  // namespace native
