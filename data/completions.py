"""What is sampled in reinforcement learning: one token-level record for each completion, and its way into a batch.

Tokens that were sampled are never made from text again: what is written, trained on and replayed are the ids.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from nanoforge.checkpoint import write_text

LONGEST_SHARED = 2048           # tokens of a prompt with its completions up to which attention over all of them costs little,
LEAST_SHARED = 0.1              # if sharing the prompt saves at least so many of all tokens
SHORT_ROW = 192                 # tokens up to which a CPU attends fastest in padded rows (model.SHORT_BLOCK)


@dataclass
class Episode:
    """One completion as it was sampled. logp: of the distribution that each token was drawn from."""
    step: int               # optimizer steps done when it was sampled
    group: int              # its prompt's number in the rollout
    sample: int             # its number in the group
    problem: dict           # the row that it answers
    prompt_ids: list
    completion_ids: list    # the stop token included
    logp: list
    stopped: bool           # False: cut off
    text: str
    rewards: dict = field(default_factory=dict)     # by name; None: that reward gave no score
    reward: float | None = None                     # their weighted sum
    advantage: float = 0.0                          # with a critic the mean over its tokens
    agent: str | None = None
    turn: int = 0

    def line(self):
        """As JSON, log-probabilities to five digits."""
        return json.dumps({**asdict(self), 'logp': [round(x, 5) for x in self.logp]}, ensure_ascii=False)


def read_episodes(path, step=None):
    """The Episodes of a rollouts.jsonl, or those of one step; a line that a kill cut short is left out."""
    found = []
    with open(path, encoding='utf-8') as file:
        for line in file:
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if step is None or fields['step'] == step:
                found.append(Episode(**fields))
    return found


def write_rollout(episodes, path, run):
    """Appends this rollout's Episodes, of all ranks, to rollouts.jsonl, each rank in its turn."""
    for rank in range(run.world_size):
        if rank == run.rank:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(''.join(e.line() + '\n' for e in episodes))
        run.barrier()


def cut_rollouts(path, step):
    """Drops the rollouts from `step` on, which come again, and a line that a kill cut short."""
    if os.path.exists(path):
        write_text(path, ''.join(e.line() + '\n' for e in read_episodes(path) if e.step < step))


class Layout(NamedTuple):
    """B completions of at most T tokens as rows for model.hidden(idx, positions); places count the rows laid end to end."""
    idx: torch.Tensor           # (R, W)
    positions: torch.Tensor     # (R, W); None: plain causal rows
    source: torch.Tensor        # (B, T): where the hidden state lies that predicts each token
    targets: torch.Tensor       # (B, T): the tokens, -1 behind a completion's end
    last: torch.Tensor          # (B,): where that of the last token lies


def lay_out(groups, device, keep_last=False, share=None):
    """[(prompt ids, [completion ids, ...]), ...] -> Layout, the completions in their order.

    A prompt is computed once for all its completions, which lie behind it as branches of one document (see kernels.visible), unless they
    are so long that attention over all of them would cost more than the prompts (share: None = decided so). Otherwise there is a padded
    row for each; on a CPU one row without padding where they are shared or long. keep_last: also the last tokens are fed, for what a
    critic says behind them.
    """
    longest = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    if share is None:
        tokens = [sum(len(prompt) * len(completions) + sum(map(len, completions)) for prompt, completions in groups),
                  sum(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)]
        share = longest <= LONGEST_SHARED and tokens[1] <= (1 - LEAST_SHARED) * tokens[0]
    if not share:
        groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
    documents, source, targets, last, begin = [], [], [], [], 0
    short = max(len(prompt) + len(completions[0]) for prompt, completions in groups) <= SHORT_ROW
    one_row = device.type == 'cpu' and (share or not short)
    fed = lambda completion: len(completion) - (not keep_last)
    width = max(len(prompt) + sum(map(fed, completions)) for prompt, completions in groups)
    for number, (prompt, completions) in enumerate(groups):
        ids, positions, P = list(prompt), list(range(len(prompt))), len(prompt)
        begin = begin if one_row else number * width
        for completion in completions:
            at = begin + len(ids)
            source.append([begin + P - 1, *range(at, at + len(completion) - 1)])
            targets.append(completion)
            last.append(at + len(completion) - 1 if keep_last else 0)
            ids += completion[:fed(completion)]
            positions += range(P, P + fed(completion))
        documents.append((ids, positions))
        begin += len(ids)
    if one_row:
        rows = [tuple(sum(parts, []) for parts in zip(*documents))]
    else:
        rows = [(ids + [0] * (width - len(ids)), positions + [0] * (width - len(ids))) for ids, positions in documents]
    T = max(map(len, targets))
    pad = lambda lists, value: torch.tensor([row + [value] * (T - len(row)) for row in lists], device=device)
    idx, positions = (torch.tensor(part, device=device) for part in zip(*rows))
    plain = not one_row and all(len(completions) == 1 for _, completions in groups)
    return Layout(idx, None if plain else positions, pad(source, 0), pad(targets, -1), torch.tensor(last, device=device))


# ---- what every rank must know ----------------------------------------------------------------------------------------------

class Table:
    """What every rank must know of a rollout, one row a completion, group by group.

    columns: reward, scored, length, stopped, logp (sum as sampled), k1 and k3 (sums, to the reference), then rewards/NAME for each.
    """
    COLUMNS = ('reward', 'scored', 'length', 'stopped', 'logp', 'k1', 'k3')

    def __init__(self, values, groups, names):
        self.values, self.groups = values, list(groups)                 # values (N, columns) float64
        self.rewards, self.names = list(names), [*self.COLUMNS, *(f'rewards/{name}' for name in names)]
        self.drawn = len(self.groups)

    @staticmethod
    def gather(episodes, groups, size, names, run, mask_truncated=False):
        """Of the Episodes of all ranks: `groups` have consecutive numbers and `size` members each. mask_truncated: what was cut off does
        not count as scored."""
        begin = min(groups)
        values = torch.zeros(len(groups) * size, len(Table.COLUMNS) + len(names), dtype=torch.float64)
        for e in episodes:
            scored = e.reward is not None and (e.stopped or not mask_truncated)
            values[(e.group - begin) * size + e.sample] = torch.tensor(
                [e.reward if e.reward is not None else 0.0, scored, len(e.completion_ids), e.stopped, sum(e.logp), 0.0, 0.0,
                 *(math.nan if e.rewards[name] is None else e.rewards[name] for name in names)])
        return Table(all_ranks(values, run), groups, names)

    def __getitem__(self, name):
        return self.values[:, self.names.index(name)]

    def __setitem__(self, name, column):
        self.values[:, self.names.index(name)] = column

    def by_group(self, name):
        return self[name].view(len(self.groups), -1)

    def alive(self):
        """The groups whose scored rewards are not all equal."""
        scored = self.by_group('scored') > 0
        low = self.by_group('reward').masked_fill(~scored, math.inf).amin(1)
        high = self.by_group('reward').masked_fill(~scored, -math.inf).amax(1)
        return [group for group, is_alive in zip(self.groups, (low < high).tolist()) if is_alive]

    def extend(self, other):
        return Table(torch.cat((self.values, other.values)), self.groups + other.groups, self.rewards)

    def select(self, groups):
        places = {group: i for i, group in enumerate(self.groups)}
        rows = self.values.view(len(self.groups), -1, self.values.size(1))[[places[group] for group in groups]]
        table = Table(rows.flatten(0, 1), groups, self.rewards)
        table.drawn = self.drawn
        return table


def all_ranks(values, run):
    """values, of which each rank has filled in its own part and left 0 elsewhere, whole."""
    if run.world_size > 1:
        torch.distributed.all_reduce(values)        # on the CPU, by gloo
    return values


def grouped(episodes):
    """Neighbours of one group -> (prompt ids, [completion ids, ...]), as lay_out takes them."""
    groups = []
    for i, episode in enumerate(episodes):
        if i and episode.group == episodes[i - 1].group:
            groups[-1][1].append(episode.completion_ids)
        else:
            groups.append((episode.prompt_ids, [episode.completion_ids]))
    return groups
