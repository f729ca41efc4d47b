#include "kernels.h"

namespace native {

void backward_f32(const Problem& problem, const Program& program, const Gradients& gradients) {
  backward_with<WideGradient<float>>(problem, program, gradients);
}

}  // namespace native
