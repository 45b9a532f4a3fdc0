"""Every script is killed twenty times, a checkpoint is damaged, and it ends as the run that was left alone.

    python bench/chaos.py [script ...] [--kills=20] [--ranks=2] [--shard=full] [--seed=0]

A row for each script: SIGKILLs that came before the end, how long the other ranks took to end after one was
killed, what was damaged and skipped, and the files in which the two ends differ. The code is that of
tests/chaos.py, whose short form runs in tests/test_chaos.py.
"""
import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tests'))

from chaos import SMALL, small_run, survive  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('scripts', nargs='*', default=list(SMALL), metavar='script', help=', '.join(SMALL))
    parser.add_argument('--kills', type=int, default=20, help='SIGKILLs, each at a random moment')
    parser.add_argument('--ranks', type=int, default=1, help='processes, of which one is killed')
    parser.add_argument('--shard', default='none', help='what each of the ranks holds: none, full')
    parser.add_argument('--seed', type=int, default=0, help='of the moments and the damage')
    args = parser.parse_args()
    failed = False
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            flags, began = small_run(script, steps=4 * args.kills), time.monotonic()
            flags.append(f'--shard={args.shard}')
            report = survive(script, flags, args.kills, damage=True, ranks=args.ranks, seed=args.seed,
                             pictures=True)
            os.chdir('/')
        failed = failed or bool(report['differences']) or report['kills'] < args.kills
        others = f'; the other ranks ended within {report["seconds"]} s' if args.ranks > 1 else ''
        differ, seconds = ', '.join(report['differences']) or 'nothing', time.monotonic() - began
        print(f'{script}: {report["kills"]} kills{others}; {report["damage"]}, skipped '
              f'{", ".join(report["skipped"])}; the ends differ in {differ}; {seconds:.0f} s', flush=True)
    sys.exit(failed)


if __name__ == '__main__':
    main()
