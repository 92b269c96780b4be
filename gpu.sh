#!/usr/bin/env bash
# All that wants one data-centre GPU, in calls of at most BUDGET seconds: the tests, the benchmarks, the report's Experiment 1,
# and the experiment of config/gpu.py. Call it until it says that all is done: a finished stage is skipped, a training run that
# was cut off goes on from its checkpoint, any other stage starts again, so that it has to fit into one call (less 25 seconds
# for packing). A stage that failed is not tried again before its file in out/gpu/done is gone.
#
#   ./gpu.sh                                  for 570 seconds at most
#   BUDGET=0 ./gpu.sh                         to the end
#   STAGES="experiment" SEEDS="0 1" ./gpu.sh  only some of: tests experiment1 train parts decode experiment
#   OUT=FOLDER ./gpu.sh                       results.tar.gz goes there after every stage (default out/gpu): result files,
#                                             reports, benchmarks, logs; no checkpoints, of 1 GB each
#   GIT_COMMIT=$(git rev-parse HEAD) ./gpu.sh for a copy without .git: the commit its result files name
#   RESTORE=results.tar.gz ./gpu.sh           on a fresh machine of the same kind: goes on from what another one finished
#   DATASET=FOLDER ./gpu.sh                   source text to learn; default: the packages that this Python has installed
#   REHEARSE=1 ./gpu.sh                       every stage at a size of seconds, on the CPU, in out/rehearsal: 2 minutes
#
# Exit status: 0 all is done, 1 all but what failed, 75 there is more to do.
set -u
cd "$(dirname "$0")" || exit
export WORK=out/gpu CONFIG=config/gpu.py PYTHON=${PYTHON:-$(command -v python || echo python3)} SEEDS=${SEEDS:-0 1 2 3 4 5 6 7}
export STAGES=${STAGES:-tests experiment1 train parts decode experiment} DATASET=${DATASET:-}
export variants=baseline,lora,enhanced
export tests='not (thirty or two_thousand or dead_process or several_processes or number_of_processes)'     # minutes of CPU
peer=$($PYTHON -c 'from importlib.util import find_spec as f; print("transformers" if f("transformers") else "none")')
prompts='2048 8192 32768'

# Experiment 1 is train.py's defaults with a vocabulary like the report's: the flag stands where reproduce.sh wants a config.
# All 24 sequences at once and nothing compiled, as there, for the sake of the peak memory.
first='CONFIG=--vocab_size=49152 SEEDS="0 1 2"' first_flags='--micro_batch_size=24 --compile=False'
corpus_flags='--dataset=$WORK/corpus'
# The wide model is 1152 rather than 1024: there latent attention's ranks, C/12 and C/6, are 96 and 192 instead of 85 and 170.
narrow='--batch_size=96 --micro_batch_size=96' wide='--n_embd=1152 --n_head=12 --d_ff=4608 --block_size=1024'
wide_batch='--batch_size=32 --micro_batch_size=32' decode='--new_tokens=64 --prefill_chunk=2048 --rounds=3 --warmup=1'
if [ -n "${REHEARSE:-}" ]; then
    WORK=out/rehearsal CONFIG=config/smoke.py SEEDS='0 1' prompts='8 24' tests='rms_norm or cuda'
    DATASET=${DATASET:-$($PYTHON -c 'import email; print(email.__path__[0])')}
    first='CONFIG=config/smoke.py SEEDS=0' first_flags='--device=cpu' corpus_flags+=' --device=cpu'
    narrow='--quick=True --device=cpu' wide="$narrow --n_embd=96" wide_batch='' decode="$narrow"
fi
mkdir -p "${OUT:=$WORK}" && OUT=$(cd "$OUT" && pwd) || exit
[ -z "${RESTORE:-}" ] || tar xzf "$RESTORE" --skip-old-files || exit
mkdir -p "$WORK"/done "$WORK"/logs "$WORK"/bench || exit
[ "${BUDGET:=570}" -gt 0 ] && end=$((BUDGET - 25)) || end=1000000        # what is left is for saving and packing

make_corpus() {     # Links to the source text there is: UTF-8, at most a megabyte, so that no table of numbers is read as prose.
    $PYTHON - "$WORK" <<'END'
import hashlib, json, os, pathlib, platform, sys, sysconfig
work, source = pathlib.Path(sys.argv[1]), pathlib.Path(os.environ['DATASET'] or sysconfig.get_path('purelib')).resolve()
aside, digest, kept, left_out = work / 'corpus.tmp', hashlib.sha256(), {}, {'empty': 0, 'over 1 MiB': 0, 'not UTF-8': 0}
for path in sorted(source.rglob('*.py')):
    name = path.relative_to(source)
    if any(part.startswith('.') for part in name.parts) or not path.is_file():
        continue
    content = path.read_bytes()
    reason = 'empty' if not content.strip() else 'over 1 MiB' if len(content) > 2**20 else None
    try:
        content.decode('utf-8')
    except UnicodeDecodeError:
        reason = 'not UTF-8'
    if reason:
        left_out[reason] += 1
        continue
    digest.update(f'{name.as_posix()} {hashlib.sha256(content).hexdigest()}\n'.encode())
    files, size = kept.get(name.parts[0], (0, 0))
    kept[name.parts[0]] = files + 1, size + len(content)
    (aside / name).parent.mkdir(parents=True, exist_ok=True)
    (aside / name).unlink(missing_ok=True)
    (aside / name).symlink_to(path)
about = {'folder': source.name, 'python': platform.python_version(), 'sha256': digest.hexdigest(),
         'files': sum(n for n, _ in kept.values()), 'bytes': sum(size for _, size in kept.values()), 'left_out': left_out,
         'folders': {k: f'{n:,} files, {size:,} bytes' for k, (n, size) in sorted(kept.items(), key=lambda item: -item[1][1])}}
record = work / 'corpus.json'
if record.exists() and json.loads(record.read_text())['sha256'] != about['sha256']:
    sys.exit(f'{source} is not the text that the runs in {work} have learned (see {record}); move {work} away to start anew')
record.write_text(json.dumps(about, indent=1) + '\n')
aside.rename(work / 'corpus')
print(f'{about["files"]:,} files, {about["bytes"] / 1e6:,.1f} MB; left out: {left_out}')
END
}

run_tests() {       # what needs the GPU, and what is quick beside it
    $PYTHON -c 'import pytest' || { echo 'pytest is not installed; pip install pytest'; return 1; }
    $PYTHON -c 'import xdist' && workers='-n 6 --dist=worksteal' || workers=
    # shellcheck disable=SC2086
    $PYTHON -m pytest -q -o addopts= $workers --durations=10 -k "$tests" tests/test_{attention,moe,model,muon,sample,train}.py
}

prepare() {         # the CPU reads and tokenizes while the GPU is tested
    nvidia-smi > "$WORK/logs/machine.log" 2>&1
    if [[ " $STAGES " == *' experiment '* && ! -e $WORK/corpus ]]; then
        { make_corpus && $PYTHON data.py --dataset="$WORK/corpus"; } > "$WORK/logs/corpus.log" 2>&1 &
    fi
    if [[ " $STAGES " == *' tests '* && ! -e $WORK/done/tests ]]; then
        run_tests > "$WORK/logs/tests.log" 2>&1
        echo $? > "$WORK/done/tests"
    fi
    wait
}

bench() {           # bench NAME --task=...: into bench/NAME.json and NAME.md
    local name=$1; shift
    $PYTHON bench.py --out="$WORK/bench/$name.json" "$@" > "$WORK/bench/$name.md"
}
export -f make_corpus run_tests prepare bench

pack() {            # what is worth keeping, in one file of a megabyte or two
    find "$WORK" -path "$WORK/corpus*" -type d -prune -o -type f ! -path "$WORK/done/prepare" \( -name result.json \
        -o -name 'report.*' -o -name '*.png' -o -name corpus.json -o -path "$WORK/[bdl]*/*" \) -print0 | sort -z |
        tar czf "$OUT/results.tmp" --null -T - && mv "$OUT/results.tmp" "$OUT/results.tar.gz"
}

child='' stopped='' failed='' more=''
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' INT TERM

stage() {           # stage NAME COMMAND: unless it is done or not wanted, in the time left, its output into logs/NAME.log
    local name=$1 status started=$SECONDS
    [[ $name == prepare || " $STAGES " == *" ${name%%-*} "* ]] || return 0
    if [ -e "$WORK/done/$name" ]; then
        status=$(cat "$WORK/done/$name")
    elif [ -n "$stopped" ] || ((SECONDS >= end)); then
        more+=" $name"; return
    else
        echo "$name ..."
        timeout -k 15 $((end - SECONDS)) bash -c "$2" >> "$WORK/logs/$name.log" 2>&1 & child=$!
        wait "$child"; status=$?
        while kill -0 "$child" 2> /dev/null; do wait "$child"; status=$?; done     # a signal ended the waiting, not the child
        child=
        if [ -n "$stopped" ] || [[ $status == 124 || $status == 137 ]]; then
            more+=" $name"
        else
            echo "$status" > "$WORK/done/$name"
            echo "$name: exit status $status after $((SECONDS - started)) s"
        fi
        pack
    fi
    [ "$status" = 0 ] || [[ " $more" == *" $name" ]] || failed+=" $name"
}

rm -f "$WORK/done/prepare"      # of no consequence where nothing is left of it to do
stage prepare prepare
[ ! -e "$WORK/done/tests" ] || [ "$(cat "$WORK/done/tests")" = 0 ] || failed+=' tests'
stage experiment1 "$first EXPERIMENT=${WORK#out/}/experiment1 exec ./reproduce.sh $first_flags"
stage train-384 "bench train-384 --task=train --variants=$variants --peer=$peer $narrow"
stage train-wide "bench train-wide --task=train --variants=$variants $wide $wide_batch"
stage parts-384 "bench parts-384 --task=parts $narrow"
stage parts-wide "bench parts-wide --task=parts --variants=baseline,enhanced $wide $wide_batch"
for prompt in $prompts; do
    stage "decode-$prompt" "bench decode-$prompt --task=decode --variants=$variants --peer=$peer --prompts=$prompt $decode"
done
for seed in $SEEDS; do          # all variants of a seed, then the next
    stage "experiment-$seed" "SEEDS=$seed EXPERIMENT=${WORK#out/}/experiment exec ./reproduce.sh $corpus_flags"
done
pack
echo "$OUT/results.tar.gz"
[ -z "$failed" ] || echo "failed:$failed (logs in $WORK/logs; rm $WORK/done/NAME, then ./gpu.sh tries it again)"
[ -z "$more" ] || { echo "call again, there is more to do:$more"; exit 75; }
[ -z "$failed" ] || exit 1
echo 'all is done'
