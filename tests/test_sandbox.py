"""data/sandbox.py under attack: every program here tries something that must not work,
and must end soon all the same.

Attacks that would do no harm are also run without the sandbox, where they succeed:
a test that cannot fail proves nothing.
"""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from data import sandbox
from data.jail import FILE_BYTES, USER
from data.sandbox import pass_rate, pass_rates, run_many, run_python

pytestmark = pytest.mark.usefixtures('workers')
SECRET = 'the-secret-58713'
PRELUDE = '''
import os, sys
def attempt(function, *arguments):
    try:
        print('GOT', function(*arguments))
    except BaseException as error:
        print('REFUSED', type(error).__name__, getattr(error, 'errno', ''))
def syscall(number, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), 'syscall')
    return result
'''


@pytest.fixture
def secret(tmp_path, monkeypatch):
    """A file, an environment variable and an open file descriptor of this process that hold the secret."""
    path = tmp_path / 'secret'
    path.write_text(SECRET)
    path.chmod(0o644)
    monkeypatch.setenv('API_TOKEN', SECRET)
    with open(path) as file:
        os.set_inheritable(file.fileno(), True)
        yield str(path)


def plainly(code):
    """The program's output without a sandbox."""
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=20, close_fds=False).stdout


# ---------------------------------------------------------------------------- refused, one attempt a line

READS = {
    'a file of the user': 'attempt(lambda: open({path!r}).read())',
    'a file through a link': "attempt(lambda: (os.symlink({path!r}, 'link'), open('link').read(), os.remove('link'))[1])",
    'a file through a relative way': "attempt(lambda: open('../' * 20 + {path!r}[1:]).read())",
    'the environment': "attempt(lambda: os.environ['API_TOKEN'])",
    'the environment of C': 'import ctypes\nattempt(lambda: ctypes.string_at((libc := ctypes.CDLL(None), '
                            "setattr(libc.getenv, 'restype', ctypes.c_void_p), libc.getenv(b'API_TOKEN'))[-1] or sys.exit()))",
    'the environment in /proc': "attempt(lambda: open('/proc/self/environ').read())",
    'inherited files': 'for n in range(3, 64):\n    attempt(os.pread, n, 99, 0)',
}
FILES = {
    'passwd': "attempt(open, '/etc/passwd')", 'shadow': "attempt(open, '/etc/shadow')",
    'the repository': f'attempt(os.listdir, {ROOT!r})', 'processes': "attempt(os.listdir, '/proc')",
    'devices': "attempt(os.listdir, '/dev')", 'the kernel': "attempt(os.listdir, '/sys')",
    'memory': "attempt(open, '/proc/self/mem', 'r+b')", 'a new device': "attempt(os.mknod, 'disk', 0o60666, os.makedev(254, 0))",
}
WRITES = {
    'the library': "attempt(open, os.__file__, 'w')", 'the root': "attempt(os.mkdir, '/here')",
    'the library through a hard link': "attempt(os.link, os.__file__, 'os.py')",
    'a renamed library': "attempt(os.rename, os.path.dirname(os.__file__), '/tmp/lib')",
    'rights': 'attempt(os.chmod, os.__file__, 0o777)', 'another root': "attempt(os.chroot, '.')",
    'a mount': "import ctypes\nattempt(lambda: ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) and 1 / 0)",
    'a mount, writable again': "import ctypes\nattempt(lambda: ctypes.CDLL(None).mount(None, b'/', None, 32, None) and 1 / 0)",
}
NETWORK = {
    'TCP': "import socket\nattempt(socket.create_connection, ('127.0.0.1', 22))", 'a server': 'import socket\nattempt(socket.socket)',
    'UDP': 'import socket\nattempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)',
    'a local socket': 'import socket\nattempt(socket.socket, socket.AF_UNIX)',
    'netlink': 'import socket\nattempt(socket.socket, 16, socket.SOCK_RAW)',
    'a name': "import socket\nattempt(socket.getaddrinfo, 'example.org', 80)",
    'a web page': "import urllib.request\nattempt(urllib.request.urlopen, 'http://127.0.0.1/')",
}
PROCESSES = {
    'fork': 'attempt(os.fork)', 'fork in C': 'import ctypes\nattempt(lambda: ctypes.CDLL(None).fork() + 1 or 1 / 0)',
    'a shell': "import subprocess\nattempt(subprocess.run, ['/bin/sh', '-c', 'true'])",
    'system': "attempt(lambda: 1 / (os.system('true') == 0))", 'exec': "attempt(os.execv, sys.executable, ['python', '-c', '1'])",
    'spawn': "attempt(os.posix_spawn, sys.executable, ['python'], {})",
    'multiprocessing': 'import multiprocessing as m\nattempt(lambda: m.get_context("fork").Process(target=print).start())',
    'setuid': 'attempt(os.setuid, 0)', 'setgroups': 'attempt(os.setgroups, [0])', 'higher limits':
    'import resource\nattempt(resource.setrlimit, resource.RLIMIT_AS, (1 << 40, 1 << 40))',
    'priority': 'attempt(os.nice, -5)', 'a session': 'attempt(os.setsid)',
    'a reaper': "attempt(os.kill, 2, 9)", 'shared memory':
    'from multiprocessing import shared_memory as s\nattempt(lambda: s.SharedMemory(create=True, size=1 << 20))',
}
CALLS = {    # by number; on x86_64
    'ptrace': (101, 16, 1, 0, 0), 'process_vm_readv': (310, 1, 0, 0, 0, 0, 0), 'unshare': (272, 0x10000000), 'setns': (308, 0, 0),
    'clone': (56, 17, 0, 0, 0, 0), 'clone3': (435, 0, 0), 'vfork': (58,), 'io_uring': (425, 8, 0), 'bpf': (321, 0, 0, 0),
    'keyctl': (250, 0, 0), 'userfaultfd': (323, 0), 'perf': (298, 0, 0, -1, -1, 0), 'memfd': (319, b'x', 0),
    'shmget': (29, 0, 4096, 0o1600),
    'open_tree': (428, 0, b'/', 0), 'pidfd_open': (434, 1, 0), 'execveat': (322, 0, b'', 0, 0, 0x1000), 'personality': (135, 0x40000),
    'by handle': (304, 0, 0, 0), 'x32': (0x40000000 + 39,), 'syslog': (103, 3, 0, 0),
}


def assert_refused(output):
    assert 'GOT' not in output and SECRET not in output and 'REFUSED' in output, output


@pytest.mark.parametrize('name', READS)
def test_reads_nothing_of_the_users(name, secret):
    code = PRELUDE + READS[name].format(path=secret)
    result = run_python(code)
    assert_refused(result.stdout)
    assert SECRET in plainly(code), 'the attack itself does not work'


@pytest.mark.parametrize('name, code', [*FILES.items(), *WRITES.items(), *NETWORK.items(), *PROCESSES.items()])
def test_refused(name, code):
    assert_refused(run_python(PRELUDE + code).stdout)


def test_only_the_library_is_there():
    code = ('import os\nlibrary = os.path.dirname(os.__file__)\nprint(sum(path == library for path, _, _ in os.walk("/")))\n'
            'print([path for path, _, files in os.walk("/") if files and not (path + "/").startswith(library + "/")])')
    assert run_python(code).stdout == '1\n[]\n'


@pytest.mark.parametrize('name', ['passwd', 'processes', 'devices', 'the repository'])
def test_these_files_can_be_read_outside(name):
    assert 'GOT' in plainly(PRELUDE + FILES[name])


@pytest.mark.parametrize('code', [NETWORK['a server'], NETWORK['UDP'], PROCESSES['fork'], PROCESSES['a shell'], PROCESSES['system'],
                                  PROCESSES['spawn'],
                                  PROCESSES['shared memory']])
def test_these_calls_can_be_made_outside(code):
    assert 'GOT' in plainly(PRELUDE + code)


@pytest.mark.skipif(os.uname().machine != 'x86_64', reason='numbers of x86_64')
@pytest.mark.parametrize('name', CALLS)
def test_no_such_system_call(name):
    output = run_python(f'{PRELUDE}attempt(syscall, *{CALLS[name]})').stdout
    assert output.split() in (['REFUSED', 'PermissionError', '1'], ['REFUSED', 'OSError', '38']), output


# ---------------------------------------------------------------------------- bombs: ended by a limit

BOMBS = {
    'sleep': ('import time\ntime.sleep(99)', 'timed out after 0.5 s'), 'loop': ('while True: pass', 'timed out after 0.5 s'),
    'deaf sleep': ('import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n'
                   'signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\ntime.sleep(99)', 'timed out after 0.5 s'),
    'busy threads': ('import threading\nfor _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()',
                     'timed out after 0.5 s'),
    'atexit': ('import atexit, time\natexit.register(time.sleep, 99)', 'timed out after 0.5 s'),
    'an answer, then sleep': ('import time\nprint(7, flush=True)\ntime.sleep(99)', 'timed out after 0.5 s'),
    'exit swallowed': ('while True:\n    try: raise SystemExit\n    except BaseException: pass', 'timed out after 0.5 s'),
    'a wait for more input': ('import sys, os\nwhile True: os.read(0, 1)', 'timed out after 0.5 s'),
    'a pipe of its own': ('import os\nr, w = os.pipe()\nwhile True: os.write(w, b"x" * 65536)', 'timed out after 0.5 s'),
    'a slow regular expression': ('import re\nre.match("(a+)+$", "a" * 40 + "b")', 'timed out after 0.5 s'),
    'a huge power': ('x = 7 ** 10 ** 10', 'timed out after 0.5 s'),
    'fork': ('import os\nwhile True: os.fork()', 'PermissionError: [Errno 1] Operation not permitted'),
    'threads': ('import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()',
                "RuntimeError: can't start new thread"),
    'memory': ('x = b"x" * (1 << 34)', 'MemoryError'), 'memory in pieces': ('x = []\nwhile True: x.append(bytes(1 << 20))', 'MemoryError'),
    'shared pages': ('import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(99)]', 'OSError: [Errno 12] Cannot allocate memory'),
    'a huge list': ('x = [0] * 10 ** 11', 'MemoryError'), 'a huge shift': ('x = 1 << (1 << 40)', 'MemoryError'),
    'output': ('while True: print("x" * 9999)', 'more than 8 MiB of output'),
    'errors': ('import sys\nwhile True: sys.stderr.write("x" * 9999)', 'more than 8 MiB of output'),
    'raw output': ('import os\nwhile True:\n    try: os.write(1, bytes(1 << 20))\n    except OSError: break', 'more than 8 MiB of output'),
    'a hole in the output': ('import os\nos.ftruncate(1, 1 << 23)', 'more than 8 MiB of output'),
    'a big file': ('f = open("f", "wb")\nwhile True: f.write(bytes(1 << 20))', 'OSError: [Errno 27] File too large'),
    'many big files': ('for n in range(99): open(str(n), "wb").write(bytes(1 << 22))', 'OSError: [Errno 28] No space left on device'),
    'many files': ('for n in range(9999): open(str(n), "w").close()', 'OSError: [Errno 28] No space left on device'),
    'open files': ('x = [open("f", "w") for _ in range(999)]', "OSError: [Errno 24] Too many open files: 'f'"),
    'recursion': ('def f(): f()\nf()', 'RecursionError: maximum recursion depth exceeded'),
    'recursion in C': (
        'import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda x: x.sort(key=lambda _: f([1]))\nf([1])', 'ended by SIGSEGV'),
    'nesting': ('eval("(" * 100000)', None), 'a broken pointer': ('import ctypes\nctypes.string_at(1)', 'ended by SIGSEGV'),
    'abort': ('import os\nos.abort()', None), 'a long number': ('print(10 ** 5000)', None),
}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_end(name):
    code, reason = BOMBS[name]
    start = time.monotonic()
    result = run_python(code, timeout=0.5 if reason and reason.startswith('timed') else 5)
    assert not result.ok and result.reason
    assert result.reason.startswith(reason or '')
    assert time.monotonic() - start < 5 and len(result.stdout) <= FILE_BYTES
    assert run_python('print(1)').stdout == '1\n'


# ---------------------------------------------------------------------------- the verdict cannot be faked

CHEATS = {
    'exit': 'import sys\nsys.exit(0)', 'hard exit': 'import os\nos._exit(0)', 'claim': 'print("passed")\nprint("ok", 1.0, True)',
    'exit with a word': 'raise SystemExit("passed")', 'equal to all': 'class A(str):\n    __eq__ = lambda *a: True\nprint(A())',
    'patched comparison': 'import builtins, operator\nbuiltins.str = type("str", (), {"__eq__": lambda *a: True})\nbuiltins.sum = len',
    'patched modules': 'import sys\nfor m in list(sys.modules.values()):\n    for n in ("same_output", "pass_rate", "why"):\n'
                       '        setattr(m, n, lambda *a: 1.0)',
    'answer, then failure': 'print(12345)\nraise SystemExit(1)',
    'answer, then crash': 'print(12345, flush=True)\nimport ctypes\nctypes.string_at(1)',
    'answer among others': 'print(*range(20000))', 'answer on the wrong stream': 'import sys\nprint(12345, file=sys.stderr)',
    'written to every file': 'import os\nfor n in range(3, 99):\n    try: os.write(n, b"12345")\n    except OSError: pass',
    'written into the input': 'import os\nos.pwrite(0, b"12345", 0)', 'frames': 'import sys\nf = sys._getframe()\nwhile f:\n'
    '    for v in list(f.f_globals.values()) + list(f.f_locals.values()):\n'
    '        if "12345" in repr(v)[:999]: print(12345)\n    f = f.f_back',
}


@pytest.mark.parametrize('name', CHEATS)
def test_cheats_earn_nothing(name):
    assert pass_rate(CHEATS[name], [''], ['12345']) == 0.0


def test_what_is_expected_is_nowhere_in_the_jail():
    search = ('import gc\nwanted = "".join(map(chr, {codes}))\nfound = [x for x in gc.get_objects() if wanted in repr(x)[:10000]]\n'
              'print(len([x for x in found if x is not globals()]))\nprint(wanted in open(0).read())')
    code = search.format(codes=list(map(ord, 'expected-4711')))
    assert pass_rate(code, ['x'], ['expected-4711']) == 0.0
    assert run_python(code).stdout.split() == ['0', 'False'] and run_python(code, 'expected-4711').stdout.split()[1] == 'True'


def test_programs_do_not_meet():
    """Nothing of a program is left for the next one in the same jail:
    files, memory, modules, working folder."""
    sandbox.start(workers=1)
    try:
        run_python('open("left", "w").write("x")\nimport math\nmath.floor = print\nmath.left = "behind" + "-4711"\nimport gc; gc.freeze()')
        run_python('import os, shutil\nshutil.rmtree("/tmp", ignore_errors=True)\nshutil.rmtree("/", ignore_errors=True)\nos.chdir("/")')
        result = run_python('import os, math\n'
                            'print(os.listdir("."), os.listdir("/tmp"), math.floor(2.5), hasattr(math, "left"), os.getcwd())')
        assert result.stdout.split() == ['[]', '[]', '2', 'False', '/tmp']
    finally:
        sandbox.start(workers=2)


@pytest.mark.parametrize('signals', ['os.getppid(), 9', '-1, 9', '0, 9', '1, 9', '1, 15', 'os.getpid(), 19'])
def test_kills_nobody(signals):
    before = [jail.process.pid for jail in jails()]
    result = run_python(f'import os\nos.kill({signals})\nprint("on")', timeout=0.5)
    assert result.ok or result.reason
    run_many([('import os\nfor n in range(2, 40000):\n    try: os.kill(n, 9)\n    except OSError: pass', '')] * 2)
    assert [jail.process.pid for jail in jails()] == before and all(jail.process.poll() is None for jail in jails())


def jails():
    held = [sandbox.pool().jails.get() for _ in range(sandbox.pool().workers)]
    for jail in held:
        sandbox.pool().jails.put(jail)
    return sorted(held, key=id)


def descendants(pid):
    children = []
    for entry in os.listdir('/proc'):
        if entry.isdigit():
            try:
                with open(f'/proc/{entry}/stat') as file:
                    if int(file.read().rsplit(')', 1)[1].split()[1]) == pid:
                        children += [int(entry), *descendants(int(entry))]
            except (OSError, IndexError):       # ended meanwhile
                pass
    return children


def test_nothing_runs_on_and_nobody_is_root():
    run_python('import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(99,)).start()', timeout=0.3)
    for jail in jails():
        inside, = descendants(jail.process.pid)
        with open(f'/proc/{inside}/status') as file:
            assert file.read().split('Uid:')[1].split()[:4] == [str(USER if os.geteuid() == 0 else os.geteuid())] * 4
        for kind in ('user', 'pid', 'mnt', 'net', 'ipc', 'uts'):
            assert os.readlink(f'/proc/{inside}/ns/{kind}') != os.readlink(f'/proc/self/ns/{kind}')


def test_capabilities_and_core_dumps():
    code = ('import resource, ctypes, os\nbuffer = (ctypes.c_uint32 * 6)()\n'
            'ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), buffer)\n'
            'print(sum(buffer), resource.getrlimit(resource.RLIMIT_CORE), os.getuid(), os.getgid())')
    assert run_python(code).stdout.split()[:5] == ['0', '(0,', '0)', '1000', '1000']


def test_ends_with_the_process_that_asked():
    """SIGKILL to the trainer while a program runs: the jail and the program are gone at once."""
    code = ('import sys, threading\nfrom data import sandbox\nsandbox.start(workers=1)\n'
            'threading.Thread(target=sandbox.run_python, args=("while True: pass", "", 60)).start()\n'
            'import time\ntime.sleep(0.3)\nprint("up", flush=True)\n')
    trainer = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == 'up\n'
    family = descendants(trainer.pid)
    assert len(family) == 3                  # the jail's first process, the jail, the program
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f'/proc/{pid}') for pid in family) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(os.path.exists(f'/proc/{pid}') for pid in family)
    trainer.stdout.close()


# -------------------------------------------------------------------------- where the system gives too little

REFUSING = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.mark.skipif(not shutil.which('unshare'), reason='needs unshare(1)')
def test_refuses_without_namespaces(secret):
    """In a user namespace that allows no others, as a container may."""
    code = ('import sys\nfrom configurator import UserError\nfrom data import sandbox\ntry:\n    sandbox.run_python("print(1)")\n'
            'except UserError as error:\n    print("refused:", error)\nprint("missing:", sandbox.start(allow_weak=True))\n'
            'print(sandbox.run_python("print(int(input()) + 1)", "41").stdout)\n'
            f'for attack in {[NETWORK["TCP"], PROCESSES["fork"], PROCESSES["a shell"], READS["the environment"]]!r}:\n'
            f'    print(sandbox.run_python({PRELUDE!r} + attack).stdout)\n'
            'print(sandbox.run_python("import time; time.sleep(99)", timeout=0.3).reason)\n'
            'print(sandbox.run_python("import os; print(os.getcwd(), os.listdir())").stdout)')
    result = subprocess.run(['unshare', '-Ur', 'sh', '-c', REFUSING, 'sh', sys.executable, '-c', code],
                            cwd=ROOT, capture_output=True, text=True, timeout=30)
    lines = result.stdout.split('\n')
    assert result.returncode == 0, result.stderr
    assert lines[0].startswith('refused: the sandbox refuses to run programs: no namespaces') and 'allow_weak_sandbox' in lines[0]
    assert lines[1].startswith('missing: no namespaces') and lines[2] == '42'
    assert result.stdout.count('REFUSED') == 4 and 'GOT' not in result.stdout and 'timed out after 0.3 s' in result.stdout
    folder = next(line for line in lines if '/sandbox-' in line).split()[0]
    assert not os.path.exists(folder)


# ---------------------------------------------------------------------------- honest programs

def test_honest_programs():
    assert run_python('print(int(input()) + 1)', '41') == sandbox.Result(True, '42\n', '', '', pytest.approx(0, abs=2))
    assert run_python('x').reason == "NameError: name 'x' is not defined"
    failed = run_python('def f():\n    return 1 / 0\nf()')
    assert failed.stderr == ('Traceback (most recent call last):\n  File "program.py", line 3, in <module>\n'
                             '  File "program.py", line 2, in f\nZeroDivisionError: division by zero\n')
    assert run_python('def f(:').reason == 'SyntaxError: invalid syntax'
    assert run_python('import sys; sys.exit(3)').reason == 'exit status 3'
    assert run_python('import sys; sys.exit("no")').reason == 'no'
    assert run_python('import sys; print(sys.stdin.read().split())', 'a b\nc').stdout == "['a', 'b', 'c']\n"
    assert run_python('import atexit; atexit.register(print, "end")').stdout == 'end\n'
    assert run_python('import random; print(random.random(), hash("a"), {"a", "b", "c"})') .stdout == \
        run_python('import random; print(random.random(), hash("a"), {"a", "b", "c"})').stdout
    assert run_python('if __name__ == "__main__": open("f", "w").write("x"); print(open("f").read())').stdout == 'x\n'
    threads = ('import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 27)\n'
               'def deep(n): return n and 1 + deep(n - 1)\nt = threading.Thread(target=lambda: print(deep(50000)))\nt.start()')
    assert run_python(threads).stdout == '50000\n'
    modules = 'collections heapq bisect math fractions decimal itertools functools re json string random datetime asyncio zlib'
    assert run_python(f'import {", ".join(modules.split())}').ok


def test_any_text():
    assert run_python('print(input())', 'häß 你 🙂').stdout == 'häß 你 🙂\n'
    assert run_python('import os; os.write(1, b"\\xff\\xfe ok")').stdout == '\ufffd\ufffd ok'
    assert not run_python('print("\\ud800")').ok and run_python('print(input())', '\ud800').stdout == '?\n'
    assert 'null bytes' in run_python('print(1)\0').reason and run_python('').ok
    assert run_python('\ud800').reason.startswith('SyntaxError')
    assert run_python('import sys; print(len(sys.stdin.read()))', 'x' * (20 << 20)).stdout == f'{20 << 20}\n'
    assert run_python('import sys; sys.stdin.close(); print(1)', 'x').stdout == '1\n'
    assert run_python('import sys; sys.stdout = None').ok and not run_python('import sys; sys.stdout.close(); print(1)').ok


def test_pass_rates():
    add = 'a, b = map(int, input().split())\nprint(a + b)'
    assert pass_rate(add, ['1 2', '3 4'], ['3\n', ' 7 ']) == 1.0
    assert pass_rate('print(3)', ['1 2', '3 4'], ['3', '7']) == 0.5
    assert pass_rates([(add, ['1 1'], ['2']), ('print(0)', ['1', '2', '3'], ['0', '1', '0'])]) == [1.0, 2 / 3]
    assert pass_rate('print("1 2")', [''], ['1\n2']) == 1.0 and pass_rate('print(12)', [''], ['1 2']) == 0.0
    with pytest.raises(ValueError, match='program 0 has 1 inputs and 2 expected outputs'):
        pass_rate(add, ['1 2'], ['3', '4'])
    with pytest.raises(ValueError, match='0 inputs'):
        pass_rate(add, [], [])


def test_many_at_a_time():
    results = run_many([('import time; time.sleep(0.2); print(input())', str(n)) for n in range(8)])
    assert [result.stdout for result in results] == [f'{n}\n' for n in range(8)]
    start = time.monotonic()
    run_many([('import time; time.sleep(0.5)', '')] * 4)
    assert time.monotonic() - start < 1.9       # one after the other: 2 s


def test_a_lost_jail_is_replaced():
    for jail in jails():
        os.kill(jail.process.pid, signal.SIGKILL)
        for pid in descendants(jail.process.pid):
            os.kill(pid, signal.SIGKILL)
    assert [run.stdout for run in run_many([('print(1)', '')] * 4)] == ['1\n'] * 4
