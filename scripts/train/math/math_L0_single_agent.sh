#!/bin/bash
# Math, L0: a single agent. As it stands it trains the embedded model in minutes; for a real one set base_models below
# (and leave out the recipe, whose lengths and rates are for a model of a million parameters).
# Data: python scripts/dataprocess/load_math.py (without it, problems of our own generator stand in, and the run says so)
set -e
cd "$(dirname "$0")/../../.."

export CUDA_VISIBLE_DEVICES=0
export TOKENIZERS_PARALLELISM=false
GPU_num=1

python train_agents.py recipes/training/agents/math.yaml \
    GPU_num=$GPU_num \
    base_models.policy_0.path=tiny \
    specialization=prompt \
    turn_order=reasoner \
    training.experiment_name=math_L0_single_agent \
    env.dataset=polaris \
    env.benchmark=AIME24 \
    "$@"
