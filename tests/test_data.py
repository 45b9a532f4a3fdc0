"""Data preparation, the corpus reader and nanoGPT's folders,
on small texts whose ids can be worked out by hand."""
import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configurator import UserError
from conftest import ROOT
from data import build_tokenizer, convert_nanogpt, corpus, documents, hub, prepare
from data.corpus import Corpus, windows
from data.shakespeare_char import prepare as shakespeare
from data.shakespeare_char.stand_in import play

HARD = 'To be,  or not\n\n\tto be? naïve — 日本語 🙂 <|endoftext|> x\r\n  42nd \u00a0end '
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def ids(directory, split='train', dtype=np.uint16):
    return np.fromfile(os.path.join(directory, f'{split}.bin'), dtype=dtype).tolist()


def make(tmp_path, text=None, name='set', tokenizer='char', **options):
    """A prepared data set in tmp_path/name, of a text file."""
    path = write(tmp_path / f'{name}.txt', play(4000) if text is None else text)
    prepare.prepare_files(str(tmp_path / name), [path], tokenizer, 'a test', **options)
    return str(tmp_path / name)


# ---- characters: nanoGPT's own arithmetic ----

def test_char_ids_split_and_meta_follow_nanogpt(tmp_path):
    text = play(3001)
    directory = make(tmp_path, text)
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert ids(directory) == [index[c] for c in text[:cut]]
    assert ids(directory, 'val') == [index[c] for c in text[cut:]]
    meta = json.load(open(f'{directory}/meta.json'))
    sha = hashlib.sha256(open(f'{directory}/tokenizer.json', 'rb').read()).hexdigest()
    assert meta == {'vocab_size': len(index), 'dtype': 'uint16', 'tokenizer': 'char', 'tokenizer_sha256': sha,
                    'source': 'a test', 'stand_in': False,
                    'train_tokens': 2700, 'train_bytes': 2700, 'val_tokens': 301, 'val_bytes': 301}
    assert sorted(os.listdir(directory)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_any_tool_opens_tokenizer_json_and_agrees_with_the_corpus(tmp_path, kind):
    text = HARD * 30
    directory = make(tmp_path, text, tokenizer=kind, **({'vocab_size': 300} if kind == 'bpe' else {}))
    stored = ids(directory) + ids(directory, 'val')
    for opened in (PreTrainedTokenizerFast, {'tokenizer_file': f'{directory}/tokenizer.json'}), \
                  (AutoTokenizer.from_pretrained, {'pretrained_model_name_or_path': directory}):
        tokenizer = opened[0](**opened[1])
        assert tokenizer.decode(stored, clean_up_tokenization_spaces=False) == text
        sentence = 'not\n\n\tto  be? 🙂'
        assert tokenizer.decode(tokenizer(sentence)['input_ids'], clean_up_tokenization_spaces=False) == sentence
    meta = json.load(open(f'{directory}/meta.json'))
    assert meta['train_bytes'] + meta['val_bytes'] == len(text.encode())
    assert meta['vocab_size'] == {'char': len(set(text)), 'byte': 257, 'bpe': 300}[kind] > max(stored)
    if kind == 'char':    # the table for the corpus and the file for prompts are one tokenizer
        assert Tokenizer.from_file(f'{directory}/tokenizer.json').encode(text[:2000]).ids == stored[:2000]
    if kind == 'byte':
        assert stored == list(text.encode())
    if kind == 'bpe':     # what is typed in a text never becomes the separator
        assert len(stored) < len(text.encode()) and 299 not in stored


def test_bpe_is_the_same_in_another_process(tmp_path):
    directory = make(tmp_path, tokenizer='bpe', vocab_size=400)
    code = ('import sys; from data.prepare import prepare_files\n'
            'prepare_files(sys.argv[1], [sys.argv[2]], "bpe", "again", vocab_size=400)')
    again = str(tmp_path / 'again')
    subprocess.run([sys.executable, '-c', code, again, f'{directory}.txt'], check=True, cwd=ROOT)
    for name in ('tokenizer.json', 'train.bin', 'val.bin'):
        assert open(f'{directory}/{name}', 'rb').read() == open(f'{again}/{name}', 'rb').read()


def test_text_read_in_blocks_encodes_as_if_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 50)
    monkeypatch.setattr(prepare, 'BATCH', 200)
    text = play(5000) + HARD * 5
    directory = make(tmp_path, text, tokenizer='bpe', vocab_size=300)
    tokenizer = Tokenizer.from_file(f'{directory}/tokenizer.json')
    tokenizer.encode_special_tokens = True
    cut = int(len(text) * 0.9)
    assert ids(directory) == tokenizer.encode(text[:cut]).ids
    assert ids(directory, 'val') == tokenizer.encode(text[cut:]).ids
    assert ids(make(tmp_path, 'x' * 1000, 'unbroken')) == [0] * 900    # no white space to cut at


# ---- documents ----

def test_records_are_separated_and_every_tenth_is_held_out(tmp_path):
    documents = [f'doc {i} é' for i in range(20)]
    jsonl = write(tmp_path / 'a.jsonl', ''.join(json.dumps({'body': d}) + '\n\n' for d in documents))
    for tokenizer, separator in (('byte', 256), ('char', len(set(''.join(documents))))):
        directory = str(tmp_path / tokenizer)
        meta = prepare.prepare_files(directory, [jsonl], tokenizer, 'x', field='body')
        held_out = [documents[0], documents[10]]
        rest = [d for d in documents if d not in held_out]
        decode = Tokenizer.from_file(f'{directory}/tokenizer.json').decode
        for split, expected in (('train', rest), ('val', held_out)):
            stored = ids(directory, split)
            pieces = ' '.join(map(str, stored)).split(f' {separator} ')
            assert [decode([int(i) for i in piece.split()]) for piece in pieces] == expected
        assert meta['val_bytes'] == len(''.join(held_out).encode()) and meta['vocab_size'] == separator + 1


def test_parquet_val_file_and_text_files_as_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({'text': ['ab', 'c', '']}), tmp_path / 'a.parquet')
    train, val = [write(tmp_path / 'b.txt', 'de'), str(tmp_path / 'a.parquet')], write(tmp_path / 'v.txt', 'fg')
    prepare.prepare_files(str(tmp_path / 'out'), train, 'byte', 'x', val_path=val)
    assert ids(tmp_path / 'out') == [*b'de', 256, *b'ab', 256, *b'c', 256]
    assert ids(tmp_path / 'out', 'val') == [*b'fg']


@pytest.mark.parametrize('separator, text', [
    ('<|endoftext|>', 'one\n\nmore\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\nthree\n<|endoftext|>'),
    ('', 'one\nmore\n\n\n\ntwo\r\n\r\nthree\n')])
@pytest.mark.parametrize('block', [3, 1 << 20])
def test_document_separator_line(tmp_path, monkeypatch, separator, text, block):
    monkeypatch.setattr(documents, 'BLOCK', block)
    path = write(tmp_path / 'a.txt', text)
    pieces = list(documents.read_files([path], separator=separator))
    first = 'one\n\nmore' if separator else 'one\nmore'
    assert pieces == [(True, first), (True, 'two'), (True, 'three')]


def test_sample_is_bounded_and_evenly_spread():
    kept, share = prepare.sample((f'{i:04}' for i in range(1000)), limit=100)
    assert kept == [f'{i:04}' for i in range(0, 1000, 64)] and share == 16 / 1000


def test_wide_vocabulary_takes_uint32(tmp_path):
    encoder = build_tokenizer.char_encoder([chr(i) for i in range(0x4E00, 0x4E00 + 10)])
    with prepare.Writer(str(tmp_path), 70_000) as writer:
        writer.write('train', np.array([69_999, 1]), 0)
        writer.write('val', np.array([65_536]), 0)
        meta = writer.finish(encoder, 'x')
    assert meta['dtype'] == 'uint32' and ids(tmp_path, dtype=np.uint32) == [69_999, 1]
    assert Corpus(str(tmp_path)).tokens('val').tolist() == [65_536]


# ---- GPT-2 by ranks, the hub ----

@pytest.fixture
def small_gpt2(monkeypatch):
    """tiktoken's GPT-2 with a few ranks of our own: bytes in GPT-2's order, then merges."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]
    ranks = {bytes([byte]): i for i, byte in enumerate(order)}
    for token in (b' t', b'he', b'in', b' the', b'nd', b'ing', b'  ', b'and', b' to', b'\xc3\xaf', b' thein'):
        ranks[token] = len(ranks)
    encoding = tiktoken.Encoding('small', pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': len(ranks)})
    monkeypatch.setattr(tiktoken, 'get_encoding', {'gpt2': encoding}.__getitem__)
    return encoding


def test_tokenizer_json_recovered_from_ranks_encodes_as_tiktoken(tmp_path, small_gpt2):
    text = 'the thing and the inn, theing  the   naïve to do\n\n the end and 123 theirs thein ' + HARD
    meta = prepare.prepare_files(str(tmp_path / 'set'), [write(tmp_path / 'a.txt', text * 4)], 'gpt2', 'x')
    cut = int(len(text * 4) * 0.9)
    assert ids(tmp_path / 'set') == small_gpt2.encode_ordinary((text * 4)[:cut])
    tokenizer = Tokenizer.from_file(str(tmp_path / 'set' / 'tokenizer.json'))
    assert tokenizer.encode('<|endoftext|>').ids == [small_gpt2.eot_token] == [meta['vocab_size'] - 1]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == small_gpt2.encode_ordinary(text)
    assert tokenizer.decode(ids(tmp_path / 'set', 'val')) == (text * 4)[cut:]


def test_gpt2_without_ranks_is_one_line(tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(tiktoken, 'get_encoding', unreachable)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR') as e:
        make(tmp_path, tokenizer='gpt2')
    assert '\n' not in str(e.value) and not os.path.exists(tmp_path / 'set')


def test_hub_documents_stream_until_the_limit(tmp_path, monkeypatch, small_gpt2):
    import datasets
    taken = []

    def rows():
        for i in range(1000):
            taken.append(i)
            yield {'text': 'x' * 10}
    monkeypatch.setattr(prepare, 'BATCH', 100)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **options: rows())
    meta = hub.prepare_hub(str(tmp_path / 'a'), 'org/set', num_tokens=100, val_fraction=0.25)
    assert 100 <= meta['train_tokens'] + meta['val_tokens'] < 122 and len(taken) < 40
    assert 'the first 100 tokens' in meta['source'] and meta['tokenizer'] == 'gpt2'
    meta = hub.prepare_hub(str(tmp_path / 'b'), 'org/set', max_documents=8, val_fraction=0.25)
    assert (meta['train_bytes'], meta['val_bytes'], meta['val_tokens']) == (60, 20, 21)

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach the hub")
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with pytest.raises(UserError, match='org/set: the hub does not answer'):
        hub.prepare_hub(str(tmp_path / 'c'), 'org/set')


# ---- Shakespeare ----

def test_shakespeare_from_input_txt(tmp_path, monkeypatch):
    text = play(2000)
    write(tmp_path / 'input.txt', text)
    meta = shakespeare.prepare(str(tmp_path / 'a'), text_directory=str(tmp_path))
    assert 'own input.txt' in meta['source'] and not meta['stand_in'] and meta['train_tokens'] == 1800
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(text.encode()).hexdigest())
    meta = shakespeare.prepare(str(tmp_path / 'b'), text_directory=str(tmp_path))
    assert meta['source'].startswith('Tiny Shakespeare') and not meta['stand_in']


def test_shakespeare_download_is_checked(tmp_path, monkeypatch, capsys):
    served = write(tmp_path / 'served', play(2000))
    monkeypatch.setattr(shakespeare, 'URL', f'file://{served}')
    target = str(tmp_path / 'input.txt')
    assert not shakespeare.download(target) and not os.path.exists(target)
    assert 'another hash' in capsys.readouterr().err
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(play(2000).encode()).hexdigest())
    assert shakespeare.download(target) and open(target).read() == play(2000)
    monkeypatch.setattr(shakespeare, 'URL', 'file:///nonexistent/input.txt')
    assert not shakespeare.download(str(tmp_path / 'other.txt'))


def test_stand_in_is_said_loudly_and_gives_way_to_the_text(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'shakespeare_char'
    monkeypatch.setattr(shakespeare, 'URL', 'file:///nonexistent/input.txt')
    monkeypatch.setattr(shakespeare, 'HERE', str(folder))
    monkeypatch.setattr(corpus, 'DATA', str(tmp_path))
    corpus.prepare_missing('data/shakespeare_char', str(tmp_path))
    err = capsys.readouterr().err
    assert 'STAND-IN' in err and err.count('\n') >= 4
    meta = Corpus('shakespeare_char', str(tmp_path)).meta
    assert meta['stand_in'] and 'stand-in' in meta['source'] and os.listdir(folder).count('input.txt') == 0
    assert meta['train_tokens'] == 1_003_854 and meta['val_tokens'] == 111_540    # as many as of Shakespeare
    corpus.prepare_missing('shakespeare_char', str(tmp_path))    # nothing has changed: nothing is done
    assert capsys.readouterr() == ('', '')
    write(folder / 'input.txt', play(2000))
    corpus.prepare_missing('shakespeare_char', str(tmp_path))
    meta = Corpus('shakespeare_char', str(tmp_path)).meta
    assert not meta['stand_in'] and meta['train_tokens'] == 1800
    corpus.prepare_missing('my_corpus', str(tmp_path))           # not ours: left to the user
    assert os.listdir(tmp_path) == ['shakespeare_char']


def test_stand_in_text_is_fixed_and_its_grammar_agrees():
    text = play()
    sha = '077013ccc48ee9f8ca680e7e28312a003410a99c98f7e326b064b39d4c5869f9'    # results depend on it
    assert hashlib.sha256(text.encode()).hexdigest() == sha
    assert text[:4999] == play(5000)[:4999] and len(play(777)) == 777
    assert len(set(text.split())) > 5000 and text.count('\n\n') > 8000 and max(map(len, text.splitlines())) < 80
    for right, wrong in ((' thou art ', ' thou is '), (' they are ', ' they is '), (' we are ', ' we is '),
                         (' she is ', ' she are '), (' an apple', ' a apple'),
                         (' thou walkest', ' thou walks'), (' I walk ', ' I walks')):
        assert right in text and wrong not in text


# ---- the reader ----

def test_windows_are_the_tokens_and_the_ones_after(tmp_path):
    tokens = Corpus(make(tmp_path)).tokens('train')
    assert isinstance(tokens, np.memmap)
    offsets = np.array([0, 17, 17, len(tokens) - 65])
    x, y = windows(tokens, offsets, 64)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    for row, offset in enumerate(offsets):
        assert x[row].tolist() == [int(t) for t in tokens[offset:offset + 64]]
        assert y[row].tolist() == [int(t) for t in tokens[offset + 1:offset + 65]]
    with pytest.raises(IndexError):
        windows(tokens, np.array([len(tokens) - 64]), 64)


def damage(tmp_path, **changes):
    """A prepared data set whose meta.json says something else."""
    directory = make(tmp_path)
    meta = json.load(open(f'{directory}/meta.json')) | changes
    write(tmp_path / 'set' / 'meta.json', json.dumps({k: v for k, v in meta.items() if v is not None}))
    return directory


def test_corpus_names_what_is_wrong(tmp_path):
    directory = make(tmp_path)
    for wrong in ('nothing', '', 'nothing/../..'):
        with pytest.raises(UserError, match='prepared in .*: set; prepared on first use: shakespeare_char, '):
            Corpus(wrong, str(tmp_path))
    good = Corpus('data/set/', str(tmp_path))
    assert good.name == 'set' and good.directory == directory and Corpus(directory).meta == good.meta
    good.check(399)
    write(tmp_path / 'set' / 'tokenizer.json', open(f'{directory}/tokenizer.json').read().replace('"a"', '"ä"'))
    with pytest.raises(UserError, match='tokenizer.json is not the tokenizer'):
        Corpus(directory)
    with pytest.raises(UserError, match=r"'set': 400 val tokens are too few for --block_size=400"):
        good.check(400)
    os.truncate(f'{directory}/val.bin', 799)
    with pytest.raises(UserError, match=r'val.bin has 799 bytes, but meta.json says 400 tokens of uint16'):
        Corpus(directory)
    os.remove(f'{directory}/val.bin')
    with pytest.raises(UserError, match='val.bin is missing'):
        Corpus(directory)
    os.remove(f'{directory}/meta.json')
    with pytest.raises(UserError, match='no meta.json.*convert_nanogpt'):
        Corpus(directory)
    write(tmp_path / 'set' / 'meta.json', '{"vocab')
    with pytest.raises(UserError, match='meta.json is damaged'):
        Corpus(directory)


def test_corpus_checks_ids_and_meta(tmp_path, monkeypatch):
    highest = max(ids(make(tmp_path)))
    with pytest.raises(UserError, match=f'token id {highest} outside its vocabulary of {highest}'):
        Corpus(damage(tmp_path, vocab_size=highest))
    monkeypatch.setattr(corpus, 'WHOLE', 100)    # larger files are checked by sample
    with pytest.raises(UserError, match='outside its vocabulary of 3'):
        Corpus(damage(tmp_path, vocab_size=3))
    for name, value in (('dtype', 'float32'), ('source', None), ('vocab_size', '65')):
        with pytest.raises(UserError, match=f'lacks a valid {name}'):
            Corpus(damage(tmp_path, **{name: value}))
    directory = damage(tmp_path, val_tokens=0)
    os.truncate(f'{directory}/val.bin', 0)
    with pytest.raises(UserError, match='val.bin is empty'):
        Corpus(directory)


def test_data_sets_that_do_not_go_together(tmp_path):
    text = play(4000)
    a, b, c = (Corpus(make(tmp_path, t, name)) for t, name in ((text, 'a'), (text[:3000], 'b'), (text.lower(), 'c')))
    corpus.check_together([a, c], streams=True)
    with pytest.raises(UserError, match="train has 3,600 tokens in 'a' and 2,700 in 'b'"):
        corpus.check_together([a, b], streams=True)
    with pytest.raises(UserError, match="'a' .* and 'c' .* different tokenizers"):
        corpus.check_together([a, c])
    # the remedy it names
    prepare.prepare_files(str(tmp_path / 'd'), [str(tmp_path / 'b.txt')], a.directory, 'x')
    corpus.check_together([a, Corpus(str(tmp_path / 'd'))])
    assert Corpus(str(tmp_path / 'd')).meta['tokenizer'] == 'char'
    with pytest.raises(UserError, match='cannot spell'):
        prepare.prepare_files(str(tmp_path / 'e'), [write(tmp_path / 'e.txt', 'é' * 100)], a.directory, 'x')


# ---- nanoGPT's folders ----

@pytest.mark.parametrize('protocol', range(6))
def test_pickles_are_read_without_running_them(tmp_path, protocol):
    value = {'itos': dict(enumerate('\n é🙂')), 'list': [1, -2, 3.5, 2 ** 80, True, None, [], {}, 'x' * 300],
             'tuples': [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 'again': ['shared'] * 3}
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(value, protocol))
    assert convert_nanogpt.read_pickle(tmp_path / 'a.pkl') == value


class Harmful:
    def __reduce__(self):
        return os.mkdir, ('harmed',)


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'stoi': Harmful()}, protocol))
    with pytest.raises(UserError, match='refused, its opcode (STACK_)?GLOBAL'):
        convert_nanogpt.read_pickle('a.pkl')
    assert os.listdir(tmp_path) == ['a.pkl']
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'a': [1, 2]}, protocol)[:-3])
    with pytest.raises(UserError, match='not a whole pickle'):
        convert_nanogpt.read_pickle('a.pkl')


def nanogpt_folder(tmp_path, rows, meta=None):
    folder = tmp_path / 'theirs'
    folder.mkdir(exist_ok=True)
    for split, row in zip(('train', 'val'), rows):
        np.array(row, dtype=np.uint16).tofile(folder / f'{split}.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return str(folder)


def test_nanogpt_characters_become_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_nanogpt, 'BLOCK', 2)
    letters = 'cabé'    # in no order
    meta = {'vocab_size': 4, 'itos': dict(enumerate(letters)), 'stoi': {c: i for i, c in enumerate(letters)}}
    folder = nanogpt_folder(tmp_path, ([0, 1, 2, 3, 3], [1, 3]), meta)
    made = convert_nanogpt.convert(folder, str(tmp_path / 'ours'))
    assert (made['train_bytes'], made['val_bytes'], made['tokenizer'], made['vocab_size']) == (7, 3, 'char', 4)
    tokens = Corpus(str(tmp_path / 'ours')).tokens('train')
    assert Tokenizer.from_file(str(tmp_path / 'ours' / 'tokenizer.json')).decode(tokens.tolist()) == 'cabéé'
    for bad, message in ((([0, 4], [1]), 'the id 4'), (([], [1]), 'train.bin is missing, empty')):
        with pytest.raises(UserError, match=message):
            convert_nanogpt.convert(nanogpt_folder(tmp_path, bad), str(tmp_path / 'ours'))
    for bad in ({'itos': {0: 'a', 2: 'b'}}, {'itos': {0: 'th'}}, {'tokenizer': 'sentencepiece'}, [1]):
        with pytest.raises(UserError, match='meta.pkl'):
            convert_nanogpt.convert(nanogpt_folder(tmp_path, ([0], [0]), bad), str(tmp_path / 'ours'))
    assert len(Corpus(str(tmp_path / 'ours')).tokens('train')) == 5    # what was there is untouched


def test_nanogpt_without_meta_is_gpt2(tmp_path, small_gpt2):
    text = 'the naïve thing'
    row = small_gpt2.encode_ordinary(text)
    folder = nanogpt_folder(tmp_path, ([*row, small_gpt2.eot_token, *row], row))
    meta = convert_nanogpt.convert(folder, str(tmp_path / 'ours'))
    size = len(text.encode())
    assert (meta['tokenizer'], meta['val_bytes'], meta['train_bytes']) == ('gpt2', size, 2 * size)


# ---- bad input, half-written data, the command ----

@pytest.mark.parametrize('name, content, options, message', [
    ('a.txt', b'', {}, 'nothing for the train split'),
    ('a.txt', b'x', {}, 'nothing for the train split'),
    ('a.txt', b'caf\xe9 ' * 9, {}, 'a.txt: not UTF-8 .*0xe9'),
    ('a.txt', b'a\0b', {}, 'not a text file'),
    ('a.jsonl', b'{"text": "a"}\n{"text"\n', {}, 'a.jsonl, line 2: not JSON'),
    ('a.jsonl', b'{"text": "a"}\n{"body": "b"}\n', {}, "a.jsonl, line 2: 'text' must be text, not NoneType.*--field"),
    ('a.jsonl', b'"a"\n', {}, "line 1: 'text' must be text"),
    ('a.jsonl', b'[{"text": "a"}, {"text": "b"}]\n', {}, 'line 1: a list, where a JSON Lines file has one object on each line'),
    ('a.jsonl', b'{"text": "\\ud800"}\n', {}, 'line 1: .*half a character'),
    ('a.parquet', b'PAR1', {}, 'not a parquet file'),
    ('a.txt', b'some text here', {'tokenizer': 'zzz'}, '--tokenizer=zzz is not char, byte, gpt2, bpe'),
    ('a.txt', b'some text here', {'vocab_size': 300}, '--vocab_size=300 is for --tokenizer=bpe'),
    ('a.txt', b'some text here', {'tokenizer': 'bpe', 'vocab_size': 256}, '257'),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        options = {'tokenizer': 'char', 'source': 'x', **options}
        prepare.prepare_files(str(tmp_path / 'out'), [str(tmp_path / name)], **options)
    assert '\n' not in str(e.value)
    assert os.listdir(tmp_path) == [name]


def test_a_full_disk_keeps_the_old_data_set(tmp_path):
    directory = make(tmp_path)
    before = {name: open(f'{directory}/{name}', 'rb').read() for name in os.listdir(directory)}
    with pytest.raises(UserError, match='set could not be prepared: .*No space left'):
        with prepare.Writer(directory, 300) as writer:
            writer.files['train'].close()
            writer.files['train'] = open('/dev/full', 'wb')
            writer.write('train', np.arange(200), 200)
            writer.write('val', np.arange(200), 200)
            writer.finish(build_tokenizer.byte_encoder(), 'x')
    with pytest.raises(KeyboardInterrupt):
        with prepare.Writer(directory, 300) as writer:
            writer.write('train', np.arange(200), 200)
            raise KeyboardInterrupt
    assert {name: open(f'{directory}/{name}', 'rb').read() for name in os.listdir(directory)} == before
    with pytest.raises(UserError, match='token ids from 0 to 5 for a vocabulary of 5'):
        with prepare.Writer(directory, 5) as writer:
            writer.write('train', np.arange(6), 6)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'DATA', str(tmp_path))
    path = write(tmp_path / 'a.txt', play(3000))
    prepare.main(prepare.parse(['mine', path, '--tokenizer=bpe', '--vocab-size=300', '--val-fraction', '0.2']))
    meta = Corpus('mine', str(tmp_path)).meta
    assert meta['vocab_size'] == 300 and meta['val_bytes'] == 600 and meta['source'] == 'a.txt'
    write(tmp_path / 'code.py', '')
    os.mkdir(tmp_path / 'ours')
    os.rename(tmp_path / 'code.py', tmp_path / 'ours' / 'prepare.py')
    for name, message in (('mine', '--overwrite'), ('../mine', 'not a name'), ('.', 'not a name'),
                          ('ours', 'belongs to nanoforge')):
        with pytest.raises(UserError, match=message):
            prepare.main(prepare.parse([name, path]))
    with pytest.raises(UserError, match='no such file'):
        prepare.main(prepare.parse(['other', str(tmp_path / 'none.txt')]))
    with pytest.raises(UserError, match='between 0 and 1'):
        prepare.main(prepare.parse(['other', path, '--val_fraction=1']))
    prepare.main(prepare.parse(['mine', path, '--tokenizer=byte', '--overwrite']))
    assert Corpus('mine', str(tmp_path)).meta['tokenizer'] == 'byte'


@pytest.mark.parametrize('argv', [['data/prepare.py', 'x', 'none.txt'], ['data/prepare.py', 'x', '--nonsense', 'y'],
                                  ['data/convert_nanogpt.py', '.', 'tests/x']])
def test_mistakes_on_the_command_line_are_one_line(argv):
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    from data.documents import read_files
    path = tmp_path / 'book.txt'
    path.write_bytes(b'\xef\xbb\xbfonce upon\r\na time')
    assert ''.join(text for _, text in read_files([str(path)])) == 'once upon\r\na time'
