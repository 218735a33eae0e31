package worst

import (
	"archive/tar"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A layer writes a tar. The first error stays, later calls do nothing.
type layer struct {
	w    io.Writer
	tar  *tar.Writer
	n    int       // entries so far
	last time.Time // the time of the last entry
	err  error
}

// add writes an entry. An unset time becomes one that no other entry has, an unset type a regular
// file, an unset format PAX.
func (l *layer) add(h tar.Header, content string) {
	h.Size = int64(len(content))
	l.stream(h, strings.NewReader(content))
}

// stream writes an entry whose content, h.Size bytes, is in r.
func (l *layer) stream(h tar.Header, r io.Reader) {
	if l.err != nil {
		return
	}
	if h.ModTime.IsZero() {
		h.ModTime = l.next()
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.Format == 0 {
		h.Format = tar.FormatPAX
	}
	l.last = h.ModTime
	if l.err = l.tar.WriteHeader(&h); l.err != nil {
		l.err = fmt.Errorf("%q: %w", h.Name, l.err)
		return
	}
	_, l.err = io.Copy(l.tar, r)
}

// next returns a time a little later than that of the entry before, with its own nanoseconds.
func (l *layer) next() time.Time {
	l.n++
	return epoch.Add(time.Duration(l.n) * 1_000_000_007)
}

func (l *layer) dir(name string, mode int64) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}, "")
}

func (l *layer) file(name, content string) {
	l.add(tar.Header{Name: name, Mode: 0o644}, content)
}

func (l *layer) symlink(name, target string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, "")
}

// link writes a hard link. Unpackers give the inode the attributes of the link's entry, so these
// are the ones that file, symlink and special use; the time is that of the entry before.
func (l *layer) link(name, target string) {
	mode := int64(0o644)
	l.add(tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: mode, ModTime: l.last}, "")
}

func (l *layer) special(name string, typeflag byte, major, minor int64) {
	l.add(tar.Header{Name: name, Typeflag: typeflag, Mode: 0o644, Devmajor: major, Devminor: minor}, "")
}

func (l *layer) whiteout(name string) {
	i := strings.LastIndexByte(name, '/') + 1
	l.add(tar.Header{Name: name[:i] + ".wh." + name[i:]}, "")
}

func (l *layer) opaque(dir string) {
	l.add(tar.Header{Name: dir + "/.wh..wh..opq"}, "")
}

// What archive/tar does not write.

// A span is a piece of a sparse file that is stored, in bytes of the file.
type span struct{ off, size int64 }

type version int

const (
	v7 version = iota
	ustar
	gnu
)

type rawHeader struct {
	name, link  string // at most 100 bytes
	mode        int64
	size, mtime int64
	typeflag    byte
	version     version
	sparse      []byte // of an old GNU sparse file: bytes 386 to 495
}

// raw writes a header as it is, and the content.
func (l *layer) raw(h rawHeader, content string) {
	if l.err == nil {
		l.err = l.tar.Flush()
	}
	var b [512]byte
	octal := func(field []byte, v int64) { copy(field, fmt.Sprintf("%0*o", len(field)-1, v)) }
	copy(b[:100], h.name)
	octal(b[100:108], h.mode)
	octal(b[108:116], 0)
	octal(b[116:124], 0)
	octal(b[124:136], h.size)
	octal(b[136:148], h.mtime)
	b[156] = h.typeflag
	copy(b[157:257], h.link)
	switch h.version {
	case ustar:
		copy(b[257:], "ustar\x0000")
	case gnu:
		copy(b[257:], "ustar  \x00")
	}
	copy(b[386:], h.sparse)
	copy(b[148:156], "        ")
	var sum int64
	for _, c := range b {
		sum += int64(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	l.write(b[:])
	l.data(content)
}

func (l *layer) write(b []byte) {
	if l.err == nil {
		_, l.err = l.w.Write(b)
	}
}

// data writes content and fills the block.
func (l *layer) data(content string) {
	l.write([]byte(content))
	l.write(make([]byte, -len(content)&511))
}

// pax writes an extended header for the entry that follows, its records in order of their names.
func (l *layer) pax(records map[string]string) {
	var s strings.Builder
	for _, k := range slices.Sorted(maps.Keys(records)) {
		s.WriteString(paxRecord(k, records[k]))
	}
	l.raw(rawHeader{name: "PaxHeaders/x", typeflag: tar.TypeXHeader, size: int64(s.Len()), version: ustar}, s.String())
}

// paxRecord returns "LENGTH KEY=VALUE\n", where the length counts itself.
func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	size := n + len(strconv.Itoa(n))
	if len(strconv.Itoa(size)) > len(strconv.Itoa(n)) {
		size++
	}
	return fmt.Sprintf("%d %s=%s\n", size, k, v)
}

// sparseGNU writes a sparse file as old GNU tar does: four spans in the header, further ones, 21 at a time,
// in blocks after it.
func (l *layer) sparseGNU(name string, size int64, spans []span, data string) {
	spans = withEnd(spans, size)
	entry := func(s span) []byte { return fmt.Appendf(nil, "%011o\x00%011o\x00", s.off, s.size) }
	head := make([]byte, 110)
	var rest []span
	for i, s := range spans {
		if i == 4 {
			rest = spans[4:]
			head[96] = 1
			break
		}
		copy(head[24*i:], entry(s))
	}
	copy(head[97:], fmt.Sprintf("%011o\x00", size))
	var more []byte
	for len(rest) > 0 {
		var b [512]byte
		n := min(21, len(rest))
		for i, s := range rest[:n] {
			copy(b[24*i:], entry(s))
		}
		if rest = rest[n:]; len(rest) > 0 {
			b[504] = 1
		}
		more = append(more, b[:]...)
	}
	l.raw(rawHeader{name: name, mode: 0o644, size: int64(len(data)), mtime: l.next().Unix(), typeflag: tar.TypeGNUSparse, version: gnu, sparse: head}, "")
	l.write(more)
	l.data(data)
}

// sparse01 writes a sparse file with the map in a PAX record: GNU.sparse format 0.1.
func (l *layer) sparse01(name string, size int64, spans []span, data string) {
	spans = withEnd(spans, size)
	var m []string
	for _, s := range spans {
		m = append(m, strconv.FormatInt(s.off, 10), strconv.FormatInt(s.size, 10))
	}
	l.pax(map[string]string{
		"GNU.sparse.size":      strconv.FormatInt(size, 10),
		"GNU.sparse.numblocks": strconv.Itoa(len(spans)),
		"GNU.sparse.map":       strings.Join(m, ","),
		"GNU.sparse.name":      name,
		"mtime":                "1700000000.125",
	})
	l.raw(rawHeader{name: "GNUSparseFile.0/x", mode: 0o644, size: int64(len(data)), mtime: 1_700_000_000, typeflag: tar.TypeReg, version: ustar}, data)
}

// sparse10 writes a sparse file with the map before the data: GNU.sparse format 1.0.
func (l *layer) sparse10(name string, size int64, spans []span, data string) {
	spans = withEnd(spans, size)
	m := fmt.Sprintf("%d\n", len(spans))
	for _, s := range spans {
		m += fmt.Sprintf("%d\n%d\n", s.off, s.size)
	}
	m += strings.Repeat("\x00", -len(m)&511)
	l.pax(map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
		"GNU.sparse.name": name, "GNU.sparse.realsize": strconv.FormatInt(size, 10),
		"mtime": "1700000000.25",
	})
	l.raw(rawHeader{name: "GNUSparseFile.0/x", mode: 0o644, size: int64(len(m) + len(data)), mtime: 1_700_000_000, typeflag: tar.TypeReg, version: ustar}, m+data)
}

// withEnd adds the span without bytes by which GNU tar marks the end of a file that ends in a hole.
func withEnd(spans []span, size int64) []span {
	if n := len(spans); n == 0 || spans[n-1].off+spans[n-1].size < size {
		return append(slices.Clip(spans), span{size, 0})
	}
	return spans
}

// text returns n bytes that compress well and are different for every n.
func text(n int) string {
	line := fmt.Sprintf("%d bytes of a text that is always the same\n", n)
	return strings.Repeat(line, n/len(line)+1)[:n]
}

// noise returns n bytes that do not compress, always the same.
func noise(n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return string(b)
}

// hugeReader reads the huge file: blocks that are all zero but for their number, and
// in every 50th, from an odd place on, noise.
type hugeReader struct {
	off, size int64
	noise     []byte
	block     [64 << 10]byte
}

func (r *hugeReader) Read(p []byte) (int, error) {
	if r.off == r.size {
		return 0, io.EOF
	}
	if r.noise == nil {
		r.noise = []byte(noise(32 << 10))
	}
	n, in := r.off/int64(len(r.block)), r.off%int64(len(r.block))
	if in == 0 {
		clear(r.block[:])
		if n%50 == 49 {
			copy(r.block[n%31_001:], r.noise)
		}
		binary.BigEndian.PutUint64(r.block[1000:], uint64(n))
	}
	p = p[:min(int64(len(p)), r.size-r.off)]
	c := copy(p, r.block[in:])
	r.off += int64(c)
	return c, nil
}
