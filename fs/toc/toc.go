package toc

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Type is what kind of file an [Entry] makes.
type Type uint8

// The types of a tar entry that make a file. Chunks of a large file are not
// entries of their own here: see [Entry.Chunks].
const (
	Regular Type = iota + 1
	Directory
	Symlink
	Hardlink
	CharDevice
	BlockDevice
	FIFO
)

// Compression is how the members of a layer are compressed.
type Compression uint8

const (
	// Gzip members: eStargz and legacy stargz.
	Gzip Compression = iota + 1
	// Zstd frames: zstd:chunked.
	Zstd
	// Whole is a layer without members: an ordinary tar, which can be had
	// as a whole only. Its chunks have digests and sizes, but no place in the blob.
	Whole
)

// A TOC is a layer's table of contents. It is immutable after [Parse] or
// [FromTar] returned it.
type TOC struct {
	// Digest is the SHA-256 of the uncompressed table of contents, as the
	// layer's descriptor names it. For a Whole layer it is the layer's diffID.
	Digest      Digest
	Compression Compression
	// DataEnd is where the last member ends, in bytes of the blob.
	DataEnd int64
	// PrefetchEnd is how many bytes of the blob, from its beginning, whoever made the
	// layer found worth fetching before they are asked for. 0 is none.
	PrefetchEnd int64
	// Entries are in the order of the tar: later ones override earlier ones of
	// the same name. Landmarks and the TOC itself are not among them; whiteouts
	// are, under the names the tar gives them.
	Entries []Entry
	// Chunks holds the chunks of all regular files.
	Chunks []Chunk
}

// An Entry is one file, directory or link of a layer.
type Entry struct {
	// Name is the path from the root: no leading or trailing slash, no empty, "."
	// or ".." element, at most 4095 bytes, elements of at most 255 bytes, no NUL;
	// not necessarily UTF-8. "" is the root itself.
	Name string
	// Link is a symlink's target as it stands in the tar (1 to 4095 bytes, no
	// NUL), or a hard link's target in the form of Name.
	Link string
	// Xattrs are in the order of their names.
	Xattrs []Xattr
	// Size is the length of a regular file, in bytes; otherwise 0.
	Size int64
	// MTime is the modification time, in seconds since 1970 (may be negative).
	MTime     int64
	MTimeNsec uint32 // 0 to 999,999,999
	UID, GID  uint32
	// Mode is the permission bits with setuid, setgid and sticky: 0 to 0o7777.
	Mode         uint32
	Major, Minor uint32 // of a device
	// FirstChunk and NumChunks say which of the TOC's Chunks are the file's
	// content. They are in order, without gap or overlap, and add up to Size.
	FirstChunk, NumChunks uint32
	Type                  Type
}

// Xattr is one extended attribute, its name with the namespace ("user.comment").
type Xattr struct{ Name, Value string }

// A Chunk is the unit of verification: some bytes of one file.
type Chunk struct {
	// Digest is the SHA-256 of the chunk's bytes; all zero for a hole.
	Digest Digest
	// FileOffset and Size: where the bytes lie in the file. Size is above 0 and, but
	// for a hole, at most [MaxChunkSize].
	FileOffset, Size int64
	// Member is where the compressed stream that holds the chunk begins, in
	// bytes of the blob; Inner is where the chunk begins in it, in bytes of the
	// member. Both are 0 for holes and in a Whole layer.
	Member, Inner int64
	// Hole marks bytes that are all zero and are not stored in the blob.
	Hole bool
}

// MaxChunkSize is the largest chunk, in bytes, that is fetched by itself. A chunk is held in
// memory until its digest is checked. Layers with larger ones are taken as a whole.
const MaxChunkSize = 64 << 20

// Digest is a SHA-256 digest.
type Digest [sha256.Size]byte

// String returns the digest as OCI writes it, "sha256:" and 64 hexadecimal digits.
func (d Digest) String() string { return "sha256:" + hex.EncodeToString(d[:]) }

// IsZero reports whether d is the zero value, which is no digest of anything.
func (d Digest) IsZero() bool { return d == Digest{} }

// ParseDigest parses what [Digest.String] returns. Other algorithms are an error.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	const prefix = "sha256:"
	if len(s) != len(prefix)+2*len(d) || s[:len(prefix)] != prefix {
		return d, fmt.Errorf("digest %.80q: want sha256: and 64 hexadecimal digits", s)
	}
	for _, c := range []byte(s[len(prefix):]) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return d, fmt.Errorf("digest %q: want sha256: and 64 hexadecimal digits", s)
		}
	}
	hex.Decode(d[:], []byte(s[len(prefix):]))
	return d, nil
}

// ObjectKey returns the name of the object whose content is the given chunks in
// order: the SHA-256 over each chunk's digest (32 bytes) and size (8 bytes, big endian). The
// sizes are in it because a TOC may lie about them: a wrong size makes another name,
// and so can never stand in the way of who tells the truth.
func ObjectKey(chunks []Chunk) Digest {
	const entry = sha256.Size + 8
	var one [entry]byte // nearly every file has one chunk: no garbage for it
	b := one[:0]
	for i := range chunks {
		b = append(b, chunks[i].Digest[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(chunks[i].Size))
	}
	return sha256.Sum256(b)
}

// Content returns the chunks of entry e, which is one of t's.
func (t *TOC) Content(e *Entry) []Chunk {
	return t.Chunks[e.FirstChunk : e.FirstChunk+e.NumChunks]
}
