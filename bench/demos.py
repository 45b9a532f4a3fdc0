"""What every script reaches as it is shipped: its default, three seeds, on what was held out.

    python bench/demos.py                           # all, about an hour and a half on two cores
    python bench/demos.py sft dpo --seeds 1 2       # some of them
    python bench/demos.py --out logs/demos          # a run that is there already is not repeated

No flag but the seed and the folder: the precision is the machine's, bf16 products where the processor has
them. A line a run: seconds from the command to its end and the score before and after, by the weights that a
user finds in the folder (of RL and teams the last evaluation, of the last step); then the lowest and the
highest of the seeds. What the scores are:

    gpt     validation loss in nats a character of Shakespeare, or of the text that stands in without a network
    sft     exact tool calls of evaluate.py on the 200 held-out rows
    dpo     sampled answers in the form asked for
    rl      right sums, greedy
    plan_path, sokoban, sudoku, math, code      sampled success of the team
"""
import argparse
import json
import os
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


def run_demo(demo, seed, folder):
    """Runs it in a folder of its own -> {'seconds', 'scores': [before ... after]}"""
    os.makedirs(folder, exist_ok=True)
    (script, *words), key = DEMOS[demo]
    begun = time.perf_counter()
    in_folder(folder, script, *words, f'--seed={seed}', '--tensorboard=false')
    seconds = time.perf_counter() - begun
    if demo == 'sft':
        scores = [exact_calls(folder, model) for model in ('tiny', 'models')]
    else:
        [log] = [os.path.join(path, 'log.jsonl') for path, _, files in os.walk(folder, followlinks=False)
                 if 'log.jsonl' in files and not os.path.islink(path)]
        scores = [line[key] for line in read(log) if key in line]
    return {'seconds': round(seconds), 'scores': scores}


def in_folder(folder, script, *words):
    with open(os.path.join(folder, 'printed.txt'), 'a', encoding='utf-8') as file:
        subprocess.run([sys.executable, os.path.join(ROOT, script), *words], cwd=folder, check=True,
                       stdout=file, stderr=subprocess.STDOUT)


def exact_calls(folder, model):
    out = os.path.join(folder, f'evaluation-{model}')
    in_folder(folder, 'evaluate.py', model, '--data=devices', f'--output_dir={out}')
    with open(os.path.join(out, 'evaluation.json'), encoding='utf-8') as file:
        return json.load(file)['results'][0]['scores']['exact_call']


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('demos', nargs='*', default=list(DEMOS), metavar='demo', help=', '.join(DEMOS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--out', default='logs/demos')
    options = parser.parse_args()
    if unknown := set(options.demos) - DEMOS.keys():
        parser.error(f'{", ".join(sorted(unknown))}: there are {", ".join(DEMOS)}')
    for demo in options.demos:
        ends = []
        for seed in options.seeds:
            folder = os.path.abspath(os.path.join(options.out, f'{demo}-{seed}'))
            result = os.path.join(folder, 'demo.json')
            if not os.path.exists(result):
                found = run_demo(demo, seed, folder)
                with open(result, 'w', encoding='utf-8') as file:
                    json.dump(found, file)
            with open(result, encoding='utf-8') as file:
                found = json.load(file)
            before, after = found['scores'][0], found['scores'][-1]
            ends.append(after)
            print(f'{demo:10} seed {seed}  {found["seconds"]:4} s  {before:.3f} -> {after:.3f}', flush=True)
        print(f'{demo:10} {min(ends):.3f} to {max(ends):.3f} in {len(ends)} seeds', flush=True)


if __name__ == '__main__':
    main()
