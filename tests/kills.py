"""A run of a training script that is left alone and one that is killed and resumed, for tests to compare."""
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_and_kill(script, flags, shares=(), steps=(), resume='--resume', out='--output_dir'):
    """Runs `script` with `flags` into whole/, and again into killed/ with SIGKILLs on the way;
    the CompletedProcess, whose stdout is how many of them came before the end.

    shares  of the first run's time: one SIGKILL after each, counted from the start or from the last kill
    steps   one SIGKILL up to 0.05 s after a checkpoint of each of them, or of a later one
    """
    job = dict(script=script, flags=flags, shares=list(shares), steps=list(steps), resume=resume, out=out)
    return subprocess.run([sys.executable, os.path.abspath(__file__), json.dumps(job)], capture_output=True, text=True)


def child(script, flags, shares, steps, resume, out):
    """run_and_kill in a process without threads: the script is imported once,
    and every run is a fork of it."""
    sys.path.insert(0, ROOT)
    import matplotlib.figure  # noqa: F401

    from configurator import parse
    module = importlib.import_module(script)
    answer, sys.stdout = sys.stdout, open(os.devnull, 'w')

    def saved(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return max((int(name.partition('-')[2]) for name in names if name.startswith('checkpoint-')), default=0)

    def ended(pid):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def attempt(folder, wait=None):
        """Runs to the end, or to a SIGKILL when wait(pid) returns; whether it ended."""
        argv = [resume] if saved(folder) else flags
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                module.main(parse(module.Config, [*argv, f'{out}={folder}']))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if wait:
            wait(pid)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status == 0

    def at_checkpoint(step):
        def wait(pid):
            while saved('killed') < step and not ended(pid):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        return wait

    rng, begun = random.Random(0), time.monotonic()
    assert attempt('whole')
    seconds, kills = time.monotonic() - begun, 0
    for wait in [*(lambda pid, share=share: time.sleep(share * seconds) for share in shares), *map(at_checkpoint, steps)]:
        if attempt('killed', wait):
            break
        kills += 1
    else:
        assert attempt('killed')
    answer.write(str(kills))


if __name__ == '__main__':
    child(**json.loads(sys.argv[1]))
