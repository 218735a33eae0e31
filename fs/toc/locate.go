package toc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// A Location says where in a blob the compressed table of contents lies.
type Location struct {
	Compression Compression
	// Offset and Size are the table's place, in bytes of the blob: a gzip member
	// or a zstd frame.
	Offset, Size int64
	// DataEnd is where the members with the files end, in bytes of the blob.
	DataEnd int64
	// Inflated is the size of the JSON in bytes, or 0 if that is not said. It is a hint.
	Inflated int64
}

// A Promise is what a manifest says about a layer's table of contents. Without
// one nothing would tell a true table from a false one.
type Promise struct {
	// Digest is of the inflated table (JSON), or of the compressed one if Compressed is set.
	Digest     Digest
	Compressed bool
}

// Promised returns what the annotations of a layer's descriptor promise about its table
// of contents. It is an error that wraps [ErrNotLazy] if they promise nothing.
func Promised(annotations map[string]string) (Promise, error) {
	for _, key := range []string{DigestAnnotation, PodmanChecksumAnnotation, ZstdChecksumAnnotation} {
		if s, ok := annotations[key]; ok {
			d, err := ParseDigest(s)
			if err != nil {
				return Promise{}, fmt.Errorf("annotation %s: %w", key, err)
			}
			return Promise{d, key != DigestAnnotation}, nil
		}
	}
	return Promise{}, fmt.Errorf("%w: the manifest has no digest of a table of contents", ErrNotLazy)
}

// Locate returns where the annotations of a layer's descriptor say that its table of
// contents is, and whether they say so at all; if they do not, the footer does: see [ParseFooter].
// blobSize is the blob's size in bytes. A place that is not in the blob is an error.
func Locate(annotations map[string]string, blobSize int64) (Location, bool, error) {
	for _, key := range []string{PositionAnnotation, PodmanPositionAnnotation, ZstdPositionAnnotation} {
		s, ok := annotations[key]
		if !ok {
			continue
		}
		loc, err := parsePosition(s, key == PositionAnnotation, blobSize)
		if err != nil {
			return Location{}, false, fmt.Errorf("annotation %s: %.100q: %w", key, s, err)
		}
		return loc, true, nil
	}
	return Location{}, false, nil
}

func parsePosition(s string, gzip bool, blobSize int64) (Location, error) {
	want := 4
	if gzip {
		want = 3
	}
	fields := strings.Split(s, ":")
	if len(fields) != want {
		return Location{}, fmt.Errorf("want %d numbers", want)
	}
	var n [4]uint64
	for i, f := range fields {
		var err error
		if n[i], err = strconv.ParseUint(f, 10, 64); err != nil {
			return Location{}, fmt.Errorf("want %d numbers", want)
		}
	}
	if gzip {
		return location(Gzip, n[0], n[1], n[2], blobSize)
	}
	return zstdLocation(n[0], n[1], n[2], n[3], blobSize)
}

// The footers, at the very end of a blob. The gzip ones are an empty gzip member
// whose extra field tells the offset of the table of contents:
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md#footer
// The zstd ones are a skippable frame of little endian numbers and a magic:
// https://github.com/containers/storage/blob/main/pkg/chunked/internal/minimal/compression.go
const (
	gzipHeader    = "\x1f\x8b\x08\x04" // magic, deflate, an extra field and nothing else
	gzipEmpty     = "\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"
	extraStargz   = "\x1a\x00SG\x16\x00" // sizes of the field and the subfield
	extraLegacy   = "\x16\x00"
	extraExternal = "\x15\x00SG\x11\x00STARGZEXTERNALTOC"
	stargzMagic   = "STARGZ"

	zstdMagic   = "GnUlInUx" // stargz-snapshotter, and containers/storage until v1.50
	podmanMagic = "GNUlInUx"
	skippable   = "\x50\x2a\x4d\x18"
	frameHeader = 8 // of a skippable frame: magic and size
	typeCRFS    = 1 // the table of contents is JSON of this kind
)

// FooterSize is the largest footer that [ParseFooter] knows, in bytes, with its frame's header.
const FooterSize = frameHeader + 64

// ParseFooter returns where the footer of a blob says that its table of contents
// is. tail is the end of the blob: the last FooterSize bytes or more, or all of a
// smaller blob; blobSize is its whole size. If there is no footer the error wraps [ErrNotLazy]; one that
// points out of the blob is an error too.
func ParseFooter(tail []byte, blobSize int64) (Location, error) {
	if int64(len(tail)) < min(FooterSize, blobSize) || int64(len(tail)) > blobSize {
		return Location{}, fmt.Errorf("footer: %d bytes of a blob of %d", len(tail), blobSize)
	}
	for _, f := range []struct {
		extra  string
		offset bool
	}{{extraStargz, true}, {extraLegacy, true}, {extraExternal, false}} {
		extra, ok := gzipExtra(tail, f.extra, f.offset)
		if !ok {
			continue
		}
		if !f.offset {
			return Location{}, fmt.Errorf("%w: the table of contents is not in the blob", ErrNotLazy)
		}
		offset, err := strconv.ParseUint(extra, 16, 64)
		if err != nil {
			return Location{}, fmt.Errorf("footer: offset %.20q", extra)
		}
		end := uint64(blobSize - footerLen(f.extra, true))
		if offset >= end {
			return Location{}, fmt.Errorf("footer: table of contents at byte %d of a blob of %d", offset, blobSize)
		}
		loc, err := location(Gzip, offset, end-offset, 0, blobSize)
		if err != nil {
			return Location{}, fmt.Errorf("footer: %w", err)
		}
		return loc, nil
	}
	for _, size := range []int{64, 40} {
		frame := tail[max(0, len(tail)-frameHeader-size):]
		if len(frame) != frameHeader+size || string(frame[:4]) != skippable ||
			binary.LittleEndian.Uint32(frame[4:]) != uint32(size) {
			continue
		}
		p := frame[frameHeader:]
		if magic := string(p[size-8:]); magic != podmanMagic && magic != zstdMagic {
			continue
		}
		n := func(i int) uint64 { return binary.LittleEndian.Uint64(p[8*i:]) }
		loc, err := zstdLocation(n(0), n(1), n(2), n(3), blobSize-int64(len(frame)))
		if err != nil {
			return Location{}, fmt.Errorf("footer: %w", err)
		}
		return loc, nil
	}
	return Location{}, fmt.Errorf("%w: the blob has no footer of eStargz or zstd:chunked", ErrNotLazy)
}

func footerLen(extra string, offset bool) int64 {
	n := int64(len(gzipHeader) + 6 + len(extra) + len(gzipEmpty))
	if offset {
		n += 16 + int64(len(stargzMagic))
	}
	return n
}

// gzipExtra reports whether tail ends with the empty gzip member whose extra
// field is the given one, and returns the 16 digits after it if it has an offset.
func gzipExtra(tail []byte, extra string, offset bool) (digits string, ok bool) {
	n := footerLen(extra, offset)
	if int64(len(tail)) < n {
		return "", false
	}
	p, ok := bytes.CutPrefix(tail[int64(len(tail))-n:], []byte(gzipHeader))
	if !ok {
		return "", false
	}
	p = p[6:] // time, flags and system: writers differ
	if p, ok = bytes.CutPrefix(p, []byte(extra)); !ok {
		return "", false
	}
	if offset {
		digits, p = string(p[:16]), p[16:]
		if p, ok = bytes.CutPrefix(p, []byte(stargzMagic)); !ok {
			return "", false
		}
	}
	return digits, string(p) == gzipEmpty
}

// zstdLocation is location for the four numbers that annotations and footers of
// zstd:chunked have. The table is in a skippable frame, whose header precedes it.
func zstdLocation(offset, size, inflated, typ uint64, end int64) (Location, error) {
	if typ != typeCRFS {
		return Location{}, fmt.Errorf("%w: table of contents of type %d", ErrNotLazy, typ)
	}
	if offset < frameHeader {
		return Location{}, fmt.Errorf("table of contents at byte %d", offset)
	}
	loc, err := location(Zstd, offset, size, inflated, end)
	if err != nil {
		return Location{}, err
	}
	loc.DataEnd -= frameHeader
	return loc, nil
}

// location checks that the table of contents lies before byte end of the blob.
func location(c Compression, offset, size, inflated uint64, end int64) (Location, error) {
	if end < 0 || offset > uint64(end) || size == 0 || size > uint64(end)-offset {
		return Location{}, fmt.Errorf("table of contents of %d bytes at byte %d of %d", size, offset, end)
	}
	if inflated > MaxInflated {
		return Location{}, fmt.Errorf("%w: table of contents of %d bytes, at most %d are read", ErrNotLazy, inflated, MaxInflated)
	}
	return Location{Compression: c, Offset: int64(offset), Size: int64(size), DataEnd: int64(offset), Inflated: int64(inflated)}, nil
}
