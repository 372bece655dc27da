#!/usr/bin/env bash
# On a host: from a fresh machine to an environment that runs llama_jax. What is done already is left as it is.
#
#   bootstrap.sh EXTRA [BUCKET MOUNT]   EXTRA tpu or cuda; BUCKET such as gs://name, mounted at MOUNT
#   PYTHON=/path/to/python              instead of the first of 3.11 to 3.13
set -euo pipefail

extra=$1 bucket=${2:-} mount=${3:-/mnt/bucket}
venv=$HOME/llama_jax-venv
cd "$(dirname "$0")/.."

say() { echo "bootstrap: $*"; }
fail() {
  echo "error: $*" >&2
  exit 2
}

exec 9>"$HOME/.llama_jax-bootstrap.lock"
flock -n 9 || fail "another bootstrap is under way on this host; wait for it"

install_packages() {
  say "installing $*"
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq install -y "$@" >/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import ensurepip, sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# Limits: checkpoints, data and sockets are many open files; pinned buffers are locked memory. They count from the next login.
limits=/etc/security/limits.d/90-llama_jax.conf
if [ ! -e "$limits" ]; then
  say "raising the limits of open files and locked memory"
  printf '* %s %s\n' - "nofile 1048576" - "memlock unlimited" | sudo tee "$limits" >/dev/null
fi

if [ "$extra" = tpu ]; then
  # jax warns that starting is slow without them on v5e and newer.
  pages=/sys/kernel/mm/transparent_hugepage/enabled
  if [ -e "$pages" ] && ! grep -q '\[always\]' "$pages"; then
    echo always | sudo tee "$pages" >/dev/null || say "transparent huge pages stay off"
  fi
  # A process that was killed leaves it behind, and the next one refuses the chips because of it.
  lock=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}
  if [ -e "$lock" ] && command -v fuser >/dev/null && ! sudo fuser -s "$lock" 2>/dev/null; then
    say "removing the lock that a dead process left on the chips"
    sudo rm -f "$lock"
  fi
fi

# The environment: exactly the versions of requirements.lock, anew only when those or the dependencies change.
if ! python=$(find_python); then
  [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no Python 3.11 to 3.13 with venv"
  install_packages python3.11 python3.11-venv
  python=$(find_python) || fail "no Python 3.11 to 3.13 with venv is to be had; install one, and name it: PYTHON=/path/to/python"
fi
wanted="$extra $("$python" -V) $(cat pyproject.toml requirements.lock | sha256sum)"
if [ "$(cat "$venv/.wanted" 2>/dev/null)" = "$wanted" ]; then
  say "the environment is up to date"
else
  say "installing llama_jax and its dependencies into $venv, some minutes"
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -c requirements.lock -e ".[$extra]"
  echo "$wanted" >"$venv/.wanted"
fi

if [ -n "$bucket" ]; then
  if mountpoint -q "$mount"; then
    say "$bucket is mounted at $mount already"
  else
    if ! command -v gcsfuse >/dev/null; then
      keys=/usr/share/keyrings/cloud.google.asc
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
      echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      install_packages gcsfuse
    fi
    say "mounting $bucket at $mount"
    sudo mkdir -p "$mount" && sudo chown "$(id -u):$(id -g)" "$mount"
    gcsfuse --implicit-dirs "${bucket#gs://}" "$mount" ||
      fail "$bucket cannot be mounted; the hosts' service account needs roles/storage.objectUser on it"
  fi
fi
say "done on $(hostname)"
