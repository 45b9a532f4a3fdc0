"""Files of text -> pieces (starts a document?, text) -> (split, starts a document?, text).

No file is ever in memory as a whole.
"""
import json
import math
import os
import re

from tqdm import tqdm

from configurator import UserError

BLOCK = 1 << 16    # characters of a text file read at a time


def read_files(paths, field='text', separator=None, label='reading'):
    """Pieces of every file in order, with a progress bar over the bytes of the files."""
    size = sum(map(os.path.getsize, paths))
    with tqdm(total=size, desc=label, unit='B', unit_scale=True, disable=None) as bar:
        for path in paths:
            suffix = os.path.splitext(path)[1].lower()
            if suffix in READERS:
                yield from READERS[suffix](path, field, bar)
            else:
                yield from read_text(path, separator, bar)


def read_text(path, separator, bar):
    """Blocks of a text file, or its documents (each in memory as a whole) between lines `separator`."""
    line = separator is not None and re.compile(rf'(?:^|\r?\n){re.escape(separator)}\r?\n')
    rest, new, position = '', True, 0
    # newline='': the text as it is, but for a byte order mark, which is none of it
    with open(path, encoding='utf-8-sig', newline='') as file:
        while True:
            try:
                block = file.read(BLOCK)
            except UnicodeDecodeError as e:
                raise UserError(f'{path}: not UTF-8 ({e.reason}, '
                                f'0x{e.object[e.start]:02x}): convert it first')
            bar.update(file.buffer.tell() - position)
            position = file.buffer.tell()
            if '\0' in block:
                raise UserError(f'{path}: not a text file, it holds zero bytes')
            if line:
                *documents, rest = line.split(rest + (block or '\n'))
                if not block:
                    documents.append(rest)
                for document in documents:
                    if document.strip():
                        yield True, document.strip('\r\n')
            else:
                rest += block
                cut = word_end(rest) if block else len(rest)
                if cut:
                    yield new, rest[:cut]
                rest, new = rest[cut:], new and not cut
            if not block:
                return


def word_end(text):
    """Where to cut: before the last white space, where tokenizers start a word, so the ids stay the same."""
    end = max(text.rfind(' '), text.rfind('\n'), 0)
    return len(text[:end].rstrip()) or len(text)


def read_jsonl(path, field, bar):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            where = f'{path}, line {number}'
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as e:
                raise UserError(f'{where}: not JSON ({e})')
            if isinstance(row, list):
                raise UserError(f'{where}: a list, where a JSON Lines file has one object on each line')
            if row is not None:
                text = row.get(field) if isinstance(row, dict) else None
                yield True, checked(text, field, where)


def read_parquet(path, field, bar):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as e:
        raise UserError(f'{path}: not a parquet file ({e})')
    if field not in file.schema_arrow.names:
        columns = ', '.join(file.schema_arrow.names)
        raise UserError(f'{path}: no column {field!r}, only {columns}: name one with --field')
    number, size = 0, os.path.getsize(path)
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield True, checked(text, field, f'{path}, row {number}')
        bar.update(size * len(batch) / file.metadata.num_rows)


def checked(text, field, where):
    if not isinstance(text, str):
        raise UserError(f'{where}: {field!r} must be text, not '
                        f'{type(text).__name__}: name the field with --field')
    if not text.isascii() and any('\ud800' <= character <= '\udfff' for character in text):
        raise UserError(f'{where}: {field!r} holds half a character (a lone surrogate): repair the text')
    return text


READERS = {'.jsonl': read_jsonl, '.parquet': read_parquet}


def split_at(pieces, border):
    """The first `border` characters train, the rest validates."""
    position = 0
    for new, text in pieces:
        cut = max(border - position, 0)
        if text[:cut]:
            yield 'train', new, text[:cut]
        if text[cut:]:
            yield 'val', new and not cut, text[cut:]
        position += len(text)


def split_documents(pieces, fraction):
    """Validation takes that fraction of the documents, evenly spread: for a tenth the first, the 11th, ..."""
    count = 0
    for new, text in pieces:
        count += new
        held_out = math.ceil(count * fraction) > math.ceil((count - 1) * fraction)
        yield 'val' if held_out else 'train', new, text
