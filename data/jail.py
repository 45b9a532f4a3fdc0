"""The inside of data/sandbox.py: a process that puts itself into a jail, then forks once per program.

Started by sandbox.py as `python -s -S jail.py SOCKET strong|weak`, with an empty environment. It imports what
programs often import, gives up root, enters new user, process, mount, network, IPC and UTS namespaces, and
makes a file system that holds Python's standard library (read-only) and nothing else. Each program is a fork
of it, alone in a new process namespace, with an empty folder in memory, no capabilities, and a system-call
filter that knows no other process, program or socket: so the limits of one process are the limits of the
program. What it may write is its output, which sandbox.py reads.
"""
import sys

if __name__ == '__main__':
    sys.path = sys.path[1:]        # nothing but the standard library, from here on

import atexit, contextlib, ctypes, errno, gc, importlib, os, platform, random, resource, select, shutil
import signal, socket, struct, tempfile, threading, time, traceback, types

# imported before the jail closes
PRELOADED = """
    array bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq
    itertools json math operator queue re statistics string typing unicodedata
""".split()
USER = 64007                # host user and group of the jail when root starts it: owns nothing else
INSIDE = 1000               # its user and group inside
FOLDER = '/tmp'             # where a program starts
FOLDER_SIZE, FOLDER_FILES = '16m', 256
FILE_BYTES = 8 << 20        # of any file and of stdout and stderr
OPEN_FILES, THREADS = 64, 64
MEMORY = 512 << 20          # address space, interpreter included
REQUEST = struct.Struct('d')        # timeout in seconds
REPLY = struct.Struct('iidi')       # confined, late, seconds, exit status
HELLO = struct.Struct('500s')       # what is missing here, in words

# sched.h, sys/mount.h, sys/prctl.h, linux/seccomp.h, linux/capability.h
NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_RELATIME, MNT_DETACH = 16384, 1 << 18, 1 << 21, 2
ST_RELATIME = 4096
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
MODE_FILTER = 2
CLONE_THREAD = 0x10000
CAPABILITIES_V3 = 0x20080522

# System calls that no program gets, by machine: (audit architecture, clone, the others).
FORBIDDEN = {
    'x86_64': (0xC000003E, 56, '''
        fork=57 vfork=58 execve=59 execveat=322 socket=41 ptrace=101 process_vm_readv=310
        process_vm_writev=311 kcmp=312 unshare=272 setns=308 mount=165 umount2=166 pivot_root=155
        chroot=161 personality=135 keyctl=250 add_key=248 request_key=249 bpf=321
        perf_event_open=298 userfaultfd=323 memfd_create=319 shmget=29 semget=64 msgget=68
        mq_open=240 io_setup=206 name_to_handle_at=303 open_by_handle_at=304 fanotify_init=300
        inotify_init=253 inotify_init1=294 syslog=103 modify_ldt=154 init_module=175
        finit_module=313 kexec_load=246
    '''),
    'aarch64': (0xC00000B7, 220, '''
        execve=221 execveat=281 socket=198 ptrace=117 process_vm_readv=270 process_vm_writev=271
        kcmp=272 unshare=97 setns=268 mount=40 umount2=39 pivot_root=41 chroot=51 personality=92
        keyctl=219 add_key=217 request_key=218 bpf=280 perf_event_open=241 userfaultfd=282
        memfd_create=279 shmget=194 semget=190 msgget=186 mq_open=180 io_setup=0
        name_to_handle_at=264 open_by_handle_at=265 fanotify_init=262 inotify_init1=26 syslog=116
        init_module=105 finit_module=273 kexec_load=104
    '''),
}
# pidfd_send_signal and all that came later, io_uring and clone3 among them, and x86's x32 calls
NEWER_CALLS = 424

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A function of libc; OSError names it when it fails."""
    arguments = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if getattr(libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f'{name}: {os.strerror(code)}')


def mount(source, target, type=None, flags=0, options=None):
    source, target, type, options = (word and word.encode() for word in (source, target, type, options))
    call('mount', source, target, type, flags, options)


# ---- once

def leave_root():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        call('prctl', PR_SET_DUMPABLE, 1, 0, 0, 0)    # else /proc/self/uid_map would still be root's


def enter_namespaces():
    """New user, process, mount, network, IPC and UTS namespaces; / is then the library and an empty FOLDER.

    Returns a handle on the process namespace, to come back to it after each fork into another.
    """
    sys.path = [os.path.realpath(path) for path in sys.path if os.path.isdir(path)]
    library = [path for path in sys.path if not any(path.startswith(other + '/') for other in sys.path)]
    start = os.path.commonpath(library)
    os.chdir(start)         # root may have to open the way to it; unshare takes it along
    leave_root()
    user, group = os.geteuid(), os.getegid()
    call('unshare', NEW_USER | NEW_NS | NEW_NET | NEW_IPC | NEW_UTS | NEW_PID)
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{INSIDE} {user} 1'), ('gid_map', f'{INSIDE} '
                                                                                             f'{group} 1')):
        with open(f'/proc/self/{name}', 'w') as file:
            file.write(text)
    child = os.fork()                   # the first process of the new process namespace
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    namespace = os.open('/proc/self/ns/pid', os.O_RDONLY)
    call('sethostname', b'sandbox', 7)

    mount(None, '/', flags=MS_REC | MS_PRIVATE)
    root = FOLDER                       # any folder will do: it is only seen from in here
    mount('tmpfs', root, 'tmpfs', MS_NOSUID | MS_NODEV, 'size=64k,mode=755')
    for path in library:
        os.makedirs(root + path)
        mount(os.path.relpath(path, start), root + path, flags=MS_BIND)
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV
        locked = os.statvfs(root + path).f_flag        # in the mount that it comes from: must stay
        flags |= locked & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if locked & ST_RELATIME:
            flags |= MS_RELATIME
        mount(None, root + path, flags=flags)
    os.makedirs(root + FOLDER, exist_ok=True)
    os.chdir(root)
    call('pivot_root', b'.', b'.')      # puts the old root on top of the new one
    call('umount2', b'.', MNT_DETACH)   # where it is taken off
    os.chdir('/')
    mount(None, '/', flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    return namespace


def filter_program():
    """The system-call filter in BPF: struct sock_filter {code, jump if true, jump if false, operand}."""
    if platform.machine() not in FORBIDDEN or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f'no system-call filter for {platform.machine()}')
    architecture, clone, calls = FORBIDDEN[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, unknown = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    lines = [
        (load, 0, 0, 4),                # the architecture
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),                # the number of the call
        (at_least, 0, 1, NEWER_CALLS),
        (answer, 0, 0, unknown),
    ]
    numbers = [int(call.partition('=')[2]) for call in calls.split()]
    for number in sorted(numbers):
        lines += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    lines += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),               # its flags: a thread is allowed, a process is not
        (any_bit, 1, 0, CLONE_THREAD),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    return b''.join(struct.pack('HBBI', *line) for line in lines)


# ---- in the fork that becomes a program

def confine(strong, program_filter, cpu_seconds):
    """Takes from this process all that a program must not have; it cannot be taken back."""
    os.setsid()
    threads = THREADS if strong or os.geteuid() == USER else 1024    # else all processes of the user count
    if strong:
        call('unshare', NEW_NS)
        options = f'size={FOLDER_SIZE},nr_inodes={FOLDER_FILES},mode=700'
        mount('tmpfs', FOLDER, 'tmpfs', MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        os.chdir(FOLDER)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: threads,
        resource.RLIMIT_STACK: 64 << 20,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, limit in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(name, (limit, limit))
    call('capset', (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)())
    call('prctl', PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call('prctl', PR_SET_DUMPABLE, 0, 0, 0, 0)
    call('prctl', PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if program_filter:
        lines = ctypes.create_string_buffer(program_filter, len(program_filter))
        head = struct.pack('HxxxxxxP', len(program_filter) // 8, ctypes.addressof(lines))
        call('prctl', PR_SET_SECCOMP, MODE_FILTER, ctypes.c_char_p(head), 0, 0)


def become(files):
    """Makes (code, stdin, stdout, stderr) this process's own and closes everything else; returns the code."""
    with open(files[0], 'rb', closefd=False) as file:
        code = file.read()
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
    os.closerange(3, 1024)
    sys.stdin = sys.__stdin__ = open(0, encoding='utf-8', errors='surrogateescape', closefd=False)
    sys.stdout = sys.__stdout__ = open(1, 'w', encoding='utf-8', errors='surrogateescape', closefd=False)
    sys.stderr = sys.__stderr__ = open(2, 'w', encoding='utf-8', errors='backslashreplace', closefd=False)
    return code


# ---- the loop

def kill(child, strong):
    with contextlib.suppress(ProcessLookupError):
        if not strong:      # else it is the first process of its namespace: the others end with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)


def watch(control, child, timeout):
    """Waits until the child has ended, its time has, or whoever asked is gone; False where it has ended."""
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(control, 0)           # a hang-up is always reported
    events = dict(poll.poll(timeout * 1000))
    os.close(handle)
    return handle not in events


def serve(control, strong, namespace, program_filter):
    """Answers requests for ever; returns the program's code, once, in each fork that is to run it."""
    while True:
        request, files, *_ = socket.recv_fds(control, REQUEST.size, 4)
        if not request:
            sys.exit()
        timeout, = REQUEST.unpack(request)
        folder = None if strong else tempfile.mkdtemp(prefix='sandbox-')
        ready, tell = os.pipe()
        if strong:
            call('unshare', NEW_PID)     # for the next fork
        child = os.fork()
        if child == 0:
            try:
                os.close(ready)
                if folder:
                    os.chdir(folder)
                confine(strong, program_filter, int(timeout) + 2)
                os.write(tell, b'!')
                return become(files)
            except BaseException:
                os.write(files[3], traceback.format_exc().encode())
                os._exit(1)
        if strong:
            call('setns', namespace, NEW_PID)
        os.close(tell)
        confined = os.read(ready, 1)
        for file in (ready, *files):
            os.close(file)
        start = time.monotonic()
        late = watch(control, child, timeout) if confined else False
        kill(child, strong)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - start
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        control.sendall(REPLY.pack(bool(confined), late, seconds, status))


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    strong = sys.argv[2] == 'strong'
    namespace, program_filter, missing = None, None, []
    os.environ.clear()
    for name in PRELOADED:
        importlib.import_module(name)
    try:
        program_filter = filter_program()
    except OSError as error:
        missing.append(error.strerror)
    try:
        namespace = enter_namespaces() if strong else leave_root()
    except OSError as error:
        missing.append(f'no namespaces ({error.strerror or error})')
    control.sendall(HELLO.pack('; '.join(missing).encode()))
    if missing and strong:
        sys.exit()
    gc.freeze()                         # the forks share these objects' pages
    try:
        return serve(control, strong, namespace, program_filter)
    except ConnectionError:             # whoever asked is gone
        sys.exit()


def end(error):
    """Ends this process as Python ends a program that raised `error` (None: one that did not)."""
    status = 0
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            status = error.code
        elif error.code is not None:
            status = 1
            print(error.code, file=sys.stderr)
    elif error:
        status = 1
        outside = error.__traceback__.tb_next           # without the line of this file
        sys.excepthook(type(error), error.with_traceback(outside), error.__traceback__)
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, AttributeError):     # over the limit; replaced by something else
            status = status or 120
    os._exit(status & 255)


if __name__ == '__main__':
    source, error = main(), None
    sys.argv = ['program.py']
    sys.modules['__main__'] = types.ModuleType('__main__')
    random.seed(0)                      # a reward must not depend on chance
    try:
        exec(compile(source, 'program.py', 'exec'), sys.modules['__main__'].__dict__)
    except BaseException as raised:
        error = raised
    end(error)
