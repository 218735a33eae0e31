package remote

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// content is an image that a fake or a layout serves.
type content struct {
	manifest v1.Descriptor
	blobs    map[v1.Hash][]byte // manifests too
	layers   []v1.Descriptor
}

func (c *content) add(t types.MediaType, b []byte) v1.Descriptor {
	d := v1.Descriptor{MediaType: t, Size: int64(len(b)), Digest: sum(b)}
	c.blobs[d.Digest] = b
	return d
}

func (c *content) addJSON(t types.MediaType, v any) v1.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return c.add(t, b)
}

// newContent returns an image of n layers of size bytes each, always the same.
func newContent(n, size int) *content {
	c := &content{blobs: make(map[v1.Hash][]byte)}
	random := rand.NewChaCha8([32]byte{})
	config := c.addJSON(types.OCIConfigJSON, v1.ConfigFile{OS: "linux", Architecture: "amd64"})
	for range n {
		b := make([]byte, size)
		random.Read(b)
		c.layers = append(c.layers, c.add(types.OCILayer, b))
	}
	c.manifest = c.addJSON(types.OCIManifestSchema1, v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: config, Layers: c.layers})
	return c
}

// fake is a registry with switches, all off at first. It has one repository, "r", and one tag, "t".
type fake struct {
	*content
	*httptest.Server

	mu   sync.Mutex
	log  []string // of all requests: "GET /v2/… [RANGE]"
	errs []string // things no client may do

	// Switches. A number is how many requests it still concerns.
	token     string // bearer token that must be shown; "" lets everybody in
	issue     string // token that /token gives, if it is not token
	basic     string // "user:password" that must be shown, or to be shown to /token
	forbid    int    // 403 without a challenge, whatever is shown
	fail      int    // blobs and manifests answer failStatus
	retrySec  string
	status    int
	store     string // host to redirect blobs to
	expire    bool   // signed addresses are not good any more
	truncate  int    // send half of the body, then close the connection
	stall     int    // send half of the body, then nothing
	hang      int    // send headers, then nothing
	flip      int    // flip a byte
	noRanges  bool
	wrongFrom int // Content-Range is off by one
	signed    int // redirects given
}

func newFake(t *testing.T, c *content) *fake { return startFake(t, c, (*httptest.Server).Start) }

func startFake(t *testing.T, c *content, start func(*httptest.Server)) *fake {
	f := &fake{content: c, status: http.StatusServiceUnavailable}
	f.Server = httptest.NewUnstartedServer(f)
	f.Server.Config.ErrorLog = log.New(io.Discard, "", 0) // of TLS handshakes
	start(f.Server)
	t.Cleanup(func() {
		f.Server.CloseClientConnections()
		f.Server.Close()
		if len(f.errs) > 0 {
			t.Errorf("registry: %s", strings.Join(f.errs, "\n"))
		}
	})
	return f
}

func (f *fake) host() string { return f.Listener.Addr().String() }

// set changes switches while the fake serves.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// requests returns the requests since the last call.
func (f *fake) requests() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.log
	f.log = nil
	return l
}

// take reports whether a switch that counts down concerns this request.
func take(n *int) bool {
	if *n > 0 {
		*n--
		return true
	}
	return false
}

func (f *fake) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, strings.TrimSpace(req.Method+" "+req.URL.Path+" "+req.Header.Get("Range")))
	if !strings.HasPrefix(req.Header.Get("User-Agent"), "lazuli/") {
		f.errs = append(f.errs, fmt.Sprintf("%s: User-Agent %q", req.URL, req.Header.Get("User-Agent")))
	}
	if req.URL.Path == "/token" {
		user, password, _ := req.BasicAuth()
		if f.basic != "" && user+":"+password != f.basic {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if got, want := req.URL.Query().Get("scope"), "repository:r:pull"; got != want {
			f.errs = append(f.errs, fmt.Sprintf("token: scope %q, want %q", got, want))
		}
		token := f.token
		if f.issue != "" {
			token = f.issue
		}
		json.NewEncoder(w).Encode(map[string]string{"token": token})
		return
	}
	if !f.admit(w, req) {
		return
	}
	if take(&f.fail) {
		w.Header().Set("Retry-After", f.retrySec)
		w.WriteHeader(f.status)
		return
	}
	name, ok := strings.CutPrefix(req.URL.Path, "/v2/r/")
	if !ok {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
		return
	}
	kind, id, _ := strings.Cut(name, "/")
	h, _ := v1.NewHash(id)
	if kind == "manifests" && id == "t" {
		h = f.manifest.Digest
	}
	b, ok := f.blobs[h]
	if !ok {
		refuse(w, http.StatusNotFound, map[string]string{"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN"}[kind])
		return
	}
	if kind == "manifests" {
		w.Header().Set("Content-Type", string(f.manifest.MediaType))
		w.Header().Set("Docker-Content-Digest", h.String())
	} else if f.store != "" && req.Host != f.store {
		f.signed++
		http.Redirect(w, req, fmt.Sprintf("http://%s%s?signature=%d", f.store, req.URL.Path, f.signed), http.StatusTemporaryRedirect)
		return
	}
	if take(&f.flip) {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
	}
	from, to, status := int64(0), int64(len(b)), http.StatusOK
	if r := req.Header.Get("Range"); r != "" && !f.noRanges {
		if _, err := fmt.Sscanf(r, "bytes=%d-%d", &from, &to); err != nil || from > to {
			f.errs = append(f.errs, fmt.Sprintf("Range %q: %v", r, err))
		}
		if to++; to > int64(len(b)) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		status = http.StatusPartialContent
		said := from
		if take(&f.wrongFrom) {
			said++
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", said, to-1, len(b)))
	}
	w.Header().Set("Content-Length", strconv.FormatInt(to-from, 10))
	w.WriteHeader(status)
	b = b[from:to]
	truncate, stall, hang := take(&f.truncate), take(&f.stall), take(&f.hang)
	if truncate || stall {
		b = b[:len(b)/2]
	}
	if !hang {
		w.Write(b)
	}
	if truncate || stall || hang {
		w.(http.Flusher).Flush()
		if !truncate {
			f.mu.Unlock()
			<-req.Context().Done()
			f.mu.Lock()
		}
		panic(http.ErrAbortHandler)
	}
}

// admit reports whether a request may pass, and answers it if not.
func (f *fake) admit(w http.ResponseWriter, req *http.Request) bool {
	authorization := req.Header.Get("Authorization")
	if req.Host == f.store {
		if authorization != "" {
			f.errs = append(f.errs, "authorization was sent to the object store")
		}
		if f.expire && req.URL.Query().Get("signature") != strconv.Itoa(f.signed) {
			w.WriteHeader(http.StatusForbidden)
			return false
		}
		return true
	}
	if take(&f.forbid) {
		refuse(w, http.StatusForbidden, "DENIED")
		return false
	}
	user, password, _ := req.BasicAuth()
	switch {
	case f.token != "" && authorization != "Bearer "+f.token:
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Negotiate, Bearer realm="http://%s/token",service="fake, \"quoted\"",scope="repository:r:pull"`, f.host()))
	case f.token == "" && f.basic != "" && user+":"+password != f.basic:
		w.Header().Set("WWW-Authenticate", `Basic realm="fake"`)
	default:
		return true
	}
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
	return false
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no\u001b[31m"}]}`, code)
}

// login is a keychain with one login, and counts how often it is asked.
type login struct {
	user, password string
	asked          int
}

func (l *login) Resolve(authn.Resource) (authn.Authenticator, error) {
	l.asked++
	if l.user == "" {
		return authn.Anonymous, nil
	}
	return &authn.Basic{Username: l.user, Password: l.password}, nil
}

// impatient is defaultPatience for tests. Idle is far above what a loaded machine needs to go
// on sending.
var impatient = patience{tries: 3, backoff: time.Millisecond, maxBackoff: 2 * time.Millisecond, retryFor: time.Minute, idle: 300 * time.Millisecond}

// open returns the source of the fake's tag, over connections of its own.
func (f *fake) open(t *testing.T, opts Options) *registry { return f.openRef(t, "r:t", opts) }

func (f *fake) openRef(t *testing.T, ref string, opts Options) *registry {
	t.Helper()
	parsed, err := ParseReference(f.host() + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Transport == nil {
		tr := sharedTransport().Clone()
		t.Cleanup(tr.CloseIdleConnections)
		opts.Transport = tr
	}
	if opts.Keychain == nil {
		opts.Keychain = &login{}
	}
	src, err := Open(t.Context(), parsed, opts)
	if err != nil {
		t.Fatal(err)
	}
	r := src.(*registry)
	r.patience = impatient
	return r
}

// trusting returns a transport that trusts a TLS test server.
func trusting(t *testing.T, s *httptest.Server) *http.Transport {
	tr := sharedTransport().Clone()
	tr.TLSClientConfig = &tls.Config{RootCAs: s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// readAll returns one range of a blob.
func readAll(ctx context.Context, b Blob, off, n int64) ([]byte, error) {
	rc, err := b.Range(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// wantError checks that an error says all of the words.
func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q: does not say %q", err, w)
		}
	}
	if strings.Count(err.Error(), "image ") > 0 && strings.Count(err.Error(), "image "+"127.") > 1 {
		t.Errorf("error %q: names the image twice", err)
	}
	if strings.ContainsAny(err.Error(), "\x1b") {
		t.Errorf("error %q: has control characters of the registry", err)
	}
}

func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
