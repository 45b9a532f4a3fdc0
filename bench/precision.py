"""Does training learn the same with bfloat16 products as in float32?

    python bench/precision.py MODEL                 a Hugging Face directory, such as SmolLM2-135M-Instruct's
    python bench/precision.py MODEL --emulate       on a processor without bfloat16 units: the same rounding
                                                    of factors and results, multiplied in float32
    python bench/precision.py MODEL --trl PYTHON    TRL's SFTTrainer beside it, in float32 and under its bf16
                                                    autocast (no processor need multiply bfloat16)
where there is a GPU it is the GPU that multiplies.
    python bench/precision.py tiny --moved          SFT, DPO and GRPO at a learning rate of 1e-6 (--emulate)

180 chats about the embedded facts, batches of 4, learning rate 1e-5, all weights train. A line for each way
to multiply: eval_loss on 20 other chats before training and after 12 and 24 steps, and tokens a second.
`nearest` rounds the weights to the nearest bfloat16, as autocast does; `bf16` is what --matmul=bf16 does.

--moved: how far the log-probability of each of 200 fixed held-out answers moves in 60 steps (DPO: 240, GRPO:
20) of an embedded demo: the root of the mean square in nats an answer, and the share of float32's movement
that is found again, the slope of the answers' movements over float32's (their mean is near 0 in DPO, where
some rise and some fall). `trained`: of the float32 weights that training left, read in float32; `read`: as
the model computes in that mode. There rounding alone moves an answer by 0.02 nats, half of what DPO and GRPO
do, and all answers together, so bf16's is the mean of many readings before and after, the weights of each
displaced at random within a step of bfloat16's grid. Three seeds. The completions of GRPO are float32's in
all three modes, so that only what is computed differs.
"""
import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

from shared import child, read, rendered, trl_trainer

MODES = ('float32', 'bf16', 'nearest')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('model')
    parser.add_argument('--emulate', action='store_true')
    parser.add_argument('--moved', action='store_true')
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--seed', type=int, default=1337)
    options = parser.parse_args()
    if options.moved:
        return compare_moves(options)
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(os.path.join(folder, 'rows.jsonl'))
        for mode in MODES:
            out = os.path.join(folder, mode)
            settings = [f'--model={options.model}', f'--dataset_path={data}', f'--output_dir={out}',
                        f'--seed={options.seed}', '--max_steps=24', '--eval_steps=12', '--eval_on_start',
                        '--lr=1e-5', '--lr_scheduler=constant', '--warmup_steps=0', '--batch_size=4',
                        '--gradient_accumulation_steps=1', '--sample_rows=0', '--logging_steps=12',
                        f'--matmul={"float32" if mode == "float32" else "bf16"}']
            settings += ['--dtype=float32'] if mode == 'float32' else []
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
        if options.trl:
            for bf16 in '01':
                losses = child(__file__, '--with-trl', data, options.model, bf16, str(options.seed),
                               python=options.trl)
                print(f'TRL {"bf16" if bf16 == "1" else "float32":8} eval_loss '
                      f'{"  ".join(f"{loss:.4f}" for loss in losses)}', flush=True)


def with_trl(data, model, bf16, seed):
    """eval_loss of TRL's SFTTrainer before and after 12 and 24 steps."""
    from datasets import Dataset
    from data.tokenizer import load_tokenizer
    tokenizer, rows = load_tokenizer(model), {'train': [], 'eval': []}
    for row in read(data):
        prompt, completion = rendered(tokenizer, row['messages'])
        rows[row['metadata']].append({'prompt': prompt, 'completion': completion})
    with tempfile.TemporaryDirectory() as output:
        settings = dict(output_dir=output, per_device_train_batch_size=4, max_steps=24, learning_rate=1e-5,
                        eval_strategy='steps', eval_steps=12, logging_steps=12, seed=int(seed))
        trainer = trl_trainer('SFT', model, rows['train'], settings, bf16 == '1',
                              eval_dataset=Dataset.from_list(rows['eval']))
        before = trainer.evaluate()['eval_loss']
        trainer.train()
        return [before, *(line['eval_loss'] for line in trainer.state.log_history[1:] if 'eval_loss' in line)]


def write_rows(path):
    from data.tasks import facts
    with open(path, 'w', encoding='utf-8') as file:
        for i, problem in enumerate(facts.problems('train', 200, 7)):
            answer = {'role': 'assistant', 'content': facts.solution(problem)}
            row = {'messages': [*facts.prompt(problem), answer], 'metadata': 'eval' if i >= 180 else 'train'}
            file.write(json.dumps(row) + '\n')
    return path


def round_products(mode, emulate):
    """Makes our products round weights as `mode` says, from here on."""
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


def train(mode, emulate, settings):
    """train_sft.py in this process, its weights rounded as `mode` says."""
    import torch
    round_products(mode, emulate)
    torch.manual_seed(0)
    import train_sft
    from configurator import parse
    train_sft.main(parse(train_sft.Config, settings))


# ---- at a rate of 1e-6 -------------------------------------------------------------------------------------

# script, the embedded task, steps, what of the task writes the answer: the right one, or the rejected
METHODS = {
    'sft': ('train_sft', 'devices', 60, 'solution'),
    'dpo': ('train_dpo', 'facts', 240, 'other_form'),
    'grpo': ('train_rl', 'arithmetic', 20, 'solution'),
}
SEEDS = 1, 2, 3
READINGS, DISPLACED = 32, 2e-3     # of a weight's size, of which a step of bfloat16 is 0.004 to 0.008


def compare_moves(options):
    for method in METHODS:
        shares = {}
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                float32, *others = (move_in_child(method, mode, seed, folder, options) for mode in MODES)
            moves = float32['trained']
            square = dot(moves, moves)
            found = {f'{mode} {kind}': dot(moves, of_kind) / square
                     for mode, by_kind in zip(MODES[1:], others) for kind, of_kind in by_kind.items()}
            print(f'{method:5} seed {seed}  float32 {math.sqrt(square / len(moves)):.4f} nats, of that '
                  + ', '.join(f'{name} {share:.3f}' for name, share in found.items()), flush=True)
            for name, share in found.items():
                shares.setdefault(name, []).append(share)
        for name, found in shares.items():
            print(f'{method:5} {name}: {statistics.mean(found):.3f} of what float32 moves '
                  f'({min(found):.3f} to {max(found):.3f})', flush=True)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def move_in_child(method, mode, seed, folder, options):
    emulate = int(options.emulate and mode != 'float32')
    return child(__file__, '--move', method, mode, str(seed), folder, str(emulate), options.model)


def move(method, mode, seed, folder, emulate, name):
    """{'trained', 'read': nats by which training moves the log-probability of each held-out answer}"""
    import torch
    from configurator import parse
    round_products(mode, emulate == '1')
    script, task, steps, answer = METHODS[method]
    script, task = importlib.import_module(script), importlib.import_module(f'data.tasks.{task}')
    matmul, out = 'float32' if mode == 'float32' else 'bf16', os.path.join(folder, mode)
    settings = [f'--model={name}', f'--output_dir={out}', f'--seed={seed}', f'--matmul={matmul}', '--lr=1e-6',
                '--lr_scheduler_type=constant', '--warmup_steps=0', f'--max_steps={steps}',
                f'--logging_steps={steps}', f'--eval_steps={steps}', '--device=cpu', '--tensorboard=false']
    if method == 'grpo':
        keep_samples(script, os.path.join(folder, 'samples.jsonl'), record=mode == 'float32')
    else:
        settings += ['--per_device_train_batch_size=4', '--gradient_accumulation_steps=1']
    if method == 'dpo':     # the preference alone: an SFT term beside it moves both answers the same way
        settings.append('--rpo_alpha=0')
    torch.manual_seed(0)
    script.main(parse(script.Config, settings))
    paths, answer = (name, os.path.join(out, 'last')), getattr(task, answer)
    before, after = (answer_logps(path, task, answer, 'float32') for path in paths)
    moved = {'trained': after - before}
    if matmul == 'bf16':
        # displaced weights would be dithered where they are to be rounded to nearest
        draws = range(1, READINGS + 1) if mode == 'bf16' else [None]
        before, after = (torch.stack([answer_logps(path, task, answer, matmul, i and f'{begins} {i}')
                                      for i in draws]).mean(0) for begins, path in enumerate(paths))
        moved['read'] = after - before
    return {kind: of_kind.tolist() for kind, of_kind in moved.items()}


def keep_samples(script, path, record):
    """Makes the script's generate write what it draws to `path`, or return what is written there."""
    import torch
    from sample import Samples
    generate, lines = script.generate, [] if record else read(path)

    def recorded(*given, **more):
        samples = generate(*given, **more)
        with open(path, 'a', encoding='utf-8') as file:
            file.write(json.dumps({key: x.tolist() for key, x in samples._asdict().items()}) + '\n')
        return samples

    def replayed(*given, **more):
        return Samples(**{key: torch.tensor(x) for key, x in lines.pop(0).items()})

    script.generate = recorded if record else replayed


def answer_logps(path, task, answer_to, matmul, displaced_by=None):
    """Of 200 held-out answers, (200,) float64; displaced_by: a seed."""
    import torch
    from data.chat import prompt_ids
    from model import load_model
    from nanoforge.run import seed_for
    (model, tokenizer), found = load_model(path), []
    if displaced_by:
        generator = torch.Generator().manual_seed(seed_for(displaced_by))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + DISPLACED * torch.randn(p.shape, generator=generator))
    model.set_matmul(matmul)
    for problem in task.problems('eval', 200, 'precision'):
        prompt = prompt_ids(tokenizer, task.prompt(problem), problem.get('tools'))
        ids = torch.tensor([prompt + tokenizer.encode(answer_to(problem) + '<|im_end|>')])
        targets = ids[:, 1:].clone()
        targets[:, :len(prompt) - 1] = -1
        with torch.no_grad():
            found.append(model(ids[:, :-1], targets).double().sum())
    return torch.stack(found)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--as']:
        train(sys.argv[2], sys.argv[3] == '1', sys.argv[4:])
    elif sys.argv[1:2] == ['--move']:
        print(json.dumps(move(*sys.argv[2:])))
    elif sys.argv[1:2] == ['--with-trl']:
        print(json.dumps(with_trl(*sys.argv[2:])))
    else:
        main()
