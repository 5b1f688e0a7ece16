#!/usr/bin/env bash
# with_disk.sh DEVICE CMD...: mounts a data disk (DATA_DISK in config.sh) read-only at /mnt/disks/data on this machine, unless
# something is mounted there already, and then executes CMD. DEVICE is /dev/sdb for the first disk that is attached to a v4, v5e
# or v5p; `lsblk` lists them.
set -euo pipefail

[[ $# -ge 2 && $1 == /dev/* ]] || {
  echo "usage: with_disk.sh /dev/DEVICE CMD..." >&2
  exit 2
}
device=$1 folder=/mnt/disks/data
shift
if ! mountpoint -q "$folder"; then
  sudo mkdir -p "$folder"
  sudo mount -o ro,noload "$device" "$folder" # noload: several machines have it, and none may write its journal
fi
exec "$@"
