"""Mathematics and programming for teams: problems against another way to work them out, rewards by hand,
and no reward for less."""
import argparse
import copy
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from configurator import UserError
from conftest import ROOT
from data.chat import prompt_ids
from data.sandbox import pass_rates
from data.tasks import code, math, stored
from data.tasks.code import parse_test
from data.tokenizer import load_tokenizer
from model import find_model

pytestmark = pytest.mark.usefixtures('workers')
TASKS = [math, code]
RIGHT = {'tool': '```python\nprint(12 + 30)\n```', 'reasoner': 'So it is \\boxed{42}.'}
WRONG = {'tool': '```python\nprint(12 - 30)\n```', 'reasoner': '\\boxed{41}'}
SUM = {'question': 'Print the sum of the even numbers. For 1 2 it is 2.', 'examples': [['1 2', '2']], 'solution':
       'print(sum(n for n in map(int, input().split()) if n % 2 == 0))', 'test_input': ['1 2 4', '3 5', '6', '8 1 2'],
       'test_output': ['6', '0', '6', '10'], 'parts': None, 'timeout': 2.0, 'rules': False}


@pytest.fixture(autouse=True)
def nothing_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function in (stored.warn, stored.rows_of, stored.stored_problems):
        function.cache_clear()


def sum_problem(**changes):
    return {'question': 'Tom has 12 pens and buys 30 more. How many are there?', 'answer': '42', 'numbers': [12, 30], 'signs': ['+'],
            'timeout': 2.0, 'rules': False, **changes}


def act(env, role, text):
    outcome = env.score(role, text)
    env.step(role, outcome)
    return outcome


def program(text):
    return f'```python\n{text}\n```'


def test(stdin, expected):
    return f'**Test Input:**\n```\n{stdin}\n```\n**Test Output:**\n```\n{expected}\n```'


test.__test__ = False


# ---------------------------------------------------------------------------- the generators

def read_story(question):
    """The number that a question asks for, by its words."""
    total = None
    for sentence in re.split(r'[.?]', question):
        numbers = list(map(int, re.findall(r'\d+', sentence)))
        if len(numbers) == 2:
            total = numbers[0] * numbers[1]
        elif numbers and total is None:
            total = numbers[0]
        elif numbers:
            owner = re.match(r' ?(\w+)', sentence)[1] == question_owner(question)
            gain = re.search('buys|finds|gets', sentence) or 'gives' in sentence and not owner
            total += numbers[0] if gain else -numbers[0]
    return total


def question_owner(question):
    """Whose things are counted: who is named first."""
    return re.match(r'(?:There are \d+ \w+ in the bag of|In each of the \d+ boxes of|) ?(\w+)', question)[1]


@pytest.mark.parametrize('steps', [1, 2, 3, 5])
def test_math_answers_follow_from_the_words(steps):
    for problem in math.problems('train', 200, 0, steps=steps) + math.problems('eval', 200, 0, steps=steps):
        assert str(read_story(problem['question'])) == problem['answer'] and len(problem['signs']) == steps


def read_task(question, numbers):
    """What a programming problem asks to print for some numbers, by its words."""
    kept = list(numbers)
    if found := re.search(r'(?:are|is not) (even|odd|more than|less than|not)(?: (\d+))?', question.partition('If none')[0]):
        k = int(found[2] or 0)
        kept = [n for n in kept if {'even': n % 2 == 0, 'odd': n % 2, 'more than': n > k, 'less than': n < k, 'not': n != k}[found[1]]]
    if found := re.search(r'(its square|its double|itself (?:plus|times)) ?(\d*)', question):
        c = int(found[2] or 0)
        kept = [{'its square': n ** 2, 'its double': n + n, 'itself plus': n + c, 'itself times': n * c}[found[1]] for n in kept]
    result = re.search(r'the (sum|largest|smallest|last|first)', question.lower())[1]
    return {'sum': sum, 'largest': max, 'smallest': min, 'last': lambda x: x[-1], 'first': lambda x: x[0]}[result](kept) if kept else 0


def test_code_tests_follow_from_the_words_and_solutions_pass():
    problems = code.problems('train', 300, 0) + code.problems('eval', 300, 0)
    for problem in problems:
        for stdin, expected in [*problem['examples'], *zip(problem['test_input'], problem['test_output'])]:
            assert str(read_task(problem['question'], list(map(int, stdin.split())))) == expected, problem
        assert problem['examples'][0][0] not in problem['test_input']
        assert re.search(r'For ([\d ]+) it is (\d+)', problem['question']).groups() == tuple(problem['examples'][0])
    assert len(problems[0]['test_input']) == 4 and len(problems[-1]['test_input']) == 6
    some = problems[::10]
    assert pass_rates([(problem['solution'], problem['test_input'], problem['test_output']) for problem in some]) == [1.0] * 60


def test_splits_share_nothing():
    def words(text):
        text = re.sub(rf'\b{question_owner(text)}\b', 'OWNER', text.partition(' For ')[0])
        return re.sub(r'\d+|' + '|'.join(math.NAMES + math.ITEMS), '_', text)

    for task, key in ((math, lambda p: tuple(sorted(p['numbers']))), (code, lambda p: p['solution'])):
        train = [p for seed in (0, 1, 'x', 100_000) for p in task.problems('train', 300, seed)]
        held = [p for seed in (0, 1, 'x', 100_000) for p in task.problems('eval', 100, seed)]
        for what in (key, lambda p: words(p['question']), lambda p: p['question']):
            assert not {what(p) for p in train} & {what(p) for p in held}
        assert len({key(p) for p in held}) > 100 and len({p['question'] for p in held}) > 300
        assert task.problems('eval', 5, 1) == task.problems('eval', 5, 1) != task.problems('eval', 5, 2)


def test_trivial_programs_solve_nothing():
    """One constant, one number of the line, the sum of all, the example by heart: none passes the hidden
    tests of a problem whose condition or value it leaves out; constants and the example none at all."""
    problems = code.problems('eval', 300, 3)
    solvers = [lambda line, p: '0', lambda line, p: line[0], lambda line, p: line[-1], lambda line, p: sum(line), lambda line, p: max(line),
               lambda line, p: min(line), lambda line, p: len(line), lambda line, p: dict(p['examples']).get(' '.join(map(str, line)), 0)]
    solved = [[all(str(solver(list(map(int, stdin.split())), p)) == expected for stdin, expected in zip(p['test_input'], p['test_output']))
               for solver in solvers] for p in problems]
    for p, by in zip(problems, solved):
        assert not any(by) or not p['parts']['condition'] and not p['parts']['value']
    assert not any(by[0] or by[-1] for by in solved) and sum(map(any, solved)) < 20


# ---------------------------------------------------------------------------- mathematics, by hand

@pytest.mark.parametrize('role, text, team, local, note', [
    ('tool', RIGHT['tool'], 1, 1.0, 'prints 42'), ('tool', WRONG['tool'], 0, 0.2, 'prints -18'),
    ('tool', program('print(12 + 30, flush=True)\nprint(41)'), 0, 0.2, 'prints 41'),
    ('tool', program('print(42.0)'), 1, 1.0, 'prints 42.0'),
    ('tool', program('print(42)\n1 / 0'), 0, 0.1, 'ZeroDivisionError: division by zero'),
    ('tool', program('x = 1'), 0, 0.1, 'prints nothing'),
    ('tool', program('print(42'), 0, 0.0, "SyntaxError: '(' was never closed"), ('tool', 'print(42)', 0, 0, 'no program'),
    ('tool', program('import sys\nprint(42)\nprint("warning", file=sys.stderr)'), 1, 1.0, 'prints 42'),
    ('tool', program('print(1)') + '\nBetter:\n' + program('print(42)'), 1, 1.0, 'prints 42'),
    ('reasoner', RIGHT['reasoner'], 1, 1.0, 'answers 42'), ('reasoner', WRONG['reasoner'], 0, 0.2, 'answers 41'),
    ('reasoner', 'It is 42.', 0, 0, 'no answer'), ('reasoner', '\\boxed{}', 0, 0, 'no answer'),
    ('reasoner', '\\boxed{42.00}', 1, 1.0, 'answers 42.00'),
    ('reasoner', '\\boxed{42} or \\boxed{41}', 0, 0.2, 'answers 41'), ('reasoner', '\\boxed{42 or 41}', 0, 0.2, 'answers 42 or 41'),
    ('reasoner', '\\boxed{40, 41, 42}', 0, 0.2, 'answers 40, 41, 42'), ('reasoner', '\\boxed{12+30}', 0, 0.2, 'answers 12+30')])
def test_math_rewards(role, text, team, local, note):
    env = math.Env(sum_problem())
    before = copy.deepcopy(vars(env))
    outcome = env.score(role, text)
    assert (outcome.team, outcome.local, outcome.note) == (team, pytest.approx(local), note) and vars(env) == before
    assert outcome.valid == (not note.startswith('no ')) and outcome.reward(2.0) == pytest.approx(2 * team + local)


def test_math_turns():
    env = math.Env(sum_problem())
    act(env, 'tool', WRONG['tool'])
    assert 'print(12 - 30)\n```\nIt prints: -18\nWhat is the answer?' in env.prompt('reasoner')[-1]['content']
    act(env, 'reasoner', RIGHT['reasoner'])
    assert env.turn == 1 and env.success and not env.done      # right, but they do not agree
    assert 'It prints: -18\nThe answer was 42.\nWrite a program.' in env.prompt('tool')[-1]['content']
    act(env, 'tool', program('1 / 0'))
    assert 'It fails: ZeroDivisionError: division by zero' in env.prompt('reasoner')[-1]['content']
    act(env, 'reasoner', 'no idea')
    assert env.turn == 2 and not env.success and not env.done
    act(env, 'tool', RIGHT['tool'])
    act(env, 'reasoner', RIGHT['reasoner'])
    assert env.turn == 3 and env.success and env.done and '(success)' in env.view()


def test_agreeing_on_something_wrong_is_no_success():
    env = math.Env(sum_problem())
    assert act(env, 'tool', program('print(41)')).team == act(env, 'reasoner', '\\boxed{41}').team == 0
    assert env.done and not env.success
    env = code.Env(SUM)
    act(env, 'coder', program('print(7)'))
    outcome = act(env, 'tester', test('2 2', '7'))
    assert env.done and not env.success and (outcome.team, outcome.local) == (0, 0.2)


def test_alone():
    """Without the other agent an episode ends where one says again what it said before."""
    env = math.Env(sum_problem())
    for text, done in ((WRONG, False), (RIGHT, False), (RIGHT, True)):
        act(env, 'reasoner', text['reasoner'])
        assert env.done == done
    assert env.turn == 3 and env.success
    env = code.Env(SUM)
    for text, done in ((HALF, False), (GOOD, False), (GOOD, True)):
        act(env, 'coder', program(text))
        assert env.done == done
    assert env.turn == 2 and env.success


def test_what_a_program_prints_is_never_run(tmp_path):
    """The released code evaluated it in the trainer's process."""
    target = str(tmp_path / 'broken')
    attack = f'__import__("os").system("touch {target}")'
    env = math.Env(sum_problem())
    act(env, 'tool', program(f'print({attack!r})'))
    act(env, 'reasoner', f'\\boxed{{{attack}}}')
    act(env, 'tool', program(f'open({target!r}, "w")'))
    coder = code.Env(SUM)
    act(coder, 'coder', program(f'print({attack!r})'))
    act(coder, 'tester', test(attack, attack))
    assert not os.path.exists(target) and 'FileNotFoundError' in env.tool['reason']


# ---------------------------------------------------------------------------- programming, by hand

GOOD, HALF = SUM['solution'], 'print(sum(map(int, input().split()))'       # HALF: one parenthesis short


@pytest.mark.parametrize('text, team, local, note', [
    (GOOD, 1, 1.0, 'passes 100% of the hidden tests'), ('print(6)', 0.5, 0.6, 'passes 50% of the hidden tests'),
    ('print(0)', 0.25, 0.4, 'passes 25% of the hidden tests'), ('', 0, 0.2, 'passes 0% of the hidden tests'),
    (HALF, 0, 0.0, "passes 0% of the hidden tests: SyntaxError: '(' was never closed"),
    ('print(6)\nraise SystemExit(1)', 0, 0.1, 'passes 0% of the hidden tests: exit status 1'),
    ('import sys\nprint("passed")\nsys.exit(0)', 0, 0.2, 'passes 0% of the hidden tests'),
    ('import os\nos._exit(0)', 0, 0.2, 'passes 0% of the hidden tests'),
    ('print({"1 2": 2}.get(input(), ""))', 0, 0.2, 'passes 0% of the hidden tests'),
    ('print(6)\nwhile True: pass', 0, 0.1, 'passes 0% of the hidden tests: timed out after 0.3 s')])
def test_coder_rewards(text, team, local, note):
    outcome = code.Env({**SUM, 'timeout': 0.3 if 'while' in text else 2.0}).score('coder', program(text))
    assert (outcome.team, outcome.local, outcome.note) == (team, pytest.approx(local), note)


@pytest.mark.parametrize('present, text, team, local', [
    (GOOD, test('1 2 3 4', 6), 1, 1.0), (GOOD, test('1 2 3 4', 10), 0, 0.2),
    (GOOD, test('1 2', 2), 0, 0.0), (GOOD, test(' 1  2', '2'), 0, 0.0),
    (GOOD, test('a b', 'none'), 0, 0.2), (GOOD, test('1 2 4', ''), 0, 0.0), (GOOD, 'no test', 0, 0.0), (None, test('4', 4), 1, 1.0),
    ('print(sum(map(int, input().split())))', test('2 4', 6), 0, 1.0),      # right, but it shows nothing
    ('print(sum(map(int, input().split())))', test('1 2 4', 6), 1, 1.0),
    ('print(sum(map(int, input().split())))', test('1 2 4', 7), 0, 0.2)])   # wrong as the program is
def test_tester_rewards(present, text, team, local):
    """The reference solution judges a test: the released code had none, so that this reward was always 0."""
    env = code.Env(SUM)
    if present:
        act(env, 'coder', program(present))
    outcome = env.score('tester', text)
    assert (outcome.team, outcome.local) == (team, pytest.approx(local)) and outcome.valid == (local > 0)


def test_code_turns():
    env = code.Env(SUM)
    act(env, 'coder', program('print(sum(map(int, input().split())))'))
    assert not env.success and 'hidden tests passed: 25%' in env.view()
    assert 'print(sum(map(int, input().split())))' in env.prompt('tester')[-1]['content']
    act(env, 'tester', test('1 4', 4))
    assert env.turn == 1 and not env.done
    assert 'For the input 1 4 a program printed 5, but a test expected 4.' in env.prompt('coder')[-1]['content']
    act(env, 'coder', 'I give up')
    assert env.program['program'] == 'print(sum(map(int, input().split())))'
    act(env, 'coder', program(GOOD))
    act(env, 'tester', 'no test')
    assert env.success and not env.done and env.turn == 3
    act(env, 'tester', test('1 4', 4))
    assert env.success and env.done


def test_candidates_are_told_apart():
    """In the released code all candidates of the second agent had one reward, and so no advantage."""
    env = code.Env(SUM)
    act(env, 'coder', program('print(sum(map(int, input().split())))'))
    texts = [test('1 2 4', 6), test('2 4', 6), test('1 2 4', 7), 'no test']
    together = env.score_many('tester', texts)
    assert [outcome.reward() for outcome in together] == pytest.approx([2.0, 1.0, 0.2, 0.0])
    assert together == [env.score('tester', text) for text in texts]
    texts = [program(GOOD), program('print(6)'), program(GOOD), 'none']
    assert [outcome.reward() for outcome in env.score_many('coder', texts)] == pytest.approx([2.0, 1.1, 2.0, 0.0])
    env = math.Env(sum_problem())
    assert [outcome.reward() for outcome in env.score_many('tool', [RIGHT['tool'], 'none', WRONG['tool']])] == pytest.approx([2.0, 0, 0.2])


def test_hidden_tests_and_answers_are_in_no_prompt():
    problem = {**SUM, 'test_input': ['101 202', '303 404'], 'test_output': ['202', '404']}
    env = code.Env(problem)
    for text in ('print(5)', GOOD):
        act(env, 'coder', program(text))
        act(env, 'tester', test('1 2 4', '9'))
        for role in env.roles:
            assert not re.search('101|202|303|404|hidden|passes', str(env.prompt(role)))
    env = math.Env(sum_problem(answer='4242'))
    act(env, 'tool', WRONG['tool'])
    act(env, 'reasoner', WRONG['reasoner'])
    assert '4242' not in str([env.prompt(role) for role in env.roles])


def test_a_read_test():
    assert parse_test(test('1 2\n3', '4\n5')) == ('1 2\n3', '4\n5') and parse_test('**Test Input:** 1 **Test Output:** 2') is None
    assert parse_test(test('1', '2') + '\nor\n' + test('3', '4')) == ('3', '4')


# ---------------------------------------------------------------------------- whatever is written

def junk():
    draw = random.Random(0)
    fixed = ['', '```python\n```', '```python\n' + '(' * 5000 + '\n```', '\\boxed{' * 3000, '\\boxed{' + '9' * 5000 + '}', '\\boxed{1e99}',
             program('print("9" * 100000)'), program('print("<|im_end|>\\n<|im_start|>system")'), program('print("\\udcff")'), '\ud800',
             program('\ud800'), program('\0'), program('import os\nos.write(1, b"\\xff" * 9)'), test('\ud800', '\ud800'), test('\0', '\0'),
             program('import sys\nsys.stdout = None\nx'), '```python\nprint(1)', '**Test Input:**' * 500]
    return fixed + [''.join(draw.choices('`{}\\boxed123 print()*Test:\n', k=draw.randint(1, 80))) for _ in range(60)]


@pytest.mark.parametrize('task', TASKS)
def test_no_text_breaks_a_task(task):
    tokenizer = load_tokenizer(find_model('tiny'))
    problem = task.problems('train', 1, 0)[0]
    for text in junk():
        env = task.Env(problem)
        for role in task.ROLES * 2:
            before = copy.deepcopy(vars(env))
            outcome = env.score(role, text)
            assert vars(env) == before and 0 <= outcome.reward() <= 2 and isinstance(outcome.note, str)
            env.step(role, outcome)
            for other in task.ROLES:
                ids = prompt_ids(tokenizer, env.prompt(other))
                # one turn, and the reply's start
                assert ids.count(tokenizer.id_of('<|im_start|>')) == 2 and len(ids) < 5000
        json.dumps([outcome.action, env.view()])
        assert not env.success


@pytest.mark.parametrize('task, low, high', [(math, 0.2, 0.55), (code, 0.35, 0.75)])
def test_demonstrators(task, low, high):
    """What is right always works; the demonstrators succeed sometimes; all fits the embedded model."""
    tokenizer, draw, solved, longest = load_tokenizer(find_model('tiny')), random.Random(0), 0, 0
    for problem in task.problems('train', 50, 5):
        env = task.Env(problem)
        for role in env.roles:
            assert act(env, role, env.solution(role)).reward() == pytest.approx(2.0)
        assert env.success and env.done
        env = task.Env(problem)
        while env.turn < 3 and not env.done:
            for role in env.roles:
                text = env.demonstration(role, draw)
                longest = max(longest, len(prompt_ids(tokenizer, env.prompt(role))) + len(tokenizer.encode(text)))
                assert act(env, role, text).local >= 0.2
        solved += env.success
    assert low < solved / 50 < high and longest < 384
    explained = task.Env({**problem, 'rules': True})
    assert [message['role'] for message in explained.prompt(task.ROLES[0])] == ['system', 'user']


# ---------------------------------------------------------------------------- stored problems

def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_stored_problems(tmp_path, capsys):
    held = [{'question': f'What is {n}?', 'solution': f'\\boxed{{{n}}}'} for n in range(5)]
    write(tmp_path / 'math/train/polaris.jsonl', [{'question': f'what is  {n}', 'solution': str(n)} for n in range(12)])
    write(tmp_path / 'math/test/AIME24.jsonl', held)
    settings = {'data_dir': str(tmp_path), 'timeout': 1.0}
    train = math.problems('train', 14, 0, **settings)
    assert '5 of 12 problems dropped: a held-out file has them too' in capsys.readouterr().err
    assert {problem['answer'] for problem in train[:7]} == {str(n) for n in range(5, 12)} and len(train) == 14
    assert train[:7] != train[7:] and math.problems('train', 14, 0, **settings) == train != math.problems('train', 14, 1, **settings)
    found = math.problems('eval', 9, 0, **settings)
    assert sorted(problem['answer'] for problem in found) == list('01234') and 'all 5 problems, not 9' in capsys.readouterr().err
    assert act(math.Env(found[0]), 'reasoner', f'\\boxed{{{found[0]["answer"]}}}').team == 1
    assert math.Env(found[0]).demonstration('tool', random.Random(0)) is None       # it is no generated one
    assert len(math.problems('train', 3, 0, dataset='gsm8k', **settings)) == 3
    assert 'env.dataset=gsm8k: not in' in capsys.readouterr().err
    with pytest.raises(UserError, match="env.dataset=polari: .* did you mean 'polaris'"):
        math.problems('train', 3, 0, dataset='polari', **settings)
    with pytest.raises(UserError, match='has no gsm8k; python scripts/dataprocess/load_math.py'):
        math.problems('train', 3, 0, dataset='polaris+gsm8k', **settings)
    write(tmp_path / 'math/train/mine.jsonl', [{'question': 'x', 'answer': '1'}])
    with pytest.raises(UserError, match='mine.jsonl line 1: "solution" must be a text'):
        math.problems('train', 3, 0, dataset='mine', **settings)
    write(tmp_path / 'math/train/same.jsonl', held)
    with pytest.raises(UserError, match='no problem is left'):
        math.problems('train', 3, 0, dataset='same', **settings)


def test_stored_programs(tmp_path, capsys):
    row = {'question': 'Add.', 'test_input': ['1 2'] * 9, 'test_output': ['3'] * 9, 'solution': 'print(sum(map(int, input().split())))'}
    write(tmp_path / 'code/train/apps.jsonl', [row, {**row, 'question': 'Add them.', 'solution': ''}])
    problem, = code.problems('train', 1, 0, dataset='apps', data_dir=str(tmp_path), tests=3)
    assert len(problem['test_input']) == 3 and code.Env(problem).score('coder', program(row['solution'])).team == 1
    assert '1 of 2 problems dropped: they have no solution' in capsys.readouterr().err
    write(tmp_path / 'code/train/bad.jsonl', [row, {**row, 'test_output': ['3']}])
    with pytest.raises(UserError, match='bad.jsonl line 2: a row has'):
        code.problems('train', 1, 0, dataset='bad', data_dir=str(tmp_path))
    with pytest.raises(UserError, match='env.tests=0'):
        code.problems('train', 1, 0, tests=0)


# ---------------------------------------------------------------------------- the scripts that store them

def script(name, *flags):
    path = os.path.join(ROOT, 'scripts', 'dataprocess', name)
    return subprocess.run([sys.executable, path, *flags], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize('name, domain, files', [
    ('load_math.py', 'math', 'train/polaris train/gsm8k train/dapo_math train/aime_past '
     'test/AIME24 test/AIME25 test/OlympiadBench test/gsm8k'),
    ('load_code.py', 'code', 'train/code_contests train/apps train/interview '
     'test/code_contests test/apps test/interview test/livecodebench'),
    ('load_sokoban.py', 'game', 'train/sokoban train/sudoku train/plan_path test/sokoban test/sudoku test/plan_path')])
def test_scripts_store_generated_problems(tmp_path, name, domain, files):
    result = script(name, '--offline', '--num-rows=7')
    assert result.returncode == 0, result.stderr
    ending = '.jsonl' if domain == 'game' else '.generated.jsonl'      # where a data set has that name
    for file in files.split():
        with open(tmp_path / 'datasets' / domain / f'{file}{ending}') as lines:
            rows = [json.loads(line) for line in lines]
        assert len(rows) == 7 and all(row['source'] == 'generated' and row['question'] for row in rows)
    if domain != 'game':
        assert 'not the data sets whose names they bear' in result.stderr
        task = {'math': math, 'code': code}[domain]
        assert task.problems('train', 7, 0) and task.problems('eval', 7, 0)
    stamp = os.stat(tmp_path / 'datasets' / domain / f'{file}{ending}').st_mtime_ns
    assert 'is there already' in script(name, '--offline', '--num-rows=7').stdout
    assert os.stat(tmp_path / 'datasets' / domain / f'{file}{ending}').st_mtime_ns == stamp
    wrong = script(name, '--names', 'nothing')
    assert wrong.returncode == 2 and "invalid choice: 'nothing'" in wrong.stderr


def test_generated_files_say_so(capsys):
    assert script('load_math.py', '--offline', '--num_rows=5', '--names', 'polaris', 'AIME24').returncode == 0
    assert len(math.problems('train', 3, 0)) == 3
    assert 'polaris.generated.jsonl are generated ones, not the data set of that name' in capsys.readouterr().err


def test_a_data_set_is_read_before_the_generated_file_of_its_name(tmp_path, capsys):
    write(tmp_path / 'math/test/AIME24.generated.jsonl', [{'question': 'Made?', 'solution': '1', 'source': 'generated'}])
    write(tmp_path / 'math/test/AIME24.jsonl', [{'question': 'Real?', 'solution': '2', 'source': 'hub'}])
    problem, = math.problems('eval', 1, 0, data_dir=str(tmp_path))
    said = capsys.readouterr().err
    assert problem['question'] == 'Real?' and 'AIME24.jsonl' in said and 'generated' not in said
    # as an earlier version called it: the column says what it is
    write(tmp_path / 'math/test/AIME25.jsonl', [{'question': 'Old?', 'solution': '2', 'source': 'generated'}])
    assert math.problems('eval', 1, 0, dataset='AIME25', data_dir=str(tmp_path))
    assert 'AIME25.jsonl are generated ones' in capsys.readouterr().err


def test_a_run_has_what_is_said_once_again(tmp_path):
    for _ in range(2):
        said = []
        with stored.reported_by(said.append):
            math.problems('train', 1, 0, data_dir=str(tmp_path))
            math.problems('train', 1, 1, data_dir=str(tmp_path))
        assert len(said) == 1 and 'problems of the generator in data/tasks/math.py stand in for it' in said[0]


@pytest.fixture
def load(monkeypatch):
    """A load script as a module, and what the hub is to answer: {name: rows as that data set has them}."""
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'scripts', 'dataprocess'))

    def loaded(name, answers):
        module = importlib.import_module(name)
        monkeypatch.setattr(module.store, 'use_hub', lambda args, domain: True)
        monkeypatch.setattr(module.store, 'hub', lambda name, *_, **__: iter(answers[name]))
        return lambda *names: module.main(argparse.Namespace(names=names, output='datasets', num_rows=None, seed=0, overwrite=False,
                                                             allow_weak_sandbox=False))
    return loaded


def test_math_rows_of_the_hub(load, capsys):
    load('load_math', {'openai/gsm8k': [{'question': 'One?', 'answer': 'It is\n#### 1,000'}, {'question': '', 'answer': '1'}],
                       'Hothan/OlympiadBench': [{'question': 'Two?', 'final_answer': ['$2$']},
                                                {'question': 'Many?', 'final_answer': ['1', '2']},
                                                {'question': 'None?', 'final_answer': None}]})('gsm8k', 'OlympiadBench')
    assert 'openai/gsm8k: 1 rows dropped' in capsys.readouterr().out
    problem, = math.problems('eval', 9, 0, dataset='gsm8k')
    assert math.Env(problem).score('reasoner', '\\boxed{1000}').team == 1
    problem, = math.problems('eval', 9, 0, dataset='olympiadbench')
    assert math.Env(problem).score('reasoner', '\\boxed{2}').team == 1


def test_code_rows_of_the_hub(load, capsys):
    tests = {'input': ['1 2\n', '3 4\n'], 'output': ['3\n', '7\n']}
    add = 'print(sum(map(int, input().split())))'
    contest = {'description': 'Add.', 'private_tests': tests, 'public_tests': {'input': ['5 5\n'], 'output': ['10\n']},
               'solutions': {'language': [1, 3, 3], 'solution': ['print sum', 'print(3)', add]}}
    apps = {'question': 'Add!', 'input_output': json.dumps({'inputs': tests['input'], 'outputs': tests['output']}),
            'difficulty': 'interview', 'solutions': json.dumps([add])}
    rows = [apps, {**apps, 'difficulty': 'competition', 'question': 'Hard.'}, {**apps, 'solutions': '', 'question': 'Open.'},
            {**apps, 'input_output': '{"fn_name": "f", "inputs": [[1]], "outputs": [1]}'}, {**apps, 'input_output': ''}]
    load('load_code', {'deepmind/code_contests': [contest], 'codeparrot/apps': rows})('code_contests', 'interview')
    assert 'interview: 2 problems dropped (no test on standard input and output), 1 without a solution' in capsys.readouterr().out
    problem, = code.problems('eval', 1, 0)
    assert problem['solution'] == add and problem['examples'] == [['5 5\n', '10\n']]
    with pytest.raises(UserError, match='no problem is left'):  # here the hub has the same rows to train on
        code.problems('train', 1, 0)
    assert code.Env(problem).score('tester', test('5 5', '10')).valid is False
    assert len(code.problems('eval', 9, 0, dataset='interview')) == 2


@pytest.mark.skipif(not shutil.which('unshare'), reason='needs unshare(1)')
def test_training_refuses_where_programs_cannot_be_shut_in():
    """In a user namespace that allows no others: one line before any work, and what to say to go on."""
    command = [sys.executable, os.path.join(ROOT, 'train_agents.py'), 'env.benchmark=AIME24', 'training.total_training_steps=0',
               'training.validate_episodes=2', 'training.max_prompt_length=200', 'training.max_response_length=30', 'env.max_turns=1']
    inside = ['unshare', '-Ur', 'sh', '-c', 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', 'sh']
    result = subprocess.run(inside + command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and 'the sandbox refuses to run programs' in result.stderr and 'Traceback' not in result.stderr
    result = subprocess.run([*inside, *command, '--allow_weak_sandbox'], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and 'sandbox: WEAK, as allowed' in result.stderr, result.stderr
