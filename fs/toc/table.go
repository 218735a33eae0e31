package toc

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"runtime"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// A Table says which objects a layer holds and where their chunks lie in the
// blob. It is a [TOC] without names, laid out so that it is mapped into memory and
// searched there: nothing is parsed when a layer is mounted again, and a mounted layer costs
// page cache but no heap.
//
// The file is little endian: a header of 64 bytes, four arrays, and the checksum.
//
//	objects   48 bytes each, in the order of their keys, no key twice
//	chunks    64 bytes each, those of one object together and in order
//	members   16 bytes each, in the order of the blob
//	refs       8 bytes each: the chunks of each member, in the order of the member
//
// A file that was damaged is not opened: it ends in a checksum of all that is before.
//
// A Table may be used by several goroutines. It is unmapped when nothing refers to it, or to one of its objects, any more.
type Table struct {
	objects, chunks, members, ref []byte
	compression                   Compression
	dataEnd                       int64
}

const (
	tableMagic  = "LZTABLE3"
	tableHeader = 64
	objectSize  = 48 // key 32, size 8, first chunk 4, number of chunks 4
	chunkSize   = 64 // digest 32, file offset 8, size 8, inner 8, member 4, flags 4
	memberSize  = 16 // offset 8, first ref 4, number of refs 4
	refSize     = 8  // object 4, chunk of the object 4
	sumSize     = 4  // CRC-32C of the file before it

	noMember = math.MaxUint32 // a hole's member, and every chunk's in a Whole layer
)

// An Object is the content of a regular file, as a layer holds it.
type Object struct {
	Key  Digest
	Size int64 // bytes, above 0
	t    *Table
	// index is the object's place in the table, first and n its chunks' places.
	index, first, n uint32
}

// A Ref is one chunk of one object.
type Ref struct {
	Object Object
	Chunk  int // 0 to Object.NumChunks()-1
}

// MarshalTable returns t as the file that [OpenTable] opens. It is an error if
// chunks overlap in a member, since no writer makes such a thing and a stream cannot
// be read backwards.
func MarshalTable(t *TOC) ([]byte, error) {
	type object struct {
		key   Digest
		entry int32
	}
	objects := make([]object, 0, len(t.Entries))
	for i := range t.Entries {
		if e := &t.Entries[i]; e.Type == Regular && e.Size > 0 {
			objects = append(objects, object{ObjectKey(t.Content(e)), int32(i)})
		}
	}
	// Of several files with the same content the first in the tar is kept: it is the one that a
	// profile moved to the front.
	slices.SortFunc(objects, func(a, b object) int {
		if c := bytes.Compare(a.key[:], b.key[:]); c != 0 {
			return c
		}
		return cmp.Compare(a.entry, b.entry)
	})
	objects = slices.CompactFunc(objects, func(a, b object) bool { return a.key == b.key })

	// Members are found from all chunks, also of files that were dropped above: where the next
	// one begins is where a member ends.
	var starts []int64
	if t.Compression != Whole {
		starts = make([]int64, 0, len(t.Chunks))
		for i := range t.Chunks {
			if c := &t.Chunks[i]; !c.Hole && (len(starts) == 0 || starts[len(starts)-1] != c.Member) {
				starts = append(starts, c.Member)
			}
		}
		slices.Sort(starts)
		starts = slices.Compact(starts)
	}
	type ref struct {
		member        uint32
		inner, end    int64
		object, chunk uint32
	}
	var nchunks int
	for _, o := range objects {
		nchunks += int(t.Entries[o.entry].NumChunks)
	}
	refs := make([]ref, 0, nchunks)
	size := tableHeader + len(objects)*objectSize + nchunks*chunkSize + len(starts)*memberSize
	b := make([]byte, tableHeader, size+nchunks*refSize)
	le := binary.LittleEndian
	first := 0
	for _, o := range objects {
		e := &t.Entries[o.entry]
		b = append(b, o.key[:]...)
		b = le.AppendUint64(b, uint64(e.Size))
		b = le.AppendUint32(b, uint32(first))
		b = le.AppendUint32(b, e.NumChunks)
		first += int(e.NumChunks)
	}
	for i, o := range objects {
		for j, c := range t.Content(&t.Entries[o.entry]) {
			member := uint32(noMember)
			if t.Compression != Whole && !c.Hole {
				m, _ := slices.BinarySearch(starts, c.Member)
				member = uint32(m)
				refs = append(refs, ref{member, c.Inner, c.Inner + c.Size, uint32(i), uint32(j)})
			}
			var flags uint32
			if c.Hole {
				flags = 1
			}
			b = append(b, c.Digest[:]...)
			b = le.AppendUint64(b, uint64(c.FileOffset))
			b = le.AppendUint64(b, uint64(c.Size))
			b = le.AppendUint64(b, uint64(c.Inner))
			b = le.AppendUint32(b, member)
			b = le.AppendUint32(b, flags)
		}
	}
	slices.SortFunc(refs, func(a, b ref) int {
		return cmp.Or(cmp.Compare(a.member, b.member), cmp.Compare(a.inner, b.inner))
	})
	next := 0
	for m, start := range starts {
		from, end := next, int64(0)
		for ; next < len(refs) && refs[next].member == uint32(m); next++ {
			if refs[next].inner < end {
				return nil, fmt.Errorf("chunks overlap in the member at %d", start)
			}
			end = refs[next].end
		}
		b = le.AppendUint64(b, uint64(start))
		b = le.AppendUint32(b, uint32(from))
		b = le.AppendUint32(b, uint32(next-from))
	}
	for _, r := range refs {
		b = le.AppendUint32(b, r.object)
		b = le.AppendUint32(b, r.chunk)
	}
	b = append(b, make([]byte, sumSize)...)
	copy(b, tableMagic)
	le.PutUint32(b[8:], uint32(t.Compression))
	le.PutUint32(b[12:], uint32(len(objects)))
	le.PutUint32(b[16:], uint32(nchunks))
	le.PutUint32(b[20:], uint32(len(starts)))
	le.PutUint32(b[24:], uint32(len(refs)))
	le.PutUint64(b[32:], uint64(t.DataEnd))
	le.PutUint32(b[len(b)-sumSize:], crc32.Checksum(b[:len(b)-sumSize], castagnoli))
	return b, nil
}

// castagnoli is the polynomial that processors have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// OpenTable maps the file at path, which [MarshalTable] made. The error says if it is damaged.
func OpenTable(path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() < tableHeader+sumSize || fi.Size() > math.MaxInt32*8 {
		return nil, fmt.Errorf("%s: not a chunk table", path)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: mmap: %w", path, err)
	}
	t, err := newTable(data)
	if err != nil {
		unix.Munmap(data)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	runtime.AddCleanup(t, func(data []byte) { unix.Munmap(data) }, data)
	return t, nil
}

func newTable(data []byte) (*Table, error) {
	if len(data) < tableHeader+sumSize || string(data[:8]) != tableMagic {
		return nil, fmt.Errorf("not a chunk table")
	}
	le := binary.LittleEndian
	end := len(data) - sumSize
	if crc32.Checksum(data[:end], castagnoli) != le.Uint32(data[end:]) {
		return nil, fmt.Errorf("the chunk table is damaged")
	}
	t := &Table{compression: Compression(le.Uint32(data[8:])), dataEnd: int64(le.Uint64(data[32:]))}
	rest := data[tableHeader:end]
	for i, part := range []*[]byte{&t.objects, &t.chunks, &t.members, &t.ref} {
		n := uint64(le.Uint32(data[12+4*i:])) * [...]uint64{objectSize, chunkSize, memberSize, refSize}[i]
		if n > uint64(len(rest)) {
			return nil, fmt.Errorf("the chunk table is truncated")
		}
		*part, rest = rest[:n], rest[n:]
	}
	if len(rest) != 0 {
		return nil, fmt.Errorf("the chunk table has %d bytes too many", len(rest))
	}
	return t, nil
}

// Compression says how the layer's members are compressed.
func (t *Table) Compression() Compression { return t.compression }

// Len is the number of different objects in the layer.
func (t *Table) Len() int { return len(t.objects) / objectSize }

// At returns object i in the order of the keys, 0 ≤ i < Len().
func (t *Table) At(i int) Object {
	defer runtime.KeepAlive(t) // a cleanup unmaps what its fields point to; so below
	b := t.objects[i*objectSize:][:objectSize]
	le := binary.LittleEndian
	return Object{
		Key: Digest(b[:32]), Size: int64(le.Uint64(b[32:])),
		t: t, index: uint32(i), first: le.Uint32(b[40:]), n: le.Uint32(b[44:]),
	}
}

// Find returns the object with the given key.
func (t *Table) Find(key Digest) (Object, bool) {
	defer runtime.KeepAlive(t)
	i := sort.Search(t.Len(), func(i int) bool {
		return bytes.Compare(t.objects[i*objectSize:][:32], key[:]) >= 0
	})
	if i == t.Len() || Digest(t.objects[i*objectSize:][:32]) != key {
		return Object{}, false
	}
	return t.At(i), true
}

// FindPrefix returns the first object whose key, as a number of 256 bits, begins with the upper n bits of
// prefix, 1 ≤ n ≤ 64.
func (t *Table) FindPrefix(prefix uint64, n int) (Object, bool) {
	defer runtime.KeepAlive(t)
	shift := 64 - n
	head := func(i int) uint64 { return binary.BigEndian.Uint64(t.objects[i*objectSize:]) >> shift }
	i := sort.Search(t.Len(), func(i int) bool { return head(i) >= prefix>>shift })
	if i == t.Len() || head(i) != prefix>>shift {
		return Object{}, false
	}
	return t.At(i), true
}

// NumMembers is the number of members that hold chunks; 0 in a Whole layer.
func (t *Table) NumMembers() int { return len(t.members) / memberSize }

// Member returns the span of member m: where it begins and where the next one
// begins at the latest, in bytes of the blob.
func (t *Table) Member(m int) (start, end int64) {
	defer runtime.KeepAlive(t)
	start = int64(binary.LittleEndian.Uint64(t.members[m*memberSize:]))
	if m+1 < t.NumMembers() {
		return start, int64(binary.LittleEndian.Uint64(t.members[(m+1)*memberSize:]))
	}
	return start, t.dataEnd
}

// MemberRefs returns the chunks in member m, in the order in which they lie in it. A chunk
// whose object has an earlier copy elsewhere in the layer is not among them.
func (t *Table) MemberRefs(m int) []Ref {
	defer runtime.KeepAlive(t)
	b := t.members[m*memberSize:][:memberSize]
	first, n := binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
	refs := make([]Ref, n)
	for i := range refs {
		r := t.ref[(int(first)+i)*refSize:][:refSize]
		refs[i] = Ref{t.At(int(binary.LittleEndian.Uint32(r))), int(binary.LittleEndian.Uint32(r[4:]))}
	}
	return refs
}

// NumChunks is the number of o's chunks, at least 1.
func (o Object) NumChunks() int { return int(o.n) }

// Chunk returns chunk i of o, 0 ≤ i < NumChunks(), and the number of the member that holds it, or -1
// if none does.
func (o Object) Chunk(i int) (Chunk, int) {
	defer runtime.KeepAlive(o.t)
	b := o.t.chunks[(int(o.first)+i)*chunkSize:][:chunkSize]
	le := binary.LittleEndian
	c := Chunk{
		Digest:     Digest(b[:32]),
		FileOffset: int64(le.Uint64(b[32:])),
		Size:       int64(le.Uint64(b[40:])),
		Inner:      int64(le.Uint64(b[48:])),
		Hole:       le.Uint32(b[60:])&1 != 0,
	}
	m := le.Uint32(b[56:])
	if m == noMember {
		return c, -1
	}
	c.Member, _ = o.t.Member(int(m))
	return c, int(m)
}

// ChunkAt returns the number of the chunk that holds byte off of the file, 0 ≤ off < o.Size.
func (o Object) ChunkAt(off int64) int {
	defer runtime.KeepAlive(o.t)
	return sort.Search(int(o.n), func(i int) bool {
		b := o.t.chunks[(int(o.first)+i)*chunkSize:][:chunkSize]
		return int64(binary.LittleEndian.Uint64(b[32:])) > off
	}) - 1
}

// Verify reports whether o's chunks are those that its key names. It fails if the table was damaged.
func (o Object) Verify() bool {
	chunks := make([]Chunk, o.n)
	for i := range chunks {
		chunks[i], _ = o.Chunk(i)
	}
	return ObjectKey(chunks) == o.Key
}
