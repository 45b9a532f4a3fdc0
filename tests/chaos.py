"""Runs of the training scripts that are killed, damaged and interrupted, beside one that is left alone; for
tests and for bench/chaos.py."""
import importlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 30       # seconds within which the other ranks end where one was killed
CLOCK = re.compile(r'second|runtime|time/|ETA|^resumed_at$|^metrics$')      # keys that tell of the clock

# Tiny runs: a checkpoint at each of {steps} steps, evaluations on the way
SMALL = {'train_gpt': '--dataset=letters --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 '
                      '--eval_iters=2 --sample_tokens=0 --dropout=0.1 --ema=0.9 --log_interval=3 '
                      '--gradient_accumulation_steps=2 --max_iters={steps} --eval_interval=1',
         'train_sft': '--base_model_name=model --dataset_path=rows.jsonl --per_device_train_batch_size=2 '
                      '--gradient_accumulation_steps=1 --sample_rows=0 --dropout=0.1 --ema=0.9 '
                      '--logging_steps=3 --max_steps={steps} --save_steps=1 --eval_steps=2',
         'train_dpo': '--base_model_name=model --dataset_path=pairs.jsonl --per_device_train_batch_size=2 '
                      '--gradient_accumulation_steps=1 --eval_samples=0 --use_lora --disable_dropout=false '
                      '--logging_steps=3 --max_steps={steps} --save_steps=1 --eval_steps=2',
         'train_rl': '--base_model_name=model --per_device_train_batch_size=4 '
                     '--gradient_accumulation_steps=1 --num_generations=2 --steps_per_generation=1 '
                     '--eval_problems=4 --num_problems=32 '
                     '--max_completion_length=6 --beta=0.05 --logging_steps=3 --max_steps={steps} '
                     '--save_steps=1 --eval_steps=2',
         'train_agents': 'env.benchmark=plan_path env.max_turns=2 env.map_size=3 env.min_moves=2 '
                         'training.epoch_size=2 training.train_sample_num=2 training.max_response_length=6 '
                         'training.validate_episodes=1 training.total_training_steps={steps} '
                         'training.val_freq=1 base_models.policy_0.path=model specialization=prompt'}


def small_run(script, steps):
    """The flags of a tiny run of `script`; its model and its data come into the current folder."""
    sys.path[:0] = [] if ROOT in sys.path else [ROOT]
    import torch

    from data.prepare import prepare_files
    from data.tokenizer import load_tokenizer
    from model import GPT, GPTConfig, find_model, save_model
    if not os.path.exists('model'):
        torch.manual_seed(0)
        model = GPT(GPTConfig(arch='qwen3', vocab_size=1024, block_size=256, n_layer=1, n_head=2, n_embd=16,
                              tied=True))
        save_model(model.init_weights(0.2), load_tokenizer(find_model('tiny')), 'model')
        Path('letters.txt').write_text('abcd efgh\n' * 200)
        prepare_files('letters', ['letters.txt'], 'char', 'written by the test')
    for name, keys in (('rows', ('question', 'answer')), ('pairs', ('prompt', 'chosen', 'rejected'))):
        rows = [{**{key: f'{key} {i}' for key in keys}, 'metadata': 'train' if i % 9 else 'eval'}
                for i in range(60)]
        Path(f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = SMALL[script].format(steps=steps).split()
    return [*flags, '--device=cpu', '--matmul=float32', '--tensorboard=false']


def survive(script, flags, kills=0, damage=False, signals=(), full_disk=False, ranks=1, seed=0,
            pictures=False):
    """Runs `script` with `flags` and --resume=auto into whole/, and again into killed/ with mishaps on the
    way; after each the same command goes on. Returns a dict:

    kills        SIGKILLs that came before the end, each to one rank, at a random moment of the start, the run
                 or a save: all that were asked for where there are four times as many checkpoints
    damage       what was damaged, once, after the last of them: a file of the newest checkpoint
    skipped      names of the checkpoints that the runs said they skip
    codes        exit statuses of the ranks for each of `signals`: (function of the script, signal, n), sent
                 to the last rank as it calls the function a n-th time
    full_disk    exit statuses of the ranks where the largest file of a checkpoint cannot be written whole
    seconds      the longest that the other ranks took to end after one was killed
    differences  names of the files in which the ends of the two runs differ
    pictures: draws them, which takes longer than these runs
    """
    job = dict(script=script, flags=flags, kills=kills, damage=damage, signals=list(signals), ranks=ranks,
               full_disk=full_disk, seed=seed, pictures=pictures)
    done = subprocess.run([sys.executable, os.path.abspath(__file__), json.dumps(job)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def folder_of(name):
    """Where the checkpoints of the run `name` lie."""
    teams = Path(name, 'latest', 'checkpoints')
    return teams if teams.exists() else Path(name)


def saved(name):
    """[(step, path)] of the checkpoints there, oldest first."""
    found = []
    for path in folder_of(name).glob('checkpoint-*'):
        if step := re.fullmatch(r'checkpoint-(\d+)(-new)*', path.name):
            found.append((int(step[1]), path))
    return sorted(found)


def without_clock(value):
    """JSON without what the clock says."""
    if isinstance(value, dict):
        return {key: without_clock(entry) for key, entry in value.items() if not CLOCK.search(key)}
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def ends(name):
    """{file: content} of what a run has left: the newest checkpoint, the model in the root, log and samples.
    Bytes; of JSON what is in it, but for the clock."""
    folder, left = folder_of(name), {}
    logs = [path for path in (folder, folder.parent) for path in path.glob('*.jsonl')]
    paths = {f'last/{path.relative_to(folder / "last")}': path for path in (folder / 'last').rglob('*')}
    paths |= {path.name: path for path in [*folder.glob('*'), *logs]}
    for key, path in paths.items():
        if not path.is_file() or path.suffix in ('.png', '.html', '.log') or path.name.startswith('.'):
            continue
        if path.name in ('manifest.json', 'run_config.json', 'letters.txt', 'rows.jsonl'):
            continue
        content = path.read_bytes()
        if path.suffix == '.jsonl':
            lines = map(json.loads, content.splitlines())
            content = [without_clock(line) for line in lines if 'run' not in line]
        elif path.name == 'trainer_state.json':
            content = without_clock(json.loads(content))
        left[key] = content
    assert 'last/optimizer.safetensors' in left and 'log.jsonl' in left
    return left


def differences(one='whole', other='killed'):
    """Names of the files in which the ends of two runs differ; [] where they are the same to the last bit."""
    one, other = ends(one), ends(other)
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def damage_file(folder, rng):
    """Cuts a file of a checkpoint short, or flips one of its bits; says which."""
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if cut := rng.random() < 0.5:
        content = content[:at]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.unlink()               # the root has hard links to it: those stay what they are
    path.write_bytes(content)
    return f'{path.name} {"cut at" if cut else "a bit flipped in"} byte {at}'


# ---- the process that forks

def child(script, flags, kills, damage, signals, full_disk, ranks, seed, pictures):
    """survive() in a process without threads: the script is imported once, and every rank is a fork of it."""
    sys.path.insert(0, ROOT)
    from configurator import parse, run_script
    from nanoforge import plots
    if not pictures:
        plots.write_png = lambda *rest: None
    if '--shard=full' in flags:         # imports seconds of torch, once instead of in every fork
        importlib.import_module('torch._dynamo')
    module, rng = importlib.import_module(script), random.Random(seed)
    report = {'kills': 0, 'codes': [], 'seconds': 0.0}

    def become_rank(name, rank, port, call, size_limit):
        log = os.open(f'{name}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        argv = [*flags, '--resume=auto', f'--output_dir={name}']
        sys.argv = [f'{script}.py', *argv]
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        if call and rank == ranks - 1:
            send_at(module, *call)
        if size_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, resource.RLIM_INFINITY))
        run_script(module.main, parse(module.Config, argv))

    def start(name, call=None, size_limit=None):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port, pids = free.getsockname()[1], []
        for rank in range(ranks):
            pids.append(os.fork())
            if not pids[-1]:
                code = 1
                try:
                    become_rank(name, rank, port, call, size_limit)
                    code = 0
                except SystemExit as stop:
                    code = stop.code
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
        return pids

    def wait(pids, patience=600.0):
        """Their exit statuses; whoever has not ended in so many seconds is killed."""
        codes, until = {}, time.monotonic() + patience
        while len(codes) < len(pids):
            for pid in set(pids) - set(codes):
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.002)
        return [codes[pid] for pid in pids]

    def has_ended(pid):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def wait_for_moment(pids, needs_checkpoints):
        """Until a random time, or a checkpoint is being written; or the run is two checkpoints further."""
        steps = {step for step, _ in saved('killed')}
        first, until = len(steps) + (ranks > 1), time.monotonic() + rng.uniform(0, seconds / 3)
        in_save, pause = rng.random() < 0.5, rng.uniform(0, 0.01)
        while not any(map(has_ended, pids)):
            time.sleep(0.0005)
            steps.update(step for step, _ in saved('killed'))
            needs_checkpoints = needs_checkpoints and len(saved('killed')) < 2
            if len(steps) < first or needs_checkpoints:     # or the ranks have not met: a launcher's business
                continue
            if in_save and any(folder_of('killed').glob('.nanoforge-tmp-checkpoint*')):
                return time.sleep(pause)
            if not in_save and time.monotonic() > until or len(steps) > first + 1:
                return

    began = time.monotonic()
    assert wait(start('whole')) == [0] * ranks, tail('whole.log')
    seconds = time.monotonic() - began
    for function, name, number in signals:
        report['codes'].append(wait(start('killed', (function, getattr(signal, name), number))))
    if full_disk:
        largest = max(path.stat().st_size for path in folder_of('whole').glob('last/*'))
        report['full_disk'] = wait(start('killed', size_limit=largest - 1))
    for i in range(kills):
        pids, is_last = start('killed'), i == kills - 1
        wait_for_moment(pids, damage and is_last)
        victim, began = rng.choice(pids), time.monotonic()
        os.kill(victim, signal.SIGKILL)
        codes = dict(zip(pids, wait(pids, PATIENCE)))
        if set(codes.values()) == {0}:
            break
        report['seconds'] = max(report['seconds'], round(time.monotonic() - began, 2))
        assert codes.pop(victim) == -signal.SIGKILL, codes
        assert set(codes.values()) <= {2}, (codes, tail('killed.log'))
        report['kills'] += 1
        if damage and is_last:
            newest = saved('killed')[-1][1]
            report['damage'] = f'{newest.name}/{damage_file(newest, rng)}'
    assert wait(start('killed')) == [0] * ranks, tail('killed.log')
    skipped = re.findall(r'^(\S+) is skipped: ', Path('killed.log').read_text(), re.M)
    print(json.dumps({**report, 'skipped': [os.path.basename(path) for path in skipped],
                      'differences': differences()}))


def tail(path):
    return Path(path).read_text()[-3000:]


def send_at(module, function, signum, number):
    """From now on the number-th call of this function of the script begins with a signal to its process."""
    real, calls = getattr(module, function), []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signum)
        return real(*args, **more)
    setattr(module, function, interrupted)


if __name__ == '__main__':
    child(**json.loads(sys.argv[1]))
