"""Which rows are held out for evaluation, where their metadata does not say: one rule for every script.

A row is held out by its prompt alone. So a question is never on both sides, whatever the script, the seed,
the order of the rows and the number of its answers; runs with different seeds are compared on the same rows,
and a model goes from SFT to DPO or RL without having learned from what these evaluate it on, if they put the
same prompt: a system message is part of it.

By default EVAL_FRACTION of the prompts are held out, and of their rows MAX_EVAL_ROWS are looked at, or
MAX_EVAL_PROBLEMS where each takes a completion.
"""
import hashlib
import json
import random

from data.tasks.world import split_of

EVAL_FRACTION = 0.1
MAX_EVAL_ROWS = 512         # the mean over so many tells models apart; more would only take time
MAX_EVAL_PROBLEMS = 200     # RL: a completion takes much longer than a forward pass


def is_held_out(prompt, fraction=EVAL_FRACTION):
    """Whether rows with this prompt, messages or a text, are for evaluation: about `fraction` of all are."""
    return hash64(json.dumps(prompt, sort_keys=True)) < fraction * 2 ** 64


def hash64(text):
    """64 bits that stand for a text, uniform over all texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


# ---- how earlier versions split --------------------------------------------------------------------------

# A run that is resumed keeps the rule it began with: it must not train on what it has been evaluated on.

def legacy_sft(prompt, fraction, seed):
    """train_sft.py: by a hash of the seed and the prompt (messages or a text)."""
    digest = hash64(json.dumps(prompt, sort_keys=True))
    return hash64(f'{seed}|held out|{digest}') >> 1 < fraction * 2 ** 63


def legacy_dpo(prompt, fraction):
    """train_dpo.py: by a hash of the prompt as Python prints it, in a data set that marks no row "eval"."""
    return split_of(str(prompt), fraction) == 'eval'


def legacy_rl(problems, count, seed):
    """train_rl.py: (training, held out), `count` of the problems, at most a tenth, drawn by the seed. A
    problem with the 'question' of one that is held out, but not drawn itself, is on neither side."""
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    held_out = [problems[i] for i in order[:min(count, len(problems) // 10)]]
    questions = {problem['question'] for problem in held_out}
    return [problem for problem in problems if problem['question'] not in questions], held_out


def legacy_pairs(pairs, count, seed):
    """train_rl.py's preference pairs: as legacy_rl, but pair by pair, whatever their prompts."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    drawn = set(order[:min(count, len(pairs) // 10)])
    train = [pair for i, pair in enumerate(pairs) if i not in drawn]
    return train, [pairs[i] for i in sorted(drawn)]
