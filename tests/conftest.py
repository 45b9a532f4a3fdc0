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
