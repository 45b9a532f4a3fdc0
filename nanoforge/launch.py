"""Processes: starting a command line again for several GPUs or in the background, and who a process is."""
import math, os, re, signal, socket, subprocess, sys, time

from nanoforge.errors import FAILED, UserError

ROLE = 'NANOFORGE_ROLE'  # tells a process that launch() starts what it is: 'detached' or 'worker'
LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # what torchrun sets
# How others say the number of processes, without what torch needs to join them
OTHER_LAUNCHERS = {'SLURM_STEP_NUM_TASKS': 'srun', 'OMPI_COMM_WORLD_SIZE': 'mpirun', 'PMI_SIZE': 'mpirun'}


def launch(cfg, argv):
    """Start this command line again as the settings num_gpus and nohup say, where cfg has them, and exit; or
    return.

    num_gpus  a process per GPU with torchrun's environment variables. Not through torchrun, where every
              failure is exit status 1 and a traceback: here it is that of the first to fail, and stop signals
              are passed on.
    nohup     a detached process writes to logs/training_<date>_<time>.log, whose last line is the exit
              status.
    """
    role, ranks = os.environ.pop(ROLE, None), getattr(cfg, 'num_gpus', None) or 1
    command = [sys.executable, sys.argv[0], *argv]
    rank, _, size = launched()
    if size > 1 and ranks not in (1, getattr(cfg, 'tensor_parallel', 1), size) and rank == 0:
        print(f'num_gpus={ranks} changes nothing: the launcher started {size} processes', file=sys.stderr)
    if role == 'worker' or size > 1 or getattr(cfg, 'plan', False):     # a plan needs none of the GPUs
        return
    if getattr(cfg, 'nohup', False) and role is None:
        log = open_log()
        env = {**os.environ, ROLE: 'detached', 'PYTHONUNBUFFERED': '1', 'PYTHONIOENCODING': 'utf-8'}
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
        print(f'started as PID {process.pid}; follow it: tail -f {log.name}')
        sys.exit(0)
    if ranks > 1 or role == 'detached':
        status = supervise(command, ranks)
        if role == 'detached':
            print(f'exit status {status}', flush=True)
        sys.exit(status)
    if getattr(cfg, 'accepted_values', {}).get('distributed') and 'RANK' not in os.environ:
        print('--distributed without a launcher is one process: --num_gpus=N starts N', file=sys.stderr)


def open_log():
    """A new file logs/training_<date>_<time>.log; two starts in one second get two."""
    while True:
        try:
            os.makedirs('logs', exist_ok=True)
            return open(time.strftime('logs/training_%Y%m%d_%H%M%S.log'), 'x', encoding='utf-8')
        except OSError as error:
            if not isinstance(error, FileExistsError) or not os.path.isdir('logs'):
                raise UserError(f'--nohup writes into {os.path.abspath("logs")}: {error.strerror}') from None
            time.sleep(0.1)


def launched():
    """(rank, local rank, number of processes) as torchrun, or launch(), puts them into the environment.

    (0, 0, 1) where nobody did. UserError where it says half of it, as what another job left over does.
    """
    env = {name: os.environ[name] for name in LAUNCHER if os.environ.get(name)}
    if not {'RANK', 'WORLD_SIZE'} & env.keys():
        for name, launcher in OTHER_LAUNCHERS.items():
            if os.environ.get(name, '1') != '1':
                raise UserError(f'{launcher} started {os.environ[name]} processes that do not know of each '
                                'other: let it start one torchrun on each node, or set RANK=0 WORLD_SIZE=1 '
                                'for one alone')
        return 0, 0, 1
    if env.get('WORLD_SIZE') == '1' and env.get('RANK', '0') == '0':
        return 0, 0, 1
    numbers = ('RANK', 'WORLD_SIZE', 'MASTER_PORT', *env.keys() & {'LOCAL_RANK'})
    wrong = [name for name in numbers if not re.fullmatch(r'[0-9]{1,9}', env.get(name, ''))]
    if 'MASTER_ADDR' not in env or wrong or int(env['RANK']) >= int(env['WORLD_SIZE']):
        found = ' '.join(f'{name}={value}' for name, value in env.items())
        missing = ', '.join(name for name in LAUNCHER if name not in env and name != 'LOCAL_RANK')
        fault = f'without {missing}' if missing else 'which do not fit together'
        raise UserError(f'the environment has {found}, {fault}: for one process `unset {" ".join(env)}`; '
                        'torchrun and --num_gpus=N set them all')
    local = env.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID', '0')
    return int(env['RANK']), int(local), int(env['WORLD_SIZE'])


def supervise(command, ranks):
    """The exit status of `command` in `ranks` processes: 0, or the first failure's (128 + signal)."""
    import shutil, tempfile  # here: --help and --print_config shall answer at once
    env, workers, stopped = {**os.environ, ROLE: 'worker'}, [], []

    def stop(signum, frame):
        stopped.append(signum)
        for worker in workers:
            worker.send_signal(signum)

    for name in {'SIGINT', 'SIGTERM', 'SIGHUP'} & set(dir(signal)):
        signal.signal(getattr(signal, name), stop)
    if ranks > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            env.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(ranks))
        env[FAILED] = tempfile.mkdtemp(prefix='nanoforge-')
        env.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // ranks)))
    # in sessions of their own: Ctrl-C reaches this process only, which passes it on once
    for rank in range(ranks):
        place = {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks > 1 else {}
        workers.append(subprocess.Popen(command, env={**env, **place}, start_new_session=True))
    status, deadline = 0, math.inf
    while None in (codes := [worker.poll() for worker in workers]) or not status and any(codes):
        if any(codes) and not status:
            status, deadline = next(filter(None, codes)), time.monotonic() + 10
            if status < 0 and ranks > 1 and not stopped:    # it could not say so itself
                reason = ' (was memory short?)' if status == -signal.SIGKILL else ''
                name = signal.Signals(-status).name
                print(f'rank {codes.index(status)} ended by {name}{reason}; the others are ended',
                      file=sys.stderr, flush=True)
        # they wait for the one that failed; stopped ones are saving
        if time.monotonic() > deadline and not stopped:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    shutil.rmtree(env.get(FAILED, ''), ignore_errors=True)
    return 128 - status if status < 0 else status
