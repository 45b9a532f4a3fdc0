"""What is sampled in reinforcement learning: a token-level record of each completion, a line of
rollouts.jsonl.

Tokens that were sampled are never made from text again: what is written, trained on and replayed are the ids.
"""
import itertools
import json
import operator
import os
from dataclasses import asdict, dataclass, field

from nanoforge.checkpoint import write_text


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
    prompt: str = ''                                # prompt_ids as text
    # with an environment completion_ids are a transcript of several turns, text is what the policy said last,
    # and these are its stretches, [text, tokens, whether the policy wrote it]; logp is 0 where it did not
    parts: list = field(default_factory=list)

    @property
    def mask(self):
        """Whether the policy wrote each token of completion_ids, and so learns it."""
        own = [is_own for _, tokens, is_own in self.parts for _ in range(tokens)]
        return own or [True] * len(self.completion_ids)

    @property
    def length(self):
        """How many tokens the policy wrote."""
        return sum(self.mask)

    def line(self):
        """As JSON, log-probabilities to five digits."""
        fields = {**asdict(self), 'logp': [round(x, 5) for x in self.logp]}
        if not self.parts:
            del fields['parts']
        return json.dumps(fields, ensure_ascii=False)


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
        if rank == run.rank and run.tp_rank == 0:
            with open(path, 'a', encoding='utf-8', errors='backslashreplace') as file:
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
