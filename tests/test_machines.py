"""Ranks that are lost, starts anew by torchrun, and SLURM: what several machines need."""
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from chaos import differences, saved, small_run
from configurator import UserError, parse
from conftest import ROOT
from nanoforge import heartbeat
from nanoforge.run import check_folder_is_shared
from test_run import ranks


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def error_output_to(path):
    """What a process writes to its standard error, in a fork of this one too."""
    own, file = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(file)


def quick_heartbeat(run, monkeypatch):
    monkeypatch.setattr(heartbeat, 'BEAT', 0.1)
    return heartbeat.Heartbeat(run.rank, run.world_size, run.max(7))


def test_a_rank_that_halts_is_named_and_the_other_ends(monkeypatch):
    """Its connections stay open, so that the other would wait for it for half an hour."""
    def work(run):
        quick_heartbeat(run, monkeypatch)
        if run.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        with open(2, 'w', closefd=False) as sys.stderr:
            run.barrier()

    def wake_when_the_other_has_ended(pids):
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        os.kill(pids[1], signal.SIGKILL)
    with error_output_to('said'):
        assert ranks(work, between=wake_when_the_other_has_ended) == [2, -signal.SIGKILL]
    said = open('said').read()
    assert 'rank 1 of this run gives no sign of life' in said and 'Traceback' not in said


def test_a_rank_that_has_closed_is_not_missed(monkeypatch):
    def work(run):
        beating = quick_heartbeat(run, monkeypatch)
        run.barrier()
        time.sleep(0.5)
        beating.stop()
        if run.rank == 0:
            time.sleep(0.1 * heartbeat.SILENCE + 1)
        return 7
    assert ranks(work) == [7, 7]


def test_machines_that_do_not_share_the_output_folder_are_told():
    def work(run):
        check_folder_is_shared(run, 'out', {'run': 'a'})
        check_folder_is_shared(run, 'out', None)
        try:
            check_folder_is_shared(run, 'out', {'run': 'a'} if run.rank else None)
        except UserError as error:
            return 5 if 'a file system that they share' in str(error) else 1
    assert ranks(work) == [5, 5]


def test_torchrun_starts_again_where_a_rank_was_killed(monkeypatch):
    """--resume=auto begins, and after a SIGKILL of a rank goes on; it ends as a run that was left alone."""
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    command = [os.path.join(ROOT, 'train_gpt.py'), *small_run('train_gpt', steps=8), '--resume=auto']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1']
    process = subprocess.Popen([sys.executable, *torchrun, *command, '--output_dir=killed'],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(saved('killed')) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as children:
        os.kill(int(children.read().split()[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert 'another process of this run ended' in said and 'resume    killed/checkpoint-' in said
    alone = [sys.executable, *command, '--num_gpus=2', '--output_dir=whole']
    subprocess.run(alone, check=True, capture_output=True)
    assert differences() == []


@pytest.mark.parametrize('flag', ['--resume=auto', '--resume_from_checkpoint=auto'])
def test_fine_tuning_begins_or_goes_on(flag, capsys):
    from train_sft import Config, main
    flags = [*small_run('train_sft', steps=2), '--output_dir=out', flag]
    for steps, resumes in ((2, False), (3, True)):
        assert main(parse(Config, [*flags, f'--max_steps={steps}']))['step'] == steps
        assert ('resume    out/checkpoint-2' in capsys.readouterr().out) == resumes


SRUN = '''#!/bin/bash
printf '%s\\n' "$@" > asked
[ "$1" = torchrun ] || exit 9
trap 'echo saved > stopped; exit 143' TERM
echo ready > ready
for i in $(seq 100); do [ -e finish ] && exit "$(cat finish)"; sleep 0.05; done
'''


@pytest.mark.parametrize('event', ['ends', 'fails', 'out of time', 'taken away'])
def test_slurm(event, monkeypatch, tmp_path):
    """Its srun and scontrol are stand-ins here: what is asked of them, and when a job is queued again."""
    for name, text in (('srun', SRUN), ('scontrol', '#!/bin/bash\n[ "$1" = show ] && echo n1 && echo n2\n'
                                                    '[ "$1" = requeue ] && echo "$2" > requeued\ntrue\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '41007',
           'SLURM_NNODES': '2', 'SLURM_JOB_NODELIST': 'n[1-2]', 'SLURM_GPUS_ON_NODE': '8'}
    path = os.path.join(ROOT, 'scripts/launch_slurm.sh')
    process = subprocess.Popen(['bash', path, 'train_sft.py', '--a=b c'], env=env)
    while not os.path.exists('ready'):
        time.sleep(0.01)
        assert process.poll() is None
    if event in ('ends', 'fails'):
        (tmp_path / 'new').write_text('0' if event == 'ends' else '2')
        os.replace('new', 'finish')
    else:
        process.send_signal(signal.SIGUSR1 if event == 'out of time' else signal.SIGTERM)
    assert process.wait(timeout=60) == {'ends': 0, 'fails': 2}.get(event, 143)
    assert os.path.exists('requeued') == (event == 'out of time')
    asked = open('asked').read().splitlines()
    assert asked[-3:] == ['train_sft.py', '--a=b c', '--resume=auto'] and '--rdzv_endpoint=n1:21007' in asked
    assert {'--nnodes=2', '--nproc_per_node=8', '--rdzv_id=41007'} <= set(asked)
