"""What Triton kernels of several ops share: interpolation of masks (`_resize`) and the rule of norms (`_cosine`)."""

from __future__ import annotations

import triton
import triton.language as tl

SHORT, MAGNIFIED = tl.constexpr(2.0**-32), tl.constexpr(2.0**64)  # norms below this, and what magnifies such a vector


@triton.jit
def tap_at(i, source, target, NEAREST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Row i of the interpolation matrix R(source -> target): low index, weight of low + 1. Exact positions."""
    if NEAREST:
        numerator = i * source // target
        denominator = i * 0 + 1
    elif ALIGN:
        numerator = i * (source - 1)
        denominator = i * 0 + tl.maximum(target - 1, 1)
    else:
        numerator = tl.maximum((2 * i + 1) * source - target, 0)
        denominator = i * 0 + 2 * target
    low = tl.minimum(numerator // denominator, source - 1)
    high_weight = tl.where(low == source - 1, 0.0, (numerator % denominator).to(ACC) / denominator.to(ACC))
    return low, high_weight.to(ACC)


@triton.jit
def resized(
    image, n, inside, stride_h, stride_w, SH, SW, TH, TW,
    NEAREST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pixels n of the target grid of R_h image R_w^T, `image` a pointer; four loads a pixel."""
    y, wy = tap_at(n // TW, SH, TH, NEAREST, ALIGN, ACC)
    x, wx = tap_at(n % TW, SW, TW, NEAREST, ALIGN, ACC)
    at = image + y * stride_h + x * stride_w
    below, right = wy != 0, wx != 0
    value = tl.load(at, mask=inside, other=0).to(ACC) * (1 - wx)
    value += tl.load(at + stride_w, mask=inside & right, other=0).to(ACC) * wx
    low = tl.load(at + stride_h, mask=inside & below, other=0).to(ACC) * (1 - wx)
    low += tl.load(at + stride_h + stride_w, mask=inside & below & right, other=0).to(ACC) * wx
    return tl.where(below, value * (1 - wy) + low * wy, value)


@triton.jit
def norm_divisor(norm, eps, ADD: tl.constexpr):
    """N(norm)."""
    return norm + eps if ADD else tl.where(norm <= eps, eps, norm)


@triton.jit
def inverse_norm(norm, eps, ADD: tl.constexpr):
    """1 / N(norm); 0 for a zero vector, NaN for a norm that is not finite."""
    zero = norm == 0
    result = tl.where(zero, 0.0, 1 / tl.where(zero, 1.0, norm_divisor(norm, eps, ADD)))
    return tl.where((norm - norm) == 0, result, float("nan"))


@triton.jit
def norm_slope(norm, eps, ADD: tl.constexpr):
    """1 / (norm N(norm)), 0 where eps alone divides or the vector is 0; of magnified norms, and eps likewise."""
    constant = norm == 0 if ADD else norm <= eps
    return tl.where(constant, 0.0, 1 / tl.where(constant, 1.0, norm * norm_divisor(norm, eps, ADD)))


@triton.jit
def magnification(norm):
    """The power of two that magnifies a short vector of float32; 1 for any other."""
    return tl.where(norm < SHORT, MAGNIFIED, 1.0)
