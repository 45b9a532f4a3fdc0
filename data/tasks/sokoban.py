"""Sokoban with one box: push it onto the goal, writing each move and where it leads: D b1 R b2 box b3

The map has a frame of walls; inside it rows are letters and columns numbers. Maps are made by playing
backwards from the solved position, pulling the box (as gym-sokoban does, github.com/mpSchrader/gym-sokoban),
so every one is solvable. A map belongs to one split, wherever the player and the box stand.

The tool agent proposes moves, which are tried on a copy; the plan agent sees the result and moves, up to its
first illegal move. The next turn starts where it ended. The demonstrators know a shortest solution, but the
tool agent's walks to the goal without the box with probability P_IGNORE_BOX, and the plan agent's stops one
push before the goal with probability P_STOP_EARLY, and steps back from the box where it stands beside it.
"""
import functools
import random

from configurator import UserError
from data.tasks.env import Outcome, chat
from data.tasks.plan_path import MOVES, distance, draw_map, grid_cells, in_grid, name_of, names_of
from data.tasks.plan_path import proposal_text, read_moves, straight
from data.tasks.stored import PUZZLE_SETTINGS, puzzle_of, stored_puzzles
from data.tasks.world import split_of

ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
SETTINGS = {
    'map_size': (6, 'rows and columns of the map, its frame of walls included'),
    'min_moves': (4, 'moves of the shortest solution at least'),
    'max_moves': (12, 'and at most'),
    **PUZZLE_SETTINGS,
    'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them'),
}
RULES = {
    'tool_agent': 'Propose moves that push the box onto the goal.',
    'plan_agent': 'Push the box onto the goal. If a way is proposed, it was tried out: check it, or find a '
                  'better one. It is written as its moves, each with the cell that it leads to, and where it '
                  'pushes the box.',
}
EXPLAINED = (' You start from the first cell that is named. Rows are letters from the top, columns numbers '
             'from the left, and around rows a to {row} and columns 1 to {column} there is a wall. Walk into '
             'the box to push it; it cannot be pulled. Moves: U up, D down, L left, R right. End with the '
             'moves after ####, such as: #### [D, R, R]')
# rewards
STEP = -0.01
ILLEGAL = -0.05
ON_GOAL = 1.0
WIN = 10.0
SHAPING = 0.1                   # for each cell that the box is nearer to the goal
UNREADABLE = -1.0
STEP_LIMIT, TOO_LONG = 200, -5.0    # moves of an episode at most, and the reward for as many
# mistakes of the demonstrators
P_IGNORE_BOX = 0.25
P_STOP_EARLY = 0.9

# how a room is made: a random walk of WALK steps, which turns with probability TURN, clears one of the
# brushes' cells around each of its steps
WALK, TURN = 25, 0.35
BRUSHES = [
    ((0, -1), (0, 0), (0, 1)),
    ((-1, 0), (0, 0), (1, 0)),
    ((0, -1), (0, 0), (1, 0)),
    ((0, 0), (0, 1), (1, 0)),
    ((0, -1), (0, 0), (1, -1), (1, 0)),
]


# ---- problems

def problems(split, n, seed, map_size=6, min_moves=4, max_moves=12, rules=False, dataset=None,
             data_dir=None):
    """n problems {'size', 'player', 'box', 'goal', 'walls', 'rules', 'answer'} of a split.

    Cells (row, column) count from the first one inside the frame; answer is a shortest solution as its moves.
    """
    if not 5 <= map_size <= 28 or not 1 <= min_moves <= max_moves:
        raise UserError('Sokoban needs 5 <= env.map_size <= 28 and 1 <= env.min_moves <= env.max_moves, not '
                        f'{map_size}, {min_moves} and {max_moves}')

    def fits(puzzle):
        return puzzle['size'] == map_size and min_moves <= len(puzzle['answer']) <= max_moves

    if stored := stored_puzzles(('sokoban',), from_row, fits, split, n, seed, dataset, data_dir):
        return [{**puzzle, 'rules': rules} for puzzle in stored]
    draw = random.Random(f'sokoban/{split}/{seed}/{map_size}')
    made, failures = [], 0
    while len(made) < n:
        free = draw_room(draw, map_size - 2)
        goal = draw.choice(free)
        walls = [cell for cell in grid_cells(map_size - 2) if cell not in free]
        if split_of(names_of([goal, *walls])) != split:
            continue
        free = frozenset(free)
        starts = []
        for (player, box), moves in distances(free, goal).items():
            if min_moves <= moves <= max_moves and distance(box, goal) >= 2:
                starts.append((player, box))
        if not starts:
            failures += 1
            if failures > 1000:
                raise UserError(f'env.min_moves={min_moves}: hardly any map of '
                                f'{map_size} rows has so long a solution')
            continue
        failures = 0
        player, box = draw.choice(starts)
        made.append({
            'size': map_size,
            'player': list(player),
            'box': list(box),
            'goal': list(goal),
            'walls': [list(cell) for cell in walls],
            'rules': rules,
            'answer': solve(free, goal, player, box),
        })
    return made


def from_row(row, where):
    """A stored row {'question', 'problem'} as a problem."""
    return puzzle_of(row, where, Env, ('size', 'player', 'box', 'goal', 'walls', 'answer'))


def draw_room(draw, inside):
    """The cells that a random walk clears, sorted; inside: rows and columns within the frame."""
    free = set()
    row, column = draw.choice(grid_cells(inside))
    direction = draw.choice('UDLR')
    for _ in range(WALK):
        if draw.random() < TURN:
            direction = draw.choice('UDLR')
        down, right = MOVES[direction]
        row = min(max(row + down, 0), inside - 1)
        column = min(max(column + right, 0), inside - 1)
        for down, right in draw.choice(BRUSHES):
            free.add((row + down, column + right))
    return sorted(cell for cell in free if in_grid(cell, inside))


@functools.lru_cache(maxsize=4096)
def distances(free, goal):
    """{(player, box): moves of a shortest solution} of all solvable positions, by playing backwards."""
    to_go = {(player, goal): 0 for player in free if player != goal}
    frontier = list(to_go)
    while frontier:
        reached = []
        for state in frontier:
            for before in states_before(free, *state):
                if before[1] != goal and before not in to_go:
                    to_go[before] = to_go[state] + 1
                    reached.append(before)
        frontier = reached
    return to_go


def states_before(free, player, box):
    """The positions (player, box) from which one move leads to this one."""
    row, column = player
    for down, right in MOVES.values():
        came_from = row - down, column - right
        ahead = row + down, column + right
        if came_from not in free:
            continue
        if came_from != box:
            yield came_from, box            # the player walked
        if ahead == box:
            yield came_from, player         # or pushed the box, which stood where the player is now


def solve(free, goal, player, box):
    """The moves of a shortest solution, None where there is none."""
    to_go = distances(free, goal)
    state, moves = (player, box), ''
    if state not in to_go:
        return None
    while to_go[state]:
        for move in MOVES:
            after = push(free, *state, move)
            if after and to_go.get(after) == to_go[state] - 1:
                moves += move
                state = after
                break
    return moves


def push(free, player, box, move):
    """(player, box) after a move, None where it is illegal."""
    down, right = MOVES[move]
    player = player[0] + down, player[1] + right
    if player == box:
        box = box[0] + down, box[1] + right
    return (player, box) if player in free and box in free else None


# ---- one episode of a team

class Env:
    """One episode. It is also done where the box is stuck for good, and after STEP_LIMIT moves."""
    roles = ROLES

    def __init__(self, problem):
        self.inside = problem['size'] - 2
        self.rules = problem.get('rules', False)
        self.player, self.box, self.goal = (tuple(problem[key]) for key in ('player', 'box', 'goal'))
        self.walls = [tuple(cell) for cell in problem['walls']]
        self.free = frozenset(grid_cells(self.inside)) - set(self.walls)
        self.turn = 0
        self.moves = 0              # of all turns
        self.proposal = None        # the tool agent's Outcome of this turn

    @property
    def success(self):
        return self.box == self.goal

    @property
    def done(self):
        if self.success or self.moves >= STEP_LIMIT:
            return True
        return (self.player, self.box) not in distances(self.free, self.goal)

    def play(self, moves):
        """(moves up to the solution, an illegal one or the limit; whether one was illegal; player; box)."""
        player, box, played = self.player, self.box, ''
        for move in moves[:STEP_LIMIT - self.moves]:
            if box == self.goal:
                break
            after = push(self.free, player, box, move)
            if not after:
                return played, True, player, box
            player, box = after
            played += move
        return played, False, player, box

    def write(self, moves):
        """Legal moves and where they lead, as the model is to write them."""
        player, box, words = self.player, self.box, []
        for move in moves:
            before = box
            player, box = push(self.free, player, box, move)
            words.append(f'{move} {name_of(player)}')
            if box != before:
                words.append(f'box {name_of(box)}')
        return ' '.join(words)

    def prompt(self, role):
        text = {'tool_agent': 'Find a way for the box: ', 'plan_agent': 'Now walk: '}[role]
        text += f'from {name_of(self.player)}, box at {name_of(self.box)}, goal at {name_of(self.goal)}'
        text += f', walls: {names_of(self.walls)}.' if self.walls else '.'
        if role == 'plan_agent' and self.proposal:
            text += proposal_text(self.write(self.proposal.action), self.proposal.note)
        if not self.rules:
            return chat(text)
        corner = name_of((self.inside - 1, self.inside - 1))
        return chat(text, RULES[role] + EXPLAINED.format(row=corner[0], column=corner[1:]))

    def score(self, role, text):
        """The team earns what these moves would earn: each -0.01, an illegal one -0.05, the box on the goal 1
        and the win 10, each cell that the box is nearer to the goal 0.1; -5 for reaching the limit of moves.
        A text without a move costs its writer 1."""
        moves = read_moves(text)
        if not moves:
            return Outcome(0.0, UNREADABLE, False, None, 'no moves')
        played, illegal, _, box = self.play(moves)
        solved = box == self.goal
        nearer = distance(self.box, self.goal) - distance(box, self.goal)
        team = STEP * len(played) + SHAPING * nearer + ILLEGAL * illegal + (ON_GOAL + WIN) * solved
        if not solved and self.moves + len(played) >= STEP_LIMIT:
            team += TOO_LONG
        if solved:
            note = 'works'
        else:
            note = 'wall there' if illegal else 'not at the goal'
        return Outcome(team, 0.0, True, played, note)

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.valid else None
            return
        played, _, self.player, self.box = self.play(outcome.action or '')
        self.moves += len(played)
        self.proposal = None
        self.turn += 1

    def solution(self, role):
        moves = solve(self.free, self.goal, self.player, self.box)
        return None if moves is None else self.write(moves)

    def demonstration(self, role, draw):
        moves = solve(self.free, self.goal, self.player, self.box)
        if role == 'tool_agent' and draw.random() < P_IGNORE_BOX:
            played, *_ = self.play(straight(self.player, self.goal))
            moves = played or moves
        if role == 'plan_agent':
            if self.proposal and self.proposal.note == 'works':
                moves = self.proposal.action
            if draw.random() < P_STOP_EARLY:
                moves = moves[:-1] or self.step_back(moves[0], draw)
        return self.write(moves)

    def step_back(self, move, draw):
        """Another move that is legal and leaves the box where it is; the same one if there is none."""
        others = []
        for other in MOVES:
            after = push(self.free, self.player, self.box, other)
            if other != move and after and after[1] == self.box:
                others.append(other)
        return draw.choice(others or [move])

    def view(self):
        """The map with its frame, in the signs that are usual for Sokoban."""
        signs = {cell: '#' for cell in grid_cells(self.inside + 2)}
        signs.update({framed(cell): '.' for cell in self.free})
        signs[framed(self.goal)] = 'G'
        signs[framed(self.box)] = '*' if self.box == self.goal else '$'
        signs[framed(self.player)] = '+' if self.player == self.goal else '@'
        return draw_map(signs, self.inside + 2)


def framed(cell):
    """A cell inside the frame -> the same cell of the whole map."""
    return cell[0] + 1, cell[1] + 1
