package rootfs

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/pack"
)

func TestNewestPack(t *testing.T) {
	hash := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	d := func(digest, size, made string) v1.Descriptor {
		return v1.Descriptor{Annotations: map[string]string{pack.DigestAnnotation: digest, pack.SizeAnnotation: size, pack.MadeAnnotation: made}}
	}
	from := func(d v1.Descriptor, origin string) v1.Descriptor {
		d.Annotations[pack.OriginAnnotation] = origin
		return d
	}
	for _, c := range []struct {
		what string
		list []v1.Descriptor
		want string // the first letter of the digest
	}{
		{"none", nil, ""},
		{"nothing that can be read", []v1.Descriptor{{}, d("sha256:short", "1", ""), d(hash("a"), "", ""), d(hash("a"), "0", ""), d(hash("a"), "-1", ""),
			d(hash("a"), "17179869185", ""), d(hash("a"), "1e3", "")}, ""},
		{"one without a time", []v1.Descriptor{d(hash("a"), "10", "")}, "a"},
		{"a time before none", []v1.Descriptor{d(hash("a"), "10", "zzzz"), d(hash("b"), "10", "1999-01-01T00:00:00Z")}, "b"},
		{"the newest", []v1.Descriptor{d(hash("a"), "10", "2026-01-02T00:00:00Z"), d(hash("b"), "10", "2026-01-03T00:00:00Z"), d(hash("c"), "10", "2026-01-01T00:00:00Z")}, "b"},
		{"by time, not by text", []v1.Descriptor{d(hash("a"), "10", "2026-01-02T00:00:00Z"), d(hash("b"), "10", "2026-01-01T23:30:00-02:00")}, "b"},
		{"recorded before given before guessed", []v1.Descriptor{from(d(hash("a"), "10", "2026-01-03T00:00:00Z"), pack.OriginClosure),
			d(hash("b"), "10", "2026-01-01T00:00:00Z"), from(d(hash("c"), "10", "2026-01-02T00:00:00Z"), pack.OriginProfile)}, "b"},
		{"given before guessed", []v1.Descriptor{from(d(hash("a"), "10", ""), pack.OriginProfile), from(d(hash("b"), "10", "2026-01-03T00:00:00Z"), "later/2")}, "a"},
		{"guessed before none", []v1.Descriptor{{}, from(d(hash("a"), "10", ""), pack.OriginClosure)}, "a"},
		{"of the same second the first", []v1.Descriptor{d(hash("a"), "10", "2026-01-02T00:00:00Z"), d(hash("b"), "10", "2026-01-02T00:00:00Z")}, "a"},
	} {
		got, rank := newestPack(c.list)
		ok := rank != noPack
		if ok != (c.want != "") || ok && (got.Digest.Hex[:1] != c.want || got.Size != 10) {
			t.Errorf("%s: %v, %v", c.what, got, ok)
		}
	}
}

// An endless reads for ever and counts.
type endless struct{ n int }

func (e *endless) Read(p []byte) (int, error) { e.n += len(p); return len(p), nil }
func (e *endless) Close() error               { return nil }

func TestReadAhead(t *testing.T) {
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	broken := errors.New("broken")
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"as it comes": func(r io.Reader) io.Reader { return r },
		"in halves":   iotest.HalfReader,
		"breaks":      func(r io.Reader) io.Reader { return io.MultiReader(r, iotest.ErrReader(broken)) },
	} {
		r := readAhead(io.NopCloser(wrap(bytes.NewReader(data))))
		got, err := io.ReadAll(iotest.HalfReader(r))
		if !bytes.Equal(got, data) || (name == "breaks") != errors.Is(err, broken) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Error(err)
		}
	}
	// It stops when enough is here, goes on when that is read, and ends at Close.
	synctest.Test(t, func(t *testing.T) {
		e := new(endless)
		r := readAhead(e)
		for range 3 {
			synctest.Wait()
			if r.bytes < maxAhead || r.bytes > maxAhead+aheadBlock {
				t.Errorf("%d bytes are held", r.bytes)
			}
			if _, err := io.CopyN(io.Discard, r, 1<<20); err != nil {
				t.Error(err)
			}
		}
		r.Close()
		if e.n > maxAhead+4<<20 {
			t.Errorf("%d bytes were read", e.n)
		}
	})
}
