"""data/batches.py: packing changes no hidden state; an epoch takes each row as often as it should."""
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from configurator import UserError
from data.batches import Epochs, Prefetcher, best_fit, draw, lay_into_rows, micro_batches, pack, pack_documents
from model import FAMILIES, GPT, GPTConfig

CPU = torch.device('cpu')


def tiny(arch):
    torch.manual_seed(0)
    sizes = dict(arch=arch, vocab_size=61, block_size=320, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**FAMILIES[arch] | sizes)).init_weights(0.3).double().eval()


def random_groups(seed, longest=9):
    rng = random.Random(seed)

    def ids(most):
        return [rng.randrange(3, 61) for _ in range(rng.randint(1, most))]

    def completions():
        return [ids(longest) for _ in range(rng.randint(1, 4))]

    return [(ids(longest), completions()) for _ in range(rng.randint(1, 6))]


def equal(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and bool((got == want).all())


# ---- packing ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize('share', [True, False])
@pytest.mark.parametrize('one_row', [True, False])
@pytest.mark.parametrize('keep_last', [True, False])
@torch.no_grad()
def test_hidden_states_are_those_of_each_completion_alone(arch, share, one_row, keep_last):
    model, groups = tiny(arch), random_groups(1)
    alone = [(prompt, completion) for prompt, completions in groups for completion in completions]
    batch = pack(groups, CPU, keep_last, share, one_row)
    hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)    # (B, T, C)
    assert len(alone) == len(hidden) and (batch.positions is None) == (not share and not one_row)
    assert (batch.last is not None) == keep_last
    for b, (prompt, completion) in enumerate(alone):
        n = len(completion)
        want = model.hidden(torch.tensor([prompt + completion]))[0]
        assert (hidden[b, :n] - want[len(prompt) - 1:-1]).abs().max() < 1e-10
        assert batch.targets[b, :n].tolist() == completion and (batch.targets[b, n:] == -1).all()
        if keep_last:
            last = model.hidden(batch.idx, batch.positions, logit_positions=batch.last)             # (B, C)
            assert (last[b] - want[-1]).abs().max() < 1e-10


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize('one_row, packed', [(True, False), (True, True), (False, True), (False, False)])
@torch.no_grad()
def test_hidden_states_are_those_of_each_document_alone(arch, one_row, packed):
    model, rng = tiny(arch), np.random.default_rng(0)
    documents = [(rng.integers(3, 61, n).astype(np.int32), rng.integers(0, 2, n)) for n in (5, 9, 2, 7, 3)]
    rows = [documents[:2], documents[2:3], documents[3:]] if packed else [[pair] for pair in documents]
    batch = pack_documents(rows, CPU, one_row, packed)
    hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)        # (N, C)
    want, targets = [], []
    for ids, is_target in documents:
        states = model.hidden(torch.tensor(ids[None].astype(int)))[0]
        for i in range(1, len(ids)):
            if is_target[i]:
                want.append(states[i - 1])
                targets.append(ids[i])
    assert (hidden - torch.stack(want)).abs().max() < 1e-10 and batch.targets.tolist() == targets
    assert (batch.positions is None) == (not one_row and not packed)


GROUPS = [([5, 6, 7], [[8, 9], [10, 11, 12]]), ([20, 21], [[22], [23, 24]])]


def test_a_prompt_is_laid_once_before_its_completions():
    batch = pack(GROUPS, CPU, share=True)
    assert batch.idx.tolist() == [[5, 6, 7, 8, 10, 11, 20, 21, 23]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert batch.logit_positions.tolist() == [[2, 3, 0], [2, 4, 5], [7, 0, 0], [7, 8, 0]]
    assert batch.targets.tolist() == [[8, 9, -1], [10, 11, 12], [22, -1, -1], [23, 24, -1]]
    assert batch.last is None


def test_the_last_tokens_are_fed_where_they_are_read():
    batch = pack(GROUPS, CPU, keep_last=True, share=True)
    assert batch.idx.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22, 23, 24]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3]]
    assert batch.logit_positions.tolist() == [[2, 3, 0], [2, 5, 6], [9, 0, 0], [9, 11, 0]]
    assert batch.last.tolist() == [4, 7, 10, 12]


def test_short_rows_of_a_cpu_are_padded():
    batch = pack(GROUPS, CPU, share=False)
    assert batch.positions is None
    assert batch.idx.tolist() == [[5, 6, 7, 8, 0], [5, 6, 7, 10, 11], [20, 21, 0, 0, 0], [20, 21, 23, 0, 0]]
    assert batch.logit_positions.tolist() == [[2, 3, 0], [7, 8, 9], [11, 0, 0], [16, 17, 0]]
    assert batch.targets.tolist() == [[8, 9, -1], [10, 11, 12], [22, -1, -1], [23, 24, -1]]


def test_rows_of_a_gpu_are_filled_by_best_fit():
    groups = [([1, 2], [[3, 4]]), ([5, 6, 7, 8], [[9], [10, 11]]), ([12], [[13, 14]])]
    batch = pack(groups, CPU, share=True, one_row=False)
    assert batch.idx.tolist() == [[5, 6, 7, 8, 10], [1, 2, 3, 12, 13]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch.logit_positions.tolist() == [[6, 7], [3, 0], [3, 4], [8, 9]]
    assert batch.targets.tolist() == [[3, 4], [9, -1], [10, 11], [13, 14]]
    assert pack(GROUPS, torch.device('meta'), share=False).positions is None        # stands in for a GPU
    assert pack(GROUPS, torch.device('meta'), share=True).idx.shape == (2, 6)
    assert pack(GROUPS, torch.device('meta'), share=True).idx.device.type == 'meta'


def test_prompts_are_shared_where_that_saves_work():
    def positions(prompt, *completions):
        return pack([([1] * prompt, [[2] * n for n in completions])], CPU).positions

    assert positions(20, 8, 8) is not None                              # 36 tokens in place of 56
    assert positions(1, 10, 10) is None                                 # 21 in place of 22
    assert positions(2, 9, 9) is None                               # 20 in place of 22: 9 % are not enough
    assert positions(2, 8, 8) is not None                               # 18 in place of 20
    assert (positions(1000, 524, 524) == 999).sum() == 1                # 2048 tokens: shared
    assert (positions(1000, 525, 525) == 999).sum() == 2                # longer: each with its own prompt
    assert positions(100, 92) is None and positions(100, 93) is not None        # a long row is not padded


def test_documents_end_to_end_by_hand():
    rows = [[([1, 2, 3], [0, 0, 1]), ([4, 5], [1, 1])], [([6, 7, 8, 9], [0, 1, 0, 1])]]
    batch = pack_documents(rows, CPU)
    assert batch.idx.tolist() == [[1, 2, 4, 6, 7, 8]] and batch.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert batch.logit_positions.tolist() == [1, 2, 3, 5] and batch.targets.tolist() == [3, 5, 7, 9]
    batch = pack_documents(rows, CPU, one_row=False, packed=True)
    assert batch.idx.tolist() == [[1, 2, 4], [6, 7, 8]] and batch.positions.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.logit_positions.tolist() == [1, 2, 3, 5] and batch.targets.tolist() == [3, 5, 7, 9]
    batch = pack_documents([rows[0][1:], rows[1]], CPU, one_row=False)
    assert batch.idx.tolist() == [[4, 0, 0], [6, 7, 8]] and batch.positions is None
    assert batch.logit_positions.tolist() == [0, 3, 5] and batch.targets.tolist() == [5, 7, 9]


def test_padding_is_a_document_of_its_own():
    documents = [([1, 2], [0, 1]), ([3, 4, 5], [0, 1, 2]), ([6], [0])]
    _, positions, begins = lay_into_rows(documents, [[1, 2], [0]])
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]] and begins == [4, 0, 3]


def tensors(rows, batch, packed):
    """Items of row numbers -> x, y (B, T), y -1 where nothing is learned,
    and positions (B, T) where they are packed, else None: what train_sft.py had before pack_documents()."""
    ids = [[rows[i] for i in item] for item in batch]
    T = max(sum(len(tokens) - 1 for tokens, _ in item) for item in ids)
    x, y = np.zeros((len(batch), T), np.int64), np.full((len(batch), T), -1, np.int64)
    positions = np.zeros((len(batch), T), np.int64)
    for b, item in enumerate(ids):
        at = 0
        for tokens, targets in item:
            n = len(tokens) - 1
            x[b, at:at + n], positions[b, at:at + n] = tokens[:-1], np.arange(n)
            y[b, at:at + n] = np.where(targets[1:], tokens[1:], -1)
            at += n
        positions[b, at:] = np.arange(T - at)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(positions) if packed else None


@pytest.mark.parametrize('packed', [True, False])
def test_pack_documents_equals_tensors(packed):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 99, n).astype(np.int32), rng.integers(0, 2, n)) for n in rng.integers(2, 30, 40)]
    for device in (CPU, torch.device('cuda')):
        items = [[0, 5], [7], [1, 2, 3], [39]] if packed else [[0], [5], [7], [39]]
        batch = [[i for item in items for i in item]] if device == CPU else items
        x, y, positions = tensors(rows, batch, packed or device == CPU)
        got = pack_documents([[rows[i] for i in item] for item in items], CPU, device == CPU, packed)
        assert equal(got.idx, x) and equal(got.targets, y[y >= 0])
        assert equal(got.logit_positions, (y >= 0).flatten().nonzero().squeeze(1))
        assert positions is None and got.positions is None or equal(got.positions, positions)


# ---- epochs -----------------------------------------------------------------------------------------------

LENGTHS = [(7 * i) % 11 + 1 for i in range(13)]             # of the rows that are fed
DATASETS = [[0, 1, 2, 4, 5, 6, 7], [8, 9, 10, 11, 12]]      # row 3 is held out


def length(item):
    return sum(LENGTHS[i] for i in item) if isinstance(item, list) else LENGTHS[item]


def bins(datasets, weights, seed, capacity=14):
    rows = draw(datasets, weights, seed, epoch=0)
    return [rows[places].tolist() for places in best_fit([LENGTHS[i] for i in rows], capacity)]


def schedule(weights=(1, 1), size=4, seed=7, packing=False, **more):
    items = bins(DATASETS, weights, seed) if packing else None
    return Epochs(DATASETS, weights, size, seed, length=length, items=items, **more)


FROZEN = {
    'whole weights': (dict(), [[0, 10, 4, 1], [11, 2, 7, 9], [8, 5, 12, 6], [0, 10, 4, 12]]),
    'fractions': (dict(weights=(2, 0.5)),
                  [[2, 7, 7, 1], [0, 8, 2, 4], [5, 4, 1, 6], [0, 5, 12, 6], [5, 4, 1, 6]]),
    'group_by_length': (dict(group_by_length=True),
                        [[1, 12, 9, 6], [2, 10, 7, 4], [0, 11, 8, 5], [2, 10, 7, 4]]),
    'packing': (dict(packing=True),
                [[[9, 10], [1, 5, 8, 0], [12, 7], [6, 2]],
                 [[4, 11]],
                 [[9, 10], [12, 7], [6, 2], [1, 5, 8, 0]]])}


@pytest.mark.parametrize('case', FROZEN)
def test_the_order_stays_what_it_was(case):
    """Runs of earlier versions are resumed: their steps must not change."""
    settings, steps = FROZEN[case]
    epochs = schedule(**settings)
    assert [epochs.of_step(step) for step in range(len(steps))] == steps
    assert epochs.per_epoch == len(steps) - 1


def test_every_row_is_taken_as_often_as_its_weight_says():
    datasets, weights = [list(range(10)), list(range(10, 17)), list(range(17, 20))], (2, 0.5, 1.4)
    epochs, size = Epochs(datasets, weights, 3, seed=0), 3
    assert epochs.count == 20 + 4 + 4 and epochs.per_epoch == 10 and epochs.epoch(25) == 2.5
    halves = []
    for epoch in range(3):
        taken = [row for step in range(10) for row in epochs.of_step(epoch * 10 + step)]
        counts = Counter(taken)
        assert len(taken) == epochs.count and all(counts[row] == 2 for row in datasets[0])
        assert sum(counts[row] for row in datasets[1]) == 4 and max(counts[row] for row in datasets[1]) == 1
        assert sorted(counts[row] for row in datasets[2]) == [1, 1, 2]
        halves.append({row for row in datasets[1] if counts[row]})
    assert len(epochs.of_step(9)) == 28 % size and len({frozenset(half) for half in halves}) > 1


def test_drop_last_and_an_epoch_without_a_step():
    assert schedule(drop_last=True).per_epoch == 3 and schedule(drop_last=True, size=5).per_epoch == 2
    assert schedule(size=5).per_epoch == 3 and len(schedule(size=5).of_step(2)) == 2
    assert schedule(size=50).per_epoch == 1
    with pytest.raises(UserError, match='12 rows are fewer than the 50 of one optimizer step: lower per_dev'):
        schedule(drop_last=True, size=50)


def test_the_step_does_not_depend_on_micro_batches_and_ranks():
    epochs = schedule(size=8)
    for step in range(4):
        rows = epochs.of_step(step)
        for size, world_size in ((1, 1), (8, 1), (4, 2), (2, 2), (3, 3)):
            ranks = [micro_batches(rows, size, rank, world_size) for rank in range(world_size)]
            assert sorted(row for batches in ranks for batch in batches for row in batch) == sorted(rows)
            if len(rows) == 8 and 8 % (size * world_size) == 0:
                assert {len(batch) for batches in ranks for batch in batches} == {size}
                assert len({len(batches) for batches in ranks}) == 1
    assert micro_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]] and micro_batches([1, 2], 2, 1, 2) == []


def test_an_epoch_is_a_function_of_seed_and_step():
    there, back = schedule(), schedule()
    steps = [there.of_step(step) for step in range(9)]
    assert [back.of_step(step) for step in reversed(range(9))] == steps[::-1]
    assert [schedule(seed=8).of_step(step) for step in range(9)] != steps


# ---- prefetcher -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 1, 3])
def test_prefetched_steps_come_in_order(workers):
    made, threads = [], set()

    def make(step):
        made.append(step)
        threads.add(threading.get_ident())
        return step * step

    prefetcher = Prefetcher(make, total=10, workers=workers)
    for step in range(4, 10):                               # as a run that resumes asks
        assert prefetcher(step) == step * step
        assert max(made) <= step + workers
    assert made == list(range(4, 10)) and len(threads) == 1
    assert (threads == {threading.get_ident()}) == (workers == 0)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_is_raised_at_its_step(workers):
    def make(step):
        if step == 2:
            raise UserError('row 2 is broken')
        return step

    prefetcher = Prefetcher(make, total=5, workers=workers)
    assert [prefetcher(0), prefetcher(1)] == [0, 1]
    with pytest.raises(UserError, match='row 2 is broken'):
        prefetcher(2)
    assert prefetcher(3) == 3
