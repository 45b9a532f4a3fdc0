"""What --plan says beside what a run takes: peak memory of fine-tuning, DPO and GRPO of a real model, all
weights and LoRA.

    python bench/plan.py MODEL [--only sft dpo rl] [--steps 3]

MODEL is a Hugging Face directory, such as SmolLM2-135M-Instruct's. Rows are those of bench/real.py: 4 chats
of about 310 tokens a step; 2 pairs of such chats, with a frozen copy as the reference (adapters off under
LoRA); GRPO on the embedded sums, 16 completions of at most 48 tokens a step, with a KL term and so a
reference. In float32, on the CPU, each in a process of its own, which first makes the plan and then the run.

`start` is what a process holds after `import torch`, `peak` all that it ever held until the end of its last
step, the loading of the model included; `saved` the same with the last checkpoint. `error` is of the plan
against `peak`.
"""
import argparse
import importlib
import json
import os
import tempfile

from shared import child, clock_steps, peak, resident, training_flags

SCRIPTS = {'sft': 'train_sft', 'dpo': 'train_dpo', 'rl': 'train_rl'}
MIB = 2 ** 20


def measure(script, flags):
    """The plan of a command line, and what the run then takes, in bytes."""
    import torch                # noqa: F401 -- so that `start` is what a bare process holds
    start = resident()
    module = importlib.import_module(script)
    from configurator import parse
    plan = module.main(parse(module.Config, [*flags, '--plan']))
    peaks = []
    clock_steps(module.Run, [], peaks)
    module.main(parse(module.Config, flags))
    print(json.dumps({'plan': plan, 'start': start, 'peak': peaks[-1], 'saved': peak()}))


def flags_of(task, model, directory, steps):
    output = os.path.join(directory, f'{task}-out')
    if task == 'rl':
        return [f'--base_model_name={model}', f'--output_dir={output}', '--per_device_train_batch_size=16',
                '--gradient_accumulation_steps=1', '--beta=0.04', f'--max_steps={steps}', '--warmup_steps=0',
                '--eval_steps=0', '--eval_problems=4', '--num_problems=200', f'--logging_steps={steps}',
                '--matmul=float32', '--device=cpu', '--tensorboard=false']
    data = os.path.join(directory, f'{task}.jsonl')
    flags = training_flags(model, data, output, {'sft': 4, 'dpo': 2}[task], steps, 1e-5, 'float32')
    return flags + ['--apply_chat_template=false', '--prediction_loss_only'] * (task == 'dpo')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', help='a Hugging Face directory')
    parser.add_argument('--only', nargs='+', choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument('--steps', type=int, default=3, help='optimizer steps of each run')
    parser.add_argument('--measure', choices=SCRIPTS.values(), help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.measure:
        return measure(options.measure, flags)
    from real import write_inputs
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(options.model, directory, options.steps)
        print(f'{"MiB":16}{"start":>8}{"peak":>8}{"saved":>8}{"plan":>8}{"error":>8}')
        for task in options.only:
            for mode in ('full', 'lora'):
                flags = flags_of(task, options.model, directory, options.steps)
                flags += ['--use_lora'] * (mode == 'lora')
                row = found[f'{task}/{mode}'] = child(__file__, f'--measure={SCRIPTS[task]}', *flags)
                planned = row['plan']['peak']
                sizes = ''.join(f'{row[key] / MIB:8,.0f}' for key in ('start', 'peak', 'saved'))
                error = planned / row['peak'] - 1
                print(f'{task:8}{mode:8}{sizes}{planned / MIB:8,.0f}{error:+8.1%}', flush=True)
    print(json.dumps(found))


if __name__ == '__main__':
    main()
