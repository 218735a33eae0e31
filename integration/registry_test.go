package integration

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"strings"
	"testing"

	"lazuli/integration/worst"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestRegistry(t *testing.T) {
	layout := t.TempDir()
	_, err := worst.Write(layout, worst.Options{})
	must(t, err)
	for _, test := range []struct {
		name string
		o    RegistryOptions
	}{
		{"plain", RegistryOptions{}},
		{"basic", RegistryOptions{User: "u", Password: "p"}},
		{"bearer, TLS", RegistryOptions{User: "u", Password: "p", Bearer: true, TLS: true}},
		{"distribution", RegistryOptions{Distribution: true}},
		{"distribution, bearer, TLS", RegistryOptions{Distribution: true, User: "u", Password: "p", Bearer: true, TLS: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := NewRegistry(t, test.o)
			ref := r.Push(t, layout, "some/worst")
			if n, _ := r.Traffic(); n == 0 {
				t.Error("pushing is not in the log")
			}
			r.Reset()

			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(r.CA)
			transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
			opts := []remote.Option{remote.WithTransport(transport)}
			parsed, err := name.ParseReference(ref)
			must(t, err)
			if test.o.User != "" {
				if _, err := remote.Image(parsed, opts...); err == nil {
					t.Error("pulled without a password")
				}
				opts = append(opts, remote.WithAuth(&authn.Basic{Username: "u", Password: "p"}))
			}
			img, err := remote.Image(parsed, opts...)
			must(t, err)
			layers, err := img.Layers()
			must(t, err)
			digest, err := layers[0].Digest()
			must(t, err)
			size, err := layers[0].Size()
			must(t, err)
			r.Reset()
			blob, err := layers[0].Compressed()
			must(t, err)
			n, err := io.Copy(io.Discard, blob)
			must(t, err)
			must(t, blob.Close())
			want := Request{Method: "GET", Path: "/v2/some/worst/blobs/" + digest.String(), Status: 200, Bytes: size}
			if log := r.Log(); len(log) != 1 || log[0] != want || n != size {
				t.Errorf("read %d bytes, log %+v, want %+v", n, log, want)
			}

			// A range, by hand.
			r.Reset()
			scheme := "http://"
			if test.o.TLS {
				scheme = "https://"
			}
			req, err := http.NewRequest("GET", scheme+r.Addr+want.Path, nil)
			must(t, err)
			req.Header.Set("Range", "bytes=10-109")
			if test.o.Bearer {
				req.Header.Set("Authorization", "Bearer "+r.token)
			} else if test.o.User != "" {
				req.SetBasicAuth("u", "p")
			}
			resp, err := transport.RoundTrip(req)
			must(t, err)
			b, err := io.ReadAll(resp.Body)
			must(t, err)
			resp.Body.Close()
			want.Range, want.Status, want.Bytes = "bytes=10-109", 206, 100
			if log := r.Log(); len(log) != 1 || log[0] != want || len(b) != 100 {
				t.Errorf("read %d bytes, log %+v, want %+v", len(b), log, want)
			}
			if test.o.TLS {
				if _, err := http.Get(scheme + r.Addr); err == nil || !strings.Contains(err.Error(), "certificate") {
					t.Errorf("the certificate is trusted by everybody: %v", err)
				}
			}
		})
	}
}
