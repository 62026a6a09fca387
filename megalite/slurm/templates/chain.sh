#!/bin/bash
# Submit a chain of jobs with the same name, which Slurm runs one after the other: for clusters that do not requeue.
#
#   slurm/chain.sh COUNT NAME [sbatch options] SCRIPT [arguments]
#
# Each job resumes from the newest checkpoint; jobs that start after the run's last step end at once.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
count=$1
name=$2
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "megalite: error: $count is not a number of jobs; write 1 or more" >&2; exit 2; }
mkdir -p "logs/$name"
for ((link = 0; link < count; link++)); do
    sbatch --job-name="$name" --dependency=singleton --no-requeue "${@:3}"
done
