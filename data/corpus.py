"""A prepared data set: token ids mapped from disk, never loaded, and checked before the first step.

    corpus = Corpus('shakespeare_char')                     # data/shakespeare_char/{train,val}.bin, meta.json
    x, y = windows(corpus.tokens('train'), offsets, 64)     # (B, 64) each
"""
import hashlib
import importlib
import json
import math
import os

import numpy as np
import torch

from configurator import UserError

DATA = os.path.dirname(os.path.abspath(__file__))
SHIPPED = ('shakespeare_char', 'shakespeare', 'openwebtext', 'fineweb')
WHOLE = 50 << 20      # bytes up to which every id of a split is checked when it is opened; above, a sample
SPLITS = ('train', 'val')
META_TYPES = {
    'vocab_size': int,
    'dtype': str,
    'tokenizer': str,
    'tokenizer_sha256': str,
    'source': str,
    'stand_in': bool,
    'train_tokens': int,
    'val_tokens': int,
    'train_bytes': int,
    'val_bytes': int,
}


class Corpus:
    """name: a folder in `data_dir` (default: this folder), or the path of one. UserError for anything wrong.

    .name, .directory, .meta (meta.json: vocab_size, tokenizer, tokenizer_sha256, val_tokens, val_bytes,
    source, stand_in, ...), .tokens(split) -> 1-D np.memmap of uint16 or uint32.
    """

    def __init__(self, name, data_dir=DATA):
        self.directory = find(name, data_dir)
        self.name = os.path.basename(os.path.normpath(self.directory))
        self.meta = read_meta(self.directory)
        self._tokens = {split: self._open(split) for split in SPLITS}
        self._check_tokenizer()

    def tokens(self, split):
        return self._tokens[split]

    def bits_per_byte(self, loss):
        """A validation loss in nats per token as bits per byte of the text, which no tokenizer changes."""
        return loss / math.log(2) * self.meta['val_tokens'] / self.meta['val_bytes']

    def __str__(self):
        note = 'STAND-IN TEXT, not the real corpus: ' if self.meta['stand_in'] else ''
        return (f'{self.name}: {note}{len(self.tokens("train")):,} + {len(self.tokens("val")):,} tokens, '
                f'{self.meta["tokenizer"]} vocabulary of {self.meta["vocab_size"]:,}')

    def _open(self, split):
        path = os.path.join(self.directory, f'{split}.bin')
        dtype = np.dtype(self.meta['dtype'])
        num_tokens = self.meta[f'{split}_tokens']
        if not os.path.isfile(path):
            raise UserError(f'{path} is missing: prepare the data set {self.name!r} again')
        size = os.path.getsize(path)
        if size != num_tokens * dtype.itemsize:
            raise UserError(f'{path} has {size:,} bytes, but meta.json says {num_tokens:,} tokens of '
                            f'{dtype}: it is damaged, prepare the data set {self.name!r} again')
        if not size:
            raise UserError(f'{path} is empty: prepare the data set {self.name!r} from more text')
        tokens = np.memmap(path, dtype=dtype, mode='r')
        stride = 1 if size <= WHOLE else len(tokens) // 10_000 or 1
        highest = int(tokens[::stride].max())
        if highest >= self.meta['vocab_size']:
            raise UserError(f'{path} holds the token id {highest} outside its vocabulary of '
                            f'{self.meta["vocab_size"]}: prepare the data set again')
        return tokens

    def _check_tokenizer(self):
        path = os.path.join(self.directory, 'tokenizer.json')
        if not os.path.isfile(path):
            raise UserError(f'{path} is missing: prepare the data set {self.name!r} again')
        with open(path, 'rb') as file:
            if hashlib.file_digest(file, 'sha256').hexdigest() != self.meta['tokenizer_sha256']:
                raise UserError(f'{path} is not the tokenizer of the tokens: prepare {self.name!r} again')

    def files(self):
        """The paths of its tokens."""
        return [os.path.join(self.directory, f'{split}.bin') for split in SPLITS]

    def described(self):
        return f'{self.name!r} ({self.meta["tokenizer"]}, {self.meta["vocab_size"]} ids)'

    def check(self, block_size):
        """A window needs block_size tokens and the one after them."""
        for split in SPLITS:
            num_tokens = len(self.tokens(split))
            if num_tokens <= block_size:
                raise UserError(f'data set {self.name!r}: {num_tokens:,} {split} tokens are too few for '
                                f'--block_size={block_size}: lower it below that, or prepare more text')


def bare(name):
    """'data/shakespeare_char/' is typed where 'shakespeare_char' is meant."""
    return name.removeprefix('./').removeprefix('data/').rstrip('/')


def find(name, data_dir=DATA):
    """The folder of the data set `name`, in `data_dir` or a path; UserError names what there is."""
    for directory in (os.path.join(data_dir, bare(name)), name):
        files = os.listdir(directory) if os.path.isdir(directory) else []
        if name and ('meta.json' in files or 'train.bin' in files):
            return directory
    folders = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    prepared = [folder for folder in folders if os.path.exists(os.path.join(data_dir, folder, 'meta.json'))]
    raise UserError(f'there is no data set {name!r}; prepared in {data_dir}: '
                    f'{", ".join(prepared) or "none"}; prepared on first use: {", ".join(SHIPPED)}; your own '
                    f'text: python data/prepare.py {name or "NAME"} FILE')


def read_meta(directory):
    path = os.path.join(directory, 'meta.json')
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
    except FileNotFoundError:
        raise UserError(f'{directory} has no meta.json: prepare it again, or for a data set of nanoGPT: '
                        f'python data/convert_nanogpt.py {directory} NAME')
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e}): prepare the data set again')
    fields = meta if isinstance(meta, dict) else {}
    wrong = [key for key, type in META_TYPES.items() if not isinstance(fields.get(key), type)]
    if wrong or meta['dtype'] not in ('uint16', 'uint32'):
        raise UserError(f'{path} lacks a valid {wrong[0] if wrong else "dtype"}: prepare the data set again')
    return meta


def prepare_missing(name, data_dir=DATA):
    """Prepares a data set of ours on first use, and again when the real text has come to a stand-in's place.

    Of several ranks one calls it, and the others wait.
    """
    name = bare(name)
    directory = os.path.join(data_dir, name)
    if name in SHIPPED:
        ready = os.path.exists(os.path.join(directory, 'meta.json'))
        arrived = os.path.exists(os.path.join(DATA, 'shakespeare_char', 'input.txt'))
        if not ready or arrived and read_meta(directory)['stand_in']:
            importlib.import_module(f'data.{name}.prepare').prepare(directory)


def check_together(corpora, streams=False):
    """UserError where data sets do not share a tokenizer or, as aligned `streams`, their lengths."""
    first = corpora[0]
    for other in corpora[1:]:
        if streams:
            check_aligned(first, other)
        elif other.meta['tokenizer_sha256'] != first.meta['tokenizer_sha256']:
            raise UserError(f'{first.described()} and {other.described()} have different tokenizers: prepare '
                            f'the second with --tokenizer={first.directory}')


def check_aligned(first, other):
    for split in SPLITS:
        wanted, given = len(first.tokens(split)), len(other.tokens(split))
        if given != wanted:
            raise UserError(f'aligned streams must have equal lengths: {split} has {wanted:,} tokens in '
                            f'{first.name!r} and {given:,} in {other.name!r}')


def windows(tokens, offsets, block_size, device=None):
    """The windows at `offsets` (B,): x (B, block_size) and the targets y, one token on, int64.

    Offsets lie in 0 .. len(tokens) - block_size - 1. One gather for all rows; a copy to CUDA does not wait.
    """
    # a view of all windows, no copy
    every = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)
    rows = torch.from_numpy(every[offsets].astype(np.int64))    # (B, block_size + 1)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    type = 'cpu' if device is None else torch.device(device).type
    if type == 'cpu':
        return x, y
    if type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)
