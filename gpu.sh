#!/usr/bin/env bash
# What wants one data-centre GPU, in calls that go on where the one before stopped: tests, benchmarks, the experiment of
# config/gpu.plan. It has been rehearsed on a CPU, but has never met a GPU.
#
#   ./gpu.sh                            for BUDGET=570 seconds at most (0: to the end); exit status 75: call again
#   OUT=FOLDER ./gpu.sh                 JSON, Markdown and logs go there (out/gpu-results)
#   ./gpu.sh --dataset=/data/code       flags go to every training run
#   REHEARSE=1 ./gpu.sh                 every stage at a size of seconds, on the CPU: out/rehearsal-results
#
# A stage that ended well leaves OUT/done/STAGE and is skipped from then on; the next call tries again what failed or
# was cut off: training runs go on from their checkpoints in out/gpu, finished ones stand in OUT/experiment and are not
# run again on another machine that has this folder; what a benchmark had compiled is in torch's cache.
set -u
cd "$(dirname "$0")" || exit
PYTHON=${PYTHON:-python} BUDGET=${BUDGET:-570} PLAN=config/gpu.plan prompts='2048 8192 32768'
narrow='--dtype=bfloat16 --batch_size=96 --micro_batch_sizes=96'
wide='--dtype=bfloat16 --n_embd=1152 --n_head=12 --d_ff=4608 --contexts=1024 --batch_size=32 --micro_batch_sizes=32'
if [ -n "${REHEARSE:-}" ]; then
    OUT=${OUT:-out/rehearsal-results} prompts='8 24'
    narrow='--device=cpu --variants=baseline,mla --rounds=2 --memory_updates=1 --n_layer=2 --n_head=4 --n_embd=96
        --d_ff=48 --experts=4 --vocab_size=128 --contexts=32 --new_tokens=4 --matrix_size=128'
    wide="$narrow --tie_embeddings=False"
    set -- --device=cpu "$@"
fi
mkdir -p "${OUT:=out/gpu-results}/done" || exit
if [ -n "${REHEARSE:-}" ]; then
    PLAN=$OUT/plan
    sed 's|^config .*|config config/smoke.py|; s|^experiment .*|experiment rehearsal|; s|^seeds .*|seeds 0|' \
        config/gpu.plan > "$PLAN"
fi
export PYTHON PLAN KEEP=$OUT/experiment
failed=''

stage() {           # stage NAME COMMAND...: unless it is done, in the time left, its output into OUT/NAME.log
    local name=$1 left=$((BUDGET == 0 ? 0 : BUDGET - SECONDS)); shift
    [ -e "$OUT/done/$name" ] && return
    [ "$BUDGET" = 0 ] || [ "$left" -gt 0 ] || { echo 'there is more to do: call again'; exit 75; }
    echo "$name ..."
    timeout --foreground -k 60 "$left" "$@" >> "$OUT/$name.log" 2>&1        # 0: no limit
    if [ "$?" = 0 ]; then
        touch "$OUT/done/$name"
    elif [ "$BUDGET" != 0 ] && [ "$SECONDS" -ge "$BUDGET" ]; then           # by the clock: killed for memory it is 137, too
        echo 'there is more to do: call again'; exit 75
    else
        echo "$name failed, see $OUT/$name.log"; failed+=" $name"
    fi
}
bench() { stage "$1" "$PYTHON" bench.py --out="$OUT/$1.json" "${@:2}"; }

# shellcheck disable=SC2086
{
    stage tests "$PYTHON" -m pytest -q -o addopts= -k 'on_cuda or on_a_gpu or on_the_device' tests
    bench train $narrow
    bench train-wide $wide
    for prompt in $prompts; do bench "decode-$prompt" $narrow --task=decode --prompts="$prompt"; done
    stage experiment ./reproduce.sh "$@"
}
[ -z "$failed" ] || { echo "failed:$failed; the next call tries again"; exit 1; }
echo "all is done: $OUT"
