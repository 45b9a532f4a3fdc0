"""Sudoku: fill the blanks so that no row, column or box holds a number twice. Every puzzle has exactly one solution.

Grids of up to 9 rows are written as digits, 0 for a blank: 1034 0012 2000 0321. A puzzle belongs to the split of its solution, so
that no solution of a held-out puzzle occurs in training.

The tool agent proposes a grid, which is checked; the plan agent sees what came of it and fills in. A grid that changes a given
number, or in which a number stands twice, is refused. The pupils of the team know the solution, but the tool agent's looks only
along the rows in a quarter of the turns, and the plan agent's is shy: in nine turns of ten it leaves the last blank open.
"""
import json
import random
import re

from configurator import UserError
from data.tasks.env import Outcome
from data.tasks.world import split_of

ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
SETTINGS = {'map_size': (4, 'rows and columns: 4, 6, 9, 12 or 16'), 'min_blanks': (7, 'numbers to fill in at least'),
            'max_blanks': (10, 'and at most'),
            'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them')}
RULES = {'tool_agent': 'Propose how to fill this Sudoku.',
         'plan_agent': 'Fill in this Sudoku. What somebody proposes was checked; take it over, or correct it.'}
EXPLAINED = (' It has {size} rows of the numbers 1 to {size}, 0 for a blank: none may stand twice in a row, in a column or in a '
             'box of {rows} rows and {columns} columns. End with the whole grid after ####, as a list of rows with 0 for what '
             'you leave blank, or with what you fill in, as a list of [row, column, number] counted from 1.')
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 12: (3, 4), 16: (4, 4)}       # rows and columns of a box
SOLVED, QUICK, STEP, FILLED, UNIT, TWICE, GIVEN, UNREADABLE = 2.0, 0.5, -0.01, 0.5, 0.02, -0.5, -0.3, -1.0      # rewards
SHY, BLIND = 0.9, 0.25              # of the pupils' turns


def problems(split, n, seed, map_size=4, min_blanks=7, max_blanks=10, rules=False):
    """n problems {'size', 'grid', 'solution', 'rules'} of a split; grids are lists of rows, 0 for a blank."""
    if map_size not in BOXES or not 1 <= min_blanks <= max_blanks <= map_size ** 2:
        raise UserError(f'Sudoku needs env.map_size of {", ".join(map(str, BOXES))} and 1 <= env.min_blanks <= env.max_blanks, not '
                        f'{map_size}, {min_blanks} and {max_blanks}')
    draw, found, failures = random.Random(f'sudoku/{split}/{seed}/{map_size}'), [], 0
    while len(found) < n:
        solution = solutions([[0] * map_size for _ in range(map_size)], 1, draw)[0]
        if split_of(str(solution), share=0.2) != split:
            continue
        grid = dig(solution, draw.randint(min_blanks, max_blanks), draw)
        failures = 0 if grid else failures + 1
        if failures > 200:
            raise UserError(f'env.min_blanks={min_blanks}: hardly any Sudoku of {map_size} rows with so many blanks has one solution')
        if grid:
            found.append({'size': map_size, 'grid': grid, 'solution': solution, 'rules': rules})
    return found


def units(size):
    """The cells of every row, column and box."""
    tall, wide = BOXES[size]
    rows = [[(row, column) for column in range(size)] for row in range(size)]
    columns = [[(row, column) for row in range(size)] for column in range(size)]
    boxes = [[(top + down, left + right) for down in range(tall) for right in range(wide)]
             for top in range(0, size, tall) for left in range(0, size, wide)]
    return rows + columns + boxes


def candidates(grid, row, column):
    """The numbers that stand in none of a blank's row, column and box."""
    size, (tall, wide) = len(grid), BOXES[len(grid)]
    top, left = row // tall * tall, column // wide * wide
    seen = {*grid[row], *(line[column] for line in grid), *(n for line in grid[top:top + tall] for n in line[left:left + wide])}
    return [number for number in range(1, size + 1) if number not in seen]


def solutions(grid, limit, draw=None):
    """Up to `limit` solutions, by trying the blank with the fewest candidates first; `draw` shuffles what is tried."""
    blanks = [(row, column) for row, line in enumerate(grid) for column, number in enumerate(line) if not number]
    if not blanks:
        return [[line[:] for line in grid]]
    options, (row, column) = min(((candidates(grid, *cell), cell) for cell in blanks), key=lambda pair: len(pair[0]))
    found, grid = [], [line[:] for line in grid]
    for number in draw.sample(options, len(options)) if draw else options:
        grid[row][column] = number
        found += solutions(grid, limit - len(found), draw)
        if len(found) >= limit:
            break
    return found


def dig(solution, blanks, draw):
    """The solution with so many numbers taken out that it is still the only one; None where the order of taking allows none."""
    grid, size = [line[:] for line in solution], len(solution)
    for place in draw.sample(range(size * size), size * size):
        row, column = divmod(place, size)
        kept, grid[row][column] = grid[row][column], 0
        if len(solutions(grid, 2)) > 1:
            grid[row][column] = kept
        blanks -= not grid[row][column]
        if not blanks:
            return grid
    return None


def read_grid(text, grid):
    """What a model wrote -> the whole grid, None where it cannot be read: rows of digits (0 or . for a blank), a JSON list of rows,
    or a JSON list of [row, column, number] counted from 1, which are put into a copy of `grid`; behind the last #### if there is
    one."""
    size, text = len(grid), text.rpartition('####')[2].strip()
    if text.startswith('['):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            return None
        numbers = lambda row, low: isinstance(row, list) and all(type(n) is int and low <= n <= size for n in row)
        if len(rows) == size and all(numbers(row, 0) and len(row) == size for row in rows):
            return rows
        if not rows or not all(numbers(row, 1) and len(row) == 3 for row in rows):
            return None
        filled = [line[:] for line in grid]
        for row, column, number in rows:
            filled[row - 1][column - 1] = number
        return filled
    rows = text.split()
    if len(rows) != size or any(not re.fullmatch('[.0-9]+', row) or len(row) != size for row in rows):
        return None
    rows = [[int(sign) for sign in row.replace('.', '0')] for row in rows]
    return rows if max(map(max, rows)) <= size else None


def write(grid):
    """A grid as the model is to write it."""
    return ' '.join(''.join(map(str, line)) for line in grid) if len(grid) <= 9 else json.dumps(grid)


def twice(grid):
    """The first number that stands twice in a row, column or box, or None."""
    for unit in units(len(grid)):
        numbers = [grid[row][column] for row, column in unit if grid[row][column]]
        if len(set(numbers)) < len(numbers):
            return next(number for number in numbers if numbers.count(number) > 1)
    return None


class Env:
    """One episode. Numbers that were filled in may be changed later; the given ones never."""
    roles = ROLES

    def __init__(self, problem):
        self.given, self.grid, self.answer = problem['grid'], problem['grid'], problem['solution']
        self.rules, self.blanks, self.turn, self.proposal = problem.get('rules', False), self.left(problem['grid']), 0, None

    @staticmethod
    def left(grid):
        return sum(line.count(0) for line in grid)

    @property
    def success(self):
        return not self.left(self.grid)     # the grid never breaks a rule

    done = success

    def prompt(self, role):
        text = {'tool_agent': 'Answer: ', 'plan_agent': 'Now write: '}[role] + write(self.grid)
        if role == 'plan_agent' and self.proposal:
            text += f' One answer: {write(self.proposal.action)}, {self.proposal.note}.'
        rows, columns = BOXES[len(self.grid)]
        rules = RULES[role] + EXPLAINED.format(size=len(self.grid), rows=rows, columns=columns)
        return [{'role': 'system', 'content': rules}] * self.rules + [{'role': 'user', 'content': text}]

    def complete(self, grid):
        """Rows, columns and boxes without a blank."""
        return sum(all(grid[row][column] for row, column in unit) for unit in units(len(grid)))

    def score(self, role, text):
        """The team earns -0.01 for every answer, and for the share of the blanks that it fills 0.5, for each row, column and box
        that it completes 0.02, for the solution 2, in the first turn 0.5 more. A given number changed is -0.3, a number that
        stands twice -0.5, and neither is executed. A text that is no grid costs its writer 1."""
        grid = read_grid(text, self.grid)
        if grid is None:
            return Outcome(0.0, UNREADABLE, False, None, 'no grid')
        if any(old and old != new for lines in zip(self.given, grid) for old, new in zip(*lines)):
            return Outcome(STEP + GIVEN, 0.0, True, None, 'changes the start')
        if number := twice(grid):
            return Outcome(STEP + TWICE, 0.0, True, None, f'two {number}')
        filled, left = self.left(self.grid) - self.left(grid), self.left(grid)
        team = STEP + FILLED * filled / self.blanks + UNIT * (self.complete(grid) - self.complete(self.grid))
        if not left:
            team += SOLVED + QUICK * (self.turn == 0)
        return Outcome(team, 0.0, True, grid, f'{left} more' if left else 'works')

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.action else None
            return
        self.grid, self.proposal, self.turn = outcome.action or self.grid, None, self.turn + 1

    def solution(self, role):
        return write(self.answer)

    def demonstration(self, role, draw):
        blanks = [(row, column) for row, line in enumerate(self.grid) for column, number in enumerate(line) if not number]
        if role == 'tool_agent' and draw.random() < BLIND:
            rows = []
            for line in self.grid:
                missing = [number for number in range(1, len(line) + 1) if number not in line]
                draw.shuffle(missing)
                rows.append([number or missing.pop() for number in line])
            return write(rows)
        grid = [line[:] for line in self.answer]
        if role == 'plan_agent' and draw.random() < SHY:
            row, column = blanks[-1]
            grid[row][column] = 0
        return write(grid)

    def view(self):
        tall, wide = BOXES[len(self.grid)]
        signs = [[str(number or '.').rjust(len(str(len(line)))) for number in line] for line in self.grid]
        lines = [' | '.join(' '.join(line[left:left + wide]) for left in range(0, len(line), wide)) for line in signs]
        for row in range(len(lines) - tall, 0, -tall):
            lines.insert(row, re.sub(r'[^|]', '-', lines[0]).replace('|', '+'))
        return '\n'.join(lines)
