"""run.py, log.py and checkpoint.py: real files, real signals, real ranks. Child processes are forked, which
is fast."""
import importlib
import itertools
import json
import math
import os
import resource
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import SCRIPTS, UserError, configclass, parse
from conftest import ROOT
from model import GPT, GPTConfig
from nanoforge.checkpoint import (Checkpoints, damage, read_checkpoint, read_manifest, resolve_link, run_of,
                                  start_fresh, symlink, write_manifest)
from nanoforge.flags import RunFlags
from nanoforge.log import Log, device_peak_flops
from nanoforge.optim import SGD, AdamW, WeightAverage
from nanoforge.run import (LossScale, Run, State, Stop, describe_device, explain_out_of_memory, resume_command,
                           seed_for, setup)


@pytest.fixture(scope='module')
def run():
    return setup('cpu', 'float32', 'float32')


def model_of(step):
    def write(folder):
        save_file({'w': torch.full((40, 50), float(step))}, os.path.join(folder, 'model.safetensors'))
        Path(folder, 'config.json').write_text(f'{{"step": {step}}}')
    return write


def save(checkpoints, step, best=False, **options):
    checkpoints.save(step, model_of(step), {'m.w': torch.full((40, 50), step / 2)}, {'step': step}, best,
                     **options)


def names(folder):
    return sorted(os.listdir(folder))


def forked(*works, between=lambda pids: None):
    """Run each work() in a child of its own; between(pids) meanwhile. Their exit codes, minus the signal if
    killed."""
    pids = []
    for work in works:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = work() or 0
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                os._exit(code)
        pids.append(pid)
    between(pids)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def ranks(work, **more):
    """work(run) on two gloo ranks; their exit codes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
        run = setup('cpu')
        code = work(run)
        run.close()
        return code
    return forked(lambda: child(0), lambda: child(1), **more)


# device, precision, ranks

def test_setup(capsys):
    assert (setup('cpu').dtype, setup('cpu', 'bf16').dtype) == (torch.float32, torch.float32)
    assert 'bf16 on a CPU means float32' in capsys.readouterr().out
    run = setup('cpu', matmul='bf16')
    assert (run.matmul, run.rank, run.world_size, run.is_main) == ('bf16', 0, 1, True)
    assert setup('cpu').matmul == ('bf16' if torch.cpu._is_avx512_bf16_supported() else 'float32')
    assert 'float32' in describe_device(run) and 'bf16 matrix products' in describe_device(run)
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize('settings', [{'device': 'gpu'}, {'device': 'cpu', 'dtype': 'int8'}, {'matmul': 'fp8'}])
def test_setup_names_the_choices(settings):
    with pytest.raises(UserError, match='is none of'):
        setup(**settings)


def test_no_gpu():
    with pytest.raises(UserError, match='--device=cuda needs an NVIDIA GPU'):
        setup('cuda')


def test_two_ranks():
    def work(run):
        total = run.sum(torch.tensor([1.0, 10.0 * run.rank]))
        assert total.tolist() == [2.0, 10.0]
        assert run.any(run.rank == 1) and not run.any(False) and run.max(run.rank * 7) == 7
        assert run.on_main(lambda: 5) == (5 if run.is_main else None)
        run.barrier()
        try:
            run.on_main(lambda: 1 / 0)
        except (ZeroDivisionError, UserError) as error:     # on both: no rank waits for ever
            return 10 + isinstance(error, UserError)
    assert ranks(work) == [10, 11]


def test_two_ranks_gather_what_each_has():
    """Rows of any number on each rank, of what JSON holds:
    text of any script, numbers to the last bit, half a surrogate pair."""
    def work(run):
        mine = [[0.1 + 0.2, 'Z\u00fcrich \ud800', None], [1e-300, True, [3]]] if run.rank else []
        assert run.gather(mine) == [[0.1 + 0.2, 'Z\u00fcrich \ud800', None], [1e-300, True, [3]]]
        assert run.gather([run.rank] * (2 - run.rank)) == [0, 0, 1] and run.gather([]) == []
        return 3
    assert ranks(work) == [3, 3]


def test_what_is_printed_goes_to_the_text_log_too(tmp_path, capsys):
    run = setup('cpu')
    run.print0('before')
    run.text_log = tmp_path / 'train.log'
    run.print0('after')
    assert run.text_log.read_text(encoding='utf-8') == 'after\n' and 'before' in capsys.readouterr().out


def test_two_ranks_save_and_load(tmp_path):
    def work(run):
        assert Checkpoints(tmp_path / 'out', run).latest() is None
        start_fresh(run, tmp_path / 'out', {})
        checkpoints = Checkpoints(tmp_path / 'out', run)
        save(checkpoints, 3)
        assert checkpoints.latest() == str(tmp_path / 'out' / 'checkpoint-3')
        save(checkpoints, 4)
        run.on_main(lambda: (tmp_path / 'out/checkpoint-4/config.json').write_text('damaged'))
        assert checkpoints.latest() == str(tmp_path / 'out' / 'checkpoint-3')
        try:
            checkpoints.save(5, lambda folder: 1 / 0, {}, {})
        except (ZeroDivisionError, UserError):
            return 7
    assert ranks(work) == [7, 7]


def test_seed_for():
    drawn = {seed_for(*key) for key in itertools.product(range(4), ('data', 'eval'), range(30), range(12))}
    assert len(drawn) == 4 * 2 * 30 * 12 and all(0 <= seed < 2 ** 63 for seed in drawn)
    assert seed_for(1, 'data', 1, 11) != seed_for(1, 'data', 11, 1)
    assert seed_for(1, 'data', np.int64(3)) == seed_for(1, 'data', 3) == 5532001749118751188
    assert abs(np.mean(list(drawn)) / 2 ** 62 - 1) < 0.05


def test_device_peak_flops():
    assert device_peak_flops('NVIDIA A100-SXM4-80GB') == 312e12
    assert device_peak_flops('NVIDIA H100 PCIe') == 756e12 and device_peak_flops('NVIDIA H100 80GB '
                                                                                 'HBM3') == 989e12
    assert device_peak_flops('NVIDIA L40S') == 362e12 and device_peak_flops('NVIDIA GeForce GTX 1080') is None
    assert device_peak_flops(torch.device('cpu')) is None


def test_out_of_memory_names_the_flag():
    with pytest.raises(UserError, match='lower --batch_size or --block_size'):
        with explain_out_of_memory('--batch_size', '--block_size'):
            torch.empty(2 ** 50)
    with pytest.raises(RuntimeError, match='inconsistent tensor size'):
        with explain_out_of_memory('--batch_size'):
            torch.ones(2) @ torch.ones(3)


def test_loss_scale():
    scale = LossScale(torch.float16)
    grads = [torch.full((3,), 65536.0), torch.zeros(2)]
    scale.unscale_(grads)
    assert grads[0].tolist() == [1, 1, 1]
    assert scale.update(finite=False) and scale.value == 32768
    assert not any(scale.update(finite=True) for _ in range(1999)) and scale.value == 32768
    resumed = LossScale(torch.float16, json.loads(json.dumps(scale.state)))
    resumed.update(finite=True)
    assert resumed.value == 65536
    # at 1 it is the model's fault
    assert [resumed.update(finite=False) for _ in range(17)] == [True] * 16 + [False]
    plain = LossScale(torch.float32)
    assert plain.value == 1 and not plain.update(finite=False) and plain.value == 1


# signals



@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_the_loop(run, signum, code, tmp_path):
    def child():
        stop = Stop(run)
        (tmp_path / 'ready').touch()
        while not stop.requested:
            time.sleep(0.005)
        return stop.code

    def send(pids):
        while not (tmp_path / 'ready').exists():
            time.sleep(0.005)
        os.kill(pids[0], signum)
    assert forked(child, between=send) == [code]


def test_second_interrupt_kills_at_once(run, tmp_path):
    def child():
        Stop(run)
        (tmp_path / 'ready').touch()
        time.sleep(30)
        time.sleep(30)

    def send(pids):
        while not (tmp_path / 'ready').exists():
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(0.05)
        os.kill(pids[0], signal.SIGINT)     # the same Ctrl-C, passed on by a launcher
        time.sleep(1.1)
        assert os.waitpid(pids[0], os.WNOHANG) == (0, 0)
        os.kill(pids[0], signal.SIGINT)
    assert forked(child, between=send) == [-signal.SIGINT]


def test_a_signal_to_one_rank_stops_all():
    def work(run):
        stop = Stop(run)
        for _ in range(10):
            assert not stop.requested
        if run.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        run.barrier()
        return stop.code if stop.requested else 1
    assert ranks(work) == [143, 143]


def test_resume_command():
    assert resume_command(['train_sft.py', '--a', 'b c']) == "python train_sft.py --a 'b c' --resume"
    for earlier in (['--init_from=scratch'], ['--init-from', 'gpt2'], []):
        argv = ['train_gpt.py', *earlier, '--out_dir=x']
        assert resume_command(argv, '--init_from=resume') == 'python train_gpt.py --out_dir=x --init_from=resume'
    assert resume_command(['train_sft.py', '--resume', '--b=1']) == 'python train_sft.py --b=1 --resume'


# checkpoints

@pytest.fixture
def out(run, tmp_path):
    start_fresh(run, tmp_path / 'out', {'learning_rate': 1e-3})
    return tmp_path / 'out'


def test_save_and_read(run, out):
    save(Checkpoints(out, run), 5, best=True)
    optimizer, state = read_checkpoint(out / 'last')
    assert torch.equal(optimizer['m.w'], torch.full((40, 50), 2.5)) and state == {'step': 5}
    assert names(out / 'last') == ['config.json', 'manifest.json', 'model.safetensors',
                                   'optimizer.safetensors',
                                   'trainer_state.json']
    assert os.readlink(out / 'last') == os.readlink(out / 'best') == 'checkpoint-5'
    assert names(out) == ['best', 'checkpoint-5', 'config.json', 'last', 'manifest.json', 'model.safetensors',
                          'run_config.json']
    # no second copy on the disk
    assert (out / 'model.safetensors').samefile(out / 'last' / 'model.safetensors')
    assert json.loads((out / 'run_config.json').read_text())['config'] == {'learning_rate': 1e-3}
    assert (out / 'model.safetensors').stat().st_mode == (out / 'config.json').stat().st_mode


def test_root_holds_the_best_and_pruning_keeps_best_and_newest(run, out):
    checkpoints = Checkpoints(out, run, limit=2)
    (out / 'checkpoint-mine').mkdir()
    for step in range(1, 7):
        save(checkpoints, step, best=step == 2)
    assert names(out) == ['best', 'checkpoint-2', 'checkpoint-5', 'checkpoint-6', 'checkpoint-mine',
                          'config.json',
                          'last', 'manifest.json', 'model.safetensors', 'run_config.json']
    assert load_file(out / 'model.safetensors')['w'][0, 0] == 2 and os.readlink(out / 'best') == 'checkpoint-2'
    save(checkpoints, 6, best=True)     # the same step again
    assert os.readlink(out / 'best') == 'checkpoint-6' and load_file(out / 'model.safetensors')['w'][0,
                                                                                                     0] == 6
    assert names(out) == ['best', 'checkpoint-5', 'checkpoint-6', 'checkpoint-mine', 'config.json', 'last',
                          'manifest.json', 'model.safetensors', 'run_config.json']


def test_keep_all_and_names(run, out):
    checkpoints = Checkpoints(out, run, limit=None)
    for epoch in range(1, 5):
        save(checkpoints, epoch * 10, name=f'theta_checkpoint_epoch_{epoch}')
    assert [path.name for path, _ in checkpoints.own()] == [f'theta_checkpoint_epoch_{epoch}' for epoch in range(1, 5)]
    assert checkpoints.latest() == str(out / 'theta_checkpoint_epoch_4')


def test_save_only_model_leaves_two_resumable_states(run, out):
    """Not one: it might be found damaged, and the run would begin anew."""
    checkpoints = Checkpoints(out, run, limit=None, save_only_model=True)
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    left = [path.parent.name for path in sorted(out.rglob('optimizer.safetensors'))]
    assert left == ['checkpoint-3', 'checkpoint-4']
    assert len(list(out.glob('checkpoint-*/model.safetensors'))) == 4
    assert read_checkpoint(checkpoints.latest())[1]['step'] == 4
    os.truncate(out / 'checkpoint-4' / 'model.safetensors', 100)
    assert read_checkpoint(checkpoints.latest())[1]['step'] == 3
    with pytest.raises(UserError, match='cannot resume from .*checkpoint-2: optimizer.safetensors is '
                                        'missing'):
        read_checkpoint(out / 'checkpoint-2')


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.safetensors', 'config.json', 'manifest.json'])
@pytest.mark.parametrize('harm', ['cut', 'flip', 'remove'])
def test_damage_falls_back_to_the_checkpoint_before(run, out, capsys, file, harm):
    checkpoints = Checkpoints(out, run)
    save(checkpoints, 1)
    save(checkpoints, 2)
    path = out / 'checkpoint-2' / file
    content = bytearray(path.read_bytes())
    if harm == 'remove':
        path.unlink()
    else:
        content[0] ^= 1
        path.write_bytes(content if harm == 'flip' else content[:-3])
    assert checkpoints.latest() == str(out / 'checkpoint-1')
    said = capsys.readouterr().out
    assert 'checkpoint-2 is skipped: ' in said and file in said and said.count('\n') == 1
    with pytest.raises(UserError, match=f'checkpoint-2: .*{file}'):
        read_checkpoint(out / 'checkpoint-2')
    checkpoints.discard_later(checkpoints.latest())
    save(checkpoints, 2)    # what we cannot recognise as ours is not touched
    assert os.readlink(out / 'last') == ('checkpoint-2-new' if file == 'manifest.json' else 'checkpoint-2')
    assert damage(out / 'last') == ''


def test_every_bit_of_a_manifest_counts(run, out):
    """Flipped in turn, where it stays JSON too: no other step, run or `best` is believed."""
    checkpoints = Checkpoints(out, run)
    save(checkpoints, 1)
    save(checkpoints, 2, best=True)
    path = out / 'checkpoint-2' / 'manifest.json'
    content, whole = path.read_bytes(), read_manifest(path)
    path.unlink()                       # the root has a hard link to it
    for bit in range(0, 8 * len(content), 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        read = read_manifest(path)
        assert read in ({}, whole) or 'sha256' not in read      # that key itself, which earlier versions lack
    path.write_bytes(content.replace(b'"step": 2', b'"step": 3'))
    assert checkpoints.latest() == str(out / 'checkpoint-1')
    path.write_bytes(content)
    assert checkpoints.latest() == str(out / 'checkpoint-2')


def test_of_two_checkpoints_of_one_step_the_whole_one_is_taken(run, out):
    checkpoints = Checkpoints(out, run)
    save(checkpoints, 1, name='checkpoint-1')
    shutil.copytree(out / 'checkpoint-1', out / 'epoch_1')
    manifest = json.loads((out / 'epoch_1' / 'manifest.json').read_text())
    write_manifest(out / 'epoch_1', {**manifest, 'folder': 'epoch_1'})
    for damaged in ('checkpoint-1', 'epoch_1'):
        content = (out / damaged / 'config.json').read_text()
        (out / damaged / 'config.json').write_text('{')
        assert Path(checkpoints.latest()).name == {'checkpoint-1': 'epoch_1', 'epoch_1': 'checkpoint-1'}[damaged]
        (out / damaged / 'config.json').write_text(content)


def test_rewind_sets_the_abandoned_future_aside(run, out):
    checkpoints = Checkpoints(out, run, limit=None)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, best=step in (2, 3))
    checkpoints.discard_later(out / 'checkpoint-2')
    assert names(out / 'earlier-1') == ['checkpoint-3', 'checkpoint-4']
    assert os.readlink(out / 'last') == os.readlink(out / 'best') == 'checkpoint-2'
    assert load_file(out / 'model.safetensors')['w'][0, 0] == 2
    assert checkpoints.latest() == str(out / 'checkpoint-2')


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('where', ['model', 'optimizer'])
def test_nan_is_refused(run, out, bad, where):
    checkpoints = Checkpoints(out, run)
    save(checkpoints, 1)
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    with pytest.raises(UserError, match='step 2: a.weight holds NaN or inf'):
        checkpoints.save(2, lambda folder: save_file({'a.weight': broken if where == 'model' else good},
                                                     os.path.join(folder, 'model.safetensors')),
                         {'a.weight': broken if where == 'optimizer' else good}, {})
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == before


def test_killed_at_every_step_of_a_save(run, out):
    """SIGKILL at each file-system call of a save, in turn: what is left is always whole, and the next save
    works."""
    for step in (1, 2):
        save(Checkpoints(out, run), step, best=True)
    for kill_at in itertools.count(1):
        copy = out.with_name(f'copy-{kill_at}')
        shutil.copytree(out, copy, symlinks=True)
        checkpoints = Checkpoints(copy, run)

        def child():
            calls = itertools.count(1)

            def hook(event, args):
                if event in ('open', 'os.rename', 'os.link', 'os.symlink', 'os.remove', 'os.mkdir',
                             'os.rmdir'):
                    if next(calls) == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            save(checkpoints, 3, best=True)     # and prune checkpoint-1
        [status] = forked(child)
        latest = Path(checkpoints.latest())
        step = int(latest.name[-1])
        assert step in (2, 3) and read_checkpoint(latest)[1] == {'step': step}
        assert read_checkpoint(latest)[0]['m.w'][0, 0] == step / 2
        assert load_file(latest / 'model.safetensors')['w'][0, 0] == step
        assert not any(damage(path) for path in (copy / 'last', copy / 'best', *copy.glob('checkpoint-*')))
        assert load_file(copy / 'model.safetensors')['w'][0, 0] in (2, 3)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        checkpoints.discard_later(latest)
        save(checkpoints, 3, best=True)
        assert names(copy) == ['best', 'checkpoint-2', 'checkpoint-3', 'config.json', 'last', 'manifest.json',
                               'model.safetensors', 'run_config.json']
        assert os.readlink(copy / 'best') == os.readlink(copy / 'last') == 'checkpoint-3'
        assert load_file(copy / 'model.safetensors')['w'][0, 0] == 3
    assert kill_at > 40


def test_full_disk(run, out):
    """Files may not grow beyond 10 kB in the child: the error of a full disk, without filling one."""
    checkpoints = Checkpoints(out, run)
    save(checkpoints, 1)

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        big = torch.zeros(20_000)
        for model, optimizer in ((torch.zeros(2), big), (big, torch.zeros(2))):
            with pytest.raises(UserError, match='cannot write .*checkpoint-2.*File too large.*before are '
                                                'intact'):
                checkpoints.save(2, lambda folder: save_file({'w': model}, os.path.join(folder, 'model.safetensors')),
                                 {'m.w': optimizer}, {})
    assert forked(child) == [0]
    assert 'checkpoint-2' not in names(out) and not list(out.glob('.nanoforge-tmp-*'))
    assert checkpoints.latest() == str(out / 'checkpoint-1')


def test_really_full_disk(tmp_path):
    """On a file system of 256 kB of its own, where the machine lets us have one."""
    script = f'''
import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
import torch
from safetensors.torch import save_file
from nanoforge.checkpoint import *; from nanoforge.run import setup
run = setup('cpu'); start_fresh(run, 'out', {{}}); checkpoints = Checkpoints('out', run)
for step in range(1, 9):
    try:
        checkpoints.save(step, lambda folder: save_file({{'w': torch.ones(11_000)}}, folder + '/model.safetensors'),
                         {{'m.w': torch.ones(11_000)}}, {{}})
    except UserError as error:
        print(step, error, checkpoints.latest())
        break
'''
    mount = f'mount -t tmpfs -o size=256k tmpfs {tmp_path} && cd {tmp_path} && exec "$0" "$@"'
    if subprocess.run(['unshare', '-rm', 'sh', '-c', mount, 'true'], capture_output=True).returncode:
        pytest.skip('no mount namespaces here')
    done = subprocess.run(['unshare', '-rm', 'sh', '-c', mount, sys.executable, '-c', script],
                          capture_output=True,
                          text=True)
    assert done.stdout.startswith('3 cannot write out/checkpoint-3') and 'No space left on device' in done.stdout, done
    assert done.stdout.strip().endswith('out/checkpoint-2')


def test_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / 'file').touch()
    for out_dir in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        with pytest.raises(UserError, match='cannot write'):
            start_fresh(run, out_dir, {})


# the output folder

def test_second_fresh_run_moves_only_our_files(run, out, capsys):
    save(Checkpoints(out, run), 1, best=True)
    (out / 'notes.txt').write_text('mine')
    (out / 'checkpoint-old').mkdir()
    (out / 'log.jsonl').write_text('{}\n')
    first = json.loads((out / 'run_config.json').read_text())
    start_fresh(run, out, {'seed': 2})
    assert names(out) == ['checkpoint-old', 'earlier-1', 'notes.txt', 'run_config.json']
    assert names(out / 'earlier-1') == ['best', 'checkpoint-1', 'config.json', 'last', 'log.jsonl',
                                        'manifest.json',
                                        'model.safetensors', 'run_config.json']
    assert damage(out / 'earlier-1' / 'last') == '' and 'earlier-1' in capsys.readouterr().out
    second = json.loads((out / 'run_config.json').read_text())
    assert second['run'] != first['run'] and second['config'] == {'seed': 2}
    start_fresh(run, out, {})
    assert names(out) == ['checkpoint-old', 'earlier-1', 'earlier-2', 'notes.txt', 'run_config.json']
    assert Checkpoints(out, run).latest() is None


def test_the_checkpoint_that_a_run_loads_stays_and_is_not_its_own(run, out):
    save(Checkpoints(out, run), 8)
    start_fresh(run, out, {}, keep=out / 'last')
    assert damage(out / 'last') == '' and 'model.safetensors' not in names(out)
    checkpoints = Checkpoints(out, run, limit=1)
    assert checkpoints.latest() is None
    for step in (4, 8, 12):
        save(checkpoints, step)
    assert load_file(out / 'checkpoint-8' / 'model.safetensors')['w'][0, 0] == 8
    assert [path.name for path, _ in checkpoints.own()] == ['checkpoint-12'] and damage(out / 'checkpoint-8') == ''


def test_the_model_of_the_root_can_be_where_a_run_starts(run, out):
    save(Checkpoints(out, run), 8)
    start_fresh(run, out, {}, keep=out)
    for folder in (out, out / 'earlier-1', out / 'earlier-1' / 'checkpoint-8'):
        assert load_file(folder / 'model.safetensors')['w'][0, 0] == 8
    save(Checkpoints(out, run), 1)
    assert load_file(out / 'model.safetensors')['w'][0, 0] == 1
    assert load_file(out / 'earlier-1' / 'model.safetensors')['w'][0, 0] == 8


@pytest.mark.parametrize('keep', [False, True])
def test_somebody_elses_model_is_refused(run, tmp_path, keep):
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match='holds a config.json that nanoforge did not write'):
        start_fresh(run, tmp_path, {}, keep=tmp_path if keep else None)
    assert names(tmp_path) == ['config.json'] and (tmp_path / 'config.json').read_text() == '{"model_type": "gpt2"}'


def test_pointer_without_symlinks(tmp_path):
    (tmp_path / 'checkpoint-1').mkdir()
    (tmp_path / 'last').write_text('checkpoint-1')
    assert resolve_link(tmp_path / 'last') == tmp_path / 'checkpoint-1'
    symlink(tmp_path / 'last', 'checkpoint-1')
    assert resolve_link(tmp_path / 'last').samefile(tmp_path / 'checkpoint-1')


# log

@pytest.fixture
def log_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path='log.jsonl'):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def scalars(tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [folder] = Path('logs').iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars(tag)], events.Tags()['tensors']


def test_log(run, log_folder, capsys):
    log = Log(run, '.', {'dataset': 'x', 'stand_in': True}, 1000)
    log.write(10, {'tokens_per_second': 152_000.4, 'grad_norm': float('nan'), 'loss': torch.tensor(2.5), 'clip': 3})
    log.write(500, {'tokens_per_second': 9.5, 'learning_rate': 3e-4, 'loss': 1.25, 'grad_norm': 1.0})
    log.text(500, 'sample', 'Hark')
    log.histograms(500, {'gradients/layer': torch.randn(100)})
    log.close()
    header, first, second, sample = lines()
    assert header['run'].pop('name').startswith(log_folder.name)
    assert header == {'run': {'dataset': 'x', 'stand_in': True}}
    assert list(first.items()) == [('step', 10), ('loss', 2.5), ('grad_norm', None), ('clip', 3),
                                   ('tokens_per_second', 152_000.4)]
    assert sample == {'step': 500, 'sample': 'Hark'}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith('step   10/1000  loss 2.5000  grad_norm nan  clip 3  tokens_per_second '
                               '152,000')
    assert shown[1].startswith('step  500/1000  loss 1.2500  grad_norm 1.0000  tokens_per_second  9.5000  '  # as wide
                               'learning_rate 3.00e-04  ETA 00:0')
    assert 'Hark' in shown
    assert scalars('loss') == ([(10, 2.5), (500, 1.25)], ['sample/text_summary'])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert EventAccumulator(str(next(Path('logs').iterdir()))).Reload().Tags()['histograms'] == ['gradients/layer']


def test_a_line_fits_the_console(run, log_folder, capsys):
    """The same keys in the same order, whatever the script; what has no room is in log.jsonl."""
    log = Log(run, '.', {}, 1000, tensorboard=False)
    many = {'entropy': 0.1, 'completions/mean_length': 20.0, 'ratio_max': 1.0, 'mine': 7, 'grad_norm': 0.25, 'approx_kl': 0.5,
            'success_rate': 0.5, 'reward': 0.75, 'loss': 1.5, 'num_tokens': 10}
    for step in (1, 2):
        log.write(step, many if step == 1 else dict(reversed(many.items())))
    log.write(3, {'validation/reward': 2.0, 'validation/greedy_success_rate': 0.25, 'validation/success_rate': 0.5})
    log.close()
    note, *shown = capsys.readouterr().out.splitlines()
    assert 'all numbers are in ./log.jsonl' in note
    keys = [re.findall(r'(\S+) +\S+', line.partition('  ETA')[0]) for line in shown]
    assert keys[0] == keys[1] == ['step', 'loss', 'success_rate', 'reward', 'approx_kl']
    assert keys[2] == ['step', 'validation/success_rate', 'validation/greedy_success_rate']
    assert all(len(line.partition('  ETA')[0]) <= 100 for line in shown)
    assert set(lines()[1]) == set(many) | {'step'}


def test_log_is_cut_where_the_run_resumes(run, log_folder):
    log = Log(run, '.', {}, 30)
    for step in (5, 10, 15, 20):
        log.write(step, {'loss': float(step)})
    log.close()
    with open('log.jsonl', 'a') as file:
        file.write('{"step": 25, "lo')      # killed while it wrote
    log = Log(run, '.', {}, 30, resume_step=10)
    log.write(15, {'loss': 0.5})
    log.close()
    assert [line.get('step', line.get('run')) for line in lines()] == [
        {'name': lines()[0]['run']['name']}, 5, 10, {'name': lines()[0]['run']['name'], 'resumed_at': 10}, 15]
    assert scalars('loss')[0] == [(5, 5.0), (10, 10.0), (15, 0.5)]


def test_only_the_main_rank_logs(run, log_folder):
    other = type(run)(run.device, run.dtype, run.matmul, rank=1)
    log = Log(other, '.', {}, 10)
    log.progress(1), log.write(1, {'loss': 1.0}), log.text(1, 'sample', ''), log.close()
    assert names('.') == []


def test_wandb_is_asked_for_but_missing(run, log_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='pip install wandb'):
        Log(run, '.', {}, 10, wandb='project')


def test_wandb_is_told_what_it_is(run, log_folder, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **settings: told.append(settings)))
    Log(run, '.', {'script': 'x'}, 10, wandb={'project': 'p', 'entity': 'e', 'name': 'n', 'tags': ['t']})
    assert told[0] == {'name': 'n', 'id': told[0]['id'], 'resume': 'allow', 'config': {'script': 'x'},
                       'project': 'p', 'entity': 'e', 'tags': ['t']}


# ---- a run's life

@configclass
class RunConfig(RunFlags):
    section = ''
    eval_only: bool = False  # as train_gpt.py has it


@dataclass
class MyState(State):
    beta: float = 0.5


class Toy:
    """Weights w (2,) whose gradient is what a step is given; and what a script does with them around its
    loop."""

    def __init__(self, out, interval=1, decay=0.0, total=20, **typed):
        cfg = RunConfig(device='cpu', matmul='float32', tensorboard=False, **typed)
        cfg.typed = frozenset(typed)
        self.run = Run.open(cfg, 'train_toy.py', out, cfg.resume, memory_flags=('--rows',), limit=None)
        self.w = torch.nn.Parameter(torch.zeros(2))
        if self.run.resumed:
            with torch.no_grad():
                self.w.copy_(load_file(os.path.join(self.run.resumed, 'model.safetensors'))['w'])
        self.optimizer = SGD([('w', self.w)], lr=1.0, momentum=0.5)
        self.ema = WeightAverage(self.optimizer, decay)
        self.state = self.run.restore(MyState('sgd'), self.optimizer, self.ema)
        self.log = self.run.start(total, self.state.step, {'data': 'toy'}, interval)

    def step(self, *gradient, lr=1.0, max_norm=0.0, tokens=10):
        for part in (0.25, 0.75):                           # two micro-batches
            self.run.backward((self.w * torch.tensor(gradient)).sum() * part)
        norm = self.run.step(self.optimizer, lr, max_norm)
        self.state.step += 1
        self.ema.update(self.state.step)
        self.log.train(self.state.step, tokens, loss=torch.tensor(float(self.state.step)), learning_rate=lr)
        return norm

    def save(self, **options):
        def write(folder):
            save_file({'w': self.w.detach().clone()}, os.path.join(folder, 'model.safetensors'))
        self.run.save(self.state, None, None, self.optimizer, self.ema, write=write, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A scratch folder; the signal handlers of before come back after the test."""
    monkeypatch.chdir(tmp_path)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_step_sums_micro_batches_clips_and_empties(folder):
    toy = Toy('out')
    assert toy.step(3.0, 4.0) == pytest.approx(5.0, abs=1e-6) and toy.w.tolist() == [-3, -4]
    assert not any(grad.any() for grad in toy.optimizer.grads)
    toy = Toy('out-2')
    assert toy.step(3.0, 4.0, lr=2.0, max_norm=0.5) == pytest.approx(5.0, abs=1e-6)     # before clipping
    torch.testing.assert_close(toy.w.detach(), torch.tensor([-0.6, -0.8]), atol=1e-6, rtol=0)


def test_a_run_that_goes_on_is_the_run_left_alone(folder, capsys):
    gradients = [(1.0, 2.0), (0.5, -1.0), (-2.0, 0.25), (1.0, 1.0), (0.125, 3.0)]
    whole = Toy('whole', interval=5, decay=0.5)
    for gradient in gradients:
        whole.step(*gradient)
    killed = Toy('killed', interval=5, decay=0.5, seed=3)
    assert killed.run.cfg.seed == 3 and killed.run.resumed is None
    for gradient in gradients[:3]:
        killed.step(*gradient)
    killed.state.beta, killed.state.best_eval_loss = 0.75, 1.5
    killed.save()
    killed.log.close()
    again = Toy('killed', interval=5, decay=0.5, resume=True)
    assert again.run.resumed.endswith('checkpoint-3') and again.run.cfg.seed == 3
    assert (again.state.step, again.state.beta, again.state.best_eval_loss) == (3, 0.75, 1.5)
    for gradient in gradients[3:]:
        again.step(*gradient)
    for toy in (whole, again):
        assert toy.run.finish({'step': toy.state.step}, 'that was it') == {'step': 5}
    assert torch.equal(again.w, whole.w) and torch.equal(again.ema.means[0][0], whole.ema.means[0][0])
    assert torch.equal(again.optimizer.state_dict()['momentum_buffer/w'],
                       whole.optimizer.state_dict()['momentum_buffer/w'])
    losses = [[line['loss'] for line in lines(f'{name}/log.jsonl') if 'loss' in line] for name in ('whole',
                                                                                                   'killed')]
    assert losses == [[3.0], [3.0]]                         # the mean of 1 to 5, over the restart
    assert [line['run'].get('resumed_at') for line in lines('killed/log.jsonl') if 'run' in line] == [None, 3]
    assert json.loads(Path('killed/run_config.json').read_text())['config']['resume'] is True
    assert capsys.readouterr().out.count('that was it') == 2


def test_the_checkpoint_holds_the_average_and_beside_it_the_last_weights(folder):
    toy = Toy('out', decay=0.5)
    toy.step(1.0, 2.0)
    toy.step(1.0, 0.0)
    last = toy.w.detach().clone()
    toy.save()
    assert torch.equal(toy.w, last)                         # swapped back
    saved, (tensors, _) = load_file('out/checkpoint-2/model.safetensors')['w'], read_checkpoint('out/checkpoint-2')
    # decays (1 + t) / (10 + t): 2/11, 3/12; the weights were (-1, -2), then (-2.5, -3) by momentum
    expected = 0.25 * (9 / 11) * torch.tensor([-1.0, -2.0]) + 0.75 * torch.tensor([-2.5, -3.0])
    assert last.tolist() == [-2.5, -3.0] and torch.equal(tensors['weights/w'], last)
    torch.testing.assert_close(saved, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_steps_without_a_finite_gradient_are_skipped_and_at_last_given_up(folder, capsys, bad):
    toy = Toy('out')
    toy.step(1.0, 1.0)
    weights = toy.w.detach().clone()
    for count in (1, 2, 3, 4):
        assert not math.isfinite(toy.step(1.0, bad)) and toy.run.bad_steps == count
        assert torch.equal(toy.w, weights) and toy.optimizer.steps == 1
    assert capsys.readouterr().out.count('the gradient is not finite, the step is skipped') == 4
    toy.save()
    toy.log.close()
    toy = Toy('out', resume=True)
    assert toy.run.bad_steps == 4                           # a restart does not forget them
    toy.step(1.0, 1.0)
    assert toy.run.bad_steps == 0
    for _ in range(4):
        toy.step(bad, 1.0)
    toy.run.cfg.learning_rate = 0.25                        # what was typed, not what a schedule made of it
    with pytest.raises(UserError, match=r'5 steps in a row without a finite gradient: lower '
                                        r'--learning_rate=0.25'):
        toy.step(bad, 1.0, lr=0.125)


def test_a_float16_scale_is_undone_and_halves_where_it_overflows(folder):
    toy = Toy('out')
    toy.run.scaler = LossScale(torch.float16)
    toy.run.backward((toy.w * torch.tensor([3.0, 4.0])).sum())
    assert toy.w.grad.tolist() == [3 * 65536, 4 * 65536]
    assert toy.run.step(toy.optimizer, 1.0, 0.0) == 5.0 and toy.w.tolist() == [-3, -4]
    for halved in (32768, 16384, 8192, 4096, 2048, 1024):   # more than MAX_BAD_STEPS: no fault of the model's
        toy.step(math.inf, 1.0)
        assert toy.run.scaler.value == halved and toy.run.bad_steps == 0
    toy.save()
    toy.log.close()
    scale = json.loads(Path('out/last/trainer_state.json').read_text())['loss_scale']
    assert scale == [1024, 0] and LossScale(torch.float16, scale).value == 1024


def test_several_optimizers_step_together_or_not_at_all(folder):
    toy = Toy('out')
    v = torch.nn.Parameter(torch.zeros(1))
    pair = [toy.optimizer, SGD([('v', v)], lr=1.0, momentum=0.0)]
    toy.run.backward((toy.w * torch.tensor([3.0, 4.0])).sum() + 2 * v.sum())
    # each clipped by its own
    assert toy.run.step(pair, [1.0, 0.5], 1.0) == pytest.approx([5.0, 2.0], abs=1e-6)
    torch.testing.assert_close(toy.w.detach(), torch.tensor([-0.6, -0.8]), atol=1e-6, rtol=0)
    torch.testing.assert_close(v.detach(), torch.tensor([-0.5]), atol=1e-6, rtol=0)
    before = toy.w.detach().clone(), v.detach().clone()
    toy.run.backward((toy.w * torch.tensor([3.0, 4.0])).sum() + math.nan * v.sum())
    norms = toy.run.step(pair, [1.0, 0.5], 1.0)
    assert norms[0] == pytest.approx(5.0, abs=1e-6) and math.isnan(norms[1]) and toy.run.bad_steps == 1
    assert torch.equal(toy.w, before[0]) and torch.equal(v, before[1])

    # in a checkpoint each lies under its prefix, and so do parameters outside the model
    def write(folder):
        save_file({'w': toy.w.detach().clone()}, os.path.join(folder, 'model.safetensors'))
    toy.run.save(toy.state, None, None, {'': pair[0], 'critic/': pair[1]}, write=write,
                 parameters={'critic_weights/': {'v': v}}, round=7)
    tensors, saved = read_checkpoint('out/checkpoint-0')
    assert {'momentum_buffer/w', 'step', 'critic/step', 'critic_weights/v'} == set(tensors) and saved['round'] == 7
    other = torch.nn.Parameter(torch.zeros(1))
    fresh = SGD([('w', torch.nn.Parameter(torch.zeros(2)))], lr=1.0, momentum=0.5)
    toy.run.resumed = 'out/checkpoint-0'
    toy.run.restore(State('sgd'), {'': fresh, 'critic/': SGD([('v', other)], lr=1.0, momentum=0.0)},
                    parameters={'critic_weights/': {'v': other}})
    assert torch.equal(other, v) and fresh.steps == 1
    assert torch.equal(fresh.state_dict()['momentum_buffer/w'], tensors['momentum_buffer/w'])


def test_another_optimizer_starts_afresh_and_says_so(folder, capsys):
    toy = Toy('out')
    toy.step(1.0, 1.0)
    toy.save()
    toy.run.resumed = 'out/checkpoint-1'
    adam = AdamW([('w', torch.nn.Parameter(torch.zeros(2)))])
    state = toy.run.restore(State('adamw'), adam)
    assert (state.step, state.optimizer, adam.steps) == (1, 'adamw', 0)
    assert 'the run used sgd; adamw starts afresh' in capsys.readouterr().out


@pytest.mark.parametrize('flag', ['--resume', '--init_from=resume'])
def test_a_signal_saves_says_how_to_go_on_and_ends(folder, capsys, monkeypatch, flag):
    monkeypatch.setattr(sys, 'argv', ['train_toy.py', '--a=b c'])
    toy, saved = Toy('out'), []
    toy.run.resume_flag = flag
    toy.run.exit_if_asked(lambda: saved.append(1))
    assert not saved
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        toy.run.exit_if_asked(lambda: saved.append(1))
    assert stop.value.code == 143 and saved == [1] and not toy.log.is_open
    said = capsys.readouterr().out
    assert f"stopped at step 0, saved; go on with: python train_toy.py '--a=b c' {flag}\n" in said


def test_what_can_be_resumed(folder):
    with pytest.raises(UserError, match='--resume: .*none holds no run of train_toy.py with a checkpoint'):
        Toy('none', resume=True)
    toy = Toy('out', resume='auto')
    assert toy.run.resumed is None
    toy.step(1.0, 1.0)
    toy.save()
    toy.log.close()
    assert Toy('out', resume='auto').state.step == 1
    Path('out/checkpoint-1/model.safetensors').write_text('damaged')
    with pytest.raises(UserError, match='holds no whole checkpoint to resume from; start anew without '
                                        '--resume'):
        Toy('out', resume=True)
    with pytest.raises(UserError, match='holds no run of train_other.py'):
        cfg = RunConfig(device='cpu', resume=True)
        Run.open(cfg, 'train_other.py', 'out', True)


def test_keys_without_effect_are_said_when_a_run_opens(folder, capsys):
    cfg = parse(RunConfig, ['--device=cpu', '--dataloader_num_workers=4', '--no-low_cpu_mem_usage',
                            '--distributed=false'])
    Run.open(cfg, 'train_toy.py', 'out')
    said = capsys.readouterr().out
    assert said.count('changes nothing here') == 2 and 'note      dataloader_num_workers=4 changes' in said


def test_an_out_of_memory_names_the_flags_of_the_script(folder):
    toy = Toy('out')
    with pytest.raises(UserError, match='out of memory: lower --rows$'):
        with toy.run.autocast():
            torch.empty(2 ** 50)


def test_state_notes_evaluations():
    state = State('adamw')
    best = [state.note_eval(loss) for loss in (3.0, math.nan, 2.0, 2.0, 2.5, 1.0)]
    assert best == [True, False, True, False, False, True]
    assert state.best_eval_loss == 1.0 and state.evaluations_since_best == 0
    assert [state.note_eval(loss) for loss in (1.0, 1.0)] == [False,
                                                              False] and state.evaluations_since_best == 2
    assert state.plateau['scale'] == 1.0
    state.note_eval(1.0)                                    # a third without a better one
    assert state.plateau['scale'] == 0.5 and json.loads(json.dumps(asdict(state)))['plateau'] == state.plateau
    infinite = State('adamw')
    assert not infinite.note_eval(math.inf) and infinite.best_eval_loss is None


def test_speeds_count_training_alone(run, log_folder, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    log = Log(run, '.', {}, 100, tensorboard=False, interval=2)
    log.mark = clock[0]

    def train(step, seconds, **values):
        with log.timed('forward'):
            clock[0] += seconds / 2
        clock[0] += seconds / 2
        log.train(step, 300, **values)

    train(1, 2.0, loss=torch.tensor(1.0), epoch=0.1, ratio_max=1.5)
    with log.pause():
        clock[0] += 50.0                                    # an evaluation
        log.write(1, {'eval_loss': 4.0})
    train(2, 4.0, loss=torch.tensor(2.0), epoch=0.2, ratio_max=1.25)
    train(3, 1.0, loss=torch.tensor(5.0), epoch=0.3, ratio_max=1.0)
    train(4, 1.0, loss=torch.tensor(6.0), epoch=0.4, ratio_max=1.0)
    log.close()
    first, second = (line for line in lines() if 'loss' in line)
    assert (first['loss'], first['epoch'], first['ratio_max']) == (1.5, 0.2, 1.5)       # mean, last, highest
    assert first['tokens_per_second'] == 100 and first['time/forward'] == 3.0           # 600 tokens in 6 s
    assert second['tokens_per_second'] == 300 and second['loss'] == 5.5


def test_ranks_log_one_sum(log_folder):
    """A tensor is a rank's part of a sum; a number is the same on every rank."""
    def work(run):
        log = Log(run, '.', {}, 4, tensorboard=False, interval=2)
        for step in (1, 2):
            log.train(step, 10, loss=torch.tensor(float(step + 10 * run.rank)), learning_rate=0.5)
        log.close()
    assert ranks(work) == [0, 0]
    assert [(line['loss'], line['learning_rate']) for line in lines() if 'loss' in line] == [(13.0, 0.5)]


# folders that lie in one another, and runs at the same time

def tree(folder):
    """{path: content} of all that is in it, but for the lock."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*') if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith('.nanoforge-lock')}


def finished_run(run, out, steps=(2, 4), **options):
    start_fresh(run, out, {'out': str(out)}, script='train_sft.py')
    checkpoints = Checkpoints(out, run, limit=None)
    for step in steps:
        save(checkpoints, step, best=True, **options)
    (out / 'log.jsonl').write_text('{}\n')
    return checkpoints


def without_folder_and_settings(out):
    """As earlier versions wrote it."""
    for path in (*out.glob('*/manifest.json'), out / 'manifest.json'):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({key: manifest[key] for key in manifest if key not in ('folder', 'settings', 'sha256')}))


@pytest.mark.parametrize('is_old', [False, True])
def test_a_new_run_moves_no_run_that_lies_in_its_folder(run, tmp_path, is_old):
    models = tmp_path / 'models'
    others = [models / name for name in ('dpo', 'theta_custom', 'best_of_all', 'merged', 'rl/second', 'checkpoint-9')]
    for out in (models, *others):
        finished_run(run, out)
        if is_old:
            without_folder_and_settings(out)
    shutil.copytree(models / 'dpo' / 'checkpoint-2', models / 'checkpoint-3')       # copied by its user
    if not is_old:
        shutil.copytree(models / 'checkpoint-2', models / 'my_favourite')
        os.rename(models / 'checkpoint-2', models / 'the_other_one')
    (models / 'config.yaml').write_text('mine')
    kept = [*others, models / 'checkpoint-3', *models.glob('my_*'), *models.glob('the_*')]
    before = [tree(path) for path in kept]
    start_fresh(run, models, {}, script='train_sft.py')
    assert [tree(path) for path in kept] == before
    moved = {'best', 'last', 'checkpoint-4', 'config.json', 'manifest.json', 'model.safetensors', 'log.jsonl', 'run_config.json'}
    assert set(names(models / 'earlier-1')) == moved | ({'checkpoint-2'} if is_old else set())
    assert Checkpoints(models / 'rl' / 'second', run).latest() == str(models / 'rl' / 'second' / 'checkpoint-4')
    for step in range(10, 15):                          # nor does it prune them
        save(Checkpoints(models, run, limit=1), step)
    assert [tree(path) for path in kept] == before


def test_a_run_in_a_folder_above_moves_nothing(run, tmp_path):
    finished_run(run, tmp_path / 'out' / 'first')
    before = tree(tmp_path)
    start_fresh(run, tmp_path / 'out', {})
    assert {**tree(tmp_path), 'out/run_config.json': ''} == {**before, 'out/run_config.json': ''}


def test_what_was_loaded_moves_with_the_next_run_that_does_not_load_it(run, tmp_path):
    finished_run(run, tmp_path, name='epoch_1', steps=[4])
    first = load_file(tmp_path / 'epoch_1' / 'model.safetensors')
    start_fresh(run, tmp_path, {}, keep=[None, 'tiny', tmp_path / 'epoch_1'])
    assert names(tmp_path / 'epoch_1') and run_of(tmp_path / 'epoch_1')['config'] == {'out': str(tmp_path)}
    save(Checkpoints(tmp_path, run), 8, name='epoch_2')
    start_fresh(run, tmp_path, {})
    assert names(tmp_path / 'earlier-2') == ['best', 'config.json', 'epoch_1', 'epoch_2', 'last',
                                             'manifest.json', 'model.safetensors', 'run_config.json']
    assert torch.equal(load_file(tmp_path / 'earlier-2' / 'epoch_1' / 'model.safetensors')['w'], first['w'])


def test_a_checkpoint_knows_its_run_wherever_it_is(run, tmp_path):
    out = tmp_path / 'models'
    finished_run(run, out)
    (out / 'merged').mkdir()
    first = {'out': str(out)}
    for path in (out, out / 'last', out / 'checkpoint-2', out / 'merged'):
        assert run_of(path)['config'] == first
    shutil.copytree(out / 'checkpoint-2', tmp_path / 'copy')
    start_fresh(run, out, {'second': True}, keep=out / 'checkpoint-2')
    (out / 'llama').mkdir()                             # downloaded
    (out / 'llama' / 'config.json').write_text('{}')
    for path in (out / 'checkpoint-2', out / 'earlier-1' / 'checkpoint-4', tmp_path / 'copy'):
        assert run_of(path)['config'] == first
    assert run_of(out)['config'] == {'second': True} and run_of(out / 'llama') == run_of(tmp_path / 'none') == {}
    without_folder_and_settings(out / 'earlier-1')
    path = out / 'checkpoint-2' / 'manifest.json'
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ('settings', 'sha256')}
    for content in (old, {**old, 'files': {'policy_0/model.safetensors': {}}}):
        path.write_text(json.dumps(content))            # of an earlier version: its run's settings were moved
        part = 'policy_0' if 'policy_0/model.safetensors' in content['files'] else ''
        assert run_of(out / 'checkpoint-2' / part)['config'] == first
    path.write_text(json.dumps({**old, 'run': 'another'}))
    assert run_of(out / 'checkpoint-2') == {}


@pytest.mark.parametrize('resume', [False, True])
def test_two_runs_never_write_one_folder(folder, resume):
    """The second is refused and has touched nothing; a run that was killed holds nothing, though a child of
    it lives on."""
    reader, writer = os.pipe()

    def first():
        toy = Toy('out')
        toy.step(1.0, 2.0)
        toy.save()
        if os.fork():
            os.write(writer, b'.')
            time.sleep(60)
        time.sleep(5)                                   # the child

    def meanwhile(pids):
        os.read(reader, 1)
        before = tree(Path('out'))
        with pytest.raises(UserError, match=rf'^out: another run is writing there \(process {pids[0]} on .*stop it'):
            Toy('out', resume=resume)
        assert tree(Path('out')) == before
        assert Toy('other').state.step == 0
        Run.open(parse(RunConfig, ['--eval_only']), 'train_toy.py', 'out', True)            # it only reads
        os.kill(pids[0], signal.SIGKILL)
    assert forked(first, between=meanwhile) == [-signal.SIGKILL]
    assert Toy('out', resume=resume).state.step == int(resume)


def test_a_run_that_has_ended_lets_its_folder_go(folder):
    toy = Toy('out')
    toy.save()
    toy.run.finish({}, '')
    assert forked(lambda: Toy('out', resume=True).state.step) == [0]


def test_the_ranks_of_a_run_share_its_folder(folder):
    def work(run):
        run.checkpoints = Checkpoints('out', run)
        start_fresh(run, 'out', {}, lock=run.checkpoints.lock)
        save(run.checkpoints, 1)
    assert ranks(work) == [0, 0] and Path('out/.nanoforge-lock').read_text().startswith('process ')


def test_where_a_file_system_has_no_locks_it_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr('nanoforge.checkpoint.fcntl', None)
    Toy('out')
    assert 'note      no file locks here' in capsys.readouterr().out


@pytest.mark.parametrize('obstacle', ['file', 'link to itself'])      # which stop root, too
def test_without_a_folder_for_tensorboard_it_goes_on(run, log_folder, capsys, obstacle):
    Path('logs').touch() if obstacle == 'file' else Path('logs').symlink_to('logs')
    log = Log(run, '.', {}, 1)
    log.write(1, {'loss': 1.0})
    log.close()
    assert lines()[-1] == {'step': 1, 'loss': 1.0}
    assert f'no TensorBoard events: cannot write {log_folder}/logs: ' in capsys.readouterr().out


def test_documented_recipes_keep_every_checkpoint():
    recipes = [path for path in sorted(Path(ROOT, 'recipes', 'training').glob('*/*.yaml')) if '24GB' not in path.name]
    kept = {path.parent.name for path in recipes if 'save_total_limit: null' in path.read_text()}
    assert kept == {'sft', 'dpo', 'ppo', 'grpo', 'gspo'}
    for path in recipes:
        script = SCRIPTS[{'agents': 'at_grpo'}.get(path.parent.name, path.parent.name)]
        cfg = parse(importlib.import_module(script[:-3]).Config, [str(path)])
        assert getattr(cfg, 'save_total_limit', None) is None, path


@pytest.mark.parametrize('script', ['gpt', 'sft', 'dpo', 'rl', 'agents'])
def test_every_script_computes_layers_again(script, run):
    run.cfg = importlib.import_module(f'train_{script}').Config(gradient_checkpointing=True, checkpoint_every=2)
    model = GPT(GPTConfig(arch='llama', vocab_size=9, n_layer=3, n_head=1, n_embd=8)).train()
    assert run.prepare(model).gradient_checkpointing == 2
    with mock.patch('model.checkpoint', wraps=torch.utils.checkpoint.checkpoint) as again:
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert [call.args[0] for call in again.call_args_list] == [model.layers[0], model.layers[2]]
