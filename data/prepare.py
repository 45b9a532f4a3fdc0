"""Turns text into a data set: data/NAME/{train.bin, val.bin, meta.json, tokenizer.json}.

    python data/prepare.py my_corpus book.txt other.txt --tokenizer char
    python data/prepare.py my_corpus stories.jsonl more.parquet --tokenizer bpe --vocab_size 8192
    python data/prepare.py my_corpus train.txt --val val.txt --tokenizer gpt2

A text file is one document (or several, see --document_separator); a row of JSONL or parquet is one document.
Between two documents stands <|endoftext|>. Of plain text the last characters are held out for validation; of
documents every tenth (--val_fraction). Everything streams: text is read, encoded and written block by block,
so memory stays constant.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from configurator import UserError, run_script
from data.build_tokenizer import bpe_encoder, byte_encoder, char_encoder, file_encoder, gpt2_encoder
from data.documents import READERS, read_files, split_at, split_documents

BATCH = 1 << 21      # characters encoded together, on all cores, and then written
SAMPLE = 50 << 20    # characters of the training split that a BPE learns from, at most
DATA = os.path.dirname(os.path.abspath(__file__))


def prepare(directory, stream, tokenizer, source, vocab_size=None, num_tokens=None, stand_in=False):
    """Writes a data set into `directory` and returns its meta.json as a dict.

    stream(label) starts a pass over the text: an iterator of (split, starts a document?, text); a character
    or bpe tokenizer takes two passes. tokenizer: char, byte, gpt2, bpe or a path. source: one line, where the
    text came from. num_tokens: stop after the document that reaches it. Complete or absent: nobody sees half
    a data set.
    """
    encoder = make_encoder(tokenizer, vocab_size, stream)
    with Writer(directory, encoder.vocab_size) as writer:
        for split, new, text, ids in encoded(stream('encoding'), encoder):
            if new and num_tokens and sum(writer.tokens.values()) >= num_tokens:
                break
            if new and writer.tokens[split]:
                if encoder.separator is None:
                    raise UserError(f'--tokenizer={tokenizer} has no <|endoftext|> to put between documents')
                writer.write(split, np.array([encoder.separator]), 0)
            writer.write(split, ids, len(text.encode()))
        meta = writer.finish(encoder, source, stand_in)
    print(f'{directory}: {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens, '
          f'vocabulary {meta["vocab_size"]:,} ({encoder.kind}), from {source}')
    return meta


def make_encoder(tokenizer, vocab_size, stream):
    if vocab_size and tokenizer != 'bpe':
        raise UserError(f'--vocab_size={vocab_size} is for --tokenizer=bpe, not {tokenizer}: leave it out')
    if tokenizer == 'char':
        return char_encoder(*survey(stream('reading characters')))
    if tokenizer == 'bpe':
        texts, share = sample(text for split, _, text in stream('sampling') if split == 'train')
        if share < 1:
            print(f'the vocabulary is trained on {share:.1%} of the text, evenly spread')
        encoder = bpe_encoder(texts, vocab_size or 4096)
        if vocab_size and encoder.vocab_size < vocab_size:
            print(f'vocabulary {encoder.vocab_size}, not {vocab_size}: the text has no more pairs to merge')
        return encoder
    if tokenizer == 'byte':
        return byte_encoder()
    if tokenizer == 'gpt2':
        return gpt2_encoder()
    return file_encoder(tokenizer)


def survey(stream):
    """(the characters of the text in order of code point, whether a split has several documents)."""
    seen = np.zeros(0x110000, dtype=bool)
    documents = {'train': 0, 'val': 0}
    for split, new, text in stream:
        seen[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] = True
        documents[split] += new
    return [chr(code) for code in np.flatnonzero(seen)], max(documents.values()) > 1


def sample(texts, limit=SAMPLE):
    """(texts of about `limit` characters at most, their share): every second one goes until it fits."""
    kept, size, total, stride = [], 0, 0, 1
    for number, text in enumerate(texts):
        total += len(text)
        if number % stride == 0:
            kept.append(text)
            size += len(text)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept, size / max(total, 1)


def encoded(stream, encoder):
    """(split, starts a document?, text, ids) of every piece; a block of them is encoded together."""
    for block in blocks(stream):
        texts = [text for _, _, text in block]
        for (split, new, text), ids in zip(block, encoder.encode(texts)):
            yield split, new, text, ids


def blocks(stream):
    """Lists of pieces with BATCH characters or a little more; the last one may have fewer."""
    block, size = [], 0
    for piece in stream:
        block.append(piece)
        size += len(piece[2])
        if size >= BATCH:
            yield block
            block, size = [], 0
    if block:
        yield block


class Writer:
    """Writes a data set into a temporary folder; `finish` renames the complete one into place."""

    def __init__(self, directory, vocab_size):
        self.directory, self.vocab_size = directory, vocab_size
        self.dtype = 'uint16' if vocab_size <= 1 << 16 else 'uint32'
        self.tokens = {'train': 0, 'val': 0}
        self.bytes = {'train': 0, 'val': 0}
        self.temporary = os.path.join(directory, f'.preparing-{os.getpid()}')

    def __enter__(self):
        try:
            os.makedirs(self.temporary, exist_ok=True)
        except OSError as e:
            raise UserError(f'{self.directory} cannot be made: {e}')
        self.files = {}
        for split in self.tokens:
            self.files[split] = open(os.path.join(self.temporary, f'{split}.bin'), 'wb')
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            with contextlib.suppress(OSError):    # of a full disk, which the first error has told
                file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        with contextlib.suppress(OSError):    # of a folder that holds something
            os.rmdir(self.directory)
        if isinstance(error, OSError):
            raise UserError(f'{self.directory} could not be prepared: {error}') from error

    def write(self, split, ids, num_bytes):
        """Appends token ids, which spell `num_bytes` bytes of text."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(f'{split}: token ids from {ids.min()} to {ids.max()} for a vocabulary of '
                            f'{self.vocab_size}')
        self.files[split].write(ids.astype(self.dtype).tobytes())
        self.tokens[split] += len(ids)
        self.bytes[split] += num_bytes

    def finish(self, encoder, source, stand_in=False):
        """Moves the data set into place and returns its meta; UserError when a split is empty."""
        for split, count in self.tokens.items():
            if not count:
                raise UserError(f'{self.directory}: nothing for the {split} split: give more text or '
                                'documents, another --val_fraction, or a file of its own with --val')
        tokenizer_json = encoder.tokenizer.to_str(pretty=True)
        meta = {
            'vocab_size': self.vocab_size,
            'dtype': self.dtype,
            'tokenizer': encoder.kind,
            'tokenizer_sha256': hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            'source': source,
            'stand_in': stand_in,
        }
        for split in self.tokens:
            meta[f'{split}_tokens'] = self.tokens[split]
            meta[f'{split}_bytes'] = self.bytes[split]
        texts = {'tokenizer.json': tokenizer_json, 'meta.json': json.dumps(meta, indent=2) + '\n'}
        for name, text in texts.items():
            path = os.path.join(self.temporary, name)
            self.files[name] = open(path, 'w', encoding='utf-8', newline='')
            self.files[name].write(text)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with contextlib.suppress(FileNotFoundError):    # no reader takes old meta.json with new tokens
            os.remove(os.path.join(self.directory, 'meta.json'))
        for name in ('train.bin', 'val.bin', 'tokenizer.json', 'meta.json'):
            os.replace(os.path.join(self.temporary, name), os.path.join(self.directory, name))
        return meta


def prepare_files(directory, paths, tokenizer, source, val_path=None, val_fraction=0.1, field='text',
                  separator=None, vocab_size=None):
    """`prepare` from files: text, JSONL and parquet; see the flags of the command."""
    for path in [*paths, val_path] if val_path else paths:
        if not os.path.isfile(path):
            raise UserError(f'{path}: no such file')

    def read(label, files=paths):
        return read_files(files, field, separator, label)

    has_documents = separator is not None or any(path.lower().endswith(tuple(READERS)) for path in paths)
    if not val_path and not has_documents:
        num_characters = sum(len(text) for _, text in read('counting characters'))
        border = int(num_characters * (1 - val_fraction))

    def stream(label):
        if val_path:
            val = whole_split('val', read(label, [val_path]))
            return itertools.chain(whole_split('train', read(label)), val)
        if has_documents:
            return split_documents(read(label), val_fraction)
        return split_at(read(label), border)

    return prepare(directory, stream, tokenizer, source, vocab_size)


def whole_split(split, pieces):
    """Pieces of files that are a split as a whole."""
    for new, text in pieces:
        yield split, new, text


def check_name(name, overwrite):
    """The folder in data/ for somebody's own data set of this name, if it may be written."""
    directory = os.path.join(DATA, name)
    if not name or os.path.basename(name) != name or name.startswith('.'):
        raise UserError(f'{name!r} is not a name for a data set: it becomes a folder in data/')
    if os.path.isdir(directory) and any(file.endswith('.py') for file in os.listdir(directory)):
        raise UserError(f'data/{name} belongs to nanoforge: choose another name')
    if os.path.exists(os.path.join(directory, 'meta.json')) and not overwrite:
        raise UserError(f'data/{name} exists already: choose another name, or replace it with --overwrite')
    return directory


class Parser(argparse.ArgumentParser):
    """Flags as in the training scripts: - and _ alike, no abbreviations, and a mistake is one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv=None):
        def with_underscores(flag):
            return '--' + flag[0][2:].replace('-', '_')

        argv = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub('^--[^=]+', with_underscores, word) for word in argv])

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message} (--help lists the flags)\n')


def main(args):
    directory = check_name(args.name, args.overwrite)
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')
    source = ', '.join(map(os.path.basename, args.files))
    prepare_files(directory, args.files, args.tokenizer, source, args.val, args.val_fraction, args.field,
                  args.document_separator, args.vocab_size)


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add('name', metavar='NAME', help='the data set: a folder of this name in data/')
    add('files', metavar='FILE', nargs='+', help='.jsonl, .parquet, anything else is text in UTF-8')
    add('--tokenizer', default='bpe',
        help='char, byte, gpt2, bpe (trained here), or a tokenizer.json or its folder (default bpe)')
    add('--vocab_size', type=int, help='of bpe, with its bytes and separator (default 4096)')
    add('--val_fraction', type=float, default=0.1, help='share held out for validation (default 0.1)')
    add('--val', metavar='FILE', help='a file that is the validation split, instead of a share')
    add('--field', default='text', help='the field of JSONL or column of parquet (default text)')
    add('--document_separator', metavar='LINE',
        help="the line between two documents of a text file: '' or '<|endoftext|>', say")
    add('--overwrite', action='store_true', help='replace a data set of this name')
    return parser.parse_args(argv)


if __name__ == '__main__':
    run_script(main, parse())
