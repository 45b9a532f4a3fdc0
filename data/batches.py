"""From token ids to what a step computes on: documents packed into rows, and which of them a step takes.

    pack(groups, device)                    prompts with their completions -> PackedBatch   (DPO, RL, agents)
    pack_documents(rows, device)            documents with a mask of targets -> PackedBatch (SFT)
    Epochs(datasets, weights, size, seed)   the rows of every optimizer step, the same on every rank
    micro_batches(items, size, rank, ...)   a rank's share of a step
    Prefetcher(make, total, workers)        batches made by a thread while the model computes
"""
import concurrent.futures
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError
from nanoforge.run import seed_for

LONGEST_SHARED = 2048   # tokens of a prompt with its completions up to which attention over all is cheap,
LEAST_SHARED = 0.1      # if sharing the prompt saves at least this part of all tokens
SHORT_ROW = 192         # tokens up to which a CPU attends fastest in padded rows (model.SHORT_BLOCK)
SORTED_STEPS = 32       # steps whose rows group_by_length sorts together: many, so that each is a random draw


# ---- documents -> rows -----------------------------------------------------------------------------------

class PackedBatch(NamedTuple):
    """Documents as rows for model.hidden(idx, positions, logit_positions=...).

    A position of 0 begins a document; a jump back to p > 0 begins another continuation of its first p tokens.
    logit_positions and last count the rows laid end to end: place w of row r is r * W + w.
    """
    idx: torch.Tensor               # (R, W) token ids
    positions: torch.Tensor | None  # (R, W); None: plain causal rows, padded on the right
    logit_positions: torch.Tensor   # (B, T) or (N,): where the hidden state lies that predicts each target
    targets: torch.Tensor           # the same shape; -1 where nothing is predicted
    last: torch.Tensor | None       # (B,): where that of each completion's last token lies, with keep_last

    def to(self, device, pin=False):
        """On `device`. pin: copied to a GPU from page-locked memory, while it computes."""
        def moved(tensor):
            if tensor is None:
                return None
            if pin and device.type == 'cuda':
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return PackedBatch(*map(moved, self))

    def hidden_states(self, model):
        """(B, T, C) or (N, C): those that the targets are predicted from; with keep_last (B, T + 1, C), at
        the end that of the last token, which a critic or a reward model reads."""
        wanted = self.logit_positions
        if self.last is not None:
            wanted = torch.cat((wanted, self.last[:, None]), 1)
        return model.hidden(self.idx, self.positions, logit_positions=wanted)


def pack(groups, device, keep_last=False, share=None, one_row=None, pin=False, masks=None):
    """B completions of at most T tokens, each behind its prompt -> PackedBatch with targets (B, T).

    groups     [(prompt ids, [completion ids, ...]), ...], no ids empty; the completions keep their order
    keep_last  also feed each completion's last token, whose hidden state a critic or a reward model reads
    share      compute a prompt once for all its completions; None: where that saves work
    one_row    lay all documents end to end, without padding; None: on a CPU, which attends document by
               document, where prompts are shared or documents are long. Otherwise rows are as long as the
               longest document: filled by best fit where prompts are shared and a mask is needed anyway, else
               with one document each, for which plain causal attention serves, without a mask of (W, W)
    masks      of each completion, in their order: whether each token is learned; None: all are
    """
    if share is None:
        share = sharing_pays(groups)
    if not share:
        groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
    if one_row is None:
        longest = max(len(prompt) + len(completions[0]) for prompt, completions in groups)
        one_row = device.type == 'cpu' and (share or longest > SHORT_ROW)

    documents = [document(prompt, completions, keep_last) for prompt, completions in groups]
    lengths = [len(ids) for ids, _ in documents]
    if one_row:
        rows = [range(len(documents))]
    elif share:
        rows = best_fit(lengths, max(lengths))
    else:
        rows = [[i] for i in range(len(documents))]
    idx, positions, begins = lay_into_rows(documents, rows)

    logit_positions, targets, last = [], [], []
    masks = iter(masks or ())
    for (prompt, completions), begin in zip(groups, begins):
        at = begin + len(prompt)
        for completion in completions:
            end = at + len(completion) - 1              # the place of its last token, if that is fed
            logit_positions.append([begin + len(prompt) - 1, *range(at, end)])
            learned = next(masks, itertools.repeat(True))
            targets.append([token if is_learned else -1 for token, is_learned in zip(completion, learned)])
            last.append(end)
            at = end + 1 if keep_last else end
    batch = PackedBatch(
        idx=torch.from_numpy(idx),
        positions=torch.from_numpy(positions) if one_row or share else None,
        logit_positions=padded(logit_positions, 0),
        targets=padded(targets, -1),
        last=torch.tensor(last) if keep_last else None)
    return batch.to(device, pin)


def sharing_pays(groups):
    """Whether to compute prompts once for all their completions: it saves tokens, and no document gets so
    long that attention over all its completions costs more than the prompts."""
    shared = [len(prompt) + sum(map(len, completions)) for prompt, completions in groups]
    saved = sum(len(prompt) * (len(completions) - 1) for prompt, completions in groups)
    tokens = sum(shared) + saved                # where each completion has its own prompt
    pays = sum(shared) <= (1 - LEAST_SHARED) * tokens
    return pays and max(shared) <= LONGEST_SHARED


def document(prompt, completions, keep_last):
    """(ids, positions): a prompt, and behind it its completions, each of which continues the prompt. The last
    token of a completion predicts nothing, so it is fed only where keep_last asks for it."""
    ids, positions = list(prompt), list(range(len(prompt)))
    for completion in completions:
        fed = completion if keep_last else completion[:-1]
        ids += fed
        positions += range(len(prompt), len(prompt) + len(fed))
    return ids, positions


def pack_documents(rows, device, one_row=None, packed=False, pin=False):
    """Rows of documents -> PackedBatch, logit_positions and targets (N,): only what is learned, in order.

    rows     [[(ids (n,), is a target (n,)), ...], ...]: each row a list of documents, whose last token is not
             fed and whose first is no target, since nothing predicts it
    one_row  lay all documents end to end, without padding; None: on a CPU, which attends document by document
    packed   rows hold several documents, which must not see each other; else positions is None on a GPU
    """
    if one_row is None:
        one_row = device.type == 'cpu'
    documents = [pair for row in rows for pair in row]
    numbers = np.arange(len(documents))
    if one_row:
        numbers_of_row = [numbers]
    else:
        ends = np.cumsum([len(row) for row in rows])
        numbers_of_row = np.split(numbers, ends[:-1])
    fed = [ids[:-1] for ids, _ in documents]
    causal = [(ids, range(len(ids))) for ids in fed]
    idx, positions, begins = lay_into_rows(causal, numbers_of_row)

    logit_positions, targets = [], []
    for (ids, is_target), begin in zip(documents, begins):
        learned = np.flatnonzero(is_target[1:])
        logit_positions.append(begin + learned)
        targets.append(np.asarray(ids, np.int64)[1:][learned])
    batch = PackedBatch(
        idx=torch.from_numpy(idx),
        positions=torch.from_numpy(positions) if one_row or packed else None,
        logit_positions=torch.from_numpy(np.concatenate(logit_positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        last=None)
    return batch.to(device, pin)


def lay_into_rows(documents, rows):
    """[(ids, positions), ...] and the numbers of the documents of each row -> idx, positions (R, W), begins.

    begins: where each document begins, counting the rows laid end to end. W is the length of the longest row;
    the padding of the others is a document of its own.
    """
    lengths = [len(ids) for ids, _ in documents]
    W = max(sum(lengths[i] for i in row) for row in rows)
    idx = np.zeros((len(rows), W), np.int64)
    positions = np.zeros_like(idx)
    begins = [0] * len(documents)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            begins[i] = r * W + at
            end = at + lengths[i]
            idx[r, at:end], positions[r, at:end] = documents[i]
            at = end
        positions[r, at:] = np.arange(W - at)
    return idx, positions, begins


def best_fit(lengths, capacity):
    """Best-fit decreasing bin packing -> bins: lists of indices whose lengths sum to at most `capacity`.

    The longest come first, each into the fullest bin that still has room for it (Johnson et al. 1974: at most
    11/9 of the fewest bins, plus a constant). ValueError where one is longer than the capacity.
    """
    bins = []
    open_bins = {}          # {free space: numbers of the bins that have it}
    spaces = 0              # bit s is set where open_bins has a bin of free space s
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if length > capacity:
            raise ValueError(f'item {i} of length {length} does not fit in {capacity}')
        fitting = spaces >> length
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            space = length + lowest_bit
            number = open_bins[space].pop()
            if not open_bins[space]:
                spaces &= ~(1 << space)
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        left = space - length
        open_bins.setdefault(left, []).append(number)
        spaces |= 1 << left
    return bins


def padded(lists, value):
    """Lists of different lengths -> (len(lists), longest), filled up on the right."""
    longest = max(map(len, lists))
    rows = [row + [value] * (longest - len(row)) for row in lists]
    return torch.tensor(rows)


# ---- rows -> steps ---------------------------------------------------------------------------------------

def draw(datasets, weights, seed, epoch):
    """The row numbers of an epoch, (n,), each as often as the weight of its data set says: 2 = twice, 0.5 =
    every other one, drawn anew for each epoch."""
    drawn = []
    for number, (rows, weight) in enumerate(zip(datasets, weights)):
        rows = np.asarray(rows, np.int64)
        count = round(weight * len(rows))
        whole, rest = divmod(count, max(len(rows), 1))
        rng = np.random.default_rng(seed_for(seed, 'weight', epoch, number))
        drawn += [rows] * whole
        drawn.append(rng.permutation(rows)[:rest])
    return np.concatenate(drawn)


class Epochs:
    """Which items an optimizer step takes, over all micro-batches and ranks: a function of seed and step, so
    that 1 x 8, 8 x 1 and 2 ranks x 4 take the same ones and a run that resumes has nothing to restore.

    datasets         row numbers of each data set
    weights          how often an epoch takes each of its rows (see `draw`)
    size             items in a step
    drop_last        leave out what does not fill a step at the end of an epoch; else its last step is short
    length           length(item): a step's items are sorted by it, so that its micro-batches pad little
    group_by_length  and steps are of similar lengths
    items            lists of row numbers that are learned together, in place of single rows, the same in
                     every epoch: packed rows, made by best_fit of what draw(..., epoch=0) gives

    count: items in an epoch; per_epoch: its steps. UserError where an epoch has not one step.
    """

    def __init__(self, datasets, weights, size, seed, drop_last=False, length=None, group_by_length=False,
                 items=None):
        self.datasets, self.weights = datasets, weights
        self.size, self.seed = size, seed
        self.length, self.items = length, items
        self.group_by_length = group_by_length and items is None        # bins are all about as long
        if items is None:
            self.count = sum(round(weight * len(rows)) for rows, weight in zip(datasets, weights))
        else:
            self.count = len(items)
        per_epoch = self.count / size
        self.per_epoch = math.floor(per_epoch) if drop_last else math.ceil(per_epoch)
        if not self.per_epoch:
            raise UserError(f'{self.count} rows are fewer than the {size} of one optimizer step: lower '
                            'per_device_train_batch_size or gradient_accumulation_steps, or set '
                            'dataloader_drop_last=false')
        self.latest = None, None            # (epoch, its order)

    def order(self, epoch):
        """The items of an epoch in the order in which they are learned."""
        if self.items is None:
            items = draw(self.datasets, self.weights, self.seed, epoch).tolist()
        else:
            items = self.items
        rng = np.random.default_rng(seed_for(self.seed, 'order', epoch))
        items = [items[i] for i in rng.permutation(len(items))]
        if self.group_by_length:
            items = self.grouped(items, rng)
        return items

    def grouped(self, items, rng):
        """Steps of similar lengths: items are sorted within windows of many steps, and the steps shuffled."""
        full, short = [], []
        for window in cut(items, SORTED_STEPS * self.size):
            for step in cut(sorted(window, key=self.length), self.size):
                whole = len(step) == self.size
                (full if whole else short).append(step)
        steps = [full[i] for i in rng.permutation(len(full))]
        steps += short                      # at most one, which ends the epoch
        return [item for step in steps for item in step]

    def of_step(self, step):
        """The items of a step, of all ranks."""
        epoch, place = divmod(step, self.per_epoch)
        latest = self.latest
        if latest[0] != epoch:
            latest = self.latest = epoch, self.order(epoch)     # set as one: a thread may prefetch meanwhile
        begin = place * self.size
        items = latest[1][begin:begin + self.size]
        if self.length:
            items = sorted(items, key=self.length)
        return items

    def epoch(self, step):
        """How many passes over the data `step` steps are."""
        return step / self.per_epoch


def cut(items, size):
    """A list -> lists of `size`, the last one shorter where it does not divide."""
    return [items[at:at + size] for at in range(0, len(items), size)]


def micro_batches(items, size, rank=0, world_size=1):
    """This rank's micro-batches of a step: `items`, those of all ranks, cut into batches that are dealt out.

    Whole batches, not single items: where items are sorted, those of about the same length stay together, and
    batches of about the same work go to different ranks. Of a full step every rank gets the same number; of
    the short one that ends an epoch some may get one less, which costs a little time and no accuracy, since
    the loss is divided by what the whole step counts.
    """
    return cut(items, size)[rank::world_size]


class Prefetcher:
    """prefetcher(step) -> make(step), made up to `workers` steps ahead by one thread; 0: when asked for.

    total: the steps of the run; none is made beyond. What make raises is raised where its step is asked for.
    """

    def __init__(self, make, total, workers=0):
        self.make, self.total, self.workers = make, total, workers
        self.pool = concurrent.futures.ThreadPoolExecutor(1) if workers else None
        self.ahead = {}             # step -> Future

    def __call__(self, step):
        if not self.pool:
            return self.make(step)
        end = min(step + 1 + self.workers, self.total)
        for later in range(step, end):
            if later not in self.ahead:
                self.ahead[later] = self.pool.submit(self.make, later)
        return self.ahead.pop(step).result()
