"""Fine-tuning speed against TRL's SFTTrainer, in pairs on the same machine, the same weights and the same rows.

    python bench/sft.py --trl PYTHON                    supervised tokens per second and peak memory: float32, then bf16 products
    python bench/sft.py --trl PYTHON --tokenise 100000  seconds to render and encode so many rows

PYTHON is an interpreter with TRL in it. The model is a Llama of 3M parameters (4 layers, 256 channels, vocabulary 1,024), the rows are
half tool calls and half questions (about 1,800 tokens in 16 of them), loss on completions, batch 16, AdamW, rows in random order. Each
side runs in a process of its own, in turn; ratios are taken pair by pair. Times are of an epoch of training steps, the first included;
processor seconds, of all threads, are steadier on a machine that others use. floor is the time of the float32 matrix products of a step
of real tokens at the machine's measured rate. The last line is JSON.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

from shared import child, llama_with_words, memory, now, product_seconds, read, resident, trl_clock

BATCH = 16


def write_inputs(directory, steps, count):
    """model/, rows.jsonl (texts, rendered once for both sides) and, to be tokenised, chats.jsonl."""
    from data import chat
    from data.tasks import facts, toolcalls
    tokenizer = llama_with_words(directory)
    if count:
        with open(os.path.join(directory, 'chats.jsonl'), 'w') as file:
            for row in toolcalls.rows('train', count, 'bench'):
                messages = row['messages']
                file.write(json.dumps({'prompt': messages[:-1], 'completion': messages[-1:], 'tools': row['tools']}) + '\n')
    rows = []
    for calls, question in zip(toolcalls.rows('train', steps * BATCH // 2, 'bench'), facts.problems('train', steps * BATCH // 2, 'bench')):
        answer = {'role': 'assistant', 'content': question['answer']}
        rows += [(calls['messages'], calls['tools']), ([*facts.prompt(question), answer], None)]
    with open(os.path.join(directory, 'rows.jsonl'), 'w') as file:
        for messages, tools in rows:
            (prompt, _), (completion, _), *_ = chat.segments(tokenizer, messages, tools)[0]
            file.write(json.dumps({'prompt': prompt, 'completion': completion.rstrip('\n')}) + '\n')


def result(times, counts, start, losses):
    (seconds, processor), targets = (last - first for first, last in zip(times[0], times[-1])), sum(counts)
    return {'seconds_per_step': seconds / (len(times) - 1), 'processor_seconds_per_step': processor / (len(times) - 1),
            'supervised_tokens_per_second': targets / seconds, 'supervised_tokens_per_processor_second': targets / processor,
            **memory(start), 'last_loss': losses}


def trl(directory, options):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    torch.set_num_threads(options.threads)
    path = os.path.join(directory, 'model')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    config = SFTConfig(output_dir=os.path.join(directory, 'out'), per_device_train_batch_size=BATCH, max_steps=options.steps,
                       max_length=384, learning_rate=1e-3, lr_scheduler_type='constant', use_cpu=True, bf16=False, fp16=False,
                       gradient_checkpointing=False, report_to='none', save_strategy='no', dataloader_pin_memory=False,
                       disable_tqdm=True, logging_steps=options.steps)
    if options.tokenise:
        def prepare(count):
            begun = time.perf_counter()
            SFTTrainer(model, args=config, train_dataset=Dataset.from_list(chats[:count]), processing_class=tokenizer)
            return time.perf_counter() - begun
        chats = read(os.path.join(directory, 'chats.jsonl'))
        some = prepare(16)
        return {'seconds': prepare(len(chats)) - some}
    times, counts, logged = [], [], []

    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(read(os.path.join(directory, 'rows.jsonl'))),
                         processing_class=tokenizer, callbacks=[trl_clock(times, logged)])
    collate = trainer.data_collator

    def counted(rows):
        batch = collate(rows)
        counts.append(int((batch['labels'] >= 0).sum()))
        return batch

    trainer.data_collator, start = counted, resident()
    trainer.train()
    return result(times, counts[:options.steps], start, logged[0])


def ours(directory, options):
    import torch

    import train_sft as script
    from configurator import parse
    from data.tokenized import TokenizedRows, encode_records
    from data.formats import read_rows, to_record
    from nanoforge.data_checks import DataIssues
    torch.set_num_threads(options.threads)
    flags = [f'--base_model_name={os.path.join(directory, "model")}', f'--dataset_path={os.path.join(directory, "rows.jsonl")}',
             '--eval_fraction=0', f'--per_device_train_batch_size={BATCH}', '--gradient_accumulation_steps=1', '--learning_rate=1e-3',
             f'--max_steps={options.steps}', f'--matmul={"bf16" if options.child == "ours_bf16" else "float32"}', '--device=cpu']
    cfg = parse(script.Config, [*flags, f'--output_dir={os.path.join(directory, "ours")}'])
    run, cfg = script.open_run(cfg)
    model, tokenizer = script.build_model(cfg, run)
    if options.tokenise:
        path, begun = os.path.join(directory, 'chats.jsonl'), time.perf_counter()
        rows = TokenizedRows()
        encode_records(((0, to_record(row, where)) for where, row in read_rows(path)), tokenizer, rows, DataIssues())
        return {'seconds': time.perf_counter() - begun, 'rows': len(rows.close())}
    sources = script.find_sources(cfg, run)
    rows, _ = script.load_rows(cfg, sources, model, tokenizer, run)
    epochs = script.make_epochs(cfg, rows, sources, run)
    optimizer = script.make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, (cfg.adam_beta1, cfg.adam_beta2))
    counts, losses, start, times = [], [], resident(), [now()]
    for step in range(options.steps):                   # as the loop of train_sft.py, on one rank, without its log
        batches, targets, _ = script.get_batch(cfg, rows, epochs, run, step)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for i, batch in enumerate(batches):
            torch.manual_seed(script.seed_for(cfg.seed, 'noise', step, i, run.rank))
            with run.autocast():
                hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)
                nll = -model.token_stats(hidden, batch.targets, extras=False)['logp'].sum() / targets
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
    tokenizer, rows = load_tokenizer(os.path.join(directory, 'model')), read(os.path.join(directory, 'rows.jsonl'))
    size = lambda text: BATCH * statistics.mean(len(tokenizer.encode(text(row))) for row in rows)
    tokens, supervised = size(lambda row: row['prompt'] + row['completion']), size(lambda row: row['completion'])
    return {'seconds': product_seconds([(3, tokens, supervised)]), 'tokens_of_a_step': tokens, 'supervised': supervised}


def measure(side, directory, options):
    flags = [f'--child={side}', f'--directory={directory}', f'--steps={options.steps}', f'--tokenise={options.tokenise}',
             f'--threads={options.threads}']
    python = options.trl if side == 'trl' else sys.executable
    return child(__file__, *flags, python=python, OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM='true')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trl', help='a Python interpreter with TRL')
    parser.add_argument('--rounds', type=int, default=3, help='pairs of runs')
    parser.add_argument('--steps', type=int, default=48, help='steps a run')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--tokenise', type=int, default=0, help='rows to encode, in place of training')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--directory', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({'trl': trl, 'floor': floor}.get(options.child, ours)(options.directory, options)))
        return
    from nanoforge.run import setup
    has_bf16 = setup('cpu').matmul == 'bf16'
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(directory, options.steps, options.tokenise)
        found = {}
        for _ in range(options.rounds):
            for side in ('trl', 'ours') if options.tokenise else ('trl', 'ours', *['ours_bf16'] * has_bf16):
                found.setdefault(side, []).append(measure(side, directory, options))
                print(side, {key: round(value, 3) for key, value in found[side][-1].items()}, flush=True)
        if options.tokenise:
            ratios = {'tokenise': [t['seconds'] / o['seconds'] for t, o in zip(found['trl'], found['ours'])]}
        else:
            found['floor'] = [measure('floor', directory, options)]
            ratios = {f'{side}/{rate}': [o[rate] / t[rate] for t, o in zip(found['trl'], found[side])]
                      for side in ('ours', 'ours_bf16') if side in found
                      for rate in ('supervised_tokens_per_second', 'supervised_tokens_per_processor_second')}
        print(json.dumps({'ratios': {side: round(statistics.median(values), 2) for side, values in ratios.items()}, 'runs': found}))


if __name__ == '__main__':
    main()
