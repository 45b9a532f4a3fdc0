"""GRPO, GSPO and PPO on the embedded sums, three seeds each: curves, and accuracy on held-out problems.

    python bench/rl_demo.py [--algorithms grpo gspo ppo] [--seeds 0 1 2] [--out DIR]      trains what DIR does not hold yet
    python bench/rl_demo.py --draw [--out DIR]                                            bench/rl_demo.png and .json from what is there

Every run is `python train_rl.py` with its defaults, but for the algorithm, the seed and evaluations every 10 steps. The start is the
embedded model, a careless pupil who drops carries. Curves are of the 200 held-out problems on which runs are watched; the table is of
500 others, the weights of the last step (none is chosen by what is reported). No pair of operands and no wording of a held-out problem
occurs in training. Beside it: the commonest training answer, and the answer of the training problem with the most words in common.
Times are of training without evaluations, from the log's tokens and tokens per second.
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
FLAGS = {'grpo': [], 'gspo': ['training.algorithm=gspo'], 'ppo': ['training.algorithm=ppo', 'model.value_model_name=tiny']}
TEST, TEST_SEED = 500, 1        # the runs watch seed 0


def train(algorithm, seed, out):
    """Runs train_rl.py unless it has ended there already."""
    folder = os.path.join(out, f'{algorithm}-{seed}')
    done = os.path.join(folder, 'test.json')
    if not os.path.exists(done):
        subprocess.run([sys.executable, os.path.join(ROOT, 'train_rl.py'), *FLAGS[algorithm], f'training.seed={seed}', 'training.eval_steps=10',
                        f'training.output_dir={folder}', '--no-tensorboard', '--rollout_steps=10'], check=True)
        with open(done, 'w') as file:
            json.dump(test(os.path.join(folder, 'last')), file)
    return folder


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
        texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(samples.tokens, samples.lengths)]
        accuracy[name] = statistics.mean(arithmetic.reward(problem, text) for problem, text in zip(problems, texts))
    return accuracy


def trivial():
    """Accuracy of solvers that do not add."""
    from data.tasks import arithmetic
    known, asked = arithmetic.problems('train', 5000, 0), arithmetic.problems('eval', TEST, TEST_SEED)
    commonest = collections.Counter(problem['answer'] for problem in known).most_common(1)[0][0]
    words = [(set(problem['question'].split()), problem['answer']) for problem in known]
    nearest = [max(words, key=lambda entry: len(entry[0] & set(problem['question'].split())))[1] for problem in asked]
    return {'commonest answer': statistics.mean(problem['answer'] == commonest for problem in asked),
            'nearest question': statistics.mean(problem['answer'] == answer for problem, answer in zip(asked, nearest))}


def curve(folder):
    """([steps], [seconds of training], [greedy], [sampled]) at each evaluation."""
    seconds, tokens, points = 0.0, 0, []
    with open(os.path.join(folder, 'log.jsonl')) as file:
        for line in map(json.loads, file):
            if 'tokens_per_second' in line:
                seconds += (line['num_tokens'] - tokens) / line['tokens_per_second']
                tokens = line['num_tokens']
            if 'eval_accuracy' in line:
                points.append((line['step'], seconds, line['eval_accuracy'], line['eval_accuracy_sampled']))
    return list(zip(*points))


def draw(out):
    from matplotlib.figure import Figure
    colours = {'grpo': '#3b6fb6', 'gspo': '#d9622b', 'ppo': '#4a9b6e'}
    figure = Figure(figsize=(10, 4.2), dpi=120, layout='constrained')
    result, panels = {'start': test('tiny'), **trivial(), 'runs': {}}, figure.subplots(1, 2, sharey=True)
    for name in sorted(os.listdir(out)):
        folder, algorithm = os.path.join(out, name), name.split('-')[0]
        if algorithm not in colours or not os.path.exists(os.path.join(folder, 'test.json')):
            continue
        steps, seconds, *columns = curve(folder)
        with open(os.path.join(folder, 'test.json')) as file:
            result['runs'][name] = {**json.load(file), 'seconds': round(seconds[-1]),
                                    'steps_to_90': next((step for step, greedy in zip(steps, columns[0]) if greedy >= 0.9), None)}
        for panel, values in zip(panels, columns):
            first = algorithm not in [line.get_label() for line in panel.lines]
            panel.plot(steps, values, color=colours[algorithm], linewidth=1.8, label=algorithm if first else '_')
    for panel, title, goal in zip(panels, ('greedy', 'sampled at temperature 1'), (0.9, 0.85)):
        panel.axhline(goal, color='#bbbbbb', linewidth=1, linestyle='--')
        panel.set_title(title, loc='left')
        panel.set_xlabel('optimizer step')
        panel.set_ylim(0, 1)
        panel.spines[['top', 'right']].set_visible(False)
        panel.grid(axis='y', color='#e6e6e6')
    panels[0].set_ylabel('accuracy on 200 held-out sums')
    panels[0].legend(frameon=False, loc='lower right')
    figure.savefig(os.path.join(ROOT, 'bench', 'rl_demo.png'))
    with open(os.path.join(ROOT, 'bench', 'rl_demo.json'), 'w') as file:
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
