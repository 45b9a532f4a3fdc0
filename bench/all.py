"""Every ratio of the README in one table: ours, the peer's, and what the machine allows, measured in pairs.

    python bench/all.py --nanogpt PATH --trl PYTHON --model DIR     all of it, an hour on two cores
    python bench/all.py --only memory generate                      what needs none of these
    python bench/all.py --print ratios.json                         the table of an earlier run

PATH is a checkout of nanoGPT, PYTHON an interpreter with TRL, DIR a Hugging Face model such as
SmolLM2-135M-Instruct's. Each part is a script of this folder with its own defaults, whose lines go to the
console as they come; how each measures stands in its docstring. What is missing (no TRL, no bf16 units) is
left out and named. All results go to --out (ratios.json) as JSON, after every part.

ours and peer are seconds (memory: GB), times the peer's over ours, limit the share of our time that the
matrix products of the step take alone, each at the machine's best.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import NamedTuple

from shared import ROOT

HERE = os.path.dirname(os.path.abspath(__file__))


class Row(NamedTuple):
    """A line of the table; None: not measured. times: of each pair."""
    what: str
    peer: str
    ours: float
    theirs: float
    times: list
    limit: float | None = None


# ---- what each script's last line says, as rows

def kind(side):
    """'ours_bf16_cache' -> 'bf16 cache'"""
    return side.removeprefix('ours').replace('_', ' ').strip() or 'float32'


def of_gpt(data):
    ours, theirs = (statistics.median(pair[side]['seconds'] / 200 for pair in data['pairs'])
                    for side in ('ours', 'nanogpt'))
    yield Row('pretraining step, 12 x 64 tokens', 'nanoGPT', ours, theirs, data['ratios'])


def of_fast(data):
    theirs = data['nanogpt']['seconds']
    own = [run['seconds'] for run in data['ours']]
    yield Row("to nanoGPT's loss of 2,000 steps, another optimizer", 'nanoGPT', statistics.median(own),
              theirs, [theirs / seconds for seconds in own])


def of_sft(data):
    rate = 'supervised_tokens_per_second'
    trl = [run[rate] for run in data['runs']['trl']]
    [floor] = data['runs']['floor']
    for side in ('ours', 'ours_bf16'):
        if side in data['runs']:
            own = [run[rate] for run in data['runs'][side]]
            middle = statistics.median(own)
            limit = floor['seconds'] * middle / floor['supervised'] if side == 'ours' else None
            yield Row(f'SFT, 3M parameters, {kind(side)}, 10,000 learned tokens', 'TRL', 1e4 / middle,
                      1e4 / statistics.median(trl), [a / b for a, b in zip(own, trl)], limit)


def of_dpo(data):
    theirs = data['median'].get('trl', {}).get('seconds_per_step')
    for side, run in data['median'].items():
        if side.startswith('ours') and theirs:
            own, floor = run['seconds_per_step'], data['floor'].get(side)
            yield Row(f'DPO step, 3M parameters, {kind(side)}', 'TRL', own, theirs,
                      data['times_trl'][f'{side} seconds_per_step'], floor and floor / own)


def of_rl(data):
    yield Row(f'GRPO step, 3M parameters, {data["matmul"]}', 'TRL', data['ours_seconds'],
              data['trl_seconds'], data['ratios'], data['floor_seconds'] / data['ours_seconds'])


def of_generate(data):
    for name, row in data.items():
        if isinstance(row, dict):
            yield Row(f'sampling 64 tokens, 3M parameters, {name.replace("_", " ")}', 'transformers',
                      0.064 * row['ours_ms_per_step'], 0.064 * row['transformers_ms_per_step'],
                      [row['ratio']])


def of_real(data):
    for name, pairs in data.items():
        task, matmul = name.split('/')
        peer = 'transformers' if task == 'generate' else 'TRL'
        ours, theirs = (statistics.median(run['seconds'] for run in pairs[side])
                        for side in ('ours', 'theirs'))
        yield Row(f'{task}, 135M parameters, {matmul}', peer, ours, theirs, pairs['times'],
                  statistics.median(pairs['share']))
        ours, theirs = (max(run['peak_mb'] for run in pairs[side]) / 1000 for side in ('ours', 'theirs'))
        yield Row(f'{task}, 135M parameters, {matmul}, peak GB', peer, ours, theirs, [theirs / ours])


def of_memory(data):
    for what, unit in (('bytes', 1e9), ('seconds', 1)):
        ours, theirs = (data[side][what] / unit for side in ('ours', 'transformers'))
        yield Row(f'head of 131,072 words, {"GB" if what == "bytes" else "seconds"}', 'transformers', ours,
                  theirs, [theirs / ours])


# {part: (script and flags, what of the command line it needs, rows)}
PARTS = {
    'gpt': (['gpt.py'], 'nanogpt', of_gpt),
    'fast': (['gpt.py', '--fast'], 'nanogpt', of_fast),
    'sft': (['sft.py'], 'trl', of_sft),
    'dpo': (['dpo.py'], 'trl', of_dpo),
    'rl': (['rl.py'], 'trl', of_rl),
    'generate': (['generate.py'], None, of_generate),
    'memory': (['memory.py'], None, of_memory),
    'real': (['real.py'], 'model', of_real),
}


def measure(part, options):
    """The last line of a part's script, as JSON; the others are printed as they come."""
    words, needs, _ = PARTS[part]
    command = [sys.executable, os.path.join(HERE, words[0]), *words[1:]]
    if needs == 'model':
        command += [options.model, *(['--trl', options.trl] if options.trl else ['--only', 'generate'])]
    elif needs:
        command += [f'--{needs}', getattr(options, needs)]
    print(f'--- {part}: python bench/{" ".join(words)}', flush=True)
    last = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if last is not None:
                print(last, flush=True)
            last = line.rstrip('\n')
    if process.returncode:
        sys.exit(f'{part}: exit {process.returncode}')
    return json.loads(last)


def table(rows):
    """Rows as GitHub and a terminal show them."""
    lines = ['| | ours | peer | | times | share of products |', '|---|---|---|---|---|---|']
    for row in rows:
        times = f'{statistics.median(row.times):.2f}'
        if len(row.times) > 1:
            times += f' ({min(row.times):.2f} to {max(row.times):.2f})'
        limit = '' if row.limit is None else f'{row.limit:.0%}'
        lines.append(f'| {row.what} | {row.ours:.3g} | {row.theirs:.3g} | {row.peer} | {times} | {limit} |')
    return '\n'.join(lines)


def show(data):
    """The table of {part: JSON}."""
    print(table([row for part, of_part in data['parts'].items() for row in PARTS[part][2](of_part)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', help='a checkout of nanoGPT')
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--model', help='a Hugging Face directory')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS),
                        help='these parts')
    parser.add_argument('--out', default='ratios.json', help='where results go (default ratios.json)')
    parser.add_argument('--print', metavar='FILE', help='the table of an earlier --out')
    options = parser.parse_args()
    if options.print:
        with open(options.print, encoding='utf-8') as file:
            return show(json.load(file))
    data = {'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores', 'parts': {}}
    for part in options.only:
        needs = PARTS[part][1]
        if needs and not getattr(options, needs):
            print(f'--- {part} is left out: it needs --{needs}')
            continue
        data['parts'][part] = measure(part, options)
        with open(options.out, 'w', encoding='utf-8') as file:
            json.dump(data, file, indent=1)
    show(data)


if __name__ == '__main__':
    main()
