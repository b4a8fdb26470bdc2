# Sourced by the scripts of examples/: how to start Python on the GPUs, how to skip finished steps,
# and how to stop.

GPUS=${GPUS:-1}
ACCUMULATE=${ACCUMULATE:-$((64 / GPUS))} # GPUS x ACCUMULATE questions per update: 64 in the papers

# "${run[@]}" SCRIPT.py starts a process per GPU; RUN names another launcher, such as "srun python".
if [ -n "${RUN:-}" ]; then
    read -ra run <<< "$RUN"
elif [ "$GPUS" -gt 1 ]; then
    run=(torchrun --nproc_per_node="$GPUS")
else
    run=(python)
fi

source examples/stoppable.sh

# step RESULT COMMAND...: run a command unless its result exists (results are written atomically).
step() {
    local result=$1
    shift
    if [ -e "$result" ]; then echo "done already: $result"; return; fi
    echo "+ $*"
    stoppable "$@"
}
