# vLLM's own image, with the supervisor in an environment of its own beside it: docker build -t vllm-supervisor .
ARG VLLM_VERSION=0.32.0

# The same image builds the environment, so that it fits that image's Python.
FROM vllm/vllm-openai:v${VLLM_VERSION} AS build

# What vLLM's environment holds before we come; compared below.
RUN mkdir -p /opt/supervisor \
    && python3 -P -c "import importlib.metadata as m; \
        print(*sorted({f'{d.name}=={d.version}' for d in m.distributions()}), sep='\n')" \
        >/opt/supervisor/vllm-packages.txt

WORKDIR /src
COPY requirements/runtime.txt requirements/build.txt requirements/
COPY pyproject.toml entrypoint.sh ./
COPY supervisor supervisor

# Filled from outside, with the image's pip or else its uv: needs no python3-venv, and leaves no pip inside.
RUN python3 -m venv --without-pip /opt/supervisor \
    && if python3 -m pip --version >/dev/null 2>&1; \
        then install() { python3 -m pip --python /opt/supervisor/bin/python install --no-cache-dir "$@"; }; \
        else install() { uv pip install --python /opt/supervisor/bin/python --no-cache "$@"; }; \
    fi \
    && install --no-deps --require-hashes -r requirements/runtime.txt \
    && install --no-deps --require-hashes -r requirements/build.txt --target /src/build \
    && PYTHONPATH=/src/build install --no-deps --no-build-isolation . \
    && cp entrypoint.sh /opt/supervisor/ \
    && chmod 755 /opt/supervisor/entrypoint.sh \
    && /opt/supervisor/bin/supervisor --help >/dev/null


FROM vllm/vllm-openai:v${VLLM_VERSION}
ARG VLLM_VERSION
ARG VERSION=dev
ARG REVISION=unknown

LABEL org.opencontainers.image.title="vllm-supervisor" \
      org.opencontainers.image.description="vLLM's OpenAI server under a supervisor" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="vllm/vllm-openai:v${VLLM_VERSION}"

COPY --from=build /opt/supervisor /opt/supervisor

# A link, not PATH: `python3` has to remain vLLM's. The build fails here if vLLM's packages are not as they were.
RUN ln -s /opt/supervisor/bin/supervisor /usr/local/bin/supervisor \
    && python3 -P -c "import importlib.metadata as m; \
        print(*sorted({f'{d.name}=={d.version}' for d in m.distributions()}), sep='\n')" >/tmp/vllm-packages.txt \
    && diff /opt/supervisor/vllm-packages.txt /tmp/vllm-packages.txt \
    && rm /tmp/vllm-packages.txt

# SUPERVISOR_IMAGE: a missing model is an error here, not a wish for the demo. PORT stays at its default, 8000.
ENV SUPERVISOR_IMAGE=1 \
    SUPERVISOR_HOST=0.0.0.0 \
    SUPERVISOR_LOG_FORMAT=json
EXPOSE 8000

# The start may take as long as SUPERVISOR_STARTUP_TIMEOUT: weights are downloaded and kernels compiled.
HEALTHCHECK --start-period=20m --interval=15s --timeout=10s --retries=4 \
    CMD ["/opt/supervisor/bin/python", "-c", "import http.client as h, os, sys; \
c = h.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=8); \
c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/supervisor/entrypoint.sh"]
CMD ["up"]
