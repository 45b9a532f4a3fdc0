"""The process in which a user's reward function runs; data/rewards.py starts it with a file and a name.

It answers each line, a batch {'completions', 'records'} as JSON, with a line: {'values': [number or None],
'trouble': why one of them is None}, {'raised': the function's own error} or {'error': what is wrong with it}.

The file is a module like any other: in sys.modules under its own name, where dataclasses, pickle and
multiprocessing look for it, its folder first on the path, __name__ not '__main__'. Nothing of this project is
imported here: a neighbour of the file may well be called data.py or model.py.
"""
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(path, name):
    requests, answer = connect()
    path = os.path.abspath(path)
    function = find(path, name, answer)
    if function is None:
        return None
    if wrong := wrong_parameters(function, name):
        return answer(error=wrong)
    answer(ready=True)
    for line in requests:
        batch = json.loads(line)
        answer(**call(function, name, path, batch['completions'], batch['records']))


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


def find(path, name, answer):
    """What a file calls `name`; None, and an answer, where it does not load or has none."""
    try:
        module = load(path)
    except BaseException as error:
        return answer(error=f'its file does not load: {explain(error, path)}')
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        return answer(missing=name, public=public)
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
    """Why a function does not take (completions, records), in one line; '' where it does.

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
    return '' if fits else (
        f'{name}{signature} does not take what is given here: write {name}(completions, records), a list of '
        "texts and a list of dicts, in which record['question'], record['answer'] and other columns are; it "
        'returns a number for each')


def call(function, name, path, completions, records):
    """The answer to a batch."""
    if wrong := wrong_parameters(function, name, records[0]):
        return {'error': wrong}
    try:
        values = function(completions, records)
        if hasattr(values, '__next__'):         # a generator or map, which may still raise
            values = list(values)
    except BaseException as error:
        return {'raised': explain(error, path)}
    try:
        values = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return {'error': f'{name} must return one number (or None) for each completion, in a list, not '
                         f'{str(values)[:60]}'}
    if len(values) != len(completions):
        return {'error': f'{name} returned {len(values)} values for {len(completions)} completions'}
    finite = [None if value is None or not math.isfinite(value) else value for value in values]
    strange = [value for value, kept in zip(values, finite) if value is not None and kept is None]
    return {'values': finite, 'trouble': f'{name} returned {strange[0]}' if strange else ''}


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
