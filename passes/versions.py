"""Features that the oldest supported torch does not have."""

import torch.nn.functional as F

HAS_LINEAR_CROSS_ENTROPY = hasattr(F, "linear_cross_entropy")
