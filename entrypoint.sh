#!/bin/sh
# What `docker run IMAGE ...` runs:
#
#   (nothing), up ..., explain, doctor ...    that verb of the supervisor; nothing means `up`
#   serve                                     `up` on SageMaker, which gives this argument
#   --port 9000, Qwen/Qwen3-0.6B, /models/m   `supervisor up` with these arguments
#   --help, --version                         what the supervisor says of itself
#   vllm ..., bash, any other command         that command, without the supervisor
#
# Always by exec: process 1 is the program itself, and signals reach it.
set -eu

supervisor=${0%/*}/bin/supervisor

# A user without a name (`--user 1234`), or a root that is read only: vLLM wants a home to write to, and torch a name.
# The manifests name a home on a volume, where nobody has made it yet.
mkdir -p "${HOME:-/}" 2>/dev/null || true
if [ ! -w "${HOME:-/}" ]; then
    home="${TMPDIR:-/tmp}/home"
    mkdir -p "$home" 2>/dev/null || true
    if [ -d "$home" ] && [ -w "$home" ] || home=$(mktemp -d 2>/dev/null); then
        export HOME="$home"
    fi
fi
[ "${USER:-}" ] || USER=$(id -un 2>/dev/null) || USER=$(id -u)
export USER

case ${1:-up} in
    up | explain | doctor | status | job | fetch | -h | --help | -V | --version)
        if [ "$#" -eq 0 ] || [ -z "$1" ]; then set -- up; fi
        exec "$supervisor" "$@"
        ;;
    serve)
        shift
        export SAGEMAKER_BIND_TO_PORT="${SAGEMAKER_BIND_TO_PORT:-8080}"
        exec "$supervisor" up "$@"
        ;;
    -* | *.[gG][gG][uU][fF] | *.safetensors) # a model's file may be executable, as all are on many a mount
        exec "$supervisor" up "$@"
        ;;
esac
if [ ! -d "$1" ] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
exec "$supervisor" up "$@"
