"""What a task for a team offers to train_agents.py. A module in data/tasks is one when it has these names:

    problems(split, n, seed, **settings)    n problems (JSON-able dicts) of 'train' or 'eval', disjoint whatever the seeds
    SETTINGS                                {name: (default, what it means)}: the env.* keys that problems() takes
    ROLES                                   the agents in turn order
    ACTS                                    the agent without whom nothing happens: alone it is a team of one
    RUNS_PROGRAMS                           True where programs that agents write are run, in data/sandbox.py (may be left out)
    Env(problem)                            one episode: plain Python, deterministic, copied by copy.deepcopy
        env.prompt(role)                    the chat that the acting agent sees in the present state
        env.score(role, text) -> Outcome    what a candidate would earn; the state stays as it is
        env.score_many(role, texts)         the same for several, where a task can do that faster (programs in the sandbox)
        env.step(role, outcome)             executes one: the next agent sees the new state
        env.done, env.success, env.turn     turn counts rounds of all roles, from 0
        env.view()                          the state for a terminal
        env.demonstration(role, draw)       what a careless pupil answers (draw: random.Random): the warm-up learns it
        env.solution(role)                  what is right in the present state

A text that a model wrote is parsed, never evaluated.
"""
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What one candidate would earn, and what executing it would do."""
    team: float         # what the team as a whole gets, counted alpha times
    local: float        # what only this agent gets: for its format, say
    valid: bool         # whether the text could be read as an action
    action: Any = None  # what step() executes
    note: str = ''      # one line about it for people, or for the next prompt

    def reward(self, alpha=1.0):
        """alpha * team + local (Zhao et al. 2025, AT-GRPO)."""
        return alpha * self.team + self.local
