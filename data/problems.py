"""Problems with answers that can be checked, from an embedded task or any data set of questions and answers.

A problem is a dict: the row as it is, with 'question' and 'answer' as texts and, where the data set has one,
the system message that says in which form to answer. A row's other columns are for rewards: a dialogue among
them, which may hold the solution, is never what is asked.
"""
import functools
import importlib
import json
import math
import random
import sys
from array import array
from dataclasses import dataclass, field

from configurator import UserError
from data.chat import encode, remarks, segments
from data.formats import check_values, checked_tools, read_rows, split_of_row, strict_json, text_of
from data.formats import without_nan
from data.parallel_map import map_chunks
from data.preferences import encode_pairs, read_pairs, remarks_on
from data.rewards import extract_answer
from data.splits import MAX_EVAL_ROWS, hash64, is_held_out, legacy_pairs, legacy_rl
from nanoforge.data_checks import DataIssues, print_mixture

TASKS = ('arithmetic', 'facts', 'plan_path', 'toolcalls')       # modules of data/tasks
QUESTION_COLUMNS = ('question', 'problem', 'prompt')
ANSWER_COLUMNS = ('answer', 'expected_answer', 'solution')
DIALOGUE = 'dialogue'           # field of a problem that asks by several messages
CHUNK = 1000                    # prompts that are encoded together
PROBED = 8                      # problems whose prompts an environment is asked for before the run
FORM = ('Think about the problem step by step between <think> and </think>. Then write the final answer, and '
        'nothing else, between <answer> and </answer>.')
# data set: its columns, if not those above, and the form of answer that it is asked for
TEMPLATES = {
    'openai/gsm8k': dict(prompt_column='question', answer_column='answer',
                         system=FORM + ' The answer is one number.'),
    'nvidia/OpenMathInstruct-2': dict(prompt_column='problem', answer_column='expected_answer', system=FORM),
}


def load_task(name):
    """The module of an embedded task: problems(split, n, seed), prompt(problem), reward(problem, text)."""
    return importlib.import_module(f'data.tasks.{name}')


def read_problems(sources, system_prompt=None, with_answers=True, bad_rows=None):
    """[Source] -> (problems for training, problems held out by their metadata). UserError names file, row,
    column.

    with_answers: False where no reward needs one; then a row may lack it. bad_rows: a list to which
    what is wrong with a row goes, which is then left out; None: it is a UserError."""
    train, held_out = [], []
    for source in sources:
        template = TEMPLATES.get(source.name, {})
        system = system_prompt if system_prompt is not None else template.get('system', FORM)
        before, columns, seen = len(train) + len(held_out), None, 0
        for where, row in read_rows(source.name, source.split, source.subset):
            columns = columns or columns_of(source, template, row, where, with_answers)
            try:
                problem = to_problem(without_nan(row), columns, system)
                is_train = split_of_row(row) != 'eval'
            except UserError as error:
                if bad_rows is None:
                    raise UserError(f'{where}: {error}; --skip_bad_rows leaves such rows out') from None
                bad_rows.append(f'{where}: {error}')
                continue
            if is_train:
                train += [problem] * copies(source, seen)
                seen += 1
            else:
                held_out.append(problem)
        if before == len(train) + len(held_out):
            raise UserError(f'{source.name}: no row of split {source.split!r}')
    return train, held_out


def to_problem(row, columns, system):
    """A row, its columns of question and answer (None: it has none) and the system message -> a problem."""
    problem = {**strict_json(row), 'question': text_of(row, columns[0]), 'system': system}
    problem.pop(DIALOGUE, None)
    if columns[1]:
        problem['answer'] = text_of(row, columns[1])
        if not extract_answer(problem['answer']):
            raise UserError(f'{columns[1]}: no answer in {problem["answer"][:60]!r}')
    if row.get('tools'):
        problem['tools'] = checked_tools(row['tools'])
    check_values([problem['question'], problem.get('answer'), problem.get('tools')])
    return problem


def columns_of(source, template, row, where, with_answers):
    """(question column, answer column) of a data set, by its source, its template or the usual names."""
    columns = []
    for typed, known, kind in ((source.prompt_column, QUESTION_COLUMNS, 'prompt'),
                               (source.answer_column, ANSWER_COLUMNS, 'answer')):
        usual = next((name for name in known if name in row), None)
        column = typed or template.get(f'{kind}_column') or usual
        if column is None and (kind == 'prompt' or with_answers):
            raise UserError(f'{where}: none of the columns {", ".join(map(str, list(row)[:8]))} is one of '
                            f'{", ".join(known)}: name it with --{kind}_column=...')
        columns.append(column)
    return columns


def copies(source, place):
    """How often row `place` of a source is seen in an epoch: its weight, spread evenly over the rows."""
    if not 0 < source.weight < 1000:
        raise UserError(f'{source.name}: weight={source.weight:g} must be above 0: 2 = every row twice, 0.5 '
                        '= every other row')
    return math.floor((place + 1) * source.weight) - math.floor(place * source.weight)


def prompt(problem):
    """The chat that asks for it."""
    if DIALOGUE in problem:
        return problem[DIALOGUE]
    system = [{'role': 'system', 'content': problem['system']}] if problem.get('system') else []
    return [*system, {'role': 'user', 'content': problem['question']}]


def describe_prompt(problem, tokenizer, system_prompt):
    """A prompt as the model reads it, and where its system message is from, if nobody typed it."""
    text = repr(tokenizer.decode(list(problem['prompt_ids']))[:1000])
    if system_prompt is None and problem.get('system'):
        text += '; the system message is the default, --system_prompt= leaves it out'
    return text


def hold_out(problems, fraction, count):
    """(training, held out): of the problems that data.splits.is_held_out puts aside, `count` at most, each
    question once. Which ones depends neither on a seed nor on the order of the rows."""
    held_out = {}
    for problem in problems:
        if is_held_out(prompt(problem), fraction):
            held_out.setdefault(problem['question'], problem)
    chosen = sorted(held_out, key=hash64)[:count]
    return without(problems, held_out), [held_out[question] for question in chosen]


def without(problems, questions):
    """The problems that ask none of the questions."""
    return [problem for problem in problems if problem['question'] not in questions]


# ---- what a run asks ---------------------------------------------------------------------------------------

@dataclass
class Problems:
    """task: a module with prompt(problem) (and reward); train and held_out: problems, 'prompt_ids' among
    their fields."""
    task: object
    train: list
    held_out: list
    pairs: list = field(default_factory=list)       # of token ids, for a reward model that is trained here
    held_out_pairs: list = field(default_factory=list)


def uses_pairs(cfg):
    return any(source.chosen_column or source.rejected_column for source in cfg.sources())


def open_problems(cfg, tokenizer, print0, environment=None):
    """The Problems that a Config of train_rl.py describes, as token ids; print0 is told what is left out. An
    environment makes the prompts itself, when its episodes begin: here only those of the first problems."""
    pairs, task = [[], []], sys.modules[__name__]
    if not cfg.sources():
        task = load_task(cfg.task)
        train = task.problems('train', cfg.num_problems, cfg.seed)
        held_out = task.problems('eval', cfg.eval_problems, 0)
    elif uses_pairs(cfg):
        train, held_out, pairs = pair_problems(cfg, tokenizer, print0)
    else:
        train, held_out = split_problems(cfg, print0)
    held_out = held_out[:cfg.eval_problems]
    if environment and train:
        first = train[:PROBED]
        for problem, ids in zip(first, environment.prompts(tokenizer, first)):
            problem['prompt_ids'] = ids or []
    elif not environment:
        train = fitting(cfg, tokenizer, task, train, 'training', print0)
        held_out = fitting(cfg, tokenizer, task, held_out, 'held-out', print0)
    problems = Problems(task, train, held_out, *pairs)
    if not problems.train:
        raise UserError(f'no problem is left to train on: every prompt exceeds max_prompt_length='
                        f'{cfg.max_prompt_length}, or is held out')
    return problems


def split_problems(cfg, print0):
    """(problems for training, held-out ones) of the data sets: as their metadata says, else by hold_out."""
    with_answers = 'exact' in cfg.rewards or 'number' in cfg.rewards or cfg.forward_kl > 0
    bad_rows = [] if cfg.skip_bad_rows else None
    rows, marked = read_problems(cfg.sources(), cfg.system_prompt, with_answers, bad_rows)
    systems = dict.fromkeys(problem['system'] for problem in rows)
    # the prompt of the first row is shown anyway
    print_mixture(cfg.sources(), systems if len(systems) > 1 else (), print0)
    if bad_rows:
        print0(f'{len(bad_rows):,} rows that cannot be read are left out (first: {bad_rows[0]})')
    if marked and cfg.split_rule == 'legacy':
        train, drawn = rows, []
    elif marked:
        train, drawn = without(rows, {problem['question'] for problem in marked}), []
    elif cfg.split_rule == 'legacy':
        train, drawn = legacy_rl(rows, cfg.eval_problems, cfg.seed)
    else:
        train, drawn = hold_out(rows, cfg.eval_fraction, cfg.eval_problems)
    if dropped := len(rows) - len(train) - len(drawn):
        print0(f'{dropped:,} of {len(rows):,} rows are left out: their questions are held out, and the rows '
               f'of an evaluation are at most eval_problems={cfg.eval_problems}, each question once')
    return train, marked or drawn


def fitting(cfg, tokenizer, task, problems, name, print0):
    """The problems whose prompts are short enough, with their prompt_ids: arrays, of 4 bytes a token, since
    there may be a million."""
    def chunks():
        for start in range(0, len(problems), CHUNK):
            yield [(task.prompt(problem), problem.get('tools')) for problem in problems[start:start + CHUNK]]

    issues, rest = DataIssues(), iter(problems)
    processes = min(cfg.dataset_num_proc, math.ceil(len(problems) / CHUNK))
    for _, encoded in map_chunks(functools.partial(encode_prompts, tokenizer), chunks(), processes):
        for ids, of_prompt in encoded:
            problem = next(rest)
            problem['prompt_ids'] = ids
            for kind in of_prompt:
                issues.add(kind, repr(problem['question'][:60]))
    for line in issues.lines():
        print0(f'{name} problems: {line}')
    kept = [problem for problem in problems if len(problem['prompt_ids']) <= cfg.max_prompt_length]
    if len(kept) < len(problems):
        longest = max(len(problem['prompt_ids']) for problem in problems)
        print0(f'{name} problems: {len(problems) - len(kept):,} of {len(problems):,} are left out, their '
            f'prompts exceed max_prompt_length={cfg.max_prompt_length} tokens (the longest has {longest})')
    return kept


def encode_prompts(tokenizer, chats):
    """[(messages, tools)] -> [(token ids as an array, kinds of data.chat.REMARKS)]"""
    pieces = []
    for messages, tools in chats:
        try:
            pieces.append(segments(tokenizer, messages, tools, add_generation_prompt=True))
        except UserError as error:
            raise UserError(f'the question {messages[-1]["content"][:60]!r}: {error}') from None
    return [(array('i', row.ids), remarks(tokenizer, *chat))
            for row, chat in zip(encode(tokenizer, pieces), chats)]


def pair_problems(cfg, tokenizer, print0):
    """Preference data -> (prompts for training, held-out prompts, [pairs for training, held-out pairs])."""
    pairs = []
    print_mixture(cfg.sources(), (), print0)
    for source in cfg.sources():
        of_source, drops = read_pairs(source, cfg.system_prompt, skip_bad_rows=cfg.skip_bad_rows)
        for line in remarks_on(tokenizer, of_source):
            print0(f'{source.name}: {line}')
        for place, pair in enumerate(of_source):
            pairs += [pair] * copies(source, place)
        if drops:
            print0(f'{source.name}: pairs left out: {drops}')
    encoded, prompts = [], []
    for split, members in zip(('train', 'eval'), split_pairs(cfg, pairs, print0)):
        longest = min(cfg.max_length, cfg.max_prompt_length + cfg.max_completion_length)
        ids, drops, cuts = encode_pairs(tokenizer, members, longest, num_proc=cfg.dataset_num_proc)
        if drops:
            print0(f'{split} pairs left out: {drops}')
        if any(cuts.values()):
            print0(f'{split} pairs cut: {cuts}')
        asked = {json.dumps(pair.prompt): {DIALOGUE: pair.prompt, 'question': pair.prompt[-1]['content']}
                 for pair in members}
        encoded.append(ids)
        prompts.append(list(asked.values()))
    if len(encoded[0]) < 2:
        raise UserError('a reward model needs two preference pairs or more to be trained on')
    return (*prompts, encoded)


def split_pairs(cfg, pairs, print0):
    """(training, held out): as the metadata says, else by the prompt. All pairs of a prompt are on one side;
    of the held-out ones MAX_EVAL_ROWS at most."""
    held_out = [pair for pair in pairs if pair.split == 'eval']
    if cfg.split_rule == 'legacy':
        if held_out:
            return [pair for pair in pairs if pair.split == 'train'], held_out
        return legacy_pairs(pairs, 500, cfg.seed)
    if not held_out:
        held_out = [pair for pair in pairs if is_held_out(pair.prompt, cfg.eval_fraction)]
    asked = {json.dumps(pair.prompt) for pair in held_out}
    train = [pair for pair in pairs if json.dumps(pair.prompt) not in asked]
    held_out = held_out[:MAX_EVAL_ROWS]
    if dropped := len(pairs) - len(train) - len(held_out):
        print0(f'{dropped:,} of {len(pairs):,} pairs are left out: their prompts are held out, and an '
               f'evaluation looks at {MAX_EVAL_ROWS} pairs at most')
    return train, held_out


def draw_problems(problems, start, count, seed):
    """`count` problems from place `start` on in an endless row of shuffled epochs."""
    orders = {}
    for place in range(start, start + count):
        epoch = place // len(problems)
        if epoch not in orders:
            orders[epoch] = list(range(len(problems)))
            random.Random(f'{seed}/{epoch}').shuffle(orders[epoch])
        yield problems[orders[epoch][place % len(problems)]]
