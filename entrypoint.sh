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
if [ ! -w "${HOME:-/}" ] && mkdir -p "${TMPDIR:-/tmp}/home" 2>/dev/null; then
    export HOME="${TMPDIR:-/tmp}/home"
fi
export USER="${USER:-$(id -un 2>/dev/null || id -u)}"

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
    -*)
        exec "$supervisor" up "$@"
        ;;
esac
if [ ! -d "$1" ] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
exec "$supervisor" up "$@"
