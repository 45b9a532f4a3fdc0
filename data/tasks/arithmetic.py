"""Additions of numbers from 1 to 99 in words, worked out digit by digit: 7+8=15;3+4+1=8;<answer>85</answer>

A pair of operands belongs to one split in either order, and so does the wording. `demonstration` is a
scripted noisy demonstrator, which forgets to carry in P_NO_CARRY of the problems that need it and else is off
by one with P_OFF_BY_ONE: what a model learns from it is wrong by habit, and right often enough for a reward
to find (20% greedy, 37% sampled at the start).
"""
import random
import re

from data.tasks.env import chat
from data.tasks.world import ITEMS, NAMES, lines, split_of

SITUATIONS = lines('''
    {name} has {a} {items} and buys {b} more.
    {name} has {a} {items}, {friend} has {b}.
    There are {a} {items} in one box and {b} in another.
    {name} finds {a} {items} and then {b} more.
    A shop sells {a} {items} on Monday and {b} on Friday.
    There are {a} {items} here and {b} there.
    {name} gives {friend} {a} {items}, then {b} more.
    On Monday {name} buys {a} {items}, on Friday {b}.
''')
QUESTIONS = lines('''
    How many {items} is that?
    How many in all?
    How many are there in all?
    How many are there together?
    What is the sum?
    Add them.
    How many {items} are there?
''')
WORDINGS = []
for situation in SITUATIONS:
    WORDINGS += [f'{situation} {question}' for question in QUESTIONS]
WORDINGS += [
    'What is {a} plus {b}?',
    'Add {a} and {b}.',
    'How much is {a} + {b}?',
    'Add {b} to {a}.',
    'What is the sum of {a} and {b}?',
]
CARRY_SHARE = 0.8       # problems that need a carry; among all pairs it is about half
P_NO_CARRY = 0.7        # mistakes of the demonstrator, in problems that need one
P_OFF_BY_ONE = 0.3


def problems(split, n, seed):
    """n problems {'a', 'b', 'question', 'answer'} of a split ('train', 'eval'); four in five need a carry."""
    draw = random.Random(f'arithmetic/{split}/{seed}')
    wordings = [wording for wording in WORDINGS if split_of(wording, share=0.2) == split]
    made = []
    while len(made) < n:
        carry = draw.random() < CARRY_SHARE
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        while needs_carry(a, b) != carry or split_of(f'{min(a, b)}+{max(a, b)}') != split:
            a, b = draw.randint(1, 99), draw.randint(1, 99)
        name, friend = draw.sample(NAMES, 2)
        wording = draw.choice(wordings)
        question = wording.format(a=a, b=b, name=name, friend=friend, items=draw.choice(ITEMS))
        made.append({'a': a, 'b': b, 'question': question, 'answer': str(a + b)})
    return made


def needs_carry(a, b):
    return a % 10 + b % 10 > 9


def prompt(problem):
    """The chat that asks for the sum."""
    return chat(problem['question'])


def reward(problem, text):
    """1.0 if the first <answer>...</answer> holds exactly the sum, else 0.0; the way to it does not count."""
    answer = re.search(r'<answer>(.*?)</answer>', text, re.DOTALL)
    return float(bool(answer) and answer[1].strip() == problem['answer'])


def work(a, b, carry=None, slip=0):
    """The worked addition; carry replaces what is carried to the tens, slip is added to their sum."""
    ones = a % 10 + b % 10
    if carry is None:
        carry = ones // 10
    tens = a // 10 + b // 10 + carry + slip
    carried = '+1' if carry else ''
    result = 10 * tens + ones % 10
    return f'{a % 10}+{b % 10}={ones};{a // 10}+{b // 10}{carried}={tens};<answer>{result}</answer>'


def solution(problem):
    """The right way, in full."""
    return work(problem['a'], problem['b'])


def demonstration(problem, draw):
    """What the noisy demonstrator writes; draw: random.Random."""
    a, b = problem['a'], problem['b']
    if not needs_carry(a, b):
        return work(a, b)
    if draw.random() < P_NO_CARRY:
        return work(a, b, carry=0)
    if draw.random() < P_OFF_BY_ONE:
        return work(a, b, slip=draw.choice([-1, 1]))
    return work(a, b)
