"""A user's environment, path.py:Env, in a process of its own: what answers the turns of a policy.

    class Env:                          # an object for each episode, with its own state
        tools = [...]                   # JSON schemas for the chat template; may be left out
        def reset(self, problem):       # a row, with its question and answer: the prompt, a list of messages
        def step(self, text):           # what the policy said -> (messages, reward, done): what is said back
                                        # (role tool or user), a number, whether the episode is over

text is what a model wrote: it is for parsing, never for eval. Rewards are summed over the turns; None is no
score. Where a method raises or takes too long, its episode is unscored, and counted. Written with `async def`
the methods of many episodes run side by side. torch is not imported.
"""
import json
import os

from configurator import UserError
from data.chat import prompt_ids
from data.rewards import MAX_HANGS, Server

PROCESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'environment_process.py')
GRACE = 1.0                 # seconds in which an async method that is out of time may end


class Environment(Server):
    """Episodes of path.py:Env. A move is a problem (reset) or a text (step); its answer is [messages, reward,
    done], or None where it failed (last_error says why).

    The process is killed where a move hangs, and the other episodes are played again: one that then goes
    another way is given up, too.
    """
    flag, script, kind = 'env', PROCESS, 'class'

    def __init__(self, name, timeout, concurrency=32):
        self.played, self.begins = {}, False    # {episode that runs: [(move, answer), ...]}
        super().__init__(name, timeout, concurrency)

    def start(self):
        self.tools = super().start()['tools']

    def begin(self, problems):
        """New episodes 0, 1, ... of these problems, in place of those before -> a list of answers."""
        self.played, self.begins = {episode: [] for episode in range(len(problems))}, True
        answers = self.step(dict(enumerate(problems)))
        return [answers[episode] for episode in range(len(problems))]

    def encoded(self, encode, *arguments):
        """encode(*arguments), of which a UserError says whose messages it is about."""
        try:
            return encode(*arguments)
        except UserError as error:
            raise UserError(f'env: {self.name}: {error}') from None

    def prompts(self, tokenizer, problems):
        """The prompt ids of some problems, None where reset failed; UserError where it did for all."""
        answers = self.begin(problems)
        if not any(answers):
            raise UserError(f'env: {self.name}: reset failed for each of {len(problems)} problems: '
                            f'{self.last_error}')
        return [answer and self.encoded(prompt_ids, tokenizer, answer[0], self.tools) for answer in answers]

    def step(self, moves):
        """{episode: what the policy said} -> {episode: answer}, by as many processes as it takes."""
        answers, left, hangs = {}, dict(moves), 0
        while left:
            if self.process is None:
                self.start()
                answers.update(dict.fromkeys(self.play_again()))
            else:
                made = self.exchange(left)
                for episode, answer in made.items():
                    self.played[episode].append((left[episode], answer))
                answers.update(made)
                if len(made) < len(left):           # made in their order: the first that is left is at fault
                    failed = [episode for episode in left if episode not in made]
                    hangs += 1
                    answers.update(dict.fromkeys(failed[:1] if hangs < MAX_HANGS else failed))
            left = {episode: move for episode, move in left.items() if episode not in answers}
            for episode, answer in answers.items():
                if answer is None or answer[2]:
                    self.played.pop(episode, None)
        return {episode: answers[episode] for episode in moves}

    def play_again(self):
        """Brings a new process to where the last one was; returns the episodes that cannot be."""
        lost = set()
        for turn in range(max(map(len, self.played.values()), default=0)):
            known = {episode: moves[turn] for episode, moves in self.played.items()
                     if turn < len(moves) and episode not in lost}
            again = self.exchange({episode: move for episode, (move, _) in known.items()})
            lost |= {episode for episode, (_, answer) in known.items() if again.get(episode) != answer}
        if lost:
            self.last_error = 'another episode ended the process, and played again this one went another way'
        return lost

    def exchange(self, moves):
        """{episode: move} -> {episode: answer} of those that were made before one hung."""
        answers = {}
        if not moves or self.process is None:
            return answers
        begins, self.begins = self.begins, False
        try:
            self.process.stdin.write(json.dumps({'begin': begins, 'moves': list(moves.items())}) + '\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass                            # it has ended: there is nothing to read, either
        while len(answers) < len(moves):
            line = self.read(self.timeout + GRACE)
            if line is None:
                self.stop()
                self.last_error = f'no answer within {self.timeout:g} s (env_timeout), or its process ended'
                break
            if 'error' in line:
                self.stop()
                raise UserError(f'env: {self.name}: {line["error"]}')
            self.last_error = line.get('raised') or line.get('trouble') or self.last_error
            answers[line['episode']] = line.get('answer')
        return answers
