"""Preference optimisation against TRL's DPOTrainer, in pairs on the same machine, the same weights and the same pairs.

    python bench/dpo.py --trl PYTHON    pairs per second and peak memory, products in float32 and, where the processor has it, in bf16

PYTHON is an interpreter with TRL in it. The model is a Llama of 3M parameters (4 layers, 256 channels, vocabulary 1,024), the pairs are
texts of the embedded model's corpus: a prompt of 30 to 80 tokens and two different continuations of as many, 8 pairs a step, sigmoid
DPO of all weights with AdamW. `cache`: reference log-probabilities computed before training, on either side. Each side runs in a
process of its own, in turn; ratios are taken round by round, of the clock and of processor time, which counts where others compute
on the same machine (with --threads 1). Times are medians over training steps, the first left out. floor: the seconds that the matrix
products of a step of ours take alone at the machine's measured rates, attention not counted. The last line is JSON.
"""
import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile

from shared import child, llama_with_words, memory, now, product_seconds, read, resident, trl_clock

BATCH = 8
SIDES = ('trl', 'trl_cache', 'ours', 'ours_cache', 'ours_bf16', 'ours_bf16_cache')


def write_inputs(directory, steps):
    """model/ and pairs.jsonl, whose texts join without a token across the seam."""
    from data.tiny.corpus import documents
    tokenizer, rng = llama_with_words(directory), random.Random(0)
    plain = (tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in documents('bench'))
    stream = itertools.chain.from_iterable(map(tokenizer.encode, plain))
    with open(os.path.join(directory, 'pairs.jsonl'), 'w') as file:
        for _ in range(BATCH * steps):
            prompt, chosen, rejected = (tokenizer.decode(list(itertools.islice(stream, rng.randint(30, 80)))) for _ in range(3))
            file.write(json.dumps({'prompt': prompt + ':', 'chosen': '\n' + chosen, 'rejected': '\n' + rejected}) + '\n')


def result(times, start, loss):
    """times: now() before the first step and after each."""
    seconds, cpu = (statistics.median(b[clock] - a[clock] for a, b in zip(times[1:], times[2:])) for clock in (0, 1))
    return {'seconds_per_step': seconds, 'cpu_seconds_per_step': cpu, 'pairs_per_second': BATCH / seconds, **memory(start), 'mean_loss': loss}


def trl(directory, options):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    torch.set_num_threads(options.threads)
    path = os.path.join(directory, 'model')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    config = DPOConfig(output_dir=os.path.join(directory, 'out'), per_device_train_batch_size=BATCH, max_steps=options.steps,
                       max_length=384, learning_rate=1e-4, lr_scheduler_type='constant', use_cpu=True, bf16=False, fp16=False,
                       gradient_checkpointing=False, report_to='none', save_strategy='no', dataloader_pin_memory=False,
                       disable_tqdm=True, logging_steps=options.steps, precompute_ref_log_probs=options.child == 'trl_cache', beta=0.1)
    times, logged = [], []

    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(read(os.path.join(directory, 'pairs.jsonl'))),
                         processing_class=tokenizer, callbacks=[trl_clock(times, logged)])
    start = resident()
    trainer.train()
    return result(times, start, logged[0])


def ours(directory, options):
    import torch

    import train_dpo as script
    from configurator import parse
    torch.set_num_threads(options.threads)
    reference = 'cache' if options.child.endswith('cache') else 'copy'
    matmul = 'bf16' if 'bf16' in options.child else 'float32'
    out = os.path.join(directory, options.child)
    cfg = parse(script.Config, [
        f'--base_model_name={os.path.join(directory, "model")}', f'--output_dir={out}',
        f'data.datasets[0].name={os.path.join(directory, "pairs.jsonl")}', '--apply_chat_template=false',
        '--eval_fraction=0', f'--per_device_train_batch_size={BATCH}', '--learning_rate=1e-4',
        '--lr_scheduler_type=constant', '--warmup_steps=0', '--rpo_alpha=0', f'--max_steps={options.steps}',
        f'--logging_steps={options.steps}', f'--matmul={matmul}', '--device=cpu', '--max_length=384',
        f'--reference={reference}', f'--reference_cache={os.path.join(directory, "cache")}', '--tensorboard=false'])
    open_reference, step = script.open_reference, script.Run.step
    start, times, used = [], [now()], {}

    def open_timed(*given):
        """The reference is memory of the training's own, as in TRL; policy and data are not."""
        start.append(resident())
        return open_reference(*given)

    def step_timed(run, *given):
        """The last thing that a step does."""
        grad_norm = step(run, *given)
        times.append(now())
        used.update(memory(start[0]))       # before the final checkpoint is written
        return grad_norm

    script.open_reference, script.Run.step = open_timed, step_timed
    script.main(cfg)
    loss = next(line['loss'] for line in read(os.path.join(out, 'log.jsonl')) if 'loss' in line)
    return {**result(times, start[0], loss), **used}


def floor(directory, options):
    """{side: seconds that the products of a step of ours take alone}, prompts shared, each token once through policy and reference."""
    import torch

    from data.tokenizer import load_tokenizer
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(os.path.join(directory, 'model'))
    size = lambda key: BATCH * statistics.mean(len(tokenizer.encode(row[key])) for row in read(os.path.join(directory, 'pairs.jsonl')))
    answers = size('chosen') + size('rejected')
    tokens = size('prompt') + answers
    times = {'': 4, '_cache': 3}            # forward and backward of the policy, and the reference
    return {**{f'ours{kind}{cache}': product_seconds([(times[cache], tokens, answers)], kind[1:] or 'float32')
               for kind in ('', '_bf16') for cache in times if f'ours{kind}' in options.sides}, 'tokens': tokens, 'answers': answers}


def measure(side, directory, options):
    flags = [f'--child={side}', f'--directory={directory}', f'--steps={options.steps}', f'--threads={options.threads}', '--sides', *options.sides]
    python = options.trl if side.startswith('trl') else sys.executable
    return child(__file__, *flags, python=python, OMP_NUM_THREADS=str(options.threads))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--rounds', type=int, default=3, help='of one run of every side')
    parser.add_argument('--steps', type=int, default=12, help='steps a run')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--sides', nargs='+', choices=SIDES)
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--directory', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = {'trl': trl, 'floor': floor}.get(options.child.partition('_')[0], ours)
        print(json.dumps(run(options.directory, options)))
        return
    if not options.sides:
        from nanoforge.run import setup
        options.sides = [side for side in SIDES if 'bf16' not in side or setup('cpu').matmul == 'bf16']
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(directory, options.steps)
        found = {}
        for _ in range(options.rounds):
            for side in options.sides:
                found.setdefault(side, []).append(measure(side, directory, options))
                print(side, {key: round(value, 3) for key, value in found[side][-1].items()}, flush=True)
        ratios = {f'{side} {clock}': [t[clock] / o[clock] for o, t in zip(found[side], found['trl'])]
                  for side in found if side != 'trl' and 'trl' in found for clock in ('seconds_per_step', 'cpu_seconds_per_step')}
        medians = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}
        print(json.dumps({'times_trl': {side: [round(r, 2) for r in sorted(values)] for side, values in ratios.items()},
                          'floor': measure('floor', directory, options), 'median': medians}))


if __name__ == '__main__':
    main()
