"""Programs per second in the sandbox, against a bare `python -I -S` for each, which protects from nothing.

    python bench/sandbox.py [--workers 2] [--programs 600]

Each reads a number and prints the next one. Best of five rounds. The last line of output is one JSON object.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import sandbox

PROGRAM = 'print(int(input()) + 1)'


def in_sandbox(jobs, threads):
    return [result.stdout for result in sandbox.run_many(jobs)]


def in_bare_python(jobs, threads):
    return list(threads.map(run_bare, jobs))


def run_bare(job):
    code, stdin = job
    command = [sys.executable, '-I', '-S', '-c', code]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env={}).stdout


def best_rate(run_all, count, threads, rounds=5):
    """Programs a second in the fastest round."""
    jobs, best = [(PROGRAM, str(n)) for n in range(count)], 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        outputs = run_all(jobs, threads)
        best = max(best, count / (time.perf_counter() - started))
        assert outputs == [f'{n + 1}\n' for n in range(count)]
    return round(best, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--programs', type=int, default=600)
    options = parser.parse_args()
    sandbox.start(workers=options.workers)
    with ThreadPoolExecutor(options.workers) as threads:
        figures = {
            'workers': options.workers,
            'sandbox': best_rate(in_sandbox, options.programs, threads),
            'bare_python': best_rate(in_bare_python, options.programs // 4, threads),
        }
    print(f'sandbox: {figures["sandbox"]:,.0f} programs a second; '
          f'bare python -I -S: {figures["bare_python"]:,.0f}')
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
