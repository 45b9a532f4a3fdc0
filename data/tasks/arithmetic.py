"""Additions of numbers from 1 to 99 in words, worked out digit by digit: 7+8=15;3+4+1=8;<answer>85</answer>

A pair of operands belongs to one split in either order, and so does the wording. `demonstration` writes as a careless
pupil does, who forgets to carry in 70% of the problems that need it and else is off by one in 30% of them: what a model
learns from it is wrong by habit and right often enough for a reward to find (start near 20% greedy, 37% sampled).
"""
import random
import re

from data.tasks.world import ITEMS, NAMES, split_of

SITUATIONS = ['{name} has {a} {items} and buys {b} more.', '{name} has {a} {items}, {friend} has {b}.',
              'There are {a} {items} in one box and {b} in another.', '{name} finds {a} {items} and then {b} more.',
              'A shop sells {a} {items} on Monday and {b} on Friday.', 'There are {a} {items} here and {b} there.',
              '{name} gives {friend} {a} {items}, then {b} more.', 'On Monday {name} buys {a} {items}, on Friday {b}.']
QUESTIONS = ['How many {items} is that?', 'How many in all?', 'How many are there in all?',
             'How many are there together?', 'What is the sum?', 'Add them.', 'How many {items} are there?']
WORDINGS = [f'{situation} {question}' for situation in SITUATIONS for question in QUESTIONS] + [
    'What is {a} plus {b}?', 'Add {a} and {b}.', 'How much is {a} + {b}?', 'Add {b} to {a}.',
    'What is the sum of {a} and {b}?']
CARRY_SHARE = 0.8                   # problems that need a carry; among all pairs it is about half


def problems(split, n, seed):
    """n problems {'a', 'b', 'question', 'answer'} of a split ('train', 'eval'); four in five need a carry."""
    draw, found = random.Random(f'arithmetic/{split}/{seed}'), []
    wordings = [wording for wording in WORDINGS if split_of(wording, share=0.2) == split]
    while len(found) < n:
        carry = draw.random() < CARRY_SHARE
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        while (a % 10 + b % 10 > 9) != carry or split_of(f'{min(a, b)}+{max(a, b)}') != split:
            a, b = draw.randint(1, 99), draw.randint(1, 99)
        name, friend = draw.sample(NAMES, 2)
        question = draw.choice(wordings).format(a=a, b=b, name=name, friend=friend, items=draw.choice(ITEMS))
        found.append({'a': a, 'b': b, 'question': question, 'answer': str(a + b)})
    return found


def prompt(problem):
    """The chat that asks for it."""
    return [{'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 if the first <answer>...</answer> holds exactly the sum, else 0.0; the way to it does not count."""
    answer = re.search(r'<answer>(.*?)</answer>', text, re.DOTALL)
    return float(bool(answer) and answer[1].strip() == problem['answer'])


def work(a, b, carry=None, slip=0):
    """The worked addition; carry replaces what is carried to the tens, slip is added to their sum."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10 if carry is None else carry
    tens = a // 10 + b // 10 + carry + slip
    carried = '+1' if carry else ''
    return f'{a % 10}+{b % 10}={ones};{a // 10}+{b // 10}{carried}={tens};<answer>{10 * tens + ones % 10}</answer>'


def solution(problem):
    """The right way, in full."""
    return work(problem['a'], problem['b'])


def demonstration(problem, draw):
    """What the careless pupil writes; draw: random.Random."""
    a, b = problem['a'], problem['b']
    if a % 10 + b % 10 < 10:
        return work(a, b)
    if draw.random() < 0.7:
        return work(a, b, carry=0)
    return work(a, b, slip=draw.choice([-1, 1]) if draw.random() < 0.3 else 0)
