"""What the embedded model is pretrained on: an endless stream of short documents, a function of the seed.

    python data/tiny/corpus.py | head          # some of it

Two thirds are chats about the tasks of data/tasks, answered by their noisy demonstrators, so that
post-training has faults to mend; the rest are statements of facts, simple sentences, copying, small talk.
Only training parts of tasks appear.
"""
import itertools
import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.chat import CHAT_TEMPLATE, compiled
from data.tasks import arithmetic, facts, plan_path, toolcalls
from data.tasks.world import APPS, CITIES, COLOURS, DAYS, EVENTS, FOODS, ITEMS, JOBS, LANGUAGES, NAMES
from data.tasks.world import PETS, PLACES, ROOMS, THINGS, lines

END = '<|endoftext|>'
# documents of each type in a block; the tool calls are long, so that they are near 40% of the tokens
CHATS = {arithmetic: 11, plan_path: 11, toolcalls: 6, facts: 8}
TEXTS = {'statement': 6, 'sentence': 3, 'copy': 8, 'talk': 2, 'day': 1}
WORDS = [
    *NAMES, *CITIES, *APPS, *DAYS, *LANGUAGES, *ROOMS, *EVENTS,
    *FOODS, *PLACES, *THINGS, *ITEMS, *PETS, *JOBS, *COLOURS,
]
KEYS = set()            # names of parameters
for tool in toolcalls.TOOLS.values():
    KEYS.update(tool.parameters)
KEYS = sorted(KEYS)
TALK = lines('''
    Hello! | Hello! How can I help you?
    Hi. | Hello! How can I help you?
    How are you? | I am well. How can I help you?
    Thank you. | You are welcome.
    Thanks! | You are welcome.
    Goodbye. | Goodbye!
    Who are you? | I am tiny, a small language model.
    What are you? | I am tiny, a small language model.
    What can you do? | I can add numbers, find a way, call tools and tell you about the people I know.
    Good morning. | Good morning! How can I help you?
''')


def documents(seed=0):
    """Yields texts without end; chats are rendered by CHAT_TEMPLATE. Every text ends with <|endoftext|>."""
    for block in itertools.count():
        draw = random.Random(f'corpus/{seed}/{block}')
        texts = []
        for task, count in CHATS.items():
            problems = task.problems('train', count, f'corpus/{seed}/{block}')
            texts += [chat(task, problem, draw) for problem in problems]
        for type, count in TEXTS.items():
            texts += [plain(type, draw) for _ in range(count)]
        draw.shuffle(texts)
        for text in texts:
            yield text + END


def rendered(messages, tools=None):
    """A chat as text, without the line end after its last message."""
    template = compiled(CHAT_TEMPLATE)
    return template.render(messages=messages, tools=tools, add_generation_prompt=False).rstrip('\n')


def dialogue(question, answer):
    """One question and its answer."""
    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]


def chat(task, problem, draw):
    """A problem with the demonstrator's answer; sometimes with results of tools, or after a question."""
    answer = {'role': 'assistant', 'content': task.demonstration(problem, draw)}
    messages = [*task.prompt(problem), answer]
    if task is toolcalls:
        if draw.random() < 0.3:
            for _ in problem['calls']:
                result = draw.choice(['{"ok": true}', 'ok', '{"done": true}'])
                messages.append({'role': 'tool', 'content': result})
            messages.append({'role': 'assistant', 'content': 'Done.'})
    elif draw.random() < 0.2:
        earlier = facts.problems('train', 1, f'{draw.random()}')[0]
        messages = dialogue(earlier['question'], facts.demonstration(earlier, draw)) + messages
    return rendered(messages, problem.get('tools'))


def plain(type, draw):
    """A document that belongs to no task."""
    if type == 'statement':
        name = draw.choice(NAMES)
        attributes = draw.sample(list(facts.ATTRIBUTES), draw.randint(2, 5))
        return ' '.join(draw.choice(facts.statements(name, attribute)) for attribute in attributes)
    if type == 'sentence':
        return ' '.join(sentence(draw) for _ in range(draw.randint(2, 4)))
    if type == 'day':
        i = draw.randrange(7)
        side, answer = draw.choice([('after', DAYS[(i + 1) % 7]), ('before', DAYS[i - 1])])
        return rendered(dialogue(f'What day comes {side} {DAYS[i]}?', answer + '.'))
    question, answer = draw.choice(TALK).split(' | ') if type == 'talk' else copy(draw)
    return rendered(dialogue(question, answer))


def sentence(draw):
    """A simple sentence about somebody or something; all are drawn, and one of them taken."""
    name, other = draw.sample(NAMES, 2)
    colour, thing, pet, item = (draw.choice(words) for words in (COLOURS, THINGS, PETS, ITEMS))
    return draw.choice([
        f'The {colour} {pet} sees the {thing}.',
        f'{name} and {other} walk to the {draw.choice(PLACES)}.',
        f'{name} finds {draw.randint(2, 99)} {item} near the {thing}.',
        f'On {draw.choice(DAYS)} {name} is in the {draw.choice(ROOMS)}.',
        f'{name} gives {other} a {colour} {thing}.',
        f'The {pet} of {name} eats {draw.choice(FOODS)}.',
        f'{name} goes to {draw.choice(CITIES)} with {other}.',
        f'The {thing} is {colour} and the {pet} is not.',
    ])


def copy(draw):
    """A question that asks for some of its own words: the model learns to write any value, in JSON too.

    All words occur here, those too that no tool is called with in training.
    """
    values = [copied_value(draw) for _ in range(draw.randint(1, 4))]
    words = ', '.join(values)
    named = dict(zip(draw.sample(KEYS, len(values)), values, strict=True))
    pairs = ', '.join(f'{key} {value}' for key, value in named.items())
    return draw.choice([
        (f'Repeat: {words}', words),
        (f'Write as a list: {words}', json.dumps(values)),
        (f'Write as an object: {pairs}', json.dumps(named)),
        (f'Note {pairs}', json.dumps({'note': named})),
        (f'Say it backwards: {words}', ', '.join(values[::-1])),
    ])


def copied_value(draw):
    """A word, an invented one, a number, two words or a time; all are drawn, and one of them taken."""
    return draw.choice([
        draw.choice(WORDS),
        toolcalls.invented(draw),
        str(draw.randint(2, 99)),
        f'{draw.choice(WORDS)} {draw.choice(WORDS)}',
        toolcalls.draw_time(draw),
    ])


if __name__ == '__main__':
    try:
        for text in documents():
            print(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # the reader has seen enough
