#!/usr/bin/env bash
# Trains through the night as train_overnight.sh does, with mixed precision, reworded copies of training rows, a learning rate with restarts
# and early stopping.
#   bash scripts/train_overnight_enhanced.sh --dataset_path my_questions.json
# Arguments go on to train_sft.py; its exit status is this script's, and a signal to this script is one to it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
mkdir -p logs || exit 1
log=logs/train_overnight_enhanced_$(date +%Y%m%d_%H%M%S)_$$.log
echo "log: $log"
exec > >(exec tee -i "$log") 2>&1
exec "${PYTHON:-python}" "$root/train_sft.py" --recipe "$root/recipes/training/sft/theta_enhanced.yaml" "$@"
