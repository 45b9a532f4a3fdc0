"""Two hosts under torchrun, of which one is cut off in the middle of a run and brought back.

    python bench/hosts.py [script]

The hosts are network namespaces with a cable between them, which needs no root where users may make
namespaces. Prints how long each host took to notice, what it said, and in what files the end differs from
that of two hosts that were left alone.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))

from chaos import differences, saved, small_run  # noqa: E402


class Host:
    """A network namespace at 10.0.0.`number`, whose end of the cable is the device host`number`."""

    def __init__(self, number):
        self.number, self.device = number, f'host{number}'
        self.holder = subprocess.Popen(['unshare', '--net', 'sleep', 'infinity'])
        inside, own = f'/proc/{self.holder.pid}/ns/net', os.readlink('/proc/self/ns/net')
        while os.readlink(inside) == own:
            time.sleep(0.01)

    def command(self, *words):
        return ['nsenter', '--net', '--target', str(self.holder.pid), *words]

    def ip(self, *words):
        subprocess.run(self.command('ip', *words), check=True)

    def plug_in(self):
        subprocess.run(['ip', 'link', 'set', self.device, 'netns', str(self.holder.pid)], check=True)
        self.ip('address', 'add', f'10.0.0.{self.number}/24', 'dev', self.device)
        self.ip('link', 'set', 'lo', 'up')
        self.ip('link', 'set', self.device, 'up')

    def torchrun(self, script, flags, name):
        """Starts this host's part of the run `name`; what it says goes to NAME-host.log."""
        is_host = 'true' if self.number == 1 else 'false'       # of the store through which the hosts meet
        words = ['--nnodes=2', '--nproc_per_node=1', '--max_restarts=3', '--rdzv_backend=c10d',
                 '--rdzv_endpoint=10.0.0.1:29500', f'--rdzv_id={name}', f'--rdzv_conf=is_host={is_host}',
                 f'--local_addr=10.0.0.{self.number}', os.path.join(ROOT, f'{script}.py'), *flags,
                 f'--output_dir={name}', '--resume=auto']
        log = open(f'{name}-{self.device}.log', 'a')
        return subprocess.Popen(self.command(sys.executable, '-m', 'torch.distributed.run', *words),
                                stdout=log, stderr=log,
                                env={**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1',
                                     'GLOO_SOCKET_IFNAME': self.device, 'OMP_NUM_THREADS': '1'})


def said(log, words):
    """The first line of a log with these words in it, or ''."""
    lines = Path(log).read_text().splitlines() if os.path.exists(log) else []
    return next((line for line in lines if words in line), '')


def wait_until(happened, seconds):
    """How long it took until happened()."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() < began + seconds, 'nothing happened'
        time.sleep(0.1)
    return time.monotonic() - began


def main(script):
    flags = small_run(script, steps=24)
    first, second = Host(1), Host(2)
    try:
        subprocess.run(['ip', 'link', 'add', 'host1', 'type', 'veth', 'peer', 'name', 'host2'], check=True)
        first.plug_in()
        second.plug_in()
        whole = [host.torchrun(script, flags, 'whole') for host in (first, second)]
        assert [process.wait() for process in whole] == [0, 0], Path('whole-host1.log').read_text()

        on_first, on_second = (host.torchrun(script, flags, 'killed') for host in (first, second))
        wait_until(lambda: len(saved('killed')) > 1, 120)
        second.ip('link', 'set', 'host2', 'down')
        print(f'cut off at step {saved("killed")[-1][0]}', flush=True)
        began = time.monotonic()
        for host in (first, second):
            log = f'killed-{host.device}.log'
            wait_until(lambda: said(log, 'sign of life') or said(log, 'another process of this run'), 120)
            line = said(log, 'sign of life') or said(log, 'another process of this run')
            print(f'{host.device} after {time.monotonic() - began:.0f} s: {line}', flush=True)
        try:
            ended = f'ended with status {on_second.wait(timeout=60)}'
        except subprocess.TimeoutExpired:       # it still waits for the host of its store
            on_second.kill()
            ended = 'did not end, and was killed'
        print(f'torchrun of the lost host {ended}, {time.monotonic() - began:.0f} s after', flush=True)
        second.ip('link', 'set', 'host2', 'up')
        on_second, began = second.torchrun(script, flags, 'killed'), time.monotonic()
        assert [on_first.wait(), on_second.wait()] == [0, 0], Path('killed-host1.log').read_text()[-3000:]
        print(f'brought back, the run ended after {time.monotonic() - began:.0f} s; '
              f'{said("killed-host1.log", "resume    killed")}; differ in '
              f'{", ".join(differences()) or "nothing"}', flush=True)
        sys.exit(bool(differences()))
    finally:
        for host in (first, second):
            host.holder.kill()


if __name__ == '__main__':
    if os.environ.get('HOSTS') != 'inside':
        os.environ['HOSTS'] = 'inside'
        words = [sys.executable, os.path.abspath(__file__), *sys.argv[1:]]
        os.execvp('unshare', ['unshare', '--map-root-user', '--net', *words])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(*(sys.argv[1:] or ['train_gpt']))
