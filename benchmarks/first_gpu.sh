#!/usr/bin/env bash
# A GPU that is lent by the call, used in calls of less than nine minutes: bash benchmarks/first_gpu.sh PART OUT [EARLIER].
# The parts, in their order, and how to carry what the machine lacks, are in benchmarks/README.md. TOY=1 is a dry run on a CPU.
set -uo pipefail

PARTS="smoke xl small memcheck law kernels rest"
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
python=$(command -v python3 || command -v python)

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
    # an interrupt, at which pytest still says what failed
    timeout --signal=INT --kill-after=20 "$most" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    say "== $name: exit $status after $((SECONDS - begin)) s"
    ((status == 0)) || failed=1
}

tests() { # tests NAME SECONDS PYTEST-ARGUMENTS...
    local name=$1 most=$2
    shift 2
    run "$name" "$most" "$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=100 --tb=short "$@"
}

measure() { # measure NAME SECONDS ARGUMENTS...: rows go to OUT, and what is there already is left out
    local name=$1 most=$2 minutes
    shift 2
    ((most > $(left))) && most=$(left)
    # nothing is begun in the last three quarters of a minute
    minutes=$(awk "BEGIN { print ($most > 45 ? $most - 45 : 0) / 60 }")
    run "$name" "$most" "$python" -m benchmarks.gpu --results "$out" --resume --minutes "$minutes" "${toy[@]}" "$@"
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
    run wheels 60 "$python" -m pip install -q --no-index --no-deps --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi

sanitized() { # sanitized NAME SECONDS COMMAND...: under the checker of memory, whose last lines are shown
    local name=$1 most=$2 tool
    shift 2
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [[ -z $tool ]]; then
        say "== $name: there is no compute-sanitizer on this machine"
        failed=1
        return
    fi
    # without torch's own cache, which would hand out neighbours' memory for a kernel's; a graph cannot do without it
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$name" "$most" \
        "$tool" --tool memcheck --error-exitcode 9 --log-file "$out/$part-memcheck.txt" "$@"
    tail -n 5 "$out/$part-memcheck.txt" | tee -a "$log"
}

# the shapes that targets are set for, and one operation that is compiled for both: a compiler takes half a minute a case
targets="1x8x4096 or 16x16x65536"
verified="compile and verify and not stored"

case $part in
smoke)
    run imports 90 "$python" -c '
import diffusers, torch, triton
import free, free_kernels, free.sampling.capture, free_kernels.verify.kernel
print("torch", torch.__version__, "triton", triton.__version__, "diffusers", diffusers.__version__)
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info()) if torch.cuda.is_available() else print("no CUDA")
'
    tests "the kernels' own" 90 tests/kernels/test_gpu.py
    # several processes: what follows a capture that failed in one of them fails too
    tests "the samplers" 150 tests/integration/test_gpu.py -n 4
    # its rows go to a folder of its own
    run "dry run of the benchmark" 150 "$python" -m benchmarks.gpu --toy --part end-to-end
    sanitized "memory of the operations" 120 "$python" -m benchmarks.operations
    kernels "kernels, where targets are set" 120 "not compile and ($targets)"
    kernels "verify, compiled" 90 "$verified and ($targets)"
    tests "the kernels against the reference" 150 tests/kernels -m gpu --deselect tests/kernels/test_gpu.py -n 8
    ;;
xl)
    measure "XL/2, one sample" 420 --part end-to-end --models DiT-XL/2 --batches 1
    measure "share of a round" 140 --part share --models DiT-XL/2 --batches 1
    ;;
small)
    measure "S/2, one sample" 230 --part end-to-end --models DiT-S/2 --batches 1
    measure "T(W)" 110 --part windows --models DiT-XL/2 DiT-S/2 --batches 1
    measure "share of a round" 110 --part share --models DiT-S/2 --batches 1
    measure "projection" 60 --part projection
    ;;
memcheck)
    sanitized "memory of the kernels' tests" 500 "$python" -m pytest -q -p no:cacheprovider -m gpu \
        -k "not graph and not large_offsets" tests/kernels/test_{gpu,gains,round,verify,elementwise,philox}.py
    ;;
law)
    tests "the law" 520 tests/statistical -m gpu
    ;;
kernels)
    kernels "kernels, without a compiler" 300 "not compile"
    kernels "kernels, compiled" 400 "compile"
    ;;
rest)
    measure "XL/2, four samples" 300 --part end-to-end --models DiT-XL/2 --batches 4
    measure "S/2, four samples" 300 --part end-to-end --models DiT-S/2 --batches 4
    measure "T(W) of the others" 150 --part windows --models "DiT-XL/2, 512²" DiT-B/2 DiT-L/2
    measure "share of a round, sixteen samples" 100 --part share --models DiT-XL/2 DiT-S/2 --batches 16
    measure "S/2, sixteen samples" 520 --part end-to-end --models DiT-S/2 --batches 16
    measure "XL/2, sixteen samples" 520 --part end-to-end --models DiT-XL/2 --batches 16
    ;;
esac

say "$part: $SECONDS s, $( ((failed)) && echo 'something failed or was left out' || echo 'all done')"
exit "$failed"
