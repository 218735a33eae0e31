package remote

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// tails opens an image as a mount does: manifest, config, and the tail of each layer.
func tails(t *testing.T, src Source, c *content) {
	t.Helper()
	img, err := Pick(t.Context(), src, &v1.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	if config, _, err := img.Config(t.Context()); err != nil || config.Architecture != "amd64" {
		t.Fatalf("config: %+v, %v", config, err)
	}
	if len(img.Layers) != len(c.layers) {
		t.Fatalf("%d layers, want %d", len(img.Layers), len(c.layers))
	}
	var wg sync.WaitGroup
	for _, l := range img.Layers {
		wg.Go(func() {
			const n = 100
			got, err := readAll(t.Context(), l.Blob, l.Size-n, n)
			if err != nil || !bytes.Equal(got, c.blobs[l.Digest][l.Size-n:]) {
				t.Errorf("layer %v: %d bytes, %v", l.Digest, len(got), err)
			}
		})
	}
	wg.Wait()
}

func TestRequests(t *testing.T) {
	const n = 5
	c := newContent(n, 1000)
	index := c.addJSON(types.OCIImageIndex, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{
		{MediaType: types.OCIManifestSchema1, Size: c.manifest.Size, Digest: c.manifest.Digest, Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}},
	}})
	for _, tt := range []struct {
		name  string
		ref   string
		with  func(*fake)
		want  int // requests
		asked int // the keychain
	}{
		{"manifest", "r:t", func(*fake) {}, 2 + n, 0},
		{"index", "r@" + index.Digest.String(), func(*fake) {}, 3 + n, 0},
		{"token", "r:t", func(f *fake) { f.token, f.basic = "x", "me:secret" }, 2 + 2 + n, 1},
		{"password", "r:t", func(f *fake) { f.basic = "me:secret" }, 1 + 2 + n, 1},
		{"object store", "r:t", func(f *fake) { f.store = strings.Replace(f.host(), "127.0.0.1", "localhost", 1) }, 2 + 1 + 2*n, 0}, // the config too
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t, c)
			tt.with(f)
			keys := &login{user: "me", password: "secret"}
			src := f.openRef(t, tt.ref, Options{Keychain: keys})
			tails(t, src, c)
			log := f.requests()
			if len(log) != tt.want {
				t.Errorf("%d requests, want %d:\n%s", len(log), tt.want, strings.Join(log, "\n"))
			}
			if got := src.Stats(); got.Requests != int64(len(log)) || got.Bytes < 500 {
				t.Errorf("stats %+v, want %d requests", got, len(log))
			}
			if keys.asked != tt.asked {
				t.Errorf("keychain was asked %d times, want %d", keys.asked, tt.asked)
			}
			for _, l := range log {
				if strings.HasPrefix(l, "HEAD") || l == "GET /v2/" {
					t.Errorf("needless request %s", l)
				}
			}
		})
	}
}

func TestConnectionsAreReused(t *testing.T) {
	c := newContent(1, 100_000)
	var conns atomic.Int32
	f := startFake(t, c, func(s *httptest.Server) {
		s.Config.ConnState = func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		}
		s.Start()
	})
	b := f.open(t, Options{PlainHTTP: true}).Blob(c.layers[0])
	for off := int64(0); off < 10; off++ {
		rc, err := b.Range(t.Context(), off, 50_000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(rc, make([]byte, 50_000)); err != nil { // without reading on to io.EOF
			t.Fatal(err)
		}
		rc.Close()
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections for ranges one after the other, want 1", n)
	}
}

func TestRange(t *testing.T) {
	c := newContent(1, 1000)
	f := newFake(t, c)
	src := f.open(t, Options{})
	blob, want := src.Blob(c.layers[0]), c.blobs[c.layers[0].Digest]
	for _, r := range [][2]int64{{0, 1}, {0, 1000}, {999, 1}, {10, 600}, {300, 511}, {300, 512}, {300, 513}} {
		got, err := readAll(t.Context(), blob, r[0], r[1])
		if err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("range %v: %d bytes, %v", r, len(got), err)
		}
	}
	f.requests()
	if got, err := readAll(t.Context(), blob, 1000, 0); err != nil || len(got) != 0 {
		t.Errorf("empty range: %d bytes, %v", len(got), err)
	}
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, 1001}, {1000, 1}, {1, 1 << 62}, {1 << 62, 1 << 62}, {1<<63 - 1, 1<<63 - 1}} {
		if _, err := blob.Range(t.Context(), r[0], r[1]); err == nil {
			t.Errorf("range %v: no error", r)
		}
	}
	if l := f.requests(); len(l) > 0 {
		t.Errorf("requests for ranges that are empty or not there: %v", l)
	}
}

// TestTrouble reads a range while the registry misbehaves: want is an error's words,
// or nothing if the bytes must come all the same.
func TestTrouble(t *testing.T) {
	c := newContent(1, 4<<20)
	layer := c.layers[0]
	for _, tt := range []struct {
		name     string
		with     func(*fake)
		off, n   int64
		requests int
		want     []string
		is       error
	}{
		{"fine", func(f *fake) {}, 5, 1000, 1, nil, nil},
		{"503 then fine", func(f *fake) { f.fail = 2 }, 5, 1000, 3, nil, nil},
		{"503", func(f *fake) { f.fail = 9 }, 5, 1000, 3, []string{"blob sha256:", "503 Service Unavailable", "later"}, nil},
		{"429 then fine", func(f *fake) { f.fail, f.status, f.retrySec = 1, 429, "100000" }, 5, 1000, 2, nil, nil}, // Retry-After bounded
		{"501", func(f *fake) { f.fail, f.status = 9, 501 }, 5, 1000, 1, []string{"501"}, nil},
		{"404", func(f *fake) { f.fail, f.status = 9, 404 }, 5, 1000, 1, []string{"blob sha256:", "not complete"}, ErrNotFound},
		{"416", func(f *fake) { f.fail, f.status = 9, 416 }, 5, 1000, 1, []string{"blob sha256:", "bytes 5 to 1004"}, nil},
		{"wrong range", func(f *fake) { f.wrongFrom = 9 }, 5, 1000, 1, []string{"blob sha256:", "asked for bytes 5 to 1004", "sent 6 to 1004"}, nil},
		{"403 once", func(f *fake) { f.basic, f.forbid = "me:secret", 1 }, 5, 1000, 2, nil, nil},
		{"403", func(f *fake) { f.basic, f.forbid = "me:secret", 9 }, 5, 1000, 2, []string{"refuses access", "403", "me's", "docker login"}, nil},
		{"no ranges, near", func(f *fake) { f.noRanges = true }, 5, 1000, 1, nil, nil},
		{"no ranges, far", func(f *fake) { f.noRanges = true }, 3 << 20, 1000, 1, []string{"blob sha256:", "ignores range"}, ErrNoRanges},
		{"no ranges, whole", func(f *fake) { f.noRanges = true }, 0, 4 << 20, 1, nil, nil},
		{"truncated", func(f *fake) { f.truncate = 9 }, 5, 100_000, 1, []string{"blob sha256:", "50000 bytes before its end"}, io.ErrUnexpectedEOF},
		{"stalled", func(f *fake) { f.stall = 9 }, 5, 100_000, 1, []string{"blob sha256:", "50000 bytes before its end", "nothing arrived"}, errStalled},
		{"stalled at once, then fine", func(f *fake) { f.hang = 1 }, 5, 1000, 2, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, c)
			src := f.open(t, Options{Keychain: &login{user: "me", password: "secret"}})
			tt.with(f)
			if f.basic != "" { // learn the challenge first
				forbid := f.forbid
				f.forbid = 0
				if _, _, err := src.Root(t.Context()); err != nil {
					t.Fatal(err)
				}
				f.forbid = forbid
				f.requests()
			}
			got, err := readAll(t.Context(), src.Blob(layer), tt.off, tt.n)
			if tt.want == nil {
				if err != nil || !bytes.Equal(got, c.blobs[layer.Digest][tt.off:tt.off+tt.n]) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			} else {
				wantError(t, err, append(tt.want, "image "+f.host()+"/r:t")...)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v: is not %v", err, tt.is)
			}
			if l := f.requests(); len(l) != tt.requests {
				t.Errorf("%d requests, want %d: %v", len(l), tt.requests, l)
			}
		})
	}
}

func TestSizeBelied(t *testing.T) {
	c := newContent(1, 1000)
	for _, noRanges := range []bool{false, true} {
		f := newFake(t, c)
		f.noRanges = noRanges
		d := c.layers[0]
		d.Size = 900
		_, err := readAll(t.Context(), f.open(t, Options{}).Blob(d), 10, 10)
		wantError(t, err, "the server has 1000 bytes of it, and the manifest says 900")
	}
}

func TestTokenExpires(t *testing.T) {
	c := newContent(3, 1000)
	f := newFake(t, c)
	f.token = "first"
	src := f.open(t, Options{})
	tails(t, src, c)
	f.set(func() { f.token = "second" })
	f.requests()

	// Many readers meet the expiry, and one token is enough for all of them.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := readAll(t.Context(), src.Blob(c.layers[i%3]), int64(i), 10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	tokens := 0
	for _, l := range f.requests() {
		if strings.HasPrefix(l, "GET /token") {
			tokens++
		}
	}
	if tokens != 1 {
		t.Errorf("%d tokens were asked for, want 1", tokens)
	}
}

func TestWrongCredentials(t *testing.T) {
	c := newContent(1, 1000)
	for _, tt := range []struct {
		name string
		with func(*fake)
		keys *login
		want []string
	}{
		{"password", func(f *fake) { f.basic = "me:secret" }, &login{user: "me", password: "guess"}, []string{"401", "me's", "docker login", "config.json"}},
		{"nobody", func(f *fake) { f.basic = "me:secret" }, &login{}, []string{"401", "nobody is logged in", "docker login"}},
		{"token server", func(f *fake) { f.token, f.basic = "x", "me:secret" }, &login{user: "me", password: "guess"}, []string{"token server answered 401", "me's", "docker login"}},
		{"useless token", func(f *fake) { f.token, f.issue = "x", "y" }, &login{}, []string{"401", "docker login"}},
		{"403 at once", func(f *fake) { f.forbid = 9 }, &login{}, []string{"403", "DENIED", "docker login"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t, c)
			tt.with(f)
			_, _, err := f.open(t, Options{Keychain: tt.keys}).Root(t.Context())
			wantError(t, err, append(tt.want, "image "+f.host()+"/r:t", f.host()+" refuses access")...)
			if n := len(f.requests()); n > 4 {
				t.Errorf("%d requests for an answer that does not change", n)
			}
		})
	}
}

func TestRedirectIsKeptUntilItFails(t *testing.T) {
	c := newContent(1, 100_000)
	f := newFake(t, c)
	f.token = "x" // must not be shown to the store: the fake checks
	f.store = strings.Replace(f.host(), "127.0.0.1", "localhost", 1)
	src := f.open(t, Options{})
	read := func() {
		t.Helper()
		b := src.Blob(c.layers[0])
		if got, err := readAll(t.Context(), b, 10, 1000); err != nil || !bytes.Equal(got, c.blobs[c.layers[0].Digest][10:1010]) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	read()
	read()
	read()
	if f.signed != 1 {
		t.Errorf("the registry was asked %d times where the blob is, want 1", f.signed)
	}
	f.set(func() { f.expire = true; f.signed++ }) // the address in use is not good any more
	f.requests()
	read()
	read()
	if l := f.requests(); len(l) != 1+2+1 {
		t.Errorf("%d requests, want one that fails, a new redirect and its target, and one that works: %v", len(l), l)
	}
	// A stream that breaks may be the store's fault.
	f.set(func() { f.truncate = 1 })
	if _, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 50_000); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("truncated: %v", err)
	}
	signed := f.signed
	read()
	if f.signed != signed+1 {
		t.Error("after a broken stream the registry was not asked again")
	}
}

func TestRedirectToHTTPIsRefused(t *testing.T) {
	c := newContent(1, 1000)
	f := startFake(t, c, (*httptest.Server).StartTLS)
	f.store = "store.example.com"
	_, err := readAll(t.Context(), f.open(t, Options{Transport: trusting(t, f.Server)}).Blob(c.layers[0]), 0, 10)
	wantError(t, err, "http://store.example.com", "TLS")
}

func TestFlippedByte(t *testing.T) {
	c := newContent(1, 1000)
	t.Run("manifest", func(t *testing.T) {
		f := newFake(t, c)
		f.flip = 1
		_, _, err := f.open(t, Options{}).Root(t.Context())
		wantError(t, err, "image "+f.host()+"/r:t", "manifest "+c.manifest.Digest.String(), "digest", "push")
	})
	t.Run("manifest by digest", func(t *testing.T) {
		f := newFake(t, c)
		f.flip = 1
		_, _, err := f.openRef(t, "r@"+c.manifest.Digest.String(), Options{}).Root(t.Context())
		wantError(t, err, "manifest "+c.manifest.Digest.String(), "digest")
	})
	t.Run("blob", func(t *testing.T) {
		f := newFake(t, c)
		f.flip = 2
		src := f.open(t, Options{})
		_, err := ReadBlob(t.Context(), src, c.layers[0], 1<<20)
		wantError(t, err, "image "+f.host()+"/r:t", "blob "+c.layers[0].Digest.String(), "digest")
	})
	t.Run("blob once", func(t *testing.T) {
		f := newFake(t, c)
		f.flip = 1
		src := f.open(t, Options{})
		if b, err := ReadBlob(t.Context(), src, c.layers[0], 1<<20); err != nil || !bytes.Equal(b, c.blobs[c.layers[0].Digest]) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	})
	t.Run("blob truncated twice", func(t *testing.T) {
		f := newFake(t, c)
		f.truncate = 2
		src := f.open(t, Options{})
		if b, err := ReadBlob(t.Context(), src, c.layers[0], 1<<20); err != nil || len(b) != 1000 {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	})
	t.Run("manifest truncated once", func(t *testing.T) {
		f := newFake(t, c)
		f.truncate = 1
		if d, _, err := f.open(t, Options{}).Root(t.Context()); err != nil || d.Digest != c.manifest.Digest {
			t.Errorf("%v, %v", d.Digest, err)
		}
	})
}

func TestBounds(t *testing.T) {
	c := newContent(1, 1000)
	c.manifest = c.add(types.OCIManifestSchema1, bytes.Repeat([]byte(" "), maxManifest+1))
	f := newFake(t, c)
	src := f.open(t, Options{})
	_, _, err := src.Root(t.Context())
	wantError(t, err, "more than 4194304 bytes")
	f.requests()
	_, err = ReadBlob(t.Context(), src, v1.Descriptor{Digest: c.layers[0].Digest, Size: 1 << 62}, 1<<20)
	wantError(t, err, "4611686018427387904 bytes")
	_, err = ReadBlob(t.Context(), src, v1.Descriptor{Digest: c.layers[0].Digest, Size: -1}, 1<<20)
	wantError(t, err, "-1 bytes")
	_, err = ReadBlob(t.Context(), src, v1.Descriptor{Digest: v1.Hash{Algorithm: "../../..", Hex: "x"}, Size: 1}, 1<<20)
	wantError(t, err, "not a SHA-256 digest")
	if l := f.requests(); len(l) > 0 {
		t.Errorf("requests for what cannot be: %v", l)
	}
}

func TestNotThere(t *testing.T) {
	f := newFake(t, newContent(1, 1000))
	for ref, code := range map[string]string{"r:missing": "MANIFEST_UNKNOWN", "other:t": "NAME_UNKNOWN"} {
		_, _, err := f.openRef(t, ref, Options{}).Root(t.Context())
		wantError(t, err, "image "+f.host()+"/"+ref, code, "check the image's name")
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v is not ErrNotFound", ref, err)
		}
	}
}

func TestNoRegistry(t *testing.T) {
	for host, words := range map[string][]string{
		closedPort(t):           {"nothing answers at 127.0.0.1:", "refused", "check the registry's name and port"},
		"nowhere.invalid":       {"nowhere.invalid"}, // RFC 6761: never resolves; how it fails is the resolver's
		"registry.invalid:5000": {"registry.invalid"},
	} {
		ref, err := ParseReference(host + "/r:t")
		if err != nil {
			t.Fatal(err)
		}
		dials := 0
		src := newRegistry(ref, Options{Keychain: &login{}, Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials++
			return new(net.Dialer).DialContext(ctx, network, addr)
		}}})
		src.patience = impatient
		_, _, err = src.Root(t.Context())
		if isNear(host) && dials > 2 {
			t.Errorf("%d connections were tried, want one with TLS and one without", dials)
		}
		wantError(t, err, append(words, "image "+host+"/r:t")...)
	}
}

func TestScheme(t *testing.T) {
	c := newContent(2, 1000)
	t.Run("TLS", func(t *testing.T) {
		f := startFake(t, c, (*httptest.Server).StartTLS)
		tails(t, f.open(t, Options{Transport: trusting(t, f.Server)}), c)
		if n := len(f.requests()); n != 4 {
			t.Errorf("%d requests, want 4", n)
		}
	})
	t.Run("HTTP/2", func(t *testing.T) {
		var protos sync.Map
		f := startFake(t, c, func(s *httptest.Server) {
			inner := s.Config.Handler
			s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { protos.Store(r.Proto, true); inner.ServeHTTP(w, r) })
			s.EnableHTTP2 = true
			s.StartTLS()
		})
		tails(t, f.open(t, Options{Transport: trusting(t, f.Server)}), c)
		if _, ok := protos.Load("HTTP/1.1"); ok {
			t.Error("HTTP/1.1 was spoken where HTTP/2 was offered")
		}
	})
	t.Run("not trusted", func(t *testing.T) {
		f := startFake(t, c, (*httptest.Server).StartTLS)
		_, _, err := f.open(t, Options{}).Root(t.Context())
		wantError(t, err, "image "+f.host()+"/r:t", "certificate of "+f.host()+" is not trusted", "SSL_CERT_FILE")
		if l := f.requests(); len(l) > 0 {
			t.Errorf("was spoken to without TLS: %v", l)
		}
	})
	t.Run("handshake broken off", func(t *testing.T) {
		// A server that closes the connection on TLS instead of answering in HTTP.
		f := startFake(t, c, func(s *httptest.Server) { s.Listener = noTLS{s.Listener}; s.Start() })
		tails(t, f.open(t, Options{}), c)
	})
	t.Run("asked once", func(t *testing.T) {
		var conns atomic.Int32
		f := startFake(t, c, func(s *httptest.Server) {
			s.Config.ConnState = func(_ net.Conn, s http.ConnState) {
				if s == http.StateNew {
					conns.Add(1)
				}
			}
			s.Start()
		})
		src := f.open(t, Options{})
		for range 5 {
			if _, err := readAll(t.Context(), src.Blob(c.layers[0]), 1, 10); err != nil {
				t.Fatal(err)
			}
		}
		if n := conns.Load(); n != 2 {
			t.Errorf("%d connections, want one that tries TLS and one that is used", n)
		}
	})
	t.Run("public", func(t *testing.T) {
		f := newFake(t, c)
		tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", f.host())
		}}
		defer tr.CloseIdleConnections()
		ref, _ := ParseReference("registry.example.com:5000/r:t")
		src, err := Open(t.Context(), ref, Options{Transport: tr, Keychain: &login{}})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = src.Root(t.Context())
		wantError(t, err, "registry.example.com:5000 does not speak TLS")
		if l := f.requests(); len(l) > 0 {
			t.Errorf("a public name was spoken to without TLS: %v", l)
		}
		src, err = Open(t.Context(), ref, Options{Transport: tr, Keychain: &login{}, PlainHTTP: true})
		if err != nil {
			t.Fatal(err)
		}
		tails(t, src, c)
	})
}

// noTLS closes connections that begin with a TLS handshake.
type noTLS struct{ net.Listener }

func (l noTLS) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &noTLSConn{Conn: c}, err
}

type noTLSConn struct {
	net.Conn
	begun bool
}

func (c *noTLSConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if !c.begun && n > 0 && p[0] == 22 { // handshake record
		c.Conn.Close()
		return 0, io.EOF
	}
	c.begun = c.begun || n > 0
	return n, err
}

func TestIsNear(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "a.localhost:1": true, "127.0.0.1:5000": true, "127.8.8.8": true, "[::1]:5000": true,
		"10.1.2.3": true, "172.16.0.1:1": true, "172.32.0.1": false, "192.168.1.1": true, "fd00::1": true,
		"example.com": false, "8.8.8.8:5000": false, "localhost.example.com": false, "10.example.com": false, "169.254.169.254": false,
	} {
		if got := isNear(host); got != want {
			t.Errorf("isNear(%q) = %v", host, got)
		}
	}
}

func TestContext(t *testing.T) {
	c := newContent(1, 100_000)
	f := newFake(t, c)
	src := f.open(t, Options{})
	src.patience = defaultPatience // nothing but ctx may end this
	t.Run("while the body stalls", func(t *testing.T) {
		f.set(func() { f.stall = 1 })
		ctx, cancel := context.WithCancel(t.Context())
		rc, err := src.Blob(c.layers[0]).Range(ctx, 0, 100_000)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if _, err := io.ReadFull(rc, make([]byte, 50_000)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := rc.Read(make([]byte, 10)); !errors.Is(err, context.Canceled) {
			t.Errorf("read: %v", err)
		}
	})
	t.Run("while nothing comes", func(t *testing.T) {
		f.set(func() { f.hang = 1 })
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		if _, err := src.Blob(c.layers[0]).Range(ctx, 0, 100_000); !errors.Is(err, context.Canceled) {
			t.Errorf("range: %v", err)
		}
		f.set(func() { f.hang = 0 })
	})
}

func TestRetry(t *testing.T) {
	fail := func() error { return &transient{err: io.EOF, after: time.Hour} }
	run := func(ctx context.Context) (tries int, took time.Duration, err error) {
		r := &registry{patience: defaultPatience, log: slog.New(slog.DiscardHandler)}
		begin := time.Now()
		err = r.retry(ctx, "blob x", func() error { tries++; return fail() })
		return tries, time.Since(begin), err
	}
	synctest.Test(t, func(t *testing.T) {
		// The server's hour is cut to 10 s, and no try begins after retryFor.
		if tries, took, err := run(t.Context()); tries != 6 || took != 50*time.Second || !errors.Is(err, io.EOF) {
			t.Errorf("%d tries in %v, %v", tries, took, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 13*time.Second)
		defer cancel()
		if tries, took, err := run(ctx); tries != 2 || took != 13*time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%d tries in %v, %v", tries, took, err)
		}
		fail = func() error { return &transient{err: io.EOF} }
		// 6 tries: 0.2 + 0.4 + 0.8 + 1.6 + 3.2 s, each between half and one and a half of it.
		if tries, took, err := run(t.Context()); tries != 6 || took < 3100*time.Millisecond || took > 9300*time.Millisecond || err == nil {
			t.Errorf("%d tries in %v, %v", tries, took, err)
		}
		fail = func() error { return io.EOF }
		if tries, took, err := run(t.Context()); tries != 1 || took != 0 || err != io.EOF {
			t.Errorf("not transient: %d tries in %v, %v", tries, took, err)
		}
	})
}

func TestRootDoesNotMove(t *testing.T) {
	c := newContent(1, 1000)
	f := newFake(t, c)
	src := f.open(t, Options{})
	first, _, err := src.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() { f.manifest = newContent(2, 10).manifest })
	f.requests()
	second, _, err := src.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(first, second); d != "" {
		t.Error(d)
	}
	if _, err := src.Manifest(t.Context(), first); err != nil {
		t.Error(err)
	}
	if l := f.requests(); len(l) > 0 {
		t.Errorf("asked again for what it has: %v", l)
	}
}

func TestAuthorizationForAddressOnSameHost(t *testing.T) {
	// Some registries redirect to another path of their own, which wants the token too.
	c := newContent(1, 1000)
	f := startFake(t, c, func(s *httptest.Server) {
		inner := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/v2/r/blobs/") && r.URL.RawQuery == "" && r.Header.Get("Authorization") != "" {
				w.Header().Set("Location", r.URL.Path+"?here")
				w.WriteHeader(http.StatusFound)
				return
			}
			inner.ServeHTTP(w, r)
		})
		s.Start()
	})
	f.token = "x"
	src := f.open(t, Options{})
	for range 2 {
		if got, err := readAll(t.Context(), src.Blob(c.layers[0]), 1, 10); err != nil || len(got) != 10 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
}
