"""Rewards that can be verified, by name and weight: of a completion's text against its problem's record.

    exact               1 where the answer is the record's: as numbers where both are ("$1,080.00" is "1080")
    number              1 where the answer is a number
    tags                a quarter for each of <think> </think> <answer> </answer>, once and in order
    length              0 up to max_completion_length less a buffer, then down to -1
                        (DAPO, arXiv 2503.14476, eq. 13)
    task                the reward of the embedded task itself, 1 or 0
    model               the score of a reward model, which the caller brings
    env                 the sum over an episode, by a user's environment, likewise
    path.py:function    yours: function(completions, records) -> a number each; None: this one has no score.
                        Or function(completion, record) -> the number of one sample

A function of yours runs in a process of its own: where it raises or hangs, that sample is unscored, which is
not 0: it leaves the batch, and is counted. Several functions are asked at the same time. One that waits for
others is written with async def: async function(completion, record) judges `concurrency` samples side by side
(recipes/rewards/judge.py), and one of a batch is awaited as it is. torch is not imported.
"""
import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from configurator import UserError, closest
from data.answers import as_number, extract_answer, same_answer

# unless reward_weights says otherwise
WEIGHTS = {'exact': 2.0, 'number': 0.5, 'tags': 0.5, 'length': 1.0, 'task': 1.0, 'model': 1.0,
           'env': 1.0}
TAGS = ('<think>', '</think>', '<answer>', '</answer>')
MAX_HANGS = 3                       # samples of one batch after whose time-outs the rest is left unscored
PROCESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reward_process.py')


# ---- rewards by name: (completions, records) -> a number each

def exact(completions, records):
    scores = []
    for text, record in zip(completions, records):
        scores.append(float(same_answer(extract_answer(text), extract_answer(record['answer']))))
    return scores


def number(completions, records):
    return [float(as_number(extract_answer(text)) is not None) for text in completions]


def tags(completions, records):
    return [tag_score(text) for text in completions]


def tag_score(text):
    """A quarter for each tag that is there once and in order, less 0.002 a character after the last one."""
    positions = [text.find(tag) for tag in TAGS]
    good = []
    for i, tag in enumerate(TAGS):
        in_order = all(position < positions[i] for position in positions[:i])
        good.append(in_order and text.count(tag) == 1)
    after = len(text) - positions[-1] - len(TAGS[-1]) if good[-1] else 0
    return max(0.0, sum(good) / 4 - 0.002 * after)


def length_penalty(length, longest, buffer):
    """0 up to longest - buffer tokens, from there linear to -1 at `longest`."""
    return -min(1.0, max(0, length - (longest - buffer)) / buffer)


def short_names(names):
    """{name: what logs and pages call it}: a user's function without folders, where that is still its own."""
    short = [os.path.basename(name) for name in names]
    return {name: end if short.count(end) == 1 else name for name, end in zip(names, short)}


BUILT_IN = {'exact': exact, 'number': number, 'tags': tags}


class Scorer:
    """Rewards by name and weight, for batches of completions.

    names     of the list above; a user's function is path.py:function
    weights   one each, or empty: WEIGHTS, and 1 for a user's function
    task      the module of an embedded task, where there is one
    longest, buffer   tokens, for `length`
    timeout   seconds that a user's function may take for a batch; an async one for each sample
    concurrency   samples that an async function judges side by side
    environment   data.environments.Environment, whose reward is `env`

    UserError at once: an unknown name, a file or function that is not there or does not load, weights that do
    not fit.
    """

    def __init__(self, names, weights=(), task=None, longest=0, buffer=0, timeout=10.0, concurrency=32,
                 environment=None):
        for name in names:
            if list(names).count(name) > 1:
                raise UserError(f'rewards: {name} is there twice; give it another weight instead')
        if weights and len(weights) != len(names):
            raise UserError(f'reward_weights has {len(weights)} values for the {len(names)} rewards '
                            f'{", ".join(names)}')
        if weights and not any(weights):
            raise UserError('reward_weights are all 0: nothing would be rewarded')
        self.names = list(names)
        self.weights = list(weights) or [WEIGHTS.get(name, 1.0) for name in names]
        self.task, self.environment = task, environment
        self.longest, self.buffer = longest, buffer
        self.servers = {}           # of users' functions, by name
        self.last_error, self.has_said_error = '', False
        for name in names:
            if ':' in name:
                self.servers[name] = Server(name, timeout, concurrency)
            elif name == 'task' and task is None:
                raise UserError('rewards: task is the reward of an embedded task; for data sets use exact, '
                                'number, tags, length or path.py:function')
            elif name == 'env' and environment is None:
                raise UserError('rewards: env is the reward of an environment: --env=path.py:Env')
            elif name not in WEIGHTS:
                raise UserError(f'rewards: {name!r} is none of {", ".join(WEIGHTS)}{closest(name, WEIGHTS)}, '
                                'nor path.py:function')

    def __call__(self, completions, records, lengths, columns=()):
        """Lists of texts, problems (dicts) and numbers of tokens -> [{name: number or None}], None where a
        reward gave no score. columns: {name: numbers} of rewards that were computed elsewhere."""
        columns = dict(columns)
        if self.environment and self.environment.last_error:
            self.last_error = f'env: {self.environment.last_error}'
        with ThreadPoolExecutor(max(1, len(self.servers))) as pool:     # users' functions, all at once
            asked = {name: pool.submit(server, completions, records) for name, server in self.servers.items()}
            for name in self.names:
                if name not in columns and name not in asked:
                    columns[name] = self.column(name, completions, records, lengths)
        for name, answer in asked.items():
            columns[name] = answer.result()
            if error := self.servers[name].last_error:
                self.last_error = f'{name}: {error}'
        return [{name: columns[name][i] for name in self.names} for i in range(len(completions))]

    def column(self, name, completions, records, lengths):
        """A reward of the list above, for all completions."""
        if name == 'task':
            return list(map(self.task.reward, records, completions))
        if name == 'length':
            return [length_penalty(length, self.longest, self.buffer) for length in lengths]
        return BUILT_IN[name](completions, records)

    def total(self, scores):
        """The weighted sum of {name: number}, None where one of them has none."""
        if any(value is None for value in scores.values()):
            return None
        return sum(weight * scores[name] for name, weight in zip(self.names, self.weights))

    def explain_missing(self, columns):
        """Which rewards of {name: (N,) numbers, NaN for none} gave none, and the last error of a function."""
        reasons = []
        for name, column in columns.items():
            if n := sum(value != value for value in column):
                reasons.append(f'{name} gave no number (None, NaN or an error) for {n} of {len(column)}')
        return '; '.join(filter(None, (*reasons, self.last_error)))

    def note_missing(self, columns):
        """explain_missing, once: '' before a function has failed, and after the first time."""
        if self.has_said_error or not self.last_error:
            return ''
        self.has_said_error = True
        return self.explain_missing(columns)

    def close(self):
        for server in filter(None, (*self.servers.values(), self.environment)):
            server.stop()


# ---- a user's function, in its own process

class Server:
    """path.py:function in a process that is killed where it hangs. Lines of JSON go to it and come back."""
    flag, script, kind = 'rewards', PROCESS, 'function'     # for a class: data/environments.py

    def __init__(self, name, timeout, concurrency=32):
        self.name, self.timeout, self.concurrency = name, timeout, concurrency
        self.path, _, self.function = name.rpartition(':')
        self.last_error = ''
        self.process = None
        if not self.path.endswith('.py') or not self.function.isidentifier():
            raise UserError(f'{self.flag}: {name!r}: write path.py:{self.kind}')
        if not os.path.isfile(self.path):
            raise UserError(f'{self.flag}: {name}: no file {self.path}')
        atexit.register(self.stop)
        self.start()

    def start(self):
        # in a session of its own, so that Ctrl-C reaches only the run, which saves first
        self.process = subprocess.Popen(
            [sys.executable, self.script, self.path, self.function, *self.arguments()], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding='utf-8', start_new_session=True)
        hello = self.read(60)
        if hello is None:
            hello = {'error': 'its file does not finish loading'}
        if 'missing' in hello:
            name = hello['missing']
            hello['error'] = f'{self.path} has no {self.kind} {name}{closest(name, hello["public"])}'
        if 'error' in hello:
            self.stop()
            raise UserError(f'{self.flag}: {self.name}: {hello["error"]}')
        self.is_async, self.one_by_one = hello.get('is_async'), hello.get('one_by_one')
        return hello

    def arguments(self):
        """What its process is told besides."""
        return [str(self.timeout), str(self.concurrency)]

    def patience(self, n):
        """Seconds within which its process answers for n samples: an async function's one keeps to the time
        of each, and what it has not ended by then holds it up."""
        return self.timeout * (2 + math.ceil(n / self.concurrency) if self.is_async else 1)

    def read(self, timeout):
        """The next line as an object; None where none came in time or the process ended."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        return json.loads(line) if line else None

    def ask(self, completions, records):
        """Values for a batch, or None where it raised or hung (last_error says which)."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps({'completions': completions, 'records': records}) + '\n')
            self.process.stdin.flush()
            answer = self.read(self.patience(len(completions)))
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.stop()
            self.last_error = f'no answer within {self.timeout:g} s (reward_timeout), or its process ended'
            return None
        if 'error' in answer:
            self.stop()
            raise UserError(f'rewards: {self.name}: {answer["error"]}')
        self.last_error = answer.get('raised') or answer['trouble'] or self.last_error
        return answer.get('values')

    def __call__(self, completions, records):
        if not completions:
            return []
        if not self.one_by_one:
            values = self.ask(completions, records)
            if values is not None:
                return values
        values, hangs = [], 0           # one at a time, to lose only those at fault
        for text, record in zip(completions, records):
            value = None
            if hangs < MAX_HANGS:
                answer = self.ask([text], [record])
                if answer:
                    value = answer[0]
                elif self.process is None:
                    hangs += 1
            values.append(value)
        return values

    def kill(self):
        """Ends the process with all that it started, as a worker of its pool would hold the pipe open."""
        if os.name == 'nt':
            return self.process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)     # not yet waited for, so the number is its own

    def stop(self):
        if self.process is None:
            return
        self.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):          # of a batch that was not read
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
