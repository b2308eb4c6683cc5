#!/usr/bin/env bash
# MLflow for several users: PostgreSQL, logins, artifacts through the server.
#   serve.sh [ENV_FILE]        settings from the file (see mlflow.env), secrets from the environment alone:
#   PGPASSWORD, MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more), MLFLOW_FLASK_SERVER_SECRET_KEY (keep it: logins end
#   when it changes)
set -euo pipefail

SECRETS=(PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY)
fail() {
  echo "serve.sh: $*" >&2
  exit 2
}

if [[ $# -gt 0 ]]; then
  for name in "${SECRETS[@]}" AWS_SECRET_ACCESS_KEY; do
    if grep -Eq "^[[:space:]]*(export[[:space:]]+)?$name=" "$1"; then
      fail "$1 holds $name; secrets belong in the environment, not in files"
    fi
  done
  set -o allexport
  # shellcheck disable=SC1090  # the user's file
  source "$1"
  set +o allexport
fi

for name in "${SECRETS[@]}" PGHOST PPC_ARTIFACTS PPC_ALLOWED_HOSTS; do
  [[ -n ${!name:-} ]] || fail "set $name"
done
[[ ${#MLFLOW_AUTH_ADMIN_PASSWORD} -ge 12 ]] || fail "MLFLOW_AUTH_ADMIN_PASSWORD: 12 characters or more"

# The URI names its driver and holds no password: libpq reads PGPASSWORD. So `ps` and the files below show none.
database="postgresql+psycopg2://${PGUSER:-mlflow}@$PGHOST:${PGPORT:-5432}/${PGDATABASE:-mlflow}"
run_dir="$(mktemp -d)"
cat >"$run_dir/auth.ini" <<INI
[mlflow]
default_permission = ${PPC_DEFAULT_PERMISSION:-READ}
database_uri = $database
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI

export MLFLOW_BACKEND_STORE_URI="$database" MLFLOW_AUTH_CONFIG_PATH="$run_dir/auth.ini"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
# At most 40 connections a worker and store: PostgreSQL needs max_connections above workers x 80.
export MLFLOW_SQLALCHEMYSTORE_POOL_SIZE="${MLFLOW_SQLALCHEMYSTORE_POOL_SIZE:-20}"
export MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW="${MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW:-20}"

origins=()
if [[ -n ${PPC_CORS_ORIGINS:-} ]]; then
  origins=(--cors-allowed-origins "$PPC_CORS_ORIGINS")
fi
exec mlflow server --app-name basic-auth \
  --artifacts-destination "$PPC_ARTIFACTS" \
  --host "${PPC_MLFLOW_HOST:-127.0.0.1}" --port "${PPC_MLFLOW_PORT:-5000}" --workers "${PPC_MLFLOW_WORKERS:-4}" \
  --allowed-hosts "$PPC_ALLOWED_HOSTS" "${origins[@]}"
