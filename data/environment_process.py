"""The process in which a user's environment runs; data/environments.py starts it with a file and a class.

It answers each line, {'begin': whether episodes begin, 'moves': [[episode, its problem or a text], ...]} as
JSON, with a line for each move as it is done: {'episode', 'answer': [messages, reward, done]}, {'episode',
'raised': the class's own error} or {'error': what is wrong with the class}.

Moves are made one after another, in their order; those of an `async def` side by side, `concurrency` at once,
each in `timeout` seconds. As in reward_process.py the file is a module like any other, and nothing of this
project is imported.
"""
import asyncio
import inspect
import json
import math
import os
import sys

from reward_process import connect, event_loop, explain, find

ROLES = {'reset': ('system', 'developer', 'user', 'assistant', 'tool'), 'step': ('user', 'tool')}
FORMS = {'reset': 'a list of messages', 'step': '(messages, reward, done)'}


def main(path, name, timeout, concurrency):
    requests, answer = connect()
    path = os.path.abspath(path)
    cls = find(path, name, wrong_class, answer)
    if cls is None:
        return
    try:
        answer(tools=getattr(cls, 'tools', None))
    except (TypeError, ValueError) as error:
        answer(error=f'{name}.tools are no JSON: {error}')
        return
    timeout, concurrency = float(timeout), int(concurrency)
    loop, episodes = event_loop(concurrency), {}

    async def move(episode, what, free):
        method = 'reset' if isinstance(what, dict) else 'step'
        async with free:
            try:
                if method == 'reset':
                    episodes[episode] = cls()
                value = getattr(episodes[episode], method)(what)
                if inspect.isawaitable(value):
                    value = await asyncio.wait_for(value, timeout)
            except asyncio.TimeoutError as error:       # of wait_for, which says nothing, or its own
                reason = str(error) or f'no answer within {timeout:g} s (env_timeout)'
                return answer(episode=episode, raised=f'{name}.{method}: {reason}')
            except BaseException as error:
                return answer(episode=episode, raised=explain(error, path))
        fields = checked(value, f'{name}.{method}', method)
        if fields.get('answer', [None, None, True])[2]:
            del episodes[episode]
        try:
            answer(episode=episode, **fields)
        except (TypeError, ValueError) as error:
            answer(error=f'{name}.{method} returned what is no JSON: {error}')

    async def all_of(moves):
        free = asyncio.Semaphore(concurrency)
        await asyncio.gather(*[move(*pair, free) for pair in moves])

    for line in requests:
        request = json.loads(line)
        if request['begin']:
            episodes.clear()                # those that were cut off are over, too
        loop.run_until_complete(all_of(request['moves']))


def wrong_class(cls, name):
    """Why it is no environment, in one line; '' where it is one."""
    form = (f'write class {name} with reset(self, problem) -> messages and step(self, text) -> (messages, '
            'reward, done)')
    if not inspect.isclass(cls):
        return f'{name} is no class: {form}'
    reset, step = getattr(cls, 'reset', None), getattr(cls, 'step', None)
    for what, function, arguments in ((name, cls, ()), (f'{name}.reset', reset, (cls, {})),
                                      (f'{name}.step', step, (cls, ''))):
        if function is None:
            return f'there is no {what}: {form}'
        try:
            signature = inspect.signature(function)
            signature.bind(*arguments)
        except TypeError:
            return f'{what}{signature} does not take what is given here: {form}'
        except ValueError:              # written in C
            continue
    return ''


def checked(value, what, method):
    """What reset or step returned -> {'answer': [messages, reward, done]} or {'error': what is wrong}; a
    reward that is no number is None."""
    messages, reward, done = value, 0.0, False
    if method == 'step':
        try:
            messages, reward, done = value
        except (TypeError, ValueError):
            return {'error': f'{what} must return {FORMS[method]}, not {str(value)[:60]}'}
    problem = wrong_messages(messages, ROLES[method])
    if method == 'reset' and not messages:
        problem = problem or 'there are none'
    if type(done).__name__ not in ('bool', 'bool_'):        # NumPy's, too
        problem = problem or f'done must be True or False, not {str(done)[:60]}'
    elif method == 'step' and not done and not messages:
        problem = problem or 'there are no messages, and it is not done: what shall the policy answer?'
    try:
        reward = None if reward is None else float(reward)
    except (TypeError, ValueError):
        problem = problem or f'the reward must be a number (or None), not {str(reward)[:60]}'
    if problem:
        return {'error': f'{what} must return {FORMS[method]}: {problem}'}
    # half a character, which a model can write as \ud800 within JSON, is nothing that a tokenizer takes
    messages = [{**message, 'content': message['content'].encode(errors='replace').decode()}
                for message in messages]
    finite = reward is None or math.isfinite(reward)
    fields = {'answer': [messages, reward if finite else None, bool(done)]}
    return fields if finite else {**fields, 'trouble': f'{what} returned the reward {reward}'}


def wrong_messages(messages, roles):
    """Why they are no messages of these roles; '' where they are."""
    if not isinstance(messages, list):
        return f'messages must be a list, not {str(messages)[:60]}'
    for message in messages:
        fits = isinstance(message, dict) and message.get('role') in roles
        if not fits or not isinstance(message.get('content'), str):
            return (f'a message is {{"role": ..., "content": text}} with a role of {", ".join(roles)}, not '
                    f'{str(message)[:60]}')
    return ''


if __name__ == '__main__':
    main(*sys.argv[1:])
