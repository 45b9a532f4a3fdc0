"""Everything that a GPU must show, in under nine minutes on one card, with torch, transformers and numpy.

    python bench/gpu.py                                 writes gpu.json and gpu.html
    python bench/gpu.py --nanogpt PATH                  with nanoGPT's step (a checkout of it) beside ours
    python bench/gpu.py --only parity packed            some parts; `card`, which measures the limits, always
    python bench/gpu.py --device=cpu --small            all of it where there is no card, in tiny sizes

The parts stand in bench/gpu_parts.py, the most important first: what must be right (families against
transformers, packed rows, sampler, float16, LoRA, resume, out of memory), then what is to be fast (GPT-2
124M, fine-tuning, DPO, GRPO and generation of a model of 0.5B, memory), last the scripts themselves. Each
runs in a process of its own, which is started while the part before it runs; one that fails is a line, and
the others go on. What the time of --minutes does not reach is said.

A row is a number with its unit; `limit` is the best that this card allows: operations at the measured rate of
its matrix products, bytes at the measured rate of its copies. `beside` is another project's number on the
same inputs. bench/gpu_runs.py runs every script's default for longer.
"""
import argparse
import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

MARK = 'bench/gpu.py: '     # before a child's line of JSON
# in the order of their importance: a card that is lent for a short time may not see the last ones
PARTS = ('card', 'triton', 'parity', 'sampler', 'scaler', 'lora', 'resume', 'out_of_memory', 'packed', 'gpt2',
         'sft', 'generation', 'gpt2_compiled', 'dpo', 'grpo', 'memory', 'sft_compiled', 'scripts')


def run_part(name, options, rates, left, report=None):
    """One part in this process -> {'name', 'seconds', 'rows', 'rates', 'error'}; report(row): at once."""
    import gpu_parts
    begun, error = time.monotonic(), None
    bench = gpu_parts.Bench(options.device, options.small, options.nanogpt, rates, left, report)
    try:
        getattr(gpu_parts, name)(bench)
    except Exception as problem:
        traceback.print_exc()
        error = f'{type(problem).__name__}: {problem}'.partition('\n')[0]
    seconds = round(time.monotonic() - begun, 1)
    return dict(name=name, seconds=seconds, rows=bench.rows, rates=bench.rates, error=error)


def child(options):
    """A part in a process of its own: imports, waits for its turn on stdin, prints its result."""
    import gpu_parts        # noqa: F401 -- which takes seconds
    turn = json.loads(sys.stdin.readline())

    def report(row):
        print(MARK + json.dumps({'row': row}), flush=True)
    result = run_part(options.part, options, **turn, report=report)
    print(MARK + json.dumps({**result, 'rows': None}), flush=True)
    os._exit(0)             # no clean-up of compilers and the card, which takes seconds


class Child:
    """A part's process, which has begun to import and waits."""

    def __init__(self, name, options, scratch):
        self.name = name
        self.output = open(os.path.join(scratch, f'{name}.txt'), 'w+', encoding='utf-8', errors='replace')
        flags = [f'--device={options.device}', *['--small'] * options.small]
        flags += [f'--nanogpt={options.nanogpt}'] if options.nanogpt else []
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), f'--part={name}', *flags],
                                        stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True)

    def run(self, rates, left):
        """Its turn, of at most so many seconds -> what run_part returns."""
        begun = time.monotonic()
        error = None
        try:
            self.process.communicate(json.dumps(dict(rates=rates, left=left)) + '\n', timeout=left)
        except subprocess.TimeoutExpired:
            error = 'stopped, as the time was over'
        self.stop()
        self.output.seek(0)
        lines = self.output.read().splitlines()
        told = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
        rows = [entry['row'] for entry in told if 'row' in entry]
        if told and 'error' in told[-1]:
            return {**told[-1], 'rows': rows}
        error = error or f'exit {self.process.returncode}: {(lines or ["nothing printed"])[-1]}'
        seconds = round(time.monotonic() - begun, 1)
        return dict(name=self.name, seconds=seconds, rows=rows, rates=rates, error=error)

    def stop(self):
        """Ends it, and the compiler's processes that it may have started."""
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            pass
        self.process.wait()


def run_all(names, options):
    """Every part in its turn -> [what run_part returns]."""
    end, rates, results = time.monotonic() + 60 * options.minutes, {}, []
    with tempfile.TemporaryDirectory() as scratch:
        upcoming = None if options.together else Child(names[0], options, scratch)
        for i, name in enumerate(names):
            left = end - time.monotonic()
            if left < 5:
                results.append(dict(name=name, seconds=0.0, rows=[], error='not reached: the time was over'))
            elif options.together:
                results.append(run_part(name, options, rates, left))
            else:
                part = upcoming
                upcoming = Child(names[i + 1], options, scratch) if i + 1 < len(names) else None
                results.append(part.run(rates, left))
            rates = results[-1].pop('rates', rates)
            show(results[-1])
        if upcoming:
            upcoming.stop()
    return results


# ---- what people read --------------------------------------------------------------------------------------

def number(value):
    if value is None:
        return '–'
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def share(row):
    """How near a row comes to its limit, 1 at most; None without one."""
    if not row['limit'] or not row['value']:
        return None
    is_cost = row['unit'] in ('s', 'ms', 'GiB')
    return row['limit'] / row['value'] if is_cost else row['value'] / row['limit']


def words(row):
    """The columns of a row as text: value, what is beside it, limit, note."""
    beside = ', '.join(f'{who} {number(value)}' for who, value in row['beside'].items())
    limit = f'{number(row["limit"])} ({share(row):.0%})' if share(row) else ''
    return f'{number(row["value"])} {row["unit"]}'.strip(), beside, limit, row['note']


def show(part):
    failed = f'  FAILED  {part["error"]}' if part['error'] else ''
    print(f'{part["name"]}  {part["seconds"]} s{failed}', flush=True)
    for row in part['rows']:
        value, beside, limit, note = words(row)
        verdict = '' if row['ok'] is None else 'ok  ' if row['ok'] else 'WRONG  '
        more = [f'limit {limit}'] * bool(limit) + [text for text in (beside, note) if text]
        print(f'    {row["name"]:58} {verdict}{value}  {"  ".join(more)}', flush=True)


STYLE = '''body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff } h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem;
  border-bottom: 1px solid #e6e6e6; vertical-align: top } td.n { text-align: right; white-space: nowrap }
.wrong, .failed { color: #b00020; font-weight: 600 } small { color: #666; font-weight: 400 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } td, th { border-color: #333 } }'''


def page(results, machine):
    """The results as an HTML page that needs nothing else."""
    parts = []
    for part in results:
        rows = []
        for row in part['rows']:
            value, beside, limit, note = map(html.escape, words(row))
            verdict = {None: '', True: 'ok', False: '<span class="wrong">wrong</span>'}[row['ok']]
            rows.append(f'<tr><td>{html.escape(row["name"])}<td class="n">{value}<td>{verdict}<td>{beside}'
                        f'<td class="n">{limit}<td><small>{note}</small>')
        failed = f'<p class="failed">{html.escape(part["error"])}</p>' if part['error'] else ''
        head = '<tr><th><th>measured<th><th>beside<th>limit (share)<th>' if rows else ''
        parts.append(f'<h2>{html.escape(part["name"])} <small>{part["seconds"]} s</small></h2>{failed}'
                     f'<table>{head}{"".join(rows)}</table>')
    return (f'<!doctype html><meta charset="utf-8"><title>nanoforge on a GPU</title><style>{STYLE}</style>'
            f'<h1>nanoforge on {html.escape(machine["card"])}</h1><p>PyTorch {machine["torch"]}, '
            'transformers '
            f'{machine["transformers"]}; <code>python bench/gpu.py</code>. '
            'The limit is what the card allows at '
            'the measured rate of its matrix products and copies.</p>' + ''.join(parts) + '\n')


def describe(device):
    """{'card', 'torch', 'transformers'}, without a CUDA context in this process."""
    import importlib.metadata
    card = 'a CPU'
    if not device.startswith('cpu') and shutil.which('nvidia-smi'):
        asked = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
        card = subprocess.run(asked, capture_output=True, text=True).stdout.partition('\n')[0] or device
    return {'card': card, **{name: importlib.metadata.version(name) for name in ('torch', 'transformers')}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--small', action='store_true', help='tiny sizes, single steps')
    parser.add_argument('--only', nargs='+', default=[], help='names of parts, or words of them')
    parser.add_argument('--minutes', type=float, default=9.0)
    parser.add_argument('--nanogpt', help='a checkout of nanoGPT')
    parser.add_argument('--output', default='gpu', help='OUTPUT.json and OUTPUT.html are written')
    parser.add_argument('--together', action='store_true', help='all parts in this process')
    parser.add_argument('--part', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return child(options)
    options.nanogpt = options.nanogpt and os.path.abspath(options.nanogpt)
    machine = describe(options.device)
    names = [name for name in PARTS
             if not options.only or name == 'card' or any(word in name for word in options.only)]
    results = run_all(names, options)
    with open(f'{options.output}.json', 'w', encoding='utf-8') as file:
        json.dump(dict(machine=machine, small=options.small, parts=results), file, indent=1)
    with open(f'{options.output}.html', 'w', encoding='utf-8') as file:
        file.write(page(results, machine))
    wrong = [row['name'] for part in results for row in part['rows'] if row['ok'] is False]
    failed = [part['name'] for part in results if part['error']]
    print(f'{options.output}.json, {options.output}.html; wrong: {wrong or "none"}; failed or not reached: '
          f'{failed or "none"}')
    return int(bool(wrong or failed))


if __name__ == '__main__':
    sys.exit(main())
