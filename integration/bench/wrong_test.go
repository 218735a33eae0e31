package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"lazuli/fs/pack"
)

// TestPaced: what comes of a blob, and of a range of it, before it stops or breaks.
func TestPaced(t *testing.T) {
	data := []byte(strings.Repeat("0123456789", 10))
	for name, c := range map[string]struct {
		p     pace
		from  string // of a range
		want  string
		stops bool // and does not end
		err   bool
	}{
		"whole":                  {p: pace{cut: 100, slow: 100}, want: string(data)},
		"a range":                {p: pace{cut: 100, slow: 100}, from: "95", want: "56789"},
		"truncated":              {p: pace{cut: 33, slow: 100}, want: string(data[:33]), err: true},
		"a range of the missing": {p: pace{cut: 33, slow: 100}, from: "40", err: true},
		"stalled":                {p: pace{cut: 100, slow: 12}, want: string(data[:12]), stops: true},
		"slow":                   {p: pace{cut: 100, rate: 5000}, from: "70", want: string(data[70:])},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(inMemory(data).handler(c.p))
			defer server.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			q, err := http.NewRequestWithContext(ctx, "GET", server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.from != "" {
				q.Header.Set("Range", "bytes="+c.from+"-")
			}
			r, err := http.DefaultClient.Do(q)
			if err != nil {
				if !c.err || c.want != "" {
					t.Error(err)
				}
				return
			}
			defer r.Body.Close()
			got := make([]byte, len(c.want))
			if _, err := io.ReadFull(r.Body, got); err != nil || string(got) != c.want {
				t.Errorf("%q, %v; want %q", got, err, c.want)
			}
			if c.stops {
				cancel() // nothing more would come
			}
			if n, err := io.Copy(io.Discard, r.Body); n > 0 || (err != nil) != (c.err || c.stops) {
				t.Errorf("then %d bytes, %v", n, err)
			}
		})
	}
	r := httptest.NewRecorder()
	inMemory(data).handler(pace{refuse: true}).ServeHTTP(r, httptest.NewRequest("GET", "/", nil))
	if r.Code != http.StatusInternalServerError {
		t.Errorf("refused with %d", r.Code)
	}
}

// TestLarge: the bytes of a large pack are those that its index says.
func TestLarge(t *testing.T) {
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString("abcdefg"); err != nil {
		t.Fatal(err)
	}
	once, padded, repeated := largeFrame{from: 0, data: 3}, largeFrame{from: 3, data: 2, pad: true}, largeFrame{from: 5, data: 2}
	once.set(pack.Chunk{Object: 1, Size: 3})
	padded.set(pack.Chunk{Object: 2, Size: 2}, pack.Chunk{Object: ^uint64(2), Size: 2})
	repeated.set(pack.Chunk{Object: 3, Size: 2}, pack.Chunk{Object: 3, Size: 2}, pack.Chunk{Object: 3, Size: 2})
	g := &large{file: file, frames: []largeFrame{once, padded, repeated}}
	s, err := g.section()
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	if _, err := io.Copy(&all, struct{ io.Reader }{io.NewSectionReader(s, 0, s.size)}); err != nil {
		t.Fatal(err)
	}
	x, err := pack.ReadIndex(&all)
	if err != nil {
		t.Fatal(err)
	}
	if len(x.Frames) != 3 || x.Frames[1].Chunks[1].Object != ^uint64(2) || x.Size != s.size {
		t.Errorf("%+v", x)
	}
	if want := "abcde\x00\x00fgfgfg"; all.String() != want {
		t.Errorf("%q, want %q", all.String(), want)
	}
}

// TestWrongFits: wrong packs have a mode of their own, in which nothing else is measured.
func TestWrongFits(t *testing.T) {
	for _, s := range systems {
		if s.fits(wrong) != (s.form.wrong != nil) || s.fits(cold) == s.fits(wrong) {
			t.Error(s.Name, s.fits(wrong), s.fits(cold))
		}
	}
}
