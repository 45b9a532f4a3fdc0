"""What is sampled in reinforcement learning: a token-level record of each completion, a line of
rollouts.jsonl.

Tokens that were sampled are never made from text again: what is written, trained on and replayed are the ids.
"""
import contextlib
import functools
import itertools
import json
import operator
import os
from dataclasses import asdict, dataclass, field

from configurator import UserError
from nanoforge.checkpoint import read_manifest, write_text, writing


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
    def transcript(self):
        """All that follows the prompt, as text."""
        return ''.join(text for text, *_ in self.parts) or self.text

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
    with open(path, encoding='utf-8', errors='replace') as file:    # a kill may cut a character, too
        for line in file:
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if step is None or fields['step'] == step:
                completions.append(Completion(**fields))
    return completions


def write_completions(completions, path, run):
    """Appends the Completions of all ranks to rollouts.jsonl."""
    write_lines([completion.line() for completion in completions], path, run)


def write_lines(lines, path, run):
    """Appends lines to a file, each rank its own in its turn."""
    for rank in range(run.world_size):
        if rank == run.rank and run.tp_rank == 0:
            with writing(path), open(path, 'a', encoding='utf-8', errors='backslashreplace') as file:
                file.writelines(line + '\n' for line in lines)
        run.barrier()


def make_folder(path):
    with writing(path):
        os.makedirs(path, exist_ok=True)


def collect_best(rollout, prompt, path, run, by='reward'):
    """Appends the best completion of each group of a rollout, the first of several, as a row of messages that
    fine-tuning reads; prompt(problem) are those that were asked. by: what the best has most of, its reward,
    or its advantage where the sum of the rewards is not what is learned.

    Not of a group that has nothing above the lowest reward of the rollout, nor what was cut off or is empty:
    who learns it would learn to stop there.
    """
    lowest, rows = rollout.reward[rollout.valid].min(), []
    for _, members in itertools.groupby(rollout.records(), operator.attrgetter('group')):
        scored = [c for c in members if c.reward is not None and c.stopped and c.text.strip()]
        best = max(scored, key=operator.attrgetter(by), default=None)
        if best and best.reward > lowest:
            tools = {'tools': best.problem['tools']} if best.problem.get('tools') else {}
            messages = [*prompt(best.problem), {'role': 'assistant', 'content': best.text}]
            rows.append({'messages': messages, **tools, 'reward': best.reward, 'step': best.step})
    run.on_main(functools.partial(make_folder, os.path.dirname(path) or '.'))
    write_lines([json.dumps(row, ensure_ascii=False) for row in rows], path, run)


def refuse_rows_of_others(path, out_dir):
    """UserError where the file that a run in out_dir is to collect in is there, and not from an earlier start
    of that run, whose rows may be cut."""
    saved = read_manifest(os.path.join(out_dir, 'run_config.json')).get('config', {})
    if os.path.exists(path) and saved.get('training', {}).get('collect') != path:
        raise UserError(f'collect={path} is there already, and not of the run in {out_dir}: name another '
                        'file, or move it away')


def cut_rollouts(path, step):
    """Drops the lines of rollouts from `step` on, which come again, and one that a kill cut short."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if json.loads(line)['step'] < step:
                    kept.append(line.rstrip('\n') + '\n')
    write_text(path, ''.join(kept))


def by_prompt(completions):
    """Completions in the order of their groups -> [(prompt ids, [completion ids, ...])], as data.batches.pack
    takes them."""
    groups = []
    for _, members in itertools.groupby(completions, operator.attrgetter('group')):
        members = list(members)
        groups.append((members[0].prompt_ids, [completion.completion_ids for completion in members]))
    return groups
