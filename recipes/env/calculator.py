"""Sums with a calculator that must be called: an environment for train_rl.py, and transcripts to begin with.

    python recipes/env/calculator.py 400 > calls.jsonl
    python train_sft.py --dataset_path=calls.jsonl --loss_on=assistant --output_dir=models/calls
    python train_rl.py --env=recipes/env/calculator.py:Env --model=models/calls --max_steps=30 \
        --gradient_accumulation_steps=1

The embedded model works sums out in its head, carelessly, and has never called a calculator. The transcripts
teach it the form, carelessly too: most of them do without a call, and some call with a number misread. What
pays is left to the reward: 1 for the right answer, if a call was made before it.
"""
import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.chat import parse_tool_calls
from data.tasks import arithmetic

TOOL = {'name': 'add', 'description': 'Add two numbers.', 'parameters': {
    'type': 'object', 'properties': {'a': {'type': 'integer'}, 'b': {'type': 'integer'}},
    'required': ['a', 'b']}}
P_CALL = 0.3            # transcripts with a call
P_MISREAD = 0.3         # of which one number is another


class Env:
    """One sum: calls are answered, and what is said without one is the answer."""
    tools = [TOOL]

    def reset(self, problem):
        self.problem, self.has_called = problem, False
        return arithmetic.prompt(problem)

    def step(self, text):
        try:
            calls = parse_tool_calls(text)
            results = [str(call['arguments']['a'] + call['arguments']['b']) for call in calls]
        except (ValueError, KeyError, TypeError) as error:          # a model wrote it
            return [{'role': 'tool', 'content': f'error: {error}'[:60]}], 0.0, False
        if not calls:
            return [], float(self.has_called and arithmetic.reward(self.problem, text)), True
        self.has_called = True
        return [{'role': 'tool', 'content': result} for result in results], 0.0, False


def transcript(problem, draw):
    """Messages of a careless demonstrator; draw: random.Random."""
    messages = arithmetic.prompt(problem)
    if draw.random() >= P_CALL:
        return [*messages, {'role': 'assistant', 'content': arithmetic.demonstration(problem, draw)}]
    a, b = problem['a'], problem['b']
    if draw.random() < P_MISREAD:
        a = draw.randint(1, 99)
    call = {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': a, 'b': b}}}
    return [*messages, {'role': 'assistant', 'content': '', 'tool_calls': [call]},
            {'role': 'tool', 'content': str(a + b)},
            {'role': 'assistant', 'content': f'<answer>{a + b}</answer>'}]


if __name__ == '__main__':
    draw = random.Random(0)
    for problem in arithmetic.problems('train', int(sys.argv[1]), 'transcripts'):
        print(json.dumps({'messages': transcript(problem, draw), 'tools': Env.tools}))
