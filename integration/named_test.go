package integration

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lazuli/convert"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
)

// A packServer stands before a registry and answers for one blob as a test wants it.
type packServer struct {
	mu     sync.Mutex
	blob   string
	answer func(w http.ResponseWriter, q *http.Request, whole []byte)
}

func (s *packServer) set(blob string, answer func(http.ResponseWriter, *http.Request, []byte)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blob, s.answer = blob, answer
}

func (s *packServer) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		s.mu.Lock()
		blob, answer := s.blob, s.answer
		s.mu.Unlock()
		if answer == nil || q.Method != "GET" || !strings.HasSuffix(q.URL.Path, blob) {
			next.ServeHTTP(w, q)
			return
		}
		a := &answerTo{header: http.Header{}}
		whole := q.Clone(q.Context())
		whole.Header.Del("Range")
		next.ServeHTTP(a, whole)
		answer(w, q, a.body.Bytes())
	})
}

type answerTo struct {
	header http.Header
	body   bytes.Buffer
}

func (a *answerTo) Header() http.Header         { return a.header }
func (a *answerTo) WriteHeader(int)             {}
func (a *answerTo) Write(p []byte) (int, error) { return a.body.Write(p) }

// serveBytes answers a request for a blob, or a range of it, with other bytes than it has.
func serveBytes(change func(b []byte) []byte) func(http.ResponseWriter, *http.Request, []byte) {
	return func(w http.ResponseWriter, q *http.Request, whole []byte) {
		http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(change(bytes.Clone(whole))))
	}
}

// TestNamedPack: of an image whose manifest names its pack a node that holds nothing fetches the manifest and the pack; and if the pack
// is wrong, late or gone, what it lacks, as if none had been named.
func TestNamedPack(t *testing.T) {
	needRoot(t)
	s := new(packServer)
	r := apiRegistry(t, s.wrap)
	c := newCLI(t)
	lazy, want := packImage(t, 30, 1)
	recorded := c.dir + "/p"
	c.ok("profile", "--until", "READY", "-o", recorded, r.Push(t, lazy, "recorded"))
	text, err := os.ReadFile(recorded)
	must(t, err)
	pieces, err := profile.Parse(bytes.NewReader(text))
	must(t, err)
	names, err := convert.ParseProfile(bytes.NewReader(text))
	must(t, err)
	named, err := convert.Image(t.Context(), parse(t, "oci:"+lazy), parse(t, r.Addr+"/app:1"), convert.Options{Pieces: pieces, Profile: names})
	must(t, err)
	if len(named.Packs) != 1 || len(named.Warnings) > 0 {
		t.Fatalf("%+v", named)
	}
	ref := fmt.Sprintf("%s/app@%v", r.Addr, named.Digest)
	blob := named.Packs[0].Digest.String()
	layers := layerDigests(t, lazy)
	stopped := make(chan struct{})
	t.Cleanup(func() { close(stopped) })
	index := func(b []byte) *pack.Index {
		x, err := pack.ReadIndex(bytes.NewReader(b))
		if err != nil {
			t.Error(err)
		}
		return x
	}
	own := map[string]int{"config": 1, "layers": len(layers)} // what is asked for if the pack has no tables
	for _, test := range []struct {
		name   string
		answer func(http.ResponseWriter, *http.Request, []byte)
		want   map[string]int // least requests beside the manifest and the pack
		exact  bool           // and the only ones, but for reads that came before the pack did
	}{
		{"good", nil, nil, true},
		{"no tables of this image", serveBytes(func(b []byte) []byte {
			for i := range index(b).Tables {
				b[24+40*i]++ // their digests
			}
			return b
		}), own, true},
		{"flipped tables", serveBytes(func(b []byte) []byte {
			at := index(b).Start
			for _, x := range index(b).Tables {
				b[at+x.Size/2]++
				at += x.Size
			}
			return b
		}), own, true},
		{"one flipped table", serveBytes(func(b []byte) []byte {
			x := index(b)
			b[x.Start+x.Tables[0].Size+x.Tables[1].Size/2]++
			return b
		}), map[string]int{"layers": 1}, true},
		{"junk", serveBytes(func(b []byte) []byte { return noise(5, len(b)) }), own, false},
		{"breaks in the first table", func(w http.ResponseWriter, _ *http.Request, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			w.Write(b[:index(b).Start+10])
			panic(http.ErrAbortHandler)
		}, own, false},
		{"stalls", func(w http.ResponseWriter, q *http.Request, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			w.Write(b[:index(b).Start+10])
			w.(interface{ Unwrap() http.ResponseWriter }).Unwrap().(http.Flusher).Flush()
			select {
			case <-q.Context().Done():
			case <-stopped:
			}
		}, own, false},
		{"does not answer", func(w http.ResponseWriter, q *http.Request, b []byte) {
			select {
			case <-q.Context().Done():
			case <-stopped:
			}
		}, own, false},
		{"is gone", func(w http.ResponseWriter, q *http.Request, b []byte) { http.Error(w, "{}", http.StatusNotFound) },
			map[string]int{"config": 1, "layers": len(layers), "referrers": 1, "tag": 1}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.set(blob, test.answer)
			const tries = 6
			for try := 1; ; try++ {
				c.cold()
				r.Reset()
				if out := c.ok("run", ref); out != want {
					t.Fatalf("output:\n%s\nwant:\n%s", out, want)
				}
				got := requests(r.Log(), layers)
				packs := 0
				for _, q := range r.Log() {
					if strings.HasSuffix(q.Path, blob) {
						packs++
					}
				}
				if got["config"] = got["blobs"] - packs; got["manifests"] != 1 || packs == 0 || test.answer == nil && packs != 1 {
					t.Fatalf("%d manifests, %d times the pack: %v", got["manifests"], packs, r.Log())
				}
				more := got["layers"] - test.want["layers"]
				for kind, n := range map[string]int{"config": 0, "referrers": 0, "tag": 0} {
					if n = test.want[kind]; got[kind] != n {
						t.Fatalf("%d requests for %s, want %d: %v", got[kind], kind, n, r.Log())
					}
				}
				if more < 0 {
					t.Fatalf("%d requests for layers, want %d: %v", got["layers"], test.want["layers"], r.Log())
				}
				if !test.exact || more == 0 {
					break
				}
				if try == tries { // reads do not wait long for a pack, so on a busy machine some may be before it
					t.Fatalf("%d requests for layers in each of %d starts, want %d: %v", got["layers"], tries, test.want["layers"], r.Log())
				}
			}
		})
	}
	t.Run("a layout", func(t *testing.T) {
		dir := c.dir + "/named"
		_, err := convert.Image(t.Context(), parse(t, ref), parse(t, "oci:"+dir), convert.Options{Remote: remote.Options{}})
		must(t, err)
		c.cold()
		if out := c.ok("run", "oci:"+dir); out != want {
			t.Errorf("output:\n%s", out)
		}
	})
}

// TestGuessGivesWay: what the converter sees that the command needs is the image's pack until there is one that was recorded, of the image
// or of an earlier build.
func TestGuessGivesWay(t *testing.T) {
	needRoot(t)
	packRegistries(t, func(t *testing.T, r *Registry, api bool) {
		c := newCLI(t)
		var guessed [2]string
		var refs, wants [2]string
		for i := range refs {
			var lazy string
			lazy, wants[i] = packImage(t, 31, i)
			refs[i] = fmt.Sprintf("%s/guess:%d", r.Addr, i)
			result, err := convert.Image(t.Context(), parse(t, "oci:"+lazy), parse(t, refs[i]), convert.Options{})
			must(t, err)
			if len(result.Packs) != 1 || result.Packs[0].Origin != pack.OriginClosure || len(result.Warnings) > 0 {
				t.Fatalf("%+v", result)
			}
			guessed[i] = result.Packs[0].Digest.String()
		}
		start := func(i int) (blobs []string) {
			c.cold()
			r.Reset()
			if out := c.ok("run", refs[i]); out != wants[i] {
				t.Errorf("output:\n%s\nwant:\n%s", out, wants[i])
			}
			for _, q := range r.Log() {
				if q.Method == "GET" && strings.Contains(q.Path, "/blobs/") {
					blobs = append(blobs, q.Path[strings.LastIndex(q.Path, "/")+1:])
				}
			}
			return blobs
		}
		if blobs := start(1); !slices.Contains(blobs, guessed[1]) {
			t.Errorf("without another the guess %s is not taken: %v", guessed[1], blobs)
		}
		out := strings.TrimSpace(c.ok("profile", "--until", "READY", "--push", refs[0]))
		artifact, err := remote.Open(t.Context(), parse(t, r.Addr+"/guess@"+out[strings.LastIndexByte(out, '\n')+1:]), remote.Options{})
		must(t, err)
		defer artifact.Close()
		img, err := remote.Pick(t.Context(), artifact, nil)
		must(t, err)
		better := img.Layers[0].Digest.String()
		for i := range refs {
			if blobs := start(i); !slices.Contains(blobs, better) || slices.Contains(blobs, guessed[i]) {
				t.Errorf("build %d: the recorded pack %s was not taken, or the guess %s was: %v", i, better, guessed[i], blobs)
			}
		}
	})
}
