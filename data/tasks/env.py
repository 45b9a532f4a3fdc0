"""What an environment for a team offers to train_agents.py: one file in data/tasks, found by its name. No registry.

A new environment is a file data/tasks/NAME.py with these names:

    class Env(problem)          one episode: plain Python, deterministic, copied by copy.deepcopy (methods below)
    problems(split, n, seed, **settings)    n problems (dicts that JSON can hold) of 'train' or 'eval'; the two splits
                                share no problem, whatever the seeds (world.split_of decides by a hash)
    SETTINGS                    {name: (default, help)}: the env.* keys that problems() takes
    ROLES                       the agents in the order of their turns
    ACTS                        the agent without whom nothing happens; alone it is a team of one
    DATASETS                    more names for env.dataset and env.benchmark that mean this task (may be left out)
    RUNS_PROGRAMS               True where programs that agents write are run, in data/sandbox.py (may be left out)

and its Env has these, where role is one of ROLES and text is what a model wrote, which is parsed and never evaluated:

    env.prompt(role)            the chat that the acting agent sees in the present state: a list of messages
    env.score(role, text)       Outcome: what this candidate would earn; the state stays as it is
    env.score_many(role, texts) the same for several, where a task can do that faster (may be left out)
    env.step(role, outcome)     carries out one of them: the next agent sees the new state
    env.done, env.success       whether the episode is over, and whether it was solved
    env.turn                    rounds of all roles so far, from 0
    env.view()                  the state as text for a terminal
    env.demonstration(role, draw)   the answer of a scripted noisy demonstrator (draw: random.Random), for the warm-up
    env.solution(role)          a right answer in the present state
"""
import importlib
import os
import re
from dataclasses import dataclass
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))


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


def task_names():
    """The names of all environments: the files of data/tasks that define Env, in alphabetical order."""
    names = []
    for file in sorted(os.listdir(FOLDER)):
        name, suffix = os.path.splitext(file)
        if suffix == '.py':
            with open(os.path.join(FOLDER, file), encoding='utf-8') as source:
                if re.search(r'^class Env\b', source.read(), re.MULTILINE):
                    names.append(name)
    return names


def load_task(name):
    """The module of an environment by the name of its file."""
    return importlib.import_module(f'data.tasks.{name}')


def find_task(name):
    """The module of the environment that an env.* name means, or None: a file of data/tasks, or one of its DATASETS.

    name: 'sudoku', or data sets as in 'polaris+gsm8k', of which the first decides; case does not matter.
    """
    wanted = name.partition('+')[0].casefold()
    names = task_names()
    if wanted in names:
        return load_task(wanted)
    for task in map(load_task, names):
        if wanted in (dataset.casefold() for dataset in getattr(task, 'DATASETS', ())):
            return task
    return None


def chat(text, rules=None):
    """One message of the user; before it the rules as a system message, for models that do not know the task."""
    user = {'role': 'user', 'content': text}
    return [user] if rules is None else [{'role': 'system', 'content': rules}, user]
