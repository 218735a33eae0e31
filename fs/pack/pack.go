// Package pack is the startup pack: what a start of an image touches, as one blob, in the order in which
// it is touched, so that one request brings it in a stream that is used while it arrives.
//
// A pack begins with an index: which tables of contents follow, which chunks of which objects are in which frame, and at which paths
// the objects lie. Then come the tables as they lie in the layers' blobs, and the frames, each compressed by itself. docs/pack.md is
// its specification.
//
// Nothing trusts a pack. It has no digests of its own: a table of contents is checked against the manifest, a chunk against
// the table of contents, by whoever takes it. A pack that lies costs a request and never gives a wrong byte. What
// this package promises is that [ReadIndex] takes memory in proportion to the bytes that arrive, but for 16 MiB of paths, and that
// every place in an [Index] lies within the pack.
//
// An Index is immutable. A [Builder] belongs to one goroutine.
package pack

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/toc"
)

// MediaType is a pack's as a layer of its artifact, and the artifact's type.
const MediaType = "application/vnd.lazuli.pack.v1"

// Annotations of a pack's artifact. They stand in a registry's list of referrers too, so that the artifact's manifest need not be read.
const (
	DigestAnnotation = "lazuli.pack.digest" // of the pack's blob
	SizeAnnotation   = "lazuli.pack.size"   // of the blob, in bytes
	MadeAnnotation   = "lazuli.pack.made"   // when, as RFC 3339 in UTC; the newest is taken
	// CommandAnnotation is a digest of what the image runs: see [Command].
	CommandAnnotation = "lazuli.pack.command"
	// OriginAnnotation says what a pack was made of, if not of a recording: it is taken when there is none that was
	// recorded, whatever its age.
	OriginAnnotation = "lazuli.pack.origin"
)

// Values of OriginAnnotation. The number changes when the same image gives another pack than before.
const (
	OriginProfile = "profile/1" // of a profile that was given, which may be of another build
	OriginClosure = "closure/2" // of what an image's command can be seen to need without running it: the least that there is
)

// Named returns where the annotations of an image's manifest or of a pack's artifact say that the pack's blob is: its digest
// and size, which nobody has checked. It is false if they do not say so, or say nonsense.
func Named(annotations map[string]string) (v1.Descriptor, bool) {
	hash, herr := v1.NewHash(annotations[DigestAnnotation])
	size, serr := strconv.ParseInt(annotations[SizeAnnotation], 10, 64)
	if herr != nil || serr != nil || size <= 0 || size > maxPack {
		return v1.Descriptor{}, false
	}
	return v1.Descriptor{MediaType: MediaType, Digest: hash, Size: size}, true
}

// maxPack is how large a pack may be, in bytes.
const maxPack = 16 << 30

// Tag names the newest pack of any image in a repository. The next build of an image has a digest that no pack refers to, and most
// of the content of the last one: an image that runs the same command takes that pack.
const Tag = "lazuli-pack"

// Command returns a name for what an image runs by itself: the SHA-256, in hexadecimal digits, of its entrypoint and then its command, each
// element behind its length as 8 bytes, little endian, and the number of elements of the entrypoint before all.
func Command(entrypoint, cmd []string) string {
	h := sha256.New()
	binary.Write(h, binary.LittleEndian, uint64(len(entrypoint)))
	for _, s := range append(append([]string{}, entrypoint...), cmd...) {
		binary.Write(h, binary.LittleEndian, uint64(len(s)))
		io.WriteString(h, s)
	}
	return hex.EncodeToString(h.Sum(nil))
}

const (
	magic      = "LZPACK03"
	headerSize = 24 // magic 8, tables 4, frames 4, chunks 4, paths 4
	tableSize  = 40 // digest 32, length 8
	frameSize  = 12 // length 4, inflated 4, chunks 4
	chunkSize  = 16 // object 8, chunk 4, size 4

	// An index of the largest size takes 15 MiB, and about three times that in memory.
	maxTables = 1 << 12
	maxFrames = 1 << 18
	maxChunks = 1 << 20
	maxPaths  = 16 << 20 // bytes of all paths together, compressed or not
	maxPath   = 4 << 10  // bytes of one on average, with the zero behind it: PATH_MAX
	// MaxFrame is the most bytes that a frame may have, compressed or not: one chunk of the largest size.
	MaxFrame = toc.MaxChunkSize
)

// A Chunk names one chunk of one object.
type Chunk struct {
	Object uint64 // the first 8 bytes of the object's key, as a big endian number
	Index  int    // of the chunk in the object
	Size   int    // bytes of it, for who does not know the object
}

// A Table is the place of a layer's table of contents.
type Table struct {
	Digest toc.Digest // what the manifest promises of it
	Size   int64      // in bytes of the pack, compressed as in the layer's blob
}

// A Frame is some chunks, one behind the other, compressed together.
type Frame struct {
	Size     int // in bytes of the pack
	Inflated int // equal to Size if the frame is not compressed
	Chunks   []Chunk
}

// An Index says what a pack holds, in its order: Tables, then Frames.
type Index struct {
	Tables []Table
	Frames []Frame
	Paths  map[uint64]string // of objects, from the root, in the image that the pack was made of; nil if it does not say
	Size   int64             // of the whole pack, in bytes
	Start  int64             // of the index: where the first table begins
}

// ReadIndex reads the index that r begins with. r is then at the first table.
func ReadIndex(r io.Reader) (*Index, error) {
	x, err := readIndex(r)
	if err != nil {
		return nil, fmt.Errorf("startup pack: %w", noEOF(err))
	}
	return x, nil
}

func readIndex(r io.Reader) (*Index, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(h[:8]) != magic {
		return nil, errors.New("it does not begin like one")
	}
	tables, frames, chunks, paths := le.Uint32(h[8:]), le.Uint32(h[12:]), le.Uint32(h[16:]), le.Uint32(h[20:])
	if tables > maxTables || frames > maxFrames || chunks > maxChunks || paths > maxPaths {
		return nil, fmt.Errorf("%d tables, %d frames, %d chunks, %d bytes of paths: at most %d, %d, %d and %d are possible", tables, frames, chunks, paths, maxTables, maxFrames, maxChunks, maxPaths)
	}
	n := int64(tables)*tableSize + int64(frames)*frameSize + int64(chunks)*chunkSize + int64(paths)
	var buf bytes.Buffer // grows with what arrives, not with what was claimed
	if _, err := io.CopyN(&buf, r, n); err != nil {
		return nil, err
	}
	x := &Index{Start: headerSize + n, Size: headerSize + n}
	for range tables {
		b := buf.Next(tableSize)
		t := Table{toc.Digest(b[:32]), int64(le.Uint64(b[32:]))}
		if t.Size < 0 || t.Size > 1<<40 {
			return nil, fmt.Errorf("a table of contents of %d bytes", t.Size)
		}
		x.Tables = append(x.Tables, t)
		x.Size += t.Size
	}
	var counts []uint32
	sum := uint64(0)
	for range frames {
		b := buf.Next(frameSize)
		f := Frame{Size: int(le.Uint32(b)), Inflated: int(le.Uint32(b[4:]))}
		n := le.Uint32(b[8:])
		if f.Size == 0 || f.Size > f.Inflated || f.Inflated > MaxFrame || n == 0 {
			return nil, fmt.Errorf("a frame of %d bytes, %d inflated, with %d chunks", f.Size, f.Inflated, n)
		}
		x.Frames = append(x.Frames, f)
		counts = append(counts, n)
		x.Size += int64(f.Size)
		sum += uint64(n)
	}
	if sum != uint64(chunks) {
		return nil, fmt.Errorf("the frames have %d chunks, the index %d", sum, chunks)
	}
	all := make([]Chunk, chunks)
	for i := range all {
		b := buf.Next(chunkSize)
		all[i] = Chunk{binary.BigEndian.Uint64(b), int(le.Uint32(b[8:])), int(le.Uint32(b[12:]))}
	}
	var err error
	if x.Paths, err = readPaths(buf.Bytes(), all); err != nil {
		return nil, err
	}
	for i, n := range counts {
		x.Frames[i].Chunks, all = all[:n:n], all[n:]
	}
	return x, nil
}

// readPaths reads the list of paths, compressed, of the objects that chunks are of.
func readPaths(packed []byte, chunks []Chunk) (map[uint64]string, error) {
	if len(packed) == 0 {
		return nil, nil
	}
	r, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxPaths), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	most := min(int64(len(chunks))*maxPath, maxPaths)
	list, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(list)) > most {
		err = fmt.Errorf("more than %d bytes", most)
	}
	paths := map[uint64]string{}
	for _, c := range chunks {
		if _, ok := paths[c.Object]; ok || err != nil {
			continue
		}
		path, rest, ok := bytes.Cut(list, []byte{0})
		if !ok {
			err = io.ErrUnexpectedEOF
		}
		paths[c.Object], list = string(path), rest
	}
	if err == nil && len(list) > 0 {
		err = errors.New("more than objects")
	}
	if err != nil {
		return nil, fmt.Errorf("its paths: %w", err)
	}
	return paths, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A Builder makes a pack. Its zero value is one without anything in it.
type Builder struct {
	// Quick makes the pack in a quarter of the time, and some 6 % larger: for one that is a guess.
	Quick bool
	// FrameSize is how many bytes share a frame, unless one chunk is larger. Zero is 1 MiB.
	FrameSize int

	tables []Table
	bytes  [][]byte // of the tables
	frames []*frame

	pending []byte // of the frame that is not full yet
	chunks  []Chunk
	encoder *zstd.Encoder
	work    errgroup.Group // compresses frames

	objects map[uint64]bool
	paths   []byte // of the objects in the order of their first chunks, each with a zero behind it
	named   bool   // one of them is not empty
}

// A frame is one that is being compressed, or was.
type frame struct {
	Frame
	packed []byte
}

// frameTarget is how many bytes share a frame: so many that files compress well together, and so few that nobody waits long for the neighbours of
// what he wants, 30 ms at 100 Mbit/s. A pack of py has 26.6 MB with 64 KiB, 25.8 with 512 KiB and 25.0 with 1 MiB, which is 130 ms less to wait for its end.
const frameTarget = 1 << 20

// Table adds a layer's table of contents, compressed as it lies in the layer's blob.
func (b *Builder) Table(digest toc.Digest, compressed []byte) {
	b.tables = append(b.tables, Table{digest, int64(len(compressed))})
	b.bytes = append(b.bytes, compressed)
}

// Chunk adds chunk i of the object named key, whose bytes are p. Chunks come in the order of their first touch. path is one
// of the object's, from the root, or "" if it is unknown; what the first chunk of an object says counts.
func (b *Builder) Chunk(key toc.Digest, i int, path string, p []byte) error {
	size := cmp.Or(b.FrameSize, frameTarget)
	if len(b.pending) > 0 && len(b.pending)+len(p) > size {
		if err := b.flush(); err != nil {
			return err
		}
	}
	object := binary.BigEndian.Uint64(key[:])
	if !b.objects[object] {
		if b.objects == nil {
			b.objects = map[uint64]bool{}
		}
		b.objects[object] = true
		b.paths = append(append(b.paths, path...), 0)
		b.named = b.named || path != ""
	}
	b.chunks = append(b.chunks, Chunk{object, i, len(p)})
	b.pending = append(b.pending, p...)
	if len(b.pending) >= size {
		return b.flush()
	}
	return nil
}

// flush has the frame compressed behind the caller.
func (b *Builder) flush() error {
	if len(b.pending) == 0 {
		return nil
	}
	if err := b.open(); err != nil {
		return err
	}
	p := b.pending
	f := &frame{Frame: Frame{Inflated: len(p), Chunks: b.chunks}}
	b.frames = append(b.frames, f)
	b.pending, b.chunks = nil, nil
	b.work.Go(func() error {
		if f.packed = bytes.Clone(b.encoder.EncodeAll(p, nil)); len(f.packed) >= len(p) { // what it returns has room for all of p
			f.packed = p
		}
		f.Size = len(f.packed)
		return nil
	})
	return nil
}

// open makes the encoder. A pack is made once and read at every start: the best level takes 60 ms for a megabyte and is 6 % smaller than the one
// that is four times as fast, and inflating takes the same time. A guess is larger, and part of every conversion into a registry: 300 MB of files would take 18 s.
func (b *Builder) open() (err error) {
	if b.encoder == nil {
		b.work.SetLimit(runtime.GOMAXPROCS(0))
		level := zstd.SpeedBestCompression
		if b.Quick {
			level = zstd.SpeedBetterCompression
		}
		b.encoder, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(false))
	}
	return err
}

// WriteTo writes the pack.
func (b *Builder) WriteTo(w io.Writer) (int64, error) {
	if err := errors.Join(b.flush(), b.open()); err != nil {
		return 0, err
	}
	b.work.Wait()
	le := binary.LittleEndian
	out := []byte(magic)
	chunks := 0
	for _, f := range b.frames {
		chunks += len(f.Chunks)
	}
	if len(b.tables) > maxTables || len(b.frames) > maxFrames || chunks > maxChunks {
		return 0, fmt.Errorf("startup pack: %d tables, %d frames, %d chunks: at most %d, %d and %d are possible", len(b.tables), len(b.frames), chunks, maxTables, maxFrames, maxChunks)
	}
	out = le.AppendUint32(out, uint32(len(b.tables)))
	out = le.AppendUint32(out, uint32(len(b.frames)))
	out = le.AppendUint32(out, uint32(chunks))
	var paths []byte
	if b.named && len(b.paths) <= maxPaths {
		paths = b.encoder.EncodeAll(b.paths, nil)
	}
	out = le.AppendUint32(out, uint32(len(paths)))
	for _, t := range b.tables {
		out = append(out, t.Digest[:]...)
		out = le.AppendUint64(out, uint64(t.Size))
	}
	for _, f := range b.frames {
		out = le.AppendUint32(out, uint32(f.Size))
		out = le.AppendUint32(out, uint32(f.Inflated))
		out = le.AppendUint32(out, uint32(len(f.Chunks)))
	}
	for _, f := range b.frames {
		for _, c := range f.Chunks {
			out = binary.BigEndian.AppendUint64(out, c.Object)
			out = le.AppendUint32(out, uint32(c.Index))
			out = le.AppendUint32(out, uint32(c.Size))
		}
	}
	out = append(out, paths...)
	parts := append([][]byte{out}, b.bytes...)
	for _, f := range b.frames {
		parts = append(parts, f.packed)
	}
	n := int64(0)
	for _, part := range parts {
		m, err := w.Write(part)
		n += int64(m)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// decoder inflates frames; it is used side by side.
var decoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(MaxFrame))

// Inflate returns the content of a frame, whose bytes in the pack are p, in buf if that is large enough: Inflated bytes, unverified.
func (f *Frame) Inflate(p, buf []byte) ([]byte, error) {
	if f.Size == f.Inflated {
		return p, nil
	}
	if cap(buf) < f.Inflated {
		buf = make([]byte, f.Inflated)
	}
	out, err := decoder.DecodeAll(p, buf[:0]) // to its capacity, whatever p says
	if err == nil && len(out) != f.Inflated {
		err = fmt.Errorf("%d bytes instead of %d", len(out), f.Inflated)
	}
	if err != nil {
		return nil, fmt.Errorf("startup pack: a frame: %w", err)
	}
	return out, nil
}
