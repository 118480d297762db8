#!/usr/bin/env bash
# What ten minutes of one GPU are for: the tests that need one, two backbones of the package, and the benchmark.
#
#     bash hub_configs/ten_gpu_minutes.sh DATA OUT
#
# DATA is CIFAR-10 (`uoft-cs/cifar10` of the Hub, or a folder that has it as parquet files). OUT gets tests.log, a log and the run
# folder of each backbone in parts of 15 MB (`cat NAME.tar.xz.* | tar xJ`), and benchmark.txt. A run folder that is cut off, or
# unmeasured, goes on by the same command anywhere: `python -m training --config RECIPE --data.path DATA --run FOLDER`.
set -uo pipefail
cd "$(dirname "$0")/.."
data=$1 out=$2
mkdir -p "$out"
began=$SECONDS
for name in sslpp_resnet10t_s64.simclr_c10_v2 sslpp_convnext_atto_s64.simclr_c10; do
    OMP_NUM_THREADS=3 timeout -s TERM 450 python -m training --config "hub_configs/$name/recipe.yaml" --data.path "$data" \
        --run "runs/$name" >"$out/$name.log" 2>&1 &
done
# While they read their images: half a minute on an idle GPU, more beside the trainings.
OMP_NUM_THREADS=1 timeout 150 python -m pytest tests/test_cuda.py -n 8 --dist load -q --tb=short >"$out/tests.log" 2>&1
tail -n 15 "$out/tests.log"
wait
for name in sslpp_resnet10t_s64.simclr_c10_v2 sslpp_convnext_atto_s64.simclr_c10; do
    tail -c 400 "$out/$name.log"
    tar c -C runs --exclude "$name/checkpoints" "$name" | xz -T0 -1 | split -b 15M -a 1 - "$out/$name.tar.xz."
done
timeout $((580 - (SECONDS - began))) python -m training.benchmark step input >"$out/benchmark.txt" 2>&1
cat "$out/benchmark.txt"
