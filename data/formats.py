"""Rows of any documented format, from any documented place -> Record(prompt, completion, tools, split, where).

    messages + tools + metadata      a chat, whose last message is the answer; tool calls with arguments as object or JSON string
    conversations (or conversation)  the same as [{"from": "human", "value": ...}, ...]
    prompt + completion              texts, or lists of messages
    prompt_column + answer_column    any two columns, by default question + answer or prompt + answer
    text                             all of it is learned

Rows come straight from the file, line by line: Arrow would give every row the keys of all the others, filled with null, and a chat
template would show them to the model. A mistake is a UserError that names file, row and field. torch is not imported.
"""
import csv
import difflib
import importlib
import json
import os
import re
from dataclasses import dataclass

from configurator import UserError, closest
from data.chat import ROLES, normal_messages, normal_tools
from nanoforge.flags import Source

SUFFIXES = ('.jsonl', '.json', '.csv', '.parquet')
# name: the module whose rows() are the set
EMBEDDED = {'devices': 'data.tasks.devices', 'toolcalls': 'data.tasks.toolcalls', 'questions': 'data.tasks.questions', 'facts': 'data.tasks.facts'}
SIZES = {'devices': (800, 200), 'toolcalls': (800, 200), 'questions': (800, 200), 'facts': (1600, 56)}     # rows for training and held out, frozen
LISTS = ('qa_pairs', 'data', 'rows', 'examples')    # under which a JSON object keeps its rows
SPLITS = {'train': ('train', 'training'), 'eval': ('eval', 'evaluation', 'validation', 'valid', 'val', 'dev'), 'test': ('test',)}
SPEAKERS = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'model': 'assistant', 'system': 'system',
            'developer': 'developer', 'tool': 'tool', 'observation': 'tool'}
JSON_TYPES = {'string': str, 'integer': int, 'number': (int, float), 'boolean': bool, 'array': list, 'object': dict}


@dataclass
class Record:
    """prompt and completion: both lists of messages, or both texts. split: 'train' or 'eval'. where: 'file.jsonl line 12'."""
    prompt: list | str
    completion: list | str
    tools: list | None
    split: str
    where: str


# ---- rows -------------------------------------------------------------------------------------------------------------------

def read_rows(name, split='train', subset=None):
    """Yields (where, row): 'file.jsonl line 12' and what stands there. UserError where a file or a row cannot be read."""
    if name.lower().endswith(SUFFIXES) or os.path.isfile(name):
        yield from read_file(name)
    elif os.path.isdir(name):
        for path in files_of(name, split):
            yield from read_file(path)
    elif name in EMBEDDED:
        yield from embedded_rows(name)
    else:
        yield from hub_rows(name, split, subset)


def files_of(directory, split):
    """The data files below a directory that belong to a split: those that are named after it, or after none."""
    found = sorted(os.path.join(folder, file) for folder, _, files in os.walk(directory) for file in files
                   if file.lower().endswith(SUFFIXES) and not file.startswith('.'))
    if not found:
        raise UserError(f'{directory}: no data in this directory; expected files that end with {", ".join(SUFFIXES)}')
    named = {}
    for path in found:
        words = re.split(r'[^a-z]+', os.path.relpath(path, directory).lower())
        named.setdefault(next((key for key, names in SPLITS.items() if set(names) & set(words)), None), []).append(path)
    wanted = next((key for key, names in SPLITS.items() if split in names), split)
    if wanted not in named and None not in named:
        raise UserError(f'{directory}: no file of the split {split!r}; there are files of {", ".join(named)}')
    return sorted(named.get(wanted, []) + named.get(None, []))


def read_file(path):
    """(where, row) of one file, by its extension."""
    readers = {'.jsonl': json_lines, '.json': json_file, '.csv': csv_file, '.parquet': parquet_file}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise UserError(f'{path}: a data file ends with {", ".join(readers)}; rename or convert it')
    if not os.path.exists(path):
        folder = os.path.dirname(path) or '.'
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [], 1)
        raise UserError(f'{path}: no such file' + (f"; did you mean '{os.path.join(os.path.dirname(path), near[0])}'?" if near else ''))
    count = 0
    try:
        for count, (where, row) in enumerate(readers[suffix](path), 1):
            if isinstance(row, list):                   # a list of message lists
                row = {'messages': row}
            if not isinstance(row, dict):
                raise UserError(f'{path} {where}: expected an object of named fields like {{"question": ..., "answer": ...}}, '
                                f'got {json.dumps(row)[:60]}')
            yield f'{path} {where}', row
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block); save it as UTF-8') from None
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}') from None
    if not count:
        raise UserError(f'{path}: the file holds no row')


def json_lines(path):
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f'line {number}', json.loads(line)
                except (ValueError, RecursionError) as error:
                    hint = '; the file is one JSON list: name it .json' if number == 1 and line.strip() == '[' else ''
                    raise UserError(f'{path} line {number}: not JSON ({error}); a JSON Lines file has one object on each line'
                                    f'{hint}') from None


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
        key = next((key for key in LISTS if key in value), None)
        if key and not isinstance(value[key], list):
            raise UserError(f'{path}: "{key}" is {type(value[key]).__name__}, not a list of rows')
        if not key and not known_format(value):
            raise UserError(f'{path}: an object with {", ".join(list(value)[:5]) or "nothing in it"}; expected a list of rows, or one '
                            f'under "{LISTS[0]}"')
        value = value[key] if key else [value]
    if not isinstance(value, list):
        raise UserError(f'{path}: a list of rows was expected, this is one {type(value).__name__}')
    for number, row in enumerate(value, 1):
        yield f'row {number}', row


def csv_file(path):
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, encoding='utf-8-sig', newline='') as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                if None in row:
                    raise UserError(f'{path} row {number}: {len(row[None])} more cells than the header has columns; quote cells that '
                                    'hold commas')
                if None in row.values():
                    missing = next(key for key, value in row.items() if value is None)
                    raise UserError(f'{path} row {number}: the row ends before column {missing!r}')
                yield f'row {number}', row
        except csv.Error as error:
            raise UserError(f'{path}: not a CSV file ({error})') from None


def parquet_file(path):
    import pyarrow
    import pyarrow.parquet
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f'row {number}', without_nulls(row)
    except pyarrow.ArrowException as error:
        raise UserError(f'{path}: not a whole parquet file ({str(error).partition(chr(10))[0][:80]})') from None


def embedded_rows(name):
    """The rows of an embedded set, its held-out ones with metadata 'eval'; generated, so no network is needed."""
    module = importlib.import_module(EMBEDDED[name])
    number = 0
    for split, count in zip(('train', 'eval'), SIZES[name]):
        for row in module.rows(split, count, 0):
            number += 1
            yield f'{name} row {number}', row


def hub_rows(name, split, subset):
    """A data set of the Hugging Face hub, or of its cache on this machine."""
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name):
        raise UserError(f'{name or "(no name)"}: no such file or directory, and no name of a data set on the hub')
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name}: reading a data set of the hub needs: pip install datasets') from None
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:                  # its client raises a dozen kinds: not found, gated, offline, no such split
        raise UserError(f'{name}: no such file or directory, nor an embedded set ({", ".join(EMBEDDED)}), and hub and local cache do '
                        f'not provide it ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})') from None
    for number, row in enumerate(rows, 1):
        yield f'{name} row {number}', without_nulls(row)


def without_nulls(value):
    """`value` without the keys that hold null: Arrow gives every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ---- records ----------------------------------------------------------------------------------------------------------------

def known_format(row):
    """The format of a row: messages, conversations, completion, answer or text; None where it has none of their fields."""
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

    source        a Source whose prompt_column and answer_column, where set, say what is asked and what is learned
    system_prompt a template over the row's columns ('Rate this: {label}'): the system message of the chat. For a row that is neither
                  chat nor question and answer the filled template is the text that is learned, all of it.
    """
    try:
        return read_record(row, where, source or Source(), system_prompt)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def read_record(row, where, source, system_prompt):
    split = split_of_row(row)
    template = None if system_prompt is None else fill(system_prompt, row, source)
    columns = [source.prompt_column, source.answer_column]
    if any(columns):
        columns = [columns[0] or ('question' if 'question' in row else 'prompt'), columns[1] or 'answer']
        return question_and_answer(row, *columns, template, split, where)
    kind = known_format(row)
    if kind in ('messages', 'conversations', 'conversation'):
        messages = parsed(row[kind], kind)
        messages = from_values(messages, kind) if uses_values(messages) else messages
        return chat(messages, row.get('tools'), template, split, where)
    if kind == 'completion':
        return prompt_and_completion(row, template, split, where)
    if kind == 'answer':
        return question_and_answer(row, 'question' if 'question' in row else 'prompt', 'answer', template, split, where)
    if template is not None or kind == 'text':
        return Record('', template if template is not None else text_of(row, 'text'), None, split, where)
    if 'chosen' in row and 'rejected' in row:
        raise UserError('chosen and rejected are a preference pair, which train_dpo.py learns from')
    columns = f'columns {", ".join(map(str, list(row)[:8])) or "(none)"} are no known format'
    for field in ('messages', 'conversations', 'completion', 'question', 'answer'):
        if near := difflib.get_close_matches(field, map(str, row), 1):
            raise UserError(f'{columns}: did you mean {field!r} by {near[0]!r}?')
    raise UserError(f'{columns}: messages, prompt + completion, question + answer or text; name yours with '
                    'data.datasets[0].prompt_column=... and .answer_column=...')


def split_of_row(row):
    """'train' or 'eval', as the row's metadata says."""
    metadata = row.get('metadata', 'train')
    if metadata in ('train', 'eval'):
        return metadata
    if metadata is None or metadata == '':
        return 'train'
    lower = metadata.strip().lower() if isinstance(metadata, str) else ''
    if lower in ('train', 'eval'):
        raise UserError(f'metadata: {metadata!r} must be exactly {lower!r}')
    raise UserError(f'metadata: {json.dumps(metadata)[:60]} is neither "train" nor "eval"')


def text_of(row, column):
    """The text in a column, which must hold some."""
    if column not in row:
        raise UserError(f'there is no column {column!r}{closest(column, map(str, row))} (columns: {", ".join(map(str, list(row)[:8]))})')
    value = row[column]
    if value is None:
        raise UserError(f'{column}: null where a text was expected')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f'{column}: expected a text, got {json.dumps(value)[:60]}')
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
        if not match[1]:
            return match[0][0]
        if match[1] not in known:
            raise UserError(f'system_prompt names {{{match[1]}}}, which is no column of data.datasets.dataset_columns'
                            f'{closest(match[1], known)}')
        if match[1] not in row:
            raise UserError(f'system_prompt names {{{match[1]}}}, a column that this row lacks')
        return '' if row[match[1]] is None else str(row[match[1]])

    return re.sub(r'\{\{|\}\}|\{(\w+)\}', column, template)


def question_and_answer(row, prompt_column, answer_column, template, split, where):
    system = [{'role': 'system', 'content': template}] if template is not None else []
    question, answer = text_of(row, prompt_column), text_of(row, answer_column)
    return Record([*system, {'role': 'user', 'content': question}], [{'role': 'assistant', 'content': answer}], None, split, where)


def prompt_and_completion(row, template, split, where):
    prompt, completion = parsed(row['prompt'], 'prompt'), parsed(row['completion'], 'completion')
    kinds = [isinstance(value, (list, dict)) for value in (prompt, completion)]
    if kinds == [False, False]:
        prompt = row['prompt'] if row['prompt'] == '' else text_of(row, 'prompt')
        return Record((template or '') + prompt, text_of(row, 'completion'), None, split, where)
    if kinds != [True, True]:
        raise UserError('prompt and completion: one is a text, the other a list of messages; make both the same')
    prompt, completion = ([value] if isinstance(value, dict) else value for value in (prompt, completion))
    if [message.get('role') for message in completion if isinstance(message, dict)] != ['assistant']:
        raise UserError('completion: expected one message from the assistant')
    return chat(prompt + completion, row.get('tools'), template, split, where)


def uses_values(messages):
    return isinstance(messages, list) and any(isinstance(message, dict) and 'from' in message for message in messages)


def from_values(messages, field):
    """[{"from": "human", "value": text}] -> [{"role": "user", "content": text}]"""
    found = []
    for i, message in enumerate(messages):
        speaker = message.get('from') if isinstance(message, dict) else None
        if speaker not in SPEAKERS:
            raise UserError(f'{field}[{i}]: "from" is {json.dumps(speaker)}, not one of {", ".join(SPEAKERS)}')
        if not isinstance(message.get('value'), str):
            raise UserError(f'{field}[{i}]: "value" must be the text that was said, got {json.dumps(message.get("value"))[:60]}')
        found.append({'role': SPEAKERS[speaker], 'content': message['value']})
    return found


def chat(messages, tools, template, split, where):
    """A Record of a whole chat: what is learned is its last message."""
    messages = checked_messages(messages)
    if template is not None:
        messages = [{'role': 'system', 'content': template}, *(m for m in messages if m['role'] not in ('system', 'developer'))]
    if messages[-1]['role'] != 'assistant':
        raise UserError(f'messages: the last one is from {messages[-1]["role"]!r}; the assistant\'s answer or tool call, which is to be '
                        'learned, must be the last')
    if len(messages) == 1:
        raise UserError('messages: nothing comes before the answer of the assistant; begin with what the user asks')
    last = messages[-1]
    if not last['content'].strip() and not last.get('tool_calls'):
        raise UserError('messages: the last one, the answer, has neither content nor tool_calls')
    return Record(messages[:-1], [last], checked_tools(tools), split, where)


def checked_messages(messages):
    """Messages of known roles with texts for contents; nulls in them are dropped."""
    if not isinstance(messages, list):
        raise UserError(f'messages: expected a list of {{"role": ..., "content": ...}}, got {json.dumps(messages)[:60]}')
    if not messages:
        raise UserError('messages: an empty list')
    for i, message in enumerate(messages):
        where = f'messages[{i}]'
        if not isinstance(message, dict):
            raise UserError(f'{where}: expected {{"role": ..., "content": ...}}, got {json.dumps(message)[:60]}')
        if 'role' not in message:
            raise UserError(f'{where}: no "role" (fields: {", ".join(message)})')
        if message['role'] not in ROLES:
            raise UserError(f'{where}: role {json.dumps(message["role"])} is none of {", ".join(ROLES)}'
                            f'{closest(str(message["role"]).lower(), ROLES)}')
        if message['role'] in ('user', 'tool') and message.get('content') is None:
            raise UserError(f'{where}: a message from {message["role"]!r} without content')
        if message.get('tool_calls') and message['role'] != 'assistant':
            raise UserError(f'{where}: tool_calls in a message from {message["role"]!r}; only the assistant calls tools')
        if not isinstance(message.get('tool_calls') or [], list):
            raise UserError(f'{where}.tool_calls: expected a list of calls, got {json.dumps(message["tool_calls"])[:60]}')
        for j, call in enumerate(message.get('tool_calls') or []):
            check_call(call, f'{where}.tool_calls[{j}]')
    return normal_messages([without_nulls(message) for message in messages], True)


def check_call(call, where):
    function = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f'{where}: expected {{"function": {{"name": ..., "arguments": ...}}}}, got {json.dumps(call)[:60]}')
    if not isinstance(function.get('name'), str) or not function['name']:
        raise UserError(f'{where}: the call names no function')
    arguments = function.get('arguments')
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise UserError(f'{where}: arguments of {function["name"]} are a text that is not JSON: '
                            f'{function["arguments"][:60]!r}') from None
    if arguments not in (None, '') and not isinstance(arguments, dict):
        raise UserError(f'{where}: arguments of {function["name"]} are {json.dumps(arguments)[:60]}, not an object of named values')


def checked_tools(tools):
    """[{'type': 'function', 'function': {...}}] or None; a list may be written as JSON text; nulls in it are dropped."""
    tools = parsed(tools, 'tools')
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f'tools: expected a list of {{"function": {{"name": ..., "parameters": ...}}}}, got {json.dumps(tools)[:60]}')
    for i, tool in enumerate(tools):
        function = tool.get('function', tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise UserError(f'tools[{i}]: expected {{"function": {{"name": ..., "parameters": ...}}}}, got {json.dumps(tool)[:60]}')
        if not isinstance(function.get('name'), str):
            raise UserError(f'tools[{i}]: the function has no name')
        parameters = function.get('parameters')
        if parameters is not None and not isinstance(parameters, dict):
            raise UserError(f'tools[{i}] ({function["name"]}): parameters must be a JSON schema, got {json.dumps(parameters)[:60]}')
        if not isinstance((parameters or {}).get('properties') or {}, dict):
            raise UserError(f'tools[{i}] ({function["name"]}): properties must be an object, one entry a parameter')
    names = [tool.get('function', tool)['name'] for tool in tools]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f'tools: {repeated[0]!r} is there {names.count(repeated[0])} times')
    return normal_tools(without_nulls(tools))


def broken_calls(record):
    """What is wrong with the tool calls that a Record teaches: [(kind, text)], empty where they fit the tools on offer."""
    offered = {tool['function']['name']: tool['function'].get('parameters') or {} for tool in record.tools or []}
    found = []
    for message in record.completion if isinstance(record.completion, list) else ():
        for call in message.get('tool_calls') or []:
            name, arguments = call['function']['name'], call['function']['arguments']
            if name not in offered:
                found.append(('unknown tool', f'{name} is called, but not on offer{closest(name, offered)}'))
                continue
            properties = offered[name].get('properties') or {}
            for key in offered[name].get('required') or []:
                if key not in arguments:
                    found.append(('missing argument', f'{name} is called without {key}, which it requires'))
            for key, value in arguments.items():
                schema = properties.get(key)
                if schema is None:
                    if properties and offered[name].get('additionalProperties') is not True:
                        found.append(('unknown argument', f'{name} has no parameter {key}{closest(key, properties)}'))
                    continue
                kinds = schema.get('type') if isinstance(schema, dict) else None
                kinds = [kind.lower() for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)]
                if kinds and not any(fits(value, kind) for kind in kinds):
                    found.append(('wrong type', f'{name}: {key}={json.dumps(value)[:40]} is not of type {" or ".join(kinds)}'))
                elif isinstance(schema, dict) and schema.get('enum') and value not in schema['enum']:
                    found.append(('not allowed', f'{name}: {key}={json.dumps(value)[:40]} is none of {schema["enum"]}'))
    return found


def fits(value, kind):
    if isinstance(value, bool):
        return kind == 'boolean' or kind not in JSON_TYPES
    return isinstance(value, JSON_TYPES.get(kind, object)) or kind == 'integer' and isinstance(value, float) and value.is_integer()


# ---- packing ----------------------------------------------------------------------------------------------------------------

def best_fit(lengths, capacity):
    """Best-fit decreasing bin packing -> bins, each a list of indices whose lengths sum to at most `capacity`.

    The longest come first, each into the fullest bin that still has room for it (Johnson et al. 1974: at most 11/9 of the fewest bins,
    plus a constant). ValueError where one is longer than the capacity.
    """
    bins, open_bins, spaces = [], {}, 0         # open_bins: free space -> numbers of bins; spaces: bit s is set where there is one
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > capacity:
            raise ValueError(f'item {i} of length {lengths[i]} does not fit in {capacity}')
        fitting = spaces >> lengths[i]
        if fitting:
            space = lengths[i] + (fitting & -fitting).bit_length() - 1
            place = open_bins[space].pop()
            if not open_bins[space]:
                spaces &= ~(1 << space)
        else:
            space, place = capacity, len(bins)
            bins.append([])
        bins[place].append(i)
        left = space - lengths[i]
        open_bins.setdefault(left, []).append(place)
        spaces |= 1 << left
    return bins
