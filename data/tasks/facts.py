"""Questions about the people of the world, to be answered in one word or in a full sentence, as asked.

The facts are fixed. For a fifth of them no question occurs in training, only statements; wordings of questions and of
requests are held out too. `demonstration` is by a pupil who knows the facts but does not listen: it answers in either
form, whatever was asked for. Pairs of the two forms are the embedded preference set: which one is chosen depends on the
request alone, so neither length nor one side alone tells.
"""
import random

from data.tasks.world import CITIES, COLOURS, FOODS, JOBS, NAMES, PETS, split_of

# attribute: values, the full sentence, more ways to state it, questions for training, questions held out
ATTRIBUTES = {
    'city': (CITIES, '{name} lives in {value}.', ['The home of {name} is in {value}.', 'In {value} lives {name}.'],
             ['Where does {name} live?', 'Which city does {name} live in?', 'Where is the home of {name}?'],
             ['In which city is the home of {name}?']),
    'job': (JOBS, '{name} works as a {value}.', ['The job of {name} is {value}.', '{name} is a {value}.'],
            ['What is the job of {name}?', 'What does {name} work as?', 'Which job does {name} have?'],
            ['As what does {name} work?']),
    'pet': (PETS, '{name} has a {value}.', ['The pet of {name} is a {value}.', '{name} and a {value} live together.'],
            ['Which pet does {name} have?', 'What is the pet of {name}?', 'What pet lives with {name}?'],
            ['Which pet lives with {name}?']),
    'food': (FOODS, '{name} likes {value}.', ['The food of {name} is {value}.', '{name} eats {value} on Sunday.'],
             ['What food does {name} like?', 'What does {name} like to eat?', 'Which food does {name} eat?'],
             ['Which food does {name} like to eat?']),
    'colour': (COLOURS, 'The house of {name} is {value}.', ['{name} has a {value} house.', 'A {value} house: {name}.'],
               ['What colour is the house of {name}?', 'Which colour does the house of {name} have?'],
               ['The house of {name} is what colour?']),
}
REQUESTS = {
    'train': {'word': ['In one word: {q}', '{q} One word, please.', 'Answer with one word. {q}', 'Be short. {q}'],
              'sentence': ['In a full sentence: {q}', '{q} A full sentence, please.', 'Answer with a sentence. {q}',
                           'Be polite and answer in full. {q}']},
    'eval': {'word': ['{q} Answer in one word.', 'Please be short. {q}'],
             'sentence': ['{q} Answer in a full sentence.', 'Please answer in full. {q}']},
}


def value_of(name, attribute):
    """What is true of a person."""
    return random.Random(f'fact/{name}/{attribute}').choice(ATTRIBUTES[attribute][0])


def statements(name, attribute):
    """All ways to state a fact."""
    _, full, more, _, _ = ATTRIBUTES[attribute]
    return [sentence.format(name=name, value=value_of(name, attribute)) for sentence in [full, *more]]


def problems(split, n, seed):
    """n problems {'name', 'attribute', 'form', 'question', 'answer'} of a split; form is 'word' or 'sentence', half and
    half, answer the one right text."""
    draw = random.Random(f'facts/{split}/{seed}')
    facts = [(name, attribute) for name in NAMES for attribute in ATTRIBUTES]
    facts = [fact for fact in facts if split_of('/'.join(fact), share=0.2) == split]
    found = []
    for _ in range(n):
        (name, attribute), form = draw.choice(facts), draw.choice(['word', 'sentence'])
        question = draw.choice(ATTRIBUTES[attribute][3 if split == 'train' else 4]).format(name=name)
        found.append({'name': name, 'attribute': attribute, 'form': form, 'answer': written(name, attribute, form),
                      'question': draw.choice(REQUESTS[split][form]).format(q=question)})
    return found


def written(name, attribute, form):
    """The right answer in one of the two forms."""
    value = value_of(name, attribute)
    return value + '.' if form == 'word' else ATTRIBUTES[attribute][1].format(name=name, value=value)


def prompt(problem):
    """The chat that asks for it."""
    return [{'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 for exactly the right answer (here in the form that was asked for), else 0.0."""
    return float(text.strip() == problem['answer'])


def solution(problem):
    """The right answer."""
    return problem['answer']


def other_form(problem):
    """The right fact in the form that was not asked for: the rejected side of a preference pair."""
    return written(problem['name'], problem['attribute'], 'sentence' if problem['form'] == 'word' else 'word')


def demonstration(problem, draw):
    """What the pupil who does not listen answers; draw: random.Random."""
    return written(problem['name'], problem['attribute'], draw.choice(['word', 'sentence']))


def rows(split, n, seed):
    """At most n different rows of the embedded preference set, {'prompt', 'chosen', 'rejected', 'metadata'}: the same fact in the
    form asked for and in the other one. Held out there are 56 questions."""
    different = {problem['question']: problem for problem in problems(split, 20 * n, seed)}
    return [{'prompt': problem['question'], 'chosen': problem['answer'], 'rejected': other_form(problem), 'metadata': split}
            for problem in list(different.values())[:n]]


def in_form(prompt, text):
    """Whether an answer has the form, a word or a sentence, that the prompt (with one of REQUESTS in it) asks for: the rule that makes
    one side of a row the chosen one."""
    asked = {form for split in REQUESTS.values() for form, requests in split.items()
             for request in requests if all(part in prompt for part in request.split('{q}'))}
    return asked == {'sentence' if ' ' in text.strip() else 'word'}
