"""Rows of any documented format, from anywhere -> Record(prompt, completion, tools, split, where).

    messages + tools + metadata      a chat, whose last message is the answer; arguments of tool calls are
                                     objects or JSON strings
    conversations (or conversation)  the same as [{"from": "human", "value": ...}, ...]
    prompt + completion              texts, or lists of messages
    prompt_column + answer_column    any two columns, by default question + answer or prompt + answer
    text                             all of it is learned

Rows come straight from the file, line by line: Arrow would give every row the keys of all the others, filled
with null, and a chat template would show them to the model. A null of JSON Lines is somebody's, and stays. A
row holds what JSON knows, whatever file it comes from: dates are texts, decimals numbers. A mistake is a
UserError that names file, row and field. torch is not imported.

A `metadata` of "train" or "eval" says on which side a row is; any other is a column like others. An answer
with "weight": 0 (OpenAI's format) is context only.
"""
import csv
import datetime
import decimal
import difflib
import importlib
import json
import math
import os
import re
from dataclasses import dataclass

from configurator import UserError, closest
from data.chat import ROLES, normal_messages, normal_tools
from data.offline import offline_without_network
from nanoforge.flags import Source

# name: the module whose rows() are the set
EMBEDDED = {
    'devices': 'data.tasks.devices',
    'toolcalls': 'data.tasks.toolcalls',
    'questions': 'data.tasks.questions',
    'facts': 'data.tasks.facts',
    'plays': 'data.shakespeare_char.stand_in',
}
# name: rows for training and held out, frozen
SIZES = {'devices': (3200, 200), 'toolcalls': (800, 200), 'questions': (800, 200), 'facts': (1600, 56),
         'plays': (200, 20)}
LISTS = ('qa_pairs', 'data', 'rows', 'examples')    # under which a JSON object keeps its rows
SEPARATORS = (',', ';', '\t')                       # of the columns of a CSV file
NULLABLE = ('default', 'const')                     # keys of a JSON schema whose value may be null
SCHEMA_VALUES = (*NULLABLE, 'enum', 'examples')     # and those that hold values, not schemas
SPLITS = {
    'train': ('train', 'training'),
    'eval': ('eval', 'evaluation', 'validation', 'valid', 'val', 'dev'),
    'test': ('test',),
}
# "from" of a conversation: role of a message
SPEAKERS = {
    'human': 'user',
    'user': 'user',
    'gpt': 'assistant',
    'assistant': 'assistant',
    'model': 'assistant',
    'system': 'system',
    'developer': 'developer',
    'tool': 'tool',
    'observation': 'tool',
}
STRICT_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)
JSON_TYPES = {
    'string': str,
    'integer': int,
    'number': (int, float),
    'boolean': bool,
    'array': list,
    'object': dict,
}


@dataclass
class Record:
    """prompt and completion are both lists of messages, or both texts."""
    prompt: list | str
    completion: list | str
    tools: list | None
    split: str      # 'train' or 'eval'
    where: str      # 'file.jsonl line 12'


def excerpt(value):
    """The beginning of a value, for a message."""
    return json.dumps(value, default=str)[:60]


def columns_in(row):
    """The first columns of a row, for a message."""
    return ', '.join(map(str, list(row)[:8]))


# ---- rows

def read_rows(name, split='train', subset=None):
    """Yields (where, row): 'file.jsonl line 12', a dict. UserError where a file or a row cannot be read."""
    if name.lower().endswith(tuple(READERS)) or os.path.isfile(name):
        yield from read_file(name)
    elif os.path.isdir(name):
        for path in files_of(name, split):
            yield from read_file(path)
    elif name in EMBEDDED:
        yield from embedded_rows(name)
    else:
        yield from hub_rows(name, split, subset)


def files_of(directory, split):
    """The data files below a directory that are named after a split, and those named after none."""
    paths = []
    for folder, _, files in os.walk(directory):
        for file in files:
            if file.lower().endswith(tuple(READERS)) and not file.startswith('.'):
                paths.append(os.path.join(folder, file))
    if not paths:
        raise UserError(f'{directory}: no data in this directory; expected files that end with '
                        f'{", ".join(READERS)}')
    of_split = {}           # {split, None for a file that is named after none: paths}
    for path in paths:
        words = re.split(r'[^a-z]+', os.path.relpath(path, directory).lower())
        named = next((name for name, spellings in SPLITS.items() if set(spellings) & set(words)), None)
        of_split.setdefault(named, []).append(path)
    wanted = next((name for name, spellings in SPLITS.items() if split in spellings), split)
    if wanted not in of_split and None not in of_split:
        raise UserError(f'{directory}: no file of the split {split!r}; there are files of '
                        f'{", ".join(of_split)}')
    return sorted(of_split.get(wanted, []) + of_split.get(None, []))


def read_file(path):
    """(where, row) of one file, by its extension."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in READERS:
        raise UserError(f'{path}: a data file ends with {", ".join(READERS)}; rename or convert it')
    if not os.path.exists(path):
        raise UserError(f'{path}: no such file{similar_file(path)}')
    count = 0
    try:
        for count, (where, row) in enumerate(READERS[suffix](path), 1):
            if isinstance(row, list):
                row = {'messages': list_of_messages(row, f'{path} {where}')}
            if not isinstance(row, dict):
                raise UserError(f'{path} {where}: expected an object of named fields like '
                                f'{{"question": ..., "answer": ...}}, got {excerpt(row)}')
            yield f'{path} {where}', row
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 text ({error.reason} at byte '
                        f'{error.start} of a block); save it as UTF-8') from None
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}') from None
    if not count:
        raise UserError(f'{path}: the file holds no row')


def list_of_messages(row, where):
    """A row that is a list: the messages of a chat, not rows of their own."""
    if row and isinstance(row[0], dict) and not {'role', 'from'} & row[0].keys():
        raise UserError(f'{where}: unreadable: a list of rows where one row was expected; a .jsonl file has '
                        'an object on each line, and one that is a JSON list of objects is named .json')
    return row


def similar_file(path):
    """'; did you mean ...?' where a file of nearly this name lies beside it."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or '.'):
        return ''
    near = difflib.get_close_matches(name, os.listdir(folder or '.'), 1)
    return f"; did you mean '{os.path.join(folder, near[0])}'?" if near else ''


def json_lines(path):
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f'line {number}', json.loads(line)
            except (ValueError, RecursionError) as error:
                is_list = number == 1 and line.lstrip().startswith('[')
                hint = '; the file is one JSON list: name it .json' if is_list else ''
                raise UserError(f'{path} line {number}: not JSON ({error}); a JSON Lines file has one object '
                                f'on each line{hint}') from None


def json_file(path):
    """A list of rows, an object with such a list under one of LISTS, or JSON Lines under another name."""
    with open(path, encoding='utf-8-sig') as file:
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == 'Extra data':
            yield from json_lines(path)
            return
        raise UserError(f'{path}: not JSON ({error}); a .json file is a list of rows') from None
    if isinstance(value, dict):
        value = rows_in_object(value, path)
    if not isinstance(value, list):
        raise UserError(f'{path}: a list of rows was expected, this is one {type(value).__name__}')
    for number, row in enumerate(value, 1):
        yield f'row {number}', row


def rows_in_object(value, path):
    """The list of rows that a JSON object holds, or the object itself as the only row."""
    key = next((key for key in LISTS if key in value), None)
    if key and not isinstance(value[key], list):
        raise UserError(f'{path}: "{key}" is {type(value[key]).__name__}, not a list of rows')
    if key:
        return value[key]
    if not known_format(value):
        keys = ', '.join(list(value)[:5]) or 'nothing in it'
        raise UserError(f'{path}: an object with {keys}; expected a list of rows, or one under "{LISTS[0]}"')
    return [value]


def csv_file(path):
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, encoding='utf-8-sig', newline='') as file:
        line = file.readline()
        file.seek(0)
        separator = max(SEPARATORS, key=line.count)         # the first of those that are there equally often
        header = next(csv.reader([line], delimiter=separator), [])
        # written as "question, answer": the cells will have that space, too
        spaced = any(name.startswith(' ') for name in header[1:])
        try:
            rows = csv.reader(file, delimiter=separator, skipinitialspace=spaced, strict=True)
            columns = column_names(next(rows, []), path)
            for number, cells in enumerate(filter(None, rows), 1):
                if len(cells) > len(columns):
                    raise UserError(f'{path} row {number}: {len(cells) - len(columns)} more cells than the '
                                    f'header has columns; quote cells that hold {separator!r}')
                if len(cells) < len(columns):
                    raise UserError(f'{path} row {number}: the row ends before column '
                                    f'{columns[len(cells)]!r}')
                yield f'row {number}', dict(zip(columns, cells))
        except csv.Error as error:
            raise UserError(f'{path}: not a CSV file ({error})') from None


def column_names(header, path):
    """The cells of a CSV header without the spaces around them."""
    columns = [name.strip() for name in header]
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f'{path}: two columns are called {name!r}; rename one of them')
    return columns


def parquet_file(path):
    import pyarrow
    import pyarrow.parquet
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f'row {number}', as_json(row)
    except pyarrow.ArrowException as error:
        raise UserError(f'{path}: not a whole parquet file ({first_line(error)[:80]})') from None


READERS = {
    '.jsonl': json_lines,
    '.json': json_file,
    '.csv': csv_file,
    '.tsv': csv_file,
    '.parquet': parquet_file,
}


def first_line(error):
    return str(error).partition('\n')[0]


def embedded_rows(name):
    """The rows of an embedded set, which are generated; held-out ones have the metadata 'eval'."""
    module = importlib.import_module(EMBEDDED[name])
    train, held_out = SIZES[name]
    rows = module.rows('train', train, 0) + module.rows('eval', held_out, 0)
    for number, row in enumerate(rows, 1):
        yield f'{name} row {number}', row


def hub_rows(name, split, subset):
    """A data set of the Hugging Face hub, or of its cache on this machine."""
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name):
        raise UserError(f'{name or "(no name)"}: no such file or directory, and no '
                        'name of a data set on the hub')
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name}: reading a data set of the hub needs: pip install datasets') from None
    offline_without_network()
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:      # of a dozen kinds: not found, gated, offline, no such split
        reason = f'{type(error).__name__}: {first_line(error)[:120]}'
        raise UserError(f'{name}: no such file or directory, nor an embedded set ({", ".join(EMBEDDED)}), '
                        f'and hub and local cache do not provide it ({reason})') from None
    for number, row in enumerate(rows, 1):
        yield f'{name} row {number}', as_json(row)


def as_json(value):
    """A value of Arrow as JSON has it, without the keys that hold null: Arrow gives every object the keys of
    all the others."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(as_json, value), key=str)
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors='backslashreplace')
    if hasattr(value, 'tolist'):                    # numpy's numbers and arrays
        return as_json(value.tolist())
    return str(value)


def without_nulls(value, values):
    """`value` without the keys that hold null, fields that are not set. What stands under one of `values` is
    somebody's own and stays as it is."""
    if isinstance(value, dict):
        return {key: item if key in values else without_nulls(item, values)
                for key, item in value.items() if item is not None or key in NULLABLE}
    return [without_nulls(item, values) for item in value] if isinstance(value, list) else value


def without_nan(row):
    """The row with null where a column holds NaN: pandas writes a missing cell so."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in row.items()}


def strict_json(row):
    """The row with null for every number that JSON does not know: to be written, not to be learned."""
    def no_number(name):
        return None

    try:
        STRICT_JSON.encode(row)
        return row
    except ValueError:
        return json.loads(json.dumps(row, default=str), parse_constant=no_number)


def check_values(value):
    """UserError where a text has half a character, or a number is none: no tokenizer or JSON takes them."""
    try:
        STRICT_JSON.encode(value).encode()
    except ValueError:
        refuse_values(value)


def refuse_values(value):
    """UserError of the first value that is not one of JSON in UTF-8."""
    if isinstance(value, str) and (half := re.search('[\ud800-\udfff]', value)):
        before = value[:half.start()][-20:]
        raise UserError(f'half a character (a surrogate without its other half) behind {before!r}; repair '
                        'the text')
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{value} is no value of JSON; leave it out, or write null')
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            refuse_values(item)


# ---- rows -> records

def known_format(row):
    """The format of a row: messages, conversations, completion, answer or text; None for none of them."""
    for field in ('messages', 'conversations', 'conversation'):
        if field in row:
            return field
    if 'prompt' in row and 'completion' in row:
        return 'completion'
    if 'answer' in row and ('question' in row or 'prompt' in row):
        return 'answer'
    return 'text' if 'text' in row else None


def to_record(row, where, source=None, system_prompt=None):
    """A row of any documented format -> Record; `where` begins the message of a UserError.

    source         a Source; its prompt_column and answer_column, where set, name what is asked and learned
    system_prompt  a template over the row's columns ('Rate this: {label}'): the system message of the chat.
                   For a row that is neither chat nor question and answer the filled template is the text that
                   is learned, all of it.
    """
    try:
        record = read_record(without_nan(row), where, source or Source(), system_prompt)
        check_values([record.prompt, record.completion, record.tools])
        return record
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def text_record(row, where, column):
    """A row whose `column` is a text -> Record, all of which is learned; `where` begins the message of a
    UserError."""
    if column not in row:
        raise UserError(f'{where}: there is no column {column!r} of the text to learn, but '
                        f'{columns_in(row) or "none"}; text_column names another')
    record = to_record({'text': row[column]}, where)
    record.split = split_of_row(row) or 'train'
    return record


def read_record(row, where, source, system_prompt):
    split = split_of_row(row) or 'train'
    system = fill(system_prompt, row, source) if system_prompt else None
    format = known_format(row)
    if format == 'answer' or source.prompt_column or source.answer_column:
        prompt_column = source.prompt_column or ('question' if 'question' in row else 'prompt')
        return question_and_answer(row, prompt_column, source.answer_column or 'answer', system, split, where)
    if format in ('messages', 'conversations', 'conversation'):
        messages = as_messages(parsed(row[format], format), format)
        return chat_record(messages, row.get('tools'), system, split, where)
    if format == 'completion':
        return prompt_and_completion(row, system, split, where)
    if system is not None:
        return Record('', system, None, split, where)
    if format == 'text':
        return Record('', text_of(row, 'text'), None, split, where)
    if 'chosen' in row and 'rejected' in row:
        raise UserError('chosen and rejected are a preference pair, which train_dpo.py learns from')
    columns = f'columns {columns_in(row) or "(none)"} are no known format'
    for field in ('messages', 'conversations', 'completion', 'question', 'answer'):
        near = difflib.get_close_matches(field, map(str, row), 1)
        if near:
            raise UserError(f'{columns}: did you mean {field!r} by {near[0]!r}?')
    raise UserError(f'{columns}: messages, prompt + completion, question + answer or text; name yours with '
                    '--prompt_column=... and --answer_column=...')


def split_of_row(row):
    """'train' or 'eval', as the row's metadata says; None where it says neither: whose data has a column of
    that name for something else means no split. UserError for a split that is misspelt."""
    metadata = row.get('metadata')
    if 'metadata' in row and metadata in (None, ''):
        return 'train'
    if not isinstance(metadata, str):
        return None
    lower = metadata.strip().lower()
    split = next((name for name, spellings in SPLITS.items() if lower in spellings), None)
    if split and metadata not in ('train', 'eval'):
        raise UserError(f'metadata: {metadata!r} must be exactly {"train" if split == "train" else "eval"!r}')
    return split


def text_of(row, column):
    """The text in a column, which must hold some."""
    if column not in row:
        raise UserError(f'there is no column {column!r}{closest(column, map(str, row))} (columns: '
                        f'{columns_in(row)})')
    value = row[column]
    if value is None:
        raise UserError(f'{column}: null (or NaN) where a text was expected')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        check_values(value)
        return str(value)
    if not isinstance(value, str):
        raise UserError(f'{column}: expected a text, got {excerpt(value)}')
    if not value.strip():
        raise UserError(f'{column}: an empty text')
    return value


def parsed(value, field):
    """A list, which may be written as JSON text (as in CSV)."""
    if isinstance(value, str) and value.lstrip().startswith('['):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f'{field}: not a JSON list ({error})') from None
    return value


def fill(template, row, source):
    """`template` with the columns of the row for their {names}; {{ and }} are braces."""
    known = source.dataset_columns or list(row)

    def column(match):
        name = match[1]
        if not name:
            return match[0][0]
        if name not in known:
            raise UserError(f'system_prompt names {{{name}}}, which is no column of '
                            f'data.datasets.dataset_columns{closest(name, known)}')
        if name not in row:
            raise UserError(f'system_prompt names {{{name}}}, a column that this row lacks')
        return '' if row[name] is None else str(row[name])

    return re.sub(r'\{\{|\}\}|\{(\w+)\}', column, template)


def question_and_answer(row, prompt_column, answer_column, system, split, where):
    prompt = [{'role': 'user', 'content': text_of(row, prompt_column)}]
    if system is not None:
        prompt = with_system(prompt, system)
    completion = [{'role': 'assistant', 'content': text_of(row, answer_column)}]
    return Record(prompt, completion, None, split, where)


def prompt_and_completion(row, system, split, where):
    prompt, completion = parsed(row['prompt'], 'prompt'), parsed(row['completion'], 'completion')
    are_chats = [isinstance(value, (list, dict)) for value in (prompt, completion)]
    if are_chats == [False, False]:
        prompt = '' if row['prompt'] == '' else text_of(row, 'prompt')
        return Record((system or '') + prompt, text_of(row, 'completion'), None, split, where)
    if are_chats != [True, True]:
        raise UserError('prompt and completion: one is a text, the other a list '
                        'of messages; make both the same')
    prompt, completion = ([value] if isinstance(value, dict) else value for value in (prompt, completion))
    if [message.get('role') for message in completion if isinstance(message, dict)] != ['assistant']:
        raise UserError('completion: expected one message from the assistant')
    return chat_record(prompt + completion, row.get('tools'), system, split, where)


def as_messages(messages, field):
    """[{"from": "human", "value": text}] -> [{"role": "user", "content": text}]; others stay as they are."""
    if not isinstance(messages, list):
        return messages
    if not any(isinstance(message, dict) and 'from' in message for message in messages):
        return messages
    converted = []
    for i, message in enumerate(messages):
        speaker = message.get('from') if isinstance(message, dict) else None
        if speaker not in SPEAKERS:
            raise UserError(f'{field}[{i}]: "from" is {json.dumps(speaker)}, not one of '
                            f'{", ".join(SPEAKERS)}')
        text = message.get('value')
        if not isinstance(text, str):
            raise UserError(f'{field}[{i}]: "value" must be the text that was said, got {excerpt(text)}')
        converted.append({'role': SPEAKERS[speaker], 'content': text})
    return converted


def with_system(messages, text):
    """Messages with this system message before them, in place of those that they have."""
    others = [message for message in messages if message['role'] not in ('system', 'developer')]
    return [{'role': 'system', 'content': text}, *others]


def chat_record(messages, tools, system, split, where):
    """A Record of a whole chat: what is learned is its last message."""
    messages = checked_messages(messages)
    if system is not None:
        messages = with_system(messages, system)
    last = messages[-1]
    if last['role'] != 'assistant':
        raise UserError(f'messages: the last one is from {last["role"]!r}; the assistant\'s answer or tool '
                        'call, which is to be learned, must be the last')
    if len(messages) == 1:
        raise UserError('messages: nothing comes before the answer of the '
                        'assistant; begin with what the user asks')
    if not last['content'].strip() and not last.get('tool_calls'):
        raise UserError('messages: the last one, the answer, has neither content nor tool_calls')
    return Record(messages[:-1], [last], checked_tools(tools), split, where)


def checked_messages(messages):
    """Messages of known roles with texts for contents; nulls in them are dropped."""
    if not isinstance(messages, list):
        raise UserError(f'messages: expected a list of {{"role": ..., "content": ...}}, got '
                        f'{excerpt(messages)}')
    if not messages:
        raise UserError('messages: an empty list')
    for i, message in enumerate(messages):
        check_message(message, f'messages[{i}]')
    return normal_messages(without_nulls(messages, ('arguments',)), True)


def check_message(message, where):
    if not isinstance(message, dict):
        raise UserError(f'{where}: expected {{"role": ..., "content": ...}}, got {excerpt(message)}')
    if 'role' not in message:
        raise UserError(f'{where}: no "role" (fields: {", ".join(message)})')
    role, calls, weight = message['role'], message.get('tool_calls') or [], message.get('weight')
    if role not in ROLES:
        raise UserError(f'{where}: role {json.dumps(role)} is none of '
                        f'{", ".join(ROLES)}{closest(str(role).lower(), ROLES)}')
    if role in ('user', 'tool') and message.get('content') is None:
        raise UserError(f'{where}: a message from {role!r} without content')
    if calls and role != 'assistant':
        raise UserError(f'{where}: tool_calls in a message from {role!r}; only the assistant calls tools')
    if weight is not None and (role != 'assistant' or isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f'{where}: weight {excerpt(weight)} of a message from {role!r}: an answer has 1 '
                        '(learned) or 0 (context only), and other messages have none')
    if not isinstance(calls, list):
        raise UserError(f'{where}.tool_calls: expected a list of calls, got {excerpt(calls)}')
    for i, call in enumerate(calls):
        check_call(call, f'{where}.tool_calls[{i}]')


def check_call(call, where):
    function = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f'{where}: expected '
                        f'{{"function": {{"name": ..., "arguments": ...}}}}, got {excerpt(call)}')
    name, arguments = function.get('name'), function.get('arguments')
    if not isinstance(name, str) or not name:
        raise UserError(f'{where}: the call names no function')
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise UserError(f'{where}: arguments of {name} are a text that is not JSON: '
                            f'{arguments[:60]!r}') from None
    if arguments not in (None, '') and not isinstance(arguments, dict):
        raise UserError(f'{where}: arguments of {name} are '
                        f'{excerpt(arguments)}, not an object of named values')


def checked_tools(tools):
    """[{'type': 'function', 'function': {...}}] or None. tools may be JSON text; nulls are dropped."""
    tools = parsed(tools, 'tools')
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f'tools: expected a list of '
                        f'{{"function": {{"name": ..., "parameters": ...}}}}, got {excerpt(tools)}')
    names = [check_tool(tool, f'tools[{i}]') for i, tool in enumerate(tools)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'tools: {name!r} is there {names.count(name)} times')
    return normal_tools(without_nulls(tools, SCHEMA_VALUES))


def check_tool(tool, where):
    """The name of a tool; UserError where it is not a JSON schema of a function."""
    function = tool.get('function', tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise UserError(f'{where}: expected '
                        f'{{"function": {{"name": ..., "parameters": ...}}}}, got {excerpt(tool)}')
    name, parameters = function.get('name'), function.get('parameters')
    if not isinstance(name, str):
        raise UserError(f'{where}: the function has no name')
    if parameters is not None and not isinstance(parameters, dict):
        raise UserError(f'{where} ({name}): parameters must be a JSON schema, got {excerpt(parameters)}')
    if parameters and not isinstance(parameters.get('properties') or {}, dict):
        raise UserError(f'{where} ({name}): properties must be an object, one entry a parameter')
    return name


# ---- tool calls against their schemas

def broken_calls(record):
    """[(what, text)]: how the tool calls that a Record teaches break the schemas of the tools on offer."""
    if isinstance(record.completion, str):
        return []
    schemas = {}
    for tool in record.tools or []:
        schemas[tool['function']['name']] = tool['function'].get('parameters') or {}
    problems = []
    for message in record.completion:
        for call in message.get('tool_calls') or []:
            name, arguments = call['function']['name'], call['function']['arguments']
            if name in schemas:
                problems += broken_arguments(name, arguments, schemas[name])
            else:
                problems.append(('unknown tool', f'{name} is called, but not on '
                                                 f'offer{closest(name, schemas)}'))
    return problems


def broken_arguments(name, arguments, schema):
    """[(what, text)] for the arguments of one call; schema: the JSON schema of the tool's parameters."""
    properties = schema.get('properties') or {}
    problems = []
    for key in schema.get('required') or []:
        if key not in arguments:
            problems.append(('missing argument', f'{name} is called without {key}, which it requires'))
    for key, value in arguments.items():
        if key in properties and properties[key] is not None:
            problems += broken_value(f'{name}: {key}={json.dumps(value)[:40]}', value, properties[key])
        elif properties and schema.get('additionalProperties') is not True:
            problems.append(('unknown argument', f'{name} has no parameter {key}{closest(key, properties)}'))
    return problems


def broken_value(shown, value, schema):
    if not isinstance(schema, dict) or value is None and schema.get('nullable'):
        return []
    types = schema.get('type')
    if not isinstance(types, list):
        types = [types]
    types = [type.lower() for type in types if isinstance(type, str)]
    if types and not any(is_of_type(value, type) for type in types):
        return [('wrong type', f'{shown} is not of type {" or ".join(types)}')]
    if schema.get('enum') and value not in schema['enum']:
        return [('not allowed', f'{shown} is none of {schema["enum"]}')]
    return []


def is_of_type(value, type):
    """Whether a value is of a type of JSON schema; of one that we do not know, any value is."""
    if isinstance(value, bool):
        return type == 'boolean' or type not in JSON_TYPES
    if type == 'integer' and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, JSON_TYPES.get(type, object))
