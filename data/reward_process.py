"""The process in which a user's reward function runs; data/rewards.py starts it with a file and a name.

It answers each line, a batch {'completions', 'records'} as JSON, with a line: {'values': [number or None],
'trouble': why one of them is None}, {'raised': the function's own error} or {'error': what is wrong with it}.

What is awaited (async def) keeps to the time by itself: each sample alone may take `timeout` seconds, and
`concurrency` of them are in flight at once.

The file is a module like any other: in sys.modules under its own name, where dataclasses, pickle and
multiprocessing look for it, its folder first on the path, __name__ not '__main__'. Nothing of this project is
imported here: a neighbour of the file may well be called data.py or model.py.
"""
import asyncio
import contextlib
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE_SAMPLE = ['completion', 'record']       # the arguments of a function that scores one, not a batch


def main(path, name, timeout, concurrency):
    requests, answer = connect()
    path = os.path.abspath(path)
    function = find(path, name, wrong_parameters, answer)
    if function is None:
        return
    timeout, concurrency = float(timeout), int(concurrency)
    loop = event_loop(concurrency)
    by_sample, is_async = takes_a_sample(function), is_coroutine(function)
    answer(is_async=is_async, one_by_one=by_sample and not is_async)

    def score(completions, records):
        if is_async:
            task = each if by_sample else whole
            return loop.run_until_complete(task(function, completions, records, timeout, concurrency))
        if by_sample:
            return list(map(function, completions, records))
        values = function(completions, records)
        if inspect.isawaitable(values):             # of a decorator around an async def
            values = loop.run_until_complete(values)
        return list(values) if hasattr(values, '__next__') else values      # a generator, which may raise

    for line in requests:
        batch = json.loads(line)
        wrong = wrong_parameters(function, name, batch['records'][0])
        answer(**{'error': wrong} if wrong else answer_to(score, name, path, **batch))


def connect():
    """(lines that come in, answer(**fields), which sends a line)."""
    requests = os.fdopen(os.dup(0), encoding='utf-8')
    answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)        # the function may neither read requests
    os.dup2(2, 1)                           # nor print into the answers: that goes to the console

    def answer(**fields):
        answers.write(json.dumps(fields) + '\n')
        answers.flush()

    return requests, answer


def event_loop(concurrency):
    """One for all batches: a client that is kept open belongs to it."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(concurrency))      # of to_thread: else 6 on two cores
    return loop


def find(path, name, wrong, answer):
    """What a file calls `name`; None, and an answer, where it does not load, has none, or wrong(it, name)
    says why it will not do."""
    try:
        module = load(path)
    except BaseException as error:
        return answer(error=f'its file does not load: {explain(error, path)}')
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        return answer(missing=name, public=public)
    if problem := wrong(function, name):
        return answer(error=problem)
    return function


def load(path):
    """The module that a file is. Raises what the file raises."""
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules or name in sys.stdlib_module_names:      # random.py must not replace Python's own
        name = f'reward_{name}'
    sys.path[:1] = [os.path.dirname(path), os.getcwd(), ROOT]       # ROOT: it may use data.rewards
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def wrong_parameters(function, name, columns=()):
    """Why a function takes neither (completions, records) nor (completion, record), in one line; '' where it
    does.

    TRL calls a reward by keywords: prompts, completions, and each column of the rows. Called by position such
    a one would take one thing for another. columns: of the rows; a parameter called like one wants only that.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):             # of what is written in C
        return ''
    try:
        first, *rest = signature.bind([], []).arguments         # their names; of *args only that one
    except TypeError:
        fits = False
    else:
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        by_keyword = inspect.Parameter.VAR_KEYWORD in kinds or rest and rest[0] in {'completions', *columns}
        fits = first not in ('prompts', 'records') and (rest == ['records'] or not by_keyword)
        names = [first, *rest]
        fits = names == ONE_SAMPLE or fits and not {*names} & {*ONE_SAMPLE}     # a mixture would be a guess
    return '' if fits else (
        f'{name}{signature} does not take what is given here: write {name}(completions, records), a list of '
        "texts and a list of dicts, in which record['question'], record['answer'] and other columns are; it "
        f'returns a number for each. Or {name}(completion, record), of one sample, which returns its number')


def takes_a_sample(function):
    """Whether it is function(completion, record), not of a batch."""
    try:
        return list(inspect.signature(function).bind('', {}).arguments) == ONE_SAMPLE
    except (TypeError, ValueError):
        return False


def is_coroutine(function):
    """Whether it, or the __call__ of the object that it is, was written with async def."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


async def whole(function, completions, records, timeout, concurrency):
    """What an async function returns for a batch; where that raises or takes too long, for each sample alone:
    only those at fault are lost."""
    if len(completions) > 1:
        with contextlib.suppress(Exception):
            return await asyncio.wait_for(function(completions, records), timeout)

    async def alone(completion, record):
        value, = await function([completion], [record])
        return value

    return await each(alone, completions, records, timeout, concurrency)


async def each(function, completions, records, timeout, concurrency):
    """What an async function(completion, record) returns for each sample, or the exception that it raises."""
    free = asyncio.Semaphore(concurrency)

    async def one(completion, record):
        async with free:
            try:
                return await asyncio.wait_for(function(completion, record), timeout)
            except asyncio.TimeoutError as error:       # its own, or that of wait_for, which says nothing
                raise TimeoutError(str(error) or f'no answer within {timeout:g} s (reward_timeout)')

    return await asyncio.gather(*map(one, completions, records), return_exceptions=True)


def answer_to(score, name, path, completions, records):
    """The answer to a batch, by score(completions, records)."""
    try:
        values = score(completions, records)
    except BaseException as error:
        return {'raised': explain(error, path)}
    troubles = []                               # why one has no score
    try:
        numbers = []
        for value in values:
            if isinstance(value, BaseException):
                troubles.append(explain(value, path))
                value = None
            numbers.append(None if value is None else float(value))
    except (TypeError, ValueError):
        return {'error': f'{name} must return one number (or None) for each completion, in a list, not '
                         f'{str(values)[:60]}'}
    if len(numbers) != len(completions):
        return {'error': f'{name} returned {len(numbers)} values for {len(completions)} completions'}
    for i, number in enumerate(numbers):
        if number is not None and not math.isfinite(number):
            troubles.append(f'{name} returned {number}')
            numbers[i] = None
    return {'values': numbers, 'trouble': troubles[0] if troubles else ''}


def explain(error, path):
    """An exception in one line: the file and line where it came from, its name and message."""
    file, line, message = path, None, ' '.join(str(error).split())
    for frame in traceback.extract_tb(error.__traceback__):     # the last one in the file or beside it
        if os.path.dirname(frame.filename) == os.path.dirname(path):
            file, line = frame.filename, frame.lineno
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ''):
        file, line, message = error.filename, error.lineno, error.msg
    where = f'{file} line {line}' if line else file
    return f'{where}: {type(error).__name__}: {message}'


if __name__ == '__main__':
    main(*sys.argv[1:])
