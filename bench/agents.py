"""What teams learn, on held-out problems, before and after; with the baselines of the same budget beside them.

    python bench/agents.py plan_path                    # the recipe, three seeds; sokoban, sudoku, math, code likewise
    python bench/agents.py plan_path --seeds=1 --baselines -- env.map_size=6

--baselines also trains MAS+GRPO (rollout_mode=no_tree) and a single agent with twice the candidates, so that every run samples as
much; and plays the solvers that know nothing. What stands behind -- goes to every run. Runs are in logs/bench_*/.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def train(game, name, seed, *words):
    """Runs the recipe; (metrics of the first validation, of the last, seconds in all, processor seconds in all)."""
    experiment, started, used = f'bench_{game}_{name}_{seed}', time.perf_counter(), processor_seconds()
    command = [sys.executable, os.path.join(ROOT, 'train_agents.py'), os.path.join(ROOT, f'recipes/training/agents/{game}.yaml'),
               f'training.experiment_name={experiment}', f'seed={seed}', '--no-tensorboard', *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    with open(f'logs/{experiment}/latest/log.jsonl', encoding='utf-8') as file:
        lines = [json.loads(line) for line in file]
    found = [line for line in lines if 'validation/success_rate' in line]
    return found[0], found[-1], seconds, processor_seconds() - used


def processor_seconds():
    """Of the runs so far: what counts where others use the machine, too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def solvers(game, n=200):
    """{name: success rate} of ways to play that know nothing of the game, on the held-out problems of the recipe."""
    import yaml
    from train_agents import Config, env_settings, task_of
    from configurator import parse
    with open(os.path.join(ROOT, f'recipes/training/agents/{game}.yaml'), encoding='utf-8') as file:
        turns = yaml.safe_load(file)['env']['max_turns']
    cfg = parse(Config, [os.path.join(ROOT, f'recipes/training/agents/{game}.yaml')])
    task = task_of(cfg)
    draw, problems = random.Random(0), task.problems('eval', n, 'validation', **env_settings(cfg, task, cfg.benchmark))
    answers = {'random': lambda env: ' '.join(draw.choices('UDLR', k=8))}
    if game == 'plan_path':
        answers['straight to the goal'] = lambda env: ' '.join(task.straight(env.at, env.goal)) or 'U'
    if game == 'sokoban':
        answers['straight to the goal'] = lambda env: ' '.join(task.straight(env.player, env.goal)) or 'U'
    if game == 'sudoku':
        answers = {'rows filled at random': lambda env: env.demonstration('tool_agent', type('', (), {'random': lambda: 0.0, 'shuffle': draw.shuffle})),
                   'one fixed grid': lambda env: '1234 3412 2143 4321'}
    found = {}
    for name, answer in answers.items():
        solved = 0
        for problem in problems:
            env = task.Env(problem)
            while env.turn < turns and not env.done:
                env.step(task.ACTS, env.score(task.ACTS, answer(env)))
            solved += env.success
        found[name] = solved / n
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('game', choices=('plan_path', 'sokoban', 'sudoku', 'math', 'code'))
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--baselines', action='store_true')
    parser.add_argument('words', nargs='*', help='settings of every run')
    args = parser.parse_args()
    acts = {'math': 'reasoner', 'code': 'coder'}.get(args.game, 'plan_agent')
    runs = {'at_grpo': []}
    if args.baselines:
        runs.update({'no_tree': ['rollout_mode=no_tree'], 'single': [f'turn_order={acts}', 'training.train_sample_num=16']})
    print(f'{"run":24} {"sampled":>16} {"greedy":>16} {"turns":>12} {"seconds":>9} {"CPU s":>8}')
    for name, words in runs.items():
        for seed in args.seeds:
            first, last, seconds, processor = train(args.game, name, seed, *words, *args.words)
            change = lambda key, form: f'{first["validation/" + key]:{form}} -> {last["validation/" + key]:{form}}'
            print(f'{name + f", seed {seed}":24} {change("success_rate", ".1%"):>16} {change("greedy_success_rate", ".1%"):>16} '
                  f'{change("episode_length", ".1f"):>12} {seconds:>9.0f} {processor:>8.0f}', flush=True)
    if args.game in ('plan_path', 'sokoban', 'sudoku') and args.baselines:
        for name, rate in solvers(args.game).items():
            print(f'{name:24} {rate:>16.1%}')


if __name__ == '__main__':
    main()
