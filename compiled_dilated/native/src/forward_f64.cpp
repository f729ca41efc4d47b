#include "kernels.h"

namespace native {

void forward_f64(const Problem& problem, const Program& program, bool merges) {
  forward_with<WideEngine<double>>(problem, program, merges);
}

}  // namespace native
