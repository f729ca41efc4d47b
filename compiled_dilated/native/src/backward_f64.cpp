#include "kernels.h"

namespace native {

void backward_f64(const Problem& problem, const Program& program, const Gradients& gradients) {
  backward_with<WideGradient<double>>(problem, program, gradients);
}

}  // namespace native
