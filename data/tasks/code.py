"""Programming problems with tests on stdin and stdout, for a team: a coder writes programs, a tester tests.

The program is run on the test. Where they disagree both see how in the next turn; where the program passes,
the episode ends. It is a success if the program passes the hidden tests, all of them, so that agreeing on
something wrong earns nothing. Expected outputs stay out of the sandbox, and hidden tests out of every prompt.

Problems come from the files that scripts/dataprocess/load_code.py wrote, or from the generator here: Read
numbers. Print the sum of the squares of the even ones. What is computed belongs to one split, and so does the
wording. The scripted noisy demonstrators: the coder's leaves the condition out with probability
P_NO_CONDITION and mistakes it with probability P_WRONG_CONDITION; the tester's is mistaken about the output
of its test with probability P_WRONG_OUTPUT.
"""
import random
import re

from configurator import UserError
from data.sandbox import same_output
from data.tasks.env import Outcome, chat
from data.tasks.stored import code_block, compiles, excerpt, fenced, pick, run_distinct, warn
from data.tasks.stored import stored_problems
from data.tasks.world import lines, split_of

ROLES, ACTS = ('coder', 'tester'), 'coder'
RUNS_PROGRAMS = True
DATASETS = ('code_contests', 'apps', 'interview', 'livecodebench')
SETTINGS = {
    'dataset': (None, 'stems of data_dir/code/train, or for the held-out split of data_dir/code/test, '
                      f'several with +: {", ".join(DATASETS)} or a file of '
                      'yours; code_contests where nothing is said'),
    'data_dir': ('datasets', 'where scripts/dataprocess/load_code.py put them'),
    'tests': (4, 'hidden tests of a training problem that count, at most; held-out problems keep all'),
    'timeout': (2.0, 'seconds that a program may run on one test'),
    'rules': (False, 'explain the task in a system message, for models that were not warmed up on it'),
}
RULES = {
    'coder': 'Write a Python program that solves the problem: it reads the input from standard input and '
             'prints the result, and nothing else. Put it between ```python and ```. If a test is shown that '
             'your last program did not pass, find out which of the two is wrong.',
    'tester': 'Write one test for the problem, not one of its examples: an input that may show a mistake in '
              'the program, and what a right program prints for it. Write it as:\n**Test '
              'Input:**\n```\ninput\n```\n**Test Output:**\n```\noutput\n```',
}
SHOWN_FAILURES = 3              # failed tests in a prompt, the last ones
# mistakes of the demonstrators
P_NO_CONDITION = 0.5
P_WRONG_CONDITION = 0.05
P_WRONG_OUTPUT = 0.5

# What a generated problem is made of; words: (the same in Python, the same as a function).
CONDITIONS = {
    '': ('', lambda n, k: True),
    'even': ('n%2==0', lambda n, k: n % 2 == 0),
    'odd': ('n%2==1', lambda n, k: n % 2 == 1),
    'more than {k}': ('n>{k}', lambda n, k: n > k),
    'less than {k}': ('n<{k}', lambda n, k: n < k),
    'not {k}': ('n!={k}', lambda n, k: n != k),
}
VALUES = {
    '': ('n', lambda n, c: n),
    'squares': ('n*n', lambda n, c: n * n),
    'doubles': ('2*n', lambda n, c: 2 * n),
    'plus {c}': ('n+{c}', lambda n, c: n + c),
    'times {c}': ('n*{c}', lambda n, c: n * c),
}
RESULTS = {
    'sum': ('sum(x)', sum),
    'largest': ('max(x)', max),
    'smallest': ('min(x)', min),
    'last': ('x[-1]', lambda x: x[-1]),
    'first': ('x[0]', lambda x: x[0]),
}
MISTAKEN = {                    # conditions: what the coder's demonstrator takes them for
    'even': 'odd',
    'odd': 'even',
    'more than {k}': 'less than {k}',
    'less than {k}': 'more than {k}',
    'not {k}': 'more than {k}',
}
OPENINGS = lines('''
    Read numbers.
    There are numbers on a line.
    Numbers are given.
    The line has numbers.
    Read a line of numbers.
''')
TAKES = lines('''
    Take those that are {condition}.
    Only those that are {condition} count.
    Use the ones that are {condition}.
    Leave out what is not {condition}.
''')
TURNS = lines('''
    Write each as {value}.
    Make each {value}.
    Each becomes {value}.
    Turn each into {value}.
''')
PRINTS = lines('''
    Print the {result}.
    The answer is the {result}.
    Show the {result}.
    Find the {result}.
''')
VALUE_WORDS = {
    '': '',
    'squares': 'its square',
    'doubles': 'its double',
    'plus {c}': 'itself plus {c}',
    'times {c}': 'itself times {c}',
}


# ---- problems

def problems(split, n, seed, dataset=None, data_dir='datasets', tests=4, timeout=2.0, rules=False):
    """n problems {'question', 'examples', 'test_input', 'test_output', 'solution', 'parts', 'timeout',
    'rules'} of a split; of a stored held-out set there may be fewer.

    Tests are texts, the solution is a program that passes them, parts what a generated problem is made of.
    """
    if tests < 1:
        raise UserError(f'env.tests={tests}: at least one test must count')
    dataset = dataset or 'code_contests'
    stored = stored_problems('code', split, dataset, data_dir, DATASETS, from_row)
    if stored is None:
        chosen = generated(split, n, f'{dataset}/{seed}')
    else:
        if split == 'train':
            stored = with_solution(stored, dataset)
        chosen = pick(stored, split, n, seed)
    last = tests if split == 'train' else None
    kept = []
    for problem in chosen:
        kept.append({
            **problem,
            'test_input': problem['test_input'][:last],
            'test_output': problem['test_output'][:last],
            'timeout': timeout,
            'rules': rules,
        })
    return kept


def with_solution(problems, dataset):
    """Without a solution no test can be judged, so training leaves such problems out."""
    kept = [problem for problem in problems if problem['solution']]
    if len(kept) < len(problems):
        warn(f'env.dataset={dataset}: {len(problems) - len(kept)} of {len(problems)} problems dropped: they '
            'have no solution to judge tests by')
    if not kept:
        raise UserError(f'env.dataset={dataset}: no problem has a solution')
    return kept


def from_row(row, where):
    """A stored row {'question', 'test_input', 'test_output', 'solution'} as a problem."""
    inputs, outputs = row.get('test_input'), row.get('test_output')
    is_text = isinstance(row.get('question'), str)
    if not is_text or not are_texts(inputs) or not are_texts(outputs) or len(inputs) != len(outputs):
        raise UserError(f'{where}: a row has "question" (a text), "test_input" and "test_output" (lists of '
                        'as many texts) and "solution" (a program)')
    return {
        'question': row['question'],
        'examples': row.get('examples') or [],
        'test_input': inputs,
        'test_output': outputs,
        'solution': row.get('solution') or '',
        'parts': row.get('parts'),
    }


def are_texts(values):
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def generated(split, n, seed):
    """n problems of the generator; what they compute and the wording belong to the split."""
    draw = random.Random(f'code/{split}/{seed}')
    made = []
    while len(made) < n:
        parts = {
            'condition': draw.choice(list(CONDITIONS)),
            'value': draw.choice(list(VALUES)),
            'result': draw.choice(list(RESULTS)),
            'k': draw.randint(3, 9),
            'c': draw.randint(2, 9),
        }
        templates = draw_templates(draw, parts)
        solution = solution_of(parts)
        if split_of(templates, share=0.2) != split or split_of(solution, share=0.2) != split:
            continue
        numbers = draw_inputs(parts, draw)
        inputs = [' '.join(map(str, line)) for line in numbers]
        outputs = [str(answer(parts, line)) for line in numbers]
        question = templates.format(condition=parts['condition'].format(**parts),
                                    value=VALUE_WORDS[parts['value']].format(**parts), result=parts['result'])
        made.append({
            'question': f'{question} For {inputs[0]} it is {outputs[0]}.',
            'examples': [[inputs[0], outputs[0]]],
            'test_input': inputs[1:],
            'test_output': outputs[1:],
            'solution': solution,
            'parts': parts,
        })
    return made


def draw_templates(draw, parts):
    """The wording of a problem, with {condition}, {value} and {result} to be filled in."""
    sentences = [draw.choice(OPENINGS)]
    if parts['condition']:
        sentences.append(draw.choice(TAKES))
    if parts['value']:
        sentences.append(draw.choice(TURNS))
    return ' '.join([*sentences, draw.choice(PRINTS), 'If none is left, print 0.'])


def answer(parts, numbers):
    """What a right program prints for a list of numbers."""
    _, condition = CONDITIONS[parts['condition']]
    _, value = VALUES[parts['value']]
    _, result = RESULTS[parts['result']]
    values = [value(n, parts['c']) for n in numbers if condition(n, parts['k'])]
    return result(values) if values else 0


def draw_inputs(parts, draw):
    """The example and six hidden tests, all different, as lists of numbers.

    The first four tests tell the problem from its neighbours, which have another condition, another result or
    no value; no constant passes more than three of the six.
    """
    neighbours = []
    for part, table in (('condition', CONDITIONS), ('result', RESULTS)):
        neighbours += [{**parts, part: words} for words in table if words != parts[part]]
    if parts['value']:
        neighbours.append({**parts, 'value': ''})
    while True:
        inputs = [[draw.randint(1, 12) for _ in range(draw.randint(3, 5))] for _ in range(7)]
        answers = [answer(parts, numbers) for numbers in inputs]
        if len(set(map(str, inputs))) < 7 or any(answers[1:].count(one) > 3 for one in answers):
            continue
        if all([answer(other, numbers) for numbers in inputs[1:5]] != answers[1:5] for other in neighbours):
            return inputs


def solution_of(parts):
    """The program of these parts."""
    condition, _ = CONDITIONS[parts['condition']]
    value, _ = VALUES[parts['value']]
    result, _ = RESULTS[parts['result']]
    if condition:
        condition = ' if ' + condition
    line = f'x=[{value} for n in map(int,input().split()){condition}]'.format(**parts)
    return f'{line}\nprint({result} if x else 0)'


# ---- one episode of a team

class Env:
    """One episode. program: {'program', 'passed'} of the last one; failures: tests that programs failed."""
    roles = ROLES

    def __init__(self, problem):
        self.problem = problem
        self.turn = 0
        self.program = None
        self.failures = []
        self.tested = True          # whether a tester has answered the last program
        self.done = False           # the program passes a test; or the coder, alone, repeats itself

    @property
    def success(self):
        return bool(self.program) and self.program['passed'] == 1.0

    def prompt(self, role):
        lines = [self.problem['question']]
        for failure in self.failures[-SHOWN_FAILURES:]:
            lines.append(f'For the input {failure["input"]} a program printed {failure["printed"]}, but a '
                         f'test expected {failure["expected"]}.')
        if self.program:
            lines += ['```python', excerpt(self.program['program'], 1500), '```']
        lines.append({'coder': 'Write a program.', 'tester': 'Write a test.'}[role])
        return chat('\n'.join(lines), RULES[role] if self.problem['rules'] else None)

    def score(self, role, text):
        """For a program the team earns the share of hidden tests that it passes, its writer 0.8 of that
        besides, and 0.1 each for one that compiles and one that ends well on all of them.

        For a test its writer earns 0.2 if it can be read and is none of the examples, and 0.8 if the
        reference solution passes it; the team 1 if it is right in that and tells a good program from a bad
        one: the present program passes it just when it passes the hidden ones (local rewards: Zhao et al.
        2025).
        """
        return self.score_many(role, [text])[0]

    def score_many(self, role, texts):
        """Outcomes of several candidates."""
        return self.score_programs(texts) if role == 'coder' else self.score_tests(texts)

    def score_programs(self, texts):
        programs = [code_block(text) for text in texts]
        inputs = self.problem['test_input']
        jobs = []
        for program in programs:
            if program is not None:
                jobs += [(program, stdin) for stdin in inputs]
        results = run_distinct(jobs, self.problem['timeout'])
        outcomes = []
        for program in programs:
            runs = [results.get((program, stdin)) for stdin in inputs]
            outcomes.append(self.judge_program(program, runs))
        return outcomes

    def judge_program(self, program, runs):
        """The Outcome of a program by its Results on the hidden tests."""
        if program is None:
            return Outcome(0.0, 0.0, False, None, 'no program')
        passed = sum(map(passes, runs, self.problem['test_output'])) / len(runs)
        failed = next((run.reason for run in runs if not run.ok), '')
        local = 0.1 * all(map(compiles, runs)) + 0.1 * (not failed) + 0.8 * passed
        note = f'passes {passed:.0%} of the hidden tests'
        if failed:
            note += f': {excerpt(failed, 80)}'
        return Outcome(passed, local, True, {'program': program, 'passed': passed}, note)

    def score_tests(self, texts):
        tests = [parse_test(text) for text in texts]
        present = self.program['program'] if self.program else None
        jobs = []
        for test in tests:
            if test is not None:
                jobs += [(program, test[0]) for program in (self.problem['solution'], present) if program]
        results = run_distinct(jobs, self.problem['timeout'])
        return [self.judge_test(test, present, results) for test in tests]

    def judge_test(self, test, present, results):
        """The Outcome of a test (input, expected output), by how the solution and the program do on it."""
        if test is None:
            return Outcome(0.0, 0.0, False, None, 'no test')
        stdin, expected = test
        if any(same_output(stdin, example) for example, _ in self.problem['examples']):
            return Outcome(0.0, 0.0, False, None, 'an example, no test')
        right = passes(results.get((self.problem['solution'], stdin)), expected)
        run = results.get((present, stdin))
        passed = passes(run, expected)
        printed = 'nothing'
        if run is not None:
            printed = excerpt(run.stdout) or printed if run.ok else run.reason
        action = {'input': stdin, 'expected': expected, 'printed': excerpt(printed), 'passes': passed}
        note = f'{"right" if right else "wrong"}, the program {"passes" if passed else "fails"}'
        return Outcome(float(right and passed == self.success), 0.2 + 0.8 * right, True, action, note)

    def step(self, role, outcome):
        if role == 'coder':
            self.step_coder(outcome)
        else:
            self.step_tester(outcome)

    def step_coder(self, outcome):
        alone = not self.tested     # no tester answered the last program
        self.done = False
        if outcome.valid:
            again = self.program is not None and outcome.action['program'] == self.program['program']
            self.done = again and alone
            self.program = outcome.action
        self.turn += alone
        self.tested = False

    def step_tester(self, outcome):
        if outcome.valid:
            self.done = outcome.action['passes']
            if not self.done:
                keys = ('input', 'printed', 'expected')
                self.failures.append({key: excerpt(outcome.action[key]) for key in keys})
        self.turn += 1
        self.tested = True

    def solution(self, role):
        """A test's is the last hidden one."""
        if role == 'coder':
            return fenced(self.problem['solution'])
        return write_test(self.problem['test_input'][-1], self.problem['test_output'][-1])

    def demonstration(self, role, draw):
        parts = self.problem['parts']
        if not parts:
            return None
        without = {**parts, 'condition': ''}
        if role == 'coder':
            if parts['condition']:
                chance = draw.random()
                if chance < P_NO_CONDITION:
                    parts = without
                elif chance < P_NO_CONDITION + P_WRONG_CONDITION:
                    parts = {**parts, 'condition': MISTAKEN[parts['condition']]}
            return fenced(solution_of(parts))
        numbers = [draw.randint(1, 12) for _ in range(draw.randint(1, 3))]
        if draw.random() < P_WRONG_OUTPUT:
            parts = without if parts['condition'] else {**parts, 'value': ''}
        return write_test(' '.join(map(str, numbers)), answer(parts, numbers))

    def view(self):
        lines = [self.problem['question']]
        if self.program:
            lines += ['-- program', self.program['program']]
        else:
            lines.append('-- no program yet')
        for failure in self.failures:
            lines.append(f'-- for {failure["input"]} printed {failure["printed"]}, a test expected '
                         f'{failure["expected"]}')
        if self.program:
            test = ' (passes its test)' if self.done else ''
            lines.append(f'-- hidden tests passed: {self.program["passed"]:.0%}{test}')
        return '\n'.join(lines)


def passes(run, expected):
    """Whether a program (its Result, None where it was not run) prints what is expected."""
    return run is not None and run.ok and same_output(run.stdout, expected)


def write_test(stdin, expected):
    """A test as the tester is to write it."""
    return f'**Test Input:**\n```\n{stdin}\n```\n**Test Output:**\n```\n{expected}\n```'


def parse_test(text):
    """(input, expected output) of the last test in a text, None without one or where the output is empty."""
    pattern = r'\*\*Test Input:\*\*\s*```[a-z]*\n(.*?)```\s*\*\*Test Output:\*\*\s*```[a-z]*\n(.*?)```'
    tests = re.findall(pattern, text, re.DOTALL)
    if not tests or not tests[-1][1].strip():
        return None
    stdin, expected = tests[-1]
    return stdin.strip('\n'), expected.strip('\n')
