"""Fast, verified kernels for few-shot segmentation."""

from fss_kernels import nn
from fss_kernels._library import use_backend
from fss_kernels.ops import hypercorrelation, masked_avg_pool

__version__ = "0.1.0"
__all__ = ["hypercorrelation", "masked_avg_pool", "nn", "use_backend"]
