#!/bin/bash
# Code, L1: one model, roles by prompt. As it stands it trains the embedded model in minutes; for a real one set base_models below
# (and leave out the recipe, whose lengths and rates are for a model of a million parameters).
# Data: python scripts/dataprocess/load_code.py (without it, problems of our own generator stand in, and the run says so)
set -e
cd "$(dirname "$0")/../../.."

export CUDA_VISIBLE_DEVICES=0
export TOKENIZERS_PARALLELISM=false
GPU_num=1

python train_agents.py recipes/training/agents/code.yaml \
    GPU_num=$GPU_num \
    base_models.policy_0.path=tiny \
    specialization=prompt \
    training.experiment_name=code_L1_prompt \
    env.dataset=code_contests \
    env.benchmark=code_contests \
    "$@"
