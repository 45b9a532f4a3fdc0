"""Sudoku: fill the blanks so that no row, column or box has a number twice. Puzzles have one solution.

Grids of up to 9 rows are written as digits, 0 for a blank: 1034 0012 2000 0321. A puzzle belongs to the split
of its solution, so that no solution of a held-out puzzle occurs in training.

The tool agent proposes a grid, which is checked; the plan agent sees the result and fills in. A grid that
changes a given number, or has a number twice, is refused. The demonstrators know the solution, but the tool
agent's looks only along the rows with probability P_IGNORE_COLUMNS, and the plan agent's leaves the last
blank open with probability P_STOP_EARLY.
"""
import itertools
import json
import random
import re

from configurator import UserError
from data.tasks.env import Outcome, chat
from data.tasks.stored import PUZZLE_SETTINGS, puzzle_of, stored_puzzles
from data.tasks.world import split_of

ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
DATASETS = ('suduku',)          # as the released commands of AT-GRPO spell it
SETTINGS = {
    'map_size': (4, 'rows and columns: 4, 6, 9, 12 or 16'),
    'min_blanks': (7, 'numbers to fill in at least'),
    'max_blanks': (10, 'and at most'),
    **PUZZLE_SETTINGS,
    'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them'),
}
RULES = {
    'tool_agent': 'Propose how to fill this Sudoku.',
    'plan_agent': 'Fill in this Sudoku. If an answer is proposed, it was checked: take it over, or correct '
                  'it.',
}
EXPLAINED = (' It has {size} rows, one after the other, of the numbers 1 to {size}, 0 for a blank: none may '
             'stand twice in a row, in a column or in a box of {rows} rows and {columns} columns. End with '
             'the whole grid after ####, as a list of {size} rows with 0 for what you leave blank; or '
             'with what you fill in, as a list of [row, column, number] counted from 1, such as: '
             '#### [[1, 2, 4], [3, 1, 2]]')
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 12: (3, 4), 16: (4, 4)}       # size: rows and columns of a box
# rewards
SOLVED = 2.0
QUICK = 0.5             # besides, for a solution in the first turn
STEP = -0.01
FILLED = 0.5            # times the share of the blanks that is filled
UNIT = 0.02             # for each row, column and box that becomes complete
TWICE = -0.5
GIVEN = -0.3
UNREADABLE = -1.0
# mistakes of the demonstrators
P_IGNORE_COLUMNS = 0.25
P_STOP_EARLY = 0.9


# ---- problems

def problems(split, n, seed, map_size=4, min_blanks=7, max_blanks=10, rules=False, dataset=None,
             data_dir=None):
    """n problems {'size', 'grid', 'solution', 'rules'} of a split; grids are lists of rows, 0 for a blank."""
    if map_size not in BOXES or not 1 <= min_blanks <= max_blanks <= map_size ** 2:
        sizes = ', '.join(map(str, BOXES))
        raise UserError(f'Sudoku needs env.map_size of {sizes} and 1 <= env.min_blanks <= env.max_blanks, '
                        f'not {map_size}, {min_blanks} and {max_blanks}')

    def fits(puzzle):
        num_blanks = sum(row.count(0) for row in puzzle['grid'])
        return puzzle['size'] == map_size and min_blanks <= num_blanks <= max_blanks

    if stored := stored_puzzles(('sudoku', *DATASETS), from_row, fits, split, n, seed, dataset, data_dir):
        return [{**puzzle, 'rules': rules} for puzzle in stored]
    draw = random.Random(f'sudoku/{split}/{seed}/{map_size}')
    empty = [[0] * map_size for _ in range(map_size)]
    made, failures = [], 0
    while len(made) < n:
        solution = solutions(empty, 1, draw)[0]
        if split_of(str(solution), share=0.2) != split:
            continue
        grid = dig(solution, draw.randint(min_blanks, max_blanks), draw)
        if grid:
            made.append({'size': map_size, 'grid': grid, 'solution': solution, 'rules': rules})
            failures = 0
            continue
        failures += 1
        if failures > 200:
            raise UserError(f'env.min_blanks={min_blanks}: hardly any Sudoku of {map_size} rows with so many '
                            'blanks has one solution')
    return made


def from_row(row, where):
    """A stored row {'question', 'problem'} as a problem."""
    return puzzle_of(row, where, Env, ('size', 'grid', 'solution'))


def copy_of(grid):
    return [row[:] for row in grid]


def blanks_of(grid):
    """The cells (row, column) without a number, row by row."""
    cells = itertools.product(range(len(grid)), repeat=2)
    return [(row, column) for row, column in cells if not grid[row][column]]


def units(size):
    """The cells of every row, column and box."""
    box_rows, box_columns = BOXES[size]
    rows = [[(row, column) for column in range(size)] for row in range(size)]
    columns = [[(row, column) for row in range(size)] for column in range(size)]
    boxes = []
    for top in range(0, size, box_rows):
        for left in range(0, size, box_columns):
            cells = [row[left:left + box_columns] for row in rows[top:top + box_rows]]
            boxes.append(sum(cells, []))
    return rows + columns + boxes


def candidates(grid, row, column):
    """The numbers that stand in none of a blank's row, column and box."""
    size = len(grid)
    box_rows, box_columns = BOXES[size]
    top = row // box_rows * box_rows
    left = column // box_columns * box_columns
    seen = {*grid[row], *(line[column] for line in grid)}
    for line in grid[top:top + box_rows]:
        seen.update(line[left:left + box_columns])
    return [number for number in range(1, size + 1) if number not in seen]


def solutions(grid, limit, draw=None):
    """Up to `limit` solutions: the blank with the fewest candidates first; `draw` shuffles them."""
    blanks = blanks_of(grid)
    if not blanks:
        return [copy_of(grid)]
    options = {cell: candidates(grid, *cell) for cell in blanks}
    row, column = min(blanks, key=lambda cell: len(options[cell]))
    numbers = options[row, column]
    if draw:
        numbers = draw.sample(numbers, len(numbers))
    solved, grid = [], copy_of(grid)
    for number in numbers:
        grid[row][column] = number
        solved += solutions(grid, limit - len(solved), draw)
        if len(solved) >= limit:
            break
    return solved


def dig(solution, num_blanks, draw):
    """The solution without so many numbers, still the only one; None where their order allows none."""
    grid, size = copy_of(solution), len(solution)
    for cell in draw.sample(range(size * size), size * size):
        row, column = divmod(cell, size)
        number = grid[row][column]
        grid[row][column] = 0
        if len(solutions(grid, 2)) > 1:
            grid[row][column] = number
        else:
            num_blanks -= 1
        if not num_blanks:
            return grid
    return None


# ---- grids as text

def read_grid(text, grid):
    """What a model wrote after the last #### (or at all) -> the whole grid, None where it cannot be read.

    It is rows of digits (0 or . for a blank), a JSON list of rows, or a JSON list of [row, column, number]
    counted from 1, which are put into a copy of `grid`.
    """
    text = text.rpartition('####')[2].strip()
    if text.startswith('['):
        return read_json_grid(text, grid)
    size, rows = len(grid), text.split()
    if len(rows) != size or any(not re.fullmatch('[.0-9]+', row) or len(row) != size for row in rows):
        return None
    rows = [[int(sign) for sign in row.replace('.', '0')] for row in rows]
    return rows if max(map(max, rows)) <= size else None


def read_json_grid(text, grid):
    size = len(grid)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if len(rows) == size and all(is_row(row, size, 0, size) for row in rows):
        return rows
    if not rows or not all(is_row(row, 3, 1, size) for row in rows):
        return None
    filled = copy_of(grid)
    for row, column, number in rows:
        filled[row - 1][column - 1] = number
    return filled


def is_row(row, length, low, high):
    """Whether it is a list of so many integers from low to high (True is none)."""
    if not isinstance(row, list) or len(row) != length:
        return False
    return all(type(number) is int and low <= number <= high for number in row)


def write(grid):
    """A grid as the model is to write it."""
    if len(grid) > 9:
        return json.dumps(grid)
    return ' '.join(''.join(map(str, row)) for row in grid)


def twice(grid):
    """The first number that stands twice in a row, column or box, or None."""
    for unit in units(len(grid)):
        numbers = [grid[row][column] for row, column in unit if grid[row][column]]
        for number in numbers:
            if numbers.count(number) > 1:
                return number
    return None


# ---- one episode of a team

class Env:
    """One episode. Numbers that were filled in may be changed later; the given ones never."""
    roles = ROLES

    def __init__(self, problem):
        self.given = self.grid = problem['grid']
        self.answer = problem['solution']
        self.rules = problem.get('rules', False)
        self.num_blanks = len(blanks_of(self.given))
        self.turn = 0
        self.proposal = None        # the tool agent's Outcome of this turn

    @property
    def success(self):
        return not blanks_of(self.grid)     # the grid never breaks a rule

    done = success

    def prompt(self, role):
        text = {'tool_agent': 'Answer: ', 'plan_agent': 'Now write: '}[role] + write(self.grid)
        if role == 'plan_agent' and self.proposal:
            text += f' One answer: {write(self.proposal.action)}, {self.proposal.note}.'
        if not self.rules:
            return chat(text)
        rows, columns = BOXES[len(self.grid)]
        return chat(text, RULES[role] + EXPLAINED.format(size=len(self.grid), rows=rows, columns=columns))

    def num_complete(self, grid):
        """Rows, columns and boxes without a blank."""
        return sum(all(grid[row][column] for row, column in unit) for unit in units(len(grid)))

    def changes_given(self, grid):
        given = sum(self.given, [])
        return any(old and old != new for old, new in zip(given, sum(grid, [])))

    def score(self, role, text):
        """The team earns -0.01 for every answer, and for the share of the blanks that it fills 0.5, for each
        row, column and box that it completes 0.02, for the solution 2, in the first turn 0.5 more. A given
        number changed is -0.3, a number that stands twice -0.5, and neither is carried out. A text that is no
        grid costs its writer 1."""
        grid = read_grid(text, self.grid)
        if grid is None:
            return Outcome(0.0, UNREADABLE, False, None, 'no grid')
        if self.changes_given(grid):
            return Outcome(STEP + GIVEN, 0.0, True, None, 'changes the start')
        number = twice(grid)
        if number:
            return Outcome(STEP + TWICE, 0.0, True, None, f'two {number}')
        left = len(blanks_of(grid))
        filled = len(blanks_of(self.grid)) - left
        completed = self.num_complete(grid) - self.num_complete(self.grid)
        team = STEP + FILLED * filled / self.num_blanks + UNIT * completed
        if left:
            return Outcome(team, 0.0, True, grid, f'{left} more')
        team += SOLVED + QUICK if self.turn == 0 else SOLVED
        return Outcome(team, 0.0, True, grid, 'works')

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.action else None
            return
        self.grid = outcome.action or self.grid
        self.proposal = None
        self.turn += 1

    def solution(self, role):
        return write(self.answer)

    def demonstration(self, role, draw):
        if role == 'tool_agent' and draw.random() < P_IGNORE_COLUMNS:
            return write([fill_row(row, draw) for row in self.grid])
        grid = copy_of(self.answer)
        if role == 'plan_agent' and draw.random() < P_STOP_EARLY:
            row, column = blanks_of(self.grid)[-1]
            grid[row][column] = 0
        return write(grid)

    def view(self):
        """The grid with lines between the boxes."""
        box_rows, box_columns = BOXES[len(self.grid)]
        width = len(str(len(self.grid)))
        lines = []
        for row in self.grid:
            signs = [str(number or '.').rjust(width) for number in row]
            boxes = [signs[left:left + box_columns] for left in range(0, len(signs), box_columns)]
            lines.append(' | '.join(map(' '.join, boxes)))
        rule = re.sub(r'[^|]', '-', lines[0]).replace('|', '+')
        blocks = ['\n'.join(lines[top:top + box_rows]) for top in range(0, len(lines), box_rows)]
        return f'\n{rule}\n'.join(blocks)


def fill_row(row, draw):
    """A row filled with the numbers that it lacks, in any order."""
    missing = [number for number in range(1, len(row) + 1) if number not in row]
    draw.shuffle(missing)
    return [number or missing.pop() for number in row]
