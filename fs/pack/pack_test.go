package pack

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"lazuli/fs/toc"
)

type piece struct {
	key toc.Digest
	i   int
	p   []byte
}

const testFrame = 64 << 10

// pathOf says of every other object where it lies.
func pathOf(key toc.Digest) string {
	if key[0]&1 == 0 {
		return ""
	}
	return fmt.Sprintf("usr/lib/%x", key[:20])
}

func build(t testing.TB, tables [][]byte, pieces []piece) []byte {
	t.Helper()
	b := Builder{FrameSize: testFrame}
	for _, x := range tables {
		b.Table(sha256.Sum256(x), x)
	}
	for _, x := range pieces {
		if err := b.Chunk(x.key, x.i, pathOf(x.key), x.p); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	n, err := b.WriteTo(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("%d of %d bytes, %v", n, out.Len(), err)
	}
	return out.Bytes()
}

// pieces are of all sizes: empty text that compresses, noise that does not, more than a frame.
func pieces(n int) (list []piece) {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		p := bytes.Repeat([]byte("lazuli "), 1+r.IntN(3000))
		if i%3 == 0 {
			for j := range p {
				p[j] = byte(r.Uint32())
			}
		}
		if i == 7 {
			p = bytes.Repeat(p, 1+4*testFrame/len(p))
		}
		list = append(list, piece{sha256.Sum256([]byte{byte(i)}), i % 5, p})
	}
	return list
}

// TestRoundTrip: what went in comes out, in its order.
func TestRoundTrip(t *testing.T) {
	tables := [][]byte{[]byte("one table"), nil, bytes.Repeat([]byte("x"), 10000)}
	in := pieces(60)
	r := bytes.NewReader(build(t, tables, in))
	size := r.Size()
	x, err := ReadIndex(r)
	if err != nil {
		t.Fatal(err)
	}
	if x.Size != size || x.Start != size-int64(r.Len()) {
		t.Errorf("size %d, start %d; the pack has %d, and %d are left", x.Size, x.Start, size, r.Len())
	}
	for i, table := range tables {
		p := make([]byte, x.Tables[i].Size)
		io.ReadFull(r, p)
		if !bytes.Equal(p, table) || x.Tables[i].Digest != sha256.Sum256(table) {
			t.Errorf("table %d is %q", i, p)
		}
	}
	var got []piece
	plain := 0
	for _, f := range x.Frames {
		p := make([]byte, f.Size)
		io.ReadFull(r, p)
		raw, err := f.Inflate(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		if f.Size == f.Inflated {
			plain++
		}
		if f.Inflated > testFrame && len(f.Chunks) > 1 {
			t.Errorf("a frame of %d chunks has %d bytes", len(f.Chunks), f.Inflated)
		}
		for _, c := range f.Chunks {
			want := in[len(got)]
			if c.Object != binary.BigEndian.Uint64(want.key[:]) {
				t.Fatalf("piece %d is of object %x", len(got), c.Object)
			}
			got = append(got, piece{want.key, c.Index, raw[:len(want.p):len(want.p)]})
			raw = raw[len(want.p):]
		}
		if len(raw) != 0 {
			t.Errorf("%d bytes too many", len(raw))
		}
	}
	if diff := cmp.Diff(in, got, cmp.AllowUnexported(piece{})); diff != "" {
		t.Error(diff)
	}
	paths := map[uint64]string{}
	for _, x := range in {
		paths[binary.BigEndian.Uint64(x.key[:])] = pathOf(x.key)
	}
	if diff := cmp.Diff(paths, x.Paths); diff != "" {
		t.Error(diff)
	}
	if plain == 0 || plain == len(x.Frames) || r.Len() != 0 {
		t.Errorf("%d of %d frames are not compressed, %d bytes left", plain, len(x.Frames), r.Len())
	}
}

// TestQuick: who has no time gets a larger pack.
func TestQuick(t *testing.T) {
	var text strings.Builder
	r := rand.New(rand.NewPCG(1, 2))
	for text.Len() < testFrame {
		fmt.Fprintf(&text, "word%d of %d\n", r.IntN(1000), r.IntN(50))
	}
	size := func(quick bool) int64 {
		b := Builder{Quick: quick}
		if err := b.Chunk(toc.Digest{}, 0, "", []byte(text.String())); err != nil {
			t.Fatal(err)
		}
		n, err := b.WriteTo(io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if best, quick := size(false), size(true); quick <= best {
		t.Errorf("%d bytes if it is quick, %d if it is not", quick, best)
	}
}

// TestBadPaths: a list of paths that is too long, too short or no list is an error, however small it is.
func TestBadPaths(t *testing.T) {
	whole := build(t, nil, pieces(3))
	le := binary.LittleEndian
	size := le.Uint32(whole[20:])
	begin := headerSize + 12*int(le.Uint32(whole[12:])) + 16*int(le.Uint32(whole[16:]))
	for name, list := range map[string][]byte{
		"long":  bytes.Repeat([]byte("x\x00"), 4),
		"short": []byte("x\x00y\x00z"),
		"bomb":  make([]byte, 3*maxPath+1),
		"junk":  nil,
	} {
		b := new(Builder)
		if err := b.open(); err != nil {
			t.Fatal(err)
		}
		packed := b.encoder.EncodeAll(list, nil)
		if list == nil {
			packed = []byte("junk")
		}
		p := slices.Concat(whole[:20], le.AppendUint32(nil, uint32(len(packed))), whole[headerSize:begin], packed, whole[begin+int(size):])
		if _, err := ReadIndex(bytes.NewReader(p)); err == nil || !strings.Contains(err.Error(), "paths") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzReadIndex: no panic, and no memory or place that the bytes do not account for.
func FuzzReadIndex(f *testing.F) {
	whole := build(f, [][]byte{[]byte("table")}, pieces(4))
	f.Add(whole)
	f.Add(whole[:30])
	f.Add([]byte(magic + "\xff\x0f\x00\x00\xff\xff\x03\x00\xff\xff\x0f\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		x, err := ReadIndex(bytes.NewReader(p))
		if err != nil {
			return
		}
		if x.Start > int64(len(p)) {
			t.Fatalf("an index of %d bytes in %d", x.Start, len(p))
		}
		at := x.Start
		for _, table := range x.Tables {
			at += table.Size
		}
		for _, f := range x.Frames {
			if end := at + int64(f.Size); end <= int64(len(p)) && f.Inflated <= 1<<20 {
				if raw, err := f.Inflate(p[at:end], nil); err == nil && len(raw) != f.Inflated {
					t.Fatalf("%d bytes, not %d", len(raw), f.Inflated)
				}
			}
			at += int64(f.Size)
		}
		if at != x.Size {
			t.Fatalf("%d bytes, not %d", at, x.Size)
		}
	})
}
