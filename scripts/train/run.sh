# The scripts beside this one source it: it starts train_agents.py with their lines `team`, with `toy` where all models
# are tiny or else `real`, and then what was typed.
set -e -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export TOKENIZERS_PARALLELISM=false
train=("${PYTHON:-python}" train_agents.py)

for word in "$@"; do
    case $word in *.yaml | *.yml | *.py | --recipe*)
        echo "$0: its lines would win over the settings in $word; run python train_agents.py $word instead" >&2
        exit 2 ;;
    esac
done

models=$("${train[@]}" "${team[@]}" "$@" --print_config | sed -n 's/^ *"path": "\(.*\)"$/\1/p')
others=$(grep -vx tiny <<< "$models" || true)
if [ -z "$others" ]; then
    half=("${toy[@]}")
    echo "$0: the model is tiny, so the half toy: ${toy[*]}" >&2
else
    half=("${real[@]}")
    echo "$0: the model is ${others//$'\n'/ and }, so the half real: ${real[*]}" >&2
fi
exec "${train[@]}" "${half[@]}" "${team[@]}" "$@"
