"""
What every training script needs around its loop, and no loop: device, precision, ranks, seeds, stop signals.

    run, stop = setup(cfg.device, cfg.dtype, cfg.matmul), Stop(run)
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
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError

DTYPES = {'float32': torch.float32, 'fp32': torch.float32, 'bfloat16': torch.bfloat16, 'bf16': torch.bfloat16,
          'float16': torch.float16, 'fp16': torch.float16}


@dataclass
class Run:
    """One process of a run: where it computes, in which precision, and which rank it is."""
    device: torch.device
    dtype: torch.dtype      # of autocast; parameters and optimizer state are always float32
    matmul: str             # 'float32' or 'bf16': how a CPU multiplies matrices
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        plain = self.dtype == torch.float32
        return contextlib.nullcontext() if plain else torch.autocast(self.device.type, self.dtype)

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

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def precision(cfg):
    """The dtype that setup() is asked for where a recipe says it by bf16 (true, false, or None: not said) and fp16, never both."""
    if cfg.bf16 or cfg.fp16:
        return 'bfloat16' if cfg.bf16 else 'float16'
    return 'float32' if cfg.bf16 is False else 'auto'


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


# Dense 16-bit tensor-core FLOP/s with float32 accumulation, from NVIDIA's data sheets and architecture papers; figures
# printed "with sparsity" are halved. The first name found in the card's name counts.
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12,
              'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX 5090': 209.5e12,
              'RTX 4090': 165.2e12, 'RTX 3090': 71e12}


def device_peak_flops(device):
    """Peak FLOP/s of a torch.device, or of a card by name, for model FLOPs utilisation; None where it is not known."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', device)), None)


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
