"""Problems with answers that can be checked, from an embedded task or from any data set with a question and an answer column.

A problem is a dict: the row as it is, with 'question' and 'answer' as texts and, where the data set has one, the system message that
says in which form to answer.
"""
import importlib
import random

from configurator import UserError
from data.records import read_rows, split_of_row, text_of
from data.rewards import extract_answer

TASKS = ('arithmetic', 'facts', 'plan_path', 'toolcalls')       # modules of data/tasks
QUESTION_COLUMNS = ('question', 'problem', 'prompt')
ANSWER_COLUMNS = ('answer', 'expected_answer', 'solution')
FORM = ('Think about the problem step by step between <think> and </think>. Then write the final answer, and nothing else, between '
        '<answer> and </answer>.')
# data set: its columns, if not those above, and the form of answer that it is asked for
TEMPLATES = {'openai/gsm8k': dict(prompt_column='question', answer_column='answer', system=FORM + ' The answer is one number.'),
             'nvidia/OpenMathInstruct-2': dict(prompt_column='problem', answer_column='expected_answer', system=FORM)}


def load_task(name):
    """The module of an embedded task: problems(split, n, seed), prompt(problem), reward(problem, text)."""
    return importlib.import_module(f'data.tasks.{name}')


def read_problems(sources, system_prompt=None, with_answers=True):
    """[Source] -> (problems for training, problems held out by their metadata). UserError names file, row and column.

    with_answers: False where no reward needs one; then a row may lack it."""
    train, held_out = [], []
    for source in sources:
        template = TEMPLATES.get(source.name, {})
        system = system_prompt if system_prompt is not None else template.get('system', FORM)
        before, columns = len(train) + len(held_out), None
        for where, row in read_rows(source.name, source.split, source.subset):
            columns = columns or columns_of(source, template, row, where, with_answers)
            try:
                problem = {**row, 'question': text_of(row, columns[0]), 'system': system}
                if columns[1]:
                    problem['answer'] = text_of(row, columns[1])
                if columns[1] and not extract_answer(problem['answer']):
                    raise UserError(f'{columns[1]}: no answer in {problem["answer"][:60]!r}')
                (train if split_of_row(row) == 'train' else held_out).append(problem)
            except UserError as error:
                raise UserError(f'{where}: {error}') from None
        if before == len(train) + len(held_out):
            raise UserError(f'{source.name}: no row of split {source.split!r}')
    return train, held_out


def columns_of(source, template, row, where, with_answers):
    """(question column, answer column) of a data set, by its source, its template or the usual names."""
    found = []
    for typed, known, kind in ((source.prompt_column, QUESTION_COLUMNS, 'prompt'), (source.answer_column, ANSWER_COLUMNS, 'answer')):
        column = typed or template.get(f'{kind}_column') or next((name for name in known if name in row), None)
        if column is None and (kind == 'prompt' or with_answers):
            raise UserError(f'{where}: none of the columns {", ".join(map(str, list(row)[:8]))} is one of {", ".join(known)}: name it with '
                            f'data.datasets[0].{kind}_column=...')
        found.append(column)
    return found


def prompt(problem):
    """The chat that asks for it."""
    if 'messages' in problem:
        return problem['messages']
    system = [{'role': 'system', 'content': problem['system']}] if problem.get('system') else []
    return [*system, {'role': 'user', 'content': problem['question']}]


def hold_out(problems, count, seed):
    """(training, held out): `count` problems, at most a tenth, drawn by the seed; a question that is held out is in no training row."""
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    held_out = [problems[i] for i in order[:min(count, len(problems) // 10)]]
    questions = {problem['question'] for problem in held_out}
    return [problem for problem in problems if problem['question'] not in questions], held_out
