#include "forward.h"

namespace native {

static const bool registered = (parts().forward_f64 = &forward_with<WideEngine<double>>, true);

}  // namespace native
