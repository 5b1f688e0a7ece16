#!/usr/bin/env bash
# with_bucket.sh BUCKET CMD...: mounts gs://BUCKET read-only at /tmp/BUCKET on this machine, unless it is mounted already,
# and then executes CMD. ArrayRecord files are read at random offsets, which needs a path in the file system.
set -euo pipefail

[[ $# -ge 2 ]] || {
  echo "usage: with_bucket.sh BUCKET CMD..." >&2
  exit 2
}
bucket=$1 folder=${TMPDIR:-/tmp}/$1
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

[[ $bucket =~ ^[a-z0-9][a-z0-9._-]*$ ]] || die "${bucket@Q} is no name of a bucket"
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
  mkdir -p "$folder"
  check_folder
  gcsfuse --implicit-dirs -o ro "$bucket" "$folder"
fi
exec "$@"
