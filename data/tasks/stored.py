"""Problems of mathematics and programming that scripts/dataprocess stored: DATA_DIR/{math,code}/{train,test}/STEM.jsonl (or .parquet)."""
import functools
import os
import random
import re
import sys

from configurator import UserError, closest

GENERATED = 'generated'             # the column `source` of rows that the project's own generator made


def problems_of(domain, split, stems, data_dir, known, from_row):
    """The problems from_row(row, where) of the stored stems (several joined by +) of a split; None where none of them is stored and
    all are `known`: the project's own generator is then to stand in for them. Training problems that a held-out file of the
    same folder has too are dropped, and counted. UserError: neither stored nor known, only some of them stored, none left."""
    files, names, wanted = files_of(domain, split, data_dir), [name.lower() for name in known], stems.lower().split('+')
    key, folder = ('dataset', 'train') if split == 'train' else ('benchmark', 'test')
    folder = os.path.join(data_dir, domain, folder)
    for stem in wanted:
        if stem not in files and stem not in names:
            raise UserError(f"env.{key}={stem}: {folder} has no such file, and it is none of {', '.join(known)}{closest(stem, names)}")
    missing = [stem for stem in wanted if stem not in files]
    if missing and len(missing) < len(wanted):
        raise UserError(f'env.{key}={stems}: {folder} has no {missing[0]}; python scripts/dataprocess/load_{domain}.py writes it')
    if missing:
        say(f'env.{key}={stems}: not in {folder}, so problems of the generator in data/tasks/{domain}.py stand in for it '
            f'(the real ones: python scripts/dataprocess/load_{domain}.py, with a network)')
        return None
    rows = [pair for stem in wanted for pair in rows_of(files[stem])]
    if any(row.get('source') == GENERATED for _, row in rows):
        say(f'env.{key}={stems}: the problems in {folder} are generated ones, not the data set of that name')
    found = [from_row(row, where) for where, row in rows]
    if split == 'train':
        held_out = {plain(row.get('question')) for path in files_of(domain, 'eval', data_dir).values() for _, row in rows_of(path)}
        kept = [problem for problem in found if plain(problem['question']) not in held_out]
        if len(kept) < len(found):
            say(f'env.{key}={stems}: {len(found) - len(kept)} of {len(found)} problems dropped: a held-out file has them too')
        found = kept
    if not found:
        raise UserError(f'env.{key}={stems}: no problem is left; see the lines above')
    return found


def files_of(domain, split, data_dir):
    """{stem in lower case: path}"""
    folder = os.path.join(data_dir, domain, 'train' if split == 'train' else 'test')
    names = [name for name in os.listdir(folder) if name.endswith(('.jsonl', '.parquet'))] if os.path.isdir(folder) else []
    return {os.path.splitext(name)[0].lower(): os.path.join(folder, name) for name in sorted(names)}


@functools.lru_cache(maxsize=64)
def rows_of(path):
    from data.formats import read_file      # only here: it takes longer to import than --print_config may take
    return list(read_file(path))


def plain(question):
    """A question without what does not change it."""
    return re.sub(r'[\s.,;:!?"\']+', ' ', str(question)).casefold().strip()


def picked(found, split, n, seed):
    """n of the problems: for training shuffled, and anew each time that all were used; else each at most once, so possibly fewer."""
    if split != 'train' and n > len(found):
        say(f'env.benchmark: all {len(found)} problems, not {n}: there are no more')
    picks, draw = [], random.Random(f'stored/{split}/{seed}')
    while len(picks) < n and (split == 'train' or not picks):
        picks += draw.sample(found, len(found))
    return picks[:n]


@functools.cache
def say(line):
    """Once in a process."""
    print(line, file=sys.stderr, flush=True)


def shown(text, longest=300):
    """What a program printed, or a model wrote, for the next prompt: short, and without the marks of another turn."""
    text = text.strip().replace('<|', '< |').encode(errors='replace').decode()
    return text if len(text) <= longest else text[:longest] + ' ...'


def code_block(text):
    """The last ```python block of a text, None without one."""
    blocks = re.findall(r'```(?:python|py)[ \t]*\n(.*?)```', text, re.DOTALL)
    return blocks[-1].strip('\n') if blocks else None


def builds(run):
    """Whether a program could be compiled (a program that fakes the message only harms itself)."""
    return not run.reason.startswith(('SyntaxError', 'IndentationError', 'TabError', 'ValueError: source code'))
