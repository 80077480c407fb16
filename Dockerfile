# One file, two images: with PyTorch for CPUs, and with PyTorch for NVIDIA GPUs. Both stand on the same small base: from
# PyPI, torch brings CUDA's libraries along, and the node's container runtime brings the driver.
#
#   make image                 CPU
#   make image TORCH=cuda      CUDA
#
# What differs is TORCH_INDEX_URL: where torch itself is taken from, PyPI if empty. All else is requirements.lock's.
# Settings for a package mirror are build secrets, which leave no trace: --secret id=uv,src=uv.toml (uv's own file) and
# --secret id=pip,src=pip.conf.

# Python 3.11.16 on Debian 12, September 2026, every architecture. Instead of it: any Debian 12 with python3.11,
# python3.11-venv and ca-certificates.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# ----------------------------------------------------------------------------------------------------------------------
# What freesolo needs, in exact versions. Made anew only when the locks or pyproject.toml change.
FROM ${BASE_IMAGE} AS dependencies

ARG UV_VERSION=0.13.9
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3.11 -m venv /opt/uv && \
    /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" && \
    python3.11 -m venv --without-pip /opt/freesolo

# Bytecode is compiled here, because nothing can write it later: the root file system is read-only where this runs, and
# each of a cluster's many processes would compile torch, Ray and MLflow anew, 4 seconds of a core. That costs 100 MB of
# the compressed image. It isn't checked against its source when it is loaded (UNCHECKED_HASH): times of files are free
# to be the same for all, as reproducible images have them. The fixed hash seed keeps the order of sets in it.
ENV PATH=/opt/freesolo/bin:/opt/uv/bin:$PATH \
    VIRTUAL_ENV=/opt/freesolo \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    PYTHONHASHSEED=0

WORKDIR /build
COPY pyproject.toml requirements.lock requirements-cuda.lock ./

# Torch alone from its index, which also has other packages, in other versions.
ARG TORCH_INDEX_URL=
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    if [ -n "${TORCH_INDEX_URL}" ]; then \
        grep '^torch==' requirements.lock > torch.txt && \
        uv pip install --no-deps --default-index "${TORCH_INDEX_URL}" --requirement torch.txt; \
    fi

# The locks are constraints: they say which version, pyproject.toml says what (none of its extras). A dependency that no
# lock knows stops the build.
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    uv pip install --constraint requirements.lock --constraint requirements-cuda.lock --requirement pyproject.toml && \
    uv pip check && \
    uv pip freeze > installed.txt && \
    sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' installed.txt && \
    if grep --invert-match --line-regexp --fixed-strings --file=requirements.lock --file=requirements-cuda.lock \
        installed.txt; then echo "^ in no lock: run make lock"; exit 1; fi

# What only compilers, test suites and Java read, about 300 MB; and uv's lock, which anyone may write.
RUN packages="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
    rm -rf "${packages}/torch/include" "${packages}/torch/test" "${packages}/ray/jars" /opt/freesolo/.lock && \
    find "${packages}/torch/bin" -mindepth 1 ! -name torch_shm_manager -delete && \
    find "${packages}" -type d \( -name tests -o -path '*/pyarrow/include' -o -path '*/nvidia/*/include' \) -prune \
        -exec rm -rf {} +

# ----------------------------------------------------------------------------------------------------------------------
# freesolo itself, beside them: the few files that change with each commit are a layer of their own.
FROM dependencies AS package

COPY README.md LICENSE NOTICE ./
COPY freesolo freesolo

# The commit becomes part of the version, which checkpoints and registered models carry: an image has no git to ask.
ARG COMMIT
ARG SOURCE_DATE_EPOCH
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    : "${COMMIT:?an image says which commit it is of: --build-arg COMMIT=\$(git rev-parse HEAD)}" && \
    printf '[egg_info]\ntag_build = +g%s\n' "${COMMIT}" > setup.cfg && \
    uv pip install --no-deps --build-constraint requirements.lock --prefix /package . && \
    rm /package/.lock

# ----------------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}

COPY --from=dependencies /opt/freesolo /opt/freesolo

# A login shell sets PATH anew, and KubeRay can be told to start Ray from one. The date is for /etc/shadow.
RUN SOURCE_DATE_EPOCH=86400 useradd --no-log-init --uid 10001 --user-group --create-home --shell /bin/bash freesolo && \
    echo "PATH=/opt/freesolo/bin:\$PATH" > /etc/profile.d/freesolo.sh

# Writable where this runs: /tmp and HOME, no more. PYTHONDONTWRITEBYTECODE is not set: code that a job is submitted
# with is unpacked below /tmp, and compiled once. Not NVIDIA_VISIBLE_DEVICES either: `all` would show every GPU of the
# node to pods that asked for none; the device plugin sets it for those that did.
ENV PATH=/opt/freesolo/bin:$PATH \
    HOME=/home/freesolo \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GIT_PYTHON_REFRESH=quiet \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true

COPY --from=package /package /opt/freesolo
WORKDIR /app
COPY jobs jobs
COPY configs configs
COPY LICENSE NOTICE ./

ARG COMMIT
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="freesolo" \
      org.opencontainers.image.description="Unsupervised instance segmentation at Kubernetes scale" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

# By number: Kubernetes can then tell that it isn't root. No health check and no entry point: probes and commands are
# the pod's. No wget: KubeRay probes Ray 2.53 and later by HTTP, where the manifest states rayVersion.
USER 10001:10001
