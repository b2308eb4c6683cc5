#!/usr/bin/env bash
# Makes the Secret ppc-secrets: values of the environment, else random ones. Run once, after base/namespace.yaml.
set -euo pipefail

if kubectl --namespace ppc get secret ppc-secrets >/dev/null 2>&1; then
  echo "ppc-secrets is there already; a new database password would not fit the database: nothing is changed" >&2
  exit 1
fi
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

PGPASSWORD="${PGPASSWORD:-$(random)}"
MLFLOW_AUTH_ADMIN_PASSWORD="${MLFLOW_AUTH_ADMIN_PASSWORD:-$(random)}"
MLFLOW_FLASK_SERVER_SECRET_KEY="${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(random)}"
MLFLOW_TRACKING_PASSWORD="${MLFLOW_TRACKING_PASSWORD:-$MLFLOW_AUTH_ADMIN_PASSWORD}"

text="$(<"$(dirname "${BASH_SOURCE[0]}")/secrets.template.yaml")"
for name in PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD; do
  if [[ ! ${!name} =~ ^[A-Za-z0-9._~-]{12,}$ ]]; then
    echo "$name: 12 characters or more, of A-Z a-z 0-9 . _ ~ -" >&2
    exit 2
  fi
  text="${text//"\${$name}"/${!name}}"
done
kubectl apply --filename - <<<"$text"
echo "the password of MLflow's admin: kubectl -n ppc get secret ppc-secrets -o jsonpath='{.data.MLFLOW_AUTH_ADMIN_PASSWORD}' | base64 -d"
