/* loadgen: closed-loop HTTP/1.1 keep-alive load generator which reads complete responses
 * (Content-Length, chunked; SSE read to the last chunk) and measures the server's own CPU.
 * build: gcc -O2 -o loadgen loadgen.c
 * usage: loadgen -u http://127.0.0.1:PORT/v1/chat/completions [-c conns] [-d seconds] [-w warm-up seconds]
 *        [-b body.json] [-H "Name: value"]... [-P server_root_pid] [-R total req/s (open pace, else closed loop)] [-n
 *        name] [-M many: the first @@@@ of the request counts from 0000 up, and begins again after so many]
 *        prints one JSON line: rps, latency (us) p50/p90/p99/max, first-byte p50/p99, errors, non-2xx, incomplete SSE,
 *        cpu_us_per_req (user+system time of the -P process and its descendants), rss_mb
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
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
static char *req, *mark;
static int many, turn;
static size_t reqlen;
static struct sockaddr_in addr;
static int ep;
static int is_sse;
static long long t_end, t_measure;
static long nok, nerr, nnon2xx, nincomplete, nconn;
static long long bytes;
static unsigned *lat, *ttfb;
static size_t nl, cap;
typedef struct {
    int fd;
    size_t sent;
    int st; /*0 hdr 1 len 2 chunked*/
    char hb[16384];
    size_t hl;
    long long rem;
    int cst;
    long long crem;
    long long t0, t1;
    char tail[16];
    int status;
    int close_after;
    int busy;
} C;
static long long now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}
static void tailadd(C *c, const char *p, size_t n) {
    if (n >= 16)
        memcpy(c->tail, p + n - 16, 16);
    else {
        memmove(c->tail, c->tail + n, 16 - n);
        memcpy(c->tail + 16 - n, p, n);
    }
}
static void conn_open(C *c) {
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (void *)&addr, sizeof addr)) {
        perror("connect");
        exit(2);
    }
    nconn++;
    struct timeval tv = {5, 0};
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
}
static void start(C *c) {
    c->st = 0;
    c->hl = 0;
    c->cst = 0;
    c->crem = 0;
    c->t1 = 0;
    c->busy = 1;
    memset(c->tail, 0, 16);
    if (mark) {
        char digits[5];
        snprintf(digits, 5, "%04d", turn);
        memcpy(mark, digits, 4);
        turn = (turn + 1) % many;
    }
    c->t0 = now();
    size_t o = 0;
    while (o < reqlen) {
        ssize_t n = send(c->fd, req + o, reqlen - o, MSG_NOSIGNAL);
        if (n <= 0) {
            break;
        }
        o += n;
    }
}
static void done(C *c) {
    long long t = now();
    c->busy = 0;
    if (t >= t_measure && t <= t_end) {
        if (c->status < 200 || c->status > 299)
            nnon2xx++;
        else if (is_sse && !memmem(c->tail, 16, "[DONE]", 6))
            nincomplete++;
        else
            nok++;
        if (nl == cap) {
            cap = cap ? cap * 2 : 65536;
            lat = realloc(lat, cap * 4);
            ttfb = realloc(ttfb, cap * 4);
        }
        lat[nl] = t - c->t0;
        ttfb[nl] = c->t1 - c->t0;
        nl++;
    }
}
static int feed(C *c, char *p, size_t n) { /* returns 1 when response complete */
    if (!c->t1)
        c->t1 = now();
    while (n) {
        if (c->st == 0) {
            size_t k = n;
            if (k > sizeof c->hb - c->hl)
                k = sizeof c->hb - c->hl;
            memcpy(c->hb + c->hl, p, k);
            size_t old = c->hl;
            c->hl += k;
            char *e = memmem(c->hb, c->hl, "\r\n\r\n", 4);
            if (!e) {
                if (c->hl == sizeof c->hb)
                    return -1;
                return 0;
            }
            size_t hlen = e + 4 - c->hb;
            size_t used = hlen - old;
            p += used;
            n -= used;
            c->status = atoi(c->hb + 9);
            c->close_after = 0;
            c->rem = -1;
            int chk = 0;
            *e = 0;
            char *l = strchr(c->hb, '\n');
            while (l) {
                l++;
                if (!strncasecmp(l, "content-length:", 15))
                    c->rem = atoll(l + 15);
                else if (!strncasecmp(l, "transfer-encoding:", 18))
                    chk = 1;
                else if (!strncasecmp(l, "connection: close", 17))
                    c->close_after = 1;
                l = strchr(l, '\n');
            }
            if (chk) {
                c->st = 2;
                c->cst = 0;
            } else if (c->rem >= 0) {
                c->st = 1;
                if (!c->rem)
                    return 1;
            } else
                return -1;
        } else if (c->st == 1) {
            size_t k = n < (size_t)c->rem ? n : (size_t)c->rem;
            tailadd(c, p, k);
            c->rem -= k;
            p += k;
            n -= k;
            if (!c->rem)
                return 1;
        } else { /* cst 0 size,1 sizeLF,2 data,3 CR,4 LF,5 trailer */
            if (c->cst == 2) {
                size_t k = n < (size_t)c->crem ? n : (size_t)c->crem;
                tailadd(c, p, k);
                c->crem -= k;
                p += k;
                n -= k;
                if (!c->crem)
                    c->cst = 3;
                continue;
            }
            char ch = *p++;
            n--;
            switch (c->cst) {
            case 0:
                if (ch == '\r')
                    c->cst = 1;
                else {
                    int v = ch >= '0' && ch <= '9'                 ? ch - '0'
                            : (ch | 32) >= 'a' && (ch | 32) <= 'f' ? (ch | 32) - 'a' + 10
                                                                   : -1;
                    if (v < 0)
                        return -1;
                    c->crem = c->crem * 16 + v;
                }
                break;
            case 1:
                c->cst = c->crem ? 2 : 5;
                break;
            case 3:
                c->cst = 4;
                break;
            case 4:
                c->cst = 0;
                c->crem = 0;
                break;
            case 5:
                c->cst = 6;
                break;
            case 6:
                return 1;
            }
        }
    }
    return 0;
}
static double ticks;
static long rss_kb;
static long long cpu_of(int pid) {
    char f[64], b[1024];
    snprintf(f, 64, "/proc/%d/stat", pid);
    FILE *h = fopen(f, "r");
    if (!h)
        return 0;
    size_t n = fread(b, 1, 1023, h);
    fclose(h);
    b[n] = 0;
    char *p = strrchr(b, ')');
    if (!p)
        return 0;
    long long ut = 0, st = 0;
    int i = 2;
    for (char *t = strtok(p + 1, " "); t; t = strtok(NULL, " ")) {
        i++;
        if (i == 14)
            ut = atoll(t);
        if (i == 15) {
            st = atoll(t);
            break;
        }
    }
    snprintf(f, 64, "/proc/%d/statm", pid);
    h = fopen(f, "r");
    if (h) {
        long a, r;
        if (fscanf(h, "%ld %ld", &a, &r) == 2)
            rss_kb += r * 4;
        fclose(h);
    }
    return ut + st;
}
static int ppid_of(int pid) {
    char f[64], b[1024];
    snprintf(f, 64, "/proc/%d/stat", pid);
    FILE *h = fopen(f, "r");
    if (!h)
        return -1;
    size_t n = fread(b, 1, 1023, h);
    fclose(h);
    b[n] = 0;
    char *p = strrchr(b, ')');
    if (!p)
        return -1;
    return atoi(p + 4);
}
static double tree_cpu(int root) {
    if (!root)
        return 0;
    rss_kb = 0;
    static int ps[65536], pp[65536];
    int n = 0;
    DIR *d = opendir("/proc");
    struct dirent *e;
    while ((e = readdir(d)) && n < 65536)
        if (e->d_name[0] >= '0' && e->d_name[0] <= '9') {
            ps[n] = atoi(e->d_name);
            pp[n] = ppid_of(ps[n]);
            n++;
        }
    closedir(d);
    static char in[65536];
    memset(in, 0, n);
    for (int i = 0; i < n; i++)
        if (ps[i] == root)
            in[i] = 1;
    int ch = 1;
    while (ch) {
        ch = 0;
        for (int i = 0; i < n; i++)
            if (!in[i])
                for (int j = 0; j < n; j++)
                    if (in[j] && pp[i] == ps[j]) {
                        in[i] = 1;
                        ch = 1;
                        break;
                    }
    }
    long long s = 0;
    for (int i = 0; i < n; i++)
        if (in[i])
            s += cpu_of(ps[i]);
    return s / ticks;
}
static int cmp(const void *a, const void *b) {
    unsigned x = *(unsigned *)a, y = *(unsigned *)b;
    return x < y ? -1 : x > y;
}
int main(int ac, char **av) {
    int conns = 16, o, root = 0;
    double dur = 5, warm = 1, rate = 0;
    char *url = NULL, *body = NULL, *name = "";
    char hdrs[8192] = "";
    signal(SIGPIPE, SIG_IGN);
    ticks = sysconf(_SC_CLK_TCK);
    while ((o = getopt(ac, av, "u:c:d:w:b:H:P:R:n:M:")) != -1)
        switch (o) {
        case 'u':
            url = optarg;
            break;
        case 'c':
            conns = atoi(optarg);
            break;
        case 'd':
            dur = atof(optarg);
            break;
        case 'w':
            warm = atof(optarg);
            break;
        case 'b':
            body = optarg;
            break;
        case 'H':
            strcat(hdrs, optarg);
            strcat(hdrs, "\r\n");
            break;
        case 'P':
            root = atoi(optarg);
            break;
        case 'R':
            rate = atof(optarg);
            break;
        case 'n':
            name = optarg;
            break;
        case 'M':
            many = atoi(optarg);
            break;
        }
    char host[256], path[1024] = "/";
    int port = 80;
    if (sscanf(url, "http://%255[^:/]:%d%1023s", host, &port, path) < 2) {
        fprintf(stderr, "bad url\n");
        return 1;
    }
    addr.sin_family = AF_INET;
    addr.sin_port = htons(port);
    inet_pton(AF_INET, host, &addr.sin_addr);
    if ((ntohl(addr.sin_addr.s_addr) >> 24) != 127) {
        fprintf(stderr, "loopback only\n");
        return 1;
    }
    char *bd = "";
    size_t bl = 0;
    if (body) {
        FILE *h = fopen(body, "rb");
        if (!h) {
            perror(body);
            return 1;
        }
        fseek(h, 0, SEEK_END);
        bl = ftell(h);
        rewind(h);
        bd = malloc(bl + 1);
        if (fread(bd, 1, bl, h) != bl)
            return 1;
        fclose(h);
        bd[bl] = 0;
    }
    is_sse = bl && (memmem(bd, bl, "\"stream\":true", 13) || memmem(bd, bl, "\"stream\": true", 14));
    req = malloc(bl + 16384);
    int n =
        sprintf(req,
                "%s %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: loadgen\r\nAccept: */*\r\nContent-Type: "
                "application/json\r\nAuthorization: Bearer sk-bench-0123456789abcdef\r\n%sContent-Length: %zu\r\n\r\n",
                bl ? "POST" : "GET", path, host, port, strstr(hdrs, "uthorization") ? "" : "", bl);
    if (strcasestr(hdrs, "authorization:"))
        n = sprintf(req,
                    "%s %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: loadgen\r\nAccept: */*\r\nContent-Type: "
                    "application/json\r\n%sContent-Length: %zu\r\n\r\n",
                    bl ? "POST" : "GET", path, host, port, hdrs, bl);
    else
        n = sprintf(
            req,
            "%s %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: loadgen\r\nAccept: */*\r\nContent-Type: "
            "application/json\r\nAuthorization: Bearer sk-bench-0123456789abcdef\r\n%sContent-Length: %zu\r\n\r\n",
            bl ? "POST" : "GET", path, host, port, hdrs, bl);
    memcpy(req + n, bd, bl);
    reqlen = n + bl;
    if (many)
        mark = memmem(req, reqlen, "@@@@", 4);
    ep = epoll_create1(0);
    C *cs = calloc(conns, sizeof(C));
    for (int i = 0; i < conns; i++)
        conn_open(&cs[i]);
    long long t0 = now();
    t_measure = t0 + (long long)(warm * 1e6);
    t_end = t_measure + (long long)(dur * 1e6);
    double cpu0 = -1;
    long long next = t0;
    double step = rate > 0 ? 1e6 / rate : 0;
    long sentn = 0;
    if (!rate)
        for (int i = 0; i < conns; i++)
            start(&cs[i]);
    static char buf[262144];
    struct epoll_event ev[256];
    long long hard = t_end + 10000000;
    int warmerr = 0;
    for (;;) {
        long long t = now();
        if (cpu0 < 0 && t >= t_measure) {
            cpu0 = tree_cpu(root);
            t_measure = now();
            t_end = t_measure + (long long)(dur * 1e6);
        }
        if (t >= t_end || t > hard)
            break;
        int to = 20;
        if (rate) {
            while (next <= t) {
                C *f = NULL;
                for (int i = 0; i < conns; i++)
                    if (!cs[i].busy) {
                        f = &cs[i];
                        break;
                    }
                if (!f) {
                    next = t + (long long)step;
                    break;
                }
                start(f);
                sentn++;
                next = t0 + (long long)(sentn * step);
                if (next < t - 100000) {
                    t0 = t - (long long)(sentn * step);
                    next = t;
                }
            }
            long long d = next - t;
            to = d < 1000 ? 0 : (int)(d / 1000);
            if (to > 20)
                to = 20;
        }
        int k = epoll_wait(ep, ev, 256, to);
        for (int i = 0; i < k; i++) {
            C *c = ev[i].data.ptr;
            ssize_t m = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
            if (m < 0 && errno == EAGAIN)
                continue;
            int r = m <= 0 ? -1 : feed(c, buf, m);
            if (m > 0)
                bytes += m;
            if (r < 0) {
                if (c->busy) {
                    if (now() >= t_measure)
                        nerr++;
                    else
                        warmerr++;
                }
                close(c->fd);
                c->busy = 0;
                if (nerr + warmerr > 20000) {
                    fprintf(stderr, "too many errors\n");
                    goto out;
                }
                conn_open(c);
                if (!rate)
                    start(c);
            } else if (r == 1) {
                done(c);
                if (c->close_after) {
                    close(c->fd);
                    conn_open(c);
                }
                if (!rate)
                    start(c);
            }
        }
    }
out:;
    double cpu1 = tree_cpu(root);
    double el = (now() - t_measure) / 1e6;
    qsort(lat, nl, 4, cmp);
    qsort(ttfb, nl, 4, cmp);
#define PCT(a, q) (nl ? a[(size_t)((nl - 1) * q)] : 0)
    printf("{\"name\":\"%s\",\"conns\":%d,\"rps\":%.1f,\"p50\":%u,\"p90\":%u,\"p99\":%u,\"max\":%u,\"ttfb_p50\":%u,"
           "\"ttfb_p99\":%u,\"ok\":%ld,\"non2xx\":%ld,\"incomplete\":%ld,\"err\":%ld,\"reconn\":%ld,\"cpu_us_per_req\":"
           "%.1f,\"cpu_util\":%.2f,\"rss_mb\":%.1f}\n",
           name, conns, nl / el, PCT(lat, .5), PCT(lat, .9), PCT(lat, .99), PCT(lat, 1.0), PCT(ttfb, .5),
           PCT(ttfb, .99), nok, nnon2xx, nincomplete, nerr, nconn - conns, root && nl ? (cpu1 - cpu0) * 1e6 / nl : 0,
           root ? (cpu1 - cpu0) / el : 0, rss_kb / 1024.0);
    return 0;
}
