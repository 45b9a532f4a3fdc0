"""Problems of mathematics for train_agents.py (env.dataset, env.benchmark): datasets/math/{train,test}/NAME.jsonl

    python scripts/dataprocess/load_math.py
    python scripts/dataprocess/load_math.py --names polaris AIME24

From the Hugging Face hub; where it does not answer (or with --offline), generated problems under the same names, which it says. A
row has "question", "solution" (the final answer) and "source"; a generated one also "numbers" and "signs", what it is made of.
"""
import store

from configurator import run_script
from data.rewards import extract_answer
from data.tasks import math

TRAIN = {'polaris': ('POLARIS-Project/Polaris-Dataset-53K', None, 'train', 'problem', 'answer'),
         'gsm8k': ('openai/gsm8k', 'main', 'train', 'question', 'answer'),
         'dapo_math': ('open-r1/DAPO-Math-17k-Processed', 'en', 'train', 'prompt', 'solution'),
         'aime_past': ('gneubig/aime-1983-2024', None, 'train', 'Question', 'Answer')}
TEST = {'AIME24': ('Maxwell-Jia/AIME_2024', None, 'train', 'Problem', 'Answer'),
        'AIME25': ('yentinglin/aime_2025', None, 'train', 'problem', 'answer'),
        'OlympiadBench': ('Hothan/OlympiadBench', 'OE_TO_maths_en_COMP', 'train', 'question', 'final_answer'),
        'gsm8k': ('openai/gsm8k', 'main', 'test', 'question', 'answer')}


def rows_of(name, subset, split, question, answer):
    """Rows of a hub data set; those without a question or one final answer are dropped, and counted."""
    dropped = 0
    for row in store.hub(name, subset, split):
        final = row.get(answer)
        final = final[0] if isinstance(final, list) and len(final) == 1 else final
        if not row.get(question) or isinstance(final, (list, type(None))) or not str(final).strip():
            dropped += 1
            continue
        yield {'question': str(row[question]).strip(), 'solution': extract_answer(str(final)), 'source': name}
    if dropped:
        print(f'{name}: {dropped:,} rows dropped: no question, or not one final answer')


def main(args):
    from_hub = store.use_hub(args, 'math')
    for split, sets in (('train', TRAIN), ('test', TEST)):
        for stem in sets:
            if stem not in args.names:
                continue
            make = lambda part, n: ({'question': problem['question'], 'solution': problem['answer'], 'numbers': problem['numbers'],
                                     'signs': problem['signs']} for problem in math.generated(part, n, f'{stem}/{args.seed}', 2))
            store.write(args, 'math', split, stem, rows_of(*sets[stem]) if from_hub else store.generated_rows(args, split, make))


if __name__ == '__main__':
    run_script(lambda _: main(store.arguments(__doc__, dict.fromkeys([*TRAIN, *TEST]))), None)
