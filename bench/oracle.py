"""Proof that a change of the code changed no run: two checkouts must leave the same weights and numbers.

    git worktree add OLD_CHECKOUT COMMIT
    python bench/oracle.py record BASELINE.json OLD_CHECKOUT
    python bench/oracle.py compare BASELINE.json . [--only WORD] [--rtol 1e-6]

Both on the same machine: weights depend on the processor. Short runs of every script, on one thread in a
scratch folder, give the SHA-256 of each *.safetensors that they leave, the numbers of log.jsonl that are no
times, and their exit status. A difference is printed with the first numbers that differ.

The commands are documented ones, which do not change with the code. {out} is a run's own folder, {dir} the
scratch folder of all. A run that fails, or leaves nothing, is never "the same". Of the runs in RESUMED a
checkpoint of the old code is kept beside the baseline (BASELINE.json.d), and the new code goes on with it.
--rtol is for sums in another order: weights are then not compared, and the largest difference of a number is
printed.
"""
import argparse
import concurrent.futures
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

GPT = ['train_gpt.py', '--out_dir={out}', '--max_iters=12', '--eval_interval=6', '--eval_iters=2',
       '--log_interval=1',
       '--batch_size=6', '--sample_tokens=0', '--tensorboard=false']
SFT = ['train_sft.py', '--output_dir={out}', '--max_steps=5', '--logging_steps=1', '--eval_steps=4',
       '--sample_rows=0',
       '--per_device_train_batch_size=4', '--gradient_accumulation_steps=2', '--report_to=none']
DPO = ['train_dpo.py', 'training.output_dir={out}', 'training.max_steps=4', 'training.logging_steps=1',
       '--per_device_train_batch_size=8']
RL = ['train_rl.py', 'training.output_dir={out}', 'training.max_steps=3', 'training.logging_steps=1',
      'training.per_device_train_batch_size=16', 'training.gradient_accumulation_steps=2',
      'data.num_problems=64',
      'data.eval_problems=8', 'training.eval_steps=2']
AGENTS = ['train_agents.py', 'training.experiment_name={name}', 'training.total_training_steps=2',
          'training.epoch_size=3', 'training.train_batch_size=8', 'training.val_freq=1',
          'training.max_response_length=32', 'training.train_sample_num=3', 'env.max_turns=2']
CHAR = 'shakespeare_char'
LORA = 'model.use_lora=true'
RUNS = {
    'gpt-default': GPT,
    'gpt-gpt2-dropout-sgd': [*GPT, '--arch=gpt2', '--bias=true', '--dropout=0.1', '--optimizer=sgd',
                             '--learning_rate=0.05', '--lr_scheduler=exponential'],
    'gpt-muon-cosine': [*GPT, '--optimizer=muon', '--decay_lr', '--lr_decay_iters=12', '--warmup_iters=3',
                        '--gradient_accumulation_steps=2', '--ema=0.9'],
    'gpt-multidataset': [*GPT, '--training_mode=multidataset', '--dataset_list', CHAR, CHAR,
                         '--dataset_sampling_probs', '0.3', '0.7'],
    'gpt-multicontext': [*GPT, '--training_mode=multicontext', '--multicontext_datasets', CHAR, CHAR],
    'sft-default': SFT,
    'sft-extras': [*SFT, '--neftune_noise_alpha=5', '--label_smoothing=0.1', '--ema=0.9', '--dropout=0.1',
                   '--packing',
                   '--max_length=256', '--lr_scheduler_type=linear'],
    'sft-lora': [*SFT, LORA, 'model.lora_dropout=0.1', '--group_by_length=true', '--loss_on=assistant'],
    'sft-qlora': [*SFT, LORA, 'model.load_in_4bit=true', '--max_steps=2'],
    'sft-two-ranks': [*SFT, '--num-gpus', '2'],
    'dpo-default': DPO,
    'dpo-cache-ipo': [*DPO, 'training.reference=cache', '--loss_type=ipo'],
    'dpo-lora-simpo': [*DPO, LORA, '--loss_type=simpo', '--gamma=1', '--beta=2'],
    'dpo-two-ranks': [*DPO, '--num-gpus', '2'],
    'rl-grpo-kl': [*RL, 'training.beta=0.04', 'training.steps_per_generation=4'],
    'rl-gspo': [*RL, 'training.algorithm=gspo', 'training.num_iterations=2'],
    'rl-dapo': [*RL, 'training.algorithm=dapo'],
    'rl-rloo': [*RL, 'training.algorithm=rloo', 'training.beta=0.05'],
    'rl-lora-default': [*RL, LORA],
    'sft-float32': [*SFT, '--matmul=float32'],
    'rl-float32': [*RL, '--matmul=float32'],
    'sft-csv': [*SFT, '--dataset_path={dir}/rows.csv'],
    'rl-lora': [*RL, LORA, 'model.lora_target_modules=all-linear', 'training.beta=0.02'],
    'rl-ppo': [*RL, 'training.algorithm=ppo', 'model.value_model_name=tiny', 'training.entropy_coef=0.01'],
    'rl-ppo-shared': [*RL, 'training.algorithm=ppo', 'model.value_model_name=tiny',
                      'training.share_critic=true',
                      'training.num_iterations=2'],
    'rl-two-ranks': [*RL, '--num-gpus', '2'],
    'agents-prompt': [*AGENTS, 'env.benchmark=plan_path'],
    'agents-no-tree': [*AGENTS, 'env.benchmark=sokoban', 'rollout_mode=no_tree'],
    'agents-lora': [*AGENTS, 'env.benchmark=plan_path', 'specialization=lora'],
    'agents-full': [*AGENTS, 'env.benchmark=sudoku', 'specialization=full'],
    'agents-sharded': [*AGENTS, 'env.benchmark=plan_path', 'GPU_num=2'],
    'agents-math': [*AGENTS, 'env.dataset=polaris', 'env.benchmark=AIME24'],
}
RESUMED = {     # name: (what the old code runs, how the new code goes on)
    'resume-gpt': (GPT, ['train_gpt.py', '--init_from=resume', '--out_dir={out}', '--max_iters=18']),
    'resume-sft': ([*SFT, '--save_steps=2'],
                   ['train_sft.py', '--resume', '--output_dir={out}', '--max_steps=8']),
    'resume-sft-lora': ([*SFT, LORA], ['train_sft.py', '--resume', '--output_dir={out}', '--max_steps=8']),
    'resume-dpo': (DPO, ['train_dpo.py', '--resume', '--output_dir={out}', '--max_steps=6']),
    'resume-rl': (RL, ['train_rl.py', '--resume', '--output_dir={out}', '--max_steps=5']),
    'resume-rl-lora': ([*RL, LORA], ['train_rl.py', '--resume', '--output_dir={out}', '--max_steps=5']),
}
TEXTS = {       # what these print is compared
    'evaluate': ['evaluate.py', 'tiny', '--max_samples=8'],
    'sample': ['sample.py', 'tiny', '--prompt=What is 12 plus 7?', '--max_new_tokens=24', '--seed=3'],
}
TIMES = ('second', 'runtime', 'time', 'mfu', 'date')        # in the names of numbers that may differ


def start(argv, root, python):
    """(exit status, stdout, stderr) of a command of a checkout."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    try:
        done = subprocess.run([python, *argv], cwd=root, env=env, capture_output=True, text=True, timeout=900)
        return done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        return 124, '', 'no end in 900 s'


def result_of(name, root, python, scratch, kept, record):
    """What a run leaves: {'exit', 'weights': {file: [hash]}, 'numbers': [line], 'stderr'}, of TEXTS also
    'text'."""
    out, logs = os.path.join(scratch, name), os.path.join(root, 'logs', f'oracle_{name}')

    def run(argv):
        fills = {'{out}': out, '{dir}': scratch, '{name}': f'oracle_{name}'}
        for key, value in fills.items():
            argv = [word.replace(key, value) for word in argv]
        return start(argv, root, python)

    if name in TEXTS:
        code, stdout, stderr = run(TEXTS[name])
        lines = [line for line in stdout.splitlines() if '%' in line or name == 'sample' and line.strip()]
        return {'exit': code, 'weights': {}, 'numbers': [{'lines': len(lines)}],
                'text': digest('\n'.join(lines).encode()), 'stderr': stderr[-300:] if code else ''}
    shutil.rmtree(logs, ignore_errors=True)
    argv = RUNS.get(name)
    if name in RESUMED:
        first, argv = RESUMED[name]
        begun = os.path.join(kept, name)
        if record:
            shutil.rmtree(begun, ignore_errors=True)
            code, _, stderr = run(first)
            if code:
                return {'exit': code, 'weights': {}, 'numbers': [], 'stderr': stderr[-600:]}
            shutil.move(out, begun)
        shutil.copytree(begun, out, symlinks=True)
    code, _, stderr = run(argv)
    folder = out if os.path.isdir(out) else logs
    result = {'exit': code, 'weights': weights_in(folder), 'numbers': numbers_in(folder),
              'stderr': stderr[-600:] if code else ''}
    shutil.rmtree(logs, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    return result


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def weights_in(folder):
    """{file name: sorted hashes of the files of that name}, links left out."""
    weights = {}
    for path in sorted(glob.glob(os.path.join(folder, '**', '*.safetensors'), recursive=True)):
        name, parent = os.path.basename(path), os.path.realpath(os.path.dirname(path))
        is_link = os.path.islink(path) or os.path.realpath(path) != os.path.join(parent, name)
        if not is_link and '/earlier-' not in path:
            with open(path, 'rb') as file:
                weights.setdefault(name, set()).add(digest(file.read()))
    return {name: sorted(hashes) for name, hashes in weights.items()}


def numbers_in(folder):
    """The numbers of each line of each log.jsonl, but for times."""
    numbers = []
    for path in sorted(glob.glob(os.path.join(folder, '**', 'log.jsonl'), recursive=True)):
        with open(path, encoding='utf-8') as file:
            for row in map(json.loads, file):
                numbers.append({key: value for key, value in row.items() if isinstance(value, (int, float))
                                and not any(word in key for word in TIMES)})
    return numbers


def differences(old, new, rtol):
    if old['exit'] or new['exit']:
        said = new.get('stderr') or old.get('stderr', '')
        yield f'exit {old["exit"]} -> {new["exit"]}: {said[-300:]}'
        return
    if not new['numbers']:
        yield 'nothing was left'
    if old.get('text') != new.get('text'):
        yield 'other text'
    for name in () if rtol else sorted(set(old['weights']) | set(new['weights'])):
        if set(old['weights'].get(name, ())) != set(new['weights'].get(name, ())):
            yield f'{name}: other weights'
    worst, place = 0.0, ''
    for i, (before, after) in enumerate(zip(old['numbers'], new['numbers'])):
        if missing := sorted(before.keys() - after.keys()):
            yield f'log line {i + 1} lacks {", ".join(missing[:4])}'
            break
        for key, a in before.items():
            b = after[key]
            both_nan = a != a and b != b
            if a != b and not both_nan:
                relative = abs(a - b) / max(abs(a), abs(b), 1e-30)
                if not relative <= worst:       # a NaN on one side is the worst of all
                    worst, place = relative, f'log line {i + 1}, {key}: {a} -> {b}'
    if not worst <= (rtol or 0):
        yield f'largest difference {worst:.1e}, {place}'
    if len(old['numbers']) != len(new['numbers']):
        yield f'log lines {len(old["numbers"])} -> {len(new["numbers"])}'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('verb', choices=('record', 'compare'))
    parser.add_argument('baseline')
    parser.add_argument('root', nargs='?', default='.', help='a checkout')
    parser.add_argument('--only', default='', help='runs with this word in their name')
    parser.add_argument('--rtol', type=float, default=0.0)
    parser.add_argument('--python', default=sys.executable)
    args = parser.parse_args()
    root, record = os.path.abspath(args.root), args.verb == 'record'
    names = [name for name in (*RUNS, *RESUMED, *TEXTS) if args.only in name]
    kept = os.path.abspath(args.baseline) + '.d'
    os.makedirs(kept, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        with open(os.path.join(scratch, 'rows.csv'), 'w', encoding='utf-8') as file:
            file.write('question,answer\n')
            file.writelines(f'"what is {i} plus {i}?","it is {2 * i}"\n' for i in range(60))
        jobs = {name: pool.submit(result_of, name, root, args.python, scratch, kept,
                                  record) for name in names}
        results = {name: job.result() for name, job in jobs.items()}
    baseline = {}
    if os.path.exists(args.baseline):
        with open(args.baseline, encoding='utf-8') as file:
            baseline = json.load(file)
    if record:
        with open(args.baseline, 'w', encoding='utf-8') as file:
            json.dump({**baseline, **results}, file, indent=1)
        for name, result in results.items():
            count = sum(map(len, result['weights'].values()))
            print(f'{name:24} exit {result["exit"]}, {count} files of weights, {len(result["numbers"])} log '
                  f'lines {result["stderr"][-200:]}')
        return 0
    broken = 0
    for name, result in results.items():
        found = ['not in the baseline']
        if name in baseline:
            found = list(differences(baseline[name], result, args.rtol))
        broken += bool(found)
        print(f'{name:24} {" | ".join(found) or "the same"}')
    print(f'{len(names) - broken} of {len(names)} runs are the same')
    return int(broken > 0)


if __name__ == '__main__':
    sys.exit(main())
