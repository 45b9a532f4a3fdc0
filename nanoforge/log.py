"""The log of a run: a line on the console, in log.jsonl, in TensorBoard and wandb for each write().

    log = Log(run, cfg.out_dir, header, cfg.max_iters)
    log.write(step, {'loss': loss, 'grad_norm': norm})
"""
import contextlib
import json
import math
import os
import sys
import time

from tqdm import tqdm

from configurator import UserError
from nanoforge.checkpoint import write_text, writing

FIRST = ('epoch', 'loss', 'eval_loss', 'learning_rate', 'grad_norm')     # then a script's own, in its order
LAST = ('num_tokens', 'tokens_per_second', 'mfu')


class Log:
    """One line per write() on the console and in out_dir/log.jsonl; scalars to TensorBoard (logs/<run>/) and wandb too.

    log.jsonl begins with {"run": header}; then come lines with "step". With `resume_step` the lines after it are cut,
    as their steps come again, and the TensorBoard run is continued; what a line of that very step says already is not
    written twice. Only the main rank writes.

    header       what the run is: script, data set, whether it is a stand-in, device ...
    total_steps  for the ETA, in the progress bar on a terminal, else in the lines
    wandb        name of a project, or a dict of wandb.init's own settings (project, entity, name, tags)
    name         of the run, if not out_dir's with the time
    """

    def __init__(self, run, out_dir, header, total_steps, tensorboard=True, wandb=None, resume_step=None, name=None):
        self.run, self.total, self.first_step, self.began = run, total_steps, resume_step or 0, time.monotonic()
        self.path, self.widths, self.board, self.wandb = os.path.join(out_dir, 'log.jsonl'), {}, None, None
        self.said = []      # the keys of each line of resume_step
        if not run.is_main:
            return
        name = name or f'{os.path.basename(os.path.abspath(out_dir))}-{time.strftime("%Y%m%d-%H%M%S")}'
        with writing(self.path):
            if resume_step is not None:
                kept = cut_log(self.path, resume_step)
                name = next((line['run']['name'] for line in kept if line.get('run', {}).get('name')), name)
                self.said = [line.keys() for line in kept if line.get('step') == resume_step]
                header = {**header, 'resumed_at': resume_step}
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._line({'run': {'name': name, **header}})
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter   # 0.1 s
                self.board = SummaryWriter(os.path.join('logs', name), flush_secs=10,
                                           purge_step=None if resume_step is None else resume_step + 1)
            except ImportError:
                run.print0('no TensorBoard events: pip install tensorboard')
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError('wandb is not installed: pip install wandb, or leave the wandb flag out') from None
            settings = wandb if isinstance(wandb, dict) else {'project': wandb}
            run_id = name.replace('/', '-')
            self.wandb = client.init(**{'name': run_id, 'id': run_id, 'resume': 'allow', 'config': header, **settings})
        self.bar = tqdm(total=total_steps, initial=self.first_step, unit='step', dynamic_ncols=True, leave=False,
                        disable=not sys.stderr.isatty())

    def progress(self, step):
        """`step` steps are done: moves the bar. Call it at every step; it costs a microsecond."""
        if self.run.is_main:
            self.bar.update(step - self.bar.n)

    def write(self, step, metrics):
        """metrics: {name: number or one-element tensor}; step: how many optimizer steps are done."""
        if not self.run.is_main:
            return
        metrics = {key: value.item() if hasattr(value, 'item') else value for key, value in metrics.items()}
        order = [*(key for key in FIRST if key in metrics),
                 *(key for key in metrics if key not in FIRST + LAST), *(key for key in LAST if key in metrics)]
        metrics = {key: metrics[key] for key in order}
        line = {'step': step, **{key: value if math.isfinite(value) else None for key, value in metrics.items()}}
        again = step == self.first_step and line.keys() in self.said        # of a run that had ended before
        if not again:
            self._line(line)
        parts = [f'step {step:>{len(str(self.total))}}/{self.total}']
        for key, value in metrics.items():
            text = short(value)
            self.widths[key] = max(self.widths.get(key, 0), len(text))
            parts.append(f'{key} {text:>{self.widths[key]}}')
        if self.bar.disable and self.first_step < step < self.total:
            left = (time.monotonic() - self.began) / (step - self.first_step) * (self.total - step)
            parts.append(f'ETA {tqdm.format_interval(left)}')
        elif 'tokens_per_second' in metrics:
            self.bar.set_postfix_str(f'{metrics["tokens_per_second"]:,.0f} tokens/s', refresh=False)
        self.run.print0('  '.join(parts))
        for key, value in metrics.items() if self.board and not again else ():
            self.board.add_scalar(key, value, step)
        if self.wandb and not again:
            self.wandb.log(metrics, step=step)

    def text(self, step, key, text):
        """A sample of text: on the console, in log.jsonl and in TensorBoard."""
        if not self.run.is_main:
            return
        self._line({'step': step, key: text})
        self.run.print0(f'--- {key} at step {step}\n{text}\n---')
        if self.board:
            self.board.add_text(key, text, step)

    def histograms(self, step, tensors):
        """{name: tensor} as distributions to TensorBoard."""
        for name, tensor in tensors.items() if self.run.is_main and self.board else ():
            self.board.add_histogram(name, tensor.detach().float().cpu(), step)

    def close(self):
        if self.run.is_main:
            self.bar.close()
            os.close(self.file)
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()

    def _line(self, value):
        with writing(self.path):    # one unbuffered write: a kill loses nothing
            os.write(self.file, (json.dumps(value, ensure_ascii=False, allow_nan=False) + '\n').encode())


def cut_log(path, step):
    """Drop the lines of log.jsonl after `step`, and one that a kill cut short; returns those that are kept."""
    kept = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8', errors='replace') as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if line.get('step', 0) <= step:
                    kept.append((line, text.rstrip('\n') + '\n'))
    write_text(path, ''.join(text for _, text in kept))
    return [line for line, _ in kept]


def short(value):
    """A number in few characters: 0.0012 as 1.20e-03, 1.8742, 12,345."""
    if isinstance(value, int) or abs(value) >= 1e4 and math.isfinite(value):
        return f'{value:,.0f}'
    return f'{value:.4f}' if value == 0 or 1e-2 <= abs(value) else f'{value:.2e}'
