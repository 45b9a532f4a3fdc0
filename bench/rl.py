"""A whole GRPO step against TRL's GRPOTrainer, in pairs on the same weights; and the time to a held-out
accuracy on the embedded sums.

    python bench/rl.py --trl PYTHON [--pairs 5]           seconds a step
    python bench/rl.py --trl PYTHON --until 0.8           seconds of training until that greedy accuracy

PYTHON is an interpreter that has TRL. A Llama of 3M parameters (4 layers, 256 channels, vocabulary 1,024),
8 prompts of 16 tokens x 8 samples x 64 tokens with no stop token, beta 0.04, one update, AdamW, float32:
sampling, reward, reference, update. Each side runs in a process of its own, in turn, the first of them
alternating; a side's time is the median of its steps after two, a pair's ratio theirs over ours; floor: what
the matrix products of our step take alone, attention not counted. --matmul=bf16 is ours with bf16 products on
a processor that has them. --until: the embedded model and sums, 64 completions a step in groups of 8, the
same rate, another seed in every pair; evaluations are not counted. The last line is JSON.
"""
import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time

from shared import ROOT, child, llama, product_seconds, trl_trainer

PROMPTS, PROMPT_TOKENS, VOCABULARY = 8, 16, 1024
# completions a step, samples a prompt, tokens a completion: of the timed steps, and until an accuracy
STEP = dict(completions=64, samples=8, longest=64, rate=1e-4, beta=0.04)
TASK = dict(completions=64, samples=8, longest=32, rate=1e-4, beta=0.0)
TASK_STEPS, EVERY, HELD_OUT = 200, 5, 500       # at most; between evaluations; sums of an evaluation
TASK_PROBLEMS = TASK_STEPS * TASK['completions'] // TASK['samples']


# ---- seconds a step: the model, the prompts, the reward ------------------------------------------------

def make_model(directory, end):
    """A random Llama and a tokenizer whose words are w0 to w1023. TRL needs a token that ends a text: `end`
    adds one, which the model does not have, so that nothing ends before its time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    llama(vocab_size=VOCABULARY, initializer_range=0.1).save_pretrained(directory)
    words = {f'w{i}': i for i in range(VOCABULARY)}
    special = {'pad_token': 'w0', 'unk_token': 'w0'}
    if end:
        words['</s>'] = VOCABULARY
        special['eos_token'] = '</s>'
    backend = Tokenizer(models.WordLevel(words, unk_token='w0'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)


def prompts(count):
    """[the token ids of a prompt]"""
    draw = random.Random(0)
    return [[draw.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def reward(completions, **columns):
    """How often w1 to w99 are said: cheap, and different within every group."""
    return [sum(len(word) < 4 for word in text.split()) / STEP['longest'] for text in completions]


class Scorer:
    """reward() as train_rl.py asks for it."""
    names = ['reward']
    last_error, environment = '', None

    def __call__(self, texts, records, lengths, columns):
        return [{'reward': value} for value in reward(texts)]

    def total(self, scores):
        return scores['reward']

    def close(self):
        pass


# ---- our side ------------------------------------------------------------------------------------------

class Reached(Exception):
    """The accuracy that a run was to come to."""


class Stopwatch:
    """Seconds of every rollout of train_rl.main(cfg) with its updates, without evaluations; it stops at
    `accuracy`."""

    def __init__(self, clock, accuracy=2.0):
        import train_rl
        self.clock, self.accuracy = clock, accuracy
        self.seconds, self.began = [], None
        self.curve = []             # (step, seconds so far, accuracy) of every evaluation
        self.rollout, self.evaluate = train_rl.generate_rollout, train_rl.evaluate
        train_rl.generate_rollout, train_rl.evaluate = self.timed_rollout, self.untimed_evaluation
        train_rl.show = self.show_nothing

    def show_nothing(self, *arguments):
        pass

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
        metrics, text = self.evaluate(*arguments)
        if self.seconds:            # not that of the start
            accuracy = metrics.get('eval_accuracy', 0.0)
            self.curve.append((len(self.seconds), round(sum(self.seconds), 2), accuracy))
            if accuracy >= self.accuracy:
                raise Reached
        return metrics, text


def our_config(task, steps, **more):
    """Of train_rl.py: one update a rollout, a constant rate, nothing written on the way."""
    from train_rl import Config
    cfg = Config(
        per_device_train_batch_size=task['completions'],
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=task['samples'],
        max_completion_length=task['longest'],
        learning_rate=task['rate'],
        lr_scheduler_type='constant',
        warmup_steps=0,
        max_steps=steps,
        save_steps=10 ** 9,
        rollout_steps=0,
        device='cpu',
        tensorboard=False,
        **more)
    cfg.typed = frozenset({'max_completion_length', 'gradient_accumulation_steps', 'max_steps'})
    return cfg


def run_ours(cfg, watch):
    """train_rl.main(cfg) under a Stopwatch; its lines go to stderr, the result alone to stdout."""
    import train_rl
    with (tempfile.TemporaryDirectory() as cfg.output_dir,
          contextlib.redirect_stdout(sys.stderr),
          contextlib.suppress(Reached)):
        train_rl.main(cfg)


def ours(args, clock, task=STEP, prompt_ids=None):
    """Seconds of each step of train_rl.py, on prompts without a chat template and rewarded as TRL's are; no
    completion ends before its time."""
    import train_rl
    from data.problems import Problems
    train = [{'prompt_ids': ids} for ids in prompt_ids or prompts(PROMPTS * args.steps)]

    def open_problems(cfg, tokenizer, print0, environment):
        tokenizer.stop_ids = frozenset()
        return Problems(None, train, [])

    def open_scorer(cfg):
        return Scorer()

    train_rl.open_problems, train_rl.open_scorer = open_problems, open_scorer
    cfg = our_config(task, args.steps, base_model_name=args.model, beta=task['beta'], kl='k3',
                     dynamic_sampling=False, eval_steps=0, logging_steps=args.steps, matmul=args.matmul)
    watch = Stopwatch(clock)
    run_ours(cfg, watch)
    return watch.seconds


def ours_until(args, clock):
    """[(step, seconds, accuracy)] of train_rl.py, up to the first evaluation that is good enough."""
    cfg = our_config(TASK, TASK_STEPS, num_problems=TASK_PROBLEMS, eval_problems=HELD_OUT, eval_steps=EVERY,
                     matmul='float32', seed=args.seed)
    watch = Stopwatch(clock, args.until)
    run_ours(cfg, watch)
    return watch.curve


# ---- TRL's side ----------------------------------------------------------------------------------------

def train_theirs(model, rows, rewards, task, steps, watch, seed=0, bf16=False, **generation):
    """GRPOTrainer on the rows, under the callback `watch`; generation: settings of transformers' generate."""
    with tempfile.TemporaryDirectory() as output:
        settings = dict(
            output_dir=output,
            per_device_train_batch_size=task['completions'],
            gradient_accumulation_steps=1,
            num_generations=task['samples'],
            max_completion_length=task['longest'],
            learning_rate=task['rate'],
            beta=task['beta'],
            loss_type='grpo',
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_steps=steps,
            logging_strategy='no',
            generation_kwargs=generation,
            seed=seed)
        trainer = trl_trainer('GRPO', model, rows, settings, bf16, reward_funcs=rewards, callbacks=[watch])
        trainer.train()


def theirs(args, clock):
    """Seconds of each step of TRL's GRPOTrainer."""
    from transformers import TrainerCallback
    times = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.began = clock()

        def on_step_end(self, args, state, control, **more):
            times.append(clock() - self.began)

    rows = [{'prompt': ' '.join(f'w{i}' for i in ids)} for ids in prompts(PROMPTS * args.steps)]
    train_theirs(args.model, rows, reward, STEP, args.steps, Watch())
    return times


def sums(split, count):
    """[(chat, problem)] of the embedded sums."""
    from data.tasks import arithmetic
    return [(arithmetic.prompt(problem), problem) for problem in arithmetic.problems(split, count, 0)]


def greedy_accuracy(model, tokenizer, held_out):
    """Of transformers' model on sums; it is left in training mode."""
    import torch
    from data.tasks import arithmetic
    model.eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
             for chat, _ in held_out]
    batch = tokenizer(texts, return_tensors='pt', padding=True, padding_side='left',
                      add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                             max_new_tokens=TASK['longest'], do_sample=False)
    said = tokenizer.batch_decode(out[:, batch['input_ids'].size(1):], skip_special_tokens=True)
    model.train()
    return statistics.mean(arithmetic.reward(problem, text) for (_, problem), text in zip(held_out, said))


def theirs_until(args, clock):
    """The same of TRL's GRPOTrainer, from the same weights, with the same problems, reward, rate and
    evaluation."""
    from transformers import TrainerCallback
    from data.tasks import arithmetic
    held_out, until = sums('eval', HELD_OUT), args.until
    curve = []

    class Watch(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, args, state, control, **more):
            self.began = clock()

        def on_step_end(self, args, state, control, model=None, processing_class=None, **more):
            self.seconds += clock() - self.began
            if state.global_step % EVERY == 0:
                accuracy = greedy_accuracy(model, processing_class, held_out)
                curve.append((state.global_step, round(self.seconds, 2), accuracy))
                control.should_training_stop = accuracy >= until

    def score(completions, answer, **columns):
        return [arithmetic.reward({'answer': right}, reply[0]['content'])
                for reply, right in zip(completions, answer)]

    rows = [{'prompt': chat, 'answer': problem['answer']} for chat, problem in sums('train', TASK_PROBLEMS)]
    model = os.path.join(ROOT, 'data', 'tiny')
    train_theirs(model, rows, score, TASK, TASK_STEPS, Watch(), seed=args.seed)
    return curve


# ---- pairs ---------------------------------------------------------------------------------------------

def in_turn(pair):
    """The sides of a pair: who runs first alternates."""
    return ('ours', 'theirs') if pair % 2 else ('theirs', 'ours')


def measure(side, args, *flags):
    """What the side prints, in a process of its own."""
    python = sys.executable if side == 'ours' else args.trl
    cpu = ['--cpu'] if args.cpu else []
    return child(__file__, f'--side={side}', *flags, *cpu, python=python)


def run_side(args):
    clock = time.process_time if args.cpu else time.perf_counter
    if args.until is not None:
        return ours_until(args, clock) if args.side == 'ours' else theirs_until(args, clock)
    return ours(args, clock) if args.side == 'ours' else theirs(args, clock)


def floor(matmul):
    """Seconds that the products of a step of ours take alone: sampling, as one pass over what it draws; the
    reference; forward and backward of the policy."""
    sampled = STEP['completions'] * STEP['longest']
    every = PROMPTS * PROMPT_TOKENS + sampled
    return product_seconds([(1, 0, every, sampled), (2, 1, every, sampled)], matmul)


def compare_until(args):
    """Pairs of runs until an accuracy, each with its own seed."""
    found = {'ours': [], 'theirs': []}
    for pair in range(args.pairs):
        for side in in_turn(pair):
            curve = measure(side, args, f'--until={args.until}', f'--seed={args.seed + pair}')
            found[side].append(curve)
            steps, seconds, accuracy = curve[-1]
            print(f'pair {pair + 1}: {side:7} {seconds:6.1f} s of training, {steps} steps, '
                  f'accuracy {accuracy:.1%}', flush=True)
    medians = {}
    for side, curves in found.items():
        medians[f'{side}_steps'] = statistics.median(curve[-1][0] for curve in curves)
        medians[f'{side}_seconds'] = statistics.median(curve[-1][1] for curve in curves)
    print(json.dumps({'until': args.until, **medians, **found}))


def compare_steps(args):
    """Pairs of runs of some steps."""
    seconds = {'ours': [], 'theirs': []}
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        models = {side: os.path.join(directory, side) for side in seconds}
        for side, model in models.items():
            make_model(model, end=side == 'theirs')
        for pair in range(args.pairs):
            for side in in_turn(pair):
                times = measure(side, args, f'--model={models[side]}', f'--steps={args.steps}',
                                f'--matmul={args.matmul}')
                seconds[side].append(statistics.median(times[2:]))
            own, other = seconds['ours'][-1], seconds['theirs'][-1]
            ratios.append(other / own)
            print(f'pair {pair + 1}: ours {own:.2f} s a step, TRL {other:.2f} s, {ratios[-1]:.2f} times',
                  flush=True)
    print(json.dumps({'ours_seconds': statistics.median(seconds['ours']),
                      'trl_seconds': statistics.median(seconds['theirs']),
                      'ratio': statistics.median(ratios),
                      'ratios': ratios,
                      'matmul': args.matmul,
                      'floor_seconds': floor(args.matmul)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--trl', default=sys.executable, help='an interpreter that has TRL')
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--steps', type=int, default=6,
                        help='of each side in a pair, the first two not counted')
    parser.add_argument('--matmul', default='float32')
    parser.add_argument('--cpu', action='store_true',
                        help='CPU seconds of the process, on a machine that does other things too')
    parser.add_argument('--until', type=float, help='measure the time to this held-out accuracy instead')
    parser.add_argument('--seed', type=int, default=0, help='of the first pair with --until')
    parser.add_argument('--side', choices=('ours', 'theirs'))
    parser.add_argument('--model')
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
    elif args.until is not None:
        compare_until(args)
    else:
        compare_steps(args)


if __name__ == '__main__':
    main()
