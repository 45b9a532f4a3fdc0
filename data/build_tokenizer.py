"""Text to token ids, for whole corpora: character, byte, GPT-2's BPE, our own BPE, or any tokenizer.json.

Every encoder holds a Hugging Face tokenizer, which is what becomes tokenizer.json and encodes prompts. The
corpus goes through `encode`, which gives the same ids faster (a table for characters and bytes, tiktoken for
GPT-2). Text never turns into a special token: `<|endoftext|>` typed in a document is encoded as the ordinary
characters that it is.
"""
import json
import os
from typing import Callable, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from configurator import UserError

SEPARATOR = '<|endoftext|>'
# what foreign tokenizers call it
SEPARATORS = (SEPARATOR, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>')


class Encoder(NamedTuple):
    kind: str               # 'char', 'byte', 'gpt2', 'bpe', or 'file' for any other tokenizer.json
    tokenizer: Tokenizer    # what tokenizer.json holds
    encode: Callable        # list of str -> list of integer arrays, one per text
    separator: int | None   # the id that stands between two documents

    @property
    def vocab_size(self):
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1


def byte_symbols():
    """The 256 printable characters that stand for bytes in byte-level BPE, by byte (the mapping of GPT-2).

    Printable Latin-1 characters stand for themselves; the other bytes take the code points from 256 on, in
    order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def char_encoder(characters, separator=False):
    """One id per character: `characters[i]` has id i; with `separator`, <|endoftext|> is the last id."""
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    if separator:
        tokenizer.add_special_tokens([SEPARATOR])
    codes = np.array(list(map(ord, characters)), dtype=np.int64)
    table = np.full(0x110000, -1, dtype=np.int32)    # id of every code point
    table[codes] = np.arange(len(codes))

    def encode(texts):
        rows = [table[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] for text in texts]
        for text, row in zip(texts, rows):
            if row.size and row.min() < 0:
                raise UserError(f'the character {text[int(row.argmin())]!r} is '
                                f'not among the {len(codes)} known ones')
        return rows

    return Encoder('char', tokenizer, encode, len(codes) if separator else None)


def byte_encoder():
    """One id per byte of UTF-8, equal to the byte; <|endoftext|> is 256. The same for every data set."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = byte_level(models.BPE(vocabulary, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([SEPARATOR])

    def encode(texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    return Encoder('byte', tokenizer, encode, 256)


def byte_level(model, use_regex=True):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bpe_encoder(texts, vocab_size):
    """Byte-level BPE trained on `texts`, at most `vocab_size` ids of which the last is <|endoftext|>."""
    if vocab_size < 257:
        raise UserError(f'--vocab_size={vocab_size} is too small: the bytes and the separator alone are 257')
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([SEPARATOR])
    return tokenizer_encoder('bpe', tokenizer)


def gpt2_encoder():
    """GPT-2's BPE through tiktoken; its ranks come from tiktoken's cache or the network."""
    import tiktoken
    try:
        encoding = tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as e:    # requests' errors are OSErrors; a damaged file is a ValueError
        raise UserError(f"GPT-2's BPE ranks are neither in tiktoken's cache nor on the network "
                        f"({type(e).__name__}): "
                        'point TIKTOKEN_CACHE_DIR at a cache from a '
                        'machine with a network, or give data/prepare.py '
                        "--tokenizer=FOLDER with GPT-2's tokenizer.json")
    return rank_encoder(encoding)


def rank_encoder(encoding):
    """An encoder from a tiktoken.Encoding over bytes that splits text as GPT-2's does."""
    ranks = encoding._mergeable_ranks
    symbols = byte_symbols()

    def spell(token):
        return ''.join(symbols[byte] for byte in token)

    def encode(texts):
        return [np.array(row, dtype=np.uint32) for row in encoding.encode_ordinary_batch(texts)]

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            merges.append(tuple(map(spell, last_merge(ranks, token))))
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([SEPARATOR])
    return Encoder('gpt2', tokenizer, encode, encoding.eot_token)


def last_merge(ranks, token):
    """The pair of parts that BPE joins last when it makes `token`: its line in a list of merges."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [a + b for a, b in zip(parts, parts[1:])]
        order = [ranks.get(pair, len(ranks)) for pair in joined]
        first = order.index(min(order))
        parts[first:first + 2] = [joined[first]]
    return parts


def file_encoder(path):
    """An existing tokenizer: a tokenizer.json, or the folder of a model or data set that holds one."""
    file = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f'--tokenizer={path} is not char, byte, gpt2, bpe, a '
                        'tokenizer.json or a folder with one')
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as e:    # the library raises nothing narrower
        raise UserError(f'{file} is not a tokenizer.json that can be read: {e}')
    tokenizer.no_truncation()
    tokenizer.no_padding()
    meta_path = os.path.join(os.path.dirname(file), 'meta.json')
    if os.path.isfile(meta_path):       # of another data set
        with open(meta_path, encoding='utf-8') as meta:
            return tokenizer_encoder(json.load(meta)['tokenizer'], tokenizer)
    is_gpt2 = tokenizer.token_to_id(SEPARATOR) == 50256 and tokenizer.token_to_id('\u0120the') == 262
    return tokenizer_encoder('gpt2' if is_gpt2 else 'file', tokenizer)


def tokenizer_encoder(kind, tokenizer):
    tokenizer.encode_special_tokens = True    # as ordinary characters; this does not go into tokenizer.json

    def encode(texts):
        try:
            rows = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as e:    # the library raises nothing narrower, and only for an unknown symbol
            raise UserError(f'this tokenizer cannot spell the text ({e}): a '
                            'symbol of it is not in the vocabulary')
        return [np.array(row.ids, dtype=np.uint32) for row in rows]

    ids = [tokenizer.token_to_id(token) for token in SEPARATORS]
    separator = next((i for i in ids if i is not None), None)
    return Encoder(kind, tokenizer, encode, separator)
