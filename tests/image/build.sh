#!/usr/bin/env bash
# `make image` without a Docker engine: tests/image/build.sh FOLDER, and then: tests/image/build.sh FOLDER clean
#
# Everything lies below FOLDER: the base (Debian 12, by debootstrap), buildah's storage, what the image holds (root),
# and its configuration (image.json). Needs root, Debian's buildah and debootstrap, 5 GB (CUDA: 15) and some minutes.
#
# BASE_IMAGE=...         another base
# TORCH_INDEX_URL=...    torch from elsewhere; empty: the CUDA image, from PyPI
# STORAGE_DRIVER=vfs     where overlays can't be mounted; more disk
#
# What this machine needs to reach its packages (pip's configuration, certificates, a folder of wheels) is handed to the
# build as secrets, mounts and a server on loopback. None of it is in the Dockerfile, nor in the image.
set -euo pipefail

folder=$(mkdir -p "$1" && cd "$1" && pwd)
project=$(cd "$(dirname "$0")/../.." && pwd)
export BUILDAH_ISOLATION=chroot
buildah=(buildah --storage-driver "${STORAGE_DRIVER:-overlay}" --root "$folder/storage" --runroot "$folder/run")

if [ "${2:-}" = clean ]; then
    "${buildah[@]}" rm --all >/dev/null
    "${buildah[@]}" rmi --all --force >/dev/null
    umount "$folder/storage/overlay" 2>/dev/null || true  # buildah's own bind mount
    rm -rf --one-file-system "$folder"
    exit
fi

make_base() {
    if [ ! -e "$folder/base" ]; then
        debootstrap --variant=minbase --include=python3-venv,python3-distutils,ca-certificates,netbase,tzdata \
            bookworm "$folder/base.new" >"$folder/debootstrap.log" 2>&1 ||
            { tail "$folder/debootstrap.log" >&2; exit 1; }
        rm -rf "$folder/base.new/var/cache/apt/archives/"*.deb "$folder/base.new/var/lib/apt/lists/"*
        mv "$folder/base.new" "$folder/base"
    fi
    local container
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" copy --quiet "$container" "$folder/base" / >/dev/null
    "${buildah[@]}" commit --quiet --rm "$container" localhost/base:bookworm >/dev/null
}

# A folder of wheels, as pip's find-links has it, as an index of torch alone: an address is all that the build is told.
serve_wheels() {
    mkdir -p "$folder/index/torch"
    ln -sf "$PIP_FIND_LINKS"/torch-*.whl "$folder/index/torch/"
    python3 -u -m http.server --bind 127.0.0.1 --directory "$folder/index" 0 >"$folder/index.log" 2>&1 &
    server=$!
    trap 'kill "$server"' EXIT
    until port=$(sed -n 's/^Serving HTTP on .* port \([0-9]*\) .*/\1/p' "$folder/index.log") && [ -n "$port" ]; do
        kill -0 "$server"
        sleep 0.1
    done
    TORCH_INDEX_URL=http://127.0.0.1:$port/
}

if [ -z "${BASE_IMAGE:-}" ]; then
    BASE_IMAGE=localhost/base:bookworm
    make_base
fi
if [ -z "${TORCH_INDEX_URL+set}" ]; then
    TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
    if compgen -G "${PIP_FIND_LINKS:-/nowhere}/torch-*.whl" >/dev/null; then serve_wheels; fi
fi

settings=()
if [ -e /etc/pip.conf ]; then settings+=(--secret id=pip,src=/etc/pip.conf); fi
if [ -n "${SSL_CERT_FILE:-}" ]; then  # uv trusts its own certificates unless told to use the system's
    echo 'system-certs = true' >"$folder/uv.toml"
    settings+=(--secret id=uv,src="$folder/uv.toml" --volume "$SSL_CERT_FILE:/etc/ssl/certs/ca-certificates.crt:ro")
fi

make --no-print-directory -C "$project" image IMAGE=localhost/freesolo:test CONTAINER_TOOL="${buildah[*]}" \
    BASE_IMAGE="$BASE_IMAGE" TORCH_INDEX_URL="$TORCH_INDEX_URL" \
    IMAGE_FLAGS="${settings[*]} --timestamp $(git -C "$project" log -1 --format=%ct)"

container=$("${buildah[@]}" from --pull-never localhost/freesolo:test)
ln -sfn "$("${buildah[@]}" mount "$container")" "$folder/root"
"${buildah[@]}" inspect --type image localhost/freesolo:test >"$folder/image.json"
