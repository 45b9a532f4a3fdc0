"""
What every training script needs around its loop, and no loop: the device and the ranks, seeds, stop signals,
checkpoints that survive a kill at any instant, and the log.

    run = setup(cfg.device, cfg.dtype)                  # device, precision, process group
    start_fresh(run, cfg.out_dir, as_dict(cfg))         # or, to resume:  path = checkpoints.latest(); checkpoints.rewind(path)
    checkpoints, stop = Checkpoints(cfg.out_dir, run), Stop(run)
    log = Log(run, cfg.out_dir, header, total_steps)
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from configurator import UserError

DTYPES = {'float32': torch.float32, 'fp32': torch.float32, 'bfloat16': torch.bfloat16, 'bf16': torch.bfloat16,
          'float16': torch.float16, 'fp16': torch.float16}

# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, ranks


@dataclass
class Run:
    """One process of a run: where it computes, in which precision, and which rank it is."""
    device: torch.device
    dtype: torch.dtype      # of autocast; parameters and optimizer state are float32 always
    matmul: str             # 'float32' or 'bf16': how a CPU multiplies matrices
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, tensor):
        """`tensor` summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value):
        """The largest of the ranks' whole numbers. By gloo, so that asking at every step never waits for a GPU."""
        if self.world_size > 1:
            tensor = torch.tensor(value, dtype=torch.int64)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            value = int(tensor)
        return value

    def any(self, flag):
        """True on every rank where `flag` is true on one."""
        return bool(self.max(int(bool(flag))))

    def barrier(self):
        self.max(0)

    def on_main(self, work):
        """work() on the main rank, while the others wait; its result there. Where it raises, every rank does."""
        result = failure = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        if self.any(failure):
            raise failure or UserError('the main rank stopped; its message says why')
        return result

    def say(self, text):
        """Print on the main rank, above the progress bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()      # a log that is piped to a file is read while the run goes on

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def setup(device='auto', dtype='auto', matmul='auto'):
    """Choose device and precision, join the process group that torchrun's environment describes; returns a Run.

    device  'auto' (cuda, then mps, then cpu), 'cpu', 'mps', 'cuda' or 'cuda:1'
    dtype   'auto' (CUDA: bfloat16 where the card has it, else float16; elsewhere float32), float32, bfloat16, float16
    matmul  'auto' | 'float32' | 'bf16'. CPU: auto is bf16 where the processor multiplies it (AVX-512 bf16, AMX).
            CUDA: TF32 for what autocast leaves in float32, unless 'float32' is asked for.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    if device == 'auto':
        mps = torch.backends.mps.is_available() and world_size == 1
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    kind = device.split(':')[0]
    if kind not in ('cuda', 'mps', 'cpu'):
        raise UserError(f"--device: '{device}' is none of auto, cuda, mps, cpu")
    if kind == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'--device={device}: PyTorch sees no CUDA GPU on this machine; use --device=auto or --device=cpu')
    if kind == 'mps' and (not torch.backends.mps.is_available() or world_size > 1):
        raise UserError(f'--device=mps: needs an Apple GPU and a single process (here {world_size}); use --device=cpu')
    if kind == 'cuda':
        index = local_rank if world_size > 1 else torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f'process {local_rank} needs GPU {index}, but PyTorch sees {torch.cuda.device_count()}: '
                            f'start fewer processes, or use --device=cpu')
        device = f'cuda:{index}'
        torch.cuda.set_device(index)

    if dtype != 'auto' and dtype not in DTYPES:
        raise UserError(f"--dtype: '{dtype}' is none of auto, float32, bfloat16, float16")
    if matmul not in ('auto', 'float32', 'bf16'):
        raise UserError(f"--matmul: '{matmul}' is none of auto, float32, bf16")
    notes, asked = [], matmul
    bf16_cuda = kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == 'auto':
        amp = {True: torch.bfloat16, False: torch.float16}[bf16_cuda] if kind == 'cuda' else torch.float32
    else:
        amp = DTYPES[dtype]
    if kind == 'cpu':
        fast = any(getattr(torch.cpu, f'_is_{name}_supported', lambda: False)() for name in ('avx512_bf16', 'amx_tile'))
        matmul = ('bf16' if fast else 'float32') if asked == 'auto' else asked
        if matmul == 'bf16' and not fast:
            notes.append('--matmul=bf16: this processor has no bf16 instructions; --matmul=float32 is faster')
        if amp != torch.float32:
            notes.append(f'{dtype} on a CPU means float32 parameters and activations, matrix products in {matmul}')
            amp = torch.float32
    else:
        matmul = 'float32' if asked == 'auto' else asked
    if kind == 'cuda':
        torch.set_float32_matmul_precision('highest' if asked == 'float32' else 'high')
        if amp == torch.bfloat16 and not bf16_cuda:
            notes.append(f'{torch.cuda.get_device_name()} has no bf16 units: --dtype=float16 is faster')

    run = Run(torch.device(device), amp, matmul, rank, local_rank, world_size)
    if world_size > 1:
        # All ranks on this machine: the loopback interface, which is there without a network too.
        if os.environ.get('MASTER_ADDR') in ('127.0.0.1', 'localhost', '::1') and 'lo' in dict(socket.if_nameindex()).values():
            os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
        if kind == 'cuda':
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=run.device)
        else:
            dist.init_process_group('gloo')
    for note in notes:
        run.say(note)
    return run


def seed_for(seed, *purpose):
    """A 63-bit seed for one purpose: seed_for(1337, 'data', step, index).

    A hash, not a stream: what is drawn for step 900 depends neither on the 899 steps before it nor on the number of
    ranks nor on other purposes, so nothing needs saving for an exact resume.
    """
    key = '|'.join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), 'little') >> 1


def describe_device(run):
    """One line: what computes, in which precision, in how many processes."""
    if run.device.type == 'cuda':
        card = torch.cuda.get_device_properties(run.device)
        text = f'{card.name} ({card.total_memory / 2**30:.0f} GiB), {str(run.dtype)[6:]}'
    else:
        products = ', bf16 matrix products' if run.matmul == 'bf16' else ''
        text = f'{run.device.type} ({platform.machine()}, {torch.get_num_threads()} threads), {str(run.dtype)[6:]}{products}'
    return text + (f', {run.world_size} processes' if run.world_size > 1 else '')


# Dense 16-bit tensor-core FLOP/s with float32 accumulation (bf16; fp16 on V100 and T4), from NVIDIA's data sheets and
# architecture white papers. Sheets that print only the figure "with sparsity" are halved. First match counts.
PEAK_FLOPS = (('B200', 2250e12), ('H200 NVL', 835e12), ('H200', 989e12), ('GH200', 989e12), ('H100 PCIe', 756e12),
              ('H100 NVL', 835e12), ('H100', 989e12), ('H800', 989e12), ('A100', 312e12), ('A800', 312e12),
              ('L40S', 362e12), ('L40', 181e12), ('L4', 121e12), ('A40', 150e12), ('A10', 125e12), ('V100', 125e12),
              ('T4', 65e12), ('RTX 5090', 209.5e12), ('RTX 4090', 165.2e12), ('RTX 3090', 71e12))


def device_peak_flops(device):
    """Peak FLOP/s of a torch.device, or of a card's name, for model FLOPs utilisation; None where it is not known."""
    if isinstance(device, torch.device):
        if device.type != 'cuda':
            return None
        device = torch.cuda.get_device_name(device)
    return next((flops for name, flops in PEAK_FLOPS if re.search(rf'\b{name}\b', device)), None)


@contextlib.contextmanager
def explain_out_of_memory(*flags):
    """An out-of-memory inside becomes one line that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:    # torch.OutOfMemoryError is a RuntimeError; the CPU's has no class
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise UserError(f'out of memory: lower {" or ".join(flags)}') from None


class LossScale:
    """Gradient scaling for float16 (Micikevicius et al. 2018), 1 in every other precision.

    (loss * scale.value).backward(); scale.unscale_(optimizer.grads); after the norm is known scale.update(finite).
    The scale halves where a gradient overflowed and doubles after 2000 steps without. `state` is JSON-able.
    """

    def __init__(self, dtype):
        self.active, self.value, self.good_steps = dtype == torch.float16, 1.0, 0
        if self.active:
            self.value = 2.0 ** 16

    def unscale_(self, grads):
        if self.active:
            torch._foreach_mul_(grads, 1 / self.value)

    def update(self, finite):
        """True where a step was skipped only because the scale was too high: no fault of the model's."""
        if not self.active or not finite and self.value <= 1:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % 2000 == 0:
            self.value *= 2
        return not finite

    def state(self):
        return {'value': self.value, 'good_steps': self.good_steps}

    def load_state(self, state):
        self.value, self.good_steps = state['value'], state['good_steps']


# ---------------------------------------------------------------------------------------------------------------------
# Stop signals


class Stop:
    """SIGINT and SIGTERM set a flag that the loop polls: `if stop.requested: save, say how to resume, sys.exit(stop.code)`.

    `requested` is agreed over the ranks: all of them ask at the same points of the loop.
    """

    def __init__(self, run):
        self.run, self.signum, self.when = run, 0, 0.0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum, frame):
        # torchrun passes on the Ctrl-C that the terminal has already sent to every process: within a second it is one.
        if self.signum and signum == signal.SIGINT and time.monotonic() - self.when > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not self.signum:
            self.signum, self.when = signum, time.monotonic()
            if self.run.is_main:        # print() is not safe in here
                os.write(2, f'\n{signal.Signals(signum).name}: stopping after this step (Ctrl-C again: at once)\n'.encode())

    @property
    def requested(self):
        self.signum = self.run.max(self.signum)
        return self.signum > 0

    @property
    def code(self):
        return 128 + self.signum        # 130 SIGINT, 143 SIGTERM


def resume_command(argv=None, flag='--resume'):
    """This command line again, with `flag` in place of an earlier value of it."""
    argv, name = list(sys.argv if argv is None else argv), flag.split('=')[0]
    spellings = {name, name.replace('_', '-')}
    for i in reversed(range(1, len(argv))):
        if argv[i].split('=')[0] in spellings:
            has_value = '=' not in argv[i] and '=' in flag and i + 1 < len(argv)
            del argv[i:i + 1 + has_value]
    ranks = os.environ.get('LOCAL_WORLD_SIZE')
    torchrun = ['torchrun', f'--nproc_per_node={ranks}'] if 'TORCHELASTIC_RUN_ID' in os.environ else ['python']
    return shlex.join([*torchrun, *argv, flag])

# ---------------------------------------------------------------------------------------------------------------------
# Files

TEMPORARY = '.nanoforge-tmp-'
STATE_FILES = ('optimizer.safetensors', 'trainer_state.json')     # of a checkpoint; its other files are the model
RUN_FILES = ('log.jsonl', 'loss.png', 'manifest.json', 'last', 'best')    # of the root, beside the model's


@contextlib.contextmanager
def writing(path):
    """A full disk, or a folder that cannot be written, as one line. (safetensors hides OSError in an error of its own.)"""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot write {path}: {reason}; checkpoints written before are intact') from None


def fsync(path):
    if os.name == 'posix':      # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def replace(path, write):
    """write(temporary path), then rename: a reader, or a power cut, meets the old `path` or the new one, never a part."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.unlink(missing_ok=True)
    write(temporary)
    os.replace(temporary, path)


def write_json(path, value):
    def write(temporary):
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding='utf-8')
        fsync(temporary)
    replace(Path(path), write)


def read_own(path):
    """The JSON object in `path` if nanoforge wrote it, else {}."""
    try:
        value = json.loads(Path(path).read_text(encoding='utf-8'))
        return value if value['written_by'] == 'nanoforge' else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def link(source, target):
    """`target` becomes `source`: a hard link, or a copy where there are none."""
    def write(temporary):
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    if not (target.exists() and source.samefile(target)):   # rename does nothing between two names of one file
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, write)


def point(path, name):
    """`path` becomes a relative symlink to its neighbour `name`, or a text file that says it where there are no symlinks."""
    def write(temporary):
        try:
            temporary.symlink_to(name)
        except (OSError, NotImplementedError):
            temporary.write_text(name, encoding='utf-8')
    replace(path, write)


def follow(path):
    """The folder behind out/last or out/best, also where these are text files."""
    path = Path(path)
    return path.with_name(path.read_text(encoding='utf-8')) if path.name in ('last', 'best') and path.is_file() else path


def set_aside(out_dir):
    """A new folder earlier-K in out_dir."""
    for k in itertools.count(1):
        if not os.path.lexists(out_dir / f'earlier-{k}'):
            (out_dir / f'earlier-{k}').mkdir()
            return out_dir / f'earlier-{k}'


def checkpoint_folders(out_dir):
    """[(path, manifest)] of all checkpoints in out_dir, oldest step first, whichever run wrote them."""
    found = [(path, read_own(path / 'manifest.json')) for path in out_dir.iterdir()
             if path.is_dir() and not path.is_symlink() and not path.name.startswith((TEMPORARY, 'earlier-'))]
    return sorted((pair for pair in found if pair[1]), key=lambda pair: pair[1]['step'])


def start_fresh(run, out_dir, config, keep=None):
    """Make out_dir ready for a new run, and write its run_config.json: {'run': an id, 'script', 'config': config}.

    What an earlier run of ours left moves to out_dir/earlier-K; nothing else is touched, and a folder with somebody
    else's model is refused. `keep`: the checkpoint that the new run loads, if it lies in there; it stays where it is.
    """
    out_dir, keep = Path(out_dir), os.path.realpath(keep) if keep else ''
    settings = out_dir / 'run_config.json'

    def move_earlier_run():
        folders = [path for path, _ in checkpoint_folders(out_dir)]
        models = {name for folder in (out_dir, *folders) for name in read_own(folder / 'manifest.json').get('files', ())}
        earlier = set_aside(out_dir)
        for path in (*folders, *(out_dir / name for name in {*models, *RUN_FILES})):
            target = earlier / path.relative_to(out_dir)
            if path.name in models and keep == os.path.realpath(out_dir) and path.exists():
                link(path, target)      # the new run loads the model of the root: both runs have it
            elif os.path.lexists(path) and not (keep + os.sep).startswith(os.path.realpath(path) + os.sep):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        os.replace(settings, earlier / settings.name)     # last: while it is here, the folder is known as ours
        run.say(f'{out_dir} held an earlier run: its files are now in {earlier}')

    def prepare():
        with writing(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            if read_own(settings):
                move_earlier_run()
            elif foreign := [name for name in ('config.json', 'model.safetensors', settings.name) if (out_dir / name).exists()]:
                raise UserError(f'{out_dir} holds a {foreign[0]} that nanoforge did not write: choose another output folder')
            write_json(settings, {'written_by': 'nanoforge', 'run': secrets.token_hex(8),
                                  'script': os.path.basename(sys.argv[0]), 'config': config})
    run.on_main(prepare)


class Checkpoints:
    """The checkpoints of the run in out_dir. Only the main rank writes; every method is called by all ranks.

    A checkpoint is written under a temporary name, synced, given a manifest with sizes and SHA-256, and renamed: its
    final name means that it is whole. `last`, `best` and the model in the root follow from the manifests.

    limit            so many of the newest are kept, and the best; None keeps all
    save_only_model  all but the newest lose their optimizer state: for use, not for resuming
    """

    def __init__(self, out_dir, run, limit=2, save_only_model=False):
        self.out_dir, self.run, self.limit, self.save_only_model = Path(out_dir), run, limit, save_only_model

    def own(self):
        """[(path, manifest)] of this run's checkpoints, oldest first. One of another run may lie among them, see `keep`."""
        run_id = self.run_id()
        return [pair for pair in checkpoint_folders(self.out_dir) if pair[1]['run'] == run_id]

    def run_id(self):
        return read_own(self.out_dir / 'run_config.json').get('run')

    def latest(self):
        """The newest whole checkpoint, or None. Damaged ones are skipped, and said."""
        def find():
            for path, manifest in reversed(self.own() if self.out_dir.is_dir() else []):
                reason = damage(path)
                if not reason:
                    return manifest['step']
                self.run.say(f'{path} is skipped: {reason}')
            return -1
        step = self.run.on_main(find)
        step = self.run.max(-1 if step is None else step)
        return next((str(path) for path, manifest in self.own() if manifest['step'] == step), None) if step >= 0 else None

    def rewind(self, path):
        """Go on from checkpoint `path`: later ones of this run, a future that will not be, move to earlier-K."""
        def move_later():
            step = read_own(Path(path) / 'manifest.json')['step']
            later = [other for other, manifest in self.own() if manifest['step'] > step]
            with writing(self.out_dir):
                earlier = set_aside(self.out_dir) if later else None
                for other in later:
                    os.replace(other, earlier / other.name)
                    self.run.say(f'{other} is later than where this run goes on: moved to {earlier}')
                self._tidy()
        self.run.on_main(move_later)

    def save(self, step, write_model, optimizer, state, best=False, name=None):
        """Save checkpoint-`step` (or `name`) and return its path.

        write_model(folder)  writes a Hugging Face model folder
        optimizer            {str: Tensor}
        state                JSON-able: what else the loop needs to go on
        best                 the best so far: `best` and the model in the root are this one until a better one

        UserError: the disk is full, or a tensor holds NaN or inf. What was saved before is intact.
        """
        def work():
            path = self.out_dir / (name or f'checkpoint-{step}')
            try:
                with writing(path):
                    self._clean()
                    path = self._write(path, step, write_model, optimizer, state, best)
                    self._tidy()
            finally:
                self._clean()
        self.run.on_main(work)
        return next((str(path) for path, manifest in reversed(self.own()) if manifest['step'] == step))

    def _write(self, path, step, write_model, optimizer, state, best):
        manifest = read_own(path / 'manifest.json')
        if manifest.get('run') == self.run_id() and manifest.get('step') == step:     # saved already, as at the last step
            return write_json(path / 'manifest.json', {**manifest, 'best': best or manifest['best']})
        stem = path
        for k in itertools.count(1):    # the name can be taken by a checkpoint that this run loaded, or somebody's folder
            if not os.path.lexists(path):
                break
            path = stem.with_name(f'{stem.name}-{k}')
        folder = path.with_name(TEMPORARY + path.name)
        folder.mkdir()
        write_model(str(folder))
        save_file(optimizer, folder / 'optimizer.safetensors')
        write_json(folder / 'trainer_state.json', state)
        files = {}
        for file in sorted(file for file in folder.rglob('*') if file.is_file()):
            if file.suffix == '.safetensors':
                check_finite(file, step)
            fsync(file)
            files[file.relative_to(folder).as_posix()] = {'size': file.stat().st_size, 'sha256': sha256(file)}
        write_json(folder / 'manifest.json', {'written_by': 'nanoforge', 'run': self.run_id(), 'step': step, 'best': best,
                                              'files': files})
        fsync(folder)
        os.replace(folder, path)
        fsync(self.out_dir)

    def _tidy(self):
        """Links, root and pruning follow from the manifests alone: after a kill in between, the next call does the rest."""
        own = self.own()
        last, best = own[-1], next((pair for pair in reversed(own) if pair[1]['best']), None)
        point(self.out_dir / 'last', last[0].name)
        if best:
            point(self.out_dir / 'best', best[0].name)
        path, manifest = best or last
        for name in (*manifest['files'], 'manifest.json'):
            if name not in STATE_FILES:
                link(path / name, self.out_dir / name)
        keep = own if self.limit is None else [best, *own[-self.limit:]]
        for pair in own[:-1]:
            if pair not in keep:
                doomed = pair[0].with_name(TEMPORARY + pair[0].name)
                os.replace(pair[0], doomed)     # out of sight first: a folder half deleted is no checkpoint
                shutil.rmtree(doomed)
            elif self.save_only_model:
                (pair[0] / 'optimizer.safetensors').unlink(missing_ok=True)

    def _clean(self):
        """Remove what a killed process, or a failed save, left under temporary names."""
        for path in self.out_dir.glob(TEMPORARY + '*'):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_finite(path, step):
    with safe_open(path, 'pt') as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f'step {step}: {name} holds NaN or inf: no checkpoint is written, earlier ones are intact; '
                                f'resume with a lower learning rate')


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def damage(path):
    """'' where every file of checkpoint `path` is what its manifest says, else what is wrong."""
    files = read_own(Path(path) / 'manifest.json').get('files')
    if not files:
        return 'it has no manifest.json of nanoforge'
    for name, entry in files.items():
        file = Path(path) / name
        if not file.is_file():
            return f'{name} is missing'
        if file.stat().st_size != entry['size']:
            return f'{name} is cut short: {file.stat().st_size} bytes of {entry["size"]}'
        if sha256(file) != entry['sha256']:
            return f'{name} is not what was written: its SHA-256 differs'
    return ''


def read_checkpoint(path):
    """(optimizer {str: Tensor} on the CPU, state) as save() was given them. UserError where the checkpoint is not whole."""
    path = follow(path)
    if reason := damage(path):
        raise UserError(f'cannot resume from {path}: {reason}')
    return load_file(path / 'optimizer.safetensors'), json.loads((path / 'trainer_state.json').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------------------------------------------------
# Log

FIRST = ('epoch', 'loss', 'eval_loss', 'learning_rate', 'grad_norm')     # then a script's own, in its order
LAST = ('num_tokens', 'tokens_per_second', 'mfu')


class Log:
    """One line per write() on the console and in out_dir/log.jsonl, scalars to TensorBoard (logs/<run>/) and wandb.

    log.jsonl begins with {"run": header}; lines with "step" follow. To resume, pass `resume_step`: the lines after it go
    (their steps come again) and the TensorBoard run is continued. Only the main rank writes.

    header       what the run is: script, data set, whether it is a stand-in, device ...
    total_steps  for the ETA and the progress bar (on a terminal)
    wandb        name of a project
    """

    def __init__(self, run, out_dir, header, total_steps, tensorboard=True, wandb=None, resume_step=None):
        self.run, self.total, self.first_step, self.began = run, total_steps, resume_step or 0, time.monotonic()
        self.path, self.widths, self.board, self.wandb = os.path.join(out_dir, 'log.jsonl'), {}, None, None
        if not run.is_main:
            return
        name = f'{os.path.basename(os.path.abspath(out_dir))}-{time.strftime("%Y%m%d-%H%M%S")}'
        with writing(self.path):
            if resume_step is not None:
                name = cut_log(self.path, resume_step) or name
                header = {**header, 'resumed_at': resume_step}
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._line({'run': {'name': name, **header}})
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter   # 0.1 s
                self.board = SummaryWriter(os.path.join('logs', name), flush_secs=10,
                                           purge_step=None if resume_step is None else resume_step + 1)
            except ImportError:
                run.say('no TensorBoard events: pip install tensorboard')
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError('wandb is not installed: pip install wandb, or leave the wandb flag out') from None
            self.wandb = client.init(project=wandb, name=name, id=name, resume='allow', config=header)
        self.bar = tqdm(total=total_steps, initial=self.first_step, unit='step', dynamic_ncols=True, leave=False,
                        disable=not sys.stderr.isatty())

    def progress(self, step):
        """`step` steps are done: moves the bar. Call it at every step; it costs a microsecond."""
        if self.run.is_main:
            self.bar.update(step - self.bar.n)

    def write(self, step, metrics):
        """metrics: {name: number or one-element tensor}, logged as of `step`."""
        if not self.run.is_main:
            return
        metrics = {key: value.item() if hasattr(value, 'item') else value for key, value in metrics.items()}
        order = [*(key for key in FIRST if key in metrics),
                 *(key for key in metrics if key not in FIRST + LAST), *(key for key in LAST if key in metrics)]
        metrics = {key: metrics[key] for key in order}
        self._line({'step': step, **{key: value if math.isfinite(value) else None for key, value in metrics.items()}})
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
        self.run.say('  '.join(parts))
        for key, value in metrics.items() if self.board else ():
            self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def text(self, step, key, text):
        """A sample of text, on the console and everywhere else."""
        if not self.run.is_main:
            return
        self._line({'step': step, key: text})
        self.run.say(f'--- {key} at step {step}\n{text}\n---')
        if self.board:
            self.board.add_text(key, text, step)

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
    """Drop the lines of log.jsonl after `step`, and one that a kill cut short; returns the run's name."""
    kept, name = [], None
    with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            name = name or value.get('run', {}).get('name')
            if value.get('step', 0) <= step:
                kept.append(line)
    temporary = os.path.join(os.path.dirname(path), TEMPORARY + 'log.jsonl')
    with open(temporary, 'w', encoding='utf-8') as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return name


def short(value):
    """A number in few characters: 0.0012 as 1.20e-03, 1.8742, 12,345."""
    if isinstance(value, int) or abs(value) >= 1e4 and math.isfinite(value):
        return f'{value:,.0f}'
    return f'{value:.4f}' if value == 0 or 1e-2 <= abs(value) else f'{value:.2e}'
