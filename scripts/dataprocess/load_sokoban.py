"""Puzzles of the games of train_agents.py: datasets/game/{train,test}/{sokoban,sudoku,plan_path}.jsonl

    python scripts/dataprocess/load_sokoban.py
    python scripts/dataprocess/load_sokoban.py --names sokoban --num_rows 5000

train_agents.py plays these puzzles where they are there and of the size that it is asked for, else it makes
its own; train_sft.py can read "question" and "answer". No hub is asked: the project's own generators make all
puzzles, every one solvable, and no training puzzle is a held-out one. A row has "question" (what the plan
agent is asked), "answer" (a right reply), "picture", "problem" (what Env takes) and "source".
"""
import store

from configurator import UserError, run_script
from data.tasks import plan_path, sokoban, sudoku

GAMES = {'sokoban': sokoban, 'sudoku': sudoku, 'plan_path': plan_path}


def rows_of(game, split, n, seed):
    """n rows of a game with its default settings."""
    settings = {name: default for name, (default, _) in game.SETTINGS.items()}
    for problem in game.problems(split, n, seed, **{**settings, 'data_dir': None}):
        env = game.Env(problem)
        answer = env.solution('plan_agent')
        if not env.score('plan_agent', answer).valid:
            raise UserError(f'the generator made a puzzle without a solution: {problem}')
        yield {
            'question': env.prompt('plan_agent')[-1]['content'],
            'answer': answer,
            'picture': env.view(),
            'problem': problem,
        }


def main(args):
    def generate(name, split, n):
        return rows_of(GAMES[name], split, n, args.seed)

    print('puzzles of the generators in data/tasks: there is no data set on the hub for these games')
    store.write_sets(args, 'game', {'train': args.names, 'test': args.names}, generate)


if __name__ == '__main__':
    run_script(main, store.arguments(__doc__, GAMES))
