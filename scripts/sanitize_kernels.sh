#!/usr/bin/env bash
# Builds the C kernels with AddressSanitizer and UBSan into a temporary copy of the package and runs their contract
# tests on it: scripts/sanitize_kernels.sh [pytest arguments]. Needs gcc with libasan and the development environment.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r hybridlab tests pyproject.toml "$work"
rm -f "$work"/hybridlab/_kernels*.so
cython -3 cython_kernels/_kernels.pyx -o "$work/_kernels.c"
suffix=$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
# The generated wrapper is left alone: what is under test is our C. Unaligned access is by memcpy or intrinsics only.
gcc -c -fPIC -O1 -g -I"$include" -Icython_kernels "$work/_kernels.c" -o "$work/_kernels.o"
gcc -shared -fPIC -O1 -g -ffp-contract=off -fno-math-errno -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    "$work/_kernels.o" cython_kernels/*.c -o "$work/hybridlab/_kernels$suffix" -lpthread -lm
cd "$work"
# An editable installation's import hook would find the package elsewhere.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" python - "$@" <<'PY'
import sys
sys.meta_path = [finder for finder in sys.meta_path if "meson" not in type(finder).__module__.lower()
                 and "editable" not in type(finder).__module__.lower()]
sys.path.insert(0, ".")
import pytest
import hybridlab._kernels as native
print("testing", native.__file__, flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *(sys.argv[1:] or ["tests/contract"])]))
PY
