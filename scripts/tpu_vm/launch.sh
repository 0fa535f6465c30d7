#!/usr/bin/env bash
# One command on every worker of a TPU pod slice; --help says how.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
remote="${REMOTE_DIR:-gradot_jax}"
pid_file=".gradot_jax.pid"

usage() {
  cat <<TEXT
usage: bash ${0} [--dry-run] setup
       bash ${0} [--dry-run] mount BUCKET FOLDER
       bash ${0} [--dry-run] COMMAND [OPTION...]
       bash ${0} [--dry-run] stop

setup      copies this checkout to every worker and installs it there; again after each change
mount      mounts a bucket with gcsfuse at the same folder on every worker
COMMAND    compress, finetune or evaluate: runs \`gradot COMMAND OPTION... --distributed\` on every
           worker at once
stop       asks a running command to stop; finetune saves first, all workers at the same step, and
           goes on with --resume

--dry-run  prints what would be run on this machine instead of running it

Environment:
    TPU_NAME    the TPU VM                               (needed)
    ZONE        its zone                                 (default: that of gcloud's configuration)
    PROJECT     its project                              (default: that of gcloud's configuration)
    REMOTE_DIR  folder of the checkout on the workers, in the home folder (default: gradot_jax)
    PYTHON      interpreter on the workers to set up with, 3.11 or newer  (default: python3)

Paths are those of the workers. What is read must be the same on all of them, and what is written
must be seen by all of them (bundle, checkpoints): use a mounted bucket or another shared folder.
README.md, beside this script, goes through a whole run.

    export TPU_NAME=opt ZONE=us-central2-b
    bash ${0} setup
    bash ${0} mount my-bucket /tmp/shared
    bash ${0} compress --model /tmp/shared/opt-1.3b --calibration /tmp/shared/text.txt \\
        --out /tmp/shared/offsite
TEXT
}

refuse() {
  echo "$*" >&2
  exit 2
}

# Runs a program, or prints it so that it could be run.
run() {
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu_vm() {
  local verb="$1"
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --worker=all ${ZONE:+"--zone=$ZONE"} \
    ${PROJECT:+"--project=$PROJECT"}
}

on_workers() {
  tpu_vm ssh "$TPU_NAME" "--command=$1"
}

setup() {
  local folder
  folder="$(mktemp -d)"
  # Expanded now: the variable is gone when the trap runs.
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  git -C "$root" ls-files -z --cached --others --exclude-standard \
    | tar --create --gzip --file "$folder/gradot_jax.tar.gz" --directory "$root" \
      --ignore-failed-read --null --files-from -
  tpu_vm scp "$folder/gradot_jax.tar.gz" "$TPU_NAME:"
  on_workers "$(printf \
    'set -e; mkdir -p %q; tar -xzf gradot_jax.tar.gz -C %q; cd %q; export PYTHON=%q; . scripts/setup_venv.sh; setup_venv tpu' \
    "$remote" "$remote" "$remote" "${PYTHON:-python3}")"
}

mount_bucket() {
  [ "$#" -eq 2 ] || refuse "mount takes a bucket and a folder"
  # Results appear by renaming their folder, which gcsfuse refuses unless told otherwise.
  on_workers "$(printf 'mkdir -p %q && { mountpoint -q %q || gcsfuse --implicit-dirs --rename-dir-limit=1000 %q %q; }' \
    "$2" "$2" "$1" "$2")"
}

launch() {
  local arguments
  arguments="$(printf '%q ' "$@")"
  # The shell becomes the program, so that the number which `stop` reads is the program's.
  on_workers "$(printf 'echo $$ >%q && export PYTHONPATH=%q && exec %q -u -m gradot_jax.cli.main %s--distributed' \
    "$pid_file" "$remote" "$remote/.venv/bin/python" "$arguments")"
}

stop() {
  on_workers "$(printf 'kill -TERM "$(cat %q)"' "$pid_file")"
}

dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
  setup | mount | stop | compress | finetune | evaluate) ;;
  *) refuse "expected setup, mount, stop, compress, finetune or evaluate; --help says more" ;;
esac
[ -n "${TPU_NAME:-}" ] || refuse "set TPU_NAME to the TPU VM"
case "$1" in
  setup) setup ;;
  mount) mount_bucket "${@:2}" ;;
  stop) stop ;;
  *) launch "$@" ;;
esac
