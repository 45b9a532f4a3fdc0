"""Plan-Path: walk from a start to a goal around walls, writing each move and where it leads: D b1 R b2

Rows are letters from the top, columns numbers from the left; the moves are U, D, L and R. Each grid belongs
to one split, and so does each wording. `demonstration` is a scripted noisy demonstrator: in P_GO_STRAIGHT of
the grids where the straight way (to the goal's row, then to its column) is blocked it walks that way all the
same; else a shortest one.

Env is the same grid for a team over several turns. The tool agent proposes a way, which is tried on a copy;
the plan agent sees the result and walks, up to its first illegal move. The next turn starts where it ended.
The demonstrator of the tool agent ignores the walls with probability P_IGNORE_WALLS; that of the plan agent
stops one move before the goal with probability P_STOP_EARLY, and steps back where it stands beside the goal.
"""
import itertools
import random
import re
import string

from configurator import UserError
from data.tasks.env import Outcome, chat
from data.tasks.stored import PUZZLE_SETTINGS, puzzle_of, stored_puzzles
from data.tasks.world import lines, split_of

ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
SETTINGS = {
    'map_size': (4, 'rows and columns of the grid'),
    'min_moves': (4, 'moves of the shortest way at least'),
    'apart': (True, 'no goal with its walls occurs in both splits, from whatever start'),
    **PUZZLE_SETTINGS,
    'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them'),
}
RULES = {
    'tool_agent': 'Propose the shortest way from the start to the goal of a grid, around the walls.',
    'plan_agent': 'Walk from the start to the goal of a grid, around the walls. If a way is proposed, it was '
                  'tried out: check it, or find a better one. It is written as its moves, each with the cell '
                  'that it leads to.',
}
EXPLAINED = (' Rows are letters from the top, columns numbers from the left, and a grid of {size} rows ends '
             'at {last}. Moves: U up, D down, L left, R right. End with the '
             'moves after ####, such as: #### [D, R, R]')
# rewards; besides them 1 for each cell that the way leads nearer to the goal
STEP = -0.01
ILLEGAL = -0.1
GOAL = 1.0
SHORTEST = 0.5
UNREADABLE = -1.0
# mistakes of the demonstrators
P_GO_STRAIGHT = 0.8
P_IGNORE_WALLS = 0.25
P_STOP_EARLY = 0.9

MOVES = {'U': (-1, 0), 'D': (1, 0), 'L': (0, -1), 'R': (0, 1)}
BLOCKED_SHARE = 0.85            # of the problems: the straight way runs into a wall
ATTEMPTS = 200_000              # grids drawn for one problem before giving up
# A wording is one of each, in any order, with the same sign between them.
STARTS = lines('''
    from {start}
    start at {start}
    start: {start}
    you are at {start}
''')
GOALS = lines('''
    walk to {goal}
    goal at {goal}
    goal: {goal}
    go to {goal}
    the goal is {goal}
''')
BLOCKS = lines('''
    walls: {walls}
    walls at {walls}
    there are walls at {walls}
    no way through {walls}
''')
WORDINGS = []
for pieces in itertools.product(STARTS, GOALS, BLOCKS):
    for ordered in itertools.permutations(pieces):
        WORDINGS += ['Find a way: ' + sign.join(ordered) + '.' for sign in ('. ', ', ', '; ')]


# ---- cells and moves, which sokoban.py uses too

def grid_cells(size):
    """All cells (row, column) of a square grid, row by row."""
    return list(itertools.product(range(size), repeat=2))


def name_of(cell):
    """(row, column) -> 'a1'."""
    row, column = cell
    return string.ascii_lowercase[row] + str(column + 1)


def names_of(cells):
    return ' '.join(map(name_of, cells))


def in_grid(cell, size):
    return min(cell) >= 0 and max(cell) < size


def distance(a, b):
    """Moves from one cell to another if there were no walls."""
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def straight(start, goal):
    """The moves to the goal's row, then to its column, as if there were no walls."""
    down, right = goal[0] - start[0], goal[1] - start[1]
    vertical = 'D' if down > 0 else 'U'
    horizontal = 'R' if right > 0 else 'L'
    return vertical * abs(down) + horizontal * abs(right)


def read_moves(text):
    """The moves in a text, as a list: those after its last #### or Actions List, where it has one."""
    return re.findall(r'\b[UDLR]\b', re.split(r'####|Actions List', text)[-1])


def proposal_text(way, note):
    """What the plan agent reads of the tool agent's proposal."""
    return f' One way: {way}, {note}.' if way else f' One way: {note}.'


def draw_map(cells, size):
    """{cell: sign} as lines of text, '.' where there is no sign."""
    rows = [''.join(cells.get((row, column), '.') for column in range(size)) for row in range(size)]
    return '\n'.join(rows)


def steps(start, moves):
    """The cells that moves lead to, one after the other."""
    row, column = start
    for move in moves:
        down, right = MOVES[move]
        row, column = row + down, column + right
        yield row, column


def shortest(start, goal, walls, size):
    """The moves of a shortest way, None if there is none; among several, that of the first moves in MOVES."""
    ways = {start: ''}
    seen = {start, *walls}
    while ways and goal not in ways:
        reached = {}
        for cell, way in ways.items():
            for move in MOVES:
                after = next(steps(cell, move))
                if after not in seen and in_grid(after, size):
                    seen.add(after)
                    reached[after] = way + move
        ways = reached
    return ways.get(goal)


# ---- problems

def problems(split, n, seed, map_size=4, min_moves=1, apart=False, rules=False, dataset=None,
             data_dir=None):
    """n problems {'size', 'start', 'goal', 'walls', 'answer', 'question', 'rules'} of a split.

    answer is a shortest way, as its moves, of which there are min_moves or more. A grid with its start
    belongs to one split. apart: so does its goal with the walls alone, as a team that walks sees them from
    many cells.
    """
    if not 3 <= map_size <= 26:
        raise UserError(f'env.map_size={map_size}: Plan-Path has grids of 3 to 26 rows')

    def fits(puzzle):
        return puzzle['size'] == map_size and len(puzzle['answer']) >= min_moves

    if stored := stored_puzzles(('plan_path',), from_row, fits, split, n, seed, dataset, data_dir):
        return [{**puzzle, 'rules': rules} for puzzle in stored]
    draw = random.Random(f'plan_path/{split}/{seed}/{map_size}')
    wordings = [wording for wording in WORDINGS if split_of(wording) == split]
    made = []
    while len(made) < n:
        start, goal, walls, answer = draw_grid(draw, split, map_size, min_moves, apart)
        wording = draw.choice(wordings)
        made.append({
            'size': map_size,
            'start': list(start),
            'goal': list(goal),
            'walls': [list(cell) for cell in walls],
            'answer': answer,
            'question': wording.format(start=name_of(start), goal=name_of(goal), walls=names_of(walls)),
            'rules': rules,
        })
    return made


def from_row(row, where):
    """A stored row {'question', 'problem'} as a problem."""
    return puzzle_of(row, where, Env, ('size', 'start', 'goal', 'walls', 'answer'))


def draw_grid(draw, split, size, min_moves, apart):
    """(start, goal, walls, moves of a shortest way) of a grid that belongs to the split."""
    blocked = draw.random() < BLOCKED_SHARE
    cells = grid_cells(size)
    for _ in range(ATTEMPTS):
        num_walls = draw.randint(size * size // 8, size * size // 4)
        start, goal, *walls = draw.sample(cells, 2 + num_walls)
        without_start = [goal, *sorted(walls)]
        keys = [[start, *without_start]]
        if apart:
            keys.append(without_start)
        if any(split_of(names_of(key)) != split for key in keys):
            continue
        if any(cell in walls for cell in steps(start, straight(start, goal))) != blocked:
            continue
        answer = shortest(start, goal, walls, size)
        if answer and len(answer) >= min_moves:
            return start, goal, walls, answer
    raise UserError(f'env.min_moves={min_moves}: hardly any grid of {size} rows has so long a shortest way')


def prompt(problem):
    """The chat that asks for the way."""
    return chat(problem['question'])


def reward(problem, text):
    """1.0 if the moves in the text stay on the grid, go through no wall and end on the goal; else 0.0."""
    moves = re.findall(r'\b[UDLR]\b', text)
    cells = [list(cell) for cell in steps(problem['start'], moves)]
    legal = all(in_grid(cell, problem['size']) and cell not in problem['walls'] for cell in cells)
    return float(bool(cells) and legal and cells[-1] == problem['goal'])


def write(start, moves):
    """Moves and the cells they lead to, as the model is to write them."""
    cells = steps(start, moves)
    return ' '.join(f'{move} {name_of(cell)}' for move, cell in zip(moves, cells, strict=True))


def solution(problem):
    """A shortest way, in full."""
    return write(problem['start'], problem['answer'])


def demonstration(problem, draw):
    """What the noisy demonstrator writes; draw: random.Random."""
    start = problem['start']
    moves = straight(start, problem['goal'])
    blocked = any(list(cell) in problem['walls'] for cell in steps(start, moves))
    if blocked and draw.random() >= P_GO_STRAIGHT:
        moves = problem['answer']
    return write(start, moves)


# ---- one episode of a team

class Env:
    """One episode. A way is scored by where it ends: going to and fro earns only the cost of the steps."""
    roles = ROLES

    def __init__(self, problem):
        self.size = problem['size']
        self.goal = tuple(problem['goal'])
        self.position = tuple(problem['start'])
        self.walls = [tuple(cell) for cell in problem['walls']]
        self.rules = problem.get('rules', False)
        self.turn = 0
        self.proposal = None        # the tool agent's Outcome of this turn

    @property
    def success(self):
        return self.position == self.goal

    done = success

    def shortest(self):
        return shortest(self.position, self.goal, self.walls, self.size)

    def walk(self, moves):
        """(moves up to the goal or an illegal one, the cell of the illegal one or None, where they end)."""
        position, walked = self.position, []
        for move, cell in zip(moves, steps(position, moves)):
            if position == self.goal:
                break
            if cell in self.walls or not in_grid(cell, self.size):
                return walked, cell, position
            walked.append(move)
            position = cell
        return walked, None, position

    def prompt(self, role):
        text = {'tool_agent': 'Find a way: ', 'plan_agent': 'Now walk: '}[role]
        text += f'from {name_of(self.position)}, walk to {name_of(self.goal)}, walls: {names_of(self.walls)}.'
        if role == 'plan_agent' and self.proposal:
            text += proposal_text(write(self.position, self.proposal.action), self.proposal.note)
        if not self.rules:
            return chat(text)
        last = name_of((self.size - 1, self.size - 1))
        return chat(text, RULES[role] + EXPLAINED.format(size=self.size, last=last))

    def score(self, role, text):
        """The team earns what walking this way would earn: a step -0.01, an illegal move -0.1, the goal 1 and
        by a shortest way 0.5 more, each cell nearer to the goal 1. A way that is only proposed is scored by
        the same sum, as if the plan agent took it. A text without a move costs its writer 1."""
        moves = read_moves(text)
        if not moves:
            return Outcome(0.0, UNREADABLE, False, None, 'no moves')
        walked, wall, end = self.walk(moves)
        team = STEP * len(walked) + distance(self.position, self.goal) - distance(end, self.goal)
        if wall is not None:
            team += ILLEGAL
            note = f'wall at {name_of(wall) if in_grid(wall, self.size) else "the edge"}'
        elif end == self.goal:
            is_shortest = len(walked) == len(self.shortest())
            team += GOAL + SHORTEST if is_shortest else GOAL
            note = 'works'
        else:
            note = 'not at the goal'
        return Outcome(team, 0.0, True, walked, note)

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.valid else None
            return
        for cell in steps(self.position, outcome.action or []):
            self.position = cell
        self.proposal = None
        self.turn += 1

    def solution(self, role):
        return write(self.position, self.shortest())

    def demonstration(self, role, draw):
        moves = self.shortest()
        if role == 'tool_agent' and draw.random() < P_IGNORE_WALLS:
            moves = straight(self.position, self.goal)
        if role == 'plan_agent':
            if self.proposal and self.proposal.note == 'works':
                moves = ''.join(self.proposal.action)
            if draw.random() < P_STOP_EARLY:
                moves = moves[:-1] or self.step_back(moves, draw)
        return write(self.position, moves)

    def step_back(self, moves, draw):
        """Another legal move than the first of these; the same ones if there is none."""
        others = [move for move in MOVES if move != moves[0] and self.walk(move)[0]]
        return draw.choice(others or [moves])

    def view(self):
        return draw_map({self.goal: 'G', **dict.fromkeys(self.walls, '#'), self.position: '@'}, self.size)
