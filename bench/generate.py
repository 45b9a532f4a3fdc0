"""Tokens per second of generate() against transformers' generate, in pairs on the same weights.

    python bench/generate.py [--threads 2] [--pairs 7]

A Llama of 3M parameters (4 layers, 256 channels, vocabulary 1,024), prompts of 16 tokens, 64 new tokens,
float32, sampling at temperature 1 without top-k and top-p, no stop token: at batch 64 and at batch 1. Each
pair runs both, one after the other, the first of them alternating; the ratio is the median over the pairs.
Ours returns log-probabilities besides. Where the processor multiplies bfloat16 a third line is ours with such
products at batch 64, against transformers in float32. The last line of output is one JSON object.
"""
import argparse
import json
import os
import statistics
import tempfile
import time

import torch

from shared import has_bf16, llama      # first: it puts the repository on the import path
from model import load_model
from sample import generate, logp_gap

NEW = 64


def seconds(function):
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def pairs(ours, theirs, count):
    """Medians of: seconds of ours, seconds of theirs, theirs / ours."""
    ours(), theirs()
    times = []
    for i in range(count):
        order = (ours, theirs) if i % 2 else (theirs, ours)
        first, second = (seconds(function) for function in order)
        times.append((first, second) if i % 2 else (second, first))
    return [statistics.median(column) for column in (*zip(*times), [b / a for a, b in times])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--pairs', type=int, default=7)
    parser.add_argument('--heads', type=int, default=4)
    parser.add_argument('--kv_heads', type=int, default=4)
    parser.add_argument('--prompt', type=int, default=16, help='tokens of a prompt')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    theirs = llama(num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, initializer_range=0.1)
    theirs.eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        # a model directory has one; it is not used here
        with open(os.path.join(directory, 'tokenizer.json'), 'w', encoding='utf-8') as file:
            vocabulary = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}
            json.dump({'version': '1.0', 'model': vocabulary}, file)
        ours, _ = load_model(directory)
    result = {'parameters': ours.num_params(), 'threads': args.threads, 'pairs': args.pairs}
    sizes = [('batch_64', 64, 'float32'), ('batch_1', 1, 'float32')]
    if has_bf16():
        sizes.append(('batch_64_bf16', 64, 'bf16'))
    for name, batch, matmul in sizes:
        ours.set_matmul(matmul)
        prompts = torch.randint(1, 1024, (batch, args.prompt))

        def run_ours():
            return generate(ours, prompts.tolist(), NEW)

        def run_theirs():
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW,
                                   do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

        a, b, ratio = pairs(run_ours, run_theirs, args.pairs)
        ours_ms, theirs_ms = 1000 * a / NEW, 1000 * b / NEW
        gap = logp_gap(ours, prompts.tolist(), run_ours())[0]
        result[name] = {'ours_tokens_per_second': round(batch * NEW / a),
                        'transformers_tokens_per_second': round(batch * NEW / b),
                        'ratio': round(ratio, 2), 'ours_ms_per_step': round(ours_ms, 2),
                        'transformers_ms_per_step': round(theirs_ms, 2), 'max_logp_gap': gap}
        print(f'{name:14} ours {ours_ms:6.2f} ms/step   transformers {theirs_ms:6.2f} ms/step   '
              f'{ratio:.2f} times   log-prob gap {gap:.1e}', flush=True)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
