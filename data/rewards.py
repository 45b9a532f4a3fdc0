"""Rewards that can be verified: of a completion's text against the record of its problem, each by name and with a weight.

    exact               1 where the answer is the record's: as numbers where both are ("$1,080.00" is "1080", "0.5" is "1/2")
    number              1 where the answer is a number
    tags                a quarter for each of <think> </think> <answer> </answer> that is there exactly once and in order
    length              0 up to max_completion_length less a buffer, then down to -1 (DAPO, arXiv 2503.14476, eq. 13)
    task                what the embedded task itself says, 1 or 0
    model               a reward model's opinion, which the caller brings
    path.py:function    yours: function(completions, records) -> a number each; None: this one has no score

A function of yours runs in a process of its own: where it raises or hangs, that sample is unscored, which is not 0: it leaves the
batch, and is counted. torch is not imported.
"""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

from configurator import UserError, closest

WEIGHTS = {'exact': 2.0, 'number': 0.5, 'tags': 0.5, 'length': 1.0, 'task': 1.0, 'model': 1.0}       # unless reward_weights says otherwise
TAGS = ('<think>', '</think>', '<answer>', '</answer>')
MAX_HANGS = 3                       # samples of one batch after whose time-outs the rest is left unscored
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- answers ----------------------------------------------------------------------------------------------------------------

def extract_answer(text):
    """What a text gives as its answer: the last <answer>...</answer>, else the last \\boxed{...}, else what follows the last ####;
    without any of these all of it."""
    found = re.findall(r'<answer>((?:(?!<answer>).)*?)</answer>', text, re.DOTALL)
    if found:
        text = found[-1]
    if '\\boxed{' in text:
        inside, depth = text[text.rindex('\\boxed{') + 7:], 1
        for end, character in enumerate(inside):
            depth += (character == '{') - (character == '}')
            if depth == 0:
                return inside[:end].strip()
    return text.rpartition('####')[2].strip()


def as_number(text):
    """The number that a text writes, exactly (a Fraction), or None: signs, thousands' commas, decimals, exponents, a/b and \\frac{a}{b},
    mixed 1 1/2, with or without currency, percent sign (left out, not divided by), full stop, $ and LaTeX spaces around it."""
    text = plain(text)
    if len(text) > 100:
        return None
    text = re.sub(r'^([+-]?)[$€£¥]|[$€£¥%]$', r'\1', text).strip()
    text = re.sub(r'^([+-]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}$', r'\1\2/\3', text)
    digits = r'(?:\d{1,3}(?:,\d{3})+|\d+)'
    if match := re.fullmatch(rf'([+-]?)({digits}) ({digits})/({digits})', text):
        sign, whole, a, b = match[1], *(int(part.replace(',', '')) for part in match.groups()[1:])
        return None if b == 0 else (-1 if sign == '-' else 1) * (whole + Fraction(a, b))
    if match := re.fullmatch(rf'([+-]?{digits}) ?/ ?([+-]?{digits})', text):
        a, b = (int(part.replace(',', '')) for part in match.groups())
        return None if b == 0 else Fraction(a, b)
    if re.fullmatch(rf'[+-]?(?:{digits}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{{1,2}})?', text):
        return Fraction(text.replace(',', ''))
    return None


def plain(text):
    """A short answer without what does not change it: case, spaces, a final full stop, LaTeX around it, typographic signs."""
    text = text.strip().replace('\u2212', '-').replace('\u2013', '-').replace('\\$', '$').replace('\\%', '%').replace('{,}', ',')
    text = re.sub(r'\\[,;!: ]|\u00a0', ' ', text)
    for opening, closing in (('\\(', '\\)'), ('\\[', '\\]'), ('$', '$')):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening):-len(closing)].strip()
    text = re.sub(r'\\(?:text|mathrm|mathbf)\{([^{}]*)\}', r'\1', text)
    return re.sub(r'\s+', ' ', text).strip().removesuffix('.').strip()


def same_answer(given, wanted):
    """Whether two answers are the same: as numbers where both are, else as text but for case and spaces."""
    a, b = as_number(given), as_number(wanted)
    if a is not None and b is not None:
        return a == b
    return plain(given).casefold() == plain(wanted).casefold() != ''


# ---- rewards by name --------------------------------------------------------------------------------------------------------

def exact(completions, records):
    return [float(same_answer(extract_answer(text), extract_answer(record['answer']))) for text, record in zip(completions, records)]


def number(completions, records):
    return [float(as_number(extract_answer(text)) is not None) for text in completions]


def tags(completions, records):
    scores = []
    for text in completions:
        places = [text.find(tag) for tag in TAGS]
        once = [text.count(tag) == 1 and all(place < places[i] for place in places[:i]) for i, tag in enumerate(TAGS)]
        behind = len(text) - places[3] - len(TAGS[3]) if once[3] else 0
        scores.append(max(0.0, sum(once) / 4 - 0.002 * behind))
    return scores


def length_penalty(length, longest, buffer):
    """0 up to longest - buffer tokens, from there linear to -1 at `longest`."""
    return -min(1.0, max(0, length - (longest - buffer)) / buffer)


BUILT_IN = {'exact': exact, 'number': number, 'tags': tags}


class Scorer:
    """Rewards by name and weight, for batches of completions.

    names     of the list above; a user's function is path.py:function
    weights   one each, or empty: WEIGHTS, and 1 for a user's function
    task      the module of an embedded task, where there is one
    longest, buffer   tokens, for `length`
    timeout   seconds that a user's function may take for a batch

    UserError at once: an unknown name, a file or function that is not there or does not load, weights that do not fit.
    """

    def __init__(self, names, weights=(), task=None, longest=0, buffer=0, timeout=10.0):
        if len(set(names)) < len(names):
            raise UserError(f'rewards: {next(n for n in names if list(names).count(n) > 1)} is there twice; give it another weight instead')
        if weights and len(weights) != len(names):
            raise UserError(f'reward_weights has {len(weights)} values for the {len(names)} rewards {", ".join(names)}')
        if weights and not any(weights):
            raise UserError('reward_weights are all 0: nothing would be rewarded')
        self.names, self.task, self.longest, self.buffer, self.timeout = list(names), task, longest, buffer, timeout
        self.weights = list(weights) or [WEIGHTS.get(name, 1.0) for name in names]
        self.servers, self.last_error = {}, ''
        for name in names:
            if ':' in name:
                self.servers[name] = Server(name, timeout)
            elif name == 'task' and task is None:
                raise UserError('rewards: task is the reward of an embedded task; for data sets use exact, number, tags, length or '
                                'path.py:function')
            elif name not in WEIGHTS:
                raise UserError(f'rewards: {name!r} is none of {", ".join(WEIGHTS)}{closest(name, WEIGHTS)}, nor path.py:function')

    def __call__(self, completions, records, lengths, columns=()):
        """Lists of texts, problems (dicts) and numbers of tokens -> [{name: number or None}], None where a reward gave no score.
        columns: {name: numbers} of rewards that were computed elsewhere."""
        columns = dict(columns)
        columns.update((name, self.column(name, completions, records, lengths)) for name in self.names if name not in columns)
        return [{name: columns[name][i] for name in self.names} for i in range(len(completions))]

    def column(self, name, completions, records, lengths):
        if name == 'task':
            return [self.task.reward(record, text) for text, record in zip(completions, records)]
        if name == 'length':
            return [length_penalty(n, self.longest, self.buffer) for n in lengths]
        if name in BUILT_IN:
            return BUILT_IN[name](completions, records)
        values = self.servers[name](completions, records)
        self.last_error = self.servers[name].last_error or self.last_error
        return values

    def total(self, scores):
        """The weighted sum of {name: number}, None where one of them has none."""
        if any(value is None for value in scores.values()):
            return None
        return sum(weight * scores[name] for name, weight in zip(self.names, self.weights))

    def close(self):
        for server in self.servers.values():
            server.stop()


# ---- a user's function, in its own process ----------------------------------------------------------------------------------

class Server:
    """path.py:function in a process that is killed where it hangs. Lines of JSON go to it and come back."""

    def __init__(self, name, timeout):
        self.path, _, self.function = name.rpartition(':')
        self.name, self.timeout, self.last_error, self.process = name, timeout, '', None
        if not self.path.endswith('.py') or not self.function.isidentifier():
            raise UserError(f'rewards: {name!r}: write path.py:function')
        if not os.path.isfile(self.path):
            raise UserError(f'rewards: {name}: no file {self.path}')
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, '-c', 'import sys; from data.rewards import serve; serve(*sys.argv[1:])', self.path, self.function],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding='utf-8',
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [ROOT, os.environ.get('PYTHONPATH')]))})
        hello = self.read(60)
        if hello is None or 'error' in hello:
            self.stop()
            raise UserError(f'rewards: {self.name}: {hello["error"] if hello else "its file does not finish loading"}')

    def read(self, timeout):
        """The next line as an object; None where none came in time or the process ended."""
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        return json.loads(line) if line else None

    def ask(self, completions, records):
        """Values for a batch, or None where it raised or hung (last_error says which)."""
        if self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps({'completions': completions, 'records': records}) + '\n')
            self.process.stdin.flush()
            answer = self.read(self.timeout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.stop()
            self.last_error = f'no answer within {self.timeout:g} s (reward_timeout), or its process ended'
        elif 'raised' in answer:
            self.last_error = answer['raised']
        elif 'error' in answer:
            self.stop()
            raise UserError(f'rewards: {self.name}: {answer["error"]}')
        else:
            return answer['values']
        return None

    def __call__(self, completions, records):
        values = self.ask(completions, records) if completions else []
        if values is not None:
            return values
        values, hangs = [], 0           # one at a time, to lose only those at fault
        for text, record in zip(completions, records):
            found = self.ask([text], [record]) if hangs < MAX_HANGS else None
            hangs += found is None and self.process.poll() is not None
            values.append(found[0] if found else None)
        return values

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()


def serve(path, name):
    """The process of a Server: loads the function, then answers {'completions', 'records'} with {'values'}, {'raised'} or {'error'}."""
    pipe = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)                                   # what the function prints goes to the console, not into the pipe

    def answer(**fields):
        pipe.write(json.dumps(fields) + '\n')
        pipe.flush()

    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))      # it may import its neighbours
        spec = importlib.util.spec_from_file_location('reward', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except BaseException as error:
        return answer(error=f'its file does not load ({type(error).__name__}: {error})')
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        return answer(error=f'{path} has no function {name}{closest(name, there)}')
    answer(ready=True)
    for line in sys.stdin:
        batch = json.loads(line)
        try:
            values = function(batch['completions'], batch['records'])
        except BaseException as error:
            answer(raised=f'{type(error).__name__}: {error}')
            continue
        try:
            values = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            answer(error=f'{name} must return one number (or None) for each completion, in a list, not {str(values)[:60]}')
            continue
        if len(values) != len(batch['completions']):
            answer(error=f'{name} returned {len(values)} values for {len(batch["completions"])} completions')
            continue
        answer(values=[value if value is None or math.isfinite(value) else None for value in values])
