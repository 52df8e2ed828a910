#!/usr/bin/env bash
# The line that several machines start, tried on one: two network namespaces with a cable between
# them are two hosts, each with its own addresses and ports. Needs Linux, root and iproute2.
#
#   sudo examples/two_hosts.sh --recipe fp8lm-o3 --parallel dp=4 --steps 50 --out runs/two-hosts
#
# PYTHON is the interpreter, PER_HOST the processes on each host (default 2).
set -euo pipefail

python=${PYTHON:-python} per_host=${PER_HOST:-2}
hosts=("quaver-$$-a" "quaver-$$-b") addresses=(10.77.0.1 10.77.0.2)

finish() {
  kill $(jobs -p) 2> /dev/null || true
  wait
  for host in "${hosts[@]}"; do ip netns delete "$host" 2> /dev/null || true; done
}
trap finish EXIT

for host in "${hosts[@]}"; do ip netns add "$host"; done
ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}"
for i in 0 1; do
  ip -n "${hosts[i]}" address add "${addresses[i]}/24" dev eth0
  ip -n "${hosts[i]}" link set eth0 up
  ip -n "${hosts[i]}" link set lo up
done

# gloo must be told which network joins the hosts; NCCL has NCCL_SOCKET_IFNAME. The hosts share one
# host name, so is_host says where the rendezvous is; on real machines torchrun finds that out.
is_host=(true false)
for i in 0 1; do
  GLOO_SOCKET_IFNAME=eth0 ip netns exec "${hosts[i]}" "$python" -m torch.distributed.run \
    --nnodes 2 --nproc-per-node "$per_host" --local-addr "${addresses[i]}" \
    --rdzv-backend c10d --rdzv-endpoint "${addresses[0]}:29400" --rdzv-id quaver \
    --rdzv-conf "is_host=${is_host[i]}" \
    -m quaver train "$@" &
done
for i in 0 1; do wait -n; done
