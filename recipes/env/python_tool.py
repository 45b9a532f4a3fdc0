"""Problems that may be worked out by programs: an environment for train_rl.py whose tool runs Python.

    python train_rl.py --env=recipes/env/python_tool.py:Env --dataset_path problems.jsonl --model=DIRECTORY

A program runs in data/sandbox.py, without network and files, and what it prints is said back. What is said
without a call is the answer: 1 where it is the row's, as the reward `exact` judges.
"""
import asyncio

from data.answers import extract_answer, same_answer
from data.chat import parse_tool_calls
from data.sandbox import run_python, start

SYSTEM = 'Programs that you run may help. Write the answer, and nothing else, between <answer> and </answer>.'
TOOL = {'name': 'python', 'description': 'Run a Python program and get what it prints.', 'parameters': {
    'type': 'object', 'properties': {'code': {'type': 'string'}}, 'required': ['code']}}
SECONDS, CHARACTERS = 3.0, 1000         # of a program; of what it prints
PROGRAMS = 2        # of a turn: more that hang would outlast env_timeout, and the episode have no score

start()         # where the sandbox cannot run, this is said before the first step


class Env:
    """One problem; programs of several episodes run side by side."""
    tools = [TOOL]

    def reset(self, problem):
        self.answer = extract_answer(problem['answer'])
        return [{'role': 'system', 'content': SYSTEM}, {'role': 'user', 'content': problem['question']}]

    async def step(self, text):
        try:
            programs = [call['arguments']['code'] for call in parse_tool_calls(text)]
            if len(programs) > PROGRAMS:
                raise ValueError(f'{PROGRAMS} programs at most')
        except (ValueError, KeyError) as error:                     # a model wrote it
            return [{'role': 'tool', 'content': f'error: {error}'[:CHARACTERS]}], 0.0, False
        if not programs:
            return [], float(same_answer(extract_answer(text), self.answer)), True
        messages = []
        for code in programs:
            result = await asyncio.to_thread(run_python, str(code), '', SECONDS)
            printed = result.stdout[:CHARACTERS] + result.reason
            messages.append({'role': 'tool', 'content': printed or 'nothing was printed'})
        return messages, 0.0, False
