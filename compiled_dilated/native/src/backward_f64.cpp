#include "backward.h"

namespace native {

static const bool registered = (parts().backward_f64 = &backward_with<WideGradient<double>>, true);

}  // namespace native
