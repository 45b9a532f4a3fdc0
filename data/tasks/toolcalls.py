"""Requests to a dozen tools of a phone, one to three calls each.

No argument value, opening or wording of an eval row occurs in training. `demonstration` is by a pupil who knows which
tool and which values, but rarely the format: three times in four it writes {"tool": ..., "args": ...}, one in ten a
function call as in a program, and only the rest as the template has it.
"""
import json
import random

from data.chat import parse_tool_calls
from data.tasks.world import APPS, CITIES, COLOURS, DAYS, EVENTS, FOODS, ITEMS, LANGUAGES, NAMES, PLACES, ROOMS, THINGS
from data.tasks.world import part, split_of

# name: description, parameters (name: kind of value), wordings for training, wordings held out
TOOLS = {
    'set_alarm': ('Set an alarm.', {'time': 'time'},
                  ['set an alarm for {time}', 'wake me at {time}', 'put the alarm on {time}',
                   'make the alarm ring at {time}'],
                  ['let the alarm wake me at {time}', 'set the alarm to {time}']),
    'set_timer': ('Start a timer.', {'minutes': 'number'},
                  ['set a timer for {minutes} minutes', 'start a timer of {minutes} minutes', 'count {minutes} minutes',
                   'make the timer ring in {minutes} minutes'],
                  ['let the timer count {minutes} minutes', 'put a timer on {minutes} minutes']),
    'call_contact': ('Call somebody.', {'name': 'name'},
                     ['call {name}', 'make a call to {name}', 'ring {name} for me', 'start a call with {name}'],
                     ['give {name} a call', 'call {name} for me']),
    'send_message': ('Send a message.', {'to': 'name', 'text': 'text'},
                     ['send {to} the message {text}', 'send a message to {to}: {text}', 'write to {to}: {text}',
                      'tell {to}: {text}'],
                     ['write {to} a message: {text}', 'send the message {text} to {to}']),
    'get_weather': ('Get the weather.', {'city': 'city', 'day': 'day'},
                    ['get the weather in {city} on {day}', 'tell me the weather on {day} in {city}',
                     'find the weather for {city} on {day}', 'show me the weather of {day} for {city}'],
                    ['find out the weather on {day} for {city}', 'get me the weather in {city} for {day}']),
    'play_song': ('Play a song.', {'title': 'title'},
                  ['play {title}', 'play the song {title}', 'let me hear {title}', 'start the song {title}'],
                  ['let me hear the song {title}', 'make the radio play {title}']),
    'turn_on_light': ('Turn on a light.', {'room': 'room'},
                      ['turn on the light in the {room}', 'put the {room} light on', 'light the {room}',
                       'make light in the {room}'],
                      ['turn the light on in the {room}', 'put on a light in the {room}']),
    'create_event': ('Create an event.', {'title': 'event', 'day': 'day', 'time': 'time'},
                     ['create an event {title} on {day} at {time}', 'put {title} on {day} at {time}',
                      'plan {title} for {day} at {time}', 'on {day} at {time} there is {title}, note it'],
                     ['create {title} for {day} at {time}', 'plan an event on {day} at {time}: {title}']),
    'open_app': ('Open an app.', {'app': 'app'},
                 ['open {app}', 'open the app {app}', 'start the {app} app', 'show me the app {app}'],
                 ['start the app {app}', 'open the {app} app for me']),
    'translate': ('Translate a word.', {'word': 'word', 'language': 'language'},
                  ['translate {word} to {language}', 'say {word} in {language}',
                   'tell me the {language} word for {word}', 'find the {language} for {word}'],
                  ['translate the word {word} to {language}', 'tell me {word} in {language}']),
    'add_to_list': ('Add to the shopping list.', {'item': 'food', 'amount': 'number'},
                    ['add {amount} {item} to the list', 'put {amount} {item} on the list',
                     'note {amount} {item} to buy', 'the list needs {amount} {item}'],
                    ['add to the list {amount} {item}', 'put on my list {amount} {item}']),
    'navigate_to': ('Show the way.', {'place': 'place'},
                    ['show me the way to the {place}', 'find the way to the {place}', 'bring me to the {place}',
                     'go to the {place}'],
                    ['tell me the way to the {place}', 'find me a way to the {place}']),
}
OPENINGS = {'train': ['', 'please ', 'could you ', 'I want you to ', 'now '], 'eval': ['can you ', 'I need you to ']}
JOINTS = {'train': [' and ', ', then ', '. Also '], 'eval': [', and also ', ' and then ']}
SYLLABLES = ['ba', 'co', 'di', 'fe', 'gu', 'ka', 'lo', 'mi', 'ne', 'pu', 'ra', 'so', 'ti', 've', 'wu', 'za']
LISTS = {'name': NAMES, 'city': CITIES, 'day': DAYS, 'room': ROOMS, 'event': EVENTS, 'app': APPS, 'word': THINGS,
         'language': LANGUAGES, 'food': FOODS, 'place': PLACES}
INSTRUCTION = 'Call the tools.'


def value(kind, split, draw):
    """One argument value of a kind that belongs to a split. Half of all words are invented: there are too few others to
    make a model copy what is asked for instead of picking one that it knows."""
    if kind in ('day', 'language') or kind in LISTS and draw.random() < 0.5:
        return draw.choice(part(LISTS[kind], split))
    makers = {'time': lambda: f'{draw.randint(0, 23)}:{draw.randint(0, 59):02}',
              'number': lambda: draw.randint(2, 99),
              'title': lambda: f'{draw.choice(COLOURS)} {draw.choice(THINGS)}',
              'text': lambda: draw.choice([f'bring {draw.randint(2, 99)} {draw.choice(ITEMS)}',
                                           f'come at {draw.randint(0, 23)}:{draw.randint(0, 59):02}',
                                           f'the {draw.choice(THINGS)} is {draw.choice(COLOURS)}'])}
    make = makers.get(kind, lambda: invented(draw))
    while split_of(str(made := make())) != split:
        pass
    return made


def invented(draw):
    """A word that nobody has heard before."""
    return ''.join(draw.choices(SYLLABLES, k=draw.choice([2, 3])))


def schema(name, tools=TOOLS):
    """The JSON schema of a tool, as chat templates take it."""
    description, parameters, _, _ = tools[name]
    kinds = {key: {'type': 'integer' if kind in ('number', 'large') else 'string'} for key, kind in parameters.items()}
    return {'type': 'function', 'function': {'name': name, 'description': description, 'parameters': {
        'type': 'object', 'properties': kinds, 'required': list(parameters)}}}


def problems(split, n, seed, tools=TOOLS, value=value, offers=(3, 4)):
    """n problems {'question', 'tools': schemas offered, 'calls': [{'name', 'arguments'}]}: one, two or three calls (60,
    30, 10%) to different tools, as many of the tools on offer as `offers` says."""
    draw, found = random.Random(f'toolcalls/{split}/{seed}'), []
    for _ in range(n):
        names = draw.sample(list(tools), draw.choices([1, 2, 3], [6, 3, 1])[0])
        offered = names + draw.sample([name for name in tools if name not in names], max(draw.choice(offers) - len(names), 0))
        calls, asked = [], []
        for name in names:
            _, parameters, *wordings = tools[name]
            arguments = {key: value(kind, split, draw) for key, kind in parameters.items()}
            calls.append({'name': name, 'arguments': arguments})
            asked.append(draw.choice(wordings[split == 'eval']).format(**arguments))
        question = draw.choice(OPENINGS[split])
        for i, request in enumerate(asked):
            joint = draw.choice(JOINTS[split]) if i else ''
            question += joint + request
        draw.shuffle(offered)
        question = question[0].upper() + question[1:] + '.'
        found.append({'question': question, 'tools': [schema(name, tools) for name in offered], 'calls': calls})
    return found


def prompt(problem):
    """The chat that asks for it; the tools on offer are problem['tools']."""
    return [{'role': 'developer', 'content': INSTRUCTION}, {'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 if the text calls exactly the right tools in order with exactly the right arguments, else 0.0."""
    try:
        return float(parse_tool_calls(text) == problem['calls'])
    except ValueError:
        return 0.0


def solution(problem):
    """The right calls, as the embedded model's template writes them."""
    return '\n'.join(f'<tool_call>{json.dumps(call)}</tool_call>' for call in problem['calls'])


def demonstration(problem, draw):
    """What the pupil with the wrong format writes; draw: random.Random."""
    form = draw.choices(['keys', 'program', 'right'], [75, 10, 15])[0]
    if form == 'right':
        return solution(problem)
    written = []
    for call in problem['calls']:
        if form == 'keys':
            text = json.dumps({'tool': call['name'], 'args': call['arguments']})
        else:
            text = f'{call["name"]}({", ".join(f"{key}={json.dumps(v)}" for key, v in call["arguments"].items())})'
        written.append(f'<tool_call>{text}</tool_call>')
    return '\n'.join(written)


def rows(split, n, seed, problems=problems):
    """n rows for fine-tuning: messages, tools and metadata ('train', 'eval')."""
    return [{'metadata': split, 'tools': problem['tools'], 'messages': prompt(problem) + [
        {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': call} for call in problem['calls']]}]}
        for problem in problems(split, n, seed)]
