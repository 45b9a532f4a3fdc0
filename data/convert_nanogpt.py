"""Takes over a data set that nanoGPT prepared: train.bin, val.bin and meta.pkl (none for GPT-2's BPE).

    python data/convert_nanogpt.py path/to/nanoGPT/data/shakespeare_char my_shakespeare

A pickle can run any program when it is opened. This one is read as data instead: an interpreter for the
opcodes that build dicts, lists, strings and numbers, which refuses every other one.
"""
import os
import pickletools
import sys
from pathlib import Path

if __name__ == '__main__':    # run as a command: imports start at the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from configurator import UserError, run_script
from data.build_tokenizer import byte_symbols, char_encoder, file_encoder, gpt2_encoder
from data.prepare import Parser, Writer, check_name

BLOCK = 1 << 22    # tokens copied at a time
VALUES = '''
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
'''.split()
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
MARK = object()


def read_pickle(path):
    """The dicts, lists, strings and numbers of a pickle; UserError names the first other opcode."""
    stack, memo = [], {}

    def since_mark():
        items = []
        while stack[-1] is not MARK:
            items.append(stack.pop())
        stack.pop()
        return items[::-1]

    def pairs(items):
        return dict(zip(items[::2], items[1::2], strict=True))

    with open(path, 'rb') as file:
        content = file.read()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in VALUES:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name == 'MARK':
                stack.append(MARK)
            elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
                memo[argument] = stack[-1]
            elif name == 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            elif name in ('GET', 'BINGET', 'LONG_BINGET'):
                stack.append(memo[argument])
            elif name == 'DICT':
                stack.append(pairs(since_mark()))
            elif name in ('LIST', 'TUPLE'):
                items = since_mark()
                stack.append(items if name == 'LIST' else tuple(items))
            elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ('SETITEMS', 'SETITEM'):
                items = since_mark() if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
                stack[-1].update(pairs(items))
            elif name in ('APPENDS', 'APPEND'):
                items = since_mark() if name == 'APPENDS' else [stack.pop()]
                stack[-1].extend(items)
            elif name == 'STOP':
                return stack.pop()
            elif name not in ('PROTO', 'FRAME'):
                raise UserError(f'{path}: refused, its opcode {name} can do '
                                'more than build dicts and strings')
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, StopIteration) as e:
        raise UserError(f'{path} is not a whole pickle ({e})')


def encoder_of(folder, tokenizer):
    """(our encoder for the ids of a nanoGPT folder, bytes of text per id)."""
    path = os.path.join(folder, 'meta.pkl')
    meta = read_pickle(path) if os.path.exists(path) else {}
    if not isinstance(meta, dict):
        raise UserError(f'{path}: expected a dict with stoi and itos, found {type(meta).__name__}')
    if 'itos' in meta:
        symbols = meta['itos'] if isinstance(meta['itos'], dict) else dict(enumerate(meta['itos']))
        characters = [symbols.get(i) for i in range(len(symbols))]
        if any(not isinstance(character, str) or len(character) != 1 for character in characters):
            raise UserError(f'{path}: itos does not give one character for '
                            'every id from 0: no other is taken over')
        return char_encoder(characters), np.array([len(c.encode()) for c in characters])
    if meta.get('tiktoken_encoding', 'gpt2') != 'gpt2' or meta.get('tokenizer', 'tiktoken') != 'tiktoken':
        raise UserError(f"{path}: only character vocabularies and "
                        f"GPT-2's BPE are taken over, not {meta}"[:300])
    encoder = file_encoder(tokenizer) if tokenizer else gpt2_encoder()
    if encoder.kind != 'gpt2':
        raise UserError(f"--tokenizer={tokenizer} is not GPT-2's, which a "
                        "folder without meta.pkl was encoded with")
    lengths = np.zeros(encoder.vocab_size, dtype=np.int64)
    symbols = set(byte_symbols())
    for token, i in encoder.tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[i] = len(token) if set(token) <= symbols else 0    # byte-level: a symbol is a byte
    lengths[encoder.separator] = 0    # which is a token, but no text
    return encoder, lengths


def convert(folder, directory, tokenizer=None):
    """Writes a nanoGPT data folder as a data set of ours and returns its meta."""
    paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    for path in paths.values():
        if not os.path.isfile(path) or not os.path.getsize(path) or os.path.getsize(path) % 2:
            raise UserError(f'{path} is missing, empty or not of 16-bit ids: '
                            f'{folder} is not a data folder of nanoGPT')
    encoder, lengths = encoder_of(folder, tokenizer)
    with Writer(directory, encoder.vocab_size) as writer:
        for split, path in paths.items():
            ids = np.memmap(path, dtype=np.uint16, mode='r')
            for start in range(0, len(ids), BLOCK):
                block = np.asarray(ids[start:start + BLOCK])
                if int(block.max()) >= encoder.vocab_size:
                    raise UserError(f'{path} holds the id {block.max()}, its vocabulary only '
                                    f'{encoder.vocab_size} ids')
                writer.write(split, block, int(lengths[block].sum()))
        source = f'data folder of nanoGPT, {os.path.basename(os.path.abspath(folder))}'
        return writer.finish(encoder, source)


def main(args):
    meta = convert(args.folder, check_name(args.name, args.overwrite), args.tokenizer)
    print(f'data/{args.name}: {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation '
          f'tokens, vocabulary {meta["vocab_size"]:,} ({meta["tokenizer"]})')


def parse(argv=None):
    parser = Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER', help='the data folder of nanoGPT')
    parser.add_argument('name', metavar='NAME', help='the data set to write: a folder of this name in data/')
    parser.add_argument('--tokenizer', help="a GPT-2 tokenizer.json or a folder with one (default: "
                                            "tiktoken's)")
    parser.add_argument('--overwrite', action='store_true', help='replace a data set of this name')
    return parser.parse_args(argv)


if __name__ == '__main__':
    run_script(main, parse())
