#!/bin/sh
# What a GPU tells in 15 minutes: CIFAR-10, GPT-2's step, the optimizer alone. It needs
# no network, and keeps what it has measured when it is stopped.
#
#   sh benchmarks/gpu.sh cifar10_jpeg.npz results   # 14 min on an H200
#   sh benchmarks/gpu.sh "" results dry             # 3 min: the same at toy size, on a CPU
set -eu
data=$1 out=$2 size=${3:-full}
here=$(dirname "$0")
mkdir -p "$out"

run() {
    script=$1 name=$2
    shift 2
    python "$here/$script.py" "$@" --results "$out/$name.json"
}

if [ "$size" = dry ]; then
    run gpt2_step gpt2_step_gpu --sizes tiny --dtypes bfloat16 --steps 2 --keys threefry2x32,rbg
    run overhead overhead_gpu --models "" --sizes 1e5 --arrays 4 --mc_samples 1 --rounds 1
    run cifar cifar_gpu --depth 2 --width 2 --epochs 1 --seeds 2 \
        --num_samples 2 --batch_size 90 --systems AdamW,IVON
    exit
fi
run cifar cifar_gpu --data "$data" --minutes 8.5
for sizes in small medium; do
    run gpt2_step "gpt2_step_gpu_$sizes" --sizes "$sizes" --dtypes bfloat16 --batch_size 8 \
        --steps 20 --keys threefry2x32,rbg
done
run overhead overhead_gpu --models "" --sizes 1e6,1e7,1e8 --arrays 4 --mc_samples 1 --rounds 5
