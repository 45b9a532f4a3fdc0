"""Programming problems with tests on standard input and output, for a team: the coder writes a program, the tester a test.

The program is run on the test. Where they disagree both see how in the next turn; where the program passes, the episode ends. It
is a success if the program passes the hidden tests, all of them, so that agreeing on something wrong earns nothing. Expected outputs
stay out of the sandbox, and hidden tests out of every prompt.

Problems come from the files that scripts/dataprocess/load_code.py wrote, or from the generator here: Read numbers. Print the sum of
the squares of the even ones. What is computed belongs to one split, the wording too. The pupils of the team: the coder's leaves the
condition out of half of the programs, and mistakes it in a few; the tester's mistakes what its test should print in half of the tests.
"""
import functools
import random
import re

from configurator import UserError
from data.sandbox import run_many, same_output
from data.tasks.env import Outcome
from data.tasks.stored import builds, code_block, picked, problems_of, say, shown
from data.tasks.world import split_of

ROLES, ACTS = ('coder', 'tester'), 'coder'
RUNS_PROGRAMS = True
SETS = ('code_contests', 'apps', 'interview', 'livecodebench')
SETTINGS = {'dataset': (None, f'stems of data_dir/code/train, or for the held-out split of data_dir/code/test, several with +: '
                              f'{", ".join(SETS)} or a file of yours; code_contests where nothing is said'),
            'data_dir': ('datasets', 'where scripts/dataprocess/load_code.py put them'),
            'tests': (4, 'hidden tests of a training problem that count, at most; held-out problems keep all'),
            'timeout': (2.0, 'seconds that a program may run on one test'),
            'rules': (False, 'explain the task in a system message, for models that were not warmed up on it')}
RULES = {'coder': 'Write a Python program that solves the problem: it reads the input from standard input and prints the result, and '
                  'nothing else. Put it between ```python and ```. If a test is shown that your last program did not pass, find '
                  'out which of the two is wrong.',
         'tester': 'Write one test for the problem, not one of its examples: an input that may show a mistake in the program, and what '
                   'a right program prints for it. Write it as:\n**Test Input:**\n```\ninput\n```\n**Test Output:**\n```\noutput\n```'}
SHOWN = 3                           # failed tests in a prompt, the last ones
FORGETFUL, SLOPPY, WRONG = 0.5, 0.05, 0.5        # of the pupils' answers

CONDITIONS = {'': lambda n, k: True, 'even': lambda n, k: n % 2 == 0, 'odd': lambda n, k: n % 2 == 1,
              'more than {k}': lambda n, k: n > k, 'less than {k}': lambda n, k: n < k, 'not {k}': lambda n, k: n != k}
CONDITION_CODE = {'': '', 'even': 'n%2==0', 'odd': 'n%2==1', 'more than {k}': 'n>{k}', 'less than {k}': 'n<{k}', 'not {k}': 'n!={k}'}
SLIPS = {'even': 'odd', 'odd': 'even', 'more than {k}': 'less than {k}', 'less than {k}': 'more than {k}', 'not {k}': 'more than {k}'}
VALUES = {'': lambda n, c: n, 'squares': lambda n, c: n * n, 'doubles': lambda n, c: 2 * n, 'plus {c}': lambda n, c: n + c,
          'times {c}': lambda n, c: n * c}
VALUE_CODE = {'': 'n', 'squares': 'n*n', 'doubles': '2*n', 'plus {c}': 'n+{c}', 'times {c}': 'n*{c}'}
RESULTS = {'sum': sum, 'largest': max, 'smallest': min, 'last': lambda found: found[-1], 'first': lambda found: found[0]}
RESULT_CODE = {'sum': 'sum(x)', 'largest': 'max(x)', 'smallest': 'min(x)', 'last': 'x[-1]', 'first': 'x[0]'}
OPENINGS = ['Read numbers.', 'There are numbers on a line.', 'Numbers are given.', 'The line has numbers.', 'Read a line of numbers.']
TAKES = ['Take those that are {condition}.', 'Only those that are {condition} count.', 'Use the ones that are {condition}.',
         'Leave out what is not {condition}.']
TURNS = ['Write each as {value}.', 'Make each {value}.', 'Each becomes {value}.', 'Turn each into {value}.']
PRINTS = ['Print the {result}.', 'The answer is the {result}.', 'Show the {result}.', 'Find the {result}.']
VALUE_WORDS = {'squares': 'its square', 'doubles': 'its double', 'plus {c}': 'itself plus {c}', 'times {c}': 'itself times {c}'}


# ---- problems ---------------------------------------------------------------------------------------------------------------

def problems(split, n, seed, dataset=None, data_dir='datasets', tests=4, timeout=2.0, rules=False):
    """n problems {'question', 'examples', 'test_input', 'test_output', 'solution', 'parts', 'timeout', 'rules'} of a split: tests are
    texts, the solution is a program that passes them, parts what a generated problem is made of. Of a stored held-out set there may be
    fewer than n."""
    if tests < 1:
        raise UserError(f'env.tests={tests}: at least one test must count')
    dataset = dataset or 'code_contests'
    stored = stored_problems(split, dataset, data_dir)
    found = generated(split, n, f'{dataset}/{seed}') if stored is None else picked(stored, split, n, seed)
    last = tests if split == 'train' else None
    return [{**problem, 'test_input': problem['test_input'][:last], 'test_output': problem['test_output'][:last], 'timeout': timeout,
             'rules': rules} for problem in found]


@functools.lru_cache(maxsize=8)
def stored_problems(split, dataset, data_dir):
    """Without a solution no test can be judged, so training leaves such problems out."""
    found = problems_of('code', split, dataset, data_dir, SETS, from_row)
    kept = found and [problem for problem in found if problem['solution'] or split != 'train']
    if found and len(kept) < len(found):
        say(f'env.dataset={dataset}: {len(found) - len(kept)} of {len(found)} problems dropped: they have no solution to judge tests by')
    if found and not kept:
        raise UserError(f'env.dataset={dataset}: no problem has a solution')
    return kept


def from_row(row, where):
    """A stored row {'question', 'test_input', 'test_output', 'solution'} as a problem."""
    tests = row.get('test_input'), row.get('test_output')
    listed = all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in tests)
    if not isinstance(row.get('question'), str) or not listed or len(tests[0]) != len(tests[1]):
        raise UserError(f'{where}: a row has "question" (a text), "test_input" and "test_output" (lists of as many texts) and "solution" '
                        '(a program)')
    return {'question': row['question'], 'examples': row.get('examples') or [], 'test_input': tests[0], 'test_output': tests[1],
            'solution': row.get('solution') or '', 'parts': row.get('parts')}


def generated(split, n, seed):
    """n problems of the generator; what they compute and the wording belong to the split."""
    draw, found = random.Random(f'code/{split}/{seed}'), []
    while len(found) < n:
        parts = {'condition': draw.choice(list(CONDITIONS)), 'value': draw.choice(list(VALUES)), 'result': draw.choice(list(RESULTS)),
                 'k': draw.randint(3, 9), 'c': draw.randint(2, 9)}
        templates = [draw.choice(OPENINGS), *([draw.choice(TAKES)] if parts['condition'] else []),
                     *([draw.choice(TURNS)] if parts['value'] else []), draw.choice(PRINTS), 'If none is left, print 0.']
        if split_of(' '.join(templates), share=0.2) != split or split_of(solution_of(parts), share=0.2) != split:
            continue
        names = {'condition': parts['condition'].format(**parts), 'value': VALUE_WORDS.get(parts['value'], '').format(**parts),
                 'result': parts['result']}
        sentences = [template.format(**names) for template in templates]
        inputs = telling_inputs(parts, draw)
        outputs = [str(answer(parts, numbers)) for numbers in inputs]
        inputs = [' '.join(map(str, numbers)) for numbers in inputs]
        found.append({'question': ' '.join(sentences) + f' For {inputs[0]} it is {outputs[0]}.', 'examples': [[inputs[0], outputs[0]]],
                      'test_input': inputs[1:], 'test_output': outputs[1:], 'solution': solution_of(parts), 'parts': parts})
    return found


def answer(parts, numbers):
    """What a right program prints for a list of numbers."""
    kept = [VALUES[parts['value']](n, parts['c']) for n in numbers if CONDITIONS[parts['condition']](n, parts['k'])]
    return RESULTS[parts['result']](kept) if kept else 0


def telling_inputs(parts, draw):
    """The example and six hidden tests, all different. The first four tell the problem from its neighbours, which have another condition,
    another result or no value; no constant passes more than three of the six."""
    others = [{**parts, 'condition': condition} for condition in CONDITIONS if condition != parts['condition']]
    others += [{**parts, 'result': result} for result in RESULTS if result != parts['result']]
    others += [{**parts, 'value': ''}] * bool(parts['value'])
    while True:
        inputs = [[draw.randint(1, 12) for _ in range(draw.randint(3, 5))] for _ in range(7)]
        answers = [answer(parts, numbers) for numbers in inputs]
        if (len({str(numbers) for numbers in inputs}) == 7 and all(answers[1:].count(one) <= 3 for one in answers)
                and all(any(answer(other, numbers) != right for numbers, right in zip(inputs[1:5], answers[1:5])) for other in others)):
            return inputs


def solution_of(parts):
    """The program of these parts."""
    condition, value = (table[parts[key]].format(**parts) for table, key in ((CONDITION_CODE, 'condition'), (VALUE_CODE, 'value')))
    return (f'x=[{value} for n in map(int,input().split()){f" if {condition}" if condition else ""}]\n'
            f'print({RESULT_CODE[parts["result"]]} if x else 0)')


# ---- one episode ------------------------------------------------------------------------------------------------------------

class Env:
    """One episode. program: {'program', 'passed'}, the last one; failures: the tests that it or an earlier one did not pass."""
    roles = ROLES

    def __init__(self, problem):
        self.problem, self.turn, self.program, self.failures = problem, 0, None, []
        self.tested, self.done = True, False        # done: the program passes a test; or the coder, alone, repeats itself

    @property
    def success(self):
        return bool(self.program) and self.program['passed'] == 1.0

    def prompt(self, role):
        lines = [self.problem['question']]
        for one in self.failures[-SHOWN:]:
            lines.append(f'For the input {one["input"]} a program printed {one["printed"]}, but a test expected {one["expected"]}.')
        if self.program:
            lines += ['```python', shown(self.program['program'], 1500), '```']
        lines.append({'coder': 'Write a program.', 'tester': 'Write a test.'}[role])
        system = [{'role': 'system', 'content': RULES[role]}] * self.problem['rules']
        return system + [{'role': 'user', 'content': '\n'.join(lines)}]

    def score(self, role, text):
        """For a program the team earns the share of hidden tests that it passes, its writer 0.8 of that besides, and 0.1 each for one
        that compiles and one that ends well on all of them. For a test its writer earns 0.2 if it can be read and is none of the
        examples, and 0.8 if the reference solution passes it; the team 1 if it is right in that and tells a good program from a bad one:
        the present program passes it just when it passes the hidden ones (local rewards: Zhao et al. 2025)."""
        return self.score_many(role, [text])[0]

    def score_many(self, role, texts):
        """Outcomes of several candidates; equal programs are run once, different ones at the same time."""
        return self.score_programs(texts) if role == 'coder' else self.score_tests(texts)

    def run(self, jobs):
        """{(program, input): Run} of jobs of which some may be the same."""
        different = list(dict.fromkeys(jobs))
        return dict(zip(different, run_many(different, self.problem['timeout'])))

    def score_programs(self, texts):
        programs, inputs, outputs = [code_block(text) for text in texts], self.problem['test_input'], self.problem['test_output']
        ran = self.run([(code, stdin) for code in programs if code is not None for stdin in inputs])
        outcomes = []
        for code in programs:
            if code is None:
                outcomes.append(Outcome(0.0, 0.0, False, None, 'no program'))
                continue
            runs = [ran[code, stdin] for stdin in inputs]
            passed = sum(run.ok and same_output(run.stdout, wanted) for run, wanted in zip(runs, outputs)) / len(runs)
            failed = next((run.reason for run in runs if not run.ok), '')
            local = 0.1 * all(map(builds, runs)) + 0.1 * (not failed) + 0.8 * passed
            note = f'passes {passed:.0%} of the hidden tests' + (f': {shown(failed, 80)}' if failed else '')
            outcomes.append(Outcome(passed, local, True, {'program': code, 'passed': passed}, note))
        return outcomes

    def score_tests(self, texts):
        tests = [test_in(text) for text in texts]
        present = self.program['program'] if self.program else None
        examples = [stdin for stdin, _ in self.problem['examples']]
        ran = self.run([(code, stdin) for stdin, _ in filter(None, tests) for code in (self.problem['solution'], present) if code])
        outcomes = []
        for test in tests:
            if test is None or any(same_output(test[0], stdin) for stdin in examples):
                outcomes.append(Outcome(0.0, 0.0, False, None, 'no test' if test is None else 'an example, no test'))
                continue
            stdin, expected = test
            right, passes = (code is not None and ran[code, stdin].ok and same_output(ran[code, stdin].stdout, expected)
                             for code in (self.problem['solution'], present))
            run = ran.get((present, stdin))
            printed = 'nothing' if run is None else shown(run.stdout) or 'nothing' if run.ok else run.reason
            outcomes.append(Outcome(float(right and passes == self.success), 0.2 + 0.8 * right, True,
                                    {'input': stdin, 'expected': expected, 'printed': shown(printed), 'passes': passes},
                                    f'{"right" if right else "wrong"}, the program {"passes" if passes else "fails"}'))
        return outcomes

    def step(self, role, outcome):
        if role == 'coder':
            again = outcome.valid and self.program is not None and outcome.action['program'] == self.program['program']
            self.done = again and not self.tested      # no tester answered the last program: the coder plays alone
            self.turn += not self.tested
            self.program = outcome.action if outcome.valid else self.program
        elif outcome.valid:
            self.done = outcome.action['passes']
            self.failures += [] if self.done else [{key: shown(outcome.action[key]) for key in ('input', 'printed', 'expected')}]
        self.turn += role == 'tester'
        self.tested = role == 'tester'

    def solution(self, role):
        """A test's is the example of a hidden one."""
        if role == 'coder':
            return f'```python\n{self.problem["solution"]}\n```'
        return written(self.problem['test_input'][-1], self.problem['test_output'][-1])

    def demonstration(self, role, draw):
        parts = self.problem['parts']
        if not parts:
            raise UserError('env.dataset: only generated problems have demonstrations; leave the warm-up out, or data_dir empty')
        wrong = {**parts, 'condition': ''}
        if role == 'coder':
            if parts['condition'] and (chance := draw.random()) < FORGETFUL + SLOPPY:
                parts = wrong if chance < FORGETFUL else {**parts, 'condition': SLIPS[parts['condition']]}
            return f'```python\n{solution_of(parts)}\n```'
        numbers = [draw.randint(1, 12) for _ in range(draw.randint(1, 3))]
        if draw.random() < WRONG:
            parts = wrong if parts['condition'] else {**parts, 'value': ''}
        return written(' '.join(map(str, numbers)), answer(parts, numbers))

    def view(self):
        lines = [self.problem['question'], *(['-- program', self.program['program']] if self.program else ['-- no program yet'])]
        lines += [f'-- for {one["input"]} printed {one["printed"]}, a test expected {one["expected"]}' for one in self.failures]
        if self.program:
            lines.append(f'-- hidden tests passed: {self.program["passed"]:.0%}' + (' (passes its test)' if self.done else ''))
        return '\n'.join(lines)


def written(stdin, expected):
    """A test as the tester is to write it."""
    return f'**Test Input:**\n```\n{stdin}\n```\n**Test Output:**\n```\n{expected}\n```'


def test_in(text):
    """(input, expected output) of the last test in a text, None without one or where the output is empty."""
    found = re.findall(r'\*\*Test Input:\*\*\s*```[a-z]*\n(.*?)```\s*\*\*Test Output:\*\*\s*```[a-z]*\n(.*?)```', text, re.DOTALL)
    return (found[-1][0].strip('\n'), found[-1][1].strip('\n')) if found and found[-1][1].strip() else None
