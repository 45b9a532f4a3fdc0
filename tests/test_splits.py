"""data/splits.py: a prompt is always on one side; runs of earlier versions keep the side they had."""
import hashlib
import random
import subprocess
import sys

import pytest

from conftest import ROOT
from data.splits import EVAL_FRACTION, is_held_out, legacy_dpo, legacy_pairs, legacy_rl, legacy_sft
from data.tasks.world import split_of
from data.tokenized import digest
from nanoforge.run import seed_for

TEXTS = [f'What is {i} + {i * i % 97}?' for i in range(10_000)]
CHATS = [[{'role': 'system', 'content': 'Answer.'}, {'role': 'user', 'content': text}] for text in TEXTS]
FROZEN = [11, 16, 23, 30, 34, 48]            # the places among the first 60 that are held out
FROZEN_SFT = [18, 44, 50, 55]
FROZEN_DPO = [9, 15, 27, 31, 50]


@pytest.mark.parametrize('prompts', [TEXTS, CHATS])
@pytest.mark.parametrize('fraction', [0.05, EVAL_FRACTION, 0.5])
def test_the_fraction_is_held_out(prompts, fraction):
    n = len(prompts)
    held_out = sum(is_held_out(prompt, fraction) for prompt in prompts)
    assert abs(held_out - n * fraction) < 3 * (n * fraction * (1 - fraction)) ** 0.5


def test_a_prompt_is_always_on_the_same_side():
    for prompt in CHATS[:500]:
        reordered = [dict(reversed(message.items())) for message in prompt]
        assert is_held_out(prompt) == is_held_out(reordered)
        assert is_held_out(prompt, 0.05) <= is_held_out(prompt, 0.2)        # a larger fraction only adds
        assert not is_held_out(prompt, 0) and is_held_out(prompt, 1)
    chosen = [i for i in range(60) if is_held_out(TEXTS[i])]
    assert chosen == FROZEN                                 # another version, another machine
    by_hand = hashlib.blake2b(b'"What is 0 + 0?"', digest_size=8).digest()
    assert is_held_out(TEXTS[0], 0.7) == (int.from_bytes(by_hand, 'little') / 2 ** 64 < 0.7)


def test_the_side_does_not_depend_on_the_process():
    code = ('import sys; from data.splits import is_held_out; assert "torch" not in sys.modules; '
            f'print([i for i, text in enumerate({TEXTS[:60]}) if is_held_out(text)])')
    for seed in ('1', '2'):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                              env={'PYTHONHASHSEED': seed})
        assert done.stdout.strip() == str(FROZEN), done.stderr


def test_legacy_rules_are_those_of_earlier_versions():
    for prompt in TEXTS[:300] + CHATS[:300]:
        for fraction in (0, 0.1, 0.5):
            for seed in (0, 42):
                old = seed_for(seed, 'held out', digest(prompt)) < fraction * 2 ** 63
                assert legacy_sft(prompt, fraction, seed) == old
            assert legacy_dpo(prompt, fraction) == (split_of(str(prompt), fraction) == 'eval')


def test_legacy_rules_by_hand():
    """What is compared above goes; this stays."""
    assert [i for i in range(60) if legacy_sft(TEXTS[i], 0.1, 42)] == FROZEN_SFT
    assert [i for i in range(60) if legacy_dpo(CHATS[i], 0.1)] == FROZEN_DPO
    problems = [{'question': f'{i % 7}?', 'answer': str(i)} for i in range(30)]
    train, held_out = legacy_rl(problems, 200, 3)
    order = list(range(30))
    random.Random(3).shuffle(order)
    assert held_out == [problems[i] for i in order[:3]]
    questions = {problem['question'] for problem in held_out}
    assert train == [problem for problem in problems if problem['question'] not in questions] != []


def test_legacy_pairs_are_held_out_one_by_one():
    """A tenth of the pairs, drawn by the seed; another pair of the same prompt stays in training."""
    pairs = [f'pair {i // 2}' for i in range(40)]
    train, held_out = legacy_pairs(pairs, 500, seed=3)
    assert len(held_out) == 4 and sorted(train + held_out) == sorted(pairs)
    assert legacy_pairs(pairs, 2, seed=3)[1] != held_out and len(legacy_pairs(pairs, 2, seed=3)[1]) == 2
