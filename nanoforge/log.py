"""The log of a run: a line on the console, in log.jsonl, in TensorBoard and wandb for each write().

    log = run.start(...)
    log.train(step, tokens, loss=loss, learning_rate=lr, grad_norm=norm)    # a line every `interval` steps
    with log.pause():                                                       # no training: no speed counts it
        log.write(step, {'eval_loss': eval_loss})
"""
import contextlib
import json
import math
import os
import re
import sys
import time

import torch
from tqdm import tqdm

from configurator import UserError
from nanoforge.checkpoint import write_text, writing

# A line of the console has WIDTH columns, in a file the ETA behind them: the first of these that it has room
# for, and what an editor of a script added, before 'tokens_per_second'. log.jsonl and TensorBoard have all,
# in this order, too.
WIDTH = 98
ORDER = ('loss', 'accuracy', 'success_rate', 'greedy_success_rate', 'reward', 'episode_length',
         'rewards/accuracies', 'rewards/margins', 'kl', 'approx_kl', 'grad_norm', None, 'tokens_per_second',
         'learning_rate', 'entropy', 'epoch', 'mean_token_accuracy', 'mfu', 'num_tokens')
# What a line says of the steps since the last one: the mean, but of these
REDUCED = {**dict.fromkeys(('epoch', 'learning_rate', 'num_tokens', 'beta'), lambda values: values[-1]),
           **dict.fromkeys(('ratio_max', 'sampling/logp_gap_max'), max), 'ratio_min': min,
           **dict.fromkeys(('unscored', 'groups_drawn'), sum)}


class Log:
    """A line per write() on the console and in out_dir/log.jsonl; scalars to TensorBoard and wandb, too.

    log.jsonl begins with {"run": header}; then come lines with "step". With `resume_step` the lines after it
    are cut, as their steps come again, and the TensorBoard run is continued; what a line of that very step
    says already is not written twice. Only the main rank writes.

    header       what the run is: script, data set, whether it is a stand-in, device ...
    total_steps  for the ETA, in the progress bar on a terminal, else in the lines
    wandb        name of a project, or a dict of wandb.init's own settings (project, entity, name, tags)
    name         of the run, if not out_dir's with the time
    interval     steps between the lines of train()
    """

    def __init__(self, run, out_dir, header, total_steps, tensorboard=True, wandb=None, resume_step=None,
                 name=None, interval=1):
        self.run, self.total, self.interval, self.flops_per_token = run, total_steps, interval, 0
        self.first_step = self.last_step = resume_step or 0
        self.path = os.path.join(out_dir, 'log.jsonl')
        self.board = self.wandb = None
        self.is_open, self.began = True, time.monotonic()
        # mark: up to where seconds are counted
        self.window, self.mark = new_window(), time.perf_counter()
        self.widths = {}    # of each key's widest number so far, which keeps the columns straight
        self.said = []      # the keys of each line of resume_step
        self.said_more = False
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
            except OSError as error:            # the output folder may lie where it can be written
                run.print0(f'no TensorBoard events: cannot write {os.path.abspath("logs")}: {error.strerror}')
        if wandb:
            settings = wandb if isinstance(wandb, dict) else {'project': wandb}
            run_id = name.replace('/', '-')
            chosen = {'name': run_id, 'id': run_id, 'resume': 'allow', 'config': header}
            with wandb_client() as client:
                self.wandb = client.init(**{**chosen, **settings})
        self.bar = tqdm(total=total_steps, initial=self.first_step, unit='step', dynamic_ncols=True,
                        leave=False, disable=not (sys.stdout.isatty() and sys.stderr.isatty()))

    # ---- training steps, gathered into lines

    def train(self, step, tokens=0, **values):
        """`step` steps are done, the last on `tokens` tokens of all ranks. Writes a line every `interval`
        steps.

        A value that is a tensor () is this rank's part, summed over ranks when the line is written; a number
        is the same on every rank.
        """
        now, window = time.perf_counter(), self.window
        window['seconds'], self.mark = window['seconds'] + now - self.mark, now
        window['tokens'] += tokens
        for key, value in values.items():
            window['values'].setdefault(key, []).append(value.detach() if hasattr(value, 'detach') else value)
        self.last_step = step
        if step % self.interval == 0 or step == self.total:
            window, self.window = self.settled_window(), new_window()
            line = {key: REDUCED.get(key, mean)(values) for key, values in window['values'].items() if values}
            self.write(step, {**line, **self.speed(window)})
        self.progress(step)

    def speed(self, window):
        """{'tokens_per_second', 'time/PART', 'mfu'} of a window, its own seconds of training only."""
        rates = {f'time/{part}': seconds for part, seconds in window['parts'].items()}
        if window['tokens']:
            rates['tokens_per_second'] = round(window['tokens'] / max(window['seconds'], 1e-9))
            if self.flops_per_token and (peak := device_peak_flops(self.run.device)):
                flops = rates['tokens_per_second'] * self.flops_per_token
                rates['mfu'] = flops / peak / self.run.num_processes
        return rates

    def settled_window(self):
        """What train() has gathered since the last line, summed over ranks; every rank calls it."""
        window = self.window
        tensors = [(key, i) for key, values in window['values'].items() for i, value in enumerate(values)
                   if hasattr(value, 'detach')]
        if tensors:
            parts = torch.stack([window['values'][key][i].float() for key, i in tensors])
            for (key, i), total in zip(tensors, self.run.sum(parts).tolist()):
                window['values'][key][i] = total
        return window

    def window_to_save(self):
        """The values gathered since the last line, for a checkpoint."""
        finite = {}
        for key, values in self.settled_window()['values'].items():
            finite[key] = list(filter(math.isfinite, values))       # a step that was skipped has others
        return {'values': finite}

    def take_up(self, window):
        """Goes on with what window_to_save() gave; its tokens and seconds are not counted again."""
        self.window = {**new_window(), 'values': window['values']}

    @contextlib.contextmanager
    def timed(self, part):
        """Adds the seconds inside to 'time/PART' of the next line."""
        began = time.perf_counter()
        yield
        self.window['parts'][part] = self.window['parts'].get(part, 0.0) + time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self):
        """What happens inside is no training: evaluation, a checkpoint, a picture."""
        began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - began

    # ---- lines

    def progress(self, step):
        """`step` steps are done: moves the bar. Call it at every step; it costs a microsecond."""
        if self.run.is_main:
            self.bar.update(step - self.bar.n)

    def write(self, step, metrics):
        """metrics: {name: number or one-element tensor}; step: how many optimizer steps are done."""
        if not self.run.is_main:
            return
        metrics = {key: value.item() if hasattr(value, 'item') else value for key, value in metrics.items()}
        metrics = {key: metrics[key] for key in sorted(metrics, key=place)}
        # JSON has no NaN
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = {'step': step, **finite}
        again = step == self.first_step and line.keys() in self.said        # of a run that had ended before
        if not again:
            self._line(line)
        parts = [f'step {step:>{len(str(self.total))}}/{self.total}']
        for key in self.keys_shown(metrics):
            text = short(metrics[key])
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

    def keys_shown(self, metrics):
        """What of a line's metrics, which are in order, the console shows; says once that there are more."""
        room, shown = WIDTH - 2 * len(str(self.total)) - 6, []
        for key in metrics:
            if len(key) + 10 <= room:           # two spaces before it, one behind, a number of 7 characters
                shown.append(key)
                room -= len(key) + 10
        if len(shown) < len(metrics) and not self.said_more:
            self.said_more = True
            self.run.print0(f'log       lines show what matters most; all numbers are in {self.path}')
        return shown

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
        self.is_open, was_open = False, self.is_open
        if self.run.is_main and was_open:
            self.bar.close()
            os.close(self.file)
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()

    def _line(self, value):
        with writing(self.path):    # one unbuffered write: a kill loses nothing
            text = json.dumps(value, ensure_ascii=False, allow_nan=False) + '\n'
            os.write(self.file, text.encode(errors='backslashreplace'))


@contextlib.contextmanager
def wandb_client():
    """The module wandb; whatever it raises inside is one line. UserError where it is not installed."""
    try:
        import wandb
        if not hasattr(wandb, 'init'):      # a folder wandb/, which its runs leave behind
            raise ImportError
    except ImportError:
        raise UserError('wandb is not installed: pip install wandb, or leave it out '
                        '(--no-wandb_enabled)') from None
    try:
        yield wandb
    except Exception as error:
        raise UserError(f'wandb: {error} (`wandb login` before the run, WANDB_MODE=offline, or '
                        '--no-wandb_enabled)') from None


def check_wandb():
    """Logs in before models are loaded: a run shall not end when it comes to its first line."""
    with wandb_client() as client:
        if hasattr(client, 'login'):
            client.login()


def place(key):
    """Where a key stands in a line."""
    key = key.removeprefix('eval_').removeprefix('validation/')
    return ORDER.index(key if key in ORDER else None)


def new_window():
    """What train() gathers between two lines: values {name: list}, tokens, seconds, seconds of parts."""
    return {'values': {}, 'tokens': 0, 'seconds': 0.0, 'parts': {}}


def mean(values):
    """Of those that are finite: a step that was skipped says nothing. A single count stays a whole number."""
    finite = [value for value in values if math.isfinite(value)] or values
    return finite[0] if len(finite) == 1 else sum(finite) / len(finite)


# Dense 16-bit tensor-core FLOP/s with float32 accumulation, from NVIDIA's data sheets and architecture
# papers; figures printed "with sparsity" are halved. The first name found in the card's name counts.
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
              'A100': 312e12,
              'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX 5090': 209.5e12,
              'RTX 4090': 165.2e12, 'RTX 3090': 71e12}


def device_peak_flops(device):
    """Peak FLOP/s of a torch.device, or of a card by name, for MFU; None where it is not known."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', device)), None)


def cut_log(path, step):
    """Drops the lines of log.jsonl after `step`, and one that a kill cut short; returns the others."""
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
