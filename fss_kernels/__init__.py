"""Fast, verified kernels for few-shot segmentation."""

from fss_kernels._backends import use_backend
from fss_kernels.compositions import cycle_consistent_foreground, prior_mask, support_activation
from fss_kernels.ops import (
    dense_cosine_match,
    dense_cosine_max,
    dynamic_conv2d,
    hypercorrelation,
    hypercorrelation_pyramid,
    masked_avg_pool,
    prototype_cosine,
)

__version__ = "0.1.0"
__all__ = [
    "cycle_consistent_foreground",
    "dense_cosine_match",
    "dense_cosine_max",
    "dynamic_conv2d",
    "hypercorrelation",
    "hypercorrelation_pyramid",
    "masked_avg_pool",
    "prior_mask",
    "prototype_cosine",
    "support_activation",
    "use_backend",
]
