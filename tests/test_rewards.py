"""data/rewards.py and data/problems.py: what counts as the same answer, every reward by hand,
a user's function that misbehaves."""
import json
import time
from fractions import Fraction

import pytest

from configurator import UserError
from data.problems import FORM, hold_out, prompt, read_problems
from data.formats import Source
from data.rewards import Scorer, as_number, exact, extract_answer, length_penalty, number, same_answer, tags


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


@pytest.mark.parametrize('body, spec, words', [
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
