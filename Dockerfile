# vLLM's own image, with the supervisor in an environment of its own beside it: docker build -t vllm-supervisor .
#
#   --build-arg VLLM_VERSION=0.32.0     on that version of vllm/vllm-openai
#   --build-arg MODEL=org/name          with that model's weights inside; also MODEL_REVISION, and HF_ENDPOINT
#   --secret id=hf_token,src=FILE       for a gated or private one: the token is in no layer
#   --build-arg VERSION=1.2.3 --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(date -u +%FT%TZ)"
#                                       for the labels
ARG VLLM_VERSION=0.32.0

# The same image builds the environment, so that it fits that image's Python. It is filled from outside, with the image's
# pip or else its uv: needs no python3-venv, and leaves no pip inside. This part changes with the lock alone.
FROM vllm/vllm-openai:v${VLLM_VERSION} AS dependencies
WORKDIR /src
COPY scripts/image_environment scripts/
RUN scripts/image_environment >vllm-before
COPY scripts/image_install scripts/
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN python3 -m venv --without-pip /opt/supervisor \
    && scripts/image_install --no-deps --require-hashes -r requirements/runtime.txt \
    && scripts/image_install --no-deps --require-hashes -r requirements/build.txt --target /src/tools


# The supervisor, and the options of a vLLM whose catalogue is not shipped.
FROM dependencies AS build
COPY pyproject.toml README.md LICENSE ./
COPY supervisor supervisor
RUN PYTHONPATH=/src/tools scripts/image_install --no-deps --no-build-isolation --prefix /opt/package .
COPY entrypoint.sh /opt/package/
RUN chmod 755 /opt/package/entrypoint.sh \
    && flags=$(echo /opt/package/lib/python3*/site-packages/supervisor/vllm/flags) \
    && version=$(python3 -P -c "import importlib.metadata as m; print(m.version('vllm').partition('+')[0])") \
    && if [ ! -f "$flags/$version.json" ]; then python3 -P "$flags/dump.py" >"$flags/$version.json"; fi


# The weights of MODEL, where one is named. In a part of its own: its token and its caches stay behind.
FROM dependencies AS weights
COPY --from=build /opt/package /opt/supervisor
ARG MODEL=""
ARG MODEL_REVISION=""
ARG HF_ENDPOINT
RUN --mount=type=secret,id=hf_token \
    mkdir -p /opt/weights \
    && if [ -n "$MODEL" ]; then \
        HF_TOKEN="$(cat /run/secrets/hf_token 2>/dev/null || true)" HF_HOME=/opt/weights \
            /opt/supervisor/bin/supervisor fetch \
        && rm -rf /opt/weights/hub/.locks \
        && chmod -R a+rX /opt/weights; \
    fi


FROM vllm/vllm-openai:v${VLLM_VERSION}
ARG MODEL=""

COPY --from=dependencies /opt/supervisor /opt/supervisor
COPY --from=weights /opt/weights /opt/weights
COPY --from=build /opt/package /opt/supervisor

# Where vLLM's image has no bytecode, each container's first start makes it anew: 30 s on 16 cores.
RUN python3 -m compileall -q -j 0 "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true

# A link, not PATH: `python3` has to remain vLLM's. The build fails here where vLLM's environment is not as it was, or
# where the supervisor does not find this vLLM and its options.
RUN --mount=type=bind,from=dependencies,source=/src,target=/src \
    ln -s /opt/supervisor/bin/supervisor /usr/local/bin/supervisor \
    && /src/scripts/image_environment >/tmp/vllm-after \
    && diff /src/vllm-before /tmp/vllm-after \
    && rm /tmp/vllm-after \
    && PYTHONDONTWRITEBYTECODE=1 supervisor explain org/model >/dev/null

# SUPERVISOR_IMAGE: a missing model is an error here, not a wish for the demo. PORT stays at its default, 8000.
# MODEL_REVISION is not among them: of MODEL the image has that one alone, and another model has other revisions.
ENV MODEL=${MODEL} \
    SUPERVISOR_IMAGE=1 \
    SUPERVISOR_HOST=0.0.0.0 \
    SUPERVISOR_LOG_FORMAT=json
EXPOSE 8000

# Healthy is ready. It is asked over a private socket, so this fits every mode, port, address and certificate. The start
# may take as long as SUPERVISOR_STARTUP_TIMEOUT: weights are downloaded and kernels compiled.
HEALTHCHECK --start-period=20m --interval=15s --timeout=10s --retries=4 \
    CMD ["/opt/supervisor/bin/supervisor", "status"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/supervisor/entrypoint.sh"]
CMD ["up"]

ARG VLLM_VERSION
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="vllm-supervisor" \
      org.opencontainers.image.description="vLLM's OpenAI server under a supervisor" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="vllm/vllm-openai:v${VLLM_VERSION}"
