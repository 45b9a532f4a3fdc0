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


def bare(job):
    command = [sys.executable, '-I', '-S', '-c', job[0]]
    return subprocess.run(command, input=job[1], capture_output=True, text=True, env={}).stdout


def rate(function, jobs, rounds=5):
    best = 0.0
    for _ in range(rounds):
        begun = time.perf_counter()
        outputs = function(jobs)
        best = max(best, len(jobs) / (time.perf_counter() - begun))
        assert outputs == [f'{n + 1}\n' for n in range(len(jobs))]
    return round(best, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--programs', type=int, default=600)
    options = parser.parse_args()
    sandbox.start(workers=options.workers)
    jobs = [(PROGRAM, str(n)) for n in range(options.programs)]
    with ThreadPoolExecutor(options.workers) as threads:
        def sandboxed(jobs):
            return [run.stdout for run in sandbox.run_many(jobs)]

        def bare_python(jobs):
            return list(threads.map(bare, jobs))

        figures = {'workers': options.workers, 'sandbox': rate(sandboxed, jobs),
                   'bare_python': rate(bare_python, jobs[:options.programs // 4])}
    print(f"sandbox: {figures['sandbox']:,.0f} programs a second; bare python -I -S: "
          f"{figures['bare_python']:,.0f}")
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
