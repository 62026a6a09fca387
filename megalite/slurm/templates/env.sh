# Settings of NCCL, gloo and threads, for a cluster of identical nodes. Add the settings that your cluster needs.
# Variables that are already set keep their values.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The network interface of the route to the last node. By default gloo takes the interface of the node's own host name,
# which on many systems is the loopback device.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
    interface=$(ip -o route get "$(address_of "${hosts[-1]}")" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=$interface
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
