"""The proof that a model is the same here and in transformers: python model.py --check NAME_OR_PATH.

Each row compares two ways to compute one thing in float32; a difference counts relative to the largest logit
(or, for log-probabilities, as it is). Exit status 0 if all of them agree, 1 if not.
"""
import argparse
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from configurator import run_script
from model import GPT, load_model, save_model
from nanoforge.decode import make_decoder
from nanoforge.hf import config_to_hf, find_model
from nanoforge.lora import add_lora, merge_lora
from sample import generate, logp_gap

LOGITS, LOGP = 1e-5, 1e-4       # what rounding in another order may do: relative to the largest logit; nats


def difference(a, b):
    """max |a - b| over max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def theirs_of(directory):
    """transformers' own model of a directory, and the keys of its weights that did not match."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation='eager', output_loading_info=True,
        trust_remote_code=False)
    return theirs.eval(), sorted(str(key) for keys in info.values() for key in keys)


@torch.no_grad()
def comparisons(name):
    """Yields (what is compared, difference or None where it does not apply, allowed, remark)."""
    model, tokenizer = load_model(name)
    cfg = model.config
    window = getattr(cfg, 'sliding_window', 0)
    T = min(cfg.block_size, max(48, min(window + 16, 1024)))
    idx = torch.randint(0, cfg.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    remark = (f'{cfg.arch}, {model.num_params():,} parameters, context {cfg.block_size:,}, '
              f'vocabulary {cfg.vocab_size:,}')
    yield remark, None, None, None
    logits = model(idx)
    # whether transformers knows it, too
    known = not isinstance(model, GPT) or config_to_hf(cfg)['model_type'] != 'nanoforge'
    if known:
        theirs, _ = theirs_of(find_model(name))
        yield 'logits here = in transformers', difference(logits, theirs(idx).logits), LOGITS, f'{T} tokens'
        del theirs
    cut = T // 3
    positions = torch.cat([torch.arange(cut), torch.arange(T - cut)]).expand(2, T)
    alone = torch.cat([model(idx[:, :cut]), model(idx[:, cut:])], 1)
    packed = model(idx, positions=positions)
    yield 'packed documents = each alone', difference(packed, alone), LOGITS, '2 documents a row'
    targets = idx.roll(-1, 1)
    logp = logits.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    gap = (model(idx, targets) - logp).abs().max().item()
    yield 'log-probabilities = softmax of the logits', gap, LOGP, ''
    if isinstance(model, GPT):
        start = T // 2
        decoder = make_decoder(model, idx[:, :start].tolist(), 1, T - start)
        steps = [decoder.start(), *(decoder.step(idx[:, t].clone()) for t in range(start, T))]
        apart = difference(torch.stack(steps, 1), logits[:, start - 1:])
        yield 'with a key/value cache = at once', apart, LOGITS, f'{start} tokens, then one by one'
    prompts = [row[:T // 2].tolist() for row in idx]
    new = min(16, cfg.block_size - T // 2)
    gap = logp_gap(model, prompts, generate(model, prompts, new))[0]
    yield 'log-probabilities as sampled = as trained', gap, LOGP, f'{new} new tokens'
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, tokenizer, directory)
        if known:
            theirs, strange = theirs_of(directory)
            remark = f'{len(strange)} keys that do not fit: {strange[0]}' if strange else 'every key fits'
            apart = float('inf') if strange else difference(theirs(idx).logits, logits)
            yield 'saved here = opened in transformers', apart, LOGITS, remark
            del theirs
        reloaded, _ = load_model(directory)
        yield 'saved here = opened here', difference(reloaded(idx), logits), 0.0, 'bit for bit'
    add_lora(model, r=4, alpha=8, target_modules='all-linear')
    for key, p in model.named_parameters():
        if 'lora' in key:
            p.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(key)))
    adapted = model(idx)
    merge_lora(model)
    moved = difference(adapted, logits)
    apart = difference(model(idx), adapted)
    yield 'adapter merged = adapter beside', apart, LOGITS, f'it moves logits by {moved:.0e}'


def check(name):
    """Prints the table; True if every row is within what is allowed."""
    good = True
    for what, value, allowed, remark in comparisons(name):
        if value is None:
            print(f'{name}: {what}\n\n{"":45}{"difference":>11}{"allowed":>9}')
            continue
        passed = value <= allowed
        good &= passed
        verdict = 'PASS' if passed else 'FAIL'
        print(f'{what:45}{value:>11.1e}{allowed:>9.0e}  {verdict}  {remark}'.rstrip(), flush=True)
    print('\nThe same model in every way.' if good else '\nNot the same model: see the rows that say FAIL.')
    return good


def main():
    parser = argparse.ArgumentParser(prog='model.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--check', metavar='NAME_OR_PATH', required=True, help='a hub name, a directory, or '
                                                                               'tiny')
    args = parser.parse_args()

    def go(_):
        raise SystemExit(0 if check(args.check) else 1)
    run_script(go, args)


if __name__ == '__main__':
    main()
