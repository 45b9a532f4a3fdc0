"""Does fine-tuning learn the same with bfloat16 products as in float32?

    python bench/precision.py MODEL                 a Hugging Face directory, such as SmolLM2-135M-Instruct's
    python bench/precision.py MODEL --emulate       on a processor without bfloat16 units: the same rounding
                                                    of factors and results, multiplied in float32

180 chats about the embedded facts, batches of 4, learning rate 1e-5, all weights train. A line for each way
to multiply: eval_loss on 20 other chats before training and after 12 and 24 steps, and tokens a second.
`nearest` rounds the weights to the nearest bfloat16, as autocast does; `bf16` is what --matmul=bf16 does.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from shared import ROOT, read

MODES = ('float32', 'bf16', 'nearest')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('model')
    parser.add_argument('--emulate', action='store_true')
    parser.add_argument('--seed', type=int, default=1337)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(os.path.join(folder, 'rows.jsonl'))
        for mode in MODES:
            out = os.path.join(folder, mode)
            settings = [f'--model={options.model}', f'--dataset_path={data}', f'--output_dir={out}',
                        f'--seed={options.seed}', '--max_steps=24', '--eval_steps=12', '--eval_on_start',
                        '--lr=1e-5', '--lr_scheduler=constant', '--warmup_steps=0', '--batch_size=4',
                        '--gradient_accumulation_steps=1', '--sample_rows=0', '--logging_steps=12',
                        f'--matmul={"float32" if mode == "float32" else "bf16"}']
            command = [sys.executable, os.path.abspath(__file__), '--as', mode, str(int(options.emulate))]
            done = subprocess.run([*command, *settings], cwd=folder, capture_output=True, text=True,
                                  encoding='utf-8')
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            log = read(os.path.join(out, 'log.jsonl'))
            losses = [line['eval_loss'] for line in log if 'eval_loss' in line]
            speed = [line['tokens_per_second'] for line in log if 'loss' in line and 'eval_loss' not in line]
            print(f'{mode:8} eval_loss {"  ".join(f"{loss:.4f}" for loss in losses[:3])}  '
                  f'tokens_per_second {max(speed):.0f}', flush=True)


def write_rows(path):
    from data.tasks import facts
    with open(path, 'w', encoding='utf-8') as file:
        for i, problem in enumerate(facts.problems('train', 200, 7)):
            answer = {'role': 'assistant', 'content': facts.solution(problem)}
            row = {'messages': [*facts.prompt(problem), answer], 'metadata': 'eval' if i >= 180 else 'train'}
            file.write(json.dumps(row) + '\n')
    return path


def train(mode, emulate, settings):
    """train_sft.py in this process, its weights rounded as `mode` says."""
    import torch
    import torch.nn.functional as F
    from nanoforge import kernels
    if mode == 'nearest':
        def to_nearest(weight, out=None):
            return weight.bfloat16() if out is None else out.copy_(weight)
        kernels.dither = to_nearest
    if emulate and mode != 'float32':
        def rounded(x, values):                     # the gradient goes past the rounding
            return x + (values.float() - x).detach()

        def linear(x, weights, biases=(), bf16=False):
            if not bf16:
                return F.linear(x, kernels.concat(weights), kernels.concat(biases))
            x = rounded(x, x.detach().bfloat16())
            weights, biases = ([rounded(w, kernels.dithered(w).detach()) for w in group]
                               for group in (weights, biases))
            y = F.linear(x, kernels.concat(weights), kernels.concat(biases))
            return rounded(y, y.detach().bfloat16())
        kernels.linear = linear
    torch.manual_seed(0)
    import train_sft
    from configurator import parse
    train_sft.main(parse(train_sft.Config, settings))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--as']:
        train(sys.argv[2], sys.argv[3] == '1', sys.argv[4:])
    else:
        main()
