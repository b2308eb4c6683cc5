#!/usr/bin/env bash
# A Ray head on this machine until Ctrl-C or SIGTERM; its job server answers this machine alone.
# Options are those of `ray start`: start.sh --num-cpus 8 --num-gpus 1
set -euo pipefail

# Ray's other ports listen on all interfaces, whatever address the node is given: a token guards them.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
if [[ $RAY_AUTH_MODE == token ]]; then
  ray get-auth-token --generate >/dev/null # made once, in the home folder; not printed
fi

echo "submit to http://127.0.0.1:${PPC_DASHBOARD_PORT:-8265}"
exec ray start --head --block --port "${PPC_RAY_PORT:-6379}" \
  --dashboard-host 127.0.0.1 --dashboard-port "${PPC_DASHBOARD_PORT:-8265}" "$@"
