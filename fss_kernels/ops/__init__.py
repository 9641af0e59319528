"""The ops, one folder each."""

from fss_kernels.ops.hypercorrelation import hypercorrelation as hypercorrelation
from fss_kernels.ops.masked_avg_pool import masked_avg_pool as masked_avg_pool
