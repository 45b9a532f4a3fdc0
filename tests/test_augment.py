"""data/augment.py: what may change in a question, and what never does."""
import re

import pytest

from configurator import UserError
from data.augment import MEANING, OTHERS, augment, change, mistyped, other_wording
from data.formats import Record
from data.tasks import questions, toolcalls
import random


def record(question, answer='Yes.', split='train', **more):
    prompt = [{'role': 'system', 'content': 'Please explain the problem.'}, {'role': 'user', 'content': question}]
    return Record(prompt, [{'role': 'assistant', 'content': answer, **more}], None, split, 'line 1')


def from_rows(task, split, n):
    for number, row in enumerate(task.rows(split, n, 0)):
        messages = row.get('messages') or [{'role': 'user', 'content': row['question']}, {'role': 'assistant', 'content': row['answer']}]
        yield Record(messages[:-1], messages[-1:], row.get('tools'), split, f'{split} {number}')


@pytest.mark.parametrize('task', [questions, toolcalls])
def test_answers_and_held_out_rows_stay(task):
    records, said = [*from_rows(task, 'train', 120), *from_rows(task, 'eval', 30)], []
    found = augment(records, seed=1, factor=3, synonyms=0.5, typos=0.2, wordings=0.7, print0=said.append)
    assert found[:150] == records and all(copy.split == 'train' for copy in found[150:])
    assert 150 < len(found) - 150 <= 240 and f'120 training rows and {len(found) - 150} copies' in said[0] and '30 held-out rows' in said[0]
    originals = {original.where: original for original in records}
    for copy in found[150:]:
        original = originals[copy.where.removesuffix(' (augmented)')]
        assert copy.completion is original.completion and copy.tools is original.tools
        assert copy.prompt != original.prompt and copy.prompt[:-1] == original.prompt[:-1]
        words = set(re.findall(r'\w+', copy.prompt[-1]['content']))
        # what the answer repeats is still there
        for word in re.findall(r'\w+', original.prompt[-1]['content']):
            if word in re.findall(r'\w+', str(original.completion)):
                assert word in words or word.lower() in {other.lower() for other in words}
    prompts = [str((one.prompt, one.tools)) for one in found]
    assert len(set(prompts)) == len(prompts)


def test_it_depends_on_the_seed_and_the_place_alone():
    records = list(from_rows(questions, 'train', 40))
    quiet = dict(print0=lambda line: None)
    assert augment(records, 7, **quiet) == augment(records, 7, **quiet) != augment(records, 8, **quiet)
    longer = augment(records + list(from_rows(questions, 'eval', 5)), 7, **quiet)
    assert longer[45:] == augment(records, 7, **quiet)[40:]
    assert augment(records, 7, factor=1, **quiet) == records
    assert 10 < len(augment(records, 7, factor=1.5, **quiet)) - 40 < 30


def test_what_never_changes():
    text = 'Do not show `show problem` or "show it" before 12 problems at https://show.it/problem in file_name problem.txt, Tom'
    for seed in range(30):
        draw = random.Random(seed)
        found, made = change(text, {'tom'}, draw, 1.0, 1.0, 0.0)
        assert made['synonyms'] >= 2 and '`show problem`' in found and '"show it"' in found and 'https://show.it/problem' in found
        assert all(word in found.split() for word in ('not', 'or', 'before', '12', 'Tom', 'file_name'))
        assert found.startswith('Do not display')
    assert change('show the problem', {'show', 'problem', 'the'}, random.Random(0), 1.0, 1.0, 0.0)[0] == 'show the problem'


def test_synonyms_are_never_words_of_the_answer():
    copies = augment([record('Please choose one.', 'I pick this one.')], 0, factor=50, synonyms=1, typos=0, wordings=0,
                     print0=lambda line: None)
    assert [copy.prompt[-1]['content'] for copy in copies] == ['Please choose one.', 'Please select one.']
    assert copies[1].prompt[0] == copies[0].prompt[0]           # the system message is not the question


def test_typos_are_small():
    for seed in range(200):
        wrong = mistyped('weather', random.Random(seed))
        assert wrong[0] == 'w' and abs(len(wrong) - 7) <= 1 and wrong.isalpha() and wrong.islower()
        assert sum(a != b for a, b in zip(wrong, 'weather')) <= 7


def test_other_wordings():
    found = {other_wording('What is the time?', random.Random(seed)) for seed in range(100)}
    assert {"What's the time?", 'What is the time', 'A question: What is the time?'} <= found


def test_a_text_to_be_completed_keeps_its_end_and_a_text_alone_stays():
    quiet = dict(print0=lambda line: None)
    plain = [Record('Show me the problem: ', 'x', None, 'train', '1'), Record('', 'show the problem', None, 'train', '2')]
    found = augment(plain, 0, synonyms=1, typos=0, wordings=1, **quiet)
    assert [copy.prompt for copy in found[2:]] == ['Display me the issue: ']


def test_a_copy_never_repeats_a_question_that_is_held_out():
    records = [record('show it'), record('display it', split='eval')]
    assert augment(records, 0, factor=9, synonyms=1, typos=0, wordings=0, print0=lambda line: None) == records


@pytest.mark.parametrize('settings, said', [(dict(factor=0.5), 'factor 0.5'), (dict(factor=1e9), 'factor'), (dict(typos=2), 'typos=2'),
                                            (dict(synonyms=-1), 'synonyms=-1'), (dict(wordings=1.5), 'wordings=1.5')])
def test_settings_without_meaning(settings, said):
    with pytest.raises(UserError, match=said):
        augment([], 0, **settings)


def test_no_synonym_turns_a_meaning():
    assert not MEANING & OTHERS.keys() and all(word not in others for word, others in OTHERS.items())
