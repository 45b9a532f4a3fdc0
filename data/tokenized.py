"""Records -> token ids with a loss mask, in a file that need not fit memory.

    rows, findings = TokenizedRows(), DataIssues()
    encode_records(records, tokenizer, rows, findings, loss_on='completion', max_length=512)
    ids, targets = rows.close()[0]

Prompt and completion are encoded apart and their ids joined. Where a row is too long, the prompt is trimmed
from the left; an answer is never cut in half: what does not fit is dropped and counted.
"""
import functools
import hashlib
import itertools
import json
import tempfile
from array import array

import numpy as np

from configurator import UserError
from data import chat
from data.formats import broken_calls
from data.parallel_map import map_chunks

CHUNK = 512         # records that are encoded together


class TokenizedRows:
    """Rows of token ids in a temporary file, and beside them, in memory, a few numbers a row.

    lengths, targets  (N,) tokens, and how many of them are learned
    source, held_out  (N,) number of the data set; whether the row is for evaluation only
    keys              (N, 2) hashes of the prompt and of the whole row
    where             list of N: 'file.jsonl line 12'
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        self.tokens = np.zeros(0, np.int32)
        self.lengths, self.targets = array('i'), array('i')
        self.source, self.held_out = array('H'), array('b')
        self.keys = array('Q')
        self.where = []

    def add(self, ids, mask, source, held_out, keys, where):
        # a token and whether it is a target, in one number
        packed = np.array(ids, np.int32) << 1 | np.array(mask, np.int32)
        self.file.write(packed.tobytes())
        self.lengths.append(len(ids))
        self.targets.append(int(sum(mask[1:])))         # nothing comes before the first token
        self.source.append(source)
        self.held_out.append(held_out)
        self.keys.extend(keys)
        self.where.append(where)

    def close(self):
        """No more rows: makes everything numpy arrays, the tokens mapped from the file."""
        self.file.flush()
        self.lengths = np.array(self.lengths, np.int64)
        self.targets = np.array(self.targets, np.int64)
        self.source = np.array(self.source, np.int64)
        self.held_out = np.array(self.held_out, bool)
        self.keys = np.array(self.keys, np.uint64).reshape(-1, 2)
        self.starts = np.concatenate([[0], self.lengths.cumsum()])
        if self.starts[-1]:
            self.tokens = np.memmap(self.file, np.int32, 'r')
        return self

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        """ids (n,) and whether each is a target (n,)."""
        packed = self.tokens[self.starts[i]:self.starts[i + 1]]
        return packed >> 1, packed & 1


def encode_records(records, tokenizer, rows, findings, loss_on='completion', max_length=None,
                   max_prompt_length=None, num_proc=1, skip_bad_rows=False, cut_texts=False):
    """Adds the rows of (number of the data set, Record) pairs to `rows`, and what is wrong to `findings`.

    max_length: of prompt and completion together; max_prompt_length: of what comes before the first target;
    None = any. num_proc: processes that render. cut_texts: a longer text becomes several rows, each of
    which begins with the last token of the one before: every token is learned once. Returns the longest
    length there was before trimming.
    """
    records = iter(records)
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    render = functools.partial(render_chunk, tokenizer, loss_on)
    longest = 0             # tokens of a row before trimming
    needed = 0              # max_length that would hold every row whole
    called = {'train': set(), 'eval': set()}    # names of tools
    for chunk, rendered in map_chunks(render, chunks, num_proc):
        for (source, record), chats in zip(chunk, rendered):
            if isinstance(chats, str):
                findings.add('rows that cannot be rendered', f'{record.where}: {chats}')
                continue
            broken = broken_calls(record)
            if broken:
                findings.add('calls that break their schema', f'{record.where}: {broken[0][1]}')
                if skip_bad_rows:
                    continue
            for remark in remarks_on(tokenizer, record):
                findings.add(remark, record.where)
            called[record.split].update(tools_called(record))
            keys = [digest(record.prompt), digest([record.prompt, record.completion])]
            for row in chats:
                longest = max(longest, len(row.ids))
                if cut_texts and max_length and len(row.ids) > max_length > 1:
                    for start in range(0, len(row.ids) - 1, max_length - 1):
                        part = slice(start, start + max_length)
                        rows.add(row.ids[part], row.mask[part], source, record.split == 'eval', keys,
                                 record.where)
                    continue
                ids, mask, lost = truncate(row.ids, row.mask, max_length, max_prompt_length)
                if lost in ('completions that do not fit', 'prompts trimmed from the left'):
                    needed = max(needed, len(row.ids))
                if lost or row.skipped:
                    findings.add(lost or 'earlier turns not learned', record.where)
                if row.stop_added:
                    findings.add('completions without a stop token', record.where)
                if not ids:
                    continue
                if mask[-1] and ids[-1] not in tokenizer.stop_ids and not cut_texts:
                    findings.add('models that never learn to stop', record.where)
                rows.add(ids, mask, source, record.split == 'eval', keys, record.where)
    if called['eval']:
        for name in sorted(called['train'] - called['eval']):
            findings.add('tools that no held-out row calls', name)
    findings.notes.update({
        'completions that do not fit': f'dropped: max_length={max_length} is too short, '
                                       f'--max_length={needed} would hold every row',
        'prompts trimmed from the left': f'--max_length={needed} would keep '
                                         'them whole, if the model has such a context',
    })
    return longest


def remarks_on(tokenizer, record):
    """What is to be said of how a Record is written; a text is written as it is."""
    if isinstance(record.completion, str):
        return []
    return chat.remarks(tokenizer, record.prompt + record.completion, record.tools)


def tools_called(record):
    """Names of the tools that the completion of a Record calls."""
    names = []
    for message in record.completion:
        if isinstance(message, dict):
            names += [call['function']['name'] for call in message.get('tool_calls') or []]
    return names


def render_chunk(tokenizer, loss_on, chunk):
    """For each (number of a data set, Record) a list of chat.Rendered, or why it cannot be rendered."""
    pieces, errors = [], []
    for _, record in chunk:
        try:
            pieces.append(pieces_of(tokenizer, record, loss_on))
            errors.append(None)
        except UserError as error:
            errors.append(str(error))
    encoded = iter(chat.encode(tokenizer, pieces))
    rendered = []
    for (_, record), error in zip(chunk, errors):
        if error is not None:
            rendered.append(error)
            continue
        row = next(encoded)
        if row.skipped:
            messages = record.prompt + record.completion
            rendered.append(chat.render_rows(tokenizer, messages, record.tools, loss_on))
        else:
            rendered.append([row])
    return rendered


def pieces_of(tokenizer, record, loss_on):
    """What chat.segments gives, for texts too; these get the token that begins a text, if there is one."""
    if not isinstance(record.completion, str):
        return chat.segments(tokenizer, record.prompt + record.completion, record.tools, loss_on)
    prompt = record.prompt
    begin = tokenizer.special.get('bos_token') or ''
    if not prompt or not prompt.startswith(begin):
        prompt = begin + prompt
    return [(prompt, loss_on == 'all'), (record.completion, True)], 0


def truncate(ids, mask, max_length, max_prompt_length):
    """(ids, mask, what was lost or ''), no longer than allowed; ids is empty for a row that is dropped.

    Tokens after the last target are of no use and go first; then the prompt goes from the left, and with it
    earlier answers. One that would be cut in half is context only.
    """
    targets = [i for i, is_target in enumerate(mask) if is_target and i]
    if not targets:
        return [], [], 'fully masked rows'
    first, end = targets[0], targets[-1] + 1
    cut = 0                                     # tokens to take away from the left
    if max_length:
        cut = max(cut, end - max_length)
    if max_prompt_length:
        cut = max(cut, first - max_prompt_length)
    ids, mask = list(ids[cut:end]), list(mask[cut:end])
    if not cut:
        return ids, mask, ''
    if all(mask):
        return [], [], 'completions that do not fit'
    halved = mask.index(False)
    mask[:halved] = [False] * halved
    lost = 'prompts trimmed from the left' if cut < first else 'earlier turns not learned'
    return ids, mask, lost


def digest(value):
    """64 bits that stand for a JSON-able value."""
    text = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little')
