"""Problems of mathematics and programming that scripts/dataprocess stored: DATA_DIR/{math,code}/{train,test}/STEM.jsonl (or .parquet)."""
import os
import random
import re
import sys

from configurator import UserError, closest
from data.records import read_file

GENERATED = 'generated'             # the column `source` of rows that the project's own generator made
_said = set()


def rows(domain, split, stems, data_dir, known):
    """[(where, row)] of the stems (several joined by +), None where none of them is stored and all are `known`: the project's own
    generator is then to stand in for them. UserError: neither stored nor known, or only some of them stored."""
    folder = os.path.join(data_dir, domain, 'train' if split == 'train' else 'test')
    files = {os.path.splitext(name)[0].lower(): os.path.join(folder, name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])
             if name.endswith(('.jsonl', '.parquet'))}
    names = {name.lower(): name for name in known}
    key, wanted = 'dataset' if split == 'train' else 'benchmark', stems.lower().split('+')
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
    found = [pair for stem in wanted for pair in read_file(files[stem])]
    if any(row.get('source') == GENERATED for _, row in found):
        say(f'env.{key}={stems}: the problems in {folder} are generated ones, not the data set of that name')
    return found


def say(line):
    """Once in a process."""
    if line not in _said:
        print(line, file=sys.stderr, flush=True)
    _said.add(line)


def picked(found, held_out, split, n, seed):
    """n of the problems (dicts with 'question'); for training, shuffled anew each time that all were used and without the questions
    that are held out; else each at most once, so possibly fewer."""
    plain = lambda text: re.sub(r'[\s.,;:!?"\']+', ' ', text).casefold().strip()
    if split == 'train':
        held_out = {plain(row['question']) for _, row in held_out}
        kept = [problem for problem in found if plain(problem['question']) not in held_out]
        if len(kept) < len(found):
            say(f'env.dataset: {len(found) - len(kept)} of {len(found)} problems dropped because env.benchmark has them too')
        found = kept
    if not found:
        raise UserError(f"env.{'dataset' if split == 'train' else 'benchmark'}: no problem is left; see the lines above")
    if split != 'train' and n > len(found):
        say(f'env.benchmark: all {len(found)} problems, not {n}: there are no more')
    picks, draw = [], random.Random(f'stored/{split}/{seed}')
    while len(picks) < n and (split == 'train' or not picks):
        picks += draw.sample(found, len(found))
    return picks[:n]


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
