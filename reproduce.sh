#!/usr/bin/env bash
# The recipe of the experiment: every seed x every arm, then the report. Finished runs are skipped, unfinished ones go on
# from their checkpoint, so this can be stopped with Ctrl-C and started again.
#
#   ./reproduce.sh                                                        3 variants x 8 seeds at the laptop size
#   CONFIG=config/gpu.py ./reproduce.sh                                   the same question on a data-centre GPU
#   SEEDS="0 1 2" VARIANTS="baseline gqa mqa lora enhanced mla" ./reproduce.sh
#   SEEDS="0 1 2" VARIANTS="baseline baseline-again" ./reproduce.sh       A/A: the same seed twice, the noise floor
#   VARIANTS="lora lora+sizes lora+scaling lora+bias enhanced" EXPERIMENT=ablation BASELINE=lora ./reproduce.sh
#
# Seeds outside, variants inside: an interruption leaves whole pairs, and a machine that slows down slows all variants.
set -u
cd "$(dirname "$0")"
CONFIG=${CONFIG:-config/laptop.py}
SEEDS=${SEEDS:-0 1 2 3 4 5 6 7}
VARIANTS=${VARIANTS:-baseline lora enhanced}
EXPERIMENT=${EXPERIMENT:-$(basename "$CONFIG" .py)}
BASELINE=${BASELINE:-baseline}
PYTHON=${PYTHON:-python}

flags_of() {    # an arm's name -> its flags: a variant, or one with a change
    case $1 in
        *-again)      echo "--attn=${1%-again}" ;;
        lora+sizes)   echo "--attn=enhanced --rope_scaling=default --rope_factor=1 --attention_bias=False" ;;
        lora+scaling) echo "--attn=lora --rope_scaling=linear --rope_factor=2" ;;
        lora+bias)    echo "--attn=lora --attention_bias=True" ;;
        *)            echo "--attn=$1" ;;
    esac
}

stop=
trap 'stop=1' TERM      # `timeout` tells this script and the run alike: wait until the run has saved itself

for seed in $SEEDS; do
    for arm in $VARIANTS; do
        [ -z "$stop" ] || exit 143
        # shellcheck disable=SC2046
        $PYTHON train.py "$CONFIG" $(flags_of "$arm") --name="$arm" --seed="$seed" --experiment="$EXPERIMENT" --resume=True "$@"
        status=$?
        case $status in
            0) ;;
            3) echo "reproduce.sh: $arm, seed $seed diverged; going on, the report counts it" >&2 ;;
            *) echo "reproduce.sh: stopped at $arm, seed $seed (exit status $status)" >&2; exit $status ;;
        esac
    done
done
$PYTHON analyze.py "out/$EXPERIMENT" --baseline="$BASELINE"
