package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const testType = "application/vnd.example.pack"

var testSubject = v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("ab", 32)}

// A listing is a registry that knows nothing but lists of referrers.
type listing struct {
	api, tag http.HandlerFunc // nil answers 404

	mu   sync.Mutex
	asks []string
}

func (l *listing) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	l.mu.Lock()
	l.asks = append(l.asks, req.URL.Path)
	l.mu.Unlock()
	h := map[string]http.HandlerFunc{
		"/v2/r/referrers/" + testSubject.String():   l.api,
		"/v2/r/manifests/sha256-" + testSubject.Hex: l.tag,
	}[req.URL.Path]
	if h == nil {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
		return
	}
	h(w, req)
}

// list answers with an index of artifacts of a type, called so.
func list(artifactType string, names ...string) http.HandlerFunc {
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}}
	for _, n := range names {
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType: types.OCIManifestSchema1, Digest: sum([]byte(n)), Size: 1, ArtifactType: artifactType, Annotations: map[string]string{"name": n},
		})
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		json.NewEncoder(w).Encode(index)
	}
}

func says(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

func (l *listing) open(t *testing.T) Source {
	t.Helper()
	server := httptest.NewServer(l)
	t.Cleanup(server.Close)
	ref, err := ParseReference(server.Listener.Addr().String() + "/r:t")
	if err != nil {
		t.Fatal(err)
	}
	tr := sharedTransport().Clone()
	t.Cleanup(tr.CloseIdleConnections)
	src, err := Open(t.Context(), ref, Options{Transport: tr, Keychain: &login{}})
	if err != nil {
		t.Fatal(err)
	}
	src.(*registry).patience = impatient
	return src
}

func TestReferrers(t *testing.T) {
	bad := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"schemaVersion":2,"manifests":[{"artifactType":%q,"digest":"md5:00"},{"artifactType":%q,"digest":%q,"annotations":{"name":"good"}}]}`,
			testType, testType, sum([]byte("good")))
	}
	for name, c := range map[string]struct {
		api, tag http.HandlerFunc
		want     []string
		err      string
	}{
		"API":                      {api: list(testType, "a", "b"), want: []string{"a", "b"}},
		"API, empty":               {api: list(testType)},
		"tag":                      {tag: list(testType, "a", "b"), want: []string{"a", "b"}},
		"both":                     {api: list(testType, "a", "b"), tag: list(testType, "b", "c"), want: []string{"a", "b", "c"}},
		"none":                     {},
		"other types":              {api: list("application/vnd.other", "a"), tag: list("", "b")},
		"no API, says 400":         {api: says(400, "?"), tag: list(testType, "a"), want: []string{"a"}},
		"no API, says 405":         {api: says(405, "")},
		"no API, says 501":         {api: says(501, "")},
		"a page for people":        {api: says(200, "<html>"), tag: says(200, "<html>")},
		"the tag is something":     {tag: says(200, `{"schemaVersion":2,"config":{},"layers":[]}`)},
		"not a list":               {tag: says(200, `{"manifests":"all"}`)},
		"a digest is none":         {api: bad, want: []string{"good"}},
		"API out, found by tag":    {api: says(503, ""), tag: list(testType, "a"), want: []string{"a"}},
		"API denies, found by tag": {api: says(403, ""), tag: list(testType, "a"), want: []string{"a"}},
		"API out, no tag":          {api: says(503, ""), err: "503"},
		"tag out":                  {tag: says(503, ""), err: "503"},
		"denied":                   {api: says(403, ""), tag: says(403, ""), err: "403"},
	} {
		t.Run(name, func(t *testing.T) {
			l := &listing{api: c.api, tag: c.tag}
			found, err := Referrers(t.Context(), l.open(t), testSubject, testType)
			var names []string
			for _, d := range found {
				names = append(names, d.Annotations["name"])
			}
			slices.Sort(names)
			if !slices.Equal(names, c.want) {
				t.Errorf("found %q, want %q", names, c.want)
			}
			if c.err == "" && err != nil {
				t.Error(err)
			} else if c.err != "" {
				wantError(t, err, c.err)
			}
			if outage := strings.Contains(name, "out"); !outage && len(l.asks) != 2 {
				t.Errorf("%d requests: %q", len(l.asks), l.asks)
			}
		})
	}
}

// Both lists are asked for at once, so that they cost one round trip.
func TestReferrersSideBySide(t *testing.T) {
	var both sync.WaitGroup
	both.Add(2)
	wait := func(w http.ResponseWriter, _ *http.Request) {
		both.Done()
		both.Wait()
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
	}
	l := &listing{api: wait, tag: wait}
	if found, err := Referrers(t.Context(), l.open(t), testSubject, testType); err != nil || len(found) > 0 {
		t.Error(found, err)
	}
}

func TestReferrersEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l := &listing{api: func(_ http.ResponseWriter, req *http.Request) { cancel(); <-req.Context().Done() }}
	if _, err := Referrers(ctx, l.open(t), testSubject, testType); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	l = &listing{}
	for _, h := range []v1.Hash{{}, {Algorithm: "sha256", Hex: "../../x"}, {Algorithm: "sha512", Hex: strings.Repeat("ab", 64)}} {
		if _, err := Referrers(t.Context(), l.open(t), h, testType); err == nil || len(l.asks) > 0 {
			t.Errorf("%v: %v, %q", h, err, l.asks)
		}
	}
}
