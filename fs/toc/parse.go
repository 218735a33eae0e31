package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Parse reads the table of contents at loc. r has the loc.Size bytes that the blob
// has there: unless there is an error all of them are read, and nothing that follows. Nothing is returned unless the bytes are what want promises: an error
// about the content says so only of content that was promised.
//
// The error wraps [ErrNotLazy] if the table is sound, but its layer cannot be read piece by
// piece: chunks without a digest or above [MaxChunkSize], names whose bytes are lost.
// Memory is bounded by the Max constants.
func Parse(r io.Reader, loc Location, want Promise) (*TOC, error) {
	t, err := parse(r, loc, want)
	if err != nil {
		return nil, fmt.Errorf("toc: %w", err)
	}
	return t, nil
}

func parse(r io.Reader, loc Location, want Promise) (*TOC, error) {
	blob := &hashing{r: io.LimitReader(r, loc.Size)}
	if want.Compressed {
		blob.h = sha256.New()
	}
	inflated, size, done, err := inflate(blob, loc)
	if err != nil {
		// The digest of what could not be inflated tells a broken download from a broken layer.
		if want.Compressed {
			if err := blob.verify(want.Digest); err != nil {
				return nil, err
			}
		}
		return nil, noEOF(err)
	}
	defer done()
	json := &hashing{r: inflated, h: sha256.New(), limit: MaxInflated}
	p := newParser(json, loc, size)
	perr := p.toc()
	if want.Compressed {
		// What follows the JSON belongs to the promise too.
		if err := blob.verify(want.Digest); err != nil {
			return nil, err
		}
	}
	if errors.Is(perr, errTooLarge) {
		return nil, perr
	}
	if !want.Compressed {
		if err := json.verify(want.Digest); err != nil {
			return nil, err
		}
	}
	if perr != nil {
		return nil, noEOF(perr)
	}
	if _, err := io.Copy(io.Discard, blob); err != nil {
		return nil, err
	}
	if blob.n != loc.Size {
		return nil, io.ErrUnexpectedEOF
	}
	json.h.Sum(p.t.Digest[:0])
	return p.t, nil
}

// inflate returns the JSON that is compressed in r, and its size if that is said
// somewhere. done releases what it holds.
func inflate(r io.Reader, loc Location) (json io.Reader, size int64, done func(), err error) {
	switch loc.Compression {
	case Gzip:
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, 0, nil, err
		}
		z.Multistream(false)
		tr := tar.NewReader(z)
		h, err := tr.Next()
		if err != nil {
			return nil, 0, nil, err
		}
		if h.Name != TarName {
			return nil, 0, nil, fmt.Errorf("file %.100q: want %s", h.Name, TarName)
		}
		if h.Size > MaxInflated {
			return nil, 0, nil, errTooLarge
		}
		return tr, h.Size, func() { z.Close() }, nil
	case Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, 0, nil, err
		}
		return z, loc.Inflated, z.Close, nil
	}
	return nil, 0, nil, fmt.Errorf("compression %d has no table of contents", loc.Compression)
}

// maxWindow is the memory a zstd frame may ask for: what zstd --ultra -22 uses.
const maxWindow = 128 << 20

var errTooLarge = fmt.Errorf("%w: the table of contents has more than %d bytes", ErrNotLazy, MaxInflated)

// hashing hashes what is read through it, up to limit bytes if that is not 0.
type hashing struct {
	r     io.Reader
	h     hash.Hash // nil: not
	n     int64
	limit int64
}

func (h *hashing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.n += int64(n)
	if h.limit != 0 && h.n > h.limit {
		return 0, errTooLarge
	}
	if h.h != nil {
		h.h.Write(p[:n])
	}
	return n, err
}

// verify reads to the end and returns an error if the whole has not the digest d.
func (h *hashing) verify(d Digest) error {
	if _, err := io.Copy(io.Discard, h); err != nil {
		return noEOF(err)
	}
	var got Digest
	if h.h.Sum(got[:0]); got != d {
		return fmt.Errorf("digest is %s, the manifest says %s", got, d)
	}
	return nil
}

// noEOF makes an end that came too early an error that says so.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A parser turns the JSON into a TOC, in one pass.
type parser struct {
	d       *jsontext.Decoder
	loc     Location
	t       *TOC
	strings arena
	plain   []byte // the last string that had escapes, without
	bytes   []byte // the last string that was base64, decoded
	row     row

	onField, onXattr, onXattrBytes func(key []byte) error // made once, not per entry

	// The regular file whose chunks may still come: its name and size, how much of it
	// is covered, and whether it is no entry but a landmark. file is false before the first.
	file     bool
	name     string
	size     int64
	covered  int64
	dropped  bool
	total    int64 // size of all files
	prefetch int64 // where the landmark is
	never    bool  // there is a landmark that says not to
}

// A row is one object of the JSON: an entry or a further chunk of one.
type row struct {
	seen                                        uint32
	name, nameBytes, link, linkBytes            string
	typ                                         Type
	size, offset, inner, chunkOffset, chunkSize int64
	mode, uid, gid, major, minor                int64
	mtime                                       time.Time
	xattrs                                      []Xattr
	xattrBytes                                  int
	digest, chunkDigest                         Digest
	zeros                                       bool
	further                                     bool // a chunk, not an entry
}

// The keys of a row, as bits of row.seen.
const (
	kName = 1 << iota
	kNameBytes
	kType
	kLink
	kLinkBytes
	kSize
	kModtime
	kMode
	kUID
	kGID
	kMajor
	kMinor
	kXattrs
	kXattrsBytes
	kDigest
	kOffset
	kInner
	kChunkOffset
	kChunkSize
	kChunkDigest
	kChunkType
)

// maxValue is the size of one value of the JSON, in bytes. The largest are xattrs:
// 64 KiB in base64.
const maxValue = 1 << 20

// feed stops a value before it fills the memory: jsontext holds each as a whole.
type feed struct {
	r   io.Reader
	p   *parser
	fed int64
}

func (f *feed) Read(b []byte) (int, error) {
	if f.p.d != nil && f.fed-f.p.d.InputOffset() > maxValue {
		return 0, fmt.Errorf("a value of more than %d bytes", maxValue)
	}
	n, err := f.r.Read(b)
	f.fed += int64(n)
	return n, err
}

func newParser(r io.Reader, loc Location, size int64) *parser {
	p := &parser{loc: loc, t: &TOC{Compression: loc.Compression, DataEnd: loc.DataEnd}}
	// Rows have about 300 bytes. Growing lists copies them several times over; a size that
	// is a lie costs no more than 40 MB.
	rows := int(min(max(size, 0)/300, 1<<17))
	p.t.Entries, p.t.Chunks = slices.Grow(p.t.Entries, rows), slices.Grow(p.t.Chunks, rows)
	// Keys that are given twice are found below, by less work than remembering all.
	p.d = jsontext.NewDecoder(&feed{r: r, p: p}, jsontext.AllowDuplicateNames(true))
	p.onField = p.field
	p.onXattr = func(key []byte) error { return p.xattr(p.strings.add(key)) }
	p.onXattrBytes = func(key []byte) error {
		name, err := p.unbase64(key)
		if err != nil {
			return err
		}
		return p.xattr(name)
	}
	return p
}

func (p *parser) toc() error {
	const version, entries = 1, 2
	seen := 0
	err := p.object(func(key []byte) error {
		switch string(key) {
		case "version":
			if seen&version != 0 {
				return errTwice
			}
			seen |= version
			v, err := p.int()
			if err == nil && v != 1 {
				err = fmt.Errorf("%w: the table of contents is of version %d", ErrNotLazy, v)
			}
			return err
		case "entries":
			if seen&entries != 0 {
				return errTwice
			}
			seen |= entries
			return p.entries()
		}
		return p.d.SkipValue()
	})
	if err != nil {
		return err
	}
	if seen != version|entries {
		return errors.New("want version and entries")
	}
	if _, err := p.d.ReadToken(); err != io.EOF {
		if err == nil {
			err = errors.New("more than one JSON value")
		}
		return err
	}
	if !p.never {
		p.t.PrefetchEnd = p.prefetch
	}
	return nil
}

var errTwice = errors.New("given twice")

func (p *parser) entries() error {
	if p.d.PeekKind() == 'n' { // what Go writes for no entries
		return p.d.SkipValue()
	}
	if err := p.open('['); err != nil {
		return err
	}
	for p.d.PeekKind() != ']' {
		if err := p.entry(); err != nil {
			return err
		}
	}
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	return p.endFile()
}

// entry reads one row and adds what it says to the TOC.
func (p *parser) entry() error {
	r := &p.row
	*r = row{xattrs: r.xattrs[:0]}
	if err := p.open('{'); err != nil {
		return p.wrap(err)
	}
	if err := p.members(p.onField); err != nil {
		return p.wrap(fmt.Errorf("%.100s: %w", p.d.StackPointer().LastToken(), err))
	}
	if r.seen&kType == 0 {
		return p.wrap(errors.New("no type"))
	}
	if r.further {
		if !p.file {
			return p.wrap(errors.New("a chunk of no file"))
		}
		return p.wrap(p.chunk(r.chunkDigest))
	}
	if err := p.endFile(); err != nil {
		return err
	}
	return p.wrap(p.newEntry())
}

// wrap names the entry that err is about.
func (p *parser) wrap(err error) error {
	if err == nil {
		return nil
	}
	name := p.row.name
	if p.row.further {
		name = p.name
	}
	if name == "" {
		return fmt.Errorf("entry %d: %w", len(p.t.Entries), err)
	}
	return fmt.Errorf("entry %.300q: %w", name, err)
}

func (p *parser) newEntry() error {
	r := &p.row
	if r.seen&kName == 0 {
		return errors.New("no name")
	}
	var err error
	e := Entry{Type: r.typ, Mode: uint32(r.mode & 0o7777)}
	if e.Name, err = original("name", r.name, r.nameBytes, r.seen&kNameBytes != 0); err != nil {
		return err
	}
	if e.Type == Symlink || e.Type == Hardlink {
		if e.Link, err = original("link", r.link, r.linkBytes, r.seen&kLinkBytes != 0); err != nil {
			return err
		}
	}
	if e.UID, err = owner("uid", r.uid); err != nil {
		return err
	}
	if e.GID, err = owner("gid", r.gid); err != nil {
		return err
	}
	if e.Type == CharDevice || e.Type == BlockDevice {
		if e.Major, e.Minor, err = device(r.major, r.minor); err != nil {
			return err
		}
	}
	if r.seen&kModtime != 0 && !r.mtime.IsZero() {
		e.MTime, e.MTimeNsec = r.mtime.Unix(), uint32(r.mtime.Nanosecond())
	}
	if e.Type == Regular {
		e.Size = r.size
	}
	if len(r.xattrs) > 0 {
		e.Xattrs = append(e.Xattrs, r.xattrs...)
	}
	if err := e.normalize(); err != nil {
		return err
	}
	e.FirstChunk = uint32(len(p.t.Chunks))
	p.dropped = reserved(e.Name)
	if e.Name == PrefetchLandmark && r.offset >= 0 && r.offset <= p.loc.DataEnd {
		p.prefetch = r.offset
	}
	p.never = p.never || e.Name == NoPrefetchLandmark
	if !p.dropped {
		if len(p.t.Entries) >= MaxEntries {
			return fmt.Errorf("%w: the table of contents has more than %d entries", ErrNotLazy, MaxEntries)
		}
		p.t.Entries = append(p.t.Entries, e)
	}
	if p.file = e.Type == Regular; !p.file {
		return nil
	}
	p.name, p.size, p.covered = e.Name, e.Size, 0
	if e.Size > math.MaxInt64-p.total {
		return errors.New("sizes add up to more than 2^63 bytes")
	}
	p.total += e.Size
	if e.Size == 0 {
		return nil
	}
	digest := r.chunkDigest
	if r.seen&kChunkDigest == 0 && (r.chunkSize == 0 || r.chunkSize == e.Size) {
		digest = r.digest // of the file, which is this chunk
	}
	return p.chunk(digest)
}

// original returns the bytes of a name that may not have been UTF-8. See JSONWriter.
func original(what, s, raw string, hasRaw bool) (string, error) {
	if hasRaw {
		return raw, nil
	}
	if strings.Contains(s, "\uFFFD") {
		return "", fmt.Errorf("%w: %s is not UTF-8, and its bytes are lost", ErrNotLazy, what)
	}
	return s, nil
}

// chunk adds the row's chunk to the file it belongs to.
func (p *parser) chunk(digest Digest) error {
	if p.dropped {
		return nil
	}
	r := &p.row
	c := Chunk{FileOffset: r.chunkOffset, Size: r.chunkSize, Hole: r.zeros}
	if c.FileOffset != p.covered {
		return fmt.Errorf("chunk at byte %d of the file, want %d", c.FileOffset, p.covered)
	}
	if c.Size == 0 { // to the end of the file
		c.Size = p.size - p.covered
	}
	if c.Size <= 0 || c.Size > p.size-p.covered {
		return fmt.Errorf("chunk of %d bytes at byte %d of a file of %d", c.Size, c.FileOffset, p.size)
	}
	if !c.Hole {
		c.Digest, c.Member, c.Inner = digest, r.offset, r.inner
		switch {
		case c.Member < 0 || c.Member >= p.loc.DataEnd:
			return fmt.Errorf("chunk at byte %d of the blob, whose files end at %d", c.Member, p.loc.DataEnd)
		case c.Inner < 0:
			return fmt.Errorf("chunk at byte %d of its member", c.Inner)
		case c.Digest.IsZero():
			return fmt.Errorf("%w: the chunk at byte %d has no digest", ErrNotLazy, c.FileOffset)
		case c.Size > MaxChunkSize:
			return fmt.Errorf("%w: a chunk of %d bytes, at most %d are fetched by themselves", ErrNotLazy, c.Size, MaxChunkSize)
		case c.Inner > MaxChunkSize:
			return fmt.Errorf("%w: a chunk at byte %d of its member, at most %d are inflated to get at one", ErrNotLazy, c.Inner, MaxChunkSize)
		}
	}
	if len(p.t.Chunks) >= MaxChunks {
		return fmt.Errorf("%w: the table of contents has more than %d chunks", ErrNotLazy, MaxChunks)
	}
	p.t.Chunks = append(p.t.Chunks, c)
	p.t.Entries[len(p.t.Entries)-1].NumChunks++
	p.covered += c.Size
	return nil
}

// endFile checks that the file before has all its chunks.
func (p *parser) endFile() error {
	if p.file && !p.dropped && p.covered != p.size {
		return fmt.Errorf("entry %.300q: chunks of %d bytes for a file of %d", p.name, p.covered, p.size)
	}
	p.file = false
	return nil
}

// field reads the value of one key of a row.
func (p *parser) field(key []byte) error {
	r := &p.row
	var bit uint32
	var num *int64
	var str *string
	switch string(key) {
	case "name":
		bit, str = kName, &r.name
	case "linkName":
		bit, str = kLink, &r.link
	case "size":
		bit, num = kSize, &r.size
	case "mode":
		bit, num = kMode, &r.mode
	case "uid":
		bit, num = kUID, &r.uid
	case "gid":
		bit, num = kGID, &r.gid
	case "devMajor":
		bit, num = kMajor, &r.major
	case "devMinor":
		bit, num = kMinor, &r.minor
	case "offset":
		bit, num = kOffset, &r.offset
	case "innerOffset":
		bit, num = kInner, &r.inner
	case "chunkOffset":
		bit, num = kChunkOffset, &r.chunkOffset
	case "chunkSize":
		bit, num = kChunkSize, &r.chunkSize
	case "type":
		bit = kType
	case "modtime":
		bit = kModtime
	case "digest":
		bit = kDigest
	case "chunkDigest":
		bit = kChunkDigest
	case "chunkType":
		bit = kChunkType
	case "xattrs":
		bit = kXattrs
	case "nameBytes":
		bit = kNameBytes
	case "linkNameBytes":
		bit = kLinkBytes
	case "xattrsBytes":
		bit = kXattrsBytes
	default:
		return p.d.SkipValue()
	}
	if r.seen&bit != 0 {
		return errTwice
	}
	if p.d.PeekKind() == 'n' {
		return p.d.SkipValue()
	}
	r.seen |= bit
	var err error
	switch {
	case num != nil:
		*num, err = p.int()
		return err
	case str != nil:
		*str, err = p.string()
		return err
	case bit == kXattrs:
		return p.object(p.onXattr)
	case bit == kXattrsBytes:
		return p.object(p.onXattrBytes)
	}
	s, err := p.text()
	if err != nil {
		return err
	}
	switch bit {
	case kType:
		return r.parseType(s)
	case kModtime:
		if len(s) > 0 {
			err = r.mtime.UnmarshalText(s)
		}
	case kDigest:
		err = parseDigest(&r.digest, s)
	case kChunkDigest:
		err = parseDigest(&r.chunkDigest, s)
	case kChunkType:
		switch string(s) {
		case "":
		case "zeros":
			r.zeros = true
		default:
			err = fmt.Errorf("%.100q: not known", s)
		}
	case kNameBytes:
		r.nameBytes, err = p.unbase64(s)
	case kLinkBytes:
		r.linkBytes, err = p.unbase64(s)
	}
	return err
}

func (r *row) parseType(s []byte) error {
	for t, name := range typeNames {
		if t > 0 && string(s) == name {
			r.typ = Type(t)
			return nil
		}
	}
	if r.further = string(s) == typeChunk; r.further {
		return nil
	}
	return fmt.Errorf("%.100q: not known", s)
}

// parseDigest is ParseDigest without garbage. "" is no digest: containers/storage
// writes that for empty files.
func parseDigest(d *Digest, s []byte) error {
	const prefix = "sha256:"
	if len(s) == 0 {
		return nil
	}
	if hexed, ok := bytes.CutPrefix(s, []byte(prefix)); ok && len(hexed) == 2*len(d) && !bytes.ContainsAny(hexed, "ABCDEF") {
		if _, err := hex.Decode(d[:], hexed); err == nil {
			return nil
		}
	}
	_, err := ParseDigest(string(s))
	return err
}

func (p *parser) xattr(name string) error {
	r := &p.row
	var value string
	if p.d.PeekKind() == 'n' {
		if err := p.d.SkipValue(); err != nil {
			return err
		}
	} else {
		s, err := p.text()
		if err != nil {
			return err
		}
		if value, err = p.unbase64(s); err != nil {
			return err
		}
	}
	// normalize has the last word; this bounds the list until then.
	if r.xattrBytes += len(name) + len(value); name == "" || r.xattrBytes > MaxXattrs {
		return fmt.Errorf("want a name, and at most %d bytes of xattrs", MaxXattrs)
	}
	r.xattrs = append(r.xattrs, Xattr{name, value})
	return nil
}

// The rest reads JSON values.

// object calls f for each key, to read its value. The key is valid until it does.
func (p *parser) object(f func(key []byte) error) error {
	if err := p.open('{'); err != nil {
		return err
	}
	return p.members(f)
}

// members is object from after its beginning.
func (p *parser) members(f func(key []byte) error) error {
	for p.d.PeekKind() != '}' {
		key, err := p.text()
		if err != nil {
			return err
		}
		if err := f(key); err != nil {
			return err
		}
	}
	_, err := p.d.ReadToken()
	return err
}

// open reads the beginning of an object or array.
func (p *parser) open(kind jsontext.Kind) error {
	if k := p.d.PeekKind(); k != kind && k != 0 {
		return fmt.Errorf("want %s", kind)
	}
	_, err := p.d.ReadToken()
	return err
}

// scalar reads a value that is no object or array.
func (p *parser) scalar(kind jsontext.Kind, what string) (jsontext.Value, error) {
	if k := p.d.PeekKind(); k != kind && k != 0 {
		return nil, fmt.Errorf("want %s", what)
	}
	return p.d.ReadValue()
}

func (p *parser) int() (int64, error) {
	v, err := p.scalar('0', "a number")
	if err != nil {
		return 0, err
	}
	digits := v
	if v[0] == '-' {
		digits = v[1:]
	}
	var n int64
	for _, c := range digits {
		if c < '0' || c > '9' || n > (math.MaxInt64-int64(c-'0'))/10 {
			return 0, fmt.Errorf("%.50s: want an integer below 2^63", v)
		}
		n = n*10 + int64(c-'0')
	}
	if len(digits) < len(v) {
		n = -n
	}
	return n, nil
}

// text reads a string. The result is valid until the next value is read.
func (p *parser) text() ([]byte, error) {
	v, err := p.scalar('"', "a string")
	if err != nil {
		return nil, err
	}
	if s := v[1 : len(v)-1]; bytes.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	p.plain, err = jsontext.AppendUnquote(p.plain[:0], v)
	return p.plain, err
}

// string is text that stays valid.
func (p *parser) string() (string, error) {
	s, err := p.text()
	if err != nil {
		return "", err
	}
	return p.strings.add(s), nil
}

func (p *parser) unbase64(s []byte) (string, error) {
	var err error
	p.bytes, err = base64.StdEncoding.AppendDecode(p.bytes[:0], s)
	if err != nil {
		return "", err
	}
	return p.strings.add(p.bytes), nil
}

// An arena makes strings that share blocks of memory, one allocation for many.
type arena struct{ b *strings.Builder }

const arenaBlock = 64 << 10

func (a *arena) add(s []byte) string {
	if len(s) > arenaBlock/8 {
		return string(s)
	}
	if a.b == nil || a.b.Cap()-a.b.Len() < len(s) {
		a.b = new(strings.Builder) // the strings hold the old block
		a.b.Grow(arenaBlock)
	}
	n := a.b.Len()
	a.b.Write(s)
	return a.b.String()[n:]
}
