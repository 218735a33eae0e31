package registry

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func serve(t *testing.T, dir string) (host string, stop func()) {
	t.Helper()
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(r)
	stop = func() { s.Close(); r.Close() }
	t.Cleanup(stop)
	return strings.TrimPrefix(s.URL, "http://"), stop
}

// What was pushed is there after a restart: an index in an index, tags, blobs.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	host, stop := serve(t, dir)
	inner, err := random.Index(2000, 2, 2)
	if err != nil {
		t.Fatal(err)
	}
	idx := mutate.AppendManifests(inner, mutate.IndexAddendum{Add: inner})
	if err := remote.WriteIndex(parse(t, host+"/a/b:one"), idx); err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(100_000, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(parse(t, host+"/a:two"), img); err != nil {
		t.Fatal(err)
	}
	stop()

	host, _ = serve(t, dir)
	got, err := remote.Index(parse(t, host+"/a/b:one"))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(got); err != nil {
		t.Error(err)
	}
	gotImg, err := remote.Image(parse(t, host+"/a:two"))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(gotImg); err != nil {
		t.Error(err)
	}
	want, _ := img.Digest()
	if d, _ := gotImg.Digest(); d != want {
		t.Errorf("digest %v, want %v", d, want)
	}
	tags, err := remote.List(parse(t, host+"/a:x").Context())
	if d := cmp.Diff([]string{"two"}, tags); d != "" || err != nil {
		t.Errorf("tags: %v\n%s", err, d)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a second registry opened the directory")
	}
}

func parse(t *testing.T, s string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(s, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestBlob(t *testing.T) {
	dir := t.TempDir()
	host, _ := serve(t, dir)
	base := "http://" + host + "/v2/repo/blobs/"
	content := []byte("0123456789")
	sum, _, _ := v1.SHA256(bytes.NewReader(content))

	do := func(method, url, ranges string, body []byte) (int, string, http.Header) {
		t.Helper()
		req, err := http.NewRequest(method, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if ranges != "" {
			req.Header.Set("Range", ranges)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b), resp.Header
	}
	begin := func() string {
		code, _, h := do("POST", base+"uploads/", "", nil)
		if code != 202 {
			t.Fatalf("POST: %d", code)
		}
		return "http://" + host + h.Get("Location")
	}

	up := begin()
	if code, _, h := do("PATCH", up, "", content[:4]); code != 202 || h.Get("Range") != "0-3" {
		t.Errorf("PATCH: %d %v", code, h)
	}
	if code, _, _ := do("PUT", up+"?digest="+sum.String(), "", content[4:]); code != 201 {
		t.Errorf("PUT: %d", code)
	}
	for _, tt := range []struct {
		ranges string
		code   int
		body   string
	}{
		{"", 200, "0123456789"}, {"bytes=2-4", 206, "234"}, {"bytes=7-", 206, "789"},
		{"bytes=-3", 206, "789"}, {"bytes=8-100", 206, "89"}, {"bytes=10-", 416, "*"},
	} {
		code, body, _ := do("GET", base+sum.String(), tt.ranges, nil)
		if code != tt.code || (tt.body != "*" && body != tt.body) {
			t.Errorf("GET %s: %d %q, want %d %q", tt.ranges, code, body, tt.code, tt.body)
		}
	}
	if code, _, h := do("HEAD", base+sum.String(), "", nil); code != 200 || h.Get("Content-Length") != "10" {
		t.Errorf("HEAD: %d %v", code, h)
	}
	if code, _, _ := do("POST", base+"uploads/?mount="+sum.String()+"&from=other", "", nil); code != 201 {
		t.Errorf("mount: %d", code)
	}
	other, _, _ := v1.SHA256(strings.NewReader("x"))
	if code, body, _ := do("PUT", begin()+"?digest="+other.String(), "", content); code != 400 || !strings.Contains(body, "DIGEST_INVALID") {
		t.Errorf("wrong digest: %d %s", code, body)
	}
	if code, _, _ := do("GET", base+other.String(), "", nil); code != 404 {
		t.Errorf("unknown blob: %d", code)
	}
	if code, _, _ := do("PUT", "http://"+host+"/v2/repo/manifests/"+other.String(), "", []byte("{}")); code != 400 {
		t.Errorf("manifest under another digest: %d", code)
	}
	// No name leaves the directory.
	for _, p := range []string{"/v2/..%2f..%2fx/manifests/t", "/v2/a/manifests/..", "/v2/A/manifests/t", "/v2/a/_/manifests/t"} {
		if code, _, _ := do("PUT", "http://"+host+p, "", []byte("{}")); code < 400 {
			t.Errorf("PUT %s: %d", p, code)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "uploads", "*")); len(left) != 0 {
		t.Errorf("uploads left: %q", left)
	}
	entries, _ := os.ReadDir(filepath.Join(dir, "manifests"))
	if len(entries) != 0 {
		t.Errorf("manifests written: %v", entries)
	}
}

func TestLog(t *testing.T) {
	var buf bytes.Buffer
	h := Log(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "four") }), &buf)
	req := httptest.NewRequest("GET", "/v2/a/blobs/x", nil)
	req.Header.Set("Range", "bytes=1-2")
	h.ServeHTTP(httptest.NewRecorder(), req)
	if f := strings.Fields(buf.String()); len(f) != 7 || strings.Join(f[1:6], " ") != `GET /v2/a/blobs/x "bytes=1-2" 200 4` {
		t.Errorf("line %q", buf.String())
	}
}
