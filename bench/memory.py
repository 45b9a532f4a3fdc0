"""Peak memory and time of one forward and backward over a large vocabulary: ours against transformers' with
`labels`.

    python bench/memory.py                  # vocabulary 131,072, 4 x 1,024 tokens, 512 channels, 2 layers
    python bench/memory.py --vocab 32000 --pairs 5

The same random Llama, each measurement in a process of its own, the two in alternation; memory is the peak of
the process above what it holds once the weights are loaded (gradients included), time the quickest of
`--steps` steps after a warm-up. The last line is JSON.
"""
import argparse
import json
import statistics
import tempfile
import time

from shared import child, peak


def measure(args):
    import torch
    torch.manual_seed(0)
    if args.measure == 'ours':
        from model import load_model
        model = load_model(args.model)[0].train()
        loss = lambda x: -model(x[:, :-1], x[:, 1:]).mean()
    else:
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
        loss = lambda x: model(x, labels=x, use_cache=False).loss
    for p in model.parameters():
        p.data = p.data.clone()                     # really in memory, not mapped
    x = torch.randint(0, args.vocab, (args.batch, args.block))
    loss(x[:, :4]).backward()                       # threads and kernels are up
    model.zero_grad(set_to_none=True)
    before, seconds = peak(), []
    for _ in range(args.steps):
        start = time.perf_counter()
        value = loss(x)
        value.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    print(json.dumps({'loss': value.item(), 'bytes': peak() - before, 'seconds': min(seconds)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(vocab=131072, batch=4, block=1024, channels=512, layers=2, steps=1, pairs=3)
    for name, default in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--measure', choices=('ours', 'transformers'), help=argparse.SUPPRESS)
    parser.add_argument('--model', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    from model import FAMILIES, GPT, GPTConfig, save_model
    with tempfile.TemporaryDirectory() as directory:
        config = GPTConfig(**{**FAMILIES['llama'], 'tied': True}, arch='llama', vocab_size=args.vocab,
                           n_layer=args.layers, n_head=8, n_embd=args.channels, block_size=args.block)
        save_model(GPT(config).init_weights(), None, directory)
        rows = {'transformers': [], 'ours': []}
        for _ in range(args.pairs):
            for name, row in rows.items():
                sizes = [f'--{key}={getattr(args, key)}' for key in ('vocab', 'batch', 'block', 'steps')]
                row.append(child(__file__, f'--measure={name}', f'--model={directory}', *sizes))
    print(f'{"":14}{"peak MB":>10}{"seconds":>10}   {"(all)":24}{"loss":>10}')
    middle = {}
    for name, row in rows.items():
        memory, seconds = (statistics.median(r[key] for r in row) for key in ('bytes', 'seconds'))
        middle[name], times = (memory, seconds), ' '.join(f'{r["seconds"]:.2f}' for r in row)
        print(f'{name:14}{memory / 1e6:>10,.0f}{seconds:>10.2f}   {times:24}{row[0]["loss"]:>10.5f}')
    ratio = [a / b for a, b in zip(middle['ours'], middle['transformers'])]
    print(f'{"ours / theirs":14}{ratio[0]:>10.2f}{ratio[1]:>10.2f}')
    print(json.dumps({name: dict(zip(('bytes', 'seconds'), values)) for name, values in middle.items()}))


if __name__ == '__main__':
    main()
