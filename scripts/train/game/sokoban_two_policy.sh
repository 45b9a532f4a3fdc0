#!/bin/bash
# Sokoban with two policies, one per agent. As it stands it trains the embedded model in minutes; for a real one set base_models below
# (and leave out the recipe, whose lengths and rates are for a model of a million parameters).
set -e
cd "$(dirname "$0")/../../.."

export CUDA_VISIBLE_DEVICES=0
export TOKENIZERS_PARALLELISM=false
GPU_num=1

python train_agents.py recipes/training/agents/sokoban.yaml \
    GPU_num=$GPU_num \
    base_models.policy_0.path=tiny \
    base_models.policy_1.path=tiny \
    specialization=full \
    demonstrations.batch_size=128 \
    training.experiment_name=sokoban_two_policy \
    env.dataset=sokoban \
    env.benchmark=sokoban \
    "$@"
