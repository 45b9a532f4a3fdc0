"""GRPO, GSPO and PPO on the embedded sums, three seeds each: curves, and accuracy on held-out problems.

    python bench/rl_demo.py [--algorithms grpo gspo ppo] [--seeds 0 1 2] [--out DIR]    trains what DIR lacks
    python bench/rl_demo.py --draw [--out DIR]                  bench/rl_demo.png and .json from what is there

Every run is `python train_rl.py` with its defaults, but for the algorithm, the seed and evaluations every 10
steps. The start is the embedded model, a careless pupil who drops carries. Curves are of the 200 held-out
problems on which runs are watched; the table is of 500 others, the weights of the last step (none is chosen
by what is reported). No pair of operands and no wording of a held-out problem occurs in training. Beside it:
the commonest training answer, and the answer of the training problem with the most words in common. Times are
of training without evaluations, from the log's tokens and tokens per second.
"""
import argparse
import collections
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
FLAGS = {
    'grpo': [],
    'gspo': ['training.algorithm=gspo'],
    'ppo': ['training.algorithm=ppo', 'model.value_model_name=tiny'],
}
COLOURS = {'grpo': '#3b6fb6', 'gspo': '#d9622b', 'ppo': '#4a9b6e'}
TEST, TEST_SEED = 500, 1        # the runs watch seed 0


def train(algorithm, seed, out):
    """Runs train_rl.py unless it has ended there already."""
    folder = os.path.join(out, f'{algorithm}-{seed}')
    result = os.path.join(folder, 'test.json')
    if os.path.exists(result):
        return
    words = [f'training.seed={seed}', f'training.output_dir={folder}', 'training.eval_steps=10',
             '--no-tensorboard', '--rollout_steps=10']
    subprocess.run([sys.executable, os.path.join(ROOT, 'train_rl.py'), *FLAGS[algorithm], *words], check=True)
    with open(result, 'w', encoding='utf-8') as file:
        json.dump(test(os.path.join(folder, 'last')), file)


def test(model_path, count=TEST):
    """{'greedy', 'sampled'}: accuracy on held-out problems."""
    from data.chat import prompt_ids
    from data.tasks import arithmetic
    from model import load_model
    from sample import generate
    model, tokenizer = load_model(model_path)
    problems = arithmetic.problems('eval', count, TEST_SEED)
    prompts = [prompt_ids(tokenizer, arithmetic.prompt(problem)) for problem in problems]
    accuracy = {}
    for name, temperature in (('greedy', 0.0), ('sampled', 1.0)):
        samples = generate(model, prompts, 48, temperature, stop_ids=tokenizer.stop_ids, seed=2)
        texts = [tokenizer.decode(tokens[:length].tolist())
                 for tokens, length in zip(samples.tokens, samples.lengths)]
        accuracy[name] = statistics.mean(map(arithmetic.reward, problems, texts))
    return accuracy


def baselines():
    """{name: accuracy} of solvers that do not add."""
    from data.tasks import arithmetic
    known = arithmetic.problems('train', 5000, 0)
    asked = arithmetic.problems('eval', TEST, TEST_SEED)
    commonest = collections.Counter(problem['answer'] for problem in known).most_common(1)[0][0]
    known_words = [set(problem['question'].split()) for problem in known]
    hits = {'commonest answer': [], 'nearest question': []}
    for problem in asked:
        words = set(problem['question'].split())
        common = [len(others & words) for others in known_words]
        nearest = known[common.index(max(common))]
        hits['commonest answer'].append(problem['answer'] == commonest)
        hits['nearest question'].append(problem['answer'] == nearest['answer'])
    return {name: statistics.mean(of_solver) for name, of_solver in hits.items()}


def curve(folder):
    """([steps], [seconds of training], [greedy], [sampled]) at each evaluation."""
    seconds, tokens, points = 0.0, 0, []
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as file:
        for line in map(json.loads, file):
            if 'tokens_per_second' in line:
                seconds += (line['num_tokens'] - tokens) / line['tokens_per_second']
                tokens = line['num_tokens']
            if 'eval_accuracy' in line:
                points.append((line['step'], seconds, line['eval_accuracy'], line['eval_accuracy_sampled']))
    return list(zip(*points))


def draw(out):
    """bench/rl_demo.png, and bench/rl_demo.json, which is also printed."""
    from nanoforge.plots import new_figure, plain_style
    figure = new_figure(10, 4.2, dpi=120)
    panels = figure.subplots(1, 2, sharey=True)
    runs = {}
    for name in sorted(os.listdir(out)):
        folder, algorithm = os.path.join(out, name), name.split('-')[0]
        result = os.path.join(folder, 'test.json')
        if algorithm not in FLAGS or not os.path.exists(result):
            continue
        steps, seconds, greedy, sampled = curve(folder)
        good = [step for step, accuracy in zip(steps, greedy) if accuracy >= 0.9]
        first = not any(other.startswith(algorithm) for other in runs)
        for panel, accuracy in zip(panels, (greedy, sampled)):
            panel.plot(steps, accuracy, color=COLOURS[algorithm], linewidth=1.8,
                       label=algorithm if first else '_')       # _: not in the legend
        with open(result, encoding='utf-8') as file:
            runs[name] = {**json.load(file), 'seconds': round(seconds[-1]),
                          'steps_to_90': min(good, default=None)}

    for panel, title, goal in zip(panels, ('greedy', 'sampled at temperature 1'), (0.9, 0.85)):
        panel.axhline(goal, color='#bbbbbb', linewidth=1, linestyle='--')
        panel.set_title(title, loc='left')
        panel.set_xlabel('optimizer step')
        panel.set_ylim(0, 1)
        plain_style(panel)
    panels[0].set_ylabel('accuracy on 200 held-out sums')
    panels[0].legend(frameon=False, loc='lower right')
    figure.savefig(os.path.join(ROOT, 'bench', 'rl_demo.png'))
    result = {'start': test('tiny'), **baselines(), 'runs': runs}
    with open(os.path.join(ROOT, 'bench', 'rl_demo.json'), 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--algorithms', nargs='+', default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[1337, 1, 2])
    parser.add_argument('--out', default='out-rl-demo')
    parser.add_argument('--draw', action='store_true')
    args = parser.parse_args()
    if not args.draw:
        for seed in args.seeds:
            for algorithm in args.algorithms:
                train(algorithm, seed, args.out)
    draw(args.out)


if __name__ == '__main__':
    main()
