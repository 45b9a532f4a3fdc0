"""Puts the repository root on the import path, so that tests import the scripts as users do;
and what several files of tests need."""
import os
import signal
import socket
import sys
import traceback

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# before torch is imported, and for every run that a test starts: more threads than free cores crawl
os.environ['OMP_NUM_THREADS'] = '1'
# what is compared to the bit, in ranks that are forks, is computed on the CPU; bench/gpu.py is for the card
os.environ['CUDA_VISIBLE_DEVICES'] = ''


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """A picture takes longer than most of these runs: tests that are marked `pictures` draw theirs."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr('nanoforge.plots.has_matplotlib', lambda: False)


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


def ranks(n, work, of_node=None):
    """work(rank) in n forks of this process that know of each other, as torchrun would start them; fails
    where one of them does."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(n):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                if n > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                                      LOCAL_WORLD_SIZE=str(of_node or n), MASTER_PORT=str(port))
                signal.alarm(100)       # a hang ends, too
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * n
