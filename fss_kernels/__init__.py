"""Fast, verified kernels for few-shot segmentation."""

from fss_kernels import nn
from fss_kernels._library import use_backend
from fss_kernels.ops import (
    dynamic_conv2d,
    hypercorrelation,
    hypercorrelation_pyramid,
    masked_avg_pool,
    prototype_cosine,
)

__version__ = "0.1.0"
__all__ = [
    "dynamic_conv2d",
    "hypercorrelation",
    "hypercorrelation_pyramid",
    "masked_avg_pool",
    "nn",
    "prototype_cosine",
    "use_backend",
]
