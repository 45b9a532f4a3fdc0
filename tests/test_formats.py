"""Every documented format and place of rows is read; forty kinds of malformed input are each refused
by a check of their own."""
import datetime
import decimal
import inspect
import json
import os
import socket
import random
import subprocess
import sys
import traceback

import numpy as np
import huggingface_hub.constants
import pytest

from configurator import UserError
from data import formats
from data.batches import best_fit
from data.offline import offline_without_network
from data.formats import Source, broken_calls, read_rows, split_of_row, to_record
from data.parallel_map import map_chunks
from data.tasks import devices, toolcalls

ASK, ANSWER = {'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}
CALL = {'function': {'name': 'ring', 'arguments': {'who': 'Tom'}}}
TOOL = {'function': {'name': 'ring', 'parameters': {'type': 'OBJECT', 'properties': {'who': {'type': 'STRING'}}, 'required': ['who']}}}


def chat(*messages, **more):
    return {'messages': list(messages), **more}


def calling(*calls, **more):
    return chat(ASK, {'role': 'assistant', 'tool_calls': list(calls)}, tools=[TOOL], **more)


def write(path, value):
    path.write_text('\n'.join(json.dumps(row) for row in value) + '\n' if path.suffix == '.jsonl' else json.dumps(value), encoding='utf-8')
    return str(path)


@pytest.mark.parametrize('row, prompt, completion', [
    (chat(ASK, ANSWER), [ASK], [ANSWER]),
    (chat({'role': 'developer', 'content': 'be kind'}, ASK, ANSWER), [{'role': 'developer', 'content': 'be kind'}, ASK], [ANSWER]),
    ({'conversations': [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'hello'}]}, [ASK], [ANSWER]),
    ({'conversation': [ASK, ANSWER]}, [ASK], [ANSWER]),
    ({'prompt': [ASK], 'completion': [ANSWER]}, [ASK], [ANSWER]),
    ({'prompt': 'hi', 'completion': ' hello'}, 'hi', ' hello'),
    ({'question': 'hi', 'answer': 'hello'}, [ASK], [ANSWER]),
    ({'prompt': 'hi', 'answer': 'hello'}, [ASK], [ANSWER]),
    ({'text': 'once'}, '', 'once'),
    ({'messages': json.dumps([ASK, ANSWER])}, [ASK], [ANSWER]),
])
def test_formats(row, prompt, completion):
    record = to_record(row, 'x')
    assert (record.prompt, record.completion, record.split, record.tools) == (prompt, completion, 'train', None)


def test_tool_calls_as_objects_and_as_json_strings():
    as_text = {'id': '1', 'function': {'name': 'ring', 'arguments': '{"who": "Tom"}'}}
    unset = {'function': {'name': 'ring', 'arguments': {'who': 'Tom'}}, 'id': None}
    null_tool = json.loads(json.dumps(TOOL))
    null_tool['function']['parameters']['properties']['minutes'] = None         # no schema: a key that Arrow filled in
    for call, tool in ((CALL, TOOL), (as_text, TOOL), (unset, null_tool), (CALL, json.dumps(TOOL))):
        tools = f'[{tool}]' if isinstance(tool, str) else [tool]
        record = to_record({**calling(call, metadata='eval'), 'tools': tools}, 'x')
        assert record.completion[0]['tool_calls'][0]['function'] == CALL['function']
        assert record.tools == [{'type': 'function', **TOOL}] and record.split == 'eval'
        assert not broken_calls(record)


def test_a_null_that_somebody_wrote_stays():
    """As an object as in a JSON string; where the schema does not allow it that is said."""
    schema = {'type': 'object', 'properties': {'unit': {'type': ['string', 'null'], 'default': None}, 'kind': {'const': None, 'enum': [None]}}}
    for arguments in ({'unit': None}, '{"unit": null}'):
        row = chat(ASK, {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'set', 'arguments': arguments}}]},
                   tools=[{'name': 'set', 'description': None, 'parameters': schema}])
        record = to_record(row, 'x')
        assert record.completion[0]['tool_calls'][0]['function']['arguments'] == {'unit': None}
        assert record.tools[0]['function'] == {'name': 'set', 'parameters': schema} and not broken_calls(record)
    call = {'function': {'name': 'ring', 'arguments': {'who': None}}}
    assert broken_calls(to_record(calling(call), 'x')) == [('wrong type', 'ring: who=null is not of type string')]


def test_columns_and_system_prompt_of_a_recipe():
    row = {'ask': 'hi', 'say': 'hello', 'mood': 'kind {x}', 'n': 3}
    source = Source(prompt_column='ask', answer_column='say', dataset_columns=['mood', 'n'])
    record = to_record(row, 'x', source, 'Be {mood}, {{n}}={n}.')
    assert record.prompt == [{'role': 'system', 'content': 'Be kind {x}, {n}=3.'}, ASK] and record.completion == [ANSWER]
    # neither chat nor question: it is the text
    assert to_record(row, 'x', Source(), '{ask}-{say}').completion == 'hi-hello'


def test_places(tmp_path):
    wanted = [{'question': f'q{i}', 'answer': f'a{i}'} for i in range(3)]
    (tmp_path / 'set').mkdir()
    files = [write(tmp_path / 'rows.jsonl', wanted), write(tmp_path / 'rows.json', wanted),
             write(tmp_path / 'qa.json', {'qa_pairs': wanted}), str(tmp_path / 'rows.csv'), str(tmp_path / 'rows.parquet'),
             write(tmp_path / 'set' / 'train-0.jsonl', wanted)[:-len('/train-0.jsonl')]]
    (tmp_path / 'rows.csv').write_text('question,answer\nq0,a0\n"q1","a1"\nq2,a2\n')
    (tmp_path / 'lines.json').write_text(''.join(json.dumps(row) + '\n' for row in wanted))
    write(tmp_path / 'set' / 'test.jsonl', [{'question': 'test', 'answer': 'test'}])
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), files[4])
    for name in [*files, str(tmp_path / 'lines.json')]:
        assert [row for _, row in read_rows(name)] == wanted, name
    assert [row['answer'] for _, row in read_rows(str(tmp_path / 'set'), 'test')] == ['test']
    assert [where for where, _ in read_rows(files[0])][1] == f'{files[0]} line 2'


@pytest.mark.parametrize('text', [
    'question, answer\nwhat?, it\n"a, b", "c, d"\n', '\ufeffquestion;answer\nwhat?;it\na, b;c, d\n', 'question\tanswer\nwhat?\tit\na, b\tc, d\n',
    '\ufeff question ,answer \r\nwhat?,it\r\n\r\n"a, b","c, d"\r\n'])
def test_a_csv_as_spreadsheets_write_it(tmp_path, text):
    """Spaces behind the commas, a byte order mark, semicolons, tabs."""
    (tmp_path / 'rows.csv').write_bytes(text.encode())
    assert [row for _, row in read_rows(str(tmp_path / 'rows.csv'))] == [{'question': 'what?', 'answer': 'it'}, {'question': 'a, b', 'answer': 'c, d'}]


def test_a_space_that_belongs_to_a_cell_stays(tmp_path):
    (tmp_path / 'rows.csv').write_text('prompt,completion\n2 +, 3\n')
    assert next(read_rows(str(tmp_path / 'rows.csv')))[1] == {'prompt': '2 +', 'completion': ' 3'}


def test_values_of_arrow_become_those_of_json(tmp_path):
    import pyarrow
    import pyarrow.parquet
    row = {'question': 'when?', 'answer': decimal.Decimal('2.50'), 'n': decimal.Decimal('3.00'), 'at': datetime.datetime(2024, 1, 2, 3),
           'day': datetime.date(2024, 1, 2), 'raw': b'caf\xc3\xa9 \xff', 'took': datetime.timedelta(hours=1), 'unset': None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / 'rows.parquet')
    (where, read), = read_rows(str(tmp_path / 'rows.parquet'))
    assert read == {'question': 'when?', 'answer': 2.5, 'n': 3, 'at': '2024-01-02T03:00:00', 'day': '2024-01-02', 'raw': 'café \\xff', 'took': '1:00:00'}
    assert to_record(read, where).completion[0]['content'] == '2.5'
    assert formats.as_json({'a': np.float32(0.5), 'b': np.arange(3), 'c': {'y', 'x'}, 4: (1, True)}) == {'a': 0.5, 'b': [0, 1, 2], 'c': ['x', 'y'], '4': [1, True]}


def test_nan_of_pandas_is_no_text():
    nan = float('nan')
    for row in ({'question': nan, 'answer': 'a'}, {'question': 'q', 'answer': nan}, {'text': nan}, {'question': 'q', 'answer': float('inf')},
                {'prompt': 'p', 'completion': nan}, chat(ASK, {**ANSWER, 'content': nan}), {'messages': nan}):
        with pytest.raises(UserError, match='null|expected|no value of JSON'):
            to_record(row, 'x')
    # a cell that is not set, as null
    record = to_record({**chat(ASK, ANSWER), 'tools': nan, 'metadata': nan}, 'x', Source(), 'Be {tools}kind.')
    assert record.tools is None and record.prompt[0]['content'] == 'Be kind.'


def test_metadata_is_a_split_only_where_it_says_one():
    for metadata in ({'source': 'web'}, 'gsm8k', ['eval'], 7, {}):
        assert split_of_row({'metadata': metadata}) is None and to_record({**chat(ASK, ANSWER), 'metadata': metadata}, 'x').split == 'train'
    assert [split_of_row({'metadata': metadata}) for metadata in ('train', 'eval', None, '')] == ['train', 'eval', 'train', 'train'] and split_of_row({}) is None
    for metadata in ('test', 'Train', 'validation '):
        with pytest.raises(UserError, match='must be exactly'):
            split_of_row({'metadata': metadata})


def test_rows_keep_their_own_keys(tmp_path):
    other = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'b', 'arguments': {'z': 1}}}]}
    mixed = [calling(CALL, metadata='train'), chat(ASK, other)]
    assert [row for _, row in read_rows(write(tmp_path / 'a.jsonl', mixed))] == mixed


@pytest.mark.parametrize('name', ['devices', 'toolcalls'])
def test_embedded_tool_calls(name):
    split = {'train': [], 'eval': []}
    for where, row in read_rows(name):
        record = to_record(row, where)
        split[record.split].append(record)
        assert not broken_calls(record)
    assert [len(part) for part in split.values()] == list(formats.SIZES[name])


def test_hub_that_does_not_answer():
    code = "from data.formats import read_rows; next(read_rows('google/mobile-actions'))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'},
                          cwd=os.path.dirname(os.path.dirname(formats.__file__)))
    assert 'UserError: google/mobile-actions: no such file' in done.stderr


def test_torch_is_not_imported():
    code = 'import sys, data.formats; from data.tasks.env import find_task; find_task("gsm8k"); assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True,
                   cwd=os.path.dirname(os.path.dirname(formats.__file__)))


# A file (name, content) or a row, and words of the message. `None` for a content: nothing is written.
FILES = [
    ('rows.txt', 'x', 'ends with'), ('none.jsonl', None, 'no such file'), ('latin.jsonl', b'{"text": "caf\xe9"}', 'not UTF-8'),
    ('bad.jsonl', '{"text": "a"}\n{"text": \n', 'line 2: not JSON'), ('bad.json', '[{"text": ', 'not JSON'),
    ('number.jsonl', '{"text": "a"}\n7\n', 'line 2: expected an object'), ('object.json', '{"version": 1}', 'expected a list of rows'),
    ('pairs.json', '{"qa_pairs": 3}', '"qa_pairs" is int'), ('word.json', '"text"', 'one str'), ('empty.jsonl', '\n', 'holds no row'),
    ('long.csv', 'question,answer\na,b,c\n', 'more cells'), ('short.csv', 'question,answer\na\n', "before column 'answer'"),
    ('one_list.jsonl', '[{"text": "a"}, {"text": "b"}]', 'a JSON list of objects is named .json'), ('twice.csv', 'text,text\na,b\n', "two columns are called 'text'"),
    ('quote.csv', 'question,answer\n"a,b\n', 'not a CSV'), ('bad.parquet', 'PAR1', 'not a whole parquet'), ('folder/', None, 'no data in'),
    ('only_test/test.jsonl', '{"text": "a"}', 'no file of the split'), ('what ever', None, 'no name of a data set'),
]
ROWS = [
    ({'mesages': []}, "did you mean 'messages' by 'mesages'"), ({'a': 'x', 'b': 'y'}, '--prompt_column'),
    ({'chosen': 'a', 'rejected': 'b'}, 'train_dpo.py'), ({'text': None}, 'null'), ({'text': ['a']}, 'expected a text'),
    ({'question': ' ', 'answer': 'a'}, 'question: an empty text'), (chat(ASK, ANSWER, metadata='Eval'), "exactly 'eval'"),
    ({'messages': 'hi'}, 'expected a list'),
    ({'messages': '[{"role"'}, 'not a JSON list'), (chat(), 'an empty list'), (chat('hi'), 'expected {"role"'),
    (chat({'content': 'a'}), 'no "role"'),
    (chat({'role': 'User', 'content': 'a'}, ANSWER), "did you mean 'user'"), (chat({'role': 'user'}, ANSWER), 'without content'),
    (chat({'role': 'user', 'content': 5}, ANSWER), 'expected text, got 5'), (chat(ASK, ANSWER, ASK), "from 'user'"),
    (chat(ANSWER), 'nothing comes before'),
    (chat(ASK, {'role': 'assistant', 'content': ' '}), 'neither content nor tool_calls'),
    (chat({**ASK, 'tool_calls': [CALL]}, ANSWER), 'only the assistant'),
    (chat(ASK, {'role': 'assistant', 'tool_calls': CALL}), 'expected a list of calls'),
    (calling('ring'), 'expected {"function"'), (calling({'function': {'arguments': {}}}), 'names no function'),
    (calling({'function': {'name': 'ring', 'arguments': '{who'}}), 'not JSON'),
    (calling({'function': {'name': 'ring', 'arguments': ['Tom']}}), 'not an object of named'),
    (chat(ASK, ANSWER, tools={'name': 'ring'}), 'tools: expected a list'), (chat(ASK, ANSWER, tools=['ring']), 'tools[0]: expected'),
    (chat(ASK, ANSWER, tools=[{'function': {}}]), 'has no name'),
    (chat(ASK, ANSWER, tools=[{'name': 'ring', 'parameters': ['who']}]), 'must be a JSON schema'),
    (chat(ASK, ANSWER, tools=[{'name': 'ring', 'parameters': {'properties': ['who']}}]), 'properties must be an object'),
    (chat(ASK, ANSWER, tools=[TOOL, TOOL]), 'there 2 times'), ({'conversations': [{'from': 'bot', 'value': 'a'}]}, '"from" is "bot"'),
    ({'conversations': [{'from': 'human', 'text': 'a'}]}, '"value" must be'),
    ({'prompt': 'a', 'completion': [ANSWER]}, 'make both the same'),
    ({'prompt': [ASK], 'completion': [ASK]}, 'one message from the assistant'),
    (chat(ASK, {**ANSWER, 'weight': 0.5}), 'an answer has 1 (learned) or 0'), ({'question': 'cut \ud83d', 'answer': 'a'}, "behind 'cut '"),
    (calling({'function': {'name': 'ring', 'arguments': {'who': float('nan')}}}), 'nan is no value of JSON'),
]
COLUMNS = [({'q': 'a', 'answer': 'b'}, Source(prompt_column='question'), None, "no column 'question'"),
           ({'question': 'a', 'answer': 'b'}, Source(dataset_columns=['question']), '{questoin}', "did you mean 'question'"),
           ({'question': 'a', 'answer': 'b'}, Source(dataset_columns=['mood']), '{mood}', 'this row lacks')]


def refusal(action):
    """(message, the line of formats.py or chat.py that refused)"""
    with pytest.raises(UserError) as info:
        action()
    error = info.value
    # to_record() puts the row in front
    while error.__context__ is not None and isinstance(error.__context__, UserError):
        error = error.__context__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert '\n' not in str(info.value)
    return str(info.value), (os.path.basename(frame.filename), frame.lineno)


def test_malformed_inputs_are_refused_in_one_line_each_by_its_own_check(tmp_path):
    checks = {}
    for name, content, words in FILES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith('/'):
            path.mkdir()
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        target = path if not name.startswith('only_test') else path.parent
        message, line = refusal(lambda: list(read_rows(str(target) if ' ' not in name else name)))
        assert words in message and str(tmp_path if ' ' not in name else name) in message, message
        checks.setdefault(line, []).append(name)
    for i, (row, words) in enumerate(ROWS):
        path = write(tmp_path / f'{i}.jsonl', [{'text': 'good'}, row])
        where, found = list(read_rows(path))[1]
        message, line = refusal(lambda: to_record(found, where))
        assert words in message and message.startswith(f'{path} line 2: '), message
        checks.setdefault(line, []).append(row)
    for row, source, template, words in COLUMNS:
        message, line = refusal(lambda: to_record(row, 'file.csv row 7', source, template))
        assert words in message and message.startswith('file.csv row 7: '), message
        checks.setdefault(line, []).append(row)
    assert not {line: cases for line, cases in checks.items() if len(cases) > 1}
    assert len(checks) >= 50


@pytest.mark.parametrize('call, kind', [
    ({'name': 'rign', 'arguments': {'who': 'Tom'}}, 'unknown tool'), ({'name': 'ring', 'arguments': {}}, 'missing argument'),
    ({'name': 'ring', 'arguments': {'who': 'Tom', 'whom': 'Mia'}}, 'unknown argument'),
    ({'name': 'ring', 'arguments': {'who': 3}}, 'wrong type')])
def test_calls_that_break_their_schema(call, kind):
    assert [found for found, _ in broken_calls(to_record(calling({'function': call}), 'x'))] == [kind]


def test_best_fit():
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(2000)]
    bins = best_fit(lengths, 100)
    assert sorted(i for packed in bins for i in packed) == list(range(2000))
    assert all(sum(lengths[i] for i in packed) <= 100 for packed in bins)
    assert len(bins) <= 1.02 * -(-sum(lengths) // 100)
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match='item 1'):
        best_fit([1, 11], 10)


def test_every_field_of_a_source_is_explained():
    for line in inspect.getsource(Source).splitlines()[3:]:
        assert '  # ' in line, line


@pytest.mark.parametrize('task', [devices, toolcalls])
def test_embedded_rows_are_those_of_the_task(task):
    name = task.__name__.rpartition('.')[2]
    train, held_out = formats.SIZES[name]
    assert [row for _, row in read_rows(name)] == task.rows('train', train, 0) + task.rows('eval', held_out, 0)


def test_held_out_devices_are_new():
    """No value, wording, opening or joint of a held-out row occurs in training;
    a dozen tools, one to three calls a row."""
    train, held_out = (devices.problems(split, count, 0) for split, count in zip(('train', 'eval'), formats.SIZES['devices']))
    values = [{str(value) for problem in part for call in problem['calls'] for value in call['arguments'].values()} for part in (train, held_out)]
    assert len(devices.TOOLS) == 12 and not values[0] & values[1]
    assert not any(set(taught) & set(asked) for _, _, taught, asked in devices.TOOLS.values())
    assert {len(problem['calls']) for problem in held_out} == {1, 2, 3} and {len(problem['tools']) for problem in train} == {2, 3}


@pytest.mark.parametrize('num_proc', [1, 2])
def test_chunks_come_back_in_order_and_are_taken_as_they_are_needed(num_proc):
    taken = []

    def chunks():
        for number in range(40):
            taken.append(number)
            yield [number] * 3

    results = map_chunks(sum, chunks(), num_proc)
    assert next(results) == ([0, 0, 0], 0) and len(taken) <= 2 * num_proc + 1
    assert list(results) == [([number] * 3, 3 * number) for number in range(1, 40)]
    with pytest.raises(TypeError):
        list(map_chunks(sum, [[1], ['a']], num_proc))


def test_without_a_network_the_hub_is_given_up_at_once(monkeypatch):
    def unknown(*arguments):
        raise socket.gaierror(-2, 'Name or service not known')

    for name in [name for name in os.environ if name.lower().endswith('_proxy')]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *arguments: [])
    offline_without_network()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    monkeypatch.setenv('HTTPS_PROXY', 'http://proxy:3128')          # which looks names up itself
    offline_without_network()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.delenv('HTTPS_PROXY')
    offline_without_network()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
