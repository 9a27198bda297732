# Built in one stage, run in another without pip's cache and as an ordinary user.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/farebox
COPY requirements.txt ./
RUN /opt/farebox/bin/pip install --no-cache-dir --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY pricing pricing
COPY ledger ledger
COPY farebox farebox
RUN /opt/farebox/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN groupadd --gid 10001 farebox \
    && useradd --uid 10001 --gid 10001 --no-log-init --home-dir /data --create-home --shell /usr/sbin/nologin farebox
COPY --from=build /opt/farebox /opt/farebox
ENV PATH=/opt/farebox/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FAREBOX_HOST=0.0.0.0 \
    FAREBOX_PORT=8080 \
    FAREBOX_DATABASE_URL=sqlite:////data/farebox.db \
    FAREBOX_JOURNAL_DIR=/data/journal
# By number, so that a platform which refuses root can see that it is not.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f'http://127.0.0.1:{os.environ[\"FAREBOX_PORT\"]}/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["farebox"]
CMD ["serve"]
