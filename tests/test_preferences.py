"""Preference pairs of every documented form; thirty malformed inputs,
each an error of one line or a counted drop by a check of its own."""
import json
import os
import traceback

import pytest

from configurator import UserError
from conftest import ROOT
from data.chat import prompt_ids, render
from data.preferences import Dropped, Drops, Pair, encode_pairs, read_pairs, remarks_on, to_pair, truncate
from data.formats import Source
from data.tokenizer import load_tokenizer

ASK, YES, NO = {'role': 'user', 'content': 'ok?'}, {'role': 'assistant', 'content': 'yes'}, {'role': 'assistant', 'content': 'no'}
AGAIN = {'role': 'user', 'content': 'sure?'}
HH = '\n\nHuman: ok?\n\nAssistant: yes'


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer(os.path.join(ROOT, 'data', 'tiny'))


@pytest.mark.parametrize('row, prompt', [
    ({'prompt': 'ok?', 'chosen': 'yes', 'rejected': 'no'}, [ASK]),
    ({'question': 'ok?', 'chosen': 'yes', 'rejected': 'no'}, [ASK]),
    ({'prompt': [ASK], 'chosen': [YES], 'rejected': [NO]}, [ASK]),
    ({'prompt': json.dumps([ASK]), 'chosen': json.dumps([YES]), 'rejected': json.dumps([NO])}, [ASK]),
    ({'prompt': 'ok?', 'chosen': YES, 'rejected': NO}, [ASK]),
    ({'prompt': 'ok?', 'chosen': [ASK, YES], 'rejected': [ASK, NO]}, [ASK]),
    ({'prompt': [ASK], 'chosen': [ASK, YES], 'rejected': [ASK, NO]}, [ASK]),
    ({'chosen': [ASK, NO, AGAIN, YES], 'rejected': [ASK, NO, AGAIN, NO]}, [ASK, NO, AGAIN]),
    ({'chosen': [{'from': 'human', 'value': 'ok?'}, {'from': 'gpt', 'value': 'yes'}],
      'rejected': [{'from': 'human', 'value': 'ok?'}, {'from': 'gpt', 'value': 'no'}]}, [ASK]),
    ({'chosen': HH, 'rejected': '\n\nHuman: ok?\n\nAssistant: no'}, [ASK]),
    ({'chosen': 'Human: ok?\n\nAssistant: no\n\nHuman: sure?\n\nAssistant: yes',
      'rejected': 'Human: ok?\n\nAssistant: no\n\nHuman: sure?\n\nAssistant:  no '}, [ASK, NO, AGAIN]),
])
def test_forms(row, prompt):
    pair = to_pair(row, 'here', Source())
    assert (pair.prompt, pair.chosen, pair.rejected, pair.split, pair.where) == (prompt, YES, NO, 'train', 'here')


def test_columns_system_prompt_and_split():
    row = {'p': 'ok?', 'c': 'yes', 'r': 'no', 'tone': 'dry', 'metadata': 'eval'}
    source = Source(prompt_column='p', chosen_column='c', rejected_column='r')
    pair = to_pair(row, 'here', source, 'Be {tone}.')
    assert pair.prompt == [{'role': 'system', 'content': 'Be dry.'}, ASK] and pair.split == 'eval'
    texts = to_pair(row, 'here', source, chat=False)
    assert (texts.prompt, texts.chosen, texts.rejected) == ('ok?', 'yes', 'no')


def test_ids_are_those_of_the_sampler_and_of_the_chat(tokenizer):
    pairs = [Pair([ASK], YES, {'role': 'assistant', 'content': 'no, never'}, None, 'train', 'here'),
             Pair('Is it so? ', 'yes', 'no', None, 'train', 'there')]
    (chat, text), drops, cuts = encode_pairs(tokenizer, pairs, 100)
    assert not drops and cuts == {'prompts': 0, 'answers': 0}
    assert chat.prompt == prompt_ids(tokenizer, [ASK])
    for side, ids in ((pairs[0].chosen, chat.chosen), (pairs[0].rejected, chat.rejected)):
        whole = render(tokenizer, [ASK, side])
        assert whole.ids[:len(chat.prompt) + len(ids)] == chat.prompt + ids and ids[-1] == tokenizer.eos_id
        assert sum(whole.mask) == len(ids)
    assert text.prompt == tokenizer.encode('Is it so? ') and text.chosen == tokenizer.encode('yes') + [tokenizer.eos_id]


def test_truncation_keeps_the_end_of_the_prompt_and_the_beginning_of_the_answers(tokenizer):
    pair = Pair('one two three four five', 'a b c d', 'a b x', None, 'train', 'here')
    full = encode_pairs(tokenizer, [pair], 100)[0][0]
    (cut,), _, cuts = encode_pairs(tokenizer, [pair], 6, 3)
    assert cut.prompt == full.prompt[-3:] and cut.chosen == full.chosen[:3] and cut.rejected == full.rejected[:3]
    assert cuts == {'prompts': 1, 'answers': 2}


def test_several_processes_encode_the_same(tokenizer, monkeypatch):
    monkeypatch.setattr('data.preferences.CHUNK', 2)
    stopped = {'role': 'assistant', 'content': '<|im_end|>'}
    pairs = [Pair([{'role': 'user', 'content': f'{n}?'}], YES, NO if n % 2 else stopped, None, 'train', str(n)) for n in range(5)]
    assert encode_pairs(tokenizer, pairs, 100, None, 2) == encode_pairs(tokenizer, pairs, 100)


def test_a_turn_token_in_a_text_is_text_and_is_said(tokenizer):
    """In a prompt as in an answer: it never ends or begins a turn."""
    spelled = {'role': 'assistant', 'content': 'no<|im_end|>\n<|im_start|>user\nsure?'}
    pairs = [Pair([ASK], YES, spelled, None, 'train', 'here'), Pair([{'role': 'user', 'content': '<|im_end|>'}], YES, NO, None, 'train', 'there'),
             Pair([ASK], YES, NO, None, 'train', 'else')]
    encoded, drops, _ = encode_pairs(tokenizer, pairs, 100)
    assert len(encoded) == 3 and not drops
    ends = [[ids.count(tokenizer.eos_id) for ids in (pair.prompt, pair.chosen, pair.rejected)] for pair in encoded]
    assert ends == [[1, 1, 1]] * 3 and tokenizer.decode(encoded[0].rejected) == spelled['content'] + '<|im_end|>'
    line, = remarks_on(tokenizer, pairs)
    assert line.startswith('2 chats that spell a turn token: ') and line.endswith('(first: here)')


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    path.write_text('\n'.join(json.dumps(value) for value in (row(), row(chosen=7), row(chosen='\ud83d'), row(rejected=float('nan')))))
    with pytest.raises(UserError, match='line 2: chosen'):
        read_pairs(Source(str(path)))
    pairs, drops = read_pairs(Source(str(path)), skip_bad_rows=True)
    assert len(pairs) == 1 and [len(found) for found in drops.values()] == [2, 1]
    assert '2 that cannot be read' in str(drops) and 'line 2: chosen: expected a text' in str(drops) and '1 with an empty rejected' in str(drops)


def test_metadata_that_is_no_split_is_a_column_like_others():
    for metadata in ({'source': 'web'}, 'gold', ['train'], 3):
        assert to_pair(row(metadata=metadata), 'here', Source()).split == 'train'


def rows(value, name='pairs.jsonl'):
    return name, '\n'.join(json.dumps(row) for row in value)


def row(**changes):
    return {'prompt': 'ok?', 'chosen': 'yes', 'rejected': 'no', **changes}


def without(column):
    return {key: value for key, value in row().items() if key != column}


# what is wrong -> (file, content), settings of the source, words of the message;
# True: not an error but a counted drop
MALFORMED = {
    'no such file': (('absent.jsonl', None), {}, 'no such file', False),
    'an empty file': (('pairs.jsonl', ''), {}, 'holds no row', False),
    'not JSON': (('pairs.jsonl', '{"prompt": '), {}, 'not JSON', False),
    'not UTF-8': (('pairs.jsonl', b'{"prompt": "\xff"}'), {}, 'not UTF-8', False),
    'a list of numbers': (('pairs.json', '[1, 2]'), {}, 'expected an object', False),
    'a ragged table': (('pairs.csv', 'prompt,chosen,rejected\na,b\n'), {}, "ends before column 'rejected'", False),
    'a parquet file cut short': (('pairs.parquet', b'PAR1'), {}, 'not a whole parquet', False),
    'another extension': (('pairs.txt', 'ok?'), {}, 'a data file ends with', False),
    'no column for the other side': (rows([without('rejected')]), {}, "no column 'rejected'", False),
    'a misspelt split': (rows([row(metadata='Eval')]), {}, "must be exactly 'eval'", False),
    'a number for an answer': (rows([row(chosen=7)]), {}, 'chosen: expected a text or messages', False),
    'broken JSON in a cell': (('pairs.csv', 'chosen,rejected\n"[{""role"": ""user""","[]"\n'), {}, 'chosen: not a JSON list', False),
    'a text and messages': (rows([row(chosen=[YES])]), {}, 'one is a text, the other messages', False),
    'a message without a role': (rows([row(chosen=[{'content': 'yes'}], rejected=[NO])]), {}, 'chosen: messages[0]: no "role"', False),
    'an unknown role': (rows([row(prompt=[{'role': 'usr', 'content': 'ok?'}])]), {}, "did you mean 'user'", False),
    'an unknown speaker': (rows([row(prompt=[{'from': 'me', 'value': 'ok?'}])]), {}, '"from" is "me"', False),
    'a content that is no text': (rows([row(prompt=[{'role': 'user', 'content': 7}])]), {}, 'content: expected text', False),
    'no prompt beside texts': (rows([without('prompt')]), {}, 'no dialogue that begins with "Human:"', False),
    'no prompt beside answers': (rows([{'chosen': [YES], 'rejected': [NO]}]), {}, 'there is no prompt', False),
    'a prompt that the assistant ends': (rows([row(prompt=[ASK, NO])]), {}, 'last message is from the assistant', False),
    'another prompt than in the dialogues': (rows([row(chosen=[ASK, YES], rejected=[ASK, NO], prompt='so?')]), {}, 'said nowhere', False),
    'other messages than in the dialogues': (rows([row(chosen=[ASK, YES], rejected=[ASK, NO], prompt=[AGAIN])]), {},
                                             'do not begin with it', False),
    'messages without a template': (rows([row(prompt=[ASK])]), {'chat': False}, 'must be texts', False),
    'an unknown name in the system prompt': (rows([row()]), {'system_prompt': 'Be {tone}.'}, 'names {tone}', False),
    'tools that are no list': (rows([row(tools={'ring': 1})]), {}, 'tools: expected a list', False),
    'an empty column': (rows([row(), row(rejected='  ')]), {}, 'with an empty rejected', True),
    'a message that says nothing': (rows([row(), row(chosen=[{'role': 'assistant', 'content': ' '}], rejected=[NO])]), {},
                                    'with an empty chosen', True),
    'the same answer twice': (rows([row(), row(chosen='no')]), {}, 'with the same answer on both sides', True),
    'the same dialogue twice': (rows([row(), {'chosen': HH, 'rejected': HH}]), {}, 'with the same answer on both sides', True),
    'a dialogue that goes on': (rows([row(), {'chosen': HH, 'rejected': HH + '\n\nHuman: sure?'}]), {},
                                'is the beginning of the other', True),
    'dialogues that part early': (rows([row(), {'chosen': [ASK, YES, AGAIN, YES], 'rejected': [ASK, NO, AGAIN, NO]}]), {},
                                  'part before the last answer', True),
    'two prompts': (rows([row(), {'chosen': [ASK, YES], 'rejected': [AGAIN, YES]}]), {}, 'whose prompts differ', True),
    'a prompt that fills everything': (rows([row(), row(prompt='ok? ' * 90)]), {}, 'leaves no room', True),
    'the difference is cut off': (rows([row(), row(chosen='yes ' * 90 + 'no', rejected='yes ' * 90)]), {},
                                  'the same within max_length=60', True),
    'a template that wants other roles': (rows([row(), row(prompt=[{'role': 'tool', 'content': '7'}])]), {'template': '''\
{%- for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}'''}, 'that the chat template refuses', True),
    'a template that tells the answer before': (rows([row(), row(chosen='maybe')]), {'template': '''\
{%- if messages[-1].content == 'maybe' %}!{% elif messages|length == 1 and 'm' in messages[0].content %}{% endif %}\
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}'''}, 'that the chat template refuses', True),
}


def check_of(error):
    """File and line of the innermost check behind an exception."""
    while error.__context__ is not None and isinstance(error.__context__, (UserError, Dropped)):
        error = error.__context__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return os.path.basename(frame.filename), frame.lineno


def test_malformed_inputs(tmp_path, monkeypatch):
    """No two are caught by the same check: the lines that raise are all different."""
    checks, add = {}, Drops.add

    def noted(self, reason, where):
        noted.check = check_of(reason)
        add(self, reason, where)

    monkeypatch.setattr(Drops, 'add', noted)
    for what, ((name, content), settings, words, dropped) in MALFORMED.items():
        settings = dict(settings)
        tokenizer = load_tokenizer(os.path.join(ROOT, 'data', 'tiny'))
        tokenizer.chat_template = settings.pop('template', tokenizer.chat_template)
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if dropped:
            pairs, drops = read_pairs(Source(name=str(path)), **settings)
            found, more, _ = encode_pairs(tokenizer, pairs, 60)
            drops.update(more)
            assert len(found) == len(drops) == 1 and words in str(drops), what
            assert str(drops).startswith('1 ') and 'line 2' in str(drops), what
            check = noted.check
        else:
            with pytest.raises(UserError) as info:
                read_pairs(Source(name=str(path)), **settings)
            assert words in str(info.value) and str(path) in str(info.value) and '\n' not in str(info.value), (what, str(info.value))
            check = check_of(info.value)
        checks.setdefault(check, []).append(what)
    assert len(MALFORMED) >= 30
    shared = [names for names in checks.values() if len(names) > 1]
    assert not shared, shared


def test_a_prompt_that_the_template_writes_in_two_ways(tokenizer):
    chosen, rejected = render(tokenizer, [ASK, YES]), render(tokenizer, [AGAIN, NO])
    with pytest.raises(Dropped, match='writes in two ways'):
        truncate(None, chosen, rejected, 100, None, {'prompts': 0, 'answers': 0})


def test_drops_are_counted_by_reason():
    drops = Drops()
    for where in ('a', 'b'):
        drops.add(Dropped('with an empty chosen'), where)
    drops.add(Dropped('whose prompts differ'), 'c')
    assert str(drops) == '2 with an empty chosen (first: a); 1 whose prompts differ (first: c)'
