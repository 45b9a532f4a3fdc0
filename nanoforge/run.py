"""A run's life around a script's own loop: device and ranks, start, resume, gradient step, saving, the end.

    run = Run.open(cfg, 'train_gpt.py', cfg.out_dir)            # then run.cfg: of a resumed run the saved one
    state = run.restore(State(), optimizer, ema)                # of the checkpoint that is resumed, if one is
    log = run.start(cfg.max_iters, state.step, header={'data': ...}, log_interval=10)
    while True:
        run.exit_if_asked(save)                                 # SIGINT, SIGTERM
        with run.autocast():
            loss = ...
        run.backward(loss)                                      # for each micro-batch
        grad_norm = run.step(optimizer, lr, cfg.grad_clip)      # sum over ranks, clip, step
    return run.finish(metrics, 'python sample.py out')
"""
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, as_dict, without_effect
from data.fingerprint import fingerprints
from model import save_model
from nanoforge.checkpoint import (Checkpoints, append_text, read_checkpoint, resume_config,
                                  start_fresh)
from nanoforge.errors import MainRankFailed
from nanoforge.heartbeat import Heartbeat
from nanoforge.launch import launched
from nanoforge.log import Log, check_wandb
from nanoforge.optim import Plateau
from nanoforge.tensors import Gathering, assign

MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops
# settings that may name a checkpoint in the output folder
LOADED = 'base_model_name', 'load_checkpoint', 'value_model_name', 'reward_model_path', 'gpt2_type'
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
    """{prefix of its tensors' names in a checkpoint: optimizer}; of a single optimizer the prefix is ''."""
    return optimizers if isinstance(optimizers, dict) else {'': optimizers}


@dataclass
class Run:
    """One process of a run: where it computes, in which precision, which rank it is, and what it has open.

    setup() gives the six fields below, Run.open() the rest:

    cfg, script     the configuration, of a resumed run the saved one; the file name of the script
    checkpoints     the Checkpoints of the output folder
    resumed         the path of the checkpoint that the run goes on from, or None
    saved           what run_config.json held of a resumed run, or None
    stop            whether SIGINT or SIGTERM came (Stop)
    resume_flag     how the command line says that a run goes on
    memory_flags    the flags to lower, which an out-of-memory names
    rate_flag       the one to lower where gradients are not finite
    scaler          the loss scale of float16 (LossScale)
    bad_steps       optimizer steps in a row that were skipped
    window          of the resumed checkpoint: the log line that was being gathered (Log.window_to_save)
    log             the Log, from start() on
    sampler         what draws completions on servers, in a script that has --sampler_url (Sampler)
    """
    device: torch.device
    dtype: torch.dtype      # of autocast; parameters and optimizer state are always float32
    matmul: str             # 'float32' or 'bf16': how the layers multiply matrices
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    tensor_parallel: int = 1        # so many neighbouring processes hold a model together, and see the same
    tp_rank: int = 0        # rows: rank, world_size, sum() and gather() count them as one. Which this one is

    dp_group = None         # the ranks that see other rows: all of them, unless tensor_parallel is above 1
    text_log = None         # a file that takes what print0 prints, too
    mesh = None             # of the ranks that share models, where --shard is given (shard.py)

    def __post_init__(self):
        self.cfg = self.script = self.checkpoints = self.resumed = self.saved = self.stop = self.log = None
        self.heartbeat = self.sampler = None
        self.resume_flag, self.rate_flag, self.memory_flags = '--resume', '--learning_rate', ('--batch_size',)
        self.scaler, self.bad_steps, self.window = LossScale(self.dtype), 0, None
        self.sharded = []       # the models whose weights lie on several ranks

    # ---- the beginning

    @classmethod
    def open(cls, cfg, script, out_dir, resume=False, resume_flag='--resume', from_start=False,
             memory_flags=(), limit=2, save_only_model=False, checkpoint=None):
        """Joins the ranks, takes over the signals, and finds the checkpoint to resume from; returns a Run.

        run.cfg         the configuration: where a run resumes the saved one, but for what was typed again
        run.resumed     the path of the checkpoint that is resumed, or None
        resume          whether to go on with the run in out_dir; 'auto': only where there is one
        memory_flags    the flags to lower that an out-of-memory names
        limit, save_only_model  of a script without the flags save_total_limit and save_only_model
        checkpoint      the checkpoint to go on from, if not the newest
        """
        saved, shards = None, cfg.tensor_parallel
        if resume or from_start:
            cfg, saved = resume_config(cfg, out_dir, script, resume_flag, from_start)
            cfg.tensor_parallel = shards            # as many as were started now
        # a plan holds its models on the meta device, where they have shapes and no numbers
        run = (Run(torch.device('meta'), torch.float32, 'float32') if cfg.plan
               else setup(cfg.device, cfg.autocast_dtype(), cfg.matmul))
        if shards > 1 and not cfg.plan:
            run.share_models(shards)
        if dist.is_initialized():
            token = run.max(secrets.randbits(62))       # the highest of them: all have the same
            run.heartbeat = Heartbeat(dist.get_rank(), dist.get_world_size(), token)
            check_folder_is_shared(run, out_dir, saved)
        run.cfg, run.script, run.saved, run.stop = cfg, script, saved, Stop(run)
        run.resume_flag, run.memory_flags = resume_flag, memory_flags or run.memory_flags
        limit = getattr(cfg, 'save_total_limit', limit)         # where it resumes, of the saved settings
        save_only_model = getattr(cfg, 'save_only_model', save_only_model)
        run.checkpoints = Checkpoints(out_dir, run, limit, save_only_model)
        reading = (getattr(cfg, name, False) for name in ('plan', 'eval_only', 'check_data'))
        only_reads = from_start or any(reading)
        if saved and not from_start:
            run.resumed = checkpoint or run.checkpoints.latest()
            if not run.resumed and resume != 'auto':
                raise UserError(f'{out_dir} holds no whole checkpoint to resume from; start anew without '
                                f'{resume_flag}')
            if run.resumed and not only_reads:
                run.on_main(run.checkpoints.lock)       # a new run: where start() makes its folder
            run.print0(f'resume    {run.resumed or "no checkpoint is whole: a new run"}')
        if cfg.reports_to('wandb') and not only_reads:
            run.on_main(check_wandb)
        for line in without_effect(cfg):
            run.print0(f'note      {line}')
        if hasattr(cfg, 'sampler_url'):
            from nanoforge.sampler_client import Sampler
            run.sampler = Sampler(cfg, run)
        return run

    def restore(self, state, optimizers, ema=None, parameters=None):
        """Takes from the resumed checkpoint what it holds besides the model; returns `state`.

        Fills `state`, the optimizers, the mean of the weights. Several optimizers come as {prefix:
        optimizer}, whose tensors are named so; and `parameters` {prefix: {name: tensor}} outside the model
        are overwritten in place. Without a checkpoint nothing changes.
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
            self.print0(f'note      the run used {saved["optimizer"]}; {state.optimizer} starts afresh')
        with torch.no_grad():
            for prefix, live in parameters.items():
                for name, tensor in parts[prefix].items():
                    assign(live[name], tensor)            # in place: an optimizer's flat buffer holds them
        for optimizer in optimizers.values():
            optimizer.update_copies()
        known = {**saved.get('progress', {}), **saved}      # 'progress': as earlier versions nested them
        for entry in fields(state):
            if known.get(entry.name) is not None and entry.name != 'optimizer':
                setattr(state, entry.name, known[entry.name])
        self.scaler = LossScale(self.dtype, saved['loss_scale'])
        self.bad_steps, self.window = saved.get('bad_steps', 0), saved.get('window')
        return state

    def ended(self, state, total_steps, flag='num_train_epochs'):
        """Where the resumed run had ended before: says how it goes on, and returns what main() does. Else
        None.

        flag    what sets its length, if not max_steps
        """
        cfg = self.cfg
        lost_patience = 0 < getattr(cfg, 'patience', 0) <= state.evaluations_since_best
        if not self.resumed or self.saved.get('ended_at') != state.step:
            return None         # it may have been killed after its last checkpoint: there is something to do
        if state.step < total_steps and not lost_patience:
            return None
        if getattr(cfg, 'max_steps', 0) > 0:
            flag = 'max_steps'
        length = getattr(cfg, flag)
        if flag != 'num_train_epochs':              # in steps; a shorter length may have been typed
            length = max(length, state.step)
        way = f'--{flag}=N goes on, with N above {length:g}'
        if lost_patience:
            way = f'--patience=0 goes on, as it stopped by patience={cfg.patience}'
        return self.finish({'step': state.step, 'best_eval_loss': state.best_eval_loss},
                           f'{self.checkpoints.out_dir}: the run has ended at step {state.step}; '
                           f'{self.resume_flag} {way}')

    def start(self, total_steps, step, header, log_interval, name=None, directory=None, flops_per_token=0,
              data=()):
        """Makes the output folder ready (a fresh one, or cut back to the resumed step) and opens the log.

        header           what this run is, for the first line of log.jsonl
        directory, name  of the log, if not those of the output folder
        data             what is read, as fingerprints() takes it: a resume says where it has changed
        """
        cfg, out_dir = self.cfg, str(self.checkpoints.out_dir)
        marks = self.on_main(lambda: fingerprints(data))
        if self.resumed:
            if hasattr(cfg, 'per_device_train_batch_size'):     # else a batch is counted over all ranks
                self.checkpoints.say_processes(self.resumed)
            self.checkpoints.discard_later(self.resumed)
            self.on_main(lambda: self.note_resume(marks))
        else:
            loaded = [getattr(cfg, name, None) for name in LOADED]
            start_fresh(self, out_dir, as_dict(cfg), loaded, self.script, self.checkpoints.lock, data=marks)
        header = {'script': self.script, **header, 'machine': describe_device(self)}
        wandb = {key: getattr(cfg, f'wandb_{key}') for key in ('project', 'entity', 'name', 'tags')}
        wandb = {key: value for key, value in wandb.items() if value}
        self.log = Log(self, directory or out_dir, header, total_steps, cfg.reports_to('tensorboard'),
                       wandb if cfg.reports_to('wandb') else None,
                       step if self.resumed else None, name, log_interval)
        self.log.flops_per_token = flops_per_token
        if isinstance(self.window, dict):
            self.log.take_up(self.window)
        return self.log

    def note_resume(self, marks):
        """Puts into run_config.json what was typed, and the fingerprints of the data as they are now; says
        which are not what they were."""
        before = self.saved.get('data') or {}       # a run of an earlier version has none
        for name, mark in marks.items():
            if before.get(name, mark) != mark:
                self.print0(f'note      {name} has changed since this run was saved: from here on it trains '
                            'on other data')
        self.checkpoints.note(config=as_dict(self.cfg), data=marks, ended_at=None)

    # ---- models: compiled, and with their weights on several ranks

    def prepare(self, model):
        """A model as the run computes with it, which is returned: its layers compiled where --compile is set,
        computed again in the backward pass where --gradient_checkpointing is, and this rank's part of it
        where --shard or --tensor_parallel is. Call it when the model has its weights and adapters, and before
        it gets an optimizer."""
        if getattr(self.cfg, 'compile', False) and not getattr(model, 'compiled', False):
            if not hasattr(model, 'layers'):
                raise UserError(f'--compile does not go together with {model.config.arch}, which runs as '
                                'transformers has it: leave out --compile')
            model.compile_layers()
        if self.cfg:
            model.gradient_checkpointing = self.cfg.gradient_checkpointing and self.cfg.checkpoint_every
        return self.shard(model)

    def share_models(self, n):
        """From here on n neighbouring processes are a rank of data parallelism, which holds a model."""
        if self.world_size % n:
            raise UserError(f'tensor_parallel={n} processes hold a model, but there are {self.world_size}: '
                            f'start a multiple of {n}')
        ranks = torch.arange(self.world_size).view(-1, n)
        self.dp_group, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist())
        self.rank, self.tp_rank = divmod(self.rank, n)
        self.world_size, self.tensor_parallel = self.world_size // n, n
        self.matmul = 'float32'     # bf16 products on a CPU round a weight by where it stands in the whole

    @property
    def gathers_weights(self):
        """Whether forward passes gather weights of other ranks (--shard)."""
        return self.world_size > 1 and getattr(self.cfg, 'shard', 'none') != 'none'

    def shard(self, model):
        """Leaves this rank's part of a model's weights in it, as --shard and --tensor_parallel say; returns
        the model."""
        if not self.gathers_weights and self.tensor_parallel == 1:
            return model            # one process holds everything
        if any(model is other for other in self.sharded):           # several policies may share it
            return model
        from nanoforge import shard
        mode = self.cfg.shard if self.gathers_weights else 'none'
        self.mesh = self.mesh or shard.make_mesh(self, mode)
        if self.tensor_parallel > 1:
            from nanoforge.parallel import parallelize
            parallelize(model, self.mesh['tensor'])
            self.print0(f'parallel  {self.tensor_parallel} processes hold a model of {model.num_params():,} '
                        "parameters together, each its part of the layers' heads and inner channels")
        if self.gathers_weights:
            shard.shard_model(model, self.mesh)
            self.print0(f'shard     {mode}: {model.num_params():,} parameters, of which each process '
                        f"holds 1/{self.mesh['shard'].size()} and gathers a block's when it computes with it")
        self.sharded.append(model)
        return model

    def unsharded(self):
        """Within, every rank holds the sharded models whole, and may call them without the others.

        Not so under tensor parallelism, where the processes of a rank go on calling models together: whoever
        has one generate asks for run.rank, not for run.is_main.
        """
        if not self.gathers_weights:
            return contextlib.nullcontext()
        from nanoforge.shard import unsharded
        return unsharded(self.sharded)

    def release(self, model):
        """A sharded model is used no more: nothing of it is held here, or gathered."""
        self.sharded = [other for other in self.sharded if other is not model]

    def gathering(self, tensors=()):
        """Within, work on the main rank can save sharded models, and these tensors, in one piece."""
        live = [*(p for model in self.sharded for p in model.parameters()), *tensors]
        return Gathering(live) if self.sharded else contextlib.nullcontext()

    def even(self, batches, policy, *frozen, critic=None):
        """This rank's micro-batches. Of sharded models the ranks must make as many forward passes each: one
        that has fewer micro-batches makes the missing ones, which count nothing.

        policy  the model that a micro-batch sends through forward and backward, and behind it the `critic`
                if there is one (ValueModel; also alone, as the policy); then the `frozen` ones go forward in
                this order, those that are not sharded left out
        """
        most = self.max(len(batches)) if self.sharded and self.gathers_weights else 0
        yield from batches
        if len(batches) >= most:
            return
        from nanoforge.shard import one_token
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        trained = [policy, critic] if critic and critic.owns_backbone else [policy]
        for _ in range(len(batches), most):
            with self.autocast():
                nothing = sum(0.0 * one_token(model, token) for model in trained)
                with torch.no_grad():
                    for model in frozen:
                        if any(model is other for other in self.sharded):
                            model.hidden(token)
            self.backward(nothing)

    # ---- a gradient step

    @contextlib.contextmanager
    def autocast(self):
        """Mixed precision on a GPU; out of memory in here is one line that names the flags to lower."""
        plain = self.dtype == torch.float32
        with explain_out_of_memory(*self.memory_flags):
            with contextlib.nullcontext() if plain else torch.autocast(self.device.type, self.dtype):
                yield

    def backward(self, loss):
        """Adds the gradient of a micro-batch's part of the loss (divided by the whole step's count)."""
        with explain_out_of_memory(*self.memory_flags):
            (loss * self.scaler.value).backward()

    def step(self, optimizers, lr, max_norm, zero_grad=True):
        """One optimizer step on the gradients that backward() added up; returns their norm before clipping.

        Sums over ranks, undoes the loss scale, clips to max_norm (0: never), steps, empties the gradients
        (zero_grad=False: the script does, which looks at them first). Where a norm is not finite no optimizer
        steps; after MAX_BAD_STEPS such steps in a row the run stops. With several optimizers (then lr is a
        list, too) the norms come as a list.
        """
        several = isinstance(optimizers, (list, tuple))
        pairs = list(zip(optimizers, lr)) if several else [(optimizers, lr)]
        norms = []
        for optimizer, rate in pairs:
            optimizer.set_lr(rate)
            for grad in optimizer.grads_to_sum:
                self.sum(grad)
            self.scaler.unscale_(optimizer.grads)
            norms.append(float(optimizer.clip_grad_norm(max_norm)))
        finite = all(map(math.isfinite, norms))
        for optimizer, _ in pairs:
            if finite:
                optimizer.step()
            if zero_grad:
                optimizer.zero_grad()
        overflowed = self.scaler.update(finite)     # the scale was too high, and the model is well
        self.count_bad_step(finite or overflowed)
        return norms if several else norms[0]

    def count_bad_step(self, good):
        """Says that a step was skipped; UserError after MAX_BAD_STEPS in a row."""
        self.bad_steps = 0 if good else self.bad_steps + 1
        if not good:
            where = f'step {self.log.last_step + 1}: ' if self.log else ''
            self.print0(f'{where}the gradient is not finite, the step is skipped ({self.bad_steps} in a row)')
        if self.bad_steps == MAX_BAD_STEPS:
            value = getattr(self.cfg, self.rate_flag[2:], None)
            shown = self.rate_flag if value is None else f'{self.rate_flag}={value:g}'
            raise UserError(f'{self.bad_steps} steps in a row without a finite gradient: lower {shown}; the '
                            f'checkpoints that {self.checkpoints.out_dir} may hold are good')

    @contextlib.contextmanager
    def flags_to_lower(self, rate_flag, *memory_flags):
        """Inside trains something beside the script's own loop: what an error there says to lower."""
        before = self.rate_flag, self.memory_flags
        self.rate_flag, self.memory_flags = rate_flag, memory_flags
        try:
            yield
        finally:
            self.rate_flag, self.memory_flags = before

    # ---- saving, and the end

    def save(self, state, model, tokenizer, optimizers, ema=None, best=False, name=None, parameters=None,
             write=None, **more):
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
            for prefix, live in (parameters or {}).items():
                tensors.update((prefix + key, p.detach()) for key, p in live.items())
            with self.gathering(tensors.values()):
                self.checkpoints.save(state.step, write, tensors, saved, best, name)

    def exit_if_asked(self, save):
        """After SIGINT or SIGTERM on any rank: save(), say how to go on, end the process with 130 or 143."""
        if not self.stop.requested:
            return
        save()
        self.print0(f'stopped at step {self.log.last_step}, saved; go on with: '
                    f'{resume_command(flag=self.resume_flag)}')
        self.close()
        raise SystemExit(self.stop.code)

    def finish(self, metrics, text):
        """Closes everything, prints `text`, and returns the metrics of the run."""
        if self.log:                # it trained: notes where it ended, and so that nothing is left to do
            self.on_main(lambda: self.checkpoints.note(ended_at=self.log.last_step))
        self.close()
        self.print0(text)
        return metrics

    def close(self):
        if self.heartbeat:
            self.heartbeat.stop()
        if self.log:
            self.log.close()
        if self.checkpoints:
            self.checkpoints.unlock()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- the ranks

    @property
    def is_main(self):
        """Of all processes one, which writes."""
        return self.rank == 0 and self.tp_rank == 0

    @property
    def num_processes(self):
        return self.world_size * self.tensor_parallel

    def sum(self, tensor):
        """`tensor` summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def gather(self, rows):
        """The rows of all ranks, one rank's after the other's, of what JSON can hold. Every rank calls it.

        Processes that hold a model together have the same rows: those of the first count, for all of them.
        """
        if self.num_processes == 1:
            return rows
        rows = [] if self.tp_rank else rows
        text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num_processes)]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        padded = text.new_zeros(max(map(int, sizes)))
        padded[:len(text)] = text
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered = []
        for part, size in zip(parts, sizes):
            gathered += json.loads(bytes(part[:int(size)].tolist()))
        return gathered

    def max(self, value):
        """The largest of all processes' whole numbers; by gloo, so that asking at each step waits for no
        GPU."""
        if self.num_processes > 1:
            tensor = torch.tensor(value, dtype=torch.int64)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            value = int(tensor)
        return value

    def any(self, flag):
        """True on every rank where `flag` is true on one."""
        return self.max(int(bool(flag))) > 0

    def barrier(self):
        self.max(0)

    def on_main(self, work):
        """work() on the main rank while the others wait; its result there. If it raises, every rank does."""
        result = failure = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        if Gathering.current:           # work() may have asked the others for their parts of tensors
            Gathering.current.end() if self.is_main else Gathering.current.serve()
        if self.any(failure):
            raise failure or MainRankFailed('the main rank stopped; its message says why')
        return result

    def print0(self, text):
        """Print on the main rank, above the progress bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()      # a log in a file is read while the run goes on
            if self.text_log:
                append_text(self.text_log, text + '\n')


def setup(device='auto', dtype='auto', matmul='auto'):
    """Chooses device and precision, joins the process group of torchrun's environment; returns a Run.

    device  auto (cuda, then mps, then cpu), cpu, mps, cuda, cuda:1
    dtype   auto (CUDA: bfloat16 where the card has it, else float16; elsewhere float32), float32, bfloat16,
            float16
    matmul  auto, float32, bf16. On a CPU auto is bf16 where the processor multiplies it (AVX-512 bf16, AMX).
            On CUDA it concerns what autocast leaves in float32: TF32, unless float32 is asked for.
    """
    rank, local_rank, world_size = launched()
    kind, _, index = device.partition(':')
    for flag, value, known in (('device', kind, ('auto', 'cuda', 'mps', 'cpu')),
                               ('dtype', dtype, ('auto', *DTYPES)),
                               ('matmul', matmul, ('auto', 'float32', 'bf16'))):
        if value not in known:
            raise UserError(f"--{flag}: '{value}' is none of {', '.join(known)}")
    available = {'cuda': torch.cuda.is_available(),
                 'mps': torch.backends.mps.is_available() and world_size == 1, 'cpu': True}
    if kind == 'auto':
        kind = next(name for name, is_available in available.items() if is_available)
    if not available[kind]:
        needs = {'cuda': 'an NVIDIA GPU and a CUDA build of PyTorch',
                 'mps': 'an Apple GPU and a single process'}[kind]
        raise UserError(f'--device={device} needs {needs}, which are not here; use --device=auto or cpu')
    if kind == 'cuda':
        index, count = local_rank if world_size > 1 else int(index or 0), torch.cuda.device_count()
        if index >= count:
            raise UserError(f'process {local_rank} needs GPU {index}, but there are {count}: start {count} '
                            'processes')
        torch.cuda.set_device(index)

    amp, notes = DTYPES.get(dtype, torch.float32), []
    torch_device = torch.device(kind, index) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == 'auto':
            amp = torch.bfloat16 if has_bf16 else torch.float16
        elif amp == torch.bfloat16 and not has_bf16:
            notes.append(f'{torch.cuda.get_device_name()} has no bf16 units: --dtype=float16 is faster')
        torch.set_float32_matmul_precision('highest' if matmul == 'float32' else 'high')
    if kind == 'cpu':
        has_bf16 = cpu_multiplies_bf16()
        if matmul == 'bf16' and not has_bf16:
            notes.append('--matmul=bf16: this processor has no bf16 instructions; --matmul=float32 is faster')
        if matmul == 'auto':
            matmul = 'bf16' if has_bf16 else 'float32'
        if amp != torch.float32:
            notes.append(f'{dtype} on a CPU means float32, with matrix products in {matmul}')
            amp = torch.float32
        keep_freed_memory()
        # two caches of kernels for bf16 products, of a thousand sizes each: gigabytes where no two batches
        # have the same
        for cache in ('ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY'):
            os.environ.setdefault(cache, '256')

    if kind != 'cpu':           # where autocast is bfloat16, weights are rounded by us: see kernels.dither
        matmul = 'bf16' if kind == 'cuda' and amp == torch.bfloat16 else 'float32'
    run = Run(torch_device, amp, matmul, rank, local_rank, world_size)
    if world_size > 1:
        restarts = os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0'
        if restarts and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':   # pytorch issue 135712
            notes.append('torchrun --max_restarts works with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it: '
                         'without, ranks that it starts again look for those of the start before')
        local = os.environ.get('MASTER_ADDR') in ('127.0.0.1', 'localhost', '::1')
        if local and 'lo' in dict(socket.if_nameindex()).values():
            os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')       # which is there without a network, too
        with explain_waiting(world_size):
            dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo',
                                    device_id=run.device if kind == 'cuda' else None)
    for note in notes:
        run.print0(note)
    return run


def check_folder_is_shared(run, out_dir, saved):
    """UserError on every rank where some have found a run to resume in out_dir and others none (saved is
    None)."""
    if run.any(saved) and run.any(not saved):
        raise UserError(f'not all ranks find the run in {out_dir}: several machines need an output folder on '
                        'a file system that they share')


@contextlib.contextmanager
def explain_waiting(world_size):
    """Says for whom the ranks wait where they do not all come; UserError where torch has waited enough."""
    where = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    line = f'waiting for all of WORLD_SIZE={world_size} processes at {where}'
    timer = threading.Timer(20, print, [line], {'file': sys.stderr, 'flush': True})
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'the WORLD_SIZE={world_size} processes do not meet at {where}: {reason}') from None
    finally:
        timer.cancel()


def cpu_multiplies_bf16():
    # some builds of torch have neither
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


def keep_freed_memory():
    """Asks glibc to keep freed blocks: else each large activation is mapped anew, which is 5% of a step."""
    with contextlib.suppress(OSError, AttributeError):      # another C library has no such setting
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                           # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)                           # M_TRIM_THRESHOLD


def seed_for(seed, *purpose):
    """A 63-bit seed for one purpose: seed_for(1337, 'data', step, index).

    A hash, not a stream: what is drawn for step 900 depends neither on the steps before it nor on the number
    of ranks nor on other purposes, so an exact resume needs no saved random state.
    """
    key = '|'.join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), 'little') >> 1


def describe_device(run):
    """One line: what computes, in which precision, in how many processes."""
    if run.device.type == 'cuda':
        card = torch.cuda.get_device_properties(run.device)
        text = f'{card.name} ({card.total_memory / 2**30:.0f} GiB), {str(run.dtype)[6:]}'
    else:
        threads = torch.get_num_threads()
        text = f'{run.device.type} ({platform.machine()}, {threads} threads), {str(run.dtype)[6:]}'
    products = ', bf16 matrix products' if run.matmul == 'bf16' else ''
    return text + products + (f', {run.num_processes} processes' if run.num_processes > 1 else '')


@contextlib.contextmanager
def explain_out_of_memory(*flags):
    """Running out of memory inside becomes one line that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:    # on a CPU it has no class of its own
        said = re.search("out of memory|can't allocate memory", str(error))
        if isinstance(error, RuntimeError) and not said:
            raise
        raise UserError(f'out of memory: lower {" or ".join(flags)}') from None


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2); 1 in every other precision.

        (loss * scale.value).backward()
        scale.unscale_(optimizer.grads)
        scale.update(finite=norm.isfinite())

    It halves where a gradient overflowed and doubles after 2000 steps without; `state` goes into a
    checkpoint.
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
        """True where the gradient overflowed by the scale alone: the step is skipped, the model is well."""
        if not self.active or not finite and self.value <= 1:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite or self.good_steps % 2000 == 0:
            self.value *= 2 if finite else 0.5
        return not finite


class Stop:
    """SIGINT and SIGTERM set a flag for the loop: `if stop.requested:` save, and exit with stop.code.

    `requested` is agreed over the ranks: all of them ask at the same points of the loop.
    """

    def __init__(self, run):
        self.run, self.signum, self.when = run, 0, 0.0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum, frame):
        # torchrun passes on a Ctrl-C that the terminal sent to each process already: within a second it is
        # one
        if self.signum and signum == signal.SIGINT and time.monotonic() - self.when > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif not self.signum:
            self.signum, self.when = signum, time.monotonic()
            if self.run.is_main:        # print() is not safe in here
                name = signal.Signals(signum).name
                os.write(2, f'\n{name}: stopping after this step (Ctrl-C: at once)\n'.encode())

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
            value_follows = '=' in flag and '=' not in argv[i]
            del argv[i:i + 1 + value_follows]
    ranks = os.environ.get('LOCAL_WORLD_SIZE')
    return shlex.join([*(['torchrun', f'--nproc_per_node={ranks}'] if ranks else ['python']), *argv, flag])
