#!/usr/bin/env bash
# Run a command in a built image as a restricted pod does: tests/image/run.sh ROOT FOLDER COMMAND...
#
# ROOT is where the image is mounted. The command (which begins with its environment, as NAME=value) runs as the image's
# user, in /app; without capabilities or a way to gain any; with a network of its own that has only loopback; and with
# nothing writable but /tmp, HOME, /dev/shm and /mnt/work, where FOLDER is. Plain namespaces, because container runtimes
# want cgroups to themselves, which a machine that is itself a container doesn't give. Needs root, util-linux, iproute2.
set -euo pipefail

if [ -z "${INSIDE:-}" ]; then
    export INSIDE=yes
    exec unshare --mount --pid --net --ipc --uts --fork --kill-child "$0" "$@"
fi

root=$1 folder=$2
shift 2

mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs -o mode=0700,uid=10001,gid=10001 tmpfs "$root/home/freesolo"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for device in null zero random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=2g tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=0755 tmpfs "$root/mnt"
mkdir "$root/mnt/work"
mount --bind "$folder" "$root/mnt/work"
ip link set lo up

exec chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all --ambient-caps=-all \
    env --ignore-environment --chdir=/app "$@"
