"""A run's life, around a loop that is the script's own: device, precision, ranks, signals, start, resume, gradient step, save, end.

    run = Run.open(cfg, 'train_gpt.py', cfg.out_dir)            # cfg is run.cfg from here on: where it resumes, the saved one
    state = run.restore(State(), optimizer, ema)                # of the checkpoint that is resumed, if one is
    log = run.start(total_steps=cfg.max_iters, step=state.step)
    while True:
        run.exit_if_asked(save)                                 # SIGINT, SIGTERM: save, say how to go on, exit
        with run.autocast():
            loss = ...
        run.backward(loss)                                      # for each micro-batch
        grad_norm = run.step(optimizer, lr, cfg.grad_clip)      # sum over ranks, clip, step
    return run.finish(metrics, 'python sample.py out')
"""
import contextlib
import ctypes
import hashlib
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, as_dict, without_effect
from model import save_model
from nanoforge.checkpoint import (Checkpoints, read_checkpoint, read_manifest, resume_config, start_fresh,
                                  write_json)
from nanoforge.log import Log
from nanoforge.optim import Plateau

MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops
DTYPES = {'float32': torch.float32, 'fp32': torch.float32, 'bfloat16': torch.bfloat16, 'bf16': torch.bfloat16,
          'float16': torch.float16, 'fp16': torch.float16}


@dataclass
class State:
    """Where a run is: what a checkpoint holds besides tensors. A script adds what is its own."""
    optimizer: str = ''     # its name: another one's tensors would not fit
    step: int = 0
    num_tokens: int = 0
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    plateau: dict = field(default_factory=lambda: Plateau().state_dict())

    def note_eval(self, eval_loss):
        """Takes an evaluation's loss; True where it is the best so far. One that is not finite never is."""
        plateau = Plateau(self.plateau)
        plateau.update(eval_loss)
        self.plateau = plateau.state_dict()
        best = math.isfinite(eval_loss) and (self.best_eval_loss is None or eval_loss < self.best_eval_loss)
        self.best_eval_loss = eval_loss if best else self.best_eval_loss
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best


def by_prefix(optimizers):
    return optimizers if isinstance(optimizers, dict) else {'': optimizers}


@dataclass
class Run:
    """One process of a run: where it computes, in which precision, which rank it is, and what it has open."""
    device: torch.device
    dtype: torch.dtype      # of autocast; parameters and optimizer state are always float32
    matmul: str             # 'float32' or 'bf16': how a CPU multiplies matrices
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.cfg = self.script = self.checkpoints = self.resumed = self.saved = self.stop = self.log = None
        self.memory_flags, self.scaler, self.bad_steps, self.window = ('--batch_size',), LossScale(self.dtype), 0, None

    # ---- the beginning

    @classmethod
    def open(cls, cfg, script, out_dir, resume=False, resume_flag='--resume', from_start=False, memory_flags=(),
             limit=2, save_only_model=False, checkpoint=None, share=None):
        """Joins the ranks, takes over the signals, and finds the checkpoint to resume from; returns a Run.

        run.cfg         the configuration: where it resumes, the saved one, of which only what was typed again differs
        run.resumed     the path of the checkpoint that is resumed, or None
        resume          whether to go on with the run in out_dir; 'auto': only where there is one
        memory_flags    the flags to lower that an out-of-memory names
        limit, save_only_model      of Checkpoints; where cfg has save_total_limit (TrainFlags), its own
        checkpoint      the checkpoint to go on from, if not the newest
        share(run)      makes another Run of it, whose ranks share models (tensor parallelism)
        """
        saved = None
        if resume or from_start:
            cfg, saved = resume_config(cfg, out_dir, script, resume_flag, from_start)
        run = setup(cfg.device, cfg.autocast_dtype(), cfg.matmul)
        run = share(run) if share else run
        run.cfg, run.script, run.saved, run.stop = cfg, script, saved, Stop(run)
        run.memory_flags = memory_flags or run.memory_flags
        run.checkpoints = Checkpoints(out_dir, run, getattr(cfg, 'save_total_limit', limit),
                                      getattr(cfg, 'save_only_model', save_only_model))
        if saved and not from_start:
            run.resumed = checkpoint or run.checkpoints.latest()
            if not run.resumed and resume != 'auto':
                raise UserError(f'{out_dir} holds no whole checkpoint to resume from; start anew without {resume_flag}')
        for line in without_effect(cfg):
            run.print0(f'note      {line}')
        return run

    def restore(self, state, optimizers, ema=None, parameters=None):
        """Puts back what the resumed checkpoint holds besides the model: fills `state`, the optimizers, the mean of the weights.

        Of several optimizers {prefix: optimizer} each finds its tensors under its prefix, and so do {prefix: {name: tensor}},
        parameters outside the model, which are overwritten in place. Without a checkpoint nothing changes. Returns `state`.
        """
        if not self.resumed:
            return state
        optimizers, parameters = by_prefix(optimizers), parameters or {}
        tensors, saved = read_checkpoint(self.resumed)
        if ema and ema.decay:
            ema.restore(tensors)
        prefixes = sorted([*optimizers, *parameters], key=len, reverse=True)
        parts = {prefix: {} for prefix in prefixes}
        for key, tensor in tensors.items():
            prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
            if prefix:
                key = key.replace('/trunk.', '/backbone.')      # as earlier versions called it in a critic
            parts[prefix][key.removeprefix(prefix)] = tensor
        if saved.get('optimizer', state.optimizer) == state.optimizer:
            for prefix, optimizer in optimizers.items():
                optimizer.load_state_dict(parts[prefix])
        else:
            self.print0(f'note      the run used {saved["optimizer"]}; {state.optimizer} starts with a fresh state')
        with torch.no_grad():
            for prefix, own in parameters.items():
                for name, tensor in parts[prefix].items():
                    own[name].copy_(tensor)             # in place: the optimizer's flat buffers hold the parameters
        known = {**saved.get('progress', {}), **saved}              # 'progress': as earlier versions nested them
        for entry in fields(state):
            if known.get(entry.name) is not None and entry.name != 'optimizer':
                setattr(state, entry.name, known[entry.name])
        self.scaler = LossScale(self.dtype, saved['loss_scale'])
        self.bad_steps, self.window = saved.get('bad_steps', 0), saved.get('window')
        return state

    def start(self, total_steps, step, header, log_interval, keep=None, name=None, directory=None, flops_per_token=0):
        """Makes the output folder ready (a fresh one, or cut back to the resumed step) and opens the log.

        header   what this run is, for the first line of log.jsonl
        keep     a checkpoint that was loaded from the folder: it stays where it is
        """
        cfg, out_dir = self.cfg, str(self.checkpoints.out_dir)
        if self.resumed:
            self.checkpoints.say_processes(self.resumed)
            self.checkpoints.discard_later(self.resumed)
            config = {**self.saved, 'config': as_dict(cfg)}
            self.on_main(lambda: write_json(os.path.join(out_dir, 'run_config.json'), config))
        else:
            start_fresh(self, out_dir, as_dict(cfg), keep=keep, script=self.script)
        header = {'script': self.script, **header, 'machine': describe_device(self)}
        wandb = {name: getattr(cfg, f'wandb_{name}') for name in ('project', 'entity', 'name', 'tags')
                 if getattr(cfg, f'wandb_{name}')}
        self.log = Log(self, directory or out_dir, header, total_steps, cfg.reports_to('tensorboard'),
                       wandb if cfg.reports_to('wandb') else None, step if self.resumed else None, name, log_interval)
        self.log.flops_per_token = flops_per_token
        if isinstance(self.window, dict):
            self.log.take_up(self.window)
        return self.log

    # ---- a gradient step

    @contextlib.contextmanager
    def autocast(self):
        """Mixed precision on a GPU; running out of memory inside is one line that names the flags to lower."""
        plain = self.dtype == torch.float32
        with explain_out_of_memory(*self.memory_flags):
            with contextlib.nullcontext() if plain else torch.autocast(self.device.type, self.dtype):
                yield

    def backward(self, loss):
        """Adds the gradient of this micro-batch's part of the loss: the parts are of one mean over the whole step."""
        with explain_out_of_memory(*self.memory_flags):
            (loss * self.scaler.value).backward()

    def step(self, optimizers, lr, max_norm):
        """One optimizer step on the gradients that backward() added up; returns their norm before clipping, a float.

        Sums over ranks, undoes the loss scale, clips to max_norm (0: never), steps, empties the gradients. Where a norm is not
        finite no optimizer steps; after MAX_BAD_STEPS such steps in a row the run stops. Of several optimizers (then lr is a
        list, too) the norms come as a list.
        """
        several = isinstance(optimizers, (list, tuple))
        pairs = list(zip(optimizers, lr)) if several else [(optimizers, lr)]
        norms = []
        for optimizer, rate in pairs:
            optimizer.set_lr(rate)
            for grad in optimizer.grads:
                self.sum(grad)
            self.scaler.unscale_(optimizer.grads)
            norms.append(float(self.clip_grad_norm(optimizer, max_norm)))
        finite = all(map(math.isfinite, norms))
        for optimizer, _ in pairs:
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        rescaled = self.scaler.update(finite)           # a float16 scale that was too high is no fault of the model's
        self.count_bad_step(finite or rescaled, pairs[0][1])
        return norms if several else norms[0]

    def clip_grad_norm(self, optimizer, max_norm):
        return optimizer.clip_grad_norm(max_norm)

    def count_bad_step(self, good, lr):
        """Says that a step was skipped; UserError after MAX_BAD_STEPS in a row."""
        self.bad_steps = 0 if good else self.bad_steps + 1
        if not good:
            self.print0(f'the gradient is not finite, the step is skipped ({self.bad_steps} in a row)')
        if self.bad_steps == MAX_BAD_STEPS:
            raise UserError(f'{self.bad_steps} steps in a row without a finite gradient: lower --learning_rate={lr:g}; '
                            f'the checkpoints in {self.checkpoints.out_dir} are good')

    # ---- saving, and the end

    def save(self, state, model, tokenizer, optimizers, ema=None, best=False, name=None, parameters=None, write=None, **more):
        """Saves checkpoint-STEP (or `name`), which is whole or not there at all.

        optimizers, parameters   as restore() takes them
        write(directory)         writes the model, in place of save_model
        more                     goes into trainer_state.json beside the fields of `state`
        """
        saved = {**asdict(state), **more, 'loss_scale': self.scaler.state, 'bad_steps': self.bad_steps,
                 'window': self.log.window_to_save()}
        write = write or (lambda directory: save_model(model, tokenizer, directory))
        with ema.swapped() if ema else contextlib.nullcontext():
            tensors = ema.state_dict() if ema else {}
            for prefix, optimizer in by_prefix(optimizers).items():
                tensors.update((prefix + key, tensor) for key, tensor in optimizer.state_dict().items())
            for prefix, own in (parameters or {}).items():
                tensors.update((prefix + name, p.detach()) for name, p in own.items())
            self.checkpoints.save(state.step, write, tensors, saved, best, name)

    def exit_if_asked(self, save):
        """After SIGINT or SIGTERM on any rank: save(), say how to go on, end the process with 130 or 143."""
        if not self.stop.requested:
            return
        save()
        self.print0(f'stopped at step {self.log.last_step}, saved; go on with: {resume_command()}')
        self.close()
        raise SystemExit(self.stop.code)

    def finish(self, metrics, text):
        """Closes everything, prints `text`, and returns the metrics of the run."""
        if self.log:
            self.log.close()
        self.print0(text)
        self.close()
        return metrics

    def close(self):
        if self.log:
            self.log.close()
        if self.world_size > 1:
            dist.destroy_process_group()

    # ---- the ranks

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """`tensor` summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value):
        """The largest of the ranks' whole numbers; by gloo, so that asking at every step never waits for a GPU."""
        if self.world_size > 1:
            tensor = torch.tensor(value, dtype=torch.int64)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            value = int(tensor)
        return value

    def gather(self, value):
        """[the value of each rank], on every rank: numbers, texts, lists and dicts of them; by gloo."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag):
        """True on every rank where `flag` is true on one."""
        return self.max(int(bool(flag))) > 0

    def barrier(self):
        self.max(0)

    def on_main(self, work):
        """work() on the main rank while the others wait; its result there. Where it raises, every rank does."""
        result = failure = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        if self.any(failure):
            raise failure or UserError('the main rank stopped; its message says why')
        return result

    def print0(self, text):
        """Print on the main rank, above the progress bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()      # a log in a file is read while the run goes on


def setup(device='auto', dtype='auto', matmul='auto'):
    """Choose device and precision, join the process group that torchrun's environment describes; returns a Run.

    device  auto (cuda, then mps, then cpu), cpu, mps, cuda, cuda:1
    dtype   auto (CUDA: bfloat16 where the card has it, else float16; elsewhere float32), float32, bfloat16, float16
    matmul  auto, float32, bf16. On a CPU auto is bf16 where the processor multiplies it (AVX-512 bf16, AMX).
            On CUDA it concerns what autocast leaves in float32: TF32, unless float32 is asked for.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    kind, _, index = device.partition(':')
    for flag, value, known in (('device', kind, ('auto', 'cuda', 'mps', 'cpu')), ('dtype', dtype, ('auto', *DTYPES)),
                               ('matmul', matmul, ('auto', 'float32', 'bf16'))):
        if value not in known:
            raise UserError(f"--{flag}: '{value}' is none of {', '.join(known)}")
    has = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available() and world_size == 1}
    if kind == 'auto':
        kind = next(name for name in ('cuda', 'mps', 'cpu') if has[name])
    if not has[kind]:
        needs = {'cuda': 'an NVIDIA GPU and a CUDA build of PyTorch', 'mps': 'an Apple GPU and a single process'}[kind]
        raise UserError(f'--device={device} needs {needs}, which are not here; use --device=auto or --device=cpu')
    if kind == 'cuda':
        index, count = local_rank if world_size > 1 else int(index or 0), torch.cuda.device_count()
        if index >= count:
            raise UserError(f'process {local_rank} needs GPU {index}, but there are {count}: start {count} processes')
        torch.cuda.set_device(index)

    notes, bf16_cuda = [], kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = DTYPES.get(dtype, torch.float32 if kind != 'cuda' else torch.bfloat16 if bf16_cuda else torch.float16)
    if kind == 'cuda':
        torch.set_float32_matmul_precision('highest' if matmul == 'float32' else 'high')
        if amp == torch.bfloat16 and not bf16_cuda:
            notes.append(f'{torch.cuda.get_device_name()} has no bf16 units: --dtype=float16 is faster')
    if kind == 'cpu':
        fast = any(getattr(torch.cpu, name, bool)() for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))
        if matmul == 'bf16' and not fast:
            notes.append('--matmul=bf16: this processor has no bf16 instructions; --matmul=float32 is faster')
        matmul = matmul if matmul != 'auto' else 'bf16' if fast else 'float32'
        if amp != torch.float32:
            notes.append(f'{dtype} on a CPU means float32, with matrix products in {matmul}')
            amp = torch.float32

    if kind == 'cpu':
        keep_freed_memory()
        for cache in ('ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY'):     # two caches of kernels for bf16 products, a thousand
            os.environ.setdefault(cache, '256')                                     # sizes each: gigabytes where every batch has its own
    run = Run(torch.device(kind, index) if kind == 'cuda' else torch.device(kind), amp,
              matmul if kind == 'cpu' else 'float32', rank, local_rank, world_size)
    if world_size > 1:
        local = os.environ.get('MASTER_ADDR') in ('127.0.0.1', 'localhost', '::1')
        if local and 'lo' in dict(socket.if_nameindex()).values():
            os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')       # which is there without a network, too
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo',
                                device_id=run.device if kind == 'cuda' else None)
    for note in notes:
        run.print0(note)
    return run


def keep_freed_memory():
    """Asks glibc to keep freed blocks: else every large activation is mapped and faulted in anew, 5% of a step."""
    with contextlib.suppress(OSError, AttributeError):      # another C library has no such setting
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                           # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)                           # M_TRIM_THRESHOLD


def seed_for(seed, *purpose):
    """A 63-bit seed for one purpose: seed_for(1337, 'data', step, index).

    A hash, not a stream: what is drawn for step 900 depends neither on the steps before it nor on the number of ranks
    nor on other purposes, so an exact resume needs no saved random state.
    """
    key = '|'.join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), 'little') >> 1


def describe_device(run):
    """One line: what computes, in which precision, in how many processes."""
    if run.device.type == 'cuda':
        card = torch.cuda.get_device_properties(run.device)
        text = f'{card.name} ({card.total_memory / 2**30:.0f} GiB), {str(run.dtype)[6:]}'
    else:
        text = f'{run.device.type} ({platform.machine()}, {torch.get_num_threads()} threads), {str(run.dtype)[6:]}'
    products = ', bf16 matrix products' if run.matmul == 'bf16' else ''
    return text + products + (f', {run.world_size} processes' if run.world_size > 1 else '')


@contextlib.contextmanager
def explain_out_of_memory(*flags):
    """Running out of memory inside becomes one line that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:    # torch.OutOfMemoryError is a RuntimeError; a CPU's has no class
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise UserError(f'out of memory: lower {" or ".join(flags)}') from None


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2); 1 in every other precision.

    (loss * scale.value).backward(); scale.unscale_(optimizer.grads); finite = norm.isfinite(); scale.update(finite)
    The scale halves where a gradient overflowed and doubles after 2000 steps without; `state` goes into a checkpoint.
    """

    def __init__(self, dtype, state=None):
        self.active = dtype == torch.float16
        self.value, self.good_steps = (state or (2.0 ** 16, 0)) if self.active else (1.0, 0)

    @property
    def state(self):
        return [self.value, self.good_steps]

    def unscale_(self, grads):
        if self.active:
            torch._foreach_mul_(grads, 1 / self.value)

    def update(self, finite):
        """True where only the scale made the gradient overflow: skip the step, it is no fault of the model's."""
        if not self.active or not finite and self.value <= 1:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite or self.good_steps % 2000 == 0:
            self.value *= 2 if finite else 0.5
        return not finite


class Stop:
    """SIGINT and SIGTERM set a flag for the loop: `if stop.requested:` save, say resume_command(), sys.exit(stop.code).

    `requested` is agreed over the ranks: all of them ask at the same points of the loop.
    """

    def __init__(self, run):
        self.run, self.signum, self.when = run, 0, 0.0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum, frame):
        # torchrun passes on a Ctrl-C that the terminal has sent to every process already: within a second it is one.
        if self.signum and signum == signal.SIGINT and time.monotonic() - self.when > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif not self.signum:
            self.signum, self.when = signum, time.monotonic()
            if self.run.is_main:        # print() is not safe in here
                os.write(2, f'\n{signal.Signals(signum).name}: stopping after this step (Ctrl-C: at once)\n'.encode())

    @property
    def requested(self):
        self.signum = self.run.max(self.signum)
        return self.signum > 0

    @property
    def code(self):
        return 128 + self.signum        # 130 SIGINT, 143 SIGTERM


def resume_command(argv=None, flag='--resume'):
    """This command line again, with `flag` ('--init_from=resume') in place of an earlier value of it."""
    argv, name = list(sys.argv if argv is None else argv), flag.split('=')[0]
    for i in reversed(range(1, len(argv))):
        if argv[i].split('=')[0].replace('-', '_') == name.replace('-', '_'):
            del argv[i:i + 1 + ('=' in flag and '=' not in argv[i])]        # its value may be the next word
    ranks = os.environ.get('LOCAL_WORLD_SIZE')
    return shlex.join([*(['torchrun', f'--nproc_per_node={ranks}'] if ranks else ['python']), *argv, flag])
