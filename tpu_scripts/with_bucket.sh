#!/usr/bin/env bash
# with_bucket.sh BUCKET CMD...: mounts gs://BUCKET read-only at /tmp/BUCKET on this machine, unless it is mounted already,
# and then executes CMD. ArrayRecord files are read at random offsets, which needs a path in the file system.
#
# Variables, for ENV_FILE or in front of CMD:
#   BUCKET_CACHE_MB    how much of the files gcsfuse may keep on this machine. It fetches a file as a whole then, so all that is
#                      read must fit: with less, it would fetch the same files again and again. 0: it keeps none (default)
#   BUCKET_CACHE_DIR   where (default: a folder of the user's on the disk; /dev/shm/NAME is in memory)
#   BUCKET_MOUNTS      the folder in which BUCKET is mounted (default: /tmp)
set -euo pipefail

[[ $# -ge 2 ]] || {
  echo "usage: with_bucket.sh BUCKET CMD..." >&2
  exit 2
}
bucket=$1 folder=${BUCKET_MOUNTS:-/tmp}/$1 cache_mb=${BUCKET_CACHE_MB:-0}
cache_dir=${BUCKET_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/titok_jax/bucket_$1}
shift

die() {
  echo "error: $*" >&2
  exit 2
}

# Others can make files in /tmp too. A link there could lead anywhere, and so could a folder or a mount of another user.
check_folder() {
  [[ ! -L $folder ]] || die "$folder is a link, expected a mounted bucket or nothing; remove it"
  [[ -d $folder ]] || die "$folder is no folder, expected a mounted bucket or nothing; remove it"
  [[ -O $folder || $(stat -c %u "$folder") == 0 ]] || die "$folder belongs to another user"
}

# Sets `caches` to gcsfuse's flags. What it knows of files stays for an hour, not for a minute: the data do not change.
choose_caches() {
  local free
  caches=(--metadata-cache-ttl-secs=3600 --stat-cache-max-size-mb=-1 --type-cache-max-size-mb=-1)
  ((cache_mb > 0)) || return 0
  mkdir -p "$cache_dir"
  free=$(df --output=avail --block-size=1M "$cache_dir" | tail -n 1)
  ((cache_mb <= free)) || die "BUCKET_CACHE_MB is $cache_mb, but $cache_dir has $((free)) MB free"
  # Without the last flag only files whose beginning is read first would be kept. ArrayRecord begins at the end.
  caches+=(--cache-dir="$cache_dir" --file-cache-max-size-mb="$cache_mb" --file-cache-cache-file-for-range-read)
}

[[ $bucket =~ ^[a-z0-9][a-z0-9._-]*$ ]] || die "${bucket@Q} is no name of a bucket"
[[ $cache_mb =~ ^[0-9]{1,9}$ ]] || die "BUCKET_CACHE_MB is ${cache_mb@Q}, expected a whole number"
[[ ! -e $folder && ! -L $folder ]] || check_folder
if ! mountpoint -q "$folder"; then
  if ! command -v gcsfuse >/dev/null; then
    keys=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
    echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  choose_caches
  mkdir -p "$folder"
  check_folder
  gcsfuse --implicit-dirs -o ro "${caches[@]}" "$bucket" "$folder"
fi
exec "$@"
