"""Questions about a person who was just described, answered in full sentences: the embedded question/answer set.

    python -m data.tasks.questions train=800 eval=200 > qa.json        # {"qa_pairs": [{"question", "answer", "metadata"}, ...]}

'Bako lives in Oslo. The pet of Bako is a dog. Bako is a baker. What is the job of Bako?' is answered by 'Bako works as a baker.'
Names are invented, so that nothing can be known beforehand. No name, no text and no wording of a question of an eval row occurs in
training; what can be told of somebody, and the sentences of the answers, are the same.
"""
import json
import random
import sys

from data.tasks.facts import ATTRIBUTES, prompt, reward, solution
from data.tasks.toolcalls import invented
from data.tasks.world import split_of


def problems(split, n, seed):
    """n problems {'question', 'answer'} of a split: three facts in any order, a third of the questions about two of them."""
    draw, found = random.Random(f'questions/{split}/{seed}'), []
    for _ in range(n):
        name = new_word(split, draw).capitalize()
        facts = {attribute: draw.choice(ATTRIBUTES[attribute][0]) for attribute in draw.sample(list(ATTRIBUTES), 3)}
        asked = draw.sample(list(facts), draw.choices([1, 2], [2, 1])[0])
        told = [draw.choice([ATTRIBUTES[attribute][1], *ATTRIBUTES[attribute][2]]).format(name=name, value=known)
                for attribute, known in facts.items()]
        questions = [draw.choice(ATTRIBUTES[attribute][3 if split == 'train' else 4]).format(name=name) for attribute in asked]
        found.append({'question': ' '.join(told + questions),
                      'answer': ' '.join(ATTRIBUTES[attribute][1].format(name=name, value=facts[attribute]) for attribute in asked)})
    return found


def new_word(split, draw):
    """An invented word that belongs to a split."""
    while split_of(word := invented(draw)) != split:
        pass
    return word


def rows(split, n, seed):
    """n rows of the embedded question/answer set: question, answer and metadata ('train', 'eval')."""
    return [{**problem, 'metadata': split} for problem in problems(split, n, seed)]


if __name__ == '__main__':
    sizes = dict(word.split('=') for word in sys.argv[1:]) or {'train': '800', 'eval': '200'}
    pairs = [row for split, n in sizes.items() for row in rows(split, int(n), 'guide')]
    print(json.dumps({'qa_pairs': pairs}, indent=1, ensure_ascii=False))
