"""What is sampled in reinforcement learning: a token-level record of each completion, a line of
rollouts.jsonl.

Tokens that were sampled are never made from text again: what is written, trained on and replayed are the ids.
"""
import itertools
import json
import operator
import os
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from nanoforge.checkpoint import write_text

LONGEST_SHARED = 2048           # tokens of a prompt with its completions up to which attention over all is cheap,
LEAST_SHARED = 0.1              # if sharing the prompt saves at least so many of all tokens
SHORT_ROW = 192                 # tokens up to which a CPU attends fastest in padded rows (model.SHORT_BLOCK)


@dataclass
class Completion:
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
    agent: str | None = None                        # of several, as the page of rollouts groups them
    turn: int = 0

    def line(self):
        """As JSON, log-probabilities to five digits."""
        return json.dumps({**asdict(self), 'logp': [round(x, 5) for x in self.logp]}, ensure_ascii=False)


def read_completions(path, step=None):
    """The Completions of a rollouts.jsonl, or those of one step; a line that a kill cut short is left out."""
    completions = []
    with open(path, encoding='utf-8') as file:
        for line in file:
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if step is None or fields['step'] == step:
                completions.append(Completion(**fields))
    return completions


def write_completions(completions, path, run):
    """Appends the Completions of all ranks to rollouts.jsonl, each rank in its turn."""
    for rank in range(run.world_size):
        if rank == run.rank:
            with open(path, 'a', encoding='utf-8') as file:
                file.writelines(completion.line() + '\n' for completion in completions)
        run.barrier()


def cut_rollouts(path, step):
    """Drops the rollouts from `step` on, which come again, and a line that a kill cut short."""
    if os.path.exists(path):
        kept = [completion for completion in read_completions(path) if completion.step < step]
        write_text(path, ''.join(completion.line() + '\n' for completion in kept))


def by_prompt(completions):
    """Completions in the order of their groups -> [(prompt ids, [completion ids, ...])], as data.batches.pack
    takes them."""
    groups = []
    for _, members in itertools.groupby(completions, operator.attrgetter('group')):
        members = list(members)
        groups.append((members[0].prompt_ids, [completion.completion_ids for completion in members]))
    return groups


# ---- completions -> rows, for train_agents.py; data.batches.pack does the same ------------------------------

class Layout(NamedTuple):
    """B completions of at most T tokens as rows for model.hidden(idx, positions); places count the rows laid
    end to end."""
    idx: torch.Tensor           # (R, W)
    positions: torch.Tensor     # (R, W); None: plain causal rows
    source: torch.Tensor        # (B, T): where the hidden state lies that predicts each token
    targets: torch.Tensor       # (B, T): the tokens, -1 behind a completion's end
    last: torch.Tensor          # (B,): where that of the last token lies


def lay_out(groups, device, keep_last=False, share=None):
    """[(prompt ids, [completion ids, ...]), ...] -> Layout, the completions in their order.

    A prompt is computed once for all its completions, which lie behind it as branches of one document (see
    kernels.visible), unless they are so long that attention over all of them would cost more than the prompts
    (share: None = decided so). Otherwise there is a padded row for each; on a CPU one row without padding
    where they are shared or long. keep_last: also the last tokens are fed, for what a critic says behind
    them. """
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
