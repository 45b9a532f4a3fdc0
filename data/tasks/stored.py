"""What math.py and code.py share: problems that scripts/dataprocess stored, and programs that agents write.

Problems are rows of DATA_DIR/{math,code}/{train,test}/STEM.jsonl (or .parquet).
"""
import functools
import os
import random
import re
import sys

from configurator import UserError, closest
from data.sandbox import run_many

GENERATED = 'generated'             # the column `source` of rows that the project's own generator made


# ---- problems

@functools.lru_cache(maxsize=16)
def stored_problems(domain, split, stems, data_dir, known, from_row):
    """The problems from_row(row, where) of the stored stems (several joined by +) of a split.

    None where none of them is stored and all are `known`: then the project's own generator stands in for
    them. Training problems that a held-out file of the same folder has too are dropped, and counted.
    UserError: neither stored nor known, only some of them stored, none left.
    """
    key, folder = ('dataset', 'train') if split == 'train' else ('benchmark', 'test')
    folder = os.path.join(data_dir, domain, folder)
    files = files_of(folder)
    names = [name.lower() for name in known]
    wanted = stems.lower().split('+')
    for stem in wanted:
        if stem not in files and stem not in names:
            raise UserError(f'env.{key}={stem}: {folder} has no such file, and it is none of '
                            f'{", ".join(known)}{closest(stem, names)}')
    missing = [stem for stem in wanted if stem not in files]
    script = f'python scripts/dataprocess/load_{domain}.py'
    if missing and len(missing) < len(wanted):
        raise UserError(f'env.{key}={stems}: {folder} has no {missing[0]}; {script} writes it')
    if missing:
        warn(f'env.{key}={stems}: not in {folder}, so problems of the generator in data/tasks/{domain}.py '
            f'stand in for it (the real ones: {script}, with a network)')
        return None
    rows = []
    for stem in wanted:
        rows += rows_of(files[stem])
    if any(row.get('source') == GENERATED for _, row in rows):
        warn(f'env.{key}={stems}: the problems in {folder} are generated ones, not the data set of that name')
    problems = [from_row(row, where) for where, row in rows]
    if split == 'train':
        held_out = held_out_questions(domain, data_dir)
        kept = [problem for problem in problems if normalized(problem['question']) not in held_out]
        if len(kept) < len(problems):
            warn(f'env.{key}={stems}: {len(problems) - len(kept)} of {len(problems)} problems dropped: a '
                'held-out file has them too')
        problems = kept
    if not problems:
        raise UserError(f'env.{key}={stems}: no problem is left; see the lines above')
    return problems


def files_of(folder):
    """{stem in lower case: path} of the data files in a folder."""
    files = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        stem, suffix = os.path.splitext(name)
        if suffix in ('.jsonl', '.parquet'):
            files[stem.lower()] = os.path.join(folder, name)
    return files


@functools.lru_cache(maxsize=64)
def rows_of(path):
    from data.formats import read_file      # here: its import takes longer than --print_config may
    return list(read_file(path))


def held_out_questions(domain, data_dir):
    questions = set()
    for path in files_of(os.path.join(data_dir, domain, 'test')).values():
        questions.update(normalized(row.get('question')) for _, row in rows_of(path))
    return questions


def normalized(question):
    """A question without what does not change it: case, spaces, punctuation."""
    return re.sub(r'[\s.,;:!?"\']+', ' ', str(question)).casefold().strip()


def pick(problems, split, n, seed):
    """n of the problems: for training shuffled, in epochs; else each once at most, so possibly fewer."""
    if split != 'train' and n > len(problems):
        warn(f'env.benchmark: all {len(problems)} problems, not {n}: there are no more')
    draw = random.Random(f'stored/{split}/{seed}')
    picked = draw.sample(problems, len(problems))
    while split == 'train' and len(picked) < n:
        picked += draw.sample(problems, len(problems))
    return picked[:n]


@functools.cache
def warn(line):
    """Prints a line once in a process."""
    print(line, file=sys.stderr, flush=True)


# ---- programs that agents write

def run_distinct(jobs, timeout):
    """[(program, stdin), ...] -> {(program, stdin): Result}; equal jobs are run once, others in parallel."""
    distinct = list(dict.fromkeys(jobs))
    return dict(zip(distinct, run_many(distinct, timeout)))


def excerpt(text, longest=300):
    """A text of a program or a model for the next prompt: short, and without the marks of another turn."""
    text = text.strip().replace('<|', '< |').encode(errors='replace').decode()
    return text if len(text) <= longest else text[:longest] + ' ...'


def code_block(text):
    """The last ```python block of a text, None without one."""
    blocks = re.findall(r'```(?:python|py)[ \t]*\n(.*?)```', text, re.DOTALL)
    return blocks[-1].strip('\n') if blocks else None


def fenced(program):
    """A program as an agent is to write it."""
    return f'```python\n{program}\n```'


def compiles(run):
    """Whether the program of a Result could be compiled (one that fakes the message only harms itself)."""
    errors = ('SyntaxError', 'IndentationError', 'TabError', 'ValueError: source code')
    return not run.reason.startswith(errors)


def need_generated(parts):
    """Demonstrations are made from the parts of generated problems, which stored ones lack."""
    if not parts:
        raise UserError('env.dataset: only generated problems have demonstrations; '
                        'leave the warm-up out, or data_dir empty')
