"""What every script reaches as it is shipped: its default, three seeds, on what was held out.

    python bench/demos.py                           # all, about an hour and a half on two cores
    python bench/demos.py sft dpo --seeds 1 2       # some of them
    python bench/demos.py --model DIR --seeds 1     # SmolLM2-135M-Instruct's, say: what a real model learns
    python bench/demos.py --out logs/demos          # a run that is there already is not repeated

No flag but the seed and the folder: the precision is the machine's, bf16 products where the processor has
them. A line a run: seconds from the command to its end and the score before and after, by the weights that a
user finds in the folder (of RL and teams the last evaluation, of the last step); then the lowest and the
highest of the seeds. What the scores are:

    gpt     validation loss in nats a character, of Shakespeare or, without a network, its stand-in
    sft     exact tool calls of evaluate.py on the 200 held-out rows
    dpo     sampled answers in the form asked for
    rl      right sums, greedy
    plan_path, sokoban, sudoku, math, code      sampled success of the team

--model: full and LoRA fine-tuning of that model on the same tool calls (40 steps of 4 rows), preferences
(60 steps of 4 pairs) and sums (GRPO, 30 steps of 32 completions, the reward for the right number alone),
scored on 100 held-out rows and sums and 56 prompts. A small model knows neither the form nor how to carry,
and its own answers earn nothing: before GRPO it is fine-tuned for 150 steps on the embedded demonstrator's
careless ones, and `before` is what it then can. The interval is Wilson's, 95%. A model whose template
writes no tool calls is given the embedded one's.
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import time

from shared import ROOT, read

TEAMS = ('plan_path', 'sokoban', 'sudoku', 'math', 'code')
# {demo: the command's words, the key in log.jsonl}; fine-tuning is scored by evaluate.py
DEMOS = {
    'gpt': (['train_gpt.py', '--out_dir=out'], 'eval_loss'),
    'sft': (['train_sft.py'], None),
    'dpo': (['train_dpo.py', '--output_dir=out'], 'success_rate'),
    'rl': (['train_rl.py', '--output_dir=out'], 'eval_accuracy'),
    **{team: (['train_agents.py', os.path.join(ROOT, f'recipes/training/agents/{team}.yaml')],
              'validation/success_rate') for team in TEAMS},
}
SMALL_STEPS = ['--logging_steps=10', '--lr_scheduler_type=linear', '--warmup_steps=5']
SFT = ['train_sft.py', '--dataset_path=devices', '--max_steps=40', '--per_device_train_batch_size=4',
       '--gradient_accumulation_steps=1', '--eval_strategy=no', '--output_dir=models', *SMALL_STEPS]
DPO = ['train_dpo.py', '--max_steps=60', '--per_device_train_batch_size=4', '--eval_samples=100',
       '--eval_steps=60', '--output_dir=out', *SMALL_STEPS]
GRPO = ['train_rl.py', '--max_steps=30', '--per_device_train_batch_size=32',
        '--gradient_accumulation_steps=1',
        '--steps_per_generation=1', '--num_generations=8', '--eval_problems=100', '--eval_steps=15',
        '--temperature=1', '--max_completion_length=40', '--dataset_path=sums.jsonl', '--system_prompt=',
        '--reward=exact', '--output_dir=out', *SMALL_STEPS]
FORM = ['train_sft.py', '--dataset_path=shown.jsonl', '--max_steps=150', '--per_device_train_batch_size=4',
        '--gradient_accumulation_steps=1', '--eval_strategy=no', '--output_dir=form', '--lr=5e-5',
        *SMALL_STEPS]
LORA = ['--use_lora=true', '--lora_r=16', '--lora_alpha=32']
REAL = {
    'sft-full': ([*SFT, '--lr=5e-5'], None),
    'sft-lora': ([*SFT, '--lr=5e-4', *LORA], None),
    'dpo-full': ([*DPO, '--lr=5e-6'], 'success_rate'),
    'dpo-lora': ([*DPO, '--lr=1e-4', *LORA], 'success_rate'),
    'grpo-full': ([*GRPO, '--lr=5e-6'], 'eval_accuracy'),
    'grpo-lora': ([*GRPO, '--lr=1e-4', *LORA], 'eval_accuracy'),
}
HELD_OUT, PROMPTS = 100, 56      # rows and sums that are asked; the embedded pairs hold out so many prompts


def run_demo(demo, seed, folder, model=None):
    """Runs it in a folder of its own -> {'seconds', 'scores': [before ... after]}"""
    os.makedirs(folder, exist_ok=True)
    (script, *words), key = (REAL if model else DEMOS)[demo]
    if model:
        linked = with_template(model, folder)
        write_sums(folder)
        if demo.startswith('grpo'):
            in_folder(folder, *FORM, f'--base_model_name={linked}', f'--seed={seed}', '--tensorboard=false')
            linked = 'form'
        words.append(f'--base_model_name={linked}')
    begun = time.perf_counter()
    in_folder(folder, script, *words, f'--seed={seed}', '--tensorboard=false')
    seconds = time.perf_counter() - begun
    if script == 'train_sft.py':
        before = os.path.join(folder, 'model') if model else 'tiny'
        scores = [exact_calls(folder, path, model and HELD_OUT) for path in (before, 'models')]
    else:
        [path] = [path for path, _, files in os.walk(folder)
                  if 'log.jsonl' in files and os.path.basename(path) != 'form']
        scores = [line[key] for line in read(os.path.join(path, 'log.jsonl')) if key in line]
    return {'seconds': round(seconds), 'scores': scores}


def in_folder(folder, script, *words):
    with open(os.path.join(folder, 'printed.txt'), 'a', encoding='utf-8') as file:
        subprocess.run([sys.executable, os.path.join(ROOT, script), *words], cwd=folder, check=True,
                       stdout=file, stderr=subprocess.STDOUT)


def with_template(model, folder):
    """A folder of links to the model's files, with the embedded model's template where its own has no
    tools."""
    linked = os.path.join(folder, 'model')
    os.makedirs(linked, exist_ok=True)
    sources = {name: os.path.join(os.path.abspath(model), name) for name in os.listdir(model)}
    template = ''
    for name in {'chat_template.jinja', 'tokenizer_config.json'} & sources.keys():
        with open(sources[name], encoding='utf-8') as file:
            template += file.read()
    if 'tools' not in template:
        sources['chat_template.jinja'] = os.path.join(ROOT, 'data/tiny/chat_template.jinja')
    for name, source in sources.items():
        if not os.path.lexists(os.path.join(linked, name)):
            os.symlink(source, os.path.join(linked, name))
    return linked


def write_sums(folder):
    """The embedded sums as questions and answers, and others worked out by the careless demonstrator."""
    from data.tasks import arithmetic
    draw = random.Random(0)
    rows = {'sums.jsonl': [], 'shown.jsonl': []}
    for split, count in (('train', 2000), ('eval', HELD_OUT)):
        for problem in arithmetic.problems(split, count, 0):
            rows['sums.jsonl'].append({'question': problem['question'], 'answer': problem['answer'],
                                       'metadata': split})
    for problem in arithmetic.problems('train', 600, 'shown'):
        rows['shown.jsonl'].append({'question': problem['question'],
                                    'answer': arithmetic.demonstration(problem, draw)})
    for name, of_file in rows.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in of_file)


def exact_calls(folder, model, count=None):
    out = os.path.join(folder, f'evaluation-{os.path.basename(model)}')
    more = [f'--num_samples={count}'] if count else []
    in_folder(folder, 'evaluate.py', model, '--data=devices', f'--output_dir={out}', *more)
    with open(os.path.join(out, 'evaluation.json'), encoding='utf-8') as file:
        return json.load(file)['results'][0]['scores']['exact_call']


def interval(share, count):
    """Wilson's, 95%."""
    z = 1.96
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count
                                                               + z * z / (4 * count * count))
    return [(middle + side * width) / (1 + z * z / count) for side in (-1, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('demos', nargs='*', metavar='demo',
                        help=f'{", ".join(DEMOS)}; with --model {", ".join(REAL)}')
    parser.add_argument('--model', help='a Hugging Face directory')
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--out', default='logs/demos')
    options = parser.parse_args()
    known = REAL if options.model else DEMOS
    if unknown := set(options.demos) - known.keys():
        parser.error(f'{", ".join(sorted(unknown))}: there are {", ".join(known)}')
    for demo in options.demos or known:
        ends = []
        for seed in options.seeds:
            folder = os.path.abspath(os.path.join(options.out, f'{demo}-{seed}'))
            result = os.path.join(folder, 'demo.json')
            if not os.path.exists(result):
                found = run_demo(demo, seed, folder, options.model)
                with open(result, 'w', encoding='utf-8') as file:
                    json.dump(found, file)
            with open(result, encoding='utf-8') as file:
                found = json.load(file)
            before, after = found['scores'][0], found['scores'][-1]
            ends.append(after)
            spread = ''
            if options.model:
                count = PROMPTS if demo.startswith('dpo') else HELD_OUT
                spread = '  (95%: {:.2f} to {:.2f}, before {:.2f} to {:.2f})'.format(
                    *interval(after, count), *interval(before, count))
            print(f'{demo:10} seed {seed}  {found["seconds"]:4} s  {before:.3f} -> {after:.3f}{spread}',
                  flush=True)
        print(f'{demo:10} {min(ends):.3f} to {max(ends):.3f} in {len(ends)} seeds', flush=True)


if __name__ == '__main__':
    main()
