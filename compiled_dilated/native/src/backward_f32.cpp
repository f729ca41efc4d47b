#include "backward.h"

namespace native {

static const bool registered = (parts().backward_f32 = &backward_with<WideGradient<float>>, true);

}  // namespace native
