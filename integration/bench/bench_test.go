package main

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func TestParseLink(t *testing.T) {
	for s, want := range map[string]link{
		"bare":      {Name: "bare"},
		"20ms,1000": {"20ms,1000", 20 * time.Millisecond, 1000},
		"0s,2.5":    {"0s,2.5", 0, 2.5},
	} {
		if got, err := parseLink(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "20,1000", "20ms", "20ms,-1", "-1ms,5", "20ms,1000,3"} {
		if l, err := parseLink(s); err == nil {
			t.Errorf("%q: %+v", s, l)
		}
	}
}

// TestOnWire: 64 KiB that the kernel hands over at once take as long as the segments that they stand for.
func TestOnWire(t *testing.T) {
	packet := func(size, segment int) []byte {
		b := make([]byte, offloadHeader+size)
		if segment > 0 {
			b[1] = 1
			binary.NativeEndian.PutUint16(b[4:], uint16(segment))
		}
		return b
	}
	if got, want := onWire(packet(ipAndTCP+10*1448, 1448)), 10*(ethernet+ipAndTCP+1448); got != want {
		t.Errorf("ten segments: %d bytes, want %d", got, want)
	}
	if got, want := onWire(packet(ipAndTCP+1448+1, 1448)), 2*(ethernet+ipAndTCP)+1449; got != want {
		t.Errorf("a segment and a byte: %d bytes, want %d", got, want)
	}
	if got, want := onWire(packet(ipAndTCP, 0)), ethernet+ipAndTCP; got != want {
		t.Errorf("an acknowledgement: %d bytes, want %d", got, want)
	}
}

// TestLineClock: lines count when their ends come, in whatever pieces.
func TestLineClock(t *testing.T) {
	c := &lineClock{ready: "READY"}
	for _, step := range []struct {
		text               string
		first, ready, done bool
	}{
		{"STA", false, false, false},
		{"RT not READY\nREA", true, false, false},
		{"DY 1\nDO", true, true, false},
		{"NE\n", true, true, true},
	} {
		if n, err := c.Write([]byte(step.text)); n != len(step.text) || err != nil {
			t.Fatal(n, err)
		}
		if !c.first.IsZero() != step.first || !c.readyAt.IsZero() != step.ready || c.done != step.done {
			t.Errorf("after %q: %+v", step.text, c)
		}
	}
}

// TestReport: runs that do not count are said to exist, and are in no number.
func TestReport(t *testing.T) {
	p := &plan{Images: []image{{Name: "py"}}, Links: []link{{Name: "bare"}}, Runs: 4, Modes: []string{cold}, Out: t.TempDir()}
	r, err := newReport(p, []*system{systemOf("lazuli"), systemOf("stargz"), systemOf("overlayfs")})
	if err != nil {
		t.Fatal(err)
	}
	for _, ready := range []float64{4, 2, 3} {
		if err := r.add(&Run{Image: "py", Link: "bare", Mode: cold, System: "lazuli", Ready: ready, Exit: 5}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, run := range []*Run{
		{System: "lazuli", Ready: 77, Void: "not cold"},
		{System: "stargz", Ready: 6},
		{System: "overlayfs", Ready: 88, Void: "it took longer"},
	} {
		run.Image, run.Link, run.Mode = "py", "bare", cold
		if err := r.add(run, nil); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	if err := r.print(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3, 1 void", "3.00 (2.00–4.00)", "0.50", "missed\n", "no run counts"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	if picture := string(r.picture()); strings.Contains(text.String(), "77") || !strings.Contains(picture, ">3.00<") {
		t.Errorf("%s\n%s", text.String(), picture)
	}
}

// TestRebuild: two files of a hundred are others in the next build, in the largest layer, and that is all; and it is the same each time.
func TestRebuild(t *testing.T) {
	layer := func(n, size int) v1.Layer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range n {
			content := make([]byte, size)
			rand.NewChaCha8([32]byte{byte(i), byte(size)}).Read(content)
			h := &tar.Header{Name: fmt.Sprintf("%d/%d.py", size, i), Mode: 0o640, Size: int64(size), ModTime: time.Unix(5, 0)}
			if err := errors.Join(w.WriteHeader(h), errorOf(w.Write(content))); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	img, err := mutate.AppendLayers(empty.Image, layer(60, 100), layer(40, 1000))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	to, err := layout.Write(dir+"/old", empty.Index)
	if err := errors.Join(err, to.AppendImage(img), rebuild(t.Context(), nil, image{Dir: dir + "/old"}, dir+"/new"), rebuild(t.Context(), nil, image{Dir: dir + "/old"}, dir+"/same")); err != nil {
		t.Fatal(err)
	}
	files := func(dir string) (digest v1.Hash, list map[string]string) {
		img, err := openLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(img); err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		list = map[string]string{}
		for _, l := range layers {
			if err := entries(l, func(h *tar.Header, r io.Reader) error {
				b, err := io.ReadAll(r)
				list[fmt.Sprintf("%s %o %v", h.Name, h.Mode, h.ModTime.Unix())] = string(b)
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		digest, err = img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return digest, list
	}
	_, old := files(dir + "/old")
	digest, list := files(dir + "/new")
	if same, _ := files(dir + "/same"); same != digest {
		t.Errorf("built twice, %v and %v", digest, same)
	}
	changed := 0
	for name, content := range list {
		was, ok := old[name]
		if !ok {
			t.Errorf("%s was not there", name)
		}
		if content != was {
			changed++
		}
	}
	if len(list) != 100 || changed != 2 {
		t.Errorf("%d files, %d changed; want 100 and 2", len(list), changed)
	}
}

func errorOf(_ int, err error) error { return err }

// TestChange: what Python compares stays as it was.
func TestChange(t *testing.T) {
	for _, c := range [][3]string{{"a.py", "x = 1\n", "x = 1 "}, {"a.pyc", "\x00", "\x00\n"}, {"a.so", "\x7fELF", "\x7fELF\n"}, {"a", "b\n", "b\n\n"}} {
		if got := string(change(c[0], []byte(c[1]))); got != c[2] {
			t.Errorf("%s: %q became %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

// TestPackUse: chunks count when the member that they are in was fetched.
func TestPackUse(t *testing.T) {
	p := &startupPack{needed: 7, chunks: 100, places: map[string][]int64{"sha256:aa": {0, 10, 10, 20, 30}}}
	got := p.use([]request{
		{Path: "/v2/x/blobs/sha256:aa", Range: "bytes=10-29"},
		{Path: "/v2/x/blobs/sha256:aa", Range: "bytes=40-99"}, // the table of contents
		{Path: "/v2/x/blobs/sha256:bb", Range: "bytes=0-99"},
		{Path: "/v2/x/blobs/sha256:aa"},
	})
	if want := (packUse{7, 100, 3}); *got != want {
		t.Errorf("%+v, want %+v", *got, want)
	}
}

func TestParseModes(t *testing.T) {
	if got, err := parseModes("second density,cold"); err != nil || strings.Join(got, " ") != "second read5 read10 read25 read50 read100 cold" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseModes("cold warm"); err == nil {
		t.Error(got)
	}
	if share(read+"25") != 25 || share(second) != 0 {
		t.Error(share(read+"25"), share(second))
	}
}
