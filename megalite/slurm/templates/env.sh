# Settings of NCCL, gloo and threads, for a cluster whose nodes are alike: the place for what yours needs. What is set
# already stays as it is.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The interface that leads from here to the last node. gloo would take whichever the node's own name stands for, which
# on many systems is the loopback.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
    interface=$(ip -o route get "$(address_of "${hosts[-1]}")" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=$interface
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
