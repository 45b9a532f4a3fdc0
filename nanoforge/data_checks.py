"""What ruins a fine-tuning run without a word: in the data, before the first step, and in the log, while it runs.

    findings.stop()                     UserError for rows that must not be learned
    for line in findings.lines(): ...   everything else that is wrong with the data: how often, what to do, the first row
    flags.train(loss, grad_norm)        a red flag is named when it shows, once, with what to do
"""
import itertools
import math
import sys

import numpy as np

from configurator import UserError

MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops
# kind: (does it stop a run, what to do about it)
KINDS = {
    'unreadable rows': (True, 'correct them, or leave them out with --skip_bad_rows'),
    'calls that break their schema': (True, 'the model would learn them: correct the calls or the tools, or leave these rows out with '
                                            '--skip_bad_rows'),
    'rows that cannot be rendered': (True, 'correct them, or leave them out with --skip_bad_rows'),
    'fully masked rows': (False, 'dropped: nothing in them is learned (an empty completion?)'),
    'completions that do not fit': (False, 'dropped'),
    'prompts trimmed from the left': (False, 'what the question says first is lost'),
    'earlier turns not learned': (False, 'their template rewrites them, or they were cut: they are context only'),
    'completions without a stop token': (False, "the template writes none, so the tokenizer's was put behind them"),
    'models that never learn to stop': (False, 'neither template nor tokenizer has a stop token: name eos_token in tokenizer_config.json'),
    'rows repeated in training': (False, 'they count twice; leave them out if that is not meant'),
    'rows both trained on and held out': (False, 'eval_loss flatters the model: take them out of one of the two'),
    'no held-out rows': (False, 'eval_loss is nan: add rows with "metadata": "eval" (exactly so), even a few help'),
    'tools that no held-out row calls': (False, 'how well the model calls them is not measured'),
}


class DataIssues:
    """counts {kind: how often}, examples {kind: the first few}, notes {kind: what else there is to say}; kinds as in KINDS."""

    def __init__(self):
        self.counts, self.examples, self.notes = {}, {}, {}

    def add(self, kind, example):
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= 3:
            self.examples.setdefault(kind, []).append(example)

    @property
    def fatal(self):
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind][0]]

    def lines(self):
        """One line a kind: how many, what to do, the first."""
        for kind, (_, remedy) in KINDS.items():
            if kind in self.counts:
                yield (f'{self.counts[kind]:,} {kind}: {self.notes.get(kind, remedy)}'
                       + (f' (first: {self.examples[kind][0]})' if self.examples[kind][0] else ''))

    def stop(self):
        """UserError of the first row that must not be learned."""
        for kind in self.fatal:
            more = f' ({self.counts[kind] - 1:,} more such rows: --check shows them)' if self.counts[kind] > 1 else ''
            raise UserError(f'{self.examples[kind][0]}{more}; --skip_bad_rows leaves such rows out')


def compare_splits(rows, findings):
    """Counts rows that are there twice in training, and those both trained on and held out."""
    training = {}
    for i in np.flatnonzero(~rows.held_out):
        if training.setdefault(int(rows.keys[i, 1]), i) != i:
            findings.add('rows repeated in training', f'{rows.where[i]} is {rows.where[training[int(rows.keys[i, 1])]]}')
    for i in np.flatnonzero(rows.held_out):
        if int(rows.keys[i, 1]) in training:
            findings.add('rows both trained on and held out', f'{rows.where[i]} is {rows.where[training[int(rows.keys[i, 1])]]}')
    if not rows.held_out.any():
        findings.add('no held-out rows', '')


def highlight(tokenizer, ids, targets, colour=True):
    """The text of a row with what is learned in colour, or between ⟦ and ⟧."""
    on, off = ('\033[1;32m', '\033[0m') if colour else ('⟦', '⟧')
    parts = []
    for learned, group in itertools.groupby(zip(ids.tolist(), targets.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f'{on}{text}{off}' if learned else text)
    return ''.join(parts)


def show_check(cfg, tokenizer, rows, findings, run):
    """--check: three rows with what is learned in colour, and a table of what is wrong."""
    for i in np.flatnonzero(~rows.held_out)[:3]:
        run.print0(f'--- {rows.where[i]}: {rows.lengths[i]} tokens, {rows.targets[i]} learned\n'
                    + highlight(tokenizer, *rows[i], colour=sys.stdout.isatty()))
    run.print0(f'--- {len(rows):,} rows, {rows.held_out.sum():,} of them held out, longest {cfg.max_length} tokens')
    for line in findings.lines():
        run.print0('- ' + line)
    if not findings.counts:
        run.print0('- nothing is wrong')
    if findings.fatal and not cfg.skip_bad_rows:
        raise UserError(f'{", ".join(findings.fatal)}: a run would stop here')


class TrainingAlerts:
    """Names the red flags of a run when they show, once each, with what to do."""

    def __init__(self, run):
        self.run, self.said, self.history, self.before, self.bad_steps = run, set(), [], (0.0, 0), 0

    def say(self, key, text):
        if key not in self.said:
            self.said.add(key)
            self.run.print0(f'WARNING   {text}')

    def step(self, good, learning_rate, output_dir):
        """Counts steps that were skipped because their gradient was not finite; UserError after a few in a row."""
        self.bad_steps = 0 if good else self.bad_steps + 1
        if not good:
            self.run.print0(f'the gradient is not finite, the step is skipped ({self.bad_steps} in a row)')
        if self.bad_steps == MAX_BAD_STEPS:
            raise UserError(f'{self.bad_steps} steps in a row without a finite gradient: lower --learning_rate={learning_rate:g}; the '
                            f'checkpoints in {output_dir} are good')

    def train(self, loss, norm):
        """Looks at a log line."""
        if loss == 0 and norm == 0:
            self.say('zero', 'loss 0 and gradient 0: nothing is learned. Is the answer the last message, the completion not empty, '
                             '--max_length long enough? --check shows what is learned')
        elif not math.isfinite(loss):
            self.say('nan', 'the loss is not finite: lower --learning_rate, look for broken rows with --check')

    def evaluation(self, progress, eval_loss):
        """Looks at the training loss since the last evaluation beside eval_loss."""
        if not math.isfinite(eval_loss):
            self.say('eval', 'eval_loss is nan: there are no held-out rows. Add rows with "metadata": "eval", exactly so; even a few help')
        steps = progress.step - self.before[1]
        if steps > 0:
            self.history = [*self.history, ((progress.loss_sum - self.before[0]) / steps, eval_loss)][-3:]
        self.before = progress.loss_sum, progress.step
        train, held_out = zip(*self.history or [(0, 0)])
        if len(train) == 3 and train[0] > train[1] > train[2] and held_out[0] < held_out[1] < held_out[2]:
            self.say('overfitting', 'training loss falls while eval_loss rises: overfitting. Lower --num_train_epochs or --learning_rate, '
                                    'hold out more rows, or raise --dropout and --weight_decay; --patience=2 would stop here')
