# What the templates share. It is sourced with the arguments of the job, RUN_DIR RUN.yaml [section.key=value ...], and
# leaves: hosts, ranks_per_node, master, port, train (the arguments of python) and folder, which has the job's files.

set -euo pipefail

refuse() {
    echo "megalite: error: $1" >&2
    exit 2
}

[ $# -ge 2 ] || refuse "the job has $# arguments; write RUN_DIR RUN.yaml [section.key=value ...]"
run_dir=$1
run_file=$2
# A dollar sign in these paths is one: megalite would take it for a variable.
train=(-m megalite train "${run_file//\$/\$\$}" "${@:3}" "run.dir=${run_dir//\$/\$\$}")

# Slurm announces the end of the time, or that it takes the nodes for another job. The file STOP in the run's folder asks
# for a checkpoint and an orderly end; that works under every launcher. Heeded from here on: the signal would end bash.
announced=
interrupted=
ask_to_stop() {
    interrupted=yes
    touch "$run_dir/STOP" || true
}
trap 'announced=yes; ask_to_stop' USR1
trap ask_to_stop TERM

# Every size from Slurm's own variables; 8(x4) is 8 on each of 4 nodes.
[[ $SLURM_TASKS_PER_NODE =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] ||
    refuse "Slurm gave $SLURM_TASKS_PER_NODE tasks a node; give --ntasks-per-node, the same for all"
ranks_per_node=${BASH_REMATCH[1]}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The address by which Slurm reaches a host, so that no DNS is needed. A loopback address would lead a node to itself.
address_of() {
    local address
    address=$(scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    [[ $address =~ ^[0-9.]+$|: ]] ||
        address=$(getent ahosts "$address" | awk '$1 !~ /^127\./ && $1 != "::1" { print $1; exit }') || true
    echo "${address:-$1}"
}

# Jobs on one node meet at ports of their own, and leave the next nine free: verification takes some of them.
master=$(address_of "${hosts[0]}")
# Another port for every start: a rank of the one before may have outlived it, out of Slurm's reach.
port=$((20000 + (SLURM_JOB_ID + 601 * ${SLURM_RESTART_COUNT:-0}) % 1200 * 10))
export MASTER_ADDR=$master MASTER_PORT=$port

# A step asks for processors anew: srun does not take over what sbatch was told.
cpus_per_task=${SLURM_CPUS_PER_TASK:-1}

# What the job was: its script, run file, command and commit.
folder=$PWD/logs/$SLURM_JOB_NAME/$SLURM_JOB_ID
mkdir -p "$folder" "$run_dir"
touch "$folder/started"
MEGALITE_STARTED=$(stat -c %Y "$folder/started")  # a STOP from now on is for this start
export MEGALITE_STARTED
cp "$0" "$folder/job.sbatch"
cp "$run_file" "$folder/run.yaml"
printf '%q ' python "${train[@]}" >"$folder/command"
{ git describe --always --dirty && git diff HEAD; } >"$folder/commit" 2>/dev/null || rm -f "$folder/commit"

# Launchers lose the status of a rank; a rank that met an error of the user's writes it here.
export MEGALITE_USER_ERRORS=$folder/user_errors
rm -f "$MEGALITE_USER_ERRORS"

# By hand, for an image: container=(apptainer exec --nv image.sif). Ranks started by srun run inside.
[ -n "${container+set}" ] || container=()

# A line a host, for DeepSpeed: by its name where that can be looked up, since ssh may know the host by it.
write_hostfile() {
    local host
    for host in "${hosts[@]}"; do
        getent hosts "$host" >/dev/null || host=$(address_of "$host")
        echo "$host slots=$ranks_per_node"
    done >"$folder/hostfile"
}

# Run the launcher until it ends.
launch() {
    local launcher status
    [ -z "$interrupted" ] || conclude 0  # there is no time left
    "$@" &
    launcher=$!
    while true; do
        interrupted=
        status=0
        wait "$launcher" || status=$?
        [ -n "$interrupted" ] || break
    done
    conclude "$status"
}

# End the job, or put it back into the queue. The files of the run's folder are the truth: launchers lose statuses.
conclude() {
    local status=$1 failed=$(($1 ? $1 : 1)) count=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-20}
    if is_new DONE.json; then
        finish 0 "the run is done"
    elif [ -s "$MEGALITE_USER_ERRORS" ]; then
        finish 2 "the run ended by an error that a restart does not mend"
    elif is_new STOPPED.json && [ -z "$announced" ] && grep -q '"reason": *"STOP"' "$run_dir/STOPPED.json"; then
        finish 0 "the run was stopped by hand"
    elif [ "$status" = 0 ] && ! is_new STOPPED.json && grep -qs '^ *stop_after: [0-9]' "$run_dir/config.yaml"; then
        finish 0 "the run ended at train.stop_after"
    elif ! has_checkpoint; then
        finish "$failed" "the run ended with status $status and has no checkpoint to go on from"
    elif [ "$count" -ge "$most" ]; then
        finish "$failed" "the run ended with status $status; restarted $count times, of at most $most"
    elif [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        # Such as by scancel, which is to be the last word.
        finish "$failed" "the run ended with status $status, since Slurm ended the job"
    fi
    # Slurm ends this script together with the job that it requeues: whatever is to be said is said before.
    say "the run ended with status $status and goes on from its newest checkpoint; the job is requeued"
    scontrol requeue "$SLURM_JOB_ID" ||
        finish "$failed" "the run ended with status $status; Slurm does not requeue the job"
    exit "$status"
}

has_checkpoint() {
    [ -n "$(find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*[0-9]' -print -quit 2>/dev/null)" ]
}

is_new() {  # whether the run's folder has a file since the launcher was started
    [ "$run_dir/$1" -nt "$folder/started" ]
}

say() {  # message
    rm -f "$folder/.deepspeed_env"  # it may have secrets
    echo "job $SLURM_JOB_ID: $1" >&2
}

finish() {  # status, message
    say "$2"
    exit "$1"
}

source "$SLURM_SUBMIT_DIR/slurm/env.sh"
