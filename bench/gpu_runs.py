"""Every script's default for some steps on a GPU, and the tests: what comes after bench/gpu.py.

    python bench/gpu_runs.py                  on the GPU: all rows
    python bench/gpu_runs.py --device=cpu     the same rows where there is none
    python bench/gpu_runs.py --only=gpt,rl    rows whose name holds one of these words
    python bench/gpu_runs.py --tests          the tests, too (side by side where pytest-xdist is installed)

A row is one run in a process of its own: exit status, wall seconds, first and last loss, tokens a second (the
median of the log's lines, without the first) and memory: of the card as nvidia-smi sees it, of the process on
a CPU. What a run that failed printed last is shown. The last line is JSON.
"""
import argparse
import glob
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RL = ['train_rl.py', 'training.output_dir={out}', 'training.logging_steps=1', '--max_steps=20']
TEAM = ['train_agents.py', 'training.experiment_name={name}', 'training.total_training_steps=4',
        'training.val_freq=4']
ROWS = {
    'gpt': ['train_gpt.py', '--out_dir={out}', '--max_iters=600', '--eval_iters=20'],
    'gpt compiled': ['train_gpt.py', '--out_dir={out}', '--max_iters=600', '--eval_iters=20', '--compile'],
    'gpt2 shape': ['train_gpt.py', '--out_dir={out}', '--arch=gpt2', '--n_layer=12', '--n_head=12',
                 '--n_embd=768',
                 '--block_size=1024', '--batch_size=32', '--max_iters=60', '--eval_interval=60',
                 '--eval_iters=2',
                 '--sample_tokens=0'],
    'gpt2 shape compiled': ['train_gpt.py', '--out_dir={out}', '--arch=gpt2', '--n_layer=12', '--n_head=12',
                          '--n_embd=768',
                          '--block_size=1024', '--batch_size=32', '--max_iters=120', '--eval_interval=120',
                          '--eval_iters=2', '--sample_tokens=0', '--compile'],
    'gpt float16': ['train_gpt.py', '--out_dir={out}', '--max_iters=200', '--eval_iters=20',
                    '--dtype=float16'],
    'gpt muon': ['train_gpt.py', '--out_dir={out}', '--max_iters=200', '--eval_iters=20', '--optimizer=muon'],
    'sft': ['train_sft.py', '--output_dir={out}', '--logging_steps=5', '--max_steps=100'],
    'sft lora': ['train_sft.py', '--output_dir={out}', '--logging_steps=5', '--max_steps=50',
                 'model.use_lora=true'],
    'sft packed': ['train_sft.py', '--output_dir={out}', '--logging_steps=5', '--max_steps=50', '--packing',
                   '--max_length=512'],
    'dpo': ['train_dpo.py', '--output_dir={out}', 'training.logging_steps=5', '--max_steps=50'],
    'rl grpo': RL,
    'rl gspo': [*RL, 'training.algorithm=gspo'],
    'rl ppo': [*RL, 'training.algorithm=ppo', 'model.value_model_name=tiny'],
    'agents plan_path': [*TEAM, 'env.benchmark=plan_path'],
    'agents math': [*TEAM, 'env.dataset=polaris', 'env.benchmark=AIME24'],
    'sample': ['sample.py', 'tiny', '--prompt=What is 12 plus 7?', '--max_new_tokens=24', '--seed=3'],
    'evaluate': ['evaluate.py', 'tiny', '--max_samples=32'],
}


class CardMemory(threading.Thread):
    """The most megabytes of the card in use while it runs, above what was in use at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_mb = self.peak_mb = self.now()
        self.done = threading.Event()
        self.start()

    @staticmethod
    def now():
        command = ['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
        return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])

    def run(self):
        while not self.done.wait(0.25):
            self.peak_mb = max(self.peak_mb, self.now())

    def stop(self):
        self.done.set()
        self.join()
        return self.peak_mb - self.start_mb


def run_row(name, argv, device, scratch, timeout=3600):
    """Starts one row, which is killed after `timeout` seconds; {exit, seconds, first_loss, last_loss,
    tokens_per_second, memory_mb, tail}."""
    slug = name.replace(' ', '_')
    out, experiment = os.path.join(scratch, slug), f'bench_gpu_runs_{slug}'
    argv = [word.format(out=out, name=experiment) for word in argv]
    card = CardMemory() if device != 'cpu' else None
    started = time.perf_counter()
    with open(os.path.join(scratch, f'{slug}.txt'), 'w+', encoding='utf-8') as console:
        process = subprocess.Popen([sys.executable, *argv, f'--device={device}'], cwd=ROOT, stdout=console,
                                   stderr=subprocess.STDOUT)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        seconds = time.perf_counter() - started
        memory = card.stop() if card else usage.ru_maxrss / 1024
        console.seek(0)
        tail = console.read()[-1500:]
    rows = []
    for path in (os.path.join(out, 'log.jsonl'),
                 *glob.glob(os.path.join(ROOT, 'logs', experiment, '*', '*', 'log.jsonl'))):
        if os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                rows += map(json.loads, file)
    losses = [row['loss'] for row in rows if 'loss' in row]
    speeds = [row['tokens_per_second'] for row in rows if 'tokens_per_second' in row]
    exit_status = os.waitstatus_to_exitcode(status)
    return dict(exit=exit_status, seconds=round(seconds, 1), memory_mb=round(memory),
                first_loss=losses[0] if losses else None, last_loss=losses[-1] if losses else None,
                tokens_per_second=round(statistics.median(speeds[1:] or speeds)) if speeds else None,
                tail=tail if exit_status else '')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--only', default='')
    parser.add_argument('--tests', action='store_true')
    args = parser.parse_args()
    words = args.only.split(',')
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, argv in ROWS.items():
            if not any(word in name for word in words):
                continue
            result = results[name] = run_row(name, argv, args.device, scratch)
            shown = [f'{key} {value}' for key, value in result.items() if key != 'tail' and value is not None]
            print(f'{name:20} {"  ".join(shown)}', flush=True)
            if result['tail']:
                print(result['tail'], flush=True)
    if args.tests:
        side_by_side = ['-n', str(os.cpu_count())] if importlib.util.find_spec('xdist') else []
        started = time.perf_counter()
        code = subprocess.run([sys.executable, '-m', 'pytest', '-q', '--no-header', '--tb=short',
                               *side_by_side], cwd=ROOT).returncode
        results['tests'] = dict(exit=code, seconds=round(time.perf_counter() - started, 1))
    for result in results.values():
        result.pop('tail', None)
    print(json.dumps(results))
    return int(any(result['exit'] for result in results.values()))


if __name__ == '__main__':
    sys.exit(main())
