"""Pretraining speed against nanoGPT, in pairs on the same machine, and the time to the loss that nanoGPT's
CPU run reaches.

    python bench/gpt.py --nanogpt PATH               tokens per second: the same GPT-2 model, batch 12 x 64,
                                                     float32 AdamW there
    python bench/gpt.py --nanogpt PATH --curve       2,000 steps of both: time and validation loss
    python bench/gpt.py --nanogpt PATH --fast        seconds of training until
                                                     recipes/shakespeare_char_fast.py is below nanoGPT's loss
    python bench/gpt.py --nanogpt PATH --default     `python train_gpt.py --dataset=shakespeare_char` against
                                                     nanoGPT's model, same settings

PATH is a checkout of nanoGPT, whose model.py is imported and whose train step is followed line by line
(get_batch, forward, backward, clip, AdamW). Both read data/shakespeare_char. Each side runs in a process of
its own, in turn; the ratio is taken pair by pair. Times are of training alone: no imports, no evaluation. The
last line is JSON.
"""
import argparse
import json
import os
import statistics
import sys
import time

import shared
from shared import ROOT

DATA = os.path.join(ROOT, 'data', 'shakespeare_char')
README_RUN = dict(batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, max_iters=2000,
                  learning_rate=1e-3, min_lr=1e-4,
                  # nanoGPT's README, "I only have a macbook"
                  lr_decay_iters=2000, warmup_iters=100, beta2=0.99, weight_decay=0.1, grad_clip=1.0)


def nanogpt(path, args, seed=1337):
    """nanoGPT's training loop for `args`; yields (step, seconds of training so far, model) before every
    step."""
    import importlib.util
    import math

    import numpy as np
    import torch
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(path, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    B, T = args['batch_size'], args['block_size']
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=65, n_layer=args['n_layer'],
                                        n_head=args['n_head'], n_embd=args['n_embd'],
                                        dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(args['weight_decay'], args['learning_rate'], (0.9, args['beta2']),
                                           'cpu')

    def get_batch():
        data = np.memmap(os.path.join(DATA, 'train.bin'), dtype=np.uint16, mode='r')
        ix = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in ix])
        return x, y

    def rate(step):
        if args.get('constant'):
            return args['learning_rate'] * min(1.0, (step + 1) / (args['warmup_iters'] + 1))
        if step < args['warmup_iters']:
            return args['learning_rate'] * (step + 1) / (args['warmup_iters'] + 1)
        ratio = min(1.0, (step - args['warmup_iters']) / (args['lr_decay_iters'] - args['warmup_iters']))
        height = args['learning_rate'] - args['min_lr']
        return args['min_lr'] + 0.5 * (1 + math.cos(math.pi * ratio)) * height

    seconds, (x, y) = 0.0, get_batch()
    for step in range(args['max_iters'] + 1):
        yield step, seconds, model
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group['lr'] = rate(step)
        _, loss = model(x, y)
        x, y = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args['grad_clip'])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started


def ours(args):
    """train_gpt.py's gradient steps for the flags in `args`; yields what nanogpt() does, the last weights."""
    import train_gpt as script
    from configurator import parse
    from nanoforge.run import setup
    cfg = parse(script.Config, args)
    run = setup(cfg.device, cfg.autocast_dtype(), cfg.matmul)
    script.resolve_defaults(cfg, run)
    corpora = script.open_data(cfg, run)
    model, _ = script.build_model(cfg, corpora, run)
    model.train()
    optimizer = script.build_optimizer(cfg, model, run)
    targets, seconds = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size, 0.0
    for step in range(cfg.max_iters + 1):
        yield step, seconds, model
        started = time.perf_counter()
        for x, y in script.get_batch(cfg, corpora, step, run):
            with run.autocast():
                logp = model(x, y)
            run.backward(-logp.sum() / targets)
        run.step(optimizer, script.get_lr(cfg, step), cfg.grad_clip)
        seconds += time.perf_counter() - started


def validation_loss(model, nano, T=64):
    """Mean nats per character over all windows of T characters of the validation split, without overlap: for
    both the same."""
    import numpy as np
    import torch

    from data.corpus import Corpus, windows
    tokens, total = Corpus('shakespeare_char').tokens('val'), 0.0
    starts = np.arange((len(tokens) - 1) // T) * T
    model.eval()
    with torch.no_grad():
        for offsets in np.array_split(starts, 16):
            x, y = windows(tokens, offsets, T)
            total += float(model(x, y)[1]) * x.numel() if nano else -float(model(x, y).double().sum())
    model.train()
    return total / (len(starts) * T)


def gpt2_flags(args):
    """The flags that make train_gpt.py train nanoGPT's model: exact GELU, no biases."""
    flags = [f'--{k}={v}' for k, v in args.items() if k != 'constant']
    return flags + ['--arch=gpt2', '--activation=gelu'] + ([] if args.get('constant') else ['--decay_lr'])


def child(side, options):
    """One measurement in this process; prints a JSON object."""
    args = dict(README_RUN, max_iters=options.steps)
    if options.default:
        args.update(batch_size=64, max_iters=options.steps or 3500, constant=True)
    if side == 'nanogpt':
        run = nanogpt(options.nanogpt, args)
    elif options.fast:
        run = ours([os.path.join(ROOT, 'recipes', 'shakespeare_char_fast.py')])
    elif options.default:
        run = ours(['--dataset=shakespeare_char', f'--max_iters={args["max_iters"]}'])
    else:
        run = ours(gpt2_flags(args))
    curve, first, tokens = [], 0.0, args['batch_size'] * args['block_size']
    for step, seconds, model in run:
        if step == 20:
            first = seconds                 # the first steps allocate
        if options.evaluate and step and (step % options.evaluate == 0):
            curve.append((step, round(seconds, 2), round(validation_loss(model, side == 'nanogpt'), 4)))
            print(side, *curve[-1], file=sys.stderr, flush=True)
            if options.target and curve[-1][2] <= options.target:
                break
    loss = round(validation_loss(model, side == 'nanogpt'), 4)
    print(json.dumps({'side': side, 'steps': step, 'seconds': round(seconds, 2), 'val_loss': loss,
                      'curve': curve,
                      'parameters': sum(p.numel() for p in model.parameters()),
                      'tokens_per_second': round((step - 20) * tokens / (seconds - first))}))


def measure(side, options, **extra):
    flags = []
    for key, value in {**vars(options), **extra}.items():
        if value and key not in ('child', 'rounds', 'curve'):
            flags.append(f'--{key}' if value is True else f'--{key}={value}')
    return shared.child(__file__, f'--child={side}', *flags)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', required=True, help='a checkout of nanoGPT')
    parser.add_argument('--rounds', type=int, default=5, help='pairs of runs')
    parser.add_argument('--steps', type=int, default=0, help='steps a run')
    parser.add_argument('--curve', action='store_true')
    parser.add_argument('--fast', action='store_true')
    parser.add_argument('--default', action='store_true')
    parser.add_argument('--evaluate', type=int, default=0, help='steps between evaluations')
    parser.add_argument('--target', type=float, default=0, help='stop at this validation loss')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.steps = options.steps or README_RUN['max_iters']
        return child(options.child, options)
    if options.fast:
        theirs = measure('nanogpt', options, fast=False)
        found = [measure('ours', options, target=theirs['val_loss'],
                         evaluate=options.evaluate or 10) for _ in range(options.rounds)]
        times = [run['seconds'] for run in found]
        print(f'nanoGPT: {theirs["val_loss"]} after {theirs["seconds"]} s; ours: '
              f'{[run["val_loss"] for run in found]} after {times} s')
        print(json.dumps({'nanogpt': theirs, 'ours': found,
                          'share_of_time': statistics.median(times) / theirs['seconds']}))
        return
    options.steps = options.steps or (2000 if options.curve else 3500 if options.default else 200)
    ratios, pairs = [], []
    for _ in range(1 if options.curve or options.default else options.rounds):
        pair = {side: measure(side, options) for side in ('nanogpt', 'ours')}
        ratios.append(pair['ours']['tokens_per_second'] / pair['nanogpt']['tokens_per_second'])
        pairs.append(pair)
        for side, result in pair.items():
            print(f'{side:8} {result["tokens_per_second"]:>8,} tokens/s  {result["seconds"]:7.1f} s  '
                  f'val_loss {result["val_loss"]:.4f}  {result["parameters"]:,} parameters', flush=True)
        print(f'         ratio {ratios[-1]:.2f}', flush=True)
    print(json.dumps({'ratio': round(statistics.median(ratios), 3), 'ratios': [round(r, 3) for r in ratios],
                      'pairs': pairs}))


if __name__ == '__main__':
    main()
