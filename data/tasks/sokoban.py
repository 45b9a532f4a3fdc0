"""Sokoban with one box: push it onto the goal, writing each move and where it leads: D b1 R b2 box b3

The map has a frame of walls, inside which rows are letters and columns numbers. Maps are made by playing backwards from the
solved position, pulling the box (as gym-sokoban does, github.com/mpSchrader/gym-sokoban): every one is solvable. A map,
whatever the place of player and box, belongs to one split.

The tool agent proposes moves, which are tried on a copy; the plan agent sees what came of it and moves, up to its first illegal
move. The next turn begins where it ended. The pupils of the team know the shortest way, but the tool agent's walks to the goal
without the box in a quarter of the turns, and the plan agent's is shy: in nine turns of ten it stops one push before the goal, and
steps back from the box where it stands beside it.
"""
import functools
import random

from configurator import UserError
from data.tasks.env import Outcome
from data.tasks.plan_path import MOVES, name_of, read_moves, straight
from data.tasks.world import split_of

ROLES, ACTS = ('tool_agent', 'plan_agent'), 'plan_agent'
SETTINGS = {'map_size': (6, 'rows and columns of the map, its frame of walls included'),
            'min_moves': (4, 'moves of the shortest solution at least'), 'max_moves': (12, 'and at most'),
            'rules': (False, 'explain the rules in a system message, for models that were not warmed up on them')}
RULES = {'tool_agent': 'Propose moves that push the box onto the goal.',
         'plan_agent': 'Push the box onto the goal. Moves that somebody proposes were tried out; check them, or find better ones.'}
EXPLAINED = (' Rows are letters from the top, columns numbers from the left, and around rows a to {row} and columns 1 to {column} '
             'there is a wall. Walk into the box to push it; it cannot be pulled. Moves: U up, D down, L left, R right. End with '
             'the moves after ####, such as: #### [D, R, R]')
STEP, ILLEGAL, ON_GOAL, WIN, SHAPING, UNREADABLE = -0.01, -0.05, 1.0, 10.0, 0.1, -1.0       # rewards
STEP_LIMIT, TOO_LONG = 200, -5.0    # moves in an episode, and the reward for as many
SHY, BLIND = 0.9, 0.25              # of the pupils' turns
BRUSHES = [((0, -1), (0, 0), (0, 1)), ((-1, 0), (0, 0), (1, 0)), ((0, -1), (0, 0), (1, 0)), ((0, 0), (0, 1), (1, 0)),
           ((0, -1), (0, 0), (1, -1), (1, 0))]      # what a walk clears around each of its places
WALK, TURN = 25, 0.35               # places of the walk that clears a room, and how often it turns


def problems(split, n, seed, map_size=6, min_moves=4, max_moves=12, rules=False):
    """n problems {'size', 'player', 'box', 'goal', 'walls', 'answer', 'rules'} of a split; cells (row, column) count from the
    first inside the frame, answer is a shortest solution as its moves."""
    if not 5 <= map_size <= 28 or not 1 <= min_moves <= max_moves:
        raise UserError(f'Sokoban needs 5 <= env.map_size <= 28 and 1 <= env.min_moves <= env.max_moves, not {map_size}, '
                        f'{min_moves} and {max_moves}')
    draw, found, failures = random.Random(f'sokoban/{split}/{seed}/{map_size}'), [], 0
    while len(found) < n:
        free = room(draw, map_size - 2)
        goal = draw.choice(free)
        walls = [cell for cell in cells(map_size - 2) if cell not in free]
        if split_of(' '.join(map(name_of, [goal, *walls]))) != split:
            continue
        starts = [state for state, moves in distances(frozenset(free), goal).items() if min_moves <= moves <= max_moves
                  and abs(state[1][0] - goal[0]) + abs(state[1][1] - goal[1]) >= 2]
        failures = 0 if starts else failures + 1
        if failures > 1000:
            raise UserError(f'env.min_moves={min_moves}: hardly any map of {map_size} rows has so long a solution')
        if starts:
            player, box = draw.choice(starts)
            found.append({'size': map_size, 'player': list(player), 'box': list(box), 'goal': list(goal),
                          'walls': [list(cell) for cell in walls], 'rules': rules,
                          'answer': solve(frozenset(free), goal, player, box)})
    return found


def cells(inside):
    return [(row, column) for row in range(inside) for column in range(inside)]


def room(draw, inside):
    """The cells that a random walk clears, sorted."""
    free, (row, column), direction = set(), draw.choice(cells(inside)), draw.choice('UDLR')
    for _ in range(WALK):
        if draw.random() < TURN:
            direction = draw.choice('UDLR')
        row = min(max(row + MOVES[direction][0], 0), inside - 1)
        column = min(max(column + MOVES[direction][1], 0), inside - 1)
        free |= {(row + down, column + right) for down, right in draw.choice(BRUSHES)}
    return sorted(cell for cell in free if 0 <= min(cell) and max(cell) < inside)


@functools.lru_cache(maxsize=4096)
def distances(free, goal):
    """{(player, box): moves of a shortest solution} of every position of a map that can be solved, by playing backwards."""
    found = {(player, goal): 0 for player in free if player != goal}
    edge = list(found)
    while edge:
        reached = []
        for player, box in edge:
            for down, right in MOVES.values():
                behind, ahead = (player[0] - down, player[1] - right), (player[0] + down, player[1] + right)
                for before in ((behind, box), (behind, player)) if ahead == box else ((behind, box),):     # walked; or pushed
                    if behind in free and behind != before[1] and before[1] != goal and before not in found:
                        found[before] = found[player, box] + 1
                        reached.append(before)
        edge = reached
    return found


def solve(free, goal, player, box):
    """The moves of a shortest solution, None where there is none."""
    left, moves = distances(free, goal), ''
    if (player, box) not in left:
        return None
    while left[player, box]:
        for move in MOVES:
            after = push(free, player, box, move)
            if after and left.get(after) == left[player, box] - 1:
                moves, (player, box) = moves + move, after
                break
    return moves


def push(free, player, box, move):
    """(player, box) after a move, None where it is illegal."""
    down, right = MOVES[move]
    player = player[0] + down, player[1] + right
    if player == box:
        box = box[0] + down, box[1] + right
    return (player, box) if player in free and box in free else None


class Env:
    """One episode. `done` also where the box can no longer reach the goal, and after STEP_LIMIT moves: neither is a success."""
    roles = ROLES

    def __init__(self, problem):
        self.inside, self.rules = problem['size'] - 2, problem.get('rules', False)
        self.player, self.box, self.goal = (tuple(problem[key]) for key in ('player', 'box', 'goal'))
        self.walls = [tuple(cell) for cell in problem['walls']]
        self.free = frozenset(cells(self.inside)) - set(self.walls)
        self.turn, self.moves, self.proposal = 0, 0, None

    @property
    def success(self):
        return self.box == self.goal

    @property
    def done(self):
        return self.success or self.moves >= STEP_LIMIT or (self.player, self.box) not in distances(self.free, self.goal)

    def play(self, moves):
        """(the moves up to the solution, the first illegal one or the limit; whether one was illegal; player; box)."""
        player, box, played = self.player, self.box, ''
        for move in moves[:STEP_LIMIT - self.moves]:
            if box == self.goal:
                break
            after = push(self.free, player, box, move)
            if not after:
                return played, True, player, box
            played, (player, box) = played + move, after
        return played, False, player, box

    def write(self, moves):
        """Legal moves and where they lead, as the model is to write them."""
        player, box, words = self.player, self.box, []
        for move in moves:
            before, (player, box) = box, push(self.free, player, box, move)
            words.append(f'{move} {name_of(player)}' + (f' box {name_of(box)}' if box != before else ''))
        return ' '.join(words)

    def prompt(self, role):
        walls = ' '.join(map(name_of, self.walls))
        board = (f'from {name_of(self.player)}, box at {name_of(self.box)}, goal at {name_of(self.goal)}'
                 + (f', walls: {walls}.' if walls else '.'))
        text = {'tool_agent': 'Find a way for the box: ', 'plan_agent': 'Now walk: '}[role] + board
        if role == 'plan_agent' and self.proposal:
            way = self.write(self.proposal.action)
            text += f' One way: {way}{", " if way else ""}{self.proposal.note}.'
        corner = name_of((self.inside - 1, self.inside - 1))
        rules = [{'role': 'system', 'content': RULES[role] + EXPLAINED.format(row=corner[0], column=corner[1:])}] * self.rules
        return rules + [{'role': 'user', 'content': text}]

    def score(self, role, text):
        """The team earns what these moves would earn: each -0.01, an illegal one -0.05, the box on the goal 1 and the win 10,
        each cell that the box is nearer to the goal 0.1; -5 for reaching the limit of moves. A text without a move costs its
        writer 1."""
        moves = read_moves(text)
        if not moves:
            return Outcome(0.0, UNREADABLE, False, None, 'no moves')
        played, illegal, player, box = self.play(moves)
        distance = lambda cell: abs(cell[0] - self.goal[0]) + abs(cell[1] - self.goal[1])
        solved = box == self.goal
        team = STEP * len(played) + SHAPING * (distance(self.box) - distance(box)) + ILLEGAL * illegal + (ON_GOAL + WIN) * solved
        if not solved and self.moves + len(played) >= STEP_LIMIT:
            team += TOO_LONG
        note = 'works' if solved else 'wall there' if illegal else 'not at the goal'
        return Outcome(team, 0.0, True, played, note)

    def step(self, role, outcome):
        if role == 'tool_agent':
            self.proposal = outcome if outcome.valid else None
            return
        played, _, self.player, self.box = self.play(outcome.action or '')
        self.moves, self.proposal, self.turn = self.moves + len(played), None, self.turn + 1

    def solution(self, role):
        moves = solve(self.free, self.goal, self.player, self.box)
        return None if moves is None else self.write(moves)

    def demonstration(self, role, draw):
        moves = solve(self.free, self.goal, self.player, self.box)
        if role == 'tool_agent' and draw.random() < BLIND:
            moves = self.play(straight(self.player, self.goal))[0] or moves
        if role == 'plan_agent' and self.proposal and self.proposal.note == 'works':
            moves = self.proposal.action
        if role == 'plan_agent' and draw.random() < SHY:
            moves = moves[:-1] or self.back(moves[0], draw)
        return self.write(moves)

    def back(self, move, draw):
        """Another move that is legal and leaves the box where it is; the same one if there is none."""
        others = [other for other in MOVES if (push(self.free, self.player, self.box, other) or (0, 0))[1] == self.box]
        return draw.choice([other for other in others if other != move] or [move])

    def view(self):
        size = self.inside + 2
        picture = {(row, column): '#' for row in range(size) for column in range(size)}
        picture.update({(row + 1, column + 1): '.' for row, column in self.free})
        here, box, goal = ((row + 1, column + 1) for row, column in (self.player, self.box, self.goal))
        picture.update({goal: 'G', box: '$', here: '@'})
        picture.update({goal: '*'} if box == goal else {goal: '+'} if here == goal else {})
        return '\n'.join(''.join(picture[row, column] for column in range(size)) for row in range(size))
