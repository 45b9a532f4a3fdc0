"""What every script needs around its loop, and no loop: the machine, counter-based seeds, checkpoints and resume, stop signals, the log.

A checkpoint is written under a temporary name, synced and renamed, so a folder called checkpoint-N is whole; its manifest holds
sizes and hashes, so a damaged one is recognised and the one before is used.
"""
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from configurator import UserError

# Dense bf16 peak, FLOP/s, from the makers' data sheets; the first name that the device's contains
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, '4090': 165e12, '3090': 71e12,
              'V100': 125e12, 'T4': 65e12}
OURS = ('run_config.json', 'config.json', 'generation_config.json', 'model.safetensors', 'model.safetensors.index.json', 'tokenizer.json',
        'tokenizer_config.json', 'chat_template.jinja', 'log.jsonl', 'loss.png', 'samples.txt', 'last', 'best')


# ---- the machine ------------------------------------------------------------------------------------------------------------

class Machine:
    """This process's place among the ranks, its device and its precision."""

    def __init__(self, device, dtype, matmul):
        self.rank, self.local_rank = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.is_main = self.rank == 0
        self.device, self.dtype, self.matmul = device, dtype, matmul

    def autocast(self):
        """bf16 or fp16 on a GPU; nothing on a CPU, where the model's linear layers choose (GPT.set_matmul)."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, tensor):
        """The sum over ranks, in place."""
        if self.world_size > 1:
            if tensor.device.type != self.device.type:      # nccl reduces only what is on the GPU
                tensor.copy_(self.sum(tensor.to(self.device)))
            else:
                dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether any rank says so: what all must do together."""
        return bool(self.sum(torch.tensor(float(flag)))) if self.world_size > 1 else bool(flag)

    def barrier(self):
        if self.world_size > 1:
            self.sum(torch.zeros(1))

    def together(self, work):
        """work() on the main rank while the others wait; its UserError is raised on all of them, so that none hangs."""
        error = None
        if self.is_main:
            try:
                work()
            except UserError as e:
                error = e
        if self.any(error is not None):
            raise error or UserError('stopped: the main rank failed (see its message)')

    def say(self, text):
        if self.is_main:
            print(text, flush=True)

    def describe(self):
        if self.device.type == 'cuda':
            name, precision = torch.cuda.get_device_name(self.device), str(self.dtype).removeprefix('torch.')
        else:
            name = f'{self.device.type}, {torch.get_num_threads()} threads'
            precision = f'{self.matmul} matrix products, float32 weights' if self.device.type == 'cpu' else 'float32'
        return f'{name}, {precision}' + (f', {self.world_size} ranks' if self.world_size > 1 else '')

    def peak_flops(self):
        """Dense bf16 peak of the device in FLOP/s, None where it is not known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else ''
        return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(device='auto', dtype='auto', matmul='auto'):
    """The Machine of this process; joins the process group that torchrun's environment describes. UserError for what is not there."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f'--device={device} is none: auto, cpu, cuda, cuda:1 or mps') from None
    if device.type == 'cuda' and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f'--device={device}: there {"is no such GPU" if torch.cuda.is_available() else "is no GPU that torch can use"} '
                        'here; use --device=cpu or --device=auto')
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']) if 'LOCAL_RANK' in os.environ else device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        auto = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        kind = {'auto': auto, 'bfloat16': torch.bfloat16, 'float16': torch.float16}.get(dtype, torch.float32)
    else:
        kind = torch.float32                                # as documented: mixed precision is for CUDA
    fast = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    machine = Machine(device, kind, {'auto': 'bf16' if fast else 'float32'}.get(matmul, matmul))
    if device.type == 'cpu':
        keep_freed_memory()
    if machine.world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return machine


def keep_freed_memory():
    """Asks glibc to keep freed blocks: else every large activation is mapped and faulted in anew, 5% of a small model's step."""
    with contextlib.suppress(OSError, AttributeError):      # another C library: no such setting
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                           # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)                           # M_TRIM_THRESHOLD


def seed_for(seed, *purpose):
    """A 63-bit seed for (seed, purpose, counters ...): what is drawn does not depend on what was drawn before, nor on the ranks."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


class LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2); a scale of 1 that never moves for other types."""

    def __init__(self, dtype):
        self.scale, self.good, self.active = (2.0 ** 16 if dtype == torch.float16 else 1.0), 0, dtype == torch.float16

    def update(self, finite):
        if self.active:
            self.good = self.good + 1 if finite else 0
            if not finite:
                self.scale = max(self.scale / 2, 1.0)
            elif self.good % 2000 == 0:
                self.scale *= 2


@contextlib.contextmanager
def out_of_memory_hint(flag):
    """Running out of memory becomes one line that names the flag to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f'out of memory: lower {flag}') from None
    except RuntimeError as e:
        if "can't allocate memory" in str(e):
            raise UserError(f'out of memory: lower {flag}') from None
        raise


class StopSignals:
    """SIGINT and SIGTERM ask the loop to stop at the end of the step; a second SIGINT ends at once."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def _note(self, signum, frame):
        if self.signum and signum == signal.SIGINT:
            sys.exit(130)
        self.signum = signum

    def requested(self, machine):
        """The signal that some rank received, else 0: all ranks agree."""
        if machine.world_size == 1:
            return self.signum
        seen = torch.tensor([self.signum == signal.SIGINT, self.signum == signal.SIGTERM], dtype=torch.float32)
        machine.sum(seen)
        return signal.SIGTERM if seen[1] else signal.SIGINT if seen[0] else 0


# ---- checkpoints ------------------------------------------------------------------------------------------------------------

def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path, value):
    """Atomically: a reader sees the old file or the new one."""
    with open(path + '.tmp', 'w') as f:
        json.dump(value, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f'no {path}') from None
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e})') from None


def check_checkpoint(directory):
    """None when every file has the size and hash of the manifest, else what is wrong."""
    try:
        manifest = read_json(os.path.join(directory, 'manifest.json'))
        for name, (size, digest) in manifest['files'].items():
            path = os.path.join(directory, name)
            if not os.path.exists(path):
                return f'{name} is missing'
            if os.path.getsize(path) != size:
                return f'{name} is cut short' if os.path.getsize(path) < size else f'{name} has grown'
            if sha256(path) != digest:
                return f'{name} has changed'
    except (UserError, KeyError, TypeError, ValueError) as e:
        return f'no valid manifest.json ({e})'


class Checkpoints:
    """The checkpoint-N folders of one run, the links `last` and `best`, and the model to use in the root of out_dir."""

    def __init__(self, out_dir, name='checkpoint-{step}'):
        self.dir, self.name = out_dir, name

    def path(self, step):
        return os.path.join(self.dir, self.name.format(step=step))

    def steps(self):
        """Of the checkpoints on disk that nanoforge wrote, ascending."""
        pattern = re.compile(re.escape(self.name).replace(re.escape('{step}'), r'(\d+)'))
        names = os.listdir(self.dir) if os.path.isdir(self.dir) else []
        found = [int(m[1]) for m in map(pattern.fullmatch, names) if m]
        return sorted(s for s in found if os.path.exists(os.path.join(self.path(s), 'manifest.json')))

    def latest(self, say=print):
        """The newest whole checkpoint's directory; damaged ones are named and passed over. None when there is none."""
        for step in reversed(self.steps()):
            problem = check_checkpoint(self.path(step))
            if problem is None:
                return self.path(step)
            say(f'{self.path(step)} is damaged: {problem}; going back to the one before')

    def save(self, step, write_model, tensors, state, best=False, keep=None):
        """Writes checkpoint-<step>: write_model(directory), optimizer.safetensors, trainer_state.json, the manifest; then the links.

        best: it becomes `best`, and the root's model. keep: how many numbered ones stay besides best; None = all. A tensor that is
        not finite is refused, so that a checkpoint never holds a NaN.
        """
        final, temporary = self.path(step), os.path.join(self.dir, f'.tmp-{os.path.basename(self.path(step))}')
        try:
            os.makedirs(self.dir, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            write_model(temporary)
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, os.path.join(temporary, 'optimizer.safetensors'))
            refuse_nan(temporary)
            write_json(os.path.join(temporary, 'trainer_state.json'), state)
            files = sorted(os.listdir(temporary))
            for name in files:
                sync(os.path.join(temporary, name))
            manifest = {name: [os.path.getsize(os.path.join(temporary, name)), sha256(os.path.join(temporary, name))] for name in files}
            write_json(os.path.join(temporary, 'manifest.json'), {'written_by': 'nanoforge', 'step': step, 'files': manifest})
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)        # a resumed run passes the same step again
            os.rename(temporary, final)
            sync(self.dir)
            self.link('last', final)
            if best or not os.path.lexists(os.path.join(self.dir, 'best')):
                self.link('best', final)
                self.publish(final)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f'{final} could not be written: {os.strerror(e.errno) if e.errno else e}; what was saved before is intact, '
                            'free some space or use another --out_dir') from None
        except Exception as e:                              # safetensors wraps a full disk in an error of its own
            shutil.rmtree(temporary, ignore_errors=True)
            if 'No space left' in str(e) or 'I/O error' in str(e):
                raise UserError(f'{final} could not be written: {e}; what was saved before is intact') from None
            raise
        if keep is not None:
            spared = {os.path.realpath(os.path.join(self.dir, link)) for link in ('best', 'last')}
            for old in self.steps()[:-keep or None]:
                if os.path.realpath(self.path(old)) not in spared:
                    shutil.rmtree(self.path(old))

    def link(self, name, target):
        temporary = os.path.join(self.dir, f'.tmp-{name}')
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        os.symlink(os.path.basename(target), temporary, target_is_directory=True)
        os.replace(temporary, os.path.join(self.dir, name))

    def publish(self, directory):
        """Puts a checkpoint's model files into the root: hard links, or copies where those cannot be."""
        for name in os.listdir(directory):
            if name in ('manifest.json', 'trainer_state.json', 'optimizer.safetensors'):
                continue
            temporary = os.path.join(self.dir, f'.tmp-{name}')
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            try:
                os.link(os.path.join(directory, name), temporary)
            except OSError:
                shutil.copyfile(os.path.join(directory, name), temporary)
            os.replace(temporary, os.path.join(self.dir, name))


def refuse_nan(directory):
    """Reads back what was written: a value that is not finite is an error that names its tensor."""
    for file in os.listdir(directory):
        if file.endswith('.safetensors'):
            with safe_open(os.path.join(directory, file), framework='pt') as f:
                for name in f.keys():
                    tensor = f.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UserError(f'refused to save: {name} has values that are not finite; the checkpoint before is intact')


def load_checkpoint(directory):
    """(optimizer tensors {name: tensor}, trainer state) of a checkpoint folder."""
    with safe_open(os.path.join(directory, 'optimizer.safetensors'), framework='pt') as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    return tensors, read_json(os.path.join(directory, 'trainer_state.json'))


def start_fresh(out_dir, say=print):
    """Makes out_dir ready for a new run: what an earlier run of ours left there moves into earlier-K/. Nothing else is touched."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        probe = os.path.join(out_dir, '.tmp-probe')
        with open(probe, 'w'):
            pass
        os.remove(probe)
    except OSError as e:
        raise UserError(f'--out_dir={out_dir} is not a folder that can be written: {os.strerror(e.errno)}') from None
    if not os.path.exists(os.path.join(out_dir, 'run_config.json')):
        return
    checkpoints = [name for name in os.listdir(out_dir) if os.path.exists(os.path.join(out_dir, name, 'manifest.json'))
                   and not os.path.islink(os.path.join(out_dir, name))]
    k = 1
    while os.path.exists(os.path.join(out_dir, f'earlier-{k}')):
        k += 1
    earlier = os.path.join(out_dir, f'earlier-{k}')
    os.makedirs(earlier)
    moved = [name for name in (*OURS, *checkpoints) if os.path.lexists(os.path.join(out_dir, name))]
    for name in sorted(moved, key=lambda name: name == 'run_config.json'):      # last, so that a kill in between is seen again
        os.rename(os.path.join(out_dir, name), os.path.join(earlier, name))
    say(f'{out_dir} held an earlier run: its files are now in {earlier}')


def resume_command(**flags):
    """The command line that goes on with this run."""
    return shlex.join(['python', os.path.basename(sys.argv[0]), *(f'--{k}={v}' for k, v in flags.items())])


# ---- the log ----------------------------------------------------------------------------------------------------------------

FORMATS = {'learning_rate': '{:.2e}', 'grad_norm': '{:.2f}', 'tokens_per_second': '{:,.0f}', 'mfu': '{:.1%}', 'epoch': '{:.2f}'}
SHORT = {'learning_rate': 'lr', 'tokens_per_second': 'tok/s', 'grad_norm': 'grad_norm'}


class Log:
    """One place for numbers: an aligned console line under a progress bar, log.jsonl, TensorBoard, wandb.

    run_name: the folder under logs/, kept over resumes. resume_step: lines and events after it are cut off.
    """

    def __init__(self, out_dir, run_name, header, total, resume_step=None, tensorboard=True, wandb=None, is_main=True):
        from tqdm import tqdm
        self.is_main, self.path, self.total, self.events, self.wandb = is_main, os.path.join(out_dir, 'log.jsonl'), total, None, None
        if not is_main:
            return
        if resume_step is not None and os.path.exists(self.path):
            cut_log(self.path, resume_step)
        self.file = open(self.path, 'a')
        self._line({'run': run_name, **header})
        if tensorboard:
            self.events = Events(os.path.join('logs', run_name), resume_step)
        if wandb:
            try:
                import wandb as library
            except ImportError:
                raise UserError('--wandb_log needs the package wandb: pip install wandb, or leave the flag out') from None
            self.wandb = library.init(config=header, resume='allow', **wandb)
        self.bar = tqdm(total=total, initial=resume_step or 0, dynamic_ncols=True, disable=not sys.stderr.isatty(), unit='step')
        self.started, self.first = time.time(), resume_step or 0

    def _line(self, record):
        self.file.write(json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}) + '\n')
        self.file.flush()

    def say(self, text):
        if self.is_main:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, step, metrics):
        """Logs {name: number} everywhere and prints the line."""
        if not self.is_main:
            return
        self._line({'step': step, **metrics})
        if self.events:
            self.events.scalars(step, metrics)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        shown = [f'{SHORT.get(k, k)} {FORMATS.get(k, "{:.4f}" if isinstance(v, float) else "{:,}").format(v)}' for k, v in metrics.items()
                 if k != 'num_tokens']
        eta = ''
        if self.bar.disable and step > self.first and 'loss' in metrics:
            left = (time.time() - self.started) / (step - self.first) * (self.total - step)
            eta = f'  eta {int(left // 60)}:{int(left % 60):02d}'
        self.say(f'step {step:>{len(str(self.total))}}  ' + '  '.join(shown) + eta)

    def text(self, step, name, text):
        if self.is_main and self.events:
            self.events.text(step, name, text)

    def advance(self, step):
        if self.is_main:
            self.bar.update(step - self.bar.n)

    def close(self):
        if self.is_main:
            self.bar.close()
            self.file.close()
            if self.events:
                self.events.writer.close()
            if self.wandb:
                self.wandb.finish()


class Events:
    """TensorBoard's event files, by its own protobufs: the writer in torch.utils takes a second to import."""

    def __init__(self, directory, resume_step=None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        self.Event, self.Summary, self.Metadata, self.Tensor = Event, Summary, SummaryMetadata, TensorProto
        self.writer = EventFileWriter(directory)
        if resume_step is not None:         # TensorBoard drops what an earlier file holds from here on
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **content):
        self.writer.add_event(self.Event(wall_time=time.time(), step=step, **content))

    def scalars(self, step, metrics):
        values = [self.Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._add(step, summary=self.Summary(value=values))

    def text(self, step, name, text):
        metadata = self.Metadata(plugin_data=self.Metadata.PluginData(plugin_name='text'))
        tensor = self.Tensor(dtype='DT_STRING', string_val=[f'```\n{text}\n```'.encode()])
        self._add(step, summary=self.Summary(value=[self.Summary.Value(tag=name, metadata=metadata, tensor=tensor)]))


def cut_log(path, step):
    """Drops the lines of log.jsonl after `step`, and a half-written last one."""
    kept = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                if json.loads(line).get('step', 0) <= step:
                    kept.append(line if line.endswith('\n') else line + '\n')
    with open(path + '.tmp', 'w') as f:
        f.writelines(kept)
    os.replace(path + '.tmp', path)
