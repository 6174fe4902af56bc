#!/usr/bin/env bash
# Decode and prefill of the preset qwen3-7b-a1b on the CPU: one JSON line a run into results/paper/kernels/end_to_end.jsonl
# and the machine beside it. Needs 8 GB of disk in the temporary folder, 20 GB of memory and an otherwise idle machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-results/paper/kernels}
made=${2:-}
if [ -z "$made" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    made=$scratch/qwen3-7b-a1b
    hybridlab checkpoint make "$made" --preset qwen3-7b-a1b
fi
mkdir -p "$out"
partial=$out/end_to_end.partial
: > "$partial"
one() { hybridlab bench "$@" --checkpoint "$made" --json | python -c 'import json, sys; print(json.dumps(json.load(sys.stdin)))' >> "$partial"; }
for layout in tiles rows; do
    for repeat in 1 2; do
        one decode --weight-layout $layout
        one decode --weight-layout $layout --depth 4096
        one decode --weight-layout $layout --batch 8
    done
    one prefill --weight-layout $layout --tokens 512 --steps 2
    one prefill --weight-layout $layout --tokens 2048 --steps 1
done
hybridlab doctor --json > "$out/machine.json"
mv "$partial" "$out/end_to_end.jsonl"
