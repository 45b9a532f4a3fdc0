"""Preference optimisation against TRL's DPOTrainer, in pairs on the same machine, the same weights and the
same pairs.

    python bench/dpo.py --trl PYTHON    pairs per second and peak memory, products in float32 and, where the
                                        processor has it, in bf16

PYTHON is an interpreter with TRL in it. The model is a Llama of 3M parameters (4 layers, 256 channels,
vocabulary 1,024), the pairs are texts of the embedded model's corpus: a prompt of 30 to 80 tokens and two
different continuations of as many, 8 pairs a step, sigmoid DPO of all weights with AdamW. `cache`: reference
log-probabilities computed before training, on either side. Each side runs in a process of its own, in turn;
ratios are taken round by round, of the clock and of processor time, which counts where others compute on the
same machine (with --threads 1). Times are medians over training steps, the first left out. floor: the seconds
that the matrix products of a step of ours take alone at the machine's measured rates, attention not counted.
The last line is JSON.
"""
import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile

from shared import (child, clock_steps, has_bf16, llama_with_words, memory, now, peak, product_seconds, read,
                    resident, training_flags, trl_clock, trl_trainer)

BATCH = 8
SIDES = ('trl', 'trl_cache', 'ours', 'ours_cache', 'ours_bf16', 'ours_bf16_cache')
CLOCKS = ('seconds_per_step', 'cpu_seconds_per_step')


# ---- the inputs, the same for all sides ----------------------------------------------------------------

def model_in(directory):
    return os.path.join(directory, 'model')


def pairs_in(directory):
    return os.path.join(directory, 'pairs.jsonl')


def write_inputs(directory, steps):
    """model/ and pairs.jsonl, whose texts join without a token across the seam."""
    from data.tiny.corpus import documents
    tokenizer = llama_with_words(directory)
    draw = random.Random(0)

    def corpus():
        for text in documents('bench'):
            plain = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
            yield from tokenizer.encode(plain)

    def next_text():
        return tokenizer.decode(list(itertools.islice(stream, draw.randint(30, 80))))

    stream = corpus()
    with open(pairs_in(directory), 'w', encoding='utf-8') as file:
        for _ in range(BATCH * steps):
            prompt, chosen, rejected = next_text(), next_text(), next_text()
            pair = {'prompt': prompt + ':', 'chosen': '\n' + chosen, 'rejected': '\n' + rejected}
            file.write(json.dumps(pair) + '\n')


# ---- the sides -----------------------------------------------------------------------------------------

def result(times, start, most, loss):
    """times: now() before the first step and after each; start, most: bytes held then, and at the peak."""
    def median(clock):
        return statistics.median(end[clock] - begin[clock] for begin, end in zip(times[1:], times[2:]))

    return {'seconds_per_step': median(0),
            'cpu_seconds_per_step': median(1),
            'pairs_per_second': BATCH / median(0),
            **memory(start, most),
            'mean_loss': loss}


def trl(directory, options):
    import torch
    torch.set_num_threads(options.threads)
    settings = dict(
        output_dir=os.path.join(directory, 'out'),
        per_device_train_batch_size=BATCH,
        max_steps=options.steps,
        logging_steps=options.steps,
        max_length=384,
        learning_rate=1e-4,
        beta=0.1,
        precompute_ref_log_probs=options.child == 'trl_cache')
    times, logged = [], []
    trainer = trl_trainer('DPO', model_in(directory), read(pairs_in(directory)), settings,
                          callbacks=[trl_clock(times, logged)])
    start = resident()
    trainer.train()
    return result(times, start, peak(), logged[0])


def our_flags(directory, options):
    reference = 'cache' if options.child.endswith('cache') else 'copy'
    matmul = 'bf16' if 'bf16' in options.child else 'float32'
    common = training_flags(model_in(directory), pairs_in(directory), os.path.join(directory, options.child),
                            BATCH, options.steps, rate=1e-4, matmul=matmul)
    return [*common,
            '--apply_chat_template=false',
            '--rpo_alpha=0',
            '--max_length=384',
            f'--reference={reference}',
            f'--reference_cache={os.path.join(directory, "cache")}']


def ours(directory, options):
    import torch

    import train_dpo as script
    from configurator import parse
    torch.set_num_threads(options.threads)
    cfg = parse(script.Config, our_flags(directory, options))
    open_reference = script.open_reference
    start, times, peaks = [], [now()], []

    def open_timed(*given):
        """The reference is memory of the training's own, as in TRL; policy and data are not."""
        start.append(resident())
        return open_reference(*given)

    script.open_reference = open_timed
    clock_steps(script.Run, times, peaks)
    script.main(cfg)
    log = read(os.path.join(cfg.output_dir, 'log.jsonl'))
    loss = next(line['loss'] for line in log if 'loss' in line)
    return result(times, start[0], peaks[-1], loss)


def floor(directory, options):
    """{side: seconds that the products of a step of ours take alone}, prompts shared, each token once through
    policy and reference."""
    import torch

    from data.tokenizer import load_tokenizer
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(model_in(directory))
    pairs = read(pairs_in(directory))

    def tokens_of(key):
        return BATCH * statistics.mean(len(tokenizer.encode(pair[key])) for pair in pairs)

    answers = tokens_of('chosen') + tokens_of('rejected')
    tokens = tokens_of('prompt') + answers
    seconds = {}
    for kind, matmul in (('ours', 'float32'), ('ours_bf16', 'bf16')):
        if kind in options.sides:
            # forward and backward of the policy, and the reference's forward
            seconds[kind] = product_seconds([(2, 1, tokens, answers)], matmul)
            seconds[f'{kind}_cache'] = product_seconds([(1, 1, tokens, answers)], matmul)
    return {**seconds, 'tokens': tokens, 'answers': answers}


# ---- the rounds ----------------------------------------------------------------------------------------

def measure(side, directory, options):
    """What the side prints, in a process of its own."""
    flags = [f'--child={side}', f'--directory={directory}', f'--steps={options.steps}',
             f'--threads={options.threads}', '--sides', *options.sides]
    python = options.trl if side.startswith('trl') else sys.executable
    return child(__file__, *flags, python=python, OMP_NUM_THREADS=str(options.threads))


def run_child(options):
    if options.child == 'floor':
        return floor(options.directory, options)
    side = trl if options.child.startswith('trl') else ours
    return side(options.directory, options)


def sides_of_this_machine():
    bf16 = has_bf16()
    return [side for side in SIDES if bf16 or 'bf16' not in side]


def times_trl(found):
    """{side and clock: TRL's seconds over the side's, of every round, in order of size}"""
    ratios = {}
    for side in found:
        if side == 'trl' or 'trl' not in found:
            continue
        for clock in CLOCKS:
            values = [theirs[clock] / run[clock] for run, theirs in zip(found[side], found['trl'])]
            ratios[f'{side} {clock}'] = [round(ratio, 2) for ratio in sorted(values)]
    return ratios


def median_run(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--rounds', type=int, default=3, help='of one run of every side')
    parser.add_argument('--steps', type=int, default=12, help='steps a run')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--sides', nargs='+', choices=SIDES)
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--directory', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(options)))
        return
    options.sides = options.sides or sides_of_this_machine()
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(directory, options.steps)
        for _ in range(options.rounds):
            for side in options.sides:
                run = measure(side, directory, options)
                found.setdefault(side, []).append(run)
                print(side, {key: round(value, 3) for key, value in run.items()}, flush=True)
        lowest = measure('floor', directory, options)
    medians = {side: median_run(runs) for side, runs in found.items()}
    print(json.dumps({'times_trl': times_trl(found), 'floor': lowest, 'median': medians}))


if __name__ == '__main__':
    main()
