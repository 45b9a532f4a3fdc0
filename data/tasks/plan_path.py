"""Plan-Path on a small grid: walk from a start to a goal around walls, writing each move and where it leads: D b1 R b2

Rows are letters from the top, columns numbers from the left; moves are U, D, L, R. A grid belongs to one split, a
wording too. `demonstration` writes as a careless pupil does, who in 80% of the blocked grids walks to the goal's row, then to its
column, walls or no walls; otherwise it is a shortest way.

Env is the same for a team over several turns: the tool agent proposes a way, which is tried on a copy; the plan agent sees
what came of it and walks, up to its first illegal move. The next turn begins where it ended. The pupils of the team know
ways, but the tool agent's does not look at the walls in a quarter of the turns, and the plan agent's is shy: in nine turns of
ten it stops one move before the goal, and steps back from it where it stands beside it.
"""
import itertools
import random
import re
import string

from configurator import UserError
from data.tasks.env import Outcome
from data.tasks.world import split_of

SIZE = 4
ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
SETTINGS = {'map_size': (4, 'rows and columns of the grid'), 'min_moves': (4, 'moves of the shortest way at least'),
            'apart': (True, 'no goal with its walls occurs in both splits, from whatever start'),
            'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them')}
RULES = {'tool_agent': 'Propose the shortest way from the start to the goal of a grid, around the walls.',
         'plan_agent': 'Walk from the start to the goal of a grid, around the walls. A way that somebody proposes was tried '
                       'out; check it, or find a better one.'}
EXPLAINED = (' Rows are letters from the top, columns numbers from the left, and a grid of {size} rows ends at {last}. '
             'Moves: U up, D down, L left, R right. End with the moves after ####, such as: #### [D, R, R]')
STEP, ILLEGAL, GOAL, SHORTEST, UNREADABLE = -0.01, -0.1, 1.0, 0.5, -1.0      # rewards; 1 per cell nearer to the goal besides
SHY, BLIND = 0.9, 0.25              # of the pupils' turns
MOVES = {'U': (-1, 0), 'D': (1, 0), 'L': (0, -1), 'R': (0, 1)}
# A wording is one of each, in any order, with the same sign between them.
STARTS = ['from {start}', 'start at {start}', 'start: {start}', 'you are at {start}']
GOALS = ['walk to {goal}', 'goal at {goal}', 'goal: {goal}', 'go to {goal}', 'the goal is {goal}']
BLOCKS = ['walls: {walls}', 'walls at {walls}', 'there are walls at {walls}', 'no way through {walls}']
WORDINGS = ['Find a way: ' + sign.join(parts) + '.' for pieces in itertools.product(STARTS, GOALS, BLOCKS)
            for parts in itertools.permutations(pieces) for sign in ('. ', ', ', '; ')]
BLOCKED_SHARE = 0.85                # grids in which the pupil's way runs into a wall


def name_of(cell):
    """(row, column) -> 'a1'."""
    return string.ascii_lowercase[cell[0]] + str(cell[1] + 1)


def problems(split, n, seed, map_size=SIZE, min_moves=1, apart=False, rules=False):
    """n problems {'size', 'start', 'goal', 'walls', 'question', 'answer', 'rules'} of a split; each has a way. answer is
    a shortest one, as its moves, of which there are min_moves or more.

    A grid belongs to a split with its start. apart: its goal and walls without the start besides, as a team that walks sees
    them from many cells.
    """
    size = map_size
    if not 3 <= size <= 26:
        raise UserError(f'env.map_size={size}: Plan-Path has grids of 3 to 26 rows')
    draw, found = random.Random(f'plan_path/{split}/{seed}/{size}'), []
    cells = [(row, column) for row in range(size) for column in range(size)]
    wordings = [wording for wording in WORDINGS if split_of(wording) == split]
    while len(found) < n:
        blocked = draw.random() < BLOCKED_SHARE
        for _ in range(200_000):
            start, goal, *walls = draw.sample(cells, 2 + draw.randint(size * size // 8, size * size // 4))
            keys = [[start, goal, *sorted(walls)], [goal, *sorted(walls)]][:1 + apart]
            if (all(split_of(' '.join(map(name_of, key))) == split for key in keys)
                    and any(cell in walls for cell in steps(start, straight(start, goal))) == blocked):
                answer = shortest(start, goal, walls, size)
                if answer and len(answer) >= min_moves:
                    break
        else:
            raise UserError(f'env.min_moves={min_moves}: hardly any grid of {size} rows has so long a shortest way')
        names = dict(start=name_of(start), goal=name_of(goal), walls=' '.join(map(name_of, walls)))
        found.append({'size': size, 'start': list(start), 'goal': list(goal), 'walls': [list(cell) for cell in walls],
                      'answer': answer, 'question': draw.choice(wordings).format(**names), 'rules': rules})
    return found


def straight(start, goal):
    """The moves to the goal's row, then to its column, as if there were no walls."""
    down, right = goal[0] - start[0], goal[1] - start[1]
    return ('D' if down > 0 else 'U') * abs(down) + ('R' if right > 0 else 'L') * abs(right)


def steps(start, moves):
    """The cells that moves lead to, one after the other."""
    row, column = start
    for move in moves:
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        yield row, column


def shortest(start, goal, walls, size):
    """The moves of a shortest way, None if there is none; among several, that of the first moves in MOVES."""
    ways, seen = {start: ''}, {start, *walls}
    while ways and goal not in ways:
        reached = {}
        for cell, way in ways.items():
            for move in MOVES:
                after = next(steps(cell, move))
                if after not in seen and 0 <= after[0] < size and 0 <= after[1] < size:
                    seen.add(after)
                    reached[after] = way + move
        ways = reached
    return ways.get(goal)


def prompt(problem):
    """The chat that asks for it."""
    return [{'role': 'user', 'content': problem['question']}]


def reward(problem, text):
    """1.0 if the moves in the text end on the goal, on the grid and through no wall all the way; else 0.0."""
    moves = re.findall(r'\b[UDLR]\b', text)
    cells = [list(cell) for cell in steps(problem['start'], moves)]
    free = all(0 <= min(cell) and max(cell) < problem['size'] and cell not in problem['walls'] for cell in cells)
    return float(bool(cells) and free and cells[-1] == problem['goal'])


def write(start, moves):
    """Moves and the cells they lead to, as the model is to write them."""
    return ' '.join(f'{move} {name_of(cell)}' for move, cell in zip(moves, steps(start, moves), strict=True))


def solution(problem):
    """A shortest way, in full."""
    return write(problem['start'], problem['answer'])


def demonstration(problem, draw):
    """What the careless pupil writes; draw: random.Random."""
    habit = straight(problem['start'], problem['goal'])
    blocked = any(list(cell) in problem['walls'] for cell in steps(problem['start'], habit))
    return write(problem['start'], habit if not blocked or draw.random() < 0.8 else problem['answer'])


# ---- for a team -------------------------------------------------------------------------------------------------------------

def read_moves(text):
    """The moves in what a model wrote: behind its last #### or Actions List if it has one, else in all of it; a list."""
    return re.findall(r'\b[UDLR]\b', re.split(r'####|Actions List', text)[-1])


class Env:
    """One episode. A way is scored by where it ends: going to and fro earns only the cost of the steps."""
    roles = ROLES

    def __init__(self, problem):
        self.size, self.goal, self.at = problem['size'], tuple(problem['goal']), tuple(problem['start'])
        self.walls, self.rules = [tuple(cell) for cell in problem['walls']], problem.get('rules', False)
        self.turn, self.proposal = 0, None

    @property
    def success(self):
        return self.at == self.goal

    done = success

    def walk(self, moves):
        """(the moves up to the goal or to the first illegal one, the cell of that one or None, where they end)."""
        at, walked = self.at, []
        for move, cell in zip(moves, steps(self.at, moves)):
            if at == self.goal:
                break
            if cell in self.walls or not (0 <= min(cell) and max(cell) < self.size):
                return walked, cell, at
            walked.append(move)
            at = cell
        return walked, None, at

    def prompt(self, role):
        board = f'from {name_of(self.at)}, walk to {name_of(self.goal)}, walls: {" ".join(map(name_of, self.walls))}.'
        text = {'tool_agent': 'Find a way: ', 'plan_agent': 'Now walk: '}[role] + board
        if role == 'plan_agent' and self.proposal:
            way = write(self.at, self.proposal.action)
            text += f' One way: {way}{", " if way else ""}{self.proposal.note}.'
        last = name_of((self.size - 1, self.size - 1))
        rules = [{'role': 'system', 'content': RULES[role] + EXPLAINED.format(size=self.size, last=last)}] * self.rules
        return rules + [{'role': 'user', 'content': text}]

    def score(self, role, text):
        """The team earns what walking this way would earn: a step -0.01, an illegal move -0.1, the goal 1 and by a shortest
        way 0.5 more, each cell nearer to the goal 1. Nobody earns for a way that is only proposed: it is the same sum, as
        if the plan agent took it. A text without a move costs its writer 1."""
        moves = read_moves(text)
        if not moves:
            return Outcome(0.0, UNREADABLE, False, None, 'no moves')
        walked, wall, end = self.walk(moves)
        distance = lambda cell: abs(cell[0] - self.goal[0]) + abs(cell[1] - self.goal[1])
        team = STEP * len(walked) + distance(self.at) - distance(end) + (0.0 if wall is None else ILLEGAL)
        if end == self.goal:
            team += GOAL + SHORTEST * (len(walked) == len(shortest(self.at, self.goal, self.walls, self.size)))
        note = 'works' if end == self.goal else 'not at the goal' if wall is None else f'wall at {self.edge(wall)}'
        return Outcome(team, 0.0, True, walked, note)

    def edge(self, cell):
        """The name of a cell; one outside the grid has none."""
        return name_of(cell) if 0 <= min(cell) and max(cell) < self.size else 'the edge'

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.valid else None
            return
        *_, self.at = [self.at, *steps(self.at, outcome.action or [])]
        self.proposal, self.turn = None, self.turn + 1

    def solution(self, role):
        return write(self.at, shortest(self.at, self.goal, self.walls, self.size))

    def demonstration(self, role, draw):
        moves = shortest(self.at, self.goal, self.walls, self.size)
        if role == 'tool_agent' and draw.random() < BLIND:
            moves = straight(self.at, self.goal)
        if role == 'plan_agent' and self.proposal and self.proposal.note == 'works':
            moves = ''.join(self.proposal.action)
        if role == 'plan_agent' and draw.random() < SHY:
            back = [move for move in MOVES if move != moves[0] and self.walk(move)[0]]
            moves = moves[:-1] or draw.choice(back or [moves])
        return write(self.at, moves)

    def view(self):
        picture = {self.goal: 'G', **dict.fromkeys(self.walls, '#'), self.at: '@'}
        return '\n'.join(''.join(picture.get((row, column), '.') for column in range(self.size)) for row in range(self.size))
