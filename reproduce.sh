#!/usr/bin/env bash
# The recipe of an experiment: runs what a plan lists, then prints the report. Can be stopped with Ctrl-C and started again:
# finished runs are skipped, unfinished ones go on from their checkpoint.
#
#   ./reproduce.sh                                      config/laptop.plan, one run at a time
#   JOBS=2 OMP_NUM_THREADS=1 ./reproduce.sh             two runs side by side, one thread each
#   ./reproduce.sh rates                                first the plan's learning rates, on a seed that does not count
#   PLAN=config/gpu.plan ./reproduce.sh --dataset=/data/code       another plan; flags go to every run
#   KEEP=results/laptop ./reproduce.sh                  copy results there as ARM-sSEED.json; what is there is not run again
#   ARMS="mqa mla48" ./reproduce.sh                     only these arms: one comparison is complete before the others begin
#
# A plan is a text file of lines `word value`, # for comments:
#   config      every run's config file, or left out     experiment  the folder of the runs below out/
#   seeds       of the arms                              margin, contrasts, may_differ    as in analyze.py, or left out
#   rates       of the search, on seed rates_seed for rates_steps updates
#   arm         NAME RATE FLAGS...                       extra       NAME SEED,SEED,... RATE FLAGS...
# Seeds outside, arms inside: an interruption leaves whole pairs, and a machine that slows down slows all arms.
set -u
cd "$(dirname "$0")"
PLAN=${PLAN:-config/laptop.plan}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
JOBS=${JOBS:-1}
KEEP=${KEEP:-}
ARMS=${ARMS:-}
search=
if [ "${1:-}" = rates ]; then search=1; shift; fi

value() {       # the value of one of the plan's words
    sed 's/#.*//' "$PLAN" | awk -v word="$1" '$1 == word { $1 = ""; print substr($0, 2) }'
}
[ -r "$PLAN" ] || { echo "reproduce.sh: no plan $PLAN; PLAN=FILE names one" >&2; exit 2; }
for word in $(sed 's/#.*//' "$PLAN" | awk '{ print $1 }'); do
    case " config experiment seeds rates rates_seed rates_steps margin contrasts may_differ arm extra " in *" $word "*) ;;
        *) echo "reproduce.sh: $PLAN: no such word as $word, see the head of this script" >&2; exit 2 ;; esac
done
[ -z "$search" ] || [ -n "$(value rates)" ] || { echo "reproduce.sh: $PLAN has no rates" >&2; exit 2; }
experiment=$(value experiment) config=$(value config)
[ -z "$search" ] || experiment=$experiment-rates
[ "$JOBS" -ge 1 ] 2> /dev/null || { echo "reproduce.sh: JOBS=$JOBS must be a number from 1 on" >&2; exit 2; }
[ -z "$KEEP" ] || mkdir -p "$KEEP" || exit 2
for arm in $ARMS; do
    [[ $'\n'$(value arm; [ -n "$search" ] || value extra) == *$'\n'"$arm "* ]] || { echo "reproduce.sh: $PLAN has no arm $arm" >&2; exit 2; }
done

runs() {        # every run in its order: name, seed, learning rate, flags
    if [ -n "$search" ]; then
        for rate in $(value rates); do
            value arm | while read -r arm _ flags; do
                echo "$arm@$rate $(value rates_seed) $rate $flags --max_steps=$(value rates_steps)"
            done
        done
        return
    fi
    for seed in $(value seeds); do
        value arm | while read -r arm rate flags; do echo "$arm $seed $rate $flags"; done
    done
    value extra | while read -r arm seeds rate flags; do
        for seed in ${seeds//,/ }; do echo "$arm $seed $rate $flags"; done
    done
}

pids=() names=() failed=0
reap() {        # look after the runs until fewer than $1 are going
    while [ "${#pids[@]}" -ge "$1" ] && [ "${#pids[@]}" -gt 0 ]; do
        for i in "${!pids[@]}"; do
            kill -0 "${pids[$i]}" 2> /dev/null && continue
            wait "${pids[$i]}"
            status=$? ended=${names[$i]}
            unset "pids[$i]" "names[$i]"
            if [ -n "$KEEP" ] && { [ "$status" = 0 ] || [ "$status" = 3 ]; }; then
                # aside first: what is cut off must not pass for a result that is there
                cp "out/$experiment/$ended/result.json" "$KEEP/$ended.part" && mv "$KEEP/$ended.part" "$KEEP/$ended.json" ||
                    failed=1
            fi
            case $status in
                0) ;;
                3) echo "reproduce.sh: $ended diverged; going on, the report counts it" >&2 ;;
                129|130|143) [ "$failed" != 0 ] || failed=$status ;;            # told to stop, and has saved
                *) echo "reproduce.sh: $ended ended with exit status $status" >&2; [ "$failed" != 0 ] || failed=$status ;;
            esac
        done
        sleep 0.2
    done
}
# A signal is passed on, and the script waits until the runs have saved. So is Ctrl-C: it reaches the runs by itself, but they
# ignore it while they load, as all that a script starts with & does
hand_on() { failed=$1; kill -TERM ${pids[@]+"${pids[@]}"} 2> /dev/null; }
trap 'hand_on 130' INT
trap 'hand_on 143' TERM HUP

while read -r arm seed rate flags; do
    name=$arm-s$seed
    case " ${ARMS:-${arm%@*}} " in *" ${arm%@*} "*) ;; *) continue ;; esac
    if [ -z "$arm" ] || { [ -n "$KEEP" ] && [ -e "$KEEP/$name.json" ]; }; then continue; fi
    reap "$JOBS"
    [ "$failed" = 0 ] || break
    # shellcheck disable=SC2086
    "$PYTHON" train.py ${config:+"$config"} $flags --learning_rate="$rate" --name="$arm" --seed="$seed" \
        --experiment="$experiment" --resume=auto "$@" < /dev/null &
    pids+=($!) names+=("$name")
done <<< "$(runs)"
reap 1
[ "$failed" = 0 ] || { echo "reproduce.sh: stopped; the same command goes on" >&2; exit "$failed"; }

# analyze.py finds what the plan says beside the results, today and whenever the report is made again
folder=${KEEP:-out/$experiment}
options= words='margin contrasts may_differ'
[ -z "$search" ] || { options='"--rates=True"'; words=may_differ; }
for word in $words; do
    [ -z "$(value "$word")" ] || options="$options${options:+, }\"--$word=$(value "$word")\""
done
[ -n "$search" ] || options="$options${options:+, }\"--pairs=$(value seeds | wc -w | tr -d ' ')\""
echo "[$options]" > "$folder/options.json"
"$PYTHON" analyze.py "$folder"
