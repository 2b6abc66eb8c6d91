#!/usr/bin/env bash
# What one GPU can tell in eight minutes: whether the CUDA path is right, and how fast it is.
#
#   benchmarks/gpu.sh OUT          on a machine with a GPU
#   benchmarks/gpu.sh OUT --dry    the same commands on a CPU with tiny shapes, to try the script out
#
# In OUT: summary.txt (read this), results.jsonl (a line for each side of each comparison), profile-*.txt (where the time
# of a step goes), log.txt (warnings, stack traces). Each part has a time limit, so that one that hangs or fails costs the
# others nothing; what does not fit in the whole is left out, and the summary says so. Exit code 1 if a part failed.
#
#   part                                                                expected   limit
#   check        packages, the card                                         10 s   120 s
#   doctor       beside it: parity, refused, torchrun, resume               20 s    90 s
#     parity     one step against the CPU: gpt2, llama; float32,            60 s   120 s
#                bfloat16; compiled and not
#     refused    steps that are not finite; float16's loss scaling          15 s    90 s
#     resume     SIGKILL and resume, bit for bit                            50 s   120 s
#     torchrun   one process with NCCL, ddp and fsdp: it starts, saves      40 s    90 s
#                and ends; one process exchanges nothing
#   chapter, shakespeare-char    ours, plain loop, transformers             35 s    90 s each
#   gpt2-124m    compiled; blocked loss and plain; 25 s of training        105 s   160 s
#   llama-124m   the modern model, Muon; 25 s of training                  105 s   160 s
#   train        train --time, on what is left, at most 2 minutes          125 s
#
# Variables: PYTHON (python3); GPU_SECONDS (480), for all of it; LOSSCURVE_CACHE, a folder with tinyshakespeare/input.txt
# and tiktoken/ (without it: the bytes of docs/decisions.md); GPU_WHEELS, a folder of wheels to install first, offline.
set -u
if [[ $# -lt 1 || $# -gt 2 || $1 == -* || ${2:---dry} != --dry ]]; then
    echo "usage: benchmarks/gpu.sh OUT [--dry]" >&2
    exit 2
fi
[[ -z ${LOSSCURVE_CACHE:-} ]] || LOSSCURVE_CACHE=$(cd "$LOSSCURVE_CACHE" && pwd) || exit 2 # before the folder changes
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2
dry=${2:+2} # the factor of the limits, on a CPU
python=${PYTHON:-python3}
total=${GPU_SECONDS:-480}
work=$(mktemp -d) && mkdir "$work/failed" || exit 2
trap 'rm -rf "$work"' EXIT
rm -f "$out"/{summary.txt,results.jsonl,log.txt} "$out"/profile-*.txt
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 NO_COLOR=1 HF_HUB_OFFLINE=1 TMPDIR="$work"
export GLOO_SOCKET_IFNAME=lo # no name of this machine is looked up
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton" # one part compiles for the next

say() { echo "$*" | tee -a "$out/summary.txt"; }

# part NAME SECONDS COMMAND...: run it within the limit; its output goes to the summary, its errors to the log
part() {
    local name=$1 limit=$(($2 * ${dry:-1})) left=$((total - SECONDS)) began=$SECONDS code
    shift 2
    if ((left < 15)); then
        say "== $name: NOT RUN, the $total s are over"
        touch "$work/failed/$name"
        return
    fi
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$work/$name.out" 2>"$work/$name.err"
    code=$?
    local result="ok"
    ((code == 0)) || result="FAILED, exit code $code"
    ((code == 124 || code == 137)) && result="STOPPED at its time limit"
    ((code == 0)) || touch "$work/failed/$name"
    {
        echo "== $name: $result ($((SECONDS - began)) s)"
        cat "$work/$name.out"
        ((code == 0)) || grep -v '^ ' "$work/$name.err" | tail -3 | cut -c1-300
    } >"$work/$name.part"
    cat "$work/$name.part" >>"$out/summary.txt"
    cat "$work/$name.part"
    { echo "==== $name"; cat "$work/$name.err"; } >>"$out/log.txt"
}

say "losscurve on a GPU, $(date -u +%Y-%m-%dT%H:%MZ)${dry:+, DRY: tiny shapes on a CPU}"
if [[ -n ${GPU_WHEELS:-} ]]; then
    part wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$GPU_WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$work/site"
fi
part check 120 "$python" -m benchmarks.gpu_checks machine ${dry:+--device cpu}
[[ -e $work/failed/check ]] && exit 1

text=docs/decisions.md
[[ -f ${LOSSCURVE_CACHE:-}/tinyshakespeare/input.txt ]] && text=$LOSSCURVE_CACHE/tinyshakespeare/input.txt
model=(--n_layer 4 --n_head 4 --n_embd 256 --block_size 1024 --batch_size 16 --max_lr 1e-3 --warmup_steps 20)
model+=(--max_steps 500 --save_every 50 --log_every 20 --eval_every 200 --eval_tokens 20000 --sample_tokens 20)
checks=()
steps=(--json "$out/results.jsonl")
all=plain,plain-bf16,transformers-bf16,ours,ours-any-order,ours-compiled
large=ours,ours-any-order,ours-compiled,ours-plain-loss
times=(--rounds 3 --steps 10 --batch_size 32 --train_seconds 25)
if [[ -n $dry ]]; then
    export OMP_NUM_THREADS=1
    model=(--n_layer 1 --n_head 1 --n_embd 16 --block_size 16 --batch_size 2 --max_steps 120)
    checks=(--few --device cpu)
    steps+=(--device cpu --small --rounds 1 --steps 2)
    all=plain,plain-bf16,transformers-bf16,ours,ours-any-order
    times=(--train_seconds 1)
fi

# correctness, side by side: none of it is timed, and threads of two programs wait for each other
(
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}
    part doctor 90 "$python" -m llm doctor &
    part parity 120 "$python" -m benchmarks.gpu_checks parity ${checks[@]+"${checks[@]}"} &
    part refused 90 "$python" -m benchmarks.gpu_checks refused ${dry:+--device cpu} &
    part resume 120 "$python" -m llm prove-resume --text "$text" --tokenizer byte --data_dir "$work/bytes" --kills 2 \
        --out_dir "$work/proof" "${model[@]}" &
    part torchrun 90 "$python" -m benchmarks.gpu_checks torchrun --text "$text" ${dry:+--device cpu} &
    wait
)

# speed, one at a time
part chapter 90 "$python" -m benchmarks.gpu --preset chapter --sides $all "${steps[@]}"
part shakespeare-char 90 "$python" -m benchmarks.gpu --preset shakespeare-char --sides $all "${steps[@]}"
for name in gpt2-124m llama-124m; do
    [[ -n $dry && $name == llama-124m ]] && large=ours,ours-any-order # compiling takes a CPU most of the time
    part $name 160 "$python" -m benchmarks.gpu --preset $name --sides $large "${steps[@]}" "${times[@]}" \
        --profile "$out/profile-$name.txt"
done

left=$((total - SECONDS - 20))
((left > 120)) && left=120
[[ -n $dry ]] && left=10
if ((left >= 10)); then
    part train $((left + 20)) "$python" -m llm train --text "$text" --time "${left}s" --data_dir "$work/tokens" --out_dir "$work/run"
else
    say "== train: NOT RUN, the $total s are nearly over"
    touch "$work/failed/train"
fi

failed=$(ls "$work/failed" | tr '\n' ' ')
say "== the end: $SECONDS s${failed:+; failed: $failed}"
[[ -z $failed ]]
