"""What tasks share: problems that scripts/dataprocess stored, and programs that agents write.

Problems are rows of DATA_DIR/{math,code,game}/{train,test}/STEM.jsonl (or .parquet). STEM.generated.jsonl
holds those of the project's own generator, and is read where the data set of that name is not there.
"""
import contextlib
import functools
import os
import random
import re
import sys

from configurator import UserError, closest
from data.sandbox import run_many

GENERATED = 'generated'     # the column `source` of what the project's own generator made, and in file names
GAME = 'game'               # the domain whose problems are the generator's own, and bear no data set's name
SCRIPTS = {'math': 'load_math.py', 'code': 'load_code.py', GAME: 'load_sokoban.py'}     # which write files
# what every game's SETTINGS say of files
PUZZLE_SETTINGS = {
    'dataset': (None, 'a file of data_dir/game/train, or for the held-out split of data_dir/game/test'),
    'data_dir': ('datasets', 'where scripts/dataprocess/load_sokoban.py put puzzles; those that it did not '
                             'store the generator makes'),
}


# ---- problems

@functools.lru_cache(maxsize=16)
def stored_problems(domain, split, stems, data_dir, known, from_row):
    """The problems from_row(row, where) of the stored stems (several joined by +) of a split.

    None where none of them is stored and all are `known`: then the project's own generator makes problems,
    which stand in for a data set. Training problems that a held-out file of the same folder has too are
    dropped, and counted. UserError: neither stored nor known, only some of them stored, none left.
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
    script = f'python scripts/dataprocess/{SCRIPTS[domain]}'
    if missing and len(missing) < len(wanted):
        raise UserError(f'env.{key}={stems}: {folder} has no {missing[0]}; {script} writes it')
    if missing:
        if domain != GAME:
            warn(f'env.{key}={stems}: not in {folder}, so problems of the generator in data/tasks/'
                 f'{domain}.py stand in for it (the real ones: {script}, with a network)')
        return None
    rows = []
    for stem in wanted:
        found = rows_of(files[stem])
        rows += found
        if domain != GAME and any(row.get('source') == GENERATED for _, row in found):
            warn(f'env.{key}={stems}: the {len(found):,} problems in {files[stem]} are generated ones, not '
                 'the data set of that name')
        else:
            warn(f'env.{key}={stems}: {len(found):,} problems in {files[stem]}')
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
    """{stem in lower case: path} of the data files in a folder; a generated one where there is no other."""
    files, generated = {}, {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        stem, suffix = os.path.splitext(name.lower())
        if suffix in ('.jsonl', '.parquet'):
            kind = generated if stem.endswith(f'.{GENERATED}') else files
            kind[stem.removesuffix(f'.{GENERATED}')] = os.path.join(folder, name)
    return {**generated, **files}


def stored_puzzles(names, from_row, fits, split, n, seed, dataset, data_dir):
    """n of the puzzles that load_sokoban.py stored for a game, those that fits(puzzle) lets through.

    None where there is no file, or nothing in it fits: then the game's generator makes them. names: what
    `dataset` may call the game, the first is its file. data_dir: None for none.
    """
    stems = names[0] if not dataset or dataset.lower() in names else dataset
    stored = data_dir and stored_problems(GAME, split, stems, data_dir, names, from_row)
    if not stored:
        return None
    puzzles = [puzzle for puzzle in stored if fits(puzzle)]
    if len(puzzles) < len(stored):
        key = 'dataset' if split == 'train' else 'benchmark'
        instead = '' if puzzles else ': the generator makes others'
        warn(f'env.{key}={stems}: {len(puzzles):,} of the {len(stored):,} are of the size that env.* asks '
             f'for{instead}')
    return pick(puzzles, split, n, seed) if puzzles else None


def puzzle_of(row, where, Env, keys):
    """The puzzle in a stored row {'question', 'problem'}; UserError where it lacks a key or has no
    solution."""
    acts = Env.roles[-1]
    try:
        puzzle = {**row['problem'], 'question': row['question']}
        env = Env({key: puzzle[key] for key in keys})
        is_solved = env.score(acts, env.solution(acts)).note == 'works'
    except (LookupError, TypeError, ValueError, AttributeError):
        is_solved = False
    if not is_solved:
        raise UserError(f'{where}: "problem" must be a puzzle that can be solved, made of {", ".join(keys)}, '
                        f'and "question" a text, as python scripts/dataprocess/{SCRIPTS[GAME]} writes them')
    return puzzle


files_read = set()      # paths, of which a run notes fingerprints


@functools.lru_cache(maxsize=64)
def rows_of(path):
    files_read.add(path)
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


def print_error(line):
    print(line, file=sys.stderr, flush=True)


reporter = print_error


@contextlib.contextmanager
def reported_by(report):
    """What is read inside is said by report(line), each line once, even if an earlier run has said it."""
    global reporter
    for cached in (rows_of, stored_problems, warn):
        cached.cache_clear()
    reporter = report
    try:
        yield
    finally:
        reporter = print_error


@functools.cache
def warn(line):
    """Says a line once in a process: on stderr, or as a run says things."""
    reporter(line)


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
