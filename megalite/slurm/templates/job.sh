# The common part of the templates. They include it with the job's arguments, RUN_DIR RUN.yaml [section.key=value ...].
# It sets hosts, ranks_per_node, master, port, train (the arguments of python) and folder (the folder of the job's files).

set -euo pipefail

refuse() {
    echo "megalite: error: $1" >&2
    exit 2
}

[ $# -ge 2 ] || refuse "the job has $# arguments; write RUN_DIR RUN.yaml [section.key=value ...]"
run_dir=$1
run_file=$2
# Escape dollar signs in the paths: megalite would expand them as variables.
train=(-m megalite train "${run_file//\$/\$\$}" "${@:3}" "run.dir=${run_dir//\$/\$\$}")

# Slurm sends USR1 before the time limit and TERM when it preempts the job. The file STOP in the run's folder asks the
# run to save a checkpoint and end, under every launcher. The traps are set first: by default these signals end bash.
announced=
interrupted=
ask_to_stop() {
    interrupted=yes
    touch "$run_dir/STOP" || true
}
trap 'announced=yes; ask_to_stop' USR1
trap ask_to_stop TERM

# All sizes are Slurm's; 8(x4) means 8 tasks on each of 4 nodes.
[[ $SLURM_TASKS_PER_NODE =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] ||
    refuse "Slurm gave $SLURM_TASKS_PER_NODE tasks per node; give --ntasks-per-node, the same for all nodes"
ranks_per_node=${BASH_REMATCH[1]}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The address at which Slurm reaches a host, so that no DNS is needed. Loopback addresses are skipped: they would lead a
# node to itself.
address_of() {
    local address
    address=$(scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    [[ $address =~ ^[0-9.]+$|: ]] ||
        address=$(getent ahosts "$address" | awk '$1 !~ /^127\./ && $1 != "::1" { print $1; exit }') || true
    echo "${address:-$1}"
}

# Every job has ten ports of its own: `megalite verify` uses ports above the first.
master=$(address_of "${hosts[0]}")
# Every restart has another port: a rank of the start before, not controlled by Slurm, may still hold the old port.
port=$((20000 + (SLURM_JOB_ID + 601 * ${SLURM_RESTART_COUNT:-0}) % 1200 * 10))
export MASTER_ADDR=$master MASTER_PORT=$port

# srun does not take over --cpus-per-task from sbatch: every step must ask for its processors.
cpus_per_task=${SLURM_CPUS_PER_TASK:-1}

# Record the job: its script, run file, command and commit.
folder=$PWD/logs/$SLURM_JOB_NAME/$SLURM_JOB_ID
mkdir -p "$folder" "$run_dir"
touch "$folder/started"
MEGALITE_STARTED=$(stat -c %Y "$folder/started")  # a STOP file made from now on is for this start
export MEGALITE_STARTED
cp "$0" "$folder/job.sbatch"
cp "$run_file" "$folder/run.yaml"
printf '%q ' python "${train[@]}" >"$folder/command"
{ git describe --always --dirty && git diff HEAD; } >"$folder/commit" 2>/dev/null || rm -f "$folder/commit"

# Launchers lose the exit status of a rank; a rank that ends with a user error appends the message to this file.
export MEGALITE_USER_ERRORS=$folder/user_errors
rm -f "$MEGALITE_USER_ERRORS"

# To run in a container, set for example: container=(apptainer exec --nv image.sif). Ranks started by srun run inside.
[ -n "${container+set}" ] || container=()

# Write DeepSpeed's hostfile, a line per host: the host's name if it resolves, since ssh may be set up for the name.
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

# End the job, or requeue it. The files in the run's folder decide, since launchers lose exit statuses.
conclude() {
    local status=$1 failed=$(($1 ? $1 : 1)) count=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-20}
    if is_new DONE.json; then
        finish 0 "the run is done"
    elif [ -s "$MEGALITE_USER_ERRORS" ]; then
        finish 2 "the run ended with a user error, which a restart does not fix"
    elif is_new STOPPED.json && [ -z "$announced" ] && grep -q '"reason": *"STOP"' "$run_dir/STOPPED.json"; then
        finish 0 "the run was stopped by hand"
    elif [ "$status" = 0 ] && ! is_new STOPPED.json && grep -qs '^ *stop_after: [0-9]' "$run_dir/config.yaml"; then
        finish 0 "the run ended at train.stop_after"
    elif ! has_checkpoint; then
        finish "$failed" "the run ended with status $status and has no checkpoint to resume from"
    elif [ "$count" -ge "$most" ]; then
        finish "$failed" "the run ended with status $status; restarted $count times, of at most $most"
    elif [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        # For example by scancel: a canceled job is not requeued.
        finish "$failed" "the run ended with status $status, since Slurm ended the job"
    fi
    # Slurm ends this script when it requeues the job: print the message first.
    say "the run ended with status $status and resumes from its newest checkpoint; the job is requeued"
    scontrol requeue "$SLURM_JOB_ID" ||
        finish "$failed" "the run ended with status $status; Slurm does not requeue the job"
    exit "$status"
}

has_checkpoint() {
    [ -n "$(find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*[0-9]' -print -quit 2>/dev/null)" ]
}

is_new() {  # file name: whether the file in the run's folder is newer than the start of this job
    [ "$run_dir/$1" -nt "$folder/started" ]
}

say() {  # message
    rm -f "$folder/.deepspeed_env"  # it may contain secrets
    echo "job $SLURM_JOB_ID: $1" >&2
}

finish() {  # status, message
    say "$2"
    exit "$1"
}

source "$SLURM_SUBMIT_DIR/slurm/env.sh"
