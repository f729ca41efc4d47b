#include "decoding.h"

namespace native {

static void forward_f64(const Problem& problem, const Program& program, bool merges) {
  with_care<double>(problem, Shape(problem), merges, [&](bool careful) { return forward_wide<double>(problem, program, merges, careful); });
}

static const bool registered = (parts().forward_f64 = &forward_f64, true);

}  // namespace native
