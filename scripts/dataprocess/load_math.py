"""Problems of mathematics for train_agents.py (env.dataset, env.benchmark):
datasets/math/{train,test}/NAME.jsonl

    python scripts/dataprocess/load_math.py
    python scripts/dataprocess/load_math.py --names polaris AIME24

From the Hugging Face hub; where it does not answer (or with --offline), generated problems, in files called
NAME.generated.jsonl. A row has "question", "solution" (the final answer) and "source"; a generated one also
"numbers" and "signs", what it is made of.
"""
import store

from configurator import run_script
from data.rewards import extract_answer
from data.tasks import math

# name: (data set of the hub, subset, split, column of the question, column of the answer)
TRAIN = {
    'polaris': ('POLARIS-Project/Polaris-Dataset-53K', None, 'train', 'problem', 'answer'),
    'gsm8k': ('openai/gsm8k', 'main', 'train', 'question', 'answer'),
    'dapo_math': ('open-r1/DAPO-Math-17k-Processed', 'en', 'train', 'prompt', 'solution'),
    'aime_past': ('gneubig/aime-1983-2024', None, 'train', 'Question', 'Answer'),
}
TEST = {
    'AIME24': ('Maxwell-Jia/AIME_2024', None, 'train', 'Problem', 'Answer'),
    'AIME25': ('yentinglin/aime_2025', None, 'train', 'problem', 'answer'),
    'OlympiadBench': ('Hothan/OlympiadBench', 'OE_TO_maths_en_COMP', 'train', 'question', 'final_answer'),
    'gsm8k': ('openai/gsm8k', 'main', 'test', 'question', 'answer'),
}
SETS = {'train': TRAIN, 'test': TEST}


def rows_of(stem, split):
    """Rows of a hub data set; those without a question or one final answer are dropped, and counted."""
    name, subset, hub_split, question, answer = SETS[split][stem]
    dropped = 0
    for row in store.hub(name, subset, hub_split):
        final = row.get(answer)
        if isinstance(final, list):
            final = final[0] if len(final) == 1 else None
        if not row.get(question) or final is None or isinstance(final, list) or not str(final).strip():
            dropped += 1
            continue
        yield {'question': str(row[question]).strip(), 'solution': extract_answer(str(final)), 'source': name}
    if dropped:
        print(f'{name}: {dropped:,} rows dropped: no question, or not one final answer')


def main(args):
    def generate(stem, split, n):
        for problem in math.generated(split, n, f'{stem}/{args.seed}', 2):
            problem['solution'] = problem.pop('answer')
            yield {key: problem[key] for key in ('question', 'solution', 'numbers', 'signs')}

    from_hub = store.use_hub(args, 'math')
    store.write_sets(args, 'math', SETS, generate, rows_of if from_hub else None)


if __name__ == '__main__':
    run_script(main, store.arguments(__doc__, dict.fromkeys([*TRAIN, *TEST])))
