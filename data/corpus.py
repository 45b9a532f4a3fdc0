"""A prepared data set: token ids mapped from disk, never loaded, and checked before the first step.

    corpus = Corpus('shakespeare_char')                 # data/shakespeare_char/{train.bin,val.bin,meta.json}
    x, y = windows(corpus.tokens('train'), offsets, 64)                                         # (B, 64) each
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


class Corpus:
    """name: a folder in `data_dir` (default: this folder), or the path of one. Raises UserError for anything
    wrong.

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
        path, dtype = os.path.join(self.directory, f'{split}.bin'), np.dtype(self.meta['dtype'])
        if not os.path.isfile(path):
            raise UserError(f'{path} is missing: prepare the data set {self.name!r} again')
        size = os.path.getsize(path)
        if size != self.meta[f'{split}_tokens'] * dtype.itemsize:
            raise UserError(f'{path} has {size:,} bytes, but meta.json says {self.meta[f"{split}_tokens"]:,} '
                            f'tokens of {dtype}: it is damaged, prepare the data set {self.name!r} again')
        if not size:
            raise UserError(f'{path} is empty: prepare the data set {self.name!r} from more text')
        tokens = np.memmap(path, dtype=dtype, mode='r')
        part = tokens if size <= WHOLE else tokens[::len(tokens) // 10_000 or 1]
        if (highest := int(part.max())) >= self.meta['vocab_size']:
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

    def check(self, block_size):
        """A window needs block_size tokens and the one after them."""
        for split in SPLITS:
            if len(self.tokens(split)) <= block_size:
                raise UserError(f'data set {self.name!r}: {len(self.tokens(split)):,} {split} tokens are too '
                                f'few for --block_size={block_size}: lower it below that, or prepare more '
                                'text')


def bare(name):
    """'data/shakespeare_char/' is typed where 'shakespeare_char' is meant."""
    return name.removeprefix('./').removeprefix('data/').rstrip('/')


def find(name, data_dir=DATA):
    """The folder of the data set `name`: in `data_dir`, else a path; UserError names what exists when there
    is none."""
    for directory in (os.path.join(data_dir, bare(name)), name):
        if name and any(os.path.exists(os.path.join(directory, file)) for file in ('meta.json', 'train.bin')):
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
    wanted = dict(vocab_size=int, dtype=str, tokenizer=str, tokenizer_sha256=str, source=str, stand_in=bool,
                  train_tokens=int, val_tokens=int, train_bytes=int, val_bytes=int)
    meta = meta if isinstance(meta, dict) else {}
    wrong = [key for key, kind in wanted.items() if not isinstance(meta.get(key), kind)]
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
    """Data sets trained on together share a tokenizer or, as aligned `streams`, their lengths; else a
    UserError."""
    first = corpora[0]
    for other in corpora[1:]:
        if streams:
            for split in SPLITS:
                if len(other.tokens(split)) != len(first.tokens(split)):
                    raise UserError(f'aligned streams must have equal lengths: {split} has '
                                    f'{len(first.tokens(split)):,} tokens in {first.name!r} and '
                                    f'{len(other.tokens(split)):,} in {other.name!r}')
        elif other.meta['tokenizer_sha256'] != first.meta['tokenizer_sha256']:
            raise UserError(f'{first.name!r} ({first.meta["tokenizer"]}, {first.meta["vocab_size"]} ids) and '
                            f'{other.name!r} ({other.meta["tokenizer"]}, {other.meta["vocab_size"]} ids) '
                            f'have different tokenizers: prepare the second with '
                            f'--tokenizer={first.directory}')


def windows(tokens, offsets, block_size, device=None):
    """The windows of a split that begin at `offsets` (B,): x (B, block_size) and the targets y, one token on,
    int64.

    Offsets lie in 0 .. len(tokens) - block_size - 1. One gather for all rows; a copy to CUDA does not wait.
    """
    every = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)    # a view, no copy
    rows = torch.from_numpy(every[offsets].astype(np.int64))    # (B, block_size + 1)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    if device is None or torch.device(device).type == 'cpu':
        return x, y
    if torch.device(device).type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)
