"""Problems with an exact answer, for a team: the tool agent's program is run, then the reasoner answers.

From the second turn on both see what was tried: every program, what it printed, every answer. An episode ends
where the two agree, and is a success where the reasoner is right, so that agreeing on something wrong earns
nothing.

Problems come from the files that scripts/dataprocess/load_math.py wrote, or from the generator here: Tom has
3 bags of 14 pens. Mia gives Tom 7. How many pens does Tom have? Each set of numbers belongs to one split, and
each wording. The scripted noisy demonstrators: the tool agent's leaves out or mistakes the last operation
with probability P_WRONG_PROGRAM; the reasoner's ignores the program with probability P_IGNORE_PROGRAM, and
answers a sum of its own without the carry.
"""
import random

from configurator import UserError
from data.rewards import as_number, extract_answer, same_answer
from data.tasks.env import Outcome, chat
from data.tasks.stored import code_block, compiles, excerpt, fenced, pick, run_distinct
from data.tasks.stored import stored_problems
from data.tasks.world import ITEMS, NAMES, lines, split_of

ROLES, ACTS = ('tool', 'reasoner'), 'reasoner'
RUNS_PROGRAMS = True
DATASETS = ('polaris', 'gsm8k', 'dapo_math', 'aime_past', 'AIME24', 'AIME25', 'OlympiadBench')
SETTINGS = {
    'dataset': (None, 'stems of data_dir/math/train, or for the held-out split of data_dir/math/test, '
                      f'several with +: {", ".join(DATASETS)} or a file of '
                      'yours; polaris and AIME24 where nothing is said'),
    'data_dir': ('datasets', 'where scripts/dataprocess/load_math.py put them'),
    'steps': (2, 'operations in a generated problem'),
    'timeout': (2.0, 'seconds that a program may run'),
    'rules': (False, 'explain the task in a system message, for models that were not warmed up on it'),
}
RULES = {
    'tool': 'Write a Python program that computes the answer to the problem and prints it, without any other '
            'word. Put the program between ```python and ```. Earlier tries are shown, if there are any: '
            'keep what was right, or do better.',
    'reasoner': 'Solve the problem. If a program for it is shown, it was run: check it, and look at the '
                'earlier tries, if there are any. End with the final answer in \\boxed{}, such as: '
                '\\boxed{42}',
}
# mistakes of the demonstrators
P_WRONG_PROGRAM = 0.5
P_IGNORE_PROGRAM = 0.6

HAS = lines('''
    {name} has {a} {items}.
    {name} owns {a} {items}.
    There are {a} {items} in the bag of {name}.
''')
EACH = lines('''
    {name} has {a} bags of {b} {items}.
    {name} has {a} boxes with {b} {items} each.
    In each of the {a} boxes of {name} there are {b} {items}.
''')
CHANGES = {
    '+': ['{name} buys {c} more.', '{name} finds {c} more.', '{friend} gives {name} {c}.', '{name} gets {c} '
                                                                                           'from {friend}.'],
    '-': ['{name} gives {friend} {c}.', '{name} loses {c}.', '{name} sells {c}.', '{friend} takes {c}.'],
}
QUESTIONS = lines('''
    How many {items} does {name} have?
    How many {items} are there now?
    How many are there in the end?
    Count the {items} of {name}.
''')


# ---- problems

def problems(split, n, seed, dataset=None, data_dir='datasets', steps=2, timeout=2.0, rules=False):
    """n problems {'question', 'answer', 'numbers', 'signs', 'timeout', 'rules'} of a split; of a stored
    held-out set there may be fewer.

    answer is the text of a number; numbers and signs are what that of a generated problem is computed from.
    """
    dataset = dataset or {'train': 'polaris', 'eval': 'AIME24'}[split]
    stored = stored_problems('math', split, dataset, data_dir, DATASETS, from_row)
    if stored is None:
        chosen = generated(split, n, f'{dataset}/{seed}', steps)
    else:
        chosen = pick(stored, split, n, seed)
    return [{**problem, 'timeout': timeout, 'rules': rules} for problem in chosen]


def from_row(row, where):
    """A stored row {'question', 'solution'} as a problem."""
    for key in ('question', 'solution'):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f'{where}: "{key}" must be a text; a row has '
                            '"question" and "solution", the final answer')
    return {
        'question': row['question'],
        'answer': extract_answer(row['solution']),
        'numbers': row.get('numbers'),
        'signs': row.get('signs'),
    }


def generated(split, n, seed, steps):
    """n problems of the generator; their numbers and the wording belong to the split."""
    if not 1 <= steps <= 5:
        raise UserError(f'env.steps={steps}: the generator makes problems of 1 to 5 operations')
    draw = random.Random(f'math/{split}/{seed}/{steps}')
    made = []
    while len(made) < n:
        signs = [draw.choice('*+-'), *draw.choices('+-', k=steps - 1)]
        numbers = draw_numbers(draw, signs)
        templates = draw_templates(draw, signs)
        results = [value(numbers[:i + 2], signs[:i + 1]) for i in range(steps)]
        if min(results) < 0:
            continue
        if split_of(' '.join(map(str, sorted(numbers)))) != split:
            continue
        if split_of(' '.join(templates), share=0.2) != split:
            continue
        made.append({
            'question': write_question(draw, templates, numbers, signs),
            'answer': str(results[-1]),
            'numbers': numbers,
            'signs': signs,
        })
    return made


def draw_numbers(draw, signs):
    if signs[0] == '*':
        numbers = [draw.randint(2, 9), draw.randint(3, 15)]
    else:
        numbers = [draw.randint(10, 60), draw.randint(2, 40)]
    return numbers + [draw.randint(2, 40) for _ in signs[1:]]


def draw_templates(draw, signs):
    """One sentence for each change after the first number or product, and a question."""
    if signs[0] == '*':
        templates = [draw.choice(EACH)]
        signs = signs[1:]
    else:
        templates = [draw.choice(HAS)]
    templates += [draw.choice(CHANGES[sign]) for sign in signs]
    return [*templates, draw.choice(QUESTIONS)]


def write_question(draw, templates, numbers, signs):
    name, friend = draw.sample(NAMES, 2)
    items = draw.choice(ITEMS)
    a, b, *later = numbers
    changes = iter(later if signs[0] == '*' else [b, *later])
    sentences = []
    for template in templates:
        c = next(changes) if '{c}' in template else None
        sentences.append(template.format(a=a, b=b, c=c, name=name, friend=friend, items=items))
    return ' '.join(sentences)


def value(numbers, signs):
    """The value of numbers with signs between them, from left to right: only the first sign may be *."""
    result = numbers[0]
    for sign, number in zip(signs, numbers[1:]):
        if sign == '*':
            result *= number
        else:
            result += number if sign == '+' else -number
    return result


def program(numbers, signs):
    """The program that prints it, as the tool agent is to write it."""
    terms = [f'{sign}{number}' for sign, number in zip(signs, numbers[1:])]
    return fenced(f'print({numbers[0]}{"".join(terms)})')


# ---- one episode of a team

class Env:
    """One episode. tries: a turn's {'program', 'output', 'printed': its last line, 'reason', 'answer'}."""
    roles = ROLES

    def __init__(self, problem):
        self.problem = problem
        self.turn = 0
        self.tries = []
        self.tool = None            # the program of this turn, as an entry of tries without 'answer'

    @property
    def done(self):
        """Whether the answer is what the program printed, or else the answer of the turn before."""
        if not self.tries or self.tries[-1]['answer'] is None:
            return False
        other = self.tries[-1]['printed']
        if not other and len(self.tries) > 1:
            other = self.tries[-2]['answer']
        return other is not None and same_answer(other, self.tries[-1]['answer'])

    @property
    def success(self):
        return bool(self.tries) and same_answer(self.tries[-1]['answer'] or '', self.problem['answer'])

    def prompt(self, role):
        lines = [self.problem['question']]
        for number, attempt in enumerate(self.tries, 1):
            lines += [f'Try {number}:', *program_lines(attempt)]
            if attempt['answer']:
                lines.append(f'The answer was {attempt["answer"]}.')
        if role == 'reasoner' and self.tool:
            lines += program_lines(self.tool)
        lines.append({'tool': 'Write a program.', 'reasoner': 'What is the answer?'}[role])
        return chat('\n'.join(lines), RULES[role] if self.problem['rules'] else None)

    def score(self, role, text):
        """The team earns 1 for the right answer; its writer 0.8 besides, and 0.1 each for a program that
        compiles and one that prints something and ends well, or 0.2 for an answer in \\boxed{} (Zhao et al.
        2025)."""
        return self.score_many(role, [text])[0]

    def score_many(self, role, texts):
        """Outcomes of several candidates."""
        if role == 'reasoner':
            return [self.judge_answer(text) for text in texts]
        programs = [code_block(text) for text in texts]
        jobs = [(code, '') for code in programs if code is not None]
        runs = run_distinct(jobs, self.problem['timeout'])
        return [self.judge_program(code, runs.get((code, ''))) for code in programs]

    def judge_program(self, code, run):
        if run is None:
            return Outcome(0.0, 0.0, False, None, 'no program')
        printed = None
        if run.ok and run.stdout.strip():
            printed = excerpt(run.stdout.strip().splitlines()[-1], 100)
        right = printed is not None and same_answer(printed, self.problem['answer'])
        local = 0.1 * compiles(run) + 0.1 * bool(printed) + 0.8 * right
        action = {
            'program': excerpt(code, 1500),
            'output': excerpt(run.stdout),
            'printed': printed,
            'reason': excerpt(run.reason),
        }
        note = f'prints {printed}' if printed else run.reason or 'prints nothing'
        return Outcome(float(right), local, True, action, note)

    def judge_answer(self, text):
        _, boxed, after = text.rpartition('\\boxed{')
        answer = excerpt(extract_answer(boxed + after), 100) if boxed else ''
        if not answer:
            return Outcome(0.0, 0.0, False, None, 'no answer')
        right = same_answer(answer, self.problem['answer'])
        return Outcome(float(right), 0.2 + 0.8 * right, True, {'answer': answer}, f'answers {answer}')

    def step(self, role, outcome):
        if role == 'tool':
            self.tool = outcome.action
            return
        attempt = {'program': None, 'printed': None, **(self.tool or {})}
        attempt['answer'] = outcome.action['answer'] if outcome.valid else None
        self.tries.append(attempt)
        self.tool = None
        self.turn += 1

    def solution(self, role):
        """None for the program of a problem that was not generated."""
        if role == 'reasoner':
            return boxed(self.problem['answer'])
        numbers, signs = self.problem['numbers'], self.problem['signs']
        return program(numbers, signs) if numbers else None

    def demonstration(self, role, draw):
        numbers, signs = self.problem['numbers'], self.problem['signs']
        if not numbers:
            return None
        if role == 'tool':
            if draw.random() < P_WRONG_PROGRAM:
                signs = wrong_signs(signs, draw)
            return program(numbers[:len(signs) + 1], signs)
        printed = self.tool and self.tool['printed']
        if as_number(printed or '') is not None and draw.random() > P_IGNORE_PROGRAM:
            return boxed(printed)
        tens = sum(number // 10 for number in numbers)
        ones = sum(number % 10 for number in numbers)
        return boxed(ones % 10 + tens * 10)

    def view(self):
        lines = [self.problem['question']]
        attempts = [*self.tries, self.tool] if self.tool else self.tries
        for number, attempt in enumerate(attempts, 1):
            lines += [f'-- turn {number}', *program_lines(attempt)]
            if attempt.get('answer'):
                lines.append(f'answer: {attempt["answer"]}')
        success = ' (success)' if self.success else ''
        lines.append(f'-- right answer: {self.problem["answer"]}{success}')
        return '\n'.join(lines)


def boxed(answer):
    return f'\\boxed{{{answer}}}'


def wrong_signs(signs, draw):
    """The signs with the last one missing or mistaken."""
    *signs, last = signs
    if draw.random() < 0.5:
        signs.append(draw.choice([sign for sign in '+-' if sign != last]))
    return signs


def program_lines(attempt):
    """A program and what came of it, in lines."""
    if attempt['program'] is None:
        return []
    result = f'It fails: {attempt["reason"] or "nothing printed"}'
    if attempt['printed']:
        result = f'It prints: {attempt["output"]}'
    return ['```python', attempt['program'], '```', result]
