"""Questions about the people of the world, to be answered in one word or in a full sentence, as asked.

The facts are fixed. For a fifth of them no question occurs in training, only statements; wordings of
questions and of requests are held out too. `demonstration` is a scripted noisy demonstrator, which knows the
facts but answers in either form, whatever was asked for. Pairs of the two forms are the embedded preference
set: which one is chosen depends on the request alone, so neither length nor one side alone tells.
"""
import random
from typing import NamedTuple

from data.tasks.env import chat
from data.tasks.world import CITIES, COLOURS, FOODS, JOBS, NAMES, PETS, split_of


class Attribute(NamedTuple):
    values: list
    statements: list    # ways to state it, of which the first is the full sentence of the answers
    questions: dict     # by split

    @property
    def sentence(self):
        return self.statements[0]


ATTRIBUTES = {
    'city': Attribute(CITIES, [
        '{name} lives in {value}.',
        'The home of {name} is in {value}.',
        'In {value} lives {name}.',
    ], {
        'train': ['Where does {name} live?', 'Which city does {name} live in?', 'Where is the home of '
                                                                                '{name}?'],
        'eval': ['In which city is the home of {name}?'],
    }),
    'job': Attribute(JOBS, [
        '{name} works as a {value}.',
        'The job of {name} is {value}.',
        '{name} is a {value}.',
    ], {
        'train': ['What is the job of {name}?', 'What does {name} work as?', 'Which job does {name} have?'],
        'eval': ['As what does {name} work?'],
    }),
    'pet': Attribute(PETS, [
        '{name} has a {value}.',
        'The pet of {name} is a {value}.',
        '{name} and a {value} live together.',
    ], {
        'train': ['Which pet does {name} have?', 'What is the pet of {name}?', 'What pet lives with {name}?'],
        'eval': ['Which pet lives with {name}?'],
    }),
    'food': Attribute(FOODS, [
        '{name} likes {value}.',
        'The food of {name} is {value}.',
        '{name} eats {value} on Sunday.',
    ], {
        'train': ['What food does {name} like?', 'What does {name} like to eat?', 'Which food does {name} '
                                                                                  'eat?'],
        'eval': ['Which food does {name} like to eat?'],
    }),
    'colour': Attribute(COLOURS, [
        'The house of {name} is {value}.',
        '{name} has a {value} house.',
        'A {value} house: {name}.',
    ], {
        'train': ['What colour is the house of {name}?', 'Which colour does the house of {name} have?'],
        'eval': ['The house of {name} is what colour?'],
    }),
}
REQUESTS = {
    'train': {
        'word': ['In one word: {q}', '{q} One word, please.', 'Answer with one word. {q}', 'Be short. {q}'],
        'sentence': ['In a full sentence: {q}', '{q} A full sentence, please.', 'Answer with a sentence. {q}',
                     'Be polite and answer in full. {q}'],
    },
    'eval': {
        'word': ['{q} Answer in one word.', 'Please be short. {q}'],
        'sentence': ['{q} Answer in a full sentence.', 'Please answer in full. {q}'],
    },
}
OTHER = {'word': 'sentence', 'sentence': 'word'}


def value_of(name, attribute):
    """What is true of a person."""
    return random.Random(f'fact/{name}/{attribute}').choice(ATTRIBUTES[attribute].values)


def statements(name, attribute):
    """All ways to state a fact."""
    value = value_of(name, attribute)
    return [sentence.format(name=name, value=value) for sentence in ATTRIBUTES[attribute].statements]


def problems(split, n, seed):
    """n problems {'name', 'attribute', 'form', 'answer', 'question'} of a split; form is 'word' or
    'sentence', half and half, answer the one right text."""
    draw = random.Random(f'facts/{split}/{seed}')
    facts = []
    for name in NAMES:
        facts += [(name, key) for key in ATTRIBUTES if split_of(f'{name}/{key}', share=0.2) == split]
    made = []
    for _ in range(n):
        name, attribute = draw.choice(facts)
        form = draw.choice(['word', 'sentence'])
        question = draw.choice(ATTRIBUTES[attribute].questions[split]).format(name=name)
        made.append({
            'name': name,
            'attribute': attribute,
            'form': form,
            'answer': write(name, attribute, form),
            'question': draw.choice(REQUESTS[split][form]).format(q=question),
        })
    return made


def write(name, attribute, form):
    """The right answer in one of the two forms."""
    if form == 'word':
        return value_of(name, attribute) + '.'
    return statements(name, attribute)[0]


def prompt(problem):
    """The chat that asks for the fact."""
    return chat(problem['question'])


def reward(problem, text):
    """1.0 for exactly the right answer (here in the form that was asked for), else 0.0."""
    return float(text.strip() == problem['answer'])


def solution(problem):
    """The right answer."""
    return problem['answer']


def other_form(problem):
    """The right fact in the form that was not asked for: the rejected side of a preference pair."""
    return write(problem['name'], problem['attribute'], OTHER[problem['form']])


def demonstration(problem, draw):
    """What the noisy demonstrator answers; draw: random.Random."""
    return write(problem['name'], problem['attribute'], draw.choice(['word', 'sentence']))


def rows(split, n, seed):
    """At most n different rows of the embedded preference set, {'prompt', 'chosen', 'rejected', 'metadata'}:
    the same fact in the form asked for and in the other one. Held out there are 56 questions."""
    distinct = {problem['question']: problem for problem in problems(split, 20 * n, seed)}
    pairs = []
    for question, problem in list(distinct.items())[:n]:
        pairs.append({
            'prompt': question,
            'chosen': problem['answer'],
            'rejected': other_form(problem),
            'metadata': split,
        })
    return pairs


def in_form(prompt, text):
    """Whether an answer has the form, a word or a sentence, that the prompt (with one of REQUESTS in it) asks
    for: the rule that makes one side of a row the chosen one."""
    asked = set()
    for requests in REQUESTS.values():
        for form, templates in requests.items():
            for template in templates:
                if all(part in prompt for part in template.split('{q}')):
                    asked.add(form)
    return asked == {'sentence' if ' ' in text.strip() else 'word'}
