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
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	inprocess "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
)

// push puts an index of one image with n layers into a registry, and returns the image.
func push(t *testing.T, to string, n int64, opts ...ggcr.Option) v1.Image {
	t.Helper()
	img, err := random.Image(10_000, n)
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: platform("linux/amd64")}})
	ref, err := name.ParseReference(to)
	if err != nil {
		t.Fatal(err)
	}
	if err := ggcr.WriteIndex(ref, index, opts...); err != nil {
		t.Fatal(err)
	}
	return img
}

// compare reads every layer of an image whole and by ranges, and compares with what was pushed.
func compare(t *testing.T, src Source, pushed v1.Image) {
	t.Helper()
	img, err := Pick(t.Context(), src, platform("linux/amd64"))
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := pushed.Digest(); img.Digest != want {
		t.Fatalf("manifest %v, want %v", img.Digest, want)
	}
	if want, _ := pushed.RawConfigFile(); true {
		if _, got, err := img.Config(t.Context()); err != nil || !bytes.Equal(got, want) {
			t.Errorf("config %s, %v", got, err)
		}
	}
	layers, err := pushed.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		want, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ReadBlob(t.Context(), src, img.Layers[i].Descriptor, 1<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("layer %d: %d bytes, %v", i, len(got), err)
		}
		n := int64(len(want))
		for _, r := range [][2]int64{{0, 1}, {1, n - 1}, {n - 1, 1}, {n / 2, n / 3}} {
			if got, err := readAll(t.Context(), img.Layers[i].Blob, r[0], r[1]); err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
				t.Errorf("layer %d, range %v: %d bytes, %v", i, r, len(got), err)
			}
		}
	}
}

func TestInProcessRegistry(t *testing.T) {
	s := httptest.NewServer(inprocess.New(inprocess.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	host := s.Listener.Addr().String()
	pushed := push(t, host+"/a/b:c", 3)
	ref, err := ParseReference(host + "/a/b:c")
	if err != nil {
		t.Fatal(err)
	}
	src, err := Open(t.Context(), ref, Options{Keychain: &login{}})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, src, pushed)
	// Index, manifest and config; each layer whole and in four ranges.
	if n := src.Stats().Requests; n != 3+3*5 {
		t.Errorf("%d requests", n)
	}
}

// TestDistributionRegistry runs on the registry that most run: docker's, with TLS from a CA of our own and
// a password.
func TestDistributionRegistry(t *testing.T) {
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed: apt install docker-registry")
	}
	dir := t.TempDir()
	pool, key, cert := authority(t, dir)
	const htpasswd = "me:$2y$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n" // "secret"
	host := closedPort(t)
	config := fmt.Sprintf(`
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: %[1]s/data}}
http: {addr: %[2]s, tls: {certificate: %[3]s, key: %[4]s}}
auth: {htpasswd: {realm: test, path: %[1]s/htpasswd}}
`, dir, host, cert, key)
	for n, b := range map[string]string{"htpasswd": htpasswd, "config.yml": config} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(bin, "serve", filepath.Join(dir, "config.yml"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("docker-registry: %s", out.String())
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := net.Dial("tcp", host)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}

	tr := sharedTransport().Clone()
	tr.TLSClientConfig = &tls.Config{RootCAs: pool}
	defer tr.CloseIdleConnections()
	pushed := push(t, host+"/a/b:c", 3, ggcr.WithTransport(tr), ggcr.WithAuth(&authn.Basic{Username: "me", Password: "secret"}))

	// Credentials as docker login leaves them.
	home := filepath.Join(dir, "docker")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"username":"me","password":"secret"}}}`, host), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", home) // not the tester's own
	t.Setenv("DOCKER_CONFIG", home)
	open := func(ref string, opts Options) Source {
		t.Helper()
		r, err := ParseReference(host + ref)
		if err != nil {
			t.Fatal(err)
		}
		src, err := Open(t.Context(), r, opts)
		if err != nil {
			t.Fatal(err)
		}
		return src
	}
	src := open("/a/b:c", Options{Transport: tr})
	compare(t, src, pushed)
	if n := src.Stats().Requests; n != 1+3+3*5 { // one is refused
		t.Errorf("%d requests", n)
	}

	_, _, err = open("/a/b:missing", Options{Transport: tr}).Root(t.Context())
	wantError(t, err, "MANIFEST_UNKNOWN", "check the image's name")
	_, _, err = open("/missing:c", Options{Transport: tr}).Root(t.Context())
	wantError(t, err, "has no such repository")
	_, _, err = open("/a/b:c", Options{Transport: tr, Keychain: &login{user: "me", password: "guess"}}).Root(t.Context())
	wantError(t, err, "refuses access", "401", "me's", "docker login "+host)
	stranger := http.Transport{}
	defer stranger.CloseIdleConnections()
	_, _, err = open("/a/b:c", Options{Transport: &stranger}).Root(t.Context())
	wantError(t, err, "not trusted", "SSL_CERT_FILE")
}

// authority makes a CA and a certificate of it for 127.0.0.1.
func authority(t *testing.T, dir string) (pool *x509.CertPool, keyFile, certFile string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "registry"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	check(err)
	caCert, err := x509.ParseCertificate(caDER)
	check(err)
	pool = x509.NewCertPool()
	pool.AddCert(caCert)
	keyFile, certFile = filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	check(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	check(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return pool, keyFile, certFile
}

// Example reads the end of an image's last layer, where an eStargz layer has its footer.
func Example() {
	s := httptest.NewServer(inprocess.New(inprocess.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	to := strings.TrimPrefix(s.URL, "http://") + "/demo:1"
	img, _ := random.Image(1000, 2)
	tag, _ := name.ParseReference(to)
	if err := ggcr.Write(tag, img); err != nil {
		fmt.Println(err)
	}

	ref, err := ParseReference(to)
	if err != nil {
		fmt.Println(err)
	}
	ctx := context.Background()
	src, err := Open(ctx, ref, Options{})
	if err != nil {
		fmt.Println(err)
	}
	defer src.Close()
	picked, err := Pick(ctx, src, nil)
	if err != nil {
		fmt.Println(err)
	}
	last := picked.Layers[len(picked.Layers)-1]
	tail, err := last.Blob.Range(ctx, last.Size-51, 51)
	if err != nil {
		fmt.Println(err)
	}
	defer tail.Close()
	footer, _ := io.ReadAll(tail)
	fmt.Println(len(footer), "bytes in", src.Stats().Requests, "requests")
	// Output: 51 bytes in 2 requests
}
