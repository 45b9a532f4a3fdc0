"""data/rewards.py and data/problems.py: what counts as the same answer, every reward by hand,
a user's function that misbehaves."""
import json
import math
import os
import re
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configurator import UserError
from conftest import ROOT
from data.problems import FORM, hold_out, prompt, read_problems
from data.formats import Source
from data.answers import as_number, extract_answer, same_answer
from data.rewards import Scorer, exact, length_penalty, number, short_names, tags


# ---- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, answer', [
    ('so it is <answer> 42 </answer>', '42'),
    ('<answer>1</answer> no: <answer>2</answer>', '2'),
    ('<answer><answer>3</answer>', '3'),                                # opened twice: the inner one
    ('He has 5 * 3 = 15.\n#### 1,080', '1,080'),
    ('thus \\boxed{\\frac{1}{2}} holds', '\\frac{1}{2}'),
    ('<answer>\\boxed{7}</answer>', '7'),
    ('\\boxed{never closed', '\\boxed{never closed'),
    ('  15 ', '15'),
    ('', '')])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize('text, value', [
    ('1,080', 1080), ('$1,080.00', 1080), ('-3', -3), ('\u22123', -3), ('+2.50', Fraction(5, 2)), ('1/2', Fraction(1, 2)), ('.5', Fraction(1, 2)),
    ('\\frac{3}{4}', Fraction(3, 4)), ('-\\dfrac{3}{4}', Fraction(-3, 4)), ('2 1/3', Fraction(7, 3)), ('-2 1/2', Fraction(-5, 2)),
    ('1e3', 1000), ('50%', 50), ('12\\%', 12), ('\u20ac7', 7), ('-$4', -4), ('18.', 18), ('$18$', 18), ('\\( 18 \\)', 18), ('18\u00a0', 18),
    ('\\text{18}', 18), ('1{,}000', 1000), ('10\\,', 10),
    ('twelve', None), ('', None), ('1,08', None), ('1/0', None), ('2 1/0', None), ('3 apples', None), ('1.2.3', None), ('1e999999', None),
    ('--3', None), ('9' * 200, None), ('nan', None), ('inf', None), ('1_000', None), ('1 2', None)])
def test_as_number(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize('given, wanted, same', [
    ('1,080', '1080', True), ('$5', '5.00', True), ('0.5', '1/2', True), ('0.333', '1/3', False), ('Paris.', 'paris', True), ('A  B', 'a b', True),
    ('x^2', 'x^2', True), ('x^2', 'x^3', False), ('', '', False), ('12 ', '13', False), ('5 apples', '5', False)])
def test_same_answer(given, wanted, same):
    assert same_answer(given, wanted) is same


# Each line: ways in which answers of MATH write one thing, of which no two lines write the same.
FORMS = r'''
1/2 | \frac12 | \frac1{2} | \frac{1}2 | \tfrac12 | \dfrac{1}{2} | \cfrac{1}{2} | \frac 12 | 0.5 | $\frac{1}{2}$. | \displaystyle\frac12
-1/2 | -\frac12 | \frac{-1}{2} | -0.5
1/12 | \frac{1}{12} | \frac1{12}
\frac123 | \frac{1}{2}3
3/2 | 1\frac12 | 1 \frac{1}{2} | 1 1/2 | 1.5
11/2 | 5\frac12
2\frac32
\sqrt2 | \sqrt{2} | \sqrt 2
\sqrt{12}
\sqrt12 | \sqrt{1}2
2\sqrt3 | 2 \sqrt{3} | 2\,\sqrt 3
\frac{\sqrt3}2 | \frac{\sqrt{3}}{2} | \dfrac{ \sqrt{3} }{2}
\frac x2 | \dfrac{x}{2}
2\pi | 2 \pi
2 pi
90 | 90^\circ | 90^{\circ} | 90°
0.9 | \frac{9}{10}
10080 | 10,080 | 10,\!080 | 10{,}080 | \$10,080
(0,1] | (0, 1] | \left( 0, 1 \right] | \left(0,1\right]
[0,1] | \left[0, 1\right]
(0,1) | (0, 1)
(1,0)
(-\infty,3) | ( -\infty , 3 ) | (−∞, 3)
(0,\infty) | (0,+\infty)
(0,1)\cup(2,3) | (0, 1) \cup (2, 3)
(100,200) | (100, 200)
(1234, 5) | (1,234, 5)
(1, 234, 5) | (1,234,5)
(1,\frac12) | (1, 0.5)
\{1,2\} | \{2, 1\} | \left\{ 1, 2 \right\} | {1, 2} | \lbrace 2,1 \rbrace
\{1,2,2\} | \{2,1,2\}
\{1,1,2\}
\{(1,2),(3,4)\} | \{(3, 4), (1, 2)\}
3,5,7 | 3, 5, 7
1,-2 | 1, -2
-2, 1
1, 234
1,234 | 1234
x=1,234 | x = 1,234
x=1, 234
\text{Monday} | monday | \textbf{Monday}
5x | 5\text{x}
5 million | 5\text{ million}
5000000
5m
12 dozen
'''.strip().splitlines()


def test_answers_of_math_are_the_same_in_every_form():
    lines = [line.split(' | ') for line in FORMS]
    for i, forms in enumerate(lines):
        for j, others in enumerate(lines):
            for a in forms:
                wrong = [b for b in others if same_answer(a, b) != (i == j)]
                assert not wrong, (a, wrong)


@pytest.mark.parametrize('value, same, other', [
    (r'5 \text{ cm}', [r'5\text{cm}', '5 cm', '5 centimeters', r'5\mbox{ cm}', '5'], ['5 m', r'5\text{ m}', '5 mm', '5 square cm', '6', '6 cm', '5x']),
    (r'5 \text{ cm}^2', ['5 square centimeters', '5 cm^2', r'5 \mathrm{cm}^{2}', '5'], ['5 cm', '5 cm^3', '25']),
    ('12 square units', ['12', r'12\text{ units}'], ['144']),
    (r'10\text{ m/s}', ['10 meters per second', '10'], ['10 mph', '10 km/s', r'10\text{ m}']),
    (r'\$5', ['5', '5 dollars', '$5.00'], ['5 cents', '€5', '5%']),
    (r'50\%', ['50', '50%', '50 percent', r'$50\%$'], ['0.5', '1/2', '$50']),
    ('90 degrees', ['90', r'90^\circ', '90°'], ['90%', '90 radians']),
    (r'\frac12\text{ hour}', ['0.5 hours', '1/2'], ['30 minutes', '0.5 minutes']),
    (r'4\sqrt3\text{ cm}', [r'4\sqrt{3}', r'4\sqrt{3}\text{ cm}'], [r'4\sqrt{3}\text{ m}', r'4\sqrt{2}'])])
def test_units_may_be_left_out_but_not_exchanged(value, same, other):
    for form in same:
        assert same_answer(value, form) and same_answer(form, value), form
    for form in other:
        assert not same_answer(value, form) and not same_answer(form, value), form


def test_rewards_by_hand():
    record = {'answer': 'They pay $12.\n#### 1,080'}
    good = '<think>a</think><answer>1080</answer>'
    assert exact([good, '<answer>1081</answer>', '1080'], [record] * 3) == [1, 0, 1]
    assert number([good, '<answer>two</answer>', '-3.5'], [record] * 3) == [1, 0, 1]
    assert tags([good, good + ' end', '<answer>1</answer>', good + '<answer>', '</think><think><answer></answer>', ''], [record] * 6) == pytest.approx(
        [1, 1 - 4 * 0.002, 0.5, 0.75 - 8 * 0.002, 0.75, 0])
    assert [length_penalty(n, 100, 20) for n in (10, 80, 85, 100, 300)] == [0, 0, -0.25, -1, -1]


# ---- a Scorer ----------------------------------------------------------------------------------------------

def user_file(tmp_path, body, name='mine.py'):
    path = tmp_path / name
    path.write_text(body)
    return str(path)


def test_scorer_names_and_weights():
    scorer = Scorer(['exact', 'number', 'tags', 'length'], longest=10, buffer=5)
    scores = scorer(['<answer>7</answer>', 'no'], [{'answer': '7'}] * 2, [5, 10])
    assert scores[0] == {'exact': 1, 'number': 1, 'tags': 0.5, 'length': 0} and scores[1]['length'] == -1
    assert scorer.total(scores[0]) == 2 + 0.5 + 0.25
    assert Scorer(['exact'], [3]).total({'exact': 1.0}) == 3
    assert scorer.total({'exact': None, 'number': 1.0, 'tags': 0.0, 'length': 0.0}) is None


def test_users_function_sees_the_whole_record(tmp_path):
    path = user_file(tmp_path, 'from helper import add\n'
                               'def score(completions, records):\n'
                               '    print("this goes to the console")\n'
                               '    return [add(len(c), r["level"]) for c, r in zip(completions, records)]\n')
    user_file(tmp_path, 'def add(a, b):\n    return a + b\n', 'helper.py')
    scorer = Scorer([f'{path}:score', 'exact'], [1, 10])
    scores = scorer(['ab', '7'], [{'level': 2, 'answer': '7'}, {'level': 5, 'answer': '7'}], [1, 1])
    assert [scorer.total(s) for s in scores] == [4, 16]
    scorer.close()


def test_what_raises_is_unscored_and_nothing_else_is(tmp_path):
    path = user_file(tmp_path, 'def score(completions, records):\n'
                               '    return [1 / int(c) if c != "none" else None if c != "nan" else float("nan") for c in completions]\n')
    scorer = Scorer([f'{path}:score'])
    scores = scorer(['1', '0', '4', 'none', 'five'], [{}] * 5, [1] * 5)
    assert [scorer.total(s) for s in scores] == [1, None, 0.25, None, None]
    assert 'ZeroDivisionError' in scorer.last_error or 'ValueError' in scorer.last_error
    scorer.close()


@pytest.mark.parametrize('result', ['(1 / int(c) for c in completions)', 'map(lambda c: 1 / int(c), completions)'])
def test_what_is_made_one_by_one_may_raise_late(tmp_path, result):
    """One sample is unscored, and the process goes on."""
    path = user_file(tmp_path, f'def score(completions, records):\n    return {result}\n')
    scorer = Scorer([f'{path}:score'])
    process = scorer.servers[f'{path}:score'].process
    scores = scorer(['1', '0', '4'], [{}] * 3, [1] * 3)
    assert [scorer.total(s) for s in scores] == [1, None, 0.25] and 'mine.py line 2: ZeroDivisionError' in scorer.last_error
    assert scorer.servers[f'{path}:score'].process is process
    scorer.close()


def test_what_hangs_is_killed_and_unscored(tmp_path):
    path = user_file(tmp_path, 'import time\n'
                               'def score(completions, records):\n'
                               '    if "hang" in completions:\n        time.sleep(60)\n'
                               '    if "die" in completions:\n        import os; os._exit(3)\n'
                               '    return [1.0] * len(completions)\n')
    scorer, began = Scorer([f'{path}:score'], timeout=1.0), time.monotonic()
    scores = scorer(['fine', 'hang', 'die', 'fine'], [{}] * 4, [1] * 4)
    assert [scorer.total(s) for s in scores] == [1, None, None, 1]
    assert time.monotonic() - began < 20
    scorer.close()


SCORES = 'def score(c, r):\n    return [float(text) for text in c]\n'
POOL = 'def number(text):\n    return float(text)\ndef score(c, r):\n    with Pool(2) as pool:\n        return pool.map(number, c)\n'


@pytest.mark.parametrize('name, body', [
    ('mine.py', 'from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Rule:\n    weight: float = 1.0\n' + SCORES),
    ('mine.py', 'import pickle\nclass Rule: pass\nassert type(pickle.loads(pickle.dumps(Rule()))) is Rule\n' + SCORES),
    ('mine.py', 'from multiprocessing.pool import Pool\n' + POOL),
    ('mine.py', 'import multiprocessing, functools\nPool = multiprocessing.get_context("spawn").Pool\n' + POOL),
    ('mine.py', 'import data, model\nassert (data.A, model.B) == (1, 2)\n' + SCORES),                     # neighbours, not the project's
    ('mine.py', 'from data.answers import same_answer\n' + SCORES.replace('float(text)', 'same_answer(text, "1")')),
    ('mine.py', 'import pathlib\nassert pathlib.Path(__file__).with_name("mine.py").exists()\n' + SCORES),
    ('mine.py', SCORES + 'if __name__ == "__main__":\n    raise ValueError\n'),
    ('mine.py', '\ufeff# a byte order mark\n' + SCORES),
    ('my reward-2.py', 'from dataclasses import dataclass\n@dataclass\nclass Rule:\n    weight: "float" = 1.0\n' + SCORES),
    ('json.py', 'import json\nassert json.loads("1") == 1\n' + SCORES)])
def test_a_reward_file_is_a_module_like_any_other(tmp_path, name, body):
    if 'import data, model' in body:
        user_file(tmp_path, 'A = 1\n', 'data.py')
        user_file(tmp_path, 'B = 2\n', 'model.py')
    scorer = Scorer([user_file(tmp_path, body, name) + ':score'])
    scores = scorer(['1', '0'], [{}] * 2, [1] * 2)
    assert [scorer.total(s) for s in scores] == [1, 0], scorer.last_error
    scorer.close()


def test_a_source_in_another_encoding(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_bytes('# -*- coding: latin-1 -*-\nWORD = "\u00e9"\n'.encode('latin-1') + SCORES.encode())
    Scorer([f'{path}:score']).close()
    path.write_bytes('\nWORD = "\u00e9"\n'.encode('latin-1') + SCORES.encode())
    with pytest.raises(UserError, match='mine.py line [12].*utf-8'):
        Scorer([f'{path}:score'])


def test_two_files_with_one_name_are_two_rewards(tmp_path):
    paths = []
    for folder in 'ab':
        (tmp_path / folder).mkdir()
        paths.append(user_file(tmp_path / folder, f'def score(c, r):\n    return [{ord(folder)}] * len(c)\n') + ':score')
    scorer = Scorer(paths)
    assert scorer(['x'], [{}], [1]) == [dict(zip(paths, [97, 98]))]
    assert short_names([*paths, 'exact']) == {paths[0]: paths[0], paths[1]: paths[1], 'exact': 'exact'}
    assert short_names([paths[0], 'exact']) == {paths[0]: 'mine.py:score', 'exact': 'exact'}
    scorer.close()


@pytest.mark.parametrize('signature', ['prompts, completions, **kwargs', 'completions, **kwargs', 'completions, answer, **kwargs',
                                       'prompts, completions, answer, **kwargs', '*args, **kwargs', 'completions', 'completions, records, more',
                                       'completions, records, *, weight', 'records, completions', 'prompts, answers',
                                       'completion, records', 'completions, record', 'completion', 'record, completion'])
def test_a_signature_that_takes_something_else_is_refused(tmp_path, signature):
    path = user_file(tmp_path, f'def score({signature}):\n    return [1.0] * len(completions)\n')
    with pytest.raises(UserError) as error:
        Scorer([f'{path}:score'])
    assert f'score({signature}) does not take' in str(error.value) and 'write score(completions, records)' in str(error.value)


@pytest.mark.parametrize('signature, first, second', [
    ('completions, records, **kwargs', 'completions', 'records'), ('completions, records, weight=2', 'completions', 'records'),
    ('c, rows', 'c', 'rows'), ('texts, problems, /', 'texts', 'problems'), ('*both', 'both[0]', 'both[1]')])
def test_any_two_arguments_are_completions_and_records(tmp_path, signature, first, second):
    path = user_file(tmp_path, f'def score({signature}):\n    return [len(t) + r["level"] for t, r in zip({first}, {second})]\n')
    scorer = Scorer([f'{path}:score'])
    assert scorer(['abc'], [{'level': 2}], [1]) == [{f'{path}:score': 5}]
    scorer.close()


def test_an_argument_called_like_a_column_is_not_all_records(tmp_path):
    scorer = Scorer([user_file(tmp_path, 'def score(completions, answer):\n    return [1.0]\n') + ':score'])
    with pytest.raises(UserError, match=r'score\(completions, answer\) does not take'):
        scorer(['x'], [{'question': 'q', 'answer': 'a'}], [1])


def test_an_error_in_the_function_says_where_it_was_raised(tmp_path):
    user_file(tmp_path, '\n\ndef half(text):\n    return 1 / int(text)\n', 'helper.py')
    path = user_file(tmp_path, 'import json\nfrom helper import half\ndef score(c, r):\n'
                               '    return [json.loads(t) if t == "{" else half(t) for t in c]\n')
    scorer = Scorer([f'{path}:score'])
    for text, words in (('0', 'helper.py line 4: ZeroDivisionError: division by zero'), ('{', 'mine.py line 4: JSONDecodeError')):
        scorer([text], [{}], [1])
        assert words in scorer.last_error and f'{path}:score' in scorer.last_error
    scorer.close()


def test_workers_that_the_function_left_do_not_hold_up_the_run(tmp_path):
    """They inherit the pipe to the run, which waited for its end."""
    path = user_file(tmp_path, 'import multiprocessing, os, time\nPOOL = None\ndef score(c, r):\n    global POOL\n'
                               '    POOL = multiprocessing.Pool(2)\n    time.sleep(60) if c == ["hang"] else os._exit(1)\n')
    scorer, began = Scorer([f'{path}:score'], timeout=1.0), time.monotonic()
    for text in ('hang', 'die'):
        assert scorer([text], [{}], [1]) == [{f'{path}:score': None}]
    assert time.monotonic() - began < 15
    scorer.close()


# ---- functions that wait for others

def test_samples_are_judged_side_by_side_up_to_a_limit(tmp_path):
    """Each says how many are in flight when it begins; those that wait in a thread, too."""
    for wait in ('asyncio.sleep(0.05)', 'asyncio.to_thread(time.sleep, 0.05)'):
        path = user_file(tmp_path, 'import asyncio, time\nflying = 0\nasync def score(completion, record):\n    global flying\n    flying += 1\n'
                                   f'    mine = flying\n    await {wait}\n    flying -= 1\n    return mine + record["level"]\n')
        scorer = Scorer([f'{path}:score'], concurrency=7)
        values = [scorer.total(s) for s in scorer(list('abcdefghijklmnopqrst'), [{'level': 10}] * 20, [1] * 20)]
        assert values[:7] == list(range(11, 18)) and max(values) == 17
        scorer.close()


def test_functions_are_asked_at_the_same_time(tmp_path):
    """Each waits for the other."""
    body = ('import os, time\ndef score(completions, records):\n    open({mine!r}, "w").close()\n    while not os.path.exists({other!r}):\n'
            '        time.sleep(0.01)\n    return [{value}] * len(completions)\n')
    flags = [str(tmp_path / f'{name}.flag') for name in 'ab']
    paths = [user_file(tmp_path, body.format(mine=flags[i], other=flags[1 - i], value=i + 1), f'r{i}.py') + ':score' for i in (0, 1)]
    scorer = Scorer(paths, timeout=20)
    assert scorer(['x', 'y'], [{}] * 2, [1] * 2) == [dict(zip(paths, (1, 2)))] * 2
    scorer.close()


JUDGED = 'if {0} == "hang": await asyncio.sleep(60)\n    if {0} == "block": time.sleep(60)\n    if {0} == "die": os._exit(1)\n    return 1 / int({0})\n'
BY_BATCH = ('import asyncio, os, time\nasync def one(text):\n    ' + JUDGED.format('text') +
            'async def score(completions, records):\n    return await asyncio.gather(*map(one, completions))\n')
WRAPPED = BY_BATCH + 'def also(f):\n    return lambda completions, records: f(completions, records)\nscore = also(score)\n'
AN_OBJECT = 'import asyncio, os, time\nclass Judge:\n    async def __call__(self, completion, record):\n        ' \
    + JUDGED.format('completion').replace('\n    ', '\n        ') + 'score = Judge()\n'


@pytest.mark.parametrize('body', [BY_BATCH, AN_OBJECT], ids=['by batch', 'by sample'])
def test_of_what_is_awaited_only_samples_at_fault_are_lost(tmp_path, body):
    scorer = Scorer([user_file(tmp_path, body) + ':score'], timeout=0.5, concurrency=2)
    server, = scorer.servers.values()
    process, texts = server.process, ['1', 'hang', '2', '0', 'hang', '4', 'hang']
    assert [scorer.total(s) for s in scorer(texts, [{}] * 7, [1] * 7)] == [1, None, 0.5, None, None, 0.25, None]
    assert 'no answer within 0.5 s (reward_timeout)' in scorer.last_error
    assert [scorer.total(s) for s in scorer(['1', '0'], [{}] * 2, [1] * 2)] == [1, None]
    assert 'ZeroDivisionError' in scorer.last_error and server.process is process
    if body == BY_BATCH:                # what blocks all others is found out from outside
        assert [scorer.total(s) for s in scorer(['1', 'block', 'die', '2'], [{}] * 4, [1] * 4)] == [1, None, None, 0.5]
    scorer.close()


def test_a_decorator_around_what_is_awaited(tmp_path):
    scorer = Scorer([user_file(tmp_path, WRAPPED) + ':score'])
    assert [scorer.total(s) for s in scorer(['1', '0', '4'], [{}] * 3, [1] * 3)] == [1, None, 0.25]
    scorer.close()


def test_one_sample_at_a_time(tmp_path):
    path = user_file(tmp_path, 'import time\ndef score(completion, record):\n    if completion == "hang": time.sleep(60)\n'
                               '    return record["level"] / int(completion)\n')
    scorer = Scorer([f'{path}:score'], timeout=0.5)
    texts = ['1', '0', 'hang', '4']
    assert [scorer.total(s) for s in scorer(texts, [{'level': 2, 'record': 'a column'}] * 4, [1] * 4)] == [2, None, None, 0.5]
    scorer.close()


@pytest.mark.parametrize('body, words', [
    ('async def score(completion, record):\n    return "good"\n', 'one number (or None) for each completion'),
    ('async def score(completions, records):\n    return [1.0]\n', 'returned 1 values for 2 completions'),
    ('async def score(completions, records):\n    yield 1.0\n', 'one number (or None) for each completion')])
def test_what_is_awaited_in_another_form_is_an_error(tmp_path, body, words):
    scorer = Scorer([user_file(tmp_path, body) + ':score'])
    with pytest.raises(UserError) as error:
        scorer(['a', 'b'], [{}] * 2, [1] * 2)
    assert words in str(error.value)
    scorer.close()


class JudgeServer(ThreadingHTTPServer):
    """Answers chats as a judge does: what it says of an answer is what the answer says itself."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(('127.0.0.1', 0), JudgeHandler)
        self.calls, self.all_here = [], threading.Barrier(4)


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = re.search(r'<answer-(\w+)>(.*?)</answer-\1>', body['messages'][0]['content'])[2]
        self.server.calls.append((self.path, self.headers['Authorization'], body))
        if text.startswith('together'):
            self.server.all_here.wait(20)               # four requests at once, or none has an answer
        if text == 'dropped':
            return self.connection.close()
        busy = text == 'busy' and sum(text in str(call) for call in self.server.calls) == 1
        mark = '**Score:**' if text.startswith('bold') else 'Score:'
        answer = json.dumps({'choices': [{'message': {'role': 'assistant', 'content': f'It is so.\n{mark} {text[-1]}'}}]}).encode()
        self.send_response(503 if busy or text == 'down' else 200)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(monkeypatch):
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('JUDGE_URL', f'http://127.0.0.1:{server.server_address[1]}/v1/')
    monkeypatch.setenv('JUDGE_MODEL', 'a-judge')
    monkeypatch.setenv('JUDGE_KEY', 'secret')
    yield server
    server.shutdown()
    server.server_close()


def test_a_judge_behind_an_address(judge, monkeypatch):
    path = os.path.join(ROOT, 'recipes', 'rewards', 'judge.py') + ':score'
    scorer = Scorer([path], timeout=30)
    record = {'question': 'How much is {2 + 2}?', 'answer': '#### 4'}
    texts = [*(f'together {n}' for n in (0, 4, 7, 9)), 'no number', 'down', 'dropped', '{5', '<answer>9</answer> 2']
    values = [scorer.total(s) for s in scorer(texts, [record] * 9, [1] * 9)]
    assert values == [0, 0.4, 0.7, 0.9, None, None, None, 0.5, 0.2]          # the last closes no mark
    assert scorer.explain_missing({'judge.py:score': [math.nan if v is None else v for v in values]}).startswith(
        'judge.py:score gave no number (None, NaN or an error) for 3 of 9')
    assert 'judge.py line' in scorer.last_error
    called, key, body = judge.calls[0]
    assert (called, key, body['model']) == ('/v1/chat/completions', 'Bearer secret', 'a-judge')
    assert all(word in body['messages'][0]['content'] for word in ('How much is {2 + 2}?', '#### 4'))
    assert scorer.total(scorer(['busy'], [{'question': 'q'}], [1])[0]) is None          # "y" is no number; but it was asked again
    assert len([call for call in judge.calls if 'busy' in str(call)]) == 2
    assert scorer.total(scorer(['bold 6'], [{'question': 'q'}], [1])[0]) == 0.6             # as models mark it up
    scorer.close()
    monkeypatch.delenv('JUDGE_MODEL')
    with pytest.raises(UserError, match="judge.py line [0-9]+: KeyError: 'JUDGE_MODEL'"):
        Scorer([path])


@pytest.mark.parametrize('body, spec, words', [
    ('x = 1\ndef score(c, r:\n', 'score', ['mine.py line 2: SyntaxError']),
    ('\nimport nothing_of_that_name\n', 'score', ['mine.py line 2: ModuleNotFoundError']),
    ('def score(c, r):\n    return [1]\n', 'scores', ['no function scores', "did you mean 'score'"]),
    ('def score(c, r:\n', 'score', ['does not load', 'SyntaxError']),
    ('import nothing_of_that_name\n', 'score', ['does not load', 'nothing_of_that_name']),
    ('raise SystemExit(1)\n', 'score', ['does not load', 'SystemExit'])])
def test_files_that_do_not_load(tmp_path, body, spec, words):
    path = user_file(tmp_path, body)
    with pytest.raises(UserError) as error:
        Scorer([f'{path}:{spec}'])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize('body, words', [
    ('def score(c, r):\n    return 1.0\n', 'one number (or None) for each completion'),
    ('def score(c, r):\n    return ["high"] * len(c)\n', 'one number (or None) for each completion'),
    ('def score(c, r):\n    return [1.0]\n', 'returned 1 values for 2 completions')])
def test_results_of_another_form_are_errors(tmp_path, body, words):
    scorer = Scorer([user_file(tmp_path, body) + ':score'])
    with pytest.raises(UserError, match=words.replace('(', r'\(').replace(')', r'\)')):
        scorer(['a', 'b'], [{}, {}], [1, 1])
    scorer.close()


@pytest.mark.parametrize('names, weights, words', [
    (['exakt'], (), "did you mean 'exact'"), (['exact', 'exact'], (), 'twice'), (['exact'], [1, 2], '2 values for the 1 rewards'),
    (['exact', 'tags'], [0, 0], 'all 0'), (['task'], (), 'embedded task'), (['none.py:f'], (), 'no file none.py'),
    (['mine.txt:f'], (), 'path.py:function'), (['mine.py:f(x)'], (), 'path.py:function')])
def test_scorers_that_cannot_be(names, weights, words):
    with pytest.raises(UserError) as error:
        Scorer(names, weights)
    assert words in str(error.value)


# ---- problems ----------------------------------------------------------------------------------------------

def jsonl(tmp_path, rows, name='rows.jsonl'):
    path = tmp_path / name
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def test_problems_of_any_columns(tmp_path):
    path = jsonl(tmp_path, [{'frage': 'wie viele?', 'loesung': '#### 3', 'level': 1}, {'frage': 'und nun?', 'loesung': '4', 'metadata': 'eval'}])
    train, held_out = read_problems([Source(path, prompt_column='frage', answer_column='loesung')])
    assert [p['question'] for p in train] == ['wie viele?'] and [p['answer'] for p in held_out] == ['4'] and train[0]['level'] == 1
    assert prompt(train[0]) == [{'role': 'system', 'content': FORM}, {'role': 'user', 'content': 'wie viele?'}]
    train, _ = read_problems([Source(path, prompt_column='frage', answer_column='loesung')], system_prompt='')
    assert prompt(train[0]) == [{'role': 'user', 'content': 'wie viele?'}]
    plain = jsonl(tmp_path, [{'problem': 'p', 'expected_answer': 5}], 'plain.jsonl')
    assert read_problems([Source(plain)])[0][0]['answer'] == '5'


@pytest.mark.parametrize('row, source, words', [
    ({'question': 'q', 'answer': ''}, {}, ['line 1', 'answer', 'empty']),
    ({'question': 'q', 'answer': 'because ####'}, {}, ['line 1', 'no answer']),
    ({'question': None, 'answer': '1'}, {}, ['line 1', 'question', 'null']),
    ({'question': ['q'], 'answer': '1'}, {}, ['line 1', 'question', 'text']),
    ({'frage': 'q', 'answer': '1'}, {}, ['line 1', 'frage', 'prompt_column']),
    ({'question': 'q', 'result': '1'}, {}, ['line 1', 'result', 'answer_column']),
    ({'question': 'q', 'answer': '1'}, {'answer_column': 'anser'}, ['line 1', 'anser', "did you mean 'answer'"]),
    ({'question': 'q', 'answer': '1', 'metadata': 'test'}, {}, ['line 1', 'metadata'])])
def test_rows_that_cannot_be_asked(tmp_path, row, source, words):
    path = jsonl(tmp_path, [row])
    with pytest.raises(UserError) as error:
        read_problems([Source(path, **source)])
    assert all(word in str(error.value) for word in [path, *words]), error.value


def test_weights_of_data_sets(tmp_path):
    path = jsonl(tmp_path, [{'question': f'q{i}', 'answer': '1'} for i in range(10)])
    count = lambda weight: [p['question'] for p in read_problems([Source(path, weight=weight)])[0]]
    assert len(count(1.0)) == 10 and count(0.5) == ['q1', 'q3', 'q5', 'q7', 'q9'] and len(count(2.5)) == 25
    with pytest.raises(UserError, match='weight=0'):
        count(0)


def test_held_out_questions_are_in_no_training_row():
    problems = [{'question': f'q{i % 50}', 'answer': str(i)} for i in range(100)]       # every question twice
    train, held_out = hold_out(problems, 0.3, 20)
    asked = [{p['question'] for p in part} for part in (train, held_out)]
    assert 5 <= len(held_out) == len(asked[1]) <= 20 and not asked[0] & asked[1] and len(train) == 100 - 2 * len(held_out)
    # whatever the order of the rows
    assert hold_out(problems[::-1], 0.3, 20)[1][0]['question'] == held_out[0]['question']
    few = hold_out(problems, 0.3, 3)
    assert few == (train, held_out[:3])                 # more than are looked at are not trained on either
