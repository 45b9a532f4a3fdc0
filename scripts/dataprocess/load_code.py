"""Programming problems for train_agents.py (env.dataset, env.benchmark):
datasets/code/{train,test}/NAME.jsonl

    python scripts/dataprocess/load_code.py
    python scripts/dataprocess/load_code.py --names code_contests interview --num_rows 2000

From the Hugging Face hub; where it does not answer (or with --offline), generated problems, in files called
NAME.generated.jsonl. A row has "question", "test_input" and "test_output" (lists of texts), "solution" (a
program that passes these tests, as the sandbox found; '' where there is none: such a problem is no training
problem), "examples" (tests that the question shows) and "source"; a generated one also "parts", what it is
made of. interview is the part of APPS of that difficulty. Problems that call a function, and LiveCodeBench's
hidden tests, which are pickled, are left out.
"""
import json
import sys

import store

from configurator import run_script
from data import sandbox
from data.tasks import code

TRAIN = ['code_contests', 'apps', 'interview']
TEST = ['code_contests', 'apps', 'interview', 'livecodebench']
TESTS, LONGEST = 20, 50_000         # of a problem at most; characters of one
TRIED = 3                           # solutions of a problem, the first ones
PYTHON3 = 3                         # in code_contests' column language


# ---- data sets of the hub: (question, tests, tests that the question shows, programs, name) of every problem

def code_contests(split):
    for row in store.hub('deepmind/code_contests', split=split, streaming=True):
        hidden = list(zip(row['private_tests']['input'], row['private_tests']['output']))
        shown = list(zip(row['public_tests']['input'], row['public_tests']['output']))
        solutions = zip(row['solutions']['language'], row['solutions']['solution'])
        programs = [text for language, text in solutions if language == PYTHON3]
        tests, examples = (hidden, shown) if hidden else (shown, [])
        yield row['description'], tests, examples, programs, 'deepmind/code_contests'


def apps(split, difficulty=None):
    for row in store.hub('codeparrot/apps', files=[f'{split}.jsonl'], streaming=True):
        if difficulty and row['difficulty'] != difficulty:
            continue
        try:
            tests = json.loads(row['input_output'] or '{}')
        except ValueError:                  # numbers of more digits than Python reads
            tests = {}
        inputs, outputs = tests.get('inputs', []), tests.get('outputs', [])
        if 'fn_name' in tests or not all(isinstance(text, str) for text in inputs + outputs):
            inputs, outputs = [], []        # a function is called
        programs = json.loads(row['solutions'] or '[]')
        yield row['question'], list(zip(inputs, outputs)), [], programs, 'codeparrot/apps'


def interview(split):
    return apps(split, 'interview')


def livecodebench(split):
    for row in store.hub('livecodebench/code_generation_lite', files=['test6.jsonl'], streaming=True):
        tests = []
        for test in json.loads(row['public_test_cases']):
            if test['testtype'] == 'stdin':
                tests.append((test['input'], test['output']))
        yield row['question_content'], tests, [], [], 'livecodebench/code_generation_lite'


SETS = {'code_contests': code_contests, 'apps': apps, 'interview': interview, 'livecodebench': livecodebench}


def rows_of(stem, split):
    """Rows of a hub data set with a solution that was run; what is dropped or has none is counted."""
    dropped, unsolved = 0, 0
    for question, tests, examples, programs, source in SETS[stem](split):
        tests = [test for test in tests if max(map(len, test)) <= LONGEST and test[1].strip()][:TESTS]
        if not question.strip() or not tests:
            dropped += 1
            continue
        inputs, outputs = map(list, zip(*tests))
        solution = first_that_passes(programs[:TRIED], inputs, outputs)
        unsolved += not solution
        yield {
            'question': question.strip(),
            'test_input': inputs,
            'test_output': outputs,
            'solution': solution,
            'examples': [list(test) for test in examples],
            'source': source,
        }
    print(f'{stem}: {dropped:,} problems dropped (no test on standard input and output), {unsolved:,} '
          'without a solution that passes')


def first_that_passes(programs, inputs, outputs):
    """The first program that passes all tests; '' where none does."""
    rates = sandbox.pass_rates([(program, inputs, outputs) for program in programs])
    for program, rate in zip(programs, rates):
        if rate == 1.0:
            return program
    return ''


def main(args):
    def generate(stem, split, n):
        return code.generated(split, n, f'{stem}/{args.seed}')

    from_hub = store.use_hub(args, 'code')
    if from_hub:
        sandbox.start(allow_weak=args.allow_weak_sandbox)
        if args.num_rows is None:
            print('all rows: hours, and some gigabytes for '
                  'code_contests; --num_rows=2000 takes minutes', file=sys.stderr)
    store.write_sets(args, 'code', {'train': TRAIN, 'test': TEST}, generate, rows_of if from_hub else None)


if __name__ == '__main__':
    run_script(main, store.arguments(__doc__, dict.fromkeys([*TRAIN, *TEST])))
