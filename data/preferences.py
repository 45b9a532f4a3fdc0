"""Preference pairs, for train_dpo.py and the reward model of train_rl.py: rows -> Pair -> token ids.

    prompt + chosen + rejected       texts; or messages, each side the assistant's answer alone or the
                                     dialogue up to it
    chosen + rejected                whole dialogues, as messages or, as in Anthropic/hh-rlhf, as a text
                                     "\\n\\nHuman: ...\\n\\nAssistant: ..."; what both begin with is the
                                     prompt

A mistake in a row's form is a UserError that names file, row and field, or, with skip_bad_rows, a pair that
is dropped. A pair of which nothing can be learned (an empty or the same answer on both sides, dialogues that
part early) is dropped in any case. Drops are counted by their reason and said.
"""
import functools
import re
from dataclasses import dataclass

from configurator import UserError, closest
from data.chat import encode, remarks, segments
from data.formats import as_messages, check_values, checked_messages, checked_tools, columns_in, fill, parsed
from data.formats import read_rows, split_of_row, with_system, without_nan
from data.parallel_map import map_chunks
from nanoforge.data_checks import DataIssues

# looked for in this order where none is named
PROMPT_COLUMNS = ('prompt', 'question', 'instruction', 'input')
CHUNK = 1000            # pairs that are encoded together


@dataclass
class Pair:
    prompt: list | str      # messages; without a chat template a text
    chosen: dict | str      # the assistant's message after it, or a text
    rejected: dict | str
    tools: list | None
    split: str      # 'train' or 'eval'
    where: str      # 'file.jsonl line 12'


@dataclass
class TokenPair:
    """Token ids: one prompt, two different continuations of at least one token each."""
    prompt: list
    chosen: list
    rejected: list
    where: str
    ref_logp: tuple | None = None       # log-probability of either answer under a reference, where known


class Dropped(Exception):
    """Nothing can be learned from this pair; the message is the reason by which it is counted."""


class Drops(dict):
    """{reason: [where of each pair that was dropped for it]}"""

    def add(self, reason, where):
        self.setdefault(str(reason), []).append(where)

    def __str__(self):
        return '; '.join(f'{len(rows):,} {reason} (first: {rows[0]})' for reason, rows in self.items())


# ---- rows -> pairs

def read_pairs(source, system_prompt=None, chat=True, skip_bad_rows=False):
    """A formats.Source -> ([Pair], Drops).

    system_prompt  a template over the row's columns: the system message of every prompt
    chat           False: prompt, chosen and rejected are texts that no chat template is put around
    skip_bad_rows  drop rows that are not of the form, in place of a UserError
    """
    pairs, drops = [], Drops()
    for where, row in read_rows(source.name, source.split, source.subset):
        try:
            pairs.append(to_pair(row, where, source, system_prompt, chat))
        except Dropped as reason:
            drops.add(reason, where)
        except UserError as error:
            if not skip_bad_rows:
                raise UserError(f'{error}; --skip_bad_rows leaves such rows out') from None
            drops.add('that cannot be read', error)
    return pairs, drops


def to_pair(row, where, source, system_prompt=None, chat=True):
    """A row -> Pair; `where` begins the message of a UserError. Raises Dropped."""
    try:
        pair = read_pair(without_nan(row), where, source, system_prompt, chat)
        check_values([pair.prompt, pair.chosen, pair.rejected, pair.tools])
        return pair
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def read_pair(row, where, source, system_prompt, chat):
    split = split_of_row(row) or 'train'
    tools = checked_tools(row.get('tools'))
    prompt = find_prompt(row, source)
    chosen = read_side(row, source.chosen_column or 'chosen', 'chosen_column')
    rejected = read_side(row, source.rejected_column or 'rejected', 'rejected_column')
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError('chosen and rejected: one is a text, the other messages; make both the same')
    if not chat:
        if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
            raise UserError('without a chat template prompt, chosen and rejected must be texts; leave out '
                            'apply_chat_template=false')
        check_answers(prompt, chosen, rejected)
        return Pair(prompt, chosen, rejected, None, split, where)
    messages, chosen, rejected = pair_of_chats(prompt, chosen, rejected)
    if messages[-1]['role'] == 'assistant':
        raise UserError('prompt: its last message is from the assistant; what is '
                        'answered must be somebody else\'s')
    check_answers(messages[-1]['content'], chosen, rejected)
    if system_prompt:
        messages = with_system(messages, fill(system_prompt, row, source))
    return Pair(messages, chosen, rejected, tools, split, where)


def pair_of_chats(prompt, chosen, rejected):
    """What the columns hold -> (messages of the prompt, the chosen message after it, the rejected one)."""
    if isinstance(chosen, str):
        if prompt is None:
            chosen = read_dialogue(chosen, 'chosen')
            rejected = read_dialogue(rejected, 'rejected')
        else:
            chosen = [message_of('assistant', chosen)]
            rejected = [message_of('assistant', rejected)]
    if chosen[0]['role'] == rejected[0]['role'] == 'assistant':
        if prompt is None:
            raise UserError('there is no prompt: name its column (--prompt_column=...), or '
                            'give chosen and rejected as whole dialogues that begin with what the user asks')
        messages = [message_of('user', prompt)] if isinstance(prompt, str) else prompt
    else:
        messages, chosen, rejected = split_dialogues(prompt, chosen, rejected)
    if len(chosen) > 1 or len(rejected) > 1:
        raise Dropped('part before the last answer')
    return messages, chosen[0], rejected[0]


def message_of(role, text):
    return {'role': role, 'content': text}


def find_prompt(row, source):
    """The prompt as text or messages; None where the row has no column for it."""
    column = source.prompt_column
    if not column:
        column = next((name for name in PROMPT_COLUMNS if name in row), None)
    return None if column is None else read_side(row, column, 'prompt_column')


def read_side(row, column, setting):
    """A column of a text or messages, as text or checked messages. Dropped where it is empty."""
    if column not in row:
        raise UserError(f'there is no column {column!r}{closest(column, map(str, row))} (columns: '
                        f'{columns_in(row)}); name yours: --{setting}=...')
    value = parsed(row[column], column)
    if value is None or value == [] or isinstance(value, str) and not value.strip():
        raise Dropped(f'with an empty {setting.partition("_")[0]}')
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)):
        raise UserError(f'{column}: expected a text or messages, got {value!r:.60}')
    messages = as_messages([value] if isinstance(value, dict) else value, column)
    try:
        return checked_messages(messages)
    except UserError as error:
        raise UserError(f'{column}: {error}') from None


def read_dialogue(text, field):
    """'\\n\\nHuman: ...\\n\\nAssistant: ...' -> messages."""
    before, *parts = re.split(r'(?:^|\n\n)(Human|Assistant):', text)
    if not parts or before.strip():
        raise UserError(f'{field}: there is no prompt: the row has no column '
                        f'{", ".join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]} (name yours: '
                        '--prompt_column=...), and the text is no dialogue that begins with '
                        '"Human:"')
    messages = []
    for speaker, content in zip(parts[0::2], parts[1::2]):
        role = 'user' if speaker == 'Human' else 'assistant'
        messages.append(message_of(role, content.strip()))
    return messages


def split_dialogues(prompt, chosen, rejected):
    """Two whole dialogues -> (what both begin with, the rest of chosen, the rest of rejected)."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    messages, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen and not rejected:
        raise Dropped('with the same answer on both sides')
    if not chosen or not rejected:
        raise Dropped('where one dialogue is the beginning of the other')
    if not messages or {chosen[0]['role'], rejected[0]['role']} != {'assistant'}:
        raise Dropped('whose prompts differ')
    if isinstance(prompt, list) and messages[:len(prompt)] != prompt:
        raise UserError('prompt: chosen and rejected are whole dialogues, but they do not begin with it')
    contents = [message['content'].strip() for message in messages]
    if isinstance(prompt, str) and prompt.strip() not in contents:
        raise UserError(f'prompt: {prompt[:40]!r} is said nowhere in the dialogues chosen and rejected')
    return messages, chosen, rejected


def check_answers(prompt, chosen, rejected):
    """Dropped where one is empty or both are the same."""
    for name, value in (('prompt', prompt), ('chosen', chosen), ('rejected', rejected)):
        if is_empty(value):
            raise Dropped(f'with an empty {name}')
    if chosen == rejected:
        raise Dropped('with the same answer on both sides')


def is_empty(value):
    """Of a text or a message; one that calls tools needs no text."""
    if isinstance(value, str):
        return not value.strip()
    if not value['content']:
        return not value.get('tool_calls')
    return not value['content'].strip()


# ---- pairs -> ids

def encode_pairs(tokenizer, pairs, max_length, max_prompt_length=None, num_proc=1):
    """[Pair] -> ([TokenPair], Drops, cuts). The chat template is applied once; texts get the end token.

    A prompt longer than max_prompt_length loses its beginning, an answer that then exceeds max_length its
    end, but never all of it; cuts counts both: {'prompts': n, 'answers': n}. num_proc: processes that render.
    """
    token_pairs, drops, cuts = [], Drops(), {'prompts': 0, 'answers': 0}
    chunks = [pairs[start:start + CHUNK] for start in range(0, len(pairs), CHUNK)]
    render = functools.partial(encode_chunk, tokenizer)
    for chunk, rows in map_chunks(render, chunks, min(num_proc, len(chunks))):
        for pair, row in zip(chunk, rows):
            try:
                if isinstance(row, Dropped):
                    raise row
                token_pairs.append(truncate(pair, *row, max_length, max_prompt_length, cuts))
            except Dropped as reason:
                drops.add(reason, pair.where)
    return token_pairs, drops, cuts


def remarks_on(tokenizer, pairs):
    """A line for each kind of data.chat.REMARKS: how many Pairs, what it means, the first."""
    issues = DataIssues()
    for pair in pairs:
        if not isinstance(pair.prompt, str):
            for kind in remarks(tokenizer, [*pair.prompt, pair.chosen, pair.rejected], pair.tools):
                issues.add(kind, pair.where)
    return issues.lines()


def encode_chunk(tokenizer, pairs):
    """For each Pair two chat.Rendered, or Dropped."""
    chats, rows = [], []
    for pair in pairs:
        try:
            chats += [pieces_of(tokenizer, pair, side) for side in (pair.chosen, pair.rejected)]
            rows.append(None)
        except Dropped as reason:
            rows.append(reason)
    encoded = iter(encode(tokenizer, chats))
    return [row or (next(encoded), next(encoded)) for row in rows]


def pieces_of(tokenizer, pair, side):
    """The prompt and one side of a pair as chat.encode takes them."""
    if isinstance(side, str):
        return [(pair.prompt, False), (side, True)], 0
    try:
        return segments(tokenizer, [*pair.prompt, side], pair.tools, 'completion')
    except UserError as error:
        raise Dropped(f'that the chat template refuses ({error})') from None


def truncate(pair, chosen, rejected, max_length, max_prompt_length, cuts):
    """Two chat.Rendered -> TokenPair within the lengths; cuts is counted up."""
    prompt, chosen = prompt_and_answer(chosen)
    rejected_prompt, rejected = prompt_and_answer(rejected)
    if prompt != rejected_prompt:
        raise Dropped('whose prompt the chat template writes in two ways')
    if max_prompt_length and len(prompt) > max_prompt_length:
        prompt = prompt[-max_prompt_length:]
        cuts['prompts'] += 1
    room = max_length - len(prompt)
    if room < 1:
        raise Dropped(f'whose prompt leaves no room for an answer in max_length={max_length} tokens')
    cuts['answers'] += (len(chosen) > room) + (len(rejected) > room)
    chosen, rejected = chosen[:room], rejected[:room]
    if not (prompt and chosen and rejected):
        raise Dropped('without a token in the prompt or an answer')
    if chosen == rejected:
        raise Dropped(f'that are the same within max_length={max_length} tokens')
    return TokenPair(prompt, chosen, rejected, pair.where)


def prompt_and_answer(row):
    """The ids of a chat.Rendered before its first target, and its targets."""
    start = row.mask.index(True) if True in row.mask else len(row.ids)
    answer = [token for token, is_target in zip(row.ids, row.mask) if is_target]
    return row.ids[:start], answer
