"""What an environment for a team offers to train_agents.py: one file in data/tasks, found by its name.

A new environment is a file data/tasks/NAME.py with these names:

    class Env(problem)          one episode: plain Python, deterministic, copied by copy.deepcopy
    problems(split, n, seed, **settings)
                                n problems (dicts that JSON can hold) of 'train' or 'eval'; the two splits
                                share no problem, whatever the seeds (world.split_of decides by a hash)
    SETTINGS                    {name: (default, help)}: the env.* keys that problems() takes, typed by their
                                defaults (None: a number where it is one, else text). dataset gets
                                env.dataset or env.benchmark; rules (whether prompts explain the task and
                                the form of an answer) is true for every model but the embedded one
    ROLES                       the agents in the order of their turns
    ACTS                        the agent without whom nothing happens; alone it is a team of one
    DATASETS                    a tuple of more names of it in env.dataset and env.benchmark (may be left out)
    RUNS_PROGRAMS               True where programs of agents are run, in data/sandbox.py (may be left out)

and its Env has these (role is one of ROLES; text is what a model wrote, which is parsed and never evaluated):

    env.prompt(role)            the chat that the acting agent sees in the present state: a list of messages
    env.score(role, text)       Outcome: what this candidate would earn; the state stays as it is
    env.score_many(role, texts) the same for several, where a task can do that faster (may be left out)
    env.step(role, outcome)     carries out one of them: the next agent sees the new state
    env.done, env.success       whether the episode is over, and whether it was solved
    env.turn                    rounds of all roles so far, from 0
    env.view()                  the state as text for a terminal
    env.demonstration(role, draw)   (draw: random.Random)
                                the answer of a scripted noisy demonstrator, which the warm-up of the
                                embedded model learns; None where the problem has none
    env.solution(role)          a right answer in the present state
"""
import ast
import functools
import importlib
import itertools
import os
import random
import re
from dataclasses import dataclass
from typing import Any

from configurator import UserError, closest, convert, describe

FOLDER = os.path.dirname(os.path.abspath(__file__))
ATTEMPTS = 20       # problems that are looked at for a demonstration before giving up


@dataclass(frozen=True)
class Outcome:
    """What one candidate would earn, and what carrying it out would do."""
    team: float         # reward of the team as a whole, counted alpha times
    local: float        # reward of this agent alone: for its format, say
    valid: bool         # whether the text could be read as an action
    action: Any = None  # what step() carries out
    note: str = ''      # one line about it for people, or for the next prompt

    def reward(self, alpha=1.0):
        """alpha * team + local (Zhao et al. 2025, AT-GRPO)."""
        return alpha * self.team + self.local


@functools.cache
def known_tasks():
    """{name: DATASETS} of all environments: the files of data/tasks that define Env.

    The files are read, not imported, so that a script's --help answers at once.
    """
    tasks = {}
    for file in sorted(os.listdir(FOLDER)):
        name, suffix = os.path.splitext(file)
        if suffix != '.py':
            continue
        with open(os.path.join(FOLDER, file), encoding='utf-8') as source:
            text = source.read()
        if re.search(r'^class Env\b', text, re.MULTILINE):
            datasets = re.search(r'^DATASETS = (\(.*?\))', text, re.MULTILINE | re.DOTALL)
            tasks[name] = ast.literal_eval(datasets[1]) if datasets else ()
    return tasks


def load_task(name):
    """The module of an environment by the name of its file."""
    return importlib.import_module(f'data.tasks.{name}')


def find_task(name):
    """The module of the environment that a name means, by its file or its DATASETS; None where there is none.

    name: 'sudoku', or data sets as in 'polaris+gsm8k', of which the first decides; case does not matter.
    """
    wanted = name.partition('+')[0].casefold()
    for task, datasets in known_tasks().items():
        if wanted == task or wanted in map(str.casefold, datasets):
            return load_task(task)
    return None


def read_settings(task, given):
    """{name: value} of the env.* keys `given`, typed by the task's SETTINGS; UserError where it has no such
    setting, or it is of another type. What is given as None is left out."""
    name_of_task = task.__name__.rpartition('.')[2]
    settings = {}
    for name, value in given.items():
        if value is None or str(value).lower() in ('none', 'null', '~', ''):
            continue
        if name not in task.SETTINGS:
            known = ', '.join(f'env.{key}' for key in task.SETTINGS) or 'no settings of its own'
            near = closest(name, [*task.SETTINGS, 'name', 'dataset', 'benchmark', 'max_turns'])
            raise UserError(f'env.{name} means nothing to {name_of_task}, which knows {known}{near}')
        default, _ = task.SETTINGS[name]
        kind = int | float | str if default is None else type(default)
        try:
            settings[name] = convert(value, kind)
        except (ValueError, OverflowError):
            raise UserError(f"env.{name}: '{value}' is not {describe(kind)}") from None
    return settings


def demonstrations(task, turn_order, max_turns, seed, settings):
    """(role, messages) without end: what demonstrators answer in the situations that they get into. None
    where the first ATTEMPTS problems have none."""
    draw, found = random.Random(seed), False
    for number in itertools.count():
        problem, = task.problems('train', 1, f'{seed}/{number}', **settings)
        env = task.Env(problem)
        for _ in range(max_turns):
            for role in turn_order if not env.done else ():
                text, messages = env.demonstration(role, draw), env.prompt(role)
                if text is not None:
                    found = True
                    yield role, [*messages, {'role': 'assistant', 'content': text}]
                    env.step(role, env.score(role, text))
        if number + 1 == ATTEMPTS and not found:
            return


def list_settings():
    """(name, default, help) of the settings of all environments, for --help."""
    for name in known_tasks():
        for setting, (default, text) in load_task(name).SETTINGS.items():
            if setting not in ('dataset', 'rules'):     # flags of their own
                yield setting, default, f'{name}: {text}'


def needs_rules(path):
    """Whether the model of a path is to be told the rules in its prompts: any but the embedded one, and a
    team that an earlier run trained without."""
    from nanoforge.checkpoint import run_of     # here: it imports torch
    saved = run_of(path)
    if saved.get('script') == 'train_agents.py':
        return bool(saved['config']['env'].get('rules'))
    return path != 'tiny'


def chat(text, rules=None):
    """One message of the user; before it the rules, where given, as a system message."""
    user = {'role': 'user', 'content': text}
    return [user] if rules is None else [{'role': 'system', 'content': rules}, user]
