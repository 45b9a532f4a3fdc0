"""Where batched products stop beating blockwise attention on a CPU: forward and backward of one layer, in
turn, by block size.

    python bench/attention.py

Sets kernels.SHORT_BLOCK. 4,096 tokens, 4 heads of 32; the products in bf16 where the processor has it,
blockwise attention in float32, which is its faster type on a CPU. Medians of 15 pairs.
"""
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

from nanoforge.kernels import ShortAttention, causal_mask
from nanoforge.run import setup

TOKENS, H, D = 4096, 4, 32


def seconds(function):
    started = time.perf_counter()
    function().backward(torch.ones(()))
    return time.perf_counter() - started


def main():
    dtype = torch.bfloat16 if setup('cpu').matmul == 'bf16' else torch.float32
    for T in (64, 128, 192, 256, 384, 512):
        qkv = torch.randn(TOKENS // T, T, 3 * H * D, dtype=dtype, requires_grad=True)

        def products():
            y = ShortAttention.apply(qkv, H, D ** -0.5, None, None, 0.0, None, None, causal_mask(T, dtype))
            return y.float().sum()

        def blockwise():
            q, k, v = (h.float().view(-1, T, H, D).transpose(1, 2) for h in qkv.chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum()

        pairs = [(seconds(products), seconds(blockwise)) for _ in range(17)][2:]
        ours = statistics.median(a for a, _ in pairs)
        ratio = statistics.median(b / a for a, b in pairs)
        print(f'block {T:4}: products {ours * 1e3:6.2f} ms, blockwise {ratio:.2f} times that')


if __name__ == '__main__':
    main()
