"""Requests to a dozen tools of a phone, one to three calls each.

No argument value, opening or wording of an eval row occurs in training. `demonstration` is a scripted noisy
demonstrator, which knows the tool and the values but rarely the format: it writes {"tool": ..., "args": ...}
in three cases of four, in one of ten a function call as in a program, and only else what the template has.
"""
import json
import random
from typing import NamedTuple

from data.chat import parse_tool_calls
from data.tasks.world import APPS, CITIES, COLOURS, DAYS, EVENTS, FOODS, ITEMS, LANGUAGES, NAMES, PLACES
from data.tasks.world import ROOMS, THINGS, lines, part, split_of


class Tool(NamedTuple):
    description: str
    parameters: dict    # name: type of its values
    train: list         # wordings of a request
    eval: list          # those held out


TOOLS = {
    'set_alarm': Tool('Set an alarm.', {'time': 'time'}, lines('''
        set an alarm for {time}
        wake me at {time}
        put the alarm on {time}
        make the alarm ring at {time}
    '''), lines('''
        let the alarm wake me at {time}
        set the alarm to {time}
    ''')),
    'set_timer': Tool('Start a timer.', {'minutes': 'number'}, lines('''
        set a timer for {minutes} minutes
        start a timer of {minutes} minutes
        count {minutes} minutes
        make the timer ring in {minutes} minutes
    '''), lines('''
        let the timer count {minutes} minutes
        put a timer on {minutes} minutes
    ''')),
    'call_contact': Tool('Call somebody.', {'name': 'name'}, lines('''
        call {name}
        make a call to {name}
        ring {name} for me
        start a call with {name}
    '''), lines('''
        give {name} a call
        call {name} for me
    ''')),
    'send_message': Tool('Send a message.', {'to': 'name', 'text': 'text'}, lines('''
        send {to} the message {text}
        send a message to {to}: {text}
        write to {to}: {text}
        tell {to}: {text}
    '''), lines('''
        write {to} a message: {text}
        send the message {text} to {to}
    ''')),
    'get_weather': Tool('Get the weather.', {'city': 'city', 'day': 'day'}, lines('''
        get the weather in {city} on {day}
        tell me the weather on {day} in {city}
        find the weather for {city} on {day}
        show me the weather of {day} for {city}
    '''), lines('''
        find out the weather on {day} for {city}
        get me the weather in {city} for {day}
    ''')),
    'play_song': Tool('Play a song.', {'title': 'title'}, lines('''
        play {title}
        play the song {title}
        let me hear {title}
        start the song {title}
    '''), lines('''
        let me hear the song {title}
        make the radio play {title}
    ''')),
    'turn_on_light': Tool('Turn on a light.', {'room': 'room'}, lines('''
        turn on the light in the {room}
        put the {room} light on
        light the {room}
        make light in the {room}
    '''), lines('''
        turn the light on in the {room}
        put on a light in the {room}
    ''')),
    'create_event': Tool('Create an event.', {'title': 'event', 'day': 'day', 'time': 'time'}, lines('''
        create an event {title} on {day} at {time}
        put {title} on {day} at {time}
        plan {title} for {day} at {time}
        on {day} at {time} there is {title}, note it
    '''), lines('''
        create {title} for {day} at {time}
        plan an event on {day} at {time}: {title}
    ''')),
    'open_app': Tool('Open an app.', {'app': 'app'}, lines('''
        open {app}
        open the app {app}
        start the {app} app
        show me the app {app}
    '''), lines('''
        start the app {app}
        open the {app} app for me
    ''')),
    'translate': Tool('Translate a word.', {'word': 'word', 'language': 'language'}, lines('''
        translate {word} to {language}
        say {word} in {language}
        tell me the {language} word for {word}
        find the {language} for {word}
    '''), lines('''
        translate the word {word} to {language}
        tell me {word} in {language}
    ''')),
    'add_to_list': Tool('Add to the shopping list.', {'item': 'food', 'amount': 'number'}, lines('''
        add {amount} {item} to the list
        put {amount} {item} on the list
        note {amount} {item} to buy
        the list needs {amount} {item}
    '''), lines('''
        add to the list {amount} {item}
        put on my list {amount} {item}
    ''')),
    'navigate_to': Tool('Show the way.', {'place': 'place'}, lines('''
        show me the way to the {place}
        find the way to the {place}
        bring me to the {place}
        go to the {place}
    '''), lines('''
        tell me the way to the {place}
        find me a way to the {place}
    ''')),
}
OPENINGS = {'train': ['', 'please ', 'could you ', 'I want you to ', 'now '], 'eval': ['can '
                                                                                       'you ', 'I need you '
                                                                                               'to ']}
JOINTS = {'train': [' and ', ', then ', '. Also '], 'eval': [', and also ', ' and then ']}
SYLLABLES = 'ba co di fe gu ka lo mi ne pu ra so ti ve wu za'.split()
LISTS = {
    'name': NAMES,
    'city': CITIES,
    'day': DAYS,
    'room': ROOMS,
    'event': EVENTS,
    'app': APPS,
    'word': THINGS,
    'language': LANGUAGES,
    'food': FOODS,
    'place': PLACES,
}
INSTRUCTION = 'Call the tools.'
# how the demonstrator writes its calls, and how often: with wrong keys, as in a program, as the template does
FORMS, FORM_WEIGHTS = ['keys', 'program', 'right'], [75, 10, 15]


# ---- values

def draw_time(draw):
    return f'{draw.randint(0, 23)}:{draw.randint(0, 59):02}'


def draw_text(draw):
    """All three are drawn, and one of them taken."""
    return draw.choice([
        f'bring {draw.randint(2, 99)} {draw.choice(ITEMS)}',
        f'come at {draw_time(draw)}',
        f'the {draw.choice(THINGS)} is {draw.choice(COLOURS)}',
    ])


def draw_value(type, draw):
    if type == 'time':
        return draw_time(draw)
    if type == 'number':
        return draw.randint(2, 99)
    if type == 'title':
        return f'{draw.choice(COLOURS)} {draw.choice(THINGS)}'
    if type == 'text':
        return draw_text(draw)
    return invented(draw)


def invented(draw):
    """A word that nobody has heard before."""
    return ''.join(draw.choices(SYLLABLES, k=draw.choice([2, 3])))


def of_split(split, draw_one):
    """The first of the values that draw_one() gives which belongs to the split."""
    value = draw_one()
    while split_of(str(value)) != split:
        value = draw_one()
    return value


def value(type, split, draw):
    """One argument value of a type that belongs to a split.

    Half of all words are invented: there are too few others to make a model copy what is asked for instead of
    choosing one that it knows.
    """
    if type in ('day', 'language') or type in LISTS and draw.random() < 0.5:
        return draw.choice(part(LISTS[type], split))
    return of_split(split, lambda: draw_value(type, draw))


# ---- problems

def schema(name, tools=TOOLS):
    """The JSON schema of a tool, as chat templates take it."""
    properties = {}
    for key, type in tools[name].parameters.items():
        properties[key] = {'type': 'integer' if type in ('number', 'large') else 'string'}
    parameters = {'type': 'object', 'properties': properties, 'required': list(properties)}
    function = {'name': name, 'description': tools[name].description, 'parameters': parameters}
    return {'type': 'function', 'function': function}


def problems(split, n, seed, tools=TOOLS, value=value, offers=(3, 4)):
    """n problems {'question', 'tools': schemas on offer, 'calls': [{'name', 'arguments'}]}.

    One, two or three calls (60, 30, 10%) to different tools, as many of the tools on offer as `offers` says.
    """
    draw = random.Random(f'toolcalls/{split}/{seed}')
    made = []
    for _ in range(n):
        num_calls = draw.choices([1, 2, 3], [6, 3, 1])[0]
        names = draw.sample(list(tools), num_calls)
        others = [name for name in tools if name not in names]
        num_others = max(draw.choice(offers) - num_calls, 0)
        offered = names + draw.sample(others, num_others)
        calls, requests = [], []
        for name in names:
            tool = tools[name]
            arguments = {key: value(type, split, draw) for key, type in tool.parameters.items()}
            calls.append({'name': name, 'arguments': arguments})
            wording = draw.choice(tool.train if split == 'train' else tool.eval)
            requests.append(wording.format(**arguments))
        question = draw.choice(OPENINGS[split]) + requests[0]
        for request in requests[1:]:
            question += draw.choice(JOINTS[split]) + request
        question = question[0].upper() + question[1:] + '.'
        draw.shuffle(offered)
        schemas = [schema(name, tools) for name in offered]
        made.append({'question': question, 'tools': schemas, 'calls': calls})
    return made


def prompt(problem):
    """The chat that asks for the calls; the tools on offer are problem['tools']."""
    return [{'role': 'developer', 'content': INSTRUCTION}, {'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 if the text calls exactly the right tools in order with exactly the right arguments, else 0.0."""
    try:
        return float(parse_tool_calls(text) == problem['calls'])
    except ValueError:
        return 0.0


def write(calls):
    """Calls, each as text, as the embedded model's template writes them."""
    return '\n'.join(f'<tool_call>{call}</tool_call>' for call in calls)


def solution(problem):
    """The right calls."""
    return write(map(json.dumps, problem['calls']))


def demonstration(problem, draw):
    """What the noisy demonstrator writes; draw: random.Random."""
    form = draw.choices(FORMS, FORM_WEIGHTS)[0]
    if form == 'right':
        return solution(problem)
    calls = []
    for call in problem['calls']:
        name, arguments = call['name'], call['arguments']
        if form == 'keys':
            calls.append(json.dumps({'tool': name, 'args': arguments}))
        else:
            words = [f'{key}={json.dumps(value)}' for key, value in arguments.items()]
            calls.append(f'{name}({", ".join(words)})')
    return write(calls)


def rows(split, n, seed, problems=problems):
    """n rows for fine-tuning: messages, tools and metadata ('train', 'eval')."""
    made = []
    for problem in problems(split, n, seed):
        calls = [{'type': 'function', 'function': call} for call in problem['calls']]
        answer = {'role': 'assistant', 'tool_calls': calls}
        made.append({'metadata': split, 'tools': problem['tools'], 'messages': [*prompt(problem), answer]})
    return made
