"""Puts the repository root on the import path, so that tests import the scripts as users do;
and what several files of tests need."""
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# before torch is imported, and for every run that a test starts: more threads than free cores crawl
os.environ['OMP_NUM_THREADS'] = '1'


@pytest.fixture(scope='module')
def workers():
    """The sandbox's, where the system has what it takes."""
    from configurator import UserError
    from data import sandbox
    try:
        sandbox.start(workers=2)
    except UserError as error:
        pytest.skip(str(error))


# by what a completion says: any two differ, so that there is something to learn
REWARD = 'def score(completions, records):\n    return [sum(map(ord, text)) % 17 / 17 for text in completions]\n'


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A model of two layers with the embedded tokenizer, its weights random, which often stops; and a reward."""
    import torch
    from data.tokenizer import load_tokenizer
    from model import GPT, GPTConfig, find_model, save_model
    folder = str(tmp_path_factory.mktemp('model'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch='qwen3', vocab_size=1024, block_size=256, n_layer=2, n_head=2, n_embd=32, tied=True))
    model.init_weights(0.2)
    tokenizer = load_tokenizer(find_model('tiny'))
    with torch.no_grad():
        model.embed_tokens.weight[sorted(tokenizer.stop_ids)] *= 4
    save_model(model, tokenizer, folder)
    with open(f'{folder}/reward.py', 'w') as file:
        file.write(REWARD)
    return folder


def losses_of(model, idx, steps):
    """The losses of so many steps of AdamW over what trains, on one batch (B, T)."""
    import torch
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(steps):
        loss = -model(idx[:, :-1], idx[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
