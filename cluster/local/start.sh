#!/usr/bin/env bash
# A Ray head on this machine, reachable from this machine alone, until Ctrl-C or SIGTERM.
# Options are those of `ray start`: start.sh --num-cpus 8 --num-gpus 1
set -euo pipefail

export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" # any user of this machine can reach a loopback port
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
if [[ $RAY_AUTH_MODE == token ]]; then
  ray get-auth-token --generate >/dev/null # made once, in the home folder; never printed
fi

echo "submit to http://127.0.0.1:${PPC_DASHBOARD_PORT:-8265}"
exec ray start --head --block \
  --node-ip-address 127.0.0.1 --port "${PPC_RAY_PORT:-6379}" \
  --dashboard-host 127.0.0.1 --dashboard-port "${PPC_DASHBOARD_PORT:-8265}" \
  "$@"
