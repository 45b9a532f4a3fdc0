"""Turns text into a data set: data/NAME/{train.bin, val.bin, meta.json, tokenizer.json}.

    python data/prepare.py my_corpus book.txt other.txt --tokenizer char
    python data/prepare.py my_corpus stories.jsonl more.parquet --tokenizer bpe --vocab_size 8192
    python data/prepare.py my_corpus train.txt --val val.txt --tokenizer gpt2

A text file is one document (or several, see --document_separator); a row of JSONL or parquet is one document. Between
two documents stands <|endoftext|>. Of plain text the last characters are held out for validation; of documents every
tenth (--val_fraction). Everything streams: text is read, encoded and written block by block, so memory stays constant.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import sys

if __name__ == '__main__':    # run as a command: imports start at the root of the repository, not in this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from tqdm import tqdm

from configurator import UserError, run
from data.encoders import bpe_encoder, byte_encoder, char_encoder, file_encoder, gpt2_encoder

BLOCK = 1 << 20      # characters read, encoded and written at a time
SAMPLE = 50 << 20    # characters of the training split that a BPE learns from, at most
DATA = os.path.dirname(os.path.abspath(__file__))


# ---- reading: files -> pieces (starts a document?, text) ----

def read_files(paths, field='text', separator=None, label='reading'):
    """Pieces of every file in order, with a progress bar over the bytes of the files."""
    with tqdm(total=sum(map(os.path.getsize, paths)), desc=label, unit='B', unit_scale=True, disable=None) as bar:
        for path in paths:
            suffix = os.path.splitext(path)[1].lower()
            yield from READERS[suffix](path, field, bar) if suffix in READERS else read_text(path, separator, bar)


def read_text(path, separator, bar):
    """Blocks of a text file, or its documents where a line `separator` stands between them (each held in memory)."""
    line = separator is not None and re.compile(rf'(?:^|\r?\n){re.escape(separator)}\r?\n')
    rest, new, position = '', True, 0
    with open(path, encoding='utf-8', newline='') as file:    # newline='': the text as it is
        while True:
            try:
                block = file.read(BLOCK)
            except UnicodeDecodeError as e:
                raise UserError(f'{path}: not UTF-8 ({e.reason}, byte 0x{e.object[e.start]:02x}): convert it, for example with iconv')
            position, before = file.buffer.tell(), position
            bar.update(position - before)
            if line:
                *documents, rest = line.split(rest + (block or '\n'))
                documents += [] if block else [rest]
                yield from ((True, text.strip('\r\n')) for text in documents if text.strip())
            else:
                rest += block
                cut = word_end(rest) if block else len(rest)
                if cut:
                    yield new, rest[:cut]
                rest, new = rest[cut:], new and not cut
            if not block:
                return


def word_end(text):
    """Where to cut: before the last white space, so that tokenizers, which all start a word there, give the same ids."""
    return len(text[:max(text.rfind(' '), text.rfind('\n'), 0)].rstrip()) or len(text)


def read_jsonl(path, field, bar):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as e:
                raise UserError(f'{path}, line {number}: not JSON ({e})')
            if row is not None:
                yield True, checked(row.get(field) if isinstance(row, dict) else None, field, f'{path}, line {number}')


def read_parquet(path, field, bar):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as e:
        raise UserError(f'{path}: not a parquet file ({e})')
    if field not in file.schema_arrow.names:
        raise UserError(f'{path}: no column {field!r}, only {", ".join(file.schema_arrow.names)}: name one with --field')
    number, size = 0, os.path.getsize(path)
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield True, checked(text, field, f'{path}, row {number}')
        bar.update(size * len(batch) / file.metadata.num_rows)


def checked(text, field, where):
    if not isinstance(text, str):
        raise UserError(f'{where}: {field!r} must be text, not {type(text).__name__}: name the field with --field')
    return text


READERS = {'.jsonl': read_jsonl, '.parquet': read_parquet}


# ---- splitting: pieces -> (split, starts a document?, text) ----

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
    """Validation takes the given fraction of the documents, evenly spread: of a tenth, the tenth, the twentieth, ..."""
    count = 0
    for new, text in pieces:
        count += new
        held_out = int(count * fraction) > int((count - 1) * fraction)
        yield 'val' if held_out else 'train', new, text


# ---- encoding and writing ----

def prepare(directory, stream, tokenizer, source, vocab_size=None, num_tokens=None, stand_in=False):
    """Writes a data set into `directory` and returns its meta.json as a dict.

    stream(label) starts a pass over the text: an iterator of (split, starts a document?, text); a character or bpe
    tokenizer takes two passes. tokenizer: char, byte, gpt2, bpe or a path. source: one line, where the text came from.
    num_tokens: stop after the document that reaches it. Complete or absent: nobody sees half a data set.
    """
    encoder = make_encoder(tokenizer, vocab_size, stream)
    with Writer(directory, encoder.vocab_size) as writer:
        for block in blocks(stream('encoding')):
            ids = encoder.encode([text for _, _, text in block])
            for (split, new, text), row in zip(block, ids):
                if num_tokens and sum(writer.tokens.values()) >= num_tokens and new:
                    break
                if new and writer.tokens[split]:
                    if encoder.separator is None:
                        raise UserError(f'--tokenizer={tokenizer} has no token to stand between documents, such as <|endoftext|>')
                    writer.write(split, np.array([encoder.separator]), 0)
                writer.write(split, row, len(text.encode()))
            else:
                continue
            break
        meta = writer.finish(encoder.tokenizer.to_str(pretty=True), tokenizer=encoder.kind, source=source, stand_in=stand_in)
    print(f'{directory}: {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens, '
          f'vocabulary {meta["vocab_size"]:,} ({encoder.kind}), from {source}')
    return meta


def make_encoder(tokenizer, vocab_size, stream):
    if vocab_size and tokenizer != 'bpe':
        raise UserError(f'--vocab_size={vocab_size} is for --tokenizer=bpe; the vocabulary of {tokenizer} follows from the text or is fixed')
    if tokenizer == 'char':
        return char_encoder(*survey(stream('reading characters')))
    if tokenizer == 'bpe':
        encoder = bpe_encoder(sample((text for split, _, text in stream('sampling') if split == 'train'), SAMPLE), vocab_size or 4096)
        if vocab_size and encoder.vocab_size < vocab_size:
            print(f'vocabulary: {encoder.vocab_size}, not {vocab_size}: the text has no more pairs to merge', file=sys.stderr)
        return encoder
    return {'byte': byte_encoder, 'gpt2': gpt2_encoder}.get(tokenizer, lambda: file_encoder(tokenizer))()


def survey(stream):
    """(the characters of the text in order of code point, whether a split has several documents)."""
    seen = np.zeros(0x110000, dtype=bool)
    documents = {'train': 0, 'val': 0}
    for split, new, text in stream:
        seen[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] = True
        documents[split] += new
    return [chr(code) for code in np.flatnonzero(seen)], max(documents.values()) > 1


def sample(texts, limit):
    """At most about `limit` characters, evenly spread: when there are more, every second text is dropped, again and again."""
    kept, size, stride = [], 0, 1
    for number, text in enumerate(texts):
        if number % stride == 0:
            kept.append(text)
            size += len(text)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def blocks(stream):
    """Lists of pieces of about BLOCK characters together, so that small documents are encoded in batches."""
    block, size = [], 0
    for piece in stream:
        block.append(piece)
        size += len(piece[2])
        if size >= BLOCK:
            yield block
            block, size = [], 0
    yield block


class Writer:
    """train.bin and val.bin in a temporary folder; `finish` renames the complete set into place, meta.json last."""

    def __init__(self, directory, vocab_size):
        self.directory, self.vocab_size = directory, vocab_size
        self.dtype = 'uint16' if vocab_size <= 1 << 16 else 'uint32'
        self.tokens, self.bytes = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
        self.temporary = os.path.join(directory, f'.preparing-{os.getpid()}')

    def __enter__(self):
        os.makedirs(self.temporary, exist_ok=True)
        self.files = {split: open(os.path.join(self.temporary, f'{split}.bin'), 'wb') for split in self.tokens}
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write(self, split, ids, num_bytes):
        """Appends token ids, which spell `num_bytes` bytes of text."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(f'{split}: token ids from {ids.min()} to {ids.max()} for a vocabulary of {self.vocab_size}')
        self.files[split].write(ids.astype(self.dtype).tobytes())
        self.tokens[split] += len(ids)
        self.bytes[split] += num_bytes

    def finish(self, tokenizer_json, **about):
        for split, count in self.tokens.items():
            if not count:
                raise UserError(f'{self.directory}: nothing for the {split} split: give more text or documents, '
                                'another --val_fraction, or a file of its own with --val')
        meta = {'vocab_size': self.vocab_size, 'dtype': self.dtype,
                'tokenizer_sha256': hashlib.sha256(tokenizer_json.encode()).hexdigest(), **about}
        for split in self.tokens:
            meta |= {f'{split}_tokens': self.tokens[split], f'{split}_bytes': self.bytes[split]}
        for name, text in (('tokenizer.json', tokenizer_json), ('meta.json', json.dumps(meta, indent=2) + '\n')):
            self.files[name] = open(os.path.join(self.temporary, name), 'w', encoding='utf-8', newline='')
            self.files[name].write(text)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if os.path.exists(old := os.path.join(self.directory, 'meta.json')):
            os.remove(old)    # no reader takes old meta.json with new tokens
        for name in ('train.bin', 'val.bin', 'tokenizer.json', 'meta.json'):
            os.replace(os.path.join(self.temporary, name), os.path.join(self.directory, name))
        return meta


def prepare_files(directory, paths, tokenizer, val_path=None, val_fraction=0.1, field='text', separator=None, **options):
    """`prepare` from files: text, JSONL and parquet. Further options are those of `prepare`."""
    for path in [*paths, *filter(None, [val_path])]:
        if not os.path.isfile(path):
            raise UserError(f'{path}: no such file')
    read = lambda label, files=paths: read_files(files, field, separator, label)
    if val_path:
        stream = lambda label: ((split, new, text) for split, files in (('train', paths), ('val', [val_path]))
                                for new, text in read(label, files))
    elif separator is not None or any(path.lower().endswith(tuple(READERS)) for path in paths):
        stream = lambda label: split_documents(read(label), val_fraction)
    else:
        border = int(sum(len(text) for _, text in read('counting characters')) * (1 - val_fraction))
        stream = lambda label: split_at(read(label), border)
    return prepare(directory, stream, tokenizer, **options)


def main(args):
    directory = os.path.join(DATA, args.name)
    if os.path.basename(directory) != args.name or args.name.startswith('.'):
        raise UserError(f'{args.name!r} is not a name for a data set: it becomes a folder in data/')
    if os.path.isdir(directory) and any(file.endswith('.py') for file in os.listdir(directory)):
        raise UserError(f'data/{args.name} belongs to nanoforge: choose another name')
    if os.path.exists(os.path.join(directory, 'meta.json')) and not args.overwrite:
        raise UserError(f'data/{args.name} exists already: choose another name, or replace it with --overwrite')
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')
    prepare_files(directory, args.files, args.tokenizer, args.val, args.val_fraction, args.field, args.document_separator,
                  source=', '.join(map(os.path.basename, args.files)), vocab_size=args.vocab_size)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('name', metavar='NAME', help='the data set: a folder of this name in data/')
    parser.add_argument('files', metavar='FILE', nargs='+', help='.jsonl, .parquet, anything else is text in UTF-8')
    parser.add_argument('--tokenizer', default='bpe', help='char, byte, gpt2, bpe (trained here), a tokenizer.json or a folder with one (default bpe)')
    parser.add_argument('--vocab_size', type=int, help='of the bpe trained here, with its 256 bytes and separator (default 4096)')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share held out for validation (default 0.1)')
    parser.add_argument('--val', metavar='FILE', help='a file that is the validation split, instead of a share')
    parser.add_argument('--field', default='text', help='the field or column of JSONL or parquet that holds the text (default text)')
    parser.add_argument('--document_separator', metavar='LINE', help="the line between two documents of a text file: '' or <|endoftext|>, say")
    parser.add_argument('--overwrite', action='store_true', help='replace a data set of this name')
    return parser.parse_args(argv)


if __name__ == '__main__':
    run(main, parse())
