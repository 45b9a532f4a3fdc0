"""What teams learn, on held-out problems, before and after; with baselines of the same budget and solvers
that know nothing.

    python bench/agents.py plan_path sokoban sudoku --baselines     # the recipes, three seeds; baselines once
    python bench/agents.py math --seeds 1 -- training.total_training_steps=40
    python bench/agents.py --draw                                   # bench/agents.json and .png from --out

--baselines also trains MAS+GRPO (rollout_mode=no_tree) and a single agent with twice the candidates, so that
every run samples as much. What stands behind -- goes to every run. A run that --out holds already is not
repeated; others that bench/agents.json has stay in it and in the picture. The figures are of the last
iteration: none is chosen by what is reported. Seconds are of the whole command: start, warm-up, training,
validations; null where a run was stopped on the way.
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
# game: the agent whose answer is executed
ACTS = {'plan_path': 'plan_agent', 'sokoban': 'plan_agent', 'sudoku': 'plan_agent', 'math': 'reasoner',
        'code': 'coder'}
TITLES = {'plan_path': 'Plan-Path 4x4', 'sokoban': 'Sokoban 6x6', 'sudoku': 'Sudoku 4x4',
          'math': 'mathematics', 'code': 'programming'}
KINDS = {'at_grpo': ('AT-GRPO', '#3b6fb6'), 'no_tree': ('MAS+GRPO', '#d9622b'),
         'single': ('single agent', '#4c9a52')}
METRICS = ('success_rate', 'greedy_success_rate', 'episode_length', 'reward')


def settings_of(kind, game):
    """The settings that make a run of this kind."""
    settings = {'at_grpo': [],
                'no_tree': ['rollout_mode=no_tree'],
                'single': [f'turn_order={ACTS[game]}', 'training.train_sample_num=16']}
    return settings[kind]


def recipe(game):
    return os.path.join(ROOT, f'recipes/training/agents/{game}.yaml')


def train(game, kind, seed, words, out):
    """Runs the recipe in out/GAME-KIND-SEED, unless it has ended there already."""
    folder = os.path.join(out, f'{game}-{kind}-{seed}')
    result = os.path.join(folder, 'bench.json')
    if os.path.exists(result):
        return
    os.makedirs(folder, exist_ok=True)
    started, used = time.perf_counter(), processor_seconds()
    command = [sys.executable, os.path.join(ROOT, 'train_agents.py'), recipe(game), f'seed={seed}',
               'training.experiment_name=run', '--no-tensorboard', *settings_of(kind, game), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    times = {'seconds': round(time.perf_counter() - started),
             'processor_seconds': round(processor_seconds() - used)}
    with open(result, 'w', encoding='utf-8') as file:
        json.dump({**times, 'words': words}, file)


def processor_seconds():
    """Of the runs so far: what counts where others use the machine, too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def validations(folder):
    """{'step' or metric: [its value at every validation]}"""
    with open(os.path.join(folder, 'logs', 'run', 'latest', 'log.jsonl'), encoding='utf-8') as file:
        lines = [line for line in map(json.loads, file) if 'validation/success_rate' in line]
    return {'step': [line['step'] for line in lines],
            **{metric: [line[f'validation/{metric}'] for line in lines] for metric in METRICS}}


def solvers(game):
    """{name: success rate} of ways to play that know nothing of the game, on the held-out problems."""
    from configurator import parse
    from train_agents import Config, env_settings, task_of
    cfg = parse(Config, [recipe(game)])
    task = task_of(cfg)
    draw = random.Random(0)
    settings = env_settings(cfg, task, cfg.benchmark)
    problems = task.problems('eval', cfg.validate_episodes, 'validation', **settings)

    def rows_at_random(env):
        lines = []
        for line in env.grid:
            missing = draw.sample(sorted({1, 2, 3, 4} - set(line)), line.count(0))
            lines.append(''.join(str(number or missing.pop()) for number in line))
        return ' '.join(lines)

    def fixed_grid(env):
        return '1234 3412 2143 4321'

    def random_moves(env):
        return ' '.join(draw.choices('UDLR', k=8))

    def straight(env):
        player = env.at if game == 'plan_path' else env.player
        return ' '.join(task.straight(player, env.goal)) or 'U'

    def is_solved(problem, answer):
        env = task.Env(problem)
        while env.turn < cfg.max_turns and not env.done:
            env.step(task.ACTS, env.score(task.ACTS, answer(env)))
        return env.success

    answers = {'random moves': random_moves, 'straight to the goal': straight}
    if game == 'sudoku':
        answers = {'rows filled at random': rows_at_random, 'one fixed grid': fixed_grid}
    return {name: sum(is_solved(problem, answer) for problem in problems) / len(problems)
            for name, answer in answers.items()}


def runs_in(out):
    """[(game, kind, seed, folder)] of the runs that have ended."""
    runs = []
    for name in sorted(os.listdir(out)) if os.path.isdir(out) else []:
        folder = os.path.join(out, name)
        if name.count('-') == 2 and os.path.exists(os.path.join(folder, 'bench.json')):
            runs.append((*name.split('-'), folder))
    return runs


def collect(out):
    """bench/agents.json, in which the runs that `out` holds take the place of the same ones of before ->
    {game: {'KIND-SEED': curves and times, 'solvers': success rates}}."""
    path = os.path.join(ROOT, 'bench', 'agents.json')
    with open(path, encoding='utf-8') as file:
        results = json.load(file)
    runs = runs_in(out)
    for game, kind, seed, folder in runs:
        with open(os.path.join(folder, 'bench.json'), encoding='utf-8') as file:
            results.setdefault(game, {})[f'{kind}-{seed}'] = {**validations(folder), **json.load(file)}
    for game in {game for game, *_ in runs} & {'plan_path', 'sokoban', 'sudoku'}:
        results[game]['solvers'] = solvers(game)
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(results, file, indent=1)
    return results


def print_table(results):
    """What every run had at its first and at its last validation."""
    print(f'{"run":28} {"sampled":>16} {"greedy":>16} {"turns":>12} {"reward":>14} '
          f'{"seconds":>8} {"CPU s":>6}')
    for game in TITLES:
        for run, row in sorted(results.get(game, {}).items()):
            if run == 'solvers':
                print(game, ', '.join(f'{name} {rate:.1%}' for name, rate in row.items()))
                continue
            changes = ''
            for metric, form, width in zip(METRICS, ('.1%', '.1%', '.1f', '.2f'), (16, 16, 12, 14)):
                first, last = row[metric][0], row[metric][-1]
                changes += f'{f"{first:{form}} -> {last:{form}}":>{width}} '
            seconds, used = row['seconds'] or '', row['processor_seconds'] or ''
            print(f'{f"{game} {run}":28} {changes}{seconds:>8} {used:>6}')


def draw(results):
    """bench/agents.png: a panel a game, a curve a run."""
    from matplotlib.ticker import MaxNLocator
    from nanoforge.plots import new_figure, plain_style
    games = [game for game in TITLES if game in results]
    figure = new_figure(3.6 * len(games), 3.8, dpi=120)
    panels = figure.subplots(1, len(games), squeeze=False)[0]
    for panel, game in zip(panels, games):
        labelled = set()
        for run, row in sorted(results[game].items()):
            if run == 'solvers':
                continue
            label, colour = KINDS[run.rsplit('-', 1)[0]]
            panel.plot(row['step'], row['success_rate'], color=colour, linewidth=1.8, marker='o',
                       markersize=3, label='_' if label in labelled else label)     # _: not in the legend
            labelled.add(label)
        panel.set_title(TITLES[game], loc='left')
        panel.set_xlabel('iteration')
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(0, 1)
        plain_style(panel)
        panel.legend(frameon=False, loc='lower right')
    panels[0].set_ylabel('success on held-out problems, sampled')
    figure.savefig(os.path.join(ROOT, 'bench', 'agents.png'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('games', nargs='*', metavar='game', choices=[*ACTS, []], help=', '.join(ACTS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--baselines', action='store_true', help='with the first of the seeds')
    parser.add_argument('--out', default='out-agents')
    parser.add_argument('--draw', action='store_true', help='train nothing')
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    args, words = parser.parse_args(argv[:split]), argv[split + 1:]
    if not args.draw:
        for game in args.games or ACTS:
            for seed in args.seeds:
                train(game, 'at_grpo', seed, words, args.out)
            if args.baselines:
                train(game, 'no_tree', args.seeds[0], words, args.out)
                train(game, 'single', args.seeds[0], words, args.out)
    results = collect(args.out)
    print_table(results)
    draw(results)


if __name__ == '__main__':
    main()
