package remote

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// patience is how long a registry waits for what.
type patience struct {
	tries      int           // of one request, the first included
	backoff    time.Duration // before the first retry; doubles with each
	maxBackoff time.Duration // also bounds a Retry-After
	retryFor   time.Duration // no retry begins later than this after the first try
	idle       time.Duration // how long a body may bring nothing
}

// Six tries wait 0.2 + 0.4 + 0.8 + 1.6 + 3.2 s on average: a registry behind a load balancer
// that loses a node is back within that. Longer outages are the fetcher's, which
// knows whether a reader waits.
var defaultPatience = patience{
	tries:      6,
	backoff:    200 * time.Millisecond,
	maxBackoff: 10 * time.Second,
	retryFor:   45 * time.Second,
	idle:       30 * time.Second,
}

// sharedTransport is one for the process: its pools are per host, so all
// images of a registry share its connections.
var sharedTransport = sync.OnceValue(func() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           dialer.DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 20 * time.Second,
		ForceAttemptHTTP2:     true,
		// All requests of an HTTP/2 registry are on one connection; one that died silently
		// must not take them all along for longer than this.
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		MaxIdleConns:        128,
		MaxIdleConnsPerHost: 32,
		IdleConnTimeout:     90 * time.Second,
		// Ranges are of the blob's own bytes, never of a compressed form of them.
		DisableCompression: true,
	}
})

var userAgent = sync.OnceValue(func() string {
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = strings.Trim(cmp.Or(info.Main.Version, version), "()")
	}
	return "lazuli/" + version
})

// registry is the Source of an image in a registry.
type registry struct {
	ref      Reference
	host     string
	http     http.RoundTripper // counts
	stats    *counts
	log      *slog.Logger
	patience patience
	auth     *auth

	answered atomic.Bool            // the registry exists
	scheme   atomic.Pointer[string] // what the registry speaks, once it has answered
	mayPlain bool                   // HTTP is allowed if HTTPS is not spoken

	mu    sync.Mutex // not held across I/O
	root  *root      // nil until it was read
	blobs map[v1.Hash]*registryBlob
}

type root struct {
	desc v1.Descriptor
	raw  []byte
}

func newRegistry(ref Reference, opts Options) *registry {
	stats := new(counts)
	r := &registry{
		ref:      ref,
		host:     ref.name.Context().RegistryStr(),
		stats:    stats,
		log:      opts.Logger,
		patience: defaultPatience,
		blobs:    make(map[v1.Hash]*registryBlob),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	inner := opts.Transport
	if inner == nil {
		inner = sharedTransport()
	}
	r.http = &counting{inner, stats}
	r.mayPlain = isNear(r.host)
	if opts.PlainHTTP {
		plain := "http"
		r.scheme.Store(&plain)
	}
	keychain := opts.Keychain
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	r.auth = newAuth(ref.name.Context(), keychain, r.http)
	return r
}

// isNear reports whether host (with or without a port) is this machine or has an address of a
// private network, where docker too accepts a registry without TLS.
func isNear(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && (ip.IsLoopback() || ip.IsPrivate())
}

func (r *registry) Close() error { return nil }

func (r *registry) Stats() Stats {
	return Stats{Requests: r.stats.requests.Load(), Bytes: r.stats.bytes.Load()}
}

func (r *registry) Root(ctx context.Context) (v1.Descriptor, []byte, error) {
	r.mu.Lock()
	known := r.root
	r.mu.Unlock()
	if known == nil {
		id := r.ref.name.Identifier()
		raw, header, err := r.manifest(ctx, id)
		if err != nil {
			return v1.Descriptor{}, nil, r.wrap(err)
		}
		digest := sum(raw)
		if strings.HasPrefix(id, "sha256:") {
			digest, err = v1.NewHash(id)
		} else if said, serr := v1.NewHash(header.Get("Docker-Content-Digest")); serr == nil && said.Algorithm == "sha256" {
			// Names nothing that can be relied on, but shows damage on the way.
			digest = said
		}
		if err == nil {
			err = verify("manifest", digest, raw)
		}
		if err != nil {
			return v1.Descriptor{}, nil, r.wrap(err)
		}
		mt, _, _ := strings.Cut(header.Get("Content-Type"), ";")
		t, err := manifestType(raw, types.MediaType(strings.TrimSpace(mt)))
		if err != nil {
			return v1.Descriptor{}, nil, r.wrap(fmt.Errorf("manifest %v: %w", digest, err))
		}
		r.mu.Lock()
		if r.root == nil { // else another caller was first, and a tag may have moved between
			r.root = &root{v1.Descriptor{MediaType: t, Size: int64(len(raw)), Digest: digest}, raw}
		}
		known = r.root
		r.mu.Unlock()
	}
	return known.desc, known.raw, nil
}

func (r *registry) Manifest(ctx context.Context, desc v1.Descriptor) ([]byte, error) {
	r.mu.Lock()
	known := r.root
	r.mu.Unlock()
	if known != nil && known.desc.Digest == desc.Digest {
		return known.raw, nil
	}
	if err := checkHash(desc.Digest); err != nil {
		return nil, r.wrap(fmt.Errorf("manifest %.100q: %w", desc.Digest, err))
	}
	raw, _, err := r.manifest(ctx, desc.Digest.String())
	if err == nil {
		err = verify("manifest", desc.Digest, raw)
	}
	if err == nil && int64(len(raw)) != desc.Size {
		err = fmt.Errorf("manifest %v: has %d bytes, and its index says %d", desc.Digest, len(raw), desc.Size)
	}
	if err != nil {
		return nil, r.wrap(err)
	}
	return raw, nil
}

func (r *registry) wrap(err error) error { return wrap(r.ref, err) }

var acceptManifests = strings.Join([]string{
	string(types.OCIImageIndex), string(types.DockerManifestList),
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
}, ", ")

// manifest returns the bytes that a tag or digest names, not verified.
func (r *registry) manifest(ctx context.Context, id string) (raw []byte, _ http.Header, _ error) {
	want := &want{what: "manifest " + id, path: "manifests/" + id, accept: acceptManifests}
	var header http.Header
	err := r.retry(ctx, want.what, func() error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		resp, err := r.ask(ctx, want)
		if err != nil {
			return err
		}
		b := &body{rc: resp.Body, left: maxManifest + 1, idle: r.patience.idle, cancel: cancel}
		defer b.Close()
		if raw, err = io.ReadAll(b); err != nil && !(errors.Is(err, io.ErrUnexpectedEOF) && b.ended) {
			return &transient{err: fmt.Errorf("%s: %w", want.what, err)}
		}
		if len(raw) > maxManifest {
			return fmt.Errorf("%s: more than %d bytes", want.what, maxManifest)
		}
		header = resp.Header
		return nil
	})
	return raw, header, err
}

// Blob returns the one registryBlob per digest, so that all share what is known
// of where it lies.
func (r *registry) Blob(desc v1.Descriptor) Blob {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.blobs[desc.Digest]
	if b == nil || b.size != desc.Size {
		b = &registryBlob{r: r, digest: desc.Digest, size: desc.Size}
		r.blobs[desc.Digest] = b
	}
	return b
}

// registryBlob is a blob in a registry.
type registryBlob struct {
	r        *registry
	digest   v1.Hash
	size     int64
	location atomic.Pointer[url.URL] // where the registry redirected to, if it did, until that fails
}

func (b *registryBlob) Size() int64 { return b.size }

// maxSkip is how many bytes before a range are read and dropped when a server sends the
// blob from its beginning: at 100 Mbit/s about as long as four round trips of 20 ms.
const maxSkip = 1 << 20

func (b *registryBlob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(b.digest, b.size, off, n); err != nil {
		return nil, b.r.wrap(err)
	}
	if n == 0 {
		return http.NoBody, nil
	}
	want := &want{what: "blob " + b.digest.String(), path: "blobs/" + b.digest.String(), blob: b, off: off, n: n}
	if err := checkHash(b.digest); err != nil {
		return nil, b.r.wrap(fmt.Errorf("%.100q: %w", want.what, err))
	}
	var stream *body
	err := b.r.retry(ctx, want.what, func() error {
		ctx, cancel := context.WithCancelCause(ctx)
		resp, err := b.r.ask(ctx, want)
		if err != nil {
			cancel(nil)
			return err
		}
		stream = &body{rc: resp.Body, left: n, idle: b.r.patience.idle, cancel: cancel, blob: b}
		if err := stream.open(resp, off); err != nil {
			stream.Close()
			return fmt.Errorf("%s: %w", want.what, err)
		}
		return nil
	})
	if err != nil {
		return nil, b.r.wrap(err)
	}
	return stream, nil
}

// want is what one request is to bring.
type want struct {
	what   string // for errors
	path   string // below /v2/NAME/
	accept string
	blob   *registryBlob // nil for manifests
	off, n int64         // of a blob
}

// whole reports whether no Range header is needed. Without it a
// server that knows no ranges cannot be told from one that does, nor need it be.
func (w *want) whole() bool { return w.blob == nil || w.off == 0 && w.n == w.blob.size }

// ask sends a request until it has an answer with the wanted bytes, or an
// error. It knows of redirects, and nothing of retries.
func (r *registry) ask(ctx context.Context, w *want) (*http.Response, error) {
	if w.blob != nil {
		if to := w.blob.location.Load(); to != nil {
			resp, err := r.send(ctx, to, w, "")
			if err == nil && success(resp.StatusCode) {
				return resp, nil
			}
			// Signed addresses expire, and stores answer that in many ways. Whatever it was, the
			// registry is asked again, and only what it says now counts.
			if err == nil {
				discard(resp)
			} else if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			w.blob.location.CompareAndSwap(to, nil)
		}
	}
	host := r.host
	resp, err := r.askRegistry(ctx, w)
	const maxHops = 5
	for hop := 0; err == nil && isRedirect(resp.StatusCode); hop++ {
		from := resp.Request.URL
		to, lerr := from.Parse(resp.Header.Get("Location"))
		discard(resp)
		switch {
		case hop == maxHops:
			return nil, fmt.Errorf("%s: %s redirects more than %d times", w.what, r.host, maxHops)
		case lerr != nil || resp.Header.Get("Location") == "":
			return nil, fmt.Errorf("%s: %s redirects to nowhere", w.what, r.host)
		case to.Scheme != "https" && (to.Scheme != "http" || from.Scheme == "https" && !isNear(to.Host)):
			return nil, fmt.Errorf("%s: %s redirects to %.100q, which is not protected by TLS", w.what, r.host, to.Scheme+"://"+to.Host)
		}
		host = to.Host
		authorization := ""
		if to.Host == from.Host && to.Host == r.host && to.Scheme == from.Scheme {
			authorization = r.auth.current().header
		}
		if resp, err = r.send(ctx, to, w, authorization); err == nil && success(resp.StatusCode) && w.blob != nil && authorization == "" {
			w.blob.location.Store(to)
		}
	}
	if err != nil {
		return nil, r.explain(ctx, w, host, err)
	}
	if !success(resp.StatusCode) {
		defer discard(resp)
		return nil, r.refused(w, resp)
	}
	return resp, nil
}

func success(status int) bool { return status == http.StatusOK || status == http.StatusPartialContent }

func isRedirect(status int) bool {
	return status == http.StatusMovedPermanently || status == http.StatusFound || status == http.StatusSeeOther ||
		status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
}

// discard closes a response that is not wanted; a short body is read first, so that
// the connection can be used again.
func discard(resp *http.Response) {
	if resp.ContentLength >= 0 && resp.ContentLength <= 4<<10 {
		io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	}
	resp.Body.Close()
}

// askRegistry sends a request to the registry itself, and once more with new credentials when it is
// refused. 403 counts too: some registries say that of tokens that have expired.
func (r *registry) askRegistry(ctx context.Context, w *want) (*http.Response, error) {
	used := r.auth.current()
	for renewed := false; ; renewed = true {
		resp, err := r.sendRegistry(ctx, w, used.header)
		if err != nil || renewed || resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden {
			return resp, err
		}
		next, err := r.auth.renew(ctx, used, resp)
		if err != nil {
			discard(resp)
			return nil, err
		}
		if next == used {
			return resp, nil
		}
		discard(resp)
		used = next
	}
}

// sendRegistry sends a request by the scheme that the registry speaks, and finds out which with the
// first one.
func (r *registry) sendRegistry(ctx context.Context, w *want, authorization string) (*http.Response, error) {
	u := &url.URL{Host: r.host, Path: "/v2/" + r.ref.name.Context().RepositoryStr() + "/" + w.path}
	if known := r.scheme.Load(); known != nil {
		u.Scheme = *known
		return r.send(ctx, u, w, authorization)
	}
	u.Scheme = "https"
	resp, err := r.send(ctx, u, w, authorization)
	if err != nil && r.mayPlain && speaksNoTLS(err) {
		plain := *u
		plain.Scheme = "http"
		presp, perr := r.send(ctx, &plain, w, "")
		// A server that does speak TLS answers 400 to HTTP on that port: then TLS broke by chance.
		if perr == nil && presp.StatusCode == http.StatusBadRequest {
			discard(presp)
			return nil, err
		}
		u, resp, err = &plain, presp, perr
	}
	if err == nil {
		r.scheme.CompareAndSwap(nil, &u.Scheme)
	}
	return resp, err
}

// send sends one request, and is all that leaves this machine for content.

func (r *registry) send(ctx context.Context, u *url.URL, w *want, authorization string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if w.accept != "" {
		req.Header.Set("Accept", w.accept)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if !w.whole() {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", w.off, w.off+w.n-1))
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := r.http.RoundTrip(req)
	if err == nil && u.Host == r.host {
		r.answered.Store(true)
	}
	return resp, err
}

// transient marks an error after which the same request may succeed.
type transient struct {
	err   error
	after time.Duration // the server's Retry-After, or 0
}

func (t *transient) Error() string { return t.err.Error() }
func (t *transient) Unwrap() error { return t.err }

// retry calls f until it succeeds or its error is not transient.
func (r *registry) retry(ctx context.Context, what string, f func() error) error {
	begin := time.Now()
	pause := r.patience.backoff
	for try := 1; ; try++ {
		err := f()
		if err == nil {
			return nil
		}
		var t *transient
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
		if !errors.As(err, &t) || try >= r.patience.tries || time.Since(begin) > r.patience.retryFor {
			return err
		}
		// Between half and one and a half of the pause: readers that failed together must not come back together.
		wait := max(pause/2+rand.N(pause), t.after)
		wait = min(wait, r.patience.maxBackoff)
		pause *= 2
		r.log.Debug("retry", "what", what, "registry", r.host, "try", try, "wait", wait, "error", err)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
	}
}

// retryAfter returns what a response asks for in seconds or as a date.
func retryAfter(resp *http.Response) time.Duration {
	s := resp.Header.Get("Retry-After")
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 1<<20 {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, time.Until(t))
	}
	return 0
}

// counts are the numbers of [Stats], as they grow.
type counts struct{ requests, bytes atomic.Int64 }

// counting counts requests and bytes, and says who asks. A request counts when it is written:
// a connection that fails carries none.
type counting struct {
	inner http.RoundTripper
	n     *counts
}

func (c *counting) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		WroteHeaders: func() { c.n.requests.Add(1) },
	}))
	req.Header.Set("User-Agent", userAgent())
	resp, err := c.inner.RoundTrip(req)
	if err == nil {
		resp.Body = &countingBody{resp.Body, c.n}
	}
	return resp, err
}

type countingBody struct {
	io.ReadCloser
	n *counts
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.bytes.Add(int64(n))
	return n, err
}
