package remote

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// openHosts returns the source of the fake's tag with a hosts.toml for it.
func (f *fake) openHosts(t *testing.T, toml string, opts Options) *registry {
	t.Helper()
	opts.Hosts = t.TempDir()
	writeHosts(t, opts.Hosts, f.host(), toml)
	return f.open(t, opts)
}

// mirrors is a hosts.toml that names the fakes as mirrors.
func mirrors(fakes ...*fake) string {
	var b strings.Builder
	for _, f := range fakes {
		fmt.Fprintf(&b, "[host.%q]\n", f.URL)
	}
	return b.String()
}

// read reads a range of a layer of the content, and checks it.
func read(t *testing.T, src Source, c *content, layer int, off, n int64) {
	t.Helper()
	d := c.layers[layer]
	if got, err := readAll(t.Context(), src.Blob(d), off, n); err != nil || !bytes.Equal(got, c.blobs[d.Digest][off:off+n]) {
		t.Fatalf("layer %d, %d bytes at %d: %d bytes, %v", layer, n, off, len(got), err)
	}
}

// wantRequests checks how many requests a fake got since it was last asked.
func wantRequests(t *testing.T, what string, f *fake, want int) {
	t.Helper()
	if l := f.requests(); len(l) != want {
		t.Errorf("%s: %d requests, want %d: %v", what, len(l), want, l)
	}
}

func TestMirror(t *testing.T) {
	c := newContent(3, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	src := upstream.openHosts(t, mirrors(mirror), Options{})
	tails(t, src, c)
	wantRequests(t, "mirror", mirror, 2+3)
	wantRequests(t, "upstream", upstream, 0)
	if n := src.Stats().Requests; n != 2+3 {
		t.Errorf("stats: %d requests", n)
	}
}

// TestMirrorTrouble reads while the first of two hosts misbehaves: the bytes must come all the same.
func TestMirrorTrouble(t *testing.T) {
	c := newContent(1, 4<<20)
	for _, tt := range []struct {
		name     string
		with     func(*fake)
		off      int64
		requests int // of the mirror
	}{
		{"503", func(f *fake) { f.fail = 9 }, 5, 1},
		{"429", func(f *fake) { f.fail, f.status, f.retrySec = 9, 429, "100000" }, 5, 1},
		{"501", func(f *fake) { f.fail, f.status = 9, 501 }, 5, 1},
		{"404", func(f *fake) { f.fail, f.status = 9, 404 }, 5, 1},
		{"416", func(f *fake) { f.fail, f.status = 9, 416 }, 5, 1},
		{"401", func(f *fake) { f.basic = "somebody:else" }, 5, 2},
		{"403", func(f *fake) { f.forbid = 9 }, 5, 1},
		{"wrong range", func(f *fake) { f.wrongFrom = 9 }, 5, 1},
		{"no ranges", func(f *fake) { f.noRanges = true }, 3 << 20, 1},
		{"another size", func(f *fake) {
			f.content = &content{blobs: map[v1.Hash][]byte{c.layers[0].Digest: c.blobs[c.layers[0].Digest][:3<<20]}}
		}, 5, 1},
		{"short at once", func(f *fake) { f.truncate, f.noRanges = 9, true }, 1 << 19, 1},
		{"silent", func(f *fake) { f.hang = 9 }, 5, 1},
		{"dead", func(f *fake) { f.Close() }, 5, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			upstream, mirror := newFake(t, c), newFake(t, c)
			mirror.set(func() { tt.with(mirror) })
			if tt.name == "short at once" { // half of it is less than what is skipped
				mirror.content = &content{blobs: map[v1.Hash][]byte{c.layers[0].Digest: c.blobs[c.layers[0].Digest][:0]}}
			}
			src := upstream.openHosts(t, mirrors(mirror), Options{Keychain: &login{user: "me", password: "secret"}})
			read(t, src, c, 0, tt.off, 1000)
			wantRequests(t, "mirror", mirror, tt.requests)
			wantRequests(t, "upstream", upstream, 1)
			read(t, src, c, 0, 0, 1000) // upstream has it
			wantRequests(t, "mirror later", mirror, 0)
			wantRequests(t, "upstream later", upstream, 1)
		})
	}
}

func TestMirrorWithDamagedManifest(t *testing.T) {
	c := newContent(1, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	for _, ref := range []string{"r:t", "r@" + c.manifest.Digest.String()} {
		mirror.set(func() { mirror.flip = 1 })
		opts := Options{Hosts: t.TempDir()}
		writeHosts(t, opts.Hosts, upstream.host(), mirrors(mirror))
		src := upstream.openRef(t, ref, opts)
		if d, _, err := src.Root(t.Context()); err != nil || d.Digest != c.manifest.Digest {
			t.Errorf("%s: %v, %v", ref, d.Digest, err)
		}
		mirror.set(func() { mirror.flip = 1 })
		src.root = nil
		if b, err := src.Manifest(t.Context(), c.manifest); err != nil || !bytes.Equal(b, c.blobs[c.manifest.Digest]) {
			t.Errorf("%s: manifest %q, %v", ref, b, err)
		}
		wantRequests(t, "mirror", mirror, 2)
		wantRequests(t, "upstream", upstream, 2)
	}
}

func TestAllFail(t *testing.T) {
	c := newContent(1, 1000)
	one, two, upstream := newFake(t, c), newFake(t, c), newFake(t, c)
	src := upstream.openHosts(t, mirrors(one, two), Options{})
	layer := func(t *testing.T) error {
		_, err := readAll(t.Context(), src.Blob(c.layers[0]), 1, 10)
		return err
	}
	fail := func(f *fake, status int) { f.set(func() { f.fail, f.status = 1000, status }) }

	// One or two tries of mirrors, all of the patience for the upstream.
	fail(one, 404)
	fail(two, 503)
	fail(upstream, 503)
	err := layer(t)
	wantError(t, err, "image "+upstream.host()+"/r:t", "none of 3 hosts has it", one.host()+": not found", two.host()+" answered 503", upstream.host()+" answered 503", "later")
	if strings.Count(err.Error(), "blob sha256:") != 1 {
		t.Errorf("error %q: names the blob more than once", err)
	}
	if errors.Is(err, ErrNotFound) {
		t.Errorf("error %q: is ErrNotFound, and the upstream did not say that", err)
	}
	wantRequests(t, "404", one, 1)
	wantRequests(t, "503", two, 2)
	wantRequests(t, "upstream", upstream, impatient.tries)

	// A mirror that is ill cannot hide that the upstream has it not.
	fail(upstream, 404)
	if err := layer(t); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v: is not ErrNotFound", err)
	}
	wantRequests(t, "503", two, 2)
	wantRequests(t, "upstream that has it not", upstream, 1)

	// No error is kept.
	for _, f := range []*fake{one, two, upstream} {
		f.set(func() { f.fail = 0 })
	}
	read(t, src, c, 0, 1, 10)
}

func TestWhoAnsweredLastIsAskedFirst(t *testing.T) {
	c := newContent(2, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	src := upstream.openHosts(t, mirrors(mirror), Options{})
	mirror.set(func() { mirror.fail, mirror.status = 1, 404 })
	read(t, src, c, 0, 1, 10)
	read(t, src, c, 0, 11, 10)
	wantRequests(t, "mirror", mirror, 1)
	wantRequests(t, "upstream", upstream, 2)
	read(t, src, c, 1, 1, 10) // another blob
	wantRequests(t, "mirror, another blob", mirror, 1)
	upstream.set(func() { upstream.fail, upstream.status = 1, 500 })
	read(t, src, c, 0, 1, 10)
	read(t, src, c, 0, 1, 10)
	wantRequests(t, "mirror, after the upstream failed", mirror, 2)
	wantRequests(t, "upstream that failed", upstream, 1)
}

// TestBrokenStreamComesFromElsewhere does what the fetcher does: it asks again for what is missing.
func TestBrokenStreamComesFromElsewhere(t *testing.T) {
	c := newContent(1, 100_000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	for name, with := range map[string]func(){
		"truncated": func() { mirror.truncate = 1000 },
		"stalled":   func() { mirror.truncate, mirror.stall = 0, 1000 },
	} {
		t.Run(name, func(t *testing.T) {
			mirror.set(with)
			src := upstream.openHosts(t, mirrors(mirror), Options{})
			if _, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 100_000); err == nil {
				t.Fatal("no error of a broken stream")
			}
			read(t, src, c, 0, 50_000, 50_000)
			wantRequests(t, "mirror", mirror, 1)
			wantRequests(t, "upstream", upstream, 1)
			// A whole blob is retried here.
			src = upstream.openHosts(t, mirrors(mirror), Options{})
			if b, err := ReadBlob(t.Context(), src, c.layers[0], 1<<20); err != nil || len(b) != 100_000 {
				t.Errorf("%d bytes, %v", len(b), err)
			}
			wantRequests(t, "mirror", mirror, 1)
			wantRequests(t, "upstream", upstream, 1)
		})
	}
	// Who closes a stream says nothing of where it came from.
	mirror.set(func() { mirror.truncate, mirror.stall = 0, 1 })
	src := upstream.openHosts(t, mirrors(mirror), Options{})
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := src.Blob(c.layers[0]).Range(ctx, 0, 100_000)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	io.ReadAll(rc)
	rc.Close()
	read(t, src, c, 0, 0, 10)
	wantRequests(t, "upstream, after the reader gave up", upstream, 0)
}

func TestBadBytesComeFromElsewhere(t *testing.T) {
	c := newContent(1, 1000)
	upstream, mirror, worse := newFake(t, c), newFake(t, c), newFake(t, c)
	mirror.set(func() { mirror.flip = 1000 })
	worse.set(func() { worse.flip = 1000 })
	src := upstream.openHosts(t, mirrors(mirror, worse), Options{})
	if b, err := ReadBlob(t.Context(), src, c.layers[0], 1<<20); err != nil || !bytes.Equal(b, c.blobs[c.layers[0].Digest]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	read(t, src, c, 0, 0, 10)
	wantRequests(t, "upstream", upstream, 2)
}

// dialling is a transport without a network: who answers for a host, and how often it was asked.
type dialling struct {
	mu    sync.Mutex
	asked map[string]int
	hosts map[string]func(*http.Request) (*http.Response, error)
}

func (d *dialling) RoundTrip(req *http.Request) (*http.Response, error) {
	d.mu.Lock()
	d.asked[req.URL.Host]++
	d.mu.Unlock()
	return d.hosts[req.URL.Host](req)
}

func (d *dialling) take(host string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.asked[host]
	d.asked[host] = 0
	return n
}

func TestDeadMirrorIsAskedLast(t *testing.T) {
	c := newContent(40, 1000)
	serve := func(req *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		(&fake{content: c, Server: &httptest.Server{Listener: nowhere{}}}).ServeHTTP(w, req)
		return w.Result(), nil
	}
	for name, dead := range map[string]func(*http.Request) (*http.Response, error){
		"refuses": func(*http.Request) (*http.Response, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
		},
		"is silent": func(req *http.Request) (*http.Response, error) {
			select {
			case <-req.Context().Done():
				return nil, context.Cause(req.Context())
			case <-time.After(20 * time.Second): // as the shared transport does
				return nil, os.ErrDeadlineExceeded
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeHosts(t, dir, "a.example", "[host.\"http://mirror.example\"]\n[host.\"http://other.example\"]")
			synctest.Test(t, func(t *testing.T) {
				d := &dialling{asked: make(map[string]int), hosts: map[string]func(*http.Request) (*http.Response, error){
					"mirror.example": dead, "other.example": serve, "a.example": serve}}
				ref, _ := ParseReference("a.example/r:t")
				src, err := Open(t.Context(), ref, Options{Hosts: dir, Transport: d, Keychain: &login{}})
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				read(t, src, c, 0, 0, 10)
				if took := time.Since(begin); took > mirrorWait {
					t.Errorf("the mirror cost %v", took)
				}
				for i := range c.layers { // of no blob it is known who has it, and yet
					read(t, src, c, i, 0, 10)
				}
				if n := d.take("mirror.example"); n != 1 {
					t.Errorf("a dead mirror was asked %d times, want 1", n)
				}
				time.Sleep(downFor + time.Second)
				read(t, src, c, 1, 10, 10) // the other answered last
				if n := d.take("mirror.example"); n != 0 {
					t.Errorf("a dead mirror was asked %d times for a blob that another has", n)
				}
				d.mu.Lock()
				d.hosts["mirror.example"] = serve
				d.hosts["other.example"] = dead
				d.mu.Unlock()
				if _, _, err := src.Root(t.Context()); err != nil {
					t.Fatal(err)
				}
				if n := d.take("mirror.example"); n != 1 {
					t.Errorf("a mirror that came back was asked %d times, want 1", n)
				}
				// Who is down is asked all the same if nobody else answers.
				d.mu.Lock()
				d.hosts["mirror.example"], d.hosts["a.example"] = dead, dead
				d.mu.Unlock()
				_, err = readAll(t.Context(), src.Blob(c.layers[2]), 0, 10)
				wantError(t, err, "mirror.example", "other.example", "a.example")
			})
		})
	}
}

// nowhere is the listener of a fake that is not reached over a network.
type nowhere struct{ net.Listener }

func (nowhere) Addr() net.Addr { return &net.TCPAddr{} }

// TestReaderOfMirrorGivesUp: of a reader who waited in vain the fetcher cancels the request with a cause, and its second try must not
// go to the same silent host. One who went away says nothing of the host.
func TestReaderOfMirrorGivesUp(t *testing.T) {
	c := newContent(1, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	for _, tt := range []struct {
		cause  error
		mirror int // requests of the second try
	}{{errors.New("nothing arrived"), 0}, {nil, 1}} {
		src := upstream.openHosts(t, mirrors(mirror), Options{})
		src.patience = defaultPatience
		mirror.set(func() { mirror.hang = 1 })
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error)
		go func() {
			_, err := src.Blob(c.layers[0]).Range(ctx, 0, 10)
			done <- err
		}()
		for len(mirror.requests()) == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel(tt.cause)
		if err := <-done; err == nil {
			t.Error("no error")
		}
		read(t, src, c, 0, 0, 10)
		wantRequests(t, "mirror", mirror, tt.mirror)
		upstream.requests()
	}
}

func TestCapabilities(t *testing.T) {
	c := newContent(1, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	src := upstream.openHosts(t, mirrors(mirror)+`capabilities = ["pull"]`, Options{})
	tails(t, src, c)
	wantRequests(t, "upstream, which knows the tag", upstream, 1)
	wantRequests(t, "mirror", mirror, 1+1)

	opts := Options{Hosts: t.TempDir()}
	writeHosts(t, opts.Hosts, upstream.host(), mirrors(mirror)+`capabilities = ["pull"]`)
	if _, _, err := upstream.openRef(t, "r@"+c.manifest.Digest.String(), opts).Root(t.Context()); err != nil {
		t.Error(err)
	}
	wantRequests(t, "mirror, by digest", mirror, 1)

	nobody := fmt.Sprintf("server = %q\ncapabilities = [\"pull\"]", mirror.URL)
	src = upstream.openHosts(t, nobody, Options{})
	_, _, err := src.Root(t.Context())
	wantError(t, err, "hosts.toml", `"resolve"`, "by its digest")
	read(t, src, c, 0, 0, 10)
	src = upstream.openHosts(t, strings.Replace(nobody, "pull", "push", 1), Options{})
	_, err = readAll(t.Context(), src.Blob(c.layers[0]), 0, 10)
	wantError(t, err, "hosts.toml", `"pull"`)
	wantRequests(t, "upstream, where there is another server", upstream, 0)
}

// TestRequestsOfMirrors checks what a mirror is asked, and that headers which are set for it go to nobody else.
func TestRequestsOfMirrors(t *testing.T) {
	c := newContent(1, 1000)
	var mu sync.Mutex
	var seen []string
	record := func(s *httptest.Server) {
		inner := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			seen = append(seen, fmt.Sprintf("%s %s %v %s", r.Host, r.URL, r.Header.Values("X-Key"), r.Header.Get("Authorization")))
			mu.Unlock()
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/of/it")
			if r.UserAgent() == "mine" {
				r.Header.Set("User-Agent", "lazuli/mine")
			}
			inner.ServeHTTP(w, r)
		})
		s.Start()
	}
	upstream, mirror := startFake(t, c, record), startFake(t, c, record)
	store := strings.Replace(mirror.host(), "127.0.0.1", "localhost", 1)
	digest := c.layers[0].Digest.String()
	ns := "?ns=" + strings.Replace(upstream.host(), ":", "%3A", 1)
	for _, tt := range []struct {
		name, toml string
		with       func()
		want       []string
	}{
		{"mirror", mirrors(mirror) + "[host." + fmt.Sprintf("%q", mirror.URL) + ".header]\nx-key = [\"a\", \"b\"]\nuser-agent = \"mine\"\nrange = \"bytes=0-1\"\nAuthorization = \"Basic bTpw\"",
			func() { mirror.basic = "m:p" }, []string{mirror.host() + " /v2/r/blobs/" + digest + ns + " [a b] Basic bTpw"}},
		{"path", fmt.Sprintf("[host.%q]", mirror.URL+"/of/it/"), func() {}, []string{mirror.host() + " /of/it/v2/r/blobs/" + digest + ns + " [] "}},
		{"own path", fmt.Sprintf("[host.%q]\noverride_path=true", mirror.URL+"/of/it/v2"), func() {}, []string{mirror.host() + " /of/it/v2/r/blobs/" + digest + ns + " [] "}},
		{"upstream", fmt.Sprintf("server = %q\n[header]\nx-key = \"a\"", upstream.URL), func() {}, []string{upstream.host() + " /v2/r/blobs/" + digest + " [a] "}},
		{"upstream that is not named", "[header]\nx-key = \"a\"", func() {}, []string{upstream.host() + " /v2/r/blobs/" + digest + " [a] "}},
		{"store", fmt.Sprintf("server = %q\n[header]\nx-key = \"a\"\nauthorization = \"Basic bTpw\"", mirror.URL), func() { mirror.store = store },
			[]string{mirror.host() + " /v2/r/blobs/" + digest + ns + " [a] Basic bTpw", store + " /v2/r/blobs/" + digest + "?signature=1 [] "}},
	} {
		mirror.set(func() { mirror.basic, mirror.store, mirror.signed = "", "", 0; tt.with() })
		seen = nil
		read(t, upstream.openHosts(t, tt.toml, Options{}), c, 0, 5, 10)
		if got := strings.Join(seen, "\n"); got != strings.Join(tt.want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, strings.Join(tt.want, "\n"))
		}
	}
}

// TestNamespaces checks what a host is asked for, and by which name its password is looked up.
func TestNamespaces(t *testing.T) {
	for _, tt := range []struct{ ref, server, url, login string }{
		{"debian", "", "https://index.docker.io/v2/library/debian/manifests/latest", "index.docker.io"},
		{"debian", "https://docker.io", "https://index.docker.io/v2/library/debian/manifests/latest", "index.docker.io"},
		{"debian", "https://registry-1.docker.io", "https://registry-1.docker.io/v2/library/debian/manifests/latest", "index.docker.io"},
		{"index.docker.io/a/b:c", "https://m.example", "https://m.example/v2/a/b/manifests/c?ns=docker.io", "m.example"},
		{"a.example:1/b", "https://a.example", "https://a.example/v2/b/manifests/latest?ns=a.example%3A1", "a.example"},
		{"a.example:1/b", "http://a.example:1", "http://a.example:1/v2/b/manifests/latest", "a.example:1"},
		{"a.example/b", "registry-1.docker.io", "https://registry-1.docker.io/v2/b/manifests/latest?ns=a.example", "index.docker.io"},
		{"a.example/b", "http://m.example:80", "http://m.example:80/v2/b/manifests/latest?ns=a.example", "m.example:80"},
	} {
		dir := t.TempDir()
		writeHosts(t, dir, "_default", fmt.Sprintf("server = %q", tt.server))
		ref, err := ParseReference(tt.ref)
		if err != nil {
			t.Fatal(err)
		}
		var asked []string
		transport := roundTripper(func(req *http.Request) (*http.Response, error) {
			asked = append(asked, req.URL.String())
			w := httptest.NewRecorder()
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			resp := w.Result()
			resp.Request = req
			return resp, nil
		})
		keys := &keysByHost{}
		src, err := Open(t.Context(), ref, Options{Hosts: dir, Transport: transport, Keychain: keys})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := src.Root(t.Context()); err == nil {
			t.Fatal("no error")
		}
		if len(asked) != 1 || asked[0] != tt.url || strings.Join(keys.asked, " ") != tt.login {
			t.Errorf("%s at %q: asked %v and for the login of %v, want %s and %s", tt.ref, tt.server, asked, keys.asked, tt.url, tt.login)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (r roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return r(req) }

// keysByHost is a keychain with passwords by host: of the user "me".
type keysByHost struct {
	mu        sync.Mutex
	passwords map[string]string
	asked     []string
}

func (k *keysByHost) Resolve(r authn.Resource) (authn.Authenticator, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = append(k.asked, r.RegistryStr())
	if p := k.passwords[r.RegistryStr()]; p != "" {
		return &authn.Basic{Username: "me", Password: p}, nil
	}
	return authn.Anonymous, nil
}

func TestEachHostHasItsOwnLogin(t *testing.T) {
	c := newContent(1, 1000)
	var shown sync.Map // host and what it was shown
	record := func(s *httptest.Server) {
		inner := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			shown.Store(r.Host+" "+r.Header.Get("Authorization"), true)
			inner.ServeHTTP(w, r)
		})
		s.Start()
	}
	basic, token, upstream := startFake(t, c, record), startFake(t, c, record), startFake(t, c, record)
	basic.basic, token.basic, token.token, upstream.basic = "me:one", "me:two", "t", "me:three"
	keys := &keysByHost{passwords: map[string]string{basic.host(): "one", token.host(): "two", upstream.host(): "three"}}
	src := upstream.openHosts(t, mirrors(basic, token), Options{Keychain: keys})
	for _, f := range []*fake{nil, basic, token} {
		if f != nil {
			f.set(func() { f.fail, f.status = 1000, 404 })
		}
		read(t, src, c, 0, 0, 10)
	}
	want := map[string]bool{}
	for f, headers := range map[*fake][]string{basic: {"", "Basic bWU6b25l"}, token: {"", "Basic bWU6dHdv", "Bearer t"}, upstream: {"", "Basic bWU6dGhyZWU="}} {
		for _, h := range headers {
			want[f.host()+" "+h] = true
		}
	}
	n := 0
	shown.Range(func(k, _ any) bool {
		if n++; !want[k.(string)] {
			t.Errorf("shown: %v", k)
		}
		return true
	})
	if n != len(want) {
		t.Errorf("%d things were shown, want %d", n, len(want))
	}
}

// serverTLS is a fake with TLS, the file with its CA, and that of a client's certificate which the CA signed.
func serverTLS(t *testing.T, c *content, clients bool) (f *fake, ca, client string) {
	t.Helper()
	dir := t.TempDir()
	f = startFake(t, c, func(s *httptest.Server) {
		s.TLS = &tls.Config{}
		if clients {
			s.TLS.ClientAuth = tls.RequireAnyClientCert
		}
		s.StartTLS()
	})
	issuer := f.Certificate()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "client"}, NotBefore: issuer.NotBefore, NotAfter: issuer.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, issuer, &key.PublicKey, f.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ca, client = filepath.Join(dir, "ca.crt"), filepath.Join(dir, "client.pem")
	for file, blocks := range map[string][]*pem.Block{
		ca:     {{Type: "CERTIFICATE", Bytes: issuer.Raw}},
		client: {{Type: "CERTIFICATE", Bytes: der}, {Type: "PRIVATE KEY", Bytes: keyDER}},
	} {
		var b []byte
		for _, block := range blocks {
			b = append(b, pem.EncodeToMemory(block)...)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f, ca, client
}

func TestHostsTLS(t *testing.T) {
	c := newContent(1, 1000)
	open, ca, _ := serverTLS(t, c, false)
	closed, ca2, client := serverTLS(t, c, true)
	plain := newFake(t, c)
	asHTTP := func(f *fake) string { return strings.Replace(f.URL, "https", "http", 1) }
	for _, tt := range []struct {
		name, toml string
		want       []string // of the error
	}{
		{"ca", fmt.Sprintf("server = %q\nca = %q", open.URL, ca), nil},
		{"cas", fmt.Sprintf("server = %q\nca = [%q, %q]", open.URL, ca2, ca), nil},
		{"ca of a mirror", fmt.Sprintf("server = %q\n[host.%q]\nca = %q", plain.URL+"/nothing", open.URL, ca), nil},
		{"no ca", fmt.Sprintf("server = %q", open.URL), []string{"certificate of " + open.host() + " is not trusted"}},
		{"no verification", fmt.Sprintf("server = %q\nskip_verify = true", open.URL), nil},
		{"client", fmt.Sprintf("server = %q\nca = %q\nclient = %q", closed.URL, ca, client), nil},
		{"clients", fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, \"\"]]", closed.URL, ca, client), nil},
		{"no client", fmt.Sprintf("server = %q\nca = %q", closed.URL, ca), []string{closed.host(), "certificate required"}},
		{"TLS where http is written", fmt.Sprintf("server = %q\nskip_verify = true", asHTTP(open)), nil},
		{"no TLS where http is written", fmt.Sprintf("server = %q\nskip_verify = true", plain.URL), nil},
		{"no TLS where https is written", fmt.Sprintf("server = %q", strings.Replace(plain.URL, "http", "https", 1)), []string{"does not speak TLS", "http:// in a hosts.toml"}},
		{"dial_timeout", fmt.Sprintf("server = %q\ndial_timeout = \"5s\"", plain.URL), nil},
	} {
		src := plain.openHosts(t, tt.toml, Options{})
		_, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 10)
		if tt.want != nil {
			wantError(t, err, tt.want...)
		} else if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}

	// Docker's form, for the registry itself.
	dir := t.TempDir()
	folder := filepath.Join(dir, strings.Replace(closed.host(), ":", "_", 1)+"_")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{ca: "ca.crt", client: "client.cert"} {
		if err := os.Symlink(from, filepath.Join(folder, to)); err != nil {
			t.Fatal(err)
		}
	}
	tails(t, closed.open(t, Options{Hosts: dir}), c)
}

func TestHostsErrorsAtOpen(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "empty.pem"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ref, _ := ParseReference("a.example/r:t")
	for toml, words := range map[string][]string{
		"ca = \"missing.pem\"":                    {"hosts.toml: server", "missing.pem", "no such file", "put the file there"},
		"[host.b]\nca = \"../empty.pem\"":         {`hosts.toml: host."b"`, "empty.pem", "no certificate"},
		"[host.b]\nclient = [\"../empty.pem\"]":   {`hosts.toml: host."b"`, "empty.pem", "certificate and its key"},
		"[host.b]\ncapabilities = [\"anything\"]": {"hosts.toml", "anything"},
	} {
		writeHosts(t, dir, "a.example", toml)
		_, err := Open(t.Context(), ref, Options{Hosts: dir})
		wantError(t, err, append(words, "image a.example/r:t")...)
	}
	if _, err := Open(t.Context(), ref, Options{Hosts: filepath.Join(dir, "empty.pem")}); err == nil {
		t.Error("a file is no folder of hosts")
	}
	writeHosts(t, dir, "a.example", "skip_verify = true")
	_, err := Open(t.Context(), ref, Options{Hosts: dir, Transport: roundTripper(nil)})
	wantError(t, err, "*http.Transport")
}

// TestLinksAreShared opens two images of a registry: they share connections, and the knowledge that a mirror is dead.
func TestLinksAreShared(t *testing.T) {
	c := newContent(1, 1000)
	f, ca, _ := serverTLS(t, c, false)
	var conns atomic.Int32
	plain := startFake(t, c, func(s *httptest.Server) {
		s.Config.ConnState = func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		}
		s.Start()
	})
	opts := Options{Hosts: t.TempDir(), Keychain: &login{}}
	writeHosts(t, opts.Hosts, plain.host(), fmt.Sprintf("server = %q\n[host.%q]\nca = %q", plain.URL, f.URL, ca))
	open := func() *registry {
		t.Helper()
		ref, _ := ParseReference(plain.host() + "/r:t")
		src, err := Open(t.Context(), ref, opts)
		if err != nil {
			t.Fatal(err)
		}
		r := src.(*registry)
		r.patience = impatient
		return r
	}
	first := open()
	read(t, first, c, 0, 0, 10)
	if second := open(); second.endpoints[0].link != first.endpoints[0].link {
		t.Error("two images do not share the connections to a host with settings of its own")
	}
	if tr := first.endpoints[1].link.transport; tr != sharedTransport() {
		t.Error("a host without settings of its own has connections of its own")
	}
	f.requests()
	f.Close()
	read(t, open(), c, 0, 0, 10)
	first = open()
	if !first.endpoints[0].link.isDown() {
		t.Error("a new source does not know of the dead mirror")
	}
	read(t, first, c, 0, 0, 10)
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections to the upstream, want 1", n)
	}
	// A CA that changed is used at once.
	old := first.endpoints[0].link
	b, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ca, append(b, b...), 0o600); err != nil {
		t.Fatal(err)
	}
	if open().endpoints[0].link == old {
		t.Error("the link is still that of the file's former content")
	}
}

// TestDistrust reads bytes that turn out to be wrong, wherever they come from: each host has its turn, and so has not what
// another redirected to.
func TestDistrust(t *testing.T) {
	c := newContent(1, 1000)
	upstream, mirror := newFake(t, c), newFake(t, c)
	mirror.set(func() { mirror.store = strings.Replace(mirror.host(), "127.0.0.1", "localhost", 1) })
	src := upstream.openHosts(t, mirrors(mirror), Options{})
	for i, want := range [][2]int{{2, 0}, {0, 1}, {1, 0}, {0, 1}, {1, 0}} { // of the mirror and its store, and of the upstream
		rc, err := src.Blob(c.layers[0]).Range(t.Context(), 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		rc.(interface{ Distrust() }).Distrust()
		rc.Close()
		wantRequests(t, fmt.Sprintf("mirror, read %d", i), mirror, want[0])
		wantRequests(t, fmt.Sprintf("upstream, read %d", i), upstream, want[1])
	}
}

// TestNamedTwice: a server that is named as a host too is asked once, unless the second naming says something else.
func TestNamedTwice(t *testing.T) {
	for toml, want := range map[string]int{
		"server = 'http://%[1]s'\n[host.'http://%[1]s']\ncapabilities = ['pull', 'resolve']": 1,
		"server = 'http://%[1]s'\n[host.'http://%[1]s']\ncapabilities = ['pull']":            2, // who says what tags are
		"server = 'http://%[1]s'\n[host.'https://%[1]s']":                                    2,
		"server = 'http://%[1]s'\n[host.'http://%[1]s/mirror']":                              2,
		"server = 'http://%[1]s'\n[host.'http://other.example']\n[host.'http://%[1]s']":      2,
		"server = 'https://%[1]s'\nskip_verify = true\n[host.'https://%[1]s']":               2,
		"server = 'http://%[1]s'\n[header]\nauthorization = 'x'\n[host.'http://%[1]s']":      2,
		"[host.'http://%[1]s']": 2, // the server's scheme is not known yet
	} {
		opts := Options{Hosts: t.TempDir()}
		writeHosts(t, opts.Hosts, "r.example:5000", fmt.Sprintf(toml, "r.example:5000"))
		ref, err := ParseReference("r.example:5000/app")
		if err != nil {
			t.Fatal(err)
		}
		src, err := openRegistry(ref, opts)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(src.(*registry).endpoints); got != want {
			t.Errorf("%s\n%d endpoints, want %d", toml, got, want)
		}
	}
}
