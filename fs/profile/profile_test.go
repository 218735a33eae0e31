package profile

import (
	"bytes"
	gocmp "cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"lazuli/fs/toc"
)

func key(name string) toc.Digest { return sha256.Sum256([]byte(name)) }

// brief returns pieces as "path piece", in their order.
func brief(p *Profile) (list []string) {
	for _, x := range p.Pieces {
		list = append(list, fmt.Sprintf("%s %d", x.Path, x.Index))
	}
	return list
}

func TestFromTouches(t *testing.T) {
	const k = PieceSize
	paths := map[toc.Digest]string{key("a"): "a", key("b"): "dir/b"}
	p := FromTouches([]Touch{
		{key("b"), 3*k - 1, 2, 5 * time.Millisecond}, // the last byte of piece 2 and the first of 3
		{key("a"), 0, 1, 1500 * time.Microsecond},
		{key("a"), k, 0, time.Millisecond}, // nothing
		{key("a"), 0, k, 9 * time.Millisecond},
		{key("unknown"), 0, k, 0},
		{key("a"), k - 1, 1, 9 * time.Millisecond},
		{key("b"), 2 * k, 4 * k, 20 * time.Millisecond},
	}, paths)
	want := []Piece{
		{"a", 0, 1, 1.5},
		{"dir/b", 2, 1, 5}, {"dir/b", 3, 1, 5},
		{"dir/b", 4, 1, 20}, {"dir/b", 5, 1, 20},
	}
	if d := cmp.Diff(want, p.Pieces); d != "" {
		t.Error(d)
	}
	if p := FromTouches(nil, paths); len(p.Pieces) != 0 {
		t.Errorf("%v of nothing", p.Pieces)
	}
}

func TestMerge(t *testing.T) {
	old := &Profile{[]Piece{{"both", 0, 1, 10}, {"gone", 0, 0.9, 20}, {"faint", 0, 0.07, 30}, {"both", 1, 0.5, 90}}}
	newer := &Profile{[]Piece{{"new", 0, 1, 5}, {"both", 0, 1, 40}, {"both", 1, 1, 0}}}
	before := slices.Clone(old.Pieces)
	got := Merge(old, newer)
	want := []Piece{
		{"new", 0, 1. / 3, 5},
		{"both", 0, 1, 20},
		{"gone", 0, 0.6, 20},
		{"both", 1, 2. / 3, 60},
	}
	if d := cmp.Diff(want, got.Pieces, cmpopts.EquateApprox(1e-9, 0)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(before, old.Pieces); d != "" {
		t.Errorf("the old profile was changed: %s", d)
	}
	if got := Merge(nil, newer); !cmp.Equal(got, newer) {
		t.Errorf("with nothing: %v", got)
	}

	// What is touched in every run stays at 1, whatever is merged how often; what is not touched any more is forgotten.
	p := &Profile{[]Piece{{"always", 0, 1, 1}, {"once", 0, 1, 2}}}
	runs := 0
	for ; len(p.Pieces) > 1; runs++ {
		p = Merge(p, &Profile{[]Piece{{"always", 0, 1, 1}}})
		if s := p.Pieces[0].Share; s < 1-1e-9 || s > 1 {
			t.Fatalf("after %d runs a share of %v", runs, s)
		}
	}
	if runs != 8 || p.Pieces[0].Path != "always" { // (2/3)^8 < forget
		t.Errorf("forgotten after %d runs: %v", runs, p.Pieces)
	}
}

// chunks cuts a file into chunks of the given sizes; negative ones are holes.
func chunks(name string, sizes ...int64) (list []toc.Chunk) {
	at := int64(0)
	for i, n := range sizes {
		c := toc.Chunk{FileOffset: at, Size: max(n, -n), Hole: n < 0}
		if !c.Hole {
			c.Digest = key(fmt.Sprint(name, i))
		}
		list = append(list, c)
		at += c.Size
	}
	return list
}

func TestChunks(t *testing.T) {
	const k = PieceSize
	files := map[string][]toc.Chunk{
		"same":  chunks("same", k, k, 10),
		"small": chunks("small", k/4, k/4, k/4, k/4, k/4), // five to the first piece and a bit
		"large": chunks("large", 4*k, 4*k, k),
		"odd":   chunks("odd", k+1, k-2, 5*k),
		"holes": chunks("holes", k, -k, k),
		"copy":  chunks("same", k, k, 10),
	}
	list := func(share float64, pieces ...Piece) (got []string) {
		names := map[toc.Digest]string{}
		for _, name := range []string{"same", "small", "large", "odd", "holes"} {
			names[toc.ObjectKey(files[name])] = name
		}
		p := &Profile{pieces}
		for _, c := range p.Chunks(share, func(path string) []toc.Chunk { return files[path] }) {
			if c.Chunk != files[names[c.Key]][c.Index] {
				t.Errorf("chunk %d of %s is %+v", c.Index, names[c.Key], c.Chunk)
			}
			got = append(got, fmt.Sprintf("%s %d", names[c.Key], c.Index))
		}
		return got
	}
	for _, c := range []struct {
		what   string
		pieces []Piece
		want   []string
	}{
		{"one to one, in the profile's order", []Piece{{"same", 2, 1, 1}, {"same", 0, 1, 2}}, []string{"same 2", "same 0"}},
		{"twice", []Piece{{"same", 1, 1, 1}, {"same", 1, 1, 2}}, []string{"same 1"}},
		{"smaller chunks", []Piece{{"small", 0, 1, 1}}, []string{"small 0", "small 1", "small 2", "small 3"}},
		{"the rest of smaller ones", []Piece{{"small", 1, 1, 1}}, []string{"small 4"}},
		{"larger chunks, once", []Piece{{"large", 5, 1, 1}, {"large", 4, 1, 2}, {"large", 3, 1, 3}}, []string{"large 1", "large 0"}},
		{"edges: byte 65536 is still in the first chunk", []Piece{{"odd", 1, 1, 1}}, []string{"odd 0", "odd 1", "odd 2"}},
		{"edges: the first piece ends before", []Piece{{"odd", 0, 1, 1}}, []string{"odd 0"}},
		{"holes are in no pack", []Piece{{"holes", 0, 1, 1}, {"holes", 1, 1, 1}, {"holes", 2, 1, 1}}, []string{"holes 0", "holes 2"}},
		{"the same object at two paths", []Piece{{"copy", 0, 1, 1}, {"same", 0, 1, 2}, {"same", 1, 1, 3}}, []string{"same 0", "same 1"}},
		{"gone, or shorter now", []Piece{{"gone", 0, 1, 1}, {"same", 7, 1, 2}, {"gone", 1, 1, 3}, {"same", 1, 1, 4}}, []string{"same 1"}},
		{"rare", []Piece{{"same", 0, 0.4, 1}, {"same", 1, 0.5, 1}}, []string{"same 1"}},
		{"far out", []Piece{{"same", maxPiece, 1, 1}}, nil},
	} {
		if d := cmp.Diff(c.want, list(0.5, c.pieces...)); d != "" {
			t.Errorf("%s: %s", c.what, d)
		}
	}
	// Each path is asked for once.
	asked := map[string]int{}
	p := &Profile{[]Piece{{"same", 0, 1, 1}, {"gone", 0, 1, 2}, {"gone", 1, 1, 3}, {"same", 1, 1, 4}}}
	p.Chunks(0, func(path string) []toc.Chunk { asked[path]++; return files[path] })
	if d := cmp.Diff(map[string]int{"same": 1, "gone": 1}, asked); d != "" {
		t.Error(d)
	}
}

func TestText(t *testing.T) {
	p := &Profile{[]Piece{
		{"usr/bin/a b", 0, 1, 0}, {`quote"<&>` + "\u2028é", 3, 0.333, 1.25}, {"bad\nname", 0, 0.05, 1.25}, {"x", 1 << 40, 0, 1e9},
	}}
	var b bytes.Buffer
	if n, err := p.WriteTo(&b); err != nil || n != int64(b.Len()) {
		t.Fatal(n, err)
	}
	if lines := strings.Count(b.String(), "\n"); lines != 4 || !strings.Contains(b.String(), "<&>") {
		t.Errorf("%d lines:\n%s", lines, &b)
	}
	got, err := Parse(&b)
	if d := cmp.Diff(p, got); d != "" || err != nil {
		t.Error(d, err)
	}

	// By hand: comments, paths alone, and in the order of the lines.
	got, err = Parse(strings.NewReader("# one\n\n/usr/bin/python3\n  //etc/passwd  \n{\"path\":\"/lib/x\",\"piece\":2}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"usr/bin/python3 0", "etc/passwd 0", "lib/x 2"}, brief(got)); d != "" {
		t.Error(d)
	}
	for _, x := range got.Pieces {
		if x.Share != 1 {
			t.Errorf("%+v", x)
		}
	}

	for _, bad := range []string{
		"/", `{}`, `{"path":"a","piece":-1}`, `{"path":"a","share":1.1}`, `{"path":"a","share":-1}`, `{"path":"a"`, `{"path":1}`, `{"path":"a","ms":"soon"}`,
		strings.Repeat("x", 1<<21), `{"path":"a","piece":9223372036854775807}`, "a\x00b", "\xff\xfe",
	} {
		if p, err := Parse(strings.NewReader("# a comment\n" + bad + "\n")); err == nil {
			t.Errorf("%.40q: %v", bad, p)
		} else if !strings.HasPrefix(err.Error(), "profile: ") || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// FuzzParse: what is accepted can be used, merged and written, and comes back as it was.
func FuzzParse(f *testing.F) {
	f.Add([]byte("# comment\nusr/bin/env\n{\"path\":\"a\",\"piece\":1,\"share\":0.5,\"ms\":3}\n"))
	f.Add([]byte(`{"path":"a","piece":140737488355327}`))
	f.Add([]byte("{\"path\":\"\\ud800\"}\n\xff"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		for _, x := range p.Pieces {
			if x.Path == "" || x.Path[0] == '/' || x.Index < 0 || !(x.Share >= 0 && x.Share <= 1) {
				t.Fatalf("%+v", x)
			}
		}
		if !slices.IsSortedFunc(p.Pieces, func(a, b Piece) int { return gocmp.Compare(a.MS, b.MS) }) {
			t.Fatalf("%v", p.Pieces)
		}
		var b bytes.Buffer
		if _, err := p.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		again, err := Parse(&b)
		if d := cmp.Diff(p, again); d != "" || err != nil {
			t.Fatal(d, err)
		}
		p.Chunks(0, func(path string) []toc.Chunk { return chunks(path, PieceSize, 100) })
		Merge(p, p)
	})
}
