"""Problems with an exact answer, for a team: the tool agent writes a program, which is run; the reasoner answers.

From the second turn on both see what was tried: every program, what it printed, every answer. An episode ends where the two
agree, and is a success where the reasoner is right, so that agreeing on something wrong earns nothing.

Problems come from the files that scripts/dataprocess/load_math.py wrote, or from the generator here: Tom has 3 bags of 14 pens.
Mia gives Tom 7. How many pens does Tom have? A set of numbers belongs to one split, a wording too. The pupils of the team:
the tool agent's forgets or mistakes the last operation in half of the programs; the reasoner's distrusts programs, and answers by a
sum of its own, without the carry, in three cases of five.
"""
import functools
import random

from configurator import UserError
from data.rewards import as_number, extract_answer, same_answer
from data.sandbox import run_many
from data.tasks.env import Outcome
from data.tasks.stored import builds, code_block, picked, problems_of, shown
from data.tasks.world import ITEMS, NAMES, split_of

ROLES, ACTS = ('tool', 'reasoner'), 'reasoner'
RUNS_PROGRAMS = True
SETS = ('polaris', 'gsm8k', 'dapo_math', 'aime_past', 'AIME24', 'AIME25', 'OlympiadBench')
SETTINGS = {'dataset': (None, f'stems of data_dir/math/train, or for the held-out split of data_dir/math/test, several with +: '
                              f'{", ".join(SETS)} or a file of yours; polaris and AIME24 where nothing is said'),
            'data_dir': ('datasets', 'where scripts/dataprocess/load_math.py put them'),
            'steps': (2, 'operations in a generated problem'),
            'timeout': (2.0, 'seconds that a program may run'),
            'rules': (False, 'explain the task in a system message, for models that were not warmed up on it')}
RULES = {'tool': 'Write a Python program that computes the answer to the problem and prints it, and nothing else. Put the program '
                 'between ```python and ```. Earlier tries are shown, if there are any: keep what was right, or do better.',
         'reasoner': 'Solve the problem. Somebody wrote a program for it, which was run; check it, and look at the earlier tries, if '
                     'there are any. End with the final answer in \\boxed{}.'}
CARELESS, PROUD = 0.5, 0.6          # of the pupils' answers
HAS = ['{name} has {a} {items}.', '{name} owns {a} {items}.', 'There are {a} {items} in the bag of {name}.']
EACH = ['{name} has {a} bags of {b} {items}.', '{name} has {a} boxes with {b} {items} each.',
        'In each of the {a} boxes of {name} there are {b} {items}.']
CHANGES = {'+': ['{name} buys {c} more.', '{name} finds {c} more.', '{friend} gives {name} {c}.', '{name} gets {c} from {friend}.'],
           '-': ['{name} gives {friend} {c}.', '{name} loses {c}.', '{name} sells {c}.', '{friend} takes {c}.']}
QUESTIONS = ['How many {items} does {name} have?', 'How many {items} are there now?', 'How many are there in the end?',
             'Count the {items} of {name}.']


# ---- problems ---------------------------------------------------------------------------------------------------------------

def problems(split, n, seed, dataset=None, data_dir='datasets', steps=2, timeout=2.0, rules=False):
    """n problems {'question', 'answer', 'numbers', 'signs', 'timeout', 'rules'} of a split; answer is the text of a number. numbers and
    signs are what the answer is computed from, of generated problems. Of a stored held-out set there may be fewer than n."""
    dataset = dataset or {'train': 'polaris', 'eval': 'AIME24'}[split]
    stored = stored_problems(split, dataset, data_dir)
    found = generated(split, n, f'{dataset}/{seed}', steps) if stored is None else picked(stored, split, n, seed)
    return [{**problem, 'timeout': timeout, 'rules': rules} for problem in found]


@functools.lru_cache(maxsize=8)
def stored_problems(split, dataset, data_dir):
    return problems_of('math', split, dataset, data_dir, SETS, from_row)


def from_row(row, where):
    """A stored row {'question', 'solution'} as a problem."""
    for key in ('question', 'solution'):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f'{where}: "{key}" must be a text; a row has "question" and "solution", the final answer')
    return {'question': row['question'], 'answer': extract_answer(row['solution']), 'numbers': row.get('numbers'),
            'signs': row.get('signs')}


def generated(split, n, seed, steps):
    """n problems of the generator; their numbers and the wording belong to the split."""
    if not 1 <= steps <= 5:
        raise UserError(f'env.steps={steps}: the generator makes problems of 1 to 5 operations')
    draw, found = random.Random(f'math/{split}/{seed}/{steps}'), []
    while len(found) < n:
        signs = [draw.choice('*+-'), *draw.choices('+-', k=steps - 1)]
        numbers = [draw.randint(2, 9), draw.randint(3, 15)] if signs[0] == '*' else [draw.randint(10, 60), draw.randint(2, 40)]
        numbers += [draw.randint(2, 40) for _ in range(steps - 1)]
        templates = [draw.choice(EACH)] if signs[0] == '*' else [draw.choice(HAS), draw.choice(CHANGES[signs[0]])]
        templates += [draw.choice(CHANGES[sign]) for sign in signs[1:]] + [draw.choice(QUESTIONS)]
        partial = [value(numbers[:i + 2], signs[:i + 1]) for i in range(steps)]
        if (min(partial) < 0 or split_of(' '.join(map(str, sorted(numbers)))) != split
                or split_of(' '.join(templates), share=0.2) != split):
            continue
        (name, friend), items, changes = draw.sample(NAMES, 2), draw.choice(ITEMS), iter(numbers[1 + (signs[0] == '*'):])
        sentences = [template.format(a=numbers[0], b=numbers[1], c=next(changes) if '{c}' in template else None, name=name, friend=friend,
                                     items=items) for template in templates]
        found.append({'question': ' '.join(sentences), 'answer': str(partial[-1]), 'numbers': numbers, 'signs': signs})
    return found


def value(numbers, signs):
    """Of numbers with signs between them; only the first sign may be *, so left to right is the value of the expression."""
    result = numbers[0]
    for sign, number in zip(signs, numbers[1:]):
        result = result * number if sign == '*' else result + number if sign == '+' else result - number
    return result


def program(numbers, signs):
    """The program that prints it, as the tool agent is to write it."""
    return f'```python\nprint({numbers[0]}{"".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:]))})\n```'


# ---- one episode ------------------------------------------------------------------------------------------------------------

class Env:
    """One episode. tries: of each turn the program, what it printed, its last line, and the answer."""
    roles = ROLES

    def __init__(self, problem):
        self.problem, self.turn, self.tries, self.tool = problem, 0, [], None

    @property
    def done(self):
        """The answer is what the program printed or, where nothing was printed, what the answer was in the turn before."""
        if not self.tries or self.tries[-1]['answer'] is None:
            return False
        other = self.tries[-1]['printed'] or (self.tries[-2]['answer'] if len(self.tries) > 1 else None)
        return other is not None and same_answer(other, self.tries[-1]['answer'])

    @property
    def success(self):
        return bool(self.tries) and same_answer(self.tries[-1]['answer'] or '', self.problem['answer'])

    def prompt(self, role):
        lines = [self.problem['question']]
        for number, one in enumerate(self.tries, 1):
            lines += [f'Try {number}:', *picture(one)]
            lines += [f'The answer was {one["answer"]}.'] if one['answer'] else []
        if role == 'reasoner' and self.tool:
            lines += picture(self.tool)
        lines.append({'tool': 'Write a program.', 'reasoner': 'What is the answer?'}[role])
        system = [{'role': 'system', 'content': RULES[role]}] * self.problem['rules']
        return system + [{'role': 'user', 'content': '\n'.join(lines)}]

    def score(self, role, text):
        """The team earns 1 for the right answer; its writer 0.8 besides, and 0.1 each for a program that compiles and one that prints
        something and ends well, or 0.2 for an answer in \\boxed{} (Zhao et al. 2025)."""
        return self.score_many(role, [text])[0]

    def score_many(self, role, texts):
        """Outcomes of several candidates; equal programs are run once, different ones at the same time."""
        if role == 'reasoner':
            return [self.judge(text) for text in texts]
        programs = [code_block(text) for text in texts]
        different = list(dict.fromkeys(code for code in programs if code is not None))
        runs = dict(zip(different, run_many([(code, '') for code in different], self.problem['timeout'])))
        return [self.judge_program(code, runs.get(code)) for code in programs]

    def judge_program(self, code, run):
        if run is None:
            return Outcome(0.0, 0.0, False, None, 'no program')
        printed = shown(run.stdout.strip().splitlines()[-1], 100) if run.ok and run.stdout.strip() else None
        right = printed is not None and same_answer(printed, self.problem['answer'])
        note = f'prints {printed}' if printed else run.reason or 'prints nothing'
        return Outcome(float(right), 0.1 * builds(run) + 0.1 * bool(printed) + 0.8 * right, True,
                       {'program': shown(code, 1500), 'output': shown(run.stdout), 'printed': printed, 'reason': shown(run.reason)}, note)

    def judge(self, text):
        answer = shown(extract_answer(text[text.rindex('\\boxed{'):]), 100) if '\\boxed{' in text else ''
        if not answer:
            return Outcome(0.0, 0.0, False, None, 'no answer')
        right = same_answer(answer, self.problem['answer'])
        return Outcome(float(right), 0.2 + 0.8 * right, True, {'answer': answer}, f'answers {answer}')

    def step(self, role, outcome):
        if role == 'tool':
            self.tool = outcome.action
        else:
            answer = outcome.action['answer'] if outcome.valid else None
            self.tries.append({'program': None, 'printed': None, **(self.tool or {}), 'answer': answer})
            self.tool, self.turn = None, self.turn + 1

    def solution(self, role):
        """None for the program of a problem that was not generated."""
        if role == 'reasoner':
            return f'\\boxed{{{self.problem["answer"]}}}'
        return program(self.problem['numbers'], self.problem['signs']) if self.problem['numbers'] else None

    def demonstration(self, role, draw):
        numbers, signs = self.problem['numbers'], self.problem['signs']
        if not numbers:
            raise UserError('env.dataset: only generated problems have demonstrations; leave the warm-up out, or data_dir empty')
        if role == 'tool':
            if draw.random() < CARELESS:
                signs = [*signs[:-1], draw.choice([sign for sign in '+-' if sign != signs[-1]])] if draw.random() < 0.5 else signs[:-1]
            return program(numbers[:len(signs) + 1], signs)
        if self.tool and as_number(self.tool['printed'] or '') is not None and draw.random() > PROUD:
            return f'\\boxed{{{self.tool["printed"]}}}'
        careless = sum(number % 10 for number in numbers) % 10 + sum(number // 10 for number in numbers) * 10
        return f'\\boxed{{{careless}}}'

    def view(self):
        lines = [self.problem['question']]
        for number, one in enumerate([*self.tries, *([self.tool] if self.tool else [])], 1):
            lines += [f'-- turn {number}', *picture(one)]
            lines += [f'answer: {one["answer"]}'] if one.get('answer') else []
        return '\n'.join([*lines, f'-- right answer: {self.problem["answer"]}' + (' (success)' if self.success else '')])


def picture(one):
    """A program and what came of it, in lines."""
    if one['program'] is None:
        return []
    result = f'It prints: {one["output"]}' if one['printed'] else f'It fails: {one["reason"] or "nothing printed"}'
    return ['```python', one['program'], '```', result]
