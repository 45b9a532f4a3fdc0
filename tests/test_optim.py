"""Optimizers against torch.optim's trajectories, Muon against its definition, schedules against hand-computed values."""
import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import optim
from configurator import UserError
from optim import AdamW, Muon, Plateau, SGD, learning_rate, make_optimizer


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.down(torch.tanh(self.up(q * k + v)))


class Net(nn.Module):
    """A tied embedding, two blocks, odd sizes (padding), a frozen parameter, one that takes no part."""

    def __init__(self, width=6, vocab=7, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, width)
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.to(dtype)

    def loss(self, step):
        x = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(step))
        h = self.embed(x)
        for block in self.h:
            h = block(h)
        return nn.functional.cross_entropy(self.lm_head(h).flatten(0, 1), (x * 3 + 1).flatten() % 7) * 20


def groups(net, **extra):
    """A decayed group and an undecayed one with its own rate, as torch's users write them."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad and name != 'unused']
    return [{'params': [p for _, p in trained if p.dim() > 1], 'weight_decay': 0.3, **extra},
            {'params': [p for _, p in trained if p.dim() < 2], 'weight_decay': 0.0, 'lr': 0.002, **extra}]


def same_trajectory(ours, theirs, optimizer, reference, steps=50):
    for step in range(steps):
        for net, opt in ((ours, optimizer), (theirs, reference)):
            for group in opt.param_groups:
                group['lr'] *= 0.99
            opt.zero_grad()
            net.loss(step).backward()
            opt.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            assert (a - b).abs().max() < 1e-12, (step, name)
    assert (ours.embed.weight - Net().embed.weight).abs().max() > 0.01  # it did move


@pytest.mark.parametrize('betas', [(0.9, 0.99), (0.8, 0.95)])
def test_adamw_follows_torch(betas):
    ours, theirs = Net(), Net()
    same_trajectory(ours, theirs, AdamW(groups(ours), 0.01, betas, 1e-5, 0.1),
                    torch.optim.AdamW(groups(theirs), 0.01, betas, 1e-5, 0.1))


@pytest.mark.parametrize('momentum,nesterov', [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_follows_torch(momentum, nesterov):
    ours, theirs = Net(), Net()
    same_trajectory(ours, theirs, SGD(groups(ours), 0.01, momentum, nesterov),
                    torch.optim.SGD(groups(theirs), 0.01, momentum, nesterov=nesterov))


def test_chunks_change_nothing(monkeypatch):
    whole, parts = Net(), Net()
    first = AdamW(whole.parameters(), 0.01)
    monkeypatch.setattr(optim, 'CHUNK', 50)
    second = AdamW(parts.parameters(), 0.01)
    assert len(second.flats[0].chunks) > 5 and len(first.flats[0].chunks) == 1
    for net, optimizer in ((whole, first), (parts, second)):
        net.loss(0).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
