"""Preference pairs: rows of any documented format -> Pair -> token ids. For train_dpo.py and the reward model of train_rl.py.

    prompt + chosen + rejected       texts; or messages, each side the assistant's answer alone or the dialogue up to it
    chosen + rejected                whole dialogues, as messages or as "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic/hh-rlhf):
                                     what both begin with is the prompt

A mistake in a row's form is a UserError that names file, row and field. A pair of which nothing can be learned (an empty or the same
answer on both sides, dialogues that part early) is dropped, counted by its reason and said.
"""
import concurrent.futures
import contextlib
import functools
import multiprocessing
import re
from dataclasses import dataclass

from configurator import UserError, closest
from data.chat import encode, segments
from data.formats import checked_messages, checked_tools, fill, from_values, parsed, read_rows, split_of_row, uses_values

PROMPT_COLUMNS = ('prompt', 'question', 'instruction', 'input')     # looked for in this order where none is named
CHUNK = 1000                                                        # pairs that are encoded together


@dataclass
class Pair:
    """prompt: messages; chosen, rejected: the assistant's message after it. Without a chat template all three are texts."""
    prompt: list | str
    chosen: dict | str
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
    ref_logp: tuple | None = None       # log-probabilities of chosen and rejected under a reference, where known


class Dropped(Exception):
    """Nothing can be learned from this pair; the message is the reason by which it is counted."""


class Drops(dict):
    """{reason: [where of each pair that was dropped for it]}"""

    def add(self, reason, where):
        self.setdefault(str(reason), []).append(where)

    def __str__(self):
        return '; '.join(f'{len(places):,} {reason} (first: {places[0]})' for reason, places in self.items())


# ---- rows -> pairs ----------------------------------------------------------------------------------------------------------

def read_pairs(source, system_prompt=None, chat=True):
    """A records.Source -> ([Pair], Drops).

    system_prompt  a template over the row's columns: the system message of every prompt
    chat           False: prompt, chosen and rejected are texts that no chat template is put around
    """
    pairs, drops = [], Drops()
    for where, row in read_rows(source.name, source.split, source.subset):
        try:
            pairs.append(to_pair(row, where, source, system_prompt, chat))
        except Dropped as reason:
            drops.add(reason, where)
    return pairs, drops


def to_pair(row, where, source, system_prompt=None, chat=True):
    """A row -> Pair; `where` begins the message of a UserError. Raises Dropped."""
    try:
        return read_pair(row, where, source, system_prompt, chat)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def read_pair(row, where, source, system_prompt, chat):
    split, tools = split_of_row(row), checked_tools(row.get('tools'))
    prompt = find_prompt(row, source)
    chosen = read_side(row, source.chosen_column or 'chosen', 'chosen_column')
    rejected = read_side(row, source.rejected_column or 'rejected', 'rejected_column')
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError('chosen and rejected: one is a text, the other messages; make both the same')
    if not chat:
        if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
            raise UserError('without a chat template prompt, chosen and rejected must be texts; leave out apply_chat_template=false')
        check_answers(prompt, chosen, rejected)
        return Pair(prompt, chosen, rejected, None, split, where)
    if isinstance(chosen, str) and prompt is None:
        chosen, rejected = read_dialogue(chosen, 'chosen'), read_dialogue(rejected, 'rejected')
    if isinstance(chosen, str):
        chosen, rejected = ([{'role': 'assistant', 'content': text}] for text in (chosen, rejected))
    if chosen[0]['role'] == 'assistant' and rejected[0]['role'] == 'assistant':
        if prompt is None:
            raise UserError('there is no prompt: name its column (data.datasets[0].prompt_column=...), or give chosen and rejected as '
                            'whole dialogues that begin with what the user asks')
        messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    else:
        messages, chosen, rejected = split_dialogues(prompt, chosen, rejected)
    if len(chosen) > 1 or len(rejected) > 1:
        raise Dropped('part before the last answer')
    if messages[-1]['role'] == 'assistant':
        raise UserError('prompt: its last message is from the assistant; what is answered must be somebody else\'s')
    check_answers(messages[-1]['content'], chosen[0], rejected[0])
    if system_prompt is not None:
        messages = [{'role': 'system', 'content': fill(system_prompt, row, source)},
                    *(message for message in messages if message['role'] not in ('system', 'developer'))]
    return Pair(messages, chosen[0], rejected[0], tools, split, where)


def find_prompt(row, source):
    """The prompt as text or messages; None where the row has no column for it."""
    column = source.prompt_column or next((name for name in PROMPT_COLUMNS if name in row), None)
    return None if column is None else read_side(row, column, 'prompt_column')


def read_side(row, column, setting):
    """What stands in a column, which is a text or messages, as text or checked messages. Dropped where it is empty."""
    if column not in row:
        raise UserError(f'there is no column {column!r}{closest(column, map(str, row))} (columns: {", ".join(map(str, list(row)[:8]))}); '
                        f'name yours: data.datasets[0].{setting}=...')
    value = parsed(row[column], column)
    if value is None or value == [] or isinstance(value, str) and not value.strip():
        raise Dropped(f'with an empty {setting.partition("_")[0]}')
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)):
        raise UserError(f'{column}: expected a text or messages, got {value!r:.60}')
    value = [value] if isinstance(value, dict) else value
    value = from_values(value, column) if uses_values(value) else value
    try:
        return checked_messages(value)
    except UserError as error:
        raise UserError(f'{column}: {error}') from None


def read_dialogue(text, field):
    """'\\n\\nHuman: ...\\n\\nAssistant: ...' -> messages."""
    before, *parts = re.split(r'(?:^|\n\n)(Human|Assistant):', text)
    if not parts or before.strip():
        raise UserError(f'{field}: there is no prompt: the row has no column {", ".join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]} '
                        '(name yours: data.datasets[0].prompt_column=...), and the text is no dialogue that begins with "Human:"')
    return [{'role': 'user' if speaker == 'Human' else 'assistant', 'content': said.strip()}
            for speaker, said in zip(parts[0::2], parts[1::2])]


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
    if isinstance(prompt, str) and prompt.strip() not in [message['content'].strip() for message in messages]:
        raise UserError(f'prompt: {prompt[:40]!r} is said nowhere in the dialogues chosen and rejected')
    return messages, chosen, rejected


def check_answers(prompt, chosen, rejected):
    """Dropped where one is empty or both are the same."""
    for name, said in (('prompt', prompt), ('chosen', chosen), ('rejected', rejected)):
        if not (said if isinstance(said, str) else said['content'] or said.get('tool_calls') and '-' or '').strip():
            raise Dropped(f'with an empty {name}')
    if chosen == rejected:
        raise Dropped('with the same answer on both sides')


# ---- pairs -> ids -----------------------------------------------------------------------------------------------------------

def encode_pairs(tokenizer, pairs, max_length, max_prompt_length=None, num_proc=1):
    """[Pair] -> ([TokenPair], Drops, cuts). The model's chat template is applied once; texts get the end token.

    A prompt longer than max_prompt_length loses its beginning, an answer that then exceeds max_length its end, but never all of
    it; cuts counts both: {'prompts': n, 'answers': n}. num_proc: processes that render.
    """
    found, drops, cuts = [], Drops(), {'prompts': 0, 'answers': 0}
    chunks = [pairs[at:at + CHUNK] for at in range(0, len(pairs), CHUNK)]
    with contextlib.ExitStack() as stack:
        over = map
        if num_proc > 1 and len(chunks) > 1:
            spawn = multiprocessing.get_context('spawn')
            over = stack.enter_context(concurrent.futures.ProcessPoolExecutor(min(num_proc, len(chunks)), spawn)).map
        for chunk, rows in zip(chunks, over(functools.partial(encode_chunk, tokenizer), chunks)):
            for pair, row in zip(chunk, rows):
                try:
                    if isinstance(row, Dropped):
                        raise row
                    found.append(fit(pair, *row, max_length, max_prompt_length, cuts))
                except Dropped as reason:
                    drops.add(reason, pair.where)
    return found, drops, cuts


def encode_chunk(tokenizer, pairs):
    """For each Pair two chat.Rendered, or Dropped."""
    chats, rows = [], []
    for pair in pairs:
        try:
            chats += [cut_in_pieces(tokenizer, pair, side) for side in (pair.chosen, pair.rejected)]
            rows.append(None)
        except Dropped as reason:
            rows.append(reason)
    encoded = iter(encode(tokenizer, chats))
    return [row or (next(encoded), next(encoded)) for row in rows]


def cut_in_pieces(tokenizer, pair, side):
    """One side of a pair as chat.encode takes it."""
    if isinstance(side, str):
        return [(pair.prompt, False), (side, True)], 0
    stops = [tokenizer.decode([token]) for token in sorted(tokenizer.stop_ids)]
    for message in [*pair.prompt, side]:
        if any(stop in message['content'] for stop in stops):
            raise Dropped('with a stop token in a text: was a chat template applied to it before?')
    try:
        return segments(tokenizer, [*pair.prompt, side], pair.tools, 'completion')
    except UserError as error:
        raise Dropped(f'that the chat template refuses ({error})') from None


def fit(pair, chosen, rejected, max_length, max_prompt_length, cuts):
    """Two chat.Rendered -> TokenPair within the lengths; cuts is counted up."""
    prompt, rejected_prompt = (row.ids[:row.mask.index(True)] if True in row.mask else row.ids for row in (chosen, rejected))
    chosen, rejected = ([token for token, target in zip(row.ids, row.mask) if target] for row in (chosen, rejected))
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
