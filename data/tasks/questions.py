"""Questions about a person just described, answered in full sentences: the embedded question/answer set.

    python -m data.tasks.questions train=800 eval=200 > qa.json

The file holds {"qa_pairs": [{"question", "answer", "metadata"}, ...]}.

'Bako lives in Oslo. The pet of Bako is a dog. Bako is a baker. What is the job of Bako?' has the answer 'Bako
works as a baker.' Names are invented, so that nothing can be known beforehand. No name, no text and no
wording of a question of an eval row occurs in training; the attributes of people, and the sentences of the
answers, are the same.
"""
import json
import random
import sys

from data.tasks.facts import ATTRIBUTES, prompt, reward, solution
from data.tasks.toolcalls import invented
from data.tasks.world import split_of


def problems(split, n, seed):
    """n problems {'question', 'answer'} of a split: three facts, and questions about one or two of them."""
    draw = random.Random(f'questions/{split}/{seed}')
    made = []
    for _ in range(n):
        name = new_word(split, draw).capitalize()
        facts = {}
        for attribute in draw.sample(list(ATTRIBUTES), 3):
            facts[attribute] = draw.choice(ATTRIBUTES[attribute].values)
        asked = draw.sample(list(facts), draw.choices([1, 2], [2, 1])[0])
        told = []
        for attribute, known in facts.items():
            sentence = draw.choice(ATTRIBUTES[attribute].statements)
            told.append(sentence.format(name=name, value=known))
        answers = []
        for attribute in asked:
            question = draw.choice(ATTRIBUTES[attribute].questions[split])
            told.append(question.format(name=name))
            answers.append(ATTRIBUTES[attribute].sentence.format(name=name, value=facts[attribute]))
        made.append({'question': ' '.join(told), 'answer': ' '.join(answers)})
    return made


def new_word(split, draw):
    """An invented word that belongs to a split."""
    word = invented(draw)
    while split_of(word) != split:
        word = invented(draw)
    return word


def rows(split, n, seed):
    """n rows of the embedded question/answer set: question, answer and metadata ('train', 'eval')."""
    return [{**problem, 'metadata': split} for problem in problems(split, n, seed)]


if __name__ == '__main__':
    sizes = dict(word.split('=') for word in sys.argv[1:]) or {'train': '800', 'eval': '200'}
    pairs = []
    for split, n in sizes.items():
        pairs += rows(split, int(n), 'guide')
    print(json.dumps({'qa_pairs': pairs}, indent=1, ensure_ascii=False))
