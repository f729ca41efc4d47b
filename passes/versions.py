"""What torch 2.11 does not have, in one place."""

import torch.nn.functional as F

HAS_LINEAR_CROSS_ENTROPY = hasattr(F, "linear_cross_entropy")
