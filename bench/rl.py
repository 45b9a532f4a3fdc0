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


def ours(directory, steps, matmul, clock):
    """Seconds of each step of train_rl.py's own functions."""
    import train_rl
    from data.problems import Problems
    from train_rl import Clock, Config, Learner, Plan
    run = train_rl.setup('cpu', matmul=matmul)
    cfg = Config(base_model_name=directory, per_device_train_batch_size=PROMPTS * SAMPLES, gradient_accumulation_steps=1, steps_per_generation=1,
                 num_generations=SAMPLES, max_completion_length=NEW, beta=BETA, kl='k3', learning_rate=RATE, dynamic_sampling=False)
    policy, tokenizer = train_rl.load_language_model(cfg, directory, run)
    learner = Learner(policy, tokenizer, train_rl.make_optimizers(cfg, policy, None), train_rl.LossScale(run.dtype),
                      train_rl.load_reference(cfg, policy, run), beta=BETA)
    problems = Problems(None, [{'prompt_ids': ids} for ids in prompts(PROMPTS * steps)], [])

    class Scorer:
        names = ['reward']

        def __call__(self, texts, records, lengths, columns):
            return [{'reward': value} for value in reward(texts)]

        def total(self, scores):
            return scores['reward']

    plan, state, times, cursor = Plan(PROMPTS, 1, steps), train_rl.fresh_state(), [], 0
    for step in range(steps):
        began = clock()
        episodes, table, cursor = train_rl.rollout(cfg, learner, problems, Scorer(), plan, step, cursor, run)
        updates, _ = train_rl.prepare(cfg, learner, episodes, table, plan, run)
        for _ in train_rl.learn_from(cfg, learner, updates, table, plan, state, Clock(), run):
            pass
        times.append(clock() - began)
    assert all(len(e.completion_ids) == NEW for e in episodes)
    return times


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
    import train_rl
    from train_rl import Clock, Config
    run = train_rl.setup('cpu', matmul='float32')
    cfg = Config(per_device_train_batch_size=TASK['completions'], gradient_accumulation_steps=1, steps_per_generation=1, eval_problems=TASK['held_out'],
                 num_generations=TASK['samples'], max_completion_length=TASK['longest'], learning_rate=TASK['rate'], max_steps=TASK['steps'],
                 lr_scheduler='constant', warmup_steps=0, num_problems=TASK['steps'] * TASK['completions'] // TASK['samples'], seed=seed)
    cfg.typed = frozenset({'max_completion_length', 'gradient_accumulation_steps'})
    cfg, learner, problems, scorer, plan = train_rl.build(cfg, run)
    state, spent, curve = train_rl.fresh_state(), 0.0, []
    while state['step'] < TASK['steps']:
        began = clock()
        episodes, table, state['cursor'] = train_rl.rollout(cfg, learner, problems, scorer, plan, state['step'], state['cursor'], run)
        updates, _ = train_rl.prepare(cfg, learner, episodes, table, plan, run)
        for _ in train_rl.learn_from(cfg, learner, updates, table, plan, state, Clock(), run):
            pass
        spent += clock() - began
        if state['step'] % TASK['every'] == 0:
            curve.append((state['step'], round(spent, 2), train_rl.evaluate(cfg, learner, problems, scorer, run)['eval_accuracy']))
            if curve[-1][2] >= accuracy:
                break
    return curve


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
