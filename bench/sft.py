"""Fine-tuning speed against TRL's SFTTrainer, in pairs on the same machine, the same weights and the same
rows.

    python bench/sft.py --trl PYTHON                    supervised tokens per second and peak memory: float32,
                                                        then bf16 products
    python bench/sft.py --trl PYTHON --tokenise 100000  seconds to render and encode so many rows

PYTHON is an interpreter with TRL in it. The model is a Llama of 3M parameters (4 layers, 256 channels,
vocabulary 1,024), the rows are half tool calls and half questions (about 1,800 tokens in 16 of them), loss
on completions, batch 16, AdamW, rows in random order. Each side runs in a process of its own, in turn;
ratios are taken pair by pair. Times are of an epoch of training steps, the first included; processor
seconds, of all threads, are steadier on a machine that others use. floor is the time of the float32 matrix
products of a step of real tokens at the machine's measured rate. The last line is JSON.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

from shared import (child, has_bf16, llama_with_words, memory, now, peak, product_seconds, read, rendered,
                    resident, training_flags, trl_clock, trl_trainer)

BATCH = 16
RATES = ('supervised_tokens_per_second', 'supervised_tokens_per_processor_second')


# ---- the inputs, the same for both sides ---------------------------------------------------------------

def model_in(directory):
    return os.path.join(directory, 'model')


def rows_in(directory):
    return os.path.join(directory, 'rows.jsonl')


def chats_in(directory):
    return os.path.join(directory, 'chats.jsonl')


def chats(count):
    """TRL's form of `count` tool calls, which are still to be rendered."""
    from data.tasks import toolcalls
    for row in toolcalls.rows('train', count, 'bench'):
        *prompt, reply = row['messages']
        yield {'prompt': prompt, 'completion': [reply], 'tools': row['tools']}


def conversations(count):
    """(messages, tools) of `count` tool calls and as many questions, in turn."""
    from data.tasks import facts, toolcalls
    calls = toolcalls.rows('train', count, 'bench')
    questions = facts.problems('train', count, 'bench')
    for call, question in zip(calls, questions):
        yield call['messages'], call['tools']
        yield [*facts.prompt(question), {'role': 'assistant', 'content': question['answer']}], None


def write_inputs(directory, steps, count):
    """model/, rows.jsonl (texts, rendered once for both sides) and, to be tokenised, chats.jsonl."""
    tokenizer = llama_with_words(directory)
    if count:
        with open(chats_in(directory), 'w', encoding='utf-8') as file:
            for row in chats(count):
                file.write(json.dumps(row) + '\n')
    with open(rows_in(directory), 'w', encoding='utf-8') as file:
        for messages, tools in conversations(steps * BATCH // 2):
            prompt, completion = rendered(tokenizer, messages, tools)
            file.write(json.dumps({'prompt': prompt, 'completion': completion}) + '\n')


# ---- the sides -----------------------------------------------------------------------------------------

def result(times, targets, start, loss):
    """times: now() before the first step and after each; targets: supervised tokens of each."""
    seconds, processor = (last - first for first, last in zip(times[0], times[-1]))
    steps = len(times) - 1
    return {'seconds_per_step': seconds / steps,
            'processor_seconds_per_step': processor / steps,
            'supervised_tokens_per_second': sum(targets) / seconds,
            'supervised_tokens_per_processor_second': sum(targets) / processor,
            **memory(start, peak()),
            'last_loss': loss}


def trl(directory, options):
    import torch
    torch.set_num_threads(options.threads)
    settings = dict(
        output_dir=os.path.join(directory, 'out'),
        per_device_train_batch_size=BATCH,
        max_steps=options.steps,
        logging_steps=options.steps,
        max_length=384,
        learning_rate=1e-3)

    def trainer_of(rows, **more):
        return trl_trainer('SFT', model_in(directory), rows, settings, **more)

    def seconds_to_prepare(rows):
        begun = time.perf_counter()
        trainer_of(rows)
        return time.perf_counter() - begun

    if options.tokenise:
        rows = read(chats_in(directory))
        trainer_of(rows[:16])                       # imports, and reads the model for the first time
        some = seconds_to_prepare(rows[:16])        # what a trainer takes for any rows
        return {'seconds': seconds_to_prepare(rows) - some}
    times, targets, logged = [], [], []
    trainer = trainer_of(read(rows_in(directory)), callbacks=[trl_clock(times, logged)])
    collate = trainer.data_collator

    def counted(rows):
        batch = collate(rows)
        targets.append(int((batch['labels'] >= 0).sum()))
        return batch

    trainer.data_collator = counted
    start = resident()
    trainer.train()
    return result(times, targets[:options.steps], start, logged[0])


def our_flags(directory, options):
    matmul = 'bf16' if options.child == 'ours_bf16' else 'float32'
    return training_flags(model_in(directory), rows_in(directory), os.path.join(directory, 'ours'), BATCH,
                          options.steps, rate=1e-3, matmul=matmul)


def seconds_to_tokenise(path, tokenizer):
    """From the file to encoded rows, as train_sft.py does it."""
    from data.formats import read_rows, to_record
    from data.tokenized import TokenizedRows, encode_records
    from nanoforge.data_checks import DataIssues
    begun = time.perf_counter()
    rows = TokenizedRows()
    records = ((0, to_record(row, where)) for where, row in read_rows(path))
    encode_records(records, tokenizer, rows, DataIssues())
    return {'seconds': time.perf_counter() - begun, 'rows': len(rows.close())}


def ours(directory, options):
    import torch

    import train_sft as script
    from configurator import parse
    torch.set_num_threads(options.threads)
    run, cfg = script.open_run(parse(script.Config, our_flags(directory, options)))
    model, tokenizer = script.build_model(cfg, run)
    if options.tokenise:
        return seconds_to_tokenise(chats_in(directory), tokenizer)
    sources = script.find_sources(cfg, run)
    rows, _ = script.load_rows(cfg, sources, model, tokenizer, run)
    epochs = script.make_epochs(cfg, rows, sources, run)
    optimizer = script.make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay,
                                      (cfg.adam_beta1, cfg.adam_beta2))
    counts, losses = [], []
    start, times = resident(), [now()]
    for step in range(options.steps):           # as the loop of train_sft.py, on one rank, without its log
        batches, targets, _ = script.get_batch(cfg, rows, epochs, run, step)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for i, batch in enumerate(batches):
            torch.manual_seed(script.seed_for(cfg.seed, 'noise', step, i, run.rank))
            with run.autocast():
                hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)
                logp = model.token_stats(hidden, batch.targets, extras=False)['logp']
                nll = -logp.sum() / targets
            run.backward(nll)
            loss += nll.detach()
        run.step(optimizer, cfg.learning_rate, cfg.max_grad_norm, zero_grad=False)
        losses.append(loss)
        times.append(now())
        counts.append(targets)
    return result(times, counts, start, float(torch.stack(losses).mean()))


def floor(directory, options):
    """Seconds that the float32 products of a step take alone, forward and backward."""
    import torch

    from data.tokenizer import load_tokenizer
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(model_in(directory))
    rows = read(rows_in(directory))

    def tokens_of(texts):
        """In a step, on average."""
        return BATCH * statistics.mean(len(tokenizer.encode(text)) for text in texts)

    tokens = tokens_of(row['prompt'] + row['completion'] for row in rows)
    supervised = tokens_of(row['completion'] for row in rows)
    seconds = product_seconds([(1, 1, tokens, supervised)])
    return {'seconds': seconds, 'tokens_of_a_step': tokens, 'supervised': supervised}


# ---- the pairs -----------------------------------------------------------------------------------------

def measure(side, directory, options):
    """What the side prints, in a process of its own."""
    flags = [f'--child={side}', f'--directory={directory}', f'--steps={options.steps}',
             f'--tokenise={options.tokenise}', f'--threads={options.threads}']
    python = options.trl if side == 'trl' else sys.executable
    return child(__file__, *flags, python=python, OMP_NUM_THREADS=str(options.threads),
                 TOKENIZERS_PARALLELISM='true')


def sides_of(options):
    if not options.tokenise and has_bf16():
        return ['trl', 'ours', 'ours_bf16']
    return ['trl', 'ours']


def ratios_of(found):
    """{what: ours against TRL, above 1 where ours is faster, of every pair}"""
    if 'floor' not in found:
        pairs = zip(found['trl'], found['ours'])
        return {'tokenise': [theirs['seconds'] / own['seconds'] for theirs, own in pairs]}
    ratios = {}
    for side in ('ours', 'ours_bf16'):
        for rate in RATES if side in found else ():
            pairs = zip(found['trl'], found[side])
            ratios[f'{side}/{rate}'] = [own[rate] / theirs[rate] for theirs, own in pairs]
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--rounds', type=int, default=3, help='pairs of runs')
    parser.add_argument('--steps', type=int, default=48, help='steps a run')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--tokenise', type=int, default=0, help='rows to encode, in place of training')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--directory', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = {'trl': trl, 'floor': floor}.get(options.child, ours)
        print(json.dumps(run(options.directory, options)))
        return
    sides, found = sides_of(options), {}
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(directory, options.steps, options.tokenise)
        for _ in range(options.rounds):
            for side in sides:
                run = measure(side, directory, options)
                found.setdefault(side, []).append(run)
                print(side, {key: round(value, 3) for key, value in run.items()}, flush=True)
        if not options.tokenise:
            found['floor'] = [measure('floor', directory, options)]
    ratios = {name: round(statistics.median(values), 2) for name, values in ratios_of(found).items()}
    print(json.dumps({'ratios': ratios, 'runs': found}))


if __name__ == '__main__':
    main()
