"""Runs programs that a model wrote: nothing they do reaches this process, the files here or the network.

    run_python('print(int(input()) + 1)', stdin='41').stdout        # '42\\n'
    pass_rate(code, inputs=['1 2', '3 4'], outputs=['3', '7'])     # the share of stdin/stdout tests that pass

A program gets its standard input, a working folder in memory and Python's standard library. It is one process
of one unprivileged user in namespaces of its own, without a network, an environment, other processes or
system calls to make them, with limits on time, memory, files and output; data/jail.py does that. The verdict
is made here, from what the program printed: expected outputs never enter the jail, so no exit status, printed
claim or patched function earns anything.

The jails (one a worker) start at the first use and end with this process. A system without user namespaces or
without the system-call filter is refused, with the reason, unless start(allow_weak=True) was called: what is
missing is then missing.
"""
import contextlib
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from configurator import UserError
from data.jail import FILE_BYTES, HELLO, REPLY, REQUEST

JAIL = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'jail.py')


@dataclasses.dataclass(frozen=True)
class Result:
    ok: bool            # ended by itself, in time, with exit status 0 and with less output than the limit
    stdout: str         # decoded as UTF-8; what is none becomes U+FFFD
    stderr: str
    reason: str         # '' if ok, else one line, for people and prompts: why not
    seconds: float      # wall clock


class Jail:
    """One process of jail.py, which runs one program at a time; missing: what it lacks here."""

    def __init__(self, strong):
        self.control, inside = socket.socketpair()
        with inside:
            number = inside.fileno()
            mode = 'strong' if strong else 'weak'
            self.process = subprocess.Popen(
                [sys.executable, '-s', '-S', JAIL, str(number), mode],
                pass_fds=[number], env={'PYTHONHASHSEED': '0'}, cwd='/',
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        hello = self.control.recv(HELLO.size, socket.MSG_WAITALL)
        self.missing = hello.rstrip(b'\0').decode() if hello else 'the jail did not start'

    def run(self, code, stdin, timeout):
        """One program -> Result. ConnectionError where the jail could not run it."""
        with contextlib.ExitStack() as stack:
            files = []                  # code, stdin, stdout, stderr: in memory, and open in the jail too
            for text in (code, stdin, '', ''):
                file = stack.enter_context(open(os.memfd_create('sandbox'), 'w+b'))
                file.write(text.encode(errors='replace'))
                file.seek(0)
                files.append(file)
            numbers = [file.fileno() for file in files]
            socket.send_fds(self.control, [REQUEST.pack(timeout)], numbers)
            reply = self.control.recv(REPLY.size, socket.MSG_WAITALL)
            if len(reply) < REPLY.size:
                raise ConnectionError('the jail ended')
            confined, late, seconds, status = REPLY.unpack(reply)
            stdout, stderr = (os.pread(number, FILE_BYTES, 0) for number in numbers[2:])
        full = max(len(stdout), len(stderr)) >= FILE_BYTES
        stdout, stderr = stdout.decode(errors='replace'), stderr.decode(errors='replace')
        if not confined:
            raise ConnectionError(stderr.strip().splitlines()[-1])
        reason = ''
        if late:
            reason = f'timed out after {timeout:g} s'
        elif full:
            reason = f'more than {FILE_BYTES >> 20} MiB of output'
        elif status:
            reason = failure(status, stderr)
        return Result(not reason, stdout, stderr, reason, seconds)

    def close(self):
        self.control.close()        # ends it, and the program that it runs
        self.process.wait()


def failure(status, stderr):
    """Why a program did not end well, in one line."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f'ended by {signal.Signals(-code).name}'
    lines = stderr.strip().splitlines()
    return lines[-1][:200] if lines else f'exit status {code}'


# ---- the workers

class Pool:
    """`workers` jails that serve the threads of this process; a fork of it needs its own."""

    def __init__(self, workers, strong):
        self.owner = os.getpid()
        self.workers, self.strong = workers, strong
        self.jails = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers, 'sandbox')
        for _ in range(workers):
            self.jails.put(Jail(strong))

    def run(self, code, stdin, timeout):
        jail = self.jails.get()
        try:
            try:
                return jail.run(code, stdin, timeout)
            except ConnectionError:     # a machine short of memory may end a jail: no verdict on the program
                jail = self.replaced(jail)
                return jail.run(code, stdin, timeout)
        except BaseException:           # interrupted or broken: its next answer would be to this request
            jail = self.replaced(jail)
            raise
        finally:
            self.jails.put(jail)

    def replaced(self, jail):
        jail.close()
        return Jail(self.strong)

    def close(self):
        self.threads.shutdown()
        while not self.jails.empty():
            self.jails.get().close()


_pool, _lock = None, threading.Lock()


def start(allow_weak=False, workers=None):
    """Starts the jails, so that what is missing here is known before the work; returns it in words, or ''.

    allow_weak: run programs even where the system gives no namespaces or no system-call filter. workers:
    programs at the same time, default one a processor. Called again, it starts anew with other workers or
    strength. UserError where refused.
    """
    global _pool
    if not hasattr(os, 'memfd_create') or not hasattr(os, 'pidfd_open'):
        raise UserError('the sandbox needs Linux 5.3 or later and its Python: '
                        'programs cannot be run safely here')
    workers = workers or len(os.sched_getaffinity(0))
    with _lock:
        running = _pool is not None and _pool.owner == os.getpid()
        if running and _pool.workers == workers and (allow_weak or _pool.strong):
            return _pool.missing
        with contextlib.closing(Jail(strong=True)) as trial:
            missing = trial.missing
        if missing and not allow_weak:
            raise UserError(f'the sandbox refuses to run programs: {missing}; run where these are allowed '
                            '(not in a container that forbids them), or say allow_weak_sandbox=true if what '
                            'the model writes may reach your files')
        if running:
            _pool.close()
        _pool = Pool(workers, strong=not missing)
        _pool.missing = missing
        if missing:
            print(f'sandbox: WEAK, as allowed: {missing}: what the model writes '
                  'runs as this user, behind limits only',
                  file=sys.stderr, flush=True)
        return missing


def pool():
    if _pool is None or _pool.owner != os.getpid():
        start()
    return _pool


# ---- what others call

def run_python(code, stdin='', timeout=5.0):
    """Runs one program (text) on one standard input, for `timeout` seconds at most -> Result."""
    return pool().run(code, stdin, timeout)


def run_many(jobs, timeout=5.0):
    """Runs [(code, stdin), ...], as many at a time as there are workers; returns their Results in order."""
    def run(job):
        return run_python(*job, timeout)

    return list(pool().threads.map(run, jobs))


def same_output(printed, expected):
    """Equal word for word: neither spaces nor line ends count."""
    return printed.split() == expected.split()


def pass_rates(jobs, timeout=5.0):
    """[(code, inputs, outputs), ...] -> for each program the share of its tests that it passes: it prints the
    expected output in time, and ends well."""
    runs = []
    for number, (code, inputs, outputs) in enumerate(jobs):
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(f'program {number} has {len(inputs)} inputs and {len(outputs)} expected outputs')
        runs += [(code, stdin) for stdin in inputs]
    results = iter(run_many(runs, timeout))
    rates = []
    for _, _, outputs in jobs:
        passed = 0
        for expected, result in zip(outputs, results):
            passed += result.ok and same_output(result.stdout, expected)
        rates.append(passed / len(outputs))
    return rates


def pass_rate(code, inputs, outputs, timeout=5.0):
    """The share of stdin/stdout tests that a program passes."""
    return pass_rates([(code, inputs, outputs)], timeout)[0]
