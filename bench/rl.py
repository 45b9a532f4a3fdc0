"""A whole GRPO step against TRL's GRPOTrainer, in pairs on the same weights; and the time to a held-out accuracy on the embedded sums.

    python bench/rl.py --trl PYTHON [--pairs 5]           seconds a step
    python bench/rl.py --trl PYTHON --until 0.8           seconds of training until that greedy accuracy

PYTHON is an interpreter that has TRL. A Llama of 3M parameters (4 layers, 256 channels, vocabulary 1,024), 8 prompts of 16 tokens x 8
samples x 64 tokens with no stop token, beta 0.04, one update, AdamW, float32: sampling, reward, reference, update. Each side runs in a
process of its own, in turn, the first of them alternating; a side's time is the median of its steps after two, a pair's ratio theirs
over ours; floor: what the matrix products of our step take alone, attention not counted. --matmul=bf16 is ours with bf16 products on a
processor that has them. --until: the embedded model and sums, 64 completions a step in groups of 8, the same rate, another seed in
every pair; evaluations are not counted. The last line is JSON.
"""
import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time

from shared import ROOT, child, llama, product_seconds

PROMPTS, SAMPLES, NEW, PROMPT, VOCABULARY, BETA, RATE = 8, 8, 64, 16, 1024, 0.04, 1e-4
TASK = dict(completions=64, samples=8, longest=32, rate=1e-4, steps=200, every=5, held_out=500)


def make_model(directory, end):
    """A random Llama and a tokenizer whose words are w0 to w1023. TRL needs a token that ends a text: `end` adds one, which the model
    does not have, so that nothing ends before its time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    llama(vocab_size=VOCABULARY, initializer_range=0.1).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({f'w{i}': i for i in range(VOCABULARY)} | ({'</s>': VOCABULARY} if end else {}), unk_token='w0'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {'eos_token': '</s>'} if end else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='w0', unk_token='w0', **special).save_pretrained(directory)


def prompts(count):
    rng = random.Random(0)
    return [[rng.randrange(1, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


def reward(completions, **columns):
    """How often w1 to w99 are said: cheap, and different within every group."""
    return [sum(len(word) < 4 for word in text.split()) / NEW for text in completions]


class Reached(Exception):
    """The accuracy that a run was to come to."""


class Stopwatch:
    """Seconds of every rollout of train_rl.main(cfg) with its updates, without evaluations; it stops at `accuracy`."""

    def __init__(self, clock, accuracy=2.0):
        import train_rl
        self.clock, self.accuracy, self.seconds, self.began, self.curve = clock, accuracy, [], None, []
        self.rollout, self.evaluate = train_rl.generate_rollout, train_rl.evaluate
        train_rl.generate_rollout, train_rl.evaluate, train_rl.show = self.timed_rollout, self.untimed_evaluation, lambda *arguments: None

    def lap(self):
        now = self.clock()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = now

    def timed_rollout(self, *arguments):
        self.lap()
        return self.rollout(*arguments)

    def untimed_evaluation(self, *arguments):
        self.lap()
        self.began = None
        metrics = self.evaluate(*arguments)
        if self.seconds:            # not that of the start
            self.curve.append((len(self.seconds), round(sum(self.seconds), 2), metrics.get('eval_accuracy', 0.0)))
            if self.curve[-1][2] >= self.accuracy:
                raise Reached
        return metrics


def run_ours(cfg, clock, accuracy=2.0):
    """A Stopwatch of train_rl.main(cfg); its lines go to stderr, the result alone to stdout."""
    import contextlib
    import train_rl
    watch = Stopwatch(clock, accuracy)
    cfg.typed = frozenset({'max_completion_length', 'gradient_accumulation_steps', 'max_steps'})
    with tempfile.TemporaryDirectory() as cfg.output_dir, contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Reached):
        train_rl.main(cfg)
    return watch


def ours(directory, steps, matmul, clock):
    """Seconds of each step of train_rl.py, on problems without a chat template and rewarded as TRL's are."""
    import train_rl
    from data.problems import Problems

    class Scorer:
        names, last_error = ['reward'], ''

        def __call__(self, texts, records, lengths, columns):
            return [{'reward': value} for value in reward(texts)]

        def total(self, scores):
            return scores['reward']

        def close(self):
            pass

    problems = Problems(None, [{'prompt_ids': ids} for ids in prompts(PROMPTS * steps)], [])
    train_rl.open_problems, train_rl.open_scorer = lambda *arguments: problems, lambda cfg: Scorer()
    cfg = train_rl.Config(base_model_name=directory, per_device_train_batch_size=PROMPTS * SAMPLES, gradient_accumulation_steps=1,
                          steps_per_generation=1, num_generations=SAMPLES, max_completion_length=NEW, beta=BETA, kl='k3', learning_rate=RATE,
                          dynamic_sampling=False, max_steps=steps, eval_steps=0, save_steps=10 ** 9, logging_steps=steps, rollout_steps=0,
                          lr_scheduler_type='constant', warmup_steps=0, device='cpu', matmul=matmul, tensorboard=False)
    return run_ours(cfg, clock).seconds


def trl_trainer(directory, dataset, rewards, output, steps, completions, samples, longest, rate, beta, callbacks=(), seed=0):
    from trl import GRPOConfig, GRPOTrainer
    settings = GRPOConfig(output_dir=output, per_device_train_batch_size=completions, gradient_accumulation_steps=1, num_generations=samples,
                          max_completion_length=longest, beta=beta, learning_rate=rate, max_steps=steps, use_cpu=True, bf16=False, fp16=False,
                          report_to='none', save_strategy='no', logging_strategy='no', gradient_checkpointing=False, disable_tqdm=True,
                          lr_scheduler_type='constant', warmup_steps=0, loss_type='grpo', temperature=1.0, top_k=0, top_p=1.0,
                          model_init_kwargs={'dtype': 'float32'}, seed=seed)
    return GRPOTrainer(model=directory, reward_funcs=rewards, args=settings, train_dataset=dataset, callbacks=list(callbacks))


def theirs(directory, steps, clock):
    """Seconds of each step of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    times = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.began = clock()

        def on_step_end(self, args, state, control, **more):
            times.append(clock() - self.began)

    dataset = Dataset.from_list([{'prompt': ' '.join(f'w{i}' for i in ids)} for ids in prompts(PROMPTS * steps)])
    with tempfile.TemporaryDirectory() as output:
        trl_trainer(directory, dataset, reward, output, steps, PROMPTS * SAMPLES, SAMPLES, NEW, RATE, BETA, [Watch()]).train()
    return times


# ---- time to an accuracy ----------------------------------------------------------------------------------------------------

def sums(split, count):
    from data.tasks import arithmetic
    return [(arithmetic.prompt(problem), problem) for problem in arithmetic.problems(split, count, 0)]


def ours_until(accuracy, seed, clock):
    """[(step, seconds, accuracy)] of train_rl.py, up to the first evaluation that is good enough."""
    from train_rl import Config
    cfg = Config(per_device_train_batch_size=TASK['completions'], gradient_accumulation_steps=1, steps_per_generation=1,
                 eval_problems=TASK['held_out'], num_generations=TASK['samples'], max_completion_length=TASK['longest'],
                 learning_rate=TASK['rate'], max_steps=TASK['steps'], eval_steps=TASK['every'], save_steps=10 ** 9, rollout_steps=0,
                 lr_scheduler_type='constant', warmup_steps=0, num_problems=TASK['steps'] * TASK['completions'] // TASK['samples'],
                 device='cpu', matmul='float32', tensorboard=False, seed=seed)
    return run_ours(cfg, clock, accuracy).curve


def theirs_until(accuracy, seed, clock):
    """The same of TRL's GRPOTrainer, from the same weights, with the same problems, reward, rate and evaluation."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from data.tasks import arithmetic
    held_out, spent, curve = sums('eval', TASK['held_out']), [0.0], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.began = clock()

        def on_step_end(self, args, state, control, model=None, processing_class=None, **more):
            spent[0] += clock() - self.began
            if state.global_step % TASK['every']:
                return
            model.eval()
            texts = [processing_class.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat, _ in held_out]
            batch = processing_class(texts, return_tensors='pt', padding=True, padding_side='left', add_special_tokens=False)
            with torch.no_grad():
                out = model.generate(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], max_new_tokens=TASK['longest'], do_sample=False)
            said = processing_class.batch_decode(out[:, batch['input_ids'].size(1):], skip_special_tokens=True)
            model.train()
            curve.append((state.global_step, round(spent[0], 2),
                          statistics.mean(arithmetic.reward(problem, text) for (_, problem), text in zip(held_out, said))))
            control.should_training_stop = curve[-1][2] >= accuracy

    def score(completions, answer, **columns):
        return [arithmetic.reward({'answer': a}, text[0]['content']) for text, a in zip(completions, answer)]

    dataset = Dataset.from_list([{'prompt': chat, 'answer': problem['answer']} for chat, problem in
                                 sums('train', TASK['steps'] * TASK['completions'] // TASK['samples'])])
    with tempfile.TemporaryDirectory() as output:
        trl_trainer(os.path.join(ROOT, 'data', 'tiny'), dataset, score, output, TASK['steps'], TASK['completions'], TASK['samples'],
                    TASK['longest'], TASK['rate'], 0.0, [Watch()], seed=seed).train()
    return curve


def floor(matmul):
    """Seconds that the products of a step of ours take alone: sampling, the reference, forward and backward of the policy."""
    prompt, sampled = PROMPTS * PROMPT, PROMPTS * SAMPLES * NEW
    return product_seconds([(1, prompt + sampled, sampled), (4, prompt + sampled, sampled)], matmul)


# ---- pairs ------------------------------------------------------------------------------------------------------------------

def compare_until(args):
    """Pairs of runs until an accuracy, each with its own seed."""
    found = {'ours': [], 'theirs': []}
    for pair in range(args.pairs):
        for side in ('ours', 'theirs') if pair % 2 else ('theirs', 'ours'):
            python = sys.executable if side == 'ours' else args.trl
            curve = child(__file__, f'--side={side}', f'--until={args.until}', f'--seed={args.seed + pair}', *['--cpu'] * args.cpu, python=python)
            found[side].append(curve)
            step, seconds, accuracy = curve[-1]
            print(f'pair {pair + 1}: {side:7} {seconds:6.1f} s of training, {step} steps, accuracy {accuracy:.1%}', flush=True)
    medians = {f'{side}_{what}': statistics.median(curve[-1][i] for curve in curves)
               for side, curves in found.items() for i, what in enumerate(('steps', 'seconds'))}
    print(json.dumps({'until': args.until, **medians, **found}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--trl', default=sys.executable, help='an interpreter that has TRL')
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--steps', type=int, default=6, help='of each side in a pair, the first two not counted')
    parser.add_argument('--matmul', default='float32')
    parser.add_argument('--cpu', action='store_true', help='CPU seconds of the process, on a machine that does other things too')
    parser.add_argument('--until', type=float, help='measure the time to this held-out accuracy instead')
    parser.add_argument('--seed', type=int, default=0, help='of the first pair with --until')
    parser.add_argument('--side', choices=('ours', 'theirs'))
    parser.add_argument('--model')
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    if args.side:
        result = {('ours', True): lambda: ours_until(args.until, args.seed, clock), ('theirs', True): lambda: theirs_until(args.until, args.seed, clock),
                  ('ours', False): lambda: ours(args.model, args.steps, args.matmul, clock),
                  ('theirs', False): lambda: theirs(args.model, args.steps, clock)}[args.side, args.until is not None]()
        return print(json.dumps(result))
    if args.until is not None:
        return compare_until(args)
    ratios, medians = [], {'ours': [], 'theirs': []}
    with tempfile.TemporaryDirectory() as directory:
        for side in medians:
            make_model(os.path.join(directory, side), end=side == 'theirs')
        for pair in range(args.pairs):
            for side in ('ours', 'theirs') if pair % 2 else ('theirs', 'ours'):
                python = sys.executable if side == 'ours' else args.trl
                times = child(__file__, f'--side={side}', f'--model={os.path.join(directory, side)}', f'--steps={args.steps}',
                              f'--matmul={args.matmul}', *['--cpu'] * args.cpu, python=python)
                medians[side].append(statistics.median(times[2:]))
            ratios.append(medians['theirs'][-1] / medians['ours'][-1])
            print(f'pair {pair + 1}: ours {medians["ours"][-1]:.2f} s a step, TRL {medians["theirs"][-1]:.2f} s, {ratios[-1]:.2f} times', flush=True)
    print(json.dumps({'ours_seconds': statistics.median(medians['ours']), 'trl_seconds': statistics.median(medians['theirs']),
                      'ratio': statistics.median(ratios), 'ratios': ratios, 'matmul': args.matmul, 'floor_seconds': floor(args.matmul)}))


if __name__ == '__main__':
    main()
