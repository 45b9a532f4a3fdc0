"""What teams learn, on held-out problems, before and after; with baselines of the same budget and solvers that know nothing.

    python bench/agents.py plan_path sokoban sudoku --baselines      # the recipes, three seeds; the baselines once
    python bench/agents.py math --seeds 1 -- training.total_training_steps=40
    python bench/agents.py --draw                                    # bench/agents.json and .png anew, with what --out holds

--baselines also trains MAS+GRPO (rollout_mode=no_tree) and a single agent with twice the candidates, so that every run samples as
much. What stands behind -- goes to every run. A run that --out holds already is not repeated; others that bench/agents.json has stay in
it and in the picture. The figures are of the last iteration: none is chosen by what is reported. Seconds are of the whole command:
start, warm-up, training, validations; null where a run was stopped on the way.
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
ACTS = {'plan_path': 'plan_agent', 'sokoban': 'plan_agent', 'sudoku': 'plan_agent', 'math': 'reasoner', 'code': 'coder'}
TITLES = {'plan_path': 'Plan-Path 4x4', 'sokoban': 'Sokoban 6x6', 'sudoku': 'Sudoku 4x4', 'math': 'mathematics', 'code': 'programming'}
KINDS = {'at_grpo': ('AT-GRPO', '#3b6fb6'), 'no_tree': ('MAS+GRPO', '#d9622b'), 'single': ('single agent', '#4c9a52')}


def words_of(kind, game):
    """The settings that make a run of this kind."""
    return {'at_grpo': [], 'no_tree': ['rollout_mode=no_tree'],
            'single': [f'turn_order={ACTS[game]}', 'training.train_sample_num=16']}[kind]


def recipe(game):
    return os.path.join(ROOT, f'recipes/training/agents/{game}.yaml')


def train(game, kind, seed, words, out):
    """Runs the recipe in out/GAME-KIND-SEED, unless it has ended there already."""
    folder = os.path.join(out, f'{game}-{kind}-{seed}')
    if os.path.exists(os.path.join(folder, 'bench.json')):
        return folder
    os.makedirs(folder, exist_ok=True)
    started, used = time.perf_counter(), processor_seconds()
    subprocess.run([sys.executable, os.path.join(ROOT, 'train_agents.py'), recipe(game), 'training.experiment_name=run', f'seed={seed}',
                    '--no-tensorboard', *words_of(kind, game), *words], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    with open(os.path.join(folder, 'bench.json'), 'w', encoding='utf-8') as file:
        json.dump({'seconds': round(time.perf_counter() - started), 'processor_seconds': round(processor_seconds() - used), 'words': words}, file)
    return folder


def processor_seconds():
    """Of the runs so far: what counts where others use the machine, too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def validations(folder):
    """{metric: [value of every validation]}"""
    with open(os.path.join(folder, 'logs', 'run', 'latest', 'log.jsonl'), encoding='utf-8') as file:
        rows = [line for line in map(json.loads, file) if 'validation/success_rate' in line]
    return {key.removeprefix('validation/'): [row[key] for row in rows] for key in
            ('step', 'validation/success_rate', 'validation/greedy_success_rate', 'validation/episode_length', 'validation/reward')}


def solvers(game):
    """{name: success rate} of ways to play that know nothing of the game, on the held-out problems of the recipe."""
    from configurator import parse
    from train_agents import Config, env_settings, task_of
    cfg = parse(Config, [recipe(game)])
    task = task_of(cfg)
    draw = random.Random(0)
    problems = task.problems('eval', cfg.validate_episodes, 'validation', **env_settings(cfg, task, cfg.benchmark))

    def rows_at_random(env):
        lines = []
        for line in env.grid:
            missing = draw.sample(sorted({1, 2, 3, 4} - set(line)), line.count(0))
            lines.append(''.join(str(number or missing.pop()) for number in line))
        return ' '.join(lines)

    def straight(env):
        return ' '.join(task.straight(env.at if game == 'plan_path' else env.player, env.goal)) or 'U'

    answers = {'rows filled at random': rows_at_random, 'one fixed grid': lambda env: '1234 3412 2143 4321'} if game == 'sudoku' else {
        'random moves': lambda env: ' '.join(draw.choices('UDLR', k=8)), 'straight to the goal': straight}
    found = {}
    for name, answer in answers.items():
        solved = 0
        for problem in problems:
            env = task.Env(problem)
            while env.turn < cfg.max_turns and not env.done:
                env.step(task.ACTS, env.score(task.ACTS, answer(env)))
            solved += env.success
        found[name] = solved / len(problems)
    return found


def runs_in(out):
    """[(game, kind, seed, folder)] of the runs that have ended."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    found = [(*name.rsplit('-', 2), os.path.join(out, name)) for name in names if name.count('-') == 2]
    return [run for run in found if os.path.exists(os.path.join(run[3], 'bench.json'))]


def draw(out):
    """The table, and bench/agents.png and .json: the runs that `out` holds, in place of the same ones of before."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    path = os.path.join(ROOT, 'bench', 'agents')
    with open(path + '.json', encoding='utf-8') as file:
        result = json.load(file)
    runs = runs_in(out)
    for game, kind, seed, folder in runs:
        with open(os.path.join(folder, 'bench.json'), encoding='utf-8') as file:
            result.setdefault(game, {})[f'{kind}-{seed}'] = {**validations(folder), **json.load(file)}
    for game in {game for game, *_ in runs} & {'plan_path', 'sokoban', 'sudoku'}:
        result[game]['solvers'] = solvers(game)
    print(f'{"run":28} {"sampled":>16} {"greedy":>16} {"turns":>12} {"reward":>14} {"seconds":>8} {"CPU s":>6}')
    games = [game for game in TITLES if game in result]
    figure = Figure(figsize=(3.6 * len(games), 3.8), dpi=120, layout='constrained')
    for panel, game in zip(figure.subplots(1, len(games), squeeze=False)[0], games):
        for run, row in sorted(result[game].items()):
            if run == 'solvers':
                print(game, ', '.join(f'{name} {rate:.1%}' for name, rate in row.items()))
                continue
            change = lambda key, form: f'{row[key][0]:{form}} -> {row[key][-1]:{form}}'
            print(f'{f"{game} {run}":28} {change("success_rate", ".1%"):>16} {change("greedy_success_rate", ".1%"):>16} '
                  f'{change("episode_length", ".1f"):>12} {change("reward", ".2f"):>14} {row["seconds"] or "":>8} {row["processor_seconds"] or "":>6}')
            label, color = KINDS[run.rsplit('-', 1)[0]]
            panel.plot(row['step'], row['success_rate'], color=color, linewidth=1.8, marker='o', markersize=3,
                       label=label if label not in [line.get_label() for line in panel.lines] else '_')
        panel.set_title(TITLES[game], loc='left')
        panel.set_xlabel('iteration')
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(0, 1)
        panel.spines[['top', 'right']].set_visible(False)
        panel.grid(axis='y', color='#e6e6e6')
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel('success on held-out problems, sampled')
        panel.legend(frameon=False, loc='lower right')
    figure.savefig(path + '.png')
    with open(path + '.json', 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('games', nargs='*', metavar='game', choices=[*ACTS, []], help=', '.join(ACTS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--baselines', action='store_true', help='with the first of the seeds')
    parser.add_argument('--out', default='out-agents')
    parser.add_argument('--draw', action='store_true', help='train nothing')
    own, words = (sys.argv[1:], []) if '--' not in sys.argv else (sys.argv[1:sys.argv.index('--')], sys.argv[sys.argv.index('--') + 1:])
    args = parser.parse_args(own)
    for game in [] if args.draw else args.games or list(ACTS):
        for seed in args.seeds:
            train(game, 'at_grpo', seed, words, args.out)
        for kind in ('no_tree', 'single') if args.baselines else ():
            train(game, kind, args.seeds[0], words, args.out)
    draw(args.out)


if __name__ == '__main__':
    main()
