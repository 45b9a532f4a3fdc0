"""Fine-tuning, DPO, GRPO and generation of a real model, in pairs with TRL and transformers, in time and
memory, with the limit of the machine beside each.

    python bench/real.py MODEL --trl PYTHON [--rounds 2] [--only sft dpo grpo generate]
    python bench/real.py MODEL --profile sft [--matmul bf16]    # where the time of our third step goes

MODEL is a Hugging Face directory, such as SmolLM2-135M-Instruct's; PYTHON an interpreter with TRL in it.
    sft       train_sft.py and SFTTrainer: 4 chats a step of about 310 tokens, loss on the answers, which are
              about half of them
    dpo       train_dpo.py and DPOTrainer: 2 pairs of such chats a step, the answers in two orders, sigmoid
              loss, the reference a frozen copy
    grpo      train_rl.py and GRPOTrainer: 2 prompts of about 90 tokens x 8 completions of 48, none of which
              ends before; beta 0.04, so with a reference; one update
    generate  sample.generate and transformers' generate: 16 such prompts, 64 new tokens each, temperature 1
All weights train, with AdamW, without gradient checkpointing. Every side is in float32 and, where the
processor multiplies bfloat16, once more: ours with --matmul=bf16, TRL under its bf16 autocast, transformers'
generate with weights in bfloat16.

Each side runs in a process of its own, in turn, who is first alternating. Its time is the median of the six
steps (or calls of generate) after the first, from the end of one to the end of the next; peak is all that its
process ever held, the loading of the model and Python included, the final checkpoint not. `times` is the
other side's seconds over ours.

The limit, measured in every round behind the pair, is what the matrix products of our step take alone: the
same shapes in the same precision, each at the speed of the fastest of several calls, without attention and
all that lies between. The head, its logits in float32, counts for the tokens that pass it. A step of the
sampler takes at least the time of its products or that of reading weights, keys and values from memory; the
longer one counts. `share` is the limit over our time. A machine that others use lowers shares, since the
fastest call waits for nobody. The last line is JSON.
"""
import argparse
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time

import rl
from shared import (Shapes, child, clock_steps, fastest, has_bf16, peak, product_seconds, read, rendered,
                    training_flags, trl_clock, trl_trainer)

TASKS = ('sft', 'dpo', 'grpo', 'generate')
SCRIPTS = {'sft': 'train_sft', 'dpo': 'train_dpo', 'grpo': 'train_rl'}
CHATS, PAIRS = 4, 2             # a step
GRPO = dict(completions=16, samples=8, longest=48, rate=1e-6, beta=0.04)
PROMPTS = GRPO['completions'] // GRPO['samples']
ROWS, NEW = 16, 64              # of generate: prompts, and new tokens of each
RATE, LONGEST = 1e-5, 1024


# ---- the inputs, the same for both sides ---------------------------------------------------------------

def inputs(directory, task):
    return os.path.join(directory, f'{task}.jsonl')


def write_inputs(model, directory, steps):
    """{task}.jsonl for each task: {'prompt', 'completion'}, {'prompt', 'chosen', 'rejected'}, {'prompt'}."""
    from data.tasks import facts
    from data.tokenizer import load_tokenizer
    tokenizer, draw = load_tokenizer(model), random.Random(0)
    problems = itertools.cycle(facts.problems('train', 2000, 'bench'))

    def chat(fewest, most):
        """A rendered chat of so many questions: its prompt, and its answer and that in reverse order."""
        asked = list(itertools.islice(problems, draw.randint(fewest, most)))
        question = {'role': 'user', 'content': '\n'.join(problem['question'] for problem in asked)}
        known = [' '.join(facts.statements(problem['name'], problem['attribute'])) for problem in asked]
        answers = [rendered(tokenizer, [question, {'role': 'assistant', 'content': '\n'.join(lines)}])
                   for lines in (known, known[::-1])]
        return answers[0][0], [completion for _, completion in answers]

    rows = {task: [] for task in TASKS}
    for _ in range(CHATS * steps):
        prompt, (answer, _) = chat(7, 9)
        rows['sft'].append({'prompt': prompt, 'completion': answer})
    for _ in range(PAIRS * steps):
        prompt, (chosen, rejected) = chat(7, 9)
        rows['dpo'].append({'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
    rows['grpo'] = [{'prompt': chat(3, 5)[0]} for _ in range(PROMPTS * steps)]
    rows['generate'] = [{'prompt': chat(3, 5)[0]} for _ in range(ROWS)]
    for task in TASKS:
        with open(inputs(directory, task), 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows[task])


def encoded(options, key='prompt'):
    """The token ids of this text of every row."""
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(options.model)
    return [tokenizer.encode(row[key]) for row in read(inputs(options.directory, options.task))]


# ---- the sides -----------------------------------------------------------------------------------------

def result(seconds, most):
    """seconds: of every step after the first; most: bytes."""
    return {'seconds': statistics.median(seconds), 'peak_mb': most / 2 ** 20}


def between(times):
    """The clock's seconds between each time of now() and the next."""
    return [end - begin for (begin, _), (end, _) in zip(times, times[1:])]


def ours(options):
    """A training script of ours."""
    from configurator import parse
    script, times, peaks = importlib.import_module(SCRIPTS[options.task]), [], []
    clock_steps(script.Run, times, peaks)
    if options.task == 'grpo':
        rl.ours(options, time.perf_counter, GRPO, encoded(options))
    else:
        output = os.path.join(options.directory, f'{options.task}-{options.matmul}')
        batch = CHATS if options.task == 'sft' else PAIRS
        flags = training_flags(options.model, inputs(options.directory, options.task), output, batch,
                               options.steps, RATE, options.matmul)
        if options.task == 'dpo':
            flags += ['--apply_chat_template=false', '--rpo_alpha=0', '--reference=copy']
        script.main(parse(script.Config, flags))
    return result(between(times), peaks[-1])


def profile(options):
    """Prints what the third step of our side spends where, in its process's own time."""
    from torch.profiler import profile as Profiler
    script = importlib.import_module(SCRIPTS[options.task])
    profiler, step, steps = Profiler(), script.Run.step, itertools.count(1)

    def profiled(run, *given, **more):
        grad_norm, number = step(run, *given, **more), next(steps)
        if number == 2:
            profiler.start()
        if number == 3:
            profiler.stop()
        return grad_norm

    script.Run.step = profiled
    ours(options)
    print(profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=20))


def trl(options):
    """A trainer of TRL's on the same rows."""
    times, bf16 = [], options.matmul == 'bf16'
    watch, rows = trl_clock(times, []), read(inputs(options.directory, options.task))
    if options.task == 'grpo':
        rl.train_theirs(options.model, rows, rl.reward, GRPO, options.steps, watch, bf16=bf16,
                        min_new_tokens=GRPO['longest'])
    else:
        settings = dict(
            output_dir=os.path.join(options.directory, 'out'),
            per_device_train_batch_size=CHATS if options.task == 'sft' else PAIRS,
            max_steps=options.steps,
            learning_rate=RATE,
            max_length=LONGEST)
        trl_trainer(options.task.upper(), options.model, rows, settings, bf16, callbacks=[watch]).train()
    return result(between(times[1:]), peak())


def seconds_of_calls(generate, count):
    """Of every call after the first."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        generate()
        times.append(time.perf_counter() - begun)
    return times[1:]


def our_generation(options):
    from model import load_model
    from nanoforge.run import setup
    from sample import generate
    run = setup('cpu', matmul=options.matmul)
    model = load_model(options.model)[0].set_matmul(run.matmul)
    prompts = encoded(options)
    seconds = seconds_of_calls(lambda: generate(model, prompts, NEW), options.steps)
    return result(seconds, peak())


def their_generation(options):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dtype = torch.bfloat16 if options.matmul == 'bf16' else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side='left')
    texts = [row['prompt'] for row in read(inputs(options.directory, 'generate'))]
    batch = tokenizer(texts, return_tensors='pt', padding=True, add_special_tokens=False)

    def generate():
        with torch.no_grad():
            model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=NEW,
                           max_new_tokens=NEW)

    return result(seconds_of_calls(generate, options.steps), peak())


# ---- the limit -----------------------------------------------------------------------------------------

def limit(options):
    """Seconds that our step, or call of generate, takes at least."""
    from data.tokenizer import read_json
    from nanoforge.hf import config_from_hf
    cfg = config_from_hf(read_json(os.path.join(options.model, 'config.json')))
    shapes = shapes_of(cfg)
    rows = {key: encoded(options, key) for key in read(inputs(options.directory, options.task))[0]}

    def mean(key):
        """Tokens of a row."""
        return statistics.mean(map(len, rows[key]))

    sampling = 0.0
    if options.task == 'sft':               # the last token of a document is not fed: it predicts nothing
        answers = CHATS * mean('completion')
        passes = [(1, 1, CHATS * (mean('prompt') - 1) + answers, answers)]
    elif options.task == 'dpo':             # a prompt once for both answers; policy and reference
        answers = PAIRS * (mean('chosen') + mean('rejected'))
        passes = [(2, 1, PAIRS * (mean('prompt') - 2) + answers, answers)]
    elif options.task == 'grpo':            # sampling; then policy and reference, a prompt once for its group
        N, T, prompt = GRPO['completions'], GRPO['longest'], mean('prompt')
        sampling = decoding(cfg, shapes, N, prompt, T, options.matmul)
        passes = [(1, 0, PROMPTS * prompt, PROMPTS), (2, 1, PROMPTS * prompt + N * (T - 1), N * T)]
    else:
        sampling = decoding(cfg, shapes, ROWS, mean('prompt'), NEW, options.matmul)
        passes = [(1, 0, ROWS * mean('prompt'), ROWS)]
    return {'seconds': product_seconds(passes, options.matmul, shapes) + sampling}


def shapes_of(cfg):
    """The Shapes of a GPTConfig."""
    C, heads = cfg.n_embd, cfg.n_head * cfg.head_size
    qkv = heads + 2 * cfg.n_kv_head * cfg.head_size
    up = [(C, cfg.n_inner)] * (2 if cfg.gated else 1)
    return Shapes(cfg.n_layer, [(C, qkv), (heads, C), *up, (cfg.n_inner, C)], (C, cfg.vocab_size))


def decoding(cfg, shapes, rows, prompt, new, matmul):
    """Seconds of the steps of a sampler behind the prompts; their first tokens come from the prompts' own
    pass."""
    products = product_seconds([(1, 0, rows, rows)], matmul, shapes)
    size = 2 if matmul == 'bf16' else 4         # bytes of a layer's weight
    weights = shapes.layers * sum(K * N for K, N in shapes.products) * size
    weights += shapes.head[0] * shapes.head[1] * 4
    slot = rows * shapes.layers * 2 * cfg.n_kv_head * cfg.head_size * 4     # a key and a value of every row
    bandwidth = bytes_per_second()
    return sum(max(products, (weights + slot * (prompt + step)) / bandwidth) for step in range(1, new))


def bytes_per_second():
    """Read from memory, of a tensor too large for any cache."""
    import torch
    x = torch.ones(2 ** 28)
    return 4 * x.numel() / fastest(x.sum)


# ---- the pairs -----------------------------------------------------------------------------------------

def run_child(options):
    import torch
    torch.set_num_threads(options.threads)
    sides = {'ours': ours, 'theirs': trl, 'limit': limit}
    if options.task == 'generate':
        sides.update(ours=our_generation, theirs=their_generation)
    return sides[options.side](options)


def measure(side, task, matmul, directory, options):
    """What the side prints, in a process of its own."""
    flags = [options.model, f'--side={side}', f'--task={task}', f'--matmul={matmul}',
             f'--directory={directory}', f'--steps={options.steps}', f'--threads={options.threads}']
    needs_trl = side == 'theirs' and task != 'generate'
    return child(__file__, *flags, python=options.trl if needs_trl else sys.executable,
                 OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM='true')


def compare(task, matmul, directory, options):
    """Pairs of runs: {'ours', 'theirs', 'limit': [what each printed], 'times', 'share': [of each pair]}"""
    runs = {'ours': [], 'theirs': [], 'limit': []}
    name = 'transformers' if task == 'generate' else 'TRL'
    for pair in range(options.rounds):
        for side in (*rl.in_turn(pair), 'limit'):
            runs[side].append(measure(side, task, matmul, directory, options))
        own, other, least = (runs[side][-1] for side in ('ours', 'theirs', 'limit'))
        label = f'{task:8} {matmul:7} pair {pair + 1}:'
        print(f'{label} ours {own["seconds"]:6.2f} s, peak {own["peak_mb"]:,.0f} MB; limit '
              f'{least["seconds"]:.2f} s, share {least["seconds"] / own["seconds"]:.0%}')
        print(f'{label} {name} {other["seconds"]:.2f} s, peak {other["peak_mb"]:,.0f} MB: '
              f'{other["seconds"] / own["seconds"]:.2f} times ours', flush=True)
    seconds = {side: [run['seconds'] for run in of_side] for side, of_side in runs.items()}
    times = [other / own for own, other in zip(seconds['ours'], seconds['theirs'])]
    share = [least / own for own, least in zip(seconds['ours'], seconds['limit'])]
    return {**runs, 'times': times, 'share': share}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help="a Hugging Face directory")
    parser.add_argument('--trl', default=sys.executable, help='a Python interpreter with TRL')
    parser.add_argument('--rounds', type=int, default=2, help='pairs of runs')
    parser.add_argument('--only', nargs='+', choices=TASKS, default=TASKS)
    parser.add_argument('--steps', type=int, default=7, help='steps a run, the first not counted')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--profile', choices=SCRIPTS)
    for hidden in ('--side', '--task', '--matmul', '--directory'):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_child(options)))
        return
    if options.profile:
        import torch
        torch.set_num_threads(options.threads)
        options.task, options.steps = options.profile, 3
        options.matmul = options.matmul or 'float32'
        with tempfile.TemporaryDirectory() as options.directory:
            write_inputs(options.model, options.directory, options.steps)
            return profile(options)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(options.model, directory, options.steps)
        for task in options.only:
            for matmul in ('float32', 'bf16') if has_bf16() else ('float32',):
                found[f'{task}/{matmul}'] = compare(task, matmul, directory, options)
    print(json.dumps(found))


if __name__ == '__main__':
    main()
