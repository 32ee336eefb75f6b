#!/usr/bin/env bash
# A cluster on one machine: hosts are network namespaces, each with a link of its own to a common bridge, limited to a rate in both
# directions; on a machine with an NVIDIA GPU every rank gets its share of it (MPS). For benchmarks and tests of what a network costs.
# Root and iproute2 (ip, tc) are needed; NET_TOOLS=DIR takes them and, in DIR/lib, their libraries from a folder.
#
#   cluster.sh up HOSTS MBIT [RANKS]   makes the hosts; MBIT Mbit/s per link and direction, 0 for no limit; RANKS per host [1]
#   cluster.sh rate MBIT               changes the links' rate while ranks run
#   cluster.sh run COMMAND...          starts the command once per rank, with the variables of torchrun (RANK, WORLD_SIZE, ...);
#                                      a rank that fails ends the others; exits as the first that failed
#   cluster.sh mpirun COMMAND...       the same through Open MPI, for ranks on processors: TCP between the hosts; its own options may come first
#   cluster.sh down                    removes what `up` has made
#
# up:   MPS=0        no MPS: ranks take turns on the GPU, which is slow, but one that is killed takes no other with it
#       BURST_KIB=N  what a link sends at once before its rate holds [256 at 10 Gbit/s, less at less, at least 64]
# run:  GPU_SHARE=N  per cent of the GPU's multiprocessors that each rank may use [100 / ranks]; 0 for all of them
set -euo pipefail

readonly STATE=${LINA_TESTBED:-/tmp/lina-testbed}
readonly BRIDGE=lina-br NETWORK=10.88.0
readonly TOOLS=${NET_TOOLS:-}
SELF=$(realpath "${BASH_SOURCE[0]}")
readonly SELF

# Runs ip or tc, from the folder of tools if there is one.
tool() {
  local name=$1
  shift
  if [[ -z $TOOLS ]]; then command "$name" "$@"; else LD_LIBRARY_PATH=$TOOLS/lib "$TOOLS/$name" "$@"; fi
}

# Becomes a command inside a host; the tools' library path does not reach it.
enter() {
  local host=$1
  shift
  if [[ -z $TOOLS ]]; then exec ip netns exec "lina$host" "$@"; fi
  export CALLERS_LIBRARIES=${LD_LIBRARY_PATH:-} LD_LIBRARY_PATH=$TOOLS/lib
  # shellcheck disable=SC2016
  exec "$TOOLS/ip" netns exec "lina$host" bash -c '
    if [[ -n $CALLERS_LIBRARIES ]]; then export LD_LIBRARY_PATH=$CALLERS_LIBRARIES; else unset LD_LIBRARY_PATH; fi
    unset CALLERS_LIBRARIES; exec "$@"' bash "$@"
}

# Limits what a device sends.
limit() {
  local burst=${BURST_KIB:-$(($2 * 256 / 10000))}
  if [[ -z ${BURST_KIB:-} ]]; then burst=$((burst < 64 ? 64 : burst > 256 ? 256 : burst)); fi
  tool tc "${@:3}" qdisc add dev "$1" root tbf rate "${2}mbit" burst "$((burst * 1024))" latency 20ms
}

rate() {
  local hosts host
  read -r hosts _ <"$STATE/size"
  for ((host = 0; host < hosts; host++)); do
    tool tc -n "lina$host" qdisc del dev eth0 root 2>/dev/null || true # there is none without a limit
    tool tc qdisc del dev "lina-p$host" root 2>/dev/null || true
    if (($1 > 0)); then
      limit eth0 "$1" -n "lina$host"
      limit "lina-p$host" "$1"
    fi
  done
}

mps_variables() { export CUDA_MPS_PIPE_DIRECTORY=$STATE/mps CUDA_MPS_LOG_DIRECTORY=$STATE/mps-log; }

up() {
  local hosts=$1 mbit=$2 ranks=${3:-1} host
  mkdir -p "$STATE/mps" "$STATE/mps-log"
  echo "$hosts $ranks" >"$STATE/size"
  tool ip link add "$BRIDGE" type bridge
  tool ip link set "$BRIDGE" up
  for ((host = 0; host < hosts; host++)); do
    tool ip netns add "lina$host"
    tool ip link add "lina-p$host" type veth peer name eth0 netns "lina$host"
    tool ip link set "lina-p$host" master "$BRIDGE" up
    tool ip -n "lina$host" address add "$NETWORK.$((host + 1))/24" dev eth0
    tool ip -n "lina$host" link set eth0 up
    tool ip -n "lina$host" link set lo up
  done
  if ((mbit > 0)); then rate "$mbit"; fi
  if [[ -e /dev/nvidiactl && ${MPS:-1} != 0 ]]; then
    mps_variables
    if nvidia-cuda-mps-control -d; then touch "$STATE/mps-runs"; else echo "cluster.sh: no MPS: ranks take turns on the GPU" >&2; fi
  fi
  echo "$((hosts * ranks)) ranks on $hosts hosts, $mbit Mbit/s"
}

run() {
  local hosts ranks size rank failed=0 left code processes=()
  read -r hosts ranks <"$STATE/size"
  size=$((hosts * ranks))
  export WORLD_SIZE=$size LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=$NETWORK.1 MASTER_PORT=${MASTER_PORT:-29500}
  export LINA_TOKEN=${LINA_TOKEN:-testbed} LINA_SHARE_GPU=1 NCCL_SOCKET_IFNAME=eth0
  if [[ -e $STATE/mps-runs ]]; then
    mps_variables
    # Enough hardware queues, or streams wait for each other falsely; with many more, contexts cannot be made.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}
    local share=${GPU_SHARE:-$((100 / size))}
    if [[ $share != 0 ]]; then export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$share; fi
  fi
  for ((rank = 0; rank < size; rank++)); do
    (
      # NCCL takes no GPU twice on one host, so each rank is one to it.
      export RANK=$rank LOCAL_RANK=$((rank % ranks)) NCCL_HOSTID=rank$rank
      enter "$((rank / ranks))" setsid "$@"
    ) &
    processes+=($!)
  done
  end_all() { for process in "${processes[@]}"; do kill -- "-$process" 2>/dev/null || kill "$process" 2>/dev/null || true; done; }
  trap end_all INT TERM
  for ((left = size; left > 0; left--)); do
    code=0
    wait -n || code=$?
    if ((code != 0 && failed == 0)); then
      failed=$code
      end_all
    fi
  done
  return "$failed"
}

mpirun() {
  local hosts ranks host list=
  read -r hosts ranks <"$STATE/size"
  for ((host = 1; host <= hosts; host++)); do list+=$NETWORK.$host:$ranks,; done
  enter 0 mpirun --allow-run-as-root -n "$((hosts * ranks))" --host "${list%,}" --map-by slot --bind-to none \
    --mca plm_rsh_agent "$SELF agent" --mca plm_rsh_no_tree_spawn 1 --mca oob_tcp_if_include eth0 --mca btl tcp,self \
    --mca btl_tcp_if_include eth0 --mca btl_tcp_links 4 --mca mpi_yield_when_idle 1 \
    -x PATH "$@"
}

# What mpirun takes for a remote shell: an address of this network and a command line.
agent() {
  local address=$1
  shift
  enter "$((${address##*.} - 1))" sh -c "$*"
}

down() {
  local hosts host
  read -r hosts _ <"$STATE/size"
  if [[ -e $STATE/mps-runs ]]; then
    mps_variables
    echo quit | nvidia-cuda-mps-control || true
  fi
  for ((host = 0; host < hosts; host++)); do tool ip netns del "lina$host" || true; done
  tool ip link del "$BRIDGE" || true
  rm -rf "$STATE"
}

case ${1:-} in
  up | rate | run | mpirun | agent | down) "$@" ;;
  *)
    sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
