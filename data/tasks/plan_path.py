"""Plan-Path on a small grid: walk from a start to a goal around walls, writing each move and where it leads: D b1 R b2

Rows are letters from the top, columns digits from the left; moves are U, D, L, R. A grid belongs to one split, a
wording too. `demonstration` writes as a careless pupil does, who in 80% of the blocked grids walks to the goal's row,
then to its column, walls or no walls; otherwise it is a shortest way.
"""
import itertools
import random
import re

from data.tasks.world import split_of

SIZE = 4
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
    return 'abcdefgh'[cell[0]] + str(cell[1] + 1)


def problems(split, n, seed, size=SIZE):
    """n problems {'size', 'start', 'goal', 'walls', 'question', 'answer'} of a split; each has a way. answer is a
    shortest one, as its moves."""
    draw, found = random.Random(f'plan_path/{split}/{seed}/{size}'), []
    cells = [(row, column) for row in range(size) for column in range(size)]
    wordings = [wording for wording in WORDINGS if split_of(wording) == split]
    while len(found) < n:
        blocked = draw.random() < BLOCKED_SHARE
        while True:
            start, goal, *walls = draw.sample(cells, 2 + draw.randint(2, 4))
            key = ' '.join(map(name_of, [start, goal, *sorted(walls)]))
            if any(cell in walls for cell in steps(start, straight(start, goal))) == blocked and split_of(key) == split:
                answer = shortest(start, goal, walls, size)
                if answer:
                    break
        names = dict(start=name_of(start), goal=name_of(goal), walls=' '.join(map(name_of, walls)))
        found.append({'size': size, 'start': list(start), 'goal': list(goal), 'walls': [list(cell) for cell in walls],
                      'answer': answer, 'question': draw.choice(wordings).format(**names)})
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
