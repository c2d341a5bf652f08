#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What each choice in training for a cache is worth: short runs of one budget, and what each costs on a test text.
#
#   ablation.sh PROGRAM TOKENS MODEL TEST_TOKENS OUT [options of kv1-train train]
#
# PROGRAM is kv1-train, TOKENS and TEST_TOKENS are folders that its pack made, MODEL is a model trained with plain
# keys and values. Writes OUT/NAME/log.csv and OUT/NAME.txt (evaluate's figures) for every run; one that is there is
# left alone. KV1_GPUS GPUs (default 1) work through the list, or through the runs that KV1_RUNS names. Budget and
# learning rate are options, such as
#   --steps 400 --batch 128 --micro-batch 64 --lr 1e-3 --last-lr 0 --warmup 50 --seed 5
set -euo pipefail
[ $# -ge 5 ] || { sed -n '3,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
program=$1 tokens=$2 model=$3 test_tokens=$4 out=$5
shift 5
mkdir -p "$out"

e=+ls+had+mean
mixed="--kv c3$e,c2$e/0:c2$e/1:c2$e/2:c3$e/3:c3$e --round-metadata" # 12 bytes a vector of 32 channels, as fitted
fitted="--kv c3$e,c2$e --round-metadata"
# name|cache|how it is trained
list="\
self_teacher|$fitted|--init --self-teacher --teacher-weight 0.9
per_layer|$mixed|--init --self-teacher --teacher-weight 0.9
per_layer_half|$mixed|--init --self-teacher --teacher-weight 0.5
no_teacher|$fitted|--init
teacher|$fitted|--init --teacher $model --teacher-weight 0.9
scratch|$fitted|
plain|--kv 16|--init
plain_scratch|--kv 16|
min_max|--kv c3+had+mean,c2+had+mean --round-metadata|--init
not_rotated|--kv c3+ls+mean,c2+ls+mean --round-metadata|--init
not_centred|--kv c3+ls+had,c2+ls+had --round-metadata|--init
two_bits|--kv 2$e --round-metadata|--init
reference|--kv 2 --round-metadata|--init"

# The next run of the list for whoever asks first: workers share its descriptor.
next_run() {
    flock 4
    local found=0
    IFS='|' read -r name cache how <&3 || found=1
    flock -u 4
    return $found
}

# work <gpu> <training options>
work() {
    local gpu=$1 name cache how
    shift
    exec 4<"$out" # locks belong to an opening: one for each worker
    while next_run; do
        if [ -e "$out/$name.txt" ] || [[ -n ${KV1_RUNS:-} && " $KV1_RUNS " != *" $name "* ]]; then continue; fi
        # shellcheck disable=SC2086 # options are words
        CUDA_VISIBLE_DEVICES=$gpu "$program" train --data "$tokens" --model "$model" --out "$out/$name" --resume --keep 1 \
            --save-every 0 $cache $how "$@" >"$out/$name.log" 2>&1 </dev/null
        # shellcheck disable=SC2086
        CUDA_VISIBLE_DEVICES=$gpu "$program" evaluate --data "$test_tokens" --model "$(ls -d "$out/$name"/step-*)" $cache \
            >"$out/$name.part" 2>>"$out/$name.log" </dev/null
        mv "$out/$name.part" "$out/$name.txt"
        echo "$name: $(tail -n +2 "$out/$name.txt" | tr -s ' \n' ' ')"
    done
}

exec 3< <(printf '%s\n' "$list")
workers=()
for ((i = 0; i < ${KV1_GPUS:-1}; ++i)); do
    work "$i" "$@" &
    workers+=($!)
done
failed=0
for worker in "${workers[@]}"; do wait "$worker" || failed=1; done
exit $failed
