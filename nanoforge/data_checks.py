"""What ruins a fine-tuning run silently: in the data, before the first step, and in the log, while it runs.

    issues.stop()                       UserError for rows that must not be learned
    for line in issues.lines(): ...     all that is wrong with the data: how often, what to do, the first row
    alerts.train(loss, grad_norm)       a warning when something goes wrong, once, with what to do
"""
import itertools
import math
import sys
from collections import Counter, defaultdict

import numpy as np

from configurator import UserError
from data.chat import REMARKS

SHOWN = 20      # of each kind of row that stops a run, as --check names them
# kind of issue: what to do about it; those of FATAL stop a run
REMEDIES = {
    'unreadable rows':
        'correct them, or leave them out with --skip_bad_rows',
    'calls that break their schema':
        'the model would learn them: correct the calls or the tools, or leave these rows out with '
        '--skip_bad_rows',
    'rows that cannot be rendered':
        'correct them, or leave them out with --skip_bad_rows',
    'fully masked rows':
        'dropped: nothing in them is learned (an empty completion, or an answer of weight 0?)',
    'completions that do not fit':
        'dropped',
    'prompts trimmed from the left':
        'what the question says first is lost',
    'earlier turns not learned':
        'their template rewrites them, or they were cut: they are context only',
    'completions without a stop token':
        "the template writes none, so the tokenizer's was put behind them",
    'models that never learn to stop':
        'neither template nor tokenizer has a stop token: name eos_token in tokenizer_config.json',
    **REMARKS,
    'rows repeated in training':
        'they count twice; leave them out if that is not meant',
    'rows both trained on and held out':
        'eval_loss flatters the model: take them out of one of the two',
    'no held-out rows':
        'eval_loss is nan: add rows with "metadata": "eval" (exactly so), even a few help',
    'tools that no held-out row calls':
        'how well the model calls them is not measured',
}
FATAL = ('unreadable rows', 'calls that break their schema', 'rows that cannot be rendered')


class DataIssues:
    """counts {kind: how often}, examples {kind: the first SHOWN}, notes {kind: what to say in place of the
    remedy}; the kinds are those of REMEDIES."""

    def __init__(self):
        self.counts, self.examples, self.notes = Counter(), defaultdict(list), {}

    def add(self, kind, example):
        """example: where it is, and what is wrong there; '' where it is of no one row."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(example)

    @property
    def fatal(self):
        return [kind for kind in FATAL if kind in self.counts]

    def lines(self):
        """One line a kind: how many, what to do, the first; of what is of no one row only what to do."""
        for kind, remedy in REMEDIES.items():
            if kind in self.counts:
                line, first = f'{kind}: {self.notes.get(kind, remedy)}', self.examples[kind][0]
                yield f'{self.counts[kind]:,} {line} (first: {first})' if first else line

    def stop(self):
        """UserError of the first row that must not be learned."""
        for kind in self.fatal:
            others = self.counts[kind] - 1
            more = f' ({others:,} more such rows: --check shows them)' if others else ''
            raise UserError(f'{self.examples[kind][0]}{more}; --skip_bad_rows leaves such rows out')


def print_mixture(sources, system_prompts, print0):
    """Says which data sets are mixed and which system message their rows get: who names his own data beside a
    recipe may not mean the recipe's others, or its prompt."""
    if len(sources) > 1:
        names = ', '.join(f'{source.name} (weight {source.weight:g})' for source in sources)
        print0(f'data      {len(sources)} data sets are mixed: {names}; --dataset_path=... names one in '
               'place of all')
    for text in filter(None, system_prompts):
        print0(f'prompt    rows get the system message {text!r}')


def compare_splits(rows, issues):
    """Counts rows that are there twice in training, and those both trained on and held out."""
    first = {}      # hash of a training row: its number
    for i in np.flatnonzero(~rows.held_out):
        same = first.setdefault(int(rows.keys[i, 1]), i)
        if same != i:
            issues.add('rows repeated in training', f'{rows.where[i]} is {rows.where[same]}')
    for i in np.flatnonzero(rows.held_out):
        same = first.get(int(rows.keys[i, 1]))
        if same is not None:
            issues.add('rows both trained on and held out', f'{rows.where[i]} is {rows.where[same]}')
    if not rows.held_out.any():
        issues.add('no held-out rows', '')


def highlight(tokenizer, ids, targets, colour=True):
    """The text of a row with what is learned in colour, or between ⟦ and ⟧. ids, targets: (n,)."""
    on, off = ('\033[1;32m', '\033[0m') if colour else ('⟦', '⟧')
    parts = []
    for learned, group in itertools.groupby(zip(ids.tolist(), targets.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f'{on}{text}{off}' if learned else text)
    return ''.join(parts)


def show_check(cfg, tokenizer, rows, issues, run):
    """--check: three rows with what is learned in colour, what is wrong; UserError if a run would stop."""
    for i in np.flatnonzero(~rows.held_out)[:3]:
        run.print0(f'--- {rows.where[i]}: {rows.lengths[i]} tokens, {rows.targets[i]} learned')
        run.print0(highlight(tokenizer, *rows[i], colour=sys.stdout.isatty()))
    run.print0(f'--- {len(rows):,} rows, {rows.held_out.sum():,} of them held out, '
               f'{issues.counts["unreadable rows"]:,} unreadable, longest {cfg.max_length} tokens')
    for line in issues.lines():
        run.print0('- ' + line)
    for kind in issues.fatal:
        for example in issues.examples[kind][1:]:
            run.print0(f'  {kind}: {example}')
        if issues.counts[kind] > SHOWN:
            run.print0(f'  {kind}: {issues.counts[kind] - SHOWN:,} more')
    if not issues.counts:
        run.print0('- nothing is wrong')
    if issues.fatal and not cfg.skip_bad_rows:
        raise UserError(f'{", ".join(issues.fatal)}: a run would stop here')


class TrainingAlerts:
    """Warns once of each thing that goes wrong in a run, with what to do."""

    def __init__(self, run):
        self.run, self.warned = run, set()
        self.history = []       # (training loss since the one before, eval_loss) of the last 3 evaluations
        self.loss_sum, self.steps = 0.0, 0          # at the last evaluation

    def warn(self, text):
        if text not in self.warned:
            self.warned.add(text)
            self.run.print0(f'WARNING   {text}')

    def train(self, loss, grad_norm):
        """Looks at a step: its loss in nats per token."""
        if loss == 0 and grad_norm == 0:
            self.warn('loss 0 and gradient 0: nothing is learned. Is the answer the last message, the '
                      'completion not empty, --max_length long enough? --check shows what is learned')
        elif not math.isfinite(loss):
            self.warn('the loss is not finite: lower --learning_rate, look for broken rows with --check')

    def evaluation(self, state, eval_loss):
        """Compares the training loss since the last evaluation with eval_loss. state: .step, and .loss_sum
        over all steps so far."""
        if not math.isfinite(eval_loss):
            self.warn('eval_loss is nan: there are no held-out rows. Add rows with "metadata": "eval", '
                      'exactly so; even a few help')
        steps = state.step - self.steps
        if steps > 0:
            train_loss = (state.loss_sum - self.loss_sum) / steps
            self.history = [*self.history, (train_loss, eval_loss)][-3:]
        self.loss_sum, self.steps = state.loss_sum, state.step
        pairs = list(itertools.pairwise(self.history))
        if len(pairs) == 2 and all(now[0] < before[0] and now[1] > before[1] for before, now in pairs):
            self.warn('training loss falls while eval_loss rises: overfitting. Lower --num_train_epochs or '
                      '--learning_rate, hold out more rows, or raise --dropout and --weight_decay; '
                      '--patience=2 would stop here')
