#!/usr/bin/env bash
# A GPU that is lent by the call, used in calls of less than nine minutes: bash benchmarks/first_gpu.sh PART OUT [EARLIER].
# The parts, in their order, and how to carry what the machine lacks, are in benchmarks/README.md. TOY=1 is a dry run on a CPU.
set -uo pipefail

PARTS="smoke xl share windows memcheck law rest"
LIMIT=${LIMIT:-520} # seconds of a call

part=${1:-} out=${2:-} earlier=${3:-}
if [[ " $PARTS " != *" $part "* || -z $part || -z $out ]]; then
    echo "usage: bash benchmarks/first_gpu.sh PART OUT [EARLIER]; PART is one of: $PARTS" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/$part.log
: >"$log"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

say() { echo "$@" | tee -a "$log"; }

left() { echo $((LIMIT - SECONDS)); }

# run NAME SECONDS COMMAND...: at most so long, and not beyond the call's end; the next step runs whatever becomes of this one
run() {
    local name=$1 most=$2 begin=$SECONDS status
    shift 2
    ((most > $(left))) && most=$(left)
    if ((most < 5)); then
        say "== $name: no time left"
        failed=1
        return
    fi
    say "== $name: $*"
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    say "== $name: exit $status after $((SECONDS - begin)) s"
    ((status == 0)) || failed=1
}

tests() { # tests NAME SECONDS PYTEST-ARGUMENTS...
    local name=$1 most=$2
    shift 2
    run "$name" "$most" python -m pytest -q -p no:cacheprovider -o faulthandler_timeout=100 --tb=short "$@"
}

measure() { # measure NAME SECONDS ARGUMENTS...: rows go to OUT, and what is there already is left out
    local name=$1 most=$2 minutes
    shift 2
    ((most > $(left))) && most=$(left)
    # nothing is begun in the last three quarters of a minute
    minutes=$(awk "BEGIN { print ($most > 45 ? $most - 45 : 0) / 60 }")
    run "$name" "$most" python -m benchmarks.gpu --results "$out" --resume --minutes "$minutes" "${toy[@]}" "$@"
}

kernels() { # kernels NAME SECONDS WHICH
    # a dry run adds no rows to those that are committed
    tests "$1" "$2" benchmarks/test_kernels.py -s -k "$3" ${TOY:+--collect-only}
    cp benchmarks/results/kernels.jsonl "$out/"
}

# what an earlier call measured counts: rows of gpu.jsonl are not measured again, those of kernels.jsonl are kept
if [[ -n $earlier ]]; then
    for file in gpu.jsonl gpu-toy.jsonl; do
        [[ -f $earlier/$file && ! -f $out/$file ]] && cp "$earlier/$file" "$out/"
    done
    [[ -f $earlier/kernels.jsonl ]] && cp "$earlier/kernels.jsonl" benchmarks/results/
fi

toy=()
if [[ -n ${TOY:-} ]]; then
    toy=(--toy)
else
    export FREE_REQUIRE_GPU=1
fi

if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    run wheels 60 python -m pip install -q --no-index --no-deps --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi

case $part in
smoke)
    run imports 60 python -c '
import diffusers, torch, triton
import free, free_kernels, free.sampling.capture, free_kernels.verify.kernel
print("torch", torch.__version__, "triton", triton.__version__, "diffusers", diffusers.__version__)
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info()) if torch.cuda.is_available() else print("no CUDA")
'
    tests "the kernels' own" 60 tests/kernels/test_gpu.py
    # what compiles runs last in this file, which has a process of its own
    tests "the samplers" 130 tests/integration/test_gpu.py
    tests "the kernels against the reference" 150 tests/kernels -m gpu --deselect tests/kernels/test_gpu.py
    # its rows go to a folder of its own
    run "dry run of the benchmark" 300 python -m benchmarks.gpu --toy
    ;;
xl)
    measure "XL/2, one sample" 520 --part end-to-end --models DiT-XL/2 --batches 1
    measure "XL/2, four samples" 520 --part end-to-end --models DiT-XL/2 --batches 4
    ;;
share)
    measure "share of a round" 200 --part share --models DiT-XL/2 DiT-S/2 --batches 1
    measure "S/2, one sample" 520 --part end-to-end --models DiT-S/2 --batches 1
    measure "S/2, four samples" 520 --part end-to-end --models DiT-S/2 --batches 4
    ;;
windows)
    measure "T(W)" 260 --part windows --models DiT-XL/2 DiT-S/2
    kernels "kernels, without a compiler" 520 "not compile"
    measure "projection" 60 --part projection
    ;;
memcheck)
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [[ -n $sanitizer ]]; then
        # without torch's own cache, which would hand out neighbours' memory for a kernel's; a graph cannot do without it
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        run memcheck 500 "$sanitizer" --tool memcheck --error-exitcode 9 --log-file "$out/memcheck.txt" \
            python -m pytest -q -p no:cacheprovider -m gpu -k "not graph and not large_offsets" \
            tests/kernels/test_{gpu,gains,round,verify,elementwise,philox}.py
        tail -n 5 "$out/memcheck.txt" | tee -a "$log"
    else
        say "there is no compute-sanitizer on this machine"
        failed=1
    fi
    ;;
law)
    tests "the law" 520 tests/statistical -m gpu
    ;;
rest)
    measure "T(W) of the others" 150 --part windows --models "DiT-XL/2, 512²" DiT-B/2 DiT-L/2
    measure "share of a round, sixteen samples" 100 --part share --models DiT-XL/2 DiT-S/2 --batches 16
    kernels "kernels, compiled" 150 "compile"
    measure "S/2, sixteen samples" 520 --part end-to-end --models DiT-S/2 --batches 16
    measure "XL/2, sixteen samples" 520 --part end-to-end --models DiT-XL/2 --batches 16
    ;;
esac

say "$part: $SECONDS s, $( ((failed)) && echo 'something failed or was left out' || echo 'all done')"
exit "$failed"
