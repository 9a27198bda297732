/* mock_upstream: single-threaded epoll mock of an OpenAI-compatible server.
 * build: gcc -O2 -o mock_upstream mock_upstream.c
 * usage: mock_upstream [-p port] [-i interval_us between SSE chunks] [-l first-byte latency_us] [-b burst(0/1)]
 * POST .../chat/completions : JSON (about 600 bytes, with usage), or SSE when the body has "stream":true
 *   number of content chunks = "max_tokens" / "max_completion_tokens" of the body (default 20)
 *   then a usage chunk, then [DONE]. Each SSE chunk is its own write() unless -b 1.
 * anything else: {"object":"list","data":[]}
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct conn {
    int fd;
    int gen;
    char *in;
    size_t ilen, icap;
    char *out;
    size_t olen, ooff, ocap;
    int wantw;
    int streaming;
    int remaining;
    int stage;
    int inq;
    int close_after;
    long long due;
    struct conn *next;
} conn;

static int ep, interval_us = 0, latency_us = 0, burst = 0;
static conn *qh[2], *qt[2]; /* 0: latency queue, 1: interval queue */
static char json_resp[2048];
static size_t json_len;
static char sse_hdr[512];
static size_t sse_hdr_len;
static char sse_first[1024], sse_chunk[1024], sse_fin[1024], sse_usage[1024], sse_done[64];
static size_t l_first, l_chunk, l_fin, l_usage, l_done;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}
static void q_push(int q, conn *c, long long due) {
    c->due = due;
    c->next = NULL;
    c->inq = 1;
    if (qt[q])
        qt[q]->next = c;
    else
        qh[q] = c;
    qt[q] = c;
}

static void obuf(conn *c, const char *d, size_t n) {
    if (c->olen + n > c->ocap) {
        c->ocap = (c->olen + n) * 2 + 4096;
        c->out = realloc(c->out, c->ocap);
    }
    memcpy(c->out + c->olen, d, n);
    c->olen += n;
}
static void arm(conn *c, int w) {
    if (c->wantw == w)
        return;
    c->wantw = w;
    struct epoll_event e = {.events = EPOLLIN | (w ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
}
static int flush(conn *c) {
    while (c->ooff < c->olen) {
        ssize_t n = send(c->fd, c->out + c->ooff, c->olen - c->ooff, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                arm(c, 1);
                return 0;
            }
            return -1;
        }
        c->ooff += n;
    }
    c->olen = c->ooff = 0;
    arm(c, 0);
    return 1;
}
static void cclose(conn *c) {
    if (c->fd >= 0) {
        close(c->fd);
        c->fd = -1;
    }
    if (!c->inq) {
        free(c->in);
        free(c->out);
        free(c);
    }
}

static size_t chunk_wrap(char *dst, const char *payload) {
    return sprintf(dst, "%zx\r\n%s\r\n", strlen(payload), payload);
}

static int stream_step(conn *c) { /* emit next chunk; returns 1 when finished */
    if (c->stage == 0) {
        obuf(c, sse_hdr, sse_hdr_len);
        obuf(c, sse_first, l_first);
        c->stage = 1;
        return 0;
    }
    if (c->stage == 1) {
        if (c->remaining > 0) {
            obuf(c, sse_chunk, l_chunk);
            c->remaining--;
            return 0;
        }
        obuf(c, sse_fin, l_fin);
        c->stage = 2;
        return 0;
    }
    if (c->stage == 2) {
        obuf(c, sse_usage, l_usage);
        c->stage = 3;
        return 0;
    }
    obuf(c, sse_done, l_done);
    c->streaming = 0;
    return 1;
}
static int process(conn *c);
static int pump(conn *c) { /* run the stream from now */
    while (c->streaming) {
        int fin = stream_step(c);
        if (!burst || fin) {
            int r = flush(c);
            if (r < 0)
                return -1;
            if (r == 0) {
                if (!fin)
                    return 0;
            }
        }
        if (fin)
            break;
        if (interval_us) {
            q_push(1, c, now_us() + interval_us);
            return 0;
        }
    }
    return c->streaming ? 0 : process(c);
}
static long find_num(const char *b, size_t n, const char *key, long def) {
    char *p = memmem(b, n, key, strlen(key));
    if (!p)
        return def;
    p += strlen(key);
    char *e = (char *)b + n;
    while (p < e && (*p == ' ' || *p == ':' || *p == '"'))
        p++;
    return p < e ? strtol(p, NULL, 10) : def;
}
static int is_stream(const char *b, size_t n) {
    char *p = memmem(b, n, "\"stream\"", 8);
    if (!p)
        return 0;
    p += 8;
    char *e = (char *)b + n;
    while (p < e && (*p == ' ' || *p == ':'))
        p++;
    return p + 4 <= e && !memcmp(p, "true", 4);
}

static void respond(conn *c, const char *path, size_t plen, const char *body, size_t blen) {
    if (!memmem(path, plen, "/chat/completions", 17)) {
        const char *r = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                        "27\r\n\r\n{\"object\":\"list\",\"data\":[]}";
        obuf(c, r, strlen(r));
        return;
    }
    if (is_stream(body, blen)) {
        long n = find_num(body, blen, "\"max_tokens\"", -1);
        if (n < 0)
            n = find_num(body, blen, "\"max_completion_tokens\"", 20);
        c->streaming = 1;
        c->remaining = n;
        c->stage = 0;
        return;
    }
    obuf(c, json_resp, json_len);
}
static int process(conn *c) { /* consume complete requests in c->in */
    while (!c->streaming && !c->inq && c->ilen > 4) {
        char *he = memmem(c->in, c->ilen, "\r\n\r\n", 4);
        if (!he)
            break;
        size_t hl = he + 4 - c->in;
        size_t cl = 0;
        int chunked = 0, expect = 0;
        char *p = memchr(c->in, '\n', hl);
        char *line = c->in;
        size_t l0 = p - c->in;
        char *sp = memchr(line, ' ', l0);
        char *path = sp ? sp + 1 : line;
        char *sp2 = sp ? memchr(path, ' ', l0 - (path - line)) : NULL;
        size_t plen = sp2 ? (size_t)(sp2 - path) : 0;
        for (p++; p < he + 2;) {
            char *nl = memchr(p, '\n', he + 4 - p);
            if (!nl)
                break;
            if (!strncasecmp(p, "content-length:", 15))
                cl = strtoul(p + 15, NULL, 10);
            else if (!strncasecmp(p, "transfer-encoding:", 18))
                chunked = 1;
            else if (!strncasecmp(p, "expect:", 7))
                expect = 1;
            p = nl + 1;
        }
        size_t total;
        const char *body;
        size_t blen;
        char *tmp = NULL;
        if (!chunked) {
            total = hl + cl;
            if (c->ilen < total)
                break;
            body = c->in + hl;
            blen = cl;
        } else {
            size_t o = hl;
            tmp = malloc(c->ilen);
            blen = 0;
            int done = 0;
            while (1) {
                char *nl = memchr(c->in + o, '\n', c->ilen - o);
                if (!nl)
                    break;
                size_t n = strtoul(c->in + o, NULL, 16);
                size_t st = nl + 1 - c->in;
                if (st + n + 2 > c->ilen)
                    break;
                memcpy(tmp + blen, c->in + st, n);
                blen += n;
                o = st + n + 2;
                if (!n) {
                    done = 1;
                    break;
                }
            }
            if (!done) {
                free(tmp);
                break;
            }
            total = o;
            body = tmp;
        }
        (void)expect;
        respond(c, path, plen, body, blen);
        free(tmp);
        memmove(c->in, c->in + total, c->ilen - total);
        c->ilen -= total;
        if (latency_us) {
            q_push(0, c, now_us() + latency_us);
            return 0;
        }
        if (c->streaming)
            return pump(c);
        if (flush(c) < 0)
            return -1;
    }
    return 0;
}
static void run_due(int q) {
    long long t = now_us();
    while (qh[q] && qh[q]->due <= t) {
        conn *c = qh[q];
        qh[q] = c->next;
        if (!qh[q])
            qt[q] = NULL;
        c->inq = 0;
        if (c->fd < 0) {
            cclose(c);
            continue;
        }
        int r;
        if (c->streaming)
            r = pump(c);
        else {
            r = flush(c);
            if (r >= 0)
                r = process(c);
        }
        if (r < 0) {
            epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, NULL);
            cclose(c);
        }
    }
}

int main(int argc, char **argv) {
    int port = 9100, o;
    while ((o = getopt(argc, argv, "p:i:l:b:")) != -1) {
        if (o == 'p')
            port = atoi(optarg);
        else if (o == 'i')
            interval_us = atoi(optarg);
        else if (o == 'l')
            latency_us = atoi(optarg);
        else if (o == 'b')
            burst = atoi(optarg);
    }
    signal(SIGPIPE, SIG_IGN);
    const char *body =
        "{\"id\":\"chatcmpl-mock0123456789abcdefABCDEF\",\"object\":\"chat.completion\",\"created\":1700000000,"
        "\"model\":\"gpt-4o-mini\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Hello! "
        "This is a mock answer of a moderate length, good enough for a "
        "benchmark.\",\"refusal\":null,\"annotations\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{"
        "\"prompt_tokens\":60,\"completion_tokens\":20,\"total_tokens\":80,\"prompt_tokens_details\":{\"cached_"
        "tokens\":0,\"audio_tokens\":0},\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0}},"
        "\"service_tier\":\"default\",\"system_fingerprint\":\"fp_0123456789\"}";
    json_len = sprintf(json_resp,
                       "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: "
                       "req_mock0123456789\r\nopenai-processing-ms: 12\r\nContent-Length: %zu\r\n\r\n%s",
                       strlen(body), body);
    sse_hdr_len =
        sprintf(sse_hdr, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nx-request-id: "
                         "req_mock0123456789\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n");
#define HEAD                                                                                                           \
    "data: "                                                                                                           \
    "{\"id\":\"chatcmpl-mock0123456789abcdefABCDEF\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"     \
    "\"model\":\"gpt-4o-mini\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_0123456789\","
    l_first =
        chunk_wrap(sse_first, HEAD "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\","
                                   "\"refusal\":null},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n");
    l_chunk = chunk_wrap(sse_chunk, HEAD "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" "
                                         "token\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n");
    l_fin = chunk_wrap(
        sse_fin, HEAD
        "\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":null}\n\n");
    l_usage =
        chunk_wrap(sse_usage, HEAD "\"choices\":[],\"usage\":{\"prompt_tokens\":60,\"completion_tokens\":20,\"total_"
                                   "tokens\":80,\"prompt_tokens_details\":{\"cached_tokens\":0,\"audio_tokens\":0},"
                                   "\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0}}}\n\n");
    l_done = sprintf(sse_done, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    int ls = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(ls, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(ls, (void *)&a, sizeof a) || listen(ls, 1024)) {
        perror("bind");
        return 1;
    }
    ep = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(ep, EPOLL_CTL_ADD, ls, &e);
    struct epoll_event ev[256];
    for (;;) {
        int to = -1;
        for (int q = 0; q < 2; q++)
            if (qh[q]) {
                long long d = qh[q]->due - now_us();
                int ms = d <= 0 ? 0 : (int)((d + 999) / 1000);
                if (to < 0 || ms < to)
                    to = ms;
            }
        int n = epoll_wait(ep, ev, 256, to);
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            if (!c) {
                int f;
                while ((f = accept4(ls, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(f, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    conn *k = calloc(1, sizeof *k);
                    k->fd = f;
                    struct epoll_event x = {.events = EPOLLIN, .data.ptr = k};
                    epoll_ctl(ep, EPOLL_CTL_ADD, f, &x);
                }
                continue;
            }
            int r = 0;
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                if (c->icap - c->ilen < 65536) {
                    c->icap = c->icap * 2 + 65536;
                    c->in = realloc(c->in, c->icap);
                }
                ssize_t m = recv(c->fd, c->in + c->ilen, c->icap - c->ilen, 0);
                if (m == 0 || (m < 0 && errno != EAGAIN))
                    r = -1;
                else if (m > 0) {
                    c->ilen += m;
                    r = process(c);
                }
            }
            if (r >= 0 && (ev[i].events & EPOLLOUT)) {
                r = flush(c);
                if (r > 0 && c->streaming && !c->inq)
                    r = pump(c);
                else if (r > 0)
                    r = process(c);
            }
            if (r < 0) {
                epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, NULL);
                cclose(c);
            }
        }
        run_due(0);
        run_due(1);
    }
}
