"""Records -> token ids with a loss mask, in a file that need not fit memory.

    rows, findings = Rows(), Findings()
    encode_records(records, tokenizer, rows, findings, loss_on='completion', max_length=512)
    ids, targets = rows[0]

Prompt and completion are encoded apart and their ids joined. Where a row is too long, the prompt is trimmed from the left; an answer is
never cut in half: what does not fit is dropped and counted.
"""
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import tempfile
from array import array

import numpy as np

from configurator import UserError
from data import chat
from data.formats import broken_calls

CHUNK = 512         # records that are encoded together


class TokenizedRows:
    """Rows of token ids in a temporary file, and beside them, in memory, a few numbers a row.

    lengths, targets  (N,) tokens, and how many of them are learned
    source, held_out  (N,) number of the data set; whether the row is for evaluation only
    keys              (N, 2) hashes of the prompt and of the whole row
    where             list of N: 'file.jsonl line 12'
    """

    def __init__(self):
        self.file, self.where = tempfile.TemporaryFile(), []
        self.lengths, self.targets, self.source, self.held_out = array('i'), array('i'), array('H'), array('b')
        self.keys, self.tokens = array('Q'), np.zeros(0, np.int32)

    def add(self, ids, mask, source, held_out, keys, where):
        packed = np.array(ids, np.int32) << 1 | np.array(mask, np.int32)       # a token and whether it is a target, in one number
        self.file.write(packed.tobytes())
        self.lengths.append(len(ids))
        self.targets.append(int(sum(mask[1:])))                                # nothing comes before the first token
        self.source.append(source)
        self.held_out.append(held_out)
        self.keys.extend(keys)
        self.where.append(where)

    def close(self):
        """No more rows: makes everything numpy arrays, the tokens mapped from the file."""
        self.file.flush()
        self.lengths, self.targets = np.array(self.lengths, np.int64), np.array(self.targets, np.int64)
        self.source, self.held_out = np.array(self.source, np.int64), np.array(self.held_out, bool)
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


def encode_records(records, tokenizer, rows, findings, loss_on='completion', max_length=None, max_prompt_length=None, num_proc=1,
                   skip_bad_rows=False):
    """Adds the rows of (number of the data set, Record) pairs to `rows`, and to `findings` what is wrong with them.

    max_length: of prompt and completion together; max_prompt_length: of what stands before the first target; None = any. num_proc:
    processes that render. Returns the longest length there was before trimming.
    """
    chunks = iter(lambda it=iter(records): list(itertools.islice(it, CHUNK)), [])
    pool = None
    if num_proc > 1:
        pool = concurrent.futures.ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'))
    longest, needed, called = 0, 0, {'train': set(), 'eval': set()}
    try:
        for chunk, rendered in rendered_chunks(chunks, tokenizer, loss_on, pool, 2 * num_proc):
            for (source, record), found in zip(chunk, rendered):
                if isinstance(found, str):
                    findings.add('rows that cannot be rendered', f'{record.where}: {found}')
                    continue
                broken = broken_calls(record)
                if broken:
                    findings.add('calls that break their schema', f'{record.where}: {broken[0][1]}')
                    if skip_bad_rows:
                        continue
                called[record.split].update(call['function']['name'] for message in record.completion if isinstance(message, dict)
                                            for call in message.get('tool_calls') or [])
                keys = [digest(record.prompt), digest([record.prompt, record.completion])]
                for row in found:
                    longest = max(longest, len(row.ids))
                    ids, mask, lost = fit(row.ids, row.mask, max_length, max_prompt_length)
                    if lost in ('completions that do not fit', 'prompts trimmed from the left'):
                        needed = max(needed, len(row.ids))
                    if lost or row.skipped:
                        findings.add(lost or 'earlier turns not learned', record.where)
                    if row.stop_added:
                        findings.add('completions without a stop token', record.where)
                    if ids:
                        if mask[-1] and ids[-1] not in tokenizer.stop_ids:
                            findings.add('models that never learn to stop', record.where)
                        rows.add(ids, mask, source, record.split == 'eval', keys, record.where)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    for name in sorted(called['train'] - called['eval']) if called['eval'] else ():
        findings.add('tools that no held-out row calls', name)
    findings.notes['completions that do not fit'] = (f'dropped: max_length={max_length} is too short, --max_length={needed} would hold '
                                                     'every row')
    findings.notes['prompts trimmed from the left'] = f'--max_length={needed} would keep them whole, if the model has such a context'
    return longest


def rendered_chunks(chunks, tokenizer, loss_on, pool, ahead):
    """(chunk, its rows) in order; with a pool some chunks ahead are worked on meanwhile."""
    if not pool:
        yield from ((chunk, render_chunk(tokenizer, [record for _, record in chunk], loss_on)) for chunk in chunks)
        return
    waiting = []
    for chunk in chunks:
        waiting.append((chunk, pool.submit(render_chunk, tokenizer, [record for _, record in chunk], loss_on)))
        if len(waiting) > ahead:
            chunk, future = waiting.pop(0)
            yield chunk, future.result()
    for chunk, future in waiting:
        yield chunk, future.result()


def render_chunk(tokenizer, records, loss_on):
    """For each Record a list of chat.Rendered, or a text: why it cannot be rendered."""
    pieces, found = [], []
    for record in records:
        try:
            pieces.append(pieces_of(tokenizer, record, loss_on))
            found.append(None)
        except UserError as error:
            found.append(str(error))
    encoded = iter(chat.encode(tokenizer, pieces))
    for i, record in enumerate(records):
        if found[i] is None:
            row = next(encoded)
            found[i] = chat.render_rows(tokenizer, record.prompt + record.completion, record.tools, loss_on) if row.skipped else [row]
    return found


def pieces_of(tokenizer, record, loss_on):
    """What chat.segments gives, for texts too: these get the token that begins a text, where the tokenizer has one."""
    if not isinstance(record.completion, str):
        return chat.segments(tokenizer, record.prompt + record.completion, record.tools, loss_on)
    begin = tokenizer.special.get('bos_token') or ''
    begin = '' if record.prompt.startswith(begin) and record.prompt else begin
    return [(begin + record.prompt, loss_on == 'all'), (record.completion, True)], 0


def fit(ids, mask, max_length, max_prompt_length):
    """(ids, mask, what was lost or ''), no longer than allowed; ids is empty for a row that is dropped.

    Tokens behind the last target are of no use and go first; then the prompt goes from the left, and with it earlier answers. One that
    would be cut in half is context only.
    """
    targets = [i for i, target in enumerate(mask) if target and i]
    if not targets:
        return [], [], 'fully masked rows'
    ids, mask = list(ids[:targets[-1] + 1]), list(mask[:targets[-1] + 1])
    cut = max(0, len(ids) - (max_length or len(ids)), targets[0] - (max_prompt_length or targets[0]))
    if not cut:
        return ids, mask, ''
    lost = 'prompts trimmed from the left' if cut < targets[0] else 'earlier turns not learned'
    ids, mask = ids[cut:], mask[cut:]
    halved = next((i for i, target in enumerate(mask) if not target), len(mask))
    if halved == len(mask):
        return [], [], 'completions that do not fit'
    mask[:halved] = [False] * halved
    return ids, mask, lost


def digest(value):
    """64 bits that stand for a JSON-able value."""
    text = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little')
