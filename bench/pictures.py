"""The pictures of docs/: of each method a run that goes well and runs that go wrong, as the run draws it.

    python bench/pictures.py                    # all, half an hour on two cores
    python bench/pictures.py rl_good gpt_overfit

Each is a command of RUNS, in a folder of its own, whose picture is copied to docs/pictures.
"""
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from demos import in_folder
from shared import ROOT

LENGTH = 'def score(completions, records):\n    return [min(1.0, len(text) / 100) for text in completions]\n'
GPT = ['train_gpt.py', '--out_dir=out', '--sample_tokens=0', '--eval_iters=20', '--log_interval=5']
SFT = ['train_sft.py', '--output_dir=out', '--logging_steps=5', '--eval_on_start', '--eval_steps=20']
DPO = ['train_dpo.py', '--output_dir=out', '--logging_steps=1']
RL = ['train_rl.py', '--output_dir=out', '--logging_steps=1', '--eval_steps=5', '--eval_problems=100']
TEAMS = os.path.join(ROOT, 'recipes', 'training', 'agents')
# {picture: (the command's words, what it draws)}
RUNS = {
    'gpt_good': ([*GPT, '--max_iters=500', '--eval_interval=50'], 'loss.png'),
    'gpt_overfit': ([*GPT, '--dataset=few', '--max_iters=500', '--eval_interval=25', '--warmup_iters=20'],
                    'loss.png'),
    'gpt_diverges': ([*GPT, '--max_iters=200', '--eval_interval=50', '--learning_rate=1', '--warmup_iters=0',
                      '--grad_clip=0'], 'loss.png'),
    'sft_good': ([*SFT, '--num_train_epochs=1'], 'loss.png'),
    'sft_overfit': ([*SFT, '--dataset_path=few.jsonl', '--max_steps=200'], 'loss.png'),
    'dpo_good': (DPO, 'loss.png'),
    'dpo_both_fall': ([*DPO, '--rpo_alpha=0', '--learning_rate=2e-3'], 'loss.png'),
    'rl_good': (RL, 'reward.png'),
    'rl_collapse': ([*RL, '--learning_rate=1e-2'], 'reward.png'),
    'rl_cheated': ([*RL, '--reward=mine.py:score'], 'reward.png'),
    'teams_good': (['train_agents.py', f'{TEAMS}/plan_path.yaml', '--output_dir=out'], 'reward.png'),
    'teams_unprepared': (['train_agents.py', f'{TEAMS}/sokoban.yaml', '--output_dir=out',
                          'demonstrations.steps=0', 'training.total_training_steps=16',
                          'training.val_freq=4'], 'reward.png'),
}


def prepare(folder):
    """The little data that runs need which learn by heart, and the reward that is easily had."""
    from data.prepare import prepare_files
    from data.tasks import devices
    prepare_files(os.path.join(folder, 'few'), [os.path.join(ROOT, 'README.md')], 'char', 'the README')
    rows = devices.rows('train', 40, seed=0) + devices.rows('eval', 60, seed=0)
    Path(folder, 'few.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    Path(folder, 'mine.py').write_text(LENGTH, encoding='utf-8')


def draw(name):
    words, picture = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        in_folder(folder, *words)
        [path] = [os.path.join(place, picture) for place, _, files in os.walk(os.path.join(folder, 'out'))
                  if picture in files and 'latest' not in place]
        shutil.copy(path, os.path.join(ROOT, 'docs', 'pictures', f'{name}.png'))


if __name__ == '__main__':
    os.makedirs(os.path.join(ROOT, 'docs', 'pictures'), exist_ok=True)
    for name in sys.argv[1:] or RUNS:
        draw(name)
        print(name, flush=True)
