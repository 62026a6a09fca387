#!/bin/bash
# A true Slurm of two nodes on one machine, for tests: slurmctld here; a slurmd and an sshd a node, each node in
# namespaces of its own for network, processes, mounts and host name. Needs root, and installs Debian's packages.
#
#   minislurm.sh serve              start it, say "ready", stop it once stdin ends, whatever ended the other side
#   minislurm.sh kill_node NAME     take a node down as a power cut would
#   minislurm.sh start_node NAME    and up again
#
# MINISLURM is the folder of its state; with SLURM_CONF=$MINISLURM/slurm.conf sbatch and the others talk to it.
set -euo pipefail

state=${MINISLURM:?names the folder of the state}
nodes=(node1 node2)
cpus=4                      # that Slurm believes a node to have
network=10.78.0
bridge=mlbr0
export SLURM_CONF=$state/slurm.conf

install_packages() {
    command -v slurmctld slurmd sbatch munged pdsh ip >/dev/null && [ -x /usr/sbin/sshd ] && return 0
    local packages=(slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2)
    export DEBIAN_FRONTEND=noninteractive
    { apt-get install -y --no-install-recommends "${packages[@]}" ||
        { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }; } >"$state/apt.log" 2>&1
}

write_slurm_conf() {
    cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=$(hostname -s)($network.254)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as its credentials are good, two minutes unless told.
AuthInfo=socket=$state/munge.sock,cred_expire=5
SlurmctldPort=17817
SlurmdPort=17818
StateSaveLocation=$state/saved
SlurmctldPidFile=$state/slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdPidFile=$state/slurmd-%n.pid
SlurmdLogFile=$state/slurmd-%n.log
SlurmdSpoolDir=$state/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
UnkillableStepTimeout=20
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=DEFAULT CPUs=$cpus State=UNKNOWN
$(for number in "${!nodes[@]}"; do echo "NodeName=${nodes[number]} NodeAddr=$network.$((number + 1))"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    echo "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf"  # named, since looking for one fails without a cgroup mount
}

write_ssh_files() {
    mkdir -p -m 700 "$state/ssh"
    ssh-keygen -q -t ed25519 -N '' -f "$state/ssh/id_ed25519"
    ssh-keygen -q -t ed25519 -N '' -f "$state/ssh/hostkey"
    cp "$state/ssh/id_ed25519.pub" "$state/ssh/authorized_keys"
    cat >"$state/ssh/config" <<CONF
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    IdentityFile $state/ssh/id_ed25519
CONF
    cat >"$state/ssh/sshd_config" <<CONF
HostKey $state/ssh/hostkey
AuthorizedKeysFile $state/ssh/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
CONF
    chmod 600 "$state"/ssh/*
}

make_network() {
    local number name
    ip link add "$bridge" type bridge
    ip addr add "$network.254/24" dev "$bridge"
    ip link set "$bridge" up
    for number in "${!nodes[@]}"; do
        name=ml${nodes[number]}
        ip netns add "$name"
        ip link add "$name" type veth peer name eth0 netns "$name"
        ip link set "$name" master "$bridge" up
        ip -n "$name" addr add "$network.$((number + 1))/24" dev eth0
        ip -n "$name" link set eth0 up
        ip -n "$name" link set lo up
        # A node's names come from a file alone: there is no DNS to ask.
        mkdir -p "/etc/netns/$name"
        {
            echo "127.0.0.1 localhost"
            echo "$network.254 $(hostname -s)"
            for other in "${!nodes[@]}"; do echo "$network.$((other + 1)) ${nodes[other]}"; done
        } >"/etc/netns/$name/hosts"
        echo 'hosts: files' >"/etc/netns/$name/nsswitch.conf"
        : >"/etc/netns/$name/resolv.conf"
    done
}

start_node() {
    mkdir -p "$state/spool-$1"
    setsid ip netns exec "ml$1" unshare --uts --pid --ipc --mount --fork --kill-child --mount-proc \
        bash "$0" be_node "$1" </dev/null >>"$state/$1.log" 2>&1 &
    echo $! >"$state/$1.pid"
}

be_node() {  # process 1 of a node; what is below it goes with it
    hostname "$1"
    mkdir -p "$HOME/.ssh" /run/sshd
    mount --bind "$state/ssh" "$HOME/.ssh"
    mount -t tmpfs shm /dev/shm
    /usr/sbin/sshd -f "$state/ssh/sshd_config" -E "$state/sshd-$1.log"
    slurmd -D -N "$1" &
    while true; do wait || true; sleep 1; done
}

kill_node() {
    if [ -s "$state/$1.pid" ]; then
        kill -KILL "$(cat "$state/$1.pid")" 2>/dev/null || true
        rm "$state/$1.pid"
    fi
}

all_up() { [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = ${#nodes[@]} ]; }

wait_for() {  # seconds, command
    local tries=$(($1 * 10))
    shift
    until "$@"; do
        ((tries-- > 0)) || { echo "minislurm: no success after all that time: $*" >&2; return 1; }
        sleep 0.1
    done
}

start() {
    mkdir -p "$state/saved"
    write_slurm_conf
    write_ssh_files
    remove_network  # of a cluster whose end nobody saw
    make_network
    (umask 077; head -c 1024 /dev/urandom >"$state/munge.key")
    munged --force --socket="$state/munge.sock" --pid-file="$state/munged.pid" --log-file="$state/munged.log" \
        --seed-file="$state/munged.seed" --key-file="$state/munge.key" >>"$state/munged.out" 2>&1
    wait_for 5 test -S "$state/munge.sock"
    slurmctld >>"$state/slurmctld.out" 2>&1
    for node in "${nodes[@]}"; do start_node "$node"; done
    wait_for 30 all_up
}

remove_network() {
    for node in "${nodes[@]}"; do
        ip netns del "ml$node" 2>/dev/null || true
        ip link del "ml$node" 2>/dev/null || true
        rm -rf "/etc/netns/ml$node"
    done
    ip link del "$bridge" 2>/dev/null || true
}

stop() {
    for node in "${nodes[@]}"; do kill_node "$node"; done
    for daemon in slurmctld munged; do
        if [ -s "$state/$daemon.pid" ]; then kill -KILL "$(cat "$state/$daemon.pid")" 2>/dev/null || true; fi
    done
    remove_network
}

serve() {
    mkdir -p "$state"
    exec 9>/run/minislurm.lock  # one on a machine: its network and ports are what they are
    flock --timeout 600 9 || { echo "another cluster of this kind is in use on this machine" >&2; return 1; }
    install_packages
    trap stop EXIT
    trap '' INT HUP
    start 9>&-
    echo ready
    while read -r _; do :; done
}

case ${1:-} in
    serve) serve ;;
    kill_node | start_node | be_node) "$1" "${2:?names a node}" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
