"""Passes over memory of which torch makes a dozen, as Triton kernels: what is read off a row of logits, the
gradient of that, an AdamW update, and weights rounded to bfloat16.

Imported where a GPU computes (kernels.has_triton). bench/gpu.py holds each against the plain formula on a
card; with TRITON_INTERPRET=1 in the environment they run on a CPU, too (tests/test_gpu.py).
"""
import torch
import triton
import triton.language as tl

BLOCK = 2048                        # numbers that a program holds at a time
NEVER = tl.constexpr(-3.0e38)       # below every logit; -inf less itself would be NaN


@triton.jit
def capped(x, scale, cap, SOFTCAP: tl.constexpr):
    """A logit as the loss takes it, from the product of the head: over the temperature, soft-capped first."""
    x = x * scale
    if SOFTCAP:
        x = (2 * tl.sigmoid(2 * x) - 1) * cap       # tanh
    return x


@triton.jit
def row_stats_kernel(logits, targets, lse_out, logp_out, entropy_out, mean_out, best_out, scale, cap,
                     V: tl.constexpr, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lane = tl.arange(0, BLOCK)
    # each lane goes over every BLOCK-th column with a maximum of its own: no lane waits for another
    top = tl.full((BLOCK,), NEVER, tl.float32)
    total, weighted, mean = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    best = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, V, BLOCK):
        column = begin + lane
        inside = column < V
        x = capped(tl.load(logits + column, inside, 0.0), scale, cap, SOFTCAP)
        x = tl.where(inside, x, NEVER)
        peak = tl.maximum(top, x)
        shrink = tl.exp(top - peak)
        e = tl.where(inside, tl.exp(x - peak), 0.0)
        total = total * shrink + e
        if EXTRAS:
            best = tl.where(x > top, column, best)
            weighted = weighted * shrink + e * x
            mean += tl.where(inside, x, 0.0)
        top = peak
    peak = tl.max(top, 0)
    shrink = tl.exp(top - peak)
    total_of_row = tl.sum(total * shrink, 0)
    lse = peak + tl.log(total_of_row)
    tl.store(lse_out + row, lse)
    chosen = capped(tl.load(logits + tl.load(targets + row)), scale, cap, SOFTCAP)
    tl.store(logp_out + row, chosen - lse)
    if EXTRAS:
        tl.store(entropy_out + row, lse - tl.sum(weighted * shrink, 0) / total_of_row)
        tl.store(mean_out + row, tl.sum(mean, 0) / V - lse)
        tl.store(best_out + row, tl.min(tl.where(top == peak, best, V), 0))     # the first of equals


@triton.jit
def row_grads_kernel(logits, targets, lse_in, entropy_in, dlogp_in, dentropy_in, dmean_in, out, scale, cap,
                     V: tl.constexpr, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    x = capped(tl.load(logits + row * V + column, inside, 0.0), scale, cap, SOFTCAP)
    log_p = x - tl.load(lse_in + row)
    dlogp = tl.load(dlogp_in + row)
    factor = -dlogp
    if EXTRAS:
        dmean = tl.load(dmean_in + row)
        factor -= dmean + tl.load(dentropy_in + row) * (log_p + tl.load(entropy_in + row))
    d = tl.exp(log_p) * factor
    if EXTRAS:
        d += dmean / V
    d += tl.where(column == tl.load(targets + row), dlogp, 0.0)
    if SOFTCAP:
        d *= (1 - (x / cap) * (x / cap)) * cap
    tl.store(out + row * V + column, (d * scale).to(out.dtype.element_ty), inside)


def row_stats(logits, targets, scale, cap, extras):
    """logits (N, V) float32, contiguous, targets (N,) -> lse, logp, entropy, mean_logp (N,) float32, best
    (N,) int32, as kernels.TokenStats has them; the last three None without `extras`."""
    N, V = logits.shape
    lse, logp, entropy, mean = logits.new_empty(4, N)
    best = targets.new_empty(N, dtype=torch.int32)
    if N:
        row_stats_kernel[(N,)](logits, targets, lse, logp, entropy, mean, best, scale, cap, V,
                               SOFTCAP=cap > 0, EXTRAS=extras, BLOCK=BLOCK, num_warps=8)
    return (lse, logp, entropy, mean, best) if extras else (lse, logp, None, None, None)


def row_grads(logits, targets, lse, entropy, dlogp, dentropy, dmean, scale, cap, out):
    """Writes the gradient of the head's products (N, V) to `out`, of any dtype. entropy, dentropy and dmean
    (N,), or all of them None."""
    N, V = logits.shape
    if N:
        row_grads_kernel[(N, triton.cdiv(V, BLOCK))](
            logits, targets, lse, entropy, dlogp, dentropy, dmean, out, scale, cap, V, SOFTCAP=cap > 0,
            EXTRAS=dentropy is not None, BLOCK=BLOCK, num_warps=8)


@triton.jit
def adamw_kernel(weights, grads, means, squares, length, shrink, rate, one_less_beta1, beta2, one_less_beta2,
                 eps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    g = tl.load(grads + at, inside, 0.0)
    m = tl.load(means + at, inside, 0.0)
    m += one_less_beta1 * (g - m)
    v = beta2 * tl.load(squares + at, inside, 0.0) + one_less_beta2 * g * g
    w = tl.load(weights + at, inside, 0.0) * shrink - rate * m / (tl.sqrt(v) + eps)
    tl.store(means + at, m, inside)
    tl.store(squares + at, v, inside)
    tl.store(weights + at, w, inside)


def adamw(weights, grads, means, squares, shrink, rate, beta1, beta2, eps):
    """optim.AdamW's update of flat float32 tensors in one pass."""
    adamw_kernel[(triton.cdiv(len(weights), BLOCK),)](
        weights, grads, means, squares, len(weights), shrink, rate, 1 - beta1, beta2, 1 - beta2, eps,
        BLOCK=BLOCK, num_warps=8)


@triton.jit
def dither_kernel(weights, thresholds, out, length, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    bits = tl.load(weights + at, inside, 0) + tl.load(thresholds + at % PERIOD, inside, 0)
    tl.store(out + at, (bits >> 16).to(tl.int16), inside)


def dither(weight, out, thresholds, period):
    """kernels.dither in one pass; weight float32 and out bfloat16, contiguous, of one shape."""
    bits, high = weight.view(torch.int32), out.view(torch.int16)
    dither_kernel[(triton.cdiv(bits.numel(), BLOCK),)](bits, thresholds, high, bits.numel(), PERIOD=period,
                                                       BLOCK=BLOCK, num_warps=8)
    return out
