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
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

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
	ref       Reference
	host      string      // that the reference names
	from      string      // the file or folder that names the endpoints; "" is none
	endpoints []*endpoint // in the order in which they are asked at first; the last is the upstream
	stats     *counts
	log       *slog.Logger
	patience  patience

	mu    sync.Mutex // not held across I/O
	root  *root      // nil until it was read
	blobs map[v1.Hash]*registryBlob
}

type root struct {
	desc v1.Descriptor
	raw  []byte
}

// openRegistry returns the Source with the endpoints that opts.Hosts has for the registry.
func openRegistry(ref Reference, opts Options) (Source, error) {
	r := newRegistry(ref, opts)
	found, err := readHosts(opts.Hosts, namespace(r.host))
	if err != nil {
		return nil, r.wrap(err)
	}
	if found == nil {
		return r, nil
	}
	r.from, r.endpoints = found.from, nil
	for _, h := range found.list {
		l, err := h.link(cmp.Or(h.at.RegistryStr(), r.host), opts.Transport)
		if err != nil {
			return nil, r.wrap(fmt.Errorf("%s: %w", found.from, err))
		}
		if !h.pull {
			continue
		}
		// A server that is named twice, as the documentation's examples do, says no twice.
		e := newEndpoint(ref.name.Context(), &h, l, r.stats, opts)
		if h.ownTLS() || h.header != nil || !slices.ContainsFunc(r.endpoints, e.within) {
			r.endpoints = append(r.endpoints, e)
		}
	}
	return r, nil
}

// newRegistry returns the Source with one endpoint, the registry itself.
func newRegistry(ref Reference, opts Options) *registry {
	r := &registry{
		ref:      ref,
		host:     ref.name.Context().RegistryStr(),
		stats:    new(counts),
		log:      opts.Logger,
		patience: defaultPatience,
		blobs:    make(map[v1.Hash]*registryBlob),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	l := &link{transport: opts.Transport}
	if l.transport == nil {
		l.transport = sharedTransport()
	}
	r.endpoints = []*endpoint{newEndpoint(ref.name.Context(), &host{pull: true, tags: true}, l, r.stats, opts)}
	return r
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
		var read *root
		err := r.manifest(ctx, id, func(raw []byte, header http.Header) (err error) {
			read, err = newRoot(id, raw, header)
			return err
		})
		if err != nil {
			return v1.Descriptor{}, nil, r.wrap(err)
		}
		r.mu.Lock()
		if r.root == nil { // else another caller was first, and a tag may have moved between
			r.root = read
		}
		known = r.root
		r.mu.Unlock()
	}
	return known.desc, known.raw, nil
}

// newRoot returns what a tag or digest names if the answer fits it.
func newRoot(id string, raw []byte, header http.Header) (*root, error) {
	digest, err := sum(raw), error(nil)
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
		return nil, err
	}
	mt, _, _ := strings.Cut(header.Get("Content-Type"), ";")
	t, err := manifestType(raw, types.MediaType(strings.TrimSpace(mt)))
	if err != nil {
		return nil, fmt.Errorf("manifest %v: %w", digest, err)
	}
	return &root{v1.Descriptor{MediaType: t, Size: int64(len(raw)), Digest: digest}, raw}, nil
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
	var manifest []byte
	err := r.manifest(ctx, desc.Digest.String(), func(raw []byte, _ http.Header) error {
		if err := verify("manifest", desc.Digest, raw); err != nil {
			return err
		}
		if desc.Size >= 0 && int64(len(raw)) != desc.Size {
			return fmt.Errorf("manifest %v: has %d bytes, and its index says %d", desc.Digest, len(raw), desc.Size)
		}
		manifest = raw
		return nil
	})
	return manifest, r.wrap(err)
}

func (r *registry) wrap(err error) error { return wrap(r.ref, err) }

var acceptManifests = strings.Join([]string{
	string(types.OCIImageIndex), string(types.DockerManifestList),
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
}, ", ")

// manifest reads what a tag or digest names, from the first endpoint whose answer check accepts.
func (r *registry) manifest(ctx context.Context, id string, check func([]byte, http.Header) error) error {
	return r.small(ctx, &want{what: "manifest " + id, path: "manifests/" + id, accept: acceptManifests, tag: !strings.HasPrefix(id, "sha256:")}, check)
}

// small reads what has at most the size of a manifest, from the first endpoint whose answer check accepts.
func (r *registry) small(ctx context.Context, want *want, check func([]byte, http.Header) error) error {
	return r.fetch(ctx, want, func(ctx context.Context, cancel context.CancelCauseFunc, e *endpoint) error {
		resp, err := e.ask(ctx, want)
		if err != nil {
			cancel(nil)
			return err
		}
		b := &body{rc: resp.Body, left: maxManifest + 1, idle: r.patience.idle, ctx: ctx, cancel: cancel}
		defer b.Close()
		raw, err := io.ReadAll(b)
		if err != nil && !(errors.Is(err, io.ErrUnexpectedEOF) && b.ended) {
			return &transient{err: fmt.Errorf("%s: %w", want.what, err)}
		}
		if len(raw) > maxManifest {
			return fmt.Errorf("%s: more than %d bytes", want.what, maxManifest)
		}
		return check(raw, resp.Header)
	})
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
	location atomic.Pointer[location] // where the content is, if an endpoint redirected there, until that fails

	mu    sync.Mutex
	last  *endpoint          // who answered last, or nil
	broke map[*endpoint]bool // whose streams broke, or brought what they must not; never all of several
}

// location is where an endpoint redirected to.
type location struct {
	to   *url.URL
	from *endpoint
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
	err := b.r.fetch(ctx, want, func(ctx context.Context, cancel context.CancelCauseFunc, e *endpoint) error {
		resp, err := e.ask(ctx, want)
		if err != nil {
			cancel(nil)
			return err
		}
		stream = &body{rc: resp.Body, left: n, idle: b.r.patience.idle, ctx: ctx, cancel: cancel, blob: b, from: e}
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

// answeredBy notes that e has the blob.
func (b *registryBlob) answeredBy(e *endpoint) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = e
	delete(b.broke, e)
}

// brokenBy notes that a stream from e was no good, so that the others are asked before it.
func (b *registryBlob) brokenBy(e *endpoint) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last == e {
		b.last = nil
	}
	if b.broke == nil || len(b.broke) >= len(b.r.endpoints)-1 {
		b.broke = make(map[*endpoint]bool) // it goes round
	}
	b.broke[e] = true
}

// rank is when e is asked for the blob: 0 is first.
func (b *registryBlob) rank(e *endpoint) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.broke[e]:
		return 2
	case b.last == e:
		return 0
	}
	return 1
}

// want is what one request is to bring.
type want struct {
	what   string // for errors
	path   string // below /v2/NAME/
	accept string
	tag    bool          // it has no digest to check against
	blob   *registryBlob // nil for manifests
	off, n int64         // of a blob
}

// whole reports whether no Range header is needed. Without it a
// server that knows no ranges cannot be told from one that does, nor need it be.
func (w *want) whole() bool { return w.blob == nil || w.off == 0 && w.n == w.blob.size }

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
