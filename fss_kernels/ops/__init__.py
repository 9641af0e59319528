"""The ops, one folder each."""

from fss_kernels.ops.dense_cosine import dense_cosine_match as dense_cosine_match
from fss_kernels.ops.dense_cosine import dense_cosine_max as dense_cosine_max
from fss_kernels.ops.dynamic_conv2d import dynamic_conv2d as dynamic_conv2d
from fss_kernels.ops.hypercorrelation import hypercorrelation as hypercorrelation
from fss_kernels.ops.hypercorrelation import hypercorrelation_pyramid as hypercorrelation_pyramid
from fss_kernels.ops.masked_avg_pool import masked_avg_pool as masked_avg_pool
from fss_kernels.ops.prototype_cosine import prototype_cosine as prototype_cosine
