#!/usr/bin/env bash
# From nothing to a team, on two CPU cores without a network, in under 20 minutes; ends with out/tour/report.html.
#   bash scripts/tour.sh                # Ctrl-C stops it, the same command goes on
#   bash scripts/tour.sh --out_dir=out/mine --seed=2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec "${PYTHON:-python}" scripts/tour.py "$@"
