"""Questions about the people of a short text, answered in full sentences: the embedded question/answer set.

    python data/tasks/questions.py train=800 eval=200 > qa.json        # {"qa_pairs": [{"question", "answer", "metadata"}, ...]}

'Bako lives in Oslo. Miti has a dog. Bako is a baker. What is the job of Bako?' is answered by 'Bako works as a baker.' Names are
invented, so that nothing can be known beforehand, and so are half of what is told of them, or a model would pick one of the few
values that it knows instead of reading. No name, no value and no wording of a question of an eval row occurs in training; what is
told, and the sentences of the answers, have the same forms.
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
        names = [new_word(split, draw).capitalize() for _ in range(2)]
        if names[0] == names[1]:
            continue
        told = {(name, attribute): value(attribute, split, draw) for name in names for attribute in draw.sample(list(ATTRIBUTES), 2)}
        asked = draw.sample(list(told), 2)
        kind = draw.choices(['fact', 'person', 'two facts'], [2, 1, 1])[0]
        if kind == 'person' and list(told.values()).count(told[asked[0]]) > 1:
            continue                # both people have it
        asked = asked if kind == 'two facts' else asked[:1]
        attribute = asked[0][1]
        if kind == 'person':
            question = draw.choice(WHO[attribute][split == 'eval']).format(value=told[asked[0]])
        else:
            questions = [draw.choice(ATTRIBUTES[a][3 if split == 'train' else 4]).format(name=who) for who, a in asked]
            question = ' '.join(questions)
        statements = [draw.choice([ATTRIBUTES[a][1], *ATTRIBUTES[a][2]]).format(name=who, value=told[who, a])
                      for who, a in draw.sample(list(told), len(told))]
        answer = ' '.join(ATTRIBUTES[a][1].format(name=who, value=told[who, a]) for who, a in asked)
        found.append({'question': ' '.join([*statements, question]), 'answer': answer})
    return found


def new_word(split, draw):
    """An invented word that belongs to a split."""
    while split_of(word := invented(draw)) != split:
        pass
    return word


def value(attribute, split, draw):
    """What is told of somebody: one of the values of facts.py that belong to the split, or a new word."""
    if draw.random() < 0.5:
        return draw.choice(part(ATTRIBUTES[attribute][0], split))
    word = new_word(split, draw)
    return word.capitalize() if attribute == 'city' else word


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
