"""Questions about the people of a short text, answered in full sentences: the embedded question/answer set.

    python data/tasks/questions.py train=800 eval=200 > qa.json        # {"qa_pairs": [{"question", "answer", "metadata"}, ...]}

'Bako lives in Oslo. Miti has a dog. Bako is a baker. What is the job of Bako?' is answered by 'Bako works as a baker.' Names are
invented, so that nothing can be known beforehand. No name, value, statement or wording of a question of an eval row occurs
in training; the sentences of the answers are the same.
"""
import json
import os
import random
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.tasks.facts import ATTRIBUTES
from data.tasks.toolcalls import invented
from data.tasks.world import part, split_of

WHO = {'city': (['Who lives in {value}?', 'Who is at home in {value}?'], ['Whose home is {value}?']),
       'job': (['Who works as a {value}?', 'Who is the {value}?'], ['Whose job is {value}?']),
       'pet': (['Who has a {value}?', 'Who lives with a {value}?'], ['Whose pet is a {value}?']),
       'food': (['Who likes {value}?', 'Who eats {value}?'], ['Whose food is {value}?']),
       'colour': (['Whose house is {value}?', 'Who has a {value} house?'], ['The {value} house is whose?'])}


def problems(split, n, seed):
    """n problems {'question', 'answer'} of a split: two people, four facts in any order; half ask for one fact, a quarter for the
    person, a quarter for two facts at once."""
    draw, found = random.Random(f'questions/{split}/{seed}'), []
    while len(found) < n:
        names = [invented(draw).capitalize() for _ in range(2)]
        if names[0] == names[1] or any(split_of(name) != split for name in names):
            continue
        told = {(name, attribute): draw.choice(part(ATTRIBUTES[attribute][0], split))
                for name in names for attribute in draw.sample(list(ATTRIBUTES), 2)}
        asked = draw.sample(list(told), 2)
        kind = draw.choices(['fact', 'person', 'two facts'], [2, 1, 1])[0]
        if kind == 'person' and list(told.values()).count(told[asked[0]]) > 1:
            continue                # both people have it
        asked = asked if kind == 'two facts' else asked[:1]
        (name, attribute), value = asked[0], told[asked[0]]
        if kind == 'person':
            question = draw.choice(WHO[attribute][split == 'eval']).format(value=value)
        else:
            questions = [draw.choice(ATTRIBUTES[a][3 if split == 'train' else 4]).format(name=who) for who, a in asked]
            question = ' '.join(questions)
        statements = [statement(who, a, told[who, a], split, draw) for who, a in draw.sample(list(told), len(told))]
        answer = ' '.join(ATTRIBUTES[a][1].format(name=who, value=told[who, a]) for who, a in asked)
        found.append({'question': ' '.join([*statements, question]), 'answer': answer})
    return found


def statement(name, attribute, value, split, draw):
    """A fact in one of the forms that belong to a split."""
    _, full, (other, held_out), _, _ = ATTRIBUTES[attribute]
    return draw.choice([full, other] if split == 'train' else [held_out]).format(name=name, value=value)


def prompt(problem):
    """The chat that asks for it."""
    return [{'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 for exactly the right sentences, else 0.0."""
    return float(text.strip() == problem['answer'])


def solution(problem):
    """The right answer."""
    return problem['answer']


def rows(split, n, seed):
    """n rows of the embedded question/answer set: question, answer and metadata ('train', 'eval')."""
    return [{**problem, 'metadata': split} for problem in problems(split, n, seed)]


if __name__ == '__main__':
    sizes = dict(word.split('=') for word in sys.argv[1:]) or {'train': '800', 'eval': '200'}
    pairs = [row for split, n in sizes.items() for row in rows(split, int(n), 'guide')]
    print(json.dumps({'qa_pairs': pairs}, indent=1, ensure_ascii=False))
