package integration

import (
	"context"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// A Registry is a container registry on 127.0.0.1 that keeps a log. It lives as long as its test.
type Registry struct {
	// Addr is the host and port.
	Addr string
	// CA is the certificate, in PEM, that a client of a TLS registry has to trust.
	CA []byte

	opts   RegistryOptions
	client *http.Client
	token  string

	mu  sync.Mutex
	log []*Request
}

// RegistryOptions say what kind of registry; the zero value is go-containerregistry's, in
// this process, without TLS, for everybody.
type RegistryOptions struct {
	// Distribution has Debian's docker-registry behind the log, the registry that most people run.
	// The test is skipped where it is not installed.
	Distribution bool
	// User and Password are asked of whoever wants anything.
	User, Password string
	// Bearer has them given to a token service, as the big registries want it, not to the registry.
	Bearer bool
	// TLS has the registry speak HTTPS, with a certificate that nobody trusts before he is told to.
	TLS bool
	// Wrap, if set, stands before the registry, behind the log: here a test lets things go wrong.
	Wrap func(http.Handler) http.Handler
}

// A Request is a line of a registry's log.
type Request struct {
	Method, Path string
	Range        string // the Range header
	Status       int    // 0 if the answer has not begun
	Bytes        int64  // of the answer's body, so far
}

// NewRegistry starts an empty registry, which ends with the test.
func NewRegistry(t testing.TB, o RegistryOptions) *Registry {
	t.Helper()
	r := &Registry{opts: o, token: rand.Text()}
	var h http.Handler
	if o.Distribution {
		h = distribution(t)
	} else {
		h = registry.New(registry.WithBlobHandler(blobDir(t.TempDir())), registry.Logger(log.New(io.Discard, "", 0)))
	}
	if o.Wrap != nil {
		h = o.Wrap(h)
	}
	if o.User != "" {
		h = r.authorize(h)
	}
	s := httptest.NewUnstartedServer(r.record(h))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up are what tests are about
	if o.TLS {
		s.EnableHTTP2 = true
		s.StartTLS()
		r.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	r.Addr = s.Listener.Addr().String()
	r.client = s.Client()
	return r
}

// Log returns what the registry was asked since the start or the last Reset, in the order in which requests came. What a client has
// received is in it.
func (r *Registry) Log() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Request, len(r.log))
	for i, q := range r.log {
		list[i] = *q
	}
	return list
}

// Reset empties the log. Requests that are being answered do not come back into it.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = nil
}

// looksUp reports whether a request looks for a startup pack: a client sends three of them side by side, and waits for none.
func (q Request) looksUp() bool {
	return strings.Contains(q.Path, "/referrers/") || strings.Contains(q.Path, "/manifests/sha256-") || strings.HasSuffix(q.Path, "/manifests/lazuli-pack")
}

// Traffic returns how many requests the log holds and how many bytes answered them, the
// requests for tokens and for a startup pack not counted.
func (r *Registry) Traffic() (requests int, bytes int64) {
	for _, q := range r.Log() {
		if q.Path != tokenPath && !q.looksUp() {
			requests++
			bytes += q.Bytes
		}
	}
	return requests, bytes
}

// Push brings the first image or index of an OCI layout into the registry and returns
// its reference, host:port/repo:latest.
func (r *Registry) Push(t testing.TB, dir, repo string) string {
	t.Helper()
	ref, err := name.ParseReference(r.Addr+"/"+repo+":latest", name.Insecure)
	if r.opts.TLS {
		ref, err = name.ParseReference(r.Addr + "/" + repo + ":latest")
	}
	if err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) == 0 {
		t.Fatalf("%s: %d images, %v", dir, len(m.Manifests), err)
	}
	opts := []remote.Option{remote.WithTransport(r.client.Transport)}
	if r.opts.User != "" {
		opts = append(opts, remote.WithAuth(&authn.Basic{Username: r.opts.User, Password: r.opts.Password}))
	}
	if d := m.Manifests[0]; d.MediaType.IsIndex() {
		var i v1.ImageIndex
		if i, err = index.ImageIndex(d.Digest); err == nil {
			err = remote.WriteIndex(ref, i, opts...)
		}
	} else {
		var i v1.Image
		if i, err = index.Image(d.Digest); err == nil {
			err = remote.Write(ref, i, opts...)
		}
	}
	if err != nil {
		t.Fatalf("push %s: %v", dir, err)
	}
	return r.Addr + "/" + repo + ":latest"
}

// record writes the log. A request is there before it is answered, and bytes are counted before they are
// sent, so that a client never knows more than the log.
func (r *Registry) record(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		q := &Request{Method: req.Method, Path: req.URL.Path, Range: req.Header.Get("Range")}
		r.mu.Lock()
		r.log = append(r.log, q)
		r.mu.Unlock()
		next.ServeHTTP(&recorder{w, r, q}, req)
	})
}

type recorder struct {
	http.ResponseWriter
	registry *Registry
	request  *Request
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) WriteHeader(status int) {
	w.registry.mu.Lock()
	w.request.Status = status
	w.registry.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	w.registry.mu.Lock()
	if w.request.Status == 0 {
		w.request.Status = http.StatusOK
	}
	w.request.Bytes += int64(len(p))
	w.registry.mu.Unlock()
	return w.ResponseWriter.Write(p)
}

const tokenPath = "/token"

// authorize lets only those pass who know the password or, with Bearer, have a token for it.
func (r *Registry) authorize(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		user, password, _ := req.BasicAuth()
		known := user == r.opts.User && password == r.opts.Password
		scheme := "http"
		if r.opts.TLS {
			scheme = "https"
		}
		switch {
		case r.opts.Bearer && req.URL.Path == tokenPath && known:
			fmt.Fprintf(w, `{"token":%q,"expires_in":300}`, r.token)
		case r.opts.Bearer && req.Header.Get("Authorization") == "Bearer "+r.token, !r.opts.Bearer && known:
			next.ServeHTTP(w, req)
		default:
			challenge := `Basic realm="test"`
			if r.opts.Bearer && req.URL.Path != tokenPath {
				challenge = fmt.Sprintf(`Bearer realm="%s://%s%s",service="test"`, scheme, r.Addr, tokenPath)
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
		}
	})
}

// distribution starts docker-registry and returns the way to it.
func distribution(t testing.TB) http.Handler {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		skip(t, "needs docker-registry: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // there is no way to hand it over
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: true}}
http: {addr: %q}
`, dir, addr), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(program, "serve", config)
	var output strings.Builder
	c.Stdout, c.Stderr = &output, &output
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Since(start) > 20*time.Second {
			c.Process.Kill()
			c.Wait()
			t.Fatalf("docker-registry: %v\n%s", err, &output)
		}
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: addr})
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	rewrite := proxy.Director
	// Uploads are sent to where the registry says, so it must hear under which name it was called.
	proxy.Director = func(req *http.Request) {
		host, secure := req.Host, req.TLS != nil
		rewrite(req)
		req.Host = host
		if secure {
			req.Header.Set("X-Forwarded-Proto", "https")
		}
	}
	return proxy
}

// blobDir keeps blobs as files. go-containerregistry has such a handler too, but that one hashes the whole
// blob for each request, ranges as well.
type blobDir string

func (d blobDir) path(h v1.Hash) string { return filepath.Join(string(d), h.Algorithm+"-"+h.Hex) }

func (d blobDir) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	fi, err := os.Stat(d.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return 0, registry.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (d blobDir) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(d.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return nil, registry.ErrNotFound
	}
	return f, err
}

// Put is given a reader that fails at the end if the digest is another.
func (d blobDir) Put(_ context.Context, _ string, h v1.Hash, r io.ReadCloser) error {
	defer r.Close()
	f, err := os.CreateTemp(string(d), "upload")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), d.path(h))
}

func (d blobDir) Delete(_ context.Context, _ string, h v1.Hash) error { return os.Remove(d.path(h)) }
